"""Wrong gradients."""

from typing import Any

import numpy as np

from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.registry import mutant


@mutant("gradient.span", "gradient.directional")
class SpanGradientSign(Dense):
    """Spans are pushed the wrong way."""

    def grad_span(self, share: Array, a: Array, grad_a: Array, m: Array, ramp: float) -> Array:
        return -super().grad_span(share, a, grad_a, m, ramp)


@mutant("gradient.values")
class SpanGradientTurnsAtTheKink(Dense):
    """A memory whose span just ends is pushed the wrong way."""

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        right = super().sum_over_ramp(grad_mask, m, ramp)
        ended = np.where((m == 1) & (np.roll(m, -1, axis=1) < 1), grad_mask, 0)
        return right - np.sum(ended[:, :-1], axis=1) / ramp


@mutant("gradient.span")
class SpanGradientWithoutRamp(Dense):
    """1 / R is missing."""

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        return super().sum_over_ramp(grad_mask, m, 1.0)


@mutant("gradient.span")
class SpanGradientOfOneHead(Dense):
    """Only head 0 teaches the span."""

    def grad_span(self, share: Array, a: Array, grad_a: Array, m: Array, ramp: float) -> Array:
        return super().grad_span(share[:, :1], a[:, :1], grad_a[:, :1], m, ramp)


@mutant("gradient.span", "gradient.block_split")
class SpanGradientAveraged(Dense):
    """The mean over queries in place of the sum."""

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        return super().sum_over_ramp(grad_mask, m, ramp) / grad_mask.shape[1]


@mutant("gradient.values", "gradient.directional")
class NoNormalisationTerm(Dense):
    """The derivative of the normalisation is left out."""

    def grad_logits(self, a: Array, grad_a: Array) -> Array:
        return a * grad_a


@mutant("gradient.span")
class NoNormalisationTermInSpan(Dense):
    """The derivative of the normalisation is left out for the span alone."""

    def grad_span(self, share: Array, a: Array, grad_a: Array, m: Array, ramp: float) -> Array:
        return self.sum_over_ramp(np.sum(share * grad_a, axis=1), m[:, 0], ramp)


@mutant("gradient.position")
class NoPositionGradient(Dense):
    """Position embeddings never learn."""

    def grad_position(self, ds: Array, q: Array, p: Array, age: Array) -> Array:
        return np.zeros_like(p)


@mutant("gradient.position")
class PositionGradientOfOneRow(Dense):
    """Only batch row 0 teaches position embeddings."""

    def grad_position(self, ds: Array, q: Array, p: Array, age: Array) -> Array:
        return super().grad_position(ds[:1], q[:1], p, age[:1])


@mutant("gradient.position")
class NoPositionInQueryGradient(Dense):
    """The query's gradient forgets the position term."""

    def grad_query(self, ds: Array, k: Array, p: Array | None, age: Array, queries: int) -> Array:
        return super().grad_query(ds, k, None, age, queries)


@mutant("gradient.span", "gradient.values")
class SpanGradientOnThePlateau(Dense):
    """Clipping is ignored: full memories learn too."""

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        return np.sum(np.where(m > 0, grad_mask, 0), axis=1) / ramp


@mutant("gradient.values")
class SpanGradientOnlyWellIntoTheRamp(Dense):
    """A memory counts as full as long as its mask is above 1 - 1e-5."""

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        return np.sum(np.where((m > 0) & (m < 1 - 1e-5), grad_mask, 0), axis=1) / ramp


@mutant("gradient.values")
class SpanGradientFromDividedWeights(Dense):
    """a / (m + epsilon) in place of exp(s) / Z."""

    def grad_span(self, share: Array, a: Array, grad_a: Array, m: Array, ramp: float) -> Array:
        return super().grad_span(a / (m + 1e-2), a, grad_a, m, ramp)


@mutant("gradient.expired", "gradient.values")
class DeadValuesLearn(Dense):
    """Gradients of values use weights from before the mask."""

    def span_attention_backward(
        self,
        grad_out: Array,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        *,
        ramp: float,
        position: Array | None = None,
    ) -> dict[str, Array]:
        grads = super().span_attention_backward(grad_out, query, key, value, span, age, ramp=ramp, position=position)
        p = None if position is None else position.astype(np.float64)
        s = self.logits(query.astype(np.float64), key.astype(np.float64), p, age)
        a, _ = self.weights(s, np.ones_like(s))
        return {**grads, "value": np.einsum("bhmn,bhmd->bhnd", a, grad_out).astype(value.dtype)}


@mutant("gradient.slot_order")
class SpanGradientInAgeOrder(Dense):
    """Gradients of spans come back sorted by age, whatever the slots."""

    def span_attention_backward(
        self,
        grad_out: Array,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        *,
        ramp: float,
        position: Array | None = None,
    ) -> dict[str, Array]:
        grads = super().span_attention_backward(grad_out, query, key, value, span, age, ramp=ramp, position=position)
        order = np.argsort(-age, axis=1)
        return {**grads, "span": np.take_along_axis(grads["span"], order, axis=1)}


@mutant("gradient.batch_mates")
class SpanGradientMeanOverBatch(Dense):
    """Gradients of spans are divided by the batch size, as if the loss were known to be a mean."""

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        return super().sum_over_ramp(grad_mask, m, ramp) / len(m)


@mutant("gradient.large_logits")
class GradientFromLogsOfWeights(Dense):
    """exp(s) / Z from a / m with weights that have underflowed clipped at 1e-6."""

    def grad_logits(self, a: Array, grad_a: Array) -> Array:
        return super().grad_logits(np.maximum(a, 1e-6).astype(a.dtype), grad_a)


@mutant("gradient.repeated")
class KeepsTheFirstGradient(Dense):
    """Gradients are kept per shape."""

    def __init__(self) -> None:
        self.kept: dict[Any, Array] = {}

    def span_attention_backward(
        self, grad_out: Array, *arrays: Any, ramp: float, position: Array | None = None
    ) -> dict[str, Array]:
        grads = super().span_attention_backward(grad_out, *arrays, ramp=ramp, position=position)
        name = (*(x.shape for x in arrays), ramp, None if position is None else position.shape)
        return {n: x.copy() for n, x in self.kept.setdefault(name, grads).items()}
