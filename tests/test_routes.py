"""Every route over real sockets: success, every error in its one shape, headers, and the OpenAPI document."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any

import httpx
import pytest
import respx

from tests.conftest import PACE
from tests.sandbox import Sandbox, Service
from tests.support.application import cases, log_lines, running_application
from tests.support.requests import STAGES, short_video, speech_job

ORIGIN = {"Origin": "https://app.example.com"}
JOB_ROUTES = ("/jobs_prompt_only", "/jobs_prompt_tts")
POST_ROUTES = (*JOB_ROUTES, "/debug/head")
KLING = {"model": "kwaivgi/kling-v2.1"}
SPOKEN, CREATED = {"audio_url"}, {"audio_url", "prediction_id"}
ANIMATED = {*CREATED, "video_url"}

Arrange = Callable[[Sandbox], object]


@pytest.fixture
def client(service: Service, sandbox: Sandbox) -> Iterator[httpx.Client]:
    """A client of the running service, its sandbox as new and with a small video."""
    sandbox.video(short_video())
    with connect(service) as client:
        yield client


@pytest.fixture(scope="module")
def guarded_client(running_sandbox: Sandbox) -> Iterator[httpx.Client]:
    """A client of a service that knows its front ends and fetches from public addresses only."""
    origins = "https://app.example.com, http://localhost:5173/"
    changes = {"ALLOWED_ORIGIN": origins, "ALLOW_PRIVATE_URLS": ""}
    with (
        Service({**running_sandbox.environment(), **PACE, **changes}) as service,
        connect(service) as client,
    ):
        yield client


def connect(service: Service) -> httpx.Client:
    """A client with which a page of another origin speaks."""
    return httpx.Client(
        base_url=service.url, trust_env=False, verify=False, timeout=30, headers=ORIGIN
    )


def error_body(response: httpx.Response) -> dict[str, Any]:
    """The body of an error, which must have the one shape and be readable from the page that asked."""
    error: dict[str, Any] = response.json()
    always = {"detail", "category", "code", "provider", "request_id", "retryable"}
    assert always <= set(error) <= always | {"partial", "errors"}
    assert error["detail"].strip()
    assert error["request_id"] == response.headers["x-request-id"]
    assert {} not in (error.get("partial"), error.get("errors")), "what is empty is left out"
    assert all(set(fault) == {"loc", "msg", "code", "params"} for fault in error.get("errors", []))
    assert "access-control-allow-origin" in response.headers
    return error


def error_kind(response: httpx.Response) -> str:
    """Status, category and provider of an error, and whether it is worth asking again."""
    error = error_body(response)
    return f"{response.status_code} {error['category']} {error['provider']} {'again' if error['retryable'] else 'no'}"


# Success


def test_health(client: httpx.Client, sandbox: Sandbox) -> None:
    """The process is up; no provider is called, and HEAD works too."""
    response, head = client.get("/health"), client.head("/health")
    assert (response.status_code, response.json()) == (200, {"ok": True})
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "11")
    assert sandbox.requests == []


def test_a_speech_job_has_urls_timings_and_log_lines(
    client: httpx.Client, service: Service, sandbox: Sandbox
) -> None:
    """Three URLs, two of them in the bucket, and each stage's milliseconds in header and log."""
    response = client.post(
        "/jobs_prompt_tts", json=speech_job(sandbox), headers={"X-Request-ID": "log-lines"}
    )
    answer, [prediction] = response.json(), sandbox.predictions
    seconds = ["audio_seconds", "final_seconds", "cut_seconds"]
    assert list(answer) == ["audio_url", "video_url", "final_url", *seconds]
    bucket = re.escape(f"{sandbox.url}/storage/v1/object/public/pets")
    assert re.fullmatch(bucket + r"/audio/[0-9a-f-]{36}\.mp3", answer["audio_url"])
    assert re.fullmatch(bucket + r"/videos/[0-9a-f-]{36}\.mp4", answer["final_url"])
    timings = re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])
    assert (
        tuple(name for name, _ in timings),
        all(0 < float(dur) < 9_000 for _, dur in timings),
    ) == (STAGES, True)
    lines = [line.partition(" request_id=log-lines ")[2] for line in service.log.splitlines()]
    stages = [
        match[1]
        for line in lines
        if (match := re.fullmatch(r"stage=(\w+) outcome=done ms=\d+", line))
    ]
    [job] = [line for line in lines if line.startswith("job ")]
    assert tuple(stages) == STAGES
    assert re.fullmatch(rf"job outcome=ok ms=\d+ prediction_id={prediction}", job)


