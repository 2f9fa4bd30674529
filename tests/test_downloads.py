"""Downloads: streamed to disk, retried from the first byte, bounded in size."""

import asyncio
import gzip
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import httpx
import pytest

import main
from tests.support import network
from tests.support.application import in_lifespan
from tests.support.network import PATH, URL, Answer, Answers, Internet, Server, redirect, reply

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]

serve, internal_server, internet = network.serve, network.internal_server, network.internet
client, pets = network.client, network.pets

TOO_LARGE = "A file to download is larger than 100 MB."
LIMIT = 3_000_000


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a download goes."""
    return tmp_path / "video.mp4"


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lower limit than 100 MB."""
    assert main.MAX_DOWNLOAD_BYTES == 100_000_000
    monkeypatch.setattr(main, "MAX_DOWNLOAD_BYTES", LIMIT)


@contextmanager
def memory_bound(most_bytes: int) -> Iterator[None]:
    """Fail if Python holds more than `most_bytes` at any time beyond what it held before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < most_bytes


async def failure(target: Path) -> str:
    """The detail of a download that fails."""
    with pytest.raises(main.ResourceFailed) as failed:
        await asyncio.wait_for(main.download(URL, target), 10)
    assert failed.value.retryable == ("larger" not in failed.value.detail)
    return failed.value.detail


# To disk


def chunked(body: bytes) -> bytes:
    """A file in chunks."""
    return reply(200, body, content_length=None, transfer_encoding="chunked")


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        pytest.param(
            reply(200, bytes(range(256)) * 20_000), bytes(range(256)) * 20_000, id="any bytes"
        ),
        pytest.param(
            reply(200, b"video", content_length=None), b"video", id="ended by the connection"
        ),
        pytest.param(chunked(b"4\r\nvide\r\n1\r\no\r\n0\r\n\r\n"), b"video", id="in chunks"),
        pytest.param(reply(200), b"", id="nothing, which comes next refuses"),
    ],
)
async def test_a_file_arrives_as_it_is(
    answer: Answer, content: bytes, pets: Server, target: Path
) -> None:
    """Every byte is on disk when the download ends; no compression is asked for."""
    pets.answers[PATH] = [answer]
    await main.download(URL, target)
    assert target.read_bytes() == content
    assert pets.requests == [f"GET {PATH}"]
    assert "accept-encoding: identity" in pets.request_heads[0].lower()


async def test_memory_does_not_grow_with_the_file(pets: Server, target: Path) -> None:
    """30 MB pass through a few MB of memory."""
    block, count = b"0123456789abcdef" * 65_536, 30

    def send(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length=str(len(block) * count)))
        for _ in range(count):
            connection.sendall(block)

    pets.answers[PATH] = [send]

    with memory_bound(8_000_000):
        await main.download(URL, target)

    assert target.read_bytes() == block * count


# Retries


def cut_halfway(connection: socket.socket) -> None:
    """Send more than the whole file later is, some of which is on disk by then, and close."""
    connection.sendall(reply(200, content_length="5000000") + b"wrong" * 500_000)


def reset(connection: socket.socket) -> None:
    """Begin an answer, then reset the connection instead of closing it."""
    connection.sendall(reply(200, content_length="1000000") + b"wrong")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(b"", id="cut before the answer"),
        pytest.param(cut_halfway, id="cut in the body"),
        pytest.param(chunked(b"ffff\r\nwrong"), id="cut in a chunk"),
        pytest.param(reset, id="reset in the body"),
        pytest.param(
            reply(502, b"<html><h1>Bad Gateway</h1></html>", content_type="text/html"),
            id="502 with a page",
        ),
        pytest.param(b"220 mail.example ESMTP\r\n", id="not HTTP"),
        pytest.param(redirect("http://pets.example/gone.mp4"), id="a redirect to nothing"),
        pytest.param(redirect("http://[::1"), id="a redirect to an invalid URL"),
    ],
)
async def test_a_failed_download_is_retried_from_the_first_byte(
    first: Answer, pets: Server, target: Path
) -> None:
    """The bytes before the failure are dropped, and the file is complete."""
    pets.answers[PATH] = [first, reply(200, b"video")]
    await main.download(URL, target)
    assert target.read_bytes() == b"video"
    assert pets.requests.count(f"GET {PATH}") == 2
    assert not any("range:" in head.lower() for head in pets.request_heads)


async def test_a_silent_server_is_retried_after_the_read_timeout(
    serve: Callable[[Answers], Server],
    internet: Internet,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that stops sending in the middle of a video is asked again."""
    monkeypatch.setattr(main, "TIMEOUT", httpx.Timeout(0.1))

    def fall_silent(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length="1000000") + b"beginning")
        connection.recv(1)

    internet.add("pets.example", serve({PATH: [fall_silent, reply(200, b"video")]}))

    await asyncio.wait_for(in_lifespan(main.download(URL, target)), 5)

    assert target.read_bytes() == b"video"


