"""Models of the original implementation: what it computed, its checkpoints, and what cannot be read."""

import json
import sys
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

import refspan
import refspan.model
from refspan.__main__ import cli
from refspan.commands.import_ import read_settings
from refspan.errors import SetupError
from refspan.interop import from_transformer_sequential, initial_memory, memory_from_hidden
from refspan.layer_norm import layer_norm
from refspan.model import model
from refspan.span import expire_span

EXPIRE = ("expire_postnorm", "expire_prenorm", "expire_noisy", "expire_long")
RECORDED = (*EXPIRE, "txl")
SHARED = "layers.0.attn.attn.key_pe"


@dataclass(frozen=True)
class Recorded:
    """One of the recorded models, and what it is in our names."""

    arrays: dict
    settings: dict

    @property
    def state(self):
        return {name.removeprefix("param/"): x for name, x in self.arrays.items() if name.startswith("param/")}

    @property
    def ours(self):
        return from_transformer_sequential(self.state, self.settings)

    @property
    def blocks(self):
        return range(len(self.arrays["tokens"]))

    def of(self, block, what):
        return self.arrays[f"block{block:02}/{what}"]

    def gradients(self, block):
        """In our names: gradients are arrays of the same names and shapes as the parameters."""
        prefix = f"block{block:02}/grad/"
        grads = {name.removeprefix(prefix): x for name, x in self.arrays.items() if name.startswith(prefix)}
        theirs = {name: grads[SHARED if name.endswith("key_pe") else name] for name in self.state}
        return from_transformer_sequential(theirs, self.settings)[1]


@cache
def recorded(name):
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    return Recorded(arrays, json.loads(str(arrays.pop("config"))))


def start(config, params, record):
    return memory_from_hidden(config, initial_memory(config, params, record.arrays["tokens"].shape[1]))


def training(record):
    """What each block of the recorded run gives in our model: log-probabilities, losses, gradients, memory after it."""
    config, params = record.ours
    noise = record.settings["noise"]
    limit = None if noise is None else noise * config.max_span
    weight = record.settings["expire_span_loss"] if record.settings["expire_span"] else 0.0
    memory = start(config, params, record)
    for block in record.blocks:
        tokens, targets = record.arrays["tokens"][block], record.arrays["targets"][block]
        log_probs, _, _ = model(config, params, tokens, memory, span_limit=limit)
        losses, grads, memory = refspan.loss_and_gradients(
            config, params, tokens, targets, memory, span_loss_weight=weight, span_limit=limit
        )
        yield log_probs, losses, grads, memory


@pytest.fixture(params=["dropping", "never dropping"])
def dropping(request, monkeypatch):
    """Expired memories are dropped, or kept to the end: nothing else may change."""
    if request.param == "never dropping":
        monkeypatch.setattr(refspan.memory, "expired", lambda xp, span, age, ramp: xp.zeros_like(age, dtype=xp.bool))
    return request.param == "dropping"


@pytest.mark.parametrize("name", RECORDED)
def test_log_probabilities_losses_and_gradients(name, dropping):
    record = recorded(name)
    first, *_, last = record.blocks
    for block, (log_probs, losses, grads, memory) in enumerate(training(record)):
        np.testing.assert_allclose(log_probs, record.of(block, "log_probs"), rtol=0, atol=1e-6)
        assert losses.task == pytest.approx(record.of(block, "nll"), abs=1e-6)
        assert losses.span >= 0 >= record.of(block, "aux")
        if block in (first, last):
            for parameter, want in record.gradients(block).items():
                if name == "txl" and ".span." in parameter:
                    assert not np.any(grads[parameter])  # a window is nothing to be learnt
                else:
                    error = np.max(np.abs(grads[parameter] - want))
                    assert error <= 1e-6 * np.max(np.abs(want)), (block, parameter)
        held = memory[0].slots
    config, params = record.ours
    everything = len(params["position.weight"]) + config.block_size * len(record.blocks)
    assert (held < everything) == dropping


