"""What is sent again, after which wait, and what never; and the words that are taken from a refusal."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

import main
from tests.inprocess import (
    ELEVEN_URL,
    REPLICATE_URL,
    SECRETS,
    SUPABASE_URL,
    answer,
    error_of,
    log_lines,
    told,
    use_settings,
)

NOW = 1_790_000_000.0  # a clock time
STARTING = {"id": "p1", "status": "starting"}
DONE = {"id": "p1", "status": "succeeded", "output": "https://replicate.delivery/xezq/film.mp4"}
MODEL = {
    "is_official": True,
    "latest_version": {
        "openapi_schema": {
            "components": {"schemas": {"Input": {"properties": {"image": {"type": "string", "format": "uri"}}}}}
        }
    },
}

pytestmark = pytest.mark.usefixtures("settings")


@pytest.fixture
def providers(client: httpx.AsyncClient) -> Iterator[respx.MockRouter]:
    """The edge of the running process: what is not routed by a test fails it."""
    with respx.mock(assert_all_called=False) as router:
        yield router


# How long to wait


@pytest.mark.parametrize(
    ("headers", "body", "asked_s"),
    [
        pytest.param({}, "", None, id="nothing said"),
        pytest.param({"Retry-After": "8"}, "", 8, id="seconds"),
        pytest.param({"Retry-After": " 8 "}, "", 8, id="seconds between blanks"),
        pytest.param({"Retry-After": "0"}, "", 0, id="at once"),
        pytest.param({"Retry-After": "1.5"}, "", 1.5, id="a part of a second"),
        pytest.param({"Retry-After": "86400"}, "", 86_400, id="a day"),
        pytest.param({"Retry-After": "9" * 400}, "", float("inf"), id="for ever"),
        pytest.param({"Retry-After": formatdate(NOW + 20, usegmt=True)}, "", 20, id="a date to come"),
        pytest.param({"Retry-After": formatdate(NOW + 20)}, "", 20, id="a date without a zone's name"),
        pytest.param({"Retry-After": "Mon, 21 Sep 2026 16:13:30 +0200"}, "", 10, id="a date in another zone"),
        pytest.param({"Retry-After": formatdate(NOW - 20, usegmt=True)}, "", 0, id="a date gone by"),
        pytest.param({"Retry-After": formatdate(NOW, usegmt=True)}, "", 0, id="now"),
        pytest.param({"Retry-After": ""}, "", None, id="empty"),
        pytest.param({"Retry-After": "-1"}, "", None, id="negative"),
        pytest.param({"Retry-After": "nan"}, "", None, id="nan"),
        pytest.param({"Retry-After": "inf"}, "", None, id="inf"),
        pytest.param({"Retry-After": "1e9"}, "", None, id="another way to write a number"),
        pytest.param({"Retry-After": "soon"}, "", None, id="a word"),
        pytest.param({"Retry-After": "8, 9"}, "", None, id="two numbers"),
        pytest.param({"Retry-After": "Mon, 99 Foo 2026 25:61:61 GMT"}, "", None, id="a date that is none"),
        pytest.param({"Retry-After": "Mon, 21 Sep 99999 00:00:00 GMT"}, "", None, id="a date beyond all calendars"),
        pytest.param({}, '{"retry_after": 5}', 5, id="in the body"),
        pytest.param({}, '{"retry_after": 2.5}', 2.5, id="in the body, a part of a second"),
        pytest.param({}, '{"retry_after": "7"}', 7, id="in the body, as a text"),
        pytest.param({"Retry-After": "8"}, '{"retry_after": 5}', 5, id="the body goes first"),
        pytest.param({"Retry-After": "8"}, '{"retry_after": null}', 8, id="null in the body"),
        pytest.param({"Retry-After": "8"}, '{"retry_after": 0}', 8, id="nought in the body"),
        pytest.param({}, '{"retry_after": -5}', None, id="negative in the body"),
        pytest.param({}, '{"retry_after": NaN}', None, id="NaN in the body"),
        pytest.param({}, '{"retry_after": Infinity}', None, id="infinity in the body"),
        pytest.param({}, '{"retry_after": true}', None, id="true in the body"),
        pytest.param({}, '{"retry_after": [5]}', None, id="a list in the body"),
        pytest.param({}, '{"retry_after": {"s": 5}}', None, id="an object in the body"),
        pytest.param({"Retry-After": "8"}, "<html>", 8, id="HTML beside the header"),
        pytest.param({"Retry-After": "8"}, '["retry_after"]', 8, id="a list beside the header"),
        pytest.param({}, '{"detail": "Your rate limit resets in ~30s."}', 30, id="in words"),
        pytest.param({}, '{"detail": "resets in ~5s.", "retry_after": 6}', 6, id="a figure goes before words"),
        pytest.param({"Retry-After": "8"}, '{"detail": "resets in ~5s."}', 8, id="the header goes before words"),
        pytest.param({}, '{"detail": "resets in ~-5s."}', None, id="negative words"),
        pytest.param({}, '{"detail": "resets in a while"}', None, id="words without a figure"),
        pytest.param({}, '{"detail": ["resets in ~5s."]}', 5, id="words in a list"),
        pytest.param({}, '{"detail": null}', None, id="no words"),
    ],
)
def test_the_wait_that_a_provider_asks_for(headers, body, asked_s):
    """Read from the body's figure, the header or the words, whatever they hold."""
    assert main.asked_wait_s(main.Answer(429, httpx.Headers(headers), body.encode()), NOW) == asked_s


