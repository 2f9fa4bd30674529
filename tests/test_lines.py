"""A crowd waits in line: who goes when a provider refuses calls as too many, and who leaves the line."""

import asyncio
import json
import logging
import math
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import httpx
import pytest
import respx

import main
from tests.conftest import StartService
from tests.sandbox import Sandbox, Service
from tests.sandbox.service import ROOT
from tests.support.application import provider_response, set_variables
from tests.support.requests import speech_job

REQUEST = httpx.Request("POST", "http://provider")
WAIT_S = 15.0
SIMULATION_TIMEOUT_S = 120.0


# The policy

# "+": a call succeeded; a figure: one was refused while so many others were under way
Outcomes = str

PACES = [  # the outcomes, how many go at once then, how many must succeed for one more
    ("a refusal while others are under way: as many", "9", 9, 72),
    ("each of a wave of refusals takes one away", "543", 3, 24),
    ("a refusal while none is under way: one asks again", "0", 1, 1),
    ("a success after that: one more", "0+", 2, 2),
    ("then one more each round", "0+++", 3, 3),
    ("and the next", "0++++++", 4, 4),
    ("a plan's slots are kept", "2" + 15 * "+", 2, 16),
    ("and one more is tried after eight rounds", "2" + 16 * "+", 3, 8),
    ("the next one after half as many", "2" + 24 * "+", 4, 4),
    ("a try that is refused costs one call", "2" + 16 * "+" + "2", 2, 16),
]


@pytest.mark.parametrize(
    ("outcomes", "at_once", "needed"), [pytest.param(*row[1:], id=row[0]) for row in PACES]
)
def test_how_many_go_at_once(outcomes: Outcomes, at_once: int, needed: int) -> None:
    """Fewer after a refusal, and one more for every so many successes."""
    pace = main.Pace(100, 1)
    for outcome in outcomes:
        if outcome == "+":
            pace = pace.after_success()
        else:
            pace = main.Pace.after_refusal(int(outcome))
    assert (pace.at_once, pace.needed) == (at_once, needed)


CROWDS = [  # at least so many are served, in so many seconds, with fewer refusals than
    ("300 speeches at once through ten slots", 300, 90, 300),  # 60 s at best
    ("50 speeches at once through three slots", 50, 51, 60),
    ("1,000 creates at once, 600 a minute", 1_000, 95, 200),
    ("1,000 creates in 10 s, 600 a minute", 1_000, 95, 200),
    ("8 creates at once, 6 a minute", 8, 80, 80),
    ("8 creates at once, one in 10 s", 8, 100, 80),
    ("100 creates at once, one in 10 s", 50, 600, 250),  # the others would come past the deadline
]


@pytest.fixture(scope="module")
def simulated() -> dict[str, dict[str, Any]]:
    """What tests.line_simulation measures on its virtual clock, by crowd."""
    command = [sys.executable, "-m", "tests.line_simulation"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SIMULATION_TIMEOUT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line["crowd"]: line for line in lines}


@pytest.mark.parametrize(
    ("crowd", "served", "most_s", "refusals"),
    [pytest.param(*row, id=row[0]) for row in CROWDS],
)
def test_a_crowd_on_a_virtual_clock(
    simulated: dict[str, dict[str, Any]], crowd: str, served: int, most_s: float, refusals: int
) -> None:
    """All are served soon and with few refusals; who would come too late is refused long before."""
    measured = simulated[crowd]
    assert measured["outcomes"]["done"] >= served
    assert "past the deadline" not in measured["outcomes"]
    assert measured["seconds"] <= most_s
    assert measured["refused"] < refusals
    assert measured["median_busy_s"] < 60
    assert measured["is_gone"]


# The line itself


class Slots:
    """A provider with so many slots; `done` holds the jobs in the order in which they were served."""

    def __init__(self, slots: int, steps: int = 3) -> None:
        self.free = slots
        self.steps = steps  # of the event loop that a call takes
        self.done: list[str] = []
        self.most = 0  # calls at once
        self.under_way = 0

    async def exchange(
        self, name: str, request: httpx.Request, max_bytes: int
    ) -> main.ProviderResponse:
        """Serve a call, or refuse it."""
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            if self.free == 0:
                return provider_response(429, '{"detail": "Too many."}')
            self.free -= 1
            try:
                for _ in range(self.steps):
                    await asyncio.sleep(0)
            finally:
                self.free += 1
            self.done.append(name)
            return provider_response(200, "{}")
        finally:
            self.under_way -= 1


