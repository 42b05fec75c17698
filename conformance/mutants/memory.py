"""Wrong memories: forgotten early, late, or the wrong ones; wrong ages."""

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.mutants.plain import Array, Initial, Layer, Memory, Parameters, Plain, PlainStream
from refspan.conformance.mutants.registry import mutant


@mutant("memory.stream", "memory.saturated")
class DropsWhenTheSpanEnds(Plain):
    """The ramp is not waited for."""

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        return age - span > 0


@mutant("memory.saturated")
class DropsOneStepEarly(Plain):
    """Ages as seen from the last query, compared as if from the one after the next."""

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        return age + 1 - span >= config.ramp


@mutant("memory.bound")
class DropsOneStepLate(Plain):
    """Those at the very end of their ramps are kept for another step, which no result shows."""

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        return age - span > config.ramp


@mutant("memory.bound")
class NeverDrops(Plain):
    """Right in all results, and out of memory in the end."""

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        return np.zeros(len(age), bool)


@mutant("memory.stream", "memory.keeps_all")
class ForgetsTheOldest(Plain):
    """As many as have expired are dropped, but the oldest ones."""

    def forget(self, config: ModelConfig, p: Layer, hidden: Array, age: Array) -> Memory:
        gone = self.gone(config, self.span(config, p, self.normalise(config, p, hidden, True)), age).sum()
        gone += len(age) > 16
        order = np.argsort(-age, kind="stable")[gone:]
        return hidden[order], age[order]


@mutant("memory.keeps_all", seen_in="lucidrains/learning-to-expire-pytorch")
class CutsAgesAlongTheWrongAxis(Plain):
    """At capacity hidden states lose their oldest, ages something else."""

    def forget(self, config: ModelConfig, p: Layer, hidden: Array, age: Array) -> Memory:
        hidden, age = super().forget(config, p, hidden, age)
        return (hidden[-24:], age[:24]) if len(age) > 24 else (hidden, age)


@mutant("memory.keeps_all")
class OldestGoAtCapacity(Plain):
    """A fixed capacity, at which the oldest go, alive or not."""

    def forget(self, config: ModelConfig, p: Layer, hidden: Array, age: Array) -> Memory:
        hidden, age = super().forget(config, p, hidden, age)
        return hidden[-32:], age[-32:]


@mutant("memory.saturated", seen_in="facebookresearch/transformer-sequential")
class BufferWithoutRoomForTheRamp(Plain):
    """The ramp gets room in whole blocks, which is too little unless R is a multiple of M."""

    def forget(self, config: ModelConfig, p: Layer, hidden: Array, age: Array) -> Memory:
        hidden, age = super().forget(config, p, hidden, age)
        room = config.max_span + config.ramp // config.block_size * config.block_size
        if len(age) > room:
            raise IndexError("shapes do not match")
        return hidden, age


@mutant("memory.start", seen_in="facebookresearch/transformer-sequential")
class PhantomMemories(Plain):
    """A stream starts with M zero vectors, which take part in the softmax."""

    def start(self, config: ModelConfig, params: Parameters, layer: int) -> Memory:
        hidden = np.zeros((config.block_size, config.hidden_size), params["embedding.weight"].dtype)
        return hidden, np.arange(config.block_size, 0, -1)


class _WholeBlocks(PlainStream):
    def after_block(self, length: int) -> None:
        super().after_block(length)
        for i in range(self.config.layers):
            gone = min(int((row[i][1] < 0).sum()) for row in self.rows)
            gone -= gone % self.config.block_size
            for row in self.rows:
                hidden, age = row[i]
                keep = np.ones(len(age), bool)
                keep[np.flatnonzero(age < 0)[:gone]] = False
                row[i] = hidden[keep], age[keep]


@mutant("memory.bound", stream=_WholeBlocks, seen_in="facebookresearch/transformer-sequential")
class DropsWholeBlocksAtTheBatchMinimum(Plain):
    """Only multiples of M are dropped, and only as many as every row of the batch can spare."""

    def forget(self, config: ModelConfig, p: Layer, hidden: Array, age: Array) -> Memory:
        gone = self.gone(config, self.span(config, p, self.normalise(config, p, hidden, True)), age)
        return hidden, np.where(gone | (age < 0), -(10**6), age)


class _Shared(PlainStream):
    def after_block(self, length: int) -> None:
        super().after_block(length)
        for i in range(self.config.layers):
            ages = [set(row[i][1].tolist()) for row in self.rows]
            for row in self.rows:
                hidden, age = row[i]
                keep = np.array([all(a in other for other in ages) for a in age.tolist()], bool)
                row[i] = hidden[keep], age[keep]


@mutant("memory.batch_mates", stream=_Shared)
class DropsWhatAnyRowDrops(Plain):
    """One list of kept steps for the whole batch."""


