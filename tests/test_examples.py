"""The model that comes with the checkout, and the script that made it."""

import subprocess
import sys
from pathlib import Path

import numpy as np

import refspan
from refspan.checkpoint import load_notes
from refspan.export import OnnxModel, streaming_model

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = EXAMPLES / "tiny.safetensors"


def test_the_model_predicts_text_and_forgets():
    """Far below the 8 bits of a random byte, with far fewer memories than would be kept if none were forgotten."""
    assert TINY.stat().st_size < 5 * 2**20
    assert load_notes(TINY)["tokenizer"] == "bytes"
    config, params = refspan.load_model(TINY)
    text = np.frombuffer((EXAMPLES.parent / "docs" / "specification.md").read_bytes()[:6000], np.uint8).astype(np.int64)
    stream = OnnxModel.of(streaming_model(config, params, form="portable")).open(1)
    log_probs = stream.step(text[None, :-1])[0]
    bits = -np.mean(log_probs[np.arange(len(text) - 1), text[1:]]) / np.log(2)
    assert bits < 3
    assert max(stream.memory_size()) < 0.7 * (config.max_span + config.ramp)
    assert min(stream.memory_size()) > 1
    assert len(set(stream.memory_size())) > 1


def test_the_script_trains(tmp_path):
    command = [sys.executable, EXAMPLES / "train.py", tmp_path / "m.safetensors", "--minutes", "0.02"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    config, _ = refspan.load_model(tmp_path / "m.safetensors")
    assert config == refspan.load_model(TINY)[0]
    assert "bits per byte on held-out files" in ran.stdout
    assert "memories kept by each layer" in ran.stdout


def test_the_script_says_what_is_wrong(tmp_path):
    for words in ([tmp_path / "no" / "m.safetensors"], ["--minutes", "many", tmp_path / "m"], []):
        ran = subprocess.run(
            [sys.executable, EXAMPLES / "train.py", *words], capture_output=True, text=True, check=False
        )
        assert ran.returncode not in (0, None)
        assert "Traceback" not in ran.stderr
