"""Wrong streams: resets, states, what several streams share."""

from typing import Any

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.mutants.plain import Array, Initial, Parameters, Plain, PlainStream
from refspan.conformance.mutants.registry import mutant


class _ForgetsAll(PlainStream):
    def reset(self, row: int) -> None:
        self.rows = [self.empty() for _ in self.rows]


@mutant("memory.reset", stream=_ForgetsAll)
class ResetEmptiesTheWholeBatch(Plain):
    """A reset of one row empties all."""


class _ForgetsFirst(PlainStream):
    def reset(self, row: int) -> None:
        self.rows[row] = [self.empty()[0], *self.rows[row][1:]]


@mutant("memory.reset", stream=_ForgetsFirst)
class ResetEmptiesOneLayer(Plain):
    """A reset leaves the upper layers' memories."""


class _FreesLate(PlainStream):
    late: list[int] | None = None

    def after_block(self, length: int) -> None:
        super().after_block(length)
        self.late = None

    def memory_size(self) -> list[int]:
        here = super().memory_size()
        return here if self.late is None else [max(pair) for pair in zip(here, self.late, strict=True)]


class _ResetFreesLate(_FreesLate):
    def reset(self, row: int) -> None:
        self.late = self.memory_size()
        super().reset(row)


@mutant("memory.bound", stream=_ResetFreesLate)
class ResetFreesWithTheNextBlock(Plain):
    """A row that was reset is held until the stream goes on."""


class _MarksWithAnAge(PlainStream):
    def reset(self, row: int) -> None:
        super().reset(row)
        self.rows[row] = [(np.zeros((1, *hidden.shape[1:])), np.array([-124])) for hidden, _ in self.rows[row]]

    def step(self, tokens: Array) -> Array:
        self.rows = [[(hidden, np.where(age < 1, -124, age)) for hidden, age in row] for row in self.rows]
        return super().step(tokens)


@mutant("memory.long", stream=_MarksWithAnAge)
class MarksThatAgesReach(Plain):
    """An empty place has the age -124 at each block's start, which a long block comes to see."""


class _SizeOfTheEmptiestRow(PlainStream):
    def memory_size(self) -> list[int]:
        return [min(len(row[i][1]) for row in self.rows) for i in range(self.config.layers)]


@mutant("memory.bound", stream=_SizeOfTheEmptiestRow)
class SizeOfTheEmptiestRow(Plain):
    """Says how much the row holds that holds least."""


class _CountsOneRow(PlainStream):
    def after_block(self, length: int) -> None:
        self.projected += length * self.config.layers


@mutant("memory.projected_once", stream=_CountsOneRow)
class CountsTheProjectionsOfOneRow(Plain):
    """Projections are counted for the first row only."""


class _RestoreFreesLate(_FreesLate):
    def restore(self, state: Any) -> None:
        self.late = self.memory_size()
        super().restore(state)


@mutant("memory.bound", stream=_RestoreFreesLate)
class RestoreKeepsWhatItReplaces(Plain):
    """What a restored state takes the place of is held until the stream goes on."""


class _Pool(PlainStream):
    def __init__(self, rules: "Plain", config: ModelConfig, params: Parameters, batch: int, memory: Initial) -> None:
        super().__init__(rules, config, params, batch, memory)
        if memory is None and self.size in rules.shared:
            used = rules.shared.pop(self.size)
            self.rows = [[(hidden[-1:], age[-1:]) for hidden, age in row] for row in used]

    @property
    def size(self) -> tuple[int, ...]:
        return self.batch, self.config.hidden_size, self.config.layers

    def __del__(self) -> None:
        if hasattr(self, "rows"):
            self.rules.shared[self.size] = self.rows


@mutant("memory.state_machine", stream=_Pool)
class BuffersAreHandedOnUncleared(Plain):
    """The last memory of a stream that ended is found by the next one of that size."""


class _LiveState(PlainStream):
    def state(self) -> Any:
        return self.rows

    def restore(self, state: Any) -> None:
        self.rows = state


@mutant("memory.restore", stream=_LiveState)
class StateIsAView(Plain):
    """The kept state goes on living with the stream."""


