"""The whole model as one ONNX graph: a step of a stream, with what every layer remembers going in and coming out.

    tokens, lengths, restart, state of each layer  ->  log_probs, live, new state of each layer

The layers are calls of one function, `refspan.layer`, each with its own weights; see `layer.onnxtxt` and the functions
that it calls, and `layout.py` for what a state consists of.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from refspan.config import ModelConfig, check_parameters
from refspan.errors import SetupError
from refspan.export.layout import LAYOUT, Array, Layout
from refspan.export.models import DTYPES, FORMS, check_graph, label, opset_for, type_settings
from refspan.export.source import functions_of, name_nodes
from refspan.fingerprint import fingerprint

if TYPE_CHECKING:
    import onnx

CLAUSES = (
    *("SPAN", "PAST", "MASK", "LOGIT", "WEIGHT", "EMPTY", "OUTPUT", "AGE", "DROP", "BOUND", "START", "CACHE"),
    *("WIDTH", "LAYER", "MODEL"),
)

SMALL_TENSOR = 1024
"""Bytes of a tensor up to which it always is part of the graph: shapes, scalars and the like."""


def streaming_model(
    config: ModelConfig,
    params: Mapping[str, Array],
    *,
    form: str = "fused",
    dtype: str = "float32",
    opset: int | None = None,
    tokenizer: str = "",
) -> "onnx.ModelProto":
    """One step of a stream through the whole model (MODEL), for blocks of any length and batches of any size.

    Args:
        config: the model.
        params: its parameters (NumPy), see `refspan.parameter_shapes`.
        form: one of `FORMS`: the part of attention that distant memories take part in is the standard Attention
            operator (fused) or primitive operators (portable).
        dtype: that parameters are converted to; float64 in the portable form only. Spans are float32 or wider (WIDTH).
        opset: version of the standard operator set; the oldest one that fits by default.
        tokenizer: what tokens are, for the metadata: "bytes", or nothing.

    Raises:
        TypeError, ValueError: parameters that do not belong to the config, or do not fit into `dtype`.
        SetupError: there is no such form, dtype or opset, or no such combination.
    """
    if form not in FORMS:
        raise SetupError(f"form: got {form!r}, expected one of {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise SetupError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    if form == "fused" and dtype == "float64":
        raise SetupError("dtype: got 'float64', expected float16 or float32 in the fused form; use the portable form")
    check_parameters(config, params)
    converted = {name: _converted(name, array, dtype) for name, array in params.items()}
    layout = Layout(config, len(converted["position.weight"]), form, dtype)
    opset = opset_for(f"model_{form}", opset)
    model = _Builder(layout, converted, opset).model()
    settings = {
        "refspan_model": LAYOUT,
        "config": json.dumps(config.to_dict()),
        "form": form,
        "dtype": dtype,
        "positions": str(layout.positions),
        "opset": str(opset),
        "tokenizer": tokenizer,
        "fingerprint": fingerprint(config, converted).hex(),
    }
    label(model, settings, CLAUSES)
    check_graph(_without_weights(model))
    return model


def _without_weights(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph with inputs in place of weights: checkers cannot take more than 2 GB, and need no numbers."""
    import onnx
    import onnx.helper

    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    for field in ("node", "input", "output"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= SMALL_TENSOR:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def _converted(name: str, array: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        converted = np.asarray(array, dtype)
    if not np.all(np.isfinite(converted)):
        raise ValueError(f"parameter {name}: {np.max(np.abs(array)):g} is too large for {dtype}")
    return converted


class _Builder:
    """Collects the nodes, initializers, inputs and outputs of the main graph."""

    def __init__(self, layout: Layout, params: Mapping[str, Array], opset: int) -> None:
        self.layout, self.params, self.opset = layout, params, opset
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def model(self) -> "onnx.ModelProto":
        """The model, not labelled yet."""
        import onnx.helper

        config, wide = self.layout.config, self.layout.wide
        self._input("tokens", "int64", ("B", "M"), "the block: token numbers 0..V-1, M >= 1")
        self._input(
            "lengths", "int64", ("B",), "tokens of each row that count, 0..M; the others are padding behind them"
        )
        self._input("restart", "bool", ("B",), "rows that forget everything before the block (START)")
        self._output(
            "log_probs", self.layout.dtype, ("B", "M", config.vocab_size), "of the token that follows each (MODEL)"
        )
        self._output(
            "live",
            "int64",
            (config.layers, "B", 3),
            "memories of each layer and row that the next query may see: distant, recent; and distant ones of these "
            "after another block of M tokens, see refspan.export.slots.needed_slots",
        )
        ramp = self._constant("ramp", np.asarray(config.ramp, wide), "R, steps over which a memory fades")
        shared = ["recent_age", "distance", "faded", "kept", "leaves", "steps"]
        self._node("block_plan", ["tokens", "lengths", "layers.0.recent_span", ramp], shared, domain="refspan")
        position = self._position()

        hidden = self._node("Gather", [self._parameter("embedding.weight"), "tokens"], ["embedded"])[0]  # [B, M, d]
        live = []
        layer_axis = self._constant("layer_axis", np.array([0]), "where layers stand in `live`")
        for i in range(config.layers):
            hidden, counts = self._layer(i, hidden, [*shared, "restart", ramp, position])
            live.append(self._node("Unsqueeze", [counts, layer_axis], [f"{counts}_of_layer"])[0])
        if config.norm == "pre":
            norm = [self._parameter(f"final_norm.{part}") for part in ("weight", "bias")]
            hidden = self._node("layer_norm", [hidden, *norm], ["final"], domain="refspan")[0]
        product = self._node("MatMul", [hidden, self._parameter("output.weight")], ["unbiased_logits"])[0]
        logits = self._node("Add", [product, self._parameter("output.bias")], ["logits"])[0]
        self._node("LogSoftmax", [logits], ["log_probs"], axis=-1)
        self._node("Concat", live, ["live"], axis=0)

        graph = onnx.helper.make_graph(
            self.nodes, "streaming_model", self.inputs, self.outputs, self.initializers, doc_string=__doc__
        )
        opsets = [onnx.helper.make_opsetid("", self.opset), onnx.helper.make_opsetid("refspan", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8 if self.opset <= 18 else 10)
        model.doc_string = graph.doc_string
        names = dict.fromkeys(node.op_type for node in self.nodes if node.domain == "refspan")
        model.functions.extend(functions_of(names, self._settings(), self._variant()))
        name_nodes(graph, *model.functions)
        del model.graph.node[:]
        model.graph.node.extend(graph.node)
        return model

    def _settings(self) -> dict[str, str | int]:
        """What the sources' $settings stand for."""
        layout = self.layout
        size, width = layout.config.head_size, layout.key_width
        settings: dict[str, str | int] = {"opset": self.opset, "heads": layout.config.heads, "head_size": size}
        settings |= type_settings(type=layout.dtype, wide_type=layout.wide)
        settings |= {
            "scale": repr(float(size) ** -0.5),
            "max_span": repr(float(layout.config.max_span)),
            "lowest": repr(float(np.finfo(layout.dtype).min)),
            "key_rest": width - size,
            "value_rest": layout.value_width - size,
            "key_padding": width - size - layout.log_numbers,
            "value_padding": layout.value_width - size - 1,
        }
        return settings

    def _variant(self) -> dict[str, bool]:
        layout = self.layout
        return {
            "fused": layout.form == "fused",
            "portable": layout.form == "portable",
            "position": layout.positions > 0,
            "pre_norm": layout.config.norm == "pre",
            "post_norm": layout.config.norm == "post",
            "exact_log": layout.log_numbers == 1,
            "narrow": layout.dtype != "float64",
        }

    def _position(self) -> str:
        """Name of the table of relative positions."""
        table = np.ascontiguousarray(self.params["position.weight"][::-1].T)
        reversed_ = self._constant(
            "position.weight.T.reversed", table, "relative position embedding [D, P], column u for distance P - u"
        )
        zeros = self._constant("no_position", np.zeros((len(table), 1), table.dtype), "a column of zeros")
        return self._node("position_table", [reversed_, "tokens", zeros], ["position"], domain="refspan")[0]

    def _layer(self, i: int, x: str, shared: list[str]) -> tuple[str, str]:
        """Names of the layer's result and of its counts of live memories."""
        config, wide, state, after = self.layout.config, self.layout.wide, [], []
        for name, tensor in self.layout.state_tensors().items():
            shape = tuple(f"C{i}" if size == "C" else size for size in tensor.shape)
            state.append(self._input(f"layers.{i}.{name}", tensor.dtype, shape, tensor.meaning))
            meaning = (
                "the same after the block; may be the same memory" if tensor.in_place else "the same after the block"
            )
            after.append(self._output(f"layers.{i}.{name}.next", tensor.dtype, shape, meaning))
        span = f"layers.{i}.span"
        divided = np.asarray(self.params[f"{span}.weight"], np.float64) / config.span_temperature
        weights = [
            self._parameter(f"layers.{i}.attention.{part}.weight") for part in ("query", "key", "value", "output")
        ]
        weights += [
            self._constant(
                f"{span}.weight", divided.astype(wide)[:, None], "of the span predictor, / temperature [d, 1]"
            ),
            self._constant(
                f"{span}.bias", self.params[f"{span}.bias"].astype(wide).reshape(1), "of the span predictor"
            ),
        ]
        for part in ("norm1", "feedforward.in", "feedforward.out", "norm2"):
            weights += [self._parameter(f"layers.{i}.{part}.{kind}") for kind in ("weight", "bias")]
        outputs = [f"hidden_{i + 1}", *after, f"live_{i}"]
        names = self._node("layer", [x, *shared, *state, *weights], outputs, domain="refspan")
        return names[0], names[-1]

    def _node(
        self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **settings: Any
    ) -> list[str]:
        import onnx.helper

        self.nodes.append(onnx.helper.make_node(operator, inputs, outputs, domain=domain, **settings))
        return outputs

    def _parameter(self, name: str) -> str:
        """A parameter of the model; matrices but the embedding as [in, out], which `MatMul` takes."""
        array = self.params[name]
        if array.ndim == 2 and name != "embedding.weight":
            return self._constant(f"{name}.T", np.ascontiguousarray(array.T), f"parameter {name} as [in, out]")
        return self._constant(name, array, f"parameter {name}")

    def _constant(self, name: str, array: Array, meaning: str) -> str:
        import onnx.numpy_helper

        tensor = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        tensor.doc_string = meaning
        self.initializers.append(tensor)
        return name

    def _input(self, name: str, dtype: str, shape: tuple[int | str, ...], meaning: str) -> str:
        self.inputs.append(_value_info(name, dtype, shape, meaning))
        return name

    def _output(self, name: str, dtype: str, shape: tuple[int | str, ...], meaning: str) -> str:
        self.outputs.append(_value_info(name, dtype, shape, meaning))
        return name


def _value_info(name: str, dtype: str, shape: tuple[int | str, ...], meaning: str) -> Any:
    import onnx.helper

    code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    sizes = ", ".join(map(str, shape))
    return onnx.helper.make_tensor_value_info(name, code, shape, doc_string=f"{meaning} [{sizes}]")
