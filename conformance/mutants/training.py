"""Wrong trainers: the reference with one of its functions replaced while it is asked, or its answer changed."""

from typing import Any
from unittest.mock import patch

import numpy as np

import refspan
from refspan import ModelConfig, layer, layer_norm, memory, model
from refspan.conformance.backends.reference import NumpyBackend
from refspan.conformance.mutants.registry import mutant

Array = Any
"""What NumPy makes of arrays."""


class Patched(NumpyBackend):
    """While a block is learnt, the function `target` of `module` is what `replacement` makes of it."""

    module, target = model, "cross_entropy"
    thread_safe = False  # the function is replaced for all threads, and by several of them for good

    def replacement(self, original: Array) -> Array:
        raise NotImplementedError

    def loss_and_gradients(self, *arguments: Any, **options: Any) -> Array:
        original = getattr(self.module, self.target)
        with patch.object(self.module, self.target, self.replacement(original)):
            return super().loss_and_gradients(*arguments, **options)


@mutant("training.task_loss")
class SumOverTokens(Patched):
    """The task loss is a sum, not a mean."""

    def replacement(self, original: Array) -> Array:
        return lambda xp, log_probs, targets: original(xp, log_probs, targets) * targets.size


@mutant("training.task_loss")
class FirstRowOnly(Patched):
    """The task loss of batch row 0."""

    def replacement(self, original: Array) -> Array:
        return lambda xp, log_probs, targets: original(xp, log_probs[:1], targets[:1])


@mutant("training.span_loss", seen_in="facebookresearch/transformer-sequential")
class LossOfRemainingSpans(Patched):
    """Remaining spans in place of spans, so that the loss is negative; its gradient is right."""

    target = "span_loss"

    def replacement(self, original: Array) -> Array:
        def span_loss(xp: Array, span: Array, age: Array, *, queries: Array, ramp: float, weight: Array) -> Array:
            remaining = span[:, None, :] - age[:, None, :] - np.arange(queries)[:, None]
            on_ramp = (remaining < 0) & (remaining > -ramp) & (age[:, None, :] + np.arange(queries)[:, None] >= 1)
            return float((remaining * on_ramp).sum()) * weight / (ramp * queries * len(span))

        return span_loss


@mutant("training.span_loss_weight", seen_in="a port of lucidrains/learning-to-expire-pytorch")
class CoefficientNeverApplied(NumpyBackend):
    """The span-loss coefficient is never applied."""

    def loss_and_gradients(self, *arguments: Any, span_loss_weight: Array = 0.0, span_limit: Array = None) -> Array:
        return super().loss_and_gradients(*arguments, span_loss_weight=0.5, span_limit=span_limit)


@mutant("training.span_loss_weight", "training.gradients")
class SpanLossTeachesNothing(NumpyBackend):
    """The span loss is reported, and left out of the gradients."""

    def loss_and_gradients(self, *arguments: Any, span_loss_weight: Array = 0.0, span_limit: Array = None) -> Array:
        losses, _, memory = super().loss_and_gradients(
            *arguments, span_loss_weight=span_loss_weight, span_limit=span_limit
        )
        _, grads, _ = super().loss_and_gradients(*arguments, span_limit=span_limit)
        return losses, grads, memory


@mutant("training.span_loss")
class PlateauIsChargedToo(Patched):
    """Every memory that is still live is charged, not only those on the ramp."""

    target = "span_loss"

    def replacement(self, original: Array) -> Array:
        def span_loss(xp: Array, span: Array, age: Array, *, queries: Array, ramp: float, weight: Array) -> Array:
            distance = age[:, None, :] + np.arange(queries)[:, None]
            live = (distance >= 1) & (distance < span[:, None, :] + ramp)
            return float((span[:, None, :] * live).sum()) * weight / (ramp * queries * len(span))

        return span_loss


@mutant("training.span_loss")
class SpanLossSummedOverTheBatch(Patched):
    """The batch mean is forgotten."""

    target = "span_loss"

    def replacement(self, original: Array) -> Array:
        return lambda xp, span, age, **options: original(xp, span, age, **options) * len(span)


@mutant("training.shortening", seen_in="lucidrains/learning-to-expire-pytorch")
class ShorteningDeletesMemories(Patched):
    """The limit of one step decides what is kept for all later ones."""

    module, target = memory, "expired"

    def loss_and_gradients(self, *arguments: Any, span_loss_weight: Array = 0.0, span_limit: Array = None) -> Array:
        self.limit = span_limit
        return super().loss_and_gradients(*arguments, span_loss_weight=span_loss_weight, span_limit=span_limit)

    def replacement(self, original: Array) -> Array:
        limit = np.inf if self.limit is None else self.limit
        return lambda xp, span, age, ramp: original(xp, np.minimum(span, limit), age, ramp)


@mutant("training.again")
class MemoryIsUsedUp(NumpyBackend):
    """What comes back as memory is filled in place, block by block: there is only the last one."""

    def loss_and_gradients(self, config: Array, params: Array, tokens: Array, targets: Array, memory: Array,
                           **options: Any) -> Array:  # fmt: skip
        kept = [] if memory is None else memory
        losses, grads, left = super().loss_and_gradients(
            config, params, tokens, targets, kept[0] if kept else None, **options
        )
        kept[:] = [left]
        return losses, grads, kept


