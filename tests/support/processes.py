"""What a process of the service holds, read from Linux's /proc, and waiting until something holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at the process through Linux's /proc")


def files_in(folder: Path) -> list[str]:
    """The names of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def children(pid: int, name: str = "") -> list[int]:
    """The processes whose parent this is, and whose name begins so; dead ones that nobody has waited for included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            command, _, fields = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has just ended
            continue
        if int(fields.split()[1]) == pid and command.startswith(name):
            found.append(int(stat.parent.name))
    return found


def open_files(pid: int) -> list[str]:
    """What every descriptor of a process leads to; sockets are `socket:[...]`."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except OSError:  # it has just been closed
            continue
    return found


def socket_count(pid: int) -> int:
    """How many sockets a process holds."""
    return sum(name.startswith("socket:") for name in open_files(pid))


def status_number(pid: int, name: str) -> int:
    """A number from /proc/<pid>/status, such as VmRSS (kB) or Threads."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


async def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> bool:
    """Whether something becomes true within so many seconds; looked at every few milliseconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await anyio.sleep(0.005)
    return True
