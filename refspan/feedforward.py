"""Feed-forward part of a layer (clause LAYER): W_out dropout(relu(W_in x + b_in)) + b_out."""

from typing import Any, NamedTuple

from refspan.arrays import Array
from refspan.dropout import Dropout
from refspan.linear import grad_bias, linear, linear_backward


class FeedForwardParameters(NamedTuple):
    """Parameters of a feed-forward part, or their gradients."""

    in_weight: Array
    """[f, d]"""
    in_bias: Array
    """[f]"""
    out_weight: Array
    """[d, f]"""
    out_bias: Array
    """[d]"""


def feedforward(xp: Any, x: Array, p: FeedForwardParameters, dropout: Dropout | None = None) -> tuple[Array, Array]:
    """Result [.., d] and what backward needs: the hidden numbers after ReLU and dropout, [.., f]."""
    inner = linear(x, p.in_weight, p.in_bias)  # [.., f]
    active = xp.clip(inner, 0, None)
    if dropout is not None:
        active = active * dropout.scale_like(xp, active)
    return linear(active, p.out_weight, p.out_bias), active  # [.., d]


def feedforward_backward(
    xp: Any, grad_y: Array, x: Array, active: Array, p: FeedForwardParameters, dropout: Dropout | None = None
) -> tuple[Array, FeedForwardParameters]:
    """Gradients of `feedforward` with respect to `x` and the parameters.

    relu'(z) = 1[z > 0], and a number that dropout has zeroed passes no gradient either: both read off `active` > 0.
    """
    grad_active, grad_out_weight = linear_backward(xp, grad_y, active, p.out_weight)
    grad_inner = grad_active * xp.astype(active > 0, grad_active.dtype)  # [.., f]
    if dropout is not None:
        grad_inner = grad_inner / (1 - dropout.rate)
    grad_x, grad_in_weight = linear_backward(xp, grad_inner, x, p.in_weight)
    return grad_x, FeedForwardParameters(
        grad_in_weight, grad_bias(xp, grad_inner), grad_out_weight, grad_bias(xp, grad_y)
    )
