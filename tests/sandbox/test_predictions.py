"""The stand-in for Replicate: tokens, models, inputs, and the progress and end of predictions."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from tests.sandbox import providers
from tests.sandbox.calls import (
    BEARER,
    HAILUO,
    Call,
    create,
    poll,
    post_prediction,
    valid_input,
)
from tests.sandbox.schemas import Model, load_models

PREDICTIONS = "/v1/predictions"
LTX = load_models()["lightricks/ltx-video"]
OLD_LTX = LTX.versions[1]
UNKNOWN_ID = "a" * 64
PICTURE_URL = "https://a.b/c.jpg"

NO_TOKEN = "You did not pass an authentication token"
INVALID_TOKEN = "You did not pass a valid authentication token"
NOT_FOUND = "The requested resource could not be found."


# Tokens, models and versions


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "detail"),
    [
        pytest.param("POST", HAILUO, {}, 401, NO_TOKEN, id="no token"),
        pytest.param(
            "POST",
            HAILUO,
            {"authorization": "Bearer r8_x"},
            401,
            INVALID_TOKEN,
            id="unknown token",
        ),
        pytest.param(
            "GET",
            "/v1/models/minimax/hailuo-99",
            BEARER,
            404,
            NOT_FOUND,
            id="unknown model",
        ),
        pytest.param(
            "POST",
            "/v1/models/lightricks/ltx-video/predictions",
            BEARER,
            404,
            NOT_FOUND,
            id="community model on the official route",
        ),
        pytest.param(
            "GET",
            f"/v1/models/lightricks/ltx-video/versions/{UNKNOWN_ID}",
            BEARER,
            404,
            NOT_FOUND,
            id="unknown version",
        ),
        pytest.param(
            "GET",
            f"/v1/models/minimax/hailuo-02/versions/{LTX.version}",
            BEARER,
            404,
            NOT_FOUND,
            id="version of another model",
        ),
        pytest.param("GET", PREDICTIONS, {}, 401, NO_TOKEN, id="list, no token"),
        pytest.param(
            "GET",
            f"{PREDICTIONS}?cursor=x",
            BEARER,
            404,
            "Invalid cursor",
            id="unknown cursor",
        ),
        pytest.param(
            "GET",
            f"{PREDICTIONS}/none",
            BEARER,
            404,
            NOT_FOUND,
            id="unknown prediction",
        ),
        pytest.param(
            "POST",
            f"{PREDICTIONS}/none/cancel",
            BEARER,
            404,
            NOT_FOUND,
            id="unknown prediction to cancel",
        ),
    ],
)
def test_unknown_tokens_and_names_are_refused(call, method, path, headers, status, detail):
    """The refusals have Replicate's own statuses and sentences."""
    body = {"input": {"prompt": "x"}} if method == "POST" else None
    response = call(method, path, headers=headers, json=body)
    assert response.status_code == status
    assert response.json()["status"] == status
    assert response.json()["detail"] == detail


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
def test_a_version_is_looked_up(call, version, status):
    """`POST /v1/predictions` takes the three forms of a version, and refuses unknown ones."""
    body = {"version": version, "input": {"prompt": "x"}}
    response = call("POST", PREDICTIONS, headers=BEARER, json=body)
    assert response.status_code == status
    if status == 422:
        assert response.json()["title"] == "Invalid version or not permitted"


def test_a_version_has_its_own_schema(call):
    """An older version is described as it was, in the same shape as the latest one."""
    model_path = f"/v1/models/{LTX.name}"
    latest = call("GET", model_path, headers=BEARER).json()["latest_version"]
    same = call("GET", f"{model_path}/versions/{LTX.version}", headers=BEARER).json()
    older = call("GET", f"{model_path}/versions/{OLD_LTX.version}", headers=BEARER).json()
    assert same == latest
    assert older.keys() == latest.keys()
    assert older["id"] == OLD_LTX.version
    assert older["created_at"] < latest["created_at"]

    schemas = older["openapi_schema"]["components"]["schemas"]
    assert schemas["Input"]["required"] == ["start_image"]
    assert schemas["duration"]["enum"] == [3, 5]