def start_call(
    line: main.ProviderLine, slots: Slots, name: str, job: main.Job | None = None
) -> "asyncio.Task[None]":
    """Start a call that goes on, as send_with_retry does, while it is refused."""
    place = main.LinePlace(line, job or main.Job(name))
    exchange = partial(slots.exchange, name)

    async def call() -> None:
        response = await main.exchange_in_line(place, exchange, REQUEST, 0)
        while main.is_throttled(response):
            response = await main.exchange_in_line(place, exchange, REQUEST, 0)

    return asyncio.create_task(call())


def is_gone(line: main.ProviderLine) -> bool:
    """Return whether nobody is in line, or thought to be."""
    return line.pace is None and line.waiting == [] and line.under_way == 0


NAMES = [str(number) for number in range(8)]


@pytest.mark.anyio
@pytest.mark.usefixtures("settings")
async def test_nobody_waits_while_nothing_is_refused() -> None:
    """All go at once, whatever came before."""
    line, slots = main.ProviderLine("elevenlabs"), Slots(100)
    for _ in range(2):
        await asyncio.gather(*(start_call(line, slots, name) for name in NAMES * 10))
    assert slots.most == 80
    assert is_gone(line)


@pytest.mark.anyio
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("free", [1, 2, 3])
async def test_first_come_first_served(free: int) -> None:
    """Who was refused keeps the place that it came with, and all are served."""
    line, slots = main.ProviderLine("elevenlabs"), Slots(free)
    await asyncio.wait_for(
        asyncio.gather(*(start_call(line, slots, name) for name in NAMES)), WAIT_S
    )
    assert slots.done == NAMES
    assert is_gone(line)


@pytest.mark.anyio
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("victim", [0, 1, 2, 4, 7])
async def test_a_slot_is_never_lost_to_a_cancelled_job(
    monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """Cancelled at each step of its call, in line or under way, a job leaves room for all others."""
    # Who is not woken would look by itself only after the test has failed.
    set_variables(monkeypatch, PATIENCE_SECONDS="600")
    monkeypatch.setattr(main, "LINE_STEP_S", 2 * WAIT_S)
    for step in range(60):
        line, slots = main.ProviderLine("elevenlabs"), Slots(2)
        calls = [start_call(line, slots, name) for name in NAMES]
        for _ in range(step):
            await asyncio.sleep(0)
        was_done = calls[victim].done()
        calls[victim].cancel()
        await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), WAIT_S)
        assert calls[victim].cancelled() or was_done or NAMES[victim] in slots.done
        others = [name for name in slots.done if name != NAMES[victim]]
        assert others == [name for name in NAMES if name != NAMES[victim]], step
        assert is_gone(line)


@pytest.mark.anyio
@pytest.mark.usefixtures("settings")
async def test_a_slot_is_never_lost_to_a_broken_connection() -> None:
    """A call that has no response makes room for the next."""
    line, slots = main.ProviderLine("elevenlabs"), Slots(1)

    async def break_off(request: httpx.Request, max_bytes: int) -> main.ProviderResponse:
        await asyncio.sleep(0)
        raise httpx.ReadError("reset")

    place = main.LinePlace(line, main.Job("broken"))
    broken = asyncio.create_task(main.exchange_in_line(place, break_off, REQUEST, 0))
    calls = [start_call(line, slots, name) for name in NAMES]
    await asyncio.wait_for(asyncio.gather(*calls), WAIT_S)
    assert isinstance(broken.exception(), httpx.ReadError)
    assert is_gone(line)


@pytest.mark.anyio
@pytest.mark.usefixtures("settings")
async def test_a_cancelled_job_does_not_call_again() -> None:
    """A job that was cancelled during a call that is refused, as creates are shielded, makes no other."""
    line, calls = main.ProviderLine("replicate"), 0

    async def refuse(request: httpx.Request, max_bytes: int) -> main.ProviderResponse:
        nonlocal calls
        calls += 1
        scope.cancel()
        return provider_response(429)

    place = main.LinePlace(line, main.Job("-"))
    with anyio.CancelScope() as scope:
        while True:
            await main.exchange_in_line(place, refuse, REQUEST, 0)
    assert calls == 1
    assert is_gone(line)


