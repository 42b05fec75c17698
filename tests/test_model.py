"""The whole model: gradients against differences, streams in blocks of any kind, and what is refused, by name."""

import json
from dataclasses import replace
from itertools import cycle
from math import sqrt
from unittest import mock

import array_api_strict
import numpy as np
import pytest

import refspan
from refspan.memory import NEVER, Memory
from refspan.model import model, start_memory

EPS = np.finfo(np.float64).eps

STEP = EPS ** (1 / 3)
DIFFERENCE = 1000 * EPS ** (2 / 3)
"""A central difference is off by STEP^2 / 6 of the third derivative and by EPS / STEP of the values: EPS^(2/3) each."""

SAME = 1e-12
"""Numbers of size 10 at most, through 3 layers of sums of at most 60 products, in another order: 200 * 10 * EPS."""

CONFIG = refspan.ModelConfig(
    vocab_size=9,
    hidden_size=8,
    feedforward_size=11,
    layers=2,
    heads=2,
    head_size=3,
    block_size=5,
    max_span=12.0,
    ramp=3.5,
    span_temperature=1.5,
)


def parameters(config, seed=0, *, positions=4, dtype="float64"):
    """Nothing is left at 0, and spans have all lengths."""
    rng = np.random.default_rng(seed)
    start = refspan.initial_parameters(config, seed, positions=positions, span_start=0.4, dtype="float64")
    params = {name: np.asarray(x + 0.3 * rng.standard_normal(x.shape)) for name, x in start.items()}
    return {name: (4 * x if name.endswith("span.weight") else x).astype(dtype) for name, x in params.items()}


PARAMS = parameters(CONFIG)


def some_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape)


def assert_same(one, other):
    """Two dicts of arrays, to the last bit."""
    assert list(one) == list(other)
    for name, array in one.items():
        np.testing.assert_array_equal(other[name], array, err_msg=name)
        assert other[name].dtype == array.dtype


# training

