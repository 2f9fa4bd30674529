"""The videos are real: they show the picture, move it, and have the size, length and sound asked for."""

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


def look_at(video: bytes, tmp_path: Path) -> Probe:
    """What ffmpeg says of these bytes."""
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    return probe(path)


def frame(video: bytes, second: float, tmp_path: Path) -> bytes:
    """A frame of the video, 64x48 in grey."""
    (tmp_path / "video.mp4").write_bytes(video)
    scaled = ("-vf", "scale=64:48", "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray")
    return media.ffmpeg("-ss", f"{second:g}", "-i", str(tmp_path / "video.mp4"), *scaled)


def difference(one: bytes, other: bytes) -> float:
    """The mean difference of two grey frames, 0 to 255."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def test_a_video_shows_the_picture_it_was_given_and_moves_it(tmp_path):
    """The first frame is the middle of the picture; later ones differ from it and from each other."""
    video = media.video(PET, VideoPlan(3, 480))
    (tmp_path / "pet.jpg").write_bytes(PET)
    middle = (
        "-vf",
        "crop=iw/1.25:ih/1.25,scale=64:48",
        "-frames:v",
        "1",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
    )
    picture = media.ffmpeg("-i", str(tmp_path / "pet.jpg"), *middle)
    frames = [frame(video, second, tmp_path) for second in (0, 0.8, 1.7)]
    assert difference(picture, frames[0]) < 6
    assert all(difference(one, other) > 6 for one, other in zip(frames, frames[1:], strict=False))


@pytest.mark.parametrize(
    ("model", "values", "expected"),
    [
        pytest.param(
            "minimax/hailuo-02", {"duration": 6, "resolution": "512p"}, (682, 512, 6.0), id="512p"
        ),
        pytest.param(
            "minimax/hailuo-02",
            {"duration": 10, "resolution": "768p"},
            (1024, 768, 10.0),
            id="768p",
        ),
        pytest.param(
            "minimax/hailuo-02", {"duration": 6}, (1440, 1080, 6.0), id="the schema's own size"
        ),
        pytest.param(
            "minimax/hailuo-02-fast", {"resolution": "512P"}, (682, 512, 6.0), id="capital P"
        ),
        pytest.param("pixverse/pixverse-v4.5", {"quality": "360p"}, (480, 360, 5.0), id="quality"),
        pytest.param("lightricks/ltx-video", {"length": 129}, (852, 640, 129 / 24), id="frames"),
        pytest.param(
            "wan-video/wan-2.2-i2v-fast", {}, (640, 480, 81 / 16), id="frames of another rate"
        ),
    ],
)
def test_a_video_has_the_size_and_seconds_asked_for(model, values, expected):
    """Short side and seconds follow the input, or the schema's defaults, whatever the model calls them."""
    plan = replicate.video_plan(load_models()[model], values)
    width, height, seconds = expected
    assert (plan.short_side, plan.seconds) == (height, pytest.approx(seconds))


def test_a_video_of_an_older_version_follows_that_versions_schema(sandbox):
    """Its own field for the picture, its own length and size."""
    older = load_models()["lightricks/ltx-video"].versions[1]
    values = {"start_image": sandbox.image_url}
    assert replicate.video_plan(older, values) == VideoPlan(3.0, 480, 24)
    assert replicate.first_picture(older, values) == sandbox.image_url


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param("640x480", (480, 360), id="landscape"),
        pytest.param("480x640", (360, 480), id="portrait"),
        pytest.param("101x99", (366, 360), id="odd"),
        pytest.param("2000x20", (864, 360), id="a strip is cut"),
    ],
)
def test_a_video_keeps_the_pictures_shape(tmp_path, size, expected):
    """The short side is as asked, the long one follows the picture; h264 in yuv420p, at the rate asked for."""
    drawn = media.ffmpeg(
        "-f", "lavfi", "-i", f"testsrc=size={size}", "-frames:v", "1", "-c:v", "png", "-f", "image2"
    )
    found = look_at(media.video(drawn, VideoPlan(0.5, 360)), tmp_path)
    assert (found.video, found.pixels, found.fps, found.seconds) == ("h264", "yuv420p", 24, 0.5)
    assert (found.width, found.height) == (pytest.approx(expected[0], abs=2), expected[1])


def test_the_default_models_video_comes_through_the_provider(sandbox, call, tmp_path):
    """A prediction's video has the seconds and the size that its input named, and no sound."""
    url = poll(call, create(sandbox, call), times=3)["output"]
    found = look_at(call("GET", httpx.URL(url).path).content, tmp_path)
    assert (found.video, found.seconds, found.height, found.audio) == ("h264", 6.0, 512, "")


def test_a_model_that_takes_speech_gives_a_video_that_speaks(sandbox, call, tmp_path):
    """The video carries the sound at the input's `audio`, and without a duration it lasts as long."""
    sound = media.speech("Hello!", "mp3_44100_64", seconds=1.5)
    call(
        "POST",
        "/storage/v1/object/pets/a.mp3",
        headers={**STORAGE, "content-type": "audio/mpeg"},
        content=sound,
    )
    values = {
        "prompt": "x",
        "image": sandbox.image_url,
        "audio": f"{sandbox.url}/storage/v1/object/public/pets/a.mp3",
    }
    made = call(
        "POST",
        "/v1/models/wan-video/wan-2.2-s2v/predictions",
        headers=BEARER,
        json={"input": values},
    ).json()
    video = call("GET", httpx.URL(poll(call, made, times=3)["output"]).path).content
    found = look_at(video, tmp_path)
    assert (found.audio, found.seconds) == ("aac", pytest.approx(1.5, abs=0.1))
    assert (
        loudness(media.ffmpeg("-i", str(tmp_path / "video.mp4"), "-f", "s16le", "-ac", "1")) > 1000
    )


def test_a_videos_file_is_served_in_parts(sandbox, call):
    """As a browser's video element asks for it."""
    sandbox.video(b"0123456789")
    path = httpx.URL(poll(call, create(sandbox, call), times=3)["output"]).path
    part = call("GET", path, headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (
        206,
        b"234",
        "bytes 2-4/10",
    )


def test_making_media_does_not_hold_up_other_requests(sandbox, call):
    """While a video is being made, reads are answered at once."""
    create(sandbox, call, resolution="1080p", first_frame_image=f"{sandbox.image_url}?fresh")
    started = time.monotonic()
    assert call("GET", "/pet.jpg").status_code == 200
    assert time.monotonic() - started < 0.3


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:9/x", "http://a b/", "pet.jpg"],
)
def test_a_file_is_fetched_over_http_only(url):
    """Anything else, and whatever does not answer, is an error that names the URL."""
    with pytest.raises(MediaError, match=re.escape(url[:9])):
        media.fetch(url)
