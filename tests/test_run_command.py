"""`refspan run` and the files that it reads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx_models import small_model
from safetensors.numpy import load_file

import refspan
from refspan.__main__ import cli
from refspan.checkpoint import load_state_notes
from refspan.errors import SetupError
from refspan.export import OnnxStream, StreamFailedError, streaming_model, write_model_file
from refspan.export.tokens import TokenFile

TEXT = bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes and one of 11 tokens."""
    path = tmp_path_factory.mktemp("models")
    config, params = small_model(vocab_size=256)
    write_model_file(path / "bytes.onnx", streaming_model(config, params, tokenizer="bytes"))
    config, params = small_model()
    write_model_file(path / "numbers.onnx", streaming_model(config, params, form="portable"))
    return path


def invoke(*arguments, command="run", **options):
    """Exit status and what is said; a SetupError is what the command line prints with status 2."""
    result = CliRunner().invoke(cli, [command, *map(str, arguments)], standalone_mode=False, **options)
    if isinstance(result.exception, SetupError):
        return 2, str(result.exception)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.output


def assert_same_state(one, other):
    """Arrays and metadata, the order of which is left to chance."""
    assert load_state_notes(one) == load_state_notes(other)
    arrays, others = load_file(one), load_file(other)
    assert set(arrays) == set(others)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name])


def bits_of_the_reference(vocabulary, tokens):
    """Bits per token of all tokens but the first."""
    config, params = small_model(vocab_size=vocabulary)
    tokens = np.asarray(tokens, np.int64)
    log_probs = refspan.open_model(config, params, batch=1).step(tokens[None, :-1])[0]
    return -np.mean(log_probs[np.arange(len(tokens) - 1), tokens[1:]], dtype=np.float64) / np.log(2)


@pytest.mark.parametrize("block", [None, 1, 7, 1000])
def test_scores_are_those_of_the_reference(folder, tmp_path, block):
    (tmp_path / "text").write_bytes(TEXT)
    options = [] if block is None else ["--block", block]
    status, said = invoke(
        folder / "bytes.onnx", "--input", tmp_path / "text", "--json", tmp_path / "report.json", *options
    )
    assert status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tokens"] == len(TEXT) - 1
    assert report["bits_per_byte"] == pytest.approx(bits_of_the_reference(256, list(TEXT)), abs=1e-5)
    assert report["perplexity"] == pytest.approx(2 ** report["bits_per_byte"])
    assert f"bits per byte    {report['bits_per_byte']:.3f}" in said.splitlines()
    assert len([line for line in said.splitlines() if line.startswith("layer ")]) == 2
    assert report["longest_life"] == 33
    live = zip(report["live_memories_mean"], report["live_memories_most"], strict=True)
    assert all(0 < mean <= most <= 33 for mean, most in live)


def test_numbers_from_texts_arrays_and_standard_input(folder, tmp_path):
    tokens = np.random.default_rng(1).integers(0, 11, 300)
    (tmp_path / "a.txt").write_text("\n".join(map(str, tokens)) + "\n")
    (tmp_path / "b.txt").write_text("  " + "  ".join(map(str, tokens)))
    np.save(tmp_path / "c.npy", tokens.astype(np.uint8))
    expected = bits_of_the_reference(11, tokens)
    for name in ("a.txt", "b.txt", "c.npy"):
        invoke(folder / "numbers.onnx", "--input", tmp_path / name, "--json", tmp_path / "r.json")
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["bits_per_token"] == pytest.approx(expected, abs=1e-5)
        assert report["bits_per_byte"] is None
    for model, content in (("numbers.onnx", (tmp_path / "a.txt").read_bytes()), ("bytes.onnx", TEXT)):
        status, said = invoke(folder / model, "--input", "-", input=content)
        assert status == 0
        assert "tokens scored" in said


def test_numbers_are_the_same_however_they_are_cut():
    tokens = np.random.default_rng(0).integers(0, 11, 50)
    text = " ".join(map(str, tokens)).encode()

    class Trickle:
        def __init__(self):
            self.rest = text

        def read(self, _):
            piece, self.rest = self.rest[:3], self.rest[3:]
            return piece

    blocks = list(TokenFile(Path("x"), "", 11)._of_stream(Trickle(), 7))
    assert [len(block) for block in blocks] == [7] * 7 + [1]
    np.testing.assert_array_equal(np.concatenate(blocks), tokens)


def test_going_on_from_a_state_is_as_if_nothing_had_been(folder, tmp_path):
    """Also the score of the token at the seam; in the reference, too, from the token that the state names."""
    (tmp_path / "whole").write_bytes(TEXT)
    (tmp_path / "first").write_bytes(TEXT[:333])
    (tmp_path / "second").write_bytes(TEXT[333:])
    state = tmp_path / "s.safetensors"
    reports = {}
    for name, options in [("whole", []), ("first", ["--save-state", state]), ("second", ["--state", state])]:
        status, _ = invoke(folder / "bytes.onnx", "--input", tmp_path / name, "--json", tmp_path / "r.json", *options)
        assert status == 0
        reports[name] = json.loads((tmp_path / "r.json").read_text())
    assert reports["second"]["tokens"] == len(TEXT) - 333
    nats = sum(reports[name]["tokens"] * reports[name]["bits_per_byte"] for name in ("first", "second"))
    assert nats / (len(TEXT) - 1) == pytest.approx(reports["whole"]["bits_per_byte"], abs=1e-5)
    status, _ = invoke(
        folder / "bytes.onnx", "--input", tmp_path / "whole", "--max-tokens", 333, "--save-state", tmp_path / "t"
    )
    assert_same_state(tmp_path / "t", state)


