"""Ctrl-C for work that ends well only between two of its parts."""

import signal


def note_interrupts() -> list[int]:
    """A list that is no longer empty once Ctrl-C was pressed; whoever works looks at it before the next part.

    An exception at any point, as Python has it, may leave something half-done, or meet a callback and be dropped there
    with a traceback. Pressed twice, Ctrl-C does that all the same.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    return received