@pytest.mark.parametrize("name", EXPIRE)
def test_memory_holds_all_that_lives_in_the_original(name, dropping):
    record = recorded(name)
    config, params = record.ours
    first, *_, last = record.blocks
    compared = 0
    for block, (*_, memory) in enumerate(training(record)):
        for i in range(config.layers if block in (first, last) else 0):
            hidden, age = (record.of(block, f"layer{i}/memory_{what}") for what in ("hidden", "age"))
            live = ~refspan.memory.expired(np, spans(config, params, i, hidden), age, config.ramp)
            for row in range(len(hidden)):
                held = {int(t): h for t, h in zip(memory[i].age[row], memory[i].contents["hidden"][row], strict=True)}
                for slot in np.flatnonzero(live[row]):
                    np.testing.assert_allclose(held[int(age[row, slot])], hidden[row, slot], rtol=0, atol=1e-7)
                    compared += 1
                if dropping:
                    assert sum(t > 0 for t in held) == live[row].sum()
    assert compared > 50


def spans(config, params, i, hidden):
    p = {name: params[f"layers.{i}.{name}"] for name in ("span.weight", "span.bias", "norm1.weight", "norm1.bias")}
    if config.norm == "pre":
        hidden = layer_norm(np, hidden, p["norm1.weight"], p["norm1.bias"])
    options = {"max_span": config.max_span, "temperature": config.span_temperature}
    return expire_span(np, hidden, p["span.weight"], p["span.bias"], **options)


@pytest.mark.parametrize("lengths", [None, (3, 11, 1, 6), (1,)], ids=["blocks", "ragged blocks", "single tokens"])
@pytest.mark.parametrize("name", [name for name in RECORDED if name != "expire_noisy"])  # shortening is for training
def test_streams_in_blocks_of_any_length(name, lengths):
    record = recorded(name)
    config, params = record.ours
    tokens = np.concatenate(list(record.arrays["tokens"]), axis=1)
    wanted = np.concatenate([record.of(block, "log_probs") for block in record.blocks], axis=1)
    batch = tokens.shape[0]
    stream = refspan.open_model(config, params, batch=batch, memory=initial_memory(config, params, batch))
    read = 0
    for length in cycle(lengths or (config.block_size,)):
        part = slice(read, read + length)
        np.testing.assert_allclose(stream.step(tokens[:, part]), wanted[:, part], rtol=0, atol=1e-6)
        read += length
        if read >= tokens.shape[1]:
            break


def test_initial_memory_matters():
    record = recorded("expire_postnorm")
    config, params = record.ours
    tokens = record.arrays["tokens"][0]
    empty = refspan.open_model(config, params, batch=len(tokens)).step(tokens)
    assert np.max(np.abs(empty - record.of(0, "log_probs"))) > 1e-3
    (hidden, age), _ = initial_memory(config, params, 3)
    assert (hidden.shape, hidden.dtype) == ((3, config.block_size, config.hidden_size), np.float64)
    np.testing.assert_array_equal(age, np.tile(np.arange(config.block_size, 0, -1), (3, 1)))
    with pytest.raises(ValueError, match="memory: got 1 layers, expected 2"):
        memory_from_hidden(config, [(hidden, age)])


# settings


def test_names_and_numbers_as_on_the_command_line():
    record = recorded("expire_prenorm")
    spelt = {f"--{name.replace('_', '-')}": str(x) for name, x in record.settings.items() if name != "kind"}
    wrapped = {f"module.{name}": x for name, x in record.state.items()}
    wrapped["module.layers.1.attn.attn.mask_causal"] = np.ones((8, 78))
    config, params = from_transformer_sequential(wrapped, spelt)
    wanted_config, wanted = record.ours
    assert config == wanted_config
    assert config.span_temperature == 2
    assert list(params) == list(refspan.parameter_shapes(config))
    for name, array in wanted.items():
        np.testing.assert_array_equal(params[name], array)


def state_of_size(*, d=256, ff=1024, layers=8, inner=256, head=128, places=64, spans=True):
    """Arrays of a model of these sizes, all zeros."""
    state = {"in_emb.weight": (11, d), "out.out_emb.weight": (11, d), "out.out_emb.bias": (11,)}
    for i in range(layers):
        of_layer = {
            "attn.attn.key_pe": (1, head, places),
            "attn.proj_query.weight": (inner, d),
            "attn.proj_key.weight": (inner, d),
            "attn.proj_val.weight": (inner, d),
            "attn.proj_out.weight": (d, inner),
            "ff.fc1.weight": (ff, d),
            "ff.fc1.bias": (ff,),
            "ff.fc2.weight": (d, ff),
            "ff.fc2.bias": (d,),
            **{f"norm{n}.{what}": (d,) for n in (1, 2) for what in ("weight", "bias")},
        }
        if spans:
            of_layer |= {"attn.attn.expire_span.span_predictor.weight": (1, d)}
            of_layer |= {"attn.attn.expire_span.span_predictor.bias": (1,)}
        state |= {f"layers.{i}.{name}": shape for name, shape in of_layer.items()}
    return {name: np.zeros(shape, np.float32) for name, shape in state.items()}


