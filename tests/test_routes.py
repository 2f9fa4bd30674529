"""Every route from outside: what it answers, every kind of error in its one shape, and the headers on all of it."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import main
from tests.conftest import PACE, StartService
from tests.jobs import prompt_job, speech_job
from tests.sandbox import Sandbox, Service

ORIGIN = {"Origin": "https://app.example.com"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
JOB_ROUTES = ("/jobs_prompt_only", "/jobs_prompt_tts")
POST_ROUTES = (*JOB_ROUTES, "/debug/head")
ERROR_FIELDS = {"detail", "category", "provider", "request_id", "partial", "errors"}
BOUGHT = {"audio_url", "video_url", "prediction_id"}

Arrange = Callable[[Sandbox], object]


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    """A client of the running service, its sandbox as new."""
    with connect(service) as client:
        yield client


@pytest.fixture(scope="module")
def bare_client() -> Iterator[httpx.Client]:
    """A client of a service for which nothing at all is set."""
    with Service({}) as service, connect(service) as client:
        yield client


@pytest.fixture(scope="module")
def guarded_client(running_sandbox: Sandbox) -> Iterator[httpx.Client]:
    """A client of a service that knows its front ends and fetches from public addresses only."""
    origins = "https://app.example.com, http://localhost:5173/"
    changes = {"ALLOWED_ORIGIN": origins, "ALLOW_PRIVATE_URLS": ""}
    with Service({**running_sandbox.environment(), **PACE, **changes}) as service, connect(service) as client:
        yield client


def connect(service: Service) -> httpx.Client:
    """A client with which a page of another origin speaks."""
    return httpx.Client(base_url=service.url, trust_env=False, verify=False, timeout=30, headers=ORIGIN)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The body of an error, which must have the one shape."""
    error: dict[str, Any] = response.json()
    assert set(error) <= ERROR_FIELDS
    assert {"detail", "category", "provider", "request_id"} <= set(error)
    assert isinstance(error["detail"], str)
    assert error["detail"].strip()
    assert error["request_id"] == response.headers["x-request-id"]
    assert error.get("partial", {"something": 1}), "an empty `partial` is left out"
    assert all(set(fault) == {"loc", "msg"} for fault in error.get("errors", []))
    return error


# Success


def test_health(client: httpx.Client, sandbox: Sandbox) -> None:
    """The process is up; nobody is asked."""
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"ok": True})
    assert sandbox.requests == []


def test_a_silent_film(client: httpx.Client, sandbox: Sandbox) -> None:
    """A picture and a prompt give Replicate's own URL, and nothing is spoken or stored."""
    response = client.post("/jobs_prompt_only", json=prompt_job(sandbox))
    [prediction] = sandbox.predictions.values()
    assert response.status_code == 200
    assert response.json() == {"video_url": f"{sandbox.url}/delivery/{prediction.id}/output.mp4"}
    assert sandbox.calls("speech") == sandbox.calls("upload") == []


def test_a_talking_film(client: httpx.Client, sandbox: Sandbox) -> None:
    """Picture, prompt and text give three URLs, two of them in the bucket."""
    response = client.post("/jobs_prompt_tts", json=speech_job(sandbox))
    answer = response.json()
    assert response.status_code == 200
    assert list(answer) == ["audio_url", "video_url", "final_url"]
    bucket = re.escape(f"{sandbox.url}/storage/v1/object/public/pets")
    assert re.fullmatch(bucket + r"/audio/[0-9a-f-]{36}\.mp3", answer["audio_url"])
    assert re.fullmatch(bucket + r"/videos/[0-9a-f-]{36}\.mp4", answer["final_url"])


def test_a_look_at_a_remote_file(client: httpx.Client, sandbox: Sandbox) -> None:
    """Status, type and size of a file come back, and nothing else."""
    response = client.post("/debug/head", json={"url": sandbox.image_url})
    assert response.json() == {"status": 200, "content_type": "image/jpeg", "bytes": 41170}


def test_a_look_at_a_file_that_is_not_there(client: httpx.Client, sandbox: Sandbox) -> None:
    """What the remote server refuses is told, not raised."""
    response = client.post("/debug/head", json={"url": f"{sandbox.url}/no-such-file"})
    assert (response.status_code, response.json()["status"]) == (200, 404)


def test_unknown_fields_are_ignored(client: httpx.Client, sandbox: Sandbox) -> None:
    """A front end may send more than the service knows."""
    response = client.post("/jobs_prompt_only", json=prompt_job(sandbox, seed=7, note={"by": "me"}))
    assert response.status_code == 200


