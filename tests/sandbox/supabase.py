"""A stand-in for Supabase Storage behind its gateway.

The shapes were recorded from supabase/storage 1.70.6 behind the published self-hosted gateway rules
(2026-11-22). Nearly every refusal is an HTTP 400 whose JSON body holds the real status as a string.
A move onto a path succeeds for exactly one caller, as measured there. Guessed from the server's source:
the `authenticated` route refuses requests without a key, even for a public bucket; what a list or move
without its fields is answered. Not imitated: multipart uploads, deleting and signing of objects, folders
and options of a list but `prefix`, `limit` and `offset`, `/object/info`, row-level security beyond "the anonymous key may not write", and the hosted
platform's cache, which may serve a replaced object's old bytes on its public URL for a minute.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import mmap
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .wire import Handler, Refusal, parse_range, range_response

GLOBAL_LIMIT_BYTES = 52_428_800
IN_MEMORY_BYTES = 1_000_000  # a larger object is kept in a file
MAX_NAME_BYTES = 255  # of one part of a path
ALLOWED_KEY = re.compile(r"[A-Za-z0-9_/!.*'() &$@=;:+,?-]+")
CORS = {"access-control-allow-origin": "*"}
BUCKET_CREATED_AT = "2026-11-22T13:29:15.964Z"


class Error(NamedTuple):
    """The server's error envelope: the real status is in the body."""

    status: str
    error: str
    message: str
    code: str

    def body(self) -> dict[str, str]:
        """The JSON body."""
        return {
            "statusCode": self.status,
            "error": self.error,
            "message": self.message,
            "code": self.code,
        }


NO_BUCKET = Error("404", "Bucket not found", "Bucket not found", "NoSuchBucket")
NO_OBJECT = Error("404", "not_found", "Object not found", "NoSuchKey")
DUPLICATE = Error("409", "Duplicate", "The resource already exists", "KeyAlreadyExists")
ALREADY_THERE = Error("409", "Duplicate", "The resource already exists", "ResourceAlreadyExists")
VANISHED = Error("404", "not_found", "The resource was not found", "NoSuchKey")
TOO_LARGE = Error(
    "413", "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge"
)
BAD_RANGE = Error("416", "invalid_range", "invalid range provided", "InvalidRange")
NO_TOKEN = Error(
    "400", "Error", "headers must have required property 'authorization'", "InvalidRequest"
)
INTERNAL = Error("500", "Internal", "Internal Server Error", "InternalError")
SLOW_DOWN = Error(
    "429",
    "too_many_connections",
    "Too many connections issued to the database",
    "SlowDown",
)


def access_denied(message: str) -> Error:
    """The error for a token."""
    return Error("403", "Unauthorized", message, "AccessDenied")


def invalid_key(message: str) -> Error:
    """The error for an object's name."""
    return Error("400", "InvalidKey", message, "InvalidKey")


def invalid_request(message: str) -> Error:
    """The error for a JSON body."""
    return Error("400", "Error", message, "InvalidRequest")


def invalid_mime_type(message: str) -> Error:
    """The error for a content type."""
    return Error("415", "invalid_mime_type", message, "InvalidMimeType")


def not_imitated(what: str) -> Error:
    """The error for what the server can do and the sandbox cannot."""
    return Error("400", "Sandbox", f"the sandbox does not imitate {what}", "InvalidRequest")


# Keys


def make_key(role: str, secret: bytes = b"sandbox", expires: int = 4_102_444_800) -> str:
    """A key of the older kind: a JSON web token, HS256."""
    header = {"alg": "HS256", "typ": "JWT"}
    claims = {"iss": "sandbox", "role": role, "iat": 1_700_000_000, "exp": expires}
    parts = [base64url(json.dumps(part).encode()) for part in (header, claims)]
    signed = b".".join(parts)
    return (signed + b"." + signature_of(signed, secret)).decode()


def signature_of(signed: bytes, secret: bytes = b"sandbox") -> bytes:
    """The signature of a web token's first two parts."""
    return base64url(hmac.digest(secret, signed, "sha256"))


