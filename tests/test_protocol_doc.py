"""docs/protocol.md names what is there: operations, settings, parameters, limits."""

import re
from dataclasses import fields
from math import prod
from pathlib import Path

import pytest

from refspan.config import ModelConfig, parameter_shapes
from refspan.conformance.external import wire
from refspan.conformance.external.backend import START_SECONDS
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
    assert f"A line is at most {LONGEST_LINE >> 20} MiB," in words
    assert f"a tensor of an answer at most {wire.LARGEST >> 20} MiB," in words
    assert f"all of them together at most {wire.LARGEST_SUM >> 20} MiB" in words
    assert f"may take {START_SECONDS:g} seconds" in words
    assert f"up to {MOST_FACTS} `facts`" in words
    assert f"a whole number from 1 to {LARGEST_GRANULARITY}" in words
    assert f'"version": {wire.VERSION}' in words
