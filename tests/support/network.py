"""A small network for tests, with real sockets: servers on loopback, and names and addresses that lead to them.

A test module takes the fixtures it needs: `serve, inside, internet = network.serve, network.inside, network.internet`.
`pets` is where most files lie, at URL.
"""

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import anyio
import httpx
import pytest

from tests.support.application import running_application

PATIENCE_S = 5.0
PUBLIC = "93.184.216.34"  # leads to a server of the test where `internet` says so
PATH = "/video.mp4"
URL = f"http://pets.example{PATH}"

# What a server sends: bytes as they are, or a function that talks over the open connection.
Answer = bytes | Callable[[socket.socket], None]
Answers = Mapping[str, Answer | Sequence[Answer]]


def reply(status: int = 200, body: bytes = b"", **headers: str | None) -> bytes:
    """A whole HTTP answer; `content_type="text/html"` becomes Content-Type, None leaves a header out."""
    fields = {"content_length": str(len(body)), "connection": "close"} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status} Any", *lines, "", ""]).encode("latin-1") + body


def redirect(location: str, status: int = 302) -> bytes:
    """A redirect as bytes."""
    return reply(status, location=location)


class Server:
    """A server on loopback that answers by path, one request a connection, and remembers what it heard.

    `answers` maps "/path" or "HEAD /path" to an answer, or to several in turn, of which the last one stays.
    """

    def __init__(self, answers: Answers) -> None:
        self.answers = {
            path: [given] if isinstance(given, bytes) or callable(given) else list(given)
            for path, given in answers.items()
        }
        self.request_heads: list[str] = []  # the head of each request
        self.callers: list[Any] = []  # the address of each connection
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def requests(self) -> list[str]:
        """The first line of each request without the protocol, such as "GET /video.mp4"."""
        return [debug_head.split(" HTTP/")[0] for debug_head in self.request_heads]

    def was_never_contacted(self) -> bool:
        """True if nobody has connected, as a connection of our own shows, which is accepted after all earlier ones."""
        with socket.create_connection(("127.0.0.1", self.port)) as ours:
            caller, deadline = ours.getsockname(), time.monotonic() + PATIENCE_S
            while caller not in self.callers:
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.001)
        self.callers.remove(caller)
        return not self.callers

    def close(self) -> None:
        """Stop listening."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(PATIENCE_S)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, caller = self._socket.accept()
                self.callers.append(caller)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the other side has left
            connection.settimeout(PATIENCE_S)
            debug_head = b""
            while b"\r\n\r\n" not in debug_head:
                if not (more := connection.recv(65_536)):
                    return
                debug_head += more
            self.request_heads.append(debug_head.split(b"\r\n\r\n")[0].decode("latin-1"))
            answer = self._answer_to(self.requests[-1])
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)

    def _answer_to(self, request: str) -> Answer:
        method, path = request.split(" ", 1)
        queue = self.answers.get(request) or self.answers.get(path) or [reply(404)]
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if method == "HEAD" and isinstance(answer, bytes):
            return answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        return answer


class Internet:
    """The network as the service sees it: names and addresses lead where the test says, all others to `inside`.

    Stands below main.py and its HTTP client, in place of the resolver and of the system's connect(); the
    connections that it makes are real. `inside` is a server that nobody must reach.
    """

    def __init__(self, internal_server: Server) -> None:
        self.internal_server = internal_server
        # What each look-up in turn finds; the last one stays. Some systems know these two, all should.
        self.names: dict[str, list[list[str]]] = {"localhost.": [["127.0.0.1"]], "127.0.0.1.": [["127.0.0.1"]]}
        self.addresses: dict[str, int | None] = {}  # the local port behind an address; None: nobody listens
        self.looked_up: list[str] = []
        self.connected: list[str] = []
        self._real_getaddrinfo = socket.getaddrinfo
        self._real_connect = anyio.connect_tcp

    def add(self, name: str, server: Server, address: str = PUBLIC) -> None:
        """Let a name lead to a server by way of an address."""
        self.names[name] = [[address]]
        self.addresses[address] = server.port

    def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        """socket.getaddrinfo without a name server: numbers and localhost as the system reads them."""
        name = host.decode() if isinstance(host, bytes) else str(host)
        self.looked_up.append(name)
        if answers := self.names.get(name):
            found = answers.pop(0) if len(answers) > 1 else answers[0]
            return [entry for ip in found for entry in self._real_getaddrinfo(ip, port, type=socket.SOCK_STREAM)]
        if name != "localhost":
            flags |= socket.AI_NUMERICHOST
        return self._real_getaddrinfo(host, port, family, type, proto, flags)

    async def connect(self, remote_host: Any, remote_port: int, **options: Any) -> Any:
        """anyio.connect_tcp by the addresses known here; a port of loopback that is in use stays itself."""
        self.connected.append(str(remote_host))
        port = self.addresses.get(str(remote_host), self.internal_server.port)
        if str(remote_host) == "127.0.0.1" and remote_port not in (80, 443):
            port = remote_port
        if port is None:
            raise OSError("nobody listens there")
        return await self._real_connect("127.0.0.1", port)


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], Server]]:
    """Starts a server with answers; it is closed after the test."""
    with ExitStack() as stack:

        def start(answers: Answers) -> Server:
            server = Server(answers)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def internal_server(serve: Callable[[Answers], Server]) -> Server:
    """A server inside: whatever a test fetches, it must hear nothing."""
    return serve({"/": reply(200, b"secret")})


@pytest.fixture
def internet(internal_server: Server, monkeypatch: pytest.MonkeyPatch) -> Internet:
    """The network of this process, in the test's hands."""
    network = Internet(internal_server)
    monkeypatch.setattr(socket, "getaddrinfo", network.getaddrinfo)
    monkeypatch.setattr(anyio, "connect_tcp", network.connect)
    return network


@pytest.fixture
async def client(anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running service, within this process; its connections end with the test."""
    async with running_application() as client:
        yield client


@pytest.fixture
def pets(serve: Callable[[Answers], Server], internet: Internet, client: httpx.AsyncClient) -> Server:
    """A server with a video that is reached under a public name and address; the service runs."""
    server = serve({PATH: reply(200, b"video", content_type="video/mp4")})
    internet.add("pets.example", server)
    return server


async def debug_head(client: httpx.AsyncClient, url: str = URL) -> httpx.Response:
    """Ask the service to look at a URL."""
    return await client.post("/debug/head", json={"url": url})
