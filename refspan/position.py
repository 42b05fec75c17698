"""Relative position scores (the second term of clause LOGIT): q_t . p_distance for distances 1..P.

Row j of `position` belongs to distance j + 1. Memories may stand in any slot and leave gaps, so a score is found by
the distance, not by the slot. One product gives the scores of all P distances to every query; on the way from
"by distance" to "by memory" lies "by age": memory i has distance age_i + m to query m, so in a table with a column for
each age, row m holds the row of distances moved m columns to the left.

    by distance  [M, P]           by age  [M, P + M - 1]          (M = 3, P = 4; column 0 is age 2 - M = -1)
    m=0   1 2 3 4                 . . 1 2 3 4
    m=1   1 2 3 4                 . 1 2 3 4 .
    m=2   1 2 3 4                 1 2 3 4 . .
"""

from typing import Any

from refspan.arrays import Array, device_of


def position_scores(xp: Any, query: Array, position: Array, age: Array) -> Array:
    """q_t . p_(age_i + m), 0 where that distance is not in 1..P (LOGIT, before the division by sqrt(D)).

    [H, M, D], [P, D], [N] -> [H, M, N].
    """
    by_distance = query @ position.T  # [H, M, P]
    by_age = _shift_rows(xp, by_distance)  # [H, M, P + M]
    column = _column_of(xp, age, query.shape[-2], position.shape[0])  # [N]
    return xp.take(by_age, column, axis=-1)  # [H, M, N]


def position_scores_backward(
    xp: Any, grad_scores: Array, query: Array, position: Array, age: Array
) -> tuple[Array, Array]:
    """Gradients of `position_scores` with respect to `query` and `position` (GRAD).

    The way back: sum the gradients of memories of one age, undo the shift, then the two sides of the product

        by_distance = Q P^T   =>   dQ = d(by_distance) P,   dP = sum_heads d(by_distance)^T Q

    [H, M, N], [H, M, D], [P, D], [N] -> [H, M, D], [P, D].
    """
    positions = position.shape[0]
    column = _column_of(xp, age, query.shape[-2], positions)  # [N]
    grad_by_age = _sum_by_column(xp, grad_scores, column, positions + query.shape[-2])  # [H, M, P + M]
    grad_by_distance = _unshift_rows(xp, grad_by_age)  # [H, M, P]
    grad_query = grad_by_distance @ position  # [H, M, D]
    grad_position = xp.sum(xp.matrix_transpose(grad_by_distance) @ query, axis=0)  # [P, D]
    return grad_query, grad_position


def _column_of(xp: Any, age: Array, queries: int, positions: int) -> Array:
    """Column of each memory in the table by age; the last column, all zeros, for those out of every query's reach."""
    last = positions + queries - 1
    column = age - (2 - queries)
    reached = (column >= 0) & (column < last)
    return xp.where(reached, column, xp.full_like(column, last))


def _shift_rows(xp: Any, by_distance: Array) -> Array:
    """Move row m by M - 1 - m columns to the right: pad, then read the same numbers with rows one longer.

    [H, M, P] -> [H, M, P + M]; the last column is all zeros.
    """
    heads, queries, positions = by_distance.shape
    like = {"dtype": by_distance.dtype, "device": device_of(by_distance)}
    rows = xp.concat([by_distance, xp.zeros((heads, queries, queries - 1), **like)], axis=-1)
    flat = xp.reshape(rows, (heads, -1))
    flat = xp.concat([xp.zeros((heads, queries - 1), **like), flat, xp.zeros((heads, 1), **like)], axis=-1)
    return xp.reshape(flat, (heads, queries, positions + queries))


def _unshift_rows(xp: Any, by_age: Array) -> Array:
    """The transpose of `_shift_rows`: [H, M, P + M] -> [H, M, P]."""
    heads, queries, width = by_age.shape
    flat = xp.reshape(by_age, (heads, -1))[:, queries - 1 : -1]
    rows = xp.reshape(flat, (heads, queries, width - 1))
    return rows[..., : width - queries]


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
