"""From memories in any order, as states are saved, to the tensors that the graph works on, and back."""

import numpy as np

from refspan.export.layout import Array, Layout
from refspan.export.slots import empty_distant
from refspan.memory import NEVER, Memory, expired


def from_memory(layout: Layout, memory: Memory, slots: int) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Recent tensors, distant tensors and counts of one layer that holds these memories.

    Args:
        layout: sizes.
        memory: ages [B, N] as seen from the next query, and contents "key", "value" [B, N, H D] and "span" [B, N].
        slots: C.

    Returns:
        What `streaming_model` calls recent_.. and distant_.., by the rest of their names, and `live` [B, 3].
    """
    batch, heads, size, p = len(memory.age), layout.config.heads, layout.config.head_size, layout.positions
    key, value = (memory.contents[name].reshape(batch, -1, heads, size) for name in ("key", "value"))  # [B, N, H, D]
    recent = {
        "key": np.zeros((batch, p, heads, size), layout.dtype),
        "value": np.zeros((batch, p, heads, size), layout.dtype),
        "span": np.full((batch, p), -np.inf, layout.wide),
    }
    distant = empty_distant(layout, batch, slots, first=0)
    counts = np.zeros((batch, 3), np.int64)
    live = memory.held & ~expired(np, memory.contents["span"], memory.age, layout.config.ramp)
    for b in range(batch):
        near = np.flatnonzero(live[b] & (memory.age[b] <= p))
        place = p - memory.age[b, near]
        recent["key"][b, place], recent["value"][b, place] = key[b, near], value[b, near]
        recent["span"][b, place] = memory.contents["span"][b, near]
        far = np.flatnonzero(live[b] & (memory.age[b] > p))
        slot = slice(1, 1 + len(far))
        distant["key"][b, :, slot, :size] = np.moveaxis(key[b, far], 0, 1)
        distant["value"][b, :, slot, :size] = np.moveaxis(value[b, far], 0, 1)
        distant["span"][b, slot], distant["age"][b, slot] = memory.contents["span"][b, far], memory.age[b, far]
        counts[b] = len(far), len(near), len(far) + len(near)
    return recent, distant, counts


def to_memory(layout: Layout, recent: dict[str, Array], distant: dict[str, Array], restart: Array) -> Memory:
    """The opposite of `from_memory`: what a layer holds, oldest first; rows that are to restart hold nothing."""
    batch, p, size, ramp = len(restart), layout.positions, layout.config.head_size, layout.config.ramp
    age = np.concatenate([distant["age"], np.broadcast_to(np.arange(p, 0, -1), (batch, p))], axis=1)
    span = np.concatenate([distant["span"], recent["span"]], axis=1)
    held = (span > -np.inf) & (span < np.inf) & ~restart[:, None]
    held &= ~expired(np, np.where(held, span, 0), age, ramp)
    slots = int(np.max(np.sum(held, axis=1), initial=0))
    inner = layout.config.heads * size
    out_age = np.full((batch, slots), NEVER)
    contents = {name: np.zeros((batch, slots, inner), layout.wide) for name in ("key", "value")}
    contents["span"] = np.zeros((batch, slots), layout.wide)
    for b in range(batch):
        order = np.flatnonzero(held[b])
        order = order[np.argsort(-age[b, order], kind="stable")]
        places = slice(slots - len(order), slots)
        out_age[b, places], contents["span"][b, places] = age[b, order], span[b, order]
        for name in ("key", "value"):
            every = np.concatenate([np.moveaxis(distant[name][b, :, :, :size], 0, 1), recent[name][b]])  # [C+P, H, D]
            contents[name][b, places] = every[order].reshape(len(order), inner)
    return Memory(out_age, contents)
