"""Request validation: the accepted and rejected values of every field, and bodies that are not valid."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import respx

import main
from tests.support.application import ELEVEN_URL, REPLICATE_URL, cases

PICTURE_URL = "https://example.com/pet.jpg"
VIDEO_URL = "https://replicate.delivery/xezq/video.mp4"
JOB = {
    "image_url": PICTURE_URL,
    "prompt": "The cat talks",
    "text": "Feed me!",
    "voice_id": "JBFqnCBsd6RMkjVDRZzb",
}
JSON_HEADERS = {"Content-Type": "application/json"}

NOT_TEXT = "must be a string"
NOT_WHOLE = "must be a whole number"
NOT_AN_OBJECT = "must be a JSON object"
NOT_UNICODE = "Input should be a valid string, unable to parse raw data as a unicode string"
BLANK = "must not be blank"
MISSING = "is required"
NOT_A_URL = "must be an absolute http(s) URL"
BLANK_INSIDE = "must not contain a blank; in a URL it is written %20"
NOT_A_VOICE = "must be up to 64 letters, digits, _ and -"
NOT_JSON = "is not valid JSON"

# By field, what is said of which values.
REFUSED: dict[str, dict[str, list[Any]]] = {
    "image_url": {
        NOT_TEXT: [None, 5, [PICTURE_URL]],
        NOT_A_URL: [
            "",
            "pet.jpg",
            "/pet.jpg",
            "//example.com/pet.jpg",
            "http://",
            "https:///pet.jpg",
            "http://[::1",
            "file:///etc/passwd",
            "ftp://example.com/pet.jpg",
            "javascript:alert(1)",
            "https://example.com\\@127.0.0.1/",
            "https://xn--a/",
            "https://example.com:port/",
        ],
        BLANK_INSIDE: [
            "https://example.com/a pet.jpg",
            "https://exa mple.com/",
            f" {PICTURE_URL}",
            " \t\n",
        ],
        NOT_UNICODE: [PICTURE_URL + "\ud800"],
        "must have at most 4096 characters": [PICTURE_URL + "a" * 4070],
    },
    "prompt": {NOT_TEXT: [None, 7, ["x"]], BLANK: ["", " \n\t\u00a0"], NOT_UNICODE: ["a\udfff"]},
    "seconds": {
        NOT_WHOLE: [None, True, "6", 6.0, 6.5, ["6"], float("nan"), float("inf")],
        "must be at least 1": [0, -6],
        "must be at most 600": [601, 10**30],
        "minimax/hailuo-02 takes 6 or 10": [7],
    },
    "resolution": {
        NOT_TEXT: [None, 768],
        "must be a size such as 768p": ["", " ", "768 p", "768p; rm", "../", "7" * 17],
        "minimax/hailuo-02 takes 512p or 768p or 1080p": ["720p", "4k"],
    },
    "model": {
        NOT_TEXT: [5],
        "must be owner/name or owner/name:version": [
            "",
            " ",
            "hailuo-02",
            "../../v1/account",
            "a/../../v1/account",
            "minimax/..",
            "a/b/c",
            "a/b c",
            "a/b:",
            "a/b?c",
            "a/b#c",
            "a/b%2Fc",
            "a/b:../x",
            "https://example.com/a",
            "a/b\nc",
        ],
        "must have at most 200 characters": ["a/" + "b" * 199],
    },
    "text": {
        NOT_TEXT: [None, 5, ["Hi"]],
        BLANK: ["", " \r\n "],
        NOT_UNICODE: ["\ud83d"],
        "has 601 characters, the most is 600": ["a" * 601, "\u00e9" * 601],
    },
    "voice_id": {
        NOT_TEXT: [None, 7],
        NOT_A_VOICE: [
            "",
            " ",
            "../models",
            "..%2f..",
            "a/b",
            "a?b",
            "a#b",
            "a b",
            "a\nb",
            "\u00e9",
            "a" * 65,
        ],
    },
    "fit": {"must be 'shortest', 'video' or 'speech'": [None, "", 7, "longest", "Video"]},
    "url": {NOT_TEXT: [None, 5], NOT_A_URL: ["", "example.com", "file:///etc/passwd"]},
}

# What a test does not route fails it.
pytestmark = [
    pytest.mark.usefixtures("settings"),
    pytest.mark.anyio,
    pytest.mark.respx(assert_all_called=False),
]


def routes_with(field: str) -> list[str]:
    """The routes that a field belongs to."""
    shared = ["/jobs_prompt_only"] if field in main.JobPromptOnly.model_fields else []
    return ["/debug/head"] if field == "url" else [*shared, "/jobs_prompt_tts"]


def check_refused(response: httpx.Response, router: respx.MockRouter) -> dict[str, Any]:
    """The body of a 400 in its one shape, without a call to any provider."""
    body: dict[str, Any] = response.json()
    assert response.status_code == 400, response.text
    assert (body["category"], body["provider"], body["retryable"]) == ("validation", None, False)
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert set(body) <= ERROR_FIELDS
    assert all(set(fault) == {"loc", "msg", "code", "params"} for fault in body.get("errors", []))
    assert not router.calls
    return body


ERROR_FIELDS = {
    "detail",
    "category",
    "code",
    "provider",
    "request_id",
    "retryable",
    "errors",
}


def places_and_messages(body: dict[str, Any]) -> list[tuple[list[str], str]]:
    """Where each fault of a request is, and what is said about it."""
    return [(fault["loc"], fault["msg"]) for fault in body["errors"]]


async def check_field_refused(
    client: httpx.AsyncClient, router: respx.MockRouter, field: str, body: Any, message: str
) -> None:
    """Every route with this field rejects the body, and the error names the field."""
    for path in routes_with(field):
        response = await client.post(path, content=json.dumps(body), headers=JSON_HEADERS)
        refused = check_refused(response, router)
        assert places_and_messages(refused) == [(["body", field], message)], body
        assert refused["detail"] == f"{field}: {message}."


# What a request holds


@pytest.mark.parametrize(
    ("field", "message"),
    [(field, message) for field, words in REFUSED.items() for message in words],
)
async def test_an_invalid_value_is_rejected(client, respx_mock, field, message):
    """Every route with the field rejects it by name before anything is paid for."""
    for value in REFUSED[field][message]:
        await check_field_refused(client, respx_mock, field, {**JOB, field: value}, message)


@pytest.mark.parametrize("field", [*JOB, "url"])
async def test_a_missing_field_is_named(client, respx_mock, field):
    """The error says that the field is required."""
    await check_field_refused(
        client, respx_mock, field, {name: JOB[name] for name in JOB if name != field}, MISSING
    )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("second", "seconds"),
        ("sceonds", "seconds"),
        ("duration", "seconds"),
        ("length", "seconds"),
        ("resoluton", "resolution"),
        ("image", "image_url"),
        ("voice", "voice_id"),
        pytest.param("resolution\ud83d", "resolution", id="half an emoji"),
    ],
)
async def test_a_misspelled_field_is_rejected(client, respx_mock, wrong, right):
    """A video of the wrong length costs money: a misspelling or another service's name is not ignored."""
    body = {name: value for name, value in JOB.items() if name != right}
    for path in routes_with(right):
        response = await client.post(
            path, content=json.dumps({**body, wrong: 10}), headers=JSON_HEADERS
        )
        refused, name = check_refused(response, respx_mock), wrong.replace("\ud83d", "?")
        assert places_and_messages(refused) == [(["body", name], f"must be called {right}")]
        assert refused["detail"] == f"{name}: must be called {right}."


