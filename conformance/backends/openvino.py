"""Our ONNX graphs on OpenVINO's CPU plugin.

OpenVINO knows no functions of a model's own, so calls are replaced by what they stand for first.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refspan.conformance.backends.graphs import ExportedGraphs, Run
from refspan.conformance.protocol import Array
from refspan.errors import SetupError

if TYPE_CHECKING:
    import onnx


class OpenVinoBackend(ExportedGraphs):
    """As `ExportedGraphs`."""

    name = "openvino"

    def __init__(self, form: str = "portable") -> None:
        try:
            import openvino
        except ImportError as error:
            raise SetupError(f"OpenVINO is missing ({error}); install it with: pip install openvino") from None
        super().__init__(form)
        self._openvino, self._core = openvino, openvino.Core()

    def load(self, model: "onnx.ModelProto") -> Run:
        """The model, compiled for the CPU in the precision that it has."""
        import onnx.inliner

        inlined = onnx.inliner.inline_local_functions(model)
        read: Any = self._core.read_model(inlined.SerializeToString())
        compiled = self._core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(feed: Mapping[str, Array]) -> Sequence[Array]:
            results = compiled.create_infer_request().infer(dict(feed))  # one each: threads may not share a request
            return [np.array(results[output]) for output in compiled.outputs]

        return run

    def facts(self) -> dict[str, str]:
        """Version, device and form."""
        device = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        return {"openvino": self._openvino.__version__, "device": f"cpu ({device})", "form": self.form}
