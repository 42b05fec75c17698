"""A model in an ONNX file, ready to run: the part of it that all streams share."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refspan.arrays import check_count
from refspan.config import ModelConfig
from refspan.errors import SetupError
from refspan.export.layout import Array, Layout
from refspan.export.model_file import ModelFile, model_file_of, read_model_file
from refspan.export.onnx_stream import OnnxStream
from refspan.export.session import GraphRefusedError, check_device, load_onnxruntime, make_session, placement_of
from refspan.export.slots import repack_model

if TYPE_CHECKING:
    import onnx


class OnnxModel:
    """A model that `refspan export model` wrote, on ONNX Runtime.

    Nothing is global: any number of models may be open. A model may be shared by threads, each with streams of its own;
    a stream is for one thread at a time. ONNX Runtime lets go of Python's lock while it runs.

    Args:
        path: of the file. Weights beside it, if it has any, are read from its own folder only.
        device: "cpu" or "cuda". On CUDA no node runs on the CPU, and float32 products are not rounded to TF32 unless
            `tf32` says so.
        threads: of one run on the CPU; None for ONNX Runtime's default, the number of cores.
        tf32: on CUDA, round the factors of float32 products to 10 bits; faster and outside the conformance bounds.
        session_options: further session configuration entries of ONNX Runtime.

    Raises:
        SetupError: the file is not such a model, or ONNX Runtime or the device cannot be used.
        TypeError, ValueError: `threads` is not a whole number from 1 to 1024.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        tf32: bool = False,
        session_options: dict[str, str] | None = None,
    ) -> None:
        try:
            self._open(read_model_file(Path(path)), device, threads, tf32, session_options)
        except GraphRefusedError as error:
            raise SetupError(f"{path}: {error}") from None

    @classmethod
    def of(
        cls,
        model: "onnx.ModelProto",
        *,
        device: str = "cpu",
        threads: int | None = None,
        tf32: bool = False,
        session_options: dict[str, str] | None = None,
    ) -> "OnnxModel":
        """A model that `streaming_model` made, without a file; at most 2 GB."""
        made = cls.__new__(cls)
        made._open(model_file_of("model", model.SerializeToString()), device, threads, tf32, session_options)
        return made

    def _open(
        self, file: ModelFile, device: str, threads: int | None, tf32: bool, session_options: dict[str, str] | None
    ) -> None:
        self._file = file
        check_device(device)
        self.device = device
        self._threads, self._tf32, self._options = threads, tf32, dict(session_options or {})
        self._session: Any = self._make(self._file.source)

    @property
    def config(self) -> ModelConfig:
        """The model's shape and settings."""
        return self._file.layout.config

    @property
    def layout(self) -> Layout:
        """What the state of a stream consists of."""
        return self._file.layout

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself: refspan_version, clauses, form, dtype, tokenizer, .."""
        return dict(self._file.metadata)

    @property
    def fingerprint(self) -> Array:
        """Of the parameters, uint8 [32]; as `refspan.Stream.state` has it."""
        return np.frombuffer(bytes.fromhex(self._file.metadata["fingerprint"]), np.uint8)

    @property
    def session(self) -> Any:
        """ONNX Runtime's session; raises ValueError once the model is closed."""
        if self._session is None:
            raise ValueError("the model is closed")
        return self._session

    @cached_property
    def repack(self) -> Any:
        """The session that moves distant memories into another number of slots."""
        return self._make(repack_model(self.layout, int(self._file.metadata["opset"])).SerializeToString())

    def open(self, batch: int = 1, *, max_slots: int | None = None) -> OnnxStream:
        """Start `batch` streams of tokens, empty (START).

        Args:
            batch: B.
            max_slots: most slots that a layer may take for memories of more than P steps; a step that might need more
                is refused. Each takes `batch` times H * (E + E') numbers. None for no limit but BOUND.
        """
        batch = check_count("batch", batch)
        return OnnxStream(self, batch, None if max_slots is None else check_count("max_slots", max_slots))

    def placement(self) -> dict[str, str]:
        """Node ("name (operator)") -> execution provider, of the step and of the graph that changes slots."""
        return {**placement_of(self.session), **{f"repack/{n}": p for n, p in placement_of(self.repack).items()}}

    def close(self) -> None:
        """Let go of the session; open streams can no longer be used. Closing again does nothing."""
        self._session = None
        self.__dict__.pop("repack", None)

    def __enter__(self) -> "OnnxModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_device(self, x: Array) -> Any:
        """A copy of `x` where the model runs, as ONNX Runtime's OrtValue."""
        value = load_onnxruntime().OrtValue
        if self.device == "cpu":  # there, a value made from an array is that array
            return value.ortvalue_from_numpy(np.array(x, order="C"), "cpu", 0)
        return value.ortvalue_from_numpy(np.ascontiguousarray(x), self.device, 0)

    def like(self, x: Any) -> Any:
        """A new OrtValue of the shape and type of `x`."""
        return self.on_device(np.zeros(x.shape(), _NUMPY[x.element_type()]))

    def itemsize(self, x: Any) -> int:
        """Bytes of a number of an OrtValue."""
        return int(np.dtype(_NUMPY[x.element_type()]).itemsize)

    def _make(self, source: bytes | str) -> Any:
        return make_session(source, device=self.device, threads=self._threads, options=self._options, tf32=self._tf32)


_NUMPY: dict[int, Any] = {1: np.float32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}
"""ONNX element type -> NumPy's."""
