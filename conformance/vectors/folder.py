"""A folder of vectors: its layout, and writing one.

    manifest.json                          version, and for each case what manifest.schema.json says
    ID/case.safetensors                    input.NAME, expected.NAME (float64), bound.NAME (float64)

and of one attention step

    ID/model.onnx                          the same as the backend tests of ONNX have it: our graph of the operation,
    ID/test_data_set_0/input_0.pb, ..      its inputs in the graph's order,
    ID/test_data_set_0/output_0.pb, ..     its outputs, rounded to their dtype,
    ID/test_data_set_0/bound_0.pb, ..      and how far each number of them may be off (float64)

or, of what is asked of a whole model

    ID/program.json                        the calls, see `program_json`; tensors are NUMBER.NAME of a call

The same cases give the same bytes, with the same versions of refspan and onnx.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import refspan
from refspan.conformance.vectors.disk import refuse_links
from refspan.conformance.vectors.onnx_layout import onnx_files
from refspan.conformance.vectors.program_json import to_json
from refspan.conformance.vectors.program_vector import ProgramVector
from refspan.conformance.vectors.reading import MANIFEST, VERSION, AnyVector, entries_of, fields_of
from refspan.errors import SetupError
from refspan.files import check_folder_writable, write_whole


def write_folder(path: Path, vectors: Sequence[AnyVector]) -> None:
    """Write vectors into a folder, which is made if need be; cases that are there already stay.

    What has been written is removed if not all can be, or Ctrl-C comes. A process that is killed leaves a folder that
    can be added to: a new one gets its manifest first, and again at the end.

    Raises:
        SetupError: the folder holds something else or a link, or cannot be written.
    """
    entries = entries_to_add_to(path)  # and no link is on the way of what is written below
    new = [one for one in (path, path / MANIFEST) if not one.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if path / MANIFEST in new:
            _write_manifest(path, entries)
        for vector in vectors:
            contents = dict(files_of(vector))
            if not (path / vector.id).exists():
                new.append(path / vector.id)
            for name, content in contents.items():
                target = path / vector.id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, content)
            hashes = {name: sha256(content).hexdigest() for name, content in sorted(contents.items())}
            entries[vector.id] = {"id": vector.id, **_described(vector), "files": hashes}
        _write_manifest(path, entries)
    except BaseException as error:
        _undo(reversed(new))  # the manifest after all cases
        if isinstance(error, OSError):
            raise SetupError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def _undo(made: Iterable[Path]) -> None:
    for path in made:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_manifest(path: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    cases = [entries[id_] for id_ in sorted(entries)]
    write_whole(path / MANIFEST, _json({"refspan_vectors": VERSION, "refspan": refspan.__version__, "cases": cases}))


def entries_to_add_to(path: Path) -> dict[str, dict[str, Any]]:
    """The cases that a folder holds, none if it is yet to be made.

    Raises:
        SetupError: it is not for vectors, or nothing can be written there.
    """
    check_folder_writable(path)
    try:
        if not path.exists() or not any(path.iterdir()):
            return {}
    except OSError as error:
        raise SetupError(f"{path}: cannot be written into: {error.strerror}") from None
    if not (path / MANIFEST).exists():
        raise SetupError(f"{path}: is not empty, and holds no vectors; expected a new folder, or one of vectors")
    refuse_links(path)
    entries = entries_of(path)
    try:
        _json(entries)
    except (ValueError, RecursionError):
        raise SetupError(f"{path / MANIFEST}: cannot be added to; `refspan vectors {path} --lint` says more") from None
    return entries


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode()


def _described(vector: AnyVector) -> dict[str, Any]:
    fields = {name: getattr(vector, name) for name in fields_of(vector.operation)}
    return fields | {"dtype": vector.dtype, "tolerance": tolerance_of(vector)}


def tolerance_of(vector: AnyVector) -> dict[str, dict[str, float]]:
    """Result -> the largest finite bound of its numbers, and how many have none: rounding decides about these."""
    return {
        name: {
            "largest_bound": float(np.max(bound, initial=0, where=np.isfinite(bound))),
            "undecided": int(np.sum(~np.isfinite(bound))),
        }
        for name, bound in sorted(vector.bound.items())
    }


def files_of(vector: AnyVector) -> Iterator[tuple[str, bytes]]:
    """Name within the folder of the case -> content."""
    if isinstance(vector, ProgramVector):
        said, inputs = to_json(vector.program)
        yield "program.json", _json(said)
    else:
        inputs = dict(vector.inputs)
        yield from onnx_files(vector)
    tensors = {f"input.{name}": array for name, array in inputs.items()}
    tensors |= {f"expected.{name}": array for name, array in vector.expected.items()}
    tensors |= {f"bound.{name}": array for name, array in vector.bound.items()}
    yield "case.safetensors", safetensors.numpy.save({n: np.array(x, order="C") for n, x in tensors.items()})
