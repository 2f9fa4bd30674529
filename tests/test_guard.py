"""The network guard: what a client or a model names is fetched from public addresses only, and keys go nowhere else."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

import main
from tests import network
from tests.network import PUBLIC, Answers, Internet, Server, redirect, reply

pytestmark = pytest.mark.anyio

serve, inside, internet, client = network.serve, network.inside, network.internet, network.client

Serve = Callable[[Answers], Server]
Environ = Callable[..., None]

NOT_PUBLIC = "The URL leads to an address that is not public."
NOT_PLAIN = "The URL's address is not written in its plain form."
NOT_A_HOST = "The URL's host is not a plain name or address."
NOT_A_PORT = "Only the ports 80 and 443 are fetched from."
NO_USER = "A URL with a user name or password is not fetched."
NOT_A_URL = "url: should be an absolute http(s) URL."
NO_ADDRESS = "has no address"


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Environ:
    """Sets variables and has the service read them."""

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        main.get_settings.cache_clear()

    set_variables(RETRY_FIRST_SECONDS="0.001", POLL_MIN_SECONDS="0.001")
    return set_variables


async def head(client: httpx.AsyncClient, url: str) -> httpx.Response:
    """Ask the service to look at a URL."""
    return await client.post("/debug/head", json={"url": url})


# ----------------------------------------------------------------------------------------------------------------
# Addresses
# ----------------------------------------------------------------------------------------------------------------

INNER_ADDRESSES = [
    pytest.param("127.0.0.1", id="loopback"),
    pytest.param("127.255.255.254", id="end of loopback"),
    pytest.param("0.0.0.0", id="unspecified"),
    pytest.param("0.1.2.3", id="this network"),
    pytest.param("10.0.0.1", id="private 10"),
    pytest.param("172.16.0.1", id="private 172.16"),
    pytest.param("172.31.255.255", id="end of private 172.16"),
    pytest.param("192.168.1.1", id="private 192.168"),
    pytest.param("169.254.1.1", id="link-local"),
    pytest.param("169.254.169.254", id="metadata"),
    pytest.param("100.64.0.1", id="carrier-grade NAT"),
    pytest.param("100.100.100.200", id="metadata in carrier-grade NAT"),
    pytest.param("100.127.255.255", id="end of carrier-grade NAT"),
    pytest.param("198.18.0.1", id="benchmark"),
    pytest.param("198.19.255.255", id="end of benchmark"),
    pytest.param("192.0.0.1", id="protocol assignments"),
    pytest.param("192.0.0.9", id="protocol assignments, port control anycast"),
    pytest.param("192.0.2.1", id="documentation 1"),
    pytest.param("198.51.100.1", id="documentation 2"),
    pytest.param("203.0.113.1", id="documentation 3"),
    pytest.param("192.88.99.1", id="6to4 relay"),
    pytest.param("224.0.0.1", id="multicast"),
    pytest.param("239.255.255.250", id="multicast of one organisation"),
    pytest.param("240.0.0.1", id="reserved"),
    pytest.param("255.255.255.255", id="broadcast"),
    pytest.param("::1", id="IPv6 loopback"),
    pytest.param("::", id="IPv6 unspecified"),
    pytest.param("::ffff:127.0.0.1", id="mapped loopback"),
    pytest.param("::ffff:8.8.8.8", id="mapped public"),
    pytest.param("::ffff:0:127.0.0.1", id="translated loopback"),
    pytest.param("::127.0.0.1", id="compatible loopback"),
    pytest.param("::8.8.8.8", id="compatible public"),
    pytest.param("64:ff9b::127.0.0.1", id="NAT64 loopback"),
    pytest.param("64:ff9b::8.8.8.8", id="NAT64 public"),
    pytest.param("64:ff9b:1::10.0.0.1", id="local NAT64"),
    pytest.param("2002:7f00:1::1", id="6to4 loopback"),
    pytest.param("2002:808:808::1", id="6to4 public"),
    pytest.param("2001:0:4136:e378:8000:63bf:3fff:fdd2", id="Teredo"),
    pytest.param("2001:1::1", id="IPv6 port control anycast"),
    pytest.param("2001:10::1", id="ORCHID"),
    pytest.param("2001:20::1", id="ORCHIDv2"),
    pytest.param("2001:db8::1", id="IPv6 documentation"),
    pytest.param("3fff::1", id="newer IPv6 documentation"),
    pytest.param("100::1", id="discard only"),
    pytest.param("5f00::1", id="segment routing"),
    pytest.param("fc00::1", id="unique local fc00"),
    pytest.param("fd00:ec2::254", id="metadata in unique local"),
    pytest.param("fe80::1", id="IPv6 link-local"),
    pytest.param("fe80::1%eth0", id="IPv6 link-local with zone"),
    pytest.param("fec0::1", id="site-local"),
    pytest.param("ff02::1", id="IPv6 multicast"),
    pytest.param("ff0e::1", id="global IPv6 multicast"),
    pytest.param("localhost", id="no address"),
    pytest.param("", id="nothing"),
]
PUBLIC_ADDRESSES = [
    pytest.param("8.8.8.8", id="a name server"),
    pytest.param(PUBLIC, id="a web server"),
    pytest.param("9.255.255.255", id="before private 10"),
    pytest.param("11.0.0.0", id="after private 10"),
    pytest.param("172.15.255.255", id="before private 172.16"),
    pytest.param("172.32.0.0", id="after private 172.16"),
    pytest.param("100.63.255.255", id="before carrier-grade NAT"),
    pytest.param("100.128.0.0", id="after carrier-grade NAT"),
    pytest.param("192.0.1.1", id="after protocol assignments"),
    pytest.param("198.20.0.0", id="after benchmark"),
    pytest.param("223.255.255.255", id="before multicast"),
    pytest.param("2606:4700:4700::1111", id="an IPv6 name server"),
    pytest.param("2a00:1450:4001:82a::200e", id="an IPv6 web server"),
    pytest.param("2003::1", id="after 6to4"),
]


@pytest.mark.parametrize("address", INNER_ADDRESSES)
def test_inner_addresses_are_not_public(address: str) -> None:
    """Every address that leads inside, nowhere or to another address is refused, on every Python alike."""
    assert not main.is_public(address)


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses_are_public(address: str) -> None:
    """Addresses of the public internet pass, up to the edges of the refused networks."""
    assert main.is_public(address)


@pytest.mark.parametrize("address", INNER_ADDRESSES[:-2])
async def test_a_name_with_an_inner_address_is_not_connected_to(
    address: str, client: httpx.AsyncClient, internet: Internet
) -> None:
    """A name is refused by what it leads to, and nothing inside hears of it."""
    internet.names["pets.example"] = [[address]]

    answer = await head(client, "http://pets.example/")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_PUBLIC)
    assert internet.connected == []
    assert internet.inside.was_silent()


# ----------------------------------------------------------------------------------------------------------------
# URLs
# ----------------------------------------------------------------------------------------------------------------

REFUSED_URLS = [
    pytest.param("http://127.0.0.1/", NOT_PUBLIC, id="loopback"),
    pytest.param("http://127.0.0.1./", NOT_PUBLIC, id="loopback with a dot at its end"),
    pytest.param("http://127.0.0.1../", NO_ADDRESS, id="loopback with two dots at its end"),
    pytest.param("http://2130706433/", NOT_PLAIN, id="one number"),
    pytest.param("http://2130706433./", NOT_PLAIN, id="one number with a dot at its end"),
    pytest.param("http://134744072/", NOT_PLAIN, id="one number, public"),
    pytest.param("http://017700000001/", NOT_PLAIN, id="one octal number"),
    pytest.param("http://0x7f000001/", NOT_PLAIN, id="one hex number"),
    pytest.param("http://0X7F000001/", NOT_PLAIN, id="one hex number in capitals"),
    pytest.param("http://0x/", NOT_PLAIN, id="a hex number without digits"),
    pytest.param("http://pets.example.0x7f/", NOT_PLAIN, id="a name that ends in a number"),
    pytest.param("http://0x7f.0.0.1/", NOT_PLAIN, id="hex part"),
    pytest.param("http://127.0.0.0x1/", NOT_PLAIN, id="hex last part"),
    pytest.param("http://127.1/", NOT_PLAIN, id="short"),
    pytest.param("http://127.0.1/", NOT_PLAIN, id="three parts"),
    pytest.param("http://0/", NOT_PLAIN, id="zero"),
    pytest.param("http://1.2.3.4.5/", NOT_PLAIN, id="five parts"),
    pytest.param("http://0.0.0.0/", NOT_PUBLIC, id="unspecified"),
    pytest.param("http://10.0.0.1/", NOT_PUBLIC, id="private"),
    pytest.param("http://169.254.169.254/latest/meta-data/", NOT_PUBLIC, id="metadata"),
    pytest.param("http://[::1]/", NOT_PUBLIC, id="IPv6 loopback"),
    pytest.param("http://[::]/", NOT_PUBLIC, id="IPv6 unspecified"),
    pytest.param("http://[0:0:0:0:0:0:0:1]/", NOT_PUBLIC, id="IPv6 loopback in full"),
    pytest.param("http://[::ffff:7f00:1]/", NOT_PUBLIC, id="mapped"),
    pytest.param("http://[::ffff:127.0.0.1]/", NOT_PLAIN, id="mapped with dots"),
    pytest.param("http://[::7f00:1]/", NOT_PUBLIC, id="compatible"),
    pytest.param("http://[::127.0.0.1]/", NOT_PLAIN, id="compatible with dots"),
    pytest.param("http://[64:ff9b::7f00:1]/", NOT_PUBLIC, id="NAT64"),
    pytest.param("http://[2002:7f00:1::]/", NOT_PUBLIC, id="6to4"),
    pytest.param("http://[2001:0:7f00:1::]/", NOT_PUBLIC, id="Teredo"),
    pytest.param("http://[fd00::1]/", NOT_PUBLIC, id="unique local"),
    pytest.param("http://[fe80::1]/", NOT_PUBLIC, id="link-local"),
    pytest.param("http://[fec0::1]/", NOT_PUBLIC, id="site-local"),
    pytest.param("http://[ff02::1]/", NOT_PUBLIC, id="multicast"),
    pytest.param("http://localhost/", NOT_PUBLIC, id="localhost"),
    pytest.param("http://localhost./", NOT_PUBLIC, id="localhost with a dot at its end"),
    pytest.param("http://LOCALHOST/", NOT_PUBLIC, id="localhost in capitals"),
    pytest.param("http://127。0。0。1/", NOT_PUBLIC, id="ideographic dots"),
    pytest.param("http://[fe80::1%25eth0]/", NOT_A_HOST, id="link-local with zone"),
    pytest.param("http://user@pets.example/", NO_USER, id="user"),
    pytest.param("http://user:password@pets.example/", NO_USER, id="user and password"),
    pytest.param("http://pets.example@127.0.0.1/", NO_USER, id="a name as user of an address"),
    pytest.param("http://127.0.0.1%2f@pets.example/", NO_USER, id="an address as user of a name"),
    pytest.param("http://pets.example:8000/", NOT_A_PORT, id="another port"),
    pytest.param("http://pets.example:22/", NOT_A_PORT, id="the port of ssh"),
    pytest.param("http://pets.example:0/", NOT_A_PORT, id="port 0"),
    pytest.param("http://pets.example:99999/", NOT_A_PORT, id="a port too large"),
    pytest.param("http://127%2e0.0.1/", NOT_A_HOST, id="percent-encoded dot"),
    pytest.param("http://%31%32%37.0.0.1/", NOT_A_HOST, id="percent-encoded digits"),
    pytest.param("http://pets.example%00.evil.example/", NOT_A_HOST, id="percent-encoded zero byte"),
    pytest.param("http://pets.example,127.0.0.1/", NOT_A_HOST, id="two hosts"),
    pytest.param("http://nowhere.example/", NO_ADDRESS, id="a name without address"),
    pytest.param(f"http://{'a' * 64}.example/", NO_ADDRESS, id="a label too long"),
    pytest.param(f"http://{'a.' * 200}example/", NO_ADDRESS, id="a name too long"),
    pytest.param("http://pets..example/", NO_ADDRESS, id="an empty label"),
]
MALFORMED_URLS = [
    pytest.param("http://0177.0.0.1/", id="octal part"),
    pytest.param("http://127.0.0.01/", id="octal last part"),
    pytest.param("http://256.0.0.1/", id="a part too large"),
    pytest.param("http://[::1/", id="bracket not closed"),
    pytest.param("http://[127.0.0.1]/", id="IPv4 in brackets"),
    pytest.param("http://１２７.0.0.1/", id="full-width digits"),
    pytest.param("http://①②⑦.0.0.1/", id="digits in circles"),
    pytest.param("http://xn--a/", id="punycode that is none"),
    pytest.param("http://pets.example\\@127.0.0.1/", id="backslash before the host"),
    pytest.param("http://127.0.0.1\\@pets.example/", id="backslash after the host"),
    pytest.param("http:\\\\127.0.0.1\\", id="backslashes for slashes"),
    pytest.param("http:/\\127.0.0.1/", id="slash and backslash"),
    pytest.param(" http://127.0.0.1/", id="blank before"),
    pytest.param("http://127.0.0.1 /", id="blank in the host"),
    pytest.param("http://pets.example/\t", id="tab"),
    pytest.param("http://127.0.0.1\r\nHost: pets.example/", id="line break"),
    pytest.param("http://pets.example\x00/", id="zero byte"),
    pytest.param("http://pets.example:port/", id="a port that is no number"),
    pytest.param("http://:80/", id="no host"),
    pytest.param("http:///127.0.0.1/", id="three slashes"),
    pytest.param("//127.0.0.1/", id="no scheme"),
    pytest.param("127.0.0.1", id="only a host"),
    pytest.param("file:///etc/passwd", id="file"),
    pytest.param("file://localhost/etc/passwd", id="file with a host"),
    pytest.param("ftp://pets.example/", id="ftp"),
    pytest.param("gopher://127.0.0.1:6379/_SET", id="gopher"),
    pytest.param("data:text/plain,secret", id="data"),
    pytest.param("unix:///run/docker.sock", id="unix"),
    pytest.param("http+unix://%2Frun%2Fdocker.sock/", id="http over a unix socket"),
    pytest.param("ws://pets.example/", id="websocket"),
    pytest.param("jar:http://127.0.0.1!/", id="jar"),
]


@pytest.fixture
def pets(serve: Serve, internet: Internet) -> Server:
    """A server that is reached under a public name and address."""
    server = serve({"/film.mp4": reply(200, b"film", content_type="video/mp4")})
    internet.add("pets.example", server)
    return server


@pytest.mark.parametrize(("url", "reason"), REFUSED_URLS)
async def test_debug_head_refuses_a_url(
    url: str, reason: str, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """Whatever form of address a client finds, nothing is connected to."""
    answer = await head(client, url)

    assert reason in answer.json()["detail"]
    assert answer.status_code == (500 if reason == NO_ADDRESS else 400)
    assert answer.json()["category"] == ("resource" if reason == NO_ADDRESS else "validation")
    assert internet.connected == []
    assert internet.inside.was_silent()


@pytest.mark.parametrize("url", MALFORMED_URLS)
async def test_debug_head_refuses_what_is_no_url(
    url: str, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """What is not an absolute http(s) URL is invalid input, and nothing is connected to."""
    answer = await head(client, url)

    assert (answer.status_code, answer.json()["category"]) == (400, "validation")
    assert answer.json()["detail"] == NOT_A_URL
    assert internet.connected == []
    assert internet.inside.was_silent()


@pytest.mark.parametrize("url", [pytest.param(row.values[0], id=row.id) for row in (*REFUSED_URLS, *MALFORMED_URLS)])
async def test_a_download_refuses_the_same_urls(
    url: str, client: httpx.AsyncClient, pets: Server, internet: Internet, environ: Environ, tmp_path: Path
) -> None:
    """What a model gives out as its film's URL meets the same guard."""
    with pytest.raises(main.ResourceFailed):
        await main.download(url, tmp_path / "film.mp4")

    assert internet.connected == []
    assert internet.inside.was_silent()


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://pets.example/film.mp4", id="a name"),
        pytest.param("http://PETS.example/film.mp4", id="a name in capitals"),
        pytest.param("http://pets.example:80/film.mp4", id="port 80"),
        pytest.param("http://pets.example:443/film.mp4", id="port 443"),
        pytest.param("http://pets.example/film.mp4#start", id="a fragment"),
        pytest.param(f"http://{PUBLIC}/film.mp4", id="an address"),
        pytest.param("http://[2606:4700:4700::1111]/film.mp4", id="an IPv6 address"),
        pytest.param("http://my_pets.example/film.mp4", id="a name with an underscore"),
        pytest.param("http://xn--bcher-kva.example/film.mp4", id="an international name as sent"),
        pytest.param("http://bücher.example/film.mp4", id="an international name"),
        pytest.param("http://4pets.example/film.mp4", id="a name that begins with a digit"),
        pytest.param("http://1.2.3.4.example/film.mp4", id="a name that begins like an address"),
    ],
)
async def test_public_urls_are_fetched(url: str, client: httpx.AsyncClient, pets: Server, internet: Internet) -> None:
    """The guard lets pass what is public."""
    for name in ("my_pets.example", "xn--bcher-kva.example", "4pets.example", "1.2.3.4.example"):
        internet.add(name, pets)
    internet.addresses["2606:4700:4700::1111"] = pets.port

    answer = await head(client, url)

    assert answer.json() == {"status": 200, "content_type": "video/mp4", "bytes": 4}
    assert pets.requests == ["HEAD /film.mp4"]


