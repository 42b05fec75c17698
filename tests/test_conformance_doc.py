"""docs/conformance.md: its files and commands do what it says, and it knows every check."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refspan.conformance.runner import select

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "conformance.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOC, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()]
NEEDS = {"mine_torch.py": "torch", "openvino_differs.py": "openvino"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the reader stands: the files of the text, and what its commands need of the checkout."""
    path = tmp_path_factory.mktemp("reader")
    for name, content in FILES.items():
        (path / name).write_text(content)
    (path / "conformance").symlink_to(ROOT / "conformance")
    return path


def run(command, folder):
    words = command.split(" ")
    programs = {"refspan": ["-m", "refspan"], "pytest": ["-m", "pytest", "-p", "no:cacheprovider"]}
    if words[0] in programs:
        words = [sys.executable, *programs[words[0]], *words[1:]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_commands(folder):
    """In their order: some make what later ones need."""
    assert len(COMMANDS) >= 12
    for command in COMMANDS:
        if command.startswith("cc ") and not shutil.which("cc"):
            continue
        if "exec:./attention" in command and not (folder / "attention").exists():
            continue
        if any(name in command and not importlib.util.find_spec(package) for name, package in NEEDS.items()):
            continue
        ran = run(command, folder)
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    assert {"report.html", "report.xml", "badge.svg", "vectors"} <= {path.name for path in folder.iterdir()}


def test_sizes_that_are_asked_for():
    from refspan.conformance.checks.limits import BEYOND
    from refspan.conformance.checks.tiled import HEADS, MANY, RUNS
    from refspan.conformance.strategies import LARGE_SIZES, SIZES, TILE_SIZES

    sizes = [*SIZES, *TILE_SIZES, *LARGE_SIZES, *BEYOND, *MANY, *RUNS, *HEADS]
    _, after = " ".join(DOC.split()).split("Heads have ")
    of_heads, number = after.split(" numbers; there are ")
    number, _ = number.split(" of them. ")
    for said, axis in ((of_heads, 4), (number, 1)):
        assert sorted({one[axis] for one in sizes}) == [int(n) for n in re.findall(r"\d+", said)]


def test_what_openvino_does_differently(folder):
    pytest.importorskip("openvino")
    ran = subprocess.run(
        [sys.executable, "openvino_differs.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["[2]", "[-3.4028235e+38]"]


def test_every_check_is_explained():
    cells = re.findall(r"^\| ([a-z0-9_., ]+?) \|", DOC, re.MULTILINE)
    explained = {id_.strip() for cell in cells for id_ in cell.split(",") if "." in id_}
    assert explained - {"onnx.reference 1.23.2"} == {check.id for check in select()}
