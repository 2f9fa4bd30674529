"""Films: the request that buys one, the waiting for it, its outcomes, its end when nobody waits any more."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import respx

import main
from tests.inprocess import FAST, REPLICATE_URL, SECRETS, error_of, log_lines, told, use_settings

PICTURE_URL = "https://example.com/pet.jpg"
FILM_URL = "https://replicate.delivery/xezq/film.mp4"
CREATE_URL = f"{REPLICATE_URL}/v1/models/minimax/hailuo-02/predictions"
READ_URL = f"{REPLICATE_URL}/v1/predictions/p1"
CANCEL_URL = f"{READ_URL}/cancel"
JOB = main.JobPromptOnly(image_url=PICTURE_URL, prompt="The cat talks")
BODY = {"image_url": PICTURE_URL, "prompt": "The cat talks"}

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]


class Replicate:
    """Replicate at the edge of the process: one prediction, `p1`; every other call fails the test."""

    def __init__(self, router: respx.MockRouter) -> None:
        self.create = router.post(CREATE_URL).respond(201, json=prediction("starting"))
        self.read = router.get(READ_URL).respond(200, json=prediction("succeeded", output=FILM_URL))
        self.cancel = router.post(CANCEL_URL).respond(200, json=prediction("canceled"))

    def reads(self, *told: Any) -> None:
        """What the reads tell in turn; the last one stays."""
        answers = [
            item if isinstance(item, (Exception, httpx.Response)) else httpx.Response(200, json=item) for item in told
        ]
        self.read.mock(side_effect=itertools.chain(answers, itertools.repeat(answers[-1])))


@pytest.fixture
def replicate(client: httpx.AsyncClient) -> Iterator[Replicate]:
    """Replicate, for the running service."""
    with respx.mock(assert_all_called=False) as router:
        yield Replicate(router)


def prediction(status: str, **fields: Any) -> dict[str, Any]:
    """A prediction as Replicate writes it."""
    urls = {"get": "https://elsewhere.example/get", "cancel": "https://elsewhere.example/cancel"}
    whole = {"id": "p1", "model": "minimax/hailuo-02", "version": "hidden", "input": {}, "output": None, "logs": ""}
    return {**whole, "data_removed": False, "error": None, "urls": urls, "status": status, **fields}


async def post(client: httpx.AsyncClient, **changes: Any) -> tuple[int, dict[str, Any]]:
    """A picture job's status and body."""
    answer = await client.post("/jobs_prompt_only", json={**BODY, **changes})
    return answer.status_code, answer.json()


# The request


async def test_the_request(client, replicate):
    """The default model's own four fields, by its own route, with a limit to what it may cost."""
    assert await post(client) == (200, {"video_url": FILM_URL})
    request = replicate.create.calls.last.request
    assert (request.method, str(request.url)) == ("POST", CREATE_URL)
    values = {"prompt": "The cat talks", "first_frame_image": PICTURE_URL, "duration": 6, "resolution": "768p"}
    assert json.loads(request.content) == {"input": values}
    assert request.headers["authorization"] == f"Bearer {SECRETS['REPLICATE_API_TOKEN']}"
    assert request.headers["cancel-after"] == "600s"
    assert request.headers["content-type"] == "application/json"
    assert not {"prefer", "xi-api-key", "apikey", "cookie"} & set(request.headers)


async def test_the_read(client, replicate):
    """By the id, at the address that the owner configured: an address from the answer gets no token."""
    await post(client)
    request = replicate.read.calls.last.request
    assert (request.method, str(request.url), request.content) == ("GET", READ_URL, b"")
    assert request.headers["authorization"] == f"Bearer {SECRETS['REPLICATE_API_TOKEN']}"


@pytest.mark.parametrize(
    ("timeout_s", "cancel_after"),
    [("1", "5s"), ("5", "5s"), ("90.4", "90s"), ("90.6", "91s"), ("600", "600s"), ("86400", "86400s")],
)
async def test_replicate_ends_it_at_the_jobs_own_limit(monkeypatch, replicate, timeout_s, cancel_after):
    """Within what Cancel-After takes: 5 s to a day."""
    use_settings(monkeypatch, JOB_TIMEOUT_SECONDS=timeout_s)
    await main.hailuo_video_from_prompt(JOB)
    assert replicate.create.calls.last.request.headers["cancel-after"] == cancel_after