# Errors: the table of the design, row by row


def refuse(call: str, status: int, body: Any = None) -> Arrange:
    """A provider that answers every such call with this status."""
    details = {"status": status} | ({} if body is None else {"body": body})
    return lambda sandbox: sandbox.fault(call, "status", times=None, **details)


def spoil(call: str, kind: str) -> Arrange:
    """A call that fails in this way every time."""
    return lambda sandbox: sandbox.fault(call, kind, times=None)


def fine(sandbox: Sandbox) -> None:
    """Nothing goes wrong at the providers."""


ODD_TEXT = {"detail": {"status": "text_too_odd", "message": "too odd"}}
ODD_INPUT = {
    "detail": "- no",
    "invalid_fields": [{"field": "input.first_frame_image", "description": "No face"}],
}
FULL = {"detail": "Slow down."}
NO_BUCKET = {"statusCode": "404", "error": "Bucket not found", "message": "Bucket not found"}
NO_FACE, NO_VIDEO = methodcaller("outcome", "failed", "No face."), methodcaller("video", "noise")

# Parts of the details of bodies that are refused before a job begins
NO_JOB = (
    "absolute",
    "called seconds",
)

# Status, category, provider, and whether it is worth asking again; a part of the detail, what exists, and the field.
ERRORS: list[tuple[Any, ...]] = [
    (
        "no URL",
        fine,
        {"image_url": "ftp://x/"},
        "400 validation None no",
        "absolute",
        set(),
        "image_url",
    ),
    (
        "a long text",
        fine,
        {"text": "x" * 601},
        "400 validation None no",
        "601 characters",
        set(),
        "text",
    ),
    (
        "a misspelt field",
        fine,
        {"sceonds": 10},
        "400 validation None no",
        "called seconds",
        set(),
        "sceonds",
    ),
    (
        "no picture",
        refuse("picture", 404),
        {},
        "400 validation None no",
        "no picture",
        set(),
        "image_url",
    ),
    (
        "no voice",
        fine,
        {"voice_id": "nobody"},
        "400 provider elevenlabs no",
        "404: A voice",
        set(),
        "voice_id",
    ),
    (
        "odd text",
        refuse("speech", 422, ODD_TEXT),
        {},
        "400 provider elevenlabs no",
        "422: too odd",
        set(),
        "text",
    ),
    (
        "odd input",
        refuse("create", 422, ODD_INPUT),
        {},
        "400 provider replicate no",
        "422: - no",
        SPOKEN,
        "image_url",
    ),
    (
        "no model",
        fine,
        {"model": "no/body"},
        "400 provider replicate no",
        "404: The requested",
        set(),
        "model",
    ),
    (
        "video fails",
        NO_FACE,
        {},
        "400 provider replicate no",
        "ended as failed: No face.",
        CREATED,
        None,
    ),
    (
        "key refused",
        refuse("speech", 401),
        {},
        "500 provider elevenlabs no",
        "ElevenLabs answered 401",
        set(),
        None,
    ),
    (
        "no credit",
        refuse("create", 402),
        {},
        "500 provider replicate no",
        "Replicate answered 402",
        SPOKEN,
        None,
    ),
    (
        "throttled",
        refuse("model", 429, FULL),
        KLING,
        "500 provider replicate again",
        "429: Slow down.",
        set(),
        None,
    ),
    (
        "5xx",
        refuse("speech", 503),
        {},
        "500 provider elevenlabs again",
        "ElevenLabs answered 503",
        set(),
        None,
    ),
    (
        "no answer",
        spoil("speech", "cut"),
        {},
        "500 provider elevenlabs again",
        "did not answer",
        set(),
        None,
    ),
    (
        "malformed",
        spoil("speech", "malformed"),
        {},
        "500 provider elevenlabs again",
        "without speech",
        set(),
        None,
    ),
    (
        "poll refused",
        refuse("poll", 410),
        {},
        "500 provider replicate no",
        "Replicate answered 410",
        CREATED,
        None,
    ),
    (
        "large speech",
        spoil("speech", "endless"),
        {},
        "400 resource elevenlabs no",
        "larger than 9.5 MB",
        set(),
        None,
    ),
    (
        "no bucket",
        refuse("upload", 400, NO_BUCKET),
        {},
        "500 resource supabase no",
        "Bucket not found",
        set(),
        None,
    ),
    (
        "storage 503",
        refuse("upload", 503),
        {},
        "500 resource supabase again",
        "Storage answered 503",
        set(),
        None,
    ),
    (
        "video refused",
        refuse("output", 403),
        {},
        "500 resource None again",
        "was answered 403",
        ANIMATED,
        None,
    ),
    ("no video", NO_VIDEO, {}, "500 resource replicate no", "not a video", ANIMATED, None),
]


