"""Replicate's predictions, as a stand-in.

Shapes: api.replicate.com/openapi.json, replicate.com/docs (create-a-prediction, predictions.list, models.versions.get,
prediction-lifecycle, data-retention, rate-limits), and recorded replies. Our own guesses: the answers to a malformed
Cancel-After, `created_after` or `cursor`, the text of a failed prediction, and what cancelling an ended prediction
answers. Not imitated: webhooks, `Prefer: wait`, streaming, the list's `created_before` and `source`; what Replicate
removes after an hour is removed here when `Prediction.expire` says so.
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
OUTCOMES = (*ENDED, "never", "queued")  # never: processes for ever; queued: never starts
BODY_FIELDS = ("input", "stream", "webhook", "webhook_events_filter")
CANCEL_AFTER_S = (5, 24 * 3600)
PAGE_SIZE = 100  # predictions a page of the list
SHORT_SIDE_PIXELS, FPS = 720, 24
DEFAULT_SECONDS = 6.0


@dataclass
class Prediction:
    """One prediction and how far it has come; `input` stays readable here after it has expired."""

    id: str
    model: Model
    input: dict[str, Any]
    behaviour: Behaviour
    outcome: str = "succeeded"
    planned_error: str | None = None
    cancel_after: int | None = None
    reads: int = 0
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
        """Replicate's word for how far it is; passing its deadline ends it."""
        if self.ended_as is None and self.cancel_after is not None and self.age_s >= self.cancel_after:
            self.end("canceled" if self.is_started else "aborted")
        return self.ended_as or ("processing" if self.is_started else "starting")

    @property
    def is_started(self) -> bool:
        """Whether it has left the queue: from the second read on."""
        return self.reads >= 2 and self.outcome != "queued"

    @property
    def is_due(self) -> bool:
        """Whether it has been read often enough and is old enough to end now."""
        waits = self.behaviour
        return self.outcome in ENDED and self.reads >= waits.reads_to_finish and self.age_s >= waits.video_seconds

    @property
    def progress(self) -> float:
        """The part done, 0 to 1: by reads or by age, whichever says less."""
        by_reads = self.reads / max(1, self.behaviour.reads_to_finish)
        by_age = self.age_s / self.behaviour.video_seconds if self.behaviour.video_seconds else 1.0
        return 1.0 if self.ended_as == "succeeded" else min(by_reads, by_age, 0.99)

    def end(self, status: str, error: str | None = None) -> None:
        """Reach a final status, once."""
        if self.ended_as is None:
            self.ended_as, self.error, self.ended_after_s = status, error, self.age_s

    def expire(self) -> None:
        """Lose input, output, log and video, as an hour after the end. ValueError if it has not ended."""
        if self.status not in ENDED:
            raise ValueError(f"prediction {self.id} has not ended: {self.status}")
        self.is_removed, self.video = True, b""

    async def read(self) -> None:
        """Count a read, and end if it is time to."""
        if self.status in ENDED:
            return
        self.reads += 1
        if not self.is_due:
            return
        if self.making is not None:
            await self.making  # so that the count of reads does not depend on how long the video takes to make
        self.end("failed" if self.planned_error else self.outcome, self.planned_error)

    def json(self, base_url: str) -> dict[str, Any]:
        """The prediction as Replicate shows it."""
        status, url = self.status, f"{base_url}/v1/predictions/{self.id}"
        shown: dict[str, Any] = {
            "id": self.id,
            "model": self.model.name,
            "version": "hidden" if self.model.official else self.model.version,
            "input": {} if self.is_removed else self.input,
            "logs": None if self.is_removed else self.logs() if self.is_started else "",
            "output": self.output(base_url) if status == "succeeded" and not self.is_removed else None,
            "data_removed": self.is_removed,
            "error": self.error,
            "source": "api",
            "status": status,
            "created_at": timestamp(self.created_at),
            "urls": {"get": url, "cancel": f"{url}/cancel", "web": f"{base_url}/p/{self.id}"},
        }
        if self.cancel_after is not None:
            shown["deadline"] = timestamp(self.created_at + timedelta(seconds=self.cancel_after))
        if self.is_started:
            shown["started_at"] = shown["created_at"]
        if status in ENDED:
            shown["completed_at"] = timestamp(self.created_at + timedelta(seconds=self.ended_after_s))
            shown["metrics"] = {"predict_time": self.ended_after_s, "total_time": self.ended_after_s}
        return shown

    def logs(self) -> str:
        """A log with the progress bar that most models write."""
        percent = int(self.progress * 100)
        steps = percent * 50 // 100
        return f"Using seed: 42\nGenerating video\n{percent:3d}%|{'█' * (percent // 10):<10}| {steps}/50 [00:01<00:01, 25.00it/s]\n"

    def output(self, base_url: str) -> Any:
        """The video's URL in the shape asked for."""
        url = f"{base_url}/delivery/{self.id}/output.mp4"
        shape = self.model.output if self.behaviour.output_shape == "model" else self.behaviour.output_shape
        return {"list": [url], "object": {"video": url}}.get(shape, url)


