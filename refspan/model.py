"""The whole model in training: tokens to losses and gradients (clauses MODEL, LOSS, START).

    h = embedding(tokens);   h = layer(h) for each layer;   pre-norm: h = final_norm(h)
    log p = log_softmax(h W_out^T + b_out)
    loss = cross-entropy of the targets + span loss of all layers

A block of tokens is processed at once. What each layer was given becomes its memory for the next block, and is a
constant there: gradients do not leave the block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

from refspan.arrays import Array, check_dtype, check_number, check_shape, device_of, namespace_of
from refspan.config import ModelConfig, check_parameters
from refspan.cross_entropy import cross_entropy, cross_entropy_backward, log_softmax
from refspan.dropout import Dropout
from refspan.embedding import embedding, embedding_backward
from refspan.layer import SavedLayer, layer, layer_backward
from refspan.layer_norm import layer_norm, layer_norm_backward
from refspan.linear import grad_bias, linear, linear_backward
from refspan.memory import Memory, after_block, check_ages, empty_memory
from refspan.span_loss import span_loss


class Losses(NamedTuple):
    """The two losses of one block."""

    task: float
    """Mean over tokens of -log p(target), in nats."""
    span: float
    """The price of remembering (LOSS), `span_loss_weight` included."""


@dataclass(frozen=True)
class SavedModel:
    """What `model_backward` needs of `model`."""

    tokens: Array
    layers: Sequence[SavedLayer]
    last: Array
    """The last layer's result.   [B, M, d]"""
    final: Array
    """What the output projection saw.   [B, M, d]"""
    log_probs: Array


def model(
    config: ModelConfig,
    params: Mapping[str, Array],
    tokens: Array,
    memory: Sequence[Memory],
    *,
    span_limit: float | None = None,
    dropout: Dropout | None = None,
) -> tuple[Array, Sequence[Memory], SavedModel]:
    """One block through the model, from hidden states (MODEL).

    Args:
        config: the model.
        params: its parameters by name.
        tokens: [B, M] int64.
        memory: one for each layer, with contents `hidden`; see `start_memory`.
        span_limit: l of SHORTEN for this block.
        dropout: for training.

    Returns:
        Log-probabilities of the next token [B, M, V], the memories after the block, and what `model_backward` needs.
    """
    xp = namespace_of(tokens=tokens, **params)
    queries = tokens.shape[1]
    h = embedding(xp, tokens, params["embedding.weight"])
    after, saved = [], []
    for i in range(config.layers):
        held = memory[i].append(xp, {"hidden": h})
        hidden_before = memory[i].contents["hidden"]
        h, saved_layer = layer(
            xp,
            config,
            layer_parameters(params, i),
            h,
            hidden_before,
            held.age,
            params["position.weight"],
            span_limit=span_limit,
            dropout=dropout.of(i) if dropout else None,
        )
        positions = int(params["position.weight"].shape[0])
        after.append(after_block(xp, held, saved_layer.span, queries, ramp=config.ramp, positions=positions))
        saved.append(saved_layer)
    final = layer_norm(xp, h, params["final_norm.weight"], params["final_norm.bias"]) if config.norm == "pre" else h
    log_probs = log_softmax(xp, linear(final, params["output.weight"], params["output.bias"]))
    return log_probs, after, SavedModel(tokens, saved, h, final, log_probs)


