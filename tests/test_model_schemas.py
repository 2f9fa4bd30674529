"""Model schemas: mapping a job to a model's input for published and invented schemas, and looking a model up."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import respx

import main
from tests.support import network
from tests.support.application import (
    ELEVEN_URL,
    REPLICATE_URL,
    SUPABASE_URL,
    error_kind,
)

PICTURE_URL = "https://example.com/pet.jpg"
SPEECH_URL = "https://example.com/speech.mp3"
VIDEO_URL = "https://replicate.delivery/xezq/video.mp4"
JOB = {
    "image_url": PICTURE_URL,
    "prompt": "Talk",
    "text": "Feed me!",
    "voice_id": "JBFqnCBsd6RMkjVDRZzb",
}

# What a test does not route fails it.
pytestmark = [
    pytest.mark.usefixtures("settings"),
    pytest.mark.anyio,
    pytest.mark.respx(assert_all_called=False),
]


client = network.client  # of an application that has looked up nothing yet

# Published schemas


class Takes(NamedTuple):
    """What a model takes of a job, read from its page."""

    picture: str
    length: str | None = None
    # Seconds -> what the model is sent; None: any, as they are
    lengths: dict[int, int] | None = None
    size: str | None = None
    sizes: tuple[str, ...] = ()
    speech: str | None = None


def seconds(*values: int) -> dict[int, int]:
    """Lengths that the model counts in seconds itself."""
    return {value: value for value in values}


P480, P720, P1080 = "480p", "720p", "1080p"
KLING_TAKES = Takes("start_image", "duration", seconds(5, 10))
VEO_TAKES = Takes("image", "duration", seconds(4, 6, 8), "resolution", (P720, P1080))
SEEDANCE_TAKES = Takes(
    "image", "duration", seconds(*range(2, 13)), "resolution", (P480, P720, P1080)
)
HAILUO_TAKES = Takes("first_frame_image", "duration", seconds(6, 10), "resolution", ("768p", P1080))
WAN25_TAKES = Takes("image", "duration", seconds(5, 10), "resolution", (P720, P1080), "audio")
WAN26_TAKES = WAN25_TAKES._replace(lengths=seconds(5, 10, 15))
MODELS = {
    "bytedance/seedance-1-lite": SEEDANCE_TAKES,
    "bytedance/seedance-1-pro": SEEDANCE_TAKES._replace(lengths=seconds(*range(3, 13))),
    "bytedance/seedance-1-pro-fast": SEEDANCE_TAKES,
    "google/veo-3": VEO_TAKES,
    "google/veo-3-fast": VEO_TAKES,
    "kwaivgi/kling-v2.1": KLING_TAKES,
    "kwaivgi/kling-v2.1-master": KLING_TAKES,
    "kwaivgi/kling-v2.5-turbo-pro": KLING_TAKES,
    "kwaivgi/kling-v2.6": KLING_TAKES,
    "leonardoai/motion-2.0": Takes("image"),
    # 97 to 257 frames at 24 a second: there is nothing near 6 s or 10 s
    "lightricks/ltx-video": Takes(
        "image", "length", {4: 97, 5: 129, 7: 161, 8: 193, 9: 225, 11: 257}
    ),
    "luma/ray-2-720p": Takes("start_image", "duration", seconds(5, 9)),
    "minimax/hailuo-02": HAILUO_TAKES._replace(sizes=("512p", "768p", P1080)),
    "minimax/hailuo-02-fast": HAILUO_TAKES._replace(sizes=("512P",)),
    "minimax/hailuo-2.3": HAILUO_TAKES,
    "minimax/hailuo-2.3-fast": HAILUO_TAKES,
    "minimax/video-01": Takes("first_frame_image"),
    "minimax/video-01-director": Takes("first_frame_image"),
    "minimax/video-01-live": Takes("first_frame_image"),
    "pixverse/pixverse-v4.5": Takes(
        "image", "duration", seconds(5, 8), "quality", ("360p", "540p", P720, P1080)
    ),
    # 16 frames a second; the schema names no limit
    "wan-video/wan-2.2-i2v-a14b": Takes("image", "num_frames", None, "resolution", (P480, P720)),
    # 81 to 121 frames at 16 a second
    "wan-video/wan-2.2-i2v-fast": Takes(
        "image", "num_frames", {5: 81, 6: 96, 7: 112, 8: 121}, "resolution", (P480, P720)
    ),
    "wan-video/wan-2.2-s2v": Takes("image", speech="audio"),
    "wan-video/wan-2.5-i2v": WAN25_TAKES._replace(sizes=(P480, P720, P1080)),
    "wan-video/wan-2.5-i2v-fast": WAN25_TAKES,
    "wan-video/wan-2.6-i2v": WAN26_TAKES,
    "wan-video/wan2.6-i2v-flash": WAN26_TAKES,
}
MODELS_FILE = Path(__file__).with_name("sandbox").joinpath("models.json")
PUBLISHED = {  # without the sandbox's own
    name: model
    for name, model in json.loads(MODELS_FILE.read_text()).items()
    if not name.startswith("sandbox/")
}
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
    return {
        **schemas,
        "Input": {"type": "object", "properties": fields, "required": PUBLISHED[name]["required"]},
    }


def fit(model: main.VideoModel, audio_url: str | None = None, **sent: Any) -> dict[str, Any]:
    """The input of a job that sends these settings."""
    return main.build_model_input(
        model, main.JobPromptOnly(image_url=PICTURE_URL, prompt="Talk", **sent), audio_url
    )


def refusal(model: main.VideoModel, **sent: Any) -> str:
    """The error text of a rejected job, which names the invalid field in `errors` as well."""
    with pytest.raises(main.InvalidInput) as caught:
        fit(model, **sent)
    field, _, message = caught.value.detail.partition(": ")
    [error] = caught.value.errors
    assert (error.loc, error.msg) == (["body", field], message.removesuffix("."))
    return caught.value.detail


def published(name: str) -> main.VideoModel:
    """A model as it is published."""
    return main.parse_model(name, None, as_published(name))


def fitted(name: str, **sent: Any) -> dict[str, Any]:
    """The input for a job with speech, checked as Replicate checks it: known fields, right types, none missing."""
    values, properties = fit(published(name), SPEECH_URL, **sent), PUBLISHED[name]["properties"]
    assert set(PUBLISHED[name]["required"]) <= set(values) <= set(properties)
    for field, value in values.items():
        prop = properties[field]
        assert (
            type(value) in {"string": [str], "integer": [int], "number": [int, float]}[prop["type"]]
        )
        assert value in prop.get("enum", [value])
        assert prop.get("minimum", value) <= value <= prop.get("maximum", value)
    return values


@EVERY_MODEL
def test_a_job_without_settings_fits_every_model(name):
    """Picture, prompt and speech go into the right fields; length and size are filled in where the model has them."""
    assert list(MODELS) == list(PUBLISHED)
    values, takes = fitted(name), MODELS[name]
    expected = {takes.picture: PICTURE_URL, "prompt": "Talk"} | (
        {takes.speech: SPEECH_URL} if takes.speech else {}
    )
    assert expected.items() <= values.items()
    assert set(values) == {*expected, *filter(None, (takes.length, takes.size))}
    assert fit(main.parse_model(name, None, {"Input": PUBLISHED[name]}), SPEECH_URL) == values


@EVERY_MODEL
def test_a_length_is_sent_in_the_models_unit_or_rejected(name):
    """In seconds or in frames; the error lists the lengths in seconds; a model without lengths takes any."""
    takes = MODELS[name]
    made = (
        {length: length * 16 for length in (1, 7, 600)} if takes.lengths is None else takes.lengths
    )
    for length, sent in made.items():
        assert fitted(name, seconds=length).get(takes.length or "") == (
            sent if takes.length else None
        )
    listed, bounds = " or ".join(map(str, made)), f"at least {min(made)} and at most {max(made)}"
    for length in sorted({*range(1, 21), 600} - set(made)) if takes.lengths else ():
        detail = refusal(published(name), seconds=length)
        assert detail in (f"seconds: {name} takes {listed}.", f"seconds: {name} takes {bounds}.")


@EVERY_MODEL
def test_a_size_is_sent_in_the_models_spelling_or_rejected(name):
    """Upper and lower case are equal; the error lists the sizes; a model without sizes takes any."""
    takes = MODELS[name]
    for size in takes.sizes:
        for written in (size.upper(), size.lower()):
            assert fitted(name, resolution=written)[takes.size] == size
    for size in {"240p", "512p", "720p", "768p", "1440p", "4k", "big"} - set(
        map(str.lower, takes.sizes)
    ):
        if takes.sizes:
            detail = refusal(published(name), resolution=size)
            assert detail == f"resolution: {name} takes {' or '.join(takes.sizes)}."
        else:
            assert fitted(name, resolution=size) == fitted(name)


@EVERY_MODEL
def test_a_job_without_speech_leaves_the_speech_field_empty(name):
    """A model that requires speech is rejected."""
    if "audio" in PUBLISHED[name]["required"]:
        assert (
            refusal(published(name))
            == f"model: {name} needs audio, which only /jobs_prompt_tts has."
        )
    else:
        assert fit(published(name)).items() == fitted(name).items() - {("audio", SPEECH_URL)}


def test_ten_seconds_of_the_default_model_cannot_be_1080p():
    """This rule is not in the default model's schema."""
    detail = refusal(main.HAILUO, seconds=10, resolution="1080p")
    assert detail == "resolution: must be 512p or 768p with 10 seconds."


