"""The fixtures of the sandbox's own tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.sandbox import Sandbox
from tests.sandbox.calls import Call


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A plain HTTP client that knows no provider."""
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def call(sandbox: Sandbox, client: httpx.Client) -> Call:
    """A function that sends one request to the sandbox."""

    def send(method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request to this path of the sandbox."""
        return client.request(method, sandbox.url + path, **options)

    return send
