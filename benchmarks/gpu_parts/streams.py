"""The streaming step that is timed: a model of one layer in its steady state, and whoever runs it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import refspan

from .device import library
from .traces import trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCABULARY, RAMP = 256, 128.0
ERROR_LIMIT = {"float16": 0.1, "float32": 1e-3}
"""Of log-probabilities, against the reference in float64 on the same rounded parameters."""
CONTENDERS = [
    "torch_eager", "onnxruntime_fused", "onnxruntime_portable", "torch_flex", "torch_flex_parts", "torch_flex_whole",
]  # fmt: skip


@dataclass(frozen=True)
class StreamCase:
    """Sizes of a step."""

    hidden: int
    heads: int
    batch: int
    queries: int
    live: int
    dtype: str
    block: int
    """M of the model: as many positions have embeddings."""

    def config(self):
        """The model; spans differ so that about as many memories die in a block as are born."""
        return refspan.ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            feedforward_size=4 * self.hidden,
            layers=1,
            heads=self.heads,
            head_size=self.hidden // self.heads,
            block_size=self.block,
            max_span=4.0 * self.live,
            ramp=RAMP,
        )


class Steady:
    """Parameters, memories that have been read for ever, and tokens that go on from there; the same for all."""

    def __init__(self, case):
        from test_model import parameters, spans

        self.case, self.config = case, case.config()
        params = parameters(self.config, case.live)
        table = params["embedding.weight"]
        age = np.arange(int(self.config.max_span + RAMP), 0, -1)
        hidden = table[np.random.default_rng(2).integers(0, VOCABULARY, age.shape)]
        span = spans(self.config, hidden, params["layers.0.span.weight"], params["layers.0.span.bias"])
        wanted = (age - span < RAMP) | (age <= case.block)
        self.params = {name: array.astype(case.dtype) for name, array in params.items()}
        self.memory = hidden[wanted][None].astype(case.dtype), age[wanted][None]

    def tokens(self):
        """Blocks without end, int64 [B, M]."""
        rng = np.random.default_rng(1)
        while True:
            yield rng.integers(0, VOCABULARY, (self.case.batch, self.case.queries))

    def reference(self, dtype):
        """A stream of the reference with one row of these memories."""
        hidden, age = self.memory
        params = {name: array.astype(dtype) for name, array in self.params.items()}
        return refspan.open_model(self.config, params, batch=1, memory=[(hidden.astype(dtype), age)])

    def expected(self):
        """Log-probabilities of the first block's first row, in float64."""
        return self.reference("float64").step(next(self.tokens())[:1])

    def state(self):
        """For all rows, in float32."""
        state = self.reference("float32").state()
        return {n: x if n == "model" else np.repeat(x, self.case.batch, axis=0) for n, x in state.items()}


def contender(name, steady, device):
    """A function that reads the next block and returns its log-probabilities, and one that says more of itself."""
    if name.startswith("onnxruntime"):
        return onnxruntime_stream(name.split("_")[1], steady, device)
    if name == "torch_eager":
        return eager_stream(steady, device)
    return flex_stream(steady, device, compiled=name.removeprefix("torch_flex").removeprefix("_"))


def onnxruntime_stream(form, steady, device, session_options=None):
    """Our exported model."""
    from refspan.export import OnnxModel, streaming_model

    library("onnxruntime", device)
    made = streaming_model(steady.config, steady.params, form=form, dtype=steady.case.dtype)
    model = OnnxModel.of(made, device=device, session_options=session_options)
    stream = model.open(steady.case.batch)
    state = steady.state()
    stream.restore({**state, "model": model.fingerprint})
    tokens = steady.tokens()

    def step():
        return stream.step(next(tokens))

    def about():
        facts = {"slots": stream.slots(), "live": stream.memory_size(), "state_mib": stream.state_bytes() / 2**20}
        return facts | kernels(device, step) | trace(step, device)

    return step, about


def kernels(device, call):
    """Names of the attention kernels that a step says it uses."""
    if device != "cuda":
        return {}
    from refspan.export.session import captured_log, kernels_in

    with captured_log(library("onnxruntime", device), severity=0) as messages:
        call()
    return {"kernel": kernels_in(messages)}


def eager_stream(steady, device):
    """PyTorch in the style of the original, see `eager.py`."""
    torch = library("torch", device)
    from eager import EagerTransformer, Held

    hidden, age = (np.repeat(x, steady.case.batch, axis=0) for x in steady.memory)
    model = EagerTransformer(steady.config, steady.params).to(device)
    held, tokens = [Held(torch.from_numpy(hidden).to(device), torch.from_numpy(age).to(device))], steady.tokens()

    def call():
        with torch.inference_mode(), torch.device(device):
            log_probs, _, held[:] = model(torch.from_numpy(next(tokens)).to(device), held)
        return log_probs.cpu().numpy()

    return call, lambda: {"held": held[0].age.shape[1]} | trace(call, device)


def flex_stream(steady, device, *, compiled):
    """PyTorch with cached keys and values and FlexAttention, see `flex.py`."""
    torch = library("torch", device)
    from .flex import FlexStream

    stream = FlexStream(torch, steady, device, compiled=compiled)
    tokens = steady.tokens()

    def step():
        return stream.step(next(tokens))

    return step, lambda: {"slots": stream.slots} | trace(step, device)


def error_of(call, steady):
    """How far the first row of the first block is off; raises if that is too far."""
    wrong = float(np.max(np.abs(np.asarray(call()[:1], np.float64) - steady.expected())))
    limit = ERROR_LIMIT[steady.case.dtype]
    if not wrong <= limit:
        raise ValueError(f"log-probabilities are off by {wrong:.3g}, allowed {limit:g}")
    return {"error": wrong, "error_limit": limit}
