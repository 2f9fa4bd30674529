"""The unchanged service and the sandbox over real sockets: what a front end gets is a film that can be watched."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
import imageio_ffmpeg
import pytest

from tests.conftest import PACE, StartService
from tests.jobs import caller, left_in, prompt_job, short_film, speech_job
from tests.sandbox import Sandbox, Service, media
from tests.sandbox.supabase import KEYS

pytestmark = pytest.mark.anyio

REQUIRED = ["ELEVEN_API_KEY", "REPLICATE_API_TOKEN", "SUPABASE_URL", "SUPABASE_SERVICE_ROLE"]
SPEAKING_MODEL = "wan-video/wan-2.5-i2v"


class Housed(NamedTuple):
    """A service with a temporary folder of its own."""

    service: Service
    folder: Path


@pytest.fixture(scope="module")
def running_housed(running_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Housed]:
    """One for all tests here that look at files."""
    folder = tmp_path_factory.mktemp("housed")
    with Service({**running_sandbox.environment(), **PACE, "TMPDIR": str(folder)}) as service:
        yield Housed(service, folder)


@pytest.fixture
def housed(running_housed: Housed, sandbox: Sandbox) -> Housed:
    """The same, its sandbox as new and with a small film."""
    sandbox.film(short_film())
    return running_housed


async def post(service: Service, path: str, body: Any) -> httpx.Response:
    """One request with a client of its own."""
    async with caller(service.url) as client:
        return await client.post(path, json=body)


async def finished(service: Service, path: str, body: Any) -> dict[str, str]:
    """The answer of a job, which must succeed."""
    response = await post(service, path, body)
    assert response.status_code == 200, response.text
    answer: dict[str, str] = response.json()
    return answer


async def fetch(url: str) -> bytes:
    """What a browser gets under a URL of the answer."""
    async with caller("") as client:
        response = await client.get(url)
        assert response.status_code == 200
        return response.content


async def kept_film(answer: dict[str, str], folder: Path) -> Path:
    """The final film, saved."""
    file = folder / "final.mp4"
    await anyio.Path(file).write_bytes(await fetch(answer["final_url"]))
    return file


def ffmpeg(*arguments: str) -> str:
    """What ffmpeg writes about a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr


def sound_begins_s(film: Path) -> float:
    """The end of the silence at the start of a film."""
    told = ffmpeg("-i", str(film), "-af", "silencedetect=noise=-40dB:d=0.1", "-vn", "-f", "null", "-")
    return float(re.findall(r"silence_end: ([\d.]+)", told)[0])


def picture_packets(film: Path) -> str:
    """A digest of the picture stream's packets, as they lie in the file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(film), "-map", "0:v:0", "-c", "copy"]
    done = subprocess.run([*command, "-f", "streamhash", "-"], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


# Films that can be watched


async def test_a_speech_job_gives_a_film_that_talks(service: Service, sandbox: Sandbox, tmp_path: Path) -> None:
    """The final film has the model's picture as it was, and our speech half a second in."""
    sandbox.speech_seconds = 3.0
    answer = await finished(service, "/jobs_prompt_tts", speech_job(sandbox, resolution="512p"))
    film, silent = await kept_film(answer, tmp_path), tmp_path / "silent.mp4"
    await anyio.Path(silent).write_bytes(await fetch(answer["video_url"]))
    looked_at = media.probe(film)
    assert (looked_at.video, looked_at.audio) == ("h264", "aac")
    assert min(looked_at.width, looked_at.height) == 512
    assert looked_at.seconds == pytest.approx(3.5, abs=0.1)
    assert sound_begins_s(film) == pytest.approx(0.5, abs=0.06)
    assert media.probe(silent).audio == ""
    assert ffmpeg("-v", "warning", "-i", str(film), "-f", "null", "-") == ""