OPTIONS = {
    "plain": {},
    "span loss": {"span_loss_weight": 0.5},
    "short": {"span_limit": 4.3},
    "dropout": {"dropout": refspan.Dropout(0.3, 7)},
    "all": {"span_loss_weight": 0.5, "span_limit": 4.3, "dropout": refspan.Dropout(0.3, 8)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(
    "shape", [{}, {"layers": 1, "heads": 1, "head_size": 7, "ramp": 1.2}], ids=["two", "one layer"]
)
def test_gradients_are_derivatives(shape, norm, options):
    """Of the third block's losses, memories held constant: in one direction of length 1 for each parameter."""
    config = replace(CONFIG, norm=norm, **shape)
    params, tokens = parameters(config, 1), some_tokens((2, 16))
    memory, direction = None, np.random.default_rng(2)
    for start in (0, 5):
        _, _, memory = refspan.loss_and_gradients(
            config, params, tokens[:, start : start + 5], tokens[:, start + 1 : start + 6], memory, **options
        )
    last = (tokens[:, 10:15], tokens[:, 11:16], memory)
    assert 0 < sum(layer.slots for layer in memory) < 10 * config.layers

    def loss(changed):
        losses, _, _ = refspan.loss_and_gradients(config, {**params, **changed}, *last, **options)
        return sum(losses)

    losses, grads, _ = refspan.loss_and_gradients(config, params, *last, **options)
    assert (losses.span > 0) == ("span_loss_weight" in options)
    assert list(grads) == list(params)
    for name, x in params.items():
        along = direction.standard_normal(x.shape)
        along /= sqrt(np.sum(along**2))
        difference = (loss({name: x + STEP * along}) - loss({name: x - STEP * along})) / (2 * STEP)
        assert difference == pytest.approx(np.sum(grads[name] * along), rel=0, abs=DIFFERENCE * sum(losses)), name
        assert grads[name].any(), name


def test_losses_are_means():
    """Of twice the same rows, or with the memories of twice the same rows, losses and gradients are the same."""
    tokens = some_tokens((2, 11))
    options = {"span_loss_weight": 0.5, "span_limit": 6.1}
    memories = [None, None]
    for start in (0, 5):
        block, targets = tokens[:, start : start + 5], tokens[:, start + 1 : start + 6]
        one, grads, memories[0] = refspan.loss_and_gradients(CONFIG, PARAMS, block, targets, memories[0], **options)
        both = [np.concatenate([x, x]) for x in (block, targets)]
        two, twice, memories[1] = refspan.loss_and_gradients(CONFIG, PARAMS, *both, memories[1], **options)
        np.testing.assert_allclose(two, one, rtol=SAME)
        for name, grad in grads.items():
            np.testing.assert_allclose(twice[name], grad, rtol=0, atol=SAME, err_msg=name)


def strict_device():
    """To and from the second device of array-api-strict, which refuses to become a NumPy array."""
    xp, device = array_api_strict, array_api_strict.Device("device1")

    def to(x):
        return xp.asarray(np.asarray(x).copy(), device=device)

    def back(x):
        assert x.device == device
        return np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE"), copy=True))

    with pytest.raises(RuntimeError):
        np.asarray(to(0.0))
    return to, back


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", [0, 4])
def test_array_api_strict_on_its_second_device(dtype, norm, positions):
    """A hidden call of NumPy fails there, and so does what the standard leaves open."""
    config = replace(CONFIG, norm=norm)
    params = parameters(config, positions=positions, dtype=dtype)
    to, back = strict_device()
    theirs = {name: to(x) for name, x in params.items()}
    # products may be summed in another order: sums of 60 numbers of size 10 at most, in 2 layers and back
    tolerance = {"rtol": 0, "atol": 2000 * float(np.finfo(dtype).eps)}
    tokens, memory, strict_memory = some_tokens((2, 16)), None, None
    for start in (0, 5, 10):
        blocks = tokens[:, start : start + 5], tokens[:, start + 1 : start + 6]
        options = {"span_loss_weight": 0.5, "span_limit": 6.1, "dropout": refspan.Dropout(0.2, start)}
        losses, grads, memory = refspan.loss_and_gradients(config, params, *blocks, memory, **options)
        strict_losses, strict_grads, strict_memory = refspan.loss_and_gradients(
            config, theirs, *map(to, blocks), strict_memory, **options
        )
        assert {type(x) for x in strict_losses} == {float}
        np.testing.assert_allclose(strict_losses, losses, **tolerance)
        for name, grad in grads.items():
            assert strict_grads[name].dtype == theirs[name].dtype
            np.testing.assert_allclose(back(strict_grads[name]), grad, **tolerance, err_msg=name)
    pairs = [(layer.contents["hidden"], layer.age) for layer in memory]
    stream = refspan.open_model(config, params, batch=2, memory=pairs)
    strict_pairs = [(to(hidden), to(age)) for hidden, age in pairs]
    strict = refspan.open_model(config, theirs, batch=2, memory=strict_pairs, max_memories=40)
    for i, length in enumerate((5, 3, 1, 12, 5)):
        block = some_tokens((2, length), seed=i)
        log_probs = strict.step(to(block))
        assert log_probs.dtype == theirs["output.bias"].dtype
        np.testing.assert_allclose(back(log_probs), stream.step(block), **tolerance)
        assert strict.memory_size() == stream.memory_size()
        if i == 2:
            stream.reset(1)
            strict.reset(1)
        if i == 3:
            strict.restore(strict.state())
    for name, array in stream.state().items():
        np.testing.assert_allclose(back(strict.state()[name]), array, **tolerance, err_msg=name)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_float16_is_computed_in_float32(norm):
    """Only what is returned is rounded: losses and memories are those of the same numbers in float32."""
    config = replace(CONFIG, norm=norm)
    narrow = parameters(config, dtype="float16")
    wide = {name: x.astype(np.float32) for name, x in narrow.items()}
    tokens, memory, wide_memory = some_tokens((2, 11)), None, None
    for start in (0, 5):
        blocks = tokens[:, start : start + 5], tokens[:, start + 1 : start + 6]
        losses, grads, memory = refspan.loss_and_gradients(config, narrow, *blocks, memory, span_loss_weight=0.1)
        wanted, wide_grads, wide_memory = refspan.loss_and_gradients(
            config, wide, *blocks, wide_memory, span_loss_weight=0.1
        )
        assert losses == wanted
        assert_same({name: x.astype(np.float16) for name, x in wide_grads.items()}, grads)
        for layer, wide_layer in zip(memory, wide_memory, strict=True):
            assert_same({"age": wide_layer.age, **wide_layer.contents}, {"age": layer.age, **layer.contents})
    stream, wide_stream = (refspan.open_model(config, params, batch=2) for params in (narrow, wide))
    for length in (5, 2, 7):
        block = some_tokens((2, length))
        log_probs = stream.step(block)
        assert log_probs.dtype == np.float16
        np.testing.assert_array_equal(log_probs, wide_stream.step(block).astype(np.float16))
    state, wide_state = stream.state(), wide_stream.state()
    assert np.any(state.pop("model") != wide_state.pop("model"))
    assert_same(wide_state, state)


def test_numbers_of_numpy_widen_nothing():
    """In NumPy, a float64 of its own times a float32 array is a float64 array."""
    settings = CONFIG.to_dict()
    config = refspan.ModelConfig(**{n: np.asarray(x)[()] if n != "norm" else x for n, x in settings.items()})
    assert config == CONFIG
    assert json.loads(json.dumps(config.to_dict())) == settings
    params, tokens = parameters(config, dtype="float32"), some_tokens((2, 6))
    options = {"span_loss_weight": 0.1, "span_limit": 4.3}
    strange = {name: np.float64(x) for name, x in options.items()}
    plain, wanted, _ = refspan.loss_and_gradients(CONFIG, params, tokens[:, :-1], tokens[:, 1:], None, **options)
    losses, grads, memory = refspan.loss_and_gradients(config, params, tokens[:, :-1], tokens[:, 1:], None, **strange)
    assert losses == plain
    assert_same(wanted, grads)
    assert {layer.contents["hidden"].dtype for layer in memory} == {np.dtype(np.float32)}
    stream = refspan.open_model(config, params, batch=np.int64(2), max_memories=np.int64(20))
    stream.step(tokens)
    stream.restore(stream.state())
    stream.reset(np.int64(1))


def test_arguments_are_never_written_to():
    params, tokens = {name: x.copy() for name, x in PARAMS.items()}, some_tokens((2, 16))
    for array in (*params.values(), tokens):
        array.flags.writeable = False
    _, _, memory = refspan.loss_and_gradients(CONFIG, params, tokens[:, :5], tokens[:, 1:6], None)
    for layer in memory:
        for array in (layer.age, *layer.contents.values()):
            array.flags.writeable = False
    first = refspan.loss_and_gradients(CONFIG, params, tokens[:, 5:10], tokens[:, 6:11], memory)
    again = refspan.loss_and_gradients(CONFIG, params, tokens[:, 5:10], tokens[:, 6:11], memory)
    assert first[0] == again[0]
    assert_same(first[1], again[1])
    stream = refspan.open_model(CONFIG, params, batch=2)
    stream.step(tokens[:, :7])
    state = stream.state()
    for array in state.values():
        array.flags.writeable = False
    copies = {name: x.copy() for name, x in state.items()}
    stream.restore(state)
    log_probs = stream.step(tokens[:, 7:])
    assert_same(copies, state)
    stream.restore(state)
    np.testing.assert_array_equal(stream.step(tokens[:, 7:]), log_probs)


# streams


def all_at_once(config, params, tokens):
    """Log-probabilities of a whole text as one block, without any memory."""
    return model(config, params, tokens, start_memory(config, params, len(tokens)))[0]


@pytest.mark.parametrize("lengths", [(5,), (1,), (13,), (40,), (3, 1, 11, 5, 2)], ids=str)
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_blocks_of_any_length(batch, norm, lengths):
    """Single tokens, the model's blocks, longer and ragged ones: all as one block of the whole text."""
    config = replace(CONFIG, norm=norm)
    params, tokens = parameters(config), some_tokens((batch, 38))
    wanted, read = all_at_once(config, params, tokens), 0
    stream = refspan.open_model(config, params, batch=batch)
    for length in cycle(lengths):
        block = tokens[:, read : read + length]
        np.testing.assert_allclose(stream.step(block), wanted[:, read : read + length], rtol=0, atol=SAME)
        read += block.shape[1]
        assert stream.rows_projected() == batch * config.layers * read
        if read == tokens.shape[1]:
            break
    assert all(0 < slots < 20 for slots in stream.memory_size())


@pytest.mark.parametrize("row", [0, 1, 2])
def test_one_row_starts_anew(row):
    """The others go on; what the row was given before leaves no trace."""
    tokens = some_tokens((3, 24))
    stream = refspan.open_model(CONFIG, PARAMS, batch=3)
    stream.step(tokens[:, :11])
    stream.reset(row)
    log_probs = np.concatenate([stream.step(tokens[:, a : a + 4]) for a in (11, 15)] + [stream.step(tokens[:, 19:])], 1)
    wanted = all_at_once(CONFIG, PARAMS, tokens)[:, 11:]
    wanted[row] = all_at_once(CONFIG, PARAMS, tokens[row : row + 1, 11:])[0]
    np.testing.assert_allclose(log_probs, wanted, rtol=0, atol=SAME)
    for other in range(3):
        stream.reset(other)
    assert stream.memory_size() == (0, 0)
    np.testing.assert_allclose(stream.step(tokens), all_at_once(CONFIG, PARAMS, tokens), rtol=0, atol=SAME)


def test_a_state_is_all_that_a_stream_remembers():
    tokens = some_tokens((3, 30))
    wanted = all_at_once(CONFIG, PARAMS, tokens)
    first = refspan.open_model(CONFIG, PARAMS, batch=3)
    first.step(tokens[:, :13])
    state = first.state()
    assert set(state) == {"model", *(f"layers.{i}.{name}" for i in (0, 1) for name in ("age", "key", "value", "span"))}
    assert {x.shape[:2] for name, x in state.items() if name.startswith("layers.1.")} == {(3, first.memory_size()[1])}
    assert any(np.any(state[f"layers.{i}.age"] < 0) for i in (0, 1)), "no row has empty slots"
    first.step(tokens[:, 13:19])
    second = refspan.open_model(CONFIG, PARAMS, batch=3)
    second.step(some_tokens((3, 8), seed=1))
    second.restore({name: x.copy() for name, x in state.items()})
    np.testing.assert_allclose(second.step(tokens[:, 13:]), wanted[:, 13:], rtol=0, atol=SAME)
    first.restore(state)  # back in time
    np.testing.assert_allclose(first.step(tokens[:, 13:]), wanted[:, 13:], rtol=0, atol=SAME)
    first.restore(refspan.open_model(CONFIG, PARAMS, batch=3).state())
    np.testing.assert_allclose(first.step(tokens), wanted, rtol=0, atol=SAME)


def test_streams_know_nothing_of_each_other():
    """Not even streams that were restored from one state, or that share their parameters."""
    texts = [some_tokens((2, 30), seed) for seed in range(3)]
    start = refspan.open_model(CONFIG, PARAMS, batch=2)
    start.step(texts[0][:, :9])
    streams = [refspan.open_model(CONFIG, PARAMS, batch=2) for _ in texts]
    for stream in streams:
        stream.restore(start.state())
    together = [[], [], []]
    for a in range(9, 30, 3):
        for results, stream, text in zip(together, streams, texts, strict=True):
            results.append(stream.step(text[:, a : a + 3]))
    for results, text in zip(together, texts, strict=True):
        whole = np.concatenate([texts[0][:, :9], text[:, 9:]], axis=1)
        wanted = all_at_once(CONFIG, PARAMS, whole)[:, 9:]
        np.testing.assert_allclose(np.concatenate(results, axis=1), wanted, rtol=0, atol=SAME)


def test_a_limit_of_memories():
    """The step that would pass it is not made, not even in part; after a reset the stream goes on."""
    tokens = some_tokens((2, 60))
    free = refspan.open_model(CONFIG, PARAMS, batch=2)
    sizes = [free.step(tokens[:, a : a + 3]) is not None and max(free.memory_size()) for a in range(0, 60, 3)]
    peak = max(sizes)
    at = sizes.index(peak)
    assert at > 2
    enough = refspan.open_model(CONFIG, PARAMS, batch=2, max_memories=peak)
    stream, twin = (refspan.open_model(CONFIG, PARAMS, batch=2, max_memories=peak - 1) for _ in range(2))
    for a in range(0, 3 * at, 3):
        for each in (enough, stream, twin):
            each.step(tokens[:, a : a + 3])
    wrong = tokens[:, 3 * at : 3 * at + 3]
    before, projected = stream.state(), stream.rows_projected()
    copies = {name: x.copy() for name, x in before.items()}
    said = rf"^layer [01] would hold {peak} memories, the limit is {peak - 1} \(max_memories\); raise it, or reset rows"
    for _ in range(2):
        with pytest.raises(refspan.MemoryLimitError, match=said):
            stream.step(wrong)
    with pytest.raises(refspan.MemoryLimitError):
        stream.step(np.concatenate([wrong[:, :1], wrong, wrong], axis=1))  # in its second block
    assert stream.rows_projected() == projected
    assert_same(copies, stream.state())
    assert_same(copies, before)
    assert enough.step(wrong).shape == (2, 3, 9)
    for each in (stream, twin):
        each.reset(0)
        each.reset(1)
    np.testing.assert_array_equal(stream.step(wrong), twin.step(wrong))


def test_a_long_step_ends_at_the_block_that_passes_the_limit(monkeypatch):
    stream = refspan.open_model(CONFIG, PARAMS, batch=2, max_memories=1)
    block = mock.Mock(side_effect=stream._block)
    monkeypatch.setattr(stream, "_block", block)
    with pytest.raises(refspan.MemoryLimitError, match="would hold"):
        stream.step(some_tokens((2, 50)))
    assert block.call_count == 1


# what is refused


def refused(error, message, call, *arguments, **named):
    """One line that says what was wrong."""
    with pytest.raises(error, match=message) as caught:
        call(*arguments, **named)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, None])
