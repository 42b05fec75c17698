"""All there is to check and time of the attention step on a GPU, into one JSON file.

    python benchmarks/gpu.py                       # an NVIDIA GPU; about 8 minutes
    python benchmarks/gpu.py --device cpu --small  # the same code on tiny sizes, to try the script itself

torch, cupy, onnxruntime-gpu and triton are each optional: what is missing is recorded as missing, and the rest goes on.
Each part runs in a process of its own, which is ended when its time is over, so that a crash, a hang or a poisoned CUDA
context costs that part only. The file is written anew, whole, after each result: nothing measured is ever lost.
"""

import gc
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

import refspan  # noqa: E402
from refspan.errors import SetupError  # noqa: E402
from refspan.files import check_writable, write_whole  # noqa: E402

RAMP = 128.0
ERROR_LIMIT = {"float16": 2e-2, "float32": 1e-4}
"""Largest error, relative to the largest number of the reference, with which a result counts as correct."""
REPETITIONS = 20


@dataclass(frozen=True)
class Settings:
    """What one part needs to know."""

    device: str
    small: bool
    examples: int
    deadline: float

    def left(self):
        """Seconds that the part may still take."""
        return self.deadline - time.time()


@dataclass(frozen=True)
class Case:
    """One attention step to time."""

    batch: int
    heads: int
    memories: int
    dtype: str
    backward: bool = False
    queries: int = 512
    head_size: int = 64


