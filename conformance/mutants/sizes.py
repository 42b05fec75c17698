"""Right in the small, wrong at the sizes that models have, or where two axes are as long as each other."""

import math
from typing import Any

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.backends.reference import NumpyBackend
from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.plain import Layer, Memory, Parameters, Plain, PlainStream
from refspan.conformance.mutants.registry import mutant


@mutant("mask.large", "attention.large")
class MaskOfTheFirstTile(Dense):
    """No mask beyond 64 queries: they see nothing."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        m[:, 64:] = 0
        return m


@mutant("mask.large")
class MaskOfFewMemories(Dense):
    """Beyond 256 memories the mask is that of the ones before: an index of 8 bits."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        return m[:, :, np.arange(m.shape[2]) % 256]


@mutant("attention.large", "gradient.large")
class HeadsOf64(Dense):
    """Of larger heads only the first 64 numbers take part in a logit."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        first = np.where(np.arange(query.shape[-1]) < 64, query, 0).astype(query.dtype)
        return super().logits(first, key, position, age)


@mutant("attention.heads", "gradient.heads")
class NoScaleForHeadsOf96(Dense):
    """Logits of heads of 96 numbers, which have a kernel of their own, are not divided by sqrt(96)."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, position, age)
        return np.asarray(s * math.sqrt(96)) if query.shape[-1] == 96 else s


@mutant("attention.heads", "gradient.heads")
class EightHeadsShareKeys(Dense):
    """Where there are eight heads, two at a time have the keys of one."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        of = np.arange(8) // 2 * 2 if key.shape[1] == 8 else slice(None)
        return super().logits(query, key[:, of], position, age)


@mutant("attention.heads", "gradient.heads")
class LastOfABlockOf64(Dense):
    """The last query of a block of exactly 64 sees nothing."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        m[:, 63:] *= queries != 64
        return m


