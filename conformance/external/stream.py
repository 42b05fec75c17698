"""What a command keeps for us under a name: streams, states, memories of training."""

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from refspan.conformance.external.wire import NOTHING
from refspan.conformance.protocol import Array

if TYPE_CHECKING:
    from refspan.conformance.external.backend import CommandBackend


class Kept:
    """Something that the command keeps under a name; it is told when we do not need it any more."""

    def __init__(self, backend: "CommandBackend", name: str) -> None:
        self.name = name
        self._backend = backend
        weakref.finalize(self, backend.forget, name)


class Stream(Kept):
    """A stream that the command keeps, of a model of so many tokens."""

    def __init__(self, backend: "CommandBackend", name: str, vocab_size: int) -> None:
        super().__init__(backend, name)
        self._vocab_size = vocab_size

    def step(self, tokens: Array) -> Any:
        """As in the protocol."""
        like = {"log_probs": tokens.size * self._vocab_size}
        return self._ask("step", {"tokens": tokens}, like)[1].get("log_probs")

    def reset(self, row: int) -> None:
        """As in the protocol."""
        self._ask("reset", row=row)

    def memory_size(self) -> Any:
        """As in the protocol."""
        return self._ask("memory_size")[0].get("value")

    def rows_projected(self) -> Any:
        """As in the protocol."""
        return self._ask("rows_projected")[0].get("value")

    def state(self) -> Kept:
        """As in the protocol."""
        kept = Kept(self._backend, self._backend.new_name("state"))
        self._ask("state", state=kept.name)
        return kept

    def restore(self, state: Kept) -> None:
        """As in the protocol."""
        self._ask("restore", state=state.name)

    def _ask(
        self,
        operation: str,
        tensors: Mapping[str, Array] | None = None,
        expected: Mapping[str, int] = NOTHING,
        **options: Any,
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        return self._backend.ask({"operation": operation, "stream": self.name, **options}, tensors or {}, expected)
