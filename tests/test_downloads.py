"""Downloads: streamed to disk, repeated from the first byte, bounded in size, whatever the other side sends."""

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
from tests import network
from tests.network import PUBLIC, Answer, Answers, Internet, Server, redirect, reply

pytestmark = pytest.mark.anyio

serve, inside, internet, client = network.serve, network.inside, network.internet, network.client

URL = "http://pets.example/film.mp4"
PATH = "/film.mp4"


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRY_FIRST_SECONDS", "0.001")
    main.get_settings.cache_clear()


@pytest.fixture
def pets(serve: Callable[[Answers], Server], internet: Internet, client: httpx.AsyncClient) -> Server:
    """A server that is reached under a public name and address; the service runs."""
    server = serve({})
    internet.add("pets.example", server)
    return server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a download goes."""
    return tmp_path / "film.mp4"


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


async def failure(url: str, target: Path) -> str:
    """What a download that fails says."""
    with pytest.raises(main.ResourceFailed) as failed:
        await asyncio.wait_for(main.download(url, target), 10)
    return failed.value.detail


# ----------------------------------------------------------------------------------------------------------------
# To disk
# ----------------------------------------------------------------------------------------------------------------


async def test_a_file_arrives_as_it_is(pets: Server, target: Path) -> None:
    """Every byte is on disk when the download ends."""
    content = bytes(range(256)) * 20_000
    pets.answers[PATH] = [reply(200, content)]

    await main.download(URL, target)

    assert target.read_bytes() == content
    assert pets.requests == ["GET /film.mp4"]


async def test_memory_does_not_grow_with_the_file(pets: Server, target: Path) -> None:
    """60 MB pass through a few MB of memory."""
    block, count = b"0123456789abcdef" * 65_536, 60

    def send(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length=str(len(block) * count)))
        for _ in range(count):
            connection.sendall(block)

    pets.answers[PATH] = [send]

    with memory_bound(8_000_000):
        await main.download(URL, target)

    assert target.stat().st_size == len(block) * count
    with target.open("rb") as file:
        assert all(file.read(len(block)) == block for _ in range(count))


async def test_a_body_of_unknown_length_arrives(pets: Server, target: Path) -> None:
    """Without a Content-Length the body ends with the connection."""
    pets.answers[PATH] = [reply(200, b"film", content_length=None)]

    await main.download(URL, target)

    assert target.read_bytes() == b"film"


async def test_a_chunked_body_arrives(pets: Server, target: Path) -> None:
    """Chunks are put together."""
    chunks = b"3\r\nfil\r\n1\r\nm\r\n0\r\n\r\n"
    pets.answers[PATH] = [reply(200, chunks, content_length=None, transfer_encoding="chunked")]

    await main.download(URL, target)

    assert target.read_bytes() == b"film"


async def test_an_empty_file_arrives_empty(pets: Server, target: Path) -> None:
    """No bytes are no bytes; what comes next refuses them."""
    pets.answers[PATH] = [reply(200)]

    await main.download(URL, target)

    assert target.read_bytes() == b""


# ----------------------------------------------------------------------------------------------------------------
# Again, from the first byte
# ----------------------------------------------------------------------------------------------------------------


def cut(connection: socket.socket) -> None:
    """Close without a word."""


def cut_halfway(connection: socket.socket) -> None:
    """Send more than the whole file later is, some of which is on disk by then, and close."""
    connection.sendall(reply(200, content_length="5000000") + b"wrong" * 500_000)


def cut_in_a_chunk(connection: socket.socket) -> None:
    """Close in the middle of a chunk."""
    connection.sendall(reply(200, b"ffff\r\nwrong", content_length=None, transfer_encoding="chunked"))


def reset(connection: socket.socket) -> None:
    """Begin an answer, then reset the connection instead of closing it."""
    connection.sendall(reply(200, content_length="1000000") + b"wrong")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(cut, id="cut before the answer"),
        pytest.param(cut_halfway, id="cut in the body"),
        pytest.param(cut_in_a_chunk, id="cut in a chunk"),
        pytest.param(reset, id="reset in the body"),
        pytest.param(reply(404), id="404: not yet there"),
        pytest.param(reply(400, b'{"statusCode": "404", "error": "not_found"}'), id="Supabase's own 404"),
        pytest.param(reply(429), id="429"),
        pytest.param(reply(500), id="500"),
        pytest.param(reply(502, b"<html><h1>Bad Gateway</h1></html>", content_type="text/html"), id="502 with a page"),
        pytest.param(reply(503, retry_after="0"), id="503 that names a wait"),
        pytest.param(reply(544), id="544"),
        pytest.param(b"220 mail.example ESMTP\r\n", id="not HTTP"),
        pytest.param(redirect("http://pets.example/gone.mp4"), id="a redirect to nothing"),
    ],
)
async def test_a_failed_download_is_repeated_from_the_first_byte(first: Answer, pets: Server, target: Path) -> None:
    """What came before the failure is gone, the file is whole."""
    pets.answers[PATH] = [first, reply(200, b"film")]

    await main.download(URL, target)

    assert target.read_bytes() == b"film"
    assert pets.requests.count("GET /film.mp4") == 2
    assert not any("range:" in head.lower() for head in pets.heard)


async def test_the_fourth_attempt_is_the_last(pets: Server, target: Path) -> None:
    """After four attempts the download has failed, and says what the server said."""
    page = b"<html><head><title>502 Bad Gateway</title></head><body><h1>Come back later</h1></body></html>"
    pets.answers[PATH] = [reply(502, page, content_type="text/html")]

    detail = await failure(URL, target)

    assert detail == "The download from pets.example was answered 502: 502 Bad Gateway Come back later."
    assert len(pets.requests) == 4


async def test_a_download_that_is_always_cut_fails(pets: Server, target: Path) -> None:
    """Four halves are no whole."""
    pets.answers[PATH] = [cut_halfway]

    detail = await failure(URL, target)

    assert detail.startswith("The download from pets.example failed: RemoteProtocolError")
    assert len(pets.requests) == 4


async def test_an_unreachable_server_is_tried_four_times(internet: Internet, target: Path) -> None:
    """Nobody listens there."""
    internet.names["pets.example"] = [[PUBLIC]]
    internet.addresses[PUBLIC] = None

    detail = await failure(URL, target)

    assert detail.startswith("The download from pets.example failed: ConnectError")
    assert len(internet.connected) == 4


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 410, 416])
async def test_other_answers_are_not_repeated(status: int, pets: Server, target: Path) -> None:
    """A refusal stays one."""
    length = None if status in (204, 304) else "0"
    pets.answers[PATH] = [reply(status, content_length=length)]

    detail = await failure(URL, target)

    assert detail.startswith(f"The download from pets.example was answered {status}: ")
    assert len(pets.requests) == 1
    assert not target.exists()


async def test_silence_is_not_waited_for_without_end(
    serve: Callable[[Answers], Server], internet: Internet, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that falls silent in the middle of a film has its time limit, at each attempt."""
    monkeypatch.setattr(main, "TIMEOUT", httpx.Timeout(0.1))

    def fall_silent(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length="1000000") + b"beginning")
        connection.recv(1)

    server = serve({PATH: fall_silent})
    internet.add("pets.example", server)

    detail = await failure(URL, target)

    assert detail == "The download from pets.example failed: ReadTimeout."
    assert len(server.requests) == 4