@pytest.mark.parametrize(("arrange", "changes", "kind", "words", "partial", "field"), cases(ERRORS))
def test_every_error_has_its_category_partial_and_field(
    client: httpx.Client,
    service: Service,
    sandbox: Sandbox,
    arrange: Arrange,
    changes: dict[str, Any],
    kind: str,
    words: str,
    partial: set[str],
    field: str | None,
) -> None:
    """Category, provider, retryable, detail, `partial`, the invalid field, and the job's line in the log."""
    arrange(sandbox)
    response = client.post("/jobs_prompt_tts", json=speech_job(sandbox, **changes))
    error = error_body(response)
    assert error_kind(response) == kind, error
    assert words in error["detail"]
    assert set(error.get("partial", {})) == partial
    assert [fault["loc"] for fault in error.get("errors", [])] == (
        [["body", field]] if field else []
    )
    done = re.findall(r"(\w+);dur=", response.headers.get("server-timing", ""))
    assert tuple(done) == STAGES[: len(done)], "the failed stage is the last"
    assert not partial or len(done) == (4 if partial == ANIMATED else 3)
    ends = re.findall(
        rf"request_id={error['request_id']} job outcome=(\w+) ms=\d+ prediction_id=(\w+) code=\w+ detail=",
        service.log,
    )
    made = str(error.get("partial", {}).get("prediction_id"))
    assert ends == [(error["category"], made)] * (words not in NO_JOB)


def test_a_content_length_over_the_limit_is_rejected_unread(service: Service) -> None:
    """Ten gigabytes are rejected before any byte of them arrives."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        head = "POST /jobs_prompt_tts HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example.com\r\n"
        connection.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: 10000000000\r\n\r\n".encode()
        )
        received = b""
        while b"}" not in received and (chunk := connection.recv(65_536)):
            received += chunk
    answer = received.decode().lower()
    assert answer.startswith("http/1.1 400")
    assert "access-control-allow-origin: *" in answer
    assert "larger than 64 kib" in answer


@pytest.mark.parametrize(
    "asked",
    ["GET / 404", "GET /jobs_prompt_tts/extra 404", "GET /jobs_prompt_tts 405", "POST /health 405"],
)
def test_unknown_routes_and_methods_have_the_error_shape(client: httpx.Client, asked: str) -> None:
    """The framework's own 404 and 405 look like every other error; a 404 points to /docs."""
    method, path, status = asked.split()
    response = client.request(method, path)
    assert error_kind(response) == f"{status} validation None no"
    assert ("allow" in response.headers, "/docs" in response.json()["detail"]) == (
        status == "405",
        status == "404",
    )


