"""Frozen cases: what they have in common, and those of an attention step."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import numpy as np

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.protocol import Array
from refspan.conformance.tolerance import Expected, attention_bounds, expected_mask

INPUTS = {
    "soft_mask": ("span", "age"),
    "span_attention": ("query", "key", "value", "span", "age", "position"),
    "span_attention_backward": ("grad_out", "query", "key", "value", "span", "age", "position"),
}
"""Operation -> names of its tensors; `position` may be missing."""
OF_LEVEL = {
    "mask": "soft_mask",
    "attention": "span_attention",
    "golden": "span_attention",
    "gradient": "span_attention_backward",
}
"""Level of a check -> the operation that it asks for."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Frozen:
    """What all frozen cases have in common."""

    operation: str
    expected: Mapping[str, Array]
    """float64, what is right, by the names of results."""
    bound: Mapping[str, Array]
    """float64, how far a result may be from it; inf decides nothing."""
    check: str
    """Where it comes from."""
    clauses: tuple[str, ...]
    purpose: str
    """What it is for."""
    notes: tuple[str, ...] = ()
    """How it was made, in words."""
    kills: tuple[str, ...] = ()
    """Mutants (`python -m refspan.conformance.mutants`) that it rejects."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id})"

    @property
    def id(self) -> str:
        """From what is asked, and nothing else: it stays while the case stays."""
        words, tensors = self.question()
        digest = blake2b(words.encode(), digest_size=8)
        for name, array in sorted(tensors.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"{self.operation}-{digest.hexdigest()}"

    def question(self) -> tuple[str, Mapping[str, Array]]:
        """All that is asked: in words, and tensors by name."""
        raise NotImplementedError

    def expectations(self) -> dict[str, Expected]:
        """By name of the result."""
        return {name: Expected(value, self.bound[name]) for name, value in self.expected.items()}


@dataclass(frozen=True, repr=False, kw_only=True)
class Vector(Frozen):
    """One attention step: results are `mask`, `output`, or the gradients by name, bounds as large as these."""

    ramp: float
    queries: int
    """M."""
    inputs: Mapping[str, Array]
    """By the names of the protocol."""

    def question(self) -> tuple[str, Mapping[str, Array]]:
        """Operation and sizes; inputs."""
        return f"{self.operation} {self.ramp!r} {self.queries}", self.inputs

    @property
    def dtype(self) -> str:
        """Of query, or of span for masks."""
        return str(self.inputs["query" if "query" in self.inputs else "span"].dtype)

    @property
    def memories(self) -> Memories:
        """Spans and ages as checks ask them."""
        return Memories(self.inputs["span"], self.inputs["age"], self.ramp, self.queries, self.notes)

    @property
    def case(self) -> AttentionCase:
        """The whole step as checks ask it."""
        parts = {name: self.inputs[name] for name in ("query", "key", "value")}
        more = {name: self.inputs[name] for name in ("position", "grad_out") if name in self.inputs}
        return AttentionCase(memories=self.memories, **parts, **more)

    def describe(self) -> list[str]:
        """The case in words and numbers, a line each."""
        return self.memories.describe() if self.operation == "soft_mask" else self.case.describe()


def vector_of(
    case: Any,
    operation: str,
    *,
    check: str,
    clauses: tuple[str, ...],
    purpose: str,
    kills: tuple[str, ...] = (),
    compared: Mapping[str, Expected] = MappingProxyType({}),
) -> Vector | None:
    """A case of a check, frozen with what is right; None if it is not about one attention step.

    `compared`: what the check itself compares answers with, see `Probe.compared`; the rest is as the reference has it.
    """
    memories = case.memories if isinstance(case, AttentionCase) else case
    if not isinstance(memories, Memories) or (operation != "soft_mask" and not isinstance(case, AttentionCase)):
        return None
    arrays = {"span": memories.span, "age": memories.age}
    if operation == "soft_mask":
        results = {"mask": expected_mask(memories)}
    else:
        bounds = attention_bounds(case)
        forward = operation == "span_attention"
        results = {"output": bounds.expected_output()} if forward else bounds.expected_gradients()
        arrays |= {name: getattr(case, name) for name in ("query", "key", "value", "position", "grad_out")}
    shapes = {name: result.value.shape for name, result in results.items()}
    for what, expected in compared.items():
        name = what.removeprefix("gradient of ")
        results |= {name: expected} if name in results else {}
    inputs = {name: np.array(arrays[name]) for name in INPUTS[operation] if arrays.get(name) is not None}
    return Vector(
        operation=operation,
        ramp=float(memories.ramp),
        queries=memories.queries,
        inputs=inputs,
        expected={name: _full(result.value, shapes[name]) for name, result in results.items()},
        bound={name: _full(result.bound, shapes[name]) for name, result in results.items()},
        check=check,
        clauses=clauses,
        purpose=purpose,
        notes=memories.notes,
        kills=kills,
    )


def _full(array: Array, shape: tuple[int, ...]) -> Array:
    return np.array(np.broadcast_to(array, shape), np.float64)