def test_json_of_any_kind_is_accepted(client: httpx.Client, sandbox: Sandbox) -> None:
    """A charset or a vendor's name in the Content-Type changes nothing."""
    for content_type in ("application/json; charset=utf-8", "application/vnd.pet+json"):
        body = json.dumps(prompt_job(sandbox))
        response = client.post("/jobs_prompt_only", content=body, headers={"content-type": content_type})
        assert response.status_code == 200, content_type


# Errors: the table of the design, row by row


def refuse(call: str, status: int, body: Any = None) -> Arrange:
    """A provider that answers every such call so."""
    details = {"status": status} | ({} if body is None else {"body": body})
    return lambda sandbox: sandbox.fault(call, "status", times=None, **details)


def end_as(status: str, error: str | None = None) -> Arrange:
    """A prediction that ends so."""
    return lambda sandbox: sandbox.outcome(status, error)


ERRORS = [
    pytest.param(
        lambda sandbox: None, {"voice_id": "nobody"}, 400, "provider", "elevenlabs", "'nobody' was not found", set(),
        id="ElevenLabs does not know the voice",
    ),
    pytest.param(
        refuse("speech", 400), {}, 400, "provider", "elevenlabs", "ElevenLabs answered 400", set(),
        id="ElevenLabs refuses the text",
    ),
    pytest.param(
        refuse("speech", 422, {"detail": [{"loc": ["body", "text"], "msg": "too odd", "type": "x"}]}),
        {}, 400, "provider", "elevenlabs", "ElevenLabs answered 422: too odd", set(),
        id="ElevenLabs finds the request invalid",
    ),
    pytest.param(
        refuse("create", 422, {"detail": "- input: no", "status": 422}), {},
        400, "provider", "replicate", "Replicate answered 422: - input: no", {"audio_url"},
        id="Replicate finds the input invalid",
    ),
    pytest.param(
        refuse("create", 400), {}, 400, "provider", "replicate", "Replicate answered 400", {"audio_url"},
        id="Replicate refuses the input",
    ),
    pytest.param(
        lambda sandbox: None, {"model": "nobody/nothing"}, 400, "provider", "replicate", "Replicate answered 404", set(),
        id="Replicate has no such model",
    ),
    pytest.param(
        end_as("failed", "The picture holds no face."), {}, 400, "provider", "replicate",
        "ended as failed: The picture holds no face.", {"audio_url", "prediction_id"},
        id="the prediction fails",
    ),
    pytest.param(
        end_as("canceled"), {}, 400, "provider", "replicate", "ended as canceled", {"audio_url", "prediction_id"},
        id="the prediction is canceled",
    ),
    pytest.param(
        end_as("aborted"), {}, 400, "provider", "replicate", "ended as aborted", {"audio_url", "prediction_id"},
        id="the prediction is aborted",
    ),
    *(
        pytest.param(
            refuse("speech", status), {}, 500, "provider", "elevenlabs", f"ElevenLabs answered {status}", set(),
            id=f"ElevenLabs answers {status}",
        )
        for status in (401, 402, 403, 500, 503)
    ),
    pytest.param(
        refuse("speech", 429), {}, 500, "provider", "elevenlabs", "429: Too many concurrent requests", set(),
        id="ElevenLabs throttles to the end",
    ),
    *(
        pytest.param(
            refuse("create", status), {}, 500, "provider", "replicate", f"Replicate answered {status}", {"audio_url"},
            id=f"Replicate answers {status}",
        )
        for status in (401, 402, 403, 500, 503)
    ),
    pytest.param(
        lambda sandbox: sandbox.fault("speech", "cut"), {}, 500, "provider", "elevenlabs",
        "ElevenLabs did not answer", set(),
        id="ElevenLabs does not answer",
    ),
    pytest.param(
        lambda sandbox: sandbox.fault("create", "nonsense"), {}, 500, "provider", "replicate",
        "Replicate answered without a prediction", {"audio_url"},
        id="Replicate answers nonsense",
    ),
    pytest.param(
        lambda sandbox: sandbox.fault("speech", "nonsense"), {}, 500, "provider", "elevenlabs",
        "ElevenLabs answered without speech", set(),
        id="ElevenLabs answers nonsense",
    ),
    pytest.param(
        refuse("read", 401), {}, 500, "provider", "replicate", "Replicate answered 401", {"audio_url", "prediction_id"},
        id="Replicate no longer knows us",
    ),
    pytest.param(
        lambda sandbox: sandbox.fault("speech", "endless"), {}, 400, "resource", "elevenlabs", "larger than 9.5 MB", set(),
        id="the speech is too large",
    ),
    pytest.param(
        lambda sandbox: sandbox.buckets.pop("pets"), {}, 500, "resource", "supabase", "Bucket not found", set(),
        id="Supabase has no such bucket",
    ),
    pytest.param(
        lambda sandbox: setattr(sandbox.buckets["pets"], "allowed_mime_types", ["audio/mpeg"]), {},
        500, "resource", "supabase", "mime type video/mp4 is not supported", BOUGHT,
        id="Supabase does not take films",
    ),
    pytest.param(
        refuse("output", 403), {}, 500, "resource", None, "was answered 403", BOUGHT,
        id="the film cannot be fetched",
    ),
    pytest.param(
        lambda sandbox: sandbox.film("noise"), {}, 500, "resource", "replicate", "is not an MP4 film", BOUGHT,
        id="the film is no film",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arrange", "changes", "status", "category", "provider", "words", "partial"), ERRORS)
def test_every_failure_has_its_status_and_category(
    client: httpx.Client,
    sandbox: Sandbox,
    arrange: Arrange,
    changes: dict[str, Any],
    status: int,
    category: str,
    provider: str | None,
    words: str,
    partial: set[str],
) -> None:
    """Whatever fails, the answer says whose failure it is, in whose words, and what was bought already."""
    arrange(sandbox)
    response = client.post("/jobs_prompt_tts", json=speech_job(sandbox, **changes))
    error = error_of(response)
    assert (response.status_code, error["category"], error["provider"]) == (status, category, provider)
    assert words in error["detail"]
    assert set(error.get("partial", {})) == partial
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_missing_setting_is_named(bare_client: httpx.Client, sandbox: Sandbox, accept: str) -> None:
    """The owner reads which variable to set; a job that cannot begin is no stream."""
    response = bare_client.post("/jobs_prompt_only", json=prompt_job(sandbox), headers={"accept": accept})
    error = error_of(response)
    assert (response.status_code, error["category"], error["provider"]) == (500, "configuration", None)
    assert "REPLICATE_API_TOKEN" in error["detail"]


INVALID = [
    pytest.param({"content": b'{"image_url": '}, "JSON", id="malformed JSON"),
    pytest.param({"content": b"\xff\xfe\x00"}, "", id="no text at all"),
    pytest.param({"content": b""}, "required", id="no body"),
    pytest.param({"json": ["image_url"]}, "dictionary", id="a list"),
    pytest.param({"json": {}}, "url: Field required", id="nothing in it"),
    pytest.param({"content": b"prompt=hello", "headers": FORM}, "application/json", id="a form"),
    pytest.param({"content": b"[" * 50_000}, "", id="nested without end"),
    pytest.param({"content": b'"' + b"x" * 65_536 + b'"'}, "larger than 64 KiB", id="over 64 KiB"),
    pytest.param({"content": iter([b" " * 40_000] * 3)}, "larger than 64 KiB", id="over 64 KiB in pieces"),
]


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize(("request_body", "words"), INVALID)
def test_a_body_that_cannot_be_read_is_a_400(
    client: httpx.Client, sandbox: Sandbox, path: str, request_body: dict[str, Any], words: str
) -> None:
    """Every route refuses such a body in the one shape, readable from the page that sent it."""
    if "content" in request_body and not isinstance(request_body["content"], bytes):
        request_body = {"content": iter([b" " * 40_000] * 3)}  # an iterator can be sent once only
    headers = {"content-type": "application/json", **request_body.get("headers", {})}
    response = client.post(path, **{**request_body, "headers": headers})
    error = error_of(response)
    assert (response.status_code, error["category"], error["provider"]) == (400, "validation", None)
    assert words in error["detail"]
    assert response.headers["access-control-allow-origin"] == "*"
    assert sandbox.requests == []


def test_a_body_that_is_announced_too_large_is_refused_unread(service: Service) -> None:
    """Ten gigabytes are refused by their announcement, before any of them arrives."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        head = "POST /jobs_prompt_tts HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example.com\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 10000000000\r\n\r\n".encode())
        received = b""
        while b"}" not in received and (chunk := connection.recv(65_536)):
            received += chunk
    answer = received.decode().lower()
    assert answer.startswith("http/1.1 400")
    assert "access-control-allow-origin: *" in answer
    assert "larger than 64 kib" in answer


def test_validation_errors_do_not_repeat_the_input(client: httpx.Client) -> None:
    """`errors` names each fault by place and message; what was sent does not come back."""
    body = {"image_url": "file:///etc/secret-thing", "prompt": 7, "text": " ", "voice_id": "../secret-thing"}
    response = client.post("/jobs_prompt_tts", json=body)
    error = error_of(response)
    places = [fault["loc"] for fault in error["errors"]]
    assert places == [["body", name] for name in ("image_url", "prompt", "text", "voice_id")]
    assert "secret-thing" not in response.text


@pytest.mark.parametrize(
    ("url", "words"),
    [
        pytest.param("http://127.0.0.1/", "not public", id="loopback"),
        pytest.param("http://169.254.169.254/latest/meta-data/", "not public", id="a cloud's metadata"),
        pytest.param("http://user:secret@example.com/", "user name", id="user info"),
        pytest.param("http://example.com:8080/", "ports 80 and 443", id="another port"),
        pytest.param("http://0x7f000001/", "plain form", id="an address in disguise"),
        pytest.param("file:///etc/passwd", "http(s)", id="another scheme"),
        pytest.param("//example.com", "http(s)", id="no scheme"),
        pytest.param(5, "string", id="a number"),
    ],
)
def test_a_url_that_may_not_be_fetched_is_a_400(guarded_client: httpx.Client, url: Any, words: str) -> None:
    """`/debug/head` refuses what leads inside, and says why."""
    response = guarded_client.post("/debug/head", json={"url": url})
    error = error_of(response)
    assert (response.status_code, error["category"]) == (400, "validation")
    assert words in error["detail"]


def test_a_remote_file_without_an_answer_is_a_resource_error(client: httpx.Client, sandbox: Sandbox) -> None:
    """A URL behind which nobody listens is a 500 that says so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    response = client.post("/debug/head", json={"url": f"http://127.0.0.1:{port}/"})
    error = error_of(response)
    assert (response.status_code, error["category"], error["provider"]) == (500, "resource", None)
    assert "did not answer" in error["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/", 404, id="no start page"),
        pytest.param("POST", "/nothing", 404, id="no such route"),
        pytest.param("GET", "/jobs_prompt_tts/extra", 404, id="too deep"),
        pytest.param("GET", "/jobs_prompt_only", 405, id="GET a job"),
        pytest.param("PUT", "/jobs_prompt_tts", 405, id="PUT a job"),
        pytest.param("DELETE", "/debug/head", 405, id="DELETE a look"),
        pytest.param("POST", "/health", 405, id="POST health"),
    ],
)
def test_unknown_routes_and_methods_have_the_same_shape(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    """The framework's own 404 and 405 read like every other error."""
    response = client.request(method, path)
    error = error_of(response)
    assert (response.status_code, error["category"], error["provider"]) == (status, "validation", None)
    assert ("allow" in response.headers) == (status == 405)
    assert response.headers["access-control-allow-origin"] == "*"


# The unforeseen: the machine takes the temporary folder away


@pytest.fixture
def homeless(start_service: StartService, sandbox: Sandbox, tmp_path: Path) -> Iterator[tuple[httpx.Client, Service]]:
    """A service whose temporary folder has vanished, as when someone cleans up a disk, and a client of it."""
    folder = tmp_path / "gone"
    folder.mkdir()
    service = start_service(TMPDIR=str(folder))
    with connect(service) as client:
        assert client.post("/jobs_prompt_tts", json=speech_job(sandbox)).status_code == 200
        shutil.rmtree(folder)
        yield client, service


def test_the_unforeseen_is_a_500_without_inside_detail(
    homeless: tuple[httpx.Client, Service], sandbox: Sandbox, tmp_path: Path
) -> None:
    """The client gets the one shape, CORS headers and what was bought; the traceback stands in the log only."""
    client, service = homeless
    response = client.post("/jobs_prompt_tts", json=speech_job(sandbox))
    error = error_of(response)
    assert (response.status_code, error["category"], error["provider"]) == (500, "internal", None)
    assert set(error["partial"]) == BOUGHT
    assert str(tmp_path) not in response.text
    assert not re.search(r"FileNotFound|Errno|Traceback|main\.py", response.text)
    assert response.headers["access-control-allow-origin"] == "*"
    assert "final_upload" not in response.headers["server-timing"]
    lines = service.log.splitlines()
    assert any("FileNotFoundError" in line for line in lines)
    assert any(error["request_id"] in line and "unforeseen" in line for line in lines)


# Headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", "/health", id="health"),
        pytest.param("GET", "/docs", id="docs"),
        pytest.param("GET", "/openapi.json", id="the contract"),
        pytest.param("GET", "/nothing", id="404"),
        pytest.param("GET", "/jobs_prompt_tts", id="405"),
        pytest.param("POST", "/jobs_prompt_tts", id="400"),
    ],
)
def test_every_answer_can_be_read_by_pages_of_allowed_origins_only(
    guarded_client: httpx.Client, method: str, path: str
) -> None:
    """Each of several origins is answered by name, a stranger is not, and credentials are never allowed."""
    for origin in ("https://app.example.com", "http://localhost:5173"):
        headers = guarded_client.request(method, path, headers={"Origin": origin}).headers
        assert headers["access-control-allow-origin"] == origin
        assert "origin" in headers["vary"].lower()
        assert "access-control-allow-credentials" not in headers
    stranger = guarded_client.request(method, path, headers={"Origin": "https://evil.example"}).headers
    assert "access-control-allow-origin" not in stranger


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        pytest.param("GET", "/docs", {}, id="docs"),
        pytest.param("GET", "/health", {"headers": {"Cookie": "a=b"}}, id="health, with a cookie"),
        pytest.param("POST", "/jobs_prompt_only", {"json": {}}, id="400"),
    ],
)
def test_any_origin_is_never_allowed_credentials(
    client: httpx.Client, method: str, path: str, sent: dict[str, Any]
) -> None:
    """`*` stands alone, whatever the request brings along."""
    headers = client.request(method, path, **sent).headers
    assert headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in headers