@cache
def library(name, device="cpu"):
    """An optional package; raises SetupError with the reason if it is missing or does not see the device."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a package that cannot load its libraries raises all sorts of things
        raise SetupError(f"{name} cannot be imported: {line(error)}") from None
    if name == "torch" and device == "cuda" and not module.cuda.is_available():
        raise SetupError(f"torch {module.__version__} sees no GPU")
    if name == "onnxruntime":
        from refspan.export.session import check_device

        check_device(device)
    return module


def line(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:1500]}"


def failure(error):
    """An exception as a record."""
    kinds = {SetupError: "missing", MemoryError: "skipped", TimeoutError: "skipped"}
    return {"status": kinds.get(type(error), "failed"), "reason": line(error)}


@cache
def runtime(device):
    """A function that waits for the whole device, the streams of all libraries included; another for its free bytes."""
    if device == "cpu":
        return (lambda: None), lambda: os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        cuda = library("torch", device).cuda
        return cuda.synchronize, lambda: cuda.mem_get_info()[0]
    except SetupError as error:
        reason = line(error)
    try:
        cuda = library("cupy").cuda.runtime
        cuda.memGetInfo()
    except Exception as error:  # noqa: BLE001 - CuPy raises errors of its own when there is no driver
        raise SetupError(f"needs torch or cupy with a GPU to time and weigh: {reason}; {line(error)}") from None
    return cuda.deviceSynchronize, lambda: cuda.memGetInfo()[0]


# ---------------------------------------------------------------------------------------------- environment


def environment(settings):
    """Which machine, which versions: numbers mean nothing without them."""
    yield "host", {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
    queries = "name,driver_version,compute_cap,memory.total,power.limit,clocks.max.sm"
    commands = {"nvidia_smi": ["nvidia-smi", f"--query-gpu={queries}", "--format=csv"]}
    for name, arguments in {"commit": ["rev-parse", "HEAD"], "changed": ["status", "--porcelain", "-uno"]}.items():
        commands[name] = ["git", "-C", str(ROOT), *arguments]
    for name, command in commands.items():
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            yield name, ran.stdout.strip().splitlines()
        except (OSError, subprocess.SubprocessError) as error:
            yield name, failure(error)
    for name in ("numpy", "onnx", "hypothesis", "refspan", "torch", "triton", "cupy", "onnxruntime"):
        try:
            yield name, {"version": library(name, settings.device).__version__}
        except Exception as error:  # noqa: BLE001
            yield name, failure(error)
    details = {
        "torch_cuda": lambda: {"cuda": (t := library("torch")).version.cuda, "cudnn": t.backends.cudnn.version()},
        "cupy_cuda": lambda: {"cuda": library("cupy").cuda.runtime.runtimeGetVersion()},
        "onnxruntime_providers": lambda: library("onnxruntime", settings.device).get_available_providers(),
    }
    for name, ask in details.items():
        try:
            yield name, ask()
        except Exception as error:  # noqa: BLE001
            yield name, failure(error)


# ---------------------------------------------------------------------------------------------- conformance


def onnxruntime_with_fallback(device, form):
    """Our backend with nodes allowed on the CPU: how right the rest is when the strict one does not start."""
    from refspan.export import AttentionRunner

    runner = AttentionRunner(device=device, form=form, session_options={"session.disable_cpu_ep_fallback": "0"})
    names = ("soft_mask", "span_attention", "span_attention_backward")
    return SimpleNamespace(name="onnxruntime", **{name: getattr(runner, name) for name in names})


def conformance(settings):
    """Every check of every level on each backend that runs on the device, and where the nodes of our graphs land."""
    from refspan.conformance import load_backend

    for graph in ("fused", "portable", "gradient"):
        for dtype in ("float32", "float16"):
            try:
                yield f"placement {graph} {dtype}", placement(graph, dtype, settings.device)
            except Exception as error:  # noqa: BLE001
                yield f"placement {graph} {dtype}", failure(error)
    runs = [("onnxruntime", form, dtype) for dtype in ("float32", "float16") for form in ("fused", "portable")]
    reference = "numpy" if settings.device == "cpu" else "cupy"
    runs = [(reference, None, "float32"), *runs, (reference, None, "float64")]
    for i, (backend, form, dtype) in enumerate(runs):
        turn = replace(settings, deadline=time.time() + settings.left() / (len(runs) - i))  # a slow one starves none
        key = " ".join(filter(None, ["checks", backend, form, dtype]))
        options = {"device": settings.device, "form": form} if form else {}
        try:
            yield from checks(key, partial(load_backend, backend, **options), dtype, turn)
        except SetupError as error:
            yield key, failure(error)
            if form and settings.device == "cuda" and "refused the graph" in str(error):
                load = partial(onnxruntime_with_fallback, settings.device, form)
                yield from checks(f"{key}, CPU fallback allowed", load, dtype, turn)


def checks(key, load, dtype, settings):
    """One backend at one dtype; the record grows with each check, so that the end of time costs only the rest."""
    from refspan.conformance.report import Report
    from refspan.conformance.runner import facts_of_run, run, select
    from refspan.conformance.sessions import Worker

    if settings.left() < 10:
        yield key, {"status": "out of time"}
        return
    session = Worker(load, timeout=60)  # kernels are compiled, and libraries loaded, by the first call
    report = Report(facts_of_run(session, dtype=dtype, seed=0, examples=settings.examples))
    try:
        for _ in run(session, select(), report, dtype=dtype, examples=settings.examples):
            status = "done" if report.complete else "running"
            yield key, {"status": status, **json.loads(report.to_json())}
            if settings.left() < 5:
                break
        yield key, {"status": "done" if report.complete else "out of time", **json.loads(report.to_json())}
    except Exception as error:  # noqa: BLE001 - the checks before it have been made all the same
        yield key, {**json.loads(report.to_json()), **failure(error)}
    finally:
        session.close()


def model_of(graph, dtype, device):
    """The graph as `AttentionRunner` runs it on this device (on CUDA the fused one is at opset 23)."""
    from refspan.export import attention_model, gradient_model

    if graph == "gradient":
        return gradient_model(dtype)
    return attention_model(graph, dtype, opset=23 if device == "cuda" and graph == "fused" else None)


def placement(graph, dtype, device):
    """Nodes per provider, those elsewhere than on the device, and copies between host and device."""
    import onnx

    from refspan.export.session import PROVIDERS, placement_of

    ort, wanted = library("onnxruntime", device), PROVIDERS[device]
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        model = model_of(graph, dtype, device).SerializeToString()
        session = ort.InferenceSession(model, options, providers=[wanted], enable_fallback=0)
        operators = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    placed = placement_of(session)
    return {
        "nodes": Counter(placed.values()),
        "elsewhere": sorted(node for node, provider in placed.items() if provider != wanted),
        "memcpy": sum(count for name, count in operators.items() if name.startswith("Memcpy")),
        "operators": operators,
    }


# ---------------------------------------------------------------------------------------------- contenders


def arguments_of(case):
    """Query, key, value and upstream gradient as NumPy arrays."""
    rng = np.random.default_rng(0)
    shapes = [case.queries, case.memories, case.memories, case.queries]
    names = ["query", "key", "value", "grad_output"]
    return {
        name: rng.standard_normal((case.batch, case.heads, n, case.head_size), dtype=np.float32).astype(case.dtype)
        for name, n in zip(names, shapes, strict=True)
    }


def memories_of(case, alive):
    """Spans and ages: a share of memories is alive, one in twenty of these fading during the block."""
    rng = np.random.default_rng(1)
    age = np.tile(np.arange(case.memories, 0, -1, dtype=np.int64) + int(RAMP), (case.batch, 1))
    span = np.full(age.shape, 1e6, np.float32)
    dead = rng.permuted(np.tile(np.arange(case.memories), (case.batch, 1)), axis=1) >= alive * case.memories
    fading = (rng.random(age.shape) < 0.05) & ~dead
    span[fading] = age[fading] + case.queries / 2 - 0.5
    span[dead] = 0
    return {"span": span, "age": age}, int((~dead).sum())


def log_mask(span, age, queries, dtype):
    """The soft mask in float32 as an additive bias [B, 1, M, N]; the inner where keeps gradients finite at m = 0."""
    import torch

    distance = age[:, None, :] + torch.arange(queries, device=age.device)[:, None]
    mask = (1 + (span[:, None, :] - distance) / RAMP).clamp(0, 1)
    live = (mask > 0) & (distance >= 1)
    return torch.where(live, mask, 1).log().masked_fill(~live, -math.inf).to(dtype)[:, None]


def torch_eager(query, key, value, span, age):
    """The dense formula, as most people would write it."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return (scores + log_mask(span, age, query.shape[2], query.dtype)).softmax(-1) @ value