RETRY = main.Retry(frozenset({429}), attempts=4)
ENDLESS = main.Retry(frozenset({429}))


@pytest.mark.parametrize(
    ("asked_s", "delay_s"),
    [
        pytest.param(0.7, 0.7, id="as asked"),
        pytest.param(30.0, 30.0, id="at the cap"),
        pytest.param(30.001, None, id="above the cap gives up"),
        pytest.param(86_400.0, None, id="a day gives up"),
        pytest.param(float("inf"), None, id="for ever gives up"),
        pytest.param(0.0, 0.5, id="at once is not before the first wait"),
    ],
)
def test_a_providers_own_figure_is_kept_up_to_the_cap(monkeypatch, asked_s, delay_s):
    """Half a minute at most; who asks for more is not waited for."""
    use_settings(monkeypatch, RETRY_FIRST_SECONDS="0.5")
    assert [retry.delay_s(attempt, asked_s) for retry in (RETRY, ENDLESS) for attempt in (1, 3)] == [delay_s] * 4


@pytest.mark.parametrize("asked_s", [None, 0.0, 1.0])
def test_attempts_come_to_an_end(asked_s):
    """After the last attempt there is no wait, whatever the provider asks."""
    assert [RETRY.delay_s(attempt, asked_s) is None for attempt in range(1, 7)] == [False] * 3 + [True] * 3
    assert ENDLESS.delay_s(10_000, asked_s) is not None


@pytest.mark.parametrize(
    ("attempt", "longest_s"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 8), (7, 8), (100, 8), (100_000, 8)]
)
def test_waits_double_up_to_eight_seconds(monkeypatch, attempt, longest_s):
    """Each is shortened by up to a quarter, so that jobs that failed together do not come back together."""
    use_settings(monkeypatch, RETRY_FIRST_SECONDS="0.5")
    waits = [ENDLESS.delay_s(attempt, None) or 0 for _ in range(400)]
    assert 0.75 * longest_s <= min(waits) < 0.78 * longest_s
    assert 0.97 * longest_s < max(waits) <= longest_s


def test_the_first_wait_is_a_setting(monkeypatch):
    """RETRY_FIRST_SECONDS moves all of them."""
    use_settings(monkeypatch, RETRY_FIRST_SECONDS="0.008")
    assert 0.006 <= (ENDLESS.delay_s(1, None) or 0) <= 0.008
    assert 0.024 <= (ENDLESS.delay_s(3, None) or 0) <= 0.032


# What is repeated

Outcome = int | httpx.Response | httpx.RequestError
Work = Callable[[], Awaitable[Any]]