@pytest.mark.parametrize("base_url", ["https://eu.example", "https://proxy.example:8443/replicate/"])
async def test_another_base_url_takes_its_place(monkeypatch, base_url):
    """A stand-in or a proxy is called instead."""
    use_settings(monkeypatch, REPLICATE_BASE_URL=base_url)
    base = f"{base_url.rstrip('/')}/v1"
    with respx.mock as router:
        router.post(f"{base}/models/minimax/hailuo-02/predictions").respond(201, json=prediction("starting"))
        router.get(f"{base}/predictions/p1").respond(200, json=prediction("succeeded", output=FILM_URL))
        assert await main.hailuo_video_from_prompt(JOB) == FILM_URL


@pytest.mark.parametrize("helper", [main.hailuo_video_from_prompt, main.replicate_video_from_prompt])
async def test_without_a_running_service(helper):
    """The helpers stand on their own."""
    with respx.mock(assert_all_called=False) as router:
        replicate = Replicate(router)
        replicate.reads(httpx.ReadError("reset"), prediction("processing"), prediction("succeeded", output=FILM_URL))
        assert await helper(JOB) == FILM_URL


@pytest.mark.parametrize("helper", [main.hailuo_video_from_prompt, main.replicate_video_from_prompt])
async def test_without_a_token_nothing_is_sent(monkeypatch, replicate, helper):
    """The variable is named."""
    use_settings(monkeypatch, REPLICATE_API_TOKEN="")
    error = await error_of(helper(JOB))
    assert told(error) == (500, "configuration", None)
    assert error.detail == "The service is not set up for this: set REPLICATE_API_TOKEN."
    assert not replicate.create.called


# Waiting


@pytest.mark.parametrize(
    ("waited_s", "delay_s"),
    [
        pytest.param(0, 0.25, id="at first"),
        pytest.param(10, 0.25, id="after 10 s"),
        pytest.param(12, 0.3, id="2.5 % of 12 s"),
        pytest.param(40, 1, id="2.5 % of 40 s"),
        pytest.param(80, 2, id="2.5 % of 80 s"),
        pytest.param(81, 2, id="2 s at most"),
        pytest.param(86_400, 2, id="after a day"),
    ],
)
@pytest.mark.parametrize("polls", [1, 10])
def test_a_film_is_asked_for_the_less_often_the_longer_it_takes(monkeypatch, waited_s, delay_s, polls):
    """A finished film waits about one per cent of its own time."""
    use_settings(monkeypatch, POLL_MIN_SECONDS="0.25")
    assert main.poll_delay_s(waited_s, polls) == pytest.approx(delay_s)


@pytest.mark.parametrize("polls", [1, 10, 80, 81, 100, 500, 5000])
@pytest.mark.parametrize("waited_s", [0, 1, 60, 3600])
def test_all_jobs_together_stay_under_the_rate(monkeypatch, polls, waited_s):
    """However many wait, one process reads at most 2,400 times a minute."""
    use_settings(monkeypatch, POLL_MIN_SECONDS="0.001")
    delay_s = main.poll_delay_s(waited_s, polls)
    assert polls * 60 / delay_s <= 2400 * 1.0001
    assert delay_s == pytest.approx(max(0.001, min(waited_s * 0.025, 2), polls / 40))


def test_the_shortest_wait_is_a_setting(monkeypatch):
    """POLL_MIN_SECONDS, above the two seconds too."""
    assert main.poll_delay_s(0, 0) == float(FAST["POLL_MIN_SECONDS"])
    use_settings(monkeypatch, POLL_MIN_SECONDS="1.5")
    assert main.poll_delay_s(0, 1) == 1.5


async def test_the_polls_of_a_process_are_counted(client, replicate):
    """Twenty jobs that wait share the pace: each reads less often than one alone would."""
    film = prediction("succeeded", output=FILM_URL)
    states = itertools.chain([prediction("processing")] * 20, itertools.repeat(film))
    replicate.read.mock(side_effect=lambda request: httpx.Response(200, json=next(states)))
    started = time.monotonic()
    answers = await asyncio.gather(*(post(client) for _ in range(20)))
    waited_s = time.monotonic() - started
    assert {status for status, _ in answers} == {200}
    assert replicate.read.call_count == 40
    assert waited_s >= 40 / 2400 * 60 * 0.8


