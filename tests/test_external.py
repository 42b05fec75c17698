"""exec:COMMAND: right commands pass, broken ones fail their checks and nothing else."""

import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from refspan.conformance import check_backend, load_backend
from refspan.conformance.external.backend import CommandSession
from refspan.conformance.loading import session_of
from refspan.conformance.registry import CHECKS
from refspan.conformance.report import Report
from refspan.conformance.runner import run, select
from refspan.errors import SetupError

EXAMPLES = Path(__file__).resolve().parents[1] / "conformance" / "examples"
PYTHON = sys.executable
THREADS = [one.id for one in select() if one.id.endswith(".threads")]
"""Not offered: a command answers one request at a time."""
MASK = len(select(["mask"])) - 1
"""Checks of this level without that of threads."""
OK = '{"version": 1, "name": "x", "operations": ["soft_mask"], "tensors": []}'


def report_of(command, *, levels=("mask",), checks=(), timeout=5.0, examples=10):
    session = session_of(f"exec:{command}", timeout=timeout)
    report = Report(session.facts)
    try:
        for _ in run(session, select(() if checks else levels, checks), report, examples=examples):
            pass
    finally:
        session.close()
    return report


def script(tmp_path, body):
    """A command that answers `start` as it should, and then does as `body` says to each request."""
    path = tmp_path / "backend.py"
    path.write_text(
        "import json, os, sys, time\n"
        "sys.stdin.readline()\n"
        f"print('{OK}', flush=True)\n"
        "def request():\n"
        "    line = sys.stdin.buffer.readline()\n"
        "    return json.loads(line)['seq'] if line else sys.exit()\n" + textwrap.dedent(body)
    )
    return f"{PYTHON} {path}"


def messages(report):
    return [result.failure.message for result in report.results if result.failure]


def test_every_level_over_the_wire():
    report = report_of(f"{PYTHON} -m refspan.conformance.external.serve numpy", levels=(), timeout=20)
    assert messages(report) == []
    left = [result.check for result in report.results if result.status != "passed"]
    assert left == THREADS
    assert len(report.results) == len(CHECKS)


def test_wrong_backends_are_rejected_over_the_wire():
    for name, checks in (("mask:SeesItself", ("mask.past",)), ("memory:ForgetsTheOldest", ("memory.keeps_all",))):
        where = f"refspan.conformance.mutants.{name}"
        report = report_of(f"{PYTHON} -m refspan.conformance.external.serve {where}", checks=checks, examples=60)
        assert report.count("failed") == 1
        assert not [message for message in messages(report) if "the command" in message]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_example_in_c(tmp_path, dtype):
    subprocess.run(
        [
            "cc",
            "-std=c99",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O2",
            "-o",
            tmp_path / "attention",
            EXAMPLES / "attention.c",
            "-lm",
        ],
        check=True,
    )
    session = CommandSession(str(tmp_path / "attention"), timeout=10)
    report = Report(session.facts)
    try:
        list(run(session, select(("mask", "attention", "gradient", "golden")), report, dtype=dtype, examples=30))
    finally:
        session.close()
    assert messages(report) == []
    left = [result.check for result in report.results if result.status != "passed"]
    assert left == ["mask.threads", "attention.threads", "gradient.threads"]


def test_the_example_in_python():
    report = report_of(f"{PYTHON} {EXAMPLES / 'attention.py'}")
    assert messages(report) == []
    assert report.count("passed") == MASK


def test_the_example_that_hangs():
    start = time.monotonic()
    report = report_of(f"sh {EXAMPLES / 'slow.sh'}", timeout=0.5)
    assert report.count("failed") == MASK
    for message in messages(report):
        assert "did not answer within 0.5 s" in message
    assert any("its stderr ends: asked for a mask, and going to sleep" in message for message in messages(report))
    assert time.monotonic() - start < 30