# Invented schemas

FILE = {"type": "string", "format": "uri"}
TEXT = {"type": "string"}
SWITCH = {"type": "boolean"}
FILES = {"type": "array", "items": FILE}
DEPRECATED = {**FILE, "deprecated": True}
NULL = {"type": "null"}


def unseen(properties: dict[str, Any], *required: str, **schemas: Any) -> main.VideoModel:
    """A model that publishes this."""
    schema = {"properties": properties, "required": list(required)}
    return main.parse_model("some/model", None, {"Input": schema, **schemas})


def described(text: str) -> dict[str, Any]:
    """A file that the model says this of."""
    return {**FILE, "description": text}


def choice(*values: Any) -> dict[str, Any]:
    """A field with texts or numbers to choose from."""
    return {"type": "string" if isinstance(values[0], str) else "integer", "enum": list(values)}


def whole(**bounds: Any) -> dict[str, Any]:
    """A field for a whole number."""
    return {"type": "integer", **bounds}


def test_nested_schema_parts_are_followed_within_bounds():
    """A schema of a few kB whose parts multiply is read within a second: anybody may publish one."""
    properties = {f"field{number}": {"$ref": "#/B"} for number in range(300)}
    wide = [{"$ref": "#/C"}] * 400
    started = time.monotonic()
    unseen(properties, B={"allOf": wide}, C={"allOf": [{"type": "string", "x": "y" * 1000}] * 400})
    assert time.monotonic() - started < 1  # all of them: half a minute


