"""Retry policy: what is retried, with which backoff and for how long; and the messages of error responses."""

import asyncio
import json
import logging
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

import main
from tests.support import network
from tests.support.application import (
    ELEVEN_URL,
    REPLICATE_URL,
    SECRETS,
    SUPABASE_URL,
    cases,
    error_from,
    provider_response,
    use_settings,
)

serve = network.serve
NOW = 1_790_000_000.0  # a clock time
PROMPT = {"prompt": "Talk"}
STARTING = {"id": "p1", "status": "starting"}
DONE = {"id": "p1", "status": "succeeded", "output": "https://replicate.delivery/xezq/video.mp4"}
INPUT = {"Input": {"properties": {"image": {"type": "string", "format": "uri"}}}}
MODEL = {
    "is_official": True,
    "latest_version": {"openapi_schema": {"components": {"schemas": INPUT}}},
}

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]


@pytest.fixture
def providers(client: httpx.AsyncClient) -> Iterator[respx.MockRouter]:
    """The edge of the running process: what is not routed by a test fails it."""
    main.app_state().replicate_clock_s = 0.0  # else a list is asked for once more to learn it
    with respx.mock(assert_all_called=False) as router:
        yield router


# Retry-After, backoff, budgets

ASKED = [  # what it is, Retry-After, the body, seconds
    ("nothing said", "", "", None),
    ("at once", "0", "", 0),
    ("a part of a second, between blanks", " 1.5 ", "", 1.5),
    ("for ever", "9" * 400, "", float("inf")),
    ("a date to come", formatdate(NOW + 20, usegmt=True), "", 20),
    ("a date in another zone", "Mon, 21 Sep 2026 16:13:30 +0200", "", 10),
    ("a date gone by", formatdate(NOW - 20, usegmt=True), "", 0),
    ("negative", "-1", "", None),
    ("another way to write a number", "1e9", "", None),
    ("two numbers", "8, 9", "", None),
    ("a date that is none", "Mon, 99 Foo 2026 25:61:61 GMT", "", None),
    ("a date beyond all calendars", "Mon, 21 Sep 99999 00:00:00 GMT", "", None),
    ("the body goes first", "8", '{"retry_after": 2.5}', 2.5),
    ("a text in the body", "", '{"retry_after": "7"}', 7),
    ("nought in the body", "8", '{"retry_after": 0}', 8),
    ("negative in the body", "", '{"retry_after": -5}', None),
    ("NaN in the body", "", '{"retry_after": NaN}', None),
    ("an object in the body", "", '{"retry_after": {"s": 5}}', None),
    ("in words", "", '{"detail": "Your rate limit resets in ~30s."}', 30),
    ("a figure goes before words", "8", '{"detail": "resets in ~5s."}', 8),
    ("words without a figure", "", '{"detail": "resets in a while"}', None),
]


@pytest.mark.parametrize(("header", "body", "asked_s"), cases(ASKED))
def test_retry_after_is_read_from_body_header_or_words(header, body, asked_s):
    """The body's number comes first, then the header, then the provider's words."""
    assert provider_response(429, body, retry_after=header).retry_after_s(NOW) == asked_s


PATIENT = main.RetryPolicy(statuses=(), budget=main.UNTIL_DEADLINE, patient=True)
IMPATIENT = main.RetryPolicy(statuses=(), budget=main.UNTIL_DEADLINE)
CAPS = [  # Retry-After, attempts, the least wait of an impatient call and of a patient one
    ("at once is not before the exponential delay", 0.0, 3, 2.0, 2.0),
    ("less than the exponential delay", 0.7, 3, 2.0, 2.0),
    ("as the provider asks", 7.0, 3, 7.0, 7.0),
    ("at the cap", 30.0, 1, 30.0, 30.0),
    ("above the cap", 30.001, 1, None, 30.0),
    ("for ever", float("inf"), 1, None, 30.0),
]


