"""How a job is fitted to a video model: every published schema, shapes nobody has seen, and how a model is looked up."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import respx

import main
from tests.inprocess import ELEVEN_URL, REPLICATE_URL, SUPABASE_URL, error_of, running_application, told, use_settings

PICTURE_URL = "https://example.com/pet.jpg"
SPEECH_URL = "https://example.com/speech.mp3"
FILM_URL = "https://replicate.delivery/xezq/film.mp4"
JOB = {"image_url": PICTURE_URL, "prompt": "The cat talks", "text": "Feed me!", "voice_id": "JBFqnCBsd6RMkjVDRZzb"}

pytestmark = pytest.mark.usefixtures("settings")


@pytest.fixture
def providers() -> Iterator[respx.MockRouter]:
    """The edge of the process: what is not routed by a test fails it."""
    with respx.mock(assert_all_called=False) as router:
        yield router


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """The running application, which has looked up nothing yet."""
    async with running_application() as client:
        yield client


# Fitting a request to a model: every published schema


class Takes(NamedTuple):
    """What a model takes of a job, read from its page."""

    picture: str
    length: str | None = None
    lengths: dict[int, int] | None = None  # seconds -> what the model is sent; None: any, as they are
    size: str | None = None
    sizes: tuple[str, ...] = ()
    speech: str | None = None


def seconds(*values: int) -> dict[int, int]:
    """Lengths that the model counts in seconds itself."""
    return {value: value for value in values}


P480, P720, P1080 = "480p", "720p", "1080p"
MODELS = {
    "bytedance/seedance-1-lite": Takes("image", "duration", seconds(*range(2, 13)), "resolution", (P480, P720, P1080)),
    "bytedance/seedance-1-pro": Takes("image", "duration", seconds(*range(3, 13)), "resolution", (P480, P720, P1080)),
    "bytedance/seedance-1-pro-fast": Takes(
        "image", "duration", seconds(*range(2, 13)), "resolution", (P480, P720, P1080)
    ),
    "google/veo-3": Takes("image", "duration", seconds(4, 6, 8), "resolution", (P720, P1080)),
    "google/veo-3-fast": Takes("image", "duration", seconds(4, 6, 8), "resolution", (P720, P1080)),
    "kwaivgi/kling-v2.1": Takes("start_image", "duration", seconds(5, 10)),
    "kwaivgi/kling-v2.1-master": Takes("start_image", "duration", seconds(5, 10)),
    "kwaivgi/kling-v2.5-turbo-pro": Takes("start_image", "duration", seconds(5, 10)),
    "kwaivgi/kling-v2.6": Takes("start_image", "duration", seconds(5, 10)),
    "leonardoai/motion-2.0": Takes("image"),
    # 97 to 257 frames at 24 a second: there is nothing near 6 s or 10 s
    "lightricks/ltx-video": Takes("image", "length", {4: 97, 5: 129, 7: 161, 8: 193, 9: 225, 11: 257}),
    "luma/ray-2-720p": Takes("start_image", "duration", seconds(5, 9)),
    "minimax/hailuo-02": Takes("first_frame_image", "duration", seconds(6, 10), "resolution", ("512p", "768p", P1080)),
    "minimax/hailuo-02-fast": Takes("first_frame_image", "duration", seconds(6, 10), "resolution", ("512P",)),
    "minimax/hailuo-2.3": Takes("first_frame_image", "duration", seconds(6, 10), "resolution", ("768p", P1080)),
    "minimax/hailuo-2.3-fast": Takes("first_frame_image", "duration", seconds(6, 10), "resolution", ("768p", P1080)),
    "minimax/video-01": Takes("first_frame_image"),
    "minimax/video-01-director": Takes("first_frame_image"),
    "minimax/video-01-live": Takes("first_frame_image"),
    "pixverse/pixverse-v4.5": Takes("image", "duration", seconds(5, 8), "quality", ("360p", "540p", P720, P1080)),
    # 16 frames a second; the schema names no limit
    "wan-video/wan-2.2-i2v-a14b": Takes("image", "num_frames", None, "resolution", (P480, P720)),
    # 81 to 121 frames at 16 a second
    "wan-video/wan-2.2-i2v-fast": Takes(
        "image", "num_frames", {5: 81, 6: 96, 7: 112, 8: 121}, "resolution", (P480, P720)
    ),
    "wan-video/wan-2.2-s2v": Takes("image", speech="audio"),
    "wan-video/wan-2.5-i2v": Takes("image", "duration", seconds(5, 10), "resolution", (P480, P720, P1080), "audio"),
    "wan-video/wan-2.5-i2v-fast": Takes("image", "duration", seconds(5, 10), "resolution", (P720, P1080), "audio"),
    "wan-video/wan-2.6-i2v": Takes("image", "duration", seconds(5, 10, 15), "resolution", (P720, P1080), "audio"),
    "wan-video/wan2.6-i2v-flash": Takes("image", "duration", seconds(5, 10, 15), "resolution", (P720, P1080), "audio"),
}
PUBLISHED = json.loads(Path(__file__).with_name("sandbox").joinpath("models.json").read_text())
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def as_published(name: str) -> dict[str, Any]:
    """A model's schemas as Replicate writes them: each enum is a schema of its own, behind `allOf`."""
    schemas: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for field, prop in PUBLISHED[name]["properties"].items():
        if "enum" in prop:
            schemas[field] = {"type": prop["type"], "enum": prop["enum"], "title": field}
            kept = {key: value for key, value in prop.items() if key not in ("type", "enum")}
            prop = {**kept, "allOf": [{"$ref": f"#/components/schemas/{field}"}]}
        fields[field] = prop
    return {**schemas, "Input": {"type": "object", "properties": fields, "required": PUBLISHED[name]["required"]}}


