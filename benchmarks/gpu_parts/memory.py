"""Device memory that one forward pass takes beside its arguments; allocators keep it, so it shows afterwards."""

import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .contenders import FORWARD, contender
from .device import release, runtime
from .steps import Case, arguments_of, memories_of


def sections(settings):  # noqa: ARG001
    """As `gpu_parts` says."""
    return {"case": case_in_words, **{name: partial(growth, name) for name in FORWARD}}


def cases(small):
    """The step to weigh, and a tiny one to start the library with."""
    size = {"queries": 128, "head_size": 16} if small else {}
    return Case(1, 8, 512 if small else 16384, "float16", **size), Case(1, 8, 128, "float16", **size)


def case_in_words(settings, results):  # noqa: ARG001
    """What is weighed."""
    runtime(settings.device)
    yield asdict(cases(settings.small)[0])


def growth(name, settings, results):  # noqa: ARG001
    """Memory of one contender."""
    runtime(settings.device)
    case, tiny = cases(settings.small)
    call, *_ = contender(name, tiny, {**arguments_of(tiny), **memories_of(tiny, 1.0)[0]}, settings)
    call()  # libraries set up their handles and workspaces
    call, *_ = contender(name, case, {**arguments_of(case), **memories_of(case, 1.0)[0]}, settings)
    yield memory_of(call, settings.device, warm=not name.startswith("onnxruntime"))


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
