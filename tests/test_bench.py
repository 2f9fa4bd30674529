"""The benchmark runs and prints what it measured; its figures are judged on a quiet machine only."""

from __future__ import annotations

import json
import statistics

import pytest

from tests.bench import MEASUREMENTS, Row, percentile, video_times_s
from tests.conftest import BackgroundCommand


def test_videos_of_one_model_differ_the_same_way_in_every_run() -> None:
    """Most take about the median time, one in ten half as long again."""
    times_s = video_times_s(30, 30)
    assert times_s == video_times_s(30, 30)
    assert statistics.median(times_s) == pytest.approx(30, rel=0.1)
    assert sum(seconds > 40 for seconds in times_s) == 3


@pytest.mark.parametrize(
    ("measured", "shown", "is_met"),
    [
        pytest.param(1.04, "1.04", True, id="at the limit"),
        pytest.param(1.0449, "1.04", True, id="at the limit once it is rounded"),
        pytest.param(1.046, "1.05", False, id="over the limit"),
        pytest.param(17.6, "18", False, id="no decimals from ten on"),
        pytest.param(0.0, "0", True, id="none"),
    ],
)
def test_a_row_shows_its_figure_beside_the_limit(measured: float, shown: str, is_met: bool) -> None:
    """The figure that is printed is the one that is compared with the limit."""
    row = Row("alone", "One job", measured, 1.04, note="why")
    assert row.is_met is is_met
    cells = [cell.strip() for cell in row.line().strip("| ").split("|")]
    assert cells == ["One job", shown, "1.04", "why" if is_met else "**over**; why"]


def test_a_percentile_is_one_of_the_numbers() -> None:
    """It is the nearest rank, counted from the smallest and rounded up."""
    asked = {(1, 99): 1, (100, 99): 99, (101, 99): 100, (4, 50): 2}
    assert {(n, percent): percentile([*range(n, 0, -1)], percent) for n, percent in asked} == asked


@pytest.mark.beside("-m", "tests.bench", "--smoke", "--json")
def test_a_smoke_run_measures_every_row(beside: BackgroundCommand) -> None:
    """`--smoke --json` exits with 0: every group has its rows, and every job was answered."""
    code, output, errors = beside.outcome()
    assert code == 0, errors
    report = json.loads(output)
    rows = report["rows"]
    assert list(dict.fromkeys(row["group"] for row in rows)) == list(MEASUREMENTS)
    assert [row["measured"] for row in rows if row["what"].endswith("not answered")] == [0] * 8
    assert all(row["measured"] > 0 for row in rows if row["group"] in ("start", "alone", "cpu"))
    assert all(
        row["measured"] > 0
        for row in rows
        if row["what"].endswith(("polls of each", "known after its end"))
    )
    assert "cores" in report["measured_on"]
