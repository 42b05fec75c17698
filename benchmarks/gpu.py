"""All there is to check and time on a GPU, the attention step and whole streaming models, into one JSON file.

    python benchmarks/gpu.py                       # an NVIDIA GPU; 9 minutes, or as --minutes says
    python benchmarks/gpu.py --device cpu --small  # the same code on tiny sizes, to try the script itself

torch, cupy, onnxruntime-gpu and triton are each optional: what is missing is recorded as missing, and the rest goes on.
Each part runs in a process of its own, section by section. What fails is recorded with its reason and the next section
runs, in a new process if a crash, a hang or a poisoned CUDA context took the old one. The file is written anew, whole,
after each result: nothing measured is ever lost. The code is in `benchmarks/gpu_parts`.
"""

import math
import re
import signal
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_parts.device import Settings, failure  # noqa: E402
from gpu_parts.environment import device_name  # noqa: E402
from gpu_parts.record import Record  # noqa: E402
from gpu_parts.sections import PARTS, run_part  # noqa: E402

from refspan.errors import SetupError  # noqa: E402
from refspan.files import check_writable  # noqa: E402


def interrupt(*_):
    """Treat a polite request to end like Ctrl-C."""
    raise KeyboardInterrupt


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Tiny sizes and few examples, to try the script itself.")
@click.option("--only", "chosen", type=click.Choice(list(PARTS)), multiple=True, help="Run only this part; repeatable.")
@click.option("--minutes", type=float, help="For the whole run; what takes longer is ended. 9, or fit for --budget.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Then nothing new is started; what that leaves out is listed under `skipped`. Default: none.",
)
@click.option("--examples", type=int, help="Per conformance check; 20, or 3 with --small.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/gpu-DATE-DEVICE.json")
def main(device, small, chosen, minutes, budget, examples, out):
    """Check and time attention and streaming models on a GPU, and write one JSON file."""
    signal.signal(signal.SIGTERM, interrupt)
    date, start = time.strftime("%Y-%m-%d-%H%M", time.gmtime()), time.time()
    if minutes is None:
        minutes = 9.0 if budget is None else budget / 60 + 1  # a minute for what the budget finds running
    budget = math.inf if budget is None else budget
    name = re.sub("[^A-Za-z0-9]+", "-", device_name(device))
    path = out or ROOT / "benchmarks" / "results" / f"gpu-{date}-{name}.json"
    try:
        check_writable(path)
    except SetupError as error:
        raise click.UsageError(str(error)) from None
    parts = [part for part in PARTS if part in chosen or not chosen or part == "environment"]
    record = Record(path, {"date": date, "arguments": sys.argv[1:]})
    try:
        for i, part in enumerate(parts):
            share = PARTS[part][1] / sum(PARTS[p][1] for p in parts[i:])
            seconds = max(0, start + 60 * minutes - time.time() - 10) * share
            if part == "environment":  # quick, and the rest means nothing without it
                seconds = max(60, seconds)
            deadline = time.time() + seconds
            settings = Settings(device, small, examples or (3 if small else 20), deadline, budget, start + budget)
            state = record.parts[part] = {"status": "interrupted", "results": {}}
            try:
                run_part(part, settings, state, lambda section, part=part: record.told(part, section))
            except Exception as error:  # noqa: BLE001 - whatever it is, the other parts go on
                state.update(failure(error))
        done = all(state["status"] == "done" for state in record.parts.values())
        record.tree["status"] = "done" if done else "incomplete"
    finally:
        record.save(last=True)
        print(f"{record.tree['status']}: {path}")
    sys.exit(record.tree["status"] != "done")


if __name__ == "__main__":
    main()
