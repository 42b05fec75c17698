"""Many memories: tiles in which everything lives, or nothing; logits that run along them; a kernel for each head size.

Levels mask, attention and gradient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.checks.attention import compare_output
from refspan.conformance.checks.gradient import compare_gradients
from refspan.conformance.checks.limits import BACKWARD, FORWARD
from refspan.conformance.crowds import LOGITS, crowds
from refspan.conformance.registry import Probe, check
from refspan.conformance.strategies import Sizes
from refspan.conformance.tolerance import expected_mask

MANY: list[Sizes] = [
    (2, 2, 64, 64, 16), (1, 1, 33, 130, 64), (2, 3, 1, 300, 16), (1, 2, 64, 128, 32), (3, 2, 8, 96, 8),
    (1, 1, 256, 256, 4), (2, 4, 1, 128, 64),
]  # fmt: skip
"""Blocks with as many memories as queries, single queries in several rows and heads, tiles of 32, 64 and 128."""

BLOCKS = [one for one in MANY if one[2] > 1]

RUNS: list[Sizes] = [(2, 3, 1, 300, 16), (1, 2, 17, 130, 16), (1, 1, 3, 520, 4), (2, 1, 64, 65, 64)]
"""For logits that run along the slots; sqrt(D) is whole."""

HEADS: list[Sizes] = [
    (1, 8, 64, 72, 48), (2, 12, 32, 64, 80), (1, 4, 64, 32, 96), (1, 32, 5, 16, 112), (2, 6, 16, 24, 192),
    (1, 3, 4, 9, 256), (3, 2, 8, 7, 64), (1, 3, 20, 34, 128), (2, 1, 9, 24, 32), (1, 4, 3, 18, 16),
]  # fmt: skip
"""Sizes that kernels are made for one by one: heads, their number, blocks."""

Cases = Callable[[np.dtype], list[st.SearchStrategy[AttentionCase]]]


def _of_each(sizes: list[Sizes], **about: Any) -> Cases:
    """Steps drawn as `about` says, of each of these sizes as many."""
    return lambda dtype: [crowds(dtype, sizes=[one], **about) for one in sizes]


def _crowds(dtype: np.dtype) -> list[st.SearchStrategy[AttentionCase]]:
    """Of each size as many, and some in which nothing is masked at all, or not for the first query; old memories."""
    whole: dict[str, Any] = {"sizes": BLOCKS, "layouts": ("past", "wrapping"), "tables": ("long",)}
    of_each = [crowds(dtype, sizes=[one]) for one in MANY]
    old = crowds(dtype, sizes=MANY[2:3], layouts=("wrapping",), lives=("all", "a stretch"))
    return [*of_each, *(crowds(dtype, lives=(life,), **whole) for life in ("all", "ends in the block")), old]


def _heads(dtype: np.dtype) -> list[st.SearchStrategy[AttentionCase]]:
    """Of each head size with positions and without."""
    return [
        crowds(dtype, sizes=[one], tables=[table], lives=("all", "a stretch", "fades"))
        for one in HEADS
        for table in ("long", "none")
    ]


def _masks(dtype: np.dtype) -> list[st.SearchStrategy[Memories]]:
    return [crowds(dtype, sizes=[one]).map(lambda case: case.memories) for one in MANY]


@check("mask.crowds", clauses=["MASK", "PAST", "WIDTH"], needs=["soft_mask"], cost=2, cases=_masks)
def masks_of_crowds(probe: Probe, asked: Memories) -> None:
    """Tiles in which everything lives, fades or has expired, in a ring, newest first, or with empty slots."""
    (got,) = probe.soft_mask(asked)
    probe.compare("mask", got, expected_mask(asked))


@check("attention.crowds", clauses=["OUTPUT", "DROP", "PAST"], needs=FORWARD, cost=2, cases=_crowds)
def output_of_crowds(probe: Probe, case: AttentionCase) -> None:
    """Tiles in which everything lives, fades or has expired, in a ring, newest first, or with empty slots."""
    compare_output(probe, case)


@check("gradient.crowds", clauses=["GRAD", "DROP", "PAST"], needs=BACKWARD, cost=2, cases=_crowds)
def gradients_of_crowds(probe: Probe, case: AttentionCase) -> None:
    """Tiles in which everything lives, fades or has expired, in a ring, newest first, or with empty slots."""
    compare_gradients(probe, case)


@check(
    "attention.runs",
    clauses=["WEIGHT", "OUTPUT"],
    needs=FORWARD,
    cost=2,
    cases=_of_each(RUNS, logits=LOGITS[1:], layouts=("stream", "past"), tables=("none", "long")),
)
def output_of_runs(probe: Probe, case: AttentionCase) -> None:
    """Logits that rise or fall from tile to tile, are all far below 0, all near 85, or one far above the others."""
    compare_output(probe, case)


@check(
    "gradient.runs",
    clauses=["WEIGHT", "GRAD"],
    needs=BACKWARD,
    cost=2,
    cases=_of_each(RUNS, logits=LOGITS[1:], layouts=("stream", "past"), tables=("none", "long")),
)
def gradients_of_runs(probe: Probe, case: AttentionCase) -> None:
    """Logits that rise or fall from tile to tile, are all far below 0, all near 85, or one far above the others."""
    compare_gradients(probe, case)


@check("attention.heads", clauses=["LOGIT", "OUTPUT"], needs=FORWARD, cost=2, cases=_heads)
def output_of_heads(probe: Probe, case: AttentionCase) -> None:
    """Heads of 16 to 256 numbers, with positions and without: each may have a kernel of its own."""
    compare_output(probe, case)


@check("gradient.heads", clauses=["LOGIT", "GRAD"], needs=BACKWARD, cost=2, cases=_heads)
def gradients_of_heads(probe: Probe, case: AttentionCase) -> None:
    """Heads of 16 to 256 numbers, with positions and without: each may have a kernel of its own."""
    compare_gradients(probe, case)
