"""Wrong in kernels that work tile by tile: fast ways for whole tiles, running maxima, the memory between two passes."""

import time
from collections.abc import Iterator
from itertools import product

import numpy as np

from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.registry import mutant

TILE = 64
"""Slots that a kernel takes together, if it has no fast way for fewer of them."""


def _small_tiles(m: Array) -> Iterator[tuple[int, slice]]:
    """Rows of a mask [B, M, N], and whole tiles of 32 slots."""
    yield from product(range(len(m)), (slice(n, n + 32) for n in range(0, m.shape[2] - 31, 32)))


@mutant("mask.crowds", "attention.crowds", "gradient.crowds")
class FullTilesSkipThePast(Dense):
    """A tile whose spans all reach beyond the block needs no mask: not even of what a query may not see yet."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        for b, tile in _small_tiles(m):
            if np.all(span[b, tile] >= age[b, tile] + queries - 1):
                m[b, :, tile] = 1
        return m


@mutant("mask.crowds", "attention.crowds", "gradient.crowds")
class FullTilesByTheFirstQuery(Dense):
    """A tile that is all full for the first query of a block is taken to be so for all of them."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        for b, tile in _small_tiles(m):
            if np.all(m[b, 0, tile] == 1):
                m[b, :, tile] = 1
        return m


@mutant("attention.crowds", "gradient.crowds")
class OneKernelForAllThatLives(Dense):
    """Where nothing has expired a library's attention is called, which knows no positions."""

    thread_safe = False  # `mask` tells `logits`
    all_live = False

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, position, age)
        return super().logits(query, key, None, age) if self.all_live and s.shape[-1] >= TILE else s

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        self.all_live = bool(np.all(m == 1))
        return m


@mutant("attention.crowds", "gradient.crowds")
class CausalTilesBySlot(Dense):
    """Tiles of 64 by 64 that lie above the diagonal of slots are left out, as if ages ran along it."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        for first in range(0, queries, TILE):
            m[:, first : first + TILE, first + TILE + max(m.shape[2] - queries, 0) :] = 0
        return m


@mutant("attention.crowds")
class SpansOfAnotherRowInDecoding(Dense):
    """One query with many memories: rows and heads are numbered the other way round where spans are read."""

    def everything(
        self, query: Array, key: Array, value: Array, span: Array, age: Array, ramp: float, position: Array | None
    ) -> tuple[Array, ...]:
        found = super().everything(query, key, value, span, age, ramp, position)
        batch, heads, queries, slots = found[5].shape
        if queries > 1 or slots <= TILE:
            return found
        q, k, v, p, m, _, _ = found
        row = np.arange(heads) * batch + np.arange(batch)[:, None]  # [B, H]
        m = m[row // heads % batch, 0]
        return q, k, v, p, m, *self.weights(self.logits(q, k, p, age), m)


@mutant("attention.runs", "gradient.runs")
class LargestOfTheFirstTile(Dense):
    """What is subtracted from logits is the largest of the first tile in which anything lives."""

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        s = np.where(m > 0, s, -np.inf)
        top = np.full((*s.shape[:-1], 1), -np.inf, s.dtype)
        for n in range(0, s.shape[-1], TILE):
            top = np.where(np.isfinite(top), top, np.max(s[..., n : n + TILE], axis=-1, keepdims=True))
        with np.errstate(over="ignore"):
            e = np.exp(s - np.where(np.isfinite(top), top, 0))
        z = np.sum(m * e, axis=-1, keepdims=True)
        return e, np.where(z > 0, z, 1)


@mutant("attention.runs", "gradient.runs")
class RunningMaximumFromZero(Dense):
    """Where there are several tiles the running maximum starts at 0, not at -inf."""

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        if s.shape[-1] <= TILE:
            return super().exponentials(s, m)
        s = np.where(m > 0, s, -np.inf)
        e = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=0))
        z = np.sum(m * e, axis=-1, keepdims=True)
        return e, np.where(z > 0, z, 1)


@mutant("attention.runs")
class NothingSubtractedBelow88(Dense):
    """Where no logit is beyond 88, where exponentials end in float32, nothing is subtracted: sums are infinite."""

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        live = np.where(m > 0, s, -np.inf)
        if np.max(live, initial=0) > 88:
            return super().exponentials(s, m)
        e = np.exp(live)
        z = np.sum(m * e, axis=-1, keepdims=True)
        return e, np.where(z > 0, z, 1)


@mutant("attention.runs", "gradient.runs")
class TilesFarBelowTheLargest(Dense):
    """A tile is left out if its largest logit is more than 10 below the largest, however many memories it has."""

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        live = np.where(m > 0, s, -np.inf)
        top = np.max(live, axis=-1, keepdims=True, initial=-np.inf)
        s = np.array(s)
        for n in range(0, s.shape[-1], TILE):
            tile = slice(n, n + TILE)
            far = np.max(live[..., tile], axis=-1, keepdims=True) < top - 10
            s[..., tile] = np.where(far, -np.inf, s[..., tile])
        return super().exponentials(s, m)


@mutant("attention.heads", "gradient.heads")
class NoPositionsInHeadsOf256(Dense):
    """The kernel of heads of 256 numbers knows no positions."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        return super().logits(query, key, position if query.shape[-1] < 256 else None, age)


@mutant("attention.heads", "gradient.heads")
class OneMaskInHeadsOf32(Dense):
    """The kernel of heads of 32 numbers has the first query's mask for all."""

    thread_safe = False  # `logits` tells `weights`
    size = 0

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        return super().weights(s, np.broadcast_to(m[:, :, :1], m.shape) if self.size == 32 else m)

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        self.size = query.shape[-1]
        return super().logits(query, key, position, age)


@mutant("attention.crowds", "gradient.crowds")
class NarrowAgesInDecoding(Dense):
    """The kernel of single queries and many memories casts ages to 32 bits."""

    def distance(self, age: Array, queries: int) -> Array:
        narrow = queries == 1 and age.shape[1] > TILE
        return super().distance(np.where(age > 0, age.astype(np.int32), age) if narrow else age, queries)


@mutant("attention.threads", "gradient.threads")
class SplitsShareTheirWorkspace(Dense):
    """Where memories are split among several workers, their parts are put together in the backend's own memory."""

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        if s.shape[-1] <= TILE:
            return super().exponentials(s, m)
        self.workspace = super().exponentials(s, m)
        time.sleep(1e-3)
        e, z = self.workspace
        return (e, z) if e.shape == s.shape else super().exponentials(s, m)
