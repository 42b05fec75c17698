"""`refspan run` and the files that it reads."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx_models import small_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import refspan
from refspan.__main__ import cli
from refspan.checkpoint import load_state_notes
from refspan.errors import RunFailedError, SetupError
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

    class Trickle(io.BytesIO):
        def read(self, _):
            return super().read(3)

    blocks = list(TokenFile(Path("x"), "", 11)._of_stream(Trickle(text), 7))
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
    ("numbers.onnx", "large", b"1 2 11 3", "large: number 3 is token 11, expected 0 to 10, which the model knows"),
    ("numbers.onnx", "negative", b"1 -2", "negative: number 2 is token -2, expected 0 to 10"),
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
        (np.array([{}]), "got object (1,), expected whole numbers with one axis"),
        (np.array([1, 2**64 - 1], np.uint64), f"number 2 is token {2**64 - 1}, expected 0 to 10"),
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


@pytest.mark.parametrize("kind", ["bytes", "text", "array"])
def test_skipping_is_reading_from_there(folder, tmp_path, kind):
    """In two parts, the second one told by the first where it begins, as in one; also from standard input."""
    tokens = np.random.default_rng(2).integers(0, 11, 200)
    path, state, written = tmp_path / "tokens", tmp_path / "state", tmp_path / "r.json"
    if kind == "bytes":
        path.write_bytes(TEXT[:200])
    elif kind == "text":
        path.write_text(" ".join(map(str, tokens)))
    else:
        path = tmp_path / "tokens.npy"
        np.save(path, tokens.astype(">u2"))
    model = folder / ("bytes.onnx" if kind == "bytes" else "numbers.onnx")
    parts = []
    for options in (
        [],
        ["--max-tokens", 70, "--save-state", state],
        ["--state", state, "--skip", 70, "--save-state", state],
    ):
        assert invoke(model, "--input", path, "--json", written, *options)[0] == 0
        parts.append(json.loads(written.read_text()))
    assert [part["input_position"] for part in parts] == [200, 70, 200]
    assert [part["tokens"] for part in parts] == [199, 69, 130]
    assert all(part["complete"] for part in parts)
    bits = [part["tokens"] * part["bits_per_token"] for part in parts]
    assert bits[1] + bits[2] == pytest.approx(bits[0], rel=1e-6)
    if kind != "array":
        _, said = invoke(model, "--input", "-", "--skip", 70, "--json", "-", input=path.read_bytes())
        assert (json.loads(said)["tokens"], json.loads(said)["input_position"]) == (129, 200)
    status, said = invoke(model, "--input", path, "--skip", 200, "--state", state, "--save-state", tmp_path / "again")
    assert (status, f"state            saved; go on with --state {tmp_path / 'again'} --skip 200" in said) == (0, True)
    assert_same_state(state, tmp_path / "again")
    for skip in (201, 2**62):
        status, said = invoke(model, "--input", path, "--skip", skip)
        assert (status, f"holds 200 tokens, expected at least {skip}, which are to be skipped" in said) == (2, True)


@pytest.mark.parametrize("kind", ["bytes", "text", "array"])
def test_input_that_is_cut_while_it_is_read(tmp_path, kind):
    """Neither the end of the process, as with a memory map, nor a success with fewer tokens."""
    tokens = np.random.default_rng(2).integers(0, 11, 200_000)
    path = tmp_path / "tokens"
    if kind == "bytes":
        path.write_bytes(bytes(200_000))
    elif kind == "text":
        path.write_text(" ".join(map(str, tokens)))
    else:
        path = tmp_path / "tokens.npy"
        np.save(path, tokens)
    file = TokenFile(path, "bytes" if kind == "bytes" else "", 11)
    blocks = file.blocks(1000)
    next(blocks)
    os.truncate(path, 100_000)
    with pytest.raises(SetupError, match=r"tokens.*: ended .*: cut while it was read"):
        list(blocks)
    if kind == "array":
        for header in (b"{'descr': (((", b"{1:2,'a':3}", b"{'descr': '<i8', 'fortran_order': False, 'shape': (-5,)}"):
            (tmp_path / "h.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
            with pytest.raises(SetupError, match=r"h.npy: (no whole .npy file|got int64 \(-5,\))"):
                TokenFile(tmp_path / "h.npy", "", 11).size()
        with pytest.raises(SetupError, match=r"no whole .npy file: holds .* bytes of 200000 numbers, expected 1600000"):
            next(file.blocks(1000))


def test_outputs_that_would_replace_something(folder, tmp_path, monkeypatch):
    text, model = tmp_path / "text", tmp_path / "m.onnx"
    text.write_bytes(TEXT[:50])
    model.write_bytes((folder / "bytes.onnx").read_bytes())
    beside = tmp_path / "m.onnx.data"
    beside.write_bytes(b"weights")
    (tmp_path / "link").symlink_to(text)
    (tmp_path / "hard").hardlink_to(text)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    device = Path("/dev/null")
    for options, message in [
        (["--save-state", model], "--save-state .*m.onnx: is MODEL.onnx too, which would be lost"),
        (["--json", text], "--json .*text: is --input too, which would be lost"),
        (["--json", tmp_path / "link"], "--json .*link: is --input too"),
        (["--save-state", tmp_path / "hard"], "--save-state .*hard: is --input too"),
        (["--json", tmp_path / "x", "--save-state", tmp_path / "x"], "--json .*x: is --save-state too"),
        (["--state", text, "--json", text], "is --input too"),
        (["--json", device], "/dev/null: is not a regular file, and would have to be replaced"),
        (["--json", beside], "--json .*m.onnx.data: is the model's weights beside it too"),
        (["--save-state", "-"], "-: standard output takes no file here"),
        (["--save-state", "/proc/x"], "/proc/x: cannot write into /proc"),
    ]:
        status, said = invoke(model, "--input", text, *options)
        assert (status, bool(re.search(message, said))) == (2, True), said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def refspan_run(*words, **options):
    """The command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "refspan", "run", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
