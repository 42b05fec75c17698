"""One part: its sections one after the other, in a process that is replaced when it dies, hangs or loses the device."""

import multiprocessing
import os
import signal
import time
import traceback
from dataclasses import replace

from . import choices, conformance, environment, memory, speed, streaming
from .device import failure, line, usable

PARTS = {
    "environment": (environment, 2),
    "conformance": (conformance, 7),
    "streaming": (streaming, 8),
    "speed": (speed, 8),
    "choices": (choices, 4),
    "memory": (memory, 3),
}
"""Name -> module, and its share of the time."""
RUNNING = {"status": "running"}


class LostError(Exception):
    """The process ended, or says nothing any more, or cannot use the device any more."""


def run_part(part, settings, state, tell):
    """Run the sections of a part. However one ends, that is recorded in `state` and the next one is run.

    Args:
        part: name of the part.
        settings: for all its sections.
        state: the record of the part; it grows.
        tell: called with the name of a section each time that its record has changed.
    """
    names, results, avoid = list(PARTS[part][0].sections(settings)), state["results"], {}
    started, process = time.time(), Process(part)
    try:
        for name in names:
            try:
                for record in attempts(name, process, settings, results, avoid):
                    results[name] = record
                    state["seconds"] = time.time() - started
                    tell(name)
            except Exception as error:  # noqa: BLE001 - a process that cannot be started, say
                results[name] = failure(error)
                process.end()
                tell(name)
            if results[name] == RUNNING:  # nothing to say
                del results[name]
        process.end(grace=5)
    finally:
        process.end()
    state.update(end_of(results, avoid))


def attempts(name, process, settings, results, avoid):
    """Records of a section. If it costs its process: anew without the contender that did, else the record says so.

    Args:
        name: of the section.
        process: where it runs.
        settings: for it.
        results: records of the sections so far.
        avoid: contenders to do without -> why; it grows.
    """
    record, rows = dict(RUNNING), {}
    while True:
        try:
            settings.check_time()
        except TimeoutError as error:
            yield record | failure(error)
            return
        yield record
        try:
            for found in process.ask(name, replace(settings, avoid=dict(avoid)), results):
                record = with_rows(found, rows)
                yield record
            return
        except LostError as error:
            reason = str(error)
        process.end()
        end = {"status": "failed" if settings.left() > 0 else "out of time", "reason": reason}
        found = record.get("contenders", {}) if isinstance(record, dict) else {}
        guilty = [who for who, row in found.items() if row == RUNNING]
        rows = found | dict.fromkeys(guilty, end)
        record = with_rows(record, rows)
        if end["status"] == "out of time" or not set(guilty) - set(avoid):
            yield (record if isinstance(record, dict) else {}) | end
            return
        avoid |= dict.fromkeys(guilty, f"{name}: {reason}")


def with_rows(record, rows):
    """A record with what an earlier attempt found out about contenders that this one has not come to."""
    return record | {"contenders": rows | record.get("contenders", {})} if rows else record


def end_of(results, avoid):
    """Status of a part, and why if it is not done."""
    ends = {name: record.get("status", "done") for name, record in results.items() if isinstance(record, dict)}
    for status in ("failed", "out of time"):
        if found := [name for name, end in ends.items() if end == status]:
            return {"status": status, "reason": f"{len(found)} of {len(results)} sections: {'; '.join(found)}"}
    if avoid:
        return {"status": "failed", "reason": "; ".join(f"{who} in {how}" for who, how in avoid.items())}
    if set(ends.values()) == {"missing"}:
        return {"status": "missing", "reason": next(iter(results.values()))["reason"]}
    return {"status": "done"}


class Process:
    """The process of a part, started when it is asked."""

    def __init__(self, part):
        self.part, self.process, self.pipe = part, None, None

    def ask(self, name, settings, results):
        """Records of a section as they come; raises LostError."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, self.part))
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((name, settings, results))
            while True:
                patience = max(0, min(settings.left() + 10, max(60, settings.left() / 2)))
                if not self.pipe.poll(patience):
                    raise LostError(f"ended after {patience:.0f} s without a word")
                kind, what = self.pipe.recv()
                if kind == "end":
                    return
                if kind == "lost":
                    raise LostError(what)
                yield what
        except (EOFError, OSError):
            self.process.join(5)
            raise LostError(f"its process ended with exit code {self.process.exitcode}") from None

    def end(self, *, grace=0):
        """End it together with all that it started; for some seconds it may do so itself."""
        if self.process is None:
            return
        self.pipe.close()
        self.process.join(grace)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.join()
        self.process = self.pipe = None


def serve(pipe, part):
    """In the process: run the sections that are asked for, until one leaves the device unusable."""
    os.setsid()  # so that it can be ended together with all that it started
    while True:
        try:
            name, settings, results = pipe.recv()
        except EOFError:
            return
        record = RUNNING
        try:
            for record in PARTS[part][0].sections(settings)[name](settings, results):
                pipe.send(("record", record))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this section's
            if not usable(settings.device):
                pipe.send(("lost", f"the device cannot be used any more: {line(error)}"))
                return
            found = failure(error)
            if found["status"] == "failed":
                found["traceback"] = traceback.format_exc().splitlines()[-12:]
            pipe.send(("record", (record if isinstance(record, dict) else {}) | found))
        pipe.send(("end", None))
