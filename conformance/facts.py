"""What a backend says about itself, in plain words: it goes into the head of a report, and to a terminal."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from refspan.conformance.guard import one_line
from refspan.errors import SetupError

OURS = ("refspan", "backend", "command", "dtype", "seed", "examples", "python")
"""Facts that the checker states; what a backend states under such a name is shown as its own."""
MOST_FACTS = 32


def facts_of(backend: Any) -> dict[str, str]:
    """What a backend says about itself: its name, and the pairs that an optional `facts()` returns.

    Raises:
        SetupError: it cannot say.
    """
    try:
        name = getattr(backend, "name", type(backend).__name__)
        describe = getattr(backend, "facts", None)
        said = _pairs(describe() or {}) if callable(describe) else {}
    except SetupError:
        raise
    except Exception as error:
        raise SetupError(f"name or facts() of the backend: {type(error).__name__}: {one_line(error)}") from error
    return {"backend": one_line(name), **plain_facts(said)}


def _pairs(said: Any) -> dict[Any, Any]:
    """A mapping or pairs, of which there may be no end, as `dict` takes them."""
    return dict(islice(said.items() if isinstance(said, Mapping) else said, MOST_FACTS))


def plain_facts(said: Mapping[Any, Any]) -> dict[str, str]:
    """Facts as a report can show them, none in the place of one of its own."""
    facts = {}
    for name, value in islice(said.items(), MOST_FACTS):
        plain = one_line(name, 40) or "?"
        facts[f"backend {plain}" if plain in OURS else plain] = one_line(value)
    return facts


def dtypes_of(backend: Any) -> tuple[str, ...]:
    """The optional attribute `dtypes` of a backend.

    Raises:
        SetupError: it is no list of names.
    """
    try:
        dtypes = getattr(backend, "dtypes", ())
        return plain_dtypes([dtypes] if isinstance(dtypes, str) else dtypes)
    except Exception as error:
        raise SetupError(f"`dtypes` of the backend: {type(error).__name__}: {one_line(error)}") from error


def plain_dtypes(said: Iterable[Any]) -> tuple[str, ...]:
    """Names of dtypes as they can be shown."""
    return tuple(one_line(dtype, 40) for dtype in islice(said, MOST_FACTS))
