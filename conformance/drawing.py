"""Drawing the cases of a check: Hypothesis, set up so that a seed always means the same cases."""

import importlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

from refspan.conformance.registry import Check


def drawn(check: Check, dtype: np.dtype, seed: int, examples: int) -> list[Any]:
    """The cases that `run` asks of a backend that passes, in their order."""
    cases: list[Any] = []

    def collect(case: Any) -> None:
        cases.append(case)

    ask_all(check, dtype, seed, examples, collect)
    return cases


AT_ONCE = 10
"""Examples of one run of Hypothesis. After as many it goes on with small changes of each, which differ too little."""


def ask_all(check: Check, dtype: np.dtype, seed: int, examples: int, ask: Callable[[Any], None]) -> None:
    """Call `ask` with the cases of a check; what it raises shrinks the case, and is raised in the end.

    Raises:
        Flaky: asked the same again, `ask` did something else.
    """
    cases = check.cases(dtype)
    if not isinstance(cases, Sequence):
        _draw(cases, f"{seed} {check.id} {dtype}", max(1, examples // check.cost), ask)
        return
    for place, case in enumerate(cases):
        if isinstance(case, SearchStrategy):
            share = examples // check.cost // len(cases) + (place < examples // check.cost % len(cases))
            _draw(case, f"{seed} {check.id} {dtype} {place}", max(1, share), ask)
        else:
            ask(case)


def _draw(cases: SearchStrategy[Any], seed: str, left: int, ask: Callable[[Any], None]) -> None:
    turn = 0
    while left > 0:
        # Each run begins with the plainest case there is. Once is enough, and not as the very first question: it has
        # no memories, so that a backend whose first call goes wrong would be right all the same.
        last = left <= AT_ONCE
        count = min(AT_ONCE, left + (not last))
        own_seed = zlib.crc32(f"{seed} {turn}".encode())
        _ask_some(cases, own_seed, count, ask if last else _but_the_first(ask))
        left -= count - (not last)
        turn += 1


def _but_the_first(ask: Callable[[Any], None]) -> Callable[[Any], None]:
    """`ask`, which is not called the first time."""
    called = False

    def later(case: Any) -> None:
        nonlocal called
        if called:
            ask(case)
        called = True

    return later


def _ask_some(cases: SearchStrategy[Any], seed: int, examples: int, ask: Callable[[Any], None]) -> None:
    decorate = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )

    def asked(case: Any) -> None:
        ask(case)

    with warnings.catch_warnings(), _no_local_constants():
        warnings.simplefilter("ignore", HypothesisWarning)  # about the size of cases, which we describe ourselves
        hypothesis.seed(seed)(decorate(given(cases)(asked)))()


@contextmanager
def _no_local_constants() -> Iterator[None]:
    """Keep Hypothesis from drawing "local constants", numbers that it finds in the source of loaded modules.

    Which modules it takes for local depends on how refspan was installed and on what else is at work, so the same seed
    would mean other cases in someone else's CI than in the command that shows a failure again. There is no setting for
    it. Hypothesis would also keep what it finds, in a folder `.hypothesis` of the current directory.
    """
    try:
        providers: Any = importlib.import_module("hypothesis.internal.conjecture.providers")
        find, nothing, cache = providers._get_local_constants, providers.Constants, providers.CONSTANTS_CACHE.cache
    except (ImportError, AttributeError):  # a version without this habit
        yield
        return
    cache.clear()
    providers._get_local_constants = nothing
    try:
        yield
    finally:
        providers._get_local_constants = find
        cache.clear()
