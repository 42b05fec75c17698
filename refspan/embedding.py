"""Token embedding (part of clause MODEL): row `token` of a table."""

from typing import Any

from refspan.arrays import Array, device_of


def embedding(xp: Any, tokens: Array, weight: Array) -> Array:
    """[B, M] int64, [V, d] -> [B, M, d]."""
    rows = xp.take(weight, xp.reshape(tokens, (-1,)), axis=0)
    return xp.reshape(rows, (*tokens.shape, weight.shape[1]))


def embedding_backward(xp: Any, grad_rows: Array, tokens: Array, weight: Array) -> Array:
    """Gradient with respect to `weight`: each row sums the gradients of its tokens.

    As a product with the tokens in one-hot form, because the array API has no scatter-add.

    [B, M, d], [B, M], [V, d] -> [V, d].
    """
    vocabulary, size = weight.shape
    rows = xp.reshape(grad_rows, (-1, size))  # [T, d]
    flat = xp.reshape(tokens, (-1,))  # [T]
    one_hot = xp.arange(vocabulary, dtype=flat.dtype, device=device_of(flat))[:, None] == flat  # [V, T]
    return xp.astype(one_hot, rows.dtype) @ rows
