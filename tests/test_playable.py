"""The final video plays everywhere: a table of what models hand over, and the limits of a conversion."""

import asyncio
import os
import re
import shutil
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import main
from tests.sandbox import Sandbox, Service, media
from tests.support.application import in_lifespan
from tests.support.ffmpeg import children, ffmpeg
from tests.support.processes import needs_proc
from tests.support.requests import EVENT_STREAM, read_events, service_client, speech_job

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("_no_child_left")]

FPS = 12
SECONDS = 1.0
SPEECH_HZ = 330.0
CUT_OFF = "The video that the model made is cut off."


# The zoo: one test picture in every kind of file that models hand over

X264 = "-c:v libx264 -preset ultrafast"
X265 = "-c:v libx265 -preset ultrafast -x265-params log-level=error"
VPX = "-c:v libvpx -deadline realtime -cpu-used 8"
VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8"
OPUS = "-map 1:a -c:a libopus"
PLAIN = {
    "baseline.mp4": f"{X264} -pix_fmt yuv420p",
    "main.mp4": f"{X264} -profile:v main -bf 2 -pix_fmt yuv420p",
    "high.mp4": "-c:v libx264 -preset veryfast -pix_fmt yuv420p -movflags +faststart",
    "full_range.mp4": f"{X264} -pix_fmt yuvj420p",
    "second_parameter_set.mp4": "-c:v libx264 -x264-params sps-id=2 -pix_fmt yuv420p",
    "fragments.mp4": f"{X264} -pix_fmt yuv420p -movflags +frag_keyframe+empty_moov",
    "sound_first.mp4": f"-map 1:a -map 0:v {X264} -pix_fmt yuv420p -c:a aac",
    "h264.mov": f"{X264} -pix_fmt yuv420p",
}
CONVERTED = {
    "gray.mp4": f"{X264} -pix_fmt gray",
    "422.mp4": f"{X264} -pix_fmt yuv422p",
    "444.mp4": f"{X264} -pix_fmt yuv444p",
    "10_bit.mp4": f"{X264} -pix_fmt yuv420p10le",
    "avc3.mp4": f"{X264} -pix_fmt yuv420p -tag:v avc3",
    "hevc.mp4": f"{X265} -pix_fmt yuv420p -tag:v hvc1",
    "hev1_10_bit.mp4": f"{X265} -pix_fmt yuv420p10le",
    "av1.mp4": "-c:v libsvtav1 -preset 12 -svtav1-params lp=1",
    "vp9.mp4": VP9,
    "mp4v.mp4": "-c:v mpeg4",
    "mjpeg.mp4": "-c:v mjpeg",
    "odd_444.mp4": f"-vf scale=161:121 {X264} -pix_fmt yuv444p",
    "prores.mov": "-c:v prores_ks",
    "animation.mov": "-c:v qtrle",
    "vp8.webm": VPX,
    "vp9.webm": f"-map 0:v {OPUS} {VP9}",
    "h264.mkv": f"{X264} -pix_fmt yuv420p",
    "mjpeg.avi": "-c:v mjpeg",
    "mpeg4.avi": "-c:v mpeg4",
    "h264.ts": f"{X264} -pix_fmt yuv420p",
    "h264.flv": f"{X264} -pix_fmt yuv420p",
    "theora.ogv": "-c:v libtheora",
    "gif.gif": "",
    "webp.webp": "-c:v libwebp_anim",
    "apng.apng": "-f apng",
}
OTHERS = {
    "speaks_opus.mp4": f"-map 0:v {OPUS} {X264} -pix_fmt yuv420p -movflags +faststart",
    "speaks_hevc.mp4": f"-map 0:v {X265} -map 1:a -c:a aac",
    "speaks.mp4": f"-map 0:v {X264} -pix_fmt yuv420p -map 1:a -c:a aac -movflags +faststart",
    "speaks_index_last.mp4": f"-map 0:v {X264} -pix_fmt yuv420p -map 1:a -c:a aac",
    "one_frame.gif": "-frames:v 1",
    "still.png": "-frames:v 1",
    "still.jpg": "-frames:v 1",
    "still.webp": "-frames:v 1 -c:v libwebp",
}


