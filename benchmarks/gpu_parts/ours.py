"""The attention step in our graphs on ONNX Runtime and in our reference."""

from functools import partial

import numpy as np

import refspan
from refspan.errors import SetupError

from .device import library, line, runtime
from .peers import gathered
from .steps import RAMP

GRAPHS = ["fused", "portable", "gradient", "model fused", "model portable", "repack fused", "repack portable"]


def model_of(graph, dtype, device):
    """The graph as it is run on this device (on CUDA the fused one is at opset 23); models with two layers."""
    from refspan.export import attention_model, gradient_model

    if graph == "gradient":
        return gradient_model(dtype)
    if " " in graph:
        return streaming_graph(*graph.split(), dtype)
    return attention_model(graph, dtype, opset=23 if device == "cuda" and graph == "fused" else None)


def streaming_graph(which, form, dtype):
    """A small model, or the graph that moves its distant memories."""
    from refspan.export import streaming_model
    from refspan.export.layout import Layout
    from refspan.export.slots import repack_model

    sizes = {"vocab_size": 64, "hidden_size": 128, "feedforward_size": 512, "heads": 2, "head_size": 64}
    config = refspan.ModelConfig(**sizes, layers=2, block_size=64, max_span=1e4, ramp=RAMP)
    params = refspan.initial_parameters(config, 0)
    if which == "model":
        return streaming_model(config, params, form=form, dtype=dtype)
    return repack_model(Layout(config, len(params["position.weight"]), form, dtype), 23 if form == "fused" else 18)


def onnxruntime_contender(name, case, data, device):
    """Our graph with inputs and outputs that stay on the device; outside of the timed calls nothing is copied."""
    from refspan.export.session import captured_log, kernels_in, make_session

    ort = library("onnxruntime", device)
    graph = "gradient" if case.backward else name.split("_")[1]
    model = model_of(graph, case.dtype, device)
    notes = {}
    try:
        session = make_session(model, device=device, threads=None, options={})
    except SetupError as error:  # timed all the same, and marked
        notes["cpu_fallback"] = line(error)
        session = make_session(model, device=device, threads=None, options={"session.disable_cpu_ep_fallback": "0"})
    bound = session.io_binding()
    feed = {**data, "ramp": np.asarray(RAMP, np.float32)}
    values = {x.name: ort.OrtValue.ortvalue_from_numpy(feed[x.name], device, 0) for x in session.get_inputs()}
    for key, value in values.items():
        bound.bind_ortvalue_input(key, value)
    outputs = []
    for x in session.get_outputs():
        like = data[x.name.removeprefix("grad_")] if case.backward else data["query"]
        outputs.append(ort.OrtValue.ortvalue_from_shape_and_type(like.shape, like.dtype, device, 0))
        bound.bind_ortvalue_output(x.name, outputs[-1])
    options = ort.RunOptions()
    if device == "cuda":  # we wait ourselves, once per repetition, as for the others
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    call = partial(session.run_with_iobinding, bound, options)
    if name.endswith("_gathered"):
        torch = library("torch", device)
        tensors = [torch.from_numpy(data[key]).to(device) for key in ("query", "key", "value", "span", "age")]
        names = ("key", "value", "span", "age")

        def call():
            picked = gathered(*tensors)[1:]
            for key, x in zip(names, picked, strict=True):
                kind = str(x.dtype).removeprefix("torch.")
                bound.bind_input(key, device, 0, np.dtype(kind), tuple(x.shape), x.data_ptr())
            runtime(device)[0]()  # ONNX Runtime works on a stream of its own
            session.run_with_iobinding(bound, options)
            runtime(device)[0]()  # before torch may give `picked` to others

    def about():
        if graph != "fused" or device != "cuda":
            return notes
        with captured_log(ort, severity=0) as messages:
            call()
        return {**notes, "kernel": kernels_in(messages) or [m for m in messages if "ttention: using" in m][:3]}

    return call, lambda _: [x.numpy() for x in outputs], about


def reference_contender(name, case, data, device):  # noqa: ARG001
    """The reference on the device: CuPy, or NumPy on the CPU."""
    xp = np if device == "cpu" else library("cupy")
    x = {key: xp.asarray(value) for key, value in data.items()}

    def call():
        out, saved = refspan.span_attention(*(x[n] for n in ("query", "key", "value", "span", "age")), ramp=RAMP)
        return refspan.span_attention_backward(x["grad_output"], saved)[:4] if case.backward else (out,)

    return call, lambda out: [part if device == "cpu" else xp.asnumpy(part) for part in out], dict
