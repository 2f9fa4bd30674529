"""What the checks from outside need: the sandbox, the unchanged service beside it, and Debian's chromium."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

# Needed where pytest is not started as a module
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import running_sandbox, running_service, sandbox, service, start_service  # noqa: F401
from tests.sandbox import Sandbox, Service

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_FLAGS = [
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",  # this and the next two: it asks nobody outside
    "--disable-component-update",
    "--disable-sync",
]

OpenPage = Callable[..., Page]


def launch(playwright: Playwright) -> Browser:
    """Headless chromium, as Debian has it."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, sandbox: Sandbox, service: Service) -> Iterator[OpenPage]:  # noqa: F811
    """Opens the try-it page in a fresh profile, with `new_context`'s options; `script` runs before the page's own.

    Any exception that escapes the page's script fails the test, and so does any word of CORS in the browser's console.
    """
    escaped: list[str] = []
    blocked: list[str] = []
    sandbox.service_url = service.url
    with ExitStack() as stack:

        def open_page(script: str = "", **options: Any) -> Page:
            context = stack.enter_context(
                browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            )
            context.add_init_script(script)
            page = context.new_page()
            page.on("pageerror", lambda error: escaped.append(str(error)))
            page.on(
                "console",
                lambda message: blocked.extend([message.text] if "CORS" in message.text else []),
            )
            page.goto(sandbox.url)
            return page

        yield open_page
    assert (escaped, blocked) == ([], [])


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """The try-it page on a desktop's screen."""
    return open_page()
