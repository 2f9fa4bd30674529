"""The stand-in of Supabase Storage answers as the recorded server behind its gateway."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox import supabase
from tests.sandbox.calls import STORAGE, storage_error, upload


def key_in_both(name: str) -> dict[str, str]:
    """The two headers that carry a key."""
    return {"authorization": f"Bearer {supabase.KEYS[name]}", "apikey": supabase.KEYS[name]}


ANON, SECRET, FOREIGN = (key_in_both(name) for name in ("anon", "secret", "foreign"))
NO_SECOND_KEY = (400, "403", "Invalid Compact JWS")
RLS = (400, "403", "new row violates row-level security policy")
NO_HEADER = (400, "400", "headers must have required property 'authorization'")


@pytest.mark.parametrize(
    ("bearer", "apikey", "expected"),
    [
        pytest.param("service", "service", 200, id="both"),
        pytest.param("service", None, 200, id="bearer alone"),
        pytest.param(None, "service", 200, id="apikey alone"),
        pytest.param("service", "anon", 200, id="the bearer wins"),
        pytest.param("anon", "anon", RLS, id="anonymous key"),
        pytest.param(
            "expired",
            "expired",
            (400, "403", '"exp" claim timestamp check failed'),
            id="expired key",
        ),
        pytest.param(
            "foreign",
            "foreign",
            (400, "403", "signature verification failed"),
            id="another project's key",
        ),
        pytest.param("garbage", "garbage", NO_SECOND_KEY, id="garbage"),
        pytest.param("", None, NO_SECOND_KEY, id="empty bearer"),
        pytest.param(None, None, NO_HEADER, id="no key"),
        pytest.param("secret", "secret", 200, id="secret key in both"),
        pytest.param(None, "secret", 200, id="secret key as apikey"),
        pytest.param("secret", None, NO_HEADER, id="secret key as bearer alone"),
        pytest.param(
            "sb_secret_unknown", "sb_secret_unknown", NO_SECOND_KEY, id="unknown secret key"
        ),
        pytest.param(None, "publishable", RLS, id="publishable key"),
    ],
)
def test_storage_treats_keys_as_the_recorded_gateway_does(call, bearer, apikey, expected):
    """Every refusal of a key is an HTTP 400; the body tells which."""
    headers = (
        {}
        if bearer is None
        else {"authorization": f"Bearer {supabase.KEYS.get(bearer, bearer)}".strip(" ")}
    )
    headers |= {} if apikey is None else {"apikey": supabase.KEYS.get(apikey, apikey)}
    answer = call("POST", "/storage/v1/object/pets/key.bin", headers=headers, content=b"x")
    assert (answer.status_code if expected == 200 else storage_error(answer)) == expected


TOO_LARGE = (400, "413", "The object exceeded the maximum allowed size")


@pytest.mark.parametrize(
    ("path", "content", "content_type", "expected"),
    [
        pytest.param(
            "nope/a", b"x", "audio/mpeg", (400, "404", "Bucket not found"), id="missing bucket"
        ),
        pytest.param(
            "small1mb/a",
            bytes(1_000_001),
            "audio/mpeg",
            TOO_LARGE,
            id="a byte over the bucket's limit",
        ),
        pytest.param("small1mb/a", bytes(1_000_000), "audio/mpeg", 200, id="at the bucket's limit"),
        pytest.param(
            "small1mb/a",
            iter([bytes(1_000_001)]),
            "audio/mpeg",
            TOO_LARGE,
            id="over the limit without a length",
        ),
        pytest.param(
            "pets/a", bytes(52_428_801), "audio/mpeg", TOO_LARGE, id="over the global limit"
        ),
        pytest.param(
            "mp4only/a",
            b"x",
            "audio/mpeg",
            (400, "415", "mime type audio/mpeg is not supported"),
            id="mime",
        ),
        pytest.param(
            "mp4only/a",
            b"x",
            "VIDEO/MP4",
            (400, "415", "mime type VIDEO/MP4 is not supported"),
            id="mime in capitals",
        ),
        pytest.param("mp4only/a", b"x", "video/mp4", 200, id="mime in the list"),
        pytest.param(
            "pets/a", b"x", "mp3", (400, "415", "Invalid Content-Type header"), id="no mime"
        ),
        pytest.param("pets/a", b"", "audio/mpeg", 200, id="empty body"),
        pytest.param(
            "pets/%C3%A9.mp3",
            b"x",
            "audio/mpeg",
            (400, "400", "Invalid key: é.mp3"),
            id="non-ASCII name",
        ),
        pytest.param(
            "pets/a~b", b"x", "audio/mpeg", (400, "400", "Invalid key: a~b"), id="forbidden sign"
        ),
        pytest.param(
            "pets/" + "a" * 256,
            b"x",
            "audio/mpeg",
            (500, "500", "Internal Server Error"),
            id="name too long",
        ),
        pytest.param("pets/", b"x", "audio/mpeg", (400, "400", "Invalid key: "), id="no name"),
    ],
)
def test_storage_checks_bucket_type_size_and_name(
    sandbox, call, path, content, content_type, expected
):
    """What it accepts is stored, what it refuses is not, and nearly every refusal is an HTTP 400."""
    answer = upload(call, path, content, content_type=content_type)
    assert (answer.status_code if expected == 200 else storage_error(answer)) == expected
    assert len(sandbox.objects) == (expected == 200)


@pytest.mark.parametrize(
    ("upsert", "is_replaced"),
    [
        pytest.param("true", True, id="true"),
        pytest.param("True", False, id="a capital"),
        pytest.param("1", False, id="one"),
        pytest.param("false", False, id="false"),
        pytest.param(None, False, id="absent"),
    ],
)
def test_an_object_is_replaced_only_with_the_exact_header(call, sandbox, upsert, is_replaced):
    """`x-upsert: true` replaces and keeps the id; anything else is a Duplicate, and the query does nothing."""
    first = upload(call).json()
    second = upload(
        call, "pets/a.bin?upsert=true", b"new", **({"x_upsert": upsert} if upsert else {})
    )
    if is_replaced:
        assert second.json() == first
    else:
        assert storage_error(second) == (400, "409", "The resource already exists")
    assert sandbox.objects["pets/a.bin"].read() == (b"new" if is_replaced else b"bytes")


@pytest.mark.parametrize("bucket", ["pets", "private"])
def test_a_replaced_object_is_read_new(call, bucket):
    """A small file that is written again and again, as JSON and not to be cached: with the key its newest bytes come."""
    path, seen = f"/storage/v1/object/authenticated/{bucket}/jobs/a.json", []
    for content in (b'{"step": 1}', b'{"step": 22}'):
        how = {"content_type": "application/json", "cache_control": "max-age=0", "x_upsert": "true"}
        told = upload(call, f"{bucket}/jobs/a.json", content, **how)
        answer = call(
            "GET", path, headers={**STORAGE, "if-none-match": seen[0][1]} if seen else STORAGE
        )
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "max-age=0" + (
            ", stale-while-revalidate=30" if seen else ""
        )
        seen.append((told.json()["Id"], answer.headers["etag"]))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


def test_uploads_at_once_to_a_new_path_are_all_accepted(sandbox, call):
    """Whether something is there is asked before the body is read, and not again: the last one to finish wins."""
    answers = []

    def body() -> Iterator[bytes]:
        yield b"slow"
        while not sandbox.calls("upload"):
            time.sleep(0.001)
        answers.append(upload(call, content=b"fast"))

    answers.append(upload(call, content=body()))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert sandbox.objects["pets/a.bin"].read() == b"slow"


def test_an_object_is_served_as_it_was_uploaded(call):
    """Type and cache-control come back letter by letter, with an etag, ranges and CORS for everyone."""
    content_type = "audio/mpeg; charset=binary"
    upload(call, content_type=content_type, cache_control="3600")
    answer = call("GET", "/storage/v1/object/public/pets/a.bin")
    assert answer.content == b"bytes"
    wanted = {
        "content-type": content_type,
        "cache-control": "3600",
        "accept-ranges": "bytes",
        "content-length": "5",
    }
    assert wanted.items() <= dict(answer.headers).items()
    assert (answer.headers["access-control-allow-origin"], "last-modified" in answer.headers) == (
        "*",
        True,
    )
    again = call(
        "GET",
        "/storage/v1/object/public/pets/a.bin",
        headers={"if-none-match": answer.headers["etag"]},
    )
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        pytest.param("bytes=0-2", 206, b"012", id="first"),
        pytest.param("bytes=4-5", 206, b"45", id="middle"),
        pytest.param("bytes=7-", 206, b"789", id="open end"),
        pytest.param("bytes=-2", 206, b"89", id="suffix"),
        pytest.param("bytes=8-99", 206, b"89", id="end beyond the size"),
        pytest.param("bytes=10-", 416, None, id="start beyond the size"),
        pytest.param("bytes=0-1,3-4", 416, None, id="several"),
        pytest.param("items=0-1", 416, None, id="other unit"),
    ],
)
def test_ranges_are_served(call, asked, status, content):
    """One range gives a 206 with its place, what cannot be met a 416."""
    upload(call, content=b"0123456789")
    answer = call("GET", "/storage/v1/object/public/pets/a.bin", headers={"range": asked})
    assert answer.status_code == status
    if content:
        start = b"0123456789".index(content)
        assert answer.content == content
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(content) - 1}/10"


def test_head_tells_the_size_without_the_bytes(call):
    """HEAD ignores a range, and on a missing object has no body to tell why."""
    upload(call, content=b"0123456789")
    found = call("HEAD", "/storage/v1/object/public/pets/a.bin", headers={"range": "bytes=0-1"})
    missing = call("HEAD", "/storage/v1/object/public/pets/none")
    assert (found.status_code, found.headers["content-length"], found.content) == (200, "10", b"")
    assert (missing.status_code, missing.content) == (400, b"")


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        pytest.param(
            "authenticated/pets/a.bin", STORAGE, 200, id="public object on the authenticated route"
        ),
        pytest.param(
            "authenticated/pets/a.bin", {}, NO_HEADER, id="no key on the authenticated route"
        ),
        pytest.param(
            "authenticated/pets/none",
            STORAGE,
            (400, "404", "Object not found"),
            id="missing, with the key",
        ),
        pytest.param(
            "authenticated/private/none",
            STORAGE,
            (400, "404", "Object not found"),
            id="missing and private",
        ),
        pytest.param(
            "authenticated/nope/a.bin",
            STORAGE,
            (400, "404", "Bucket not found"),
            id="no bucket, with the key",
        ),
        pytest.param(
            "authenticated/private/a.bin",
            ANON,
            (400, "404", "Object not found"),
            id="private, anonymous key",
        ),
        pytest.param("authenticated/private/a.bin", SECRET, 200, id="secret key in both headers"),
        pytest.param(
            "authenticated/private/a.bin",
            FOREIGN,
            (400, "403", "signature verification failed"),
            id="foreign key",
        ),
        pytest.param("public/pets/none", {}, (400, "404", "Object not found"), id="missing object"),
        pytest.param(
            "public/nope/a.bin", {}, (400, "404", "Bucket not found"), id="missing bucket"
        ),
        pytest.param(
            "public/private/a.bin",
            STORAGE,
            (400, "404", "Bucket not found"),
            id="private bucket, even with a key",
        ),
        pytest.param(
            "private/a.bin", {}, (400, "404", "Bucket not found"), id="private object without a key"
        ),
        pytest.param("private/a.bin", STORAGE, 200, id="private object with the key"),
        pytest.param("authenticated/private/a.bin", STORAGE, 200, id="authenticated route"),
        pytest.param("pets/a.bin", {}, 200, id="public object on the other route"),
    ],
)
def test_reads_depend_on_bucket_and_key(call, path, headers, expected):
    """A private bucket looks like one that does not exist."""
    upload(call, "pets/a.bin")
    upload(call, "private/a.bin")
    answer = call("GET", f"/storage/v1/object/{path}", headers=headers)
    assert (answer.status_code if expected == 200 else storage_error(answer)) == expected


def test_download_in_the_query_names_the_file(call):
    """`?download=1` makes a file named 1."""
    upload(call)
    answer = call("GET", "/storage/v1/object/public/pets/a.bin?download=1")
    assert answer.headers["content-disposition"] == "attachment; filename=1; filename*=UTF-8''1"


def test_a_bucket_tells_its_limits_to_the_service_key_only(call):
    """What a check of the set-up asks for."""
    bucket = call("GET", "/storage/v1/bucket/mp4only", headers=STORAGE).json()
    assert (bucket["public"], bucket["file_size_limit"], bucket["allowed_mime_types"]) == (
        True,
        None,
        ["video/mp4"],
    )
    anonymous = call("GET", "/storage/v1/bucket/mp4only", headers={"apikey": supabase.KEYS["anon"]})
    assert storage_error(anonymous) == (400, "404", "Bucket not found")


def test_a_browser_may_ask_first(call):
    """The gateway answers a preflight."""
    headers = {
        "origin": "http://a",
        "access-control-request-method": "GET",
        "access-control-request-headers": "range",
    }
    answer = call("OPTIONS", "/storage/v1/object/public/pets/a.bin", headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, "range")


def test_a_big_object_is_kept_in_a_file(sandbox, call):
    """It does not fill the memory, comes back whole, and is gone once it is replaced, or after a reset."""
    content = os.urandom(3_000_000)
    upload(call, content=content)
    path = sandbox.objects["pets/a.bin"].data
    assert isinstance(path, Path)
    assert call("GET", "/storage/v1/object/public/pets/a.bin").content == content
    upload(call, content=content[1:], x_upsert="true")
    assert not path.exists()
    assert call("GET", "/storage/v1/object/public/pets/a.bin").content == content[1:]
    sandbox.reset()
    assert list(path.parent.iterdir()) == []
