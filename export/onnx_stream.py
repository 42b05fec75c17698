"""Streams of tokens through a model that ONNX Runtime runs; what they remember stays on its device.

Each layer's recent memories have two sets of buffers, which steps read and write in turn. Its distant memories have one,
bound as input and as output: a step writes the few that it moves, in place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refspan.arrays import check_whole
from refspan.checkpoint import read_state, write_state
from refspan.config import ModelConfig
from refspan.errors import SetupError
from refspan.export.slots import Array, empty_distant, needed_slots, slots_for
from refspan.export.stream_arrays import from_memory, to_memory
from refspan.memory import Memory
from refspan.stream import MemoryLimitError
from refspan.stream_state import check_state

if TYPE_CHECKING:
    from refspan.export.onnx_model import OnnxModel

DISTANT = ("key", "value", "span", "age")
RECENT = ("key", "value", "span")


class StreamFailedError(RuntimeError):
    """ONNX Runtime stopped in the middle of a step. `restore` a saved state, here or in another stream, to go on."""


class OnnxStream:
    """`batch` streams of tokens through one model, as `OnnxModel.open` returns it. For one thread at a time."""

    def __init__(self, model: "OnnxModel", batch: int, max_slots: int | None) -> None:
        self._model, self._batch, self._max_slots = model, batch, max_slots
        self._layout = model.layout
        self._bindings = [model.session.io_binding() for _ in range(2)]
        self._broken = self._closed = False
        self._last_full: Array | None = None
        self._start([self._empty()] * self.config.layers)

    @property
    def config(self) -> ModelConfig:
        """The model's shape and settings."""
        return self._layout.config

    @property
    def batch(self) -> int:
        """B."""
        return self._batch

    def step(self, tokens: Array, lengths: Array | None = None) -> Array:
        """Read a block of any length M >= 1; longer ones than the config's block_size in several runs.

        Args:
            tokens: [B, M] int64, 0..V-1.
            lengths: [B] int64, how many tokens of each row count, 0 to M. Rows that have ended, or that have less to
                say, are padded with any tokens; what is returned for these means nothing. All count by default.

        Returns:
            Log-probabilities of the token that follows each, [B, M, V], a new array in the dtype of the model.

        Raises:
            TypeError, ValueError: arguments of the wrong type, dtype, shape or range. The stream is as it was.
            MemoryLimitError: a layer might need more slots than `max_slots`. The stream is as it was, or, within a
                block longer than block_size, has read whole runs of it.
            StreamFailedError: ONNX Runtime failed. The stream can only be restored, or closed.
        """
        self._check_open()
        lengths = self._checked(tokens, lengths)
        size, count, parts = self.config.block_size, tokens.shape[1], []
        if count <= size:
            return self._block(np.ascontiguousarray(tokens), lengths)
        for start in range(0, count, size):
            block = np.ascontiguousarray(tokens[:, start : start + size])
            parts.append(self._block(block, np.clip(lengths - start, 0, block.shape[1])))
        return np.concatenate(parts, axis=1)

    def memory_size(self) -> tuple[int, ...]:
        """Memories that each layer holds, the longest row of the batch: those that a later query may see."""
        return tuple(int(n) for n in np.max(self._counts[:, :, 0] + self._counts[:, :, 1], axis=1))

    def slots(self) -> tuple[int, ...]:
        """Slots that each layer has for memories of more than P steps, see docs/onnx.md."""
        return tuple(self._slots)

    def state_bytes(self) -> int:
        """Bytes of the device's memory that the state takes, both sets of buffers."""
        held = {id(x): x for side in (*self._distant, *self._recent) for layer in side for x in layer.values()}
        return sum(int(np.prod(x.shape())) * _ITEMSIZE[x.element_type()] for x in held.values())

    def reset(self, row: int) -> None:
        """One row of the batch starts anew, empty; the others go on."""
        self._check_open()
        row = check_whole("row", row)
        if not 0 <= row < self._batch:
            raise ValueError(f"row: got {row}, expected 0 to {self._batch - 1}")
        self._restart = self._restart | (np.arange(self._batch) == row)
        self._counts[:, row] = 0
        self._last_lengths = None

    def state(self) -> dict[str, Array]:
        """A copy of all that the stream remembers, on the host, as `refspan.Stream.state` returns it."""
        self._check_open()
        state: dict[str, Array] = {}
        for i in range(self.config.layers):
            recent = {name: x.numpy() for name, x in self._recent[self._turn][i].items()}
            distant = {name: x.numpy() for name, x in self._distant[self._turn][i].items()}
            memory = to_memory(self._layout, recent, distant, self._restart)
            state |= {f"layers.{i}.{name}": x for name, x in {"age": memory.age, **memory.contents}.items()}
        return state | {"model": self._model.fingerprint.copy()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` returned, here, in another stream of this model and batch, or in a `refspan.Stream`.

        Raises:
            TypeError, ValueError: the state does not fit this model and batch; the stream goes on as it was.
            MemoryLimitError: it needs more slots than `max_slots`; likewise.
        """
        if self._closed:
            raise ValueError("the stream is closed")
        self._start(check_state(np, state, self.config, self._batch, self._empty(), self._model.fingerprint))
        self._broken = False

    def save_state(self, path: str | Path) -> None:
        """Write the state to a file, which `load_state` and `refspan.load_state` read; whole or not at all.

        Raises:
            SetupError: the file cannot be written; what was there is untouched.
        """
        write_state(path, self._layout.config, self.state())

    def load_state(self, path: str | Path) -> None:
        """Go on from a file that `save_state` or `refspan.save_state` wrote.

        Raises:
            SetupError: the file cannot be read, is no such file, or belongs to another model or batch size. The stream
                goes on as it was.
        """
        arrays = read_state(path, self._layout.config)
        try:
            self.restore(arrays)
        except (TypeError, ValueError) as error:
            raise SetupError(f"{path}: {error}") from None

    def close(self) -> None:
        """Free the state. Closing again does nothing."""
        self._closed = True
        self._bindings, self._recent, self._distant = [], [], []

    def __enter__(self) -> "OnnxStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # one block

    def _block(self, tokens: Array, lengths: Array) -> Array:
        """Log-probabilities [B, M, V] of at most block_size tokens a row."""
        self._make_room(tokens.shape[1], lengths)
        log_probs = np.empty((*tokens.shape, self.config.vocab_size), self._layout.dtype)
        binding, bound = self._bindings[self._turn], self._bound[self._turn]
        for name, array in (("tokens", tokens), ("lengths", lengths), ("restart", self._restart)):
            if bound.get(name) is not array:
                binding.bind_cpu_input(name, array)
                bound[name] = array  # which must live as long as it is bound, and is never written to
        shape, pointer = log_probs.shape, log_probs.__array_interface__["data"][0]
        binding.bind_output("log_probs", "cpu", 0, log_probs.dtype, shape, pointer)
        try:
            self._model.session.run_with_iobinding(binding)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen unrelated types
            self._broken = True
            said = " ".join(str(error).split())
            raise StreamFailedError(f"ONNX Runtime failed in the middle of a step: {said}") from None
        self._turn = 1 - self._turn
        self._counts, self._last_lengths = self._bound_counts.copy(), lengths
        self._restart = self._no_restart
        return log_probs

    def _make_room(self, queries: int, lengths: Array) -> None:
        """Give each layer the slots that a block of M queries needs; before anything is changed, or not at all."""
        needed = needed_slots(self._counts, lengths, self._last_lengths, self._layout.positions)
        wanted = [
            self._limited(i, slots_for(max(n, queries), current))
            for i, (n, current) in enumerate(zip(needed, self._slots, strict=True))
        ]
        for i, slots in enumerate(wanted):
            if slots != self._slots[i]:
                self._repack(i, slots)

    def _limited(self, layer: int, slots: int) -> int:
        if self._max_slots is not None and slots > self._max_slots:
            raise MemoryLimitError(
                f"layer {layer} might need {slots} slots, the limit is {self._max_slots} (max_slots); raise it, or reset "
                "rows that have ended"
            )
        return slots

    def _repack(self, i: int, slots: int) -> None:
        """Move the distant memories of a layer into another number of slots, on the device."""
        old = self._distant[self._turn][i]
        keep = min(slots, self._slots[i])
        added = empty_distant(self._layout, self._batch, slots - keep + 1, first=1)
        binding = self._model.repack.io_binding()
        for name in DISTANT:
            binding.bind_ortvalue_input(name, old[name])
            binding.bind_ortvalue_input(f"empty_{name}", self._model.on_device(added[name]))
            binding.bind_output(f"new_{name}", self._model.device)
        binding.bind_cpu_input("keep", np.array([keep]))
        self._model.repack.run_with_iobinding(binding)
        self._bind_distant(i, slots, dict(zip(DISTANT, binding.get_outputs(), strict=True)))

    def _bind_distant(self, i: int, slots: int, new: dict[str, Any]) -> None:
        """Let both bindings use these buffers: the same keys and values, but spans and ages in turn."""
        self._slots[i] = slots
        other = {name: x if name in ("key", "value") else self._model.like(x) for name, x in new.items()}
        self._distant[self._turn][i], self._distant[1 - self._turn][i] = new, other
        for side, binding in enumerate(self._bindings):
            for name in DISTANT:
                binding.bind_ortvalue_input(f"layers.{i}.distant_{name}", self._distant[side][i][name])
                binding.bind_ortvalue_output(f"layers.{i}.distant_{name}.next", self._distant[1 - side][i][name])

    # the state as a whole

    def _start(self, memory: list[Memory]) -> None:
        """Go on from these memories, in new buffers."""
        made, layout = [], self._layout
        self._turn = 0  # the set of buffers that holds the state
        for i, one in enumerate(memory):
            beyond = int(np.max(np.sum(one.age > layout.positions, axis=1), initial=0))
            slots = self._limited(i, slots_for(1 + beyond))
            made.append(from_memory(layout, one, slots))
        self._counts = np.array([counts for _, _, counts in made])  # [layers, B, 3]
        self._last_lengths: Array | None = None
        self._restart = self._no_restart = np.zeros(self._batch, bool)
        self._bound: list[dict[str, Array]] = [{}, {}]
        """Host arrays that the bindings read."""
        self._bound_counts = self._counts.copy()
        for binding in self._bindings:
            counts = self._bound_counts
            binding.bind_output("live", "cpu", 0, counts.dtype, counts.shape, counts.__array_interface__["data"][0])
        self._slots = [0] * len(made)
        on_device = self._model.on_device
        recent = [{name: on_device(x) for name, x in recent.items()} for recent, _, _ in made]
        self._recent = [recent, [{name: self._model.like(x) for name, x in layer.items()} for layer in recent]]
        layers = layout.config.layers
        self._distant: list[list[dict[str, Any]]] = [[{} for _ in range(layers)] for _ in range(2)]
        for i, (_, distant, _) in enumerate(made):
            slots = distant["span"].shape[1]
            self._bind_distant(i, slots, {name: on_device(x) for name, x in distant.items()})
            for side, binding in enumerate(self._bindings):
                for name in RECENT:
                    binding.bind_ortvalue_input(f"layers.{i}.recent_{name}", self._recent[side][i][name])
                    binding.bind_ortvalue_output(f"layers.{i}.recent_{name}.next", self._recent[1 - side][i][name])

    def _empty(self) -> Memory:
        """A layer's memory of no slots (START)."""
        inner = self.config.heads * self.config.head_size
        sizes: dict[str, tuple[int, ...]] = {"key": (inner,), "value": (inner,), "span": ()}
        contents = {name: np.zeros((self._batch, 0, *size), self._layout.wide) for name, size in sizes.items()}
        return Memory(np.zeros((self._batch, 0), np.int64), contents)

    def _checked(self, tokens: Array, lengths: Array | None) -> Array:
        """Raise unless the arguments of `step` are right; the lengths as an array."""
        vocabulary = self.config.vocab_size
        if not isinstance(tokens, np.ndarray):
            raise TypeError(f"tokens: got {type(tokens).__name__}, expected a NumPy array")
        if tokens.dtype != np.int64:
            raise TypeError(f"tokens: got {tokens.dtype}, expected int64")
        if tokens.ndim != 2 or tokens.shape[0] != self._batch or tokens.shape[1] == 0:
            raise ValueError(f"tokens: got shape {tokens.shape}, expected ({self._batch}, M) with M >= 1")
        if tokens.view(np.uint64).max() >= vocabulary:  # negative ones are very large there
            wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise ValueError(f"tokens: got token {wrong}, expected 0 to {vocabulary - 1}")
        if lengths is None:
            return self._full(tokens.shape[1])
        lengths = np.asarray(lengths)
        if lengths.dtype != np.int64 or lengths.shape != (self._batch,):
            raise ValueError(f"lengths: got {lengths.dtype} {lengths.shape}, expected int64 ({self._batch},)")
        if lengths.min() < 0 or lengths.max() > tokens.shape[1]:
            wrong = int(lengths.min()) if lengths.min() < 0 else int(lengths.max())
            raise ValueError(f"lengths: got {wrong}, expected 0 to {tokens.shape[1]}")
        return lengths

    def _full(self, queries: int) -> Array:
        """All tokens of a block count. The same array while blocks are as long."""
        last = self._last_full
        if last is None or last[0] != queries:
            self._last_full = last = np.full(self._batch, queries)
        return last

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the stream is closed")
        if self._broken:
            raise StreamFailedError(
                "ONNX Runtime failed in an earlier step; restore a saved state, or open a new stream"
            )


_ITEMSIZE = {1: 4, 7: 8, 9: 1, 10: 2, 11: 8}
"""Bytes of a number, by ONNX element type."""
