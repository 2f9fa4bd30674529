"""POST /debug/head: three fields about a remote file, and nothing else of it."""

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import main
from tests.support import network
from tests.support.network import PATH, URL, Answer, Server, debug_head, redirect, reply

pytestmark = pytest.mark.anyio

serve, internal_server, internet = network.serve, network.internal_server, network.internet
client, pets = network.client, network.pets

REFUSED = reply(405)
HEAD, GET = f"HEAD {PATH}", f"GET {PATH}"


async def test_three_fields_are_told(client: httpx.AsyncClient, pets: Server) -> None:
    """The answer holds status, content type and size, and no other header or byte of the remote answer."""
    pets.answers[PATH] = [reply(200, b"video", content_type="video/mp4", x_inside="s3cret", server="s3cret/1")]
    answer = await debug_head(client)
    assert answer.status_code == 200
    assert answer.json() == {"status": 200, "content_type": "video/mp4", "bytes": 5}
    assert "s3cret" not in f"{answer.headers} {answer.text}"
    assert pets.requests == [HEAD]


@pytest.mark.parametrize(
    ("remote", "status", "content_type", "size"),
    [
        pytest.param(reply(204, content_length=None), 204, None, None, id="no content"),
        pytest.param(reply(304, content_length=None), 304, None, None, id="not modified"),
        pytest.param(reply(300), 300, None, 0, id="a choice without a location"),
        pytest.param(reply(404), 404, None, 0, id="not found"),
        pytest.param(reply(599), 599, None, 0, id="a status that nobody knows"),
        pytest.param(reply(content_type=""), 200, None, 0, id="an empty type"),
        pytest.param(reply(content_type="video/mp4; a=b"), 200, "video/mp4; a=b", 0, id="a type with parameters"),
        pytest.param(reply(content_type="x" * 5000), 200, "x" * 200, 0, id="a very long type"),
        pytest.param(reply(content_length=None), 200, None, None, id="no length"),
        pytest.param(reply(content_length="9" * 18), 200, None, 10**18 - 1, id="18 digits"),
        pytest.param(reply(content_length="9" * 19), 200, None, None, id="more than a signed 64-bit number"),
    ],
)
async def test_what_the_remote_answer_says_is_told(
    remote: bytes, status: int, content_type: str | None, size: int | None, client: httpx.AsyncClient, pets: Server
) -> None:
    """A remote error is what the caller wants to see; type and size are told if they can be some."""
    pets.answers[PATH] = [remote]
    answer = await debug_head(client)
    assert answer.status_code == 200
    assert answer.json() == {"status": status, "content_type": content_type, "bytes": size}


# A server that refuses HEAD


@pytest.mark.parametrize("refused", [400, 403, 404, 405, 500, 501])
async def test_a_refused_head_falls_back_to_a_ranged_get(refused: int, client: httpx.AsyncClient, pets: Server) -> None:
    """A server that takes no HEAD is asked for the first byte, and the whole size is told."""
    part = reply(206, b"f", content_type="video/mp4", content_range="bytes 0-0/12345")
    pets.answers |= {HEAD: [reply(refused)], GET: [part]}
    answer = await debug_head(client)
    assert answer.json() == {"status": 206, "content_type": "video/mp4", "bytes": 12_345}
    assert pets.requests == [HEAD, GET]
    assert "range: bytes=0-0" in pets.request_heads[1].lower().split("\r\n")


@pytest.mark.parametrize(
    ("partial", "size"),
    [
        pytest.param(reply(200, b"x" * 5000), 5000, id="no part: the whole file"),
        pytest.param(reply(206, b"f", content_range="bytes */0"), 0, id="empty file"),
        pytest.param(reply(206, b"f", content_range="bytes 0-0/*"), None, id="whole size unknown"),
        pytest.param(reply(206, b"f", content_range="bytes 0-0/" + "9" * 30), None, id="whole size absurd"),
        pytest.param(reply(206, b"f", content_range="bytes 0-0/many"), None, id="whole size no number"),
        pytest.param(reply(206, b"f", content_range="bytes"), None, id="no range"),
        pytest.param(reply(206, b"f"), None, id="a part of something"),
    ],
)
async def test_the_size_of_a_part_is_not_taken_for_the_whole(
    partial: bytes, size: int | None, client: httpx.AsyncClient, pets: Server
) -> None:
    """Of a part, only what its Content-Range tells is the file's size."""
    pets.answers |= {HEAD: [REFUSED], GET: [partial]}
    assert (await debug_head(client)).json()["bytes"] == size


