"""ffmpeg: muxing measured on real media, unusable media, limits of time and memory, and cancelled processes."""

import asyncio
import os
import re
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from array import array
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import main
from tests.support import network
from tests.support.application import in_lifespan
from tests.support.ffmpeg import FFMPEG, children, ffmpeg
from tests.support.network import reply
from tests.support.processes import needs_proc

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("_no_child_left")]

serve = network.serve

CANNOT_USE = "Video and speech could not be put together; ffmpeg cannot use one of them."
NO_VIDEO = "What the model made is not an MP4 video."
BREAKS_OFF = "The video that the model made is cut off."
SPEECH_HZ, VIDEO_HZ = 440, 1000  # the tones of our speech, and of a video that brings its own sound


async def mux(video: Path, speech: Path, final: Path, fit: main.Fit = "shortest") -> None:
    """Put video and speech together as a job does, inside the application's lifespan."""
    await in_lifespan(main.mux_video_audio(video, speech, final, fit))


# Media to put together

RAW = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}
ENCODERS = {
    "pcm": "pcm_s16le",
    "wav": "pcm_s16le",
    "ulaw": "pcm_mulaw",
    "alaw": "pcm_alaw",
    "opus": "libopus",
}


class Video(NamedTuple):
    """What a video of the tests is like; `sound_s` is the length of a tone of its own."""

    seconds: float = 6
    fps: str = "25"
    sound_s: float | None = None
    options: tuple[str, ...] = ()


class Studio:
    """Makes small videos, speeches and clips, each once for all tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, *parts: object) -> Path:
        """Where something is kept."""
        return self.folder / re.sub(r"[^\w.]+", "-", "-".join(map(str, parts)))

    def video(self, video: Video = Video()) -> Path:  # noqa: B008  a tuple
        """A video with B-frames."""
        path = self.file("video", *video, ".mp4")
        if not path.exists():
            picture = ("-f", "lavfi", "-i", f"testsrc2=s=160x120:r={video.fps}:d={video.seconds}")
            sound = (
                ("-f", "lavfi", "-i", f"sine={VIDEO_HZ}:d={video.sound_s}", "-c:a", "aac")
                if video.sound_s
                else ()
            )
            encoder = (
                "-c:v",
                "libx264",
                "-preset",
                "veryfast",
                "-bf",
                "2",
                "-g",
                "30",
                "-pix_fmt",
                "yuv420p",
            )
            ffmpeg(*picture, *sound, *encoder, *video.options, path)
        return path

    def speech(self, seconds: float = 3, output_format: str = "mp3_44100_64") -> Path:
        """A tone as our storage keeps the speech that ElevenLabs sends in this format."""
        path = self.file("speech", seconds, output_format)
        if not path.exists():
            codec, rate, *kbits = output_format.split("_")
            encoder = ("-c:a", ENCODERS[codec]) if codec in ENCODERS else ()
            bitrate = ("-b:a", f"{kbits[0]}k") if kbits else ()
            muxer = RAW.get(codec, "ogg" if codec == "opus" else codec)
            tone = ("-f", "lavfi", "-i", f"sine={SPEECH_HZ}:d={seconds}:r={rate}")
            ffmpeg(*tone, "-ac", "1", "-ar", rate, *encoder, *bitrate, "-f", muxer, path)
            path.write_bytes(main.validate_speech(path.read_bytes(), output_format))
        return path

    async def clip(self, video: Video, speech_s: float, fit: main.Fit) -> Path:
        """Both put together by the service."""
        path = self.file("clip", *video, speech_s, fit, ".mp4")
        if not path.exists():
            await mux(self.video(video), self.speech(speech_s), path, fit)
        return path


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Videos, speeches and clips."""
    return Studio(tmp_path_factory.mktemp("studio"))


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """Where the talking video goes."""
    return tmp_path / "final.mp4"


# Media measured


class Packet(NamedTuple):
    """A compressed frame: when it is decoded and shown, in seconds, and a checksum of its bytes."""

    dts: float
    pts: float
    seconds: float
    checksum: str


