"""Storage: the upload as Supabase wants it, from memory and from disk, and every way it can fail."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

import main
from tests.support.application import SECRETS, SUPABASE_URL, cases, error_from, error_kind, use_settings

PATH = "audio/0b1f3a52-8d6e-4c6f-9a53-2f4f3c1f7a10.mp3"
UPLOAD_URL = f"{SUPABASE_URL}/storage/v1/object/pets/{PATH}"
PUBLIC_URL = f"{SUPABASE_URL}/storage/v1/object/public/pets/{PATH}"
STORED = {"Key": f"pets/{PATH}", "Id": "5e0f9d0c-7f0b-4a39-9c1c-7f1f1f0f2b11"}
SPEECH = b"ID3" + bytes(range(256)) * 100

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


@pytest.mark.parametrize("key", [SECRETS["SUPABASE_SERVICE_ROLE"], "sb_secret_0123456789_abcdefg"])
async def test_the_request(supabase, monkeypatch, content, key):
    """Exactly what Supabase documents: raw body, its length, a bare type, the upsert as a header; no header twice."""
    use_settings(monkeypatch, SUPABASE_SERVICE_ROLE=key)
    assert await upload(content) == PUBLIC_URL
    request = supabase.calls.last.request
    assert (request.method, str(request.url), request.content) == ("POST", UPLOAD_URL, SPEECH)
    expected = {
        "authorization": f"Bearer {key}",  # both kinds of keys stand in both, or are refused
        "apikey": key,
        "content-type": "audio/mpeg",
        "content-length": str(len(SPEECH)),
        "cache-control": "max-age=31536000",
        "x-upsert": "true",
    }
    sent = [(name.lower().decode(), value.decode()) for name, value in request.headers.raw]
    assert sorted(header for header in sent if header[0] in expected) == sorted(expected.items())
    assert not {"transfer-encoding", "xi-api-key", "cookie"} & set(request.headers)


async def test_a_video_is_read_piece_by_piece(tmp_path):
    """It never lies in memory as a whole."""
    video = tmp_path / "video.mp4"
    video.write_bytes(b"0123456789" * 350_000)
    pieces = [piece async for piece in main.FileStream(video)]
    assert b"".join(pieces) == video.read_bytes()
    assert max(map(len, pieces)) <= 1_000_000


async def test_a_failed_upload_is_repeated_from_the_first_byte(client, content):
    """Each attempt sends the whole file, from memory and from disk."""
    with respx.mock as router:
        outcomes = [httpx.ReadError("reset"), httpx.Response(503), httpx.Response(200, json=STORED)]
        route = router.post(UPLOAD_URL).mock(side_effect=outcomes)
        assert await upload(content) == PUBLIC_URL
        assert [call.request.content for call in route.calls] == [SPEECH] * 3


# What Supabase refuses: HTTP 400 to nearly everything, the truth in the body


REFUSALS: list[tuple[Any, ...]] = [
    ("no such bucket", 400, "404"),
    ("exists", 400, "409"),
    ("nothing more is told", 400, None),
    ("a gateway's 401", 401, None),
    ("no route", 404, 404),
    ("a redirect, which is not followed", 301, None),
]


@pytest.mark.parametrize(("status", "meant"), cases(REFUSALS))
async def test_every_refusal(supabase, status, meant):
    """Never the client's fault, told in the storage's words, and not asked again."""
    body = {"statusCode": meant, "error": "any", "message": "Because.", "code": "Any"}
    supabase.respond(status, json=body, headers={"Location": "https://elsewhere.example/"})
    error = await error_from(upload())
    assert (*error_kind(error), error.retryable) == (500, "resource", "supabase", meant == "409" or status == 301)
    assert error.detail == f"Supabase Storage answered {status}: Because."
    assert supabase.call_count == 1


@pytest.mark.parametrize("body", [{}, {"Key": None}, {"Key": ""}])
async def test_a_success_that_stored_nothing_is_a_failure(supabase, body):
    """Some other server's 200 is no promise that the file is there."""
    supabase.respond(200, json=body)
    error = await error_from(upload())
    assert error_kind(error) == (500, "resource", "supabase")
    assert error.detail == "Supabase Storage answered without having stored the file."