def fitted(name: str, audio_url: str | None = SPEECH_URL, **sent: Any) -> dict[str, Any]:
    """The input for a job that sends these settings, and the speech."""
    model = main.video_model(name, None, as_published(name))
    return main.fit_input(model, main.JobPromptOnly(image_url=PICTURE_URL, prompt="Talk", **sent), audio_url)


def check_accepted(name: str, values: Mapping[str, Any]) -> None:
    """What Replicate would check: only known fields, each as its schema says, none missing."""
    properties = PUBLISHED[name]["properties"]
    assert set(PUBLISHED[name]["required"]) <= set(values) <= set(properties)
    for field, value in values.items():
        prop = properties[field]
        assert type(value) in {"string": [str], "integer": [int], "number": [int, float]}[prop["type"]]
        assert value in prop.get("enum", [value])
        assert prop.get("minimum", value) <= value <= prop.get("maximum", value)


def refusal_of(name: str, **sent: Any) -> main.InvalidInput:
    """The refusal of a setting."""
    with pytest.raises(main.InvalidInput) as caught:
        fitted(name, **sent)
    assert caught.value.http_status == 400
    return caught.value


def test_every_published_model_is_in_the_table():
    """The 27 schemas and the table above belong together."""
    assert list(MODELS) == list(PUBLISHED)
    assert len(MODELS) == 27


@EVERY_MODEL
def test_a_schema_with_its_enums_inside_is_the_same_model(name):
    """An enum counts wherever it is written."""
    inside = {"properties": PUBLISHED[name]["properties"], "required": PUBLISHED[name]["required"]}
    model, other = main.video_model(name, None, {"Input": inside}), main.video_model(name, None, as_published(name))
    job = main.JobPromptTTS(**JOB)
    assert main.fit_input(model, job, SPEECH_URL) == main.fit_input(other, job, SPEECH_URL)


@EVERY_MODEL
def test_a_job_without_settings_fits_every_model(name):
    """Picture, prompt and speech go where they belong; nothing else but length and size is filled."""
    values, takes = fitted(name), MODELS[name]
    check_accepted(name, values)
    expected = {takes.picture: PICTURE_URL, "prompt": "Talk"} | ({takes.speech: SPEECH_URL} if takes.speech else {})
    assert expected.items() <= values.items()
    assert set(values) == {*expected, *filter(None, (takes.length, takes.size))}


@EVERY_MODEL
def test_every_length_that_the_model_makes_is_sent_as_it_counts(name):
    """In seconds or in frames; a model without lengths is not bothered with one."""
    takes = MODELS[name]
    made = {length: length * 16 for length in (1, 7, 600)} if takes.lengths is None else takes.lengths
    for length, sent in made.items():
        values = fitted(name, seconds=length)
        check_accepted(name, values)
        assert values.get(takes.length or "") == (sent if takes.length else None)


@EVERY_MODEL
def test_every_other_length_is_refused(name):
    """The refusal lists the lengths there are, in seconds."""
    lengths = MODELS[name].lengths or {}
    listed = " or ".join(map(str, lengths))
    bounds = f"at least {min(lengths, default=0)} and at most {max(lengths, default=0)}"
    for length in sorted({*range(1, 21), 600} - set(lengths)) if lengths else ():
        error = refusal_of(name, seconds=length)
        assert error.detail in (f"seconds: {name} takes {listed}.", f"seconds: {name} takes {bounds}.")
        assert error.errors == [main.InputError(loc=["body", "seconds"], msg=error.detail[9:-1])]


@EVERY_MODEL
def test_every_size_is_sent_as_the_model_writes_it(name):
    """The case in which a client writes a size does not matter."""
    takes = MODELS[name]
    for size in takes.sizes:
        for written in (size, size.upper(), size.lower()):
            values = fitted(name, resolution=written)
            check_accepted(name, values)
            assert values[takes.size] == size


@EVERY_MODEL
def test_every_other_size_is_refused(name):
    """The refusal lists the sizes there are; a model without sizes is not bothered with one."""
    takes = MODELS[name]
    for size in {"240p", "512p", "720p", "768p", "1440p", "4k", "big"} - set(map(str.lower, takes.sizes)):
        if takes.size is None:
            assert fitted(name, resolution=size) == fitted(name)
            continue
        error = refusal_of(name, resolution=size)
        assert error.detail == f"resolution: {name} takes {' or '.join(takes.sizes)}."
        assert error.errors == [main.InputError(loc=["body", "resolution"], msg=error.detail[12:-1])]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("kwaivgi/kling-v2.1", {"duration": 5}, id="5 or 10 s"),
        pytest.param("google/veo-3", {"duration": 6, "resolution": "720p"}, id="6 s there are, 768p not"),
        pytest.param("bytedance/seedance-1-pro", {"duration": 6, "resolution": "720p"}, id="a range of seconds"),
        pytest.param("lightricks/ltx-video", {"length": 129}, id="frames to choose from"),
        pytest.param("wan-video/wan-2.2-i2v-fast", {"num_frames": 96, "resolution": "720p"}, id="a range of frames"),
        pytest.param("minimax/hailuo-02-fast", {"duration": 6, "resolution": "512P"}, id="one size"),
        pytest.param("pixverse/pixverse-v4.5", {"duration": 5, "quality": "720p"}, id="quality"),
        pytest.param("minimax/video-01", {}, id="nothing to set"),
    ],
)
def test_what_a_client_leaves_out_adapts(name, settings):
    """Six seconds and 768p are wishes: the nearest that the model makes is taken."""
    values = fitted(name, audio_url=None)
    assert {
        field: value for field, value in values.items() if field not in (MODELS[name].picture, "prompt")
    } == settings


