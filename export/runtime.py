"""The specification's operations on ONNX Runtime: NumPy arrays in and out, the graphs of this package in between."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from refspan.arrays import check_attention, check_count, check_dtype, check_ramp, check_shape, check_spans, namespace_of
from refspan.errors import SetupError
from refspan.export.models import FORMS, attention_model, gradient_model, mask_model
from refspan.export.session import captured_log, check_device, kernels_in, load_onnxruntime, make_session, placement_of
from refspan.export.tiles import Array, Cost, Selection, tiles
from refspan.visibility import visible_memories

if TYPE_CHECKING:
    import onnx

SCRATCH_BYTES = 256 * 2**20
"""Default for the memory of arrays with a query axis and a memory axis that one run of a graph may need, in bytes.

One query of one head is the smallest run. Beside it, the visible keys and values of a run are copied when some memories
are dead, and the gradients of keys and values are kept in float32 or wider until they are complete.
"""

GRANULARITY = {"cpu": 1, "cuda": 64}
"""Memories of a run are filled up to a multiple of this: the fast CUDA kernels ask for aligned rows of the bias."""

_NUMBERS = {"mask": (0, 9), "fused": (3, 9), "portable": (4, 9), "gradient": (7, 9)}
"""Numbers per query and memory that a run holds at once, of each head and of the mask that heads share."""
_POSITION_NUMBERS = 4
"""What relative position scores add, per query, memory and head."""
_BLOCK = {"fused": 16, "portable": 16, "gradient": 128}
"""Queries that a run keeps together if it can: products of fewer rows spend their time on reading keys and values, and
each run of the gradient returns those of all its keys and values."""


class AttentionRunner:
    """Soft mask, attention and its gradients of `refspan`, run by ONNX Runtime.

    Arguments are those of `refspan`, as NumPy arrays, and are checked as there. Results are new arrays in the dtype of
    `query`, and of `span` for masks and gradients of spans. A span of float64 is computed in float64 (WIDTH).
    Sessions are made when they are first needed and kept.

    Args:
        device: "cpu" or "cuda". On CUDA nothing falls back to the CPU, and float32 products are not rounded to TF32.
        form: which attention graph runs, "fused" or "portable".
        threads: of one run on the CPU; None for ONNX Runtime's default, the number of cores.
        scratch_bytes: limit of the memory for intermediate results, see `SCRATCH_BYTES`.
        session_options: further session configuration entries of ONNX Runtime.

    Raises:
        SetupError: ONNX Runtime or the device cannot be used.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        form: str = "fused",
        threads: int | None = None,
        scratch_bytes: int = SCRATCH_BYTES,
        session_options: dict[str, str] | None = None,
    ) -> None:
        if form not in FORMS:
            raise SetupError(f"form: got {form!r}, expected one of {', '.join(FORMS)}")
        if scratch_bytes < 1:
            raise ValueError(f"scratch_bytes: got {scratch_bytes}, expected at least 1")
        check_device(device)
        self.device, self.form, self.threads, self.scratch_bytes = device, form, threads, scratch_bytes
        self._session_options = dict(session_options or {})
        self._sessions: dict[tuple[str, str, str, bool], Any] = {}
        self._kernels: dict[str, list[str]] = {}

    @property
    def version(self) -> str:
        """Version of ONNX Runtime."""
        return str(load_onnxruntime().__version__)

    @cached_property
    def providers(self) -> list[str]:
        """Execution providers of a session on this device, the preferred one first."""
        return list(self._session("mask", "float32", "float32", position=False).get_providers())

    def placement(self) -> dict[str, str]:
        """Where the nodes of all graphs used so far run: "graph/node (operator)" -> execution provider."""
        return {
            f"{'-'.join([graph, dtype, *['position'] * position])}/{node}": provider
            for (graph, dtype, _, position), session in self._sessions.items()
            for node, provider in placement_of(session).items()
        }

    def kernel(self) -> list[str]:
        """What computes attention: on CUDA the kernels that the provider logged, by dtype; else the operators."""
        if self.device == "cuda" and self.form == "fused":
            return [f"{', '.join(kernels)} ({dtype})" for dtype, kernels in self._kernels.items()]
        operators = {node.rsplit(" (")[-1].rstrip(")") for node in self.placement()}
        return sorted(operators & {"Attention", "MatMul"})

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        """As `refspan.soft_mask`: [B, M, N], dtype of `span`."""
        namespace_of(span=span, age=age)
        ramp = check_ramp(ramp)
        check_spans(np, span, age)
        queries = check_count("queries", queries)
        batch, memories = span.shape
        mask = np.zeros((batch, queries, memories), span.dtype)
        if mask.size == 0:
            return mask
        cost = Cost(0, _NUMBERS["mask"][1] * span.itemsize)
        for b, _, block in tiles(batch, 1, queries, memories, cost, self.scratch_bytes):
            for m in block:
                feed = {
                    "span": np.ascontiguousarray(span[b]),
                    "age": age[b] + m.start,
                    "queries": np.array([m.stop - m.start], np.int64),
                    "ramp": np.asarray(ramp, span.dtype),
                }
                (mask[b, m],) = self._run("mask", str(span.dtype), str(span.dtype), feed)
        return mask

    def span_attention(
        self,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        *,
        ramp: float,
        position: Array | None = None,
    ) -> Array:
        """As `refspan.span_attention`, output only: [B, H, M, D], dtype of `query`."""
        step = _Step.of(query, key, value, span, age, ramp, position)
        if self.form == "fused" and step.dtype == "float64":
            raise TypeError("query: got float64, expected float16 or float32 in the fused form; portable takes float64")
        output = np.zeros(query.shape, query.dtype)
        for run in self._runs(step, self.form):
            (output[run.b, run.h, run.m],) = self._run(self.form, step.dtype, step.width, run.feed)
        return output

    def span_attention_backward(
        self,
        grad_output: Array,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        *,
        ramp: float,
        position: Array | None = None,
    ) -> dict[str, Array]:
        """As `refspan.span_attention_backward`, the forward pass computed anew.

        Returns gradients by name: query, key, value, span and, if there is one, position. Those that add up over runs
        do so in float32 or wider.
        """
        step = _Step.of(query, key, value, span, age, ramp, position)
        namespace_of(query=query, grad_output=grad_output)
        check_shape("grad_output", grad_output, query.shape)
        check_dtype(np, "grad_output", grad_output, (step.dtype,))
        arrays = {"query": query, "key": key, "value": value, "span": span}
        if position is not None:
            arrays["position"] = position
        totals = {name: np.zeros(x.shape, np.result_type(x.dtype, np.float32)) for name, x in arrays.items()}
        for run in self._runs(step, "gradient"):
            feed = {**run.feed, "grad_output": np.ascontiguousarray(grad_output[run.b, run.h, run.m])}
            grad_q, grad_k, grad_v, grad_s, *grad_p = self._run("gradient", step.dtype, step.width, feed)
            totals["query"][run.b, run.h, run.m] = grad_q
            run.selection.add_to(totals["key"][run.b, run.h], grad_k, axis=2)
            run.selection.add_to(totals["value"][run.b, run.h], grad_v, axis=2)
            run.selection.add_to(totals["span"][run.b], grad_s, axis=1)
            for grad in grad_p:
                totals["position"][: len(grad)] += grad  # rows beyond the reach of any query have none
        return {name: total.astype(arrays[name].dtype, copy=False) for name, total in totals.items()}

    def _runs(self, step: "_Step", graph: str) -> Iterator["_Run"]:
        """The runs of a graph that make up one attention step; none if no memory is visible."""
        batch, heads, queries, _ = step.query.shape
        visible = visible_memories(np, step.span, step.age, queries=queries, ramp=step.ramp)  # [B, N]
        most = int(visible.sum(axis=1).max(initial=0))
        if most == 0 or 0 in step.query.shape:
            return
        cost = _cost(graph, step)
        reach = max(0, int(step.age[visible].max()) + queries - 1)  # largest distance of a visible memory
        for b, h, block in tiles(batch, heads, queries, most, cost, self.scratch_bytes, _BLOCK[graph]):
            selection = Selection.of(visible[b], GRANULARITY[self.device])
            if selection.size == 0:
                continue
            shared = {
                "key": self._on_device(selection.gather(step.key[b, h], axis=2)),  # [b, h, n, D]
                "value": self._on_device(selection.gather(step.value[b, h], axis=2)),
                "span": selection.gather(step.span[b], axis=1),  # [b, n]
                "ramp": np.asarray(step.ramp, step.span.dtype),
            }
            if step.position is not None:
                shared["position"] = self._on_device(np.ascontiguousarray(step.position[:reach]))
            # A place that is filled up is a memory after the block's last query, which no query sees (PAST).
            age = selection.gather(step.age[b], axis=1, fill=-queries)  # [b, n]
            for m in block:
                query = np.ascontiguousarray(step.query[b, h, m])
                yield _Run(b, h, m, selection, {**shared, "query": query, "age": age + m.start})

    def _run(self, graph: str, dtype: str, width: str, feed: dict[str, Any]) -> list[Array]:
        """Outputs of one run of a graph."""
        session = self._session(graph, dtype, width, position="position" in feed)
        values = {name: self._on_device(x) if isinstance(x, np.ndarray) else x for name, x in feed.items()}
        if self.device == "cuda" and graph == "fused" and dtype not in self._kernels:
            with captured_log(load_onnxruntime(), severity=0) as messages:
                outputs = session.run_with_ort_values(None, values)
            self._kernels[dtype] = kernels_in(messages)
        else:
            outputs = session.run_with_ort_values(None, values)
        return [x.numpy() for x in outputs]

    def _on_device(self, x: Array) -> Any:
        """`x` where the graphs run; on the CPU that is where it is."""
        return load_onnxruntime().OrtValue.ortvalue_from_numpy(x, self.device, 0)

    def _session(self, graph: str, dtype: str, width: str, *, position: bool) -> Any:
        """The session of one graph, made when first asked for."""
        name = (graph, dtype, width, position)
        if name not in self._sessions:
            model = _model(graph, dtype, width, position=position, device=self.device)
            self._sessions[name] = make_session(
                model, device=self.device, threads=self.threads, options=self._session_options
            )
        return self._sessions[name]


