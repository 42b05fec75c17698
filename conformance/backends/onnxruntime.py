"""Our ONNX graphs on ONNX Runtime as a backend."""

from refspan.export import DTYPES, AttentionRunner


class OnnxRuntimeBackend:
    """The graphs of `refspan.export`, run by `AttentionRunner`."""

    name = "onnxruntime"

    def __init__(self, device: str = "cpu", form: str = "fused") -> None:
        self._runner = AttentionRunner(device=device, form=form)
        self.dtypes = tuple(DTYPES[form]) if isinstance(DTYPES, dict) else tuple(DTYPES)
        self.soft_mask = self._runner.soft_mask
        self.span_attention = self._runner.span_attention
        self.span_attention_backward = self._runner.span_attention_backward

    def facts(self) -> dict[str, str]:
        """Version, device, execution providers and graph form."""
        return {
            "onnxruntime": self._runner.version,
            "device": self._runner.device,
            "providers": ", ".join(self._runner.providers),
            "form": self._runner.form,
        }
