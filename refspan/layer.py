"""One transformer layer over its memories (clause LAYER).

    post-norm                                       pre-norm
    u = x                                           u = norm1(x)         memories too
    y = norm1(x + attention(u))                     y = x + attention(u)
    z = norm2(y + feedforward(y))                   z = y + feedforward(norm2(y))

Attention has no biases. Keys, values and spans are made from u of all memories, the block's own among them; queries
from u of the block. Position scores use one table for all layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from refspan.arrays import Array
from refspan.attention import SavedAttention, span_attention, span_attention_backward
from refspan.config import ModelConfig
from refspan.dropout import Dropout
from refspan.feedforward import FeedForwardParameters, feedforward, feedforward_backward
from refspan.layer_norm import layer_norm, layer_norm_backward
from refspan.linear import grad_weight, linear, linear_backward
from refspan.shorten import shorten, shorten_backward
from refspan.span import expire_span, expire_span_backward
from refspan.span_loss import span_loss_backward

KEEP_BYTES = 32 * 2**20
"""What training keeps of each layer's attention weights, in bytes: less than one step alone may, layers being many."""


class Remembered(NamedTuple):
    """What attention needs of memories; made once per memory when parameters are frozen (CACHE)."""

    key: Array
    """[B, N, H D]"""
    value: Array
    """[B, N, H D]"""
    span: Array
    """[B, N]"""


@dataclass(frozen=True)
class SavedLayer:
    """What `layer_backward` needs of `layer`."""

    context: Array
    """Hidden states of the memories and, last, of the block.   [B, N, d]"""
    normal: Array
    """u of all of these.   [B, N, d]"""
    age: Array
    """[B, N]"""
    span: Array
    """[B, N], before SHORTEN"""
    attention: SavedAttention
    attended: Array
    """[B, M, H D]"""
    after_attention: Array
    """x + attention(u).   [B, M, d]"""
    middle: Array
    """What feed-forward sees.   [B, M, d]"""
    active: Array
    """[B, M, f]"""
    before_end: Array
    """y + feedforward(..).   [B, M, d]"""


def remember(xp: Any, config: ModelConfig, p: Mapping[str, Array], normal: Array) -> Remembered:
    """Keys, values and spans of memories with these u (SPAN).   [B, N, d] -> [B, N, H D] twice, [B, N]."""
    return Remembered(
        key=linear(normal, p["attention.key.weight"]),
        value=linear(normal, p["attention.value.weight"]),
        span=expire_span(
            xp,
            normal,
            p["span.weight"],
            p["span.bias"],
            max_span=config.max_span,
            temperature=config.span_temperature,
        ),
    )


def normalise_input(xp: Any, config: ModelConfig, p: Mapping[str, Array], hidden: Array) -> Array:
    """u: norm1 of hidden states with pre-norm, for memories as for the block; else the hidden states themselves."""
    return layer_norm(xp, hidden, p["norm1.weight"], p["norm1.bias"]) if config.norm == "pre" else hidden


def attend(
    xp: Any,
    config: ModelConfig,
    p: Mapping[str, Array],
    normal: Array,
    kept: Remembered,
    age: Array,
    position: Array,
    dropout: Dropout | None = None,
    keep_bytes: int = 0,
) -> tuple[Array, Array, SavedAttention]:
    """Attention of a block with these u over memories: the result [B, M, d], heads joined [B, M, H D], and saved."""
    output, saved = span_attention(
        split_heads(xp, linear(normal, p["attention.query.weight"]), config.heads),  # [B, H, M, D]
        split_heads(xp, kept.key, config.heads),  # [B, H, N, D]
        split_heads(xp, kept.value, config.heads),
        kept.span,
        age,
        ramp=config.ramp,
        position=position,
        dropout=dropout,
        keep_bytes=keep_bytes,
    )
    attended = join_heads(xp, output)  # [B, M, H D]
    return linear(attended, p["attention.output.weight"]), attended, saved


def finish(
    xp: Any, config: ModelConfig, p: Mapping[str, Array], after_attention: Array, dropout: Dropout | None = None
) -> tuple[Array, Array, Array, Array]:
    """From x + attention(u) to the layer's result z; then what feed-forward saw, its hidden numbers, y + its result."""
    f = _feedforward_parameters(p)
    if config.norm == "pre":
        middle = layer_norm(xp, after_attention, p["norm2.weight"], p["norm2.bias"])
        result, active = feedforward(xp, middle, f, dropout)
        before_end = after_attention + result
        return before_end, middle, active, before_end
    middle = layer_norm(xp, after_attention, p["norm1.weight"], p["norm1.bias"])  # y
    result, active = feedforward(xp, middle, f, dropout)
    before_end = middle + result
    return layer_norm(xp, before_end, p["norm2.weight"], p["norm2.bias"]), middle, active, before_end


