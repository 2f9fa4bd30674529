"""The client disconnects, or the process gets SIGTERM, at every stage of a job: what is cancelled, finished and left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import imageio_ffmpeg
import pytest

import main
from tests.conftest import PACE
from tests.sandbox import Sandbox, Service
from tests.sandbox.service import ROOT
from tests.support.processes import children, files_in, needs_proc, wait_until
from tests.support.requests import (
    RESULT_FIELDS,
    JobOutcome,
    prompt_job,
    send_job,
    service_client,
    short_video,
    speech_job,
)

pytestmark = [pytest.mark.anyio, needs_proc]

VIDEO_S = 5.0
FORMS = {"json": "application/json", "stream": "text/event-stream"}

# The call at which a job is held, and the faults that hold it there; the mux is held by a slow ffmpeg.
HOLDS: dict[str, list[str]] = {
    "speech": ["speech"],
    "audio_upload": ["upload"],
    "create": ["create"],
    "video": ["poll"],
    "download": ["output"],
    "mux": [],
    "final_upload": ["upload", "upload"],
}
MADE = ("create", "video", "download", "mux", "final_upload")  # the stages with a prediction
PARTIAL = {  # what was paid for by then; a create in flight is awaited
    **dict.fromkeys(("speech", "audio_upload"), set[str]()),
    **dict.fromkeys(("create", "video"), {"audio_url", "prediction_id"}),
    **dict.fromkeys(
        ("download", "mux", "final_upload"), {"audio_url", "prediction_id", "video_url"}
    ),
}


class HoldingService:
    """A service and its sandbox, whose jobs can be held at a stage."""

    def __init__(
        self, sandbox: Sandbox, folder: Path, graceful_s: int = 10, mux_rate: float = 0.1
    ) -> None:
        self.sandbox, self.folder, self.slow_next = sandbox, folder / "tmp", folder / "slow-next"
        self.folder.mkdir(parents=True)
        # The real one; where `slow_next` exists, it reads the video no faster than it plays, times `mux_rate`
        ffmpeg = folder / "ffmpeg"
        real = imageio_ffmpeg.get_ffmpeg_exe()
        ffmpeg.write_text(
            f'#!/bin/sh\n/bin/rm "{self.slow_next}" 2>&- && exec "{real}" -readrate {mux_rate} "$@"\nexec "{real}" "$@"\n'
        )
        ffmpeg.chmod(0o755)
        changes = {"TMPDIR": str(self.folder), "IMAGEIO_FFMPEG_EXE": str(ffmpeg)}
        self.service = Service({**sandbox.environment(), **PACE, **changes}, graceful_s=graceful_s)

    def is_listening(self) -> bool:
        """Whether the service accepts connections."""
        with socket.socket() as service_client:
            return service_client.connect_ex(("127.0.0.1", self.service.port)) == 0

    def body(self) -> dict[str, Any]:
        """A speech job whose final video is as long as the model's."""
        return speech_job(self.sandbox, fit="video")

    def prepare(self, stage: str, seconds: float) -> None:
        """Let the next job be held at a stage for so many seconds."""
        for call in HOLDS[stage][:-1]:
            self.sandbox.fault(call, "slow", seconds=0)
        for call in HOLDS[stage][-1:]:
            self.sandbox.fault(call, "slow", seconds=seconds)
        if stage == "mux":
            self.slow_next.touch()

    def count(self, stage: str) -> int:
        """How many jobs have reached the stage so far; for the mux, whether ffmpeg runs slowly now."""
        if stage == "mux":
            return len(children(self.service.pid)) if not self.slow_next.exists() else 0
        return len(self.sandbox.calls(HOLDS[stage][-1]))

    def wanted(self, stage: str) -> int:
        """The count at which the next job is held at the stage."""
        return self.count(stage) + max(1, len(HOLDS[stage]))


# The client disconnects


@pytest.fixture(scope="module")
def running(
    running_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HoldingService]:
    """One service for all tests of disconnecting clients."""
    held = HoldingService(running_sandbox, tmp_path_factory.mktemp("leaving") / "service")
    with held.service:
        yield held


