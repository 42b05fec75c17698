"""The reference itself as a backend, on NumPy and on CuPy."""

import platform
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

import refspan
from refspan import ModelConfig
from refspan.conformance.protocol import Array
from refspan.errors import SetupError


class NumpyBackend:
    """The reference on NumPy, in the dtype of its arguments."""

    name = "numpy"
    package: Any = refspan
    """What computes: the reference, or a changed copy of it."""
    limits: Mapping[str, int] = MappingProxyType({})
    """`scratch_bytes` and `keep_bytes` of an attention step, if other than usual."""

    def facts(self) -> dict[str, str]:
        """Versions and device."""
        return {"numpy": np.__version__, "device": f"cpu ({platform.machine()})"}

    def to_device(self, array: Array | None) -> Any:
        """An argument as the reference takes it."""
        return array

    def to_numpy(self, array: Any) -> Array:
        """A result as the protocol wants it."""
        return np.asarray(array)

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        """As in the protocol."""
        return self.to_numpy(
            self.package.soft_mask(self.to_device(span), self.to_device(age), queries=queries, ramp=ramp)
        )

    def span_attention(
        self,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        *,
        ramp: float,
        position: Array | None = None,
    ) -> Array:
        """As in the protocol."""
        with np.errstate(all="ignore"):  # BLAS raises flags for lanes that it discards; results are looked at anyway
            output, _ = self._forward(query, key, value, span, age, ramp=ramp, position=position)
        return self.to_numpy(output)

    def span_attention_backward(
        self,
        grad_out: Array,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        *,
        ramp: float,
        position: Array | None = None,
    ) -> dict[str, Array]:
        """As in the protocol."""
        with np.errstate(all="ignore"):
            _, saved = self._forward(query, key, value, span, age, ramp=ramp, position=position)
            gradients = self.package.span_attention_backward(self.to_device(grad_out), saved)
        return {name: self.to_numpy(grad) for name, grad in gradients._asdict().items() if grad is not None}

    def open_model(
        self,
        config: ModelConfig,
        params: Mapping[str, Array],
        *,
        batch: int,
        memory: Sequence[tuple[Array, Array]] | None = None,
    ) -> "_Stream":
        """As in the protocol."""
        given = memory and [(self.to_device(hidden), self.to_device(age)) for hidden, age in memory]
        stream = self.package.open_model(
            config, {name: self.to_device(x) for name, x in params.items()}, batch=batch, memory=given
        )
        return _Stream(self, stream)

    def loss_and_gradients(
        self,
        config: ModelConfig,
        params: Mapping[str, Array],
        tokens: Array,
        targets: Array,
        memory: Sequence[refspan.Memory] | None,
        *,
        span_loss_weight: float = 0.0,
        span_limit: float | None = None,
    ) -> tuple[tuple[float, float], dict[str, Array], Sequence[refspan.Memory]]:
        """As in the protocol."""
        with np.errstate(all="ignore"):
            losses, grads, memory = self.package.loss_and_gradients(
                config,
                {name: self.to_device(x) for name, x in params.items()},
                self.to_device(tokens),
                self.to_device(targets),
                memory,
                span_loss_weight=span_loss_weight,
                span_limit=span_limit,
            )
        return losses, {name: self.to_numpy(grad) for name, grad in grads.items()}, memory

    def initial_parameters(self, config: ModelConfig, seed: int) -> dict[str, Array]:
        """As in the protocol."""
        params: dict[str, Array] = self.package.initial_parameters(config, seed)
        return params

    def _forward(self, *arrays: Array, ramp: float, position: Array | None) -> Any:
        query, key, value, span, age = (self.to_device(array) for array in arrays)
        position = self.to_device(position)
        return self.package.span_attention(query, key, value, span, age, ramp=ramp, position=position, **self.limits)


class _Stream:
    """A stream of the reference, NumPy arrays in and out."""

    def __init__(self, backend: NumpyBackend, stream: refspan.Stream) -> None:
        self._backend, self._stream = backend, stream
        self.memory_size, self.reset, self.rows_projected = stream.memory_size, stream.reset, stream.rows_projected
        self.state, self.restore = stream.state, stream.restore

    def step(self, tokens: Array) -> Array:
        """As in the protocol."""
        with np.errstate(all="ignore"):
            return self._backend.to_numpy(self._stream.step(self._backend.to_device(tokens)))


class SmallTiles(NumpyBackend):
    """The reference in many tiles, none of whose weights are kept: what it does at sizes that checks do not ask for."""

    name = "numpy, small tiles"
    limits = MappingProxyType({"scratch_bytes": 256, "keep_bytes": 0})


class CupyBackend(NumpyBackend):
    """The reference on CuPy, on the current CUDA device."""

    name = "cupy"

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise SetupError(f'CuPy is missing ({error}); install it with: pip install "refspan[gpu]"') from None
        try:
            self._device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        except Exception as error:  # noqa: BLE001 - a driver, a library or a GPU that is missing: several types
            raise SetupError(f"CuPy finds no usable GPU ({error}); is the NVIDIA driver installed?") from None
        self._cupy = cupy

    def facts(self) -> dict[str, str]:
        """Versions and device; a first small step compiles CuPy's kernels, which no answer's time should pay for."""
        span, age = np.full((1, 4), 2, np.float32), np.arange(2, -2, -1)[None]
        self.soft_mask(span, age, queries=2, ramp=2.0)
        for dtype in ("float16", "float32", "float64"):
            query, key, table = (np.ones(shape, dtype) for shape in ((1, 1, 2, 8), (1, 1, 4, 8), (3, 8)))
            self.span_attention_backward(query, query, key, key, span, age, ramp=2.0, position=table)
        return {"cupy": self._cupy.__version__, "device": self._device}

    def to_device(self, array: Array | None) -> Any:
        """Copied to the GPU."""
        return None if array is None else self._cupy.asarray(array)

    def to_numpy(self, array: Any) -> Array:
        """Copied back."""
        return np.asarray(self._cupy.asnumpy(array))