@pytest.mark.parametrize(
    "names",
    [
        "*image",
        "*face subject_image",
        "*avatar",
        "*portrait driving_video",
        "*input_image control_image",
        # not where the video ends
        "end_image *start_image",
        "last_frame *first_frame",
        "tail_image_url *image_url",
        "image_end *image",
        "lastFrameImage *firstFrameImage",
        "ending_image *image",
        # the better name
        "image *first_frame_image",
        "image2 *image",
        "*image1 image2",
        # not what only helps
        "reference_image *image",
        "mask_image style_image *photo",
        "image_mask *input_image",
        # no picture
        "end_image",
        "reference_image mask",
        "video",
        "ending_image",
        "character_image",
        # speech, or what is none
        "+audio",
        "+audio_file",
        "+driven_audio",
        "+inputAudio *image",
        "+speech_url",
        "background_audio +audio",
        "reference_audio",
        "audio_reference",
        "background_music",
    ],
)
def test_picture_and_speech_fields_are_found_by_name(names):
    """In each case the picture field is marked with a star, the speech field with a plus."""
    listed = names.split()
    model = unseen({name.lstrip("*+"): FILE for name in listed})
    marked = [next((name[1:] for name in listed if name[0] == mark), None) for mark in "*+"]
    assert [model.picture_field, model.speech_field] == marked


def test_a_model_without_a_picture_field_is_rejected():
    """A video of something else is of no use to the client."""
    detail = refusal(unseen({"prompt": TEXT, "end_image": FILE}))
    assert detail == "model: some/model takes no picture; choose an image-to-video model."


