"""What lies between a socket and a stand-in: the record of requests, faults on demand, files in pieces.

Every route of the sandbox is an `Endpoint`. It writes the request down, lets a fault spoil it if one is due, and else
sends what the provider's own code answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

CALLS = (
    "speech",
    "model",
    "create",
    "read",
    "list",
    "cancel",
    "upload",
    "public",
    "output",
    "picture",
    "page",
    "storage",
    "other",
)
RECORDED_BODY_BYTES = 65_536
CHUNK_BYTES = 262_144
HTML_PAGE = (
    "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body><center><h1>502 Bad Gateway</h1></center>"
    "<hr><center>cloudflare</center></body></html>"
)

Handler = Callable[[Request], Awaitable[Response]]


class Refusal(Exception):
    """A provider says no: carries the answer to send."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


@dataclass
class Recorded:
    """One request as it came in; `body` holds its first 64 KiB, `length` counts all its bytes."""

    call: str
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    at: float = field(default_factory=time.monotonic)
    body: bytes = b""
    length: int = 0

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass
class Fault:
    """What is to go wrong with the next `times` requests of a call (None: with all of them)."""

    kind: str
    times: int | None
    details: dict[str, Any]


class Wire:
    """The record and the faults of one sandbox; `record=False` counts requests only."""

    def __init__(self, record: bool, default_body: Callable[[str, int], Any]) -> None:
        self.record = record
        self.default_body = default_body
        self.clear()

    def clear(self) -> None:
        """Forget requests and faults."""
        self.requests: list[Recorded] = []
        self.counts: Counter[str] = Counter()
        self.faults: dict[str, deque[Fault]] = {call: deque() for call in CALLS}

    def add_fault(self, call: str, kind: str, times: int | None, details: dict[str, Any]) -> None:
        """Queue a fault behind those already due for this call."""
        if call not in CALLS or kind not in FAULTS:
            raise ValueError(f"no such fault: {call} {kind}; calls: {', '.join(CALLS)}; kinds: {', '.join(FAULTS)}")
        self.faults[call].append(Fault(kind, times, details))

    def due_fault(self, call: str) -> Fault | None:
        """The fault for a request that has just come in, if any."""
        queue = self.faults[call]
        if not queue:
            return None
        fault = queue[0]
        if fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                queue.popleft()
        return fault


class Endpoint:
    """One route as an ASGI application: record, spoil or answer."""

    def __init__(self, wire: Wire, call: str, handler: Handler) -> None:
        self.wire, self.call, self.handler = wire, call, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        self.wire.counts[self.call] += 1
        exchange = Exchange(self, scope, receive, send)
        fault = self.wire.due_fault(self.call)
        if fault is None:
            await exchange.answer(send)
        else:
            await FAULTS[fault.kind](exchange, fault.details)


