"""Right in the small, wrong at the sizes that models have, or where two axes are as long as each other."""

from typing import Any

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.backends.reference import NumpyBackend
from refspan.conformance.mutants.dense import Array, Dense
from refspan.conformance.mutants.plain import Layer, Memory, Plain, PlainStream
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
