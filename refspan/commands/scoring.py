"""A stream through an exported model that scores what it reads, and what there is to report of it."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from math import inf, log
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from refspan.errors import RunFailedError, SetupError
from refspan.interrupt import Interrupts

if TYPE_CHECKING:
    import numpy as np

    from refspan.export import OnnxModel, OnnxStream

PENDING = "next_token"
"""Note in the file of a state: the token that was read last, and that the stream is given first when it goes on."""


class Run:
    """One stream through a model, and what it has made of its tokens."""

    def __init__(self, model: "OnnxModel", position: int = 0) -> None:
        self._model = model
        self._stream: OnnxStream = model.open(1)
        self._pending: int | None = None
        """The last token, which the stream has not been given yet: what follows it is scored first."""
        self.position = position
        """Tokens of the input that were read, or left out."""
        self.whole = True
        """Whether the state is that after the token before `position`."""
        self.scored, self._nats, self._seconds, self._steps = 0, 0.0, 0.0, 0
        layers = model.config.layers
        self._live_sum, self._live_most = [0] * layers, [0] * layers

    def load_state(self, path: Path) -> None:
        """Go on from a state that was saved, and from its last token."""
        from refspan.checkpoint import load_state_notes

        self._stream.load_state(path)
        token = load_state_notes(path).get(PENDING)
        if token is not None:
            if not re.fullmatch("[0-9]{1,18}", token) or int(token) >= self._model.config.vocab_size:
                raise SetupError(f"{path}: its {PENDING} is {token[:40]!r}, expected a token of the model")
            self._pending = int(token)

    def save_state(self, path: Path) -> None:
        """Write the state before the last token, and that token."""
        self._stream.save_state(path, notes={} if self._pending is None else {PENDING: str(self._pending)})

    def read(
        self,
        blocks: "Iterator[np.ndarray[Any, Any]]",
        total: int | None = None,
        most: int | None = None,
        stop: "Interrupts | None" = None,
    ) -> None:
        """Score all blocks, or as many tokens as `most`; with a bar on a terminal.

        Raises KeyboardInterrupt before the next block once `stop` is true, or while it waits for one.
        """
        from tqdm import tqdm

        if most is not None:
            total = most if total is None else min(total, most)
        left = inf if most is None else most
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=total, disable=None, leave=False, unit="token", unit_scale=True, dynamic_ncols=True) as bar:
            while left > 0:
                with stop.waiting() if stop is not None else nullcontext():
                    block = next(blocks, None)
                if block is None:
                    return
                given = block[: int(min(left, len(block)))]
                self._step(given)
                left -= len(given)
                bar.update(len(given))
                if not bar.disable and self.scored:
                    live = " ".join(map(str, self._stream.memory_size()))
                    bar.set_postfix_str(f"{self._bits():.3f} bits, live {live}", refresh=False)

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
        if np.any(np.isnan(log_probs)):
            raise RunFailedError(f"the model's log-probabilities are NaN{self._why_not_finite()}")
        return log_probs

    def _step(self, tokens: "np.ndarray[Any, Any]") -> None:
        """Score tokens, and let the last one be pending; `whole` is false if that ends in its middle."""
        import numpy as np

        first = [] if self._pending is None else [self._pending]
        fed = np.concatenate([np.array(first, np.int64), tokens])
        self.whole = False
        if len(fed) > 1:
            start = perf_counter()
            try:
                log_probs = self._stream.step(fed[None, :-1])[0]  # [m, V]
            except RunFailedError:
                self.whole = not self._stream.broken and len(fed) - 1 <= self._model.config.block_size
                raise
            self._seconds += perf_counter() - start
            scores = log_probs[np.arange(len(fed) - 1), fed[1:]].astype(np.float64)
            self._check_scores(scores, self.position + len(tokens) - len(scores), fed[1:])
            self._nats -= float(np.sum(scores))
            self.scored += len(fed) - 1
            self._steps += 1
            live = self._stream.memory_size()
            self._live_sum = [total + n for total, n in zip(self._live_sum, live, strict=True)]
            self._live_most = [max(most, n) for most, n in zip(self._live_most, live, strict=True)]
        self._pending = int(fed[-1])
        self.position += len(tokens)
        self.whole = True

    def _check_scores(self, scores: "np.ndarray[Any, Any]", before: int, tokens: "np.ndarray[Any, Any]") -> None:
        """Raise unless all are finite. `before`: tokens of the input before the first one that is scored."""
        import numpy as np

        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            i = int(wrong[0])
            raise RunFailedError(
                f"number {before + i + 1} of the input, token {tokens[i]}, gets the log-probability {scores[i]:g}"
                f"{self._why_not_finite()}"
            )

    def _why_not_finite(self) -> str:
        narrow = self._model.metadata["dtype"] == "float16"
        return ": float16 may be too narrow, export with --dtype float32" if narrow else ": damaged parameters?"

    def _bits(self) -> float:
        return self._nats / self.scored / log(2)

    def report(self, *, complete: bool = True) -> dict[str, Any]:
        """What there is to say, by name; None for what is not known."""
        from refspan.export.session import device_memory_in_use

        config, bits = self._model.config, self._bits() if self.scored else None
        on_device = self._model.device != "cpu"
        return {
            "complete": complete,
            "input_position": self.position,
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
            "device_memory_bytes": device_memory_in_use() if on_device else None,
            "device": self._model.device,
        }


def peak_memory() -> int | None:
    """The most that this process has held, in bytes; None where that cannot be asked."""
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def json_of(report: dict[str, Any]) -> str:
    """The report for programs."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


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
    peak, on_device = report["peak_memory_bytes"], report["device_memory_bytes"]
    held = f", {peak / 2**20:.0f} MiB of the process at its peak" if peak else ""
    held += f", {on_device / 2**20:.0f} MiB of the device by all that use it" if on_device else ""
    return [*lines, f"memory           {report['state_bytes'] / 2**20:.1f} MiB of state on {report['device']}{held}"]
