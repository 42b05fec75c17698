"""The parts of the model: values at their limits, and each gradient against differences, autograd and float32."""

from decimal import Decimal
from itertools import combinations
from math import inf, sqrt
from typing import Any, NamedTuple

import array_api_strict
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import refspan
from refspan.cross_entropy import cross_entropy, cross_entropy_backward, log_softmax
from refspan.dropout import Dropout
from refspan.embedding import embedding, embedding_backward
from refspan.feedforward import FeedForwardParameters, feedforward, feedforward_backward
from refspan.layer_norm import EPSILON, layer_norm, layer_norm_backward
from refspan.linear import grad_bias, linear, linear_backward
from refspan.memory import NEVER
from refspan.position import Reach, position_scores, position_scores_backward
from refspan.shorten import draw_span_limit, shorten, shorten_backward
from refspan.span import expire_span, expire_span_backward, initial_bias
from refspan.span_loss import queries_on_ramp, span_loss, span_loss_backward

EPS = np.finfo(np.float64).eps

STEP = EPS ** (1 / 3)
DIFFERENCE = 1000 * EPS ** (2 / 3)
"""A central difference is off by STEP^2 / 6 of the third derivative and by EPS / STEP of the values: EPS^(2/3) each."""


class Pair(NamedTuple):
    """A forward pass, its hand-written gradients, and what PyTorch makes of the same."""

    arrays: dict[str, np.ndarray]
    """What gradients are taken of, by name; no number within 1000 STEP of a kink."""
    forward: Any
    """Arrays by name -> result."""
    backward: Any
    """Gradient of the result, arrays by name -> gradients in the order of `arrays`."""
    eager: Any
    """torch, tensors by name -> result."""


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def linear_pair():
    x, weight, bias = normal(1, (2, 3, 5), (4, 5), (4,))

    def backward(grad, x, weight, bias):
        return *linear_backward(np, grad, x, weight), grad_bias(np, grad)

    return Pair(
        {"x": x, "weight": weight, "bias": bias},
        linear,
        backward,
        lambda torch, **t: torch.nn.functional.linear(t["x"], t["weight"], t["bias"]),
    )


def layer_norm_pair():
    x, weight, bias = normal(2, (2, 3, 6), (6,), (6,))
    return Pair(
        {"x": 3 * x + 1, "weight": weight, "bias": bias},
        lambda x, weight, bias: layer_norm(np, x, weight, bias),
        lambda grad, x, weight, bias: layer_norm_backward(np, grad, x, weight),
        lambda torch, **t: torch.nn.functional.layer_norm(t["x"], (6,), t["weight"], t["bias"], 1e-5),
    )


def span_pair():
    hidden, weight, bias = normal(3, (2, 7, 5), (5,), ())
    options = {"max_span": 30.0, "temperature": 1.7}
    return Pair(
        {"hidden": hidden, "weight": weight, "bias": np.asarray(bias)},
        lambda **a: expire_span(np, **a, **options),
        lambda grad, **a: expire_span_backward(np, grad, **a, **options),
        lambda torch, hidden, weight, bias: 30 * torch.sigmoid(hidden @ weight / 1.7 + bias),
    )


def shorten_pair():
    span = 10 * np.random.default_rng(4).random((3, 9))
    return Pair(
        {"span": span},
        lambda span: shorten(np, span, 5.5),
        lambda grad, span: [shorten_backward(np, grad, span, 5.5)],
        lambda torch, span: span.clamp(max=5.5),
    )


def span_loss_pair():
    rng = np.random.default_rng(5)
    span, age = 9 * rng.random((3, 12)), np.tile(np.arange(8, -4, -1), (3, 1))
    options = {"queries": 4, "ramp": 3.3, "weight": 0.7}

    def eager(torch, span):
        distance = torch.tensor(age)[:, None, :] + torch.arange(4)[:, None]
        mask = (1 + (span[:, None, :] - distance) / 3.3).clamp(0, 1) * (distance >= 1)
        return 0.7 / (3.3 * 4 * 3) * (span[:, None, :] * ((mask > 0) & (mask < 1))).sum()

    return Pair(
        {"span": span},
        lambda span: np.asarray(span_loss(np, span, age, **options)),
        lambda grad, span: [grad * span_loss_backward(np, span, age, **options)],
        eager,
    )


