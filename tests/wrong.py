"""A right backend written differently, and wrong ones: each a small, documented change of it.

`Dense` computes the whole step on full [B, H, M, N] arrays, one method per quantity, so that a mutant is one method
overridden. Where a flaw was found in a published implementation the docstring names it (FB: facebookresearch/
transformer-sequential, LR: lucidrains/learning-to-expire-pytorch, port: a smaller port of one of them).
"""

import math
import time

import numpy as np


class Dense:
    """Attention on full arrays in the dtype of query; right, wasteful, and independent of the reference."""

    name = "dense"

    def distance(self, age, queries):
        return age[:, None, :] + np.arange(queries)[:, None]  # [B, M, N]

    def past(self, distance):
        return distance >= 1

    def mask(self, span, age, queries, ramp):
        distance = self.distance(age, queries)
        soft = np.clip(1 + (span[:, None, :] - distance.astype(span.dtype)) / span.dtype.type(ramp), 0, 1)
        return np.where(self.past(distance), soft, 0).astype(span.dtype)  # [B, M, N]

    def soft_mask(self, span, age, *, queries, ramp):
        return self.mask(span, age, queries, ramp)

    def table(self, position, age, queries):
        """Position embedding of each memory for each query, 0 out of reach.   -> [B, M, N, D]."""
        row = self.distance(age, queries) - 1
        padded = np.concatenate([position, np.zeros_like(position[:1])])
        return padded[np.where((row >= 0) & (row < len(position)), row, len(position))]

    def logits(self, query, key, position, age):
        s = np.einsum("bhmd,bhnd->bhmn", query, key)
        if position is not None:
            s = s + np.einsum("bhmd,bmnd->bhmn", query, self.table(position, age, query.shape[2]))
        return s / math.sqrt(query.shape[-1])

    def weights(self, s, m):
        """-> normalised weights, and the same before the mask is multiplied in: exp(s) / Z."""
        s = np.where(m > 0, s, -np.inf)
        top = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
        e = np.exp(s - np.where(np.isfinite(top), top, 0))
        z = np.sum(m * e, axis=-1, keepdims=True)
        z = np.where(z > 0, z, 1)
        return m * e / z, e / z

    def everything(self, query, key, value, span, age, ramp, position):
        wide = np.result_type(query.dtype, np.float32)
        q, k, v = (x.astype(wide) for x in (query, key, value))
        p = None if position is None else position.astype(wide)
        m = self.mask(span, age, query.shape[2], ramp).astype(wide)[:, None]  # [B, 1, M, N]
        a, share = self.weights(self.logits(q, k, p, age), m)
        return q, k, v, p, m, a, share

    def output(self, a, v):
        return np.einsum("bhmn,bhnd->bhmd", a, v)

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        _, _, v, _, _, a, _ = self.everything(query, key, value, span, age, ramp, position)
        return self.output(a, v).astype(query.dtype)

    def grad_logits(self, a, grad_a):
        return a * (grad_a - np.sum(a * grad_a, axis=-1, keepdims=True))

    def grad_span(self, share, a, grad_a, m, ramp):
        grad_mask = np.sum(share * (grad_a - np.sum(a * grad_a, axis=-1, keepdims=True)), axis=1)  # [B, M, N]
        return self.sum_over_ramp(grad_mask, m[:, 0], ramp)

    def sum_over_ramp(self, grad_mask, m, ramp):
        return np.sum(np.where((m > 0) & (m < 1), grad_mask, 0), axis=1) / ramp

    def grad_query(self, ds, k, p, age, queries):
        dq = np.einsum("bhmn,bhnd->bhmd", ds, k)
        if p is not None:
            dq = dq + np.einsum("bhmn,bmnd->bhmd", ds, self.table(p, age, queries))
        return dq

    def grad_position(self, ds, q, p, age):
        row = self.distance(age, q.shape[2]) - 1
        hot = (row[..., None] == np.arange(len(p))).astype(q.dtype)
        return np.einsum("bhmn,bmnp,bhmd->pd", ds, hot, q)

    def span_attention_backward(self, grad_out, query, key, value, span, age, *, ramp, position=None):
        q, k, v, p, m, a, share = self.everything(query, key, value, span, age, ramp, position)
        g = grad_out.astype(q.dtype)
        grad_a = np.einsum("bhmd,bhnd->bhmn", g, v)
        ds = self.grad_logits(a, grad_a) / math.sqrt(q.shape[-1])
        grads = {
            "query": self.grad_query(ds, k, p, age, q.shape[2]),
            "key": np.einsum("bhmn,bhmd->bhnd", ds, q),
            "value": np.einsum("bhmn,bhmd->bhnd", a, g),
        }
        if p is not None:
            grads["position"] = self.grad_position(ds, q, p, age)
        grads = {name: x.astype(query.dtype) for name, x in grads.items()}
        return {**grads, "span": self.grad_span(share, a, grad_a, m, ramp).astype(span.dtype)}


