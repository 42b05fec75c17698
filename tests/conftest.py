"""Settings that all tests share."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

from refspan.conformance.memo import remembering

sys.path.insert(0, str(Path(__file__).parent))  # the tests' own backends

settings.register_profile("default", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("deep", max_examples=2000, deadline=None, database=None, print_blob=True)
settings.load_profile("default")


def pytest_generate_tests(metafunc):
    """Tests of whole conformance runs take a `seed_of_run`: 0, under the profile "deep" 20 of them."""
    if "seed_of_run" in metafunc.fixturenames:
        deep = metafunc.config.getoption("--hypothesis-profile") == "deep"
        metafunc.parametrize("seed_of_run", range(20 if deep else 1))


@pytest.fixture
def examples_of_run(request):
    """Examples per check in these runs: those of `refspan check` under the profile "deep", else fewer."""
    return 100 if request.config.getoption("--hypothesis-profile") == "deep" else 12


@pytest.fixture(scope="module")
def remembered_answers():
    """What is right is found once for all backends that are asked the same."""
    with remembering():
        yield