class Exchange:
    """One request and the connection it came over."""

    def __init__(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        self.call, self.handler, self.wire = endpoint.call, endpoint.handler, endpoint.wire
        self.scope, self.send = scope, send
        self.connection: Any = getattr(receive, "__self__", None)  # uvicorn's RequestResponseCycle
        self.raw_receive = receive
        self.body_read = False
        self.recorded = self.record() if self.wire.record else None

    def record(self) -> Recorded:
        """Write the request down; its body follows while it is being read."""
        request = Request(self.scope)
        path, query = self.scope["path"], dict(request.query_params)
        recorded = Recorded(self.call, request.method, path, query, dict(request.headers.items()))
        self.wire.requests.append(recorded)
        return recorded

    async def receive(self) -> Message:
        """The next message of the request, noted."""
        message = await self.raw_receive()
        self.body_read = not message.get("more_body", False)
        if self.recorded is not None:
            body: bytes = message.get("body", b"")
            self.recorded.body += body[: RECORDED_BODY_BYTES - len(self.recorded.body)]
            self.recorded.length += len(body)
        return message

    async def answer(self, send: Send) -> None:
        """Send what the provider says; a refusal waits until the request's body is in, so that it is always delivered."""
        request = Request(self.scope, self.receive)
        try:
            response = await self.handler(request)
        except Refusal as refusal:
            await self.drain()
            response = refusal.response
        except ClientDisconnect:
            return
        await response(self.scope, self.receive, send)

    async def respond(self, response: Response) -> None:
        """Send this instead of what the provider would say; the request's body is read first."""
        await self.drain()
        await response(self.scope, self.receive, self.send)

    async def drain(self) -> None:
        """Read what is left of the request's body."""
        while not self.body_read:
            await self.receive()

    async def read_half_of_body(self) -> None:
        """Read about half of the request's body."""
        half, seen = int(Request(self.scope).headers.get("content-length", "0")) / 2, 0
        while seen < half:
            message = await self.receive()
            seen += len(message.get("body", b""))
            if self.body_read:
                return

    async def cut(self) -> None:
        """Close the connection under the server, after what was already sent, and wait until that has happened."""
        self.connection.transport.close()
        while (await self.raw_receive())["type"] != "http.disconnect":
            pass

    @property
    def is_open(self) -> bool:
        """Whether the client is still there."""
        return not self.connection.disconnected


# Faults, by kind


async def spoil_with_status(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """A status, with headers and body as given or the provider's own body for it."""
    status = details["status"]
    body = details.get("body", exchange.wire.default_body(exchange.call, status))
    await exchange.respond(response_of(body, status, details.get("headers")))


async def spoil_with_html(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The HTML page of something that stands in front of the provider."""
    page = details.get("body", HTML_PAGE)
    await exchange.respond(Response(page, details.get("status", 502), details.get("headers"), media_type="text/html"))


async def spoil_with_nonsense(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """Success with a body that nobody can use: JSON of another shape, or noise where media belong."""
    media_type = good_media_type(exchange.call)
    noise: Any = ["unexpected"] if media_type == "application/json" else b"\x00noise\xff" * 100
    response = response_of(details.get("body", noise), good_status(exchange.call), None)
    response.headers["content-type"] = media_type
    await exchange.respond(response)


async def spoil_with_emptiness(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """Success without a body."""
    await exchange.respond(Response(b"", good_status(exchange.call), media_type=good_media_type(exchange.call)))


async def spoil_by_cutting(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The connection closes before anything is done or answered."""
    await exchange.cut()


async def spoil_by_losing(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The call is carried out, but its answer never arrives."""

    async def send(message: Message) -> None:
        return None

    await exchange.answer(send)
    await exchange.cut()


async def spoil_from_behind(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The call is carried out, but what stands in front of the provider answers: an HTML 502 unless told otherwise."""

    async def send(message: Message) -> None:
        return None

    await exchange.answer(send)
    spoil = spoil_with_status if "body" in details else spoil_with_html
    await spoil(exchange, {"status": 502, **details})


async def spoil_halfway(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The connection closes in the middle: of an upload's body, else of the answer's."""
    if exchange.call == "upload":
        await exchange.read_half_of_body()
        return await exchange.cut()
    left = 0

    async def send(message: Message) -> None:
        nonlocal left
        if message["type"] == "http.response.start":
            left = content_length(message) // 2
            await exchange.send(message)
        elif left > 0:
            part = message.get("body", b"")[:left]
            left -= len(part)
            await exchange.send({"type": "http.response.body", "body": part, "more_body": True})

    await exchange.answer(send)
    await exchange.cut()


async def spoil_with_slowness(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The call is carried out at once, its answer comes `seconds` later."""

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            await asyncio.sleep(details["seconds"])
        await exchange.send(message)

    await exchange.answer(send)


async def spoil_by_dripping(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The answer's body comes a byte every `seconds`."""

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            return await exchange.send(message)
        for byte in bytes(message.get("body", b"")):
            if exchange.is_open:
                await exchange.send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
                await asyncio.sleep(details["seconds"])
        if not message.get("more_body", False):
            await exchange.send({"type": "http.response.body", "body": b""})

    await exchange.answer(send)


async def spoil_with_endlessness(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """Success with a body that never ends."""
    await exchange.drain()
    headers = [(b"content-type", good_media_type(exchange.call).encode())]
    await exchange.send({"type": "http.response.start", "status": good_status(exchange.call), "headers": headers})
    while exchange.is_open:
        await exchange.send({"type": "http.response.body", "body": bytes(CHUNK_BYTES), "more_body": True})
        await asyncio.sleep(0)


FAULTS: dict[str, Callable[[Exchange, Mapping[str, Any]], Awaitable[None]]] = {
    "status": spoil_with_status,
    "html": spoil_with_html,
    "nonsense": spoil_with_nonsense,
    "empty": spoil_with_emptiness,
    "cut": spoil_by_cutting,
    "lost": spoil_by_losing,
    "behind": spoil_from_behind,
    "halfway": spoil_halfway,
    "slow": spoil_with_slowness,
    "drip": spoil_by_dripping,
    "endless": spoil_with_endlessness,
}


def response_of(body: Any, status: int, headers: Mapping[str, str] | None) -> Response:
    """A response from text, bytes, or anything that JSON can hold."""
    if isinstance(body, (str, bytes)):
        return Response(body, status, headers, media_type=None if isinstance(body, bytes) else "text/plain")
    return JSONResponse(body, status, headers)


def good_status(call: str) -> int:
    """The status of success of this call."""
    return 201 if call == "create" else 200


def good_media_type(call: str) -> str:
    """The media type of success of this call."""
    media = {
        "speech": "audio/mpeg",
        "output": "video/mp4",
        "public": "video/mp4",
        "picture": "image/jpeg",
        "page": "text/html",
    }
    return media.get(call, "application/json")


def content_length(message: Message) -> int:
    """The Content-Length that a response's start announces."""
    return next((int(value) for name, value in message["headers"] if name == b"content-length"), 0)


# Files in pieces


class Blob(Response):
    """Bytes sent in pieces, so that a big file does not fill the server's buffers once for each reader."""

    def __init__(self, data: bytes | memoryview, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.data = memoryview(data)
        super().__init__(None, status, headers)
        self.headers["content-length"] = str(len(self.data))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send head and pieces."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] != "HEAD":
            async for piece in self.pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def pieces(self) -> AsyncIterator[bytes]:
        """The data in pieces of at most 256 KiB."""
        for start in range(0, len(self.data), CHUNK_BYTES):
            yield bytes(self.data[start : start + CHUNK_BYTES])


def file_response(request: Request, data: bytes, headers: Mapping[str, str]) -> Response:
    """A file as plain web servers serve it: whole, or the part that a GET's Range names."""
    headers = {**headers, "accept-ranges": "bytes"}
    asked = asked_range(request.headers.get("range") if request.method == "GET" and data else None, len(data))
    if asked is None:
        return Response(b"", 416, headers | {"content-range": f"bytes */{len(data)}"})
    start, end = asked
    if end - start == len(data):
        return Blob(data, 200, headers)
    part = {"content-range": f"bytes {start}-{end - 1}/{len(data)}"}
    return Blob(memoryview(data)[start:end], 206, headers | part)


def asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end (not included) of a Range header, the whole file without one; None if it cannot be met."""
    if not header:
        return 0, size
    unit, _, spec = header.partition("=")
    first, dash, last = spec.partition("-")
    if unit != "bytes" or not dash or "," in spec or not all(part == "" or part.isdigit() for part in (first, last)):
        return None
    if first == "":
        start, end = max(0, size - int(last or 0)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
    return (start, end) if start < end else None
