"""The sandbox keeps its own promises: it refuses what the providers refuse, fails on demand, and its media are real."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.sandbox import Sandbox, Service, elevenlabs, media, providers, replicate, supabase
from tests.sandbox.media import FilmPlan, MediaError, Probe, probe
from tests.sandbox.schemas import Model, load_models
from tests.sandbox.service import ServiceError

ELEVEN = {"xi-api-key": elevenlabs.KEY}
JSON = {**ELEVEN, "content-type": "application/json"}
BEARER = {"authorization": f"Bearer {replicate.TOKEN}"}
SERVICE_KEY = supabase.KEYS["service"]
STORAGE = {"authorization": f"Bearer {SERVICE_KEY}", "apikey": SERVICE_KEY}
HAILUO = "/v1/models/minimax/hailuo-02/predictions"
PET = providers.PET_FILE.read_bytes()
UNKNOWN_ID = "a" * 64


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A plain HTTP client; it knows no provider."""
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def call(sandbox: Sandbox, client: httpx.Client) -> Callable[..., httpx.Response]:
    """Send one request to the sandbox."""

    def call(method: str, path: str, **how: Any) -> httpx.Response:
        return client.request(method, sandbox.url + path, **how)

    return call


Call = Callable[..., httpx.Response]


# ElevenLabs


def speak(call: Call, voice_id: str = "SandboxVoiceRex00001", **how: Any) -> httpx.Response:
    """Ask for speech; a good request unless told otherwise."""
    good = {"headers": ELEVEN, "json": {"text": "Hello!", "model_id": "eleven_multilingual_v2"}}
    return call("POST", f"/v1/text-to-speech/{voice_id}", **{**good, **how})


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        pytest.param({"headers": {}}, 401, "needs_authorization", id="no key"),
        pytest.param({"headers": {"xi-api-key": "sk_other"}}, 401, "invalid_api_key", id="unknown key"),
        pytest.param({"voice_id": "SandboxVoiceNobody00"}, 404, "voice_not_found", id="unknown voice"),
        pytest.param({"voice_id": "a%20b"}, 400, "invalid_uid", id="malformed voice"),
        pytest.param({"params": {"output_format": "mp3"}}, 400, "invalid_output_format", id="unknown format"),
        pytest.param({"json": {"text": "  "}}, 400, "empty_text", id="blank text"),
        pytest.param({"json": {"text": "a", "model_id": "eleven_v9"}}, 400, "model_not_found", id="unknown model"),
        pytest.param({"json": {"text": "a" * 10_001}}, 400, "max_character_limit_exceeded", id="text too long"),
        pytest.param({"json": None, "content": b"{"}, 400, "invalid_content_type", id="no content type"),
        pytest.param({"json": None, "content": b"{", "headers": JSON}, 400, "malformed_json", id="broken JSON"),
    ],
)
def test_speech_is_refused_with_the_status_and_code_of_elevenlabs(call, how, status, code):
    """Each bad request gets the real refusal: the HTTP status, and under `detail` a status that names the reason."""
    answer = speak(call, **how)
    assert (answer.status_code, answer.json()["detail"]["status"]) == (status, code)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        pytest.param({}, {"loc": ["body", "text"], "msg": "Field required", "type": "missing"}, id="no text"),
        pytest.param(
            {"text": 5},
            {"loc": ["body", "text"], "msg": "Input should be a valid string", "type": "string_type"},
            id="text is a number",
        ),
    ],
)
def test_a_speech_body_of_another_shape_is_a_422_with_a_list(call, body, problem):
    """The other error shape of ElevenLabs has a list under `detail`."""
    answer = speak(call, json=body)
    assert (answer.status_code, answer.json()) == (422, {"detail": [problem]})


@pytest.mark.parametrize(
    ("plan", "how", "status", "code"),
    [
        pytest.param("free", {"voice_id": elevenlabs.LIBRARY_VOICE}, 402, "payment_required", id="library voice"),
        pytest.param(
            "creator", {"params": {"output_format": "wav_44100"}}, 403, "output_format_not_allowed", id="format of Pro"
        ),
    ],
)
def test_what_the_plan_does_not_include_is_refused(sandbox, call, plan, how, status, code):
    """A smaller plan refuses what a larger one allows."""
    assert speak(call, **how).status_code == 200
    sandbox.plan = plan
    answer = speak(call, **how)
    assert (answer.status_code, answer.json()["detail"]["status"]) == (status, code)


def test_an_output_format_in_the_body_is_ignored(call):
    """As with the real one, only the query counts: the answer is MP3 all the same."""
    answer = speak(call, json={"text": "Hello!", "output_format": "wav_16000"})
    assert answer.status_code == 200
    assert answer.content.startswith((b"ID3", b"\xff"))


RAW_INPUT = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}
CODECS = {"mp3": "mp3", "wav": "pcm_s16le", "pcm": "pcm_s16le", "opus": "opus", "ulaw": "pcm_mulaw", "alaw": "pcm_alaw"}


@pytest.mark.parametrize("output_format", media.FORMATS)
def test_every_output_format_is_what_its_name_says(tmp_path, output_format):
    """Codec, sample rate and length are right; pcm, ulaw and alaw come without a header, so their bytes are counted."""
    codec, rate = output_format.split("_")[:2]
    sound = media.speech("Hello!", output_format, seconds=1.0)
    path = tmp_path / "sound"
    path.write_bytes(sound)
    if codec in RAW_INPUT:
        assert len(sound) == pytest.approx(int(rate) * (2 if codec == "pcm" else 1), rel=0.01)
        found = probe(path, "-f", RAW_INPUT[codec], "-ar", rate, "-ac", "1")
    else:
        found = probe(path)
        assert found.seconds == pytest.approx(1.0, abs=0.06)
    assert (found.audio, found.sample_rate) == (CODECS[codec], int(rate))