@pytest.mark.parametrize(
    "host", ["localhost", "pet.localhost.", "192.168.1.2", "2130706433", "[::1]"]
)
async def test_a_picture_at_a_private_address_is_rejected(client, respx_mock, host):
    """Replicate, which fetches the picture, could not reach it."""
    for path in routes_with("image_url"):
        response = await client.post(path, json={**JOB, "image_url": f"http://{host}/pet.jpg"})
        refused = check_refused(response, respx_mock)
        assert refused["errors"][0]["loc"] == ["body", "image_url"]
        assert refused["detail"].endswith("; the picture must be on the public internet.")


async def test_every_invalid_field_is_listed_without_its_value(client, respx_mock):
    """`errors` has all of them, `detail` the first; the values may be private."""
    sent = {
        **JOB,
        "image_url": "file:///home/private.jpg",
        "prompt": "",
        "voice_id": "private voice",
        "fit": 1,
    }
    response = await client.post("/jobs_prompt_tts", json=sent)
    body = check_refused(response, respx_mock)
    assert [fault["loc"][-1] for fault in body["errors"]] == [
        "image_url",
        "prompt",
        "voice_id",
        "fit",
    ]
    assert body["detail"] == f"image_url: {NOT_A_URL}."
    assert "private" not in response.text


def created(router: respx.MockRouter) -> respx.Route:
    """Where predictions of the default model are created; they have succeeded already."""
    done = {"id": "p1", "status": "succeeded", "output": VIDEO_URL}
    return router.post(f"{REPLICATE_URL}/v1/models/minimax/hailuo-02/predictions").respond(
        201, json=done
    )


