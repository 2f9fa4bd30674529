"""What all tests share: the sandbox, the running service, a clean environment."""

from __future__ import annotations

import platform
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import httpx
import imageio_ffmpeg
import pytest

from tests.inprocess import running_application, use_settings
from tests.sandbox import Sandbox, Service
from tests.sandbox.service import SETTINGS

PACE = {"POLL_MIN_SECONDS": "0.02", "RETRY_FIRST_SECONDS": "0.02", "KEEPALIVE_SECONDS": "0.2"}
StartService = Callable[..., Service]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--live`: also run the tests that call the real providers."""
    parser.addoption("--live", action="store_true", help="also run the tests marked live: real providers, real money")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors; the marks in use are declared."""
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("markers", "live: calls the real providers with the keys in the environment (--live)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the live tests unless they are asked for."""
    if config.getoption("--live"):
        return
    for item in items:
        if item.get_closest_marker("live"):
            item.add_marker(pytest.mark.skip(reason="needs --live"))


def pytest_report_header() -> str:
    """The versions that matter here."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_version()
    return f"talking pet: Python {platform.python_version()}, httpx {httpx.__version__}, ffmpeg {ffmpeg}"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environ(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the developer's reaches a test, except a live one; settings are read again in each test."""
    if not request.node.get_closest_marker("live"):
        for name in SETTINGS:
            monkeypatch.setenv(name, "")
    forget_settings()
    yield
    forget_settings()


def forget_settings() -> None:
    """Let `main`, if it is loaded, read its settings again."""
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
    """The application running in this process; nothing that a test does stays in it."""
    async with running_application() as client:
        yield client