def base64url(data: bytes) -> bytes:
    """Base64 as in web tokens: URL-safe, without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


KEYS = {
    "service": make_key("service_role"),
    "anon": make_key("anon"),
    "expired": make_key("service_role", expires=1_700_000_001),
    "foreign": make_key("service_role", secret=b"another project"),
    "secret": "sb_secret_sandbox0123456789abcdef",
    "publishable": "sb_publishable_sandbox0123456789ab",
}
OPAQUE_KEYS = {  # keys of the newer kind -> the tokens that the gateway puts in their place
    KEYS["secret"]: KEYS["service"],
    KEYS["publishable"]: KEYS["anon"],
}


# Buckets and objects


@dataclass
class Bucket:
    """A bucket and its limits."""

    public: bool = True
    file_size_limit: int | None = None
    allowed_mime_types: list[str] | None = None


class StoredObject(NamedTuple):
    """An uploaded object; a large one is kept in a file in the sandbox's folder."""

    data: bytes | Path
    content_type: str
    cache_control: str
    id: str
    etag: str
    size: int
    modified: float

    def read(self) -> bytes:
        """All its bytes."""
        if isinstance(self.data, Path):
            return self.data.read_bytes()
        return self.data

    def view(self) -> memoryview:
        """Its bytes, without loading a file into memory."""
        if isinstance(self.data, bytes):
            return memoryview(self.data)
        with self.data.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def delete_file(self) -> None:
        """Delete its file, if it has one; open views of it stay readable."""
        if isinstance(self.data, Path):
            self.data.unlink(missing_ok=True)


