"""A stand-in for Replicate's predictions.

The shapes are from api.replicate.com/openapi.json, from replicate.com/docs (create-a-prediction,
predictions.list, models.versions.get, prediction-lifecycle, data-retention, rate-limits), and from
recorded responses. Guessed: the responses to a malformed Cancel-After, `created_after` or `cursor`,
the error of a failed prediction, and the response to cancelling an ended prediction. Not imitated:
webhooks, `Prefer: wait`, streaming, and the list's `created_before` and `source`. What Replicate
removes after an hour is removed here by `Prediction.expire`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import media
from .behaviour import Behaviour, Workshop
from .schemas import Invalid, Model, invalid_input, load_models
from .wire import Handler, Refusal, file_response

TOKEN = "r8_Sandbox0123456789abcdef0123456789abcdef"
ENDED = ("succeeded", "failed", "canceled", "aborted")
OUTCOMES = (*ENDED, "never", "queued")  # never: never ends; queued: never starts
BODY_FIELDS = ("input", "stream", "webhook", "webhook_events_filter")
MIN_CANCEL_AFTER_S = 5
MAX_CANCEL_AFTER_S = 24 * 3600
PAGE_SIZE = 100  # predictions per page of the list
SHORT_SIDE_PIXELS = 720
FPS = 24
MAX_FPS = 60
DEFAULT_SECONDS = 6.0


# A prediction


@dataclass
class Prediction:
    """One prediction and its progress; `input` can still be read here after it has expired."""

    id: str
    model: Model
    input: dict[str, Any]
    behaviour: Behaviour
    outcome: str = "succeeded"
    planned_error: str | None = None
    cancel_after: int | None = None
    polls: int = 0  # so far
    video: bytes = b""
    error: str | None = None
    making: asyncio.Task[None] | None = None
    created: float = field(default_factory=time.monotonic)
    created_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    ended_as: str | None = None
    ended_after_s: float = 0.0
    is_removed: bool = False

    @property
    def age_s(self) -> float:
        """Seconds since its creation."""
        return time.monotonic() - self.created

    @property
    def status(self) -> str:
        """Replicate's status; past its deadline the prediction ends here."""
        if self.ended_as is None and self.is_past_deadline:
            self.end("canceled" if self.is_started else "aborted")
        if self.ended_as is not None:
            return self.ended_as
        return "processing" if self.is_started else "starting"

    @property
    def is_past_deadline(self) -> bool:
        """Whether it is older than its Cancel-After allows."""
        return self.cancel_after is not None and self.age_s >= self.cancel_after

    @property
    def is_started(self) -> bool:
        """Whether it has left the queue: from the second poll on."""
        return self.polls >= 2 and self.outcome != "queued"

    @property
    def is_due(self) -> bool:
        """Whether it has been polled often enough and is old enough to end now."""
        if self.outcome not in ENDED:
            return False
        enough_polls = self.polls >= self.behaviour.polls_to_finish
        return enough_polls and self.age_s >= self.behaviour.video_seconds

    @property
    def progress(self) -> float:
        """The part done, 0 to 1: by polls or by age, whichever is less."""
        if self.ended_as == "succeeded":
            return 1.0
        by_polls = self.polls / max(1, self.behaviour.polls_to_finish)
        by_age = 1.0
        if self.behaviour.video_seconds:
            by_age = self.age_s / self.behaviour.video_seconds
        return min(by_polls, by_age, 0.99)

    def end(self, status: str, error: str | None = None) -> None:
        """Set the terminal status, once."""
        if self.ended_as is None:
            self.ended_as = status
            self.error = error
            self.ended_after_s = self.age_s

    def expire(self) -> None:
        """Remove input, output, log and video, as Replicate does an hour after the end.

        Raises ValueError if the prediction has not ended.
        """
        if self.status not in ENDED:
            raise ValueError(f"prediction {self.id} has not ended: {self.status}")
        self.is_removed = True
        self.video = b""

    async def poll(self) -> None:
        """Count a poll, and end the prediction if it is due."""
        if self.status in ENDED:
            return
        self.polls += 1
        if not self.is_due:
            return

        if self.making is not None:
            # So that the number of polls does not depend on how long the video takes to make.
            await self.making
        status = "failed" if self.planned_error else self.outcome
        self.end(status, self.planned_error)

    def json(self, base_url: str) -> dict[str, Any]:
        """The prediction as Replicate shows it."""
        status = self.status
        url = f"{base_url}/v1/predictions/{self.id}"
        shown: dict[str, Any] = {
            "id": self.id,
            "model": self.model.name,
            "version": "hidden" if self.model.official else self.model.version,
            "input": self.input,
            "logs": self.logs(),
            "output": self.output(base_url) if status == "succeeded" else None,
            "data_removed": self.is_removed,
            "error": self.error,
            "source": "api",
            "status": status,
            "created_at": timestamp(self.created_at),
            "urls": {"get": url, "cancel": f"{url}/cancel", "web": f"{base_url}/p/{self.id}"},
        }
        if self.is_removed:
            shown.update(input={}, logs=None, output=None)
        if self.cancel_after is not None:
            deadline = self.created_at + timedelta(seconds=self.cancel_after)
            shown["deadline"] = timestamp(deadline)
        if self.is_started:
            shown["started_at"] = shown["created_at"]
        if status in ENDED:
            completed_at = self.created_at + timedelta(seconds=self.ended_after_s)
            shown["completed_at"] = timestamp(completed_at)
            shown["metrics"] = {
                "predict_time": self.ended_after_s,
                "total_time": self.ended_after_s,
            }
        return shown

    def logs(self) -> str:
        """A log with a progress bar, as most models write it; empty before the start."""
        if not self.is_started:
            return ""
        percent = int(self.progress * 100)
        bar = "█" * (percent // 10)
        steps = percent * 50 // 100
        progress = f"{percent:3d}%|{bar:<10}| {steps}/50 [00:01<00:01, 25.00it/s]"
        return f"Using seed: 42\nGenerating video\n{progress}\n"

    def output(self, base_url: str) -> Any:
        """The video's URL in the output shape that the behaviour or the model asks for."""
        url = f"{base_url}/delivery/{self.id}/output.mp4"
        shape = self.behaviour.output_shape
        if shape == "model":
            shape = self.model.output
        if shape == "list":
            return [url]
        if shape == "object":
            return {"video": url}
        return url


# Rate limits


class Limit:
    """A rate limit: at most so many requests in any minute; None: no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        self.passed: deque[float] = deque()  # when the requests of the last minute came

    def check(self) -> None:
        """Let a request pass, or refuse it with the seconds to wait."""
        if self.per_minute is None:
            return

        now = time.monotonic()
        while self.passed and self.passed[0] <= now - 60:
            self.passed.popleft()
        if len(self.passed) >= self.per_minute:
            wait_s = int(self.passed[0] + 60 - now) + 1
            detail = f"Request was throttled. Your rate limit resets in ~{wait_s}s."
            headers = {"ratelimit-remaining": "0", "ratelimit-reset": str(wait_s)}
            raise Refusal(JSONResponse({"detail": detail, "status": 429}, 429, headers))
        self.passed.append(now)


# The provider


class Replicate:
    """The video provider.

    `predictions` has every prediction by its id; `outcomes` waits for the next predictions; and
    `video`, if set, is what they make.
    """

    def __init__(
        self, behaviour: Behaviour, workshop: Workshop, base_url: Callable[[], str]
    ) -> None:
        self.behaviour = behaviour
        self.workshop = workshop
        self.base_url = base_url
        self.models = load_models()
        self.by_version: dict[str, Model] = {}
        for model in self.models.values():
            for version in model.versions:
                self.by_version[version.version] = version
        self.clear()

    def clear(self) -> None:
        """Forget predictions, planned outcomes and limits."""
        self.predictions: dict[str, Prediction] = {}
        self.outcomes: deque[tuple[str, str | None]] = deque()
        self.video: bytes | None = None
        self.creates = Limit(None)
        self.others = Limit(None)

    def routes(self, on: Callable[[str, Handler], Any]) -> list[Route]:
        """The calls that are imitated."""
        model = "/v1/models/{owner}/{name}"
        predictions = "/v1/predictions"
        return [
            Route(model, on("model", self.model), methods=["GET"]),
            Route(model + "/versions/{id}", on("model", self.version), methods=["GET"]),
            Route(model + "/predictions", on("create", self.create_official), methods=["POST"]),
            Route(predictions, on("create", self.create_version), methods=["POST"]),
            Route(predictions, on("list", self.listing), methods=["GET"]),
            Route(predictions + "/{id}", on("poll", self.poll), methods=["GET"]),
            Route(predictions + "/{id}/cancel", on("cancel", self.cancel), methods=["POST"]),
            Route("/delivery/{id}/output.mp4", on("output", self.output), methods=["GET"]),
        ]

    # Models

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}`: a model and its input schema."""
        self.admit(request, self.others)
        model = self.known_model(request)
        owner, _, name = model.name.partition("/")
        return JSONResponse(
            {
                "url": f"https://replicate.com/{model.name}",
                "owner": owner,
                "name": name,
                "visibility": "public",
                "is_official": model.official,
                "run_count": 1,
                "latest_version": version_json(model),
            }
        )

    async def version(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}/versions/{id}`: the input schema of one version."""
        self.admit(request, self.others)
        version = self.by_version.get(request.path_params["id"])
        if version is None or version.name != self.known_model(request).name:
            raise not_found()
        return JSONResponse(version_json(version))

    # Creating a prediction

    async def create_official(self, request: Request) -> Response:
        """`POST /v1/models/{owner}/{name}/predictions`: official models only."""
        self.admit(request, self.creates)
        model = self.known_model(request)
        if not model.official:
            raise not_found()
        body = await read_body(request, BODY_FIELDS, required=("input",))
        return self.create(request, model, body)

    async def create_version(self, request: Request) -> Response:
        """`POST /v1/predictions`: any model, by `version`."""
        self.admit(request, self.creates)
        fields = ("version", *BODY_FIELDS)
        body = await read_body(request, fields, required=("version", "input"))
        return self.create(request, self.model_of_version(body["version"]), body)

    def create(self, request: Request, model: Model, body: dict[str, Any]) -> Response:
        """Check the input and start a prediction."""
        refuse_if_any(invalid_input(model, body["input"]))
        cancel_after = parse_cancel_after(request.headers.get("cancel-after"))

        outcome, error = "succeeded", None
        if self.outcomes:
            outcome, error = self.outcomes.popleft()
        if outcome == "failed" and error is None:
            error = "Prediction failed."

        prediction = Prediction(
            id=new_id(),
            model=model,
            input=body["input"],
            behaviour=self.behaviour,
            outcome=outcome,
            planned_error=error,
            cancel_after=cancel_after,
        )
        self.predictions[prediction.id] = prediction
        if outcome == "succeeded":
            prediction.making = asyncio.ensure_future(self.make(prediction))
        return JSONResponse(prediction.json(self.base_url()), 201)

    async def make(self, prediction: Prediction) -> None:
        """Make the prediction's video; a MediaError becomes its error."""
        if self.video is not None:
            prediction.video = self.video
            return
        try:
            prediction.video = await self.make_video(prediction)
        except media.MediaError as exc:
            prediction.planned_error = f"Prediction failed: {exc}"

    async def make_video(self, prediction: Prediction) -> bytes:
        """Make a video of the picture in the input, with the input's speech if there is one."""
        model = prediction.model
        values = prediction.input
        picture_url = first_picture(model, values)
        if picture_url is None:
            raise media.MediaError("the sandbox animates pictures only, and the input names none")
        picture = await self.workshop.run(lambda: media.fetch(picture_url))

        audio = None
        audio_url = values.get("audio")
        if audio_url:
            audio = await self.workshop.run(lambda: media.fetch(audio_url))
        has_no_duration = model.default(values, "duration") is None
        follow_audio = audio is not None and has_no_duration

        plan = video_plan(model, values)
        key = ("video", digest(picture), plan, digest(audio or b""), has_no_duration)
        return await self.workshop.once(
            key, lambda: media.video(picture, plan, audio, follow_audio)
        )

    # Following a prediction

    async def poll(self, request: Request) -> Response:
        """`GET /v1/predictions/{id}`: one poll of a prediction."""
        self.admit(request, self.others)
        prediction = self.known_prediction(request)
        await prediction.poll()
        return JSONResponse(prediction.json(self.base_url()))

    async def listing(self, request: Request) -> Response:
        """`GET /v1/predictions`: the account's predictions in pages, newest first.

        It does not count as a poll of any of them.
        """
        self.admit(request, self.others)
        url = self.base_url()
        query = request.query_params
        predictions = self.newest_first(query.get("created_after"))
        start = 0
        if "cursor" in query:
            start = parse_cursor(query["cursor"], predictions)
        page = predictions[start : start + PAGE_SIZE]

        next_url = None
        if len(predictions) > start + PAGE_SIZE:
            next_query = {"cursor": cursor_after(page[-1])}
            if "created_after" in query:
                next_query["created_after"] = query["created_after"]
            next_url = f"{url}/v1/predictions?{urlencode(next_query)}"
        results = [prediction.json(url) for prediction in page]
        return JSONResponse({"next": next_url, "previous": None, "results": results})

    def newest_first(self, created_after: str | None) -> list[Prediction]:
        """The predictions created at or after a time (None: all of them), newest first."""
        predictions = sorted(self.predictions.values(), key=lambda one: one.created_at)
        predictions.reverse()
        if created_after is None:
            return predictions
        earliest = parse_time(created_after)
        return [one for one in predictions if one.created_at >= earliest]

    async def cancel(self, request: Request) -> Response:
        """`POST /v1/predictions/{id}/cancel`."""
        self.admit(request, self.others)
        prediction = self.known_prediction(request)
        if prediction.status not in ENDED:
            prediction.end("canceled")
        return JSONResponse(prediction.json(self.base_url()))

    async def output(self, request: Request) -> Response:
        """The video, open to everyone and with ranges, as at `replicate.delivery`."""
        prediction = self.predictions.get(request.path_params["id"])
        if prediction is None or prediction.status != "succeeded" or prediction.is_removed:
            return Response("Not Found", 404)
        headers = {"content-type": "video/mp4", "access-control-allow-origin": "*"}
        return file_response(request, prediction.video, headers)

    # Checks

    def admit(self, request: Request, limit: Limit) -> None:
        """Refuse a missing or invalid token, and then what is over the rate limit."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not token:
            raise problem(401, "You did not pass an authentication token", "Unauthenticated")
        if scheme not in ("Bearer", "Token") or token != TOKEN:
            raise problem(401, "You did not pass a valid authentication token", "Unauthenticated")
        limit.check()

    def known_model(self, request: Request) -> Model:
        """The model in the path, or a 404."""
        owner = request.path_params["owner"]
        name = request.path_params["name"]
        model = self.models.get(f"{owner}/{name}")
        if model is None:
            raise not_found()
        return model

    def known_prediction(self, request: Request) -> Prediction:
        """The prediction in the path, or a 404."""
        prediction = self.predictions.get(request.path_params["id"])
        if prediction is None:
            raise not_found()
        return prediction

    def model_of_version(self, version: Any) -> Model:
        """The model of a `version`, or a 422.

        It is `owner/name` (official models only), `owner/name:version` or a version's bare id.
        """
        name, version_id = "", ""
        if isinstance(version, str):
            name, _, version_id = version.rpartition(":")

        official = self.models.get(version_id)
        if official is not None and official.official and not name:
            return official
        model = self.by_version.get(version_id)
        if model is not None and name in ("", model.name):
            return model
        detail = (
            "The specified version does not exist (or perhaps you don't have permission to use it?)"
        )
        raise problem(422, detail, "Invalid version or not permitted")


# Reading requests


async def read_body(
    request: Request, known: tuple[str, ...], required: tuple[str, ...]
) -> dict[str, Any]:
    """Return the JSON object that was sent, or refuse the request."""
    try:
        body = json.loads(await request.body())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise problem(400, "The request body is not a valid JSON object.", "Bad request")

    errors = []
    for name in required:
        if name not in body:
            errors.append(Invalid("required", "(root)", f"{name} is required"))
    for name in body:
        if name not in known:
            description = f"Additional property {name} is not allowed"
            errors.append(Invalid("additional_property_not_allowed", "(root)", description))
    if not isinstance(body.get("input", {}), dict):
        description = "Invalid type. Expected: object, given: another"
        errors.append(Invalid("invalid_type", "input", description))
    refuse_if_any(errors)
    return body


def refuse_if_any(errors: list[Invalid]) -> None:
    """Raise the 422 that lists these errors, if there are any."""
    if errors:
        detail = "".join(f"- {error.field}: {error.description}\n" for error in errors)
        invalid_fields = [error._asdict() for error in errors]
        title = "Input validation failed"
        raise problem(422, detail, title, invalid_fields=invalid_fields)


def parse_cancel_after(header: str | None) -> int | None:
    """Seconds in a Cancel-After header: a number, or `30s`, `5m`, `2h`, `1h30m45s`; 5 s to 24 h."""
    if header is None:
        return None

    seconds = 0
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", header.strip())
    if match is not None:
        hours, minutes, rest = (int(group or 0) for group in match.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    if not MIN_CANCEL_AFTER_S <= seconds <= MAX_CANCEL_AFTER_S:
        detail = f"Invalid Cancel-After header: {header!r} is not a duration between 5s and 24h"
        raise problem(400, detail, "Bad request")
    return seconds


def parse_time(text: str) -> datetime:
    """A time in ISO 8601, in UTC if it names no zone.

    A plus that was not percent-encoded arrives as a space, and is refused.
    """
    pattern = (
        r"(\d{4}-\d\d-\d\d)"  # day
        r"(?:T(\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,6}))?)?"  # clock and fraction of a second
        r"(Z|[+-]\d\d:\d\d)?"  # zone
    )
    detail = f"created_after: {text!r} is not a date-time in ISO 8601"
    match = re.fullmatch(pattern, text)
    if match is None:
        raise problem(400, detail, "Bad request")

    day, clock, fraction, zone = match.groups("")
    clock = clock or "00:00"
    zone = zone.replace("Z", "") or "+00:00"
    try:
        whole_seconds = datetime.fromisoformat(f"{day}T{clock}{zone}")
    except ValueError:
        raise problem(400, detail, "Bad request") from None
    return whole_seconds + timedelta(microseconds=int(fraction.ljust(6, "0")))


def cursor_after(last: Prediction) -> str:
    """The cursor for the page after this prediction."""
    return base64.urlsafe_b64encode(f"p={last.id}".encode()).decode()


def parse_cursor(cursor: str, predictions: list[Prediction]) -> int:
    """The index at which this cursor's page begins, or a 404."""
    for index, prediction in enumerate(predictions, start=1):
        if cursor_after(prediction) == cursor:
            return index
    raise problem(404, "Invalid cursor")


# Responses


def problem(status: int, detail: str, title: str | None = None, **more: Any) -> Refusal:
    """Replicate's error shape."""
    body = {"detail": detail, "status": status}
    if title:
        body["title"] = title
    body.update(more)
    return Refusal(JSONResponse(body, status, media_type="application/problem+json"))


def not_found() -> Refusal:
    """The 404 for an unknown model or prediction, and for a community model's official route."""
    return problem(404, "The requested resource could not be found.")


def default_body(status: int) -> Any:
    """The body of a fault with this status, in the provider's own shape."""
    details = {
        401: "You did not pass a valid authentication token",
        402: "You have insufficient credit to run this model.",
        404: "The requested resource could not be found.",
        429: "Request was throttled. Your rate limit resets in ~1s.",
    }
    return {"detail": details.get(status, "Internal server error"), "status": status}


def version_json(model: Model) -> dict[str, Any]:
    """A version of a model as Replicate shows it."""
    return {
        "id": model.version,
        "created_at": model.created_at,
        "cog_version": "0.16.9",
        "openapi_schema": model.document(),
    }


def timestamp(moment: datetime) -> str:
    """A time as Replicate writes it."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id() -> str:
    """An id for a prediction."""
    return base64.b32encode(uuid.uuid4().bytes).decode().rstrip("=").lower()


# From an input to a video


def first_picture(model: Model, values: dict[str, Any]) -> str | None:
    """The URL of the picture to animate.

    It is the first file field in the input that is no audio, mask, reference or last frame.
    """
    for name, prop in model.properties.items():
        is_other_file = re.search(r"audio|last|end|mask|reference|video|lora", name)
        if prop.get("format") == "uri" and not is_other_file and values.get(name):
            return str(values[name])
    return None


def video_plan(model: Model, values: dict[str, Any]) -> media.VideoPlan:
    """The length, size and frame rate that the input asks for, or the model's defaults."""
    fps = int(model.default(values, "frames_per_second", "fps") or FPS)
    frames = model.default(values, "num_frames", "length")
    if frames:
        seconds = float(frames) / fps
    else:
        seconds = float(model.default(values, "duration") or DEFAULT_SECONDS)

    short_side = SHORT_SIDE_PIXELS
    resolution = model.default(values, "resolution", "quality", "target_size")
    match = re.match(r"\d+", str(resolution or ""))
    if match is not None:
        short_side = int(match[0])
    return media.VideoPlan(seconds, short_side, min(fps, MAX_FPS), model.video_format)


def digest(data: bytes) -> bytes:
    """The SHA-256 of these bytes."""
    return sha256(data).digest()