async def test_the_speech_can_be_played_by_itself(service: Service, sandbox: Sandbox, tmp_path: Path) -> None:
    """`audio_url` leads to an MP3 of the text's length."""
    sandbox.film(short_film())
    sandbox.speech_seconds = 2.0
    answer = await finished(service, "/jobs_prompt_tts", speech_job(sandbox))
    file = tmp_path / "speech.mp3"
    await anyio.Path(file).write_bytes(await fetch(answer["audio_url"]))
    looked_at = media.probe(file)
    assert (looked_at.audio, looked_at.sample_rate) == ("mp3", 44_100)
    assert looked_at.seconds == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("speech_s", "fit", "seconds"),
    [
        pytest.param(9.0, "shortest", 6.0, id="long speech, shortest"),
        pytest.param(9.0, "video", 6.0, id="long speech, video"),
        pytest.param(9.0, "speech", 9.5, id="long speech, speech"),
        pytest.param(3.0, "shortest", 3.5, id="short speech, shortest"),
        pytest.param(3.0, "video", 6.0, id="short speech, video"),
        pytest.param(3.0, "speech", 3.5, id="short speech, speech"),
    ],
)
async def test_fit_says_what_ends_the_film(
    service: Service, sandbox: Sandbox, tmp_path: Path, speech_s: float, fit: str, seconds: float
) -> None:
    """The clip's length is that of film or speech, as the front end asked."""
    sandbox.film(short_film(6.0))
    sandbox.speech_seconds = speech_s
    film = await kept_film(await finished(service, "/jobs_prompt_tts", speech_job(sandbox, fit=fit)), tmp_path)
    assert media.probe(film).seconds == pytest.approx(seconds, abs=0.1)
    assert sound_begins_s(film) == pytest.approx(0.5, abs=0.06)


async def test_the_picture_is_copied_bit_by_bit(service: Service, sandbox: Sandbox, tmp_path: Path) -> None:
    """With the whole film asked for, the final one holds the same picture packets."""
    source = tmp_path / "source.mp4"
    await anyio.Path(source).write_bytes(short_film())
    sandbox.film(await anyio.Path(source).read_bytes())
    film = await kept_film(await finished(service, "/jobs_prompt_tts", speech_job(sandbox, fit="video")), tmp_path)
    assert picture_packets(film) == picture_packets(source)


async def test_a_silent_film_needs_no_speech(service: Service, sandbox: Sandbox, tmp_path: Path) -> None:
    """A job without text gives a film of the asked length and size without sound."""
    body = prompt_job(sandbox, seconds=10, resolution="512p")
    answer = await finished(service, "/jobs_prompt_only", body)
    file = tmp_path / "film.mp4"
    await anyio.Path(file).write_bytes(await fetch(answer["video_url"]))
    looked_at = media.probe(file)
    assert looked_at.seconds == pytest.approx(10.0, abs=0.1)
    assert (min(looked_at.width, looked_at.height), looked_at.audio) == (512, "")


async def test_another_model_is_asked_in_its_own_words(service: Service, sandbox: Sandbox) -> None:
    """The request is fitted to the schema that Replicate publishes for the model."""
    sandbox.film(short_film())
    body = prompt_job(sandbox, model="kwaivgi/kling-v2.1", seconds=10)
    await finished(service, "/jobs_prompt_only", body)
    [prediction] = sandbox.predictions.values()
    assert prediction.model.name == "kwaivgi/kling-v2.1"
    assert prediction.input["start_image"] == sandbox.image_url
    assert prediction.input["duration"] == 10


async def test_a_model_that_speaks_is_stored_as_it_is(service: Service, sandbox: Sandbox) -> None:
    """It is given the speech, and its film becomes the final one byte for byte."""
    answer = await finished(service, "/jobs_prompt_tts", speech_job(sandbox, model=SPEAKING_MODEL, resolution="480p"))
    [prediction] = sandbox.predictions.values()
    assert prediction.input["audio"] == answer["audio_url"]
    assert await fetch(answer["final_url"]) == await fetch(answer["video_url"]) == prediction.film
    kept = sandbox.objects[answer["final_url"].partition("/public/")[2]]
    assert (kept.content_type, kept.cache_control) == ("video/mp4", "max-age=31536000")


async def test_the_other_kind_of_key_works_as_well(sandbox: Sandbox, start_service: StartService) -> None:
    """Supabase's opaque keys (`sb_secret_...`) store files like the older tokens."""
    sandbox.film(short_film())
    service = start_service(SUPABASE_SERVICE_ROLE=KEYS["secret"])
    answer = await finished(service, "/jobs_prompt_tts", speech_job(sandbox))
    assert await fetch(answer["final_url"])


# Nothing is bought in vain


@pytest.fixture(scope="module")
def services_lacking(running_sandbox: Sandbox) -> Iterator[dict[str, Service]]:
    """For each required variable a service without it, all started at the same time."""
    environment = {**running_sandbox.environment(), **PACE}
    services = {name: Service({**environment, name: ""}) for name in REQUIRED}
    with ThreadPoolExecutor(len(services)) as pool:
        list(pool.map(Service.start, services.values()))
        yield services
        list(pool.map(Service.close, services.values()))


