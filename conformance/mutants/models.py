"""Wrong spans and wrong layers."""

import numpy as np

from refspan.config import ModelConfig
from refspan.conformance.mutants.plain import Array, Initial, Layer, Memory, Parameters, Plain, PlainStream, sigmoid
from refspan.conformance.mutants.registry import mutant


@mutant("model.spans", seen_in="a port")
class TemperatureDividesTheBias(Plain):
    """Sigmoid((w . h + b) / temperature)."""

    def span(self, config: ModelConfig, p: Layer, u: Array) -> Array:
        z = (u @ p("span.weight") + p("span.bias")) / u.dtype.type(config.span_temperature)
        return u.dtype.type(config.max_span) * sigmoid(z)


@mutant("model.spans", seen_in="a port")
class MissingSqueeze(Plain):
    """Spans (N, 1) minus ages (N) broadcast, and the wrong axis survives."""

    def mask(self, span: Array, age: Array, ramp: float) -> Array:
        return super().mask(span[:1] + 0 * span, age, ramp) if len(span) else super().mask(span, age, ramp)


@mutant("model.spans")
class SpansOfTheFirstLayer(Plain):
    """One span predictor for all layers."""

    def layer(self, config: ModelConfig, p: Layer, table: Array, x: Array, hidden: Array, age: Array) -> Array:
        return super().layer(config, p, table, x, hidden, age)

    def open_model(
        self, config: ModelConfig, params: Parameters, *, batch: int, memory: Initial = None
    ) -> "PlainStream":
        first = {n: params[f"layers.0.span.{n}"] for n in ("weight", "bias")}
        same = {f"layers.{i}.span.{n}": x for i in range(config.layers) for n, x in first.items()}
        return super().open_model(config, {**params, **same}, batch=batch, memory=memory)


@mutant("model.spans")
class NoTemperature(Plain):
    """The temperature is never applied."""

    def span(self, config: ModelConfig, p: Layer, u: Array) -> Array:
        return u.dtype.type(config.max_span) * sigmoid(u @ p("span.weight") + p("span.bias"))


@mutant("memory.short")
class AtLeastOneStep(Plain):
    """Spans are held above one step."""

    def span(self, config: ModelConfig, p: Layer, u: Array) -> Array:
        return np.maximum(super().span(config, p, u), u.dtype.type(1))


@mutant("memory.saturated")
class NoRamp(Plain):
    """Full or gone."""

    def mask(self, span: Array, age: Array, ramp: float) -> Array:
        return (super().mask(span, age, ramp) > 0).astype(span.dtype)


@mutant("model.pre_norm", seen_in="lucidrains/learning-to-expire-pytorch")
class MemoriesNotNormalised(Plain):
    """Keys, values and spans of memories are made without the norm that the block gets."""

    def normalise(self, config: ModelConfig, p: Layer, x: Array, is_memory: bool) -> Array:
        return x if is_memory else super().normalise(config, p, x, is_memory)


@mutant("model.pre_norm")
class NoFinalNorm(Plain):
    """A pre-norm model without its last norm."""

    def finish(self, config: ModelConfig, params: Parameters, x: Array) -> Array:
        logits = params["output.weight"] @ x + params["output.bias"]
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@mutant("model.pre_norm")
class AlwaysPostNorm(Plain):
    """The setting is overlooked."""

    def layer(self, config: ModelConfig, p: Layer, table: Array, x: Array, hidden: Array, age: Array) -> Array:
        attended = self.attend(config, p, table, self.normalise(config, p, x, False), hidden, age)
        y = self.norm(x + p("attention.output.weight") @ attended, p("norm1.weight"), p("norm1.bias"))
        return self.norm(y + self.feedforward(p, y), p("norm2.weight"), p("norm2.bias"))


@mutant("model.post_norm")
class NormBeforeTheResidual(Plain):
    """Post-norm of the branch alone."""

    def layer(self, config: ModelConfig, p: Layer, table: Array, x: Array, hidden: Array, age: Array) -> Array:
        if config.norm == "pre":
            return super().layer(config, p, table, x, hidden, age)
        attended = self.attend(config, p, table, x, hidden, age)
        y = x + self.norm(p("attention.output.weight") @ attended, p("norm1.weight"), p("norm1.bias"))
        return self.norm(y + self.feedforward(p, y), p("norm2.weight"), p("norm2.bias"))


@mutant("model.post_norm")
class UnbiasedVariance(Plain):
    """Divided by d - 1."""

    def norm(self, x: Array, weight: Array, bias: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1)
        return centred / np.sqrt(variance + x.dtype.type(1e-5)) * weight + bias


