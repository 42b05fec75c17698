"""Whatever a backend answers, one check fails, in one line, and the run goes on."""

import sys

import odd_answers
import pytest

from refspan.conformance import check_backend
from refspan.conformance.loading import session_of
from refspan.conformance.report import Report
from refspan.conformance.runner import facts_of_run, run, select
from refspan.errors import SetupError

SERVE = f"exec:{sys.executable} -m refspan.conformance.external.serve"


def report_of(name, *ids, over_the_wire=False):
    where = f"{odd_answers.__file__}:{name}"
    session = session_of(f"{SERVE} {where}" if over_the_wire else where, timeout=5)
    report = Report(session.facts)
    try:
        list(run(session, [*select(ids=ids), *select(ids=["mask.past"])], report, examples=8))
    finally:
        session.close()
    return report


def outcome(report, id_):
    (result,) = [result for result in report.results if result.check == id_]
    return result.failure.message if result.failure else result.status


ODD = [
    ("NoSpanBias", "training.initial_spans", "layers.0.span.bias: it is missing"),
    ("Words", "training.initial_spans", "expected an array of numbers"),
    ("Objects", "training.initial_spans", "expected an array of numbers"),
    ("NotFinite", "training.initial_spans", "initial output.weight holds NaN or infinite numbers"),
    (
        "PositionsWithoutEnd",
        "training.initial_spans",
        "got shape (1000000000000, 4), expected an array of shape ('P', ",
    ),
    ("WeightsWithoutEnd", "training.initial_spans", "output.weight: got shape (1000000, 1000000), expected"),
    ("SpansNowhere", "training.initial_spans", "where the sigmoid's slope is 0: spans could never learn"),
    ("Granularity", "memory.bound", "memory_granularity is 4.0, expected a whole number from 1 to 4096"),
    ("GranularityWord", "memory.bound", "memory_granularity is abc, expected"),
    ("GranularityNone", "memory.bound", "memory_granularity is 0, expected"),
    ("GranularityOfAll", "memory.bound", "memory_granularity is 1000000000, expected"),
    ("GranularityOfBlocks", "memory.bound", "passed"),
    ("SizesOfManyDigits", "memory.bound", "something of type list, expected a whole number >= 0 for each layer"),
    ("SizesInfinite", "memory.bound", "returned [inf], expected a whole number >= 0 for each layer"),
    ("SizesEndless", "memory.bound", "expected a whole number >= 0 for each layer"),
    ("SizesNegative", "memory.bound", "returned [-1], expected a whole number >= 0 for each layer"),
    ("SizesWord", "memory.bound", "returned '1', expected a whole number >= 0 for each layer"),
    ("SizesTrue", "memory.bound", "returned [True], expected a whole number >= 0 for each layer"),
    ("SizesWithAPoint", "memory.bound", "returned [2.0], expected a whole number >= 0 for each layer"),
    ("SizesNothing", "memory.bound", "returned None, expected a whole number >= 0 for each layer"),
    ("RowsWord", "memory.projected_once", "rows_projected() returned 'many', expected a whole number >= 0"),
    ("RowsList", "memory.projected_once", "rows_projected() returned [1], expected a whole number >= 0"),
    ("RowsNothing", "memory.projected_once", "rows_projected() returned None, expected a whole number >= 0"),
    ("RowsHalf", "memory.projected_once", "rows_projected() returned 0.5, expected a whole number >= 0"),
    ("ResetSaysSomething", "memory.reset", "passed"),
    ("Forks", "mask.values", "passed"),
    ("RaisesWithoutWords", "mask.values", "soft_mask raised Speechless: something of type Speechless"),
    ("ReturnsShapeless", "mask.values", "passed"),
    ("ReturnsRestless", "gradient.values", "the answer cannot be understood: RuntimeError: not now"),
    ("ReturnsWhatSaysItFits", "mask.values", "soft_mask returned shape (1,), expected"),
    ("EndlessFacts", "mask.values", "passed"),
]


@pytest.mark.parametrize(("name", "check", "said"), ODD)
def test_odd_answers(name, check, said):
    report = report_of(name, check)
    assert said in outcome(report, check)
    assert outcome(report, check).isprintable()
    others = [result.status for result in report.results if result.check != check]
    assert others == ["failed" if name in ("RaisesWithoutWords", "ReturnsWhatSaysItFits") else "passed"]


# the server sees to the other half itself
OVER_THE_WIRE = [
    ("NoSpanBias", "training.initial_spans", "the answer has no tensor 'params.layers.0.span.bias'"),
    *(row for row in ODD if row[0].startswith(("Granularity", "Rows", "Reset"))),
]


@pytest.mark.parametrize(("name", "check", "said"), OVER_THE_WIRE)
def test_odd_answers_over_the_wire(name, check, said):
    report = report_of(name, check, over_the_wire=True)
    assert said in outcome(report, check)
    assert outcome(report, "mask.past") == "passed"


@pytest.mark.parametrize("name", ["Words", "SizesOfManyDigits", "SizesEndless", "ReturnsRestless"])
def test_odd_answers_in_process(name):
    """Without waiting for a thread that has died of it."""
    checks = ("training.initial_spans", "memory.bound", "mask.past", "gradient.values")
    report = check_backend(getattr(odd_answers, name)(), checks=checks, examples=8, timeout=60)
    assert report.complete
    assert report.count("failed") == 1


@pytest.mark.parametrize("over_the_wire", [False, True])
def test_what_a_backend_says_about_itself(over_the_wire):
    where = f"{odd_answers.__file__}:Named"
    session = session_of(f"{SERVE} {where}" if over_the_wire else where, timeout=5)
    try:
        facts = facts_of_run(session.facts, dtype="float32", seed=7, examples=3)
    finally:
        session.close()
    assert facts["backend"] == "good?[2J fake ?"
    assert facts["refspan"] != "9.9"
    assert (facts["dtype"], facts["seed"], facts["examples"]) == ("float32", "7", "3 per check")
    assert facts["backend refspan"] == "9.9"
    assert facts["backend backend"] == "numpy"
    assert facts["backend command"] == "rm"
    assert facts["?[1m"] == "?"
    assert list(session.dtypes) == ["float32", "float?[1m64"]
    assert len(facts) < 50
    for text in [*facts, *facts.values()]:
        assert text.isprintable()
        assert len(text) <= 300
        text.encode()


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"facts": lambda: 7}, "facts() of the backend: TypeError: 'int' object is not iterable"),
        ({"facts": lambda: 1 / 0}, "facts() of the backend: ZeroDivisionError: division by zero"),
        ({"dtypes": 7}, "`dtypes` of the backend: TypeError"),
    ],
)
def test_a_backend_that_cannot_say_what_it_is(attributes, said):
    from refspan.conformance.facts import dtypes_of, facts_of

    backend = type("Backend", (), attributes)
    with pytest.raises(SetupError) as caught:
        facts_of(backend), dtypes_of(backend)
    assert said in str(caught.value)
