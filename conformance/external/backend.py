"""A command as a backend, and a session that starts it anew when it has died."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from typing import Any

import numpy as np

from refspan.config import ModelConfig, parameter_shapes
from refspan.conformance.external.child import Child
from refspan.conformance.external.patience import Patience
from refspan.conformance.external.stream import Kept, Stream
from refspan.conformance.external.wire import NOTHING, VERSION, NoMessage, answer, message
from refspan.conformance.facts import plain_dtypes, plain_facts
from refspan.conformance.guard import (
    Hung,
    Misbehaviour,
    NotOffered,
    Shapes,
    guarded_call,
    not_foreseen,
    one_line,
    shown,
)
from refspan.conformance.programs import Program
from refspan.conformance.protocol import OPERATIONS, Array
from refspan.conformance.running import MOST_POSITIONS, run_program
from refspan.errors import SetupError

START_SECONDS = 120.0


class CommandBackend:
    """What a command says that it offers; each operation is a request to it. For one thread at a time.

    Args:
        command: with arguments, as a shell would split it.
        timeout: seconds for one answer.

    Raises:
        SetupError: it cannot be started, or does not speak the protocol.
    """

    thread_safe = False
    elsewhere = True
    """Nothing of it runs in this process."""

    def __init__(self, command: str, timeout: float) -> None:
        self._timeout = timeout
        self._forget: list[str] = []
        """Names of streams and states that nobody will ask for again."""
        self._made = 0
        self._asked = 0
        self._child = Child(_words(command))
        try:
            self._child.begin("start", START_SECONDS)
            self._child.write(message({"cmd": "start", "version": VERSION}, {}))
            said, _ = answer(self._child)
            self._understand(said)
        except (Hung, NoMessage, SetupError) as error:
            self.close()
            raise SetupError(f"exec:{one_line(command)}: {error}") from None
        except BaseException:  # Ctrl-C
            self.close()
            raise

    def _understand(self, said: Mapping[str, Any]) -> None:
        if said.get("version") != VERSION or type(said["version"]) is not int:
            got = shown(said.get("version"))
            raise SetupError(f"its answer to `start` has version {got}; this refspan speaks version {VERSION}")
        offered = said.get("operations")
        if not isinstance(offered, list) or not set(map(str, offered)) & set(OPERATIONS):
            raise SetupError(f"it offers {shown(offered)}; expected a list of some of {', '.join(OPERATIONS)}")
        self.name = one_line(said.get("name", "command"))
        facts, dtypes = said.get("facts", {}), said.get("dtypes", [])
        self._facts = plain_facts(facts if isinstance(facts, dict) else {})
        self.dtypes = plain_dtypes(dtypes if isinstance(dtypes, list) else [])
        for operation in OPERATIONS:
            if operation not in offered:
                setattr(self, operation, None)

    def facts(self) -> dict[str, str]:
        """What the command says about itself."""
        return self._facts

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Any:
        """As in the protocol."""
        asked = {"operation": "soft_mask", "queries": queries, "ramp": ramp}
        return self.ask(asked, {"span": span, "age": age}, {"mask": queries * span.size})[1].get("mask")

    def span_attention(self, *arrays: Array, ramp: float, position: Array | None = None) -> Any:
        """As in the protocol."""
        like = {"output": arrays[0].size}
        return self.ask(*_step("span_attention", arrays, ramp, position), like)[1].get("output")

    def span_attention_backward(
        self, grad_out: Array, *arrays: Array, ramp: float, position: Array | None = None
    ) -> dict[str, Array]:
        """As in the protocol."""
        header, tensors = _step("span_attention_backward", arrays, ramp, position)
        like = {name: x.size for name, x in tensors.items() if name != "age"}
        return self.ask(header, {"grad_out": grad_out, **tensors}, like)[1]

    def open_model(
        self,
        config: ModelConfig,
        params: Mapping[str, Array],
        *,
        batch: int,
        memory: Sequence[tuple[Array, Array]] | None = None,
    ) -> Stream:
        """As in the protocol."""
        stream = Stream(self, self.new_name("stream"), config.vocab_size)
        tensors = {f"params.{name}": array for name, array in params.items()}
        for i, (hidden, age) in enumerate(memory or ()):
            tensors |= {f"memory.{i}.hidden": hidden, f"memory.{i}.age": age}
        asked = {"operation": "open_model", "stream": stream.name, "config": asdict(config), "batch": batch}
        self.ask({**asked, "memory": memory is not None}, tensors)
        return stream

    def loss_and_gradients(
        self,
        config: ModelConfig,
        params: Mapping[str, Array],
        tokens: Array,
        targets: Array,
        memory: Kept | None,
        *,
        span_loss_weight: float = 0.0,
        span_limit: float | None = None,
    ) -> tuple[Any, dict[str, Array], Kept]:
        """As in the protocol."""
        kept = Kept(self, self.new_name("memory"))
        asked = {"operation": "loss_and_gradients", "config": asdict(config), "span_loss_weight": span_loss_weight}
        asked |= {"span_limit": span_limit, "memory": memory and memory.name, "keep": kept.name}
        tensors = {"tokens": tokens, "targets": targets} | {f"params.{name}": x for name, x in params.items()}
        _, got = self.ask(asked, tensors, {"losses": 2} | {f"grads.{name}": x.size for name, x in params.items()})
        grads = {n.removeprefix("grads."): x for n, x in got.items() if n.startswith("grads.")}
        return got.get("losses"), grads, kept

    def initial_parameters(self, config: ModelConfig, seed: int) -> dict[str, Array]:
        """As in the protocol."""
        like = {
            f"params.{name}": prod(MOST_POSITIONS if size == "P" else int(size) for size in shape)
            for name, shape in parameter_shapes(config).items()
        }
        _, got = self.ask({"operation": "initial_parameters", "config": asdict(config), "seed": seed}, {}, like)
        return {name.removeprefix("params."): array for name, array in got.items()}

    def ask(
        self, header: Mapping[str, Any], tensors: Mapping[str, Array], expected: Mapping[str, int] = NOTHING
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """A request and its answer, with tensors under some of the names that are expected (see `answer`).

        Raises:
            Misbehaviour: the command says that it failed.
            NotOffered: it says that it lacks the operation.
            Hung: it does not answer, or not in a way that one could understand; it has to be started anew.
        """
        self._asked += 1
        operation = str(header["operation"])
        forget, self._forget = self._forget, []
        asked = {"cmd": "run", "seq": self._asked, **header, "forget": forget}
        self._child.begin(operation, self._timeout)
        self._child.write(message(asked, tensors))
        try:
            said, got = answer(self._child, expected)
        except Hung:
            raise
        except NoMessage as error:
            raise Hung(f"{operation}: {error}") from None
        except Exception as error:
            raise Hung(f"{operation}: {not_foreseen(error)}") from error
        if said.get("seq") != self._asked or type(said["seq"]) is not int:
            raise Hung(f"{operation}: the answer has seq {shown(said.get('seq'))}, expected {self._asked}")
        if (declined := said.get("not_offered")) is True:
            raise NotOffered(operation)
        if declined is not None and declined is not False:
            raise Misbehaviour(f"{operation}: the answer has not_offered {shown(declined)}, expected true or false")
        if said.get("error") is not None:
            raise Misbehaviour(f"{operation} failed: {one_line(said['error'])}")
        if missing := [name for name in expected if name not in got]:
            raise Misbehaviour(
                f"{operation}: the answer has no tensor {missing[0]!r}, expected {one_line(', '.join(expected))}"
            )
        return said, got

    def new_name(self, kind: str) -> str:
        """For something that the command is to keep until it is told that nobody needs it."""
        self._made += 1
        return f"{kind}{self._made}"

    def forget(self, name: str) -> None:
        """Tell the command, with the next request, that nobody needs this any more."""
        self._forget.append(name)

    def close(self) -> None:
        """Tell the command to stop, and see to it that it does."""
        self._child.close(last_words=message({"cmd": "stop"}, {}))


def _words(command: str) -> list[str]:
    """The command and its arguments."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SetupError(f"exec:{one_line(command)}: {error}") from None
    if not words:
        raise SetupError("exec: expected a command, as in exec:./my-backend")
    return words


