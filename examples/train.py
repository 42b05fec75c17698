"""Train a small byte-level model on this project's own texts, with nothing but NumPy.

    python examples/train.py OUT.safetensors

The text is the documentation and the sources of the checkout, one file after the other. Some are held out; what the
model makes of them is printed at the end, with the memories that each layer keeps meanwhile. Ctrl-C ends the training,
not the program: what has been learnt so far is saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np

import refspan
from refspan.errors import SetupError
from refspan.files import check_writable

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("*.md", "docs/*.md", "refspan/**/*.py", "export/*.py", "export/*.onnxtxt", "conformance/**/*.py", "tests/*.py")
HELD_OUT = ("docs/onnx.md", "refspan/attention.py", "refspan/memory.py", "tests/test_memory.py")

BATCH, BLOCK = 8, 128
CONFIG = refspan.ModelConfig(
    vocab_size=256,
    hidden_size=128,
    feedforward_size=512,
    layers=4,
    heads=4,
    head_size=32,
    block_size=BLOCK,
    max_span=1024.0,
    ramp=64.0,
    norm="pre",
)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Settings:
    """How to train."""

    minutes: float
    learning_rate: float
    span_loss: float
    span_start: float
    seed: int


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--minutes", default=18.0, show_default=True, help="How long to train.")
@click.option("--learning-rate", default=1.5e-3, show_default=True, help="At first; it falls to a twentieth.")
@click.option("--span-loss", default=2e-6, show_default=True, help="Weight of the span loss: more forgets more.")
@click.option("--span-start", default=0.3, show_default=True, help="Part of max_span that every span begins with.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, **options: Any) -> None:
    """Train a model and write it to the file OUT."""
    check_writable(out)
    settings = Settings(**options)
    text, held_out = read_texts()
    click.echo(f"{len(text):,} bytes to learn from, {len(held_out):,} held out")
    params = refspan.initial_parameters(CONFIG, settings.seed, positions=BLOCK, span_start=settings.span_start)
    start, steps = perf_counter(), 0
    try:
        for trained in train(params, text, settings):
            params, steps = trained, steps + 1
    except KeyboardInterrupt:
        click.echo("stopped; saving what there is")
    minutes = (perf_counter() - start) / 60
    bits, live = score(params, held_out)
    how = f"{steps} steps of {BATCH} x {BLOCK} bytes in {minutes:.0f} minutes, span loss {settings.span_loss:g}"
    notes = {
        "tokenizer": "bytes",
        "text": "documentation and sources of refspan, MIT licence",
        "trained": how,
        "held_out": f"{bits:.2f} bits per byte",
    }
    refspan.save_model(out, CONFIG, params, notes=notes)
    click.echo(f"{out}: {how}; {notes['held_out']} on held-out files")
    kept = ", ".join(f"{n:.0f}" for n in live)
    click.echo(f"memories kept by each layer, on average: {kept}; at most {CONFIG.max_span + CONFIG.ramp:g}")


def read_texts() -> tuple[Array, Array]:
    """The bytes to learn from, and those held out."""
    files = sorted({path for pattern in TEXTS for path in ROOT.glob(pattern)})
    if not files:
        raise click.ClickException(f"{ROOT}: no texts to learn from; run this in a checkout of refspan")
    held_out = [ROOT / name for name in HELD_OUT]
    parts = [[path.read_bytes() for path in files if (path in held_out) == wanted] for wanted in (False, True)]
    learnt, kept = (np.frombuffer(b"\n".join(part), np.uint8).astype(np.int64) for part in parts)
    return learnt, kept


def train(params: dict[str, Array], text: Array, settings: Settings) -> Iterator[dict[str, Array]]:
    """The parameters after each step, until the time is over.

    Rows read the text from different places on, with what they remember going from block to block. Once together they
    have read all of it they begin again elsewhere, empty.
    """
    adam = refspan.Adam(settings.learning_rate, warmup_steps=200, max_grad_norm=0.3)
    rng, start = np.random.default_rng(settings.seed), perf_counter()
    length = (len(text) - 1) // BATCH // BLOCK * BLOCK
    bits: list[float] = []
    while True:
        memory = None
        places = np.arange(BATCH)[:, None] * length + np.arange(BLOCK + 1) + rng.integers(len(text))  # [B, M + 1]
        for offset in range(0, length, BLOCK):
            done = (perf_counter() - start) / (60 * settings.minutes)
            if done >= 1:
                return
            adam.learning_rate = settings.learning_rate * (1 - 0.95 * done)
            block = text[(places + offset) % len(text)]
            losses, grads, memory = refspan.loss_and_gradients(
                CONFIG,
                params,
                block[:, :-1],
                block[:, 1:],
                memory,
                span_loss_weight=settings.span_loss,
                span_limit=CONFIG.max_span * rng.uniform(),
            )
            params = adam.step(params, grads)
            yield params
            bits.append(float(losses.task) / log(2))
            if len(bits) % 200 == 0:
                held = ", ".join(str(one.slots) for one in memory)
                mean = np.mean(bits[-200:])
                click.echo(f"{done:4.0%}  step {len(bits)}: {mean:.3f} bits per byte, layers remember {held}")


def score(params: dict[str, Array], text: Array) -> tuple[float, Array]:
    """Bits per byte of a text read as one stream, and how many memories each layer held on average."""
    stream, bits, held = refspan.open_model(CONFIG, params, batch=1), 0.0, []
    for place in range(0, len(text) - 1, BLOCK):
        tokens = text[None, place : min(place + BLOCK, len(text) - 1)]
        following = text[place + 1 : place + 1 + tokens.shape[1]]
        bits -= float(np.sum(stream.step(tokens)[0, np.arange(len(following)), following])) / log(2)
        held.append(stream.memory_size())
    return bits / (len(text) - 1), np.mean(held, axis=0)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        raise SystemExit(f"train.py: {error}") from None
