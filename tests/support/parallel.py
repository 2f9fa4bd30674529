"""Lanes: further pytest processes that share the test files with the first one.

The first lane takes files from the start of the list, the others from its end. A file belongs to
the lane that claims it first, so all lanes end at about the same time. Much of the tests' time is
waiting, so there are more lanes than cores. The first lane reports the results of all: one
summary, one exit code. `--lanes 1` switches this off, and so do a single core, a single file and
a debugger.
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
        if self.folder:  # ended early, it still stops the processes that its tests have started
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the files that this lane claims; the first lane then reports the results of the others."""
        if self.folder:
            return run_claimed(session, self.folder.parent, reverse=True)
        count = self.lane_count(session)
        if count < 2 or session.testsfailed:
            return None
        with tempfile.TemporaryDirectory(prefix="test-lanes-") as claims, ExitStack() as stack:
            others = [
                OtherLane(self.config, Path(claims, f"lane-{number}"))
                for number in range(2, count + 1)
            ]
            for lane in others:
                stack.callback(lane.end)
            run_claimed(session, Path(claims))
            for lane in others:
                lane.process.wait()
                lane.replay_reports()
        return True

    def lane_count(self, session: pytest.Session) -> int:
        """How many lanes share the files of this run."""
        options = self.config.option
        if options.usepdb or options.collectonly or os.cpu_count() == 1:
            return 1
        return min(options.lanes, len({item.path for item in session.items}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the other lanes: write each report to a file for the first lane."""
        if self.folder:
            line = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with (self.folder / "reports").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")


class OtherLane:
    """A lane that runs beside the first."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir()
        # A folder of its own: two lanes must not clean up the same one at the same time.
        command = [
            sys.executable,
            "-m",
            "pytest",
            *config.invocation_params.args,
            f"--basetemp={folder / 'files'}",
        ]
        environment, where = {**os.environ, LANE: str(folder)}, config.invocation_params.dir
        with (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=where, env=environment, stdout=output, stderr=output
            )

    def end(self) -> None:
        """End the process, which has ended by itself unless the first lane was interrupted."""
        self.process.terminate()
        self.process.wait()

    def replay_reports(self) -> None:
        """Log its reports as the first lane's own; fail with its output if the lane itself broke."""
        reports: list[Any] = []
        file = self.folder / "reports"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for line in lines:
            data = json.loads(line)
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            if report.skipped and isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # JSON knows no tuples
            self.config.hook.pytest_runtest_logreport(report=report)
            reports.append(report)

        code = self.process.returncode
        has_failures = any(report.failed for report in reports)
        if code not in (0, 1, 5) or (code == 1 and not has_failures):
            output = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
            raise pytest.UsageError(f"a lane of tests ended with {code}:\n{output}")


def run_claimed(session: pytest.Session, claims: Path, reverse: bool = False) -> bool:
    """Run the tests of each file that this lane can claim, as pytest's own loop does."""
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
