"""The checks as tests of somebody else's project, which has nothing of ours but the installed package."""

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import misbehaving
import pytest
from test_reports import RUDE

from refspan.conformance.pytest_plugin import pytest_configure
from refspan.conformance.runner import select

MASK = len(select(["mask"]))
MASK_ONLY = f"{misbehaving.__file__}:MaskOnly"
EPSILON = "refspan.conformance.mutants.weights:Epsilon"


def run(tmp_path, *options, backend=EPSILON):
    given = [f"--refspan-backend={backend}"] if backend else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "refspan.conformance"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [*command, *given, "--refspan-examples=5", *map(str, options)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False,
    )  # fmt: skip


def test_one_test_per_check(tmp_path):
    ran = run(tmp_path, "-v", "--refspan-level=mask", backend="numpy")
    assert ran.returncode == 0, ran.stdout
    assert re.findall(r"test_check\[(mask\.\w+)\] PASSED", ran.stdout)
    assert f"{MASK} passed" in ran.stdout


def test_a_failure_shows_the_counterexample_and_no_traceback(tmp_path):
    ran = run(tmp_path, "-k", "lone_survivor or memory.stream", "-rs", "--refspan-seed=4")
    assert ran.returncode == 1
    assert "1 failed, 1 skipped" in ran.stdout
    assert "memory 0: span" in ran.stdout
    assert f"replay: refspan check --backend {EPSILON} --seed 4 --examples 5 --check attention.lone_sur" in ran.stdout
    assert "Traceback" not in ran.stdout
    assert "def test_check" not in ran.stdout


def test_expected_failures_are_strict(tmp_path):
    path = tmp_path / "expected.txt"
    path.write_text("attention.lone_survivor: an epsilon, https://example.org/1\nmask.values: wrong, https://b.org\n")
    ran = run(tmp_path, "-k", "lone_survivor or mask.values", f"--refspan-expected-failures={path}")
    assert ran.returncode == 1
    assert "1 failed, 1 xfailed" in re.sub(r"\d+ deselected, ", "", ran.stdout)
    assert "mask.values was expected to fail and passed: take it off the list" in ran.stdout


def test_several_processes(tmp_path):
    pytest.importorskip("xdist")
    ran = run(tmp_path, "-n", 2, "--refspan-level=mask", backend="numpy")
    assert ran.returncode == 0, ran.stdout
    assert f"{MASK} passed" in ran.stdout


PROCESSES = [0, pytest.param(2, marks=pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="needs xdist"))]


def with_processes(count):
    return ["-n", count] if count else []


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": None}, "refspan: name a backend, for example --refspan-backend=numpy"),
        ({"backend": "nobody"}, "refspan: unknown backend 'nobody'"),
        ({"level": "masks"}, "refspan: unknown level 'masks'"),
        ({"dtype": "int8"}, "refspan: unknown dtype 'int8'"),
        (
            {"backend": f"{misbehaving.__file__}:OnlySingle", "dtype": "float64"},
            "does not take dtype float64; it takes",
        ),
        ({"expected-failures": "none.txt"}, "refspan: none.txt: no such file"),
        ({"examples": "0"}, "refspan: --refspan-examples: got '0', expected a whole number, at least 1"),
    ],
)
def test_bad_usage(tmp_path, options, said, processes):
    backend = {"backend": "numpy", **options}["backend"]
    given = [f"--refspan-{name}={value}" for name, value in options.items() if name != "backend"]
    ran = run(tmp_path, *given, *with_processes(processes), backend=backend)
    assert ran.returncode == 4
    assert "INTERNALERROR" not in ran.stdout
    assert (ran.stdout + ran.stderr).count(said) == 1


NUMBERS = [
    ("examples", "many"), ("examples", "-1"), ("examples", ""), ("seed", "x"), ("seed", "1.5"), ("timeout", "-1"),
    ("timeout", "0"), ("timeout", "nan"), ("timeout", "inf"), ("timeout", "soon"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers_out_of_range(name, value):
    config = SimpleNamespace(getoption=lambda option, *_: value if option == f"--refspan-{name}" else None)
    with pytest.raises(pytest.UsageError, match=rf"^refspan: --refspan-{name}: got '{re.escape(value)}', expected "):
        pytest_configure(config)


def test_those_who_only_set_options_are_left_alone(tmp_path):
    """In a configuration file, say: other tests run, whatever has become of the backend."""
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    given = ["--refspan-backend=nobody", "--refspan-level=masks"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *given, "test_own.py"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (ran.returncode, "1 passed" in ran.stdout) == (0, True), ran.stdout


@pytest.mark.parametrize("processes", PROCESSES)
def test_nothing_offered_is_no_pass(tmp_path, processes):
    ran = run(tmp_path, "--refspan-level=golden", *with_processes(processes), backend=MASK_ONLY)
    assert ran.returncode == 4, ran.stdout
    assert "ERROR: refspan: nothing was checked: the backend offers nothing that was asked for\n" in ran.stdout
    levels = ["--refspan-level=golden", "--refspan-level=mask"] if processes else ["--refspan-level=golden,mask"]
    ran = run(tmp_path, *levels, *with_processes(processes), backend=MASK_ONLY)
    assert ran.returncode == 0, ran.stdout
    assert f"{MASK} passed" in ran.stdout
    assert "ERROR" not in ran.stdout


def test_nothing_but_what_was_expected_to_fail(tmp_path):
    path = tmp_path / "expected.txt"
    path.write_text("attention.lone_survivor: an epsilon, https://example.org/1\n")
    ran = run(tmp_path, "-k", "lone_survivor", f"--refspan-expected-failures={path}")
    assert ran.returncode == 0, ran.stdout
    assert "1 xfailed" in ran.stdout


@pytest.mark.parametrize("processes", PROCESSES)
def test_what_a_rude_backend_says(tmp_path, processes):
    """Words that no pipe between processes takes, and no terminal should."""
    (tmp_path / "rude.py").write_text(RUDE)
    (tmp_path / "conftest.py").write_text(
        "import refspan.conformance.failures as failures\n"
        "class Rude(failures.Failure):\n"
        "    def __init__(self, message, lines, *rest):\n"
        "        super().__init__(message + '\\x1b[31m\\ud800', ('\\udfff', *lines), *rest)\n"
        "failures.Failure = Rude\n"
    )
    ran = run(tmp_path, "-k", "mask.past", *with_processes(processes), backend="rude.py:Rude")
    assert (ran.returncode, "INTERNALERROR" in ran.stdout) == (1, False), ran.stdout
    assert "\\x1b[31m\\ud800" in ran.stdout
    assert "\x1b" not in ran.stdout


def test_it_costs_those_who_do_not_use_it_little():
    """Loading the plugin imports refspan, but neither Hypothesis nor ONNX nor the checks."""
    unwanted = ("hypothesis", "onnx", "refspan.conformance.runner")
    code = f"import refspan.conformance.pytest_plugin, sys; print([m for m in {unwanted} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
