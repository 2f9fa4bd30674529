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
[WITH_KEY] = [block for block in BLOCKS if "localStorage" in block]
[WITH_SIGN_IN] = [block for block in BLOCKS if "supabase" in block]
[WITHOUT_KEY] = [block for block in BLOCKS if block not in (WITH_KEY, WITH_SIGN_IN)]

# A browser has localStorage, which outlives its tabs, and a button; Node has neither.
BROWSER = """
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
globalThis.localStorage = {
  getItem: (name) => (existsSync(name) ? readFileSync(name, "utf8") : null),
  setItem: (name, value) => writeFileSync(name, value),
  removeItem: (name) => rmSync(name, { force: true }),
};
const button = {};
globalThis.document = { querySelector: () => button };
"""
CLICK = "\nbutton.onclick();\n"

# supabase-js, as far as the block uses it; the sandbox's own route stores the picture.
SUPABASE = """
const SANDBOX = "{sandbox}";
let publicUrl;
export const supabase = {
  auth: {
    getUser: async () => ({ data: { user: { id: "ann" } } }),
    getSession: async () => ({ data: { session: { access_token: "token-of-ann" } } }),
  },
  storage: {
    from: (bucket) => ({
      upload: async (path, body, { contentType }) => {
        const headers = { "Content-Type": contentType };
        const response = await fetch(`${SANDBOX}/pictures`, { method: "POST", headers, body });
        publicUrl = (await response.json()).url;
        return { error: response.ok && path.startsWith("ann/") && bucket === "pictures" ? null : new Error("refused") };
      },
      getPublicUrl: () => ({ data: { publicUrl } }),
    }),
  },
};
"""

Start = Callable[[str], "subprocess.Popen[str]"]
each_block = pytest.mark.parametrize(
    "block",
    [
        pytest.param(WITH_KEY + CLICK, id="with a key"),
        pytest.param(WITHOUT_KEY, id="without a key"),
    ],
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
        node = subprocess.Popen(
            command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        assert node.stdin is not None
        node.stdin.write(BROWSER + block)
        node.stdin.close()
        node.stdin = None  # communicate() would flush it
        return node

    return start


def outcome(node: "subprocess.Popen[str]") -> tuple[str, str]:
    """How a block ended: its output and its errors."""
    return node.communicate(timeout=60)


def is_stored(url: str, sandbox: Sandbox) -> bool:
    """Whether there is a file at this URL of the bucket."""
    return url.removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects


def is_kept(folder: Path) -> bool:
    """Whether the job is still in localStorage."""
    return (folder / "job").exists()


def test_the_readme_has_no_parser_of_its_own() -> None:
    """Each block uses the client."""
    assert all('from "./client.js"' in block and "getReader" not in block for block in BLOCKS)


@each_block
def test_a_block_runs_and_prints_the_video(
    block: str, start: Start, folder: Path, service: Service, sandbox: Sandbox
) -> None:
    """Each stage is printed when it ends, and then the URL of the final video; nothing is kept."""
    output, errors = outcome(start(localized(block, service, sandbox)))
    assert errors == ""
    assert is_stored(output.splitlines()[-1], sandbox)
    done = re.findall(r"^(\w+) done", output, re.MULTILINE)
    assert done == ["speech", "audio_upload", "video", "download", "mux", "final_upload"]
    assert not is_kept(folder)


@each_block
def test_a_block_says_what_went_wrong(
    block: str, start: Start, folder: Path, service: Service, sandbox: Sandbox
) -> None:
    """For an error in the job and for an invalid input; a new attempt then has a new key."""
    sandbox.outcome("failed", error="The picture was flagged")
    block = localized(block, service, sandbox)
    _, failed_errors = outcome(start(block))
    _, invalid_errors = outcome(start(block.replace("Feed me!", "." * 601)))
    assert "The picture was flagged" in failed_errors
    assert "600" in invalid_errors
    assert not is_kept(folder)


def wait_for_video(sandbox: Sandbox) -> None:
    """Wait until a video is being made."""
    deadline = time.monotonic() + 20
    while not sandbox.calls("poll"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_closed_tab_finds_its_video(
    start: Start, folder: Path, service: Service, sandbox: Sandbox
) -> None:
    """Killed in the middle, the next page goes on without a click: one video is paid for."""
    sandbox.video_seconds = 1.5
    block = localized(WITH_KEY, service, sandbox)
    first = start(block + CLICK)
    wait_for_video(sandbox)
    first.kill()
    outcome(first)
    assert is_kept(folder)
    output, _ = outcome(start(block))
    assert is_stored(output.splitlines()[-1], sandbox)
    assert len(sandbox.predictions) == 1
    assert not is_kept(folder)


def test_a_double_click_makes_one_video(start: Start, service: Service, sandbox: Sandbox) -> None:
    """Both clicks wait for it, and the next one is another."""
    block = localized(WITH_KEY, service, sandbox)
    output, _ = outcome(start(block + CLICK + CLICK))
    assert len(set(re.findall(r"^http.*", output, re.MULTILINE))) == 1
    assert len(sandbox.predictions) == 1
    outcome(start(block + CLICK))
    assert len(sandbox.predictions) == 2


def test_a_page_without_a_job_waits_for_a_click(
    start: Start, service: Service, sandbox: Sandbox
) -> None:
    """Nothing is sent when it is opened."""
    assert outcome(start(localized(WITH_KEY, service, sandbox))) == ("", "")
    assert sandbox.speeches == {}


def test_a_job_that_can_go_on_is_kept(
    start: Start, folder: Path, service: Service, sandbox: Sandbox
) -> None:
    """A sign-in that has ended does not lose the video: the same job and key go on later."""
    block = localized(WITH_KEY, service, sandbox)
    refused = 'globalThis.fetch = async () => new Response("Sign in", { status: 401 });\n'
    _, errors = outcome(start(refused + block + CLICK))
    assert "Sign in" in errors
    assert is_kept(folder)


def test_the_block_with_a_sign_in_uploads_and_signs(
    start: Start, folder: Path, service: Service, sandbox: Sandbox
) -> None:
    """The picture comes from a bucket, in a folder of the user's own, and the session goes along."""
    shutil.copy(ROOT / "tests" / "sandbox" / "pet.jpg", folder)
    (folder / "supabase.js").write_text(SUPABASE.replace("{sandbox}", sandbox.url))
    block = WITH_SIGN_IN.replace("https://proxy.example.com", service.url)
    words = json.dumps({"text": "Feed me!", "voice_id": sandbox.voice_id})
    call = f"""
const sent = [];
const send = globalThis.fetch;
globalThis.fetch = (request, ...rest) => (sent.push(request.headers?.get?.("Authorization")), send(request, ...rest));
const file = new Blob([readFileSync("pet.jpg")], {{ type: "image/jpeg" }});
const video = await makeVideoOf(file, {words}, crypto.randomUUID());
console.log(sent.at(-1));
console.log(video.final_url);
"""
    output, errors = outcome(start(block + call))
    assert errors == ""
    authorization, url = output.splitlines()
    assert authorization == "Bearer token-of-ann"
    assert is_stored(url, sandbox)
    assert sandbox.created()[0].input["first_frame_image"].startswith(f"{sandbox.url}/pictures/")
