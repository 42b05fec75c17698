"""Hypothesis strategies that reach the places where implementations break.

Hypothesis draws the structure (sizes, ramp, what each memory is about to do) and shrinks it: every list below begins
with its plainest entry, so a counterexample ends up as small and as plain as it can be. The numbers that fill arrays
come from a generator with a drawn seed.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.protocol import Array

Sizes = tuple[int, int, int, int, int]
"""B, H, M, N, D."""


def _all_different(sizes: tuple[int, ...]) -> bool:
    """Sizes of 0 and 1 may repeat; no other: a wrong axis or a missing squeeze must not go unseen."""
    large = [size for size in sizes if size > 1]
    return len(large) == len(set(large))


ALIKE: list[Sizes] = [
    (1, 1, 3, 3, 4), (1, 2, 4, 4, 8), (2, 1, 7, 7, 4), (3, 2, 4, 4, 1), (1, 1, 4, 6, 4), (1, 2, 7, 8, 8),
    (2, 2, 3, 6, 4), (3, 3, 4, 9, 1), (2, 2, 2, 2, 2), (4, 4, 4, 4, 4), (1, 5, 3, 5, 8), (2, 1, 4, 2, 8),
]  # fmt: skip
"""Axes of one size: where code asks whether queries and memories are as many, and takes a way of its own."""

SIZES = sorted(
    [s for s in product((1, 2, 3), (1, 2, 5), (1, 3, 4, 7), (1, 2, 6, 9, 13, 0), (1, 4, 8, 5)) if _all_different(s)]
    + 5 * ALIKE,  # every eighth case or so
    key=lambda s: (s[0] * s[1] * s[2] * max(s[3], 1) * s[4], s),
)
"""(B, H, M, N, D), smallest first."""

TILE_SIZES: list[Sizes] = [
    (2, 9, 33, 129, 20), (1, 10, 17, 65, 40), (5, 1, 20, 257, 33), (4, 9, 65, 34, 12),
    (2, 1, 130, 128, 16), (1, 2, 1, 256, 32), (3, 33, 2, 40, 4), (1, 1, 1, 2304, 8),
]  # fmt: skip
"""One more than the tiles that kernels are cut into, along one axis and another; heads that end within a vector of 8
numbers, or of 4. And whole tiles: of memories, of heads of 16 and 32 numbers; a single query with many memories, as in
decoding; more heads than 32, more of rows times heads than 64, more memories than 2048."""

LARGE_SIZES: list[Sizes] = [(1, 1, 128, 320, 128), (6, 2, 96, 96, 64), (1, 16, 3, 1026, 20)]
"""As models have them: whole blocks, heads of 64 and 128 numbers, more rows and heads than tests usually have, and more
memories than the 1024 threads that a GPU runs together."""

RAMPS = (1.0, 2.0, 16.0, 128.0, 4096.0, 0.5, 0.25, 3.0, 2.5, 0.3, 7.7, 100.0, 0.125, 16384.0)
"""Binary, fractional, larger and smaller than any block; some make rounding visible."""

AGES = ("stream", "past", "gaps", "shuffled", "old", "beyond")
"""How one row's ages are laid out, see `_ages`."""

FATES = (
    "lives on",
    "expired",
    "fades",
    "ramp begins",
    "ramp ends",
    "just before the ramp",
    "just on the ramp",
    "just before its end",
    "just beyond its end",
    "span 0",
    "nearly gone",
    "hardly begun to fade",
)
"""What a memory is about to do, as seen by one query of the block, see `_span`."""

LEAST = 2.0**-60
"""The smallest span above 0. Next to 0 itself would be masks whose product with a value has no digits left."""

CONTENTS = ("small integers", "normal", "large logits")


MOST_DRAWN = 16
"""Memories of a row whose fates are drawn, and shrunk, one by one."""


