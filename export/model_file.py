"""Files of streaming models: written whole, and read with nothing taken on trust.

A model that fits into 2 GB, as much as one message of protobuf holds, is one file. The weights of a larger one stand
beside it in `NAME.onnx.data`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refspan.config import ModelConfig
from refspan.errors import SetupError
from refspan.export.layout import LAYOUT, Layout
from refspan.export.models import DTYPES, FORMS
from refspan.export.streaming import SMALL_TENSOR
from refspan.files import check_file, write_whole
from refspan.fingerprint import FINGERPRINT_BYTES

if TYPE_CHECKING:
    import onnx

MOST_BYTES = 2**31 - 2**24
"""Weights up to which a model is one file: the limit of protobuf, less some room for the graph."""

_ALIGNMENT = 4096
"""Weights in a file of their own begin at multiples of this, so that they can be mapped into memory."""


@dataclass(frozen=True)
class ModelFile:
    """What a file says, checked."""

    source: bytes | str
    """What to load: the content, or the path if there are weights beside it."""
    layout: Layout
    metadata: dict[str, str]


def write_model_file(path: Path, model: "onnx.ModelProto", *, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Write a model, weights beside it if they are more than `most_bytes`. Returns the files written, the model last.

    The weights come first: should the model then not be written, an old model beside new weights is refused by their
    size or, where that is the same, by what it says of them. `model` is left without weights that went into a file.

    Raises:
        SetupError: a file cannot be written.
    """
    tensors = model.graph.initializer
    if sum(len(tensor.raw_data) for tensor in tensors) <= most_bytes:
        write_whole(path, model.SerializeToString())
        return [path]
    beside = path.with_name(f"{path.name}.data")
    parts, offset = [], 0
    large = [tensor for tensor in tensors if len(tensor.raw_data) > SMALL_TENSOR]
    for tensor in large:
        gap = -offset % _ALIGNMENT
        parts += [bytes(gap), tensor.raw_data]
        _move_out(tensor, beside.name, offset + gap)
        offset += gap + len(parts[-1])
    write_whole(beside, b"".join(parts))
    write_whole(path, model.SerializeToString())
    return [beside, path]


def _move_out(tensor: "onnx.TensorProto", location: str, offset: int) -> None:
    """Let a tensor say where its numbers are instead of holding them."""
    import onnx

    entries = {"location": location, "offset": str(offset), "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def read_model_file(path: Path) -> ModelFile:
    """Read and check a model that `refspan export model` wrote; weights beside it are looked at, not read.

    Raises:
        SetupError: it cannot be read, is no such file, is of another layout or contradicts itself, or asks for weights
            from elsewhere than a file in its own folder.
    """
    check_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror or error}") from None
    return model_file_of(path, content)


def model_file_of(path: str | Path, content: bytes) -> ModelFile:
    """As `read_model_file`, of what has been read of `path` already."""
    import onnx

    try:
        model = onnx.ModelProto.FromString(content)
    except Exception:  # noqa: BLE001 - protobuf has several implementations, with exceptions of their own
        raise SetupError(f"{path}: not an ONNX file, or only a part of one") from None
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if "refspan_model" not in metadata:
        made = f" (it was made by {model.producer_name})" if model.producer_name else ""
        raise SetupError(f"{path}: not a model that refspan export model wrote{made}")
    if metadata["refspan_model"] != LAYOUT:
        raise SetupError(
            f"{path}: layout {metadata['refspan_model']} of refspan {metadata.get('refspan_version', '?')}, "
            f"this refspan reads {LAYOUT}; export the checkpoint again"
        )
    layout = _layout(path, metadata)
    _check_ports(path, layout, model.graph)
    external = _check_external(path, model)
    return ModelFile(str(path) if external else content, layout, metadata)


def _layout(path: str | Path, metadata: dict[str, str]) -> Layout:
    try:
        config = ModelConfig.from_dict(json.loads(metadata["config"]))
        positions, opset = int(metadata["positions"]), int(metadata["opset"])
        form, dtype = metadata["form"], metadata["dtype"]
        size = len(bytes.fromhex(metadata["fingerprint"]))
    except KeyError as error:
        raise SetupError(f"{path}: its metadata has no {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise SetupError(f"{path}: its metadata is damaged: {error}") from None
    if form not in FORMS or dtype not in DTYPES or positions < 0 or opset < 1 or size != FINGERPRINT_BYTES:
        raise SetupError(f"{path}: its metadata is damaged: form {form}, dtype {dtype}, positions {positions}")
    return Layout(config, positions, form, dtype)


def _check_ports(path: str | Path, layout: Layout, graph: "onnx.GraphProto") -> None:
    """Raise unless inputs and outputs are those that the metadata promise."""
    layers = range(layout.config.layers)
    state = layout.state_tensors()
    wanted = {"tokens": "int64", "lengths": "int64", "restart": "bool"}
    wanted |= {f"layers.{i}.{name}": tensor.dtype for i in layers for name, tensor in state.items()}
    out = {"log_probs": layout.dtype, "live": "int64"}
    out |= {f"layers.{i}.{name}.next": tensor.dtype for i in layers for name, tensor in state.items()}
    for what, values, expected in (("input", graph.input, wanted), ("output", graph.output, out)):
        got = {value.name: _dtype(value) for value in values}
        for name in [*expected, *got]:
            there, promised = got.get(name, "none"), expected.get(name, "none")
            if there != promised:
                raise SetupError(f"{path}: {what} {name}: got {there}, its metadata promise {promised}")


def _dtype(value: "onnx.ValueInfoProto") -> str:
    import onnx.helper

    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    except (KeyError, ValueError):
        return "no tensor"


def _check_external(path: str | Path, model: "onnx.ModelProto") -> bool:
    """Whether there are weights beside the model; raise unless all are whole and in its own folder."""
    import onnx

    found = False
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        found = True
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        beside = Path(path).parent / location
        if not location or Path(location).name != location or "\\" in location or location == "..":
            raise SetupError(
                f"{path}: {tensor.name}: weights at {location!r}, expected a file in the model's own folder"
            )
        if beside.is_symlink() or not beside.is_file():
            raise SetupError(
                f"{path}: {tensor.name}: its weights are missing: no regular file {location} beside the model"
            )
        try:
            start, length = int(entries.get("offset", "0")), int(entries["length"])
            if min(start, length) < 0:
                raise ValueError
        except (KeyError, ValueError):
            raise SetupError(f"{path}: {tensor.name}: does not say where in {location} its weights are") from None
        if start + length > beside.stat().st_size:
            raise SetupError(f"{path}: {tensor.name}: {location} ends before its weights do; copy it again")
    return found


def _tensors(model: "onnx.ModelProto") -> "Iterable[onnx.TensorProto]":
    """All tensors of a model, those in nodes and in graphs of nodes too."""
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        body = graphs.pop()
        yield from getattr(body, "initializer", ())
        for sparse in getattr(body, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in body.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs += attribute.graphs