@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "feedforward_size", "layers", "heads", "head_size", "block_size"]
)
def test_bad_sizes(field, value):
    error, expected = (ValueError, "at least 1") if type(value) is int else (TypeError, "a whole number")
    refused(error, rf"^{field}: got {value!r}, expected {expected}", replace, CONFIG, **{field: value})


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf"), 10**400, "3", True, None])
@pytest.mark.parametrize("field", ["max_span", "ramp", "span_temperature"])
def test_bad_numbers(field, value):
    wrong = type(value) is float or value == 0
    error, expected = (ValueError, "a finite number > 0") if wrong else (TypeError, "a number")
    refused(error, rf"^{field}: got {value!r}, expected {expected}", replace, CONFIG, **{field: value})


def test_bad_configs():
    refused(ValueError, "^ramp: got 1e-40, expected at least 1e-30", replace, CONFIG, ramp=1e-40)
    for name in ("ramp", "max_span"):
        refused(ValueError, rf"^{name}: got 1e\+31, expected at most 1e\+30 steps", replace, CONFIG, **{name: 1e31})
    for value in ("both", None, 1):
        refused(ValueError, f"^norm: got {value!r}, expected 'post' or 'pre'", replace, CONFIG, norm=value)
    settings = CONFIG.to_dict()
    refused(ValueError, "unknown setting 'colour'", refspan.ModelConfig.from_dict, {**settings, "colour": 1})
    del settings["heads"]
    refused(ValueError, "no setting 'heads'", refspan.ModelConfig.from_dict, settings)
    tokens = some_tokens((2, 5))
    refused(TypeError, "^config: got dict, expected a ModelConfig", refspan.open_model, settings, PARAMS, batch=2)
    for wrong in (None, PARAMS.values()):
        refused(TypeError, "^params: got .*, expected arrays by name", refspan.open_model, CONFIG, wrong, batch=2)
    refused(
        TypeError, "^config: got dict, expected", refspan.loss_and_gradients, settings, PARAMS, tokens, tokens, None
    )


