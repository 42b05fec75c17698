"""Backends that break more than numbers, for `path/to/file.py:attribute`."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

from refspan.conformance.mutants.dense import Dense


class Exits(Dense):
    """Ends its process."""

    def soft_mask(self, span, age, *, queries, ramp):
        os._exit(3)


class Crashes(Dense):
    """Dies by a signal."""

    def soft_mask(self, span, age, *, queries, ramp):
        ctypes.string_at(0)


class StartsOnce(Exits):
    """Ends its process, and holds on to something that the next one needs."""

    def __init__(self):
        lock = os.environ["REFSPAN_TEST_LOCK"]
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))


class OwnException(BaseException):
    """Not even an Exception."""


class RaisesItsOwn(Dense):
    """Raises what nobody catches."""

    def soft_mask(self, span, age, *, queries, ramp):
        raise OwnException("\x1b[31mred\nlines")


class CallsExit(Dense):
    """Asks the interpreter to end."""

    def soft_mask(self, span, age, *, queries, ramp):
        sys.exit(0)


class Prints(Dense):
    """Talks a lot, on both streams."""

    def soft_mask(self, span, age, *, queries, ramp):
        print("noise" * 100)
        print("noise" * 100, file=sys.stderr)
        return super().soft_mask(span, age, queries=queries, ramp=ramp)


class MaskOnly:
    """Offers one operation."""

    name = "mask-only"
    span_attention = None

    def soft_mask(self, span, age, *, queries, ramp):
        return Dense().soft_mask(span, age, queries=queries, ramp=ramp)


class OffersNothing:
    """Has no operation at all."""

    name = "nothing"


class OnlySingle(Dense):
    """Takes float32 alone."""

    dtypes = ("float32",)


class Choosy(Dense):
    """Has an option."""

    def __init__(self, device="cpu"):
        self.device = device

    def facts(self):
        return {"device": self.device}


class CannotStart(Dense):
    """Raises when it is made."""

    def __init__(self):
        raise RuntimeError("no licence\nfound")


instance = Dense()


def factory():
    return Dense()


class UnlistedLayout(Dense):
    """Wrong for a single case: more than five memories, old ones."""

    def soft_mask(self, span, age, *, queries, ramp):
        mask = super().soft_mask(span, age, queries=queries, ramp=ramp)
        return mask * (age.max(initial=0) <= 1000)


def note():
    """Say in a file who we are: whoever waits for it knows that it has come to this."""
    mark = Path(os.environ["REFSPAN_TEST_MARK"])
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)


class Spins(Dense):
    """Never comes back, and hears nothing."""

    def soft_mask(self, span, age, *, queries, ramp):
        note()
        while True:
            pass


class LoadsForEver(Dense):
    """Is never there."""

    def __init__(self):
        note()
        time.sleep(100)


class LeavesProcesses(Dense):
    """Starts one that holds on to our output, one in a group of its own and one that nobody knows; they would stay."""

    def soft_mask(self, span, age, *, queries, ramp):
        self.leave()
        return super().soft_mask(span, age, queries=queries, ramp=ramp)

    def leave(self):
        words = ["sleep", os.environ["REFSPAN_TEST_SLEEP"]]
        for options in ({}, {"start_new_session": True}):
            subprocess.Popen(words, **options)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execvp(words[0], words)  # noqa: S606
            os._exit(0)


class LeavesProcessesAndHangs(LeavesProcesses):
    def soft_mask(self, span, age, *, queries, ramp):
        self.leave()
        time.sleep(100)


class LeavesProcessesAndDies(LeavesProcesses):
    def soft_mask(self, span, age, *, queries, ramp):
        self.leave()
        os._exit(3)
