"""Replicate: creating a prediction, polling it, its outcomes, finding a lost one, cancelling it."""

import asyncio
import itertools
import json
import re
import time
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from functools import reduce
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import respx

import main
from tests.support.application import FAST, REPLICATE_URL, SECRETS, cases, log_lines, use_settings

PICTURE_URL = "https://example.com/pet.jpg"
VIDEO_URL = "https://replicate.delivery/xezq/video.mp4"
API = f"{REPLICATE_URL}/v1"
CREATE_URL = f"{API}/models/minimax/hailuo-02/predictions"
LIST_URL = f"{API}/predictions"
POLL_URL = f"{LIST_URL}/p1"
CANCEL_URL = f"{POLL_URL}/cancel"
JOB = main.JobPromptOnly(image_url=PICTURE_URL, prompt="The cat talks")
BODY = {"image_url": PICTURE_URL, "prompt": "The cat talks"}
INPUT = {
    "prompt": "The cat talks",
    "first_frame_image": PICTURE_URL,
    "duration": 6,
    "resolution": "768p",
}

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]


def prediction(status: str, **fields: Any) -> dict[str, Any]:
    """A prediction as Replicate writes it."""
    urls = {"get": "https://elsewhere.example/get", "cancel": "https://elsewhere.example/cancel"}
    whole = {
        "id": "p1",
        "model": "minimax/hailuo-02",
        "version": "hidden",
        "input": INPUT,
        "output": None,
        "logs": "",
    }
    return {**whole, "data_removed": False, "error": None, "urls": urls, "status": status, **fields}


DONE = prediction("succeeded", output=VIDEO_URL)


def respond_with(outcome: Any) -> httpx.Response:
    """The response of a route: an exception is raised, a response returned, anything else sent as JSON."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome if isinstance(outcome, httpx.Response) else httpx.Response(200, json=outcome)


class Replicate:
    """Replicate at the edge of the process: one prediction, `p1`; the picture is there; other calls fail the test."""

    def __init__(self, router: respx.MockRouter) -> None:
        router.head(PICTURE_URL).respond(200, content_type="image/jpeg")
        self.router = router
        self.create = router.post(CREATE_URL).respond(201, json=prediction("starting"))
        self.list = router.get(LIST_URL).respond(200, json={"results": [], "next": None})
        self.poll = router.get(POLL_URL).respond(200, json=DONE)
        self.cancel = router.post(CANCEL_URL).respond(200, json=prediction("canceled"))

    def polls(self, *outcomes: Any) -> None:
        """What the polls return one after the other; the last one stays."""
        turns = itertools.chain(outcomes, itertools.repeat(outcomes[-1]))
        self.poll.mock(side_effect=lambda request: respond_with(next(turns)))

    def lists(self, *pages: list[Any]) -> None:
        """The lists of predictions one after the other; the last one stays."""
        turns = itertools.chain(pages, itertools.repeat(pages[-1]))
        self.list.mock(
            side_effect=lambda request: respond_with({"results": next(turns), "next": None})
        )


@pytest.fixture
def replicate(client: httpx.AsyncClient) -> Iterator[Replicate]:
    """Replicate, for the running service."""
    main.app_state().claimed_predictions.clear()  # of the jobs before
    with respx.mock(assert_all_called=False) as router:
        yield Replicate(router)


async def post(client: httpx.AsyncClient, **changes: Any) -> tuple[int, dict[str, Any]]:
    """A picture job's status and body."""
    answer = await asyncio.wait_for(client.post("/jobs_prompt_only", json={**BODY, **changes}), 20)
    return answer.status_code, answer.json()


async def failed(client: httpx.AsyncClient, **changes: Any) -> tuple[int, str, dict[str, Any]]:
    """Status, detail and `partial` of a job that fails at Replicate."""
    status, body = await post(client, **changes)
    assert (body["category"], body["provider"]) == ("provider", "replicate")
    return status, body["detail"], body.get("partial", {})


# The request