@pytest.mark.parametrize(("asked_s", "attempts", "impatient_s", "patient_s"), cases(CAPS))
def test_retry_after_is_obeyed_up_to_the_cap(
    monkeypatch, asked_s, attempts, impatient_s, patient_s
):
    """The wait is never shorter than Retry-After and the exponential delay, and has jitter on top."""
    use_settings(monkeypatch, RETRY_FIRST_SECONDS="0.5", PATIENCE_SECONDS="")
    for retry, least_s in ((IMPATIENT, impatient_s), (PATIENT, patient_s)):
        delays_s = [
            main.retry_delay_s(retry, main.UNTIL_DEADLINE, attempts, 9.0, asked_s)
            for _ in range(200)
        ]
        if least_s is None:
            assert set(delays_s) == {None}
        else:
            assert least_s <= min(delays_s) < 1.02 * least_s
            assert max(delays_s) <= 1.1 * least_s
            assert len(set(delays_s)) > 1 or asked_s > 30


ENDS = [
    ("the third of four attempts", main.RetryBudget(attempts=4), 3, 1e6, True),
    ("the fourth", main.RetryBudget(attempts=4), 4, 0.0, False),
    ("two minutes, not over", main.RetryBudget(patience_share=main.PAID_SHARE), 1000, 119.9, True),
    ("two minutes, over", main.RetryBudget(patience_share=main.PAID_SHARE), 1000, 120.0, False),
    (
        "half a minute, over",
        main.RetryBudget(patience_share=main.MAX_WAIT_SHARE),
        1000,
        30.0,
        False,
    ),
    ("without end", main.RetryBudget(), 10_000, 1e6, True),
]


@pytest.mark.parametrize(("budget", "attempts", "failing_s", "goes_on"), cases(ENDS))
def test_retries_come_to_an_end(monkeypatch, budget, attempts, failing_s, goes_on):
    """By the number of attempts, or by the time since the first failure, whatever the provider asks."""
    use_settings(monkeypatch, PATIENCE_SECONDS="")
    for asked_s in (None, 0.0, 1.0):
        delay_s = main.retry_delay_s(IMPATIENT, budget, attempts, failing_s, asked_s)
        assert (delay_s is not None) == goes_on


@pytest.mark.parametrize(
    ("attempts", "longest_s"), [(1, 0.5), (2, 1), (3, 2), (5, 8), (6, 8), (100_000, 8)]
)
def test_backoff_doubles_up_to_eight_seconds(monkeypatch, attempts, longest_s):
    """From RETRY_FIRST_SECONDS on; jitter takes off up to a quarter, so that jobs do not come back together."""
    use_settings(monkeypatch, RETRY_FIRST_SECONDS="0.5")
    delays_s = [
        main.retry_delay_s(IMPATIENT, main.UNTIL_DEADLINE, attempts, 0.0, None) or 0
        for _ in range(400)
    ]
    assert 0.75 * longest_s <= min(delays_s) < 0.78 * longest_s
    assert 0.97 * longest_s < max(delays_s) <= longest_s


# What is retried

Work = Callable[[], Awaitable[Any]]
UNSENT = [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.PoolTimeout("full")]
DOUBTFUL = [  # it may have been done
    httpx.ReadTimeout("slow"),
    httpx.ReadError("reset"),
    httpx.WriteError("reset"),
    httpx.WriteTimeout("slow"),
    httpx.RemoteProtocolError("Server disconnected without sending a response."),
    httpx.DecodingError("not gzip"),
]
UNREADABLE = [
    b"",
    b"<html>502</html>",
    b'{"id": "p1", "sta',
    b"\xff\xfe\x00",
    b"[]",
    b"null",
    b"[" * 100_000,
]
STATUSES = (*range(301, 305), *range(400, 432), 451, *range(500, 512), 520, 524, 529, 544, 599)
SERVER_ERRORS = range(500, 600)
REPEATED_STATUSES = {
    "speech": {429, 500, 502, 503, 504},
    "create": {429},
    "model": {408, 429, *SERVER_ERRORS},
    "list": {408, 429, *SERVER_ERRORS},
    "poll": {*range(300, 400), 401, 403, 404, 408, 429, *SERVER_ERRORS},
    "upload": {429, *SERVER_ERRORS},
    "fetch": {404, 429, *SERVER_ERRORS},
    "paid upload": {429, *SERVER_ERRORS},
    "paid fetch": {404, 429, *SERVER_ERRORS},
}
EVERY_CALL = pytest.mark.parametrize("call", REPEATED_STATUSES)
PAID = ("list", "poll", "paid upload", "paid fetch")
IN_LINE = ("speech", "create")  # after a 429 they wait in line, up to the job's deadline

