"""The suite rejects what is wrong, accepts what is right, and survives what is broken."""

import importlib
import inspect
import sys
import time

import loops
import misbehaving
import numpy as np
import pytest

from refspan.clauses import CLAUSES
from refspan.conformance import check_backend, load_backend
from refspan.conformance.backends.reference import NumpyBackend
from refspan.conformance.guard import NotOffered
from refspan.conformance.mutants import MUTANTS
from refspan.conformance.mutants.dense import ClipsNegativeSpans, Dense, DividesLate, LearnsAtTheKinks
from refspan.conformance.registry import CHECKS, LEVELS
from refspan.conformance.runner import select
from refspan.conformance.sessions import Worker
from refspan.conformance.strategies import ALIKE, SIZES, attention_cases
from refspan.conformance.tolerance import AttentionBounds, expected_mask, mask_interval
from refspan.errors import SetupError

pytestmark = pytest.mark.usefixtures("remembered_answers")

MASK = len(select(["mask"]))
"""Checks of this level."""
ONE_STEP = ("mask", "attention", "gradient", "golden")
"""The levels that concern one attention step; for the others see `test_model_conformance`."""


def failures(report):
    return {result.check: result.failure.message for result in report.results if result.failure}


AREAS = ("mask", "weights", "gradients", "limits", "behaviour")
STEP_MUTANTS = [one.name for one in MUTANTS.values() if one.area in AREAS]


@pytest.mark.parametrize("name", STEP_MUTANTS)
def test_wrong_backend_is_rejected_by_the_named_checks(name):
    """At default settings; each of the named checks on its own."""
    mutant = MUTANTS[name]
    report = check_backend(mutant.make(), checks=mutant.killed_by, timeout=2)
    assert set(failures(report)) == set(mutant.killed_by)
    for result in report.results:
        assert result.failure.counterexample
        assert "\n" not in result.failure.message


def test_enough_wrong_backends_and_every_check_rejects_one():
    assert len(MUTANTS) >= 100
    biting = {check for mutant in MUTANTS.values() for check in mutant.killed_by}
    assert biting == {check.id for check in select() if check.level != "golden"}


@pytest.mark.parametrize("name", ["OneMaskPerBlock", "NoScale", "SeesItself", "PositionOffByOne"])
def test_recorded_results_reject_wrong_backends(name):
    assert failures(check_backend(MUTANTS[name].make(), levels=("golden",)))


DTYPES = ["float16", "float32", "float64"]

RIGHT = [NumpyBackend, Dense, ClipsNegativeSpans, DividesLate, LearnsAtTheKinks]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", RIGHT)
def test_right_backends_are_accepted(backend, dtype, seed_of_run, examples_of_run):
    report = check_backend(backend(), levels=ONE_STEP, dtype=dtype, seed=seed_of_run, examples=examples_of_run)
    assert failures(report) == {}


def test_plain_python_is_accepted(seed_of_run, examples_of_run):
    report = check_backend(loops.Loops(), timeout=60, seed=seed_of_run, examples=examples_of_run)
    assert failures(report) == {}
    assert report.conforms


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_is_accepted(dtype, seed_of_run, examples_of_run):
    pytest.importorskip("torch")
    from torch_backend import TorchBackend

    report = check_backend(TorchBackend(), dtype=dtype, seed=seed_of_run, examples=examples_of_run)
    assert failures(report) == {}


@pytest.mark.parametrize(
    ("form", "dtype"), [("fused", "float16"), ("fused", "float32"), *(("portable", d) for d in DTYPES)]
)
def test_onnxruntime_is_accepted(form, dtype, seed_of_run, examples_of_run):
    backend = load_backend("onnxruntime", form=form)
    report = check_backend(backend, dtype=dtype, seed=seed_of_run, examples=examples_of_run)
    assert failures(report) == {}


