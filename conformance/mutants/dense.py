"""A right attention step on full arrays, in the dtype of its arguments; mutants override one method each."""

import math
from typing import Any

import numpy as np

Array = Any
"""What NumPy makes of arrays."""


class Dense:
    """Attention on full arrays in the dtype of query; right, wasteful, and independent of the reference."""

    name = "dense"

    def distance(self, age: Array, queries: int) -> Array:
        return age[:, None, :] + np.arange(queries)[:, None]  # [B, M, N]

    def past(self, distance: Array) -> Array:
        return distance >= 1

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        distance = self.distance(age, queries)
        soft = np.clip(1 + (span[:, None, :] - distance.astype(span.dtype)) / span.dtype.type(ramp), 0, 1)
        return np.where(self.past(distance), soft, 0).astype(span.dtype)  # [B, M, N]

    def soft_mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        return self.mask(span, age, queries, ramp)

    def table(self, position: Array, age: Array, queries: int) -> Array:
        """Position embedding of each memory for each query, 0 out of reach.   -> [B, M, N, D]."""
        row = self.distance(age, queries) - 1
        padded = np.concatenate([position, np.zeros((1, position.shape[1]), position.dtype)])
        return padded[np.where((row >= 0) & (row < len(position)), row, len(position))]

    def logits(self, query: Array, key: Array, position: Array | None, age: Array) -> Array:
        s = np.einsum("bhmd,bhnd->bhmn", query, key)
        if position is not None:
            s = s + np.einsum("bhmd,bmnd->bhmn", query, self.table(position, age, query.shape[2]))
        return s / math.sqrt(query.shape[-1])

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        """-> normalised weights, and the same before the mask is multiplied in: exp(s) / Z."""
        e, z = self.exponentials(s, m)
        return m * e / z, e / z

    def exponentials(self, s: Array, m: Array) -> tuple[Array, Array]:
        """-> exp(s) of the memories that are alive, and Z; 1 where there are none."""
        s = np.where(m > 0, s, -np.inf)
        top = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
        e = np.exp(s - np.where(np.isfinite(top), top, 0))
        z = np.sum(m * e, axis=-1, keepdims=True)
        return e, np.where(z > 0, z, 1)

    def everything(
        self, query: Array, key: Array, value: Array, span: Array, age: Array, ramp: float, position: Array | None
    ) -> tuple[Any, ...]:
        wide = np.result_type(query.dtype, np.float32)
        q, k, v = (x.astype(wide) for x in (query, key, value))
        p = None if position is None else position.astype(wide)
        m = self.mask(span, age, query.shape[2], ramp).astype(wide)[:, None]  # [B, 1, M, N]
        a, share = self.weights(self.logits(q, k, p, age), m)
        return q, k, v, p, m, a, share

    def output(self, a: Array, v: Array) -> Array:
        return np.einsum("bhmn,bhnd->bhmd", a, v)

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
        _, _, v, _, _, a, _ = self.everything(query, key, value, span, age, ramp, position)
        return self.output(a, v).astype(query.dtype)

    def grad_logits(self, a: Array, grad_a: Array) -> Array:
        return a * (grad_a - np.sum(a * grad_a, axis=-1, keepdims=True))

    def grad_span(self, share: Array, a: Array, grad_a: Array, m: Array, ramp: float) -> Array:
        grad_mask = np.sum(share * (grad_a - np.sum(a * grad_a, axis=-1, keepdims=True)), axis=1)  # [B, M, N]
        return self.sum_over_ramp(grad_mask, m[:, 0], ramp)

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        return np.sum(np.where((m > 0) & (m < 1), grad_mask, 0), axis=1) / ramp

    def grad_query(self, ds: Array, k: Array, p: Array | None, age: Array, queries: int) -> Array:
        dq = np.einsum("bhmn,bhnd->bhmd", ds, k)
        if p is not None:
            dq = dq + np.einsum("bhmn,bmnd->bhmd", ds, self.table(p, age, queries))
        return dq

    def grad_position(self, ds: Array, q: Array, p: Array, age: Array) -> Array:
        row = self.distance(age, q.shape[2]) - 1
        hot = (row[..., None] == np.arange(len(p))).astype(q.dtype)
        return np.einsum("bhmn,bmnp,bhmd->pd", ds, hot, q, optimize=True)

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
        q, k, v, p, m, a, share = self.everything(query, key, value, span, age, ramp, position)
        g = grad_out.astype(q.dtype)
        grad_a = np.einsum("bhmd,bhnd->bhmn", g, v)
        ds = self.grad_logits(a, grad_a) / math.sqrt(q.shape[-1])
        grads = {
            "query": self.grad_query(ds, k, p, age, q.shape[2]),
            "key": np.einsum("bhmn,bhmd->bhnd", ds, q),
            "value": np.einsum("bhmn,bhmd->bhnd", a, g),
        }
        if p is not None:
            grads["position"] = self.grad_position(ds, q, p, age)
        grads = {name: x.astype(query.dtype) for name, x in grads.items()}
        return {**grads, "span": self.grad_span(share, a, grad_a, m, ramp).astype(span.dtype)}


class ClipsNegativeSpans(Dense):
    """Right: spans are >= 0 anyway."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        return super().mask(np.maximum(span, 0), age, queries, ramp)


class DividesLate(Dense):
    """Right: values are summed with raw weights and divided in the end; the mask's sums are in another order."""

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        distance, r = self.distance(age, queries), span.dtype.type(ramp)
        soft = np.clip((r - distance.astype(span.dtype) + span[:, None, :]) / r, 0, 1)
        return np.where(self.past(distance), soft, 0).astype(span.dtype)

    def span_attention(self, *arrays: Any, ramp: float, position: Array | None = None) -> Array:
        query, key, value, span, age = arrays
        q, k, v, p, m, *_ = self.everything(query, key, value, span, age, ramp, position)
        e, z = self.exponentials(self.logits(q, k, p, age), m)
        return (self.output(m * e, v) / z).astype(query.dtype)


class LearnsAtTheKinks(Dense):
    """Right: the derivative at a kink may be 1 / R as well as 0."""

    thread_safe = False

    def span_attention_backward(
        self, grad_out: Array, *arrays: Any, ramp: float, position: Array | None = None
    ) -> dict[str, Array]:
        with np.errstate(all="ignore"):  # exp(s) / Z of an expired memory may be anything
            return super().span_attention_backward(grad_out, *arrays, ramp=ramp, position=position)

    def sum_over_ramp(self, grad_mask: Array, m: Array, ramp: float) -> Array:
        return np.sum(np.where(self.seen & np.isfinite(grad_mask), grad_mask, 0), axis=1) / ramp

    def mask(self, span: Array, age: Array, queries: int, ramp: float) -> Array:
        distance = self.distance(age, queries)
        slope = 1 + (span[:, None, :] - distance.astype(span.dtype)) / span.dtype.type(ramp)
        self.seen = (slope >= 0) & (slope <= 1) & self.past(distance)
        return super().mask(span, age, queries, ramp)

    def weights(self, s: Array, m: Array) -> tuple[Array, Array]:
        a, _ = super().weights(s, m)
        live = np.where(m > 0, s, -np.inf)
        top = np.max(live, axis=-1, keepdims=True, initial=-np.inf)
        some = np.isfinite(top)
        with np.errstate(over="ignore"):
            e = np.exp(s - np.where(some, top, 0))
            z = np.sum(m * np.where(m > 0, e, 0), axis=-1, keepdims=True)
            return a, np.where(some, e / np.where(some, z, 1), 0)