class Clip:
    """What a media file holds, read without decoding."""

    def __init__(self, path: Path) -> None:
        read = ffmpeg("-i", path, "-map", "0", "-c", "copy", "-f", "framecrc", "-")
        report = read.stderr.decode()
        hours, minutes, seconds = re.findall(r"Duration: (\d+):(\d+):([\d.]+)", report)[0]
        self.seconds = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        inputs = report.partition("Output #0")[0]
        self.streams = re.findall(r"Stream #0:\d.*?: ((?:Video|Audio|Subtitle|Data): \w+)", inputs)
        self.packets: list[list[Packet]] = [[] for _ in self.streams]
        lines = read.stdout.decode().replace(" ", "").splitlines()
        base = [
            int(tb[1]) / int(tb[2])
            for line in lines
            if (tb := re.match(r"#tb\d+:(\d+)/(\d+)", line))
        ]
        for stream, dts, pts, duration, _, checksum, *_ in (
            line.split(",") for line in lines if line[0] != "#"
        ):
            times = (int(value) * base[int(stream)] for value in (dts, pts, duration))
            self.packets[int(stream)].append(Packet(*times, checksum))
        self.ends = [
            max(packet.pts + packet.seconds for packet in packets) for packets in self.packets
        ]
        self.checksums = [packet.checksum for packet in self.packets[0]]


seen = lru_cache(Clip)  # for what the studio keeps


def complaints(path: Path) -> str:
    """What ffmpeg warns of when it decodes a whole file."""
    return ffmpeg("-v", "warning", "-i", path, "-f", "null", "-").stderr.decode()


class Sound:
    """The sound of a file: from when to when something is heard, in seconds, and how high a tone it is."""

    def __init__(self, path: Path) -> None:
        raw = ffmpeg("-v", "error", "-i", path, "-ac", "1", "-ar", 8000, "-f", "s16le", "-").stdout
        samples = array("h", raw)
        loud = [i for i, sample in enumerate(samples) if abs(sample) > 800]
        self.starts_s, self.ends_s = loud[0] / 8000, loud[-1] / 8000
        waves = sum(early < 0 <= late for early, late in pairwise(samples[loud[0] : loud[-1]]))
        self.hz = waves / (self.ends_s - self.starts_s)


# A talking video, measured

USUAL = Video()
SOUNDING = Video(6, "24", sound_s=8)
VIDEOS = {
    "B-frames": USUAL,
    "30000/1001": Video(6.006, "30000/1001"),
    "16 fps": Video(6, "16"),
    "own sound": SOUNDING,
}
EVERY_FIT = pytest.mark.parametrize("fit", ["shortest", "video", "speech"])
EVERY_VIDEO = pytest.mark.parametrize("video", VIDEOS.values(), ids=VIDEOS)


@EVERY_FIT
def test_only_files_are_opened_and_no_format_is_guessed(fit):
    """Both inputs have a fixed demuxer and may open files only; every path has the prefix file:."""
    arguments = main.mux_arguments(
        Path("/f/video"), Path("/f/speech"), "ogg", fit, Path("/f/final")
    )
    video, speech, outputs = " ".join(arguments).split(" -i ")
    assert video.endswith(" -f mov")
    assert speech.startswith("file:/f/video ")
    assert speech.endswith(" -f ogg")
    assert all("-protocol_whitelist file " in options for options in (video, speech))
    assert outputs.startswith("file:/f/speech ")
    assert arguments[-1] == "file:/f/final"


@pytest.mark.parametrize(
    ("video", "speech_s", "fit", "seconds"),
    [
        *(
            pytest.param(video, 9, "speech", 9.5, id=f"9 s speech, {name}")
            for name, video in VIDEOS.items()
        ),
        *(
            pytest.param(video, 9, "shortest", 6.0, id=f"9 s shortest, {name}")
            for name, video in VIDEOS.items()
        ),
        pytest.param(SOUNDING, 9, "video", 6.0, id="9 s video, own sound"),
        pytest.param(SOUNDING, 3, "shortest", 3.5, id="3 s shortest, own sound"),
        pytest.param(SOUNDING, 3, "video", 6.0, id="3 s video, own sound"),
        pytest.param(USUAL, 3, "shortest", 3.5, id="3 s shortest"),
        pytest.param(USUAL, 3, "video", 6.0, id="3 s video"),
        pytest.param(USUAL, 3, "speech", 3.5, id="3 s speech"),
        pytest.param(Video(0.04), 3, "speech", 3.5, id="a video of one picture"),
    ],
)
async def test_fit_decides_what_ends_the_clip(video, speech_s, fit, seconds, studio):
    """The clip, its picture and its sound all end where `fit` says."""
    clip = seen(await studio.clip(video, speech_s, fit))
    assert clip.seconds == pytest.approx(seconds, abs=0.1)
    assert clip.ends == pytest.approx([seconds, seconds], abs=0.1)
    assert clip.streams == ["Video: h264", "Audio: aac"]