@EVERY_MODEL
def test_a_job_without_speech(name):
    """A field for speech stays empty; a model that cannot do without is refused."""
    takes = MODELS[name]
    if "audio" in PUBLISHED[name]["required"]:
        error = refusal_of(name, audio_url=None)
        assert error.detail == f"model: {name} needs audio, which only /jobs_prompt_tts has."
    else:
        values = fitted(name, audio_url=None)
        check_accepted(name, values)
        assert takes.speech not in values


def test_ten_seconds_of_the_default_model_cannot_be_1080p():
    """The one rule that the default model's schema does not tell."""
    job = main.JobPromptOnly(image_url=PICTURE_URL, prompt="Talk", seconds=10, resolution="1080p")
    with pytest.raises(main.InvalidInput, match=r"^resolution: with 10 seconds it can be 512p or 768p\.$"):
        main.fit_input(main.HAILUO, job)


# Fitting a request to a model: what others may publish

FILE = {"type": "string", "format": "uri"}
TEXT = {"type": "string"}
FILES = {"type": "array", "items": FILE}
DEPRECATED = {**FILE, "deprecated": True}
SECONDS_6 = {"seconds": 6}


def unseen(properties: dict[str, Any], required: tuple[str, ...] = (), **schemas: Any) -> main.VideoModel:
    """A model that publishes this."""
    return main.video_model(
        "some/model", None, {"Input": {"properties": properties, "required": list(required)}, **schemas}
    )


def test_parts_of_parts_are_not_followed_without_end():
    """A schema of a few kB whose properties multiply is read in a moment: everyone may publish one."""
    properties = {f"field{number}": {"$ref": "#/B"} for number in range(300)}
    wide = [{"$ref": "#/C"}] * 400
    started = time.monotonic()
    unseen(properties, B={"allOf": wide}, C={"allOf": [{"type": "string", "x": "y" * 1000}] * 400})
    assert time.monotonic() - started < 1  # all of them: half a minute


def test_a_schema_of_hundreds_of_fields_is_refused():
    """Nobody fills in such a form."""
    with pytest.raises(main.ProviderFailed, match="a person could fill in"):
        unseen({f"field{number}": TEXT for number in range(301)})


def fit_unseen(model: main.VideoModel, sent: Mapping[str, Any], audio_url: str | None = None) -> dict[str, Any]:
    """The input of a job with these settings."""
    return main.fit_input(model, main.JobPromptOnly(image_url=PICTURE_URL, prompt="Talk", **sent), audio_url)


@pytest.mark.parametrize(
    ("properties", "picture"),
    [
        pytest.param({"image": FILE}, "image", id="image"),
        pytest.param({"end_image": FILE, "start_image": FILE}, "start_image", id="start and end"),
        pytest.param({"last_frame": FILE, "first_frame": FILE}, "first_frame", id="first and last frame"),
        pytest.param({"tail_image_url": FILE, "image_url": FILE}, "image_url", id="a tail"),
        pytest.param({"image_end": FILE, "image": FILE}, "image", id="the end named after"),
        pytest.param({"lastFrameImage": FILE, "firstFrameImage": FILE}, "firstFrameImage", id="camel case"),
        pytest.param({"image": FILE, "first_frame_image": FILE}, "first_frame_image", id="the first frame goes first"),
        pytest.param({"image2": FILE, "image": FILE}, "image", id="the plain name goes first"),
        pytest.param({"image1": FILE, "image2": FILE}, "image1", id="numbered"),
        pytest.param({"reference_image": FILE, "image": FILE}, "image", id="a reference"),
        pytest.param({"mask_image": FILE, "style_image": FILE, "photo": FILE}, "photo", id="mask and style"),
        pytest.param({"image_mask": FILE, "control_image": FILE, "input_image": FILE}, "input_image", id="control"),
        pytest.param({"subject_image": FILE, "face": FILE}, "face", id="a face"),
        pytest.param({"avatar": FILE}, "avatar", id="an avatar"),
        pytest.param({"portrait": FILE, "driving_video": FILE}, "portrait", id="a portrait that a film drives"),
        pytest.param({"image": DEPRECATED, "start_image": FILE}, "start_image", id="deprecated beside another"),
        pytest.param({"first_frame_image": DEPRECATED, "image": FILE}, "image", id="a deprecated first frame"),
        pytest.param({"image": DEPRECATED}, "image", id="deprecated but the only one"),
        pytest.param({"images": FILES, "image": FILE}, "image", id="beside a list"),
        pytest.param({"input": {**FILE, "description": "Input image"}}, "input", id="known by its description"),
        pytest.param({"image": {"anyOf": [FILE, {"type": "null"}], "default": None}}, "image", id="or null"),
        pytest.param({"image": {"anyOf": [{"type": "null"}, FILE]}}, "image", id="null or"),
        pytest.param({"image": {**FILE, "nullable": True}}, "image", id="nullable"),
        pytest.param({"image": {"allOf": [{"$ref": "#/components/schemas/Path"}]}}, "image", id="behind a reference"),
        pytest.param({"image": {**FILE, "type": ["null", "string"]}}, "image", id="types in a list"),
        pytest.param({"song": {**FILE, "description": "Audio for the face"}, "image": FILE}, "image", id="a song"),
        pytest.param({"voice": {**FILE, "description": "Voice of the portrait"}, "image": FILE}, "image", id="a voice"),
        pytest.param({"ending_image": FILE, "image": FILE}, "image", id="an ending"),
    ],
)
def test_the_first_picture_is_found(properties, picture):
    """The picture goes to the field where the film begins, and to no other."""
    values = fit_unseen(unseen({**properties, "prompt": TEXT}, Path=FILE), {})
    assert values == {picture: PICTURE_URL, "prompt": "Talk"}