class ClipsNegativeSpans(Dense):
    """Right: spans are >= 0 anyway."""

    def mask(self, span, age, queries, ramp):
        return super().mask(np.maximum(span, 0), age, queries, ramp)


class LearnsAtTheKinks(Dense):
    """Right: the derivative at a kink may be 1 / R as well as 0."""

    def span_attention_backward(self, grad_out, *arrays, ramp, position=None):
        with np.errstate(all="ignore"):  # exp(s) / Z of an expired memory may be anything
            return super().span_attention_backward(grad_out, *arrays, ramp=ramp, position=position)

    def sum_over_ramp(self, grad_mask, m, ramp):
        self.reached = np.where(self.seen, np.where(np.isfinite(grad_mask), grad_mask, 0), 0)
        return np.sum(self.reached, axis=1) / ramp

    def mask(self, span, age, queries, ramp):
        distance = self.distance(age, queries)
        slope = 1 + (span[:, None, :] - distance.astype(span.dtype)) / span.dtype.type(ramp)
        self.seen = (slope >= 0) & (slope <= 1) & self.past(distance)
        return super().mask(span, age, queries, ramp)

    def weights(self, s, m):
        a, _ = super().weights(s, m)
        live = np.where(m > 0, s, -np.inf)
        top = np.max(live, axis=-1, keepdims=True, initial=-np.inf)
        some = np.isfinite(top)
        with np.errstate(over="ignore"):
            e = np.exp(s - np.where(some, top, 0))
            z = np.sum(m * np.where(m > 0, e, 0), axis=-1, keepdims=True)
            return a, np.where(some, e / np.where(some, z, 1), 0)


MUTANTS = {}
"""Name -> (class, the checks that must reject it)."""


def mutant(*rejected_by):
    def register(cls):
        cls.name = cls.__name__
        MUTANTS[cls.__name__] = (cls, rejected_by)
        return cls

    return register


# --- mask -------------------------------------------------------------------------------------------------------------


@mutant("mask.per_query", "attention.block_split")
class OneMaskPerBlock(Dense):
    """LR (flaw 3): the mask of the block's first query serves them all."""

    def mask(self, span, age, queries, ramp):
        m = super().mask(span, np.maximum(age, 1), queries, ramp)
        return np.where(self.past(self.distance(age, queries)), m[:, :1], 0).astype(m.dtype)


@mutant("mask.values", "attention.output")
class AgesFromPreviousBlock(Dense):
    """LR (flaw 4): ages counted from the end of the previous block, one too few."""

    def mask(self, span, age, queries, ramp):
        m = super().mask(span, age - 1, queries, ramp)
        return np.where(self.past(self.distance(age, queries)), m, 0).astype(m.dtype)


@mutant("mask.values", "gradient.span")
class RampSampledOncePerBlock(Dense):
    """LR (flaw 5): the ramp is looked at once per block, later queries see 0 or 1 only."""

    def mask(self, span, age, queries, ramp):
        m = super().mask(span, age, queries, ramp)
        return np.concatenate([m[:, :1], np.round(m[:, 1:])], axis=1)


@mutant("mask.past", "attention.block_split")
class OwnBlockAlwaysLive(Dense):
    """LR (flaw 17): memories of the current block are forced to a mask of 1, however short their spans."""

    def mask(self, span, age, queries, ramp):
        m = super().mask(span, age, queries, ramp)
        own = (age <= 0)[:, None, :] & self.past(self.distance(age, queries))
        return np.where(own, 1, m).astype(m.dtype)


@mutant("mask.past", "attention.output")
class SeesItself(Dense):
    """LR (flaw 16): a query attends to its own step."""

    def past(self, distance):
        return distance >= 0


