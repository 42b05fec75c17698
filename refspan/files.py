"""Writing files so that what stands at a path is always whole: the old content or the new, never half of either."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from refspan.errors import SetupError


def check_file(path: Path, largest: int | None = None) -> None:
    """Raise SetupError unless `path` is a file, of at most `largest` bytes."""
    if not path.is_file():
        raise SetupError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    if largest is not None and (size := path.stat().st_size) > largest:
        raise SetupError(f"{path}: has {size} bytes, expected at most {largest}")


def check_writable(path: Path) -> None:
    """Raise SetupError if `write_whole` could not write `path`: before hours of work, not after."""
    if path == Path("-"):
        raise SetupError("-: standard output takes no file here; name one")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise SetupError(f"{path}: is not a regular file, and would have to be replaced")
    target = path.resolve()
    if target.is_dir():
        raise SetupError(f"{path}: is a folder, expected a file to write")
    if any(_same_as_stream(target, number) for number in (0, 1, 2)):
        raise SetupError(f"{path}: is where this command reads or prints, and would have to be replaced")
    if not target.parent.is_dir():
        raise SetupError(f"{path}: folder {target.parent} does not exist")
    _try_to_write(path, target.parent)


def check_folder_writable(path: Path) -> None:
    """Raise SetupError if files could not be written into folder `path`, which may have yet to be made."""
    there = path.resolve()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise SetupError(f"{path}: {'' if there == path.resolve() else f'cannot be made: {there} '}is not a folder")
    _try_to_write(path, there)


def _try_to_write(path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass  # some folders only seem to be writable
    except OSError as error:
        raise SetupError(f"{path}: cannot write into {folder}: {error.strerror}") from None


def _same_as_stream(path: Path, number: int) -> bool:
    """Whether `path` is the regular file that standard input, output or error (0, 1, 2) has been directed to."""
    try:
        return path.is_file() and os.path.samestat(path.stat(), os.fstat(number))
    except OSError:
        return False


def check_distinct(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None], folders: Mapping[str, Path | None] = {}
) -> None:
    """Raise SetupError if an output would take the place of an input or of another output; None is no file.

    Args:
        outputs: what a file is (the name of an option, for example) -> its path.
        inputs: likewise.
        folders: likewise, in which nothing may be written.
    """
    written: dict[Path, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        target = path.resolve()
        for other, read in inputs.items():
            if read is not None and _same_file(path, read):
                raise SetupError(f"{name} {path}: is {other} too, which would be lost; name another file")
        for other, folder in folders.items():
            if folder is not None and target.is_relative_to(folder.resolve()):
                raise SetupError(f"{name} {path}: is within {other}; name a file elsewhere")
        if target in written:
            raise SetupError(f"{name} {path}: is {written[target]} too; name another file")
        written[target] = name


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except OSError:  # one of them is not there
        return False


def write_whole(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write beside `path` first, then move to its place in one step. What a link points to is written; the link stays.

    `content`: the bytes, or what writes them into the file of a path.

    Raises:
        SetupError: it cannot be written (no permission, full disk, not a regular file); an existing file is as it was.
    """
    check_writable(path)
    target = path.resolve()
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(temporary)
            else:
                file.write(content)
                file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as if the file had been opened for writing; mkstemp gives 0600
        temporary.replace(target)
    except OSError as error:
        raise SetupError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