def params_with(name, array):
    return {**PARAMS, name: array}


SPAN = "layers.1.span.weight"


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({n: x for n, x in PARAMS.items() if n != SPAN}, ValueError, rf"^parameter {SPAN}: missing \(1 of 32 "),
        (params_with("layers.2.span.weight", PARAMS[SPAN]), ValueError, r"^parameter layers\.2\.span\.weight: not kn"),
        (params_with(SPAN, np.zeros(7)), ValueError, rf"^parameter {SPAN}: got shape \(7,\), expected \(8,\)"),
        (params_with("layers.0.span.bias", np.zeros(1)), ValueError, r"span\.bias: got shape \(1,\), expected \(\)"),
        (params_with("position.weight", np.zeros((4, 2))), ValueError, r"^parameter position\.weight: .* \(P, 3\)"),
        (params_with(SPAN, np.full(8, np.nan)), ValueError, rf"^parameter {SPAN}: holds NaN or infinite numbers"),
        (params_with(SPAN, np.full(8, -np.inf)), ValueError, rf"^parameter {SPAN}: holds NaN or infinite numbers"),
        (params_with(SPAN, np.zeros(8, np.float32)), TypeError, rf"^parameter {SPAN}: got float32, expected float64"),
        (params_with(SPAN, np.zeros(8, int)), TypeError, rf"^parameter {SPAN}: got int64, expected float64"),
        (params_with("embedding.weight", np.zeros((9, 8), int)), TypeError, "got int64, expected float16, float32 or"),
        (params_with(SPAN, [0.0] * 8), TypeError, rf"^parameter {SPAN}: got list, expected an array"),
        (params_with(SPAN, array_api_strict.zeros(8)), TypeError, rf"^parameter {SPAN}: got an array of array_api_st"),
        ({}, ValueError, r"^parameter embedding\.weight: missing \(32 of 32 parameters are\)"),
    ],
)
def test_bad_parameters(params, error, message):
    tokens = some_tokens((2, 5))
    refused(error, message, refspan.open_model, CONFIG, params, batch=2)
    refused(error, message, refspan.loss_and_gradients, CONFIG, params, tokens, tokens, None)


