"""A crowd waits in line: who goes when a provider refuses calls as too many, and who leaves the line."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import respx

import main
from tests.conftest import StartService
from tests.sandbox import Sandbox, Service
from tests.sandbox.service import ROOT

REQUEST = httpx.Request("POST", "http://provider")
WAIT_S = 20.0
SIMULATION_TIMEOUT_S = 120.0


def provider_response(status: int, body: Any = None, **headers: str) -> main.ProviderResponse:
    """Return a provider's response."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return main.ProviderResponse(status, httpx.Headers(named), json.dumps(body).encode())


# The policy

Outcomes = str  # "+": a call succeeded; a figure: one was refused while so many others were under way

PACES = [  # the outcomes, how many go at once then, how many must succeed for one more
    ("a refusal while others are under way: as many", "9", 9, 72),
    ("each of a wave of refusals takes one away", "543", 3, 24),
    ("a refusal while none is under way: one asks again", "0", 1, 1),
    ("a success after that: one more", "0+", 2, 2),
    ("then one more each round", "0+++", 3, 3),
    ("and the next", "0++++++", 4, 4),
    ("a plan's slots are kept", "2" + 15 * "+", 2, 16),
    ("and one more is tried after eight rounds", "2" + 16 * "+", 3, 8),
    ("the next one after half as many", "2" + 24 * "+", 4, 4),
    ("a try that is refused costs one call", "2" + 16 * "+" + "2", 2, 16),
]


@pytest.mark.parametrize(
    ("outcomes", "at_once", "needed"), [pytest.param(*row[1:], id=row[0]) for row in PACES]
)
def test_how_many_go_at_once(outcomes: Outcomes, at_once: int, needed: int) -> None:
    """Fewer after a refusal, and one more for every so many successes."""
    pace = main.Pace(100, 1)
    for outcome in outcomes:
        if outcome == "+":
            pace = pace.after_success()
        else:
            pace = main.Pace.after_refusal(int(outcome))
    assert (pace.at_once, pace.needed) == (at_once, needed)


BEST_SPEECHES_S = 60.0
CROWDS = [  # what came of it, seconds at most, refusals fewer than
    ("300 speeches at once through ten slots", {"done": 300}, 1.5 * BEST_SPEECHES_S, 300),
    ("50 speeches at once through three slots", {"done": 50}, 1.5 * 34, 60),
    ("1,000 creates at once, 600 a minute", {"done": 1_000}, 95, 200),
    ("1,000 creates in 10 s, 600 a minute", {"done": 1_000}, 95, 200),
    ("8 creates at once, 6 a minute", {"done": 8}, 80, 80),
    ("8 creates at once, one in 10 s", {"done": 8}, 100, 80),
    ("100 creates at once, one in 10 s", {"done": 56, "busy": 44}, 600, 250),
]


@pytest.fixture(scope="module")
def simulated() -> dict[str, dict[str, Any]]:
    """What tests.line_simulation measures on its virtual clock, by crowd."""
    command = [sys.executable, "-m", "tests.line_simulation"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SIMULATION_TIMEOUT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line["crowd"]: line for line in lines}


@pytest.mark.parametrize(
    ("crowd", "outcomes", "most_s", "refusals"),
    [pytest.param(*row, id=row[0]) for row in CROWDS],
)
def test_a_crowd_on_a_virtual_clock(
    simulated: dict[str, dict[str, Any]],
    crowd: str,
    outcomes: dict[str, int],
    most_s: float,
    refusals: int,
) -> None:
    """All are served soon and with few refusals; who would come too late is told so long before."""
    measured = simulated[crowd]
    assert measured["outcomes"] == outcomes
    assert measured["seconds"] <= most_s
    assert measured["refused"] < refusals
    assert measured["median_busy_s"] < 60
    assert measured["is_gone"]