class Limit:
    """At most so many requests in any minute; None: no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        self.passed: deque[float] = deque()

    def check(self) -> None:
        """Let a request pass, or refuse it with the seconds until there is room."""
        if self.per_minute is None:
            return
        now = time.monotonic()
        while self.passed and self.passed[0] <= now - 60:
            self.passed.popleft()
        if len(self.passed) >= self.per_minute:
            wait = int(self.passed[0] + 60 - now) + 1
            detail = f"Request was throttled. Your rate limit resets in ~{wait}s."
            headers = {"ratelimit-remaining": "0", "ratelimit-reset": str(wait)}
            raise Refusal(JSONResponse({"detail": detail, "status": 429}, 429, headers))
        self.passed.append(now)


class Replicate:
    """The video provider: `predictions` by id; `video` replaces the made video; `outcomes` wait for the next predictions."""

    def __init__(self, behaviour: Behaviour, workshop: Workshop, base_url: Callable[[], str]) -> None:
        self.behaviour, self.workshop, self.base_url = behaviour, workshop, base_url
        self.models = load_models()
        self.by_version = {version.version: version for model in self.models.values() for version in model.versions}
        self.clear()

    def clear(self) -> None:
        """No predictions, nothing planned, no limits."""
        self.predictions: dict[str, Prediction] = {}
        self.outcomes: deque[tuple[str, str | None]] = deque()
        self.video: bytes | None = None
        self.creates, self.others = Limit(None), Limit(None)

    def routes(self, on: Callable[[str, Handler], Any]) -> list[Route]:
        """The calls that are imitated."""
        return [
            Route("/v1/models/{owner}/{name}", on("model", self.model), methods=["GET"]),
            Route("/v1/models/{owner}/{name}/versions/{id}", on("model", self.version), methods=["GET"]),
            Route("/v1/models/{owner}/{name}/predictions", on("create", self.create_official), methods=["POST"]),
            Route("/v1/predictions", on("create", self.create_version), methods=["POST"]),
            Route("/v1/predictions", on("list", self.listing), methods=["GET"]),
            Route("/v1/predictions/{id}", on("read", self.read), methods=["GET"]),
            Route("/v1/predictions/{id}/cancel", on("cancel", self.cancel), methods=["POST"]),
            Route("/delivery/{id}/output.mp4", on("output", self.output), methods=["GET"]),
        ]

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}`: what the model is and takes."""
        self.admit(request, self.others)
        model = self.known_model(request)
        owner, _, name = model.name.partition("/")
        about = {"url": f"https://replicate.com/{model.name}", "owner": owner, "name": name, "visibility": "public"}
        more = {"is_official": model.official, "run_count": 1, "latest_version": version_json(model)}
        return JSONResponse({**about, **more})

    async def version(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}/versions/{id}`: what this version takes."""
        self.admit(request, self.others)
        version = self.by_version.get(request.path_params["id"])
        if version is None or version.name != self.known_model(request).name:
            raise not_found()
        return JSONResponse(version_json(version))

    async def create_official(self, request: Request) -> Response:
        """`POST /v1/models/{owner}/{name}/predictions`: official models only."""
        self.admit(request, self.creates)
        model = self.known_model(request)
        if not model.official:
            raise not_found()
        return self.create(request, model, await read_body(request, BODY_FIELDS, required=("input",)))

    async def create_version(self, request: Request) -> Response:
        """`POST /v1/predictions`: any model, by `version`."""
        self.admit(request, self.creates)
        body = await read_body(request, ("version", *BODY_FIELDS), required=("version", "input"))
        return self.create(request, self.model_of_version(body["version"]), body)

    def create(self, request: Request, model: Model, body: dict[str, Any]) -> Response:
        """Check the input and start a prediction."""
        refuse_if_any(invalid_input(model, body["input"]))
        cancel_after = read_cancel_after(request.headers.get("cancel-after"))
        outcome, error = self.outcomes.popleft() if self.outcomes else ("succeeded", None)
        if outcome == "failed" and error is None:
            error = "Prediction failed."
        identity = base64.b32encode(uuid.uuid4().bytes).decode().rstrip("=").lower()
        prediction = Prediction(identity, model, body["input"], self.behaviour, outcome, error, cancel_after)
        self.predictions[identity] = prediction
        if outcome == "succeeded":
            prediction.making = asyncio.ensure_future(self.make(prediction))
        return JSONResponse(prediction.json(self.base_url()), 201)

    async def make(self, prediction: Prediction) -> None:
        """Make the prediction's video; what goes wrong becomes its error."""
        try:
            prediction.video = self.video if self.video is not None else await self.made_video(prediction)
        except media.MediaError as exc:
            prediction.planned_error = f"Prediction failed: {exc}"

    async def made_video(self, prediction: Prediction) -> bytes:
        """A video of the picture that the input names, with its sound if it names one."""
        model, values = prediction.model, prediction.input
        picture_url, audio_url = first_picture(model, values), values.get("audio")
        if picture_url is None:
            raise media.MediaError("the sandbox videos pictures only, and the input names none")
        picture = await self.workshop.run(lambda: media.fetch(picture_url))
        audio = await self.workshop.run(lambda: media.fetch(audio_url)) if audio_url else None
        plan, follow = video_plan(model, values), model.default(values, "duration") is None
        key = ("video", sha256(picture).digest(), plan, sha256(audio or b"").digest(), follow)
        return await self.workshop.once(key, lambda: media.video(picture, plan, audio, follow and audio is not None))

    async def read(self, request: Request) -> Response:
        """`GET /v1/predictions/{id}`."""
        self.admit(request, self.others)
        prediction = self.known_prediction(request)
        await prediction.read()
        return JSONResponse(prediction.json(self.base_url()))

    async def listing(self, request: Request) -> Response:
        """`GET /v1/predictions`: the account's, newest first, a page at a time; it counts as no read of any of them."""
        self.admit(request, self.others)
        asked = request.query_params
        after = read_moment(asked["created_after"]) if "created_after" in asked else None
        known = sorted(self.predictions.values(), key=lambda one: one.created_at)[::-1]
        wanted = [one for one in known if after is None or one.created_at >= after]
        rest = wanted[read_cursor(asked["cursor"], wanted) :] if "cursor" in asked else wanted
        page, url, following = rest[:PAGE_SIZE], self.base_url(), None
        if len(rest) > PAGE_SIZE:
            kept = {"created_after": asked["created_after"]} if after else {}
            following = f"{url}/v1/predictions?{urlencode({'cursor': cursor_after(page[-1]), **kept})}"
        return JSONResponse({"next": following, "previous": None, "results": [one.json(url) for one in page]})

    async def cancel(self, request: Request) -> Response:
        """`POST /v1/predictions/{id}/cancel`."""
        self.admit(request, self.others)
        prediction = self.known_prediction(request)
        if prediction.status not in ENDED:
            prediction.end("canceled")
        return JSONResponse(prediction.json(self.base_url()))

    async def output(self, request: Request) -> Response:
        """The video itself, on what is `replicate.delivery` in the real world: open to all, with ranges."""
        prediction = self.predictions.get(request.path_params["id"])
        if prediction is None or prediction.status != "succeeded" or prediction.is_removed:
            return Response("Not Found", 404)
        headers = {"content-type": "video/mp4", "access-control-allow-origin": "*"}
        return file_response(request, prediction.video, headers)

    def admit(self, request: Request, limit: Limit) -> None:
        """Refuse a missing or invalid token, then what is over the rate limit."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not token:
            raise problem(401, "You did not pass an authentication token", "Unauthenticated")
        if scheme not in ("Bearer", "Token") or token != TOKEN:
            raise problem(401, "You did not pass a valid authentication token", "Unauthenticated")
        limit.check()

    def known_model(self, request: Request) -> Model:
        """The model in the path, or a 404."""
        model = self.models.get("{owner}/{name}".format_map(request.path_params))
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
        """The model meant by `owner/name` (official ones), `owner/name:version` or a bare version, or a 422."""
        name, _, identity = version.rpartition(":") if isinstance(version, str) else ("", "", "")
        by_name = self.models.get(identity)
        if by_name is not None and by_name.official and not name:
            return by_name
        model = self.by_version.get(identity)
        if model is None or name not in ("", model.name):
            detail = "The specified version does not exist (or perhaps you don't have permission to use it?)"
            raise problem(422, detail, "Invalid version or not permitted")
        return model


# Reading requests


async def read_body(request: Request, known: tuple[str, ...], required: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object sent, or a refusal."""
    try:
        body = json.loads(await request.body())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise problem(400, "The request body is not a valid JSON object.", "Bad request")
    invalid = [Invalid("required", "(root)", f"{name} is required") for name in required if name not in body]
    extra = "additional_property_not_allowed"
    invalid += [
        Invalid(extra, "(root)", f"Additional property {name} is not allowed") for name in body if name not in known
    ]
    if not isinstance(body.get("input", {}), dict):
        invalid.append(Invalid("invalid_type", "input", "Invalid type. Expected: object, given: another"))
    refuse_if_any(invalid)
    return body


def refuse_if_any(invalid: list[Invalid]) -> None:
    """The 422 that lists what is wrong with the input."""
    if invalid:
        detail = "".join(f"- {one.field}: {one.description}\n" for one in invalid)
        raise problem(422, detail, "Input validation failed", invalid_fields=[one._asdict() for one in invalid])


def read_cancel_after(header: str | None) -> int | None:
    """Seconds of a Cancel-After header: a number, or `30s`, `5m`, `2h`, `1h30m45s`; 5 s to 24 h."""
    if header is None:
        return None
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", header.strip())
    seconds = (
        sum(int(part or 0) * unit for part, unit in zip(parts.groups(), (3600, 60, 1), strict=True)) if parts else 0
    )
    if not CANCEL_AFTER_S[0] <= seconds <= CANCEL_AFTER_S[1]:
        raise problem(
            400, f"Invalid Cancel-After header: {header!r} is not a duration between 5s and 24h", "Bad request"
        )
    return seconds


def read_moment(text: str) -> datetime:
    """A moment in ISO 8601, without a zone: in UTC; a plus that was not percent-encoded has become a blank, and is refused."""
    parts = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:T(\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,6}))?)?(Z|[+-]\d\d:\d\d)?", text)
    try:
        day, clock, fraction, zone = parts.groups("") if parts else ("", "", "", "")
        moment = datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone.replace('Z', '') or '+00:00'}")
    except ValueError:
        raise problem(400, f"created_after: {text!r} is not a date-time in ISO 8601", "Bad request") from None
    return moment + timedelta(microseconds=int(fraction.ljust(6, "0")))


def cursor_after(last: Prediction) -> str:
    """What stands for the place behind this prediction in the list."""
    return base64.urlsafe_b64encode(f"p={last.id}".encode()).decode()


def read_cursor(cursor: str, listed: list[Prediction]) -> int:
    """Where the page begins that this cursor names, or a 404."""
    places = {cursor_after(one): place for place, one in enumerate(listed, start=1)}
    if cursor not in places:
        raise problem(404, "Invalid cursor")
    return places[cursor]


def problem(status: int, detail: str, title: str | None = None, **more: Any) -> Refusal:
    """Replicate's error shape."""
    body = {"detail": detail, "status": status, **({"title": title} if title else {}), **more}
    return Refusal(JSONResponse(body, status, media_type="application/problem+json"))


def not_found() -> Refusal:
    """The 404 for an unknown model or prediction, and for a community model on the official route."""
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
    about = {"id": model.version, "created_at": model.created_at, "cog_version": "0.16.9"}
    return {**about, "openapi_schema": model.document()}


# What a video is to be


def first_picture(model: Model, values: dict[str, Any]) -> str | None:
    """The URL of the picture to video: the first file field of the model that is filled and is no sound, mask or end."""
    for name, prop in model.properties.items():
        is_other = re.search(r"audio|last|end|mask|reference|video|lora", name)
        if prop.get("format") == "uri" and not is_other and values.get(name):
            return str(values[name])
    return None


def video_plan(model: Model, values: dict[str, Any]) -> media.VideoPlan:
    """Seconds, size and rate that the input asks for, or the model's defaults."""
    fps = int(model.default(values, "frames_per_second", "fps") or FPS)
    frames = model.default(values, "num_frames", "length")
    seconds = float(frames) / fps if frames else float(model.default(values, "duration") or DEFAULT_SECONDS)
    size = re.match(r"\d+", str(model.default(values, "resolution", "quality", "target_size") or ""))
    return media.VideoPlan(seconds, int(size[0]) if size else SHORT_SIDE_PIXELS, min(fps, 60))


def timestamp(moment: datetime) -> str:
    """A moment as Replicate writes it."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