GOOD = some_tokens((2, 5))


def with_token(token):
    tokens = GOOD.copy()
    tokens[1, 3] = token
    return tokens


BAD_TOKENS = [
    (with_token(9), ValueError, "got token 9, expected 0 to 8"),
    (with_token(-1), ValueError, "got token -1, expected 0 to 8"),
    (with_token(2**62), ValueError, "got token 4611686018427387904, expected 0 to 8"),
    (GOOD.astype(np.int32), TypeError, "got int32, expected int64"),
    (GOOD.astype(np.float64), TypeError, "got float64, expected int64"),
    (GOOD > 2, TypeError, "got bool, expected int64"),
    (GOOD.tolist(), TypeError, "got list, expected an array"),
    (None, TypeError, "got NoneType, expected an array"),
    (array_api_strict.asarray(GOOD), TypeError, "got an array of array_api_strict, expected one of .* like parameters"),
]


@pytest.fixture
def pair_of_streams():
    """A stream for mistakes, and one that does without them."""
    streams = [refspan.open_model(CONFIG, PARAMS, batch=2) for _ in range(2)]
    for stream in streams:
        stream.step(some_tokens((2, 8), seed=1))
    return streams


def assert_goes_on(stream, twin):
    """With exactly the results that it would have had."""
    assert stream.memory_size() == twin.memory_size()
    assert stream.rows_projected() == twin.rows_projected()
    assert_same(twin.state(), stream.state())
    for length in (3, 7):
        block = some_tokens((2, length), seed=length)
        np.testing.assert_array_equal(stream.step(block), twin.step(block))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        *BAD_TOKENS,
        (GOOD[:, :0], ValueError, r"got shape \(2, 0\), expected at least one row and one token"),
        (GOOD[0], ValueError, r"got shape \(5,\), expected \(2, M\)"),
        (GOOD[None], ValueError, r"got shape \(1, 2, 5\), expected \(2, M\)"),
        (GOOD[:1], ValueError, r"got shape \(1, 5\), expected \(2, M\)"),
        (np.concatenate([some_tokens((2, 11)), with_token(9)], axis=1), ValueError, "got token 9, expected 0 to 8"),
    ],
)
def test_a_step_that_is_refused(tokens, error, message, pair_of_streams):
    stream, twin = pair_of_streams
    refused(error, f"^tokens: {message}", stream.step, tokens)
    assert_goes_on(stream, twin)