def test_speech_can_be_heard_and_follows_the_text(call):
    """Each letter is a tone of its own, punctuation is silence, a longer text takes longer."""
    loud, silent = (speak(call, json={"text": text}, params=PCM).content for text in ("hello", "a....!"))
    assert loudness(loud) > 1000
    assert loudness(silent[-8000:]) < 10
    assert len(speak(call, json={"text": "hello hello"}, params=PCM).content) > 2 * len(loud)
    assert speak(call, json={"text": "hillo"}, params=PCM).content != loud


PCM = {"output_format": "pcm_16000"}


def loudness(samples: bytes) -> float:
    """The mean size of S16LE samples."""
    values = memoryview(samples[: len(samples) // 2 * 2]).cast("h")
    return sum(map(abs, values)) / len(values)


def test_speech_takes_the_seconds_that_a_test_asks_for(sandbox, call):
    """`speech_seconds` gives the exact length."""
    sandbox.speech_seconds = 2.5
    assert len(speak(call, params=PCM).content) == pytest.approx(2 * 16_000 * 2.5, rel=0.01)


# Replicate


def good_input(sandbox: Sandbox, **more: Any) -> dict[str, Any]:
    """What the default model is sent."""
    picture = {"first_frame_image": sandbox.image_url}
    return {"prompt": "talk", **picture, "duration": 6, "resolution": "512p", **more}


def create(sandbox: Sandbox, call: Call, **more: Any) -> dict[str, Any]:
    """A prediction of the default model, as answered."""
    answer = call("POST", HAILUO, headers=BEARER, json={"input": good_input(sandbox, **more)})
    assert answer.status_code == 201
    return answer.json()


def read(call: Call, prediction: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """The prediction after so many more reads."""
    for _ in range(times):
        prediction = call("GET", f"/v1/predictions/{prediction['id']}", headers=BEARER).json()
    return prediction


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "detail"),
    [
        pytest.param("POST", HAILUO, {}, 401, "You did not pass an authentication token", id="no token"),
        pytest.param(
            "POST",
            HAILUO,
            {"authorization": "Bearer r8_x"},
            401,
            "You did not pass a valid authentication token",
            id="unknown token",
        ),
        pytest.param(
            "GET",
            "/v1/models/minimax/hailuo-99",
            BEARER,
            404,
            "The requested resource could not be found.",
            id="unknown model",
        ),
        pytest.param(
            "POST",
            "/v1/models/lightricks/ltx-video/predictions",
            BEARER,
            404,
            "The requested resource could not be found.",
            id="community model on the official route",
        ),
        pytest.param(
            "GET",
            "/v1/predictions/none",
            BEARER,
            404,
            "The requested resource could not be found.",
            id="unknown prediction",
        ),
        pytest.param(
            "POST",
            "/v1/predictions/none/cancel",
            BEARER,
            404,
            "The requested resource could not be found.",
            id="unknown prediction to cancel",
        ),
    ],
)
def test_replicate_refuses_tokens_and_names_it_does_not_know(call, method, path, headers, status, detail):
    """The real statuses and sentences."""
    answer = call(method, path, headers=headers, json={"input": {"prompt": "x"}} if method == "POST" else None)
    assert (answer.status_code, answer.json()["status"], answer.json()["detail"]) == (status, status, detail)


@pytest.mark.parametrize(
    ("change", "kind", "field", "description"),
    [
        pytest.param({"prompt": ...}, "required", "input", "prompt is required", id="required field missing"),
        pytest.param(
            {"duration": 7},
            "enum",
            "input.duration",
            "input.duration must be one of the following: 6, 10",
            id="value not in the enum",
        ),
        pytest.param(
            {"duration": "6"},
            "invalid_type",
            "input.duration",
            "Invalid type. Expected: integer, given: string",
            id="number as a string",
        ),
        pytest.param(
            {"resolution": "768P"},
            "enum",
            "input.resolution",
            'input.resolution must be one of the following: "512p", "768p", "1080p"',
            id="enum is case-sensitive",
        ),
        pytest.param(
            {"first_frame_image": "pet.jpg"},
            "format",
            "input.first_frame_image",
            "Does not match format 'uri'",
            id="file that is no URL",
        ),
        pytest.param(
            {"seed": 1},
            "additional_property_not_allowed",
            "input",
            "Additional property seed is not allowed",
            id="field that the model does not have",
        ),
    ],
)
def test_input_is_checked_against_the_models_own_schema(sandbox, call, change, kind, field, description):
    """A wrong input is a 422 that lists the field, the kind of error and what would be right."""
    values = {key: value for key, value in good_input(sandbox, **change).items() if value is not ...}
    answer = call("POST", HAILUO, headers=BEARER, json={"input": values})
    assert (answer.status_code, answer.json()) == (
        422,
        {
            "title": "Input validation failed",
            "detail": f"- {field}: {description}\n",
            "status": 422,
            "invalid_fields": [{"type": kind, "field": field, "description": description}],
        },
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        pytest.param(1, "number_gte", id="below"),
        pytest.param(13, "number_lte", id="above"),
        pytest.param(12, None, id="at"),
    ],
)
def test_numbers_are_held_to_their_range(call, value, kind):
    """Minimum and maximum of the schema are allowed, what lies beyond is not."""
    body = {"input": {"prompt": "x", "duration": value}}
    answer = call("POST", "/v1/models/bytedance/seedance-1-lite/predictions", headers=BEARER, json=body).json()
    assert [problem["type"] for problem in answer.get("invalid_fields", [])] == ([kind] if kind else [])


def test_a_field_beside_the_known_ones_of_a_request_is_refused(sandbox, call):
    """The body of a prediction allows nothing that Replicate's document does not list."""
    answer = call("POST", HAILUO, headers=BEARER, json={"input": good_input(sandbox), "model": "x"})
    assert answer.status_code == 422
    assert answer.json()["invalid_fields"][0]["type"] == "additional_property_not_allowed"


