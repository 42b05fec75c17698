"""Drawing the next token from what a model says of it."""

from math import isfinite

import numpy as np

from refspan.export.layout import Array


def sample(
    log_probs: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    random: np.random.Generator,
) -> int:
    """A token, drawn with its probability once this is sharpened and cut.

    In this order: log-probabilities are divided by `temperature`; the `top_k` most probable tokens are kept; of these,
    the fewest most probable ones whose share of what is left reaches `top_p`; one is drawn by its share of what is left
    then. Of tokens that are as probable, those with lower numbers are kept. Temperature 0 takes the most probable.

    Args:
        log_probs: [V], of any float dtype.
        temperature: >= 0.
        top_k: >= 1; None for all.
        top_p: above 0, at most 1; None for all.
        random: where chance comes from.

    Raises:
        ValueError: an argument out of range, or log-probabilities that are NaN or all -inf.
    """
    check_sampling(temperature, top_k, top_p)
    scores = np.asarray(log_probs, np.float64)
    if scores.ndim != 1 or np.any(np.isnan(scores)) or not np.any(scores > -np.inf):
        raise ValueError(f"log_probs: got shape {scores.shape}, expected [V] with numbers above -inf and no NaN")
    order = np.argsort(-scores, kind="stable")
    if temperature == 0:
        return int(order[0])
    kept = scores[order[:top_k]]
    with np.errstate(over="ignore"):  # a temperature next to 0 leaves -inf, or 0, of every difference
        weights = np.exp((kept - kept[0]) / temperature)  # [k], the most probable first
    shares = np.cumsum(weights) / np.sum(weights)
    if top_p is not None:
        shares = shares[: int(np.searchsorted(shares, top_p)) + 1]
    drawn = int(np.searchsorted(shares, random.uniform() * shares[-1], side="right"))
    return int(order[min(drawn, len(shares) - 1)])


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless these can be `sample`'s arguments."""
    if not (isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}, expected a finite number >= 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a number above 0, at most 1")
