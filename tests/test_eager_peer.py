"""The PyTorch model of the benchmarks computes the same: what is compared for speed must agree first."""

import sys
from pathlib import Path

import numpy as np
import pytest

import refspan

torch = pytest.importorskip("torch")

BLOCKS, BATCH = 6, 3
SHAPES = {
    "narrow": {"heads": 2, "head_size": 6, "layers": 2, "block_size": 5, "max_span": 24.0, "ramp": 3.0},
    "deep": {"heads": 3, "head_size": 4, "layers": 3, "block_size": 4, "max_span": 11.0, "ramp": 6.5},
    "one token": {"heads": 1, "head_size": 8, "layers": 1, "block_size": 1, "max_span": 5.0, "ramp": 1.0},
    "cool": {"heads": 2, "head_size": 5, "layers": 2, "block_size": 4, "max_span": 40.0, "span_temperature": 3.0},
}


@pytest.fixture(scope="module")
def eager():
    """The module benchmarks/eager.py; the folder is no package."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    try:
        import eager
    finally:
        sys.path.pop()
    return eager


@pytest.fixture(params=[(shape, norm) for shape in SHAPES for norm in ("post", "pre")], ids="-".join)
def random_model(request):
    """A config, parameters in which nothing is left at 0, and tokens of a few blocks."""
    shape, norm = request.param
    sizes = {"vocab_size": 11, "hidden_size": 12, "feedforward_size": 14, "ramp": 2.0}
    config = refspan.ModelConfig(**sizes | SHAPES[shape], norm=norm)
    rng = np.random.default_rng(len(shape))
    places = config.block_size if norm == "post" else config.block_size // 2  # 0 for blocks of one token
    start = refspan.initial_parameters(config, 0, positions=places, dtype="float64")
    params = {name: np.asarray(x + 0.2 * rng.standard_normal(x.shape)) for name, x in start.items()}
    for name in params:
        if name.endswith("span.weight"):
            params[name] *= 3  # spans of all lengths
    tokens = rng.integers(0, config.vocab_size, (BATCH, BLOCKS * config.block_size + 1))
    return config, params, tokens


def blocks_of(config, tokens):
    """(tokens, targets) of each block."""
    size = config.block_size
    return [(tokens[:, i : i + size], tokens[:, i + 1 : i + 1 + size]) for i in range(0, BLOCKS * size, size)]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_losses_and_gradients(eager, random_model, weight, lean):
    config, params, tokens = random_model
    peer = eager.EagerTransformer(config, params, lean=lean)
    memory = held = None
    for block, following in blocks_of(config, tokens):
        losses, grads, memory = refspan.loss_and_gradients(
            config, params, block, following, memory, span_loss_weight=weight
        )
        peer.zero_grad()
        expected, held = peer.losses(torch.tensor(block), torch.tensor(following), held, weight)
        (expected.task + expected.span).backward()
        assert expected.task.item() == pytest.approx(losses.task, rel=1e-9)
        assert expected.span.item() == pytest.approx(losses.span, rel=1e-9)
        named = dict(peer.named_parameters())
        assert set(named) == set(grads)
        for name, grad in grads.items():
            theirs = named[name].grad if grad.size else torch.zeros(grad.shape)  # autograd leaves out an empty table
            np.testing.assert_allclose(theirs.numpy(), grad, rtol=1e-7, atol=1e-9, err_msg=name)
    assert any(layer.age.shape[1] < tokens.shape[1] - 1 for layer in held), "nothing was ever dropped"


@pytest.mark.parametrize("lean", [False, True])
def test_stream(eager, random_model, lean):
    config, params, tokens = random_model
    peer = eager.EagerTransformer(config, params, lean=lean)
    stream = refspan.open_model(config, params, batch=BATCH)
    held = None
    with torch.inference_mode():
        for block, _ in blocks_of(config, tokens):
            theirs, _, held = peer(torch.tensor(block), held)
            np.testing.assert_allclose(theirs.numpy(), stream.step(block), rtol=1e-9, atol=1e-10)
            assert all(ours <= layer.age.shape[1] for ours, layer in zip(stream.memory_size(), held, strict=True)), (
                "the peer dropped what refspan still sees"
            )


def test_float32_stays_float32(eager, random_model):
    config, params, tokens = random_model
    single = {name: x.astype(np.float32) for name, x in params.items()}
    peer = eager.EagerTransformer(config, single)
    block, _ = blocks_of(config, tokens)[0]
    theirs, _, held = peer(torch.tensor(block))
    ours = refspan.open_model(config, single, batch=BATCH).step(block)
    assert theirs.dtype == held[0].hidden.dtype == torch.float32
    np.testing.assert_allclose(theirs.detach().numpy(), ours, rtol=1e-4, atol=1e-5)


def test_more_places_than_a_block_are_refused(eager, random_model):
    config, params, _ = random_model
    table = np.zeros((config.block_size + 1, config.head_size))
    with pytest.raises(ValueError, match=r"position.weight: got \d+ rows"):
        eager.EagerTransformer(config, params | {"position.weight": table})
