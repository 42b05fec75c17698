"""ONNX Runtime sessions: one place that knows how to make one, on which device, and what it says about itself."""

import ctypes
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

from refspan.arrays import check_count
from refspan.errors import SetupError

if TYPE_CHECKING:
    import onnx

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class GraphRefusedError(SetupError):
    """ONNX Runtime does not take a graph, or not on this device."""


def load_onnxruntime() -> Any:
    """The onnxruntime package; raises SetupError naming what to install if it is missing."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        # An installed package that fails to load says why; a missing one says only that.
        reason = (
            "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({line_of(error)})"
        )
        raise SetupError(
            f'onnxruntime {reason}; install one of: pip install "refspan[cpu]", pip install "refspan[gpu]"'
        ) from None


def check_device(device: str) -> None:
    """Raise SetupError unless ONNX Runtime is there and can use `device`; the message says what is missing."""
    if device not in PROVIDERS:
        raise SetupError(f"device: got {device!r}, expected one of {', '.join(PROVIDERS)}")
    ort = load_onnxruntime()
    if PROVIDERS[device] not in ort.get_available_providers():
        raise SetupError(
            f"device {device}: this onnxruntime {ort.__version__} was built without {PROVIDERS[device]}; "
            'replace it: pip uninstall onnxruntime, then pip install "refspan[gpu]"'
        )
    if device == "cuda":
        _check_cuda(ort)


MOST_THREADS = 1024
"""That one run may have; far more would take hours to start, or all memory."""


def check_threads(threads: int) -> None:
    """Raise TypeError or ValueError unless so many threads may run a graph."""
    if check_count("threads", threads) > MOST_THREADS:
        raise ValueError(f"threads: got {threads}, expected 1 to {MOST_THREADS}")


def _check_cuda(ort: Any) -> None:
    """Start the CUDA provider on an empty task, because ONNX Runtime passes over one that does not start."""
    import onnx.parser

    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it prints what it does not find; whether that matters shows below
            ort.preload_dlls()  # finds CUDA and cuDNN in site-packages
    probe = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]> probe (float[N] x) => (float[N] y) { y = Identity (x) }"""
    )
    reason = ""
    with captured_log(ort, severity=3) as log:
        try:
            session = ort.InferenceSession(probe.SerializeToString(), providers=[PROVIDERS["cuda"]], enable_fallback=0)
            started = PROVIDERS["cuda"] in session.get_providers()
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen unrelated types
            started, reason = False, line_of(error)
    if not started:
        reason = reason or next((line for line in log if "rror" in line), "no reason given")
        raise SetupError(
            f"device cuda: onnxruntime {ort.__version__} cannot start {PROVIDERS['cuda']}; is there an NVIDIA GPU, its "
            f"driver, CUDA and cuDNN? ({reason})"
        )


def make_session(
    model: "onnx.ModelProto | bytes | str",
    *,
    device: str,
    threads: int | None,
    options: dict[str, str],
    tf32: bool = False,
) -> Any:
    """An InferenceSession in which every node runs on `device`; of a model, its bytes or the path of its file.

    Raises:
        GraphRefusedError: the device cannot be used, or not for all of the model.
    """
    ort = load_onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # nothing but the end of the process: errors are raised, and say the same
    settings.enable_mem_pattern = False  # it plans for one shape; ours differ from call to call
    if threads is not None:
        check_threads(threads)
        settings.intra_op_num_threads = threads
    entries = {"session.record_ep_graph_assignment_info": "1"}
    providers: list[Any] = [PROVIDERS[device]]
    if device == "cpu":
        # Threads that wait for work spin while a run lasts, and stop with it: NumPy needs the cores between two runs.
        entries["session.force_spinning_stop"] = "1"
    else:
        entries["session.disable_cpu_ep_fallback"] = "1"
        providers = [(PROVIDERS[device], {"use_tf32": str(int(tf32))})]
    for name, value in {**entries, **options}.items():
        settings.add_session_config_entry(name, value)
    source = model if isinstance(model, bytes | str) else model.SerializeToString()
    try:
        session = ort.InferenceSession(source, settings, providers=providers, enable_fallback=0)
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen unrelated types
        raise GraphRefusedError(
            f"device {device}: onnxruntime {ort.__version__} refused the graph: {line_of(error)}"
        ) from None
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


def device_memory_in_use() -> int | None:
    """Bytes of the first CUDA device that are in use, by all processes; None where the driver cannot be asked.

    ONNX Runtime gives no memory of a session back while it is open: asked then, this is the most that there has been.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        driver.cuCtxPushCurrent_v2(context)
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return None if failed else total.value - free.value


_LOG_LINE = re.compile(r"\[[VIWEF]:onnxruntime[^\]]*\] *(?P<message>.*?)(?:\x1b\[m)?$")


@contextmanager
def captured_log(ort: Any, *, severity: int) -> Iterator[list[str]]:
    """Messages that ONNX Runtime's default logger writes inside the `with` block; 0 is verbose, 3 errors only.

    They go to the process's stderr, below Python, so that is what is caught. Lines of others are written out again.
    """
    messages: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        ort.set_default_logger_severity(severity)
        try:
            yield messages
        finally:
            ort.set_default_logger_severity(2)  # its default: warnings
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if found := _LOG_LINE.search(line):
                    messages.append(found["message"])
                else:
                    os.write(2, f"{line}\n".encode())


def kernels_in(messages: list[str]) -> list[str]:
    """Names of the attention kernels that the CUDA provider says it uses, in these log messages."""
    found = (re.search(r"Attention: using (?P<kernel>.+?)(?: \(|$)", message) for message in messages)
    return sorted({match["kernel"] for match in found if match})


def line_of(error: BaseException) -> str:
    """The message of `error` on one line."""
    return " ".join(str(error).split())
