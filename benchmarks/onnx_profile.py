"""Where the time of a step goes: milliseconds by operator, as ONNX Runtime's own profiler has them.

    python benchmarks/onnx_profile.py LIVE [fused|portable] [TOKENS]

One layer, d=512, 8 heads, float32, two threads, about LIVE live memories, blocks of TOKENS=256; medians over blocks.
"""

import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

import onnxruntime
from test_model import BLOCK, STREAMED, Blocks, steady_stream

from refspan.export import OnnxModel, streaming_model

THREADS, STEPS, WARM_UP = 2, 40, 10


def main(live, form="portable", length=BLOCK):
    stream, _, _ = steady_stream(replace(STREAMED, max_span=4.0 * live), live)
    made = streaming_model(stream.config, stream.params, form=form)
    with tempfile.TemporaryDirectory() as folder, OnnxModel.of(made, threads=THREADS) as model:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_mem_pattern, options.log_severity_level = THREADS, False, 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
        model._session = onnxruntime.InferenceSession(
            made.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        opened, blocks = model.open(1), Blocks(1)
        opened.restore(stream.state())
        for _ in range(STEPS):
            opened.step(next(blocks)[0][:, :length])
        events = json.loads(Path(model.session.end_profiling()).read_text())
    runs, node_events = [], (e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"))
    starts = sorted(e["ts"] for e in events if e["name"] == "model_run")
    for event in node_events:
        step = sum(start <= event["ts"] for start in starts) - 1
        while len(runs) <= step:
            runs.append(defaultdict(float))
        runs[step][event["args"]["op_name"]] += event["dur"] / 1e3
    runs = runs[WARM_UP:]
    by_operator = {name: median(run[name] for run in runs) for name in {name for run in runs for name in run}}
    print(
        f"{live} live, {form}, {length} tokens, {opened.slots()[0]} slots: {sum(by_operator.values()):.1f} ms in nodes"
    )
    for name, time in sorted(by_operator.items(), key=lambda item: -item[1])[:12]:
        print(f"{name:<24}{time:8.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
