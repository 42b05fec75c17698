"""Small models for the tests of streaming on ONNX Runtime."""

import numpy as np

import refspan
from refspan.export import OnnxModel, streaming_model


def small_model(seed=0, *, positions=3, dtype="float32", **settings):
    """A config, and parameters whose spans differ from memory to memory."""
    sizes = {
        "vocab_size": 11,
        "hidden_size": 12,
        "feedforward_size": 20,
        "layers": 2,
        "heads": 2,
        "head_size": 5,
        "block_size": 8,
        "max_span": 30.0,
        "ramp": 3.0,
        "span_temperature": 2.0,
        "norm": "pre",
    }
    config = refspan.ModelConfig(**{**sizes, **settings})
    params = refspan.initial_parameters(config, seed, positions=positions, dtype=dtype)
    rng = np.random.default_rng(seed)
    for name, array in params.items():
        if ".span." in name:
            params[name] = (1.5 * rng.standard_normal(array.shape)).astype(dtype)
    return config, params


def onnx_model(config, params, *, form="portable", **options):
    """The same on ONNX Runtime, in the dtype of the parameters."""
    dtype = str(params["embedding.weight"].dtype)
    return OnnxModel.of(streaming_model(config, params, form=form, dtype=dtype), **options)


def tokens_of(rng, config, batch, length):
    return rng.integers(0, config.vocab_size, (batch, length))
