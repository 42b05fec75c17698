"""What a stream remembers, in buffers on the model's device, and bound to its graph (clause BOUND).

There are two sets of buffers, which steps read and write in turn. Keys and values of distant memories, the bulk of it,
are in both: a step writes the few that it moves in place.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from refspan.export.layout import Array
from refspan.export.slots import empty_distant

if TYPE_CHECKING:
    from refspan.export.onnx_model import OnnxModel

RECENT = ("key", "value", "span")
DISTANT = ("key", "value", "span", "age")
_IN_PLACE = ("key", "value")


class Buffers:
    """The state of `batch` streams through one model; see `streaming_model` for what its tensors mean."""

    def __init__(self, model: "OnnxModel", layers: list[tuple[dict[str, Array], dict[str, Array]]]) -> None:
        """`layers`: recent and distant tensors of each, as `stream_arrays.from_memory` returns them."""
        self._model = model
        self._batch = len(layers[0][0]["span"])
        self._bindings = [model.session.io_binding() for _ in range(2)]
        self._turn = 0
        self.slots = [0] * len(layers)
        """C of each layer."""
        self._recent: list[list[dict[str, Any]]] = [[{} for _ in layers] for _ in range(2)]
        self._distant: list[list[dict[str, Any]]] = [[{} for _ in layers] for _ in range(2)]
        for i, (recent, distant) in enumerate(layers):
            self._bind(i, "recent", self._recent, {name: model.on_device(recent[name]) for name in RECENT}, ())
            self._bind(i, "distant", self._distant, {n: model.on_device(distant[n]) for n in DISTANT}, _IN_PLACE)
            self.slots[i] = distant["span"].shape[1]

    @property
    def binding(self) -> Any:
        """The IOBinding that reads the state and writes the next one. Tokens, lengths and so on are the caller's."""
        return self._bindings[self._turn]

    @property
    def turn(self) -> int:
        """0 or 1: the set of buffers that holds the state."""
        return self._turn

    def advance(self) -> None:
        """After a step: what it has written is the state."""
        self._turn = 1 - self._turn

    def bind_output(self, name: str, array: Array) -> None:
        """Let both bindings write an output into an array on the host."""
        for binding in self._bindings:
            bind_output(binding, name, array)

    def arrays(self, i: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """Copies of a layer's recent and distant tensors on the host."""
        recent, distant = self._recent[self._turn][i], self._distant[self._turn][i]
        return {n: np.array(x.numpy()) for n, x in recent.items()}, {n: np.array(x.numpy()) for n, x in distant.items()}

    def repack(self, i: int, slots: int) -> None:
        """Move the distant memories of a layer into another number of slots, on the device.

        Should memory run out, all is as it was.
        """
        old = self._distant[self._turn][i]
        keep = min(slots, self.slots[i])
        added = empty_distant(self._model.layout, self._batch, slots - keep + 1, first=1)
        binding = self._model.repack.io_binding()
        for name in DISTANT:
            binding.bind_ortvalue_input(name, old[name])
            binding.bind_ortvalue_input(f"empty_{name}", self._model.on_device(added[name]))
            binding.bind_output(f"new_{name}", self._model.device)
        binding.bind_cpu_input("keep", np.array([keep]))
        self._model.repack.run_with_iobinding(binding)
        new = dict(zip(DISTANT, binding.get_outputs(), strict=True))
        self._bind(i, "distant", self._distant, new, _IN_PLACE)
        self.slots[i] = slots

    def bytes(self) -> int:
        """Of the device's memory, all buffers together."""
        held = {
            id(x): x
            for kind in (self._recent, self._distant)
            for side in kind
            for layer in side
            for x in layer.values()
        }
        return sum(int(np.prod(x.shape())) * self._model.itemsize(x) for x in held.values())

    def _bind(
        self, i: int, kind: str, sides: list[list[dict[str, Any]]], new: dict[str, Any], in_place: tuple[str, ...]
    ) -> None:
        """Let both bindings use these buffers, which hold the state, and others like them in turn."""
        others = {name: x if name in in_place else self._model.like(x) for name, x in new.items()}
        sides[self._turn][i], sides[1 - self._turn][i] = new, others
        for side, binding in enumerate(self._bindings):
            for name in new:
                binding.bind_ortvalue_input(f"layers.{i}.{kind}_{name}", sides[side][i][name])
                binding.bind_ortvalue_output(f"layers.{i}.{kind}_{name}.next", sides[1 - side][i][name])


def bind_output(binding: Any, name: str, array: Array) -> None:
    """Let an output be written into an array on the host, which must live as long."""
    pointer = array.__array_interface__["data"][0]
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, pointer)