STATE = refspan.open_model(CONFIG, PARAMS, batch=2)
STATE.step(some_tokens((2, 9), seed=3))
STATE = STATE.state()
SLOTS = STATE["layers.1.age"].shape[1]


def state_with(name, change):
    """The state with one array changed, by a function of a copy of it."""
    array = STATE[f"layers.1.{name}"].copy()
    changed = change(array)
    return {**STATE, f"layers.1.{name}": array if changed is None else changed}


def put(value):
    """Write a number into row 1, slot 0."""

    def change(array):
        array[1, 0] = value

    return change


def state_of(batch=2, **changes):
    config = replace(CONFIG, **changes)
    stream = refspan.open_model(config, parameters(config), batch=batch)
    stream.step(some_tokens((batch, 9)))
    return stream.state()


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "^state: got NoneType, expected arrays by name"),
        ({}, ValueError, r"^state layers\.0\.age: missing"),
        ({n: x for n, x in STATE.items() if n != "model"}, ValueError, "^state model: missing"),
        ({**STATE, "model": STATE["model"][1:]}, ValueError, r"^state model: got shape \(31,\), expected \(32,\)"),
        ({**STATE, "model": STATE["model"].astype(np.int64)}, TypeError, "^state model: got int64, expected uint8"),
        (state_of(ramp=4.5), ValueError, "^state model: the fingerprint of other parameters, expected th"),
        ({n: x for n, x in STATE.items() if n != "layers.1.span"}, ValueError, r"^state layers\.1\.span: missing"),
        ({**STATE, "layers.2.age": GOOD}, ValueError, r"^state layers\.2\.age: not known to this model"),
        (state_of(layers=3), ValueError, r"^state layers\.2\.age: not known to this model"),
        (state_of(layers=1), ValueError, r"^state layers\.1\.age: missing"),
        (state_of(heads=3), ValueError, r"^state layers\.0\.key: got shape \(2, \d+, 9\), expected \(2, \d+, 6\)"),
        (state_of(batch=3), ValueError, r"^state layers\.0\.age: got shape \(3, \d+\), expected \(2, N\)"),
        (state_with("span", lambda x: x[:, 1:]), ValueError, rf"^state layers\.1\.span: .*, expected \(2, {SLOTS}\)"),
        (state_with("age", put(0)), ValueError, r"^state layers\.1\.age: got 0, expected at least 1"),
        (state_with("age", put(-7)), ValueError, r"^state layers\.1\.age: got -7, expected at least 1"),
        (state_with("age", lambda x: x + 0.0), TypeError, r"^state layers\.1\.age: got float64, expected int64"),
        (state_with("span", put(-0.5)), ValueError, r"^state layers\.1\.span: got -0\.5, expected 0 to 12"),
        (state_with("span", put(12.5)), ValueError, r"^state layers\.1\.span: got 12\.5, expected 0 to 12"),
        (state_with("span", put(np.nan)), ValueError, r"^state layers\.1\.span: holds NaN or infinite numbers"),
        (state_with("value", put(np.inf)), ValueError, r"^state layers\.1\.value: holds NaN or infinite numbers"),
        (state_with("key", lambda x: x.astype(np.float32)), TypeError, r"^state layers\.1\.key: got float32, expected"),
        (state_with("key", lambda x: x.tolist()), TypeError, r"^state layers\.1\.key: got list, expected an array"),
        (state_with("key", array_api_strict.asarray), TypeError, r"^state layers\.1\.key: got an array of array_api"),
    ],
)
def test_a_state_that_is_refused(state, error, message, pair_of_streams):
    stream, twin = pair_of_streams
    refused(error, message, stream.restore, state)
    assert_goes_on(stream, twin)