def test_settings_that_are_not_given_have_the_defaults_of_the_original():
    config, _ = from_transformer_sequential(state_of_size(), {"expire_span": True})
    assert config == refspan.ModelConfig(
        vocab_size=11,
        hidden_size=256,
        feedforward_size=1024,
        layers=8,
        heads=2,
        head_size=128,
        block_size=64,
        max_span=64,
        ramp=32,
    )
    config, params = from_transformer_sequential(
        state_of_size(spans=False, places=96, layers=1), {"attn-lim": 96, "nlayers": 1}
    )
    assert (config.max_span, config.ramp, config.block_size) == (96, 1, 64)
    assert params["position.weight"].shape == (96, 128)
    assert {x.dtype for x in params.values()} == {np.dtype(np.float32)}


def test_size_of_heads():
    state = state_of_size(layers=1, head=64)
    for head_dim in ({}, {"head_dim": 0}, {"head_dim": "64"}):
        config, _ = from_transformer_sequential(state, {"expire_span": True, "nheads": 4, "nlayers": 1} | head_dim)
        assert config.head_size == 64


def changed(name, **changes):
    """State and settings of a recorded model; arrays by names that need quoting come in `arrays`."""
    record = recorded(name)
    arrays = changes.pop("arrays", {})
    state = {**record.state, **arrays}
    return {n: x for n, x in state.items() if x is not None}, {**record.settings, **changes}


SPAN = "layers.1.attn.attn.expire_span.span_predictor"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (changed("txl", kind="adaptive", adapt_span=True), "setting adapt_span: got True; only Expire-Span and"),
        (changed("txl", kind="compressive"), "setting kind: got 'compressive'; only Expire-Span and Transformer-XL"),
        (changed("txl", compress="true"), "setting compress: got 'true'; only"),
        (changed("expire_long", feedback=1), "setting feedback: got 1; only"),
        (
            changed("txl", arrays={"layers.0.attn.attn.adaptive_span.mask.size_ratio": np.zeros((3, 1, 1))}),
            r"layers\.0\.attn\.attn\.adaptive_span\.mask\.size_ratio: not known to a model of these settings \(1 such",
        ),
        (
            changed("txl", arrays={SHARED: np.zeros((1, 8, 25))}),
            r"layers\.0\.attn\.attn\.key_pe: got shape \(1, 8, 25\), expected \(1, 8, 24\)",
        ),
        (
            changed("txl", expire_span=True),
            r"span_predictor\.weight: missing from the checkpoint, which these settings",
        ),
        (changed("expire_long", expire_span=False), "setting expire_span: missing, but the checkpoint has layers"),
        (changed("expire_long", mem_sz=8), "key_pe: got shape"),
        (changed("expire_long", nlayers=1), r"layers\.1\..*: not known to a model of these settings \(15 such\)"),
        (changed("expire_long", nlayers=3), r"layers\.2\.attn\.proj_query\.weight: missing from the checkpoint"),
        (changed("expire_long", pre_norm=True), r"out_norm\.weight: missing from the checkpoint"),
        (changed("expire_prenorm", pre_norm=False), r"out_norm\.weight: not known to a model of these settings"),
        (changed("expire_long", hid_sz=32), r"in_emb\.weight: got shape \(17, 24\), expected \(V, 32\)"),
        (
            changed("expire_long", inner_hid_sz=41),
            r"parameter layers\.0\.feedforward\.in\.weight: got shape \(40, 24\)",
        ),
        (changed("expire_long", hid_sz="wide"), "setting hid_sz: got 'wide', expected a number"),
        (changed("expire_long", hid_sz=True), "setting hid_sz: got True, expected a number"),
        (changed("expire_long", nheads=2.5), r"setting nheads: got 2\.5, expected a whole number"),
        (changed("expire_long", nheads=0), "heads: got 0, expected at least 1"),
        (changed("expire_long", expire_span_ramp=0), "ramp: got 0.0, expected a finite number > 0"),
        (changed("expire_long", arrays={"in_emb.weight": None}), "in_emb.weight: missing .* is it one of transformer-"),
        (changed("expire_long", arrays={"out.out_emb.bias": None}), r"out\.out_emb\.bias: missing from the checkpoint"),
        (
            changed("expire_long", arrays={f"{SPAN}.bias": np.zeros(())}),
            r"span_predictor\.bias: got shape \(\), expected",
        ),
        (
            changed("expire_long", arrays={"layers.1.attn.attn.key_pe": np.zeros((1, 12, 4))}),
            r"layers\.1\.attn\.attn\.key_pe: differs from that of layer 0, expected one table for all layers",
        ),
        (
            changed("expire_long", arrays={"layers.1.norm1.bias": np.full(24, np.nan)}),
            r"parameter layers\.1\.norm1\.bias: holds NaN or infinite numbers",
        ),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_transformer_sequential(*arguments)
    assert "\n" not in str(caught.value)


