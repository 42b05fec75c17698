"""Linear map, x W^T + b (part of clauses LAYER and MODEL; the paper's equation 1 for queries, keys and values)."""

from typing import Any

from refspan.arrays import Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Map the last axis.   [.., in], [out, in], [out] -> [.., out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_backward(xp: Any, grad_y: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """Gradients of `linear` with respect to `x` and `weight`; that of the bias is `grad_bias`.

        y_o = sum_i W_oi x_i + b_o   =>   dx_i = sum_o dy_o W_oi,   dW_oi = sum over rows of dy_o x_i

    [.., out], [.., in], [out, in] -> [.., in], [out, in].
    """
    return grad_y @ weight, grad_weight(xp, grad_y, x)


def grad_weight(xp: Any, grad_y: Array, x: Array) -> Array:
    """dW alone, where nothing flows back to x.   [.., out], [.., in] -> [out, in]."""
    return xp.reshape(grad_y, (-1, grad_y.shape[-1])).T @ xp.reshape(x, (-1, x.shape[-1]))


def grad_bias(xp: Any, grad_y: Array) -> Array:
    """Sum of dy over everything but the last axis.   [.., out] -> [out]."""
    return xp.sum(xp.reshape(grad_y, (-1, grad_y.shape[-1])), axis=0)
