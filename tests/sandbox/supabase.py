"""Supabase Storage behind its gateway, as a stand-in.

Shapes: recorded from supabase/storage 1.70.6 behind the published self-hosted gateway rules (2026-11-22). Nearly every
refusal is an HTTP 400 whose JSON body holds the real status as a string. Our own guess, after the server's source: the
`authenticated` route refuses whoever brings no key, also for a public bucket. Not imitated: multipart uploads, listing,
deleting and signing of objects, `/object/info`, row-level security beyond "the anonymous key may not write", and the
hosted platform's cache, which may serve a replaced object's old bytes on its public URL for a minute.
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
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .wire import Blob, Handler, Refusal, asked_range

GLOBAL_LIMIT_BYTES = 52_428_800
IN_MEMORY_BYTES = 1_000_000  # a bigger object is kept in a file
ALLOWED_KEY = re.compile(r"[A-Za-z0-9_/!.*'() &$@=;:+,?-]+")
CORS = {"access-control-allow-origin": "*"}
NO_BUCKET = ("404", "Bucket not found", "Bucket not found", "NoSuchBucket")
NO_OBJECT = ("404", "not_found", "Object not found", "NoSuchKey")
DUPLICATE = ("409", "Duplicate", "The resource already exists", "KeyAlreadyExists")
TOO_LARGE = ("413", "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge")
BAD_RANGE = ("416", "invalid_range", "invalid range provided", "InvalidRange")
NO_TOKEN = ("400", "Error", "headers must have required property 'authorization'", "InvalidRequest")
INTERNAL = ("500", "Internal", "Internal Server Error", "InternalError")
SLOW_DOWN = ("429", "too_many_connections", "Too many connections issued to the database", "SlowDown")


def access_denied(message: str) -> tuple[str, str, str, str]:
    """The refusal of a token."""
    return "403", "Unauthorized", message, "AccessDenied"


def sign(role: str, secret: bytes = b"sandbox", expires: int = 4_102_444_800) -> str:
    """A key of the older kind: a JSON web token, HS256."""
    parts = ({"alg": "HS256", "typ": "JWT"}, {"iss": "sandbox", "role": role, "iat": 1_700_000_000, "exp": expires})
    head = b".".join(base64url(json.dumps(part).encode()) for part in parts)
    return (head + b"." + base64url(hmac.digest(secret, head, "sha256"))).decode()


def base64url(data: bytes) -> bytes:
    """Base64 as web tokens have it: URL-safe, no padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


KEYS = {
    "service": sign("service_role"),
    "anon": sign("anon"),
    "expired": sign("service_role", expires=1_700_000_001),
    "foreign": sign("service_role", secret=b"another project"),
    "secret": "sb_secret_sandbox0123456789abcdef",
    "publishable": "sb_publishable_sandbox0123456789ab",
}
OPAQUE_KEYS = {KEYS["secret"]: KEYS["service"], KEYS["publishable"]: KEYS["anon"]}


@dataclass
class Bucket:
    """A bucket and its limits."""

    public: bool = True
    file_size_limit: int | None = None
    allowed_mime_types: list[str] | None = None


