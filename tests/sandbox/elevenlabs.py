"""ElevenLabs' text to speech, as a stand-in.

Shapes: elevenlabs.io/docs/api-reference/text-to-speech and .../docs/eleven-api/resources/errors, and captured replies.
Our own guesses: which ids count as malformed, and the wording for an empty text and for an unknown format or model.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import media
from .behaviour import Behaviour, Workshop
from .wire import Handler, Refusal

KEY = "sk_sandbox0123456789abcdef0123456789abcdef01234567"


class Voice(NamedTuple):
    """A voice: its name, and the pitch that it has here."""

    name: str
    hertz: float


LIBRARY_VOICE = "SandboxVoiceLibrary3"  # a paid plan is required to use such a voice over the API
VOICES = {  # 20 letters and digits, as real ids have; George's is the example in ElevenLabs' documents
    "SandboxVoiceRex00001": Voice("Rex", 262.0),
    "SandboxVoiceLuna0002": Voice("Luna", 392.0),
    "JBFqnCBsd6RMkjVDRZzb": Voice("George", 196.0),
    LIBRARY_VOICE: Voice("Bella, of the voice library", 330.0),
}
MODELS_MAX_CHARS = {
    "eleven_v3": 5_000,
    "eleven_multilingual_v2": 10_000,
    "eleven_flash_v2_5": 40_000,
    "eleven_turbo_v2_5": 40_000,
    "eleven_flash_v2": 30_000,
    "eleven_turbo_v2": 30_000,
}
PLANS = ("free", "starter", "creator", "pro")
FORMAT_NEEDS_PLAN = {"mp3_44100_192": "creator", "pcm_44100": "pro", "wav_44100": "pro"}
TYPES = {
    400: "validation_error",
    401: "authentication_error",
    402: "payment_required",
    403: "authorization_error",
    404: "not_found",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class ElevenLabs:
    """The speech provider: `plan` (on the behaviour) says what the account may use; `made` counts what it paid for."""

    def __init__(self, behaviour: Behaviour, workshop: Workshop) -> None:
        self.behaviour, self.workshop = behaviour, workshop
        self.clear()

    def clear(self) -> None:
        """Nothing spoken yet."""
        self.made: Counter[str] = Counter()

    def routes(self, on: Callable[[str, Handler], Any]) -> list[Route]:
        """The one call that is imitated."""
        return [Route("/v1/text-to-speech/{voice_id}", on("speech", self.speech), methods=["POST"])]

    async def speech(self, request: Request) -> Response:
        """`POST /v1/text-to-speech/{voice_id}?output_format=...`: the sound itself."""
        check_key(request.headers)
        wanted = await read_body(request)
        voice_hz = self.check_voice(request.path_params["voice_id"])
        output_format = self.check_format(request.query_params.get("output_format", "mp3_44100_128"))
        text = check_text(wanted)
        seconds, tones = self.behaviour.speech_seconds, self.behaviour.tones
        sound = await self.workshop.once(
            ("speech", text, voice_hz, output_format, seconds, tones),
            lambda: media.speech(text, output_format, voice_hz, seconds, tones),
        )
        self.made[text] += 1
        # The published document knows no other media type than this one, whatever the format.
        return Response(sound, headers=answer_headers(text), media_type="audio/mpeg")

    def check_voice(self, voice_id: str) -> float:
        """The voice's pitch in hertz, or a refusal."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{2,}", voice_id):
            message = f"An invalid ID has been received: '{voice_id}'. Make sure to provide a correct one."
            raise Refusal(JSONResponse({"detail": {"status": "invalid_uid", "message": message}}, 400))
        if voice_id not in VOICES:
            raise refusal(404, "voice_not_found", f"A voice with voice_id '{voice_id}' was not found.")
        if voice_id == LIBRARY_VOICE and self.behaviour.plan == "free":
            message = (
                "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice."
            )
            raise refusal(402, "paid_plan_required", message, status="payment_required")
        return VOICES[voice_id].hertz

    def check_format(self, output_format: str) -> str:
        """The format if it exists and the plan includes it."""
        if output_format not in media.FORMATS:
            raise refusal(400, "invalid_output_format", f"Output format '{output_format}' is not supported.")
        needed = FORMAT_NEEDS_PLAN.get(output_format, "free")
        if PLANS.index(self.behaviour.plan) < PLANS.index(needed):
            message = f"Output format '{output_format}' is only available on the {needed.title()} tier and above"
            raise Refusal(JSONResponse({"detail": {"status": "output_format_not_allowed", "message": message}}, 403))
        return output_format


def check_key(headers: Any) -> None:
    """Refuse a missing or unknown key."""
    key = headers.get("xi-api-key")
    if not key:
        message = "Neither authorization header nor xi-api-key received, please provide one."
        raise Refusal(JSONResponse({"detail": {"status": "needs_authorization", "message": message}}, 401))
    if key != KEY:
        raise Refusal(JSONResponse({"detail": {"status": "invalid_api_key", "message": "Invalid API key"}}, 401))


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object sent, or a refusal."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise refusal(400, "invalid_content_type", "Content-Type must be application/json.", kind="invalid_request")
    try:
        wanted = json.loads(await request.body())
    except ValueError as exc:
        raise refusal(400, "malformed_json", "The request body is not valid JSON.", kind="invalid_request") from exc
    if not isinstance(wanted, dict):
        raise invalid_field([], "Input should be a valid dictionary", "dict_type")
    for name in ("text", "model_id"):
        if name in wanted and not isinstance(wanted[name], str):
            raise invalid_field([name], "Input should be a valid string", "string_type")
    if "text" not in wanted:
        raise invalid_field(["text"], "Field required", "missing")
    return wanted


def check_text(wanted: dict[str, Any]) -> str:
    """The text if the model exists and takes that much."""
    text, model = wanted["text"], wanted.get("model_id", "eleven_multilingual_v2")
    if model not in MODELS_MAX_CHARS:
        raise refusal(400, "model_not_found", f"A model with model ID {model} does not exist.")
    if not text.strip():
        raise refusal(400, "empty_text", "The text to speak is empty.")
    limit = MODELS_MAX_CHARS[model]
    if len(text) > limit:
        message = (
            f"This request's text has {len(text)} characters and exceeds the character limit of {limit} characters."
        )
        raise Refusal(JSONResponse({"detail": {"status": "max_character_limit_exceeded", "message": message}}, 400))
    return str(text)


def refusal(http_status: int, code: str, message: str, status: str | None = None, kind: str | None = None) -> Refusal:
    """The documented error shape of 2026."""
    detail = {
        "type": kind or TYPES[http_status],
        "code": code,
        "message": message,
        "status": status or code,
        "request_id": uuid.uuid4().hex,
    }
    return Refusal(JSONResponse({"detail": detail}, http_status))


def invalid_field(loc: list[str], message: str, kind: str) -> Refusal:
    """The 422 of the published document: a list under `detail`."""
    return Refusal(JSONResponse({"detail": [{"loc": ["body", *loc], "msg": message, "type": kind}]}, 422))


def answer_headers(text: str) -> dict[str, str]:
    """What a real answer carries beside the sound."""
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
    known = {
        401: ("quota_exceeded", "This request exceeds your quota of 10000. You have 0 credits remaining."),
        429: ("too_many_concurrent_requests", "Too many concurrent requests."),
        503: ("service_unavailable", "The service is temporarily unavailable."),
    }
    code, message = known.get(status, ("internal_error", "An internal error occurred."))
    return {"detail": {"type": TYPES.get(status, "internal_error"), "code": code, "status": code, "message": message}}
