"""The stand-in of Replicate: tokens, models, inputs, and how a prediction goes on and ends."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from tests.sandbox import providers
from tests.sandbox.calls import BEARER, HAILUO, Call, create, poll, valid_input
from tests.sandbox.schemas import Model, load_models

LTX = load_models()["lightricks/ltx-video"]
OLD_LTX = LTX.versions[1]
UNKNOWN_ID = "a" * 64


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "detail"),
    [
        pytest.param(
            "POST", HAILUO, {}, 401, "You did not pass an authentication token", id="no token"
        ),
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
            f"/v1/models/lightricks/ltx-video/versions/{'a' * 64}",
            BEARER,
            404,
            "The requested resource could not be found.",
            id="unknown version",
        ),
        pytest.param(
            "GET",
            f"/v1/models/minimax/hailuo-02/versions/{LTX.version}",
            BEARER,
            404,
            "The requested resource could not be found.",
            id="version of another model",
        ),
        pytest.param(
            "GET",
            "/v1/predictions",
            {},
            401,
            "You did not pass an authentication token",
            id="list, no token",
        ),
        pytest.param(
            "GET", "/v1/predictions?cursor=x", BEARER, 404, "Invalid cursor", id="unknown cursor"
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
def test_replicate_refuses_tokens_and_names_it_does_not_know(
    call, method, path, headers, status, detail
):
    """The real statuses and sentences."""
    answer = call(
        method, path, headers=headers, json={"input": {"prompt": "x"}} if method == "POST" else None
    )
    assert (answer.status_code, answer.json()["status"], answer.json()["detail"]) == (
        status,
        status,
        detail,
    )


@pytest.mark.parametrize(
    ("change", "kind", "field", "description"),
    [
        pytest.param(
            {"prompt": ...}, "required", "input", "prompt is required", id="required field missing"
        ),
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
def test_input_is_checked_against_the_models_own_schema(
    sandbox, call, change, kind, field, description
):
    """A wrong input is a 422 that lists the field, the kind of error and what would be right."""
    values = {
        key: value for key, value in valid_input(sandbox, **change).items() if value is not ...
    }
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
    answer = call(
        "POST", "/v1/models/bytedance/seedance-1-lite/predictions", headers=BEARER, json=body
    ).json()
    assert [problem["type"] for problem in answer.get("invalid_fields", [])] == (
        [kind] if kind else []
    )


def test_a_field_beside_the_known_ones_of_a_request_is_refused(sandbox, call):
    """The body of a prediction allows nothing that Replicate's document does not list."""
    answer = call(
        "POST", HAILUO, headers=BEARER, json={"input": valid_input(sandbox), "model": "x"}
    )
    assert answer.status_code == 422
    assert answer.json()["invalid_fields"][0]["type"] == "additional_property_not_allowed"


@pytest.mark.parametrize(
    ("version", "status"),
    [
        pytest.param(LTX.version, 201, id="bare id"),
        pytest.param(f"{LTX.name}:{LTX.version}", 201, id="name and id"),
        pytest.param(f"{LTX.name}:{UNKNOWN_ID}", 422, id="name and unknown id"),
        pytest.param("minimax/hailuo-02", 201, id="name of an official model"),
        pytest.param(LTX.name, 422, id="name of a community model"),
        pytest.param(UNKNOWN_ID, 422, id="unknown id"),
        pytest.param(f"other/name:{LTX.version}", 422, id="id of another model"),
        pytest.param(5, 422, id="not a string"),
    ],
)
def test_versions_are_looked_up(call, version, status):
    """`POST /v1/predictions` takes the three forms of a version, and refuses unknown ones in Replicate's words."""
    answer = call(
        "POST",
        "/v1/predictions",
        headers=BEARER,
        json={"version": version, "input": {"prompt": "x"}},
    )
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["title"] == "Invalid version or not permitted"


