"""The README's JavaScript does what the README says: each ```js block runs in Node as it stands there."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.sandbox import Sandbox, Service

README = Path(__file__).parent.parent / "README.md"
FENCED = re.compile(r"^```(?:js|javascript)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = FENCED.findall(README.read_text(encoding="utf-8")) if README.exists() else []


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


def run_in_node(block: str) -> "subprocess.CompletedProcess[str]":
    """What Node says to a module of this text."""
    command = ["node", "--input-type=module", "-"]
    return subprocess.run(command, input=block, capture_output=True, text=True, timeout=60, check=False)


def test_the_readme_shows_both_forms() -> None:
    """Plain `fetch` and the event stream."""
    assert [("text/event-stream" in block) for block in BLOCKS] == [False, True]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "events" if "text/event-stream" in block else "json")
def test_a_block_runs_and_prints_the_film(block: str, service: Service, sandbox: Sandbox) -> None:
    """It ends well, and its last line is the address of the film."""
    ended = run_in_node(at_home(block, service, sandbox))
    assert (ended.returncode, ended.stderr) == (0, "")
    film = ended.stdout.splitlines()[-1]
    assert film.removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "events" if "text/event-stream" in block else "json")
def test_a_block_says_what_went_wrong(block: str, service: Service, sandbox: Sandbox) -> None:
    """Both an error within the job and a refusal of the input reach the caller in the service's words."""
    sandbox.outcome("failed", error="The picture was flagged")
    late = run_in_node(at_home(block, service, sandbox))
    early = run_in_node(at_home(block, service, sandbox).replace("Feed me!", "." * 601))
    assert (late.returncode, early.returncode) == (1, 1)
    assert "The picture was flagged" in late.stderr
    assert "600" in early.stderr


def test_the_event_stream_tells_every_step(service: Service, sandbox: Sandbox) -> None:
    """The block prints each stage as it starts and ends, and the video's percentage."""
    ended = run_in_node(at_home(BLOCKS[1], service, sandbox))
    done = re.findall(r"^(\w+) done", ended.stdout, re.MULTILINE)
    assert done == ["speech", "audio_upload", "video", "download", "mux", "final_upload"]
    assert re.search(r"^video started [\d.]+ \d+$", ended.stdout, re.MULTILINE)
