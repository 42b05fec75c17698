"""How many slots the distant memories of a layer get, and moving them into more or fewer (clause BOUND).

A step takes slots that nothing lives in any more for memories that become distant, and its time grows with the number
of slots. So there are few more than are needed, and their number changes seldom: it is a multiple of a step size that
grows with it, and is lowered only when a fifth would become free.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refspan.export.models import check_graph, type_settings
from refspan.export.source import build_model
from refspan.export.streaming import Array, Layout

GRANULARITY = 64
"""Slots are a multiple of this, which CUDA's kernels want of a bias, and of more when there are more than 2048."""

SPARE = 0.8
"""Slots are given back when no more than this part of them is needed."""


def slots_for(needed: int, current: int = 0) -> int:
    """Slots for a layer that has `current` ones and needs `needed`: at most 1/16 more than needed, or 63, if new."""
    step = GRANULARITY
    while step * 32 <= needed:
        step *= 2
    wanted = -(-needed // step) * step
    return current if SPARE * current < wanted <= current else wanted


def needed_slots(counts: Array, lengths: Array, last_lengths: Array | None, positions: int) -> int:
    """Slots that a block needs of one layer, slot 0 among them.

    Args:
        counts: [B, 3] the layer's `live` after the last block, see `streaming_model`.
        lengths: [B] tokens of the block to come.
        last_lengths: [B] tokens of the last block; None if rows have restarted since then.
        positions: P.
    """
    distant, recent, later = (counts[:, i] for i in range(3))
    if last_lengths is None or not np.array_equal(lengths, last_lengths):
        # At most the oldest of the recent memories become distant, and tokens that come and go within the block.
        later = distant + np.minimum(lengths, recent) + np.maximum(0, lengths - positions)
    return 1 + int(np.max(later))


@dataclass(frozen=True)
class Distant:
    """The distant memories of one layer, as ONNX Runtime holds them."""

    key: Any
    value: Any
    span: Any
    age: Any

    @property
    def slots(self) -> int:
        """C"""
        return int(self.span.shape()[1])


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
