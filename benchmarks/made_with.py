"""What a record must say of the run that made it: when, from which source, with which versions."""

import datetime as dt
import importlib.metadata
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def made_with(*packages):
    """The date of today, the commit of this checkout, Python's version and those of the packages that are installed."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "started": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: found[name] for name in packages if name in found},
    }
