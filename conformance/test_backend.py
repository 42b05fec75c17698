"""Tests of somebody's backend: `pytest --pyargs refspan.conformance --refspan-backend=..`, see `pytest_plugin`."""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refspan.conformance.registry import Check
    from refspan.conformance.sessions import Session


def test_check(refspan_check: "Check", refspan_session: "Session", refspan_options: dict[str, Any]) -> None:
    """The backend passes this check, or fails as expected."""
    from refspan.conformance.report import Report, escaped
    from refspan.conformance.runner import run

    report = Report({})
    (result,) = run(refspan_session, [refspan_check], report, **refspan_options)
    if result.status == "not offered" and not report.complaints:
        pytest.skip("not offered")
    if result.status == "known failure" and result.known is not None:
        pytest.xfail(escaped(f"{result.known.reason}, {result.known.link}"))
    if report.complaints:
        pytest.fail("\n".join(map(escaped, report.complaints)), pytrace=False)
    if result.failure is not None:
        failure = result.failure
        lines = [failure.message, *(f"  {line}" for line in failure.counterexample), f"replay: {failure.replay}"]
        pytest.fail("\n".join([refspan_check.purpose, *map(escaped, lines)]), pytrace=False)
