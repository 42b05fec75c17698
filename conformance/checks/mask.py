"""Level mask: `soft_mask` alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import Memories
from refspan.conformance.registry import Probe, check
from refspan.conformance.strategies import FATES, RAMPS, SIZES, memories
from refspan.conformance.tolerance import expected_mask, mask_interval

LARGE = ((2, 33, 129), (1, 128, 512), (6, 65, 65), (1, 300, 1025), (5, 20, 257))
"""B, M, N beyond those of a kernel's tiles, and as models have them."""


def some(
    sizes: Sequence[tuple[int, int, int]] = (), **about: object
) -> Callable[[np.dtype], st.SearchStrategy[Memories]]:
    """Memories of these sizes (B, M, N), or of all the small ones that there are, drawn as `about` says."""

    def strategy(dtype: np.dtype) -> st.SearchStrategy[Memories]:
        small = sorted({(batch, queries, slots) for batch, _, queries, slots, _ in SIZES})
        return st.sampled_from(sizes or small).flatmap(
            lambda s: memories(dtype, batch=s[0], queries=s[1], slots=s[2], **about)  # type: ignore[arg-type]
        )

    return strategy


BINARY_RAMPS = tuple(ramp for ramp in RAMPS if np.frexp(ramp)[0] == 0.5)


@check("mask.values", clauses=["MASK", "PAST", "WIDTH"], needs=["soft_mask"], cases=some())
def values(probe: Probe, asked: Memories) -> None:
    """The mask is clip(1 + (span - distance) / R, 0, 1), and 0 where the distance is below 1."""
    (mask,) = probe.soft_mask(asked)
    probe.compare("mask", mask, expected_mask(asked))


@check(
    "mask.kinks",
    clauses=["MASK"],
    needs=["soft_mask"],
    cases=some(
        fates=("ramp begins", "ramp ends", "just before the ramp", "just beyond its end", "span 0"),
        ages=("stream", "past", "gaps", "shuffled"),
        ramps=BINARY_RAMPS,
    ),
)
def kinks(probe: Probe, asked: Memories) -> None:
    """The mask is exactly 1 when the span ends, exactly 0 when the ramp ends, and between them in between."""
    (mask,) = probe.soft_mask(asked)
    probe.compare("mask", mask, expected_mask(asked))


@check("mask.past", clauses=["PAST"], needs=["soft_mask"], cases=some(ages=("stream",), fates=("lives on", "fades")))
def past(probe: Probe, asked: Memories) -> None:
    """A query sees neither itself nor what comes after it, and sees what came before it however short the span."""
    (mask,) = probe.soft_mask(asked)
    bound = np.where(asked.distance >= 1, np.inf, 0)
    probe.compare("mask", mask, replace(expected_mask(asked), bound=bound))
    probe.compare("mask", mask, expected_mask(asked))


@check("mask.per_query", clauses=["MASK", "AGE"], needs=["soft_mask"], cases=some())
def per_query(probe: Probe, asked: Memories) -> None:
    """The mask of a block of n queries is that of n blocks of one, whose ages grow by one each."""
    (mask,) = probe.soft_mask(asked)
    ones = [replace(asked, age=asked.age + m, queries=1) for m in range(asked.queries)]
    alone = np.concatenate(probe.soft_mask(*ones), axis=1)
    interval = mask_interval(asked)
    u = np.finfo(mask.dtype).eps
    probe.agree("mask of a block, against one query at a time", mask, alone, interval.high - interval.low + u)


@check(
    "mask.wide",
    clauses=["WIDTH"],
    needs=["soft_mask"],
    cases=some(
        ages=("old", "beyond"), fates=tuple(f for f in FATES if f != "expired"), ramps=(1.0, 16.0, 128.0, 4096.0)
    ),
)
def wide(probe: Probe, asked: Memories) -> None:
    """Spans and ages up to 131072 keep single steps apart (half precision has steps of 16 at 16384)."""
    (mask,) = probe.soft_mask(asked)
    probe.compare("mask", mask, expected_mask(asked))


@check("mask.large", clauses=["MASK", "PAST"], needs=["soft_mask"], cases=some(sizes=LARGE), cost=4)
def large(probe: Probe, asked: Memories) -> None:
    """Hundreds of queries and memories: several of a kernel's tiles, and a last one that is not full."""
    (mask,) = probe.soft_mask(asked)
    probe.compare("mask", mask, expected_mask(asked))
