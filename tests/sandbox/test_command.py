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
from tests.sandbox.__main__ import FAILURES, port, positive, seconds
from tests.sandbox.media import probe
from tests.sandbox.service import ROOT, ServiceError
from tests.support.requests import prompt_job, short_video, speech_job

STAGES = ["speech", "audio upload", "video", "download", "mux", "final upload"]


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A client that opens a new connection for every request."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(trust_env=False, timeout=20, limits=limits) as client:
        yield client


# The service


def test_a_service_that_does_not_start_says_why():
    """A malformed setting ends the process; the error holds its log."""
    with pytest.raises(ServiceError, match="JOB_TIMEOUT_SECONDS"):
        Service({"JOB_TIMEOUT_SECONDS": "soon"}).start()


def test_a_service_does_not_mistake_another_server_for_itself(sandbox):
    """A port on which another server answers is refused, and named."""
    message = f"port {sandbox.port} is in use: choose another one for the service"
    with pytest.raises(PortTaken, match=message):
        Service({}, sandbox.port).start()


def test_sigterm_ends_a_service(start_service, http):
    """Nothing answers any more, and its log can still be read."""
    service = start_service()
    assert service.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert "Uvicorn running on" in service.log
    with pytest.raises(httpx.TransportError):
        http.get(service.url)


def test_a_service_can_be_killed_and_started_again(start_service, http):
    """It keeps its port, its sandbox and its log."""
    service = start_service()
    first_pid = service.pid
    assert service.stop(signal.SIGKILL) == -signal.SIGKILL
    assert service.restart(signal.SIGKILL) is service
    assert http.get(f"{service.url}/health").status_code == 200
    assert service.pid != first_pid
    assert service.log.count("Uvicorn running on") == 2


def test_two_services_share_a_sandbox(sandbox, service, start_service, http):
    """What either pays for is paid for at the same providers."""
    sandbox.video(b"video")
    job = prompt_job(sandbox, prompt="shared")
    for one in (service, start_service()):
        response = http.post(f"{one.url}/jobs_prompt_only", json=job)
        assert response.json()["video_url"].startswith(sandbox.url)
    assert len(sandbox.created(prompt="shared")) == 2


# The command


@pytest.mark.parametrize(
    ("option", "whose"),
    [
        pytest.param("--port", "the providers", id="port"),
        pytest.param("--service-port", "the service", id="service-port"),
    ],
)
def test_the_command_names_a_port_that_is_taken(sandbox, tmp_path, option, whose):
    """One line on standard error names the port, and the option to change it."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.sandbox", "--once", option, str(sandbox.port)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 1
    assert process.stderr == (
        f"port {sandbox.port} is in use: "
        f"choose another one for {whose} ({option}), or 0 for a free one\n"
    )


@pytest.mark.parametrize("text", ["-1", "65536", "http"])
def test_the_command_only_takes_port_numbers(text):
    """Anything else is refused before anything starts."""
    with pytest.raises(ValueError, match=text):
        port(text)


@pytest.mark.parametrize("text", ["-1", "nan", "soon", "1e9"])
def test_the_command_only_takes_times_that_a_job_can_have(text):
    """Anything else is refused before anything starts."""
    with pytest.raises(ValueError, match=text):
        seconds(text)


@pytest.mark.parametrize("stage", FAILURES)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}], ids=["no key", "a key"])
def test_every_stage_can_be_made_to_fail(sandbox, service, http, stage, headers):
    """The job fails at once and for good, in this stage and in no other; so does the next."""
    sandbox.video(short_video())
    FAILURES[stage](sandbox)
    for number in range(2):
        job = speech_job(sandbox, text=f"Job {number}")
        keys = {name: f"{stage} {number}".replace(" ", "-") for name in headers}
        sent = {"Accept": "text/event-stream", **keys}
        stream = http.post(f"{service.url}/jobs_prompt_tts", json=job, headers=sent).text
        assert '"retryable":false' in stream.rpartition("event: error")[2]
        assert re.findall(r'"stage":"(\w+)"', stream)[-1] == stage


def test_a_model_without_a_picture_is_refused(sandbox, service, http):
    """The sandbox has one, so that a front end can see what the service says about it."""
    job = speech_job(sandbox, model="sandbox/text-to-video")
    response = http.post(f"{service.url}/jobs_prompt_tts", json=job)
    assert response.status_code == 400
    assert "takes no picture" in response.json()["detail"]
    assert sandbox.speeches == {}


@pytest.mark.beside("-m", "tests.sandbox", "--once", "--fail", "video", "--slow", "4")
def test_the_command_can_be_slow_and_fail(beside):
    """The video takes as long as asked for, and then fails."""
    code, output, errors = beside.outcome()
    assert code == 1, errors
    assert "The picture was flagged" in output
    assert "audio upload" in output
    assert "nowhere else" in output


@pytest.mark.beside("-m", "tests.sandbox", "--once", "--verbose", "--text", "Hello!")
def test_the_command_makes_a_video_without_a_key(beside):
    """It shows each stage, the log and the three URLs, saves the video and ends with 0."""
    code, output, errors = beside.outcome()
    assert code == 0, errors
    assert output.index("Not imitated") < output.index("providers")

    stages = re.findall(r"^  (\w[\w ]*\w) +\d+\.\d\d s$", output, re.MULTILINE)
    assert stages == [*STAGES, "in all"]
    for name in ("audio_url", "video_url", "final_url"):
        assert f'"{name}": "http://127.0.0.1:' in output

    log = re.findall(r"^  log  (.*)$", output, re.MULTILINE)
    assert any("stage=speech outcome=done" in line for line in log)
    assert "job outcome=ok" in log[-1]

    video = probe(beside.folder / "talking-pet.mp4")
    assert (video.video, video.audio, video.height) == ("h264", "aac", 768)


@pytest.mark.beside("-m", "tests.sandbox", "--once", "--model", "nobody/nothing")
def test_the_command_fails_when_the_job_does(beside):
    """After a failed job it ends with 1 and shows the service's own error."""
    code, output, errors = beside.outcome()
    assert code == 1, errors
    assert "The job failed" in output
    assert not (beside.folder / "talking-pet.mp4").exists()


@pytest.mark.beside("-u", "-m", "tests.sandbox", "--model", "nobody/nothing")
def test_the_command_stays_up_until_it_is_interrupted(beside, http):
    """Even after a failed job it names the page and the log; Ctrl-C ends it and the service."""
    process = beside.process
    lines = iter(process.stdout.readline, "")
    service_line = next(line for line in lines if line.startswith("service"))
    log_line = next(line for line in lines if line.startswith("its log"))
    open_line = next(line for line in lines if line.startswith("open"))
    log = Path(log_line.split()[2])
    assert open_line.startswith("open http://127.0.0.1:")
    assert "job outcome=" in log.read_text()

    process.send_signal(signal.SIGINT)
    assert beside.outcome()[0] == 1
    assert not log.exists()
    with pytest.raises(httpx.TransportError):
        http.get(service_line.split()[1])


@pytest.mark.parametrize("text", ["0", "-1", "ten"])
def test_a_providers_limit_is_a_number_from_one_on(text):
    """Anything else is refused before anything starts."""
    with pytest.raises(ValueError, match=text):
        positive(text)
