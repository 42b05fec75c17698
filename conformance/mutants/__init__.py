"""Wrong backends, on which the suite is tried: `refspan check --self-test`.

from refspan.conformance.mutants import MUTANTS, RIGHT

Each is a small, documented change of a right one: `Dense`, an attention step on full arrays; `Plain`, a model that
reads one token at a time; or the reference itself with a function replaced (`training`). The right ones are there too:
the suite must accept them. `edited` makes copies of the reference with other source, for automatic mutation.
"""

from collections.abc import Callable
from typing import Any

from refspan.conformance.backends.reference import NumpyBackend, SmallTiles
from refspan.conformance.mutants import (  # noqa: F401 - each puts its own on the list
    behaviour,
    gradients,
    kept,
    learning,
    limits,
    mask,
    memory,
    models,
    sizes,
    states,
    streams,
    tiles,
    training,
    weights,
)
from refspan.conformance.mutants.dense import ClipsNegativeSpans, Dense, DividesLate, LearnsAtTheKinks
from refspan.conformance.mutants.plain import Plain
from refspan.conformance.mutants.registry import MUTANTS, Mutant

__all__ = ["MUTANTS", "RIGHT", "Mutant"]

RIGHT: dict[str, Callable[[], Any]] = {
    "numpy": NumpyBackend,
    "SmallTiles": SmallTiles,
    "Dense": Dense,
    "ClipsNegativeSpans": ClipsNegativeSpans,
    "DividesLate": DividesLate,
    "LearnsAtTheKinks": LearnsAtTheKinks,
    "Plain": Plain,
}
"""Right backends by name."""
