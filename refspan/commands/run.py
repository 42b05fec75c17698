"""`refspan run`: score a file with an exported model."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from refspan.errors import RunFailedError, SetupError
from refspan.files import check_distinct, check_writable, write_whole
from refspan.interrupt import Interrupts

if TYPE_CHECKING:
    pass

LONGEST_BLOCK = 4096
"""Tokens of one step, unless --block says more: models have been known to claim absurd block sizes."""


@click.command()
@click.argument("model_path", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option(
    "--input", "input_path", required=True, type=click.Path(path_type=Path), help="File; - is standard input."
)
@click.option(
    "--skip",
    type=click.IntRange(min=0, max=2**62),
    default=0,
    help="Leave out so many tokens at the input's beginning.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Read no more than so many.")
@click.option("--device", metavar="cpu|cuda", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1, max=1024), help="On the CPU; by default one per core.")
@click.option("--block", type=click.IntRange(min=1), help="Tokens of one step; by default and at most the block size.")
@click.option("--state", "state_path", type=click.Path(path_type=Path), help="Go on from a state that was saved.")
@click.option(
    "--save-state", type=click.Path(path_type=Path), help="Save the state in the end, also after Ctrl-C and SIGTERM."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the report to FILE; to standard output, and there nothing else, if it is -.",
)
def command(
    *,
    model_path: Path,
    input_path: Path,
    skip: int,
    max_tokens: int | None,
    device: str,
    threads: int | None,
    block: int | None,
    state_path: Path | None,
    save_state: Path | None,
    json_path: Path | None,
) -> int:
    """Score a text or token file with a model that `refspan export model` wrote.

    If the model's tokens are bytes, any file is read as bytes. Otherwise the file holds token numbers: text with white
    space between them, or a .npy array. Each token is scored by what the model said of it before it was read; the first
    one of a stream is not.

    A run that ends early says how to go on: with the state that it saved, and the tokens of the input to skip.
    """
    from refspan.commands.scoring import Run, json_of, lines_of
    from refspan.export import OnnxModel
    from refspan.export.tokens import STDIN, TokenFile

    printed = json_path == Path("-")
    json_file = None if printed else json_path
    read = {"MODEL.onnx": model_path, "--input": None if input_path == STDIN else input_path}
    read["the model's weights beside it"] = model_path.with_name(f"{model_path.name}.data")
    check_distinct({"--save-state": save_state, "--json": json_file}, read)
    check_distinct({"--json": json_file}, {"--state": state_path})  # --save-state may take its place
    for path in (save_state, json_file):
        if path is not None:
            check_writable(path)
    fault: BaseException | None = None
    with OnnxModel(model_path, device=device, threads=threads) as model:
        tokens = TokenFile(input_path, model.metadata["tokenizer"], model.config.vocab_size, skip)
        run = Run(model, skip)
        if state_path is not None:
            run.load_state(state_path)
        stop = Interrupts()
        try:
            length = min(n for n in (block or LONGEST_BLOCK, model.config.block_size, max_tokens) if n is not None)
            run.read(tokens.blocks(length), tokens.size(), max_tokens, stop)
        except (KeyboardInterrupt, SetupError, RunFailedError, MemoryError, OSError) as error:
            fault = error
        report = run.report(complete=fault is None)
        worth_it = fault is None or run.scored > 0
        # Each is written even if another cannot be.
        unwritten: list[BaseException] = []
        if worth_it:
            shown = json_of(report) if printed else "".join(f"{line}\n" for line in lines_of(report))
            _tried(lambda: click.echo(shown, nl=False), unwritten)
        if json_file is not None and worth_it:
            _tried(lambda: write_whole(json_file, json_of(report).encode()), unwritten)
        how = ""
        if save_state is not None and (fault is None or run.position > skip):
            how = "; the state is lost"
            if run.whole and _tried(lambda: run.save_state(save_state), unwritten):
                how = f"; go on with --state {shlex.quote(str(save_state))} --skip {run.position}"
    if isinstance(fault, KeyboardInterrupt):
        click.echo("; ".join(["interrupted", *map(_said, unwritten)]) + how, err=True)
        return stop.status
    faults = [error for error in (fault, *unwritten) if error is not None]
    if faults:
        kind = SetupError if isinstance(faults[0], SetupError) else RunFailedError
        raise kind("; ".join(map(_said, faults)) + how)
    if how and not printed:
        click.echo(f"state            saved{how}")
    return 0


def _tried(write: Callable[[], None], faults: list[BaseException]) -> bool:
    """Whether that could be written; what went wrong is added to `faults`."""
    try:
        write()
    except (SetupError, RunFailedError, MemoryError, OSError) as error:
        faults.append(error)
        return False
    return True


def _said(error: BaseException) -> str:
    if isinstance(error, OSError):  # files have errors of their own
        return f"cannot be printed: {error.strerror or error}"
    return str(error) or "there is no memory left"
