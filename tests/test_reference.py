"""The reference: against recorded results, against plain loops, on other array libraries, at its limits."""

import tracemalloc
from importlib.resources import files

import array_api_strict
import numpy as np
import pytest
from loops import Loops

import refspan
from refspan.conformance.mutants.dense import Dense

RECORDED = ("small", "ramp16", "wide")


def record(name):
    with (files("refspan.conformance.golden") / f"attention_{name}.npz").open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


def step(seed=0, *, sizes=(2, 3, 5, 11, 4), positions=6, dtype=np.float64, ramp=3.0, duplicates=False):
    """Arguments of an attention step with memories in every phase of life, some of the block itself."""
    batch, heads, queries, memories, head_size = sizes
    rng = np.random.default_rng(seed)
    fill = lambda *shape: rng.standard_normal(shape).astype(dtype)
    ages = [rng.permutation(np.arange(memories) - queries + 2) for _ in range(batch)]
    age = np.stack(ages).astype(np.int64) if batch else np.zeros((0, memories), np.int64)
    if duplicates:
        age = np.sort(age, axis=1) // 2
    arguments = {
        "query": fill(batch, heads, queries, head_size),
        "key": fill(batch, heads, memories, head_size),
        "value": fill(batch, heads, memories, head_size),
        "span": (rng.random((batch, memories)) * memories / 2).astype(np.promote_types(dtype, np.float32)),
        "age": age,
    }
    return arguments, {"ramp": ramp, "position": fill(positions, head_size) if positions else None}


def run(arguments, options, grad_output=None, **more):
    output, saved = refspan.span_attention(**arguments, **options, **more)
    if grad_output is None:
        grad_output = np.random.default_rng(1).standard_normal(output.shape).astype(output.dtype)
    return output, refspan.span_attention_backward(grad_output, saved), grad_output


@pytest.mark.parametrize("scratch_bytes", [refspan.SCRATCH_BYTES, 4000], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_results_of_the_original(name, scratch_bytes):
    z = record(name)
    arguments = {n: z[n] for n in ("query", "key", "value", "span", "age")}
    options = {"ramp": float(z["ramp"]), "position": z["position"]}
    output, grads, _ = run(arguments, options, z["grad_output"], scratch_bytes=scratch_bytes)
    # the original divides by its sum + 1e-8
    assert np.abs(output - z["output"]).max() < 1e-7
    for part, grad in grads._asdict().items():
        assert np.abs(grad - z[f"grad_{part}"]).max() < 1e-7, part


@pytest.mark.parametrize("other", [Loops, Dense])
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct ages", "shared ages"])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_other_ways_of_writing_it(other, duplicates, seed):
    arguments, options = step(seed, duplicates=duplicates)
    output, grads, grad_output = run(arguments, options)
    np.testing.assert_allclose(output, other().span_attention(**arguments, **options), rtol=0, atol=1e-13)
    expected = other().span_attention_backward(grad_output, **arguments, **options)
    for part, grad in grads._asdict().items():
        np.testing.assert_allclose(grad, expected[part], rtol=0, atol=1e-12, err_msg=part)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("positions", [0, 6], ids=["no position", "position"])
def test_array_api_strict_on_its_second_device(dtype, positions):
    """That device refuses to become a NumPy array: a hidden call of NumPy fails."""
    arguments, options = step(dtype=np.dtype(dtype), positions=positions)
    output, grads, grad_output = run(arguments, options)
    mask = refspan.soft_mask(arguments["span"], arguments["age"], queries=5, ramp=3.0)
    grad_mask = np.ones_like(mask)
    grad_span = refspan.soft_mask_backward(grad_mask, arguments["span"], arguments["age"], ramp=3.0)

    device = array_api_strict.Device("device1")

    def to(x):
        return array_api_strict.asarray(x.copy(), device=device)

    def back(x):
        assert x.device == device
        return np.asarray(array_api_strict.asarray(x, device=array_api_strict.Device("CPU_DEVICE"), copy=True))

    with pytest.raises(RuntimeError):
        np.asarray(to(mask))
    strict = {name: to(x) for name, x in arguments.items()}
    position = options["position"] if options["position"] is None else to(options["position"])
    other, saved = refspan.span_attention(**strict, ramp=3.0, position=position, scratch_bytes=2000)
    others = refspan.span_attention_backward(to(grad_output), saved)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(back(other), output, rtol=0, atol=tolerance)
    for part, grad in grads._asdict().items():
        if grad is not None:
            np.testing.assert_allclose(back(getattr(others, part)), grad, rtol=0, atol=tolerance, err_msg=part)
    np.testing.assert_array_equal(back(refspan.soft_mask(strict["span"], strict["age"], queries=5, ramp=3.0)), mask)
    again = refspan.soft_mask_backward(to(grad_mask), strict["span"], strict["age"], ramp=3.0)
    np.testing.assert_allclose(back(again), grad_span, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 3, 5, 0, 4),
        (1, 1, 1, 1, 1),
        (2, 1, 1, 7, 3),
        (1, 2, 3, 4, 1),
        (1, 1, 9, 2, 3),
        (0, 2, 3, 4, 5),
        (2, 3, 1, 0, 1),
    ],
)
def test_every_size_down_to_nothing(sizes):
    arguments, options = step(sizes=sizes)
    output, grads, grad_output = run(arguments, options)
    assert output.shape == arguments["query"].shape
    np.testing.assert_allclose(output, Loops().span_attention(**arguments, **options), rtol=0, atol=1e-13)
    expected = Loops().span_attention_backward(grad_output, **arguments, **options)
    for part, grad in grads._asdict().items():
        assert grad.shape == (arguments | options)[part].shape
        np.testing.assert_allclose(grad, expected[part], rtol=0, atol=1e-12, err_msg=part)