# How often a call is made while it goes wrong in one way; "on": as long as its patience lasts, which is more than a few
# times; "-": no such case.
ATTEMPTS = """
                 speech   create   model   list   read   upload   fetch   paid upload   paid fetch
throttled       | on     | on     | 4     | on   | on   | 4      | 4     | on          | on
down            | 3      | 1      | 4     | on   | on   | 4      | 4     | on          | on
no connection   | 3      | 4      | 4     | on   | on   | 4      | 4     | on          | on
no certificate  | 1      | 1      | 1     | on   | on   | 1      | 1     | on          | on
cut             | 1      | 1      | 4     | on   | on   | 4      | 4     | on          | on
unreadable      | 1      | 1      | 4     | on   | on   | 4      | -     | on          | -
"""
FAILURES: dict[str, Callable[[], Any]] = {
    "throttled": lambda: httpx.Response(429),
    "down": lambda: httpx.Response(503),
    "no connection": lambda: httpx.ConnectError("refused"),
    "no certificate": lambda: httpx.ConnectError(
        "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"
    ),
    "cut": lambda: httpx.ReadError("reset"),
    "unreadable": lambda: httpx.Response(200, content=b"<html>"),
}


def read_table() -> Iterator[Any]:
    """Every cell of ATTEMPTS."""
    for line in ATTEMPTS.strip().splitlines()[1:]:
        kind, *cells = (cell.strip() for cell in line.split("|"))
        for call, attempts in zip(REPEATED_STATUSES, cells, strict=True):
            if attempts != "-":
                yield pytest.param(call, kind, attempts, id=f"{call}, {kind}")


@pytest.fixture
def calls(
    tmp_path: Path, providers: respx.MockRouter
) -> dict[str, tuple[str, Work, httpx.Response]]:
    """Each call of a job: where it goes, the work that makes it, and an answer that it is content with."""
    v1, file_url = f"{REPLICATE_URL}/v1", DONE["output"]
    # A create that failed is not found
    providers.route(url=f"{v1}/predictions").respond(200, json={"results": []})
    stored = httpx.Response(200, json={"Key": "a"})
    upload_url = f"{SUPABASE_URL}/storage/v1/object/pets/a.mp3"

    upload = partial(main.supabase_upload, "a.mp3", b"ID3speech", "audio/mpeg")
    fetch = partial(main.download, file_url, tmp_path / "video")
    create_url, started = f"{v1}/models/minimax/hailuo-02/predictions", main.Prediction(**STARTING)
    speech_url, spoken = (
        f"{ELEVEN_URL}/v1/text-to-speech/voice",
        httpx.Response(200, content=b"ID3speech"),
    )
    created, listed = httpx.Response(201, json=STARTING), httpx.Response(200, json={"results": []})
    return {
        "speech": (speech_url, lambda: main.elevenlabs_tts_bytes("Hello", "voice"), spoken),
        "create": (
            create_url,
            lambda: main.create_prediction(main.HAILUO, PROMPT, main.Job("-")),
            created,
        ),
        "model": (
            f"{v1}/models/a/b",
            lambda: main.look_up_model("a/b"),
            httpx.Response(200, json=MODEL),
        ),
        "list": (
            f"{v1}/predictions",
            lambda: anext(main.predictions_since(time.time()), None),
            listed,
        ),
        "poll": (
            f"{v1}/predictions/p1",
            lambda: main.poll_prediction(started),
            httpx.Response(200, json=DONE),
        ),
        "upload": (upload_url, partial(upload, main.UPLOAD_RETRY), stored),
        "fetch": (
            file_url,
            partial(fetch, main.DOWNLOAD_RETRY),
            httpx.Response(200, content=b"video"),
        ),
        "paid upload": (upload_url, partial(upload, main.PAID_UPLOAD_RETRY), stored),
        "paid fetch": (
            file_url,
            partial(fetch, main.PAID_DOWNLOAD_RETRY),
            httpx.Response(200, content=b"video"),
        ),
    }