async def test_the_guard_stands_in_the_running_service(start_service: Callable[..., Any]) -> None:
    """A real process, with the event loop and the resolver that it has, refuses the same addresses."""
    service = start_service(ALLOW_PRIVATE_URLS="")
    urls = ["http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://[::ffff:7f00:1]/", "http://0.0.0.0/"]

    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as outside:
        answers = [(await head(outside, url)).json()["detail"] for url in urls]

    assert answers == [NOT_PUBLIC] * len(urls)


# ----------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param([PUBLIC, "127.0.0.1"], id="public first"),
        pytest.param(["127.0.0.1", PUBLIC], id="private first"),
        pytest.param([PUBLIC, "::1"], id="the other family"),
        pytest.param([PUBLIC, "8.8.8.8", "10.0.0.1"], id="last of three"),
    ],
)
async def test_a_name_with_one_inner_address_is_refused_whole(
    addresses: list[str], client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """One inner address among public ones is enough: nothing is connected to."""
    internet.names["pets.example"] = [addresses]

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_PUBLIC)
    assert internet.connected == []
    assert internet.inside.was_silent()


async def test_a_name_is_looked_up_once_and_that_address_used(
    client: httpx.AsyncClient, pets: Server, internet: Internet, tmp_path: Path
) -> None:
    """A name that turns inwards between check and use gains nothing: there is no second look-up."""
    internet.names["pets.example"] = [[PUBLIC], ["127.0.0.1"]]

    await main.download("http://pets.example/film.mp4", tmp_path / "film.mp4")

    assert (tmp_path / "film.mp4").read_bytes() == b"film"
    assert internet.looked_up == ["pets.example"]
    assert internet.connected == [PUBLIC]
    assert internet.inside.was_silent()


