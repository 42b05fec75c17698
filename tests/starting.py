"""Processes that heed signals, whoever started the tests."""

import signal
import subprocess


def started(number, command, **options):
    """A process that the signal of this number ends; `nohup` and the like have it ignored, which is inherited.

    `preexec_fn` would do, but forks a process in which libraries may have threads.
    """
    before = signal.signal(number, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.signal(number, before)
