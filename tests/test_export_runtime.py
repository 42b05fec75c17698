"""ONNX Runtime against the specification, and what the runner promises around it."""

import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

import refspan
from refspan.errors import SetupError
from refspan.export import AttentionRunner
from refspan.export.session import captured_log, check_device, kernels_in
from refspan.export.tiles import Cost, Selection, tiles
from refspan.visibility import visible_memories

FORMS = ("fused", "portable")
NAMES = ("query", "key", "value", "span")


@pytest.fixture(scope="module", params=FORMS)
def runner(request):
    return AttentionRunner(form=request.param, threads=1)


def step(seed=0, *, sizes=(2, 3, 5, 11, 4), positions=6, dtype="float32", span_dtype="float32", ramp=3.0):
    """Arguments of an attention step: all sizes different, memories of every phase in any order, some of one age."""
    batch, heads, queries, memories, head_size = sizes
    rng = np.random.default_rng(seed)
    fill = lambda *shape: rng.standard_normal(shape).astype(dtype)
    arrays = {
        "query": fill(batch, heads, queries, head_size),
        "key": fill(batch, heads, memories, head_size),
        "value": fill(batch, heads, memories, head_size),
        "span": rng.uniform(0, memories / 2, (batch, memories)).astype(span_dtype),
        "age": rng.integers(2 - queries, memories + 2, (batch, memories)),
    }
    return arrays, {"ramp": ramp, "position": fill(positions, head_size) if positions else None}


def specified(arrays, options, grad_output=None):
    """Output, or gradients by name, of the specification in float64."""
    wide = {name: x if name == "age" else x.astype(np.float64) for name, x in arrays.items()}
    position = options["position"]
    position = None if position is None else position.astype(np.float64)
    output, saved = refspan.span_attention(**wide, ramp=options["ramp"], position=position)
    if grad_output is None:
        return output
    gradients = refspan.span_attention_backward(grad_output.astype(np.float64), saved)._asdict()
    return {name: x for name, x in gradients.items() if x is not None}


def agree(runner, arrays, options, tolerance=2e-6):
    """Hold output and gradients of a step against the specification."""
    output = runner.span_attention(**arrays, **options)
    np.testing.assert_allclose(output, specified(arrays, options), rtol=tolerance, atol=tolerance)
    assert output.dtype == arrays["query"].dtype
    grad_output = np.random.default_rng(5).standard_normal(output.shape).astype(output.dtype)
    gradients = runner.span_attention_backward(grad_output, **arrays, **options)
    wanted = specified(arrays, options, grad_output)
    assert gradients.keys() == wanted.keys()
    for name, want in wanted.items():
        assert gradients[name].dtype == {**arrays, "position": options["position"]}[name].dtype
        np.testing.assert_allclose(
            gradients[name], want, rtol=tolerance, atol=tolerance * max(1, abs(want).max(initial=0))
        )
    return output, gradients


SIZES = [(2, 3, 5, 11, 4), (1, 1, 1, 1, 1), (3, 1, 4, 9, 2), (1, 4, 7, 3, 8), (2, 2, 1, 6, 5), (1, 2, 3, 130, 1)]


@pytest.mark.parametrize("positions", [0, 1, 6, 300])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32(runner, sizes, positions):
    for seed in range(3):
        agree(runner, *step(seed, sizes=sizes, positions=positions))


@pytest.mark.parametrize("span_dtype", ["float32", "float64"])
@pytest.mark.parametrize("positions", [0, 6])
def test_float16(runner, positions, span_dtype):
    agree(runner, *step(positions=positions, dtype="float16", span_dtype=span_dtype), tolerance=4e-3)


