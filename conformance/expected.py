"""Failures that are expected: a file of `check: reason, link` entries, one a line."""

from pathlib import Path

from refspan.conformance.report import Known
from refspan.conformance.runner import select
from refspan.errors import SetupError


def read_expected(path: Path) -> dict[str, Known]:
    """Check -> why it is expected to fail. Blank lines, and lines that begin with #, say nothing.

    Raises:
        SetupError: the file cannot be read; a line is not `check: reason, link`, names no check, or one named before.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SetupError(f"{path}: cannot be read: {reason}") from None
    checks = {check.id for check in select()}
    known: dict[str, Known] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        id_, _, rest = entry.partition(":")
        reason, _, link = rest.rpartition(",")
        id_, reason, link = id_.strip(), reason.strip(), link.strip()
        if not reason or "://" not in link:
            raise SetupError(f"{path}:{number}: got {entry[:200]!r}, expected `check: reason, https://..`")
        if id_ not in checks:
            raise SetupError(f"{path}:{number}: unknown check {id_!r}; `refspan check --list` lists them")
        if id_ in known:
            raise SetupError(f"{path}:{number}: {id_} is there twice")
        known[id_] = Known(reason, link)
    return known
