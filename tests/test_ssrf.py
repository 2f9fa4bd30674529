"""SSRF guard: URLs of clients and models are fetched from public addresses only, and keys go to their providers only."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpcore
import httpx
import pytest

import main
from tests.support import network
from tests.support.application import SECRETS, in_lifespan, log_lines, use_settings
from tests.support.network import (
    PATH,
    PUBLIC,
    URL,
    Answers,
    Internet,
    Server,
    debug_head,
    redirect,
    reply,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]

serve, internal_server, internet = network.serve, network.internal_server, network.internet
client, pets = network.client, network.pets

Serve = Callable[[Answers], Server]
Refused = Callable[[str], Awaitable[list[str]]]

NOT_PUBLIC = "The URL leads to an address that is not public."
NOT_PLAIN = "The URL's address is not written in its plain form."
NOT_A_HOST = "The URL's host is not a plain name or address."
NOT_A_PORT = "Only the ports 80 and 443 are fetched from."
NOT_HTTP = "Only http and https URLs are fetched."
NO_USER = "A URL with a user name or password is not fetched."


@pytest.fixture
def refused(client: httpx.AsyncClient, internet: Internet, tmp_path: Path) -> Refused:
    """Request a URL by /debug/head and by a download; return both details, and check that nothing is reached."""

    async def ask(url: str) -> list[str]:
        answer = await debug_head(client, url)
        with pytest.raises(main.ResourceFailed) as failed:
            await main.download(url, tmp_path / "video.mp4")
        assert (answer.status_code, answer.json()["category"]) == (400, "validation")
        assert internet.internal_server.was_never_contacted()
        assert list(tmp_path.iterdir()) == []
        return [answer.json()["detail"], failed.value.detail]

    return ask


# Addresses


@pytest.mark.parametrize(
    "networks",
    [
        pytest.param("127.0.0.0/8 0.0.0.0/8 :: ::1", id="loopback and none"),
        pytest.param("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7", id="private"),
        pytest.param("169.254.0.0/16 fe80::/10 fec0::/10", id="link-local and site-local"),
        pytest.param("169.254.169.254 100.100.100.200 fd00:ec2::254", id="a cloud's metadata"),
        pytest.param("100.64.0.0/10", id="carrier-grade NAT"),
        pytest.param(
            "192.0.0.0/24 192.0.0.9 2001::/23 2001:1::1 2001:10::1 2001:20::1",
            id="protocol assignments",
        ),
        pytest.param("2001:0:4136:e378:8000:63bf:3fff:fdd2", id="Teredo"),
        pytest.param("2002::/16 2002:7f00:1::1 2002:808:808::1 192.88.99.0/24", id="6to4"),
        pytest.param(
            "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20",
            id="documentation",
        ),
        pytest.param("224.0.0.0/4 239.255.255.250 ff00::/8 ff02::1 ff0e::1", id="multicast"),
        pytest.param(
            "198.18.0.0/15 240.0.0.0/4 100::/64 5f00::/16",
            id="benchmark, reserved, discarded, routing",
        ),
        pytest.param(
            "::/96 ::8.8.8.8 ::ffff:0:0/96 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1",
            id="IPv4 written as IPv6",
        ),
        pytest.param("64:ff9b::/96 64:ff9b::8.8.8.8 64:ff9b:1::/48", id="NAT64"),
    ],
)
def test_private_networks_are_not_public(networks: str) -> None:
    """Both ends of each network are rejected, by every version of Python alike."""
    ends = [
        str(network[end])
        for network in map(ipaddress.ip_network, networks.split())
        for end in (0, -1)
    ]
    assert [address for address in ends if main.is_public(address)] == []


def test_public_addresses_are_public() -> None:
    """Addresses of the public internet pass, up to the edges of the rejected networks."""
    addresses = (
        f"8.8.8.8 {PUBLIC} 9.255.255.255 11.0.0.0 172.15.255.255 172.32.0.0 100.63.255.255 100.128.0.0 192.0.1.1 "
        "198.17.255.255 198.20.0.0 223.255.255.255 2606:4700:4700::1111 2a00:1450:4001:82a::200e 2001:200::1 2003::1"
    )
    assert [address for address in addresses.split() if not main.is_public(address)] == []


# URLs

REFUSED_HOSTS = {
    NOT_PUBLIC: "pets.example@127.0.0.1 localhost LOCALHOST. pets.localhost a.b.localhost. 127.0.0.1 127.0.0.1. 127.0.0.1.. 0.0.0.0 10.0.0.1 169.254.169.254 999.1.1.1. 127。0。0。1 [::1] [::] [0:0:0:0:0:0:0:1] "
    "[::ffff:7f00:1] [::7f00:1] [64:ff9b::7f00:1] [2002:7f00:1::] [2001:0:7f00:1::] [fd00::1] [fe80::1] [ff02::1]",
    NOT_PLAIN: "2130706433 2130706433. 134744072 017700000001 0x7f000001 0X7F000001 0x pets.example.0x7f 0x7f.0.0.1 "
    "127.0.0.0x1 127.1 127.0.1 0 1.2.3.4.5 [::ffff:127.0.0.1] [::127.0.0.1]",
    NOT_A_HOST: "[fe80::1%25eth0] 127%2e0.0.1 %31%32%37.0.0.1 pets.example%00.evil.example pets.example,127.0.0.1",
    NO_USER: "user@pets.example user:password@pets.example 127.0.0.1%2f@pets.example",
    NOT_A_PORT: "pets.example:8000 pets.example:22 pets.example:0 pets.example:99999",
}


@pytest.mark.parametrize(
    ("host", "reason"),
    [(host, reason) for reason, hosts in REFUSED_HOSTS.items() for host in hosts.split()],
)
async def test_a_url_to_a_private_address_is_rejected(
    host: str, reason: str, refused: Refused, pets: Server, internet: Internet
) -> None:
    """However the address is written, no connection is made."""
    assert all(reason in detail for detail in await refused(f"http://{host}/"))
    assert internet.connected == []
    assert pets.was_never_contacted()


@pytest.mark.parametrize(
    "url",
    [
        *"http://0177.0.0.1/ http://127.0.0.01/ http://256.0.0.1/ http://[::1/ http://[127.0.0.1]/ http://xn--a/".split(),
        *"http://１２７.0.0.1/ http://①②⑦.0.0.1/ http://pets.example:port/ http://:80/ http:///127.0.0.1/".split(),
        *r"http://pets.example\@127.0.0.1/ http://127.0.0.1\@pets.example/ http:\\127.0.0.1\ http:/\127.0.0.1/".split(),
        *"//127.0.0.1/ 127.0.0.1 file:///etc/passwd file://localhost/etc/passwd ftp://pets.example/ data:,a".split(),
        *"gopher://127.0.0.1:6379/_SET unix:///run/docker.sock http+unix://%2Frun%2Fdocker.sock/ ws://pets.example/".split(),
        " http://127.0.0.1/",
        "http://127.0.0.1 /",
        "http://pets.example/\t",
        "jar:http://127.0.0.1!/",
        "http://127.0.0.1\r\nHost: pets.example/",
        "http://pets.example\x00/",
    ],
)
async def test_an_invalid_url_is_rejected(
    url: str, refused: Refused, pets: Server, internet: Internet
) -> None:
    """What is not an absolute http(s) URL is invalid input, and no connection is made."""
    looked_at, downloaded = await refused(url)
    assert looked_at.startswith("url: ")
    assert downloaded == "The URL of a file to download is invalid."
    assert internet.connected == []


NOWHERE = ("nowhere.example", "pets..example", f"{'a' * 64}.example", f"{'a.' * 200}example")
NONSENSE = ("http://[::1", "http://xn--a/", "http://\xe4\xb8\x80\xff/")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param("http://silent.example/", "ConnectError ", id="nobody listens"),
        *((f"http://{host}/", f"ConnectError {host} has no address"[:300]) for host in NOWHERE),
        *(
            pytest.param(f"http://pets.example/{number}", "", id=to)
            for number, to in enumerate(NONSENSE)
        ),
    ],
)
async def test_an_unreachable_url_is_a_failed_resource(
    url: str, reason: str, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """An unknown name, a silent address and an invalid redirect are each a 500 with the reason."""
    internet.names["silent.example"], internet.addresses["8.8.8.8"] = [["8.8.8.8"]], None
    pets.answers |= {f"/{number}": [redirect(location)] for number, location in enumerate(NONSENSE)}
    answer = await debug_head(client, url)
    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert answer.json()["detail"].startswith(f"The URL did not answer: {reason}"[:300])
    assert internet.internal_server.was_never_contacted()


@pytest.mark.parametrize(
    "host",
    [
        "pets.example",
        "PETS.example",
        "pets.example:80",
        "pets.example:443",
        PUBLIC,
        "[2606:4700:4700::1111]",
        "my_pets.example",
        "xn--bcher-kva.example",
        "bücher.example",
        "4pets.example",
        "1.2.3.4.example",
    ],
)
async def test_public_urls_are_fetched(
    host: str, client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """The guard lets public addresses pass."""
    for name in ("my_pets.example", "xn--bcher-kva.example", "4pets.example", "1.2.3.4.example"):
        internet.add(name, pets)
    internet.addresses["2606:4700:4700::1111"] = pets.port
    answer = await debug_head(client, f"http://{host}{PATH}#start")
    assert answer.json() == {"status": 200, "content_type": "video/mp4", "bytes": 5}
    assert pets.requests == [f"HEAD {PATH}"]


# Names


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param(["127.0.0.1"], id="loopback"),
        pytest.param(["fe80::1%1"], id="with a zone"),
        pytest.param(["::ffff:127.0.0.1"], id="mapped loopback"),
        pytest.param([PUBLIC, "127.0.0.1"], id="public first"),
        pytest.param(["127.0.0.1", PUBLIC], id="private first"),
        pytest.param([PUBLIC, "8.8.8.8", "::1"], id="last of three, the other family"),
    ],
)
async def test_a_name_with_one_private_address_is_rejected(
    addresses: list[str], refused: Refused, pets: Server, internet: Internet
) -> None:
    """One private address among public ones is enough."""
    internet.names["pets.example"] = [addresses]
    assert all(NOT_PUBLIC in detail for detail in await refused(URL))
    assert internet.connected == []


async def test_a_name_is_looked_up_once_and_that_address_used(
    pets: Server, internet: Internet, tmp_path: Path
) -> None:
    """DNS rebinding has no effect: there is no second look-up between check and use."""
    internet.names["pets.example"] = [[PUBLIC], ["127.0.0.1"]]
    await main.download(URL, tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == b"video"
    assert (internet.looked_up, internet.connected) == (["pets.example"], [PUBLIC])


@pytest.mark.parametrize("first", ["refuses", "stays silent"])
async def test_the_next_address_is_tried(
    first: str, serve: Serve, internet: Internet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of several public addresses the first that accepts the connection in time is used."""
    internet.add("pets.example", serve({PATH: reply(200, b"video")}))
    internet.names["pets.example"], internet.addresses["8.8.8.8"] = [["8.8.8.8", PUBLIC]], None

    async def connect(remote_host: Any, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(60 if (remote_host, first) == ("8.8.8.8", "stays silent") else 0)
        return await internet.connect(remote_host, *args, **options)

    monkeypatch.setattr("anyio.connect_tcp", connect)
    monkeypatch.setattr(main, "TIMEOUT", httpx.Timeout(5, connect=0.3))
    await in_lifespan(main.download(URL, tmp_path / "video.mp4"))
    assert (internet.looked_up, internet.connected[-1]) == (["pets.example"], PUBLIC)


async def test_tls_uses_the_name(client: httpx.AsyncClient, internet: Internet) -> None:
    """The connection goes to the checked address, and the certificate must have the name."""
    hello: list[bytes] = []

    def listen() -> None:
        connection, _ = listener.accept()
        with connection:
            hello.append(connection.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listening = threading.Thread(target=listen)
        listening.start()
        internet.names["pets.example"] = [[PUBLIC]]
        internet.addresses[PUBLIC] = listener.getsockname()[1]
        answer = await debug_head(client, "https://pets.example/")
        await asyncio.to_thread(listening.join, 5)

    assert (answer.status_code, answer.json()["category"]) == (500, "resource")
    assert b"pets.example" in hello[0]


async def test_a_name_look_up_counts_as_connecting(
    serve: Serve,
    internet: Internet,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It takes no longer than the connect timeout, and fails as a connection that was not made."""
    internet.add("pets.example", serve({PATH: reply(200, b"video")}))
    answered, known = threading.Event(), socket.getaddrinfo

    def slow_at_first(*args: Any, **options: Any) -> Any:
        if not any("took too long" in record.getMessage() for record in caplog.records):
            answered.wait(5)
        return known(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow_at_first)
    monkeypatch.setattr(main, "TIMEOUT", httpx.Timeout(5, connect=0.05))
    await in_lifespan(main.download(URL, tmp_path / "video.mp4"))
    answered.set()

    assert "(ConnectTimeout looking up pets.example took too long)" in "\n".join(log_lines(caplog))


async def test_a_name_that_is_found_after_the_end_disturbs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread ends in silence although the event loop that asked for it is closed."""
    answered, threads = threading.Event(), list[threading.Thread]()

    def slow(*args: Any, **options: Any) -> list[Any]:
        threads.append(threading.current_thread())
        answered.wait(5)
        return []

    async def ask_in_vain() -> None:
        with anyio.move_on_after(0.05):
            await main.DnsResolver().resolve("pets.example", 80)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    await asyncio.to_thread(asyncio.run, ask_in_vain())
    answered.set()
    threads[0].join(5)
    assert not threads[0].is_alive()


# The guard itself


class LostGuard(httpcore.AsyncConnectionPool):
    """A pool of an httpcore that no longer knows `network_backend`."""

    def __init__(self, *args: Any, network_backend: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)


class EverywhereAnswered(httpcore.AsyncConnectionPool):
    """A pool that has an answer from every address."""

    def __init__(self, *args: Any, network_backend: Any = None, **options: Any) -> None:
        answers = httpcore.AsyncMockBackend([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
        super().__init__(*args, network_backend=answers, **options)


@pytest.mark.parametrize("pool", [LostGuard, EverywhereAnswered])
async def test_the_start_fails_without_the_guard(
    monkeypatch: pytest.MonkeyPatch, pool: type[httpcore.AsyncConnectionPool]
) -> None:
    """Whether the connection to an inside address fails there or is answered."""
    use_settings(monkeypatch)
    monkeypatch.setattr(httpcore, "AsyncConnectionPool", pool)
    with pytest.raises(RuntimeError, match="SSRF guard"):
        async with main.lifespan(main.app):
            pass


# Redirects


@pytest.mark.parametrize(
    ("hop", "reason"),
    [
        *(
            (redirect("http://127.0.0.1/", status), NOT_PUBLIC)
            for status in (301, 302, 303, 307, 308)
        ),
        (redirect("http://169.254.169.254/latest/meta-data/"), NOT_PUBLIC),
        (redirect("http://[::ffff:7f00:1]/"), NOT_PUBLIC),
        (redirect("//127.0.0.1/"), NOT_PUBLIC),
        (redirect("http://inner.example/"), NOT_PUBLIC),
        (redirect("http://2130706433/"), NOT_PLAIN),
        (redirect("http://pets.example:8000/"), NOT_A_PORT),
        (redirect("http://user@pets.example/"), NO_USER),
        (redirect("http://127%2e0.0.1/"), NOT_A_HOST),
        (redirect("ftp://pets.example/"), NOT_HTTP),
        (redirect("file:///etc/passwd"), NOT_HTTP),
    ],
)
async def test_a_redirect_to_a_private_address_is_rejected(
    hop: bytes, reason: str, refused: Refused, pets: Server, internet: Internet
) -> None:
    """Like the URL itself, whatever the status, and without a retry."""
    internet.names["inner.example"] = [["10.0.0.1"]]
    pets.answers[PATH] = [hop]
    assert await refused(URL) == [reason, f"The file at pets.example may not be fetched. {reason}"]
    assert pets.requests == [f"HEAD {PATH}", f"GET {PATH}"]
    assert internet.connected == [PUBLIC, PUBLIC]


async def test_each_redirect_is_looked_up_again(
    client: httpx.AsyncClient, pets: Server, internet: Internet
) -> None:
    """A name that was public before may be private now."""
    internet.names["pets.example"] = [[PUBLIC], [PUBLIC], ["127.0.0.1"]]
    pets.answers |= {PATH: [redirect("/2")], "/2": [redirect("/3")]}
    assert (await debug_head(client)).json()["detail"] == NOT_PUBLIC
    assert internet.connected == [PUBLIC, PUBLIC]
    assert internet.internal_server.was_never_contacted()


async def test_five_redirects_are_followed(
    client: httpx.AsyncClient, pets: Server, tmp_path: Path
) -> None:
    """The fifth still leads to the file, for /debug/head and for a download."""
    pets.answers |= {f"/{n}": [redirect(f"/{n + 1}" if n < 4 else PATH)] for n in range(5)}
    assert (await debug_head(client, "http://pets.example/0")).json()["bytes"] == 5
    await main.download("http://pets.example/0", tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == b"video"


async def test_a_sixth_redirect_is_not_followed(refused: Refused, pets: Server) -> None:
    """A loop of redirects ends there."""
    pets.answers[PATH] = [redirect(PATH)]
    assert all("The URL redirects more than 5 times." in detail for detail in await refused(URL))
    assert pets.requests == [f"HEAD {PATH}"] * 6 + [f"GET {PATH}"] * 6


# Proxies, and the owner's own addresses


async def test_a_proxy_of_the_environment_is_not_used(
    serve: Serve, internet: Internet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a proxy the guard would check the proxy's address."""
    internet.add("pets.example", serve({PATH: reply(200, b"video")}))
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, internet.internal_server.url)
    await in_lifespan(main.download(URL, tmp_path / "video.mp4"))
    assert (tmp_path / "video.mp4").read_bytes() == b"video"
    assert internet.internal_server.was_never_contacted()


@pytest.mark.parametrize(
    "storage",
    "http://10.1.2.3:9000 http://10.1.2.3:9000/ http://10.1.2.3:80 http://Storage.Internal:9000 "
    "http://10.1.2.3:9000/self/hosted".split(),
)
async def test_the_owners_storage_is_trusted(
    storage: str,
    serve: Serve,
    client: httpx.AsyncClient,
    internet: Internet,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A storage at a private address works, however its URL is written."""
    path = httpx.URL(storage).path.rstrip("/") + "/storage/v1/object"
    stored, speech = reply(200, b'{"Key": "cats-2.x/a.mp3"}'), reply(200, b"ok")
    server = serve(
        {f"POST {path}/cats-2.x/a.mp3": stored, f"GET {path}/public/cats-2.x/a.mp3": speech}
    )
    internet.addresses |= {"10.1.2.3": server.port, "storage.internal": server.port}
    use_settings(monkeypatch, SUPABASE_URL=storage, SUPABASE_BUCKET="cats-2.x")
    await main.download(
        await main.supabase_upload("a.mp3", b"speech", "audio/mpeg"), tmp_path / "speech"
    )
    assert (tmp_path / "speech").read_bytes() == b"ok"
    assert internet.internal_server.was_never_contacted()


@pytest.mark.parametrize(
    "url",
    [
        *"http://10.1.2.3:9000/admin http://10.1.2.3:9000/storage/v1/object".split(),
        *"http://10.1.2.3:9000/storage/v1/objects/x http://10.1.2.3:9000/storage/v1/object/../../../admin".split(),
        "http://10.1.2.3:9000/storage/v1/object/%2e%2e/%2E./.%2e/admin",
        *(f"http://10.1.2.3:9000/storage/v1/object/..%{slash}admin" for slash in ("2f", "5c")),
        *(
            f"http://{host}/storage/v1/object/x"
            for host in ("10.1.2.3:9001", "10.1.2.3", "10.1.2.30:9000")
        ),
        *(f"http://{host}/storage/v1/object/x" for host in ("10.1.2.4:9000", "user@10.1.2.3:9000")),
        "http://10.1.2.3:9000@pets.example/storage/v1/object/x",
        "https://10.1.2.3:9000/storage/v1/object/x",
    ],
)
async def test_only_objects_of_the_owners_storage_are_trusted(
    url: str, refused: Refused, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another path, port or host of it is rejected, however it is written."""
    use_settings(monkeypatch, SUPABASE_URL="http://10.1.2.3:9000")
    await refused(url)
    assert internet.connected == []


# Keys go to their providers only

JOB = main.JobPromptOnly(image_url="https://pets.example/pet.jpg", prompt="Talk")
CALLS: dict[
    str, Callable[[], Awaitable[Any]]
] = {  # each call with a key, by the path that it goes to
    "/v1/text-to-speech/voice?output_format=mp3_44100_64": lambda: main.elevenlabs_tts_bytes(
        "Hello", "voice"
    ),
    "/v1/models/minimax/hailuo-02/predictions": lambda: main.hailuo_video_from_prompt(JOB),
    "/v1/models/owner/name": lambda: main.find_model("owner/name"),
    "/storage/v1/object/pets/a": lambda: main.supabase_upload("a", b"speech", "audio/mpeg"),
    "/storage/v1/object/pets/b": lambda: main.supabase_upload("b", Path(__file__), "audio/mpeg"),
}


@pytest.mark.parametrize("path", CALLS)
async def test_no_key_follows_a_redirect(
    path: str,
    serve: Serve,
    client: httpx.AsyncClient,
    internet: Internet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The owner's base URLs are trusted, but where they redirect to gets no key."""
    thief = serve({})
    internet.add("thief.example", thief)
    # Method, headers and body would go along
    provider = serve({f"/api{path}": redirect("http://thief.example/", 307)})
    bases = {"ELEVEN_BASE_URL": f"{provider.url}/api/", "REPLICATE_BASE_URL": f"{provider.url}/api"}
    use_settings(monkeypatch, **bases, SUPABASE_URL=f"{provider.url}/api")
    with pytest.raises((main.ProviderFailed, main.ResourceFailed), match="answered 307: "):
        await CALLS[path]()
    assert len(provider.requests) == 1
    assert thief.was_never_contacted()


async def test_a_download_carries_no_key(
    serve: Serve, pets: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither the storage's public files nor what they redirect to get a key."""
    storage = serve({"/storage/v1/object/public/pets/a.mp3": redirect(URL)})
    use_settings(monkeypatch, SUPABASE_URL=storage.url)
    await main.download(f"{storage.url}/storage/v1/object/public/pets/a.mp3", tmp_path / "speech")
    heads = "\n".join([*storage.request_heads, *pets.request_heads]).lower()
    assert len(storage.request_heads) == len(pets.request_heads) == 1
    carriers = (*SECRETS.values(), "authorization:", "apikey:", "xi-api-key:", "cookie:")
    assert not any(key.lower() in heads for key in carriers)


async def test_no_cookie_is_kept(client: httpx.AsyncClient, pets: Server) -> None:
    """A cookie that one response sets is not sent with the next request."""
    pets.answers[PATH] = [reply(200, set_cookie="client=1; Path=/")]
    assert [(await debug_head(client)).status_code for _ in range(2)] == [200, 200]
    assert "cookie:" not in pets.request_heads[1].lower()


# Closing the connections


@pytest.mark.parametrize(
    ("is_ours", "kind"),
    [(True, "usual"), (True, main.NEW_CONNECTION), (False, "usual"), (False, main.USER_SUPPLIED)],
)
async def test_the_end_of_the_lifespan_closes_every_connection(
    is_ours: bool, kind: str, serve: Serve, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all pools, also where a response is still being received."""
    left = threading.Event()

    def send(connection: socket.socket) -> None:
        connection.sendall(reply(200, content_length="1000"))
        if connection.recv(1) == b"":
            left.set()

    server = serve({"/v1/video": send})
    internet.add("pets.example", server)
    use_settings(monkeypatch, REPLICATE_BASE_URL=server.url)
    url = f"{server.url if is_ours else 'http://pets.example'}/v1/video"
    async with main.lifespan(main.app):
        http = main.app_state().http
        answer = await http.send(
            http.build_request("GET", url, extensions={kind: True}), stream=True
        )
    assert await asyncio.to_thread(left.wait, 2)
    await answer.aclose()
