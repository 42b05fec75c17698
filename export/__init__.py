"""ONNX graphs of the specification, and ONNX Runtime to run them.

    attention_model   one attention step               -> onnx.ModelProto
    gradient_model    its vector-Jacobian product      -> onnx.ModelProto
    mask_model        the soft mask alone              -> onnx.ModelProto
    streaming_model   a step through the whole model   -> onnx.ModelProto
    write_model_file  that as a file
    OnnxModel         such a file on ONNX Runtime; OnnxModel.open() -> OnnxStream
    AttentionRunner   NumPy arrays in and out, through the graphs of one step on ONNX Runtime

onnx is imported when a model is made, onnxruntime when one is run.
"""

from refspan.export.model_file import write_model_file
from refspan.export.models import DTYPES, FORMS, attention_model, gradient_model, mask_model
from refspan.export.onnx_model import OnnxModel
from refspan.export.onnx_stream import OnnxStream, StreamFailedError
from refspan.export.runtime import AttentionRunner
from refspan.export.streaming import streaming_model

__all__ = [
    "DTYPES",
    "FORMS",
    "AttentionRunner",
    "OnnxModel",
    "OnnxStream",
    "StreamFailedError",
    "attention_model",
    "gradient_model",
    "mask_model",
    "streaming_model",
    "write_model_file",
]
