"""Wrong trainers: what they keep from one block to the next, and what they take for the same."""

from typing import Any

import numpy as np

from refspan import ModelConfig, memory, model
from refspan.conformance.backends.reference import NumpyBackend
from refspan.conformance.mutants.registry import mutant
from refspan.conformance.mutants.training import Array, Patched


@mutant("training.span_loss")
class PriceOfTheFirstBlock(NumpyBackend):
    """The span-loss coefficient is that of the stream's first block, as in a graph that holds it."""

    def loss_and_gradients(
        self, config: ModelConfig, params: Any, tokens: Array, targets: Array, memory: Any, **options: Any
    ) -> Any:
        memory, price = memory or (None, options["span_loss_weight"])
        options["span_loss_weight"] = price
        losses, grads, after = super().loss_and_gradients(config, params, tokens, targets, memory, **options)
        return losses, grads, (after, price)


@mutant("training.two_streams")
class OneMemoryToLearnFrom(NumpyBackend):
    """The trainer goes on from what it learnt last, whatever stream that was of."""

    last: Any = None

    def loss_and_gradients(
        self, config: ModelConfig, params: Any, tokens: Array, targets: Array, memory: Any, **options: Any
    ) -> Any:
        if memory is not None and self._shapes(self.last) == self._shapes(memory):
            memory = self.last
        losses, grads, self.last = super().loss_and_gradients(config, params, tokens, targets, memory, **options)
        return losses, grads, self.last

    def _shapes(self, memory: Any) -> list[Any]:
        """Of rows and hidden states, layer by layer, however many memories there are."""
        hidden = [layer.contents["hidden"] for layer in memory or ()]
        return [(x.shape[0], x.shape[2]) for x in hidden]


@mutant("training.again")
class BlocksAreKnownByTheirMemory(NumpyBackend):
    """What came of the block that began with this memory is given again, whatever its tokens are now."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[Any, Any] = {}

    def loss_and_gradients(
        self, config: ModelConfig, params: Any, tokens: Array, targets: Array, memory: Any, **options: Any
    ) -> Any:
        if memory is not None and id(memory) in self.known:
            return self.known[id(memory)][0]
        answer = super().loss_and_gradients(config, params, tokens, targets, memory, **options)
        if memory is not None:
            self.known[id(memory)] = answer, memory
        return answer


@mutant("training.large_logits")
class UnlikelyTokensAreCapped(Patched):
    """-log(p + 1e-9) in place of -log p."""

    def replacement(self, original: Array) -> Array:
        return lambda xp, log_probs, targets: original(xp, np.log(np.exp(log_probs) + 1e-9), targets)


@mutant("training.large_logits")
class LogProbabilitiesAreClipped(Patched):
    """Log-probabilities are at least -10 where p - 1[target] is made."""

    module, target = model, "cross_entropy_backward"

    def replacement(self, original: Array) -> Array:
        return lambda xp, log_probs, targets: original(xp, np.maximum(log_probs, -10), targets)


@mutant("training.large")
class LearnsFrom64Memories(Patched):
    """Memories older than 64 steps are dropped between blocks."""

    module, target = memory, "expired"

    def replacement(self, original: Array) -> Array:
        return lambda xp, span, age, ramp: original(xp, span, age, ramp) | (age > 64)


@mutant("training.large")
class LearnsTokensInBytes(NumpyBackend):
    """Token ids are cast to 8 bits."""

    def loss_and_gradients(
        self, config: ModelConfig, params: Any, tokens: Array, *arguments: Any, **options: Any
    ) -> Any:
        return super().loss_and_gradients(config, params, tokens % 256, *arguments, **options)
