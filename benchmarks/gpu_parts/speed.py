"""Time of one attention step, forward alone and with its gradients, for every contender that is there."""

import time
from dataclasses import asdict
from functools import partial
from statistics import median

from .contenders import BACKWARD, FORWARD, contender
from .device import failure, library, release, runtime, usable
from .steps import ERROR_LIMIT, Case, arguments_of, compare, expected_of, memories_of

REPETITIONS = 20


def sections(settings):
    """As `gpu_parts` says."""
    parts = {f"matmul {dtype}": partial(peak, dtype) for dtype in ERROR_LIMIT}
    for case in cases(settings.small):
        for alive in (1.0, 0.1):
            what = "forward+backward" if case.backward else "forward"
            key = f"{what} {case.dtype} B={case.batch} H={case.heads} N={case.memories} alive={alive:.0%}"
            parts[key] = partial(step, case, alive)
    return parts


def cases(small):
    """In order of interest, since time may run out."""
    if small:
        few, many = (partial(Case, *shape, queries=128, head_size=16) for shape in [(1, 2), (2, 3)])
        pairs = [(few, "float16"), (many, "float32")]
        return [make(256, dtype, backward=backward) for make, dtype in pairs for backward in (False, True)]
    few, many = partial(Case, 1, 8), partial(Case, 16, 16)
    half = [few(4096, "float16"), many(4096, "float16"), many(8192, "float16"), few(4096, "float16", backward=True)]
    half += [make(n, "float16") for n in (16384, 1024) for make in (few, many)]
    return [*half, few(4096, "float32", backward=True), *(few(n, "float32") for n in (4096, 16384, 1024))]


def peak(dtype, settings, results):  # noqa: ARG001
    """TFLOP/s of a big square matrix product: what the device gives in practice (TF32 off)."""
    runtime(settings.device)
    torch = library("torch", settings.device)
    n = 256 if settings.small else 8192
    a = torch.ones((n, n), dtype=getattr(torch, dtype), device=settings.device)
    row = side_by_side({"matmul": lambda: a @ a}, settings)["matmul"]
    yield {"tflops": 2e-9 * n**3 / row["ms"]} if "ms" in row else row


def step(case, alive, settings, results):
    """One case: each contender is first compared with the reference, then all that run are timed in turns."""
    runtime(settings.device)
    memories, live = memories_of(case, alive)
    data = {**arguments_of(case), **memories}
    rows = {}
    record = {"status": "running", "case": asdict(case), "live_memories": live, "contenders": rows}
    expected, calls = expected_of(case, data), {}
    for name in BACKWARD if case.backward else FORWARD:
        rows[name] = {"status": "running"}
        yield record
        start = time.perf_counter()
        try:
            call, to_numpy, about = contender(name, case, data, settings)
            got = to_numpy(call())
            seconds = time.perf_counter() - start
            rows[name] = {"first_seconds": seconds, **compare(got, expected, case), **about()}
            calls[name] = call
        except Exception as error:  # any library may fail in its own way, the others go on
            if not usable(settings.device):
                raise  # for a new process, which is told by the record who was running
            rows[name] = failure(error)
        call = to_numpy = about = got = None  # what failed must not keep its memory
        release(settings.device)
    yield record
    for name, times in side_by_side(calls, settings).items():
        rows[name] |= times
    flops = (12 if case.backward else 4) * case.heads * case.queries * case.head_size * live
    practical_peak, eager = results.get(f"matmul {case.dtype}", {}).get("tflops"), rows["torch_eager"].get("ms")
    for row in rows.values():
        if "ms" in row:
            row["useful_tflops"] = flops / row["ms"] / 1e9
            row["share_of_peak"] = row["useful_tflops"] / practical_peak if practical_peak else None
            row["time_to_torch_eager"] = row["ms"] / eager if eager else None
    late = [name for name, row in rows.items() if row.get("status") == "out of time"]
    if late:
        record |= {"status": "out of time", "reason": f"without {', '.join(late)}: {rows[late[0]]['reason']}"}
        yield record
    else:
        yield {**record, "status": "done"}


def side_by_side(calls, settings):
    """Median time of each call in ms; contenders take turns, a repetition of a fast one is several calls in a row.

    One that fails leaves `calls`, so that its memory is free for the others, and has its failure for a result.
    """
    wait = runtime(settings.device)[0]
    wait()
    failed, counts, times = {}, dict.fromkeys(calls, 1), {name: [] for name in calls}
    for repetition in range(-1, REPETITIONS):  # the first one only says how many calls a repetition is
        for name in list(calls):
            try:
                start = time.perf_counter()
                for _ in range(counts[name]):
                    calls[name]()
                wait()
                seconds = (time.perf_counter() - start) / counts[name]
            except Exception as error:  # noqa: BLE001
                failed[name] = failure(error)
                del calls[name]
                release(settings.device)
                wait()
                continue
            if repetition < 0:
                counts[name] = max(1, min(50, int(2e-3 / seconds)))
            else:
                times[name].append(seconds * 1e3)
        if repetition >= 4 and settings.left() < 3:
            break
    rows = {name: times[name] for name in calls}
    return failed | {
        name: {"ms": median(ms), "best_ms": min(ms), "repetitions": len(ms), "calls": counts[name]}
        for name, ms in rows.items()
    }
