"""`refspan generate`: let an exported model continue a text."""

import codecs
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refspan.errors import SetupError

if TYPE_CHECKING:
    import numpy as np


@click.command()
@click.argument("model_path", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--prompt", help="What to continue: a text, or token numbers if the model's tokens are no bytes.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="The same in a file; - is standard input.")
@click.option("--tokens", "count", type=click.IntRange(min=1), default=256, show_default=True, help="How many to add.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 takes the most probable token.")
@click.option("--top-k", type=int, help="Draw from the K most probable tokens only.")
@click.option("--top-p", type=float, help="Draw from the most probable tokens that reach the share P together.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed gives the same text."
)
@click.option("--state", "state_path", type=click.Path(path_type=Path), help="Go on from a state that was saved.")
@click.option("--device", metavar="cpu|cuda", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1, max=1024), help="On the CPU; by default one per core.")
def command(
    *,
    model_path: Path,
    prompt: str | None,
    prompt_file: Path | None,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    state_path: Path | None,
    device: str,
    threads: int | None,
) -> int:
    """Continue a text with a model that `refspan export model` wrote, and print what it adds as it comes."""
    import numpy as np

    from refspan.commands.scoring import Run
    from refspan.export import OnnxModel
    from refspan.export.sampling import check_sampling, sample
    from refspan.export.tokens import TokenFile

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal need not know every character
    if prompt is not None and prompt_file is not None:
        raise SetupError("--prompt and --prompt-file: got both, expected one")
    random = np.random.default_rng(seed)
    try:
        check_sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise SetupError(f"--{str(error).replace('_', '-')}") from None
    with OnnxModel(model_path, device=device, threads=threads) as model:
        of_bytes, vocabulary = model.metadata["tokenizer"] == "bytes", model.config.vocab_size
        run = Run(model)
        if state_path is not None:
            run.load_state(state_path)
        if prompt_file is not None:
            blocks = TokenFile(prompt_file, model.metadata["tokenizer"], vocabulary).blocks(model.config.block_size)
            run.read(blocks)
        elif prompt is not None and len(tokens := tokens_of(prompt, of_bytes, vocabulary)):
            run.read(iter([tokens]))
        try:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            for _ in range(count):
                token = sample(run.next_log_probs(), temperature=temperature, top_k=top_k, top_p=top_p, random=random)
                run.give(token)
                click.echo(decoder.decode(bytes([token])) if of_bytes and token < 256 else f"{token} ", nl=False)
            click.echo(decoder.decode(b"", final=True))
        except KeyboardInterrupt:
            click.echo()
            return 130
    return 0


def tokens_of(prompt: str, of_bytes: bool, vocabulary: int) -> "np.ndarray[Any, Any]":
    """The tokens of a prompt on the command line."""
    import numpy as np

    if of_bytes:
        return np.frombuffer(prompt.encode(errors="surrogateescape"), np.uint8).astype(np.int64)
    try:
        tokens = np.array([int(word) for word in prompt.split()], np.int64)
    except (ValueError, OverflowError):
        raise SetupError(
            f"--prompt: got {prompt[:40]!r}, expected token numbers: the model's tokens are no bytes"
        ) from None
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise SetupError(f"--prompt: got token {token}, expected 0 to {vocabulary - 1}")
    return tokens
