"""Random shortening, a regulariser of training (clause SHORTEN).

With spans of thousands of steps a model soon relies on particular ones. So each training step draws one limit l and
lets no span be longer, e <- min(e, l), in the mask and the span loss of that step. What is kept in memory goes by
the full spans: the limit of one step must not delete what the next one may see.
"""

from typing import TYPE_CHECKING, Any

from refspan.arrays import Array

if TYPE_CHECKING:
    import numpy as np


def shorten(xp: Any, span: Array, limit: float) -> Array:
    """min(e, l).   [B, N] -> [B, N]."""
    return xp.clip(span, None, limit)


def shorten_backward(xp: Any, grad_shortened: Array, span: Array, limit: float) -> Array:
    """A span that was cut short has no influence, so it gets no gradient.   [B, N], [B, N] -> [B, N]."""
    return xp.where(span <= limit, grad_shortened, xp.zeros_like(grad_shortened))


def draw_span_limit(random: "np.random.Generator", max_span: float) -> float:
    """l ~ U(0, L), drawn once per training step, for all layers and batch rows."""
    return float(random.uniform(0, max_span))
