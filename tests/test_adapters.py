"""Backends on other libraries' arrays, where these are installed."""

import math

import numpy as np
import pytest

import refspan
from refspan.conformance import check_backend, load_backend
from refspan.conformance.adapters import ArrayBackend, jax_backend, torch_backend
from refspan.conformance.runner import select
from refspan.errors import SetupError

pytestmark = pytest.mark.usefixtures("remembered_answers")

SOME = ("mask.values", "attention.output", "attention.position", "attention.empty", "gradient.values", "gradient.empty")


def in_torch():
    """An attention step as a user of PyTorch would write it."""
    torch = pytest.importorskip("torch")

    def soft_mask(span, age, *, queries, ramp):
        distance = age[:, None, :] + torch.arange(queries)[:, None]
        soft = torch.clamp((span[:, None, :] - distance) / ramp + 1, 0, 1)
        return torch.where(distance >= 1, soft, 0)

    def attention(query, key, value, span, age, *, ramp, position=None):
        q, k, v = query.double(), key.double(), value.double()
        scores = q @ k.mT
        if position is not None:
            row = age[:, None, :] + torch.arange(q.shape[2])[:, None] - 1
            near = (row >= 0) & (row < len(position))
            table = torch.cat([position.double(), position.new_zeros((1, position.shape[1])).double()])
            scores = scores + torch.einsum("bhmd,bmnd->bhmn", q, table[torch.where(near, row, len(position))])
        mask = soft_mask(span.double(), age, queries=q.shape[2], ramp=ramp)[:, None]
        scores = torch.where(mask > 0, scores / math.sqrt(q.shape[3]), -math.inf)
        top = scores.detach().amax(-1, keepdim=True) if key.shape[2] else torch.zeros(())
        raw = mask * torch.where(mask > 0, scores - torch.where(top.isfinite(), top, 0), -math.inf).exp()
        total = raw.sum(-1, keepdim=True)
        return (raw / torch.where(total > 0, total, 1) @ v).to(query.dtype)

    return soft_mask, attention


def failures(report):
    return {result.check: result.failure.message for result in report.results if result.failure}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_torch(dtype):
    soft_mask, attention = in_torch()
    backend = torch_backend("mine", soft_mask=soft_mask, span_attention=attention)
    report = check_backend(backend, levels=("mask", "attention", "gradient", "golden"), dtype=dtype, examples=20)
    assert failures(report) == {}
    assert report.count("not offered") == 0
    assert report.facts["torch"]


def test_a_backward_of_ones_own():
    _, attention = in_torch()

    def backward(grad_out, query, key, value, span, age, *, ramp, position=None):
        grads = {"query": query, "key": key, "value": value, "span": span}
        return grads | ({} if position is None else {"position": position})

    backend = torch_backend("mine", span_attention=attention, span_attention_backward=backward)
    assert (
        "gradient of" in failures(check_backend(backend, checks=("gradient.values",), examples=20))["gradient.values"]
    )
    assert check_backend(backend, checks=("mask.values", "attention.output"), examples=2).count("not offered") == 1


def test_a_wrong_one():
    _, attention = in_torch()
    backend = torch_backend("mine", span_attention=lambda *x, **options: attention(*x[:4], x[4] + 1, **options))
    assert set(failures(check_backend(backend, levels=("attention",), examples=20))) >= {"attention.output"}


def test_jax():
    """A few small examples: JAX compiles every shape anew."""
    jnp = pytest.importorskip("jax.numpy")

    def soft_mask(span, age, *, queries, ramp):
        distance = age[:, None, :] + jnp.arange(queries)[:, None]
        soft = jnp.clip(1 + (span[:, None, :] - distance.astype(span.dtype)) / ramp, 0, 1)
        return jnp.where(distance >= 1, soft, 0).astype(span.dtype)

    def attention(query, key, value, span, age, *, ramp, position=None):
        row = age[:, None, :] + jnp.arange(query.shape[2])[:, None] - 1
        scores = jnp.einsum("bhmd,bhnd->bhmn", query, key)
        if position is not None:
            near = (row >= 0) & (row < len(position))
            table = jnp.concatenate([position, jnp.zeros((1, position.shape[1]), position.dtype)])
            scores += jnp.einsum("bhmd,bmnd->bhmn", query, table[jnp.where(near, row, len(position))])
        scores = scores / math.sqrt(query.shape[3])
        mask = soft_mask(span, age, queries=query.shape[2], ramp=ramp)[:, None]
        top = jnp.max(jnp.where(mask > 0, scores, -jnp.inf), axis=-1, keepdims=True, initial=-1e30)
        raw = mask * jnp.exp(jnp.where(mask > 0, scores - top, -jnp.inf))
        total = jnp.sum(raw, axis=-1, keepdims=True)
        return raw / jnp.where(total > 0, total, 1) @ value

    backend = jax_backend("mine", soft_mask=soft_mask, span_attention=attention)
    report = check_backend(backend, checks=SOME, examples=3, timeout=60)
    assert failures(report) == {}
    assert backend.span_attention(*(np.ones((1, 1, 1, 1)),) * 3, np.ones((1, 1)), np.ones((1, 1), int), ramp=1.0) == 1


