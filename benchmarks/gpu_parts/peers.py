"""The attention step in PyTorch, in the ways that people would write it. torch is imported when one is made."""

import math
from functools import partial

from .device import library
from .steps import RAMP


def log_mask(span, age, queries, dtype):
    """The soft mask in float32 as an additive bias [B, 1, M, N]; the inner where keeps gradients finite at m = 0."""
    import torch

    distance = age[:, None, :] + torch.arange(queries, device=age.device)[:, None]
    mask = (1 + (span[:, None, :] - distance) / RAMP).clamp(0, 1)
    live = (mask > 0) & (distance >= 1)
    return torch.where(live, mask, 1).log().masked_fill(~live, -math.inf).to(dtype)[:, None]


def torch_eager(query, key, value, span, age):
    """The dense formula, as most people would write it."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return (scores + log_mask(span, age, query.shape[2], query.dtype)).softmax(-1) @ value


def torch_sdpa(query, key, value, span, age):
    """PyTorch's own attention with a float bias shared by heads."""
    from torch.nn.functional import scaled_dot_product_attention

    bias = log_mask(span, age, query.shape[2], query.dtype)
    return scaled_dot_product_attention(query, key, value, bias.expand(-1, query.shape[1], -1, -1))


def live_blocks(span, age, queries, size=128):
    """A block mask of the tiles in which any query sees any memory; made anew for each step, as spans are."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.arange(0, queries, size, device=age.device)[:, None]
    seen = (span[:, None] - age[:, None] - first > -RAMP) & (age[:, None] + first + size > 1)  # [B, M/size, N]
    live = seen.unflatten(-1, (-1, size)).any(-1)
    order = live.int().argsort(dim=-1, descending=True, stable=True).int()
    count = live.sum(-1, dtype=torch.int32)
    shape = (queries, age.shape[1])
    return BlockMask.from_kv_blocks(count[:, None], order[:, None], BLOCK_SIZE=size, seq_lengths=shape)


def torch_flex(query, key, value, span, age, blocks):
    """FlexAttention: the soft mask as score_mod, without any array of M times N."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    def fade(score, b, h, m, n):  # noqa: ARG001
        distance = age[b, n] + m
        mask = (1 + (span[b, n] - distance) / RAMP).clamp(0, 1)
        return torch.where((mask > 0) & (distance >= 1), score + mask.log(), -math.inf)

    return flex_attention(query, key, value, score_mod=fade, block_mask=blocks)


def gathered(query, key, value, span, age):
    """The same step with only the memories that some query sees, filled up to a multiple of 64, on the device."""
    import torch

    queries = query.shape[2]
    visible = (span - age > -RAMP) & (age + queries > 1)
    size = min(-(-int(visible.sum(1).max()) // 64) * 64, age.shape[1])
    order = visible.int().argsort(dim=1, descending=True, stable=True)[:, :size]
    wide = order[:, None, :, None]
    age = age.gather(1, order).where(visible.gather(1, order), -queries)  # a filler comes after every query
    return query, torch.take_along_dim(key, wide, 2), torch.take_along_dim(value, wide, 2), span.gather(1, order), age


def torch_contender(name, case, data, device):
    """A call that runs the step on the device, what turns its result into NumPy arrays, and a function for notes."""
    torch = library("torch", device)
    tensors = {key: torch.from_numpy(x).to(device) for key, x in data.items()}
    grad_output = tensors.pop("grad_output")
    arguments = list(tensors.values())
    step = {"eager": torch_eager, "compile": torch_eager, "sdpa": torch_sdpa}.get(name.split("_")[1], torch_flex)
    if name.split("_")[1] in ("compile", "flex"):
        torch._dynamo.config.recompile_limit = 64  # each shape is a new program; the default of 8 would give up
        step = torch.compile(step, dynamic=False, fullgraph=True)
    if case.backward:
        for x in arguments[:4]:
            x.requires_grad_()
        call = lambda: torch.autograd.grad(step(*arguments), arguments[:4], grad_output)  # noqa: E731
    elif name.endswith("_gathered"):
        call = lambda: step(*gathered(*arguments))  # noqa: E731
    elif name == "torch_flex":
        call = lambda: step(*arguments, live_blocks(*arguments[3:], case.queries))  # noqa: E731
    elif name == "torch_flex_blocks_reused":
        call = partial(step, *arguments, live_blocks(*arguments[3:], case.queries))
    else:
        call = partial(step, *arguments)
    return call, lambda out: [x.cpu().numpy() for x in (out if case.backward else [out])], dict
