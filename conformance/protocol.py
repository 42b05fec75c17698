"""What a backend offers: the seam that other people's implementations plug into.

Arrays in and out are NumPy. An operation that a backend lacks (missing, or None) is not offered: it is reported as
such and never counted as passed. The ages of one row are distinct, and spans lie in 0..max_span: float64 beside float64
queries, else float32. Results have the dtype of `query` (of `span` for masks and span gradients), and neither alias nor
change the arguments. `grad_out`, the gradient of the output, is what `refspan` itself calls `grad_output`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXAMPLES = 100
"""Cases per check, unless said otherwise."""
TIMEOUT = 10.0
"""Seconds that one answer may take, unless said otherwise."""

OPERATIONS = (
    "soft_mask",
    "span_attention",
    "span_attention_backward",
    "open_model",
    "loss_and_gradients",
    "initial_parameters",
)


class Stream(Protocol):
    """One batch of token streams through a model, as `Backend.open_model` returns it."""

    def step(self, tokens: NDArray[np.int64]) -> Array:
        """Tokens [B, M] -> log-probabilities [B, M, V]; consecutive calls continue the stream."""

    def memory_size(self) -> Sequence[int]:
        """Memories held, one number per layer, the longest row of the batch (optional)."""

    def reset(self, row: int) -> None:
        """One row of the batch starts anew, empty; the others go on (optional)."""

    def state(self) -> Any:
        """What the stream remembers, whatever it is made of; later steps do not change it (optional)."""

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned (optional)."""

    def rows_projected(self) -> int:
        """Memories projected to keys and values so far, over all rows and layers (optional; CACHE)."""


class Backend(Protocol):
    """An implementation of the specification. Every operation is optional; `name` is not.

    Also optional: `facts()`, pairs of words for the head of a report; `dtypes`, the dtypes of query, key and value that
    it takes; `thread_safe = False`, if it is not to be called from several threads at once.
    """

    name: str

    def soft_mask(self, span: Array, age: NDArray[np.int64], *, queries: int, ramp: float) -> Array:
        """Span [B, N], age [B, N] -> mask [B, M, N]."""

    def span_attention(
        self,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: NDArray[np.int64],
        *,
        ramp: float,
        position: Array | None = None,
    ) -> Array:
        """Query [B, H, M, D], key and value [B, H, N, D], span and age [B, N], position [P, D] -> [B, H, M, D]."""

    def span_attention_backward(
        self,
        grad_out: Array,
        query: Array,
        key: Array,
        value: Array,
        span: Array,
        age: NDArray[np.int64],
        *,
        ramp: float,
        position: Array | None = None,
    ) -> Mapping[str, Array]:
        """Gradients under the names "query", "key", "value", "span" and, if there is one, "position"."""

    def open_model(
        self,
        config: Any,
        params: Mapping[str, Array],
        *,
        batch: int,
        memory: Sequence[tuple[Array, NDArray[np.int64]]] | None = None,
    ) -> Stream:
        """Start `batch` streams. `memory`: None, or one (hidden [B, N, d], age [B, N]) pair per layer."""

    def loss_and_gradients(
        self,
        config: Any,
        params: Mapping[str, Array],
        tokens: NDArray[np.int64],
        targets: NDArray[np.int64],
        memory: Any,
        *,
        span_loss_weight: float = 0.0,
        span_limit: float | None = None,
    ) -> tuple[tuple[float, float], Mapping[str, Array], Any]:
        """One block of training: ((task loss, span loss), gradients by the names of `params`, memory for the next).

        `memory`: None to start empty, or what the call for the block before returned, whatever it is made of.
        It may come more than once: a block may be run again from what it began with.
        """

    def initial_parameters(self, config: Any, seed: int) -> Mapping[str, Array]:
        """Parameters to start training from."""