@pytest.mark.parametrize(
    ("properties", "picture", "speech"),
    [
        pytest.param(
            {"image": DEPRECATED, "start_image": FILE},
            "start_image",
            None,
            id="deprecated beside another",
        ),
        pytest.param(
            {"first_frame_image": DEPRECATED, "image": FILE},
            "image",
            None,
            id="a deprecated first frame",
        ),
        pytest.param({"image": DEPRECATED}, "image", None, id="deprecated but the only one"),
        pytest.param({"images": FILES, "image": FILE}, "image", None, id="beside a list"),
        pytest.param(
            {"input": described("Input image")}, "input", None, id="known by its description"
        ),
        pytest.param(
            {"image": {"anyOf": [FILE, NULL], "default": None}}, "image", None, id="or null"
        ),
        pytest.param({"image": {"anyOf": [NULL, FILE]}}, "image", None, id="null or"),
        pytest.param(
            {"image": {"allOf": [{"$ref": "#/components/schemas/Path"}]}},
            "image",
            None,
            id="behind a reference",
        ),
        pytest.param(
            {"image": {**FILE, "type": ["null", "string"]}}, "image", None, id="types in a list"
        ),
        pytest.param(
            {"song": described("Audio for the face"), "image": FILE}, "image", None, id="a song"
        ),
        pytest.param(
            {"voice": described("Voice of the portrait"), "image": FILE},
            "image",
            None,
            id="a voice",
        ),
        pytest.param({"images": FILES}, None, None, id="only a list"),
        pytest.param(
            {"input_video": described("Video whose first frame is kept")},
            None,
            None,
            id="video by name",
        ),
        pytest.param({"input": described("Input video")}, None, None, id="video by description"),
        pytest.param({"audio": described("Speech for the face")}, None, "audio", id="audio"),
        pytest.param({"audio": {"anyOf": [FILE, NULL]}}, None, "audio", id="audio or null"),
        pytest.param({"audio": FILES}, None, None, id="a list of audio"),
        pytest.param({"generate_audio": SWITCH}, None, None, id="audio that is a switch"),
        pytest.param(
            {"song": described("What the portrait sings")}, None, None, id="a song, said otherwise"
        ),
        pytest.param({"image": SWITCH}, None, None, id="a switch"),
        pytest.param({"image_url": TEXT}, None, None, id="a plain text"),
    ],
)
def test_picture_and_speech_fields_are_found_by_schema(properties, picture, speech):
    """Each is a single file of the right kind, by its name or else by its description."""
    model = unseen(properties, Path=FILE)
    assert (model.picture_field, model.speech_field) == (picture, speech)


FRAMES = {"description": "Number of frames to generate"}
SIZE = whole(minimum=256, maximum=1280)
REF = {"allOf": [{"$ref": "#/components/schemas/Choices"}]}


@pytest.mark.parametrize(
    ("properties", "asked", "sent"),
    [
        pytest.param(
            {"duration": {"anyOf": [REF, NULL]}}, 10, 10, id="enum behind a reference, or null"
        ),
        pytest.param({"duration": choice("5", "10")}, 10, "10", id="numbers as texts"),
        pytest.param({"duration": choice("5s", "10s")}, 10, "10s", id="texts with a unit"),
        pytest.param({"duration": choice("auto", "8 s")}, 8, "8 s", id="beside a word"),
        pytest.param({"seconds": whole(minimum=1, maximum=20)}, 9, 9, id="seconds"),
        pytest.param({"length": whole(maximum=10)}, 9, 9, id="length"),
        pytest.param({"duration": {"type": "number", "maximum": 9.5}}, 9, 9.0, id="a number"),
        pytest.param(
            {"duration": whole(), "num_frames": whole()}, 6, 6, id="seconds before frames"
        ),
        pytest.param({"length": choice(49, 145) | FRAMES}, 6, 145, id="frames by words"),
        pytest.param({"video_length": choice(97, 145)}, 6, 145, id="frames by their size"),
        pytest.param({"num_frames": whole(), "fps": choice(8, 16)}, 6, 48, id="rate by enum"),
        pytest.param(
            {"frames": whole(), "frame_rate": {"type": "number", "default": 12.5}},
            6,
            75,
            id="odd rate",
        ),
        pytest.param({"length": SWITCH}, 6, None, id="a switch"),
        pytest.param({"resolution": choice(480, 720)}, "720p", 720, id="numbers"),
        pytest.param({"resolution": choice("480", "720")}, "720p", "720", id="without a p"),
        pytest.param({"resolution": choice("1080p", "4K")}, "2160p", "4K", id="4K in lines"),
        pytest.param(
            {"resolution": choice("2K", "1080P")},
            "1080p",
            "1080P",
            id="its own name before its lines",
        ),
        pytest.param({"size": choice("832x480", "1280x720")}, "720p", "1280x720", id="both sides"),
        pytest.param({"size": choice("832*480", "720*1280")}, "720p", "720*1280", id="upright"),
        pytest.param(
            {"video_size": choice("720p"), "quality": choice("low")},
            "720p",
            "720p",
            id="beside a quality",
        ),
        pytest.param({"resolution": TEXT}, "720p", "720p", id="any text"),
        pytest.param({"resolution": whole(minimum=256)}, "720p", 720, id="any number"),
        pytest.param(
            {"quality": choice("low", "high")}, "720p", None, id="quality that is no size"
        ),
        pytest.param(
            {"quality": whole(minimum=1, maximum=100)}, "720p", None, id="quality in percent"
        ),
        pytest.param({"size": choice("16:9", "9:16")}, "720p", None, id="size that is a shape"),
        # six seconds and 768p are wishes: the nearest that the model makes is taken
        pytest.param({"duration": choice(5, 8)}, None, 5, id="left out: the nearest length"),
        pytest.param({"duration": choice(5, 7)}, None, 5, id="left out: halfway, the shorter one"),
        pytest.param(
            {"length": choice(97, 129, 161)}, None, 129, id="left out: frames to choose from"
        ),
        pytest.param(
            {"num_frames": whole(minimum=150, maximum=200)},
            None,
            150,
            id="left out: a range of frames",
        ),
        pytest.param(
            {"resolution": choice("480p", "720p", "1080p")},
            None,
            "720p",
            id="left out: the nearest size",
        ),
        pytest.param({"quality": choice("4k", "1080p")}, None, "1080p", id="left out: none near"),
        pytest.param({"resolution": choice(1024, 512)}, None, 512, id="left out: numbers, halfway"),
        pytest.param(
            {"resolution": choice("1024x576", "1360x768")},
            None,
            "1360x768",
            id="left out: the same in another form",
        ),
        pytest.param(
            {"resolution": TEXT}, None, None, id="left out, none listed: the model's default"
        ),
    ],
)
def test_length_and_size_are_sent_as_the_model_writes_them(properties, asked, sent):
    """Whatever name and form they have there: seconds or frames, numbers or texts, lines or sides."""
    setting = {"seconds" if isinstance(asked, int) else "resolution": asked} if asked else {}
    values = fit(unseen({"image": FILE, **properties}, Choices=choice(5, 10)), **setting)
    assert values == {"image": PICTURE_URL, **({next(iter(properties)): sent} if sent else {})}
    assert [type(value) for value in values.values()] == [str, type(sent)][: len(values)]


