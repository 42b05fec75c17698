"""ONNX graphs of the specification, and ONNX Runtime to run them.

    attention_model   one attention step           -> onnx.ModelProto
    gradient_model    its vector-Jacobian product  -> onnx.ModelProto
    mask_model        the soft mask alone          -> onnx.ModelProto
    AttentionRunner   NumPy arrays in and out, through these graphs on ONNX Runtime

onnx is imported when a model is made, onnxruntime when one is run.
"""

from refspan.export.models import DTYPES, FORMS, attention_model, gradient_model, mask_model
from refspan.export.runtime import AttentionRunner

__all__ = ["DTYPES", "FORMS", "AttentionRunner", "attention_model", "gradient_model", "mask_model"]
