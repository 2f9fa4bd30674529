"""Lanes for the tests: further pytest processes take files from the end while this one takes them from the start.

A file belongs to whoever claims it first, so the lanes end together whatever each file takes; much of that is waiting,
so there are more lanes than two cores need for work alone. What the others report is told by the first as if it were
its own: one summary, one exit code. Off with `--lanes 1`, and by itself where there is one core, where only one file
was chosen, and in a debugger.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

LANE = "TALKING_PET_TEST_LANE"  # the folder of a lane that is not the first; the files are claimed beside it


class Lanes:
    """The plugin, in whichever lane."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.folder = Path(os.environ[LANE]) if LANE in os.environ else None
        if self.folder:  # ended early, it takes down what its tests have started
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the files that this lane claims; in the first lane, then tell what the others have found."""
        if self.folder:
            return run_claimed(session, self.folder.parent, reverse=True)
        options, files = self.config.option, {item.path for item in session.items}
        count = 1 if options.usepdb or options.collectonly or os.cpu_count() == 1 else min(options.lanes, len(files))
        if count < 2 or session.testsfailed:
            return None
        with tempfile.TemporaryDirectory(prefix="test-lanes-") as claims, ExitStack() as stack:
            others = [OtherLane(self.config, Path(claims, f"lane-{number}")) for number in range(2, count + 1)]
            for lane in others:
                stack.callback(lane.end)
            run_claimed(session, Path(claims))
            for lane in others:
                lane.process.wait()
                lane.tell()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the other lanes: write each report down."""
        if self.folder:
            told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with (self.folder / "reports").open("a", encoding="utf-8") as file:
                file.write(json.dumps(told, default=str) + "\n")


class OtherLane:
    """A lane that runs beside the first."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir()
        # Not the folder that all runs share: at its end each would clear away what another is just clearing away.
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, f"--basetemp={folder / 'files'}"]
        environment, where = {**os.environ, LANE: str(folder)}, config.invocation_params.dir
        with (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(command, cwd=where, env=environment, stdout=output, stderr=output)

    def end(self) -> None:
        """Nothing to do, unless the first lane was cut short."""
        self.process.terminate()
        self.process.wait()

    def tell(self) -> None:
        """Tell its reports as the first lane's; if it ended otherwise than by its tests, all it said."""
        told, reports, code = self.folder / "reports", list[Any](), self.process.returncode
        for line in told.read_text(encoding="utf-8").splitlines() if told.exists() else ():
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
            self.config.hook.pytest_runtest_logreport(report=report)
            reports.append(report)
        if code not in (0, 1, 5) or (code == 1 and not any(report.failed for report in reports)):
            output = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
            raise pytest.UsageError(f"a lane of tests ended with {code}:\n{output}")


def run_claimed(session: pytest.Session, claims: Path, reverse: bool = False) -> bool:
    """Run the tests of each file that is nobody else's yet, as pytest's own loop does."""
    items = claimed(session.items, claims, reverse)
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def claimed(items: list[pytest.Item], claims: Path, reverse: bool) -> Iterator[pytest.Item]:
    """The tests of the files that this lane claims, one file after the other."""
    files = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
    numbers = range(len(files))
    for number in reversed(numbers) if reverse else numbers:
        with suppress(FileExistsError):
            (claims / str(number)).touch(exist_ok=False)
            yield from files[number]
