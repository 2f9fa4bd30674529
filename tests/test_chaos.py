"""Kills at random moments, in short: `python -m tests.chaos` for some minutes is the longer proof."""

from __future__ import annotations

import re

import pytest

from tests.conftest import Command

KILLS = 6


def check_counts(beside: Command) -> None:
    """Every job was delivered and bought one film, and as many kills were made as asked for; a speech may be lost."""
    code, told, complaints = beside.outcome()
    assert code == 0, f"{told}\n{complaints}"
    counts = {name.strip(): int(number) for name, number in re.findall(r"^([a-z ]+?)  +(\d+)", told, re.MULTILINE)}
    assert counts["kills"] == KILLS
    assert counts["jobs"] == counts["films bought"] == counts["films delivered"] > 0
    assert counts["jobs"] <= counts["speeches bought"] <= counts["jobs"] + KILLS
    assert counts["jobs"] < counts["requests"]


@pytest.mark.beside("-m", "tests.chaos", "--kills", str(KILLS))
def test_every_job_gets_its_film_and_only_one(beside: Command) -> None:
    """One process of the service is killed, ended and cut off while it works."""
    check_counts(beside)


@pytest.mark.beside("-m", "tests.chaos", "--kills", str(KILLS), "--services", "2")
def test_so_it_does_on_two_instances(beside: Command) -> None:
    """Two of them on one bucket are asked in turn."""
    check_counts(beside)
