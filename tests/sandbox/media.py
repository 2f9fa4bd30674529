"""Real media for the sandbox: audible speech, and a video that moves the picture it is given.

Everything here is plain blocking code, to be run in a worker thread. ffmpeg is the binary that
comes with imageio-ffmpeg.
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
from typing import Any

import imageio_ffmpeg

FFMPEG_TIMEOUT_S = 60.0
FETCH_TIMEOUT_S = 10.0
FETCH_LIMIT_BYTES = 20_000_000
SAMPLE_RATE_HZ = 44_100

LETTER_S = 0.055
VOWEL_S = 0.085
SPACE_S = 0.06
COMMA_S = 0.16
STOP_S = 0.26
AMPLITUDE = 9000  # of a note, in 16-bit samples
PENTATONIC = (0, 2, 4, 7, 9, 12, 14, 16)  # semitones above the voice's own note

# Every output_format that ElevenLabs lists: codec, sample rate, and kilobits per second if given.
FORMATS = (
    "mp3_22050_32",
    "mp3_24000_48",
    "mp3_44100_32",
    "mp3_44100_64",
    "mp3_44100_96",
    "mp3_44100_128",
    "mp3_44100_192",
    "pcm_8000",
    "pcm_16000",
    "pcm_22050",
    "pcm_24000",
    "pcm_32000",
    "pcm_44100",
    "pcm_48000",
    "wav_8000",
    "wav_16000",
    "wav_22050",
    "wav_24000",
    "wav_32000",
    "wav_44100",
    "wav_48000",
    "opus_48000_32",
    "opus_48000_64",
    "opus_48000_96",
    "opus_48000_128",
    "opus_48000_192",
    "ulaw_8000",
    "alaw_8000",
)
ENCODERS = {
    "mp3": ["-c:a", "libmp3lame", "-f", "mp3"],
    "pcm": ["-c:a", "pcm_s16le", "-f", "s16le"],  # raw samples, no header
    "wav": ["-c:a", "pcm_s16le", "-f", "wav"],
    "opus": ["-c:a", "libopus", "-f", "ogg"],
    "ulaw": ["-c:a", "pcm_mulaw", "-f", "mulaw"],
    "alaw": ["-c:a", "pcm_alaw", "-f", "alaw"],
}
TONE_INPUT = ["-f", "s16le", "-ar", str(SAMPLE_RATE_HZ), "-ac", "1"]
PICTURE_DEMUXERS = {  # first bytes of a picture -> ffmpeg's demuxer
    b"\xff\xd8\xff": "jpeg_pipe",
    b"\x89PNG\r\n": "png_pipe",
    b"RIFF": "webp_pipe",
    b"GIF8": "gif",
}


class MediaError(Exception):
    """A file cannot be made, read or fetched; the message may be shown to the client."""


# Speech


def speech(
    text: str,
    output_format: str,
    voice_hz: float = 330.0,
    seconds: float | None = None,
    tones: bool = True,
) -> bytes:
    """Speak the text in one of FORMATS.

    The voice is espeak-ng's if it is installed, unless `tones` or an exact length in `seconds` is
    asked for.
    """
    espeak = None
    if not tones and not seconds:
        espeak = shutil.which("espeak-ng")

    if espeak:
        return encode(espeak_wav(espeak, text, voice_hz), ["-f", "wav"], output_format)
    return encode(tone_samples(text, voice_hz, seconds), TONE_INPUT, output_format)


def encode(audio: bytes, input_options: list[str], output_format: str) -> bytes:
    """Encode audio as ElevenLabs would send it in this output_format, always mono."""
    codec, rate, *kilobits = output_format.split("_")
    options = [*input_options, "-i", "pipe:0", "-ac", "1", "-ar", rate]
    if kilobits:
        options += ["-b:a", f"{kilobits[0]}k"]
    options += ENCODERS[codec]
    return ffmpeg(*options, stdin=audio)


def espeak_wav(espeak: str, text: str, voice_hz: float) -> bytes:
    """Speak the text with espeak-ng, as WAV; more hertz give a higher voice."""
    pitch = min(99, max(0, round(voice_hz / 6)))
    command = [espeak, "-v", "en", "-s", "155", "-p", str(pitch), "--stdin", "--stdout"]
    process = subprocess.run(
        command,
        input=text.encode(),
        capture_output=True,
        check=True,
        timeout=FFMPEG_TIMEOUT_S,
    )
    return process.stdout


def tone_samples(text: str, voice_hz: float, seconds: float | None) -> bytes:
    """One short tone per letter, and silence for spaces and punctuation (S16LE, mono).

    If `seconds` is given, the samples are repeated or cut to exactly that length.
    """
    samples = b"".join(character_samples(character, voice_hz) for character in text.casefold())
    if seconds is None:
        return samples
    length = 2 * round(seconds * SAMPLE_RATE_HZ)
    repeats = length // len(samples) + 1
    return (samples * repeats)[:length]


@lru_cache(maxsize=1024)
def character_samples(character: str, voice_hz: float) -> bytes:
    """The samples of one character: a plucked note on a pentatonic scale, or silence."""
    if not character.isalnum():
        return bytes(2 * round(pause_s(character) * SAMPLE_RATE_HZ))

    seconds = VOWEL_S if character in "aeiouy" else LETTER_S
    count = round(seconds * SAMPLE_RATE_HZ)
    semitones = PENTATONIC[ord(character) % len(PENTATONIC)]
    hz = voice_hz * 2 ** (semitones / 12)
    samples = array("h")
    for i in range(count):
        samples.append(round(AMPLITUDE * note(hz, i, count)))
    return samples.tobytes()


def pause_s(character: str) -> float:
    """Seconds of silence for a character that is neither a letter nor a digit."""
    if character in ".!?\n":
        return STOP_S
    if character in ",;:":
        return COMMA_S
    return SPACE_S


def note(hz: float, i: int, count: int) -> float:
    """Sample `i` of `count` of a soft note that swells and fades, about -1.5 to 1.5."""
    phase = 2 * math.pi * hz * i / SAMPLE_RATE_HZ
    envelope = math.sqrt(math.sin(math.pi * i / count))
    return envelope * (math.sin(phase) + math.sin(2 * phase) / 3 + math.sin(3 * phase) / 6)


# Video


X264 = ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "27"]
X265 = ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=error"]
VP9 = ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "2M"]
MP4 = ["-movflags", "+faststart", "-f", "mp4"]
VIDEO_FORMATS = {  # what models hand over; browsers play the first
    "h264": [*X264, "-pix_fmt", "yuv420p", *MP4],
    "mp4v": ["-c:v", "mpeg4", "-q:v", "4", *MP4],  # as cv2.VideoWriter writes
    "h264-444": [*X264, "-pix_fmt", "yuv444p", *MP4],  # as ffmpeg makes of RGB frames
    "hevc-10-bit": [*X265, "-pix_fmt", "yuv420p10le", *MP4],
    "vp9-webm": [*VP9, "-f", "webm"],
    "gif": ["-f", "gif"],
    "animated-webp": ["-c:v", "libwebp_anim", "-quality", "60", "-f", "webp"],
}


@dataclass(frozen=True)
class VideoPlan:
    """What a video must be: seconds, pixels of its short side, frames per second, its format."""

    seconds: float
    short_side: int
    fps: int = 24
    format: str = "h264"


def video(
    picture: bytes,
    plan: VideoPlan,
    audio: bytes | None = None,
    follow_audio: bool = False,
) -> bytes:
    """Make a video of the picture nodding and tilting, with the audio if given.

    With `follow_audio` the video is as long as the audio.
    """
    options = ["-f", picture_demuxer(picture), "-i", "pipe:0"]
    with tempfile.TemporaryDirectory(prefix="sandbox-video-") as folder:
        if audio is None:
            options += ["-an"]
        else:
            audio_file = Path(folder, "sound")
            audio_file.write_bytes(audio)
            options += ["-i", str(audio_file), "-map", "0:v", "-map", "1:a", "-c:a", "aac"]

        options += ["-vf", motion(plan), "-r", str(plan.fps)]
        if follow_audio:
            options += ["-shortest"]
        else:
            options += ["-t", f"{plan.seconds:g}"]
        options += VIDEO_FORMATS[plan.format]

        try:
            return ffmpeg(*options, stdin=picture)
        except MediaError as exc:
            inputs = "image file" if audio is None else "image or sound file"
            first_line = str(exc).splitlines()[0]
            raise MediaError(f"cannot read {inputs}: {first_line}") from exc


def picture_demuxer(picture: bytes) -> str:
    """The ffmpeg demuxer for this picture, known by its first bytes."""
    for start, demuxer in PICTURE_DEMUXERS.items():
        if picture.startswith(start):
            return demuxer
    raise MediaError("cannot identify image file")


def motion(plan: VideoPlan) -> str:
    """The ffmpeg filters that make a video of one picture.

    The picture is scaled once, to a quarter more than the size of the video. It tilts for two
    seconds, which are then repeated, and the video is a window that moves over it.
    """
    side = plan.short_side
    scaled_side = 2 * math.ceil(side * 1.25 / 2)
    tilt_frames = 2 * plan.fps
    width = f"2*trunc(iw*{side}/{scaled_side}/2)"
    height = f"2*trunc(ih*{side}/{scaled_side}/2)"
    x = "(iw-ow)/2*(1+0.3*sin(2*PI*t/4))"
    y = "(ih-oh)/2*(1+0.4*sin(2*PI*t/1.1))"
    filters = [
        "crop='min(iw,2.4*ih)':'min(ih,2.4*iw)'",
        f"scale='if(lt(iw,ih),{scaled_side},-2)':'if(lt(iw,ih),-2,{scaled_side})':out_range=tv",
        "format=yuv420p",
        f"loop=loop={tilt_frames - 1}:size=1,setpts=N/{plan.fps}/TB",
        "rotate=a='0.04*sin(2*PI*t/2)'",  # costs more than all the rest, so its frames are reused
        f"loop=loop=-1:size={tilt_frames},setpts=N/{plan.fps}/TB",
        f"crop=w='{width}':h='{height}':x='{x}':y='{y}'",
    ]
    return ",".join(filters)


# Fetching and ffmpeg


def fetch(url: str) -> bytes:
    """Download an http(s) or data URL, as the machine that runs a model would.

    Raises MediaError if it cannot.
    """
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
    """Run ffmpeg with these options and one output file, and return that file's bytes."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        output = Path(folder, "out")
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostats", "-loglevel", "error", "-y"]
        command += [*options, str(output)]
        try:
            process = subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                timeout=FFMPEG_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as exc:
            raise MediaError("ffmpeg took too long") from exc

        if process.returncode != 0 or not output.exists():
            message = process.stderr.decode(errors="replace").strip()[-300:]
            raise MediaError(message or "ffmpeg made nothing")
        return output.read_bytes()


