"""Streams of tokens through a model that ONNX Runtime runs; what they remember stays on its device."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refspan.arrays import check_whole
from refspan.checkpoint import read_state, write_state
from refspan.config import ModelConfig
from refspan.errors import RunFailedError, SetupError
from refspan.export.layout import Array
from refspan.export.session import line_of
from refspan.export.slots import needed_slots, slots_for
from refspan.export.stream_arrays import from_memory, to_memory
from refspan.export.stream_buffers import Buffers, bind_output
from refspan.memory import Memory
from refspan.stream import MemoryLimitError
from refspan.stream_state import check_state

if TYPE_CHECKING:
    from refspan.export.onnx_model import OnnxModel


AS_IT_WAS = "(the stream is as it was)"


class StreamFailedError(RunFailedError):
    """ONNX Runtime failed, or there is no memory left; the message says what could not be done.

    If a step stopped in its middle, `restore` a saved state, here or in another stream, to go on.
    """


def _failed(doing: str, error: Exception) -> StreamFailedError:
    """What to raise instead of an error of ONNX Runtime, which knows a dozen unrelated types, or of NumPy."""
    said = "there is no memory left" if isinstance(error, MemoryError) else line_of(error)
    return StreamFailedError(f"ONNX Runtime failed {doing}: {said}")


class OnnxStream:
    """`batch` streams of tokens through one model, as `OnnxModel.open` returns it. For one thread at a time."""

    def __init__(self, model: "OnnxModel", batch: int, max_slots: int | None) -> None:
        self._model, self._batch, self._max_slots = model, batch, max_slots
        self._buffers: Buffers | None = None
        """None once the stream is closed."""
        self._broken = False
        self._last_lengths: Array | None = None
        """[B], tokens of the last block; None if a row has restarted since."""
        self._full = np.zeros(batch, np.int64)
        """[B], lengths of the last block whose tokens all counted."""
        self._no_restart = np.zeros(batch, bool)
        self._restart = self._no_restart
        """[B], rows that forget everything before the next block."""
        self._counts = self._bound_counts = np.zeros((self.config.layers, batch, 3), np.int64)
        """What the graph calls `live`: as it is, and where the next step writes it."""
        self._bound: list[dict[str, Array]] = [{}, {}]
        """Host arrays that the two bindings read."""
        self._start([self._empty()] * self.config.layers)

    @property
    def config(self) -> ModelConfig:
        """The model's shape and settings."""
        return self._model.layout.config

    @property
    def batch(self) -> int:
        """B."""
        return self._batch

    @property
    def broken(self) -> bool:
        """Whether a step stopped in its middle: what the stream remembers cannot be asked for or gone on with."""
        return self._broken

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
            StreamFailedError: ONNX Runtime failed. If it did so before the step, for example because there is no memory
                for more slots, the stream is as it was, and the message says so; else it can only be restored, or
                closed.
        """
        buffers = self._opened()
        lengths = self._checked(tokens, lengths)
        size, count = self.config.block_size, tokens.shape[1]
        if count <= size:
            return self._block(buffers, np.ascontiguousarray(tokens), lengths)
        log_probs = self._room(tokens)
        for start in range(0, count, size):
            block = np.ascontiguousarray(tokens[:, start : start + size])
            try:
                part = self._block(buffers, block, np.clip(lengths - start, 0, block.shape[1]))
            except (StreamFailedError, MemoryLimitError) as error:
                read = f"(the stream has read {start} tokens of the block)"
                raise type(error)(str(error).replace(AS_IT_WAS, read)) from None
            log_probs[:, start : start + size] = part
        return log_probs

    def _room(self, tokens: Array) -> Array:
        """An array for the log-probabilities of these tokens."""
        try:
            return np.empty((*tokens.shape, self.config.vocab_size), self._model.layout.dtype)
        except MemoryError as error:
            raise _failed(f"to make room for the results of a step {AS_IT_WAS}", error) from None

    def memory_size(self) -> tuple[int, ...]:
        """Memories that each layer holds, the longest row of the batch: those that a later query may see."""
        return tuple(int(n) for n in np.max(self._counts[:, :, 0] + self._counts[:, :, 1], axis=1))

    def slots(self) -> tuple[int, ...]:
        """Slots that each layer has for memories of more than P steps, see docs/onnx.md."""
        return tuple(self._held().slots)

    def state_bytes(self) -> int:
        """Bytes of the device's memory that hold the state."""
        return self._held().bytes()

    def reset(self, row: int) -> None:
        """One row of the batch starts anew, empty; the others go on."""
        self._opened()
        row = check_whole("row", row)
        if not 0 <= row < self._batch:
            raise ValueError(f"row: got {row}, expected 0 to {self._batch - 1}")
        self._restart = self._restart | (np.arange(self._batch) == row)
        self._counts[:, row] = 0
        self._last_lengths = None

    def state(self) -> dict[str, Array]:
        """A copy of all that the stream remembers, on the host, as `refspan.Stream.state` returns it.

        Raises:
            StreamFailedError: ONNX Runtime failed, now or in the middle of a step before.
        """
        buffers = self._opened()
        state: dict[str, Array] = {}
        try:
            for i in range(self.config.layers):
                memory = to_memory(self._model.layout, *buffers.arrays(i), self._restart)
                state |= {f"layers.{i}.{name}": x for name, x in {"age": memory.age, **memory.contents}.items()}
        except Exception as error:  # noqa: BLE001
            raise _failed("to copy the state from the device", error) from None
        return state | {"model": self._model.fingerprint.copy()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` returned, here, in another stream of this model and batch, or in a `refspan.Stream`.

        Raises:
            TypeError, ValueError: the state does not fit this model and batch; the stream goes on as it was.
            MemoryLimitError: it needs more slots than `max_slots`; likewise.
            StreamFailedError: there is no memory for it; likewise.
        """
        self._held()
        self._start(check_state(np, state, self.config, self._batch, self._empty(), self._model.fingerprint))

    def save_state(self, path: str | Path, *, notes: Mapping[str, str] | None = None) -> None:
        """Write the state to a file, which `load_state` and `refspan.load_state` read; whole or not at all.

        Args:
            path: of the file, by convention `.safetensors`.
            notes: further metadata, see `refspan.checkpoint.load_state_notes`.

        Raises:
            SetupError: the file cannot be written; what was there is untouched.
        """
        write_state(path, self.config, self.state(), notes)

    def load_state(self, path: str | Path) -> None:
        """Go on from a file that `save_state` or `refspan.save_state` wrote.

        Raises:
            SetupError: the file cannot be read, is no such file, or belongs to another model or batch size. The stream
                goes on as it was.
            StreamFailedError: there is no memory for it; likewise.
        """
        try:
            arrays = read_state(path, self.config)
        except MemoryError as error:
            raise _failed("to read the state", error) from None
        try:
            self.restore(arrays)
        except (TypeError, ValueError) as error:
            raise SetupError(f"{path}: {error}") from None

    def close(self) -> None:
        """Free the state. Closing again does nothing."""
        self._buffers = None

    def __enter__(self) -> "OnnxStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _block(self, buffers: Buffers, tokens: Array, lengths: Array) -> Array:
        """Log-probabilities [B, M, V] of at most block_size tokens a row."""
        session = self._model.session
        log_probs = self._room(tokens)
        self._broken = True  # until the step is done, or found impossible: Ctrl-C may come at any point, too
        try:
            self._make_room(buffers, tokens.shape[1], lengths)
        except (StreamFailedError, MemoryLimitError):
            self._broken = False
            raise
        binding, bound = buffers.binding, self._bound[buffers.turn]
        for name, array in (("tokens", tokens), ("lengths", lengths), ("restart", self._restart)):
            if name == "tokens" or bound.get(name) is not array:
                binding.bind_cpu_input(name, array)
                bound[name] = array  # it must live as long as it is bound; all but tokens are ours and never written to
        bind_output(binding, "log_probs", log_probs)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # noqa: BLE001
            raise _failed("in the middle of a step", error) from None
        buffers.advance()
        self._counts, self._last_lengths, self._restart = self._bound_counts.copy(), lengths, self._no_restart
        self._broken = False
        return log_probs

    def _make_room(self, buffers: Buffers, queries: int, lengths: Array) -> None:
        """Give each layer the slots that a block of M queries needs; all of them, or none if that is too many."""
        needed = needed_slots(self._counts, lengths, self._last_lengths, self._model.layout.positions)
        wanted = [
            self._limited(i, slots_for(max(n, queries), current))
            for i, (n, current) in enumerate(zip(needed, buffers.slots, strict=True))
        ]
        for i, slots in enumerate(wanted):
            if slots != buffers.slots[i]:
                try:
                    buffers.repack(i, slots)
                except Exception as error:  # noqa: BLE001
                    raise _failed(f"to make {slots} slots in layer {i} {AS_IT_WAS}", error) from None

    def _limited(self, layer: int, slots: int) -> int:
        if self._max_slots is not None and slots > self._max_slots:
            raise MemoryLimitError(
                f"layer {layer} might need {slots} slots, the limit is {self._max_slots} (max_slots); raise it, or "
                "reset rows that have ended"
            )
        return slots

    def _start(self, memory: list[Memory]) -> None:
        """Go on from these memories, in new buffers."""
        layout, layers, counts = self._model.layout, [], []
        _ = self._model.session  # raises if the model is closed
        slots = [
            self._limited(i, slots_for(1 + int(np.max(np.sum(one.age > layout.positions, axis=1), initial=0))))
            for i, one in enumerate(memory)
        ]
        try:
            for one, most in zip(memory, slots, strict=True):
                recent, distant, count = from_memory(layout, one, most)
                layers.append((recent, distant))
                counts.append(count)
            buffers = Buffers(self._model, layers)
        except Exception as error:  # noqa: BLE001
            raise _failed("to make room for the state", error) from None
        self._broken = True  # until all of it is in place
        self._buffers = buffers
        self._counts = np.array(counts)
        self._bound_counts = self._counts.copy()
        self._buffers.bind_output("live", self._bound_counts)
        self._bound = [{}, {}]
        self._restart, self._last_lengths = self._no_restart, None
        self._broken = False

    def _empty(self) -> Memory:
        """A layer's memory of no slots (START)."""
        inner = self.config.heads * self.config.head_size
        sizes: dict[str, tuple[int, ...]] = {"key": (inner,), "value": (inner,), "span": ()}
        contents = {name: np.zeros((self._batch, 0, *size), self._model.layout.wide) for name, size in sizes.items()}
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
            if self._full[0] != tokens.shape[1]:
                self._full = np.full(self._batch, tokens.shape[1])
            return self._full
        lengths = np.array(lengths)
        if lengths.dtype != np.int64 or lengths.shape != (self._batch,):
            raise ValueError(f"lengths: got {lengths.dtype} {lengths.shape}, expected int64 ({self._batch},)")
        if lengths.min() < 0 or lengths.max() > tokens.shape[1]:
            wrong = int(lengths.min()) if lengths.min() < 0 else int(lengths.max())
            raise ValueError(f"lengths: got {wrong}, expected 0 to {tokens.shape[1]}")
        return lengths

    def _opened(self) -> Buffers:
        buffers = self._held()
        if self._broken:
            raise StreamFailedError("an earlier step did not end; restore a saved state, or open a new stream")
        return buffers

    def _held(self) -> Buffers:
        if self._buffers is None:
            raise ValueError("the stream is closed")
        return self._buffers
