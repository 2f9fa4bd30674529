"""Two clients under --strict: the one to copy, and one made from the contract alone; both run on the sandbox."""

import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.sandbox import Sandbox, Service

SOURCES = Path(__file__).parent / "typescript"
CLIENT = Path(__file__).parent.parent / "tests" / "sandbox" / "client.js"


def run(folder: Path, *command: str) -> str:
    """What a command prints. Fails the test with all of it if the command fails."""
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def folder(running_service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both clients, compiled: with their npm packages and types fresh from the running service."""
    folder = tmp_path_factory.mktemp("typescript")
    for source in (*SOURCES.iterdir(), CLIENT):
        shutil.copy(source, folder)
    run(folder, "npm", "install", "--no-package-lock", "--no-audit", "--no-fund")
    with urllib.request.urlopen(f"{running_service.url}/openapi.json", timeout=10) as answer:
        (folder / "openapi.json").write_bytes(answer.read())
    run(folder, "npm", "run", "types")
    run(folder, "npm", "run", "build")
    return folder


def test_a_client_made_from_the_contract_runs_a_job(folder: Path, service: Service, sandbox: Sandbox) -> None:
    """It prints the three addresses, and the refusals of two jobs that the compiler had refused as well."""
    printed = run(folder, "node", "built/contract.js", service.url, sandbox.image_url, sandbox.voice_id)
    *urls, wrong_fit, voiceless = (line for line in printed.splitlines() if line.startswith(("http", "validation")))
    assert len(urls) == 3
    assert urls[2].removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects
    assert ("fit" in wrong_fit, "voice_id" in voiceless) == (True, True)


def test_the_client_to_copy_has_the_types_of_the_contract(folder: Path, service: Service, sandbox: Sandbox) -> None:
    """It makes both kinds of video, and what the compiler refuses is refused by the service too."""
    printed = run(folder, "node", "built/video.js", service.url, sandbox.image_url, sandbox.voice_id)
    urls = [line for line in printed.splitlines() if line.startswith("http")]
    assert len(urls) == 4
    assert urls[2].removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects
    assert "missing: undefined" in printed
    assert printed.splitlines()[-1] == "validation false body.duration nothing paid"