class Zoo:
    """The files, and the speech that is put into them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.speech = folder / "speech"
        self.speech.write_bytes(media.speech("Hi!", "mp3_44100_64", seconds=0.4))
        outputs: list[object] = []
        for name, options in {**PLAIN, **CONVERTED, **OTHERS}.items():
            outputs += [*options.split(), folder / name]
        self.make(*outputs)
        self.picture = pixels(self.path("animation.mov"))

    def path(self, name: str) -> Path:
        """Where one is."""
        return self.folder / name

    def make(self, *outputs: object, rate: object = FPS) -> None:
        """Encode a second of ffmpeg's test picture, and a tone, in one process."""
        picture = f"testsrc2=s=160x120:r={rate}:d={SECONDS}"
        inputs = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", f"sine=1000:d={SECONDS}"]
        ffmpeg("-v", "error", *inputs, *outputs)


def pixels(path: Path, at_s: float = 0) -> bytes:
    """The frame that a file shows at a time, 8 x 6 pixels of RGB."""
    if at_s:
        show = f"fps=100,select='gte(t,{at_s})',format=yuv420p,scale=8:6:flags=area"
    else:
        show = "format=yuv420p,scale=8:6:flags=area"
    look = [
        "-map",
        "0:V:0",
        "-frames:v",
        1,
        "-vf",
        show,
        "-pix_fmt",
        "rgb24",
    ]
    return ffmpeg("-v", "error", "-i", path, *look, "-f", "rawvideo", "-").stdout


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """All files of the tables above."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


# What comes out


class Final(NamedTuple):
    """A final video: where it is, and the stages that made it."""

    path: Path
    stages: list[str]


async def finish(video: Path, speech: Path | None, folder: Path, fit: main.Fit = "video") -> Final:
    """Make the final video of a model's video; no speech: the video speaks by itself."""
    source = folder / "video.mp4"  # as the service names every download
    shutil.copy(video, source)
    video_format = main.read_video_format(source)
    job = main.Job("test")
    path = await in_lifespan(main.make_final_video(source, video_format, speech, fit, job))
    return Final(path, list(job.timings))


class Look:
    """What ffmpeg sees in a file: streams, length, the times of its frames and a checksum of each."""

    def __init__(self, path: Path) -> None:
        copy = ["-map", "0", "-c", "copy", "-f", "framecrc", "-"]
        process = ffmpeg("-i", path, *copy)
        text = process.stderr.decode().partition("Output #0")[0]
        lines = process.stdout.decode().replace(" ", "").splitlines()
        timebase = next(line for line in lines if line.startswith("#tb0:")).partition(":")[2]
        numerator, denominator = timebase.split("/")
        rows = [line.split(",") for line in lines if line.startswith("0,")]

        self.streams = re.findall(r"Stream #0:\d.*?: (?:Video|Audio): (\w+)", text)
        self.is_yuv420p = "yuv420p(" in text and "yuv420p10" not in text
        self.size = re.findall(r"(?<= )\d{2,}x\d+", text)[0]
        [clock] = re.findall(r"Duration: 00:00:([\d.]+)", text)
        self.seconds = float(clock)
        self.times = [int(row[2]) * int(numerator) / int(denominator) for row in rows]
        self.checksums = [row[5] for row in rows]


def video_checksum(path: Path) -> bytes:
    """A checksum of the compressed frames of a file."""
    options = ["-map", "0:v", "-c", "copy", "-bsf:v", "h264_mp4toannexb", "-f", "md5", "-"]
    return ffmpeg("-v", "error", "-i", path, *options).stdout


def check_picture(path: Path, expected: bytes, at_s: float = 0) -> None:
    """Assert that the first frame, or the one at a time, is this picture, but for what encoders lose."""
    difference = [abs(a - b) for a, b in zip(pixels(path, at_s), expected, strict=True)]
    assert sum(difference) / len(difference) < 6


@pytest.mark.parametrize("name", PLAIN)
async def test_a_video_that_plays_everywhere_is_copied(name, zoo, tmp_path):
    """Its frames are in the final video bit for bit, and no conversion costs anything."""
    final = await finish(zoo.path(name), zoo.speech, tmp_path)
    assert final.stages == ["mux"]
    assert video_checksum(final.path) == video_checksum(zoo.path(name))


