"""Running checks: cases are drawn and shrunk, a session asks the backend, a report collects."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import hypothesis
import numpy as np
from hypothesis.errors import Flaky
from threadpoolctl import ThreadpoolController

import refspan
from refspan.conformance.drawing import ask_all
from refspan.conformance.failures import Found, failure_of
from refspan.conformance.guard import Hung, Misbehaviour, NotOffered
from refspan.conformance.protocol import EXAMPLES
from refspan.conformance.registry import CHECKS, LEVELS, Check, Probe
from refspan.conformance.report import Failure, Known, Report, Result, Status
from refspan.conformance.sessions import Session
from refspan.conformance.vectors.reading import AnyVector
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
        keep: called with the smallest counterexample of each failure, if one question alone shows it.
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


class _Attempt:
    """A check as it is put to the backend, case by case, and what came of it."""

    def __init__(self, session: Session, check: Check, tick: Callable[[Check, int], None]) -> None:
        self._check, self._tick = check, tick
        self.probe = Probe(session)
        self.asked = 0
        self._shrunk: Found | None = None
        self._lost: Found | None = None
        """It hung or died: asked once, not shrunk."""
        self._declined: NotOffered | None = None
        """Before anything was wrong."""

    @property
    def was_lost(self) -> bool:
        """Whether it hung or died at last: then it was not asked the same again."""
        return self._lost is not None

    @property
    def found(self) -> Found | None:
        """The smallest failure."""
        return self._lost or self._shrunk

    def ask(self, case: Any) -> None:
        """One case more; raises what the backend did."""
        if self._lost is not None:
            raise self._lost.error
        if self._declined is not None:
            raise self._declined
        self._tick(self._check, self.asked)
        self.asked += 1
        try:
            with np.errstate(all="ignore"):  # answers may be infinite, or anything
                self._check.ask(self.probe, case)
        except NotOffered as error:
            if self._shrunk is not None:
                return  # a smaller case than the one that showed what is wrong, and of no use
            self._declined = error
            raise
        except Misbehaviour as error:
            compared = dict(self.probe.compared) if len(self.probe.asked) == 1 else {}
            found = Found(self._check, case, error, self.probe.asked, compared)
            if isinstance(error, Hung):
                self._lost = found
            else:
                self._shrunk = found
            raise


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
    about = check.id, check.level, check.clauses, check.purpose
    attempt = _Attempt(session, check, tick)
    start = time.perf_counter()
    status: Status = "passed"
    note, failure = "", None
    try:
        ask_all(check, dtype, seed, examples, attempt.ask)
    except NotOffered:
        return Result(*about, "not offered", 0.0, 0, 0.0)
    except Misbehaviour:
        status = "failed"
    except Flaky:
        status = "failed"
        if not attempt.was_lost:
            note = "; asked the same again, the backend answered differently"
    if status == "failed":
        failure = Failure(f"the check could not be finished{note}", (), replay)
        if attempt.found is not None:
            failure, vector = failure_of(session, attempt.found, note, replay)
            if vector is not None:
                keep(vector)
    seconds = time.perf_counter() - start
    return Result(*about, status, attempt.probe.worst, attempt.asked, seconds, attempt.probe.backend_seconds, failure)
