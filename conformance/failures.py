"""From what a check found to what a report shows of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.guard import Hung, Misbehaviour, NotOffered
from refspan.conformance.model_cases import ModelCase
from refspan.conformance.pictures import pictures_of
from refspan.conformance.registry import Check, Probe
from refspan.conformance.report import Failure
from refspan.conformance.sessions import Session
from refspan.conformance.tolerance import Expected
from refspan.conformance.vectors.program_vector import program_vector_of
from refspan.conformance.vectors.reading import AnyVector
from refspan.conformance.vectors.replay import checks_of
from refspan.conformance.vectors.vector import OF_LEVEL, vector_of


@dataclass(frozen=True)
class Found:
    """A failure, and what showed it."""

    check: Check
    case: Any
    error: Misbehaviour
    questions: tuple[Any, ...]
    """All that were asked, one after the other."""
    compared: Mapping[str, Expected]
    """What the answer was compared with, if there was one question."""

    @property
    def question(self) -> Any:
        """The question that was answered wrongly, if that is known, or else the case."""
        if len(self.questions) == 1:
            return self.questions[0]
        if isinstance(self.case, AttentionCase | Memories) and self.error.place is not None:
            return self.questions[self.error.place]
        return self.case


def failure_of(session: Session, found: Found, note: str, replay: str) -> tuple[Failure, AnyVector | None]:
    """What is shown, and a vector of the question that fails when it is asked alone, if there is one."""
    question, vector = _alone(session, found)
    shown = question if isinstance(found.case, AttentionCase | Memories) else found.case
    if isinstance(shown, AttentionCase | Memories):
        described = shown.describe(found.error.row)
    elif isinstance(shown, ModelCase):
        described = shown.describe(found.error.place)
    else:
        described = shown.describe()
    if vector is None and len(found.questions) > 1:
        described.append(f"one of {len(found.questions)} questions, none of which can be saved as one that fails alone")
    pictures = tuple(pictures_of(shown, found.error.row))
    return Failure(f"{found.error}{note}", tuple(described), replay, pictures), vector


def _alone(session: Session, found: Found) -> tuple[Any, AnyVector | None]:
    """Which question to show, and as a vector if it can be one, and fails when nothing else is asked."""
    if len(found.questions) == 1 or isinstance(found.error, Hung):
        return found.question, _frozen(found, found.question)
    for question in (found.question, *found.questions):
        vector = _frozen(found, question)
        if vector is not None and _fails(session, vector):
            return question, vector
    return found.question, None


def _frozen(found: Found, question: Any) -> AnyVector | None:
    """A question as a vector; None if it cannot be one."""
    about: dict[str, Any] = {
        "check": found.check.id,
        "clauses": found.check.clauses,
        "purpose": found.check.purpose.partition("\n")[0],
    }
    if (operation := OF_LEVEL.get(found.check.level)) is not None:
        return vector_of(question, operation, compared=found.compared, **about)
    return program_vector_of(question, notes=getattr(found.case, "notes", ()), **about)


def _fails(session: Session, vector: AnyVector) -> bool:
    """Whether a question is answered wrongly when nothing else is asked."""
    (check,) = checks_of([vector])
    try:
        with np.errstate(all="ignore"):
            check.body(Probe(session), vector)
    except Misbehaviour:
        return True
    except NotOffered:
        pass
    return False
