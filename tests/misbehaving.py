"""Backends that break more than numbers, for `path/to/file.py:attribute`."""

import ctypes
import os
import sys

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
