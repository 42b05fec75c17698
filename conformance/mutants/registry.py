"""What a mutant is, and the list of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Mutant:
    """A wrong backend: a small change of a right one."""

    name: str
    make: Callable[[], Any]
    """Makes the backend."""
    change: str
    """What is wrong about it, in one line."""
    area: str
    """What the change is about: the module that it is in."""
    killed_by: tuple[str, ...]
    """Checks, by id, that must reject it at default settings, each by itself."""
    seen_in: str = ""
    """A published implementation, or a kind of them, that has this flaw."""
    hangs: bool = False
    """It does not come back, so that one need not wait long for it."""


MUTANTS: dict[str, Mutant] = {}
"""Every mutant by name; `refspan.conformance.mutants` fills it."""


def mutant(
    *killed_by: str, seen_in: str = "", stream: Callable[..., Any] | None = None, hangs: bool = False
) -> Callable[[Class], Class]:
    """Register the decorated class; its docstring says what is wrong about it.

    Args:
        killed_by: checks that must reject it.
        seen_in: a published implementation that has the flaw.
        stream: what opens its models, if it is the streams that are wrong.
        hangs: it never comes back.
    """

    def register(cls: Class) -> Class:
        made: Any = cls
        made.name = cls.__name__
        if stream is not None:
            made.open_model = lambda self, config, params, *, batch, memory=None: stream(
                self, config, params, batch, memory
            )
        area = cls.__module__.rpartition(".")[2]
        add(Mutant(cls.__name__, cls, (cls.__doc__ or "").strip(), area, killed_by, seen_in, hangs))
        return cls

    return register


def add(one: Mutant) -> None:
    """Put a mutant on the list; raises ValueError if its name is taken, or it does not say what is wrong about it."""
    if one.name in MUTANTS or not one.change or not one.killed_by:
        raise ValueError(f"mutant {one.name} is there twice, or says nothing of itself or of what must reject it")
    MUTANTS[one.name] = one