@mutant("mask.past", "attention.output")
class SeesTheFuture(Dense):
    """No causal mask inside the block."""

    def past(self, distance):
        return np.ones_like(distance, dtype=bool)


@mutant("mask.wide", "attention.wide")
class HalfPrecisionSpans(Dense):
    """Flaw 23: spans and ages in the dtype of a half-precision model, with steps of 16 at 16384."""

    def mask(self, span, age, queries, ramp):
        with np.errstate(all="ignore"):
            rounded = np.clip(span.astype(np.float16), 0, 60000).astype(span.dtype)
            aged = np.clip(age.astype(np.float16), -60000, 60000).astype(np.int64)
        m = super().mask(rounded, aged, queries, ramp)
        return np.where(self.past(self.distance(age, queries)), m, 0).astype(m.dtype)


@mutant("mask.wide")
class BrainFloatSpans(Dense):
    """Flaw 23: spans in bfloat16, with steps of 128 at 16384."""

    def mask(self, span, age, queries, ramp):
        bits = span.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return super().mask(bits.view(np.float32).astype(span.dtype), age, queries, ramp)


@mutant("mask.values", "attention.output")
class HardMask(Dense):
    """Alive or not, no ramp."""

    def mask(self, span, age, queries, ramp):
        return (super().mask(span, age, queries, ramp) == 1).astype(span.dtype)


@mutant("mask.values", "attention.output")
class RampBeforeTheSpanEnds(Dense):
    """The ramp ends, rather than begins, where the span ends."""

    def mask(self, span, age, queries, ramp):
        return super().mask(span - span.dtype.type(ramp), age, queries, ramp)


@mutant("mask.values", "attention.output")
class SigmoidRamp(Dense):
    """A port: a sigmoid in place of the linear ramp."""

    def mask(self, span, age, queries, ramp):
        distance = self.distance(age, queries)
        r = np.clip((span[:, None, :] - distance) / ramp, -1, 50).astype(np.float64)
        return np.where(self.past(distance) & (r > -1), 1 / (1 + np.exp(-4 * (r + 0.5))), 0).astype(span.dtype)


@mutant("mask.kinks", "attention.empty")
class NeverQuiteGone(Dense):
    """The mask is held above 1e-6, so that its logarithm stays finite."""

    def mask(self, span, age, queries, ramp):
        m = super().mask(span, age, queries, ramp)
        return np.where(self.past(self.distance(age, queries)), np.maximum(m, 1e-6), 0).astype(m.dtype)


@mutant("mask.values", "attention.output")
class IntegerRamp(Dense):
    """The ramp is truncated to whole steps."""

    def mask(self, span, age, queries, ramp):
        return super().mask(span, age, queries, max(int(ramp), 1))


@mutant("mask.values", "attention.batch_mates")
class SpansOfTheFirstRow(Dense):
    """The spans of batch row 0 serve all rows."""

    def mask(self, span, age, queries, ramp):
        return super().mask(np.broadcast_to(span[:1], span.shape), age, queries, ramp)


# --- weights and logits -----------------------------------------------------------------------------------------------


@mutant("attention.weights")
class NotRenormalised(Dense):
    """LR (flaw 1): weights are multiplied by the mask after the softmax, and left so."""

    def weights(self, s, m):
        top = np.max(np.where(m >= 0, s, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        with np.errstate(invalid="ignore"):
            e = np.exp(s - top)
        z = np.maximum(np.sum(e, axis=-1, keepdims=True), 1e-30)
        return m * e / z, e / z


@mutant("attention.faint")
class FloorUnderTheLogarithm(Dense):
    """softmax(s + log m) with m held above 2e-7 where it is not 0."""

    def weights(self, s, m):
        return super().weights(s, np.where(m > 0, np.maximum(m, m.dtype.type(2e-7)), 0))


@mutant("attention.lone_survivor")
class Epsilon(Dense):
    """FB (flaw 2): 1e-8 in the denominator."""

    def weights(self, s, m):
        s = np.where(m > 0, s, -np.inf)
        top = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
        e = np.exp(s - np.where(np.isfinite(top), top, 0))
        z = np.sum(m * e, axis=-1, keepdims=True) + 1e-8
        return m * e / z, e / z


@mutant("attention.batch_mates")
class KeepsWhatTheBatchNeeds(Dense):
    """LR (flaw 6): a memory counts in the softmax as long as any row of the batch has not expired it."""

    def weights(self, s, m):
        kept = np.where(np.any(m > 0, axis=0, keepdims=True), np.maximum(m, 0.25), m)
        return super().weights(s, np.broadcast_to(kept, m.shape).astype(m.dtype))


@mutant("attention.output", "attention.weights")
class MasksFeatures(Dense):
    """A navigation port (flaw 19): the mask multiplies features, not weights."""

    def everything(self, query, key, value, span, age, ramp, position):
        q, k, v, p, m, _, _ = super().everything(query, key, value, span, age, ramp, position)
        a, share = self.weights(self.logits(q, k, p, age), (m > 0).astype(m.dtype))
        return q, k, v, p, m, a * m, share


@mutant("attention.empty", "gradient.empty")
class NanWhenEmpty(Dense):
    """FB (flaw 20): a row with no live memory is a softmax over -inf."""

    def weights(self, s, m):
        with np.errstate(invalid="ignore", divide="ignore"):
            s = np.where(m > 0, s, -np.inf)
            e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf))
            z = np.sum(m * e, axis=-1, keepdims=True)
            return m * e / z, e / z