UNSENT: dict[str, httpx.RequestError] = {
    "no connection": httpx.ConnectError("refused"),
    "no connection in time": httpx.ConnectTimeout("slow"),
    "no free connection": httpx.PoolTimeout("full"),
}
DOUBTFUL: dict[str, httpx.RequestError] = {
    "no answer in time": httpx.ReadTimeout("slow"),
    "cut while reading": httpx.ReadError("reset"),
    "cut while writing": httpx.WriteError("reset"),
    "no room to write in time": httpx.WriteTimeout("slow"),
    "closed without an answer": httpx.RemoteProtocolError("Server disconnected without sending a response."),
    "a body that cannot be unpacked": httpx.DecodingError("not gzip"),
}
TRANSPORT_ERRORS = {**UNSENT, **DOUBTFUL}
STATUSES = (*range(301, 305), *range(400, 432), 451, *range(500, 512), 520, 524, 529, 544, 599)


def hidden(status: str) -> httpx.Response:
    """A refusal of Supabase: a 400 that has the truth in its body."""
    return httpx.Response(400, json={"statusCode": status, "error": "any", "message": "any"})


async def speak() -> bytes:
    """The speech call."""
    return await main.elevenlabs_tts_bytes("Hello", "voice")


async def create() -> main.Prediction:
    """The create call."""
    return await main.create_prediction(main.HAILUO, {"prompt": "Talk"})


async def read() -> main.Prediction:
    """The read call, after one that said `starting`."""
    return await main.wait_for_prediction(main.Prediction(**STARTING), main.ignore_prediction)


async def look_up() -> main.VideoModel:
    """The model call, without what is kept of earlier ones."""
    return await main.look_up_model("some/model")


async def upload() -> str:
    """The upload call."""
    return await main.supabase_upload("audio/a.mp3", b"ID3speech", "audio/mpeg")


CREATE_URL = f"{REPLICATE_URL}/v1/models/minimax/hailuo-02/predictions"
FILE_URL = "https://replicate.delivery/xezq/film.mp4"


@pytest.fixture
def calls(tmp_path: Path) -> dict[str, tuple[str, Work, httpx.Response]]:
    """Each call of a job: where it goes, the work that makes it, and an answer that it is content with."""
    return {
        "speech": (f"{ELEVEN_URL}/v1/text-to-speech/voice", speak, httpx.Response(200, content=b"ID3speech")),
        "create": (CREATE_URL, create, httpx.Response(201, json=STARTING)),
        "read": (f"{REPLICATE_URL}/v1/predictions/p1", read, httpx.Response(200, json=DONE)),
        "model": (f"{REPLICATE_URL}/v1/models/some/model", look_up, httpx.Response(200, json=MODEL)),
        "upload": (
            f"{SUPABASE_URL}/storage/v1/object/pets/audio/a.mp3",
            upload,
            httpx.Response(200, json={"Key": "a"}),
        ),
        "download": (
            FILE_URL,
            lambda: main.download(FILE_URL, tmp_path / "film"),
            httpx.Response(200, content=b"film"),
        ),
    }


REPEATED_STATUSES = {
    "speech": {429, 500, 502, 503, 504},
    "create": {429},
    "read": {408, 429, *range(500, 600)},
    "model": {408, 429, *range(500, 600)},
    "upload": {429, *range(500, 600)},
    "download": {404, 429, *range(500, 600)},
}
ATTEMPTS = {"speech": 3, "create": 4, "read": None, "model": None, "upload": 4, "download": 4}  # None: without end
EVERY_CALL = pytest.mark.parametrize("call", ATTEMPTS)


async def count_requests(router: respx.MockRouter, url: str, work: Work, outcomes: list[Any]) -> tuple[int, bool]:
    """How many requests the work makes when it meets these outcomes in turn, and whether it succeeds."""
    route = router.route(url=url).mock(side_effect=outcomes)
    before = route.call_count
    try:
        await asyncio.wait_for(work(), 10)
    except main.ServiceError:
        return route.call_count - before, False
    return route.call_count - before, True


@pytest.mark.anyio
@EVERY_CALL
async def test_which_statuses_are_repeated(providers, calls, call):
    """Every status there is: those of the table lead to a second request, the others to none."""
    url, work, success = calls[call]
    for status in STATUSES:
        expected = (2, True) if status in REPEATED_STATUSES[call] else (1, False)
        assert await count_requests(providers, url, work, [httpx.Response(status), success]) == expected, status


@pytest.mark.anyio
@EVERY_CALL
@pytest.mark.parametrize("error", [pytest.param(error, id=name) for name, error in UNSENT.items()])
async def test_a_request_that_has_not_left_is_always_repeated(providers, calls, call, error):
    """Where no connection was made, nothing was bought."""
    url, work, success = calls[call]
    assert await count_requests(providers, url, work, [error, success]) == (2, True)