@dataclass(frozen=True)
class Probe:
    """What ffmpeg says about a file; "" or 0 for what is unknown or a stream that is missing."""

    seconds: float = 0.0
    video: str = ""  # the codec
    pixels: str = ""  # the pixel format
    width: int = 0
    height: int = 0
    fps: float = 0.0
    audio: str = ""  # the codec
    sample_rate: int = 0


def probe(path: str | Path, *input_options: str) -> Probe:
    """Inspect a media file with `ffmpeg -i`, as there is no ffprobe.

    Raw audio needs its format as input options.
    """
    ffmpeg_exe = imageio_ffmpeg.get_ffmpeg_exe()
    process = subprocess.run(
        [ffmpeg_exe, "-hide_banner", *input_options, "-i", str(path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=FFMPEG_TIMEOUT_S,
    )
    found = {
        **duration_in(process.stderr),
        **video_stream_in(process.stderr),
        **audio_stream_in(process.stderr),
    }
    return Probe(**found)


def duration_in(output: str) -> dict[str, Any]:
    """The length in ffmpeg's output, as fields of a Probe."""
    match = re.search(r"Duration: (\d+):(\d+):([\d.]+)", output)
    if match is None:
        return {}
    hours, minutes, seconds = match.groups()
    return {"seconds": int(hours) * 3600 + int(minutes) * 60 + float(seconds)}


def video_stream_in(output: str) -> dict[str, Any]:
    """The video stream in ffmpeg's output, as fields of a Probe."""
    pattern = r"Video: (\w+).*?, (\w+)(?:\([^)]*\))?, (\d+)x(\d+).*? ([\d.]+) fps"
    match = re.search(pattern, output)
    if match is None:
        return {}
    return {
        "video": match[1],
        "pixels": match[2],
        "width": int(match[3]),
        "height": int(match[4]),
        "fps": float(match[5]),
    }


def audio_stream_in(output: str) -> dict[str, Any]:
    """The audio stream in ffmpeg's output, as fields of a Probe."""
    match = re.search(r"Audio: (\w+).*? (\d+) Hz", output)
    if match is None:
        return {}
    return {"audio": match[1], "sample_rate": int(match[2])}