@pytest.mark.anyio
@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
@pytest.mark.parametrize("path", POST_ROUTES)
async def test_an_unexpected_exception_reveals_nothing(
    settings: None, caplog: pytest.LogCaptureFixture, path: str, accept: str
) -> None:
    """The client gets a retryable 500 in the one shape; the traceback is in the log only."""
    url = "https://example.com/"
    body = {"image_url": url, "url": url, "prompt": "Talk", "text": "Talk", "voice_id": "rex"}
    async with running_application() as client:
        with respx.mock() as edge:
            edge.route().mock(side_effect=KeyError("inner works"))
            response = await client.post(path, json=body, headers={**ORIGIN, "Accept": accept})
    error = json.loads(response.text.rpartition("data: ")[2])
    assert (error["category"], error["retryable"], error.get("status", response.status_code)) == (
        "internal",
        True,
        500,
    )
    assert not re.search(r"inner works|KeyError|Traceback|main\.py", response.text)
    assert response.headers["access-control-allow-origin"] == "*"
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"request_id={error['request_id']} unforeseen" in line
    assert "KeyError: 'inner works'" in line
    ends = [line for line in log_lines(caplog) if line.startswith("job ")]
    assert len(ends) == (path != "/debug/head")
    assert all(
        re.fullmatch(
            r"job outcome=internal ms=\d+ prediction_id=None code=internal detail=.*", line
        )
        for line in ends
    )


# Headers


@pytest.mark.parametrize(
    "asked",
    [
        "GET /health",
        "GET /docs",
        "GET /openapi.json",
        "GET /nothing",
        "GET /jobs_prompt_tts",
        "POST /debug/head",
    ],
)
def test_cors_allows_the_configured_origins_only(
    client: httpx.Client, guarded_client: httpx.Client, asked: str
) -> None:
    """Each of several origins gets its own name, others get no header; `*` stands alone; never credentials."""
    method, path = asked.split()
    for origin in ("https://app.example.com", "http://localhost:5173"):
        headers = guarded_client.request(
            method, path, headers={"Origin": origin, "Cookie": "a=b"}
        ).headers
        assert headers["access-control-allow-origin"] == origin
        assert "origin" in headers["vary"].lower()
        assert "access-control-allow-credentials" not in headers
    stranger = guarded_client.request(
        method, path, headers={"Origin": "https://evil.example"}
    ).headers
    assert "access-control-allow-origin" not in stranger
    anyone = client.request(method, path, headers={"Cookie": "a=b"}).headers
    assert anyone["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in anyone
    exposed = {name.strip() for name in anyone["access-control-expose-headers"].lower().split(",")}
    assert exposed == {
        "x-request-id",
        "server-timing",
        "idempotency-replayed",
        "retry-after",
    }


def test_a_preflight_allows_jobs_from_allowed_origins(guarded_client: httpx.Client) -> None:
    """A page may send JSON with a key and ask for events; a page of another origin may not."""
    wanted = "content-type, x-request-id, idempotency-key"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    response = guarded_client.options("/jobs_prompt_tts", headers=asked)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (
        200,
        ORIGIN["Origin"],
    )
    assert "POST" in response.headers["access-control-allow-methods"]
    allowed = response.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in wanted.split(", "))
    assert "access-control-allow-credentials" not in response.headers
    stranger = guarded_client.options(
        "/jobs_prompt_tts", headers={**asked, "Origin": "https://evil.example"}
    )
    assert stranger.status_code == 400
    assert "access-control-allow-origin" not in stranger.headers


KEPT, REPLACED = (
    (b"abc", b"0f8fad5b-d9cb-469f-a165", b"a.B_9-x0" * 16),
    (b"", b"a b", b"x" * 129, b"<b>", b"a=1 b=2"),
)


@pytest.mark.parametrize("sent", [*KEPT, *REPLACED, "é".encode()])
def test_a_valid_request_id_is_kept_and_any_other_replaced(
    client: httpx.Client, sent: bytes
) -> None:
    """It is returned in header and errors; what could spoil a log line or a page is not."""
    one, two = (
        error_body(client.post("/nothing", headers={b"X-Request-ID": sent}))["request_id"]
        for _ in range(2)
    )
    if sent in KEPT:
        assert one == two == sent.decode()
    else:
        assert re.fullmatch(r"[0-9a-f]{32}", one)
        assert one != two


# The contract


@pytest.fixture(scope="module")
def contract(running_service: Service) -> dict[str, Any]:
    """The OpenAPI document."""
    with connect(running_service) as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
        assert client.get("/docs").headers["content-type"] == "text/html; charset=utf-8"
    return document


