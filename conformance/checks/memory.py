"""Level memory: streams through a model whose parameters are frozen, and what they remember."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.guard import Misbehaviour
from refspan.conformance.model_answers import Answers
from refspan.conformance.model_cases import ModelCase, cases
from refspan.conformance.programs import Open, Operation, Program, Projected, Size, Step
from refspan.conformance.registry import Probe, check
from refspan.conformance.small_models import FAR, HALF, LARGE, LONG, SIZES

NEEDS = ["open_model"]
COST = 6
Cases = Callable[[np.dtype], st.SearchStrategy[ModelCase]]


def some(**about: Any) -> Cases:
    """Programs drawn as `about` says."""
    return lambda dtype: cases(dtype, **about)


def follow(probe: Probe, case: ModelCase) -> None:
    """Every step gives the log-probabilities of the reference, which reads each history at once and forgets nothing."""
    (answers,) = probe.programs(case.program)
    _compare(probe, case, answers)


def _compare(probe: Probe, case: ModelCase, answers: Sequence[Any] | Mapping[int, Any]) -> None:
    expected = Answers(case.program)
    for i in case.steps():
        probe.compare(case.log_probs_of(i), answers[i], expected.of_step(i), place=i)


@check("memory.stream", clauses=["AGE", "DROP", "START"], needs=NEEDS, cases=some(), cost=COST)
def stream(probe: Probe, case: ModelCase) -> None:
    """Blocks of any length in any order give what the whole stream at once gives."""
    follow(probe, case)


@check("memory.saturated", clauses=["AGE", "DROP"], needs=NEEDS, cost=2 * COST,
       cases=some(spans=("all near L",), least_tokens=40, rows=(1, 2)))  # fmt: skip
def saturated(probe: Probe, case: ModelCase) -> None:
    """All spans near L, for longer than L + R steps: memory is as full as it can be, and not one step fuller."""
    follow(probe, case)


@check("memory.short", clauses=["AGE", "DROP"], needs=NEEDS, cost=COST, cases=some(spans=("all near 0",)))
def short(probe: Probe, case: ModelCase) -> None:
    """All spans near 0: memories fade at once, also those of the block itself."""
    follow(probe, case)


def _kept_for_good(dtype: np.dtype) -> list[st.SearchStrategy[ModelCase]]:
    about: dict[str, Any] = {"spans": ("beyond the stream",), "rows": (1, 2)}
    return [cases(dtype, least_tokens=40, **about), cases(dtype, least_tokens=70, restores=True, resets=True, **about)]


@check("memory.keeps_all", clauses=["AGE", "DROP"], needs=NEEDS, cost=2 * COST, cases=_kept_for_good)
def keeps_all(probe: Probe, case: ModelCase) -> None:
    """Nothing expires: memory and states grow past whatever was set aside for them, and nothing is lost."""
    follow(probe, case)


@check("memory.long", clauses=["AGE", "DROP"], needs=NEEDS, cost=8 * COST,
       cases=some(shapes=LONG, spans=("beyond the stream",), least_tokens=530, most_tokens=0, rows=(2,),
                  resets=True, long_block=150))  # fmt: skip
def long(probe: Probe, case: ModelCase) -> None:
    """530 tokens that nobody forgets, some in long blocks, rows reset now and then: more than rings and bytes hold."""
    follow(probe, case)


@check("memory.large", clauses=["AGE", "DROP"], needs=NEEDS, cost=5 * COST,
       cases=some(shapes=LARGE, rows=(5, 4), least_tokens=65, most_tokens=100, memory=False,
                  long_block=100))  # fmt: skip
def large(probe: Probe, case: ModelCase) -> None:
    """Blocks of 64 to 129 tokens, five rows, a wider model: sizes that small cases may be beneath."""
    follow(probe, case)


@check("memory.start", clauses=["START"], needs=NEEDS, cost=COST, cases=some(memory=False, least_tokens=2))
def start(probe: Probe, case: ModelCase) -> None:
    """A stream starts empty: the first token finds no memory, and no phantom ones take part in later weights."""
    follow(probe, case)


@check("memory.initial", clauses=["AGE", "LOGIT"], needs=NEEDS, cost=COST, cases=some(memory=True))
def initial(probe: Probe, case: ModelCase) -> None:
    """A stream may start with memories of any age, in any order, and another number of them in each layer."""
    follow(probe, case)


@check("memory.far", clauses=["AGE", "WIDTH", "DROP"], needs=NEEDS, cost=COST,
       cases=some(memory=True, far=True, spans=(HALF,), longest=FAR))  # fmt: skip
def far(probe: Probe, case: ModelCase) -> None:
    """Initial memories up to 2^34 steps old, alive, fading or gone: ages are whole numbers, and wide ones."""
    follow(probe, case)


@check(
    "memory.reset",
    clauses=["START"],
    needs=NEEDS,
    cost=COST,
    cases=some(resets=True, rows=(2, 3, 1, 5), least_tokens=6),
)
def reset(probe: Probe, case: ModelCase) -> None:
    """A row that is reset starts anew, empty; the others go on."""
    follow(probe, case)


@check("memory.restore", clauses=["AGE"], needs=NEEDS, cost=COST, cases=some(restores=True, least_tokens=6))
def restore(probe: Probe, case: ModelCase) -> None:
    """A stream goes on from a kept state as if nothing had been read since, as often as one likes."""
    follow(probe, case)


@check("memory.two_streams", clauses=["START"], needs=NEEDS, cost=2 * COST, cases=some(streams=2, rows=(2, 1)))
def two_streams(probe: Probe, case: ModelCase) -> None:
    """Streams of two models that are open at once do not mix."""
    follow(probe, case)


@check("memory.models_alike", clauses=["START", "CACHE"], needs=NEEDS, cost=2 * COST,
       cases=some(streams=2, reopens=True, rows=(2, 1), alike=True))  # fmt: skip
def models_alike(probe: Probe, case: ModelCase) -> None:
    """Streams of models that differ in nothing but their parameters, as two that were tuned from one, do not mix."""
    follow(probe, case)


@check("memory.threads", clauses=["START"], needs=NEEDS, cost=2 * COST, cases=some(streams=2, rows=(2, 1)))
def streams_at_once(probe: Probe, case: ModelCase) -> None:
    """Streams that several threads read at once, each its own, do not mix (`thread_safe = False`: not offered)."""
    by_stream: dict[str, dict[int, Operation]] = {}
    for i, operation in enumerate(case.program):
        by_stream.setdefault(operation.stream, {})[i] = operation
    programs = [tuple(operations.values()) for operations in by_stream.values()]
    answers: dict[int, Any] = {}
    for operations, of_one in zip(by_stream.values(), probe.programs(*programs, at_once=True), strict=True):
        answers |= zip(operations, of_one, strict=True)
    _compare(probe, case, answers)


@check("memory.state_machine", clauses=["AGE", "DROP", "START"], needs=NEEDS, cost=2 * COST,
       cases=some(streams=2, resets=True, restores=True, reopens=True, rows=(2, 3)))  # fmt: skip
def state_machine(probe: Probe, case: ModelCase) -> None:
    """Blocks, single tokens, resets and restores of two models' streams, which give way to others, in any order."""
    follow(probe, case)


