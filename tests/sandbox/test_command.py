"""The service as a process, and the command that runs a job on the sandbox."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.sandbox import PortTaken, Service
from tests.sandbox.__main__ import port
from tests.sandbox.media import probe
from tests.sandbox.service import ROOT, ServiceError
from tests.support.requests import prompt_job


def test_a_service_that_does_not_start_tells_why():
    """A malformed setting ends the process; the error holds its log."""
    with pytest.raises(ServiceError, match="JOB_TIMEOUT_SECONDS"):
        Service({"JOB_TIMEOUT_SECONDS": "soon"}).start()


def test_a_service_does_not_take_another_one_for_itself(sandbox):
    """A port on which somebody answers already is refused, naming it."""
    with pytest.raises(PortTaken, match=f"port {sandbox.port} is in use: choose another one for the service"):
        Service({}, sandbox.port).start()


def test_a_service_ends_when_told_to(start_service):
    """SIGTERM ends it, its log stays readable."""
    service = start_service()
    assert service.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert "Uvicorn running on" in service.log
    with pytest.raises(httpx.TransportError), httpx.Client(trust_env=False) as client:
        client.get(service.url)


def test_a_service_can_be_killed_and_started_again(start_service, caller):
    """On the same port, with the same sandbox, as often as a test likes; its log goes on."""
    service = start_service()
    first = service.pid
    assert service.stop(signal.SIGKILL) == -signal.SIGKILL
    assert service.restart(signal.SIGKILL) is service
    assert caller.get(f"{service.url}/health").status_code == 200
    assert service.pid != first
    assert service.log.count("Uvicorn running on") == 2


def test_two_services_share_a_sandbox(sandbox, service, start_service, caller):
    """What either buys is bought at the same providers."""
    sandbox.video(b"video")
    for one in (service, start_service()):
        answer = caller.post(f"{one.url}/jobs_prompt_only", json=prompt_job(sandbox, prompt="shared"))
        assert answer.json()["video_url"].startswith(sandbox.url)
    assert len(sandbox.created(prompt="shared")) == 2


@pytest.fixture
def caller() -> Iterator[httpx.Client]:
    """A client with a connection of its own for every request."""
    with httpx.Client(trust_env=False, timeout=20, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        yield client


@pytest.mark.parametrize("option", ["--port", "--service-port"])
def test_the_command_names_a_port_that_is_taken(sandbox, tmp_path, option):
    """One line on standard error says which, and which option helps."""
    line = [sys.executable, "-m", "tests.sandbox", "--once", option, str(sandbox.port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    whose = {"--port": "the providers", "--service-port": "the service"}[option]
    told = f"port {sandbox.port} is in use: choose another one for {whose} ({option}), or 0 for a free one\n"
    assert (ended.returncode, ended.stderr) == (1, told)


@pytest.mark.parametrize("text", ["-1", "65536", "http"])
def test_the_command_takes_ports_only(text):
    """What is no port's number is refused before anything starts."""
    with pytest.raises(ValueError, match=text):
        port(text)


@pytest.mark.beside("-m", "tests.sandbox", "--once", "--verbose", "--text", "Hello!")
def test_the_command_makes_a_video_without_a_key(beside):
    """It names what it does not imitate, shows each stage, the log and the three URLs, saves the video and ends with 0."""
    code, told, complaints = beside.outcome()
    assert code == 0, complaints
    assert told.index("Not imitated") < told.index("providers")
    assert re.findall(r"^  (\w[\w ]*\w) +\d+\.\d\d s$", told, re.MULTILINE) == [
        *("speech", "audio upload", "video", "download", "mux", "final upload", "in all")
    ]
    assert all(f'"{name}": "http://127.0.0.1:' in told for name in ("audio_url", "video_url", "final_url"))
    log = re.findall(r"^  log  (.*)$", told, re.MULTILINE)
    assert any("stage=speech outcome=done" in line for line in log)
    assert "job outcome=ok" in log[-1]
    video = probe(beside.folder / "talking-pet.mp4")
    assert (video.video, video.audio, video.height) == ("h264", "aac", 768)


@pytest.mark.beside("-m", "tests.sandbox", "--once", "--model", "nobody/nothing")
def test_the_command_fails_when_the_job_does(beside):
    """A job that is refused ends the command with 1 and the service's own words."""
    code, told, complaints = beside.outcome()
    assert code == 1, complaints
    assert "The job failed" in told
    assert not (beside.folder / "talking-pet.mp4").exists()


@pytest.mark.beside("-u", "-m", "tests.sandbox", "--model", "nobody/nothing")
def test_the_command_stays_up_until_it_is_interrupted(beside):
    """Even after a job that failed it says where page and log are; Ctrl-C ends it and the service."""
    process = beside.process
    lines = iter(process.stdout.readline, "")
    service_url = next(line.split()[1] for line in lines if line.startswith("service"))
    log = Path(next(line.split()[2] for line in lines if line.startswith("its log")))
    assert next(line for line in lines if line.startswith("open")).startswith("open http://127.0.0.1:")
    assert "job outcome=" in log.read_text()
    process.send_signal(signal.SIGINT)
    assert beside.outcome()[0] == 1
    assert not log.exists()
    with pytest.raises(httpx.TransportError), httpx.Client(trust_env=False) as client:
        client.get(service_url)