@pytest.mark.parametrize("name", REQUIRED)
async def test_a_missing_variable_is_named_before_anybody_is_called(
    sandbox: Sandbox, services_lacking: dict[str, Service], name: str
) -> None:
    """A speech job without one of its four settings is a 500 naming it; no provider hears of it."""
    service = services_lacking[name]
    response = await post(service, "/jobs_prompt_tts", speech_job(sandbox, model="kwaivgi/kling-v2.1"))
    assert (response.status_code, response.json()["category"]) == (500, "configuration")
    assert name in response.json()["detail"]
    assert sandbox.requests == []
    assert name in service.log, "the start warns of it"
    is_needed = name == "REPLICATE_API_TOKEN"
    sandbox.film(short_film())
    silent = await post(service, "/jobs_prompt_only", prompt_job(sandbox))
    assert silent.status_code == (500 if is_needed else 200), "a silent film needs the one token only"


BAD_INPUT = [
    *(
        pytest.param({name: None}, name, id=f"{name} is null")
        for name in ("image_url", "prompt", "text", "voice_id", "seconds", "resolution", "fit")
    ),
    *(
        pytest.param({name: " \t\n"}, name, id=f"{name} is blank")
        for name in ("image_url", "prompt", "text", "voice_id", "resolution", "model", "fit")
    ),
    *(
        pytest.param({name: 7}, name, id=f"{name} is a number")
        for name in ("image_url", "prompt", "text", "voice_id", "resolution", "model", "fit")
    ),
    *(pytest.param({name: ["x"]}, name, id=f"{name} is a list") for name in ("prompt", "text", "seconds")),
    *(
        pytest.param({"image_url": url}, "image_url", id=f"image_url: {url}")
        for url in (
            "file:///etc/passwd",
            "ftp://example.com/pet.jpg",
            "data:image/png;base64,AAAA",
            "javascript:alert(1)",
            "/pet.jpg",
            "pet.jpg",
            "http://",
            "https:///pet.jpg",
            "https://exa mple.com/pet.jpg",
            "https://example.com\\@127.0.0.1/",
            "http://[::1",
            "http://example.com:port/",
        )
    ),
    pytest.param({"image_url": f"https://example.com/{'x' * 4096}"}, "image_url", id="image_url is too long"),
    *(
        pytest.param({"model": model}, "model", id=f"model: {model}")
        for model in (
            "../secrets",
            "a/../../v1/account",
            "owner/..",
            "owner",
            "owner/name/more",
            "owner/na me",
            "owner/name:",
            "owner/name:../x",
            "owner/name?x=1",
            "owner/name#x",
            "https://example.com/a",
            "owner/name\n",
        )
    ),
    *(
        pytest.param({"voice_id": voice}, "voice_id", id=f"voice_id: {voice}")
        for voice in ("../v1/voices", "..%2f..", "a/b", "a?b", "a#b", "a b", "ä", "x" * 65, "abc\n")
    ),
    *(
        pytest.param({"seconds": seconds}, "seconds", id=f"seconds: {seconds!r}")
        for seconds in (0, -6, 7, 601, 6.5, "6", True, 10**30)
    ),
    *(
        pytest.param({"resolution": size}, "resolution", id=f"resolution: {size}")
        for size in ("4k", "9000p", "768p; rm", "../", "x" * 17)
    ),
    pytest.param({"seconds": 10, "resolution": "1080p"}, "resolution", id="10 s in 1080p"),
    pytest.param({"text": "x" * 601}, "text", id="601 characters"),
    pytest.param({"text": "é" * 601}, "text", id="601 characters of two bytes"),
    pytest.param({"fit": "longest"}, "fit", id="an unknown fit"),
]


@pytest.mark.parametrize(("changes", "name"), BAD_INPUT)
async def test_bad_input_is_refused_before_anybody_is_called(
    service: Service, sandbox: Sandbox, changes: dict[str, Any], name: str
) -> None:
    """A 400 that names the field; nothing is looked up, spoken or filmed."""
    response = await post(service, "/jobs_prompt_tts", speech_job(sandbox, **changes))
    error = response.json()
    assert (response.status_code, error["category"]) == (400, "validation")
    assert [fault["loc"] for fault in error["errors"]] == [["body", name]]
    assert error["detail"].startswith(f"{name}: ")
    assert sandbox.requests == []


@pytest.mark.parametrize("name", ["image_url", "prompt", "text", "voice_id"])
async def test_a_missing_field_is_refused_before_anybody_is_called(
    service: Service, sandbox: Sandbox, name: str
) -> None:
    """Each of the four needed fields is asked for by name."""
    body = speech_job(sandbox)
    del body[name]
    response = await post(service, "/jobs_prompt_tts", body)
    assert (response.status_code, response.json()["detail"]) == (400, f"{name}: Field required.")
    assert sandbox.requests == []