async def test_the_create_and_the_poll(monkeypatch, client, replicate):
    """The default model's fields and route, with Cancel-After; a silent video needs one key only."""
    use_settings(monkeypatch, ELEVEN_API_KEY="", SUPABASE_URL="", SUPABASE_SERVICE_ROLE="")
    assert await post(client) == (200, {"video_url": VIDEO_URL})
    create, poll = replicate.create.calls.last.request, replicate.poll.calls.last.request
    assert (json.loads(create.content), poll.content) == ({"input": INPUT}, b"")
    assert (create.headers["cancel-after"], create.headers["content-type"]) == (
        "600s",
        "application/json",
    )
    for request in (create, poll):  # an address from the answer gets no token
        assert request.headers["authorization"] == f"Bearer {SECRETS['REPLICATE_API_TOKEN']}"
        assert not {"prefer", "xi-api-key", "apikey", "cookie"} & set(request.headers)


@pytest.mark.parametrize(
    ("timeout_s", "cancel_after"),
    [("1", "5s"), ("90.4", "90s"), ("90.6", "91s"), ("86400", "86400s")],
)
async def test_cancel_after_is_the_jobs_deadline(monkeypatch, replicate, timeout_s, cancel_after):
    """It is kept within the 5 s to one day that Replicate accepts."""
    use_settings(monkeypatch, JOB_TIMEOUT_SECONDS=timeout_s)
    await main.hailuo_video_from_prompt(JOB)
    assert replicate.create.calls.last.request.headers["cancel-after"] == cancel_after


@pytest.mark.parametrize(
    "helper", [main.hailuo_video_from_prompt, main.replicate_video_from_prompt]
)
async def test_both_helpers_return_the_video_of_a_job(replicate, helper):
    """Each takes nothing but the request body, and polls on after a broken connection."""
    replicate.polls(httpx.ReadError("reset"), prediction("processing"), DONE)
    assert await helper(JOB) == VIDEO_URL


# Other models


async def test_a_slow_look_up_does_not_delay_other_models(replicate):
    """Jobs share the look-up of their model only."""
    is_asked, schema = (
        asyncio.Event(),
        {"Input": {"properties": {"image": {"type": "string", "format": "uri"}}}},
    )
    model = {
        "is_official": True,
        "latest_version": {"openapi_schema": {"components": {"schemas": schema}}},
    }

    async def never(request: httpx.Request) -> httpx.Response:
        is_asked.set()
        await asyncio.sleep(60)
        raise AssertionError("it was waited for")

    replicate.router.get(f"{API}/models/some/slow").mock(side_effect=never)
    replicate.router.get(f"{API}/models/some/quick").respond(200, json=model)
    waiting = asyncio.create_task(main.find_model("some/slow"))
    await is_asked.wait()
    assert (await asyncio.wait_for(main.find_model("some/quick"), 5)).name == "some/quick"
    waiting.cancel()
    await asyncio.wait({waiting})


# Waiting


@pytest.mark.parametrize("polls", [1, 10, 100, 5000])
@pytest.mark.parametrize(("waited_s", "delay_s"), [(0, 0.25), (12, 0.3), (80, 2), (86_400, 2)])
def test_polls_get_rarer_the_longer_a_video_takes(monkeypatch, waited_s, delay_s, polls):
    """The wait is a share of the time so far, and all jobs together make at most 2,400 polls a minute."""
    assert main.poll_delay_s(0, 0) == float(FAST["POLL_MIN_SECONDS"])
    use_settings(monkeypatch, POLL_MIN_SECONDS="0.25")
    assert main.poll_delay_s(waited_s, polls) == pytest.approx(max(delay_s, polls / 40))


async def test_the_polls_of_a_process_are_counted(client, replicate):
    """Twenty waiting jobs share the rate: each polls less often than one alone would."""
    states = itertools.chain([prediction("processing")] * 20, itertools.repeat(DONE))
    replicate.poll.mock(side_effect=lambda request: httpx.Response(200, json=next(states)))
    started = time.monotonic()
    answers = await asyncio.gather(*(post(client) for _ in range(20)))
    assert {status for status, _ in answers} == {200}
    assert (replicate.poll.call_count, main.app_state().active_polls) == (40, 0)
    assert time.monotonic() - started >= 40 / 2400 * 60 * 0.8


