"""Whole models against the same models in eager PyTorch (`eager.py`), and against themselves with a longer span.

    python -m pytest benchmarks/test_model.py

float32, two threads each; on a machine with more cores run it under `taskset -c 0,1`, so that NumPy takes two as well.
Both sides read the same tokens, block after block, from a memory that no longer grows: about as many memories die in
each block as are born. No test here asserts a time: see the table at the end.

Run this file by itself: in a process that has freed large arrays before, malloc has memory at hand for the dense arrays
of the peer, which in a fresh process cost it a page fault for every 4 KiB, every block.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import refspan
from refspan.model import model, start_memory

THREADS, BLOCK, RAMP, SPREAD = 2, 256, 128.0, 1.5
CLIP, ALPHA = 0.3, 1e-6
STILL = 1e-7
"""Learning rate: the work of an update, and spans that stay where they are."""

TRAINED = refspan.ModelConfig(
    vocab_size=256,
    hidden_size=256,
    feedforward_size=1024,
    layers=2,
    heads=4,
    head_size=64,
    block_size=BLOCK,
    max_span=8192.0,
    ramp=RAMP,
)
STREAMED = replace(TRAINED, hidden_size=512, feedforward_size=2048, layers=1, heads=8)
TRAINED_LIVE, BATCH = 1000, 4
STREAMED_TARGETS = {1000: 0.5, 4000: 0.33, 16000: 0.25}


def parameters(config, live):
    """Parameters with spans from a few steps to thousands, of which about `live` memories are live at a time.

    As many as mean span + R. A span is L sigmoid(z); z is spread by `SPREAD` around a bias found by bisection. Token
    embeddings have the length of normalised vectors, so that this holds for the first layer as for the others.
    """
    rng = np.random.default_rng(0)
    params = refspan.initial_parameters(config, seed=0)
    table = params["embedding.weight"] * np.float32(config.hidden_size**0.5)
    params["embedding.weight"] = table
    for i in range(config.layers):
        weight = rng.standard_normal(config.hidden_size, dtype=np.float32)
        weight *= SPREAD / np.linalg.norm(weight)
        low, high = -20.0, 20.0
        for _ in range(50):
            bias = (low + high) / 2
            more = np.mean(spans(config, table, weight, bias)) + config.ramp < live
            low, high = (bias, high) if more else (low, bias)
        params |= {f"layers.{i}.span.weight": weight, f"layers.{i}.span.bias": np.asarray(bias, np.float32)}
    return params


def spans(config, hidden, weight, bias):
    return config.max_span / (1 + np.exp(-(hidden @ weight + bias)))


class Blocks:
    """Random tokens without end, a block at a time, with the tokens that follow each."""

    def __init__(self, batch):
        self._rng = np.random.default_rng(1)
        self._batch, self._last = batch, None

    def __iter__(self):
        return self

    def __next__(self):
        new = self._rng.integers(0, TRAINED.vocab_size, (self._batch, BLOCK))
        first = new[:, :1] if self._last is None else self._last
        self._last = new[:, -1:]
        block = np.concatenate([first, new], axis=1)
        return block[:, :-1], block[:, 1:]


# streaming


def steady_stream(config, live):
    """A stream of a single row that has been running for ever, what it holds, and its parameters.

    One layer is given token embeddings and nothing else, so what it would remember can be written down: the tokens of
    the last L + R steps, but for those that have expired. The newest block is left whole, as the peer wants it.
    """
    params = parameters(config, live)
    rng = np.random.default_rng(2)
    age = np.arange(int(config.max_span + config.ramp), 0, -1)
    hidden = params["embedding.weight"][rng.integers(0, config.vocab_size, age.shape)]
    span = spans(config, hidden, params["layers.0.span.weight"], params["layers.0.span.bias"])
    wanted = (age - span < config.ramp) | (age <= BLOCK)
    hidden, age = hidden[wanted][None], age[wanted][None]
    return refspan.open_model(config, params, batch=1, memory=[(hidden, age)]), (hidden, age), params


LEAN = pytest.mark.parametrize("lean", [False, True], ids=["original", "lean"])
"""The style of the peer, see `EagerTransformer`. The targets are meant for the original's."""


@LEAN
@pytest.mark.parametrize("live", STREAMED_TARGETS)
def test_streaming_step(side_by_side, live, lean):
    torch = pytest.importorskip("torch")
    from eager import EagerTransformer, Held

    torch.set_num_threads(THREADS)
    config = replace(STREAMED, max_span=4.0 * live)
    stream, memory, params = steady_stream(config, live)
    peer = EagerTransformer(config, params, lean=lean)
    held = [Held(*(torch.from_numpy(x) for x in memory))]
    our_blocks, their_blocks = Blocks(1), Blocks(1)

    def ours():
        return stream.step(next(our_blocks)[0])

    def theirs():
        with torch.inference_mode():
            log_probs, _, held[:] = peer(torch.from_numpy(next(their_blocks)[0]), held)
        return log_probs

    agree(ours(), theirs().numpy())
    side_by_side(
        ours,
        theirs,
        STREAMED_TARGETS[live],
        note=lambda: f"{list(stream.memory_size())} held, torch {[one.age.shape[1] for one in held]}",
    )


