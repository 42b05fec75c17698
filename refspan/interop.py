"""Models of the original PyTorch implementation, transformer-sequential, in our names.

Its Expire-Span models map one to one. Its Transformer-XL models, with a fixed window of W previous tokens and a learned
position embedding over the whole of it, are Expire-Span models that never learnt to forget: every span is W and the
ramp is one step, so that a memory is seen in full at distance W and not at all at W + 1. A span of exactly W is
sigmoid(b) = 1, which every b above 37 gives in float64.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from refspan.arrays import Array, check_shape, device_of, namespace_of
from refspan.config import ModelConfig, check_parameters, parameter_shapes
from refspan.memory import Memory

SATURATED = 40.0
"""1 + exp(-40) rounds to 1 in float64, and the slope of the sigmoid there, 4e-18, moves nothing."""

_LAYER = {
    "attn.proj_query.weight": "attention.query.weight",
    "attn.proj_key.weight": "attention.key.weight",
    "attn.proj_val.weight": "attention.value.weight",
    "attn.proj_out.weight": "attention.output.weight",
    "ff.fc1.weight": "feedforward.in.weight",
    "ff.fc1.bias": "feedforward.in.bias",
    "ff.fc2.weight": "feedforward.out.weight",
    "ff.fc2.bias": "feedforward.out.bias",
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
}
_ENDS = {
    "in_emb.weight": "embedding.weight",
    "out.out_emb.weight": "output.weight",
    "out.out_emb.bias": "output.bias",
    "out_norm.weight": "final_norm.weight",
    "out_norm.bias": "final_norm.bias",
}
_SPAN = "attn.attn.expire_span.span_predictor"
_POSITION = "attn.attn.key_pe"
_OTHER_KINDS = ("adapt_span", "feedback", "compress", "staircase")
_DEFAULTS = {
    "hid_sz": 256,
    "inner_hid_sz": 1024,
    "nlayers": 8,
    "mem_sz": 64,
    "nheads": 2,
    "head_dim": 0,  # 0: hid_sz / nheads
    "attn_lim": 64,
    "expire_span_ramp": 32,
    "expire_span_pre_div": 1,
}
"""What the original takes for a setting that is not given."""


def from_transformer_sequential(
    state: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, np.ndarray[Any, Any]]]:
    """Config and parameters of a model that transformer-sequential trained.

    Args:
        state: its state dict, name -> array (or tensor); a prefix `module.` and buffers are passed over.
        settings: its command-line settings by name, `hid_sz` or `hid-sz`; numbers may be strings. Those that are not
            given have the original's defaults.

    Returns:
        The config and the parameters, as NumPy arrays of the dtype that they had.

    Raises:
        TypeError, ValueError: an array is missing, not known, or not what the settings ask for; a setting that is no
            number; a kind of model that is not covered.
    """
    given = {name.lstrip("-").replace("-", "_"): value for name, value in settings.items()}
    arrays = {name.removeprefix("module."): np.asarray(array) for name, array in state.items()}
    config = _config(given, arrays)
    params: dict[str, np.ndarray[Any, Any]] = {}
    used = set()

    def take(name: str, shape: tuple[int | str, ...] | None = None) -> np.ndarray[Any, Any]:
        if name not in arrays:
            raise ValueError(f"{name}: missing from the checkpoint, which these settings ask for")
        if shape is not None:
            check_shape(name, arrays[name], shape)
        used.add(name)
        return arrays[name]

    for theirs, ours in _ENDS.items():
        if config.norm == "pre" or not ours.startswith("final_norm"):
            params[ours] = take(theirs)
    spans, d = _flag(given, "expire_span"), config.hidden_size
    places = config.block_size if spans else int(config.max_span)
    like = params["embedding.weight"]
    shared = f"layers.0.{_POSITION}"
    for i in range(config.layers):
        for theirs, ours in _LAYER.items():
            params[f"layers.{i}.{ours}"] = take(f"layers.{i}.{theirs}")
        weight, bias = f"layers.{i}.{_SPAN}.weight", f"layers.{i}.{_SPAN}.bias"
        params[f"layers.{i}.span.weight"] = take(weight, (1, d))[0] if spans else np.zeros(d, like.dtype)
        params[f"layers.{i}.span.bias"] = take(bias, (1,))[0, ...] if spans else np.asarray(SATURATED, like.dtype)
        table = take(f"layers.{i}.{_POSITION}", (1, config.head_size, places))  # the farthest distance first
        if not np.array_equal(table, arrays[shared]):
            raise ValueError(f"layers.{i}.{_POSITION}: differs from that of layer 0, expected one table for all layers")
    params["position.weight"] = np.ascontiguousarray(arrays[shared][0].T[::-1])
    left = [name for name in arrays if name not in used and not name.endswith("mask_causal")]
    if left:
        raise ValueError(f"{left[0]}: not known to a model of these settings ({len(left)} such)")
    check_parameters(config, params)
    return config, {name: params[name] for name in parameter_shapes(config)}


def initial_memory(config: ModelConfig, params: Mapping[str, Array], batch: int) -> list[tuple[Array, Array]]:
    """The memory that the original starts a stream with, where ours starts empty (START).

    P zero vectors in each layer, aged P..1, P being the rows of the position embedding: the block for its Expire-Span
    models, the window for its Transformer-XL.

    Returns:
        For each layer hidden states [B, P, d] and ages [B, P], as `open_model` takes them.
    """
    table = params["position.weight"]
    xp = namespace_of(table=table)
    places = table.shape[0]
    hidden = xp.zeros((batch, places, config.hidden_size), dtype=table.dtype, device=device_of(table))
    age = xp.arange(places, 0, -1, dtype=xp.int64, device=device_of(table))
    return [(hidden, xp.tile(age, (batch, 1))) for _ in range(config.layers)]


def memory_from_hidden(config: ModelConfig, memory: list[tuple[Array, Array]]) -> list[Memory]:
    """Plain (hidden, age) pairs, one per layer, as `loss_and_gradients` takes memories."""
    if len(memory) != config.layers:
        raise ValueError(f"memory: got {len(memory)} layers, expected {config.layers}")
    return [Memory(age, {"hidden": hidden}) for hidden, age in memory]


def _config(given: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> ModelConfig:
    """Our config for their settings."""

    def number(name: str) -> float:
        value = given.get(name, _DEFAULTS[name])
        try:
            return float("no number" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            raise ValueError(f"setting {name}: got {value!r}, expected a number") from None

    def count(name: str) -> int:
        value = number(name)
        if not value.is_integer():
            raise ValueError(f"setting {name}: got {value:g}, expected a whole number")
        return int(value)

    other = [name for name in _OTHER_KINDS if _flag(given, name)]
    if given.get("kind") not in (None, "expire", "txl"):
        other.append("kind")
    if other:
        raise ValueError(
            f"setting {other[0]}: got {given[other[0]]!r}; only Expire-Span and Transformer-XL models can be read"
        )
    if "in_emb.weight" not in arrays:
        raise ValueError("in_emb.weight: missing from the checkpoint; is it one of transformer-sequential?")
    expires, predictor = _flag(given, "expire_span"), f"layers.0.{_SPAN}.weight"
    if predictor in arrays and not expires:
        raise ValueError(f"setting expire_span: missing, but the checkpoint has {predictor}")
    hidden, heads = count("hid_sz"), count("nheads")
    check_shape("in_emb.weight", arrays["in_emb.weight"], ("V", hidden))
    return ModelConfig(
        vocab_size=len(arrays["in_emb.weight"]),
        hidden_size=hidden,
        feedforward_size=count("inner_hid_sz"),
        layers=count("nlayers"),
        heads=heads,
        head_size=count("head_dim") or hidden // max(heads, 1),
        block_size=count("mem_sz"),
        max_span=count("attn_lim"),
        ramp=number("expire_span_ramp") if expires else 1.0,
        span_temperature=number("expire_span_pre_div") if expires else 1.0,
        norm="pre" if _flag(given, "pre_norm") else "post",
    )


def _flag(given: Mapping[str, Any], name: str) -> bool:
    """A switch: present as True, "true", 1, or as an option without a value."""
    value = given.get(name, False)
    return value not in (False, None, 0, "0", "", "false", "False", "no")
