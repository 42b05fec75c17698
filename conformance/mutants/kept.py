"""Backends that keep what they should make anew: parameters of another call, scratch, the memory of results."""

import time
from typing import Any

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.backends.reference import NumpyBackend
from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.plain import Initial, Parameters, Plain, PlainStream
from refspan.conformance.mutants.registry import mutant


@mutant("training.moved")
class WeightsOfTheFirstBlock(NumpyBackend):
    """Blocks of training that follow each other have the parameters of the first, as in a graph that holds them."""

    def loss_and_gradients(
        self, config: ModelConfig, params: Any, tokens: Array, targets: Array, memory: Any, **options: Any
    ) -> Any:
        if memory is not None:
            memory, params = memory
        losses, grads, after = super().loss_and_gradients(config, params, tokens, targets, memory, **options)
        return losses, grads, (after, {name: x.copy() for name, x in params.items()})


class _Compiles:
    """Keeps the parameters of the last model, for all that look like it."""

    last: Any = None

    def compiled(self, config: ModelConfig, params: Parameters) -> Parameters:
        kind = config, {name: (x.shape, x.dtype) for name, x in params.items()}
        if self.last is None or self.last[0] != kind:
            self.last = kind, {name: x.copy() for name, x in params.items()}
        kept: Parameters = self.last[1]
        return kept


@mutant("training.moved")
class TrainsTheWeightsOfTheLastModel(_Compiles, NumpyBackend):
    """What was compiled for a model is used as long as configuration and shapes are the same, parameters and all."""

    def loss_and_gradients(self, config: ModelConfig, params: Any, *arguments: Any, **options: Any) -> Any:
        return super().loss_and_gradients(config, self.compiled(config, params), *arguments, **options)


@mutant("memory.models_alike")
class OpensTheLastModel(_Compiles, Plain):
    """What was compiled for a model is used as long as configuration and shapes are the same, parameters and all."""

    def open_model(self, config: ModelConfig, params: Parameters, *, batch: int, memory: Initial = None) -> PlainStream:
        return super().open_model(config, self.compiled(config, params), batch=batch, memory=memory)


class _Buffers:
    def __init__(self) -> None:
        self.buffers: dict[Any, Array] = {}

    def put(self, name: str, x: Array) -> Array:
        buffer = self.buffers.setdefault((name, x.shape, str(x.dtype)), np.empty_like(x))
        buffer[...] = x
        return buffer


@mutant("mask.repeated", "attention.repeated", "gradient.repeated")
class ResultsInOneBuffer(Dense):
    """Results of one shape are all written to the same place, also where the caller still has them."""

    thread_safe = False

    def __init__(self) -> None:
        self.results = _Buffers()

    def soft_mask(self, *arrays: Any, **options: Any) -> Array:
        return self.results.put("mask", super().soft_mask(*arrays, **options))

    def span_attention(self, *arrays: Any, **options: Any) -> Array:
        return self.results.put("output", super().span_attention(*arrays, **options))

    def span_attention_backward(self, *arrays: Any, **options: Any) -> dict[str, Array]:
        grads = super().span_attention_backward(*arrays, **options)
        return {name: self.results.put(name, x) for name, x in grads.items()}


@mutant("training.gradients", "training.again")
class GradientsInOneBuffer(NumpyBackend):
    """Gradients of one block of training are written over those of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.results = _Buffers()

    def loss_and_gradients(self, *arguments: Any, **options: Any) -> Any:
        losses, grads, memory = super().loss_and_gradients(*arguments, **options)
        return losses, {name: self.results.put(name, np.asarray(x)) for name, x in grads.items()}, memory


class _ReadsFromTheBackend(PlainStream):
    def read(self, b: int, tokens: Array) -> Array:
        self.rules.shared[len(tokens)] = tokens
        time.sleep(1e-3)
        return super().read(b, self.rules.shared[len(tokens)] % self.config.vocab_size)


@mutant("memory.threads", stream=_ReadsFromTheBackend)
class StreamsReadFromOneBuffer(Plain):
    """The tokens that a stream reads are in a buffer of the backend, where another thread's stream finds them."""


@mutant("training.threads")
class LearnsFromOneBuffer(NumpyBackend):
    """The block that is learnt from is in a buffer of the backend, where another thread finds it."""

    def loss_and_gradients(
        self, config: ModelConfig, params: Any, tokens: Array, targets: Array, memory: Any, **options: Any
    ) -> Any:
        self.kept = tokens, targets
        time.sleep(1e-3)
        return super().loss_and_gradients(config, params, *self.kept, memory, **options)


class _CountsAnew(PlainStream):
    def state(self) -> Any:
        return super().state(), self.projected

    def restore(self, state: Any) -> None:
        rows, self.projected = state
        super().restore(rows)


@mutant("memory.projected_once", stream=_CountsAnew)
class RestoresTheCount(Plain):
    """A restore brings back how many memories had been projected, too."""


class _Recognises:
    """Keeps the parameters of each model, and finds them again by what `key` says of them."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[Any, Any] = {}

    def key(self, params: Parameters) -> Any:
        return params["output.weight"].tobytes()

    def found(self, config: ModelConfig, params: Parameters) -> Parameters:
        key = config, self.key(params)
        if key not in self.known:
            self.known[key] = {name: x.copy() for name, x in params.items()}, params  # which so keep their identity
        found: Parameters = self.known[key][0]
        return found


@mutant("memory.models_alike")
class ModelsAreKnownByTheirOutput(_Recognises, Plain):
    """What was compiled for a model is used for all with the same output weights, as if no others were ever tuned."""

    def open_model(self, config: ModelConfig, params: Parameters, *, batch: int, memory: Initial = None) -> PlainStream:
        return super().open_model(config, self.found(config, params), batch=batch, memory=memory)


@mutant("training.moved")
class ParametersAreKnownByTheirOutput(_Recognises, NumpyBackend):
    """What was compiled for parameters is used for all with the same output weights."""

    def loss_and_gradients(self, config: ModelConfig, params: Any, *arguments: Any, **options: Any) -> Any:
        return super().loss_and_gradients(config, self.found(config, params), *arguments, **options)


@mutant("training.moved")
class ParametersAreKnownByIdentity(ParametersAreKnownByTheirOutput):
    """Arrays that were there before are taken to hold what they held, which an optimiser may have written over."""

    def key(self, params: Parameters) -> Any:
        return tuple(id(x) for x in params.values())


class _Prefix(PlainStream):
    def step(self, tokens: Array) -> Array:
        content = tuple(x.tobytes() for x in self.params.values())
        self.read_so_far = (*getattr(self, "read_so_far", ()), tokens.tobytes())
        log_probs = super().step(tokens)
        return np.array(self.rules.shared.setdefault((self.config, content, self.read_so_far), log_probs))


@mutant("memory.models_alike", stream=_Prefix)
class PrefixesAreKnown(Plain):
    """What a model has said after the same tokens is said again, whatever memories the stream was opened with."""
