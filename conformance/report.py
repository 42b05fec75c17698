"""What a run found out: one object, from which every form of report is made."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from refspan.files import write_whole

Status = Literal["passed", "failed", "known failure", "not offered"]
STATUSES: tuple[Status, ...] = ("passed", "failed", "known failure", "not offered")
FORMAT = 2
"""Version of the JSON form, see report.schema.json."""
INCOMPLETE = "INCOMPLETE: the run ended before its last check"
"""What reports say of a run that ended early."""
MARKS = {
    "json": b'\n  "complete": false,',
    "junit": f'<error message="{INCOMPLETE}'.encode(),
    "html": f"<strong>{INCOMPLETE}".encode(),
    "badge": b", incomplete</title>",
}
"""Form of a report -> what its file holds only if the run ended early: names and messages are escaped there."""


@dataclass(frozen=True)
class Known:
    """A failure that is expected, and why."""

    reason: str
    link: str


@dataclass(frozen=True)
class Picture:
    """What one row of a counterexample looks like, for a page."""

    title: str
    rows: tuple[tuple[float, ...], ...]
    """A number in 0..1 for each query (down) and memory (across)."""


@dataclass(frozen=True)
class Failure:
    """How a backend fails a check."""

    message: str
    """What it did wrong, in one line."""
    counterexample: tuple[str, ...]
    """The smallest case in which it does, a line each."""
    replay: str
    """The command that shows it again."""
    pictures: tuple[Picture, ...] = ()
    """Of the counterexample."""


@dataclass(frozen=True)
class Result:
    """What one check found out."""

    check: str
    level: str
    clauses: tuple[str, ...]
    purpose: str
    status: Status
    worst: float
    """Largest error as a fraction of its bound."""
    examples: int
    seconds: float
    backend_seconds: float = 0.0
    """Of these, the backend's own."""
    failure: Failure | None = None
    known: Known | None = None
    """Why it was expected to fail, if it was."""

    @property
    def error(self) -> str:
        """`worst` in words; "-" where it is not for its numbers that a check failed."""
        failed = self.status in ("failed", "known failure")
        return "-" if failed and self.worst <= 1 else f"{self.worst:.2g}"

    def line(self) -> str:
        """The result in one line."""
        mark = {"passed": "pass", "failed": "FAIL", "known failure": "know", "not offered": "----"}[self.status]
        error = "not offered" if self.status == "not offered" else f"error/bound {self.error:<8}"
        cost = "" if self.status == "not offered" else f"{self.examples:>5} examples {self.seconds:6.1f} s  "
        return f"{mark}  {self.check:<28} {error:<21} {cost}{' '.join(self.clauses)}"


@dataclass
class Report:
    """A whole run."""

    facts: Mapping[str, str]
    """What was asked and how: versions, backend, device, execution provider, dtype, seed, examples."""
    results: list[Result] = field(default_factory=list)
    planned: int = 0
    """Checks that are to run."""
    complete: bool = False
    """False until the last check has finished."""
    complaints: list[str] = field(default_factory=list)
    """What is wrong with the list of expected failures, a line each."""

    def count(self, status: Status) -> int:
        """How many checks ended so."""
        return sum(result.status == status for result in self.results)

    @property
    def conforms(self) -> bool:
        """True if all checks ran, at least one was offered, and none failed, expected or not."""
        return self.as_expected and self.count("known failure") == 0

    @property
    def as_expected(self) -> bool:
        """True if all checks ran, at least one was offered, and those failed that were expected to, and no others."""
        return self.complete and not self.count("failed") and not self.complaints and self.offered

    @property
    def offered(self) -> bool:
        """True if the backend offers what at least one check asks for."""
        return self.count("not offered") < len(self.results)

    def header(self) -> Iterable[str]:
        """The facts, a line each."""
        facts = {escaped(name): escaped(value) for name, value in self.facts.items()}
        width = max(len(name) for name in facts)
        return [f"{name:<{width}}  {value}" for name, value in facts.items()]

    def known_failures(self) -> str:
        """How many there are, in words; empty if none."""
        count = self.count("known failure")
        return f"{count} known failure{'s' if count > 1 else ''}" if count else ""

    def summary(self) -> str:
        """The last line. What is not offered is part of the whole."""
        parts = [f"{self.count('passed')} of {self.planned} passed", f"{self.count('failed')} failed"]
        parts += [known] if (known := self.known_failures()) else []
        parts += [f"{self.count('not offered')} not offered"]
        seconds = sum(result.seconds for result in self.results)
        if seconds:
            share = sum(result.backend_seconds for result in self.results) / seconds
            parts += [f"{seconds:.0f} s, {share:.0%} of it the backend's own"]
        return ", ".join(parts) + ("" if self.complete else ", INCOMPLETE")

    def to_json(self) -> str:
        """The whole report as report.schema.json describes it; numbers that JSON cannot hold become strings."""
        tree = {
            "refspan_report": FORMAT,
            "complete": self.complete,
            "conforms": self.conforms,
            "as_expected": self.as_expected,
            "facts": dict(self.facts),
            "planned": self.planned,
            "summary": {status.replace(" ", "_"): self.count(status) for status in STATUSES},
            "complaints": self.complaints,
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(_presentable(tree), indent=2, allow_nan=False) + "\n"


def _presentable(tree: Any) -> Any:
    """With nothing but what JSON can hold, and a reader can print."""
    if isinstance(tree, dict):
        return {escaped(key): _presentable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_presentable(value) for value in tree]
    if isinstance(tree, str):
        return escaped(tree, keep="\n")
    if isinstance(tree, float) and (tree != tree or tree in (float("inf"), float("-inf"))):
        return str(tree)
    return tree


def escaped(text: str, *, keep: str = "") -> str:
    """Somebody else's words for a terminal or a file: escapes for line breaks, control characters, lone surrogates, ..

    Args:
        text: what a backend, a vector or a file says.
        keep: characters that may stay.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def partial_of(path: Path) -> Path:
    """Where the report of a run that ended early goes if something else is at its place."""
    return Path(f"{path}.partial")


def write_report(path: Path, form: str, content: bytes, *, complete: bool) -> Path:
    """Write a report. One of a run that ended early takes the place of such a one, and of nothing else.

    Args:
        path: where it is to be.
        form: of the report, see `MARKS`.
        content: of the file.
        complete: whether the run came to its end.

    Returns:
        Where it is: `path`, or `partial_of(path)`.

    Raises:
        SetupError: it cannot be written.
    """
    partial = partial_of(path)
    if not complete and path.exists() and not _ended_early(path, form):
        write_whole(partial, content)
        return partial
    write_whole(path, content)
    if _ended_early(partial, form):  # of an earlier run
        partial.unlink()
    return path


def _ended_early(path: Path, form: str) -> bool:
    """Whether this file is there, and is the report of a run that ended early."""
    try:
        return MARKS[form] in path.read_bytes()
    except OSError:
        return False
