"""Where a backend runs: in a process of its own, so that a hang, a crash or an exit takes nothing else down."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

from refspan.conformance.guard import Misbehaviour, NotOffered, Shapes, calls_at_once, guarded_call, one_line
from refspan.conformance.programs import Program, run_program
from refspan.errors import SetupError

Question = Callable[[Any], list[Any]]
"""What a backend is asked: a picklable function of it."""


class Hung(Misbehaviour):
    """The backend did not answer in time, or died. It is started anew; asking the same again would cost as much."""


class Session(Protocol):
    """A backend, ready to be asked."""

    facts: Mapping[str, str]
    """What the backend says about itself: name, versions, device, execution provider."""
    dtypes: Sequence[str]
    """The dtypes of query, key and value that it takes; empty if it does not say."""

    def call(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `guarded_call`, and `Hung` if no answer comes."""

    def call_at_once(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `calls_at_once`, and `Hung` if no answer comes."""

    def run_program(self, program: Program) -> list[Any]:
        """As `refspan.conformance.programs.run_program`, and `Hung` if no answer comes."""

    def close(self) -> None:
        """Free what the backend holds."""


def facts_of(backend: Any) -> dict[str, str]:
    """What a backend says about itself: its name, and the pairs that an optional `facts()` returns."""
    facts = {"backend": str(getattr(backend, "name", type(backend).__name__))}
    describe = getattr(backend, "facts", None)
    if callable(describe):
        facts.update({one_line(name): one_line(value) for name, value in dict(describe() or {}).items()})
    return facts


def dtypes_of(backend: Any) -> tuple[str, ...]:
    """The optional attribute `dtypes` of a backend."""
    dtypes = getattr(backend, "dtypes", ())
    return (dtypes,) if isinstance(dtypes, str) else tuple(str(dtype) for dtype in dtypes)


class InProcess:
    """A backend in this process, each call on a thread of its own so that a hang can be left behind."""

    def __init__(self, backend: Any, *, timeout: float) -> None:
        self._backend, self._timeout = backend, timeout
        self.facts: Mapping[str, str] = facts_of(backend)
        self.dtypes: Sequence[str] = dtypes_of(backend)
        self._start()

    def _start(self) -> None:
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        arguments = (self._backend, self._asked.get, self._answered.put)
        threading.Thread(target=_serve, args=arguments, daemon=True, name="refspan-backend").start()

    def call(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `Session.call`."""
        return self._ask(operation, partial(guarded_call, operation=operation, calls=calls, shapes=shapes))

    def call_at_once(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `Session.call_at_once`."""
        return self._ask(operation, partial(calls_at_once, operation=operation, calls=calls, shapes=shapes))

    def _ask(self, operation: str, question: Question) -> list[Any]:
        self._asked.put(question)
        try:
            kind, answer = self._answered.get(timeout=self._timeout)
        except queue.Empty:
            self._start()
            raise Hung(f"{operation} did not return within {self._timeout:g} s") from None
        return _unpack(kind, answer)

    def run_program(self, program: Program) -> list[Any]:
        """As `Session.run_program`."""
        return self._ask("the program", partial(run_program, program=program))

    def close(self) -> None:
        """End the thread once it is idle."""
        self._asked.put(None)


class Worker:
    """A backend in a process of its own, that is killed when it hangs and started anew when it died."""

    START_SECONDS = 120.0

    def __init__(self, load: Callable[[], Any], *, timeout: float) -> None:
        """`load` must be picklable; it is called in the other process."""
        self._load, self._timeout = load, timeout
        self._gone = ""
        """Why there is no process any more, if so."""
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # no daemon: a daemon may not have processes of its own, and a backend may want some
        self._process = context.Process(target=_work, args=(theirs, self._load))
        self._process.start()
        theirs.close()
        kind, answer = self._answer("loading the backend", self.START_SECONDS)
        if kind != "ready":
            self.close()
            raise SetupError(answer)
        self.facts: Mapping[str, str]
        self.dtypes: Sequence[str]
        self.facts, self.dtypes = answer

    def call(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `Session.call`."""
        return self._ask(operation, partial(guarded_call, operation=operation, calls=calls, shapes=shapes))

    def call_at_once(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `Session.call_at_once`."""
        return self._ask(operation, partial(calls_at_once, operation=operation, calls=calls, shapes=shapes))

    def _ask(self, operation: str, question: Question) -> list[Any]:
        if self._gone:
            raise Hung(self._gone)
        try:
            self._pipe.send(question)
            kind, answer = self._answer(operation, self._timeout)
        except OSError:
            kind, answer = "hung", f"the backend's process ended before {operation} could be asked"
        if kind == "hung":
            self.close()
            self._restart()
        return _unpack(kind, answer)

    def run_program(self, program: Program) -> list[Any]:
        """As `Session.run_program`."""
        return self._ask("the program", partial(run_program, program=program))

    def _restart(self) -> None:
        """Start anew for the next call. If that fails, every later call is told so."""
        try:
            self._start()
        except SetupError as error:
            self._gone = f"the backend's process ended and could not be started again: {error}"

    def _answer(self, what: str, seconds: float) -> tuple[str, Any]:
        try:
            if not self._pipe.poll(seconds):
                return "hung", f"{what} did not return within {seconds:g} s"
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
            return "hung", f"the backend's process ended {how} during {what}"
        assert isinstance(answer, tuple)  # noqa: S101
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _unpack(kind: str, answer: Any) -> list[Any]:
    if kind == "not offered":
        raise NotOffered(answer)
    if kind == "hung":
        raise Hung(answer)
    if kind == "wrong":
        raise Misbehaviour(answer)
    assert isinstance(answer, list)  # noqa: S101
    return answer


def _serve(backend: Any, ask: Callable[[], Any], answer: Callable[[Any], None]) -> None:
    """Answer calls until None is asked."""
    while (question := ask()) is not None:
        try:
            reply: tuple[str, Any] = ("result", question(backend))
        except NotOffered as error:
            reply = ("not offered", str(error))
        except Misbehaviour as error:
            reply = ("wrong", str(error))
        answer(reply)


def _work(pipe: Connection, load: Callable[[], Any]) -> None:
    """The other process: load the backend, say what it is, answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the checker, which then ends this process
    os.dup2(2, 1)  # what the backend prints must not mix with the report
    try:
        backend = load()
        said = facts_of(backend), dtypes_of(backend)
    except SetupError as error:
        pipe.send(("setup", str(error)))
        return
    except BaseException as error:  # noqa: BLE001 - whatever it is, the backend did it
        pipe.send(("setup", f"the backend could not be loaded: {type(error).__name__}: {one_line(error)}"))
        return
    pipe.send(("ready", said))
    try:
        _serve(backend, pipe.recv, pipe.send)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