def test_every_check_says_what_it_checks():
    select()
    assert {check.level for check in CHECKS.values()} == set(LEVELS)
    for check in CHECKS.values():
        assert check.purpose
        assert set(check.clauses) <= set(CLAUSES)
        assert check.needs
    cited = {clause for check in CHECKS.values() for clause in check.clauses}
    assert {"PAST", "MASK", "LOGIT", "WEIGHT", "EMPTY", "OUTPUT", "GRAD", "WIDTH"} <= cited


def test_runs_are_deterministic_and_differ_by_seed():
    def messages(seed):
        return failures(
            check_backend(
                MUTANTS["NoScale"].make(), checks=("attention.output", "attention.weights"), seed=seed, examples=30
            )
        )

    assert messages(5) == messages(5)
    assert messages(5) != messages(6)


def test_a_check_draws_the_same_cases_whichever_others_run():
    make = MUTANTS["HardMask"].make
    alone = failures(check_backend(make(), checks=("attention.output",)))
    among = failures(check_backend(make(), checks=("mask.values", "attention.weights", "attention.output")))
    assert alone["attention.output"] == among["attention.output"]


def test_a_report_made_in_python_says_how_to_see_a_failure_again():
    backend = MUTANTS["HardMask"].make()
    report = check_backend(backend, levels=("mask",), dtype="float64", seed=4, examples=7)
    failure = next(result.failure for result in report.results if result.failure)
    again = eval(failure.replay, {"check_backend": check_backend, "backend": backend})  # noqa: S307
    assert [result.failure for result in again.results] == [failure]


def test_no_two_sizes_of_a_draw_are_alike():
    for sizes in set(SIZES) - set(ALIKE):
        large = [size for size in sizes if size > 1]
        assert len(set(large)) == len(large)
    assert any(0 in s for s in SIZES)


