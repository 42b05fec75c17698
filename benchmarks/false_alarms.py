"""How often the suite rejects what is right: many cases of each check, put to right backends of all kinds.

    python benchmarks/false_alarms.py --out benchmarks/results/false-alarms.json [--examples 20000] [--level attention]

Cases are spread over seeds, `PER_SEED` for each, and drawn once for all backends; as in `refspan check`, a check whose
cases cost ten times as much gets a tenth of them, and backends that take long over those are not asked them. The record
grows seed by seed: what is in it is not done again, so a run may be stopped and started. Every failure is in it, with
its seed and example, and the versions of all that took part in it.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
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
SLOW = (LOOPS, "ClipsNegativeSpans", "LearnsAtTheKinks")
"""Asked checks of cost 1 only. The last two differ from Dense at kinks alone, which are among those."""


def backends():
    """Name -> a function that makes the backend."""
    made = dict(RIGHT)
    made[LOOPS] = lambda: __import__("loops").Loops()
    made["PyTorch autograd"] = lambda: __import__("torch_backend").TorchBackend()
    for form in ("fused", "portable"):
        made[f"onnxruntime {form}"] = lambda form=form: load_backend("onnxruntime", form=form)
        made[f"onnx-reference {form}"] = lambda form=form: load_backend("onnx-reference", form=form)
    return made


def try_seed(id_, dtype, seed):
    """One seed of a check: backend -> [cases passed, failures], for those that take them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    (check,) = select(ids=[id_])
    cases = drawn(check, np.dtype(dtype), seed, PER_SEED)
    found = {}
    with remembering(), np.errstate(all="ignore"):
        for name, make in backends().items():
            if name in SLOW and check.cost > 1:
                continue
            try:
                backend = make()
            except ImportError:  # a library that is not installed
                continue
            if dtype not in (getattr(backend, "dtypes", ()) or DTYPES):
                continue
            session = InProcess(backend, timeout=60)
            found[name] = [0, []]
            for i, case in enumerate(cases):
                try:
                    check.body(Probe(session), case)
                    found[name][0] += 1
                except NotOffered:
                    del found[name]
                    break
                except Misbehaviour as error:
                    found[name][1].append({"seed": seed, "example": i, "message": str(error)})
            session.close()
    return found, time.perf_counter() - start


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The record, to be made or gone on with.")
@click.option("--examples", default=20_000, show_default=True, help="Of each check and dtype.")
@click.option("--level", "levels", multiple=True, type=click.Choice(LEVELS))
@click.option("--check", "ids", multiple=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES, show_default=True)
@click.option("--processes", default=os.cpu_count(), show_default=True)
@click.option("--minutes", type=float, help="Stop after so many.")
def main(out, examples, levels, ids, dtypes, processes, minutes):
    """Put many cases of each check to right backends, and record what is rejected."""
    os.environ["OMP_NUM_THREADS"] = "1"
    record = json.loads(out.read_text()) if out.exists() else {"per_seed": PER_SEED, "checks": {}}
    if record.get("per_seed") != PER_SEED:
        raise click.UsageError(f"{out} is not a record of this script, with {PER_SEED} cases a seed: name another file")
    if (this := made_with(*VERSIONS_OF)) not in record.setdefault("runs", []):
        record["runs"].append(this)
    checks = [check.id for check in select(levels, ids) if check.level != "golden"]
    asked = [(check, dtype, seed) for seed in range(-(-examples // PER_SEED)) for dtype in dtypes for check in checks]
    asked = [one for one in asked if one[2] not in record["checks"].get(f"{one[0]} {one[1]}", {}).get("seeds", [])]
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
            check, dtype, seed = waiting.pop(done)
            found, seconds = done.result()
            entry = record["checks"].setdefault(f"{check} {dtype}", {"seeds": [], "seconds": 0.0, "backends": {}})
            entry["seeds"].append(seed)
            entry["seconds"] = round(entry["seconds"] + seconds, 1)
            for name, (passed, failures) in found.items():
                total = entry["backends"].setdefault(name, {"passed": 0, "failures": []})
                total["passed"] += passed
                total["failures"] += failures
                for failure in failures:
                    bar.write(f"{check} {dtype} {name}: {failure}")
            write_whole(out, (json.dumps(record, indent=1) + "\n").encode())
            bar.update()
    failures = sum(len(b["failures"]) for entry in record["checks"].values() for b in entry["backends"].values())
    passed = sum(b["passed"] for entry in record["checks"].values() for b in entry["backends"].values())
    least = min(len(entry["seeds"]) for entry in record["checks"].values()) * PER_SEED
    print(f"{passed + failures} cases, {failures} rejected; at least {least} of each cheap check and dtype")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
