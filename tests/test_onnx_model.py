"""Streaming on ONNX Runtime: against the reference, and what a stream promises beside numbers."""

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
from onnx_models import onnx_model, small_model, tokens_of

import refspan
from refspan.export import OnnxModel, StreamFailedError, onnx_stream, slots, source, streaming_model, write_model_file
from refspan.export.onnx_stream import AS_IT_WAS, OnnxStream
from refspan.export.stream_buffers import Buffers
from refspan.stream import MemoryLimitError

CLOSE = {"float64": 1e-12, "float32": 2e-5}
"""Models of two layers with numbers of size 1; errors were 2e-15 and 3e-6."""

LENGTHS = (4, 1, 3, 8, 2, 8, 8, 8)
FORMS = [("portable", "float32"), ("fused", "float32"), ("portable", "float64")]


@pytest.fixture
def no_spare_slots(monkeypatch):
    """Every layer gets the slots that it needs and not one more, so that each one is soon taken again."""
    monkeypatch.setattr(onnx_stream, "slots_for", lambda needed, current=0: needed)


def follow(stream, other, config, rng, blocks=60):
    """The largest difference between two streams that read the same blocks; they must hold the same memories."""
    worst = 0.0
    for i in range(blocks):
        tokens = tokens_of(rng, config, stream.batch, LENGTHS[i % len(LENGTHS)])
        worst = max(worst, float(np.max(np.abs(stream.step(tokens) - other.step(tokens)))))
        assert stream.memory_size() == other.memory_size()
    return worst


@pytest.mark.parametrize("positions", [0, 1, 3, 9])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_streams_follow_the_reference(form, dtype, norm, positions):
    config, params = small_model(norm=norm, positions=positions, dtype=dtype)
    stream = onnx_model(config, params, form=form).open(2)
    reference = refspan.open_model(config, params, batch=2)
    assert follow(stream, reference, config, np.random.default_rng(1)) < CLOSE[dtype]


@pytest.mark.parametrize("positions", [1, 3, 9])
@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_streams_follow_the_reference_without_a_slot_to_spare(no_spare_slots, form, dtype, positions):
    for seed in range(3):
        config, params = small_model(seed, positions=positions, dtype=dtype)
        stream = onnx_model(config, params, form=form).open(2)
        reference = refspan.open_model(config, params, batch=2)
        assert follow(stream, reference, config, np.random.default_rng(seed)) < CLOSE[dtype]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("after", "after (x, done) => (y) { y = Identity (x) }"),
        ("expired", "expired (span, age, ramp) => (expired) { a = CastLike (age, span) expired = Greater (a, span) }"),
        ("restarted", "restarted (r, d, restart) => (rr, dd) { rr = Identity (r) dd = Identity (d) }"),
    ],
)
def test_wrong_graphs_are_noticed(no_spare_slots, monkeypatch, name, text):
    """Slots written before they are read; memories dropped once they fade; rows that do not forget."""
    read = source._read

    def wrong(called, settings, variant):
        right, doc = read(called, settings, variant)
        header = f'<domain: "refspan", opset_import: ["" : {settings["opset"]}]>\n'
        return (header + text if called == name else right), doc

    monkeypatch.setattr(source, "_read", wrong)
    config, params = small_model()
    stream, reference = onnx_model(config, params).open(2), refspan.open_model(config, params, batch=2)
    rng, worst = np.random.default_rng(0), 0.0
    for i in range(40):
        if i == 20:
            stream.reset(1)
            reference.reset(1)
        tokens = tokens_of(rng, config, 2, LENGTHS[i % len(LENGTHS)])
        worst = max(worst, float(np.max(np.abs(stream.step(tokens) - reference.step(tokens)))))
    assert worst > 100 * CLOSE["float32"]


def test_too_few_slots_are_noticed(monkeypatch):
    """What `needed_slots` says is needed is: with one slot fewer, something is lost."""
    monkeypatch.setattr(onnx_stream, "slots_for", lambda needed, current=0: max(8, needed - 1))
    config, params = small_model()
    stream, reference = onnx_model(config, params).open(2), refspan.open_model(config, params, batch=2)
    rng = np.random.default_rng(0)
    blocks = [tokens_of(rng, config, 2, 8) for _ in range(40)]
    worst = max(float(np.max(np.abs(stream.step(tokens) - reference.step(tokens)))) for tokens in blocks)
    assert worst > 100 * CLOSE["float32"]