PICTURES = (
    "HTTP://EXAMPLE.com:8080/%20?a=b#c",
    "https://8.8.8.8/pet.jpg",
    PICTURE_URL + "a" * 4069,
)
NOT_ASCII = "https://b\u00fccher.example/k\u00e4tzchen.jpg?q=\u732b"
IN_ASCII = "https://xn--bcher-kva.example/k%C3%A4tzchen.jpg?q=%E7%8C%AB"
TAKEN: list[tuple[Any, ...]] = [
    ("the least", {}, {}),
    ("blanks around the prompt", {"prompt": "  Talk!\n"}, {"prompt": "Talk!"}),
    ("any script", {"prompt": "\u732b\U0001f408 'n\" \\"}, {"prompt": "\u732b\U0001f408 'n\" \\"}),
    ("long prompt", {"prompt": "a" * 20_000}, {"prompt": "a" * 20_000}),
    ("ten seconds", {"seconds": 10}, {"duration": 10}),
    ("1080p in capitals", {"seconds": 6, "resolution": "1080P"}, {"resolution": "1080p"}),
    ("512p", {"resolution": "512p"}, {"resolution": "512p"}),
    ("null model", {"model": None}, {}),
    ("the default model, blanks around it", {"model": " minimax/hailuo-02\n"}, {}),
    ("the other job's fields, unread", {**JOB, "prompt": "Talk", "fit": 5, "text": ""}, {}),
    ("unknown fields", {"webhook": "https://a.example", "input": {"a": 1}, "id": "x"}, {}),
    *((f"picture {url[:20]}", {"image_url": url}, {"first_frame_image": url}) for url in PICTURES),
    ("picture not ASCII", {"image_url": NOT_ASCII}, {"first_frame_image": IN_ASCII}),
]


@pytest.mark.parametrize(("changes", "expected"), cases(TAKEN))
async def test_valid_values_reach_the_model(client, respx_mock, changes, expected):
    """A valid value is sent to the model, and a missing one is replaced by its default."""
    route = created(respx_mock)
    response = await client.post(
        "/jobs_prompt_only", json={"image_url": PICTURE_URL, "prompt": "Talk", **changes}
    )
    assert (response.status_code, response.json()) == (200, {"video_url": VIDEO_URL})
    defaults = {
        "prompt": "Talk",
        "first_frame_image": PICTURE_URL,
        "duration": 6,
        "resolution": "768p",
    }
    assert json.loads(route.calls.last.request.content)["input"] == defaults | expected


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("text", {"a": "a", " a\n": "a"}),
        ("voice_id", {"a": "a", "a-B_9" * 12 + "abcd": "a-B_9" * 12 + "abcd", " abc\n": "abc"}),
        ("fit", {"video": "video", "speech": "speech"}),
    ],
)
def test_valid_values_of_a_speech_job(field, values):
    """They are accepted, without the spaces around them."""
    taken = {value: getattr(main.JobPromptTTS(**{**JOB, field: value}), field) for value in values}
    assert taken == values
    assert main.JobPromptTTS(**JOB).fit == "shortest"


