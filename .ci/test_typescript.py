"""Clients under --strict: client.js with client.d.ts, and clients made from /openapi.json alone by three generators."""

import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.sandbox import Sandbox, Service

SOURCES = Path(__file__).parent / "typescript"
KIT = Path(__file__).parent.parent / "tests" / "sandbox"


def run(folder: Path, *command: str) -> str:
    """Run a command and return its output. If it fails, the test fails with all of its output."""
    process = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, f"{' '.join(command)}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def folder(running_service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sources, with the types that openapi-typescript makes from the running service's /openapi.json, compiled."""
    folder = tmp_path_factory.mktemp("typescript")
    for source in (*SOURCES.iterdir(), KIT / "client.js", KIT / "client.d.ts", KIT / "proxy.mjs"):
        shutil.copy(source, folder)
    shutil.copy(KIT / "client.js", folder / "implementation.js")
    run(folder, "npm", "install", "--no-package-lock", "--no-audit", "--no-fund")
    with urllib.request.urlopen(f"{running_service.url}/openapi.json", timeout=10) as response:
        (folder / "openapi.json").write_bytes(response.read())
    run(folder, "npm", "run", "types")
    run(folder, "npm", "run", "build")
    # As in a front end, the compiler does not copy it
    shutil.copy(KIT / "client.js", folder / "built")
    return folder


@pytest.fixture(scope="module")
def generated(folder: Path) -> Path:
    """The same folder, with the clients of hey-api and orval."""
    run(folder, "npm", "run", "hey")
    assert "Your OpenAPI spec has been converted" in run(folder, "npm", "run", "orval")
    return folder


def compile_strictly(folder: Path, project: str) -> None:
    """Compile one of the projects; a project that compiles says nothing."""
    assert run(folder, "npx", "tsc", "-p", f"tsconfig.{project}.json") == ""


@pytest.mark.parametrize("resolution", ["bundler", "node16"])
def test_the_client_to_copy_compiles(folder: Path, resolution: str) -> None:
    """Under --strict and without allowJs, in either module resolution; nodenext is the one that runs below."""
    compile_strictly(folder, resolution)


def test_the_types_of_the_client_are_those_of_its_code(folder: Path) -> None:
    """client.js compiles under checkJs, client.d.ts declares what it exports, and proxy.mjs compiles as well."""
    compile_strictly(folder, "js")


def test_hey_api_and_orval_make_clients_that_compile(generated: Path) -> None:
    """With the types of jobs, results, errors and events, and none of their own names in the way."""
    compile_strictly(generated, "generated")


def test_the_contract_is_valid_for_its_version(generated: Path) -> None:
    """Orval validates it first, and says so only if something is wrong."""
    assert "must" not in run(generated, "npm", "run", "orval")


def test_a_client_made_from_the_contract_runs_a_job(
    folder: Path, service: Service, sandbox: Sandbox
) -> None:
    """It prints the three URLs; the service rejects the two jobs that the compiler rejects."""
    output = run(
        folder, "node", "built/contract.js", service.url, sandbox.image_url, sandbox.voice_id
    )
    lines = [line for line in output.splitlines() if line.startswith(("http", "validation"))]
    *urls, invalid_fit, missing_voice = lines
    assert len(urls) == 3
    assert urls[2].removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects
    assert "fit" in invalid_fit
    assert "voice_id" in missing_voice


def test_the_client_to_copy_has_the_types_of_the_contract(
    folder: Path, service: Service, sandbox: Sandbox
) -> None:
    """It makes both kinds of video, and the service rejects what the compiler rejects."""
    output = run(folder, "node", "built/video.js", service.url, sandbox.image_url, sandbox.voice_id)
    urls = [line for line in output.splitlines() if line.startswith("http")]
    assert len(urls) == 4
    assert "heard: true" in output
    assert urls[2].removeprefix(f"{sandbox.url}/storage/v1/object/public/") in sandbox.objects
    assert "missing: undefined" in output
    assert output.splitlines()[-1] == "validation false body.duration nothing paid"
