"""Level attention: `span_attention`, forward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import AttentionCase
from refspan.conformance.registry import Probe, check
from refspan.conformance.strategies import (
    LARGE_SIZES,
    RAMPS,
    SIZES,
    TILE_SIZES,
    attention_cases,
    of_each_size,
    with_large_logits,
)
from refspan.conformance.tolerance import Expected, attention_bounds

Cases = Callable[[np.dtype], st.SearchStrategy[AttentionCase]]


def some(**about: Any) -> Cases:
    """Attention steps drawn as `about` says."""
    return lambda dtype: attention_cases(dtype, **about)


SEVERAL_MEMORIES = [s for s in SIZES if s[3] > 1]
SEVERAL_ROWS = [s for s in SIZES if s[0] > 1 and s[3] > 0]
PLAIN: dict[str, Any] = {"sizes": SEVERAL_MEMORIES, "ages": ("past", "stream"), "contents": ("normal",)}
NEEDS = ["span_attention"]


def compare_output(probe: Probe, case: AttentionCase) -> None:
    """The output is that of the reference."""
    (got,) = probe.attention(case)
    probe.compare("output", got, attention_bounds(case).expected_output())


@check("attention.output", clauses=["MASK", "LOGIT", "WEIGHT", "OUTPUT"], needs=NEEDS, cases=some())
def output(probe: Probe, case: AttentionCase) -> None:
    """The output is that of the reference."""
    compare_output(probe, case)


@check("attention.position", clauses=["LOGIT"], needs=NEEDS, of_positions=True,
       cases=some(position=True, contents=("normal",)))  # fmt: skip
def position(probe: Probe, case: AttentionCase) -> None:
    """Position scores go by distance, 1 to P, wherever a memory stands; farther memories get none."""
    compare_output(probe, case)


@check("attention.no_positions", clauses=["LOGIT"], needs=NEEDS, of_positions=True,
       cases=some(position=True, reach=(0,), **PLAIN))  # fmt: skip
def no_positions(probe: Probe, case: AttentionCase) -> None:
    """A position table without rows, P = 0, adds nothing."""
    compare_output(probe, case)


def _one_survivor(dtype: np.dtype) -> st.SearchStrategy[AttentionCase]:
    """Memories of which one is left for the whole block, with a mask of 2^-23 at the last query (half: 2^-10).

    The last query is exactly R steps away and the span is R * 2^-23. Whichever way a mask is computed in float32, all
    of its sums are exact, so no rounding can lose the survivor.
    """
    left = 2.0**-10 if dtype == np.float16 else 2.0**-23

    def place(case: AttentionCase, ramp: float, seed: int) -> AttentionCase:
        rng = np.random.default_rng(seed)
        batch, _, queries, slots, _ = case.sizes
        span = np.zeros_like(case.memories.span)
        age = np.tile(np.arange(slots) + int(ramp), (batch, 1))  # a ramp away and more: with a span of 0 expired
        survivor = rng.integers(0, slots, batch)
        span[range(batch), survivor] = ramp * left
        age[range(batch), survivor] = ramp - (queries - 1)
        note = f"one survivor, with a mask of {left:.3g} at the last query"
        return case.with_memories(span=span, age=age, ramp=ramp, notes=(note,))

    sizes = [s for s in SIZES if s[3] > 0]
    plain = attention_cases(
        dtype, sizes=sizes, ages=("past",), fates=("lives on",), contents=("normal",), position=False
    )
    return st.builds(place, plain, st.sampled_from((8.0, 16.0)), st.integers(0, 2**16))


@check("attention.lone_survivor", clauses=["WEIGHT"], needs=NEEDS, cases=_one_survivor)
def lone_survivor(probe: Probe, case: AttentionCase) -> None:
    """A lone surviving memory gets weight exactly 1, however small its mask: no epsilon in the denominator."""
    (got,) = probe.attention(case)
    survivor = np.argmax(case.memories.span, axis=1)
    value = np.stack([case.value[b, :, i] for b, i in enumerate(survivor)]).astype(np.float64)  # [B, H, D]
    expected = np.broadcast_to(value[:, :, None], got.shape)
    info = np.finfo(got.dtype)
    probe.compare("output", got, Expected(expected, 8 * float(info.eps) * np.abs(expected) + float(info.tiny)))


def _faint(dtype: np.dtype) -> st.SearchStrategy[AttentionCase]:
    """As `_one_survivor`, but beside one full memory, over whose logit the survivor's own stands by log(1 / mask).

    Or by more, as far as the dtype still has digits for what is left to the full one, exp(-more).
    """
    more = {np.float16: (0.0, 1.0), np.float32: (0.0, 3.0, 6.0, 9.0), np.float64: (0.0, 9.0, 18.0)}[dtype.type]

    def place(case: AttentionCase, above: float, seed: int) -> AttentionCase:
        rng = np.random.default_rng(seed)
        batch, heads, queries, slots, head_size = case.sizes
        survivor = np.argmax(case.memories.span, axis=1)
        left = float(np.max(case.memories.span)) / case.memories.ramp
        signs = rng.choice([-1, 1], (batch, heads, head_size)).astype(dtype)
        query = np.repeat(signs[:, :, None], queries, axis=2)
        key = np.zeros_like(case.key)
        key[range(batch), :, survivor] = signs * ((above - np.log(left)) / np.sqrt(head_size))
        span = case.memories.span.copy()
        span[range(batch), (survivor + 1) % slots] = 1024
        return replace(
            case.with_memories(span=span, notes=(*case.memories.notes, "beside a full one")), query=query, key=key
        )

    several = _one_survivor(dtype).filter(lambda case: case.sizes[3] > 1)
    return st.builds(place, several, st.sampled_from(more), st.integers(0, 2**16))


@check("attention.faint", clauses=["WEIGHT", "MASK"], needs=NEEDS, cases=_faint)
def faint(probe: Probe, case: AttentionCase) -> None:
    """A mask of 2^-23 counts for just that beside a full memory: there is no floor under it or its logarithm."""
    (got,) = probe.attention(case)
    expected = attention_bounds(case).output
    # All masks are exact, and two weights differ from 0: w / (1 + w) with w = m exp(gap), moved by w's relative error
    # times w / (1 + w)^2, which is at most 1 / 4, and 1 / w. Both values may be the largest there is.
    gap, u = float(np.max(np.abs(case.key))) * np.sqrt(case.sizes[4]), float(np.finfo(got.dtype).eps)
    error = np.expm1(u * ((2 * case.sizes[4] + 16) * gap + 8))
    span, ramp = case.memories.span, case.memories.ramp
    w = float(np.min(np.max(span, axis=1, where=span < ramp, initial=0))) / ramp * np.exp(gap)
    largest = np.max(np.abs(case.value.astype(np.float64)), axis=(2, 3), keepdims=True)
    moved = 2 * error * min(0.25, (1 + error) / w)
    bound = (moved + (case.sizes[3] + 8) * u) * np.broadcast_to(largest, got.shape)
    probe.compare("output", got, Expected(expected, bound))


@check(
    "attention.empty",
    clauses=["EMPTY"],
    needs=NEEDS,
    cases=some(fates=("expired", "ramp ends", "span 0"), ramps=(1.0, 2.0, 0.5), contents=("normal", "large logits")),
)
def empty(probe: Probe, case: AttentionCase) -> None:
    """A query that sees no memory outputs 0: not NaN, and not the mean of all values."""
    compare_output(probe, case)


@check("attention.large_logits", clauses=["WEIGHT"], needs=NEEDS, cases=some(contents=("large logits",)))
def large_logits(probe: Probe, case: AttentionCase) -> None:
    """Logits of +-10000 neither overflow nor underflow, on the plateau or on the ramp."""
    compare_output(probe, case)


def _dead(case: AttentionCase) -> np.ndarray:
    """[B, N], true where a memory is expired, beyond rounding, for every query of the block."""
    return np.asarray(np.all(attention_bounds(case).interval.high == 0, axis=1))


@check(
    "attention.expired_logit",
    clauses=["WEIGHT"],
    needs=NEEDS,
    cases=some(
        sizes=SEVERAL_MEMORIES, fates=("expired", "lives on", "fades"), ramps=(1.0, 2.0, 0.5), contents=("normal",)
    ),
)
def expired_logit(probe: Probe, case: AttentionCase) -> None:
    """An expired memory influences nothing, however large its logit."""
    dead = _dead(case)
    huge = with_large_logits(case.query, case.key, 1e30 if case.key.dtype != np.float16 else 1e4)
    case = replace(case, key=np.where(dead[:, None, :, None], huge, case.key))
    compare_output(probe, case)


@check(
    "attention.expired_contents",
    clauses=["WEIGHT", "DROP"],
    needs=NEEDS,
    cases=some(
        sizes=SEVERAL_MEMORIES, fates=("expired", "lives on", "fades"), ramps=(1.0, 2.0, 0.5), contents=("normal",)
    ),
)
def expired_contents(probe: Probe, case: AttentionCase) -> None:
    """What an expired memory contains changes nothing, nor does dropping it."""
    dead = _dead(case)[:, None, :, None]
    other = replace(
        case,
        key=np.where(dead, -3 * case.key, case.key),
        value=np.where(dead, 100, case.value).astype(case.value.dtype),
    )
    kept = ~np.all(_dead(case), axis=0)
    dropped = case.select(slots=kept)
    bound = attention_bounds(case).expected_output().bound
    first, second, third = probe.attention(case, other, dropped)
    probe.agree("output with other contents in expired memories", second, first, bound)
    probe.agree("output without expired memories", third, first, bound)


@check("attention.weights", clauses=["WEIGHT"], needs=NEEDS, cases=some())
def weights(probe: Probe, case: AttentionCase) -> None:
    """Weights sum to one: values of ones give ones, wherever any memory is live."""
    case = replace(case, value=np.ones_like(case.value))
    (got,) = probe.attention(case)
    interval = attention_bounds(case).interval
    alive = np.any(interval.low > 0, axis=-1)[:, None, :, None]  # [B, 1, M, 1]
    gone = np.all(interval.high == 0, axis=-1)[:, None, :, None]
    u = np.finfo(got.dtype).eps
    bound = np.where(alive, (case.sizes[3] + 8) * u, np.where(gone, 0, 1 + u))
    probe.compare("output for values of ones", got, Expected(alive.astype(np.float64), bound))


@check("attention.slot_order", clauses=["DROP"], needs=NEEDS, cases=some(sizes=SEVERAL_MEMORIES))
def slot_order(probe: Probe, case: AttentionCase) -> None:
    """The order in which memories stand changes nothing."""
    order = np.random.default_rng(case.sizes[3]).permutation(case.sizes[3])
    first, second = probe.attention(case, case.select(slots=order))
    probe.agree("output with memories in another order", second, first, attention_bounds(case).expected_output().bound)


@check("attention.batch_mates", clauses=["DROP"], needs=NEEDS, cases=some(sizes=SEVERAL_ROWS))
def batch_mates(probe: Probe, case: AttentionCase) -> None:
    """A row of a batch gets the same output alone as beside others, that have other spans, ages and contents."""
    (together,) = probe.attention(case)
    alone = [case.select(rows=slice(b, b + 1)) for b in range(case.sizes[0])]
    bound = attention_bounds(case).expected_output().bound
    probe.agree("output of a row alone", np.concatenate(probe.attention(*alone)), together, bound)


@check("attention.block_split", clauses=["MASK", "PAST", "AGE"], needs=NEEDS, cases=some())
def block_split(probe: Probe, case: AttentionCase) -> None:
    """A block of n queries gives what n blocks of one give, whose ages grow by one each."""
    (block,) = probe.attention(case)
    ones = [case.select(queries=slice(m, m + 1)) for m in range(case.sizes[2])]
    alone = np.concatenate(probe.attention(*ones), axis=2)
    probe.agree("output of one query at a time", alone, block, attention_bounds(case).expected_output().bound)


def _all_fading(dtype: np.dtype) -> st.SearchStrategy[AttentionCase]:
    """All memories on the ramp for all queries, with all numbers on a binary grid."""

    def place(case: AttentionCase, ramp: float, seed: int) -> AttentionCase:
        batch, _, queries, slots, _ = case.sizes
        rng = np.random.default_rng(seed)
        age = np.tile(np.arange(slots, 0, -1) + 2 * int(ramp), (batch, 1))  # a ramp may be taken off the spans
        span = age - rng.integers(1, int(ramp) - queries, (batch, slots))
        note = "every memory on the ramp for every query"
        return case.with_memories(span=span.astype(case.memories.span.dtype), age=age, ramp=ramp, notes=(note,))

    sizes = [s for s in SIZES if s[3] > 0]
    plain = attention_cases(
        dtype, sizes=sizes, ages=("past",), fates=("lives on",), contents=("small integers", "normal")
    )
    return st.builds(place, plain, st.sampled_from((16.0, 64.0)), st.integers(0, 2**16))


@check("attention.mask_scale", clauses=["WEIGHT"], needs=NEEDS, cases=_all_fading)
def mask_scale(probe: Probe, case: AttentionCase) -> None:
    """Halving every mask alike changes nothing: only proportions count."""
    memories = case.memories
    # 1 + (e' - t) / 2R = (1 + (e - t) / R) / 2   with   e' = e - R
    halved = case.with_memories(span=memories.span - memories.ramp, ramp=2 * memories.ramp)
    first, second = probe.attention(case, halved)
    probe.agree("output with every mask halved", second, first, attention_bounds(case).expected_output().bound)


@check(
    "attention.wide",
    clauses=["WIDTH"],
    needs=NEEDS,
    cases=some(ages=("old", "beyond"), ramps=tuple(r for r in RAMPS if r >= 1), contents=("normal",)),
)
def wide(probe: Probe, case: AttentionCase) -> None:
    """Spans and ages up to 131072 keep single steps apart, whatever the dtype of query, key and value."""
    compare_output(probe, case)


@check(
    "attention.tiles",
    clauses=["OUTPUT", "LOGIT"],
    needs=NEEDS,
    cases=of_each_size(TILE_SIZES, contents=("normal",)),
    cost=5,
)
def tiles(probe: Probe, case: AttentionCase) -> None:
    """Sizes of a kernel's tiles and just beyond: several of them, whole ones where all is expired, and half ones."""
    compare_output(probe, case)


@check(
    "attention.large",
    clauses=["OUTPUT", "LOGIT"],
    needs=NEEDS,
    cases=of_each_size(LARGE_SIZES, position=True, contents=("normal",)),
    cost=10,
)
def large(probe: Probe, case: AttentionCase) -> None:
    """Sizes that models have: hundreds of queries and memories, heads of 64 and 128 numbers, six rows."""
    compare_output(probe, case)