class TestTolerance:
    def test_exact_arithmetic_gets_no_allowance(self):
        """Spans on a binary grid and a binary ramp: float32 has no excuse, at the kinks least of all."""
        case = wrong_memories([4.0, 8.0, 6.5, 0.0], [4, 8, 12, 1], ramp=4.0)
        interval = mask_interval(case)
        assert (interval.low == interval.high).all()

    def test_rounding_gets_some(self):
        case = wrong_memories([4.1, 131072.3], [7, 131073], ramp=3.0)
        interval = mask_interval(case)
        width = (interval.high - interval.low)[0, 0]
        assert 0 < width[0] < 1e-5
        assert width[0] < width[1] < 0.1  # one step of float32 at 131072 is 1 / 128

    def test_float32_never_leaves_the_interval(self):
        """Four orders of the same sums, at random and at the kinks."""
        rng = np.random.default_rng(0)
        outside = 0
        for ramp in (0.3, 1.0, 7.7, 49.0, 128.0):
            age = rng.integers(1, 200, (1, 2000))
            near = np.float32(age - rng.choice([0, ramp], age.shape) * rng.choice([1, 0.999, 1.001], age.shape))
            span = np.where(rng.random(age.shape) < 0.5, near, rng.random(age.shape) * 200).astype(np.float32)
            case = wrong_memories(span[0], age[0], ramp=ramp)
            interval, t, r = mask_interval(case), age.astype(np.float32), np.float32(ramp)
            one = np.float32(1)
            for m in (one + (span - t) / r, one + (span - t) * (one / r), ((span + r) - t) / r, one - (t - span) / r):
                m = np.clip(m, 0, 1).astype(np.float64)
                outside += np.sum((m < interval.low[0]) | (m > interval.high[0]))
        assert outside == 0

    @pytest.mark.parametrize(
        ("about", "most"),
        [
            # away from kinks, at ages and ramps that float32 has room for, next to nothing is left open
            ({"fates": ("lives on", "expired", "fades"), "ages": ("stream", "gaps"), "ramps": (2.0, 7.7, 128.0)}, 0.01),
            # half of the fates lie at a kink of some query, where the specification leaves the gradient open
            ({}, 0.25),
        ],
        ids=["ordinary", "all"],
    )
    def test_bounds_are_small_and_seldom_infinite(self, about, most):
        """A bound that allows everything checks nothing."""
        from hypothesis import HealthCheck, Phase, given, seed, settings

        large, total = 0, 0

        @seed(0)
        @settings(max_examples=300, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
        @given(attention_cases(np.dtype(np.float32), contents=("normal", "small integers"), **about))
        def collect(case):
            nonlocal large, total
            bounds = AttentionBounds(case)
            everything = [bounds.expected_output(), *bounds.expected_gradients().values()]
            for expected in everything:
                large += np.sum(expected.bound > 1e-3 * max(1.0, np.abs(expected.value).max(initial=0)))
                total += expected.bound.size

        collect()
        assert total > 10_000
        assert large / total < most

    def test_weights_may_be_made_again_in_backward(self):
        """As kernels do that keep the normaliser only: the logit is added up in another order than the one in it.

        The one memory has just expired, which float32 cannot tell at its age. Where it seems alive its weight is 1.
        """
        from refspan.conformance.cases import AttentionCase

        rng = np.random.default_rng(0)
        above_one = 0
        for _ in range(100):
            q, k, v, g = (rng.normal(size=(1, 1, 1, 8)).astype(np.float32) for _ in range(4))
            q, k = q * np.float32(30), k * np.float32(30)
            memories = wrong_memories([2.0**34 + 2**11], [2**34 + 2**11 + 4], ramp=2.0)
            terms = (q * k).ravel() / np.float32(np.sqrt(8))
            forward, backward = (np.add.accumulate(order)[-1] for order in (terms, terms[::-1]))
            weight = np.exp(backward - forward)
            bounds = AttentionBounds(AttentionCase(q, k, v, memories, grad_out=g)).expected_gradients()["value"]
            assert (np.abs(weight * g - bounds.value) <= bounds.bound).all()
            above_one += weight > 1 + 20 * np.finfo(np.float32).eps
        assert above_one > 10

    @pytest.mark.parametrize("logit", [1.0, 600.0, 704.0, 709.0, 720.0])
    def test_the_two_sides_of_a_kink_far_apart(self, logit):
        """A memory at the end of its ramp, which would have all the weight if it were alive, may learn or not."""
        from refspan.conformance.cases import AttentionCase, Memories

        memories = Memories(np.array([[9.0, 4.0]]), np.array([[3, 6]]), 2.0, 1)
        q, k = np.ones((1, 1, 1, 1)), np.array([0.0, logit]).reshape(1, 1, 2, 1)
        case = AttentionCase(q, k, np.array([1.0, 3.0]).reshape(1, 1, 2, 1), memories, grad_out=0.5 * q)
        span = AttentionBounds(case).expected_gradients()["span"]
        with np.errstate(over="ignore"):
            above = np.exp(logit) * 0.5 * (3 - 1) / 2  # exp(s) / Z (da - c) / R
        for learnt in (0.0, above):
            assert span.bound[0, 1] == np.inf or abs(learnt - span.value[0, 1]) <= span.bound[0, 1]
        assert np.isfinite(span.bound[0, 1]) == (logit < 710)

    def test_mask_bound_is_a_few_units_in_the_last_place(self):
        case = wrong_memories([10.3, 10.3, 9.0], [11, 12, 10], ramp=3.0)
        assert expected_mask(case).bound.max() < 64 * np.finfo(np.float32).eps


def wrong_memories(span, age, *, ramp, queries=1):
    from refspan.conformance.cases import Memories

    return Memories(np.array([span], np.float32), np.array([age], np.int64), ramp, queries)


class DeclinesSome(NumpyBackend):
    """Wrong for three queries and more, and does not take some that are smaller."""

    def span_attention(self, query, key, *others, **options):
        if query.shape[2] == 1 and key.shape[2] >= 2:
            raise NotOffered("one query")
        wrong = query.shape[2] >= 3 and key.shape[2] >= 2
        return super().span_attention(query, key, *others, **options) + query.dtype.type(wrong)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_declined_takes_nothing_back(seed):
    """A failure stays one, whatever the backend says to smaller cases."""
    log = []

    class Logs(DeclinesSome):
        def span_attention(self, *arrays, **options):
            log.append(arrays[0].shape[2] >= 3 and arrays[1].shape[2] >= 2)
            try:
                return super().span_attention(*arrays, **options)
            except NotOffered:
                log[-1] = None
                raise

    report = check_backend(Logs(), checks=("attention.output",), seed=seed)
    first = next(one for one in log if one is not False)
    assert report.results[0].status == ("failed" if first else "not offered")
    assert first or len(log) < 100  # once declined, it is not asked on


class TakesCOrder(NumpyBackend):
    """Looks at the memory itself, as a kernel does."""

    def span_attention(self, *arrays, **options):
        arrays_too = [x for x in (*arrays, options.get("position")) if x is not None]
        assert all(x.flags.c_contiguous for x in arrays_too)
        return super().span_attention(*arrays, **options)

    def span_attention_backward(self, *arrays, **options):
        assert all(x.flags.c_contiguous for x in arrays)
        return super().span_attention_backward(*arrays, **options)


def test_arguments_are_in_c_order():
    assert failures(check_backend(TakesCOrder(), levels=("attention", "gradient"), examples=20)) == {}


class TestBrokenBackends:
    """In a process of their own, as the command line runs them."""

    def worker(self, name, timeout=5.0):
        from functools import partial

        return Worker(partial(load_backend, f"{misbehaving.__file__}:{name}"), timeout=timeout)

    def run(self, name, **options):
        from refspan.conformance.report import Report
        from refspan.conformance.runner import run

        session = self.worker(name)
        report = Report(session.facts)
        try:
            list(run(session, select(levels=["mask"]), report, examples=20, **options))
        finally:
            session.close()
        return report

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("Exits", "soft_mask: the backend's process ended with status 3"),
            ("Crashes", "soft_mask: the backend's process ended by signal SIGSEGV"),
            ("CallsExit", "raised SystemExit"),
        ],
    )
    def test_death_is_a_failure_of_each_check(self, name, said):
        report = self.run(name)
        assert report.count("failed") == MASK
        for message in failures(report).values():
            assert said in message

    def test_one_that_cannot_be_started_again_fails_every_check(self, tmp_path, monkeypatch):
        monkeypatch.setenv("REFSPAN_TEST_LOCK", str(tmp_path / "lock"))
        report = self.run("StartsOnce")
        assert (report.count("passed"), report.count("failed")) == (0, MASK)
        assert "could not be started again" in failures(report)["mask.kinks"]

    def test_one_that_takes_long_to_start_is_not_started_for_ever(self, monkeypatch):
        monkeypatch.setattr("refspan.conformance.external.patience.SECONDS", 1e-9)
        report = self.run("Exits")
        assert report.count("failed") == MASK
        said = list(failures(report).values())
        assert [("again and again" in message) for message in said] == [False, False] + [True] * (MASK - 2)

    def test_answers_that_change_are_told_and_a_hang_is_no_such_answer(self):
        """One that is wrong once; and one that is wrong once, and hangs when it is asked for a smaller case."""

        class WrongOnce(Dense):
            asked = 0

            def mask(self, span, age, queries, ramp):
                self.asked += 1
                return super().mask(span, age, queries, ramp) + (self.asked == 1)

        class WrongThenHangs(WrongOnce):
            def mask(self, span, age, queries, ramp):
                if self.asked:
                    time.sleep(3)
                return super().mask(span, age, queries, ramp)

        for make, said, note in ((WrongOnce, " is 1, expected", True), (WrongThenHangs, "did not return", False)):
            message = failures(check_backend(make(), checks=("mask.past",), timeout=1.0))["mask.past"]
            assert said in message
            assert message.endswith("asked the same again, the backend answered differently") is note

    def test_what_it_raises_is_shown_on_one_plain_line(self):
        message = failures(self.run("RaisesItsOwn"))["mask.values"]
        assert message == "soft_mask raised OwnException: ?[31mred lines"

    def test_a_hang_is_ended_and_asked_only_once_per_check(self):
        from functools import partial

        hangs = Worker(partial(load_backend, "refspan.conformance.mutants.behaviour:Hangs"), timeout=1.0)
        from refspan.conformance.report import Report
        from refspan.conformance.runner import run

        report = Report(hangs.facts)
        try:
            list(run(hangs, select(ids=["mask.values"]), report, examples=20))
        finally:
            hangs.close()
        assert "did not answer within 1 s" in failures(report)["mask.values"]
        assert report.results[0].seconds < 8

    def test_printing_does_not_matter(self, capfd):
        report = self.run("Prints")
        assert report.conforms
        assert "noise" not in capfd.readouterr().out

    def test_what_is_not_offered_is_not_passed(self):
        session = self.worker("MaskOnly")
        from refspan.conformance.report import Report
        from refspan.conformance.runner import run

        report = Report(session.facts)
        try:
            list(run(session, select(), report, examples=2))
        finally:
            session.close()
        assert (report.count("passed"), report.count("failed")) == (MASK, 0)
        assert report.count("not offered") == len(CHECKS) - MASK