@pytest.mark.parametrize(
    "properties",
    [
        pytest.param({}, id="text to video"),
        pytest.param({"images": FILES}, id="only a list of pictures"),
        pytest.param({"end_image": FILE}, id="only an end frame"),
        pytest.param({"reference_image": FILE, "mask": FILE}, id="only reference and mask"),
        pytest.param({"video": FILE}, id="video to video"),
        pytest.param({"input_video": {**FILE, "description": "Video whose first frame is kept"}}, id="video by name"),
        pytest.param({"input": {**FILE, "description": "Input video"}}, id="video by description"),
        pytest.param({"audio": {**FILE, "description": "Speech for the face"}}, id="only audio"),
        pytest.param({"song": {**FILE, "description": "Audio for the face"}}, id="only a song"),
        pytest.param({"ending_image": FILE}, id="only an ending"),
        pytest.param({"character_image": FILE}, id="only a character"),
        pytest.param({"song": {**FILE, "description": "What the portrait sings"}}, id="only a song, said otherwise"),
        pytest.param({"image": {"type": "boolean"}}, id="a switch called image"),
        pytest.param({"image_url": TEXT}, id="a plain text"),
    ],
)
def test_a_model_without_a_first_picture_is_refused(properties):
    """A film of something else is no use to the client."""
    with pytest.raises(main.InvalidInput) as caught:
        fit_unseen(unseen({**properties, "prompt": TEXT}), {})
    assert caught.value.detail == "model: some/model takes no picture; choose an image-to-video model."


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        pytest.param({}, {}, id="no prompt"),
        pytest.param({"prompt": TEXT, "negative_prompt": TEXT}, {"prompt": "Talk"}, id="a negative one beside it"),
        pytest.param({"negative_prompt": TEXT}, {}, id="only a negative one"),
        pytest.param({"text_prompt": TEXT}, {"text_prompt": "Talk"}, id="another name"),
        pytest.param({"prompt_optimizer": {"type": "boolean"}}, {}, id="a switch"),
        pytest.param({"prompt": {"anyOf": [TEXT, {"type": "null"}]}}, {"prompt": "Talk"}, id="or null"),
    ],
)
def test_the_prompt_is_sent_where_there_is_a_field_for_it(properties, expected):
    """A model without a prompt runs without one."""
    assert fit_unseen(unseen({"image": FILE, **properties}), {}) == {"image": PICTURE_URL, **expected}


def whole(**bounds: Any) -> dict[str, Any]:
    """A field for a whole number."""
    return {"type": "integer", **bounds}


LENGTH_REF = {"allOf": [{"$ref": "#/components/schemas/Lengths"}], "default": 5}
FRAMES = {"description": "Number of frames to generate"}


@pytest.mark.parametrize(
    ("properties", "length", "expected"),
    [
        pytest.param({"duration": LENGTH_REF}, 10, {"duration": 10}, id="enum behind a reference"),
        pytest.param({"duration": {"anyOf": [LENGTH_REF, {"type": "null"}]}}, 10, {"duration": 10}, id="or null"),
        pytest.param({"duration": {**TEXT, "enum": ["5", "10"]}}, 10, {"duration": "10"}, id="numbers as texts"),
        pytest.param({"duration": {**TEXT, "enum": ["5s", "10s"]}}, 10, {"duration": "10s"}, id="texts with a unit"),
        pytest.param({"duration": {**TEXT, "enum": ["auto", "8 s"]}}, 8, {"duration": "8 s"}, id="beside a word"),
        pytest.param({"seconds": whole(minimum=1, maximum=20)}, 9, {"seconds": 9}, id="seconds"),
        pytest.param({"video_duration": whole()}, 9, {"video_duration": 9}, id="without bounds"),
        pytest.param({"length": whole(maximum=10)}, 9, {"length": 9}, id="length"),
        pytest.param({"duration": {"type": "number", "maximum": 9.5}}, 9, {"duration": 9.0}, id="a number"),
        pytest.param(
            {"length": whole(enum=[97, 145], description="frame count")}, 6, {"length": 145}, id="frames by words"
        ),
        pytest.param({"video_length": whole(enum=[97, 145])}, 6, {"video_length": 145}, id="frames by their size"),
        pytest.param({"num_frames": whole(maximum=200)}, 6, {"num_frames": 144}, id="frames without a rate"),
        pytest.param(
            {"num_frames": whole(), "fps": whole(default=30, minimum=5)}, 6, {"num_frames": 180}, id="rate by default"
        ),
        pytest.param(
            {"num_frames": whole(), "frames_per_second": whole(enum=[8, 16])}, 6, {"num_frames": 48}, id="rate by enum"
        ),
        pytest.param(
            {"frames": whole(**FRAMES), "frame_rate": {"type": "number", "default": 12.5}},
            6,
            {"frames": 75},
            id="odd rate",
        ),
        pytest.param({"duration": whole(), "num_frames": whole()}, 6, {"duration": 6}, id="seconds before frames"),
        pytest.param({"aspect_ratio": TEXT}, 6, {}, id="no such field"),
        pytest.param({"length": {"type": "boolean"}}, 6, {}, id="a switch"),
    ],
)
def test_seconds_are_sent_as_the_model_counts(properties, length, expected):
    """In seconds or frames, as numbers or texts."""
    model = unseen({"image": FILE, **properties}, Lengths=whole(enum=[5, 10]))
    values = fit_unseen(model, {"seconds": length})
    assert values == {"image": PICTURE_URL, **expected}
    assert [type(value) for value in values.values()] == [str, *map(type, expected.values())]