def test_pages_may_read_the_id_and_the_timings(client: httpx.Client) -> None:
    """Both headers are exposed through CORS."""
    exposed = client.get("/health").headers["access-control-expose-headers"]
    assert {name.strip() for name in exposed.lower().split(",")} == {"x-request-id", "server-timing"}


def test_a_preflight_allows_a_job(guarded_client: httpx.Client) -> None:
    """A browser may send JSON and ask for the event stream."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, x-request-id"}
    response = guarded_client.options("/jobs_prompt_tts", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "content-type" in response.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in response.headers


def test_a_preflight_of_a_stranger_is_refused(guarded_client: httpx.Client) -> None:
    """A page of another origin may not start a job."""
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = guarded_client.options("/jobs_prompt_tts", headers=asked)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("sent", ["abc", "0f8fad5b-d9cb-469f-a165-70867728950e", "a.B_9-" * 21, "1"])
def test_a_sane_request_id_is_kept(client: httpx.Client, sent: str) -> None:
    """The caller's own id comes back, in the header and in errors."""
    response = client.post("/nothing", headers={"X-Request-ID": sent})
    assert error_of(response)["request_id"] == response.headers["x-request-id"] == sent


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"a b", id="a blank in it"),
        pytest.param(b"x" * 129, id="too long"),
        pytest.param(b"<script>", id="markup"),
        pytest.param(b"a=1 stage=mux", id="a forged log line"),
        pytest.param("é".encode(), id="not ASCII"),
    ],
)
def test_any_other_request_id_is_replaced(client: httpx.Client, sent: bytes) -> None:
    """What could spoil a log line or a page is not passed on; the service makes an id of its own."""
    response = client.get("/health", headers={b"X-Request-ID": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_every_request_has_an_id_of_its_own(client: httpx.Client) -> None:
    """Two requests can be told apart in the log."""
    assert client.get("/health").headers["x-request-id"] != client.get("/health").headers["x-request-id"]


def timings(response: httpx.Response) -> dict[str, float]:
    """The milliseconds of each stage in Server-Timing."""
    return {name: float(told) for name, told in re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])}