def _step(
    operation: str, arrays: Sequence[Array], ramp: float, position: Array | None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and tensors of an attention step."""
    tensors = dict(zip(("query", "key", "value", "span", "age"), arrays, strict=True))
    return {"operation": operation, "ramp": ramp}, tensors | ({} if position is None else {"position": position})


class CommandSession:
    """A `Session` with a command, which is started anew after it has died or lost the thread."""

    def __init__(self, command: str, *, timeout: float) -> None:
        self._start = partial(CommandBackend, command, timeout)
        self._patience = Patience()
        self._gone = ""
        self._backend = self._start()
        about = {"backend": self._backend.name, "command": one_line(command)}
        self.facts: Mapping[str, str] = {**about, **self._backend.facts()}
        self.dtypes: Sequence[str] = self._backend.dtypes

    def call(self, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> list[Any]:
        """As `Session.call`."""
        return self._ask(partial(guarded_call, operation=operation, calls=calls, shapes=shapes))

    def call_at_once(self, operation: str, calls: Sequence[Any], shapes: Sequence[Shapes]) -> list[Any]:  # noqa: ARG002
        """The protocol knows one request at a time."""
        raise NotOffered(operation)

    def run_program(self, program: Program) -> list[Any]:
        """As `Session.run_program`."""
        return self._ask(partial(run_program, program=program))

    def run_programs_at_once(self, programs: Sequence[Program]) -> list[list[Any]]:  # noqa: ARG002
        """The protocol knows one request at a time."""
        raise NotOffered("programs")

    def close(self) -> None:
        """End the command."""
        self._backend.close()

    def _ask(self, question: Any) -> list[Any]:
        if self._gone:
            raise Hung(self._gone)
        try:
            with np.errstate(all="ignore"):
                answers: list[Any] = question(self._backend)
        except Hung:
            self.close()
            try:
                self._backend = self._patience.start(self._start)
            except SetupError as error:
                self._gone = f"the command could not be started again: {error}"
            raise
        except (Misbehaviour, NotOffered):
            raise
        except Exception as error:
            raise not_foreseen(error) from error
        return answers