async def count_requests(
    router: respx.MockRouter, url: str, work: Work, outcomes: list[Any]
) -> tuple[int, bool]:
    """How many requests the work makes when it meets these outcomes in turn, and whether it succeeds."""
    route = router.route(url=url).mock(side_effect=outcomes)
    before = route.call_count
    try:
        await asyncio.wait_for(work(), 10)
    except main.ServiceError:
        return route.call_count - before, False
    return route.call_count - before, True


@EVERY_CALL
async def test_which_outcomes_are_retried(monkeypatch, providers, calls, call):
    """Every status, every transport error and every invalid response; what may be paid for is not sent twice."""
    # A create is looked for
    use_settings(monkeypatch, PATIENCE_SECONDS="0.02" if call == "create" else "4")
    url, work, success = calls[call]
    is_safe = call not in ("speech", "create")
    outcomes = [(httpx.Response(status), status in REPEATED_STATUSES[call]) for status in STATUSES]
    outcomes += [(error, True) for error in UNSENT] + [(error, is_safe) for error in DOUBTFUL]
    if "fetch" not in call:
        outcomes += [
            (httpx.Response(success.status_code, content=body), is_safe) for body in UNREADABLE
        ]
    for outcome, is_repeated in outcomes:
        expected = (2, True) if is_repeated else (1, False)
        assert await count_requests(providers, url, work, [outcome, success]) == expected, repr(
            outcome
        )


@pytest.mark.parametrize(("call", "kind", "attempts"), list(read_table()))
async def test_how_many_attempts_a_call_makes(monkeypatch, providers, calls, call, kind, attempts):
    """A call gives up after a few attempts, unless something is paid for already."""
    if attempts == "on":
        use_settings(monkeypatch, PATIENCE_SECONDS="40")
    url, work, success = calls[call]
    expected = (10, True) if attempts == "on" else (int(attempts), False)
    assert (
        await count_requests(providers, url, work, [*(FAILURES[kind]() for _ in range(9)), success])
        == expected
    )


SHARES = [
    ("a list: a quarter", "list", 503, 0.1),
    *((f"a poll answered {status}: a quarter", "poll", status, 0.1) for status in (401, 403, 404)),
    ("the upload of a video: the whole", "paid upload", 503, 0.4),
    ("the download of a video: the whole", "paid fetch", 404, 0.4),
]


@pytest.mark.parametrize(("call", "status", "patience_s"), cases(SHARES))
async def test_how_long_a_call_is_retried(providers, calls, call, status, patience_s):
    """Each outcome has its share of PATIENCE_SECONDS, here 0.4 s."""
    url, work, _ = calls[call]
    providers.route(url=url).respond(
        status, headers={"Retry-After": "0.005"}, json={"detail": "No."}
    )
    took_s = math.inf
    for _ in range(3):  # a busy machine makes it longer, never shorter
        started = time.monotonic()
        error = await error_from(work())
        assert f"{status}: No." in error.detail
        took_s = min(took_s, time.monotonic() - started)
        if took_s < 1.9 * patience_s:
            break
    assert patience_s <= took_s < 1.9 * patience_s


@pytest.mark.parametrize("call", [call for call in REPEATED_STATUSES if call not in IN_LINE])
async def test_a_retry_after_over_the_cap_ends_an_unpaid_call(providers, calls, call):
    """At once, with an error that has the number; a paid call waits for the cap, here 0.1 s."""
    url, work, success = calls[call]
    throttled = httpx.Response(429, headers={"Retry-After": "31"}, json={"detail": "Too many."})
    started, route = (
        time.monotonic(),
        providers.route(url=url).mock(side_effect=[throttled, success]),
    )
    if call in PAID:
        await work()
        assert (route.call_count, time.monotonic() - started >= 0.1) == (2, True)
        return
    error = await error_from(work())
    assert route.call_count == 1
    assert error.detail.rstrip(".").endswith(
        "429: Too many. (it asks to wait 31 s, longer than a job can)"
    )


@pytest.mark.parametrize("call", ["upload", "fetch"])
async def test_the_status_code_in_a_storage_400_decides(providers, calls, call):
    """Supabase answers 400 to nearly everything; `statusCode` in the body is what it means."""
    url, work, success = calls[call]
    for status in ("404", "429", "500", "544", "400", "403", "413", "4290", "", "9" * 5000):
        is_repeated = status in ("429", "500", "544") or (status == "404" and call == "fetch")
        expected = (2, True) if is_repeated else (1, False)
        hidden = httpx.Response(400, json={"statusCode": status, "error": "any", "message": "any"})
        assert await count_requests(providers, url, work, [hidden, success]) == expected, status[:9]