@pytest.mark.parametrize(
    ("prop", "rate", "allowed"),
    [
        pytest.param(whole(enum=[5, 10]), None, "5 or 10", id="enum"),
        pytest.param({**TEXT, "enum": ["10s", "5s"]}, None, "5 or 10", id="texts with a unit"),
        pytest.param(whole(minimum=2, maximum=12), None, "at least 2 and at most 12", id="range"),
        pytest.param(whole(maximum=12), None, "at most 12", id="upper bound"),
        pytest.param(whole(minimum=81, maximum=121, **FRAMES), 16, "at least 5 and at most 8", id="range of frames"),
        pytest.param(whole(enum=[80, 160], **FRAMES), 16, "5 or 10", id="frames to choose from"),
    ],
)
def test_seconds_that_the_model_lacks_are_refused(prop, rate, allowed):
    """The refusal lists what there is, in seconds."""
    model = unseen({"image": FILE, "length": prop, **({"fps": whole(default=rate)} if rate else {})})
    with pytest.raises(main.InvalidInput) as caught:
        fit_unseen(model, {"seconds": 100})
    assert caught.value.detail == f"seconds: some/model takes {allowed}."


@pytest.mark.parametrize(
    ("properties", "size", "expected"),
    [
        pytest.param({"resolution": {**TEXT, "enum": ["480P", "720P"]}}, "720p", {"resolution": "720P"}, id="case"),
        pytest.param({"resolution": whole(enum=[480, 720])}, "720p", {"resolution": 720}, id="numbers"),
        pytest.param({"resolution": {**TEXT, "enum": ["480", "720"]}}, "720p", {"resolution": "720"}, id="without a p"),
        pytest.param({"resolution": {**TEXT, "enum": ["1080p", "4K"]}}, "4k", {"resolution": "4K"}, id="4K"),
        pytest.param(
            {"resolution": {**TEXT, "enum": ["1080p", "4K"]}}, "2160p", {"resolution": "4K"}, id="4K in lines"
        ),
        pytest.param(
            {"size": {**TEXT, "enum": ["832x480", "1280x720"]}}, "720p", {"size": "1280x720"}, id="both sides"
        ),
        pytest.param({"size": {**TEXT, "enum": ["832*480", "720*1280"]}}, "720p", {"size": "720*1280"}, id="upright"),
        pytest.param(
            {"resolution": {"allOf": [{"$ref": "#/components/schemas/Sizes"}]}},
            "480P",
            {"resolution": "480p"},
            id="reference",
        ),
        pytest.param(
            {"resolution": {**TEXT, "enum": ["2K", "1080P"]}}, "1080p", {"resolution": "1080P"}, id="its own name"
        ),
        pytest.param({"quality": {**TEXT, "enum": ["540p", "720p"]}}, "720p", {"quality": "720p"}, id="quality"),
        pytest.param({"quality": {**TEXT, "enum": ["low", "high"]}}, "720p", {}, id="quality that is no size"),
        pytest.param({"quality": whole(minimum=1, maximum=100)}, "720p", {}, id="quality in percent"),
        pytest.param({"size": {**TEXT, "enum": ["16:9", "9:16"]}}, "720p", {}, id="size that is a shape"),
        pytest.param(
            {"quality": {**TEXT, "enum": ["low"]}, "video_size": {**TEXT, "enum": ["720p"]}},
            "720p",
            {"video_size": "720p"},
            id="a size beside a quality",
        ),
        pytest.param({"resolution": TEXT}, "720p", {"resolution": "720p"}, id="any text"),
        pytest.param({"resolution": whole(minimum=256)}, "720p", {"resolution": 720}, id="any number"),
        pytest.param({"aspect_ratio": {**TEXT, "enum": ["720p"]}}, "720p", {}, id="no such field"),
    ],
)
def test_the_size_is_sent_as_the_model_writes_it(properties, size, expected):
    """Whatever name, case and form it has there."""
    model = unseen({"image": FILE, **properties}, Sizes={**TEXT, "enum": ["480p", "720p"]})
    values = fit_unseen(model, {"resolution": size})
    assert values == {"image": PICTURE_URL, **expected}
    assert [type(value) for value in values.values()] == [str, *map(type, expected.values())]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        pytest.param(["480p", "720p", "1080p"], "720p", id="the nearest"),
        pytest.param(["4k", "1080p"], "1080p", id="none near"),
        pytest.param([1024, 512], 512, id="numbers, halfway"),
        pytest.param(["1024x576", "1360x768"], "1360x768", id="the same in another form"),
    ],
)
def test_a_size_that_is_left_out_adapts(options, size):
    """768p is only a wish then."""
    assert fit_unseen(unseen({"image": FILE, "resolution": {"enum": options}}), {})["resolution"] == size


@pytest.mark.parametrize("size", ["240p", "4k"])
def test_a_size_out_of_bounds_is_refused(size):
    """As a length is, with the bounds."""
    model = unseen({"image": FILE, "resolution": whole(minimum=256, maximum=1280)})
    with pytest.raises(main.InvalidInput) as caught:
        fit_unseen(model, {"resolution": size})
    assert caught.value.detail == "resolution: some/model takes at least 256 and at most 1280."


def test_free_text_for_the_size_is_left_to_the_model():
    """Where a model lists no sizes, its own default is better than ours."""
    assert fit_unseen(unseen({"image": FILE, "resolution": TEXT}), {}) == {"image": PICTURE_URL}


