"""The code of every error and of every field that is wrong, with what a translation of it has to fill in."""

import json
import socket
from collections.abc import AsyncIterator, Callable
from operator import methodcaller
from typing import Any, get_args

import httpx
import pytest

import main
from tests.conftest import StartService
from tests.sandbox import Sandbox, Service
from tests.support import network
from tests.support.application import cases, use_settings
from tests.support.network import Internet, Server, reply
from tests.support.requests import service_client, speech_job

serve, internal_server, internet = network.serve, network.internal_server, network.internet
client, pets = network.client, network.pets

PICTURE_URL = "http://pets.example/pet.jpg"
JOB = {
    "image_url": PICTURE_URL,
    "prompt": "Talk",
    "text": "Feed me!",
    "voice_id": "JBFqnCBsd6RMkjVDRZzb",
}
JSON = {"Content-Type": "application/json"}
KLING = {"model": "kwaivgi/kling-v2.1"}
Arrange = Callable[[Sandbox], None]
ERROR_CODES = get_args(main.ErrorCode.__value__)
FIELD_CODES = get_args(main.FieldErrorCode.__value__)


@pytest.fixture
def online(
    monkeypatch: pytest.MonkeyPatch, internet: Internet, client: httpx.AsyncClient
) -> httpx.AsyncClient:
    """A client of the service in this process, whose providers' names lead nowhere for now."""
    use_settings(monkeypatch)
    return client


