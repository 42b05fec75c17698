"""What narrow types, fixed sizes and shortcuts do not reach: levels mask, attention and gradient.

Magnitudes, slots that are empty, tiles with few memories left, sizes beyond those of the other checks.
"""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.checks import mask
from refspan.conformance.checks.attention import SEVERAL_MEMORIES, compare_output
from refspan.conformance.checks.gradient import compare_gradients
from refspan.conformance.protocol import Array
from refspan.conformance.registry import Probe, check
from refspan.conformance.strategies import AGES, Sizes, attention_cases, of_each_size
from refspan.conformance.tolerance import expected_mask

NEAR = tuple(layout for layout in AGES if layout != "beyond")
"""Ages below 2^31: those above have checks of their own."""
FORWARD, BACKWARD = ["span_attention"], ["span_attention_backward"]


def _of_magnitudes(dtype: np.dtype) -> st.SearchStrategy[AttentionCase]:
    """Values, upstream gradients, queries and keys of other sizes than 1; logits stay as they are.

    In half precision, a sum of thirteen values that is divided in the end stays within the dtype.
    """
    half = dtype == np.float16
    values = (0, 6, -6) if half else (0, 14, 20, -30)
    upstream = (0, -12, -6, 4) if half else (0, -30, -16, 20)
    queries = (0, 4, -4) if half else (0, 20, -20)

    def scale(case: AttentionCase, of_value: int, of_grad: int, of_query: int) -> AttentionCase:
        two = dtype.type(2)
        return replace(
            case.with_memories(notes=(*case.memories.notes, f"values times 2^{of_value}, upstream gradients times "
                                      f"2^{of_grad}, queries times 2^{of_query}, keys divided by as much")),
            value=case.value * two**of_value,
            grad_out=case.grad_out * two**of_grad,
            query=case.query * two**of_query,
            key=case.key * two**-of_query,
            position=None if case.position is None else case.position * two**-of_query,
        )  # fmt: skip

    plain = attention_cases(dtype, ages=NEAR, contents=("normal",))
    return st.builds(scale, plain, *(st.sampled_from(exponents) for exponents in (values, upstream, queries)))


@check("attention.magnitudes", clauses=["OUTPUT", "LOGIT"], needs=FORWARD, cases=_of_magnitudes)
def output_of_magnitudes(probe: Probe, case: AttentionCase) -> None:
    """Large and small values, queries and keys: nothing is clipped, flushed, or narrower than the dtype."""
    compare_output(probe, case)


@check("gradient.magnitudes", clauses=["GRAD"], needs=BACKWARD, cases=_of_magnitudes)
def gradients_of_magnitudes(probe: Probe, case: AttentionCase) -> None:
    """Upstream gradients as small as a mean over many tokens makes them, and as large as a loss scale does."""
    compare_gradients(probe, case)


def _emptied(age: Array, queries: int, seed: int) -> Array:
    """Ages of which some are those of empty slots: what narrower integers take for recent ones, or for far ones."""
    rng = np.random.default_rng(seed)
    marks = [-(2**62), 2 - 2**16, 1 - 2**31, 5 - 2**32, -(2**40), -queries - 1]
    return np.where(rng.random(age.shape) < 0.4, rng.choice(marks, age.shape), age)


def _with_empty_slots(dtype: np.dtype) -> st.SearchStrategy[AttentionCase]:
    def empty(case: AttentionCase, seed: int) -> AttentionCase:
        age = _emptied(case.memories.age, case.memories.queries, seed)
        return case.with_memories(age=age, notes=(*case.memories.notes, "some slots empty"))

    plain = attention_cases(dtype, sizes=SEVERAL_MEMORIES, contents=("normal",))
    return st.builds(empty, plain, st.integers(0, 2**16))


def _masks_of_empty_slots(dtype: np.dtype) -> st.SearchStrategy[Memories]:
    def empty(asked: Memories, seed: int) -> Memories:
        age = _emptied(asked.age, asked.queries, seed)
        return replace(asked, age=age, notes=(*asked.notes, "some slots empty"))

    return st.builds(empty, mask.some()(dtype), st.integers(0, 2**16))


