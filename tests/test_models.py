"""What a request may hold: each field accepted and refused, and bodies that are no request at all."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import respx

import main
from tests.inprocess import ELEVEN_URL, REPLICATE_URL

PICTURE_URL = "https://example.com/pet.jpg"
FILM_URL = "https://replicate.delivery/xezq/film.mp4"
JOB = {"image_url": PICTURE_URL, "prompt": "The cat talks", "text": "Feed me!", "voice_id": "JBFqnCBsd6RMkjVDRZzb"}
JSON_HEADERS = {"Content-Type": "application/json"}

NOT_A_URL = "should be an absolute http(s) URL"
NOT_TEXT = "Input should be a valid string"
BLANK = "String should have at least 1 character"
NOT_WHOLE = "Input should be a valid integer"
NOT_UNICODE = "Input should be a valid string, unable to parse raw data as a unicode string"
NOT_AN_OBJECT = "Input should be a valid dictionary or object to extract fields from"
NOT_A_MODEL = "should be owner/name or owner/name:version"
NOT_A_VOICE = "should be up to 64 letters, digits, _ and -"
NOT_A_SIZE = "should be a size such as 768p"
NOT_A_FIT = "Input should be 'shortest', 'video' or 'speech'"
LOCAL = "is an address on your own machine or network; the picture must be on the internet"

pytestmark = pytest.mark.usefixtures("settings")


@pytest.fixture
def providers() -> Iterator[respx.MockRouter]:
    """The edge of the process: what is not routed by a test fails it."""
    with respx.mock(assert_all_called=False) as router:
        yield router


def check_refused(response: httpx.Response, providers: respx.MockRouter) -> dict[str, Any]:
    """The body of a 400 in its one shape, after a request that no provider heard of."""
    body: dict[str, Any] = response.json()
    assert response.status_code == 400, response.text
    assert (body["category"], body["provider"]) == ("validation", None)
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert set(body) <= {"detail", "category", "provider", "request_id", "errors"}
    assert all(set(fault) == {"loc", "msg"} for fault in body.get("errors", []))
    assert not providers.calls
    return body


# What a request holds


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/jobs_prompt_only", "/jobs_prompt_tts"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("image_url", None, NOT_TEXT, id="null picture"),
        pytest.param("image_url", 5, NOT_TEXT, id="number as picture"),
        pytest.param("image_url", [PICTURE_URL], NOT_TEXT, id="list of pictures"),
        pytest.param("image_url", "", NOT_A_URL, id="empty picture"),
        pytest.param("image_url", "pet.jpg", NOT_A_URL, id="relative picture"),
        pytest.param("image_url", "//example.com/pet.jpg", NOT_A_URL, id="picture without scheme"),
        pytest.param("image_url", "https:///pet.jpg", NOT_A_URL, id="picture without host"),
        pytest.param("image_url", "file:///etc/passwd", NOT_A_URL, id="file: URL"),
        pytest.param("image_url", "ftp://example.com/pet.jpg", NOT_A_URL, id="ftp: URL"),
        pytest.param("image_url", "data:image/png;base64,iVBORw0KGgo=", NOT_A_URL, id="data: URL"),
        pytest.param("image_url", "https://example.com/a pet.jpg", NOT_A_URL, id="blank inside"),
        pytest.param("image_url", f" {PICTURE_URL}", NOT_A_URL, id="blank before"),
        pytest.param("image_url", "https://example.com\\@127.0.0.1/", NOT_A_URL, id="backslash"),
        pytest.param("image_url", "https://xn--a/", NOT_A_URL, id="host name that is none"),
        pytest.param("image_url", "https://example.com:port/", NOT_A_URL, id="port that is none"),
        pytest.param("image_url", PICTURE_URL + "\ud800", NOT_UNICODE, id="lone surrogate in picture"),
        pytest.param("image_url", PICTURE_URL + "a" * 4070, "String should have at most 4096 characters", id="4097"),
        pytest.param("image_url", "http://localhost/pet.jpg", LOCAL, id="localhost"),
        pytest.param("image_url", "http://pet.localhost./pet.jpg", LOCAL, id="name under localhost"),
        pytest.param("image_url", "http://192.168.1.2/pet.jpg", LOCAL, id="private address"),
        pytest.param("image_url", "http://2130706433/pet.jpg", LOCAL, id="address as one number"),
        pytest.param("image_url", "http://[::1]/pet.jpg", LOCAL, id="loopback of IPv6"),
        pytest.param("prompt", None, NOT_TEXT, id="null prompt"),
        pytest.param("prompt", 7, NOT_TEXT, id="number as prompt"),
        pytest.param("prompt", "", BLANK, id="empty prompt"),
        pytest.param("prompt", " \n\t\u00a0", BLANK, id="blank prompt"),
        pytest.param("prompt", "a\udfff", NOT_UNICODE, id="lone surrogate in prompt"),
        pytest.param("seconds", None, NOT_WHOLE, id="null seconds"),
        pytest.param("seconds", True, NOT_WHOLE, id="true as seconds"),
        pytest.param("seconds", "6", NOT_WHOLE, id="seconds as text"),
        pytest.param("seconds", 6.0, NOT_WHOLE, id="seconds with a point"),
        pytest.param("seconds", float("nan"), NOT_WHOLE, id="NaN seconds"),
        pytest.param("seconds", float("inf"), NOT_WHOLE, id="infinite seconds"),
        pytest.param("seconds", 0, "Input should be greater than or equal to 1", id="no seconds"),
        pytest.param("seconds", -6, "Input should be greater than or equal to 1", id="negative seconds"),
        pytest.param("seconds", 601, "Input should be less than or equal to 600", id="over ten minutes"),
        pytest.param("seconds", 10**30, "Input should be less than or equal to 600", id="endless"),
        pytest.param("seconds", 7, "minimax/hailuo-02 takes 6 or 10", id="seconds the default model lacks"),
        pytest.param("resolution", None, NOT_TEXT, id="null resolution"),
        pytest.param("resolution", 768, NOT_TEXT, id="number as resolution"),
        pytest.param("resolution", "", NOT_A_SIZE, id="empty resolution"),
        pytest.param("resolution", "768 p", NOT_A_SIZE, id="resolution with a blank"),
        pytest.param("resolution", "7" * 17, NOT_A_SIZE, id="resolution of 17 characters"),
        pytest.param("resolution", "720p", "minimax/hailuo-02 takes 512p or 768p or 1080p", id="size it lacks"),
        pytest.param("model", 5, NOT_TEXT, id="number as model"),
        pytest.param("model", "", NOT_A_MODEL, id="empty model"),
        pytest.param("model", "hailuo-02", NOT_A_MODEL, id="model without owner"),
        pytest.param("model", "../../v1/account", NOT_A_MODEL, id="../ in model"),
        pytest.param("model", "minimax/..", NOT_A_MODEL, id="model that is .."),
        pytest.param("model", "a/b/c", NOT_A_MODEL, id="model of three parts"),
        pytest.param("model", "a/b?c", NOT_A_MODEL, id="model with a query"),
        pytest.param("model", "a/b%2Fc", NOT_A_MODEL, id="model with an escape"),
        pytest.param("model", "a/b:", NOT_A_MODEL, id="empty version"),
        pytest.param("model", "a/b\n", NOT_A_MODEL, id="model with a line break"),
        pytest.param("model", "a/" + "b" * 199, "String should have at most 200 characters", id="model of 201"),
    ],
)
async def test_what_a_picture_job_refuses(client, providers, path, field, value, message):
    """Both jobs refuse a field they share, naming it, before anything is bought."""
    response = await client.post(path, content=json.dumps({**JOB, field: value}), headers=JSON_HEADERS)
    body = check_refused(response, providers)
    assert body["detail"] == f"{field}: {message}."
    assert body["errors"] == [{"loc": ["body", field], "msg": message}]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("text", None, NOT_TEXT, id="null text"),
        pytest.param("text", 5, NOT_TEXT, id="number as text"),
        pytest.param("text", ["Hi"], NOT_TEXT, id="list as text"),
        pytest.param("text", "", BLANK, id="empty text"),
        pytest.param("text", " \r\n ", BLANK, id="blank text"),
        pytest.param("text", "\ud83d", NOT_UNICODE, id="half an emoji"),
        pytest.param("text", "a" * 601, "has 601 characters, at most 600 are spoken", id="601 characters"),
        pytest.param("voice_id", None, NOT_TEXT, id="null voice"),
        pytest.param("voice_id", "", NOT_A_VOICE, id="empty voice"),
        pytest.param("voice_id", "../models", NOT_A_VOICE, id="../ in voice"),
        pytest.param("voice_id", "a/b", NOT_A_VOICE, id="voice with a slash"),
        pytest.param("voice_id", "a?b", NOT_A_VOICE, id="voice with a query"),
        pytest.param("voice_id", "a b", NOT_A_VOICE, id="voice with a blank"),
        pytest.param("voice_id", "\u00e9", NOT_A_VOICE, id="voice not ASCII"),
        pytest.param("voice_id", "abc\n", NOT_A_VOICE, id="voice with a line break"),
        pytest.param("voice_id", "a" * 65, NOT_A_VOICE, id="voice of 65"),
        pytest.param("fit", None, NOT_A_FIT, id="null fit"),
        pytest.param("fit", "longest", NOT_A_FIT, id="another fit"),
        pytest.param("fit", "Video", NOT_A_FIT, id="fit in capitals"),
    ],
)
async def test_what_a_speech_job_refuses_besides(client, providers, field, value, message):
    """The fields of speech are refused by name as well, before anything is bought."""
    response = await client.post("/jobs_prompt_tts", content=json.dumps({**JOB, field: value}), headers=JSON_HEADERS)
    body = check_refused(response, providers)
    assert body["detail"] == f"{field}: {message}."
    assert body["errors"] == [{"loc": ["body", field], "msg": message}]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "field"),
    [
        *(("/jobs_prompt_only", field) for field in ("image_url", "prompt")),
        *(("/jobs_prompt_tts", field) for field in JOB),
        ("/debug/head", "url"),
    ],
)
async def test_a_missing_field_is_named(client, providers, path, field):
    """What is required is said so."""
    sent = {name: value for name, value in JOB.items() if name != field}
    body = check_refused(await client.post(path, json=sent), providers)
    assert body["errors"] == [{"loc": ["body", field], "msg": "Field required"}]
    assert body["detail"] == f"{field}: Field required."


@pytest.mark.anyio
async def test_every_fault_is_told_at_once(client, providers):
    """`errors` lists all of them; `detail` speaks of the first."""
    body = check_refused(await client.post("/jobs_prompt_tts", json={**JOB, "prompt": "", "fit": 1}), providers)
    assert [fault["loc"][-1] for fault in body["errors"]] == ["prompt", "fit"]
    assert body["detail"] == f"prompt: {BLANK}."


@pytest.mark.anyio
async def test_a_refusal_does_not_repeat_what_was_sent(client, providers):
    """What a client sent may be private; it stands in no error."""
    sent = {**JOB, "image_url": "file:///home/private.jpg", "voice_id": "private voice", "seconds": "private"}
    response = await client.post("/jobs_prompt_tts", json=sent)
    check_refused(response, providers)
    assert "private" not in response.text


@pytest.mark.anyio
@pytest.mark.parametrize("url", ["", "example.com", "file:///etc/passwd", None, 5, "https://example.com/a b"])
async def test_what_a_look_at_a_file_refuses(client, providers, url):
    """`/debug/head` takes absolute http(s) URLs only."""
    body = check_refused(await client.post("/debug/head", json={"url": url}), providers)
    assert body["detail"].startswith("url: ")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("content", "detail"),
    [
        pytest.param(b"", "The body: Field required.", id="empty"),
        pytest.param(b"null", f"The body: {NOT_AN_OBJECT}.", id="null"),
        pytest.param(b"[]", f"The body: {NOT_AN_OBJECT}.", id="list"),
        pytest.param(b'"text"', f"The body: {NOT_AN_OBJECT}.", id="text"),
        pytest.param(b'{"prompt": "\xff\xfe\xfa"}', "There was an error parsing the body.", id="not UTF-8"),
        pytest.param(b'{"seconds": ' + b"9" * 5000 + b"}", None, id="number of 5,000 digits"),
        pytest.param(b'{"image_url": ' * 4000, None, id="objects 4,000 deep"),
        pytest.param(b"[" * 60_000, None, id="lists 60,000 deep"),
        pytest.param(b"[" * 30_000 + b"]" * 30_000, None, id="closed lists 30,000 deep"),
        pytest.param(b'{"prompt": ', None, id="cut off"),
        pytest.param(b"{'prompt': 'a'}", None, id="Python's quotes"),
        pytest.param(b"\0", None, id="zero byte"),
    ],
)
async def test_a_body_that_is_not_a_json_object(client, providers, content, detail):
    """Whatever a body holds, the answer is a sentence about the body, in the one shape."""
    body = check_refused(await client.post("/jobs_prompt_tts", content=content, headers=JSON_HEADERS), providers)
    assert "body" in body["detail"]
    assert detail in (None, body["detail"])


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"],
)
async def test_a_body_that_is_not_sent_as_json(client, providers, content_type):
    """A wrong Content-Type is told as such."""
    headers = {"Content-Type": content_type} if content_type else {}
    response = await client.post("/jobs_prompt_tts", content=json.dumps(JOB), headers=headers)
    body = check_refused(response, providers)
    assert body["detail"] == "The body must be JSON, sent with Content-Type: application/json."


async def blanks(kibibytes: int, sent: list[int]) -> AsyncIterator[bytes]:
    """A body without a Content-Length, a KiB at a time; `sent` tells how much of it was asked for."""
    for _ in range(kibibytes):
        sent.append(1024)
        yield b" " * 1024


@pytest.mark.anyio
async def test_a_body_over_64_kib_is_refused_by_its_length(client, providers):
    """One byte over 64 KiB is one too many."""
    body = check_refused(await client.post("/jobs_prompt_tts", content=b" " * 65_537, headers=JSON_HEADERS), providers)
    assert body["detail"] == "The request's body is larger than 64 KiB."


@pytest.mark.anyio
async def test_a_body_without_a_length_is_refused_while_it_comes_in(client, providers):
    """No more than 64 KiB of it are read."""
    sent: list[int] = []
    response = await client.post("/jobs_prompt_tts", content=blanks(10_000, sent), headers=JSON_HEADERS)
    body = check_refused(response, providers)
    assert body["detail"] == "The request's body is larger than 64 KiB."
    assert sum(sent) <= 66 * 1024


@pytest.mark.anyio
@pytest.mark.parametrize("with_length", [True, False])
async def test_a_body_of_64_kib_is_read(client, providers, with_length):
    """The limit itself is allowed; this one is blank and refused for that."""
    content = b" " * 65_536 if with_length else blanks(64, [])
    body = check_refused(await client.post("/jobs_prompt_tts", content=content, headers=JSON_HEADERS), providers)
    assert body["errors"][0]["msg"] == "JSON decode error"


def will_succeed(providers: respx.MockRouter, path: str = "models/minimax/hailuo-02/predictions") -> respx.Route:
    """Predictions created here are done at once."""
    done = {"id": "p1", "status": "succeeded", "output": FILM_URL}
    return providers.post(f"{REPLICATE_URL}/v1/{path}").respond(201, json=done)


def sent_input(route: respx.Route) -> dict[str, Any]:
    """The input of the one prediction that was created."""
    assert route.call_count == 1
    value: dict[str, Any] = json.loads(route.calls[0].request.content)["input"]
    return value


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, {}, id="the least"),
        pytest.param({"prompt": "  Talk!\n"}, {"prompt": "Talk!"}, id="blanks around the prompt"),
        pytest.param({"prompt": "\u732b\U0001f408 'n\" \\"}, {"prompt": "\u732b\U0001f408 'n\" \\"}, id="any script"),
        pytest.param({"prompt": "a" * 20_000}, {"prompt": "a" * 20_000}, id="long prompt"),
        pytest.param({"seconds": 10}, {"duration": 10}, id="ten seconds"),
        pytest.param({"seconds": 6, "resolution": "1080p"}, {"resolution": "1080p"}, id="1080p"),
        pytest.param({"resolution": "512P"}, {"resolution": "512p"}, id="resolution in capitals"),
        pytest.param({"model": None}, {}, id="null model"),
        pytest.param({"model": "minimax/hailuo-02"}, {}, id="the default model by name"),
        pytest.param({"webhook": "https://a.example", "input": {"a": 1}, "id": "x"}, {}, id="unknown fields"),
        pytest.param({"image_url": "HTTP://EXAMPLE.com:8080/%20?a=b#c"}, None, id="any http URL"),
        pytest.param({"image_url": "https://b\u00fccher.example/pet.jpg"}, None, id="international name"),
        pytest.param({"image_url": "https://8.8.8.8/pet.jpg"}, None, id="public address"),
        pytest.param({"image_url": PICTURE_URL + "a" * 4069}, None, id="picture of 4,096"),
    ],
)
async def test_what_a_picture_job_takes(client, providers, changes, expected):
    """A sound value goes to the model as it is; what is left out has its default."""
    route = will_succeed(providers)
    response = await client.post("/jobs_prompt_only", json={"image_url": PICTURE_URL, "prompt": "Talk", **changes})
    assert (response.status_code, response.json()) == (200, {"video_url": FILM_URL})
    defaults = {"prompt": "Talk", "first_frame_image": PICTURE_URL, "duration": 6, "resolution": "768p"}
    assert sent_input(route) == {
        **defaults,
        **(expected or {"first_frame_image": changes.get("image_url", PICTURE_URL)}),
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"]
)
async def test_json_may_be_called_by_its_other_names(client, providers, content_type):
    """Content-Type may carry parameters, capitals or a JSON suffix."""
    will_succeed(providers)
    response = await client.post("/jobs_prompt_only", content=json.dumps(JOB), headers={"Content-Type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        pytest.param({"text": "a"}, "text", "a", id="one character"),
        pytest.param({"text": " a "}, "text", "a", id="blanks around the text"),
        pytest.param({"voice_id": "a"}, "voice_id", "a", id="voice of one"),
        pytest.param({"voice_id": "a-B_9" * 12 + "abcd"}, "voice_id", "a-B_9" * 12 + "abcd", id="voice of 64"),
        pytest.param({}, "fit", "shortest", id="default fit"),
        pytest.param({"fit": "video"}, "fit", "video", id="fit to the video"),
        pytest.param({"fit": "speech"}, "fit", "speech", id="fit to the speech"),
    ],
)
def test_what_a_speech_job_takes(changes, field, value):
    """Sound values are taken, tidied up."""
    assert getattr(main.JobPromptTTS(**{**JOB, **changes}), field) == value


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "is_spoken"),
    [
        pytest.param("a" * 600, True, id="600"),
        pytest.param(" " + "a" * 600 + " ", True, id="600 between blanks"),
        pytest.param("\U0001f408" * 600, True, id="600 beyond the first plane"),
        pytest.param("a" * 601, False, id="601"),
    ],
)
async def test_the_longest_text(client, providers, text, is_spoken):
    """TTS_MAX_CHARS counts characters, not bytes, without the blanks around them."""
    speech = providers.post(url__startswith=ELEVEN_URL).respond(402)
    response = await client.post("/jobs_prompt_tts", json={**JOB, "text": text})
    assert (response.status_code, speech.called) == ((500, True) if is_spoken else (400, False))
