"""Files of a folder that somebody else may have made: none is believed to be where, what or as large as it should."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from refspan.errors import SetupError

LARGEST = 1 << 26
"""Bytes of a file that is read."""
LARGEST_FOLDER = 1 << 28
"""Bytes of all files that are read of a folder."""

Kind = Literal["file", "link", "empty folder"]
"""`file` is whatever is neither of the others, be it a regular one or not."""


def content_of(path: Path, name: str, largest: int = LARGEST) -> bytes:
    """A file of the folder: a regular one, no link on the way to it, and not too large."""
    step = path
    try:
        for part in name.split("/"):
            step = step / part
            if step.is_symlink():
                raise SetupError(f"{step}: is a link; expected a file of the folder itself")
        if not step.is_file():
            raise SetupError(f"{step}: {'is not a regular file' if step.exists() else 'no such file'}")
        if step.stat().st_size > largest:
            raise SetupError(f"{step}: has {step.stat().st_size} bytes, expected at most {largest}")
        return step.read_bytes()
    except OSError as error:
        raise SetupError(f"{step}: cannot be read: {error.strerror}") from None


def check_sizes(path: Path, names: Iterable[str]) -> None:
    """Raise SetupError if files of the folder are too many bytes together; of those that can be read alone."""
    total = 0
    for name in names:
        try:
            size = os.lstat(path / name).st_size
        except OSError:
            continue
        total += size if size <= LARGEST else 0
        if total > LARGEST_FOLDER:
            raise SetupError(f"{path}: its cases have more than {LARGEST_FOLDER} bytes together; split the folder")


def below(path: Path) -> Iterator[tuple[str, Kind]]:
    """What is somewhere below a folder, which may itself be a link; links are not followed.

    Raises:
        SetupError: a folder cannot be read.
    """
    for here, folders, files in os.walk(path, onerror=_unreadable):
        links = [name for name in folders + files if os.path.islink(os.path.join(here, name))]  # noqa: PTH118, PTH114
        kinds: dict[str, Kind] = {**dict.fromkeys(files, "file"), **dict.fromkeys(links, "link")}
        if not folders and not files and Path(here) != path:
            yield Path(here).relative_to(path).as_posix(), "empty folder"
        for name, kind in kinds.items():
            yield (Path(here) / name).relative_to(path).as_posix(), kind


def refuse_links(path: Path) -> None:
    """Raise SetupError if there is a link below a folder: what is written there would be written somewhere else."""
    for name, kind in below(path):
        if kind == "link":
            raise SetupError(f"{path / name}: is a link; nothing is written into a folder that has one: remove it")


def _unreadable(error: OSError) -> None:
    raise SetupError(f"{error.filename}: cannot be read: {error.strerror}") from None
