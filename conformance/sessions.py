"""Where a backend runs: in a process of its own, so that a hang, a crash or an exit takes nothing else down."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from refspan.conformance.external.child import Child
from refspan.conformance.external.patience import Patience
from refspan.conformance.external.worker import command, packed, unpacked
from refspan.conformance.facts import dtypes_of, facts_of
from refspan.conformance.guard import Hung, Shapes, calls_at_once, guarded_call
from refspan.conformance.programs import Program
from refspan.conformance.replies import Question, Reply, answers_in, reply_of
from refspan.conformance.running import run_program, run_programs_at_once
from refspan.errors import SetupError


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
        """As `refspan.conformance.running.run_program`, and `Hung` if no answer comes."""

    def run_programs_at_once(self, programs: Sequence[Program]) -> list[list[Any]]:
        """As `refspan.conformance.running.run_programs_at_once`, and `Hung` if no answer comes."""

    def close(self) -> None:
        """Free what the backend holds."""


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
            reply: Reply = self._answered.get(timeout=self._timeout)
        except queue.Empty:
            self._start()
            raise Hung(f"{operation} did not return within {self._timeout:g} s") from None
        return answers_in(reply)

    def run_program(self, program: Program) -> list[Any]:
        """As `Session.run_program`."""
        return self._ask("the program", partial(run_program, program=program))

    def run_programs_at_once(self, programs: Sequence[Program]) -> list[list[Any]]:
        """As `Session.run_programs_at_once`."""
        return self._ask("the programs", partial(run_programs_at_once, programs=programs))

    def close(self) -> None:
        """End the thread once it is idle."""
        self._asked.put(None)


class Worker:
    """A backend in a process of its own, that is killed when it hangs and started anew when it died."""

    START_SECONDS = 120.0

    def __init__(self, load: Callable[[], Any], *, timeout: float) -> None:
        """`load` must be picklable, and importable elsewhere; it is called in the other process."""
        self._load, self._timeout = load, timeout
        self._patience = Patience()
        self._gone = ""
        """Why there is no process any more, if so."""
        self._start()

    def _start(self) -> None:
        self._child = Child(command(), who="the backend's process", hear_stderr=False)
        self._asked = 0
        try:
            kind, said = self._exchange("loading the backend", self._load, self.START_SECONDS)
        except BaseException as error:  # Ctrl-C is one
            self._child.close(seconds=0)
            if isinstance(error, Hung):
                raise SetupError(str(error)) from None
            raise
        if kind != "ready":
            self.close()
            raise SetupError(said)
        self.facts: Mapping[str, str]
        self.dtypes: Sequence[str]
        self.facts, self.dtypes = said

    def call(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `Session.call`."""
        return self._ask(operation, partial(guarded_call, operation=operation, calls=calls, shapes=shapes))

    def call_at_once(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `Session.call_at_once`."""
        return self._ask(operation, partial(calls_at_once, operation=operation, calls=calls, shapes=shapes))

    def run_program(self, program: Program) -> list[Any]:
        """As `Session.run_program`."""
        return self._ask("the program", partial(run_program, program=program))

    def run_programs_at_once(self, programs: Sequence[Program]) -> list[list[Any]]:
        """As `Session.run_programs_at_once`."""
        return self._ask("the programs", partial(run_programs_at_once, programs=programs))

    def close(self) -> None:
        """End the process, and all that it started."""
        self._child.close()

    def _ask(self, operation: str, question: Question) -> list[Any]:
        if self._gone:
            raise Hung(self._gone)
        try:
            reply = self._exchange(operation, question, self._timeout)
        except Hung:
            self._child.close(seconds=0)
            try:
                self._patience.start(self._start)
            except SetupError as error:
                self._gone = f"the backend's process ended and could not be started again: {error}"
            raise
        return answers_in(reply)

    def _exchange(self, what: str, content: Any, seconds: float) -> Reply:
        """Send something, and wait for the reply to it; raises Hung."""
        self._asked += 1
        self._child.begin(what, seconds)
        self._child.write(packed((self._asked, content)))
        while True:
            try:
                number, *reply = unpacked(self._child.read)
                kind, said = reply
            except Hung:
                raise
            except Exception as error:  # noqa: BLE001 - something else was written where replies are
                raise Hung(f"{what}: the backend's process sent no reply: {type(error).__name__}") from None
            if number == self._asked:  # or else an earlier question is answered once more
                return kind, said


def _serve(backend: Any, ask: Callable[[], Any], answer: Callable[[Reply], None]) -> None:
    """Answer questions until None is asked."""
    while (question := ask()) is not None:
        answer(reply_of(backend, question))
