"""`refspan check --self-test`: hold the checks against backends that are known to be wrong, or right."""

from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from refspan.commands.check import say_where
from refspan.errors import SetupError
from refspan.files import check_writable
from refspan.interrupt import Interrupts

if TYPE_CHECKING:
    from refspan.conformance.self_test import SelfTest


def run_self_test(
    levels: Sequence[str],
    ids: Sequence[str],
    mutants: Sequence[str],
    *,
    dtype: str,
    seed: int,
    examples: int,
    json_path: Path | None,
) -> int:
    """Print a line per check as it ends, then the matrix clause -> check -> mutants, then what is wrong with the suite.

    Returns:
        Exit status: 0, or 1 if a mutant survives, a check rejects none, or a right backend is rejected; 130 on Ctrl-C,
        and 128 and its number for another signal.

    Raises:
        SetupError: an unknown level, check, dtype or mutant, or a file that cannot be written.
    """
    stop = Interrupts()
    from tqdm import tqdm

    from refspan.conformance.mutants import MUTANTS
    from refspan.conformance.report import write_report
    from refspan.conformance.runner import DTYPES, select
    from refspan.conformance.self_test import self_test

    checks = select(levels, ids)
    if dtype not in DTYPES:
        raise SetupError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    for name in mutants:
        if name not in MUTANTS:
            raise SetupError(f"unknown mutant {name!r}; `python -m refspan.conformance.mutants` lists them")
    if json_path is not None:
        check_writable(json_path)
    states = self_test(levels=levels, ids=ids, mutants=mutants, dtype=dtype, seed=seed, examples=examples)
    state = next(states)
    try:
        # disable=None: no bar where stderr is no terminal
        with (
            closing(states),
            tqdm(total=len(checks), disable=None, leave=False, unit="check", dynamic_ncols=True) as bar,
        ):
            next(states)  # its processes start, which had better not end half-way
            while not state.complete:
                with stop.waiting():
                    state = next(states)
                if not state.complete:
                    last = state.trials[-1]
                    rejected = len(set(last.killed) & set(state.mutants))
                    asked = sum(verdict.backend in state.mutants for verdict in last.verdicts)
                    count = f"rejects {rejected:>3} of {asked:>3} mutants"
                    bar.write(f"{last.check:<28} {count}  {last.examples:>5} examples {last.seconds:6.1f} s")
                    bar.update()
    except (KeyboardInterrupt, BrokenProcessPool):  # BrokenProcessPool: its processes were told to end, too
        if not stop:
            raise
    try:
        _say(state)
    finally:  # neither is lost with the other
        if json_path is not None:
            content = state.to_json().encode()
            say_where(json_path, write_report(json_path, "json", content, complete=state.complete))
    return int(bool(state.faults())) if state.complete else stop.status


def _say(state: "SelfTest") -> None:
    click.echo()
    for line in state.matrix():
        click.echo(line)
    click.echo()
    for fault in state.faults():
        click.echo(fault)
    click.echo(state.summary())
