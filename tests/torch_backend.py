"""A right backend that shares nothing with ours but the clauses: PyTorch, gradients by autograd."""

import math

import torch


class TorchBackend:
    """Dense attention with additive log mask; every gradient comes from autograd."""

    name = "torch"

    def soft_mask(self, span, age, *, queries, ramp):
        return self._mask(torch.tensor(span), torch.tensor(age), queries, ramp).numpy()

    def span_attention(self, query, key, value, span, age, *, ramp, position=None):
        tensors = [torch.tensor(x) for x in (query, key, value, span, age)]
        out = self._attend(*tensors, ramp, None if position is None else torch.tensor(position))
        return out.numpy().astype(query.dtype)

    def span_attention_backward(self, grad_out, query, key, value, span, age, *, ramp, position=None):
        names = {"query": query, "key": key, "value": value, "span": span}
        if position is not None:
            names["position"] = position
        leaves = {name: torch.tensor(x, requires_grad=True) for name, x in names.items()}
        out = self._attend(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            leaves["span"],
            torch.tensor(age),
            ramp,
            leaves.get("position"),
        )
        grads = torch.autograd.grad(
            out, list(leaves.values()), torch.tensor(grad_out).to(out.dtype), allow_unused=True, materialize_grads=True
        )
        return {name: grad.numpy().astype(names[name].dtype) for name, grad in zip(leaves, grads, strict=True)}

    def _mask(self, span, age, queries, ramp):
        distance = age[:, None, :] + torch.arange(queries)[:, None]
        soft = torch.clamp((span[:, None, :] - distance) / ramp + 1, 0, 1)
        return torch.where(distance >= 1, soft, 0)

    def _attend(self, query, key, value, span, age, ramp, position):
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        queries = q.shape[2]
        scores = q @ k.mT
        if position is not None:
            row = age[:, None, :] + torch.arange(queries)[:, None] - 1  # [B, M, N]
            table = torch.cat([position.to(dtype), position.new_zeros((1, position.shape[1]), dtype=dtype)])
            near = (row >= 0) & (row < len(position))
            scores = scores + torch.einsum("bhmd,bmnd->bhmn", q, table[torch.where(near, row, len(position))])
        mask = self._mask(span, age, queries, ramp).to(dtype)[:, None]
        live = mask > 0
        bias = torch.where(live, torch.log(torch.where(live, mask, 1)), -math.inf)
        some = live.any(-1, keepdim=True)
        weights = torch.softmax(torch.where(some, scores / math.sqrt(q.shape[3]) + bias, 0), dim=-1)
        return torch.where(some, weights, 0) @ v if key.shape[2] else torch.zeros_like(q) + 0 * q
