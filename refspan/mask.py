"""The soft mask: how much of memory i query t still sees (clauses PAST, MASK, WIDTH; the paper's equation 5).

A memory keeps its full weight for `span` steps, then fades linearly over `ramp` steps, then is gone:

    m_ti
    1 |------------.
      |             '.
    0 |---------------'-----------> distance t - i
                 span   span + ramp
"""

from typing import Any

from refspan.arrays import (
    Array,
    check_count,
    check_dtype,
    check_ramp,
    check_shape,
    check_spans,
    device_of,
    namespace_of,
)


def distance_of(xp: Any, age: Array, queries: int) -> Array:
    """Steps from memory i to each of the block's queries: t - i = age + m for m = 0..M-1.   [.., N] -> [.., M, N]."""
    m = xp.arange(queries, dtype=xp.int64, device=device_of(age))
    return age[..., None, :] + m[:, None]  # [.., M, N]


def mask_at(xp: Any, span: Array, distance: Array, ramp: float) -> Array:
    """m = clip(1 + r / R, 0, 1) with r = span - distance, and 0 where distance < 1. Shapes broadcast."""
    steps = xp.astype(distance, span.dtype)
    fading = 1 + (span - steps) / ramp
    return xp.clip(xp.minimum(fading, steps), 0, 1)  # a whole distance >= 1 takes nothing off, one <= 0 leaves nothing


def soft_mask(span: Array, age: Array, *, queries: int, ramp: float) -> Array:
    """Soft mask of a block of queries over its memories (PAST, MASK, WIDTH; equation 5).

    Args:
        span: [B, N] float32 or float64, steps that each memory keeps its full weight. Finite.
        age: [B, N] int64, steps from each memory to the block's first query; 0, -1, .. for the block's own.
        queries: M, number of queries in the block.
        ramp: R > 0, steps over which a memory fades once its span is over.

    Returns:
        [B, M, N] in [0, 1], dtype of `span`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; the message names it.
    """
    xp = namespace_of(span=span, age=age)
    ramp = check_ramp(ramp)
    check_spans(xp, span, age)
    queries = check_count("queries", queries)
    distance = distance_of(xp, age, queries)  # [B, M, N]
    return mask_at(xp, span[:, None, :], distance, ramp)  # [B, M, N]


def soft_mask_backward(grad_mask: Array, span: Array, age: Array, *, ramp: float) -> Array:
    """Gradient of `soft_mask` with respect to `span` (GRAD).

    On the ramp, m = 1 + (span - distance) / R, so dm/dspan = 1 / R. On the plateau (m = 1) and beyond the end (m = 0)
    the clip holds m fixed and the derivative is 0; at the two kinks it is taken as 0, one of the two one-sided values.
    A memory therefore learns from the R queries that follow the end of its span, and from no other:

        dspan_i = sum_t dm_ti * 1[0 < m_ti < 1] / R

    Args:
        grad_mask: [B, M, N], gradient with respect to the mask.
        span: [B, N] as given to `soft_mask`.
        age: [B, N] as given to `soft_mask`.
        ramp: R as given to `soft_mask`.

    Returns:
        [B, N], dtype of `span`.

    Raises:
        TypeError, ValueError: as `soft_mask`.
    """
    xp = namespace_of(span=span, age=age, grad_mask=grad_mask)
    check_shape("grad_mask", grad_mask, (span.shape[0], "M", *span.shape[1:]))
    check_dtype(xp, "grad_mask", grad_mask, (str(span.dtype).rsplit(".", maxsplit=1)[-1],))
    mask = soft_mask(span, age, queries=grad_mask.shape[1], ramp=ramp)  # [B, M, N]
    return grad_span_of(xp, grad_mask, mask, ramp)  # [B, N]


def grad_span_of(xp: Any, grad_mask: Array, mask: Array, ramp: float) -> Array:
    """sum_t dm_ti 1[0 < m_ti < 1] / R, given the mask itself.   [.., M, N] -> [.., N]."""
    on_ramp = (mask > 0) & (mask < 1)
    return xp.sum(xp.where(on_ramp, grad_mask, xp.zeros_like(grad_mask)), axis=-2) / ramp