def test_states_with_the_least_and_the_most(pair_of_streams):
    """Spans of 0 and max_span, empty slots, or no slots at all are states too."""
    stream, _ = pair_of_streams
    for state in (
        state_with("span", put(0.0)),
        state_with("span", put(12.0)),
        state_with("age", put(NEVER)),
        {name: x[:, :0] if name != "model" else x for name, x in STATE.items()},
    ):
        stream.restore(state)
        assert np.isfinite(stream.step(GOOD)).all()


@pytest.mark.parametrize("row", [-1, 2, 10**30])
def test_rows_that_are_not_there(row, pair_of_streams):
    stream, twin = pair_of_streams
    refused(ValueError, rf"^row: got {row}, expected 0 to 1", stream.reset, row)
    refused(TypeError, r"^row: got 0\.5, expected a whole number", stream.reset, 0.5)
    refused(TypeError, r"^row: got None, expected a whole number", stream.reset, None)
    assert_goes_on(stream, twin)


HIDDEN, AGE = np.ones((2, 3, 8)), np.array([[3, 2, 1], [7, 5, 3]])


def given(hidden=HIDDEN, age=AGE):
    return [(HIDDEN, AGE), (hidden, age)]


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"batch": 0}, ValueError, "^batch: got 0, expected at least 1"),
        ({"batch": 1.5}, TypeError, r"^batch: got 1\.5, expected a whole number"),
        ({"max_memories": 0}, ValueError, "^max_memories: got 0, expected at least 1"),
        ({"max_memories": "9"}, TypeError, "^max_memories: got '9', expected a whole number"),
        ({"memory": given()[:1]}, ValueError, "^memory: got 1 layers, expected 2"),
        ({"memory": 5}, TypeError, "^memory: got int, expected a list with an item for each layer"),
        ({"memory": [5, 5]}, TypeError, r"^memory of layer 0: got int, expected a pair \(hidden, age\)"),
        (
            {"memory": [Memory(AGE, {"hidden": HIDDEN})] * 2},
            TypeError,
            r"^memory of layer 0: got Memory, expected a pair \(hidden, age\)",
        ),
        (
            {"memory": given(HIDDEN[..., :7])},
            ValueError,
            r"^memory of layer 1: hidden: got shape \(2, 3, 7\), expected \(2, N, 8\)",
        ),
        ({"memory": given(HIDDEN[:1])}, ValueError, r"^memory of layer 1: hidden: got shape \(1, 3, 8\), expected"),
        ({"memory": given(HIDDEN.tolist())}, TypeError, "^memory of layer 1: hidden: got list, expected an array"),
        ({"memory": given(HIDDEN.astype(int))}, TypeError, "^memory of layer 1: hidden: got int64, expected float16"),
        ({"memory": given(HIDDEN * np.nan)}, ValueError, "^memory of layer 1: hidden: holds NaN or infinite numbers"),
        (
            {"memory": given(age=AGE[:, 1:])},
            ValueError,
            r"^memory of layer 1: age: got shape \(2, 2\), expected \(2, 3\)",
        ),
        ({"memory": given(age=AGE - 1)}, ValueError, "^memory of layer 1: age: got 0, expected at least 1"),
        (
            {"memory": given(age=np.where(AGE == 3, NEVER, AGE - 2))},
            ValueError,
            "^memory of layer 1: age: got -1, expected at least 1",
        ),
        ({"memory": given(age=AGE * 1.0)}, TypeError, "^memory of layer 1: age: got float64, expected int64"),
    ],
)
def test_streams_that_cannot_be_opened(named, error, message):
    refused(error, message, refspan.open_model, CONFIG, PARAMS, **{"batch": 2, **named})
    assert refspan.open_model(CONFIG, PARAMS, batch=2, memory=given()).memory_size()[0] > 0


def memory_of(batch=2, dtype="float64", **changes):
    """Memories of another model, after a block."""
    config, tokens = replace(CONFIG, **changes), some_tokens((batch, 6))
    params = parameters(config, dtype=dtype)
    return refspan.loss_and_gradients(config, params, tokens[:, :-1], tokens[:, 1:], None)[2]


MEMORY = memory_of()