@pytest.mark.parametrize("positions", [1, 9])
def test_rows_of_different_lengths(no_spare_slots, positions):
    """Each row reads as if it were alone: padding is nothing, and a row that reads nothing does not age."""
    config, params = small_model(positions=positions)
    stream = onnx_model(config, params).open(3)
    alone = [refspan.open_model(config, params, batch=1) for _ in range(3)]
    rng = np.random.default_rng(2)
    for i in range(50):
        tokens = tokens_of(rng, config, 3, LENGTHS[i % len(LENGTHS)])
        lengths = rng.integers(0, tokens.shape[1] + 1, 3) if i % 3 else np.full(3, tokens.shape[1])
        if i % 11 == 10:
            stream.reset(i % 3)
            alone[i % 3].reset(0)
        log_probs = stream.step(tokens, lengths)
        for b, one in enumerate(alone):
            if lengths[b]:
                expected = one.step(tokens[b : b + 1, : lengths[b]])
                np.testing.assert_allclose(log_probs[b, : lengths[b]], expected[0], rtol=0, atol=CLOSE["float32"])
        assert stream.memory_size() == tuple(np.max([one.memory_size() for one in alone], axis=0))


def test_blocks_longer_than_the_block_size_are_cut():
    config, params = small_model()
    model = onnx_model(config, params)
    tokens = tokens_of(np.random.default_rng(0), config, 2, 21)
    lengths = np.array([21, 10])
    whole, apart = model.open(2), model.open(2)
    got = whole.step(tokens, lengths)
    parts = [apart.step(tokens[:, i : i + 8], np.clip(lengths - i, 0, min(8, 21 - i))) for i in (0, 8, 16)]
    np.testing.assert_array_equal(got[0], np.concatenate(parts, axis=1)[0])
    np.testing.assert_array_equal(got[1, :10], np.concatenate(parts, axis=1)[1, :10])
    assert whole.memory_size() == apart.memory_size()


# slots


def test_slots_grow_and_shrink_and_lose_nothing():
    """Spans of 300 steps fill hundreds of slots; a row that starts anew frees them."""
    config, params = small_model(max_span=300.0, layers=1)
    params["layers.0.span.weight"] = np.zeros(12, np.float32)
    params["layers.0.span.bias"] = np.asarray(6.0, np.float32)
    rng, seen = np.random.default_rng(0), []
    stream, reference = onnx_model(config, params).open(1), refspan.open_model(config, params, batch=1)
    for i in range(80):
        if i == 60:
            stream.reset(0)
            reference.reset(0)
        tokens = tokens_of(rng, config, 1, 8)
        np.testing.assert_allclose(stream.step(tokens), reference.step(tokens), rtol=0, atol=CLOSE["float32"])
        assert stream.memory_size() == reference.memory_size()
        seen.append(stream.slots()[0])
    assert seen[0] == slots.GRANULARITY
    assert max(seen[:60]) >= 300
    assert min(seen[60:]) == slots.GRANULARITY


@pytest.mark.parametrize("needed", [*range(1, 300), 1000, 2047, 2048, 2049, 5000, 16000, 100_000])
def test_slots_are_few_more_than_needed(needed):
    fresh = slots.slots_for(needed)
    assert needed <= fresh <= needed + max(needed / 16, slots.GRANULARITY - 1)
    assert fresh % slots.GRANULARITY == 0
    for current in (64, 128, 512, fresh, 2 * fresh, 10**6):
        kept = slots.slots_for(needed, current)
        assert kept in (current, fresh)
        assert needed <= kept <= max(needed * 1.25, needed + 3 * slots.GRANULARITY)


def test_a_steady_step_writes_in_place():
    """Keys and values of distant memories stay where they are, whatever moves into them."""
    config, params = small_model(positions=1)
    stream = onnx_model(config, params).open(1)
    rng = np.random.default_rng(0)

    def places():
        sides = stream._buffers._distant
        return [[side[i][name].data_ptr() for side in sides] for i in range(2) for name in ("key", "value")]

    stream.step(tokens_of(rng, config, 1, 8))
    before, content = places(), [x["key"].numpy().copy() for x in stream._buffers._distant[0]]
    for _ in range(10):
        stream.step(tokens_of(rng, config, 1, 8))
    assert places() == before
    assert all(one == other for one, other in before)
    assert all(
        not np.array_equal(x["key"].numpy(), y) for x, y in zip(stream._buffers._distant[0], content, strict=True)
    )


