"""A stand-in for ElevenLabs' text to speech.

The shapes are from elevenlabs.io/docs/api-reference/text-to-speech, from
elevenlabs.io/docs/eleven-api/resources/errors, and from captured responses. Guessed: which ids
count as malformed, and the wording for an empty text and for an unknown format or model.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import media
from .behaviour import Behaviour, Workshop
from .wire import Handler, Refusal

KEY = "sk_sandbox0123456789abcdef0123456789abcdef01234567"


class Voice(NamedTuple):
    """A voice: its name, and its pitch in the sandbox."""

    name: str
    hertz: float


# Real ids have 20 letters and digits; George's is the example in ElevenLabs' documentation.
LIBRARY_VOICE = "SandboxVoiceLibrary3"  # needs a paid plan
VOICES = {
    "SandboxVoiceRex00001": Voice("Rex", 262.0),
    "SandboxVoiceLuna0002": Voice("Luna", 392.0),
    "JBFqnCBsd6RMkjVDRZzb": Voice("George", 196.0),
    LIBRARY_VOICE: Voice("Bella, of the voice library", 330.0),
}
DEFAULT_MODEL = "eleven_multilingual_v2"
MODELS_MAX_CHARS = {
    "eleven_v3": 5_000,
    "eleven_multilingual_v2": 10_000,
    "eleven_flash_v2_5": 40_000,
    "eleven_turbo_v2_5": 40_000,
    "eleven_flash_v2": 30_000,
    "eleven_turbo_v2": 30_000,
}
PLANS = ("free", "starter", "creator", "pro")  # from the smallest to the largest
FORMAT_NEEDS_PLAN = {"mp3_44100_192": "creator", "pcm_44100": "pro", "wav_44100": "pro"}
ERROR_TYPES = {
    400: "validation_error",
    401: "authentication_error",
    402: "payment_required",
    403: "authorization_error",
    404: "not_found",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class ElevenLabs:
    """The speech provider; `made` counts how often each text was spoken and paid for."""

    def __init__(self, behaviour: Behaviour, workshop: Workshop) -> None:
        self.behaviour = behaviour
        self.workshop = workshop
        self.under_way = 0  # speeches that are being made
        self.clear()

    def clear(self) -> None:
        """Forget all speech."""
        self.made: Counter[str] = Counter()

    def routes(self, on: Callable[[str, Handler], Any]) -> list[Route]:
        """The one call that is imitated."""
        path = "/v1/text-to-speech/{voice_id}"
        return [Route(path, on("speech", self.speech), methods=["POST"])]

    async def speech(self, request: Request) -> Response:
        """`POST /v1/text-to-speech/{voice_id}?output_format=...`: return the speech as bytes."""
        check_key(request.headers)
        body = await read_body(request)
        voice_hz = self.check_voice(request.path_params["voice_id"])
        output_format = self.check_format(
            request.query_params.get("output_format", "mp3_44100_128")
        )
        text = check_text(body)

        with self.slot():
            await asyncio.sleep(self.behaviour.speech_delay_s)
            audio = await self.make_speech(text, voice_hz, output_format)
        self.made[text] += 1
        # The API reference has no other media type than this one, whatever the format.
        return Response(audio, headers=response_headers(text), media_type="audio/mpeg")

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the plan's slots, or refuse the speech if none is free."""
        slots = self.behaviour.speech_slots
        if slots is not None and self.under_way >= slots:
            raise refusal(
                429,
                "concurrent_limit_exceeded",
                f"Too many concurrent requests. Your plan has a maximum of {slots}.",
                status="too_many_concurrent_requests",
            )
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def make_speech(self, text: str, voice_hz: float, output_format: str) -> bytes:
        """Speak the text, or return what was made of the same text before."""
        seconds = self.behaviour.speech_seconds
        tones = self.behaviour.tones
        return await self.workshop.once(
            ("speech", text, voice_hz, output_format, seconds, tones),
            lambda: media.speech(text, output_format, voice_hz, seconds, tones),
        )

    def check_voice(self, voice_id: str) -> float:
        """Return the voice's pitch in hertz, or refuse the voice."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{2,}", voice_id):
            raise old_refusal(
                400,
                "invalid_uid",
                f"An invalid ID has been received: '{voice_id}'. "
                "Make sure to provide a correct one.",
            )
        if voice_id not in VOICES:
            message = f"A voice with voice_id '{voice_id}' was not found."
            raise refusal(404, "voice_not_found", message)
        if voice_id == LIBRARY_VOICE and self.behaviour.plan == "free":
            raise refusal(
                402,
                "paid_plan_required",
                "Free users cannot use library voices via the API. "
                "Please upgrade your subscription to use this voice.",
                status="payment_required",
            )
        return VOICES[voice_id].hertz

    def check_format(self, output_format: str) -> str:
        """Return the format, or refuse it: unknown, or not included in the plan."""
        if output_format not in media.FORMATS:
            message = f"Output format '{output_format}' is not supported."
            raise refusal(400, "invalid_output_format", message)

        needed_plan = FORMAT_NEEDS_PLAN.get(output_format, "free")
        if PLANS.index(self.behaviour.plan) < PLANS.index(needed_plan):
            raise old_refusal(
                403,
                "output_format_not_allowed",
                f"Output format '{output_format}' is only available on the "
                f"{needed_plan.title()} tier and above",
            )
        return output_format


# Checks


def check_key(headers: Any) -> None:
    """Refuse a missing or unknown API key."""
    key = headers.get("xi-api-key")
    if not key:
        message = "Neither authorization header nor xi-api-key received, please provide one."
        raise old_refusal(401, "needs_authorization", message)
    if key != KEY:
        raise old_refusal(401, "invalid_api_key", "Invalid API key")


async def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object that was sent, or refuse the request."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip() != "application/json":
        message = "Content-Type must be application/json."
        raise refusal(400, "invalid_content_type", message, kind="invalid_request")

    try:
        body = json.loads(await request.body())
    except ValueError as exc:
        message = "The request body is not valid JSON."
        raise refusal(400, "malformed_json", message, kind="invalid_request") from exc

    if not isinstance(body, dict):
        raise invalid_field([], "Input should be a valid dictionary", "dict_type")
    for name in ("text", "model_id"):
        if name in body and not isinstance(body[name], str):
            raise invalid_field([name], "Input should be a valid string", "string_type")
    if "text" not in body:
        raise invalid_field(["text"], "Field required", "missing")
    return body


def check_text(body: dict[str, Any]) -> str:
    """Return the text, or refuse it: an unknown model, no text, or too long for the model."""
    text = body["text"]
    model = body.get("model_id", DEFAULT_MODEL)
    if model not in MODELS_MAX_CHARS:
        message = f"A model with model ID {model} does not exist."
        raise refusal(400, "model_not_found", message)
    if not text.strip():
        raise refusal(400, "empty_text", "The text to speak is empty.")

    limit = MODELS_MAX_CHARS[model]
    if len(text) > limit:
        raise old_refusal(
            400,
            "max_character_limit_exceeded",
            f"This request's text has {len(text)} characters "
            f"and exceeds the character limit of {limit} characters.",
        )
    return str(text)


# Responses


def refusal(
    http_status: int,
    code: str,
    message: str,
    status: str | None = None,
    kind: str | None = None,
) -> Refusal:
    """The documented error shape of 2026."""
    detail = {
        "type": kind or ERROR_TYPES[http_status],
        "code": code,
        "message": message,
        "status": status or code,
        "request_id": uuid.uuid4().hex,
    }
    return Refusal(JSONResponse({"detail": detail}, http_status))


def old_refusal(http_status: int, status: str, message: str) -> Refusal:
    """The older error shape, which some errors still have."""
    detail = {"status": status, "message": message}
    return Refusal(JSONResponse({"detail": detail}, http_status))


def invalid_field(location: list[str], message: str, kind: str) -> Refusal:
    """The 422 of the API reference: a list under `detail`."""
    error = {"loc": ["body", *location], "msg": message, "type": kind}
    return Refusal(JSONResponse({"detail": [error]}, 422))


def response_headers(text: str) -> dict[str, str]:
    """The headers that come with speech."""
    return {
        "character-cost": str(len(text)),
        "request-id": uuid.uuid4().hex[:20],
        "history-item-id": uuid.uuid4().hex[:20],
        "current-concurrent-requests": "1",
        "maximum-concurrent-requests": "10",
        "x-trace-id": uuid.uuid4().hex,
        "x-region": "sandbox",
    }


def default_body(status: int) -> Any:
    """The body of a fault with this status, in the provider's own shape."""
    if status == 401:
        code = "quota_exceeded"
        message = "This request exceeds your quota of 10000. You have 0 credits remaining."
    elif status == 429:
        code = "too_many_concurrent_requests"
        message = "Too many concurrent requests."
    elif status == 503:
        code = "service_unavailable"
        message = "The service is temporarily unavailable."
    else:
        code = "internal_error"
        message = "An internal error occurred."
    kind = ERROR_TYPES.get(status, "internal_error")
    return {"detail": {"type": kind, "code": code, "status": code, "message": message}}
