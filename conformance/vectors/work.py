"""How much a case may ask for: one that somebody else made may be small on disk, never end, and fill the memory.

What is counted are upper bounds from shapes: every memory is alive, none is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.protocol import Array

MOST_WORK = 1 << 33
"""Of a case, in units of the time of a multiplication in a long product: some ten seconds of the reference."""
MOST_NUMBERS = 1 << 24
"""That a program may have to hold: parameters of each call, memories, states, what a block computes on the way."""
PAIR = 64
"""Units that a query and a memory cost, beside one for each of their numbers."""
ROW = 1 << 19
"""Units that a row of a batch costs in each layer, beside its pairs."""
TENSOR = 1 << 15
"""Units that a parameter costs, beside one for each of its numbers."""


class Work:
    """Adds up, and raises ValueError when it is too much."""

    def __init__(self) -> None:
        self._units = self._numbers = 0

    def add(self, units: int, numbers: int = 0) -> None:
        """Of one part of the case."""
        self._units += units
        self._numbers += numbers
        if self._units > MOST_WORK:
            raise ValueError(f"is too much work, {self._units:.1e} multiplications, expected at most {MOST_WORK:.1e}")
        if self._numbers > MOST_NUMBERS:
            raise ValueError(f"needs room for {self._numbers:.1e} numbers, expected at most {MOST_NUMBERS:.1e}")


def attention_units(shape: tuple[int, ...], memories: int, positions: int = 0, shared: int = 1) -> int:
    """Of one attention step and its gradient.

    Args:
        shape: [B, H, M, D]. None of the sizes counts as 0, or the others could be anything.
        memories: N.
        positions: P, 0 for none.
        shared: the most memories of a row that have the same age; the gradient of positions is a sum for each.
    """
    batch, heads, queries, size = (max(1, n) for n in shape)
    scores = memories + (shared * (positions + queries) if positions else 0)
    return batch * (ROW + heads * queries * max(1, scores) * (PAIR + size))


def most_shared(age: Array) -> int:
    """The most memories of a row [B, N] that have the same age."""
    if not age.size:
        return 1
    ordered = np.sort(age, axis=1)
    first = np.ones_like(ordered, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(first)
    return int(np.diff(starts, append=ordered.size).max())


@dataclass
class _Stream:
    config: ModelConfig
    parameters: int
    positions: int
    batch: int
    memories: int
    """Of a row and layer, the most that there can be by now."""

    @property
    def numbers(self) -> int:
        """Keys and values of all memories."""
        return self.config.layers * self.batch * self.memories * 2 * self.config.heads * self.config.head_size

    def read(self, tokens: Array, length: int) -> tuple[int, int]:
        """Units and numbers of tokens [B, M] that are read in blocks of so many."""
        c, count = self.config, tokens.shape[1]
        self.memories += count
        attention = attention_units((self.batch, c.heads, length, c.head_size), self.memories, self.positions)
        units = -(-count // length) * (c.layers * attention + self.numbers) + tokens.size * self.parameters
        return units, self.of_tokens(tokens.size)

    def of_tokens(self, tokens: int) -> int:
        """Numbers that a model computes of so many tokens."""
        c = self.config
        width = 4 * c.heads * c.head_size + c.feedforward_size + 4 * c.hidden_size
        return tokens * (c.layers * width + c.vocab_size)


class ProgramWork(Work):
    """The same, call by call of a program."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[str, _Stream] = {}

    def parameters(self, params: Mapping[str, Array]) -> None:
        """They are handed over, and looked at."""
        size = _size(params)
        self.add(size + TENSOR * len(params), size)

    def open(
        self,
        stream: str,
        config: ModelConfig,
        params: Mapping[str, Array],
        batch: int,
        memory: Sequence[tuple[Array, Array]] | None,
    ) -> None:
        """A stream, with memories to start with, which may be of any shape yet."""
        given = max((max(hidden.size // config.hidden_size, age.size) for hidden, age in memory or ()), default=0)
        one = _Stream(config, _size(params), len(params["position.weight"]), batch, -(-given // batch))
        self._streams[stream] = one
        self.add(given * one.parameters, one.of_tokens(given))

    def step(self, stream: str, tokens: Array) -> None:
        """Tokens [B, M] are read, in blocks of the config's size."""
        one = self._streams[stream]
        self.add(*one.read(tokens, min(tokens.shape[1], one.config.block_size)))

    def learn(self, stream: str, config: ModelConfig, params: Mapping[str, Array], tokens: Array) -> None:
        """A block of training; the memories of the ones before are there."""
        before = self._streams[stream].memories if stream in self._streams else 0
        one = _Stream(config, _size(params), len(params["position.weight"]), len(tokens), before)
        self._streams[stream] = one
        units, numbers = one.read(tokens, tokens.shape[1])
        self.add(3 * units, numbers + one.parameters)

    def copied(self, stream: str, *, kept: bool) -> None:
        """All that a stream remembers, by a state, a return to one or a reset."""
        numbers = self._streams[stream].numbers
        self.add(numbers, kept * numbers)


def _size(params: Mapping[str, Array]) -> int:
    return sum(int(x.size) for x in params.values())
