"""Shape of a model and the arrays that it consists of (clauses LAYER and MODEL)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from refspan.arrays import (
    LONGEST,
    SHORTEST_RAMP,
    Array,
    check_count,
    check_dtype,
    check_number,
    check_shape,
    namespace_of,
)
from refspan.span import initial_bias

if TYPE_CHECKING:
    import numpy as np

DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and settings of an Expire-Span Transformer.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range; the message names it.
    """

    vocab_size: int
    """V, number of tokens."""
    hidden_size: int
    """d."""
    feedforward_size: int
    layers: int
    heads: int
    """H."""
    head_size: int
    """D; H * D need not be d."""
    block_size: int
    """M, tokens that training processes together. Streaming takes blocks of any length."""
    max_span: float
    """L, steps."""
    ramp: float
    """R, steps, > 0."""
    span_temperature: float = 1.0
    norm: Literal["post", "pre"] = "post"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "feedforward_size", "layers", "heads", "head_size", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool):
                raise TypeError(f"{name}: got {value}, expected a whole number")
            object.__setattr__(self, name, check_count(name, value))  # a Python number, whatever it was
        for name in ("max_span", "ramp", "span_temperature"):
            value = getattr(self, name)
            number = check_number(name, value)
            if not (isfinite(number) and number > 0):
                raise ValueError(f"{name}: got {value}, expected a finite number > 0")
            if not isinstance(value, int):  # a float of NumPy would widen the arrays that it is multiplied by
                object.__setattr__(self, name, number)
        if self.ramp < SHORTEST_RAMP:
            raise ValueError(f"ramp: got {self.ramp}, expected at least {SHORTEST_RAMP:g}")
        for name in ("max_span", "ramp"):
            if getattr(self, name) > LONGEST:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at most {LONGEST:g} steps")
        if self.norm not in ("post", "pre"):
            raise ValueError(f"norm: got {self.norm!r}, expected 'post' or 'pre'")

    def to_dict(self) -> dict[str, Any]:
        """Settings by name, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "ModelConfig":
        """The opposite of `to_dict`; raises ValueError for a missing or unknown setting."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        missing = sorted({f.name for f in fields(cls)} - {"span_temperature", "norm"} - set(settings))
        if unknown or missing:
            wrong = f"unknown setting {unknown[0]!r}" if unknown else f"no setting {missing[0]!r}"
            raise ValueError(f"model config: {wrong}; expected {', '.join(sorted(known))}")
        return cls(**settings)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int | str, ...]]:
    """Name -> shape of every parameter, in the order of the model. "P" may be any number of positions, 0 too.

    Matrices are [out, in].
    """
    d, f, inner = config.hidden_size, config.feedforward_size, config.heads * config.head_size
    shapes: dict[str, tuple[int | str, ...]] = {
        "embedding.weight": (config.vocab_size, d),
        "position.weight": ("P", config.head_size),
    }
    for i in range(config.layers):
        layer: dict[str, tuple[int | str, ...]] = {
            "attention.query.weight": (inner, d),
            "attention.key.weight": (inner, d),
            "attention.value.weight": (inner, d),
            "attention.output.weight": (d, inner),
            "span.weight": (d,),
            "span.bias": (),
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "feedforward.in.weight": (f, d),
            "feedforward.in.bias": (f,),
            "feedforward.out.weight": (d, f),
            "feedforward.out.bias": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if config.norm == "pre":
        shapes |= {"final_norm.weight": (d,), "final_norm.bias": (d,)}
    return shapes | {"output.weight": (config.vocab_size, d), "output.bias": (config.vocab_size,)}


def check_parameters(config: ModelConfig, params: Mapping[str, Array]) -> Any:
    """The array namespace of the parameters, if they are what the config asks for.

    Raises:
        TypeError, ValueError: the first parameter, in the order of the model, that is missing, not known, of the wrong
            shape or dtype, or holds NaN or infinite numbers.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a ModelConfig")
    if not isinstance(params, Mapping):
        raise TypeError(f"params: got {type(params).__name__}, expected arrays by name, see parameter_shapes")
    expected = parameter_shapes(config)
    missing = [name for name in expected if name not in params]
    if missing:
        raise ValueError(f"parameter {missing[0]}: missing ({len(missing)} of {len(expected)} parameters are)")
    unknown = [name for name in params if name not in expected]
    if unknown:
        raise ValueError(f"parameter {unknown[0]}: not known to this config ({len(unknown)} such)")
    xp = namespace_of(**{f"parameter {name}": params[name] for name in expected})
    first = next(iter(expected))
    dtype = str(params[first].dtype).rsplit(".", maxsplit=1)[-1]
    for name, wanted in expected.items():
        check_shape(f"parameter {name}", params[name], wanted)
        check_dtype(xp, f"parameter {name}", params[name], DTYPES if name == first else (dtype,))
        if not bool(xp.all(xp.isfinite(params[name]))):
            raise ValueError(f"parameter {name}: holds NaN or infinite numbers")
    return xp


def initial_parameters(
    config: ModelConfig, seed: int, *, positions: int | None = None, span_start: float = 0.1, dtype: str = "float32"
) -> "dict[str, np.ndarray[Any, Any]]":
    """Parameters to start training from, as NumPy arrays.

    Matrices and biases are uniform in +-1/sqrt(in), embeddings normal (scaled by 1/sqrt(d) for tokens), norms the
    identity, and every span starts at `span_start` * max_span (SPAN).

    Args:
        config: the model.
        seed: of the random numbers.
        positions: P, rows of the position embedding; block_size by default.
        span_start: fraction of max_span, strictly between 0 and 1.
        dtype: of all parameters.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    positions = config.block_size if positions is None else positions
    params = {}
    for name, shape in parameter_shapes(config).items():
        sizes = tuple(positions if size == "P" else int(size) for size in shape)
        kind = name.rsplit(".", maxsplit=2)[-2]
        if kind in ("norm1", "norm2", "final_norm"):
            array = np.ones(sizes) if name.endswith("weight") else np.zeros(sizes)
        elif kind == "span":
            array = np.zeros(sizes) if name.endswith("weight") else np.asarray(initial_bias(span_start))
        elif kind in ("embedding", "position"):
            array = random.standard_normal(sizes) * (config.hidden_size**-0.5 if kind == "embedding" else 1)
        else:
            fan_in = config.feedforward_size if name.endswith("feedforward.out.bias") else config.hidden_size
            fan_in = sizes[1] if len(sizes) == 2 else fan_in
            array = random.uniform(-1, 1, sizes) * fan_in**-0.5
        params[name] = array.astype(dtype)
    return params