@pytest.mark.parametrize("name", CONVERTED)
async def test_any_other_video_is_converted(name, zoo, tmp_path):
    """Out comes H.264 4:2:0 of 8 bits in an MP4 with its index first, the same picture at the same size."""
    final = await finish(zoo.path(name), zoo.speech, tmp_path)
    look = Look(final.path)
    content = final.path.read_bytes()
    assert final.stages == ["convert", "mux"]
    assert look.streams == ["h264", "aac"]
    assert look.is_yuv420p
    assert look.size == "160x120"
    assert look.seconds == pytest.approx(SECONDS, abs=0.1)
    assert content.index(b"moov") < content.index(b"mdat")
    if name != "gray.mp4":
        check_picture(final.path, zoo.picture)


@pytest.mark.parametrize("name", ["vp9.webm", "speaks_opus.mp4", "speaks_hevc.mp4"])
async def test_a_video_that_speaks_keeps_its_sound(name, zoo, tmp_path):
    """What a model says itself is heard in the converted video, as AAC."""
    final = await finish(zoo.path(name), None, tmp_path)
    look = Look(final.path)
    assert final.stages == ["convert"]
    assert look.streams == ["h264", "aac"]
    assert look.is_yuv420p
    loudness = ffmpeg("-i", final.path, "-af", "volumedetect", "-f", "null", "-").stderr.decode()
    assert float(re.findall(r"mean_volume: (\S+) dB", loudness)[0]) > -30


async def test_a_video_that_speaks_is_stored_as_it_is(zoo, tmp_path):
    """Nothing is done to one that plays everywhere."""
    final = await finish(zoo.path("speaks.mp4"), None, tmp_path)
    assert final.stages == []
    assert final.path.read_bytes() == zoo.path("speaks.mp4").read_bytes()


@pytest.mark.parametrize("name", ["speaks_index_last.mp4", "speaks_opus.mp4"])
async def test_a_plain_picture_is_not_encoded_again(name, zoo, tmp_path):
    """Where only the sound or the order of the file is wrong, the frames are copied."""
    final = await finish(zoo.path(name), None, tmp_path)
    content = final.path.read_bytes()
    assert video_checksum(final.path) == video_checksum(zoo.path(name))
    assert content.index(b"moov") < content.index(b"mdat")


# Time and shape


@pytest.mark.parametrize("name", ["gif.gif", "webp.webp", "vp8.webm"])
async def test_a_converted_video_repeats_until_the_speech_ends(name, zoo, tmp_path):
    """With `speech` the frames come again, at a steady rate, as often as it takes."""
    speech = tmp_path / "speech"
    speech.write_bytes(media.speech("Hi!", "mp3_44100_64", seconds=2))
    final = await finish(zoo.path(name), speech, tmp_path, "speech")
    look = Look(final.path)
    steps = [b - a for a, b in zip(look.times, look.times[1:], strict=False)]
    slack_s = 0.008 if name == "gif.gif" else 0.002  # a GIF counts in hundredths
    assert look.seconds == pytest.approx(2.5, abs=0.1)
    assert look.checksums[FPS] == look.checksums[0]
    assert steps == pytest.approx([1 / FPS] * len(steps), abs=slack_s)


async def test_a_video_of_one_frame_shows_it(zoo, tmp_path):
    """A GIF that does not move is a picture with a voice."""
    final = await finish(zoo.path("one_frame.gif"), zoo.speech, tmp_path, "speech")
    assert Look(final.path).seconds == pytest.approx(0.9, abs=0.1)
    check_picture(final.path, zoo.picture)


async def test_each_frame_of_a_variable_rate_is_shown_at_its_time(zoo, tmp_path):
    """One that is longer is shown again, so that all others are shown when they were."""
    source = tmp_path / "variable.webm"
    select = "select='not(eq(mod(n,7),3)+eq(mod(n,5),2))'"  # 0, 1, 4, 5, 6, 8, 9, 11
    zoo.make("-map", "0:v", "-vf", select, "-fps_mode", "vfr", *VPX.split(), source)
    final = await finish(source, zoo.speech, tmp_path)
    assert len(Look(final.path).times) == FPS
    for frame in (1, 3, 4, 6, 11):
        at_s = (frame + 0.3) / FPS
        check_picture(final.path, pixels(source, at_s), at_s)


