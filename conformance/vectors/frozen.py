"""The cases that ship with the package; `tests/vectors/freeze.py` chose them."""

import json
from importlib.resources import files

import safetensors.numpy

from refspan.conformance.vectors.program_json import from_json
from refspan.conformance.vectors.program_vector import ProgramVector
from refspan.conformance.vectors.reading import AnyVector, told
from refspan.conformance.vectors.vector import Vector


def frozen_vectors() -> list[AnyVector]:
    """All of them: attention steps, then programs, each in the order of their ids."""
    vectors: list[AnyVector] = []
    for name in ("frozen", "frozen_programs"):
        here = files("refspan.conformance.vectors")
        entries = json.loads(here.joinpath(f"{name}.json").read_text())
        tensors = safetensors.numpy.load(here.joinpath(f"{name}.safetensors").read_bytes())
        for i, entry in enumerate(entries):
            inputs, expected, bound = (
                {n.removeprefix(f"{i}.{kind}."): x for n, x in tensors.items() if n.startswith(f"{i}.{kind}.")}
                for kind in ("input", "expected", "bound")
            )
            if "program" in entry:
                program = from_json(entry["program"], inputs)
                vectors.append(ProgramVector(program=program, expected=expected, bound=bound, **told(entry)))
            else:
                vectors.append(Vector(inputs=inputs, expected=expected, bound=bound, **told(entry)))
    return vectors
