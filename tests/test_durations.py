"""How long the speech and the final video are, and how much of the speech is cut off, by the files' own bytes."""

import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest

import main
from tests.sandbox import Sandbox, Service, media
from tests.sandbox.providers import PET_FILE
from tests.support.requests import Event, service_client, speech_job, stream_events

TEXT = "Feed me, please! And do it now."
EXACT_S = 0.011  # half a unit of the last place, and what a decoder rounds
SAMPLES = media.tone_samples(TEXT, 330.0, 3.0)
SPEAKING = {"model": "wan-video/wan-2.2-s2v"}


def decoded_seconds(audio: bytes, folder: Path) -> float:
    """The length of a sound as ffmpeg plays it from a file: the samples that come out."""
    path = folder / "speech"
    path.write_bytes(audio)
    samples = media.ffmpeg("-i", str(path), "-ac", "1", "-ar", "48000", "-f", "s16le")
    return len(samples) / 2 / 48_000


def encoded(*options: str) -> bytes:
    """Three seconds of sound as ffmpeg writes them with these options."""
    return media.ffmpeg(*media.TONE_INPUT, "-i", "pipe:0", *options, stdin=SAMPLES)


# Speech


@pytest.mark.parametrize("output_format", media.FORMATS)
def test_the_length_of_speech_is_given_in_every_output_format(
    output_format: str, tmp_path: Path
) -> None:
    """It is what ffmpeg plays, to a hundredth of a second."""
    speech = main.validate_speech(media.speech(TEXT, output_format), output_format)
    assert main.speech_seconds(speech) == pytest.approx(
        decoded_seconds(speech, tmp_path), abs=EXACT_S
    )


ID3V2 = ("-id3v2_version", "3", "-metadata", "title=Feed me")
MP3_OPTIONS = {
    "a variable bitrate": ("-q:a", "7", "-f", "mp3"),
    "two channels": ("-ac", "2", "-b:a", "128k", "-f", "mp3"),
    "no tag in front": ("-b:a", "64k", "-write_xing", "0", "-id3v2_version", "0", "-f", "mp3"),
    "an ID3v2 tag": (*ID3V2, "-f", "mp3"),
    "an ID3v1 tag": ("-write_id3v1", "1", "-metadata", "title=Feed me", "-f", "mp3"),
    "MPEG-2.5": ("-ar", "8000", "-b:a", "16k", "-f", "mp3"),
    "48 kHz": ("-ar", "48000", "-b:a", "320k", "-f", "mp3"),
}


@pytest.mark.parametrize("options", MP3_OPTIONS.values(), ids=MP3_OPTIONS)
def test_every_kind_of_mp3_is_measured(options: tuple[str, ...], tmp_path: Path) -> None:
    """With a constant or a variable bitrate, with tags or without, of each version of MPEG audio."""
    speech = encoded("-c:a", "libmp3lame", *options)
    assert main.speech_seconds(speech) == pytest.approx(
        decoded_seconds(speech, tmp_path), abs=EXACT_S
    )


def test_a_second_tag_within_an_mp3_is_passed_over() -> None:
    """Speech may be sent as several files, one behind the other."""
    speech = encoded("-c:a", "libmp3lame", "-write_xing", "0", *ID3V2, "-f", "mp3")
    alone = main.speech_seconds(speech)
    assert alone is not None
    assert main.speech_seconds(speech * 2) == pytest.approx(2 * alone, abs=EXACT_S)


def test_a_wav_file_written_as_a_stream_is_measured_by_its_samples() -> None:
    """Its header states the largest size there is, as nobody knew better when it was written."""
    wav = encoded("-c:a", "pcm_s16le", "-f", "wav")
    place = wav.index(b"data") + 4
    for size in (0, 0xFFFF_FFFF):
        streamed = wav[:place] + struct.pack("<I", size) + wav[place + 4 :]
        assert main.speech_seconds(streamed) == 3.0


UNREADABLE = {
    "nothing": b"",
    "RIFF alone": b"RIFF",
    "WAV without samples": b"RIFF\x04\0\0\0WAVE",
    "a format of no bytes": b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + bytes(16) + b"data\x04\0\0\0abcd",
    "Ogg alone": b"OggS\0",
    "Ogg without Opus": b"OggS\0" + bytes(60),
    "a cut head of Opus": b"OggS\0" + bytes(23) + b"OpusHead",
    "ID3 alone": b"ID3\x03\0\0\x7f\x7f\x7f\x7f",
    "text": b"no speech at all",
    "a frame of no stated bitrate": b"\xff\xfb\x00\x00" + bytes(400),
}


