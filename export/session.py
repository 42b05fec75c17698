"""ONNX Runtime sessions: one place that knows how to make one, on which device, and what it says about itself."""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from refspan.errors import SetupError

if TYPE_CHECKING:
    import onnx

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_onnxruntime() -> Any:
    """The onnxruntime package; raises SetupError naming what to install if it is missing."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        # An installed package that fails to load says why; a missing one says only that.
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({_line(error)})"
        raise SetupError(
            f'onnxruntime {reason}; install one of: pip install "refspan[cpu]", pip install "refspan[gpu]"'
        ) from None


def check_device(device: str) -> None:
    """Raise SetupError unless ONNX Runtime is there and was built for `device`."""
    if device not in PROVIDERS:
        raise SetupError(f"device: got {device!r}, expected one of {', '.join(PROVIDERS)}")
    ort = load_onnxruntime()
    if PROVIDERS[device] not in ort.get_available_providers():
        raise SetupError(
            f"device {device}: this onnxruntime {ort.__version__} was built without {PROVIDERS[device]}; "
            'replace it: pip uninstall onnxruntime, then pip install "refspan[gpu]"'
        )
    if device == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN in site-packages


def make_session(model: "onnx.ModelProto", *, device: str, threads: int | None, options: dict[str, str]) -> Any:
    """An InferenceSession of `model` in which every node runs on `device`.

    Raises:
        SetupError: the device cannot be used, or not for all of the model.
    """
    check_device(device)
    ort = load_onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors: what is wrong with a device is raised below
    settings.enable_mem_pattern = False  # it plans for one shape; ours differ from call to call
    if threads is not None:
        settings.intra_op_num_threads = threads
    entries = {"session.record_ep_graph_assignment_info": "1"}
    providers: list[Any] = [PROVIDERS[device]]
    if device == "cpu":
        # Waiting threads would otherwise spin, and take the cores from NumPy between two calls.
        entries["session.intra_op.allow_spinning"] = "0"
    else:
        entries["session.disable_cpu_ep_fallback"] = "1"
        providers = [(PROVIDERS[device], {"use_tf32": "0"})]
    for name, value in {**entries, **options}.items():
        settings.add_session_config_entry(name, value)
    try:
        session = ort.InferenceSession(model.SerializeToString(), settings, providers=providers)
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen unrelated types
        raise SetupError(f"device {device}: onnxruntime {ort.__version__} refused the graph: {_line(error)}") from None
    if PROVIDERS[device] not in session.get_providers():
        raise SetupError(
            f"device {device}: onnxruntime {ort.__version__} could not start {PROVIDERS[device]}; "
            "no usable GPU, or the NVIDIA driver, CUDA or cuDNN is missing or too old"
        )
    return session


def placement_of(session: Any) -> dict[str, str]:
    """Node ("name (operator)") -> execution provider, as the session itself tells. Empty if this version cannot."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    return {
        f"{node.name} ({node.op_type})": part.ep_name
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }


_KERNEL = re.compile(r"Attention: using (?P<kernel>.+?)(?: \(|$)", re.MULTILINE)


@contextmanager
def logged_kernels() -> Iterator[list[str]]:
    """Attention kernels that ONNX Runtime's CUDA provider chooses inside the `with` block, from its verbose log.

    The log goes to the process's stderr, below Python, so that is what is captured; it is written out afterwards.
    """
    ort = load_onnxruntime()
    kernels: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        ort.set_default_logger_severity(0)
        try:
            yield kernels
        finally:
            ort.set_default_logger_severity(2)
            os.dup2(kept, 2)
            os.close(kept)
            log.seek(0)
            kernels += _KERNEL.findall(log.read().decode(errors="replace"))


def _line(error: BaseException) -> str:
    """The message of `error` on one line."""
    return " ".join(str(error).split())
