"""Streaming: tokens in, log-probabilities out, with parameters that no longer change (clauses MODEL, CACHE, AGE, DROP).

Keys, values and spans of a memory are made once, when its block is read, and kept until it expires. Nothing else of a
block is. A step either succeeds as a whole or leaves the stream as it was.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from refspan.arrays import FLOATS, Array, check_count, check_dtype, check_shape, check_whole, device_of, namespace_of
from refspan.config import ModelConfig, check_parameters
from refspan.cross_entropy import log_softmax
from refspan.embedding import embedding
from refspan.fingerprint import fingerprint
from refspan.layer import Remembered, attend, finish, normalise_input, remember
from refspan.layer_norm import layer_norm
from refspan.linear import linear
from refspan.memory import Memory, after_block, check_ages, empty_memory
from refspan.model import check_layers, check_tokens, layer_parameters, widened
from refspan.stream_state import check_state


class MemoryLimitError(ValueError):
    """More memories would be held than the stream may; it is as it was before."""


def open_model(
    config: ModelConfig,
    params: Mapping[str, Array],
    *,
    batch: int,
    memory: Sequence[tuple[Array, Array]] | None = None,
    max_memories: int | None = None,
) -> "Stream":
    """Start `batch` streams of tokens through a model.

    Args:
        config: the model.
        params: its parameters by name, see `parameter_shapes`. Not copied: leave them alone while the stream is open.
        batch: B, number of streams.
        memory: None to start empty (START), or a pair for each layer: hidden states [B, N, d], what the layer was given
            at earlier steps, and their ages [B, N] int64 >= 1 as seen from the first query of the first step.
        max_memories: most memories that a layer may hold for a row after a block; None for no limit but BOUND. A step
            of several blocks is refused at the first that passes it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; the message names it.
        MemoryLimitError: `memory` holds more than `max_memories`.
    """
    return Stream(config, params, batch=batch, memory=memory, max_memories=max_memories)


class Stream:
    """`batch` streams of tokens through one model; see `open_model`. Not for use by several threads at once."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Array],
        *,
        batch: int,
        memory: Sequence[tuple[Array, Array]] | None = None,
        max_memories: int | None = None,
    ) -> None:
        xp = check_parameters(config, params)
        self._xp, self._config, self._batch = xp, config, check_count("batch", batch)
        self._max_memories = None if max_memories is None else check_count("max_memories", max_memories)
        self._dtype = params["embedding.weight"].dtype
        self._given = params
        self._params = widened(xp, params)
        self._layers = [layer_parameters(self._params, i) for i in range(config.layers)]
        self._memory = [self._empty() for _ in range(config.layers)]
        self._projected = 0
        if memory is not None:
            self._memory = self._remembered(memory)
            self._check_limit(self._memory)

    @property
    def config(self) -> ModelConfig:
        """The model's shape and settings."""
        return self._config

    @property
    def params(self) -> Mapping[str, Array]:
        """Its parameters, as given to `open_model`."""
        return self._given

    def step(self, tokens: Array) -> Array:
        """Read a block of any length M >= 1.

        Args:
            tokens: [B, M] int64, 0..V-1.

        Returns:
            Log-probabilities of the token that follows each, [B, M, V], dtype of the parameters.

        Raises:
            TypeError, ValueError: `tokens` are no such array. The stream goes on as if they had not been given.
            MemoryLimitError: see `open_model`; likewise.
        """
        check_tokens(self._config, self._given["embedding.weight"], "tokens", tokens, (self._batch, "M"))
        xp, size, memory, parts = self._xp, self._config.block_size, self._memory, []
        count = tokens.shape[1]
        for start in range(0, count, size):  # any cut gives the same (AGE); this one bounds the work
            log_probs, memory = self._block(tokens[:, start : min(start + size, count)], memory)
            self._check_limit(memory)
            parts.append(xp.astype(log_probs, self._dtype, copy=False))
        self._memory = memory
        self._projected += self._batch * count * self._config.layers
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=1)

    def memory_size(self) -> tuple[int, ...]:
        """Memories that each layer holds, the longest row of the batch; never more than are live (BOUND).

        Empty slots for one more block, as long as the last one, are set aside beside them.
        """
        return tuple(memory.slots for memory in self._memory)

    def rows_projected(self) -> int:
        """Memories projected to keys and values so far, over all rows and layers; each is once (CACHE)."""
        return self._projected

    def reset(self, row: int) -> None:
        """One row of the batch starts anew, empty; the others go on."""
        row = check_whole("row", row)
        if not 0 <= row < self._batch:
            raise ValueError(f"row: got {row}, expected 0 to {self._batch - 1}")
        xp = self._xp
        forgotten = [memory.forget_row(xp, row) for memory in self._memory]
        self._memory = [memory.drop(xp, ~memory.held) for memory in forgotten]

    def state(self) -> dict[str, Array]:
        """A copy of all that the stream remembers, for `restore`.

        `layers.{i}.age`, `.key`, `.value` and `.span`, and `model`, a fingerprint of the parameters (uint8 [32]), which
        is computed once: when a state is first saved or restored.
        """
        xp = self._xp
        layers = {
            f"layers.{i}.{name}": xp.asarray(array[:, : memory.slots, ...], copy=True)
            for i, memory in enumerate(self._memory)
            for name, array in {"age": memory.age, **memory.contents}.items()
        }
        return {**layers, "model": xp.asarray(self._model, copy=True)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` returned, here or in another stream of the same model and batch.

        Raises:
            TypeError, ValueError: the state does not fit this model and batch; the stream goes on as it was.
            MemoryLimitError: it holds more than `max_memories`; likewise.
        """
        memory = check_state(self._xp, state, self._config, self._batch, self._empty(), self._model)
        self._check_limit(memory)
        self._memory = memory

    @cached_property
    def _model(self) -> Array:
        """The fingerprint of the model, uint8 [32]."""
        numbers = list(fingerprint(self._config, self._given))
        return self._xp.asarray(numbers, dtype=self._xp.uint8, device=device_of(self._given["embedding.weight"]))

    def _block(self, tokens: Array, memory: Sequence[Memory]) -> tuple[Array, list[Memory]]:
        """Log-probabilities [B, M, V] of one block, and the memories after it."""
        xp, config, params, after = self._xp, self._config, self._params, []
        h = embedding(xp, tokens, params["embedding.weight"])  # [B, M, d]
        for i, p in enumerate(self._layers):
            normal = normalise_input(xp, config, p, h)
            held = memory[i].append(xp, remember(xp, config, p, normal)._asdict())
            kept = Remembered(**held.contents)
            result, _, _ = attend(xp, config, p, normal, kept, held.age, params["position.weight"])
            h, *_ = finish(xp, config, p, h + result)
            after.append(self._aged(held, tokens.shape[1]))
        if config.norm == "pre":
            h = layer_norm(xp, h, params["final_norm.weight"], params["final_norm.bias"])
        return log_softmax(xp, linear(h, params["output.weight"], params["output.bias"])), after

    def _aged(self, memory: Memory, queries: int) -> Memory:
        """After a block of M queries, with room for another one."""
        positions = int(self._params["position.weight"].shape[0])
        span = memory.contents["span"]
        return after_block(self._xp, memory, span, queries, ramp=self._config.ramp, positions=positions, room=queries)

    def _check_limit(self, memory: Sequence[Memory]) -> None:
        """Raise if a layer holds more than the stream may."""
        for i, one in enumerate(memory):
            if self._max_memories is not None and one.slots > self._max_memories:
                raise MemoryLimitError(
                    f"layer {i} would hold {one.slots} memories, the limit is {self._max_memories} (max_memories); "
                    "raise it, or reset rows that have ended"
                )

    def _empty(self) -> Memory:
        """A layer's memory with no slots (START)."""
        table = self._params["embedding.weight"]
        inner = self._config.heads * self._config.head_size
        sizes: dict[str, tuple[int, ...]] = {"key": (inner,), "value": (inner,), "span": ()}
        return empty_memory(self._xp, self._batch, sizes, dict.fromkeys(sizes, table.dtype), device_of(table))

    def _remembered(self, memory: Sequence[tuple[Array, Array]]) -> list[Memory]:
        """Keys, values and spans of given hidden states."""
        xp, config, made = self._xp, self._config, []
        table = self._given["embedding.weight"]
        for i, pair in enumerate(check_layers(config, memory)):
            name = f"memory of layer {i}"
            try:
                hidden, age = pair
            except (TypeError, ValueError):
                raise TypeError(f"{name}: got {type(pair).__name__}, expected a pair (hidden, age)") from None
            namespace_of(parameters=table, **{f"{name}: hidden": hidden, f"{name}: age": age})
            check_shape(f"{name}: hidden", hidden, (self._batch, "N", config.hidden_size))
            check_dtype(xp, f"{name}: hidden", hidden, FLOATS)
            check_ages(xp, f"{name}: age", age, tuple(hidden.shape[:2]))
            if not bool(xp.all(xp.isfinite(hidden))):
                raise ValueError(f"{name}: hidden: holds NaN or infinite numbers")
            p = self._layers[i]
            normal = normalise_input(xp, config, p, xp.astype(hidden, p["span.weight"].dtype))
            self._projected += self._batch * int(hidden.shape[1])
            made.append(self._aged(Memory(age, remember(xp, config, p, normal)._asdict()), 0))
        return made