@mutant("attention.empty")
class MeanWhenEmpty(Dense):
    """Some GPU kernels (flaw 20): a large negative number in place of -inf gives the mean of all values."""

    def weights(self, s, m):
        s = s + np.where(m > 0, np.log(np.where(m > 0, m, 1)), -1e30).astype(s.dtype)
        e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf))
        a = e / np.maximum(np.sum(e, axis=-1, keepdims=True), 1e-30)
        return a, np.where(m > 0, a / np.where(m > 0, m, 1), 0)


@mutant("attention.expired_logit")
class FiniteMask(Dense):
    """-10000 in place of -inf: a logit of more than that gets through."""

    def weights(self, s, m):
        s = s + np.where(m > 0, np.log(np.where(m > 0, m, 1)), -1e4).astype(s.dtype)
        live = np.any(m > 0, axis=-1, keepdims=True)
        e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf)) * live
        z = np.sum(e, axis=-1, keepdims=True)
        a = e / np.where(z > 0, z, 1)
        return a, np.where(m > 0, a / np.where(m > 0, m, 1), 0)


@mutant("attention.expired_logit")
class PeakOfTheDead(Dense):
    """The largest logit is taken over expired memories too, so that live weights underflow."""

    def weights(self, s, m):
        e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf))
        z = np.sum(m * e, axis=-1, keepdims=True)
        z = np.where(z > 0, z, 1)
        return m * e / z, e / z


@mutant("attention.large_logits")
class NoPeak(Dense):
    """Nothing is subtracted before the exponential."""

    def weights(self, s, m):
        with np.errstate(over="ignore", invalid="ignore"):
            e = np.exp(s)
            z = np.sum(m * e, axis=-1, keepdims=True)
            z = np.where(z > 0, z, 1)
            return m * e / z, e / z


@mutant("attention.output")
class MaskSquared(Dense):
    """The mask enters the weights twice."""

    def weights(self, s, m):
        return super().weights(s, m * m)


@mutant("attention.output")
class NoScale(Dense):
    """Logits are not divided by sqrt(D)."""

    def logits(self, query, key, position, age):
        return super().logits(query, key, position, age) * math.sqrt(query.shape[-1])


@mutant("attention.position")
class PositionNotScaled(Dense):
    """The position term is added after the division by sqrt(D)."""

    def logits(self, query, key, position, age):
        s = super().logits(query, key, None, age)
        if position is None:
            return s
        return s + np.einsum("bhmd,bmnd->bhmn", query, self.table(position, age, query.shape[2]))


@mutant("attention.position")
class PositionOffByOne(Dense):
    """Row j of the position embedding is taken for distance j."""

    def table(self, position, age, queries):
        return super().table(position, age + 1, queries)


@mutant("attention.position", "attention.slot_order")
class PositionBySlot(Dense):
    """Positions go by slot, counted from the newest, as if memories had no gaps."""

    def table(self, position, age, queries):
        memories = age.shape[1]
        slots = np.arange(memories, 0, -1) - 1 + age[:, -1:]
        return super().table(position, slots, queries)


@mutant("attention.position")
class FarthestPositionForAll(Dense):
    """Memories farther than P get the embedding of distance P."""

    def table(self, position, age, queries):
        row = np.clip(self.distance(age, queries) - 1, 0, len(position) - 1)
        return position[row]


