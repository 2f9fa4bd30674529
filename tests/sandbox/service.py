"""The unchanged service as a real uvicorn process, for the command, the tests and the benchmark."""

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
SETTINGS = (  # emptied unless given, so that nothing leaks in from a developer's .env
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
    """The service did not start; carries its log."""


class Service:
    """`uvicorn main:app` with exactly this environment; a context manager."""

    def __init__(self, environment: Mapping[str, str], port: int = 0, graceful_s: int = 10) -> None:
        self.environment, self.port, self.graceful_s = dict(environment), port, graceful_s
        self.log_file = tempfile.NamedTemporaryFile(prefix="service-", suffix=".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Service:
        """Start the process; returns when /health answers. ServiceError if it ends first, PortTaken."""
        try:
            self.port = free_port(self.port)
        except PortTaken:
            self.log_file.close()
            raise
        command = [sys.executable, "-m", "uvicorn", "main:app", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--timeout-graceful-shutdown", str(self.graceful_s)]
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        variables = {**kept, **dict.fromkeys(SETTINGS, ""), **self.environment}
        output = self.log_file.fileno()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            self.wait_until_healthy()
        except BaseException:  # Ctrl-C as well: nobody else could end the process
            self.close(signal.SIGKILL)
            raise
        return self

    def wait_until_healthy(self) -> None:
        """Return when /health answers; ServiceError if the process ends first or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_healthy():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise ServiceError(f"the service did not start:\n{self.log}")
            time.sleep(0.02)

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
        """Its origin, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process's id; RuntimeError before the start."""
        if self.process is None:
            raise RuntimeError("the service is not running")
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written so far."""
        return Path(self.log_file.name).read_text(encoding="utf-8", errors="replace")

    def stop(self, signal_number: int = signal.SIGTERM) -> int | None:
        """Send the signal and wait for the end, then kill; the exit code (negative: the signal that ended it)."""
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
        """End the process in this way, and start it again on the same port; the log goes on."""
        self.stop(signal_number)
        return self.start()

    def close(self, signal_number: int = signal.SIGTERM) -> None:
        """Stop, and remove the log."""
        self.stop(signal_number)
        self.log_file.close()

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()


def free_port(port: int = 0) -> int:
    """A port that nobody listens on now: this one if it is given. PortTaken if somebody does.

    Else one below those that systems give to whoever asks for any: until the service has it, nobody is given it.
    """
    for candidate in [port] if port else random.sample(range(20_000, 32_000), 20):
        try:
            with listen(candidate, "the service", "--service-port"):
                return candidate
        except PortTaken:
            if port:
                raise
    return free_port()