def request_bytes(body: dict[str, Any], accept: str) -> bytes:
    """A speech job as it is sent over the connection."""
    content = json.dumps(body).encode()
    head = f"Host: x\r\nAccept: {accept}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"POST /jobs_prompt_tts HTTP/1.1\r\n{head}\r\n\r\n".encode() + content


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", HOLDS)
async def test_a_disconnect_cancels_a_job_without_a_key(
    running: HoldingService, sandbox: Sandbox, stage: str, form: str
) -> None:
    """Within a second the prediction is cancelled, ffmpeg is reaped and every file removed; nothing more is paid for."""
    sandbox.video(short_video(VIDEO_S))
    running.prepare(stage, seconds=0.4 if stage == "create" else 3)
    if stage == "video":
        sandbox.outcome("never")
    wanted, log_before = running.wanted(stage), len(running.service.log)
    async with await anyio.connect_tcp("127.0.0.1", running.service.port) as connection:
        await connection.send(request_bytes(running.body(), FORMS[form]))
        assert await wait_until(lambda: running.count(stage) >= wanted)
        assert files_in(running.folder)
    left_at = time.monotonic()
    videos = sandbox.predictions.values()
    if stage in ("create", "video"):
        assert await wait_until(lambda: [video.status for video in videos] == ["canceled"], 1.5)
    assert await wait_until(
        lambda: children(running.service.pid) == files_in(running.folder) == [], 1
    )
    assert await wait_until(
        lambda: " job outcome=client_disconnected ms=" in running.service.log[log_before:], 1
    )
    assert time.monotonic() - left_at < (1.5 if stage == "create" else 1.0)
    request_count = len(sandbox.requests)
    await anyio.sleep(0.08)  # four polls
    assert len(sandbox.requests) == request_count
    assert len(sandbox.calls("cancel")) == (stage in ("create", "video"))
    assert len(videos) == (stage in MADE)


# Graceful shutdown


@dataclass
class HeldJob:
    """A job when its process was ended: its outcome, and the status of its prediction; None if there is none."""

    outcome: JobOutcome | None = None
    video: str | None = None


class EndedProcess(NamedTuple):
    """A process that was ended with a job at every stage; `is_closed`: it soon accepted no connections."""

    jobs: dict[str, HeldJob]
    code: int | None
    seconds: float
    is_closed: bool
    left: list[Any]
    log: str


EndedProcesses = dict[tuple[str, str], EndedProcess]


async def end_service(seen: EndedProcesses, folder: Path, patience: str, form: str) -> None:
    """Start a service, hold a job at every stage, and end it, with enough time or too little."""
    graceful_s, hold_s = (30, VIDEO_S) if patience == "enough" else (1, 20.0)
    with Sandbox() as sandbox:
        sandbox.video(short_video(VIDEO_S))
        held = HoldingService(
            sandbox, folder / f"{patience}-{form}", graceful_s, 1 if patience == "enough" else 0.1
        )
        await anyio.to_thread.run_sync(held.service.start)
        try:
            seen[patience, form] = await hold_and_end(held, hold_s, form)
        finally:
            await anyio.to_thread.run_sync(held.service.close)


