"""The stand-in for Supabase Storage: it answers as the recorded server behind its gateway."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.sandbox import supabase
from tests.sandbox.calls import STORAGE, Call, storage_error, upload

PUBLIC_URL = "/storage/v1/object/public/pets/a.bin"
MP4_ONLY_URL = "/storage/v1/bucket/mp4only"


def key_headers(name: str) -> dict[str, str]:
    """The two headers that carry a key."""
    key = supabase.KEYS[name]
    return {"authorization": f"Bearer {key}", "apikey": key}


ANON = key_headers("anon")
SECRET = key_headers("secret")
FOREIGN = key_headers("foreign")

NO_BUCKET = (400, "404", "Bucket not found")
NO_OBJECT = (400, "404", "Object not found")
NO_KEY = (400, "400", "headers must have required property 'authorization'")
MALFORMED_KEY = (400, "403", "Invalid Compact JWS")
EXPIRED_KEY = (400, "403", '"exp" claim timestamp check failed')
FOREIGN_KEY = (400, "403", "signature verification failed")
MAY_NOT_WRITE = (400, "403", "new row violates row-level security policy")
TOO_LARGE = (400, "413", "The object exceeded the maximum allowed size")


# Keys


@pytest.mark.parametrize(
    ("bearer", "apikey", "error"),
    [
        pytest.param("service", "service", None, id="both"),
        pytest.param("service", None, None, id="bearer alone"),
        pytest.param(None, "service", None, id="apikey alone"),
        pytest.param("service", "anon", None, id="the bearer wins"),
        pytest.param("anon", "anon", MAY_NOT_WRITE, id="anonymous key"),
        pytest.param("expired", "expired", EXPIRED_KEY, id="expired key"),
        pytest.param("foreign", "foreign", FOREIGN_KEY, id="another project's key"),
        pytest.param("garbage", "garbage", MALFORMED_KEY, id="garbage"),
        pytest.param("", None, MALFORMED_KEY, id="empty bearer"),
        pytest.param(None, None, NO_KEY, id="no key"),
        pytest.param("secret", "secret", None, id="secret key in both"),
        pytest.param(None, "secret", None, id="secret key as apikey"),
        pytest.param("secret", None, NO_KEY, id="secret key as bearer alone"),
        pytest.param(
            "sb_secret_unknown",
            "sb_secret_unknown",
            MALFORMED_KEY,
            id="unknown secret key",
        ),
        pytest.param(None, "publishable", MAY_NOT_WRITE, id="publishable key"),
    ],
)
def test_keys_are_checked_as_by_the_recorded_gateway(call, bearer, apikey, error):
    """Every refusal of a key is an HTTP 400; its body has the reason."""
    headers = {}
    if bearer is not None:
        token = supabase.KEYS.get(bearer, bearer)
        headers["authorization"] = f"Bearer {token}".strip()
    if apikey is not None:
        headers["apikey"] = supabase.KEYS.get(apikey, apikey)

    path = "/storage/v1/object/pets/key.bin"
    response = call("POST", path, headers=headers, content=b"x")
    if error is None:
        assert response.status_code == 200
    else:
        assert storage_error(response) == error


# Uploading


@pytest.mark.parametrize(
    ("path", "content", "content_type", "error"),
    [
        pytest.param("nope/a", b"x", "audio/mpeg", NO_BUCKET, id="missing bucket"),
        pytest.param(
            "small1mb/a",
            bytes(1_000_001),
            "audio/mpeg",
            TOO_LARGE,
            id="a byte over the bucket's limit",
        ),
        pytest.param(
            "small1mb/a",
            bytes(1_000_000),
            "audio/mpeg",
            None,
            id="at the bucket's limit",
        ),
        pytest.param(
            "small1mb/a",
            iter([bytes(1_000_001)]),
            "audio/mpeg",
            TOO_LARGE,
            id="over the limit without a length",
        ),
        pytest.param(
            "pets/a",
            bytes(52_428_801),
            "audio/mpeg",
            TOO_LARGE,
            id="over the global limit",
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
        pytest.param("mp4only/a", b"x", "video/mp4", None, id="mime in the list"),
        pytest.param(
            "pets/a",
            b"x",
            "mp3",
            (400, "415", "Invalid Content-Type header"),
            id="no mime",
        ),
        pytest.param("pets/a", b"", "audio/mpeg", None, id="empty body"),
        pytest.param(
            "pets/%C3%A9.mp3",
            b"x",
            "audio/mpeg",
            (400, "400", "Invalid key: é.mp3"),
            id="non-ASCII name",
        ),
        pytest.param(
            "pets/a~b",
            b"x",
            "audio/mpeg",
            (400, "400", "Invalid key: a~b"),
            id="forbidden character",
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
def test_an_upload_is_checked(sandbox, call, path, content, content_type, error):
    """Bucket, type, size and name are checked, and nothing that is refused is stored."""
    response = upload(call, path, content, content_type=content_type)
    if error is None:
        assert response.status_code == 200
        assert len(sandbox.objects) == 1
    else:
        assert storage_error(response) == error
        assert len(sandbox.objects) == 0


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"x_upsert": "True"}, id="a capital"),
        pytest.param({"x_upsert": "1"}, id="one"),
        pytest.param({"x_upsert": "false"}, id="false"),
        pytest.param({}, id="absent"),
    ],
)
def test_an_object_is_not_replaced_without_the_exact_header(sandbox, call, headers):
    """Anything but `x-upsert: true` is a Duplicate, and the query does nothing."""
    upload(call)
    second = upload(call, "pets/a.bin?upsert=true", b"new", **headers)
    assert storage_error(second) == (400, "409", "The resource already exists")
    assert sandbox.objects["pets/a.bin"].read() == b"bytes"


def test_an_object_is_replaced_with_the_exact_header(sandbox, call):
    """With `x-upsert: true` the new bytes are stored under the old id."""
    first = upload(call)
    second = upload(call, "pets/a.bin?upsert=true", b"new", x_upsert="true")
    assert second.json() == first.json()
    assert sandbox.objects["pets/a.bin"].read() == b"new"


@pytest.mark.parametrize("bucket", ["pets", "private"])
def test_a_replaced_object_is_read_new(call, bucket):
    """With the key, a small JSON file that is written again comes with its newest bytes."""
    name = f"{bucket}/jobs/a.json"
    path = f"/storage/v1/object/authenticated/{name}"
    headers = {
        "content_type": "application/json",
        "cache_control": "max-age=0",
        "x_upsert": "true",
    }
    first_upload = upload(call, name, b'{"step": 1}', **headers)
    first = call("GET", path, headers=STORAGE)
    assert (first.status_code, first.content) == (200, b'{"step": 1}')
    assert first.headers["content-type"] == "application/json"
    assert first.headers["cache-control"] == "max-age=0"

    second_upload = upload(call, name, b'{"step": 22}', **headers)
    if_none_match = {"if-none-match": first.headers["etag"]}
    second = call("GET", path, headers={**STORAGE, **if_none_match})
    assert (second.status_code, second.content) == (200, b'{"step": 22}')
    assert second.headers["content-type"] == "application/json"
    assert second.headers["cache-control"] == "max-age=0, stale-while-revalidate=30"
    assert second.headers["etag"] != first.headers["etag"]
    assert second_upload.json()["Id"] == first_upload.json()["Id"]


def test_simultaneous_uploads_to_a_new_path_are_all_accepted(sandbox, call):
    """The path is only checked before the body is read: the last upload to finish wins."""
    fast = []

    def slow_body() -> Iterator[bytes]:
        """A body in the middle of which another upload starts and ends."""
        yield b"slow"
        while not sandbox.calls("upload"):
            time.sleep(0.001)
        fast.append(upload(call, content=b"fast"))

    slow = upload(call, content=slow_body())
    assert (fast[0].status_code, slow.status_code) == (200, 200)
    assert fast[0].json() == slow.json()
    assert sandbox.objects["pets/a.bin"].read() == b"slow"


# Downloading


def test_an_object_is_served_as_it_was_uploaded(call):
    """Content-Type and Cache-Control come back letter by letter, for pages of any origin."""
    content_type = "audio/mpeg; charset=binary"
    upload(call, content_type=content_type, cache_control="3600")
    response = call("GET", PUBLIC_URL)
    assert response.content == b"bytes"
    assert response.headers["content-type"] == content_type
    assert response.headers["cache-control"] == "3600"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-length"] == "5"
    assert response.headers["access-control-allow-origin"] == "*"
    assert "last-modified" in response.headers


def test_an_object_that_the_client_has_is_not_sent_again(call):
    """Its etag gives a 304."""
    upload(call)
    etag = call("GET", PUBLIC_URL).headers["etag"]
    response = call("GET", PUBLIC_URL, headers={"if-none-match": etag})
    assert (response.status_code, response.content) == (304, b"")


@pytest.mark.parametrize(
    ("header", "start", "content"),
    [
        pytest.param("bytes=0-2", 0, b"012", id="first"),
        pytest.param("bytes=4-5", 4, b"45", id="middle"),
        pytest.param("bytes=7-", 7, b"789", id="open end"),
        pytest.param("bytes=-2", 8, b"89", id="suffix"),
        pytest.param("bytes=8-99", 8, b"89", id="end beyond the size"),
    ],
)
def test_a_range_is_served(call, header, start, content):
    """A 206 with the bytes and their place."""
    upload(call, content=b"0123456789")
    response = call("GET", PUBLIC_URL, headers={"range": header})
    assert (response.status_code, response.content) == (206, content)
    end = start + len(content) - 1
    assert response.headers["content-range"] == f"bytes {start}-{end}/10"


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("bytes=10-", id="start beyond the size"),
        pytest.param("bytes=0-1,3-4", id="several"),
        pytest.param("items=0-1", id="other unit"),
    ],
)
def test_a_range_that_cannot_be_satisfied_is_a_416(call, header):
    """No bytes are sent for it."""
    upload(call, content=b"0123456789")
    assert call("GET", PUBLIC_URL, headers={"range": header}).status_code == 416


def test_head_gives_the_size_without_the_bytes(call):
    """HEAD ignores a range, and for a missing object it has no body with the reason."""
    upload(call, content=b"0123456789")
    found = call("HEAD", PUBLIC_URL, headers={"range": "bytes=0-1"})
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-length"] == "10"
    missing = call("HEAD", "/storage/v1/object/public/pets/none")
    assert (missing.status_code, missing.content) == (400, b"")


def upload_to_both_buckets(call: Call) -> None:
    """Upload an object to the public and to the private bucket."""
    upload(call, "pets/a.bin")
    upload(call, "private/a.bin")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        pytest.param("authenticated/pets/a.bin", STORAGE, id="public object, authenticated route"),
        pytest.param("authenticated/private/a.bin", STORAGE, id="authenticated route"),
        pytest.param("authenticated/private/a.bin", SECRET, id="secret key in both headers"),
        pytest.param("private/a.bin", STORAGE, id="private object with the key"),
        pytest.param("pets/a.bin", {}, id="public object on the other route"),
    ],
)
def test_an_object_can_be_read(call, path, headers):
    """With the key any object, and without one those of a public bucket."""
    upload_to_both_buckets(call)
    response = call("GET", f"/storage/v1/object/{path}", headers=headers)
    assert (response.status_code, response.content) == (200, b"bytes")


@pytest.mark.parametrize(
    ("path", "headers", "error"),
    [
        pytest.param("authenticated/pets/a.bin", {}, NO_KEY, id="authenticated route, no key"),
        pytest.param("authenticated/pets/none", STORAGE, NO_OBJECT, id="missing, with the key"),
        pytest.param("authenticated/private/none", STORAGE, NO_OBJECT, id="missing and private"),
        pytest.param("authenticated/nope/a.bin", STORAGE, NO_BUCKET, id="no bucket, with the key"),
        pytest.param("authenticated/private/a.bin", ANON, NO_OBJECT, id="private, anonymous key"),
        pytest.param("authenticated/private/a.bin", FOREIGN, FOREIGN_KEY, id="foreign key"),
        pytest.param("public/pets/none", {}, NO_OBJECT, id="missing object"),
        pytest.param("public/nope/a.bin", {}, NO_BUCKET, id="missing bucket"),
        pytest.param("public/private/a.bin", STORAGE, NO_BUCKET, id="private, even with a key"),
        pytest.param("private/a.bin", {}, NO_BUCKET, id="private object without a key"),
    ],
)
def test_an_object_cannot_be_read(call, path, headers, error):
    """A private bucket looks as if it did not exist."""
    upload_to_both_buckets(call)
    response = call("GET", f"/storage/v1/object/{path}", headers=headers)
    assert storage_error(response) == error


def test_download_in_the_query_names_the_file(call):
    """`?download=1` names the file 1."""
    upload(call)
    response = call("GET", f"{PUBLIC_URL}?download=1")
    content_disposition = response.headers["content-disposition"]
    assert content_disposition == "attachment; filename=1; filename*=UTF-8''1"


# Other routes


def test_a_buckets_limits_are_for_the_service_key(call):
    """A check of the service's set-up asks for them."""
    bucket = call("GET", MP4_ONLY_URL, headers=STORAGE).json()
    assert bucket["public"] is True
    assert bucket["file_size_limit"] is None
    assert bucket["allowed_mime_types"] == ["video/mp4"]
    anonymous = call("GET", MP4_ONLY_URL, headers={"apikey": supabase.KEYS["anon"]})
    assert storage_error(anonymous) == NO_BUCKET


