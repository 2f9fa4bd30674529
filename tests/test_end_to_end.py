"""The unchanged service and the sandbox over real sockets: the client gets a video that plays."""

from __future__ import annotations

import asyncio
import re
import resource
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
import imageio_ffmpeg
import pytest

import main
from tests.conftest import PACE
from tests.sandbox import Sandbox, Service, media
from tests.support import network
from tests.support.application import error_from, in_lifespan
from tests.support.network import PUBLIC, Internet, redirect, reply
from tests.support.processes import files_in, needs_proc
from tests.support.requests import prompt_job, service_client, short_video, speech_job

pytestmark = pytest.mark.anyio

serve, internal_server, internet, client = (
    network.serve,
    network.internal_server,
    network.internet,
    network.client,
)


class Housed(NamedTuple):
    """A service with a temporary folder of its own."""

    service: Service
    folder: Path


@pytest.fixture(scope="module")
def running_housed(
    running_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Housed]:
    """One for all tests here that look at files."""
    folder = tmp_path_factory.mktemp("housed")
    with Service({**running_sandbox.environment(), **PACE, "TMPDIR": str(folder)}) as service:
        yield Housed(service, folder)


@pytest.fixture
def housed(running_housed: Housed, sandbox: Sandbox) -> Housed:
    """The same, its sandbox as new and with a small video."""
    sandbox.video(short_video())
    return running_housed


async def post(service: Service, path: str, body: Any) -> httpx.Response:
    """One request with a client of its own."""
    async with service_client(service.url) as client:
        return await client.post(path, json=body)


async def finished(service: Service, path: str, body: Any) -> dict[str, str]:
    """The answer of a job, which must succeed."""
    response = await post(service, path, body)
    assert response.status_code == 200, response.text
    answer: dict[str, str] = response.json()
    return answer


async def failed(housed: Housed, sandbox: Sandbox) -> dict[str, Any]:
    """The error of a speech job, which must be a 500 and leave no file."""
    response = await post(housed.service, "/jobs_prompt_tts", speech_job(sandbox))
    assert response.status_code == 500, response.text
    assert not housed.folder.exists() or files_in(housed.folder) == []
    error: dict[str, Any] = response.json()
    return error


async def fetch(url: str) -> bytes:
    """What a browser gets under a URL of the answer."""
    async with service_client("") as client:
        response = await client.get(url)
        assert response.status_code == 200
        return response.content


async def kept(url: str, folder: Path) -> Path:
    """A file of the answer, saved."""
    file = folder / url.rpartition("/")[2]
    await anyio.Path(file).write_bytes(await fetch(url))
    return file


def ffmpeg(*arguments: str) -> str:
    """What ffmpeg writes about a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr


# The videos


async def test_a_speech_job_makes_a_talking_video(
    service: Service, sandbox: Sandbox, tmp_path: Path
) -> None:
    """The final video has the requested length, with the speech half a second in; the speech plays by itself."""
    sandbox.speech_seconds = 3.0
    answer = await finished(
        service, "/jobs_prompt_tts", speech_job(sandbox, resolution="512p", fit="video")
    )
    video, silent, speech = [
        await kept(answer[f"{name}_url"], tmp_path) for name in ("final", "video", "audio")
    ]
    looked_at = media.probe(video)
    assert (looked_at.video, looked_at.audio) == ("h264", "aac")
    assert min(looked_at.width, looked_at.height) == 512
    assert looked_at.seconds == pytest.approx(6.0, abs=0.1)
    silences = ffmpeg(
        "-i", str(video), "-af", "silencedetect=noise=-40dB:d=0.1", "-vn", "-f", "null", "-"
    )
    assert float(re.findall(r"silence_end: ([\d.]+)", silences)[0]) == pytest.approx(0.5, abs=0.06)
    assert ffmpeg("-v", "warning", "-i", str(video), "-f", "null", "-") == ""
    assert media.probe(silent).audio == ""
    assert (media.probe(speech).audio, media.probe(speech).sample_rate) == ("mp3", 44_100)
    assert media.probe(speech).seconds == pytest.approx(3.0, abs=0.1)


async def test_the_video_of_a_speaking_model_is_stored_unchanged(
    service: Service, sandbox: Sandbox
) -> None:
    """The model gets the speech, and its video becomes the final one byte for byte."""
    sandbox.video(short_video())
    answer = await finished(
        service, "/jobs_prompt_tts", speech_job(sandbox, model="wan-video/wan-2.5-i2v")
    )
    [prediction] = sandbox.predictions.values()
    assert prediction.input["audio"] == answer["audio_url"]
    assert await fetch(answer["final_url"]) == await fetch(answer["video_url"]) == prediction.video


# The picture check


PET = reply(200, b"\xff\xd8\xff", content_type="image/jpeg")
LOOKS = [  # the response, the picture's URL if another one, and a part of the error; "": the job succeeds
    ("a picture", PET, "", ""),
    ("a picture whose HEAD is refused", [reply(405), PET], "", ""),
    ("404", reply(404), "", "there is no picture at this URL, it answers 404"),
    ("410", reply(410), "", "it answers 410"),
    (
        "a web page",
        reply(200, content_type="Text/HTML; charset=utf-8"),
        "",
        "the URL of a web page",
    ),
    (
        "a redirect inwards",
        redirect("http://10.0.0.1/pet.jpg"),
        "",
        "an address that is not public",
    ),
    (
        "a name that leads inside",
        PET,
        "http://inside.example/pet.jpg",
        "an address that is not public",
    ),
    ("403, as a page", reply(403, content_type="text/html"), "", ""),
    ("503", reply(503), "", ""),
    ("a redirect to an invalid URL", redirect("http://[::1"), "", ""),
    ("a redirect to another port", redirect("http://pets.example:8080/pet.jpg"), "", ""),
    ("no such name", PET, "http://nowhere.example/pet.jpg", "its host does not exist"),
]


@pytest.fixture
def pets(
    serve: Any, internet: Internet, sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Lets a picture's address answer, beside providers that are the owner's own, for a service that heeds the guard."""
    monkeypatch.setenv("ALLOW_PRIVATE_URLS", "")
    main.get_settings.cache_clear()
    sandbox_environ.video(short_video())
    internet.names["inside.example"] = [["10.0.0.7"]]

    def answer(given: Any) -> Any:
        server = serve({"/pet.jpg": given})
        internet.add("pets.example", server, PUBLIC)
        return server

    return answer