async def test_no_wait_is_left_behind(client, replicate):
    """Whatever became of it, a job that has ended slows no other down."""
    await post(client)
    replicate.reads(prediction("failed"))
    await post(client)
    replicate.reads(httpx.Response(403))
    await post(client)
    await ended_while_waiting(replicate)
    assert main._running is not None
    assert main._running.polls == 0


@pytest.mark.parametrize("status", ["starting", "processing", "queued", "PROCESSING", ""])
async def test_any_other_status_is_waited_on(replicate, status):
    """Also one that is not known yet."""
    replicate.reads(*[prediction(status)] * 3, prediction("succeeded", output=FILM_URL))
    assert await main.hailuo_video_from_prompt(JOB) == FILM_URL
    assert replicate.read.call_count == 4


async def test_a_film_that_is_done_at_once_is_not_read(replicate):
    """The answer to the create says it all then."""
    replicate.create.respond(201, json=prediction("succeeded", output=FILM_URL))
    assert await main.hailuo_video_from_prompt(JOB) == FILM_URL
    assert not replicate.read.called


@pytest.mark.parametrize("status", [200, 201, 202])
async def test_a_create_may_be_answered_with_any_of_these(replicate, status):
    """202 says that it goes on."""
    replicate.create.respond(status, json=prediction("starting"))
    assert await main.hailuo_video_from_prompt(JOB) == FILM_URL


async def test_trouble_while_reading_does_not_end_the_job(replicate):
    """The film is being paid for: whatever a read meets, it is read again."""
    replicate.reads(
        httpx.ReadTimeout("slow"),
        httpx.Response(502, html="<html>Bad Gateway</html>"),
        httpx.Response(200, content=b'{"id": "p1", "stat'),
        httpx.Response(200, json={"detail": "odd"}),
        prediction("processing"),
        httpx.ConnectError("refused"),
        httpx.Response(429, json={"detail": "Request was throttled.", "retry_after": 0.01}),
        prediction("succeeded", output=FILM_URL),
    )
    assert await main.hailuo_video_from_prompt(JOB) == FILM_URL
    assert (replicate.read.call_count, replicate.create.call_count) == (8, 1)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
async def test_a_read_that_is_refused_ends_the_job_with_the_id(client, replicate, status):
    """Not the client's fault; the id says what was paid for."""
    replicate.reads(httpx.Response(status, json={"detail": "No."}))
    answered, body = await post(client)
    assert (answered, body["category"], body["provider"]) == (500, "provider", "replicate")
    assert body["detail"] == f"Replicate answered {status}: No."
    assert body["partial"] == {"prediction_id": "p1"}


async def test_every_state_is_heard(replicate):
    """Whoever asks is told at once and at each read, with the percentage."""
    replicate.reads(
        prediction("processing", logs=" 10%|#"),
        prediction("processing", logs=" 55%|#"),
        prediction("succeeded", output=FILM_URL),
    )
    heard: list[tuple[str, int | None]] = []
    await main.hailuo_video_from_prompt(JOB, lambda told: heard.append((told.status, told.percent)))
    assert heard == [("starting", None), ("processing", 10), ("processing", 55), ("succeeded", None)]


@pytest.mark.parametrize(
    ("logs", "percent"),
    [
        pytest.param(None, None, id="none"),
        pytest.param("", None, id="empty"),
        pytest.param("Using seed: 42\n", None, id="no progress"),
        pytest.param("  0%|          | 0/30 [00:00<?, ?it/s]", 0, id="the beginning"),
        pytest.param(" 40%|####      | 12/30 [00:04<00:06, 2.8it/s]", 40, id="a bar"),
        pytest.param(" 3%|#\r 7%|#\r 10%|##\r", 10, id="the last one"),
        pytest.param("100%|##########| 30/30", 100, id="the end"),
        pytest.param("progress: 12.5%", 12, id="a part of a per cent"),
        pytest.param("99.99%", 99, id="nearly"),
        pytest.param("1000%", None, id="more than all"),
        pytest.param("250%", None, id="too much"),
        pytest.param("50 %", None, id="apart"),
        pytest.param("50%\n" + "x" * 5000, None, id="long ago"),
        pytest.param("x" * 500_000 + " 77%", 77, id="a long log"),
        pytest.param(["50%"], 50, id="a list"),
        pytest.param(5, None, id="a number"),
    ],
)
def test_the_percentage_is_read_from_the_log(logs, percent):
    """Where a model writes a progress bar, its last figure tells."""
    assert main.Prediction(id="p1", status="processing", logs=logs).percent == percent


