"""Kills at random moments, in short: `python -m tests.chaos` for some minutes is the longer proof."""

from __future__ import annotations

import re

import pytest

from tests.conftest import Command

KILLS = 10
COMMAND = ("-m", "tests.chaos", "--kills", str(KILLS))
ON_TWO = pytest.mark.beside(*COMMAND, "--services", "2")


@pytest.mark.parametrize(
    "services", [pytest.param(1, marks=pytest.mark.beside(*COMMAND)), pytest.param(2, marks=ON_TWO)]
)
def test_every_job_gets_its_film_and_only_one(beside: Command, services: int) -> None:
    """While they work, processes of the service are killed, ended and cut off; a speech may be lost, a film never."""
    code, told, complaints = beside.outcome()
    assert code == 0, f"{told}\n{complaints}"
    counts = {name.strip(): int(number) for name, number in re.findall(r"^([a-z ]+?)  +(\d+)", told, re.MULTILINE)}
    assert counts["kills"] == KILLS
    assert counts["jobs"] == counts["films bought"] == counts["films delivered"] > 0
    assert counts["jobs"] <= counts["speeches bought"] <= counts["jobs"] + KILLS
    assert counts["jobs"] < counts["requests"]
