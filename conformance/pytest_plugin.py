"""The checks as tests in somebody else's continuous integration.

    pytest --pyargs refspan.conformance --refspan-backend=mypackage.kernels:Backend

One test per check, `test_backend.py::test_check[attention.output]`; pytest's own options (-k, -x, -n, --junitxml)
apply. pytest loads this module wherever refspan is installed, so it imports nothing until it is asked for a backend.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from refspan.conformance.registry import Check
    from refspan.conformance.sessions import Session

OPTIONS = {
    "backend": "Backend to check, as `refspan check --backend` takes it.",
    "device": "Device, for a backend that has a choice.",
    "form": "Form of the ONNX graph, for the onnxruntime backend.",
    "dtype": "Dtype of query, key and value: float16, float32, float64. Default: float32.",
    "level": "Only this level; may be repeated, or name several with commas between them.",
    "examples": "Cases per check. Default: 100.",
    "seed": "Seed of everything random. Default: 0.",
    "timeout": "Seconds that one answer may take. Default: 10.",
    "expected-failures": "File of `check: reason, link` entries, see docs/conformance.md.",
}

WRONG = pytest.StashKey[str]()
"""What is wrong with the options, if anything."""
HERE = Path(__file__).parent
PACKAGE = "refspan.conformance"
TEST = "test_backend.py::test_check["
"""Part of the ids of our tests, wherever pytest stands."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our options."""
    group = parser.getgroup("refspan", "conformance of a backend")
    for name, text in OPTIONS.items():
        action = "append" if name == "level" else "store"
        group.addoption(f"--refspan-{name}", metavar=name.upper(), default=None, help=text, action=action)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse wrong options before any test, and before xdist starts processes, which cannot say so in one line."""
    if hasattr(config, "workerinput"):  # one of these processes
        return
    try:
        _numbers(config)
        if _named(config):
            from refspan.errors import SetupError

            try:
                _checks(config)
                _settings(config)
                if config.getoption("dist", "no") != "no" and not config.option.collectonly:
                    _open(config).close()
            except SetupError as error:
                raise ValueError(str(error)) from None
    except ValueError as error:
        raise pytest.UsageError(f"refspan: {error}") from None
    if _option(config, "backend") is not None:
        config.pluginmanager.register(Offered())


class Offered:
    """Sees to it that a run in which nothing could be asked does not pass, as `refspan check` does."""

    def __init__(self) -> None:
        self._asked = self._not_offered = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count our tests, also those that other processes ran."""
        if report.when == "call" and TEST in report.nodeid:
            not_offered = report.skipped and not hasattr(report, "wasxfail")
            self._not_offered += not_offered
            self._asked += not not_offered

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Set the exit status."""
        if self._nothing() and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say why."""
        if self._nothing():
            said = "ERROR: refspan: nothing was checked: the backend offers nothing that was asked for"
            terminalreporter.write_line(said, red=True)

    def _nothing(self) -> bool:
        return self._not_offered > 0 and self._asked == 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each check, for tests that take a `refspan_check`."""
    if "refspan_check" not in metafunc.fixturenames:
        return
    from refspan.errors import SetupError

    checks: list[Check] = []
    try:
        checks = _checks(metafunc.config)
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
    from refspan.errors import SetupError

    try:
        session = _open(request.config)
    except SetupError as error:
        _refuse(error)
    yield session
    session.close()


@pytest.fixture(scope="session")
def refspan_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How checks are run: dtype, seed, examples, the command that replays one, expected failures."""
    import shlex

    from refspan.errors import SetupError

    config = request.config
    words = ["refspan", "check", "--backend", _option(config, "backend")]
    for name in ("device", "form", "dtype", "seed", "examples", "timeout"):
        words += [f"--{name}", _option(config, name)] if _option(config, name) else []
    try:
        return {**_settings(config), "replay": lambda id_: shlex.join([*words, "--check", id_])}
    except SetupError as error:
        _refuse(error)


def _option(config: pytest.Config, name: str) -> Any:
    return config.getoption(f"--refspan-{name}")


def _refuse(why: object) -> NoReturn:
    pytest.exit(f"refspan: {why}", returncode=pytest.ExitCode.USAGE_ERROR)


def _named(config: pytest.Config) -> bool:
    """Whether the command line names our tests, and not only options for them."""
    for argument in config.args:
        place = argument.partition("::")[0]
        path = (config.invocation_params.dir / place).resolve()
        if HERE.resolve() in (path, *path.parents):
            return True
        if config.option.pyargs and (place == PACKAGE or place.startswith(f"{PACKAGE}.")):
            return True
    return False


def _numbers(config: pytest.Config) -> dict[str, Any]:
    """Options that are numbers; raises ValueError."""
    from refspan.conformance.protocol import EXAMPLES, TIMEOUT

    numbers: dict[str, Any] = {"examples": EXAMPLES, "seed": 0, "timeout": TIMEOUT}
    ranges: dict[str, tuple[Any, str, Any]] = {
        "examples": (int, "a whole number, at least 1", lambda number: number >= 1),
        "seed": (int, "a whole number", lambda number: True),  # noqa: ARG005
        "timeout": (float, "a number of seconds, more than 0, at most 86400", lambda number: 0 < number <= 86400),
    }
    for name, (kind, expected, fits) in ranges.items():
        if (given := _option(config, name)) is not None:
            try:
                numbers[name] = kind(given)
            except ValueError:
                numbers[name] = None
            if numbers[name] is None or not fits(numbers[name]):
                raise ValueError(f"--refspan-{name}: got {given!r}, expected {expected}")
    return numbers


def _checks(config: pytest.Config) -> "list[Check]":
    """What is to be run; raises SetupError."""
    from refspan.conformance.runner import select
    from refspan.errors import SetupError

    levels = _option(config, "level")
    if _option(config, "backend") is None:
        raise SetupError("name a backend, for example --refspan-backend=numpy")
    return select([level for some in levels or () for level in some.split(",")])


def _settings(config: pytest.Config) -> dict[str, Any]:
    """How checks are run; raises SetupError."""
    from refspan.conformance.expected import read_expected
    from refspan.conformance.runner import DTYPES
    from refspan.errors import SetupError

    dtype, path, numbers = _dtype(config), _option(config, "expected-failures"), _numbers(config)
    if dtype not in DTYPES:
        raise SetupError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    expected = read_expected(Path(path)) if path else {}
    return {"dtype": dtype, "seed": numbers["seed"], "examples": numbers["examples"], "expected": expected}


def _dtype(config: pytest.Config) -> str:
    return _option(config, "dtype") or "float32"


def _open(config: pytest.Config) -> "Session":
    """The backend, in a process of its own; raises SetupError."""
    from refspan.conformance.loading import session_of
    from refspan.conformance.report import escaped
    from refspan.errors import SetupError

    options = {name: _option(config, name) for name in ("device", "form")}
    session = session_of(_option(config, "backend"), timeout=_numbers(config)["timeout"], **options)
    if session.dtypes and _dtype(config) not in session.dtypes:
        session.close()
        taken = escaped(", ".join(session.dtypes))
        raise SetupError(f"the backend does not take dtype {_dtype(config)}; it takes {taken}")
    return session
