"""Ctrl-C, and being asked to end in other ways, for work that ends well only between two of its parts."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import click

PATIENCE = 1.0
"""Seconds after Ctrl-C in which pressing it again changes nothing."""

OTHERS = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
"""What `timeout`, a job that is cancelled and a terminal that is closed send: as Ctrl-C."""


class Interrupts:
    """Notes Ctrl-C; true once it was pressed. Whoever works looks at it before the next part.

    An exception at any point, as Python has it, may leave something half-done, or meet a callback and be dropped there
    with a traceback. Pressed again more than `PATIENCE` seconds later, Ctrl-C does that all the same, and once more
    ends the process; all that as soon as Python runs: a call of a library ends first. The signals of `OTHERS` are the
    same as Ctrl-C until the command ends, unless the process was started to ignore them, as by nohup.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._number = signal.SIGINT
        self._waiting = False
        signal.signal(signal.SIGINT, self._note)
        before = {number: signal.getsignal(number) for number in OTHERS}
        self._before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._note)
        if (context := click.get_current_context(silent=True)) is not None:
            context.call_on_close(self._let_go)  # nobody looks any more, and the process may go on (in tests)

    def __bool__(self) -> bool:
        return self._first is not None

    @property
    def status(self) -> int:
        """Exit status that says what ended the work: 128 and the number of the first signal, 130 after Ctrl-C."""
        return 128 + self._number

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

    def _note(self, number: int, _frame: object) -> None:
        now = monotonic()
        if self._first is None:
            self._first, self._number = now, signal.Signals(number)
            if self._waiting:
                raise KeyboardInterrupt
        elif now - self._first > PATIENCE:
            for each in (signal.SIGINT, *self._before):
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt

    def _let_go(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