async def test_an_unusable_poll_does_not_end_the_job(replicate):
    """The video is paid for: after an invalid response, an unknown status or a long log it is polled again."""
    odd = [
        {},
        {"id": "p1"},
        {"status": "succeeded"},
        {"id": "../x", "status": "succeeded"},
        {"id": 1},
        *map(prediction, ("starting", "processing", "queued", "PROCESSING", "")),
        prediction("processing", logs="x" * 900_000),
    ]
    replicate.polls(
        *odd, {"id": "p1", "status": "succeeded", "output": VIDEO_URL, "logs": "x" * 900_000}
    )
    assert await main.hailuo_video_from_prompt(JOB) == VIDEO_URL
    assert (replicate.poll.call_count, replicate.create.call_count) == (len(odd) + 1, 1)


async def test_a_prediction_over_1_mb_ends_the_job(client, replicate):
    """At once, since the next poll would return the same; it is a 500 with the id in `partial`."""
    replicate.polls({**DONE, "logs": "x" * 1_000_000})
    message = "Replicate's response is larger than the service reads."
    assert await failed(client) == (500, message, {"prediction_id": "p1"})
    assert replicate.poll.call_count == 1


LOGS: list[tuple[Any, ...]] = [
    ("none", None, None),
    ("no progress", "Using seed: 42\n", None),
    ("the last one", " 3%|#\r 7%|#\r 10%|##\r", 10),
    ("the end", "100%|##########| 30/30", 100),
    ("a part of a per cent", "99.99%", 99),
    ("more than all", "1000% 250%", None),
    ("apart", "50 %", None),
    ("long ago", "50%\n" + "x" * 5000, None),
    ("a list", ["50%"], None),
]


@pytest.mark.parametrize(("logs", "percent"), cases(LOGS))
def test_the_percentage_is_read_from_the_log(logs, percent):
    """The last figure of a model's progress bar counts."""
    assert main.Prediction(id="p1", status="processing", logs=logs).percent == percent


# Outcomes


OUTPUTS: list[tuple[Any, ...]] = [
    ("text", VIDEO_URL, VIDEO_URL),
    ("the first of a list", [VIDEO_URL, "https://replicate.delivery/2.mp4"], VIDEO_URL),
    ("one in the other", {"seed": 5, "files": [None, {"url": VIDEO_URL}]}, VIDEO_URL),
    ("after others", ["data:video/mp4;base64,AA", *["http://xn--a/"] * 997, VIDEO_URL], VIDEO_URL),
    ("after a thousand that are none", ["http://xn--a/"] * 1000 + [VIDEO_URL], None),
    ("a name", {VIDEO_URL: 5}, None),
    ("null", None, None),
    ("empty", "", None),
    ("number", 5, None),
    ("no URL", "video.mp4", None),
    ("a file of ours", "file:///etc/passwd", None),
    ("a host that is none", "https://xn--a/video.mp4", None),
    ("a zero byte", "http://\x00/", None),
    ("deep", reduce(lambda inner, _: [inner], range(100), VIDEO_URL), VIDEO_URL),
]


@pytest.mark.parametrize(("output", "video"), cases(OUTPUTS))
def test_the_video_is_found_in_the_output(output, video):
    """The output is a string, a list or an object; without a video it is a provider error."""
    made = main.Prediction(id="p1", status="succeeded", output=output)
    assert made.video_url == video
    if video is None:
        with pytest.raises(
            main.ProviderFailed, match="^The prediction succeeded, but Replicate names no video"
        ) as failed:
            main.video_url_or_raise(made)
        assert (failed.value.provider, failed.value.retryable) == ("replicate", False)


SECRET = SECRETS["REPLICATE_API_TOKEN"]
REASONS: list[tuple[Any, ...]] = [
    (
        "text",
        "failed",
        "It was flagged as sensitive. (E005)",
        "It was flagged as sensitive. (E005)",
    ),
    ("null", "canceled", None, "no reason given"),
    ("object", "aborted", {"message": "Out of memory"}, "Out of memory"),
    ("long, of several lines", "failed", "a\nb\t c" + "x" * 301, "a b c" + "x" * 295),
    ("with our token across the cut", "failed", "x" * 290 + SECRET, "x" * 290 + "***"),
]


@pytest.mark.parametrize(("status", "error", "words"), cases(REASONS))
async def test_a_prediction_that_ends_without_a_video(client, replicate, status, error, words):
    """The job gets a 400 with Replicate's reason and the prediction's id."""
    replicate.polls(prediction(status, error=error))
    message = f"No video was made, the prediction ended as {status}: {words}"
    assert await failed(client) == (400, message, {"prediction_id": "p1"})
    assert (replicate.create.call_count, replicate.cancel.called) == (1, False)


