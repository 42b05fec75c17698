"""Programs as JSON and tensors, and back: operations by the names of docs/protocol.md, each tensor under its number.

    {"operation": "open_model", "stream": "a", "config": {..}, "batch": 2, "params": 0, "memory": true}
    {"operation": "step", "stream": "a"}
    {"operation": "reset", "stream": "a", "row": 1}
    {"operation": "state", "stream": "a", "state": "s"}       and "restore" likewise
    {"operation": "memory_size", "stream": "a"}
    {"operation": "loss_and_gradients", "stream": "a", "config": {..}, "params": 0, "span_loss_weight": 0.0,
     "span_limit": null, "again": false}

Tensors of operation I: `I.tokens`, `I.targets`, `I.memory.LAYER.hidden`, `I.memory.LAYER.age`. Parameters are
`P.params.NAME`, P being the number that `params` names: that of the first operation that has the same ones.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

import refspan
from refspan.config import ModelConfig, check_parameters
from refspan.conformance.programs import Learn, Open, Operation, Program, Reset, Restore, Save, Size, Step
from refspan.conformance.protocol import Array
from refspan.conformance.vectors.work import ProgramWork

MOST = 1000
"""Operations of a program."""
MOST_TOKENS = 10_000
"""That a program may ask with."""
MOST_LAYERS = 100
"""Of a model."""
KINDS = {
    "open_model": Open,
    "step": Step,
    "reset": Reset,
    "state": Save,
    "restore": Restore,
    "memory_size": Size,
    "loss_and_gradients": Learn,
}
_NAMES = {kind: name for name, kind in KINDS.items()}


def to_json(program: Program) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Operations, and their tensors by name."""
    said: list[dict[str, Any]] = []
    tensors: dict[str, Array] = {}
    first: dict[tuple[tuple[str, bytes], ...], int] = {}
    """Parameters -> the operation that had them first."""
    for i, operation in enumerate(program):
        entry: dict[str, Any] = {"operation": _NAMES[type(operation)], "stream": operation.stream}
        if isinstance(operation, Open | Learn):
            content = tuple((name, x.tobytes()) for name, x in sorted(operation.params.items()))
            place = first.setdefault(content, i)
            entry |= {"config": operation.config.to_dict(), "params": place}
            if place == i:
                tensors |= {f"{i}.params.{name}": x for name, x in operation.params.items()}
        if isinstance(operation, Open):
            entry |= {"batch": operation.batch, "memory": operation.memory is not None}
            for layer, (hidden, age) in enumerate(operation.memory or ()):
                tensors |= {f"{i}.memory.{layer}.hidden": hidden, f"{i}.memory.{layer}.age": age}
        elif isinstance(operation, Step):
            tensors[f"{i}.tokens"] = operation.tokens
        elif isinstance(operation, Learn):
            entry |= {"span_loss_weight": operation.span_loss_weight, "span_limit": operation.span_limit}
            entry["again"] = operation.again
            tensors |= {f"{i}.tokens": operation.tokens, f"{i}.targets": operation.targets}
        elif isinstance(operation, Reset):
            entry["row"] = operation.row
        elif isinstance(operation, Save | Restore):
            entry["state"] = operation.name
        said.append(entry)
    return said, tensors


def from_json(said: Any, tensors: Mapping[str, Array]) -> tuple[Operation, ...]:
    """The program that `to_json` took apart; nothing in it is believed.

    Raises:
        TypeError, ValueError: it says something impossible; the message says which operation does.
    """
    if not isinstance(said, list) or not 0 < len(said) <= MOST:
        raise ValueError(f"expected a list of 1 to {MOST} operations")
    if sum(x.size for name, x in tensors.items() if name.endswith(".tokens")) > MOST_TOKENS:
        raise ValueError(f"it asks with more than {MOST_TOKENS} tokens")
    reader = _Reader(tensors)
    program = []
    for i, entry in enumerate(said):
        try:
            program.append(reader.operation(i, entry))
        except (TypeError, ValueError, KeyError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"operation {i}: {why}") from None
    unused = sorted(set(tensors) - reader.used)
    if unused:
        raise ValueError(f"tensor {unused[0]!r} belongs to no operation")
    return tuple(program)