@pytest.mark.parametrize("span_dtype", ["float32", "float64"])
@pytest.mark.parametrize("positions", [0, 6])
def test_float64(positions, span_dtype):
    arrays, options = step(positions=positions, dtype="float64", span_dtype=span_dtype)
    tolerance = 1e-12 if span_dtype == "float64" else 1e-6  # gradients of float32 spans are float32
    output, _ = agree(AttentionRunner(form="portable"), arrays, options, tolerance=tolerance)
    np.testing.assert_allclose(output, specified(arrays, options), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="query: got float64, expected float16 or float32 in the fused form"):
        AttentionRunner(form="fused").span_attention(**arrays, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_soft_mask_is_exact(runner, dtype):
    arrays, _ = step(sizes=(3, 1, 9, 40, 1), span_dtype=dtype)
    mask = runner.soft_mask(arrays["span"], arrays["age"], queries=9, ramp=3.5)
    np.testing.assert_array_equal(mask, refspan.soft_mask(arrays["span"], arrays["age"], queries=9, ramp=3.5))
    assert mask.dtype == dtype
    small = AttentionRunner(scratch_bytes=1000).soft_mask(arrays["span"], arrays["age"], queries=9, ramp=3.5)
    np.testing.assert_array_equal(mask, small)


def test_wide_spans_stay_wide(runner):
    """Two float64 spans that float32 cannot tell apart give different masks (WIDTH)."""
    arrays, options = step(sizes=(1, 1, 1, 2, 1), positions=0, span_dtype="float64", ramp=1.0)
    arrays["age"][:] = 2**25 + 1
    arrays["span"][:] = [[2**25 + 1, 2**25 + 0.5]]
    arrays["query"][:] = 0
    arrays["value"][:] = np.array([1, 0]).reshape(1, 1, 2, 1)
    assert runner.span_attention(**arrays, **options).item() == pytest.approx(2 / 3)


def test_lone_survivor_has_weight_one(runner):
    arrays, options = step(sizes=(1, 2, 1, 3, 4), positions=0, ramp=2.0**20)
    arrays["age"][:] = [[1, 2, 3]]
    arrays["span"][:] = [[-(2.0**21), 2 - 2.0**20 + 0.125, -(2.0**21)]]
    mask = runner.soft_mask(arrays["span"], arrays["age"], queries=1, ramp=2.0**20)
    np.testing.assert_array_equal(mask, [[[0, 2.0**-23, 0]]])
    np.testing.assert_array_equal(runner.span_attention(**arrays, **options), arrays["value"][:, :, 1:2])


@pytest.mark.parametrize("partly", [False, True], ids=["dead", "seen by an earlier query"])
def test_expired_memory_influences_nothing(runner, partly):
    """However large its logit, also when an earlier query of the block still sees it and another does not."""
    arrays, options = step(sizes=(1, 2, 2, 4, 3), positions=0, ramp=1.0)
    arrays["age"][:] = [[1, 2, 3, 4]]
    arrays["span"][:] = [[9, 9, 9, 4 if partly else -1]]
    rest = {name: x[..., :3, :] if name in ("key", "value") else x for name, x in arrays.items()}
    rest |= {name: x[:, :3] for name, x in rest.items() if name in ("span", "age")}
    wanted = specified(rest, options)
    for huge in (1e30, -1e30):
        arrays["key"][:, :, 3] = huge
        output = runner.span_attention(**arrays, **options)
        last = slice(1, None) if partly else slice(None)
        np.testing.assert_allclose(output[:, :, last], wanted[:, :, last], rtol=2e-6)


def test_overflowing_logit_of_an_expired_memory(monkeypatch):
    """In primitive operators an expired memory stays out even if its logit is infinite and it enters the graph."""
    monkeypatch.setattr("refspan.export.runtime.visible_memories", lambda xp, span, *_, **__: np.ones(span.shape, bool))
    arrays, options = step(sizes=(1, 1, 2, 2, 1), positions=0, ramp=1.0)
    arrays["age"][:] = [[1, 4]]
    arrays["span"][:] = [[9, -1]]
    arrays["query"][:] = 1e30
    for infinite in (1e30, -1e30):
        arrays["key"][:] = np.array([1e-30, infinite]).reshape(1, 1, 2, 1)
        runner = AttentionRunner(form="portable")
        output = runner.span_attention(**arrays, **options)
        np.testing.assert_array_equal(output[0, 0, :, 0], arrays["value"][0, 0, [0, 0], 0])
        gradients = runner.span_attention_backward(np.ones_like(output), **arrays, **options)
        np.testing.assert_array_equal(gradients["value"][0, 0], [[2], [0]])
        assert not gradients["span"].any()


def test_empty_rows(runner):
    """Queries that see nothing: some of a block, a whole batch row, all of them, and without any memory."""
    arrays, options = step(sizes=(2, 2, 4, 3, 2), ramp=1.0)
    arrays["age"][:] = [[1, 2, 3], [50, 60, 70]]
    arrays["span"][:] = 0.5
    output, gradients = agree(runner, arrays, options)
    assert not output[0, :, 3:].any()
    assert output[0, :, 0].any()
    for x in (output[1], gradients["query"][1], gradients["key"][1], gradients["value"][1], gradients["span"][1]):
        assert not x.any()

    arrays["age"][:] = 99
    output, gradients = agree(runner, arrays, options)
    assert not output.any()
    assert not any(x.any() for x in gradients.values())

    output, gradients = agree(runner, *step(sizes=(2, 2, 4, 0, 2)))
    assert output.shape == (2, 2, 4, 2)
    assert gradients["key"].shape == (2, 2, 0, 2)
    assert runner.soft_mask(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int64), queries=3, ramp=1).shape == (
        2,
        3,
        0,
    )