async def hold_and_end(held: HoldingService, hold_s: float, form: str) -> EndedProcess:
    """Hold a job at every stage, send SIGTERM, and return what came of each."""
    jobs: dict[str, HeldJob] = {}

    async def job(held_job: HeldJob) -> None:
        held_job.outcome = await send_job(
            held.service.url, "/jobs_prompt_tts", held.body(), {"accept": FORMS[form]}
        )

    async with anyio.create_task_group() as tasks:
        for stage in reversed(HOLDS):  # the ones that take longest to get there first
            # A create in flight is awaited, to know which prediction to cancel.
            held.prepare(stage, hold_s if stage != "create" else min(hold_s, 4))
            wanted, known = held.wanted(stage), set(held.sandbox.predictions)
            jobs[stage] = HeldJob()
            tasks.start_soon(job, jobs[stage])
            assert await wait_until(lambda s=stage, n=wanted: held.count(s) >= n, 45), (
                f"no job stands at {stage}"
            )
            if stage in MADE:
                assert await wait_until(lambda known=known: set(held.sandbox.predictions) - known)
                [jobs[stage].video] = set(held.sandbox.predictions) - known
        assert all(held_job.outcome is None for held_job in jobs.values()), (
            "every job is still on its way"
        )
        ffmpegs, started = children(held.service.pid), time.monotonic()
        os.kill(held.service.pid, signal.SIGTERM)
        is_closed = await wait_until(lambda: not held.is_listening(), 2)
        code = await anyio.to_thread.run_sync(held.service.stop, 0)  # no further signal
        seconds = time.monotonic() - started
        for held_job in jobs.values():
            held_job.video = (
                held.sandbox.predictions[held_job.video].status if held_job.video else None
            )
        left = [*files_in(held.folder), *(pid for pid in ffmpegs if Path(f"/proc/{pid}").exists())]
    return EndedProcess(jobs, code, seconds, is_closed, left, held.service.log)


async def end_all_services(folder: Path) -> EndedProcesses:
    """Every combination of time and response form, all at once."""
    seen: EndedProcesses = {}
    async with anyio.create_task_group() as tasks:
        for patience in ("enough", "too little"):
            for form in FORMS:
                tasks.start_soon(end_service, seen, folder, patience, form)
    return seen


