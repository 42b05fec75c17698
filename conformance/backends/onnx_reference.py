"""Our ONNX graphs on `onnx.reference`, the evaluator that comes with the onnx package."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx

from refspan.conformance.backends.graphs import ExportedGraphs, Run
from refspan.conformance.protocol import Array

if TYPE_CHECKING:
    pass


class OnnxReferenceBackend(ExportedGraphs):
    """As `ExportedGraphs`."""

    name = "onnx-reference"

    def load(self, model: onnx.ModelProto) -> Run:
        """An evaluator of the model."""
        from onnx.reference import ReferenceEvaluator

        evaluator: ReferenceEvaluator = ReferenceEvaluator(model)

        def run(feed: Mapping[str, Array]) -> Sequence[Array]:
            with np.errstate(all="ignore"):  # log 0 is what the logarithm of an expired memory's mask is
                return list(evaluator.run(None, dict(feed)))

        return run

    def facts(self) -> dict[str, str]:
        """Version and form."""
        return {"onnx": onnx.__version__, "form": self.form}
