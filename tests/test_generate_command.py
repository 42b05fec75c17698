"""`refspan generate` and how tokens are drawn."""

import os
import subprocess
import sys

import click
import numpy as np
import pytest
from onnx_models import small_model
from test_run_command import folder, invoke  # noqa: F401 - a fixture

import refspan
from refspan.export.sampling import sample

SHARES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])


def drawn(count=20_000, **options):
    """How often each token is drawn, as shares."""
    random = np.random.default_rng(0)
    tokens = [sample(np.log(SHARES), random=random, **{"temperature": 1.0, **options}) for _ in range(count)]
    return np.bincount(tokens, minlength=len(SHARES)) / count


def normalised(weights):
    return np.asarray(weights) / np.sum(weights)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SHARES),
        ({"temperature": 2.0}, normalised(SHARES**0.5)),
        ({"temperature": 0.5}, normalised(SHARES**2)),
        ({"top_k": 2}, normalised([0, 0.4, 0, 0.25, 0])),
        ({"top_k": 100}, SHARES),
        ({"top_p": 0.6}, normalised([0, 0.4, 0, 0.25, 0])),
        ({"top_p": 0.7}, normalised([0, 0.4, 0, 0.25, 0.2])),
        ({"top_p": 1.0}, SHARES),
        ({"top_k": 3, "top_p": 0.5}, normalised([0, 0.4, 0, 0.25, 0])),
        ({"temperature": 0.5, "top_p": 0.6}, normalised([0, 0.16, 0, 0.0625, 0])),
    ],
)
def test_shares(options, expected):
    """Within five standard deviations of a share among 20000 draws; what is cut off is never drawn."""
    got = drawn(**options)
    assert np.all(np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000))


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-3}, {"temperature": 1e-320}]
)
def test_the_most_probable_token(options):
    np.testing.assert_array_equal(drawn(50, **options), [0, 1, 0, 0, 0])


def test_extreme_log_probs():
    random = np.random.default_rng(0)
    assert sample(np.array([-np.inf, -1e30, -np.inf]), random=random) == 1
    assert sample(np.array([0.0, 0.0]), temperature=0, random=random) == 0
    assert {sample(np.zeros(3, np.float16), top_k=2, random=random) for _ in range(50)} == {0, 1}
    for wrong in (np.array([np.nan, 0]), np.full(3, -np.inf), np.zeros((1, 3))):
        with pytest.raises(ValueError, match="log_probs: got shape"):
            sample(wrong, random=random)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, expected a finite number >= 0"),
        ({"temperature": np.nan}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0, expected at least 1"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected a number above 0, at most 1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(np.log(SHARES), random=np.random.default_rng(0), **options)


def greedy(vocabulary, prompt, count):
    """What the reference continues with when it takes the most probable token."""
    config, params = small_model(vocab_size=vocabulary)
    stream, tokens = refspan.open_model(config, params, batch=1), []
    log_probs = stream.step(np.asarray(prompt, np.int64)[None])
    for _ in range(count):
        tokens.append(int(np.argmax(log_probs[0, -1])))
        log_probs = stream.step(np.array([[tokens[-1]]]))
    return tokens


def test_greedy_is_the_reference(folder):  # noqa: F811
    status, said = invoke(
        folder / "numbers.onnx", "--prompt", "3 1 4 1 5 9 2 6", "--temperature", 0, "--tokens", 30, command="generate"
    )
    assert status == 0
    assert [int(word) for word in said.split()] == greedy(11, [3, 1, 4, 1, 5, 9, 2, 6], 30)
    status, said = invoke(
        folder / "bytes.onnx", "--prompt", "hé", "--temperature", 0, "--tokens", 30, command="generate"
    )
    assert said == bytes(greedy(256, list("hé".encode()), 30)).decode(errors="replace") + "\n"


def test_the_same_seed_gives_the_same_text(folder, tmp_path):  # noqa: F811
    def said(seed, *options):
        words = [folder / "numbers.onnx", "--prompt", "1 2 3", "--seed", seed, "--tokens", 40, *options]
        return invoke(*words, command="generate")[1]

    assert said(1) == said(1)
    assert said(1) != said(2)
    (tmp_path / "prompt").write_text("1 2 3\n")
    other = invoke(
        folder / "numbers.onnx", "--prompt-file", tmp_path / "prompt", "--seed", 1, "--tokens", 40, command="generate"
    )
    assert other[1] == said(1)


def test_going_on_from_a_state(folder, tmp_path):  # noqa: F811
    (tmp_path / "text").write_text("3 1 4 1 5 9 2 6")
    state = tmp_path / "state"
    assert invoke(folder / "numbers.onnx", "--input", tmp_path / "text", "--save-state", state)[0] == 0
    expected = greedy(11, [3, 1, 4, 1, 5, 9, 2, 6], 20)
    options = ["--temperature", 0, "--tokens", 20]
    said = invoke(folder / "numbers.onnx", "--state", state, *options, command="generate")[1]
    assert [int(word) for word in said.split()] == expected
    said = invoke(folder / "numbers.onnx", "--state", state, "--prompt", "7 8", *options, command="generate")[1]
    assert [int(word) for word in said.split()] == greedy(11, [3, 1, 4, 1, 5, 9, 2, 6, 7, 8], 20)


def test_what_is_refused(folder, tmp_path):  # noqa: F811
    (tmp_path / "empty").write_bytes(b"")
    for words, message in [
        (["bytes.onnx"], "nothing to continue: give a --prompt, or a --state that refspan run saved"),
        (["bytes.onnx", "--prompt", ""], "nothing to continue"),
        (["numbers.onnx", "--prompt", " \t"], "nothing to continue"),
        (["bytes.onnx", "--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file: got both, expected one"),
        (["bytes.onnx", "--prompt-file", tmp_path / "none"], "none: no such file"),
        (["bytes.onnx", "--prompt-file", tmp_path / "empty"], "empty: holds no tokens"),
        (["bytes.onnx", "--prompt", "a", "--temperature", "-1"], "--temperature: got -1.0, expected a finite number"),
        (["bytes.onnx", "--prompt", "a", "--top-p", "2"], "--top-p: got 2.0, expected a number above 0, at most 1"),
        (["bytes.onnx", "--prompt", "a", "--top-k", "0"], "--top-k: got 0, expected at least 1"),
        (["numbers.onnx", "--prompt", "a"], "--prompt: got 'a', expected token numbers"),
        (["numbers.onnx", "--prompt", "1 11"], "--prompt: got token 11, expected 0 to 10"),
    ]:
        status, said = invoke(folder / words[0], *words[1:], command="generate")
        assert (status, message in said) == (2, True), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "Invalid value for '--seed': -1 is not in the range x>=0."),
        (["--threads", "99999999999"], "99999999999 is not in the range 1<=x<=1024."),
        (["--tokens", "0"], "0 is not in the range x>=1."),
    ],
)
def test_options_out_of_range(folder, options, message):  # noqa: F811
    with pytest.raises(click.BadParameter) as error:
        invoke(folder / "bytes.onnx", "--prompt", "a", *options, command="generate")
    assert message in error.value.format_message()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_a_terminal_that_does_not_know_every_character(folder, encoding):  # noqa: F811
    words = [
        sys.executable,
        "-m",
        "refspan",
        "generate",
        str(folder / "bytes.onnx"),
        "--prompt",
        "a",
        "--tokens",
        "300",
    ]
    done = subprocess.run(words, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.decode(encoding)) > 100