@pytest.mark.parametrize(
    ("prop", "setting", "allowed"),
    [
        pytest.param(choice("10s", "5s"), {"seconds": 7}, "5 or 10", id="texts with a unit"),
        pytest.param(whole(maximum=12), {"seconds": 13}, "at most 12", id="upper bound"),
        pytest.param(
            whole(minimum=81), {"seconds": 4}, "at least 5", id="lower bound of frames, by its size"
        ),
        pytest.param(
            choice(80, 160) | FRAMES, {"seconds": 7}, "5 or 10", id="frames to choose from"
        ),
        pytest.param(SIZE, {"resolution": "240p"}, "at least 256 and at most 1280", id="too small"),
        pytest.param(SIZE, {"resolution": "4k"}, "at least 256 and at most 1280", id="too large"),
    ],
)
def test_a_length_or_size_the_model_lacks_is_rejected(prop, setting, allowed):
    """The error lists what the model takes, lengths in seconds."""
    [(field, _)] = setting.items()
    model = unseen(
        {"image": FILE, "length" if field == "seconds" else field: prop, "fps": whole(default=16)}
    )
    assert refusal(model, **setting) == f"{field}: some/model takes {allowed}."


@pytest.mark.parametrize(
    ("properties", "required", "expected"),
    [
        # a prompt, where there is a field for it
        pytest.param({}, "", {}, id="no prompt"),
        pytest.param(
            {"negative_prompt": TEXT, "prompt": TEXT},
            "",
            {"prompt": "Talk"},
            id="prompt: a negative one beside it",
        ),
        pytest.param({"negative_prompt": TEXT}, "", {}, id="prompt: only a negative one"),
        pytest.param({"text_prompt": TEXT}, "", {"text_prompt": "Talk"}, id="prompt: another name"),
        pytest.param({"prompt_optimizer": SWITCH}, "", {}, id="prompt: a switch"),
        pytest.param(
            {"prompt": {"anyOf": [TEXT, NULL]}}, "", {"prompt": "Talk"}, id="prompt: or null"
        ),
        # what the model requires besides
        pytest.param(
            {"mode": {**TEXT, "default": "pro"}},
            "mode",
            {"mode": "pro"},
            id="required with a default",
        ),
        pytest.param({"steps": whole(default=0)}, "steps", {"steps": 0}, id="a default of nought"),
        pytest.param(
            {"audio_on": {**SWITCH, "default": False}}, "audio_on", {"audio_on": False}, id="off"
        ),
        pytest.param({"mode": {**TEXT, "default": "pro"}, "mask": FILE}, "", {}, id="not required"),
        pytest.param({"mode": TEXT}, "mode", None, id="unknown"),
        pytest.param(
            {"mode": {**TEXT, "default": None}}, "mode", None, id="a default that is none"
        ),
        pytest.param({"end_image": FILE}, "end_image", None, id="end frame"),
        pytest.param({"video": FILE, "mask": FILE}, "video mask", None, id="two"),
        pytest.param(
            {"audio": FILE, "mask": FILE},
            "audio mask",
            None,
            id="speech in a job without, and more",
        ),
        pytest.param({}, "ghost", None, id="not even described"),
        # fields that cannot be understood
        pytest.param(
            {"odd": None, "odder": "text", "oddest": []}, "", {}, id="fields that are none"
        ),
        pytest.param(
            {"seed": {"$ref": "#/components/schemas/Ghost"}}, "", {}, id="a reference to nothing"
        ),
        pytest.param(
            {"seed": {"$ref": "#/components/schemas/Loop"}}, "", {}, id="a reference to itself"
        ),
        pytest.param(
            {"seed": {"allOf": [None, 5], "anyOf": None}}, "", {}, id="parts that are none"
        ),
        pytest.param(
            {"duration": {"enum": [None, True, [], "auto"]}}, "", {}, id="lengths that are none"
        ),
        pytest.param({"resolution": {"enum": [None, True, {}]}}, "", {}, id="sizes that are none"),
        pytest.param(
            {"resolution": {"enum": ["9" * 5000 + "x" + "9" * 5000]}},
            "",
            {},
            id="a size without end",
        ),
        pytest.param({"duration": {"enum": 5}}, "", {}, id="an enum that is none"),
        pytest.param({"seed": {"allOf": 5}}, "", {}, id="parts in a number"),
    ],
)
def test_only_the_prompt_and_required_defaults_are_filled_in(properties, required, expected):
    """A required field without a default that the service has no value for is an error before all others."""
    schemas = {"Loop": {"allOf": [{"$ref": "#/components/schemas/Loop"}]}}
    model = unseen({"image": FILE, **properties}, "image", *required.split(), **schemas)
    if expected is None:
        names = ", ".join(required.split())
        assert (
            refusal(model)
            == f"model: some/model needs {names}, which this service has nothing for."
        )
    else:
        assert fit(model) == {"image": PICTURE_URL, **expected}


