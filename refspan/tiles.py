"""Cutting one attention step into tiles, so that its scratch memory is bounded however many memories there are."""

from refspan.visibility import Visibility

SCRATCH_BYTES = 32 * 2**20
"""Default for the largest sum of arrays with a memory axis and a query axis alive at once, in bytes.

One query of one head is the smallest tile, so the limit holds once `scratch_of_query` is below it. Beside it, a batch
row's visible keys and values are copied when some memories are dead, and backward keeps gradients of them.
"""

KEEP_BYTES = 128 * 2**20
"""Default for the weights that a forward pass leaves for backward, in bytes: those of its first tiles.

They live as long as what forward returned beside its output; whoever wants the output alone need not hold that, or
passes 0.
"""

SMALL_TILE = 2**19
"""Numbers in an array of a tile up to which heads are worked on together."""


def scratch_of_query(
    seen: Visibility, *, itemsize: int, span_itemsize: int, positions: int, dropout: bool, backward: bool
) -> int:
    """The most scratch that one query of one head needs, in bytes: what is alive at the worst moment.

    The mask of a tile is shared by its heads; here its whole cost is put on one, since a large tile has one head.

    Args:
        seen: groups of the row's memories.
        itemsize: bytes of a number of the computation.
        span_itemsize: bytes of a number of a span, and so of a mask.
        positions: columns of the table of position scores, 0 if no memory is near.
        dropout: whether weights are dropped.
        backward: whether gradients are wanted too.
    """
    n = seen.visible
    partial: int = seen.partial.stop - seen.partial.start
    near: int = seen.near.stop - seen.near.start
    masks = partial * (span_itemsize + (itemsize if backward else 0))  # of the tile, and their gradients
    distances = partial * (8 + 4 * span_itemsize)  # on the way to a mask
    scores = n + 2 * positions + near  # by distance, as a copy, by memory
    hidden = n + 2 * partial
    weights = n + partial  # and those before the mask
    moments = [scores, hidden, weights, 3 * n if dropout else 0]
    if backward:
        held = weights + (2 * n if dropout else 0)
        moments += [held + n + partial, held + n + 3 * positions + near]
    drawing = weights * itemsize + n * (24 + itemsize) if dropout else 0  # whole numbers of 64 bits on the way
    return max(distances, masks + max(drawing, itemsize * max(moments)))


def tiles(heads: int, queries: int, memories: int, rows: int) -> tuple[list[slice], list[slice]]:
    """Cut heads x queries into tiles of at most `rows` queries of a head, one at least.

    Returns the heads and the queries of the tiles, which are all pairs of them; none if there are no `memories`. Heads
    share a tile only while it is small: a larger one costs no fewer calls worth mentioning, but leaves the processor's
    cache. Tiles are of about one size.
    """
    if memories == 0:
        return [], []
    rows = max(1, rows)
    h = max(1, min(heads, min(rows, SMALL_TILE // memories) // queries))
    return _cut(heads, h), _cut(queries, min(queries, rows))


def _cut(count: int, most: int) -> list[slice]:
    """0..count in as few pieces of at most `most` as there can be, of about one size."""
    size = -(-count // -(-count // most))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
