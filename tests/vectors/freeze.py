"""Choose the cases that ship with the package.

    python tests/vectors/freeze.py

For each check of one attention step its default cases are drawn, in float32 and some in the other dtypes. From these
come the smallest few that together reject all mutants that any of them rejects: greedily, those first that reject most
for their size. Ids come from what is asked, so cases that are chosen again keep theirs; whoever runs this anew reads
the difference.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy

from refspan.conformance.guard import Misbehaviour, NotOffered
from refspan.conformance.memo import remembering
from refspan.conformance.mutants import MUTANTS, RIGHT
from refspan.conformance.registry import Probe
from refspan.conformance.runner import drawn, select
from refspan.conformance.sessions import InProcess
from refspan.conformance.vectors.reading import FIELDS
from refspan.conformance.vectors.replay import checks_of
from refspan.conformance.vectors.vector import OF_LEVEL, vector_of

HERE = Path(__file__).resolve().parents[2] / "conformance" / "vectors"
LARGEST = 600
"""Numbers that a case may ask with."""
DTYPES = {"float32": 100, "float16": 20, "float64": 20}
AREAS = ("mask", "weights", "gradients")


def candidates():
    """What checks ask alone, with what they compare the answer with."""
    probe = Probe(InProcess(RIGHT["numpy"](), timeout=20))
    for dtype, examples in DTYPES.items():
        for check in select(levels=tuple(OF_LEVEL)):
            if check.level == "golden":
                continue
            for case in drawn(check, np.dtype(dtype), 0, examples):
                check.body(probe, case)
                if len(probe.asked) != 1:
                    continue
                vector = vector_of(
                    probe.asked[0],
                    OF_LEVEL[check.level],
                    check=check.id,
                    clauses=check.clauses,
                    purpose=check.purpose.partition("\n")[0],
                    compared=dict(probe.compared),
                )
                if sum(x.size for x in vector.inputs.values()) <= LARGEST:
                    yield vector


def killed_by(vectors):
    """For each vector the mutants that it rejects."""
    killed = [set() for _ in vectors]
    for name, mutant in MUTANTS.items():
        if mutant.area not in AREAS:
            continue
        session = InProcess(mutant.make(), timeout=20)
        for kills, check in zip(killed, checks_of(vectors), strict=True):
            try:
                check.body(Probe(session), check.cases(None)[0])
            except Misbehaviour:
                kills.add(name)
            except NotOffered:
                pass
        session.close()
    return killed


def main():
    warnings.simplefilter("ignore")
    with remembering(), np.errstate(all="ignore"):
        vectors = list({vector.id: vector for vector in candidates()}.values())
        killed = killed_by(vectors)
    chosen, left = (
        [],
        {(name, vector.operation) for kills, vector in zip(killed, vectors, strict=True) for name in kills},
    )
    checks = {(vector.check, vector.dtype) for vector in vectors}
    size = [sum(x.size for x in vector.inputs.values()) for vector in vectors]

    def worth(i):
        new = {(name, vectors[i].operation) for name in killed[i]} & left
        return (len(new) + ((vectors[i].check, vectors[i].dtype) in checks)) / (50 + size[i])

    while left or checks:
        best = max(range(len(vectors)), key=worth)
        chosen.append(best)
        left -= {(name, vectors[best].operation) for name in killed[best]}
        checks.discard((vectors[best].check, vectors[best].dtype))
    chosen.sort(key=lambda i: vectors[i].id)
    entries, tensors = [], {}
    for place, i in enumerate(chosen):
        vector = vectors[i]
        entries.append({name: getattr(vector, name) for name in FIELDS} | {"kills": sorted(killed[i])})
        for kind in ("input", "expected", "bound"):
            part = getattr(vector, {"input": "inputs"}.get(kind, kind))
            tensors |= {f"{place}.{kind}.{name}": np.ascontiguousarray(x) for name, x in part.items()}
    (HERE / "frozen.json").write_text(json.dumps(entries, indent=1) + "\n")
    (HERE / "frozen.safetensors").write_bytes(safetensors.numpy.save(tensors))
    print(f"{len(chosen)} of {len(vectors)} cases, {(HERE / 'frozen.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main())
