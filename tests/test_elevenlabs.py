"""Speech: the request that asks for it, every format it can come in, and every way it can fail."""

import io
import json
import math
import re
import struct
import subprocess
import wave
from array import array
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import httpx
import imageio_ffmpeg
import pytest
import respx

import main
from tests.inprocess import (
    ELEVEN_URL,
    REPLICATE_URL,
    SECRETS,
    SUPABASE_URL,
    error_of,
    told,
    use_settings,
)

VOICE = "JBFqnCBsd6RMkjVDRZzb"
SPEECH_URL = f"{ELEVEN_URL}/v1/text-to-speech/{VOICE}"
JOB = {"image_url": "https://example.com/pet.jpg", "prompt": "Talk", "text": "Feed me!", "voice_id": VOICE}
FORMATS = get_args(main.TtsOutputFormat)
RAW_FORMATS = [name for name in FORMATS if name.split("_")[0] in ("pcm", "ulaw", "alaw")]
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]


@pytest.fixture
def elevenlabs(client: httpx.AsyncClient) -> Iterator[respx.Route]:
    """The one call to ElevenLabs; every other one fails the test."""
    with respx.mock(assert_all_called=False) as router:
        yield router.post(url__startswith=f"{ELEVEN_URL}/").respond(200, content=b"ID3speech")


# Real speech, half a second of a tone