LTX = load_models()["lightricks/ltx-video"]


@pytest.mark.parametrize(
    ("version", "status"),
    [
        pytest.param(LTX.version, 201, id="bare id"),
        pytest.param(f"{LTX.name}:{LTX.version}", 201, id="name and id"),
        pytest.param("minimax/hailuo-02", 201, id="name of an official model"),
        pytest.param(LTX.name, 422, id="name of a community model"),
        pytest.param(UNKNOWN_ID, 422, id="unknown id"),
        pytest.param(f"other/name:{LTX.version}", 422, id="id of another model"),
        pytest.param(5, 422, id="not a string"),
    ],
)
def test_versions_are_looked_up(call, version, status):
    """`POST /v1/predictions` takes the three forms of a version, and refuses unknown ones in Replicate's words."""
    answer = call("POST", "/v1/predictions", headers=BEARER, json={"version": version, "input": {"prompt": "x"}})
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["title"] == "Invalid version or not permitted"


@pytest.mark.parametrize("model", load_models().values(), ids=lambda model: model.name)
def test_every_model_is_served_with_its_schema(call, model: Model):
    """Enums stand behind `allOf` and `$ref`, required fields exist, and the shape of the output is told."""
    served = call("GET", f"/v1/models/{model.name}", headers=BEARER).json()
    schemas = served["latest_version"]["openapi_schema"]["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    for name, prop in model.properties.items():
        if "enum" in prop:
            assert properties[name]["allOf"] == [{"$ref": f"#/components/schemas/{name}"}]
            assert schemas[name]["enum"] == prop["enum"]
    assert set(schemas["Input"].get("required", [])) <= set(properties)
    assert schemas["Output"]["type"] == ("array" if model.output == "list" else "string")
    assert (served["is_official"], served["latest_version"]["id"]) == (model.official, model.version)


def test_a_prediction_advances_by_reads(sandbox, call):
    """The first read finds it starting, the next processing with a percentage in the log, the third ended with its film."""
    sandbox.film(b"film")
    first = create(sandbox, call)
    seen = [read(call, first) for _ in range(3)]
    assert [first["status"], *(one["status"] for one in seen)] == ["starting", "starting", "processing", "succeeded"]
    assert re.search(r" 66%\|", seen[1]["logs"])
    assert [one["output"] for one in seen[:2]] == [None, None]
    assert call("GET", httpx.URL(seen[2]["output"]).path).content == b"film"


def test_a_prediction_takes_its_time_when_told_to(sandbox, call):
    """`video_seconds` holds the end back, however often it is read."""
    sandbox.film(b"film")
    sandbox.video_seconds = 60
    prediction = create(sandbox, call)
    assert read(call, prediction, times=10)["status"] == "processing"
    sandbox.predictions[prediction["id"]].created -= 60
    assert read(call, prediction)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("outcome", "reads", "status", "error"),
    [
        pytest.param(("failed", "CUDA out of memory"), 3, "failed", "CUDA out of memory", id="failed"),
        pytest.param(("failed",), 3, "failed", "Prediction failed.", id="failed without a reason given"),
        pytest.param(("canceled",), 3, "canceled", None, id="canceled"),
        pytest.param(("aborted",), 3, "aborted", None, id="aborted"),
        pytest.param(("never",), 9, "processing", None, id="never ends"),
        pytest.param(("queued",), 9, "starting", None, id="never starts"),
    ],
)
def test_a_prediction_ends_as_told(sandbox, call, outcome, reads, status, error):
    """The outcome holds for one prediction; the next one succeeds again."""
    sandbox.film(b"film")
    sandbox.outcome(*outcome)
    told, next_one = create(sandbox, call), create(sandbox, call)
    ended = read(call, told, times=reads)
    assert (ended["status"], ended["error"], ended["output"]) == (status, error, None)
    assert read(call, next_one, times=3)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        pytest.param("5", 5, id="least"),
        pytest.param("30s", 30, id="seconds"),
        pytest.param("1h30m45s", 5445, id="all units"),
        pytest.param("24h", 86_400, id="most"),
        pytest.param("4", None, id="too short"),
        pytest.param("86401s", None, id="too long"),
        pytest.param("soon", None, id="not a duration"),
        pytest.param("1.5", None, id="a fraction"),
        pytest.param("", None, id="empty"),
    ],
)
def test_cancel_after_is_read_as_documented(sandbox, call, header, seconds):
    """Whole seconds or a duration from 5 s to 24 h; anything else is refused, and no prediction is made."""
    sandbox.film(b"film")
    answer = call("POST", HAILUO, headers={**BEARER, "cancel-after": header}, json={"input": good_input(sandbox)})
    assert answer.status_code == (201 if seconds else 400)
    assert [one.cancel_after for one in sandbox.predictions.values()] == ([seconds] if seconds else [])


@pytest.mark.parametrize(
    ("reads", "status"), [pytest.param(1, "aborted", id="in the queue"), pytest.param(2, "canceled", id="running")]
)
def test_a_prediction_past_its_cancel_after_is_ended(sandbox, call, reads, status):
    """Before the start it is aborted, later canceled."""
    headers = {**BEARER, "cancel-after": "5"}
    sandbox.outcome("never")
    prediction = call("POST", HAILUO, headers=headers, json={"input": good_input(sandbox)}).json()
    read(call, prediction, times=reads)
    sandbox.predictions[prediction["id"]].created -= 5
    assert read(call, prediction)["status"] == status


def test_a_prediction_can_be_canceled_until_it_has_ended(sandbox, call):
    """Cancelling answers with the prediction; one that has ended stays as it is."""
    sandbox.film(b"film")
    running, ended = create(sandbox, call), create(sandbox, call)
    read(call, ended, times=3)
    statuses = [
        call("POST", f"/v1/predictions/{one['id']}/cancel", headers=BEARER).json()["status"] for one in (running, ended)
    ]
    assert statuses == ["canceled", "succeeded"]