def test_read_only_and_non_contiguous_arguments():
    arguments, options = step()
    output, grads, grad_output = run(arguments, options)

    def awkward(x):
        backward = np.flip(x).copy()
        view = np.flip(np.asfortranarray(backward))
        view.flags.writeable = False
        assert not view.flags.c_contiguous
        return view

    strange = {name: awkward(x) for name, x in arguments.items()}
    other, others, _ = run(strange, {**options, "position": awkward(options["position"])}, awkward(grad_output))
    np.testing.assert_allclose(other, output, rtol=0, atol=1e-13)
    for part, grad in grads._asdict().items():
        np.testing.assert_allclose(getattr(others, part), grad, rtol=0, atol=1e-12, err_msg=part)


@pytest.mark.parametrize("scratch_bytes", [1, 1000, 3000, 10_000])
def test_tiles_change_nothing(scratch_bytes):
    arguments, options = step(sizes=(2, 3, 7, 13, 4))
    output, grads, grad_output = run(arguments, options)
    other, others, _ = run(arguments, options, grad_output, scratch_bytes=scratch_bytes)
    np.testing.assert_allclose(other, output, rtol=0, atol=1e-13)
    for part, grad in grads._asdict().items():
        np.testing.assert_allclose(getattr(others, part), grad, rtol=0, atol=1e-12, err_msg=part)


@pytest.mark.parametrize("dropout", [None, refspan.Dropout(0.4, seed=3)], ids=["all", "dropout"])
@pytest.mark.parametrize("positions", [0, 6], ids=["no position", "position"])
@pytest.mark.parametrize("keep_bytes", [800, 1500, 2**20], ids=["few tiles", "some tiles", "all tiles"])
def test_kept_weights_change_nothing_however_often_they_are_used(keep_bytes, positions, dropout):
    arguments, options = step(sizes=(2, 3, 7, 13, 4), positions=positions)
    options |= {"dropout": dropout, "scratch_bytes": 3000}
    output, grads, grad_output = run(arguments, options)
    other, saved = refspan.span_attention(**arguments, **options, keep_bytes=keep_bytes)
    np.testing.assert_allclose(other, output, rtol=0, atol=1e-13)
    for _ in range(2):
        again = refspan.span_attention_backward(grad_output, saved)
        for part, grad in grads._asdict().items():
            if grad is not None:
                np.testing.assert_allclose(getattr(again, part), grad, rtol=0, atol=1e-12, err_msg=part)
    kept = sum(part.nbytes for weights in saved.kept for part in weights if part is not None)
    assert 0 < kept <= keep_bytes