@pytest.mark.parametrize(
    "schemas", [None, [], {}, {"Input": {"type": "object"}}, {"Input": {"properties": []}}], ids=str
)
def test_an_invalid_schema_is_a_provider_error(schemas):
    """The error names the model."""
    with pytest.raises(main.ProviderFailed) as caught:
        main.parse_model("some/model", None, schemas)
    assert error_kind(caught.value) == (500, "provider", "replicate")
    assert (
        caught.value.detail
        == "Replicate answered without an input schema of some/model that a person could fill in."
    )


def test_a_schema_of_more_than_300_fields_is_rejected():
    """Well-known models have up to fifteen."""
    with pytest.raises(main.ProviderFailed, match="a person could fill in"):
        unseen({f"field{number}": TEXT for number in range(301)})


@pytest.mark.parametrize("odd", [None, True, 5, "1", {}, [["image"]], [None]], ids=repr)
def test_invalid_bounds_and_lists_are_ignored(odd):
    """A bound that is not a number sets no limit, and `required` that is not a list of names requires nothing."""
    bound = None if odd in (5, True) else odd
    properties = {"image": FILE, "duration": whole(minimum=bound, maximum=bound)}
    model = main.parse_model(
        "some/model", None, {"Input": {"properties": properties, "required": odd}}
    )
    assert fit(model, seconds=6) == {"image": PICTURE_URL, "duration": 6}


# Model look-up

KLING = "kwaivgi/kling-v2.1"
KLING_URL = f"{REPLICATE_URL}/v1/models/{KLING}"
SPEAKING = "wan-video/wan-2.2-s2v"


def version(name: str, number: str = "0123abcd") -> dict[str, Any]:
    """What `GET /v1/models/{owner}/{name}/versions/{id}` answers."""
    return {
        "id": number,
        "openapi_schema": {"openapi": "3.0.2", "components": {"schemas": as_published(name)}},
    }


def publishes(latest: Any, is_official: bool = True) -> httpx.Response:
    """What `GET /v1/models/{owner}/{name}` answers for a model whose latest version is this."""
    return httpx.Response(200, json={"is_official": is_official, "latest_version": latest})


def will_succeed(
    router: respx.MockRouter, path: str = f"models/{KLING}/predictions"
) -> respx.Route:
    """Predictions that are created here have succeeded already."""
    done = {"id": "p1", "status": "succeeded", "output": VIDEO_URL}
    return router.post(f"{REPLICATE_URL}/v1/{path}").respond(201, json=done)


async def test_the_default_model_is_not_looked_up(client, respx_mock):
    """Its schema is built in: respx would reject the request."""
    assert await main.find_model(None) is await main.find_model("minimax/hailuo-02") is main.HAILUO