@mutant("attention.tiles", "gradient.tiles")
class HeadsInVectorsOf8(Dense):
    """Of heads longer than 8 numbers those after the last whole vector of 8 take no part in a logit."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        size = query.shape[-1]
        whole = size // 8 * 8 if size > 8 else size
        first = np.where(np.arange(size) < whole, query, 0).astype(query.dtype)
        return super().logits(first, key, position, age)


@mutant("attention.output", "gradient.values")
class HeadsInPairs(Dense):
    """The last number of a head of odd length takes no part in a logit, one of length 1 apart."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        size = query.shape[-1]
        first = np.where(np.arange(size) < max(1, size // 2 * 2), query, 0).astype(query.dtype)
        return super().logits(first, key, position, age)


@mutant("attention.large", "gradient.large")
class OneThreadPerMemory(Dense):
    """No more than 1024 memories are seen, as there are no more threads in a block."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, position, age)
        s[..., 1024:] = -np.inf
        return s


@mutant("attention.tiles", "gradient.tiles")
class AFirstTileWithoutMemories(Dense):
    """An online softmax over tiles of 64: where the first is all expired, -inf minus -inf is NaN, and becomes 0."""

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        a, share = super().weights(s, m)
        alive = np.broadcast_to(m > 0, s.shape)[..., :64].any(axis=-1, keepdims=True) | (s.shape[-1] <= 64)
        return np.where(alive, a, 0).astype(a.dtype), np.where(alive, share, 0).astype(a.dtype)


@mutant("attention.tiles", "gradient.tiles")
class StopsAtATileWithoutMemories(Dense):
    """From the newest tile of 32 backwards; the first that is all expired ends it, as if none before could be alive."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        for row in m:
            seen = [bool(row[:, n : n + 32].any()) for n in range(0, row.shape[1], 32)]
            first = max((i for i, alive in enumerate(seen[:-1]) if not alive), default=-1)
            row[:, : 32 * (first + 1)] = 0
        return m


@mutant("attention.tiles", "gradient.tiles")
class LastTileOfWholeOnes(Dense):
    """Where 128 divides the memories, the mask for what is beyond the last tile covers it all."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        m = super().mask(span, age, queries, ramp)
        whole = m.shape[2] > 0 and m.shape[2] % 128 == 0
        m[:, :, m.shape[2] - 128 * whole :] = 0
        return m


@mutant("attention.tiles", "gradient.tiles")
class AgesRestartEvery128Queries(Dense):
    """The place of a query in its block is that in its tile of 128."""

    def distance(self, age: Array, queries: int) -> Array:
        return age[:, None, :] + np.arange(queries)[:, None] % 128


@mutant("attention.tiles", "gradient.tiles")
class SplitsOfDecodingNotRescaled(Dense):
    """A single query is split over parts of 64 memories, each with its own largest logit; nobody evens that out."""

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        if s.shape[2] > 1 or s.shape[3] <= 64:
            return super().exponentials(s, m)
        parts = [Dense.exponentials(self, s[..., n : n + 64], m[..., n : n + 64])[0] for n in range(0, s.shape[3], 64)]
        e = np.concatenate(parts, axis=-1)
        z = np.sum(m * e, axis=-1, keepdims=True)
        return e, np.where(z > 0, z, 1)


@mutant("attention.tiles", "gradient.tiles")
class HeadsOf16ScaledAs64(Dense):
    """A fast path for heads of 16 and 32 numbers divides by 8, the square root of 64."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, position, age)
        return s * np.sqrt(query.shape[-1] / 64).astype(s.dtype) if query.shape[-1] in (16, 32) else s


@mutant("attention.tiles", "gradient.tiles")
class AWarpOfHeads(Dense):
    """Heads beyond 32 have the logits of the first."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, position, age)
        s[:, 32:] = s[:, :1]
        return s


@mutant("attention.tiles", "gradient.tiles")
class MemoriesUpTo2048(Dense):
    """Memories beyond 2048 are not seen: what fits into the memory that a block of threads shares."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, position, age)
        s[..., 2048:] = -np.inf
        return s


@mutant("attention.large", "gradient.large")
class TwelveHeads(Dense):
    """Heads beyond the twelfth have the logits of the first."""

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = super().logits(query, key, position, age)
        s[:, 12:] = s[:, :1]
        return s


@mutant("attention.large")
class PositionsIn8Bits(Dense):
    """Positions from the 256th on are out of reach."""

    def table(self, position: Array, age: Array, queries: int) -> Array:
        return super().table(position[:256], age, queries)


class SquareIsOwnBlock(NumpyBackend):
    """Where there are as many memories as queries, they are taken for the block's own."""

    def own(self, query: Array, key: Array, age: Array) -> Array:
        """Ages, if the block attends to itself; else as they are."""
        queries = query.shape[2]
        own = queries == key.shape[2] > 1
        return np.broadcast_to(-np.arange(queries), age.shape) if own else age


@mutant("attention.output", "attention.large")
class SquareStepIsOwnBlock(SquareIsOwnBlock):
    """Where there are as many memories as queries, the step takes them for the block's own."""

    def span_attention(self, query: Array, key: Array, value: Array, span: Array, age: Array, **options: Any) -> Array:
        return super().span_attention(query, key, value, span, self.own(query, key, age), **options)


@mutant("gradient.values", "gradient.large")
class SquareGradientIsOwnBlock(SquareIsOwnBlock):
    """Where there are as many memories as queries, the gradient takes them for the block's own."""

    def span_attention_backward(
        self, grad_out: Array, query: Array, key: Array, value: Array, span: Array, age: Array, **options: Any
    ) -> dict[str, Array]:
        age = self.own(query, key, age)
        return super().span_attention_backward(grad_out, query, key, value, span, age, **options)


@mutant("memory.long")
class RingOf512(Plain):
    """A ring of 512 places, whatever is alive."""

    def forget(self, config: ModelConfig, p: Layer, hidden: Array, age: Array) -> Memory:
        hidden, age = super().forget(config, p, hidden, age)
        return hidden[-512:], age[-512:]


class _FourRows(PlainStream):
    def step(self, tokens: Array) -> Array:
        return super().step(np.concatenate([tokens[:4], tokens[:1].repeat(max(0, len(tokens) - 4), axis=0)]))


@mutant("memory.large", stream=_FourRows)
class FourRowsAtMost(Plain):
    """Rows beyond the fourth read what the first one does."""


class _LongBlocks(PlainStream):
    def read(self, b: int, tokens: Array) -> Array:
        log_probs = super().read(b, tokens)
        log_probs[64:] = log_probs[: max(0, len(log_probs) - 64)].copy()
        return log_probs


@mutant("memory.large", "memory.long", stream=_LongBlocks)
class BlocksOf64AtMost(Plain):
    """Beyond 64 tokens of a block log-probabilities are those of others."""


@mutant("memory.large")
class WideModelsInTiles(Plain):
    """Of hidden states of more than 32 numbers the rest does not reach the feed-forward part."""

    def feedforward(self, p: Layer, y: Array) -> Array:
        return super().feedforward(p, np.where(np.arange(len(y)) < 32, y, 0).astype(y.dtype))


@mutant("memory.large")
class FeedForwardOf64(Plain):
    """Numbers of a hidden state beyond the 64th do not reach the feed-forward part."""

    def feedforward(self, p: Layer, y: Array) -> Array:
        return super().feedforward(p, np.where(np.arange(len(y)) < 64, y, 0).astype(y.dtype))


@mutant("memory.large")
class PositionsOfFourHeads(Plain):
    """Heads beyond the fourth score positions with the first one's query."""

    def position_scores(self, q: Array, table: Array, age: Array) -> Array:
        return super().position_scores(np.concatenate([q[:4], q[:1].repeat(max(0, len(q) - 4), axis=0)]), table, age)


@mutant("memory.large")
class TokensInBytes(Plain):
    """Token ids are kept in 8 bits."""

    def embed(self, config: ModelConfig, params: Parameters, token: int) -> Array:
        return super().embed(config, params, token % 256)


@mutant("training.large")
class MemoryOfFourBlocks(NumpyBackend):
    """What was remembered is thrown away after the fourth block."""

    def loss_and_gradients(self, *asked: Any, **options: Any) -> Any:
        count, kept = asked[-1] or (0, None)
        given = (*asked[:-1], None if count >= 4 else kept)
        losses, grads, kept = super().loss_and_gradients(*given, **options)
        return losses, grads, (count + 1, kept)


@mutant("training.large")
class LossOfShortBlocks(NumpyBackend):
    """The task loss is divided by 16 tokens at most."""

    def loss_and_gradients(self, *asked: Any, **options: Any) -> Any:
        _, _, tokens, *_ = asked
        (task, span), grads, memory = super().loss_and_gradients(*asked, **options)
        return (task * max(1, tokens.shape[1] / 16), span), grads, memory