# refspan import


FLAGS = (
    "--hid-sz 24 --inner-hid-sz 40 --nlayers 2 --nheads 3 --mem-sz 8 --attn-lim 64 --lr 0.0007 --data-omit-labels 0 1"
)
FLAGS += " --expire-span --expire-span-ramp 6 --expire-span-pre-div 2 --pre-norm --full-test"


@pytest.fixture
def checkpoint(tmp_path):
    """A function that saves recorded models as the original's training does; beside them, the flags of one."""
    torch = pytest.importorskip("torch")

    def save(name="expire_prenorm", *, dtype="float64", **options):
        state = {f"module.{n}": torch.tensor(x).to(getattr(torch, dtype)) for n, x in recorded(name).state.items()}
        state["module.layers.0.attn.attn.mask_causal"] = torch.ones(8, 78)
        weights = [torch.nn.Parameter(torch.ones(2))]
        optimizer = torch.optim.Adam(weights)
        weights[0].grad = torch.ones(2)
        optimizer.step()
        logs = {"loss/train": {"data": [1.5, 1.25], "type": "line"}}
        saved = {
            "epoch": 7,
            "model": state,
            "optimizer": optimizer.state_dict(),
            "logger": logs,
            "scheduler_epoch": 700,
        }
        torch.save(saved, tmp_path / "model.pt", **options)
        return tmp_path / "model.pt"

    (tmp_path / "args.txt").write_text(FLAGS)
    return save


def invoke(*arguments):
    """Exit status and what `refspan import` says; a SetupError is what the command line prints with status 2."""
    result = CliRunner().invoke(cli, ["import", *map(str, arguments)])
    if isinstance(result.exception, SetupError):
        assert "\n" not in str(result.exception)
        return 2, str(result.exception)
    return result.exit_code, result.output


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_import(checkpoint, tmp_path, zipped):
    path, out = checkpoint(_use_new_zipfile_serialization=zipped), tmp_path / "model.safetensors"
    status, said = invoke(path, out)
    assert status == 0
    assert said.splitlines()[0] == f"{out}: 9,763 parameters, float64, of {path} after epoch 7"
    assert "max_span 64, ramp 6.0, span_temperature 2.0, norm pre" in said.splitlines()[1]
    assert len(said.splitlines()) == 2
    config, params = refspan.load_model(out)
    wanted_config, wanted = recorded("expire_prenorm").ours
    assert config == wanted_config
    for name, array in wanted.items():
        np.testing.assert_array_equal(params[name], array)
    with safe_open(out, framework="numpy") as file:
        assert {"imported_from": "model.pt", "epoch": "7"}.items() <= file.metadata().items()


def test_import_of_a_transformer_xl(checkpoint, tmp_path):
    settings = tmp_path / "window.json"
    settings.write_text(json.dumps(recorded("txl").settings))
    assert invoke(checkpoint("txl"), tmp_path / "out", "--settings", settings)[0] == 0
    assert refspan.load_model(tmp_path / "out")[0] == recorded("txl").ours[0]