async def test_the_length_of_a_clip_is_the_same_every_time(studio, tmp_path):
    """It does not depend on the order in which ffmpeg's threads run."""
    video, speech, finals = (
        studio.video(VIDEOS["16 fps"]),
        studio.speech(9),
        [tmp_path / f"{n}.mp4" for n in range(6)],
    )
    async with main.lifespan(main.app):
        await asyncio.gather(
            *(main.mux_video_audio(video, speech, final, "speech") for final in finals)
        )
    assert [Clip(final).seconds for final in finals] == pytest.approx([9.5] * len(finals), abs=0.1)


@EVERY_VIDEO
async def test_the_picture_is_copied_bit_by_bit(video, studio):
    """Every packet of the video is in the clip, in its order and at its time."""
    source, clip = seen(studio.video(video)), seen(await studio.clip(video, 9, "shortest"))
    assert clip.checksums == source.checksums
    assert [packet.pts for packet in clip.packets[0]] == pytest.approx(
        [packet.pts for packet in source.packets[0]]
    )


@EVERY_VIDEO
async def test_a_repeated_video_runs_steadily(video, studio):
    """Where the video starts again, no frame is dropped, doubled or late, and ffmpeg prints no warning."""
    path = await studio.clip(video, 9, "speech")
    source, clip = seen(studio.video(video)), seen(path)
    shown = sorted(packet.pts for packet in clip.packets[0])
    assert clip.checksums == (source.checksums * 2)[: len(clip.checksums)]
    assert len(clip.checksums) > len(source.checksums)
    steps = [late - early for early, late in pairwise(shown)]
    assert steps == pytest.approx([source.packets[0][0].seconds] * len(steps), abs=0.001)
    assert all(early.dts < late.dts for early, late in pairwise(clip.packets[0]))
    assert complaints(path) == ""


@EVERY_FIT
async def test_the_speech_starts_half_a_second_in(fit, studio):
    """Silence, the whole speech, silence; the file decodes without a warning and its index comes first."""
    path = await studio.clip(USUAL, 3, fit)
    sound, data = Sound(path), path.read_bytes()
    assert (sound.starts_s, sound.ends_s) == pytest.approx((0.5, 3.5), abs=0.06)
    assert (data[4:8], complaints(path)) == (b"ftyp", "")
    assert data.index(b"moov") < data.index(b"mdat")


async def test_a_videos_own_sound_is_not_heard(studio):
    """Of the two tones only the speech's is in the clip."""
    own, request_heads = (
        Sound(studio.video(SOUNDING)),
        Sound(await studio.clip(SOUNDING, 9, "shortest")),
    )
    assert (own.hz, request_heads.hz) == pytest.approx((VIDEO_HZ, SPEECH_HZ), rel=0.02)


@pytest.mark.parametrize(
    "output_format",
    [
        "mp3_22050_32",
        "mp3_44100_192",
        "opus_48000_32",
        "pcm_8000",
        "pcm_44100",
        "wav_48000",
        "ulaw_8000",
        "alaw_8000",
    ],
)
async def test_every_format_of_speech_is_muxed(output_format, studio, final, monkeypatch):
    """Speech in each codec that ElevenLabs sends is heard in the clip at its time."""
    monkeypatch.setenv("TTS_OUTPUT_FORMAT", output_format)
    main.get_settings.cache_clear()
    await mux(studio.video(), studio.speech(1, output_format), final)
    sound = Sound(final)
    assert (sound.starts_s, sound.ends_s) == pytest.approx((0.5, 1.5), abs=0.06)
    assert sound.hz == pytest.approx(SPEECH_HZ, rel=0.02)