@pytest.mark.parametrize(
    ("shape", "wrap"),
    [
        pytest.param("string", lambda url: url, id="string"),
        pytest.param("list", lambda url: [url], id="list"),
        pytest.param("object", lambda url: {"video": url}, id="object"),
    ],
)
def test_an_output_has_the_shape_asked_for(sandbox, call, shape, wrap):
    """A URL, a list of it, or an object with it."""
    sandbox.film(b"film")
    sandbox.output_shape = shape
    ended = read(call, create(sandbox, call), times=3)
    assert ended["output"] == wrap(f"{sandbox.url}/delivery/{ended['id']}/output.mp4")


def test_rate_limits_refuse_with_the_seconds_to_wait(sandbox, call):
    """Above the limit there is a 429 in Replicate's words; creates and other calls are counted apart."""
    sandbox.film(b"film")
    sandbox.limits(creates_per_minute=1, reads_per_minute=2)
    prediction = create(sandbox, call)
    refused = call("POST", HAILUO, headers=BEARER, json={"input": good_input(sandbox)})
    assert refused.status_code == 429
    assert re.fullmatch(r"Request was throttled. Your rate limit resets in ~\d+s.", refused.json()["detail"])
    statuses = [call("GET", f"/v1/predictions/{prediction['id']}", headers=BEARER).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize(
    ("picture", "error"),
    [
        pytest.param("/none.jpg", "HTTP Error 404", id="not there"),
        pytest.param("/v1/predictions/none", "HTTP Error 401", id="forbidden"),
        pytest.param("/", "cannot identify image file", id="no picture"),
        pytest.param("data:image/png;base64,iVBORw0KGgo=", "cannot read image file", id="broken picture"),
    ],
)
def test_a_picture_that_cannot_be_used_fails_the_prediction(sandbox, call, monkeypatch, tmp_path, picture, error):
    """The model's machine really loads the picture, and says what is wrong with it."""
    monkeypatch.setattr(providers, "PAGE_FILE", tmp_path / "page.html")
    (tmp_path / "page.html").write_text("a page")
    url = picture if picture.startswith("data:") else sandbox.url + picture
    ended = read(call, create(sandbox, call, first_frame_image=url), times=3)
    assert ended["status"] == "failed"
    assert error in ended["error"]


# Films


def look_at(film: bytes, tmp_path: Path) -> Probe:
    """What ffmpeg says of these bytes."""
    path = tmp_path / "film.mp4"
    path.write_bytes(film)
    return probe(path)


def frame(film: bytes, second: float, tmp_path: Path) -> bytes:
    """A frame of the film, 64x48 in grey."""
    (tmp_path / "film.mp4").write_bytes(film)
    scaled = ("-vf", "scale=64:48", "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray")
    return media.ffmpeg("-ss", f"{second:g}", "-i", str(tmp_path / "film.mp4"), *scaled)


def difference(one: bytes, other: bytes) -> float:
    """The mean difference of two grey frames, 0 to 255."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def test_a_film_shows_the_picture_it_was_given_and_moves_it(tmp_path):
    """The first frame is the middle of the picture; later ones differ from it and from each other."""
    film = media.film(PET, FilmPlan(3, 480))
    (tmp_path / "pet.jpg").write_bytes(PET)
    middle = ("-vf", "crop=iw/1.25:ih/1.25,scale=64:48", "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray")
    picture = media.ffmpeg("-i", str(tmp_path / "pet.jpg"), *middle)
    frames = [frame(film, second, tmp_path) for second in (0, 0.8, 1.7)]
    assert difference(picture, frames[0]) < 6
    assert all(difference(one, other) > 6 for one, other in zip(frames, frames[1:], strict=False))


@pytest.mark.parametrize(
    ("model", "values", "expected"),
    [
        pytest.param("minimax/hailuo-02", {"duration": 6, "resolution": "512p"}, (682, 512, 6.0), id="512p"),
        pytest.param("minimax/hailuo-02", {"duration": 10, "resolution": "768p"}, (1024, 768, 10.0), id="768p"),
        pytest.param("minimax/hailuo-02", {"duration": 6}, (1440, 1080, 6.0), id="the schema's own size"),
        pytest.param("minimax/hailuo-02-fast", {"resolution": "512P"}, (682, 512, 6.0), id="capital P"),
        pytest.param("pixverse/pixverse-v4.5", {"quality": "360p"}, (480, 360, 5.0), id="quality"),
        pytest.param("lightricks/ltx-video", {"length": 129}, (852, 640, 129 / 24), id="frames"),
        pytest.param("wan-video/wan-2.2-i2v-fast", {}, (640, 480, 81 / 16), id="frames of another rate"),
    ],
)
def test_a_film_has_the_size_and_seconds_asked_for(model, values, expected):
    """Short side and seconds follow the input, or the schema's defaults, whatever the model calls them."""
    plan = replicate.film_plan(load_models()[model], values)
    width, height, seconds = expected
    assert (plan.short_side, plan.seconds) == (height, pytest.approx(seconds))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param("640x480", (480, 360), id="landscape"),
        pytest.param("480x640", (360, 480), id="portrait"),
        pytest.param("101x99", (366, 360), id="odd"),
        pytest.param("2000x20", (864, 360), id="a strip is cut"),
    ],
)
def test_a_film_keeps_the_pictures_shape(tmp_path, size, expected):
    """The short side is as asked, the long one follows the picture; h264 in yuv420p, at the rate asked for."""
    drawn = media.ffmpeg("-f", "lavfi", "-i", f"testsrc=size={size}", "-frames:v", "1", "-c:v", "png", "-f", "image2")
    found = look_at(media.film(drawn, FilmPlan(0.5, 360)), tmp_path)
    assert (found.video, found.pixels, found.fps, found.seconds) == ("h264", "yuv420p", 24, 0.5)
    assert (found.width, found.height) == (pytest.approx(expected[0], abs=2), expected[1])