async def test_the_ranged_get_follows_redirects_too(client: httpx.AsyncClient, pets: Server) -> None:
    """The fallback starts at the URL that was asked for."""
    part = reply(206, b"f", content_range="bytes 0-0/9")
    pets.answers |= {PATH: [redirect("/other.mp4")], "HEAD /other.mp4": [REFUSED], "GET /other.mp4": [part]}
    assert (await debug_head(client)).json() == {"status": 206, "content_type": None, "bytes": 9}
    assert pets.requests == [HEAD, "HEAD /other.mp4", GET, "GET /other.mp4"]


@pytest.mark.parametrize("request_line", [HEAD, GET])
async def test_an_endless_body_is_never_read(request_line: str, client: httpx.AsyncClient, pets: Server) -> None:
    """The head of an answer is enough: the connection is closed before its body is read."""
    sent: list[int] = []
    left = threading.Event()

    def flood(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length=None, content_type="video/mp4"))
        try:
            for _ in itertools.count():
                sent.append(connection.send(bytes(65_536)))
        finally:
            left.set()

    pets.answers |= {HEAD: [REFUSED], request_line: [flood]}

    answer = await asyncio.wait_for(debug_head(client), 5)

    assert answer.json() == {"status": 200, "content_type": "video/mp4", "bytes": None}
    assert await asyncio.to_thread(left.wait, 2)
    assert sum(sent) < 20_000_000  # what the system's buffers hold


# No answer, or none in time


def never(connection: socket.socket) -> None:
    """Say nothing until the other side leaves."""
    connection.recv(1)


def drip(connection: socket.socket) -> None:
    """Begin an answer that never gets to its end, a byte at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Drip: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


def slow_redirect(connection: socket.socket) -> None:
    """A redirect to itself after a while: no single step is late, all together are."""
    time.sleep(0.08)
    connection.sendall(redirect(PATH))


@pytest.mark.parametrize(
    ("request_line", "answer_late"), [(HEAD, never), (HEAD, drip), (HEAD, slow_redirect), (GET, never)]
)
async def test_the_limit_is_for_all_steps_together(
    request_line: str,
    answer_late: Callable[[socket.socket], None],
    client: httpx.AsyncClient,
    pets: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However a server wastes time, the answer comes within the limit, which is ten seconds outside of tests."""
    assert main.HEAD_TIMEOUT_S == 10.0
    monkeypatch.setattr(main, "HEAD_TIMEOUT_S", 0.15)
    pets.answers |= {HEAD: [REFUSED], request_line: [answer_late]}
    answer = await asyncio.wait_for(debug_head(client), 2)
    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"] == "The URL did not answer within 0.15 s."


async def test_names_that_take_long_hold_up_no_video(
    client: httpx.AsyncClient, pets: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever asks for many names that nobody answers for keeps others waiting here, but no download."""
    answered, known = threading.Event(), socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith(".tarpit.example"):
            answered.wait(10)
        return known(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    asked = [asyncio.create_task(debug_head(client, f"http://n{n}.tarpit.example/")) for n in range(40)]
    await asyncio.sleep(0.1)

    await asyncio.wait_for(main.download(URL, tmp_path / "video"), 5)

    assert not any(task.done() for task in asked)
    answered.set()
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {500}


def endless_headers(connection: socket.socket) -> None:
    """Send headers without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Header: " + b"x" * 1000 + b"\r\n")


@pytest.mark.parametrize(
    "remote",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"220 mail.example ESMTP\r\n", id="another protocol"),
        pytest.param(endless_headers, id="headers without end"),
        *(reply(content_length=length) for length in ("abc", "-1", "1e3", "0x10", "4, 5", "9" * 21, "9" * 5000)),
        pytest.param(reply(content_length="１２".encode().decode("latin-1")), id="full-width digits"),
    ],
)
async def test_what_is_no_http_is_a_failed_answer(remote: Answer, client: httpx.AsyncClient, pets: Server) -> None:
    """Whatever answers in place of an HTTP server, the caller is told so."""
    pets.answers[PATH] = [remote]
    answer = await debug_head(client)
    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"].startswith("The URL did not answer: RemoteProtocolError")