@mutant("attention.output")
class HeadsMixed(Dense):
    """Values of the heads are read in reverse order."""

    def output(self, a, v):
        return super().output(a, v[:, ::-1])


@mutant("attention.mask_scale", "attention.output")
class MaskTimesLogits(Dense):
    """The mask multiplies logits, not their exponentials."""

    def weights(self, s, m):
        _, share = super().weights(s * m, m)
        hard, _ = super().weights(s * m, (m > 0).astype(m.dtype))
        return hard, share


@mutant("attention.mask_scale")
class MaskWithFloor(Dense):
    """Normalised weights are scaled by the strongest mask, so that a faint past stays faint."""

    def weights(self, s, m):
        a, share = super().weights(s, m)
        some = np.max(m, axis=-1, keepdims=True, initial=0)
        return a * some, share * some


@mutant("attention.expired_contents", "attention.weights")
class DeadKeepTheirShare(Dense):
    """LR (flaw 6): expired memories that are still stored keep their part of the softmax."""

    def weights(self, s, m):
        past = np.broadcast_to(m >= 0, s.shape)
        a, share = super().weights(s, past.astype(m.dtype))
        return a * m, share


@mutant("attention.tiles")
class AgesRestartEverySixteenQueries(Dense):
    """Each tile of 16 queries believes itself the first."""

    def distance(self, age, queries):
        return age[:, None, :] + np.arange(queries)[:, None] % 16


@mutant("attention.tiles", "gradient.tiles")
class TilesOfMemoriesNotRescaled(Dense):
    """Each tile of 128 memories subtracts its own peak, and sums are added up all the same."""

    def weights(self, s, m):
        s = np.where(m > 0, s, -np.inf)
        e = np.zeros_like(s)
        for first in range(0, s.shape[-1], 128):
            part = s[..., first : first + 128]
            top = np.max(part, axis=-1, keepdims=True, initial=-np.inf)
            e[..., first : first + 128] = np.exp(part - np.where(np.isfinite(top), top, 0))
        z = np.sum(m * e, axis=-1, keepdims=True)
        z = np.where(z > 0, z, 1)
        return m * e / z, e / z


@mutant("attention.tiles")
class FirstEightHeads(Dense):
    """Heads beyond the eighth are never computed."""

    def output(self, a, v):
        return super().output(a, v) * (np.arange(a.shape[1]) < 8)[:, None, None]


@mutant("attention.tiles")
class ShortTableOfPositions(Dense):
    """Positions beyond 64 do not fit into the table."""

    def table(self, position, age, queries):
        return super().table(position[:64], age, queries)


@mutant("mask.wide", "attention.wide")
class AgesIn32Bits(Dense):
    """Ages wrap around in int32."""

    def distance(self, age, queries):
        return super().distance(age.astype(np.int32).astype(np.int64), queries)


@mutant("attention.position")
class PositionsIn16Bits(Dense):
    """Distances for the position table wrap around in 16 bits."""

    def table(self, position, age, queries):
        return super().table(position, age % 2**16, queries)


# --- gradients --------------------------------------------------------------------------------------------------------


@mutant("gradient.span", "gradient.directional")
class SpanGradientSign(Dense):
    """Spans are pushed the wrong way."""

    def grad_span(self, share, a, grad_a, m, ramp):
        return -super().grad_span(share, a, grad_a, m, ramp)


@mutant("gradient.values")
class SpanGradientTurnsAtTheKink(Dense):
    """A memory whose span just ends is pushed the wrong way."""

    def sum_over_ramp(self, grad_mask, m, ramp):
        right = super().sum_over_ramp(grad_mask, m, ramp)
        ended = np.where((m == 1) & (np.roll(m, -1, axis=1) < 1), grad_mask, 0)
        return right - np.sum(ended[:, :-1], axis=1) / ramp


@mutant("gradient.span")
class SpanGradientWithoutRamp(Dense):
    """1 / R is missing."""

    def sum_over_ramp(self, grad_mask, m, ramp):
        return super().sum_over_ramp(grad_mask, m, 1.0)


@mutant("gradient.span")
class SpanGradientOfOneHead(Dense):
    """Only head 0 teaches the span."""

    def grad_span(self, share, a, grad_a, m, ramp):
        return super().grad_span(share[:, :1], a[:, :1], grad_a[:, :1], m, ramp)