def test_the_default_models_film_comes_through_the_provider(sandbox, call, tmp_path):
    """A prediction's film has the seconds and the size that its input named, and no sound."""
    url = read(call, create(sandbox, call), times=3)["output"]
    found = look_at(call("GET", httpx.URL(url).path).content, tmp_path)
    assert (found.video, found.seconds, found.height, found.audio) == ("h264", 6.0, 512, "")


def test_a_model_that_takes_speech_gives_a_film_that_speaks(sandbox, call, tmp_path):
    """The film carries the sound at the input's `audio`, and without a duration it lasts as long."""
    sound = media.speech("Hello!", "mp3_44100_64", seconds=1.5)
    call("POST", "/storage/v1/object/pets/a.mp3", headers={**STORAGE, "content-type": "audio/mpeg"}, content=sound)
    values = {"prompt": "x", "image": sandbox.image_url, "audio": f"{sandbox.url}/storage/v1/object/public/pets/a.mp3"}
    made = call("POST", "/v1/models/wan-video/wan-2.2-s2v/predictions", headers=BEARER, json={"input": values}).json()
    film = call("GET", httpx.URL(read(call, made, times=3)["output"]).path).content
    found = look_at(film, tmp_path)
    assert (found.audio, found.seconds) == ("aac", pytest.approx(1.5, abs=0.1))
    assert loudness(media.ffmpeg("-i", str(tmp_path / "film.mp4"), "-f", "s16le", "-ac", "1")) > 1000


def test_a_films_file_is_served_in_parts(sandbox, call):
    """As a browser's video element asks for it."""
    sandbox.film(b"0123456789")
    path = httpx.URL(read(call, create(sandbox, call), times=3)["output"]).path
    part = call("GET", path, headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")


def test_making_media_does_not_hold_up_other_requests(sandbox, call):
    """While a film is being made, reads are answered at once."""
    create(sandbox, call, resolution="1080p", first_frame_image=f"{sandbox.image_url}?fresh")
    started = time.monotonic()
    assert call("GET", "/pet.jpg").status_code == 200
    assert time.monotonic() - started < 0.3


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:9/x", "http://a b/", "pet.jpg"]
)
def test_a_file_is_fetched_over_http_only(url):
    """Anything else, and whatever does not answer, is an error that names the URL."""
    with pytest.raises(MediaError, match=re.escape(url[:9])):
        media.fetch(url)


# Supabase