# ----------------------------------------------------------------------------------------------------------------
# Bounds
# ----------------------------------------------------------------------------------------------------------------


def test_100_mb_are_the_limit() -> None:
    """The other tests lower this constant."""
    assert main.MAX_DOWNLOAD_BYTES == 100_000_000


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A lower limit than 100 MB."""
    monkeypatch.setattr(main, "MAX_DOWNLOAD_BYTES", 3_000_000)
    return 3_000_000


@pytest.mark.parametrize("length", [pytest.param(True, id="told"), pytest.param(False, id="not told")])
async def test_a_file_at_the_limit_is_taken(length: bool, limit: int, pets: Server, target: Path) -> None:
    """Exactly as many bytes as allowed arrive."""
    content = bytes(limit)
    pets.answers[PATH] = [reply(200, content, content_length=str(limit) if length else None)]

    await main.download(URL, target)

    assert target.stat().st_size == limit


@pytest.mark.parametrize("length", [pytest.param(True, id="told"), pytest.param(False, id="not told")])
async def test_a_file_over_the_limit_is_refused_once(length: bool, limit: int, pets: Server, target: Path) -> None:
    """A byte more is too much, and is not asked for again."""
    content = bytes(limit + 1)
    pets.answers[PATH] = [reply(200, content, content_length=str(len(content)) if length else None)]

    detail = await failure(URL, target)

    assert detail == "A file to download is larger than 100 MB."
    assert len(pets.requests) == 1


async def test_a_length_over_the_limit_is_refused_before_the_body(limit: int, pets: Server, target: Path) -> None:
    """What says that it is too large is not downloaded to find out."""
    left = threading.Event()

    def send(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length=str(10**12)) + b"beginning")
        connection.settimeout(0.3)
        if connection.recv(1) == b"":
            left.set()

    pets.answers[PATH] = [send]

    detail = await failure(URL, target)

    assert detail == "A file to download is larger than 100 MB."
    assert await asyncio.to_thread(left.wait, 2)
    assert not target.exists()


def flood(connection: socket.socket) -> None:
    """Send zeros until the other side leaves, or nearly: what reads them all is to fail, not to fill this machine."""
    for _ in range(300):
        connection.sendall(bytes(1_000_000))


def endless(connection: socket.socket) -> None:
    """An answer without end."""
    connection.sendall(reply(200, content_length=None))
    flood(connection)


def endless_error(connection: socket.socket) -> None:
    """A refusal whose body has no end."""
    connection.sendall(reply(403, content_length=None))
    flood(connection)


async def test_an_endless_body_fills_neither_disk_nor_memory(limit: int, pets: Server, target: Path) -> None:
    """The download ends at the limit."""
    pets.answers[PATH] = [endless]

    with memory_bound(8_000_000):
        detail = await failure(URL, target)

    assert detail == "A file to download is larger than 100 MB."
    assert target.stat().st_size <= limit


async def test_an_endless_error_is_not_read_to_its_end(pets: Server, target: Path) -> None:
    """Of an error's body only as much is read as can hold a message."""
    pets.answers[PATH] = [endless_error]

    with memory_bound(16_000_000):
        detail = await failure(URL, target)

    assert detail.startswith("The download from pets.example was answered 403: ")


