"""A command whose stdin, stdout and stderr are pipes, none of which can make us wait for ever."""

import os
import select
import shlex
import signal
import subprocess
import time
from contextlib import suppress

from refspan.conformance.guard import one_line
from refspan.conformance.sessions import Hung
from refspan.errors import SetupError

CHUNK = 1 << 16
LAST_WORDS = 250
"""Bytes of the end of stderr that are kept and shown."""
LONGEST_LINE = 1 << 20
"""Bytes of a header."""


class Child:
    """A running command, with everything that it starts.

    What it writes is read only when something is expected from it, and its stderr whenever anything is; so one that
    talks without end fills its own pipe, not our memory.
    """

    def __init__(self, command: str) -> None:
        """Raises SetupError if the command cannot be started."""
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise SetupError(f"exec:{command}: {error}") from None
        if not words:
            raise SetupError("exec: expected a command, as in exec:./my-backend")
        try:
            self._process = subprocess.Popen(  # noqa: S603 - running it is what was asked for
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # it can then be ended with all that it started, and Ctrl-C is for us alone
            )
        except OSError as error:
            raise SetupError(f"exec:{command}: cannot be started: {error.strerror or error}") from None
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        assert self._process.stderr is not None  # noqa: S101
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._err: int | None = self._process.stderr.fileno()
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe, False)
        self._read = bytearray()
        """What it wrote and nobody has taken yet."""
        self._said = bytearray()
        """The end of its stderr."""
        self._closed = False
        self._deadline = 0.0
        self._what = ""

    def begin(self, what: str, seconds: float) -> None:
        """From now on everything is about `what`, and must be over within so many seconds."""
        self._deadline, self._what, self._seconds = time.monotonic() + seconds, what, seconds

    def write(self, data: bytes) -> None:
        """Hand over `data`, or as much as it reads before it ends: that shows when it is asked what it has to say.

        Raises:
            Hung: the command does not read it in time.
        """
        view = memoryview(data)
        while view:
            self._wait(writing=True)
            try:
                view = view[os.write(self._in, view[:CHUNK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return

    def line(self) -> bytes:
        """The next line of its stdout, without the line break; raises Hung."""
        while (end := self._read.find(b"\n")) < 0:
            if len(self._read) > LONGEST_LINE:
                raise Hung(f"{self._what}: a header of more than {LONGEST_LINE} bytes without a line break")
            self._more()
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        return line

    def read(self, count: int) -> bytes:
        """The next `count` bytes of its stdout; raises Hung."""
        while len(self._read) < count:
            self._more()
        data = bytes(self._read[:count])
        del self._read[:count]
        return data

    def stderr(self) -> str:
        """The end of what it wrote to stderr, on one line."""
        self._take_stderr()
        return one_line(self._said[-LAST_WORDS:].decode(errors="replace"))

    def close(self, *, last_words: bytes = b"", seconds: float = 1.0) -> None:
        """End it together with all that it started; for a moment it may do so itself. Closing again does nothing."""
        if self._closed:  # the numbers of its pipes and process may be somebody else's by now
            return
        self._closed = True
        self.begin("stop", seconds)
        with suppress(Hung):
            self.write(last_words)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._err = None
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        finally:
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _more(self) -> None:
        """Read what there is of its stdout, at least a byte."""
        self._wait(writing=False)
        try:
            data = os.read(self._out, CHUNK)
        except BlockingIOError:
            return
        if not data:
            raise Hung(self._ended())
        self._read += data

    def _wait(self, *, writing: bool) -> None:
        """Until stdin takes, or stdout has, something; stderr is read meanwhile."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                doing = "read its input" if writing else "answer"
                raise Hung(f"{self._what}: the command did not {doing} within {self._seconds:g} s{self._words()}")
            reading = [pipe for pipe in (None if writing else self._out, self._err) if pipe is not None]
            ready, writable, _ = select.select(reading, [self._in] if writing else [], [], left)
            if self._err in ready:
                self._take_stderr()
            if writable or self._out in ready:
                return

    def _take_stderr(self) -> None:
        while self._err is not None:
            try:
                data = os.read(self._err, CHUNK)
            except BlockingIOError:
                return
            if not data:
                self._err = None
                return
            self._said += data
            del self._said[:-LAST_WORDS]
            if len(data) < CHUNK:
                return

    def _words(self) -> str:
        said = self.stderr()
        return f"; its stderr ends: {said}" if said else ""

    def _ended(self) -> str:
        """Why it does not talk to us any more."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"{self._what}: the command closed its stdin or stdout{self._words()}"
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"{self._what}: the command ended {how}{self._words()}"
