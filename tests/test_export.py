"""The ONNX graphs themselves, and the command that writes them."""

import stat
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from test_streaming_graph import every_streaming_model

import refspan
from refspan.__main__ import cli
from refspan.clauses import CLAUSES
from refspan.errors import SetupError
from refspan.export import attention_model, gradient_model, mask_model
from refspan.export.source import build_model

GRAPHS = {
    f"{name}-{dtype}{'-position' * position}": (make, name, dtype, position)
    for name, make in {
        "fused": lambda dtype, **options: attention_model("fused", dtype, **options),
        "portable": lambda dtype, **options: attention_model("portable", dtype, **options),
        "gradient": gradient_model,
    }.items()
    for dtype in ("float16", "float32", "float64")
    for position in (False, True)
    if (name, dtype) != ("fused", "float64")
}


def step(seed=0, *, sizes=(2, 3, 5, 11, 4), positions=6, dtype="float32", span_dtype="float32"):
    """Inputs of an attention graph: all sizes different, memories in every phase of life, some of one age."""
    batch, heads, queries, memories, head_size = sizes
    rng = np.random.default_rng(seed)
    fill = lambda *shape: rng.standard_normal(shape).astype(dtype)
    feed = {
        "query": fill(batch, heads, queries, head_size),
        "key": fill(batch, heads, memories, head_size),
        "value": fill(batch, heads, memories, head_size),
        "span": rng.uniform(0, memories / 2, (batch, memories)).astype(span_dtype),
        "age": rng.integers(2 - queries, memories, (batch, memories)),
        "ramp": np.asarray(3, span_dtype),
    }
    return feed | ({"position": fill(positions, head_size)} if positions else {})


def specified(feed):
    """What the specification says in float64: the output and the gradients, for a grad_output in the feed."""
    arrays = {name: x if name == "age" else x.astype(np.float64) for name, x in feed.items()}
    ramp, grad_output = float(arrays.pop("ramp")), arrays.pop("grad_output", None)
    output, saved = refspan.span_attention(**arrays, ramp=ramp)
    return output if grad_output is None else refspan.span_attention_backward(grad_output, saved)


def run(model, feed):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