class Spool:
    """A body while it arrives: in memory as long as it is small, then in a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / uuid.uuid4().hex
        self.file: Any = None
        self.small = bytearray()
        self.size = 0
        self.digest = hashlib.md5(usedforsecurity=False)

    def write(self, chunk: bytes) -> None:
        """Add a chunk."""
        self.size += len(chunk)
        self.digest.update(chunk)
        if self.file is None and self.size > IN_MEMORY_BYTES:
            self.file = self.path.open("wb")
            self.file.write(self.small)

        if self.file is None:
            self.small += chunk
        else:
            self.file.write(chunk)

    def finish(self) -> bytes | Path:
        """The whole body."""
        if self.file is None:
            return bytes(self.small)
        self.file.close()
        return self.path

    def discard(self) -> None:
        """Delete what has arrived so far."""
        if self.file is not None:
            self.file.close()
            self.path.unlink(missing_ok=True)


# The storage


class Json(JSONResponse):
    """JSON with the media type that this server gives it."""

    media_type = "application/json; charset=utf-8"


class Supabase:
    """The storage: a test may change `buckets`; `objects` holds the uploads by `bucket/path`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[str, StoredObject] = {}
        self.given: dict[str, StoredObject] = {}
        self.vanish_s = 0.0  # how long an object is missing while it is overwritten
        self.clear()

    def give(self, key: str, data: bytes, content_type: str) -> None:
        """Add an object that was never uploaded; it survives `clear` and is not in `objects`."""
        spool = Spool(self.folder)
        spool.write(data)
        self.given[key] = stored_object(spool, content_type, "max-age=31536000", None)

    def clear(self) -> None:
        """Delete all uploads, and set up the four buckets."""
        for stored in list(self.objects.values()):
            stored.delete_file()
        self.objects = {}
        self.overwritten_at: dict[str, float] = {}
        self.vanish_s = 0.0
        self.buckets = {
            "pets": Bucket(),
            "private": Bucket(public=False),
            "small1mb": Bucket(file_size_limit=1_000_000),
            "mp4only": Bucket(allowed_mime_types=["video/mp4"]),
        }

    def routes(self, on: Callable[[str, Handler], Any]) -> list[Route]:
        """The calls that are imitated; any other path or method gets the server's 404."""
        storage = "/storage/v1"
        public = storage + "/object/public/{bucket}/{path:path}"
        authenticated = storage + "/object/authenticated/{bucket}/{path:path}"
        info = storage + "/object/info/{path:path}"
        plain = storage + "/object/{bucket}/{path:path}"
        objects = storage + "/object/list/{bucket}"
        move = storage + "/object/move"
        bucket = storage + "/bucket/{bucket}"
        return [
            Route(public, on("public", self.public), methods=["GET"]),
            Route(authenticated, on("storage", self.authenticated), methods=["GET"]),
            Route(info, on("storage", self.info), methods=["GET"]),
            Route(objects, on("objects", self.list_objects), methods=["POST"]),
            Route(move, on("move", self.move), methods=["POST"]),
            Route(plain, on("upload", self.upload), methods=["POST", "PUT"]),
            Route(plain, on("storage", self.plain), methods=["GET"]),
            Route(bucket, on("storage", self.bucket), methods=["GET"]),
            Route(storage + "/{path:path}", on("storage", self.unknown)),
        ]

    # Uploading

    async def upload(self, request: Request) -> Response:
        """`POST /object/{bucket}/{path}`: check in the server's order, then receive the body.

        Only the size of a chunked body is checked while it is read.
        """
        name = request.path_params["bucket"]
        path = request.path_params["path"]
        key = f"{name}/{path}"
        role = role_of(request.headers)
        bucket = self.buckets.get(name)
        check_path(name, path)
        if bucket is None:
            raise refusal(NO_BUCKET)

        content_type = check_mime(request.headers.get("content-type"), bucket)
        limit = min(bucket.file_size_limit or GLOBAL_LIMIT_BYTES, GLOBAL_LIMIT_BYTES)
        if int(request.headers.get("content-length", "0")) > limit:
            raise refusal(TOO_LARGE)
        upsert = request.method == "PUT" or request.headers.get("x-upsert") == "true"
        check_permission(role, self.objects.get(key), upsert)

        spool = await self.receive(request, limit)
        cache_control = request.headers.get("cache-control", "no-cache")
        stored = self.put(key, spool, content_type, cache_control)
        return Json({"Key": key, "Id": stored.id}, headers=CORS)

    async def receive(self, request: Request, limit: int) -> Spool:
        """Read the body; if it is cut off or over the limit, nothing of it is kept."""
        spool = Spool(self.folder)
        try:
            async for chunk in request.stream():
                spool.write(chunk)
                if spool.size > limit:
                    raise refusal(TOO_LARGE)
        except (ClientDisconnect, Refusal):
            spool.discard()
            raise
        return spool

    def put(self, key: str, spool: Spool, content_type: str, cache_control: str) -> StoredObject:
        """Store a received body; of simultaneous uploads to one new path, the last one wins."""
        old = self.objects.get(key)
        stored = stored_object(spool, content_type, cache_control, old)
        self.objects[key] = stored
        if old is not None:
            old.delete_file()
            self.overwritten_at[key] = time.monotonic()
        return stored

    # Moving and listing

    async def move(self, request: Request) -> Response:
        """`POST /object/move`: give an object another path, unless something is there."""
        body = await json_body(request, "bucketId", "sourceKey", "destinationKey")
        source = f"{body['bucketId']}/{body['sourceKey']}"
        destination = f"{body['bucketId']}/{body['destinationKey']}"
        if role_of(request.headers) != "service_role":
            raise refusal(access_denied("new row violates row-level security policy"))
        if body["bucketId"] not in self.buckets:
            raise refusal(NO_BUCKET)
        check_path(body["bucketId"], body["destinationKey"])
        if source not in self.objects:
            raise refusal(NO_OBJECT)
        if destination in self.objects:
            raise refusal(ALREADY_THERE)

        stored = self.objects.pop(source)
        self.objects[destination] = stored
        moved = {"message": "Successfully moved", "Id": stored.id, "Key": destination}
        return Json(moved, headers=CORS)

    async def list_objects(self, request: Request) -> Response:
        """`POST /object/list/{bucket}`: what lies in the folder `prefix`, by name; a missing bucket is empty."""
        body = await json_body(request, "prefix")
        if role_of(request.headers) != "service_role":
            return Json([], headers=CORS)
        folder = f"{request.path_params['bucket']}/{body['prefix']}".rstrip("/") + "/"
        names = {key.removeprefix(folder) for key in self.objects if key.startswith(folder)}
        start = body.get("offset", 0)
        page = sorted(names)[start : start + body.get("limit", 100)]
        listed = [list_entry(name, self.objects[folder + name]) for name in page]
        return Json(listed, headers=CORS)

    # Downloading

    async def public(self, request: Request) -> Response:
        """`GET` and `HEAD /object/public/{bucket}/{path}`: no key needed."""
        name = request.path_params["bucket"]
        bucket = self.buckets.get(name)
        if bucket is None or not bucket.public:
            raise refusal(NO_BUCKET)
        return self.serve(request, f"{name}/{request.path_params['path']}")

    async def authenticated(self, request: Request) -> Response:
        """`GET` and `HEAD /object/authenticated/{bucket}/{path}`: a key is required."""
        return self.serve_to(role_of(request.headers), request)

    async def plain(self, request: Request) -> Response:
        """`GET` and `HEAD /object/{bucket}/{path}`: a public bucket needs no key."""
        role = None
        if "authorization" in request.headers or "apikey" in request.headers:
            role = role_of(request.headers)
        return self.serve_to(role, request)

    def serve_to(self, role: str | None, request: Request) -> Response:
        """Serve an object if this role may read it; if not, it looks as if it did not exist."""
        name = request.path_params["bucket"]
        bucket = self.buckets.get(name)
        if bucket is None or (role is None and not bucket.public):
            raise refusal(NO_BUCKET)
        if role != "service_role" and not bucket.public:
            raise refusal(NO_OBJECT)
        return self.serve(request, f"{name}/{request.path_params['path']}")

    def serve(self, request: Request, key: str) -> Response:
        """Serve an object, or the range of it that was asked for."""
        stored = self.objects.get(key) or self.given.get(key)
        overwritten_at = self.overwritten_at.get(key)
        if overwritten_at and time.monotonic() < overwritten_at + self.vanish_s:
            raise refusal(VANISHED)
        if stored is None:
            raise refusal(NO_OBJECT)
        headers = object_headers(stored, request)
        if is_not_modified(stored, request):
            return Response(None, 304, headers)

        range_header = request.headers.get("range") if request.method == "GET" else None
        byte_range = parse_range(range_header, stored.size)
        if byte_range is None:
            raise refusal(BAD_RANGE, http_status=416)
        return range_response(stored.view(), byte_range, headers)

    # Other routes

    async def info(self, request: Request) -> Response:
        """`GET /object/info/...`."""
        raise refusal(not_imitated("object info"))

    async def bucket(self, request: Request) -> Response:
        """`GET /bucket/{id}`: a bucket and its limits, for the service key only."""
        name = request.path_params["bucket"]
        role = role_of(request.headers)
        if name not in self.buckets or role != "service_role":
            raise refusal(NO_BUCKET)
        bucket = self.buckets[name]
        body = {
            "id": name,
            "name": name,
            "owner": "",
            "public": bucket.public,
            "file_size_limit": bucket.file_size_limit,
            "allowed_mime_types": bucket.allowed_mime_types,
            "created_at": BUCKET_CREATED_AT,
            "updated_at": BUCKET_CREATED_AT,
        }
        return Json(body, headers=CORS)

    async def unknown(self, request: Request) -> Response:
        """The gateway's response to a preflight, and the server's to any other route."""
        if request.method == "OPTIONS":
            return Response(b"", headers={**CORS, **preflight_headers(request)})

        path = request.url.path.removeprefix("/storage/v1")
        message = f"Route {request.method}:{path} not found"
        if path.startswith(("/object", "/bucket")):
            error = Error("404", "Not Found", message, "InvalidRequest")
            return JSONResponse(error.body(), 404, CORS)  # this one without a charset
        return Json({"message": message, "error": "Not Found", "statusCode": 404}, 404, CORS)