@pytest.mark.parametrize(
    "case",
    [
        {"positions": 0},
        {"positions": 64},
        {"ramp": 1e6, "positions": 0},
        {"ramp": 1e6, "positions": 0, "span_dtype": np.float64},
        {"ramp": 1e6, "positions": 16384},
        {"span": 1e6, "positions": 16384},
        {"span": 1e6, "positions": 131072, "gap": 8},
        {"positions": 131072},
        {"positions": 0, "dropout": 0.3},
        {"ramp": 1e6, "positions": 16384, "dropout": 0.3},
        {"ramp": 1e6, "positions": 64, "in_order": False},
    ],
    ids=lambda case: " ".join(f"{name}={value}" for name, value in case.items()),
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("mib", "keep"), [(1, 0), (4, 0), (1, 9)], ids=["1 MiB", "4 MiB", "1 MiB and 9 kept"])
def test_scratch_is_bounded(mib, keep, backward, case):
    """One array of the whole step takes 32 MiB. Beside the tile are vectors, and copies and gradients of arguments."""
    memories = 16384
    arguments, options = step(
        sizes=(1, 4, 128, memories, 1), positions=case["positions"], dtype=np.float32, ramp=case.get("ramp", 100.0)
    )
    if case.get("in_order", True):
        arguments["age"] = np.sort(arguments["age"], axis=1) * case.get("gap", 1)
    span = case.get("span", np.linspace(0, 20000, memories))  # else dead, fading and full ones
    arguments["span"] = np.broadcast_to(span, (1, memories)).astype(case.get("span_dtype", np.float32))
    dropout = refspan.Dropout(case["dropout"], seed=1) if "dropout" in case else None
    tracemalloc.start()
    try:
        limits = {"scratch_bytes": mib * 2**20, "keep_bytes": keep * 2**20}
        output, saved = refspan.span_attention(**arguments, **options, dropout=dropout, **limits)
        if backward:
            refspan.span_attention_backward(np.ones_like(output), saved)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one = arguments["key"].nbytes
    vectors = 8 * 8 * (memories + case["positions"])
    assert peak < (mib + keep) * 2**20 + (8 if backward else 3) * one + vectors


def test_what_no_query_sees_is_never_touched():
    """Contents of dead memories are NaN: any arithmetic with them would show."""
    arguments, options = step(sizes=(3, 2, 4, 40, 5), positions=8)
    mask = refspan.soft_mask(arguments["span"], arguments["age"], queries=4, ramp=3.0)
    dead = np.all(mask == 0, axis=1)[:, None, :, None]
    assert 20 < dead.sum() < 100
    output, grads, grad_output = run(arguments, options)
    poisoned = {**arguments, **{n: np.where(dead, np.nan, arguments[n]) for n in ("key", "value")}}
    other, others, _ = run(poisoned, options, grad_output)
    np.testing.assert_array_equal(other, output)
    for part, grad in grads._asdict().items():
        np.testing.assert_array_equal(getattr(others, part), grad, err_msg=part)
    assert not np.any(grads.key[np.broadcast_to(dead, grads.key.shape)])


def test_lone_survivor_has_weight_one():
    span = np.array([[2.0**-23, 0.0]], np.float32)
    age = np.array([[1, 1]])
    ones = np.ones((1, 1, 1, 1), np.float32)
    key = np.zeros((1, 1, 2, 1), np.float32)
    value = np.array([[[[7.0], [5.0]]]], np.float32)
    assert refspan.soft_mask(span, age, queries=1, ramp=1.0)[0, 0, 0] == 2.0**-23
    output, _ = refspan.span_attention(ones, key, value, span, age, ramp=1.0)
    assert output.item() == 7.0


def test_empty_query_outputs_zero_and_passes_no_gradient():
    arguments, options = step()
    arguments["span"][:] = 0.0
    arguments["age"] = arguments["age"] + 100
    output, grads, _ = run(arguments, options)
    assert not output.any()
    assert not any(grad.any() for grad in grads)


