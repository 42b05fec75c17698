"""A vector as the backend tests of ONNX have it: a model, its inputs, its outputs; and how far these may be off."""

from collections.abc import Iterator

import numpy as np

from refspan.conformance.protocol import Array
from refspan.conformance.vectors.vector import Vector


def onnx_files(vector: Vector) -> Iterator[tuple[str, bytes]]:
    """Name within the folder of the case -> content."""
    import onnx.numpy_helper

    from refspan.export import attention_model, gradient_model
    from refspan.export.models import mask_model

    span = str(vector.inputs["span"].dtype)
    position = "position" in vector.inputs
    if vector.operation == "soft_mask":
        model = mask_model(span)
    elif vector.operation == "span_attention":
        model = attention_model("portable", vector.dtype, position=position, span_dtype=span)
    else:
        model = gradient_model(vector.dtype, position=position, span_dtype=span)
    yield "model.onnx", model.SerializeToString(deterministic=True)
    values: dict[str, Array] = {name.replace("grad_out", "grad_output"): x for name, x in vector.inputs.items()}
    with np.errstate(over="ignore"):  # what the dtype cannot hold is infinite, and decides nothing
        values |= {"ramp": np.asarray(vector.ramp, span), "queries": np.array([vector.queries], np.int64)}
        for name, result in vector.expected.items():
            like = vector.inputs["span"] if name in ("mask", "span") else vector.inputs["query"]
            values[_in_the_graph(name)] = result.astype(like.dtype)
    bounds = {_in_the_graph(name): bound for name, bound in vector.bound.items()}
    inputs, outputs = model.graph.input, model.graph.output
    for kind, described, arrays in (("input", inputs, values), ("output", outputs, values), ("bound", outputs, bounds)):
        for i, value in enumerate(described):
            tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(arrays[value.name]), value.name)
            yield f"test_data_set_0/{kind}_{i}.pb", tensor.SerializeToString(deterministic=True)


def _in_the_graph(name: str) -> str:
    """What our graphs call a result: gradients are `grad_NAME`."""
    return name if name in ("mask", "output") else f"grad_{name}"