def upload(call: Call, path: str = "pets/a.bin", content: Any = b"bytes", **headers: str) -> httpx.Response:
    """Upload with the service key; keyword arguments are further headers, `_` for `-`."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return call("POST", f"/storage/v1/object/{path}", headers={**STORAGE, **more}, content=content)


def truth(answer: httpx.Response) -> tuple[int, str, str]:
    """HTTP status, and what the body says: status and message."""
    return answer.status_code, answer.json()["statusCode"], answer.json()["message"]


NO_SECOND_KEY = (400, "403", "Invalid Compact JWS")
RLS = (400, "403", "new row violates row-level security policy")
NO_HEADER = (400, "400", "headers must have required property 'authorization'")


@pytest.mark.parametrize(
    ("bearer", "apikey", "expected"),
    [
        pytest.param("service", "service", 200, id="both"),
        pytest.param("service", None, 200, id="bearer alone"),
        pytest.param(None, "service", 200, id="apikey alone"),
        pytest.param("service", "anon", 200, id="the bearer wins"),
        pytest.param("anon", "anon", RLS, id="anonymous key"),
        pytest.param("expired", "expired", (400, "403", '"exp" claim timestamp check failed'), id="expired key"),
        pytest.param("foreign", "foreign", (400, "403", "signature verification failed"), id="another project's key"),
        pytest.param("garbage", "garbage", NO_SECOND_KEY, id="garbage"),
        pytest.param("", None, NO_SECOND_KEY, id="empty bearer"),
        pytest.param(None, None, NO_HEADER, id="no key"),
        pytest.param("secret", "secret", 200, id="secret key in both"),
        pytest.param(None, "secret", 200, id="secret key as apikey"),
        pytest.param("secret", None, NO_HEADER, id="secret key as bearer alone"),
        pytest.param("sb_secret_unknown", "sb_secret_unknown", NO_SECOND_KEY, id="unknown secret key"),
        pytest.param(None, "publishable", RLS, id="publishable key"),
    ],
)
def test_storage_treats_keys_as_the_recorded_gateway_does(call, bearer, apikey, expected):
    """Every refusal of a key is an HTTP 400; the body tells which."""
    headers = {} if bearer is None else {"authorization": f"Bearer {supabase.KEYS.get(bearer, bearer)}".strip(" ")}
    headers |= {} if apikey is None else {"apikey": supabase.KEYS.get(apikey, apikey)}
    answer = call("POST", "/storage/v1/object/pets/key.bin", headers=headers, content=b"x")
    assert (answer.status_code if expected == 200 else truth(answer)) == expected


TOO_LARGE = (400, "413", "The object exceeded the maximum allowed size")


@pytest.mark.parametrize(
    ("path", "content", "content_type", "expected"),
    [
        pytest.param("nope/a", b"x", "audio/mpeg", (400, "404", "Bucket not found"), id="missing bucket"),
        pytest.param("small1mb/a", bytes(1_000_001), "audio/mpeg", TOO_LARGE, id="a byte over the bucket's limit"),
        pytest.param("small1mb/a", bytes(1_000_000), "audio/mpeg", 200, id="at the bucket's limit"),
        pytest.param(
            "small1mb/a", iter([bytes(1_000_001)]), "audio/mpeg", TOO_LARGE, id="over the limit without a length"
        ),
        pytest.param("pets/a", bytes(52_428_801), "audio/mpeg", TOO_LARGE, id="over the global limit"),
        pytest.param("mp4only/a", b"x", "audio/mpeg", (400, "415", "mime type audio/mpeg is not supported"), id="mime"),
        pytest.param(
            "mp4only/a", b"x", "VIDEO/MP4", (400, "415", "mime type VIDEO/MP4 is not supported"), id="mime in capitals"
        ),
        pytest.param("mp4only/a", b"x", "video/mp4", 200, id="mime in the list"),
        pytest.param("pets/a", b"x", "mp3", (400, "415", "Invalid Content-Type header"), id="no mime"),
        pytest.param("pets/a", b"", "audio/mpeg", 200, id="empty body"),
        pytest.param("pets/%C3%A9.mp3", b"x", "audio/mpeg", (400, "400", "Invalid key: é.mp3"), id="non-ASCII name"),
        pytest.param("pets/a~b", b"x", "audio/mpeg", (400, "400", "Invalid key: a~b"), id="forbidden sign"),
        pytest.param(
            "pets/" + "a" * 256, b"x", "audio/mpeg", (500, "500", "Internal Server Error"), id="name too long"
        ),
        pytest.param("pets/", b"x", "audio/mpeg", (400, "400", "Invalid key: "), id="no name"),
    ],
)
def test_storage_checks_bucket_type_size_and_name(sandbox, call, path, content, content_type, expected):
    """What it accepts is stored, what it refuses is not, and nearly every refusal is an HTTP 400."""
    answer = upload(call, path, content, content_type=content_type)
    assert (answer.status_code if expected == 200 else truth(answer)) == expected
    assert len(sandbox.objects) == (expected == 200)


@pytest.mark.parametrize(
    ("upsert", "is_replaced"),
    [
        pytest.param("true", True, id="true"),
        pytest.param("True", False, id="a capital"),
        pytest.param("1", False, id="one"),
        pytest.param("false", False, id="false"),
        pytest.param(None, False, id="absent"),
    ],
)
def test_an_object_is_replaced_only_with_the_exact_header(call, sandbox, upsert, is_replaced):
    """`x-upsert: true` replaces and keeps the id; anything else is a Duplicate, and the query does nothing."""
    first = upload(call).json()
    second = upload(call, "pets/a.bin?upsert=true", b"new", **({"x_upsert": upsert} if upsert else {}))
    if is_replaced:
        assert second.json() == first
    else:
        assert truth(second) == (400, "409", "The resource already exists")
    assert sandbox.objects["pets/a.bin"].read() == (b"new" if is_replaced else b"bytes")


def test_an_object_is_served_as_it_was_uploaded(call):
    """Type and cache-control come back letter by letter, with an etag, ranges and CORS for everyone."""
    content_type = "audio/mpeg; charset=binary"
    upload(call, content_type=content_type, cache_control="3600")
    answer = call("GET", "/storage/v1/object/public/pets/a.bin")
    assert answer.content == b"bytes"
    wanted = {"content-type": content_type, "cache-control": "3600", "accept-ranges": "bytes", "content-length": "5"}
    assert wanted.items() <= dict(answer.headers).items()
    assert (answer.headers["access-control-allow-origin"], "last-modified" in answer.headers) == ("*", True)
    again = call("GET", "/storage/v1/object/public/pets/a.bin", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        pytest.param("bytes=0-2", 206, b"012", id="first"),
        pytest.param("bytes=4-5", 206, b"45", id="middle"),
        pytest.param("bytes=7-", 206, b"789", id="open end"),
        pytest.param("bytes=-2", 206, b"89", id="suffix"),
        pytest.param("bytes=8-99", 206, b"89", id="end beyond the size"),
        pytest.param("bytes=10-", 416, None, id="start beyond the size"),
        pytest.param("bytes=0-1,3-4", 416, None, id="several"),
        pytest.param("items=0-1", 416, None, id="other unit"),
    ],
)
def test_ranges_are_served(call, asked, status, content):
    """One range gives a 206 with its place, what cannot be met a 416."""
    upload(call, content=b"0123456789")
    answer = call("GET", "/storage/v1/object/public/pets/a.bin", headers={"range": asked})
    assert answer.status_code == status
    if content:
        start = b"0123456789".index(content)
        assert answer.content == content
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(content) - 1}/10"


def test_head_tells_the_size_without_the_bytes(call):
    """HEAD ignores a range, and on a missing object has no body to tell why."""
    upload(call, content=b"0123456789")
    found = call("HEAD", "/storage/v1/object/public/pets/a.bin", headers={"range": "bytes=0-1"})
    missing = call("HEAD", "/storage/v1/object/public/pets/none")
    assert (found.status_code, found.headers["content-length"], found.content) == (200, "10", b"")
    assert (missing.status_code, missing.content) == (400, b"")


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        pytest.param("public/pets/none", {}, (400, "404", "Object not found"), id="missing object"),
        pytest.param("public/nope/a.bin", {}, (400, "404", "Bucket not found"), id="missing bucket"),
        pytest.param(
            "public/private/a.bin", STORAGE, (400, "404", "Bucket not found"), id="private bucket, even with a key"
        ),
        pytest.param("private/a.bin", {}, (400, "404", "Bucket not found"), id="private object without a key"),
        pytest.param("private/a.bin", STORAGE, 200, id="private object with the key"),
        pytest.param("authenticated/private/a.bin", STORAGE, 200, id="authenticated route"),
        pytest.param("pets/a.bin", {}, 200, id="public object on the other route"),
    ],
)
def test_reads_depend_on_bucket_and_key(call, path, headers, expected):
    """A private bucket looks like one that does not exist."""
    upload(call, "pets/a.bin")
    upload(call, "private/a.bin")
    answer = call("GET", f"/storage/v1/object/{path}", headers=headers)
    assert (answer.status_code if expected == 200 else truth(answer)) == expected


def test_download_in_the_query_names_the_file(call):
    """`?download=1` makes a file named 1."""
    upload(call)
    answer = call("GET", "/storage/v1/object/public/pets/a.bin?download=1")
    assert answer.headers["content-disposition"] == "attachment; filename=1; filename*=UTF-8''1"


def test_a_bucket_tells_its_limits_to_the_service_key_only(call):
    """What a check of the set-up asks for."""
    bucket = call("GET", "/storage/v1/bucket/mp4only", headers=STORAGE).json()
    assert (bucket["public"], bucket["file_size_limit"], bucket["allowed_mime_types"]) == (True, None, ["video/mp4"])
    anonymous = call("GET", "/storage/v1/bucket/mp4only", headers={"apikey": supabase.KEYS["anon"]})
    assert truth(anonymous) == (400, "404", "Bucket not found")


def test_a_browser_may_ask_first(call):
    """The gateway answers a preflight."""
    headers = {"origin": "http://a", "access-control-request-method": "GET", "access-control-request-headers": "range"}
    answer = call("OPTIONS", "/storage/v1/object/public/pets/a.bin", headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, "range")


def test_a_big_object_is_kept_in_a_file(sandbox, call):
    """It does not fill the memory, comes back whole, and is gone after a reset."""
    content = os.urandom(3_000_000)
    upload(call, content=content)
    path = sandbox.objects["pets/a.bin"].data
    assert isinstance(path, Path)
    assert call("GET", "/storage/v1/object/public/pets/a.bin").content == content
    sandbox.reset()
    assert not path.exists()


# Faults


def test_a_status_comes_in_the_providers_own_shape(sandbox, call):
    """As often as asked, then the call works again; headers and body may be given."""
    sandbox.fault("model", "status", times=2, status=503)
    sandbox.fault("speech", "status", status=429, headers={"retry-after": "7"}, body={"detail": "slow"})
    models = [call("GET", "/v1/models/minimax/hailuo-02", headers=BEARER) for _ in range(3)]
    assert [answer.status_code for answer in models] == [503, 503, 200]
    assert models[0].json() == {"detail": "Internal server error", "status": 503}
    speech = speak(call)
    assert (speech.status_code, speech.headers["retry-after"], speech.json()) == (429, "7", {"detail": "slow"})
    sandbox.fault("upload", "status", status=429)
    assert upload(call).json()["code"] == "SlowDown"


def test_a_fault_can_last(sandbox, call):
    """`times=None` spoils every request until the reset."""
    sandbox.fault("picture", "html", times=None)
    answers = [call("GET", "/pet.jpg") for _ in range(5)]
    assert {(answer.status_code, answer.headers["content-type"]) for answer in answers} == {
        (502, "text/html; charset=utf-8")
    }
    sandbox.reset()
    assert call("GET", "/pet.jpg").status_code == 200


@pytest.mark.parametrize(
    ("kind", "predictions"), [pytest.param("cut", 0, id="cut"), pytest.param("lost", 1, id="lost")]
)
def test_a_connection_breaks_before_or_after_the_call_is_carried_out(sandbox, call, kind, predictions):
    """The client gets no answer either way: `cut` did nothing, `lost` made the prediction."""
    sandbox.film(b"film")
    sandbox.fault("create", kind)
    with pytest.raises(httpx.TransportError):
        create(sandbox, call)
    assert len(sandbox.predictions) == predictions


def test_an_answer_can_break_off_halfway(sandbox, call):
    """The head promises more bytes than arrive."""
    sandbox.fault("picture", "halfway")
    with pytest.raises(httpx.RemoteProtocolError, match=r"received \d+ bytes, expected \d+"):
        call("GET", "/pet.jpg")


def test_an_upload_cut_halfway_leaves_nothing(sandbox, call):
    """The path stays free, and no file is left."""
    sandbox.fault("upload", "halfway")
    with pytest.raises(httpx.TransportError):
        upload(call, content=os.urandom(8_000_000))
    assert sandbox.objects == {}
    assert list(Path(sandbox.folder.name).iterdir()) == []
    assert 0 < sandbox.calls("upload")[0].length < 8_000_000


def test_an_answer_can_be_slow(sandbox, call):
    """The work is done at once, the answer comes later."""
    sandbox.fault("create", "slow", seconds=0.2)
    started = time.monotonic()
    create(sandbox, call)
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize(
    ("kind", "content"),
    [pytest.param("nonsense", b'["unexpected"]', id="nonsense"), pytest.param("empty", b"", id="empty")],
)
def test_success_can_be_of_no_use(sandbox, call, kind, content):
    """The status of success, with a body that says nothing, and nothing done."""
    sandbox.fault("create", kind)
    answer = call("POST", HAILUO, headers=BEARER, json={"input": good_input(sandbox)})
    assert (answer.status_code, answer.content, sandbox.predictions) == (201, content, {})


def test_a_body_can_drip(sandbox, client):
    """A byte comes at a time."""
    sandbox.fault("picture", "drip", seconds=0.01)
    with client.stream("GET", sandbox.image_url) as answer:
        pieces = answer.iter_raw()
        assert next(pieces)[:1] == PET[:1]
        assert len(next(pieces)) < 10


def test_a_body_can_be_endless(sandbox, client):
    """More comes for as long as the client reads; when it leaves, the sandbox goes on."""
    sandbox.fault("output", "endless")
    with client.stream("GET", f"{sandbox.url}/delivery/x/output.mp4") as answer:
        received = 0
        for piece in answer.iter_raw():
            received += len(piece)
            if received > 5_000_000:
                break
    assert "content-length" not in answer.headers
    assert client.get(sandbox.image_url).status_code == 200


@pytest.mark.parametrize(("call_name", "kind"), [("nothing", "cut"), ("create", "nothing")])
def test_a_fault_that_cannot_happen_is_refused(sandbox, call_name, kind):
    """A misspelt fault would prove nothing."""
    with pytest.raises(ValueError, match="no such fault"):
        sandbox.fault(call_name, kind)


# The sandbox itself


def test_requests_are_recorded(sandbox, call):
    """Call, method, path, query, headers and body are kept in order, until the reset."""
    speak(call, params={"output_format": "mp3_44100_64"})
    call("GET", "/pet.jpg")
    speech, picture = sandbox.requests
    assert (speech.call, speech.method, speech.query) == ("speech", "POST", {"output_format": "mp3_44100_64"})
    assert (speech.path, speech.headers["xi-api-key"]) == (f"/v1/text-to-speech/{sandbox.voice_id}", elevenlabs.KEY)
    assert speech.json() == {"text": "Hello!", "model_id": "eleven_multilingual_v2"}
    assert sandbox.calls("picture") == [picture]
    sandbox.reset()
    assert sandbox.requests == []


def test_recording_can_be_left_out(client):
    """For load tests: requests are counted only."""
    with Sandbox(record=False) as sandbox:
        client.get(sandbox.image_url)
        assert (sandbox.requests, sandbox.wire.counts["picture"]) == ([], 1)


def test_a_reset_brings_the_first_behaviour_back(sandbox):
    """Whatever a test has set is forgotten."""
    sandbox.video_seconds, sandbox.reads_to_finish, sandbox.plan = 9, 9, "free"
    sandbox.reset()
    assert (sandbox.video_seconds, sandbox.reads_to_finish, sandbox.plan) == (0.0, 3, "pro")


def test_a_port_in_use_is_an_error_that_leaves_nothing(sandbox):
    """No folder stays behind."""
    second = Sandbox(sandbox.port)
    with pytest.raises(OSError, match="Address already in use"):
        second.start()
    assert not Path(second.folder.name).exists()


def test_it_stops_at_once_whatever_is_under_way(client):
    """An answer that nobody would wait for does not hold it up."""
    with Sandbox() as sandbox:
        sandbox.fault("picture", "slow", seconds=60)
        with pytest.raises(httpx.ReadTimeout):
            client.get(sandbox.image_url, timeout=0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 1


def test_the_page_knows_where_it_is(sandbox, call, monkeypatch, tmp_path):
    """The service's URL, the picture and a voice are put in; without the file there is no page."""
    monkeypatch.setattr(providers, "PAGE_FILE", tmp_path / "page.html")
    assert call("GET", "/").status_code == 404
    (tmp_path / "page.html").write_text("{{SERVICE_URL}} {{IMAGE_URL}} {{VOICE_ID}}")
    monkeypatch.setattr(sandbox, "service_url", "http://service")
    assert call("GET", "/").text == f"http://service {sandbox.image_url} {sandbox.voice_id}"