@pytest.mark.parametrize(
    ("is_official", "path", "runs_by"),
    [
        pytest.param(True, f"models/{KLING}/predictions", {}, id="official"),
        pytest.param(False, "predictions", {"version": "0123abcd"}, id="community"),
    ],
)
async def test_a_model_runs_by_name_or_by_its_latest_version(
    client, respx_mock, is_official, path, runs_by
):
    """An official model runs by name, any other by version; the look-up is a plain GET with the token."""
    look_up = respx_mock.get(KLING_URL).mock(return_value=publishes(version(KLING), is_official))
    create = will_succeed(respx_mock, path)
    body = main.JobPromptOnly(image_url=PICTURE_URL, prompt="Talk", model=KLING)
    assert await main.replicate_video_from_prompt(body) == VIDEO_URL
    sent = {"input": {"start_image": PICTURE_URL, "prompt": "Talk", "duration": 5}}
    assert json.loads(create.calls.last.request.content) == {**sent, **runs_by}
    [call] = look_up.calls
    assert (
        call.request.headers["authorization"]
        == f"Bearer {main.get_settings().required('replicate_api_token')}"
    )
    assert (call.request.content, call.request.url.query) == (b"", b"")


async def test_a_version_is_fitted_to_its_own_schema(client, respx_mock):
    """Each requested version is looked up by itself and runs as that version."""
    for number, like in (("aa", "google/veo-3"), ("bb", KLING)):
        respx_mock.get(f"{KLING_URL}/versions/{number}").respond(200, json=version(like, number))
    create = will_succeed(respx_mock, "predictions")
    for number in ("aa", "bb"):
        response = await client.post(
            "/jobs_prompt_only", json={**JOB, "model": f"{KLING}:{number}"}
        )
        assert response.status_code == 200
    sent = [json.loads(call.request.content) for call in create.calls]
    assert [body["version"] for body in sent] == [f"{KLING}:aa", f"{KLING}:bb"]
    assert [set(body["input"]) for body in sent] == [
        {"image", "prompt", "duration", "resolution"},
        {"start_image", "prompt", "duration"},
    ]


@pytest.mark.parametrize(("age_s", "look_ups"), [(0, 1), (599, 1), (601, 2)])
async def test_a_schema_is_kept_for_ten_minutes(client, respx_mock, monkeypatch, age_s, look_ups):
    """Jobs within MODEL_TTL_S share one look-up."""
    route = respx_mock.get(KLING_URL).mock(return_value=publishes(version(KLING)))
    await main.find_model(KLING)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + age_s)
    await asyncio.sleep(0.001)
    await main.find_model(KLING)
    assert route.call_count == look_ups


async def test_jobs_at_the_same_time_share_one_look_up(client, respx_mock):
    """Twenty jobs that start together make one request."""

    async def slowly(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.05)
        return publishes(version(KLING))

    route = respx_mock.get(KLING_URL).mock(side_effect=slowly)
    found = await asyncio.gather(*(main.find_model(KLING) for _ in range(20)))
    assert (len(set(map(id, found))), route.call_count) == (1, 1)


async def test_a_look_up_is_not_kept_beyond_the_lifespan():
    """An application that starts again looks the model up again."""
    for _ in range(2):
        async with main.lifespan(main.app):
            with respx.mock() as router:
                router.get(KLING_URL).mock(return_value=publishes(version(KLING)))
                model = await main.find_model(KLING)
        assert model.picture_field == "start_image"


NOT_FOUND = httpx.Response(404, json={"detail": "Not found.", "status": 404})
EMPTY_DOCUMENT = {"openapi_schema": {"components": {"schemas": []}}}
NO_VERSION = "Replicate answered without a version of kwaivgi/kling-v2.1."
NO_SCHEMA = f"Replicate answered without an input schema of {KLING} that a person could fill in."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(
            NOT_FOUND,
            (400, f"model {KLING}: Replicate answered 404: Not found."),
            id="no such model",
        ),
        pytest.param(httpx.Response(200, json={}), (500, NO_VERSION), id="nothing"),
        pytest.param(
            publishes(None, is_official=False), (500, NO_VERSION), id="community without version"
        ),
        pytest.param(publishes(None), (500, NO_SCHEMA), id="official without schema"),
        pytest.param(
            publishes({"openapi_schema": 5}), (500, NO_SCHEMA), id="a number for a schema"
        ),
        pytest.param(publishes(EMPTY_DOCUMENT), (500, NO_SCHEMA), id="a list for a schema"),
    ],
)
async def test_a_failed_look_up_costs_nothing(client, respx_mock, answer, expected):
    """The error is Replicate's and comes before any speech; only that a model is unknown is kept."""
    respx_mock.get(KLING_URL).mock(return_value=answer)
    for path in ("/jobs_prompt_only", "/jobs_prompt_tts"):
        response = await client.post(path, json={**JOB, "model": KLING})
        body = response.json()
        assert (body["category"], body["provider"]) == ("provider", "replicate")
        assert (response.status_code, body["detail"]) == expected
        assert [fault["loc"] for fault in body.get("errors", [])] == [["body", "model"]] * (
            expected[0] == 400
        )
    assert len(respx_mock.calls) == (1 if expected[0] == 400 else 2)