@check("mask.empty_slots", clauses=["PAST", "WIDTH"], needs=["soft_mask"], cases=_masks_of_empty_slots)
def masks_of_empty_slots(probe: Probe, asked: Memories) -> None:
    """A slot whose age no query reaches, -2^62 or another, is masked whatever its span."""
    (got,) = probe.soft_mask(asked)
    probe.compare("mask", got, expected_mask(asked))


@check("attention.empty_slots", clauses=["PAST", "WIDTH"], needs=FORWARD, cases=_with_empty_slots)
def output_beside_empty_slots(probe: Probe, case: AttentionCase) -> None:
    """A slot whose age no query reaches, -2^62 or another, has no part in the output."""
    compare_output(probe, case)


@check("gradient.empty_slots", clauses=["PAST", "GRAD"], needs=BACKWARD, cases=_with_empty_slots)
def gradients_beside_empty_slots(probe: Probe, case: AttentionCase) -> None:
    """A slot whose age no query reaches, -2^62 or another, gets no gradient and has no part in others."""
    compare_gradients(probe, case)


def _few_left(dtype: np.dtype) -> st.SearchStrategy[AttentionCase]:
    """Memories in any order, of which one in thirty lives; the first and last of every tile are old and expired."""

    def place(case: AttentionCase, ramp: float, seed: int) -> AttentionCase:
        rng = np.random.default_rng(seed)
        batch, _, _, slots, _ = case.sizes
        span, age = np.zeros_like(case.memories.span), np.zeros_like(case.memories.age)
        ends = np.isin(np.arange(slots) % 32, (0, 31)) | (np.arange(slots) == slots - 1)
        for b in range(batch):
            age[b, ~ends] = 17 + rng.permutation(slots)[: np.sum(~ends)]
            age[b, ends] = 2 * slots + rng.permutation(slots)[: np.sum(ends)]
            lives = ~ends & (rng.random(slots) < 1 / 30)
            span[b, lives] = age[b, lives] + 9 * rng.random(np.sum(lives))
        return case.with_memories(span=span, age=age, ramp=ramp, notes=("one memory in thirty lives, in any order",))

    sizes: list[Sizes] = [(2, 1, 3, 40, 4), (1, 2, 5, 130, 8), (1, 1, 3, 320, 4), (2, 1, 1, 520, 8)]
    plain = attention_cases(dtype, sizes=sizes, ages=("past",), fates=("expired",), contents=("normal",))
    return st.builds(place, plain, st.sampled_from((2.0, 1.0, 16.0)), st.integers(0, 2**16))


@check("attention.few_left", clauses=["DROP", "OUTPUT"], needs=FORWARD, cases=_few_left, cost=2)
def output_of_few(probe: Probe, case: AttentionCase) -> None:
    """A memory that lives among many that do not, in any order, is seen: no tile is judged by its ends."""
    compare_output(probe, case)


@check("gradient.few_left", clauses=["DROP", "GRAD"], needs=BACKWARD, cases=_few_left, cost=2)
def gradients_of_few(probe: Probe, case: AttentionCase) -> None:
    """A memory that lives among many that do not, in any order, learns: no tile is judged by its ends."""
    compare_gradients(probe, case)


BEYOND: list[Sizes] = [
    (9, 1, 3, 13, 4), (1, 2, 4, 40, 160), (1, 1, 160, 192, 8),
    (1, 1, 3, 40, 260), (1, 1, 530, 40, 4), (1, 1, 2, 4200, 4),
]  # fmt: skip
"""More than 8 rows; heads of more than 128 and 256 numbers; more queries and memories than 128 each, than 512, than
4096."""


@check("attention.sizes", clauses=["OUTPUT", "LOGIT"], needs=FORWARD, cost=4,
       cases=of_each_size(BEYOND, ages=NEAR, contents=("normal",)))  # fmt: skip
def output_of_sizes(probe: Probe, case: AttentionCase) -> None:
    """Sizes beyond what kernels are often made for, one axis or two at a time."""
    compare_output(probe, case)


@check(
    "gradient.sizes",
    clauses=["GRAD"],
    needs=BACKWARD,
    cost=4,
    cases=of_each_size(BEYOND, ages=NEAR, contents=("normal",)),
)
def gradients_of_sizes(probe: Probe, case: AttentionCase) -> None:
    """Sizes beyond what kernels are often made for, one axis or two at a time."""
    compare_gradients(probe, case)
