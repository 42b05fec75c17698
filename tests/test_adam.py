"""Adam: against PyTorch step for step, against numbers recorded from it, on another library, resumed, misused."""

import array_api_strict
import numpy as np
import pytest

import refspan

STEPS = 25

START = {"matrix": np.linspace(-1, 1, 6).reshape(2, 3), "scalar": np.asarray(0.5)}

RECORDED = {
    (0, None): (
        [
            [-1.7044790638262366, -0.6501236596352483, 0.046714474741773454],
            [0.3773088925665524, 0.8311218554661044, 1.0405540443683532],
        ],
        0.19313054936987595,
    ),
    (0, 1.0): (
        [
            [-2.1219621703922362, -0.5807598116860884, -0.050535758618151204],
            [0.27987946081865717, 0.749091176072813, 1.0449541645544587],
        ],
        0.29996835131952143,
    ),
    (10, 1.0): (
        [
            [-1.897564285604503, -0.5696453142758329, -0.15095641121021308],
            [0.2213613643804891, 0.6544422168216093, 1.0388023418240668],
        ],
        0.4218636863286233,
    ),
    (10, None): (
        [
            [-1.5128095729848698, -0.600276070812082, -0.07749764491077647],
            [0.2886223383299279, 0.7173854718235758, 1.0475821146925055],
        ],
        0.33794843519764806,
    ),
}
"""Steps of warm-up and largest norm -> parameters after all steps: PyTorch 2.13, float64, learning rate 0.05."""


def gradients(t, dtype=np.float64):
    """Of step t: large at first and small later, so that a largest norm of 1 clips the first 8 and no other."""
    size = 4.0 / t
    grads = {"matrix": size * np.cos(np.arange(6.0).reshape(2, 3) * t), "scalar": np.asarray(size * np.sin(t))}
    return {name: grad.astype(dtype) for name, grad in grads.items()}


def adam(warmup_steps=10, max_grad_norm=1.0, **settings):
    return refspan.Adam(0.05, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm, **settings)


def train(optimiser, params, steps):
    for t in steps:
        params = optimiser.step(params, gradients(t, params["matrix"].dtype))
    return params


def assert_near(params, expected, tolerance=1e-14):
    assert list(params) == list(expected)
    for name, want in expected.items():
        assert isinstance(params[name], np.ndarray)
        assert params[name].shape == np.shape(want)
        np.testing.assert_allclose(params[name], want, rtol=0, atol=tolerance * np.max(np.abs(want)), err_msg=name)


@pytest.mark.parametrize(("warmup_steps", "max_grad_norm"), RECORDED)
def test_recorded_parameters(warmup_steps, max_grad_norm):
    params = train(adam(warmup_steps, max_grad_norm), START, range(1, STEPS + 1))
    matrix, scalar = RECORDED[warmup_steps, max_grad_norm]
    assert_near(params, {"matrix": matrix, "scalar": scalar})