@mutant("gradient.span", "gradient.block_split")
class SpanGradientAveraged(Dense):
    """The mean over queries in place of the sum."""

    def sum_over_ramp(self, grad_mask, m, ramp):
        return super().sum_over_ramp(grad_mask, m, ramp) / grad_mask.shape[1]


@mutant("gradient.values", "gradient.directional")
class NoNormalisationTerm(Dense):
    """The derivative of the normalisation is left out."""

    def grad_logits(self, a, grad_a):
        return a * grad_a


@mutant("gradient.span")
class NoNormalisationTermInSpan(Dense):
    """The derivative of the normalisation is left out for the span alone."""

    def grad_span(self, share, a, grad_a, m, ramp):
        return self.sum_over_ramp(np.sum(share * grad_a, axis=1), m[:, 0], ramp)


@mutant("gradient.position")
class NoPositionGradient(Dense):
    """Position embeddings never learn."""

    def grad_position(self, ds, q, p, age):
        return np.zeros_like(p)


@mutant("gradient.position")
class PositionGradientOfOneRow(Dense):
    """Only batch row 0 teaches position embeddings."""

    def grad_position(self, ds, q, p, age):
        return super().grad_position(ds[:1], q[:1], p, age[:1])


@mutant("gradient.position")
class NoPositionInQueryGradient(Dense):
    """The query's gradient forgets the position term."""

    def grad_query(self, ds, k, p, age, queries):
        return super().grad_query(ds, k, None, age, queries)


@mutant("gradient.span", "gradient.values")
class SpanGradientOnThePlateau(Dense):
    """Clipping is ignored: full memories learn too."""

    def sum_over_ramp(self, grad_mask, m, ramp):
        return np.sum(np.where(m > 0, grad_mask, 0), axis=1) / ramp


@mutant("gradient.values")
class SpanGradientOnlyWellIntoTheRamp(Dense):
    """A memory counts as full as long as its mask is above 1 - 1e-5."""

    def sum_over_ramp(self, grad_mask, m, ramp):
        return np.sum(np.where((m > 0) & (m < 1 - 1e-5), grad_mask, 0), axis=1) / ramp


@mutant("gradient.values")
class SpanGradientFromDividedWeights(Dense):
    """a / (m + epsilon) in place of exp(s) / Z."""

    def grad_span(self, share, a, grad_a, m, ramp):
        return super().grad_span(a / (m + 1e-2), a, grad_a, m, ramp)


@mutant("gradient.expired", "gradient.values")
class DeadValuesLearn(Dense):
    """Gradients of values use weights from before the mask."""

    def span_attention_backward(self, grad_out, query, key, value, span, age, *, ramp, position=None):
        grads = super().span_attention_backward(grad_out, query, key, value, span, age, ramp=ramp, position=position)
        p = None if position is None else position.astype(np.float64)
        s = self.logits(query.astype(np.float64), key.astype(np.float64), p, age)
        a, _ = self.weights(s, np.ones_like(s))
        return {**grads, "value": np.einsum("bhmn,bhmd->bhnd", a, grad_out).astype(value.dtype)}


@mutant("gradient.slot_order")
class SpanGradientInAgeOrder(Dense):
    """Gradients of spans come back sorted by age, whatever the slots."""

    def span_attention_backward(self, grad_out, query, key, value, span, age, *, ramp, position=None):
        grads = super().span_attention_backward(grad_out, query, key, value, span, age, ramp=ramp, position=position)
        order = np.argsort(-age, axis=1)
        return {**grads, "span": np.take_along_axis(grads["span"], order, axis=1)}


@mutant("gradient.batch_mates")
class SpanGradientMeanOverBatch(Dense):
    """Gradients of spans are divided by the batch size, as if the loss were known to be a mean."""

    def sum_over_ramp(self, grad_mask, m, ramp):
        return super().sum_over_ramp(grad_mask, m, ramp) / len(m)


@mutant("gradient.large_logits")
class GradientFromLogsOfWeights(Dense):
    """exp(s) / Z from a / m with weights that have underflowed clipped at 1e-6."""

    def grad_logits(self, a, grad_a):
        return super().grad_logits(np.maximum(a, 1e-6).astype(a.dtype), grad_a)


