"""Choose the cases that ship with the package.

    python tests/vectors/freeze.py

For each check that asks one question at a time its default cases are drawn, in float32 and some in the other dtypes.
From these come the smallest few that together reject all mutants that any of them rejects, and of each check and dtype
one that rejects some: greedily, those first that reject most for their size. Ids come from what is asked, so cases that
are chosen again keep theirs; whoever runs this anew reads the difference.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy

from refspan.conformance.drawing import drawn
from refspan.conformance.guard import Misbehaviour, NotOffered
from refspan.conformance.memo import remembering
from refspan.conformance.mutants import MUTANTS, RIGHT
from refspan.conformance.registry import Probe
from refspan.conformance.runner import select
from refspan.conformance.sessions import InProcess
from refspan.conformance.vectors.program_json import to_json
from refspan.conformance.vectors.program_vector import LEVELS, ProgramVector, program_vector_of
from refspan.conformance.vectors.reading import fields_of
from refspan.conformance.vectors.replay import checks_of
from refspan.conformance.vectors.vector import OF_LEVEL, vector_of

HERE = Path(__file__).resolve().parents[2] / "conformance" / "vectors"
LARGEST = {"frozen": 600, "frozen_programs": 2500}
"""Size of a case, see `size_of`."""
DTYPES = {"float32": 100, "float16": 20, "float64": 20}
AREAS = {
    "frozen": ("mask", "weights", "gradients", "limits"),
    "frozen_programs": ("memory", "streams", "states", "models", "training", "learning", "kept"),
}
LARGE = {"memory.long": 30_000, "memory.state_machine": 6000}
"""Of these checks: their cases are as large as they have to be."""


def candidates(name):
    """What checks ask alone, with what they compare the answer with."""
    probe = Probe(InProcess(RIGHT["numpy"](), timeout=60))
    levels = LEVELS if name == "frozen_programs" else tuple(level for level in OF_LEVEL if level != "golden")
    for dtype, examples in DTYPES.items():
        for check in select(levels=levels):
            if check.id in LARGE and dtype != "float32":
                continue
            about = {"check": check.id, "clauses": check.clauses, "purpose": check.purpose.partition("\n")[0]}
            for case in drawn(check, np.dtype(dtype), 0, examples):
                check.body(probe, case)
                if len(probe.asked) != 1:
                    continue
                question = probe.asked[0]
                if name == "frozen":
                    vector = vector_of(question, OF_LEVEL[check.level], compared=dict(probe.compared), **about)
                else:
                    vector = program_vector_of(question, notes=case.notes, **about)
                if vector is not None and size_of(vector) <= LARGE.get(check.id, LARGEST[name]):
                    yield vector


def size_of(vector):
    """Numbers that it asks with; of a program, and those of the answers, of which there may be more."""
    if isinstance(vector, ProgramVector):
        parts = (to_json(vector.program)[1], vector.expected, vector.bound)
        return sum(x.size for part in parts for x in part.values())
    return sum(x.size for x in vector.inputs.values())


def killed_by(vectors, areas):
    """For each vector the mutants that it rejects, whatever was asked before: each time a new one is asked."""
    killed = [set() for _ in vectors]
    for name, mutant in MUTANTS.items():
        if mutant.area not in areas:
            continue
        for kills, check in zip(killed, checks_of(vectors), strict=True):
            session = InProcess(mutant.make(), timeout=20)
            try:
                check.body(Probe(session), check.cases(None)[0])
            except Misbehaviour:
                kills.add(name)
            except NotOffered:
                pass
            session.close()
    return killed


def wish_of(vector):
    """Of what there is to be one at least: a check and dtype; of programs, which are large, a check or a dtype."""
    whole_model = isinstance(vector, ProgramVector) and vector.dtype != "float32"
    return (vector.operation if whole_model else vector.check), vector.dtype


def chosen_of(vectors, killed):
    """Places of the smallest few that reject all that can be rejected, in the order of their ids."""
    chosen = []
    kill_some = {wish_of(vector) for kills, vector in zip(killed, vectors, strict=True) if kills}
    left = {(name, vector.operation) for kills, vector in zip(killed, vectors, strict=True) for name in kills}
    checks = {wish_of(vector) for vector in vectors}
    size = [size_of(vector) for vector in vectors]

    def grants(i):
        """A wish: with a case that rejects nothing only if no other would."""
        wish = wish_of(vectors[i])
        return {wish} & checks if killed[i] or wish not in kill_some else set()

    def worth(i):
        new = {(name, vectors[i].operation) for name in killed[i]} & left
        return (len(new) + len(grants(i))) / (50 + size[i])

    while left or checks:
        best = max(range(len(vectors)), key=worth)
        chosen.append(best)
        left -= {(name, vectors[best].operation) for name in killed[best]}
        checks -= grants(best)
    return sorted(chosen, key=lambda i: vectors[i].id)


def freeze(name):
    """Write the files of this name."""
    with remembering(), np.errstate(all="ignore"):
        vectors = list({vector.id: vector for vector in candidates(name)}.values())
        killed = killed_by(vectors, AREAS[name])
    entries, tensors = [], {}
    chosen = chosen_of(vectors, killed)
    for place, i in enumerate(chosen):
        vector = vectors[i]
        entry = {field: getattr(vector, field) for field in fields_of(vector.operation)} | {"kills": sorted(killed[i])}
        inputs = vector.inputs if name == "frozen" else None
        if inputs is None:
            entry["program"], inputs = to_json(vector.program)
        entries.append(entry)
        for kind, part in (("input", inputs), ("expected", vector.expected), ("bound", vector.bound)):
            tensors |= {f"{place}.{kind}.{n}": np.array(x, order="C") for n, x in part.items()}
    (HERE / f"{name}.json").write_text(json.dumps(entries, indent=1) + "\n")
    (HERE / f"{name}.safetensors").write_bytes(safetensors.numpy.save(tensors))
    print(f"{name}: {len(chosen)} of {len(vectors)} cases, {(HERE / f'{name}.safetensors').stat().st_size} bytes")


def main():
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or AREAS:
        freeze(name)


if __name__ == "__main__":
    sys.exit(main())