def test_position_table_without_rows(runner):
    arrays, options = step(positions=0)
    options["position"] = np.zeros((0, 4), np.float32)
    _, gradients = agree(runner, arrays, options)
    assert gradients["position"].shape == (0, 4)


def test_gradient_of_positions_when_many_memories_share_an_age():
    """Additions to one place must not get lost, in parallel either."""
    arrays, options = step(sizes=(1, 8, 32, 1500, 4), positions=5, ramp=100.0)
    arrays["age"][:] = 1 + np.arange(1500) % 3
    arrays["span"][:] = 50
    agree(AttentionRunner(threads=4), arrays, options, tolerance=2e-5)


@pytest.mark.parametrize("positions", [0, 6])
@pytest.mark.parametrize("scratch_bytes", [1, 2000, 20_000])
def test_small_scratch_changes_nothing(runner, scratch_bytes, positions):
    arrays, options = step(sizes=(3, 4, 9, 40, 4), positions=positions, ramp=5.0)
    cut = AttentionRunner(form=runner.form, threads=1, scratch_bytes=scratch_bytes)
    runs = counted(cut)
    output, gradients = agree(cut, arrays, options)
    assert len(runs) > 4
    np.testing.assert_allclose(output, runner.span_attention(**arrays, **options), rtol=1e-6, atol=1e-6)
    whole = runner.span_attention_backward(output, **arrays, **options)
    parts = cut.span_attention_backward(output, **arrays, **options)
    for name in gradients:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, atol=1e-5)


def counted(runner):
    """The feeds of all runs from now on."""
    feeds, run = [], runner._run

    def remember(*arguments):
        feeds.append(arguments[-1])
        return run(*arguments)

    runner._run = remember
    return feeds


def test_dead_memories_are_not_computed():
    arrays, options = step(sizes=(2, 2, 3, 50, 4), positions=0, ramp=1.0)
    arrays["age"][:] = np.arange(50, 0, -1)
    arrays["span"][:] = 0
    arrays["span"][0, [3, 20]] = 60
    arrays["span"][1, [4, 5, 49]] = 60
    runner = AttentionRunner(threads=1)
    feeds = counted(runner)
    agree(runner, arrays, options)
    assert [feed["key"].shape() for feed in feeds] == [[2, 2, 3, 4]] * 2  # rows filled up to the longest
    _, gradients = agree(runner, arrays, options)
    assert not gradients["key"][0, :, 4:20].any()
    assert gradients["key"][0, :, 3].any()

    arrays["span"][:] = -5
    feeds.clear()
    agree(runner, arrays, options)
    assert not feeds


def test_nothing_is_copied_if_nothing_is_dead():
    key = np.ones((2, 3, 5, 4), np.float32)
    assert Selection.of(np.ones((2, 5), bool), granularity=1).gather(key, axis=2) is key


def test_filling_up_to_a_multiple(monkeypatch):
    """As for CUDA, whose kernels want aligned sizes; the memories added are seen by no query."""
    monkeypatch.setattr("refspan.export.runtime.GRANULARITY", {"cpu": 64})
    runner = AttentionRunner(threads=1)
    feeds = counted(runner)
    agree(runner, *step(ramp=40.0))
    assert {feed["key"].shape()[2] for feed in feeds} == {64}