async def test_a_slow_video_is_not_lost_beside_a_short_speech(zoo, tmp_path):
    """A frame of two seconds is seen from the first to the end of half a second of speech."""
    source = tmp_path / "slow.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=160x120:r=0.5:d=4", "-c:v", "mpeg4", source)
    final = await finish(source, zoo.speech, tmp_path, "shortest")
    look = Look(final.path)
    assert look.streams == ["h264", "aac"]
    assert look.seconds == pytest.approx(0.9, abs=0.1)
    assert len(look.times) > 8


async def test_a_high_rate_is_cut_to_sixty(zoo, tmp_path):
    """Of 120 frames a second every other one is shown."""
    source = tmp_path / "fast.mp4"
    zoo.make("-map", "0:v", "-c:v", "mpeg4", source, rate=120)
    look = Look((await finish(source, zoo.speech, tmp_path)).path)
    assert len(look.times) == 60
    assert look.seconds == pytest.approx(SECONDS, abs=0.1)


async def test_a_rotated_video_stands_upright(zoo, tmp_path):
    """What a phone would turn is turned."""
    source = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", 90, "-i", zoo.path("mp4v.mp4"), "-c", "copy", source)
    final = await finish(source, zoo.speech, tmp_path)
    assert Look(final.path).size == "120x160"


async def test_what_an_edit_list_leaves_out_is_not_shown(zoo, tmp_path):
    """A video that was cut without encoding it again begins where it was cut."""
    source = tmp_path / "cut.mp4"
    ffmpeg("-ss", 0.5, "-i", zoo.path("444.mp4"), "-c", "copy", source)
    final = await finish(source, zoo.speech, tmp_path)
    assert len(Look(final.path).times) == FPS // 2


TRANSPARENT = {
    "alpha.gif": "-vf split[a][b];[a]palettegen[p];[b][p]paletteuse",
    "alpha.webp": "-c:v libwebp_anim",
    "alpha.apng": "-f apng",
    "alpha.webm": f"{VP9} -pix_fmt yuva420p",
    "alpha_animation.mov": "-c:v qtrle",
    "alpha_prores.mov": "-c:v prores_ks -pix_fmt yuva444p10le",
}


