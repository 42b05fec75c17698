"""One batch row of an attention step: the memories that its block can see, their masks and logits (LOGIT, MASK)."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

from refspan.arrays import Array, device_of
from refspan.dropout import Dropout
from refspan.mask import distance_of, mask_at
from refspan.position import Reach, position_scores
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
    dtype: Any

    @classmethod
    def of(
        cls, xp: Any, span: Array, age: Array, queries: int, ramp: float, position: Array | None, dtype: Any
    ) -> "Row":
        """The visible part of one row, `span` [N] and `age` [N]; spans at least as wide as `dtype` (WIDTH)."""
        span = xp.astype(span, xp.result_type(span.dtype, dtype))
        positions = 0 if position is None else position.shape[0]
        seen = visibility(xp, span, age, queries=queries, ramp=ramp, positions=positions)
        position = None if position is None else xp.astype(position, dtype)
        pick = seen.gather
        return cls(xp, seen, pick(span[:, None])[:, 0], pick(age[:, None])[:, 0], ramp, position, dtype)

    def visible(self, x: Array) -> Array:
        """[h, N, D] -> [h, n, D], in the dtype of the computation."""
        return self.xp.astype(self.seen.gather(x), self.dtype, copy=False)

    def largest_logit(self, query: Array, key: Array) -> float:
        """What no logit exceeds in size: |q . k| <= |q| |k|.   [H, M, D], [H, n, D], query divided by sqrt(D)."""
        xp = self.xp

        def longest(x: Array) -> float:
            return sqrt(float(xp.max(xp.vecdot(x, x)))) if 0 not in x.shape else 0.0

        return longest(query) * (longest(key) + (0.0 if self.position is None else longest(self.position)))

    def tile(self, m: slice) -> "Tile":
        """The row as queries `m` of the block see it."""
        age = self.age + m.start
        queries = m.stop - m.start
        near, partial = self.seen.near, self.seen.partial
        mask = reach = None
        if partial.start < partial.stop:
            distance = distance_of(self.xp, age[partial], queries)  # [m, partial]
            mask = mask_at(self.xp, self.span[partial], distance, self.ramp)
        if near.start < near.stop:
            reach = Reach.of(self.xp, self.position, age[near], queries)
        return Tile(self, m, mask, reach)


@dataclass(frozen=True)
class Tile:
    """A row as some queries of the block see it; what it holds is shared by heads."""

    row: Row
    m: slice
    mask: Array | None
    """Of the partial memories.   [m, partial]; None if there are none."""
    reach: Reach | None
    """Of the position embedding, to the near memories; None if there are none."""

    def scores(self, query: Array, key: Array) -> Array:
        """Logits of queries that are divided by sqrt(D) already (LOGIT).   [h, m, D], [h, n, D] -> [h, m, n]."""
        scores = query @ self.row.xp.matrix_transpose(key)  # [h, m, n]
        if self.reach is not None:
            scores[..., self.row.seen.near] += position_scores(query, self.reach)
        return scores

    def hide_unseen(self, scores: Array) -> None:
        """Write -inf over the logits of memories whose mask is 0.   [h, m, n]."""
        if self.mask is not None:
            xp, partial = self.row.xp, self.row.seen.partial
            scores[..., partial] = xp.where(self.mask > 0, scores[..., partial], -xp.inf)

    def copy_partial(self, exponentials: Array) -> Array | None:
        """Those of the partial memories, to keep while they are masked.   [h, m, n] -> [h, m, partial]."""
        if self.mask is None:
            return None
        return self.row.xp.asarray(exponentials[..., self.row.seen.partial], copy=True)

    def apply_mask(self, exponentials: Array) -> None:
        """Multiply exp(s) by m, in place (WEIGHT).   [h, m, n]."""
        if self.mask is not None:
            exponentials[..., self.row.seen.partial] *= self.row.xp.astype(self.mask, self.row.dtype, copy=False)

    def dropped(self, dropout: Dropout, b: int, h: slice) -> Array:
        """0 or 1 / (1 - rate) for every weight of some heads.   -> [h, m, n]."""
        xp, age = self.row.xp, self.row.age
        new = {"dtype": xp.int64, "device": device_of(age)}
        head = xp.arange(h.start, h.stop, **new)[:, None, None]
        query = xp.arange(self.m.start, self.m.stop, **new)[:, None]
        return dropout.scale(xp, self.row.dtype, xp.asarray(b, **new), head, query, age)