TOLERANCE = {"float16": 4e-3, "float32": 2e-6, "float64": 1e-13}


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_says_what_the_specification_says(graph):
    make, name, dtype, position = GRAPHS[graph]
    span_dtype = "float64" if dtype == "float64" else "float32"
    for seed in range(3):
        feed = step(seed, positions=6 * position, dtype=dtype, span_dtype=span_dtype)
        if name == "gradient":
            feed["grad_output"] = np.random.default_rng(9).standard_normal(feed["query"].shape).astype(dtype)
            wanted = [gradient for gradient in specified(feed) if gradient is not None]
        else:
            wanted = [specified(feed)]
        results = run(make(dtype, position=position), feed)
        assert len(results) == len(wanted)
        for have, want in zip(results, wanted, strict=True):
            np.testing.assert_allclose(have, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")  # that is how m = 0 leaves
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")  # softmax of a row of -inf
def test_portable_graph_runs_elsewhere(position):
    feed = step(positions=6 * position)
    (output,) = ReferenceEvaluator(attention_model("portable", position=position)).run(None, feed)
    np.testing.assert_allclose(output, specified(feed), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mask_graph_is_exact(dtype):
    rng = np.random.default_rng(0)
    age = rng.integers(-6, 60, (3, 40))
    age[0, 0] = 2**24 + 1  # float32 cannot hold it
    span = rng.uniform(0, 50, age.shape).astype(dtype)
    span[0, 0] = 2**24
    for queries, ramp in ((1, 1.0), (7, 4.5), (7, 1e9)):
        feed = {"span": span, "age": age, "queries": np.array([queries]), "ramp": np.asarray(ramp, dtype)}
        (mask,) = run(mask_model(dtype), feed)
        np.testing.assert_array_equal(mask, refspan.soft_mask(span, age, queries=queries, ramp=ramp))


def every_model():
    yield from ((name, make(dtype, position=position)) for name, (make, _, dtype, position) in GRAPHS.items())
    yield "mask", mask_model()


@pytest.mark.parametrize("name", [*GRAPHS, "mask"])
def test_graph_is_valid_and_describes_itself(name):
    model = dict(every_model())[name]
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert [x.type for x in inferred.graph.output] == [x.type for x in model.graph.output]

    functions = {function.name: function for function in model.functions}
    assert "span_mask" in functions
    assert any(node.op_type == "span_mask" and node.domain == "refspan" for node in model.graph.node)
    described = [model, model.graph, *functions.values(), *model.graph.input, *model.graph.output]
    assert all(len(part.doc_string) > 20 for part in described)

    label = {entry.key: entry.value for entry in model.metadata_props}
    assert label["refspan_version"] == refspan.__version__
    assert set(label["clauses"].split()) <= set(CLAUSES)
    assert {"PAST", "MASK", "WIDTH"} <= set(label["clauses"].split())
    assert ("GRAD" in label["clauses"].split()) == name.startswith("gradient")
    assert all(clause in model.doc_string for clause in label["clauses"].split())
    assert label["position"] == str("position" in name).lower()
    assert label["opset"] == str(model.opset_import[0].version)

    letters = set("BHMNDP")
    for value in [*model.graph.input, *model.graph.output]:
        sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert sizes == [1] if value.name == "queries" else set(sizes) <= letters
    types = {x.name: x.type.tensor_type.elem_type for x in model.graph.input}
    wide = onnx.TensorProto.DOUBLE if "float64" in name else onnx.TensorProto.FLOAT
    assert types["span"] == types["ramp"] == wide
    assert types["age"] == onnx.TensorProto.INT64


def opsets_of(model):
    return {
        imported.version for part in (model, *model.functions) for imported in part.opset_import if not imported.domain
    }


def test_operator_sets():
    assert opsets_of(attention_model("fused")) == {24}
    assert opsets_of(attention_model("fused", opset=23)) == {23}
    for make in (lambda **o: attention_model("portable", **o), gradient_model, mask_model):
        assert opsets_of(make()) == {18}
        assert opsets_of(make(opset=21)) == {21}
        for opset in (17, 0, 1000):
            with pytest.raises(SetupError, match=f"opset: got {opset}, expected 18 to"):
                make(opset=opset)
    with pytest.raises(SetupError, match="opset: got 18, expected 23 to"):
        attention_model("fused", opset=18)
    operators = {node.op_type for node in nodes_of(attention_model("portable"))}
    assert "Attention" not in operators
    assert all(onnx.defs.has(operator, 18, "") for operator in operators)


def nodes_of(model):
    """All nodes of a model, those inside functions in place of the calls."""
    return list(onnx.inliner.inline_local_functions(model).graph.node)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other",), "form: got 'other'"),
        (("fused", "int8"), "dtype: got 'int8'"),
        (("fused", "float64"), "expected float16 or float32 in the fused form"),
    ],
)
def test_no_such_graph(arguments, message):
    with pytest.raises(SetupError, match=message):
        attention_model(*arguments)


def test_spans_are_never_narrow():
    with pytest.raises(SetupError, match="WIDTH"):
        attention_model("portable", "float16", span_dtype="float16")


def test_shapes_are_never_computed_with():
    """ONNX Runtime places arithmetic on shapes on the CPU, which a session without fallback to the CPU refuses.

    A shape may go straight into an operator that reads it on the host anyway, and nowhere else.
    """
    reads_on_host = {("Expand", 1), ("Reshape", 1), ("Slice", 1), ("Slice", 2)}
    for name, model in every_model():
        nodes = nodes_of(model)
        shapes = {node.output[0] for node in nodes if node.op_type == "Shape"}
        uses = {(node.op_type, i) for node in nodes for i, name in enumerate(node.input) if name in shapes}
        assert uses <= reads_on_host
        assert uses or name == "mask"  # that is given M


