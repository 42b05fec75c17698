"""What a layer remembers between blocks, and how it forgets (clauses AGE, DROP, BOUND, START).

A memory is a slot with an age and some contents: its hidden state while parameters change, or its key, value and span
once they are frozen (CACHE). Rows of a batch may hold different numbers of memories, so a slot may be empty. It then
has the age NEVER: a step that has not come yet and never will, which no query sees (PAST). Nothing else has to know.

No slot knows when its step was, only how long ago: a memory is gone after span + R steps, so its age stays a small
whole number in a stream of any length, and remaining spans keep all their digits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refspan.arrays import Array, device_of

NEVER = -(2**62)
"""Age of an empty slot. It grows with the others, and would pass 0 after 10^18 steps."""


@dataclass(frozen=True)
class Memory:
    """The memories of one layer for each row of a batch, in N slots; a value, never changed in place."""

    age: Array
    """[B, N] int64, steps from each memory to the next block's first query; `NEVER` where a slot is empty."""
    contents: Mapping[str, Array]
    """Each [B, N, ..]."""

    @property
    def slots(self) -> int:
        """N, what the longest row of the batch holds."""
        return int(self.age.shape[1])

    @property
    def held(self) -> Array:
        """Which slots are not empty.   [B, N] bool."""
        return self.age > NEVER // 2

    def append(self, xp: Any, contents: Mapping[str, Array]) -> "Memory":
        """With the M memories of a block, whose first query is at hand: ages 0, -1, .., 1 - M.   each [B, M, ..]."""
        batch, queries = next(iter(contents.values())).shape[:2]
        age = own_ages(xp, batch, queries, device_of(self.age))
        both = {name: xp.concat([self.contents[name], new], axis=1) for name, new in contents.items()}
        return Memory(xp.concat([self.age, age], axis=1), both)

    def advance(self, queries: int) -> "Memory":
        """After a block of M queries: every age grows by M (AGE)."""
        return Memory(self.age + queries, self.contents)

    def drop(self, xp: Any, unwanted: Array, rank: Array | None = None) -> "Memory":
        """Without the memories marked in `unwanted` [B, N], in as few slots as the longest row needs (BOUND).

        `rank` [B, N] int64: those that are left stand in its order, else in the order that they had.
        """
        wanted = self.held & ~unwanted
        counts = [int(count) for count in xp.sum(xp.astype(wanted, xp.int64), axis=1)]
        batch, slots = len(counts), max(counts, default=0)
        rank = xp.where(wanted, xp.zeros_like(self.age) if rank is None else rank, 2**62)
        if slots == self.slots and min(counts) == slots and not bool(xp.any(rank[:, 1:] < rank[:, :-1])):
            return self
        order = xp.argsort(rank, axis=1, stable=True)[:, :slots]
        rows = xp.arange(batch, dtype=xp.int64, device=device_of(order))[:, None]
        places = xp.reshape(order + rows * self.slots, (-1,))

        def keep(x: Array) -> Array:
            """[B, N, ..] -> [B, slots, ..]."""
            sizes = x.shape[2:]
            return xp.reshape(xp.take(xp.reshape(x, (-1, *sizes)), places, axis=0), (batch, slots, *sizes))

        age = xp.where(keep(wanted), keep(self.age), NEVER)
        return Memory(age, {name: keep(x) for name, x in self.contents.items()})

    def forget_row(self, xp: Any, row: int) -> "Memory":
        """With one row of the batch emptied; the others hold what they held."""
        rows = xp.arange(self.age.shape[0], dtype=xp.int64, device=device_of(self.age))
        empty = xp.full_like(self.age, NEVER)
        return Memory(xp.where((rows == row)[:, None], empty, self.age), self.contents)


def own_ages(xp: Any, batch: int, queries: int, device: Any) -> Array:
    """Ages of a block's own memories, as seen from its first query: 0, -1, .., 1 - M.   [B, M]."""
    age = -xp.arange(queries, dtype=xp.int64, device=device)
    return xp.broadcast_to(age, (batch, queries))


def expired(xp: Any, span: Array, age: Array, ramp: float) -> Array:
    """Memories that no later query can see: age - span >= R (DROP).   [B, N], [B, N] -> [B, N] bool.

    Args:
        xp: array namespace.
        span: steps, not shortened (SHORTEN).
        age: as seen from the next query.
        ramp: R.
    """
    return xp.astype(age, span.dtype) - span >= ramp


def empty_memory(
    xp: Any, batch: int, sizes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, Any], device: Any
) -> Memory:
    """A memory of no slots (START); `sizes` are those of one slot's contents."""
    contents = {name: xp.zeros((batch, 0, *size), dtype=dtypes[name], device=device) for name, size in sizes.items()}
    return Memory(xp.zeros((batch, 0), dtype=xp.int64, device=device), contents)