class TestLoading:
    @pytest.mark.parametrize("attribute", ["instance", "factory", "Choosy"])
    def test_file(self, attribute):
        assert load_backend(f"{misbehaving.__file__}:{attribute}").soft_mask is not None

    def test_module(self):
        assert load_backend("loops:Loops").name == "loops"

    def test_options_reach_the_class(self):
        assert load_backend("misbehaving:Choosy", device="cuda").device == "cuda"

    def test_entry_point(self, tmp_path, monkeypatch):
        folder = tmp_path / "theirs-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("[refspan.backends]\ntheirs = loops:Loops\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert load_backend("theirs").name == "loops"

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("nobody", {}, "unknown backend 'nobody'; expected one of numpy, cupy, onnxruntime"),
            ("no.such.module:Thing", {}, "cannot be imported: ModuleNotFoundError"),
            ("loops:Nothing", {}, "loops has no attribute 'Nothing'"),
            ("missing/file.py:Thing", {}, "backend file missing/file.py: no such file"),
            ("loops:Loops", {"device": "cuda"}, "has no option --device; leave it out"),
            ("misbehaving:OffersNothing", {}, "offers no operation"),
        ],
    )
    def test_what_cannot_be_loaded(self, text, options, message):
        with pytest.raises(SetupError, match=message.replace("(", r"\(")) as caught:
            load_backend(text, **options)
        assert "\n" not in str(caught.value)

    def test_missing_packages_name_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        with pytest.raises(SetupError, match=r'pip install "refspan\[gpu\]"'):
            load_backend("cupy")


def test_protocol_names_are_those_of_the_reference():
    """The reference offers each operation that the levels of today need, with the protocol's parameters."""
    from refspan.conformance.protocol import Backend

    for operation in ("soft_mask", "span_attention", "span_attention_backward"):
        asked = inspect.signature(getattr(Backend, operation)).parameters
        assert list(inspect.signature(getattr(NumpyBackend, operation)).parameters) == list(asked)


def test_a_seed_means_the_same_cases_whatever_is_loaded(tmp_path, monkeypatch):
    """Hypothesis would draw numbers that it finds in the source of modules of one's own."""
    from refspan.conformance.drawing import drawn

    def spans():
        return [case.memories.span.tobytes() for case in drawn(check, np.dtype("float32"), 0, 200)]

    (check,) = select(ids=["attention.output"])
    before = spans()
    (tmp_path / "my_numbers.py").write_text(f"NUMBERS = {list(range(2, 60_000, 61))}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_numbers")
    assert spans() == before