@pytest.mark.parametrize(
    ("around", "ends_s"),
    [
        pytest.param(lambda speech: speech[:-100], 3.5, id="last frame cut"),
        pytest.param(lambda speech: speech + b"TAG" + bytes(125), 3.5, id="tag at its end"),
        pytest.param(lambda speech: speech + bytes(64), 3.5, id="zeros at its end"),
        pytest.param(lambda speech: speech + speech, 6.0, id="two pieces"),
    ],
)
async def test_slightly_damaged_speech_is_muxed(around, ends_s, studio, final, tmp_path):
    """Speech that every player plays does not cost the video that was paid for."""
    speech = tmp_path / "speech"
    speech.write_bytes(around(studio.speech(3).read_bytes()))
    await mux(studio.video(), speech, final)
    assert Sound(final).ends_s == pytest.approx(ends_s, abs=0.1)


@pytest.mark.parametrize(
    "name", ["-y", "concat:a|b 'c' \"d\" $(e) %03d späße\n"], ids=["option", "all else"]
)
async def test_file_names_are_not_interpreted(name, studio, tmp_path):
    """No path is read as an option, a URL, a pattern or a command."""
    folder = tmp_path / name
    folder.mkdir()
    video = folder / name
    video.write_bytes(studio.video().read_bytes())
    await mux(video, studio.speech(3), folder / f"{name}.final")
    assert Clip(folder / f"{name}.final").seconds == pytest.approx(3.5, abs=0.1)


# Media that cannot be used

NOISE = array(
    "I", (n * 2_654_435_761 >> 7 & 0xFFFFFFFF for n in range(12_500))
).tobytes()  # the same each time
HLS, CONCAT = "#EXTM3U\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"
INDEX_FIRST = Video(options=("-movflags", "+faststart"))
# A box whose length has 64 bits, and one that goes on to the end of the file.
ODD_BOXES = (
    struct.pack(">I4sQ", 1, b"free", 20) + b"long" + struct.pack(">I4s", 0, b"free") + b"rest"
)
TONE, SOUND_FILE = ("-f", "lavfi", "-i", "sine=1000:d=1"), ("-c:a", "aac")
COVER = (
    "-f",
    "lavfi",
    "-i",
    "color=red:s=64x64",
    "-frames:v",
    1,
    "-c:v",
    "mjpeg",
    "-disposition:v:0",
    "attached_pic",
)


async def refusal(video: Path, speech: Path, final: Path, fit: main.Fit = "shortest") -> str:
    """What is said of media that cannot be used: a failed resource, and nothing of this machine in the clip."""
    with pytest.raises(main.ResourceFailed) as failed:
        await mux(video, speech, final, fit)
    assert not failed.value.retryable
    assert not final.exists() or b"root:" not in final.read_bytes()
    return failed.value.detail


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", BREAKS_OFF, id="empty"),
        pytest.param(b"<html><body><h1>404 Not Found</h1></body></html>", NO_VIDEO, id="HTML"),
        pytest.param(NOISE, NO_VIDEO, id="noise"),
        pytest.param(bytes(50_000), NO_VIDEO, id="zeros"),
        pytest.param(
            b"\0\0\0\x20ftypisom" + NOISE, BREAKS_OFF, id="noise that begins like a video"
        ),
        pytest.param(b"\0\0\0\x08ftyp\0\0\0\0mdat" + NOISE, CANNOT_USE, id="noise in a box"),
        pytest.param(HLS.format("file:///etc/passwd").encode(), NO_VIDEO, id="HLS of a file"),
        pytest.param(CONCAT.format("/etc/passwd").encode(), NO_VIDEO, id="ffconcat of a file"),
        # only a picture in an MP4 is a video, whatever ffmpeg could read
        pytest.param((*TONE, *SOUND_FILE, "-f", "mp4"), CANNOT_USE, id="sound alone"),
        pytest.param(
            (*TONE, *COVER, *SOUND_FILE, "-f", "mp4"), CANNOT_USE, id="sound with a cover picture"
        ),
        pytest.param((*TONE, *SOUND_FILE, "-f", "matroska"), NO_VIDEO, id="another container"),
    ],
)
async def test_files_that_are_not_media_are_rejected(content, reason, studio, final, tmp_path):
    """Neither as the video nor as the speech do they become a clip."""
    media = tmp_path / "media"
    if isinstance(content, bytes):
        media.write_bytes(content)
    else:
        ffmpeg(*content, media)
    assert await refusal(media, studio.speech(3), final) == reason
    assert await refusal(studio.video(), media, final) == CANNOT_USE


