"""Which kernels and copies a call runs on the device, and for how long: all libraries report to the same tracer."""

import re

from .device import failure, library, runtime

MOST = 12


def trace(call, device):
    """Kernels and copies of one call, those that take longest first, as PyTorch's profiler (CUPTI) sees them.

    Returns:
        `kernels`: name, calls and microseconds of the `MOST` that take longest; `copies`: calls by kind, such as
        "Memcpy HtoD"; `busy_us`: of all kernels together. Or a failure: no profiler, no measurement, no harm.
    """
    if device == "cpu":
        return {}
    try:
        torch = library("torch", device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            runtime(device)[0]()
        return {"trace": summary((event.key, event.count, event.device_time_total) for event in profile.key_averages())}
    except Exception as error:  # noqa: BLE001 - a tracer that another tool holds, a driver that forbids it, ..
        return {"trace": failure(error)}


def summary(events):
    """As `trace` returns it, of (name, calls, microseconds)."""
    kernels, copies = [], {}
    for name, calls, microseconds in events:
        if kind := re.match(r"Mem(?:cpy|set)(?: [HDA]to[HDA])?", name):
            copies[kind[0]] = copies.get(kind[0], 0) + calls
        elif microseconds:
            kernels.append({"name": name[:160], "calls": calls, "us": microseconds})
    kernels.sort(key=lambda kernel: -kernel["us"])
    return {"kernels": kernels[:MOST], "copies": copies, "busy_us": sum(kernel["us"] for kernel in kernels)}


def attention_us(traced):
    """Microseconds in kernels that are called like attention, by their names; None without a trace."""
    kernels = traced.get("trace", {}).get("kernels")
    if kernels is None:
        return None
    return sum(
        kernel["us"] for kernel in kernels if re.search(r"attention|fmha|flash|sdpa", kernel["name"], re.IGNORECASE)
    )