@mutant("training.shortening")
class NeverShortens(NumpyBackend):
    """The limit is ignored."""

    def loss_and_gradients(self, *arguments: Any, span_loss_weight: Array = 0.0, span_limit: Array = None) -> Array:
        return super().loss_and_gradients(*arguments, span_loss_weight=span_loss_weight)


@mutant("training.gradients")
class ShortenedSpansLearn(Patched):
    """Spans that were cut short get the gradient of what is left of them."""

    module, target = layer, "shorten_backward"

    def replacement(self, original: Array) -> Array:
        return lambda xp, grad, span, limit: grad


@mutant("training.gradients")
class TemperatureForgottenInTheGradient(Patched):
    """The span predictor's weight learns as if nothing divided the hidden states."""

    module, target = layer, "expire_span_backward"

    def replacement(self, original: Array) -> Array:
        def backward(
            xp: Array,
            grad_span: Array,
            hidden: Array,
            weight: Array,
            bias: Array,
            *,
            max_span: Array,
            temperature: Array,
        ) -> Array:
            grad_hidden, grad_weight, grad_bias = original(
                xp, grad_span, hidden, weight, bias, max_span=max_span, temperature=temperature
            )
            return grad_hidden, grad_weight * temperature, grad_bias

        return backward


@mutant("training.gradients")
class LastTokenWins(Patched):
    """Gradients of embeddings are assigned, not added: of tokens that repeat the last one counts."""

    target = "embedding_backward"

    def replacement(self, original: Array) -> Array:
        def backward(xp: Array, grad_rows: Array, tokens: Array, weight: Array) -> Array:
            grad = np.zeros_like(weight)
            grad[tokens.reshape(-1)] = grad_rows.reshape(-1, weight.shape[1])
            return grad

        return backward


@mutant("training.gradients")
class BlockKeysAreConstants(Patched):
    """The block's own keys and values are taken for memories, from which no gradient flows."""

    module, target = layer, "span_attention_backward"

    def replacement(self, original: Array) -> Array:
        def backward(grad_output: Array, saved: Array) -> Array:
            grads = original(grad_output, saved)
            own = (saved.age <= 0)[:, None, :, None]
            return grads._replace(key=np.where(own, 0, grads.key), value=np.where(own, 0, grads.value))

        return backward


@mutant("training.gradients")
class NormWithoutMeanGradient(Patched):
    """Layer norm's backward forgets that the mean depends on every number."""

    module, target = layer, "layer_norm_backward"

    def replacement(self, original: Array) -> Array:
        def backward(xp: Array, grad_y: Array, x: Array, weight: Array) -> Array:
            grad_x, grad_weight, grad_bias = original(xp, grad_y, x, weight)
            deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
            return grad_x + (grad_y * weight).mean(axis=-1, keepdims=True) / deviation, grad_weight, grad_bias

        return backward


@mutant("training.task_loss")
class MemoryIsThrownAway(NumpyBackend):
    """Every block starts empty."""

    def loss_and_gradients(
        self, config: ModelConfig, params: Array, tokens: Array, targets: Array, memory: Array, **options: Any
    ) -> Array:
        return super().loss_and_gradients(config, params, tokens, targets, None, **options)


@mutant("training.gradients", "training.task_loss")
class TrainsWithASmallerEpsilon(NumpyBackend):
    """Norms add 1e-6 to the variance, not 1e-5."""

    thread_safe = False  # the number is replaced for all threads

    def loss_and_gradients(self, *arguments: Any, **options: Any) -> Array:
        with patch.object(layer_norm, "EPSILON", 1e-6):
            return super().loss_and_gradients(*arguments, **options)


@mutant("training.initial_spans", seen_in="lucidrains/learning-to-expire-pytorch")
class BiasAtMinusMaxSpan(NumpyBackend):
    """The bias starts at -max_span, where the sigmoid underflows and spans can never learn."""

    def initial_parameters(self, config: ModelConfig, seed: Array) -> Array:
        params = super().initial_parameters(config, seed)
        return {n: np.float32(-config.max_span) * np.ones((), "f4") if n.endswith("span.bias") else x
                for n, x in params.items()}  # fmt: skip


@mutant("training.initial_spans")
class SpansStartAtRandom(NumpyBackend):
    """The weight of the span predictor starts as other weights do."""

    def initial_parameters(self, config: ModelConfig, seed: Array) -> Array:
        params = refspan.initial_parameters(config, seed)
        rng = np.random.default_rng(seed)
        return {n: x + 0.1 * rng.standard_normal(x.shape).astype("f4") if n.endswith("span.weight") else x
                for n, x in params.items()}  # fmt: skip


@mutant("training.gradients")
class SlopeFromLargeExponentials(Patched):
    """The sigmoid's slope is exp(|z|) / (1 + exp(|z|))^2, which overflows once spans are all but 0 or L."""

    module, target = layer, "expire_span_backward"

    def replacement(self, original: Array) -> Array:
        def backward(
            xp: Array,
            grad_span: Array,
            hidden: Array,
            weight: Array,
            bias: Array,
            *,
            max_span: float,
            temperature: float,
        ) -> Array:
            z = np.abs(hidden @ weight / temperature + bias)
            slope = np.exp(z) / (1 + np.exp(z)) ** 2 / (np.exp(-z) / (1 + np.exp(-z)) ** 2)  # 1, or NaN
            return original(xp, grad_span * slope, hidden, weight, bias, max_span=max_span, temperature=temperature)

        return backward
