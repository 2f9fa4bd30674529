"""Write .ci/requirements.lock: `python3.13 .ci/lock.py`, with the Python that render.yaml names.

The lock holds the newest versions within requirements.txt's ranges and everything that they need,
each with the hash of the one file that Render installs: a wheel for any machine or for Linux on x86_64.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
LOCK = ROOT / ".ci" / "requirements.lock"
# The files for Render, on whatever machine this runs
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux2014_x86_64",
)


def render_python() -> str:
    """Return the Python that render.yaml names, as "3.13"."""
    text = (ROOT / "render.yaml").read_text(encoding="utf-8")
    [version] = re.findall(r'PYTHON_VERSION\n +value: "(3\.\d+)\.\d+"', text)
    return version


def header() -> str:
    """Return the lock's first line, which tells the Python that it is for."""
    return f"# Made by `python{render_python()} .ci/lock.py` from requirements.txt.\n"


def resolve(requirements: Path) -> list[str]:
    """Return one line for each package that pip would install: its version and its file's hash.

    pip evaluates markers such as `python_version < "3.13"` for the Python that runs it.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report", "-", "--requirement", str(requirements)]
    command += ["--only-binary", ":all:", "--target", "unused"]  # --platform asks for both
    for platform in PLATFORMS:
        command += ["--platform", platform]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return sorted(map(lock_line, json.loads(printed)["install"]))


def lock_line(package: dict) -> str:
    """Return a requirement that allows one file only."""
    name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
    version = package["metadata"]["version"]
    sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name}=={version} --hash=sha256:{sha256}\n"


def check_python(running: str) -> None:
    """Raises SystemExit unless the running Python, as "3.13", is the one that render.yaml names."""
    wanted = render_python()
    if running != wanted:
        sys.exit(f"render.yaml names Python {wanted}, this is {running}")


def main() -> None:
    """Write the lock."""
    check_python(f"{sys.version_info.major}.{sys.version_info.minor}")
    LOCK.write_text(header() + "".join(resolve(REQUIREMENTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
