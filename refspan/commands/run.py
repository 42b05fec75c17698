"""`refspan run`: score a file with an exported model."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import inf, log
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from refspan.errors import SetupError
from refspan.files import check_writable, write_whole
from refspan.interrupt import note_interrupts

if TYPE_CHECKING:
    import numpy as np

    from refspan.export import OnnxModel, OnnxStream

PENDING = "next_token"
"""Note in the file of a state: the token that was read last, and that the stream is given first when it goes on."""


@click.command()
@click.argument("model_path", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option(
    "--input", "input_path", required=True, type=click.Path(path_type=Path), help="File; - is standard input."
)
@click.option("--device", metavar="cpu|cuda", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="On the CPU; by default one per core.")
@click.option("--block", type=click.IntRange(min=1), help="Tokens of one step; by default the model's block size.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Read no more.")
@click.option("--state", "state_path", type=click.Path(path_type=Path), help="Go on from a state that was saved.")
@click.option("--save-state", type=click.Path(path_type=Path), help="Save the state in the end, also after Ctrl-C.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the report to FILE.")
def command(
    *,
    model_path: Path,
    input_path: Path,
    device: str,
    threads: int | None,
    block: int | None,
    max_tokens: int | None,
    state_path: Path | None,
    save_state: Path | None,
    json_path: Path | None,
) -> int:
    """Score a text or token file with a model that `refspan export model` wrote.

    If the model's tokens are bytes, any file is read as bytes. Otherwise the file holds token numbers: text with white
    space between them, or a .npy array. Each token is scored by what the model said of it before it was read; the first
    one of a stream is not.
    """
    from refspan.export import OnnxModel
    from refspan.export.tokens import TokenFile

    for path in (save_state, json_path):
        if path is not None:
            check_writable(path)
    with OnnxModel(model_path, device=device, threads=threads) as model:
        tokens = TokenFile(input_path, model.metadata["tokenizer"], model.config.vocab_size)
        run = Run(model)
        if state_path is not None:
            run.load_state(state_path)
        interrupted = False
        try:
            length = block or model.config.block_size
            run.read(tokens.blocks(length), tokens.size(), max_tokens, note_interrupts())
        except KeyboardInterrupt:
            interrupted = True
        except SetupError:
            if save_state is not None and run.scored:
                run.save_state(save_state)  # what was read before the fault is not lost
            raise
        report = run.report()
        if save_state is not None:
            run.save_state(save_state)
    if json_path is not None:
        write_whole(json_path, json.dumps(report, indent=1).encode())
    for line in lines_of(report):
        click.echo(line)
    if interrupted:
        click.echo("interrupted" + (f"; go on with --state {save_state}" if save_state else ""), err=True)
    return 130 if interrupted else 0


class Run:
    """One stream through a model, and what it has made of its tokens."""

    def __init__(self, model: "OnnxModel") -> None:
        self._model = model
        self._stream: OnnxStream = model.open(1)
        self._pending: int | None = None
        """The last token, which the stream has not been given yet: what follows it is scored first."""
        self.scored, self._nats, self._seconds, self._steps = 0, 0.0, 0.0, 0
        layers = model.config.layers
        self._live_sum, self._live_most = [0] * layers, [0] * layers

    def load_state(self, path: Path) -> None:
        """Go on from a state that was saved, and from its last token."""
        from refspan.checkpoint import load_state_notes

        self._stream.load_state(path)
        token = load_state_notes(path).get(PENDING)
        if token is not None:
            if not (token.isdigit() and int(token) < self._model.config.vocab_size):
                raise SetupError(f"{path}: its {PENDING} is {token!r}, expected a token of the model")
            self._pending = int(token)

    def save_state(self, path: Path) -> None:
        """Write the state before the last token, and that token."""
        self._stream.save_state(path, notes={} if self._pending is None else {PENDING: str(self._pending)})

    def read(
        self,
        blocks: "Iterator[np.ndarray[Any, Any]]",
        total: int | None = None,
        most: int | None = None,
        stop: Sequence[Any] = (),
    ) -> None:
        """Score all blocks, or as many tokens as `most`; with a bar on a terminal.

        Raises KeyboardInterrupt before the next block once `stop` is no longer empty.
        """
        from tqdm import tqdm

        if most is not None:
            total = most if total is None else min(total, most)
        left = inf if most is None else most
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=total, disable=None, leave=False, unit="token", unit_scale=True, dynamic_ncols=True) as bar:
            for block in blocks:
                if stop:
                    raise KeyboardInterrupt
                given = block[: int(min(left, len(block)))]
                self._step(given)
                left -= len(given)
                bar.update(len(given))
                if not bar.disable and self.scored:
                    live = " ".join(map(str, self._stream.memory_size()))
                    bar.set_postfix_str(f"{self._bits():.3f} bits, live {live}", refresh=False)
                if left == 0:
                    return

    def give(self, token: int) -> None:
        """Let this be the token that follows; it is not scored."""
        self._pending = token

    def next_log_probs(self) -> "np.ndarray[Any, Any]":
        """Log-probabilities of what follows the last token.   [V]."""
        import numpy as np

        if self._pending is None:
            raise SetupError("nothing to continue: give a --prompt, or a --state that refspan run saved")
        log_probs: np.ndarray[Any, Any] = self._stream.step(np.array([[self._pending]]))[0, 0]
        self._pending = None
        return log_probs

    def _step(self, tokens: "np.ndarray[Any, Any]") -> None:
        import numpy as np

        first = [] if self._pending is None else [self._pending]
        fed = np.concatenate([np.array(first, np.int64), tokens])
        self._pending = int(fed[-1])
        if len(fed) == 1:
            return
        start = perf_counter()
        log_probs = self._stream.step(fed[None, :-1])[0]  # [m, V]
        self._seconds += perf_counter() - start
        self._nats -= float(np.sum(log_probs[np.arange(len(fed) - 1), fed[1:]], dtype=np.float64))
        self.scored += len(fed) - 1
        self._steps += 1
        live = self._stream.memory_size()
        self._live_sum = [total + n for total, n in zip(self._live_sum, live, strict=True)]
        self._live_most = [max(most, n) for most, n in zip(self._live_most, live, strict=True)]

    def _bits(self) -> float:
        return self._nats / self.scored / log(2)

    def report(self) -> dict[str, Any]:
        """What there is to say, by name; None for what is not known."""
        config, bits = self._model.config, self._bits() if self.scored else None
        return {
            "tokens": self.scored,
            "bits_per_token": bits,
            "bits_per_byte": bits if self._model.metadata["tokenizer"] == "bytes" else None,
            "perplexity": 2**bits if bits is not None and bits < 1000 else None,
            "tokens_per_second": self.scored / self._seconds if self._seconds else None,
            "live_memories_mean": [total / max(1, self._steps) for total in self._live_sum],
            "live_memories_most": self._live_most,
            "longest_life": config.max_span + config.ramp,
            "slots": list(self._stream.slots()),
            "state_bytes": self._stream.state_bytes(),
            "peak_memory_bytes": peak_memory(),
            "device": self._model.device,
        }


def peak_memory() -> int | None:
    """The most that this process has held, in bytes; None where that cannot be asked."""
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"tokens scored    {report['tokens']:,}"]
    if report["tokens"]:
        name = "bits per byte" if report["bits_per_byte"] is not None else "bits per token"
        lines.append(f"{name:<17}{report['bits_per_token']:.3f}")
        lines.append(f"tokens/s         {report['tokens_per_second']:,.0f}")
    memories = zip(report["live_memories_mean"], report["live_memories_most"], report["slots"], strict=True)
    for i, (mean, most, slots) in enumerate(memories):
        about = f"of at most {report['longest_life']:g}; {slots} slots" if i == 0 else f"{slots} slots"
        lines.append(f"layer {i:<10} {mean:.0f} live memories on average, {most} at most, {about}")
    peak = report["peak_memory_bytes"]
    held = f", {peak / 2**20:.0f} MiB of the process at its peak" if peak else ""
    return [*lines, f"memory           {report['state_bytes'] / 2**20:.1f} MiB of state on {report['device']}{held}"]
