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
from refspan.export.layout import LAYOUT, Layout, Port
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
    layout = _layout(path, metadata, model)
    _check_ports(path, layout, model.graph)
    external = _check_external(path, model)
    return ModelFile(str(path) if external else content, layout, metadata)


def _layout(path: str | Path, metadata: dict[str, str], model: "onnx.ModelProto") -> Layout:
    try:
        config = ModelConfig.from_dict(json.loads(metadata["config"]))
        positions, opset = int(metadata["positions"]), int(metadata["opset"])
        form, dtype = metadata["form"], metadata["dtype"]
        size = len(bytes.fromhex(metadata["fingerprint"]))
        _ = metadata["tokenizer"]
    except KeyError as error:
        raise SetupError(f"{path}: its metadata has no {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SetupError(f"{path}: its metadata is damaged: {error}") from None
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if [opset] != opsets:
        raise SetupError(f"{path}: its metadata is damaged: opset {opset}, the graph's is {opsets}")
    if size != FINGERPRINT_BYTES:
        raise SetupError(
            f"{path}: its metadata is damaged: a fingerprint of {size} bytes, expected {FINGERPRINT_BYTES}"
        )
    if form not in FORMS or dtype not in DTYPES or positions < 0:
        raise SetupError(f"{path}: its metadata is damaged: form {form}, dtype {dtype}, positions {positions}")
    return Layout(config, positions, form, dtype)


def _check_ports(path: str | Path, layout: Layout, graph: "onnx.GraphProto") -> None:
    """Raise unless inputs and outputs are those that the metadata promise."""
    most = len(graph.input)  # each layer has some: a wrong number would be believed for very long
    if layout.config.layers > most:
        raise SetupError(
            f"{path}: got {most} inputs, its metadata promise some for each of {layout.config.layers} layers"
        )
    wanted, out = layout.ports()
    for what, values, expected in (("input", graph.input, wanted), ("output", graph.output, out)):
        got = {value.name: value for value in values}
        for name in [*expected, *got]:
            there = _port(got[name]) if name in got else None
            promised = expected.get(name)
            if there is None or promised is None or not _fits(there, promised):
                raise SetupError(f"{path}: {what} {name}: got {_text(there)}, its metadata promise {_text(promised)}")


def _port(value: "onnx.ValueInfoProto") -> Port:
    """Dtype and shape of an input or output; "no tensor" if it is none."""
    import onnx.helper

    about = value.type.tensor_type
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(about.elem_type))
    except (KeyError, ValueError):
        return "no tensor", ()
    return dtype, tuple(int(d.dim_value) if d.HasField("dim_value") else d.dim_param for d in about.shape.dim)


def _fits(got: Port, promised: Port) -> bool:
    """Whether it is promised; a size that may be any has any name."""
    (dtype, sizes), (wanted, promised_sizes) = got, promised
    return dtype == wanted and [s if isinstance(s, int) else "" for s in sizes] == [
        s if isinstance(s, int) else "" for s in promised_sizes
    ]


def _text(port: Port | None) -> str:
    return "none" if port is None else f"{port[0]} [{', '.join(map(str, port[1]))}]"


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
