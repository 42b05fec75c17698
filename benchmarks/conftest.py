"""Timings side by side: contender and baseline take turns of a few calls each.

Timings of a busy machine drift, ratios within one run much less. A round is one call; a ratio is one of medians. Each
turn begins with a pause and one call that is not counted: the threads of a BLAS or a runtime wait for more work with
their cores busy, and the other side should neither pay for that nor for a cold cache.
"""

from statistics import median
from time import perf_counter, sleep

import pytest

TURN, PAUSE_SECONDS = 5, 0.1

ROWS = []


@pytest.fixture
def side_by_side(benchmark, request):
    """Call with contender, baseline and the ratio that is the target; `note` is called last, for a remark."""

    def compare(contender, baseline, target, *, turns=6, note=str):
        baseline_seconds, calls = [], iter(range(turns * TURN))

        def before_each_call():
            if next(calls) % TURN:
                return
            sleep(PAUSE_SECONDS)
            baseline()
            for _ in range(TURN):
                start = perf_counter()
                baseline()
                baseline_seconds.append(perf_counter() - start)
            sleep(PAUSE_SECONDS)
            contender()

        benchmark.pedantic(contender, setup=before_each_call, rounds=turns * TURN)
        ratio = median(benchmark.stats.stats.data) / median(baseline_seconds)
        benchmark.extra_info.update(baseline_ms=median(baseline_seconds) * 1e3, ratio=ratio, target=target)
        milliseconds = median(benchmark.stats.stats.data) * 1e3
        ROWS.append((request.node.name, milliseconds, f"{ratio:.2f}", f"<= {target}  {note()}".rstrip()))
        return ratio

    return compare


@pytest.fixture
def record(request):
    """Call with milliseconds (NaN for none), a ratio as text, and the target."""
    return lambda milliseconds, ratio, target: ROWS.append((request.node.name, milliseconds, ratio, target))


@pytest.fixture
def record_memory(request):
    """Call with peak memory in MiB and the target."""
    return lambda peak, target: ROWS.append(
        (request.node.name, float("nan"), f"{peak:.0f} MiB", f"<= {target:.0f} MiB")
    )


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("ratios, side by side")
    for name, milliseconds, ratio, target in ROWS:
        time = "" if milliseconds != milliseconds else f"{milliseconds:9.1f} ms"
        terminalreporter.write_line(f"{name:<48} {time:>12}  {ratio:>8}  target {target}")