def test_openapi_has_every_route(contract: dict[str, Any]) -> None:
    """Four routes, each with a summary and a description; the events are among the schemas."""
    operations = {
        (path, method): operation
        for path, item in contract["paths"].items()
        for method, operation in item.items()
    }
    assert set(operations) == {("/health", "get"), *((path, "post") for path in POST_ROUTES)}
    assert all(
        operation["summary"] and operation["description"] for operation in operations.values()
    )
    schemas = contract["components"]["schemas"]
    assert {"StageEvent", "ErrorEvent", "ErrorBody", "VideoResult", "SpeechResult"} <= set(schemas)
    assert schemas["StageEvent"]["properties"]["state"]["enum"] == ["started", "progress", "done"]
    assert set(schemas["ErrorEvent"]["required"]) == {*schemas["ErrorBody"]["required"], "status"}
    known = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(contract)))
    assert known <= set(schemas), "no reference leads nowhere"


@pytest.mark.parametrize("path", POST_ROUTES)
def test_openapi_has_every_response(contract: dict[str, Any], path: str) -> None:
    """200, 400, 500 and default are listed with the error schema, and FastAPI's own 422 is not."""
    answers = contract["paths"][path]["post"]["responses"]
    assert set(answers) == {"200", "400", "500", "default"}
    for status in ("400", "500", "default"):
        schema = answers[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    assert "HTTPValidationError" not in json.dumps(contract)


@pytest.mark.parametrize("path", JOB_ROUTES)
def test_openapi_has_json_events_and_the_key_of_a_job(contract: dict[str, Any], path: str) -> None:
    """The example of the event stream ends with the JSON one; Idempotency-Key is a parameter."""
    operation = contract["paths"][path]["post"]
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    events = re.findall(
        r"^event: (\w+)\ndata: (.*)$", content["text/event-stream"]["example"], re.MULTILINE
    )
    assert [name for name, _ in events] == ["stage", "result"]
    assert [json.loads(data) for _, data in events][-1] == content["application/json"]["example"]
    parts = content["text/event-stream"]["x-itemSchema"]["properties"]["data"]["contentSchema"]
    result = {"/jobs_prompt_only": "VideoResult", "/jobs_prompt_tts": "SpeechResult"}[path]
    names = [part["$ref"].rpartition("/")[2] for part in parts["anyOf"]]
    assert names == ["StageEvent", result, "ErrorEvent"]
    [key] = operation["parameters"]
    assert (key["name"], key["in"], key["required"]) == ("Idempotency-Key", "header", False)
    assert "one video is paid for" in key["description"]
    assert any(
        re.fullmatch(r"[0-9a-f-]{36}", example)
        for example in re.findall(r'"([^"]+)"', json.dumps(key))
    )


def test_openapi_has_the_limits_of_every_field(contract: dict[str, Any]) -> None:
    """A front end can validate its input by the document alone."""
    fields = contract["components"]["schemas"]["JobPromptTTS"]["properties"]
    assert all(field.get("description") for field in fields.values())
    assert fields["image_url"]["format"] == "uri"
    assert fields["prompt"]["minLength"] == fields["text"]["minLength"] == 1
    assert (fields["seconds"]["minimum"], fields["seconds"]["default"]) == (1, 6)
    assert fields["fit"]["enum"] == ["shortest", "video", "speech"]
    assert all(
        "pattern" in field
        for field in (fields["voice_id"], fields["resolution"], fields["model"]["anyOf"][0])
    )


@pytest.mark.parametrize("path", POST_ROUTES)
def test_examples_of_the_docs_work_in_the_sandbox(
    client: httpx.Client, sandbox: Sandbox, contract: dict[str, Any], path: str
) -> None:
    """The request body that /docs shows, from examples and defaults, succeeds with a picture that exists."""
    schema = contract["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = contract["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    body = {
        name: field["examples"][0] if "examples" in field else field["default"]
        for name, field in fields.items()
    }
    body |= {name: sandbox.image_url for name in ("image_url", "url") if name in body}
    response = client.post(path, json=body)
    assert (response.status_code, response.json().get("status", 200)) == (200, 200), response.text
