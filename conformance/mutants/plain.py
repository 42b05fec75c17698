"""A right model that reads one token at a time."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refspan.config import ModelConfig

Array = Any
"""What NumPy makes of arrays."""
Parameters = Mapping[str, Array]
Layer = Callable[[str], Array]
"""A layer's parameters by the rest of their names."""
Memory = tuple[Array, Array]
"""Hidden states [N, d] and ages [N]."""
Initial = Sequence[Memory] | None


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), for any z."""
    return np.exp(-np.logaddexp(z.dtype.type(0), -z))


def mean(x: Array) -> Array:
    """Of the last axis, which stays; for small arrays a third of the time of `x.mean`."""
    return x.sum(axis=-1, keepdims=True) / x.dtype.type(x.shape[-1])


class Plain:
    """Expire-Span as one would write it on paper; right, and as slow as it gets."""

    name = "plain"

    def __init__(self) -> None:
        self.shared: dict[Any, Any] = {}
        """By all streams; a right one has no use for it."""

    def open_model(
        self, config: ModelConfig, params: Parameters, *, batch: int, memory: Initial = None
    ) -> "PlainStream":
        return PlainStream(self, config, params, batch, memory)

    # what a layer does

    def norm(self, x: Array, weight: Array, bias: Array) -> Array:
        centred = x - mean(x)
        return centred / np.sqrt(mean(centred * centred) + x.dtype.type(1e-5)) * weight + bias

    def normalise(self, config: ModelConfig, p: Layer, x: Array, is_memory: bool) -> Array:
        return self.norm(x, p("norm1.weight"), p("norm1.bias")) if config.norm == "pre" else x

    def span(self, config: ModelConfig, p: Layer, u: Array) -> Array:
        z = (u / u.dtype.type(config.span_temperature)) @ p("span.weight") + p("span.bias")
        return u.dtype.type(config.max_span) * sigmoid(z)

    def mask(self, span: Array, age: Array, ramp: float) -> Array:
        soft = np.clip(1 + (span - age.astype(span.dtype)) / span.dtype.type(ramp), 0, 1)
        return np.where(age >= 1, soft, 0).astype(span.dtype)

    def activate(self, x: Array) -> Array:
        return np.maximum(x, 0)

    def position_scores(self, q: Array, table: Array, age: Array) -> Array:
        scores = np.zeros((len(q), len(age)), q.dtype)
        near = (age >= 1) & (age <= len(table))
        scores[:, near] = q @ table[age[near] - 1].T
        return scores

    def attend(self, config: ModelConfig, p: Layer, table: Array, u: Array, hidden: Array, age: Array) -> Array:
        """One query over its memories.   [d], [N, d], [N] -> [H D]."""
        heads, size = config.heads, config.head_size
        um = self.normalise(config, p, hidden, True)
        q = (p("attention.query.weight") @ u).reshape(heads, size)
        k = (um @ p("attention.key.weight").T).reshape(-1, heads, size)
        v = (um @ p("attention.value.weight").T).reshape(-1, heads, size)
        m = self.mask(self.span(config, p, um), age, config.ramp)
        s = (np.einsum("hd,nhd->hn", q, k) + self.position_scores(q, table, age)) / u.dtype.type(np.sqrt(size))
        return np.einsum("hn,nhd->hd", self.weights(s, m), v).reshape(-1)

    def weights(self, s: Array, m: Array) -> Array:
        """Logits [H, N] and masks [N] -> weights [H, N], all 0 if nothing lives."""
        if not (m > 0).any():
            return np.zeros_like(s)
        s = np.where(m > 0, s, -np.inf)
        w = m * np.exp(s - s.max(axis=1, keepdims=True))
        return w / w.sum(axis=1, keepdims=True)

    def layer(self, config: ModelConfig, p: Layer, table: Array, x: Array, hidden: Array, age: Array) -> Array:
        attended = self.attend(config, p, table, self.normalise(config, p, x, False), hidden, age)
        after = x + p("attention.output.weight") @ attended
        if config.norm == "pre":
            return after + self.feedforward(p, self.norm(after, p("norm2.weight"), p("norm2.bias")))
        y = self.norm(after, p("norm1.weight"), p("norm1.bias"))
        return self.norm(y + self.feedforward(p, y), p("norm2.weight"), p("norm2.bias"))

    def feedforward(self, p: Layer, y: Array) -> Array:
        inner = self.activate(p("feedforward.in.weight") @ y + p("feedforward.in.bias"))
        return p("feedforward.out.weight") @ inner + p("feedforward.out.bias")

    def embed(self, config: ModelConfig, params: Parameters, token: int) -> Array:
        return params["embedding.weight"][token]

    def finish(self, config: ModelConfig, params: Parameters, x: Array) -> Array:
        if config.norm == "pre":
            x = self.norm(x, params["final_norm.weight"], params["final_norm.bias"])
        logits = params["output.weight"] @ x + params["output.bias"]
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    # what a stream does

    def start(self, config: ModelConfig, params: Parameters, layer: int) -> Memory:
        dtype = params["embedding.weight"].dtype
        return np.zeros((0, config.hidden_size), dtype), np.zeros(0, np.int64)

    def advance(self, age: Array) -> Array:
        return age + 1

    def gone(self, config: ModelConfig, span: Array, age: Array) -> Array:
        """Which memories no later query can see, with ages as seen from the next one."""
        return age - span >= config.ramp

    def forget(self, config: ModelConfig, p: Layer, hidden: Array, age: Array) -> Memory:
        keep = ~self.gone(config, self.span(config, p, self.normalise(config, p, hidden, True)), age)
        return hidden[keep], age[keep]


class PlainStream:
    """Streams through a `Plain` model."""

    def __init__(self, rules: "Plain", config: ModelConfig, params: Parameters, batch: int, memory: Initial) -> None:
        self.rules, self.config, self.batch = rules, config, batch
        wide = np.result_type(params["embedding.weight"].dtype, np.float32)
        self.dtype = params["embedding.weight"].dtype
        self.params = {name: x.astype(wide) for name, x in params.items()}
        self.rows = [self.empty() for _ in range(batch)]
        """For each row and layer hidden states [N, d] and ages [N]."""
        self.projected = 0
        if memory is not None:
            self.rows = [
                [self.given(hidden[b], age[b], i) for i, (hidden, age) in enumerate(memory)] for b in range(batch)
            ]
            self.projected = sum(hidden.shape[0] * hidden.shape[1] for hidden, _ in memory)

    def given(self, hidden: Array, age: Array, i: int) -> Memory:
        hidden = hidden.astype(self.params["embedding.weight"].dtype)
        return self.rules.forget(self.config, self.of_layer(i), hidden, age.copy())

    def empty(self) -> list[Memory]:
        return [self.rules.start(self.config, self.params, i) for i in range(self.config.layers)]

    def of_layer(self, i: int) -> Layer:
        return lambda name: self.params[f"layers.{i}.{name}"]

    def step(self, tokens: Array) -> Array:
        log_probs = np.stack([self.read(b, tokens[b]) for b in range(self.batch)])
        self.after_block(tokens.shape[1])
        return log_probs.astype(self.dtype)

    def after_block(self, length: int) -> None:
        self.projected += self.batch * length * self.config.layers

    def read(self, b: int, tokens: Array) -> Array:
        return np.stack([self.token(b, int(token)) for token in tokens])

    def token(self, b: int, token: int) -> Array:
        rules, config, row = self.rules, self.config, self.rows[b]
        x = rules.embed(config, self.params, token)
        for i in range(config.layers):
            p, (hidden, age) = self.of_layer(i), row[i]
            z = rules.layer(config, p, self.params["position.weight"], x, hidden, age)
            row[i] = self.remember(p, x, z, hidden, age)
            x = z
        return rules.finish(config, self.params, x)

    def remember(self, p: Layer, x: Array, z: Array, hidden: Array, age: Array) -> Memory:
        hidden, age = np.concatenate([hidden, x[None]]), self.rules.advance(np.append(age, 0))
        return self.rules.forget(self.config, p, hidden, age)

    def memory_size(self) -> list[int]:
        return [max(len(row[i][1]) for row in self.rows) for i in range(self.config.layers)]

    def rows_projected(self) -> int:
        return self.projected

    def reset(self, row: int) -> None:
        self.rows[row] = self.empty()

    def state(self) -> Any:
        return copy.deepcopy(self.rows)

    def restore(self, state: Any) -> None:
        self.rows = copy.deepcopy(state)
