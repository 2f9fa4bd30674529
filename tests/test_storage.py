"""Storage: the upload as Supabase wants it, from memory and from disk, and every way it can fail."""

import json
import re
from collections.abc import Iterator
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
    error_of,
    told,
    use_settings,
)

PATH = "audio/0b1f3a52-8d6e-4c6f-9a53-2f4f3c1f7a10.mp3"
UPLOAD_URL = f"{SUPABASE_URL}/storage/v1/object/pets/{PATH}"
PUBLIC_URL = f"{SUPABASE_URL}/storage/v1/object/public/pets/{PATH}"
STORED = {"Key": f"pets/{PATH}", "Id": "5e0f9d0c-7f0b-4a39-9c1c-7f1f1f0f2b11"}
SPEECH = b"ID3" + bytes(range(256)) * 100
JOB = {"image_url": "https://example.com/pet.jpg", "prompt": "Talk", "text": "Feed me!", "voice_id": "voice"}

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]


@pytest.fixture
def supabase(client: httpx.AsyncClient) -> Iterator[respx.Route]:
    """The one upload; every other call fails the test."""
    with respx.mock(assert_all_called=False) as router:
        yield router.post(UPLOAD_URL).respond(200, json=STORED)


@pytest.fixture(params=["bytes", "file"])
def content(request: pytest.FixtureRequest, tmp_path: Path) -> bytes | Path:
    """Speech to store, in memory or on disk."""
    if request.param == "bytes":
        return SPEECH
    (tmp_path / "speech").write_bytes(SPEECH)
    return tmp_path / "speech"


async def upload(content: bytes | Path = SPEECH) -> str:
    """Store some speech."""
    return await main.supabase_upload(PATH, content, "audio/mpeg")


# The request


async def test_the_request(supabase, content):
    """Exactly what Supabase documents: raw body, its length, a bare type, the upsert as a header."""
    assert await upload(content) == PUBLIC_URL
    request = supabase.calls.last.request
    assert (request.method, str(request.url)) == ("POST", UPLOAD_URL)
    assert request.content == SPEECH
    sent = {name: request.headers[name] for name in ("content-type", "content-length", "cache-control", "x-upsert")}
    assert sent == {
        "content-type": "audio/mpeg",
        "content-length": str(len(SPEECH)),
        "cache-control": "max-age=31536000",
        "x-upsert": "true",
    }
    assert not {"transfer-encoding", "xi-api-key", "cookie"} & set(request.headers)


@pytest.mark.parametrize("key", ["eyJhbGciOiJIUzI1NiJ9.e30.c2ln", "sb_secret_0123456789_abcdefg"])
async def test_both_kinds_of_keys_are_sent_in_both_headers(supabase, monkeypatch, key):
    """A Bearer that differs from the apikey would be refused."""
    use_settings(monkeypatch, SUPABASE_SERVICE_ROLE=key)
    await upload()
    headers = supabase.calls.last.request.headers
    assert (headers["authorization"], headers["apikey"]) == (f"Bearer {key}", key)


@pytest.mark.parametrize("header", ["content-length", "authorization", "apikey", "content-type"])
async def test_no_header_is_sent_twice(supabase, content, header):
    """Two lengths, or two keys, are a refusal."""
    await upload(content)
    names = [name.lower() for name, _ in supabase.calls.last.request.headers.raw]
    assert names.count(header.encode()) == 1


async def test_a_film_is_streamed_from_disk(supabase, tmp_path):
    """In pieces of 64 KiB, with its length told before."""
    film = tmp_path / "film.mp4"
    film.write_bytes(b"\0\0\0\x18ftyp" + b"0123456789" * 350_000)
    await main.supabase_upload(PATH, film, "video/mp4")
    request = supabase.calls.last.request
    assert (request.headers["content-length"], request.content) == ("3500008", film.read_bytes())
    assert [len(piece) async for piece in main.FileBody(film)] == [65_536] * 53 + [26_600]


@pytest.mark.parametrize(
    ("variables", "uploaded", "public"),
    [
        pytest.param(
            {"SUPABASE_URL": "https://other.supabase.co/"},
            f"https://other.supabase.co/storage/v1/object/pets/{PATH}",
            f"https://other.supabase.co/storage/v1/object/public/pets/{PATH}",
            id="another project, with a slash at its end",
        ),
        pytest.param(
            {"SUPABASE_URL": "http://10.1.2.3:8000", "SUPABASE_BUCKET": "cats-2.x"},
            f"http://10.1.2.3:8000/storage/v1/object/cats-2.x/{PATH}",
            f"http://10.1.2.3:8000/storage/v1/object/public/cats-2.x/{PATH}",
            id="one of one's own, another bucket",
        ),
        pytest.param(
            {"SUPABASE_URL": "https://example.com/supabase"},
            f"https://example.com/supabase/storage/v1/object/pets/{PATH}",
            f"https://example.com/supabase/storage/v1/object/public/pets/{PATH}",
            id="under a path",
        ),
    ],
)
async def test_where_files_are_stored(monkeypatch, variables, uploaded, public):
    """Project and bucket are settings; the owner's own address may be private."""
    use_settings(monkeypatch, **variables)
    with respx.mock as router:
        router.post(uploaded).respond(200, json=STORED)
        assert await upload() == public


