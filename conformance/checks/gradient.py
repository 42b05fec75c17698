"""Level gradient: `span_attention_backward`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refspan.conformance.cases import AttentionCase
from refspan.conformance.checks.attention import PLAIN, SEVERAL_MEMORIES, SEVERAL_ROWS, some
from refspan.conformance.protocol import Array
from refspan.conformance.registry import Probe, check
from refspan.conformance.strategies import LARGE_SIZES, SIZES, TILE_SIZES, attention_cases, of_each_size
from refspan.conformance.tolerance import Expected, attention_bounds

NEEDS = ["span_attention_backward"]


def compare_gradients(probe: Probe, case: AttentionCase) -> None:
    """All gradients are those of the reference."""
    (got,) = probe.gradients(case)
    for name, expected in attention_bounds(case).expected_gradients().items():
        probe.compare(f"gradient of {name}", got[name], expected)


@check("gradient.values", clauses=["GRAD"], needs=NEEDS, cases=some())
def values(probe: Probe, case: AttentionCase) -> None:
    """All gradients are those of the reference."""
    compare_gradients(probe, case)


@check(
    "gradient.span",
    clauses=["GRAD", "MASK"],
    needs=NEEDS,
    cases=some(
        sizes=SEVERAL_MEMORIES,
        fates=("fades", "lives on"),
        ramps=(16.0, 3.0, 7.7, 128.0, 2.0),
        ages=("past", "stream", "gaps"),
        contents=("normal",),
    ),
)
def span(probe: Probe, case: AttentionCase) -> None:
    """A span learns from each query that finds its memory on the ramp: 1 / R of what the mask would, from all heads."""
    (got,) = probe.gradients(case)
    probe.compare("gradient of span", got["span"], attention_bounds(case).expected_gradients()["span"])


@check("gradient.position", clauses=["GRAD", "LOGIT"], needs=NEEDS, of_positions=True,
       cases=some(position=True, contents=("normal",)))  # fmt: skip
def position(probe: Probe, case: AttentionCase) -> None:
    """Position embeddings learn from every batch row, head and query, by distance; and queries learn from them."""
    compare_gradients(probe, case)


@check("gradient.no_positions", clauses=["GRAD", "LOGIT"], needs=NEEDS, of_positions=True,
       cases=some(position=True, reach=(0,), **PLAIN))  # fmt: skip
def no_positions(probe: Probe, case: AttentionCase) -> None:
    """A position table without rows, P = 0, has a gradient without rows."""
    compare_gradients(probe, case)


@check(
    "gradient.empty",
    clauses=["EMPTY", "GRAD"],
    needs=NEEDS,
    cases=some(fates=("expired", "ramp ends", "span 0"), ramps=(1.0, 2.0, 0.5), contents=("normal", "large logits")),
)
def empty(probe: Probe, case: AttentionCase) -> None:
    """A query that sees no memory passes no gradient."""
    compare_gradients(probe, case)


@check("gradient.large_logits", clauses=["GRAD", "WEIGHT"], needs=NEEDS, cases=some(contents=("large logits",)))
def large_logits(probe: Probe, case: AttentionCase) -> None:
    """Logits of +-10000 leave all gradients finite and right."""
    compare_gradients(probe, case)


@check(
    "gradient.expired",
    clauses=["GRAD", "DROP"],
    needs=NEEDS,
    cases=some(
        sizes=SEVERAL_MEMORIES, fates=("expired", "lives on", "fades"), ramps=(1.0, 2.0, 0.5), contents=("normal",)
    ),
)
def expired(probe: Probe, case: AttentionCase) -> None:
    """An expired memory gets no gradient, and what it contains changes no other."""
    bounds = attention_bounds(case)
    # at the very end of its ramp a memory is expired, but may learn what a moment less would have taught it
    dead = np.all((bounds.interval.high == 0) & ~bounds.interval.kink, axis=1)
    mask = dead[:, None, :, None]
    other = replace(
        case,
        key=np.where(mask, -3 * case.key, case.key),
        value=np.where(mask, 100, case.value).astype(case.value.dtype),
    )
    first, second = probe.gradients(case, other)
    expected = bounds.expected_gradients()
    for name, want in expected.items():
        probe.agree(
            f"gradient of {name} with other contents in expired memories", second[name], first[name], want.bound
        )
    for name in ("key", "value"):
        none = Expected(np.zeros(1), np.where(mask, 0, np.inf))
        probe.compare(f"gradient of {name} of expired memories", second[name], none)
    probe.compare(
        "gradient of span of expired memories", second["span"], Expected(np.zeros(1), np.where(dead, 0, np.inf))
    )


@check("gradient.slot_order", clauses=["GRAD", "DROP"], needs=NEEDS, cases=some(sizes=SEVERAL_MEMORIES))
def slot_order(probe: Probe, case: AttentionCase) -> None:
    """The order in which memories stand changes no gradient but its place."""
    order = np.random.default_rng(case.sizes[3]).permutation(case.sizes[3])
    first, second = probe.gradients(case, case.select(slots=order))
    for name, want in attention_bounds(case).expected_gradients().items():
        moved, bound = first[name], want.bound
        if name in ("key", "value", "span"):
            axis = 1 if name == "span" else 2
            moved, bound = np.take(moved, order, axis), np.take(bound, order, axis)
        probe.agree(f"gradient of {name} with memories in another order", second[name], moved, bound)


@check("gradient.batch_mates", clauses=["GRAD", "DROP"], needs=NEEDS, cases=some(sizes=SEVERAL_ROWS))
def batch_mates(probe: Probe, case: AttentionCase) -> None:
    """A row of a batch gets the same gradients alone as beside others; position gradients add up."""
    (together,) = probe.gradients(case)
    alone = probe.gradients(*[case.select(rows=slice(b, b + 1)) for b in range(case.sizes[0])])
    for name, want in attention_bounds(case).expected_gradients().items():
        parts = [part[name] for part in alone]
        whole = np.sum(np.stack(parts), axis=0, dtype=np.float64) if name == "position" else np.concatenate(parts)
        probe.agree(
            f"gradient of {name} of the rows one by one", whole.astype(parts[0].dtype), together[name], want.bound
        )


@check("gradient.block_split", clauses=["GRAD", "AGE"], needs=NEEDS, cases=some())
def block_split(probe: Probe, case: AttentionCase) -> None:
    """Gradients of a block are the sums of those of its queries one by one."""
    (together,) = probe.gradients(case)
    alone = probe.gradients(*[case.select(queries=slice(m, m + 1)) for m in range(case.sizes[2])])
    for name, want in attention_bounds(case).expected_gradients().items():
        parts = [part[name] for part in alone]
        if name == "query":
            whole = np.concatenate(parts, axis=2)
        else:
            whole = np.sum(np.stack(parts), axis=0, dtype=np.float64).astype(parts[0].dtype)
        rounding = len(parts) * np.finfo(parts[0].dtype).eps * sum(np.abs(part.astype(np.float64)) for part in parts)
        bound = np.nan_to_num(want.bound + (0 if name == "query" else rounding), nan=np.inf, posinf=np.inf)
        probe.agree(f"gradient of {name} of the queries one by one", whole, together[name], bound)


def _smooth(dtype: np.dtype) -> st.SearchStrategy[AttentionCase]:
    """Cases whose output can be differentiated: no kink within reach of the step that `directional` takes."""
    return attention_cases(
        dtype,
        sizes=[s for s in SIZES if s[3] > 0],
        fates=("fades", "lives on"),
        ages=("past", "stream", "gaps", "shuffled"),
        ramps=(16.0, 4096.0, 3.0, 7.7, 100.0),
        contents=("normal", "small integers"),
    )


@check("gradient.directional", clauses=["GRAD"], needs=["span_attention", "span_attention_backward"], cases=_smooth)
def directional(probe: Probe, case: AttentionCase) -> None:
    """Gradients agree with the backend's own forward: (f(x + h d) - f(x - h d)) / 2h = gradient . d, d random.

    What a finite step h adds is taken off: the same difference of the float64 reference, less its own gradient. What is
    left to allow is what rounding does to f.
    """
    rng = np.random.default_rng(case.query.size)
    step = 2.0**-3 if case.query.dtype == np.float16 else 2.0**-6
    names = [
        name
        for name in ("query", "key", "value", "span", "position")
        if name != "position" or case.position is not None
    ]
    values = {name: case.memories.span if name == "span" else getattr(case, name) for name in names}
    ups, downs, deltas = {}, {}, {}
    for name, x in values.items():
        direction = rng.standard_normal(x.shape)
        if name == "span":
            reach = 4 * step * np.abs(direction)
            direction = np.where(_near_kink(case, reach) | (x < reach), 0, direction)  # spans are >= 0
        ups[name], downs[name] = ((x + sign * step * direction).astype(x.dtype) for sign in (1, -1))
        deltas[name] = (ups[name].astype(np.float64) - downs[name].astype(np.float64)) / 2
    up, down = _moved(case, ups), _moved(case, downs)

    got_up, got_down = probe.attention(up, down)
    (got,) = probe.gradients(case)
    bounds, above, below = attention_bounds(case), attention_bounds(up), attention_bounds(down)
    g = case.grad_out.astype(np.float64)

    def slope(gradients: Mapping[str, Array]) -> float:
        return float(sum(np.sum(gradients[name].astype(np.float64) * deltas[name]) for name in names))

    expected = bounds.expected_gradients()
    curvature = np.sum(g * (above.output - below.output)) / 2 - slope({name: e.value for name, e in expected.items()})
    difference = np.sum(g * (got_up.astype(np.float64) - got_down.astype(np.float64))) / 2
    noise = np.sum(np.abs(g) * (above.output_bound + below.output_bound)) / 2
    for name in names:
        moved = deltas[name] != 0
        noise += np.sum(expected[name].bound[moved] * np.abs(deltas[name][moved]))
    allowed = Expected(np.asarray([difference - curvature]), np.asarray([noise]))
    probe.compare("gradient along a random direction, against outputs", np.asarray([slope(got)]), allowed)


def _near_kink(case: AttentionCase, reach: Array) -> Array:
    """[B, N], true where some query has its memory within `reach` of a kink."""
    remaining = case.memories.span.astype(np.float64)[:, None] - case.memories.distance
    near = np.minimum(np.abs(remaining), np.abs(remaining + case.memories.ramp)) <= reach[:, None]
    return np.asarray(np.any(near, axis=1))


def _moved(case: AttentionCase, values: Mapping[str, Array]) -> AttentionCase:
    arrays: dict[str, Any] = {name: x for name, x in values.items() if name != "span"}
    return replace(case.with_memories(span=values["span"]), **arrays)


@check("gradient.tiles", clauses=["GRAD"], needs=NEEDS, cases=of_each_size(TILE_SIZES, contents=("normal",)), cost=5)
def tiles(probe: Probe, case: AttentionCase) -> None:
    """Sizes just beyond those of a kernel's tiles: several of them, and a last one that is not full."""
    compare_gradients(probe, case)


@check(
    "gradient.large",
    clauses=["GRAD"],
    needs=NEEDS,
    cases=of_each_size(LARGE_SIZES, position=True, contents=("normal",)),
    cost=10,
)
def large(probe: Probe, case: AttentionCase) -> None:
    """Sizes that models have: hundreds of queries and memories, heads of 64 and 128 numbers, six rows."""
    compare_gradients(probe, case)