@pytest.mark.anyio
@EVERY_CALL
@pytest.mark.parametrize("error", [pytest.param(error, id=name) for name, error in DOUBTFUL.items()])
async def test_a_doubtful_request_is_repeated_only_where_it_is_safe(providers, calls, call, error):
    """Speech and prediction may have been made, and would be paid twice."""
    url, work, success = calls[call]
    expected = (1, False) if call in ("speech", "create") else (2, True)
    assert await count_requests(providers, url, work, [error, success]) == expected


@pytest.mark.anyio
@EVERY_CALL
@pytest.mark.parametrize(
    "outcome",
    [pytest.param(429, id="throttled"), pytest.param(httpx.ConnectError("refused"), id="no connection")],
)
async def test_how_often_a_call_is_repeated(providers, calls, call, outcome):
    """Reads go on as long as the job may; the others give up."""
    url, work, success = calls[call]
    failures = [outcome if isinstance(outcome, httpx.RequestError) else httpx.Response(outcome) for _ in range(12)]
    expected = (13, True) if ATTEMPTS[call] is None else (ATTEMPTS[call], False)
    assert await count_requests(providers, url, work, [*failures, success]) == expected


@pytest.mark.anyio
@EVERY_CALL
async def test_a_wait_that_is_too_long_ends_the_call_saying_so(providers, calls, call):
    """One request, no wait."""
    url, work, success = calls[call]
    throttled = httpx.Response(429, headers={"Retry-After": "31"}, json={"detail": "Too many."})
    route = providers.route(url=url).mock(side_effect=[throttled, success])
    error = await error_of(work())
    assert route.call_count == 1
    assert error.detail.rstrip(".").endswith("429: Too many. (it asks to wait 31 s, longer than a job can)")


@pytest.mark.anyio
async def test_a_wait_that_is_asked_for_is_kept(providers, calls):
    """Not a moment sooner."""
    url, work, success = calls["read"]
    throttled = httpx.Response(429, json={"detail": "Request was throttled.", "retry_after": 0.3})
    providers.route(url=url).mock(side_effect=[throttled, success])
    started = time.monotonic()
    await work()
    assert 0.3 <= time.monotonic() - started < 5


@pytest.mark.anyio
@pytest.mark.parametrize("call", ["upload", "download"])
@pytest.mark.parametrize(
    ("status", "is_repeated"),
    [
        *((status, True) for status in ("429", "500", "503", "544")),
        *((status, False) for status in ("400", "403", "409", "413", "415", "423")),
        pytest.param("4290", False, id="no status"),
        pytest.param("", False, id="empty"),
        pytest.param("9" * 5000, False, id="5,000 digits"),
    ],
)
async def test_the_truth_in_a_400_of_the_storage_decides(providers, calls, call, status, is_repeated):
    """Supabase answers 400 to nearly everything; `statusCode` in the body is what it means."""
    url, work, success = calls[call]
    expected = (2, True) if is_repeated else (1, False)
    assert await count_requests(providers, url, work, [hidden(status), success]) == expected


@pytest.mark.anyio
async def test_an_object_that_is_not_there_yet_is_asked_for_again(providers, calls):
    """A download repeats a 404, also when it is hidden in a 400; an upload does not."""
    url, work, success = calls["download"]
    assert await count_requests(providers, url, work, [hidden("404"), success]) == (2, True)
    url, work, success = calls["upload"]
    assert await count_requests(providers, url, work, [hidden("404"), success]) == (1, False)


UNREADABLE = [
    pytest.param(b"", id="nothing"),
    pytest.param(b"<html>502</html>", id="HTML"),
    pytest.param(b'{"id": "p1", "sta', id="cut off"),
    pytest.param(b"\xff\xfe\x00", id="noise"),
    pytest.param(b"[]", id="a list"),
    pytest.param(b"null", id="null"),
    pytest.param(b"[" * 100_000, id="too deep"),
]


