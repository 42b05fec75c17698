"""Messages of the protocol: a line of JSON, then the tensors that it names, each as an npy file (version 1.0)."""

import json
import warnings
from collections.abc import Callable, Mapping
from io import BytesIO
from math import prod
from typing import Any

import numpy as np

from refspan.conformance.external.child import Child
from refspan.conformance.guard import one_line, shown
from refspan.conformance.protocol import Array

VERSION = 1
"""Of the protocol."""
ROOM = 1 << 20
"""Bytes of any tensor that a command may send."""
TIMES = 16
"""Or so many times what a right one takes in float64, if that is more: wrong shapes are to be seen and told."""
LARGEST = 1 << 28
"""Bytes of a tensor that it may be sent."""
DTYPES = {"<f2", "<f4", "<f8", "<i8"}
NOTHING: Mapping[str, int] = {}
_MAGIC = b"\x93NUMPY\x01\x00"


class NoMessage(Exception):
    """What was read is no message; the error says why."""


def message(header: Mapping[str, Any], tensors: Mapping[str, Array]) -> bytes:
    """A request as it goes over the wire."""
    out = BytesIO()
    out.write(json.dumps({**header, "tensors": list(tensors)}).encode() + b"\n")
    for array in tensors.values():
        np.lib.format.write_array(out, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def answer(child: Child, expected: Mapping[str, int] = NOTHING) -> tuple[dict[str, Any], dict[str, Array]]:
    """The next message from a command, with tensors under some of the names that are expected.

    `expected`: these names, and of how many numbers a right tensor is.

    Raises:
        Hung: there is none.
        NoMessage: it is not one; where its end is cannot be told, so the command has to be started anew.
    """
    line = child.line()
    try:
        header = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise NoMessage(f"expected a line of JSON, an object; the command wrote {_shown(line)}")
    names = header.get("tensors", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise NoMessage(f"`tensors`: got {shown(names)}, expected a list of names")
    for i, name in enumerate(names):
        if name not in expected:
            listed = "some of " + ", ".join(expected) if expected else "none"
            raise NoMessage(f"`tensors`: got {shown(name)}, expected {one_line(listed)}")
        if name in names[:i]:
            raise NoMessage(f"`tensors`: got {shown(name)} twice")
    return header, {name: read_tensor(child.read, name, max(ROOM, 8 * TIMES * expected[name])) for name in names}


def read_tensor(read: Callable[[int], bytes | bytearray], name: str, most: int = LARGEST) -> Array:
    """The array of an npy file, of which `read(n)` returns the next n bytes.

    Raises:
        NoMessage: it is not one, or its numbers take more than `most` bytes.
    """
    start = read(len(_MAGIC) + 2)
    if start[: len(_MAGIC)] != _MAGIC:
        raise NoMessage(f"tensor {name!r}: expected an npy file of version 1.0; the command wrote {_shown(start)}")
    described = read(int.from_bytes(start[len(_MAGIC) :], "little"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(start[-2:] + described))
        sizes_are_numbers = all(type(size) is int and size >= 0 for size in shape)
    except Exception:  # noqa: BLE001 - it is read as Python source, so much may come up
        sizes_are_numbers = False
    if not sizes_are_numbers:
        raise NoMessage(f"tensor {name!r}: expected an npy file of version 1.0; its header is {_shown(described)}")
    if dtype.str not in DTYPES:
        known = ", ".join(sorted(DTYPES))
        raise NoMessage(f"tensor {name!r}: got dtype {one_line(dtype.str)}, expected one of {known}")
    size = prod(shape) * dtype.itemsize
    if len(shape) > 8 or any(length > LARGEST for length in shape) or size > most:
        raise NoMessage(f"tensor {name!r}: shape {shown(shape)} is beyond the limit of {most} bytes")
    flat: Array = np.frombuffer(read(size), dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _no_number(text: str) -> None:
    """JSON has no NaN and no infinity, although Python reads them."""
    raise ValueError(text)


def _shown(data: bytes | bytearray) -> str:
    return repr(one_line(data[:80].decode(errors="replace")))
