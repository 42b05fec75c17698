"""A report as one page that needs nothing else: no scripts, no fonts, no network."""

from collections.abc import Iterator
from html import escape as html_escape

from refspan.clauses import CLAUSES
from refspan.conformance.report import INCOMPLETE, Picture, Report, Result, escaped

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --soft: #f1f2f4; --line: #d0d3d8; --dim: #5a5f66;
  --pass: #2c7a34; --fail: #b3261e; --known: #8a6d00; --none: #5f6368; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e8; --paper: #16171a; --soft: #222429; --line: #3c4048;
  --dim: #a3a8b0; --pass: #6cc776; --fail: #ff8a80; --known: #e0b93c; --none: #a3a8b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.verdict { font-size: 1.1rem; padding: .6rem 1rem; border-left: .4rem solid; background: var(--soft); }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; } th { color: var(--dim); font-weight: 600; }
.scroll { overflow-x: auto; } .num { text-align: right; white-space: nowrap; } .error { white-space: nowrap; }
.passed { color: var(--pass); } .failed { color: var(--fail); } .known-failure { color: var(--known); }
.not-offered, .dim { color: var(--dim); } .status { font-weight: 600; white-space: nowrap; }
code, pre { font: .875rem/1.45 ui-monospace, monospace; } pre { background: var(--soft); padding: .7rem 1rem;
  overflow-x: auto; margin: .5rem 0; }
