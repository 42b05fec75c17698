"""Wrong weights and logits, and arithmetic that breaks."""

import math
from typing import Any

import numpy as np

from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.registry import mutant


@mutant("attention.weights", seen_in="lucidrains/learning-to-expire-pytorch")
class NotRenormalised(Dense):
    """Weights are multiplied by the mask after the softmax, and left so."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        top = np.max(np.where(m >= 0, s, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        with np.errstate(invalid="ignore"):
            e = np.exp(s - top)
        z = np.maximum(np.sum(e, axis=-1, keepdims=True), 1e-30)
        return m * e / z, e / z


@mutant("attention.faint")
class FloorUnderTheLogarithm(Dense):
    """softmax(s + log m) with m held above 2e-7 where it is not 0."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        return super().weights(s, np.where(m > 0, np.maximum(m, m.dtype.type(2e-7)), 0))


@mutant("attention.faint")
class SkipsSmallExponentials(Dense):
    """Logits more than 22 below the largest of a memory that is alive count for nothing, however small its mask."""

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        top = np.max(np.where(m > 0, s, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        return super().exponentials(np.where(s < top - 22, -np.inf, s), m)


@mutant("attention.lone_survivor", seen_in="facebookresearch/transformer-sequential")
class Epsilon(Dense):
    """1e-8 in the denominator."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        s = np.where(m > 0, s, -np.inf)
        top = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
        e = np.exp(s - np.where(np.isfinite(top), top, 0))
        z = np.sum(m * e, axis=-1, keepdims=True) + 1e-8
        return m * e / z, e / z


@mutant("attention.batch_mates", seen_in="lucidrains/learning-to-expire-pytorch")
class KeepsWhatTheBatchNeeds(Dense):
    """A memory counts in the softmax as long as any row of the batch has not expired it."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        kept = np.where(np.any(m > 0, axis=0, keepdims=True), np.maximum(m, 0.25), m)
        return super().weights(s, np.broadcast_to(kept, m.shape).astype(m.dtype))


@mutant("attention.output", "attention.weights", seen_in="a navigation port")
class MasksFeatures(Dense):
    """The mask multiplies features, not weights."""

    def everything(
        self, query: Array, key: Array, value: Array, span: Array, age: Array, ramp: float, position: Array | None
    ) -> tuple[Any, ...]:
        q, k, v, p, m, _, _ = super().everything(query, key, value, span, age, ramp, position)
        a, share = self.weights(self.logits(q, k, p, age), (m > 0).astype(m.dtype))
        return q, k, v, p, m, a * m, share


@mutant("attention.empty", "gradient.empty", seen_in="facebookresearch/transformer-sequential")
class NanWhenEmpty(Dense):
    """A row with no live memory is a softmax over -inf."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        with np.errstate(invalid="ignore", divide="ignore"):
            s = np.where(m > 0, s, -np.inf)
            e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf))
            z = np.sum(m * e, axis=-1, keepdims=True)
            return m * e / z, e / z


@mutant("attention.empty", seen_in="some GPU kernels")
class MeanWhenEmpty(Dense):
    """A large negative number in place of -inf gives the mean of all values."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        s = s + np.where(m > 0, np.log(np.where(m > 0, m, 1)), -1e30).astype(s.dtype)
        e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf))
        a = e / np.maximum(np.sum(e, axis=-1, keepdims=True), 1e-30)
        return a, np.where(m > 0, a / np.where(m > 0, m, 1), 0)


@mutant("attention.expired_logit")
class FiniteMask(Dense):
    """-10000 in place of -inf: a logit of more than that gets through."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        s = s + np.where(m > 0, np.log(np.where(m > 0, m, 1)), -1e4).astype(s.dtype)
        live = np.any(m > 0, axis=-1, keepdims=True)
        e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf)) * live
        z = np.sum(e, axis=-1, keepdims=True)
        a = e / np.where(z > 0, z, 1)
        return a, np.where(m > 0, a / np.where(m > 0, m, 1), 0)


@mutant("attention.expired_logit")
class PeakOfTheDead(Dense):
    """The largest logit is taken over expired memories too, so that live weights underflow."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-np.inf))
        z = np.sum(m * e, axis=-1, keepdims=True)
        z = np.where(z > 0, z, 1)
        return m * e / z, e / z


@mutant("attention.large_logits")
class NoPeak(Dense):
    """Nothing is subtracted before the exponential."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            e = np.exp(s)
            z = np.sum(m * e, axis=-1, keepdims=True)
            z = np.where(z > 0, z, 1)
            return m * e / z, e / z


@mutant("attention.output")
class MaskSquared(Dense):
    """The mask enters the weights twice."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        return super().weights(s, m * m)


