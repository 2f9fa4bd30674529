"""The README's JavaScript does what the README says: each ```js block runs in Node as it stands there."""

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
# What a tab has and Node has not: it outlives a reload, here the process.
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


def at_home(block: str, service: Service, sandbox: Sandbox) -> str:
    """The block with the service's address, the picture and the voice of this machine; nothing else is changed."""
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
    """A front end's folder, the client beside the block."""
    shutil.copy(ROOT / "tests" / "sandbox" / "client.js", tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Start:
    """Starts a block as a module in Node."""

    def start(block: str) -> "subprocess.Popen[str]":
        command, pipe = ["node", "--input-type=module", "-"], subprocess.PIPE
        node = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert node.stdin is not None
        node.stdin.write(SESSION_STORAGE + block)
        node.stdin.close()
        node.stdin = None  # communicate() would flush it
        return node

    return start


def outcome(node: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """How a block ended: exit code, what it printed, what it complained of."""
    printed, complaints = node.communicate(timeout=60)
    return node.returncode, printed, complaints


def test_the_readme_shows_both_ways() -> None:
    """The client's use in a few lines, without a key and with one; no parser of its own."""
    assert len(BLOCKS) > len(WITH_KEY) == 1
    assert all('from "./client.js"' in block and "getReader" not in block for block in BLOCKS)


@each_block
def test_a_block_runs_and_prints_the_video(block: str, start: Start, service: Service, sandbox: Sandbox) -> None:
    """It ends well, and its last line is the address of the video."""
    code, printed, complaints = outcome(start(at_home(block, service, sandbox)))
    assert (code, complaints) == (0, "")
    video = printed.splitlines()[-1]
    assert video.removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects


@each_block
def test_a_block_says_what_went_wrong(block: str, start: Start, service: Service, sandbox: Sandbox) -> None:
    """Both an error within the job and a refusal of the input reach the caller in the service's words."""
    sandbox.outcome("failed", error="The picture was flagged")
    late = outcome(start(at_home(block, service, sandbox)))
    early = outcome(start(at_home(block, service, sandbox).replace("Feed me!", "." * 601)))
    assert (late[0], early[0]) == (1, 1)
    assert "The picture was flagged" in late[2]
    assert "600" in early[2]


@each_block
def test_a_block_tells_every_step(block: str, start: Start, service: Service, sandbox: Sandbox) -> None:
    """Each stage is printed as it starts and ends."""
    _, printed, _ = outcome(start(at_home(block, service, sandbox)))
    done = re.findall(r"^(\w+) done", printed, re.MULTILINE)
    assert done == ["speech", "audio_upload", "video", "download", "mux", "final_upload"]


def test_the_block_with_a_key_outlives_a_reload(start: Start, folder: Path, service: Service, sandbox: Sandbox) -> None:
    """Killed in the middle and run again, it goes on: one video is paid for, and nothing is left for the next one."""
    sandbox.video_seconds = 1.5
    block = at_home(WITH_KEY[0], service, sandbox)
    gone = start(block)
    deadline = time.monotonic() + 10
    while not sandbox.calls("read"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    gone.kill()
    outcome(gone)
    code, printed, _ = outcome(start(block))
    assert code == 0
    assert printed.splitlines()[-1].startswith(f"{sandbox.url}/storage/v1/object/public/pets/videos/")
    assert len(sandbox.predictions) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["client.js", "package.json"]


def test_a_refused_key_is_given_up(start: Start, folder: Path, service: Service, sandbox: Sandbox) -> None:
    """The next try of the block with a key is a new job."""
    sandbox.outcome("failed", error="The picture was flagged")
    block = at_home(WITH_KEY[0], service, sandbox)
    assert [outcome(start(block))[0] for _ in range(2)] == [1, 0]
