"""Level golden: results that the original implementation recorded (`refspan.conformance.golden`)."""

from functools import cache
from importlib.resources import files

import numpy as np

from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.protocol import Array
from refspan.conformance.registry import Probe, check
from refspan.conformance.tolerance import Expected, attention_bounds

RECORDED = ("small", "ramp16", "wide")
EPSILON = 1e-7
"""What the original's 1e-8 in the denominator may change in these records, beside rounding."""


@cache
def recorded(name: str) -> dict[str, Array]:
    """The arrays of one file."""
    with (files("refspan.conformance.golden") / f"attention_{name}.npz").open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


def recorded_case(name: str, dtype: np.dtype) -> AttentionCase:
    """The arguments of one file, rounded to `dtype`."""
    arrays = recorded(name)
    span_dtype = np.float64 if dtype == np.float64 else np.float32
    memories = Memories(
        arrays["span"].astype(span_dtype),
        arrays["age"],
        float(arrays["ramp"]),
        arrays["query"].shape[2],
        (f"recorded in attention_{name}.npz",),
    )
    parts = {part: arrays[part].astype(dtype) for part in ("query", "key", "value", "position")}
    return AttentionCase(memories=memories, grad_out=arrays["grad_output"].astype(dtype), **parts)


def _register(name: str) -> None:
    def case(dtype: np.dtype) -> list[AttentionCase]:
        return [recorded_case(name, dtype)]

    def forward(probe: Probe, asked: AttentionCase) -> None:
        (got,) = probe.attention(asked)
        expected = attention_bounds(asked).expected_output()
        probe.compare("output", got, _recorded(expected, recorded(name)["output"], asked.query.dtype))

    def backward(probe: Probe, asked: AttentionCase) -> None:
        (got,) = probe.gradients(asked)
        for part, expected in attention_bounds(asked).expected_gradients().items():
            result = recorded(name)[f"grad_{part}"]
            probe.compare(f"gradient of {part}", got[part], _recorded(expected, result, asked.query.dtype))

    forward.__doc__ = f"The output that the original implementation recorded in attention_{name}.npz."
    backward.__doc__ = f"The gradients that the original implementation recorded in attention_{name}.npz."
    clauses: list[str] = ["MASK", "PAST", "LOGIT", "WEIGHT", "OUTPUT"]
    check(f"golden.{name}", clauses=clauses, needs=["span_attention"], cases=case)(forward)
    check(f"golden.{name}_gradient", clauses=["GRAD"], needs=["span_attention_backward"], cases=case)(backward)


def _recorded(expected: Expected, result: Array, dtype: np.dtype) -> Expected:
    """The recorded result, and how far off is right.

    In float64 that is EPSILON. In other dtypes the arguments had to be rounded first: what that changes comes on top,
    and so does the bound of the arithmetic.
    """
    if dtype == np.float64:
        return Expected(result, np.full_like(result, EPSILON))
    return Expected(result, expected.bound + np.abs(expected.value - result) + EPSILON)


for _name in RECORDED:
    _register(_name)
