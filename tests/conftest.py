"""Settings that all tests share."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # the tests' own backends

settings.register_profile("default", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("deep", max_examples=2000, deadline=None, database=None, print_blob=True)
settings.load_profile("default")


def pytest_generate_tests(metafunc):
    """Tests of whole conformance runs take a `seed`: a few by default, 20 under the profile "deep"."""
    if "seed_of_run" in metafunc.fixturenames:
        deep = metafunc.config.getoption("--hypothesis-profile") == "deep"
        metafunc.parametrize("seed_of_run", range(20 if deep else 2))


@pytest.fixture
def checks_of_run(request, seed_of_run):
    """Checks of these runs: all with the first seed and under the profile "deep", else those of small cases."""
    from refspan.conformance.runner import select

    every = seed_of_run == 0 or request.config.getoption("--hypothesis-profile") == "deep"
    return [check.id for check in select() if every or not check.id.endswith((".large", ".long", ".tiles"))]


@pytest.fixture
def examples_of_run(request):
    """Examples per check in these runs: those of `refspan check` under the profile "deep", else fewer."""
    return 100 if request.config.getoption("--hypothesis-profile") == "deep" else 12