@mutant("gradient.repeated")
class KeepsTheFirstGradient(Dense):
    """Gradients are kept per shape."""

    def __init__(self):
        self.kept = {}

    def span_attention_backward(self, grad_out, *arrays, ramp, position=None):
        grads = super().span_attention_backward(grad_out, *arrays, ramp=ramp, position=position)
        name = (*(x.shape for x in arrays), ramp, None if position is None else position.shape)
        return {n: x.copy() for n, x in self.kept.setdefault(name, grads).items()}


# --- behaviour --------------------------------------------------------------------------------------------------------


@mutant("mask.repeated", "attention.repeated")
class CachesByShape(Dense):
    """The first answer for a shape serves all later questions of that shape."""

    def __init__(self):
        self.masks, self.outputs = {}, {}

    def soft_mask(self, span, age, *, queries, ramp):
        found = self.masks.setdefault(
            (span.shape, queries, ramp), super().soft_mask(span, age, queries=queries, ramp=ramp)
        )
        return found.copy()

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        name = (query.shape, key.shape, ramp)
        out = super().span_attention(query, key, value, span, age, ramp=ramp, position=position)
        return self.outputs.setdefault(name, out).copy()


@mutant("attention.repeated")
class CachesByAddress(Dense):
    """The answer is kept per array object, as if arrays never changed."""

    def __init__(self):
        self.kept = {}

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        name = (query.ctypes.data, key.ctypes.data, value.ctypes.data, query.shape)
        if name not in self.kept:
            self.kept = {name: super().span_attention(query, key, value, span, age, ramp=ramp, position=position)}
        return self.kept[name].copy()


@mutant("attention.position")
class GivesUp(Dense):
    """Declares what it cannot do unfinished, in the middle of the work."""

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        if position is not None:
            raise NotImplementedError("positions")
        return super().span_attention(query, key, value, span, age, ramp=ramp)


@mutant("gradient.values")
class InfiniteTimesZero(Dense):
    """Gradients of spans beyond the ramp are 0 times infinity."""

    def sum_over_ramp(self, grad_mask, m, ramp):
        with np.errstate(invalid="ignore"):
            return np.sum(np.where(m > 0, grad_mask, np.inf) * ((m > 0) & (m < 1)), axis=1) / ramp


@mutant("mask.values")
class ScalesInPlace(Dense):
    """Writes into its argument."""

    def soft_mask(self, span, age, *, queries, ramp):
        span *= 1
        return super().soft_mask(span, age, queries=queries, ramp=ramp)


@mutant("attention.output")
class ForcesWriting(Dense):
    """Makes its argument writeable, and changes it."""

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        out = super().span_attention(query, key, value, span, age, ramp=ramp, position=position)
        query.flags.writeable = True
        query *= 2
        return out


@mutant("mask.values")
class WrongDtype(Dense):
    """Always float64."""

    def soft_mask(self, span, age, *, queries, ramp):
        return super().soft_mask(span, age, queries=queries, ramp=ramp).astype(np.float64)


@mutant("attention.output")
class WrongShape(Dense):
    """[B, M, H, D]."""

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        out = super().span_attention(query, key, value, span, age, ramp=ramp, position=position)
        return np.ascontiguousarray(np.swapaxes(out, 1, 2))


@mutant("gradient.values")
class ForgetsASpan(Dense):
    """No gradient of span at all."""

    def span_attention_backward(self, grad_out, *arrays, ramp, position=None):
        grads = super().span_attention_backward(grad_out, *arrays, ramp=ramp, position=position)
        del grads["span"]
        return grads


@mutant("attention.output")
class Raises(Dense):
    """Cannot do N = 0."""

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        if key.shape[2] == 0:
            raise IndexError("no memory")
        return super().span_attention(query, key, value, span, age, ramp=ramp, position=position)


@mutant("mask.values")
class Hangs(Dense):
    """Never comes back, when asked for more than one memory."""

    def soft_mask(self, span, age, *, queries, ramp):
        if span.shape[1] > 1:
            time.sleep(3600)
        return super().soft_mask(span, age, queries=queries, ramp=ramp)


@mutant("attention.output")
class Random(Dense):
    """Answers a little differently each time."""

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        out = super().span_attention(query, key, value, span, age, ramp=ramp, position=position)
        return out * (1 + np.random.default_rng().normal(0, 1e-3, out.shape)).astype(out.dtype)