FAULTS = [
    ("bytes.onnx", "none", None, "none: no such file"),
    ("bytes.onnx", ".", None, "is not a regular file"),
    ("bytes.onnx", "empty", b"", "empty: holds no tokens"),
    ("numbers.onnx", "empty", b"", "empty: holds no tokens"),
    ("numbers.onnx", "blank", b" \n ", "blank: holds no tokens"),
    ("numbers.onnx", "binary", TEXT, "expected whole numbers: the model's tokens are no bytes"),
    ("numbers.onnx", "long", b"1" * 200_000, "number 1 is '11111111111111111111', expected whole numbers"),
    ("numbers.onnx", "words", b"1 2\n3 four 5", "words: number 4 is 'four', expected whole numbers"),
    ("numbers.onnx", "halves", b"1 2.5", "halves: number 2 is '2.5'"),
    ("numbers.onnx", "large", b"1 2 11 3", "large: got token 11, expected 0 to 10, which the model knows"),
    ("numbers.onnx", "negative", b"1 -2", "negative: got token -2, expected 0 to 10"),
    ("numbers.onnx", "cut.npy", b"\x93NUMPY\x01\x00", "cut.npy: no whole .npy file"),
    ("numbers.onnx", "text.npy", b"1 2 3", "text.npy: no whole .npy file"),
    ("text", "text", b"hello", "text: not an ONNX file"),
]


@pytest.mark.parametrize(("model", "name", "content", "message"), FAULTS)
def test_inputs_that_are_refused(folder, tmp_path, model, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = tmp_path / name if model == "text" else folder / model
    status, said = invoke(path, "--input", tmp_path / name, "--json", tmp_path / "report.json")
    assert status == 2
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.int64), r"got int64 (2, 2), expected whole numbers with one axis"),
        (np.zeros(3), "got float64 (3,), expected whole numbers with one axis"),
        (np.array([{}]), "no whole .npy file"),
        (np.zeros(0, np.int64), "holds no tokens"),
    ],
)
def test_arrays_that_are_refused(folder, tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    status, said = invoke(folder / "numbers.onnx", "--input", tmp_path / "x.npy")
    assert (status, message in said) == (2, True)


def test_options_that_are_refused(folder, tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "state").write_bytes(b"no state")
    for options, message in [
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--state", tmp_path / "none"], "no such file"),
        (["--state", tmp_path / "state"], "no whole safetensors file"),
        (["--save-state", tmp_path / "no" / "s"], "does not exist"),
        (["--json", tmp_path], "is a folder"),
    ]:
        status, said = invoke(folder / "bytes.onnx", "--input", tmp_path / "text", *options)
        assert (status, message in said) == (2, True), said


def test_what_was_read_before_a_fault_is_saved(folder, tmp_path):
    good = " ".join(map(str, np.random.default_rng(0).integers(0, 11, 64)))
    (tmp_path / "good").write_text(good)
    (tmp_path / "bad").write_text(f"{good} and more")
    for name, wanted in (("good", 0), ("bad", 2)):
        status, _ = invoke(
            folder / "numbers.onnx", "--input", tmp_path / name, "--save-state", tmp_path / f"{name}.state"
        )
        assert status == wanted
    assert_same_state(tmp_path / "good.state", tmp_path / "bad.state")


def test_a_device_that_is_lost(folder, tmp_path, monkeypatch, capsys):
    """Status 1 and one line; a state that was saved before stays as it was."""
    from refspan.__main__ import main

    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "state").write_bytes(b"from before")

    def lost(*_):
        raise StreamFailedError("ONNX Runtime failed in the middle of a step: device lost")

    monkeypatch.setattr(OnnxStream, "_block", lost)
    words = [folder / "bytes.onnx", "--input", tmp_path / "text", "--save-state", tmp_path / "state"]
    monkeypatch.setattr(sys, "argv", ["refspan", "run", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "refspan: ONNX Runtime failed in the middle of a step: device lost\n"
    assert (tmp_path / "state").read_bytes() == b"from before"


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_ctrl_c_saves_what_was_read(folder, tmp_path):
    """A pipe that stays open: the program waits for more when the signal comes, and is given one more block."""
    state = tmp_path / "state"
    command = [sys.executable, "-m", "refspan", "run", folder / "bytes.onnx", "--input", "-", "--save-state", state]
    process = subprocess.Popen(
        [*map(str, command), "--block", "100"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(TEXT[:300])
    process.stdin.flush()
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.stdin.write(TEXT[300:400])
    said, error = process.communicate()
    assert process.returncode == 130, error
    assert b"tokens scored    299" in said
    assert b"interrupted; go on with --state" in error
    (tmp_path / "first").write_bytes(TEXT[:300])
    invoke(folder / "bytes.onnx", "--input", tmp_path / "first", "--save-state", tmp_path / "same", "--block", 100)
    assert_same_state(state, tmp_path / "same")