@pytest.mark.parametrize(
    ("warmup_steps", "max_grad_norm", "settings"),
    [*((*key, {}) for key in RECORDED), (40, 0.3, {}), (3, 2.0, {"betas": (0.5, 0.8), "epsilon": 1e-3})],
)
def test_equals_pytorch_at_every_step(warmup_steps, max_grad_norm, settings):
    torch = pytest.importorskip("torch")
    theirs = {name: torch.tensor(array, requires_grad=True) for name, array in START.items()}
    options = {"betas": settings.get("betas", (0.9, 0.999)), "eps": settings.get("epsilon", 1e-8)}
    optimiser = torch.optim.Adam(theirs.values(), lr=0.05, **options)
    factor = lambda done: min(1, (done + 1) / max(warmup_steps, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    ours, params = adam(warmup_steps, max_grad_norm, **settings), START
    clipped = set()
    for t in range(1, STEPS + 1):
        for name, grad in gradients(t).items():
            theirs[name].grad = torch.tensor(grad)
        if max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
            clipped.add(bool(norm > max_grad_norm))
        optimiser.step()
        schedule.step()
        params = ours.step(params, gradients(t))
        assert_near(params, {name: tensor.detach().numpy() for name, tensor in theirs.items()})
    assert max_grad_norm in (None, 0.3) or clipped == {True, False}


def test_first_step_has_the_length_of_the_learning_rate():
    """However large the gradient: that is what bias correction is for."""
    for size in (1e-3, 1.0, 1e3):
        params = refspan.Adam(0.25).step({"x": np.zeros(3)}, {"x": size * np.array([1.0, -1.0, 1.0])})
        np.testing.assert_allclose(params["x"], [-0.25, 0.25, -0.25], rtol=1e-4)
    params = refspan.Adam(0.25, warmup_steps=10).step({"x": np.zeros(1)}, {"x": np.ones(1)})
    np.testing.assert_allclose(params["x"], [-0.025], rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_array_api_strict_on_its_second_device(dtype):
    """That device refuses to become a NumPy array: a hidden call of NumPy fails."""
    device = array_api_strict.Device("device1")

    def to(arrays):
        return {name: array_api_strict.asarray(x.copy(), device=device) for name, x in arrays.items()}

    def back(x):
        assert x.device == device
        return np.asarray(array_api_strict.asarray(x, device=array_api_strict.Device("CPU_DEVICE"), copy=True))

    start = {name: x.astype(dtype) for name, x in START.items()}
    expected = train(adam(), start, range(1, 6))
    ours, params = adam(), to(start)
    for t in range(1, 6):
        params = ours.step(params, to(gradients(t, dtype)))
        other = adam()
        other.restore(ours.state())
        ours = other
    assert all(x.dtype == getattr(array_api_strict, dtype) for x in params.values())
    assert_near({name: back(x) for name, x in params.items()}, expected, 1e-6 if dtype == "float32" else 1e-14)
    assert back(ours.state()["step"]) == 5


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes(dtype):
    start = {name: x.astype(dtype) for name, x in START.items()}
    optimiser = adam()
    params = train(optimiser, start, range(1, STEPS + 1))
    wide = "float64" if dtype == "float64" else "float32"
    assert {x.dtype for x in params.values()} == {np.dtype(dtype)}
    assert {x.dtype for name, x in optimiser.state().items() if name != "step"} == {np.dtype(wide)}
    matrix, scalar = RECORDED[10, 1.0]
    # each of the steps rounds the parameters once
    assert_near(params, {"matrix": matrix, "scalar": scalar}, STEPS * np.finfo(dtype).eps)


def test_small_gradients_of_float16_are_not_lost():
    """Their squares are 0 in float16."""
    params = refspan.Adam(0.25).step({"x": np.zeros(2, np.float16)}, {"x": np.full(2, 1e-5, np.float16)})
    np.testing.assert_allclose(params["x"], [-0.25, -0.25], rtol=2e-3)


def test_arguments_and_states_are_never_written_to():
    optimiser = adam()
    params = {name: x.copy() for name, x in START.items()}
    after = train(optimiser, params, [1])
    state = optimiser.state()
    copies = {name: x.copy() for name, x in state.items()}
    grads = gradients(2)
    for array in (*after.values(), *state.values(), *grads.values()):
        array.flags.writeable = False
    optimiser.step(after, grads)
    for name, array in copies.items():
        np.testing.assert_array_equal(state[name], array)
    for name, array in START.items():
        np.testing.assert_array_equal(params[name], array)


def test_resumed_training_goes_on_as_if_never_stopped():
    whole = train(adam(), START, range(1, STEPS + 1))
    first = adam()
    assert first.state() == {}
    params = train(first, START, range(1, 10))
    state = first.state()
    names = {f"{kind}.{name}" for kind in ("first", "second") for name in START}
    assert set(state) == {"step", *names}
    assert state["step"] == first.steps == 9
    second = adam()
    second.restore({name: np.array(x) for name, x in state.items()})
    params = train(second, params, range(10, STEPS + 1))
    for name, array in whole.items():
        np.testing.assert_array_equal(params[name], array)
    second.restore({})
    np.testing.assert_array_equal(train(second, START, range(1, STEPS + 1))["matrix"], whole["matrix"])


def test_learning_rate_may_change_between_steps():
    optimiser = refspan.Adam(1.0)
    optimiser.learning_rate = 0.25
    assert optimiser.step({"x": np.zeros(1)}, {"x": np.ones(1)})["x"][0] == pytest.approx(-0.25)


def bad(name, value):
    return {**gradients(10), name: value}


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (bad("scalar", np.asarray(np.nan)), ValueError, "gradient scalar: holds NaN, infinite numbers"),
        (bad("matrix", np.full((2, 3), -np.inf)), ValueError, "gradient matrix: holds NaN, infinite"),
        (bad("matrix", np.full((2, 3), 1e200)), ValueError, "gradient matrix: .* too large to be squared"),
        ({name: x * np.nan for name, x in START.items()}, ValueError, "gradient matrix: holds NaN"),
        ({"matrix": START["matrix"]}, ValueError, "gradient scalar: missing"),
        (bad("vector", np.zeros(3)), ValueError, "gradient vector: not among the parameters"),
        (bad("matrix", np.zeros((3, 2))), ValueError, r"gradient matrix: got shape \(3, 2\), expected \(2, 3\)"),
        (bad("scalar", np.zeros(1)), ValueError, r"gradient scalar: got shape \(1,\), expected \(\)"),
        (bad("scalar", np.asarray(1)), TypeError, "gradient scalar: got int64, expected float16, float32 or float64"),
        (bad("scalar", 1.0), TypeError, "gradient scalar: got float, expected an array"),
        (bad("scalar", array_api_strict.asarray(1.0)), TypeError, "gradient scalar: got an array of array_api_strict"),
    ],
)
def test_a_step_that_is_refused_changes_nothing(grads, error, message):
    optimiser = adam()
    params = train(optimiser, START, range(1, 10))
    with pytest.raises(error, match=message) as caught, np.errstate(over="ignore"):  # NumPy's own remark on 1e200
        optimiser.step(params, grads)
    assert "\n" not in str(caught.value)
    assert optimiser.steps == 9
    whole = train(adam(), START, range(1, STEPS + 1))
    np.testing.assert_array_equal(train(optimiser, params, range(10, STEPS + 1))["matrix"], whole["matrix"])


def test_parameters_stay_the_same_ones():
    optimiser = adam()
    params = train(optimiser, START, [1])
    grads = gradients(2)
    with pytest.raises(ValueError, match="state of the optimiser, parameter new: missing"):
        optimiser.step({**params, "new": np.zeros(2)}, {**grads, "new": np.zeros(2)})
    with pytest.raises(ValueError, match="state of the optimiser, parameter scalar: not among the parameters"):
        optimiser.step({"matrix": params["matrix"]}, {"matrix": grads["matrix"]})
    with pytest.raises(ValueError, match=r"state first\.matrix: got shape \(2, 3\), expected \(3, 2\)"):
        optimiser.step({**params, "matrix": np.zeros((3, 2))}, {**grads, "matrix": np.zeros((3, 2))})
    with pytest.raises(TypeError, match=r"state first\.scalar: got float64 for a parameter of float32"):
        optimiser.step({**params, "scalar": np.float32(1)}, grads)
    with pytest.raises(TypeError, match="parameter scalar: got int64"):
        optimiser.step({**params, "scalar": np.asarray(1)}, grads)
    with pytest.raises(ValueError, match="params: got none"):
        adam().step({}, {})


GOOD = {"step": np.asarray(3), "first.x": np.ones(2), "second.x": np.ones(2)}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({k: v for k, v in GOOD.items() if k != "step"}, ValueError, "state step: missing"),
        ({k: v for k, v in GOOD.items() if k != "second.x"}, ValueError, "state second.x: missing"),
        ({k: v for k, v in GOOD.items() if k != "first.x"}, ValueError, "state second.x: expected step, first.NAME"),
        ({"step": GOOD["step"]}, ValueError, "state first: expected"),
        ({**GOOD, "third.x": np.ones(2)}, ValueError, "state third.x: expected step"),
        ({**GOOD, "step": np.asarray(0)}, ValueError, "state step: got 0, expected at least 1"),
        ({**GOOD, "step": np.asarray(1.0)}, TypeError, "state step: got float64, expected int64"),
        ({**GOOD, "step": np.asarray([1])}, ValueError, r"state step: got shape \(1,\), expected \(\)"),
        ({**GOOD, "second.x": np.ones(3)}, ValueError, r"state second.x: got shape \(3,\), expected \(2,\)"),
        ({**GOOD, "second.x": -np.ones(2)}, ValueError, "state second.x: holds numbers below 0"),
        ({**GOOD, "first.x": np.array([1, np.nan])}, ValueError, "state first.x: holds NaN"),
        ({**GOOD, "first.x": np.ones(2, np.float16)}, TypeError, "state first.x: got float16, expected float32 or"),
    ],
)
def test_a_state_that_is_refused_changes_nothing(state, error, message):
    optimiser = adam()
    train(optimiser, START, [1])
    with pytest.raises(error, match=message):
        optimiser.restore(state)
    assert optimiser.steps == 1
    assert set(optimiser.state()) == {"step", "first.matrix", "first.scalar", "second.matrix", "second.scalar"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate": 0}, ValueError, "learning_rate: got 0, expected a finite number > 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate: got 'fast', expected a number"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: got \(0.9, 1.0\), expected two numbers"),
        ({"betas": (0.9,)}, ValueError, r"betas: got \(0.9,\), expected two numbers"),
        ({"epsilon": float("nan")}, ValueError, "epsilon: got nan"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: got -1, expected at least 0"),
        ({"warmup_steps": 1.5}, TypeError, "warmup_steps: got 1.5, expected a whole number"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm: got 0, expected a finite number > 0"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        refspan.Adam(**{"learning_rate": 0.1, **settings})


def test_a_model_learns():
    config = refspan.ModelConfig(
        vocab_size=5,
        hidden_size=8,
        feedforward_size=16,
        layers=1,
        heads=2,
        head_size=4,
        block_size=10,
        max_span=20,
        ramp=4,
    )
    params, memory, losses = refspan.initial_parameters(config, 0), None, []
    optimiser = refspan.Adam(0.01, warmup_steps=5, max_grad_norm=0.3)
    for t in range(60):
        tokens = (np.arange(t * 10, t * 10 + 11)[None] * 2) % 5
        loss, grads, memory = refspan.loss_and_gradients(config, params, tokens[:, :-1], tokens[:, 1:], memory)
        params = optimiser.step(params, grads)
        losses.append(loss.task)
    assert losses[0] > 1.3
    assert losses[-1] < 0.2
