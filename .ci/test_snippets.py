"""The README's JavaScript does what the README says: each ```js block runs in Node unchanged."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sandbox import Sandbox, Service

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^```(?:js|javascript)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = FENCED.findall((ROOT / "README.md").read_text(encoding="utf-8"))
WITH_KEY = [block for block in BLOCKS if "sessionStorage" in block]
# A browser tab has sessionStorage, which survives a reload; Node has not, so files take its place.
SESSION_STORAGE = """
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
globalThis.sessionStorage = {
  getItem: (name) => (existsSync(name) ? readFileSync(name, "utf8") : null),
  setItem: (name, value) => writeFileSync(name, value),
  removeItem: (name) => rmSync(name, { force: true }),
};
"""

Start = Callable[[str], "subprocess.Popen[str]"]
each_block = pytest.mark.parametrize(
    "block", BLOCKS, ids=lambda block: "with a key" if block in WITH_KEY else "without a key"
)


def localized(block: str, service: Service, sandbox: Sandbox) -> str:
    """The block with the service, the picture and the voice of this machine, and otherwise unchanged."""
    for old, new in (
        (r'"http://127\.0\.0\.1:8000\b', f'"{service.url}'),
        (r'(?<=image_url: )"[^"]*"', json.dumps(sandbox.image_url)),
        (r'(?<=voice_id: )"[^"]*"', json.dumps(sandbox.voice_id)),
    ):
        block, found = re.subn(old, new, block)
        assert found == 1
    return block


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A front end's folder, with the client in it."""
    shutil.copy(ROOT / "tests" / "sandbox" / "client.js", tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Start:
    """A function that starts a block as a module in Node."""

    def start(block: str) -> "subprocess.Popen[str]":
        """Start Node and give it the block."""
        command = ["node", "--input-type=module", "-"]
        pipe = subprocess.PIPE
        node = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert node.stdin is not None
        node.stdin.write(SESSION_STORAGE + block)
        node.stdin.close()
        node.stdin = None  # communicate() would flush it
        return node

    return start


def outcome(node: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """How a block ended: its exit code, its output and its errors."""
    output, errors = node.communicate(timeout=60)
    return node.returncode, output, errors


def test_the_readme_shows_both_ways() -> None:
    """The README uses the client without a key and with one, and has no parser of its own."""
    assert len(BLOCKS) > len(WITH_KEY) == 1
    assert all('from "./client.js"' in block and "getReader" not in block for block in BLOCKS)


@each_block
def test_a_block_runs_and_prints_the_video(block: str, start: Start, service: Service, sandbox: Sandbox) -> None:
    """It succeeds, and its last line is the URL of the final video."""
    code, output, errors = outcome(start(localized(block, service, sandbox)))
    assert (code, errors) == (0, "")
    url = output.splitlines()[-1]
    assert url.removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects


@each_block
def test_a_block_says_what_went_wrong(block: str, start: Start, service: Service, sandbox: Sandbox) -> None:
    """The caller gets the service's message, for an error in the job and for an invalid input."""
    sandbox.outcome("failed", error="The picture was flagged")
    block = localized(block, service, sandbox)
    failed_code, _, failed_errors = outcome(start(block))
    invalid_code, _, invalid_errors = outcome(start(block.replace("Feed me!", "." * 601)))
    assert (failed_code, invalid_code) == (1, 1)
    assert "The picture was flagged" in failed_errors
    assert "600" in invalid_errors


@each_block
def test_a_block_prints_every_stage(block: str, start: Start, service: Service, sandbox: Sandbox) -> None:
    """Each stage is printed when it ends."""
    _, output, _ = outcome(start(localized(block, service, sandbox)))
    done = re.findall(r"^(\w+) done", output, re.MULTILINE)
    assert done == ["speech", "audio_upload", "video", "download", "mux", "final_upload"]


def test_the_block_with_a_key_survives_a_reload(start: Start, folder: Path, service: Service, sandbox: Sandbox) -> None:
    """Killed in the middle and run again, it continues: one video is paid for, and its key is removed."""
    sandbox.video_seconds = 1.5
    block = localized(WITH_KEY[0], service, sandbox)
    first = start(block)
    deadline = time.monotonic() + 10
    while not sandbox.calls("read"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    outcome(first)
    code, output, _ = outcome(start(block))
    assert code == 0
    assert output.splitlines()[-1].startswith(f"{sandbox.url}/storage/v1/object/public/pets/videos/")
    assert len(sandbox.predictions) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["client.js", "package.json"]


def test_the_key_of_a_failed_job_is_removed(start: Start, folder: Path, service: Service, sandbox: Sandbox) -> None:
    """The next run of the block with a key is a new job."""
    sandbox.outcome("failed", error="The picture was flagged")
    block = localized(WITH_KEY[0], service, sandbox)
    assert [outcome(start(block))[0] for _ in range(2)] == [1, 0]