def test_a_preflight_is_answered(call):
    """The gateway allows a browser the headers it asks for."""
    headers = {
        "origin": "http://a",
        "access-control-request-method": "GET",
        "access-control-request-headers": "range",
    }
    response = call("OPTIONS", PUBLIC_URL, headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-headers"] == "range"


def test_a_large_object_is_kept_in_a_file(sandbox, call):
    """It comes back whole, and the file is deleted when it is replaced, or at a reset."""
    content = os.urandom(3_000_000)
    upload(call, content=content)
    file = sandbox.objects["pets/a.bin"].data
    assert isinstance(file, Path)
    assert call("GET", PUBLIC_URL).content == content

    upload(call, content=content[1:], x_upsert="true")
    assert not file.exists()
    assert call("GET", PUBLIC_URL).content == content[1:]

    sandbox.reset()
    assert list(file.parent.iterdir()) == []


# Moving and listing


def move(call: Call, source: str, destination: str, bucket: str = "pets") -> httpx.Response:
    """Move an object with the service key."""
    body = {"bucketId": bucket, "sourceKey": source, "destinationKey": destination}
    return call("POST", "/storage/v1/object/move", headers=STORAGE, json=body)


def list_names(call: Call, prefix: str, **options: Any) -> list[str]:
    """The names in a folder, as a list shows them."""
    body = {"prefix": prefix, **options}
    response = call("POST", "/storage/v1/object/list/pets", headers=STORAGE, json=body)
    return [item["name"] for item in response.json()]


def test_a_move_onto_one_path_succeeds_once(call):
    """The loser is refused, and its file is still there; so is a move that is repeated."""
    upload(call, "pets/new/1")
    upload(call, "pets/new/2", b"other")
    assert move(call, "new/1", "log/1").json()["message"] == "Successfully moved"
    loser = move(call, "new/2", "log/1")
    assert storage_error(loser) == (400, "409", "The resource already exists")
    assert loser.json()["code"] == "ResourceAlreadyExists"
    repeated = move(call, "new/1", "log/1")
    assert (repeated.status_code, repeated.json()["code"]) == (400, "NoSuchKey")
    assert list_names(call, "new") == ["2"]


def test_a_list_shows_a_folder_by_name(call):
    """With a limit and an offset; a folder that does not exist is empty."""
    for name in ("b", "a", "c"):
        upload(call, f"pets/folder/{name}")
    assert list_names(call, "folder") == ["a", "b", "c"]
    assert list_names(call, "folder", limit=1, offset=1) == ["b"]
    assert list_names(call, "nowhere") == []


def test_an_object_can_vanish_while_it_is_overwritten(sandbox, call):
    """As on a storage without a queue: for a moment it does not exist."""
    sandbox.supabase.vanish_s = 60
    upload(call, "pets/a")
    url = "/storage/v1/object/public/pets/a"
    assert call("GET", url).status_code == 200
    upload(call, "pets/a", b"new", x_upsert="true")
    assert storage_error(call("GET", url)) == (400, "404", "The resource was not found")