async def test_a_job_that_does_not_fit_is_rejected_before_anything_is_paid_for(client, respx_mock):
    """The look-up is the only request."""
    for path, name, detail in (
        (
            "/jobs_prompt_only",
            SPEAKING,
            f"model: {SPEAKING} needs audio, which only /jobs_prompt_tts has.",
        ),
        ("/jobs_prompt_tts", KLING, f"seconds: {KLING} takes 5 or 10."),
    ):
        respx_mock.get(f"{REPLICATE_URL}/v1/models/{name}").mock(
            return_value=publishes(version(name))
        )
        response = await client.post(path, json={**JOB, "model": name, "seconds": 7})
        assert (response.status_code, response.json()["category"]) == (400, "validation")
        assert response.json()["detail"] == detail
    assert len(respx_mock.calls) == 2


async def test_the_output_of_a_speaking_model_must_be_a_video(client, respx_mock):
    """Anything else is not stored; the error has what was paid for in `partial`."""
    respx_mock.post(url__startswith=ELEVEN_URL).respond(200, content=b"ID3speech")
    upload = respx_mock.post(url__startswith=f"{SUPABASE_URL}/storage/v1/object/pets/").respond(
        200, json={"Key": "x"}
    )
    respx_mock.get(url__startswith=f"{SUPABASE_URL}/storage/v1/object/public/").respond(
        200, content=b"ID3speech"
    )
    respx_mock.get(f"{REPLICATE_URL}/v1/models/{SPEAKING}").mock(
        return_value=publishes(version(SPEAKING))
    )
    will_succeed(respx_mock, f"models/{SPEAKING}/predictions")
    respx_mock.get(VIDEO_URL).respond(200, content=b"<html>gone</html>")
    body = (await client.post("/jobs_prompt_tts", json={**JOB, "model": SPEAKING})).json()
    assert (body["category"], body["detail"]) == (
        "resource",
        "The model made a web page, not a video.",
    )
    assert (body["partial"]["video_url"], body["partial"]["prediction_id"]) == (VIDEO_URL, "p1")
    assert upload.call_count == 1


# Limits of a schema


@pytest.mark.parametrize("texts", [("16:9", "9:16"), ("5x", "10x"), ("5 to 10",)], ids=str)
def test_a_text_that_only_begins_with_a_number_is_no_length(texts):
    """An aspect ratio or a speed is neither a number of seconds nor a frame rate."""
    assert fit(unseen({"image": FILE, "duration": choice(*texts)}), seconds=5) == {
        "image": PICTURE_URL
    }
    frames = {"num_frames": whole(), "fps": choice(*texts)}
    assert fit(unseen({"image": FILE, **frames}), seconds=5) == {
        "image": PICTURE_URL,
        "num_frames": 120,
    }


@pytest.mark.parametrize(("others", "is_read"), [(3, True), (4, False)])
def test_four_parts_of_a_field_are_read(others, is_read):
    """MAX_SCHEMA_PARTS is enough: an enum stands behind one or two."""
    model = unseen({"image": FILE, "duration": {"anyOf": [NULL] * others + [choice(5, 10)]}})
    assert fit(model, seconds=10).get("duration") == (10 if is_read else None)


def test_a_schema_of_300_fields_is_read():
    """MAX_SCHEMA_FIELDS itself is allowed."""
    properties = {"image": FILE, **{f"field{number}": TEXT for number in range(299)}}
    assert fit(unseen(properties)) == {"image": PICTURE_URL}


async def test_a_failed_look_up_does_not_forget_a_newer_one(client):
    """When it ends after another has taken its place, that one stays."""
    models = main.app_state().models

    async def look_up(error: Exception | None) -> main.VideoModel:
        if error:
            raise error
        return main.HAILUO

    old = asyncio.create_task(look_up(main.ProviderFailed("down", "replicate")))
    await asyncio.wait({old})
    new = main.ModelLookup(asyncio.create_task(look_up(None)), time.monotonic() + 60)
    models["a/b"] = new
    main.forget_failed_lookup("a/b", old)
    assert models.pop("a/b") is new
    assert await new.task is main.HAILUO