@pytest.fixture(scope="session")
def transparent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos: the left half is red, the right one is white and transparent."""
    folder = tmp_path_factory.mktemp("transparent")
    picture = "color=white@0.0:s=160x120:r=12:d=0.25,format=rgba"
    picture += ",drawbox=w=80:h=120:c=red@1.0:t=fill:replace=1"
    outputs: list[object] = []
    for name, options in TRANSPARENT.items():
        outputs += [*options.split(), folder / name]
    ffmpeg("-v", "error", "-f", "lavfi", "-i", picture, *outputs)
    return folder


@pytest.mark.parametrize("name", TRANSPARENT)
async def test_what_is_transparent_is_black(name, transparent, zoo, tmp_path):
    """An MP4 has no alpha; the colors that a file has where nothing is seen do not appear."""
    final = await finish(transparent / name, zoo.speech, tmp_path)
    row = pixels(final.path)[:24]
    assert list(row[3:6]) == pytest.approx([255, 0, 0], abs=12)
    assert list(row[18:21]) == pytest.approx([0, 0, 0], abs=12)


# What is no whole video


@pytest.mark.parametrize(
    "name",
    [
        "444.mp4",
        "prores.mov",
        "vp9.webm",
        "h264.mkv",
        "mpeg4.avi",
        "gif.gif",
        "webp.webp",
        "apng.apng",
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_half_a_file_is_an_error(name, share, zoo, tmp_path):
    """A format that states its end is taken at its word: no short video is made of half a one."""
    content = zoo.path(name).read_bytes()
    source = tmp_path / "half"
    source.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(main.ResourceFailed) as failed:
        main.read_video_format(source)
    assert failed.value.detail == CUT_OFF
    assert not failed.value.retryable


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        pytest.param("still.png", "a still picture", id="PNG"),
        pytest.param("still.jpg", "a still picture", id="JPEG"),
        pytest.param("still.webp", "a still picture", id="WebP"),
        pytest.param(b"#EXTM3U\nfile:///etc/passwd\n", "an HLS playlist", id="HLS"),
        pytest.param(b"PK\x03\x04" + bytes(60), "a ZIP archive", id="ZIP"),
        pytest.param(b"\n<!doctype html>", "a web page", id="HTML"),
        pytest.param(b"ffconcat version 1.0\n", "a file of an unknown format", id="ffconcat"),
        pytest.param(b"", "a file of an unknown format", id="empty"),
    ],
)
def test_what_is_no_video_is_named(content, kind, zoo, tmp_path):
    """Whoever chose the model reads what it makes; no demuxer is tried on it."""
    source = tmp_path / "video"
    source.write_bytes(content if isinstance(content, bytes) else zoo.path(content).read_bytes())
    with pytest.raises(main.ResourceFailed) as failed:
        main.read_video_format(source)
    assert failed.value.detail == f"The model made {kind}, not a video."
    assert failed.value.provider == "replicate"


# Limits


async def test_an_mp4_over_the_limit_is_delivered_as_it_came(zoo, tmp_path):
    """It plays somewhere, and costs no more than today."""
    source = tmp_path / "large.mp4"
    size = ["-f", "lavfi", "-i", "color=s=1920x1096:r=12", "-frames:v", 4]
    ffmpeg(*size, "-c:v", "mpeg4", source)
    final = await finish(source, zoo.speech, tmp_path, "speech")
    assert final.stages == ["convert", "mux"]
    assert Look(final.path).streams == ["mpeg4", "aac"]


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("large.webm", f"-vf scale=1920:1096 -frames:v 1 {VPX}", "a WebM or Matroska video"),
        ("large.gif", "-vf scale=1920:1096 -frames:v 1", "a GIF"),
        ("sound.avi", "-map 1:a", "an AVI video"),
    ],
)
async def test_what_cannot_be_converted_is_named(name, options, kind, zoo, tmp_path):
    """The error says what the model made; the same request would fail again."""
    zoo.make(*options.split(), tmp_path / name)
    with pytest.raises(main.ResourceFailed) as failed:
        await finish(tmp_path / name, zoo.speech, tmp_path)
    assert failed.value.detail == (
        f"The model made {kind}, which could not be converted to an MP4 video."
    )
    assert not failed.value.retryable


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A video that never comes to its end, as long as nobody writes into it."""
    path = tmp_path / "endless"
    os.mkfifo(path)
    return path


def convert(video: Path, kind: str = "a GIF", demuxer: str = "gif") -> "asyncio.Task[Path]":
    """Begin to convert a file of this kind."""
    source = main.VideoFormat(kind, demuxer)
    work = main.convert_video(video, source, video.with_name("converted.mp4"), with_sound=False)
    return asyncio.create_task(work)


async def running(count: int = 1) -> list[int]:
    """The ffmpeg processes, once there are so many."""
    deadline = time.monotonic() + 20
    while len(children()) < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
    return sorted(children())


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks, and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@needs_proc
async def test_a_conversion_ends_in_time(endless, monkeypatch):
    """After three minutes it is killed; the same request may find the machine less busy."""
    assert main.CONVERT_TIMEOUT_S == 180
    monkeypatch.setattr(main, "CONVERT_TIMEOUT_S", 0.2)
    async with main.lifespan(main.app):
        with pytest.raises(main.ResourceFailed, match=r"^The model made a GIF, which") as failed:
            await asyncio.wait_for(convert(endless), 10)
        assert await asyncio.wait_for(convert(endless, "an MP4", "mov"), 10) == endless
    assert failed.value.retryable


