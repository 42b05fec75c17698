"""The same questions again, in turn and at once: levels mask, attention and gradient."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.checks import mask
from refspan.conformance.crowds import crowds
from refspan.conformance.registry import Probe, check
from refspan.conformance.strategies import Sizes, attention_cases
from refspan.conformance.tolerance import attention_bounds, expected_mask

SPLIT: list[Sizes] = [(2, 3, 1, 300, 16), (1, 2, 4, 130, 8)]


def _other_masks(asked: Memories) -> list[Memories]:
    """Questions of the same shapes, and of others."""
    other = replace(asked, span=asked.span[::-1] + 1, age=asked.age + 2)
    shorter = replace(asked, span=asked.span[:, 1:], age=asked.age[:, 1:])
    return [other, shorter, replace(asked, ramp=asked.ramp + 1)]


def _other_steps(case: AttentionCase) -> list[AttentionCase]:
    """Likewise."""
    other = replace(case, query=case.query[..., ::-1], value=-case.value, grad_out=-case.grad_out[..., ::-1])
    forgot = case.with_memories(span=np.zeros_like(case.memories.span), ramp=case.memories.ramp + 1)
    return [other, forgot, case.select(slots=slice(1, None))]


def _small_and_split(dtype: np.dtype) -> list[st.SearchStrategy[AttentionCase]]:
    """Small steps, and of five one over so many memories that kernels split them, and put the parts together."""
    return [*[attention_cases(dtype)] * 4, crowds(dtype, sizes=SPLIT)]


def _masks(probe: Probe, questions: list[Memories], *, at_once: bool = False) -> None:
    for i, got in enumerate(probe.soft_mask(*questions, at_once=at_once)):
        probe.compare("mask", got, expected_mask(questions[i]), place=i)


def _outputs(probe: Probe, questions: list[AttentionCase], *, at_once: bool = False) -> None:
    for i, got in enumerate(probe.attention(*questions, at_once=at_once)):
        probe.compare("output", got, attention_bounds(questions[i]).expected_output(), place=i)


def _gradients(probe: Probe, questions: list[AttentionCase], *, at_once: bool = False) -> None:
    for i, got in enumerate(probe.gradients(*questions, at_once=at_once)):
        for name, expected in attention_bounds(questions[i]).expected_gradients().items():
            probe.compare(f"gradient of {name}", got[name], expected, place=i)


@check("mask.repeated", clauses=["MASK"], needs=["soft_mask"], cases=mask.some())
def repeated_mask(probe: Probe, asked: Memories) -> None:
    """The same question gets the same answer whatever was asked in between, in the same memory or another shape."""
    _masks(probe, [asked, *_other_masks(asked), asked])


@check("mask.threads", clauses=["MASK"], needs=["soft_mask"], cases=mask.some(), cost=2)
def masks_at_once(probe: Probe, asked: Memories) -> None:
    """Questions asked by several threads at once do not mix (`thread_safe = False` says: not offered)."""
    _masks(probe, [asked, *_other_masks(asked)], at_once=True)


@check("attention.repeated", clauses=["OUTPUT"], needs=["span_attention"], cases=_small_and_split)
def repeated_step(probe: Probe, case: AttentionCase) -> None:
    """The same question gets the same answer whatever was asked in between, in the same memory or another shape."""
    _outputs(probe, [case, *_other_steps(case), case])


@check("attention.threads", clauses=["OUTPUT"], needs=["span_attention"], cases=_small_and_split, cost=2)
def steps_at_once(probe: Probe, case: AttentionCase) -> None:
    """Questions asked by several threads at once do not mix (`thread_safe = False` says: not offered)."""
    _outputs(probe, [case, *_other_steps(case)], at_once=True)


@check("gradient.repeated", clauses=["GRAD"], needs=["span_attention_backward"], cases=_small_and_split)
def repeated_gradients(probe: Probe, case: AttentionCase) -> None:
    """The same question gets the same answer whatever was asked in between, in the same memory or another shape."""
    _gradients(probe, [case, *_other_steps(case), case])


@check("gradient.threads", clauses=["GRAD"], needs=["span_attention_backward"], cases=_small_and_split, cost=2)
def gradients_at_once(probe: Probe, case: AttentionCase) -> None:
    """Questions asked by several threads at once do not mix (`thread_safe = False` says: not offered)."""
    _gradients(probe, [case, *_other_steps(case)], at_once=True)