@pytest.mark.anyio
@pytest.mark.parametrize("call", ["read", "model", "upload"])
@pytest.mark.parametrize("body", UNREADABLE)
async def test_an_unreadable_success_is_asked_for_again_where_that_is_safe(providers, calls, call, body):
    """A proxy's page with status 200 does not end a job that is being paid for."""
    url, work, success = calls[call]
    assert await count_requests(providers, url, work, [httpx.Response(200, content=body), success]) == (2, True)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [{}, {"id": "p1"}, {"status": "succeeded"}, {"id": "../x", "status": "succeeded"}, {"id": 1, "status": None}],
)
async def test_a_read_without_a_prediction_is_repeated(providers, calls, body):
    """It says nothing about the prediction that is being paid for."""
    url, work, success = calls["read"]
    assert await count_requests(providers, url, work, [httpx.Response(200, json=body), success]) == (2, True)


@pytest.mark.anyio
@pytest.mark.parametrize("call", ["speech", "create"])
@pytest.mark.parametrize("body", UNREADABLE)
async def test_an_unreadable_success_of_what_costs_money_is_final(providers, calls, call, body):
    """It may have been made."""
    url, work, success = calls[call]
    outcomes = [httpx.Response(201 if call == "create" else 200, content=body), success]
    assert await count_requests(providers, url, work, outcomes) == (1, False)


@pytest.mark.anyio
async def test_each_attempt_sends_the_whole_request_again(providers, calls, tmp_path):
    """A file is read from its start each time, and announced with its length."""
    (tmp_path / "film.mp4").write_bytes(b"0123456789" * 200_000)
    url = f"{SUPABASE_URL}/storage/v1/object/pets/videos/a.mp4"
    outcomes = [httpx.ReadError("reset"), httpx.Response(503), hidden("500"), httpx.Response(200, json={"Key": "a"})]
    route = providers.post(url).mock(side_effect=outcomes)
    await main.supabase_upload("videos/a.mp4", tmp_path / "film.mp4", "video/mp4")
    assert [call.request.content for call in route.calls] == [b"0123456789" * 200_000] * 4
    assert [call.request.headers["content-length"] for call in route.calls] == ["2000000"] * 4
    assert not any("transfer-encoding" in call.request.headers for call in route.calls)


@pytest.mark.anyio
async def test_a_download_starts_again_from_the_first_byte(providers, tmp_path):
    """What came before the break is not in the file."""

    async def breaks_off() -> Any:
        yield b"first half, "
        raise httpx.ReadError("reset")

    target = tmp_path / "film"
    whole = httpx.Response(200, content=b"the whole film")
    route = providers.get(FILE_URL).mock(side_effect=[httpx.Response(200, content=breaks_off()), whole])
    await main.download(FILE_URL, target)
    assert (target.read_bytes(), route.call_count) == (b"the whole film", 2)
    assert "range" not in route.calls[1].request.headers


@pytest.mark.anyio
async def test_a_job_buys_one_prediction(client, providers):
    """A create whose answer is lost is not repeated, and the client is told which call was in doubt."""
    route = providers.post(CREATE_URL).mock(side_effect=httpx.ReadTimeout("slow"))
    job = {"image_url": "https://example.com/pet.jpg", "prompt": "Talk"}
    response = await client.post("/jobs_prompt_only", json=job)
    body = response.json()
    assert (response.status_code, body["category"], body["provider"]) == (500, "provider", "replicate")
    assert body["detail"] == "Replicate did not answer: ReadTimeout slow."
    assert route.call_count == 1


@pytest.mark.anyio
async def test_every_repeat_is_logged(providers, calls, caplog):
    """One line says what happened and when it goes on."""
    url, work, success = calls["speech"]
    failure = httpx.Response(503, json={"detail": {"message": "Maintenance"}})
    await count_requests(providers, url, work, [failure, httpx.ConnectError("refused"), success])
    assert log_lines(caplog) == [
        "POST api.elevenlabs.io attempt=1 failed (503: Maintenance), next in 0.0 s",
        "POST api.elevenlabs.io attempt=2 failed (ConnectError refused), next in 0.0 s",
    ]


# The words of a refusal

