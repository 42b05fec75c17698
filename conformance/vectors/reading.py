"""Reading a folder of vectors that somebody else may have made: nothing in it is believed."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from refspan.arrays import LONGEST, SHORTEST_RAMP, check_attention, check_ramp, check_spans
from refspan.clauses import CLAUSES
from refspan.conformance.guard import one_line
from refspan.conformance.programs import Learn
from refspan.conformance.protocol import Array
from refspan.conformance.vectors.disk import LARGEST, check_sizes, content_of
from refspan.conformance.vectors.program_json import from_json, shapes_of_answers
from refspan.conformance.vectors.program_vector import NEEDS, ProgramVector
from refspan.conformance.vectors.vector import INPUTS, Vector
from refspan.conformance.vectors.work import Work, attention_units, most_shared
from refspan.errors import SetupError

VERSION = 1
"""Of the layout."""
MANIFEST = "manifest.json"
LARGEST_JSON = {MANIFEST: LARGEST >> 2, "program.json": LARGEST >> 6}
"""Bytes of what is read as JSON, which takes many times as many."""
MOST = 100_000
"""Cases of a folder."""
ID = re.compile(r"(soft_mask|span_attention|span_attention_backward|stream|training)-[0-9a-f]{16}")

AnyVector = Vector | ProgramVector


def fields_of(operation: str) -> tuple[str, ...]:
    """What a manifest says of a case, beside its id, dtype and files: what a vector consists of beside its tensors."""
    size = () if operation in NEEDS else ("ramp", "queries")
    return ("operation", *size, "check", "clauses", "purpose", "notes", "kills")


def read_folder(path: Path) -> list[AnyVector]:
    """All vectors of a folder, that somebody else may have made.

    Raises:
        SetupError: it is no such folder; a file is missing, too large, a link, or says something impossible.
    """
    return [read_vector(path, entry) for entry in entries_of(path).values()]


def entries_of(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's cases by id; raises SetupError, also if one is there twice or they are too large to be read."""
    entries: dict[str, dict[str, Any]] = {}
    for entry in manifest_of(path)["cases"]:
        if entry["id"] in entries:
            raise SetupError(f"{path / MANIFEST}: {entry['id']} is there twice")
        entries[entry["id"]] = entry
    check_sizes(path, [f"{id_}/{name}" for id_ in entries for name in ("case.safetensors", "program.json")])
    return entries


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest, as far as it must be right for the cases to be read; raises SetupError."""
    where = path / MANIFEST
    try:
        tree: dict[str, Any] = json.loads(content_of(path, MANIFEST, LARGEST_JSON[MANIFEST]))
        version, cases = tree["refspan_vectors"], tree["cases"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SetupError(f"{where}: is not a manifest of vectors, as `refspan vectors` writes it") from None
    if version != VERSION or isinstance(version, bool):
        got = one_line(version)[:20]
        raise SetupError(f"{where}: has version {got}, this refspan reads version {VERSION}")
    if not isinstance(cases, list) or len(cases) > MOST:
        raise SetupError(f"{where}: `cases` is no list of at most {MOST} cases")
    for entry in cases:
        _check_entry(where, entry)
    return tree


def is_text(text: Any) -> bool:
    """Whether it is a string that can be shown, on one line: no control characters, no halves of a character."""
    return isinstance(text, str) and text.isprintable()


def is_count(number: Any) -> bool:
    """Whether it is a whole number, which `true` is not."""
    return isinstance(number, int) and not isinstance(number, bool)


def _check_entry(where: Path, entry: Any) -> None:
    """Raise unless an entry is as manifest.schema.json says, as far as the case cannot be read without."""
    id_ = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(id_, str) or not ID.fullmatch(id_):
        raise SetupError(f"{where}: got id {str(id_)[:80]!r}, expected an operation, a dash and 16 hexadecimal digits")

    def words(name: str) -> bool:
        return isinstance(entry.get(name), list) and all(map(is_text, entry[name]))

    files_, operation = entry.get("files"), id_.rpartition("-")[0]
    right = {
        "operation": entry.get("operation") == operation,
        "ramp": isinstance(entry.get("ramp"), float) and SHORTEST_RAMP <= entry["ramp"] <= LONGEST,
        "queries": is_count(entry.get("queries")) and 0 < entry["queries"] < 1 << 20,
        "check": is_text(entry.get("check")),
        "purpose": is_text(entry.get("purpose")),
        "clauses": words("clauses") and set(entry["clauses"]) <= set(CLAUSES),
        "notes": words("notes"),
        "kills": words("kills"),
        "files": isinstance(files_, dict) and all(isinstance(x, str) for x in files_.values()),
    }
    for name, fine in right.items():
        if not fine and (name == "files" or name in fields_of(operation)):
            raise SetupError(f"{where}: {id_}: `{name}` is {str(entry.get(name))[:80]!r}; see manifest.schema.json")


def told(entry: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a case, as vectors take it."""
    said = {name: entry[name] for name in fields_of(entry["operation"])}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in said.items()}


