"""One attention step against its bare matrix products, and against itself with most memories expired.

    python -m pytest benchmarks/test_attention.py

B=1, H=8, D=64, M=512, float32. No test here asserts a time: see the table at the end.
"""

import subprocess
import sys

import numpy as np
import pytest

import refspan
from refspan.export import AttentionRunner

HEADS, QUERIES, HEAD_SIZE, RAMP = 8, 512, 64, 128.0
MEMORIES = [1024, 4096, 16384]


def step(memories, *, alive=1.0):
    """Arguments with a share of memories alive for the whole block, and the upstream gradient."""
    rng = np.random.default_rng(0)
    query, grad_out = (rng.standard_normal((1, HEADS, QUERIES, HEAD_SIZE), dtype=np.float32) for _ in range(2))
    key, value = (rng.standard_normal((1, HEADS, memories, HEAD_SIZE), dtype=np.float32) for _ in range(2))
    age = np.arange(memories, 0, -1, dtype=np.int64)[None] + int(RAMP)
    span = np.full((1, memories), 1e6, np.float32)
    span[0, rng.permutation(memories)[int(alive * memories) :]] = 0
    return (query, key, value, span, age), grad_out


def forward_products(query, key, value):
    return (query @ np.swapaxes(key, -1, -2)) @ value


def all_products(query, key, value, grad_out):
    """The two of forward, and the four that a backward with kept weights needs."""
    weights = query @ np.swapaxes(key, -1, -2)
    out = weights @ value
    grad_value = np.swapaxes(weights, -1, -2) @ grad_out
    grad_weights = grad_out @ np.swapaxes(value, -1, -2)
    return out, grad_value, grad_weights @ key, np.swapaxes(grad_weights, -1, -2) @ query


@pytest.mark.parametrize("memories", MEMORIES)
def test_reference_forward(side_by_side, memories):
    arguments, _ = step(memories)
    query, key, value, *_ = arguments
    side_by_side(
        lambda: refspan.span_attention(*arguments, ramp=RAMP), lambda: forward_products(query, key, value), target=1.6
    )


@pytest.mark.parametrize("memories", MEMORIES)
def test_reference_forward_and_backward(side_by_side, memories):
    arguments, grad_out = step(memories)
    query, key, value, *_ = arguments

    def both():
        _, saved = refspan.span_attention(*arguments, ramp=RAMP)
        refspan.span_attention_backward(grad_out, saved)

    side_by_side(both, lambda: all_products(query, key, value, grad_out), target=1.6)


@pytest.mark.parametrize("form", ["fused", "portable"])
@pytest.mark.parametrize("memories", MEMORIES)
def test_onnxruntime_forward(side_by_side, memories, form):
    arguments, _ = step(memories)
    query, key, value, *_ = arguments
    runner = AttentionRunner(form=form)
    side_by_side(
        lambda: runner.span_attention(*arguments, ramp=RAMP), lambda: forward_products(query, key, value), target=1.3
    )


@pytest.mark.parametrize("backend", ["reference", "fused", "portable"])
def test_nine_in_ten_expired(side_by_side, backend):
    full, _ = step(16384)
    few, _ = step(16384, alive=0.1)
    attend = refspan.span_attention if backend == "reference" else AttentionRunner(form=backend).span_attention
    side_by_side(lambda: attend(*few, ramp=RAMP), lambda: attend(*full, ramp=RAMP), target=0.2)


FORWARD_ALONE = """
import sys
import numpy as np
sys.path.insert(0, {folder!r})
from test_attention import RAMP, step
import refspan
from refspan.export import AttentionRunner
arguments, _ = step(65536)
attend = refspan.span_attention if {backend!r} == "reference" else AttentionRunner(form={backend!r}).span_attention
attend(*arguments, ramp=RAMP)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)
"""


@pytest.mark.parametrize("backend", ["reference", "fused", "portable"])
def test_peak_memory_of_a_forward_with_65536_memories(record_memory, backend):
    """Of the whole process: Python, its libraries, arguments (256 MiB of keys and values) and results."""
    code = FORWARD_ALONE.format(folder=str(__file__).rpartition("/")[0], backend=backend)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    record_memory(float(ran.stdout), 600)
