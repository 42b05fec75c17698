"""One batch row of an attention step: the memories that its block can see, their masks and logits (LOGIT, MASK)."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

from refspan.arrays import Array, device_of
from refspan.dropout import Dropout
from refspan.mask import distance_of, mask_at
from refspan.position import position_scores
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

    def mask(self, m: slice) -> Array | None:
        """Mask of the partial memories for queries `m`, shared by heads.   -> [m, partial], None if there are none."""
        partial = self.seen.partial
        if partial.start == partial.stop:
            return None
        distance = distance_of(self.xp, self.age[partial] + m.start, m.stop - m.start)  # [m, partial]
        return mask_at(self.xp, self.span[partial], distance, self.ramp)

    def scores(self, query: Array, key: Array, m: slice) -> Array:
        """Logits of queries `m`, that are divided by sqrt(D) already (LOGIT).   [h, m, D], [h, n, D] -> [h, m, n]."""
        xp, near = self.xp, self.seen.near
        scores = query @ xp.matrix_transpose(key)  # [h, m, n]
        if near.start < near.stop:
            scores[..., near] += position_scores(xp, query, self.position, self.age[near] + m.start)
        return scores

    def hide_unseen(self, scores: Array, mask: Array | None) -> None:
        """Write -inf over the logits of memories whose mask is 0.   [h, m, n], [m, partial]."""
        if mask is not None:
            partial = self.seen.partial
            scores[..., partial] = self.xp.where(mask > 0, scores[..., partial], -self.xp.inf)

    def largest_logit(self, query: Array, key: Array) -> float:
        """What no logit exceeds in size: |q . k| <= |q| |k|.   [H, M, D], [H, n, D], query divided by sqrt(D)."""
        xp = self.xp

        def longest(x: Array) -> float:
            return sqrt(float(xp.max(xp.vecdot(x, x)))) if 0 not in x.shape else 0.0

        return longest(query) * (longest(key) + (0.0 if self.position is None else longest(self.position)))

    def dropped(self, dropout: Dropout, b: int, h: slice, m: slice) -> Array:
        """0 or 1 / (1 - rate) for every weight of a tile.   -> [h, m, n]."""
        xp, new = self.xp, {"dtype": self.xp.int64, "device": device_of(self.age)}
        head = xp.arange(h.start, h.stop, **new)[:, None, None]
        query = xp.arange(m.start, m.stop, **new)[:, None]
        return dropout.scale(xp, self.dtype, xp.asarray(b, **new), head, query, self.age)
