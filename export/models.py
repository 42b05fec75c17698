"""The ONNX models: which source, which dtypes, which operator set; checked, documented and labelled."""

from typing import TYPE_CHECKING

import numpy as np

from refspan import __version__
from refspan.errors import SetupError
from refspan.export.source import build_model

if TYPE_CHECKING:
    import onnx

FORMS = ("fused", "portable")
"""fused: the standard Attention operator, for which runtimes have fast kernels. portable: primitive operators only."""

DTYPES = ("float16", "float32", "float64")

_TYPES = {"float16": "float16", "float32": "float", "float64": "double"}
"""NumPy name -> name in ONNX text."""

_OLDEST_OPSET = {
    "mask": 18,
    "attention_portable": 18,
    "attention_fused": 23,
    "gradient": 18,
    "model_portable": 18,
    "model_fused": 23,
}
"""18: ReduceMax takes its axes as an input. 23: Attention exists."""
_DEFAULT_OPSET = {**_OLDEST_OPSET, "attention_fused": 24}
"""One file of a model is for all devices, and CUDA is late with 24; see `AttentionRunner`."""

_CLAUSES = {
    "mask": ("PAST", "MASK", "WIDTH"),
    "attention_fused": ("PAST", "MASK", "LOGIT", "WEIGHT", "EMPTY", "OUTPUT", "WIDTH"),
    "attention_portable": ("PAST", "MASK", "LOGIT", "WEIGHT", "EMPTY", "OUTPUT", "WIDTH"),
    "gradient": ("PAST", "MASK", "LOGIT", "WEIGHT", "EMPTY", "OUTPUT", "GRAD", "WIDTH"),
}

_MEANING = {
    "query": "queries of the block [B, H, M, D]: batch, heads, queries, head size",
    "key": "keys of the memories [B, H, N, D], dtype of query",
    "value": "values of the memories [B, H, N, D], dtype of query",
    "span": "expire-span of each memory in steps [B, N], shared by heads, finite; float32 or wider (WIDTH)",
    "age": "steps from each memory to the block's first query [B, N], int64; 0, -1, .. for the block's own; any order",
    "ramp": "ramp length R in steps, a scalar > 0, dtype of span",
    "position": "relative position embedding [P, D], row j for distance j + 1; dtype of query",
    "queries": "number of queries M of the block, int64[1]",
    "mask": "how much of each memory each query sees [B, M, N], in [0, 1], dtype of span",
    "output": "attention output [B, H, M, D], dtype of query; 0 for a query that sees no memory (EMPTY)",
    "grad_output": "gradient of the attention output [B, H, M, D], dtype of query",
    "grad_query": "gradient of query [B, H, M, D], dtype of query",
    "grad_key": "gradient of key [B, H, N, D], dtype of query",
    "grad_value": "gradient of value [B, H, N, D], dtype of query",
    "grad_span": "gradient of span [B, N], dtype of span; only from queries on the memory's ramp, 0 < m < 1",
    "grad_position": "gradient of position [P, D], dtype of query",
}


def attention_model(
    form: str = "fused",
    dtype: str = "float32",
    *,
    position: bool = False,
    opset: int | None = None,
    span_dtype: str | None = None,
) -> "onnx.ModelProto":
    """One attention step (PAST, MASK, LOGIT, WEIGHT, EMPTY, OUTPUT, WIDTH) as an ONNX model.

    Args:
        form: one of `FORMS`.
        dtype: of query, key, value, position and output. float64 in the portable form only.
        position: whether there is an input `position` [P, D] for relative position scores.
        opset: version of the standard operator set; the oldest one that fits by default.
        span_dtype: of span and ramp, float32 or float64; the narrower that is not narrower than `dtype` by default.

    Raises:
        SetupError: there is no such form, dtype or opset, or no such combination.
    """
    if form not in FORMS:
        raise SetupError(f"form: got {form!r}, expected one of {', '.join(FORMS)}")
    if form == "fused" and dtype == "float64":
        raise SetupError("dtype: got 'float64', expected float16 or float32 in the fused form; use the portable form")
    return _model(f"attention_{form}", {"form": form}, dtype, position, opset, span_dtype)


def gradient_model(
    dtype: str = "float32", *, position: bool = False, opset: int | None = None, span_dtype: str | None = None
) -> "onnx.ModelProto":
    """The vector-Jacobian product of one attention step (GRAD) as an ONNX model; arguments as `attention_model`."""
    return _model("gradient", {}, dtype, position, opset, span_dtype)


def mask_model(span_dtype: str = "float32", *, opset: int | None = None) -> "onnx.ModelProto":
    """The soft mask alone (PAST, MASK, WIDTH) as an ONNX model."""
    return _model("mask", {}, span_dtype, False, opset, span_dtype)


def _model(
    source: str, extra: dict[str, str], dtype: str, position: bool, opset: int | None, span_dtype: str | None
) -> "onnx.ModelProto":
    if dtype not in DTYPES:
        raise SetupError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    compute_dtype = "float64" if dtype == "float64" else "float32"
    span_dtype = span_dtype or compute_dtype
    if span_dtype not in DTYPES[1:]:
        raise SetupError(f"span dtype: got {span_dtype!r}, expected float32 or float64 (WIDTH)")
    opset = opset_for(source, opset)
    settings: dict[str, str | int] = {"opset": opset, "ir_version": 8 if opset <= 18 else 10}
    settings |= type_settings(type=dtype, span_type=span_dtype, compute_type=compute_dtype)
    limits = np.finfo(compute_dtype)
    settings |= {"compute_lowest": repr(float(limits.min)), "compute_highest": repr(float(limits.max))}
    model = build_model(source, settings, {"position": position})
    labels = {"dtype": dtype, "span_dtype": span_dtype, "opset": str(opset), "position": str(position).lower()}
    label(model, {**extra, **labels}, _CLAUSES[source])
    check_graph(model)
    return model


def type_settings(**dtypes: str) -> dict[str, str | int]:
    """For each name an element type as ONNX text writes it, and under NAME_code its number."""
    import onnx

    settings: dict[str, str | int] = {}
    for name, dtype in dtypes.items():
        settings[name] = _TYPES[dtype]
        settings[f"{name}_code"] = getattr(onnx.TensorProto, _TYPES[dtype].upper())
    return settings


def opset_for(source: str, asked: int | None) -> int:
    """The operator set to use; raises SetupError if this graph cannot be written in the one asked for."""
    import onnx.defs

    oldest, newest = _OLDEST_OPSET[source], onnx.defs.onnx_opset_version()
    if asked is None:
        return _DEFAULT_OPSET[source]
    if not oldest <= asked <= newest:
        raise SetupError(f"opset: got {asked}, expected {oldest} to {newest} for {source.replace('_', ' in form ')}")
    return asked


def label(model: "onnx.ModelProto", settings: dict[str, str], clauses: tuple[str, ...]) -> None:
    """Say in the model itself what made it, what it implements and what each input and output is."""
    import onnx.helper

    model.producer_name, model.producer_version, model.domain = "refspan", __version__, "refspan"
    onnx.helper.set_model_props(model, {"refspan_version": __version__, "clauses": " ".join(clauses), **settings})
    for value in [*model.graph.input, *model.graph.output]:
        value.doc_string = value.doc_string or _MEANING[value.name]


def check_graph(model: "onnx.ModelProto") -> None:
    """Raise unless the model is valid and its types and shapes are consistent."""
    import onnx.checker
    import onnx.shape_inference

    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
