"""How often a backend that dies is started anew: for as long as that does not take too long altogether."""

import time
from collections.abc import Callable
from typing import TypeVar

from refspan.errors import SetupError

SECONDS = 300.0
Started = TypeVar("Started")


class Patience:
    """Starts something again and again, until that has taken `SECONDS` altogether."""

    def __init__(self) -> None:
        self._spent = 0.0

    def start(self, start: Callable[[], Started]) -> Started:
        """What `start` returns; raises SetupError if there was enough of it, and whatever `start` raises."""
        if self._spent > SECONDS:
            raise SetupError(f"to start it again and again has taken more than {SECONDS:g} s")
        begin = time.monotonic()
        try:
            return start()
        finally:
            self._spent += time.monotonic() - begin
