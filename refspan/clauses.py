"""The clauses of the specification: the ids that code, checks, reports and documents cite."""

from types import MappingProxyType
from typing import Final

CLAUSES: Final = MappingProxyType(
    {
        "SPAN": "e_i = L * sigmoid(w . (h_i / temperature) + b)",
        "PAST": "query t sees memory i only if distance t - i >= 1",
        "MASK": "m_ti = clip(1 + r_ti / R, 0, 1), 0 where PAST forbids; per query, never per block",
        "LOGIT": "s_ti = (q_t . k_i + q_t . p_distance) / sqrt(D), the position term only for distances 1..P",
        "WEIGHT": "a_ti = m_ti exp(s_ti) / sum_j m_tj exp(s_tj), with no epsilon",
        "EMPTY": "a query with no live memory outputs 0 and passes no gradient",
        "OUTPUT": "o_t = sum_i a_ti v_i",
        "GRAD": "the vector-Jacobian product for query, key, value, span and position",
        "LOSS": "span_loss = alpha / (R M) * sum_t sum_i e_i 1[0 < m_ti < 1], batch mean, summed over layers",
        "SHORTEN": "training may clip e <- min(e, l), l ~ U(0, L), in mask and loss but never in what is kept",
        "AGE": "after a block of M queries every age grows by M; blocks may have any length >= 1",
        "DROP": "a memory may be dropped once no later query can see it; dropping changes no result",
        "BOUND": "memories held <= live memories rounded up to the documented granularity",
        "START": "a stream starts empty",
        "CACHE": "with frozen parameters keys, values and spans are computed once per memory",
        "WIDTH": "spans, ages and masks are float32/int64 or wider, whatever the dtype of query, key and value",
        "LAYER": "pre- or post-norm transformer layer",
        "MODEL": "embedding, layers, output projection, log-softmax",
    }
)
"""Clause id -> the rule in one line. The order is that of the specification."""