@needs_proc
async def test_one_conversion_runs_at_a_time_and_no_mux_waits_for_it(
    endless, zoo, tmp_path, monkeypatch
):
    """On one core as well: of two conversions one waits, and the others' videos are put together."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    async with main.lifespan(main.app):
        conversions = [convert(endless), convert(endless)]
        await running()
        video, final = zoo.path("high.mp4"), tmp_path / "final.mp4"
        await asyncio.wait_for(main.mux_video_audio(video, zoo.speech, final), 20)
        assert len(children()) == 1
        await cancel(conversions[0])
        await running()
        await cancel(conversions[1])
    assert Look(final).seconds > 0.5


async def limits_of(pids: list[int]) -> tuple[int, set[int]]:
    """The bytes that a process may write to, once it is limited, and how nice its threads are."""
    [pid] = pids
    deadline = time.monotonic() + 20
    limit = None
    while limit is None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
        text = Path(f"/proc/{pid}/limits").read_text()
        limit = re.search(r"Max data size +(\d+)", text)
    threads = Path(f"/proc/{pid}/task").iterdir()
    return int(limit[1]), {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads}


@needs_proc
async def test_the_system_limits_the_memory_of_every_ffmpeg(endless, zoo, tmp_path):
    """Mux and conversion each have a limit of their own; a conversion lets all others go first."""
    async with main.lifespan(main.app):
        conversion = convert(endless)
        assert await limits_of(await running()) == (main.CONVERT_MAX_BYTES, {10})
        await cancel(conversion)

        writer = os.open(endless, os.O_RDWR)
        os.write(writer, b"ID3\x04" * 16)  # a speech that begins
        work = main.mux_video_audio(zoo.path("high.mp4"), endless, tmp_path / "final.mp4")
        mux = asyncio.create_task(work)
        assert await limits_of(await running()) == (main.MUX_MAX_BYTES, {0})
        await cancel(mux)
        os.close(writer)


# Bombs: small files that would take gigabytes


def box(name: bytes, *parts: bytes) -> bytes:
    """A box of an MP4."""
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), name) + content


def numbers(*values: int) -> bytes:
    """Numbers of 32 bits, after the version and flags of a box."""
    return struct.pack(f">{len(values) + 1}I", 0, *values)


def huge_track(number: int, samples: int, codec: bytes) -> bytes:
    """A track of samples of one byte each, in some 450 bytes."""
    entry = box(codec, bytes(7) + b"\1", bytes(16), struct.pack(">HH", 64, 64), bytes(50))
    table = box(
        b"stbl",
        box(b"stsd", numbers(1), entry),
        box(b"stts", numbers(1, samples, 1)),
        box(b"stsc", numbers(1, 1, samples, 1)),
        box(b"stsz", numbers(1, samples)),
        box(b"stco", numbers(1, 48)),
    )
    sources = box(b"dinf", box(b"dref", numbers(1), box(b"url ", numbers())))
    media_box = box(
        b"mdia",
        box(b"mdhd", numbers(0, 0, 1000, samples), bytes(4)),
        box(b"hdlr", numbers(0), b"vide", bytes(13)),
        box(b"minf", box(b"vmhd", bytes(12)), sources, table),
    )
    header = numbers(0, 0, number, 0, samples) + bytes(16) + numbers(*bytes(8)) + numbers(64, 64)
    return box(b"trak", box(b"tkhd", header), media_box)


def track_bomb(codec: bytes) -> bytes:
    """Ten tracks of 2.6 million samples: ffmpeg would keep a gigabyte of index."""
    tracks = [huge_track(number, 2_600_000, codec) for number in range(1, 11)]
    index = box(b"moov", box(b"mvhd", numbers(0, 0, 1000, 2_600_000), bytes(80)), *tracks)
    return box(b"ftyp", b"isom\0\0\2\0isom") + box(b"mdat", bytes(64)) + index


def gif_bomb() -> bytes:
    """A GIF of 65,500 x 65,500 pixels."""
    header = b"GIF89a" + struct.pack("<HHBBB", 65_500, 65_500, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 65_500, 65_500, 0)
    return header + frame + b"\x02\x02\x4c\x01\x00;"


def picture_bomb(folder: Path) -> bytes:
    """An MP4 of 8000 x 7900 pixels, as MPEG-4 Part 2."""
    path = folder / "bomb.mp4"
    picture = ["-f", "lavfi", "-i", "color=s=8000x7900:r=1", "-frames:v", 1]
    ffmpeg(*picture, "-c:v", "mpeg4", path)
    return path.read_bytes()


async def peak_bytes(work: "asyncio.Task[Any]") -> int:
    """The most memory that an ffmpeg of this process held while some work was done, looked at often."""
    peak_kb = 0
    while not work.done():
        for pid in children():
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # it has just ended
                continue
            peak_kb = max([peak_kb, *map(int, re.findall(r"VmHWM:\s+(\d+)", text))])
        await asyncio.sleep(0.002)
    return peak_kb * 1024


@needs_proc
@pytest.mark.parametrize(
    ("bomb", "most_bytes"),
    [
        pytest.param(lambda _: track_bomb(b"mp4v"), main.CONVERT_MAX_BYTES, id="tracks"),
        pytest.param(lambda _: track_bomb(b"avc1"), main.CONVERT_MAX_BYTES, id="H.264 tracks"),
        pytest.param(lambda _: gif_bomb(), 100_000_000, id="GIF"),
        pytest.param(picture_bomb, 100_000_000, id="picture"),
    ],
)
async def test_a_bomb_ends_within_the_limits(bomb, most_bytes, zoo, tmp_path):
    """Whatever comes of it, no ffmpeg takes more memory than it may, nor much time."""
    source = tmp_path / "bomb"
    source.write_bytes(bomb(tmp_path))
    began = time.monotonic()
    work = asyncio.create_task(finish(source, zoo.speech, tmp_path))
    assert await peak_bytes(work) < most_bytes + 30_000_000  # of ffmpeg's own code
    assert time.monotonic() - began < 60
    if work.exception():
        assert isinstance(work.exception(), main.ResourceFailed)


@needs_proc
async def test_a_speech_file_is_limited_as_well(zoo, tmp_path, monkeypatch):
    """A mux takes a fifth of a gigabyte at most, whichever of its files is a bomb."""
    monkeypatch.setattr(main, "MUX_MAX_BYTES", 40_000_000)

    async def finish_often() -> None:
        for _ in range(5):  # on a busy machine ffmpeg may be through before it is limited
            await finish(zoo.path("high.mp4"), zoo.speech, tmp_path)

    with pytest.raises(main.ResourceFailed, match=r"^Video and speech could not be put together"):
        await finish_often()


# The job


async def test_a_conversion_is_a_stage_of_the_job(
    service: Service, sandbox: Sandbox, zoo, tmp_path
):
    """It is announced, timed and logged between download and mux, and its result is stored."""
    sandbox.video(zoo.path("webp.webp").read_bytes())
    body = speech_job(sandbox)
    async with service_client(service.url) as client:
        async with client.stream(
            "POST", "/jobs_prompt_tts", json=body, headers=EVENT_STREAM
        ) as response:
            events = [event async for event in read_events(response) if event.name != "comment"]
        final = await client.get(events[-1].data["final_url"])
        answer = await client.post("/jobs_prompt_tts", json=body)

    done = [event.data["stage"] for event in events[:-1] if event.data["state"] == "done"]
    assert done[3:] == ["download", "convert", "mux", "final_upload"]
    assert re.search(r"download;dur=\S+, convert;dur=\S+, mux", answer.headers["server-timing"])
    assert re.search(r"stage=convert outcome=done ms=\d+", service.log)
    (tmp_path / "final.mp4").write_bytes(final.content)
    check_picture(tmp_path / "final.mp4", zoo.picture)


async def test_an_error_hands_over_what_was_paid_for(service: Service, sandbox: Sandbox, zoo):
    """A picture in place of a video is a 500 that names it, with the URLs of speech and picture."""
    sandbox.video(zoo.path("still.png").read_bytes())
    async with service_client(service.url) as client:
        response = await client.post("/jobs_prompt_tts", json=speech_job(sandbox))
    body = response.json()
    assert response.status_code == 500
    assert body["detail"] == "The model made a still picture, not a video."
    assert (body["category"], body["provider"]) == ("resource", "replicate")
    assert set(body["partial"]) == {"audio_url", "video_url", "prediction_id"}
