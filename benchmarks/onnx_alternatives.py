"""What the design in docs/onnx.md was chosen from: the parts of a step that could have been built differently, timed.

    python benchmarks/onnx_alternatives.py [SLOTS ..]

One layer's attention of M=256 queries over C distant memories, H=8, D=64, float32, two threads, ONNX Runtime on the
CPU. Every line is a graph of its own; all take turns, and medians are shown.
"""

import sys
from statistics import median
from time import perf_counter

import numpy as np
import onnx.helper
import onnx.parser
import onnxruntime

HEADS, SIZE, QUERIES, THREADS, TURNS = 8, 64, 256, 2, 15

PRIMITIVE = """
  transposed = Transpose <perm = [0, 1, 3, 2]> (k)
  scores = MatMul (q, transposed)
  {biased}
  weights = Softmax <axis = -1> (biased)
  o = MatMul (weights, v)
"""
UNNORMALISED = """
  transposed = Transpose <perm = [0, 1, 3, 2]> (k)
  scores = MatMul (q, transposed)
  biased = Add (scores, b)
  axis = Constant <value = int64[1] {-1}> ()
  largest = ReduceMax (biased, axis)
  shifted = Sub (biased, largest)
  weights = Exp (shifted)
  total = ReduceSum (weights, axis)
  sums = MatMul (weights, v)
  o = Div (sums, total)
"""
ADD, NO_BIAS = "biased = Add (scores, b)", "biased = Identity (scores)"
INPUTS = "float[B,H,M,E] q, float[B,H,C,E] k, float[B,H,C,V] v"


def graph(body, inputs=INPUTS, outputs="float[B,H,M,V] o", opset=24):
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> step ({inputs}) => ({outputs}) {{ {body} }}'
    )


def grouped(slots):
    """GroupQueryAttention, ONNX Runtime's own operator, which is tiled on the CPU."""
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "last", "total", "", "", "", "b"],
        ["o", "next_k", "next_v"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        scale=1.0,
    )
    shapes = {"q": [1, QUERIES, HEADS * SIZE], "past_k": [1, HEADS, slots, SIZE], "b": [1, 1, QUERIES, slots]}
    shapes |= {"k": shapes["q"], "v": shapes["q"], "past_v": shapes["past_k"], "last": [1], "total": [1]}
    inputs = [onnx.helper.make_tensor_value_info(n, 6 if n in ("last", "total") else 1, s) for n, s in shapes.items()]
    like = {"o": "q", "next_k": "past_k", "next_v": "past_k"}
    outputs = [onnx.helper.make_tensor_value_info(n, 1, shapes[other]) for n, other in like.items()]
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "step", inputs, outputs), opset_imports=opsets, ir_version=10
    )


class Candidate:
    """A graph with its inputs bound, and its outputs too where they are inputs."""

    def __init__(self, model, feed, aliases=()):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_mem_pattern = THREADS, False
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feed.items()}
        for name, value in values.items():
            self.binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            if output.name in dict(aliases):
                self.binding.bind_ortvalue_output(output.name, values[dict(aliases)[output.name]])
            else:
                self.binding.bind_output(output.name)
        self.seconds = []

    def run(self):
        start = perf_counter()
        self.session.run_with_iobinding(self.binding)
        self.seconds.append(perf_counter() - start)


def candidates(slots):
    rng = np.random.default_rng(0)

    def some(*shape):
        return rng.standard_normal(shape, dtype=np.float32) / 8

    def feed(width, value_width, bias_heads=1):
        made = {"q": some(1, HEADS, QUERIES, width), "k": some(1, HEADS, slots, width)}
        made["v"] = some(1, HEADS, slots, value_width)
        return made | ({"b": np.zeros((1, bias_heads, QUERIES, slots), np.float32)} if bias_heads else {})

    bias, per_head = f"{INPUTS}, float[B,1,M,C] b", f"{INPUTS}, float[B,H,M,C] b"
    attention, plain = "o = Attention <scale = 1.0> (q, k, v, b)", "o = Attention <scale = 1.0> (q, k, v)"
    yield "Attention, no bias", Candidate(graph(plain, INPUTS), feed(64, 64, 0))
    yield "Attention, bias of all heads", Candidate(graph(attention, bias), feed(64, 64))
    yield "Attention, bias of each head", Candidate(graph(attention, per_head), feed(64, 64, HEADS))
    yield "Attention, wider keys (65)", Candidate(graph(attention, bias), feed(65, 64))
    yield "Attention, wider keys and values (72): fused", Candidate(graph(attention, bias), feed(72, 72))
    tokens = {name: some(1, QUERIES, HEADS * SIZE) for name in ("q", "k", "v")}
    past = {name: some(1, HEADS, slots, SIZE) for name in ("past_k", "past_v")}
    last = {"last": np.array([slots - 1], np.int32), "total": np.array([slots], np.int32)}
    aliases = {"next_k": "past_k", "next_v": "past_v"}
    yield (
        "GroupQueryAttention, bias of all heads",
        Candidate(grouped(slots), {**tokens, **past, **last, "b": feed(64, 64)["b"]}, aliases),
    )
    yield "primitive, no bias", Candidate(graph(PRIMITIVE.format(biased=NO_BIAS), INPUTS, opset=18), feed(64, 64, 0))
    yield "primitive, bias of all heads", Candidate(graph(PRIMITIVE.format(biased=ADD), bias, opset=18), feed(64, 64))
    yield (
        "primitive, wider keys (65): portable",
        Candidate(graph(PRIMITIVE.format(biased=ADD), bias, opset=18), feed(65, 64)),
    )
    yield (
        "primitive, wider keys and values (65)",
        Candidate(graph(PRIMITIVE.format(biased=ADD), bias, opset=18), feed(65, 65)),
    )
    yield "primitive, sum of exponentials kept", Candidate(graph(UNNORMALISED, bias, opset=18), feed(64, 64))
    store, new = "float[B,H,C,E] s", "float[B,H,M,E] n"
    rows = {"s": some(1, HEADS, slots, SIZE), "n": some(1, HEADS, QUERIES, SIZE)}
    index = np.stack(np.broadcast_arrays(0, np.arange(HEADS)[:, None], np.arange(QUERIES)), axis=-1)[None]
    yield (
        "append one block to keys: a copy",
        Candidate(graph("t = Concat <axis = 2> (s, n)", f"{store}, {new}", "float[B,H,T,E] t", 18), rows),
    )
    yield (
        "write one block into keys: in place",
        Candidate(
            graph("t = ScatterND (s, i, n)", f"{store}, int64[B,H,M,3] i, {new}", "float[B,H,C,E] t", 18),
            {**rows, "i": index.astype(np.int64)},
            {"t": "s"},
        ),
    )


def main(sizes):
    columns = {}
    for slots in sizes:
        made = dict(candidates(slots))
        for _ in range(TURNS):
            for candidate in made.values():
                candidate.run()
        for name, candidate in made.items():
            columns.setdefault(name, []).append(median(candidate.seconds[2:]) * 1e3)
    print(f"{'milliseconds, C =':<46}" + "".join(f"{slots:>9}" for slots in sizes))
    for name, times in columns.items():
        print(f"{name:<46}" + "".join(f"{time:9.1f}" for time in times))


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [1024, 4096, 16384])
