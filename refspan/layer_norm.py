"""Layer normalisation (part of clause LAYER): zero mean and unit variance over the hidden axis, scale and shift."""

from typing import Any

from refspan.arrays import Array

EPSILON = 1e-5
"""Added to the variance."""


def layer_norm(xp: Any, x: Array, weight: Array, bias: Array) -> Array:
    """y = weight * (x - mean) / sqrt(variance + EPSILON) + bias.   [.., d], [d], [d] -> [.., d]."""
    normal, _ = _normalised(xp, x)
    return normal * weight + bias


def layer_norm_backward(xp: Any, grad_y: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of `layer_norm` with respect to `x`, `weight` and `bias`.

    With n = (x - mean) / s the normalised vector, s the standard deviation, and g = dy * weight:

        dx = (g - mean(g) - n mean(g n)) / s

    The two means are what mean and variance pass on: n does not change if x is shifted or stretched, so dx has no part
    along 1 and none along n.

    [.., d], [.., d], [d] -> [.., d], [d], [d].
    """
    normal, deviation = _normalised(xp, x)
    grad_normal = grad_y * weight
    grad_x = grad_normal - xp.mean(grad_normal, axis=-1, keepdims=True)
    grad_x = (grad_x - normal * xp.mean(grad_normal * normal, axis=-1, keepdims=True)) / deviation
    size = x.shape[-1]
    grad_weight = xp.sum(xp.reshape(grad_y * normal, (-1, size)), axis=0)
    return grad_x, grad_weight, xp.sum(xp.reshape(grad_y, (-1, size)), axis=0)


def _normalised(xp: Any, x: Array) -> tuple[Array, Array]:
    """(x - mean) / s and s = sqrt(variance + EPSILON).   [.., d] -> [.., d], [.., 1]."""
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    deviation = xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + EPSILON)
    return centred / deviation, deviation