def test_expired_memory_with_an_infinite_score_influences_nothing():
    """Its own product overflows to inf; it is live for the block's first query only."""
    arguments, options = step(sizes=(1, 1, 2, 3, 2), positions=0)
    arguments["span"][:] = [[0.5, 50.0, 50.0]]
    arguments["age"][:] = [[1, 1, 2]]
    options["ramp"] = 1.0
    output, _, _ = run(arguments, options)
    arguments["key"][0, 0, 0] = 1e300
    arguments["query"][0, 0, 1] = 1e100
    arguments["key"][0, 0, 1:] = 0
    with np.errstate(over="ignore"):  # NumPy's own remark on the product of the two
        other, _, _ = run(arguments, options)
    np.testing.assert_allclose(other[0, 0, 1], arguments["value"][0, 0, 1:].mean(axis=0))
    assert np.isfinite(output).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_dtypes_stay_near_float64(dtype):
    arguments, options = step(dtype=dtype)
    output, grads, grad_output = run(arguments, options)
    wide = {name: x.astype(np.float64) if name != "age" else x for name, x in arguments.items()}
    position = options["position"].astype(np.float64)
    exact, exacts, _ = run(wide, {**options, "position": position}, grad_output.astype(np.float64))
    u = np.finfo(dtype).eps
    assert output.dtype == dtype
    np.testing.assert_allclose(output, exact, rtol=0, atol=8 * u)
    for part, grad in grads._asdict().items():
        assert grad.dtype == (arguments["span"].dtype if part == "span" else dtype)
        np.testing.assert_allclose(grad, getattr(exacts, part), rtol=0, atol=64 * u, err_msg=part)


def test_gradients_are_derivatives():
    """Central differences in float64, one random direction per argument, away from kinks."""
    arguments, options = step(seed=3)
    output, grads, grad_output = run(arguments, options)
    rng = np.random.default_rng(4)
    h = 1e-6
    for part, grad in grads._asdict().items():
        x = (arguments | options)[part]
        direction = rng.standard_normal(x.shape)
        if part == "span":
            remaining = x[:, None] - (arguments["age"][:, None] + np.arange(5)[:, None])
            kink = np.minimum(np.abs(remaining), np.abs(remaining + 3.0)).min(axis=1) < 1e-4
            direction[kink] = 0
        outputs = []
        for sign in (1, -1):
            moved = {**arguments, **options, part: x + sign * h * direction}
            outputs.append(refspan.span_attention(**moved)[0])
        difference = np.sum(grad_output * (outputs[0] - outputs[1])) / (2 * h)
        assert difference == pytest.approx(np.sum(grad * direction), rel=1e-6, abs=1e-8), part
    assert output.any()


def test_span_learns_from_the_queries_on_its_ramp_and_no_other():
    span, age = np.array([[2.0]]), np.array([[1]])
    grad = refspan.soft_mask_backward(np.arange(1.0, 11.0).reshape(1, 10, 1), span, age, ramp=4.0)
    # distances 3, 4, 5 lie strictly inside the ramp from 2 to 6: queries 2, 3, 4 with gradients 3, 4, 5
    assert grad.item() == (3 + 4 + 5) / 4


def test_mask_at_the_kinks_and_in_the_past():
    span = np.array([[3.0, 3.0, 3.0]], np.float32)
    age = np.array([[3, 5, -1]])
    mask = refspan.soft_mask(span, age, queries=3, ramp=2.0)
    np.testing.assert_array_equal(mask[0], [[1, 0, 0], [0.5, 0, 0], [0, 0, 1]])
    assert mask.dtype == np.float32


def arguments_with(**changes):
    arguments, options = step(dtype=np.float32)
    return {**arguments, **options, **changes}


