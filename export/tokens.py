"""Files of tokens, read a block at a time: texts of which each byte is a token, or token numbers.

Numbers come as white-space separated text, or as a `.npy` array of whole numbers with one axis.
"""

import os
import stat
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refspan.errors import SetupError
from refspan.export.layout import Array
from refspan.files import check_file

STDIN = Path("-")
_PIECE = 2**16
"""Bytes of a text of numbers that are read at once."""


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens.

    Args:
        path: of the file, or "-" for standard input.
        tokenizer: "bytes" if each byte is a token; else tokens are numbers.
        vocab_size: V; tokens are 0..V-1.
        skip: tokens at its beginning to leave out.
    """

    path: Path
    tokenizer: str
    vocab_size: int
    skip: int = 0

    def blocks(self, length: int) -> Iterator[Array]:
        """The tokens, int64 [m], `length` at a time and fewer at the end.

        Raises:
            SetupError: the file cannot be read, holds no tokens, or something that is no token, or gets shorter while
                it is read; the message says where.
        """
        if self.path != STDIN:
            check_file(self.path)
        place = self.skip
        try:
            for block in self._blocks(length):
                yield self._checked(block, place)
                place += len(block)
        except OSError as error:
            raise SetupError(f"{self._name}: {error.strerror or error}") from None
        if place == 0:
            raise SetupError(f"{self._name}: holds no tokens")

    def size(self) -> int | None:
        """How many tokens are to come; None if that shows only at the end of the file."""
        if self.path == STDIN or not self.path.is_file():
            return None
        if self._is_array:
            with self.path.open("rb") as file:
                _, count = self._header(file)
        elif self.tokenizer == "bytes":
            count = self.path.stat().st_size
        else:
            return None
        return max(0, count - self.skip)

    @property
    def _name(self) -> str:
        return "standard input" if self.path == STDIN else str(self.path)

    @property
    def _is_array(self) -> bool:
        return self.tokenizer != "bytes" and self.path.suffix == ".npy"

    def _blocks(self, length: int) -> Iterator[Array]:
        if self.path == STDIN:
            yield from self._of_stream(sys.stdin.buffer, length)
            return
        with self.path.open("rb") as file:
            yield from self._of_array(file, length) if self._is_array else self._of_stream(file, length)

    def _of_stream(self, file: BinaryIO, length: int) -> Iterator[Array]:
        if self.tokenizer == "bytes":
            skipped = 0
            while skipped < self.skip and (content := file.read(min(_PIECE, self.skip - skipped))):
                skipped += len(content)
            self._check_skipped(skipped)
            for content in self._pieces(file, length):
                yield np.frombuffer(content, np.uint8).astype(np.int64)
            return
        numbers: list[int] = []
        all_numbers = self._numbers(file)
        self._check_skipped(sum(1 for _ in islice(all_numbers, self.skip)))
        for number in all_numbers:
            numbers.append(number)
            if len(numbers) == length:
                yield np.array(numbers, np.int64)
                numbers = []
        if numbers:
            yield np.array(numbers, np.int64)

    def _check_skipped(self, count: int) -> None:
        """Raise unless there were as many tokens as are to be left out."""
        if count < self.skip:
            raise SetupError(
                f"{self._name}: holds {count} tokens, expected at least {self.skip}, which are to be skipped"
            )

    def _pieces(self, file: BinaryIO, length: int) -> Iterator[bytes]:
        """What is left of a file, `length` bytes at a time; raise if that is less than there was at first."""
        promised = _size_of(file)
        while content := file.read(length):
            yield content
        if promised is not None and file.tell() < promised:
            raise SetupError(f"{self._name}: ended after {file.tell()} of {promised} bytes: cut while it was read")

    def _numbers(self, file: BinaryIO) -> Iterator[int]:
        """Whole numbers of a text; pieces are cut behind the last white space in them."""
        rest, count = b"", 0
        for piece in self._pieces(file, _PIECE):
            words = (rest + piece).split()
            rest = b"" if piece[-1:].isspace() or not words else words.pop()
            if len(rest) > 100:  # no number is so long: this is no such file
                words.append(rest)
            for word in words:
                count += 1
                yield self._number(word, count)
        if rest:
            yield self._number(rest, count + 1)

    def _number(self, word: bytes, place: int) -> int:
        if not word.removeprefix(b"-").isdigit() or len(word) > 18:
            shown = word[:20].decode(errors="backslashreplace")
            raise SetupError(
                f"{self._name}: number {place} is {shown!r}, expected whole numbers: the model's tokens are no bytes"
            )
        return int(word)

    def _of_array(self, file: BinaryIO, length: int) -> Iterator[Array]:
        """Numbers of a .npy file, read as they are needed: a memory map of a file that is cut ends the process."""
        dtype, count = self._header(file)
        place = min(self.skip, count)
        self._check_skipped(place)
        file.seek(place * dtype.itemsize, os.SEEK_CUR)
        while place < count:
            wanted = min(length, count - place)
            content = file.read(wanted * dtype.itemsize)
            if len(content) < wanted * dtype.itemsize:
                raise SetupError(f"{self._name}: ended within {count} numbers: cut while it was read")
            yield np.frombuffer(content, dtype)
            place += wanted

    def _header(self, file: BinaryIO) -> tuple[np.dtype[Any], int]:
        """Dtype and length of the array in a .npy file, whose numbers come next in it."""
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise ValueError(f"its version is {version}, expected (1, 0) or (2, 0)")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about headers of old versions, and damaged ones
                shape, _, dtype = read[version](file)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - NumPy reads the header as Python, with all that can be wrong then
            raise SetupError(f"{self._name}: no whole .npy file: {' '.join(str(error).split())}") from None
        if len(shape) != 1 or dtype.kind not in "iu" or shape[0] < 0:
            raise SetupError(f"{self._name}: got {dtype} {shape}, expected whole numbers with one axis")
        there = (_size_of(file) or 0) - file.tell()
        if there < shape[0] * dtype.itemsize:
            raise SetupError(
                f"{self._name}: no whole .npy file: holds {there} bytes of {shape[0]} numbers, expected "
                f"{shape[0] * dtype.itemsize}"
            )
        return dtype, shape[0]

    def _checked(self, block: Array, place: int) -> Array:
        """The block as int64; raise unless all are tokens of the model. `place`: how many came before it."""
        wrong = (block < 0) | (block >= self.vocab_size)
        if np.any(wrong):
            first = int(np.argmax(wrong))
            raise SetupError(
                f"{self._name}: number {place + first + 1} is token {block[first]}, expected 0 to "
                f"{self.vocab_size - 1}, which the model knows"
            )
        return block.astype(np.int64)


def _size_of(file: BinaryIO) -> int | None:
    """Bytes of a regular file; None of anything else."""
    try:
        about = os.fstat(file.fileno())
    except OSError:  # not a file at all
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None