def ffmpeg(*arguments: str, stdin: bytes = b"") -> bytes:
    """What ffmpeg writes to its standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments, "pipe:1"]
    return subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=20).stdout


@cache
def samples(rate: int) -> bytes:
    """Half a second of a tone: 16 bits, little-endian, mono."""
    values = array("h", (int(8000 * math.sin(2 * math.pi * 440 * n / rate)) for n in range(rate // 2)))
    return b"".join(struct.pack("<h", value) for value in values)


@cache
def as_sent(output_format: str) -> bytes:
    """The tone as ElevenLabs would send it."""
    codec, rate, *kilobits = output_format.split("_")
    if codec == "pcm":
        return samples(int(rate))
    if codec == "wav":
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setparams((1, 2, int(rate), 0, "NONE", ""))
            writer.writeframes(samples(int(rate)))
        return file.getvalue()
    shape = {
        "mp3": ["-f", "mp3", "-c:a", "libmp3lame"],
        "opus": ["-f", "ogg", "-c:a", "libopus"],
        "ulaw": ["-f", "mulaw"],
    }
    bit_rate = ["-b:a", f"{kilobits[0]}k"] if kilobits else []
    heard = ["-f", "s16le", "-ar", rate, "-ac", "1", "-i", "pipe:0"]
    return ffmpeg(*heard, *shape.get(codec, ["-f", codec]), *bit_rate, stdin=samples(int(rate)))


def played(file: bytes, demuxer: str, *options: str) -> bytes:
    """The samples that ffmpeg plays of a file."""
    return ffmpeg("-f", demuxer, *options, "-i", "pipe:0", "-f", "s16le", stdin=file)


# The request


async def test_the_request(elevenlabs):
    """Exactly what ElevenLabs documents: the format in the query, where alone it counts, the key in its own header."""
    await main.elevenlabs_tts_bytes("Feed me!", VOICE)
    request = elevenlabs.calls.last.request
    assert (request.method, str(request.url)) == ("POST", f"{SPEECH_URL}?output_format=mp3_44100_64")
    assert json.loads(request.content) == {"text": "Feed me!", "model_id": "eleven_multilingual_v2"}
    assert request.headers["xi-api-key"] == SECRETS["ELEVEN_API_KEY"]
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-length"] == str(len(request.content))
    assert not {"authorization", "apikey", "cookie"} & set(request.headers)


async def test_the_request_waits_until_all_is_spoken(elevenlabs):
    """Two minutes of silence are normal for a long text."""
    await main.elevenlabs_tts_bytes("Feed me!", VOICE)
    assert elevenlabs.calls.last.request.extensions["timeout"] == {
        "connect": 10,
        "read": 120,
        "write": 120,
        "pool": 120,
    }


@pytest.mark.parametrize(
    "text", ['He said: "no"\\', "\u732b\U0001f408", "a\nb\tc", "<speak>&amp;</speak>", "{}", "a" * 600]
)
async def test_the_text_is_sent_as_it_is(elevenlabs, text):
    """Whatever script or signs it is written in."""
    await main.elevenlabs_tts_bytes(text, VOICE)
    assert json.loads(elevenlabs.calls.last.request.content)["text"] == text


@pytest.mark.parametrize("base_url", ["https://eu.example", "https://proxy.example:8443/elevenlabs/"])
async def test_another_base_url_takes_its_place(monkeypatch, base_url):
    """A stand-in or a proxy is called instead."""
    use_settings(monkeypatch, ELEVEN_BASE_URL=base_url)
    with respx.mock as router:
        router.post(f"{base_url.rstrip('/')}/v1/text-to-speech/{VOICE}").respond(200, content=b"ID3speech")
        assert await main.elevenlabs_tts_bytes("Feed me!", VOICE) == b"ID3speech"


async def test_without_a_running_service():
    """The helper stands on its own."""
    with respx.mock as router:
        outcomes = [httpx.ConnectError("refused"), httpx.Response(429), httpx.Response(200, content=b"ID3speech")]
        route = router.post(SPEECH_URL).mock(side_effect=outcomes)
        assert await main.elevenlabs_tts_bytes("Feed me!", VOICE) == b"ID3speech"
        assert route.call_count == 3


async def test_without_a_key_nothing_is_sent(elevenlabs, monkeypatch):
    """The variable is named."""
    use_settings(monkeypatch, ELEVEN_API_KEY="")
    error = await error_of(main.elevenlabs_tts_bytes("Feed me!", VOICE))
    assert told(error) == (500, "configuration", None)
    assert error.detail == "The service is not set up for this: set ELEVEN_API_KEY."
    assert not elevenlabs.called


# Every format


def test_there_are_28_formats():
    """As many as ElevenLabs lists, nine of them without a header."""
    assert (len(FORMATS), len(set(FORMATS)), len(RAW_FORMATS)) == (28, 28, 9)


@pytest.mark.parametrize("output_format", FORMATS)
async def test_every_format_is_asked_for_and_taken(elevenlabs, monkeypatch, output_format):
    """Real speech comes back as a file that plays: files as they came, raw samples as WAV."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    sent = as_sent(output_format)
    elevenlabs.respond(200, content=sent)
    speech = await main.elevenlabs_tts_bytes("Feed me!", VOICE)
    assert elevenlabs.calls.last.request.url.params["output_format"] == output_format
    if output_format in RAW_FORMATS:
        assert (speech[:4], speech[8:12], speech.endswith(sent)) == (b"RIFF", b"WAVE", True)
    else:
        assert speech == sent


@pytest.mark.parametrize("output_format", RAW_FORMATS)
def test_wrapped_samples_play_as_they_were(output_format):
    """ffmpeg hears the same in our WAV file as in the raw samples, at the same rate."""
    codec, rate = output_format.split("_")
    file = main.playable(as_sent(output_format), output_format)
    raw_as = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}[codec]
    assert played(file, "wav", "-ch_layout", "mono") == played(as_sent(output_format), raw_as, "-ar", rate, "-ac", "1")
    assert len(played(file, "wav")) == int(rate)  # half a second, two bytes a sample