@pytest.mark.anyio
async def test_the_first_in_line_asks_when_the_provider_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not before, and the others behind it."""
    set_variables(monkeypatch)
    line, asked_at = main.ProviderLine("replicate"), list[float]()

    async def refuse_once(request: httpx.Request, max_bytes: int) -> main.ProviderResponse:
        asked_at.append(time.monotonic())
        if len(asked_at) == 1:
            return provider_response(429, '{"retry_after": 0.3}')
        return provider_response(201)

    place = main.LinePlace(line, main.Job("first"))
    await main.exchange_in_line(place, refuse_once, REQUEST, 0)
    behind = asyncio.create_task(
        main.exchange_in_line(main.LinePlace(line, main.Job("-")), refuse_once, REQUEST, 0)
    )
    await main.exchange_in_line(place, refuse_once, REQUEST, 0)
    await behind
    assert 0.3 <= asked_at[1] - asked_at[0] < 2
    assert asked_at[2] >= asked_at[1]


@pytest.mark.anyio
@pytest.mark.usefixtures("settings")
async def test_a_new_line_begins_with_the_first_backoff() -> None:
    """How often calls were refused in the line before does not count."""
    line = main.ProviderLine("replicate")
    answers = iter([429, 429, 429, 201] * 2)

    async def answer(request: httpx.Request, max_bytes: int) -> main.ProviderResponse:
        return provider_response(next(answers))

    for _ in range(2):
        place = main.LinePlace(line, main.Job("-"))
        await main.exchange_in_line(place, answer, REQUEST, 0)
        assert line.refusals_in_a_row == 1
        for _ in range(3):
            await main.exchange_in_line(place, answer, REQUEST, 0)
        assert is_gone(line)


@pytest.mark.anyio
async def test_each_refusal_in_a_row_doubles_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that does not say how long to wait is asked less and less often."""
    set_variables(monkeypatch, RETRY_FIRST_SECONDS="0.1")
    line, pauses_s = main.ProviderLine("replicate"), list[float]()

    async def refuse(request: httpx.Request, max_bytes: int) -> main.ProviderResponse:
        return provider_response(429)

    place = main.LinePlace(line, main.Job("-"))
    for _ in range(3):
        await main.exchange_in_line(place, refuse, REQUEST, 0)
        pauses_s.append(line.paused_until - line.refused_at)
    for pause_s, longest_s in zip(pauses_s, (0.1, 0.2, 0.4), strict=True):
        assert 0.75 * longest_s <= pause_s <= longest_s


BUSY = [  # seconds that the provider asks, jobs before, what the job has left in seconds, the refusal
    ("in time", 0, 10, 60, None),
    ("the line is too long", 0, 100, 60, 40),
    ("the pause is too long", 90, 0, 60, 30),
    ("for ever", math.inf, 0, 60, 3_600),
    ("the next one goes at once", 0, 0, 0.5, None),
]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("pause_s", "ahead", "left_s", "retry_after_s"),
    [pytest.param(*row[1:], id=row[0]) for row in BUSY],
)
async def test_who_would_come_too_late_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, pause_s: float, ahead: int, left_s: float, retry_after_s: float
) -> None:
    """By the line's present speed, here one in a second, or by the provider's own word."""
    set_variables(monkeypatch, JOB_TIMEOUT_SECONDS="600")
    now = time.monotonic()
    line = main.ProviderLine("elevenlabs")
    line.pace = main.Pace(1, 1)
    line.busy_since = now - 10
    line.turn_ends.extend(now - age_s for age_s in range(10))
    line.paused_until = now + pause_s
    line.last_refusal = "429: Too many."
    job = main.Job("-", started_at=now - 600 + left_s)
    if retry_after_s is None:
        line.check_turn(job, ahead)
        return
    with pytest.raises(main.ProviderBusy, match="429: Too many") as caught:
        line.check_turn(job, ahead)
    error = caught.value
    assert float(error.headers["Retry-After"]) == pytest.approx(retry_after_s, abs=1)
    assert (error.http_status, error.category, error.retryable) == (500, "provider", True)


# The calls that wait in line


HAILUO = "https://api.replicate.com/v1/models/minimax/hailuo-02/predictions"
MP3 = httpx.Response(200, content=b"ID3" + bytes(100))
CREATED = httpx.Response(201, json={"id": "p1", "status": "starting"})
DONE = httpx.Response(
    200, json={"id": "p1", "status": "succeeded", "output": "https://replicate.delivery/video.mp4"}
)


@pytest.fixture
async def providers(settings: None) -> AsyncIterator[respx.MockRouter]:
    """The edge of a running application: what a test does not route fails it."""
    async with main.lifespan(main.app):
        with respx.mock(assert_all_called=False) as router:
            yield router


