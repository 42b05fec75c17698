"""Streaming on ONNX Runtime against the same model in eager PyTorch, against dense attention, and against itself.

    python -m pytest benchmarks/test_onnx_model.py

As `test_model.py`, of which it takes model, tokens and steady state: one layer, float32, two threads each.
"""

import time
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
from dense import DenseStream
from test_model import BLOCK, STREAMED, Blocks, agree, process_memory, steady_stream

from refspan.export import OnnxModel, streaming_model, write_model_file

THREADS = 2
TARGETS = {1000: 1 / 4, 4000: 1 / 6, 16000: 1 / 10}
SINGLE_TARGET = 1 / 3


@pytest.fixture
def onnx_stream(tmp_path):
    """Call for a stream on ONNX Runtime that goes on from where a stream of the reference is."""

    def make(stream, form):
        path = tmp_path / "model.onnx"
        write_model_file(path, streaming_model(stream.config, stream.params, form=form))
        opened = OnnxModel(path, threads=THREADS).open(1)
        opened.restore(stream.state())
        return opened

    return make


def torch_peer(config, params, memory):
    """Tokens [1, M] -> log-probabilities in PyTorch, from the same state."""
    torch = pytest.importorskip("torch")
    from eager import EagerTransformer, Held

    torch.set_num_threads(THREADS)
    peer = EagerTransformer(config, params)
    held = [Held(*(torch.from_numpy(x) for x in memory))]

    def step(tokens):
        with torch.inference_mode():
            log_probs, _, held[:] = peer(torch.from_numpy(tokens), held)
        return log_probs.numpy()

    return step, held


@pytest.mark.parametrize("form", ["fused", "portable"])
@pytest.mark.parametrize("live", TARGETS)
def test_block_step(side_by_side, onnx_stream, live, form):
    stream, memory, params = steady_stream(replace(STREAMED, max_span=4.0 * live), live)
    ours, (theirs, held) = onnx_stream(stream, form), torch_peer(stream.config, params, memory)
    our_blocks, their_blocks = Blocks(1), Blocks(1)
    agree(ours.step(next(our_blocks)[0]), theirs(next(their_blocks)[0]))
    side_by_side(
        lambda: ours.step(next(our_blocks)[0]),
        lambda: theirs(next(their_blocks)[0]),
        TARGETS[live],
        note=lambda: f"{ours.memory_size()} held, {ours.slots()} slots, torch {[one.age.shape[1] for one in held]}",
    )


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_single_token(side_by_side, onnx_stream, form):
    stream, memory, params = steady_stream(replace(STREAMED, max_span=4000.0), 1000)
    ours, (theirs, _) = onnx_stream(stream, form), torch_peer(stream.config, params, memory)
    token = np.zeros((1, 1), np.int64)
    agree(ours.step(token), theirs(token))
    side_by_side(lambda: ours.step(token), lambda: theirs(token), SINGLE_TARGET, turns=20)


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_overhead_of_a_single_token(record, onnx_stream, form):
    """What the step of one token takes beside ONNX Runtime's call, as a part of the whole."""
    stream, _, _ = steady_stream(replace(STREAMED, max_span=4000.0), 1000)
    ours, token, inside = onnx_stream(stream, form), np.zeros((1, 1), np.int64), []
    session, run = ours._model.session, ours._model.session.run_with_iobinding

    def timed(binding):
        start = time.perf_counter()
        run(binding)
        inside.append(time.perf_counter() - start)

    session.run_with_iobinding = timed
    whole = []
    for _ in range(500):
        start = time.perf_counter()
        ours.step(token)
        whole.append(time.perf_counter() - start)
    record(median(whole) * 1e3, f"{1 - median(inside) / median(whole):.0%}", "<= 10%")


def test_against_dense_attention(side_by_side, record, onnx_stream):
    """L=16384 of which 6% live, against all of the window; see `dense.py`."""
    stream, _, params = steady_stream(replace(STREAMED, max_span=16384.0), 983)
    ours, theirs = onnx_stream(stream, "portable"), DenseStream(stream.config, params, 16384, BLOCK, THREADS)
    our_blocks, their_blocks = Blocks(1), Blocks(1)
    side_by_side(
        lambda: ours.step(next(our_blocks)[0]),
        lambda: theirs.step(next(their_blocks)[0]),
        1 / 5,
        note=lambda: f"{ours.memory_size()} held",
    )
    record(float("nan"), f"{ours.state_bytes() / theirs.state_bytes():.3f}", "<= 0.125 of the bytes of state")


def test_cost_follows_live_memories(side_by_side, onnx_stream):
    streams = [
        onnx_stream(steady_stream(replace(STREAMED, max_span=longest), 2000)[0], "portable")
        for longest in (65536.0, 4096.0)
    ]
    blocks = [Blocks(1) for _ in streams]

    def step(i):
        return streams[i].step(next(blocks[i])[0])

    side_by_side(lambda: step(0), lambda: step(1), 1.1, note=lambda: f"{[one.memory_size() for one in streams]} held")


def test_a_million_tokens(record, onnx_stream):
    """Time per block and memory of the process, flat: the last tenth against the second."""
    stream, _, _ = steady_stream(replace(STREAMED, max_span=4000.0), 1000)
    ours, blocks, seconds, memory = onnx_stream(stream, "portable"), Blocks(1), [], []
    count = 10**6 // BLOCK
    for _ in range(count):
        tokens = next(blocks)[0]
        start = time.perf_counter()
        ours.step(tokens)
        seconds.append(time.perf_counter() - start)
        memory.append(process_memory("VmRSS"))
    tenth = count // 10
    late, early = median(seconds[-tenth:]), median(seconds[tenth : 2 * tenth])
    record(late * 1e3, f"{late / early:.2f}", f"~ 1; {count} blocks, {ours.memory_size()} held, {ours.slots()} slots")
    grown = memory[-1] - memory[tenth]
    record(float("nan"), f"{grown:+.1f} MiB", f"~ 0; {memory[-1]:.0f} MiB in the end")
