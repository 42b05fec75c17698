"""ONNX Runtime sessions: one place that knows how to make one, on which device, and what it says about itself."""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
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
            started, reason = False, _line(error)
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
        SetupError: the device cannot be used, or not for all of the model.
    """
    ort = load_onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors: what is wrong with a device is raised below
    settings.enable_mem_pattern = False  # it plans for one shape; ours differ from call to call
    if threads is not None:
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
        raise SetupError(f"device {device}: onnxruntime {ort.__version__} refused the graph: {_line(error)}") from None
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


def _line(error: BaseException) -> str:
    """The message of `error` on one line."""
    return " ".join(str(error).split())
