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
from tests import network
from tests.network import PUBLIC, Answers, Internet, Server, redirect, reply

pytestmark = pytest.mark.anyio

serve, inside, internet, client = network.serve, network.inside, network.internet, network.client

URL = "http://pets.example/film.mp4"


@pytest.fixture
def pets(serve: Callable[[Answers], Server], internet: Internet) -> Server:
    """A server that is reached under a public name and address."""
    server = serve({})
    internet.add("pets.example", server)
    return server


async def head(client: httpx.AsyncClient, url: str = URL) -> httpx.Response:
    """Ask the service to look at a URL."""
    return await client.post("/debug/head", json={"url": url})


async def test_three_fields_are_told(client: httpx.AsyncClient, pets: Server) -> None:
    """The answer holds status, content type and size, and no other header or byte of the remote answer."""
    pets.answers["/film.mp4"] = [reply(200, b"film", content_type="video/mp4", x_inside="s3cret", server="s3cret/1")]

    answer = await head(client)

    assert answer.status_code == 200
    assert answer.json() == {"status": 200, "content_type": "video/mp4", "bytes": 4}
    assert "s3cret" not in f"{answer.headers} {answer.text}"
    assert pets.requests == ["HEAD /film.mp4"]


@pytest.mark.parametrize(
    ("status", "size"),
    [
        pytest.param(204, None, id="no content"),
        pytest.param(304, None, id="not modified"),
        pytest.param(300, 0, id="a choice without a location"),
        pytest.param(401, 0, id="unauthorised"),
        pytest.param(404, 0, id="not found"),
        pytest.param(410, 0, id="gone"),
        pytest.param(500, 0, id="server error"),
        pytest.param(599, 0, id="a status that nobody knows"),
    ],
)
async def test_the_remote_status_is_told(
    status: int, size: int | None, client: httpx.AsyncClient, pets: Server
) -> None:
    """A remote error is what the caller wants to see, not an error of the service."""
    pets.answers["/film.mp4"] = [reply(status, content_length=None if size is None else str(size))]

    answer = await head(client)

    assert answer.status_code == 200
    assert answer.json() == {"status": status, "content_type": None, "bytes": size}


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        pytest.param({"content_type": None}, None, id="missing"),
        pytest.param({"content_type": ""}, None, id="empty"),
        pytest.param({"content_type": "video/mp4; codecs=avc1"}, "video/mp4; codecs=avc1", id="with parameters"),
        pytest.param({"content_type": "x" * 5000}, "x" * 200, id="very long"),
        pytest.param({"content_type": "<script>"}, "<script>", id="no type at all"),
    ],
)
async def test_the_content_type_is_told(
    headers: dict[str, str | None], told: str | None, client: httpx.AsyncClient, pets: Server
) -> None:
    """The content type as the server writes it, at most 200 characters of it."""
    pets.answers["/film.mp4"] = [reply(200, **headers)]

    assert (await head(client)).json()["content_type"] == told


@pytest.mark.parametrize(
    ("length", "told"),
    [
        pytest.param(None, None, id="missing"),
        pytest.param("0", 0, id="empty file"),
        pytest.param("100000000", 100_000_000, id="as large as a download may be"),
        pytest.param("999999999999999999", 999_999_999_999_999_999, id="18 digits"),
        pytest.param("9999999999999999999", None, id="19 digits: more than a signed 64-bit number"),
    ],
)
async def test_the_size_is_told(length: str | None, told: int | None, client: httpx.AsyncClient, pets: Server) -> None:
    """The size that the server tells, if it can be one; the file itself is not asked for."""
    pets.answers["/film.mp4"] = [reply(200, content_length=length)]

    answer = await head(client)

    assert answer.json() == {"status": 200, "content_type": None, "bytes": told}
    assert pets.requests == ["HEAD /film.mp4"]


@pytest.mark.parametrize("length", ["abc", "-1", "1e3", "0x10", "4, 5", "9" * 21, "9" * 5000, "１２"])
async def test_a_length_that_is_none_is_a_failed_answer(length: str, client: httpx.AsyncClient, pets: Server) -> None:
    """A Content-Length that no HTTP client takes is the remote server's failure."""
    pets.answers["/film.mp4"] = [
        reply(200, content_length=length.encode().decode("latin-1")),
    ]

    answer = await head(client)

    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"].startswith("The URL did not answer: RemoteProtocolError")


