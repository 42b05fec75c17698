"""Which memories a block of queries can see at all: what is dead costs nothing (clause DROP, applied to one step).

Memories are sorted into four groups, so that each piece of work runs on one contiguous range of slots:

    far full | far partial | near | dead
                           '------'         near: has a position score
               '------------------'         partial: the mask must be computed
    '-----------------------------'         visible: has a logit at all

full: every query of the block sees it with mask 1. dead: every query of the block sees it with mask 0. No result
depends on the order of memories, so this order is as good as any. Where the visible memories stand in it side by side,
as a stream keeps them, nothing needs to be copied: they are read where they are.
"""

from dataclasses import dataclass
from typing import Any

from refspan.arrays import Array, device_of
from refspan.mask import mask_at


@dataclass(frozen=True)
class Visibility:
    """The groups of one batch row's memories, as seen by one block of queries."""

    xp: Any
    place: slice
    """The slots of the visible memories, if they stand side by side in group order."""
    order: Array | None
    """[N] slots in group order; None if the visible memories are in `place`."""
    visible: int
    """Number of memories that at least one query sees."""
    near: slice
    """Among the visible memories, as is `partial`."""
    partial: slice

    def gather(self, x: Array) -> Array:
        """The visible memories in group order.   [.., N, D] -> [.., n, D]."""
        if self.order is None:
            return x[..., self.place, :]
        return self.xp.take(x, self.order[: self.visible], axis=-2)

    def sums_for(self, total: Array) -> Array:
        """Zeros to add up gathered gradients in: part of `total`, which is zeros, where it can be.   [.., n, D]."""
        if self.order is None:
            return total[..., self.place, :]
        *axes, _, size = total.shape
        return self.xp.zeros((*axes, self.visible, size), dtype=total.dtype, device=device_of(total))

    def scatter(self, x: Array, memories: int) -> Array:
        """The transpose of `gather`: everyone back to its slot, zeros for the dead.   [.., n, D] -> [.., N, D]."""
        if self.visible == memories and self.order is None:
            return x
        *axes, _, size = x.shape

        def dead(count: int) -> Array:
            return self.xp.zeros((*axes, count, size), dtype=x.dtype, device=device_of(x))

        if self.order is None:
            before, after = dead(self.place.start), dead(memories - self.place.stop)
            return self.xp.concat([before, x, after], axis=-2)
        in_order = self.xp.concat([x, dead(memories - self.visible)], axis=-2)
        return self.xp.take(in_order, self.xp.argsort(self.order), axis=-2)


def visible_memories(xp: Any, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
    """Which memories at least one query of the block sees.   [.., N], [.., N] -> bool [.., N].

    A mask only falls with distance, so the first query that may see a memory decides: distance max(age, 1), if the
    block lasts until then.
    """
    first = xp.where(age > 1, age, xp.ones_like(age))
    return (age + (queries - 1) >= 1) & (mask_at(xp, span, first, ramp) > 0)


def group_of(xp: Any, span: Array, age: Array, *, queries: int, ramp: float, positions: int) -> Array:
    """The group of each memory, 0 to 3 in the order above.   [.., N], [.., N] -> int64 [.., N].

    A mask only falls with distance, so two queries tell all: the first one that may see the memory, and the last one
    (distance age + M - 1).
    """
    last = age + (queries - 1)
    full = (age >= 1) & (mask_at(xp, span, last, ramp) == 1)
    near = (last >= 1) & (age <= positions) & (positions > 0)
    seen = visible_memories(xp, span, age, queries=queries, ramp=ramp)
    group = xp.where(full, xp.zeros_like(age), xp.ones_like(age))
    return xp.where(seen, xp.where(near, 2, group), 3)


def visibility(xp: Any, span: Array, age: Array, *, queries: int, ramp: float, positions: int) -> Visibility:
    """Sort the memories of one batch row, `span` [N] and `age` [N], into the groups above."""
    group = group_of(xp, span, age, queries=queries, ramp=ramp, positions=positions)
    sizes = [int(xp.sum(xp.astype(group == g, xp.int64))) for g in range(3)]
    visible = sum(sizes)
    start = int(xp.argmax(xp.astype(group < 3, xp.int64))) if visible else 0  # the first visible one
    side_by_side = group[start : start + visible]
    in_place = not bool(xp.any(side_by_side == 3)) and not bool(xp.any(side_by_side[1:] < side_by_side[:-1]))
    return Visibility(
        xp=xp,
        place=slice(start, start + visible),
        order=None if in_place else xp.argsort(group, stable=True),
        visible=visible,
        near=slice(sum(sizes[:2]), visible),
        partial=slice(sizes[0], visible),
    )