def layer(
    xp: Any,
    config: ModelConfig,
    p: Mapping[str, Array],
    x: Array,
    memory_hidden: Array,
    age: Array,
    position: Array,
    *,
    span_limit: float | None = None,
    dropout: Dropout | None = None,
) -> tuple[Array, SavedLayer]:
    """One layer over a block, from hidden states; the form that training uses.

    Args:
        xp: array namespace.
        config: the model.
        p: the layer's parameters, names without the prefix `layers.{i}.`.
        x: [B, M, d], the block.
        memory_hidden: [B, N - M, d], what the layer remembers.
        age: [B, N], of the memories and, last, of the block's own.
        position: [P, D].
        span_limit: l of SHORTEN.
        dropout: of attention weights and of the feed-forward's hidden numbers.

    Returns:
        The layer's result [B, M, d], and what `layer_backward` needs.
    """
    queries = x.shape[1]
    context = xp.concat([memory_hidden, x], axis=1)  # [B, N, d]
    normal = normalise_input(xp, config, p, context)
    kept = remember(xp, config, p, normal)
    span = kept.span
    if span_limit is not None:
        kept = kept._replace(span=shorten(xp, span, span_limit))
    attention_dropout, inner_dropout = (dropout.of(0), dropout.of(1)) if dropout else (None, None)
    result, attended, saved = attend(
        xp, config, p, normal[:, -queries:, :], kept, age, position, attention_dropout, KEEP_BYTES
    )
    after_attention = x + result
    z, middle, active, before_end = finish(xp, config, p, after_attention, inner_dropout)
    return z, SavedLayer(context, normal, age, span, saved, attended, after_attention, middle, active, before_end)


def layer_backward(
    xp: Any,
    config: ModelConfig,
    p: Mapping[str, Array],
    grad_z: Array,
    saved: SavedLayer,
    *,
    span_loss_weight: float = 0.0,
    span_limit: float | None = None,
    dropout: Dropout | None = None,
) -> tuple[Array, dict[str, Array], Array]:
    """Gradients of `layer`, and of its share of the span loss, with respect to x, the parameters and the positions.

    The residual stream hands dz on to both its branches, whose gradients add up. Memories of earlier blocks are
    constants: what flows back to them ends there, but keys, values and spans made from them still teach the parameters.

    Returns:
        grad_x [B, M, d], gradients by the names in `p`, and grad_position [P, D].
    """
    grads: dict[str, Array] = {}
    queries = grad_z.shape[1]
    inner_dropout = dropout.of(1) if dropout else None

    def through_norm(name: str, grad_y: Array, x: Array) -> Array:
        grad_x, grads[f"{name}.weight"], grads[f"{name}.bias"] = layer_norm_backward(xp, grad_y, x, p[f"{name}.weight"])
        return grad_x

    # z back to x + attention(u)
    pre = config.norm == "pre"
    grad_end = grad_z if pre else through_norm("norm2", grad_z, saved.before_end)
    grad_middle, grad_f = feedforward_backward(
        xp, grad_end, saved.middle, saved.active, _feedforward_parameters(p), inner_dropout
    )
    grads |= _feedforward_names(grad_f)
    if pre:
        grad_after = grad_end + through_norm("norm2", grad_middle, saved.after_attention)
    else:
        grad_after = through_norm("norm1", grad_end + grad_middle, saved.after_attention)

    # attention back to keys, values, spans and queries
    grad_attended, grads["attention.output.weight"] = linear_backward(
        xp, grad_after, saved.attended, p["attention.output.weight"]
    )
    back = span_attention_backward(split_heads(xp, grad_attended, config.heads), saved.attention)
    grad_span = back.span  # [B, N]
    if span_loss_weight:
        grad_span = grad_span + span_loss_backward(
            xp, saved.attention.span, saved.age, queries=queries, ramp=config.ramp, weight=span_loss_weight
        )
    if span_limit is not None:
        grad_span = shorten_backward(xp, grad_span, saved.span, span_limit)

    # and these back to u, of the memories only where norm1 wants to learn from them
    normal, own = saved.normal, slice(-queries, None)
    reached = slice(None) if pre else own
    grad_u, grads["span.weight"], grads["span.bias"] = expire_span_backward(
        xp,
        grad_span,
        normal,
        p["span.weight"],
        p["span.bias"],
        max_span=config.max_span,
        temperature=config.span_temperature,
    )
    grad_u = grad_u[:, reached, :]  # [B, N or M, d]
    for name, grad in (("key", join_heads(xp, back.key)), ("value", join_heads(xp, back.value))):
        weight = f"attention.{name}.weight"
        grads[weight] = grad_weight(xp, grad, normal)
        grad_u = grad_u + grad[:, reached, :] @ p[weight]
    weight = "attention.query.weight"
    grad_own, grads[weight] = linear_backward(xp, join_heads(xp, back.query), normal[:, own, :], p[weight])
    grad_u[:, own, :] += grad_own
    if pre:
        grad_u = through_norm("norm1", grad_u, saved.context)[:, own, :]
    return grad_after + grad_u, grads, back.position


def split_heads(xp: Any, x: Array, heads: int) -> Array:
    """[B, N, H D] -> [B, H, N, D]."""
    batch, memories, size = x.shape
    return xp.permute_dims(xp.reshape(x, (batch, memories, heads, size // heads)), (0, 2, 1, 3))


def join_heads(xp: Any, x: Array) -> Array:
    """[B, H, N, D] -> [B, N, H D]."""
    batch, heads, memories, size = x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (batch, memories, heads * size))


def _feedforward_parameters(p: Mapping[str, Array]) -> FeedForwardParameters:
    return FeedForwardParameters(*(p[f"feedforward.{name}"] for name in _FEEDFORWARD))


def _feedforward_names(grads: FeedForwardParameters) -> dict[str, Array]:
    return {f"feedforward.{name}": grad for name, grad in zip(_FEEDFORWARD, grads, strict=True)}


_FEEDFORWARD = ("in.weight", "in.bias", "out.weight", "out.bias")
