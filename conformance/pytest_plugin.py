"""The checks as tests in somebody else's continuous integration.

    pytest --pyargs refspan.conformance --refspan-backend=mypackage.kernels:Backend

One test per check, `test_backend.py::test_check[attention.output]`; pytest's own options (-k, -x, -n, --junitxml)
apply. pytest loads this module wherever refspan is installed, so it imports nothing until it is asked for a backend.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from refspan.conformance.sessions import Session

OPTIONS = {
    "backend": "Backend to check, as `refspan check --backend` takes it.",
    "device": "Device, for a backend that has a choice.",
    "form": "Form of the ONNX graph, for the onnxruntime backend.",
    "dtype": "Dtype of query, key and value: float16, float32, float64. Default: float32.",
    "level": "Only this level; several with commas between them.",
    "examples": "Cases per check. Default: 100.",
    "seed": "Seed of everything random. Default: 0.",
    "timeout": "Seconds that one answer may take. Default: 10.",
    "expected-failures": "File of `check: reason, link` entries, see docs/conformance.md.",
}

WRONG = pytest.StashKey[str]()
"""What is wrong with the options, if anything."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our options."""
    group = parser.getgroup("refspan", "conformance of a backend")
    for name, text in OPTIONS.items():
        group.addoption(f"--refspan-{name}", metavar=name.upper(), default=None, help=text)


def _refuse(why: object) -> NoReturn:
    pytest.exit(f"refspan: {why}", returncode=pytest.ExitCode.USAGE_ERROR)


def _option(config: pytest.Config, name: str) -> Any:
    return config.getoption(f"--refspan-{name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each check, for tests that take a `refspan_check`."""
    if "refspan_check" not in metafunc.fixturenames:
        return
    from refspan.conformance.runner import select
    from refspan.errors import SetupError

    levels, checks = _option(metafunc.config, "level"), []
    try:
        if _option(metafunc.config, "backend") is None:
            raise SetupError("name a backend, for example --refspan-backend=numpy")
        checks = select(levels.split(",") if levels else ())
    except SetupError as error:  # raised here, it would be shown as an error of this file, with a traceback
        metafunc.config.stash[WRONG] = str(error)
    metafunc.parametrize("refspan_check", checks, ids=[check.id for check in checks])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say what is wrong with the options."""
    if WRONG in session.config.stash:
        raise pytest.UsageError(f"refspan: {session.config.stash[WRONG]}")


@pytest.fixture(scope="session")
def refspan_session(request: pytest.FixtureRequest) -> "Iterator[Session]":
    """The backend, in a process of its own."""
    from refspan.conformance.loading import session_of
    from refspan.conformance.protocol import TIMEOUT
    from refspan.errors import SetupError

    config = request.config
    try:
        timeout = float(_option(config, "timeout") or TIMEOUT)
        options = {name: _option(config, name) for name in ("device", "form")}
        session = session_of(_option(config, "backend"), timeout=timeout, **options)
    except (SetupError, ValueError) as error:
        _refuse(error)
    dtype = _option(config, "dtype") or "float32"
    if session.dtypes and dtype not in session.dtypes:
        session.close()
        _refuse(f"the backend does not take dtype {dtype}; it takes {', '.join(session.dtypes)}")
    yield session
    session.close()


@pytest.fixture(scope="session")
def refspan_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How checks are run: dtype, seed, examples, the command that replays one, expected failures."""
    import shlex
    from pathlib import Path

    from refspan.conformance.expected import read_expected
    from refspan.conformance.protocol import EXAMPLES
    from refspan.conformance.runner import DTYPES
    from refspan.errors import SetupError

    config = request.config
    dtype, path = _option(config, "dtype") or "float32", _option(config, "expected-failures")
    words = ["refspan", "check", "--backend", _option(config, "backend")]
    for name in ("device", "form", "dtype", "seed", "examples", "timeout"):
        words += [f"--{name}", _option(config, name)] if _option(config, name) else []
    try:
        if dtype not in DTYPES:
            raise SetupError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
        return {
            "dtype": dtype,
            "seed": int(_option(config, "seed") or 0),
            "examples": int(_option(config, "examples") or EXAMPLES),
            "replay": lambda id_: shlex.join([*words, "--check", id_]),
            "expected": read_expected(Path(path)) if path else {},
        }
    except (SetupError, ValueError) as error:
        _refuse(error)
