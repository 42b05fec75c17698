"""Our ONNX graphs on ONNX Runtime as a backend."""

from collections import Counter

import numpy as np

from refspan.export import DTYPES, AttentionRunner


class OnnxRuntimeBackend:
    """The graphs of `refspan.export`, run by `AttentionRunner`."""

    name = "onnxruntime"

    def __init__(self, device: str = "cpu", form: str = "fused") -> None:
        self._runner = AttentionRunner(device=device, form=form)
        self.dtypes = tuple(dtype for dtype in DTYPES if dtype != "float64" or form == "portable")
        self.soft_mask = self._runner.soft_mask
        self.span_attention = self._runner.span_attention
        self.span_attention_backward = self._runner.span_attention_backward

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
