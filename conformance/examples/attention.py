"""The mask of Expire-Span as a backend that needs NumPy only: the protocol of docs/protocol.md in one screen.

refspan check --backend "exec:python conformance/examples/attention.py"
"""

import json
import sys
from typing import Any, BinaryIO

import numpy as np

Array = Any


def soft_mask(span: Array, age: Array, queries: int, ramp: float) -> Array:
    """[B, N], [B, N] -> [B, M, N]."""
    distance = age[:, None, :] + np.arange(queries)[:, None]
    mask = np.clip(1 + (span[:, None, :] - distance.astype(span.dtype)) / span.dtype.type(ramp), 0, 1)
    return np.where(distance >= 1, mask, 0).astype(span.dtype)


def read_tensor(stream: BinaryIO) -> Array:
    """One npy file; np.load wants a file that can seek, which a pipe cannot."""
    start = stream.read(10)
    header = stream.read(int.from_bytes(start[8:10], "little"))
    about = eval(header)  # noqa: S307 - a literal, from the checker that started us
    dtype, shape = np.dtype(about["descr"]), about["shape"]
    return np.frombuffer(stream.read(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)


def write(header: dict[str, Any], **tensors: Array) -> None:
    """A message: a line of JSON, then the tensors that it names."""
    out = sys.stdout.buffer
    out.write(json.dumps({**header, "tensors": list(tensors)}).encode() + b"\n")
    for array in tensors.values():
        np.lib.format.write_array(out, array, version=(1, 0))
    out.flush()


def main() -> None:
    """Answer requests until the checker says stop, or goes away."""
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        x = {name: read_tensor(sys.stdin.buffer) for name in asked["tensors"]}
        if asked["cmd"] == "start":
            write({"version": 1, "name": "attention.py", "operations": ["soft_mask"]})
        elif asked["cmd"] == "stop":
            return
        elif asked["operation"] == "soft_mask":
            write({"seq": asked["seq"]}, mask=soft_mask(x["span"], x["age"], asked["queries"], asked["ramp"]))
        else:
            write({"seq": asked["seq"], "not_offered": True})


if __name__ == "__main__":
    main()
