"""The price of remembering (clause LOSS; the paper's equations 7 and 8).

    span_loss = alpha / (R M) sum_t sum_i e_i 1[0 < m_ti < 1],   batch mean

Equation 7 charges each span once, but most memories that a block sees are cached, and their spans can only be changed
where the task has a say too: on the ramp. A memory spends R steps there, so over its life it is charged alpha e_i / M
all the same. The loss is >= 0 and linear in alpha; how often a memory is charged depends on
its span only in jumps, so the gradient of e_i is alpha / (R M B) times that count.

Counted without a mask: 0 < m_ti < 1 where e_i < distance < e_i + R, and a block sees whole distances.
"""

from typing import Any

from refspan.arrays import Array


def queries_on_ramp(xp: Any, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
    """How many of the block's queries find the memory on its ramp, 0 < m < 1.   [B, N], [B, N] -> int64 [B, N]."""
    first = xp.clip(age, 1, None)  # PAST
    last = age + (queries - 1)
    above = xp.astype(xp.floor(span), xp.int64) + 1  # the smallest distance > e
    below = xp.astype(xp.ceil(span + ramp), xp.int64) - 1  # the largest distance < e + R
    return xp.clip(xp.minimum(last, below) - xp.maximum(first, above) + 1, 0, None)


def span_loss(xp: Any, span: Array, age: Array, *, queries: int, ramp: float, weight: float) -> float:
    """alpha / (R M) sum_t sum_i e_i 1[0 < m_ti < 1], mean over the batch (LOSS).

    Args:
        xp: array namespace.
        span: [B, N] steps, after SHORTEN.
        age: [B, N] int64.
        queries: M.
        ramp: R.
        weight: alpha.
    """
    charged = xp.astype(queries_on_ramp(xp, span, age, queries=queries, ramp=ramp), span.dtype)
    return float(xp.sum(span * charged)) * weight / (ramp * queries * int(span.shape[0]))


def span_loss_backward(xp: Any, span: Array, age: Array, *, queries: int, ramp: float, weight: float) -> Array:
    """Gradient of `span_loss` with respect to `span`.   -> [B, N]."""
    charged = xp.astype(queries_on_ramp(xp, span, age, queries=queries, ramp=ramp), span.dtype)
    return weight / (ramp * queries * span.shape[0]) * charged
