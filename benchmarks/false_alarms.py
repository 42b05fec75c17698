"""How often the suite rejects what is right: many cases of each check, put to right backends of all kinds.

    python benchmarks/false_alarms.py --out benchmarks/results/false-alarms.json [--examples 20000] [--level attention]

`--examples` counts the cases of one check that one backend is asked, in all the dtypes that it knows together. They are
spread over seeds, and drawn once for all backends: `PER_SEED` for each seed, or, as in `refspan check`, a tenth of that
where a case costs ten times as much. The record grows seed by seed: what is in it is not done again, so a run may be
stopped and started. Every failure is in it, with its seed and example, and the versions of all that took part in it.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from made_with import made_with  # noqa: E402

from refspan.conformance.drawing import drawn  # noqa: E402
from refspan.conformance.guard import Misbehaviour, NotOffered  # noqa: E402
from refspan.conformance.loading import load_backend  # noqa: E402
from refspan.conformance.memo import remembering  # noqa: E402
from refspan.conformance.mutants import RIGHT  # noqa: E402
from refspan.conformance.registry import LEVELS, Probe  # noqa: E402
from refspan.conformance.runner import DTYPES, select  # noqa: E402
from refspan.conformance.sessions import InProcess  # noqa: E402
from refspan.files import write_whole  # noqa: E402

PER_SEED = 500
VERSIONS_OF = ("refspan", "numpy", "hypothesis", "onnx", "onnxruntime", "torch")
"""What takes part in a run."""
LOOPS = "plain Python"
PATIENCE = 600
"""Seconds that a backend has for a case: it is not speed that is asked about, and other work may run beside it."""
DEAR = ("mask.large", "attention.sizes", "gradient.sizes", "attention.tiles", "gradient.tiles", "attention.large",
        "gradient.large")  # fmt: skip
"""Of these `LOOPS` is asked a twentieth: its loops take up to four seconds over a case."""


def backends():
    """Name -> a function that makes the backend."""
    made = dict(RIGHT)
    made[LOOPS] = lambda: __import__("loops").Loops()
    made["PyTorch autograd"] = lambda: __import__("torch_backend").TorchBackend()
    for form in ("fused", "portable"):
        made[f"onnxruntime {form}"] = lambda form=form: load_backend("onnxruntime", form=form)
        made[f"onnx-reference {form}"] = lambda form=form: load_backend("onnx-reference", form=form)
    return made


def try_seed(id_, dtype, seed, names):
    """One seed of a check: for each of these backends what it passed; nothing where the check is not offered.

    `results` are those that were compared: many of one case, if it is a stream that is read block by block.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    (check,) = select(ids=[id_])
    cases = drawn(check, np.dtype(dtype), seed, PER_SEED)
    found = {}
    with remembering(), np.errstate(all="ignore"):
        for name in names:
            session = InProcess(backends()[name](), timeout=PATIENCE)
            one = found[name] = {"passed": 0, "results": 0, "failures": []}
            for i, case in enumerate(cases):
                probe = Probe(session)
                try:
                    check.body(probe, case)
                    one["passed"] += 1
                    one["results"] += probe.results
                except NotOffered:
                    one |= {"passed": 0, "results": 0}
                    break
                except Misbehaviour as error:
                    one["failures"].append({"seed": seed, "example": i, "message": str(error)})
            session.close()
    return found, time.perf_counter() - start


def dtypes_of_each():
    """Name of each backend that can be made here -> the dtypes that it knows."""
    found = {}
    for name, make in backends().items():
        try:
            found[name] = getattr(make(), "dtypes", ()) or DTYPES
        except ImportError as error:  # a library that is not installed
            click.echo(f"{name} is not asked: {error}", err=True)
    return found


def as_ranges(seeds):
    """Make "0-2 4" of [0, 1, 2, 4]."""
    runs = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return " ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def of_ranges(text):
    """Make {0, 1, 2, 4} of "0-2 4"."""
    ends = [run.split("-") for run in text.split()]
    return {seed for run in ends for seed in range(int(run[0]), int(run[-1]) + 1)}