def test_server_timing_has_every_stage(client: httpx.Client, sandbox: Sandbox) -> None:
    """A speech job tells its stages in order, with milliseconds."""
    told = timings(client.post("/jobs_prompt_tts", json=speech_job(sandbox)))
    assert list(told) == ["speech", "audio_upload", "video", "download", "mux", "final_upload"]
    assert all(milliseconds > 0 for milliseconds in told.values())


def test_server_timing_of_a_failed_job_ends_with_the_failed_stage(client: httpx.Client, sandbox: Sandbox) -> None:
    """An error tells how long it went well."""
    sandbox.outcome("failed")
    response = client.post("/jobs_prompt_tts", json=speech_job(sandbox))
    assert list(timings(response)) == ["speech", "audio_upload", "video"]


def test_the_log_has_a_line_for_each_stage_and_one_for_the_job(
    client: httpx.Client, service: Service, sandbox: Sandbox
) -> None:
    """A person can read it and a machine can search it by request id."""
    response = client.post("/jobs_prompt_tts", json=speech_job(sandbox), headers={"X-Request-ID": "log-lines"})
    [prediction_id] = sandbox.predictions
    assert response.status_code == 200
    lines = [line for line in service.log.splitlines() if "request_id=log-lines" in line]
    stages = [match[1] for line in lines if (match := re.search(r"stage=(\w+) outcome=done ms=\d+$", line))]
    assert stages == ["speech", "audio_upload", "video", "download", "mux", "final_upload"]
    [job] = [line for line in lines if "job=" in line]
    assert re.search(rf"job=/jobs_prompt_tts outcome=ok ms=\d+ prediction_id={prediction_id}$", job)