def test_standard_output_is_not_replaced(folder, tmp_path):
    (tmp_path / "text").write_bytes(TEXT[:50])
    words = [folder / "bytes.onnx", "--input", tmp_path / "text", "--json"]
    said, error = refspan_run(*words, "/dev/stdout").communicate()
    assert (said, error.count(b"\n")) == (b"", 1)
    assert b"is not a regular file" in error
    out = tmp_path / "out"
    with out.open("w") as file:
        done = subprocess.run([sys.executable, "-m", "refspan", "run", *words, out], stdout=file, check=False)
    assert (done.returncode, out.read_bytes()) == (2, b"")
    said, error = refspan_run(*words, "-").communicate()
    assert (json.loads(said)["tokens"], error) == (49, b"")


def test_a_report_is_not_lost_with_the_files(folder, tmp_path, monkeypatch):
    """The disk is full: what was found is printed, and each file is tried."""
    (tmp_path / "text").write_bytes(TEXT[:50])

    def full(*_, **__):
        raise SetupError("state: cannot be written: No space left on device")

    monkeypatch.setattr(OnnxStream, "save_state", full)
    words = [folder / "bytes.onnx", "--input", tmp_path / "text", "--json", tmp_path / "r", "--save-state", "state"]
    result = CliRunner().invoke(cli, ["run", *map(str, words)], standalone_mode=False)
    assert "tokens scored    49" in result.output
    assert str(result.exception) == "state: cannot be written: No space left on device; the state is lost"
    assert isinstance(result.exception, SetupError)
    assert json.loads((tmp_path / "r").read_text())["tokens"] == 49


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_files_are_not_lost_with_the_report(folder, tmp_path):
    """Standard output is full, or nobody reads it."""
    (tmp_path / "text").write_bytes(TEXT[:50])
    words = [
        folder / "bytes.onnx",
        "--input",
        tmp_path / "text",
        "--json",
        tmp_path / "r",
        "--save-state",
        tmp_path / "s",
    ]
    command = [sys.executable, "-m", "refspan", "run", *map(str, words)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"refspan: cannot be printed: No space left on device; go on with --state ")
    assert json.loads((tmp_path / "r").read_text())["tokens"] == 49
    assert load_state_notes(tmp_path / "s")


def test_a_state_with_a_damaged_note(folder, tmp_path):
    (tmp_path / "text").write_bytes(TEXT[:50])
    words = [folder / "bytes.onnx", "--input", tmp_path / "text"]
    assert invoke(*words, "--save-state", tmp_path / "s")[0] == 0
    arrays = load_file(tmp_path / "s")
    with safe_open(tmp_path / "s", "numpy") as file:
        metadata = file.metadata()
    for note in ("\u00b2", "9" * 5000, "-1", "256"):
        save_file(arrays, tmp_path / "t", {**metadata, "next_token": note})
        status, said = invoke(*words, "--state", tmp_path / "t")
        assert (status, "expected a token of the model" in said) == (2, True)