@pytest.mark.parametrize("playlist", [HLS, CONCAT], ids=["HLS", "ffconcat"])
async def test_ffmpeg_reads_no_playlist(playlist, serve, studio, final, tmp_path):
    """A playlist in place of video or speech makes ffmpeg open no other file and no connection."""
    video, speech, media = studio.video(), studio.speech(3), tmp_path / "media.mp4"
    server = serve({"/a.mp4": reply(200, video.read_bytes())})
    (tmp_path / "secret.mp4").write_bytes(video.read_bytes())
    for target in (f"{server.url}/a.mp4", "secret.mp4"):
        media.write_text(playlist.format(target))
        for inputs in ((media, speech), (video, media)):
            with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
                await main.run_ffmpeg(main.mux_arguments(*inputs, "mp3", "speech", final), 10)
    assert server.was_never_contacted()


@pytest.mark.parametrize(
    ("video", "share", "more", "is_whole"),
    [
        pytest.param(USUAL, 0.5, b"", False, id="index at the end, half"),
        pytest.param(INDEX_FIRST, 0.5, b"", False, id="index first, half"),
        pytest.param(INDEX_FIRST, 0.9999, b"", False, id="index first, nearly whole"),
        pytest.param(INDEX_FIRST, 0.01, b"", False, id="index cut"),
        pytest.param(
            USUAL,
            1,
            struct.pack(">I4sQ", 1, b"free", 1000) + b"less",
            False,
            id="a length in 64 bits",
        ),
        pytest.param(
            INDEX_FIRST, 1, ODD_BOXES, True, id="index first, and boxes of unusual length"
        ),
        pytest.param(
            Video(options=("-movflags", "+frag_keyframe+empty_moov")), 1, b"", True, id="fragments"
        ),
        pytest.param(Video(options=("-brand", "qt  ")), 1, b"", True, id="QuickTime"),
    ],
)
async def test_a_truncated_video_is_rejected_and_a_complete_one_is_not(
    video, share, more, is_whole, studio, final, tmp_path
):
    """However the MP4 file is laid out, half a video does not become a short one."""
    whole, given = studio.video(video).read_bytes(), tmp_path / "video.mp4"
    given.write_bytes(whole[: int(len(whole) * share)] + more)
    if is_whole:
        await mux(given, studio.speech(3), final)
        assert Clip(final).seconds == pytest.approx(3.5, abs=0.1)
    else:
        assert await refusal(given, studio.speech(9), final) == BREAKS_OFF


async def test_a_video_of_many_boxes_is_not_read_to_its_end(studio, final, tmp_path):
    """A file of millions of boxes, made to be slow to check, is rejected within a second."""
    video = tmp_path / "video.mp4"
    video.write_bytes(struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4s", 8, b"free") * 4_000_000)
    began = time.process_time()
    assert await refusal(video, studio.speech(3), final) == BREAKS_OFF
    assert time.process_time() - began < 1  # all boxes: several seconds


async def test_a_heavy_video_does_not_fill_the_disk(studio, final, tmp_path):
    """A short video of many bytes repeats until the clip has 100 MB, not until the speech ends."""
    video = tmp_path / "video.mp4"
    noise = "nullsrc=s=1280x720:r=25:d=0.2,noise=alls=100:allf=t"
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        noise,
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-qp",
        0,
        "-pix_fmt",
        "yuv420p",
        video,
    )
    assert video.stat().st_size > 2_500_000
    assert (
        await refusal(video, studio.speech(9), final, "speech")
        == "The final video is larger than 100 MB."
    )
    assert final.stat().st_size < 130_000_000


