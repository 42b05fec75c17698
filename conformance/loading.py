"""Finding a backend by what was written on the command line."""

import importlib
import importlib.util
import inspect
import shlex
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refspan.conformance.protocol import OPERATIONS, TIMEOUT, Backend
from refspan.errors import SetupError

if TYPE_CHECKING:
    from refspan.conformance.sessions import Session

BUILT_IN = {
    "numpy": "refspan.conformance.backends.reference:NumpyBackend",
    "cupy": "refspan.conformance.backends.reference:CupyBackend",
    "onnxruntime": "refspan.conformance.backends.onnxruntime:OnnxRuntimeBackend",
    "onnx-reference": "refspan.conformance.backends.onnx_reference:OnnxReferenceBackend",
    "openvino": "refspan.conformance.backends.openvino:OpenVinoBackend",
}
"""Name -> where it is."""

ENTRY_POINTS = "refspan.backends"
EXEC = "exec:"
ONNX = "onnx:"


def load_backend(text: str, **options: Any) -> Backend:
    """The backend that `text` names.

    Args:
        text: `numpy`, `cupy`, `onnxruntime`, `onnx-reference`, `openvino`, a name registered under the entry-point
            group `refspan.backends`, `package.module:attribute`, `path/to/file.py:attribute`, `onnx:FILE` or
            `exec:COMMAND`, see docs/conformance.md. The attribute is a class, a factory or an instance.
        options: handed to the class or factory, None meaning that its own default holds (`device="cuda"`, ..).

    Raises:
        SetupError: there is no such backend, it cannot be imported, or it does not know one of the options.
    """
    if text.startswith(EXEC):
        return _command(text, options)
    found = _find(text)
    given = {name: value for name, value in options.items() if value is not None}
    if inspect.isclass(found) or inspect.isfunction(found):
        known = inspect.signature(found).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        unknown = [name for name in given if name not in known and not takes_any]
        if not unknown:
            found = _made(found, given, text)
    else:
        unknown = list(given)
    if unknown:
        raise SetupError(f"backend {text!r} has no option --{unknown[0]}; leave it out")
    if not any(getattr(found, operation, None) is not None for operation in OPERATIONS):
        raise SetupError(f"backend {text!r} offers no operation; expected one of {', '.join(OPERATIONS)}")
    return found  # type: ignore[no-any-return]


def files_of(text: str) -> list[Path]:
    """Files that a backend is made of, as far as its name says: the run would be lost with them."""
    if text.startswith(EXEC):
        with suppress(ValueError):  # a quotation without end, which is refused elsewhere
            return [Path(word) for word in shlex.split(text.removeprefix(EXEC))]
        return []
    if text.startswith(ONNX):
        return [Path(name) for name in text.removeprefix(ONNX).split(",")]
    module = text.rpartition(":")[0]
    return [Path(module if module.endswith(".py") else module.replace(".", "/") + ".py")]


def _command(text: str, options: dict[str, Any]) -> Backend:
    from refspan.conformance.external.backend import CommandBackend

    unknown = [name for name, value in options.items() if value is not None]
    if unknown:
        raise SetupError(f"backend {text!r} has no option --{unknown[0]}; make it part of the command")
    backend: Any = CommandBackend(text.removeprefix(EXEC), TIMEOUT)
    made: Backend = backend
    return made


def session_of(text: str, *, timeout: float, **options: Any) -> "Session":
    """The backend that `text` names in a process of its own, that is started anew when it hangs or dies.

    Raises:
        SetupError: as `load_backend`.
    """
    from refspan.conformance.external.backend import CommandSession
    from refspan.conformance.sessions import Worker

    if text.startswith(EXEC) and not any(value is not None for value in options.values()):
        return CommandSession(text.removeprefix(EXEC), timeout=timeout)
    return Worker(partial(load_backend, text, **options), timeout=timeout)


def _made(factory: Any, options: dict[str, Any], text: str) -> Any:
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise SetupError(f"backend {text!r} cannot be made without arguments: {error}") from None
    return factory(**options)


def _find(text: str) -> Any:
    if text.startswith(ONNX):
        from refspan.conformance.backends.onnx_file import OnnxFileBackend

        def open_files(device: str = "cpu") -> Any:
            return OnnxFileBackend(text.removeprefix(ONNX), device)

        return open_files
    if text in BUILT_IN:
        return _attribute(BUILT_IN[text], text)
    registered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if text in registered:
        try:
            return registered[text].load()
        except Exception as error:  # noqa: BLE001 - somebody else's module
            raise SetupError(f"backend {text!r} cannot be imported: {type(error).__name__}: {error}") from None
    if ":" not in text:
        names = ", ".join([*BUILT_IN, *sorted(registered)])
        raise SetupError(
            f"unknown backend {text!r}; expected one of {names}, package.module:attribute, path/to/file.py:attribute, "
            "onnx:FILE or exec:COMMAND"
        )
    return _attribute(text, text)


def _attribute(where: str, text: str) -> Any:
    module_name, _, path = where.rpartition(":")
    try:
        if module_name.endswith(".py"):
            found: Any = _module_from_file(Path(module_name))
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")  # the folder the user stands in, as `python -m` does
            found = importlib.import_module(module_name)
    except SetupError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's module
        summary = " ".join(str(error).split())
        raise SetupError(f"backend {text!r} cannot be imported: {type(error).__name__}: {summary}") from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise SetupError(f"backend {text!r}: {module_name} has no attribute {path!r}")
        found = getattr(found, name)
    return found


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise SetupError(f"backend file {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # noqa: S101
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