BASE = arguments_with()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": BASE["query"].astype(int)}, TypeError, "query: got int64, expected float16, float32 or float64"),
        ({"query": BASE["query"][0]}, ValueError, r"query: got shape \(3, 5, 4\), expected \(B, H, M, D\)"),
        ({"query": BASE["query"][:, :, :0]}, ValueError, r"query: got shape \(2, 3, 0, 4\), expected M >= 1 queries"),
        ({"query": BASE["query"][..., :0]}, ValueError, r"query: got shape .* of head size D >= 1"),
        ({"query": BASE["query"].tolist()}, TypeError, "query: got list, expected an array"),
        ({"key": BASE["key"][:, :2]}, ValueError, r"key: got shape \(2, 2, 11, 4\), expected \(2, 3, N, 4\)"),
        ({"key": BASE["key"].astype(np.float64)}, TypeError, "key: got float64, expected float32"),
        ({"value": BASE["value"][:, :, 1:]}, ValueError, r"value: got shape .* expected \(2, 3, 11, 4\)"),
        ({"span": BASE["span"][:, 1:]}, ValueError, r"span: got shape \(2, 10\), expected \(2, 11\)"),
        ({"span": BASE["span"].astype(np.float16)}, TypeError, "span: got float16, expected float32 or float64"),
        (
            {"span": np.where(BASE["span"] > 2, np.nan, 1).astype(np.float32)},
            ValueError,
            "span: got .* NaN or infinite",
        ),
        ({"span": BASE["span"] * np.float32(np.inf)}, ValueError, "span: got .* NaN or infinite values"),
        ({"age": BASE["age"].astype(float)}, TypeError, "age: got float64, expected int64"),
        ({"age": BASE["age"][:, 1:]}, ValueError, r"age: got shape \(2, 10\), expected \(2, 11\)"),
        ({"ramp": 0}, ValueError, "ramp: got 0, expected a number of steps > 0"),
        ({"ramp": 1e-46}, ValueError, "ramp: got 1e-46, expected a number of steps > 0"),
        ({"ramp": 1e39}, ValueError, r"got 1e\+39, expected a number of steps > 0 \(1e-30 to 1e\+30\)"),
        ({"ramp": float("inf")}, ValueError, "ramp: got inf"),
        ({"ramp": True}, TypeError, "ramp: got True, expected a number"),
        ({"scratch_bytes": "a"}, TypeError, "scratch_bytes: got 'a', expected a whole number"),
        ({"ramp": -1.5}, ValueError, "ramp: got -1.5"),
        ({"ramp": float("nan")}, ValueError, "ramp: got nan"),
        ({"ramp": "long"}, TypeError, "ramp: got 'long', expected a number"),
        ({"position": BASE["position"][:, 1:]}, ValueError, r"position: got shape \(6, 3\), expected \(P, 4\)"),
        ({"position": BASE["position"].astype(np.float16)}, TypeError, "position: got float16, expected float32"),
        ({"value": array_api_strict.asarray(BASE["value"])}, TypeError, "value: got an array of array_api_strict"),
        ({"scratch_bytes": 0}, ValueError, "scratch_bytes: got 0, expected at least 1"),
    ],
)
def test_bad_arguments_are_named_in_one_line(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        refspan.span_attention(**{**BASE, **changes})
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_the_others():
    _, saved = refspan.span_attention(**BASE)
    with pytest.raises(ValueError, match=r"grad_output: got shape \(2, 3, 4\)"):
        refspan.span_attention_backward(BASE["query"][..., 0, :], saved)
    with pytest.raises(TypeError, match="grad_output: got float64"):
        refspan.span_attention_backward(BASE["query"].astype(np.float64), saved)
    with pytest.raises(ValueError, match="queries: got 0, expected at least 1"):
        refspan.soft_mask(BASE["span"], BASE["age"], queries=0, ramp=1.0)
    with pytest.raises(TypeError, match=r"queries: got 2\.5, expected a whole number"):
        refspan.soft_mask(BASE["span"], BASE["age"], queries=2.5, ramp=1.0)
    with pytest.raises(ValueError, match=r"grad_mask: got shape \(2, 11\)"):
        refspan.soft_mask_backward(BASE["span"], BASE["span"], BASE["age"], ramp=1.0)


def test_cupy():
    cupy = pytest.importorskip("cupy")
    try:
        cupy.zeros(1)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    arguments, options = step(dtype=np.float64)
    output, grads, grad_output = run(arguments, options)
    there = {name: cupy.asarray(x) for name, x in arguments.items()}
    other, saved = refspan.span_attention(**there, ramp=3.0, position=cupy.asarray(options["position"]))
    others = refspan.span_attention_backward(cupy.asarray(grad_output), saved)
    np.testing.assert_allclose(cupy.asnumpy(other), output, rtol=0, atol=1e-12)
    for part, grad in grads._asdict().items():
        np.testing.assert_allclose(cupy.asnumpy(getattr(others, part)), grad, rtol=0, atol=1e-12, err_msg=part)


@pytest.mark.parametrize("keep_bytes", [-1, 0.5, "all"])
def test_bytes_to_keep_are_a_whole_number(keep_bytes):
    arguments, options = step()
    with pytest.raises((TypeError, ValueError), match=r"keep_bytes: got .*expected"):
        refspan.span_attention(**arguments, **options, keep_bytes=keep_bytes)


def test_dropout_that_is_none():
    arguments, options = step()
    with pytest.raises(TypeError, match=r"dropout: got 0\.1, expected a refspan\.Dropout or None"):
        refspan.span_attention(**arguments, **options, dropout=0.1)