def test_a_version_has_a_schema_of_its_own(call):
    """An older version is described as it was, in the words that the latest one has under its model."""
    latest = call("GET", f"/v1/models/{LTX.name}", headers=BEARER).json()["latest_version"]
    same, older = (
        call("GET", f"/v1/models/{one.name}/versions/{one.version}", headers=BEARER)
        for one in LTX.versions
    )
    assert same.json() == latest
    assert older.json().keys() == latest.keys()
    assert (older.json()["id"], older.json()["created_at"] < latest["created_at"]) == (
        OLD_LTX.version,
        True,
    )
    schemas = older.json()["openapi_schema"]["components"]["schemas"]
    assert schemas["Input"]["required"] == ["start_image"]
    assert schemas["duration"]["enum"] == [3, 5]


@pytest.mark.parametrize(
    ("version", "values", "refused"),
    [
        pytest.param(OLD_LTX, {"start_image": "https://a.b/c.jpg", "duration": 5}, [], id="older"),
        pytest.param(
            OLD_LTX,
            {"start_image": "https://a.b/c.jpg", "duration": 6},
            ["input.duration"],
            id="a value",
        ),
        pytest.param(
            OLD_LTX, {"image": "https://a.b/c.jpg"}, ["input", "input"], id="fields of the latest"
        ),
        pytest.param(
            LTX, {"start_image": "https://a.b/c.jpg"}, ["input"], id="fields of the older"
        ),
    ],
)
def test_an_input_is_checked_against_the_version_it_runs_by(
    sandbox, call, version, values, refused
):
    """Not against the model's latest one; the prediction says which version it is."""
    sandbox.video(b"video")
    body = {"version": f"{version.name}:{version.version}", "input": values}
    answer = call("POST", "/v1/predictions", headers=BEARER, json=body).json()
    assert [problem["field"] for problem in answer.get("invalid_fields", [])] == refused
    if not refused:
        assert (answer["model"], answer["version"]) == (version.name, version.version)


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
    assert (served["is_official"], served["latest_version"]["id"]) == (
        model.official,
        model.version,
    )


def test_a_prediction_advances_by_reads(sandbox, call):
    """The first read finds it starting, the next processing with a percentage in the log, the third ended with its video."""
    sandbox.video(b"video")
    first = create(sandbox, call)
    seen = [poll(call, first) for _ in range(3)]
    assert [first["status"], *(one["status"] for one in seen)] == [
        "starting",
        "starting",
        "processing",
        "succeeded",
    ]
    assert re.search(r" 66%\|", seen[1]["logs"])
    assert [one["output"] for one in seen[:2]] == [None, None]
    assert call("GET", httpx.URL(seen[2]["output"]).path).content == b"video"


def test_a_prediction_takes_its_time_when_told_to(sandbox, call):
    """`video_seconds` holds the end back, however often it is read."""
    sandbox.video(b"video")
    sandbox.video_seconds = 60
    prediction = create(sandbox, call)
    assert poll(call, prediction, times=10)["status"] == "processing"
    sandbox.predictions[prediction["id"]].created -= 60
    assert poll(call, prediction)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("outcome", "reads", "status", "error"),
    [
        pytest.param(
            ("failed", "CUDA out of memory"), 3, "failed", "CUDA out of memory", id="failed"
        ),
        pytest.param(
            ("failed",), 3, "failed", "Prediction failed.", id="failed without a reason given"
        ),
        pytest.param(("canceled",), 3, "canceled", None, id="canceled"),
        pytest.param(("aborted",), 3, "aborted", None, id="aborted"),
        pytest.param(("never",), 9, "processing", None, id="never ends"),
        pytest.param(("queued",), 9, "starting", None, id="never starts"),
    ],
)
def test_a_prediction_ends_as_told(sandbox, call, outcome, reads, status, error):
    """The outcome holds for one prediction; the next one succeeds again."""
    sandbox.video(b"video")
    sandbox.outcome(*outcome)
    told, next_one = create(sandbox, call), create(sandbox, call)
    ended = poll(call, told, times=reads)
    assert (ended["status"], ended["error"], ended["output"]) == (status, error, None)
    assert poll(call, next_one, times=3)["status"] == "succeeded"


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
    sandbox.video(b"video")
    answer = call(
        "POST",
        HAILUO,
        headers={**BEARER, "cancel-after": header},
        json={"input": valid_input(sandbox)},
    )
    assert answer.status_code == (201 if seconds else 400)
    assert [one.cancel_after for one in sandbox.predictions.values()] == (
        [seconds] if seconds else []
    )


