"""How many slots the distant memories of a layer get, and moving them into more or fewer (clause BOUND).

A step takes slots that nothing lives in any more for memories that become distant, and its time grows with the number
of slots. So there are few more than are needed, and their number changes seldom: it is a multiple of a step size that
grows with it, and is lowered only when that is worth the move.
"""

from typing import Any

import numpy as np

from refspan.export.layout import Array, Layout
from refspan.export.models import check_graph, type_settings
from refspan.export.source import build_model

GRANULARITY = 64
"""Slots are a multiple of this, which CUDA's kernels want of a bias, and of more when there are more than 2048."""


def slots_for(needed: int, current: int = 0) -> int:
    """Slots for a layer that needs `needed` and has `current`: at most 1/16 more than needed, or 63, if new ones.

    Slots are given back when there would be two multiples fewer, so that a need that goes up and down moves nothing.
    """
    step = GRANULARITY
    while step * 32 <= needed:
        step *= 2
    wanted = -(-needed // step) * step
    return current if wanted <= current < wanted + 2 * step else wanted


def needed_slots(counts: Array, lengths: Array, last_lengths: Array | None, positions: int) -> list[int]:
    """Slots that a block needs of each layer, slot 0 among them: for those it sees, and for those it leaves behind.

    Args:
        counts: [layers, B, 3], `live` after the last block, see `streaming_model`.
        lengths: [B] tokens of the block to come.
        last_lengths: [B] tokens of the last block; None if rows have restarted since then.
        positions: P.
    """
    now, later = counts[:, :, 0], counts[:, :, 2]
    if last_lengths is None or (last_lengths is not lengths and not np.array_equal(lengths, last_lengths)):
        later = now + np.minimum(lengths, counts[:, :, 1])  # at most all of the oldest recent ones move
    within = np.maximum(0, lengths - positions)  # tokens of the block that no longer are recent when it ends
    return [1 + int(most) for most in np.maximum(now, later + within).max(axis=1)]


def empty_distant(layout: Layout, batch: int, slots: int, *, first: int) -> dict[str, Array]:
    """NumPy arrays of a layer's distant memories, none held; slots from `first` on: 0 for all, 1 for those to add."""
    heads, size, count = layout.config.heads, layout.config.head_size, slots - first
    key = np.zeros((batch, heads, count, layout.key_width), layout.dtype)
    value = np.zeros((batch, heads, count, layout.value_width), layout.dtype)
    span = np.full((batch, count), -np.inf, layout.wide)
    age = np.zeros((batch, count), np.int64)
    if first == 0:
        key[:, :, 0, size : size + layout.log_numbers] = 1
        value[:, :, 0, size : size + 1] = 1
        span[:, 0] = np.inf
    return {"key": key, "value": value, "span": span, "age": age}


def repack_model(layout: Layout, opset: int) -> Any:
    """The graph that moves a layer's distant memories into another number of slots."""
    settings: dict[str, str | int] = {"opset": opset, "ir_version": 8 if opset <= 18 else 10}
    settings |= type_settings(type=layout.dtype, wide_type=layout.wide)
    model = build_model("repack", settings, {})
    check_graph(model)
    return model