def model_backward(
    config: ModelConfig,
    params: Mapping[str, Array],
    grad_logits: Array,
    saved: SavedModel,
    *,
    span_loss_weight: float = 0.0,
    span_limit: float | None = None,
    dropout: Dropout | None = None,
) -> dict[str, Array]:
    """Gradients of `model`, and of its span loss, with respect to all parameters; arguments as there.

    Layers hand the gradient of their input down, each adds to that of the position table that they share.
    """
    xp = namespace_of(grad_logits=grad_logits, **params)
    grads: dict[str, Array] = {}
    grad_h, grads["output.weight"] = linear_backward(xp, grad_logits, saved.final, params["output.weight"])
    grads["output.bias"] = grad_bias(xp, grad_logits)
    if config.norm == "pre":
        grad_h, grads["final_norm.weight"], grads["final_norm.bias"] = layer_norm_backward(
            xp, grad_h, saved.last, params["final_norm.weight"]
        )
    grads["position.weight"] = xp.zeros_like(params["position.weight"])
    for i in reversed(range(config.layers)):
        grad_h, grads_layer, grad_position = layer_backward(
            xp,
            config,
            layer_parameters(params, i),
            grad_h,
            saved.layers[i],
            span_loss_weight=span_loss_weight,
            span_limit=span_limit,
            dropout=dropout.of(i) if dropout else None,
        )
        grads |= {f"layers.{i}.{name}": grad for name, grad in grads_layer.items()}
        grads["position.weight"] = grads["position.weight"] + grad_position
    grads["embedding.weight"] = embedding_backward(xp, grad_h, saved.tokens, params["embedding.weight"])
    return {name: grads[name] for name in params}


def loss_and_gradients(
    config: ModelConfig,
    params: Mapping[str, Array],
    tokens: Array,
    targets: Array,
    memory: Sequence[Memory] | None,
    *,
    span_loss_weight: float = 0.0,
    span_limit: float | None = None,
    dropout: Dropout | None = None,
) -> tuple[Losses, dict[str, Array], Sequence[Memory]]:
    """Losses of one block, their gradients, and the memories for the next block; one step of training.

    Args:
        config: the model.
        params: its parameters by name, see `parameter_shapes`; float16 is computed in float32.
        tokens: [B, M] int64, 0..V-1.
        targets: [B, M] int64, the token that follows each.
        memory: what the previous call returned; None to start empty (START). Constants: gradients end there.
        span_loss_weight: alpha of LOSS.
        span_limit: l of SHORTEN for this step, see `draw_span_limit`; None for full spans.
        dropout: rate and seed of this step; None for none.

    Returns:
        `Losses(task, span)`; gradients of their sum with the names, shapes and dtypes of `params`; memories, dropped as
        soon as full spans allow (DROP).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; the message names it.
    """
    span_loss_weight, span_limit = _as_numbers(span_loss_weight, span_limit)
    xp, wide, log_probs, found, after, saved = _forward(
        config, params, tokens, targets, memory, span_loss_weight, span_limit, dropout
    )
    grads = model_backward(
        config,
        wide,
        cross_entropy_backward(xp, log_probs, targets),
        saved,
        span_loss_weight=span_loss_weight,
        span_limit=span_limit,
        dropout=dropout,
    )
    narrow = {name: xp.astype(grads[name], params[name].dtype, copy=False) for name in params}
    return found, narrow, after


def losses(
    config: ModelConfig,
    params: Mapping[str, Array],
    tokens: Array,
    targets: Array,
    memory: Sequence[Memory] | None,
    *,
    span_loss_weight: float = 0.0,
    span_limit: float | None = None,
) -> tuple[Losses, Sequence[Memory]]:
    """As `loss_and_gradients`, without gradients and dropout: how well a model does on text that it does not learn."""
    span_loss_weight, span_limit = _as_numbers(span_loss_weight, span_limit)
    _, _, _, found, after, _ = _forward(config, params, tokens, targets, memory, span_loss_weight, span_limit, None)
    return found, after


def _forward(
    config: ModelConfig,
    params: Mapping[str, Array],
    tokens: Array,
    targets: Array,
    memory: Sequence[Memory] | None,
    span_loss_weight: float,
    span_limit: float | None,
    dropout: Dropout | None,
) -> tuple[Any, dict[str, Array], Array, Losses, Sequence[Memory], Any]:
    """Array namespace, parameters as computed with, log-probabilities, losses, memories, what backward needs."""
    xp = check_parameters(config, params)
    table = params["embedding.weight"]
    check_tokens(config, table, "tokens", tokens, ("B", "M"))
    check_tokens(config, table, "targets", targets, tuple(tokens.shape))
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout: got {dropout!r}, expected a Dropout")
    wide = widened(xp, params)
    if memory is None:
        memory = start_memory(config, wide, tokens.shape[0])
    check_memory(config, wide, memory, tokens.shape[0])
    options: dict[str, Any] = {"span_limit": span_limit, "dropout": dropout}
    log_probs, after, saved = model(config, wide, tokens, memory, **options)
    task = cross_entropy(xp, log_probs, targets)
    span = sum(
        span_loss(xp, one.attention.span, one.age, queries=tokens.shape[1], ramp=config.ramp, weight=span_loss_weight)
        for one in saved.layers
    )
    return xp, wide, log_probs, Losses(task, span), after, saved