@pytest.mark.parametrize(
    ("given", "url", "words"), [pytest.param(*row, id=name) for name, *row in LOOKS]
)
async def test_the_picture_is_checked_before_anything_is_paid_for(
    client: httpx.AsyncClient,
    sandbox: Sandbox,
    pets: Callable[..., Any],
    given: Any,
    url: str,
    words: str,
) -> None:
    """Only a certain error rejects the job: Replicate, which fetches the picture itself, may reach more."""
    pets(given)
    body = prompt_job(sandbox, image_url=url or "http://pets.example/pet.jpg")
    response = await client.post("/jobs_prompt_only", json=body)
    if not words:
        assert response.status_code == 200, response.text
        return
    error = response.json()
    assert (response.status_code, error["category"]) == (400, "validation")
    assert words in error["detail"]
    assert [fault["loc"] for fault in error["errors"]] == [["body", "image_url"]]
    assert sandbox.requests == []


async def test_a_slow_picture_check_does_not_delay_the_video(
    client: httpx.AsyncClient,
    sandbox: Sandbox,
    pets: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After PICTURE_TIMEOUT_S the job goes on without the check."""
    assert main.PICTURE_TIMEOUT_S == 3.0
    monkeypatch.setattr(main, "PICTURE_TIMEOUT_S", 0.1)
    pets(lambda connection: time.sleep(2))
    started = time.monotonic()
    response = await client.post(
        "/jobs_prompt_only", json=prompt_job(sandbox, image_url="http://pets.example/pet.jpg")
    )
    assert (response.status_code, time.monotonic() - started < 2) == (200, True)


# Certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate of its own for 127.0.0.1 and its key, as OpenSSL finds them."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificate")
    kind = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
    ]
    files = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        folder / "key.pem",
        "-out",
        folder / "ca.pem",
    ]
    subprocess.run([openssl, "req", "-x509", *kind, *files], check=True, capture_output=True)
    asked = [openssl, "x509", "-hash", "-noout", "-in", folder / "ca.pem"]
    name = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    shutil.copy(folder / "ca.pem", folder / f"{name}.0")
    return folder


@pytest.mark.parametrize(
    ("variable", "name"), [("SSL_CERT_FILE", "ca.pem"), ("SSL_CERT_DIR", ""), ("", "")]
)
async def test_certificates_of_the_environment_are_trusted(
    sandbox_environ: Sandbox,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    name: str,
) -> None:
    """SSL_CERT_FILE and SSL_CERT_DIR work as with OpenSSL; an unknown certificate is an error at once."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(200, b"{}"))
        await writer.drain()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "ca.pem", certificate / "key.pem")
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        monkeypatch.setenv(
            "REPLICATE_BASE_URL", f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        )
        monkeypatch.setenv("SERVICE_TOKEN", "a-token-of-the-owner")  # else a warning is logged
        for known in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            monkeypatch.setenv(known, str(certificate / name) if known == variable else "")
        main.get_settings.cache_clear()
        main.tls_context.cache_clear()
        try:
            look_up = in_lifespan(main.call_replicate("GET", "models/a/b", main.MODEL_RETRY))
            if variable:
                assert (await look_up).status == 200
            else:
                assert "CERTIFICATE_VERIFY_FAILED" in (await error_from(look_up)).detail
        finally:
            main.tls_context.cache_clear()
    assert [line for line in caplog.messages if "SERVICE_TOKEN" not in line] == []


# Many at once