def read_vector(path: Path, entry: dict[str, Any]) -> AnyVector:
    """The case of one entry of the manifest; raises SetupError."""
    where = f"{entry['id']}/case.safetensors"
    try:
        tensors = safetensors.numpy.load(content_of(path, where))
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise SetupError(f"{path / where}: is no safetensors file, or a damaged one") from None
    parts: dict[str, dict[str, Array]] = {"input": {}, "expected": {}, "bound": {}}
    for name, array in tensors.items():
        kind, _, rest = name.partition(".")
        if kind not in parts:
            raise SetupError(f"{path / where}: has a tensor {name[:80]!r}, expected input.., expected.. or bound..")
        if kind == "bound" and array.dtype.kind == "f" and not np.all(array >= 0):
            raise SetupError(f"{path / where}: {name[:80]!r} is not a bound: a number in it is below 0, or none")
        parts[kind][rest] = array
    if entry["operation"] in NEEDS:
        return _read_program(path, entry, parts)
    vector = Vector(inputs=parts["input"], expected=parts["expected"], bound=parts["bound"], **told(entry))
    _check_shapes(path / where, vector)
    _check_question(path / where, vector)
    return vector


def _read_program(path: Path, entry: dict[str, Any], parts: dict[str, dict[str, Array]]) -> ProgramVector:
    where = path / entry["id"]
    try:
        content = content_of(path, f"{entry['id']}/program.json", LARGEST_JSON["program.json"])
        said = json.loads(content)
        program = from_json(said, parts["input"])
    except RecursionError:
        raise SetupError(f"{where / 'program.json'}: is no program") from None
    except (TypeError, ValueError) as error:
        raise SetupError(f"{where}: {one_line(error)}") from None
    if any(isinstance(operation, Learn) != (entry["operation"] == "training") for operation in program):
        raise SetupError(f"{where}: its operations are not all those of {entry['operation']!r}")
    shapes = shapes_of_answers(program)
    for part, fits in ((parts["expected"], tuple.__eq__), (parts["bound"], _broadcasts)):
        wrong = sorted(set(shapes) ^ set(part))
        wrong += [n for n in part if n in shapes and not (fits(part[n].shape, shapes[n]) and part[n].dtype == float)]
        if wrong:
            raise SetupError(
                f"{where}: {wrong[0][:80]!r} is missing, of another shape or dtype than the rest, or too much"
            )
    return ProgramVector(program=program, expected=parts["expected"], bound=parts["bound"], **told(entry))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _check_shapes(where: Path, vector: Vector) -> None:
    """Raise unless tensors are there and fit each other."""
    x = vector.inputs
    needed = set(INPUTS[vector.operation])
    if not needed - {"position"} <= set(x) <= needed:
        wanted = ", ".join(INPUTS[vector.operation])
        raise SetupError(f"{where}: has inputs {one_line(', '.join(sorted(x)))}; expected {wanted}")
    if x["span"].ndim != 2 or x["age"].dtype != np.int64 or str(x["span"].dtype) not in ("float32", "float64"):
        raise SetupError(f"{where}: `span` or `age` is no [B, N], or of another dtype than float and int64")
    batch, memories = x["span"].shape
    shapes: dict[str, tuple[int, ...]] = {"age": x["span"].shape}
    results: dict[str, tuple[int, ...]] = {"mask": (batch, vector.queries, memories)}
    if vector.operation != "soft_mask":
        if x["query"].ndim != 4 or str(x["query"].dtype) not in ("float16", "float32", "float64"):
            raise SetupError(f"{where}: `query` is no [B, H, M, D] of floating-point numbers")
        _, heads, _, size = x["query"].shape
        query, key = (batch, heads, vector.queries, size), (batch, heads, memories, size)
        shapes |= {"query": query, "key": key, "value": key, "grad_out": query}
        results = {"output": query}
        if "position" in x:
            shapes["position"] = (len(x["position"]) if x["position"].ndim else 0, size)
        if vector.operation == "span_attention_backward":
            results = {"query": query, "key": key, "value": key, "span": (batch, memories)}
            results |= {"position": shapes["position"]} if "position" in x else {}
    wrong = [n for n, array in x.items() if array.shape != shapes.get(n, array.shape)]
    wrong += [n for n in sorted(set(x) - {"span", "age"}) if str(x[n].dtype) != vector.dtype]
    for part in (vector.expected, vector.bound):
        wrong += sorted(set(results) ^ set(part))
        wrong += [n for n in part if n in results and (part[n].shape != results[n] or part[n].dtype != np.float64)]
    if wrong:
        raise SetupError(f"{where}: {wrong[0][:80]!r} is missing, of another shape or dtype than the rest, or too much")


def _check_question(where: Path, vector: Vector) -> None:
    """Raise unless the reference takes it, and it is not too much work."""
    x = vector.inputs
    try:
        check_ramp(vector.ramp)
        if vector.operation == "soft_mask":
            check_spans(np, x["span"], x["age"])
            shape, positions, shared = (len(x["span"]), 1, vector.queries, 1), 0, 1
        else:
            check_attention(np, x["query"], x["key"], x["value"], x["span"], x["age"], x.get("position"))
            shape, positions = x["query"].shape, len(x.get("position", ()))
            shared = most_shared(x["age"]) if vector.operation == "span_attention_backward" else 1
        Work().add(attention_units(shape, x["span"].shape[1], positions, shared))
    except (TypeError, ValueError) as error:
        raise SetupError(f"{where}: {one_line(error)}") from None
