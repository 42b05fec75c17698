"""What a run found out: one object, from which every form of report is made."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "not offered"]


@dataclass(frozen=True)
class Failure:
    """How a backend fails a check."""

    message: str
    """What it did wrong, in one line."""
    counterexample: tuple[str, ...]
    """The smallest case in which it does, a line each."""
    replay: str
    """The command that shows it again."""


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
    failure: Failure | None = None

    def line(self) -> str:
        """The result in one line."""
        mark = {"passed": "pass", "failed": "FAIL", "not offered": "----"}[self.status]
        error = "not offered" if self.status == "not offered" else f"error/bound {self.worst:<8.2g}"
        cost = "" if self.status == "not offered" else f"{self.examples:>5} examples {self.seconds:6.1f} s  "
        return f"{mark}  {self.check:<28} {error:<21} {cost}{' '.join(self.clauses)}"


@dataclass
class Report:
    """A whole run."""

    facts: Mapping[str, str]
    """What was asked and how: versions, backend, device, execution provider, dtype, seed, examples."""
    results: list[Result] = field(default_factory=list)
    complete: bool = False
    """False until the last check has finished."""

    def count(self, status: Status) -> int:
        """How many checks ended so."""
        return sum(result.status == status for result in self.results)

    @property
    def conforms(self) -> bool:
        """True if all checks ran, at least one was offered, and none failed."""
        return self.complete and self.count("failed") == 0 and self.count("passed") > 0

    def header(self) -> Iterable[str]:
        """The facts, a line each."""
        width = max(len(name) for name in self.facts)
        return [f"{name:<{width}}  {value}" for name, value in self.facts.items()]

    def summary(self) -> str:
        """The last line."""
        passed, failed, missing = (self.count(s) for s in ("passed", "failed", "not offered"))
        line = f"{passed} passed, {failed} failed, {missing} not offered"
        return line if self.complete else f"{line}, INCOMPLETE"

    def to_json(self) -> str:
        """The whole report; numbers that JSON cannot hold become strings."""
        tree = {
            "refspan_report": 1,
            "complete": self.complete,
            "conforms": self.conforms,
            "facts": dict(self.facts),
            "summary": {s.replace(" ", "_"): self.count(s) for s in ("passed", "failed", "not offered")},
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    if isinstance(tree, float) and (tree != tree or tree in (float("inf"), float("-inf"))):
        return str(tree)
    return tree