@pytest.mark.parametrize("model", load_models().values(), ids=lambda model: model.name)
def test_every_model_is_served_with_its_schema(call, model: Model):
    """Enums are behind `allOf` and `$ref`, required fields exist, the output has a shape."""
    served = call("GET", f"/v1/models/{model.name}", headers=BEARER).json()
    assert served["is_official"] == model.official
    assert served["latest_version"]["id"] == model.version

    schemas = served["latest_version"]["openapi_schema"]["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    for name, prop in model.properties.items():
        if "enum" in prop:
            assert properties[name]["allOf"] == [{"$ref": f"#/components/schemas/{name}"}]
            assert schemas[name]["enum"] == prop["enum"]
    assert set(schemas["Input"].get("required", [])) <= set(properties)
    output_type = "array" if model.output == "list" else "string"
    assert schemas["Output"]["type"] == output_type


# Inputs


@pytest.mark.parametrize(
    ("change", "kind", "field", "description"),
    [
        pytest.param(
            {"prompt": ...},
            "required",
            "input",
            "prompt is required",
            id="required field missing",
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
            id="file that is not a URL",
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
def test_an_input_is_checked_against_the_models_schema(
    sandbox, call, change, kind, field, description
):
    """An invalid input is a 422 that lists the field, the kind of error and what is allowed."""
    values = valid_input(sandbox, **change)
    for name in change:
        if values[name] is ...:
            del values[name]

    response = post_prediction(sandbox, call, json={"input": values})
    assert response.status_code == 422
    assert response.json() == {
        "title": "Input validation failed",
        "detail": f"- {field}: {description}\n",
        "status": 422,
        "invalid_fields": [{"type": kind, "field": field, "description": description}],
    }


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        pytest.param(1, ["number_gte"], id="below"),
        pytest.param(13, ["number_lte"], id="above"),
        pytest.param(12, [], id="at"),
    ],
)
def test_a_number_must_be_in_its_range(call, value, kinds):
    """The schema's minimum and maximum are allowed, and nothing beyond them."""
    path = "/v1/models/bytedance/seedance-1-lite/predictions"
    body = {"input": {"prompt": "x", "duration": value}}
    response = call("POST", path, headers=BEARER, json=body).json()
    assert [error["type"] for error in response.get("invalid_fields", [])] == kinds


def test_an_unknown_field_beside_the_input_is_refused(sandbox, call):
    """A prediction's body may only have the fields of Replicate's API reference."""
    body = {"input": valid_input(sandbox), "model": "x"}
    response = post_prediction(sandbox, call, json=body)
    assert response.status_code == 422
    assert response.json()["invalid_fields"][0]["type"] == "additional_property_not_allowed"


@pytest.mark.parametrize(
    ("version", "values", "fields"),
    [
        pytest.param(OLD_LTX, {"start_image": PICTURE_URL, "duration": 5}, [], id="older"),
        pytest.param(
            OLD_LTX,
            {"start_image": PICTURE_URL, "duration": 6},
            ["input.duration"],
            id="a value",
        ),
        pytest.param(
            OLD_LTX,
            {"image": PICTURE_URL},
            ["input", "input"],
            id="fields of the latest",
        ),
        pytest.param(LTX, {"start_image": PICTURE_URL}, ["input"], id="fields of the older"),
    ],
)
def test_an_input_is_checked_against_its_own_version(sandbox, call, version, values, fields):
    """An older version has its own schema; the prediction says which version it runs."""
    sandbox.video(b"video")
    body = {"version": f"{version.name}:{version.version}", "input": values}
    response = call("POST", PREDICTIONS, headers=BEARER, json=body).json()
    assert [error["field"] for error in response.get("invalid_fields", [])] == fields
    if not fields:
        assert (response["model"], response["version"]) == (version.name, version.version)


# Progress and end


def test_a_prediction_advances_with_each_poll(sandbox, call):
    """It is starting, then processing with a percentage in its log, then ended with its video."""
    sandbox.video(b"video")
    created = create(sandbox, call)
    first = poll(call, created)
    second = poll(call, created)
    third = poll(call, created)

    assert created["status"] == "starting"
    assert (first["status"], first["output"]) == ("starting", None)
    assert (second["status"], second["output"]) == ("processing", None)
    assert re.search(r" 66%\|", second["logs"])
    assert third["status"] == "succeeded"
    assert call("GET", httpx.URL(third["output"]).path).content == b"video"


def test_a_prediction_takes_the_time_that_a_test_asks_for(sandbox, call):
    """`video_seconds` delays its end, however often it is polled."""
    sandbox.video(b"video")
    sandbox.video_seconds = 60
    prediction = create(sandbox, call)
    assert poll(call, prediction, times=10)["status"] == "processing"
    sandbox.predictions[prediction["id"]].created -= 60
    assert poll(call, prediction)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("outcome", "polls", "status", "error"),
    [
        pytest.param(
            ["failed", "CUDA out of memory"],
            3,
            "failed",
            "CUDA out of memory",
            id="failed",
        ),
        pytest.param(
            ["failed"],
            3,
            "failed",
            "Prediction failed.",
            id="failed without a reason given",
        ),
        pytest.param(["canceled"], 3, "canceled", None, id="canceled"),
        pytest.param(["aborted"], 3, "aborted", None, id="aborted"),
        pytest.param(["never"], 9, "processing", None, id="never ends"),
        pytest.param(["queued"], 9, "starting", None, id="never starts"),
    ],
)
def test_a_prediction_has_the_outcome_that_a_test_asks_for(
    sandbox, call, outcome, polls, status, error
):
    """It is the outcome of one prediction; the next one succeeds again."""
    sandbox.video(b"video")
    sandbox.outcome(*outcome)
    first = create(sandbox, call)
    second = create(sandbox, call)

    ended = poll(call, first, times=polls)
    assert (ended["status"], ended["error"], ended["output"]) == (status, error, None)
    assert poll(call, second, times=3)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        pytest.param("5", 5, id="least"),
        pytest.param("30s", 30, id="seconds"),
        pytest.param("1h30m45s", 5445, id="all units"),
        pytest.param("24h", 86_400, id="most"),
    ],
)
def test_cancel_after_is_parsed_as_documented(sandbox, call, header, seconds):
    """It is a number of seconds or a duration, from 5 s to 24 h."""
    sandbox.video(b"video")
    headers = {**BEARER, "cancel-after": header}
    assert post_prediction(sandbox, call, headers=headers).status_code == 201
    assert [one.cancel_after for one in sandbox.predictions.values()] == [seconds]


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("4", id="too short"),
        pytest.param("86401s", id="too long"),
        pytest.param("soon", id="not a duration"),
        pytest.param("1.5", id="a fraction"),
        pytest.param("", id="empty"),
    ],
)
def test_an_invalid_cancel_after_is_refused(sandbox, call, header):
    """No prediction is created."""
    headers = {**BEARER, "cancel-after": header}
    assert post_prediction(sandbox, call, headers=headers).status_code == 400
    assert sandbox.predictions == {}


