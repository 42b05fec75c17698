"""One tile of an attention step: some queries over the visible memories, what heads share, and logits to weights."""

from dataclasses import dataclass
from typing import NamedTuple

from refspan.arrays import Array, device_of, exp_in_place
from refspan.dropout import Dropout
from refspan.mask import distance_of, mask_at
from refspan.position import Reach, position_scores
from refspan.row import Row


class Weights(NamedTuple):
    """Unnormalised weights of a tile."""

    masked: Array
    """w = m exp(s - peak).   [h, m, n]"""
    unmasked: Array | None
    """exp(s - peak) of the partial memories.   [h, m, partial]; None if there are none, or nobody asked."""


@dataclass(frozen=True)
class Tile:
    """A row as some queries of the block see it; what it holds is shared by heads."""

    row: Row
    m: slice
    mask: Array | None
    """Of the partial memories.   [m, partial]; None if there are none."""
    reach: Reach | None
    """Of the position embedding, to the near memories; None if there are none."""

    @classmethod
    def of(cls, row: Row, m: slice) -> "Tile":
        """The row as queries `m` of the block see it."""
        age, queries = row.age + m.start, m.stop - m.start
        near, partial = row.seen.near, row.seen.partial
        mask = reach = None
        if partial.start < partial.stop:
            distance = distance_of(row.xp, age[partial], queries)  # [m, partial]
            mask = mask_at(row.xp, row.span[partial], distance, row.ramp)
        if near.start < near.stop:
            reach = Reach.of(row.xp, row.position, age[near], queries)
        return cls(row, m, mask, reach)

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

    def weights(self, scores: Array, *, keep: bool) -> Weights:
        """m exp(s) (WEIGHT), written over the logits; `keep` those before the mask, for backward.   [h, m, n]."""
        xp, partial = self.row.xp, self.row.seen.partial
        weights, unmasked = exp_in_place(xp, scores), None
        if self.mask is not None:
            if keep:
                unmasked = xp.asarray(weights[..., partial], copy=True)  # [h, m, partial]
            weights[..., partial] *= xp.astype(self.mask, self.row.dtype, copy=False)
        return Weights(weights, unmasked)

    def dropped(self, dropout: Dropout, b: int, h: slice) -> Array:
        """0 or 1 / (1 - rate) for every weight of some heads.   -> [h, m, n]."""
        xp, age = self.row.xp, self.row.age
        new = {"dtype": xp.int64, "device": device_of(age)}
        head = xp.arange(h.start, h.stop, **new)[:, None, None]
        query = xp.arange(self.m.start, self.m.stop, **new)[:, None]
        return dropout.scale(xp, self.row.dtype, xp.asarray(b, **new), head, query, age)
