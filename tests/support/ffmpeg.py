"""ffmpeg as the tests run it, and the ffmpeg processes of the code under test."""

from __future__ import annotations

import os
import subprocess

import imageio_ffmpeg  # type: ignore[import-untyped]

from tests.support import processes

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg to its end; the test fails if it does."""
    command = [FFMPEG, "-hide_banner", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, timeout=60)


def children() -> set[int]:
    """The ffmpeg processes that this one has started and not yet reaped."""
    return set(processes.children(os.getpid(), "ffmpeg"))
