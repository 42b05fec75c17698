"""What is built and installed from this repository, and which part of it may import which."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = {"refspan": "refspan", "export": "refspan/export", "conformance": "refspan/conformance"}
"""Folder of the repository -> where it is installed."""

COMMANDS = [
    'python -m pip install -e ".[cpu]" && refspan check --backend onnxruntime',
    'python -m pip install -e ".[test]" && pytest -n auto',
]
"""What the README promises to work."""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; it fails the test when the command fails."""
    # what python finds must depend on what is installed, not on who runs the tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_repository(to: Path) -> Path:
    """The files that are built from, without what earlier builds left beside them."""
    to.mkdir()
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, to)
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def build(what: str, source: Path, to: Path) -> Path:
    """Build the "wheel" or "sdist" of `source`, with the setuptools that is here: nothing is downloaded."""
    to.mkdir()
    run(sys.executable, "-c", f"from setuptools.build_meta import *; build_{what}({str(to)!r})", cwd=source)
    (built,) = to.iterdir()
    return built


def files_in(wheel: Path) -> set[str]:
    """Paths of all files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy of this repository."""
    place = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_of_repository(place / "source"), place / "built")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with a plain install, and the dependencies of this environment."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    # Folders named in a .pth file come after the environment's own, and their .pth files are not followed: the
    # refspan of this environment, usually an editable install, stays out of sight.
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(here))
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    return place / "bin"


def test_wheel_has_one_top_level_name(wheel: Path) -> None:
    tops = {path.partition("/")[0] for path in files_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"refspan"}
    assert len(tops) == 2


def test_wheel_holds_every_file(wheel: Path) -> None:
    """Packages are listed by name in pyproject.toml: one that was forgotten there would be missing here."""
    kinds = {".py", ".typed", ".onnxtxt", ".npz", ".md", ".json", ".c", ".sh", ".safetensors"}
    wanted = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }
    assert {Path(path).suffix for path in wanted} == kinds
    assert {path for path in files_in(wheel) if path.startswith("refspan/")} == wanted


def test_wheel_carries_license_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {path.partition("/")[0] for path in archive.namelist() if ".dist-info/" in path}
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        license_text = archive.read(f"{info}/licenses/LICENSE").decode()
    assert metadata["Name"] == "refspan"
    assert metadata["License-Expression"] == "MIT"
    assert license_text == (ROOT / "LICENSE").read_text()
    assert entry_points.split() == [
        *("[console_scripts]", "refspan", "=", "refspan.__main__:main"),
        *("[pytest11]", "refspan", "=", "refspan.conformance.pytest_plugin"),
    ]


