"""Hundreds of jobs in one process, most of them with a fault: afterwards it holds what it held before."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

import main
from tests.conftest import PACE
from tests.sandbox import Sandbox, Service
from tests.support import processes, requests
from tests.support.application import running_application

pytestmark = pytest.mark.anyio

ROUNDS, WARM_UP_ROUNDS, AT_ONCE = 5, 2, 8
QUICK = {
    **PACE,
    "POLL_MIN_SECONDS": "0.005",
    "RETRY_FIRST_SECONDS": "0.005",
    "PATIENCE_SECONDS": "0.6",
}
# Asyncio's own, which grows to its size as it is used
THREAD_POOL = min(32, (os.cpu_count() or 1) + 4)
GROWTH_KB = 4_000  # a job that kept 14 kB for good would show


@pytest.fixture(scope="module")
def instant() -> Iterator[Sandbox]:
    """A sandbox that answers as fast as it can and keeps no record."""
    with Sandbox(record=False, polls_to_finish=1) as sandbox:
        yield sandbox


def plan_faults(sandbox: Sandbox) -> None:
    """Faults for a round of a hundred jobs, in the order in which they are met."""
    sandbox.reset()
    sandbox.video(requests.short_video())
    for call in ("speech", "upload", "public", "create", "list", "poll", "output"):
        sandbox.fault(call, "status", times=2, status=429, headers={"retry-after": "0"})
        for kind in ("cut", "halfway", "lost", "behind", "html", "html", "malformed", "empty"):
            sandbox.fault(call, kind)
        sandbox.fault(call, "status", times=2, status=403)
    # A refused HEAD; the GET that follows is not read to its end.
    sandbox.fault("picture", "status", times=10, status=405)
    # A process polls 40 times a second: fewer videos, less time
    sandbox.fault("create", "status", times=40, status=422)
    for status in ("failed", "aborted", "succeeded", "canceled", "succeeded"):
        sandbox.outcome(status, times=4)


def requests_of_a_round(sandbox: Sandbox) -> list[dict[str, Any]]:
    """A hundred requests: speech or none, either form, a client that stays or leaves, input that is good or bad."""
    talking = {"url": "/jobs_prompt_tts", "json": requests.speech_job(sandbox)}
    silent = {"url": "/jobs_prompt_only", "json": requests.prompt_job(sandbox)}
    streamed = {**silent, "headers": requests.EVENT_STREAM}
    bad = {**talking, "json": {**talking["json"], "seconds": 7}}
    left = {**silent, "timeout": 0.01}
    other = {**silent, "json": requests.prompt_job(sandbox, model="kwaivgi/kling-v2.1")}
    look = {"url": "/debug/head", "json": {"url": sandbox.image_url}}
    return [
        talking,
        silent,
        streamed,
        left,
        silent,
        bad,
        look,
        other,
        bad,
        {**talking, "timeout": 0.03},
    ] * 10


async def run_round(client: httpx.AsyncClient, sandbox: Sandbox) -> Counter[str]:
    """A hundred jobs, some at a time; how many ended how."""
    plan_faults(sandbox)
    waiting, outcomes = requests_of_a_round(sandbox), Counter[str]()

    async def work() -> None:
        while waiting:
            try:
                response = await client.post(**waiting.pop())
            except httpx.TimeoutException:
                outcomes["left"] += 1
                continue
            outcomes[str(response.status_code)] += 1
            assert '"internal"' not in response.text, response.text

    async with anyio.create_task_group() as tasks:
        for _ in range(AT_ONCE):
            tasks.start_soon(work)
    return outcomes


def held_by(pid: int) -> dict[str, int]:
    """What a process holds now; its memory in kB."""
    files, sockets = len(processes.open_files(pid)), processes.socket_count(pid)
    process = {
        "threads": processes.status_number(pid, "Threads"),
        "memory": processes.status_number(pid, "VmRSS"),
    }
    return {"files": files - sockets, "sockets": sockets, **process}


@processes.needs_proc
async def test_hundreds_of_jobs_leave_nothing_behind(instant: Sandbox, tmp_path: Path) -> None:
    """Memory, open files, connections and threads are as before; no child process and no file is left."""
    outcomes = Counter[str]()
    with Service({**instant.environment(), **QUICK, "TMPDIR": str(tmp_path)}) as service:
        async with requests.service_client(service.url) as client:
            for round_number in range(ROUNDS):
                if round_number == WARM_UP_ROUNDS:
                    before = held_by(service.pid)
                outcomes += await run_round(client, instant)
            assert await processes.wait_until(
                lambda: not processes.children(service.pid) and not processes.files_in(tmp_path)
            )
            after = held_by(service.pid)
        assert "Traceback" not in service.log
        assert "never retrieved" not in service.log
    assert outcomes.total() == 100 * ROUNDS
    assert min(outcomes[outcome] for outcome in ("200", "400", "500", "left")) >= 5 * ROUNDS, (
        outcomes
    )
    assert after["files"] == before["files"]
    assert after["sockets"] <= 3 * AT_ONCE, "what its pool keeps open for the next jobs"
    assert after["threads"] <= 5 + THREAD_POOL
    assert after["memory"] <= before["memory"] + GROWTH_KB


async def test_jobs_leave_no_task_behind(instant: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a round of jobs the event loop has the tasks that it had before."""
    for name, value in {**instant.environment(), **QUICK}.items():
        monkeypatch.setenv(name, value)
    main.get_settings.cache_clear()
    before = len(asyncio.all_tasks())
    async with running_application() as client:
        await run_round(client, instant)
        assert await processes.wait_until(lambda: len(asyncio.all_tasks()) == before, 1), (
            asyncio.all_tasks()
        )
