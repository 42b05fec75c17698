"""The levels memory and model: right models pass, each wrong one is rejected by the checks that are there for it."""

import numpy as np
import pytest

import refspan
from refspan.conformance import check_backend
from refspan.conformance.backends.reference import NumpyBackend
from refspan.conformance.model_bounds import History, ModelBounds
from refspan.conformance.mutants import MUTANTS
from refspan.conformance.mutants.plain import Plain

pytestmark = pytest.mark.usefixtures("remembered_answers")

LEVELS = ("memory", "model")
MODEL_MUTANTS = [one.name for one in MUTANTS.values() if one.area in ("memory", "streams", "states", "models")]
TRAINING_MUTANTS = [one.name for one in MUTANTS.values() if one.area in ("training", "learning")]
KEEPING_MUTANTS = [one.name for one in MUTANTS.values() if one.area == "kept"]


def failures(report):
    return {result.check: result.failure.message for result in report.results if result.status == "failed"}


@pytest.mark.parametrize("name", MODEL_MUTANTS + TRAINING_MUTANTS + KEEPING_MUTANTS)
def test_wrong_model_is_rejected(name):
    mutant = MUTANTS[name]
    report = check_backend(mutant.make(), checks=mutant.killed_by)
    assert {result.check: result.status for result in report.results} == dict.fromkeys(mutant.killed_by, "failed")
    crashed = [message for message in failures(report).values() if " raised " in message]
    assert not crashed or name == "BufferWithoutRoomForTheRamp", crashed


@pytest.mark.parametrize("name", MODEL_MUTANTS)
def test_wrong_model_is_a_model(name):
    """A mutant fails for what it says, not for crashing everywhere."""
    some = ("memory.stream", "memory.keeps_all", "memory.state_machine", "memory.initial", "model.pre_norm")
    messages = failures(check_backend(MUTANTS[name].make(), checks=some, examples=6))
    crashed = [message for message in messages.values() if " raised " in message]
    assert not crashed or name == "BufferWithoutRoomForTheRamp", crashed


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("backend", [NumpyBackend, Plain])
def test_right_model_is_accepted(backend, dtype, seed_of_run, examples_of_run):
    report = check_backend(
        backend(), levels=(*LEVELS, "training"), dtype=dtype, seed=seed_of_run, examples=examples_of_run
    )
    assert report.conforms, failures(report)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("slots", [0, 4])
def test_what_is_live_before_anything_was_read(norm, slots):
    """A row may be reset, or restored, before the first step."""
    config = refspan.ModelConfig(
        9, 6, 8, layers=2, heads=1, head_size=4, block_size=3, max_span=20, ramp=2.0, norm=norm
    )
    params = refspan.initial_parameters(config, 0, dtype="float64")  # spans of 2 steps: live up to age 3
    nothing = np.zeros(0, np.int64)
    hidden = [np.random.default_rng(0).standard_normal((slots, 6))] * 2
    given = History(nothing, hidden, [np.array([1, 3, 5, 9])[:slots]] * 2)
    for history, live in ((History(nothing), 0), (given, min(slots, 2))):
        bounds = ModelBounds(config, params, history)
        assert [bounds.live(layer, 0) for layer in (0, 1)] == [(live, live)] * 2


def test_whether_a_memory_is_alive_at_all_may_be_left_to_rounding():
    """Spans of 2e-9 leave a mask of 2e-9 one step later with a ramp of one step, and in float32 nothing."""
    config = refspan.ModelConfig(
        9, 6, 8, layers=1, heads=1, head_size=4, block_size=3, max_span=3, ramp=1.0, norm="post"
    )
    params = refspan.initial_parameters(config, 0, dtype="float32")
    params["layers.0.span.bias"] = np.float32(-21.0)
    tokens = np.random.default_rng(0).integers(0, 9, 140)
    answers = refspan.open_model(config, params, batch=1).step(tokens[None])[0]
    for length in range(100, 140):
        expected = ModelBounds(config, params, History(tokens[:length])).expected
        error = np.abs(answers[:length] - expected.value)
        assert np.all(error <= expected.bound)
        assert np.max(error[1:]) > 0.1  # another answer altogether, and right
