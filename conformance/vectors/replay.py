"""Asking a backend what vectors ask."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from refspan.conformance.guard import Misbehaviour, NotOffered
from refspan.conformance.registry import Check, Probe
from refspan.conformance.vectors.program_json import answers_by_name
from refspan.conformance.vectors.program_vector import NEEDS, ProgramVector
from refspan.conformance.vectors.reading import AnyVector
from refspan.conformance.vectors.vector import Vector


def checks_of(vectors: Sequence[AnyVector], dtypes: Sequence[str] = ()) -> list[Check]:
    """A check for each vector, `vectors.ID`; of a dtype that the backend does not take, it is not offered."""
    return [_check(vector, dtypes) for vector in vectors]


def _check(vector: AnyVector, dtypes: Sequence[str]) -> Check:
    def cases(dtype: "np.dtype[Any]") -> list[AnyVector]:  # noqa: ARG001 - a vector has its own
        return [vector]

    def body(probe: Probe, case: AnyVector) -> None:
        if dtypes and case.dtype not in dtypes and case.operation != "soft_mask":
            raise NotOffered(case.operation)
        if isinstance(case, ProgramVector):
            _ask_program(probe, case)
        else:
            for name, expected in case.expectations().items():
                probe.compare(_called(case, name), _answers(probe, case)[name], expected)

    needs = (NEEDS.get(vector.operation, vector.operation),)
    return Check(f"vectors.{vector.id}", vector.clauses, vector.purpose, needs, cases, body)


def _ask_program(probe: Probe, vector: ProgramVector) -> None:
    (answers,) = probe.programs(vector.program)
    named, grain = answers_by_name(vector.program, answers), probe.memory_granularity
    for name, expected in vector.expectations().items():
        place, _, what = name.partition(".")
        operation = f"operation {place}, {vector.program[int(place)]}"
        if what != "memory_size":
            probe.compare(f"{what} of {operation}", named[name], expected)
            continue
        fewest = expected.value - expected.bound
        for layer, (held, least, live) in enumerate(zip(named[name], fewest, expected.value, strict=True)):
            if not least <= held <= -(-live // grain) * grain:
                raise Misbehaviour(f"layer {layer} holds {held:g} memories at {operation}; {least:g} to {live:g} live")


def _answers(probe: Probe, vector: Vector) -> Any:
    if vector.operation == "soft_mask":
        return {"mask": probe.soft_mask(vector.memories)[0]}
    if vector.operation == "span_attention":
        return {"output": probe.attention(vector.case)[0]}
    return probe.gradients(vector.case)[0]


def _called(vector: Vector, name: str) -> str:
    return name if vector.operation != "span_attention_backward" else f"gradient of {name}"