class _Reader:
    """Reads the operations of a program in their order."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = tensors
        self.used: set[str] = set()
        self._work = ProgramWork()
        self._stored: dict[str, list[str]] = {}
        """Number of an operation -> names of the parameters that are stored with it."""
        for name in tensors:
            place, _, rest = name.partition(".")
            if rest.startswith("params."):
                self._stored.setdefault(place, []).append(name)
        self._params: dict[int, dict[str, Array]] = {}
        """Operation that they are stored with -> parameters."""
        self._opened: dict[str, tuple[int, Open]] = {}
        self._kept: dict[str, int] = {}
        """State -> where the stream was opened that it was kept of."""
        self._taught: dict[str, tuple[Any, ...]] = {}
        """Stream of blocks of training -> what must not change from block to block, its memories being of it."""

    def operation(self, i: int, entry: Any) -> Operation:
        """Operation i."""
        if not isinstance(entry, dict) or entry.get("operation") not in KINDS:
            raise ValueError(f"expected an object whose `operation` is one of {', '.join(KINDS)}")
        name, stream = entry["operation"], _word(entry, "stream")
        if name == "loss_and_gradients":
            return self._learn(i, entry, stream)
        if name == "open_model":
            opened = self._open(i, entry, stream)
            self._opened[stream] = i, opened
            return opened
        if stream not in self._opened:
            raise ValueError(f"stream {stream!r} was not opened")
        place, opened = self._opened[stream]
        if name == "step":
            tokens = self._tensor(f"{i}.tokens")
            _check_tokens("tokens", tokens, opened.config)
            if len(tokens) != opened.batch:
                raise ValueError(f"tokens have {len(tokens)} rows, the stream has {opened.batch}")
            self._work.step(stream, tokens)
            return Step(stream, tokens)
        if name == "reset":
            row = entry["row"]
            if not isinstance(row, int) or not 0 <= row < opened.batch:
                raise ValueError(f"`row` is {row!r}, expected 0 to {opened.batch - 1}")
            self._work.copied(stream, kept=False)
            return Reset(stream, row)
        if name == "memory_size":
            return Size(stream)
        state = _word(entry, "state")
        self._work.copied(stream, kept=name == "state")
        if name == "state":
            self._kept[state] = place
            return Save(stream, state)
        if self._kept.get(state) != place:
            raise ValueError(f"state {state!r} was not kept of this stream")
        return Restore(stream, state)

    def _open(self, i: int, entry: dict[str, Any], stream: str) -> Open:
        config, params = self._model(i, entry)
        batch = entry["batch"]
        if not isinstance(batch, int) or not 0 < batch <= MOST or not isinstance(entry["memory"], bool):
            raise ValueError(f"`batch` or `memory` is no whole number from 1 to {MOST}, or neither true nor false")
        memory = None
        if entry["memory"]:
            memory = [
                (self._tensor(f"{i}.memory.{layer}.hidden"), self._tensor(f"{i}.memory.{layer}.age"))
                for layer in range(config.layers)
            ]
        self._work.open(stream, config, params, batch, memory)
        with np.errstate(all="ignore"):  # numbers may overflow, and nothing else be wrong
            refspan.open_model(config, params, batch=batch, memory=memory)  # raises if something does not fit
        return Open(stream, config, params, batch, memory)

    def _learn(self, i: int, entry: dict[str, Any], stream: str) -> Learn:
        config, params = self._model(i, entry)
        tokens, targets = self._tensor(f"{i}.tokens"), self._tensor(f"{i}.targets")
        _check_tokens("tokens", tokens, config)
        _check_tokens("targets", targets, config)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets have the shape {targets.shape}, tokens {tokens.shape}")
        same = (len(tokens), config.layers, config.hidden_size, str(params["embedding.weight"].dtype))
        if self._taught.setdefault(stream, same) != same:
            raise ValueError(f"stream {stream!r} had another batch, layers, hidden_size or dtype before")
        self._work.learn(stream, config, params, tokens)
        weight, limit, again = entry["span_loss_weight"], entry["span_limit"], entry["again"]
        if not isinstance(again, bool):
            raise ValueError(f"`again` is {again!r}, expected true or false")
        for number in (weight, 0.0 if limit is None else limit):
            if not isinstance(number, float) or not isfinite(number) or number < 0:
                raise ValueError(f"`span_loss_weight` or `span_limit` is {number!r}, expected a number >= 0")
        return Learn(stream, config, params, tokens, targets, weight, limit, again)

    def _model(self, i: int, entry: dict[str, Any]) -> tuple[ModelConfig, dict[str, Array]]:
        place, settings = entry["params"], entry["config"]
        if not isinstance(place, int) or not isinstance(settings, dict):
            raise TypeError("`params` is no number of an operation, or `config` no object")
        config = ModelConfig.from_dict(settings)
        if place == i:
            names = self._stored.get(str(i), [])
            self._params[i] = {name.removeprefix(f"{i}.params."): self._tensor(name) for name in names}
        if place not in self._params:
            raise ValueError(f"`params` is {place}, which holds none")
        params = self._params[place]
        if config.layers > MOST_LAYERS:  # or a wrong number would be believed for very long
            raise ValueError(f"its config has {config.layers} layers, expected at most {MOST_LAYERS}")
        self._work.parameters(params)
        check_parameters(config, params)
        return config, params

    def _tensor(self, name: str) -> Array:
        self.used.add(name)
        return self._tensors[name]


def _word(entry: dict[str, Any], name: str) -> str:
    word = entry[name]
    if not isinstance(word, str) or not 0 < len(word) <= 80 or not word.isprintable():
        raise ValueError(f"`{name}` is {str(word)[:80]!r}, expected a name")
    return word


def _check_tokens(name: str, tokens: Array, config: ModelConfig) -> None:
    if tokens.ndim != 2 or tokens.dtype != np.int64 or not tokens.size:
        raise ValueError(f"{name}: got {tokens.dtype} {tokens.shape}, expected int64 [B, M]")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(f"{name} are not all from 0 to {config.vocab_size - 1}")


def shapes_of_answers(program: Sequence[Operation]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is expected: `I.log_probs`, `I.memory_size`, `I.task`, `I.span`, `I.grads.NAME`."""
    shapes: dict[str, tuple[int, ...]] = {}
    opened: dict[str, Open] = {}
    for i, operation in enumerate(program):
        if isinstance(operation, Open):
            opened[operation.stream] = operation
        elif isinstance(operation, Step):
            shapes[f"{i}.log_probs"] = (*operation.tokens.shape, opened[operation.stream].config.vocab_size)
        elif isinstance(operation, Size):
            shapes[f"{i}.memory_size"] = (opened[operation.stream].config.layers,)
        elif isinstance(operation, Learn):
            shapes |= {f"{i}.task": (), f"{i}.span": ()}
            shapes |= {f"{i}.grads.{name}": x.shape for name, x in operation.params.items()}
    return shapes


def answers_by_name(program: Sequence[Operation], answers: Sequence[Any]) -> dict[str, Array]:
    """What a backend answered (`run_program`), by the names of `shapes_of_answers`."""
    named: dict[str, Array] = {}
    for i, (operation, answer) in enumerate(zip(program, answers, strict=True)):
        if isinstance(operation, Step):
            named[f"{i}.log_probs"] = answer
        elif isinstance(operation, Size):
            named[f"{i}.memory_size"] = np.array(answer, np.float64)
        elif isinstance(operation, Learn):
            task, span, grads = answer
            named |= {f"{i}.task": np.asarray(task), f"{i}.span": np.asarray(span)}
            named |= {f"{i}.grads.{name}": x for name, x in grads.items()}
    return named