def torch_sdpa(query, key, value, span, age):
    """PyTorch's own attention with a float bias shared by heads."""
    from torch.nn.functional import scaled_dot_product_attention

    bias = log_mask(span, age, query.shape[2], query.dtype)
    return scaled_dot_product_attention(query, key, value, bias.expand(-1, query.shape[1], -1, -1))


def live_blocks(span, age, queries, size=128):
    """A block mask of the tiles in which any query sees any memory; made anew for each step, as spans are."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.arange(0, queries, size, device=age.device)[:, None]
    seen = (span[:, None] - age[:, None] - first > -RAMP) & (age[:, None] + first + size > 1)  # [B, M/size, N]
    live = seen.unflatten(-1, (-1, size)).any(-1)
    order = live.int().argsort(dim=-1, descending=True, stable=True).int()
    count = live.sum(-1, dtype=torch.int32)
    shape = (queries, age.shape[1])
    return BlockMask.from_kv_blocks(count[:, None], order[:, None], BLOCK_SIZE=size, seq_lengths=shape)


def torch_flex(query, key, value, span, age, blocks):
    """FlexAttention: the soft mask as score_mod, without any array of M times N."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    def fade(score, b, h, m, n):  # noqa: ARG001
        distance = age[b, n] + m
        mask = (1 + (span[b, n] - distance) / RAMP).clamp(0, 1)
        return torch.where((mask > 0) & (distance >= 1), score + mask.log(), -math.inf)

    return flex_attention(query, key, value, score_mod=fade, block_mask=blocks)