@pytest.mark.parametrize("speech", UNREADABLE.values(), ids=UNREADABLE)
def test_a_length_that_cannot_be_read_is_unknown(speech: bytes) -> None:
    """It is no error: the speech may still be put into the video."""
    assert main.speech_seconds(speech) is None


def test_a_speech_without_a_frame_is_given_up_soon() -> None:
    """Nine megabytes, each of which may begin a frame, would take many seconds."""
    started = time.monotonic()
    assert main.speech_seconds(b"\xff" * 9_000_000) is None
    assert time.monotonic() - started < 2


# Videos


@pytest.fixture(scope="module")
def video() -> bytes:
    """Two seconds and a half of video, 160 pixels high."""
    return media.video(PET_FILE.read_bytes(), media.VideoPlan(2.5, 160))


def seconds_of(content: bytes, folder: Path) -> float | None:
    """What is said of a file with this content."""
    path = folder / "video.mp4"
    path.write_bytes(content)
    return main.mp4_seconds(path)


@pytest.mark.parametrize("flags", ["", "+faststart"], ids=["moov at the end", "moov first"])
def test_the_length_of_a_video_is_read_from_its_header(
    flags: str, video: bytes, tmp_path: Path
) -> None:
    """Wherever the header stands."""
    path = tmp_path / "in.mp4"
    path.write_bytes(video)
    content = media.ffmpeg("-i", str(path), "-c", "copy", "-movflags", flags or "0", "-f", "mp4")
    assert seconds_of(content, tmp_path) == pytest.approx(media.probe(path).seconds, abs=EXACT_S)


def test_a_header_of_the_long_form_is_read(tmp_path: Path) -> None:
    """Version 1 has eight bytes for times, and a box may state its length in eight bytes."""
    header = b"\1\0\0\0" + bytes(16) + struct.pack(">IQ", 1000, 7_250) + bytes(80)
    movie = struct.pack(">I4s", 8 + len(header), b"mvhd") + header
    moov = struct.pack(">I4sQ", 1, b"moov", 16 + len(movie)) + movie
    assert seconds_of(struct.pack(">I4s", 8, b"free") + moov, tmp_path) == 7.25


def box(name: bytes, content: bytes) -> bytes:
    """One box of an MP4."""
    return struct.pack(">I4s", 8 + len(content), name) + content


NO_LENGTH = {
    "nothing": b"",
    "no header": box(b"ftyp", b"isom") + box(b"moov", b""),
    "an empty header": box(b"moov", box(b"mvhd", b"")),
    "no timescale": box(b"moov", box(b"mvhd", bytes(12) + struct.pack(">II", 0, 9))),
    "no duration, as in fragments": box(
        b"moov", box(b"mvhd", bytes(12) + struct.pack(">II", 1000, 0))
    ),
    "an unknown duration": box(
        b"moov", box(b"mvhd", bytes(12) + struct.pack(">II", 1000, 2**32 - 1))
    ),
    "a box of three bytes": struct.pack(">I4s", 3, b"moov"),
    "a cut box": box(b"moov", b"\0\0"),
}


@pytest.mark.parametrize("content", NO_LENGTH.values(), ids=NO_LENGTH)
def test_a_video_that_does_not_say_has_no_known_length(content: bytes, tmp_path: Path) -> None:
    """It is no error: the video has been paid for, and may play."""
    assert seconds_of(content, tmp_path) is None


# What is cut


@pytest.mark.parametrize(
    ("audio_seconds", "final_seconds", "cut"),
    [
        pytest.param(40.0, 6.0, 34.5, id="most of it"),
        pytest.param(1.5, 2.0, 0.0, id="none"),
        pytest.param(1.5, 6.0, 0.0, id="a longer video"),
        pytest.param(1.5, 1.93, 0.0, id="less than a frame or two"),
        pytest.param(1.5, 1.9, 0.1, id="a tenth of a second"),
        pytest.param(None, 6.0, None, id="unknown speech"),
        pytest.param(1.5, None, None, id="unknown video"),
    ],
)
def test_what_is_cut_is_what_would_come_after_the_end(
    audio_seconds: float | None, final_seconds: float | None, cut: float | None
) -> None:
    """The speech starts half a second in; what is shorter than a frame or two is no cut."""
    assert main.cut_seconds(audio_seconds, final_seconds) == cut


# In the answer