@pytest.fixture(scope="module", autouse=True)
def all_ended_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Future[EndedProcesses]]:
    """The four processes, ended while the tests before those that judge them run: most of it is waiting."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(anyio.run, end_all_services, tmp_path_factory.mktemp("endings"))


@pytest.fixture(scope="module")
def ended_processes(all_ended_processes: Future[EndedProcesses]) -> EndedProcesses:
    """What came of each of the four processes."""
    return all_ended_processes.result()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", HOLDS)
def test_a_job_finishes_within_the_graceful_shutdown(
    ended_processes: EndedProcesses, stage: str, form: str
) -> None:
    """SIGTERM with enough time: the client gets the video, and the prediction was never cancelled."""
    job = ended_processes["enough", form].jobs[stage]
    assert job.outcome
    assert (job.outcome.status, set(job.outcome.data)) == (200, RESULT_FIELDS), job.outcome.text
    assert job.video in (None, "succeeded")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", HOLDS)
def test_a_job_that_cannot_finish_is_cancelled_with_an_error(
    ended_processes: EndedProcesses, stage: str, form: str
) -> None:
    """SIGTERM with too little time: a 500 with `partial`, and the prediction is cancelled before the process ends."""
    job = ended_processes["too little", form].jobs[stage]
    assert job.outcome
    assert (job.outcome.kind[:2], job.outcome.data["provider"]) == ((500, "internal"), None), (
        job.outcome.text
    )
    assert "restarting" in job.outcome.data["detail"]
    assert set(job.outcome.data.get("partial", {})) == PARTIAL[stage]
    made = {"create": "canceled", "video": "canceled", "speech": None, "audio_upload": None}
    assert job.video == made.get(stage, "succeeded")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("patience", ["enough", "too little"])
def test_a_process_that_ends_leaves_nothing_behind(
    ended_processes: EndedProcesses, patience: str, form: str
) -> None:
    """No file, no ffmpeg and no traceback; it accepts no connection after the signal and ends soon after its jobs."""
    ended = ended_processes[patience, form]
    assert ended.is_closed, "the host sends new jobs to the next instance"
    assert ended.left == []
    assert "Traceback" not in ended.log
    assert ended.code in (0, -signal.SIGTERM)
    assert ended.seconds < 15


async def test_a_cancel_is_finished_after_the_graceful_shutdown(sandbox: Sandbox) -> None:
    """The prediction of a client that disconnected is cancelled, even if that takes longer than the process had."""
    sandbox.outcome("never")
    sandbox.fault("cancel", "status", times=2, status=503)
    environment = {**sandbox.environment(), **PACE, "RETRY_FIRST_SECONDS": "0.3"}
    with Service(environment, graceful_s=1) as service:
        async with await anyio.connect_tcp("127.0.0.1", service.port) as connection:
            await connection.send(request_bytes(speech_job(sandbox), FORMS["json"]))
            assert await wait_until(lambda: sandbox.calls("poll"))
            service.process.send_signal(signal.SIGTERM)
            await anyio.sleep(0.85)  # of the one second that is left
        assert await anyio.to_thread.run_sync(service.process.wait, 10) in (0, -signal.SIGTERM)
    assert [video.status for video in sandbox.predictions.values()] == ["canceled"]
    assert len(sandbox.calls("cancel")) == 3


@pytest.mark.parametrize("is_native", [True, False], ids=["Ctrl-C twice", "unwatched"])
async def test_the_end_of_the_lifespan_ends_every_job(settings: None, is_native: bool) -> None:
    """A job whose request has already ended is stopped too, and clients that still wait get the error."""
    job = main.Job("-", name="-")
    async with main.lifespan(main.app):
        main.app_state().jobs["-"] = job
        task = asyncio.create_task(main.run_job(job, asyncio.sleep(60)))
        await asyncio.sleep(0)
        if is_native:
            task.cancel()
            await asyncio.wait({task})
    await asyncio.wait({task}, timeout=1)
    assert "the service is restarting" in str(job.result).lower()
    assert (task.cancelled(), job.cancel_reason) == (is_native, None if is_native else "shutdown")


async def test_a_shutdown_does_not_wait_for_all_of_a_long_patience(
    settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job with a key is cancelled while the process still waits for it, whatever PATIENCE_SECONDS is."""
    monkeypatch.setenv("PATIENCE_SECONDS", "600")
    main.get_settings.cache_clear()
    assert main.MAX_DRAIN_S + main.MAX_RECORD_SAVE_S < main.SHUTDOWN_WAIT_S
    monkeypatch.setattr(main, "MAX_DRAIN_S", 0.1)
    monkeypatch.setattr(main, "SHUTDOWN_WAIT_S", 5.0)
    job = main.Job("-", name="-", log=main.JobLog("jobs/-", "0" * 64, "0" * 64))
    async with main.lifespan(main.app):
        main.app_state().jobs["-"] = job
        task = asyncio.create_task(main.run_job(job, asyncio.sleep(60)))
        await asyncio.sleep(0)
    await asyncio.wait({task}, timeout=1)
    assert job.cancel_reason == "shutdown"


async def test_the_deadline_begins_when_the_whole_request_has_come_in(
    sandbox: Sandbox, start_service: Any
) -> None:
    """A body that takes longer than JOB_TIMEOUT_SECONDS to arrive takes nothing from the job's time."""
    sandbox.video(short_video())
    service = start_service(JOB_TIMEOUT_SECONDS="3")
    body = json.dumps(prompt_job(sandbox)).encode()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:10]
        await anyio.sleep(3.1)
        yield body[10:]

    async with service_client(service.url) as client:
        headers = {"Content-Type": "application/json"}
        response = await client.post("/jobs_prompt_only", content=slowly(), headers=headers)
    assert response.status_code == 200, response.text


SLOW_LOOK_UP = """
import asyncio, socket, time
import main

def never(*args, **options):
    time.sleep(60)

async def look_up():
    socket.getaddrinfo = never
    backend = main.PublicOnlyBackend()
    await backend.connect_tcp("slow.example", 80, timeout=0.1)

try:
    asyncio.run(look_up())
except main.httpcore.ConnectTimeout:
    print("timed out")
"""


def test_a_name_look_up_does_not_hold_up_the_end_of_the_process() -> None:
    """A thread that still asks for a stranger's name is not waited for."""
    command = [sys.executable, "-c", SLOW_LOOK_UP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("timed out", 0)
