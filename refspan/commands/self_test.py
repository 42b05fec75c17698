"""`refspan check --self-test`: hold the checks against backends that are known to be wrong, or right."""

from collections.abc import Sequence
from pathlib import Path

import click

from refspan.errors import SetupError
from refspan.files import check_writable, write_whole


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
        Exit status: 0, or 1 if a mutant survives, a check rejects none, or a right backend is rejected; 130 on Ctrl-C.

    Raises:
        SetupError: an unknown level, check, dtype or mutant, or a file that cannot be written.
    """
    from tqdm import tqdm

    from refspan.conformance.mutants import MUTANTS
    from refspan.conformance.runner import DTYPES, select
    from refspan.conformance.self_test import SelfTest, self_test

    checks = select(levels, ids)
    if dtype not in DTYPES:
        raise SetupError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    for name in mutants:
        if name not in MUTANTS:
            raise SetupError(f"unknown mutant {name!r}; `python -m refspan.conformance.mutants` lists them")
    if json_path is not None:
        check_writable(json_path)
    state: SelfTest | None = None
    interrupted = False
    try:
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=len(checks), disable=None, leave=False, unit="check", dynamic_ncols=True) as bar:
            for state in self_test(levels=levels, ids=ids, mutants=mutants, dtype=dtype, seed=seed, examples=examples):
                if not state.complete:
                    last = state.trials[-1]
                    rejected = len(set(last.killed) & set(state.mutants))
                    asked = sum(verdict.backend in state.mutants for verdict in last.verdicts)
                    count = f"rejects {rejected:>3} of {asked:>3} mutants"
                    bar.write(f"{last.check:<28} {count}  {last.examples:>5} examples {last.seconds:6.1f} s")
                    bar.update()
    except KeyboardInterrupt:
        interrupted = True
    if state is None:
        return 130
    if json_path is not None:
        write_whole(json_path, state.to_json().encode())
    click.echo()
    for line in state.matrix():
        click.echo(line)
    click.echo()
    for fault in state.faults():
        click.echo(fault)
    click.echo(state.summary())
    return 130 if interrupted else int(bool(state.faults()))
