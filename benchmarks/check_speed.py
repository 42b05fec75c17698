"""How long `refspan check` takes, how that grows with `--examples`, and how much of it is the backend's own.

    python benchmarks/check_speed.py [--backend onnxruntime] [--repeat 3] [--out FILE]

Each run is a process of its own, so that starting and loading count. Numbers of examples take turns, so that a machine
that slows down does so for all of them; medians are compared.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from made_with import made_with

from refspan.files import write_whole


def timed(*arguments):
    """(seconds, seconds of the backend, exit status) of one `refspan check`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "refspan", "check", *arguments, "--json", report], stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - start
        results = json.loads(report.read_text()).get("results", []) if report.exists() else []
    return seconds, sum(one["backend_seconds"] for one in results), done.returncode


def summary(found):
    """What the record says of runs that were alike, of which `timed` returned this."""
    return {
        "seconds": [round(one[0], 1) for one in found],
        "median": round(statistics.median(one[0] for one in found), 1),
        "backend_share": round(statistics.median(one[1] / one[0] for one in found), 2),
        "status": max(one[2] for one in found),
    }


def save(record, out):
    """Write what there is, so that an interrupted run is not lost."""
    if out:
        write_whole(out, (json.dumps(record, indent=1) + "\n").encode())


@click.command()
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--examples", default=(50, 100, 200, 400), multiple=True, show_default=True)
@click.option("--repeat", default=3, show_default=True)
@click.option("--self-test", is_flag=True, help="Time the self-test too, once.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the record to FILE.")
def main(backend, examples, repeat, self_test, out):
    """Time `refspan check`."""
    about = made_with("refspan", "numpy", "hypothesis", "onnx", "onnxruntime")
    record = {**about, "backend": backend, "cores": os.cpu_count(), "examples": {}}
    runs = {count: [] for count in examples}
    for _ in range(repeat):
        for count in examples:
            runs[count].append(timed("--backend", backend, "--examples", str(count)))
            print(f"{count} examples: {runs[count][-1][0]:.1f} s", flush=True)
            record["examples"][count] = summary(runs[count])
            save(record, out)
    for count, found in record["examples"].items():
        share = found["backend_share"]
        print(f"{count:5} examples: {found['median']:6.1f} s, {share:.0%} of it the backend's own", flush=True)
    if self_test:
        seconds, _, status = timed("--self-test")
        record["self_test"] = {"seconds": round(seconds, 1), "status": status}
        save(record, out)
        print(f"self-test: {seconds:.1f} s, exit status {status}")


if __name__ == "__main__":
    main()