def test_a_huge_frame_does_not_fill_the_memory(studio, final, tmp_path):
    """A video of 8192 x 8200 pixels needs hardly more memory than a usual one."""
    video = tmp_path / "video.mp4"
    encoder = (
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-tune",
        "zerolatency",
        "-pix_fmt",
        "gray",
    )
    ffmpeg("-f", "lavfi", "-i", "color=s=8192x8200:r=1", "-frames:v", 1, *encoder, video)
    # In a process of its own: the largest child counts, and the encoder above was larger.
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    mux = [FFMPEG, *main.mux_arguments(video, studio.speech(3), "mp3", "shortest", final)]
    measured = subprocess.run(
        [sys.executable, "-c", program, *mux], capture_output=True, check=True, timeout=60
    )
    assert int(measured.stdout) * (1 if sys.platform == "darwin" else 1024) < 110_000_000


# The process

ENDLESS = ["-v", "error", "-f", "lavfi", "-i", "testsrc2", "-f", "null", "-"]


async def started(processes: int = 1, without: int = 0) -> set[int]:
    """The ffmpeg processes that run, of which `without` is none, once there are so many."""
    deadline = time.monotonic() + 10
    while len(found := children() - {without}) < processes:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
    return found


@pytest.fixture
def silent_speech(tmp_path: Path) -> Iterator[Path]:
    """Speech that begins and never comes to its end."""
    path = tmp_path / "silent"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    os.write(writer, b"ID3\x04" * 16)
    yield path
    os.close(writer)


@needs_proc
async def test_the_time_limit_kills_ffmpeg(studio, final, silent_speech, monkeypatch):
    """After FFMPEG_TIMEOUT_S the process is killed and reaped, and the job gets a resource error."""
    assert main.FFMPEG_TIMEOUT_S == 60
    monkeypatch.setattr(main, "FFMPEG_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(
        main.ResourceFailed, match=r"^The video could not be put together within 0\.2 s\.$"
    ):
        await asyncio.wait_for(mux(studio.video(), silent_speech, final), 5)
    assert time.monotonic() - began < 2


@needs_proc
async def test_a_call_can_be_cancelled_at_any_moment():
    """While it runs or is being started: no ffmpeg is left, and the task ends cancelled."""
    for moment in range(25):
        task = asyncio.create_task(main.run_ffmpeg(ENDLESS, 60))
        for _ in range(moment):
            await asyncio.sleep(0)
        if moment > 12:
            await asyncio.sleep(0.0005 * (moment - 12))
        if moment == 24:
            await started()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == set()


@pytest.fixture
def _open_stdin() -> Iterator[None]:
    """A standard input that one could read from, as in a terminal."""
    kept, (reading, writing) = os.dup(0), os.pipe()
    os.dup2(reading, 0)
    yield
    os.dup2(kept, 0)
    for descriptor in (kept, reading, writing):
        os.close(descriptor)


@needs_proc
@pytest.mark.usefixtures("_open_stdin")
async def test_ffmpeg_shares_nothing_with_the_service(monkeypatch):
    """It gets no key and no input, and Ctrl-C in a terminal does not reach it."""
    monkeypatch.setenv("ELEVEN_API_KEY", "eleven-key")
    task = asyncio.create_task(main.run_ffmpeg(ENDLESS, 60))
    [pid] = await started()
    while "lavfi" not in Path(f"/proc/{pid}/cmdline").read_text():
        await asyncio.sleep(0.001)  # until exec
    environment, session = Path(f"/proc/{pid}/environ").read_bytes(), os.getsid(pid)
    stdin = os.readlink(f"/proc/{pid}/fd/0")
    task.cancel()
    await asyncio.wait([task])
    assert b"=" not in environment
    assert (session, stdin) == (pid, "/dev/null")


async def test_ffmpegs_error_is_logged(caplog):
    """The client gets a general message, the log ffmpeg's own."""
    with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
        await main.run_ffmpeg(["-v", "error", "-i", "file:/nowhere.mp4", "-f", "null", "-"], 10)
    assert re.search(
        r"ffmpeg ended with \d+: .*No such file or directory.*/nowhere\.mp4", caplog.text
    )


