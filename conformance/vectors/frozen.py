"""The cases that ship with the package; `tests/vectors/freeze.py` chose them."""

import json
from importlib.resources import files

import safetensors.numpy

from refspan.conformance.vectors.reading import fields_of
from refspan.conformance.vectors.vector import Vector


def frozen_vectors() -> list[Vector]:
    """All of them, in the order of their ids."""
    here = files("refspan.conformance.vectors")
    entries = json.loads(here.joinpath("frozen.json").read_text())
    tensors = safetensors.numpy.load(here.joinpath("frozen.safetensors").read_bytes())
    vectors = []
    for i, entry in enumerate(entries):
        parts = {
            kind: {n.split(".")[2]: x for n, x in tensors.items() if n.startswith(f"{i}.{kind}.")}
            for kind in ("input", "expected", "bound")
        }
        vectors.append(
            Vector(inputs=parts["input"], expected=parts["expected"], bound=parts["bound"], **fields_of(entry))
        )
    return vectors