@pytest.mark.parametrize(
    ("properties", "required", "expected"),
    [
        pytest.param({"mode": {**TEXT, "default": "pro"}}, ["mode"], {"mode": "pro"}, id="required with a default"),
        pytest.param({"steps": whole(default=0)}, ["steps"], {"steps": 0}, id="a default of nought"),
        pytest.param({"audio_on": {"type": "boolean", "default": False}}, ["audio_on"], {"audio_on": False}, id="off"),
        pytest.param({"mode": {**TEXT, "default": "pro"}}, [], {}, id="a default that is not required"),
        pytest.param({"end_image": FILE, "mask": FILE, "seed": whole()}, [], {}, id="other files, a seed"),
    ],
)
def test_what_a_model_requires_besides_is_its_own_default(properties, required, expected):
    """Nothing is filled that is not required, and nothing is made up."""
    model = unseen({"image": FILE, **properties}, ("image", *required))
    assert fit_unseen(model, {}) == {"image": PICTURE_URL, **expected}


@pytest.mark.parametrize(
    ("properties", "required"),
    [
        pytest.param({"mode": TEXT}, ["mode"], id="unknown"),
        pytest.param({"mode": {**TEXT, "default": None}}, ["mode"], id="a default that is none"),
        pytest.param({"end_image": FILE}, ["end_image"], id="end frame"),
        pytest.param({"video": FILE, "mask": FILE}, ["video", "mask"], id="two"),
        pytest.param({"audio": FILE, "mask": FILE}, ["audio", "mask"], id="speech in a job without, and more"),
        pytest.param({}, ["ghost"], id="not even described"),
    ],
)
def test_a_required_field_that_we_have_nothing_for_is_named(properties, required):
    """Told before anything is bought."""
    with pytest.raises(main.InvalidInput) as caught:
        fit_unseen(unseen({"image": FILE, **properties}, ("image", *required)), {})
    assert caught.value.detail == f"model: some/model needs {', '.join(required)}, which this service has nothing for."


@pytest.mark.parametrize(
    ("properties", "speech"),
    [
        pytest.param({"audio": FILE}, "audio", id="audio"),
        pytest.param({"audio_file": FILE}, "audio_file", id="audio file"),
        pytest.param({"driven_audio": FILE}, "driven_audio", id="driven audio"),
        pytest.param({"inputAudio": FILE}, "inputAudio", id="camel case"),
        pytest.param({"speech_url": FILE}, "speech_url", id="speech"),
        pytest.param({"audio": {"anyOf": [FILE, {"type": "null"}]}}, "audio", id="or null"),
        pytest.param({"background_audio": FILE, "audio": FILE}, "audio", id="beside a background"),
        pytest.param({"reference_audio": FILE}, None, id="a reference for the voice"),
        pytest.param({"audio_reference": FILE}, None, id="a reference, named after"),
        pytest.param({"background_music": FILE}, None, id="music"),
        pytest.param({"audios": FILES}, None, id="a list"),
        pytest.param({"generate_audio": {"type": "boolean"}}, None, id="a switch"),
        pytest.param({"audio": TEXT}, None, id="a plain text"),
    ],
)
def test_speech_goes_to_models_that_take_it(properties, speech):
    """They speak by themselves; to others our speech is added later."""
    model = unseen({"image": FILE, **properties})
    assert model.speech_field == speech
    expected = {"image": PICTURE_URL, **({speech: SPEECH_URL} if speech else {})}
    assert fit_unseen(model, {}, audio_url=SPEECH_URL) == expected


@pytest.mark.parametrize(
    "schemas",
    [
        pytest.param(None, id="nothing"),
        pytest.param([], id="a list"),
        pytest.param({}, id="no input"),
        pytest.param({"Input": {"type": "object"}}, id="no fields"),
        pytest.param({"Input": {"properties": []}}, id="fields as a list"),
    ],
)
def test_a_schema_that_makes_no_sense_is_the_providers_failure(schemas):
    """Told as such, naming the model."""
    with pytest.raises(main.ProviderFailed) as caught:
        main.video_model("some/model", None, schemas)
    assert told(caught.value) == (500, "provider", "replicate")
    assert caught.value.detail == "Replicate answered without the input schema of some/model."


@pytest.mark.parametrize(
    "properties",
    [
        pytest.param({"odd": None, "odder": "text", "oddest": []}, id="fields that are none"),
        pytest.param({"seed": {"$ref": "#/components/schemas/Ghost"}}, id="a reference to nothing"),
        pytest.param({"seed": {"$ref": "#/components/schemas/Loop"}}, id="a reference to itself"),
        pytest.param({"seed": {"allOf": [None, 5], "anyOf": None}}, id="parts that are none"),
        pytest.param({"duration": {"enum": [None, True, [], "auto"]}}, id="lengths that are none"),
        pytest.param({"resolution": {"enum": [None, True, {}]}}, id="sizes that are none"),
        pytest.param({"resolution": {"enum": ["9" * 5000 + "x" + "9" * 5000]}}, id="a size without end"),
        pytest.param({"duration": {"enum": 5}}, id="an enum that is none"),
        pytest.param({"seed": {"allOf": 5}}, id="parts in a number"),
    ],
)
def test_odd_fields_do_no_harm(properties):
    """A field that cannot be understood is left alone."""
    loop = {"allOf": [{"$ref": "#/components/schemas/Loop"}]}
    assert fit_unseen(unseen({"image": FILE, **properties}, Loop=loop), {}) == {"image": PICTURE_URL}


@pytest.mark.parametrize("bound", [None, "1", [], {}])
def test_odd_bounds_do_no_harm(bound):
    """A bound that is no number bounds nothing."""
    length = {"type": "integer", "minimum": bound, "maximum": bound}
    assert fit_unseen(unseen({"image": FILE, "duration": length}), SECONDS_6) == {"image": PICTURE_URL, "duration": 6}


