"""Cutting one attention step into tiles, so that its scratch memory is bounded however many memories there are."""

SCRATCH_BYTES = 32 * 2**20
"""Default for the largest sum of arrays with a memory axis and a query axis alive at once, in bytes.

One query of one head is the smallest tile, so the limit holds while four rows of N numbers fit into it. Beside it, a
batch row's visible keys and values are copied when some memories are dead, and backward keeps gradients of them.
"""

SMALL_TILE = 2**19
"""Numbers in an array of a tile up to which heads are worked on together."""


def tiles(heads: int, queries: int, memories: int, numbers: int) -> tuple[list[slice], list[slice]]:
    """Cut heads x queries into tiles with heads * queries * memories <= `numbers`, one row at least.

    Returns the heads and the queries of the tiles, which are all pairs of them; none if there are no memories. Heads
    share a tile only while it is small: a larger one costs no fewer calls worth mentioning, but leaves the processor's
    cache.
    """
    if memories == 0:
        return [], []
    rows = max(1, numbers // memories)
    h = max(1, min(heads, min(rows, SMALL_TILE // memories) // queries))
    m = min(queries, rows)
    return [slice(s, min(s + h, heads)) for s in range(0, heads, h)], [
        slice(s, min(s + m, queries)) for s in range(0, queries, m)
    ]
