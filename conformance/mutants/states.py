"""Wrong streams: states and resets that meet, states of other sizes, questions that change what they ask about."""

from typing import Any

from refspan.conformance.mutants.plain import Array, Plain, PlainStream
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
