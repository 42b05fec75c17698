"""Files of tokens, read a block at a time: texts of which each byte is a token, or token numbers.

Numbers come as white-space separated text, or as a `.npy` array of whole numbers with one axis.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
    """

    path: Path
    tokenizer: str
    vocab_size: int

    def blocks(self, length: int) -> Iterator[Array]:
        """The tokens, int64 [m], `length` at a time and fewer at the end.

        Raises:
            SetupError: the file cannot be read, holds no tokens, or something that is no token; the message says where.
        """
        if self.path != STDIN:
            check_file(self.path)
        none = True
        try:
            for block in self._blocks(length):
                if len(block):
                    none = False
                    yield self._checked(block)
        except OSError as error:
            raise SetupError(f"{self._name}: {error.strerror or error}") from None
        if none:
            raise SetupError(f"{self._name}: holds no tokens")

    def size(self) -> int | None:
        """How many tokens the file holds; None if that shows only at its end."""
        if self.path == STDIN or not self.path.is_file():
            return None
        if self.tokenizer == "bytes":
            return self.path.stat().st_size
        return len(self._array()) if self.path.suffix == ".npy" else None

    @property
    def _name(self) -> str:
        return "standard input" if self.path == STDIN else str(self.path)

    def _blocks(self, length: int) -> Iterator[Array]:
        if self.tokenizer != "bytes" and self.path.suffix == ".npy":
            array = self._array()
            for start in range(0, len(array), length):
                yield np.asarray(array[start : start + length], np.int64)
            return
        if self.path == STDIN:
            yield from self._of_stream(sys.stdin.buffer, length)
            return
        with self.path.open("rb") as file:
            yield from self._of_stream(file, length)

    def _of_stream(self, file: BinaryIO, length: int) -> Iterator[Array]:
        if self.tokenizer == "bytes":
            while content := file.read(length):
                yield np.frombuffer(content, np.uint8).astype(np.int64)
            return
        numbers: list[int] = []
        for number in self._numbers(file):
            numbers.append(number)
            if len(numbers) == length:
                yield np.array(numbers, np.int64)
                numbers = []
        yield np.array(numbers, np.int64)

    def _numbers(self, file: BinaryIO) -> Iterator[int]:
        """Whole numbers of a text; pieces are cut behind the last white space in them."""
        rest, count = b"", 0
        while piece := file.read(_PIECE):
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

    def _array(self) -> Array:
        """The array of a .npy file, not read yet."""
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise SetupError(f"{self._name}: no whole .npy file: {' '.join(str(error).split())}") from None
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
            raise SetupError(f"{self._name}: got {got}, expected whole numbers with one axis")
        return array

    def _checked(self, block: Array) -> Array:
        wrong = (block < 0) | (block >= self.vocab_size)
        if np.any(wrong):
            raise SetupError(
                f"{self._name}: got token {block[wrong][0]}, expected 0 to {self.vocab_size - 1}, which the model knows"
            )
        return block