class StoredObject(NamedTuple):
    """An uploaded object; a big one lies in a file of the sandbox."""

    data: bytes | Path
    content_type: str
    cache_control: str
    id: str
    etag: str
    size: int
    modified: float

    def read(self) -> bytes:
        """All its bytes."""
        return self.data.read_bytes() if isinstance(self.data, Path) else self.data

    def view(self) -> memoryview:
        """Its bytes without loading a file into memory."""
        if isinstance(self.data, bytes):
            return memoryview(self.data)
        with self.data.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Spool:
    """A body on its way in: in memory while it is small, then in a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / uuid.uuid4().hex
        self.small, self.size, self.digest = bytearray(), 0, hashlib.md5(usedforsecurity=False)
        self.file: Any = None

    def write(self, chunk: bytes) -> None:
        """Add a piece."""
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
        """Drop what has come so far."""
        if self.file is not None:
            self.file.close()
            self.path.unlink(missing_ok=True)


class Json(JSONResponse):
    """JSON as this server labels it."""

    media_type = "application/json; charset=utf-8"


class Supabase:
    """The storage: `buckets` may be changed by a test, `objects` holds what was uploaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given: dict[str, StoredObject] = {}
        self.clear()

    def give(self, key: str, data: bytes, content_type: str) -> None:
        """Put an object there that nobody uploaded; it stays through `clear` and does not count among `objects`."""
        spool = Spool(self.folder)
        spool.write(data)
        self.given[key] = stored_object(spool, content_type, "max-age=31536000", None)

    def clear(self) -> None:
        """The four buckets as they are at the start, nothing in them."""
        for stored in getattr(self, "objects", {}).values():
            if isinstance(stored.data, Path):
                stored.data.unlink(missing_ok=True)
        self.objects: dict[str, StoredObject] = {}
        self.buckets = {
            "pets": Bucket(),
            "private": Bucket(public=False),
            "small1mb": Bucket(file_size_limit=1_000_000),
            "mp4only": Bucket(allowed_mime_types=["video/mp4"]),
        }

    def routes(self, on: Callable[[str, Handler], Any]) -> list[Route]:
        """The calls that are imitated; every other path and method gets the server's 404."""
        base = "/storage/v1"
        return [
            Route(base + "/object/public/{bucket}/{path:path}", on("public", self.public), methods=["GET"]),
            Route(base + "/object/authenticated/{bucket}/{path:path}", on("storage", self.keyed), methods=["GET"]),
            Route(base + "/object/info/{path:path}", on("storage", self.info), methods=["GET"]),
            Route(base + "/object/{bucket}/{path:path}", on("upload", self.upload), methods=["POST", "PUT"]),
            Route(base + "/object/{bucket}/{path:path}", on("storage", self.unlabelled), methods=["GET"]),
            Route(base + "/bucket/{bucket}", on("storage", self.bucket), methods=["GET"]),
            Route(base + "/{path:path}", on("storage", self.unknown)),
        ]

    async def upload(self, request: Request) -> Response:
        """`POST /object/{bucket}/{path}`: checks in the real order, all but the size of a chunked body before reading."""
        name, path = request.path_params["bucket"], request.path_params["path"]
        role = role_of(request.headers)
        bucket = self.buckets.get(name)
        check_path(name, path)
        if bucket is None:
            raise refusal(*NO_BUCKET)
        content_type = check_mime(request.headers.get("content-type"), bucket)
        limit = min(bucket.file_size_limit or GLOBAL_LIMIT_BYTES, GLOBAL_LIMIT_BYTES)
        if int(request.headers.get("content-length", "0")) > limit:
            raise refusal(*TOO_LARGE)
        old = self.objects.get(f"{name}/{path}")
        check_permission(role, old, upsert=request.method == "PUT" or request.headers.get("x-upsert") == "true")
        spool = await self.receive(request, limit)
        cache_control = request.headers.get("cache-control", "no-cache")
        stored = self.put(f"{name}/{path}", spool, content_type, cache_control)
        return Json({"Key": f"{name}/{path}", "Id": stored.id}, headers=CORS)

    def put(self, key: str, spool: Spool, content_type: str, cache_control: str) -> StoredObject:
        """Let a body that is in take its place: of several uploads at once to one new path the last to finish wins."""
        old = self.objects.get(key)
        stored = self.objects[key] = stored_object(spool, content_type, cache_control, old)
        if old is not None and isinstance(old.data, Path):
            old.data.unlink(missing_ok=True)  # who is reading it reads on
        return stored

    async def receive(self, request: Request, limit: int) -> Spool:
        """The body; one that is cut off, or over the limit, leaves nothing behind."""
        spool = Spool(self.folder)
        try:
            async for chunk in request.stream():
                spool.write(chunk)
                if spool.size > limit:
                    raise refusal(*TOO_LARGE)
        except (ClientDisconnect, Refusal):
            spool.discard()
            raise
        return spool

    async def public(self, request: Request) -> Response:
        """`GET` and `HEAD /object/public/{bucket}/{path}`: no key needed."""
        name, path = request.path_params["bucket"], request.path_params["path"]
        bucket = self.buckets.get(name)
        if bucket is None or not bucket.public:
            raise refusal(*NO_BUCKET)
        return self.serve(request, f"{name}/{path}")

    async def keyed(self, request: Request) -> Response:
        """`GET` and `HEAD /object/authenticated/{bucket}/{path}`: with a key only."""
        return self.serve_to(role_of(request.headers), request)

    async def unlabelled(self, request: Request) -> Response:
        """`GET` and `HEAD /object/{bucket}/{path}`: a public bucket needs no key."""
        known = "authorization" in request.headers or "apikey" in request.headers
        return self.serve_to(role_of(request.headers) if known else None, request)

    async def info(self, request: Request) -> Response:
        """`GET /object/info/...`."""
        raise refusal("400", "Sandbox", "the sandbox does not imitate object info", "InvalidRequest")

    def serve_to(self, role: str | None, request: Request) -> Response:
        """The object as far as this role may read it; a private bucket looks like one that does not exist."""
        name, path = request.path_params["bucket"], request.path_params["path"]
        bucket = self.buckets.get(name)
        if bucket is None or (role is None and not bucket.public):
            raise refusal(*NO_BUCKET)
        if role != "service_role" and not bucket.public:
            raise refusal(*NO_OBJECT)
        return self.serve(request, f"{name}/{path}")

    def serve(self, request: Request, key: str) -> Response:
        """The object, or the part of it that was asked for."""
        stored = self.objects.get(key) or self.given.get(key)
        if stored is None:
            raise refusal(*NO_OBJECT)
        headers = object_headers(stored, request)
        if not_modified(stored, request):
            return Response(None, 304, headers)
        asked = asked_range(request.headers.get("range") if request.method == "GET" else None, stored.size)
        if asked is None:
            raise refusal(*BAD_RANGE, http_status=416)
        start, end = asked
        data = stored.view()
        if end - start == stored.size:
            return Blob(data, 200, headers)
        return Blob(data[start:end], 206, headers | {"content-range": f"bytes {start}-{end - 1}/{stored.size}"})

    async def bucket(self, request: Request) -> Response:
        """`GET /bucket/{id}`: the bucket and its limits, for the service key only."""
        name = request.path_params["bucket"]
        role = role_of(request.headers)
        if name not in self.buckets or role != "service_role":
            raise refusal(*NO_BUCKET)
        bucket, created = self.buckets[name], "2026-11-22T13:29:15.964Z"
        limits = {"file_size_limit": bucket.file_size_limit, "allowed_mime_types": bucket.allowed_mime_types}
        about = {"id": name, "name": name, "owner": "", "public": bucket.public, **limits}
        return Json({**about, "created_at": created, "updated_at": created}, headers=CORS)

    async def unknown(self, request: Request) -> Response:
        """The gateway's answer to a preflight, the server's to any other route."""
        if request.method == "OPTIONS":
            return Response(b"", headers=CORS | preflight_headers(request))
        path = request.url.path.removeprefix("/storage/v1")
        message = f"Route {request.method}:{path} not found"
        if path.startswith(("/object", "/bucket")):
            body = {"statusCode": "404", "error": "Not Found", "message": message, "code": "InvalidRequest"}
            return JSONResponse(body, 404, CORS)  # this one without a charset
        return Json({"message": message, "error": "Not Found", "statusCode": 404}, 404, CORS)


