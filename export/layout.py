"""What the state of a streaming model consists of: the tensors that each layer's function takes and returns."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refspan.config import ModelConfig

LAYOUT = "1"
"""Version of the inputs and outputs described here."""

_ALIGNED = 8
"""CUDA kernels of Attention take head sizes that are a multiple of this."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Layout:
    """Sizes of a state, and what depends on form and dtype."""

    config: ModelConfig
    positions: int
    """P"""
    form: str
    dtype: str

    @property
    def wide(self) -> str:
        """The dtype of spans (WIDTH)."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def key_width(self) -> int:
        """E: a key of D numbers, and those behind them that `distant_attention` explains."""
        size = self.config.head_size + self.log_numbers
        return -(-size // _ALIGNED) * _ALIGNED if self.form == "fused" else size

    @property
    def value_width(self) -> int:
        """E': as wide as keys in the fused form, else D."""
        return self.key_width if self.form == "fused" else self.config.head_size

    @property
    def log_numbers(self) -> int:
        """Numbers of a query that carry the logarithm: in float16 one more, for what rounding took off."""
        return 2 if self.dtype == "float16" else 1

    def state_tensors(self) -> dict[str, "StateTensor"]:
        """Name -> what it is in each layer; it comes in as `layers.{i}.NAME` and goes out as `layers.{i}.NAME.next`."""
        heads, size = self.config.heads, self.config.head_size
        recent = ("B", self.positions, heads, size)
        about = "of the last P steps, oldest first; age P - j at place j"
        return {
            "recent_key": StateTensor(self.dtype, recent, f"keys {about}"),
            "recent_value": StateTensor(self.dtype, recent, f"values {about}"),
            "recent_span": StateTensor(self.wide, ("B", self.positions), f"expire-spans {about}; -inf: empty"),
            "distant_key": StateTensor(
                self.dtype,
                ("B", heads, "C", self.key_width),
                "keys of older memories, any order; slot 0 is none: its number D is 1 (D + 1 too in float16), others 0",
                in_place=True,
            ),
            "distant_value": StateTensor(
                self.dtype,
                ("B", heads, "C", self.value_width),
                "values of older memories; slot 0 is 0, but for number D, where there is one, which is 1",
                in_place=True,
            ),
            "distant_span": StateTensor(
                self.wide, ("B", "C"), "expire-spans of older memories; -inf: empty; slot 0: inf"
            ),
            "distant_age": StateTensor("int64", ("B", "C"), "steps from older memories to the block's first query"),
        }

    def ports(self) -> "tuple[dict[str, Port], dict[str, Port]]":
        """Inputs and outputs of a whole model: name -> dtype and shape."""
        layers, state = range(self.config.layers), self.state_tensors()
        inputs: dict[str, Port] = {
            "tokens": ("int64", ("B", "M")),
            "lengths": ("int64", ("B",)),
            "restart": ("bool", ("B",)),
        }
        outputs: dict[str, Port] = {
            "log_probs": (self.dtype, ("B", "M", self.config.vocab_size)),
            "live": ("int64", (self.config.layers, "B", 3)),
        }
        inputs |= {f"layers.{i}.{name}": (t.dtype, t.shape) for i in layers for name, t in state.items()}
        outputs |= {f"layers.{i}.{name}.next": (t.dtype, t.shape) for i in layers for name, t in state.items()}
        return inputs, outputs


Port = tuple[str, tuple[int | str, ...]]
"""Dtype and shape of an input or output; a size that is text may be any."""


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state."""

    dtype: str
    shape: tuple[int | str, ...]
    """B: batch, C: slots of this layer."""
    meaning: str
    in_place: bool = False
    """Whether input and output may be the same memory."""
