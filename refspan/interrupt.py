"""Ctrl-C for work that ends well only between two of its parts."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

PATIENCE = 1.0
"""Seconds after Ctrl-C in which pressing it again changes nothing."""


class Interrupts:
    """Notes Ctrl-C; true once it was pressed. Whoever works looks at it before the next part.

    An exception at any point, as Python has it, may leave something half-done, or meet a callback and be dropped there
    with a traceback. Pressed again more than `PATIENCE` seconds later, Ctrl-C does that all the same, and once more
    ends the process.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._waiting = False
        signal.signal(signal.SIGINT, self._note)

    def __bool__(self) -> bool:
        return self._first is not None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In this `with` block nothing is lost by ending at once: raises KeyboardInterrupt there."""
        self._waiting = True
        try:
            if self:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False

    def _note(self, _number: int, _frame: object) -> None:
        now = monotonic()
        if self._first is None:
            self._first = now
            if self._waiting:
                raise KeyboardInterrupt
        elif now - self._first > PATIENCE:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