async def test_six_hundred_characters_are_spoken(service: Service, sandbox: Sandbox) -> None:
    """The limit counts characters, not bytes, and is itself allowed."""
    sandbox.film(short_film())
    sandbox.speech_seconds = 1.0
    await finished(service, "/jobs_prompt_tts", speech_job(sandbox, text="é" * 600))
    [spoken] = sandbox.calls("speech")
    assert spoken.json()["text"] == "é" * 600


# Many at once


# Runs in a process of its own, so that this one's work does not count: asks until its input ends, tells the longest time.
WATCH_HEALTH = """
import http.client, select, sys, time
connection, slowest = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30), 0.0
while not select.select([sys.stdin], [], [], 0.01)[0]:
    started = time.monotonic()
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"ok":true}'
    slowest = max(slowest, time.monotonic() - started)
print(slowest)
"""


async def slowest_health_s(service: Service, work: Callable[[], Awaitable[object]]) -> float:
    """The longest that /health took while something else went on."""
    async with await anyio.open_process([sys.executable, "-c", WATCH_HEALTH, str(service.port)]) as watch:
        assert watch.stdin is not None
        assert watch.stdout is not None
        await work()
        await watch.stdin.aclose()
        return float(await watch.stdout.receive())


async def test_ten_speech_jobs_at_once(housed: Housed, sandbox: Sandbox) -> None:
    """All are answered with a film each, /health answers within 100 ms all the while, and no file is left."""
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
    assert left_in(housed.folder) == []


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda sandbox: sandbox.film("noise"), id="ffmpeg cannot use the film"),
        pytest.param(lambda sandbox: sandbox.fault("output", "status", times=None, status=403), id="no film to fetch"),
        pytest.param(lambda sandbox: sandbox.fault("public", "halfway", times=None), id="the speech breaks off"),
        pytest.param(lambda sandbox: sandbox.buckets["pets"].__init__(allowed_mime_types=["audio/mpeg"]), id="no room"),
    ],
)
async def test_a_failed_job_leaves_no_file(
    housed: Housed, sandbox: Sandbox, spoil: Callable[[Sandbox], object]
) -> None:
    """Whatever fails once files exist, they are gone when the answer is there."""
    spoil(sandbox)
    response = await post(housed.service, "/jobs_prompt_tts", speech_job(sandbox))
    assert (response.status_code, response.json()["category"]) == (500, "resource")
    assert left_in(housed.folder) == []


# Keys


async def test_no_key_is_ever_told(housed: Housed, sandbox: Sandbox) -> None:
    """Providers that repeat our keys in their refusals do not bring them into an answer or the log."""
    service, environment = housed.service, sandbox.environment()
    keys = [environment[name] for name in ("ELEVEN_API_KEY", "REPLICATE_API_TOKEN", "SUPABASE_SERVICE_ROLE")]
    told = " and ".join(keys)
    answers = []
    for call in ("speech", "model", "create", "read", "upload", "public", "output"):
        for status, body in [
            (401, {"detail": told}),
            (422, {"detail": told}),
            (401, f"<html>{told}</html>"),
            (401, told),
        ]:
            sandbox.fault(call, "status", status=status, body=body)
            model = {"model": "kwaivgi/kling-v2.1"} if call == "model" else {}
            response = await post(service, "/jobs_prompt_tts", speech_job(sandbox, **model))
            assert response.status_code in (400, 500)
            answers.append(response.text + str(response.headers))
    for key in keys:
        assert all(key not in answer for answer in answers)
        assert key not in service.log
    assert any("***" in answer for answer in answers), "the words around the keys are passed on"


async def test_a_wrong_key_is_the_providers_to_refuse(sandbox: Sandbox, start_service: StartService) -> None:
    """Each key is checked by its provider; the refusal comes back as a 500 in that provider's words, without the key."""
    wrong = "not-the-real-key"
    one, two = (
        start_service(ELEVEN_API_KEY=wrong),
        start_service(REPLICATE_API_TOKEN=wrong, SUPABASE_SERVICE_ROLE=wrong),
    )
    for service, path, provider, words in [
        (one, "/jobs_prompt_tts", "elevenlabs", "Invalid API key"),
        (two, "/jobs_prompt_tts", "supabase", "Invalid Compact JWS"),
        (two, "/jobs_prompt_only", "replicate", "You did not pass a valid authentication token"),
    ]:
        response = await post(service, path, speech_job(sandbox))
        assert (response.status_code, response.json()["provider"]) == (500, provider)
        assert words in response.json()["detail"]
        assert wrong not in response.text + service.log