@pytest.mark.parametrize(
    ("reads", "status"),
    [pytest.param(1, "aborted", id="in the queue"), pytest.param(2, "canceled", id="running")],
)
def test_a_prediction_past_its_cancel_after_is_ended(sandbox, call, reads, status):
    """Before the start it is aborted, later canceled."""
    headers = {**BEARER, "cancel-after": "5"}
    sandbox.outcome("never")
    prediction = call("POST", HAILUO, headers=headers, json={"input": valid_input(sandbox)}).json()
    poll(call, prediction, times=reads)
    sandbox.predictions[prediction["id"]].created -= 5
    assert poll(call, prediction)["status"] == status


def test_a_prediction_can_be_canceled_until_it_has_ended(sandbox, call):
    """Cancelling answers with the prediction; one that has ended stays as it is."""
    sandbox.video(b"video")
    running, ended = create(sandbox, call), create(sandbox, call)
    poll(call, ended, times=3)
    statuses = [
        call("POST", f"/v1/predictions/{one['id']}/cancel", headers=BEARER).json()["status"]
        for one in (running, ended)
    ]
    assert statuses == ["canceled", "succeeded"]


# The list


def listed(call: Call, **query: str) -> dict[str, Any]:
    """A page of the account's predictions."""
    answer = call("GET", "/v1/predictions", headers=BEARER, params=query)
    assert answer.status_code == 200
    return answer.json()


def test_predictions_are_listed_newest_first(sandbox, call):
    """Each as a read shows it, with its input, and without counting as a read."""
    sandbox.video(b"video")
    first, second = create(sandbox, call, prompt="first"), create(sandbox, call, prompt="second")
    assert listed(call, source="api") == {
        "next": None,
        "previous": None,
        "results": [second, first],
    }
    assert listed(call)["results"] == [second, first]
    assert [one["input"]["prompt"] for one in (second, first)] == ["second", "first"]
    assert (first["model"], first["version"], first["status"]) == (
        "minimax/hailuo-02",
        "hidden",
        "starting",
    )


MOMENT = datetime(2026, 11, 24, 12, 0, 0, 500_000, timezone.utc)


@pytest.mark.parametrize(
    ("after", "count"),
    [
        pytest.param("2026-11-24T12:00:00.500Z", 1, id="that very moment"),
        pytest.param("2026-11-24T12:00:00.500001Z", 0, id="a moment later"),
        pytest.param("2026-11-24T13:00:00.5+01:00", 1, id="another zone"),
        pytest.param("2026-11-24T12:00:01-00:30", 0, id="a zone west"),
        pytest.param("2026-11-24T12:00", 1, id="no seconds, no zone"),
        pytest.param("2026-11-24", 1, id="a day"),
        pytest.param("2026-11-25", 0, id="the next day"),
    ],
)
def test_the_list_begins_where_it_is_told_to(sandbox, call, after, count):
    """`created_after` includes its own moment."""
    sandbox.video(b"video")
    sandbox.predictions[create(sandbox, call)["id"]].created_at = MOMENT
    assert len(listed(call, created_after=after)["results"]) == count


@pytest.mark.parametrize(
    "after",
    [
        pytest.param("yesterday", id="no date"),
        pytest.param("", id="empty"),
        pytest.param("1763985600", id="seconds"),
        pytest.param("2026-11-24T12:00:00 00:00", id="a plus that was not percent-encoded"),
        pytest.param("2026-13-24T12:00:00Z", id="no such month"),
        pytest.param("2026-11-24T12:00:00+99:00", id="no such zone"),
    ],
)
def test_the_list_refuses_what_is_no_moment(call, after):
    """A 400 that repeats it."""
    answer = call("GET", "/v1/predictions", headers=BEARER, params={"created_after": after})
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["detail"].startswith(f"created_after: {after!r} is not")


