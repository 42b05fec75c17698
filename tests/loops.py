"""A right backend as someone would write it who has only the clauses: plain Python loops over plain numbers."""

import math
from itertools import product

import numpy as np


class Loops:
    """One query, one memory, one number at a time, in Python's floats."""

    name = "loops"

    def soft_mask(self, span, age, *, queries, ramp):
        out = np.zeros((span.shape[0], queries, span.shape[1]), span.dtype)
        for b, m, i in np.ndindex(out.shape):
            out[b, m, i] = self._mask(float(span[b, i]), int(age[b, i]) + m, ramp)
        return out

    def _mask(self, span, distance, ramp):
        if distance < 1:
            return 0.0
        return min(max(1.0 + (span - distance) / ramp, 0.0), 1.0)

    def _row(self, q, k, span, age, m, ramp, position):
        """Masks, weights and exp(s) / Z of one query over its memories."""
        root = math.sqrt(len(q))
        masks, logits = [], []
        for i in range(len(k)):
            distance = int(age[i]) + m
            masks.append(self._mask(float(span[i]), distance, ramp))
            s = sum(x * y for x, y in zip(q, k[i], strict=True))
            if position is not None and 1 <= distance <= len(position):
                s += sum(x * y for x, y in zip(q, position[distance - 1], strict=True))
            logits.append(s / root)
        live = [i for i in range(len(k)) if masks[i] > 0]
        if not live:
            return masks, [0.0] * len(k), [0.0] * len(k)
        top = max(logits[i] for i in live)
        exps = [math.exp(logits[i] - top) if i in live else 0.0 for i in range(len(k))]
        total = sum(masks[i] * exps[i] for i in live)
        return masks, [masks[i] * exps[i] / total for i in range(len(k))], [e / total for e in exps]

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        out = np.zeros(query.shape, query.dtype)
        p = None if position is None else position.tolist()
        for b, h, m in product(*(range(n) for n in query.shape[:3])):
            _, weights, _ = self._row(query[b, h, m].tolist(), key[b, h].tolist(), span[b], age[b], m, ramp, p)
            values = value[b, h].tolist()
            for d in range(query.shape[3]):
                out[b, h, m, d] = sum(w * v[d] for w, v in zip(weights, values, strict=True))
        return out

    def span_attention_backward(self, grad_out, query, key, value, span, age, *, ramp, position=None):
        p = None if position is None else position.tolist()
        grads = {"query": np.zeros(query.shape), "key": np.zeros(key.shape), "value": np.zeros(value.shape)}
        grads["span"] = np.zeros(span.shape)
        if position is not None:
            grads["position"] = np.zeros(position.shape)
        root = math.sqrt(query.shape[3])
        for b, h, m in product(*(range(n) for n in query.shape[:3])):
            q, g = query[b, h, m].tolist(), grad_out[b, h, m].tolist()
            keys, values = key[b, h].tolist(), value[b, h].tolist()
            masks, weights, shares = self._row(q, keys, span[b], age[b], m, ramp, p)
            grad_weights = [sum(x * y for x, y in zip(g, v, strict=True)) for v in values]
            mean = sum(w * x for w, x in zip(weights, grad_weights, strict=True))
            for i in range(len(keys)):
                ds = weights[i] * (grad_weights[i] - mean) / root
                distance = int(age[b, i]) + m
                near = p is not None and 1 <= distance <= len(p)
                for d in range(len(q)):
                    grads["query"][b, h, m, d] += ds * (keys[i][d] + (p[distance - 1][d] if near else 0.0))
                    grads["key"][b, h, i, d] += ds * q[d]
                    grads["value"][b, h, i, d] += weights[i] * g[d]
                    if near:
                        grads["position"][distance - 1, d] += ds * q[d]
                if 0 < masks[i] < 1:
                    grads["span"][b, i] += shares[i] * (grad_weights[i] - mean) / ramp
        return {name: x.astype(span.dtype if name == "span" else query.dtype) for name, x in grads.items()}