# Checks


def role_of(headers: Any) -> str:
    """The role that gateway and server make of `Authorization` and `apikey`, or a refusal."""
    apikey, authorization = headers.get("apikey"), headers.get("authorization")
    if authorization is None or authorization.startswith("Bearer sb_"):
        authorization = OPAQUE_KEYS.get(apikey, apikey)
    if authorization is None:
        raise refusal(*NO_TOKEN)
    return role_in_token(re.sub(r"^bearer( |$)", "", authorization, flags=re.IGNORECASE))


def role_in_token(token: str) -> str:
    """The role in a web token of this project, or a refusal."""
    head, _, signature = token.rpartition(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(head.split(".")[1] + "=="))
        role, expires = str(claims["role"]), claims["exp"]
    except (IndexError, KeyError, TypeError, ValueError):
        raise refusal(*access_denied("Invalid Compact JWS")) from None
    if not hmac.compare_digest(signature.encode(), base64url(hmac.digest(b"sandbox", head.encode(), "sha256"))):
        raise refusal(*access_denied("signature verification failed"))
    if expires < time.time():
        raise refusal(*access_denied('"exp" claim timestamp check failed'))
    return role


def check_path(bucket: str, path: str) -> None:
    """Refuse a name that the storage cannot hold; of a dot it tells with the object's inner key."""
    if ".." in path.split("/") or "." in path.split("/"):
        inner = f"stub/stub/{bucket}/{path}/{uuid.uuid4()}"
        raise refusal("400", "InvalidKey", f"Invalid key: {inner} contains dot path segment", "InvalidKey")
    if not ALLOWED_KEY.fullmatch(path):
        raise refusal("400", "InvalidKey", f"Invalid key: {path}", "InvalidKey")
    if any(len(part.encode()) > 255 for part in path.split("/")):
        raise refusal(*INTERNAL, http_status=500)


