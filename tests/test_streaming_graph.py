"""The graph of a whole model, the file that it is written to, and the command that writes it."""

import json
import shutil

import numpy as np
import onnx
import onnx.inliner
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from onnx_models import small_model, tokens_of

import refspan
from refspan.__main__ import cli
from refspan.clauses import CLAUSES
from refspan.errors import SetupError
from refspan.export import OnnxModel, streaming_model, write_model_file
from refspan.export.layout import LAYOUT, Layout
from refspan.export.slots import empty_distant, repack_model

VARIANTS = [
    (form, dtype, norm, positions)
    for form in ("fused", "portable")
    for dtype in ("float16", "float32", "float64")
    for norm in ("pre", "post")
    for positions in (0, 3)
    if (form, dtype) != ("fused", "float64")
]


def streaming(form, dtype, norm, positions):
    config, params = small_model(norm=norm, positions=positions)
    return streaming_model(config, params, form=form, dtype=dtype)


def every_streaming_model():
    for variant in VARIANTS:
        yield " ".join(map(str, variant)), streaming(*variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_graph_is_valid_and_describes_itself(variant):
    form, dtype, norm, positions = variant
    model = streaming(*variant)
    onnx.checker.check_model(model, full_check=True)
    described = [
        model,
        model.graph,
        *model.functions,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ]
    assert all(len(part.doc_string) > 15 for part in described)
    assert not any("@" in part.doc_string for part in described)

    label = {entry.key: entry.value for entry in model.metadata_props}
    assert label["refspan_version"] == refspan.__version__
    assert set(label["clauses"].split()) <= set(CLAUSES)
    assert refspan.ModelConfig.from_dict(json.loads(label["config"])) == small_model(norm=norm)[0]
    assert (label["form"], label["dtype"], label["positions"]) == (form, dtype, str(positions))
    assert [node.op_type for node in model.graph.node].count("layer") == 2

    types = {x.name: x.type.tensor_type.elem_type for x in [*model.graph.input, *model.graph.output]}
    wide = onnx.TensorProto.DOUBLE if dtype == "float64" else onnx.TensorProto.FLOAT
    spans = {name: kind for name, kind in types.items() if "span" in name}
    assert len(spans) == 8
    assert set(spans.values()) == {wide}


def test_layers_share_one_function_and_each_has_weights_of_its_own():
    model = streaming("fused", "float32", "pre", 3)
    calls = [node for node in model.graph.node if node.op_type == "layer"]
    weights = [{name for name in node.input if ".weight" in name or ".bias" in name} for node in calls]
    assert len(weights[0]) == 14
    assert not weights[0] & weights[1]
    operators = {node.op_type for function in model.functions for node in function.node if not node.domain}
    assert "Attention" in operators


def nodes_of(model):
    """All nodes of a model, those inside functions in place of the calls."""
    return list(onnx.inliner.inline_local_functions(model).graph.node)


def test_portable_models_use_operators_of_opset_18_only():
    for dtype in ("float16", "float32", "float64"):
        model = streaming("portable", dtype, "pre", 3)
        assert {x.version for part in (model, *model.functions) for x in part.opset_import if not x.domain} == {18}
        operators = {(node.domain, node.op_type) for node in nodes_of(model)}
        assert ("", "Attention") not in operators
        assert all(domain == "" and onnx.defs.has(name, 18, "") for domain, name in operators)


def test_shapes_are_never_computed_with():
    """As in `test_export`: a shape goes straight into an operator that reads it on the host anyway."""
    reads_on_host = {("Expand", 1), ("Reshape", 1), ("Slice", 1), ("Slice", 2), ("TopK", 1)}
    layout = Layout(small_model()[0], 3, "fused", "float32")
    for _, model in [*every_streaming_model(), ("repack", repack_model(layout, 23))]:
        nodes = nodes_of(model)
        shapes = {node.output[0] for node in nodes if node.op_type == "Shape"}
        uses = {(node.op_type, i) for node in nodes for i, name in enumerate(node.input) if name in shapes}
        assert uses <= reads_on_host


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_another_runtime_computes_the_same(form):
    """onnx.reference, which knows neither buffers nor bindings: the graph alone says what a step is."""
    config, params = small_model(layers=1)
    model = streaming_model(config, params, form=form)
    session, layout = ReferenceEvaluator(model), Layout(config, 3, form, "float32")
    distant = empty_distant(layout, 2, 40, first=0)
    state = {f"layers.0.distant_{name}": array for name, array in distant.items()}
    state |= {f"layers.0.recent_{name}": np.zeros((2, 3, 2, 5), np.float32) for name in ("key", "value")}
    state["layers.0.recent_span"] = np.full((2, 3), -np.inf, np.float32)
    reference, rng = refspan.open_model(config, params, batch=2), np.random.default_rng(0)
    names = [x.name for x in model.graph.output]
    for length in (4, 1, 8, 8, 3):
        tokens = tokens_of(rng, config, 2, length)
        feed = {"tokens": tokens, "lengths": np.full(2, length), "restart": np.zeros(2, bool), **state}
        with np.errstate(divide="ignore", invalid="ignore"):  # logarithms of masks of 0
            got = dict(zip(names, session.run(None, feed), strict=True))
        np.testing.assert_allclose(got["log_probs"], reference.step(tokens), rtol=0, atol=2e-5)
        state = {name: got[f"{name}.next"] for name in state}
        assert tuple(np.max(got["live"][:, :, :2].sum(axis=2), axis=1)) == reference.memory_size()


# files


@pytest.fixture
def written(tmp_path):
    """A model with its weights in a file beside it."""
    config, params = small_model(vocab_size=256)
    write_model_file(tmp_path / "m.onnx", streaming_model(config, params), most_bytes=1000)
    return tmp_path / "m.onnx"


def change(path, function):
    """Rewrite a model file after `function` has changed its content."""
    model = onnx.load(path, load_external_data=False)
    function(model)
    path.write_bytes(model.SerializeToString())


def set_label(name, value):
    def function(model):
        entries = {entry.key: entry.value for entry in model.metadata_props}
        entries[name] = value
        onnx.helper.set_model_props(model, {key: text for key, text in entries.items() if text is not None})

    return function


def set_config(**settings):
    def function(model):
        config = next(entry for entry in model.metadata_props if entry.key == "config")
        config.value = json.dumps({**json.loads(config.value), **settings})

    return function


def set_external(key, value):
    def function(model):
        tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return function


def external_constant(model):
    """Deep inside a function rather than among the weights."""
    tensor = model.functions[0].node[0].attribute[0].t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def other_type(model):
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            set_label("refspan_model", "7"),
            rf"layout 7 of refspan .*, this refspan reads {LAYOUT}; export the checkpoint",
        ),
        (set_label("refspan_model", None), r"not a model that refspan export model wrote \(it was made by refspan\)"),
        (set_label("config", "{"), "its metadata is damaged"),
        (set_label("config", "[1]"), "its metadata is damaged"),
        (set_label("config", None), "its metadata has no config"),
        (set_label("form", "other"), "its metadata is damaged: form other"),
        (set_label("positions", "-1"), "its metadata is damaged"),
        (set_label("fingerprint", "zz"), "its metadata is damaged"),
        (set_label("fingerprint", "00"), "its metadata is damaged: a fingerprint of 1 bytes, expected 32"),
        (set_label("tokenizer", None), "its metadata has no tokenizer"),
        (set_label("opset", "1"), r"its metadata is damaged: opset 1, the graph's is \[23\]"),
        (set_config(layers=10**9), "got 17 inputs, its metadata promise some for each of 1000000000 layers"),
        (set_config(layers=3), r"input layers.2.recent_key: got none, its metadata promise float32 \[B, 3, 2, 5\]"),
        (set_config(layers=1), r"input layers.1.recent_key: got float32 \[B, 3, 2, 5\], its metadata promise none"),
        (set_config(heads=3), r"layers.0.recent_key: got float32 \[B, 3, 2, 5\], its metadata promise .* 3, 3, 5\]"),
        (set_config(head_size=10**9), r"its metadata promise float32 \[B, 3, 2, 1000000000\]"),
        (set_config(vocab_size=300), r"output log_probs: got float32 \[B, M, 256\], its metadata promise .*300\]"),
        (set_label("positions", str(10**10)), r"layers.0.recent_key: got .*promise float32 \[B, 10000000000, 2, 5\]"),
        (set_label("form", "portable"), r"distant_key: got float32 \[B, 2, C0, 8\], .*promise .*\[B, 2, C, 6\]"),
        (set_label("dtype", "float16"), r"input layers.0.recent_key: got float32 .*, its metadata promise float16 "),
        (other_type, r"input lengths: got float32 \[B\], its metadata promise int64 \[B\]"),
        (lambda model: model.graph.input.pop(), "input layers.1.distant_age: got none"),
        (set_external("location", "../m.onnx.data"), "weights at '../m.onnx.data', expected a file in the model's own"),
        (
            set_external("location", "/etc/passwd"),
            "weights at '/etc/passwd', expected a file in the model's own folder",
        ),
        (set_external("location", "a\\b"), "expected a file in the model's own folder"),
        (set_external("location", ".."), "expected a file in the model's own folder"),
        (set_external("location", ""), "expected a file in the model's own folder"),
        (set_external("location", "other"), "its weights are missing: no regular file other beside the model"),
        (set_external("length", "100000"), "m.onnx.data ends before its weights do; copy it again"),
        (set_external("length", "many"), "does not say where in m.onnx.data its weights are"),
        (set_external("offset", "-4096"), "does not say where in m.onnx.data its weights are"),
        (external_constant, "weights at '../secret', expected a file in the model's own folder"),
    ],
)
def test_files_that_are_refused(written, function, message):
    change(written, function)
    with pytest.raises(SetupError, match=message):
        OnnxModel(written)


