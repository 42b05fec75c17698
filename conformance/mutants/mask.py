"""Wrong masks."""

import numpy as np

from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.registry import mutant


@mutant("mask.per_query", "attention.block_split", seen_in="lucidrains/learning-to-expire-pytorch")
class OneMaskPerBlock(Dense):
    """The mask of the block's first query serves them all."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, np.maximum(age, 1), queries, ramp)
        return np.where(self.past(self.distance(age, queries)), m[:, :1], 0).astype(m.dtype)


@mutant("mask.values", "attention.output", seen_in="lucidrains/learning-to-expire-pytorch")
class AgesFromPreviousBlock(Dense):
    """Ages counted from the end of the previous block, one too few."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age - 1, queries, ramp)
        return np.where(self.past(self.distance(age, queries)), m, 0).astype(m.dtype)


@mutant("mask.values", "gradient.span", seen_in="lucidrains/learning-to-expire-pytorch")
class RampSampledOncePerBlock(Dense):
    """The ramp is looked at once per block, later queries see 0 or 1 only."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        return np.concatenate([m[:, :1], np.round(m[:, 1:])], axis=1)


@mutant("mask.past", "attention.block_split", seen_in="lucidrains/learning-to-expire-pytorch")
class OwnBlockAlwaysLive(Dense):
    """Memories of the current block are forced to a mask of 1, however short their spans."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        own = (age <= 0)[:, None, :] & self.past(self.distance(age, queries))
        return np.where(own, 1, m).astype(m.dtype)


@mutant("mask.past", "attention.output", seen_in="lucidrains/learning-to-expire-pytorch")
class SeesItself(Dense):
    """A query attends to its own step."""

    def past(self, distance: Array) -> Array:
        return distance >= 0


@mutant("mask.past", "attention.output")
class SeesTheFuture(Dense):
    """No causal mask inside the block."""

    def past(self, distance: Array) -> Array:
        return np.ones_like(distance, dtype=bool)


@mutant("mask.wide", "attention.wide", seen_in="half-precision models")
class HalfPrecisionSpans(Dense):
    """Spans and ages in the dtype of a half-precision model, with steps of 16 at 16384."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        with np.errstate(all="ignore"):
            rounded = np.clip(span.astype(np.float16), 0, 60000).astype(span.dtype)
            aged = np.clip(age.astype(np.float16), -60000, 60000).astype(np.int64)
        m = super().mask(rounded, aged, queries, ramp)
        return np.where(self.past(self.distance(age, queries)), m, 0).astype(m.dtype)


@mutant("mask.wide", seen_in="half-precision models")
class BrainFloatSpans(Dense):
    """Spans in bfloat16, with steps of 128 at 16384."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        bits = span.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return super().mask(bits.view(np.float32).astype(span.dtype), age, queries, ramp)


@mutant("mask.values", "attention.output")
class HardMask(Dense):
    """Alive or not, no ramp."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        return (super().mask(span, age, queries, ramp) == 1).astype(span.dtype)


@mutant("mask.values", "attention.output")
class RampBeforeTheSpanEnds(Dense):
    """The ramp ends, rather than begins, where the span ends."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        return super().mask(span - span.dtype.type(ramp), age, queries, ramp)


@mutant("mask.values", "attention.output", seen_in="a port")
class SigmoidRamp(Dense):
    """A sigmoid in place of the linear ramp."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        distance = self.distance(age, queries)
        r = np.clip((span[:, None, :] - distance) / ramp, -1, 50).astype(np.float64)
        return np.where(self.past(distance) & (r > -1), 1 / (1 + np.exp(-4 * (r + 0.5))), 0).astype(span.dtype)


@mutant("mask.kinks", "attention.empty")
class NeverQuiteGone(Dense):
    """The mask is held above 1e-6, so that its logarithm stays finite."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        return np.where(self.past(self.distance(age, queries)), np.maximum(m, 1e-6), 0).astype(m.dtype)


@mutant("mask.values", "attention.output")
class IntegerRamp(Dense):
    """The ramp is truncated to whole steps."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        return super().mask(span, age, queries, max(int(ramp), 1))


@mutant("mask.values", "attention.batch_mates")
class SpansOfTheFirstRow(Dense):
    """The spans of batch row 0 serve all rows."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        return super().mask(np.broadcast_to(span[:1], span.shape), age, queries, ramp)