@pytest.mark.parametrize("required", [None, True, 5, "image", {}, [["image"]], [None]])
def test_an_odd_list_of_required_fields_does_no_harm(required):
    """What is not a list of names requires nothing."""
    model = main.video_model("some/model", None, {"Input": {"properties": {"image": FILE}, "required": required}})
    assert fit_unseen(model, {}) == {"image": PICTURE_URL}


# Looking a model up

KLING = "kwaivgi/kling-v2.1"
KLING_URL = f"{REPLICATE_URL}/v1/models/{KLING}"


def model_answer(name: str, is_official: bool = True, version: str | None = "0123abcd") -> dict[str, Any]:
    """What `GET /v1/models/{owner}/{name}` answers."""
    document = {"openapi": "3.0.2", "components": {"schemas": as_published(name)}}
    return {"name": name, "is_official": is_official, "latest_version": {"id": version, "openapi_schema": document}}


def will_succeed(providers: respx.MockRouter, path: str = "models/minimax/hailuo-02/predictions") -> respx.Route:
    """Predictions created here are done at once."""
    done = {"id": "p1", "status": "succeeded", "output": FILM_URL}
    return providers.post(f"{REPLICATE_URL}/v1/{path}").respond(201, json=done)


def sent_input(route: respx.Route) -> dict[str, Any]:
    """The input of the one prediction that was created."""
    assert route.call_count == 1
    value: dict[str, Any] = json.loads(route.calls[0].request.content)["input"]
    return value


def job_for(model: str | None, **sent: Any) -> main.JobPromptOnly:
    """A picture job."""
    return main.JobPromptOnly(image_url=PICTURE_URL, prompt="Talk", model=model, **sent)


@pytest.mark.anyio
@pytest.mark.parametrize("name", [None, "minimax/hailuo-02"])
async def test_the_default_model_is_not_looked_up(providers, name):
    """It is built in: respx would refuse the request."""
    assert await main.find_model(name) is main.HAILUO


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("model", "is_official", "path", "version"),
    [
        pytest.param(KLING, True, f"models/{KLING}/predictions", None, id="official"),
        pytest.param(KLING, False, "predictions", "0123abcd", id="community"),
        pytest.param(f"{KLING}:ff99", False, "predictions", f"{KLING}:ff99", id="community with a version"),
        pytest.param(f"{KLING}:ff99", True, "predictions", f"{KLING}:ff99", id="official with a version"),
    ],
)
async def test_where_a_models_predictions_are_created(providers, model, is_official, path, version):
    """Official models run by name, others by version; a version that was asked for is kept."""
    providers.get(KLING_URL).respond(200, json=model_answer(KLING, is_official))
    route = will_succeed(providers, path)
    assert await main.replicate_video_from_prompt(job_for(model)) == FILM_URL
    body = json.loads(route.calls[0].request.content)
    assert body.pop("version", None) == version
    assert body == {"input": {"start_image": PICTURE_URL, "prompt": "Talk", "duration": 5}}


@pytest.mark.anyio
async def test_the_look_up_is_a_plain_read(providers):
    """It carries the token, and nothing else of ours."""
    route = providers.get(KLING_URL).respond(200, json=model_answer(KLING))
    await main.find_model(KLING)
    request = route.calls[0].request
    assert request.headers["authorization"] == f"Bearer {main.get_settings().required('replicate_api_token')}"
    assert (request.content, request.url.query) == (b"", b"")


@pytest.mark.anyio
@pytest.mark.parametrize(("age_s", "look_ups"), [(0, 1), (599, 1), (601, 2)])
async def test_a_schema_is_kept_for_ten_minutes(client, providers, monkeypatch, age_s, look_ups):
    """Jobs within that time share one look-up."""
    route = providers.get(KLING_URL).respond(200, json=model_answer(KLING))
    will_succeed(providers, f"models/{KLING}/predictions")
    await main.find_model(KLING)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + age_s)
    response = await client.post("/jobs_prompt_only", json={**JOB, "model": KLING})
    assert (response.status_code, route.call_count) == (200, look_ups)


@pytest.mark.anyio
async def test_jobs_at_the_same_time_share_one_look_up(client, providers):
    """Twenty jobs that begin together ask once."""

    async def slowly(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.05)
        return httpx.Response(200, json=model_answer(KLING))

    route = providers.get(KLING_URL).mock(side_effect=slowly)
    will_succeed(providers, f"models/{KLING}/predictions")
    post = partial(client.post, "/jobs_prompt_only", json={**JOB, "model": KLING})
    responses = await asyncio.gather(*(post() for _ in range(20)))
    assert [response.status_code for response in responses] == [200] * 20
    assert route.call_count == 1


@pytest.mark.anyio
async def test_versions_of_a_model_share_one_look_up(client, providers):
    """Made-up versions fill no memory; each job still gets the version it asked for."""
    route = providers.get(KLING_URL).respond(200, json=model_answer(KLING))
    models = [await main.find_model(f"{KLING}{version}") for version in (":aa", ":bb", "")]
    assert [model.version for model in models] == [f"{KLING}:aa", f"{KLING}:bb", None]
    assert route.call_count == 1


@pytest.mark.anyio
async def test_a_failed_look_up_is_not_kept(client, providers):
    """The next job asks again."""
    found = httpx.Response(200, json=model_answer(KLING))
    providers.get(KLING_URL).mock(side_effect=[httpx.Response(404, json={"detail": "Not found."}), found])
    will_succeed(providers, f"models/{KLING}/predictions")
    statuses = [(await client.post("/jobs_prompt_only", json={**JOB, "model": KLING})).status_code for _ in range(2)]
    assert statuses == [400, 200]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/jobs_prompt_only", "/jobs_prompt_tts"])