def cross_entropy_pair():
    (logits,) = normal(6, (2, 4, 7))
    targets = np.random.default_rng(6).integers(0, 7, (2, 4))
    return Pair(
        {"logits": 3 * logits},
        lambda logits: np.asarray(cross_entropy(np, log_softmax(np, logits), targets)),
        lambda grad, logits: [grad * cross_entropy_backward(np, log_softmax(np, logits), targets)],
        lambda torch, logits: torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten()),
    )


def embedding_pair():
    (weight,) = normal(7, (5, 3))
    tokens = np.array([[2, 2, 0, 4], [4, 2, 1, 0]])
    return Pair(
        {"weight": weight},
        lambda weight: embedding(np, tokens, weight),
        lambda grad, weight: [embedding_backward(np, grad, tokens, weight)],
        lambda torch, weight: torch.nn.functional.embedding(torch.tensor(tokens), weight),
    )


def feedforward_pair(dropout=None):
    x, *arrays = normal(8, (2, 3, 4), (7, 4), (7,), (5, 7), (5,))
    names = FeedForwardParameters._fields
    keep = dropout and dropout.scale_like(np, np.zeros((2, 3, 7)))

    def forward(x, **p):
        return feedforward(np, x, FeedForwardParameters(**p), dropout)[0]

    def backward(grad, x, **p):
        p = FeedForwardParameters(**p)
        _, active = feedforward(np, x, p, dropout)
        grad_x, grads = feedforward_backward(np, grad, x, active, p, dropout)
        return grad_x, *grads

    def eager(torch, x, in_weight, in_bias, out_weight, out_bias):
        inner = torch.nn.functional.linear(x, in_weight, in_bias).relu()
        inner = inner * torch.tensor(keep) if dropout else inner
        return torch.nn.functional.linear(inner, out_weight, out_bias)

    return Pair({"x": x, **dict(zip(names, arrays, strict=True))}, forward, backward, eager)


def position_pair():
    query, position = normal(9, (2, 4, 3), (5, 3))
    age = np.array([4, -2, 1, 1, 9, 0, -3, 2, 1, NEVER])  # some shared, some out of reach

    def eager(torch, query, position):
        distance = torch.tensor(age) + torch.arange(4)[:, None]  # [M, N]
        near = (distance >= 1) & (distance <= 5)
        rows = position[distance.clamp(1, 5) - 1] * near[..., None]  # [M, N, D]
        return torch.einsum("hmd,mnd->hmn", query, rows)

    return Pair(
        {"query": query, "position": position},
        lambda query, position: position_scores(query, Reach.of(np, position, age, query.shape[1])),
        lambda grad, query, position: position_scores_backward(
            grad, query, Reach.of(np, position, age, query.shape[1])
        ),
        eager,
    )