def test_a_limit_of_slots():
    config, params = small_model(max_span=300.0)
    params["layers.1.span.weight"] = np.zeros(12, np.float32)
    params["layers.1.span.bias"] = np.asarray(6.0, np.float32)
    stream = onnx_model(config, params).open(2, max_slots=128)
    tokens = tokens_of(np.random.default_rng(0), config, 2, 8)
    while stream.memory_size()[1] < 112:
        stream.step(tokens)
    state = stream.state()

    def read_on():
        for _ in range(4):
            stream.step(tokens)

    with pytest.raises(MemoryLimitError, match=r"layer 1 might need 192 slots, the limit is 128 \(max_slots\)"):
        read_on()
    assert stream.memory_size()[1] > 112
    stream.restore(state)
    stream.reset(0)
    stream.reset(1)
    read_on()
    assert max(stream.slots()) <= 128


# states


def test_states_go_from_here_to_the_reference_and_back(tmp_path):
    config, params = small_model()
    model, rng = onnx_model(config, params), np.random.default_rng(0)
    stream, reference = model.open(2), refspan.open_model(config, params, batch=2)
    for i in range(20):
        tokens = tokens_of(rng, config, 2, LENGTHS[i % len(LENGTHS)])
        stream.step(tokens)
        reference.step(tokens)
    stream.reset(1)
    reference.reset(1)
    stream.save_state(tmp_path / "ours.safetensors")
    refspan.save_state(tmp_path / "theirs.safetensors", reference)
    other, another = model.open(2), refspan.open_model(config, params, batch=2)
    other.load_state(tmp_path / "theirs.safetensors")
    refspan.load_state(tmp_path / "ours.safetensors", another)
    for held in (reference, other, another):
        assert held.memory_size() == stream.memory_size()
    state = stream.state()
    for _ in range(2):  # the second time from a stream that has gone on, and whose buffers have changed sides
        for _ in range(3):
            tokens = tokens_of(rng, config, 2, 5)
            expected = reference.step(tokens)
            for held in (stream, other, another):
                np.testing.assert_allclose(held.step(tokens), expected, rtol=0, atol=CLOSE["float32"])
        for held in (stream, other, another, reference):
            held.restore(state)