# ----------------------------------------------------------------------------------------------------------------
# A server that refuses HEAD
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [400, 403, 404, 405, 500, 501])
async def test_a_refused_head_falls_back_to_a_ranged_get(refused: int, client: httpx.AsyncClient, pets: Server) -> None:
    """A server that takes no HEAD is asked for the first byte, and the whole size is told."""
    part = reply(206, b"f", content_type="video/mp4", content_range="bytes 0-0/12345")
    pets.answers |= {"HEAD /film.mp4": [reply(refused)], "GET /film.mp4": [part]}

    answer = await head(client)

    assert answer.json() == {"status": 206, "content_type": "video/mp4", "bytes": 12_345}
    assert pets.requests == ["HEAD /film.mp4", "GET /film.mp4"]
    assert "range: bytes=0-0" in pets.heard[1].lower()


@pytest.mark.parametrize(
    ("content_range", "told"),
    [
        pytest.param("bytes 0-0/12345", 12_345, id="whole size"),
        pytest.param("bytes */0", 0, id="empty file"),
        pytest.param("bytes 0-0/*", None, id="whole size unknown"),
        pytest.param("bytes 0-0/" + "9" * 30, None, id="whole size absurd"),
        pytest.param("bytes 0-0/many", None, id="whole size no number"),
        pytest.param("bytes", None, id="no range"),
        pytest.param(None, None, id="missing"),
    ],
)
async def test_the_size_of_a_part_is_not_taken_for_the_whole(
    content_range: str | None, told: int | None, client: httpx.AsyncClient, pets: Server
) -> None:
    """Of a part, only what its Content-Range tells is the file's size."""
    pets.answers |= {"HEAD /film.mp4": [reply(405)], "GET /film.mp4": [reply(206, b"f", content_range=content_range)]}

    assert (await head(client)).json() == {"status": 206, "content_type": None, "bytes": told}


async def test_a_server_without_ranges_tells_the_whole_size_too(client: httpx.AsyncClient, pets: Server) -> None:
    """A server that ignores the range and sends the whole file tells its size by Content-Length."""
    pets.answers |= {"HEAD /film.mp4": [reply(405)], "GET /film.mp4": [reply(200, b"x" * 5000)]}

    assert (await head(client)).json() == {"status": 200, "content_type": None, "bytes": 5000}


@pytest.mark.parametrize("request_line", ["HEAD /film.mp4", "GET /film.mp4"])
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

    pets.answers |= {"HEAD /film.mp4": [reply(405)], request_line: [flood]}

    answer = await asyncio.wait_for(head(client), 5)

    assert answer.json() == {"status": 200, "content_type": "video/mp4", "bytes": None}
    assert await asyncio.to_thread(left.wait, 2)
    assert sum(sent) < 20_000_000  # what the system's buffers hold


