"""Backends that run ONNX graphs of one attention step, whatever runs them: anyone's, or those of `refspan.export`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from refspan.conformance.protocol import Array

if TYPE_CHECKING:
    import onnx

Run = Callable[[Mapping[str, Array]], Sequence[Array]]
"""Runs a graph: inputs by name -> outputs in order."""


class GraphBackend(ABC):
    """The protocol's arguments as inputs of a graph, and its outputs as results.

    Graphs get what they are asked, with one exception: a block without memories is asked as a block with one memory
    that comes after all queries, so that none sees it, because some runtimes take no empty arrays.
    """

    name: str

    @abstractmethod
    def graph(self, operation: str, dtype: str, span_dtype: str, position: bool) -> Run:
        """What runs this operation of the protocol; raises NotOffered if nothing does.

        Args:
            operation: "soft_mask", "span_attention" or "span_attention_backward".
            dtype: of query, key and value, or of span for masks.
            span_dtype: of span and ramp.
            position: whether there is a table of positions.
        """

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        """As in the protocol."""
        width = str(span.dtype)
        run = self.graph("soft_mask", width, width, position=False)
        feed = {"span": span, "age": age, "queries": np.array([queries], np.int64), "ramp": np.asarray(ramp, width)}
        if span.shape[1] == 0:
            return np.zeros((len(span), queries, 0), span.dtype)
        return run(feed)[0]

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
        """As in the protocol."""
        feed = _feed(query, key, value, span, age, ramp, position)
        run = self.graph("span_attention", str(query.dtype), str(span.dtype), position is not None)
        return run(feed)[0]

    def span_attention_backward(
        self,
        grad_out: Array,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: Array,
        *,
        ramp: float,
        position: Array | None = None,
    ) -> dict[str, Array]:
        """As in the protocol."""
        feed = _feed(query, key, value, span, age, ramp, position) | {"grad_output": grad_out}
        run = self.graph("span_attention_backward", str(query.dtype), str(span.dtype), position is not None)
        memories = key.shape[2]
        grads = dict(zip(("query", "key", "value", "span", "position"), run(feed), strict=False))
        short = {"key": grads["key"][:, :, :memories], "value": grads["value"][:, :, :memories]}
        return {**grads, **short, "span": grads["span"][:, :memories]}


def _feed(
    query: Array, key: Array, value: Array, span: Array, age: Array, ramp: float, position: Array | None
) -> dict[str, Array]:
    if key.shape[2] == 0:
        batch, heads, queries, size = query.shape
        key = value = np.zeros((batch, heads, 1, size), query.dtype)
        span, age = np.zeros((batch, 1), span.dtype), np.full((batch, 1), -queries)
    feed = {"query": query, "key": key, "value": value, "span": span, "age": age}
    feed["ramp"] = np.asarray(ramp, span.dtype)
    return feed if position is None else {**feed, "position": position}


class ExportedGraphs(GraphBackend):
    """The graphs of `refspan.export` on some runtime; a subclass says which.

    Args:
        form: of the attention graph, "fused" or "portable".
    """

    def __init__(self, form: str = "portable") -> None:
        from refspan.errors import SetupError
        from refspan.export import DTYPES, FORMS

        if form not in FORMS:
            raise SetupError(f"form: got {form!r}, expected one of {', '.join(FORMS)}")
        self.form = form
        self.dtypes = tuple(dtype for dtype in DTYPES if dtype != "float64" or form == "portable")
        self._graph = cache(self._load)

    @abstractmethod
    def load(self, model: "onnx.ModelProto") -> Run:
        """Make a model ready to run."""

    def graph(self, operation: str, dtype: str, span_dtype: str, position: bool) -> Run:
        """As `GraphBackend.graph`."""
        return self._graph(operation, dtype, span_dtype, position)

    def _load(self, operation: str, dtype: str, span_dtype: str, position: bool) -> Run:
        from refspan.export import attention_model, gradient_model
        from refspan.export.models import mask_model

        if operation == "soft_mask":
            return self.load(mask_model(span_dtype))
        if operation == "span_attention":
            return self.load(attention_model(self.form, dtype, position=position, span_dtype=span_dtype))
        return self.load(gradient_model(dtype, position=position, span_dtype=span_dtype))
