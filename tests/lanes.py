"""Two lanes for the tests: a second pytest process takes files from the end while this one takes them from the start.

A file belongs to whoever claims it first, so the lanes end together whatever each file takes. The second lane's reports
are told by the first as if they were its own: one summary, one exit code. Off with `--lanes 1`, and by itself where
there is one core, where only one file was chosen, and in a debugger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

CLAIMS = "TALKING_PET_TEST_CLAIMS"  # the folder in which files are claimed; set: this is the second lane


class Lanes:
    """The plugin, in either lane."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.claims = Path(os.environ[CLAIMS]) if CLAIMS in os.environ else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the files that this lane claims; in the first lane, then tell what the second has found."""
        if self.claims:
            return run_claimed(session, self.claims, reverse=True)
        options, files = self.config.option, {item.path for item in session.items}
        is_alone = len(files) < 2 or (os.cpu_count() or 1) < 2 or options.usepdb or options.collectonly
        if options.lanes < 2 or is_alone or session.testsfailed:
            return None
        with tempfile.TemporaryDirectory(prefix="test-lanes-") as folder:
            self.run_both(session, Path(folder))
        return True

    def run_both(self, session: pytest.Session, folder: Path) -> None:
        """Run the second lane beside this one."""
        command = [sys.executable, "-m", "pytest", *self.config.invocation_params.args]
        with (folder / "output").open("wb") as output:
            environment, where = {**os.environ, CLAIMS: str(folder)}, self.config.invocation_params.dir
            lane = subprocess.Popen(command, cwd=where, env=environment, stdout=output, stderr=output)
            try:
                run_claimed(session, folder)
                lane.wait()
            finally:
                lane.terminate()  # nothing to do, unless this lane was cut short
                code = lane.wait()
        tell_second_lane(self.config, folder, code)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the second lane: write each report down."""
        if self.claims:
            told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with (self.claims / "reports").open("a", encoding="utf-8") as file:
                file.write(json.dumps(told, default=str) + "\n")


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
    """The tests of the files that this lane claims, one file after the other; what runs beside is the first lane's."""
    groups = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
    for number, group in sorted(enumerate(groups), key=lambda pair: pair[0], reverse=reverse):
        if reverse and any(item.get_closest_marker("beside") for item in group):
            continue
        with suppress(FileExistsError):
            (claims / str(number)).touch(exist_ok=False)
            yield from group


def tell_second_lane(config: pytest.Config, folder: Path, code: int) -> None:
    """Tell the second lane's reports as this one's; if it ended otherwise than by its tests, all it said."""
    told, reports = folder / "reports", list[Any]()
    for line in told.read_text(encoding="utf-8").splitlines() if told.exists() else ():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        config.hook.pytest_runtest_logreport(report=report)
        reports.append(report)
    if code not in (0, 1, 5) or (code == 1 and not any(report.failed for report in reports)):
        output = (folder / "output").read_text(encoding="utf-8", errors="replace")
        raise pytest.UsageError(f"the second lane of tests ended with {code}:\n{output}")
