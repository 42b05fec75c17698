"""Asking a backend what vectors ask."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from refspan.conformance.guard import NotOffered
from refspan.conformance.registry import Check, Probe
from refspan.conformance.vectors.vector import Vector


def checks_of(vectors: Sequence[Vector], dtypes: Sequence[str] = ()) -> list[Check]:
    """A check for each vector, `vectors.ID`; of a dtype that the backend does not take, it is not offered."""
    return [_check(vector, dtypes) for vector in vectors]


def _check(vector: Vector, dtypes: Sequence[str]) -> Check:
    def cases(dtype: "np.dtype[Any]") -> list[Vector]:  # noqa: ARG001 - a vector has its own
        return [vector]

    def body(probe: Probe, case: Vector) -> None:
        if dtypes and case.dtype not in dtypes and case.operation != "soft_mask":
            raise NotOffered(case.operation)
        for name, expected in case.expectations().items():
            probe.compare(_called(case, name), _answers(probe, case)[name], expected)

    return Check(f"vectors.{vector.id}", vector.clauses, vector.purpose, (vector.operation,), cases, body)


def _answers(probe: Probe, vector: Vector) -> Any:
    if vector.operation == "soft_mask":
        return {"mask": probe.soft_mask(vector.memories)[0]}
    if vector.operation == "span_attention":
        return {"output": probe.attention(vector.case)[0]}
    return probe.gradients(vector.case)[0]


def _called(vector: Vector, name: str) -> str:
    return name if vector.operation != "span_attention_backward" else f"gradient of {name}"
