"""Asking a backend, until the user has had enough."""

from functools import partial
from typing import Any

from refspan.errors import SetupError
from refspan.interrupt import Interrupts


def loaded(stop: Interrupts, backend_name: str, **options: Any) -> Any:
    """The backend's session; None if the user has had enough before there is one."""
    from refspan.conformance.loading import session_of

    try:
        with stop.waiting():
            return session_of(backend_name, **options)
    except (KeyboardInterrupt, SetupError):  # SetupError: its process was told to end, too
        if not stop:
            raise
        return None


class Interruptible:
    """A session that ends at once when the user has had enough: a backend may take long, and is not needed any more."""

    def __init__(self, session: Any, stop: Interrupts) -> None:
        self._session, self._stop = session, stop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        return partial(self._ask, found) if callable(found) else found

    def _ask(self, ask: Any, *question: Any) -> Any:
        from refspan.conformance.guard import Misbehaviour

        try:
            with self._stop.waiting():
                return ask(*question)
        except Misbehaviour:
            if self._stop:  # a signal for all processes of ours has ended the backend, too
                raise KeyboardInterrupt from None
            raise


def ask_and_print(session: Any, checks: Any, report: Any, stop: Interrupts, *, examples: int, **options: Any) -> None:
    """Print a line per check as it finishes; on a terminal a bar shows the one at work."""
    from tqdm import tqdm

    from refspan.conformance.report import escaped
    from refspan.conformance.runner import run

    # disable=None: no bar where stderr is no terminal
    with tqdm(total=examples * len(checks), disable=None, leave=False, unit="ex", dynamic_ncols=True) as bar:

        def tick(check: Any, example: int) -> None:
            if stop:
                raise KeyboardInterrupt
            if example == 0:
                bar.set_description(check.id)
            if example < examples:
                bar.update()

        for done, result in enumerate(run(session, checks, report, examples=examples, tick=tick, **options), start=1):
            bar.n = done * examples
            bar.refresh()
            bar.write(result.line())
            if result.failure is not None:
                lines = [result.failure.message, *(f"  {line}" for line in result.failure.counterexample)]
                for line in [*lines, f"replay: {result.failure.replay}"]:
                    bar.write(f"      {escaped(line)}")
