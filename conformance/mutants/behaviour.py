"""Backends that misbehave."""

import time
from typing import Any

import numpy as np

from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.registry import mutant


@mutant("mask.repeated", "attention.repeated")
class CachesByShape(Dense):
    """The first answer for a shape serves all later questions of that shape."""

    def __init__(self) -> None:
        self.masks: dict[Any, Any] = {}
        self.outputs: dict[Any, Any] = {}

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        found: Any = super().soft_mask(span, age, queries=queries, ramp=ramp)
        return self.masks.setdefault((span.shape, queries, ramp), found).copy()

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        query, key, *_ = arrays
        name = (query.shape, key.shape, ramp)
        out = super().span_attention(*arrays, ramp=ramp, position=position)
        kept: Any = self.outputs.setdefault(name, out)
        return kept.copy()


@mutant("attention.output")
class FirstCallForNothing(Dense):
    """The first attention step comes to nothing, as if what it needs were still being made."""

    called = False

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        out = super().span_attention(*arrays, ramp=ramp, position=position)
        first, self.called = not self.called, True
        return np.zeros_like(out) if first else out


@mutant("attention.repeated")
class CachesByAddress(Dense):
    """The answer is kept per array object, as if arrays never changed."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        query, key, value, *_ = arrays
        name = (query.ctypes.data, key.ctypes.data, value.ctypes.data, query.shape)
        if name not in self.kept:
            self.kept = {name: super().span_attention(*arrays, ramp=ramp, position=position)}
        return self.kept[name].copy()


@mutant("attention.position")
class GivesUp(Dense):
    """Declares what it cannot do unfinished, in the middle of the work."""

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        if position is not None:
            raise NotImplementedError("positions")
        return super().span_attention(*arrays, ramp=ramp)


@mutant("gradient.values")
class InfiniteTimesZero(Dense):
    """Gradients of spans beyond the ramp are 0 times infinity."""

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        with np.errstate(invalid="ignore"):
            return np.sum(np.where(m > 0, grad_mask, np.inf) * ((m > 0) & (m < 1)), axis=1) / ramp


@mutant("mask.values")
class ScalesInPlace(Dense):
    """Writes into its argument."""

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        span *= 1
        return super().soft_mask(span, age, queries=queries, ramp=ramp)


@mutant("attention.output")
class ForcesWriting(Dense):
    """Makes its argument writeable, and changes it."""

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        query, *_ = arrays
        out = super().span_attention(*arrays, ramp=ramp, position=position)
        query.flags.writeable = True
        query *= 2
        return out


@mutant("mask.values")
class WrongDtype(Dense):
    """Always float64."""

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        return super().soft_mask(span, age, queries=queries, ramp=ramp).astype(np.float64)


@mutant("attention.output")
class WrongShape(Dense):
    """[B, M, H, D]."""

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        out = super().span_attention(*arrays, ramp=ramp, position=position)
        return np.ascontiguousarray(np.swapaxes(out, 1, 2))


@mutant("gradient.values")
class ForgetsASpan(Dense):
    """No gradient of span at all."""

    def span_attention_backward(
        self, grad_out: Array, *arrays: Any, ramp: float, position: Array | None = None
    ) -> dict[str, Array]:
        grads = super().span_attention_backward(grad_out, *arrays, ramp=ramp, position=position)
        del grads["span"]
        return grads


@mutant("attention.output")
class Raises(Dense):
    """Cannot do N = 0."""

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        _, key, *_ = arrays
        if key.shape[2] == 0:
            raise IndexError("no memory")
        return super().span_attention(*arrays, ramp=ramp, position=position)


@mutant("mask.values", hangs=True)
class Hangs(Dense):
    """Never comes back, when asked for more than one memory."""

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        if span.shape[1] > 1:
            time.sleep(3600)
        return super().soft_mask(span, age, queries=queries, ramp=ramp)


@mutant("attention.output")
class Random(Dense):
    """Answers a little differently each time."""

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        out = super().span_attention(*arrays, ramp=ramp, position=position)
        return out * (1 + np.random.default_rng().normal(0, 1e-3, out.shape)).astype(out.dtype)


@mutant("attention.threads")
class KeepsItsArgumentsInItself(Dense):
    """What a call works on is kept in the backend, where another thread's call finds it."""

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        self.kept = arrays
        time.sleep(1e-3)
        return super().span_attention(*self.kept, ramp=ramp, position=position)


@mutant("mask.threads")
class KeepsTheSpansInItself(Dense):
    """Likewise, of masks alone."""

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        self.kept = span, age, queries, ramp
        time.sleep(1e-3)
        return self.mask(*self.kept)


@mutant("gradient.threads")
class KeepsTheForwardPassInItself(Dense):
    """Likewise, of gradients alone: what forward has left for backward."""

    def span_attention_backward(
        self, grad_out: Array, *arrays: Any, ramp: float, position: Array | None = None
    ) -> dict[str, Array]:
        self.kept = arrays
        time.sleep(1e-3)
        return super().span_attention_backward(grad_out, *self.kept, ramp=ramp, position=position)