# Checks


async def json_body(request: Request, *required: str) -> dict[str, Any]:
    """A JSON body with these fields, or a refusal."""
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise refusal(invalid_request("Body is not valid JSON")) from None
    for name in required:
        if not isinstance(body, dict) or not isinstance(body.get(name), str):
            raise refusal(invalid_request(f"body must have required property '{name}'"))
    return dict(body)


def role_of(headers: Any) -> str:
    """The role that a request's key gives it, or a refusal.

    `Authorization` counts if it holds a web token, or else `apikey`; the gateway replaces an opaque
    key with its web token.
    """
    apikey = headers.get("apikey")
    authorization = headers.get("authorization")
    if authorization is None or authorization.startswith("Bearer sb_"):
        authorization = OPAQUE_KEYS.get(apikey, apikey)
    if authorization is None:
        raise refusal(NO_TOKEN)
    token = re.sub(r"^bearer( |$)", "", authorization, flags=re.IGNORECASE)
    return role_in_token(token)


def role_in_token(token: str) -> str:
    """The role in a web token of this project, or a refusal."""
    signed, _, signature = token.rpartition(".")
    try:
        encoded_claims = signed.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(encoded_claims + "=="))
        role = str(claims["role"])
        expires = claims["exp"]
    except (IndexError, KeyError, TypeError, ValueError):
        raise refusal(access_denied("Invalid Compact JWS")) from None

    if not hmac.compare_digest(signature.encode(), signature_of(signed.encode())):
        raise refusal(access_denied("signature verification failed"))
    if expires < time.time():
        raise refusal(access_denied('"exp" claim timestamp check failed'))
    return role


def check_path(bucket: str, path: str) -> None:
    """Refuse a name that the storage cannot hold."""
    parts = path.split("/")
    if "." in parts or ".." in parts:
        inner_key = f"stub/stub/{bucket}/{path}/{uuid.uuid4()}"  # the server's, which it shows
        raise refusal(invalid_key(f"Invalid key: {inner_key} contains dot path segment"))
    if not ALLOWED_KEY.fullmatch(path):
        raise refusal(invalid_key(f"Invalid key: {path}"))
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise refusal(INTERNAL, http_status=500)