@pytest.mark.parametrize("status", [200, 201, 202])
async def test_a_prediction_that_succeeds_at_once_is_not_polled(replicate, status):
    """The response to the create has everything, whatever its 2xx status."""
    replicate.create.respond(status, json=DONE)
    assert await main.hailuo_video_from_prompt(JOB) == VIDEO_URL
    assert not replicate.poll.called


# A create whose response is lost

LOST = cases(
    [
        (
            "cut after sending",
            httpx.ReadError("reset"),
            "Replicate did not answer: ReadError reset.",
        ),
        (
            "no answer in time",
            httpx.ReadTimeout("slow"),
            "Replicate did not answer: ReadTimeout slow.",
        ),
        ("a gateway's page", httpx.Response(502, html="<p>Bad</p>"), "Replicate answered 502: Bad"),
        ("408", httpx.Response(408), "Replicate answered 408: Request Timeout"),
        (
            "no prediction",
            httpx.Response(201),
            "Replicate answered without a prediction; one may have been created.",
        ),
    ]
)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        {"status": "starting"},
        {"id": "p1"},
        {"id": 5, "status": "starting"},
        *(
            {"id": name, "status": "starting"}
            for name in ("", "../x", "p1?a=b", "%2e%2e%2fx", "p1\n", "a" * 101)
        ),
    ],
)
def test_a_prediction_needs_a_status_and_a_valid_id(payload):
    """Without an id that can stand in a path it can neither be polled nor cancelled."""
    assert main.parse_prediction(payload) is None


@pytest.mark.parametrize(("outcome", "message"), LOST)
async def test_a_lost_create_is_searched_for_and_not_retried(
    monkeypatch, client, replicate, outcome, message
):
    """Several searches are made; the error names the call in doubt."""
    use_settings(monkeypatch, PATIENCE_SECONDS="8")
    replicate.create.mock(side_effect=[outcome])
    assert await failed(client) == (500, message, {})
    assert (replicate.create.call_count, replicate.poll.called, replicate.cancel.called) == (
        1,
        False,
        False,
    )
    assert replicate.list.call_count > 2


@pytest.mark.parametrize(("outcome", "message"), LOST)
async def test_a_prediction_whose_create_response_is_lost_is_found(
    monkeypatch, client, replicate, outcome, message
):
    """The job continues with it as soon as Replicate lists it."""
    use_settings(monkeypatch, PATIENCE_SECONDS="40")
    replicate.create.mock(side_effect=[outcome])
    replicate.lists([], [prediction("starting")])
    before = datetime.now(timezone.utc)
    assert await post(client) == (200, {"video_url": VIDEO_URL})
    assert (replicate.create.call_count, replicate.list.call_count) == (1, 2)
    after = datetime.fromisoformat(replicate.list.calls.last.request.url.params["created_after"])
    assert 0 < (before - after).total_seconds() < 10, "clocks differ"


OTHERS = [
    ("another input", {"input": {**INPUT, "prompt": "The dog talks"}}),
    ("an input that has expired", {"input": {}}),
    ("another model", {"model": "some/model"}),
    ("no id", {"id": "../x"}),
    ("another job's of this process", {"id": "held"}),
]


@pytest.mark.parametrize("others", cases(OTHERS))
async def test_only_an_equal_unclaimed_prediction_is_used(client, replicate, others):
    """Model and input must be equal, and no other job may have claimed it."""
    replicate.create.respond(201, json={**DONE, "id": "held"})
    await post(client)
    replicate.create.mock(side_effect=httpx.ReadError("reset"))
    replicate.lists(["noise", {**prediction("starting"), **others}])
    assert (await failed(client))[::2] == (500, {})


