"""Level training: losses of blocks that follow each other, their gradients, and where training starts."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refspan.config import ModelConfig
from refspan.conformance.guard import Misbehaviour
from refspan.conformance.model_cases import ModelCase
from refspan.conformance.programs import Initialise
from refspan.conformance.registry import Probe, check
from refspan.conformance.small_models import SPANS, models
from refspan.conformance.tolerance import Expected
from refspan.conformance.training_cases import (
    LARGE,
    WIDE,
    TrainingCase,
    blocks,
    expected_losses,
    expected_training,
    with_weight,
)

NEEDS = ["loss_and_gradients"]
COST = 5


@check("training.task_loss", clauses=["MODEL", "AGE", "DROP"], needs=NEEDS, cost=COST, cases=blocks)
def task_loss(probe: Probe, case: TrainingCase) -> None:
    """The task loss is the mean of -log p(target), block after block."""
    (answers,) = probe.programs(case.program)
    for i, (answer, taught) in enumerate(zip(answers, expected_losses(case), strict=True)):
        probe.compare(f"task loss of block {i}", np.asarray(answer[0]), taught.task)


@check("training.span_loss", clauses=["LOSS"], needs=NEEDS, cost=COST,
       cases=lambda dtype: blocks(dtype, weights=(1.0, 0.01), spans=SPANS[:2], least=2))  # fmt: skip
def span_loss(probe: Probe, case: TrainingCase) -> None:
    """The span loss charges spans, not remaining spans, on the ramp; it is never negative."""
    (answers,) = probe.programs(case.program)
    for i, (answer, taught) in enumerate(zip(answers, expected_losses(case), strict=True)):
        if answer[1] < 0:
            raise Misbehaviour(f"span loss of block {i} is {answer[1]:.9g}, expected a number >= 0")
        probe.compare(f"span loss of block {i}", np.asarray(answer[1]), taught.span)


@check("training.span_loss_weight", clauses=["LOSS"], needs=NEEDS, cost=COST,
       cases=lambda dtype: blocks(dtype, weights=(0.5,), spans=("spread",), least=2))  # fmt: skip
def span_loss_weight(probe: Probe, case: TrainingCase) -> None:
    """The span loss is linear in its weight, 0 at weight 0, and its gradient is part of the gradients."""
    paid, twice, free = probe.programs(case.program, with_weight(case, 1.0).program, with_weight(case, 0.0).program)
    for i, taught in enumerate(expected_training(case)):
        if free[i][1] != 0:
            raise Misbehaviour(f"span loss of block {i} is {free[i][1]:.9g} at weight 0, expected 0")
        probe.compare(f"span loss of block {i} at twice the weight", np.asarray(twice[i][1]),
                      Expected(2 * taught.span.value, 2 * taught.span.bound))  # fmt: skip
        for name, expected in taught.gradients.items():
            if ".span." in name:
                probe.compare(f"gradient of {name} in block {i}", paid[i][2][name], expected)


@check("training.shortening", clauses=["SHORTEN"], needs=NEEDS, cost=COST,
       cases=lambda dtype: blocks(dtype, limited=(True,), least=2))  # fmt: skip
def shortening(probe: Probe, case: TrainingCase) -> None:
    """Shortening changes mask and loss of its own block, and nothing of what is kept: the next one has it all."""
    last = len(case.program) - 1
    program = (*case.program[:last], replace(case.program[last], span_limit=None))
    case = replace(case, program=program)
    (answers,) = probe.programs(case.program)
    for i, (answer, taught) in enumerate(zip(answers, expected_losses(case), strict=True)):
        probe.compare(f"task loss of block {i}", np.asarray(answer[0]), taught.task)
        probe.compare(f"span loss of block {i}", np.asarray(answer[1]), taught.span)


@check(
    "training.gradients",
    clauses=["GRAD", "LOSS", "SPAN", "SHORTEN", "LAYER", "MODEL"],
    needs=NEEDS,
    cost=COST,
    cases=blocks,
)
def gradients(probe: Probe, case: TrainingCase) -> None:
    """Gradients of all parameters, memories of earlier blocks being constants."""
    (answers,) = probe.programs(case.program)
    for i, (answer, taught) in enumerate(zip(answers, expected_training(case), strict=True)):
        for name, expected in taught.gradients.items():
            probe.compare(f"gradient of {name} in block {i}", answer[2][name], expected)


@check("training.again", clauses=["GRAD", "DROP"], needs=NEEDS, cost=2 * COST,
       cases=lambda dtype: blocks(dtype, least=2, most=3, twice=True))  # fmt: skip
def again(probe: Probe, case: TrainingCase) -> None:
    """From the memory that a block began with it is run again, or another block; the next goes on from the second."""
    _follow(probe, case)


@check("training.two_streams", clauses=["GRAD", "START"], needs=NEEDS, cost=2 * COST,
       cases=lambda dtype: blocks(dtype, least=2, most=3, streams=2))  # fmt: skip
def two_streams(probe: Probe, case: TrainingCase) -> None:
    """Two streams that learn in turn, of one model or of two, each from what it has read itself."""
    _follow(probe, case)


@check("training.large_logits", clauses=["GRAD", "MODEL"], needs=NEEDS, cost=COST,
       cases=lambda dtype: blocks(dtype, loudness=300.0, most=2))  # fmt: skip
def large_logits(probe: Probe, case: TrainingCase) -> None:
    """Logits of tokens in the hundreds neither overflow nor lose what is unlikely, in the loss and in gradients."""
    _follow(probe, case)


@check("training.moved", clauses=["GRAD", "CACHE", "DROP"], needs=NEEDS, cost=COST,
       cases=lambda dtype: blocks(dtype, least=2, moves=True))  # fmt: skip
def moved(probe: Probe, case: TrainingCase) -> None:
    """Parameters change, some or all, in place or not; each block has its own, for what it remembers too."""
    _follow(probe, case)


def _large(dtype: np.dtype) -> list[st.SearchStrategy[TrainingCase]]:
    many = blocks(dtype, shapes=LARGE, rows=(4,), least=5, most=6, spans=("beyond the stream",))
    return [blocks(dtype, shapes=LARGE, rows=(4,), least=5, most=6), many, blocks(dtype, shapes=WIDE, rows=(9,))]


@check("training.large", clauses=["GRAD", "LOSS", "MODEL"], needs=NEEDS, cost=5 * COST, cases=_large)
def large(probe: Probe, case: TrainingCase) -> None:
    """Five blocks and more, of 24 tokens, in four rows of a wider model, memories by the hundred; a wide model."""
    _follow(probe, case)


@check("training.threads", clauses=["GRAD"], needs=NEEDS, cost=2 * COST, cases=lambda dtype: blocks(dtype, most=2))
def at_once(probe: Probe, case: TrainingCase) -> None:
    """Blocks that several threads run at once do not mix (`thread_safe = False` says: not offered)."""
    turned = [replace(one, tokens=one.tokens[:, ::-1], targets=one.targets[:, ::-1]) for one in case.program]
    other = replace(case, program=tuple(turned))
    for one, answers in zip((case, other), probe.programs(case.program, other.program, at_once=True), strict=True):
        _compare(probe, one, answers)


def _follow(probe: Probe, case: TrainingCase) -> None:
    (answers,) = probe.programs(case.program)
    _compare(probe, case, answers)


def _compare(probe: Probe, case: TrainingCase, answers: list[Any]) -> None:
    for i, (answer, taught) in enumerate(zip(answers, expected_training(case), strict=True)):
        probe.compare(f"task loss of block {i}", np.asarray(answer[0]), taught.task)
        probe.compare(f"span loss of block {i}", np.asarray(answer[1]), taught.span)
        for name, expected in taught.gradients.items():
            probe.compare(f"gradient of {name} in block {i}", answer[2][name], expected)


def _starts(dtype: np.dtype) -> st.SearchStrategy[ModelCase]:
    def ask(model: tuple[ModelConfig, object, str], seed: int, longest: float) -> ModelCase:
        return ModelCase((Initialise("a", replace(model[0], max_span=longest), seed),))

    return st.builds(ask, models(dtype), st.integers(0, 2**16), st.sampled_from((8.0, 1024.0, 16384.0)))


@check("training.initial_spans", clauses=["SPAN"], needs=["initial_parameters"], cost=COST, cases=_starts)
def initial_spans(probe: Probe, case: ModelCase) -> None:
    """All spans start at the same fraction of L, whatever the hidden state, where the sigmoid still has a slope.

    Where all else starts is free, but it is finite.
    """
    ((params,),) = probe.programs(case.program)
    first = float(params["layers.0.span.bias"])
    for name, array in params.items():
        if not np.isfinite(array).all():
            raise Misbehaviour(f"initial {name} holds NaN or infinite numbers")
        if name.endswith("span.weight"):
            probe.compare(f"initial {name}", array, Expected(np.zeros(array.shape), np.zeros(array.shape)))
        if name.endswith("span.bias"):
            bias = float(array)
            probe.compare(f"initial {name}", array, Expected(np.asarray(first), np.asarray(0.0)))
            with np.errstate(over="ignore"):
                slope = 1 / ((1 + np.exp(-bias)) * (1 + np.exp(bias)))
            if not slope >= 1e-3:
                raise Misbehaviour(
                    f"initial {name} is {bias:.9g}, where the sigmoid's slope is {slope:.3g}: spans could never learn; "
                    "expected logit(p) for a fraction p of max_span between 0.001 and 0.999"
                )
