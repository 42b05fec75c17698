"""One batch row of an attention step: the memories that its block can see, and the tiles to work on them in."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

from refspan.arrays import Array
from refspan.tiles import scratch_of_query, tiles
from refspan.visibility import Visibility, visibility


@dataclass(frozen=True)
class Row:
    """The memories of one batch row that its block of queries can see, n of them in the order of `seen`."""

    xp: Any
    seen: Visibility
    span: Array
    """[n]"""
    age: Array
    """[n]"""
    ramp: float
    position: Array | None
    """The rows of the position embedding that some query needs for some memory.   [P' <= P, D]"""
    queries: int
    """M"""
    dtype: Any

    @classmethod
    def of(
        cls, xp: Any, span: Array, age: Array, queries: int, ramp: float, position: Array | None, dtype: Any
    ) -> "Row":
        """The visible part of one row, `span` [N] and `age` [N]; spans at least as wide as `dtype` (WIDTH)."""
        span = xp.astype(span, xp.result_type(span.dtype, dtype))
        positions = 0 if position is None else position.shape[0]
        seen = visibility(xp, span, age, queries=queries, ramp=ramp, positions=positions)
        span, age = seen.gather(span[:, None])[:, 0], seen.gather(age[:, None])[:, 0]
        if position is not None:
            near = age[seen.near]
            furthest = int(xp.max(near)) + queries - 1 if near.shape[0] else 0
            position = xp.astype(position[: min(positions, furthest), :], dtype)
        return cls(xp, seen, span, age, ramp, position, queries, dtype)

    def visible(self, x: Array) -> Array:
        """[h, N, D] -> [h, n, D], in the dtype of the computation."""
        return self.xp.astype(self.seen.gather(x), self.dtype, copy=False)

    def largest_logit(self, query: Array, key: Array) -> float:
        """What no logit exceeds in size: |q . k| <= |q| |k|.   [H, M, D], [H, n, D], query divided by sqrt(D)."""
        xp = self.xp

        def longest(x: Array) -> float:
            return sqrt(float(xp.max(xp.vecdot(x, x)))) if 0 not in x.shape else 0.0

        return longest(query) * (longest(key) + (0.0 if self.position is None else longest(self.position)))

    def tiles(
        self, heads: int, scratch_bytes: int, *, dropout: bool, backward: bool
    ) -> tuple[list[slice], list[slice]]:
        """The heads and the queries of tiles that fit into `scratch_bytes`; see `refspan.tiles.tiles`."""
        near = self.seen.near.start < self.seen.near.stop
        one = scratch_of_query(
            self.seen,
            itemsize=self.xp.finfo(self.dtype).bits // 8,
            span_itemsize=self.xp.finfo(self.span.dtype).bits // 8,
            positions=self.position.shape[0] + self.queries if near and self.position is not None else 0,
            dropout=dropout,
            backward=backward,
        )
        return tiles(heads, self.queries, self.seen.visible, scratch_bytes // max(1, one))
