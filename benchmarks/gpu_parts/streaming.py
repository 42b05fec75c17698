"""Time of a step of a whole streaming model of one layer, in its steady state, for every contender that is there."""

import time
from dataclasses import asdict
from functools import partial

from .device import failure, release, runtime, usable
from .speed import peak, side_by_side
from .streams import CONTENDERS, VOCABULARY, Steady, StreamCase, contender, error_of
from .traces import attention_us

BASES = ("torch_eager", "torch_flex_parts", "torch_flex_whole")
"""That the times of all are compared with."""


def sections(settings):
    """As `gpu_parts` says."""
    parts = {f"matmul {dtype}": partial(peak, dtype) for dtype in ("float16", "float32")}
    for case in cases(settings.small):
        key = f"{case.dtype} d={case.hidden} B={case.batch} M={case.queries} live={case.live}"
        parts[key] = partial(step, case)
    return parts


def cases(small):
    """In order of interest, since time may run out."""
    if small:
        blocks = [StreamCase(32, 2, batch, 64, 200, dtype, 64) for batch, dtype in ((1, "float32"), (2, "float16"))]
        return [*blocks, StreamCase(32, 2, 1, 1, 200, "float32", 64)]
    large = StreamCase(1024, 16, 16, 512, 8000, "float16", 512)
    few = [StreamCase(512, 8, 1, 256, live, dtype, 256) for dtype in ("float16", "float32") for live in (16000, 4000)]
    single = [StreamCase(512, 8, batch, 1, 1000, "float16", 256) for batch in (1, 16)]
    return [large, *few[:2], *single, *few[2:], StreamCase(512, 8, 1, 256, 1000, "float16", 256)]


def step(case, settings, results):
    """One case: each contender is first compared with the reference, then all that run are timed in turns."""
    runtime(settings.device)
    steady, rows, calls, abouts = Steady(case), {}, {}, {}
    record = {"status": "running", "case": asdict(case), "contenders": rows}
    for name in CONTENDERS:
        rows[name] = {"status": "running"}
        yield record
        start = time.perf_counter()
        try:
            settings.check_time()
            if name in settings.avoid:
                raise RuntimeError(f"not tried again after {settings.avoid[name]}")
            call, about = contender(name, steady, settings.device)
            rows[name] = error_of(call, steady) | {"first_seconds": time.perf_counter() - start}
            calls[name], abouts[name] = call, about
        except Exception as error:  # any library may fail in its own way, the others go on
            if not usable(settings.device):
                raise  # for a new process, which is told by the record who was running
            rows[name] = failure(error)
        call = about = None
        release(settings.device)
    yield record
    for name, times in side_by_side(calls, settings).items():
        rows[name] |= times
    yield record
    best = results.get(f"matmul {case.dtype}", {}).get("tflops")
    for name, row in rows.items():
        if "ms" in row:
            row |= abouts[name]() | rates(case, row["ms"], best)
            if us := attention_us(row):
                row["attention_tflops"] = attention_flops(case) / us / 1e6
                row["attention_share_of_peak"] = row["attention_tflops"] / best if best else None
            row |= {f"time_to_{base}": row["ms"] / rows[base]["ms"] for base in BASES if "ms" in rows[base]}
    yield {**record, "status": "done"}


def rates(case, milliseconds, best):
    """What a step's time amounts to."""
    flops = 2 * tokens(case) * case.hidden * (12 * case.hidden + VOCABULARY) + attention_flops(case)
    tflops = flops / milliseconds / 1e9
    speed = tokens(case) / milliseconds * 1e3
    return {"tokens_per_second": speed, "useful_tflops": tflops, "share_of_peak": tflops / best if best else None}


def attention_flops(case):
    """Of queries and live memories, recent ones included."""
    return 4 * tokens(case) * case.hidden * case.live


def tokens(case):
    """Read in one step."""
    return case.batch * case.queries
