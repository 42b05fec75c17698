"""Messages of the protocol: a line of JSON, then the tensors that it names, each as an npy file (version 1.0)."""

import json
from collections.abc import Callable, Mapping
from io import BytesIO
from math import prod
from typing import Any

import numpy as np

from refspan.conformance.external.child import Child
from refspan.conformance.guard import one_line
from refspan.conformance.protocol import Array
from refspan.conformance.sessions import Hung

VERSION = 1
"""Of the protocol."""
LARGEST = 1 << 28
"""Bytes of a tensor that a command may send."""
MOST_TENSORS = 10_000
DTYPES = {"<f2", "<f4", "<f8", "<i8", "|b1"}
_MAGIC = b"\x93NUMPY\x01\x00"


def message(header: Mapping[str, Any], tensors: Mapping[str, Array]) -> bytes:
    """A request as it goes over the wire."""
    out = BytesIO()
    out.write(json.dumps({**header, "tensors": list(tensors)}).encode() + b"\n")
    for array in tensors.values():
        np.lib.format.write_array(out, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def answer(child: Child) -> tuple[dict[str, Any], dict[str, Array]]:
    """The next message from a command.

    Raises:
        Hung: there is none, or it is not one; where its end is cannot be told, so the command has to be started anew.
    """
    line = child.line()
    try:
        header = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise Hung(f"expected a line of JSON, an object; the command wrote {_shown(line)}")
    names = header.get("tensors", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)) or len(names) > MOST_TENSORS:
        raise Hung(f"`tensors`: got {one_line(repr(names))}, expected a list of names")
    return header, {one_line(name): read_tensor(child.read, one_line(name)) for name in names}


def read_tensor(read: Callable[[int], bytes], name: str) -> Array:
    """The array of an npy file, of which `read(n)` returns the next n bytes; raises Hung if it is not one."""
    start = read(len(_MAGIC) + 2)
    if start[: len(_MAGIC)] != _MAGIC:
        raise Hung(f"tensor {name!r}: expected an npy file of version 1.0; the command wrote {_shown(start)}")
    length = int.from_bytes(start[len(_MAGIC) :], "little")
    described = read(length)
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(start[-2:] + described))
    except ValueError as error:
        raise Hung(f"tensor {name!r}: {one_line(error)}") from None
    if dtype.str not in DTYPES:
        raise Hung(f"tensor {name!r}: got dtype {dtype.str}, expected one of {', '.join(sorted(DTYPES))}")
    if any(size < 0 for size in shape) or len(shape) > 8 or (size := prod(shape) * dtype.itemsize) > LARGEST:
        raise Hung(f"tensor {name!r}: shape {one_line(shape)} is beyond the limit of {LARGEST} bytes")
    flat = np.frombuffer(read(size), dtype)
    return np.array(flat.reshape(shape, order="F" if fortran else "C"))


def _no_number(text: str) -> None:
    """JSON has no NaN and no infinity, although Python reads them."""
    raise ValueError(text)


def _shown(data: bytes) -> str:
    return repr(one_line(data[:80].decode(errors="replace")))
