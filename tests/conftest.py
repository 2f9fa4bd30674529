"""What all tests share: the sandbox, the running service, a clean environment."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.sandbox import Sandbox, Service
from tests.sandbox.service import ROOT, SETTINGS
from tests.support import parallel
from tests.support.application import running_application, use_settings
from tests.support.ffmpeg import children

PACE = {
    "POLL_MIN_SECONDS": "0.02",
    "RETRY_FIRST_SECONDS": "0.02",
    "KEEPALIVE_SECONDS": "0.2",
    "PATIENCE_SECONDS": "4",
}
StartService = Callable[..., Service]
TEST_TIMEOUT_S = 900  # a test that takes longer hangs
REAL_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--live`: also run the tests that call the real providers."""
    parser.addoption(
        "--live",
        action="store_true",
        help="also run the tests marked live: real providers, real money",
    )
    parser.addoption(
        "--lanes", type=int, default=4, help="processes that share the test files (default: 4)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors; the marks in use are declared; the files are shared by several processes."""
    config.pluginmanager.register(parallel.Lanes(config))
    config.addinivalue_line("filterwarnings", "error")
    config.stash[REAL_STDERR] = os.dup(2)  # which is captured later
    config.addinivalue_line(
        "markers", "live: calls the real providers with the keys in the environment (--live)"
    )
    config.addinivalue_line(
        "markers", "beside(*arguments): judges a Python command that runs while other tests do"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the run, with the stack of every thread, when a test hangs."""
    faulthandler.dump_traceback_later(
        TEST_TIMEOUT_S, exit=True, file=item.config.stash[REAL_STDERR]
    )
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


# The slow test files, the slowest last: the other lanes begin there.
SLOW = (
    "sandbox",
    "test_end_to_end",
    "test_ffmpeg",
    "test_soak",
    "test_disconnect_and_shutdown",
    "test_bench",
    "test_chaos",
    "test_faults",
    "test_idempotency",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick files first, so that a fault shows at once."""
    items.sort(
        key=lambda item: next(
            (rank for rank, name in enumerate(SLOW, 1) if name in str(item.path)), 0
        )
    )
    if config.getoption("--live"):
        return
    for item in items:
        if item.get_closest_marker("live"):
            item.add_marker(pytest.mark.skip(reason="needs --live"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environ(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Keep the developer's settings out of all tests but live ones; each test reads the settings anew."""
    if not request.node.get_closest_marker("live"):
        for name in SETTINGS:
            monkeypatch.setenv(name, "")
    forget_settings()
    yield
    forget_settings()


def forget_settings() -> None:
    """Make `main`, if it is loaded, read its settings anew."""
    if "main" in sys.modules:
        sys.modules["main"].get_settings.cache_clear()


@pytest.fixture(scope="session")
def running_sandbox() -> Iterator[Sandbox]:
    """One sandbox for all tests."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running_sandbox: Sandbox) -> Sandbox:
    """The sandbox as new."""
    running_sandbox.reset()
    return running_sandbox


@pytest.fixture
def sandbox_environ(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The sandbox, with the settings of this very process pointing at it."""
    for name, value in {**sandbox.environment(), **PACE}.items():
        monkeypatch.setenv(name, value)
    forget_settings()
    return sandbox


@pytest.fixture(scope="session")
def running_service(running_sandbox: Sandbox) -> Iterator[Service]:
    """One real process of the service for all tests, pointed at the sandbox."""
    with Service({**running_sandbox.environment(), **PACE}) as service:
        yield service


@pytest.fixture
def service(sandbox: Sandbox, running_service: Service) -> Service:
    """The running service, its sandbox as new."""
    return running_service


@pytest.fixture
def start_service(sandbox: Sandbox) -> Iterator[StartService]:
    """Start a further service with other settings, pointed at the sandbox; it ends with the test."""
    with ExitStack() as services:

        def start(graceful_s: int = 10, **environment: str) -> Service:
            wanted = {**sandbox.environment(), **PACE, **environment}
            return services.enter_context(Service(wanted, graceful_s=graceful_s))

        yield start


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process all keys are set, and waits are short."""
    use_settings(monkeypatch)


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which runs in this process for the tests of one module."""
    async with running_application() as client:
        yield client


@pytest.fixture
def _no_child_left() -> Iterator[None]:
    """Fail a test that leaves an ffmpeg behind, running or not reaped."""
    yield
    assert children() == set()  # where there is no /proc: always


# Commands that mostly wait for seconds run while other tests of their file do


class BackgroundCommand(NamedTuple):
    """A Python command in a folder of its own."""

    process: subprocess.Popen[str]
    folder: Path

    def outcome(self) -> tuple[int, str, str]:
        """Its exit code, its output and its errors; it has ten minutes from now."""
        output, errors = self.process.communicate(timeout=600)
        return self.process.returncode, output, errors


@pytest.fixture(scope="module", autouse=True)
def background_commands(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, BackgroundCommand]]:
    """The commands of the module's tests marked `beside`, by the test's id, started before its first test."""
    started: dict[str, BackgroundCommand] = {}
    environment, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
    # Ctrl-C must end them even if the tests run as a shell's background job, which ignores it.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    for item in request.session.items:
        if item.path == request.path and (mark := item.get_closest_marker("beside")):
            line, folder = [sys.executable, *mark.args], tmp_path_factory.mktemp("beside")
            process = subprocess.Popen(
                line, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
            )
            started[item.nodeid] = BackgroundCommand(process, folder)
    signal.signal(signal.SIGINT, kept)
    yield started
    for command in started.values():
        if command.process.returncode is None:  # the run was cut short
            command.process.send_signal(signal.SIGINT)
            command.outcome()


@pytest.fixture
def beside(
    request: pytest.FixtureRequest, background_commands: dict[str, BackgroundCommand]
) -> BackgroundCommand:
    """The command that the test is marked with."""
    return background_commands[request.node.nodeid]
