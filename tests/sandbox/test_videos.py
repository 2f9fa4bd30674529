"""The videos are real: they move the picture, and have the size, length and sound asked for."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest

from tests.sandbox import media, replicate
from tests.sandbox.calls import BEARER, PET, STORAGE, create, loudness, poll
from tests.sandbox.media import MediaError, Probe, VideoPlan, probe
from tests.sandbox.schemas import load_models

GREY_FRAME = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray"]


def probe_bytes(video: bytes, tmp_path: Path) -> Probe:
    """What ffmpeg says about these bytes."""
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    return probe(path)


def frame(video: bytes, second: float, tmp_path: Path) -> bytes:
    """A frame of the video, 64x48 in grey."""
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    start = f"{second:g}"
    return media.ffmpeg("-ss", start, "-i", str(path), "-vf", "scale=64:48", *GREY_FRAME)


def middle_of(picture: bytes, tmp_path: Path) -> bytes:
    """The middle of the picture, which a video shows first, 64x48 in grey."""
    path = tmp_path / "pet.jpg"
    path.write_bytes(picture)
    crop = "crop=iw/1.25:ih/1.25,scale=64:48"
    return media.ffmpeg("-i", str(path), "-vf", crop, *GREY_FRAME)


def difference(one: bytes, other: bytes) -> float:
    """The mean difference of two grey frames, 0 to 255."""
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return sum(differences) / len(one)


# The video of a plan


def test_a_video_shows_and_moves_the_picture(tmp_path):
    """The first frame is the middle of the picture; later frames differ from it and each other."""
    video = media.video(PET, VideoPlan(3, 480))
    first = frame(video, 0, tmp_path)
    second = frame(video, 0.8, tmp_path)
    third = frame(video, 1.7, tmp_path)
    assert difference(middle_of(PET, tmp_path), first) < 6
    assert difference(first, second) > 6
    assert difference(second, third) > 6


@pytest.mark.parametrize(
    ("size", "width", "height"),
    [
        pytest.param("640x480", 480, 360, id="landscape"),
        pytest.param("480x640", 360, 480, id="portrait"),
        pytest.param("101x99", 366, 360, id="odd"),
        pytest.param("2000x20", 864, 360, id="a strip is cut"),
    ],
)
def test_a_video_keeps_the_pictures_shape(tmp_path, size, width, height):
    """The plan sets the short side, and the picture the long one; it is h264 in yuv420p."""
    source = ["-f", "lavfi", "-i", f"testsrc=size={size}"]
    picture = media.ffmpeg(*source, "-frames:v", "1", "-c:v", "png", "-f", "image2")
    found = probe_bytes(media.video(picture, VideoPlan(0.5, 360)), tmp_path)
    assert (found.video, found.pixels) == ("h264", "yuv420p")
    assert (found.fps, found.seconds) == (24, 0.5)
    assert (found.width, found.height) == (pytest.approx(width, abs=2), height)


# The plan of an input


@pytest.mark.parametrize(
    ("model", "values", "short_side", "seconds"),
    [
        pytest.param(
            "minimax/hailuo-02",
            {"duration": 6, "resolution": "512p"},
            512,
            6.0,
            id="512p",
        ),
        pytest.param(
            "minimax/hailuo-02",
            {"duration": 10, "resolution": "768p"},
            768,
            10.0,
            id="768p",
        ),
        pytest.param("minimax/hailuo-02", {"duration": 6}, 1080, 6.0, id="the schema's size"),
        pytest.param(
            "minimax/hailuo-02-fast",
            {"resolution": "512P"},
            512,
            6.0,
            id="capital P",
        ),
        pytest.param("pixverse/pixverse-v4.5", {"quality": "360p"}, 360, 5.0, id="quality"),
        pytest.param("lightricks/ltx-video", {"length": 129}, 640, 129 / 24, id="frames"),
        pytest.param(
            "wan-video/wan-2.2-i2v-fast",
            {},
            480,
            81 / 16,
            id="frames of another rate",
        ),
    ],
)
def test_a_video_has_the_size_and_length_asked_for(model, values, short_side, seconds):
    """They follow the input or the schema's defaults, whatever the model calls them."""
    plan = replicate.video_plan(load_models()[model], values)
    assert plan.short_side == short_side
    assert plan.seconds == pytest.approx(seconds)