def test_visible_memories_are_those_with_a_mask():
    rng = np.random.default_rng(0)
    for _ in range(50):
        queries, ramp = int(rng.integers(1, 9)), float(rng.uniform(0.5, 6))
        age, span = rng.integers(-8, 20, (3, 30)), rng.uniform(-5, 20, (3, 30)).astype(np.float32)
        wanted = (refspan.soft_mask(span, age, queries=queries, ramp=ramp) > 0).any(axis=1)
        np.testing.assert_array_equal(visible_memories(np, span, age, queries=queries, ramp=ramp), wanted)


def test_tiles_cover_everything_once_within_the_limit():
    rng = np.random.default_rng(0)
    for _ in range(300):
        batch, heads, queries, memories = (int(x) for x in rng.integers(1, 12, 4))
        cost, limit = Cost(int(rng.integers(0, 30)), int(rng.integers(1, 40))), int(rng.integers(1, 40_000))
        seen = np.zeros((batch, heads, queries), int)
        for b, h, blocks in tiles(batch, heads, queries, memories, cost, limit, int(rng.integers(1, 12))):
            for m in blocks:
                seen[b, h, m] += 1
                b_size, h_size, m_size = seen[b, h, m].shape
                needed = b_size * m_size * memories * (h_size * cost.per_head + cost.shared)
                assert needed <= limit or (b_size, h_size, m_size) == (1, 1, 1)
        assert (seen == 1).all()


def test_inputs_may_be_anything_and_stay_as_they_are(runner):
    arrays, options = step(sizes=(2, 3, 5, 11, 4))
    wanted = runner.span_attention(**arrays, **options)
    odd = {name: np.repeat(x, 2, axis=-1)[..., ::2] for name, x in arrays.items()}
    odd |= {"key": np.asfortranarray(odd["key"])}
    table = np.asfortranarray(options["position"])
    before = {name: x.copy() for name, x in odd.items()}
    for x in [*odd.values(), table]:
        assert not x.flags.c_contiguous
        x.flags.writeable = False
    output = runner.span_attention(**odd, ramp=3.0, position=table)
    np.testing.assert_array_equal(output, wanted)
    gradients = runner.span_attention_backward(np.asfortranarray(output), **odd, ramp=3.0, position=table)
    mask = runner.soft_mask(odd["span"], odd["age"], queries=5, ramp=3.0)
    for name, x in before.items():
        np.testing.assert_array_equal(odd[name], x)
    for result in (output, mask, *gradients.values()):
        assert result.flags.writeable
        assert not any(np.shares_memory(result, x) for x in odd.values())


def test_results_do_not_change_with_the_next_call(runner):
    first, second = step(0), step(1)
    output = runner.span_attention(**first[0], **first[1])
    kept = output.copy()
    runner.span_attention(**second[0], **second[1])
    np.testing.assert_array_equal(output, kept)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": np.zeros((2, 3, 11, 5), np.float32)}, ValueError, "key: got shape"),
        ({"value": np.zeros((2, 3, 11, 4), np.float64)}, TypeError, "value: got float64"),
        ({"span": np.zeros((2, 11), np.float16)}, TypeError, "span: got float16"),
        ({"span": np.full((2, 11), np.nan, np.float32)}, ValueError, "span: got 22 NaN"),
        ({"age": np.zeros((2, 11), np.int32)}, TypeError, "age: got int32"),
        ({"ramp": 0}, ValueError, "ramp: got 0"),
        ({"query": [1.0]}, TypeError, "query: got list"),
        ({"position": np.zeros((6, 5), np.float32)}, ValueError, "position: got shape"),
    ],
)
def test_arguments_are_checked_as_in_the_specification(runner, change, error, message):
    arrays, options = step()
    arguments = {**arrays, **options, **change}
    with pytest.raises(error, match=message):
        runner.span_attention(**arguments)
    with pytest.raises(error, match=message):
        runner.span_attention_backward(arrays["query"], **arguments)
    with pytest.raises(ValueError, match="grad_output: got shape"):
        runner.span_attention_backward(arrays["query"][:1], **arrays, **options)
    with pytest.raises(ValueError, match="queries: got 0"):
        runner.soft_mask(arrays["span"], arrays["age"], queries=0, ramp=1.0)


def test_sessions_are_made_once(monkeypatch):
    made, make = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: made.append(1) or make(*a, **k))
    runner = AttentionRunner(threads=1)
    assert not made
    for seed in range(2):
        for positions in (0, 6):
            agree(runner, *step(seed, positions=positions))
    assert len(made) == 4


