"""What the sandbox's own tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.sandbox import Sandbox
from tests.sandbox.calls import Call


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A plain HTTP client; it knows no provider."""
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def call(sandbox: Sandbox, client: httpx.Client) -> Call:
    """Send one request to the sandbox."""

    def call(method: str, path: str, **how: Any) -> httpx.Response:
        return client.request(method, sandbox.url + path, **how)

    return call