def test_a_video_of_an_older_version_follows_that_versions_schema(sandbox):
    """Its own field for the picture, its own length and size."""
    older = load_models()["lightricks/ltx-video"].versions[1]
    values = {"start_image": sandbox.image_url}
    assert replicate.video_plan(older, values) == VideoPlan(3.0, 480, 24)
    assert replicate.first_picture(older, values) == sandbox.image_url


# The video of a prediction


def test_a_prediction_gives_a_silent_video(sandbox, call, tmp_path):
    """It has the length and the size that the input names, and no sound."""
    ended = poll(call, create(sandbox, call), times=3)
    video = call("GET", httpx.URL(ended["output"]).path).content
    found = probe_bytes(video, tmp_path)
    assert (found.video, found.audio) == ("h264", "")
    assert (found.seconds, found.height) == (6.0, 512)


def test_a_model_that_takes_speech_gives_a_video_with_that_speech(sandbox, call, tmp_path):
    """The speech comes from the input's `audio`, and without a duration it sets the length."""
    speech = media.speech("Hello!", "mp3_44100_64", seconds=1.5)
    headers = {**STORAGE, "content-type": "audio/mpeg"}
    call("POST", "/storage/v1/object/pets/a.mp3", headers=headers, content=speech)
    values = {
        "prompt": "x",
        "image": sandbox.image_url,
        "audio": f"{sandbox.url}/storage/v1/object/public/pets/a.mp3",
    }
    path = "/v1/models/wan-video/wan-2.2-s2v/predictions"
    prediction = call("POST", path, headers=BEARER, json={"input": values}).json()

    ended = poll(call, prediction, times=3)
    video = call("GET", httpx.URL(ended["output"]).path).content
    found = probe_bytes(video, tmp_path)
    assert (found.audio, found.seconds) == ("aac", pytest.approx(1.5, abs=0.1))
    samples = media.ffmpeg("-i", str(tmp_path / "video.mp4"), "-f", "s16le", "-ac", "1")
    assert loudness(samples) > 1000


@pytest.mark.parametrize(
    ("name", "start", "codec", "pixels"),
    [
        ("mp4v", b"\0\0\0.ftyp", "mpeg4", "yuv420p"),
        ("h264-444", b"\0\0\0.ftyp", "h264", "yuv444p"),
        ("hevc-10-bit", b"\0\0\0.ftyp", "hevc", "yuv420p10le"),
        ("vp9-webm", b"\x1aE\xdf\xa3", "vp9", "yuv420p"),
        ("gif", b"GIF89a", "gif", "bgra"),
        ("animated-webp", b"RIFF....WEBPVP8X", "webp_anim", "argb"),
    ],
)
def test_a_model_hands_over_its_format(name, start, codec, pixels, sandbox, call, tmp_path):
    """Each of the sandbox's own models makes a kind of file that not every browser plays."""
    values = {"image": sandbox.image_url, "prompt": "x", "duration": 1}
    path = f"/v1/models/sandbox/{name}/predictions"
    prediction = call("POST", path, headers=BEARER, json={"input": values}).json()

    ended = poll(call, prediction, times=3)
    video = call("GET", httpx.URL(ended["output"]).path).content
    found = probe_bytes(video, tmp_path)
    assert re.match(start, video, re.DOTALL)
    assert (found.video, found.pixels) == (codec, pixels)
    assert min(found.width, found.height) == 240


def test_a_video_is_served_in_ranges(sandbox, call):
    """A browser's video element asks for them."""
    sandbox.video(b"0123456789")
    ended = poll(call, create(sandbox, call), times=3)
    path = httpx.URL(ended["output"]).path
    response = call("GET", path, headers={"range": "bytes=2-4"})
    assert (response.status_code, response.content) == (206, b"234")
    assert response.headers["content-range"] == "bytes 2-4/10"


def test_making_media_does_not_hold_up_other_requests(sandbox, call):
    """While a video is being made, other requests are answered at once."""
    picture_url = f"{sandbox.image_url}?fresh"
    create(sandbox, call, resolution="1080p", first_frame_image=picture_url)
    started = time.monotonic()
    assert call("GET", "/pet.jpg").status_code == 200
    assert time.monotonic() - started < 0.3


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:9/x", "http://a b/", "pet.jpg"],
)
def test_a_file_is_only_fetched_over_http(url):
    """Any other URL, and one that does not answer, is an error that names it."""
    with pytest.raises(MediaError, match=re.escape(url[:9])):
        media.fetch(url)