def test_a_flood_of_texts_is_not_searched_to_its_end():
    """A film's URL is among the first thousand texts of an output, or is not found."""
    texts = itertools.repeat("noise", 100)
    assert main.Prediction(id="p1", status="succeeded", output=[*texts, FILM_URL]).video_url == FILM_URL
    texts = itertools.repeat("noise", 1000)
    assert main.Prediction(id="p1", status="succeeded", output=[*texts, FILM_URL]).video_url is None


# Outcomes


@pytest.mark.parametrize(
    ("output", "film"),
    [
        pytest.param(FILM_URL, FILM_URL, id="text"),
        pytest.param([FILM_URL], FILM_URL, id="list"),
        pytest.param([FILM_URL, "https://replicate.delivery/2.mp4"], FILM_URL, id="the first of a list"),
        pytest.param({"video": FILM_URL}, FILM_URL, id="object"),
        pytest.param({"seed": 5, "files": [None, {"url": FILM_URL}]}, FILM_URL, id="one in the other"),
        pytest.param(["noise", "data:video/mp4;base64,AA", FILM_URL], FILM_URL, id="after other texts"),
        pytest.param(None, None, id="null"),
        pytest.param("", None, id="empty"),
        pytest.param([], None, id="empty list"),
        pytest.param({}, None, id="empty object"),
        pytest.param(5, None, id="number"),
        pytest.param("film.mp4", None, id="no URL"),
        pytest.param("file:///etc/passwd", None, id="a file of ours"),
        pytest.param("https://xn--a/film.mp4", None, id="a host that is none"),
        pytest.param("https://", None, id="no host"),
        pytest.param("http://\x00/", None, id="a zero byte"),
    ],
)
async def test_the_film_is_found_in_the_output(client, replicate, output, film):
    """A text, a list or an object; without a URL it is the provider's failure, and the id is told."""
    replicate.reads(prediction("succeeded", output=output))
    status, body = await post(client)
    if film:
        assert (status, body) == (200, {"video_url": film})
        return
    assert (status, body["category"], body["provider"]) == (500, "provider", "replicate")
    assert body["detail"] == "Replicate answered without a film, although it succeeded."
    assert body["partial"] == {"prediction_id": "p1"}


@pytest.mark.parametrize("depth", [400, 700, 900])
def test_an_output_too_deep_inside_does_no_harm(depth):
    """Nested without end, it holds no film."""
    output: Any = FILM_URL
    for _ in range(depth):
        output = [output]
    assert main.Prediction(id="p1", status="succeeded", output=output).video_url is None


@pytest.mark.parametrize("status", ["failed", "canceled", "aborted"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(
            "The input was flagged as sensitive. (E005)", "The input was flagged as sensitive. (E005)", id="text"
        ),
        pytest.param(None, "no reason given", id="null"),
        pytest.param("", "no reason given", id="empty"),
        pytest.param({"message": "Out of memory"}, "Out of memory", id="object"),
        pytest.param(["one", "two"], "one; two", id="list"),
        pytest.param(5, "no reason given", id="number"),
        pytest.param("a\nb\t c", "a b c", id="on one line"),
        pytest.param("x" * 301, "x" * 300, id="long"),
        pytest.param(f"token {SECRETS['REPLICATE_API_TOKEN']}", "token ***", id="with our token"),
        pytest.param("x" * 290 + SECRETS["REPLICATE_API_TOKEN"], "x" * 290 + "***", id="with our token across the cut"),
    ],
)
async def test_a_prediction_that_ends_without_a_film(client, replicate, status, error, words):
    """It is the request's own content: a 400 with Replicate's reason, and the id."""
    replicate.reads(prediction(status, error=error))
    answered, body = await post(client)
    assert (answered, body["category"], body["provider"]) == (400, "provider", "replicate")
    assert body["detail"] == f"No film was made, the prediction ended as {status}: {words}"
    assert body["partial"] == {"prediction_id": "p1"}
    assert (replicate.create.call_count, replicate.cancel.called) == (1, False)