async def test_a_name_is_checked_again_for_each_connection(
    client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """A name that was public a moment ago is not taken at its word."""
    internet.names["pets.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert (await head(client, "http://pets.example/film.mp4")).status_code == 200

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_PUBLIC)
    assert internet.connected == [PUBLIC]
    assert internet.inside.was_silent()


async def test_the_next_address_is_tried(client: httpx.AsyncClient, pets: Server, internet: Internet) -> None:
    """Of several public addresses the first that takes the connection is used."""
    internet.names["pets.example"] = [["2606:4700:4700::1111", PUBLIC]]
    internet.addresses["2606:4700:4700::1111"] = None

    answer = await head(client, "http://pets.example/film.mp4")

    assert answer.json()["status"] == 200
    assert internet.connected == ["2606:4700:4700::1111", PUBLIC]


async def test_tls_asks_for_the_name(serve: Serve, client: httpx.AsyncClient, internet: Internet) -> None:
    """The connection goes to the address that was checked, the certificate must be the name's."""
    hello: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        connection, _ = listener.accept()
        with connection:
            hello.append(connection.recv(4096))

    listening = threading.Thread(target=listen)
    listening.start()
    internet.names["pets.example"] = [[PUBLIC]]
    internet.addresses[PUBLIC] = listener.getsockname()[1]

    answer = await head(client, "https://pets.example/film.mp4")
    await asyncio.to_thread(listening.join, 5)
    listener.close()

    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert b"pets.example" in hello[0]


async def test_a_slow_look_up_is_not_waited_for(
    client: httpx.AsyncClient, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that does not answer holds no request longer than the time limit."""
    answered = threading.Event()

    def never(*args: Any, **options: Any) -> list[Any]:
        answered.wait(5)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(main, "HEAD_TIMEOUT_S", 0.1)
    try:
        answer = await head(client, "http://pets.example/")
    finally:
        answered.set()

    assert (answer.status_code, answer.json()["detail"]) == (500, "The URL did not answer within 0.1 s.")


async def test_a_slow_look_up_has_the_time_of_a_connection(
    monkeypatch: pytest.MonkeyPatch, environ: Environ, tmp_path: Path
) -> None:
    """Looking up a name is part of connecting: it takes no longer, and counts as not connected."""
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: answered.wait(5) and [])
    monkeypatch.setattr(main, "TIMEOUT", httpx.Timeout(5, connect=0.05))
    monkeypatch.setattr(httpx, "create_ssl_context", network.ssl_context)
    try:
        with pytest.raises(main.ResourceFailed, match="ConnectTimeout looking up pets.example took too long"):
            await main.download("http://pets.example/film.mp4", tmp_path / "film.mp4")
    finally:
        answered.set()


# ----------------------------------------------------------------------------------------------------------------
# Redirects
# ----------------------------------------------------------------------------------------------------------------

INWARDS = [
    pytest.param("http://127.0.0.1/", NOT_PUBLIC, id="loopback"),
    pytest.param("http://169.254.169.254/latest/meta-data/", NOT_PUBLIC, id="metadata"),
    pytest.param("http://[::ffff:7f00:1]/", NOT_PUBLIC, id="mapped loopback"),
    pytest.param("//127.0.0.1/", NOT_PUBLIC, id="without scheme"),
    pytest.param("http://inner.example/", NOT_PUBLIC, id="a name that leads inwards"),
    pytest.param("http://2130706433/", NOT_PLAIN, id="one number"),
    pytest.param("http://pets.example:8000/", NOT_A_PORT, id="another port"),
    pytest.param("http://pets.example:99999/", NOT_A_PORT, id="a port too large"),
    pytest.param("http://user@pets.example/", NO_USER, id="user"),
    pytest.param("http://127%2e0.0.1/", NOT_A_HOST, id="percent-encoded dot"),
    pytest.param("ftp://pets.example/", "Only http and https URLs are fetched.", id="ftp"),
    pytest.param("file:///etc/passwd", "Only http and https URLs are fetched.", id="file"),
    pytest.param("gopher://127.0.0.1:6379/_", "Only http and https URLs are fetched.", id="gopher"),
]
NONSENSE = [
    pytest.param("http://[::1", id="bracket not closed"),
    pytest.param("http://xn--a/", id="punycode that is none"),
    pytest.param("http://\xe4\xb8\x80\xff/", id="bytes that are no text"),
]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_inwards_is_refused_with_every_status(
    status: int, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """The guard stands before each hop."""
    pets.answers["/film.mp4"] = [redirect("http://127.0.0.1/", status)]

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_PUBLIC)
    assert pets.requests == ["HEAD /film.mp4"]
    assert internet.inside.was_silent()


@pytest.mark.parametrize(("location", "reason"), INWARDS)
async def test_debug_head_follows_no_redirect_inwards(
    location: str, reason: str, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """A redirect to what may not be fetched is refused like the URL itself."""
    internet.names["inner.example"] = [["10.0.0.1"]]
    pets.answers["/film.mp4"] = [redirect(location)]

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, reason)
    assert internet.connected == [PUBLIC]
    assert internet.inside.was_silent()


@pytest.mark.parametrize(("location", "reason"), INWARDS)
async def test_a_download_follows_no_redirect_inwards(
    location: str,
    reason: str,
    client: httpx.AsyncClient,
    pets: Server,
    internet: Internet,
    environ: Environ,
    tmp_path: Path,
) -> None:
    """A film that is said to be inside is a failed download, not repeated, and nothing is written."""
    internet.names["inner.example"] = [["10.0.0.1"]]
    pets.answers["/film.mp4"] = [redirect(location)]

    with pytest.raises(main.ResourceFailed) as failure:
        await main.download("http://pets.example/film.mp4", tmp_path / "film.mp4")

    assert failure.value.detail == f"The file at pets.example may not be fetched. {reason}"
    assert pets.requests == ["GET /film.mp4"]
    assert internet.inside.was_silent()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", NONSENSE)
async def test_a_redirect_to_nonsense_is_a_failed_answer(
    location: str, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """A Location that nobody can read is the remote server's failure, not an unforeseen one."""
    pets.answers["/film.mp4"] = [redirect(location)]

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"].startswith("The URL did not answer: ")
    assert internet.inside.was_silent()


async def test_the_last_of_several_redirects_is_checked_too(
    serve: Serve, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """Public hops before it earn the inner one nothing."""
    internet.add("other.example", serve({"/": redirect("http://127.0.0.1/")}), "8.8.8.8")
    pets.answers |= {"/film.mp4": [redirect("/2")], "/2": [redirect("http://other.example/")]}

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_PUBLIC)
    assert internet.connected == [PUBLIC, PUBLIC, "8.8.8.8"]
    assert internet.inside.was_silent()


async def test_a_redirect_to_its_own_name_is_looked_up_again(
    client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """A name that turns inwards between two hops is refused at the second."""
    internet.names["pets.example"] = [[PUBLIC], ["127.0.0.1"]]
    pets.answers["/film.mp4"] = [redirect("/again")]

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_PUBLIC)
    assert internet.connected == [PUBLIC]
    assert internet.inside.was_silent()


@respx.mock
async def test_the_guard_works_together_with_respx(client: httpx.AsyncClient, internet: Internet) -> None:
    """Tests that answer in place of a public server still meet the real guard at the next hop."""
    respx.head("http://pets.example/film.mp4").respond(302, headers={"Location": "http://127.0.0.1/"})
    respx.route(host="127.0.0.1").pass_through()

    answer = await head(client, "http://pets.example/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_PUBLIC)
    assert internet.inside.was_silent()


@respx.mock
async def test_respx_does_not_take_the_guard_away(client: httpx.AsyncClient) -> None:
    """A URL that is refused by its form is refused although respx would answer."""
    route = respx.route().respond(200)

    answer = await head(client, "http://pets.example:8000/film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_A_PORT)
    assert not route.called


# ----------------------------------------------------------------------------------------------------------------
# Proxies, and the owner's own addresses
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"])
async def test_a_proxy_of_the_environment_is_not_used(
    name: str, pets: Server, internet: Internet, environ: Environ, tmp_path: Path
) -> None:
    """Whatever proxy the machine has, the service connects by itself, or the guard would look at the proxy's address."""
    environ(**{name: internet.inside.url}, NO_PROXY="", no_proxy="")

    async with main.lifespan(main.app):
        await main.download("http://pets.example/film.mp4", tmp_path / "film.mp4")

    assert pets.requests == ["GET /film.mp4"]
    assert internet.inside.was_silent()


async def test_private_urls_can_be_allowed(
    serve: Serve, client: httpx.AsyncClient, environ: Environ, tmp_path: Path
) -> None:
    """ALLOW_PRIVATE_URLS lets the sandbox be fetched from, on any port."""
    environ(ALLOW_PRIVATE_URLS="true")
    server = serve({"/film.mp4": reply(200, b"film")})

    answer = await head(client, f"{server.url}/film.mp4")
    await main.download(f"{server.url}/film.mp4", tmp_path / "film.mp4")

    assert answer.json() == {"status": 200, "content_type": None, "bytes": 4}
    assert (tmp_path / "film.mp4").read_bytes() == b"film"


async def test_private_urls_are_not_allowed_by_default(
    serve: Serve, client: httpx.AsyncClient, environ: Environ, tmp_path: Path
) -> None:
    """Without ALLOW_PRIVATE_URLS the same server hears nothing."""
    server = serve({"/film.mp4": reply(200, b"film")})

    answer = await head(client, f"{server.url}/film.mp4")
    with pytest.raises(main.ResourceFailed, match="may not be fetched"):
        await main.download(f"{server.url}/film.mp4", tmp_path / "film.mp4")

    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_A_PORT)
    assert server.was_silent()


@pytest.mark.parametrize(
    ("storage", "url"),
    [
        pytest.param("http://10.1.2.3:9000", "http://10.1.2.3:9000", id="as written"),
        pytest.param("http://10.1.2.3:9000/", "http://10.1.2.3:9000", id="a slash at its end"),
        pytest.param("http://10.1.2.3:80", "http://10.1.2.3", id="the usual port"),
        pytest.param("http://Storage.Internal:9000", "http://storage.internal:9000", id="capitals"),
        pytest.param("http://10.1.2.3:9000/self/hosted", "http://10.1.2.3:9000/self/hosted", id="under a path"),
    ],
)
async def test_the_owners_storage_is_trusted(
    storage: str,
    url: str,
    serve: Serve,
    client: httpx.AsyncClient,
    internet: Internet,
    environ: Environ,
    tmp_path: Path,
) -> None:
    """A storage inside the owner's network works, however its address is written."""
    path = httpx.URL(url).path.rstrip("/") + "/storage/v1/object"
    server = serve(
        {
            f"POST {path}/pets/a.mp3": reply(200, b'{"Key": "pets/a.mp3"}'),
            f"GET {path}/public/pets/a.mp3": reply(200, b"ok"),
        }
    )
    internet.addresses |= {"10.1.2.3": server.port, "Storage.Internal": server.port, "storage.internal": server.port}
    environ(SUPABASE_URL=storage, SUPABASE_SERVICE_ROLE="service-role-key")

    await main.download(await main.supabase_upload("a.mp3", b"speech", "audio/mpeg"), tmp_path / "speech")

    assert (tmp_path / "speech").read_bytes() == b"ok"
    assert internet.inside.was_silent()


@pytest.mark.parametrize("variable", ["ELEVEN_BASE_URL", "REPLICATE_BASE_URL"])
async def test_the_owners_base_urls_are_trusted(variable: str, serve: Serve, environ: Environ) -> None:
    """A stand-in on loopback takes a provider's place without ALLOW_PRIVATE_URLS."""
    speech, model = (
        reply(200, b"ID3 speech"),
        reply(200, b'{"id": "p1", "status": "succeeded", "output": "https://x/"}'),
    )
    server = serve({"/v1/text-to-speech/voice?output_format=mp3_44100_64": speech, "/v1/predictions/p1": model})
    environ(**{variable: server.url}, ELEVEN_API_KEY="eleven-key", REPLICATE_API_TOKEN="replicate-token")

    if variable == "ELEVEN_BASE_URL":
        assert await main.elevenlabs_tts_bytes("Hello", "voice") == b"ID3 speech"
    else:
        assert (await main.call_replicate("GET", "predictions/p1", main.READ_RETRY)).status == 200


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://10.1.2.3:9000/admin", id="another path"),
        pytest.param("http://10.1.2.3:9000/storage/v1/object", id="the path itself"),
        pytest.param("http://10.1.2.3:9000/storage/v1/objects/x", id="a path that begins alike"),
        pytest.param("http://10.1.2.3:9000/storage/v1/object/../../../admin", id="up and out"),
        pytest.param("http://10.1.2.3:9000/storage/v1/object/%2e%2e/%2E./.%2e/admin", id="up and out, encoded"),
        pytest.param("http://10.1.2.3:9000/storage/v1/object/..%2fadmin", id="up with an encoded slash"),
        pytest.param("http://10.1.2.3:9000/storage/v1/object/..%5cadmin", id="up with an encoded backslash"),
        pytest.param("http://10.1.2.3:9001/storage/v1/object/x", id="another port"),
        pytest.param("http://10.1.2.3/storage/v1/object/x", id="no port"),
        pytest.param("https://10.1.2.3:9000/storage/v1/object/x", id="another scheme"),
        pytest.param("http://user@10.1.2.3:9000/storage/v1/object/x", id="user"),
        pytest.param("http://10.1.2.3:9000@pets.example/storage/v1/object/x", id="as user of another host"),
        pytest.param("http://10.1.2.30:9000/storage/v1/object/x", id="an address that begins alike"),
        pytest.param("http://10.1.2.4:9000/storage/v1/object/x", id="another address"),
    ],
)
async def test_the_owners_storage_opens_no_other_door(
    url: str, client: httpx.AsyncClient, internet: Internet, environ: Environ
) -> None:
    """Trust ends with the storage's own objects."""
    environ(SUPABASE_URL="http://10.1.2.3:9000")

    answer = await head(client, url)

    assert (answer.status_code, answer.json()["category"]) == (400, "validation")
    assert internet.connected == []
    assert internet.inside.was_silent()


# ----------------------------------------------------------------------------------------------------------------
# Keys stay with their providers
# ----------------------------------------------------------------------------------------------------------------

KEYS = {
    "ELEVEN_API_KEY": "eleven-key",
    "REPLICATE_API_TOKEN": "replicate-token",
    "SUPABASE_SERVICE_ROLE": "service-role-key",
}


async def speak() -> Any:
    """A call with ElevenLabs' key."""
    return await main.elevenlabs_tts_bytes("Hello", "voice")


async def make_film() -> Any:
    """A call with Replicate's token."""
    job = main.JobPromptOnly(image_url="https://pets.example/pet.jpg", prompt="The cat talks")
    return await main.hailuo_video_from_prompt(job)


async def look_up_model() -> Any:
    """A read with Replicate's token."""
    return await main.find_model("owner/name")


async def upload() -> Any:
    """A call with Supabase's key."""
    return await main.supabase_upload("audio/a.mp3", b"speech", "audio/mpeg")


async def upload_file() -> Any:
    """A streamed call with Supabase's key."""
    return await main.supabase_upload("audio/a.mp3", Path(__file__), "audio/mpeg")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("call", [speak, make_film, look_up_model, upload, upload_file])
async def test_no_key_follows_a_redirect(
    call: Callable[[], Any], status: int, serve: Serve, client: httpx.AsyncClient, internet: Internet, environ: Environ
) -> None:
    """A provider that redirects is refused: no key goes anywhere but to its own API."""
    thief = serve({})
    internet.add("thief.example", thief)
    anywhere = redirect("http://thief.example/", status)
    provider = serve(
        {
            "/v1/text-to-speech/voice?output_format=mp3_44100_64": anywhere,
            "/v1/models/minimax/hailuo-02/predictions": anywhere,
            "/v1/models/owner/name": anywhere,
            "/storage/v1/object/pets/audio/a.mp3": anywhere,
        }
    )
    environ(**KEYS, ELEVEN_BASE_URL=provider.url, REPLICATE_BASE_URL=provider.url, SUPABASE_URL=provider.url)

    with pytest.raises((main.ProviderFailed, main.ResourceFailed), match=f"answered {status}: "):
        await call()

    assert len(provider.requests) == 1
    assert thief.was_silent()


async def test_a_download_carries_no_key(
    serve: Serve, client: httpx.AsyncClient, pets: Server, internet: Internet, environ: Environ, tmp_path: Path
) -> None:
    """Neither the storage's public files nor what they redirect to are asked for with a key."""
    storage = serve({"/storage/v1/object/public/pets/a.mp3": redirect("http://pets.example/film.mp4")})
    environ(**KEYS, SUPABASE_URL=storage.url)

    await main.download(f"{storage.url}/storage/v1/object/public/pets/a.mp3", tmp_path / "speech")

    heads = "\n".join([*storage.heard, *pets.heard]).lower()
    assert len(storage.heard) == len(pets.heard) == 1
    assert not any(key in heads for key in (*KEYS.values(), "authorization:", "apikey:", "xi-api-key:", "cookie:"))


async def test_no_cookie_is_kept(client: httpx.AsyncClient, pets: Server, internet: Internet) -> None:
    """What one server sets is not sent to it again: requests of different clients have nothing in common."""
    pets.answers["/film.mp4"] = [reply(200, set_cookie="client=1; Path=/")]

    for _ in range(2):
        assert (await head(client, "http://pets.example/film.mp4")).status_code == 200

    assert "cookie:" not in pets.heard[1].lower()


def test_every_refused_network_is_refused_to_its_ends() -> None:
    """First and last address of each network that the guard names are refused."""
    ends = [(str(network[0]), str(network[-1])) for network in main.BLOCKED_NETWORKS]

    assert not any(main.is_public(address) for pair in ends for address in pair)
    assert all(
        isinstance(ipaddress.ip_address(first), ipaddress.IPv4Address | ipaddress.IPv6Address) for first, _ in ends
    )
