"""Log-probabilities and the task loss (part of clause MODEL): mean negative log-likelihood of the next tokens."""

from typing import Any

from refspan.arrays import Array, device_of


def log_softmax(xp: Any, logits: Array) -> Array:
    """log(exp(x) / sum exp(x)) over the last axis, the largest x subtracted first.   [.., V] -> [.., V]."""
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def cross_entropy(xp: Any, log_probs: Array, targets: Array) -> float:
    """-mean over tokens of log p(target), in nats.   [B, M, V], [B, M]."""
    return -float(xp.sum(xp.where(_is_target(xp, log_probs, targets), log_probs, 0))) / max(1, _size(targets))


def cross_entropy_backward(xp: Any, log_probs: Array, targets: Array) -> Array:
    """Gradient of `cross_entropy(log_softmax(logits))` with respect to the logits: (p - 1[target]) / tokens.

    d log p_target / dx_v = 1[v = target] - p_v, because every logit adds its share p_v to the normalisation.

    [B, M, V], [B, M] -> [B, M, V].
    """
    is_target = xp.astype(_is_target(xp, log_probs, targets), log_probs.dtype)
    return (xp.exp(log_probs) - is_target) / max(1, _size(targets))


def _is_target(xp: Any, log_probs: Array, targets: Array) -> Array:
    vocabulary = xp.arange(log_probs.shape[-1], dtype=targets.dtype, device=device_of(targets))
    return targets[..., None] == vocabulary  # [B, M, V]


def _size(x: Array) -> int:
    count = 1
    for size in x.shape:
        count *= size
    return count
