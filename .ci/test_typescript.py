"""A client made from the contract: types from /openapi.json, compiled under --strict, run on the sandbox."""

import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.sandbox import Sandbox, Service

SOURCES = Path(__file__).parent / "typescript"


def run(folder: Path, *command: str) -> str:
    """What a command prints. Fails the test with all of it if the command fails."""
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def folder(running_service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client, its npm packages and types fresh from the running service."""
    folder = tmp_path_factory.mktemp("typescript")
    for source in ("package.json", "tsconfig.json", "client.ts"):
        shutil.copy(SOURCES / source, folder)
    run(folder, "npm", "install", "--no-package-lock", "--no-audit", "--no-fund")
    with urllib.request.urlopen(f"{running_service.url}/openapi.json", timeout=10) as answer:
        (folder / "openapi.json").write_bytes(answer.read())
    run(folder, "npm", "run", "types")
    return folder


def test_the_client_compiles_and_runs_a_job(folder: Path, service: Service, sandbox: Sandbox) -> None:
    """It prints the three addresses, and the refusals of two jobs that the compiler had refused as well."""
    run(folder, "npm", "run", "build")
    printed = run(folder, "node", "client.js", service.url, sandbox.image_url, sandbox.voice_id)
    *urls, wrong_fit, voiceless = (line for line in printed.splitlines() if line.startswith(("http", "validation")))
    assert len(urls) == 3
    assert urls[2].removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects
    assert ("fit" in wrong_fit, "voice_id" in voiceless) == (True, True)
