"""Wrong streams: states and resets that meet, states of other sizes, questions that change what they ask about."""

from typing import Any

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.mutants.plain import Array, Initial, Layer, Memory, Parameters, Plain, PlainStream
from refspan.conformance.mutants.registry import mutant


class _ResetsLater(PlainStream):
    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.waiting: set[int] = set()

    def reset(self, row: int) -> None:
        self.waiting.add(row)

    def step(self, tokens: Array) -> Array:
        self.do_resets()
        return super().step(tokens)

    def do_resets(self) -> None:
        for row in self.waiting:
            self.rows[row] = self.empty()
        self.waiting.clear()

    def memory_size(self) -> list[int]:
        self.do_resets()
        return super().memory_size()


@mutant("memory.state_machine", stream=_ResetsLater)
class StatesWithoutResets(Plain):
    """A reset is done with the next step, and a state that is kept before that does not know of it."""


class _OutlivesARestore(_ResetsLater):
    def state(self) -> Any:
        self.do_resets()
        return super().state()


@mutant("memory.state_machine", stream=_OutlivesARestore)
class ResetOutlivesARestore(Plain):
    """A reset is done with the next step, even if the stream went back to a state in between."""


class _CopiesOnStep(PlainStream):
    def state(self) -> Any:
        return self.rows

    def restore(self, state: Any) -> None:
        self.rows = state

    def step(self, tokens: Array) -> Array:
        self.rows = [list(row) for row in self.rows]
        return super().step(tokens)


@mutant("memory.bound", "memory.projected_once", stream=_CopiesOnStep)
class ResetsReachStates(Plain):
    """What a state shares with its stream is copied by the next step; a reset writes into it."""


class _NothingYet(PlainStream):
    begun = False

    def step(self, tokens: Array) -> Array:
        self.begun = True
        return super().step(tokens)

    def state(self) -> Any:
        return super().state() if self.begun else None

    def restore(self, state: Any) -> None:
        if state is None:
            self.rows = [self.empty() for _ in self.rows]
        else:
            super().restore(state)


@mutant("memory.restore", "memory.state_machine", stream=_NothingYet)
class NothingReadIsNothingKept(Plain):
    """The state of a stream that has not read anything is empty, whatever memories it was opened with."""


class _FewKept(PlainStream):
    def state(self) -> Any:
        return [[(hidden[-64:], age[-64:]) for hidden, age in row] for row in super().state()]


@mutant("memory.keeps_all", stream=_FewKept)
class StatesOf64(Plain):
    """A state has room for the 64 newest memories."""


class _ResetsBeside(PlainStream):
    def reset(self, row: int) -> None:
        if self.batch > 1:
            super().reset(row)


@mutant("memory.reset", stream=_ResetsBeside)
class ResetsOnlyInBatches(Plain):
    """A stream of one row is not reset."""


class _ResetsTheFirst(PlainStream):
    def reset(self, row: int) -> None:
        super().reset(row & 3)


@mutant("memory.reset", stream=_ResetsTheFirst)
class ResetsFourRows(Plain):
    """The number of the row that is reset has two bits."""


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


class _Trims(PlainStream):
    def memory_size(self) -> list[int]:
        self.rows = [[(hidden[-12:], age[-12:]) for hidden, age in row] for row in self.rows]
        return super().memory_size()


@mutant("memory.bound", stream=_Trims)
class SizesAreMadeTrue(Plain):
    """A stream that is asked for its size cuts its memory to twelve."""


class _FlushesToCount(PlainStream):
    def rows_projected(self) -> int:
        self.rows = [[(hidden, age + 1) for hidden, age in row] for row in self.rows]
        return super().rows_projected()


@mutant("memory.projected_once", stream=_FlushesToCount)
class CountingEndsABlock(Plain):
    """A stream that is asked how much it has projected ends a block, and its memories age."""


class _CountsSince(PlainStream):
    def rows_projected(self) -> int:
        since, self.projected = self.projected, 0
        return since


@mutant("memory.projected_once", stream=_CountsSince)
class CountsSinceItWasAsked(Plain):
    """The count starts again each time that it is asked for."""


class _Prefix(PlainStream):
    def step(self, tokens: Array) -> Array:
        content = tuple(x.tobytes() for x in self.params.values())
        self.read_so_far = (*getattr(self, "read_so_far", ()), tokens.tobytes())
        log_probs = super().step(tokens)
        return np.array(self.rules.shared.setdefault((self.config, content, self.read_so_far), log_probs))


@mutant("memory.models_alike", stream=_Prefix)
class PrefixesAreKnown(Plain):
    """What a model has said after the same tokens is said again, whatever memories the stream was opened with."""


class _KnownByOne(PlainStream):
    def __init__(self, rules: "Plain", config: ModelConfig, params: Parameters, batch: int, memory: Initial) -> None:
        key = config, params["output.weight"].tobytes()
        super().__init__(rules, config, rules.shared.setdefault(key, dict(params)), batch, memory)


@mutant("memory.models_alike", stream=_KnownByOne)
class ModelsAreKnownByTheirOutput(Plain):
    """What was compiled for a model is used for all with the same output weights, as if all were frozen."""


@mutant("memory.stream", "memory.slot_order")
class ModelWithoutPeak(Plain):
    """Logits of attention are exponentiated as they are."""

    def weights(self, s: Array, m: Array) -> Array:
        w = m * np.exp(s)
        return w / w.sum(axis=1, keepdims=True) if np.any(m > 0) else np.zeros_like(s)


@mutant("memory.bound")
class DropsByWholeRamps(Plain):
    """R is rounded up where it is asked what to drop."""

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        return age - span >= np.ceil(config.ramp)


@mutant("memory.stream")
class WholeMaxSpan(Plain):
    """L is a whole number of steps."""

    def span(self, config: ModelConfig, p: Layer, u: Array) -> Array:
        return super().span(config, p, u) * u.dtype.type(int(config.max_span) / config.max_span)


@mutant("memory.restore", "memory.state_machine")
class RampsOfHundred(Plain):
    """R is at most 100."""

    def mask(self, span: Array, age: Array, ramp: float) -> Array:
        return super().mask(span, age, min(ramp, 100.0))


@mutant("model.post_norm", "model.pre_norm")
class SixAtMost(Plain):
    """min(max(x, 0), 6) in place of ReLU."""

    def activate(self, x: Array) -> Array:
        return np.clip(x, 0, 6)


@mutant("model.many_tokens")
class TokensIn16Bits(Plain):
    """Token ids are cast to 16 bits."""

    def embed(self, config: ModelConfig, params: Parameters, token: int) -> Array:
        return super().embed(config, params, token & 0xFFFF)