@st.composite
def memories(
    draw: st.DrawFn,
    dtype: np.dtype,
    *,
    batch: int,
    queries: int,
    slots: int,
    ages: tuple[str, ...] = AGES,
    fates: tuple[str, ...] = FATES,
    ramps: tuple[float, ...] = RAMPS,
    widest: int = 131072,
) -> Memories:
    """Memories of `slots` slots in each of `batch` rows; spans in float32 unless `dtype` is float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    ramp = draw(st.sampled_from(ramps))
    span_dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    span = np.zeros((batch, slots), span_dtype)
    age = np.zeros((batch, slots), np.int64)
    notes = []
    for b in range(batch):
        layout = draw(st.sampled_from(ages))
        age[b] = _ages(rng, layout, queries, slots, widest)
        if slots <= MOST_DRAWN:
            row = draw(st.lists(st.sampled_from(fates), min_size=slots, max_size=slots))
        else:
            row = _crowd(rng, fates, slots)
        for i, fate in enumerate(row):
            span[b, i] = _span(rng, fate, int(age[b, i]), queries, ramp, span_dtype)
        said = ", ".join(row[:MOST_DRAWN]) or "no memory"
        notes.append(f"row {b}: {layout} ages, {said}{', ..' * (slots > MOST_DRAWN)}")
    return Memories(span, age, ramp, queries, tuple(notes))


def _crowd(rng: np.random.Generator, fates: tuple[str, ...], slots: int) -> list[str]:
    """Fates of many memories; mostly all of a long stretch are expired, as whole tiles are in a stream that forgets."""
    row = rng.choice(fates, slots)
    if "expired" in fates and rng.integers(4):
        length = int(rng.integers(slots // 4, slots))
        start = int(rng.choice([0, (slots - length) // 2, slots - length]))
        row[start : start + length] = "expired"
    return [str(fate) for fate in row]


def _ages(rng: np.random.Generator, layout: str, queries: int, slots: int, widest: int) -> Array:
    """Ages of one row, distinct."""
    if layout == "stream":  # contiguous, ending with the block itself
        return np.arange(slots, 0, -1) - queries
    if layout == "past":  # contiguous, ending just before the block
        return np.arange(slots, 0, -1)
    if layout == "old":  # anywhere up to the largest age, the two ends included
        ages = 1 + rng.choice(widest, size=slots, replace=False)
        ages[: min(slots, 2)] = (1, widest)[: min(slots, 2)]
        return np.sort(ages)[::-1]
    if layout == "beyond":  # what wraps around in 16 or 32 bits would come out as recent as the others are
        recent = np.arange(slots, 0, -1)
        return np.asarray(recent + rng.choice([0, 2**15, 2**16, 2**17, 2**32], size=slots))
    ages = np.sort(rng.choice(np.arange(1 - queries, 3 * slots + 2), size=slots, replace=False))[::-1]
    return rng.permutation(ages) if layout == "shuffled" else ages


def _span(rng: np.random.Generator, fate: str, age: int, queries: int, ramp: float, dtype: np.dtype) -> float:
    """A span >= 0 that meets this fate at a randomly chosen query, as far as a span >= 0 can."""
    last = max(age + queries - 1, 1)
    first = max(age, 1)
    distance = int(rng.integers(first, last + 1))
    number = dtype.type
    begins, ends = number(distance), number(max(distance - ramp, 0))
    upward, downward = number(np.inf), number(0)
    spans = {
        "lives on": last + 50 * rng.random(),
        "expired": first - ramp - 50 * rng.random(),
        "fades": distance - ramp * rng.random(),
        "ramp begins": begins,
        "ramp ends": ends,
        "just before the ramp": np.nextafter(begins, upward),
        "just on the ramp": np.nextafter(begins, downward),
        "just before its end": np.nextafter(ends, upward) if ends else LEAST,
        "just beyond its end": np.nextafter(ends, downward),
        "span 0": 0.0,
        "nearly gone": distance - ramp + ramp * 2.0**-20,
        "hardly begun to fade": distance - ramp * 2.0**-18,
    }
    return max(float(number(spans[fate])), 0.0)


@st.composite
def attention_cases(
    draw: st.DrawFn,
    /,
    dtype: np.dtype,
    *,
    position: bool | None = None,
    reach: tuple[int, ...] | None = None,
    contents: tuple[str, ...] = CONTENTS,
    sizes: list[Sizes] | None = None,
    **about_memories: Any,
) -> AttentionCase:
    """A whole attention step; `position` None means sometimes, `reach` how far, to distance P, None: it depends."""
    batch, heads, queries, slots, head_size = draw(st.sampled_from(sizes or SIZES))
    held = draw(memories(dtype, batch=batch, queries=queries, slots=slots, **about_memories))
    style = draw(st.sampled_from(contents))
    with_position = draw(st.booleans()) if position is None else position
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    reach = reach or ((1, 2, 5, 10) if slots <= MOST_DRAWN else (70, 130) if slots <= 256 else (300,))
    alike = (batch, heads, queries, slots, head_size) in ALIKE
    positions = int(rng.choice([p for p in reach if p not in (queries, slots, head_size) or p < 2 or alike]))

    def fill(*shape: int) -> Array:
        if style == "small integers":
            return rng.integers(-2, 3, shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)

    query, key, value = (
        fill(batch, heads, queries, head_size),
        fill(batch, heads, slots, head_size),
        fill(batch, heads, slots, head_size),
    )
    if style == "large logits":
        key = with_large_logits(query, key, 1e4)
    return AttentionCase(
        query,
        key,
        value,
        replace(held, notes=(*held.notes, style)),
        position=fill(positions, head_size) if with_position else None,
        grad_out=fill(batch, heads, queries, head_size),
    )


def of_each_size(sizes: list[Sizes], **about: Any) -> Callable[[np.dtype], list[st.SearchStrategy[AttentionCase]]]:
    """Attention steps drawn as `about` says, of each of these sizes as many."""
    return lambda dtype: [attention_cases(dtype, sizes=[one], **about) for one in sizes]


def with_large_logits(query: Array, key: Array, size: float) -> Array:
    """Keys scaled so that the largest logit of each batch row and head has about this `size`.

    In half precision the product before the division by sqrt(D) has to stay in range too.
    """
    wide = key.astype(np.float64)
    head_size = query.shape[-1]
    product_ = np.abs(query.astype(np.float64) @ np.swapaxes(wide, -1, -2))
    largest = np.max(product_, axis=(-2, -1), keepdims=True, initial=1e-3)
    limit = min(size * np.sqrt(head_size), float(np.finfo(key.dtype).max) / 4)
    # a key next to which the chosen query is small may still overflow the dtype of the key itself
    scaled = wide * (limit / np.maximum(largest, 1e-3))
    room = float(np.finfo(key.dtype).max) / 4
    return np.asarray(np.clip(scaled, -room, room).astype(key.dtype))