PAGE = b"<html><head><title>Sorry</title></head><body><h1>Not from here</h1></body></html>"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(
            reply(403, PAGE, content_type="text/html"), "403: Sorry Not from here.", id="a page"
        ),
        *((reply(status, content_length=None), f"{status}: ") for status in (204, 304)),
        *((reply(status), f"{status}: ") for status in (206, 400, 401, 410, 416)),
    ],
)
async def test_other_statuses_are_not_retried(
    answer: Answer, words: str, pets: Server, target: Path
) -> None:
    """A rejection is final, and `detail` holds the server's own words."""
    pets.answers[PATH] = [answer]
    assert (await failure(target)).startswith(
        f"The download from pets.example was answered {words}"
    )
    assert len(pets.requests) == 1
    assert not target.exists()


# Limits


def sized(size: int, has_length: bool) -> bytes:
    """A file of a size."""
    return reply(200, bytes(size), content_length=str(size) if has_length else None)


def endless(status: int, **headers: str) -> Answer:
    """A response of zeros that is nearly endless: a reader of it all fails before the machine is full."""

    def send(connection: socket.socket) -> None:
        connection.sendall(reply(status, content_length=None, **headers))
        for _ in range(300):
            connection.sendall(bytes(1_000_000))

    return send


@pytest.mark.parametrize("has_length", [True, False])
async def test_a_file_at_the_limit_is_accepted(
    has_length: bool, limit: None, pets: Server, target: Path
) -> None:
    """A file of exactly MAX_DOWNLOAD_BYTES is downloaded."""
    pets.answers[PATH] = [sized(LIMIT, has_length)]
    await main.download(URL, target)
    assert target.stat().st_size == LIMIT


@pytest.mark.parametrize("answer", [sized(LIMIT + 1, True), sized(LIMIT + 1, False), endless(200)])
async def test_a_file_over_the_limit_is_rejected_without_a_retry(
    answer: Answer, limit: None, pets: Server, target: Path
) -> None:
    """It is requested once, and fills neither disk nor memory."""
    pets.answers[PATH] = [answer]
    with memory_bound(8_000_000):
        assert await failure(target) == TOO_LARGE
    assert len(pets.requests) == 1
    assert not target.exists() or target.stat().st_size <= LIMIT


async def test_a_content_length_over_the_limit_is_rejected_before_the_body(
    pets: Server, target: Path
) -> None:
    """A response that announces too many bytes is not read."""
    left = threading.Event()

    def send(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length=str(10**12)) + b"beginning")
        connection.settimeout(2)
        if connection.recv(1) == b"":
            left.set()

    pets.answers[PATH] = [send]

    assert await failure(target) == TOO_LARGE
    assert await asyncio.to_thread(left.wait, 2)
    assert not target.exists()


@pytest.mark.parametrize(
    "answer", [endless(403), endless(302, location="/gone.mp4")], ids=["error", "redirect"]
)
async def test_an_endless_error_or_redirect_body_is_not_read(
    answer: Answer, pets: Server, target: Path
) -> None:
    """An error's body is read as far as a message can reach, a redirect's body not at all."""
    pets.answers |= {PATH: [answer], "/gone.mp4": [reply(410)]}
    with memory_bound(16_000_000):
        assert "was answered 4" in await failure(target)


@lru_cache
def bomb(times: int) -> bytes:
    """100 MB of zeros, compressed so many times; making it takes a moment."""
    return gzip.compress(bomb(times - 1) if times > 1 else bytes(100_000_000), 1)


@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip"])
async def test_a_compressed_response_is_not_decompressed(
    status: int, encoding: str, pets: Server, target: Path
) -> None:
    """A few kB that unpack to 100 MB stay a few kB on disk, in memory and in error messages."""
    pets.answers[PATH] = [reply(status, bomb(encoding.count("gzip")), content_encoding=encoding)]
    with memory_bound(16_000_000):
        if status == 200:
            await main.download(URL, target)
        else:
            assert (await failure(target)).startswith(
                "The download from pets.example was answered 403: "
            )
    assert not target.exists() or target.stat().st_size < 1_000_000