def npy(dtype, shape):
    """The beginning of an npy file, as Python source."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return repr(b"\x93NUMPY\x01\x00\x76\x00" + header.encode())


BROKEN = {
    "exits": ("request(); sys.exit(3)", "the command ended with status 3"),
    "dies": ("request(); os.kill(os.getpid(), 11)", "the command ended by signal SIGSEGV"),
    "does not flush": (
        "request(); time.sleep(60)",
        "did not answer within 2 s (nothing came; is the answer flushed?)",
    ),
    "no line break": (
        "print(json.dumps({'seq': request()}), end='', flush=True); time.sleep(60)",
        "did not answer within 2 s (10 bytes came, without a line break)",
    ),
    "half an answer": (
        "print(json.dumps({'seq': request(), 'tensors': ['mask']}), flush=True)\n"
        f"sys.stdout.buffer.write({npy('<f4', '(100,)')})\n"
        "sys.stdout.buffer.flush(); time.sleep(60)",
        "did not answer within 2 s (160 bytes came, and more were announced)",
    ),
    "panics": (
        "request(); sys.exit('panicked at line 7\\n' + 'a frame\\n' * 100 + 'the last frame')",
        "its stderr says: panicked at line 7 a frame",
    ),
    "says why": ("request(); sys.exit('no\\n\\x1b[31mluck')", "its stderr ends: no ?[31mluck"),
    "talks nonsense": ("request(); print('hello', flush=True); time.sleep(60)", "the command wrote 'hello'"),
    "a number": ("request(); print('3', flush=True); time.sleep(60)", "expected a line of JSON, an object"),
    "NaN": ("print('{\"seq\": NaN}', flush=True); time.sleep(60)", "expected a line of JSON"),
    "nested": ("print('[' * 100000, flush=True); time.sleep(60)", "expected a line of JSON"),
    "true as seq": (
        "request(); print('{\"seq\": true}', flush=True); time.sleep(60)",
        "the answer has seq True, expected 1",
    ),
    "other seq": ("request(); print('{\"seq\": 77}', flush=True); time.sleep(60)", "the answer has seq 77, expected 1"),
    "no tensor": (
        "while True:\n    print(json.dumps({'seq': request()}), flush=True)\n    sys.stdin.buffer.read1()",
        "soft_mask: the answer has no tensor 'mask', expected mask",
    ),
    "null for an error": (
        "while True:\n"
        "    print(json.dumps({'seq': request(), 'error': None}), flush=True)\n"
        "    sys.stdin.buffer.read1()",
        "soft_mask: the answer has no tensor 'mask', expected mask",
    ),
    "no for not offered": (
        "while True:\n"
        "    print(json.dumps({'seq': request(), 'not_offered': 'no'}), flush=True)\n"
        "    sys.stdin.buffer.read1()",
        "soft_mask: the answer has not_offered 'no', expected true or false",
    ),
    "tensors": ('print(\'{"seq": 1, "tensors": 5}\', flush=True); time.sleep(60)', "`tensors`: got 5"),
    "no npy": (
        "print(json.dumps({'seq': request(), 'tensors': ['mask']}), 'x' * 100, sep='\\n', flush=True); time.sleep(60)",
        "expected an npy file of version 1.0",
    ),
    "huge": (
        "print(json.dumps({'seq': request(), 'tensors': ['mask']}), flush=True)\n"
        f"sys.stdout.buffer.write({npy('<f4', '(1000000000,)')})\n"
        "sys.stdout.buffer.flush(); time.sleep(60)",
        "is beyond the limit of 1048576 bytes",
    ),
    "objects": (
        "print(json.dumps({'seq': request(), 'tensors': ['mask']}), flush=True)\n"
        f"sys.stdout.buffer.write({npy('|O', '(1,)')})\n"
        "sys.stdout.buffer.flush(); time.sleep(60)",
        "got dtype |O",
    ),
    "short": (
        "print(json.dumps({'seq': request(), 'tensors': ['mask']}), flush=True)\n"
        f"sys.stdout.buffer.write({npy('<f4', '(100,)')})\n"
        "sys.stdout.buffer.flush(); sys.exit()",
        "the command ended with status 0",
    ),
    "other shape": (
        "while True:\n"
        "    print(json.dumps({'seq': request(), 'tensors': ['mask']}), flush=True)\n"
        f"    sys.stdout.buffer.write({npy('<f4', '(1,)')} + bytes(4))\n"
        "    sys.stdout.buffer.flush()\n"
        "    sys.stdin.buffer.read1()",
        "soft_mask returned shape (1,)",
    ),
    "refuses": (
        "while True:\n"
        "    print(json.dumps({'seq': request(), 'error': 'not\\ntoday', 'tensors': []}), flush=True)\n"
        "    sys.stdin.buffer.read1()",
        "soft_mask failed: not today",
    ),
    "floods stdout": ("request()\nwhile True: os.write(1, b'x' * 65536)", "a header of more than 1048576 bytes"),
    "floods stderr": ("request()\nwhile True: os.write(2, b'x' * 65536)", "did not answer within 2 s"),
    "floods a wide stderr": (
        "import fcntl\nrequest()\nfcntl.fcntl(2, getattr(fcntl, 'F_SETPIPE_SZ', 1), 1 << 20)\nos.fork()\n"
        "while True: os.write(2, b'x' * 1048576)",
        "did not answer within 2 s",
    ),
    "more tensors than asked for": (
        "print(json.dumps({'seq': request(), 'tensors': [f't{i}' for i in range(9999)]}), flush=True)\n"
        f"while True: sys.stdout.buffer.write({npy('<f4', '(67108864,)')} + bytes(1 << 28))",
        "`tensors`: got 't0', expected some of mask",
    ),
    "never reads": ("time.sleep(60)", "did not answer within 2 s"),
    "forks": (
        "request()\nos.fork() or os.fork()\ntime.sleep(60)",
        "did not answer within 2 s",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_commands_fail_their_checks(name, tmp_path):
    body, said = BROKEN[name]
    command = script(tmp_path, body)
    session = session_of(f"exec:{command}", timeout=2)
    report = Report(session.facts)
    try:
        list(run(session, select(ids=["mask.values"]), report, examples=5))
    finally:
        session.close()
    assert said in messages(report)[0]
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "backend.py")], capture_output=True, text=True)
    assert left.stdout == ""


def test_a_command_that_crashed_is_started_again(tmp_path):
    """It fails the checks in which it crashed, and no others."""
    mark = tmp_path / "crashed"
    command = script(
        tmp_path,
        f"""
        import numpy as np
        from pathlib import Path
        from refspan.conformance.backends.reference import NumpyBackend
        from refspan.conformance.external.serve import Server
        if not Path({str(mark)!r}).exists():
            Path({str(mark)!r}).touch()
            os.abort()
        Server(NumpyBackend()).serve(sys.stdin.buffer, sys.stdout.buffer)
        """,
    )
    report = report_of(command)
    statuses = [result.status for result in report.results if result.check not in THREADS]
    assert statuses == ["failed", *["passed"] * (MASK - 1)]
    assert "ended by signal SIGABRT" in messages(report)[0]


def test_large_requests_do_not_lock(tmp_path):
    """Both sides write at once: neither waits for the other for ever."""
    command = script(
        tmp_path,
        """
        from refspan.conformance.backends.reference import NumpyBackend
        from refspan.conformance.external.serve import Server
        Server(NumpyBackend()).serve(sys.stdin.buffer, sys.stdout.buffer)
        """,
    )
    backend = load_backend(f"exec:{command}")
    try:
        span = np.random.default_rng(0).random((64, 4096)).astype(np.float32) * 100
        mask = backend.soft_mask(span, np.tile(np.arange(4096, 0, -1), (64, 1)), queries=16, ramp=8.0)
        assert mask.shape == (64, 16, 4096)
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "expected a command"),
        ("'", "No closing quotation"),
        ("/no/such/command", "cannot be started: No such file or directory"),
        ("true", "the command ended with status 0"),
        ("echo hello", "expected a line of JSON"),
        ('echo {"version":2}', "expected a line of JSON"),
        ("""echo '{"version": true}'""", "has version True; this refspan speaks version 1"),
        ("""echo '{"version": 2}'""", "has version 2; this refspan speaks version 1"),
        ("""echo '{"version": 1, "operations": ["fly"]}'""", "it offers ['fly']; expected a list of some of soft_mask"),
    ],
)
def test_what_cannot_be_started(command, said):
    with pytest.raises(SetupError) as caught:
        load_backend(f"exec:{command}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SetupError):
        session_of(f"exec:{command}", timeout=1)


def test_options_are_part_of_the_command():
    with pytest.raises(SetupError, match="make it part of the command"):
        load_backend("exec:true", device="cuda")


def test_in_python():
    backend = load_backend(f"exec:{PYTHON} {EXAMPLES / 'attention.py'}")
    try:
        assert check_backend(backend, levels=("mask",), examples=5).conforms
    finally:
        backend.close()
