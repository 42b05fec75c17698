"""Every check of every level on each backend that runs on the device, and where the nodes of our graphs land."""

import json
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from .device import library
from .ours import GRAPHS, model_of

FALLBACK = ", CPU fallback allowed"


def sections(settings):
    """As `gpu_parts` says."""
    dtypes = ("float32", "float16")
    graphs = [(graph, dtype) for graph in GRAPHS for dtype in dtypes]
    parts = {f"placement {graph} {dtype}": partial(placement, graph, dtype) for graph, dtype in graphs}
    reference = "numpy" if settings.device == "cpu" else "cupy"
    runs = [("onnxruntime", form, dtype) for dtype in dtypes for form in ("fused", "portable")]
    runs = [(reference, None, "float32"), *runs, (reference, None, "float64")]
    for i, (backend, form, dtype) in enumerate(runs):
        key = " ".join(filter(None, ["checks", backend, form, dtype]))
        share = 1 / (len(runs) - i)  # of the time that is left: a slow one starves none
        parts[key] = partial(checks, backend, form, dtype, share)
        if form and settings.device == "cuda":
            parts[f"{key}{FALLBACK}"] = partial(checks_with_fallback, key, form, dtype, share)
    return parts


def placement(graph, dtype, settings, results):  # noqa: ARG001
    """Nodes per provider, those elsewhere than on the device, and copies between host and device."""
    import onnx

    from refspan.export.session import PROVIDERS, placement_of

    ort, wanted = library("onnxruntime", settings.device), PROVIDERS[settings.device]
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        model = model_of(graph, dtype, settings.device).SerializeToString()
        session = ort.InferenceSession(model, options, providers=[wanted], enable_fallback=0)
        operators = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    placed = placement_of(session)
    yield {
        "nodes": Counter(placed.values()),
        "elsewhere": sorted(node for node, provider in placed.items() if provider != wanted),
        "memcpy": sum(count for name, count in operators.items() if name.startswith("Memcpy")),
        "operators": operators,
    }


def checks(backend, form, dtype, share, settings, results):  # noqa: ARG001
    """One backend at one dtype."""
    from refspan.conformance import load_backend

    options = {"device": settings.device, "form": form} if form else {}
    words = ["--backend", backend, *(f"--{name} {value}" for name, value in options.items()), "--dtype", dtype]
    yield from run_checks(partial(load_backend, backend, **options), dtype, share, settings, " ".join(words))


def checks_with_fallback(strict, form, dtype, share, settings, results):
    """The same with nodes on the CPU, if ONNX Runtime refused in the section `strict`: how right is the rest?"""
    if "refused the graph" in results.get(strict, {}).get("reason", ""):
        load = partial(onnxruntime_with_fallback, settings.device, form)
        yield from run_checks(load, dtype, share, settings, None)


def onnxruntime_with_fallback(device, form):
    """Our backend with nodes allowed on the CPU."""
    from refspan.conformance.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(device, form, {"session.disable_cpu_ep_fallback": "0"})


def run_checks(load, dtype, share, settings, words):
    """The report so far after each check, so that the end of time costs only the rest.

    Args:
        load: makes the backend, in a process of its own.
        dtype: of query, key and value.
        share: of the time that the part has left.
        settings: of the part.
        words: what `refspan check` is told for the same backend; None if it cannot run it.
    """
    from refspan.conformance.report import Report
    from refspan.conformance.runner import facts_of_run, run, select
    from refspan.conformance.sessions import Worker

    turn = replace(settings, deadline=time.time() + settings.left() * share)
    turn.check_time()
    replay = "cannot be replayed by a command: {}"
    if words:
        replay = f"refspan check {words} --examples {settings.examples} --timeout 60 --check {{}}"
    selected = select()
    session = Worker(load, timeout=60)  # kernels are compiled, and libraries loaded, by the first call
    done = 0
    try:
        report = Report(facts_of_run(session.facts, dtype=dtype, seed=0, examples=settings.examples))
        for _ in run(session, selected, report, dtype=dtype, examples=settings.examples, replay=replay.format):
            done += 1
            yield {"status": "running", **json.loads(report.to_json())}
            turn.check_time()
    except TimeoutError as error:
        if done < len(selected):
            rest = [check.id for check in selected[done:]]
            reason = f"{len(rest)} checks {error}"
            yield {"status": "out of time", "reason": reason, "not_run": rest, **json.loads(report.to_json())}
            return
        report.complete = True
    finally:
        session.close()
    yield {"status": "done", **json.loads(report.to_json())}
