"""`refspan check`: hold a backend against the specification."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refspan.conformance.protocol import EXAMPLES, TIMEOUT
from refspan.errors import SetupError
from refspan.files import check_distinct, check_writable, write_whole
from refspan.interrupt import Interrupts

if TYPE_CHECKING:
    from refspan.conformance.vectors.reading import AnyVector


@click.command("check")
@click.option("--backend", "backend_name", metavar="NAME",
              help="numpy, cupy, onnxruntime, onnx-reference, openvino, an entry point, "
              "package.module:attribute, path/to/file.py:attribute, onnx:FILE or exec:COMMAND.")  # fmt: skip
@click.option("--device", metavar="cpu|cuda", help="Device, for a backend that has a choice.")
@click.option("--form", metavar="fused|portable", help="Form of the ONNX graph, for the onnxruntime backend.")
@click.option(
    "--dtype", default="float32", show_default=True, help="Dtype of query, key and value: float16, float32, float64."
)
@click.option("--level", "levels", multiple=True, metavar="LEVEL", help="Run only this level; may be repeated.")
@click.option("--check", "ids", multiple=True, metavar="ID", help="Run only this check; may be repeated.")
@click.option("--examples", type=click.IntRange(min=1), default=EXAMPLES, show_default=True, help="Cases per check.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86400),
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

    Exit status: 0 the backend conforms, 1 it does not, 2 it could not be asked.
    """
    if self_test:
        if backend_name is not None:
            raise click.UsageError("--self-test tries the checks, not a backend: leave --backend out.", ctx)
        from refspan.commands.self_test import run_self_test

        return run_self_test(levels, ids, mutants, dtype=dtype, seed=seed, examples=examples, json_path=json_path)
    if mutants:
        raise click.UsageError("--mutant goes with --self-test.", ctx)
    from refspan.conformance.expected import read_expected
    from refspan.conformance.loading import session_of
    from refspan.conformance.report import Report
    from refspan.conformance.runner import DTYPES, facts_of_run, run, select
    from refspan.conformance.vectors.folder import entries_to_add_to, write_folder
    from refspan.conformance.vectors.reading import read_folder
    from refspan.conformance.vectors.replay import checks_of

    if vectors_path is not None and (levels or ids):
        raise click.UsageError("--vectors takes the place of checks: leave --level and --check out.", ctx)
    checks = select(levels, ids)
    vectors = None if vectors_path is None else read_folder(vectors_path)
    if only_list:
        for one in checks:
            click.echo(f"{one.id:<28} {' '.join(one.clauses):<28} {one.purpose.partition(chr(10))[0]}")
        return 0
    if backend_name is None:
        raise click.UsageError("Missing option '--backend': name one, for example --backend numpy.", ctx)
    if dtype not in DTYPES:
        raise SetupError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    asked = {"json": json_path, "junit": junit, "html": html, "badge": badge}
    files = {form: path for form, path in asked.items() if path is not None}
    check_distinct({f"--{form}": path for form, path in files.items()}, {"--expected-failures": expected_path})
    for path in files.values():
        check_writable(path)
    if failures_path is not None:
        entries_to_add_to(failures_path)
    expected = {} if expected_path is None else read_expected(expected_path)

    session = session_of(backend_name, timeout=timeout, device=device, form=form)
    if session.dtypes and dtype not in session.dtypes:
        session.close()
        raise SetupError(f"backend {backend_name!r} does not take dtype {dtype}; it takes {', '.join(session.dtypes)}")
    if vectors is not None:
        checks = checks_of(vectors, session.dtypes)
    report = Report(facts_of_run(session, dtype=dtype, seed=seed, examples=examples))
    replay = ["refspan", "check", "--backend", backend_name]
    for name, value in (("--device", device), ("--form", form)):
        replay += [name, value] if value else []
    replay += ["--dtype", dtype, "--seed", str(seed), "--examples", str(examples)]
    replay += ["--timeout", f"{timeout:g}"] if timeout != TIMEOUT else []

    def replay_of(id_: str) -> str:
        which = ["--check", id_] if vectors_path is None else ["--vectors", str(vectors_path)]
        return shlex.join([*replay, *which])

    saved: list[AnyVector] = []
    interrupted = False
    asked_to_stop = Interrupts()
    try:
        for line in report.header():
            click.echo(line)
        click.echo()
        options = {"dtype": dtype, "seed": seed, "replay": replay_of, "expected": expected, "keep": saved.append}
        _run(run, session, checks, report, asked_to_stop, examples=examples, **options)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        session.close()
        for form, path in files.items():
            # what is only half of a report never takes the place of a whole one
            half = not report.complete and path.exists()
            write_whole(path.with_name(path.name + ".partial") if half else path, _as(form, report))
    for complaint in report.complaints:
        click.echo(complaint)
    click.echo(report.summary())
    if failures_path is not None and saved:  # last: the report does not depend on it
        write_folder(failures_path, saved)
    if interrupted:
        return 130
    if report.as_expected:
        return 0
    return 1 if report.count("failed") or report.complaints else 2


def _as(form: str, report: Any) -> bytes:
    """The report as it is written to a file."""
    from refspan.conformance.badge import badge
    from refspan.conformance.html_report import html_report
    from refspan.conformance.junit import junit

    if form == "json":
        content: bytes = report.to_json().encode()
        return content
    return {"junit": junit, "html": html_report, "badge": badge}[form](report)


def _run(
    run: Any, session: Any, checks: Any, report: Any, asked_to_stop: Interrupts, *, examples: int, **options: Any
) -> None:
    """Print a line per check as it finishes; on a terminal a bar shows the one at work."""
    from tqdm import tqdm

    # disable=None: no bar where stderr is no terminal
    with tqdm(total=examples * len(checks), disable=None, leave=False, unit="ex", dynamic_ncols=True) as bar:

        def tick(check: Any, example: int) -> None:
            if asked_to_stop:
                raise KeyboardInterrupt
            if example == 0:
                bar.set_description(check.id)
            if example < examples:
                bar.update()

        for done, result in enumerate(run(session, checks, report, examples=examples, tick=tick, **options), start=1):
            bar.n = done * examples
            bar.refresh()
            lines = [result.line()]
            if result.failure is not None:
                lines += [f"      {result.failure.message}"]
                lines += [f"        {line}" for line in result.failure.counterexample]
                lines += [f"      replay: {result.failure.replay}"]
            for line in lines:
                bar.write(line)
