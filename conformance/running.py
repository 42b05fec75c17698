"""Running a program on a backend, with everything checked that does not depend on numbers."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from refspan.config import parameter_shapes
from refspan.conformance.guard import (
    Misbehaviour,
    NotOffered,
    Returned,
    at_once,
    check_array,
    check_kept,
    not_its_own,
    one_line,
    shown,
    whole_number,
)
from refspan.conformance.programs import (
    Initialise,
    Learn,
    Open,
    Operation,
    Program,
    Projected,
    Reset,
    Restore,
    Save,
    Step,
)
from refspan.conformance.protocol import Array

MOST_POSITIONS = 1 << 16
"""That initial parameters may have."""


def run_program(backend: Any, program: Program) -> list[Any]:
    """Run a program on a backend and check what does not depend on numbers; one answer per operation.

    Raises:
        Misbehaviour: what the backend did wrong.
        NotOffered: the backend lacks an operation that the program uses.
    """
    return _Runner(backend).run(program)


def run_programs_at_once(backend: Any, programs: Sequence[Program]) -> list[list[Any]]:
    """Run programs on a backend, each on a thread of its own, all at once; see `at_once`."""
    return at_once(backend, "programs", [partial(run_program, backend, program) for program in programs])


def _check_shape(what: str, got: tuple[int, ...], expected: tuple[int | str, ...]) -> None:
    """Raise Misbehaviour if an initial parameter has another shape, or more positions than there may be."""
    if len(got) != len(expected) or any(
        size > MOST_POSITIONS if wanted == "P" else size != wanted for size, wanted in zip(got, expected, strict=True)
    ):
        most = f", P at most {MOST_POSITIONS}" if "P" in expected else ""
        raise Misbehaviour(f"{what}: got shape {got}, expected an array of shape {expected}{most}")


class _Runner:
    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._streams: dict[str, tuple[Any, Open]] = {}
        self._states: dict[str, Any] = {}
        self._begun: dict[str, Any] = {}
        """What the last block of training of a stream began with."""
        self._learnt: dict[str, dict[str, Array]] = {}
        """Parameters of a stream's last block of training, unless they were written over those before them."""
        self._handed: list[tuple[str, Array, bytes]] = []
        """Arrays that the backend was given, and what was in them."""
        self._returned: list[Returned] = []

    def run(self, program: Program) -> list[Any]:
        answers = [self._one(operation) for operation in program]
        self._look_again()
        check_kept(self._returned)
        return answers

    def _one(self, operation: Operation) -> Any:
        if isinstance(operation, Open):
            return self._open(operation)
        if isinstance(operation, Learn):
            return self._learn(operation)
        if isinstance(operation, Initialise):
            said = self._call(str(operation), self._backend, "initial_parameters", operation.config, operation.seed)
            if not isinstance(said, Mapping):
                raise Misbehaviour(f"{operation} returned {type(said).__name__}, expected arrays by name")
            shapes = parameter_shapes(operation.config)
            return {name: self._like(f"{operation}: {name}", said, name, shape) for name, shape in shapes.items()}
        stream, opened = self._streams[operation.stream]
        if isinstance(operation, Step):
            tokens = self._hand_over(f"the tokens of {operation}", operation.tokens)
            got = self._call(str(operation), stream, "step", tokens)
            like = opened.params["embedding.weight"].dtype
            shape = (*operation.tokens.shape, opened.config.vocab_size)
            return check_array(f"{operation} returned", got, shape, str(like), {"tokens": tokens}, self._returned)
        if isinstance(operation, Reset):
            self._call(str(operation), stream, "reset", operation.row)
            return None
        if isinstance(operation, Save):
            self._states[operation.name] = self._call(str(operation), stream, "state")
            return None
        if isinstance(operation, Restore):
            self._call(str(operation), stream, "restore", self._states[operation.name])
            return None
        if isinstance(operation, Projected):
            said = self._call(str(operation), stream, "rows_projected")
            if (rows := whole_number(said)) is None:
                raise Misbehaviour(f"{operation} returned {shown(said)}, expected a whole number >= 0")
            return rows
        return self._sizes(str(operation), stream, opened.config.layers)

    def _sizes(self, what: str, stream: Any, layers: int) -> list[int]:
        said = self._call(what, stream, "memory_size")
        try:
            numbers = [whole_number(size) for size in islice(said, layers + 1)]
        except Exception:  # noqa: BLE001 - it is nothing that has elements
            numbers = [None]
        sizes = [number for number in numbers if number is not None]
        if len(sizes) < len(numbers):
            raise Misbehaviour(f"{what} returned {shown(said)}, expected a whole number >= 0 for each layer")
        if len(sizes) != layers:
            many = len(sizes) if len(sizes) < layers else f"more than {layers}"
            raise Misbehaviour(f"{what} returned {many} numbers, expected one for each layer")
        return sizes

    def _open(self, operation: Open) -> None:
        params = {n: self._hand_over(f"parameter {n}", x) for n, x in operation.params.items()}
        memory = None
        if operation.memory is not None:
            memory = [
                (self._hand_over("the initial memory", hidden), self._hand_over("the initial ages", age))
                for hidden, age in operation.memory
            ]
        options = {"batch": operation.batch, "memory": memory}
        stream = self._call(str(operation), self._backend, "open_model", operation.config, params, **options)
        self._streams[operation.stream] = stream, operation

    def _learn(self, operation: Learn) -> tuple[float, float, dict[str, Array]]:
        params = self._parameters(operation)
        tokens = self._hand_over("the tokens", operation.tokens)
        targets = self._hand_over("the targets", operation.targets)
        if not operation.again:
            self._begun[operation.stream] = self._states.get(operation.stream)
        answer = self._call(
            str(operation),
            self._backend,
            "loss_and_gradients",
            operation.config,
            params,
            tokens,
            targets,
            self._begun.get(operation.stream),
            span_loss_weight=operation.span_loss_weight,
            span_limit=operation.span_limit,
        )
        try:
            (task, span), grads, self._states[operation.stream] = answer
            losses = float(task), float(span)
        except Exception:  # noqa: BLE001 - whatever it is, it is not three such things
            raise Misbehaviour(
                f"loss_and_gradients returned {type(answer).__name__}, expected ((task, span), gradients, memory)"
            ) from None
        if not isinstance(grads, Mapping):
            raise Misbehaviour(f"loss_and_gradients returned {type(grads).__name__} for gradients, expected a mapping")
        checked = {
            name: check_array(
                f"loss_and_gradients returned for {name!r}",
                grads.get(name),
                x.shape,
                str(x.dtype),
                params,
                self._returned,
            )
            for name, x in operation.params.items()
        }
        return *losses, checked

    def _like(self, what: str, said: Mapping[str, Any], name: str, shape: tuple[int | str, ...]) -> Array:
        """An array that was returned under a name, if it has a shape like this."""
        value = said.get(name)
        if value is None:
            raise Misbehaviour(f"{what}: it is missing")
        if isinstance(value, np.ndarray):  # before it is copied
            _check_shape(what, np.ndarray.view(value, np.ndarray).shape, shape)
        try:
            array = np.array(value, subok=False)
            numbers = array.dtype.kind in "fiu"
        except Exception:  # noqa: BLE001 - whatever it is, it is no array
            numbers = False
        if not numbers:
            raise Misbehaviour(f"{what}: got {shown(value)}, expected an array of numbers")
        _check_shape(what, array.shape, shape)
        return array

    def _parameters(self, operation: Learn) -> dict[str, Array]:
        """Parameters to learn with; every other block they are in the arrays of the one before, as an optimiser's."""
        before = self._learnt.pop(operation.stream, None)
        kinds = [{n: (x.shape, x.dtype) for n, x in (params or {}).items()} for params in (before, operation.params)]
        if before is None or kinds[0] != kinds[1]:
            params = {n: self._hand_over(f"parameter {n}", x) for n, x in operation.params.items()}
            self._learnt[operation.stream] = params
            return params
        self._look_again()
        ours = {id(array) for array in before.values()}
        self._handed = [handed for handed in self._handed if id(handed[1]) not in ours]
        for n, x in operation.params.items():
            before[n].flags.writeable = True
            before[n][...] = x
            before[n].flags.writeable = False
            self._handed.append((f"parameter {n}", before[n], before[n].tobytes()))
        return before

    def _look_again(self) -> None:
        """Raise Misbehaviour if anything that was handed over is not what it was."""
        for what, array, content in self._handed:
            if array.tobytes() != content:
                raise Misbehaviour(f"{what} was changed")

    def _hand_over(self, what: str, array: Array) -> Array:
        """A read-only copy in C order, to be looked at again in the end."""
        handed = np.array(array, order="C")
        handed.flags.writeable = False
        self._handed.append((what, handed, handed.tobytes()))
        return handed

    def _call(self, what: str, target: Any, name: str, *arguments: Any, **options: Any) -> Any:
        function = getattr(target, name, None)
        if function is None:
            raise NotOffered(name)
        try:
            return function(*arguments, **options)
        except (Misbehaviour, NotOffered):  # of a backend that is a session with another program
            raise
        except MemoryError:
            raise Misbehaviour(f"{what} ran out of memory") from None
        except BaseException as error:
            if not_its_own(self._backend, error):
                raise
            raise Misbehaviour(f"{what} raised {type(error).__name__}: {one_line(error)}") from None
