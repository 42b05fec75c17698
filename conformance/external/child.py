"""A command whose stdin, stdout and stderr are pipes, none of which can make us wait for ever."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path

from refspan.conformance.guard import Hung, one_line
from refspan.errors import SetupError

WARDEN = str(Path(__file__).with_name("warden.py"))
CHUNK = 1 << 16
WORDS = 250
"""Bytes of stderr that are kept and shown of its end, and as many of its beginning since it was asked."""
LONGEST_LINE = 1 << 20
"""Bytes of a header."""
RELAYED = 1 << 20
"""Bytes of what goes to our own stderr that a process may write there."""
KILL_SECONDS = 10.0
"""For the warden to do its work."""


class Child:
    """A running command, with everything that it starts.

    What it writes is read only when something is expected from it, and its stderr whenever anything is; so one that
    talks without end fills its own pipe, not our memory. It is not our child but that of a warden, which ends with it,
    ends it together with all that it started, and does so too when this process is gone without a word.

    Args:
        words: the command and its arguments.
        who: what messages call it.
        hear_stderr: keep some of its stderr for messages. Otherwise it goes to ours, as much of it as one may read.
    """

    def __init__(self, words: Sequence[str], *, who: str = "the command", hear_stderr: bool = True) -> None:
        """Raises SetupError if there cannot be any process."""
        self._who, self._hear_stderr = who, hear_stderr
        self._line, other = socket.socketpair()
        with other, socket.socket(fileno=fcntl(other.fileno(), F_DUPFD_CLOEXEC, 3)) as theirs:  # no number of a stream
            about = (str(theirs.fileno()), str(os.getpid()))
            try:
                self._process = subprocess.Popen(  # noqa: S603 - running it is what was asked for
                    [sys.executable, "-I", "-S", WARDEN, *about, *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for us alone
                )
            except OSError as error:
                self._line.close()
                raise SetupError(f"{who} cannot be started: {error.strerror or error}") from None
        self._line.setblocking(False)
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        assert self._process.stderr is not None  # noqa: S101
        self._stderr = self._process.stderr
        self._err: int | None = self._stderr.fileno()
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe, False)
        self._read = bytearray()
        """What it wrote and nobody has taken yet."""
        self._came, self._in_line = 0, True
        """Bytes of its stdout since it was asked, and whether a line is waited for."""
        self._first, self._said, self._much = bytearray(), bytearray(), 0
        """Of its stderr the beginning since it was asked, the end, and how much there is since it was asked."""
        self._relayed = 0
        self._closed = False
        self._deadline = 0.0
        self._what = ""

    def begin(self, what: str, seconds: float) -> None:
        """From now on everything is about `what`, and must be over within so many seconds."""
        self._take_stderr()
        self._came, self._first, self._much = len(self._read), bytearray(), 0
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
        self._in_line = True
        while (end := self._read.find(b"\n")) < 0:
            if len(self._read) > LONGEST_LINE:
                raise Hung(f"{self._what}: a header of more than {LONGEST_LINE} bytes without a line break")
            self._read += self._some(CHUNK)
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        return line

    def read(self, count: int) -> bytearray:
        """The next `count` bytes of its stdout; raises Hung."""
        self._in_line = False
        data = self._read[:count]
        del self._read[:count]
        while len(data) < count:
            data += self._some(count - len(data))
        return data

    def stderr(self) -> str:
        """What it wrote to stderr, on one line: the end, and where more came since it was asked, the beginning too."""
        self._take_stderr()
        if self._much > 2 * WORDS:
            return " .. ".join(one_line(part.decode(errors="replace")) for part in (self._first, self._said))
        said = self._said if self._much <= WORDS else self._first + self._said[WORDS - self._much :]
        return one_line(said.decode(errors="replace"), 2 * WORDS)

    def close(self, *, last_words: bytes = b"", seconds: float = 1.0) -> None:
        """End it together with all that it started; for a moment it may do so itself. Closing again does nothing."""
        if self._closed:  # the numbers of its pipes and process may be somebody else's by now
            return
        self._closed = True
        self.begin("stop", seconds)
        try:
            with suppress(Hung):
                self.write(last_words)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._take_the_rest_of_stderr()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._deadline - time.monotonic()))
        finally:
            self._kill()

    def _kill(self) -> None:
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # closed alone, it might be open in a copy of this process
        self._line.close()
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:  # somebody has stopped the warden; without it the command ends too
            self._process.kill()
            self._process.wait()

    def _some(self, most: int) -> bytes:
        """Read what there is of its stdout, up to so much."""
        self._wait(writing=False)
        try:
            data = os.read(self._out, min(most, CHUNK))
        except BlockingIOError:
            return b""
        if not data:
            raise Hung(self._ended())
        self._came += len(data)
        return data

    def _wait(self, *, writing: bool) -> None:
        """Until stdin takes, or stdout has, something; stderr is read meanwhile."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                doing = "read its input" if writing else "answer"
                came = "" if writing else self._so_far()
                raise Hung(f"{self._what}: {self._who} did not {doing} within {self._seconds:g} s{came}{self._words()}")
            reading = [pipe for pipe in (None if writing else self._out, self._err) if pipe is not None]
            ready, writable, _ = select.select(reading, [self._in] if writing else [], [], left)
            if self._err in ready:
                self._take_stderr()
            if writable or self._out in ready:
                return

    def _take_stderr(self) -> None:
        for _ in range(16):  # more may come faster than it is read
            try:
                data = os.read(self._err, CHUNK) if self._err is not None else b""
            except BlockingIOError:
                return
            if not data:
                self._err = None
                return
            if not self._hear_stderr:
                self._relay(data)
                continue
            self._first += data[: WORDS - len(self._first)]
            self._much += len(data)
            self._said += data
            del self._said[:-WORDS]

    def _relay(self, data: bytes) -> None:
        """Hand on what it writes to stderr, until it is too much."""
        left = RELAYED - self._relayed
        self._relayed += len(data)
        if sys.__stderr__ is None or left < 0:
            return
        with suppress(OSError, ValueError):  # it may have been closed
            os.write(sys.__stderr__.fileno(), data[:left])
            if left < len(data):
                words = f"\nrefspan: {self._who} wrote more than {RELAYED} bytes; the rest is left out\n"
                os.write(sys.__stderr__.fileno(), words.encode())

    def _so_far(self) -> str:
        """What of an answer has come: who forgets to flush, or to end a line, looks for the fault elsewhere."""
        if not self._hear_stderr:
            return ""
        if not self._came:
            return " (nothing came; is the answer flushed?)"
        return f" ({self._came} bytes came{', without a line break' if self._in_line else ', and more were announced'})"

    def _take_the_rest_of_stderr(self) -> None:
        """What it still says when nobody asks any more, until its time is over; then it is closed."""
        self._take_stderr()
        while self._err is not None and (left := self._deadline - time.monotonic()) > 0:
            if select.select([self._err], [], [], left)[0]:
                self._take_stderr()
        self._err = None
        self._stderr.close()

    def _words(self) -> str:
        said = self.stderr()
        return f"; its stderr {'ends' if self._much <= 2 * WORDS else 'says'}: {said}" if said else ""

    def _ended(self) -> str:
        """Why it does not talk to us any more."""
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(2.0)
        with suppress(BlockingIOError, ConnectionError):
            if why := self._line.recv(1000).decode(errors="replace"):  # see the warden
                return f"{self._what}: {self._who} {why}"
        if code is None:
            return f"{self._what}: {self._who} closed its stdin or stdout{self._words()}"
        how = f"by signal {_name(-code)}" if code < 0 else f"with status {code}"
        return f"{self._what}: {self._who} ended {how}{self._words()}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
