"""Memories by the hundred, as kernels meet them: what of them lives, where it stands, how logits run along the slots.

Hypothesis draws what kind of each there is; every list begins with its plainest entry. Numbers come from a drawn seed.
"""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.protocol import Array
from refspan.conformance.strategies import Sizes

LAYOUTS = ("stream", "past", "ring", "newest first", "shuffled", "with empty slots", "wrapping")
"""Where memories stand, see `_ages`."""

LIVES = ("all", "none", "all but a stretch", "a stretch", "ends in the block", "fades", "one")
"""What of a row lives, see `_spans`."""

LOGITS = ("normal", "rising", "falling", "step", "sink", "peak", "negative")
"""How logits run along the slots, see `_targets`."""

TABLES = ("none", "long", "square", "no rows")
"""Positions: none, P = 70, P = D, P = 0."""

RAMPS = (2.0, 16.0, 128.0, 0.5)
"""R: shorter than any block, and longer than most."""

EMPTY = -(2**62)
"""Age of an empty slot."""


@st.composite
def crowds(
    draw: st.DrawFn,
    /,
    dtype: np.dtype,
    *,
    sizes: Sequence[Sizes],
    layouts: Sequence[str] = LAYOUTS,
    lives: Sequence[str] = LIVES,
    logits: Sequence[str] = ("normal",),
    tables: Sequence[str] = TABLES,
) -> AttentionCase:
    """An attention step over many memories."""
    batch, heads, queries, slots, head_size = draw(st.sampled_from(sizes))
    ramp = draw(st.sampled_from(RAMPS))
    rows = [(draw(st.sampled_from(layouts)), draw(st.sampled_from(lives))) for _ in range(batch)]
    run, table = draw(st.sampled_from(logits)), draw(st.sampled_from(tables))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    age = np.stack([_ages(rng, layout, queries, slots) for layout, _ in rows])
    for b, (_, life) in enumerate(rows):
        if life in ("none", "one"):  # nothing is younger than a ramp, or it could not have expired
            age[b] = np.where(age[b] == EMPTY, EMPTY, age[b] + queries + int(np.ceil(ramp)))
    span = np.stack([_spans(rng, life, age[b], queries, ramp) for b, (_, life) in enumerate(rows)])
    notes = [f"row {b}: {layout}, {life} of it lives" for b, (layout, life) in enumerate(rows)]
    positions = {"none": None, "long": 70, "square": head_size, "no rows": 0}[table]

    def fill(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    query, key = fill(batch, heads, queries, head_size), fill(batch, heads, slots, head_size)
    if run != "normal":
        query[..., 0] = np.sqrt(head_size)
        key[..., 0] = [[_targets(rng, run, slots) for _ in range(heads)] for _ in range(batch)]
    return AttentionCase(
        query,
        key,
        fill(batch, heads, slots, head_size),
        Memories(
            span.astype(np.float64 if dtype == np.float64 else np.float32),
            age,
            ramp,
            queries,
            (*notes, f"{run} logits along the slots"),
        ),
        position=None if positions is None else fill(positions, head_size),
        grad_out=fill(batch, heads, queries, head_size),
    )


def _ages(rng: np.random.Generator, layout: str, queries: int, slots: int) -> Array:
    """Ages of one row, distinct but for empty slots."""
    stream = np.arange(slots, 0, -1) - queries  # ending with the block itself
    past = np.arange(slots, 0, -1)
    ages: dict[str, Array] = {
        "stream": stream,
        "past": past,
        "ring": np.roll(stream, int(rng.integers(slots))),
        "newest first": stream[::-1],
        "shuffled": rng.permutation(stream),
        "with empty slots": np.where(rng.random(slots) < 0.4, EMPTY, past),
        "wrapping": past + rng.choice([0, 2**16, 2**31, 2**32], slots),
    }
    return ages[layout]


def _spans(rng: np.random.Generator, life: str, age: Array, queries: int, ramp: float) -> Array:
    """Spans of one row."""
    slots = len(age)
    first, last = np.maximum(age, 1), np.maximum(age + queries - 1, 1)
    lives = 1.001 * last + 50 * rng.random(slots)  # by more than float32 may lose where memories are old
    gone = np.maximum(0.999 * first - ramp - 50 * rng.random(slots), 0)
    stretch = np.zeros(slots, bool)
    start = int(rng.integers(slots))
    stretch[start : start + max(1, int(rng.integers(slots // 4, slots)))] = True
    spans: dict[str, Array] = {
        "all": lives,
        "none": gone,
        "all but a stretch": np.where(stretch, gone, lives),
        "a stretch": np.where(stretch, lives, gone),
        "ends in the block": np.maximum(age + queries * rng.random(slots), 0),
        "fades": np.maximum(first - ramp * rng.random(slots), 0),
        "one": np.where(np.arange(slots) == start, lives, gone),
    }
    return spans[life]


def _targets(rng: np.random.Generator, run: str, slots: int) -> Array:
    """About what the logits of one head are, slot by slot."""
    along = np.linspace(0, 1, slots)
    targets: dict[str, Array] = {
        "rising": 100 * along,
        "falling": 100 - 100 * along,
        "step": np.where(along < rng.random(), 0, 100),
        "sink": np.where(np.arange(slots) == rng.integers(slots), rng.choice([14, 40]), 0),
        "peak": np.full(slots, 84.0),  # of which float32 cannot hold the sum of some dozens of exponentials
        "negative": np.full(slots, -150.0),
    }
    return targets[run]