BAD_INPUT = {
    "detail": "- input: prompt is required\n",
    "status": 422,
    "title": "Input validation failed",
    "invalid_fields": [{"type": "required", "field": "input", "description": "prompt is required"}],
}
NO_CREDIT = {"title": "Insufficient credit", "detail": "You have insufficient credit.", "status": 402}


@pytest.mark.parametrize(
    ("status", "body", "outcome", "message"),
    [
        pytest.param(400, {"detail": "Bad."}, 400, "Bad.", id="bad request"),
        pytest.param(404, {"detail": "Not found."}, 400, "Not found.", id="no such model"),
        pytest.param(422, BAD_INPUT, 400, "- input: prompt is required", id="bad input"),
        pytest.param(401, {"title": "Unauthenticated", "detail": "No token."}, 500, "No token.", id="wrong token"),
        pytest.param(402, NO_CREDIT, 500, "You have insufficient credit.", id="no credit"),
        pytest.param(403, {"detail": "No."}, 500, "No.", id="forbidden"),
        pytest.param(408, None, 500, "Request Timeout", id="too slow"),
        pytest.param(409, None, 500, "Conflict", id="conflict"),
        pytest.param(429, {"detail": "Throttled."}, 500, "Throttled.", id="throttled to the end"),
        pytest.param(500, None, 500, "Internal Server Error", id="500"),
        pytest.param(502, None, 500, "Bad Gateway", id="502"),
        pytest.param(503, None, 500, "Service Unavailable", id="503"),
        pytest.param(307, None, 500, "Temporary Redirect", id="a redirect is not followed"),
        pytest.param(204, None, 500, "No Content", id="204"),
    ],
)
async def test_every_refusal_of_a_create(client, replicate, status, body, outcome, message):
    """What is wrong with the input is a 400; all else a 500. Only a 429 is sent again."""
    replicate.create.respond(status, json=body, headers={"Location": "https://elsewhere.example/"})
    answered, told_body = await post(client)
    assert (answered, told_body["category"], told_body["provider"]) == (outcome, "provider", "replicate")
    assert told_body["detail"] == f"Replicate answered {status}: {message}"
    assert "partial" not in told_body
    assert (replicate.create.call_count, replicate.read.called) == (4 if status == 429 else 1, False)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html></html>", id="HTML"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'{"status": "starting"}', id="no id"),
        pytest.param(b'{"id": "p1"}', id="no status"),
        pytest.param(b'{"id": null, "status": "starting"}', id="null id"),
        pytest.param(b'{"id": 5, "status": "starting"}', id="number as id"),
        pytest.param(b'{"id": "", "status": "starting"}', id="empty id"),
        pytest.param(b'{"id": "../models/x", "status": "starting"}', id="an id that leaves the path"),
        pytest.param(b'{"id": "p1/cancel", "status": "starting"}', id="an id with a slash"),
        pytest.param(b'{"id": "p1?a=b", "status": "starting"}', id="an id with a query"),
        pytest.param(b'{"id": "%2e%2e%2fx", "status": "starting"}', id="an id with escapes"),
        pytest.param(b'{"id": "p1\\n", "status": "starting"}', id="an id with a line break"),
        pytest.param(b'{"id": "' + b"a" * 101 + b'", "status": "starting"}', id="an id of 101 characters"),
    ],
)
async def test_a_create_that_tells_no_prediction(client, replicate, body):
    """It may have been made, so it is not repeated; nothing else is called."""
    replicate.create.respond(201, content=body)
    answered, told_body = await post(client)
    assert (answered, told_body["category"], told_body["provider"]) == (500, "provider", "replicate")
    assert told_body["detail"] == "Replicate answered without a prediction; one may have been made."
    assert (replicate.create.call_count, replicate.read.called, replicate.cancel.called) == (1, False, False)


async def test_fields_that_replicate_leaves_out_are_not_missed(replicate):
    """Only id and status are certain."""
    replicate.create.respond(201, json={"id": "p1", "status": "starting"})
    replicate.reads(
        {"id": "p1", "status": "processing"}, {"id": "p1", "status": "succeeded", "output": FILM_URL, "new": {}}
    )
    assert await main.hailuo_video_from_prompt(JOB) == FILM_URL


