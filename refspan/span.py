"""The span predictor: how many steps each memory asks to be kept (clause SPAN; the paper's equation 3).

    e_i = L sigmoid(z_i),   z_i = w . h_i / temperature + b

One span per memory and layer, shared by all heads: a memory can only be freed when no head needs it any more. The
temperature keeps small changes of w from moving spans by thousands of steps when L is large; it does not divide b, so
that it leaves the spans at initialisation alone.
"""

from math import log
from typing import Any

from refspan.arrays import Array


def expire_span(xp: Any, hidden: Array, weight: Array, bias: Array, *, max_span: float, temperature: float) -> Array:
    """Spans in 0..max_span steps (SPAN).   [B, N, d], [d], [] -> [B, N]."""
    z = hidden @ weight / temperature + bias  # [B, N]
    small = xp.exp(-xp.abs(z))  # neither overflows nor loses the digits of a sigmoid near 0
    return max_span * xp.where(z >= 0, 1 / (1 + small), small / (1 + small))


def expire_span_backward(
    xp: Any, grad_span: Array, hidden: Array, weight: Array, bias: Array, *, max_span: float, temperature: float
) -> tuple[Array, Array, Array]:
    """Gradients of `expire_span` with respect to `hidden`, `weight` and `bias`.

        de/dz = L sigmoid(z) (1 - sigmoid(z)) = L x / (1 + x)^2   with   x = exp(-|z|)
        dh_i  = dz_i w / temperature,   dw = sum_i dz_i h_i / temperature,   db = sum_i dz_i

    [B, N], [B, N, d], [d], [] -> [B, N, d], [d], [].
    """
    small = xp.exp(-xp.abs(hidden @ weight / temperature + bias))
    grad_z = grad_span * max_span * small / ((1 + small) * (1 + small))  # [B, N]
    grad_hidden = grad_z[..., None] * (weight / temperature)  # [B, N, d]
    rows = xp.reshape(hidden, (-1, hidden.shape[-1]))
    grad_weight = xp.reshape(grad_z, (-1,)) @ rows / temperature  # [d]
    return grad_hidden, grad_weight, xp.sum(grad_z)


def initial_bias(start: float) -> float:
    """b = logit(start): with w = 0 every span starts at start * L, where the sigmoid still has a slope (SPAN).

    Args:
        start: fraction of max_span at which spans begin, strictly between 0 and 1.
    """
    if not 0 < start < 1:
        raise ValueError(f"start: got {start}, expected a fraction of max_span, strictly between 0 and 1")
    return log(start) - log(1 - start)