async def test_the_list_is_read_page_by_page(client, replicate):
    """Only pages at Replicate itself are followed: the token is sent nowhere else."""
    main.app_state().replicate_clock_s = 0.0  # else the list is asked for once more to learn it
    replicate.create.mock(side_effect=httpx.ReadError("reset"))
    first = {"results": [prediction("starting", input={})] * 100, "next": f"{LIST_URL}?cursor=abc"}
    last = {"results": [prediction("starting")], "next": "https://elsewhere.example/v1/predictions"}
    replicate.list.mock(
        side_effect=[httpx.Response(200, json=first), httpx.Response(200, json=last)]
    )
    assert await post(client) == (200, {"video_url": VIDEO_URL})
    assert dict(replicate.list.calls.last.request.url.params) == {"cursor": "abc"}
    replicate.list.mock(
        side_effect=lambda request: httpx.Response(200, json={**last, "results": []})
    )
    assert (await failed(client))[::2] == (500, {})


# Cancelling


def cancellable(work: Awaitable[Any]) -> tuple[anyio.CancelScope, "asyncio.Task[bool]"]:
    """Work in a task as a job is, the scope that cancels it, and whether it was cancelled."""
    scope = anyio.CancelScope()

    async def run() -> bool:
        with scope, suppress(main.ServiceError):
            await work
        return scope.cancelled_caught

    return scope, asyncio.create_task(run())


async def ended_while_waiting(replicate: Replicate) -> None:
    """Start a job and cancel it while its video is being made."""
    replicate.polls(prediction("processing"))
    job = main.Job("-")
    heard, (scope, task) = job.subscribe(), cancellable(main.hailuo_video_from_prompt(JOB, job))
    while (event := await asyncio.wait_for(heard.get(), 5)) is None or event.status != "processing":
        pass
    scope.cancel()
    assert await asyncio.wait_for(task, 5)
    assert main.app_state().active_polls == 0


async def test_a_cancelled_job_cancels_its_prediction(replicate, caplog):
    """Once, by its id; nothing is polled afterwards."""
    caplog.set_level("INFO", logger="talking_pet")
    await ended_while_waiting(replicate)
    polls = replicate.poll.call_count
    request = replicate.cancel.calls.last.request
    assert (request.method, str(request.url), request.content) == ("POST", CANCEL_URL, b"")
    assert request.headers["authorization"] == f"Bearer {SECRETS['REPLICATE_API_TOKEN']}"
    assert {"prediction_id=p1", "prediction_id=p1 cancelled"} <= set(log_lines(caplog))
    await asyncio.sleep(0.05)
    assert (replicate.poll.call_count, replicate.cancel.call_count) == (polls, 1)


async def test_a_shutdown_is_answered_and_logged(client, replicate, caplog):
    """A job whose request uvicorn cancels is still answered, and its log line has the outcome."""
    replicate.polls(prediction("processing"))
    asking = asyncio.create_task(client.post("/jobs_prompt_only", json=BODY))
    while not replicate.poll.called:
        await asyncio.sleep(0.001)
    asking.cancel()
    answer = (await asking).json()
    assert (answer["category"], answer["retryable"], answer["partial"]) == (
        "internal",
        True,
        {"prediction_id": "p1"},
    )
    assert answer["detail"] == "The service is restarting and could not finish the job; try again."
    ended = r"job outcome=shutdown ms=\d+ prediction_id=p1 code=restarting detail=The service is .*"
    assert re.fullmatch(ended, log_lines(caplog)[-1])


CANCELS: list[tuple[Any, ...]] = [
    ("no answer", [httpx.ReadTimeout("slow")], "cancelled"),
    ("busy", [httpx.Response(503), httpx.Response(429)], "cancelled"),
    (
        "refused",
        [httpx.Response(404, text="Gone.")],
        "not cancelled: Replicate answered 404: Gone.",
    ),
    ("never reached", [httpx.ConnectError("refused")] * 99, "not cancelled: no answer in time"),
]


@pytest.mark.parametrize(("failures", "words"), cases(CANCELS))
async def test_a_cancel_is_retried(monkeypatch, replicate, caplog, failures, words):
    """For as long as it may take, since it does no harm twice; if it fails, the id is in the log."""
    caplog.set_level("INFO", logger="talking_pet")
    use_settings(monkeypatch, PATIENCE_SECONDS="1")
    last = [] if "not" in words else [httpx.Response(200, json=prediction("canceled"))]
    replicate.cancel.mock(side_effect=[*failures, *last])
    await ended_while_waiting(replicate)
    assert f"prediction_id=p1 {words}" in log_lines(caplog)