NEW = {"seeds": "", "passed": 0, "results": 0, "failures": []}
"""What the record says of a backend that has not been asked."""


def left_to_do(record, checks, dtypes, examples, names=()):
    """`try_seed`'s arguments for all that the record lacks of backends `names`, or of all; the first seeds first."""
    known = {name: of_it for name, of_it in dtypes_of_each().items() if not names or name in names}
    asked = []
    for check in checks:
        in_a_seed = max(1, PER_SEED // check.cost)
        for dtype in dtypes:
            told = record["checks"].get(f"{check.id} {dtype}", {"backends": {}})["backends"]
            names_of = {}
            for name in known:
                had = told.get(name, NEW)
                not_offered = had["seeds"] and not had["passed"] and not had["failures"]
                if dtype not in known[name] or not_offered:
                    continue
                wanted = examples // 20 if name == LOOPS and check.id in DEAR else examples
                for seed in set(range(-(-wanted // (in_a_seed * len(known[name]))))) - of_ranges(had["seeds"]):
                    names_of.setdefault(seed, []).append(name)
            asked += [(check.id, dtype, seed, names) for seed, names in names_of.items()]
    return sorted(asked, key=lambda one: one[2])


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The record, to be made or gone on with.")
@click.option("--examples", default=20_000, show_default=True, help="Of each check for each backend.")
@click.option("--level", "levels", multiple=True, type=click.Choice(LEVELS))
@click.option("--check", "ids", multiple=True)
@click.option("--backend", "names", multiple=True, type=click.Choice(list(backends())), help="All by default.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES, show_default=True)
@click.option("--processes", default=os.cpu_count(), show_default=True)
@click.option("--minutes", type=float, help="Stop after so many.")
def main(out, examples, levels, ids, names, dtypes, processes, minutes):
    """Put many cases of each check to right backends, and record what is rejected."""
    os.environ["OMP_NUM_THREADS"] = "1"
    record = json.loads(out.read_text()) if out.exists() else {"per_seed": PER_SEED, "checks": {}}
    if record.get("per_seed") != PER_SEED:
        raise click.UsageError(f"{out} is not a record of this script, with {PER_SEED} cases a seed: name another file")
    if (this := made_with(*VERSIONS_OF)) not in record.setdefault("runs", []):
        record["runs"].append(this)
    checks = [check for check in select(levels, ids) if check.level != "golden"]
    asked = left_to_do(record, checks, dtypes, examples, names)
    end = time.time() + 60 * minutes if minutes else float("inf")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool, tqdm(total=len(asked), disable=None) as bar:
        waiting, left = {}, iter(asked)
        while True:
            while len(waiting) < 2 * processes and time.time() < end and (one := next(left, None)):
                waiting[pool.submit(try_seed, *one)] = one
            if not waiting:
                break
            done = next(as_completed(waiting))
            check, dtype, seed, _ = waiting.pop(done)
            found, seconds = done.result()
            entry = record["checks"].setdefault(f"{check} {dtype}", {"seconds": 0.0, "backends": {}})
            entry["seconds"] = round(entry["seconds"] + seconds, 1)
            for name, one in found.items():
                had = NEW | entry["backends"].get(name, {})
                entry["backends"][name] = {
                    "seeds": as_ranges(of_ranges(had["seeds"]) | {seed}),
                    **{what: had[what] + one[what] for what in one},
                }
                for failure in one["failures"]:
                    bar.write(f"{check} {dtype} {name}: {failure}")
            write_whole(out, (json.dumps(record, indent=1) + "\n").encode())
            bar.update()
    cases, failures = Counter(), 0
    for key, entry in record["checks"].items():
        for name, had in entry["backends"].items():
            cases[key.split()[0], name] += had["passed"] + len(had["failures"])
            failures += len(had["failures"])
    offered = [count for count in cases.values() if count]
    print(
        f"{sum(offered)} cases, {failures} rejected; at least {min(offered, default=0)} of each check for each backend"
    )
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
