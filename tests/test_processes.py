"""Processes of backends end: with the session, with the checker however it ends, and with all that they started."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import misbehaving
import pytest
from starting import started

from refspan.conformance.external.child import RELAYED, WARDEN, Child
from refspan.conformance.guard import Hung
from refspan.conformance.loading import session_of
from refspan.conformance.report import Report
from refspan.conformance.runner import run, select

linux = pytest.mark.skipif(sys.platform != "linux", reason="orphans are found where the system tells whose they are")
WAYS = {
    "in Python": "{}",
    "over the wire": f"exec:{sys.executable} -m refspan.conformance.external.serve {{}}",
}


def named(name, way):
    return WAYS[way].format(f"{misbehaving.__file__}:{name}")


def alive(pid):
    """Whether there is such a process, and not only what is left of it until somebody asks how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def until(what, seconds=20.0):
    """Wait until `what()` is true, and say whether it became so."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Where backends note who they are. One that is still there in the end is ended."""
    path = tmp_path / "mark"
    monkeypatch.setenv("REFSPAN_TEST_MARK", str(path))
    yield path
    if path.exists() and (pid := path.read_text()).isdigit():
        with suppress(OSError):
            if str(path).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def sleepers(tmp_path, monkeypatch):
    """The processes that `LeavesProcesses` has left."""
    length = f"70.{os.getpid()}{time.monotonic_ns()}"
    monkeypatch.setenv("REFSPAN_TEST_SLEEP", length)
    yield lambda: subprocess.run(["pgrep", "-f", f"sleep {length}"], capture_output=True, text=True).stdout.split()
    subprocess.run(["pkill", "-f", f"sleep {length}"], check=False)


@linux
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["LeavesProcesses", "LeavesProcessesAndHangs", "LeavesProcessesAndDies"])
def test_nothing_is_left_of_what_a_backend_started(name, way, sleepers):
    session = session_of(named(name, way), timeout=2)
    report = Report(session.facts)
    try:
        list(run(session, select(ids=["mask.past"]), report, examples=2))
        left = 6 if name == "LeavesProcesses" else 0  # those of a process that has failed are gone with it
        assert until(lambda: len(sleepers()) == left)
    finally:
        session.close()
    assert sleepers() == []
    assert report.count("passed") == (name == "LeavesProcesses")


@linux
@pytest.mark.parametrize("way", WAYS)
def test_whoever_reads_our_output_need_not_wait_for_them(way, sleepers):
    """As in $(refspan check ..)."""
    start = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", "refspan", "check", "--backend", named("LeavesProcesses", way), "--check", "mask.past",
         "--examples", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert time.monotonic() - start < 60
    assert sleepers() == []