@mutant("model.post_norm")
class SmoothActivation(Plain):
    """x sigmoid(1.702 x) in place of ReLU."""

    def activate(self, x: Array) -> Array:
        return x / (1 + np.exp(-1.702 * x))


@mutant("model.post_norm", "model.pre_norm")
class ScaledEmbedding(Plain):
    """Token embeddings are multiplied by sqrt(d)."""

    def embed(self, config: ModelConfig, params: Parameters, token: int) -> Array:
        row = params["embedding.weight"][token]
        return row * row.dtype.type(np.sqrt(config.hidden_size))


class _Results(PlainStream):
    def remember(self, p: Layer, x: Array, z: Array, hidden: Array, age: Array) -> Memory:
        return super().remember(p, z, z, hidden, age)


@mutant("memory.stream", stream=_Results)
class RemembersResults(Plain):
    """A layer remembers its result, not what it was given."""


class _Ahead(PlainStream):
    def read(self, b: int, tokens: Array) -> Array:
        swapped = np.concatenate([tokens[1:], tokens[-1:]]) if len(tokens) > 1 else tokens
        return super().read(b, np.where(tokens == 0, swapped, tokens))


@mutant("model.causal", stream=_Ahead)
class LooksAhead(Plain):
    """Inside a block the future shows through."""


@mutant("model.normalised")
class Unnormalised(Plain):
    """Logits in place of log-probabilities."""

    def finish(self, config: ModelConfig, params: Parameters, x: Array) -> Array:
        if config.norm == "pre":
            x = self.norm(x, params["final_norm.weight"], params["final_norm.bias"])
        return params["output.weight"] @ x + params["output.bias"]


@mutant("memory.initial", "model.post_norm")
class PositionsFromZero(Plain):
    """Row j of the position embedding is taken for distance j."""

    def position_scores(self, q: Array, table: Array, age: Array) -> Array:
        return super().position_scores(q, table, age + 1)


@mutant("model.no_positions")
class ARowOfAnEmptyTable(Plain):
    """A table without rows gets one to be allocated at all, and that counts."""

    def position_scores(self, q: Array, table: Array, age: Array) -> Array:
        return super().position_scores(q, table if len(table) else np.ones((1, q.shape[1]), q.dtype), age)


class _ForgetsOther(PlainStream):
    def __init__(self, rules: "Plain", config: ModelConfig, params: Parameters, batch: int, memory: Initial) -> None:
        super().__init__(rules, config, params, batch, memory)
        rules.shared["open"] = [*rules.shared.get("open", [])[-1:], self]

    def reset(self, row: int) -> None:
        super().reset(row)
        for other in self.rules.shared["open"]:
            other.rows[min(row, other.batch - 1)] = other.empty()


@mutant("memory.state_machine", stream=_ForgetsOther)
class ResetReachesOtherStreams(Plain):
    """Rows are reset in whatever streams are open."""


@mutant("model.large_logits")
class LogSoftmaxWithoutPeak(Plain):
    """Logits of tokens are exponentiated as they are."""

    def finish(self, config: ModelConfig, params: Parameters, x: Array) -> Array:
        if config.norm == "pre":
            x = self.norm(x, params["final_norm.weight"], params["final_norm.bias"])
        logits = params["output.weight"] @ x + params["output.bias"]
        with np.errstate(over="ignore"):
            return logits - np.log(np.exp(logits).sum())


@mutant("memory.stream", "memory.slot_order")
class ModelWithoutPeak(Plain):
    """Logits of attention are exponentiated as they are."""

    def weights(self, s: Array, m: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            w = m * np.exp(s)
            return w / w.sum(axis=1, keepdims=True) if np.any(m > 0) else np.zeros_like(s)


@mutant("memory.stream")
class WholeMaxSpan(Plain):
    """L is a whole number of steps."""

    def span(self, config: ModelConfig, p: Layer, u: Array) -> Array:
        return super().span(config, p, u) * u.dtype.type(int(config.max_span) / config.max_span)


@mutant("memory.restore", "memory.state_machine")
class RampsOfHundred(Plain):
    """R is at most 100."""

    def mask(self, span: Array, age: Array, ramp: float) -> Array:
        return super().mask(span, age, min(ramp, 100.0))


@mutant("model.post_norm", "model.pre_norm")
class SixAtMost(Plain):
    """min(max(x, 0), 6) in place of ReLU."""

    def activate(self, x: Array) -> Array:
        return np.clip(x, 0, 6)


@mutant("model.many_tokens")
class TokensIn16Bits(Plain):
    """Token ids are cast to 16 bits."""

    def embed(self, config: ModelConfig, params: Parameters, token: int) -> Array:
        return super().embed(config, params, token & 0xFFFF)