ON_ITS_WAY: list[tuple[Any, ...]] = [
    ("made", httpx.Response(201, json=prediction("starting")), 1),
    ("refused", httpx.Response(402), 0),
    ("malformed", httpx.Response(201, content=b"noise"), 1),
    ("cut", httpx.ReadError("reset"), 1),
]


@pytest.mark.parametrize(("outcome", "cancels"), cases(ON_ITS_WAY))
async def test_a_create_in_flight_is_awaited_and_its_prediction_cancelled(
    replicate, outcome, cancels
):
    """Only its response, or else the list, has the id to cancel."""
    replicate.lists([prediction("starting")])
    is_sent, may_answer = asyncio.Event(), asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        is_sent.set()
        await may_answer.wait()
        return respond_with(outcome)

    replicate.create.mock(side_effect=slowly)
    scope, task = cancellable(main.hailuo_video_from_prompt(JOB))
    await is_sent.wait()
    scope.cancel()
    await asyncio.sleep(0.02)
    assert not task.done()
    may_answer.set()
    await asyncio.wait_for(task, 5)
    assert (replicate.create.call_count, replicate.cancel.call_count, replicate.poll.called) == (
        1,
        cancels,
        False,
    )


@pytest.mark.parametrize("ticks", range(6))
async def test_a_cancelled_stream_stops_the_job_and_loses_no_event(ticks):
    """In whichever tick of the event loop the request is cancelled."""
    job = main.Job("-")
    task = asyncio.create_task(main.next_sse_chunk(job, events := job.subscribe()))
    for _ in range(4):
        await asyncio.sleep(0)
    job.emit("started")
    for _ in range(ticks):
        await asyncio.sleep(0)
    is_heard = task.cancel()
    parts = [await task, *([await main.next_sse_chunk(job, events)] if is_heard else [])]
    assert (job.scope.cancel_called, sum(b"started" in part for part in parts if part)) == (
        is_heard,
        1,
    )


async def test_a_cancellation_at_any_moment_leaves_no_connection_busy(
    monkeypatch, client, tmp_path: Path
):
    """A download that is cancelled ends cancelled or, at its last step, whole; its connection is idle
    or closed.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(
            ConnectionError, asyncio.IncompleteReadError
        ):  # whoever was cancelled has gone
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
                await asyncio.sleep(0)
                writer.write(b"video")
        writer.close()

    use_settings(monkeypatch, ALLOW_PRIVATE_URLS="true")
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url, is_ended, moments = (
        f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/video",
        False,
        0,
    )
    while not is_ended:
        scope, task = cancellable(main.download(url, tmp_path / "video"))
        for _ in range(moments):
            await asyncio.sleep(0)
        is_ended, moments = task.done(), moments + 1
        scope.cancel()
        was_cancelled = await asyncio.wait_for(task, 5)
        assert not (is_ended and was_cancelled)
        assert was_cancelled or (tmp_path / "video").read_bytes() == b"video"
        pool = main.app_state().http._transport.trusted
        assert [kept for kept in pool.connections if not (kept.is_idle() or kept.is_closed())] == []
    server.close()  # its connections are kept by the client, and Python 3.12 would wait for them
    assert moments > 10


# What was found while reading


async def test_a_poll_that_is_refused_for_good_cancels_a_prediction_that_nobody_can_resume(
    client, replicate
):
    """Without a key nobody comes back for it, and it must not run on and be billed."""
    replicate.poll.respond(410, json={"detail": "Gone."})
    status, detail, partial = await failed(client)
    assert (status, partial) == (500, {"prediction_id": "p1"})
    assert detail.startswith("Replicate answered 410")
    assert replicate.cancel.call_count == 1


@pytest.mark.parametrize(
    ("listed", "is_ours"), [("abc123", True), ("abc", False), ("", False), (None, False)]
)
def test_a_listed_prediction_has_exactly_our_version(listed, is_ours):
    """A part of the version's id is another version."""
    model = main.VideoModel("a/b", "a/b:abc123", {}, ())
    found = {"model": "a/b", "version": listed, "input": {"prompt": "Talk"}}
    assert main.is_prediction_of(found, model, {"prompt": "Talk"}) == is_ours


def test_a_response_is_parsed_once():
    """However often a policy, an error and a message look at it."""
    response = main.ProviderResponse(200, httpx.Headers(), b'{"id": "p1"}')
    assert response.payload is response.payload
