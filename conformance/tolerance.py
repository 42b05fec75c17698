"""How far a right answer may be from the exact one: the only place where tolerances are decided.

Nothing here is tuned. Each bound is a running error analysis in the style of Higham (Accuracy and Stability of
Numerical Algorithms, ch. 3): a sum of n products in arithmetic of unit roundoff u is off by at most about n u times the
sum of their magnitudes, in whatever order it is added up, and every later step passes the error on times its own
derivative. Expected values come from the float64 reference; u is that of the arithmetic under test.

Four things need more than a multiple of u.

- Mask. Near its two kinks and where it vanishes, the mask is only known to lie in an interval, because span - distance
  is rounded (float32 at a span of 131072: steps of 1/128). Where span and ramp lie on a common binary grid on which all
  sums are exact, and the ramp is a power of two, the interval is a point: such cases allow no error at all.
- Weights. A relative error eta_i of m_i exp(s_i) moves the output by at most
  sum_i a_i eta_i |v_i - o| / (1 - sum_i a_i eta_i). When that says nothing (logits of 1e4 in half precision, or all
  survivors uncertain), the output must still lie in the hull of the values that may be alive: weights are >= 0 and sum
  to 1.
- Gradients. Weights may be made again in backward, from what forward kept of the normaliser: exp(s' - log Z), where s'
  is rounded otherwise than the s in Z. So a weight may exceed 1 by eta, and the weights of a query need not sum to 1.
  They are weights still, so that twice of what they should be is the most, however coarse the logits.
- Gradient of span. At a kink any value between the two one-sided derivatives conforms. So a query for which the mask
  may lie on either side adds its whole contribution to the bound.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import frexp

import numpy as np

import refspan
from refspan.conformance.cases import AttentionCase, Memories
from refspan.conformance.memo import remembered
from refspan.conformance.protocol import Array


@dataclass(frozen=True)
class Expected:
    """The exact result and how far from it a conforming one may be, elementwise; a bound of inf decides nothing."""

    value: Array
    bound: Array


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic that a result is allowed to have been computed in."""

    u: float
    """Unit roundoff, plus that of the float64 oracle."""
    tiny: float
    """What may be lost to underflow in one operation."""
    largest: float

    @classmethod
    def of(cls, dtype: np.dtype) -> "Arithmetic":
        """Half precision keeps its subnormals (its smallest normal number is not small); others may flush them."""
        info = np.finfo(dtype)
        tiny = info.smallest_subnormal if dtype == np.float16 else info.smallest_normal
        return cls(float(info.eps) / 2 + 2.0**-53, float(tiny), float(info.max))


@dataclass(frozen=True)
class MaskInterval:
    """Every value that float32-or-wider arithmetic may give the mask. All arrays are [B, M, N]."""

    exact: Array
    low: Array
    high: Array
    kink: Array
    """True where the mask may lie on either side of a kink, so that its derivative may be 0 or 1 / R."""


def mask_interval(memories: Memories) -> MaskInterval:
    """Bounds of m = clip(1 + (span - distance) / R, 0, 1), whatever the order of its sums and its division."""
    u = Arithmetic.of(memories.span.dtype).u
    ramp, distance = memories.ramp, memories.distance
    span = memories.span.astype(np.float64)[:, None, :]  # [B, 1, N]
    age = np.abs(memories.age.astype(np.float64))[:, None, :]
    remaining = span - distance  # [B, M, N]

    largest = np.abs(span) + age + memories.queries + ramp  # no partial sum exceeds it
    digits = np.finfo(memories.span.dtype).nmant + 1
    grid = np.exp2(np.ceil(np.log2(largest)) - digits)
    on_grid = (np.mod(span, grid) == 0) & (np.mod(ramp, grid) == 0) & (grid <= 1)
    binary = frexp(ramp)[0] == 0.5

    remaining_error = np.where(on_grid & binary, 0, 3 * u * largest)  # (1 + (span - age) / R) - m / R, for example
    slope = remaining / ramp
    error = remaining_error / ramp + (0 if binary else 3 * u * np.abs(slope))
    error = error + np.where(on_grid & binary, 0, u * np.minimum(np.abs(1 + slope), 1))

    past = distance >= 1
    low, exact, high = (np.where(past, np.clip(1 + slope + e, 0, 1), 0) for e in (-error, 0, error))
    kink = past & ((np.abs(slope) <= error) | (np.abs(1 + slope) <= error))
    return MaskInterval(exact, low, high, kink)