# Runs in a process of its own, whose work does not hold up this one: asks for /health until its input ends, then
# prints the longest time an answer took. Time in which a thread could have run but had no core does not count: that is
# the machine's doing, and Linux counts it in schedstat.
WATCH_HEALTH = """
import http.client, pathlib, select, sys, time
port, pid = map(int, sys.argv[1:])

def without_a_core_s():
    threads = [*pathlib.Path("/proc/self/task").iterdir(), *pathlib.Path(f"/proc/{pid}/task").iterdir()]
    total_ns = 0
    for thread in threads:
        try:
            total_ns += int(pathlib.Path(thread, "schedstat").read_text().split()[1])
        except OSError:  # the thread has ended, or the system counts nothing
            pass
    return total_ns / 1e9

connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
slowest_s = 0.0
while not select.select([sys.stdin], [], [], 0.01)[0]:
    waited_before_s = without_a_core_s()
    started = time.monotonic()
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"ok":true}'
    took_s = time.monotonic() - started
    slowest_s = max(slowest_s, took_s - max(0.0, without_a_core_s() - waited_before_s))
print(slowest_s)
"""


async def slowest_health_s(service: Service, work: Callable[[], Awaitable[object]]) -> float:
    """The longest that /health took while something else went on."""
    async with await anyio.open_process(
        [sys.executable, "-c", WATCH_HEALTH, str(service.port), str(service.pid)]
    ) as watch:
        assert watch.stdin is not None
        assert watch.stdout is not None
        await work()
        await watch.stdin.aclose()
        return float(await watch.stdout.receive())


async def test_ten_speech_jobs_at_once(housed: Housed, sandbox: Sandbox) -> None:
    """All are answered with a video each, /health answers within 100 ms meanwhile, and no file is left."""
    answers: list[dict[str, str]] = []

    async def ten_jobs() -> None:
        async def job() -> None:
            answers.append(await finished(housed.service, "/jobs_prompt_tts", speech_job(sandbox)))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(job)

    slowest = await slowest_health_s(housed.service, ten_jobs)
    if slowest > 0.1:  # once more: this machine may have been busy with something else
        slowest = await slowest_health_s(housed.service, ten_jobs)
    assert slowest <= 0.1
    assert len({answer["final_url"] for answer in answers}) == len(answers) >= 10
    assert len(sandbox.predictions) == len(answers)
    assert files_in(housed.folder) == []


# The bucket, and the disk of the service


async def test_a_bucket_that_is_not_public_costs_no_video(housed: Housed, sandbox: Sandbox) -> None:
    """The error says what the owner has to change."""
    sandbox.buckets["pets"].public = False
    error = await failed(housed, sandbox)
    assert (error["category"], error["provider"], error["retryable"]) == (
        "resource",
        "supabase",
        False,
    )
    assert "the bucket is not public: make it so, or change SUPABASE_BUCKET=pets" in error["detail"]
    assert error["partial"].keys() == {"audio_url"}
    assert not sandbox.predictions


@needs_proc
async def test_a_disk_that_is_too_small_for_the_video(housed: Housed, sandbox: Sandbox) -> None:
    """It is a resource error with `partial`; a file limit of half the video stands for the disk."""
    sandbox.speech_seconds = 0.5
    sandbox.video(short_video(6.0))
    limits = resource.prlimit(housed.service.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(
        housed.service.pid, resource.RLIMIT_FSIZE, (len(short_video(6.0)) // 2, limits[1])
    )
    error = await failed(housed, sandbox)
    resource.prlimit(housed.service.pid, resource.RLIMIT_FSIZE, limits)
    assert (error["category"], error["provider"], error["retryable"]) == ("resource", None, True)
    assert error["detail"] == "The service's own machine failed the job: File too large."
    assert error["partial"].keys() == {"audio_url", "video_url", "prediction_id"}


async def test_a_missing_temporary_folder_costs_nothing(housed: Housed, sandbox: Sandbox) -> None:
    """The folder is opened before anything is paid for."""
    sandbox.fault("speech", "status", status=401)
    await failed(housed, sandbox)  # now the service knows its folder
    moved = housed.folder.rename(housed.folder.with_name("moved"))
    error = await failed(housed, sandbox)
    moved.rename(housed.folder)
    assert error["detail"] == "The service's own machine failed the job: No such file or directory."
    assert (error["category"], "partial" in error, len(sandbox.calls("speech"))) == (
        "resource",
        False,
        1,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
async def test_a_disk_that_fills_while_ffmpeg_writes() -> None:
    """It is a resource error of the service, not of the media, and is retryable."""
    silence = (
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "anullsrc",
        "-t",
        "1",
        "-f",
        "wav",
        "-y",
        "file:/dev/full",
    )
    with pytest.raises(OSError, match="No space left") as caught:
        await main.run_ffmpeg([*silence], 10)
    error = main.as_service_error(caught.value)
    assert error.detail == "The service's own machine failed the job: No space left on device."
    assert (error.category, error.retryable) == ("resource", True)
