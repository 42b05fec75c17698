"""What is wrong with a folder of vectors: `refspan vectors --lint DIR`."""

import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import refspan
from refspan.conformance.guard import Misbehaviour, one_line
from refspan.conformance.loading import load_backend
from refspan.conformance.mutants import MUTANTS
from refspan.conformance.programs import Learn, Open
from refspan.conformance.protocol import Array
from refspan.conformance.runner import DTYPES, select
from refspan.conformance.running import run_program
from refspan.conformance.vectors.disk import below, check_sizes, content_of
from refspan.conformance.vectors.folder import files_of, tolerance_of
from refspan.conformance.vectors.program_json import answers_by_name
from refspan.conformance.vectors.program_vector import ProgramVector
from refspan.conformance.vectors.reading import (
    ID,
    MANIFEST,
    AnyVector,
    entries_of,
    fields_of,
    is_text,
    manifest_of,
    read_vector,
)
from refspan.conformance.vectors.vector import Vector
from refspan.errors import SetupError

KNOWN = {"refspan_vectors", "refspan", "cases"}
"""What a manifest says beside its cases."""
HASH = re.compile("[0-9a-f]{64}")


def lint_folder(path: Path) -> Iterator[str]:
    """What is wrong with a folder, a line each: the manifest, files against it, ids, hashes, ONNX files, right answers.

    Raises:
        SetupError: it is no folder of vectors that could be read.
    """
    entries = entries_of(path)
    there = {id_: dict(_below(path / id_)) for id_ in entries}
    check_sizes(path, [f"{id_}/{name}" for id_, names in there.items() for name in names])
    yield from manifest_faults(manifest_of(path))
    for name in sorted({one.name for one in path.iterdir()} - {MANIFEST} - set(entries)):
        yield f"{one_line(name)}: is not in the manifest"
    for id_, entry in entries.items():
        for name, kind in sorted(there[id_].items()):
            if kind != "file":
                yield f"{id_}/{one_line(name)}: is {'a link' if kind == 'link' else 'an empty folder'}"
        try:
            vector = read_vector(path, entry)
            yield from _case_faults(path, entry, vector, {n for n, kind in there[id_].items() if kind == "file"})
        except SetupError as error:
            yield str(error)


def _below(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir() and not path.is_symlink():
        yield from below(path)


def _case_faults(path: Path, entry: dict[str, Any], vector: AnyVector, there: set[str]) -> Iterator[str]:
    """Of one case that could be read, and the files that its folder has."""
    id_ = entry["id"]
    if vector.id != id_:
        yield f"{id_}: its contents have the id {vector.id}"
    if vector.dtype != entry.get("dtype"):
        yield f"{id_}: is of dtype {vector.dtype}, and the manifest says something else"
    if entry.get("tolerance") != tolerance_of(vector):
        yield f"{id_}: `tolerance` of the manifest is not what its bounds come to"
    wanted = dict(files_of(vector))
    for name in sorted(set(entry["files"]) - set(wanted)):
        yield f"{id_}: `files` has {name[:80]!r}, which is not part of a case"
    for name in sorted(there ^ set(wanted)):
        yield f"{id_}/{one_line(name)}: is {'missing' if name in wanted else 'not part of a case'}"
    for name in sorted(there & set(wanted)):
        content = content_of(path, f"{id_}/{name}")
        if sha256(content).hexdigest() != entry["files"].get(name):
            yield f"{id_}/{name}: is not what the manifest has the hash of"
        elif content != wanted[name]:
            yield f"{id_}/{name}: is not what this case has with refspan {refspan.__version__} and this onnx"
    yield from _wrong_answers(vector)


def manifest_faults(tree: dict[str, Any]) -> Iterator[str]:
    """Where a manifest that can be read is not as manifest.schema.json says, or speaks of what there is not."""
    for name in sorted(set(tree) - KNOWN):
        yield f"{MANIFEST}: has {name[:80]!r}, expected {', '.join(sorted(KNOWN))} and nothing else"
    if not is_text(tree.get("refspan")) or not tree["refspan"]:
        yield f"{MANIFEST}: `refspan` is no version of the package"
    checks = {check.id for check in select()}
    for entry in tree["cases"]:
        for fault in _entry_faults(entry, checks):
            yield f"{entry['id']}: {fault}"


def _entry_faults(entry: dict[str, Any], checks: set[str]) -> Iterator[str]:
    for name in sorted(set(entry) - {"id", "dtype", "files", "tolerance", *fields_of(entry["operation"])}):
        yield f"the manifest has {name[:80]!r} of it; see manifest.schema.json"
    if entry.get("dtype") not in DTYPES:
        yield f"`dtype` is none of {', '.join(DTYPES)}"
    for name in ("clauses", "purpose"):
        if not entry[name]:
            yield f"`{name}` is empty"
    replayed = entry["check"].removeprefix("vectors.")  # one that a backend failed once more
    if entry["check"] not in checks and (replayed == entry["check"] or not ID.fullmatch(replayed)):
        yield f"there is no check {entry['check'][:80]!r} with refspan {refspan.__version__}"
    for name in sorted(set(entry["kills"]) - set(MUTANTS)):
        yield f"there is no mutant {name[:80]!r} with refspan {refspan.__version__}"
    for name, digest in sorted(entry["files"].items()):
        if not HASH.fullmatch(digest):
            yield f"`files` has no SHA-256 of {name[:80]!r}"


def _wrong_answers(vector: AnyVector) -> Iterator[str]:
    """Whether the reference in float64 agrees with what is said to be right."""
    try:
        with np.errstate(all="ignore"):
            results = _program_results(vector) if isinstance(vector, ProgramVector) else _step_results(vector)
    except Misbehaviour as error:
        yield f"{vector.id}: the reference does not take it: {error}"
        return
    for name, expected in vector.expectations().items():
        with np.errstate(invalid="ignore"):
            if name.endswith(".memory_size"):  # the most that may be held, of which rounding decides about `bound`
                fewest = expected.value - expected.bound
                off = ~((fewest <= results[name]) & (results[name] <= expected.value))
            else:
                off = ~(np.abs(results[name] - expected.value) <= expected.bound + 1e-12 * np.abs(expected.value))
        if np.any(off & ~np.isinf(expected.bound)):
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