@pytest.mark.anyio
async def test_a_speech_is_refused_for_longer_than_a_minute(providers: respx.MockRouter) -> None:
    """It waits in line up to the job's deadline: 429 costs nothing."""
    use_settings_patience = main.get_settings().patience_seconds
    assert use_settings_patience < 1  # which took the place of two minutes, half of it the limit
    refused = [httpx.Response(429)] * 16
    route = providers.post(url__regex="text-to-speech").mock(side_effect=[*refused, MP3])
    assert await main.elevenlabs_tts_bytes("Hello", "voice") == MP3.content
    assert route.call_count == 17


@pytest.mark.anyio
async def test_a_create_is_refused_for_longer_than_a_minute(providers: respx.MockRouter) -> None:
    """It waits in line up to the job's deadline: 429 costs nothing."""
    refused = [httpx.Response(429)] * 16
    route = providers.post(HAILUO).mock(side_effect=[*refused, CREATED])
    providers.get(url__regex="/v1/predictions/p1").mock(return_value=DONE)
    body = main.JobPromptOnly(image_url="https://pets.example/pet.jpg", prompt="Talk")
    assert await main.hailuo_video_from_prompt(body) == "https://replicate.delivery/video.mp4"
    assert route.call_count == 17


@pytest.mark.anyio
async def test_the_log_says_when_a_line_forms_and_when_it_is_gone(
    providers: respx.MockRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """One line each, however many were refused."""
    caplog.set_level(logging.INFO)
    refused = [httpx.Response(429, json={"detail": {"message": "Too many."}})] * 5
    providers.post(url__regex="text-to-speech").mock(side_effect=[*refused, MP3])
    await main.elevenlabs_tts_bytes("Hello", "voice")
    lines = [record.getMessage() for record in caplog.records if record.name == "talking_pet"]
    assert len(lines) == 2
    assert lines[0].endswith("a line forms at elevenlabs: 429: Too many.")
    assert lines[1].partition("the line at elevenlabs is gone: ")[2].endswith("refusals=5")


# The running service


class EventStream:
    """A job's events, read in a thread; `events` holds them as they come."""

    def __init__(self, service: Service, job: dict[str, Any], **headers: str) -> None:
        self.service = service
        self.job = job
        self.headers = {"Accept": "text/event-stream", **headers}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.response: httpx.Response | None = None
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        """Read to the end, or until the connection is closed."""
        client = httpx.Client(timeout=WAIT_S, trust_env=False)
        url = f"{self.service.url}/jobs_prompt_tts"
        with suppress(httpx.HTTPError, RuntimeError), client:
            with client.stream("POST", url, json=self.job, headers=self.headers) as response:
                self.response = response
                name = ""
                for line in response.iter_lines():
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        self.events.append((name, json.loads(line.removeprefix("data: "))))

    @property
    def queued(self) -> list[int]:
        """How many were ahead, by the events so far."""
        queued = [data for _, data in self.events if data.get("status") == "queued"]
        return [data["ahead"] for data in queued]

    def disconnect(self) -> None:
        """Close the connection."""
        assert self.response is not None
        stream = self.response.extensions["network_stream"]
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self.thread.join(WAIT_S)


def wait_until(condition: Callable[[], Any]) -> None:
    """Return once a condition holds."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_the_client_sees_how_many_are_ahead(sandbox: Sandbox, service: Service) -> None:
    """Events of the stage say `queued`, until the turn comes; the job then goes on as ever."""
    sandbox.fault("speech", "status", status=429, headers={"Retry-After": "3"})
    first = EventStream(service, speech_job(sandbox))
    wait_until(lambda: first.queued)
    second = EventStream(service, speech_job(sandbox))
    wait_until(lambda: second.queued)
    first.thread.join(WAIT_S)
    second.thread.join(WAIT_S)
    assert first.queued[0] == 0
    assert second.queued[0] == 1
    for stream in (first, second):
        assert stream.events[-1][0] == "result"
        states = [(data["state"], data.get("status")) for _, data in stream.events[:-1]]
        assert states[:2] == [("started", None), ("progress", "queued")]
        assert states[states.index(("done", None)) - 1] == ("progress", None)


def test_a_crowd_comes_through_a_plans_slots(sandbox: Sandbox, service: Service) -> None:
    """Over real sockets: all are served, with fewer refusals than jobs."""
    sandbox.speech_slots = 2
    sandbox.speech_delay_s = 0.4
    streams = [EventStream(service, speech_job(sandbox)) for _ in range(12)]
    for stream in streams:
        stream.thread.join(4 * WAIT_S)
    assert [stream.events[-1][0] for stream in streams] == ["result"] * 12
    assert sandbox.speeches.total() == 12
    assert 0 < len(sandbox.calls("speech")) - 12 < 12 + 6


def test_server_timing_names_the_time_in_line(sandbox: Sandbox, service: Service) -> None:
    """In milliseconds, beside the stage in which the job waited; not named by a job that did not."""
    sandbox.fault("create", "status", status=429, headers={"Retry-After": "1"})
    url = f"{service.url}/jobs_prompt_tts"
    waited = httpx.post(url, json=speech_job(sandbox), timeout=WAIT_S, trust_env=False)
    at_once = httpx.post(url, json=speech_job(sandbox), timeout=WAIT_S, trust_env=False)
    entries = dict(entry.split(";dur=") for entry in waited.headers["server-timing"].split(", "))
    assert 1_000 <= float(entries["queued"]) <= float(entries["video"])
    assert "queued" not in at_once.headers["server-timing"]


def test_who_cannot_get_a_turn_is_refused_at_once(sandbox: Sandbox, service: Service) -> None:
    """500 with Retry-After, before anything is paid for, and within what JavaScript may read."""
    sandbox.fault("speech", "status", status=429, headers={"Retry-After": "3600"})
    response = httpx.post(
        f"{service.url}/jobs_prompt_tts",
        json=speech_job(sandbox),
        headers={"Origin": "https://pets.example"},
        timeout=WAIT_S,
        trust_env=False,
    )
    error = response.json()
    assert (response.status_code, error["category"], error["provider"]) == (
        500,
        "provider",
        "elevenlabs",
    )
    assert error["retryable"]
    assert 2_000 < int(response.headers["retry-after"]) <= 3_600
    assert "Retry-After" in response.headers["access-control-expose-headers"]
    assert not sandbox.speeches
    assert not sandbox.predictions


@pytest.mark.anyio
async def test_a_full_line_is_seen_before_the_speech_is_paid_for(
    providers: respx.MockRouter,
) -> None:
    """While creates wait longer than a job may last, no speech is made for one more."""
    line = main.app_state().create_line
    line.pace = main.Pace(1, 1)
    line.paused_until = time.monotonic() + 3_600
    body = {
        "image_url": "https://pets.example/pet.jpg",
        "prompt": "Talk",
        "text": "Hello",
        "voice_id": "voice",
    }
    transport = httpx.ASGITransport(main.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        response = await client.post("/jobs_prompt_tts", json=body)
    assert response.status_code == 500
    assert response.json()["provider"] == "replicate"
    assert int(response.headers["retry-after"]) > 2_000
    assert not providers.calls


def test_who_disconnects_leaves_the_line_at_once(
    sandbox: Sandbox, start_service: StartService
) -> None:
    """Without a key, and nothing was paid for."""
    sandbox.fault("speech", "status", times=None, status=429, headers={"Retry-After": "60"})
    service = start_service()
    stream = EventStream(service, speech_job(sandbox))
    wait_until(lambda: stream.queued)
    stream.disconnect()
    wait_until(lambda: "the line at elevenlabs is gone" in service.log)
    assert len(sandbox.calls("speech")) == 1


def test_a_job_in_line_ends_with_the_service(sandbox: Sandbox, start_service: StartService) -> None:
    """At the end of the process it leaves the line, and its client gets an error."""
    sandbox.fault("speech", "status", times=None, status=429, headers={"Retry-After": "60"})
    service = start_service(graceful_s=1)
    stream = EventStream(service, speech_job(sandbox))
    wait_until(lambda: stream.queued)
    service.stop()
    stream.thread.join(WAIT_S)
    assert stream.events[-1][0] == "error"
    assert "the line at elevenlabs is gone" in service.log


def test_a_job_in_line_shows_that_it_is_alive(
    sandbox: Sandbox, start_service: StartService
) -> None:
    """With a key it renews its record well within LEASE_SHARE: another instance must not take over."""
    service = start_service(PATIENCE_SECONDS="4")  # so the lease is a second
    sandbox.fault("speech", "status", status=429, headers={"Retry-After": "3"})
    stream = EventStream(service, speech_job(sandbox), **{"Idempotency-Key": uuid.uuid4().hex})
    stream.thread.join(WAIT_S)
    assert stream.events[-1][0] == "result"
    speeches = [call.at for call in sandbox.calls("speech")]
    writes = [call.at for call in sandbox.calls("upload") if "/jobs/" in call.path]
    meanwhile = [at for at in writes if speeches[0] <= at <= speeches[1]]
    gaps = [later - earlier for earlier, later in pairwise(meanwhile)]
    assert len(meanwhile) >= 3
    assert max(gaps) < 1