def field_errors(body: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Each wrong field's name, code and params."""
    return [(error["loc"][-1], error["code"], error["params"]) for error in body["errors"]]


async def refused(
    client: httpx.AsyncClient, body: Any, path: str = "/jobs_prompt_tts"
) -> dict[str, Any]:
    """The body of a 400 for this request, whose codes are all in the contract."""
    response = await client.post(path, content=json.dumps(body), headers=JSON)
    error: dict[str, Any] = response.json()
    assert response.status_code == 400, error
    assert error["code"] in ERROR_CODES
    assert {code for _, code, _ in field_errors(error)} <= set(FIELD_CODES)
    return error


# Fields


WRONG_FIELDS: list[tuple[Any, ...]] = [
    ("null", {"text": None}, "text", "not_a_string", {}),
    ("half an emoji", {"text": "\ud83d"}, "text", "not_a_string", {}),
    ("blank", {"prompt": " "}, "prompt", "blank", {}),
    ("a long text", {"text": "a" * 659}, "text", "too_long", {"max": 600, "got": 659}),
    (
        "a long URL",
        {"image_url": PICTURE_URL + "a" * 4073},
        "image_url",
        "too_long",
        {"max": 4096, "got": 4100},
    ),
    ("no number", {"seconds": "6"}, "seconds", "not_a_whole_number", {}),
    ("a small number", {"seconds": 0}, "seconds", "too_small", {"min": 1}),
    ("a large number", {"seconds": 601}, "seconds", "too_large", {"max": 600}),
    (
        "no such fit",
        {"fit": "longest"},
        "fit",
        "not_allowed",
        {"allowed": ["shortest", "video", "speech"]},
    ),
    ("no voice", {"voice_id": "a/b"}, "voice_id", "wrong_format", {"format": "voice_id"}),
    ("no model", {"model": "kling"}, "model", "wrong_format", {"format": "model"}),
    ("no size", {"resolution": "large!"}, "resolution", "wrong_format", {"format": "size"}),
    ("no URL", {"image_url": "pet.jpg"}, "image_url", "not_a_url", {}),
    ("a length the model lacks", {"seconds": 7}, "seconds", "unsupported", {"allowed": [6, 10]}),
    (
        "a size the model lacks",
        {"resolution": "4k"},
        "resolution",
        "unsupported",
        {"allowed": ["512p", "768p", "1080p"]},
    ),
    (
        "a length and a size",
        {"seconds": 10, "resolution": "1080p"},
        "resolution",
        "unsupported",
        {"allowed": ["512p", "768p"]},
    ),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("changes", "field", "code", "params"), cases(WRONG_FIELDS))
async def test_each_wrong_field_has_a_code_and_what_it_says(
    online: httpx.AsyncClient,
    changes: dict[str, Any],
    field: str,
    code: str,
    params: dict[str, Any],
) -> None:
    """A front end translates by the code, and fills the params in."""
    error = await refused(online, {**JOB, **changes})
    assert error["code"] == "invalid_field"
    assert field_errors(error) == [(field, code, params)]


@pytest.mark.anyio
async def test_a_missing_field_is_required(online: httpx.AsyncClient) -> None:
    """Each of them says so."""
    error = await refused(online, {})
    required = ["image_url", "prompt", "text", "voice_id"]
    assert field_errors(error) == [(name, "required", {}) for name in required]


@pytest.mark.anyio
async def test_a_malformed_key_has_a_code(online: httpx.AsyncClient) -> None:
    """It is an error of a header."""
    response = await online.post("/jobs_prompt_tts", json=JOB, headers={"Idempotency-Key": "a b"})
    assert field_errors(response.json()) == [("Idempotency-Key", "wrong_format", {"format": "key"})]


@pytest.mark.anyio
async def test_all_misnamed_fields_are_named_at_once(online: httpx.AsyncClient) -> None:
    """As other services call them: four words for ours."""
    body = {
        "imageUrl": PICTURE_URL,
        "prompt_text": "Talk",
        "script": "Feed me!",
        "voiceName": "Rex",
        "duration": 6,
    }
    error = await refused(online, body)
    assert error["code"] == "invalid_field"
    assert field_errors(error) == [
        ("imageUrl", "misnamed", {"name": "image_url"}),
        ("prompt_text", "misnamed", {"name": "prompt"}),
        ("script", "misnamed", {"name": "text"}),
        ("voiceName", "misnamed", {"name": "voice_id"}),
        ("duration", "misnamed", {"name": "seconds"}),
    ]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(
            (name, "image_url")
            for name in (
                "img",
                "photo",
                "picture",
                "url",
                "image",
                "imageURL",
                "photoUrl",
                "img_url",
            )
        ),
        *((name, "text") for name in ("script", "speech", "message", "speechText", "dialogue")),
        *(
            (name, "voice_id")
            for name in ("voice", "voiceId", "voice_name", "voiceName", "speaker")
        ),
        *((name, "prompt") for name in ("promptText", "motion_prompt", "description")),
        *((name, "seconds") for name in ("duration", "length", "durationSeconds", "video_length")),
    ],
)
async def test_what_others_call_a_field_is_known(
    online: httpx.AsyncClient, name: str, meant: str
) -> None:
    """A newcomer's first request says what to change."""
    body = {key: value for key, value in JOB.items() if key != meant}
    error = await refused(online, {**body, name: "x"})
    assert field_errors(error) == [(name, "misnamed", {"name": meant})]


@pytest.mark.anyio
async def test_another_name_beside_the_right_one_is_ignored(
    online: httpx.AsyncClient, pets: Server
) -> None:
    """What a front end sends besides is its own affair."""
    pets.answers["/pet.jpg"] = [reply(404)]
    others = {
        "url": "x",
        "script": "x",
        "description": "x",
        "speaker": "x",
        "consent": True,
        "content": "x",
    }
    assert field_errors(await refused(online, {**JOB, **others}))[0][1] == "picture_not_found"


# A picture in place of its URL


@pytest.mark.anyio
@pytest.mark.parametrize("size", [30, 5_000, 60_000, 70_000, 5_000_000])
@pytest.mark.parametrize(
    ("path", "field"), [("/jobs_prompt_tts", "image_url"), ("/debug/head", "url")]
)
async def test_a_picture_in_the_body_is_to_be_uploaded_first(
    service: Service, sandbox: Sandbox, size: int, path: str, field: str
) -> None:
    """Whatever its size: also where the body is not read to its end, over a real connection."""
    body = {"prompt": "Talk", "text": "Feed me!", field: "data:image/jpeg;base64," + "A" * size}
    async with service_client(service.url) as client:
        response = await client.post(path, json={**body, "voice_id": "x"})
    [error] = response.json()["errors"]
    assert (response.status_code, error["loc"]) == (400, ["body", field])
    assert (error["code"], error["params"]) == ("upload_first", {})
    assert "upload it first" in error["msg"]
    assert response.json()["code"] == "invalid_field"
    assert sandbox.requests == []