def test_more_files_that_are_refused(written, tmp_path):
    content = written.read_bytes()
    for cut in (1, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.onnx").write_bytes(content[:cut])
        with pytest.raises(SetupError, match=r"cut.onnx: (not an ONNX file|not a model|its metadata|input|output)"):
            OnnxModel(tmp_path / "cut.onnx")
    for name, text, message in [
        ("text.onnx", b"hello, world", "not an ONNX file, or only a part of one"),
        ("empty.onnx", b"", "not a model that refspan export model wrote"),
    ]:
        (tmp_path / name).write_bytes(text)
        with pytest.raises(SetupError, match=message):
            OnnxModel(tmp_path / name)
    with pytest.raises(SetupError, match=r"none.onnx: no such file"):
        OnnxModel(tmp_path / "none.onnx")
    with pytest.raises(SetupError, match="is not a regular file"):
        OnnxModel(tmp_path)
    data = tmp_path / "m.onnx.data"
    shutil.move(data, tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError, match=r"no regular file m.onnx.data beside the model"):
        OnnxModel(written)


def test_a_graph_that_onnxruntime_refuses(written):
    def break_it(model):
        model.graph.node[0].op_type = "NoSuchOperator"

    change(written, break_it)
    with pytest.raises(SetupError, match=r"m.onnx: device cpu: onnxruntime .* refused the graph: .*NoSuchOperator"):
        OnnxModel(written)


# refspan export model


def invoke(*arguments):
    """Exit status and what is said; a SetupError is what the command line prints with status 2."""
    result = CliRunner().invoke(cli, ["export", "model", *map(str, arguments)])
    if isinstance(result.exception, SetupError):
        return 2, str(result.exception)
    return result.exit_code, result.output


@pytest.fixture
def checkpoint(tmp_path):
    config, params = small_model(vocab_size=256)
    refspan.save_model(tmp_path / "c.safetensors", config, params, notes={"tokenizer": "bytes"})
    return tmp_path / "c.safetensors"


def test_export_model(checkpoint, tmp_path):
    config, params = refspan.load_model(checkpoint)
    out = tmp_path / "m.onnx"
    for options, wanted in [
        ([], {"form": "fused", "dtype": "float32", "opset": "23", "tokenizer": "bytes"}),
        (["--form", "portable", "--dtype", "float16"], {"form": "portable", "dtype": "float16", "opset": "18"}),
        (["--opset", "24", "--tokenizer", "none"], {"opset": "24", "tokenizer": ""}),
    ]:
        status, said = invoke(checkpoint, out, *options)
        assert status == 0, said
        assert len(said.splitlines()) == 2
        model = OnnxModel(out)
        assert wanted.items() <= model.metadata.items()
        tokens = tokens_of(np.random.default_rng(0), config, 1, 8)
        close = 0.05 if wanted.get("dtype") == "float16" else 2e-5
        expected = refspan.open_model(config, params, batch=1).step(tokens)
        np.testing.assert_allclose(model.open(1).step(tokens), expected, rtol=0, atol=close)


def test_export_model_refuses(checkpoint, tmp_path):
    config, params = small_model()
    refspan.save_model(tmp_path / "small.safetensors", config, params)
    large = {**params, "output.bias": params["output.bias"] + np.float32(1e6)}
    refspan.save_model(tmp_path / "large.safetensors", config, large)
    out = tmp_path / "m.onnx"
    for arguments, message in [
        ((tmp_path / "none.safetensors", out), "none.safetensors: no such file"),
        ((checkpoint, tmp_path / "no" / "m.onnx"), "does not exist"),
        ((checkpoint, tmp_path), "is a folder"),
        ((checkpoint, out, "--opset", "12"), "opset: got 12, expected 23 to"),
        ((checkpoint, out, "--tokenizer", "words"), "'words' is not one of 'bytes', 'none'"),
        ((tmp_path / "small.safetensors", out, "--tokenizer", "bytes"), "knows 11 tokens, expected at least 256"),
        ((tmp_path / "large.safetensors", out, "--dtype", "float16"), "parameter output.bias: 1e+06 is too large"),
    ]:
        status, said = invoke(*arguments)
        assert status == 2, said
        assert message in said
        assert not out.exists()


def test_nothing_is_computed_in_vain():
    """Every result is wanted, but for the operators that have more of them than one asks for."""
    spare = {"overdue_of_slots", "longest", "padding"}
    for _, model in every_streaming_model():
        for function in model.functions:
            used = {name for node in function.node for name in node.input} | set(function.output)
            made = {name for node in function.node for name in node.output}
            assert made - used <= spare, function.name