def test_an_unknown_path_says_so(call):
    """No provider has it: a 404 that names it."""
    answer = call("GET", "/v1/nothing")
    assert (answer.status_code, answer.json()["detail"]) == (404, "the sandbox knows no GET /v1/nothing")


# The service process and the command


def test_a_service_that_does_not_start_tells_why():
    """A malformed setting ends the process; the error holds its log."""
    with pytest.raises(ServiceError, match="JOB_TIMEOUT_SECONDS"):
        Service({"JOB_TIMEOUT_SECONDS": "soon"}).start()


def test_a_service_does_not_take_another_one_for_itself(sandbox):
    """A port on which somebody answers already is refused, naming it."""
    with pytest.raises(ServiceError, match=f"port {sandbox.port} is in use"):
        Service({}, sandbox.port).start()


def test_a_service_ends_when_told_to(start_service):
    """SIGTERM ends it, its log stays readable."""
    service = start_service()
    assert service.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert "Uvicorn running on" in service.log
    with pytest.raises(httpx.TransportError), httpx.Client(trust_env=False) as client:
        client.get(service.url)


@pytest.mark.beside("-m", "tests.sandbox", "--once", "--text", "Hello!")
def test_the_command_makes_a_film_without_a_key(beside):
    """It names what it does not imitate, shows each stage and the three URLs, saves the film and ends with 0."""
    code, told, complaints = beside.outcome()
    assert code == 0, complaints
    assert told.index("Not imitated") < told.index("providers")
    assert re.findall(r"^  (\w[\w ]*\w) +\d+\.\d\d s$", told, re.MULTILINE) == [
        *("speech", "audio upload", "video", "download", "mux", "final upload", "in all")
    ]
    assert all(f'"{name}": "http://127.0.0.1:' in told for name in ("audio_url", "video_url", "final_url"))
    film = probe(beside.folder / "talking-pet.mp4")
    assert (film.video, film.audio, film.height) == ("h264", "aac", 768)


@pytest.mark.beside("-m", "tests.sandbox", "--once", "--model", "nobody/nothing")
def test_the_command_fails_when_the_job_does(beside):
    """A job that is refused ends the command with 1 and the service's own words."""
    code, told, complaints = beside.outcome()
    assert code == 1, complaints
    assert "The job failed" in told
    assert not (beside.folder / "talking-pet.mp4").exists()


@pytest.mark.beside("-u", "-m", "tests.sandbox", "--model", "nobody/nothing")
def test_the_command_stays_up_until_it_is_interrupted(beside):
    """Even after a job that failed it says where the page is; Ctrl-C ends it and the service."""
    process = beside.process
    lines = iter(process.stdout.readline, "")
    service_url = next(line.split()[1] for line in lines if line.startswith("service"))
    assert next(line for line in lines if line.startswith("open")).startswith("open http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert beside.outcome()[0] == 1
    with pytest.raises(httpx.TransportError), httpx.Client(trust_env=False) as client:
        client.get(service_url)
