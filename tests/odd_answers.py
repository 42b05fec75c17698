"""Backends whose numbers are right and whose other answers are odd, for `path/to/file.py:attribute`."""

import itertools
import os

import numpy as np

from refspan.conformance.backends.reference import NumpyBackend


class Parameters(NumpyBackend):
    """Starts training from what `change` makes of the right parameters."""

    def initial_parameters(self, config, seed):
        return self.change(super().initial_parameters(config, seed))


class NoSpanBias(Parameters):
    def change(self, params):
        return {name: array for name, array in params.items() if not name.endswith("span.bias")}


class Words(Parameters):
    def change(self, params):
        return {name: array.astype(str) for name, array in params.items()}


class Objects(Parameters):
    def change(self, params):
        return {name: array.astype(object) for name, array in params.items()}


class NotFinite(Parameters):
    def change(self, params):
        return params | {"output.weight": np.full_like(params["output.weight"], np.nan)}


class PositionsWithoutEnd(Parameters):
    """10^12 of them, which take no memory until somebody copies them."""

    def change(self, params):
        endless = np.broadcast_to(np.float32(0), (10**12, params["position.weight"].shape[1]))
        return params | {"position.weight": endless}


class WeightsWithoutEnd(Parameters):
    def change(self, params):
        return params | {"output.weight": np.broadcast_to(np.float32(0), (10**6, 10**6))}


class SpansNowhere(Parameters):
    """Biases of which the exponential is beyond all numbers."""

    def change(self, params):
        return {name: array - 1e6 if name.endswith("span.bias") else array for name, array in params.items()}


class Granularity(NumpyBackend):
    """Says so about its memory."""

    said = 4.0

    def facts(self):
        return {"memory_granularity": self.said}


class GranularityWord(Granularity):
    said = "abc"


class GranularityNone(Granularity):
    said = 0


class GranularityOfAll(Granularity):
    said = 10**9


class GranularityOfBlocks(Granularity):
    said = 64


class Odd:
    """A stream with another method."""

    def __init__(self, stream, **methods):
        self._stream, self._methods = stream, methods

    def __getattr__(self, name):
        return self._methods.get(name) or getattr(self._stream, name)


class Streams(NumpyBackend):
    """Streams have these methods."""

    methods = ()

    def open_model(self, config, params, *, batch, memory=None):
        return Odd(super().open_model(config, params, batch=batch, memory=memory), **dict(self.methods))


def sizes(value):
    return type("Sizes", (Streams,), {"methods": {"memory_size": lambda: value}})


def rows(value):
    return type("Rows", (Streams,), {"methods": {"rows_projected": lambda: value}})


SizesOfManyDigits = sizes([10**5000] * 9)
SizesInfinite = sizes([float("inf")])
SizesEndless = sizes(itertools.repeat(1 << 70))
SizesNegative = sizes([-1])
SizesWord = sizes("1")
SizesTrue = sizes([True])
SizesWithAPoint = sizes([2.0])
SizesNothing = sizes(None)
RowsWord = rows("many")
RowsList = rows([1])
RowsNothing = rows(None)
RowsHalf = rows(0.5)


class ResetSaysSomething(NumpyBackend):
    """That nobody asked for, and that cannot be sent to another process."""

    def open_model(self, config, params, *, batch, memory=None):
        stream = super().open_model(config, params, batch=batch, memory=memory)

        def reset(row):
            stream.reset(row)
            return lambda: row

        return Odd(stream, reset=reset)


class Forks(NumpyBackend):
    """Two processes answer."""

    def soft_mask(self, span, age, *, queries, ramp):
        os.fork()
        return super().soft_mask(span, age, queries=queries, ramp=ramp)


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class RaisesWithoutWords(NumpyBackend):
    def soft_mask(self, span, age, *, queries, ramp):
        raise Speechless


class Shapeless(np.ndarray):
    @property
    def shape(self):
        raise RuntimeError("not now")


class ReturnsShapeless(NumpyBackend):
    """An array whatever it says of itself."""

    def soft_mask(self, span, age, *, queries, ramp):
        return super().soft_mask(span, age, queries=queries, ramp=ramp).view(Shapeless)


class Restless(dict):
    def get(self, name, default=None):
        raise RuntimeError("not now")


class ReturnsRestless(NumpyBackend):
    """Fails where nobody expects it: when the answer is looked at."""

    def span_attention_backward(self, *arrays, **options):
        return Restless(super().span_attention_backward(*arrays, **options))


class ReturnsWhatSaysItFits(NumpyBackend):
    """One number, that says to be whatever shape and type is wanted."""

    def soft_mask(self, span, age, *, queries, ramp):
        class Fits(np.ndarray):
            shape = property(lambda _: (*span.shape[:1], queries, *span.shape[1:]))
            dtype = property(lambda _: span.dtype)

        return np.zeros(1, np.float64).view(Fits)


class EndlessFacts(NumpyBackend):
    def facts(self):
        return ((f"fact {i}", str(i)) for i in itertools.count())


class Named(NumpyBackend):
    """Would draw on the terminal, and speak for the checker."""

    name = "good\x1b[2J\nfake \ud800"
    dtypes = ("float32", "float\x1b[1m64")

    def facts(self):
        theirs = {"refspan": "9.9", "backend": "numpy", "dtype": "float99", "seed": 1, "examples": 1, "python": "4"}
        return {**theirs, "command": "rm", "\x1b[1m": "\udfff", **{str(i): "b" * 1000 for i in range(1000)}}