class _Clock(PlainStream):
    clock = 0

    def after_block(self, length: int) -> None:
        super().after_block(length)
        self.clock += length

    def state(self) -> Any:
        return self.clock, super().state()

    def restore(self, state: Any) -> None:
        then, rows = state
        super().restore(rows)
        self.rows = [[(hidden, age + self.clock - then) for hidden, age in row] for row in self.rows]


@mutant("memory.restore", stream=_Clock)
class RestoreGoesByTheClock(Plain):
    """States keep the time of each memory, and ages grow by what was read since."""


class _Adopts(PlainStream):
    def restore(self, state: Any) -> None:
        self.rows = state


@mutant("memory.restore", "memory.state_machine", stream=_Adopts)
class RestoreTakesTheStateItself(Plain):
    """A stream goes on in the state that it was given, which so cannot be restored a second time."""


class _OneSlot(PlainStream):
    slots: dict[str, Any]

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.slots = {}

    def state(self) -> Any:
        self.slots["newest"] = super().state()
        return "newest"

    def restore(self, state: Any) -> None:
        super().restore(self.slots[state])


@mutant("memory.restore", "memory.state_machine", stream=_OneSlot)
class KeepsTheNewestState(Plain):
    """A stream has room for one state: whatever is restored, the newest comes back."""


class _OneSlotForAll(_OneSlot):
    def __init__(self, rules: "Plain", *about: Any) -> None:
        super().__init__(rules, *about)
        self.slots = rules.shared


@mutant("memory.state_machine", stream=_OneSlotForAll)
class StreamsShareAState(Plain):
    """There is room for one state: that of another stream comes back if it is the newest."""


class _Undo(PlainStream):
    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.states: list[Any] = []

    def state(self) -> Any:
        self.states.append(super().state())
        return len(self.states)

    def restore(self, state: Any) -> None:
        del self.states[state:]
        super().restore(self.states[-1])


@mutant("memory.restore", "memory.state_machine", stream=_Undo)
class RestoreForgetsNewerStates(Plain):
    """Going back to a state ends those that were kept after it, as undoing does."""


class _OneForAll(PlainStream):
    def __init__(self, rules: "Plain", config: ModelConfig, params: Parameters, batch: int, memory: Initial) -> None:
        super().__init__(rules, config, params, batch, memory)
        shape = (batch, config.hidden_size, config.layers)
        self.rows = rules.shared.setdefault(shape, self.rows) if memory is None else self.rows


@mutant("memory.start", "memory.stream", stream=_OneForAll)
class StreamsShareMemory(Plain):
    """Memories are kept per model shape, not per stream."""


class _LastRow(PlainStream):
    def step(self, tokens: Array) -> Array:
        other = self.rules.shared.get("at work")
        if other is not None and other is not self and other.config != self.config:
            self.rows[0] = self.empty()
        self.rules.shared["at work"] = self
        return super().step(tokens)


@mutant("memory.two_streams", stream=_LastRow)
class SwitchingStreamsForgets(Plain):
    """What is kept for the stream at work is lost when another one takes its turn."""


class _Again(PlainStream):
    def after_block(self, length: int) -> None:
        super().after_block(length)
        self.projected += sum(len(age) for row in self.rows for _, age in row)


@mutant("memory.projected_once", stream=_Again, seen_in="all published implementations")
class ProjectsAllMemoriesAgain(Plain):
    """Keys and values of all memories are made again in every block."""


class _OneBuffer(PlainStream):
    def step(self, tokens: Array) -> Array:
        log_probs = super().step(tokens)
        buffer: Array = self.rules.shared.setdefault((log_probs.shape, str(log_probs.dtype)), log_probs)
        buffer[...] = log_probs
        return buffer


@mutant("memory.stream", stream=_OneBuffer)
class ReturnsOneBuffer(Plain):
    """Every result comes in the same memory."""


class _Writes(PlainStream):
    def step(self, tokens: Array) -> Array:
        tokens.flags.writeable = True
        log_probs = super().step(tokens)
        tokens += 0
        tokens[:, 0] = 0
        return log_probs


@mutant("memory.stream", stream=_Writes)
class ChangesItsTokens(Plain):
    """Writes into its argument."""