def test_base_install_leaves_onnxruntime_to_the_extras(wheel: Path) -> None:
    """onnxruntime and onnxruntime-gpu write the same folder, so whoever installs refspan must be able to choose."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(".dist-info/METADATA"))
        required = HeaderParser().parsestr(archive.read(path).decode()).get_all("Requires-Dist", [])
    with_runtime = [line for line in required if line.startswith("onnxruntime")]
    assert len(with_runtime) >= 2
    assert all("extra ==" in line for line in with_runtime)


def test_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build("sdist", copy_of_repository(tmp_path / "source"), tmp_path / "built")
    run(sys.executable, "-m", "tarfile", "--extract", archive, tmp_path / "unpacked", cwd=tmp_path)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert files_in(build("wheel", unpacked, tmp_path / "rebuilt")) == files_in(wheel)


WHERE = "import refspan, refspan.export as e, refspan.conformance as c; print(*(m.__file__ for m in (refspan, e, c)))"


def test_install_works_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    python, refspan = installed / "python", installed / "refspan"
    assert run(python, "-m", "refspan", "--version", cwd=tmp_path) == run(refspan, "--version", cwd=tmp_path)
    for file in run(python, "-c", WHERE, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent)
    graph = "from refspan.export import attention_model; print(len(attention_model().graph.node))"
    assert int(run(python, "-c", graph, cwd=tmp_path)) > 0
    few = ("check", "--backend", "numpy", "--examples", "2")
    assert "mask.values" in run(python, "-m", "refspan", *few, "--level", "mask", cwd=tmp_path)
    assert "golden." in run(refspan, *few, "--level", "golden", cwd=tmp_path)


@pytest.mark.parametrize("first", ["refspan.export", "refspan.conformance"])
def test_install_and_checkout_do_not_mix(installed: Path, tmp_path: Path, first: str) -> None:
    """Python started in the root of a checkout finds ./refspan before the installed one, but no ./refspan/export."""
    checkout = copy_of_repository(tmp_path / "checkout")
    where = f"import {first}; {WHERE}"
    files = run(installed / "python", "-c", where, cwd=checkout).split()
    assert all(Path(file).is_relative_to(checkout) for file in files), files
    # the program `refspan`, and python -P, do not look into the folder that they are started in
    files = run(installed / "python", "-P", "-c", where, cwd=checkout).split()
    assert all(Path(file).is_relative_to(installed.parent) for file in files), files


HEAVY = ("onnx", "onnxruntime", "hypothesis", "torch", "cupy", "tqdm")


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import refspan", (*HEAVY, "numpy", "click", "refspan.export", "refspan.conformance")),
        ("import refspan.export", ("onnx", "onnxruntime", "torch", "cupy", "refspan.conformance")),
        ("import refspan.conformance", ("onnx", "onnxruntime", "torch", "cupy", "refspan.export")),
        (
            "from refspan.conformance import load_backend; load_backend('numpy')",
            ("onnx", "onnxruntime", "torch", "cupy", "refspan.export"),
        ),
        (
            "import sys; from refspan.__main__ import cli; cli.main(['--help'], standalone_mode=False)",
            (*HEAVY, "numpy", "refspan.export", "refspan.conformance"),
        ),
    ],
    ids=["refspan", "export", "conformance", "numpy backend", "help"],
)
def test_import_stays_light(statement: str, unwanted: tuple[str, ...], tmp_path: Path) -> None:
    shown = run(sys.executable, "-c", f"{statement}; import sys; print('loaded:', *sorted(sys.modules))", cwd=tmp_path)
    loaded = shown.rpartition("loaded:")[2].split()
    assert "refspan" in loaded
    assert sorted(set(unwanted) & set(loaded)) == []


FORBIDDEN = {
    "refspan": ("refspan.export", "refspan.conformance", "refspan.commands"),
    "refspan/commands": (),
    "refspan/__main__.py": ("refspan.export", "refspan.conformance"),  # commands are imported when asked for
    "export": ("refspan.conformance", "refspan.commands"),
    "conformance": ("refspan.export", "refspan.commands"),
    "conformance/backends": ("refspan.commands",),
    "conformance/vectors/onnx_layout.py": ("refspan.commands",),
}
"""File or folder -> what it may not import. The longest path that matches counts."""


def modules() -> list[Path]:
    """Every module of the package, as a path from the root."""
    return sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported_by(path: Path) -> Iterator[str]:
    """Full names of what a module imports, wherever in it; `from a import b` may be the attribute or the module a.b."""
    folder, *inner, _ = path.parts
    package = "/".join([FOLDERS[folder], *inner]).replace("/", ".")
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=Path.as_posix)
def test_dependencies_point_one_way(path: Path) -> None:
    rule = max((Path(place) for place in FORBIDDEN if path.is_relative_to(place)), key=lambda place: len(place.parts))
    forbidden = FORBIDDEN[rule.as_posix()]
    found = [name for name in imported_by(path) if any(f"{name}.".startswith(f"{bad}.") for bad in forbidden)]
    assert found == []


def commands_in(readme: str, place: Path) -> "subprocess.CompletedProcess[str]":
    """Let a copy of .ci/run read this README."""
    (place / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", place / ".ci")
    (place / "README.md").write_text(readme)
    return subprocess.run([place / ".ci" / "run", "--list"], capture_output=True, text=True, check=False)


def test_ci_runs_what_the_readme_promises(tmp_path: Path) -> None:
    listed = commands_in((ROOT / "README.md").read_text(), tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.splitlines() == COMMANDS


def fenced(*lines: str, language: str = "sh") -> str:
    return "\n".join(["", f"```{language}", *lines, "```", ""])


@pytest.mark.parametrize(
    "readme",
    [
        fenced(COMMANDS[0]) + fenced(COMMANDS[1]),
        "# refspan\n" + fenced(*COMMANDS) + fenced("refspan --help"),
        fenced(COMMANDS[0]) + fenced(COMMANDS[1]) + fenced('python -m pip install -e ".[gpu]" && nvidia-smi'),
        fenced("python -m pip install -e other && x", language="text") + fenced("# comment", *COMMANDS),
    ],
    ids=["a block each", "one block", "others follow", "other fences"],
)
def test_ci_finds_the_commands(readme: str, tmp_path: Path) -> None:
    assert commands_in(readme, tmp_path).stdout.splitlines() == COMMANDS


@pytest.mark.parametrize(
    ("readme", "complaint"),
    [
        ("", "found 0"),
        (fenced(COMMANDS[0]), "found 1"),
        (fenced(*COMMANDS, COMMANDS[0]), "found 3"),
        (fenced(*COMMANDS, language="text"), "found 0"),
        ("\n".join(COMMANDS), "found 0"),
        (fenced('python -m pip install -e ".[cpu]"', COMMANDS[1]), "not a whole"),
        (fenced('python -m pip install -e ".[cpu]" && \\', "refspan check", COMMANDS[1]), "not a whole"),
    ],
    ids=["empty", "one", "three", "not sh", "no fence", "install only", "continued"],
)
def test_ci_refuses_a_readme_that_it_does_not_understand(readme: str, complaint: str, tmp_path: Path) -> None:
    listed = commands_in(readme, tmp_path)
    assert listed.returncode == 1
    assert complaint in listed.stderr
