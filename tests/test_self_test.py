"""The self-test notices a suite that has lost its teeth, or bites what is right."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_check_command import check, run_module

from refspan.__main__ import cli
from refspan.commands.check import OF_SELF_TEST
from refspan.conformance.mutants import MUTANTS, RIGHT
from refspan.conformance.registry import CHECKS
from refspan.conformance.runner import select
from refspan.conformance.self_test import SelfTest, Trial, Verdict, self_test


def test_some_checks_and_mutants():
    *_, state = self_test(ids=["mask.past", "attention.output"], mutants=["SeesItself", "NoScale"], processes=2)
    assert state.complete
    assert state.faults() == []
    assert state.killers == {"SeesItself": ["mask.past", "attention.output"], "NoScale": ["attention.output"]}
    assert {verdict.backend for verdict in state.trials[0].verdicts} > set(RIGHT) - {"Plain"}


def whole(*trials):
    return SelfTest({"A": ["mask.past"], "B": ["mask.values"]}, ["good"], list(trials), complete=True)


def trial(check, **examples):
    return Trial(check, tuple(Verdict(name, example, "off") for name, example in examples.items()), 10, 1.0)


FAULTS = {
    "none": ([trial("mask.past", A=1, B=None, good=None), trial("mask.values", A=None, B=2, good=None)], []),
    "a survivor": (
        [trial("mask.past", A=1, B=None), trial("mask.values", A=1, B=None)],
        ["B survives; it was to be rejected by mask.values"],
    ),
    "an idle check": (
        [trial("mask.past", A=1), trial("mask.values", B=1), trial("mask.wide", A=None)],
        ["mask.wide rejects no mutant"],
    ),
    "a false alarm": (
        [trial("mask.past", A=1, good=3), trial("mask.values", B=1)],
        ["good is right, and mask.past rejects it at example 3: off"],
    ),
    "a check that does not do its own": (
        [trial("mask.past", A=None, B=1), trial("mask.values", A=1, B=1)],
        ["A passes mask.past, made to reject it"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    trials, faults = FAULTS[name]
    assert whole(*trials).faults() == faults


def test_command(tmp_path):
    path = tmp_path / "matrix.json"
    ran = check("--self-test", "--check", "mask.past", "--mutant", "SeesItself", "--mutant", "SeesTheFuture",
                "--examples", 20, "--json", path)  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("mask.past                    rejects   2 of   2 mutants")
    assert "PAST" in lines
    assert "  mask.past                      2  SeesItself SeesTheFuture" in lines
    assert lines[-1] == f"2 of 2 mutants rejected, by 1 checks; {len(RIGHT)} right backends; 0 faults of the suite"
    tree = json.loads(path.read_text())
    assert tree["killers"] == {"SeesItself": ["mask.past"], "SeesTheFuture": ["mask.past"]}


def test_a_check_that_misses_is_a_fault():
    """With one example, which says nothing about the future."""
    ran = check("--self-test", "--check", "attention.batch_mates", "--mutant", "SpansOfTheFirstRow", "--examples", 1)
    assert ran.returncode == 1
    assert "SpansOfTheFirstRow passes attention.batch_mates, made to reject it" in ran.stdout


def test_survivors_are_known_in_the_end_only():
    state = whole(trial("mask.past", A=1, B=None, good=3))
    state.complete = False
    assert state.faults() == ["good is right, and mask.past rejects it at example 3: off"]


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("seconds", [0, 1, 6])
def test_interrupted(tmp_path, name, seconds):
    """Before anything is tried, and in the midst of it: for all processes, as `timeout` does it."""
    path, number = tmp_path / "matrix.json", getattr(signal, name)
    path.write_text('{\n  "complete": false,\n  "from": "before"\n}')
    command = [sys.executable, "-m", "refspan", "check", "--self-test", "--level", "training", "--json", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            wait_until_it_listens(process)
            time.sleep(seconds)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (128 + number, "")
    assert out.endswith(" 0 faults of the suite, INCOMPLETE\n")
    tree = json.loads(path.read_text())
    assert (tree["complete"], tree["faults"]) == (False, [])
    assert len(tree["trials"]) < (len(select(levels=["training"])) if seconds else 1)


def wait_until_it_listens(process):
    """SIGTERM is caught from then on."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        time.sleep(5)
        return
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        time.sleep(0.02)


OTHERS = {
    "--backend": "numpy", "--device": "cpu", "--form": "fused", "--timeout": "10", "--junit": "x", "--html": "x",
    "--badge": "x", "--expected-failures": "x", "--vectors": "x", "--save-failures": "x", "--list": None,
}  # fmt: skip


@pytest.mark.parametrize("option", OTHERS)
def test_options_that_mean_nothing_to_it(option):
    given = [option] if OTHERS[option] is None else [option, OTHERS[option]]
    result = CliRunner().invoke(cli, ["check", "--self-test", "--check", "mask.past", *given], standalone_mode=False)
    assert isinstance(result.exception, click.UsageError)
    assert str(result.exception) == f"--self-test tries the checks, not a backend: leave {option} out."


def test_every_option_goes_with_it_or_is_refused():
    command = cli.get_command(None, "check")
    refused = {param.opts[0] for param in command.params if param.name not in OF_SELF_TEST}
    assert refused == set(OTHERS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "numpy", "--mutant", "Epsilon"], "--mutant goes with --self-test"),
        (
            ["--self-test", "--mutant", "Nobody"],
            "unknown mutant 'Nobody'; `python -m refspan.conformance.mutants` lists",
        ),
        (["--self-test", "--check", "mask.nothing"], "unknown check 'mask.nothing'"),
        (["--self-test", "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_bad_usage(arguments, said):
    ran = check(*arguments)
    assert ran.returncode == 2
    assert said in ran.stderr


def test_the_list_of_mutants():
    ran = run_module(module="refspan.conformance.mutants")
    lines = ran.stdout.splitlines()
    assert [line.split()[1] for line in lines] == list(MUTANTS)
    assert any("seen in lucidrains/learning-to-expire-pytorch" in line for line in lines)


def test_every_mutant_says_what_it_is():
    select()
    assert len(MUTANTS) >= 100
    for one in MUTANTS.values():
        assert one.change
        assert "\n" not in one.change
        assert set(one.killed_by) <= set(CHECKS)
