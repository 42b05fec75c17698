"""Running checks: Hypothesis draws and shrinks, a session asks the backend, a report collects."""

import platform
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky, HypothesisWarning
from hypothesis.strategies import SearchStrategy
from threadpoolctl import ThreadpoolController

import refspan
from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.guard import Hung, Misbehaviour, NotOffered
from refspan.conformance.model_cases import ModelCase
from refspan.conformance.pictures import pictures_of
from refspan.conformance.protocol import EXAMPLES
from refspan.conformance.registry import CHECKS, LEVELS, Check, Probe
from refspan.conformance.report import Failure, Known, Report, Result, Status
from refspan.conformance.sessions import Session
from refspan.conformance.tolerance import Expected
from refspan.conformance.vectors.program_vector import program_vector_of
from refspan.conformance.vectors.reading import AnyVector
from refspan.conformance.vectors.vector import OF_LEVEL, vector_of
from refspan.errors import SetupError

DTYPES = ("float16", "float32", "float64")


def select(levels: Sequence[str] = (), ids: Sequence[str] = ()) -> list[Check]:
    """The checks of these levels and with these ids; all of them if neither is given.

    Raises:
        SetupError: there is no such level or check.
    """
    import refspan.conformance.checks  # noqa: F401 - registers them

    for level in levels:
        if level not in LEVELS:
            raise SetupError(f"unknown level {level!r}; expected one of {', '.join(LEVELS)}")
    for id_ in ids:
        if id_ not in CHECKS:
            raise SetupError(f"unknown check {id_!r}; `refspan check --list` lists them")
    wanted = [c for c in CHECKS.values() if c.level in levels or c.id in ids or not (levels or ids)]
    return sorted(wanted, key=lambda c: LEVELS.index(c.level))


def facts_of_run(facts: Mapping[str, str], *, dtype: str, seed: int, examples: int) -> dict[str, str]:
    """What a report says at its head; `facts` are those of the backend's session."""
    return {
        "refspan": refspan.__version__,
        **facts,
        "dtype": dtype,
        "seed": str(seed),
        "examples": f"{examples} per check",
        "python": f"{platform.python_version()}, numpy {np.__version__}, hypothesis {hypothesis.__version__}",
    }


def run(
    session: Session,
    checks: Iterable[Check],
    report: Report,
    *,
    dtype: str = "float32",
    seed: int = 0,
    examples: int = EXAMPLES,
    replay: Callable[[str], str] = "refspan check --check {}".format,
    tick: Callable[[Check, int], None] = lambda check, example: None,  # noqa: ARG005
    expected: Mapping[str, Known] = MappingProxyType({}),
    keep: Callable[[AnyVector], None] = lambda vector: None,  # noqa: ARG005
) -> Iterator[Result]:
    """Run `checks`, yield each result and add it to `report`; mark the report complete at the end.

    What `expected` lists is a known failure if it fails, and a complaint of the report if it does not.

    Args:
        session: the backend.
        checks: what to run, in this order.
        report: where results are added.
        dtype: of query, key and value.
        seed: of everything random. A check draws the same cases whichever others run beside it.
        examples: per check.
        replay: the command that runs the check of an id again.
        tick: called before each example.
        expected: check -> why it is expected to fail.
        keep: called with the smallest counterexample of each failure that one question shows.
    """
    checks = list(checks)
    report.planned = len(checks)
    threads = ThreadpoolController()
    for one in checks:
        # What is right is computed from small products, which threads only slow down, tenfold beside other work.
        with threads.limit(limits=1, user_api="blas"):
            result = _run_one(session, one, np.dtype(dtype), seed, examples, replay(one.id), tick, keep)
        if one.id in expected:
            result = replace(result, known=expected[one.id])
            if result.status == "failed":
                result = replace(result, status="known failure")
            else:
                did = "passed" if result.status == "passed" else "was not offered"
                report.complaints.append(f"{one.id} was expected to fail and {did}: take it off the list")
        report.results.append(result)
        yield result
    report.complete = True