@needs_proc
async def test_only_the_end_of_ffmpegs_output_is_kept(caplog):
    """Of 25 MB on stderr a few kB stay in memory and in the log."""
    flood = [
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "color=s=1024x1024:r=1000",
        "-f",
        "rawvideo",
        "pipe:2",
    ]
    tracemalloc.start()
    try:
        task = asyncio.create_task(main.run_ffmpeg(flood, 10))
        [pid] = await started()
        while (
            int(Path(f"/proc/{pid}/io").read_text().split()[3]) < 25_000_000
        ):  # wchar: written so far
            await asyncio.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
            await task
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    assert len(caplog.text) < 5_000


@needs_proc
async def test_no_more_muxes_run_than_there_are_cores(studio, final, silent_speech, monkeypatch):
    """Of five muxes two run on two cores; one that ends or is cancelled gives its slot to the next."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    async with main.lifespan(main.app):
        muxes = [
            asyncio.create_task(main.mux_video_audio(studio.video(), silent_speech, final))
            for _ in range(5)
        ]
        await started(2)
        await asyncio.sleep(0.1)  # for one too many
        first = children()
        os.kill(min(first), signal.SIGKILL)
        second = await started(2, without=min(first))
        for mux in muxes:
            mux.cancel()
        await asyncio.wait(muxes)
        await asyncio.wait_for(main.mux_video_audio(studio.video(), studio.speech(3), final), 10)
    assert len(first) == len(second) == 2
    assert len(first & second) == 1
    assert Clip(final).seconds == pytest.approx(3.5, abs=0.1)


# No ffmpeg


@pytest.fixture
def _fresh_path() -> Iterator[None]:
    """ffmpeg is looked for anew, and once more after the test."""
    main.ffmpeg_path.cache_clear()
    yield
    main.ffmpeg_path.cache_clear()


@pytest.mark.usefixtures("_fresh_path")
async def test_a_missing_ffmpeg_stops_the_start(monkeypatch):
    """The start fails with the path of the missing file, and so does a call."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(RuntimeError, match="/nowhere/ffmpeg"):
        async with main.lifespan(main.app):
            pass
    with pytest.raises(RuntimeError, match="/nowhere/ffmpeg"):
        await main.run_ffmpeg(["-version"], 10)


@pytest.mark.usefixtures("_fresh_path")
async def test_another_ffmpeg_can_be_named(monkeypatch, tmp_path):
    """IMAGEIO_FFMPEG_EXE holds a path, or a name that is looked for in PATH once."""
    (tmp_path / "our-ffmpeg").symlink_to(FFMPEG)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, path in ((FFMPEG, FFMPEG), ("our-ffmpeg", str(tmp_path / "our-ffmpeg"))):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", name)
        main.ffmpeg_path.cache_clear()
        assert main.ffmpeg_path() == path
        await main.run_ffmpeg(["-v", "error", "-version"], 10)


# How a video may begin


@pytest.mark.parametrize("box", "styp mdat wide free skip moov junk".split())
async def test_a_video_may_begin_without_ftyp(box, studio, final, tmp_path):
    """QuickTime files do; an unknown first box is not a video, the rest is for ffmpeg to judge."""
    video = tmp_path / "video.mp4"
    video.write_bytes(studio.video().read_bytes().replace(b"ftyp", box.encode(), 1))
    if box in ("moov", "junk"):
        assert await refusal(video, studio.speech(3), final) == (
            NO_VIDEO if box == "junk" else CANNOT_USE
        )
        return
    await mux(video, studio.speech(3), final)
    assert Clip(final).seconds == pytest.approx(3.5, abs=0.1)


@pytest.mark.parametrize(("cores", "slots"), [(None, 1), (3, 3), (64, 4)])
async def test_ffmpeg_slots_follow_the_cores_up_to_four(cores, slots, monkeypatch):
    """A container sees all cores of its host, but has the memory of a few."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    async with main.lifespan(main.app):
        places = main.app_state().ffmpeg_slots
        for _ in range(slots):
            assert not places.locked()
            await places.acquire()
        assert places.locked()
