"""The strongest peer: PyTorch with cached keys and values in slots that are reused, and FlexAttention over them."""

import math

import numpy as np


class FlexStream:
    """One layer, post-norm. What a good engineer would write in PyTorch: nothing is projected twice, nothing is copied.

    The block's own memories are written, in place, into the slots that have been dead longest, and all slots are
    attended to; mask and position scores are made inside of the kernel.

    Args:
        torch: the package.
        steady: parameters, memories and tokens.
        device: where.
        compiled: "" not at all, "parts" what is before, in and after the kernel, "whole" all of it as one program.
            The latter is what one would want, and more than Inductor can do on some devices.
    """

    def __init__(self, torch, steady, device, *, compiled):
        from torch.nn.attention.flex_attention import flex_attention

        config, case = steady.config, steady.case
        self.torch, self.device, self.config = torch, device, config
        self.p = {name: torch.from_numpy(x.copy()).to(device) for name, x in steady.params.items()}
        state = steady.state()
        held = state["layers.0.age"].shape[1]
        self.slots = -(-(held + 2 * case.block) // 128) * 128
        shape, dtype = (case.batch, config.heads, self.slots, config.head_size), self.p["output.weight"].dtype
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)
        self.span = torch.full((case.batch, self.slots), -1e9, device=device)
        self.age = torch.ones((case.batch, self.slots), dtype=torch.int64, device=device)
        for name, store in (("key", self.key), ("value", self.value)):
            x = state[f"layers.0.{name}"].reshape(case.batch, held, config.heads, config.head_size)
            store[:, :, :held] = torch.from_numpy(np.moveaxis(x, 1, 2).copy()).to(device, dtype)
        self.span[:, :held] = torch.from_numpy(state["layers.0.span"]).to(device)
        self.age[:, :held] = torch.from_numpy(state["layers.0.age"]).to(device)
        self.flex = flex_attention
        torch._dynamo.config.recompile_limit = 64  # each shape is a new program; the default of 8 would give up
        for name in {"": [], "parts": ["before", "attend", "after"], "whole": ["block"]}[compiled]:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, fullgraph=True))

    def step(self, tokens):
        """[B, M] -> [B, M, V]."""
        torch = self.torch
        with torch.inference_mode():
            return self.block(torch.from_numpy(tokens).to(self.device)).cpu().numpy()

    def block(self, tokens):
        x, query, by_distance = self.before(tokens)
        return self.after(x, self.attend(query, by_distance))

    def before(self, tokens):
        """Write the block's memories; returns its input, and queries with their position scores.

        [B, M] -> [B, M, d], [B, H, M, D], [B, H, M, P].
        """
        torch, p, config = self.torch, self.p, self.config
        x = p["embedding.weight"][tokens]
        batch, queries, _ = x.shape

        def heads(name):
            flat = torch.nn.functional.linear(x, p[f"layers.0.attention.{name}.weight"])
            return flat.unflatten(2, (config.heads, config.head_size)).transpose(1, 2)

        query, key, value = heads("query") / math.sqrt(config.head_size), heads("key"), heads("value")
        z = (x.float() @ p["layers.0.span.weight"].float()) / config.span_temperature + p["layers.0.span.bias"].float()
        slot = torch.topk(self.age - self.span, queries, dim=1).indices  # [B, M], the longest dead
        index = slot[:, None, :, None].expand(batch, config.heads, queries, config.head_size)
        self.key.scatter_(2, index, key)
        self.value.scatter_(2, index, value)
        self.span.scatter_(1, slot, config.max_span * torch.sigmoid(z))
        self.age.scatter_(1, slot, -torch.arange(queries, device=x.device).expand(batch, queries))
        return x, query, query @ p["position.weight"].T

    def attend(self, query, by_distance):
        """FlexAttention over all slots.   [B, H, M, D] -> [B, H, M, D]."""
        torch, span, age, ramp, places = self.torch, self.span, self.age, self.config.ramp, by_distance.shape[3]

        def score_mod(score, b, h, m, n):
            distance = age[b, n] + m
            mask = torch.clamp(1 + (span[b, n] - distance) / ramp, 0, 1)
            mask = torch.where(distance >= 1, mask, 0.0)
            near = (distance >= 1) & (distance <= places)
            place = torch.clamp(distance - 1, 0, places - 1)
            score = score + torch.where(near, by_distance[b, h, m, place], 0.0)
            return score + torch.log(mask)

        return self.flex(query, self.key, self.value, score_mod=score_mod, scale=1.0)

    def after(self, x, attended):
        """The rest of the layer; memories grow older.   [B, M, d], [B, H, M, D] -> [B, M, V]."""
        torch, p = self.torch, self.p
        linear, norm, size = torch.nn.functional.linear, torch.nn.functional.layer_norm, x.shape[2]
        y = x + linear(attended.transpose(1, 2).flatten(2), p["layers.0.attention.output.weight"])
        y = norm(y, (size,), p["layers.0.norm1.weight"], p["layers.0.norm1.bias"])
        inner = linear(y, p["layers.0.feedforward.in.weight"], p["layers.0.feedforward.in.bias"]).relu()
        y = y + linear(inner, p["layers.0.feedforward.out.weight"], p["layers.0.feedforward.out.bias"])
        y = norm(y, (size,), p["layers.0.norm2.weight"], p["layers.0.norm2.bias"])
        self.age.add_(x.shape[1])
        return torch.log_softmax(linear(y, p["output.weight"], p["output.bias"]), dim=-1)
