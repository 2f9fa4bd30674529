"""A job told as it happens: the event stream over real sockets, beside the plain JSON answer of the same route."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import anyio
import anyio.abc
import httpx
import pytest

from tests.jobs import EVENT_STREAM, STAGES, Event, all_events, caller, prompt_job, short_film, speech_job
from tests.sandbox import Sandbox, Service

pytestmark = pytest.mark.anyio

VIDEO_S = 1.0


@pytest.fixture(scope="module")
def film() -> bytes:
    """A small film."""
    return short_film()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running service."""
    async with caller(service.url) as client:
        yield client


class Paced(NamedTuple):
    """A speech job whose film took VIDEO_S, in both forms; times are those of one clock."""

    events: list[Event]
    events_s: float
    created_at: float
    fetched_at: float
    timings: dict[str, float]
    """Server-Timing of the JSON form, in milliseconds."""
    timings_s: float

    def share_missing(self) -> float:
        """The part of either job's time that no stage accounts for: the greater of both."""
        done = [told["seconds"] for told in stages(self.events) if told["state"] == "done"]
        return max(abs(1 - sum(done) / self.events_s), abs(1 - sum(self.timings.values()) / 1000 / self.timings_s))


@pytest.fixture(scope="module")
def paced(running_sandbox: Sandbox, running_service: Service, film: bytes) -> Paced:
    """The two jobs, each by itself; once more if the machine was busy with something else."""
    first = anyio.run(run_paced, running_sandbox, running_service, film)
    if first.share_missing() <= 0.05:
        return first
    second = anyio.run(run_paced, running_sandbox, running_service, film)
    return min(first, second, key=Paced.share_missing)


async def run_paced(sandbox: Sandbox, service: Service, film: bytes) -> Paced:
    """Run both jobs."""
    sandbox.reset()
    sandbox.film(film)
    sandbox.video_seconds = VIDEO_S
    async with caller(service.url) as client:
        started = time.monotonic()
        events = await all_events(client, "/jobs_prompt_tts", speech_job(sandbox))
        events_s = time.monotonic() - started
        [create], [fetched] = sandbox.calls("create"), sandbox.calls("output")
        started = time.monotonic()
        response = await client.post("/jobs_prompt_tts", json=speech_job(sandbox))
        timings_s = time.monotonic() - started
    told = re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])
    timings = {stage: float(milliseconds) for stage, milliseconds in told}
    return Paced(events, events_s, create.at, fetched.at, timings, timings_s)


def stages(events: list[Event]) -> list[dict[str, Any]]:
    """The data of the stage events."""
    return [event.data for event in events if event.name == "stage"]


def names(events: list[Event]) -> list[str]:
    """The events' names without comments."""
    return [event.name for event in events if event.name != "comment"]


# What is told


async def test_stages_are_told_in_order(client: httpx.AsyncClient, sandbox: Sandbox, film: bytes) -> None:
    """Each stage starts and is done before the next one starts; the result comes last."""
    sandbox.film(film)
    events = await all_events(client, "/jobs_prompt_tts", speech_job(sandbox))
    changes = list(dict.fromkeys((told["stage"], told["state"]) for told in stages(events)))
    assert changes == [(stage, state) for stage in STAGES for state in ("started", "done")]
    assert names(events)[-1] == "result"
    assert names(events).count("result") == 1


async def test_a_silent_film_has_one_stage(client: httpx.AsyncClient, sandbox: Sandbox, film: bytes) -> None:
    """A prompt-only job tells of its video and its result, as the JSON form answers it."""
    sandbox.film(film)
    events = await all_events(client, "/jobs_prompt_only", prompt_job(sandbox))
    [prediction] = sandbox.predictions
    assert {told["stage"] for told in stages(events)} == {"video"}
    assert events[-1].text == json.dumps(
        {"video_url": f"{sandbox.url}/delivery/{prediction}/output.mp4"}, separators=(",", ":")
    )