def test_devices_that_are_not_there():
    pytest.importorskip("torch")
    with pytest.raises(SetupError, match="device nonsense: PyTorch cannot use it"):
        torch_backend("mine", device="nonsense")


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_packages_that_are_not_there(monkeypatch, library):
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    make = {"torch": torch_backend, "jax": jax_backend}[library]
    with pytest.raises(SetupError, match=f"is missing .*pip install {library}"):
        make("mine")


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, if it is here too: OpenVINO's telemetry forks
class TestGraphsElsewhere:
    """Our graphs on runtimes other than ONNX Runtime, and anyone's graphs on it."""

    LEVELS = ("mask", "attention", "gradient", "golden")

    @pytest.mark.parametrize(("form", "dtype"), [("portable", "float32"), ("fused", "float32"), ("fused", "float16"),
                                                 ("portable", "float16"), ("portable", "float64")])  # fmt: skip
    def test_onnx_reference(self, form, dtype):
        backend = load_backend("onnx-reference", form=form)
        assert failures(check_backend(backend, levels=self.LEVELS, dtype=dtype, examples=12)) == {}

    def test_openvino_passes_what_it_is_known_to(self):
        """And fails what docs/conformance.md says that it fails."""
        pytest.importorskip("openvino")
        known = ("mask.wide", "gradient.empty")
        assert set(failures(check_backend(load_backend("openvino"), checks=known, examples=30))) == set(known)
        ours = ("mask.kinks", "attention.lone_survivor", "attention.mask_scale", "golden.small", "golden.wide")
        assert failures(check_backend(load_backend("openvino"), checks=ours, examples=30)) == {}

    @pytest.fixture
    def files(self, tmp_path):
        import onnx

        from refspan.export import attention_model, gradient_model

        models = {"plain": attention_model("fused"), "position": attention_model("fused", position=True)}
        models |= {"gradient": gradient_model(), "half": attention_model("portable", "float16")}
        for name, model in models.items():
            onnx.save(model, tmp_path / f"{name}.onnx")
        return tmp_path

    def test_files(self, files):
        backend = load_backend(f"onnx:{files}/plain.onnx,{files}/position.onnx")
        report = check_backend(backend, levels=self.LEVELS, examples=10)
        assert failures(report) == {}
        assert report.count("passed") == len(select(("attention",))) + 3
        assert backend.dtypes == ("float32",)

    def test_what_no_file_takes_is_not_offered(self, files):
        report = check_backend(load_backend(f"onnx:{files}/plain.onnx"), levels=("attention", "gradient"), examples=10)
        status = {result.check: result.status for result in report.results}
        assert (status["attention.position"], status["gradient.values"]) == ("not offered", "not offered")
        assert status["attention.lone_survivor"] == "passed"

    def test_wrong_files_fail(self, files):
        import onnx
        import onnx.parser

        model = onnx.load(files / "plain.onnx")
        model.graph.node.append(onnx.helper.make_node("Neg", ["output"], ["negative"]))
        model.graph.output[0].name = "negative"
        for node in model.graph.node:
            node.output[:] = [{"output": "inner", "negative": "output"}.get(name, name) for name in node.output]
            node.input[:] = [{"output": "inner"}.get(name, name) for name in node.input]
        model.graph.output[0].name = "output"
        onnx.save(model, files / "wrong.onnx")
        report = check_backend(load_backend(f"onnx:{files}/wrong.onnx"), checks=("attention.lone_survivor",))
        assert set(failures(report)) == {"attention.lone_survivor"}

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("none.onnx", "no such file"),
            ("text.onnx", "refused the graph"),
            ("other.onnx", "has inputs x and outputs y"),
        ],
    )
    def test_files_that_cannot_be_asked(self, tmp_path, name, said):
        import onnx.parser

        (tmp_path / "text.onnx").write_text("hello")
        text = '<ir_version: 8, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) { y = Identity (x) }'
        onnx.save(onnx.parser.parse_model(text), tmp_path / "other.onnx")
        with pytest.raises(SetupError, match=said) as caught:
            load_backend(f"onnx:{tmp_path / name}")
        assert "\n" not in str(caught.value)


class OnNumpy(ArrayBackend):
    """The adapter on NumPy's own arrays, which can be changed."""

    def __init__(self, **functions):
        own = {"to_library": np.array, "to_numpy": np.array, "differentiate": None, "facts": {}}
        super().__init__("mine", **own, **functions)


def test_a_kernel_that_changes_its_arguments():
    def soft_mask(span, age, *, queries, ramp):
        mask = refspan.soft_mask(span, age, queries=queries, ramp=ramp)
        age += 7
        return mask

    def attention(*arrays, position=None, ramp):
        out, _ = refspan.span_attention(*arrays, position=position, ramp=ramp)
        if position is not None:
            position += 1
        return out

    def backward(grad_out, *arrays, **options):
        _, saved = refspan.span_attention(*arrays, **options)
        grads = refspan.span_attention_backward(grad_out, saved)._asdict()
        grad_out *= 2
        return grads

    wrong = OnNumpy(soft_mask=soft_mask, span_attention=attention, span_attention_backward=backward)
    found = failures(check_backend(wrong, checks=SOME, examples=20))
    assert found["mask.values"] == "soft_mask changed its argument 'age'"
    assert found["attention.position"] == "span_attention changed its argument 'position'"
    assert found["gradient.values"] == "span_attention_backward changed its argument 'grad_out'"