async def test_a_model_that_does_not_exist_costs_nothing(client, providers, path):
    """Replicate's own 404 comes back as a 400, before any speech."""
    providers.get(f"{REPLICATE_URL}/v1/models/no/such").respond(404, json={"detail": "Not found.", "status": 404})
    response = await client.post(path, json={**JOB, "model": "no/such"})
    body = response.json()
    assert (response.status_code, body["category"], body["provider"]) == (400, "provider", "replicate")
    assert body["detail"] == "model no/such: Replicate answered 404: Not found."
    assert len(providers.calls) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("found", "what"),
    [
        pytest.param({}, "a version of", id="nothing"),
        pytest.param({"is_official": False, "latest_version": None}, "a version of", id="community without version"),
        pytest.param(
            {"is_official": True, "latest_version": None}, "the input schema of", id="official without schema"
        ),
        pytest.param(
            {"is_official": True, "latest_version": {"openapi_schema": 5}}, "the input schema of", id="number"
        ),
        pytest.param(
            {"is_official": True, "latest_version": {"openapi_schema": {"components": {"schemas": []}}}},
            "the input schema of",
            id="list",
        ),
    ],
)
async def test_a_model_that_tells_nothing_of_itself(client, providers, found, what):
    """The provider's failure, before anything is bought."""
    providers.get(KLING_URL).respond(200, json=found)
    response = await client.post("/jobs_prompt_tts", json={**JOB, "model": KLING})
    assert (response.status_code, response.json()["category"]) == (500, "provider")
    assert response.json()["detail"] == f"Replicate answered without {what} {KLING}."


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "name", "changes", "detail"),
    [
        pytest.param(
            "/jobs_prompt_only",
            "wan-video/wan-2.2-s2v",
            {},
            "model: wan-video/wan-2.2-s2v needs audio, which only /jobs_prompt_tts has.",
            id="a model that needs speech in a job without",
        ),
        pytest.param("/jobs_prompt_tts", KLING, {"seconds": 7}, f"seconds: {KLING} takes 5 or 10.", id="seconds"),
        pytest.param(
            "/jobs_prompt_tts",
            "google/veo-3",
            {"resolution": "768p"},
            "resolution: google/veo-3 takes 720p or 1080p.",
            id="the default size, but asked for",
        ),
    ],
)
async def test_what_does_not_fit_is_refused_before_anything_is_bought(client, providers, path, name, changes, detail):
    """The look-up is the only request."""
    providers.get(f"{REPLICATE_URL}/v1/models/{name}").respond(200, json=model_answer(name))
    response = await client.post(path, json={**JOB, "model": name, **changes})
    assert (response.status_code, response.json()["category"], response.json()["detail"]) == (400, "validation", detail)
    assert len(providers.calls) == 1


@pytest.mark.anyio
async def test_a_film_that_speaks_by_itself_is_stored_as_it_is(client, providers):
    """A model that takes speech is given its public URL; its film is neither muxed nor changed."""
    name, film = "wan-video/wan-2.2-s2v", b"\0\0\0\x18ftypisom" + bytes(1000)
    providers.post(url__startswith=ELEVEN_URL).respond(200, content=b"ID3speech")
    upload = providers.post(url__startswith=f"{SUPABASE_URL}/storage/v1/object/pets/").respond(200, json={"Key": "x"})
    providers.get(f"{REPLICATE_URL}/v1/models/{name}").respond(200, json=model_answer(name))
    create = will_succeed(providers, f"models/{name}/predictions")
    providers.get(FILM_URL).respond(200, content=film)
    response = await client.post("/jobs_prompt_tts", json={**JOB, "model": name})
    urls = response.json()
    assert (response.status_code, urls["video_url"]) == (200, FILM_URL)
    assert sent_input(create) == {"image": PICTURE_URL, "prompt": JOB["prompt"], "audio": urls["audio_url"]}
    assert [call.request.content for call in upload.calls] == [b"ID3speech", film]


@pytest.mark.anyio
async def test_what_a_speaking_model_makes_must_be_a_film(client, providers):
    """Anything but an MP4 is not stored as one; what was paid for is told."""
    name = "wan-video/wan-2.2-s2v"
    providers.post(url__startswith=ELEVEN_URL).respond(200, content=b"ID3speech")
    upload = providers.post(url__startswith=f"{SUPABASE_URL}/storage/v1/object/pets/").respond(200, json={"Key": "x"})
    providers.get(f"{REPLICATE_URL}/v1/models/{name}").respond(200, json=model_answer(name))
    will_succeed(providers, f"models/{name}/predictions")
    providers.get(FILM_URL).respond(200, content=b"<html>gone</html>")
    body = (await client.post("/jobs_prompt_tts", json={**JOB, "model": name})).json()
    assert (body["category"], body["detail"]) == ("resource", "What the model made is not an MP4 film.")
    assert (body["partial"]["video_url"], body["partial"]["prediction_id"]) == (FILM_URL, "p1")
    assert upload.call_count == 1


@pytest.mark.anyio
async def test_a_model_can_be_found_without_a_running_service(providers):
    """The helper stands on its own, and keeps nothing then."""
    route = providers.get(KLING_URL).respond(200, json=model_answer(KLING))
    models = [await main.find_model(KLING) for _ in range(2)]
    assert [model.picture_field for model in models] == ["start_image"] * 2
    assert route.call_count == 2


@pytest.mark.anyio
async def test_a_missing_token_is_told_before_the_look_up(providers, monkeypatch):
    """Nothing leaves without it."""
    use_settings(monkeypatch, REPLICATE_API_TOKEN="")
    error = await error_of(main.find_model(KLING))
    assert told(error) == (500, "configuration", None)
