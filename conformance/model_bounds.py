"""What a model must answer, and how far a right answer may be from it.

The expected log-probabilities come from the float64 reference in the plainest way there is: the whole history of a row
as one block. There is no memory to age, drop or lose, so whatever a stream does between blocks is on trial.

Bounds by absolute values, as for one attention step, would multiply at every residual connection and normalisation
until they say nothing, because they forget that errors of one origin cancel. So errors are sent through the model
instead: `SAMPLES` times, every quantity is moved by the whole of its local rounding bound (n u times the sum of
magnitudes for a sum of n products), up or down at random, and the rest of the model is computed from that. The bound of
a position is `SAFETY` times the largest movement of its log-probabilities in any sample. Rounding that is not against
us stays some ten times below: it grows with sqrt(n), not n. A query whose last memory is about to expire is found alive
in some samples and empty in others, and so gets the bound that it needs.

Errors do not grow with the length of a stream, only with the depth of the model: a memory is a layer's input of its
step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.memo import remembered
from refspan.conformance.protocol import Array
from refspan.conformance.tolerance import Arithmetic, Expected
from refspan.layer_norm import EPSILON
from refspan.memory import Memory
from refspan.model import layer_parameters, model, start_memory

SAMPLES = 12
SAFETY = 4.0


@dataclass(frozen=True)
class History:
    """What a row has read since it was last empty."""

    tokens: Array
    """[T]"""
    hidden: Sequence[Array] | None = None
    """Initial memory of each layer, [N, d]."""
    age: Sequence[Array] | None = None
    """[N], as seen from the first token."""
    block: int = 1
    """Tokens of the longest block that it is read in."""

    def __len__(self) -> int:
        return len(self.tokens)


class ModelBounds:
    """Expected log-probabilities of a history, and what each layer remembers of it.

    In the perturbed runs S stands for the samples, which take the place of the batch.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Array], history: History) -> None:
        self.config, self.history = config, history
        dtype = np.dtype(next(iter(params.values())).dtype)
        self.u, self.tiny = Arithmetic.of(dtype).u, Arithmetic.of(dtype).tiny
        self.span_u = Arithmetic.of(np.dtype(np.float64 if dtype == np.float64 else np.float32)).u
        self.params = {name: array.astype(np.float64) for name, array in params.items()}
        self.spans: list[Array] = []
        """Of all memories of each layer, initial ones first, in each sample, exact in the first.   [1 + S, N + T]"""
        self.ages: list[Array] = []
        """Of the same, as seen from the first token.   [N + T]"""
        self._random = np.random.default_rng(len(history))
        with np.errstate(all="ignore"):
            self._perturbed = self._run()

    @cached_property
    def expected(self) -> Expected:
        """Log-probabilities [T, V]."""
        memory = start_memory(self.config, self.params, 1)
        if self.history.hidden is not None and self.history.age is not None:
            memory = [
                Memory(age[None], {"hidden": hidden[None].astype(np.float64)})
                for hidden, age in zip(self.history.hidden, self.history.age, strict=True)
            ]
        value, _, _ = model(self.config, self.params, self.history.tokens[None], memory)
        moved = np.max(np.abs(self._perturbed[1:] - self._perturbed[0]), axis=(0, 2))[:, None]  # [T, 1]
        dtype_of_result = self.u * np.abs(value[0])
        return Expected(value[0], SAFETY * np.where(np.isnan(moved), np.inf, moved) + dtype_of_result)

    def live(self, layer: int, after: int) -> tuple[int, int]:
        """Fewest and most memories that a later query may still see after this many tokens, given how spans round."""
        span, age = self.spans[layer], self.ages[layer] + after
        slack = SAFETY * np.max(np.abs(span[1:] - span[0]), axis=0) + 4 * self.span_u * (
            np.abs(span[0]) + np.abs(age) + self.config.ramp + self.history.block
        )
        if self._is_exact(layer):
            slack = np.zeros_like(slack)
        left = span[0] + self.config.ramp - age
        return int(np.sum((age >= 1) & (left > slack))), int(np.sum((age >= 1) & (left > -slack)))

    def _is_exact(self, layer: int) -> bool:
        """Whether all spans are L / 2, as weight and bias of the predictor are 0, and no number here is rounded."""
        predictor = (self.params[f"layers.{layer}.span.{name}"] for name in ("weight", "bias"))
        sizes = (self.config.max_span, self.config.ramp)
        return not any(map(np.any, predictor)) and all(4 * size == round(4 * size) < 2**16 for size in sizes)

    def _run(self) -> Array:
        """Log-probabilities of all samples.   [1 + S, T, V]."""
        h = self.params["embedding.weight"][self.history.tokens]  # [T, d]
        h = np.broadcast_to(h, (1 + SAMPLES, *h.shape))
        for i in range(self.config.layers):
            h = self._layer(i, h)
        if self.config.norm == "pre":
            h = self._norm(h, self.params["final_norm.weight"], self.params["final_norm.bias"])
        x = self._linear(h, self.params["output.weight"], self.params["output.bias"])
        shifted = x - np.max(x, axis=-1, keepdims=True)
        result = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
        largest = np.max(np.abs(x), axis=-1, keepdims=True) + np.max(np.abs(shifted), axis=-1, keepdims=True)
        return self._moved(result, self.u * (4 * largest + x.shape[-1] + 8))

    def _moved(self, x: Array, bound: Array | float, *, all_alike: bool = False) -> Array:
        """`x` [1 + S, ..] in error by `bound`, up or down, in all samples but the first.

        With `all_alike` everything goes up in one sample, and down in another: where rounding decides whether a memory
        is alive at all, chance shall not leave out one side.
        """
        sign = self._random.choice(np.array([-1.0, 1.0]), x.shape)
        sign[0] = 0
        if all_alike:
            sign[1], sign[2] = 1, -1
        return np.asarray(x + sign * bound)

    def _layer(self, i: int, x: Array) -> Array:
        config, p, length = self.config, layer_parameters(self.params, i), len(self.history)
        pre = config.norm == "pre"
        age = -np.arange(length)
        context = x
        if self.history.hidden is not None and self.history.age is not None:
            given = self.history.hidden[i].astype(np.float64)
            context = np.concatenate([np.broadcast_to(given, (len(x), *given.shape)), x], axis=1)
            age = np.concatenate([self.history.age[i], age])
        u = self._norm(context, p["norm1.weight"], p["norm1.bias"]) if pre else context
        span = self._span(u, p["span.weight"], p["span.bias"])
        self.spans.append(span)
        self.ages.append(age)
        attended = self._attention(
            self._heads(self._linear(u[:, u.shape[1] - length :], p["attention.query.weight"])),
            self._heads(self._linear(u, p["attention.key.weight"])),
            self._heads(self._linear(u, p["attention.value.weight"])),
            span,
            age,
        )
        after = self._add(x, self._linear(attended, p["attention.output.weight"]))
        name = "norm2" if pre else "norm1"
        y = self._norm(after, p[f"{name}.weight"], p[f"{name}.bias"])
        active = np.maximum(self._linear(y, p["feedforward.in.weight"], p["feedforward.in.bias"]), 0)
        result = self._linear(active, p["feedforward.out.weight"], p["feedforward.out.bias"])
        if pre:
            return self._add(after, result)
        return self._norm(self._add(y, result), p["norm2.weight"], p["norm2.bias"])

    def _attention(self, query: Array, key: Array, value: Array, span: Array, age: Array) -> Array:
        """Clauses MASK to OUTPUT on full arrays.   [1 + S, H, T, D], .., [1 + S, N], [N] -> [1 + S, T, H D]."""
        u, ramp, (_, _, length, head_size) = self.u, self.config.ramp, query.shape
        distance = age + np.arange(length)[:, None]  # [T, N]
        remaining = span[:, None, :] - distance
        # (1 + (span - age) / R) - m / R is right too, m being the query's place in a block
        error = 3 * self.span_u * (np.abs(span[:, None, :]) + np.abs(distance) + ramp + self.history.block)
        mask = np.clip(1 + self._moved(remaining, error, all_alike=True) / ramp, 0, 1)
        mask = np.where(distance >= 1, mask, 0)
        rounding = 3 * self.span_u * np.where((mask > 0) & (mask < 1), 1, 0)
        mask = np.clip(self._moved(mask, rounding, all_alike=True), 0, 1)[:, None]

        scale = 1 / np.sqrt(head_size)
        scores = query @ np.swapaxes(key, -1, -2) * scale  # [1 + S, H, T, N]
        size = np.abs(query) @ np.swapaxes(np.abs(key), -1, -2) * scale
        table = self.params["position.weight"]
        if len(table):
            row = np.clip(distance - 1, 0, len(table) - 1)
            near = (distance >= 1) & (distance <= len(table))
            by_distance = query @ table.T * scale  # [1 + S, H, T, P]
            index = np.broadcast_to(row, scores.shape)
            scores = scores + np.where(near, np.take_along_axis(by_distance, index, axis=-1), 0)
            size_by_distance = np.abs(query) @ np.abs(table).T * scale
            size = size + np.where(near, np.take_along_axis(size_by_distance, index, axis=-1), 0)
        scores = self._moved(scores, u * ((2 * head_size + 8) * size + 8))

        live = np.where(mask > 0, scores, -np.inf)
        peak = np.max(live, axis=-1, keepdims=True, initial=-np.inf)
        raw = mask * np.exp(np.where(mask > 0, scores, -np.inf) - np.where(np.isfinite(peak), peak, 0))
        total = np.sum(raw, axis=-1, keepdims=True)
        weights = raw / np.where(total > 0, total, 1)
        spread = 1 + np.max(np.where(mask > 0, np.abs(scores), 0), axis=-1, keepdims=True, initial=0)
        weights = self._moved(weights, u * (4 * spread + scores.shape[-1]) * weights + self.tiny)
        out = weights @ value  # [1 + S, H, T, D]
        out = self._moved(out, u * (scores.shape[-1] + 8) * (weights @ np.abs(value)))
        return np.moveaxis(out, 1, 2).reshape(len(out), length, self.config.heads * head_size)

    def _span(self, x: Array, weight: Array, bias: Array) -> Array:
        """Clause SPAN.   [1 + S, N, d] -> [1 + S, N]."""
        z = self._linear(x, weight[None])[..., 0] / self.config.span_temperature
        z = self._moved(z + bias, 3 * self.u * (np.abs(z) + np.abs(bias)))
        value = self.config.max_span / (1 + np.exp(-z))
        return self._moved(value, 8 * self.u * value)

    def _linear(self, x: Array, weight: Array, bias: Array | float = 0.0) -> Array:
        size = np.abs(x) @ np.abs(weight).T + np.abs(bias)
        return self._moved(x @ weight.T + bias, (weight.shape[1] + 2) * self.u * size + self.tiny)

    def _add(self, x: Array, y: Array) -> Array:
        return self._moved(x + y, self.u * np.abs(x + y))

    def _norm(self, x: Array, weight: Array, bias: Array) -> Array:
        n = x.shape[-1]
        centred = x - np.mean(x, axis=-1, keepdims=True)
        centred = self._moved(centred, (n + 2) * self.u * np.mean(np.abs(x), axis=-1, keepdims=True))
        variance = np.mean(centred**2, axis=-1, keepdims=True) + EPSILON
        deviation = np.sqrt(self._moved(variance, (n + 4) * self.u * variance))
        normal = centred / deviation
        return self._moved(normal * weight + bias, 4 * self.u * (np.abs(normal * weight) + np.abs(bias)))

    def _heads(self, x: Array) -> Array:
        """[1 + S, N, H D] -> [1 + S, H, N, D]."""
        return np.moveaxis(x.reshape(*x.shape[:2], self.config.heads, self.config.head_size), 2, 1)


@remembered
def model_bounds(config: ModelConfig, params: Mapping[str, Array], history: History) -> ModelBounds:
    """Bounds of this history."""
    return ModelBounds(config, params, history)