@pytest.mark.parametrize(
    ("polls", "status"),
    [pytest.param(1, "aborted", id="in the queue"), pytest.param(2, "canceled", id="running")],
)
def test_a_prediction_past_its_cancel_after_ends(sandbox, call, polls, status):
    """Before it has started it is aborted, and later canceled."""
    sandbox.outcome("never")
    headers = {**BEARER, "cancel-after": "5"}
    prediction = post_prediction(sandbox, call, headers=headers).json()
    poll(call, prediction, times=polls)
    sandbox.predictions[prediction["id"]].created -= 5
    assert poll(call, prediction)["status"] == status


def test_a_prediction_can_be_canceled_until_it_ends(sandbox, call):
    """Cancelling returns the prediction; one that has ended stays as it is."""
    sandbox.video(b"video")
    running = create(sandbox, call)
    ended = create(sandbox, call)
    poll(call, ended, times=3)

    statuses = []
    for prediction in (running, ended):
        path = f"{PREDICTIONS}/{prediction['id']}/cancel"
        statuses.append(call("POST", path, headers=BEARER).json()["status"])
    assert statuses == ["canceled", "succeeded"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        pytest.param("/none.jpg", "HTTP Error 404", id="not there"),
        pytest.param("/v1/predictions/none", "HTTP Error 401", id="forbidden"),
        pytest.param("/", "cannot identify image file", id="not a picture"),
    ],
)
def test_a_picture_that_cannot_be_loaded_fails_the_prediction(
    sandbox, call, monkeypatch, tmp_path, path, error
):
    """The stand-in really loads the picture, and says what is wrong."""
    page = tmp_path / "page.html"
    page.write_text("a page")
    monkeypatch.setattr(providers, "PAGE_FILE", page)
    prediction = create(sandbox, call, first_frame_image=sandbox.url + path)
    ended = poll(call, prediction, times=3)
    assert ended["status"] == "failed"
    assert error in ended["error"]


def test_a_broken_picture_fails_the_prediction(sandbox, call):
    """It begins like a picture, but ffmpeg cannot read it."""
    url = "data:image/png;base64,iVBORw0KGgo="
    ended = poll(call, create(sandbox, call, first_frame_image=url), times=3)
    assert ended["status"] == "failed"
    assert "cannot read image file" in ended["error"]


@pytest.mark.parametrize(
    ("shape", "wrap"),
    [
        pytest.param("string", lambda url: url, id="string"),
        pytest.param("list", lambda url: [url], id="list"),
        pytest.param("object", lambda url: {"video": url}, id="object"),
    ],
)
def test_an_output_has_the_shape_that_a_test_asks_for(sandbox, call, shape, wrap):
    """It is a URL, a list with it, or an object with it."""
    sandbox.video(b"video")
    sandbox.output_shape = shape
    ended = poll(call, create(sandbox, call), times=3)
    assert ended["output"] == wrap(f"{sandbox.url}/delivery/{ended['id']}/output.mp4")


