"""ElevenLabs: the speech request, every output format, and every error."""

import json
import re
import struct
from collections.abc import Iterator

import httpx
import pytest
import respx

import main
from tests.support.application import (
    ELEVEN_URL,
    REPLICATE_URL,
    SECRETS,
    SUPABASE_URL,
    cases,
    error_from,
    error_kind,
    use_settings,
)

PICTURE_URL = "https://example.com/pet.jpg"
VOICE = "JBFqnCBsd6RMkjVDRZzb"
SPEECH_URL = f"{ELEVEN_URL}/v1/text-to-speech/{VOICE}"
JOB = {"image_url": PICTURE_URL, "prompt": "Talk", "text": "Feed me!", "voice_id": VOICE}
FORMATS = """
    mp3_22050_32 mp3_24000_48 mp3_44100_32 mp3_44100_64 mp3_44100_96 mp3_44100_128 mp3_44100_192
    opus_48000_32 opus_48000_64 opus_48000_96 opus_48000_128 opus_48000_192
    pcm_8000 pcm_16000 pcm_22050 pcm_24000 pcm_32000 pcm_44100 pcm_48000
    wav_8000 wav_16000 wav_22050 wav_24000 wav_32000 wav_44100 wav_48000 ulaw_8000 alaw_8000
""".split()
RAW_FORMATS = [name for name in FORMATS if name.split("_")[0] in ("pcm", "ulaw", "alaw")]
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("settings")]


@pytest.fixture
def elevenlabs(client: httpx.AsyncClient) -> Iterator[respx.Route]:
    """The one call to ElevenLabs; every other one fails the test."""
    with respx.mock(assert_all_called=False) as router:
        yield router.post(url__startswith=f"{ELEVEN_URL}/").respond(200, content=b"ID3speech")


def as_sent(output_format: str) -> bytes:
    """What speech in a format begins with, or raw samples; test_ffmpeg uses real speech in each codec."""
    starts = {"mp3": b"ID3", "wav": b"RIFF", "opus": b"OggS"}
    return starts.get(output_format.split("_")[0], b"\1\2") + bytes(1000)


async def spoken(text: str = "Feed me!") -> bytes:
    """The speech of a text."""
    return await main.elevenlabs_tts_bytes(text, VOICE)


# The request


@pytest.mark.parametrize(
    "text", ['He said: "no"\\', "\u732b\U0001f408", "a\nb\tc", "<speak>&amp;</speak>", "a" * 600]
)
async def test_the_speech_request(elevenlabs, text):
    """As ElevenLabs documents it: the format in the query, the key in its own header."""
    await spoken(text)
    request = elevenlabs.calls.last.request
    assert (request.method, str(request.url)) == (
        "POST",
        f"{SPEECH_URL}?output_format=mp3_44100_64",
    )
    assert json.loads(request.content) == {"text": text, "model_id": "eleven_multilingual_v2"}
    assert request.headers["xi-api-key"] == SECRETS["ELEVEN_API_KEY"]
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-length"] == str(len(request.content))
    assert not {"authorization", "apikey", "cookie"} & set(request.headers)
    # Two minutes of silence are normal for a long text.
    assert {name: request.extensions["timeout"][name] for name in ("connect", "read")} == {
        "connect": 10,
        "read": 120,
    }


# Every format


@pytest.mark.parametrize("output_format", FORMATS)
async def test_every_output_format_is_requested_and_accepted(
    elevenlabs, monkeypatch, output_format
):
    """Files are kept as they are; raw samples, nine of the 28 formats, become WAV files."""
    assert (len(FORMATS), len(set(FORMATS)), len(RAW_FORMATS)) == (28, 28, 9)
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    sent = as_sent(output_format)
    elevenlabs.respond(200, content=sent)
    speech = await spoken()
    assert elevenlabs.calls.last.request.url.params["output_format"] == output_format
    if output_format in RAW_FORMATS:
        assert (speech[:4], speech[8:12], speech.endswith(sent)) == (b"RIFF", b"WAVE", True)
        assert struct.unpack("<I", speech[24:28]) == (int(output_format.split("_")[1]),)
    else:
        assert speech == sent


