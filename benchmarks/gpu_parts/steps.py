"""The attention step that contenders are timed with, and what a right answer is."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import refspan

RAMP = 128.0
ERROR_LIMIT = {"float16": 2e-2, "float32": 1e-4}
"""Largest error, relative to the largest number of the reference, with which a result counts as correct."""


@dataclass(frozen=True)
class Case:
    """One attention step to time."""

    batch: int
    heads: int
    memories: int
    dtype: str
    backward: bool = False
    queries: int = 512
    head_size: int = 64


@lru_cache(maxsize=2)
def arguments_of(case):
    """Query, key, value and upstream gradient as NumPy arrays; sections share them."""
    rng = np.random.default_rng(0)
    shapes = [case.queries, case.memories, case.memories, case.queries]
    names = ["query", "key", "value", "grad_output"]
    return {
        name: rng.standard_normal((case.batch, case.heads, n, case.head_size), dtype=np.float32).astype(case.dtype)
        for name, n in zip(names, shapes, strict=True)
    }


def memories_of(case, alive):
    """Spans and ages: a share of memories is alive, one in twenty of these fading during the block."""
    rng = np.random.default_rng(1)
    age = np.tile(np.arange(case.memories, 0, -1, dtype=np.int64) + int(RAMP), (case.batch, 1))
    span = np.full(age.shape, 1e6, np.float32)
    dead = rng.permuted(np.tile(np.arange(case.memories), (case.batch, 1)), axis=1) >= alive * case.memories
    fading = (rng.random(age.shape) < 0.05) & ~dead
    span[fading] = age[fading] + case.queries / 2 - 0.5
    span[dead] = 0
    return {"span": span, "age": age}, int((~dead).sum())


def expected_of(case, data):
    """The float64 reference: all gradients, or the outputs of the first and last head of the first and last row."""
    x = {name: a if name == "age" else a.astype(np.float64) for name, a in data.items() if case.backward}
    pick = np.ix_([0, -1], [0, -1])
    for name, a in () if case.backward else data.items():
        x[name] = a[[0, -1]] if a.ndim == 2 else a[pick].astype(np.float64)
    out, saved = refspan.span_attention(*(x[n] for n in ("query", "key", "value", "span", "age")), ramp=RAMP)
    return list(refspan.span_attention_backward(x["grad_output"], saved)[:4]) if case.backward else [out]


def compare(got, expected, case):
    """Largest error, relative to the largest number expected, over all results."""
    got = got if case.backward else [got[0][np.ix_([0, -1], [0, -1])]]
    errors = [np.abs(g - e).max() / np.abs(e).max() for g, e in zip(got, expected, strict=True)]
    return {"max_relative_error": float(max(errors)), "correct": bool(max(errors) <= ERROR_LIMIT[case.dtype])}