OLD_SHAPE = {"detail": {"status": "voice_not_found", "message": "A voice with this id was not found."}}
NEW_SHAPE = {
    "detail": {
        "type": "not_found",
        "code": "voice_not_found",
        "message": "A voice with this id was not found.",
        "status": "voice_not_found",
        "request_id": "abc",
        "param": None,
    }
}
LIST_SHAPE = {
    "detail": [
        {"loc": ["body", "text"], "msg": "field required", "type": "value_error.missing"},
        {"loc": ["body", "seed"], "msg": "not an integer", "type": "type_error"},
    ]
}
NO_CREDIT = {"title": "Insufficient credit", "detail": "You have insufficient credit to run this model.", "status": 402}
BAD_INPUT = {"detail": "- input: prompt is required\n", "title": "Input validation failed", "invalid_fields": []}
PAGE = """<!DOCTYPE html><html><head><title>502 Bad Gateway</title><style>p { color: red }</style>
<script>var secret = "<b>";</script></head><body><h1>502 Bad&nbsp;Gateway</h1>
<!-- padding --><p>cloudflare &amp; friends</p></body></html>"""


def nested(depth: int) -> str:
    """An object in an object, and so on."""
    return '{"detail":' * depth + '"deep"' + "}" * depth


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(json.dumps(OLD_SHAPE), "A voice with this id was not found.", id="ElevenLabs, old"),
        pytest.param(json.dumps(NEW_SHAPE), "A voice with this id was not found.", id="ElevenLabs, new"),
        pytest.param(json.dumps(LIST_SHAPE), "field required; not an integer", id="ElevenLabs, list"),
        pytest.param(json.dumps(NO_CREDIT), "You have insufficient credit to run this model.", id="Replicate"),
        pytest.param(json.dumps(BAD_INPUT), "- input: prompt is required", id="Replicate, input"),
        pytest.param('{"title": "Unauthenticated"}', "Unauthenticated", id="only a title"),
        pytest.param('{"statusCode": "409", "error": "Duplicate", "message": "Exists"}', "Exists", id="Supabase"),
        pytest.param('{"error": {"message": "inner"}}', "inner", id="an error in an object"),
        pytest.param('{"detail": null, "message": "", "error": "third"}', "third", id="the first that says something"),
        pytest.param('"just a text"', "just a text", id="a text in JSON"),
        pytest.param('["one", ["two", {"msg": "three"}]]', "one; two; three", id="lists in a list"),
        pytest.param('{"detail": {"detail": {"detail": "deep"}}}', "deep", id="nested"),
        pytest.param("", "Bad Request", id="nothing"),
        pytest.param("null", "Bad Request", id="null"),
        pytest.param("{}", "Bad Request", id="an empty object"),
        pytest.param("5", "Bad Request", id="a number"),
        pytest.param('{"detail": 5}', "Bad Request", id="a number inside"),
        pytest.param('{"detail": "cut', "Bad Request", id="JSON cut off"),
        pytest.param(b'{"detail": "\xff\xfe"}', "Bad Request", id="not UTF-8"),
        pytest.param(b"\x00\x9f\x92\x96" * 500_000, "Bad Request", id="2 MB of noise"),
        pytest.param('{"detail": "a\\r\\n\\tb\\u0000c"}', "a b\0c", id="on one line"),
    ],
)
def test_a_providers_own_words_are_found(body, message):
    """Whatever shape its body has; the status' own phrase if there is none."""
    assert main.provider_message(answer(400, body)) == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(PAGE, "502 Bad Gateway 502 Bad Gateway cloudflare & friends", id="a proxy's page"),
        pytest.param("<html></html>", "Bad Request", id="a page that says nothing"),
        pytest.param(b"<p>caf\xe9</p>", "caf\ufffd", id="a page that is not UTF-8"),
        pytest.param('{"detail": "cut', '{"detail": "cut', id="JSON that is none"),
    ],
)
def test_a_page_is_told_without_its_tags(body, message):
    """Scripts and styles are no words."""
    assert main.provider_message(answer(400, body, content_type="text/html; charset=utf-8")) == message


@pytest.mark.parametrize("depth", [20, 200, 450, 700, 990, 5000, 100_000])
def test_words_too_deep_inside_do_no_harm(depth):
    """A body nested without end is a body like any other."""
    assert main.provider_message(answer(400, nested(depth))) in ("deep", "Bad Request")


@pytest.mark.parametrize(
    ("status", "phrase"), [(429, "Too Many Requests"), (502, "Bad Gateway"), (544, "no message"), (599, "no message")]
)
def test_a_status_without_words_has_its_phrase(status, phrase):
    """Also a status that no standard knows."""
    assert main.provider_message(answer(status)) == phrase