def test_what_a_backend_prints_is_shown_but_not_without_end(tmp_path):
    (tmp_path / "prints.py").write_text(
        "import sys\n"
        "class Says:\n"
        "    name = 'says'\n"
        "    def soft_mask(self, span, age, *, queries, ramp):\n"
        "        print('hello'); print('and', file=sys.stderr)\n"
        "class Floods(Says):\n"
        "    def soft_mask(self, span, age, *, queries, ramp):\n"
        "        while True: print('x' * 1000)\n"
    )

    def stderr_of(name):
        ran = subprocess.run(
            [sys.executable, "-m", "refspan", "check", "--backend", f"{tmp_path / 'prints.py'}:{name}",
             "--check", "mask.past", "--timeout", "1"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert ran.returncode == 1
        return ran.stderr

    assert set(stderr_of("Says").split()) == {"hello", "and"}
    flood = stderr_of("Floods")
    assert len(flood) < RELAYED + 1000
    assert f"refspan: the backend's process wrote more than {RELAYED} bytes; the rest is left out" in flood


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("way", WAYS)
def test_a_backend_does_not_outlive_the_checker(way, how, mark):
    code = (
        "from refspan.conformance.loading import session_of\n"
        "from refspan.conformance.registry import Probe\n"
        "from refspan.conformance.drawing import drawn\n"
        "from refspan.conformance.runner import select\n"
        f"session = session_of({named('Spins', way)!r}, timeout=90)\n"
        "(check,) = select(ids=['mask.past'])\n"
        "check.body(Probe(session), drawn(check, 'float32', 0, 1)[0])"
    )
    checker = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert until(mark.exists)
        pid = int(mark.read_text())
        assert alive(pid)
        checker.send_signal(how)
        assert until(lambda: not alive(pid))
    finally:
        checker.kill()
        checker.wait()


@linux
def test_a_command_that_was_never_closed_ends_with_the_process(mark):
    code = (
        "from refspan.conformance import load_backend; import numpy as np; "
        f"backend = load_backend({named('Spins', 'over the wire')!r}); backend._timeout = 1.0\n"
        "try: backend.soft_mask(np.ones((1, 1), 'f4'), np.ones((1, 1), 'i8'), queries=1, ramp=1.0)\n"
        "except Exception as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "did not answer within 1 s" in ran.stdout
    pid = int(mark.read_text())
    assert until(lambda: not alive(pid))


@linux
def test_a_command_ends_with_its_warden(tmp_path):
    child = Child(["sh", "-c", "echo $$; exec sleep 77"])
    try:
        child.begin("start", 20)
        pid = int(child.line())
        assert alive(pid)
        child._process.kill()
        assert until(lambda: not alive(pid))
    finally:
        child.close()


@linux
@pytest.mark.parametrize("least_left", [2.0, 0.0], ids=["little is left", "enough is left"])
def test_one_that_takes_the_memory_of_the_machine_is_ended(tmp_path, monkeypatch, least_left):
    """Here a process that it started takes it, 200 MB, of which the machine is said not to have that much."""
    total = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) << 10
    source = Path(WARDEN).read_text()
    changed = source.replace("= 0.1, 0.25\n", f"= {least_left}, {150e6 / total}\n")
    assert changed != source
    (tmp_path / "warden.py").write_text(changed)
    monkeypatch.setattr("refspan.conformance.external.child.WARDEN", str(tmp_path / "warden.py"))
    takes = "import time; held = b'1' * 200_000_000; print('held', flush=True); time.sleep(60)"
    child = Child(["sh", "-c", f'echo $$; {sys.executable} -c "{takes}" & wait'])
    try:
        child.begin("start", 20)
        pid = int(child.line())
        assert "1000" in Path(f"/proc/{pid}/oom_score_adj").read_text()
        if least_left:
            said = r"start: the command was ended: it held \d{3} MiB, and \d+ of the machine's \d+ MiB were left"
            with pytest.raises(Hung, match=said):
                child.read(1000)
        else:
            assert child.line() == b"held"
            child.begin("more", 0.5)
            with pytest.raises(Hung, match="did not answer"):
                child.line()
    finally:
        child.close(seconds=0)


@pytest.mark.parametrize("aim", ["group", "backend"])
def test_ctrl_c_while_a_backend_loads_is_no_traceback(aim, mark):
    """A terminal sends it to all processes of a group."""
    command = [sys.executable, "-m", "refspan", "check", "--backend", named("LoadsForEver", "in Python")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    checker = started(signal.SIGINT, command, start_new_session=True, **pipes)
    try:
        assert until(mark.exists)
        pid = int(mark.read_text())
        if aim == "backend":
            os.kill(pid, signal.SIGINT)
            time.sleep(0.3)
            assert alive(pid)
        os.killpg(checker.pid, signal.SIGINT)
        out, said = checker.communicate(timeout=20)
    finally:
        checker.kill()
        checker.communicate()
    assert checker.returncode == 130
    assert len(said.splitlines()) <= 1
    assert "Traceback" not in out + said
    assert not alive(pid)


def test_ctrl_c_during_a_request_is_not_taken_for_a_fault_of_the_command(mark):
    """It is the checker that is interrupted. In a process without other libraries: beside some, signals are fatal."""
    command = named("Spins", "over the wire").removeprefix("exec:")
    code = (
        "import signal\n"
        "from refspan.conformance.external.backend import CommandSession\n"
        "from refspan.conformance.report import Report\n"
        "from refspan.conformance.runner import run, select\n"
        f"session = CommandSession({command!r}, timeout=20)\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"  # SIGINT may be ignored here
        "signal.setitimer(signal.ITIMER_REAL, 1.0)\n"
        "try:\n"
        "    list(run(session, select(ids=['mask.past']), Report(session.facts), examples=2))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
        "finally:\n"
        "    session.close()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "interrupted\n", "")


def test_answers_to_earlier_questions_are_no_answers():
    """A process that the backend forked off may still say something."""
    from refspan.conformance.external.worker import packed, unpacked
    from refspan.conformance.sessions import Worker

    class Written:
        def __init__(self, *content):
            self.left = b"".join(map(packed, content))

        def begin(self, what, seconds):
            pass

        def write(self, data):
            assert unpacked(lambda count: data[:8] if count == 8 else data[8:])[0] == 3

        def read(self, count):
            data, self.left = self.left[:count], self.left[count:]
            return data

    worker = object.__new__(Worker)
    worker._asked = 2
    worker._child = Written((2, "result", ["old"]), (3, "result", ["new"]))
    assert worker._exchange("soft_mask", "question", 1.0) == ("result", ["new"])


def test_a_checker_without_input_and_output(mark):
    """As daemons have it: whatever is opened first gets the number of a stream."""
    code = (
        "from refspan.conformance.loading import session_of\n"
        f"session = session_of({named('Dense', 'in Python')!r}, timeout=5)\n"
        "session.close()\n"
        f"open({str(mark)!r}, 'w').write(session.facts['backend'])"
    )
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    subprocess.run([*closed, sys.executable, "-c", code], timeout=60, check=True)
    assert mark.read_text() == "dense"