def test_a_state_that_does_not_fit_changes_nothing(tmp_path):
    config, params = small_model()
    stream = onnx_model(config, params).open(2)
    tokens = tokens_of(np.random.default_rng(0), config, 2, 8)
    stream.step(tokens)
    before = stream.state()
    other, other_params = small_model(seed=1)
    for wrong, message in [
        (onnx_model(other, other_params).open(2).state(), "fingerprint of other parameters"),
        (onnx_model(config, params).open(1).state(), r"got shape \(1, 0\)"),
        ({**before, "layers.0.span": before["layers.0.span"] * 100}, "expected 0 to 30"),
        ({**before, "layers.7.span": before["layers.0.span"]}, "not known to this model"),
        ({**before, "layers.1.key": np.full_like(before["layers.1.key"], np.nan)}, "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.restore(wrong)
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(refspan.errors.SetupError, match="no whole safetensors file"):
        stream.load_state(tmp_path / "x.safetensors")
    for name, array in stream.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_states_of_float16_models_are_float32_and_exact():
    config, params = small_model()
    params = {name: array.astype(np.float16) for name, array in params.items()}
    model = onnx_model(config, params)
    stream, other, rng = model.open(2), model.open(2), np.random.default_rng(0)
    for _ in range(10):
        stream.step(tokens_of(rng, config, 2, 8))
    state = stream.state()
    assert state["layers.0.key"].dtype == np.float32
    other.restore(state)
    tokens = tokens_of(rng, config, 2, 8)
    np.testing.assert_array_equal(stream.step(tokens), other.step(tokens))


# one model, many streams


def test_streams_of_one_model_in_threads_of_their_own():
    config, params = small_model()
    model = onnx_model(config, params)
    blocks = [[tokens_of(np.random.default_rng(seed), config, 1, 8) for _ in range(30)] for seed in range(4)]
    expected = []
    for own in blocks:
        stream = model.open(1)
        expected.append([stream.step(tokens) for tokens in own])
    got = [[] for _ in blocks]

    def read(i):
        stream = model.open(1)
        got[i] += [stream.step(tokens) for tokens in blocks[i]]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(blocks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(ours), np.concatenate(theirs))


def test_results_and_arguments_are_the_callers_own():
    config, params = small_model()
    stream = onnx_model(config, params).open(1)
    tokens = tokens_of(np.random.default_rng(0), config, 1, 8)
    tokens.flags.writeable = False
    first = stream.step(tokens)
    copy = first.copy()
    state = stream.state()
    copies = {name: array.copy() for name, array in state.items()}
    for _ in range(5):
        stream.step(tokens)
    np.testing.assert_array_equal(first, copy)
    for name, array in state.items():
        np.testing.assert_array_equal(array, copies[name])
    np.testing.assert_array_equal(onnx_model(config, params).open(1).step(np.asfortranarray(tokens.copy())), copy)


def test_closing():
    config, params = small_model()
    with onnx_model(config, params) as model:
        with model.open(1) as stream:
            stream.step(np.zeros((1, 1), np.int64))
        stream.close()
        for use in (
            lambda: stream.step(np.zeros((1, 1), np.int64)),
            stream.state,
            stream.slots,
            lambda: stream.reset(0),
        ):
            with pytest.raises(ValueError, match="the stream is closed"):
                use()
        left = model.open(1)
    model.close()
    with pytest.raises(ValueError, match="the model is closed"):
        model.open(1)
    with pytest.raises(ValueError, match="the model is closed"):
        left.step(np.zeros((1, 1), np.int64))
    gc.collect()


def test_a_failure_in_the_middle_of_a_step(monkeypatch):
    config, params = small_model()
    model, rng = onnx_model(config, params), np.random.default_rng(0)
    stream = model.open(1)
    stream.step(tokens_of(rng, config, 1, 8))
    state = stream.state()

    class Lost:
        def run_with_iobinding(self, binding):
            raise RuntimeError("CUDA failure 700: an illegal memory access\nwas encountered")

    session = model._session
    monkeypatch.setattr(model, "_session", Lost())
    with pytest.raises(
        StreamFailedError, match=r"^ONNX Runtime failed in the middle of a step: CUDA .* was encountered$"
    ):
        stream.step(tokens_of(rng, config, 1, 8))
    monkeypatch.setattr(model, "_session", session)
    for use in (lambda: stream.step(np.zeros((1, 1), np.int64)), stream.state, lambda: stream.reset(0)):
        with pytest.raises(StreamFailedError, match="restore a saved state"):
            use()
    stream.restore(state)
    other = model.open(1)
    other.restore(state)
    tokens = tokens_of(rng, config, 1, 8)
    np.testing.assert_array_equal(stream.step(tokens), other.step(tokens))


class Broken:
    """In place of a session or of a way to make arrays: raises what ONNX Runtime raises if there is no memory."""

    def __init__(self, good, after):
        self.good, self.left = good, after

    def __call__(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("Failed to allocate memory for requested buffer\nof size 4096")
        return self.good(*arguments)


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_no_memory_for_more_slots_changes_nothing(monkeypatch, after):
    """Some of the new buffers are there when it runs out, of the first or of the second layer."""
    config, params = small_model(max_span=300.0, block_size=64)
    for name in params:
        if name.endswith("span.bias"):
            params[name] = np.asarray(9.0, np.float32)
    model, rng = onnx_model(config, params), np.random.default_rng(0)
    stream, other = model.open(1), model.open(1)
    first, second = tokens_of(rng, config, 1, 60), tokens_of(rng, config, 1, 64)
    stream.step(first)
    other.step(first)
    slots, state = stream.slots(), stream.state()
    made = Broken(model.on_device, after)
    with monkeypatch.context() as patch:
        patch.setattr(model, "on_device", made)
        with pytest.raises(
            StreamFailedError, match=r"failed to make \d+ slots in layer \d \(the stream is as it was\): F"
        ):
            stream.step(second)
    assert made.left < 0
    assert not stream.broken
    assert after > 5 or stream.slots() == slots
    for name, array in stream.state().items():
        np.testing.assert_array_equal(array, state[name])
    np.testing.assert_allclose(stream.step(second), other.step(second), rtol=1e-5)


def grown(model, rng):
    """A stream that needs more slots with its next block, and that block."""
    stream = model.open(1)
    stream.step(tokens_of(rng, model.config, 1, 60))
    return stream, tokens_of(rng, model.config, 1, 64)


def long_lived():
    config, params = small_model(max_span=300.0, block_size=64)
    for name in params:
        if name.endswith("span.bias"):
            params[name] = np.asarray(9.0, np.float32)
    return config, params


def test_an_interrupt_while_slots_change_is_not_passed_over(monkeypatch):
    """Some names are bound anew, some are not: nothing but a saved state may be gone on from."""
    model = onnx_model(*long_lived())
    stream, block = grown(model, np.random.default_rng(0))
    state, bound = stream.state(), Buffers._bind

    def interrupted(*arguments):
        bound(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Buffers, "_bind", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.step(block)
    assert stream.broken
    with pytest.raises(StreamFailedError, match="restore a saved state"):
        stream.step(block)
    other = model.open(1)
    for one in (stream, other):
        one.restore(state)
    np.testing.assert_array_equal(stream.step(block), other.step(block))


def test_failures_within_long_blocks_say_how_much_was_read(monkeypatch):
    config, params = small_model()
    model, rng = onnx_model(config, params), np.random.default_rng(0)
    stream, tokens = model.open(1), tokens_of(rng, config, 1, 20)
    make_room, calls = OnnxStream._make_room, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise StreamFailedError(f"no memory {AS_IT_WAS}")
        make_room(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OnnxStream, "_make_room", fails)
        with pytest.raises(StreamFailedError, match=r"no memory \(the stream has read 16 tokens of the block\)"):
            stream.step(tokens)
    other = model.open(1)
    other.step(tokens[:, :16])
    np.testing.assert_array_equal(stream.step(tokens[:, 16:]), other.step(tokens[:, 16:]))

    def none(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("refspan.export.onnx_stream.np.empty", none)
        with pytest.raises(StreamFailedError, match=r"results of a step \(the stream is as it was\): there is no mem"):
            stream.step(tokens)
        patch.setattr("refspan.export.onnx_stream.read_state", none)
        with pytest.raises(StreamFailedError, match="failed to read the state: there is no memory left"):
            stream.load_state("x")
    assert not stream.broken


def test_no_memory_to_open_restore_or_copy(monkeypatch, tmp_path):
    config, params = small_model()
    model, rng = onnx_model(config, params), np.random.default_rng(0)
    stream, other = model.open(1), model.open(1)
    block = tokens_of(rng, config, 1, 8)
    stream.step(block)
    state = stream.state()
    other.step(block)
    with monkeypatch.context() as patch:
        patch.setattr(model, "on_device", Broken(model.on_device, 3))
        for use in (lambda: model.open(1), lambda: stream.restore(state)):
            with pytest.raises(
                StreamFailedError, match=r"failed to make room for the state: Failed to .* of size 4096$"
            ):
                use()
    with monkeypatch.context() as patch:
        patch.setattr("refspan.export.stream_buffers.Buffers.arrays", Broken(None, 0))
        for use in (stream.state, lambda: stream.save_state(tmp_path / "s")):
            with pytest.raises(StreamFailedError, match="failed to copy the state from the device: Failed"):
                use()
    assert not (tmp_path / "s").exists()
    np.testing.assert_array_equal(stream.step(block), other.step(block))


@pytest.mark.parametrize("threads", [0, -1, 1.5, 100_000, "2"])
def test_threads_that_are_refused(threads):
    config, params = small_model()
    with pytest.raises((TypeError, ValueError), match="threads: got"):
        onnx_model(config, params, threads=threads)


def test_the_log_of_onnxruntime_is_silent(capfd):
    """What goes wrong is raised, not printed as well."""
    config, params = small_model()
    stream = onnx_model(config, params).open(1)
    stream._buffers.binding.bind_cpu_input("layers.0.recent_span", np.zeros((1, 1), np.float32))
    with pytest.raises(StreamFailedError):
        stream.step(np.zeros((1, 4), np.int64))
    assert capfd.readouterr().err == ""


def test_memory_of_the_device_in_use(monkeypatch):
    """What the driver says; None where there is none, or where it fails."""
    from refspan.export import session

    class Driver:
        def __init__(self, failing=None):
            self.failing, self.calls = failing, []

        def __getattr__(self, name):
            def call(*arguments):
                self.calls.append(name)
                if name == "cuMemGetInfo_v2":
                    for pointer, value in zip(arguments, (3000, 10_000), strict=True):
                        pointer._obj.value = value
                return int(name == self.failing)

            return call

    driver = Driver()
    monkeypatch.setattr(session.ctypes, "CDLL", lambda _: driver)
    assert session.device_memory_in_use() == 7000
    assert driver.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]
    for name in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2"):
        driver = Driver(name)
        assert session.device_memory_in_use() is None

    def missing(_):
        raise OSError

    monkeypatch.setattr(session.ctypes, "CDLL", missing)
    assert session.device_memory_in_use() is None


@pytest.mark.parametrize(
    ("tokens", "lengths", "error", "message"),
    [
        ([[1]], None, TypeError, "tokens: got list, expected a NumPy array"),
        (np.zeros((2, 3), np.int32), None, TypeError, "tokens: got int32, expected int64"),
        (np.zeros((2, 0), np.int64), None, ValueError, r"tokens: got shape \(2, 0\), expected \(2, M\) with M >= 1"),
        (np.zeros((1, 3), np.int64), None, ValueError, r"tokens: got shape \(1, 3\), expected \(2, M\)"),
        (np.zeros(3, np.int64), None, ValueError, r"tokens: got shape \(3,\)"),
        (np.full((2, 3), 11), None, ValueError, "tokens: got token 11, expected 0 to 10"),
        (np.array([[0, 1], [-1, 3]]), None, ValueError, "tokens: got token -1, expected 0 to 10"),
        (np.zeros((2, 3), np.int64), np.array([1, 4]), ValueError, "lengths: got 4, expected 0 to 3"),
        (np.zeros((2, 3), np.int64), np.array([-1, 3]), ValueError, "lengths: got -1, expected 0 to 3"),
        (np.zeros((2, 3), np.int64), np.array([1.0, 3]), ValueError, r"lengths: got float64 \(2,\), expected int64"),
        (np.zeros((2, 3), np.int64), [3], ValueError, r"lengths: got int64 \(1,\), expected int64 \(2,\)"),
    ],
)
def test_arguments_of_a_step(tokens, lengths, error, message):
    config, params = small_model()
    model = onnx_model(config, params)
    stream, other = model.open(2), model.open(2)
    with pytest.raises(error, match=message):
        stream.step(tokens, lengths)
    good = np.zeros((2, 3), np.int64)
    np.testing.assert_array_equal(stream.step(good), other.step(good))


def test_arguments_of_others(tmp_path):
    config, params = small_model()
    model = onnx_model(config, params)
    with pytest.raises(ValueError, match="batch: got 0"):
        model.open(0)
    with pytest.raises(ValueError, match="max_slots: got 0"):
        model.open(1, max_slots=0)
    with pytest.raises(ValueError, match="row: got 1, expected 0 to 0"):
        model.open(1).reset(1)
    with pytest.raises(refspan.errors.SetupError, match="device: got 'tpu', expected one of cpu, cuda"):
        onnx_model(config, params, device="tpu")
    with pytest.raises(
        refspan.errors.SetupError, match="dtype: got 'float64', expected float16 or float32 in the fused"
    ):
        streaming_model(config, params, dtype="float64")
    with pytest.raises(refspan.errors.SetupError, match="form: got 'flash'"):
        streaming_model(config, params, form="flash")
    with pytest.raises(ValueError, match=r"parameter output.bias: 1e\+06 is too large for float16"):
        streaming_model(config, {**params, "output.bias": params["output.bias"] + np.float32(1e6)}, dtype="float16")
    with pytest.raises(ValueError, match="embedding"):
        streaming_model(replace(config, vocab_size=12), params)
    assert not list(tmp_path.iterdir())


def test_a_model_from_a_file_is_the_same_model(tmp_path):
    config, params = small_model(vocab_size=256)
    made = streaming_model(config, params, form="fused", tokenizer="bytes")
    tokens = tokens_of(np.random.default_rng(0), config, 1, 8)
    expected = OnnxModel.of(made).open(1).step(tokens)
    assert [path.name for path in write_model_file(tmp_path / "one.onnx", made)] == ["one.onnx"]
    written = write_model_file(tmp_path / "two.onnx", made, most_bytes=1000)
    assert [path.name for path in written] == ["two.onnx.data", "two.onnx"]
    for name in ("one.onnx", "two.onnx"):
        model = OnnxModel(tmp_path / name)
        np.testing.assert_array_equal(model.open(1).step(tokens), expected)
        assert model.config == config
        assert model.metadata["tokenizer"] == "bytes"
        assert model.metadata["refspan_version"] == refspan.__version__
