"""`refspan check` as a user meets it: status, output, reports, and one line for everything that is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import misbehaving
import pytest
from click.testing import CliRunner
from starting import started

from refspan.__main__ import cli
from refspan.conformance.mutants import dense
from refspan.conformance.report import Report, Result
from refspan.conformance.runner import select
from refspan.conformance.vectors.folder import write_folder
from refspan.conformance.vectors.frozen import frozen_vectors
from refspan.errors import SetupError
from refspan.files import write_whole

FILE = misbehaving.__file__
MUTANTS = "refspan.conformance.mutants"
CHECKS = [check.id for check in select()]
MASK = [id_ for id_ in CHECKS if id_.startswith("mask.")]


def run_module(*arguments, cwd=None, module="refspan", **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def check(*arguments, **options):
    return run_module("check", *arguments, **options)


def test_conforming_backend():
    ran = check("--backend", "numpy", "--level", "mask", "--examples", 5)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    head = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert {"refspan", "backend", "numpy", "device", "dtype", "seed", "examples", "python"} <= set(head)
    assert (head["backend"], head["dtype"], head["seed"], head["examples"]) == ("numpy", "float32", "0", "5 per check")
    checks = lines[lines.index("") + 1 : -1]
    assert [line.split()[:2] for line in checks] == [["pass", id_] for id_ in MASK]
    assert all("error/bound" in line for line in checks)
    assert "MASK PAST WIDTH" in checks[0]
    said = f"{len(MASK)} of {len(MASK)} passed, 0 failed, 0 not offered, "
    assert re.fullmatch(said + r"\d+ s, \d+% of it the backend's own", lines[-1])


def test_wrong_backend_shows_a_small_counterexample_and_how_to_see_it_again():
    ran = check("--backend", f"{MUTANTS}.mask:HardMask", "--check", "mask.values", "--seed", 3, "--examples", 50)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "FAIL  mask.values" in ran.stdout
    assert "M=1 queries" in ran.stdout  # shrunk
    assert "memory 0: span" in ran.stdout
    replay = next(line for line in ran.stdout.splitlines() if "replay: " in line).partition("replay: ")[2]
    program, *arguments = replay.split()
    assert program == "refspan"
    again = run_module(*arguments)
    assert again.returncode == 1
    assert [x for x in again.stdout.splitlines() if "mask[" in x] == [
        x for x in ran.stdout.splitlines() if "mask[" in x
    ]


def test_replay_repeats_every_setting():
    settings = ["--dtype", "float64", "--seed", "4", "--examples", "6", "--timeout", "7"]
    ran = check("--backend", f"{MUTANTS}.mask:HardMask", "--check", "mask.values", *settings)
    assert (
        f"replay: refspan check --backend {MUTANTS}.mask:HardMask {' '.join(settings)} --check mask.values"
        in ran.stdout
    )


def test_what_nobody_foresaw_is_one_line_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import refspan.conformance.runner as r\nr.select = lambda *_: 1 / 0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = check("--backend", "numpy", PYTHONPATH=path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert "refspan: ZeroDivisionError: division by zero (not foreseen, so a defect of refspan;" in ran.stderr
    assert "Traceback" in check("--backend", "numpy", PYTHONPATH=path, REFSPAN_TRACEBACK="1").stderr


def test_two_runs_are_alike_but_for_their_times():
    def run():
        checks = ("--check", "attention.output", "--check", "attention.faint", "--check", "attention.empty")
        ran = check("--backend", f"{MUTANTS}.weights:NoScale", *checks, "--examples", 10)
        return re.sub(r"\d+\.\d s|, \d+ s, \d+%", "", ran.stdout)

    assert run() == run()


def test_what_is_not_offered_is_counted_apart():
    ran = check("--backend", f"{FILE}:MaskOnly", "--examples", 2)
    assert ran.returncode == 0
    count, rest = len(MASK), len(CHECKS) - len(MASK)
    assert f"{count} of {len(CHECKS)} passed, 0 failed, {rest} not offered" in ran.stdout
    assert "----  attention.output" in ran.stdout


def test_nothing_offered_of_what_was_asked_is_no_pass():
    ran = check("--backend", f"{FILE}:MaskOnly", "--level", "gradient", "--examples", 2)
    assert ran.returncode == 2
    assert ran.stderr == "refspan: nothing was checked: the backend offers nothing that was asked for\n"
    assert ran.stdout.splitlines()[-1].startswith("0 of ")


def test_list():
    ran = check("--list")
    assert ran.returncode == 0
    assert [line.split()[0] for line in ran.stdout.splitlines()] == CHECKS


def test_json(tmp_path):
    path = tmp_path / "report.json"
    ran = check("--backend", f"{MUTANTS}.weights:Epsilon", "--level", "attention", "--examples", 10, "--json", path)
    assert ran.returncode == 1
    tree = json.loads(path.read_text())
    assert (tree["complete"], tree["conforms"]) == (True, False)
    assert tree["facts"]["backend"] == "Epsilon"
    by_id = {result["check"]: result for result in tree["results"]}
    assert set(by_id) == {c for c in CHECKS if c.startswith("attention.")}
    assert by_id["attention.empty"]["status"] == "passed"
    failure = by_id["attention.lone_survivor"]["failure"]
    assert failure["replay"].startswith("refspan check --backend")
    assert tree["summary"]["failed"] == sum(r["status"] == "failed" for r in tree["results"])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "nobody"], "unknown backend 'nobody'; expected one of numpy, cupy, onnxruntime"),
        (["--backend", "numpy", "--level", "masks"], "unknown level 'masks'; expected one of mask, attention"),
        (["--backend", "numpy", "--check", "mask.x"], "unknown check 'mask.x'; `refspan check --list` lists them"),
        (["--backend", "numpy", "--dtype", "int8"], "unknown dtype 'int8'; expected one of float16, float32, float64"),
        (["--backend", "numpy", "--device", "cuda"], "backend 'numpy' has no option --device; leave it out"),
        (["--backend", "numpy", "--json", "no/such/folder/r.json"], "no/such/folder/r.json: folder "),
        (["--backend", "numpy", "--json", "."], ".: is a folder, expected a file to write"),
        (["--backend", "missing.py:Thing"], "backend file missing.py: no such file"),
        (["--backend", f"{FILE}:Nothing"], "has no attribute 'Nothing'"),
        (["--backend", f"{FILE}:CannotStart"], "could not be loaded: RuntimeError: no licence found"),
        (["--backend", f"{FILE}:OnlySingle", "--dtype", "float64"], "does not take dtype float64; it takes float32"),
        (["--backend", "onnxruntime", "--form", "melted"], "form: got 'melted', expected one of fused, portable"),
        (["--backend", "onnxruntime", "--device", "tpu"], "device: got 'tpu', expected one of cpu, cuda"),
        (["--backend", "numpy", "--examples", "0"], "0 is not in the range x>=1"),
        (["--backend", "numpy", "--seed", "x"], "'x' is not a valid integer"),
        (["--backend", "numpy", "--timeout", "nan"], "'--timeout': nan is not a number of seconds"),
        (["--nope"], "refspan check: No such option"),
        ([], "Missing option '--backend'"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line_with_status_2(arguments, said):
    ran = check(*arguments)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert said in ran.stderr
    assert ran.stdout == ""


def test_cuda_without_a_gpu_says_what_is_missing():
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is one")
    ran = check("--backend", "onnxruntime", "--device", "cuda")
    assert ran.returncode == 2
    assert 'pip install "refspan[gpu]"' in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(("package", "backend"), [("onnxruntime", "onnxruntime"), ("cupy", "cupy")])
def test_a_missing_package_names_the_extra(tmp_path, package, backend):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    ran = check("--backend", backend, PYTHONPATH=str(tmp_path))
    assert ran.returncode == 2
    assert "pip install" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write_the_report(tmp_path):
    tmp_path.chmod(0o500)
    ran = check("--backend", "numpy", "--json", tmp_path / "report.json")
    assert ran.returncode == 2
    assert "no permission to write into" in ran.stderr


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("good")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match="No space left"):
        write_whole(path, b"half")
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_whole(path, b"better")
    assert path.read_text() == "better"


ENDLESS = """
import time
from pathlib import Path