async def test_an_uncompressed_file_is_asked_for(pets: Server, target: Path) -> None:
    """Films do not get smaller by gzip."""
    pets.answers[PATH] = [reply(200, b"film")]

    await main.download(URL, target)

    assert "accept-encoding: identity" in pets.heard[0].lower()


@lru_cache
def bomb(times: int) -> bytes:
    """200 MB of nothing, packed so many times; each takes half a second to make."""
    return gzip.compress(bomb(times - 1) if times > 1 else bytes(200_000_000), 1)


@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip"])
async def test_a_compressed_answer_does_not_explode(status: int, encoding: str, pets: Server, target: Path) -> None:
    """A few kB that unpack to 200 MB stay a few kB, on disk and in memory, in files and in error messages."""
    pets.answers[PATH] = [reply(status, bomb(encoding.count("gzip")), content_encoding=encoding)]

    with memory_bound(16_000_000):
        if status == 200:
            await main.download(URL, target)
        else:
            assert (await failure(URL, target)).startswith("The download from pets.example was answered 403: ")

    assert not target.exists() or target.stat().st_size < 2_000_000


# ----------------------------------------------------------------------------------------------------------------
# Redirects
# ----------------------------------------------------------------------------------------------------------------


async def test_a_redirect_is_followed(
    serve: Callable[[Answers], Server], pets: Server, internet: Internet, target: Path
) -> None:
    """A film may lie elsewhere on the public internet."""
    other = serve({"/other.mp4": reply(200, b"film")})
    internet.add("other.example", other, "8.8.8.8")
    pets.answers[PATH] = [redirect("http://other.example/other.mp4")]

    await main.download(URL, target)

    assert target.read_bytes() == b"film"
    assert other.requests == ["GET /other.mp4"]


async def test_a_redirect_inwards_is_a_failed_download(pets: Server, internet: Internet, target: Path) -> None:
    """What leads inside is not fetched, not repeated and not written."""
    pets.answers[PATH] = [redirect("http://127.0.0.1/")]

    detail = await failure(URL, target)

    reason = "The URL leads to an address that is not public."
    assert detail == f"The file at pets.example may not be fetched. {reason}"
    assert len(pets.requests) == 1
    assert internet.inside.was_silent()
    assert not target.exists()


async def test_a_sixth_redirect_is_not_followed(pets: Server, target: Path) -> None:
    """A circle of redirects ends after five."""
    pets.answers[PATH] = [redirect(PATH)]

    detail = await failure(URL, target)

    assert detail == "The file at pets.example may not be fetched. The URL redirects more than 5 times."
    assert len(pets.requests) == 6


async def test_the_body_of_a_redirect_is_not_read(pets: Server, target: Path) -> None:
    """A redirect may carry as much as it likes: the next hop is made at once."""

    def redirect_and_flood(connection: socket.socket) -> None:
        connection.sendall(reply(302, location="/other.mp4", content_length=None))
        flood(connection)

    pets.answers |= {PATH: [redirect_and_flood], "/other.mp4": [reply(200, b"film")]}

    with memory_bound(8_000_000):
        await main.download(URL, target)

    assert target.read_bytes() == b"film"
