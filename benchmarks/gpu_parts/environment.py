"""Which machine, which versions: numbers mean nothing without them."""

import os
import platform
import subprocess
from functools import partial
from pathlib import Path

from refspan.errors import SetupError

from .device import library, line

ROOT = Path(__file__).resolve().parents[2]
GPU_FACTS = "name,driver_version,compute_cap,memory.total,power.limit,clocks.max.sm"
COMMANDS = {
    "nvidia_smi": ["nvidia-smi", f"--query-gpu={GPU_FACTS}", "--format=csv"],
    "commit": ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
    "changed": ["git", "-C", str(ROOT), "status", "--porcelain", "-uno"],
}
PACKAGES = ["numpy", "onnx", "hypothesis", "refspan", "torch", "triton", "cupy", "onnxruntime"]


def sections(settings):
    """As `gpu_parts` says."""
    facts = {"host": host}
    facts |= {name: partial(output_of, command) for name, command in COMMANDS.items()}
    facts |= {name: partial(version_of, name, settings.device) for name in PACKAGES}
    facts |= {
        "torch_cuda": torch_cuda,
        "cupy_cuda": lambda: {"cuda": library("cupy").cuda.runtime.runtimeGetVersion()},
        "onnxruntime_providers": lambda: library("onnxruntime", settings.device).get_available_providers(),
    }
    return {name: partial(one_fact, ask) for name, ask in facts.items()}


def one_fact(ask, settings, results):  # noqa: ARG001
    """A section of one record."""
    yield ask()


def host():
    """The machine apart from its GPU."""
    return {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}


def output_of(command):
    """The lines that a command prints; raises SetupError if it cannot be run or fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(line(error)) from None
    return ran.stdout.strip().splitlines()


def version_of(name, device):
    """The version of an optional package that sees the device."""
    return {"version": library(name, device).__version__}


def torch_cuda():
    """What torch was built with."""
    torch = library("torch")
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def device_name(device):
    """What the device is called, for the name of a file."""
    if device == "cuda":
        try:
            return output_of(COMMANDS["nvidia_smi"])[1].split(",")[0]
        except (SetupError, IndexError):
            pass
    return platform.machine()
