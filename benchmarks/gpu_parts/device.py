"""What every section is told, and what it needs to know of libraries and devices."""

import gc
import importlib
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from refspan.errors import SetupError


@dataclass(frozen=True)
class Settings:
    """What one part needs to know."""

    device: str
    small: bool
    examples: int
    deadline: float
    """When the part is to end."""
    budget: float = math.inf
    """Seconds of the whole run after which nothing new starts."""
    start_by: float = math.inf
    """When that is."""
    avoid: Mapping[str, str] = field(default_factory=dict)
    """Contenders that cost a process of this part its life -> how."""

    def left(self):
        """Seconds that the part may still take."""
        return self.deadline - time.time()

    def check_time(self):
        """Raise TimeoutError if nothing new may start."""
        if time.time() > self.start_by:
            raise TimeoutError(f"not started: the budget of {self.budget:g} s is over")
        if self.left() < 5:
            raise TimeoutError("not started: the time of this part is over")


def line(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:1500]}"


def failure(error):
    """An exception as a record."""
    kinds = {SetupError: "missing", MemoryError: "skipped", TimeoutError: "out of time"}
    return {"status": kinds.get(type(error), "failed"), "reason": line(error)}


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


def usable(device):
    """Whether this process can still use the device: after some errors CUDA refuses all that follows."""
    try:
        runtime(device)[0]()
    except SetupError:  # nobody here to ask
        return True
    except Exception:  # noqa: BLE001 - each library has errors of its own
        return False
    return True


def release(device):
    """Hand back what the allocators of torch and CuPy keep for later."""
    gc.collect()
    if device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    if device == "cuda" and "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