def attention_pair():
    """With dropout; without it, tests/test_reference.py has more."""
    query, key, value, position = normal(10, (2, 3, 5, 4), (2, 3, 11, 4), (2, 3, 11, 4), (6, 4))
    rng = np.random.default_rng(10)
    age = np.stack([rng.permutation(np.arange(-4, 7)) for _ in range(2)])
    span = rng.integers(0, 6, (2, 11)) + rng.uniform(0.1, 0.4, (2, 11))  # distances are whole, so is the ramp
    options = {"ramp": 3.0, "dropout": Dropout(0.3, 5)}
    places = np.ogrid[:2, :3, :5]
    keep = Dropout(0.3, 5).scale(np, np.float64, *(p[..., None] for p in places), age[:, None, None, :])

    def backward(grad, **a):
        _, saved = refspan.span_attention(**a, age=age, **options)
        return refspan.span_attention_backward(grad, saved)

    def eager(torch, query, key, value, span, position):
        distance = torch.tensor(age)[:, None, :] + torch.arange(5)[:, None]  # [B, M, N]
        mask = ((1 + (span[:, None, :] - distance) / 3).clamp(0, 1) * (distance >= 1))[:, None]
        rows = position[distance.clamp(1, 6) - 1] * ((distance >= 1) & (distance <= 6))[..., None]
        logits = (query @ key.mT + torch.einsum("bhmd,bmnd->bhmn", query, rows)) / 2
        weights = logits.exp() * mask
        total = weights.sum(-1, keepdim=True)
        return weights / (total + (total == 0)) * torch.tensor(keep) @ value

    return Pair(
        {"query": query, "key": key, "value": value, "span": span, "position": position},
        lambda **a: refspan.span_attention(**a, age=age, **options)[0],
        backward,
        eager,
    )


PAIRS = {
    "linear": linear_pair(),
    "layer_norm": layer_norm_pair(),
    "expire_span": span_pair(),
    "shorten": shorten_pair(),
    "span_loss": span_loss_pair(),
    "cross_entropy": cross_entropy_pair(),
    "embedding": embedding_pair(),
    "feedforward": feedforward_pair(),
    "feedforward with dropout": feedforward_pair(Dropout(0.4, 3)),
    "position_scores": position_pair(),
    "span_attention with dropout": attention_pair(),
}
all_pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())


def gradients_of(pair, dtype=np.float64):
    """Result, a gradient of it, and by it the gradients of the arrays."""
    arrays = {name: x.astype(dtype) for name, x in pair.arrays.items()}
    result = pair.forward(**arrays)
    grad = np.random.default_rng(0).standard_normal(result.shape).astype(dtype)
    return result, grad, dict(zip(arrays, pair.backward(grad, **arrays), strict=True))


@all_pairs
def test_gradients_are_derivatives(pair):
    """Along a direction of length 1 for each array: there, no derivative is much larger than the values."""
    result, grad, grads = gradients_of(pair)
    rng = np.random.default_rng(1)
    tolerance = DIFFERENCE * max(1.0, np.sum(np.abs(grad * result)))
    for name, x in pair.arrays.items():
        direction = rng.standard_normal(x.shape)
        direction /= sqrt(np.sum(direction**2))
        up, down = (pair.forward(**{**pair.arrays, name: x + step * direction}) for step in (STEP, -STEP))
        difference = np.sum(grad * (up - down)) / (2 * STEP)
        assert difference == pytest.approx(np.sum(grads[name] * direction), rel=0, abs=tolerance), name
        assert abs(difference) > 1000 * tolerance, f"{name}: says nothing"


@all_pairs
def test_autograd_agrees(pair):
    torch = pytest.importorskip("torch")
    result, grad, grads = gradients_of(pair)
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in pair.arrays.items()}
    theirs = pair.eager(torch, **tensors)
    theirs.backward(torch.tensor(grad))
    # two orders of summing at most 100 numbers, three layers of it: 300 EPS = 7e-14
    np.testing.assert_allclose(result, theirs.detach().numpy(), rtol=0, atol=1e-13 * max(1, np.abs(result).max()))
    for name, want in grads.items():
        got = tensors[name].grad.numpy()
        assert got.shape == want.shape
        np.testing.assert_allclose(want, got, rtol=0, atol=1e-13 * max(1, np.abs(got).max()), err_msg=name)


@all_pairs
def test_float32_stays_float32(pair):
    arrays = {name: x.astype(np.float32) for name, x in pair.arrays.items()}
    result, _, grads = gradients_of(pair, np.float32)
    wide = pair._replace(arrays={name: x.astype(np.float64) for name, x in arrays.items()})
    exact, _, exacts = gradients_of(wide)
    # as above; the gradient that goes in is rounded too
    tolerance = 300 * np.finfo(np.float32).eps
    np.testing.assert_allclose(result, exact, rtol=0, atol=tolerance * max(1, np.abs(exact).max()))
    for name, want in exacts.items():
        assert (grads[name].dtype, grads[name].shape) == (np.float32, arrays[name].shape), name
        assert np.abs(grads[name] - want).max() <= tolerance * max(1, np.abs(want).max()), name


