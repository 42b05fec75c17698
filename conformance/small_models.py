"""Small models with parameters of every kind at work, drawn by Hypothesis."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refspan.config import ModelConfig, initial_parameters
from refspan.conformance.protocol import Array

SIZES = ((7, 6, 10, 1, 1, 4, 3), (11, 12, 20, 2, 2, 5, 4), (5, 8, 9, 2, 3, 3, 2), (13, 10, 16, 3, 2, 4, 5))
"""Vocabulary, hidden, feed-forward, layers, heads, head size, block; H * D is not d."""

LARGE = ((300, 72, 136, 1, 5, 20, 64),)
"""As SIZES, wide enough for kernels to take more than one of their tiles; more tokens than bytes hold."""

LONG = ((7, 6, 10, 1, 1, 4, 150), SIZES[0])
"""As SIZES, the smallest, with blocks that are long where an implementation cuts them."""

MANY_TOKENS = ((140_000, 4, 6, 1, 1, 4, 3),)
"""As SIZES, with more tokens than 16 bits hold."""

SPANS = ("spread", "as at the start", "all near L", "all near 0", "beyond the stream", "saturated")
"""What the span predictors say, see `_spans`."""

HALF = "L / 2"
"""As one of SPANS: weights and biases of the predictors are 0, which leaves rounding nothing to decide."""

LONGEST = (8.0, 3.0, 20.0, 8.75)
"""What L is drawn from."""

RAMPS = (2.0, 1.0, 3.0, 5.0, 16.0, 2.5, 0.5, 128.0)
"""What R is drawn from."""

SHARP = "sharp attention"

STRESSES = {
    "quiet embeddings": ("embedding.weight", 0.01),
    SHARP: ("attention.query.weight", 25.0),
    "loud feed-forward": ("feedforward.in.weight", 8.0),
}
"""What is sometimes multiplied, and with what, by name.

Quiet embeddings: the variance of hidden states is not far from norms' epsilon. Sharp attention: logits of some dozens,
now and then beyond 88, whose exponentials float32 does not hold; a memory at the very end of its ramp may outweigh all
others, so that spans that are all but 0 or L must not end at a whole distance. Loud: a ReLU passes on more than 6.
"""

FAR = (2.0**34, 80_000.0, 6000.0, 3000.0, 256.0)
"""As LONGEST, for memories that are far older than a test has time to make them, see `_far_ages`."""


@st.composite
def models(
    draw: st.DrawFn,
    dtype: np.dtype,
    *,
    spans: Sequence[str] = SPANS,
    norms: Sequence[str] = ("post", "pre"),
    loudness: float = 1.0,
    shapes: Sequence[tuple[int, ...]] = SIZES,
    longest: Sequence[float] = LONGEST,
    ramps: Sequence[float] = RAMPS,
    reach: Sequence[int] | None = None,
    live: Sequence[int] = (),
) -> tuple[ModelConfig, dict[str, Array], str]:
    """A small model with parameters of every kind at work, and what it is like in words.

    `loudness`: what the last weights, and so the logits of tokens, are multiplied with. `shapes`: as `SIZES`.
    `longest`: as `LONGEST`. `ramps`: as `RAMPS`. `reach`: what P is drawn from; None means about a block. `live`: with
    spans `HALF`, instead of `longest`, how many memories are alive in a stream that is long enough.
    """
    vocabulary, hidden, inner, layers, heads, head_size, block = draw(st.sampled_from(shapes))
    kind = draw(st.sampled_from(spans))
    max_span = 1000.0 if kind == "beyond the stream" else draw(st.sampled_from(longest))
    ramp = draw(st.sampled_from(RAMPS[:5] if live else ramps))
    if live:  # of ages 1 to L / 2 + R - 1
        max_span = 2 * (draw(st.sampled_from(live)) + 1 - ramp)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        feedforward_size=inner,
        layers=layers,
        heads=heads,
        head_size=head_size,
        block_size=block,
        max_span=max_span,
        ramp=ramp,
        span_temperature=draw(st.sampled_from((1.0, 2.0, 0.5, 8.0))),
        norm=draw(st.sampled_from(norms)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    positions = draw(st.sampled_from(reach or (block, 1, block - 1, 2 * block + 1)))
    params = initial_parameters(config, int(rng.integers(2**31)), positions=positions, dtype="float64")
    for name, array in params.items():
        if "norm" in name:
            params[name] = array + 0.3 * rng.standard_normal(array.shape)
        elif name.endswith(("query.weight", "key.weight", "output.weight", "embedding.weight")):
            params[name] = 2 * array
        elif ".span." in name:
            params[name] = _spans(rng, kind, name, array)
    stress = draw(st.sampled_from((None, None, *STRESSES)))
    if stress == SHARP and kind == HALF:
        stress = None  # spans are all at a kink, maybe
    if stress == SHARP:
        config = replace(config, max_span=config.max_span - 0.4, ramp=config.ramp + 0.2)
    if stress:
        which, factor = STRESSES[stress]
        params = {name: factor * x if name.endswith(which) else x for name, x in params.items()}
    params["output.weight"] = loudness * params["output.weight"]
    words = f"{config.norm}-norm, spans {kind}"
    words += (f", {stress}" if stress else "") + f", logits times {loudness:g}" * (loudness != 1)
    return config, {name: array.astype(dtype) for name, array in params.items()}, words


def _spans(rng: np.random.Generator, kind: str, name: str, start: Array) -> Array:
    """Weight or bias of a span predictor."""
    if kind == "as at the start":
        return start
    if kind == HALF:
        return np.zeros_like(start)
    weight = name.endswith("weight")
    if kind == "spread":
        return np.asarray(rng.standard_normal(start.shape) * (1.5 if weight else 0.5))
    if kind == "saturated":  # where exp(z), or exp(-z), is more than float32 holds
        return np.asarray(0.3 * rng.standard_normal(start.shape) if weight else rng.choice([-200.0, 200.0]))
    bias = {"all near L": 6.0, "all near 0": -12.0, "beyond the stream": 0.0}[kind]
    return np.asarray(0.3 * rng.standard_normal(start.shape) + (0 if weight else bias))


def moved(rng: np.random.Generator, params: Mapping[str, Array], *, some: bool = False) -> dict[str, Array]:
    """Parameters a large step of an optimiser further on; with `some` about half of them, as if others were frozen."""
    steps = {name: 0.2 * (np.std(x) + 0.05) * rng.standard_normal(x.shape) for name, x in params.items()}
    if some:
        steps = {name: step * int(rng.integers(2)) for name, step in steps.items()}
    return {name: (x + steps[name]).astype(x.dtype) for name, x in params.items()}
