"""Timings side by side: before each round of the contender runs one round of what it is compared with.

Timings of a busy machine drift, ratios within one run much less. A round is one call; a ratio is one of medians.
"""

from statistics import median
from time import perf_counter

import pytest

ROWS = []


@pytest.fixture
def side_by_side(benchmark, request):
    """Call with contender, baseline and the ratio that is the target."""

    def compare(contender, baseline, target, *, rounds=15):
        baseline_seconds = []

        def one_baseline():
            start = perf_counter()
            baseline()
            baseline_seconds.append(perf_counter() - start)

        benchmark.pedantic(contender, setup=one_baseline, rounds=rounds, warmup_rounds=2)
        ratio = median(benchmark.stats.stats.data) / median(baseline_seconds[2:])
        benchmark.extra_info.update(baseline_ms=median(baseline_seconds[2:]) * 1e3, ratio=ratio, target=target)
        ROWS.append((request.node.name, median(benchmark.stats.stats.data) * 1e3, f"{ratio:.2f}", f"<= {target}"))
        return ratio

    return compare


@pytest.fixture
def record_memory(request):
    """Call with peak memory in MiB and the target."""
    return lambda peak, target: ROWS.append((request.node.name, float("nan"), f"{peak:.0f} MiB", f"<= {target} MiB"))


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("ratios, side by side")
    for name, milliseconds, ratio, target in ROWS:
        time = "" if milliseconds != milliseconds else f"{milliseconds:9.1f} ms"
        terminalreporter.write_line(f"{name:<48} {time:>12}  {ratio:>8}  target {target}")
