"""The README's Python runs as it stands there, one block after the other, after the commands that it shows."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "# mine.py" not in block]
COMMANDS = re.findall(r"^refspan ((?:export|run|generate) .*?) *(?:#.*)?$", README, flags=re.MULTILINE)


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    from refspan.__main__ import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "refspan").symlink_to(ROOT / "refspan")
    assert len(COMMANDS) >= 6
    for line in COMMANDS:
        result = CliRunner().invoke(cli, shlex.split(line), standalone_mode=False)
        assert result.exception is None, line
        assert result.return_value in (None, 0), line
    assert len(PYTHON) >= 4
    (tmp_path / "readme.py").write_text("\n".join(PYTHON))
    runpy.run_path("readme.py")
    printed = capsys.readouterr().out
    assert float(re.search(r"(\S+) nats per byte", printed)[1]) < 1
    assert "[0. 1. 1. 1.]" in printed