def gathered(query, key, value, span, age):
    """The same step with only the memories that some query sees, filled up to a multiple of 64, on the device."""
    import torch

    queries = query.shape[2]
    visible = (span - age > -RAMP) & (age + queries > 1)
    size = min(-(-int(visible.sum(1).max()) // 64) * 64, age.shape[1])
    order = visible.int().argsort(dim=1, descending=True, stable=True)[:, :size]
    wide = order[:, None, :, None]
    age = age.gather(1, order).where(visible.gather(1, order), -queries)  # a filler comes after every query
    return query, torch.take_along_dim(key, wide, 2), torch.take_along_dim(value, wide, 2), span.gather(1, order), age


def torch_contender(name, case, data, device):
    """A call that runs the step on the device, what turns its result into NumPy arrays, and a function for notes."""
    torch = library("torch", device)
    tensors = {key: torch.from_numpy(x).to(device) for key, x in data.items()}
    grad_output = tensors.pop("grad_output")
    arguments = list(tensors.values())
    step = {"eager": torch_eager, "compile": torch_eager, "sdpa": torch_sdpa}.get(name.split("_")[1], torch_flex)
    if name.split("_")[1] in ("compile", "flex"):
        torch._dynamo.config.recompile_limit = 64  # each shape is a new program; the default of 8 would give up
        step = torch.compile(step, dynamic=False, fullgraph=True)
    if case.backward:
        for x in arguments[:4]:
            x.requires_grad_()
        call = lambda: torch.autograd.grad(step(*arguments), arguments[:4], grad_output)  # noqa: E731
    elif name.endswith("_gathered"):
        call = lambda: step(*gathered(*arguments))  # noqa: E731
    elif name == "torch_flex":
        call = lambda: step(*arguments, live_blocks(*arguments[3:], case.queries))  # noqa: E731
    elif name == "torch_flex_blocks_reused":
        call = partial(step, *arguments, live_blocks(*arguments[3:], case.queries))
    else:
        call = partial(step, *arguments)
    return call, lambda out: [x.cpu().numpy() for x in (out if case.backward else [out])], dict


def onnxruntime_contender(name, case, data, device):
    """Our graph with inputs and outputs that stay on the device; outside of the timed calls nothing is copied."""
    from refspan.export.session import captured_log, kernels_in, make_session

    ort = library("onnxruntime", device)
    graph = "gradient" if case.backward else name.split("_")[1]
    model = model_of(graph, case.dtype, device)
    notes = {}
    try:
        session = make_session(model, device=device, threads=None, options={})
    except SetupError as error:  # timed all the same, and marked
        notes["cpu_fallback"] = line(error)
        session = make_session(model, device=device, threads=None, options={"session.disable_cpu_ep_fallback": "0"})
    bound = session.io_binding()
    feed = {**data, "ramp": np.asarray(RAMP, np.float32)}
    values = {x.name: ort.OrtValue.ortvalue_from_numpy(feed[x.name], device, 0) for x in session.get_inputs()}
    for key, value in values.items():
        bound.bind_ortvalue_input(key, value)
    outputs = []
    for x in session.get_outputs():
        like = data[x.name.removeprefix("grad_")] if case.backward else data["query"]
        outputs.append(ort.OrtValue.ortvalue_from_shape_and_type(like.shape, like.dtype, device, 0))
        bound.bind_ortvalue_output(x.name, outputs[-1])
    options = ort.RunOptions()
    if device == "cuda":  # we wait ourselves, once per repetition, as for the others
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    call = partial(session.run_with_iobinding, bound, options)
    if name.endswith("_gathered"):
        torch = library("torch", device)
        tensors = [torch.from_numpy(data[key]).to(device) for key in ("query", "key", "value", "span", "age")]
        names = ("key", "value", "span", "age")

        def call():
            picked = gathered(*tensors)[1:]
            for key, x in zip(names, picked, strict=True):
                kind = str(x.dtype).removeprefix("torch.")
                bound.bind_input(key, device, 0, np.dtype(kind), tuple(x.shape), x.data_ptr())
            runtime(device)[0]()  # ONNX Runtime works on a stream of its own
            session.run_with_iobinding(bound, options)
            runtime(device)[0]()  # before torch may give `picked` to others

    def about():
        if graph != "fused" or device != "cuda":
            return notes
        with captured_log(ort, severity=0) as messages:
            call()
        return {**notes, "kernel": kernels_in(messages) or [m for m in messages if "ttention: using" in m][:3]}

    return call, lambda _: [x.numpy() for x in outputs], about


def reference_contender(name, case, data, device):  # noqa: ARG001
    """The reference on the device: CuPy, or NumPy on the CPU."""
    xp = np if device == "cpu" else library("cupy")
    x = {key: xp.asarray(value) for key, value in data.items()}

    def call():
        out, saved = refspan.span_attention(*(x[n] for n in ("query", "key", "value", "span", "age")), ramp=RAMP)
        return refspan.span_attention_backward(x["grad_output"], saved)[:4] if case.backward else (out,)

    return call, lambda out: [part if device == "cpu" else xp.asnumpy(part) for part in out], dict


FORWARD = [
    "torch_eager", "reference", "onnxruntime_fused", "onnxruntime_fused_gathered", "onnxruntime_portable",
    "torch_sdpa", "torch_sdpa_gathered", "torch_compile", "torch_flex", "torch_flex_blocks_reused",
]  # fmt: skip
BACKWARD = ["torch_eager", "reference", "onnxruntime_gradient", "torch_compile"]
BYTES_PER_SCORE = {"torch_eager": 8, "torch_compile": 6, "onnxruntime_portable": 16, "onnxruntime_gradient": 28}
"""Rough need for each query, memory and head of a contender that keeps all scores; 0 for those that need not."""


def contender(name, case, data, settings):
    """As `torch_contender`, for any name; raises if it is not there or does not fit."""
    need = BYTES_PER_SCORE.get(name, 0) * (2 if case.backward else 1)
    need = case.batch * case.queries * case.memories * (need * case.heads + 20) + 3 * data["key"].nbytes
    if need > runtime(settings.device)[1]():
        raise MemoryError(f"needs about {need / 2**30:.1f} GiB, {runtime(settings.device)[1]() / 2**30:.1f} are free")
    if name in FORWARD[-3:] and settings.left() < (5 if settings.small else 40):
        raise TimeoutError("no time left to compile")
    make = {"torch": torch_contender, "onnxruntime": onnxruntime_contender}.get(name.split("_")[0], reference_contender)
    return make(name, case, data, settings.device)


# ---------------------------------------------------------------------------------------------- speed, memory


def release(device):
    """Hand back what the allocators of torch and CuPy keep for later."""
    gc.collect()
    if device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    if device == "cuda" and "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def expected_of(case, data):
    """The float64 reference: all gradients, or the outputs of the first and last head of the first and last row."""
    x = {name: a if name == "age" else a.astype(np.float64) for name, a in data.items() if case.backward}
    pick = np.ix_([0, -1], [0, -1])
    for name, a in () if case.backward else data.items():
        x[name] = a[[0, -1]] if a.ndim == 2 else a[pick].astype(np.float64)
    out, saved = refspan.span_attention(*(x[n] for n in ("query", "key", "value", "span", "age")), ramp=RAMP)
    return list(refspan.span_attention_backward(x["grad_output"], saved)[:4]) if case.backward else [out]


def compare(got, expected, case):
    """Largest error, relative to the largest number expected, over all results."""
    got = got if case.backward else [got[0][np.ix_([0, -1], [0, -1])]]
    errors = [np.abs(g - e).max() / np.abs(e).max() for g, e in zip(got, expected, strict=True)]
    return {"max_relative_error": float(max(errors)), "correct": bool(max(errors) <= ERROR_LIMIT[case.dtype])}


def side_by_side(calls, settings):
    """Median time of each call in ms; contenders take turns, a repetition of a fast one is several calls in a row."""
    wait, rows = runtime(settings.device)[0], {}
    for name, call in calls.items():
        wait()
        start = time.perf_counter()
        call()
        wait()
        rows[name] = {"calls": max(1, min(50, int(2e-3 / (time.perf_counter() - start)))), "ms": []}
    for repetition in range(REPETITIONS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(rows[name]["calls"]):
                call()
            wait()
            rows[name]["ms"].append((time.perf_counter() - start) * 1e3 / rows[name]["calls"])
        if repetition >= 4 and settings.left() < 3:
            break
    return {
        name: {"ms": median(row["ms"]), "best_ms": min(row["ms"]), "repetitions": len(row["ms"]), "calls": row["calls"]}
        for name, row in rows.items()
    }


def peak(dtype, settings):
    """TFLOP/s of a big square matrix product: what the device gives in practice (TF32 off)."""
    torch = library("torch", settings.device)
    n = 256 if settings.small else 8192
    a = torch.ones((n, n), dtype=getattr(torch, dtype), device=settings.device)
    return 2e-9 * n**3 / side_by_side({"matmul": lambda: a @ a}, settings)["matmul"]["ms"]


def speed_cases(small):
    """In order of interest, since time may run out."""
    if small:
        few, many = (partial(Case, *shape, queries=128, head_size=16) for shape in [(1, 2), (2, 3)])
        pairs = [(few, "float16"), (many, "float32")]
        return [make(256, dtype, backward=backward) for make, dtype in pairs for backward in (False, True)]
    few, many = partial(Case, 1, 8), partial(Case, 16, 16)
    half = [few(4096, "float16"), many(4096, "float16"), few(4096, "float16", backward=True)]
    half += [make(n, "float16") for n in (16384, 1024) for make in (few, many)]
    return [*half, few(4096, "float32", backward=True), *(few(n, "float32") for n in (4096, 16384, 1024))]


def speed(settings):
    """Time of one attention step, forward alone and with its gradients, for every contender that is there."""
    runtime(settings.device)
    peaks = {}
    for dtype in ERROR_LIMIT:
        try:
            peaks[dtype] = peak(dtype, settings)
            yield f"matmul {dtype}", {"tflops": peaks[dtype]}
        except Exception as error:  # noqa: BLE001
            yield f"matmul {dtype}", failure(error)
    for case in speed_cases(settings.small):
        steps = arguments_of(case)
        for alive in (1.0, 0.1):
            what = "forward+backward" if case.backward else "forward"
            key = f"{what} {case.dtype} B={case.batch} H={case.heads} N={case.memories} alive={alive:.0%}"
            if settings.left() < 5:
                yield key, {"status": "out of time"}
                continue
            memories, live = memories_of(case, alive)
            yield from speed_of(key, case, {**steps, **memories}, live, peaks.get(case.dtype), settings)


def speed_of(key, case, data, live, practical_peak, settings):
    """One case: each contender is first compared with the reference, then all that run are timed in turns."""
    record = {"status": "running", "case": asdict(case), "live_memories": live, "contenders": {}}
    expected, calls = expected_of(case, data), {}
    for name in BACKWARD if case.backward else FORWARD:
        start = time.perf_counter()
        try:
            call, to_numpy, about = contender(name, case, data, settings)
            got = to_numpy(call())
            seconds = time.perf_counter() - start
            record["contenders"][name] = {"first_seconds": seconds, **compare(got, expected, case), **about()}
            calls[name] = call
        except Exception as error:  # noqa: BLE001 - any library may fail in its own way, the others go on
            record["contenders"][name] = failure(error)
        release(settings.device)
        yield key, record
    while calls:
        try:
            times = side_by_side(calls, settings)
            break
        except Exception as error:  # noqa: BLE001
            name = next(reversed(calls))  # the greediest are last; go on with one less
            record["contenders"][name] |= failure(error)
            del calls[name]
            release(settings.device)
    flops = (12 if case.backward else 4) * case.heads * case.queries * case.head_size * live
    for name in calls:
        row = times[name]
        row["useful_tflops"] = flops / row["ms"] / 1e9
        row["share_of_peak"] = row["useful_tflops"] / practical_peak if practical_peak else None
        row["time_to_torch_eager"] = row["ms"] / times["torch_eager"]["ms"] if "torch_eager" in times else None
        record["contenders"][name] |= row
    yield key, {**record, "status": "done"}


def memory(settings):
    """Device memory that one forward pass takes beside its arguments; allocators keep it, so it shows afterwards."""
    runtime(settings.device)
    size = {"queries": 128, "head_size": 16} if settings.small else {}
    case = Case(1, 8, 512 if settings.small else 16384, "float16", **size)
    data = {**arguments_of(case), **memories_of(case, 1.0)[0]}
    tiny = Case(1, 8, 128, "float16", **size)
    tiny_data = {**arguments_of(tiny), **memories_of(tiny, 1.0)[0]}
    yield "case", asdict(case)
    for name in FORWARD:
        try:
            call, *_ = contender(name, tiny, tiny_data, settings)
            call()  # libraries set up their handles and workspaces
            call, *_ = contender(name, case, data, settings)
            yield name, memory_of(call, settings.device, warm=not name.startswith("onnxruntime"))
        except Exception as error:  # noqa: BLE001
            yield name, failure(error)


def memory_of(call, device, *, warm):
    """Growth of what the process holds on the device over one call, and the peak of torch's own allocator in it."""
    if warm:  # compilers and tuners take more the first time; ONNX Runtime would keep its arena, so not there
        call()
    release(device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # restarts the record of the peak (Linux)
        before = process_memory("VmRSS")
        call()
        return {"growth_mib": (process_memory("VmHWM") - before) / 2**20}
    (wait, free_bytes), torch = runtime(device), sys.modules.get("torch")
    torch = torch if torch and torch.cuda.is_available() else None
    wait()
    free = free_bytes()
    if torch:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    out = call()
    wait()
    record = {"growth_mib": (free - free_bytes()) / 2**20}
    if torch:
        record["torch_peak_mib"] = (torch.cuda.max_memory_allocated() - allocated) / 2**20
    del out
    return record


def process_memory(field):
    """A field of Linux's process status, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---------------------------------------------------------------------------------------------- the run

PARTS = {"environment": (environment, 2), "conformance": (conformance, 7), "speed": (speed, 8), "memory": (memory, 3)}
"""Name -> function that yields (key, record), and its share of the time."""


def work(pipe, part, settings):
    """The process of one part: send what it yields, then how it ended."""
    os.setsid()  # so that it can be ended together with all that it started
    try:
        for key, record in PARTS[part][0](settings):
            pipe.send((key, record))
        pipe.send((None, {"status": "done"}))
    except Exception as error:  # noqa: BLE001
        pipe.send((None, {**failure(error), "traceback": traceback.format_exc().splitlines()[-12:]}))


def run_part(part, settings, tree, save):
    """Run one part and save after each of its records; it is ended some time after its deadline."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, part, settings))
    tree[part] = state = {"status": "interrupted", "results": {}}
    started = time.time()
    process.start()
    theirs.close()
    try:
        while pipe.poll(max(0, settings.left() + 10)):
            key, record = pipe.recv()
            if key is None:
                ends = {r.get("status") for r in state["results"].values() if isinstance(r, dict)}
                if record["status"] == "done" and ("out of time" in ends or ends == {"missing"}):
                    record["status"] = "missing" if ends == {"missing"} else "out of time"
                state.update(record)
                break
            state["results"][key] = record
            state["seconds"] = time.time() - started
            said = record if isinstance(record, dict) else {}
            said = [str(said[name]) for name in ("status", "summary", "reason") if name in said]
            print(" | ".join([f"{part}: {key}", *said])[:240], flush=True)
            save()
        else:
            state.update(status="out of time", reason=f"ended after {time.time() - started:.0f} s")
    except EOFError:
        process.join(5)
        state.update(status="failed", reason=f"its process ended with exit code {process.exitcode}")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        process.join()
        save()


def interrupt(*_):
    """Treat a polite request to end like Ctrl-C."""
    raise KeyboardInterrupt


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Tiny sizes and few examples, to try the script itself.")
@click.option("--only", "parts", type=click.Choice(list(PARTS)), multiple=True, help="Run only this part; repeatable.")
@click.option("--minutes", type=float, default=8.0, show_default=True, help="For the whole run.")
@click.option("--examples", type=int, help="Per conformance check; 20, or 3 with --small.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/gpu-DATE-DEVICE.json")
def main(device, small, parts, minutes, examples, out):
    """Check and time the attention step on a GPU, and write one JSON file."""
    signal.signal(signal.SIGTERM, interrupt)
    date, end = time.strftime("%Y-%m-%d-%H%M", time.gmtime()), time.time() + 60 * minutes
    tree = {}
    whole = {"refspan_gpu": 1, "date": date, "arguments": sys.argv[1:], "status": "interrupted", "parts": tree}

    def path():
        smi = tree.get("environment", {}).get("results", {}).get("nvidia_smi")
        name = smi[1].split(",")[0] if device == "cuda" and isinstance(smi, list) else platform.machine()
        return out or ROOT / "benchmarks" / "results" / f"gpu-{date}-{re.sub('[^A-Za-z0-9]+', '-', name)}.json"

    def save():
        text = json.dumps(json.loads(json.dumps(whole, default=str), parse_constant=str), indent=1)  # NaN: a string
        write_whole(path(), f"{text}\n".encode())

    try:
        check_writable(path())
    except SetupError as error:
        raise click.UsageError(str(error)) from None
    chosen = [part for part in PARTS if part in parts or not parts or part == "environment"]
    try:
        for i, part in enumerate(chosen):
            share = PARTS[part][1] / sum(PARTS[p][1] for p in chosen[i:])
            deadline = time.time() + max(0, end - time.time() - 10) * share
            settings = Settings(device, small, examples or (3 if small else 20), deadline)
            run_part(part, settings, tree, save if i or out else lambda: None)
        whole["status"] = "done" if all(tree[part]["status"] == "done" for part in chosen) else "incomplete"
    finally:
        save()
        print(f"{whole['status']}: {path()}")
    sys.exit(whole["status"] != "done")


if __name__ == "__main__":
    main()
