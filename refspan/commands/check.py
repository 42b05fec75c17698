"""`refspan check`: hold a backend against the specification."""

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from refspan.commands.asking import Interruptible, ask_and_print, loaded
from refspan.conformance.protocol import EXAMPLES, TIMEOUT
from refspan.errors import SetupError
from refspan.files import check_distinct, check_writable
from refspan.interrupt import Interrupts

if TYPE_CHECKING:
    from refspan.conformance.vectors.reading import AnyVector

OF_SELF_TEST = {"self_test", "mutants", "levels", "ids", "dtype", "seed", "examples", "json_path"}
"""Parameters that mean something with --self-test."""


def _not_nan(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    """Of a range that lets nan pass."""
    if value != value:
        raise click.BadParameter("nan is not a number of seconds.")
    return value


@click.command("check")
@click.option("--backend", "backend_name", metavar="NAME",
              help="numpy, cupy, onnxruntime, onnx-reference, openvino, an entry point, "
              "package.module:attribute, path/to/file.py:attribute, onnx:FILE or exec:COMMAND.")  # fmt: skip
@click.option("--device", metavar="cpu|cuda", help="Device, for a backend that has a choice.")
@click.option("--form", metavar="fused|portable", help="Form of the ONNX graph, for the onnxruntime backend.")
@click.option(
    "--dtype", default="float32", show_default=True, help="Dtype of query, key and value: float16, float32, float64."
)
@click.option(
    "--level",
    "levels",
    multiple=True,
    metavar="LEVEL",
    help="Run this level, and others only if asked for; may be repeated.",
)
@click.option(
    "--check", "ids", multiple=True, metavar="ID", help="Run this check, and others only if asked for; may be repeated."
)
@click.option("--examples", type=click.IntRange(min=1), default=EXAMPLES, show_default=True, help="Cases per check.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86400),
    callback=_not_nan,
    default=TIMEOUT,
    show_default=True,
    help="Seconds that one answer may take.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the report to FILE.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write it as JUnit XML.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write it as a page.")
@click.option("--badge", type=click.Path(path_type=Path), metavar="FILE", help="Write its sum as a badge (SVG).")
@click.option(
    "--expected-failures",
    "expected_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Checks that are known to fail, a line each: `check: reason, link`. One that passes fails the run.",
)
@click.option("--self-test", is_flag=True, help="Hold the checks themselves against backends known to be wrong.")
@click.option("--mutant", "mutants", multiple=True, metavar="NAME", help="With --self-test: only this one; repeatable.")
@click.option("--vectors", "vectors_path", type=click.Path(path_type=Path), metavar="DIR",
              help="Ask what the vectors in DIR ask (see `refspan vectors`), instead of checks.")  # fmt: skip
@click.option("--save-failures", "failures_path", type=click.Path(path_type=Path), metavar="DIR",
              help="Add the smallest counterexamples to the vectors in DIR.")  # fmt: skip
@click.option("--list", "only_list", is_flag=True, help="List the checks and what they check, and run none.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    backend_name: str | None,
    device: str | None,
    form: str | None,
    dtype: str,
    levels: tuple[str, ...],
    ids: tuple[str, ...],
    examples: int,
    seed: int,
    timeout: float,
    json_path: Path | None,
    junit: Path | None,
    html: Path | None,
    badge: Path | None,
    expected_path: Path | None,
    vectors_path: Path | None,
    failures_path: Path | None,
    only_list: bool,
    self_test: bool,
    mutants: tuple[str, ...],
) -> int:
    """Hold a backend against the specification.

    Exit status: 0 the backend conforms or fails as expected, 1 it does not, 2 it could not be asked, 128 and the number
    of the signal if one ended it: 130 after Ctrl-C.
    """
    if self_test:
        _refuse_others(ctx)
        from refspan.commands.self_test import run_self_test

        return run_self_test(levels, ids, mutants, dtype=dtype, seed=seed, examples=examples, json_path=json_path)
    if mutants:
        raise click.UsageError("--mutant goes with --self-test.", ctx)
    stop = Interrupts()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # backends have names that a terminal may not know
    from refspan.conformance.expected import read_expected
    from refspan.conformance.report import Report, escaped
    from refspan.conformance.runner import DTYPES, facts_of_run, select
    from refspan.conformance.vectors.folder import write_folder
    from refspan.conformance.vectors.reading import read_folder
    from refspan.conformance.vectors.replay import checks_of

    if vectors_path is not None and (levels or ids):
        raise click.UsageError("--vectors takes the place of checks: leave --level and --check out.", ctx)
    checks = select(levels, ids)
    vectors = None if vectors_path is None else read_folder(vectors_path)
    if only_list:
        return _list(checks)
    if backend_name is None:
        raise click.UsageError("Missing option '--backend': name one, for example --backend numpy.", ctx)
    if dtype not in DTYPES:
        raise SetupError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    asked = {"json": json_path, "junit": junit, "html": html, "badge": badge}
    files = {form: path for form, path in asked.items() if path is not None}
    _check_files(files, backend_name, expected_path, vectors_path, failures_path)
    if vectors is not None:
        checks = checks_of(vectors)
    there = None if vectors is None else {one.id for one in checks}
    expected = {} if expected_path is None else read_expected(expected_path, there)

    session = loaded(stop, backend_name, timeout=timeout, device=device, form=form)
    if session is not None and session.dtypes and dtype not in session.dtypes:
        session.close()
        taken = escaped(", ".join(session.dtypes))
        raise SetupError(f"backend {backend_name!r} does not take dtype {dtype}; it takes {taken}")
    if vectors is not None and session is not None:
        checks = checks_of(vectors, session.dtypes)
    facts = {"backend": backend_name} if session is None else session.facts
    report = Report(facts_of_run(facts, dtype=dtype, seed=seed, examples=examples), planned=len(checks))
    replay = ["refspan", "check", "--backend", backend_name]
    for name, value in (("--device", device), ("--form", form), ("--vectors", vectors_path)):
        replay += [name, str(value)] if value else []
    replay += ["--dtype", dtype, "--seed", str(seed), "--examples", str(examples)]
    replay += ["--timeout", f"{timeout:g}"] if timeout != TIMEOUT else []

    def replay_of(id_: str) -> str:
        return shlex.join([*replay, *(["--check", id_] if vectors_path is None else [])])

    saved: list[AnyVector] = []
    faults: list[Exception] = []
    if session is not None:
        options = {"dtype": dtype, "seed": seed, "replay": replay_of, "expected": expected, "keep": saved.append}
        try:
            for line in report.header():
                click.echo(line)
            click.echo()
            ask_and_print(Interruptible(session, stop), checks, report, stop, examples=examples, **options)
        except KeyboardInterrupt:
            pass
        except Exception as error:  # noqa: BLE001 - raised again below, when what was found until then is written
            faults.append(error)
        finally:
            session.close()
    parts = [partial(_say, report), *(partial(_write, form, path, report) for form, path in files.items())]
    if failures_path is not None and saved:  # last: the report does not depend on it
        parts.append(partial(write_folder, failures_path, saved))
    faults += _faults_of(parts)
    if stop and not report.complete:
        with suppress(OSError):  # the terminal may be what is gone
            for fault in faults:
                click.echo(f"refspan: {fault}", err=True)
        return stop.status
    if faults:
        for fault in faults[1:]:
            if not isinstance(fault, BrokenPipeError):  # told by the exit status
                click.echo(f"refspan: {fault}", err=True)
        raise faults[0]
    if not report.offered and not report.complaints:
        raise SetupError("nothing was checked: the backend offers nothing that was asked for")
    return 0 if report.as_expected else 1


def _refuse_others(ctx: click.Context) -> None:
    """Raise UsageError if --self-test was given an option that means nothing to it."""
    for option in ctx.command.params:
        given = ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name not in OF_SELF_TEST:
            raise click.UsageError(f"--self-test tries the checks, not a backend: leave {option.opts[0]} out.", ctx)


def _list(checks: Iterable[Any]) -> int:
    """Print a line per check."""
    for one in checks:
        click.echo(f"{one.id:<28} {' '.join(one.clauses):<28} {one.purpose.partition(chr(10))[0]}")
    return 0


def _check_files(
    reports: Mapping[str, Path], backend_name: str, expected: Path | None, vectors: Path | None, failures: Path | None
) -> None:
    """Raise SetupError if what is to be written cannot be, or would take the place of what is to be read."""
    from refspan.conformance.loading import files_of
    from refspan.conformance.report import partial_of
    from refspan.conformance.vectors.folder import entries_to_add_to

    written: dict[str, Path | None] = {f"--{form}": path for form, path in reports.items()}
    written |= {f"--{form}, if interrupted,": partial_of(path) for form, path in reports.items()}
    kept: dict[str, Path | None] = {"--expected-failures": expected}
    kept |= {f"{path} of --backend": path for path in files_of(backend_name) if path.is_file()}
    check_distinct(written, kept, {"--vectors": vectors, "--save-failures": failures})
    for path in reports.values():
        check_writable(path)
    if failures is not None:
        entries_to_add_to(failures)


def _faults_of(parts: Iterable[Callable[[], object]]) -> list[Exception]:
    """Do each of them, also if one before has failed."""
    faults: list[Exception] = []
    for part in parts:
        try:
            part()
        except Exception as error:  # noqa: BLE001 - the caller raises it
            faults.append(error)
    return faults


def _say(report: Any) -> None:
    """Print the end of the report."""
    from refspan.conformance.report import escaped

    for complaint in report.complaints:
        click.echo(escaped(complaint))
    click.echo(report.summary())


def _write(form: str, path: Path, report: Any) -> None:
    """Write the report to a file."""
    from refspan.conformance.badge import badge
    from refspan.conformance.html_report import html_report
    from refspan.conformance.junit import junit
    from refspan.conformance.report import write_report

    if form == "json":
        content: bytes = report.to_json().encode()
    else:
        content = {"junit": junit, "html": html_report, "badge": badge}[form](report)
    say_where(path, write_report(path, form, content, complete=report.complete))


def say_where(path: Path, written: Path) -> None:
    """Tell if a report is not where it was to be."""
    if written != path:
        click.echo(f"refspan: {path} stays as it was; the report of this run, INCOMPLETE, is {written}", err=True)