.bar { display: inline-block; width: 8rem; height: .7rem; background: var(--soft); border: 1px solid var(--line); }
.bar i { display: block; height: 100%; background: currentColor; }
details { border: 1px solid var(--line); margin: .5rem 0; padding: .4rem .8rem; } summary { cursor: pointer; }
summary:focus-visible, a:focus-visible { outline: 3px solid #4a90d9; outline-offset: 2px; } a { color: inherit; }
nav a { margin-right: 1rem; } td .status { display: inline-block; margin-right: .8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: .5rem 0; } figcaption { color: var(--dim);
  font-size: .875rem; } svg { background: #fff; border: 1px solid var(--line); display: block; }
"""
CELL, WIDEST = 14, 320
"""Pixels of a number in a picture, and of a whole picture."""
TOLD = 400
"""Numbers of a picture that can each be pointed at, and then say what they are."""
OPEN = 3
"""Counterexamples that are open at first."""
MARKS = {"passed": "\u2713", "failed": "\u2717 failed:", "known failure": "\u2717 known failure:",
         "not offered": "\u2013 not offered:"}  # fmt: skip
"""Statuses in the table of clauses, for those who do not see colours."""


def html_report(report: Report) -> bytes:
    """The page: verdict, clauses, checks with their errors, counterexamples with pictures, environment."""
    return "\n".join(_page(report)).encode()


def escape(text: str) -> str:
    """As text or attribute of the page; lines stay lines."""
    return html_escape(escaped(text, keep="\n"))


def _page(report: Report) -> Iterator[str]:
    backend = escape(report.facts.get("backend", "a backend"))
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>refspan: {backend}</title><style>{STYLE}</style></head><body>"
    yield f"<header><h1>{backend} against the specification</h1>"
    said, kind = _verdict(report)
    yield f'<p class="verdict {kind}"><strong>{said}</strong><br>{escape(report.summary())}</p></header><main>'
    if report.complaints:
        yield "<h2>Expected failures</h2><ul>"
        yield from (f'<li class="failed">{escape(complaint)}</li>' for complaint in report.complaints)
        yield "</ul>"
    failed = [result for result in report.results if result.failure is not None]
    parts = ["clauses", "checks", *(["counterexamples"] if failed else []), "environment"]
    yield f"<nav>{' '.join(f'<a href=#{part}>{part.capitalize()}</a>' for part in parts)}</nav>"
    yield from _clauses(report)
    yield from _checks(report)
    if failed:
        yield '<h2 id="counterexamples">Counterexamples</h2>'
        for i, result in enumerate(failed):
            yield from _failure(result, is_open=i < OPEN)
    yield '<h2 id="environment">Environment</h2><div class="scroll"><table>'
    for name, value in report.facts.items():
        yield f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
    yield "</table></div></main></body></html>\n"


def _verdict(report: Report) -> tuple[str, str]:
    if not report.complete:
        return INCOMPLETE, "not-offered"
    if report.conforms:
        return "Conforms", "passed"
    if report.as_expected:
        return "Fails as expected", "known-failure"
    return "Does not conform", "failed"


def _failure(result: Result, *, is_open: bool) -> Iterator[str]:
    failure = result.failure
    assert failure is not None  # noqa: S101
    kind, id_ = result.status.replace(" ", "-"), escape(result.check)
    yield f'<details{" open" * is_open}><summary><span class="status {kind}">{id_}</span>'
    yield f' {escape(failure.message)}</summary><p id="{id_}">{escape(result.purpose)}</p>'
    if result.known is not None:
        yield f"<p>Expected: {escape(result.known.reason)} (<a href='{_link(result.known.link)}'>why</a>)</p>"
    if failure.pictures:
        yield f'<div class="pictures">{"".join(map(_picture, failure.pictures))}</div>'
    yield f"<pre>{escape(chr(10).join(failure.counterexample))}</pre>"
    yield f"<p>Again: <code>{escape(failure.replay)}</code></p></details>"


def _link(address: str) -> str:
    """An address that can be followed safely, else one that leads nowhere."""
    return escape(address) if address.startswith(("https://", "http://")) else "#"


def _picture(picture: Picture) -> str:
    """Queries down, memories across; the darker, the nearer to 1."""
    rows, columns = len(picture.rows), max(map(len, picture.rows), default=0)
    if not columns:
        return ""
    cell = min(CELL, WIDEST / max(rows, columns))
    cells = "".join(_cells(picture))
    width, height = columns * cell, rows * cell
    title = escape(f"{picture.title}: {rows} queries down, {columns} memories across")
    return (
        f'<figure><svg width="{width:.4g}" height="{height:.4g}" viewBox="0 0 {columns} {rows}" '
        f'fill="rgb(20,80,160)" role="img" aria-label="{title}">{cells}</svg>'
        f"<figcaption>{escape(picture.title)}</figcaption></figure>"
    )


def _cells(picture: Picture) -> Iterator[str]:
    """Each number by itself with its value; of large pictures all that look alike together."""
    alike: dict[float, list[str]] = {}
    many = sum(map(len, picture.rows)) > TOLD
    for y, line in enumerate(picture.rows):
        for x, number in enumerate(line):
            square = f"M{x} {y}h1v1h-1z"
            if number > 0 and many:
                alike.setdefault(max(round(number, 2), 0.01), []).append(square)
            elif number > 0:
                told = f"query {y}, memory {x}: {number:g}"
                yield f'<path d="{square}" fill-opacity="{number:g}"><title>{told}</title></path>'
    for number, squares in alike.items():
        yield f'<path d="{"".join(squares)}" fill-opacity="{number:g}"/>'


def _clauses(report: Report) -> Iterator[str]:
    yield '<h2 id="clauses">Clauses</h2><div class="scroll"><table><thead><tr><th scope="col">Clause</th>'
    yield '<th scope="col">Checks</th></tr></thead><tbody>'
    for clause in CLAUSES:
        about = [result for result in report.results if clause in result.clauses]
        if about:
            said = " ".join(
                f'<a class="status {result.status.replace(" ", "-")}" href="#check-{escape(result.check)}" '
                f'title="{escape(result.status)}">{MARKS[result.status]} {escape(result.check)}</a>'
                for result in about
            )
            yield f'<tr><th scope="row">{clause}</th><td>{said}</td></tr>'
    yield "</tbody></table></div>"


def _checks(report: Report) -> Iterator[str]:
    yield '<h2 id="checks">Checks</h2><div class="scroll"><table><thead><tr><th scope="col">Check</th>'
    yield '<th scope="col">Status</th><th scope="col">Largest error, as a share of its bound</th>'
    yield '<th scope="col" class="num">Examples</th><th scope="col" class="num">Seconds</th>'
    yield '<th scope="col">What it checks</th></tr></thead><tbody>'
    for result in report.results:
        kind, id_ = result.status.replace(" ", "-"), escape(result.check)
        name = f'<a href="#{id_}">{id_}</a>' if result.failure else id_
        error = ""
        if result.status != "not offered":
            width = min(100.0, 100 * result.worst) if result.worst == result.worst else 100.0
            error = f'<span class="bar {kind}"><i style="width:{width:.3g}%"></i></span> {result.error}'
        purpose = escape(result.purpose.partition("\n")[0])
        yield f'<tr id="check-{id_}"><th scope="row">{name}</th><td class="status {kind}">{result.status}</td>'
        yield f'<td class="error">{error}</td><td class="num">{result.examples}</td>'
        yield f'<td class="num">{result.seconds:.1f}</td><td class="dim">{purpose}</td></tr>'
    yield "</tbody></table></div>"
