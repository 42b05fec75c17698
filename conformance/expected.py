"""Failures that are expected: a file of `check: reason, link` entries, one a line."""

import re
from collections.abc import Collection
from pathlib import Path

from refspan.conformance.report import Known
from refspan.conformance.runner import select
from refspan.errors import SetupError
from refspan.files import check_file

LINK = re.compile(r"[A-Za-z][\w+.-]*://\S+")
LARGEST = 1 << 20
"""Bytes of the file."""


def read_expected(path: Path, checks: Collection[str] | None = None) -> dict[str, Known]:
    """Check -> why it is expected to fail. Blank lines, and lines that begin with #, say nothing.

    Args:
        path: the file.
        checks: ids of the checks that there are; those of `select` by default.

    Raises:
        SetupError: the file cannot be read, is no regular one or has over 1 MiB; a line is not `check: reason, link`,
            names no check, or one named before.
    """
    check_file(path, LARGEST)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SetupError(f"{path}: cannot be read: {reason}") from None
    hint = "with --vectors, expected vectors.ID of a case there"
    if checks is None:
        checks, hint = {check.id for check in select()}, "`refspan check --list` lists them"
    known: dict[str, Known] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        id_, _, said = entry.partition(":")
        why = _reason_and_link(said)
        if why is None:
            raise SetupError(f"{path}:{number}: got {entry[:200]!r}, expected `check: reason, https://..`")
        id_ = id_.strip()
        if id_ not in checks:
            raise SetupError(f"{path}:{number}: unknown check {id_[:200]!r}; {hint}")
        if id_ in known:
            raise SetupError(f"{path}:{number}: {id_} is there twice")
        known[id_] = why
    return known


def _reason_and_link(said: str) -> Known | None:
    """`reason, link`; a reason may have commas and links in it, and a link commas."""
    *words, last = ["", *said.rsplit(maxsplit=1)]
    before = words[-1].rstrip() if words else ""
    if before.endswith(",") and LINK.fullmatch(last):
        reason, link = before[:-1], last
    else:
        comma = re.search(rf",(?={LINK.pattern})", last)
        if comma is None:
            return None
        reason, link = f"{before} {last[: comma.start()]}", last[comma.end() :]
    return Known(reason.strip(), link) if reason.strip() else None
