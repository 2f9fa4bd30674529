"""Two clients under --strict, run on the sandbox: client.js, and one made from /openapi.json alone."""

import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.sandbox import Sandbox, Service

SOURCES = Path(__file__).parent / "typescript"
CLIENT = Path(__file__).parent.parent / "tests" / "sandbox" / "client.js"


def run(folder: Path, *command: str) -> str:
    """Run a command and return its output. If it fails, the test fails with all of its output."""
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, f"{' '.join(command)}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def folder(running_service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both clients, compiled with types made from the running service's /openapi.json."""
    folder = tmp_path_factory.mktemp("typescript")
    for source in (*SOURCES.iterdir(), CLIENT):
        shutil.copy(source, folder)
    run(folder, "npm", "install", "--no-package-lock", "--no-audit", "--no-fund")
    with urllib.request.urlopen(f"{running_service.url}/openapi.json", timeout=10) as response:
        (folder / "openapi.json").write_bytes(response.read())
    run(folder, "npm", "run", "types")
    run(folder, "npm", "run", "build")
    return folder


def test_a_client_made_from_the_contract_runs_a_job(folder: Path, service: Service, sandbox: Sandbox) -> None:
    """It prints the three URLs; the service rejects the two jobs that the compiler rejects."""
    output = run(folder, "node", "built/contract.js", service.url, sandbox.image_url, sandbox.voice_id)
    lines = [line for line in output.splitlines() if line.startswith(("http", "validation"))]
    *urls, invalid_fit, missing_voice = lines
    assert len(urls) == 3
    assert urls[2].removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects
    assert "fit" in invalid_fit
    assert "voice_id" in missing_voice


def test_the_client_to_copy_has_the_types_of_the_contract(folder: Path, service: Service, sandbox: Sandbox) -> None:
    """It makes both kinds of video, and the service rejects what the compiler rejects."""
    output = run(folder, "node", "built/video.js", service.url, sandbox.image_url, sandbox.voice_id)
    urls = [line for line in output.splitlines() if line.startswith("http")]
    assert len(urls) == 4
    assert urls[2].removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects
    assert "missing: undefined" in output
    assert output.splitlines()[-1] == "validation false body.duration nothing paid"