def test_cost_follows_live_memories(side_by_side):
    """As many live memories, the longest span 16 times as long."""
    streams = [steady_stream(replace(STREAMED, max_span=longest), 2000)[0] for longest in (65536.0, 4096.0)]
    blocks = [Blocks(1) for _ in streams]

    def step(i):
        return streams[i].step(next(blocks[i])[0])

    side_by_side(
        lambda: step(0), lambda: step(1), 1.1, note=lambda: "{} held, baseline {}".format(*map(held_by, streams))
    )


def held_by(stream):
    return list(stream.memory_size())


# training


class OurTrainer:
    """refspan, training."""

    def __init__(self, config, params):
        self.config, self.params = config, params
        self.adam = refspan.Adam(STILL, warmup_steps=1, max_grad_norm=CLIP)
        self.memory = start_memory(config, params, BATCH)
        self.blocks = Blocks(BATCH)

    def warm_up(self):
        """Read until the first memories have expired whatever their span; forward is enough."""
        for _ in range(blocks_until_steady(self.config)):
            tokens, _ = next(self.blocks)
            _, self.memory, _ = model(self.config, self.params, tokens, self.memory)

    def step(self):
        losses, grads, self.memory = refspan.loss_and_gradients(
            self.config, self.params, *next(self.blocks), self.memory, span_loss_weight=ALPHA
        )
        self.params = self.adam.step(self.params, grads)
        return losses, grads

    def held(self):
        return [memory.slots for memory in self.memory]


class TheirTrainer:
    """The same in PyTorch."""

    def __init__(self, config, params, *, lean=False):
        import torch
        from eager import EagerTransformer

        torch.set_num_threads(THREADS)
        self.torch, self.config = torch, config
        self.model = EagerTransformer(config, params, lean=lean)
        self.adam = torch.optim.Adam(self.model.parameters(), STILL)
        self.memory = self.model.start(BATCH)
        self.blocks = Blocks(BATCH)

    def warm_up(self):
        with self.torch.no_grad():
            for _ in range(blocks_until_steady(self.config)):
                tokens, _ = next(self.blocks)
                _, _, self.memory = self.model(self.torch.from_numpy(tokens), self.memory)

    def step(self):
        tokens, targets = (self.torch.from_numpy(x) for x in next(self.blocks))
        self.adam.zero_grad()
        losses, self.memory = self.model.losses(tokens, targets, self.memory, ALPHA)
        (losses.task + losses.span).backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.adam.step()
        return losses

    def grads(self):
        return {name: p.grad.numpy() for name, p in self.model.named_parameters()}

    def held(self):
        return [memory.age.shape[1] for memory in self.memory]


TRAINERS = {"refspan": OurTrainer, "torch": TheirTrainer}


def blocks_until_steady(config):
    return int(config.max_span + config.ramp) // BLOCK + 2


@LEAN
def test_training_step(side_by_side, lean):
    pytest.importorskip("torch")
    params = parameters(TRAINED, TRAINED_LIVE)
    ours, theirs = OurTrainer(TRAINED, params), TheirTrainer(TRAINED, params, lean=lean)
    ours.warm_up()
    theirs.warm_up()
    (our_losses, our_grads), their_losses = ours.step(), theirs.step()
    agree(our_losses.task, their_losses.task.item())
    agree(our_losses.span, their_losses.span.item())
    their_grads = theirs.grads()
    norm = np.sqrt(sum(np.sum(np.square(grad)) for grad in our_grads.values()))
    for name, grad in clipped(our_grads, norm).items():
        agree(grad, their_grads[name])
    side_by_side(ours.step, theirs.step, 0.667, note=lambda: f"{ours.held()} held, torch {theirs.held()}")


def clipped(grads, norm):
    """What PyTorch leaves in its gradients after an update."""
    return {name: grad * min(1.0, CLIP / (norm + 1e-6)) for name, grad in grads.items()}


def peak_of_training(side, steps=6):
    """MiB that this process held before it had a model, and at most."""
    if side == "torch":
        import torch  # noqa: F401
    before = process_memory("VmRSS")
    trainer = TRAINERS[side](TRAINED, parameters(TRAINED, TRAINED_LIVE))
    trainer.warm_up()
    for _ in range(steps):
        trainer.step()
    return before, process_memory("VmHWM")


def process_memory(field):
    """MiB of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


ALONE = """
import json, sys
sys.path.insert(0, {folder!r})
import test_model
print(json.dumps(test_model.peak_of_training({side!r})))
"""


def test_peak_memory_of_training(record_memory):
    """Of a whole process each; then without what Python and the libraries take before there is a model."""
    pytest.importorskip("torch")
    measured = {}
    for side in TRAINERS:
        code = ALONE.format(folder=str(Path(__file__).parent), side=side)
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        measured[side] = json.loads(ran.stdout)
    (our_start, ours), (their_start, theirs) = measured["refspan"], measured["torch"]
    record_memory(ours, theirs)
    record_memory(ours - our_start, theirs - their_start)


def agree(ours, theirs):
    """Within 1/1000 of the largest number: the same function, in float32."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.max(np.abs(ours - theirs), initial=0) <= 1e-3 * np.max(np.abs(theirs), initial=1e-30)