def test_record_of_what_ran(runner):
    assert runner.version == onnxruntime.__version__
    assert runner.providers == ["CPUExecutionProvider"]
    agree(runner, *step())
    assert runner.kernel() == {"fused": ["Attention", "MatMul"], "portable": ["MatMul"]}[runner.form]
    placement = runner.placement()
    assert set(placement.values()) == {"CPUExecutionProvider"}
    assert any(node.startswith(f"{runner.form}-float32-position/") for node in placement)
    assert any("span_mask" in node for node in placement)


def test_memory_is_bounded():
    """Scores of all heads and queries would be 512 MiB; the limit is 16 MiB."""
    pytest.importorskip("resource")
    code = """if True:
        import resource
        import numpy as np
        from refspan.export import AttentionRunner
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        x = np.ones((1, 8, 256, 8), np.float32)
        k = np.ones((1, 8, 65536, 8), np.float32)
        span, age = np.full((1, 65536), 1e6, np.float32), np.arange(65536)[None] + 1
        for form in ("fused", "portable"):
            runner = AttentionRunner(form=form, scratch_bytes=16 * 2**20)
            runner.span_attention(x[:, :, :1], k[:, :, :9], k[:, :, :9], span[:, :9], age[:, :9], ramp=9.0)
            before = peak()
            runner.span_attention(x, k, k, span, age, ramp=9.0)
            print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(float(line) for line in done.stdout.splitlines()) < 64


# Devices


def test_unknown_settings():
    with pytest.raises(SetupError, match="device: got 'tpu', expected one of cpu, cuda"):
        AttentionRunner(device="tpu")
    with pytest.raises(SetupError, match="form: got 'flash', expected one of fused, portable"):
        AttentionRunner(form="flash")
    with pytest.raises(ValueError, match="scratch_bytes: got 0"):
        AttentionRunner(scratch_bytes=0)


def test_no_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        SetupError, match=r'onnxruntime is not installed; .*"refspan\[cpu\]".*"refspan\[gpu\]"'
    ) as error:
        AttentionRunner()
    assert "\n" not in str(error.value)


HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has the CUDA provider")
def test_no_cuda_provider():
    with pytest.raises(SetupError, match=r"built without CUDAExecutionProvider.*refspan\[gpu\]") as error:
        check_device("cuda")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has the CUDA provider")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available provider names")
def test_cuda_provider_does_not_start(monkeypatch):
    """A build that has the provider but no usable GPU: ONNX Runtime passes over it, which must not go unnoticed."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(SetupError, match="cannot start CUDAExecutionProvider; is there an NVIDIA GPU") as error:
        AttentionRunner(device="cuda")
    assert "\n" not in str(error.value)


def test_log_is_caught_and_the_rest_passed_on(capfd):
    with captured_log(onnxruntime, severity=0) as messages:
        os.write(
            2, b"\x1b[0;93m2026-01-01 [V:onnxruntime:Default, attention.cc:1 Run] ONNX Attention: using X (a=1)\x1b[m\n"
        )
        os.write(2, b"something else\n")
    assert messages == ["ONNX Attention: using X (a=1)"]
    assert capfd.readouterr().err == "something else\n"


def test_kernel_names():
    log = [
        "ONNX Attention: using Memory Efficient Attention (batch=1, q_seq=4, total_seq=16)",
        "Attention: using unified unfused path",
        "something about Attention",
    ]
    assert kernels_in(log) == ["Memory Efficient Attention", "unified unfused path"]


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU and onnxruntime-gpu")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cuda(form, dtype):
    runner = AttentionRunner(device="cuda", form=form)
    for positions in (0, 6):
        agree(runner, *step(positions=positions, dtype=dtype), tolerance={"float32": 1e-5, "float16": 4e-3}[dtype])
    arrays, _ = step()
    mask = runner.soft_mask(arrays["span"], arrays["age"], queries=5, ramp=3.0)
    np.testing.assert_array_equal(mask, refspan.soft_mask(arrays["span"], arrays["age"], queries=5, ramp=3.0))
    assert set(runner.placement().values()) == {"CUDAExecutionProvider"}
    assert runner.kernel()