def changed(age=None, hidden=None):
    """Our memories, those of layer 1 with other ages or hidden states."""
    first, second = MEMORY
    age = second.age if age is None else age
    return [first, Memory(age, {"hidden": second.contents["hidden"] if hidden is None else hidden})]


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"span_loss_weight": -0.1}, ValueError, r"^span_loss_weight: got -0\.1, expected a finite number >= 0"),
        ({"span_loss_weight": float("nan")}, ValueError, "^span_loss_weight: got nan, expected a finite number >= 0"),
        ({"span_loss_weight": float("inf")}, ValueError, "^span_loss_weight: got inf, expected a finite number >= 0"),
        ({"span_loss_weight": "1"}, TypeError, "^span_loss_weight: got '1', expected a number"),
        ({"span_loss_weight": None}, TypeError, "^span_loss_weight: got None, expected a number"),
        ({"span_limit": -1}, ValueError, r"^span_limit: got -1\.0, expected a number of steps >= 0"),
        ({"span_limit": float("nan")}, ValueError, "^span_limit: got nan, expected a number of steps >= 0"),
        ({"span_limit": "9"}, TypeError, "^span_limit: got '9', expected a number of steps"),
        ({"span_limit": True}, TypeError, "^span_limit: got True, expected a number of steps"),
        ({"dropout": 0.1}, TypeError, r"^dropout: got 0\.1, expected a Dropout"),
        ({"dropout": 0.0}, TypeError, r"^dropout: got 0\.0, expected a Dropout"),
        ({"memory": MEMORY[0]}, TypeError, "^memory: got Memory, expected a list with an item for each layer"),
        ({"memory": []}, ValueError, "^memory: got 0 layers, expected 2"),
        ({"memory": memory_of(layers=3)}, ValueError, "^memory: got 3 layers, expected 2"),
        (
            {"memory": memory_of(hidden_size=7)},
            ValueError,
            r"^memory of layer 0: hidden: got shape \(2, \d+, 7\), expected \(2, N, 8\)",
        ),
        ({"memory": memory_of(batch=3)}, ValueError, r"^memory of layer 0: hidden: got shape \(3, .* \(2, N, 8\)"),
        ({"memory": memory_of(dtype="float32")}, TypeError, "^memory of layer 0: hidden: got float32, expected float"),
        ({"memory": given()}, TypeError, "^memory of layer 0: got tuple, expected a Memory that loss_and_gradients"),
        (
            {"memory": [Memory(AGE, {"key": HIDDEN})] * 2},
            TypeError,
            "^memory of layer 0: got Memory, expected a Memory",
        ),
        ({"memory": changed(age=MEMORY[1].age - 1)}, ValueError, "^memory of layer 1: age: got 0, expected at least 1"),
        (
            {"memory": changed(age=AGE[:, :1])},
            ValueError,
            r"^memory of layer 1: age: got shape \(2, 1\), expected \(2,",
        ),
        ({"memory": changed(age=MEMORY[1].age * 1.0)}, TypeError, "^memory of layer 1: age: got float64, expected int"),
        ({"memory": changed(hidden=[1.0])}, TypeError, "^memory of layer 1: hidden: got list, expected an array"),
        ({"targets": GOOD[:, 1:]}, ValueError, r"^targets: got shape \(2, 4\), expected \(2, 5\)"),
        ({"targets": GOOD[:1]}, ValueError, r"^targets: got shape \(1, 5\), expected \(2, 5\)"),
        *(({"targets": bad}, error, f"^targets: {message}") for bad, error, message in BAD_TOKENS),
        *(({"tokens": bad}, error, f"^tokens: {message}") for bad, error, message in BAD_TOKENS),
        ({"tokens": GOOD[0]}, ValueError, r"^tokens: got shape \(5,\), expected \(B, M\)"),
        ({"tokens": GOOD[:, :0], "targets": GOOD[:, :0]}, ValueError, r"^tokens: got shape \(2, 0\), expected at lea"),
        ({"tokens": GOOD[:0], "targets": GOOD[:0]}, ValueError, r"^tokens: got shape \(0, 5\), expected at least one"),
    ],
)
def test_bad_arguments_of_training(named, error, message):
    arguments = {"tokens": GOOD, "targets": GOOD[:, ::-1].copy(), "memory": MEMORY}
    refused(error, message, refspan.loss_and_gradients, CONFIG, PARAMS, **{**arguments, **named})


def test_limits_of_what_training_takes():
    """An infinite limit and a limit of 0 steps, a weight of 0, an int for a float."""
    arguments = (CONFIG, PARAMS, GOOD, GOOD[:, ::-1].copy(), MEMORY)
    plain = refspan.loss_and_gradients(*arguments, span_loss_weight=1)
    same = refspan.loss_and_gradients(*arguments, span_loss_weight=1.0, span_limit=float("inf"))
    assert plain[0] == same[0]
    assert_same(plain[1], same[1])
    short, grads, _ = refspan.loss_and_gradients(*arguments, span_loss_weight=1, span_limit=0)
    assert short.span == 0
    assert short.task != plain[0].task
    assert not any(grads[f"layers.{i}.span.{name}"].any() for i in (0, 1) for name in ("weight", "bias"))