@pytest.mark.anyio
async def test_an_object_url_of_a_browser_is_to_be_uploaded_first(
    online: httpx.AsyncClient,
) -> None:
    """Nobody but that page can read it."""
    error = await refused(online, {**JOB, "image_url": "blob:https://app.example/1c2d"})
    assert field_errors(error) == [("image_url", "upload_first", {})]


@pytest.mark.anyio
async def test_a_picture_behind_other_fields_is_found(online: httpx.AsyncClient) -> None:
    """As much of the body is read as a valid one may have, and no more."""
    sent = []

    async def body() -> AsyncIterator[bytes]:
        for piece in (
            b'{"prompt": "',
            b"a" * 20_000,
            b'", "image_url": "data:image/png;base64,',
            *[b"A" * 9_000] * 500,
        ):
            sent.append(piece)
            yield piece

    headers = {**JSON, "Content-Length": "5000000"}
    response = await online.post("/jobs_prompt_tts", content=body(), headers=headers)
    assert field_errors(response.json()) == [("image_url", "upload_first", {})]
    assert len(sent) < 10


def test_a_body_without_a_length_is_looked_at_too(service: Service) -> None:
    """A chunked body is refused where it passes the limit, by what has come in of it."""
    start = b'{"img": "data:image/png;base64,'
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        head = "POST /jobs_prompt_tts HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(f"{70_000:x}\r\n".encode() + start.ljust(70_000, b"A") + b"\r\n")
        received = b""
        while b'"errors"' not in received and (chunk := connection.recv(65_536)):
            received += chunk
    assert b'"upload_first"' in received


# The picture


def picture(status: int = 200, content_type: str | None = None) -> bytes:
    """What a server says of the picture."""
    return reply(status, b"x", content_type=content_type)


NO_PICTURES: list[tuple[Any, ...]] = [
    ("404", picture(404), "picture_not_found", {"status": 404}),
    ("410", picture(410), "picture_not_found", {"status": 410}),
    *(
        (kind, picture(content_type=kind), "not_a_picture", {"content_type": kind})
        for kind in (
            *(
                "text/html; charset=utf-8",
                "text/plain",
                "TEXT/CSS",
                "application/json",
                "audio/mpeg",
                "video/mp4",
            ),
            *("application/pdf", "application/xml", "application/zip", "font/woff2"),
        )
    ),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("remote", "code", "params"), cases(NO_PICTURES))
async def test_what_is_certainly_no_picture_is_refused(
    online: httpx.AsyncClient, pets: Server, remote: bytes, code: str, params: dict[str, Any]
) -> None:
    """Before anything is paid for: no provider's name is even looked up."""
    pets.answers["/pet.jpg"] = [remote]
    error = await refused(online, JOB)
    assert error["code"] == code
    assert field_errors(error) == [("image_url", code, params)]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "remote",
    [
        *(
            picture(content_type=kind)
            for kind in ("image/jpeg", "application/octet-stream", "binary/octet-stream", "")
        ),
        *(
            picture(content_type=kind)
            for kind in ("application/jsonp-image", "application/x-unknown", None)
        ),
        *(picture(status, "text/html") for status in (401, 403, 429, 500, 503)),
    ],
)
async def test_what_may_be_a_picture_passes(
    online: httpx.AsyncClient, pets: Server, remote: bytes
) -> None:
    """Replicate, which fetches it itself, may see more than this service does."""
    pets.answers["/pet.jpg"] = [remote]
    await main.check_picture(PICTURE_URL)
    assert pets.requests[0] == "HEAD /pet.jpg"


