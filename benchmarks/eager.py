"""An Expire-Span Transformer in eager PyTorch, dense: the peer that benchmarks and tests hold refspan against.

It computes what refspan specifies, gradients by autograd, in the way that the original implementation does:

- a layer remembers hidden states, and makes keys, values and spans of all of them again for every block;
- logits, mask and weights are dense, [B, H, M, N], whether a memory is still seen or not; the mask is repeated for each
  head before it is multiplied by the causal one, and once more as a bias on the logits, 0 or the lowest number;
- weights are a softmax over what the mask lets through, times the mask, divided by their new sum;
- what the span loss counts is computed whether it is asked for or not;
- the position term is added to the newest memories only, whose ages are known without looking;
- memories are dropped in multiples of the block, as many as the row of the batch with the fewest expired ones allows.

It differs from the original in two points, as refspan does: a stream starts empty, and nothing is added to the new
sum of the weights (the original adds 1e-8). Blocks have the length of the model's block, the last one may be shorter.

`lean=True` is the same model as one would write it after a first look at a profile: one mask for all heads, filled in
where it forbids, and no span loss unless wanted. It tells how much of a difference is the style, and how much is not.
"""

from collections.abc import Mapping
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from refspan import ModelConfig


class Held(NamedTuple):
    """What one layer remembers."""

    hidden: Tensor
    """[B, N, d], what the layer was given; a constant. The newest block stands last, whole."""
    age: Tensor
    """[B, N] int64, steps to the next block's first query."""


class Losses(NamedTuple):
    """As `refspan.Losses`, for autograd."""

    task: Tensor
    span: Tensor


class EagerTransformer(nn.Module):
    """The whole model; its parameters have refspan's names."""

    def __init__(self, config: ModelConfig, params: Mapping[str, np.ndarray], *, lean: bool = False) -> None:
        super().__init__()
        size, places = config.hidden_size, len(params["position.weight"])
        if places > config.block_size:
            raise ValueError(f"position.weight: got {places} rows, expected at most block_size = {config.block_size}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, size)
        self.position = nn.Embedding(places, config.head_size)
        self.layers = nn.ModuleList(Layer(config, lean) for _ in range(config.layers))
        if config.norm == "pre":
            self.final_norm = nn.LayerNorm(size)
        self.output = nn.Linear(size, config.vocab_size)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in params.items()}
        self.to(tensors["embedding.weight"].dtype)
        self.load_state_dict(tensors)

    def forward(
        self, tokens: Tensor, memory: list[Held] | None = None, span_loss_weight: float = 0.0
    ) -> tuple[Tensor, Tensor, list[Held]]:
        """One block: log-probabilities [B, M, V], span loss, and the memories for the next block."""
        h = self.embedding(tokens)  # [B, M, d]
        span_loss, after = h.new_zeros(()), []
        for layer, held in zip(self.layers, memory or self.start(tokens.shape[0]), strict=True):
            h, layer_loss, held_after = layer(h, held, self.position.weight, span_loss_weight)
            span_loss = span_loss + layer_loss
            after.append(held_after)
        if self.config.norm == "pre":
            h = self.final_norm(h)
        return functional.log_softmax(self.output(h), dim=-1), span_loss, after

    def losses(
        self, tokens: Tensor, targets: Tensor, memory: list[Held] | None, span_loss_weight: float = 0.0
    ) -> tuple[Losses, list[Held]]:
        """Both losses of one block, for `backward`, and the memories for the next block."""
        log_probs, span_loss, after = self(tokens, memory, span_loss_weight)
        return Losses(functional.nll_loss(log_probs.flatten(0, 1), targets.flatten()), span_loss), after

    def start(self, batch: int) -> list[Held]:
        """Empty memories."""
        like = self.embedding.weight
        hidden, age = like.new_zeros(batch, 0, like.shape[1]), torch.zeros(batch, 0, dtype=torch.int64)
        return [Held(hidden, age)] * len(self.layers)