def check_mime(content_type: str | None, bucket: Bucket) -> str:
    """Return the Content-Type as sent, or refuse it.

    It is compared with the bucket's list letter by letter, parameters included.
    """
    content_type = content_type or "application/octet-stream"
    if content_type.startswith("multipart/"):
        raise refusal(not_imitated("multipart uploads"))
    if "/" not in content_type:
        raise refusal(invalid_mime_type("Invalid Content-Type header"))
    allowed = bucket.allowed_mime_types
    if allowed is not None and content_type not in allowed:
        raise refusal(invalid_mime_type(f"mime type {content_type} is not supported"))
    return content_type


def check_permission(role: str, old: StoredObject | None, upsert: bool) -> None:
    """Refuse the anonymous key, and an object that exists unless it may be replaced."""
    if role != "service_role":
        raise refusal(access_denied("new row violates row-level security policy"))
    if old is not None and not upsert:
        raise refusal(DUPLICATE)


def refusal(error: Error, http_status: int = 400) -> Refusal:
    """An error as a response; nearly always an HTTP 400."""
    return Refusal(Json(error.body(), http_status, CORS))


def default_body(status: int) -> Any:
    """The body of a fault with this status, in the storage's own shape."""
    errors = {429: SLOW_DOWN, 404: NO_OBJECT, 409: DUPLICATE, 413: TOO_LARGE}
    error = errors.get(status, INTERNAL)
    return error._replace(status=str(status)).body()


# Serving objects


def stored_object(
    spool: Spool, content_type: str, cache_control: str, old: StoredObject | None
) -> StoredObject:
    """The object for a received body; it keeps the id of the one that it replaces."""
    return StoredObject(
        data=spool.finish(),
        content_type=content_type,
        cache_control=cache_control,
        id=str(uuid.uuid4()) if old is None else old.id,
        etag=f'"{spool.digest.hexdigest()}"',
        size=spool.size,
        modified=time.time(),
    )


def list_entry(name: str, stored: StoredObject) -> dict[str, Any]:
    """How a list shows an object."""
    moment = datetime.fromtimestamp(stored.modified, timezone.utc)
    written = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        "name": name,
        "id": stored.id,
        "updated_at": written,
        "created_at": written,
        "last_accessed_at": written,
        "metadata": {
            "eTag": stored.etag,
            "size": stored.size,
            "mimetype": stored.content_type,
            "cacheControl": stored.cache_control,
            "lastModified": written,
            "contentLength": stored.size,
            "httpStatusCode": 200,
        },
    }


def object_headers(stored: StoredObject, request: Request) -> dict[str, str]:
    """The headers with which an object is served."""
    cache_control = stored.cache_control
    if_none_match = request.headers.get("if-none-match")
    if if_none_match is not None and if_none_match != stored.etag:
        cache_control += ", stale-while-revalidate=30"

    content_type = stored.content_type
    if content_type == "text/html":
        content_type = "text/plain"

    headers = {
        **CORS,
        "content-type": content_type,
        "cache-control": cache_control,
        "etag": stored.etag,
        "last-modified": formatdate(stored.modified, usegmt=True),
        "accept-ranges": "bytes",
        "x-robots-tag": "none",
    }
    name = request.query_params.get("download")
    if name is not None and request.method == "GET":
        headers["content-disposition"] = content_disposition(name)
    return headers


def content_disposition(name: str) -> str:
    """The Content-Disposition for `?download=name`."""
    if not name:
        return "attachment;"
    quoted = quote(name)
    return f"attachment; filename={quoted}; filename*=UTF-8''{quoted}"


def is_not_modified(stored: StoredObject, request: Request) -> bool:
    """Whether the client's copy is still valid."""
    if "if-none-match" in request.headers:
        return request.headers["if-none-match"] == stored.etag
    try:
        since = parsedate_to_datetime(request.headers.get("if-modified-since", ""))
    except (TypeError, ValueError):
        return False
    return since.timestamp() >= stored.modified


def preflight_headers(request: Request) -> dict[str, str]:
    """What the gateway allows a browser."""
    headers = {
        "content-type": "text/plain",
        "access-control-allow-methods": "GET,HEAD,PUT,PATCH,POST,DELETE,OPTIONS,TRACE,CONNECT",
    }
    requested = request.headers.get("access-control-request-headers")
    if requested:
        headers["access-control-allow-headers"] = requested
    return headers
