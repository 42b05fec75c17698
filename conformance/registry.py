"""What a check is, and the list of them all."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis.strategies import SearchStrategy

from refspan.clauses import CLAUSES
from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.guard import Misbehaviour, NotOffered, Shapes
from refspan.conformance.programs import Program
from refspan.conformance.protocol import Array
from refspan.conformance.sessions import Session
from refspan.conformance.tolerance import Expected

LARGEST_GRANULARITY = 4096
"""More would be no block of memories, but leave to keep them all."""
LEVELS = ("mask", "attention", "gradient", "memory", "model", "training", "golden")


@dataclass(frozen=True)
class Check:
    """One thing that a backend must get right."""

    id: str
    """"level.name"."""
    clauses: tuple[str, ...]
    purpose: str
    """What it checks, in one line; then, if need be, why."""
    needs: tuple[str, ...]
    """Operations that the backend must offer to be asked."""
    cases: Callable[[np.dtype], SearchStrategy[Any] | Sequence[Any]]
    """Given the dtype of the run: a strategy to draw cases from, several to draw alike from, or all the cases."""
    body: Callable[["Probe", Any], None]
    cost: int = 1
    """How many times as long as usual one case takes; the check gets as many times fewer examples."""
    of_positions: bool = False
    """It is about positions, and about nothing without them."""

    def ask(self, probe: "Probe", case: Any) -> None:
        """Put a case to the backend; a step with positions, if the backend declines these, without.

        Raises:
            Misbehaviour: what the backend did wrong.
            NotOffered: it declines this too.
        """
        plain = case if self.of_positions or not isinstance(case, AttentionCase) else replace(case, position=None)
        try:
            self.body(probe, plain if probe.declines_positions else case)
        except NotOffered:
            if plain is case or case.position is None or probe.declines_positions:
                raise
            self.body(probe, plain)
            probe.declines_positions = True

    @property
    def level(self) -> str:
        """The part of the id before the dot."""
        return self.id.partition(".")[0]


CHECKS: dict[str, Check] = {}
"""Every check by id. They run level by level, see `refspan.conformance.runner.select`."""


def check(
    id: str,  # noqa: A002
    *,
    clauses: Sequence[str],
    needs: Sequence[str],
    cases: Callable[[np.dtype], SearchStrategy[Any] | Sequence[Any]],
    cost: int = 1,
    of_positions: bool = False,
) -> Callable[[Callable[["Probe", Any], None]], Callable[["Probe", Any], None]]:
    """Register the decorated function as the body of a check; its docstring says what it checks."""

    def register(body: Callable[["Probe", Any], None]) -> Callable[["Probe", Any], None]:
        unknown = [clause for clause in clauses if clause not in CLAUSES]
        if unknown or id in CHECKS or id.partition(".")[0] not in LEVELS or not body.__doc__:
            raise ValueError(f"check {id!r} is registered twice, has no docstring or cites unknown clauses {unknown}")
        CHECKS[id] = Check(id, tuple(clauses), body.__doc__.strip(), tuple(needs), cases, body, cost, of_positions)
        return body

    return register


class Probe:
    """How a check asks the backend, and compares what it says."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.worst = 0.0
        """Largest error so far, as a fraction of its bound."""
        self.declines_positions = False
        """Found out by `Check.ask`."""
        self.backend_seconds = 0.0
        """Spent waiting for the backend."""
        self.results = 0
        """Compared so far."""
        self.asked: tuple[Any, ...] = ()
        """What was asked last."""
        self.compared: dict[str, Expected] = {}
        """What the answers to it were compared with so far, by the names that checks give them."""

    def soft_mask(self, *asked: Memories, at_once: bool = False) -> list[Array]:
        """Masks [B, M, N] of these memories, asked one after the other, or at once on threads."""
        self.asked, self.compared = asked, {}
        shapes = [Shapes({"": ((len(m.span), m.queries, m.span.shape[1]), str(m.span.dtype))}) for m in asked]
        return self._ask(self._how(at_once), "soft_mask", [m.arguments() for m in asked], shapes)

    def attention(self, *asked: AttentionCase, at_once: bool = False) -> list[Array]:
        """Outputs [B, H, M, D] of these attention steps, asked one after the other, or at once on threads."""
        self.asked, self.compared = asked, {}
        shapes = [Shapes({"": (case.query.shape, str(case.query.dtype))}) for case in asked]
        return self._ask(self._how(at_once), "span_attention", [case.arguments() for case in asked], shapes)

    def gradients(self, *asked: AttentionCase, at_once: bool = False) -> list[Mapping[str, Array]]:
        """Gradients of these attention steps by name, asked one after the other, or at once on threads."""
        self.asked, self.compared = asked, {}
        names = ("query", "key", "value", "position")
        shapes = []
        for case in asked:
            like = {name: getattr(case, name) for name in names} | {"span": case.memories.span}
            shapes.append(Shapes({n: (x.shape, str(x.dtype)) for n, x in like.items() if x is not None}))
        calls = [{"grad_out": case.grad_out, **case.arguments()} for case in asked]
        return self._ask(self._how(at_once), "span_attention_backward", calls, shapes)

    def programs(self, *asked: Program, at_once: bool = False) -> list[list[Any]]:
        """Answers to these programs, one per operation, asked one after the other, or at once on threads."""
        self.asked, self.compared = asked, {}
        if at_once:
            return self._ask(self._session.run_programs_at_once, asked)
        return [self._ask(self._session.run_program, program) for program in asked]

    def _how(self, at_once: bool) -> Callable[..., list[Any]]:
        return self._session.call_at_once if at_once else self._session.call

    def _ask(self, ask: Callable[..., list[Any]], *question: Any) -> list[Any]:
        start = time.perf_counter()
        try:
            return ask(*question)
        finally:
            self.backend_seconds += time.perf_counter() - start

    @property
    def memory_granularity(self) -> int:
        """Memories are held in multiples of this, by the backend's own account (`facts()["memory_granularity"]`)."""
        said = self._session.facts.get("memory_granularity", "1")
        if not (re.fullmatch("[0-9]{1,9}", said) and 1 <= int(said) <= LARGEST_GRANULARITY):
            raise Misbehaviour(f"memory_granularity is {said}, expected a whole number from 1 to {LARGEST_GRANULARITY}")
        return int(said)

    def compare(self, what: str, got: Array, expected: Expected, *, place: int | None = None) -> None:
        """Fail unless `got` is within the bound everywhere that the bound decides anything, and nowhere NaN.

        `place` is that of the operation of a program, or of the question, that it answers.

        Raises:
            Misbehaviour: where it is furthest off, what it is and what it should be.
        """
        self.results += 1
        self.compared[what] = expected
        if got.size == 0:
            return
        value, bound = (np.broadcast_to(x, got.shape) for x in (expected.value, expected.bound))
        wide = got.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            error = np.abs(wide - value)
            ratio = np.where(error == 0, 0.0, error / bound)
        ratio = np.where(np.isinf(bound) & ~np.isnan(wide), 0.0, np.where(np.isnan(ratio), np.inf, ratio))
        at = np.unravel_index(np.argmax(ratio), ratio.shape)
        self.worst = max(self.worst, float(ratio[at]))
        if ratio[at] > 1:
            where = f"[{', '.join(str(int(i)) for i in at)}]" if at else ""
            wanted = f"expected {value[at]:.9g} +- {bound[at]:.2g}"
            off = f"off by {error[at]:.3g}, {ratio[at]:.3g} times the bound"
            if np.isnan(value[at]):  # see `agree`
                wanted, off = "the answer that it should agree with nan", "neither may be nan"
            raise Misbehaviour(
                f"{what}{where} is {wide[at]:.9g}, {wanted} ({off})", row=int(at[0]) if at else 0, place=place
            )

    def agree(self, what: str, got: Array, other: Array, bound: Array) -> None:
        """Fail unless two answers that should be equal are, both having been allowed an error of `bound`."""
        with np.errstate(invalid="ignore"):
            self.compare(what, got, Expected(other.astype(np.float64), 2 * bound))