def test_the_list_comes_in_pages(sandbox, call):
    """A hundred each, the next one's URL is absolute and keeps the start; what is created meanwhile moves nothing."""
    sandbox.video(b"video")
    made = [create(sandbox, call)["id"] for _ in range(102)]
    sandbox.predictions[made[0]].created_at -= timedelta(hours=2)
    begin = (datetime.now(timezone.utc) - timedelta(hours=1)).isoformat()
    first = listed(call, created_after=begin)
    create(sandbox, call)
    assert first["next"].startswith(f"{sandbox.url}/v1/predictions?cursor=")
    second = call("GET", first["next"].removeprefix(sandbox.url), headers=BEARER).json()
    assert [one["id"] for page in (first, second) for one in page["results"]] == made[:0:-1]
    assert [len(page["results"]) for page in (first, second)] == [100, 1]
    assert second["next"] is None


# What is gone


def test_a_video_expires_when_told_to(sandbox, call):
    """Input, output, log and file are gone, status and the rest stay, in the list too."""
    sandbox.video(b"video")
    ended = poll(call, create(sandbox, call), times=3)
    sandbox.expire(ended["id"])
    gone = {"input": {}, "output": None, "logs": None, "data_removed": True}
    assert poll(call, ended) == {**ended, **gone}
    assert listed(call)["results"] == [{**ended, **gone}]
    assert call("GET", httpx.URL(ended["output"]).path).status_code == 404
    assert sandbox.created(prompt="talk")[0].id == ended["id"]


def test_only_what_has_ended_expires(sandbox, call):
    """Replicate removes an hour after the end, never before."""
    sandbox.video(b"video")
    running = create(sandbox, call)
    with pytest.raises(ValueError, match="has not ended: starting"):
        sandbox.expire(running["id"])
    assert poll(call, running, times=3)["status"] == "succeeded"


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
    sandbox.video(b"video")
    sandbox.output_shape = shape
    ended = poll(call, create(sandbox, call), times=3)
    assert ended["output"] == wrap(f"{sandbox.url}/delivery/{ended['id']}/output.mp4")


def test_rate_limits_refuse_with_the_seconds_to_wait(sandbox, call):
    """Above the limit there is a 429 in Replicate's words; creates and other calls are counted apart."""
    sandbox.video(b"video")
    sandbox.limits(creates_per_minute=1, reads_per_minute=2)
    prediction = create(sandbox, call)
    refused = call("POST", HAILUO, headers=BEARER, json={"input": valid_input(sandbox)})
    assert refused.status_code == 429
    assert re.fullmatch(
        r"Request was throttled. Your rate limit resets in ~\d+s.", refused.json()["detail"]
    )
    paths = [f"/v1/predictions/{prediction['id']}", "/v1/predictions", "/v1/predictions"]
    assert [call("GET", path, headers=BEARER).status_code for path in paths] == [200, 200, 429]


@pytest.mark.parametrize(
    ("picture", "error"),
    [
        pytest.param("/none.jpg", "HTTP Error 404", id="not there"),
        pytest.param("/v1/predictions/none", "HTTP Error 401", id="forbidden"),
        pytest.param("/", "cannot identify image file", id="no picture"),
        pytest.param(
            "data:image/png;base64,iVBORw0KGgo=", "cannot read image file", id="broken picture"
        ),
    ],
)
def test_a_picture_that_cannot_be_used_fails_the_prediction(
    sandbox, call, monkeypatch, tmp_path, picture, error
):
    """The model's machine really loads the picture, and says what is wrong with it."""
    monkeypatch.setattr(providers, "PAGE_FILE", tmp_path / "page.html")
    (tmp_path / "page.html").write_text("a page")
    url = picture if picture.startswith("data:") else sandbox.url + picture
    ended = poll(call, create(sandbox, call, first_frame_image=url), times=3)
    assert ended["status"] == "failed"
    assert error in ended["error"]