class _OnePerBlock(PlainStream):
    def read(self, b: int, tokens: Array) -> Array:
        result = super().read(b, tokens)
        grown = len(tokens)
        self.rows[b] = [(hidden, np.where(age > grown, age - grown + 1, age)) for hidden, age in self.rows[b]]
        return result


@mutant("memory.stream", stream=_OnePerBlock)
class AgesGrowByOnePerBlock(Plain):
    """Ages of older memories count blocks, not steps."""


class _FullBlockAges(PlainStream):
    def read(self, b: int, tokens: Array) -> Array:
        result = super().read(b, tokens)
        missing = max(0, self.config.block_size - len(tokens))
        self.rows[b] = [(hidden, age + missing) for hidden, age in self.rows[b]]
        return result


@mutant("memory.stream", "memory.block_split", stream=_FullBlockAges)
class AgesGrowByTheBlockSize(Plain):
    """A ragged block ages memories by a whole one."""


class _FullBlocksOnly(PlainStream):
    def read(self, b: int, tokens: Array) -> Array:
        before = list(self.rows[b])
        result = super().read(b, tokens)
        if len(tokens) < self.config.block_size:
            self.rows[b] = before
        return result


@mutant("memory.stream", "memory.block_split", stream=_FullBlocksOnly, seen_in="lucidrains/learning-to-expire-pytorch")
class OnlyFullBlocksAreRemembered(Plain):
    """Memory is updated only by blocks of full length."""


@mutant("memory.slot_order", "memory.initial")
class InitialMemoriesInOrder(Plain):
    """The initial memories are taken to stand oldest first, without gaps."""

    def open_model(
        self, config: ModelConfig, params: Parameters, *, batch: int, memory: Initial = None
    ) -> "PlainStream":
        if memory is not None:
            memory = [(h, np.tile(np.arange(h.shape[1], 0, -1), (batch, 1))) for h, _ in memory]
        return super().open_model(config, params, batch=batch, memory=memory)


@mutant("memory.long")
class AgesIn8Bits(Plain):
    """Ages wrap around after 127."""

    def advance(self, age: Array) -> Array:
        return (age + 1).astype(np.int8).astype(np.int64)


class _Given(PlainStream):
    """The memories that it is given have ages of its own kind too, as what it makes itself."""

    def given(self, hidden: Array, age: Array, i: int) -> Memory:
        return super().given(hidden, self.rules.advance(age) - 1, i)


class _RoomInEights(PlainStream):
    def memory_size(self) -> list[int]:
        return [-(-size // 8) * 8 for size in super().memory_size()]


@mutant("memory.bound", stream=_RoomInEights)
class DropsOneStepLateInEights(Plain):
    """A memory is dropped one step after it has expired, which eights, as they are given out, often hide."""

    def facts(self) -> dict[str, str]:
        return {"memory_granularity": "8"}

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        return age - span > config.ramp


@mutant("memory.far", stream=_Given)
class StreamAgesIn16Bits(Plain):
    """Ages wrap around after 32767."""

    def advance(self, age: Array) -> Array:
        return (age + 1).astype(np.int16).astype(np.int64)


@mutant("memory.far", stream=_Given)
class StreamAgesIn32Bits(Plain):
    """Ages wrap around after 2^31 - 1."""

    def advance(self, age: Array) -> Array:
        return (age + 1).astype(np.int32).astype(np.int64)


@mutant("memory.far", stream=_Given)
class StreamAgesInHalfPrecision(Plain):
    """Steps beyond 2048 are rounded, and none is beyond 65504."""

    def advance(self, age: Array) -> Array:
        return np.minimum(age + 1, 65504).astype(np.float16).astype(np.int64)


@mutant("memory.far", stream=_Given)
class StreamAgesStopAt1024(Plain):
    """A table of masks by age has 1024 rows; older memories get the last."""

    def advance(self, age: Array) -> Array:
        return np.minimum(age + 1, 1024)


@mutant("memory.bound")
class DropsByWholeRamps(Plain):
    """R is rounded up where it is asked what to drop."""

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        return age - span >= np.ceil(config.ramp)


class _FirstSixteen(PlainStream):
    def given(self, hidden: Array, age: Array, i: int) -> Memory:
        return super().given(hidden[:16], age[:16], i)


@mutant("memory.initial", stream=_FirstSixteen)
class SixteenInitialMemories(Plain):
    """A stream starts with sixteen memories a layer at most."""


class _AllGiven(PlainStream):
    def given(self, hidden: Array, age: Array, i: int) -> Memory:
        return hidden.astype(self.params["embedding.weight"].dtype), age.copy()


@mutant("memory.bound", stream=_AllGiven)
class InitialMemoriesWaitForTheFirstStep(Plain):
    """Memories that have expired when a stream is opened with them are dropped by its first step."""
