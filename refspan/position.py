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

from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any

from refspan.arrays import Array, device_of


@dataclass(frozen=True)
class Reach:
    """How far the position embedding reaches from one block of queries; the same for all heads."""

    xp: Any
    table: Array
    """The position embedding after M - 1 rows of zeros.   [W, D]"""
    column: Array
    """Of each memory in the table by age; the last column, all zeros, for those out of every query's reach.   [N]"""
    queries: int
    """M"""

    @classmethod
    def of(cls, xp: Any, position: Array, age: Array, queries: int) -> "Reach":
        """From `position` [P, D] and the memories' `age` [N]."""
        zeros = xp.zeros((queries - 1, position.shape[1]), dtype=position.dtype, device=device_of(position))
        last = position.shape[0] + queries - 1
        column = age - (2 - queries)
        reached = (column >= 0) & (column < last)
        return cls(xp, xp.concat([zeros, position], axis=0), xp.where(reached, column, last), queries)

    @cached_property
    def memories_of_column(self) -> list[tuple[Array, Array]]:
        """The other way round: which memory went to each column, and whether any did.   both [W + 1].

        Ages are distinct in a stream, so one such list tells all. Where several memories share an age, there is one
        more for each rank among those that share.
        """
        xp, last = self.xp, self.table.shape[0]
        order = xp.argsort(self.column, stable=True)
        in_order = xp.take(self.column, order)
        wanted = xp.arange(last + 1, dtype=in_order.dtype, device=device_of(in_order))
        start = xp.searchsorted(in_order, wanted, side="left")
        count = xp.searchsorted(in_order, wanted, side="right") - start
        count = xp.where(wanted < last, count, xp.zeros_like(count))  # out of reach: no gradient
        return [
            (xp.take(order, xp.clip(start + rank, None, order.shape[0] - 1)), rank < count)
            for rank in range(max(1, int(xp.max(count))))
        ]


def position_scores(query: Array, reach: Reach) -> Array:
    """q_t . p_(age_i + m), 0 where that distance is not in 1..P (LOGIT, before the division by sqrt(D)).

    [H, M, D] -> [H, M, N].
    """
    xp, heads = reach.xp, query.shape[0]
    more = xp.concat([query, xp.zeros_like(query[:, :1, :])], axis=1)  # [H, M + 1, D]
    by_distance = more @ reach.table.T  # [H, M + 1, W]
    width = reach.table.shape[0] + 1
    flat = xp.reshape(by_distance, (heads, -1))[:, : reach.queries * width]
    by_age = xp.reshape(flat, (heads, reach.queries, width))  # [H, M, W + 1]
    return xp.take(by_age, reach.column, axis=-1)  # [H, M, N]


def position_scores_backward(grad_scores: Array, query: Array, reach: Reach) -> tuple[Array, Array]:
    """Gradients of `position_scores` with respect to `query` and the position embedding (GRAD).

    The way back: sum the gradients of memories of one age, undo the shift, then the two sides of the product

        by_distance = Q P^T   =>   dQ = d(by_distance) P,   dP = sum_heads d(by_distance)^T Q

    The array API has no scatter-add, so each column looks for its memories instead.

    [H, M, N], [H, M, D] -> [H, M, D], [P, D].
    """
    xp, heads, queries = reach.xp, query.shape[0], reach.queries
    width = reach.table.shape[0]
    zero = xp.zeros_like(grad_scores[..., :1])
    grads = (xp.where(found, xp.take(grad_scores, i, axis=-1), zero) for i, found in reach.memories_of_column)
    grad_by_age = reduce(add, grads)  # [H, M, W + 1]
    flat = xp.reshape(grad_by_age, (heads, -1))[:, : queries * width]
    grad_by_distance = xp.reshape(flat, (heads, queries, width))  # [H, M, W]
    grad_query = grad_by_distance @ reach.table  # [H, M, D]
    grad_table = xp.sum(xp.matrix_transpose(grad_by_distance) @ query, axis=0)  # [W, D]
    return grad_query, grad_table[queries - 1 :, :]