def _as_numbers(span_loss_weight: float, span_limit: float | None) -> tuple[float, float | None]:
    """These two as Python's numbers; raises if they are none, or out of range."""
    span_loss_weight = check_number("span_loss_weight", span_loss_weight)
    if not (isfinite(span_loss_weight) and span_loss_weight >= 0):
        raise ValueError(f"span_loss_weight: got {span_loss_weight}, expected a finite number >= 0")
    if span_limit is not None:
        span_limit = check_number("span_limit", span_limit, "a number of steps")
        if not span_limit >= 0:
            raise ValueError(f"span_limit: got {span_limit}, expected a number of steps >= 0")
    return span_loss_weight, span_limit


def start_memory(config: ModelConfig, params: Mapping[str, Array], batch: int) -> list[Memory]:
    """Empty memories of hidden states, one for each layer (START)."""
    table = params["embedding.weight"]
    xp = namespace_of(table=table)
    dtype = xp.result_type(table.dtype, xp.float32)
    sizes, dtypes = {"hidden": (config.hidden_size,)}, {"hidden": dtype}
    return [empty_memory(xp, batch, sizes, dtypes, device_of(table)) for _ in range(config.layers)]


def layer_parameters(params: Mapping[str, Array], i: int) -> dict[str, Array]:
    """Parameters of layer i, names without `layers.{i}.`."""
    prefix = f"layers.{i}."
    return {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}


def widened(xp: Any, params: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters in the dtype that the model computes in: float32 at least (WIDTH)."""
    return {name: xp.astype(x, xp.result_type(x.dtype, xp.float32), copy=False) for name, x in params.items()}


def check_tokens(config: ModelConfig, table: Array, name: str, tokens: Array, shape: tuple[int | str, ...]) -> None:
    """Raise unless `tokens` are int64 of this shape, not empty, of the array library of `table`, all in 0..V-1."""
    xp = namespace_of(parameters=table, **{name: tokens})
    check_shape(name, tokens, shape)
    check_dtype(xp, name, tokens, ("int64",))
    if 0 in tokens.shape:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)}, expected at least one row and one token")
    low, high = int(xp.min(tokens)), int(xp.max(tokens))
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: got token {wrong}, expected 0 to {config.vocab_size - 1}")


def check_memory(config: ModelConfig, params: Mapping[str, Array], memory: Sequence[Memory], batch: int) -> None:
    """Raise unless `memory` is one of hidden states for each layer, for this batch and model."""
    table = params["embedding.weight"]
    for i, one in enumerate(check_layers(config, memory)):
        name = f"memory of layer {i}"
        if not isinstance(one, Memory) or "hidden" not in one.contents:
            raise TypeError(f"{name}: got {type(one).__name__}, expected a Memory that loss_and_gradients returned")
        hidden = one.contents["hidden"]
        xp = namespace_of(parameters=table, **{f"{name}: hidden": hidden, f"{name}: age": one.age})
        check_shape(f"{name}: hidden", hidden, (batch, "N", config.hidden_size))
        if hidden.dtype != table.dtype:
            raise TypeError(f"{name}: hidden: got {hidden.dtype}, expected {table.dtype}")
        check_ages(xp, f"{name}: age", one.age, tuple(hidden.shape[:2]))


def check_layers(config: ModelConfig, memory: Sequence[Any]) -> Sequence[Any]:
    """`memory`, if it has an item for each layer."""
    if not isinstance(memory, Sequence):
        raise TypeError(f"memory: got {type(memory).__name__}, expected a list with an item for each layer")
    if len(memory) != config.layers:
        raise ValueError(f"memory: got {len(memory)} layers, expected {config.layers}")
    return memory