@remembered
def expected_mask(memories: Memories) -> Expected:
    """Expected `soft_mask`."""
    interval = mask_interval(memories)
    u = Arithmetic.of(memories.span.dtype).u
    value = refspan.soft_mask(**{**memories.arguments(), "span": memories.span.astype(np.float64)})
    exact = (interval.low == interval.high) & ((value == 0) | (value == 1))
    bound = np.maximum(interval.high - value, value - interval.low) + np.where(exact, 0, u * value)
    return Expected(value, bound)


AT_ONCE = 2**14
"""Numbers of a product over queries, memories and channels that are made at once: as many as caches hold."""


class AttentionBounds:
    """Error bounds of one attention step and of its gradients, in the notation of `refspan.attention`.

    All arrays with t and i are [B, H, M, N]; a stands for weights, eta for relative and `*_error` for absolute errors.
    """

    def __init__(self, case: AttentionCase) -> None:
        self.case = case
        self.wide = _float64(case)
        self.arithmetic = Arithmetic.of(case.query.dtype)
        self.output, self._saved = refspan.span_attention(**self.wide.arguments())
        with np.errstate(all="ignore"):
            self._weights()

    def _weights(self) -> None:
        """Weights and how far they may be off."""
        case, u = self.wide, self.arithmetic.u
        _, _, _, memories, head_size = case.sizes
        interval = mask_interval(self.case.memories)
        self.interval = interval
        m, low, high = (x[:, None] for x in (interval.exact, interval.low, interval.high))  # [B, 1, M, N]
        mask_error = np.maximum(high - m, m - low)

        scale = 1 / np.sqrt(head_size)
        q, k = case.query, case.key
        logits = q @ np.swapaxes(k, -1, -2) * scale
        size = np.abs(q) @ np.swapaxes(np.abs(k), -1, -2) * scale  # sum of magnitudes behind each logit
        if case.position is not None:
            logits = logits + self._at_distance(q @ case.position.T) * scale
            size = size + self._at_distance(np.abs(q) @ np.abs(case.position).T) * scale

        alive = m > 0
        log_mask = np.where(alive, np.log(np.where(alive, m, 1)), 0)
        live_logits = np.where(alive, logits, -np.inf)
        peak = np.max(live_logits, axis=-1, keepdims=True, initial=-np.inf)
        peak = np.where(np.isfinite(peak), peak, 0)
        spread = np.max(np.where(alive, np.abs(logits) + np.abs(log_mask), 0), axis=-1, keepdims=True, initial=0)
        # logit, log of the mask, their sum, the subtraction of the largest, the exponential
        logit_error = u * ((2 * head_size + 8) * size + 4 * (np.abs(logits) + np.abs(log_mask)) + 2 * spread + 8)
        eta = np.expm1(np.minimum(logit_error, 50.0))

        raw = np.exp(logits - peak)  # exp(s), the mask left out; infinite if that of an expired memory is
        total = np.sum(np.where(alive, m * raw, 0), axis=-1, keepdims=True)
        some = total > 0
        self.unmasked = np.where(some, raw / np.where(some, total, 1), np.inf)  # exp(s) / Z
        self.a = np.where(alive & some, m * raw / np.where(some, total, 1), 0)
        moved = self.a * eta + np.where(mask_error > 0, self.unmasked * mask_error * (1 + eta), 0)
        all_moved = np.sum(moved, axis=-1, keepdims=True)
        self.growth = np.where(all_moved < 0.5, 1 / (1 - np.minimum(all_moved, 0.5)), np.inf)
        self.moved, self.all_moved, self.eta = moved, all_moved, eta
        self.possible = np.broadcast_to(high > 0, moved.shape)
        self.may_be_empty = np.all(np.broadcast_to(low, moved.shape) == 0, axis=-1, keepdims=True)  # [B, H, M, 1]
        self.size = size
        self._output_bound(memories)

    @cached_property
    def row(self) -> Array:
        """The position of each memory, by its distance; P if there is none.   [B, 1, M, N]."""
        assert self.case.position is not None  # noqa: S101
        distance, positions = self.case.memories.distance[:, None], len(self.case.position)
        return np.where((distance >= 1) & (distance <= positions), distance - 1, positions)

    def _at_distance(self, by_position: Array) -> Array:
        """What each memory gets of [B, H, M, P]: the number at its distance, 0 beyond P.   [B, H, M, N]."""
        padded = np.pad(by_position, ((0, 0), (0, 0), (0, 0), (0, 1)))
        row = np.broadcast_to(self.row, (*by_position.shape[:-1], self.row.shape[-1]))
        return np.take_along_axis(padded, row, axis=-1)

    def _output_bound(self, memories: int) -> None:
        """|o~ - o| <= sum_i |a~_i - a_i| |v_i - o|, or the hull of the values that may be alive."""
        u, tiny, v = self.arithmetic.u, self.arithmetic.tiny, self.wide.value
        first_order, hull, largest = (np.empty_like(self.output) for _ in range(3))
        for t in self._some_queries():
            away = np.abs(v[:, :, None] - self.output[t][:, :, :, None])  # |v_i - o_t|   [B, H, some M, N, D]
            possible = self.possible[t][..., None]
            first_order[t] = np.einsum("bhmn,bhmnd->bhmd", self.moved[t], away)
            hull[t] = np.max(np.where(possible, away, 0), axis=3, initial=0)
            largest[t] = np.max(np.where(possible, np.abs(v)[:, :, None], 0), axis=3, initial=0)
        first_order = first_order * self.growth
        first_order = np.where(np.isnan(first_order), np.inf, first_order)
        hull = np.maximum(hull, np.where(self.may_be_empty, np.abs(self.output), 0))
        rounding = u * (memories + 8) * (self.a @ np.abs(v)) + 4 * u * np.abs(self.output) + tiny * memories * largest
        vague = u * (memories + 8) * largest
        self.output_bound = np.where(first_order < hull, first_order + rounding, hull + vague) + np.where(
            largest > 0, tiny, 0
        )

    def _some_queries(self) -> Iterator[tuple[slice, slice, slice]]:
        """All queries, a few at a time, so that [B, H, these, N, D] has some `AT_ONCE` numbers."""
        queries = self.output.shape[2]
        some = max(1, AT_ONCE * queries // max(1, self.a.size * self.output.shape[3]))
        for first in range(0, queries, some):
            yield np.s_[:, :, first : first + some]

    def expected_output(self) -> Expected:
        """Expected `span_attention`."""
        return self._finish(self.output, self.output_bound)

    def expected_gradients(self) -> dict[str, Expected]:
        """Expected `span_attention_backward` for the upstream gradient of the case."""
        return self._gradients

    @cached_property
    @np.errstate(all="ignore")
    def _gradients(self) -> dict[str, Expected]:
        case, u, tiny = self.wide, self.arithmetic.u, self.arithmetic.tiny
        batch, heads, queries, memories, head_size = case.sizes
        g, q, k, v = case.grad_out, case.query, case.key, case.value
        scale = 1 / np.sqrt(head_size)
        exact = refspan.span_attention_backward(g, self._saved)

        grad_a = g @ np.swapaxes(v, -1, -2)  # da_ti = g_t . v_i
        grad_a_error = u * (head_size + 2) * (np.abs(g) @ np.swapaxes(np.abs(v), -1, -2)) + tiny
        again = np.minimum(self.eta, 1)  # of a weight that backward made again
        c = np.sum(g * self.output, axis=-1, keepdims=True)  # [B, H, M, 1]
        c_error = np.sum(np.abs(g) * (self.output_bound + u * (head_size + 4) * np.abs(self.output)), -1, keepdims=True)
        c_error = c_error + np.sum((again + u * (memories + 2)) * self.a * np.abs(grad_a), axis=-1, keepdims=True)
        gap, gap_error = np.abs(grad_a - c), grad_a_error + c_error

        a = self.a
        a_error = (self.moved + a * self.all_moved) * self.growth + 4 * u * a + tiny
        largest = (1 + again) * (1 + u * (memories + 8))  # a weight lies in [0, 1], give or take its own rounding
        a_error = np.where(self.possible, np.where(a_error < largest, a_error, largest), 0)
        grad_s = a * gap
        grad_s_error = a_error * (gap + gap_error) + a * gap_error + 8 * u * a * gap + np.where(self.possible, tiny, 0)

        per_query = grad_s_error + u * (2 * memories + 8) * grad_s
        per_key = grad_s_error + u * (2 * queries + 8) * grad_s
        by_query = np.empty_like(q)
        table = None if case.position is None else np.pad(np.abs(case.position), ((0, 1), (0, 0)))
        for t in self._some_queries():
            keys = np.abs(k)[:, :, None]  # what each ds_ti is multiplied with for dq   [B, H, 1 | some M, N, D]
            if table is not None:
                keys = keys + table[self.row[t]]
            keys = np.broadcast_to(keys, (*a[t].shape, head_size))
            by_query[t] = np.einsum("bhmn,bhmnd->bhmd", per_query[t], keys) * scale
        bounds = {
            "query": by_query,
            "key": np.einsum("bhmn,bhmd->bhnd", per_key, np.abs(q)) * scale,
            "value": np.einsum("bhmn,bhmd->bhnd", a_error + u * (queries + 4) * a, np.abs(g)),
        }
        if case.position is not None:
            per_position = grad_s_error + u * (2 * batch * heads * queries + 8) * grad_s
            by_position = np.zeros((batch, queries, heads, len(case.position) + 1))  # [B, M, H, P + 1]
            stream, head, query, _ = np.ix_(*map(range, a.shape))
            np.add.at(by_position, (stream, query, head, self.row), per_position)
            bounds["position"] = np.einsum("bmhp,bhmd->pd", by_position[..., :-1], np.abs(q), optimize=True) * scale
        freedom, bounds["span"] = self._span_freedom_and_bound(grad_a - c, gap_error)
        expected = {}
        for name, bound in bounds.items():
            slack = bound + np.where(bound > 0, tiny * (memories + queries), 0)
            value = getattr(exact, name) + (freedom if name == "span" else 0)
            expected[name] = self._finish(value, slack)
        return expected

    def _span_freedom_and_bound(self, signed_gap: Array, gap_error: Array) -> tuple[Array, Array]:
        """Bound of de_i = sum_t 1[on ramp] / R sum_heads (exp(s_ti) / Z_t) (da_ti - c_t).

        A query at a kink may add all of its term, nothing, or anything between. So expect half of it, that half being
        the freedom, and allow the other half.
        """
        u, tiny, ramp = self.arithmetic.u, self.arithmetic.tiny, self.case.memories.ramp
        _, heads, queries, _, _ = self.case.sizes
        interval, share, gap = self.interval, self.unmasked, np.abs(signed_gap)
        share_error = share * (self.eta + self.all_moved) * self.growth
        error = share_error * (gap + gap_error) + share * gap_error + (8 + heads + queries) * u * share * gap
        term, error = np.sum(share * signed_gap, axis=1), np.sum(error, axis=1) + tiny  # [B, M, N]
        # an exact kink in a query with no live memory passes no gradient, whatever the two sides say
        empty = np.all(interval.high == 0, axis=-1, keepdims=True)
        error = np.where(empty, 0, np.where(np.isfinite(error) & np.isfinite(term), error, np.inf))
        half = np.where(empty | ~np.isfinite(term), 0, term / 2)
        on_ramp = (interval.exact > 0) & (interval.exact < 1)
        freedom = np.where(interval.kink, np.where(on_ramp, -half, half), 0)
        bound = np.where(interval.kink, np.abs(half) + error, np.where(on_ramp, error, 0))
        return np.sum(freedom, axis=1) / ramp, np.sum(bound, axis=1) / ramp  # [B, N]

    def _finish(self, value: Array, bound: Array) -> Expected:
        """Rounding of the result itself; results that the dtype cannot hold decide nothing."""
        bound = bound + np.where(bound > 0, self.arithmetic.u * np.abs(value), 0)
        too_large = np.abs(value) + bound > self.arithmetic.largest / 4
        return Expected(value, np.where(too_large | np.isnan(bound), np.inf, bound))


@remembered
def attention_bounds(case: AttentionCase) -> AttentionBounds:
    """Bounds of this case."""
    return AttentionBounds(case)


def _float64(case: AttentionCase) -> AttentionCase:
    """The same case with every number widened, exactly."""
    return AttentionCase(
        query=case.query.astype(np.float64),
        key=case.key.astype(np.float64),
        value=case.value.astype(np.float64),
        memories=replace(case.memories, span=case.memories.span.astype(np.float64)),
        position=None if case.position is None else case.position.astype(np.float64),
        grad_out=case.grad_out.astype(np.float64),
    )