@pytest.mark.parametrize(
    ("codec", "rate", "fmt"),
    [
        ("pcm", 8000, (1, 1, 8000, 16_000, 2, 16, 0)),
        ("pcm", 44_100, (1, 1, 44_100, 88_200, 2, 16, 0)),
        ("alaw", 8000, (6, 1, 8000, 8000, 1, 8, 0)),
        ("ulaw", 8000, (7, 1, 8000, 8000, 1, 8, 0)),
    ],
)
@pytest.mark.parametrize("length", [2, 7, 8, 1001])
def test_the_wav_header_describes_the_samples(codec, rate, fmt, length):
    """It has the format and the number of samples; an odd last byte is dropped, since chunks have an even length."""
    sent = (bytes(range(1, 256)) * 4)[:length]
    kept = sent[: length // 2 * 2]
    file = main.with_wav_header(sent, codec, rate)
    assert struct.unpack("<4sI4s", file[:12]) == (b"RIFF", len(file) - 8, b"WAVE")
    assert struct.unpack("<4sIHHIIHHH", file[12:38]) == (b"fmt ", 18, *fmt)
    assert struct.unpack("<4sII", file[38:50]) == (b"fact", 4, len(kept) // fmt[4])
    assert struct.unpack("<4sI", file[50:58]) == (b"data", len(kept))
    assert file[58:] == kept


@pytest.mark.parametrize(
    ("output_format", "extension", "content_type"),
    [
        ("mp3_44100_64", "mp3", "audio/mpeg"),
        ("opus_48000_64", "ogg", "audio/ogg"),
        ("wav_24000", "wav", "audio/wav"),
        ("pcm_16000", "wav", "audio/wav"),
        ("ulaw_8000", "wav", "audio/wav"),
        ("alaw_8000", "wav", "audio/wav"),
    ],
)
async def test_speech_is_stored_with_its_extension_and_type(
    client, monkeypatch, output_format, extension, content_type
):
    """Under a new name, with the extension and content type of its format; ffmpeg gets the same format."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    with respx.mock(assert_all_called=False) as router:
        router.route(url=PICTURE_URL).respond(200)
        router.post(url__startswith=ELEVEN_URL).respond(200, content=as_sent(output_format))
        upload = router.post(url__startswith=SUPABASE_URL).respond(
            200, json={"Key": "pets/audio/x"}
        )
        router.get(url__startswith=SUPABASE_URL).respond(200, content=as_sent(output_format))
        router.post(url__startswith=REPLICATE_URL).respond(402)
        partial = (await client.post("/jobs_prompt_tts", json=JOB)).json()["partial"]
    request = upload.calls.last.request
    assert re.fullmatch(
        rf"/storage/v1/object/pets/audio/[0-9a-f-]{{36}}\.{extension}", request.url.path
    )
    assert request.headers["content-type"] == content_type
    assert partial == {"audio_url": str(request.url).replace("/object/", "/object/public/")}
    assert main.speech_format().extension == extension


# Responses that are not speech


@pytest.mark.parametrize(
    "output_format",
    ["mp3_44100_64", "wav_24000", "opus_48000_64", "pcm_16000", "ulaw_8000", "alaw_8000"],
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        HTML,
        b"\r\n <html lang=en>",
        b'{"detail": {"status": "quota_exceeded"}}',
        b'\n{\n  "detail": "no"}',
    ],
)
async def test_a_200_without_speech_is_rejected(elevenlabs, monkeypatch, output_format, body):
    """It is neither stored nor muxed, and no video is paid for."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    elevenlabs.respond(200, content=body, content_type="audio/mpeg")
    error = await error_from(spoken())
    assert error_kind(error) == (500, "provider", "elevenlabs")
    assert error.detail == f"ElevenLabs answered without speech in the format {output_format}."


@pytest.mark.parametrize(
    ("asked", "came"),
    [
        ("wav_44100", "mp3_44100_64"),
        ("opus_48000_64", "mp3_44100_64"),
        ("mp3_44100_64", "wav_8000"),
    ],
)
def test_a_format_that_was_not_requested_is_rejected(asked, came):
    """The stored file would have the wrong name and type."""
    with pytest.raises(main.ProviderFailed, match=f"without speech in the format {asked}"):
        main.validate_speech(as_sent(came), asked)


@pytest.mark.parametrize(
    "sync", [b"ID3", *(b"\xff" + bytes([sync]) for sync in b"\xfb\xfa\xf3\xf2\xe3\xe2")]
)
def test_mp3_begins_with_a_tag_or_a_frame(sync):
    """Layer III of MPEG 1, 2 and 2.5, with and without a checksum, is accepted."""
    assert main.validate_speech(sync + bytes(100), "mp3_44100_64") == sync + bytes(100)


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/html"}, {"Content-Type": "audio/L16;rate=16000"}]
)
async def test_the_bytes_decide_and_not_the_content_type(elevenlabs, headers):
    """ElevenLabs documents audio/mpeg for every format."""
    elevenlabs.respond(200, content=b"ID3speech", headers=headers)
    assert await spoken() == b"ID3speech"


@pytest.mark.parametrize(
    ("output_format", "start"), [("mp3_44100_64", b"ID3"), ("pcm_48000", b"\1\2\3")]
)
@pytest.mark.parametrize(("size", "is_taken"), [(9_500_000, True), (9_500_001, False)])
async def test_speech_over_9_500_000_bytes_is_rejected(
    elevenlabs, monkeypatch, output_format, start, size, is_taken
):
    """One byte more is a 400 that asks for a shorter text."""
    use_settings(monkeypatch, TTS_OUTPUT_FORMAT=output_format)
    elevenlabs.respond(200, content=start.ljust(size, b"\1"))
    if is_taken:
        assert len(await spoken()) >= size
        return
    error = await error_from(spoken())
    assert error_kind(error) == (400, "resource", "elevenlabs")
    assert error.detail == "The speech is larger than 9.5 MB; use a shorter text."


# Error statuses


REFUSALS = [  # what it is, the status, that of our answer, whether it can pass
    ("malformed voice, or text too long", 400, 400, False),
    ("unknown voice", 404, 400, False),
    ("a field that does not fit", 422, 400, False),
    ("wrong key, or quota used up", 401, 500, False),
    ("plan too small", 402, 500, False),
    ("format above the plan, or foreign voice", 403, 500, False),
    ("no longer there", 410, 500, False),
    ("a status that only clients have", 499, 500, False),
    *((f"{status}, which can pass", status, 500, True) for status in (408, 409, 423, 425)),
    ("busy, or too many at once", 429, 500, True),
    ("maintenance", 503, 500, True),
    ("a status that nobody knows", 520, 500, True),
    ("a success without content", 204, 500, True),
    ("a redirect, which is not followed", 302, 500, True),
]


@pytest.mark.parametrize(("status", "outcome", "retryable"), cases(REFUSALS))
async def test_every_error_status_of_elevenlabs(elevenlabs, status, outcome, retryable):
    """An error about text or voice is a 400, every other one a 500, both in ElevenLabs' own words."""
    body = {"detail": {"status": "any", "message": "Because."}}
    headers = {
        "Location": "https://elsewhere.example/",
        "Retry-After": "3600",
    }  # a wait that no call makes
    elevenlabs.respond(status, json=body, headers=headers)
    error = await error_from(spoken())
    assert (*error_kind(error), error.retryable) == (outcome, "provider", "elevenlabs", retryable)
    assert error.detail.startswith(f"ElevenLabs answered {status}: Because")
    assert elevenlabs.call_count == 1