def wait():
    Path("waiting").write_text("")
    time.sleep(1000)


class Hangs:
    name = "hangs"

    def soft_mask(self, span, age, *, queries, ramp):
        wait()


class StartsSlowly:
    def __init__(self):
        wait()
"""
posix = pytest.mark.skipif(os.name == "nt", reason="sends signals")


def interrupted(folder, number, *arguments, backend="endless.py:Hangs", all_processes=False):
    """Exit status and what is said when a signal comes while the backend is busy; the seconds until then."""
    (folder / "endless.py").write_text(ENDLESS)
    (folder / "waiting").unlink(missing_ok=True)
    command = [sys.executable, "-m", "refspan", "check", "--backend", backend, "--timeout", "600", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    with started(number, command, cwd=folder, start_new_session=all_processes, **pipes) as process:
        try:
            for _ in range(600):
                if (folder / "waiting").exists():
                    break
                time.sleep(0.1)
            start = time.monotonic()
            (os.killpg if all_processes else os.kill)(process.pid, number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, out, err, time.monotonic() - start


def test_an_interrupted_run_is_marked_incomplete(tmp_path):
    path = tmp_path / "report.json"
    words = ["--backend", "numpy", "--examples", "500", "--json", str(path)]
    command = [sys.executable, "-m", "refspan", "check", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("pass"):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out.splitlines()[-1].endswith("INCOMPLETE")
    assert "Traceback" not in err
    tree = json.loads(path.read_text())
    assert (tree["complete"], tree["conforms"]) == (False, False)
    assert tree["results"]


@posix
@pytest.mark.parametrize("backend", ["Hangs", "StartsSlowly"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_busy_backend_is_left_at_once(tmp_path, name, backend):
    """The check at which it is busy is not reported as failed; all files are written."""
    number = getattr(signal, name)
    words = ["--json", "r.json", "--junit", "r.xml", "--html", "r.html", "--badge", "r.svg"]
    status, out, err, seconds = interrupted(tmp_path, number, *words, backend=f"endless.py:{backend}")
    assert (status, err) == (128 + number, "")
    assert seconds < 10
    assert out.splitlines()[-1] == f"0 of {len(CHECKS)} passed, 0 failed, 0 not offered, INCOMPLETE"
    tree = json.loads((tmp_path / "r.json").read_text())
    assert (tree["complete"], tree["planned"], tree["results"]) == (False, len(CHECKS), [])
    assert tree["facts"]["backend"] == ("hangs" if backend == "Hangs" else "endless.py:StartsSlowly")
    assert all(b"incomplete" in (tmp_path / f"r.{form}").read_bytes().lower() for form in ("xml", "html", "svg"))


@posix
def test_a_signal_for_all_processes(tmp_path):
    """As `timeout` sends it: the backend dies of it too, and is not to blame."""
    status, out, err, _ = interrupted(tmp_path, signal.SIGTERM, all_processes=True)
    assert (status, err) == (143, "")
    assert out.splitlines()[-1] == f"0 of {len(CHECKS)} passed, 0 failed, 0 not offered, INCOMPLETE"


@posix
def test_half_a_report_takes_the_place_of_half_a_report_only(tmp_path):
    path, partial = tmp_path / "r.json", tmp_path / "r.json.partial"
    said = "refspan: r.json stays as it was; the report of this run, INCOMPLETE, is r.json.partial\n"
    assert interrupted(tmp_path, signal.SIGINT, "--seed", "1", "--json", "r.json")[2] == ""
    assert interrupted(tmp_path, signal.SIGINT, "--seed", "2", "--json", "r.json")[2] == ""
    assert json.loads(path.read_text())["facts"]["seed"] == "2"
    check("--backend", "numpy", "--check", "mask.past", "--examples", 2, "--json", path)
    whole = path.read_text()
    for seed in ("3", "4"):
        assert interrupted(tmp_path, signal.SIGINT, "--seed", seed, "--json", "r.json")[2] == said
        assert json.loads(partial.read_text())["facts"]["seed"] == seed
    assert path.read_text() == whole
    check("--backend", "numpy", "--check", "mask.past", "--examples", 2, "--json", path)
    assert not partial.exists()


@posix
def test_who_is_told_to_ignore_a_signal_does(monkeypatch):
    """nohup; and in a process that goes on, as in tests, signals mean what they did before."""
    code = (
        "import os, signal\n"
        "from refspan.interrupt import Interrupts\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "stop = Interrupts()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(bool(stop))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(bool(stop), stop.status)\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\nTrue 143\n"
    before = signal.getsignal(signal.SIGTERM)
    CliRunner().invoke(cli, ["check", "--backend", "nobody"], standalone_mode=False)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_report_that_cannot_be_written_takes_nothing_with_it(tmp_path, monkeypatch):
    """The disk is full: what was found is printed, each of the other files is written, and all faults are told."""

    def full(path, content):
        if path.suffix in (".json", ".html"):
            raise SetupError(f"{path.name}: cannot be written: No space left on device")
        write_whole(path, content)

    monkeypatch.setattr("refspan.conformance.report.write_whole", full)
    words = ["--backend", "numpy", "--check", "mask.past", "--examples", "2"]
    for option, name in (("--json", "r.json"), ("--junit", "r.xml"), ("--html", "r.html"), ("--badge", "r.svg")):
        words += [option, str(tmp_path / name)]
    result = CliRunner().invoke(cli, ["check", *words], standalone_mode=False)
    assert isinstance(result.exception, SetupError)
    assert str(result.exception) == "r.json: cannot be written: No space left on device"
    assert "refspan: r.html: cannot be written: No space left on device\n" in result.output
    assert "\n1 of 1 passed, 0 failed, 0 not offered" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.svg", "r.xml"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--json", "r.x", "--html", "r.x"], "--html r.x: is --json too; name another file"),
        (["--json", "r", "--html", "r.partial"], "--json, if interrupted, r.partial: is --html too; name another file"),
        (["--json", "known", "--expected-failures", "known"], "--json known: is --expected-failures too, which would"),
        (
            ["--json", "vectors/manifest.json", "--vectors", "vectors"],
            "vectors/manifest.json: is within --vectors; name",
        ),
        (["--html", "vectors/x.html", "--save-failures", "vectors"], "vectors/x.html: is within --save-failures; name"),
        (["--json", "mine.py", "--backend", "mine.py:B"], "--json mine.py: is mine.py of --backend too, which would"),
        (["--json", "mine.py", "--backend", "mine:B"], "--json mine.py: is mine.py of --backend too, which would be"),
        (["--badge", "a.onnx", "--backend", "onnx:b.onnx,a.onnx"], "--badge a.onnx: is a.onnx of --backend too, which"),
        (["--junit", "mine.py", "--backend", "exec:python3 ./mine.py"], "--junit mine.py: is mine.py of --backend too"),
        (["--json", "/dev/stdout"], "/dev/stdout: is not a regular file, and would have to be replaced"),
        (["--json", "-"], "-: standard output takes no file here; name one"),
    ],
)
def test_reports_that_would_replace_something(tmp_path, options, said):
    for name in ("known", "mine.py", "a.onnx"):
        (tmp_path / name).write_text("")
    if "--vectors" in options or "--save-failures" in options:
        write_folder(tmp_path / "vectors", frozen_vectors()[:1])
    ran = check("--backend", "numpy", *options, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert said in ran.stderr
    assert (tmp_path / "known").read_text() == ""


def test_numbers_that_json_cannot_hold():
    report = Report({"a": "b"})
    report.results.append(Result("mask.values", "mask", ("MASK",), "p", "failed", float("inf"), 1, 0.1))
    assert json.loads(report.to_json())["results"][0]["worst"] == "inf"


def test_progress_bar_on_a_terminal_only(tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    command = [sys.executable, "-m", "refspan", "check", "--backend", "numpy", "--check", "mask.values"]
    ran = subprocess.run(
        [*command, "--examples", "30"], stdout=subprocess.PIPE, stderr=follower, cwd=tmp_path, check=True, timeout=60
    )
    os.write(follower, b"end")  # so that there is something to read even if no bar was drawn
    shown = os.read(leader, 100_000).decode()
    os.close(follower)
    os.close(leader)
    assert "mask.values" in shown
    assert b"\r" not in ran.stdout


def test_output_that_nobody_reads_any_more(tmp_path):
    """As under `head -1`: ended as by SIGPIPE, without a word, the report marked incomplete."""
    words = ["--backend", "numpy", "--level", "mask", "--json", tmp_path / "r.json"]
    command = [sys.executable, "-u", "-m", "refspan", "check", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""
    assert json.loads((tmp_path / "r.json").read_text())["complete"] is False


def test_from_another_folder_with_a_relative_file(tmp_path):
    backend = tmp_path / "mine.py"
    backend.write_text(Path(dense.__file__).read_text())
    ran = check("--backend", "mine.py:Dense", "--level", "mask", "--examples", 2, cwd=tmp_path)
    assert ran.returncode == 0
    ran = check("--backend", "mine:Dense", "--level", "mask", "--examples", 2, cwd=tmp_path)
    assert ran.returncode == 0


def test_a_run_leaves_nothing_behind(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "refspan", "check", "--backend", "numpy", "--check", "mask.values"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0
    assert list(tmp_path.iterdir()) == []
