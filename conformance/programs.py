"""What checks ask of models: a program of steps, resets and restores over one stream or several.

A program is data, so Hypothesis draws and shrinks it, a report can show it, and it travels to another process. It is
run as a whole (`running`): what matters about a stream is what it remembers from one call to the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refspan.config import ModelConfig
from refspan.conformance.protocol import Array


def _tokens(tokens: Array) -> str:
    """Tokens as a report shows them, or if they are many how many."""
    return str(tokens.tolist()) if tokens.size <= 24 else f"[{'x'.join(map(str, tokens.shape))}]"


@dataclass(frozen=True)
class Open:
    """Open a stream under a name; a name may be opened anew."""

    stream: str
    config: ModelConfig
    params: Mapping[str, Array]
    batch: int
    memory: Sequence[tuple[Array, Array]] | None = None

    def __str__(self) -> str:
        start = "empty" if self.memory is None else f"with {self.memory[0][1].shape[1]} memories"
        return f"{self.stream} = open_model(batch={self.batch}, {start})"


@dataclass(frozen=True)
class Step:
    """Read a block; the answer is its log-probabilities."""

    stream: str
    tokens: Array
    """[B, M] int64"""

    def __str__(self) -> str:
        return f"{self.stream}.step({_tokens(self.tokens)})"


@dataclass(frozen=True)
class Reset:
    """Empty one row; the answer is None."""

    stream: str
    row: int

    def __str__(self) -> str:
        return f"{self.stream}.reset({self.row})"


@dataclass(frozen=True)
class Size:
    """Ask how much is held; the answer is one number per layer."""

    stream: str

    def __str__(self) -> str:
        return f"{self.stream}.memory_size()"


@dataclass(frozen=True)
class Save:
    """Keep the state of a stream under a name."""

    stream: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} = {self.stream}.state()"


@dataclass(frozen=True)
class Restore:
    """Go on from a kept state."""

    stream: str
    name: str

    def __str__(self) -> str:
        return f"{self.stream}.restore({self.name})"


@dataclass(frozen=True)
class Projected:
    """Ask how many memories were projected to keys and values so far."""

    stream: str

    def __str__(self) -> str:
        return f"{self.stream}.rows_projected()"


@dataclass(frozen=True)
class Learn:
    """One block of training; the answer is the two losses and the gradients. Memories go from call to call."""

    stream: str
    config: ModelConfig
    params: Mapping[str, Array]
    tokens: Array
    """[B, M] int64"""
    targets: Array
    """[B, M] int64"""
    span_loss_weight: float = 0.0
    span_limit: float | None = None
    again: bool = False
    """From the memory that the block before it began with, not from what that left."""

    def __str__(self) -> str:
        options = f"span_loss_weight={self.span_loss_weight:g}, span_limit={self.span_limit}"
        again = ", from the same memory as before" if self.again else ""
        return (
            f"loss_and_gradients({self.stream}, {_tokens(self.tokens)}, {_tokens(self.targets)}, .., {options}){again}"
        )


@dataclass(frozen=True)
class Initialise:
    """Parameters to start from; the answer is what they are."""

    stream: str
    config: ModelConfig
    seed: int

    def __str__(self) -> str:
        return f"initial_parameters({self.config}, seed={self.seed})"


Operation = Open | Step | Reset | Size | Save | Restore | Projected | Learn | Initialise
Program = Sequence[Operation]
