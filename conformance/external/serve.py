"""The other side: serve a Python backend over stdin and stdout.

    python -m refspan.conformance.external.serve numpy
    refspan check --backend "exec:python -m refspan.conformance.external.serve numpy"

For a backend that lives in another interpreter or container than the checker, and as an example of the protocol.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from refspan import ModelConfig
from refspan.conformance.external.wire import VERSION, message, read_tensor
from refspan.conformance.facts import dtypes_of, facts_of
from refspan.conformance.loading import load_backend
from refspan.conformance.protocol import OPERATIONS, Array


class Server:
    """Answers requests with a backend."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._kept: dict[str, Any] = {}
        """Streams, states and training memories by name."""

    def serve(self, requests: BinaryIO, answers: BinaryIO) -> None:
        """Answer until `stop`, or the end of the requests."""
        for line in requests:
            asked = json.loads(line)
            tensors = {name: np.array(read_tensor(requests.read, name)) for name in asked["tensors"]}
            if asked["cmd"] == "stop":
                return
            said, arrays = self._start() if asked["cmd"] == "start" else self._run(asked, tensors)
            answers.write(message(said, arrays))
            answers.flush()

    def _start(self) -> tuple[dict[str, Any], dict[str, Array]]:
        offered = [name for name in OPERATIONS if getattr(self._backend, name, None) is not None]
        facts = facts_of(self._backend)
        said = {"version": VERSION, "name": facts.pop("backend"), "facts": facts, "dtypes": dtypes_of(self._backend)}
        return {**said, "operations": offered}, {}

    def _run(self, asked: Mapping[str, Any], tensors: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
        for name in asked["forget"]:
            self._kept.pop(name, None)
        said: dict[str, Any] = {"seq": asked["seq"]}
        try:
            value, arrays = getattr(self, f"_{asked['operation']}")(asked, tensors)
        except Exception as error:  # noqa: BLE001 - whatever it is, the checker is to know
            return {**said, "error": f"{type(error).__name__}: {error}"}, {}
        if value is NotImplemented:
            return {**said, "not_offered": True}, {}
        return said if value is None else {**said, "value": value}, arrays

    def _soft_mask(self, asked: Any, x: Any) -> Any:
        mask = self._backend.soft_mask(x["span"], x["age"], queries=asked["queries"], ramp=asked["ramp"])
        return None, {"mask": mask}

    def _span_attention(self, asked: Any, x: Any) -> Any:
        arrays = [x[name] for name in ("query", "key", "value", "span", "age")]
        output = self._backend.span_attention(*arrays, ramp=asked["ramp"], position=x.get("position"))
        return None, {"output": output}

    def _span_attention_backward(self, asked: Any, x: Any) -> Any:
        arrays = [x[name] for name in ("grad_out", "query", "key", "value", "span", "age")]
        return None, self._backend.span_attention_backward(*arrays, ramp=asked["ramp"], position=x.get("position"))

    def _open_model(self, asked: Any, x: Any) -> Any:
        config = ModelConfig(**asked["config"])
        memory = None
        if asked["memory"]:
            memory = [(x[f"memory.{i}.hidden"], x[f"memory.{i}.age"]) for i in range(config.layers)]
        stream = self._backend.open_model(config, _part(x, "params."), batch=asked["batch"], memory=memory)
        self._kept[asked["stream"]] = stream
        return None, {}

    def _step(self, asked: Any, x: Any) -> Any:
        return None, {"log_probs": self._kept[asked["stream"]].step(x["tokens"])}

    def _reset(self, asked: Any, x: Any) -> Any:  # noqa: ARG002
        done = self._optional(asked, "reset", asked["row"])
        return NotImplemented if done is NotImplemented else None, {}

    def _memory_size(self, asked: Any, x: Any) -> Any:  # noqa: ARG002
        sizes = self._optional(asked, "memory_size")
        return sizes if sizes is NotImplemented else [int(size) for size in sizes], {}

    def _rows_projected(self, asked: Any, x: Any) -> Any:  # noqa: ARG002
        return self._optional(asked, "rows_projected"), {}

    def _state(self, asked: Any, x: Any) -> Any:  # noqa: ARG002
        state = self._optional(asked, "state")
        self._kept[asked["state"]] = state
        return NotImplemented if state is NotImplemented else None, {}

    def _restore(self, asked: Any, x: Any) -> Any:  # noqa: ARG002
        done = self._optional(asked, "restore", self._kept[asked["state"]])
        return NotImplemented if done is NotImplemented else None, {}

    def _loss_and_gradients(self, asked: Any, x: Any) -> Any:
        losses, grads, memory = self._backend.loss_and_gradients(
            ModelConfig(**asked["config"]),
            _part(x, "params."),
            x["tokens"],
            x["targets"],
            self._kept[asked["memory"]] if asked["memory"] else None,
            span_loss_weight=asked["span_loss_weight"],
            span_limit=asked["span_limit"],
        )
        self._kept[asked["keep"]] = memory
        return None, {"losses": np.array(losses, np.float64)} | {f"grads.{name}": grad for name, grad in grads.items()}

    def _initial_parameters(self, asked: Any, x: Any) -> Any:  # noqa: ARG002
        params = self._backend.initial_parameters(ModelConfig(**asked["config"]), asked["seed"])
        return None, {f"params.{name}": array for name, array in params.items()}

    def _optional(self, asked: Any, method: str, *arguments: Any) -> Any:
        """What a method of a stream returns; NotImplemented if it has none."""
        function = getattr(self._kept[asked["stream"]], method, None)
        return NotImplemented if function is None else function(*arguments)


def _part(tensors: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def main(name: str) -> None:
    """Serve the backend that `name` names, see `refspan.conformance.load_backend`."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the backend prints must not mix with the answers
    Server(load_backend(name)).serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