def check_mime(content_type: str | None, bucket: Bucket) -> str:
    """The Content-Type verbatim; a bucket's list is compared letter by letter, parameters included."""
    content_type = content_type or "application/octet-stream"
    if content_type.startswith("multipart/"):
        raise refusal("400", "Sandbox", "the sandbox does not imitate multipart uploads", "InvalidRequest")
    if "/" not in content_type:
        raise refusal("415", "invalid_mime_type", "Invalid Content-Type header", "InvalidMimeType")
    if bucket.allowed_mime_types is not None and content_type not in bucket.allowed_mime_types:
        raise refusal("415", "invalid_mime_type", f"mime type {content_type} is not supported", "InvalidMimeType")
    return content_type


def check_permission(role: str, old: StoredObject | None, upsert: bool) -> None:
    """Refuse the anonymous key, and an object that exists unless it may be replaced."""
    if role != "service_role":
        raise refusal(*access_denied("new row violates row-level security policy"))
    if old is not None and not upsert:
        raise refusal(*DUPLICATE)


def refusal(status: str, error: str, message: str, code: str, http_status: int = 400) -> Refusal:
    """The server's error envelope: the truth is in the body."""
    body = {"statusCode": status, "error": error, "message": message, "code": code}
    return Refusal(Json(body, http_status, CORS))


# Objects


def stored_object(spool: Spool, content_type: str, cache_control: str, old: StoredObject | None) -> StoredObject:
    """The object made of a body that is in; an overwritten one keeps its id."""
    identity = old.id if old is not None else str(uuid.uuid4())
    etag = f'"{spool.digest.hexdigest()}"'
    return StoredObject(spool.finish(), content_type, cache_control, identity, etag, spool.size, time.time())


def object_headers(stored: StoredObject, request: Request) -> dict[str, str]:
    """The headers an object is served with."""
    cache_control = stored.cache_control
    if_none_match = request.headers.get("if-none-match")
    if if_none_match is not None and if_none_match != stored.etag:
        cache_control += ", stale-while-revalidate=30"
    headers = {
        **CORS,
        "content-type": "text/plain" if stored.content_type == "text/html" else stored.content_type,
        "cache-control": cache_control,
        "etag": stored.etag,
        "last-modified": formatdate(stored.modified, usegmt=True),
        "accept-ranges": "bytes",
        "x-robots-tag": "none",
    }
    name = request.query_params.get("download")
    if name is not None and request.method == "GET":
        safe = quote(name)
        headers["content-disposition"] = (
            f"attachment; filename={safe}; filename*=UTF-8''{safe}" if name else "attachment;"
        )
    return headers


def not_modified(stored: StoredObject, request: Request) -> bool:
    """Whether the client's copy is still good."""
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
    asked = request.headers.get("access-control-request-headers")
    return headers | ({"access-control-allow-headers": asked} if asked else {})


def default_body(status: int) -> Any:
    """The body of a fault with this status, in the storage's own shape."""
    body = {429: SLOW_DOWN, 404: NO_OBJECT, 409: DUPLICATE, 413: TOO_LARGE}.get(status, INTERNAL)
    return dict(zip(("statusCode", "error", "message", "code"), (str(status), *body[1:]), strict=True))