async def test_without_a_running_service(content):
    """The helper stands on its own."""
    with respx.mock as router:
        outcomes = [httpx.ReadError("reset"), httpx.Response(503), httpx.Response(200, json=STORED)]
        route = router.post(UPLOAD_URL).mock(side_effect=outcomes)
        assert await upload(content) == PUBLIC_URL
        assert [call.request.content for call in route.calls] == [SPEECH] * 3


@pytest.mark.parametrize("name", ["SUPABASE_URL", "SUPABASE_SERVICE_ROLE"])
async def test_without_a_setting_nothing_is_sent(supabase, monkeypatch, name):
    """The variable is named."""
    use_settings(monkeypatch, **{name: ""})
    error = await error_of(upload())
    assert told(error) == (500, "configuration", None)
    assert error.detail == f"The service is not set up for this: set {name}."
    assert not supabase.called


@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
async def test_nothing_is_not_stored(supabase, tmp_path, as_file):
    """Supabase would take an empty file; whoever plays it would not."""
    (tmp_path / "empty").touch()
    error = await error_of(upload(tmp_path / "empty" if as_file else b""))
    assert told(error) == (500, "resource", "supabase")
    assert error.detail == "There is nothing to store: the file is empty."
    assert not supabase.called


# What Supabase refuses: HTTP 400 to nearly everything, the truth in the body


def refused(status: str, error: str, message: str, code: str) -> dict[str, Any]:
    """An error body of Supabase Storage."""
    return {"statusCode": status, "error": error, "message": message, "code": code}


@pytest.mark.parametrize(
    ("body", "requests"),
    [
        pytest.param(refused("404", "Bucket not found", "Bucket not found", "NoSuchBucket"), 1, id="no such bucket"),
        pytest.param(refused("409", "Duplicate", "The resource already exists", "KeyAlreadyExists"), 1, id="exists"),
        pytest.param(
            refused("413", "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge"),
            1,
            id="too large",
        ),
        pytest.param(
            refused("415", "invalid_mime_type", "mime type audio/mpeg is not supported", "InvalidMimeType"),
            1,
            id="type not allowed",
        ),
        pytest.param(refused("403", "Unauthorized", "Invalid Compact JWS", "AccessDenied"), 1, id="wrong key"),
        pytest.param(
            refused("403", "Unauthorized", "new row violates row-level security policy", "AccessDenied"),
            1,
            id="a key without rights",
        ),
        pytest.param(
            refused("400", "Error", "headers must have required property 'authorization'", "InvalidRequest"),
            1,
            id="no key",
        ),
        pytest.param(refused("423", "resource_locked", "The resource is locked", "ResourceLocked"), 1, id="locked"),
        pytest.param(
            refused("429", "too_many_connections", "Too many connections issued", "SlowDown"), 4, id="slow down"
        ),
        pytest.param(refused("503", "acquiring_lock_timeout", "Lock timeout", "LockTimeout"), 4, id="lock timeout"),
        pytest.param(refused("503", "database_read_only", "Read-only", "DatabaseReadOnly"), 4, id="read-only"),
        pytest.param(refused("544", "DatabaseTimeout", "Timed out", "DatabaseTimeout"), 4, id="database timeout"),
    ],
)
async def test_every_refusal_hidden_in_a_400(supabase, content, body, requests):
    """Never the client's fault; what may pass is tried four times, from the first byte."""
    supabase.respond(400, json=body)
    error = await error_of(upload(content))
    assert told(error) == (500, "resource", "supabase")
    assert error.detail == f"Supabase Storage answered 400: {body['message']}"
    assert [call.request.content for call in supabase.calls] == [SPEECH] * requests