def test_text_sources_are_packaged_and_used():
    sources = {path.name.removesuffix(".onnxtxt") for path in files("refspan.export").iterdir()}
    sources = {name for name in sources if (files("refspan.export") / f"{name}.onnxtxt").is_file()}
    used = {"mask", "gradient", "attention_fused", "attention_portable", "repack"}
    models = [*every_model(), *every_streaming_model()]
    used |= {function.name for _, model in models for function in model.functions}
    assert used == sources
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert "*.onnxtxt" in project["tool"]["setuptools"]["package-data"]["refspan.export"]


def test_a_missing_setting_is_noticed():
    with pytest.raises(KeyError, match="ir_version"):
        build_model("mask", {"opset": 18}, {})


# refspan export


def invoke(*arguments):
    """Exit status and what `refspan export` says; a SetupError is what the command line prints with status 2."""
    result = CliRunner().invoke(cli, ["export", *map(str, arguments)])
    if isinstance(result.exception, SetupError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_export_writes_what_was_asked_for(tmp_path):
    out = tmp_path / "step.onnx"
    status, text = invoke("attention", out, "--form", "portable", "--dtype", "float16", "--opset", "20", "--position")
    assert (status, len(text.splitlines())) == (0, 2)
    assert all(word in text for word in ("step.onnx", "portable", "float16", "opset 20", "with positions"))
    wanted = attention_model("portable", "float16", position=True, opset=20)
    assert onnx.load(out) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]

    assert invoke("gradient", out)[0] == 0
    assert onnx.load(out) == gradient_model()
    assert invoke("attention", out)[0] == 0
    assert onnx.load(out) == attention_model("fused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["other", "x.onnx"], "No such command 'other'"),
        (["attention", "x.onnx", "--form", "flash"], "'flash' is not one of 'fused', 'portable'"),
        (["attention", "x.onnx", "--dtype", "int8"], "'int8' is not one of"),
        (["attention", "x.onnx", "--opset", "12"], "opset: got 12, expected 23 to"),
        (["attention", "x.onnx", "--opset", "new"], "'new' is not a valid integer"),
        (["gradient", "x.onnx", "--form", "fused"], "the gradient has no fused form"),
        (["attention", "missing/x.onnx"], "missing/x.onnx: folder "),
        (["attention", "."], ".: is a folder, expected a file to write"),
    ],
)
def test_export_refuses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, text = invoke(*arguments)
    assert status == 2
    assert message in text
    assert not list(tmp_path.iterdir())


def test_export_leaves_a_good_file_alone_if_the_disk_is_full(tmp_path, monkeypatch):
    out = tmp_path / "step.onnx"
    out.write_bytes(b"good")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert invoke("attention", out) == (2, f"{out}: cannot be written: No space left on device")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("step.onnx", b"good")]


def test_export_writes_through_links_and_never_replaces_a_device(tmp_path):
    out, link, pipe = (tmp_path / name for name in ("step.onnx", "link.onnx", "pipe"))
    link.symlink_to(out)
    assert invoke("gradient", link)[0] == 0
    assert link.is_symlink()
    assert onnx.load(out) == gradient_model()

    mkfifo = pytest.importorskip("os").mkfifo
    mkfifo(pipe)
    assert invoke("attention", pipe) == (2, f"{pipe}: is not a regular file, and would have to be replaced")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_errors_are_one_line_and_imports_are_lazy(tmp_path):
    code = "import sys; sys.modules['onnxruntime'] = None; from refspan.__main__ import main; main()"
    command = [sys.executable, "-c", code, "export", "attention"]
    done = subprocess.run([*command, tmp_path / "a.onnx"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # writing a graph takes no onnxruntime
    done = subprocess.run([*command, tmp_path / "no" / "a.onnx"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)

    lazy = "import sys, refspan, refspan.export; print(*(m for m in ('onnx', 'onnxruntime') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", lazy], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
    alone = "import sys, refspan; print('refspan.export' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
