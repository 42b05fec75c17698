"""How an attention step is cut into runs of a graph, and which memories enter them.

Tiles bound the scratch: every array with a query axis and a memory axis lives inside one run. Memories that no query of
the block sees (`refspan.visibility`) are left out on the host, before any of them is multiplied (clause DROP).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Selection:
    """The slots of some batch rows that enter a run: the visible ones, rows filled up to one length n."""

    slots: list[Array] | None
    """For each row its visible slots; None if every slot enters, so that nothing needs to be copied."""
    size: int
    """n, memories of each row after filling up."""

    @classmethod
    def of(cls, visible: Array, granularity: int) -> "Selection":
        """Select from `visible` [b, N]; n is a multiple of `granularity` unless nothing is left."""
        memories = visible.shape[1]
        if bool(visible.all()) and memories % granularity == 0:
            return cls(None, memories)
        slots = [np.flatnonzero(row) for row in visible]
        longest = max((len(row) for row in slots), default=0)
        return cls(slots, -(-longest // granularity) * granularity)

    def gather(self, x: Array, axis: int, fill: float = 0) -> Array:
        """The selected slots along `axis`, empty places filled with `fill`.   [b, .., N, ..] -> [b, .., n, ..]."""
        if self.slots is None:
            return np.ascontiguousarray(x)
        shape = list(x.shape)
        shape[axis] = self.size
        out = np.empty(shape, x.dtype)
        for b, slots in enumerate(self.slots):
            target, rest = _split(out[b], len(slots), axis - 1)
            target[...] = np.take(x[b], slots, axis=axis - 1)
            rest[...] = fill
        return out

    def add_to(self, total: Array, x: Array, axis: int) -> None:
        """The transpose of `gather`: add every row's numbers to the slots that they came from."""
        if self.slots is None:
            total += x
            return
        for b, slots in enumerate(self.slots):
            source, _ = _split(x[b], len(slots), axis - 1)
            index = (*[slice(None)] * (axis - 1), slots)
            total[b][index] += source


def _split(x: Array, size: int, axis: int) -> tuple[Array, Array]:
    """Views of the first `size` places of an axis, and of the others."""
    before = [slice(None)] * axis
    return x[(*before, slice(size))], x[(*before, slice(size, None))]


@dataclass(frozen=True)
class Cost:
    """Bytes that one run needs for arrays with a query axis and a memory axis, per query and memory."""

    per_head: int
    shared: int
    """Of the mask and what leads to it, which all heads share."""


def tiles(
    batch: int, heads: int, queries: int, memories: int, cost: Cost, limit: int, block: int = 1
) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Cut batch rows x heads x queries so that a run needs at most `limit` bytes; one query of one head at least.

    Whole rows if they fit, else all heads and some queries, so that the mask is computed once for all heads. If these
    would be fewer queries than `block`, fewer heads instead, down to one.

    Yields batch rows, heads and, for these, the queries of each run.
    """
    size = max(1, memories)
    block = min(block, queries)
    all_heads = max(1, heads * cost.per_head + cost.shared) * size
    b, h, m = max(1, limit // (all_heads * queries)), heads, limit // all_heads
    if m < block:
        h = (limit // (block * size) - cost.shared) // max(1, cost.per_head)
        h = min(heads, max(1, h))
        m = limit // ((h * cost.per_head + cost.shared) * size)
    m = min(queries, max(1, m))
    blocks = [slice(start, min(start + m, queries)) for start in range(0, queries, m)]
    for row in range(0, batch, b):
        for head in range(0, heads, h):
            yield slice(row, min(row + b, batch)), slice(head, min(head + h, heads)), blocks