async def send(
    service: Service, body: dict[str, Any], **headers: str
) -> tuple[list[Event], dict[str, Any]]:
    """A job's stage events, and its result."""
    async with service_client(service.url, headers=headers) as client:
        events = await stream_events(client, "/jobs_prompt_tts", body)
    named = [event for event in events if event.name != "comment"]
    assert named[-1].name == "result", named[-1]
    return named[:-1], named[-1].data


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fit", "speech_s", "final", "cut"),
    [
        pytest.param("shortest", 5.0, 2.5, 3.0, id="shortest, a long speech"),
        pytest.param("shortest", 1.0, 1.5, 0.0, id="shortest, a short speech"),
        pytest.param("video", 5.0, 2.5, 3.0, id="video, a long speech"),
        pytest.param("video", 1.0, 2.5, 0.0, id="video, a short speech"),
        pytest.param("speech", 5.0, 5.5, 0.0, id="speech, a long speech"),
        pytest.param("speech", 1.0, 1.5, 0.0, id="speech, a short speech"),
    ],
)
async def test_the_answer_tells_what_is_cut(
    service: Service,
    sandbox: Sandbox,
    video: bytes,
    tmp_path: Path,
    fit: str,
    speech_s: float,
    final: float,
    cut: float,
) -> None:
    """Its three lengths are those of the files that it names."""
    sandbox.video(video)
    sandbox.speech_seconds = speech_s
    _, result = await send(service, speech_job(sandbox, fit=fit))
    assert result["audio_seconds"] == pytest.approx(speech_s, abs=0.02)
    assert result["final_seconds"] == pytest.approx(final, abs=0.1)
    assert result["cut_seconds"] == pytest.approx(cut, abs=0.1)
    assert cut or result["cut_seconds"] == 0
    path = tmp_path / "final.mp4"
    async with service_client(service.url) as client:
        path.write_bytes((await client.get(result["final_url"])).content)
    assert result["final_seconds"] == pytest.approx(media.probe(path).seconds, abs=EXACT_S)


@pytest.mark.anyio
async def test_the_length_of_the_speech_is_given_before_the_video_is_paid_for(
    service: Service, sandbox: Sandbox
) -> None:
    """The end of the speech stage carries it; no other kind of event does."""
    sandbox.speech_seconds = 1.25
    sandbox.fault("create", "status", status=402)
    async with service_client(service.url) as client:
        events = await stream_events(client, "/jobs_prompt_tts", speech_job(sandbox))
    measured = [
        event.data for event in events if event.name == "stage" and "audio_seconds" in event.data
    ]
    assert [(one["stage"], one["state"]) for one in measured] == [
        ("speech", "done"),
        ("audio_upload", "done"),
    ]
    assert measured[0]["audio_seconds"] == pytest.approx(1.25, abs=0.02)
    assert sandbox.predictions == {}


@pytest.mark.anyio
async def test_a_resumed_job_tells_the_length_of_the_speech_that_it_has(
    service: Service, sandbox: Sandbox, video: bytes
) -> None:
    """The speech is not made again, and its length is read from the stored file."""
    sandbox.video(video)
    sandbox.speech_seconds = 1.25
    key = {"Idempotency-Key": "durations-resumed"}
    sandbox.fault("create", "status", status=402)
    async with service_client(service.url, headers=key) as client:
        assert (await client.post("/jobs_prompt_tts", json=speech_job(sandbox))).status_code == 500
    events, result = await send(service, speech_job(sandbox), **key)
    assert sandbox.speeches.total() == 1
    assert [event.data["stage"] for event in events if "audio_seconds" in event.data] == [
        "audio_upload"
    ]
    assert result["audio_seconds"] == pytest.approx(1.25, abs=0.02)
    assert result["cut_seconds"] == 0


@pytest.mark.anyio
async def test_a_model_that_speaks_itself_cuts_nothing(
    service: Service, sandbox: Sandbox, video: bytes
) -> None:
    """Whatever the length of its video: it has the whole speech and made the video for it."""
    sandbox.video(video)
    sandbox.speech_seconds = 5.0
    _, result = await send(service, speech_job(sandbox, **SPEAKING))
    assert result["audio_seconds"] == pytest.approx(5.0, abs=0.02)
    assert result["final_seconds"] == 2.5
    assert result["cut_seconds"] == 0


def test_an_answer_of_an_earlier_version_has_no_lengths() -> None:
    """A log that was written before it had them is still an answer."""
    urls = {
        name: f"https://files.example/{name}" for name in ("audio_url", "video_url", "final_url")
    }
    result = main.SpeechResult.model_validate(urls)
    assert re.findall(r"_seconds\":(\w+)", result.model_dump_json()) == ["null"] * 3
