"""The questions that checks ask: the memories of a block, and a whole attention step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from refspan.conformance.protocol import Array

MOST_LINES = 12
"""Memories that a description spells out."""


@dataclass(frozen=True, repr=False)
class Memories:
    """Who remembers what for how long, as one block of queries finds it."""

    span: Array
    """[B, N] float32 or float64"""
    age: Array
    """[B, N] int64"""
    ramp: float
    queries: int
    notes: tuple[str, ...] = ()
    """How the case was made, in words."""

    def __repr__(self) -> str:
        return f"Memories({self.describe()[0]})"  # Hypothesis asks for it often; the arrays are in `describe`

    @property
    def distance(self) -> Array:
        """[B, M, N] steps from memory to query."""
        return np.asarray(self.age[:, None, :] + np.arange(self.queries)[:, None])

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Backend.soft_mask`."""
        return {"span": self.span, "age": self.age, "queries": self.queries, "ramp": self.ramp}

    def describe(self, row: int = 0) -> list[str]:
        """The case in words and numbers, a line each; this row of the batch first."""
        lines = [f"M={self.queries} queries, ramp {self.ramp:g}" + "".join(f"; {note}" for note in self.notes)]
        places = sorted(islice(np.ndindex(self.span.shape), 10_000), key=lambda place: (place[0] != row, place))
        for b, i in places[:MOST_LINES]:
            span, first = float(self.span[b, i]), int(self.age[b, i])
            left = span - max(first, 1)
            lines.append(f"row {b}, memory {i}: span {span!r}, age {first}, {left:g} steps left when first seen")
        if self.span.size > MOST_LINES:
            lines.append(f"and {self.span.size - MOST_LINES} more")
        return lines


@dataclass(frozen=True, repr=False)
class AttentionCase:
    """The arguments of one attention step, and an upstream gradient for its output."""

    query: Array
    """[B, H, M, D]"""
    key: Array
    """[B, H, N, D]"""
    value: Array
    """[B, H, N, D]"""
    memories: Memories
    position: Array | None = None
    """[P, D]"""
    grad_out: Array = field(default_factory=lambda: np.zeros(0))
    """[B, H, M, D]"""

    def __repr__(self) -> str:
        return f"AttentionCase({self.describe()[0]})"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, M, N, D."""
        batch, heads, queries, head_size = self.query.shape
        return batch, heads, queries, self.key.shape[2], head_size

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Backend.span_attention`."""
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "span": self.memories.span,
            "age": self.memories.age,
            "ramp": self.memories.ramp,
            "position": self.position,
        }

    def with_memories(self, **changes: Any) -> "AttentionCase":
        """The same case with some fields of `memories` changed."""
        return replace(self, memories=replace(self.memories, **changes))

    def select(self, *, rows: slice = slice(None), queries: slice = slice(None), slots: Any = slice(None)) -> Any:
        """The part of the case with these batch rows, queries and memory slots; ages count from the new first query."""
        first = queries.start or 0
        query = self.query[rows, :, queries]
        memories = replace(
            self.memories,
            span=self.memories.span[rows][:, slots],
            age=self.memories.age[rows][:, slots] + first,
            queries=query.shape[2],
        )
        return replace(
            self,
            query=query,
            key=self.key[rows][:, :, slots],
            value=self.value[rows][:, :, slots],
            memories=memories,
            grad_out=self.grad_out[rows, :, queries],
        )

    def describe(self, row: int = 0) -> list[str]:
        """The case in words and numbers, a line each; this row of the batch first."""
        batch, heads, queries, memories, head_size = self.sizes
        positions = "no position" if self.position is None else f"P={len(self.position)}"
        lines = [f"B={batch} H={heads} M={queries} N={memories} D={head_size} {positions}, {self.query.dtype}"]
        lines += self.memories.describe(row)
        named: Mapping[str, Array | None] = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "position": self.position,
            "grad_out": self.grad_out,
        }
        for name, array in named.items():
            if array is None or array.size == 0:
                continue
            if array.size <= 16:
                lines.append(
                    f"{name} = {np.array2string(array, separator=', ', max_line_width=10_000)}".replace("\n", "")
                )
            else:
                lines.append(f"{name}: {array.size} numbers from {array.min():g} to {array.max():g}")
        return lines
