"""Span-masked attention of one block of queries (LOGIT, WEIGHT, EMPTY, OUTPUT, GRAD; the paper's equations 2 and 4).

    s_ti = (q_t . k_i + q_t . p_distance) / sqrt(D)                     LOGIT
    a_ti = m_ti exp(s_ti) / sum_j m_tj exp(s_tj)                        WEIGHT
    o_t  = sum_i a_ti v_i                                               OUTPUT

Work is cut into tiles, some heads times some queries against all visible memories, so that the arrays of a tile fit
into `scratch_bytes`. Memories that no query of the block sees never enter a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, NamedTuple

from refspan.arrays import (
    Array,
    check_attention,
    check_count,
    check_dtype,
    check_ramp,
    check_shape,
    check_whole,
    device_of,
    namespace_of,
)
from refspan.dropout import Dropout
from refspan.mask import grad_span_of
from refspan.position import position_scores_backward
from refspan.row import Row
from refspan.tile import Tile, Weights
from refspan.tiles import KEEP_BYTES, SCRATCH_BYTES

HARMLESS = 30.0
"""Logits of at most this size need no shift: exp(30) is 1e13, and exp(-30) times the faintest mask still 1e-21."""


@dataclass(frozen=True)
class SavedAttention:
    """What `span_attention_backward` needs of the forward pass.

    Of size B*H*M, but for the weights that `keep_bytes` has room for.
    """

    query: Array
    key: Array
    value: Array
    span: Array
    age: Array
    ramp: float
    position: Array | None
    output: Array
    """[B, H, M, D], before rounding to the dtype of `query`."""
    peak: Array | None
    """[B, H, M, 1], what was subtracted from logits: the largest among live memories; None if that is harmless."""
    total: Array
    """[B, H, M, 1], sum_j m_tj exp(s_tj - peak_t) (1 where no memory is live)."""
    dropout: Dropout | None
    scratch_bytes: int
    kept: Sequence[Weights]
    """Of the first tiles, in the order of the loops. Those of other tiles are computed again."""


class AttentionGradients(NamedTuple):
    """Gradients of one attention step, each of the shape and dtype of what it is the gradient of."""

    query: Array
    key: Array
    value: Array
    span: Array
    position: Array | None


def span_attention(
    query: Array,
    key: Array,
    value: Array,
    span: Array,
    age: Array,
    *,
    ramp: float,
    position: Array | None = None,
    dropout: Dropout | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
    keep_bytes: int = KEEP_BYTES,
) -> tuple[Array, SavedAttention]:
    """Attention of a block of queries under the soft span mask (PAST, MASK, LOGIT, WEIGHT, EMPTY, OUTPUT).

    The largest live logit is subtracted before the exponential, which changes no weight, unless all logits are known
    to be small (`HARMLESS`). Because the sum runs over live memories only and gets no epsilon, a lone survivor has
    weight exactly 1, and an expired memory cannot push anything out of range. float16 is computed in float32.

    Args:
        query: [B, H, M, D] float16, float32 or float64.
        key: [B, H, N, D], dtype of `query`. N = 0 is legal.
        value: [B, H, N, D], dtype of `query`.
        span: [B, N] float32 or float64, steps that each memory keeps its full weight.
        age: [B, N] int64, steps from each memory to the block's first query; 0, -1, .. for the block's own. Any order.
        ramp: R > 0, steps over which a memory fades once its span is over.
        position: [P, D], dtype of `query`; row j is the embedding of distance j + 1. None for no position term.
        dropout: of normalised weights, for training. Decided by batch row, head, query and age, so that neither the
            order of memories nor dropping any changes it.
        scratch_bytes: limit of the memory for intermediate results, see `SCRATCH_BYTES`.
        keep_bytes: limit of the weights that are kept for backward, which computes the others again, see `KEEP_BYTES`.
            0 if there will be no backward.

    Returns:
        The output, [B, H, M, D], dtype of `query`, and what `span_attention_backward` needs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; the message names it.
    """
    xp = _namespace(query, key, value, span, age, position)
    ramp = check_ramp(ramp)
    check_attention(xp, query, key, value, span, age, position)
    scratch_bytes = check_count("scratch_bytes", scratch_bytes)
    if check_whole("keep_bytes", keep_bytes) < 0:
        raise ValueError(f"keep_bytes: got {keep_bytes}, expected at least 0")
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout: got {dropout!r}, expected a refspan.Dropout or None")
    batch, heads, queries, head_size = query.shape
    dtype = xp.result_type(query.dtype, xp.float32)
    new = {"dtype": dtype, "device": device_of(query)}
    output = xp.zeros((batch, heads, queries, head_size), **new)
    peaks = xp.zeros((batch, heads, queries, 1), **new)
    shifted = False
    totals = xp.ones((batch, heads, queries, 1), **new)
    room, kept = keep_bytes // (xp.finfo(dtype).bits // 8), []
    needs = {"dropout": dropout is not None, "backward": room > 0}  # what is kept comes in the tiles of backward

    for b in range(batch):
        row = Row.of(xp, span[b, :], age[b, :], queries, ramp, position, dtype)
        k, v = row.visible(key[b, ...]), row.visible(value[b, ...])  # [H, n, D]
        q = xp.astype(query[b, ...], dtype) * (1 / sqrt(head_size))  # [H, M, D]
        small = row.largest_logit(q, k) <= HARMLESS
        ones = xp.ones((row.seen.visible, 1), **new)  # a product with it is a sum over memories   [n, 1]
        heads_of_tile, queries_of_tile = row.tiles(heads, scratch_bytes, **needs)
        for m in queries_of_tile:
            tile = Tile.of(row, m)
            for h in heads_of_tile:
                scores = tile.scores(q[h, m, :], k[h, ...])  # [h, m, n]
                if not small:
                    shifted = True
                    tile.hide_unseen(scores)
                    peak = xp.max(scores, axis=-1, keepdims=True)  # [h, m, 1]
                    peak = xp.where(peak == -xp.inf, xp.zeros_like(peak), peak)
                    peaks[b, h, m, :] = peak
                    scores -= peak
                room -= prod(scores.shape) + prod(scores[..., row.seen.partial].shape)
                weights = tile.weights(scores, keep=room >= 0)  # w = Z a   [h, m, n]
                if room >= 0:
                    kept.append(weights)
                total = weights.masked @ ones  # Z   [h, m, 1]
                total = xp.where(total == 0, xp.ones_like(total), total)  # EMPTY: 0 / 1
                used = weights.masked if dropout is None else weights.masked * tile.dropped(dropout, b, h)
                output[b, h, m, :] = (used @ v[h, ...]) / total  # [h, m, D]
                totals[b, h, m, :] = total
                del scores, weights, used  # before the next tile's come
            del tile

    peak = peaks if shifted else None
    saved = SavedAttention(
        query, key, value, span, age, ramp, position, output, peak, totals, dropout, scratch_bytes, kept
    )
    return xp.astype(output, query.dtype), saved


def span_attention_backward(grad_output: Array, saved: SavedAttention) -> AttentionGradients:
    """Vector-Jacobian product of `span_attention` (GRAD).

    With g_t the gradient of o_t, and one head at a time:

        o_t = sum_i a_ti v_i               =>   dv_i  = sum_t a_ti g_t
                                                da_ti = g_t . v_i
        a = softmax(s + log m)             =>   ds_ti = a_ti (da_ti - c_t),   c_t = sum_j a_tj da_tj = g_t . o_t
        s_ti = q_t . (k_i + p) / sqrt(D)   =>   dq_t  = sum_i ds_ti (k_i + p_distance) / sqrt(D)
                                                dk_i  = sum_t ds_ti q_t / sqrt(D)
                                                dp_j  = sum over memories at distance j of ds_ti q_t / sqrt(D)

    log m adds to s, so d(log m_ti) = sum_heads ds_ti, the mask being shared by heads, and

        dm_ti = d(log m_ti) / m_ti = sum_heads (exp(s_ti) / Z_t) (da_ti - c_t),   Z_t = sum_j m_tj exp(s_tj)
        de_i  = sum_t dm_ti 1[0 < m_ti < 1] / R

    The form with exp(s) / Z instead of a / m keeps its precision as m goes to 0. The subtraction of c_t is the
    derivative of the normalisation. Below, weights are kept unnormalised, w = Z a, and g is divided by Z once instead.
    A query with no live memory has w = 0 throughout and passes no gradient (EMPTY).

    Dropout takes a x in place of a in the first line, x_ti being 0 or 1 / (1 - rate): both dv_i and da_ti get a factor
    x_ti, and c_t = g_t . o_t holds as it did.

    Args:
        grad_output: [B, H, M, D], gradient of the output, dtype of `query`.
        saved: what `span_attention` returned beside its output.

    Returns:
        Gradients of query, key, value, span and position (None if there was none).

    Raises:
        TypeError, ValueError: `grad_output` is of the wrong type, dtype or shape.
    """
    query, key, value, position = saved.query, saved.key, saved.value, saved.position
    xp = namespace_of(query=query, grad_output=grad_output)
    check_shape("grad_output", grad_output, tuple(query.shape))
    check_dtype(xp, "grad_output", grad_output, (str(query.dtype).rsplit(".", maxsplit=1)[-1],))
    batch, heads, queries, head_size = query.shape
    memories = key.shape[2]
    scale = 1 / sqrt(head_size)
    dtype = saved.output.dtype
    new = {"dtype": dtype, "device": device_of(query)}
    grad_query = xp.zeros(query.shape, **new)
    grad_key = xp.zeros(key.shape, **new)
    grad_value = xp.zeros(value.shape, **new)
    grad_span = xp.zeros(saved.span.shape, **new)
    grad_position = None if position is None else xp.zeros(position.shape, **new)
    needs = {"dropout": saved.dropout is not None, "backward": True}
    kept = iter(saved.kept)

    for b in range(batch):
        row = Row.of(xp, saved.span[b, :], saved.age[b, :], queries, saved.ramp, position, dtype)
        near, partial = row.seen.near, row.seen.partial
        k, v = row.visible(key[b, ...]), row.visible(value[b, ...])  # [H, n, D]
        q = xp.astype(query[b, ...], dtype) * scale  # [H, M, D]
        grad_k, grad_v = row.seen.sums_for(grad_key[b, ...]), row.seen.sums_for(grad_value[b, ...])  # [H, n, D]
        grad_s = xp.zeros((partial.stop - partial.start,), **new)  # of the partial memories' spans
        heads_of_tile, queries_of_tile = row.tiles(heads, saved.scratch_bytes, **needs)
        for m in queries_of_tile:
            tile = Tile.of(row, m)
            mask = tile.mask  # [m, partial]
            grad_mask = None if mask is None else xp.zeros(mask.shape, **new)
            for h in heads_of_tile:
                weights = next(kept, None)
                if weights is None:
                    scores = tile.scores(q[h, m, :], k[h, ...])
                    if saved.peak is not None:
                        tile.hide_unseen(scores)
                        scores -= saved.peak[b, h, m, :]  # [h, m, 1]
                    weights = tile.weights(scores, keep=True)
                    del scores

                g = xp.astype(grad_output[b, h, m, :], dtype) / saved.total[b, h, m, :]  # g / Z   [h, m, D]
                dropped = None if saved.dropout is None else tile.dropped(saved.dropout, b, h)  # x   [h, m, n]
                used = weights.masked if dropped is None else weights.masked * dropped
                grad_v[h, ...] += xp.matrix_transpose(used) @ g  # [h, n, D]
                c = xp.sum(g * saved.output[b, h, m, :], axis=-1, keepdims=True)  # c / Z   [h, m, 1]
                grad_weights = g @ xp.matrix_transpose(v[h, ...])  # [h, m, n]
                if dropped is not None:
                    grad_weights *= dropped
                grad_weights -= c  # (da - c) / Z

                if mask is not None:
                    grad_mask += xp.sum(weights.unmasked * grad_weights[..., partial], axis=0)  # [m, partial]
                grad_scores = grad_weights  # written over it: weights may be wanted again
                grad_scores *= weights.masked  # ds = a (da - c)   [h, m, n]
                grad_q = grad_scores @ k[h, ...]  # [h, m, D]
                grad_k[h, ...] += xp.matrix_transpose(grad_scores) @ q[h, m, :]  # [h, n, D]
                if grad_position is not None and tile.reach is not None:
                    grad_q_near, grad_p = position_scores_backward(grad_scores[..., near], q[h, m, :], tile.reach)
                    grad_q += grad_q_near
                    grad_position[: grad_p.shape[0], :] += grad_p
                grad_query[b, h, m, :] = grad_q * scale
                del weights, dropped, used, grad_weights, grad_scores  # before the next tile's come
            if mask is not None:
                grad_s += grad_span_of(xp, grad_mask, mask, saved.ramp)  # [partial]
            del tile, mask, grad_mask
        if row.seen.order is not None:
            grad_key[b, ...] = row.seen.scatter(grad_k, memories)
            grad_value[b, ...] = row.seen.scatter(grad_v, memories)
        ahead = xp.zeros((partial.start,), **new)  # the full memories, that the block's queries teach nothing
        grad_span[b, :] = row.seen.scatter(xp.concat([ahead, grad_s])[:, None], memories)[:, 0]

    return AttentionGradients(
        query=xp.astype(grad_query, query.dtype, copy=False),
        key=xp.astype(grad_key, key.dtype, copy=False),
        value=xp.astype(grad_value, value.dtype, copy=False),
        span=xp.astype(grad_span, saved.span.dtype, copy=False),
        position=None if position is None else xp.astype(grad_position, position.dtype, copy=False),
    )


def _namespace(query: Array, key: Array, value: Array, span: Array, age: Array, position: Array | None) -> Any:
    arrays = {"query": query, "key": key, "value": value, "span": span, "age": age}
    return namespace_of(**arrays if position is None else {**arrays, "position": position})
