"""The unchanged service as a uvicorn process, for the command, the tests and the benchmark."""

from __future__ import annotations

import http.client
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from .ports import PortTaken, listen

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
KEPT_VARIABLES = (
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "SYSTEMROOT",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "IMAGEIO_FFMPEG_EXE",
)
# Emptied unless given, so that nothing leaks in from a developer's .env.
SETTINGS = (
    "ELEVEN_API_KEY",
    "ELEVEN_BASE_URL",
    "REPLICATE_API_TOKEN",
    "REPLICATE_BASE_URL",
    "SUPABASE_URL",
    "SUPABASE_SERVICE_ROLE",
    "SUPABASE_BUCKET",
    "ALLOWED_ORIGIN",
    "TTS_OUTPUT_FORMAT",
    "TTS_MAX_CHARS",
    "JOB_TIMEOUT_SECONDS",
    "SERVICE_TOKEN",
    "MAX_VIDEOS_PER_HOUR",
    "ALLOWED_MODELS",
    "ALLOW_PRIVATE_URLS",
    "POLL_MIN_SECONDS",
    "RETRY_FIRST_SECONDS",
    "KEEPALIVE_SECONDS",
    "PATIENCE_SECONDS",
)


class ServiceError(Exception):
    """The service did not start; the message holds its log."""


class Service:
    """`uvicorn main:app` with exactly these settings; a context manager."""

    def __init__(self, environment: Mapping[str, str], port: int = 0, graceful_s: int = 10) -> None:
        self.environment = dict(environment)
        self.port = port
        self.graceful_s = graceful_s
        self.log_file = tempfile.NamedTemporaryFile(prefix="service-", suffix=".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Service:
        """Start the process, and return when /health answers.

        Raises ServiceError if the process ends first, and PortTaken.
        """
        try:
            self.port = free_port(self.port)
        except PortTaken:
            self.log_file.close()
            raise

        command = [sys.executable, "-m", "uvicorn", "main:app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--timeout-graceful-shutdown", str(self.graceful_s)]
        command += ["--backlog", "64"]  # as in render.yaml
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            stdout=self.log_file.fileno(),
            stderr=self.log_file.fileno(),
        )
        try:
            self.wait_until_healthy()
        except BaseException:  # Ctrl-C as well: nothing else would end the process
            self.close(signal.SIGKILL)
            raise
        return self

    def variables(self) -> dict[str, str]:
        """The environment of the process."""
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        unset = dict.fromkeys(SETTINGS, "")
        return {**kept, **unset, **self.environment}

    def wait_until_healthy(self) -> None:
        """Return when /health answers.

        Raises ServiceError if the process ends first or takes too long.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_healthy():
            if not self.is_running() or time.monotonic() > deadline:
                raise ServiceError(f"the service did not start:\n{self.log}")
            time.sleep(0.02)

    def is_running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def is_healthy(self) -> bool:
        """Whether /health answers 200 within two seconds."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    @property
    def url(self) -> str:
        """Its origin, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process's id. Raises RuntimeError before the start."""
        if self.process is None:
            raise RuntimeError("the service is not running")
        return self.process.pid

    @property
    def log(self) -> str:
        """What the process has written so far."""
        return Path(self.log_file.name).read_text(encoding="utf-8", errors="replace")

    def stop(self, signal_number: int = signal.SIGTERM) -> int | None:
        """Send the signal, wait for the process to end, and kill it if it does not.

        Returns the exit code; a negative one is the signal that ended the process.
        """
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(self.graceful_s + STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def restart(self, signal_number: int = signal.SIGKILL) -> Service:
        """End the process with this signal, and start it again on the same port and log."""
        self.stop(signal_number)
        return self.start()

    def close(self, signal_number: int = signal.SIGTERM) -> None:
        """Stop the process and remove its log."""
        self.stop(signal_number)
        self.log_file.close()

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()


def free_port(port: int = 0) -> int:
    """Return `port` if nobody listens on it, or else a free port if it is 0.

    Raises PortTaken if `port` is taken. A free port is taken from below the range from which
    systems assign ports, so that no other process gets it before the service does.
    """
    if port:
        candidates = [port]
    else:
        candidates = random.sample(range(20_000, 32_000), 20)

    for candidate in candidates:
        try:
            with listen(candidate, "the service", "--service-port"):
                return candidate
        except PortTaken:
            if port:
                raise
    return free_port()
