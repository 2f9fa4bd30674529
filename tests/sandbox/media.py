"""Real media for the sandbox: speech that can be heard, a video that moves the picture it was given.

Everything here is plain blocking code for a worker thread. ffmpeg is the binary that imageio-ffmpeg brings.
"""

from __future__ import annotations

import http.client
import math
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg

FFMPEG_TIMEOUT_S = 60.0
FETCH_TIMEOUT_S = 10.0
FETCH_LIMIT_BYTES = 20_000_000
SAMPLE_RATE_HZ = 44_100
LETTER_S, VOWEL_S, SPACE_S, COMMA_S, STOP_S = 0.055, 0.085, 0.06, 0.16, 0.26
PENTATONIC = (0, 2, 4, 7, 9, 12, 14, 16)  # semitones above the voice's own note
FORMATS = (  # every output_format that ElevenLabs lists: codec, sample rate, kilobits a second
    *("mp3_22050_32", "mp3_24000_48", "mp3_44100_32", "mp3_44100_64", "mp3_44100_96", "mp3_44100_128", "mp3_44100_192"),
    *(f"{codec}_{rate}" for codec in ("pcm", "wav") for rate in (8000, 16000, 22050, 24000, 32000, 44100, 48000)),
    *("opus_48000_32", "opus_48000_64", "opus_48000_96", "opus_48000_128", "opus_48000_192", "ulaw_8000", "alaw_8000"),
)
ENCODERS = {
    "mp3": ("-c:a", "libmp3lame", "-f", "mp3"),
    "pcm": ("-c:a", "pcm_s16le", "-f", "s16le"),  # raw samples, no header
    "wav": ("-c:a", "pcm_s16le", "-f", "wav"),
    "opus": ("-c:a", "libopus", "-f", "ogg"),
    "ulaw": ("-c:a", "pcm_mulaw", "-f", "mulaw"),
    "alaw": ("-c:a", "pcm_alaw", "-f", "alaw"),
}
PICTURES = {  # first bytes -> ffmpeg's demuxer
    b"\xff\xd8\xff": "jpeg_pipe",
    b"\x89PNG\r\n": "png_pipe",
    b"RIFF": "webp_pipe",
    b"GIF8": "gif",
}


class MediaError(Exception):
    """Something that was to be made, read or fetched cannot be; the text may be shown."""


# Speech


def speech(
    text: str, output_format: str, voice_hz: float = 330.0, seconds: float | None = None, tones: bool = True
) -> bytes:
    """Speak the text in one of FORMATS: espeak-ng's voice where installed, unless `tones` or `seconds` are asked for."""
    espeak = None if tones or seconds else shutil.which("espeak-ng")
    if espeak:
        return encode(espeak_wav(espeak, text, voice_hz), ("-f", "wav"), output_format)
    return encode(
        tone_samples(text, voice_hz, seconds), ("-f", "s16le", "-ar", str(SAMPLE_RATE_HZ), "-ac", "1"), output_format
    )


def encode(sound: bytes, input_options: tuple[str, ...], output_format: str) -> bytes:
    """Sound as ElevenLabs would send it in this output_format, always mono."""
    codec, rate, *kilobits = output_format.split("_")
    bitrate = ("-b:a", f"{kilobits[0]}k") if kilobits else ()
    return ffmpeg(*input_options, "-i", "pipe:0", "-ac", "1", "-ar", rate, *bitrate, *ENCODERS[codec], stdin=sound)


def espeak_wav(espeak: str, text: str, voice_hz: float) -> bytes:
    """The text spoken by espeak-ng, as WAV; a higher voice for more hertz."""
    pitch = str(min(99, max(0, round(voice_hz / 6))))
    command = [espeak, "-v", "en", "-s", "155", "-p", pitch, "--stdin", "--stdout"]
    return subprocess.run(
        command, input=text.encode(), capture_output=True, check=True, timeout=FFMPEG_TIMEOUT_S
    ).stdout