async def test_a_speaking_model_has_no_mux(client: httpx.AsyncClient, sandbox: Sandbox, film: bytes) -> None:
    """Where nothing is muxed, nothing is told of it."""
    sandbox.film(film)
    events = await all_events(client, "/jobs_prompt_tts", speech_job(sandbox, model="wan-video/wan-2.5-i2v"))
    done = [told["stage"] for told in stages(events) if told["state"] == "done"]
    assert done == [stage for stage in STAGES if stage != "mux"]


def test_the_films_status_and_percent_are_passed_on(paced: Paced) -> None:
    """Between start and end the video stage tells what Replicate tells, and nothing else has a status."""
    told = stages(paced.events)
    videos = [one for one in told if one["stage"] == "video" and "status" in one]
    assert list(dict.fromkeys(one["status"] for one in videos)) == ["starting", "processing", "succeeded"]
    percents = [one["percent"] for one in videos if "percent" in one]
    assert percents == sorted(percents)
    assert len(set(percents)) > 3
    assert percents[-1] == 100
    assert all({"status", "percent"}.isdisjoint(one) for one in told if one["stage"] != "video")


async def test_the_result_is_the_json_answer(client: httpx.AsyncClient, sandbox: Sandbox, film: bytes) -> None:
    """Both forms write the same model, byte for byte, but for the addresses of the two jobs' own files."""
    sandbox.film(film)
    answer = await client.post("/jobs_prompt_tts", json=speech_job(sandbox))
    result = (await all_events(client, "/jobs_prompt_tts", speech_job(sandbox)))[-1].text
    own = re.compile(r"[0-9a-f-]{36}|/delivery/\w+")
    assert own.sub("*", result) == own.sub("*", answer.text)
    assert result == json.dumps(json.loads(result), separators=(",", ":"))


async def test_stage_events_keep_the_contract(client: httpx.AsyncClient, sandbox: Sandbox, film: bytes) -> None:
    """Every event is `stage` with known fields, then one `result`; a comment is all that comes beside them."""
    sandbox.film(film)
    events = await all_events(client, "/jobs_prompt_tts", speech_job(sandbox))
    assert set(names(events)) == {"stage", "result"}
    for told in stages(events):
        assert {"stage", "state", "seconds"} <= set(told) <= {"stage", "state", "seconds", "status", "percent"}
        assert told["seconds"] >= 0


async def test_the_stream_has_the_headers_of_a_stream(client: httpx.AsyncClient, sandbox: Sandbox, film: bytes) -> None:
    """It is neither kept nor held back on its way, and a page of another origin can read it."""
    sandbox.film(film)
    headers = {**EVENT_STREAM, "Origin": "https://app.example.com", "X-Request-ID": "a-stream"}
    response = await client.post("/jobs_prompt_only", json=prompt_job(sandbox), headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["x-request-id"] == "a-stream"
    assert "content-length" not in response.headers


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        pytest.param("text/event-stream", True, id="events"),
        pytest.param("Text/Event-Stream", True, id="events, in other letters"),
        pytest.param("text/event-stream, application/json;q=0.5", True, id="events first"),
        pytest.param("application/json", False, id="JSON"),
        pytest.param("*/*", False, id="anything"),
        pytest.param("text/html", False, id="something else"),
    ],
)
async def test_the_client_chooses_the_form(
    client: httpx.AsyncClient, sandbox: Sandbox, film: bytes, accept: str, is_stream: bool
) -> None:
    """Events for those who ask for them, JSON for all others."""
    sandbox.film(film)
    response = await client.post("/jobs_prompt_only", json=prompt_job(sandbox), headers={"accept": accept})
    assert response.headers["content-type"].startswith("text/event-stream") == is_stream


# When it is told


def test_events_come_as_they_happen(paced: Paced) -> None:
    """Each stage's start is there before the provider has done the work, its end soon after."""
    events = [event for event in paced.events if event.name == "stage"]
    came = {(event.data["stage"], event.data["state"]): event.at for event in reversed(events)}
    assert came["speech", "started"] < paced.created_at
    assert came["video", "started"] == pytest.approx(paced.created_at, abs=0.25)
    assert came["video", "done"] - paced.created_at == pytest.approx(VIDEO_S, abs=0.4)
    assert came["download", "started"] == pytest.approx(paced.fetched_at, abs=0.25)
    videos = [event.at for event in events if event.data["stage"] == "video"]
    assert max(later - sooner for sooner, later in zip(videos, videos[1:], strict=False)) < VIDEO_S / 2


