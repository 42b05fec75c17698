"""What a command writes is read with suspicion: whatever it is, it is refused in one line, and costs no memory."""

import io
import json

import numpy as np
import pytest

from refspan.conformance.external.wire import NoMessage, answer, read_tensor


def npy(header, data=b""):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def header(shape, descr=b"'<f4'"):
    return b"{'descr': " + descr + b", 'fortran_order': False, 'shape': " + shape + b"}\n"


class Written:
    """A command that has written all that it will."""

    def __init__(self, said, *tensors):
        self._file = io.BytesIO(json.dumps(said).encode() + b"\n" + b"".join(tensors))
        self.asked = 0

    def line(self):
        return self._file.readline().removesuffix(b"\n")

    def read(self, count):
        self.asked += count
        return bytearray(self._file.read(count))


def refusal(do):
    with pytest.raises(NoMessage) as caught:
        do()
    said = str(caught.value)
    assert said.isprintable()
    return said


NOT_NPY = {
    "truths": header(b"(True, True)") + b"abcd",
    "no hash": b"{[]: 1}\n",
    "parentheses": b"(" * 9000,
    "cut": b"{'descr': '''<f4",
    "indented": b"  x\n y\n",
    "empty": b"",
    "zero bytes": b"\x00\x00",
    "negative": header(b"(-1,)"),
    "a number": header(b"3"),
    "other keys": b"{'descr': '<f4', 'shape': ()}\n",
    "a computation": header(b"(10**9,)"),
    "long": header(b"()", b"'" + b"a" * 20000 + b"'"),
    "no type": header(b"()", b"(1, 2, 3)"),
    "a type of types": header(b"()", b"['x']"),
    "a time": header(b"()", b"'<M8[1000000000000000000000s]'"),
    "an escape": header(b"()", rb"'\d'"),
    "old numbers": header(b"(3L,)"),
}


@pytest.mark.parametrize("name", NOT_NPY)
def test_no_npy_file(name):
    said = refusal(lambda: read_tensor(io.BytesIO(npy(NOT_NPY[name])).read, "mask"))
    assert said.startswith("tensor 'mask': expected an npy file of version 1.0; its header is ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(b"()", b"'>f4'"), "got dtype >f4"),
        (header(b"()", b"'<f4,<f4'"), "got dtype |V8"),
        (header(b"(0, 4611686018427387904, 8)"), "is beyond the limit of 268435456 bytes"),
        (header(b"(1, 1, 1, 1, 1, 1, 1, 1, 1)"), "is beyond the limit"),
        (header(b"(67108865,)"), "is beyond the limit"),
    ],
)
def test_not_this_kind(content, said):
    assert said in refusal(lambda: read_tensor(io.BytesIO(npy(content)).read, "mask"))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_an_npy_file(shape, order):
    array = np.asarray(np.random.default_rng(0).random(shape), order=order)
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0))
    file.seek(0)
    assert np.array_equal(read_tensor(file.read, "x"), array)


@pytest.mark.parametrize(
    ("names", "expected", "said"),
    [
        (["mask", "mask"], {"mask": 1}, "`tensors`: got 'mask' twice"),
        (["junk"], {"mask": 1}, "`tensors`: got 'junk', expected some of mask"),
        (["mask"], {}, "`tensors`: got 'mask', expected none"),
        (["\x1b[2J\ud800"] * 9999, {"mask": 1}, "expected some of mask"),
        ([3], {"mask": 1}, "`tensors`: got [3], expected a list of names"),
        ("mask", {"mask": 1}, "`tensors`: got 'mask', expected a list of names"),
    ],
)
def test_names_are_looked_at_before_anything_is_read(names, expected, said):
    child = Written({"tensors": names}, npy(header(b"(1,)"), b"abcd"))
    assert said in refusal(lambda: answer(child, expected))
    assert child.asked == 0


def test_a_tensor_may_not_be_much_larger_than_a_right_one():
    """It is refused before it is read."""
    child = Written({"tensors": ["output"]}, npy(header(b"(300000,)"), bytes(1_200_000)))
    assert refusal(lambda: answer(child, {"output": 2})) == (
        "tensor 'output': shape (300000,) is beyond the limit of 1048576 bytes"
    )
    child = Written({"tensors": ["output"]}, npy(header(b"(300000,)"), bytes(1_200_000)))
    _, tensors = answer(child, {"output": 10_000})
    assert tensors["output"].shape == (300_000,)
