"""The application in this process: settings in the environment, and calls without a socket.

Only what is outside main.py is replaced: the environment here, HTTP by respx in the tests.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
import pytest

import main

ELEVEN_URL = "https://api.elevenlabs.io"
REPLICATE_URL = "https://api.replicate.com"
SUPABASE_URL = "https://project.supabase.co"
SECRETS = {
    "ELEVEN_API_KEY": "sk_0123456789abcdef0123456789abcdef",
    "REPLICATE_API_TOKEN": "r8_0123456789abcdefghijABCDEFGHIJ",
    "SUPABASE_SERVICE_ROLE": "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZSJ9.c2lnbmF0dXJl",
}
Result = TypeVar("Result")
FAST = {"POLL_MIN_SECONDS": "0.0001", "RETRY_FIRST_SECONDS": "0.0001", "PATIENCE_SECONDS": "0.4"}


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Change settings of this process; an empty string unsets a variable."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    main.get_settings.cache_clear()


def use_settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Set a complete configuration with short waits and these changes."""
    complete = {**SECRETS, "SUPABASE_URL": SUPABASE_URL, **FAST, **variables}
    set_variables(monkeypatch, **complete)


@asynccontextmanager
async def running_application() -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which is started and shut down around it."""
    async with main.lifespan(main.app):
        transport = httpx.ASGITransport(main.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            yield client


async def in_lifespan(work: Awaitable[Result]) -> Result:
    """The result of some work while the application is started: providers are called only then."""
    async with main.lifespan(main.app):
        return await work


async def error_from(work: Awaitable[Any]) -> main.ServiceError:
    """The error that some work ends with."""
    with pytest.raises(main.ServiceError) as caught:
        await asyncio.wait_for(work, 10)
    return caught.value


def error_kind(error: main.ServiceError) -> tuple[int, str, str | None]:
    """Status, category and provider of an error."""
    return error.http_status, error.category, error.provider


def provider_response(
    status: int, body: bytes | str = b"", **headers: str
) -> main.ProviderResponse:
    """A provider's response, as the HTTP code holds it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return main.ProviderResponse(
        status, httpx.Headers(named), body.encode() if isinstance(body, str) else body
    )


def cases(table: list[tuple[Any, ...]]) -> list[Any]:
    """A table of cases for parametrize, each named by its first cell."""
    return [pytest.param(*row, id=name) for name, *row in table]


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The service's log lines, each without the request id at its start."""
    lines = [record.getMessage() for record in caplog.records if record.name == "talking_pet"]
    assert all(line.startswith("request_id=") for line in lines)
    return [line.partition(" ")[2] for line in lines]
