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

from refspan.arrays import Array, check_dtype, check_shape, device_of
from refspan.visibility import group_of

NEVER = -(2**62)
"""Age of an empty slot. It grows with the others, and would pass 0 after 10^18 steps."""


@dataclass(frozen=True)
class Memory:
    """The memories of one layer for each row of a batch, in N slots; a value, never changed in place.

    With one exception: what is appended to a memory with `room` is written into that room, where nothing is held. So a
    memory with room has one successor. Those that leave this package have none.
    """

    age: Array
    """[B, N] int64, steps from each memory to the next block's first query; `NEVER` where a slot is empty."""
    contents: Mapping[str, Array]
    """Each [B, N, ..]."""
    room: int = 0
    """How many of the slots, the last ones, are empty in all rows: `append` writes there first, sparing a copy."""

    @property
    def slots(self) -> int:
        """What the longest row of the batch holds, the room not counted."""
        return int(self.age.shape[1]) - self.room

    @property
    def held(self) -> Array:
        """Which slots are not empty.   [B, N] bool."""
        return self.age > NEVER // 2

    def append(self, xp: Any, contents: Mapping[str, Array]) -> "Memory":
        """With the M memories of a block, whose first query is at hand: ages 0, -1, .., 1 - M.   each [B, M, ..]."""
        batch, queries = next(iter(contents.values())).shape[:2]
        age = own_ages(xp, batch, queries, device_of(self.age))
        before, after = self.slots, self.slots + queries
        if self.room < queries:
            kept = {name: x[:, :before, ...] for name, x in self.contents.items()}
            both = {name: xp.concat([kept[name], new], axis=1) for name, new in contents.items()}
            return Memory(xp.concat([self.age[:, :before], age], axis=1), both)
        for name, new in contents.items():
            self.contents[name][:, before:after, ...] = new
        age = xp.concat([self.age[:, :before], age, self.age[:, after:]], axis=1)
        return Memory(age, self.contents, self.room - queries)

    def advance(self, queries: int) -> "Memory":
        """After a block of M queries: every age grows by M (AGE)."""
        return Memory(self.age + queries, self.contents, self.room)

    def drop(self, xp: Any, unwanted: Array, rank: Array | None = None, room: int = 0) -> "Memory":
        """Without the memories marked in `unwanted` [B, N], in as few slots as the longest row needs (BOUND).

        Args:
            xp: array namespace.
            unwanted: [B, N] bool.
            rank: [B, N] int64 >= 0: those that are left stand in its order, behind the empty slots of their row; None
                for the order that they have.
            room: empty slots to add, for the next block.
        """
        wanted = self.held & ~unwanted
        counts = [int(count) for count in xp.sum(xp.astype(wanted, xp.int64), axis=1)]
        batch, slots, total = len(counts), max(counts, default=0), int(self.age.shape[1])
        rank = xp.where(wanted, xp.zeros_like(self.age) if rank is None else rank, -1)  # empty slots come first
        if slots == total and min(counts) == slots and not bool(xp.any(rank[:, 1:] < rank[:, :-1])):
            return self
        order = xp.argsort(rank, axis=1, stable=True)[:, total - slots :]
        order = xp.concat([order, xp.zeros((batch, room), dtype=order.dtype, device=device_of(order))], axis=1)
        rows = xp.arange(batch, dtype=order.dtype, device=device_of(order))[:, None]
        places = xp.reshape(order + rows * total, (-1,))

        def keep(x: Array) -> Array:
            """[B, N, ..] -> [B, slots + room, ..]."""
            sizes = x.shape[2:]
            return xp.reshape(xp.take(xp.reshape(x, (-1, *sizes)), places, axis=0), (batch, slots + room, *sizes))

        number = xp.arange(slots + room, dtype=xp.int64, device=device_of(order))
        age = xp.where(keep(wanted) & (number < slots), keep(self.age), NEVER)
        return Memory(age, {name: keep(x) for name, x in self.contents.items()}, room)

    def forget_row(self, xp: Any, row: int) -> "Memory":
        """With one row of the batch emptied; the others hold what they held."""
        rows = xp.arange(self.age.shape[0], dtype=xp.int64, device=device_of(self.age))
        empty = xp.full_like(self.age, NEVER)
        return Memory(xp.where((rows == row)[:, None], empty, self.age), self.contents, self.room)


def own_ages(xp: Any, batch: int, queries: int, device: Any) -> Array:
    """Ages of a block's own memories, as seen from its first query: 0, -1, .., 1 - M.   [B, M]."""
    age = -xp.arange(queries, dtype=xp.int64, device=device)
    return xp.broadcast_to(age, (batch, queries))


def check_ages(xp: Any, name: str, age: Array, shape: tuple[int | str, ...]) -> None:
    """Raise unless `age` is int64 of this shape, each at least 1 or that of an empty slot."""
    check_shape(name, age, shape)
    check_dtype(xp, name, age, ("int64",))
    wrong = (age < 1) & (age > NEVER // 2)
    if bool(xp.any(wrong)):
        raise ValueError(f"{name}: got {int(xp.min(xp.where(wrong, age, 1)))}, expected at least 1")


def expired(xp: Any, span: Array, age: Array, ramp: float) -> Array:
    """Memories that no later query can see: age - span >= R (DROP).   [B, N], [B, N] -> [B, N] bool.

    Args:
        xp: array namespace.
        span: steps, not shortened (SHORTEN).
        age: as seen from the next query.
        ramp: R.
    """
    return xp.astype(age, span.dtype) - span >= ramp


def after_block(
    xp: Any, memory: Memory, span: Array, queries: int, *, ramp: float, positions: int, room: int = 0
) -> Memory:
    """What is left of `memory` after a block: aged (AGE), without what has expired (DROP).

    In the order in which attention over the next block reads it without a copy, if that block is as long as this one.

    Args:
        xp: array namespace.
        memory: held during the block, its own memories included.
        span: [B, N] steps, not shortened (SHORTEN).
        queries: M; 0 to keep ages as they are.
        ramp: R.
        positions: P.
        room: empty slots to add.
    """
    memory = memory.advance(queries)
    rank = group_of(xp, span, memory.age, queries=max(1, queries), ramp=ramp, positions=positions)
    return memory.drop(xp, expired(xp, span, memory.age, ramp), rank, room)


def empty_memory(
    xp: Any, batch: int, sizes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, Any], device: Any
) -> Memory:
    """A memory of no slots (START); `sizes` are those of one slot's contents."""
    contents = {name: xp.zeros((batch, 0, *size), dtype=dtypes[name], device=device) for name, size in sizes.items()}
    return Memory(xp.zeros((batch, 0), dtype=xp.int64, device=device), contents)
