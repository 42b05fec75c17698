"""Writing files so that what stands at a path is always whole: the old content or the new, never half of either."""

import os
import tempfile
from pathlib import Path

from refspan.errors import SetupError


def check_file(path: Path) -> None:
    """Raise SetupError unless `path` is a file."""
    if not path.is_file():
        raise SetupError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")


def check_writable(path: Path) -> None:
    """Raise SetupError if `write_whole` could not write `path`: before hours of work, not after."""
    target = path.resolve()
    if target.is_dir():
        raise SetupError(f"{path}: is a folder, expected a file to write")
    if target.exists() and not target.is_file():
        raise SetupError(f"{path}: is not a regular file, and would have to be replaced")
    if not target.parent.is_dir():
        raise SetupError(f"{path}: folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise SetupError(f"{path}: no permission to write into {target.parent}")


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path` first, then move to its place in one step. What a link points to is written; the link stays.

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