# spans


def sigmoid(z):
    """To 28 digits, for a z that is a binary fraction."""
    small = Decimal(float(z)).exp()
    return small / (1 + small)


SATURATED = [-800.0, -700.0, -80.0, -40.0, -20.5, 0.0, 20.5, 40.0, 80.0, 700.0, 800.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_far_from_zero(dtype):
    """No warnings, no NaN, and small spans and slopes keep all their digits."""
    z = np.array(SATURATED, dtype)[None, :, None]
    one, zero = np.ones(1, dtype), np.zeros((), dtype)
    options = {"max_span": 1024.0, "temperature": 1.0}
    with np.errstate(all="raise", under="ignore"):  # exp(-800) is 0, and may be
        span = expire_span(np, z, one, zero, **options)[0]
        slope = expire_span_backward(np, np.ones((1, z.size), dtype), z, one, zero, **options)[0][0, :, 0]
    assert span.dtype == slope.dtype == dtype
    info = np.finfo(dtype)
    for got, got_slope, at in zip(span, slope, SATURATED, strict=True):
        for value, want in ((got, sigmoid(at)), (got_slope, sigmoid(at) * sigmoid(-at))):
            # exp is good to 2 units in the last place, the few operations after it to half a unit each
            error = abs(Decimal(float(value)) - 1024 * want)
            assert error <= 5 * Decimal(float(info.eps)) * want * 1024 + Decimal(float(1024 * info.tiny)), at
    assert span[-1] == 1024
    assert 0 < span[2] < 1e-31


@pytest.mark.parametrize("start", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_initial_bias(start):
    hidden = np.random.default_rng(0).standard_normal((2, 3, 4))
    bias = np.asarray(initial_bias(start))
    span = expire_span(np, hidden, np.zeros(4), bias, max_span=500.0, temperature=3.0)
    # the bias is rounded, twice, relative to its size, and the sigmoid moves by less than that
    np.testing.assert_allclose(span, 500 * start, rtol=(2 * abs(float(bias)) + 4) * EPS)


@pytest.mark.parametrize("start", [0, 1, -0.1, 1.5, float("nan")])
def test_initial_bias_is_refused(start):
    with pytest.raises(ValueError, match=rf"start: got {start}, expected a fraction of max_span"):
        initial_bias(start)


# span loss

eighths = st.integers(0, 8 * 40).map(lambda n: n / 8)


@st.composite
def ramps(draw, numbers):
    """Spans [1, N], ages [1, N], queries, ramp."""
    count = draw(st.integers(1, 6))
    spans = draw(st.lists(numbers, min_size=count, max_size=count))
    ages = draw(st.lists(st.integers(-12, 60) | st.just(NEVER + 3), min_size=count, max_size=count))
    return np.array([spans]), np.array([ages]), draw(st.integers(1, 12)), draw(numbers.filter(lambda r: r > 0.05))


def counted(span, age, queries, ramp):
    mask = refspan.soft_mask(span, age, queries=queries, ramp=ramp)
    return np.sum((mask > 0) & (mask < 1), axis=1)


@given(ramps(eighths))
@example((np.array([[3.0, 3.0, 2.5]]), np.array([[1, -2, 0]]), 12, 2.0))
def test_queries_on_ramp_in_eighths(case):
    """In binary fractions the mask is exact at its kinks, which count as off the ramp."""
    span, age, queries, ramp = case
    np.testing.assert_array_equal(queries_on_ramp(np, span, age, queries=queries, ramp=ramp), counted(*case))


@given(ramps(st.floats(0, 40)))
def test_queries_on_ramp(case):
    span, age, queries, ramp = case
    ends = np.concatenate([span, span + ramp])
    assume(np.abs(ends - np.round(ends)).min() > 1e-9)  # in between, 1 + r / R and e + R may be rounded over a kink
    got = queries_on_ramp(np, span, age, queries=queries, ramp=ramp)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, counted(*case))


@given(ramps(eighths), st.just(0) | st.floats(1e-9, 1e6))
def test_span_loss(case, weight):
    span, age, queries, ramp = case
    span, age = np.tile(span, (3, 1)), np.concatenate([age, age + 5, age - 5])
    options = {"queries": queries, "ramp": ramp}
    loss = span_loss(np, span, age, **options, weight=weight)
    charged = counted(span, age, queries, ramp)
    want = weight * np.sum(span * charged) / (ramp * queries * 3)
    assert loss >= 0
    assert loss == pytest.approx(want, rel=30 * EPS)  # sums of 18 numbers, and four operations more
    assert span_loss(np, span, age, **options, weight=2 * weight) == 2 * loss
    assert span_loss(np, span, age, **options, weight=0) == 0
    grad = span_loss_backward(np, span, age, **options, weight=weight)
    np.testing.assert_allclose(grad, weight * charged / (ramp * queries * 3), rtol=4 * EPS)


# shortening


def test_shorten_at_the_tie():
    """At e = l the gradient goes on, beyond it ends."""
    for dtype in (np.float32, np.float64):
        limit = float(dtype(4.3))
        span = np.array([[0, limit, np.nextafter(dtype(limit), dtype(9)), 9]], dtype)
        np.testing.assert_array_equal(shorten(np, span, limit), np.array([[0, limit, limit, limit]], dtype))
        grad = shorten_backward(np, np.full((1, 4), 7, dtype), span, limit)
        np.testing.assert_array_equal(grad, [[7, 7, 0, 0]])
        assert grad.dtype == shorten(np, span, limit).dtype == dtype


def test_limits_that_bind_always_and_never():
    span = np.array([[0.0, 3.0, 8.0]])
    np.testing.assert_array_equal(shorten(np, span, 0.0), np.zeros((1, 3)))
    np.testing.assert_array_equal(shorten(np, span, inf), span)
    np.testing.assert_array_equal(shorten_backward(np, span, span, inf), span)


def test_limits_are_uniform():
    draws = [refspan.draw_span_limit(np.random.default_rng(seed), 40.0) for seed in range(2000)]
    assert draws[7] == draw_span_limit(np.random.default_rng(7), 40.0)
    assert {type(x) for x in draws} == {float}
    assert 0 <= min(draws) < 0.2 < 39.8 < max(draws) <= 40
    for quarter in range(1, 4):  # 5 standard deviations of 2000 draws: 0.056
        assert np.mean(np.array(draws) < 10 * quarter) == pytest.approx(quarter / 4, abs=0.06)


# normalisation, probabilities, embedding


@pytest.mark.parametrize("constant", [0.0, 2.5, -3e4])
def test_layer_norm_of_a_constant_vector(constant):
    """No variance: the vector becomes the bias, and its gradient is that of x / sqrt(EPSILON) around the mean."""
    weight, bias, grad = normal(0, (8,), (8,), (2, 8))
    x = np.full((2, 8), constant)  # 8 of these have an exact sum
    np.testing.assert_array_equal(layer_norm(np, x, weight, bias), np.tile(bias, (2, 1)))
    grad_x, grad_weight, bias_grad = layer_norm_backward(np, grad, x, weight)
    g = grad * weight
    np.testing.assert_allclose(grad_x, (g - g.mean(axis=1, keepdims=True)) / sqrt(EPSILON), rtol=1e-12)
    np.testing.assert_array_equal(grad_weight, np.zeros(8))
    np.testing.assert_allclose(bias_grad, grad.sum(axis=0), rtol=8 * EPS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layer_norm_of_small_and_large_vectors(dtype):
    """What is far below sqrt(EPSILON) stays small, what is far above gets variance 1."""
    (x,) = normal(1, (1, 64))
    one, zero = np.ones(64, dtype), np.zeros(64, dtype)
    for size, want in ((1e-6, 1e-6 / sqrt(EPSILON)), (1e6, 1.0)):
        y = layer_norm(np, (size * x / x.std()).astype(dtype), one, zero)
        assert np.std(y.astype(np.float64)) == pytest.approx(want, rel=1e-6)  # 64 eps of float32; EPSILON itself


@pytest.mark.parametrize(("dtype", "huge"), [(np.float32, 1e38), (np.float64, 1e300)])
def test_log_softmax_of_huge_logits(dtype, huge):
    logits = np.array([[[huge, -huge, 0.0], [huge, huge, 0.0], [-huge, -huge, -huge]]], dtype)
    targets = np.array([[0, 1, 2]])
    with np.errstate(all="raise", under="ignore"):
        log_probs = log_softmax(np, logits)
        loss = cross_entropy(np, log_probs, targets)
        grad = cross_entropy_backward(np, log_probs, targets)
    half, third = dtype(np.log(2)), dtype(np.log(3))
    eps = float(np.finfo(dtype).eps)
    want = np.array([[[0, -2 * huge, -huge], [-half, -half, -huge], [-third, -third, -third]]])
    np.testing.assert_allclose(log_probs, want, rtol=4 * eps)
    assert loss == pytest.approx(float(half + third) / 3, rel=4 * eps)
    np.testing.assert_allclose(grad[0] * 3, [[0, 0, 0], [0.5, -0.5, 0], [1 / 3, 1 / 3, -2 / 3]], atol=4 * eps)


def test_tokens_of_probability_zero_cost_nothing_if_they_do_not_come():
    log_probs = np.array([[[0.0, -inf], [-inf, 0.0]]])
    assert cross_entropy(np, log_probs, np.array([[0, 1]])) == 0
    np.testing.assert_array_equal(cross_entropy_backward(np, log_probs, np.array([[0, 1]])), np.zeros((1, 2, 2)))
    assert cross_entropy(np, log_probs, np.array([[1, 1]])) == inf


def test_repeated_tokens_add_their_gradients():
    tokens = np.array([[2, 2, 0, 2], [2, 4, 2, 0]])
    (grad,) = normal(0, (2, 4, 3))
    want = np.zeros((6, 3))
    np.add.at(want, tokens, grad)
    got = embedding_backward(np, grad, tokens, np.zeros((6, 3)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-15 * 8)
    assert not got[[1, 3, 5]].any()
    np.testing.assert_array_equal(embedding(np, tokens, want), want[tokens])


# dropout


def kept(rate, seed, count=40_000):
    return Dropout(rate, seed).scale_like(np, np.zeros(count)) > 0


def test_dropout_is_reproducible_on_every_library():
    x = np.zeros((3, 50, 7), np.float32)
    scale = Dropout(0.3, 11).scale_like(np, x)
    assert scale.dtype == np.float32
    assert set(np.unique(scale)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    np.testing.assert_array_equal(Dropout(0.3, 11).scale_like(np, x), scale)
    device = array_api_strict.Device("device1")
    other = Dropout(0.3, 11).scale_like(array_api_strict, array_api_strict.asarray(x, device=device))
    assert other.device == device
    back = array_api_strict.asarray(other, device=array_api_strict.Device("CPU_DEVICE"), copy=True)
    np.testing.assert_array_equal(np.asarray(back), scale)
    assert Dropout(np.float64(0.3), np.int64(11)) == Dropout(0.3, 11)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.5, 0.97])
def test_numbers_kept(rate):
    """Within 5 standard deviations of the binomial distribution, once and over many seeds."""
    count = 40_000
    counts = np.array([kept(rate, seed, count).sum() for seed in range(20)])
    deviation = sqrt(count * rate * (1 - rate))
    assert np.abs(counts - count * (1 - rate)).max() <= 5 * deviation
    assert abs(counts.mean() - count * (1 - rate)) <= 5 * deviation / sqrt(20)
    scale = Dropout(rate, 3).scale_like(np, np.zeros(count))
    assert abs(scale.mean() - 1) <= 5 * deviation / count / (1 - rate)  # the expectation is preserved


def test_counts_of_neighbouring_seeds_vary_as_they_should():
    """Seeds that made the same decisions in another order would all keep as many."""
    counts = np.array([kept(0.5, seed, 1024).sum() for seed in range(400)])
    # the variance of 400 draws has a relative standard deviation of sqrt(2 / 399) = 0.07
    assert counts.var() == pytest.approx(256, rel=0.36)


RELATED = {
    "seed 0": Dropout(0.5, 0),
    "seed 1": Dropout(0.5, 1),
    "seed 2^32": Dropout(0.5, 2**32),
    "seed 2^32 + 1": Dropout(0.5, 2**32 + 1),
    "place 0": Dropout(0.5, 0).of(0),
    "place 1": Dropout(0.5, 0).of(1),
    "seed 1, place 0": Dropout(0.5, 1).of(0),
    "place 0, place 1": Dropout(0.5, 0).of(0).of(1),
    "place 1, place 0": Dropout(0.5, 0).of(1).of(0),
}


@pytest.mark.parametrize(("one", "other"), list(combinations(RELATED, 2)))
def test_seeds_and_places_decide_independently(one, other):
    """As many equal decisions as of two fair coins, 5.5 standard deviations at most: a chance of 3e-5 in all."""
    zeros = np.zeros(2**15)
    first, second = (RELATED[name].scale_like(np, zeros) > 0 for name in (one, other))
    places = np.arange(2**15)
    moved = {"shift": [np.roll(places, n) for n in range(4)], "bit": [places ^ (1 << n) for n in range(15)]}
    for how, orders in moved.items():
        for n, order in enumerate(orders):
            same = np.sum(first == second[order])
            assert abs(same - 2**14) <= 5.5 * sqrt(2**15) / 2, (how, n)


def test_dropout_of_feedforward_keeps_the_expectation():
    """Over 2000 seeds: in each, hidden numbers are 0 or 1 / (1 - rate) of what they were."""
    x, *arrays = normal(0, (1, 2, 4), (6, 4), (6,), (3, 6), (3,))
    p = FeedForwardParameters(*arrays)
    plain, active = feedforward(np, x, p)
    results = [feedforward(np, x, p, Dropout(0.25, seed)) for seed in range(2000)]
    for result, inner in results[:20]:
        assert np.all((inner == 0) | np.isclose(inner, active / 0.75, rtol=4 * EPS, atol=0))
        np.testing.assert_array_equal(result, linear(inner, p.out_weight, p.out_bias))
    variance = (0.25 / 0.75) * (active**2 @ (p.out_weight.T**2))
    error = np.mean([result for result, _ in results], axis=0) - plain
    assert np.all(np.abs(error) <= 5 * np.sqrt(variance / 2000))


def weights_of(dropout, *, seed=0, order=None, scratch_bytes=refspan.SCRATCH_BYTES, memories=24, batch=2):
    """Weights after dropout, [B, H, M, N]: values of a unit matrix show them."""
    rng = np.random.default_rng(seed)
    query, key = rng.standard_normal((batch, 3, 5, memories)), rng.standard_normal((batch, 3, memories, memories))
    span = rng.uniform(0, 25, (batch, memories))
    age = np.tile(np.arange(memories) - 4, (batch, 1))
    value = np.broadcast_to(np.eye(memories), key.shape)
    order = np.arange(memories) if order is None else order
    output, _ = refspan.span_attention(
        query,
        key[:, :, order],
        value[:, :, order],
        span[:, order],
        age[:, order],
        ramp=4.0,
        dropout=dropout,
        scratch_bytes=scratch_bytes,
    )
    return output


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_dropout_of_weights(rate):
    """Each weight is 0 or 1 / (1 - rate) of itself after normalisation, as often as it should."""
    plain, dropped = weights_of(None), weights_of(Dropout(rate, 1))
    live = plain > 0
    ratio = dropped[live] / plain[live]
    assert np.all((ratio == 0) | (np.abs(ratio * (1 - rate) - 1) < 1e-12))
    assert not dropped[~live].any()
    count = live.sum()
    assert count > 300
    assert abs(np.sum(ratio > 0) - count * (1 - rate)) <= 5 * sqrt(count * rate * (1 - rate))


def test_dropout_of_weights_keeps_the_expectation():
    plain = weights_of(None, memories=8, batch=1)
    mean = np.mean([weights_of(Dropout(0.25, seed), memories=8, batch=1) for seed in range(2000)], axis=0)
    assert np.all(np.abs(mean - plain) <= 5 * plain * sqrt(0.25 / 0.75 / 2000) + 1e-15)


@pytest.mark.parametrize("scratch_bytes", [1, 500, 2000, 5000])
def test_tiles_decide_alike(scratch_bytes):
    dropped = weights_of(Dropout(0.4, 2))
    other = weights_of(Dropout(0.4, 2), scratch_bytes=scratch_bytes)
    np.testing.assert_array_equal(other > 0, dropped > 0)
    np.testing.assert_allclose(other, dropped, rtol=1e-13)


def test_the_order_of_memories_decides_nothing():
    dropped = weights_of(Dropout(0.4, 2))
    order = np.random.default_rng(1).permutation(24)
    other = weights_of(Dropout(0.4, 2), order=order)
    np.testing.assert_array_equal(other > 0, dropped > 0)
    np.testing.assert_allclose(other, dropped, rtol=1e-13)


def test_expired_memories_decide_nothing():
    """Whether the dead are still there or not, the others are dropped alike."""
    dropped = weights_of(Dropout(0.4, 2), batch=1)
    live = np.flatnonzero(weights_of(None, batch=1).any(axis=(0, 1, 2)))
    assert len(live) < 24
    other = weights_of(Dropout(0.4, 2), order=live, batch=1)
    np.testing.assert_array_equal(other > 0, dropped > 0)


def test_rows_heads_queries_and_ages_decide_independently():
    """As many equal decisions as of two fair coins: for each two rows, heads, queries and ages, of both signs."""
    places = [np.arange(8), np.arange(8), np.arange(16), np.arange(-32, 32)]
    grid = np.meshgrid(*places, indexing="ij", sparse=True)
    keep = Dropout(0.5, 9).scale(np, np.float64, *grid) > 0  # [8, 8, 16, 64]
    for axis, size in enumerate(keep.shape):
        rows = np.moveaxis(keep, axis, 0).reshape(size, -1)
        signs = 2.0 * rows - 1
        agreement = signs @ signs.T - np.diag([rows.shape[1]] * size)
        # 5.5 standard deviations: for 2016 pairs, the chance to be beyond is 1e-4
        assert np.abs(agreement).max() <= 5.5 * sqrt(rows.shape[1]), axis


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, 0), ValueError, r"dropout rate: got 1\.0, expected at least 0 and below 1"),
        ((-0.1, 0), ValueError, r"dropout rate: got -0\.1, expected"),
        ((float("nan"), 0), ValueError, "dropout rate: got nan, expected"),
        (("0.1", 0), TypeError, r"dropout rate: got '0\.1', expected a number, at least 0 and below 1"),
        ((None, 0), TypeError, "dropout rate: got None, expected a number"),
        ((0.1, 1.5), TypeError, r"dropout seed: got 1\.5, expected a whole number >= 0"),
        ((0.1, None), TypeError, "dropout seed: got None, expected a whole number"),
        ((0.1, -1), ValueError, "dropout seed: got -1, expected at least 0"),
    ],
)
def test_bad_dropout_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Dropout(*arguments)