def chunks(file: bytes) -> dict[bytes, bytes]:
    """The chunks of a WAV file, after a check of its frame."""
    assert (file[:4], struct.unpack("<I", file[4:8])[0], file[8:12]) == (b"RIFF", len(file) - 8, b"WAVE")
    found, at = {}, 12
    while at < len(file):
        name, size = struct.unpack("<4sI", file[at : at + 8])
        found[name] = file[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    assert at == len(file)
    return found


@pytest.mark.parametrize(
    ("codec", "rate", "fmt"),
    [
        pytest.param("pcm", 8000, (1, 1, 8000, 16_000, 2, 16, 0), id="PCM"),
        pytest.param("pcm", 44_100, (1, 1, 44_100, 88_200, 2, 16, 0), id="PCM of a CD"),
        pytest.param("alaw", 8000, (6, 1, 8000, 8000, 1, 8, 0), id="A-law"),
        pytest.param("ulaw", 8000, (7, 1, 8000, 8000, 1, 8, 0), id="mu-law"),
    ],
)
@pytest.mark.parametrize("length", [2, 7, 8, 1001])
def test_the_header_says_what_follows(codec, rate, fmt, length):
    """Format, number of samples, padding to an even size; half a sample at the end is left out."""
    sent = bytes(range(1, 256)) * 4
    found = chunks(main.with_wav_header(sent[:length], codec, rate))
    width = fmt[4]
    assert struct.unpack("<HHIIHHH", found[b"fmt "]) == fmt
    assert found[b"data"] == sent[: length // width * width]
    assert struct.unpack("<I", found[b"fact"])[0] == length // width


def test_pythons_own_reader_takes_the_file():
    """As players do."""
    with wave.open(io.BytesIO(main.with_wav_header(samples(8000), "pcm", 8000))) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 4000)
        assert file.readframes(4000) == samples(8000)


@pytest.mark.parametrize(
    ("output_format", "extension", "content_type", "demuxer"),
    [
        ("mp3_44100_64", "mp3", "audio/mpeg", "mp3"),
        ("mp3_22050_32", "mp3", "audio/mpeg", "mp3"),
        ("opus_48000_64", "ogg", "audio/ogg", "ogg"),
        ("wav_24000", "wav", "audio/wav", "wav"),
        ("pcm_16000", "wav", "audio/wav", "wav"),
        ("ulaw_8000", "wav", "audio/wav", "wav"),
        ("alaw_8000", "wav", "audio/wav", "wav"),
    ],
)
async def test_how_speech_is_stored(client, monkeypatch, output_format, extension, content_type, demuxer):
    """Under a fresh name with the right extension and type, and read by ffmpeg as what it is."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    with respx.mock as router:
        router.post(url__startswith=ELEVEN_URL).respond(200, content=as_sent(output_format))
        upload = router.post(url__startswith=SUPABASE_URL).respond(200, json={"Key": "pets/audio/x"})
        router.post(url__startswith=REPLICATE_URL).respond(402)
        partial = (await client.post("/jobs_prompt_tts", json=JOB)).json()["partial"]
    request = upload.calls.last.request
    uuid4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(rf"/storage/v1/object/pets/audio/{uuid4}\.{extension}", request.url.path)
    assert request.headers["content-type"] == content_type
    assert partial == {"audio_url": str(request.url).replace("/object/", "/object/public/")}
    assert main.speech_file().demuxer == demuxer
    assert played(request.content, demuxer)


# What is no speech


@pytest.mark.parametrize(
    "output_format", ["mp3_44100_64", "wav_24000", "opus_48000_64", "pcm_16000", "ulaw_8000", "alaw_8000"]
)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(HTML, id="HTML"),
        pytest.param(b"\r\n <html lang=en>", id="HTML after a blank line"),
        pytest.param(b'{"detail": {"status": "quota_exceeded"}}', id="JSON"),
        pytest.param(b'\n{\n  "detail": "no"}', id="JSON on several lines"),
    ],
)
async def test_what_is_no_speech_is_refused(elevenlabs, monkeypatch, output_format, body):
    """A 200 is not enough: it is neither stored nor muxed, and no film is bought."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    elevenlabs.respond(200, content=body, content_type="audio/mpeg")
    error = await error_of(main.elevenlabs_tts_bytes("Feed me!", VOICE))
    assert told(error) == (500, "provider", "elevenlabs")
    assert error.detail == f"ElevenLabs answered without speech in the format {output_format}."


@pytest.mark.parametrize(
    ("asked", "came"),
    [
        ("wav_44100", "mp3_44100_64"),
        ("opus_48000_64", "mp3_44100_64"),
        ("mp3_44100_64", "wav_8000"),
        ("mp3_44100_64", "pcm_8000"),
    ],
)
async def test_another_format_than_asked_for_is_refused(elevenlabs, monkeypatch, asked, came):
    """The stored file would have the wrong name and type."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=asked)
    elevenlabs.respond(200, content=as_sent(came))
    error = await error_of(main.elevenlabs_tts_bytes("Feed me!", VOICE))
    assert error.detail == f"ElevenLabs answered without speech in the format {asked}."


@pytest.mark.parametrize(
    "start", [b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2"]
)
async def test_mp3_begins_with_a_tag_or_a_frame(elevenlabs, start):
    """Layer III of MPEG 1, 2 and 2.5, with and without a checksum."""
    elevenlabs.respond(200, content=start + bytes(100))
    assert await main.elevenlabs_tts_bytes("Feed me!", VOICE) == start + bytes(100)


@pytest.mark.parametrize(
    "content_type", [None, "audio/mpeg", "application/octet-stream", "text/html", "audio/L16;rate=16000"]
)
async def test_the_bytes_decide_not_the_content_type(elevenlabs, monkeypatch, content_type):
    """ElevenLabs documents audio/mpeg for whatever it sends."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT="opus_48000_64")
    headers = {"Content-Type": content_type} if content_type else {}
    elevenlabs.respond(200, content=as_sent("opus_48000_64"), headers=headers)
    assert await main.elevenlabs_tts_bytes("Feed me!", VOICE) == as_sent("opus_48000_64")


@pytest.mark.parametrize(
    ("output_format", "start"), [("mp3_44100_64", b"ID3"), ("pcm_48000", b"\1\2\3"), ("wav_48000", b"RIFF")]
)
@pytest.mark.parametrize(("size", "is_taken"), [(9_500_000, True), (9_500_001, False)])
async def test_speech_of_9_500_000_bytes_is_the_most(elevenlabs, monkeypatch, output_format, start, size, is_taken):
    """One byte more is a 400 that says what to do."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    elevenlabs.respond(200, content=start.ljust(size, b"\1"))
    if is_taken:
        assert len(await main.elevenlabs_tts_bytes("Feed me!", VOICE)) >= size
        return
    error = await error_of(main.elevenlabs_tts_bytes("Feed me!", VOICE))
    assert told(error) == (400, "resource", "elevenlabs")
    assert error.detail == "The speech is larger than 9.5 MB; use a shorter text."


async def test_endless_speech_is_not_read_to_its_end(elevenlabs):
    """Reading stops at the limit."""
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 100_000_000:
            sent += 100_000
            yield b"ID3".ljust(100_000, b"\1")

    elevenlabs.mock(side_effect=[httpx.Response(200, content=endless())])
    error = await error_of(main.elevenlabs_tts_bytes("Feed me!", VOICE))
    assert told(error) == (400, "resource", "elevenlabs")
    assert sent <= 9_700_000


# What ElevenLabs refuses


def legacy(status: str, message: str) -> dict[str, Any]:
    """An error body of 2025."""
    return {"detail": {"status": status, "message": message}}


def modern(kind: str, code: str, message: str) -> dict[str, Any]:
    """An error body of 2026."""
    detail = {"type": kind, "code": code, "message": message, "status": code, "request_id": "r", "param": None}
    return {"detail": detail}


FIELD_REQUIRED = {"detail": [{"loc": ["body", "text"], "msg": "Field required", "type": "missing"}]}


@pytest.mark.parametrize(
    ("status", "body", "outcome", "message"),
    [
        pytest.param(400, legacy("invalid_uid", "Bad id."), 400, "Bad id.", id="malformed voice"),
        pytest.param(400, legacy("voice_does_not_exist", "No voice."), 400, "No voice.", id="unknown voice, older"),
        pytest.param(404, legacy("voice_not_found", "No voice."), 400, "No voice.", id="unknown voice of 2025"),
        pytest.param(404, modern("not_found", "voice_not_found", "No voice."), 400, "No voice.", id="unknown voice"),
        pytest.param(400, legacy("max_character_limit_exceeded", "Long."), 400, "Long.", id="text too long"),
        pytest.param(422, FIELD_REQUIRED, 400, "Field required", id="list of faults"),
        pytest.param(401, legacy("invalid_api_key", "Invalid API key"), 500, "Invalid API key", id="wrong key"),
        pytest.param(401, legacy("needs_authorization", "No key."), 500, "No key.", id="no key"),
        pytest.param(401, legacy("quota_exceeded", "0 left."), 500, "0 left.", id="quota used up"),
        pytest.param(401, legacy("detected_unusual_activity", "Abuse."), 500, "Abuse.", id="abuse guard"),
        pytest.param(402, modern("payment_required", "paid_plan_required", "Pay."), 500, "Pay.", id="plan too small"),
        pytest.param(
            403, legacy("output_format_not_allowed", "Needs Pro."), 500, "Needs Pro.", id="format above the plan"
        ),
        pytest.param(403, modern("authorization_error", "voice_access_denied", "No."), 500, "No.", id="foreign voice"),
        pytest.param(405, {"detail": "Method Not Allowed"}, 500, "Method Not Allowed", id="no such method"),
        pytest.param(409, modern("conflict", "already_running", "Wait."), 500, "Wait.", id="conflict"),
        pytest.param(411, None, 500, "Length Required", id="no body"),
        pytest.param(429, legacy("system_busy", "Busy."), 500, "Busy.", id="busy to the end"),
        pytest.param(429, modern("rate_limit_error", "concurrent_limit_exceeded", "3."), 500, "3.", id="too many"),
        pytest.param(500, modern("internal_error", "internal_error", "Oops."), 500, "Oops.", id="internal error"),
        pytest.param(
            503, modern("service_unavailable", "maintenance", "Back soon."), 500, "Back soon.", id="maintenance"
        ),
        pytest.param(520, None, 500, "no message", id="a status that nobody knows"),
        pytest.param(204, None, 500, "No Content", id="a success without content"),
        pytest.param(302, None, 500, "Found", id="a redirect is not followed"),
    ],
)
async def test_every_refusal(client, elevenlabs, status, body, outcome, message):
    """What is wrong with the text or voice is a 400; all else a 500. Either way in ElevenLabs' own words."""
    elevenlabs.respond(status, json=body, headers={"Location": "https://elsewhere.example/"})
    answer = await client.post("/jobs_prompt_tts", json=JOB)
    told_body = answer.json()
    assert (answer.status_code, told_body["category"], told_body["provider"]) == (outcome, "provider", "elevenlabs")
    assert told_body["detail"] == f"ElevenLabs answered {status}: {message}"
    assert "partial" not in told_body
    assert elevenlabs.call_count == (3 if status in (429, 500, 502, 503, 504) else 1)


@pytest.mark.parametrize(
    "error", [httpx.ReadTimeout("slow"), httpx.ConnectError("refused"), httpx.RemoteProtocolError("closed")], ids=repr
)
async def test_no_answer(elevenlabs, error):
    """The provider's failure, with the reason."""
    elevenlabs.mock(side_effect=error)
    caught = await error_of(main.elevenlabs_tts_bytes("Feed me!", VOICE))
    assert told(caught) == (500, "provider", "elevenlabs")
    assert caught.detail == f"ElevenLabs did not answer: {type(error).__name__} {error}."


async def test_a_gateways_page_is_told_in_words(elevenlabs):
    """HTML is not passed on as it is."""
    elevenlabs.respond(502, html="<html><head><title>502 Bad Gateway</title></head><body><hr>cloudflare</body></html>")
    caught = await error_of(main.elevenlabs_tts_bytes("Feed me!", VOICE))
    assert caught.detail == "ElevenLabs answered 502: 502 Bad Gateway cloudflare"