def closing(first: bytes) -> Callable[[socket.socket], None]:
    """A server's answer that leaves the connection open, and closes it at the next request without a word."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(first.replace(b"connection: close", b"connection: keep-alive"))
        while (
            more := connection.recv(65_536)
        ) and b"HTTP/1.1" not in more:  # what is left of the first request
            pass

    return talk


async def test_creates_and_speech_use_new_connections(monkeypatch, client, serve):
    """The server may close a kept connection just as a request is sent that must not be sent twice."""
    look_up, created = json.dumps(MODEL).encode(), json.dumps(STARTING).encode()
    server = serve(
        {
            "/v1/models/a/b": closing(network.reply(200, look_up)),
            "/v1/models/minimax/hailuo-02/predictions": closing(network.reply(201, created)),
            "/v1/text-to-speech/voice?output_format=mp3_44100_64": closing(
                network.reply(200, b"ID3speech")
            ),
        }
    )
    use_settings(monkeypatch, REPLICATE_BASE_URL=server.url, ELEVEN_BASE_URL=server.url)
    for _ in range(2):
        await main.look_up_model("a/b")
        assert await main.elevenlabs_tts_bytes("Hello", "voice") == b"ID3speech"
        assert (await main.create_prediction(main.HAILUO, PROMPT, main.Job("-"))).id == "p1"


async def test_every_retry_is_logged(providers, calls, caplog):
    """One line has what happened and the wait until the next attempt."""
    url, work, success = calls["speech"]
    failure = httpx.Response(503, json={"detail": {"message": "Maintenance"}})
    await count_requests(providers, url, work, [failure, httpx.ConnectError("refused"), success])
    assert [line.partition(" ")[2] for line in caplog.messages] == [
        "POST api.elevenlabs.io attempt=1 failed (503: Maintenance), retry in 0.0 s",
        "POST api.elevenlabs.io attempt=2 failed (ConnectError refused), retry in 0.0 s",
    ]


# The message of an error response

LIST_SHAPE = {
    "detail": [
        {"loc": ["body", "text"], "msg": "field required"},
        {"loc": ["seed"], "msg": "no integer"},
    ]
}
PAGE = """<!DOCTYPE html><html><head><title>502 Bad Gateway</title><style>p { color: red }</style>
<script>var secret = "<b>";</script></head><body><h1>502 Bad&nbsp;Gateway</h1>
<!-- padding --><p>cloudflare &amp; friends</p></body></html>"""
DEPTHS = {5: "?", 6: "Bad Request", 700: "Bad Request", 100_000: "Bad Request"}
WORDS: list[tuple[str, int, str | bytes, str]] = [  # what it is, the status, the body, the words
    (
        "ElevenLabs",
        400,
        '{"detail": {"status": "voice_not_found", "message": "No such voice."}}',
        "No such voice.",
    ),
    ("ElevenLabs, list", 400, json.dumps(LIST_SHAPE), "field required; no integer"),
    (
        "Replicate",
        402,
        '{"title": "Any", "detail": "- No\\n credit.\\n", "status": 402}',
        "- No credit.",
    ),
    ("only a title", 400, '{"title": "Unauthenticated"}', "Unauthenticated"),
    ("Supabase", 400, '{"statusCode": "409", "error": "Duplicate", "message": "Exists"}', "Exists"),
    ("an error in an object", 400, '{"error": {"message": "inner"}}', "inner"),
    (
        "the first that says something",
        400,
        '{"detail": null, "message": "", "error": "third"}',
        "third",
    ),
    ("lists in a list", 400, '["one", ["two", {"msg": "three"}]]', "one; two; three"),
    ("nothing", 429, "", "Too Many Requests"),
    ("nothing, under no standard's status", 544, "", "no message"),
    ("null", 400, "null", "Bad Request"),
    ("a number inside", 400, '{"detail": 5}', "Bad Request"),
    ("JSON cut off", 400, '{"detail": "cut', "Bad Request"),
    ("not UTF-8", 400, b'{"detail": "\xff\xfe"}', "Bad Request"),
    ("2 MB of noise", 400, b"\x00\x9f\x92\x96" * 500_000, "Bad Request"),
    *(
        (f"{depth} deep", 400, '{"detail":' * depth + '"?"' + "}" * depth, words)
        for depth, words in DEPTHS.items()
    ),
    (
        "300 characters",
        400,
        json.dumps({"detail": ["x" * 100] * 100}),
        ("x" * 100 + "; ") * 2 + "x" * 96,
    ),
    ("a proxy's page", 502, PAGE, "502 Bad Gateway 502 Bad Gateway cloudflare & friends"),
    ("a page that says nothing", 400, "<html></html>", "Bad Request"),
    ("a page that is not UTF-8", 400, b"<p>caf\xe9</p>", "caf\ufffd"),
    ("300 characters of a page", 502, "<p>" + "x" * 20_000 + "</p>", "x" * 300),
]


@pytest.mark.parametrize(("status", "body", "message"), cases(WORDS))
def test_the_message_of_an_error_response_is_found(status, body, message):
    """In whatever shape of JSON, or in a page without its tags; else the phrase of the status."""
    assert main.provider_message(provider_response(status, body)) == message


def test_plain_text_is_a_message_too():
    """Proxies answer so."""
    assert (
        main.provider_message(
            provider_response(502, "error code: 1015\n", content_type="text/plain")
        )
        == "error code: 1015"
    )


@pytest.mark.parametrize(
    "shape", ['{{"detail": "{text}"}}', "<html><p>{text}</p></html>"], ids=["JSON", "HTML"]
)
@pytest.mark.parametrize(
    "text", ["{key} is not valid", "x" * 280 + " {key}", "key={key}, Authorization: Bearer {key}"]
)
async def test_a_key_that_a_provider_echoes_is_not_passed_on(providers, calls, caplog, text, shape):
    """Neither whole nor in part, neither to the client nor to the log."""
    caplog.set_level(logging.DEBUG, logger="talking_pet")
    url, work, _ = calls["upload"]
    key = SECRETS["SUPABASE_SERVICE_ROLE"]
    body = shape.format(text=text.format(key=key))
    providers.route(url=url).mock(
        side_effect=[httpx.Response(status, html=body) for status in (429, 401)]
    )
    error = await error_from(work())
    assert "***" in error.detail or "x" * 200 in error.detail
    assert not [line for line in (error.detail, str(error), *caplog.messages) if key[:8] in line]


async def test_no_error_contains_a_key(providers, calls, caplog):
    """Neither an error of the HTTP library nor a traceback, wherever its text comes from."""
    key = SECRETS["ELEVEN_API_KEY"]
    url, work, _ = calls["speech"]
    providers.route(url=url).mock(side_effect=httpx.WriteError(f"cannot send {key}"))
    assert (
        await error_from(work())
    ).detail == "ElevenLabs did not answer: WriteError cannot send ***."
    assert main.ServiceError(" and ".join(SECRETS.values())).detail == "*** and *** and ***"
    assert key not in main.as_service_error(RuntimeError(f"no place for {key}")).detail
    assert "RuntimeError: no place for ***" in caplog.text
    assert key not in caplog.text


class Noise(httpx.AsyncByteStream):
    """A body of 50 MB, which tells how much of it was read, and whether it was left open."""

    sent, is_closed = 0, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body."""
        while self.sent < 50_000_000:
            self.sent += 1_000_000
            yield b"\x9f" * 1_000_000

    async def aclose(self) -> None:
        """The connection can be closed, or serve the next request."""
        self.is_closed = True


@EVERY_CALL
async def test_an_endless_error_body_is_not_read_to_its_end(providers, calls, call):
    """No more than the limit is held, the connection is closed, and the error names the status."""
    url, work, _ = calls[call]
    body = Noise()
    providers.route(url=url).mock(side_effect=[httpx.Response(402, stream=body)])
    error = await error_from(work())
    assert "402: Payment Required" in error.detail
    assert error.http_status == 500
    assert (body.sent <= 12_000_000, body.is_closed) == (True, True)