# The contract


@pytest.fixture(scope="module")
def contract(bare_client: httpx.Client) -> dict[str, Any]:
    """The OpenAPI document."""
    document: dict[str, Any] = bare_client.get("/openapi.json").json()
    return document


def test_the_contract_has_every_route(contract: dict[str, Any]) -> None:
    """Four routes, each under one method, each with a summary and a description."""
    operations = [
        (path, method, operation) for path, item in contract["paths"].items() for method, operation in item.items()
    ]
    routes = {(path, method) for path, method, _ in operations}
    assert routes == {("/health", "get"), *((path, "post") for path in POST_ROUTES)}
    assert all(operation["summary"] and operation["description"] for *_, operation in operations)


@pytest.mark.parametrize("path", POST_ROUTES)
def test_the_contract_states_every_answer(contract: dict[str, Any], path: str) -> None:
    """200, 400 and 500 are stated, the rest has the same shape, and FastAPI's own 422 is nowhere."""
    answers = contract["paths"][path]["post"]["responses"]
    assert set(answers) == {"200", "400", "500", "default"}
    for status in ("400", "500", "default"):
        schema = answers[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    assert "HTTPValidationError" not in json.dumps(contract)


@pytest.mark.parametrize("path", JOB_ROUTES)
def test_the_contract_has_both_forms_of_a_job(contract: dict[str, Any], path: str) -> None:
    """One route answers JSON or an event stream; the stream's example holds each kind of event."""
    content = contract["paths"][path]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    example = content["text/event-stream"]["example"]
    assert re.findall(r"^event: (\w+)$", example, re.MULTILINE)[-1] == "result"
    assert all(json.loads(data) for data in re.findall(r"^data: (.*)$", example, re.MULTILINE))


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize("status", ["400", "500"])
def test_every_error_has_an_example_that_keeps_the_contract(contract: dict[str, Any], path: str, status: str) -> None:
    """Each example is a real error body, of a category that has this status."""
    categories = {
        "400": {"validation", "provider", "resource"},
        "500": {"configuration", "provider", "resource", "internal"},
    }
    examples = contract["paths"][path]["post"]["responses"][status]["content"]["application/json"]["examples"]
    for example in examples.values():
        error = main.ErrorBody.model_validate(example["value"])
        assert error.category in categories[status]


def test_the_limits_of_every_field_are_in_the_contract(contract: dict[str, Any]) -> None:
    """A front end can check its input by the document alone."""
    fields = contract["components"]["schemas"]["JobPromptTTS"]["properties"]
    assert all(field.get("description") for field in fields.values())
    assert fields["image_url"]["format"] == "uri"
    assert fields["prompt"]["minLength"] == fields["text"]["minLength"] == 1
    assert (fields["seconds"]["minimum"], fields["seconds"]["default"]) == (1, 6)
    assert fields["fit"]["enum"] == ["shortest", "video", "speech"]
    assert all("pattern" in field for field in (fields["voice_id"], fields["resolution"], fields["model"]["anyOf"][0]))


@pytest.mark.parametrize("path", POST_ROUTES)
def test_examples_of_the_docs_work_in_the_sandbox(client: httpx.Client, path: str) -> None:
    """What /docs puts into a request body, by each field's example or default, is a request that succeeds."""
    document = client.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    body = {name: field["examples"][0] if "examples" in field else field["default"] for name, field in fields.items()}
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.json().get("status", 200) == 200


def test_docs_are_a_page(client: httpx.Client) -> None:
    """The documentation is there for people."""
    response = client.get("/docs")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