def _run_one(
    session: Session,
    check: Check,
    dtype: np.dtype,
    seed: int,
    examples: int,
    replay: str,
    tick: Callable[[Check, int], None],
    keep: Callable[[AnyVector], None],
) -> Result:
    probe = Probe(session)
    asked = 0
    # (case, what was wrong, the one question that showed it and what was expected, or else the case itself)
    shrunk: tuple[Any, Misbehaviour, Any, Mapping[str, Expected]] | None = None
    lost: tuple[Any, Misbehaviour, Any, Mapping[str, Expected]] | None = None  # hung or died: asked once, not shrunk
    declined: NotOffered | None = None  # before anything was wrong

    def ask(case: Any) -> None:
        nonlocal asked, shrunk, lost, declined
        if lost is not None:
            raise lost[1]
        if declined is not None:
            raise declined
        tick(check, asked)
        asked += 1
        try:
            with np.errstate(all="ignore"):  # answers may be infinite, or anything
                check.body(probe, case)
        except NotOffered as error:
            if shrunk is not None:
                return  # a smaller case than the one that showed what is wrong, and of no use
            declined = error
            raise
        except Misbehaviour as error:
            alone = len(probe.asked) == 1
            found = case, error, probe.asked[0] if alone else case, dict(probe.compared) if alone else {}
            if isinstance(error, Hung):
                lost = found
            else:
                shrunk = found
            raise

    start = time.perf_counter()

    def result(status: Status, failure: Failure | None = None) -> Result:
        about = check.id, check.level, check.clauses, check.purpose
        if status == "not offered":
            return Result(*about, status, 0.0, 0, 0.0)
        seconds = time.perf_counter() - start
        return Result(*about, status, probe.worst, asked, seconds, probe.backend_seconds, failure)

    status: Status = "passed"
    note = ""
    try:
        _ask_all(check, dtype, seed, examples, ask)
    except NotOffered:
        return result("not offered")
    except Misbehaviour:
        status = "failed"
    except Flaky:
        status, note = "failed", "; asked the same again, the backend answered differently"

    if status == "failed":
        found = lost or shrunk
        if found is None:
            return result(status, Failure(f"the check could not be finished{note}", (), replay))
        case, error, question, compared = found
        vector = _frozen(check, case, question, compared)
        if vector is not None:
            keep(vector)
        pictures = tuple(pictures_of(case, error.row))
        if isinstance(case, AttentionCase | Memories):
            described = case.describe(error.row)
        elif isinstance(case, ModelCase):
            described = case.describe(error.place)
        else:
            described = case.describe()
        return result(status, Failure(f"{error}{note}", tuple(described), replay, pictures))
    return result(status)


def _frozen(check: Check, case: Any, question: Any, compared: Mapping[str, Expected]) -> AnyVector | None:
    """The question of a check as a vector; None if it cannot be one."""
    about: dict[str, Any] = {"check": check.id, "clauses": check.clauses, "purpose": check.purpose.partition("\n")[0]}
    if (operation := OF_LEVEL.get(check.level)) is not None:
        return vector_of(question, operation, compared=compared, **about)
    return program_vector_of(question, notes=getattr(case, "notes", ()), **about)


def drawn(check: Check, dtype: np.dtype, seed: int, examples: int) -> list[Any]:
    """The cases that `run` asks of a backend that passes, in their order."""
    cases: list[Any] = []

    def collect(case: Any) -> None:
        cases.append(case)

    _ask_all(check, dtype, seed, examples, collect)
    return cases


AT_ONCE = 10
"""Examples of one run of Hypothesis. After as many it goes on with small changes of each, which differ too little."""


def _ask_all(check: Check, dtype: np.dtype, seed: int, examples: int, ask: Callable[[Any], None]) -> None:
    cases = check.cases(dtype)
    if not isinstance(cases, Sequence):
        _draw(cases, f"{seed} {check.id} {dtype}", max(1, examples // check.cost), ask)
        return
    for place, case in enumerate(cases):
        if isinstance(case, SearchStrategy):
            share = examples // check.cost // len(cases) + (place < examples // check.cost % len(cases))
            _draw(case, f"{seed} {check.id} {dtype} {place}", max(1, share), ask)
        else:
            ask(case)


def _draw(cases: SearchStrategy[Any], seed: str, left: int, ask: Callable[[Any], None]) -> None:
    turn = 0
    while left > 0:
        # Each run begins with the plainest case there is. Once is enough, and not as the very first question: it has
        # no memories, so that a backend whose first call goes wrong would be right all the same.
        last = left <= AT_ONCE
        count = min(AT_ONCE, left + (not last))
        own_seed = zlib.crc32(f"{seed} {turn}".encode())
        _ask_some(cases, own_seed, count, ask if last else _but_the_first(ask))
        left -= count - (not last)
        turn += 1


def _but_the_first(ask: Callable[[Any], None]) -> Callable[[Any], None]:
    """`ask`, which is not called the first time."""
    called = False

    def later(case: Any) -> None:
        nonlocal called
        if called:
            ask(case)
        called = True

    return later


def _ask_some(cases: SearchStrategy[Any], seed: int, examples: int, ask: Callable[[Any], None]) -> None:
    decorate = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )

    def asked(case: Any) -> None:
        ask(case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # about the size of cases, which we describe ourselves
        hypothesis.seed(seed)(decorate(given(cases)(asked)))()
