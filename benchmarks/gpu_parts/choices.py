"""What the design on a GPU is chosen from: kernels of attention, a part without a bias, CUDA graphs for single tokens.

`benchmarks/onnx_alternatives.py` asks the same of CPUs.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from .device import failure, library, release, runtime
from .speed import peak, side_by_side
from .streams import Steady, StreamCase, kernels
from .traces import attention_us, trace

ATTENTION = "o = Attention <scale = 1.0> (q, k, v{bias})"
MULTIHEAD = "o = com.microsoft.MultiHeadAttention <num_heads = {heads}, scale = 1.0> (q, k, v{skip}{bias})"
TWO_PARTS = """
  cut = Constant <value = int64[2] {{{plain}, {biased}}}> ()
  k1, k2 = Split <axis = 2> (k, cut)
  v1, v2 = Split <axis = 2> (v, cut)
  o1 = Attention <scale = 1.0> (q, k1, v1)
  o2 = Attention <scale = 1.0> (q, k2, v2, b)
  o = Add (o1, o2)
"""


@dataclass(frozen=True)
class Sizes:
    """Of an attention step over distant memories."""

    batch: int
    heads: int
    queries: int
    slots: int
    size: int
    dtype: str

    def flops(self):
        """Of the two products that matter."""
        return 4 * self.batch * self.heads * self.queries * self.slots * self.size


def sections(settings):
    """As `gpu_parts` says."""
    small = settings.small
    sizes = [Sizes(2, 2, 64, 256, 64, "float16"), Sizes(1, 2, 64, 256, 64, "float32")]
    if not small:
        sizes = [Sizes(16, 16, 512, 8192, 64, "float16"), Sizes(1, 8, 256, 16384, 64, "float16")]
        sizes += [Sizes(1, 8, 256, 16384, 64, "float32")]
    parts = {f"matmul {dtype}": partial(peak, dtype) for dtype in ("float16", "float32")}
    for s in sizes:
        key = f"attention {s.dtype} B={s.batch} H={s.heads} M={s.queries} C={s.slots}"
        parts[key] = partial(attention, s)
    case = StreamCase(32, 2, 1, 1, 200, "float32", 64) if small else StreamCase(512, 8, 1, 1, 1000, "float16", 256)
    parts["CUDA graph of a single token"] = partial(cuda_graph, case)
    return parts


def attention(sizes, settings, results):
    """Time of M queries over C memories: which kernel, with a bias or without, and in two parts."""
    runtime(settings.device)
    device, rows, calls = settings.device, {}, {}
    for name, make in {**onnx_candidates(sizes, device), **torch_candidates(sizes, device)}.items():
        settings.check_time()
        try:
            calls[name] = make()
            calls[name]()
            rows[name] = {}
        except Exception as error:  # noqa: BLE001 - a kernel that does not take these arguments, say
            rows[name] = failure(error)
            calls.pop(name, None)
        release(device)
        yield {"status": "running", "candidates": rows}
    for name, times in side_by_side(calls, settings).items():
        rows[name] |= times
    best = results.get(f"matmul {sizes.dtype}", {}).get("tflops")
    for name, call in calls.items():
        rows[name] |= (kernels(device, call) if name.startswith("onnx") else {}) | trace(call, device)
        if "ms" in rows[name]:
            rows[name]["tflops"] = sizes.flops() / rows[name]["ms"] / 1e9
            rows[name]["share_of_peak"] = rows[name]["tflops"] / best if best else None
        if us := attention_us(rows[name]):
            rows[name]["kernel_tflops"] = sizes.flops() / us / 1e6
    yield {"status": "done", "candidates": rows}


def arrays(sizes, width):
    """Queries, keys, values and a bias for all heads in which a few memories fade, by the names in the graphs."""
    rng = np.random.default_rng(0)

    def some(count):
        return rng.standard_normal((sizes.batch, sizes.heads, count, width), np.float32) / 8

    made = {"q": some(sizes.queries), "k": some(sizes.slots), "v": some(sizes.slots)}
    bias = np.zeros((sizes.batch, 1, sizes.queries, sizes.slots), np.float32)
    bias[..., ::16] = math.log(0.5)
    return {name: x.astype(sizes.dtype) for name, x in (made | {"b": bias}).items()}


def onnx_candidates(sizes, device):
    """Name -> function that makes the call."""
    wide = sizes.size + 8  # with room for slot 0, see docs/onnx.md
    plain, biased = sizes.slots * 7 // 8, sizes.slots - sizes.slots * 7 // 8
    run = partial(onnx_call, sizes, device)
    made = {
        "onnxruntime bias, wider keys and values": partial(run, ATTENTION.format(bias=", b"), wide),
        "onnxruntime bias": partial(run, ATTENTION.format(bias=", b"), sizes.size),
        "onnxruntime no bias": partial(run, ATTENTION.format(bias=""), sizes.size),
        "onnxruntime 7/8 without, 1/8 with bias": partial(
            run, TWO_PARTS.format(plain=plain, biased=biased), wide, bias_slots=biased
        ),
    }
    for name, bias, skip in (("bias", ", b", ", , "), ("no bias", "", "")):
        body = MULTIHEAD.format(heads=sizes.heads, bias=bias, skip=skip)
        made[f"onnxruntime MultiHeadAttention {name}"] = partial(run, body, sizes.size, flat=True)
    return made


def onnx_call(sizes, device, body, width, *, bias_slots=None, flat=False):
    """A call that runs a graph of one step, with everything on the device."""
    import onnx.parser

    from refspan.export.session import make_session

    ort = library("onnxruntime", device)
    kind = {"float16": "float16", "float32": "float"}[sizes.dtype]
    data = arrays(sizes, width)
    if bias_slots:
        data["b"] = np.ascontiguousarray(data["b"][..., :bias_slots])
    if ", b" not in body:
        del data["b"]
    if flat:  # queries as MultiHeadAttention takes them
        data["q"] = np.ascontiguousarray(np.moveaxis(data["q"], 1, 2)).reshape(sizes.batch, sizes.queries, -1)
    inputs = ", ".join(f"{kind}[{','.join(map(str, x.shape))}] {name}" for name, x in data.items())
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]> step ({inputs}) => ({kind}[] o) {{ {body} }}
    """)
    session = make_session(model, device=device, threads=None, options={})
    binding = session.io_binding()
    for name, x in data.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(x, device, 0))
    binding.bind_output("o", device)
    return partial(session.run_with_iobinding, binding, unsynchronised(ort, device))