@pytest.mark.parametrize(("theirs", "ours"), [("bfloat16", "float32"), ("float16", "float16"), ("float32", "float32")])
def test_import_of_narrow_parameters(checkpoint, tmp_path, theirs, ours):
    assert invoke(checkpoint(dtype=theirs), tmp_path / "out")[0] == 0
    _, params = refspan.load_model(tmp_path / "out")
    _, wanted = recorded("expire_prenorm").ours
    for name, array in wanted.items():
        assert params[name].dtype == ours
        np.testing.assert_allclose(params[name], array, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        FLAGS,
        "python main.py \\\n  " + FLAGS.replace(" --", " \\\n  --"),
        "# of the first run\n" + FLAGS.replace(" --", "\n--"),
        "".join(f"{line}\r\n" for line in FLAGS.replace(" --", "\n--").replace("hid-sz ", "hid-sz=").split("\n")),
        """{"hid_sz": 24, "inner_hid_sz": 40, "nlayers": 2, "nheads": "3", "mem-sz": 8, "attn_lim": 64, "lr": 7e-4,
        "expire_span": true, "expire_span_ramp": 6.0, "expire-span-pre-div": "2", "pre_norm": true}""",
    ],
    ids=["one line", "command", "lines", "equals signs", "JSON"],
)
def test_settings_files(tmp_path, text):
    path = tmp_path / "settings"
    path.write_bytes(text.encode())
    config, _ = from_transformer_sequential(recorded("expire_prenorm").state, read_settings(path))
    assert config == recorded("expire_prenorm").ours[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no settings in it, expected flags such as --hid-sz 512, or a JSON object"),
        (b"hid-sz 512", "no settings in it"),
        (b"[1, 2]", "no settings in it"),
        (b"{}", "no settings in it"),
        (b"{'hid_sz': 512}", "Expecting property name"),
        (b"--plot-name 'a", "No closing quotation"),
        (b"\xff\xfe\x00", "can't decode byte"),
    ],
)
def test_import_refuses_settings(tmp_path, content, message):
    path = tmp_path / "args.txt"
    path.write_bytes(content)
    (tmp_path / "model.pt").touch()
    status, said = invoke(tmp_path / "model.pt", tmp_path / "out")
    assert status == 2
    assert said.startswith(f"{path}: ")
    assert message in said


def test_import_refuses_what_is_not_there(tmp_path, checkpoint):
    path, out, model = tmp_path / "model.pt", tmp_path / "out", checkpoint()
    assert invoke(tmp_path / "gone.pt", out) == (2, f"{tmp_path / 'gone.pt'}: no such file")
    assert invoke(tmp_path, out) == (2, f"{tmp_path}: is not a regular file")
    assert invoke(model, tmp_path) == (2, f"{tmp_path}: is a folder, expected a file to write")
    assert invoke(path, out, "--settings", tmp_path) == (2, f"{tmp_path}: Is a directory")
    (tmp_path / "args.txt").unlink()
    status, said = invoke(model, out)
    assert status == 2
    assert said.startswith(f"{tmp_path / 'args.txt'}: no such file; --settings FILE names the flags")
    assert not out.exists()


class Malicious:
    def __reduce__(self):
        return print, ("this must never be run",)


def test_import_refuses_files_of_others(tmp_path, checkpoint, capfd):
    torch = pytest.importorskip("torch")
    path, out = checkpoint(), tmp_path / "out"
    good = path.read_bytes()

    def refused(write):
        write(path)
        status, said = invoke(path, out)
        assert status == 2
        assert said.startswith(f"{path}: ")
        assert not out.exists()
        return said.removeprefix(f"{path}: ")

    whole = "no PyTorch checkpoint, or not a whole one; expected one of tensors and plain values"
    assert refused(lambda path: path.write_bytes(b"")) == whole
    assert refused(lambda path: path.write_bytes(good[: len(good) // 2])) == whole
    assert refused(lambda path: path.write_bytes(good[:100])) == whole
    assert refused(lambda path: path.write_text(FLAGS)) == whole
    assert refused(lambda path: refspan.save_model(path, *recorded("txl").ours)) == whole
    code = "it would run code (print); expected one of tensors and plain values"
    assert refused(lambda path: torch.save({"epoch": 7, "model": Malicious()}, path)) == code
    foreign = "not a checkpoint of transformer-sequential, expected a dict with 'model' in it"
    assert refused(lambda path: torch.save([torch.ones(2)], path)) == foreign
    assert refused(lambda path: torch.save({"weight": torch.ones(2)}, path)) == foreign
    assert refused(lambda path: torch.save({"model": torch.ones(2)}, path)) == foreign
    other = refused(lambda path: torch.save({"model": {"weight": torch.ones(2)}}, path))
    assert other.startswith("in_emb.weight: missing from the checkpoint")
    assert "must never be run" not in capfd.readouterr().out


def test_import_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "args.txt").write_text(FLAGS)
    (tmp_path / "model.pt").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    status, said = invoke(tmp_path / "model.pt", tmp_path / "out")
    assert (status, said) == (2, "PyTorch is not installed, and only it reads its checkpoints; pip install torch")
