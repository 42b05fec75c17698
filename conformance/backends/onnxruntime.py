"""Our ONNX graphs on ONNX Runtime as a backend."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx.inliner

import refspan
from refspan.export import DTYPES, AttentionRunner, OnnxModel, OnnxStream, streaming_model

Array = np.ndarray[Any, np.dtype[Any]]

MODELS = 4
"""Models that are kept ready: checks open some again."""


class OnnxRuntimeBackend:
    """The graphs of `refspan.export`: one step run by `AttentionRunner`, whole models by `OnnxModel`.

    Args:
        device: "cpu" or "cuda".
        form: "fused" or "portable".
        session_options: further session configuration entries of ONNX Runtime.
    """

    name = "onnxruntime"

    def __init__(
        self, device: str = "cpu", form: str = "fused", session_options: Mapping[str, str] | None = None
    ) -> None:
        self._options = dict(session_options or {})
        self._runner = AttentionRunner(device=device, form=form, session_options=self._options)
        self._device, self._form = device, form
        self.dtypes = tuple(dtype for dtype in DTYPES if dtype != "float64" or form == "portable")
        self.soft_mask = self._runner.soft_mask
        self.span_attention = self._runner.span_attention
        self.span_attention_backward = self._runner.span_attention_backward
        self._model = lru_cache(MODELS)(self._make)

    def open_model(
        self,
        config: refspan.ModelConfig,
        params: Mapping[str, Array],
        *,
        batch: int,
        memory: Sequence[tuple[Array, Array]] | None = None,
    ) -> "_Stream":
        """Export the model, in the dtype of its parameters, and start `batch` streams.

        Keys, values and spans of a given `memory` are made by the reference: an exported model has no use for hidden
        states.
        """
        arrays = tuple((name, x.dtype.str, x.shape, x.tobytes()) for name, x in params.items())
        stream = self._model(config, arrays).open(batch)
        if memory is None:
            return _Stream(stream, 0)
        start = refspan.open_model(config, params, batch=batch, memory=memory)
        stream.restore(start.state())
        return _Stream(stream, start.rows_projected())

    def _make(
        self, config: refspan.ModelConfig, arrays: tuple[tuple[str, str, tuple[int, ...], bytes], ...]
    ) -> OnnxModel:
        params = {name: np.frombuffer(content, dtype).reshape(shape) for name, dtype, shape, content in arrays}
        dtype = str(params["embedding.weight"].dtype)
        model = streaming_model(config, params, form=self._form, dtype=dtype)
        # ONNX Runtime would put functions in place of their calls too, but takes longer; checks open hundreds.
        inlined = onnx.inliner.inline_local_functions(model)
        return OnnxModel.of(inlined, device=self._device, session_options=self._options)

    def facts(self) -> dict[str, str]:
        """Version, device, form of the graph, and which kernels and provider ran a first small step of it."""
        span, age = np.full((1, 8), 9, np.float32), np.arange(8, 0, -1)[None]
        for dtype in self.dtypes:
            ones = np.ones((1, 2, 8, 64), dtype)
            self._runner.span_attention(ones, ones, ones, span, age, ramp=1.0)
        nodes = Counter(self._runner.placement().values())
        return {
            "onnxruntime": self._runner.version,
            "device": self._runner.device,
            "form": self._runner.form,
            "provider": ", ".join(f"{provider} ({count} nodes)" for provider, count in nodes.items()),
            "kernel": ", ".join(self._runner.kernel()),
        }


class _Stream:
    """A stream on ONNX Runtime, and how many memories it has projected: those of its tokens, each once (CACHE)."""

    def __init__(self, stream: OnnxStream, projected: int) -> None:
        self._stream, self._projected = stream, projected
        self.memory_size = stream.memory_size
        self.reset = stream.reset
        self.state = stream.state
        self.restore = stream.restore

    def step(self, tokens: Array) -> Array:
        log_probs = self._stream.step(tokens)
        self._projected += tokens.size * self._stream.config.layers
        return log_probs

    def rows_projected(self) -> int:
        return self._projected
