"""What a counterexample looks like: mask and weights of one row of the batch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.protocol import Array
from refspan.conformance.report import Picture
from refspan.conformance.tolerance import attention_bounds, mask_interval

MOST = 48
"""Queries, and memories, that a picture has room for; the first ones."""
MOST_HEADS = 4
"""Likewise, each of which gets a picture."""


def pictures_of(case: Any, row: int) -> Iterator[Picture]:
    """Mask, and weights of each head, of one row; nothing of cases that are not about one attention step."""
    memories = case.memories if isinstance(case, AttentionCase) else case
    if not isinstance(memories, Memories) or not memories.span.size:
        return
    row = min(row, len(memories.span) - 1)
    one = replace(memories, span=memories.span[row : row + 1], age=memories.age[row : row + 1])
    yield _picture(f"mask, row {row}", mask_interval(one).exact[0])
    if isinstance(case, AttentionCase):
        for head, weights in enumerate(attention_bounds(case).a[row][:MOST_HEADS]):
            yield _picture(f"weights, row {row}, head {head}", weights)


def _picture(title: str, numbers: Array) -> Picture:
    shown = np.clip(np.nan_to_num(numbers[:MOST, :MOST]), 0, 1)
    return Picture(title, tuple(tuple(round(float(x), 4) for x in line) for line in shown))
