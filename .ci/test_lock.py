"""What Render installs is within requirements.txt's ranges, and each file of it has a hash."""

import re
from pathlib import Path

import lock
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINE = re.compile(r"([a-z0-9-]+)==([a-z0-9.]+)( --hash=sha256:[0-9a-f]{64})+")


def statements(text: str) -> list[str]:
    """The lines of a requirements file without its comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


TEXT = lock.LOCK.read_text(encoding="utf-8")
LOCKED = statements(TEXT)
RANGES = [Requirement(line) for line in statements(lock.REQUIREMENTS.read_text(encoding="utf-8"))]


def out_of_range(locked: list[str]) -> list[str]:
    """The names of requirements.txt that the lock does not have in a version of their range."""
    versions = dict(line.split(" ")[0].split("==") for line in locked)
    return [
        wanted.name
        for wanted in RANGES
        if versions.get(canonicalize_name(wanted.name), "") not in wanted.specifier
    ]


def test_every_line_is_one_version_with_its_hashes() -> None:
    """Nothing else: no range, no option, no address of a registry."""
    assert [line for line in LOCKED if not LINE.fullmatch(line)] == []
    names = [line.split("==")[0] for line in LOCKED]
    assert len(set(names)) == len(names) > len(RANGES)


def test_the_lock_is_for_renders_python() -> None:
    """A new Python in render.yaml needs a new lock: other files, and other packages."""
    assert TEXT.startswith(lock.header())


def test_the_lock_is_within_the_ranges() -> None:
    """All of requirements.txt is in it."""
    assert len(RANGES) > 5
    assert out_of_range(LOCKED) == []


def test_a_lock_out_of_range_would_be_noticed() -> None:
    """An older version, and a package that is not there."""
    changed = [re.sub(r"^fastapi==[^ ]*", "fastapi==0.1", line) for line in LOCKED]
    changed = [line for line in changed if not line.startswith("httpx==")]
    assert out_of_range(changed) == ["fastapi", "httpx"]


def test_the_command_makes_the_line_again(tmp_path: Path) -> None:
    """For the same version it finds the same file; sniffio needs nothing else."""
    [line] = [line for line in LOCKED if line.startswith("sniffio==")]
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(line.split(" ")[0], encoding="utf-8")
    assert lock.resolve(requirements) == [f"{line}\n"]


def test_the_command_runs_on_renders_python_only() -> None:
    """Another one would leave out what only Render's needs."""
    wanted = lock.render_python()
    lock.check_python(wanted)
    with pytest.raises(SystemExit, match=f"render.yaml names Python {wanted}, this is 3.9"):
        lock.check_python("3.9")