def test_stages_tell_their_seconds(paced: Paced) -> None:
    """A stage's seconds count from its start and are those between its two events."""
    started: dict[str, float] = {}
    for event in paced.events:
        if event.name == "stage":
            since = event.at - started.setdefault(event.data["stage"], event.at)
            assert event.data["seconds"] == pytest.approx(since, abs=0.2)
    first = [told for told in stages(paced.events) if told["state"] == "started" and "status" not in told]
    assert {told["seconds"] for told in first} == {0}


def test_the_stages_sum_up_to_the_jobs_time(paced: Paced) -> None:
    """In either form, at most a twentieth of the time lies outside of the stages."""
    assert paced.share_missing() <= 0.05


def test_server_timing_says_the_same(paced: Paced) -> None:
    """The JSON answer's header has the stages of the stream, with the same video."""
    done = {told["stage"]: told["seconds"] for told in stages(paced.events) if told["state"] == "done"}
    assert tuple(paced.timings) == tuple(done) == STAGES
    assert paced.timings["video"] / 1000 == pytest.approx(done["video"], abs=0.3)


# How it ends


@pytest.mark.parametrize(
    ("spoil", "status", "category", "done"),
    [
        pytest.param(lambda s: s.fault("speech", "status", status=401), 500, "provider", 0, id="no speech"),
        pytest.param(lambda s: s.fault("create", "empty"), 500, "provider", 2, id="no prediction"),
        pytest.param(lambda s: s.outcome("failed", "No face."), 400, "provider", 2, id="the film fails"),
        pytest.param(lambda s: s.fault("output", "status", status=403), 500, "resource", 3, id="no film to fetch"),
        pytest.param(lambda s: s.film("noise"), 500, "resource", None, id="the film is no film"),
        pytest.param(
            lambda s: setattr(s.buckets["pets"], "allowed_mime_types", ["audio/mpeg"]), 500, "resource", 5, id="no room"
        ),
    ],
)
async def test_a_failure_is_told_once_and_last(
    client: httpx.AsyncClient,
    sandbox: Sandbox,
    film: bytes,
    spoil: Callable[[Sandbox], object],
    status: int,
    category: str,
    done: int | None,
) -> None:
    """One `error` with the JSON form's body and its status ends the stream; the failed stage is not done."""
    sandbox.film(film)
    spoil(sandbox)
    headers = {"X-Request-ID": "one-that-fails"}
    async with client.stream(
        "POST", "/jobs_prompt_tts", json=speech_job(sandbox), headers={**EVENT_STREAM, **headers}
    ) as response:
        body = (await response.aread()).decode()
    assert response.status_code == 200
    sandbox.reset()
    sandbox.film(film)
    spoil(sandbox)
    plain = await client.post("/jobs_prompt_tts", json=speech_job(sandbox), headers=headers)
    assert re.findall(r"^event: (?!stage)(\w+)$", body, re.MULTILINE) == ["error"]
    error = json.loads(re.findall(r"^data: (.*)$", body, re.MULTILINE)[-1])
    assert (
        (error.pop("status"), error["category"]) == (plain.status_code, plain.json()["category"]) == (status, category)
    )
    assert error.keys() == plain.json().keys()
    assert (error["detail"], error["request_id"]) == (plain.json()["detail"], "one-that-fails")
    assert error.get("partial", {}).keys() == plain.json().get("partial", {}).keys()
    assert done is None or body.count('"state":"done"') == done


