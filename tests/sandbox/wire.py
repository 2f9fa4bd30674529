"""What lies between a socket and a stand-in: recorded requests, faults on demand, files in chunks.

Every route of the sandbox is an `Endpoint`. It records the request and then lets the stand-in
respond, unless a fault is due for this call.
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
    "poll",
    "list",
    "cancel",
    "upload",
    "move",
    "objects",  # a list of the storage
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
    "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head>"
    "<body><center><h1>502 Bad Gateway</h1></center><hr><center>cloudflare</center></body></html>"
)

Handler = Callable[[Request], Awaitable[Response]]


class Refusal(Exception):
    """A provider refuses a request; `response` is what it answers."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


# Requests and faults


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
    """What goes wrong with the next `times` requests of a call (None: with all of them)."""

    kind: str
    times: int | None
    details: dict[str, Any]


class Wire:
    """The recorded requests and the faults of one sandbox; `record=False` only counts requests."""

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
        """Queue a fault behind those already waiting for this call."""
        if call not in CALLS or kind not in FAULTS:
            calls = ", ".join(CALLS)
            kinds = ", ".join(FAULTS)
            raise ValueError(f"no such fault: {call} {kind}; calls: {calls}; kinds: {kinds}")
        self.faults[call].append(Fault(kind, times, details))

    def due_fault(self, call: str) -> Fault | None:
        """Return the fault for a request that has just come in, if any, and count it."""
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
    """One route as an ASGI application: it records the request, and responds or fails."""

    def __init__(self, wire: Wire, call: str, handler: Handler) -> None:
        self.wire = wire
        self.call = call
        self.handler = handler

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
    """One request and its connection."""

    def __init__(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        self.call = endpoint.call
        self.handler = endpoint.handler
        self.wire = endpoint.wire
        self.scope = scope
        self.send = send
        self.raw_receive = receive
        # uvicorn's RequestResponseCycle, which knows the connection
        self.connection: Any = getattr(receive, "__self__", None)
        self.body_read = False
        self.recorded: Recorded | None = None
        if self.wire.record:
            self.recorded = self.record()

    def record(self) -> Recorded:
        """Record the request; its body is added while it is read."""
        request = Request(self.scope)
        recorded = Recorded(
            call=self.call,
            method=request.method,
            path=self.scope["path"],
            query=dict(request.query_params),
            headers=dict(request.headers.items()),
        )
        self.wire.requests.append(recorded)
        return recorded

    async def receive(self) -> Message:
        """Return the next message of the request, and record its part of the body."""
        message = await self.raw_receive()
        self.body_read = not message.get("more_body", False)
        if self.recorded is not None:
            body: bytes = message.get("body", b"")
            room = RECORDED_BODY_BYTES - len(self.recorded.body)
            self.recorded.body += body[:room]
            self.recorded.length += len(body)
        return message

    async def answer(self, send: Send) -> None:
        """Send the provider's response."""
        request = Request(self.scope, self.receive)
        try:
            response = await self.handler(request)
        except Refusal as refusal:
            await self.drain()  # a refusal sent before the whole body is in may never arrive
            response = refusal.response
        except ClientDisconnect:
            return
        await response(self.scope, self.receive, send)

    async def respond(self, response: Response) -> None:
        """Read the request's body, and send this response instead of the provider's."""
        await self.drain()
        await response(self.scope, self.receive, self.send)

    async def drain(self) -> None:
        """Read the rest of the request's body."""
        while not self.body_read:
            await self.receive()

    async def read_half_of_body(self) -> None:
        """Read about half of the request's body."""
        length = int(Request(self.scope).headers.get("content-length", "0"))
        received = 0
        while received < length / 2:
            message = await self.receive()
            received += len(message.get("body", b""))
            if self.body_read:
                return

    async def cut(self) -> None:
        """Close the connection after what was already sent, and wait until it is closed."""
        self.connection.transport.close()
        while True:
            message = await self.raw_receive()
            if message["type"] == "http.disconnect":
                return

    @property
    def is_open(self) -> bool:
        """Whether the client is still connected."""
        return not self.connection.disconnected


# Faults, by kind


async def fail_with_status(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """A status, with the given headers and body, or the provider's own body for that status."""
    status = details["status"]
    body = details.get("body", exchange.wire.default_body(exchange.call, status))
    await exchange.respond(response_of(body, status, details.get("headers")))


async def fail_with_html(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The HTML error page of a gateway in front of the provider."""
    page = details.get("body", HTML_PAGE)
    status = details.get("status", 502)
    headers = details.get("headers")
    await exchange.respond(Response(page, status, headers, media_type="text/html"))


async def fail_with_invalid_body(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """Success with an invalid body: JSON of another shape, or noise in place of media."""
    media_type = success_media_type(exchange.call)
    body: Any = b"\x00noise\xff" * 100
    if media_type == "application/json":
        body = ["unexpected"]
    response = response_of(details.get("body", body), success_status(exchange.call), None)
    response.headers["content-type"] = media_type
    await exchange.respond(response)


async def fail_with_empty_body(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """Success without a body."""
    status = success_status(exchange.call)
    media_type = success_media_type(exchange.call)
    await exchange.respond(Response(b"", status, media_type=media_type))


async def cut_before_call(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The connection closes before the call is carried out."""
    await exchange.cut()


async def lose_response(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The call is carried out, but the connection closes without a response."""
    await exchange.answer(discard)
    await exchange.cut()


async def replace_response(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The call is carried out, but a gateway responds: with an HTML 502 by default."""
    await exchange.answer(discard)
    gateway_details = {"status": 502, **details}
    if "body" in details:
        await fail_with_status(exchange, gateway_details)
    else:
        await fail_with_html(exchange, gateway_details)


async def cut_halfway(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The connection closes halfway: in the body of an upload, or else of the response."""
    if exchange.call == "upload":
        await exchange.read_half_of_body()
        await exchange.cut()
        return

    left = 0

    async def send_half(message: Message) -> None:
        """Send the start, and half of the body."""
        nonlocal left
        if message["type"] == "http.response.start":
            left = content_length(message) // 2
            await exchange.send(message)
        elif left > 0:
            part = message.get("body", b"")[:left]
            left -= len(part)
            await exchange.send(body_message(part, more=True))

    await exchange.answer(send_half)
    await exchange.cut()


async def delay_response(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The call is carried out at once; its response comes `seconds` later."""

    async def send_later(message: Message) -> None:
        """Wait before the start of the response."""
        if message["type"] == "http.response.start":
            await asyncio.sleep(details["seconds"])
        await exchange.send(message)

    await exchange.answer(send_later)


async def drip_response(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """The response's body comes one byte every `seconds`."""

    async def send_slowly(message: Message) -> None:
        """Send each byte of the body by itself."""
        if message["type"] == "http.response.start":
            await exchange.send(message)
            return
        for byte in bytes(message.get("body", b"")):
            if exchange.is_open:
                await exchange.send(body_message(bytes([byte]), more=True))
                await asyncio.sleep(details["seconds"])
        if not message.get("more_body", False):
            await exchange.send(body_message(b""))

    await exchange.answer(send_slowly)


async def respond_without_end(exchange: Exchange, details: Mapping[str, Any]) -> None:
    """Success with a body that never ends."""
    await exchange.drain()
    await exchange.send(
        {
            "type": "http.response.start",
            "status": success_status(exchange.call),
            "headers": [(b"content-type", success_media_type(exchange.call).encode())],
        }
    )
    while exchange.is_open:
        await exchange.send(body_message(bytes(CHUNK_BYTES), more=True))
        await asyncio.sleep(0)


FAULTS: dict[str, Callable[[Exchange, Mapping[str, Any]], Awaitable[None]]] = {
    "status": fail_with_status,
    "html": fail_with_html,
    "malformed": fail_with_invalid_body,
    "empty": fail_with_empty_body,
    "cut": cut_before_call,
    "lost": lose_response,
    "behind": replace_response,
    "halfway": cut_halfway,
    "slow": delay_response,
    "drip": drip_response,
    "endless": respond_without_end,
}


async def discard(message: Message) -> None:
    """Send nothing."""


def response_of(body: Any, status: int, headers: Mapping[str, str] | None) -> Response:
    """A response with text, bytes or JSON."""
    if isinstance(body, bytes):
        return Response(body, status, headers)
    if isinstance(body, str):
        return Response(body, status, headers, media_type="text/plain")
    return JSONResponse(body, status, headers)


def success_status(call: str) -> int:
    """The status of this call's success."""
    return 201 if call == "create" else 200


def success_media_type(call: str) -> str:
    """The media type of this call's success."""
    media_types = {
        "speech": "audio/mpeg",
        "output": "video/mp4",
        "public": "video/mp4",
        "picture": "image/jpeg",
        "page": "text/html",
    }
    return media_types.get(call, "application/json")


def content_length(message: Message) -> int:
    """The Content-Length that the start of a response announces, or 0."""
    for name, value in message["headers"]:
        if name == b"content-length":
            return int(value)
    return 0


def body_message(body: bytes, more: bool = False) -> Message:
    """The ASGI message for a part of a response's body; `more` follows, or it is the last."""
    return {"type": "http.response.body", "body": body, "more_body": more}


# Files in chunks


class Blob(Response):
    """Bytes sent in chunks, so that a large file does not fill a buffer for each reader."""

    def __init__(
        self,
        data: bytes | memoryview,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.data = memoryview(data)
        super().__init__(None, status, headers)
        self.headers["content-length"] = str(len(self.data))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers and the chunks."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        if scope["method"] != "HEAD":
            async for chunk in self.chunks():
                await send(body_message(chunk, more=True))
        await send(body_message(b""))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The data in chunks of at most 256 KiB."""
        for start in range(0, len(self.data), CHUNK_BYTES):
            yield bytes(self.data[start : start + CHUNK_BYTES])


def file_response(request: Request, data: bytes, headers: Mapping[str, str]) -> Response:
    """A file as common web servers serve it: whole, or the part that a GET's Range asks for."""
    headers = {**headers, "accept-ranges": "bytes"}
    range_header = None
    if request.method == "GET" and data:
        range_header = request.headers.get("range")

    byte_range = parse_range(range_header, len(data))
    if byte_range is None:
        return Response(b"", 416, {**headers, "content-range": f"bytes */{len(data)}"})
    return range_response(data, byte_range, headers)


def range_response(
    data: bytes | memoryview, byte_range: tuple[int, int], headers: Mapping[str, str]
) -> Response:
    """A 200 with all the data, or a 206 with the part in `byte_range` (end not included)."""
    start, end = byte_range
    if end - start == len(data):
        return Blob(data, 200, headers)
    content_range = f"bytes {start}-{end - 1}/{len(data)}"
    return Blob(memoryview(data)[start:end], 206, {**headers, "content-range": content_range})


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the first byte and the end (not included) of a Range header.

    Without a header this is the whole file. None means that the range cannot be satisfied.
    """
    if not header:
        return 0, size

    unit, _, spec = header.partition("=")
    first, dash, last = spec.partition("-")
    is_valid = unit == "bytes" and bool(dash) and "," not in spec
    is_valid = is_valid and all(part == "" or part.isdigit() for part in (first, last))
    if not is_valid:
        return None

    if first == "":  # the last so many bytes
        start = max(0, size - int(last or 0))
        end = size
    elif last == "":
        start = int(first)
        end = size
    else:
        start = int(first)
        end = min(size, int(last) + 1)
    if start >= end:
        return None
    return start, end