@pytest.mark.parametrize("error", [MemoryError(), StreamFailedError("no memory for slots (the stream is as it was)")])
def test_memory_that_runs_out(folder, tmp_path, monkeypatch, error):
    """In the fourth block, before anything has changed: what was read until then is printed, and saved."""
    (tmp_path / "text").write_bytes(TEXT[:50])
    (tmp_path / "shorter").write_bytes(TEXT[:24])
    words = [folder / "bytes.onnx", "--save-state"]
    assert invoke(*words, tmp_path / "expected", "--input", tmp_path / "shorter")[0] == 0
    make_room, calls = OnnxStream._make_room, []

    def at_its_end(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return make_room(*arguments)

    monkeypatch.setattr(OnnxStream, "_make_room", at_its_end)
    state, written = tmp_path / "state", tmp_path / "r.json"
    result = CliRunner().invoke(
        cli, ["run", *map(str, [*words, state, "--input", tmp_path / "text", "--json", written])], standalone_mode=False
    )
    said = str(error) or "there is no memory left"
    assert isinstance(result.exception, RunFailedError)
    if isinstance(error, MemoryError):  # it may have come in the middle of anything
        assert str(result.exception) == f"{said}; the state is lost"
        assert not state.exists()
    else:
        assert str(result.exception) == f"{said}; go on with --state {state} --skip 24"
        assert_same_state(state, tmp_path / "expected")
    assert "tokens scored    23" in result.output
    report = json.loads(written.read_text())
    assert (report["complete"], report["tokens"], report["input_position"]) == (False, 23, 24)


def test_log_probabilities_that_are_not_finite(folder, tmp_path, monkeypatch):
    """Neither a score of NaN nor a state that nothing can be gone on with."""
    (tmp_path / "text").write_bytes(TEXT[:50])
    step, calls = OnnxStream.step, []

    def wrong(stream, tokens):
        log_probs = step(stream, tokens)
        calls.append(1)
        if len(calls) == 3:
            log_probs[0, 4, TEXT[20]] = np.nan
        return log_probs

    monkeypatch.setattr(OnnxStream, "step", wrong)
    words = ["--input", tmp_path / "text", "--save-state", tmp_path / "s", "--json", tmp_path / "r"]
    result = CliRunner().invoke(cli, ["run", *map(str, [folder / "bytes.onnx", *words])], standalone_mode=False)
    assert isinstance(result.exception, RunFailedError)
    assert str(result.exception) == (
        f"number 21 of the input, token {TEXT[20]}, gets the log-probability nan: damaged parameters?; "
        "the state is lost"
    )
    assert not (tmp_path / "s").exists()
    assert json.loads((tmp_path / "r").read_text())["tokens"] == 15
    calls.clear()
    monkeypatch.setattr(OnnxStream, "step", lambda stream, tokens: np.full_like(step(stream, tokens), np.nan))
    result = CliRunner().invoke(cli, ["generate", str(folder / "bytes.onnx"), "--prompt", "a"], standalone_mode=False)
    assert str(result.exception) == "the model's log-probabilities are NaN: damaged parameters?"


signals = pytest.mark.skipif(os.name == "nt", reason="sends signals")


@signals
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_waiting_at_once_and_saves_what_was_read(folder, tmp_path, number, status):
    """A pipe that stays open: the program waits for more when the signal comes."""
    state = tmp_path / "state"
    process = refspan_run(
        folder / "bytes.onnx", "--input", "-", "--save-state", state, "--block", "5", stdin=subprocess.PIPE
    )
    process.stdin.write(TEXT[:300])
    process.stdin.flush()
    time.sleep(3)
    process.send_signal(number)
    process.wait(timeout=10)
    said, error = process.communicate()
    assert process.returncode == status, error
    assert b"tokens scored    299" in said
    assert error == f"interrupted; go on with --state {state} --skip 300\n".encode()
    (tmp_path / "first").write_bytes(TEXT[:300])
    invoke(folder / "bytes.onnx", "--input", tmp_path / "first", "--save-state", tmp_path / "same", "--block", 5)
    assert_same_state(state, tmp_path / "same")


@signals
@pytest.mark.parametrize("pauses", [[0.002], [0.01, 0.01], [0.3], [0.01] * 20])
def test_ctrl_c_in_quick_succession_is_one(folder, tmp_path, pauses):
    """In the middle of work: the state is saved all the same, and it is where the program says that it is."""
    text, state = tmp_path / "text", tmp_path / "state"
    text.write_bytes(TEXT * 2000)
    process = refspan_run(folder / "bytes.onnx", "--input", text, "--save-state", state)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    for pause in pauses:
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    # Once all is done, Python no longer listens, and the last of many ends the process as the system has it.
    assert process.returncode in (130, -signal.SIGINT), error
    assert b"Traceback" not in error
    skip = int(error.split()[-1])
    assert error == f"interrupted; go on with --state {state} --skip {skip}\n".encode()
    assert f"tokens scored    {skip - 1:,}".encode() in said
    assert load_state_notes(state) == {"next_token": str(text.read_bytes()[skip - 1])}


@signals
def test_ctrl_c_again_stops_what_takes_long():
    """A second later it is an exception wherever the program is; and once more ends the process."""
    code = (
        "import os, signal, time\n"
        "from refspan.interrupt import Interrupts\n"
        "stop = Interrupts()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('noted', bool(stop), flush=True)\n"
        "time.sleep(1.1)\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('raised', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "noted True\nraised\n", "")
