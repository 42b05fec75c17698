"""Transformer-XL without forgetting on ONNX Runtime: what Expire-Span saves.

The same layer with the same parameters, attending to all of the last L steps. Keys and values are cached and written in
place, and relative positions reach over the whole window, as in the original's own baseline. No memory has a mask but
for causality, which is a sum with numbers made once.
"""

from string import Template

import numpy as np
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnxruntime

_LAYER = Template("""
<ir_version: 8, opset_import: ["" : 18]>
dense (int64[1, $m] tokens, int64[1, $h, $m, 3] index, float[1, $h, $n, $d] key, float[1, $h, $n, $d] value,
       float[1, 1, $m, $n] causal)
  => (float[1, $m, v] log_probs, float[1, $h, $n, $d] new_key, float[1, $h, $n, $d] new_value)
{
  x = Gather (embedding, tokens)
  by_head = Constant <value = int64[4] {0, 0, $h, $d}> ()
  q_flat = MatMul (x, query)
  k_flat = MatMul (x, key_weight)
  v_flat = MatMul (x, value_weight)
  q_place = Reshape (q_flat, by_head)
  k_place = Reshape (k_flat, by_head)
  v_place = Reshape (v_flat, by_head)
  q_unscaled = Transpose <perm = [0, 2, 1, 3]> (q_place)
  k = Transpose <perm = [0, 2, 1, 3]> (k_place)
  v = Transpose <perm = [0, 2, 1, 3]> (v_place)
  scale = Constant <value = float {$scale}> ()
  q = Mul (q_unscaled, scale)
  new_key = ScatterND (key, index, k)
  new_value = ScatterND (value, index, v)
  k_transposed = Transpose <perm = [0, 1, 3, 2]> (new_key)
  content = MatMul (q, k_transposed)
  by_distance = MatMul (q, position)
  with_position = Add (content, by_distance)
  scores = Add (with_position, causal)
  weights = Softmax <axis = -1> (scores)
  attended = MatMul (weights, new_value)
  by_place = Transpose <perm = [0, 2, 1, 3]> (attended)
  joined_shape = Constant <value = int64[3] {0, 0, -1}> ()
  joined = Reshape (by_place, joined_shape)
  projected = MatMul (joined, output)
  after = Add (x, projected)
  y = LayerNormalization <epsilon = 1e-5> (after, norm1_weight, norm1_bias)
  inner_product = MatMul (y, in_weight)
  inner = Add (inner_product, in_bias)
  active = Relu (inner)
  outer_product = MatMul (active, out_weight)
  outer = Add (outer_product, out_bias)
  before = Add (y, outer)
  z = LayerNormalization <epsilon = 1e-5> (before, norm2_weight, norm2_bias)
  logits_product = MatMul (z, logit_weight)
  logits = Add (logits_product, logit_bias)
  log_probs = LogSoftmax <axis = -1> (logits)
}
""")


class DenseStream:
    """One layer, one row, blocks of M tokens, a window of L steps in a ring of L + M places.

    Places of a ring are not in order of time, so that position scores, here taken by place, are those of other
    distances than they should be: the results are no model's, but every number that one needs is computed once, and
    none twice. The skewing of position scores that a right one needs on top is left out, in its favour.
    """

    def __init__(self, config, params, window, block, threads):
        self.block, self.places = block, window + block
        heads, size = config.heads, config.head_size
        text = _LAYER.substitute(m=block, n=self.places, h=heads, d=size, scale=repr(size**-0.5))
        model = onnx.parser.parse_model(text)
        p = {name.removeprefix("layers.0."): array for name, array in params.items()}
        rng = np.random.default_rng(0)
        weights = {
            "embedding": p["embedding.weight"],
            "query": p["attention.query.weight"].T,
            "key_weight": p["attention.key.weight"].T,
            "value_weight": p["attention.value.weight"].T,
            "output": p["attention.output.weight"].T,
            "position": rng.standard_normal((size, self.places)).astype(np.float32),
            "in_weight": p["feedforward.in.weight"].T,
            "in_bias": p["feedforward.in.bias"],
            "out_weight": p["feedforward.out.weight"].T,
            "out_bias": p["feedforward.out.bias"],
            "logit_weight": p["output.weight"].T,
            "logit_bias": p["output.bias"],
        }
        weights |= {f"norm{i}_{kind}": p[f"norm{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")}
        tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()]
        model.graph.initializer.extend(tensors)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_mem_pattern = threads, False
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        value, shape = onnxruntime.OrtValue.ortvalue_from_numpy, (1, heads, self.places, size)
        self.binding = self.session.io_binding()
        self.state = {name: value(np.zeros(shape, np.float32)) for name in ("key", "value")}
        for name, held in self.state.items():
            self.binding.bind_ortvalue_input(name, held)
            self.binding.bind_ortvalue_output(f"new_{name}", held)
        causal = np.triu(np.full((block, block), -np.inf, np.float32))
        self.causal = np.concatenate([np.zeros((block, window), np.float32), causal], axis=1)[None, None]
        self.binding.bind_ortvalue_input("causal", value(self.causal))
        self.binding.bind_output("log_probs")
        self.start, self.heads = 0, heads

    def step(self, tokens):
        """[1, M] -> [1, M, V]."""
        place = (self.start + np.arange(self.block)) % self.places
        self.start = (self.start + self.block) % self.places
        index = np.zeros((1, self.heads, self.block, 3), np.int64)
        index[..., 1], index[..., 2] = np.arange(self.heads)[:, None], place
        self.binding.bind_cpu_input("index", index)
        self.binding.bind_cpu_input("tokens", np.ascontiguousarray(tokens))
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[2].numpy()

    def state_bytes(self):
        """Bytes of keys and values."""
        return sum(int(np.prod(held.shape())) * 4 for held in self.state.values())