async def test_names_that_take_long_hold_up_no_film(
    client: httpx.AsyncClient, pets: Server, internet: Internet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever asks for many names that nobody answers for keeps others waiting here, but no download."""
    pets.answers["/film.mp4"] = [reply(200, b"film")]
    stuck, known = threading.Event(), socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith(".tarpit.example"):
            stuck.wait(10)
            raise socket.gaierror
        return known(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    asked = [asyncio.create_task(head(client, f"http://n{n}.tarpit.example/")) for n in range(40)]
    await asyncio.sleep(0.2)

    await asyncio.wait_for(main.download(URL, tmp_path / "film"), 5)

    assert not any(task.done() for task in asked)
    stuck.set()
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {500}


# ----------------------------------------------------------------------------------------------------------------
# Redirects
# ----------------------------------------------------------------------------------------------------------------


def chain(hops: int) -> Answers:
    """Redirects from /0 on, then a file."""
    redirects = {f"/{n}": redirect(f"/{n + 1}") for n in range(hops)}
    return {**redirects, f"/{hops}": reply(200, b"film")}


async def test_five_redirects_are_followed(
    serve: Callable[[Answers], Server], client: httpx.AsyncClient, internet: Internet
) -> None:
    """The fifth redirect still leads to the file."""
    server = serve(chain(5))
    internet.add("pets.example", server)

    answer = await head(client, "http://pets.example/0")

    assert answer.json() == {"status": 200, "content_type": None, "bytes": 4}
    assert server.requests == [f"HEAD /{n}" for n in range(6)]


async def test_a_sixth_redirect_is_not_followed(
    serve: Callable[[Answers], Server], client: httpx.AsyncClient, internet: Internet
) -> None:
    """More than five redirects are refused."""
    server = serve(chain(6))
    internet.add("pets.example", server)

    answer = await head(client, "http://pets.example/0")

    assert (answer.status_code, answer.json()["category"]) == (400, "validation")
    assert answer.json()["detail"] == "The URL redirects more than 5 times."
    assert len(server.requests) == 6


async def test_a_redirect_to_itself_ends(client: httpx.AsyncClient, pets: Server) -> None:
    """A circle of redirects is one redirect too many."""
    pets.answers["/film.mp4"] = [redirect("/film.mp4")]

    answer = await head(client)

    assert (answer.status_code, answer.json()["detail"]) == (400, "The URL redirects more than 5 times.")


async def test_the_ranged_get_follows_redirects_too(client: httpx.AsyncClient, pets: Server) -> None:
    """The fallback starts at the URL that was asked for."""
    part = reply(206, b"f", content_range="bytes 0-0/9")
    pets.answers |= {"/film.mp4": [redirect("/other.mp4")], "HEAD /other.mp4": [reply(405)], "GET /other.mp4": [part]}

    answer = await head(client)

    assert answer.json() == {"status": 206, "content_type": None, "bytes": 9}
    assert pets.requests == ["HEAD /film.mp4", "HEAD /other.mp4", "GET /film.mp4", "GET /other.mp4"]


# ----------------------------------------------------------------------------------------------------------------
# No answer, or none in time
# ----------------------------------------------------------------------------------------------------------------


def test_ten_seconds_are_the_limit() -> None:
    """The other tests shorten this constant."""
    assert main.HEAD_TIMEOUT_S == 10.0


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
    connection.sendall(redirect("/film.mp4"))


@pytest.mark.parametrize("answer_late", [never, drip, slow_redirect])
async def test_the_limit_is_for_all_steps_together(
    answer_late: Callable[[socket.socket], None],
    client: httpx.AsyncClient,
    pets: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However a server wastes time, the answer comes within the limit."""
    monkeypatch.setattr(main, "HEAD_TIMEOUT_S", 0.2)
    pets.answers["/film.mp4"] = [answer_late]
    started = time.monotonic()

    answer = await head(client)

    assert time.monotonic() - started < 2
    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"] == "The URL did not answer within 0.2 s."


async def test_a_late_ranged_get_counts_too(
    client: httpx.AsyncClient, pets: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback has no time of its own."""
    monkeypatch.setattr(main, "HEAD_TIMEOUT_S", 0.2)
    pets.answers |= {"HEAD /film.mp4": [reply(405)], "GET /film.mp4": [never]}

    answer = await head(client)

    assert (answer.status_code, answer.json()["detail"]) == (500, "The URL did not answer within 0.2 s.")


def hang_up(connection: socket.socket) -> None:
    """Close without a word."""


def babble(connection: socket.socket) -> None:
    """Say something that is not HTTP."""
    connection.sendall(b"220 mail.example ESMTP\r\n")


def endless_headers(connection: socket.socket) -> None:
    """Send headers without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Header: " + b"x" * 1000 + b"\r\n")


@pytest.mark.parametrize("behave", [hang_up, babble, endless_headers])
async def test_a_server_that_speaks_no_http_is_a_failed_answer(
    behave: Callable[[socket.socket], None], client: httpx.AsyncClient, pets: Server
) -> None:
    """Whatever answers in place of an HTTP server, the caller is told so."""
    pets.answers["/film.mp4"] = [behave]

    answer = await head(client)

    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"].startswith("The URL did not answer: ")


async def test_an_unreachable_server_is_a_failed_answer(client: httpx.AsyncClient, internet: Internet) -> None:
    """Nobody listens there: 500, and the reason in words."""
    internet.names["pets.example"] = [[PUBLIC]]
    internet.addresses[PUBLIC] = None

    answer = await head(client)

    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"].startswith("The URL did not answer: ConnectError")
    assert internet.connected == [PUBLIC]


async def test_no_connection_stays_open(client: httpx.AsyncClient, pets: Server) -> None:
    """A look that ended in the middle of an answer leaves no connection behind."""
    left = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_end(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nbeginning")
        assert connection.recv(1) == b""
        loop.call_soon_threadsafe(left.set)

    pets.answers |= {"HEAD /film.mp4": [reply(405)], "GET /film.mp4": [wait_for_end]}

    assert (await head(client)).json()["bytes"] == 1_000_000
    await asyncio.wait_for(left.wait(), 2)
