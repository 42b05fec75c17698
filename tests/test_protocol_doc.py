"""docs/protocol.md names what is there: operations, settings, parameters, limits."""

import io
import json
import re
from dataclasses import fields
from math import prod
from pathlib import Path

import numpy as np
import pytest

from refspan.config import ModelConfig, initial_parameters, parameter_shapes
from refspan.conformance.external import backend, wire
from refspan.conformance.external.backend import START_SECONDS, CommandBackend
from refspan.conformance.external.child import LONGEST_LINE
from refspan.conformance.facts import MOST_FACTS
from refspan.conformance.protocol import OPERATIONS
from refspan.conformance.registry import LARGEST_GRANULARITY

DOC = (Path(__file__).resolve().parents[1] / "docs" / "protocol.md").read_text()
MODELS = DOC.partition("## Models")[2]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_parameters(norm):
    config = ModelConfig(11, 7, 5, 2, 3, 4, 6, 8.0, 2.0, norm=norm)
    sizes = {"V": 11, "d": 7, "F": 5, "H": 3, "D": 4}
    documented = {}
    for names, shape, condition in re.findall(r"^\| (`.*`) \| \[(.*?)\](.*) \|$", MODELS, re.MULTILINE):
        if "pre" in condition and norm == "post":
            continue
        numbers = tuple(
            "P" if axis == "P" else prod(sizes[letter] for letter in axis.split())
            for axis in filter(None, shape.split(", "))
        )
        for name in re.findall(r"`([^`]+)`", names):
            for i in range(config.layers if "I" in name else 1):
                documented[name.replace("I", str(i))] = numbers
    assert documented == parameter_shapes(config)


def test_settings():
    about_config = MODELS.partition("`config` is")[2].partition(".")[0]
    assert re.findall(r"`(\w+)`", about_config) == [field.name for field in fields(ModelConfig)]


def test_operations():
    listed = re.findall(r"\*\*`(\w+)`\*\*", DOC)
    assert set(OPERATIONS) <= set(listed)
    stream = ("step", "reset", "memory_size", "rows_projected", "state", "restore")
    assert set(listed) == {*OPERATIONS, *stream}


def test_limits():
    words = " ".join(DOC.split())
    assert f"A line is at most {LONGEST_LINE >> 20} MiB;" in words
    assert f"a tensor of an answer may take {wire.ROOM >> 20} MiB, or {wire.TIMES} times what a right one" in words
    assert f"may take {START_SECONDS:g} seconds" in words
    assert f"up to {MOST_FACTS} `facts`" in words
    assert f"a whole number from 1 to {LARGEST_GRANULARITY}" in words
    assert f'"version": {wire.VERSION}' in words


class AsDocumented:
    """A command that answers what the page says, whatever it is asked."""

    def __init__(self, answers, shape):
        self.asked = []
        self._answers, self._shape, self._tensors = list(answers), shape, io.BytesIO()

    def begin(self, what, seconds):
        pass

    def write(self, data):
        self.asked.append(json.loads(data.partition(b"\n")[0]))

    def line(self):
        answer = self._answers.pop(0)
        self._tensors = io.BytesIO()
        for _ in answer.get("tensors", []):
            np.save(self._tensors, np.zeros(self._shape, np.float32))
        self._tensors.seek(0)
        return json.dumps(answer).encode()

    def read(self, count):
        return self._tensors.read(count)

    def close(self, last_words):
        self.write(last_words)


def test_a_stream_from_beginning_to_end(monkeypatch):
    block = DOC.partition("A stream from its beginning")[2].partition("```json\n")[2].partition("```")[0]
    decoder, said = json.JSONDecoder(), []
    while block := block.strip():
        one, end = decoder.raw_decode(block)
        said.append(one)
        block = block[end:]
    hello = {"version": wire.VERSION, "operations": list(OPERATIONS)}
    command = AsDocumented([hello, *(one for one in said if "cmd" not in one)], (2, 3, 7))
    monkeypatch.setattr(backend, "Child", lambda words: command)
    config = ModelConfig(7, 6, 8, 1, 2, 3, 3, max_span=8.0, ramp=2.0)
    asked = CommandBackend("./mine", 1.0)
    stream = asked.open_model(config, initial_parameters(config, 0), batch=2)
    assert stream.step(np.zeros((2, 3), np.int64)).shape == (2, 3, 7)
    assert stream.memory_size() == [3]
    state = stream.state()
    stream.reset(1)
    stream.restore(state)
    del state
    assert stream.rows_projected() == 6
    asked.close()
    for got, documented in zip(command.asked[1:], (one for one in said if "cmd" in one), strict=True):
        for about in (got, documented):
            about.get("config", {}).clear()
            del about["tensors"][1:]
        assert got == documented
