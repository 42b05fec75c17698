"""Blocks of training, drawn by Hypothesis, and what a right model makes of them.

Expected losses and gradients are those of the float64 reference. Their bounds come from what backward error analysis
says of a good algorithm: its results are exact for parameters that are off by a few roundings each, n u for its longest
sum of n products. So the reference is run for `SAMPLES` sets of such parameters, every number moved up or down at
random, and the bound of a result is `SAFETY` times the furthest that any sample strays. Where a ReLU or a kink of a
mask is so close that rounding decides on which side of it a number falls, samples fall on both.

A gradient may be the small difference of large terms whatever the parameters: a query with one memory passes none on,
because da - c is then g . v - g . v. Such terms are about as large as the largest gradient of the block, so `TERMS` n u
times that is allowed everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import refspan
from refspan.config import ModelConfig
from refspan.conformance.memo import remembered
from refspan.conformance.model_bounds import SAFETY, SAMPLES
from refspan.conformance.programs import Learn
from refspan.conformance.protocol import Array
from refspan.conformance.small_models import SIZES, SPANS, models, moved
from refspan.conformance.tolerance import Arithmetic, Expected
from refspan.model import losses

TERMS = 4.0
LARGE = ((17, 24, 40, 2, 3, 12, 24),)
"""As `SIZES`, wider and with longer blocks."""

WIDE = ((300, 72, 136, 1, 5, 20, 12),)
"""As `SIZES`, wider still; more tokens than bytes hold."""


@dataclass(frozen=True, repr=False)
class TrainingCase:
    """Blocks that follow each other, and how they were made."""

    program: tuple[Learn, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"TrainingCase({'; '.join(self.notes)})"

    def describe(self) -> list[str]:
        """The case in words and numbers, a line each."""
        configs = {one.stream: one.config for one in self.program}
        return [*self.notes, *(f"{name}: {config}" for name, config in configs.items()), *map(str, self.program)]


@st.composite
def blocks(
    draw: st.DrawFn,
    dtype: np.dtype,
    *,
    weights: tuple[float, ...] = (0.0, 0.01, 1.0),
    limited: tuple[bool, ...] = (False, True),
    least: int = 1,
    most: int = 4,
    rows: tuple[int, ...] = (2, 1, 3),
    spans: tuple[str, ...] = SPANS,
    shapes: Sequence[tuple[int, ...]] = SIZES,
    loudness: float = 1.0,
    streams: int = 1,
    twice: bool = False,
    moves: bool = False,
) -> TrainingCase:
    """Up to four blocks, or `most`, of any length, some of them with shortened spans, each with its price of spans.

    `loudness`: see `models`. `streams`: how many learn in turn, each `least` blocks and more: of one model, or each of
    its own. `twice`: after each block another is run, or the same again, from the memory that it began with. `moves`:
    parameters, all or some of them, are others in each block, as an optimiser leaves them.
    """
    names = "ab"[:streams]
    about = models(dtype, spans=spans, shapes=shapes, loudness=loudness)
    made = [draw(about)] * streams if streams > 1 and draw(st.booleans()) else [draw(about) for _ in names]
    config_of = {name: _away_from_kinks(config) for name, (config, _, _) in zip(names, made, strict=True)}
    params_of = {name: params for name, (_, params, _) in zip(names, made, strict=True)}
    batch_of = {name: draw(st.sampled_from(rows)) for name in names}
    turns_of = {name: draw(st.integers(least, most)) for name in names}
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    price, limits = st.sampled_from(weights), st.sampled_from(limited)

    def block(name: str, length: int, *, again: bool = False) -> Learn:
        config = config_of[name]
        tokens, targets = rng.integers(0, config.vocab_size, (2, batch_of[name], length))
        longer = draw(st.sampled_from((False, True)))  # than 0, which is a limit too
        limit = float(rng.uniform(0, config.max_span)) * longer if draw(limits) else None
        return Learn(name, config, params_of[name], tokens, targets, draw(price), limit, again)

    program: list[Learn] = []
    for name in (name for turn in range(max(turns_of.values())) for name in names if turn < turns_of[name]):
        size = config_of[name].block_size
        length = draw(st.sampled_from((size, 1, size + 2)))
        program.append(block(name, length))
        if twice:
            program.append(block(name, length, again=True) if draw(st.booleans()) else replace(program[-1], again=True))
        if moves:
            params_of[name] = moved(rng, params_of[name], some=draw(st.booleans()))
    return TrainingCase(tuple(program), tuple(words for _, _, words in made))


def _away_from_kinks(config: ModelConfig) -> ModelConfig:
    """Spans that are all but 0 or L must not meet a kink at a whole distance: there float32 has no way to be right."""
    return replace(config, max_span=config.max_span - 0.3, ramp=config.ramp + 0.15)


@dataclass(frozen=True)
class Taught:
    """What one block of training must come to."""

    task: Expected
    span: Expected
    gradients: dict[str, Expected]


@remembered
def expected_training(case: TrainingCase) -> list[Taught]:
    """Losses and gradients of each block, computed by the reference in float64."""
    return _expected(case, _learn)


@remembered
def expected_losses(case: TrainingCase) -> list[Taught]:
    """The same without gradients, and without the time that they take."""
    return _expected(case, _evaluate)


_Block = tuple[float, float, dict[str, Array]]
"""Task loss, span loss and gradients."""


def _learn(one: Learn, params: dict[str, Array], memory: Any, **options: Any) -> tuple[_Block, Any]:
    (task, span), grads, memory = refspan.loss_and_gradients(
        one.config, params, one.tokens, one.targets, memory, **options
    )
    return (task, span, grads), memory


def _evaluate(one: Learn, params: dict[str, Array], memory: Any, **options: Any) -> tuple[_Block, Any]:
    (task, span), memory = losses(one.config, params, one.tokens, one.targets, memory, **options)
    return (task, span, {}), memory


def _expected(case: TrainingCase, run_block: Callable[..., tuple[_Block, Any]]) -> list[Taught]:
    first = {one.stream: one for one in reversed(case.program)}
    dtype = np.dtype(case.program[0].params["embedding.weight"].dtype)
    sizes = [one.config for one in first.values()]
    longest = max(max(c.feedforward_size, c.hidden_size, c.vocab_size) for c in sizes) + 8
    arithmetic = Arithmetic.of(dtype)
    u = arithmetic.u
    rng = np.random.default_rng(len(case.program))
    exact = _run(case, {}, run_block)
    strayed = []
    for _ in range(SAMPLES):
        off = {
            (name, n): 1 + rng.choice([-1.0, 1.0], x.shape) * 2 * longest * u
            for name, one in first.items()
            for n, x in one.params.items()
        }
        strayed.append(_run(case, off, run_block))
    samples = [[sample[i] for sample in strayed] for i in range(len(exact))]
    return [_taught(*pair, arithmetic, longest) for pair in zip(exact, samples, strict=True)]


def _run(
    case: TrainingCase, off: dict[tuple[str, str], Array], run_block: Callable[..., tuple[_Block, Any]]
) -> list[_Block]:
    """What each block comes to, with parameters multiplied by `off`."""
    begun: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    results = []
    for one in case.program:
        name = one.stream
        options = {"span_loss_weight": one.span_loss_weight, "span_limit": one.span_limit}
        begun[name] = begun[name] if one.again else memory.get(name)
        params = {n: x.astype(np.float64) * off.get((name, n), 1.0) for n, x in one.params.items()}
        block, memory[name] = run_block(one, params, begun[name], **options)
        results.append(block)
    return results


def _taught(exact: _Block, samples: list[_Block], arithmetic: Arithmetic, longest: int) -> Taught:
    def expected(value: Array, others: list[Array], size: float) -> Expected:
        moved = max((float(np.max(np.abs(other - value), initial=0.0)) for other in others), default=0.0)
        lost = longest * arithmetic.tiny  # to underflow: the slope of a sigmoid at 200, say
        return Expected(np.asarray(value), np.asarray(SAFETY * moved + longest * arithmetic.u * size + lost))

    task, span, grads = exact
    largest = TERMS * max((float(np.max(np.abs(grad), initial=0.0)) for grad in grads.values()), default=0.0)
    return Taught(
        task=expected(np.asarray(task), [np.asarray(s[0]) for s in samples], abs(task)),
        span=expected(np.asarray(span), [np.asarray(s[1]) for s in samples], abs(span)),
        gradients={name: expected(grad, [s[2][name] for s in samples], largest) for name, grad in grads.items()},
    )


def with_weight(case: TrainingCase, weight: float) -> TrainingCase:
    """The same blocks with another price of remembering."""
    return replace(case, program=tuple(replace(one, span_loss_weight=weight) for one in case.program))