@dataclass(frozen=True)
class _Step:
    """The arguments of one attention step, checked."""

    query: Array
    key: Array
    value: Array
    span: Array
    """In the width that the mask is computed in."""
    age: Array
    ramp: float
    position: Array | None
    dtype: str
    """Of query."""
    width: str
    """Of span."""

    @classmethod
    def of(
        cls,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        ramp: float,
        position: Array | None,
    ) -> "_Step":
        """Check the arguments as `refspan.span_attention` does."""
        arrays = {"query": query, "key": key, "value": value, "span": span, "age": age}
        namespace_of(**arrays if position is None else {**arrays, "position": position})
        ramp = check_ramp(ramp)
        check_attention(np, query, key, value, span, age, position)
        wide = span.astype(np.result_type(span.dtype, query.dtype), copy=False)
        # A table without rows gives no memory a position score.
        table = position if position is not None and len(position) else None
        return cls(query, key, value, wide, age, ramp, table, str(query.dtype), str(wide.dtype))


@dataclass(frozen=True)
class _Run:
    """One run of a graph: batch rows, heads and queries that it computes, and what it is fed."""

    b: slice
    h: slice
    m: slice
    selection: Selection
    feed: dict[str, Any]


def _model(graph: str, dtype: str, width: str, *, position: bool, device: str) -> "onnx.ModelProto":
    if graph == "mask":
        return mask_model(width)
    if graph == "gradient":
        return gradient_model(dtype, position=position, span_dtype=width)
    # A kernel serves the operator versions that it is registered for, and the CUDA provider is late with version 24 of
    # Cast, Shape, Reshape and others: nodes would land on the CPU. Attention itself does the same in 23.
    opset = 23 if device == "cuda" and graph == "fused" else None
    return attention_model(graph, dtype, position=position, opset=opset, span_dtype=width)


def _cost(graph: str, step: "_Step") -> Cost:
    """Bytes per query and memory that a run of a graph holds at once."""
    per_head, shared = _NUMBERS[graph]
    per_head += _POSITION_NUMBERS * (step.position is not None)
    return Cost(per_head * (8 if step.dtype == "float64" else 4), shared * np.dtype(step.width).itemsize)