@pytest.mark.parametrize(
    ("status", "body", "message", "requests"),
    [
        pytest.param(401, b'{"message": "Invalid API key"}', "Invalid API key", 1, id="a gateway's 401"),
        pytest.param(402, b"", "Payment Required", 1, id="project restricted"),
        pytest.param(404, b'{"statusCode": 404, "message": "Route not found"}', "Route not found", 1, id="no route"),
        pytest.param(411, b"<html>411 Length Required</html>", None, 1, id="HTML"),
        pytest.param(422, b"{}", "Unprocessable", 1, id="422"),
        pytest.param(301, b"", "Moved Permanently", 1, id="a redirect is not followed"),
        pytest.param(204, b"", "No Content", 4, id="a success without an answer"),
        pytest.param(429, b'{"message": "Slow down"}', "Slow down", 4, id="429"),
        pytest.param(
            500, b'{"statusCode": "500", "message": "Internal Server Error"}', "Internal Server Error", 4, id="500"
        ),
        pytest.param(502, b"<html><h1>502</h1></html>", None, 4, id="a gateway's page"),
        pytest.param(544, b'{"message": "The connection to the database timed out"}', "The connection", 4, id="544"),
        pytest.param(400, b"", "Bad Request", 1, id="400 without a body"),
        pytest.param(400, b'{"statusCode": 503, "message": "A number"}', "A number", 4, id="a number for a status"),
        pytest.param(400, b'["503"]', "503", 1, id="a list"),
    ],
)
async def test_every_other_refusal(supabase, status, body, message, requests):
    """The same error, whatever the body holds."""
    supabase.respond(status, content=body, headers={"Location": "https://elsewhere.example/"})
    error = await error_of(upload())
    assert told(error) == (500, "resource", "supabase")
    assert error.detail.startswith(f"Supabase Storage answered {status}: {message or ''}")
    assert supabase.call_count == requests


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>Welcome</html>", id="a portal's page"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"{}", id="no key"),
        pytest.param(b'{"Key": null}', id="null key"),
        pytest.param(b'{"Key": ""}', id="empty key"),
    ],
)
async def test_a_success_that_stored_nothing_is_a_failure(supabase, body):
    """Some other server's 200 is no promise that the file is there."""
    supabase.respond(200, content=body)
    error = await error_of(upload())
    assert told(error) == (500, "resource", "supabase")
    assert error.detail == "Supabase Storage answered without having stored the file."


@pytest.mark.parametrize(
    "error", [httpx.WriteError("reset"), httpx.ReadTimeout("slow"), httpx.ConnectError("refused")], ids=repr
)
async def test_no_answer(supabase, error):
    """The storage's failure, after four attempts, with the reason."""
    supabase.mock(side_effect=error)
    caught = await error_of(upload())
    assert told(caught) == (500, "resource", "supabase")
    assert caught.detail == f"Supabase Storage did not answer: {type(error).__name__} {error}."
    assert supabase.call_count == 4


# In a job


@pytest.fixture
def providers() -> Iterator[respx.MockRouter]:
    """A whole job's calls, but for the uploads; what is not routed fails the test."""
    film = {"id": "p1", "status": "succeeded", "output": "https://replicate.delivery/xezq/film.mp4"}
    with respx.mock(assert_all_called=False) as router:
        router.post(url__startswith=ELEVEN_URL).respond(200, content=SPEECH)
        router.post(url__startswith=REPLICATE_URL).respond(201, json=film)
        yield router


async def test_a_failed_first_upload_buys_no_film(client, providers):
    """Speech is lost, and nothing else."""
    upload = providers.post(url__startswith=SUPABASE_URL).respond(400, json=refused("404", "", "Bucket not found", ""))
    answer = await client.post("/jobs_prompt_tts", json=JOB)
    body = answer.json()
    assert (answer.status_code, body["category"], body["provider"]) == (500, "resource", "supabase")
    assert body["detail"] == "Supabase Storage answered 400: Bucket not found"
    assert "partial" not in body
    assert [str(call.request.url.host) for call in providers.calls] == ["api.elevenlabs.io", "project.supabase.co"]
    assert upload.call_count == 1


async def test_names_are_fresh_in_each_job(client, providers):
    """Two jobs alike do not overwrite each other."""
    upload = providers.post(url__startswith=SUPABASE_URL).respond(200, json=STORED)
    providers.get(url__startswith="https://replicate.delivery/").respond(404)
    providers.get(url__startswith=SUPABASE_URL).respond(200, content=SPEECH)
    for _ in range(2):
        await client.post("/jobs_prompt_tts", json=JOB)
    paths = [call.request.url.path for call in upload.calls]
    uuid4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert all(re.fullmatch(rf"/storage/v1/object/pets/audio/{uuid4}\.mp3", path) for path in paths)
    assert len(set(paths)) == 2


async def test_the_storages_key_goes_nowhere_else(client, providers):
    """Neither to the other providers, nor with the public download of its own file."""
    providers.post(url__startswith=SUPABASE_URL).respond(200, json=STORED)
    providers.get(url__startswith=SUPABASE_URL).respond(200, content=SPEECH)
    providers.get(url__startswith="https://replicate.delivery/").respond(403)
    answer = await client.post("/jobs_prompt_tts", json=JOB)
    assert json.loads(answer.text)["partial"]["prediction_id"] == "p1"
    key = SECRETS["SUPABASE_SERVICE_ROLE"]
    carriers = {call.request.method for call in providers.calls if key in str(call.request.headers.raw)}
    hosts = {call.request.url.host for call in providers.calls if key in str(call.request.headers.raw)}
    assert (carriers, hosts) == ({"POST"}, {"project.supabase.co"})
    assert key not in answer.text