# The list


def list_predictions(call: Call, **query: str) -> dict[str, Any]:
    """A page of the account's predictions."""
    response = call("GET", PREDICTIONS, headers=BEARER, params=query)
    assert response.status_code == 200
    return response.json()


def test_predictions_are_listed_newest_first(sandbox, call):
    """Each is shown as by a poll, but the list does not count as one."""
    sandbox.video(b"video")
    first = create(sandbox, call, prompt="first")
    second = create(sandbox, call, prompt="second")
    page = list_predictions(call, source="api")
    assert page == {"next": None, "previous": None, "results": [second, first]}
    assert list_predictions(call)["results"] == [second, first]

    assert first["input"]["prompt"] == "first"
    assert second["input"]["prompt"] == "second"
    assert (first["model"], first["version"]) == ("minimax/hailuo-02", "hidden")
    assert first["status"] == "starting"


CREATED_AT = datetime(2026, 11, 24, 12, 0, 0, 500_000, timezone.utc)


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
def test_the_list_begins_at_created_after(sandbox, call, after, count):
    """A prediction created at that very moment is included."""
    sandbox.video(b"video")
    prediction = create(sandbox, call)
    sandbox.predictions[prediction["id"]].created_at = CREATED_AT
    assert len(list_predictions(call, created_after=after)["results"]) == count


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
def test_an_invalid_created_after_is_refused(call, after):
    """A 400 repeats it."""
    response = call("GET", PREDICTIONS, headers=BEARER, params={"created_after": after})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"].startswith(f"created_after: {after!r} is not")


def test_the_list_comes_in_pages(sandbox, call):
    """A page has a hundred; the next page keeps the query, and its place if there are new ones."""
    sandbox.video(b"video")
    ids = [create(sandbox, call)["id"] for _ in range(102)]
    now = datetime.now(timezone.utc)
    sandbox.predictions[ids[0]].created_at -= timedelta(hours=2)
    an_hour_ago = (now - timedelta(hours=1)).isoformat()

    first = list_predictions(call, created_after=an_hour_ago)
    create(sandbox, call)
    assert first["next"].startswith(f"{sandbox.url}/v1/predictions?cursor=")
    next_path = first["next"].removeprefix(sandbox.url)
    second = call("GET", next_path, headers=BEARER).json()

    assert (len(first["results"]), len(second["results"])) == (100, 1)
    assert second["next"] is None
    listed = [one["id"] for one in first["results"] + second["results"]]
    assert listed == ids[:0:-1]  # newest first, without the one of two hours ago


# Expiry and rate limits


def test_an_expired_prediction_has_lost_its_files(sandbox, call):
    """Input, output, log and video are gone, and the rest stays, in the list too."""
    sandbox.video(b"video")
    ended = poll(call, create(sandbox, call), times=3)
    sandbox.expire(ended["id"])
    expired = {**ended, "input": {}, "output": None, "logs": None, "data_removed": True}
    assert poll(call, ended) == expired
    assert list_predictions(call)["results"] == [expired]
    assert call("GET", httpx.URL(ended["output"]).path).status_code == 404
    assert sandbox.created(prompt="talk")[0].id == ended["id"]


def test_a_running_prediction_does_not_expire(sandbox, call):
    """Replicate removes the files an hour after the end, never before."""
    sandbox.video(b"video")
    running = create(sandbox, call)
    with pytest.raises(ValueError, match="has not ended: starting"):
        sandbox.expire(running["id"])
    assert poll(call, running, times=3)["status"] == "succeeded"


def test_rate_limits_refuse_with_the_seconds_to_wait(sandbox, call):
    """Above the limit there is a 429 in Replicate's words; creates have a limit of their own."""
    sandbox.video(b"video")
    sandbox.limits(creates_per_minute=1, others_per_minute=2)
    prediction = create(sandbox, call)
    refused = post_prediction(sandbox, call)
    assert refused.status_code == 429
    pattern = r"Request was throttled. Your rate limit resets in ~\d+s."
    assert re.fullmatch(pattern, refused.json()["detail"])

    paths = [f"{PREDICTIONS}/{prediction['id']}", PREDICTIONS, PREDICTIONS]
    statuses = [call("GET", path, headers=BEARER).status_code for path in paths]
    assert statuses == [200, 200, 429]