@pytest.mark.anyio
async def test_a_host_that_does_not_exist_is_refused(
    online: httpx.AsyncClient, internet: Internet
) -> None:
    """It costs nothing, and the message says what is wrong."""
    error = await refused(online, {**JOB, "image_url": "https://no.such.example/pet.jpg"})
    assert error["code"] == "picture_not_found"
    assert field_errors(error) == [("image_url", "picture_not_found", {})]
    assert "host does not exist" in error["detail"]
    assert internet.looked_up[-1] == "no.such.example"
    assert internet.connected == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "number",
    [socket.EAI_AGAIN, socket.EAI_FAIL],
    ids=["again", "fail"],
)
async def test_a_look_up_that_failed_for_now_passes(
    online: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The name may exist, and Replicate has a resolver of its own."""

    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(number, "failed for now")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    await main.check_picture(PICTURE_URL)


@pytest.mark.anyio
async def test_a_picture_inside_a_network_has_a_code(online: httpx.AsyncClient) -> None:
    """It is not taken for a picture that is missing."""
    error = await refused(online, {**JOB, "image_url": "http://192.168.1.2/pet.jpg"})
    assert error["code"] == "private_url"
    assert field_errors(error) == [("image_url", "private_url", {})]


# Requests as a whole


@pytest.mark.parametrize(
    ("method", "path", "content", "content_type", "status", "code"),
    [
        ("POST", "/jobs_prompt_tts", b"", "application/json", 400, "invalid_body"),
        ("POST", "/jobs_prompt_tts", b"[]", "application/json", 400, "invalid_body"),
        ("POST", "/jobs_prompt_tts", b"{", "application/json", 400, "invalid_body"),
        ("POST", "/jobs_prompt_tts", b'"\xff"', "application/json", 400, "invalid_body"),
        ("POST", "/jobs_prompt_tts", b"{}", "text/plain", 400, "invalid_body"),
        ("POST", "/jobs_prompt_tts", b" " * 70_000, "application/json", 400, "body_too_large"),
        (
            "POST",
            "/jobs_prompt_tts",
            b'{"prompt": "data:'.ljust(70_000),
            "application/json",
            400,
            "body_too_large",
        ),
        ("GET", "/videos", b"", "", 404, "route_not_found"),
        ("GET", "/jobs_prompt_tts", b"", "", 405, "method_not_allowed"),
    ],
)
def test_a_request_that_is_none_has_a_code(
    service: Service,
    method: str,
    path: str,
    content: bytes,
    content_type: str,
    status: int,
    code: str,
) -> None:
    """Also where the framework refuses it."""
    url = f"{service.url}{path}"
    headers = {"Content-Type": content_type}
    response = httpx.request(method, url, content=content, headers=headers, trust_env=False)
    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.anyio
async def test_an_address_that_is_not_fetched_has_a_code(online: httpx.AsyncClient) -> None:
    """/debug/head tells a forbidden form from a private address, and from a server that is silent."""
    codes = {}
    for url in ("http://pets.example:81/", "http://10.0.0.1/", "http://no.such.example/"):
        codes[url] = (await online.post("/debug/head", json={"url": url})).json()["code"]
    assert list(codes.values()) == ["blocked_url", "private_url", "download_failed"]


@pytest.mark.anyio
async def test_a_missing_setting_has_a_code(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is for the owner of the service, not for the user, and stands in the log once."""
    use_settings(monkeypatch, ELEVEN_API_KEY="")
    for headers in ({}, {"Idempotency-Key": "a-key"}):
        caplog.clear()
        response = await client.post("/jobs_prompt_tts", json=JOB, headers=headers)
        assert (response.status_code, response.json()["code"]) == (500, "missing_setting")
        assert caplog.text.count("code=missing_setting") == 1


# Jobs that go wrong


def answers(call: str, status: int, body: Any = None) -> Arrange:
    """A provider that answers every such call so."""
    details: dict[str, Any] = {"status": status}
    if body is not None:
        details["body"] = body
    return methodcaller("fault", call, "status", times=None, **details)


def spoil(call: str, kind: str) -> Arrange:
    """A call that goes wrong to the end."""
    return methodcaller("fault", call, kind, times=None)


ODD_INPUT = {
    "detail": "- no",
    "invalid_fields": [{"field": "input.first_frame_image", "description": "No face"}],
}
NO_PROMPT = {
    "detail": "- input: prompt is required",
    "invalid_fields": [{"field": "input", "description": "prompt is required"}],
}
SLOW_DOWN = {"detail": "Slow down."}
NOT_YOURS = {"statusCode": "403", "message": "Not yours"}

FAILURES: list[tuple[Any, ...]] = [
    (
        "no such voice",
        methodcaller("reset"),
        {"voice_id": "nobody"},
        "content_rejected",
        [("voice_id", "rejected", {})],
    ),
    (
        "odd input",
        answers("create", 422, ODD_INPUT),
        {},
        "content_rejected",
        [("image_url", "rejected", {})],
    ),
    (
        "a missing prompt",
        answers("create", 422, NO_PROMPT),
        {},
        "content_rejected",
        [("prompt", "rejected", {})],
    ),
    (
        "no such model",
        methodcaller("reset"),
        {"model": "no/body"},
        "unknown_model",
        [("model", "unknown_model", {})],
    ),
    ("a failed video", methodcaller("outcome", "failed", "No face."), {}, "prediction_failed", []),
    ("a canceled video", methodcaller("outcome", "canceled"), {}, "prediction_failed", []),
    ("key", answers("speech", 401), {}, "provider_rejected_key", []),
    ("credit", answers("create", 402), {}, "provider_rejected_key", []),
    ("plan", answers("model", 403), KLING, "provider_rejected_key", []),
    ("throttled", answers("model", 429, SLOW_DOWN), KLING, "provider_throttled", []),
    ("5xx", answers("speech", 503), {}, "provider_failed", []),
    ("no answer", spoil("speech", "cut"), {}, "provider_failed", []),
    ("malformed", spoil("speech", "malformed"), {}, "provider_failed", []),
    ("a large speech", spoil("speech", "endless"), {}, "speech_too_large", []),
    ("storage", answers("upload", 503), {}, "storage_failed", []),
    ("bucket", answers("public", 400, NOT_YOURS), {}, "bucket_not_public", []),
    ("download", answers("output", 403), {}, "download_failed", []),
    ("no video", methodcaller("video", "noise"), {}, "media_unusable", []),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("arrange", "changes", "code", "errors"), cases(FAILURES))
async def test_each_failure_of_a_job_has_a_code(
    service: Service,
    sandbox: Sandbox,
    arrange: Arrange,
    changes: dict[str, Any],
    code: str,
    errors: list[tuple[str, str, dict[str, Any]]],
) -> None:
    """It says whose move it is, where category and status do not."""
    arrange(sandbox)
    async with service_client(service.url) as client:
        response = await client.post("/jobs_prompt_tts", json=speech_job(sandbox, **changes))
    error = response.json()
    assert error["code"] == code, error
    assert field_errors({"errors": [], **error}) == errors


@pytest.mark.anyio
async def test_the_deadline_has_a_code(start_service: StartService, sandbox: Sandbox) -> None:
    """Without a key the same request is a new job, and may succeed."""
    sandbox.outcome("never")
    late = start_service(JOB_TIMEOUT_SECONDS="2")
    async with service_client(late.url) as client:
        error = (await client.post("/jobs_prompt_tts", json=speech_job(sandbox))).json()
    assert (error["code"], error["retryable"]) == ("deadline", True)


# The same again


async def send_twice(service: Service, body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The errors of a job that is sent twice with a key, without the ids of the two requests."""
    errors = []
    async with service_client(service.url, headers={"Idempotency-Key": key}) as client:
        for _ in range(2):
            response = await client.post("/jobs_prompt_tts", json=body)
            error = {**response.json(), "status": response.status_code}
            del error["request_id"]
            errors.append(error)
    return errors


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", ["failed", "canceled", "aborted"])
async def test_a_failed_prediction_is_refused_the_same_way_again(
    service: Service, sandbox: Sandbox, outcome: str
) -> None:
    """The code tells a front end to drop its key."""
    sandbox.outcome(outcome, "No face.")
    first, second = await send_twice(service, speech_job(sandbox), f"codes-{outcome}")
    assert (first["code"], first["status"], first["retryable"]) == ("prediction_failed", 400, False)
    assert second == first
    assert len(sandbox.predictions) == 1


@pytest.mark.anyio
async def test_a_deadline_is_refused_the_same_way_again(
    start_service: StartService, sandbox: Sandbox
) -> None:
    """The video was cancelled: with this key there will be none."""
    sandbox.outcome("never")
    late = start_service(JOB_TIMEOUT_SECONDS="2")
    first, second = await send_twice(late, speech_job(sandbox), "codes-deadline")
    assert (first["code"], first["status"], first["retryable"]) == ("deadline", 500, False)
    assert second == first
    assert len(sandbox.predictions) == 1


@pytest.mark.anyio
async def test_an_expired_video_is_refused_the_same_way_again(
    service: Service, sandbox: Sandbox
) -> None:
    """It was paid for, was not fetched within the hour, and is gone."""
    sandbox.fault("output", "status", status=403)
    body, key = speech_job(sandbox), "codes-expired"
    async with service_client(service.url, headers={"Idempotency-Key": key}) as client:
        assert (await client.post("/jobs_prompt_tts", json=body)).json()[
            "code"
        ] == "download_failed"
    sandbox.expire(next(iter(sandbox.predictions)))
    first, second = await send_twice(service, body, key)
    assert (first["code"], first["status"], first["retryable"]) == ("video_expired", 400, False)
    assert second == first


@pytest.mark.anyio
async def test_a_key_that_belongs_to_another_body_has_a_code(
    service: Service, sandbox: Sandbox
) -> None:
    """The front end has to make a new one."""
    async with service_client(service.url, headers={"Idempotency-Key": "codes-reused"}) as client:
        sandbox.outcome("failed")
        await client.post("/jobs_prompt_tts", json=speech_job(sandbox))
        error = (
            await client.post("/jobs_prompt_tts", json=speech_job(sandbox, text="Other"))
        ).json()
    assert error["code"] == "key_reused"
    assert field_errors(error) == [("Idempotency-Key", "key_reused", {})]


# The contract


def test_all_codes_are_in_the_contract() -> None:
    """One list for errors and one for fields, each a type of its own for generators."""
    schemas = main.app.openapi()["components"]["schemas"]
    assert schemas["ErrorCode"]["enum"] == list(ERROR_CODES)
    assert schemas["FieldErrorCode"]["enum"] == list(FIELD_CODES)
    for body in ("ErrorBody", "ErrorEvent"):
        assert schemas[body]["properties"]["code"] == {"$ref": "#/components/schemas/ErrorCode"}
        assert "code" in schemas[body]["required"]
    assert schemas["InputError"]["required"] == ["loc", "msg", "code", "params"]


def test_the_contract_keeps_to_the_version_that_it_states() -> None:
    """Generators read 3.1, where a media type knows these fields and `x-` ones only."""
    contract = main.app.openapi()
    assert contract["openapi"].startswith("3.1.")
    known = {"schema", "example", "examples", "encoding"}
    for path in contract["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                for media_type in response.get("content", {}).values():
                    assert {name for name in media_type if not name.startswith("x-")} <= known


def test_names_in_the_contract_suit_generators() -> None:
    """Each operation is called as its route's function; no schema as a type of TypeScript's own."""
    contract = main.app.openapi()
    names = [
        operation["operationId"]
        for path in contract["paths"].values()
        for operation in path.values()
    ]
    assert names == ["health", "jobs_prompt_only", "jobs_prompt_tts", "debug_head"]
    built_in = {
        "Partial",
        "Required",
        "Readonly",
        "Record",
        "Pick",
        "Omit",
        "Error",
        "Event",
        "Request",
        "Response",
    }
    assert not built_in & set(contract["components"]["schemas"])
    assert {"StageEvent", "ErrorEvent", "PartialResult"} <= set(contract["components"]["schemas"])