def _asking_for_sizes(dtype: np.dtype) -> list[st.SearchStrategy[ModelCase]]:
    """Programs that ask for sizes; of three in four no span is rounded.

    Of one in four as many memories live as there is room for in multiples of 16, or 64: one more needs more room.
    """
    about: dict[str, Any] = {"sizes": True, "resets": True, "restores": True}
    exact = cases(dtype, spans=(HALF,), longest=(8.0, 2.0, 20.0), least_tokens=30, **about)
    parts = cases(dtype, spans=(HALF,), longest=(8.5, 20.5), ramps=(2.5, 0.5), least_tokens=30, **about)
    full = cases(dtype, spans=(HALF,), live=(16, 64), shapes=SIZES[:1], rows=(1, 2), least_tokens=90, **about)
    return [cases(dtype, least_tokens=20, **about), exact, parts, full]


@check("memory.bound", clauses=["BOUND"], needs=NEEDS, cost=COST, cases=_asking_for_sizes)
def bound(probe: Probe, case: ModelCase) -> None:
    """As many memories are held as are live in the fullest row, rounded up to the granularity that is documented.

    To ask changes nothing.
    """
    (answers,) = probe.programs(case.program)
    expected = Answers(case.program)
    grain = probe.memory_granularity
    for i, operation in enumerate(case.program):
        if isinstance(operation, Step):
            probe.compare(case.log_probs_of(i), answers[i], expected.of_step(i), place=i)
        if isinstance(operation, Size):
            for layer, (held, (least, live)) in enumerate(zip(answers[i], expected.held(i), strict=True)):
                most = -(-live // grain) * grain
                if not least <= held <= most:
                    raise Misbehaviour(
                        f"layer {layer} holds {held} memories at operation {i}, {operation}; {live} are live in the "
                        f"fullest row, expected {f'at most {most}' if held > most else f'at least {least}'}",
                        place=i,
                    )


@check("memory.projected_once", clauses=["CACHE"], needs=NEEDS, cost=COST,
       cases=some(projected=True, resets=True, restores=True, least_tokens=20))  # fmt: skip
def projected_once(probe: Probe, case: ModelCase) -> None:
    """Keys and values of a memory are made once, not again in every block that sees it; the count never falls back.

    To ask changes nothing.
    """
    (answers,) = probe.programs(case.program)
    _compare(probe, case, answers)
    for i, operation in enumerate(case.program):
        if isinstance(operation, Projected):
            so_far = [o for o in case.program[:i] if o.stream == operation.stream]
            opened = next(o for o in so_far if isinstance(o, Open))
            given = sum(hidden.shape[0] * hidden.shape[1] for hidden, _ in opened.memory or ())
            read = sum(o.tokens.size for o in so_far if isinstance(o, Step))
            right = given + read * opened.config.layers
            if answers[i] != right:
                raise Misbehaviour(
                    f"{operation} says {answers[i]}, expected {right}: one per memory and layer", place=i
                )


@check("memory.block_split", clauses=["AGE", "MASK"], needs=NEEDS, cost=COST, cases=some())
def block_split(probe: Probe, case: ModelCase) -> None:
    """Reading token by token gives what reading in blocks gives."""
    program: list[Operation] = []
    for operation in case.program:
        if isinstance(operation, Step):
            tokens = operation.tokens
            program += [replace(operation, tokens=tokens[:, m : m + 1]) for m in range(tokens.shape[1])]
        else:
            program.append(operation)
    blocks, singles = probe.programs(case.program, tuple(program))
    together = [answer for answer in singles if answer is not None]
    expected = Answers(case.program)
    for i in case.steps():
        length = blocks[i].shape[1]
        alone = np.concatenate(together[:length], axis=1)
        together = together[length:]
        probe.agree(case.log_probs_of(i), alone, blocks[i], expected.of_step(i).bound)


@check("memory.batch_mates", clauses=["DROP"], needs=NEEDS, cost=COST, cases=some(rows=(2, 3)))
def batch_mates(probe: Probe, case: ModelCase) -> None:
    """A row gets alone what it gets beside others, whatever these hold and forget."""
    opened = case.program[0]
    assert isinstance(opened, Open)  # noqa: S101
    rows: list[Program] = []
    for b in range(opened.batch):
        given = opened.memory and [(hidden[b : b + 1], age[b : b + 1]) for hidden, age in opened.memory]
        steps = [replace(o, tokens=o.tokens[b : b + 1]) for o in case.program if isinstance(o, Step)]
        rows.append((replace(opened, batch=1, memory=given), *steps))
    together, *alone = probe.programs(case.program, *rows)
    expected = Answers(case.program)
    for place, i in enumerate(case.steps()):
        apart = np.concatenate([answers[place + 1] for answers in alone])
        probe.agree(case.log_probs_of(i), apart, together[i], expected.of_step(i).bound)


@check("memory.slot_order", clauses=["DROP"], needs=NEEDS, cost=COST, cases=some(memory=True))
def slot_order(probe: Probe, case: ModelCase) -> None:
    """The order in which initial memories are given changes nothing."""
    opened = case.program[0]
    assert isinstance(opened, Open)  # noqa: S101
    assert opened.memory is not None  # noqa: S101
    turned = [(hidden[:, ::-1], age[:, ::-1]) for hidden, age in opened.memory]
    first, second = probe.programs(case.program, (replace(opened, memory=turned), *case.program[1:]))
    expected = Answers(case.program)
    for i in case.steps():
        probe.agree(case.log_probs_of(i), second[i], first[i], expected.of_step(i).bound)
