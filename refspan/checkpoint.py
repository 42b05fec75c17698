"""Models and the states of streams as files: safetensors, the config in their metadata.

    model    one tensor per parameter;   metadata refspan_model "1",  config as JSON
    stream   `Stream.state()`;           metadata refspan_stream "1", config as JSON

The number is the version of the layout. Files of other programs, truncated ones, and ones that contradict their config
are refused with the name of the first wrong tensor.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from refspan.arrays import Array, device_of, namespace_of
from refspan.config import ModelConfig, check_parameters
from refspan.errors import SetupError
from refspan.files import check_file, write_whole
from refspan.fingerprint import to_numpy
from refspan.stream import Stream

if TYPE_CHECKING:
    import numpy as np

LAYOUT = "1"
"""Version of the layout of both kinds of file."""

_DTYPES = ("F16", "F32", "F64", "I64", "U8")
"""Those of parameters and states, by the names of the format; NumPy lacks some others."""


def save_model(
    path: str | Path, config: ModelConfig, params: Mapping[str, Array], *, notes: Mapping[str, str] | None = None
) -> None:
    """Write a model; a file that is there is replaced once the new one is whole.

    Args:
        path: of the file, by convention `.safetensors`.
        config: the model.
        params: its parameters by name; saved in the dtype that they have.
        notes: further metadata, for example how the model was trained.

    Raises:
        TypeError, ValueError: parameters that do not belong to the config.
        SetupError: the file cannot be written; what was there is untouched.
    """
    check_parameters(config, params)
    _write(path, params, {**(notes or {}), "refspan_model": LAYOUT, "config": _json(config)})


def load_model(path: str | Path) -> "tuple[ModelConfig, dict[str, np.ndarray[Any, Any]]]":
    """The config and the parameters (NumPy) of a file that `save_model` wrote.

    Raises:
        SetupError: the file cannot be read, is no such file, or contradicts itself; the message names the tensor.
    """
    metadata, arrays = _read(path, "refspan_model", "a model, as refspan import and refspan.save_model write")
    config = _config_of(path, metadata)
    if config.layers > len(arrays):  # or a wrong number would be believed for very long
        first = next(name for i in range(config.layers) if (name := f"layers.{i}.attention.query.weight") not in arrays)
        raise SetupError(f"{path}: parameter {first}: missing, but its config has {config.layers} layers")
    try:
        check_parameters(config, arrays)
    except (TypeError, ValueError) as error:
        raise SetupError(f"{path}: {error}") from None
    return config, arrays


def load_notes(path: str | Path) -> dict[str, str]:
    """The notes of a file that `save_model` wrote.

    Raises:
        SetupError: as `load_model`.
    """
    metadata, _ = _read(path, "refspan_model", "a model, as refspan import and refspan.save_model write", tensors=False)
    return {name: text for name, text in metadata.items() if name not in ("refspan_model", "config")}


def save_state(path: str | Path, stream: Stream) -> None:
    """Write what a stream remembers; a file that is there is replaced once the new one is whole.

    Raises:
        SetupError: the file cannot be written; what was there is untouched.
    """
    write_state(path, stream.config, stream.state())


def load_state(path: str | Path, stream: Stream) -> None:
    """Let `stream` go on from a file that `save_state` wrote, for the same model and batch size.

    Raises:
        SetupError: the file cannot be read, is no such file, or belongs to another model or batch size. The stream
            goes on as it was.
    """
    arrays = read_state(path, stream.config)
    like = stream.params["embedding.weight"]
    xp = namespace_of(like=like)
    try:
        stream.restore({name: xp.asarray(array, device=device_of(like)) for name, array in arrays.items()})
    except (TypeError, ValueError) as error:
        raise SetupError(f"{path}: {error}") from None


def write_state(
    path: str | Path, config: ModelConfig, state: Mapping[str, Array], notes: Mapping[str, str] | None = None
) -> None:
    """Write the state of a stream, whatever runs it, with further metadata; see `save_state`."""
    _write(path, state, {**(notes or {}), "refspan_stream": LAYOUT, "config": _json(config)})


def load_state_notes(path: str | Path) -> dict[str, str]:
    """The further metadata of a file that `write_state` wrote; raises SetupError as `load_state`."""
    metadata, _ = _read(path, "refspan_stream", "the state of a stream, as refspan.save_state writes", tensors=False)
    return {name: text for name, text in metadata.items() if name not in ("refspan_stream", "config")}


def read_state(path: str | Path, config: ModelConfig) -> "dict[str, np.ndarray[Any, Any]]":
    """The arrays of a file that `write_state` wrote for a model of this config; see `load_state`."""
    metadata, arrays = _read(path, "refspan_stream", "the state of a stream, as refspan.save_state writes")
    theirs = _config_of(path, metadata)
    if theirs != config:
        ours = config.to_dict()
        name, got = next((name, got) for name, got in theirs.to_dict().items() if got != ours[name])
        raise SetupError(f"{path}: the state of another model, whose {name} is {got}; expected {ours[name]}")
    return arrays


def _write(path: str | Path, arrays: Mapping[str, Array], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    tensors = {name: to_numpy(array) for name, array in arrays.items()}

    def write(temporary: Path) -> None:
        # Not into memory first: where that ends, the library ends the process.
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise SetupError(f"{path}: cannot be written: {error}") from None

    write_whole(Path(path), write)


def _read(
    path: str | Path, kind: str, expected: str, *, tensors: bool = True
) -> "tuple[dict[str, str], dict[str, np.ndarray[Any, Any]]]":
    """Metadata and, unless they are not wanted, arrays of a file of this kind."""
    check_file(Path(path))
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if kind not in metadata:
                first = next(iter(file.keys()), None)
                holds = "holds no tensors" if first is None else f"begins with the tensor {first}"
                raise SetupError(f"{path}: not {expected} (its metadata has no {kind}; it {holds})")
            if metadata[kind] != LAYOUT:
                raise SetupError(f"{path}: layout {metadata[kind]}, this refspan reads {LAYOUT}; use a newer refspan")
            arrays = {}
            for name in file.keys() if tensors else ():
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise SetupError(f"{path}: {name}: got {dtype}, expected one of {', '.join(_DTYPES)}")
                arrays[name] = file.get_tensor(name)
            return metadata, arrays
    except SafetensorError as error:
        cut = _first_cut(path)
        why = f"it ends within or before {cut}" if cut else str(error)
        raise SetupError(f"{path}: no whole safetensors file: {why}") from None
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror or error}") from None


def _first_cut(path: str | Path) -> str | None:
    """The first tensor that a file ends too early for; None if it is not that which is wrong with it.

    A safetensors file is the size of its header (8 bytes), the header (JSON), and the tensors at the places it names.
    """
    try:
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            there = Path(path).stat().st_size - 8 - size
            header = json.loads(file.read(size)) if there >= 0 else {}
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        missing = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > there]
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return missing[0] if missing else None


def _config_of(path: str | Path, metadata: Mapping[str, str]) -> ModelConfig:
    if "config" not in metadata:
        raise SetupError(f"{path}: its metadata has no config")
    try:
        settings = json.loads(metadata["config"])
        if not isinstance(settings, dict):
            raise TypeError(f"got {settings!r}, expected settings by name")
        return ModelConfig.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise SetupError(f"{path}: model config: {str(error).removeprefix('model config: ')}") from None


def _json(config: ModelConfig) -> str:
    return json.dumps(config.to_dict())
