"""The checks as tests of somebody else's project, which has nothing of ours but the installed package."""

import os
import re
import subprocess
import sys

import pytest

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
    assert "6 passed" in ran.stdout


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
    assert "6 passed" in ran.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": None}, "refspan: name a backend, for example --refspan-backend=numpy"),
        ({"backend": "nobody"}, "refspan: unknown backend 'nobody'"),
        ({"level": "masks"}, "refspan: unknown level 'masks'"),
        ({"dtype": "int8"}, "refspan: unknown dtype 'int8'"),
        ({"expected-failures": "none.txt"}, "refspan: none.txt: cannot be read"),
    ],
)
def test_bad_usage(tmp_path, options, said):
    backend = options.pop("backend", "numpy")
    ran = run(tmp_path, *(f"--refspan-{name}={value}" for name, value in options.items()), backend=backend)
    assert ran.returncode == 4
    assert said in ran.stdout + ran.stderr


def test_it_costs_those_who_do_not_use_it_little():
    """Loading the plugin imports refspan, but neither Hypothesis nor ONNX nor the checks."""
    unwanted = ("hypothesis", "onnx", "refspan.conformance.runner")
    code = f"import refspan.conformance.pytest_plugin, sys; print([m for m in {unwanted} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