def tone_samples(text: str, voice_hz: float, seconds: float | None) -> bytes:
    """One short tone a letter, silence for spaces and punctuation; repeated or cut to `seconds` if given (S16LE mono)."""
    samples = b"".join(sound_of(character, voice_hz) for character in text.casefold())
    if seconds is None:
        return samples
    wanted = 2 * round(seconds * SAMPLE_RATE_HZ)
    return (samples * (wanted // len(samples) + 1))[:wanted]


@lru_cache(maxsize=1024)
def sound_of(character: str, voice_hz: float) -> bytes:
    """The samples of one character: a plucked note on a pentatonic scale, or silence."""
    if not character.isalnum():
        return bytes(2 * round(pause_s(character) * SAMPLE_RATE_HZ))
    length = round((VOWEL_S if character in "aeiouy" else LETTER_S) * SAMPLE_RATE_HZ)
    hz = voice_hz * 2 ** (PENTATONIC[ord(character) % len(PENTATONIC)] / 12)
    return array("h", (round(9000 * note(hz, i, length)) for i in range(length))).tobytes()


def pause_s(character: str) -> float:
    """Seconds of silence for a character that is no letter and no digit."""
    return STOP_S if character in ".!?\n" else COMMA_S if character in ",;:" else SPACE_S


def note(hz: float, i: int, length: int) -> float:
    """Sample `i` of a soft note that swells and fades within `length` samples, about -1.5 to 1.5."""
    phase = 2 * math.pi * hz * i / SAMPLE_RATE_HZ
    return math.sqrt(math.sin(math.pi * i / length)) * (
        math.sin(phase) + math.sin(2 * phase) / 3 + math.sin(3 * phase) / 6
    )


# Video


@dataclass(frozen=True)
class VideoPlan:
    """What a video is to be: seconds, pixels of the short side, frames a second."""

    seconds: float
    short_side: int
    fps: int = 24


def video(picture: bytes, plan: VideoPlan, audio: bytes | None = None, follow_audio: bool = False) -> bytes:
    """An h264 video of the picture nodding and tilting, with the sound if given; `follow_audio` takes the sound's length."""
    source = ("-f", picture_demuxer(picture), "-i", "pipe:0")
    look = ("-vf", motion(plan), "-r", str(plan.fps), "-c:v", "libx264", "-preset", "ultrafast", "-crf", "27")
    end = ("-shortest",) if follow_audio else ("-t", f"{plan.seconds:g}")
    with tempfile.TemporaryDirectory(prefix="sandbox-video-") as folder:
        sound: tuple[str, ...] = ("-an",)
        if audio is not None:
            Path(folder, "sound").write_bytes(audio)
            sound = ("-i", f"{folder}/sound", "-map", "0:v", "-map", "1:a", "-c:a", "aac")
        try:
            return ffmpeg(*source, *sound, *look, "-pix_fmt", "yuv420p", *end, "-f", "mp4", stdin=picture)
        except MediaError as exc:
            what = "image file" if audio is None else "image or sound file"
            raise MediaError(f"cannot read {what}: {str(exc).splitlines()[0]}") from exc


def picture_demuxer(picture: bytes) -> str:
    """Which ffmpeg demuxer reads this picture, from its first bytes."""
    for start, demuxer in PICTURES.items():
        if picture.startswith(start):
            return demuxer
    raise MediaError("cannot identify image file")


def motion(plan: VideoPlan) -> str:
    """The filters: scale once to a quarter more than asked, tilt for two seconds and again, crop a window that moves."""
    side, spare, tilt = plan.short_side, 2 * math.ceil(plan.short_side * 1.25 / 2), 2 * plan.fps
    window = f"2*trunc(%s*{side}/{spare}/2)"
    filters = (
        "crop='min(iw,2.4*ih)':'min(ih,2.4*iw)'",
        f"scale='if(lt(iw,ih),{spare},-2)':'if(lt(iw,ih),-2,{spare})':out_range=tv",
        "format=yuv420p",
        f"loop=loop={tilt - 1}:size=1,setpts=N/{plan.fps}/TB",
        "rotate=a='0.04*sin(2*PI*t/2)'",  # costs more than all the rest, so its frames are used again
        f"loop=loop=-1:size={tilt},setpts=N/{plan.fps}/TB",
        f"crop=w='{window % 'iw'}':h='{window % 'ih'}'"
        ":x='(iw-ow)/2*(1+0.3*sin(2*PI*t/4))':y='(ih-oh)/2*(1+0.4*sin(2*PI*t/1.1))'",
    )
    return ",".join(filters)


# Fetching, running, looking


def fetch(url: str) -> bytes:
    """The bytes behind an http(s) or data URL, as a model's machine would load them; MediaError if it cannot."""
    if not url.startswith(("http://", "https://", "data:")):
        raise MediaError(f"unsupported URL scheme: {url[:100]}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=FETCH_TIMEOUT_S) as response:
            body: bytes = response.read(FETCH_LIMIT_BYTES + 1)
    except urllib.error.HTTPError as exc:
        exc.close()
        raise MediaError(f"HTTP Error {exc.code}: {exc.reason} for url: {url[:200]}") from exc
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise MediaError(f"{exc} for url: {url[:200]}") from exc
    if len(body) > FETCH_LIMIT_BYTES:
        raise MediaError(f"file too large at url: {url[:200]}")
    return body


def ffmpeg(*options: str, stdin: bytes = b"") -> bytes:
    """Run ffmpeg with the options, an output file added at their end, and return that file's bytes."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        target = Path(folder, "out")
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostats", "-loglevel", "error", "-y", *options, str(target)]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, timeout=FFMPEG_TIMEOUT_S)
        except subprocess.TimeoutExpired as exc:
            raise MediaError("ffmpeg took too long") from exc
        if done.returncode != 0 or not target.exists():
            raise MediaError(done.stderr.decode(errors="replace").strip()[-300:] or "ffmpeg made nothing")
        return target.read_bytes()


@dataclass(frozen=True)
class Probe:
    """What ffmpeg says of a file: seconds (0 if unknown), size, rates; "" or 0 for a stream that is missing."""

    seconds: float
    video: str = ""
    pixels: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    audio: str = ""
    sample_rate: int = 0


def probe(path: str | Path, *input_options: str) -> Probe:
    """Look into a media file with `ffmpeg -i` (there is no ffprobe); raw sound needs its format as input options."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *input_options, "-i", str(path)]
    told = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=FFMPEG_TIMEOUT_S
    ).stderr
    video = re.search(r"Video: (\w+).*?, (\w+)(?:\([^)]*\))?, (\d+)x(\d+).*? ([\d.]+) fps", told)
    audio = re.search(r"Audio: (\w+).*? (\d+) Hz", told)
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", told)
    return Probe(
        int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length else 0.0,
        *((video[1], video[2], int(video[3]), int(video[4]), float(video[5])) if video else ("", "", 0, 0, 0.0)),
        *((audio[1], int(audio[2])) if audio else ("", 0)),
    )
