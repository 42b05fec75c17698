"""Model files of the signature that `refspan export attention|gradient` writes, on ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refspan.conformance.backends.graphs import GraphBackend, Run
from refspan.conformance.guard import NotOffered
from refspan.conformance.protocol import Array
from refspan.errors import SetupError

STEP = {"query", "key", "value", "span", "age", "ramp"}
SIGNATURES = {
    "soft_mask": ({"span", "age", "queries", "ramp"}, ["mask"]),
    "span_attention": (STEP, ["output"]),
    "span_attention_backward": (STEP | {"grad_output"}, ["grad_query", "grad_key", "grad_value", "grad_span"]),
}
"""Operation -> inputs, outputs in order. With the input `position`, gradients have `grad_position` too."""
DTYPES = {"tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64"}


class OnnxFileBackend(GraphBackend):
    """What some model files offer; what none of them takes is not offered.

    Args:
        paths: of the files; with commas between several (one with positions and one without, say).
        device: "cpu" or "cuda".

    Raises:
        SetupError: a file cannot be loaded, or has another signature; or ONNX Runtime or the device cannot be used.
    """

    name = "onnx"

    def __init__(self, paths: str, device: str = "cpu") -> None:
        from refspan.export.session import check_device

        check_device(device)
        self._device = device
        self._paths = [Path(path) for path in paths.split(",")]
        self._graphs: dict[tuple[str, str, str, bool], Run] = {}
        for path in self._paths:
            self._add(path)
        offered = {operation for operation, *_ in self._graphs}
        for operation in SIGNATURES:
            if operation not in offered:
                setattr(self, operation, None)
        self.dtypes = tuple(sorted({dtype for operation, dtype, *_ in self._graphs if operation != "soft_mask"}))

    def graph(self, operation: str, dtype: str, span_dtype: str, position: bool) -> Run:
        """As `GraphBackend.graph`."""
        try:
            return self._graphs[operation, dtype, span_dtype, position]
        except KeyError:
            raise NotOffered(operation) from None

    def facts(self) -> dict[str, str]:
        """Files, version, device."""
        from refspan.export.session import load_onnxruntime

        files = ", ".join(map(str, self._paths))
        return {"files": files, "onnxruntime": load_onnxruntime().__version__, "device": self._device}

    def _add(self, path: Path) -> None:
        from refspan.export.session import make_session

        if not path.is_file():
            raise SetupError(f"onnx:{path}: no such file")
        session: Any = make_session(str(path), device=self._device, threads=None, options={})
        inputs = {x.name: x.type for x in session.get_inputs()}
        outputs = [x.name for x in session.get_outputs()]
        position = "position" in inputs
        for operation, (names, results) in SIGNATURES.items():
            more = ["grad_position"] if position and operation == "span_attention_backward" else []
            if set(inputs) - {"position"} == names and outputs == results + more:
                key = (
                    operation,
                    _dtype(path, inputs, "query" if "query" in inputs else "span"),
                    _dtype(path, inputs, "span"),
                )
                self._graphs[*key, position] = _runner(session)
                return
        raise SetupError(
            f"onnx:{path}: has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}; expected those of "
            "`refspan export attention` or `refspan export gradient`"
        )


def _dtype(path: Path, inputs: Mapping[str, str], name: str) -> str:
    if inputs[name] not in DTYPES:
        raise SetupError(f"onnx:{path}: {name} is {inputs[name]}, expected one of {', '.join(DTYPES)}")
    return DTYPES[inputs[name]]


def _runner(session: Any) -> Run:
    def run(feed: Mapping[str, Array]) -> Sequence[Array]:
        results: Sequence[Array] = session.run(None, dict(feed))
        return results

    return run