def unsynchronised(ort, device):
    """Options of a run that does not wait for the device; whoever times it does."""
    options = ort.RunOptions()
    if device == "cuda":
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def torch_candidates(sizes, device):
    """PyTorch's own attention, held to one kernel each: what the device can do."""

    def make(backend, *, biased):
        torch = library("torch", device)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        data = {name: torch.from_numpy(x).to(device) for name, x in arrays(sizes, sizes.size).items()}
        shape = (sizes.batch, sizes.heads, sizes.queries, sizes.slots)
        bias = data["b"].expand(shape) if biased else None
        which = getattr(SDPBackend, backend)

        def call():
            with sdpa_kernel(which), torch.inference_mode():
                return torch.nn.functional.scaled_dot_product_attention(data["q"], data["k"], data["v"], bias)

        return call

    pairs = [("FLASH_ATTENTION", False), ("CUDNN_ATTENTION", False), ("EFFICIENT_ATTENTION", True)]
    pairs += [("CUDNN_ATTENTION", True)]
    return {
        f"torch {backend} {'bias' if biased else 'no bias'}": partial(make, backend, biased=biased)
        for backend, biased in pairs
    }


def cuda_graph(case, settings, results):  # noqa: ARG001
    """A step of one token with all inputs and outputs at fixed addresses: run as it is, and as a CUDA graph."""
    runtime(settings.device)
    steady, rows, calls = Steady(case), {}, {}
    for name in ("plain", "graph"):
        try:
            calls[name] = fixed_step(steady, settings.device, graph=name == "graph")
            for _ in range(3):  # the first runs warm up and capture
                calls[name]()
            rows[name] = {}
        except Exception as error:  # noqa: BLE001
            rows[name] = failure(error)
            calls.pop(name, None)
        yield {"status": "running", "ways": rows}
    for name, times in side_by_side(calls, settings).items():
        rows[name] |= times
    for name, call in calls.items():
        rows[name] |= trace(call, settings.device)
    yield {"status": "done", "ways": rows}


def fixed_step(steady, device, *, graph):
    """A call that runs the model's step on one and the same token and memories again and again."""
    from refspan.export import OnnxModel, streaming_model
    from refspan.export.stream_buffers import DISTANT, RECENT

    if graph and device != "cuda":
        raise ValueError("a CUDA graph needs CUDA")
    ort = library("onnxruntime", device)
    made = streaming_model(steady.config, steady.params, dtype=steady.case.dtype)
    with OnnxModel.of(made, device=device) as model, model.open(steady.case.batch) as stream:
        stream.restore({**steady.state(), "model": model.fingerprint})
        recent, distant = stream._buffers.arrays(0)
    options = ort.SessionOptions()
    options.log_severity_level, options.enable_mem_pattern = 3, False
    provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    settings = {"use_tf32": "0", "enable_cuda_graph": str(int(graph))} if device == "cuda" else {}
    session = ort.InferenceSession(made.SerializeToString(), options, providers=[(provider, settings)])
    feed = {f"layers.0.recent_{name}": recent[name] for name in RECENT}
    feed |= {f"layers.0.distant_{name}": distant[name] for name in DISTANT}
    feed |= {"tokens": next(steady.tokens()), "lengths": np.full(steady.case.batch, steady.case.queries)}
    feed["restart"] = np.zeros(steady.case.batch, bool)
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), device, 0) for name, x in feed.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    log_probs = np.zeros((*feed["tokens"].shape, steady.config.vocab_size), steady.case.dtype)
    like = {"log_probs": log_probs, "live": np.zeros((1, steady.case.batch, 3), np.int64)}
    for x in session.get_outputs():
        array = like.get(x.name, feed.get(x.name.removesuffix(".next")))
        binding.bind_ortvalue_output(x.name, ort.OrtValue.ortvalue_from_numpy(np.zeros_like(array), device, 0))
    return partial(session.run_with_iobinding, binding, unsynchronised(ort, device))
