"""Running checks: cases are drawn and shrunk, a session asks the backend, a report collects."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import hypothesis
import numpy as np
from hypothesis.errors import Flaky
from threadpoolctl import ThreadpoolController

import refspan
from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.drawing import ask_all
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
from refspan.conformance.vectors.replay import checks_of
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


@dataclass(frozen=True)
class _Found:
    """A failure, and what showed it."""

    case: Any
    error: Misbehaviour
    questions: tuple[Any, ...]
    """All that were asked, one after the other."""
    compared: Mapping[str, Expected]
    """What the answer was compared with, if there was one question."""

    @property
    def question(self) -> Any:
        """The question that was answered wrongly, if that is known, or else the case."""
        if len(self.questions) == 1:
            return self.questions[0]
        if isinstance(self.case, AttentionCase | Memories) and self.error.place is not None:
            return self.questions[self.error.place]
        return self.case


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
    shrunk: _Found | None = None
    lost: _Found | None = None  # hung or died: asked once, not shrunk
    declined: NotOffered | None = None  # before anything was wrong

    def ask(case: Any) -> None:
        nonlocal asked, shrunk, lost, declined
        if lost is not None:
            raise lost.error
        if declined is not None:
            raise declined
        tick(check, asked)
        asked += 1
        try:
            with np.errstate(all="ignore"):  # answers may be infinite, or anything
                check.ask(probe, case)
        except NotOffered as error:
            if shrunk is not None:
                return  # a smaller case than the one that showed what is wrong, and of no use
            declined = error
            raise
        except Misbehaviour as error:
            compared = dict(probe.compared) if len(probe.asked) == 1 else {}
            found = _Found(case, error, probe.asked, compared)
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
        ask_all(check, dtype, seed, examples, ask)
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
        question, vector = _alone(session, check, found, asked_again=found is not lost)
        shown = question if isinstance(found.case, AttentionCase | Memories) else found.case
        pictures = tuple(pictures_of(shown, found.error.row))
        if isinstance(shown, AttentionCase | Memories):
            described = shown.describe(found.error.row)
        elif isinstance(shown, ModelCase):
            described = shown.describe(found.error.place)
        else:
            described = shown.describe()
        if vector is not None:
            keep(vector)
        elif len(found.questions) > 1:
            described.append(
                f"one of {len(found.questions)} questions, none of which can be saved as one that fails alone"
            )
        return result(status, Failure(f"{found.error}{note}", tuple(described), replay, pictures))
    return result(status)


def _alone(session: Session, check: Check, found: _Found, *, asked_again: bool) -> tuple[Any, AnyVector | None]:
    """Which question to show, and as a vector if it can be one, and fails when nothing else is asked."""
    if len(found.questions) == 1 or not asked_again:
        return found.question, _frozen(check, found, found.question)
    for question in (found.question, *found.questions):
        vector = _frozen(check, found, question)
        if vector is not None and _fails(session, vector):
            return question, vector
    return found.question, None


def _frozen(check: Check, found: _Found, question: Any) -> AnyVector | None:
    """A question as a vector; None if it cannot be one."""
    about: dict[str, Any] = {"check": check.id, "clauses": check.clauses, "purpose": check.purpose.partition("\n")[0]}
    if (operation := OF_LEVEL.get(check.level)) is not None:
        return vector_of(question, operation, compared=found.compared, **about)
    return program_vector_of(question, notes=getattr(found.case, "notes", ()), **about)


def _fails(session: Session, vector: AnyVector) -> bool:
    """Whether a question is answered wrongly when nothing else is asked."""
    (check,) = checks_of([vector])
    try:
        with np.errstate(all="ignore"):
            check.body(Probe(session), vector)
    except Misbehaviour:
        return True
    except NotOffered:
        pass
    return False
