"""The other side of `refspan.conformance.sessions.Worker`: a Python backend in a process of its own.

Messages are pickles behind their length. The first holds a function that makes the backend, the others hold questions;
each has a number, which the reply repeats.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from refspan.conformance.facts import dtypes_of, facts_of
from refspan.conformance.guard import not_foreseen, one_line
from refspan.conformance.replies import Reply, reply_of
from refspan.errors import SetupError

LARGEST = 1 << 31
"""Bytes of a message."""

START = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv.pop())
from refspan.conformance.external.worker import main
main()
"""
"""What the other interpreter does. Ctrl-C is for the checker, which then ends it."""


def command() -> list[str]:
    """Words that start an interpreter like this one, with `main` in it."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", START, json.dumps([str(place) for place in sys.path])]


def packed(content: Any) -> bytes:
    """A message."""
    data = pickle.dumps(content)
    return len(data).to_bytes(8, "little") + data


def unpacked(read: Callable[[int], bytes | bytearray]) -> Any:
    """The content of the next message; raises EOFError if there is none, and whatever else if it is none."""
    size = int.from_bytes(read(8), "little")
    if not 0 < size <= LARGEST:
        raise EOFError(f"a message of {size} bytes")
    return pickle.loads(read(size))  # noqa: S301 - from a process that runs the same code


def main() -> None:
    """Load the backend, say what it is, and answer until nobody asks."""
    asked, replies, process = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), os.getpid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the backend prints must not mix with the replies

    def answer(number: int, reply: Reply) -> None:
        if os.getpid() != process:  # the backend has forked, and this is not the process that was asked
            os._exit(0)
        try:
            data = packed((number, *reply))
        except Exception as error:  # noqa: BLE001 - what cannot be sent is not what was asked for
            data = packed((number, "wrong", str(not_foreseen(error))))
        replies.write(data)
        replies.flush()

    try:
        number, load = unpacked(asked.read)
        backend, said = _loaded(load)
        answer(number, said)
        while backend is not None:
            number, question = unpacked(asked.read)
            answer(number, reply_of(backend, question))
    except (EOFError, OSError):
        pass
    _end()


def _loaded(load: Callable[[], Any]) -> tuple[Any, Reply]:
    """The backend, and what it says of itself; or None, and why there is none."""
    try:
        backend = load()
        return backend, ("ready", (facts_of(backend), dtypes_of(backend)))
    except SetupError as error:
        return None, ("setup", one_line(error, 2000))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the backend did it
        return None, ("setup", f"the backend could not be loaded: {type(error).__name__}: {one_line(error)}")


def _end() -> NoReturn:
    """At once: threads of the backend might never end."""
    for stream in (sys.stdout, sys.stderr):  # None, or anything else, if the backend has put it there
        with suppress(Exception):
            stream.flush()
    os._exit(0)
