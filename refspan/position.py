"""Relative position scores (the second term of clause LOGIT): q_t . p_distance for distances 1..P.

Row j of `position` belongs to distance j + 1. Memories may stand in any slot and leave gaps, so a score is found by
the distance, not by the slot. One product gives the scores of all P distances to every query; on the way from
"by distance" to "by memory" lies "by age": memory i has distance age_i + m to query m, so in a table with a column for
each age, row m holds the row of distances moved m columns to the left.

    by distance  [M, W]           by age  [M, W + 1]          (M = 3, P = 4, W = P + M - 1; column 0 is age 2 - M = -1)
    m=0   . . 1 2 3 4             . . 1 2 3 4 .
    m=1   . . 1 2 3 4             . 1 2 3 4 . .
    m=2   . . 1 2 3 4             1 2 3 4 . . .

Both are the same numbers in the same order, read with rows one longer: each row then begins one place further on. The
zeros (dots) come from M - 1 rows of zeros before the table, and from one more query, of zeros, whose row ends the last.
"""

from typing import Any

from refspan.arrays import Array, device_of


def position_scores(xp: Any, query: Array, position: Array, age: Array) -> Array:
    """q_t . p_(age_i + m), 0 where that distance is not in 1..P (LOGIT, before the division by sqrt(D)).

    [H, M, D], [P, D], [N] -> [H, M, N].
    """
    heads, queries, _ = query.shape
    table = _with_zeros(xp, position, queries)  # [W, D]
    more = xp.concat([query, xp.zeros_like(query[:, :1, :])], axis=1)  # [H, M + 1, D]
    by_distance = more @ table.T  # [H, M + 1, W]
    width = table.shape[0] + 1
    flat = xp.reshape(by_distance, (heads, -1))[:, : queries * width]
    by_age = xp.reshape(flat, (heads, queries, width))  # [H, M, W + 1]
    return xp.take(by_age, _column_of(xp, age, queries, position.shape[0]), axis=-1)  # [H, M, N]


def position_scores_backward(
    xp: Any, grad_scores: Array, query: Array, position: Array, age: Array
) -> tuple[Array, Array]:
    """Gradients of `position_scores` with respect to `query` and `position` (GRAD).

    The way back: sum the gradients of memories of one age, undo the shift, then the two sides of the product

        by_distance = Q P^T   =>   dQ = d(by_distance) P,   dP = sum_heads d(by_distance)^T Q

    [H, M, N], [H, M, D], [P, D], [N] -> [H, M, D], [P, D].
    """
    heads, queries, _ = query.shape
    table = _with_zeros(xp, position, queries)  # [W, D]
    column = _column_of(xp, age, queries, position.shape[0])  # [N]
    width = table.shape[0]
    grad_by_age = _sum_by_column(xp, grad_scores, column, width + 1)  # [H, M, W + 1]
    flat = xp.reshape(grad_by_age, (heads, -1))[:, : queries * width]
    grad_by_distance = xp.reshape(flat, (heads, queries, width))  # [H, M, W]
    grad_query = grad_by_distance @ table  # [H, M, D]
    grad_table = xp.sum(xp.matrix_transpose(grad_by_distance) @ query, axis=0)  # [W, D]
    return grad_query, grad_table[queries - 1 :, :]


def _with_zeros(xp: Any, position: Array, queries: int) -> Array:
    """The table of positions after M - 1 rows of zeros.   [P, D] -> [W, D]."""
    zeros = xp.zeros((queries - 1, position.shape[1]), dtype=position.dtype, device=device_of(position))
    return xp.concat([zeros, position], axis=0)


def _column_of(xp: Any, age: Array, queries: int, positions: int) -> Array:
    """Column of each memory in the table by age; the last column, all zeros, for those out of every query's reach."""
    last = positions + queries - 1
    column = age - (2 - queries)
    reached = (column >= 0) & (column < last)
    return xp.where(reached, column, xp.full_like(column, last))


def _sum_by_column(xp: Any, grad: Array, column: Array, width: int) -> Array:
    """The transpose of taking `column`: sum the memories of each column.   [H, M, N] -> [H, M, width].

    The array API has no scatter-add. Ages are distinct in a stream, so a gather does: for each column, the memory that
    it went to. Where several memories share an age, once more per rank among those that share.
    """
    last = column.shape[0] - 1
    order = xp.argsort(column, stable=True)
    in_order = xp.take(column, order)
    wanted = xp.arange(width, dtype=column.dtype, device=device_of(column))
    start = xp.searchsorted(in_order, wanted, side="left")
    count = xp.searchsorted(in_order, wanted, side="right") - start
    count = xp.where(wanted < width - 1, count, xp.zeros_like(count))  # out of reach: no gradient

    def of_rank(rank: int) -> Array:
        taken = xp.take(grad, xp.take(order, xp.clip(start + rank, None, last)), axis=-1)
        return xp.where(rank < count, taken, xp.zeros_like(taken[..., :1]))

    total = of_rank(0)
    for rank in range(1, int(xp.max(count))):
        total += of_rank(rank)
    return total
