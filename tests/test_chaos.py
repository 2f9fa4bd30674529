"""Kills at random moments, in short: `python -m tests.chaos` for some minutes is the longer proof."""

from __future__ import annotations

import re

import pytest

from tests.conftest import BackgroundCommand

COMMAND = ("-m", "tests.chaos", "--kills")
ON_ONE = pytest.mark.beside(*COMMAND, "10")
ON_TWO = pytest.mark.beside(*COMMAND, "4", "--services", "2")


@pytest.mark.parametrize("kills", [pytest.param(10, marks=ON_ONE), pytest.param(4, marks=ON_TWO, id="on two")])
def test_every_job_gets_its_video_and_only_one(beside: BackgroundCommand, kills: int) -> None:
    """While they work, processes of the service are killed, ended and cut off; a speech may be lost, a video never."""
    code, output, errors = beside.outcome()
    assert code == 0, f"{output}\n{errors}"
    counts = {name.strip(): int(number) for name, number in re.findall(r"^([a-z ]+?)  +(\d+)", output, re.MULTILINE)}
    assert counts["kills"] == kills
    assert counts["jobs"] == counts["videos bought"] == counts["videos delivered"] > 0
    assert counts["jobs"] <= counts["speeches bought"] <= counts["jobs"] + kills
    assert counts["jobs"] < counts["requests"]
