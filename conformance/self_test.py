"""The suite on trial: every check against every mutant, and against backends that are right (`check --self-test`).

Cases are those of `refspan check` with the same seed and number of examples. They are drawn, and the right answers
computed, once for all backends; a failure is not shrunk. Checks are spread over processes.
"""

import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from refspan.clauses import CLAUSES
from refspan.conformance.drawing import drawn
from refspan.conformance.guard import Misbehaviour, NotOffered
from refspan.conformance.memo import remembering
from refspan.conformance.protocol import EXAMPLES, TIMEOUT
from refspan.conformance.registry import CHECKS, LEVELS, Check, Probe
from refspan.conformance.runner import select
from refspan.conformance.sessions import InProcess

IMPATIENT = 1.0
"""Seconds to wait for mutants that hang."""


@dataclass(frozen=True)
class Verdict:
    """What one check makes of one backend."""

    backend: str
    example: int | None
    """The first example that it fails, counted from 1; None if it passes."""
    message: str = ""
    """How it fails."""


@dataclass(frozen=True)
class Trial:
    """One check against all backends that offer what it asks for."""

    check: str
    verdicts: tuple[Verdict, ...]
    examples: int
    seconds: float

    @property
    def killed(self) -> list[str]:
        """Backends that the check rejects."""
        return [verdict.backend for verdict in self.verdicts if verdict.example is not None]


@dataclass
class SelfTest:
    """All trials, and what follows from them."""

    mutants: Mapping[str, Sequence[str]]
    """Name of each mutant -> the checks that are to reject it."""
    right: Sequence[str]
    """Names of right backends."""
    trials: list[Trial] = field(default_factory=list)
    complete: bool = False
    """False until the last trial has ended."""
    whole: bool = True
    """All checks and mutants take part, so that survivors and idle checks mean something."""

    @property
    def killers(self) -> dict[str, list[str]]:
        """Mutant -> the checks that reject it."""
        return {name: [trial.check for trial in self.trials if name in trial.killed] for name in self.mutants}

    def faults(self) -> list[str]:
        """What is wrong with the suite, a line each."""
        found = [
            f"{verdict.backend} is right, and {trial.check} rejects it at example {verdict.example}: {verdict.message}"
            for trial in self.trials
            for verdict in trial.verdicts
            if verdict.backend in self.right and verdict.example is not None
        ]
        tried = {trial.check for trial in self.trials}
        for name, killers in self.killers.items():
            missed = [check for check in self.mutants[name] if check in tried and check not in killers]
            if not killers and self.whole:
                if not self.complete:  # another check may still reject it
                    continue
                found.append(f"{name} survives; it was to be rejected by {', '.join(self.mutants[name])}")
            elif missed:
                found.append(f"{name} passes {', '.join(missed)}, made to reject it")
        if self.whole:
            found += [
                f"{trial.check} rejects no mutant" for trial in self.trials if not set(trial.killed) & set(self.mutants)
            ]
        return found

    def matrix(self) -> Iterator[str]:
        """Clause -> check -> mutants, in lines."""
        trials = {trial.check: trial for trial in self.trials}
        for clause in CLAUSES:
            cited = [check for check in CHECKS.values() if clause in check.clauses and check.id in trials]
            if cited:
                yield f"{clause}"
            for check in sorted(cited, key=lambda one: LEVELS.index(one.level)):
                killed = [name for name in trials[check.id].killed if name in self.mutants]
                yield f"  {check.id:<28} {len(killed):>3}  {' '.join(killed)}"

    def summary(self) -> str:
        """The last line."""
        killed = sum(bool(killers) for killers in self.killers.values())
        faults = self.faults()
        line = (
            f"{killed} of {len(self.mutants)} mutants rejected, by {len(self.trials)} checks; "
            f"{len(self.right)} right backends; {len(faults)} faults of the suite"
        )
        return line if self.complete else f"{line}, INCOMPLETE"

    def to_json(self) -> str:
        """All of it."""
        tree = {
            "refspan_self_test": 1,
            "complete": self.complete,
            "faults": self.faults(),
            "killers": self.killers,
            "trials": [asdict(trial) for trial in self.trials],
        }
        return json.dumps(tree, indent=2) + "\n"


def self_test(
    *,
    levels: Sequence[str] = (),
    ids: Sequence[str] = (),
    mutants: Sequence[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    examples: int = EXAMPLES,
    processes: int | None = None,
) -> Generator[SelfTest, None, None]:
    """Try checks on mutants and right backends; yields the state of things after each check.

    And before: at the beginning, and once its processes have started.

    Args:
        levels: whose checks are tried; all by default.
        ids: of further checks, see `select`.
        mutants: names of those to try; all by default.
        dtype: of query, key and value.
        seed: of everything random.
        examples: per check.
        processes: at work at once; one per core by default.

    Raises:
        SetupError: there is no such level or check.
    """
    from refspan.conformance.mutants import MUTANTS, RIGHT

    chosen = [MUTANTS[name] for name in mutants] if mutants else list(MUTANTS.values())
    state = SelfTest({one.name: one.killed_by for one in chosen}, list(RIGHT), whole=not (levels or ids or mutants))
    checks = select(levels, ids)
    yield state
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes to come: they share the cores among them
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare) as pool:
        costly = sorted(checks, key=lambda check: -check.cost)  # first, so that no process ends long after the others
        try:
            with _deaf():
                asked = [pool.submit(_try, check.id, list(state.mutants), dtype, seed, examples) for check in costly]
            yield state
            for done in as_completed(asked):
                state.trials.append(done.result())
                yield state
        except BaseException:  # Ctrl-C, or the consumer has had enough
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    order = {check.id: i for i, check in enumerate(checks)}
    state.trials.sort(key=lambda trial: order[trial.check])
    state.complete = True
    yield state


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that start in this block do not hear Ctrl-C until they can ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare() -> None:
    """Ctrl-C is for the process that waits for this one; what mutants overflow is no news."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", RuntimeWarning)


def _try(id_: str, names: Sequence[str], dtype: str, seed: int, examples: int) -> Trial:
    """One check, in a process of the pool."""
    from refspan.conformance.mutants import MUTANTS, RIGHT

    start = time.perf_counter()
    (check,) = select(ids=[id_])
    cases = drawn(check, np.dtype(dtype), seed, examples)
    verdicts = []
    with remembering(), np.errstate(all="ignore"):
        for name in (*RIGHT, *names):
            make = RIGHT[name] if name in RIGHT else MUTANTS[name].make
            hangs = name in MUTANTS and MUTANTS[name].hangs
            verdict = _verdict(check, name, make(), cases, IMPATIENT if hangs else 3 * TIMEOUT)
            verdicts += [verdict] if verdict else []
    return Trial(id_, tuple(verdicts), len(cases), time.perf_counter() - start)


def _verdict(check: Check, name: str, backend: Any, cases: Sequence[Any], timeout: float) -> Verdict | None:
    """None if the backend does not offer what the check asks for."""
    session = InProcess(backend, timeout=timeout)
    probe = Probe(session)
    try:
        for i, case in enumerate(cases, start=1):
            try:
                check.body(probe, case)
            except NotOffered:
                return None
            except Misbehaviour as error:
                return Verdict(name, i, str(error))
    finally:
        session.close()
    return Verdict(name, None)