def test_plain_text_is_a_message_too():
    """Proxies answer so."""
    assert main.provider_message(answer(502, "error code: 1015\n", content_type="text/plain")) == "error code: 1015"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(json.dumps({"detail": "x" * 301}), id="JSON"),
        pytest.param(json.dumps({"detail": ["x" * 100] * 100}), id="list"),
        pytest.param("<p>" + "x" * 20_000 + "</p>", id="text"),
    ],
)
def test_a_message_is_cut_at_300_characters(body):
    """A page is not passed on."""
    assert len(main.provider_message(answer(400, body, content_type="text/html"))) == 300


LEAKS = [
    pytest.param("{key} is not valid", id="at the beginning"),
    pytest.param("x" * 280 + " {key}", id="across the cut"),
    pytest.param("key={key}, Authorization: Bearer {key}", id="twice"),
]


@pytest.mark.anyio
@pytest.mark.parametrize("text", LEAKS)
@pytest.mark.parametrize("shape", ['{{"detail": "{text}"}}', "<html><p>{text}</p></html>"], ids=["JSON", "HTML"])
@pytest.mark.parametrize(
    ("call", "key"),
    [("speech", "ELEVEN_API_KEY"), ("create", "REPLICATE_API_TOKEN"), ("upload", "SUPABASE_SERVICE_ROLE")],
)
async def test_a_key_that_a_provider_echoes_is_not_passed_on(providers, calls, caplog, text, shape, call, key):
    """Neither whole nor its beginning, neither to the client nor to the log."""
    caplog.set_level(logging.DEBUG, logger="talking_pet")
    url, work, _ = calls[call]
    body = shape.format(text=text.format(key=SECRETS[key]))
    providers.route(url=url).mock(side_effect=[httpx.Response(status, html=body) for status in (429, 401)])
    error = await error_of(work())
    lines = log_lines(caplog)
    assert "***" in error.detail or "x" * 200 in error.detail
    assert not [told for told in (error.detail, str(error), *lines) if SECRETS[key][:8] in told]


def test_a_key_in_something_unforeseen_is_not_logged(settings, caplog):
    """Nor with a traceback, whoever has set up the log."""
    key = SECRETS["ELEVEN_API_KEY"]
    error = main.as_service_error(RuntimeError(f"no place for {key}"))
    assert key not in error.detail
    assert "RuntimeError: no place for ***" in caplog.text
    assert key not in caplog.text


@pytest.mark.anyio
async def test_a_key_in_a_transport_error_is_not_passed_on(providers, calls):
    """Nor one that the HTTP library repeats."""
    url, work, _ = calls["speech"]
    providers.route(url=url).mock(side_effect=httpx.WriteError(f"cannot send {SECRETS['ELEVEN_API_KEY']}"))
    error = await error_of(work())
    assert error.detail == "ElevenLabs did not answer: WriteError cannot send ***."


def test_no_error_tells_a_key():
    """Wherever its text comes from."""
    error = main.Unforeseen(" and ".join(SECRETS.values()))
    assert error.detail == "*** and *** and ***"


@pytest.mark.anyio
@pytest.mark.parametrize("body", [OLD_SHAPE, LIST_SHAPE, None], ids=["object", "list", "nothing"])
async def test_the_words_reach_the_client(providers, calls, body):
    """With the provider's name and status."""
    url, work, _ = calls["speech"]
    providers.route(url=url).respond(400, json=body)
    error = await error_of(work())
    assert told(error) == (400, "provider", "elevenlabs")
    words = {"detail": "Bad Request"} if body is None else body
    assert error.detail == f"ElevenLabs answered 400: {main.told_in(words)}"


@pytest.mark.anyio
@EVERY_CALL
async def test_a_refusal_of_two_megabytes_is_not_read_to_its_end(providers, calls, call):
    """No more than the limit is held, whatever a server sends."""
    url, work, _ = calls[call]
    sent = 0

    async def noise() -> Any:
        nonlocal sent
        while sent < 50_000_000:
            sent += 1_000_000
            yield b"\x9f" * 1_000_000

    providers.route(url=url).mock(side_effect=[httpx.Response(403, content=noise())])
    error = await error_of(work())
    assert "403: Forbidden" in error.detail
    assert sent <= 12_000_000
