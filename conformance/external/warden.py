"""Run a command, and end it with all that it started: `python warden.py LINE PARENT COMMAND..`.

LINE is a socket whose other end is held by the process PARENT, which started this one. When it closes, or PARENT is
gone without a word, or the command has ended, everything that descends from the command is killed. On Linux that is
also what it has sent off in a session of its own: such orphans become children of this process.

So it is when it takes the memory of the machine; why is written to LINE, as is why the command cannot be started.

It ends as the command did. Of refspan it imports nothing, so that it is there at once.
"""

import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

KILL_SECONDS = 2.0
"""What cannot be killed in this time is left behind."""

MOMENT = 0.1
"""Seconds from one look at the memory to the next."""
LEAST_LEFT, MOST_TAKEN = 0.1, 0.25
"""Shares of the machine's memory: when less than the first is available, what holds more than the second is ended."""

SIGNAL_WITH_PARENT, ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER


def main(line: int, parent: int, words: list[str]) -> None:
    """Start the command, wait until it has ended or is to end, and end all of it."""
    os.set_inheritable(line, False)
    to_end: list[int] = []
    woken, waker = os.pipe()  # a signal writes to it: waiting for the line ends then
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: to_end.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process_control = _process_control()
    process_control(ADOPT_ORPHANS, 1)
    child = os.fork()
    if child == 0:
        _become(words, line, process_control)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # these are the command's alone: whoever talks to it is to see when it closes them
        os.dup2(nothing, number)
    status = None
    while status is None and not to_end:
        ready, _, _ = select.select([line, woken], [], [], MOMENT)
        if line in ready or os.getppid() != parent:
            break
        if woken in ready:
            os.read(woken, 4096)
        status = ended_children()[0].get(child)
        if status is None and (why := takes_too_much()):
            os.write(line, why.encode())
            break
    end_all(child)
    _end_alike(status)


def _process_control() -> Callable[[int, int], object]:
    """The system call prctl, or something that does nothing."""
    with suppress(ImportError, OSError, AttributeError):
        import ctypes

        call: Callable[[int, int], object] = ctypes.CDLL(None).prctl
        return call
    return lambda *_: None


def _become(words: list[str], line: int, process_control: Callable[[int, int], object]) -> None:
    """The command, in this process; it is killed if the warden is."""
    warden = os.getppid()
    try:
        os.setsid()
        process_control(SIGNAL_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == warden:
            for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # which are ignored here
                signal.signal(number, signal.SIG_DFL)
            with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
                file.write("1000")  # if the system has to end a process for want of memory, then this one
            os.execvp(words[0], words)  # noqa: S606 - running it is what was asked for
    except OSError as error:
        os.write(line, f"cannot be started: {error.strerror or error}".encode())
    finally:
        os._exit(127)


def ended_children() -> tuple[dict[int, int], bool]:
    """Statuses of the children that have ended, by their numbers, and whether there are others."""
    statuses = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = ended[1]
        return statuses, True
    return statuses, False


def end_all(child: int) -> None:
    """Kill the group of `child`, our children, and theirs as they become ours, until there are none."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    while ended_children()[1] and time.monotonic() < deadline:
        for pid in children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def children() -> list[int]:
    """Processes whose parent this one is, where /proc tells."""
    return [pid for pid, parent in parents().items() if parent == os.getpid()]


def parents() -> dict[int, int]:
    """Of all processes."""
    found = {}
    with suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - pathlib takes its time
            # "pid (name) state parent ..", where the name may hold anything
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def takes_too_much() -> str:
    """What to say of a command that leaves the machine no memory; nothing where it does not, or /proc does not tell."""
    there = _sizes("/proc/meminfo")
    total, left = there.get("MemTotal", 0), there.get("MemAvailable", 0)
    if left >= LEAST_LEFT * total:
        return ""
    family, of = [os.getpid()], parents()
    for one in family:
        family += [pid for pid, parent in of.items() if parent == one]
    taken = sum(_sizes(f"/proc/{pid}/smaps_rollup").get("Pss", 0) for pid in family[1:])
    if taken <= MOST_TAKEN * total:
        return ""
    return f"was ended: it held {taken >> 20} MiB, and {left >> 20} of the machine's {total >> 20} MiB were left"


def _sizes(path: str) -> dict[str, int]:
    """Name -> bytes, of lines `name: number kB`."""
    found = {}
    with suppress(OSError), open(path, "rb") as file:  # noqa: PTH123 - pathlib takes its time
        for line in file:
            name, _, size = line.decode(errors="replace").partition(":")
            with suppress(ValueError, IndexError):
                found[name] = int(size.split()[0]) << 10
    return found


def _end_alike(status: int | None) -> None:
    """End as the command did, so that whoever waits for this process need not know of it."""
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # SIGKILL cannot be handled
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
