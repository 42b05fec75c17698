"""A folder of vectors: layout, writing, reading with suspicion, and a check of its soundness.

    manifest.json                          version, and for each case what manifest.schema.json says
    ID/case.safetensors                    input.NAME, expected.NAME (float64), bound.NAME (float64)

and of one attention step

    ID/model.onnx                          the same as the backend tests of ONNX have it: our graph of the operation,
    ID/test_data_set_0/input_0.pb, ..      its inputs in the graph's order,
    ID/test_data_set_0/output_0.pb, ..     and its outputs, rounded to their dtype

or, of what is asked of a whole model

    ID/program.json                        the calls, see `program_json`; tensors are NUMBER.NAME of a call

The same cases give the same bytes, with the same versions of refspan and onnx.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import refspan
from refspan.conformance.loading import load_backend
from refspan.conformance.programs import Learn, Open, run_program
from refspan.conformance.protocol import Array
from refspan.conformance.vectors.onnx_layout import onnx_files
from refspan.conformance.vectors.program_json import answers_by_name, to_json
from refspan.conformance.vectors.program_vector import ProgramVector
from refspan.conformance.vectors.reading import (
    MANIFEST,
    VERSION,
    AnyVector,
    content_of,
    entries_of,
    fields_of,
    read_vector,
)
from refspan.conformance.vectors.vector import Vector
from refspan.errors import SetupError
from refspan.files import write_whole


def write_folder(path: Path, vectors: Sequence[AnyVector]) -> None:
    """Write vectors into a folder, which is made if need be; cases that are there already stay.

    Raises:
        SetupError: the folder holds something else, or cannot be written.
    """
    entries = entries_to_add_to(path)
    for vector in vectors:
        contents = dict(_files_of(vector))
        try:
            for name, content in contents.items():
                target = path / vector.id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, content)
        except OSError as error:
            raise SetupError(f"{path}: cannot be written: {error.strerror}") from None
        hashes = {name: sha256(content).hexdigest() for name, content in sorted(contents.items())}
        entries[vector.id] = {"id": vector.id, **_described(vector), "files": hashes}
    tree = {
        "refspan_vectors": VERSION,
        "refspan": refspan.__version__,
        "cases": [entries[id_] for id_ in sorted(entries)],
    }
    write_whole(path / MANIFEST, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())


def entries_to_add_to(path: Path) -> dict[str, dict[str, Any]]:
    """The cases that a folder holds, none if it is yet to be made; raises SetupError if it is not for vectors."""
    try:
        if not path.exists() or not any(path.iterdir()):
            return {}
    except OSError as error:
        raise SetupError(f"{path}: cannot be written into: {error.strerror}") from None
    if not (path / MANIFEST).exists():
        raise SetupError(f"{path}: is not empty, and holds no vectors; expected a new folder, or one of vectors")
    return entries_of(path)


def lint_folder(path: Path) -> Iterator[str]:
    """What is wrong with a folder, a line each: files against the manifest, ids, hashes, ONNX files, right answers."""
    entries = entries_of(path)
    for name in sorted({one.name for one in path.iterdir()} - {MANIFEST} - set(entries)):
        yield f"{name}: is not in the manifest"
    for id_, entry in entries.items():
        try:
            vector = read_vector(path, entry)
        except SetupError as error:
            yield str(error)
            continue
        if vector.id != id_:
            yield f"{id_}: its contents have the id {vector.id}"
        wanted = dict(_files_of(vector))
        there = {p.relative_to(path / id_).as_posix() for p in (path / id_).rglob("*") if not p.is_dir()}
        for name in sorted(there ^ set(wanted)):
            yield f"{id_}/{name}: is {'missing' if name in wanted else 'not part of a case'}"
        for name in sorted(there & set(wanted)):
            content = content_of(path, f"{id_}/{name}")
            if sha256(content).hexdigest() != entry["files"].get(name):
                yield f"{id_}/{name}: is not what the manifest has the hash of"
            elif content != wanted[name]:
                yield f"{id_}/{name}: is not what this case has with refspan {refspan.__version__} and this onnx"
        yield from _wrong_answers(vector)


def _wrong_answers(vector: AnyVector) -> Iterator[str]:
    """Whether the reference in float64 agrees with what is said to be right."""
    with np.errstate(all="ignore"):
        results = _program_results(vector) if isinstance(vector, ProgramVector) else _step_results(vector)
    for name, expected in vector.expectations().items():
        with np.errstate(invalid="ignore"):
            if name.endswith(".memory_size"):  # the most that may be held; the reference holds what is live
                off = ~(results[name] <= expected.value)
            else:
                off = ~(np.abs(results[name] - expected.value) <= expected.bound + 1e-12 * np.abs(expected.value))
        if np.any(off & np.isfinite(expected.bound)):
            yield f"{vector.id}: what it says of {name} is not what the specification says"


def _program_results(vector: ProgramVector) -> dict[str, Array]:
    program = [
        replace(o, params={name: x.astype(np.float64) for name, x in o.params.items()})
        if isinstance(o, Open | Learn)
        else o
        for o in vector.program
    ]
    program = [
        replace(o, memory=[(hidden.astype(np.float64), age) for hidden, age in o.memory])
        if isinstance(o, Open) and o.memory is not None
        else o
        for o in program
    ]
    return answers_by_name(program, run_program(load_backend("numpy"), program))


def _step_results(vector: Vector) -> dict[str, Array]:
    x = {name: a if a.dtype == np.int64 else a.astype(np.float64) for name, a in vector.inputs.items()}
    if vector.operation == "soft_mask":
        results = {"mask": refspan.soft_mask(x["span"], x["age"], queries=vector.queries, ramp=vector.ramp)}
    else:
        arrays = [x[name] for name in ("query", "key", "value", "span", "age")]
        output, saved = refspan.span_attention(*arrays, ramp=vector.ramp, position=x.get("position"))
        results = {"output": output}
        if vector.operation == "span_attention_backward":
            grads = refspan.span_attention_backward(x["grad_out"], saved)._asdict()
            results = {name: grad for name, grad in grads.items() if grad is not None}
    return results


def _described(vector: AnyVector) -> dict[str, Any]:
    return {name: getattr(vector, name) for name in fields_of(vector.operation)} | {"dtype": vector.dtype}


def _files_of(vector: AnyVector) -> Iterator[tuple[str, bytes]]:
    """Name within the folder of the case -> content."""
    if isinstance(vector, ProgramVector):
        said, inputs = to_json(vector.program)
        yield "program.json", (json.dumps(said, indent=1) + "\n").encode()
    else:
        inputs = dict(vector.inputs)
        yield from onnx_files(vector)
    tensors = {f"input.{name}": array for name, array in inputs.items()}
    tensors |= {f"expected.{name}": array for name, array in vector.expected.items()}
    tensors |= {f"bound.{name}": array for name, array in vector.bound.items()}
    yield "case.safetensors", safetensors.numpy.save({n: np.array(x, order="C") for n, x in tensors.items()})