@mutant("attention.output")
class NoScale(Dense):
    """Logits are not divided by sqrt(D)."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        return super().logits(query, key, position, age) * math.sqrt(query.shape[-1])


@mutant("attention.position")
class PositionNotScaled(Dense):
    """The position term is added after the division by sqrt(D)."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, None, age)
        if position is None:
            return s
        return s + np.einsum("bhmd,bmnd->bhmn", query, self.table(position, age, query.shape[2]))


@mutant("attention.position")
class PositionOffByOne(Dense):
    """Row j of the position embedding is taken for distance j."""

    def table(self, position: Array, age: Array, queries: int) -> Array:
        return super().table(position, age + 1, queries)


@mutant("attention.position", "attention.slot_order")
class PositionBySlot(Dense):
    """Positions go by slot, counted from the newest, as if memories had no gaps."""

    def table(self, position: Array, age: Array, queries: int) -> Array:
        memories = age.shape[1]
        slots = np.arange(memories, 0, -1) - 1 + age[:, -1:]
        return super().table(position, slots, queries)


@mutant("attention.position")
class FarthestPositionForAll(Dense):
    """Memories farther than P get the embedding of distance P."""

    def table(self, position: Array, age: Array, queries: int) -> Array:
        row = np.clip(self.distance(age, queries) - 1, 0, len(position) - 1)
        return position[row]


@mutant("attention.output")
class HeadsMixed(Dense):
    """Values of the heads are read in reverse order."""

    def output(self, a: Array, v: Array) -> Array:
        return super().output(a, v[:, ::-1])


@mutant("attention.mask_scale", "attention.output")
class MaskTimesLogits(Dense):
    """The mask multiplies logits, not their exponentials."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        _, share = super().weights(s * m, m)
        hard, _ = super().weights(s * m, (m > 0).astype(m.dtype))
        return hard, share


@mutant("attention.mask_scale")
class MaskWithFloor(Dense):
    """Normalised weights are scaled by the strongest mask, so that a faint past stays faint."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        a, share = super().weights(s, m)
        some = np.max(m, axis=-1, keepdims=True, initial=0)
        return a * some, share * some


@mutant("attention.expired_contents", "attention.weights", seen_in="lucidrains/learning-to-expire-pytorch")
class DeadKeepTheirShare(Dense):
    """Expired memories that are still stored keep their part of the softmax."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        past = np.broadcast_to(m >= 0, s.shape)
        a, share = super().weights(s, past.astype(m.dtype))
        return a * m, share


@mutant("attention.tiles")
class AgesRestartEverySixteenQueries(Dense):
    """Each tile of 16 queries believes itself the first."""

    def distance(self, age: Array, queries: int) -> Array:
        return age[:, None, :] + np.arange(queries)[:, None] % 16


@mutant("attention.tiles", "gradient.tiles")
class TilesOfMemoriesNotRescaled(Dense):
    """Each tile of 128 memories subtracts its own peak, and sums are added up all the same."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
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

    def output(self, a: Array, v: Array) -> Array:
        return super().output(a, v) * (np.arange(a.shape[1]) < 8)[:, None, None]


@mutant("attention.tiles")
class ShortTableOfPositions(Dense):
    """Positions beyond 64 do not fit into the table."""

    def table(self, position: Array, age: Array, queries: int) -> Array:
        return super().table(position[:64], age, queries)


@mutant("mask.wide", "attention.wide")
class AgesIn32Bits(Dense):
    """Ages wrap around in int32."""

    def distance(self, age: Array, queries: int) -> Array:
        return super().distance(age.astype(np.int32).astype(np.int64), queries)


@mutant("attention.position")
class PositionsIn16Bits(Dense):
    """Distances for the position table wrap around in 16 bits."""

    def table(self, position: Array, age: Array, queries: int) -> Array:
        return super().table(position, age % 2**16, queries)


@mutant("attention.no_positions", "gradient.no_positions")
class PaddedLikeTheFirstRow(Dense):
    """The zeros for what is out of reach are made like the first row, which a table without rows has not."""

    def table(self, position: Array, age: Array, queries: int) -> Array:
        row = self.distance(age, queries) - 1
        padded = np.concatenate([position, np.zeros_like(position[:1])])
        return padded[np.where((row >= 0) & (row < len(position)), row, len(position))]