class Layer(nn.Module):
    """One layer, post- or pre-norm."""

    def __init__(self, config: ModelConfig, lean: bool) -> None:
        super().__init__()
        size, inner, wide = config.hidden_size, config.heads * config.head_size, config.feedforward_size
        self.config, self.lean = config, lean
        self.attention = nn.ModuleDict(
            {
                "query": nn.Linear(size, inner, bias=False),
                "key": nn.Linear(size, inner, bias=False),
                "value": nn.Linear(size, inner, bias=False),
                "output": nn.Linear(inner, size, bias=False),
            }
        )
        self.span = Span(config)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.feedforward = nn.ModuleDict({"in": nn.Linear(size, wide), "out": nn.Linear(wide, size)})

    def forward(
        self, x: Tensor, held: Held, position: Tensor, span_loss_weight: float
    ) -> tuple[Tensor, Tensor | float, Held]:
        batch, queries, _ = x.shape
        context = torch.cat([held.hidden, x], dim=1)  # [B, N, d]
        own = -torch.arange(queries).expand(batch, queries)
        age = torch.cat([held.age, own], dim=1)  # [B, N]
        pre = self.config.norm == "pre"
        u = self.norm1(context) if pre else context
        span = self.span(u)  # [B, N]
        distance = age[:, None, :] + torch.arange(queries)[:, None]  # [B, M, N]
        mask = self.mask(span, distance)  # [B, M, N]
        loss = self.span_loss(span, mask, span_loss_weight) if span_loss_weight or not self.lean else 0.0
        y = x + self.attend(u, mask, distance >= 1, position)
        if pre:
            z = y + self.feed(self.norm2(y))
        else:
            y = self.norm1(y)
            z = self.norm2(y + self.feed(y))
        return z, loss, self.drop(context.detach(), age + queries, span.detach())

    def mask(self, span: Tensor, distance: Tensor) -> Tensor:
        """m = clip(1 + (e - distance) / R, 0, 1).   [B, N], [B, M, N] -> [B, M, N]."""
        remaining = span[:, None, :] - distance
        return (1 + remaining / self.config.ramp).clamp(0, 1)

    def attend(self, u: Tensor, mask: Tensor, past: Tensor, position: Tensor) -> Tensor:
        """Attention of the last M steps over all of u.   [B, N, d], [B, M, N] twice, [P, D] -> [B, M, d]."""
        project, queries = self.attention, mask.shape[1]
        query = self.split(project["query"](u[:, -queries:]))  # [B, H, M, D]
        key, value = self.split(project["key"](u)), self.split(project["value"](u))  # [B, H, N, D]
        logits = query @ key.mT  # [B, H, M, N]
        if len(position):
            near = self.position_logits(query, position)[..., -logits.shape[-1] :]
            logits[..., -near.shape[-1] :] += near
        lowest = torch.finfo(logits.dtype).min  # not -inf: a query without memories has weights 0, not NaN
        if self.lean:
            mask = (mask * past)[:, None]  # [B, 1, M, N]
            logits = logits.masked_fill(mask == 0, lowest)
        else:
            mask = mask.repeat_interleave(self.config.heads, dim=0).unflatten(0, (-1, self.config.heads))
            mask = mask * past[:, None]  # [B, H, M, N]
            logits = logits + torch.zeros_like(logits).masked_fill_(mask == 0, lowest)
        weights = (logits / sqrt(self.config.head_size)).softmax(dim=-1) * mask
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + (total == 0))
        return project["output"]((weights @ value).transpose(1, 2).flatten(2))

    def position_logits(self, query: Tensor, position: Tensor) -> Tensor:
        """q_t . p_distance for the newest P + M steps, whose ages are P, .., 1, 0, .., 1 - M.

        With distances in falling order, the row of query m belongs m columns to the right.

        [B, H, M, D], [P, D] -> [B, H, M, P + M].
        """
        batch, heads, queries, _ = query.shape
        places = len(position)
        by_distance = query @ position.flip(0).T  # [B, H, M, P], column j for distance P - j
        rows = functional.pad(by_distance, (0, queries + 1)).flatten(2)
        return rows[..., : -queries or None].view(batch, heads, queries, places + queries)

    def span_loss(self, span: Tensor, mask: Tensor, weight: float) -> Tensor:
        """alpha / (R M) sum_t sum_i e_i 1[0 < m_ti < 1], batch mean."""
        on_ramp = (mask > 0) & (mask < 1)  # [B, M, N]
        batch, queries, _ = mask.shape
        return (span[:, None, :] * on_ramp).sum() * (weight / (self.config.ramp * queries * batch))

    def feed(self, x: Tensor) -> Tensor:
        return self.feedforward["out"](self.feedforward["in"](x).relu())

    def split(self, x: Tensor) -> Tensor:
        """[B, N, H D] -> [B, H, N, D]."""
        return x.unflatten(2, (self.config.heads, -1)).transpose(1, 2)

    def drop(self, hidden: Tensor, age: Tensor, span: Tensor) -> Held:
        """Without expired memories: a multiple of the block, equally many in every row. `age` as of the next block.

        The newest block stays, because position terms go by place.
        """
        block = self.config.block_size
        expired = age - span >= self.config.ramp  # [B, N]
        expired[:, -block:] = False
        count = int(expired.sum(dim=1).min()) // block * block
        if count == 0:
            return Held(hidden, age)
        wanted = ~(expired & (expired.cumsum(dim=1) <= count))
        batch, memories = age.shape
        slots = wanted.nonzero()[:, 1].view(batch, memories - count)
        rows = torch.arange(batch)[:, None]
        return Held(hidden[rows, slots], age[rows, slots])


class Span(nn.Module):
    """e = L sigmoid(w . u / temperature + b)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, u: Tensor) -> Tensor:
        """[B, N, d] -> [B, N]."""
        return self.config.max_span * torch.sigmoid(u @ self.weight / self.config.span_temperature + self.bias)
