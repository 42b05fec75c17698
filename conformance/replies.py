"""What a backend is asked, and the reply, on their way to and from where it runs."""

from collections.abc import Callable
from typing import Any

from refspan.conformance.guard import Hung, Misbehaviour, NotOffered, not_foreseen

Question = Callable[[Any], list[Any]]
"""What a backend is asked: a picklable function of it."""

Reply = tuple[str, Any]
"""A word that says what it is, and the answers, or what went wrong."""


def reply_of(backend: Any, question: Question) -> Reply:
    """Ask; whatever comes of it is a reply."""
    try:
        return "result", question(backend)
    except NotOffered as error:
        return "not offered", str(error)
    except Misbehaviour as error:
        return "wrong", str(error)
    except Exception as error:  # noqa: BLE001 - questions are of our making, so the answer is at fault
        return "wrong", str(not_foreseen(error))


def answers_in(reply: Reply) -> list[Any]:
    """The answers of a reply; raises what else it says."""
    kind, content = reply
    if kind == "result" and isinstance(content, list):
        return content
    raise {"not offered": NotOffered, "hung": Hung}.get(kind, Misbehaviour)(content)
