"""Checks that hold any backend against the reference, whatever it is written in.

from refspan.conformance import check_backend, load_backend

report = check_backend(load_backend("numpy"))
assert report.conforms, report.summary()
"""

from typing import TYPE_CHECKING, Any

from refspan.conformance.guard import NotOffered
from refspan.conformance.protocol import EXAMPLES, TIMEOUT, Backend, Stream

if TYPE_CHECKING:
    from refspan.conformance.report import Report

__all__ = ["Backend", "NotOffered", "Stream", "check_backend", "load_backend"]


def load_backend(text: str, **options: Any) -> Backend:
    """The backend that `text` names, see `refspan.conformance.loading.load_backend`."""
    from refspan.conformance import loading

    return loading.load_backend(text, **options)


def check_backend(
    backend: Backend,
    *,
    levels: tuple[str, ...] = (),
    checks: tuple[str, ...] = (),
    dtype: str = "float32",
    seed: int = 0,
    examples: int = EXAMPLES,
    timeout: float = TIMEOUT,
) -> "Report":
    """Run checks against a backend in this process, all of them unless `levels` or `checks` (ids) are given.

    A backend that hangs is left behind on a thread of its own; one that crashes takes this process with it. The
    command line, `refspan check`, gives each backend a process of its own.

    Raises:
        SetupError: an unknown level, check or dtype.
    """
    from refspan.conformance.report import Report
    from refspan.conformance.runner import DTYPES, facts_of_run, run, select
    from refspan.conformance.sessions import InProcess
    from refspan.errors import SetupError

    if dtype not in DTYPES:
        raise SetupError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    taken = getattr(backend, "dtypes", ()) or DTYPES
    if dtype not in taken:
        raise SetupError(f"backend {backend.name!r} does not take dtype {dtype}; it takes {', '.join(taken)}")
    if examples < 1:
        raise SetupError(f"examples: got {examples}, expected at least 1")
    selected = select(levels, checks)
    session = InProcess(backend, timeout=timeout)
    report = Report(facts_of_run(session.facts, dtype=dtype, seed=seed, examples=examples))
    options = f"dtype={dtype!r}, seed={seed}, examples={examples}, timeout={timeout:g}"

    def replay(id_: str) -> str:
        return f"check_backend(backend, checks=({id_!r},), {options})"

    try:
        for _ in run(session, selected, report, dtype=dtype, seed=seed, examples=examples, replay=replay):
            pass
    finally:
        session.close()
    return report