# Nobody waits any more


async def ended_while_waiting(replicate: Replicate) -> None:
    """A film is asked for, and the asking ended while it is being made."""
    replicate.reads(prediction("processing"))
    is_made = asyncio.Event()
    task = asyncio.create_task(
        main.hailuo_video_from_prompt(JOB, lambda told: told.status == "processing" and is_made.set())
    )
    await asyncio.wait_for(is_made.wait(), 5)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()


async def test_a_cancelled_caller_cancels_the_prediction(replicate, caplog):
    """Once, by its id; and nothing is read after."""
    caplog.set_level("INFO", logger="talking_pet")
    await ended_while_waiting(replicate)
    reads = replicate.read.call_count
    request = replicate.cancel.calls.last.request
    assert (request.method, str(request.url), request.content) == ("POST", CANCEL_URL, b"")
    assert request.headers["authorization"] == f"Bearer {SECRETS['REPLICATE_API_TOKEN']}"
    assert "prediction_id=p1 cancelled" in log_lines(caplog)
    await asyncio.sleep(0.05)
    assert (replicate.read.call_count, replicate.cancel.call_count) == (reads, 1)


@pytest.mark.parametrize(
    "failures",
    [
        pytest.param([httpx.ReadTimeout("slow")], id="no answer"),
        pytest.param([httpx.Response(503), httpx.Response(429)], id="busy"),
    ],
)
async def test_a_cancel_is_repeated(replicate, failures):
    """It can do no harm twice."""
    replicate.cancel.mock(side_effect=[*failures, httpx.Response(200, json=prediction("canceled"))])
    await ended_while_waiting(replicate)
    assert replicate.cancel.call_count == len(failures) + 1


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        pytest.param(httpx.Response(404, json={"detail": "Gone."}), "Replicate answered 404: Gone.", id="refused"),
        pytest.param(
            httpx.ConnectError("refused"), "Replicate did not answer: ConnectError refused.", id="not reached"
        ),
    ],
)
async def test_a_cancel_that_fails_is_logged(replicate, caplog, outcome, words):
    """The caller's own end goes on; an operator finds the id."""
    replicate.cancel.mock(side_effect=itertools.repeat(outcome))
    await ended_while_waiting(replicate)
    assert f"prediction_id=p1 not cancelled: {words}" in log_lines(caplog)


async def test_a_create_that_is_on_its_way_is_waited_for_and_cancelled(replicate):
    """Only its answer tells which prediction to cancel."""
    is_sent, may_answer = asyncio.Event(), asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        is_sent.set()
        await may_answer.wait()
        return httpx.Response(201, json=prediction("starting"))

    replicate.create.mock(side_effect=slowly)
    task = asyncio.create_task(main.hailuo_video_from_prompt(JOB))
    await is_sent.wait()
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done()
    may_answer.set()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert (replicate.create.call_count, replicate.cancel.call_count, replicate.read.called) == (1, 1, False)


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(httpx.Response(402, json=NO_CREDIT), id="refused"),
        pytest.param(httpx.Response(201, content=b"noise"), id="nonsense"),
        pytest.param(httpx.ReadError("reset"), id="cut"),
    ],
)
async def test_a_cancelled_create_that_fails_leaves_nothing_to_cancel(replicate, outcome):
    """The caller's end is all that is heard of it."""
    is_sent = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        is_sent.set()
        await asyncio.sleep(0.02)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    replicate.create.mock(side_effect=slowly)
    task = asyncio.create_task(main.hailuo_video_from_prompt(JOB))
    await is_sent.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert not replicate.cancel.called


async def test_the_deadline_cancels_the_prediction(monkeypatch, client, replicate):
    """A 500 names the stage and the limit, and holds the id."""
    use_settings(monkeypatch, JOB_TIMEOUT_SECONDS="1")
    replicate.reads(prediction("processing"))
    status, body = await post(client)
    assert (status, body["category"], body["provider"]) == (500, "provider", "replicate")
    assert body["detail"] == "The job was not done after 1 s and was ended in the stage video."
    assert body["partial"] == {"prediction_id": "p1"}
    assert replicate.cancel.call_count == 1