@pytest.mark.parametrize(
    "text", ["a" * 600, f" {'a' * 600} ", "\U0001f408" * 600], ids=["600", "blanks", "emoji"]
)
async def test_the_longest_text_is_spoken(client, respx_mock, text):
    """TTS_MAX_CHARS counts characters, not bytes, without the spaces around them."""
    speech = respx_mock.post(url__startswith=ELEVEN_URL).respond(402)
    await client.post("/jobs_prompt_tts", json={**JOB, "text": text})
    assert json.loads(speech.calls.last.request.content)["text"] == text.strip()


# Bodies


BODIES: list[tuple[Any, ...]] = [
    ("empty", b"", f"The body {MISSING}."),
    ("null", b"null", f"The body {NOT_AN_OBJECT}."),
    ("list", b"[]", f"The body {NOT_AN_OBJECT}."),
    ("text", b'"text"', f"The body {NOT_AN_OBJECT}."),
    ("cut off", b'{"prompt": ', f"The body {NOT_JSON}."),
    ("Python's quotes", b"{'prompt': 'a'}", f"The body {NOT_JSON}."),
    ("zero byte", b"\0", f"The body {NOT_JSON}."),
    ("not UTF-8", b'{"prompt": "\xff\xfe\xfa"}', "There was an error parsing the body."),
    ("number of 5,000 digits", b'{"seconds": ' + b"9" * 5000 + b"}", None),
    ("objects 4,000 deep", b'{"image_url": ' * 4000, None),
    ("lists 60,000 deep", b"[" * 60_000, None),
    ("closed lists 30,000 deep", b"[" * 30_000 + b"]" * 30_000, None),
]


@pytest.mark.parametrize(("content", "detail"), cases(BODIES))
async def test_a_body_that_is_not_a_json_object(client, respx_mock, content, detail):
    """Whatever the body holds, the answer is a 400 about the body in the one shape."""
    for path in ("/jobs_prompt_only", "/jobs_prompt_tts", "/debug/head"):
        body = check_refused(
            await client.post(path, content=content, headers=JSON_HEADERS), respx_mock
        )
        assert "body" in body["detail"]
        assert detail in (None, body["detail"])


@pytest.mark.parametrize(
    ("content_type", "is_json"),
    [
        *(
            (name, True)
            for name in (
                "application/json; charset=utf-8",
                "APPLICATION/JSON",
                "application/vnd.api+json",
            )
        ),
        *(
            (name, False)
            for name in (
                None,
                "text/plain",
                "application/x-www-form-urlencoded",
                "application/jsonx",
            )
        ),
        ("multipart/form-data; boundary=x", False),
    ],
)
async def test_a_body_must_be_sent_as_json(client, respx_mock, content_type, is_json):
    """Content-Type may have parameters, capitals or a JSON suffix; the error names the header."""
    created(respx_mock)
    headers = {"Content-Type": content_type} if content_type else {}
    response = await client.post("/jobs_prompt_only", content=json.dumps(JOB), headers=headers)
    if is_json:
        assert response.status_code == 200
    else:
        detail = check_refused(response, respx_mock)["detail"]
        assert detail == "The body must be JSON, sent with Content-Type: application/json."


async def blanks(kibibytes: int, sent: list[int]) -> AsyncIterator[bytes]:
    """A body without a Content-Length, a KiB at a time; `sent` counts what was read."""
    for _ in range(kibibytes):
        sent.append(1024)
        yield b" " * 1024


async def test_a_body_over_64_kib_is_rejected(client, respx_mock):
    """The limit itself is read, one byte more is not; a body without a length is not read on."""
    read, refused, sent = (
        f"The body {NOT_JSON}.",
        "The request's body is larger than 64 KiB.",
        list[int](),
    )
    bodies = (
        (b" " * 65_536, read),
        (blanks(64, []), read),
        (b" " * 65_537, refused),
        (blanks(10_000, sent), refused),
    )
    for content, message in bodies:
        response = await client.post("/jobs_prompt_tts", content=content, headers=JSON_HEADERS)
        assert check_refused(response, respx_mock)["detail"] == message
    assert 0 < sum(sent) <= 66 * 1024
