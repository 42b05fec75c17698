"""Level model: one block through the whole model, from an empty start."""

from dataclasses import replace

import numpy as np

from refspan.conformance.checks.memory import COST, NEEDS, follow, some
from refspan.conformance.model_answers import Answers
from refspan.conformance.model_cases import ModelCase
from refspan.conformance.programs import Step
from refspan.conformance.registry import Probe, check
from refspan.conformance.small_models import MANY_TOKENS
from refspan.conformance.tolerance import Arithmetic, Expected


@check("model.post_norm", clauses=["LAYER", "MODEL"], needs=NEEDS, cost=COST, cases=some(norms=("post",)))
def post_norm(probe: Probe, case: ModelCase) -> None:
    """Post-norm: both normalisations come after the residual sums, and there is none in the end."""
    follow(probe, case)


@check("model.pre_norm", clauses=["LAYER", "MODEL"], needs=NEEDS, cost=COST, cases=some(norms=("pre",)))
def pre_norm(probe: Probe, case: ModelCase) -> None:
    """Pre-norm: memories are normalised like the block before keys, values and spans; a last norm ends the model."""
    follow(probe, case)


@check("model.no_positions", clauses=["LOGIT", "MODEL"], needs=NEEDS, cost=COST, cases=some(reach=(0,)))
def no_positions(probe: Probe, case: ModelCase) -> None:
    """A position table without rows, P = 0: attention by content alone."""
    follow(probe, case)


@check("model.spans", clauses=["SPAN"], needs=NEEDS, cost=COST, cases=some(spans=("spread",), least_tokens=12))
def spans(probe: Probe, case: ModelCase) -> None:
    """Spans come from hidden states: one per memory and layer, the temperature dividing these but not the bias."""
    follow(probe, case)


@check("model.causal", clauses=["PAST"], needs=NEEDS, cost=COST, cases=some(least_tokens=4))
def causal(probe: Probe, case: ModelCase) -> None:
    """What comes later changes nothing of what was said before."""
    last = case.steps()[-1]
    step = case.program[last]
    assert isinstance(step, Step)  # noqa: S101
    vocabulary = int(max(o.tokens.max() for o in case.program if isinstance(o, Step))) + 1
    tokens = step.tokens.copy()
    tokens[:, -1] = (tokens[:, -1] + 1) % max(vocabulary, 2)
    other = tuple(replace(step, tokens=tokens) if i == last else o for i, o in enumerate(case.program))
    first, second = probe.programs(case.program, other)
    expected = Answers(case.program)
    for i in case.steps():
        said = slice(0, -1) if i == last else slice(None)
        bound = np.broadcast_to(expected.of_step(i).bound, first[i].shape)
        probe.agree(case.log_probs_of(i), second[i][:, said], first[i][:, said], bound[:, said])


@check("model.normalised", clauses=["MODEL"], needs=NEEDS, cost=COST, cases=some())
def normalised(probe: Probe, case: ModelCase) -> None:
    """Log-probabilities are those of a distribution: their exponentials sum to one."""
    (answers,) = probe.programs(case.program)
    for i in case.steps():
        total = np.sum(np.exp(answers[i].astype(np.float64)), axis=-1)
        arithmetic = Arithmetic.of(answers[i].dtype)
        size = np.max(np.abs(answers[i].astype(np.float64)), axis=-1)
        bound = arithmetic.u * (answers[i].shape[-1] + 8 + 8 * size)
        probe.compare(
            f"sum of probabilities of operation {i}, {case.program[i]}", total, Expected(np.ones_like(total), bound)
        )


@check("model.many_tokens", clauses=["MODEL"], needs=NEEDS, cost=25 * COST,
       cases=some(shapes=MANY_TOKENS, rows=(1,), least_tokens=6, most_tokens=0, memory=False))  # fmt: skip
def many_tokens(probe: Probe, case: ModelCase) -> None:
    """A vocabulary of 140,000: token ids are wider than 16 bits."""
    follow(probe, case)


@check("model.large_logits", clauses=["MODEL"], needs=NEEDS, cost=COST, cases=some(loudness=300.0))
def large_logits(probe: Probe, case: ModelCase) -> None:
    """Logits of tokens in the hundreds neither overflow nor underflow on the way to log-probabilities."""
    follow(probe, case)
