"""Attention steps that are right at usual sizes, of numbers and of arrays, and with usual memories in their tiles."""

from typing import Any

import numpy as np

from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.registry import mutant


@mutant("attention.magnitudes")
class ValuesSaturate(Dense):
    """Values beyond what half precision holds saturate."""

    def output(self, a: Array, v: Array) -> Array:
        return super().output(a, np.clip(v, -65504, 65504))


@mutant("attention.magnitudes")
class SmallValuesAreFlushed(Dense):
    """Values smaller than half precision knows become 0."""

    def output(self, a: Array, v: Array) -> Array:
        return super().output(a, np.where(np.abs(v) < 6e-8, 0, v))


@mutant("gradient.magnitudes")
class SmallGradientsAreFlushed(Dense):
    """Upstream gradients below the normal numbers of half precision become 0."""

    def span_attention_backward(self, grad_out: Array, *arrays: Any, **options: Any) -> dict[str, Array]:
        grad_out = np.where(np.abs(grad_out) < 6e-5, 0, grad_out).astype(grad_out.dtype)
        return super().span_attention_backward(grad_out, *arrays, **options)


@mutant("attention.magnitudes")
class QueriesInHalf(Dense):
    """Queries are rounded to half precision before their product with keys."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        small = np.where(np.abs(query) < 6e-8, 0, np.clip(query, -65504, 65504)).astype(query.dtype)
        return super().logits(small, key, position, age)


@mutant("mask.empty_slots", "attention.empty_slots", "gradient.empty_slots")
class NarrowAges(Dense):
    """Ages are cast to 32 bits, where that of an empty slot is 0 or more."""

    def distance(self, age: Array, queries: int) -> Array:
        far = age < -(2**20)  # those above 2^31 have checks of their own
        return super().distance(np.where(far, age.astype(np.int32), age), queries)


@mutant("mask.empty_slots", "attention.empty_slots", "gradient.empty_slots")
class EmptySlotsWrap(Dense):
    """The age of an empty slot is taken for 1."""

    def distance(self, age: Array, queries: int) -> Array:
        return super().distance(np.where(age < -4096, 1, age), queries)


class _AttentionAlone(Dense):
    """Without masks to be asked for: those of one kernel say nothing of another's."""

    soft_mask = None  # type: ignore[assignment]


@mutant("attention.few_left", "gradient.few_left")
class TilesJudgedByTheirLast(_AttentionAlone):
    """A tile of 128 memories is left out if its last one, taken for the newest, is expired at its largest span."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        mask = super().mask(span, age, queries, ramp).copy()
        for start in range(0, span.shape[1] - 127, 128):
            tile = slice(start, start + 128)
            for b, last in enumerate(age[:, start + 127]):
                if last >= 1 and last - span[b, tile].max() >= ramp:
                    mask[b, :, tile] = 0
        return mask


@mutant("attention.sizes", "gradient.sizes")
class SecondTileOfBothIsLost(_AttentionAlone):
    """Of tiles of 128 queries and 128 memories, those that are not first in either are left out."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        mask = super().mask(span, age, queries, ramp).copy()
        mask[:, 128:, 128:] = 0
        return mask


@mutant("gradient.sizes")
class SpanLearnsFromTheFirstTiles(_AttentionAlone):
    """Spans learn nothing from tiles of 128 queries and 128 memories that are not first in either."""

    def sum_over_ramp(self, grad_mask: Array, mask: Array, ramp: float) -> Array:
        grad_mask = grad_mask.copy()
        grad_mask[:, 128:, 128:] = 0
        return super().sum_over_ramp(grad_mask, mask, ramp)


@mutant("attention.sizes")
class HeadsOf128(_AttentionAlone):
    """Numbers of a head beyond the first 128 take no part in logits."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        query = np.concatenate([query[..., :128], np.zeros_like(query[..., 128:])], axis=-1)
        return super().logits(query, key, position, age)


@mutant("attention.sizes", "gradient.sizes")
class SpansOfEightRows(_AttentionAlone):
    """Rows of the batch beyond the eighth have the spans of the first."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        span = span.copy()
        span[8:] = span[0]
        return super().mask(span, age, queries, ramp)


@mutant("attention.sizes")
class QueriesBeyond512(_AttentionAlone):
    """Queries beyond the 512th see the masks of that one."""

    def distance(self, age: Array, queries: int) -> Array:
        return age[:, None, :] + np.minimum(np.arange(queries), 511)[:, None]


@mutant("attention.sizes")
class MemoriesBeyond4096(_AttentionAlone):
    """Memories beyond the 4096th are left out."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        mask = super().mask(span, age, queries, ramp).copy()
        mask[:, :, 4096:] = 0
        return mask