@pytest.mark.parametrize(
    ("path", "changes", "status"),
    [
        pytest.param("/jobs_prompt_tts", {"text": ""}, 400, id="a blank text"),
        pytest.param("/jobs_prompt_tts", {"text": "x" * 601}, 400, id="a long text"),
        pytest.param("/jobs_prompt_only", {"seconds": 7}, 400, id="seconds that the model does not make"),
        pytest.param("/jobs_prompt_only", {"model": "nobody/nothing"}, 400, id="no such model"),
        pytest.param("/jobs_prompt_only", {"image_url": "file:///etc/passwd"}, 400, id="no URL"),
        pytest.param("/nothing", {}, 404, id="no such route"),
    ],
)
async def test_what_cannot_begin_is_refused_in_json(
    client: httpx.AsyncClient, sandbox: Sandbox, path: str, changes: dict[str, Any], status: int
) -> None:
    """An input error is a plain answer with its status, also for those who asked for events."""
    response = await client.post(path, json=speech_job(sandbox, **changes), headers=EVENT_STREAM)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert response.json()["category"] in ("validation", "provider")


async def test_a_late_job_ends_with_one_error(sandbox: Sandbox) -> None:
    """The deadline is told in the stream, and the film is cancelled."""
    sandbox.outcome("never")
    with Service({**sandbox.environment(), "POLL_MIN_SECONDS": "0.02", "JOB_TIMEOUT_SECONDS": "1"}) as short:
        async with caller(short.url) as client:
            events = await all_events(client, "/jobs_prompt_only", prompt_job(sandbox))
    assert names(events).count("error") == 1
    assert (events[-1].name, events[-1].data["status"]) == ("error", 500)
    assert "not done after 1 s" in events[-1].data["detail"]
    assert [prediction.status for prediction in sandbox.predictions.values()] == ["canceled"]


# Silence


@asynccontextmanager
async def impatient_proxy(port: int, patience_s: float) -> AsyncIterator[str]:
    """The URL of a proxy in front of a local port that cuts a connection over which no answer comes for so long."""

    async def serve(client: anyio.abc.SocketStream) -> None:
        async with client, await anyio.connect_tcp("127.0.0.1", port) as server, anyio.create_task_group() as tasks:

            async def pass_request_on() -> None:
                async for chunk in client:
                    await server.send(chunk)

            tasks.start_soon(pass_request_on)
            with anyio.move_on_after(patience_s) as patience:
                async for chunk in server:
                    await client.send(chunk)
                    patience.deadline = anyio.current_time() + patience_s
            tasks.cancel_scope.cancel()

    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await anyio.create_tcp_listener(local_host="127.0.0.1"))
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(listener.serve, serve)
        yield f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


async def test_comments_come_while_nothing_happens(
    service: Service, client: httpx.AsyncClient, sandbox: Sandbox
) -> None:
    """A silent stage is filled with comments, one for each pause of KEEPALIVE_SECONDS (a fifth of a second here)."""
    sandbox.fault("speech", "slow", seconds=0.6)
    sandbox.fault("upload", "status", status=401)
    events = await all_events(client, "/jobs_prompt_tts", speech_job(sandbox))
    assert [event.name for event in events][:3] == ["stage", "comment", "comment"]
    pauses = [later.at - sooner.at for sooner, later in zip(events[:3], events[1:3], strict=False)]
    assert all(pause == pytest.approx(0.2, abs=0.15) for pause in pauses)


async def test_a_proxy_that_cuts_silence_delivers_the_stream(service: Service, sandbox: Sandbox) -> None:
    """A job far longer than the proxy's patience arrives as events; as plain JSON it is cut off."""
    sandbox.fault("speech", "slow", times=2, seconds=1.3)
    sandbox.film(short_film())
    async with impatient_proxy(service.port, patience_s=0.6) as url, caller(url) as streaming, caller(url) as waiting:
        events: list[Event] = []

        async def stream() -> None:
            events.extend(await all_events(streaming, "/jobs_prompt_tts", speech_job(sandbox)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream)
            with pytest.raises(httpx.RemoteProtocolError):
                await waiting.post("/jobs_prompt_tts", json=speech_job(sandbox))
    assert events[-1].name == "result"
    assert set(events[-1].data) == {"audio_url", "video_url", "final_url"}
