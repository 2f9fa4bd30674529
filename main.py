"""Talking Pet: a photo of a pet and a line of text go in, a video in which the pet says it comes out.

One FastAPI service without a queue. A front end POSTs a job, waits, and gets the URLs in the response:

    POST /jobs_prompt_only   picture + prompt         -> video_url
    POST /jobs_prompt_tts    picture + prompt + text  -> audio_url, video_url, final_url
    POST /debug/head         url                      -> status, content type and size of a remote file
    GET  /health                                      -> {"ok": true}

A speech job, in sequence: ElevenLabs speaks the text, Supabase Storage keeps the speech, Replicate animates
the picture, ffmpeg puts speech and video together, Supabase Storage keeps the final video. With
`Accept: text/event-stream` the response is a stream of progress events. With an `Idempotency-Key` a request
is safe to retry: one video is paid for, and its URLs are returned.

Run it:       uvicorn main:app             (the API keys: see .env.example)
Without keys: python -m tests.sandbox      (local stand-ins of the three providers)
"""

import asyncio
import errno
import hmac
import html
import ipaddress
import json
import logging
import math
import os
import random
import re
import shutil
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from itertools import islice
from pathlib import Path
from subprocess import DEVNULL
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

import anyio
import httpcore
import httpx
import imageio_ffmpeg  # type: ignore[import-untyped]
from dotenv import dotenv_values
from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

current_request_id: ContextVar[str] = ContextVar("request_id", default="-")
logger = logging.getLogger("talking_pet")

# ---- Limits and timings ----------------------------------------------------------------------------

MAX_REQUEST_BYTES = 64 * 1024
MAX_SPEECH_BYTES = 9_500_000
MAX_DOWNLOAD_BYTES = 100_000_000  # a final video has no more either
MAX_RESPONSE_BYTES = 2_000_000  # of a provider's JSON; the largest model schemas have some 100 kB
MAX_PREDICTION_BYTES = 8_000_000  # of one prediction with its whole log, or of a hundred in a list
MAX_DETAIL_CHARS = 300  # of a provider's own message that is passed on
CHUNK_BYTES = 128 * 1024  # to and from disk at a time: each chunk takes a turn of a thread

# What is read of a model's schema and output, which anybody may publish, and of its video.
MAX_SCHEMA_PARTS = 4  # of one property: an enum stands behind one, a nullable value behind two
MAX_SCHEMA_DEPTH = 4
MAX_SCHEMA_FIELDS = 300  # well-known models have up to fifteen
MAX_OUTPUT_URLS = 1_000  # the video's URL is among the first few
MAX_MP4_BOXES = 10_000  # at the top level; a fragmented video has some hundreds
MAX_MP4_INDEX_BYTES = 1_000_000  # of `moov`; the video's description is near its start
MAX_HEAD_BYTES = 64 * 1024  # of a file, from which its format is known

# Seconds of silence on a connection, not of a whole call.
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
SPEECH_TIMEOUT = httpx.Timeout(120.0, connect=10.0)  # ElevenLabs responds when all is spoken
CREATE_TIMEOUT = httpx.Timeout(20.0, connect=10.0)  # Replicate responds at once

# Retry and wait limits as fractions of PATIENCE_SECONDS; beside each its default in seconds.
PAID_SHARE = 1.0  # 120: retries of an upload or download after the video is paid for
THROTTLE_SHARE = 1 / 2  # 60: retries of a 429, which costs nothing
MAX_WAIT_SHARE = 1 / 4  # 30: the longest single wait between two attempts
CANCEL_SHARE = 1 / 4  # 30: cancelling a prediction
REJECTED_POLL_SHARE = 1 / 4  # 30: polls that are answered 401, 403 or 404
LEASE_SHARE = 1 / 4  # 30: how long another instance counts as working after its last write
DRAIN_SHARE = 1 / 6  # 20: jobs with a key at the end of the process
SEARCH_SHARE = 1 / 12  # 10: the search for a prediction whose create had no response
MAX_BACKOFF_S = 8.0  # 0.5 s, 1 s, 2 s, 4 s, 8 s, 8 s, ... from RETRY_FIRST_SECONDS on

# Graceful shutdown, whatever PATIENCE_SECONDS is. Render kills the process 40 s after uvicorn's own
# grace period (render.yaml), so the two waits together stay below that.
SHUTDOWN_WAIT_S = 25.0  # for all jobs to end
MAX_DRAIN_S = 20.0  # of it, for jobs with a key to end by themselves
MAX_RECORD_SAVE_S = 4.0  # for a job that was stopped to write its record

# Polling (see poll_delay_s).
POLL_SHARE = 0.025  # a wait as a share of the time waited so far
POLL_MAX_S = 2.0
RECENT_DURATIONS = 30  # of the last videos of one kind
DUE_SHARE = 0.8  # of the shortest recent duration: from there on the video is expected
EARLY_SHARE = 0.1  # of the shortest recent duration: a wait before the video is expected
DUE_STEP_SHARE = 0.012  # of the shortest recent duration: a wait once the video is expected
DUE_STEP_MAX_S = 0.65
MAX_POLLS_PER_MINUTE = (
    2_400  # of one process; Replicate allows 3,000 (docs rate-limits, 2026-11-22)
)

MIN_CANCEL_AFTER_S = 5  # the least that Replicate's Cancel-After takes (changelog 2025-10-16)
CLOCK_SKEW_S = 5.0  # between this machine and Replicate
MAX_LIST_PAGES = 10  # of a hundred predictions each
MAX_CLAIMED_PREDICTIONS = 10_000  # prediction ids that a process remembers as taken
MODEL_TTL_S = 600.0
MAX_MODELS = 100
DEFAULT_FPS = 24.0  # where a model counts frames and names no rate

SPEECH_OFFSET_MS = 500  # the speech starts half a second in
FFMPEG_TIMEOUT_S = 60.0
MAX_FFMPEG = 4  # at once, and no more than cores: each takes some 50 MB
FFMPEG_MAX_ALLOC_BYTES = 64_000_000  # one allocation; a plane of an 8K frame has less
MUX_MAX_BYTES = 200_000_000  # RLIMIT_DATA of a mux: it takes 66 to 77 MB, a 4K video as well
CONVERT_MAX_BYTES = 450_000_000  # ... of a conversion: it takes 170 to 350 MB
CONVERT_TIMEOUT_S = 180.0
MAX_CONVERT_PIXELS = 1920 * 1088
# Frames a second. A frame that is longer than the speech would not be in the final video at all.
CONVERT_RATE = "min(60,max(12,source_fps))"

HEAD_TIMEOUT_S = 10.0
PICTURE_TIMEOUT_S = 3.0
MAX_REDIRECTS = 5
MAX_DNS_LOOKUPS = 16  # at once, of names that strangers gave
MAX_ADDRESSES = 4  # of one name that are tried

# ---- Settings --------------------------------------------------------------------------------------

MIN_SECRET_CHARS = 8  # shorter ones would be found, and redacted, inside ordinary words
# ElevenLabs' OpenAPI document, parameter output_format (copy of 2026-08-22).
COMPRESSED_FORMATS = r"mp3_22050_32|mp3_24000_48|(mp3_44100|opus_48000)_(32|64|96|128|192)"
RAW_FORMATS = r"(pcm|wav)_(8000|16000|22050|24000|32000|44100|48000)|[au]law_8000"


def check_http_url(value: str) -> str:
    """Return the URL with non-ASCII percent-encoded. Raises ValueError if it is no absolute http(s) URL."""
    if re.search(r"\s", value):
        raise ValueError("must not contain a blank; in a URL it is written %20")
    with suppress(httpx.InvalidURL, ValueError):
        url = httpx.URL(value)
        if url.scheme in ("http", "https") and url.host and "\\" not in value:
            return value if value.isascii() else str(url)
    raise ValueError("must be an absolute http(s) URL")


def check_base_url(value: str) -> str:
    """Return the URL as httpx writes it, without a slash at its end. Raises ValueError."""
    with suppress(ValueError):
        url = httpx.URL(check_http_url(value))
        if not (url.userinfo or url.query or url.fragment):
            return str(url).rstrip("/")
    raise ValueError("must be an absolute http(s) URL, such as https://example.com")


def check_origins(value: str) -> str:
    """Return origins without a slash at their end. Raises ValueError unless each is `*` or an origin."""
    origins = []
    for origin in value.split(","):
        origin = origin.strip().rstrip("/")
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin):
            raise ValueError(
                "must be *, one origin such as https://example.com, or several separated by commas"
            )
        origins.append(origin)
    return ",".join(origins)


def check_secret(secret: SecretStr) -> SecretStr:
    """Return the secret itself. Raises ValueError if it could not be an API key."""
    value = secret.get_secret_value()
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("contains a blank or a character that no key has")
    if len(value) < MIN_SECRET_CHARS:
        raise ValueError(f"must have at least {MIN_SECRET_CHARS} characters")
    return secret


BaseUrl = Annotated[str, AfterValidator(check_base_url)]
ApiKey = Annotated[SecretStr, AfterValidator(check_secret)]


class Settings(BaseModel, frozen=True):
    """The configuration; each field is the environment variable of the same name in capitals."""

    eleven_api_key: ApiKey | None = None
    replicate_api_token: ApiKey | None = None
    supabase_url: BaseUrl | None = None
    supabase_service_role: ApiKey | None = None
    supabase_bucket: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "pets"
    allowed_origin: Annotated[str, AfterValidator(check_origins)] = "*"
    tts_output_format: Annotated[str, Field(pattern=f"^({COMPRESSED_FORMATS}|{RAW_FORMATS})$")] = (
        "mp3_44100_64"
    )
    tts_max_chars: Annotated[int, Field(ge=1)] = 600
    job_timeout_seconds: Annotated[float, Field(ge=1, le=86_400)] = 600
    eleven_base_url: BaseUrl = "https://api.elevenlabs.io"
    replicate_base_url: BaseUrl = "https://api.replicate.com"
    allow_private_urls: bool = False
    poll_min_seconds: Annotated[float, Field(gt=0, le=2)] = 0.25
    retry_first_seconds: Annotated[float, Field(gt=0, le=10)] = 0.5
    patience_seconds: Annotated[float, Field(gt=0, le=600)] = 120
    keepalive_seconds: Annotated[float, Field(gt=0, le=15)] = 10

    def required(self, name: str) -> str:
        """Return a setting that a call cannot do without. Raises MissingSetting naming the variable."""
        value = getattr(self, name)
        if value is None:
            raise MissingSetting(f"The service is not set up for this: set {name.upper()}.")
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        return str(value)

    def secrets(self) -> list[str]:
        """Return every secret that is set."""
        values = [value for _, value in self]
        return [value.get_secret_value() for value in values if isinstance(value, SecretStr)]


SECRET_SETTINGS = ("eleven_api_key", "replicate_api_token", "supabase_service_role")
STORAGE_SETTINGS = ("supabase_url", "supabase_service_role")
VIDEO_JOB_SETTINGS = ("replicate_api_token",)
SPEECH_JOB_SETTINGS = (
    "eleven_api_key",
    "replicate_api_token",
    "supabase_url",
    "supabase_service_role",
)


def read_settings(environment: Mapping[str, str | None]) -> Settings:
    """Read settings from variables; an empty one counts as unset. Raises ValueError naming the variable."""
    values = {}
    for name in Settings.model_fields:
        value = (environment.get(name.upper()) or "").strip()
        if value:
            values[name] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        error = exc.errors()[0]
        name = str(error["loc"][0])
        shown = "(not shown)" if name in SECRET_SETTINGS else repr(values[name])
        message = error["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name.upper()}={shown}: {message}") from None


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return the settings: the environment, then `.env` beside this file. Ends the process if malformed."""
    env_file = Path(__file__).with_name(".env")
    try:
        return read_settings({**dotenv_values(env_file), **os.environ})
    except ValueError as exc:
        raise SystemExit(str(exc)) from None


def require_settings(names: Collection[str]) -> None:
    """Raise MissingSetting naming the first variable that is not set."""
    for name in names:
        get_settings().required(name)


def patience_s(share: float) -> float:
    """Return a share of PATIENCE_SECONDS, in seconds."""
    return get_settings().patience_seconds * share


# ---- Request and response models -------------------------------------------------------------------

Provider = Literal["elevenlabs", "replicate", "supabase"]
Category = Literal["configuration", "validation", "provider", "resource", "internal"]
Stage = Literal["speech", "audio_upload", "video", "download", "convert", "mux", "final_upload"]
StageState = Literal["started", "progress", "done"]
Fit = Literal["shortest", "video", "speech"]

EXAMPLE_BUCKET_URL = "https://your-project.supabase.co/storage/v1/object/public/pets"
EXAMPLE_PICTURE_URL = f"{EXAMPLE_BUCKET_URL}/pet.jpg"
EXAMPLE_AUDIO_URL = f"{EXAMPLE_BUCKET_URL}/audio/0b1f3a52-8d6e-4c6f-9a53-2f4f3c1f7a10.mp3"
EXAMPLE_VIDEO_URL = "https://replicate.delivery/xezq/video.mp4"
EXAMPLE_FINAL_URL = f"{EXAMPLE_BUCKET_URL}/videos/5e0f9d0c-7f0b-4a39-9c1c-7f1f1f0f2b11.mp4"
EXAMPLE_KEY = "8e03978e-40d5-43e8-bc93-6894a57f9324"

MODEL_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9]+)?$"
VOICE_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
SIZE_PATTERN = r"^[A-Za-z0-9]{1,16}$"
KEY_PATTERN = r"^[!-~]{1,255}$"  # draft-ietf-httpapi-idempotency-key-header leaves it to the server
PATTERN_MESSAGES = {
    MODEL_PATTERN: "must be owner/name or owner/name:version",
    VOICE_PATTERN: "must be up to 64 letters, digits, _ and -",
    SIZE_PATTERN: "must be a size such as 768p",
    KEY_PATTERN: "must be 1 to 255 visible ASCII characters, such as a UUID",
}

UrlText = Annotated[str, StringConstraints(strict=True, max_length=4096)]
HttpUrl = Annotated[
    UrlText, AfterValidator(check_http_url), Field(json_schema_extra={"format": "uri"})
]
NonBlank = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]
Size = Annotated[str, StringConstraints(strict=True, pattern=SIZE_PATTERN)]
VoiceId = Annotated[
    str, StringConstraints(strict=True, strip_whitespace=True, pattern=VOICE_PATTERN)
]
ModelName = Annotated[
    str,
    StringConstraints(strict=True, strip_whitespace=True, max_length=200, pattern=MODEL_PATTERN),
]

# What other services call our fields. Ignored, they would buy a video of the wrong length.
FIELD_ALIASES = {
    "duration": "seconds",
    "length": "seconds",
    "image": "image_url",
    "voice": "voice_id",
}


class JobPromptOnly(BaseModel):
    """A picture to animate."""

    image_url: HttpUrl = Field(
        description="Public URL of the picture", examples=[EXAMPLE_PICTURE_URL]
    )
    prompt: NonBlank = Field(
        description="What should happen", examples=["The dog looks up and talks"]
    )
    seconds: int = Field(
        6, strict=True, ge=1, le=600, description="Length of the video; the default model: 6 or 10"
    )
    resolution: Size = Field(
        "768p",
        description="Size of the video; the default model: 512p, 768p, or 1080p with 6 seconds",
    )
    model: ModelName | None = Field(
        None,
        description="Replicate model, owner/name or owner/name:version; null: minimax/hailuo-02",
        examples=["minimax/hailuo-02"],
    )

    @model_validator(mode="before")
    @classmethod
    def reject_misspelled_fields(cls, body: Any) -> Any:
        """Reject fields that are nearly one of ours; all others are ignored. Raises InvalidInput."""
        if not isinstance(body, dict):
            return body
        known = {*JobPromptTTS.model_fields, *FIELD_ALIASES}
        errors: list[InputError] = []
        for name in body:
            if name in JobPromptTTS.model_fields:
                continue
            for match in get_close_matches(name.lower(), known, n=1, cutoff=0.8):
                meant = FIELD_ALIASES.get(match, match)
                if meant in cls.model_fields and meant not in body:
                    message = f"must be called {meant}"
                    errors.append(InputError(loc=["body", redact(name)], msg=message))
        if errors:
            raise InvalidInput(f"{errors[0].loc[1]}: {errors[0].msg}.", errors=errors)
        return body


class JobPromptTTS(JobPromptOnly):
    """A picture to animate, and what it says."""

    text: NonBlank = Field(
        description="What the pet says, at most TTS_MAX_CHARS characters", examples=["Feed me!"]
    )
    voice_id: VoiceId = Field(description="ElevenLabs voice", examples=["JBFqnCBsd6RMkjVDRZzb"])
    fit: Fit = Field(
        "shortest",
        description="What ends the clip. shortest: whichever ends first; video: the video, then "
        "silence if it is longer than the speech; speech: the speech, the video repeats until then",
    )


class HeadRequest(BaseModel):
    """A remote file to check."""

    url: HttpUrl = Field(description="Public URL, ports 80 and 443", examples=[EXAMPLE_PICTURE_URL])


class VideoResult(BaseModel):
    """A silent video."""

    video_url: str = Field(description="Replicate's own URL, which expires after an hour")


class SpeechResult(BaseModel):
    """A talking pet."""

    audio_url: str = Field(description="The speech, in your storage")
    video_url: str = Field(
        description="The silent video: Replicate's own URL, which expires after an hour"
    )
    final_url: str = Field(description="The final video, in your storage")


class HeadResult(BaseModel):
    """What a server answers about a file."""

    status: int = Field(description="HTTP status of the remote answer, redirects followed")
    content_type: str | None
    bytes: int | None = Field(description="Size of the whole file, if the server says")


class PartialResult(BaseModel):
    """What a failed job has made, and paid for, already."""

    audio_url: str | None = None
    video_url: str | None = None
    prediction_id: str | None = Field(
        default=None, description="The video's id at Replicate, which keeps it an hour"
    )


class InputError(BaseModel):
    """One invalid field: where it is, such as `["body", "voice_id"]`, and what is expected there."""

    loc: list[str | int]
    msg: str


class ErrorBody(BaseModel):
    """The body of every error; `partial` and `errors` are left out where they would be empty."""

    detail: str
    category: Category
    provider: Provider | None = None
    request_id: str
    retryable: bool = Field(
        description="The same request, with its Idempotency-Key, can succeed later as it is"
    )
    partial: PartialResult | None = None
    errors: list[InputError] | None = None


class ErrorEvent(ErrorBody):
    """The `error` event that ends a stream: the body of an error, and what its status would be."""

    status: int


class StageEvent(BaseModel):
    """A stage of a job that has started, made progress or is done."""

    stage: Stage
    state: StageState
    seconds: float = Field(description="since the stage started")
    status: str | None = Field(default=None, description="of the prediction, in the stage video")
    percent: int | None = Field(default=None, description="of the video, where the model logs it")


# ---- Errors ----------------------------------------------------------------------------------------
#
# ServiceError              500 internal       anything unforeseen
#   MissingSetting          500 configuration  a variable is unset that this request needs
#   InvalidInput            400 validation     the request can never succeed as it is
#     BlockedUrl            400 validation     the URL leads to where the service must not go
#       PrivateAddress      400 validation     ... to an address inside a network
#   ProviderRefused         400 provider       ElevenLabs or Replicate reject the request's content
#   ProviderFailed          500 provider       ElevenLabs or Replicate fail, or reject our key or plan
#   SpeechTooLarge          400 resource       the speech is larger than the service carries
#   ResourceFailed          500 resource       storage, a download, this machine, or unusable media


class ServiceError(Exception):
    """An error returned to the client; the base class is an internal 500.

    `detail` is safe to show. `response` is the provider's, if there was one. `errors` name the
    invalid fields of the request.
    """

    http_status: int = 500
    category: Category = "internal"
    retryable: bool = True

    def __init__(
        self,
        detail: str,
        provider: Provider | None = None,
        *,
        retryable: bool | None = None,
        response: "ProviderResponse | None" = None,
        errors: "list[InputError] | None" = None,
    ) -> None:
        super().__init__(detail)
        self.detail = redact(detail)
        self.provider = provider
        self.response = response
        self.errors = errors or []
        if retryable is not None:
            self.retryable = retryable

    def add_field_error(self, name: str, message: str, place: str = "body") -> None:
        """Add what is wrong with one field of the request."""
        self.errors.append(InputError(loc=[place, redact(name)], msg=redact(message)))


class MissingSetting(ServiceError):
    """A variable is unset that this request needs."""

    category = "configuration"
    retryable = False


class InvalidInput(ServiceError):
    """The request can never succeed as it is."""

    http_status = 400
    category = "validation"
    retryable = False


class BlockedUrl(InvalidInput):
    """The URL leads to where the service must not go."""


class PrivateAddress(BlockedUrl):
    """The URL leads to an address of this machine or of a network inside."""


class ProviderRefused(ServiceError):
    """ElevenLabs or Replicate reject the request's content, or the video could not be made."""

    http_status = 400
    category = "provider"
    retryable = False


class ProviderFailed(ServiceError):
    """ElevenLabs or Replicate reject the service's key or plan, fail, or do not respond."""

    category = "provider"


class SpeechTooLarge(ServiceError):
    """The speech is larger than the service carries."""

    http_status = 400
    category = "resource"
    retryable = False


class ResourceFailed(ServiceError):
    """Storage, a download, the service's own machine, or media that ffmpeg cannot use."""

    category = "resource"


def invalid_field(name: str, message: str, place: str = "body") -> InvalidInput:
    """Return the error for one invalid field of the request, or for an invalid header."""
    error = InvalidInput(f"{name}: {message}.")
    error.add_field_error(name, message, place)
    return error


def redact(text: str) -> str:
    """Return the text without this service's secrets, and without lone surrogates, which no JSON allows."""
    for secret in get_settings().secrets():
        text = text.replace(secret, "***")
    return text.encode("utf-8", "replace").decode()


def add_request_id_and_redact(record: logging.LogRecord) -> bool:
    """Start a log line with its request id, and keep secrets out of it."""
    prefix = f"request_id={current_request_id.get()} "
    message = record.getMessage()
    if not message.startswith(prefix):  # it does where this file was imported twice
        record.msg = redact(prefix + message)
        record.args = ()
    return True


logger.addFilter(add_request_id_and_redact)


def as_service_error(exc: BaseException) -> ServiceError:
    """Return the error for the client; the traceback of an unforeseen one goes to the log."""
    if isinstance(exc, ServiceError):
        return exc
    logger.error("unforeseen error\n%s", "".join(traceback.format_exception(exc)))
    if isinstance(exc, OSError) and exc.strerror:  # a full disk, a read-only folder ...
        return ResourceFailed(f"The service's own machine failed the job: {exc.strerror}.")
    return ServiceError("An unforeseen error inside the service; its log has the request id.")


# ---- Job state and progress events -----------------------------------------------------------------

Events = asyncio.Queue[StageEvent | None]  # None: there are no more
CancelReason = Literal["client_disconnected", "shutdown"]

# Whose failure it is when a stage does not end in time; None: the checks, where a model is looked up.
STAGE_PROVIDERS: dict[Stage | None, Provider] = {
    None: "replicate",
    "speech": "elevenlabs",
    "audio_upload": "supabase",
    "video": "replicate",
    "final_upload": "supabase",
}


@dataclass(eq=False)
class Job:
    """The work for one request and for those that join it: its stages, results and subscribers."""

    request_id: str
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # equal for equal idempotency keys
    started_at: float = field(default_factory=time.monotonic)
    timings: dict[Stage, float] = field(default_factory=dict)  # seconds, in the order of the stages
    stage_started_at: float = 0.0
    current_stage: Stage | None = None
    partial: PartialResult = field(default_factory=PartialResult)
    event_history: list[StageEvent] = field(default_factory=list)
    subscribers: list[Events] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)  # around its work
    cancel_reason: CancelReason | None = None
    result: BaseModel | ServiceError | None = None
    replayed: bool = False  # the result is an earlier request's
    # Only with an Idempotency-Key:
    record: "JobRecord | None" = None
    search_window: "SearchWindow | None" = None

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time, log and announce one stage."""
        self.current_stage = name
        self.stage_started_at = time.monotonic()
        self.emit("started")

        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            seconds = time.monotonic() - self.stage_started_at
            self.timings[name] = seconds
            logger.info("stage=%s outcome=%s ms=%.0f", name, outcome, seconds * 1000)

        self.emit("done")
        self.current_stage = None  # after a failure it stays: cancellation_error() names it

    def emit(
        self, state: StageState, status: str | None = None, percent: int | None = None
    ) -> None:
        """Send an event to all subscribers, and keep it for those who join; of progress, only the last."""
        event = StageEvent(
            stage=self.current_stage or "video",
            state=state,
            seconds=round(time.monotonic() - self.stage_started_at, 3),
            status=status,
            percent=percent,
        )
        if state == "progress" and self.event_history and self.event_history[-1].state == state:
            self.event_history.pop()
        self.event_history.append(event)
        for queue in self.subscribers:
            queue.put_nowait(event)

    def subscribe(self) -> Events:
        """Return a queue with the events so far, and then each as it happens; None ends it."""
        queue = Events()
        for event in self.event_history:
            queue.put_nowait(event)
        self.subscribers.append(queue)
        return queue

    def unsubscribe(self, queue: Events) -> None:
        """Forget a client that has disconnected or has its response."""
        if queue in self.subscribers:
            self.subscribers.remove(queue)

    def cancel(self, reason: CancelReason) -> None:
        """Cancel the work; the first reason is the one that counts."""
        if self.cancel_reason is None:
            self.cancel_reason = reason
        self.scope.cancel()

    def finish(self) -> None:
        """Log the outcome, and release all who wait."""
        outcome: str = "ok"
        if isinstance(self.result, ServiceError):
            outcome = self.cancel_reason or self.result.category
        elapsed_ms = (time.monotonic() - self.started_at) * 1000
        prediction_id = self.partial.prediction_id
        logger.info("job outcome=%s ms=%.0f prediction_id=%s", outcome, elapsed_ms, prediction_id)
        for queue in self.subscribers:
            queue.put_nowait(None)

    def past_deadline(self) -> bool:
        """Return whether JOB_TIMEOUT_SECONDS have passed."""
        return time.monotonic() - self.started_at >= get_settings().job_timeout_seconds

    def cancellation_error(self) -> ServiceError:
        """Return the error of a job that was cancelled, or has passed its deadline."""
        if self.cancel_reason or not self.past_deadline():
            advice = "send the same request again" if self.record else "try again"
            return ServiceError(
                f"The service is restarting and could not finish the job; {advice}."
            )

        stage = self.current_stage
        provider = STAGE_PROVIDERS.get(stage)
        limit_s = get_settings().job_timeout_seconds
        limit = f"The job was not done after {limit_s:g} s"
        detail = f"{limit} and was ended in the stage {stage or 'check'}."
        # The prediction of a job with a key was cancelled: sent again, the request would find it so.
        is_final = bool(self.record and self.partial.prediction_id and stage == "video")
        if provider in ("elevenlabs", "replicate"):
            return ProviderFailed(detail, provider, retryable=not is_final)
        return ResourceFailed(detail, provider)


def error_body(error: ServiceError, request_id: str, job: Job | None) -> dict[str, Any]:
    """Return the body of an error (see ErrorBody); `partial` and `errors` only if they hold something."""
    body: dict[str, Any] = {
        "detail": error.detail,
        "category": error.category,
        "provider": error.provider,
        "retryable": error.retryable,
        "request_id": request_id,
    }
    partial = job.partial.model_dump(exclude_none=True) if job else {}
    if partial:
        body["partial"] = partial
    if error.errors:
        body["errors"] = [invalid.model_dump() for invalid in error.errors]
    return body


# ---- HTTP transport and SSRF protection ------------------------------------------------------------
#
# Every outgoing request passes GuardedTransport. The owner's own addresses (both APIs, the storage) are
# trusted. Every other URL, a redirect's as well, is checked by its form (check_public_url) and then
# connected to by PublicOnlyBackend, which resolves the name once, checks each address, and connects to
# the checked address itself.

# Addresses that ipaddress.is_global lets pass in one Python version or another, or that lead inside.
BLOCKED_NETWORKS = [
    ipaddress.ip_network("100.64.0.0/10"),  # carrier-grade NAT
    ipaddress.ip_network("192.0.0.0/24"),  # IETF protocol assignments
    ipaddress.ip_network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.ip_network("198.18.0.0/15"),  # benchmarks
    ipaddress.ip_network("224.0.0.0/4"),  # multicast
    ipaddress.ip_network("240.0.0.0/4"),  # reserved and broadcast
    ipaddress.ip_network("2001::/23"),  # Teredo and other protocols
    ipaddress.ip_network("2001:db8::/32"),  # documentation
    ipaddress.ip_network("2002::/16"),  # 6to4, an IPv4 address inside
    ipaddress.ip_network("3fff::/20"),  # documentation
]
GLOBAL_UNICAST = ipaddress.ip_network(
    "2000::/3"
)  # without mapped, compatible and NAT64 forms of IPv4
PRIVATE_ADDRESS_DETAIL = "The URL leads to an address that is not public."

# Keys of a request's `extensions` that choose its connection pool.
USER_SUPPLIED = (
    "talking_pet_user_supplied"  # a URL that anybody may ask for: no job waits for its pool
)
NEW_CONNECTION = (
    "talking_pet_new_connection"  # must not be sent twice, so not on a stale connection
)


def is_public(address: str) -> bool:
    """Return whether an address, as getaddrinfo writes it, is on the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if any(ip in network for network in BLOCKED_NETWORKS if network.version == ip.version):
        return False
    return ip.is_global and (ip.version == 4 or ip in GLOBAL_UNICAST)


def check_public_url(url: httpx.URL) -> None:
    """Refuse a URL by its form alone; names are resolved later. Raises BlockedUrl saying what is wrong."""
    host = url.raw_host.decode("ascii").rstrip(".")
    if url.scheme not in ("http", "https"):
        raise BlockedUrl("Only http and https URLs are fetched.")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", host):
        raise BlockedUrl("The URL's host is not a plain name or address.")

    # As browsers do: a host that ends in a number is an IPv4 address, and only its plain form is taken.
    is_v4 = re.fullmatch(r"(.*\.)?(\d+|0[xX][0-9A-Fa-f]*)", host)
    if is_v4 and not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){3}", host):
        raise PrivateAddress("The URL's address is not written in its plain form.")
    if (is_v4 or ":" in host) and not is_public(host):
        raise PrivateAddress(PRIVATE_ADDRESS_DETAIL)
    if host.lower().rpartition(".")[2] == "localhost":  # not resolved: systems differ
        raise PrivateAddress(PRIVATE_ADDRESS_DETAIL)

    if url.userinfo:
        raise BlockedUrl("A URL with a user name or password is not fetched.")
    if url.port not in (None, 80, 443):
        raise BlockedUrl("Only the ports 80 and 443 are fetched from.")


def is_trusted(url: httpx.URL) -> bool:
    """Return whether a URL is the owner's own (an API, the storage); any is with ALLOW_PRIVATE_URLS."""
    settings = get_settings()
    if settings.allow_private_urls:
        return True
    if ".." in unquote(str(url)):  # left encoded by httpx, it could lead out of the base URL
        return False
    storage_url = f"{settings.supabase_url}/storage/v1/object"
    bases = (settings.eleven_base_url, settings.replicate_base_url, storage_url)
    return any(str(url).startswith(f"{base}/") for base in bases)


class DnsResolver:
    """Name look-ups in daemon threads of their own, at most MAX_DNS_LOOKUPS at once.

    getaddrinfo blocks and cannot be cancelled. A stranger's slow name holds up neither the threads that
    files need nor the end of the process, which waits for every thread that is not a daemon.
    """

    def __init__(self) -> None:
        self._free_threads = asyncio.Semaphore(MAX_DNS_LOOKUPS)

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses of a name. Raises OSError or UnicodeError if there are none."""
        await self._free_threads.acquire()
        loop = asyncio.get_running_loop()
        resolved: asyncio.Future[list[str]] = loop.create_future()

        def finish(addresses: list[str], error: Exception | None) -> None:
            self._free_threads.release()
            if resolved.done():  # nobody waits any more
                return
            if error is None:
                resolved.set_result(addresses)
            else:
                resolved.set_exception(error)

        def look_up() -> None:
            addresses: list[str] = []
            error = None
            try:
                entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses = [str(entry[4][0]) for entry in entries]
            except (OSError, UnicodeError) as exc:
                error = exc
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(finish, addresses, error)

        threading.Thread(target=look_up, name="dns-lookup", daemon=True).start()
        return await resolved


class PublicOnlyBackend(httpcore.AnyIOBackend):
    """Connects to public addresses only: the name is resolved once, checked, and then used."""

    def __init__(self) -> None:
        super().__init__()
        self._resolver = DnsResolver()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that accepts. Raises PrivateAddress if any is not public."""
        addresses = await self._resolve(host, port, timeout)
        if not all(map(is_public, addresses)):
            raise PrivateAddress(PRIVATE_ADDRESS_DETAIL)

        connect = super().connect_tcp
        addresses = addresses[:MAX_ADDRESSES]
        for address in addresses[:-1]:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await connect(address, port, timeout, local_address, socket_options)
        return await connect(addresses[-1], port, timeout, local_address, socket_options)

    async def _resolve(self, host: str, port: int, timeout_s: float | None) -> list[str]:
        with suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        try:
            with anyio.fail_after(timeout_s):
                return await self._resolver.resolve(host, port)
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout(f"looking up {host} took too long") from exc
        except (OSError, UnicodeError) as exc:
            raise httpcore.ConnectError(f"{host} has no address") from exc


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Return the trusted certificates, SSL_CERT_FILE and SSL_CERT_DIR honoured; loading takes some 15 ms."""
    return httpx.create_ssl_context(trust_env=True)


def connection_pool(
    backend: httpcore.AsyncNetworkBackend, max_idle: int = 10
) -> httpcore.AsyncConnectionPool:
    """Return a pool, without proxies, whose connections `backend` makes.

    The number of connections is not limited: each waiting job may need one. Ten idle ones are enough for
    40 polls a second, and httpcore looks at each of them twice a request.
    """
    return httpcore.AsyncConnectionPool(
        ssl_context=tls_context(),
        max_connections=None,
        max_keepalive_connections=max_idle,
        keepalive_expiry=15.0,
        network_backend=backend,
    )


@contextmanager
def httpcore_errors_as_httpx() -> Iterator[None]:
    """Raise httpcore's exceptions as httpx's of the same name, as httpx's own transport does."""
    try:
        yield
    except (
        httpcore.TimeoutException,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
    ) as exc:
        error_class: type[httpx.TransportError] = getattr(httpx, type(exc).__name__)
        raise error_class(str(exc)) from exc


class HttpcoreStream(httpx.AsyncByteStream):
    """A response's body as httpx reads it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body in parts."""
        with httpcore_errors_as_httpx():
            async for part in self._stream:
                yield part

    async def aclose(self) -> None:
        """Return the connection to its pool, or close it if the body was not read to its end."""
        await self._stream.aclose()


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends each request through a pool: two for the owner's own addresses, two guarded ones for all others."""

    def __init__(self) -> None:
        self.trusted = connection_pool(httpcore.AnyIOBackend())
        self.new_connections = connection_pool(httpcore.AnyIOBackend(), max_idle=0)
        self.public = connection_pool(PublicOnlyBackend())
        self.user_supplied = connection_pool(PublicOnlyBackend())

    def pool_for(self, request: httpx.Request) -> httpcore.AsyncConnectionPool:
        """Return the pool for a request. Raises BlockedUrl."""
        if is_trusted(request.url):
            if NEW_CONNECTION in request.extensions:
                return self.new_connections
            return self.trusted
        check_public_url(request.url)
        if USER_SUPPLIED in request.extensions:
            return self.user_supplied
        return self.public

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; each redirect comes here again. Raises BlockedUrl, httpx.TransportError."""
        pool = self.pool_for(request)
        raw_request = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme,
                host=request.url.raw_host,
                port=request.url.port,
                target=request.url.raw_path,
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with httpcore_errors_as_httpx():
            response = await pool.handle_async_request(raw_request)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=HttpcoreStream(response.stream),
            extensions=response.extensions,
        )

    async def check_guard(self) -> None:
        """Raise RuntimeError unless both guarded pools refuse an inside address."""
        for pool in (self.public, self.user_supplied):
            try:
                await pool.request("GET", "http://127.0.0.1:9/")  # the discard port: nobody listens
            except PrivateAddress:
                continue
            except Exception as exc:  # it has tried to connect
                raise RuntimeError("The SSRF guard is not in place.") from exc
            raise RuntimeError("The SSRF guard is not in place.")

    async def aclose(self) -> None:
        """Close every connection."""
        for pool in (self.trusted, self.new_connections, self.public, self.user_supplied):
            await pool.aclose()


class ModelLookup(NamedTuple):
    """A model that is being looked up or was, and when it is to be looked up again."""

    task: "asyncio.Task[VideoModel]"
    expires_at: float  # time.monotonic()


@dataclass
class AppState:
    """What all requests of this process share; the lifespan holds it."""

    http: httpx.AsyncClient
    ffmpeg_slots: asyncio.Semaphore
    conversion_slot: asyncio.Semaphore  # of its own: no mux waits for a conversion
    open_requests: int = 0  # that have no response yet
    jobs: dict[str, Job] = field(default_factory=dict)  # running ones, by Job.name
    claimed_predictions: deque[tuple[str, str]] = field(  # prediction id, Job.name
        default_factory=lambda: deque(maxlen=MAX_CLAIMED_PREDICTIONS)
    )
    active_polls: int = 0  # predictions that are being waited for
    recent_durations: dict[str, deque[float]] = field(default_factory=dict)  # seconds, by kind
    models: dict[str, ModelLookup] = field(default_factory=dict)  # by the name that was asked for


_state: AppState | None = None  # set by the lifespan


def app_state() -> AppState:
    """Return what requests share. Raises RuntimeError outside the application's lifespan."""
    if _state is None:
        raise RuntimeError("The application is not running: enter lifespan(app) first.")
    return _state


@asynccontextmanager
async def open_app_state() -> AsyncIterator[AppState]:
    """Yield the shared state with its HTTP client, which is closed at the end. Raises RuntimeError."""
    transport = GuardedTransport()
    await transport.check_guard()
    headers = {"Accept-Encoding": "identity"}  # nothing is unpacked: a small body stays small
    async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT, headers=headers) as http:
        # No server is told another one's cookies.
        http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        ffmpeg_slots = asyncio.Semaphore(min(os.cpu_count() or 1, MAX_FFMPEG))
        yield AppState(http, ffmpeg_slots, conversion_slot=asyncio.Semaphore(1))


# ---- HTTP calls: retry policy and backoff ----------------------------------------------------------

PROVIDER_NAMES = {
    "elevenlabs": "ElevenLabs",
    "replicate": "Replicate",
    "supabase": "Supabase Storage",
}
SERVER_ERRORS = frozenset(range(500, 600))  # Supabase has a 544
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def get_in(value: Any, *keys: str) -> Any:
    """Return what lies under these keys of nested JSON objects, or None."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


@dataclass(frozen=True)
class ProviderResponse:
    """A provider's response; `complete` is false if its body was longer than the limit."""

    status: int
    headers: httpx.Headers
    body: bytes
    complete: bool = True

    @cached_property
    def payload(self) -> Any:
        """The body as JSON values; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def effective_status(self) -> int:
        """The status it means: Supabase Storage writes its own as text into the body of a 400."""
        if self.status == 400:
            status_text = str(get_in(self.payload, "statusCode"))
            if re.fullmatch(r"\d{3}", status_text):
                return int(status_text)
        return self.status

    def retry_after_s(self, now: float) -> float | None:
        """Return the seconds the provider asks us to wait at clock time `now`; None if it does not say."""
        # Replicate writes `retry_after` or "resets in ~30s" into the body; others send the header
        # Retry-After, as seconds or as a date.
        asked = get_in(self.payload, "retry_after") or self.headers.get("retry-after")
        if not asked:
            match = re.search(r"resets in ~(\d+)s", str(get_in(self.payload, "detail")))
            asked = match[1] if match else ""
        asked = str(asked).strip()
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            return float(asked)
        with suppress(ValueError, TypeError, OverflowError):
            return max(0.0, parsedate_to_datetime(asked).timestamp() - now)
        return None


Attempt = ProviderResponse | httpx.RequestError
Exchange = Callable[
    [httpx.Request, int], Awaitable[ProviderResponse]
]  # one attempt; the most bytes


class RetryBudget(NamedTuple):
    """How long an outcome is retried: attempts in all, and time since it first happened."""

    attempts: float = math.inf
    patience_share: float = math.inf  # of PATIENCE_SECONDS


SPEECH_ATTEMPTS = RetryBudget(attempts=3)
BEFORE_PAYMENT = RetryBudget(attempts=4)  # a job can still be given up
AFTER_PAYMENT = RetryBudget(patience_share=PAID_SHARE)  # what is paid for is waited for
WHILE_THROTTLED = RetryBudget(patience_share=THROTTLE_SHARE)
WHILE_REJECTED = RetryBudget(patience_share=REJECTED_POLL_SHARE)
UNTIL_DEADLINE = RetryBudget()


@dataclass(frozen=True)
class RetryPolicy:
    """Which outcomes of a call are retried, and for how long; every other outcome is final.

    A connection that could not be made is always retried. `on_broken_connection`: also one that broke
    after sending, so that the work may have been done. `on_invalid_json`: also a success whose body is
    not a JSON object. `patient`: what the call is about is paid for, so a longer Retry-After than the
    longest wait is cut to it, and an untrusted certificate is retried; else the call gives up.
    """

    statuses: Collection[int]
    budget: RetryBudget
    throttle_budget: RetryBudget | None = None  # for 429; None: `budget`
    rejection_budget: RetryBudget | None = None  # for 401, 403 and 404; None: `budget`
    on_broken_connection: bool = True
    on_invalid_json: bool = True
    patient: bool = False

    def budget_for(self, attempt: Attempt) -> RetryBudget | None:
        """Return how long this outcome is retried; None: not at all."""
        if isinstance(attempt, httpx.RequestError):
            return self._budget_for_error(attempt)
        if attempt.status < 300:
            is_invalid = attempt.complete and not isinstance(attempt.payload, dict)
            return self.budget if self.on_invalid_json and is_invalid else None
        status = attempt.effective_status
        if status not in self.statuses:
            return None
        if status == 429:
            return self.throttle_budget or self.budget
        if status in (401, 403, 404):
            return self.rejection_budget or self.budget
        return self.budget

    def _budget_for_error(self, error: httpx.RequestError) -> RetryBudget | None:
        if "CERTIFICATE_VERIFY_FAILED" in str(error) and not self.patient:
            return None
        if isinstance(error, NOT_SENT) or self.on_broken_connection:
            return self.budget
        return None


# A speech after a 5xx may be paid twice, some cents: most are not charged, and a person waits. A video
# costs more, so after a 5xx or a broken connection its prediction is searched for instead.
SPEECH_RETRY = RetryPolicy(
    statuses={429, 500, 502, 503, 504},
    budget=SPEECH_ATTEMPTS,
    throttle_budget=WHILE_THROTTLED,
    on_broken_connection=False,
    on_invalid_json=False,
)
CREATE_RETRY = RetryPolicy(
    statuses={429},
    budget=BEFORE_PAYMENT,
    throttle_budget=WHILE_THROTTLED,
    on_broken_connection=False,
    on_invalid_json=False,
)
MODEL_RETRY = RetryPolicy(statuses={408, 429, *SERVER_ERRORS}, budget=BEFORE_PAYMENT)
LIST_RETRY = RetryPolicy(statuses={408, 429, *SERVER_ERRORS}, budget=WHILE_REJECTED, patient=True)
POLL_RETRY = RetryPolicy(
    statuses={401, 403, 404, 408, 429, *SERVER_ERRORS},
    budget=UNTIL_DEADLINE,
    rejection_budget=WHILE_REJECTED,
    patient=True,
)
CANCEL_RETRY = RetryPolicy(
    statuses={429, *SERVER_ERRORS}, budget=UNTIL_DEADLINE, on_invalid_json=False, patient=True
)
UPLOAD_RETRY = RetryPolicy(statuses={429, *SERVER_ERRORS}, budget=BEFORE_PAYMENT)
DOWNLOAD_RETRY = RetryPolicy(
    statuses={404, 429, *SERVER_ERRORS}, budget=BEFORE_PAYMENT, on_invalid_json=False
)
PAID_UPLOAD_RETRY = RetryPolicy(statuses={429, *SERVER_ERRORS}, budget=AFTER_PAYMENT, patient=True)
PAID_DOWNLOAD_RETRY = RetryPolicy(
    statuses={404, 429, *SERVER_ERRORS}, budget=AFTER_PAYMENT, on_invalid_json=False, patient=True
)


def retry_delay_s(
    retry: RetryPolicy,
    budget: RetryBudget,
    attempts: int,
    failing_s: float,
    asked_s: float | None,
) -> float | None:
    """Return the seconds to wait before the next attempt, or None to give up.

    `attempts` have failed in this way, the first of them `failing_s` ago. `asked_s` is the provider's
    Retry-After: the wait is at least that long and at least the exponential delay, with jitter, so that
    jobs that were refused together do not come back together.
    """
    if attempts >= budget.attempts or failing_s >= patience_s(budget.patience_share):
        return None
    first_s = get_settings().retry_first_seconds
    backoff_s = min(first_s * 2.0 ** min(attempts - 1, 10), MAX_BACKOFF_S)
    if asked_s is None:
        return backoff_s * random.uniform(0.75, 1)

    longest_s = patience_s(MAX_WAIT_SHARE)
    if asked_s > longest_s:
        return longest_s if retry.patient else None
    return max(asked_s, backoff_s) * random.uniform(1, 1.1)


async def send_once(request: httpx.Request, max_bytes: int) -> ProviderResponse:
    """Send one request, and read its response's body up to `max_bytes`. Raises httpx.RequestError."""
    response = await app_state().http.send(request, stream=True)
    async with aclosing(response):
        return await read_response(response, max_bytes)


async def read_response(response: httpx.Response, max_bytes: int) -> ProviderResponse:
    """Read a response's body up to `max_bytes`; more is never held in memory."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk[: max_bytes + 1 - len(body)]
        if len(body) > max_bytes:
            break
    complete = len(body) <= max_bytes
    return ProviderResponse(
        response.status_code, response.headers, bytes(body[:max_bytes]), complete
    )


async def send_with_retry(
    method: str,
    url: str,
    retry: RetryPolicy,
    *,
    exchange: Exchange = send_once,
    max_bytes: int = MAX_RESPONSE_BYTES,
    **request_options: Any,
) -> ProviderResponse:
    """Send a request, retrying as `retry` allows; return the last response, whatever its status.

    `request_options` are those of httpx's build_request. Raises httpx.RequestError if the last attempt
    had no response.
    """
    # Outcomes with an equal budget count together.
    attempts: Counter[RetryBudget] = Counter()
    first_failed_at: dict[RetryBudget, float] = {}
    while True:
        request = app_state().http.build_request(method, url, **request_options)
        attempt = await attempt_exchange(exchange, request, max_bytes)
        budget = retry.budget_for(attempt)
        if budget is None:
            break

        attempts[budget] += 1
        first_failed_at.setdefault(budget, time.monotonic())
        failing_s = time.monotonic() - first_failed_at[budget]
        asked_s = None
        if isinstance(attempt, ProviderResponse):
            asked_s = attempt.retry_after_s(time.time())
        delay_s = retry_delay_s(retry, budget, attempts[budget], failing_s, asked_s)
        if delay_s is None:
            break

        logger.warning(
            "%s %s attempt=%d failed (%s), retry in %.1f s",
            method,
            request.url.host,
            attempts.total(),
            describe(attempt),
            delay_s,
        )
        await asyncio.sleep(delay_s)

    if isinstance(attempt, httpx.RequestError):
        raise attempt
    return attempt


async def attempt_exchange(exchange: Exchange, request: httpx.Request, max_bytes: int) -> Attempt:
    """Make one attempt, and return a transport error as its outcome."""
    try:
        return await exchange(request, max_bytes)
    except httpx.RequestError as exc:
        return exc


async def call_provider(
    provider: Provider,
    method: str,
    url: str,
    retry: RetryPolicy,
    *,
    about_content: bool = False,
    **options: Any,
) -> ProviderResponse:
    """Return a provider's success; `options` are those of send_with_retry.

    Raises ResourceFailed for the storage, else ProviderFailed; with `about_content`, a 400, 404 or 422 is
    about what the client sent: ProviderRefused.
    """
    failed = ResourceFailed if provider == "supabase" else ProviderFailed
    name = PROVIDER_NAMES[provider]
    try:
        response = await send_with_retry(method, url, retry, **options)
    except httpx.RequestError as exc:
        raise failed(f"{name} did not answer: {describe(exc)}.", provider) from exc

    if response.status not in (200, 201, 202):
        raise error_for_response(provider, response, about_content)
    if not response.complete:
        message = f"{name}'s response is larger than the service reads."
        raise failed(message, provider, response=response)
    return response


def error_for_response(
    provider: Provider, response: ProviderResponse, about_content: bool = False
) -> ServiceError:
    """Return the error for a response that is not a success."""
    detail = f"{PROVIDER_NAMES[provider]} answered {describe(response)}"
    status = response.effective_status
    error_class: type[ServiceError] = ProviderFailed
    if provider == "supabase":
        error_class = ResourceFailed
    elif about_content and status in (400, 404, 422):
        error_class = ProviderRefused
    # A key, a plan, a bucket or content that is rejected stays so until somebody changes it.
    retryable = status in (408, 409, 423, 425, 429) or status not in range(400, 500)
    return error_class(detail, provider, retryable=retryable, response=response)


def invalid_response(provider: Provider, missing: str) -> ProviderFailed:
    """Return the error for a success that does not contain what it must."""
    return ProviderFailed(f"{PROVIDER_NAMES[provider]} answered without {missing}.", provider)


def describe(attempt: Attempt) -> str:
    """Describe the outcome of an attempt in a few words."""
    if isinstance(attempt, httpx.RequestError):
        return redact(f"{type(attempt).__name__} {attempt}".strip().rstrip("."))
    description = f"{attempt.status}: {provider_message(attempt)}"
    asked_s = attempt.retry_after_s(time.time()) or 0
    if asked_s > patience_s(MAX_WAIT_SHARE):
        description += f" (it asks to wait {asked_s:.0f} s, longer than a job can)"
    return description


def provider_message(response: ProviderResponse) -> str:
    """Return the provider's own message, on one line, whatever the body holds; never empty."""
    message = message_in(response.payload)
    content_type = response.headers.get("content-type", "")
    is_page = b"<" in response.body[:1000] or content_type.startswith("text/")
    if not message and is_page:
        page = response.body[:4_000].decode("utf-8", "replace")
        without_tags = re.sub(r"(?s)<(script|style)\b.*?</\1>|<[^>]*>", " ", page)
        message = html.unescape(without_tags)
    message = one_line(message)
    if message:
        return message
    try:
        return HTTPStatus(response.status).phrase
    except ValueError:
        return "no message"


def message_in(value: Any, depth: int = 5) -> str:
    """Return the message inside an error body: a string, an object or a list, nested."""
    if isinstance(value, str):
        return value
    if depth == 0:
        return ""
    if isinstance(value, list):
        messages = [message_in(item, depth - 1) for item in value]
        return "; ".join(filter(None, messages))
    if isinstance(value, dict):
        for key in ("detail", "message", "msg", "error", "title"):
            message = message_in(value.get(key), depth - 1)
            if message:
                return message
    return ""


def one_line(message: str) -> str:
    """Return a provider's message on one line, without secrets, at most MAX_DETAIL_CHARS characters."""
    return redact(" ".join(message.split()))[:MAX_DETAIL_CHARS]


# ---- ElevenLabs: text to speech --------------------------------------------------------------------


class SpeechFormat(NamedTuple):
    """The kind of file in which the speech of a codec is stored."""

    extension: str  # also ffmpeg's name of the format
    content_type: str
    signatures: tuple[bytes, ...]  # its first bytes: the provider's Content-Type is not reliable


MP3_FRAME_SIGNATURES = [
    b"\xff" + bytes([second_byte]) for second_byte in b"\xfa\xfb\xf2\xf3\xe2\xe3"
]
MP3 = SpeechFormat("mp3", "audio/mpeg", (b"ID3", *MP3_FRAME_SIGNATURES))
WAV = SpeechFormat("wav", "audio/wav", (b"RIFF",))
OGG = SpeechFormat("ogg", "audio/ogg", (b"OggS",))
SPEECH_FORMATS = {"mp3": MP3, "wav": WAV, "opus": OGG, "pcm": WAV, "ulaw": WAV, "alaw": WAV}


class RawCodec(NamedTuple):
    """A codec that ElevenLabs sends without a file header."""

    wave_format: int  # WAVE format tag, RFC 2361
    bytes_per_sample: int


RAW_CODECS = {"pcm": RawCodec(1, 2), "alaw": RawCodec(6, 1), "ulaw": RawCodec(7, 1)}


async def elevenlabs_tts_bytes(text: str, voice_id: str) -> bytes:
    """Return the text as speech, a playable file in TTS_OUTPUT_FORMAT.

    Raises ProviderRefused, ProviderFailed, SpeechTooLarge, MissingSetting.
    """
    settings = get_settings()
    try:
        response = await call_provider(
            "elevenlabs",
            "POST",
            f"{settings.eleven_base_url}/v1/text-to-speech/{voice_id}",
            SPEECH_RETRY,
            about_content=True,
            params={"output_format": settings.tts_output_format},  # ignored if sent in the body
            headers={"xi-api-key": settings.required("eleven_api_key")},
            json={"text": text, "model_id": "eleven_multilingual_v2"},
            max_bytes=MAX_SPEECH_BYTES,
            timeout=SPEECH_TIMEOUT,
            extensions={NEW_CONNECTION: True},
        )
    except (ProviderRefused, ProviderFailed) as exc:
        if exc.response and not exc.response.complete and exc.response.status == 200:
            raise SpeechTooLarge(
                "The speech is larger than 9.5 MB; use a shorter text.", "elevenlabs"
            ) from exc
        name_speech_field(exc)
        raise
    return validate_speech(response.body, settings.tts_output_format)


def name_speech_field(error: ServiceError) -> None:
    """Add the field that ElevenLabs rejects: its codes are voice_not_found, text_too_long ..."""
    if error.response is None:
        return
    reason = get_in(error.response.payload, "detail")
    if isinstance(reason, list):
        code = str(reason)
    else:
        code = str(get_in(reason, "code") or get_in(reason, "status"))
    message = one_line(message_in(reason))
    if re.search("voice|invalid_uid", code):
        error.add_field_error("voice_id", message)
    elif re.search("text|character_limit", code):
        error.add_field_error("text", message)


def validate_speech(speech: bytes, output_format: str) -> bytes:
    """Return speech as a playable file. Raises ProviderFailed if it is not in that format."""
    codec, rate = output_format.split("_")[:2]
    if codec in RAW_CODECS:
        is_text = re.match(rb'\s*(<!doctype|<html|\{\s*")', speech, re.IGNORECASE)
        if speech and not is_text:
            return with_wav_header(speech, codec, int(rate))
    if not speech.startswith(SPEECH_FORMATS[codec].signatures):
        raise invalid_response("elevenlabs", f"speech in the format {output_format}")
    return speech


def with_wav_header(samples: bytes, codec: str, rate: int) -> bytes:
    """Return raw mono samples as a WAV file; `rate` is in samples a second."""
    wave_format, width = RAW_CODECS[codec]
    samples = samples[: len(samples) // 2 * 2]  # a chunk has an even length
    format_chunk = struct.pack("<HHIIHHH", wave_format, 1, rate, rate * width, width, width * 8, 0)
    fact_chunk = struct.pack("<I", len(samples) // width)

    body = b"WAVE"
    for name, content in ((b"fmt ", format_chunk), (b"fact", fact_chunk), (b"data", samples)):
        body += name + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def speech_format() -> SpeechFormat:
    """Return how speech is stored under the present TTS_OUTPUT_FORMAT."""
    codec = get_settings().tts_output_format.split("_")[0]
    return SPEECH_FORMATS[codec]


# ---- Supabase Storage and downloads ----------------------------------------------------------------

IMMUTABLE_CACHE = "max-age=31536000"  # stored and served as written


async def supabase_upload(
    path: str,
    content: bytes | Path,
    content_type: str,
    retry: RetryPolicy = UPLOAD_RETRY,
    cache_control: str = IMMUTABLE_CACHE,
) -> str:
    """Store bytes or a file and return its public URL. Raises ResourceFailed, MissingSetting."""
    body: bytes | FileStream
    if isinstance(content, Path):
        body = FileStream(content)
        size = content.stat().st_size  # noqa: ASYNC240  a moment
    else:
        body = content
        size = len(content)

    headers = {
        **storage_headers(),
        "Content-Type": content_type,  # without parameters: a bucket may have a list of types
        "Content-Length": str(size),  # the bucket's limits are enforced by it
        "Cache-Control": cache_control,
        "x-upsert": "true",  # makes a repeated upload safe
    }
    url = storage_url(path)
    response = await call_provider("supabase", "POST", url, retry, headers=headers, content=body)
    if not get_in(response.payload, "Key"):  # some other server's 200
        raise ResourceFailed(
            "Supabase Storage answered without having stored the file.", "supabase"
        )
    return storage_url(path, "public/")


def storage_url(path: str, access: Literal["", "public/", "authenticated/"] = "") -> str:
    """Return where a file of the bucket is written, or with `access` read. Raises MissingSetting."""
    settings = get_settings()
    base_url = settings.required("supabase_url")
    return f"{base_url}/storage/v1/object/{access}{settings.supabase_bucket}/{path}"


def storage_headers() -> dict[str, str]:
    """Return the service key in both headers, identical, for sb_ and eyJ keys. Raises MissingSetting."""
    key = get_settings().required("supabase_service_role")
    return {"Authorization": f"Bearer {key}", "apikey": key}


@dataclass(frozen=True)
class FileStream:
    """A file as a request's body: read in chunks beside the event loop, from the start at each attempt."""

    path: Path

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the file's chunks."""
        with self.path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk


async def download(url: str, target: Path, retry: RetryPolicy = PAID_DOWNLOAD_RETRY) -> None:
    """Stream a file of up to 100 MB to disk, from the first byte again if it breaks off.

    Raises ResourceFailed.
    """
    try:
        host = httpx.URL(check_http_url(url)).host
    except ValueError as exc:
        raise ResourceFailed("The URL of a file to download is invalid.", retryable=False) from exc

    exchange = partial(download_once, target)
    try:
        response = await send_with_retry("GET", url, retry, exchange=exchange)
    except httpx.RequestError as exc:
        raise ResourceFailed(f"The download from {host} failed: {describe(exc)}.") from exc
    except BlockedUrl as exc:
        message = f"The file at {host} may not be fetched. {exc.detail}"
        raise ResourceFailed(message, retryable=False) from exc
    if response.status != 200:
        message = f"The download from {host} was answered {describe(response)}."
        raise ResourceFailed(message, response=response)


async def download_once(target: Path, request: httpx.Request, max_bytes: int) -> ProviderResponse:
    """Make one attempt at a download: a success goes to `target`, a refusal's body into the response."""
    async with follow_redirects(request) as response:
        if response.status_code != 200:
            return await read_response(response, max_bytes)
        check_download_size(content_length(response) or 0)
        with target.open("wb") as file:
            async for chunk in response.aiter_raw(CHUNK_BYTES):
                check_download_size(file.tell() + len(chunk))
                await asyncio.to_thread(file.write, chunk)
        return ProviderResponse(200, response.headers, b"")


@asynccontextmanager
async def follow_redirects(request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """Yield the unread response at the end of at most five redirects. Raises BlockedUrl.

    httpx's own redirects would read each body on the way whole.
    """
    for _ in range(MAX_REDIRECTS + 1):
        try:
            response = await app_state().http.send(request, stream=True)
        except (httpx.InvalidURL, UnicodeError) as exc:
            raise httpx.RemoteProtocolError("a redirect to an invalid URL") from exc
        async with aclosing(response):
            if response.next_request is None:
                yield response
                return
            request = response.next_request
    raise BlockedUrl(f"The URL redirects more than {MAX_REDIRECTS} times.")


def check_download_size(size: int) -> None:
    """Raise ResourceFailed if a file has more than MAX_DOWNLOAD_BYTES."""
    if size > MAX_DOWNLOAD_BYTES:
        raise ResourceFailed("A file to download is larger than 100 MB.", retryable=False)


def content_length(response: httpx.Response) -> int | None:
    """Return the length of a body in bytes, if the response states a plausible one."""
    header = response.headers.get("content-length", "")
    return int(header) if re.fullmatch(r"\d{1,18}", header) else None


# ---- Remote file checks: /debug/head and the picture -----------------------------------------------


async def head(url: str, timeout_s: float) -> HeadResult:
    """Return status, type and whole size of a remote file.

    Raises BlockedUrl; ResourceFailed, also after `timeout_s` seconds.
    """
    try:
        with anyio.fail_after(timeout_s):
            result = await head_once("HEAD", url)
            if result.status >= 400:  # a server that refuses HEAD is asked for the first byte
                result = await head_once("GET", url)
            return result
    except httpx.RequestError as exc:
        raise ResourceFailed(f"The URL did not answer: {describe(exc)}.") from exc
    except TimeoutError as exc:
        raise ResourceFailed(f"The URL did not answer within {timeout_s:g} s.") from exc


async def head_once(method: Literal["HEAD", "GET"], url: str) -> HeadResult:
    """Ask for a remote file's headers, by GET for its first byte. Raises BlockedUrl, httpx.RequestError."""
    headers = {"Range": "bytes=0-0"} if method == "GET" else {}
    request = app_state().http.build_request(
        method, url, headers=headers, extensions={USER_SUPPLIED: True}
    )
    async with follow_redirects(request) as response:
        size = content_length(response)
        if response.status_code == 206:  # of a part: Content-Range may say how long the whole is
            content_range = response.headers.get("content-range", "")
            match = re.fullmatch(r"bytes [\d*-]+/(\d{1,18})", content_range)
            size = int(match[1]) if match else None
        content_type = response.headers.get("content-type", "")[:200]
        return HeadResult(
            status=response.status_code, content_type=content_type or None, bytes=size
        )


async def check_picture(url: str) -> None:
    """Refuse, before anything is paid for, what certainly is no picture. Raises InvalidInput."""
    try:
        result = await head(url, PICTURE_TIMEOUT_S)
    except PrivateAddress as exc:
        reason = exc.detail.rstrip(".")
        message = f"{reason}; the picture must be on the public internet"
        raise invalid_field("image_url", message) from exc
    except Exception as exc:  # noqa: BLE001  Replicate, which fetches it itself, may reach more
        logger.info("the picture could not be checked: %r", exc)
        return
    if result.status in (404, 410):
        message = f"there is no picture at this URL, it answers {result.status}"
        raise invalid_field("image_url", message)
    if result.status < 300 and (result.content_type or "").lower().startswith("text/html"):
        raise invalid_field("image_url", "is the URL of a web page, not of a picture")


# ---- Model schemas: mapping our fields to a model's input ------------------------------------------

DEFAULT_MODEL = "minimax/hailuo-02"

Property = dict[str, Any]  # one field of a model's input, as its JSON schema describes it

# A field's name and description are split into lower-case words (name_tokens).
FIRST_TOKENS = {"first", "start", "initial", "init"}
PICTURE_TOKENS = {"image", "img", "picture", "photo", "portrait", "face", "avatar", "frame"}
SPEECH_TOKENS = {"audio", "speech"}
# A URL field with one of these in its name is neither the first picture nor speech.
EXCLUDED_TOKENS = set(
    "last end ending tail final middle reference ref subject character style mask video movie"
    " music song sound voice background control depth pose lora weights logo watermark".split()
)
SECONDS_NAMES = tuple(
    "duration seconds duration_seconds duration_in_seconds video_duration num_seconds"
    " length video_length length_seconds clip_length".split()
)
FRAMES_NAMES = tuple(
    "num_frames frames frame_count number_of_frames n_frames video_frames total_frames".split()
)
LENGTH_NAMES = SECONDS_NAMES + FRAMES_NAMES
FPS_NAMES = ("frames_per_second", "fps", "frame_rate", "framerate", "video_fps")
SIZE_NAMES = tuple(
    "resolution video_resolution output_resolution quality video_quality size video_size".split()
)
# Anybody may publish a model: of a property only these keywords are read, if they have this type.
SCHEMA_KEYWORDS: dict[str, Any] = {
    "type": object,
    "format": object,
    "description": object,
    "default": object,
    "deprecated": object,
    "$ref": object,
    "enum": list,
    "allOf": list,
    "anyOf": list,
    "oneOf": list,
    "minimum": (int, float),
    "maximum": (int, float),
}


@dataclass(frozen=True)
class VideoModel:
    """A model on Replicate: where its predictions are created, and what input it takes."""

    name: str
    version: (
        str | None
    )  # its id, or owner/name:id if one was asked for; None: official, runs by name
    fields: dict[str, Property]
    required: tuple[str, ...]

    @property
    def speech_field(self) -> str | None:
        """The field for speech, if the model makes a video that speaks by itself."""
        for name, prop in self.fields.items():
            tokens = name_tokens(name)
            if is_uri(prop) and tokens & SPEECH_TOKENS and not tokens & EXCLUDED_TOKENS:
                return name
        return None

    @property
    def picture_field(self) -> str | None:
        """The field for the first picture; a deprecated one only if there is no other."""

        def preference(name: str) -> tuple[bool, bool, bool, bool]:
            return (
                bool(self.fields[name].get("deprecated")),
                not name_tokens(name) & FIRST_TOKENS,
                name not in self.required,
                name != "image",
            )

        names = [name for name, prop in self.fields.items() if is_first_picture(name, prop)]
        return min(names, key=preference, default=None)

    @property
    def prompt_field(self) -> str | None:
        """The field for the prompt: the shortest such name."""
        for name in sorted(self.fields, key=len):
            tokens = name_tokens(name)
            is_text = self.fields[name].get("type") == "string"
            if is_text and "prompt" in tokens and "negative" not in tokens:
                return name
        return None

    @property
    def version_id(self) -> str | None:
        """The id of its version alone."""
        return self.version.rpartition(":")[2] if self.version else None


# Its page and schema, read 2026-03-29: 10 s only up to 768p.
HAILUO_FIELDS: dict[str, Property] = {
    "prompt": {"type": "string"},
    "first_frame_image": {"type": "string", "format": "uri"},
    "duration": {"type": "integer", "enum": [6, 10]},
    "resolution": {"type": "string", "enum": ["512p", "768p", "1080p"]},
}
HAILUO = VideoModel(DEFAULT_MODEL, None, HAILUO_FIELDS, required=("prompt",))


def name_tokens(name: str) -> set[str]:
    """Return the words in a field's name or description, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def is_uri(prop: Property) -> bool:
    """Return whether a field takes one file by its URL."""
    return prop.get("type") == "string" and prop.get("format") == "uri"


def is_first_picture(name: str, prop: Property) -> bool:
    """Return whether a field can take the first picture, by its name, else by its description."""
    excluded = EXCLUDED_TOKENS | SPEECH_TOKENS
    tokens = name_tokens(name)
    if not is_uri(prop) or tokens & excluded:
        return False
    if tokens & PICTURE_TOKENS:
        return True
    description = name_tokens(str(prop.get("description", "")))
    return bool(description & PICTURE_TOKENS) and not description & excluded


def resolve_schema(schema: Any, schemas: Any, depth: int = MAX_SCHEMA_DEPTH) -> Property:
    """Return a property with what its `$ref`, `allOf`, `anyOf` and `oneOf` add: Replicate keeps enums there."""
    if not isinstance(schema, dict) or depth == 0:
        return {}
    prop: Property = {}
    for keyword, kind in SCHEMA_KEYWORDS.items():
        if keyword in schema and isinstance(schema[keyword], kind):
            prop[keyword] = schema[keyword]
    if isinstance(prop.get("type"), list):  # OpenAPI 3.1 writes a nullable type as a list
        prop["type"] = next((name for name in prop["type"] if name != "null"), None)

    parts: list[Any] = []
    for keyword in ("allOf", "anyOf", "oneOf"):
        parts.extend(prop.get(keyword, []))
    if "$ref" in prop:
        parts.append(schemas.get(str(prop["$ref"]).rpartition("/")[2]))
    for part in parts[:MAX_SCHEMA_PARTS]:
        resolved = resolve_schema(part, schemas, depth - 1)
        if resolved.get("type") != "null":
            prop = {**resolved, **prop}
    return prop


def parse_model(name: str, version: str | None, schemas: Any) -> VideoModel:
    """Return a model from its published `components.schemas`. Raises ProviderFailed if it is unreadable."""
    properties = get_in(schemas, "Input", "properties")
    required = get_in(schemas, "Input", "required")
    if not isinstance(properties, dict) or len(properties) > MAX_SCHEMA_FIELDS:
        raise invalid_response(
            "replicate", f"an input schema of {name} that a person could fill in"
        )
    fields = {key: resolve_schema(prop, schemas) for key, prop in properties.items()}
    if not isinstance(required, list):
        required = []
    return VideoModel(name, version, fields, tuple(key for key in required if isinstance(key, str)))


def build_model_input(
    model: VideoModel, body: JobPromptOnly, audio_url: str | None = None
) -> dict[str, Any]:
    """Return a prediction's input: our fields under the model's names, as the model writes values.

    A setting the client sent is used or refused, one it left out adapts to the model, one the model lacks
    is left out. `audio_url` goes to a model that takes speech. Raises InvalidInput naming what is wrong,
    with the allowed values.
    """
    if model.picture_field is None:
        message = f"{model.name} takes no picture; choose an image-to-video model"
        raise invalid_field("model", message)

    values: dict[str, Any] = {model.picture_field: body.image_url}
    if model.prompt_field:
        values[model.prompt_field] = body.prompt
    if model.speech_field and audio_url:
        values[model.speech_field] = audio_url
    values.update(length_input(model, body))
    values.update(size_input(model, body))
    for name in model.required:
        default = model.fields.get(name, {}).get("default")
        if name not in values and default is not None:
            values[name] = default

    missing = [name for name in model.required if name not in values]
    if missing:
        reason = "this service has nothing for"
        if missing == [model.speech_field]:
            reason = "only /jobs_prompt_tts has"
        message = f"{model.name} needs {', '.join(missing)}, which {reason}"
        raise invalid_field("model", message)
    if model is HAILUO and values["duration"] == 10 and values["resolution"] == "1080p":
        raise invalid_field("resolution", "must be 512p or 768p with 10 seconds")
    return values


def length_input(model: VideoModel, body: JobPromptOnly) -> dict[str, Any]:
    """Return the field for the video's length, in seconds or frames; empty if the model has none."""
    for name in LENGTH_NAMES:
        prop = model.fields.get(name, {})
        choices = number_choices(prop)
        if not choices and prop.get("type") not in ("integer", "number"):
            continue

        frame_rate = frames_per_second(model) if counts_frames(name, prop, choices) else None
        wanted = body.seconds * (frame_rate or 1.0)
        if choices:
            number = min(choices, key=lambda choice: (abs(choice - wanted), choice))
        else:
            number = clamp(wanted, prop)
        # A number of frames is seldom a whole number of seconds: the nearest will do.
        tolerance = frame_rate / 2 if frame_rate else 0
        if "seconds" in body.model_fields_set and abs(number - wanted) > tolerance:
            allowed = describe_lengths(prop, choices, frame_rate)
            raise invalid_field("seconds", f"{model.name} takes {allowed}")

        if number in choices:
            return {name: choices[number]}
        return {name: number if prop.get("type") == "number" else round(number)}
    return {}


def number_choices(prop: Property) -> dict[float, Any]:
    """Return the numbers that a field lists, each with the value the model writes for it, such as "5s"."""
    choices = {}
    for value in prop.get("enum", []):
        number = as_number(value)
        if number is not None:
            choices[number] = value
    return choices


def counts_frames(name: str, prop: Property, choices: Collection[float]) -> bool:
    """Return whether a length is in frames: by its name, numbers too large for seconds, or description."""
    smallest = min(choices, default=prop.get("minimum") or 0)
    if name in FRAMES_NAMES or smallest > 60:
        return True
    description = name_tokens(str(prop.get("description", "")))
    return "seconds" not in description and bool(description & {"frame", "frames"})


def describe_lengths(prop: Property, choices: Collection[float], frame_rate: float | None) -> str:
    """Return the lengths a model takes, in seconds, for people."""
    if not choices:
        return describe_bounds(prop, frame_rate or 1.0)
    if frame_rate:
        seconds = {round(choice / frame_rate, 0) for choice in choices}
    else:
        seconds = {round(choice, 3) for choice in choices}
    return " or ".join(f"{choice:g}" for choice in sorted(seconds))


def as_number(value: Any) -> float | None:
    """Return a number, also from text such as "5" or "5s"; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:s|sec|seconds)?", str(value))
    return float(match[1]) if match else None


def frames_per_second(model: VideoModel) -> float:
    """Return the rate at which the model plays its frames, as its own setting defaults."""
    for name in FPS_NAMES:
        prop = model.fields.get(name, {})
        default = prop.get("default") or next(iter(prop.get("enum", [])), None)
        rate = as_number(default)
        if rate:
            return rate
    return DEFAULT_FPS


def clamp(number: float, prop: Property) -> float:
    """Return the number nearest to `number` within a field's bounds."""
    smallest = prop.get("minimum", -math.inf)
    largest = prop.get("maximum", math.inf)
    return float(max(smallest, min(number, largest)))


def size_input(model: VideoModel, body: JobPromptOnly) -> dict[str, Any]:
    """Return the field for the video's size; empty if the model has none."""
    for name in SIZE_NAMES:
        prop = model.fields.get(name, {})
        choices = [value for value in prop.get("enum", []) if vertical_pixels(value)]
        if choices:
            return {name: choose_size(model, body, choices)}
        is_free = "enum" not in prop and prop.get("type") in ("string", "integer")
        if "resolution" in name and is_free:
            return free_size_input(model, body, name)
    return {}


def choose_size(model: VideoModel, body: JobPromptOnly, choices: list[Any]) -> Any:
    """Return the size among a model's own that was asked for, or the nearest. Raises InvalidInput."""
    for choice in choices:
        if str(choice).casefold() == body.resolution.casefold():
            return choice
    wanted = vertical_pixels(body.resolution)

    def distance(choice: Any) -> tuple[int, int]:
        pixels = vertical_pixels(choice)
        return abs(pixels - wanted), pixels

    nearest = min(choices, key=distance)
    if "resolution" in body.model_fields_set and vertical_pixels(nearest) != wanted:
        allowed = " or ".join(map(str, choices))
        raise invalid_field("resolution", f"{model.name} takes {allowed}")
    return nearest


def free_size_input(model: VideoModel, body: JobPromptOnly, name: str) -> dict[str, Any]:
    """Return a size field that takes any text or number; empty if the client sent no size."""
    if "resolution" not in body.model_fields_set:
        return {}
    prop = model.fields[name]
    if prop["type"] == "string":
        return {name: body.resolution}
    wanted = vertical_pixels(body.resolution)
    if wanted == 0 or clamp(wanted, prop) != wanted:
        raise invalid_field("resolution", f"{model.name} takes {describe_bounds(prop)}")
    return {name: wanted}


def describe_bounds(prop: Property, rate: float = 1.0) -> str:
    """Return a field's bounds for people, in units of which `rate` make one of the field's."""
    parts = []
    if "minimum" in prop:
        parts.append(f"at least {prop['minimum'] / rate:.0f}")
    if "maximum" in prop:
        parts.append(f"at most {prop['maximum'] / rate:.0f}")
    return " and ".join(parts)


def vertical_pixels(size: Any) -> int:
    """Return the lines of a size such as 768p, 4K, 1280x720 or 720; 0 if it is none."""
    text = str(size).casefold()
    match = re.fullmatch(r"(\d{2,5})\s*[x*×]\s*(\d{2,5})", text)
    if match:
        return min(int(match[1]), int(match[2]))
    match = re.fullmatch(r"(\d)k", text)
    if match:
        return int(match[1]) * 540
    match = re.match(r"(\d{3,4})p?\b", text)
    return int(match[1]) if match else 0


# ---- Replicate: create, poll, recover, cancel ------------------------------------------------------

TERMINAL_STATUSES = ("succeeded", "failed", "canceled", "aborted")


class Prediction(BaseModel):
    """What Replicate answers about one prediction; every other field is optional there."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    status: str
    output: Any = None
    error: Any = None
    logs: Any = None
    data_removed: Any = None

    @property
    def percent(self) -> int | None:
        """How far it is, where its log contains a progress bar."""
        end_of_log = str(self.logs)[-2000:]
        percents = re.findall(r"(?<![\d.])(\d{1,2}|100)(?:\.\d+)?%", end_of_log)
        return int(percents[-1]) if percents else None

    @property
    def video_url(self) -> str | None:
        """The video: the first URL in the output, which is a string, a list or an object."""
        try:
            output = json.dumps(self.output, ensure_ascii=False)
        except RecursionError:  # nested deeper than any video's output
            return None
        # A quoted URL that is not an object's key.
        urls = re.finditer(r'(?i)"(https?://[^"\s\\]+)"(?!: )', output)
        for match in islice(urls, MAX_OUTPUT_URLS):
            with suppress(ValueError):
                return check_http_url(match[1])
        return None


class SearchWindow(NamedTuple):
    """Clock times between which a prediction may have been created that no record names."""

    since: float
    until: float


def poll_delay_s(waited_s: float, active_polls: int, durations: Collection[float] = ()) -> float:
    """Return the seconds until the next poll; `durations`: of the last videos of this kind, in seconds.

    While none is known: every 2.5 % of the time waited, between POLL_MIN_SECONDS and 2 s. Else: seldom
    until 0.8 of the shortest one, from then on in small steps.
    """
    if not durations:
        delay_s = min(waited_s * POLL_SHARE, POLL_MAX_S)
    else:
        shortest_s = min(durations)
        expected_s = shortest_s * DUE_SHARE
        if waited_s < expected_s:
            delay_s = min(shortest_s * EARLY_SHARE, expected_s - waited_s)
        else:
            step_s = min(shortest_s * DUE_STEP_SHARE, DUE_STEP_MAX_S)
            overdue_s = waited_s - expected_s
            delay_s = max(step_s, min(overdue_s * POLL_SHARE, POLL_MAX_S))
    pace_s = active_polls * 60 / MAX_POLLS_PER_MINUTE
    return max(delay_s, get_settings().poll_min_seconds, pace_s)


async def call_replicate(
    method: str,
    path: str,
    retry: RetryPolicy,
    *,
    headers: Mapping[str, str] | None = None,
    **options: Any,
) -> ProviderResponse:
    """Call Replicate's API. Raises ProviderRefused, ProviderFailed, MissingSetting."""
    settings = get_settings()
    token = settings.required("replicate_api_token")
    return await call_provider(
        "replicate",
        method,
        f"{settings.replicate_base_url}/v1/{path}",
        retry,
        headers={"Authorization": f"Bearer {token}", **(headers or {})},
        **options,
    )


def parse_prediction(value: Any) -> Prediction | None:
    """Return the prediction that a JSON value describes, or None if it is none."""
    try:
        return Prediction.model_validate(value)
    except ValidationError:
        return None


async def find_model(name: str | None) -> VideoModel:
    """Return a model by `owner/name` or `owner/name:version`, kept for ten minutes; None: the default one.

    Jobs that ask for one model at the same time share one look-up. Raises ProviderRefused (unknown),
    ProviderFailed.
    """
    if name is None or name == DEFAULT_MODEL:
        return HAILUO
    models = app_state().models
    lookup = models.get(name)
    if lookup is None or lookup.expires_at <= time.monotonic():
        task = asyncio.create_task(look_up_model(name))
        lookup = ModelLookup(task, time.monotonic() + MODEL_TTL_S)
        models.pop(name, None)
        models[name] = lookup
        task.add_done_callback(partial(forget_failed_lookup, models, name))
        if len(models) > MAX_MODELS:
            models.pop(next(iter(models)))  # the oldest
    return await asyncio.shield(lookup.task)


def forget_failed_lookup(
    models: dict[str, ModelLookup], name: str, task: "asyncio.Task[VideoModel]"
) -> None:
    """Let the next job look a model up again."""
    failed = task.cancelled() or task.exception() is not None
    if failed and name in models and models[name].task is task:
        del models[name]


async def look_up_model(name: str) -> VideoModel:
    """Return the model, or that version of it, as Replicate describes it now. Raises as find_model."""
    model_name, _, version = name.partition(":")
    path = f"models/{model_name}"
    if version:
        path += f"/versions/{version}"
    try:
        response = await call_replicate("GET", path, MODEL_RETRY, about_content=True)
    except ProviderRefused as exc:  # Replicate does not repeat the name
        error = ProviderRefused(f"model {name}: {exc.detail}", "replicate")
        error.add_field_error("model", exc.detail)
        raise error from exc

    if version:
        described = response.payload
        runs_by = name
    else:
        described = get_in(response.payload, "latest_version")
        runs_by = get_in(described, "id")
    is_official = not version and get_in(response.payload, "is_official") is True
    if not is_official and not isinstance(runs_by, str):  # a community model runs by version only
        raise invalid_response("replicate", f"a version of {name}")
    schemas = get_in(described, "openapi_schema", "components", "schemas")
    return parse_model(model_name, None if is_official else runs_by, schemas)


async def hailuo_video_from_prompt(body: JobPromptOnly, job: Job | None = None) -> str:
    """Return the URL of a video made by the default model. Raises as replicate_video_from_prompt."""
    return await replicate_video_from_prompt(body, job=job, model=HAILUO)


async def replicate_video_from_prompt(
    body: JobPromptOnly,
    audio_url: str | None = None,
    job: Job | None = None,
    model: VideoModel | None = None,
) -> str:
    """Return the URL, valid for an hour, of the video that `job` has begun, else of a new one.

    `audio_url`: the speech, for a model that takes it. When it ends early, the prediction is cancelled,
    unless a request with the same key can resume it. Raises ProviderRefused (also: the prediction ended
    failed, canceled or aborted, or its video has expired), InvalidInput, ProviderFailed, MissingSetting.
    """
    job = job or Job("-")
    model = model or await find_model(body.model)
    values = build_model_input(model, body, audio_url)
    try:
        prediction_id = job.partial.prediction_id
        if prediction_id:
            claim_prediction(job, prediction_id)
            prediction = await poll_prediction(Prediction(id=prediction_id, status="starting"))
            prediction = await wait_for_prediction(prediction, job)
        else:
            prediction = await create_prediction(model, values, job)
            await record_prediction(job)
            kind = video_kind(model, values)
            prediction = await wait_for_prediction(prediction, job, kind)
    except (asyncio.CancelledError, ServiceError):
        if job.partial.prediction_id and (job.record is None or job.past_deadline()):
            await cancel_prediction(job.partial.prediction_id)
        raise
    return video_url_or_raise(prediction)


def video_kind(model: VideoModel, values: Mapping[str, Any]) -> str:
    """Return what decides how long a video takes: its model, length and size."""
    names = LENGTH_NAMES + SIZE_NAMES
    return str([model.name, *map(values.get, names)])


def video_url_or_raise(prediction: Prediction) -> str:
    """Return the URL of a finished prediction's video. Raises ProviderRefused, ProviderFailed."""
    if prediction.status != "succeeded":
        reason = one_line(message_in(prediction.error)) or "no reason given"
        detail = f"No video was made, the prediction ended as {prediction.status}: {reason}"
        raise ProviderRefused(detail, "replicate")
    video_url = prediction.video_url
    if video_url:
        return video_url
    if prediction.data_removed:
        detail = "The video has expired: Replicate keeps it an hour. A new job makes a new one."
        raise ProviderRefused(detail, "replicate")
    detail = "The prediction succeeded, but Replicate names no video."
    raise ProviderFailed(detail, "replicate", retryable=False)


async def create_prediction(model: VideoModel, values: dict[str, Any], job: Job) -> Prediction:
    """Create the job's prediction at most once; if the response is lost, search for it instead.

    Raises ProviderRefused, ProviderFailed, MissingSetting.
    """
    if job.search_window:
        found = await find_unclaimed_prediction(model, values, job, job.search_window)
        if found:
            return found

    started_at = time.time()
    try:
        response = await send_create(model, values, job)
        prediction = parse_prediction(response.payload)
        if prediction:
            return prediction
        raise invalid_response("replicate", "a prediction; one may have been created")
    except ProviderRefused as exc:
        map_replicate_field_errors(model, exc)
        raise
    except ProviderFailed as exc:
        if was_not_created(exc):
            raise
        logger.warning("searching for a prediction whose create failed: %s", exc.detail)
        window = SearchWindow(started_at, time.time() + patience_s(SEARCH_SHARE))
        # Without a key nobody comes back for it: what is found is cancelled even if nobody waits.
        with anyio.CancelScope(shield=job.record is None):
            found = await find_unclaimed_prediction(model, values, job, window)
            if found:
                return found
        raise


def was_not_created(error: ProviderFailed) -> bool:
    """Return whether a failed create has certainly created nothing."""
    if error.response:
        return error.response.status < 500 and error.response.status not in (200, 201, 202, 408)
    return isinstance(error.__cause__, NOT_SENT)


def map_replicate_field_errors(model: VideoModel, error: ServiceError) -> None:
    """Add which of our fields Replicate rejects: its `input.duration` is our `seconds`."""
    if error.response is None:
        return
    our_names: dict[str | None, str] = {
        **dict.fromkeys(LENGTH_NAMES, "seconds"),
        **dict.fromkeys(SIZE_NAMES, "resolution"),
        model.picture_field: "image_url",
        model.prompt_field: "prompt",
        model.speech_field: "text",
    }
    payload = error.response.payload
    invalid_fields = get_in(payload, "invalid_fields")
    if isinstance(invalid_fields, list):
        for invalid in invalid_fields:
            name = str(get_in(invalid, "field"))
            description = str(get_in(invalid, "description"))
            if name == "input":  # the description names the field: "prompt is required"
                name = description.partition(" ")[0]
            our_name = our_names.get(name.removeprefix("input."))
            if our_name:
                error.add_field_error(our_name, one_line(description))
    if error.response.status == 404 or "version" in str(get_in(payload, "title")):
        error.add_field_error("model", provider_message(error.response))


async def send_create(model: VideoModel, values: dict[str, Any], job: Job) -> ProviderResponse:
    """Send the create; Replicate itself ends the prediction at the job's deadline."""
    path = f"models/{model.name}/predictions"
    body: dict[str, Any] = {"input": values}
    if model.version:
        path = "predictions"
        body["version"] = model.version
    cancel_after_s = max(MIN_CANCEL_AFTER_S, round(get_settings().job_timeout_seconds))
    return await call_replicate(
        "POST",
        path,
        CREATE_RETRY,
        about_content=True,
        headers={"Cancel-After": f"{cancel_after_s}s"},
        json=body,
        timeout=CREATE_TIMEOUT,
        extensions={NEW_CONNECTION: True},
        exchange=partial(create_exchange, job),
    )


async def create_exchange(job: Job, request: httpx.Request, max_bytes: int) -> ProviderResponse:
    """Make one attempt to create, and claim what it created.

    A cancelled job still waits for the response: only that says which prediction to cancel.
    """
    await renew_record(job)
    with anyio.CancelScope(shield=True):
        response = await send_once(request, max_bytes)
    prediction = parse_prediction(response.payload)
    if prediction:
        claim_prediction(job, prediction.id)
    return response


def claim_prediction(job: Job, prediction_id: str) -> None:
    """Log the id of what is being paid for, and keep other jobs of this process from taking it."""
    if job.partial.prediction_id != prediction_id:
        logger.info("prediction_id=%s", prediction_id)
        job.partial.prediction_id = prediction_id
    app_state().claimed_predictions.append((prediction_id, job.name))


async def find_unclaimed_prediction(
    model: VideoModel, values: dict[str, Any], job: Job, window: SearchWindow
) -> Prediction | None:
    """Search for a prediction of this input that no job has claimed: once, and until the window ends."""
    while True:
        async for listed in predictions_since(window.since):
            prediction = parse_prediction(listed)
            if prediction is None or is_claimed_by_other(prediction.id, job):
                continue
            if is_prediction_of(listed, model, values):
                claim_prediction(job, prediction.id)  # before any other job searches
                return prediction
        if time.time() >= window.until:
            return None
        await asyncio.sleep(patience_s(SEARCH_SHARE) / 10)


def is_prediction_of(listed: Any, model: VideoModel, values: dict[str, Any]) -> bool:
    """Return whether a listed prediction has exactly this model, version and input."""
    if get_in(listed, "model") != model.name or get_in(listed, "input") != values:
        return False
    return model.version_id is None or get_in(listed, "version") == model.version_id


def is_claimed_by_other(prediction_id: str, job: Job) -> bool:
    """Return whether another job of this process has claimed a prediction."""
    for claimed_id, job_name in app_state().claimed_predictions:
        if claimed_id == prediction_id and job_name != job.name:
            return True
    return False


async def predictions_since(moment: float) -> AsyncIterator[Any]:
    """Yield the account's predictions since a clock time, newest first, a hundred a page."""
    created_after = datetime.fromtimestamp(moment - CLOCK_SKEW_S, timezone.utc).isoformat()
    base_url = f"{get_settings().replicate_base_url}/v1/"
    path = "predictions"
    params: dict[str, str] | None = {"created_after": created_after}
    for _ in range(MAX_LIST_PAGES):
        response = await call_replicate(
            "GET", path, LIST_RETRY, params=params, max_bytes=MAX_PREDICTION_BYTES
        )
        results = get_in(response.payload, "results")
        if isinstance(results, list):
            for listed in results:
                yield listed

        next_url = str(get_in(response.payload, "next"))
        if not next_url.startswith(base_url):
            return
        path = next_url.removeprefix(base_url)
        params = None  # they are in the URL


async def poll_prediction(prediction: Prediction) -> Prediction:
    """Return the prediction as it is now; as it was, if the response is none, since it is polled again."""
    path = f"predictions/{prediction.id}"
    response = await call_replicate("GET", path, POLL_RETRY, max_bytes=MAX_PREDICTION_BYTES)
    return parse_prediction(response.payload) or prediction


async def wait_for_prediction(
    prediction: Prediction, job: Job, kind: str | None = None
) -> Prediction:
    """Poll a prediction until it has ended, and remember how long videos of its kind take.

    `kind` is None if the prediction was created earlier: how long it takes is then unknown.
    """
    state = app_state()
    started_at = time.monotonic()
    state.active_polls += 1
    try:
        while True:
            job.emit("progress", prediction.status, prediction.percent)
            if prediction.status in TERMINAL_STATUSES:
                break
            durations = state.recent_durations.get(kind or "", ())
            waited_s = time.monotonic() - started_at
            delay_s = poll_delay_s(waited_s, state.active_polls, durations)
            # Jobs that began together drift apart, so that their polls do not come in bursts.
            await asyncio.sleep(delay_s * random.uniform(0.9, 1.1))
            prediction = await poll_prediction(prediction)
    finally:
        state.active_polls -= 1

    if kind and prediction.status == "succeeded":
        durations = state.recent_durations.setdefault(kind, deque(maxlen=RECENT_DURATIONS))
        durations.append(time.monotonic() - started_at)
    return prediction


async def cancel_prediction(prediction_id: str) -> None:
    """Stop paying for a prediction that nobody waits for, whatever else ends; a failure is logged."""
    path = f"predictions/{prediction_id}/cancel"
    try:
        with anyio.CancelScope(shield=True), anyio.fail_after(patience_s(CANCEL_SHARE)):
            await call_replicate("POST", path, CANCEL_RETRY)
        logger.info("prediction_id=%s cancelled", prediction_id)
    except (ServiceError, TimeoutError) as exc:
        reason = str(exc) or "no answer in time"
        logger.warning("prediction_id=%s not cancelled: %s", prediction_id, reason)


# ---- ffmpeg: muxing and conversion -----------------------------------------------------------------


@lru_cache(maxsize=1)
def ffmpeg_path() -> str:
    """Return imageio-ffmpeg's ffmpeg, or IMAGEIO_FFMPEG_EXE. Raises RuntimeError where there is none."""
    path = str(imageio_ffmpeg.get_ffmpeg_exe())  # tries its own binary, but not the variable's
    found = shutil.which(path)
    if found is None:
        raise RuntimeError(f"There is no ffmpeg at {path}; is IMAGEIO_FFMPEG_EXE right?")
    return os.path.abspath(found)  # it runs without a PATH


class VideoFormat(NamedTuple):
    """What a model's file is, read from its first bytes and an MP4's index."""

    name: str  # with its article, for people
    demuxer: str  # ffmpeg's
    is_plain: bool = False  # H.264 that plays everywhere, in MP4 or MOV: its picture can be copied
    is_ready: bool = False  # an MP4 with its index first and sound that plays everywhere, or none
    has_alpha: bool = False
    decoder: str | None = None  # ffmpeg's, where its usual one has no alpha


# How a file begins, and what it is. No demuxer: it is no video. An MP4 without ftyp is QuickTime's.
VIDEO_FORMATS = [
    (rb".{4}ftyp(?!qt  )", "an MP4 video", "mov"),
    (rb".{4}(ftyp|styp|moov|mdat|wide|free|skip)", "a MOV video", "mov"),
    (rb"\x1aE\xdf\xa3", "a WebM or Matroska video", "matroska"),
    (rb"GIF8[79]a", "a GIF", "gif"),
    (rb"RIFF.{4}WEBPVP8X.*ANIM", "an animated WebP", "webp_anim"),
    (rb"\x89PNG\r\n.*acTL", "an animated PNG", "apng"),
    (rb"RIFF.{4}AVI ", "an AVI video", "avi"),
    (rb"OggS", "an Ogg video", "ogg"),
    (rb"FLV\x01", "an FLV video", "flv"),
    (rb"G.{187}G", "an MPEG-TS video", "mpegts"),
    (rb"\xff\xd8\xff|\x89PNG\r\n|RIFF.{4}WEBP", "a still picture", None),
    (rb"#EXTM3U", "an HLS playlist", None),
    (rb"PK\x03\x04", "a ZIP archive", None),
    (rb"\s*<", "a web page", None),
    (rb"", "a file of an unknown format", None),
]
ALPHA_DEMUXERS = ("gif", "webp_anim", "apng")
ALPHA_CODECS = (b"ap4h", b"ap4x", b"rle ", b"png ")  # of QuickTime
WEBM_ALPHA = b"\x53\xc0\x81\x01"  # the element AlphaMode, of a VP8 or VP9 track
EXP_GOLOMB = "(?:1|01.|001..|0001...|00001....)"  # bits of a number from 0 to 30 in H.264
CUT_OFF = "The video that the model made is cut off."


def read_video_format(video: Path) -> VideoFormat:
    """Return what a model's file is. Raises ResourceFailed if it is no video, or cut off."""
    with video.open("rb") as file:
        head = file.read(MAX_HEAD_BYTES)
        file_format = find_video_format(head)
        if file_format.demuxer == "mov":
            check_mp4(video)
            return read_mp4_format(file, file_format)
        if is_cut_off(file, head, file_format.demuxer):
            raise ResourceFailed(CUT_OFF, "replicate", retryable=False)
    if file_format.demuxer in ALPHA_DEMUXERS:
        return file_format._replace(has_alpha=True)
    if file_format.demuxer == "matroska" and WEBM_ALPHA in head:
        decoder = "libvpx" if b"V_VP8" in head else "libvpx-vp9"
        return file_format._replace(has_alpha=True, decoder=decoder)
    return file_format


def plays_everywhere(video_format: VideoFormat, as_it_is: bool) -> bool:
    """Return whether a video needs no conversion before it is muxed, or stored as it is."""
    if as_it_is:
        return video_format.is_plain and video_format.is_ready
    return video_format.is_plain


def find_video_format(head: bytes) -> VideoFormat:
    """Return the format of a file by its first bytes alone. Raises ResourceFailed if it is no video."""
    for pattern, name, demuxer in VIDEO_FORMATS:
        if not re.match(pattern, head, re.DOTALL):
            continue
        if demuxer:
            return VideoFormat(name, demuxer)
        break
    raise ResourceFailed(f"The model made {name}, not a video.", "replicate", retryable=False)


def is_cut_off(file: BinaryIO, head: bytes, demuxer: str) -> bool:
    """Return whether a file ends before the end that its format states, where it states one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    tail = file.read()
    if head.startswith(b"RIFF"):
        stated = int.from_bytes(head[4:8], "little")
        return size < stated < 0xFFFFFFFF  # that much: written as a stream
    if demuxer == "gif":
        return not tail.rstrip(b"\0\r\n").endswith(b";")
    if demuxer == "apng":
        return b"IEND" not in tail
    if demuxer == "matroska":
        return size < matroska_end(head)
    return False


def matroska_end(head: bytes) -> int:
    """Return where a Matroska file's segment ends, 0 if it does not say (RFC 8794, element sizes)."""
    offset = head.find(b"\x18\x53\x80\x67") + 4  # the element Segment
    if offset < 4 or offset + 8 > len(head) or head[offset] == 0:
        return 0
    length = 9 - head[offset].bit_length()  # of the size itself: 1 to 8 bytes
    bits = 7 * length
    segment_bytes = int.from_bytes(head[offset : offset + length], "big") & ((1 << bits) - 1)
    if segment_bytes == (1 << bits) - 1:  # unknown, as a live stream writes it
        return 0
    return offset + length + segment_bytes


def check_mp4(video: Path) -> None:
    """Refuse a file that is not an MP4 or is cut off: ffmpeg would make a shorter video of it.

    Raises ResourceFailed.
    """
    first_boxes = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip")  # QuickTime: any
    size = video.stat().st_size
    offset = 0
    with video.open("rb") as file:
        for name, _, end in top_level_boxes(file, size):
            if offset == 0 and name not in first_boxes:
                message = "What the model made is not an MP4 video."
                raise ResourceFailed(message, "replicate", retryable=False)
            offset = end
    if offset != size or size == 0:
        raise ResourceFailed(CUT_OFF, "replicate", retryable=False)


def top_level_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield an MP4's boxes: name, start of the content, end.

    ISO/IEC 14496-12: 4 bytes length, 4 bytes name; a length of 0 means to the end of the file, of 1 that
    the length follows in 8 bytes.
    """
    offset = 0
    for _ in range(MAX_MP4_BOXES):
        if offset >= size:
            return
        file.seek(offset)
        header = file.read(16).ljust(16, b"\0")
        length, name, long_length = struct.unpack(">I4sQ", header)
        header_bytes = 8
        if length == 0:
            length = size - offset
        elif length == 1:
            length = long_length
            header_bytes = 16
        end = offset + max(8, length)
        yield name, offset + header_bytes, end
        offset = end


def read_mp4_format(file: BinaryIO, file_format: VideoFormat) -> VideoFormat:
    """Return what is in an MP4 or MOV, by the description of its tracks in `moov`."""
    size = file.seek(0, os.SEEK_END)
    index = b""
    index_first = False
    names = []
    for name, start, end in top_level_boxes(file, size):
        names.append(name)
        if name == b"moov":
            file.seek(start)
            index = file.read(min(end - start, MAX_MP4_INDEX_BYTES))
            index_first = b"mdat" not in names
            break

    video_codec, video_entry = b"", b""
    sound_plays = True
    for handler, codec, entry in mp4_tracks(index):
        if handler == b"vide" and not video_codec:  # the one that ffmpeg takes as well
            video_codec, video_entry = codec, entry
        if handler == b"soun" and codec != b"mp4a":
            sound_plays = False
    return file_format._replace(
        is_plain=video_codec == b"avc1" and is_plain_h264(video_entry),
        is_ready=index_first and sound_plays and names[0] == b"ftyp" and "MP4" in file_format.name,
        has_alpha=video_codec in ALPHA_CODECS,
    )


def mp4_tracks(index: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield each track of `moov`: its handler, its codec and that codec's description (a sample entry)."""
    for media in find_boxes(index, b"trak", b"mdia"):
        handler = next(find_boxes(media, b"hdlr"), b"")[8:12]
        table = next(find_boxes(media, b"minf", b"stbl", b"stsd"), b"")
        entries = list(islice(boxes(table[8:]), 2))
        if len(entries) == 1:
            codec, entry = entries[0]
            yield handler, codec, entry
        else:  # a track that changes its codec
            yield handler, b"mixed", b""


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of the boxes inside one."""
    offset = 0
    while offset + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, offset)
        if length < 8:  # 0 ends QuickTime's lists; no box in here is so long that it needs 64 bits
            return
        yield name, content[offset + 8 : offset + length]
        offset += length


def find_boxes(content: bytes, name: bytes, *inner: bytes) -> Iterator[bytes]:
    """Yield the content of the boxes of this name, or of those inside them, by their names."""
    for found, box in boxes(content):
        if found == name and inner:
            yield from find_boxes(box, *inner)
        elif found == name:
            yield box


def is_plain_h264(entry: bytes) -> bool:
    """Return whether an H.264 track is Baseline, Main or High, 8 bit and 4:2:0.

    78 bytes of a sample entry go before its boxes. `avcC`: version, profile, 2 bytes, the length of
    lengths, how many sequence parameter sets follow, the length of the first in 2 bytes, that set.
    """
    record = next(find_boxes(entry[78:], b"avcC"), b"")
    if len(record) < 16 or record[0] != 1:
        return False
    profile = record[1]
    if profile in (66, 77):  # Baseline and Main are never anything else
        return True
    if profile != 100:
        return False
    # Of the set, after a byte of its type and 3 of profile and level: id, chroma format (1 is 4:2:0),
    # bits of luma and of chroma beyond 8 (ITU-T H.264, 7.3.2.1.1). `avcC` may not repeat them.
    bits = "".join(f"{byte:08b}" for byte in record[12:16])
    return re.match(EXP_GOLOMB + "01011", bits) is not None  # 1 is written 010, and 0 is 1


FFMPEG_OPTIONS = ["-hide_banner", "-nostdin", "-y", "-v", "error", "-filter_threads", "1"]
FFMPEG_OPTIONS += ["-max_alloc", str(FFMPEG_MAX_ALLOC_BYTES)]
# Of each input; its demuxer is forced as well: a playlist named .mp4 is not followed.
INPUT_OPTIONS = ["-protocol_whitelist", "file", "-threads", "1"]
# Of the output. A short video of many bytes would grow without end as it repeats.
OUTPUT_OPTIONS = ["-fs", str(MAX_DOWNLOAD_BYTES + 1), "-movflags", "+faststart", "-f", "mp4"]


def mux_arguments(video: Path, speech: Path, demuxer: str, fit: Fit, final: Path) -> list[str]:
    """Return ffmpeg's arguments: the video copied, our speech half a second in, ended as `fit` says."""
    audio_filter = f"adelay={SPEECH_OFFSET_MS}:all=1"
    if fit == "video":
        audio_filter += ",apad"

    arguments = [*FFMPEG_OPTIONS]
    if fit == "speech":
        arguments += ["-stream_loop", "-1"]
    arguments += [*INPUT_OPTIONS, "-f", "mov", "-i", f"file:{video}"]
    arguments += [*INPUT_OPTIONS, "-f", demuxer, "-i", f"file:{speech}"]
    # The model's picture and our speech, whatever else the video contains.
    arguments += ["-map", "0:V:0", "-map", "1:a:0", "-c:v", "copy"]
    # A voice is 39 dB above its error; with the default coder at 128k 29 dB, for 1.6 times the CPU.
    arguments += ["-c:a", "aac", "-b:a", "96k", "-aac_coder", "fast", "-threads", "1"]
    arguments += ["-af", audio_filter]
    # By default a copied stream may run ten seconds ahead, and would not end with the shortest.
    arguments += ["-shortest", "-shortest_buf_duration", "3600"]
    arguments += [*OUTPUT_OPTIONS, f"file:{final}"]
    return arguments


async def mux_video_audio(video: Path, speech: Path, final: Path, fit: Fit = "shortest") -> None:
    """Put speech (in TTS_OUTPUT_FORMAT) and video together.

    Raises ResourceFailed, also after a minute or over 100 MB; OSError.
    """
    await asyncio.to_thread(check_mp4, video)
    arguments = mux_arguments(video, speech, speech_format().extension, fit, final)
    async with app_state().ffmpeg_slots:
        await run_ffmpeg(arguments, FFMPEG_TIMEOUT_S, MUX_MAX_BYTES)
    if final.stat().st_size > MAX_DOWNLOAD_BYTES:  # noqa: ASYNC240  ffmpeg has stopped there
        raise ResourceFailed("The final video is larger than 100 MB.", retryable=False)


def convert_arguments(
    video: Path, source: VideoFormat, target: Path, with_sound: bool
) -> list[str]:
    """Return ffmpeg's arguments: an MP4 that plays everywhere, its sound as AAC or left out."""
    arguments = [*FFMPEG_OPTIONS, *INPUT_OPTIONS, "-max_pixels", str(MAX_CONVERT_PIXELS)]
    if source.decoder:
        arguments += ["-c:v", source.decoder]
    arguments += ["-f", source.demuxer, "-i", f"file:{video}", "-map", "0:V:0"]
    if with_sound:
        arguments += ["-map", "0:a:0?", "-c:a", "aac", "-b:a", "128k"]

    if source.is_plain:
        arguments += ["-c:v", "copy"]
    else:
        filters = f"fps='{CONVERT_RATE}',crop=trunc(iw/2)*2:trunc(ih/2)*2:0:0"  # 4:2:0 is even
        if source.has_alpha:
            filters += ",premultiply=inplace=1"  # over black
        arguments += ["-vf", f"{filters},scale=out_range=tv", "-pix_fmt", "yuv420p"]
        arguments += ["-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-bf", "0"]
    arguments += ["-threads", "1", *OUTPUT_OPTIONS, f"file:{target}"]
    return arguments


async def convert_video(video: Path, source: VideoFormat, target: Path, with_sound: bool) -> Path:
    """Convert a video that would not play everywhere; return what is to be delivered.

    That is an MP4 as it came if it cannot be converted within the limits: it plays somewhere. Raises
    ResourceFailed, which names the format, for anything else; OSError.
    """
    arguments = convert_arguments(video, source, target, with_sound)
    try:
        async with app_state().conversion_slot:
            await run_ffmpeg(arguments, CONVERT_TIMEOUT_S, CONVERT_MAX_BYTES, in_background=True)
        if target.stat().st_size > MAX_DOWNLOAD_BYTES:  # noqa: ASYNC240  ffmpeg has stopped there
            raise ResourceFailed("The converted video is larger than 100 MB.", retryable=False)
    except ResourceFailed as exc:
        if source.demuxer == "mov":
            logger.warning("the video is delivered as it came: %s", exc.detail)
            return video
        message = f"The model made {source.name}, which could not be converted to an MP4 video."
        raise ResourceFailed(message, "replicate", retryable=exc.retryable) from exc
    return target


async def run_ffmpeg(
    arguments: list[str],
    timeout_s: float,
    max_bytes: int = MUX_MAX_BYTES,
    in_background: bool = False,
) -> None:
    """Run ffmpeg to its end; it is killed and reaped however this call ends. Raises ResourceFailed, OSError."""
    command = [await asyncio.to_thread(ffmpeg_path), *arguments]
    stderr_tail = b""
    # It needs no key from the environment, and Ctrl-C in a terminal is for the service alone.
    process = await anyio.open_process(
        command, stdin=DEVNULL, stdout=DEVNULL, env={}, start_new_session=True
    )
    limit_process(process.pid, max_bytes, in_background)
    async with process:
        assert process.stderr is not None
        try:
            with anyio.fail_after(timeout_s):
                async for chunk in process.stderr:
                    stderr_tail = (stderr_tail + chunk)[-1000:]
                await process.wait()
        except BaseException as exc:
            with suppress(ProcessLookupError):
                process.kill()
            if isinstance(exc, TimeoutError):
                message = f"The video could not be put together within {timeout_s:g} s."
                raise ResourceFailed(message) from exc
            raise
    if process.returncode != 0:
        raise_ffmpeg_error(process.returncode, stderr_tail)


def limit_process(pid: int, max_bytes: int, in_background: bool) -> None:
    """Limit the memory of a process with a session of its own; on Linux only.

    In the background it runs when no other process needs the core: beside one of low priority, other
    muxes took a quarter longer.

    RLIMIT_DATA counts what it can write to. RLIMIT_AS would also count ffmpeg's own 170 MB, and 64 MB
    that malloc reserves for each thread: it cannot tell a bomb from a video.
    """
    if sys.platform == "linux":
        import resource

        with suppress(OSError, ValueError):  # it has ended already, or has a lower limit
            resource.prlimit(pid, resource.RLIMIT_DATA, (max_bytes, max_bytes))
        if in_background:
            with suppress(OSError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
                # Outside of a container a session may count as one, whatever is in it.
                Path(f"/proc/{pid}/autogroup").write_text("19", encoding="ascii")


def raise_ffmpeg_error(returncode: int | None, stderr_tail: bytes) -> None:
    """Log how ffmpeg failed, and raise ResourceFailed, or OSError if the disk is full."""
    lines = stderr_tail.decode("utf-8", "replace").split("\n")
    output = " | ".join(lines).strip(" |")
    logger.warning("ffmpeg ended with %s: %s", returncode, output)
    if os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = "Video and speech could not be put together; ffmpeg cannot use one of them."
    raise ResourceFailed(message, retryable=False)


# ---- Application: lifespan, middleware, error handlers ---------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the shared state for the life of the process; at its end, wait for the running jobs."""
    global _state
    configure_logging()
    warn_about_missing_settings()
    await asyncio.to_thread(ffmpeg_path)  # fails here rather than after a video was paid for
    async with open_app_state() as state:
        _state = state
        try:
            yield
        finally:
            await drain_jobs(state)
            _state = None


def configure_logging() -> None:
    """Log to stderr, unless whoever runs the service has set up logging already."""
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")


def warn_about_missing_settings() -> None:
    """Log one warning that names the variables without which requests fail."""
    settings = get_settings()
    missing = [name.upper() for name in SPEECH_JOB_SETTINGS if getattr(settings, name) is None]
    if missing:
        names = ", ".join(missing)
        logger.warning("not set: %s; requests that need them are answered 500", names)


async def drain_jobs(state: AppState) -> None:
    """Graceful shutdown: cancel the jobs that still run, those with a key after a while.

    uvicorn has just cancelled the open requests, and with them their jobs; jobs with a key that nobody
    waits for have not heard of it. What they leave is resumed by the next request.
    """
    started_at = time.monotonic()
    drain_s = min(patience_s(DRAIN_SHARE), MAX_DRAIN_S)
    while state.open_requests or state.jobs:
        elapsed_s = time.monotonic() - started_at
        if elapsed_s >= SHUTDOWN_WAIT_S:
            logger.warning("%d jobs did not end in time", len(state.jobs))
            return
        for job in state.jobs.values():
            if job.record is None or elapsed_s > drain_s:
                job.cancel("shutdown")
        await asyncio.sleep(0.05)


@dataclass(frozen=True)
class RequestMiddleware:
    """The outermost layer: each request gets an id, each response X-Request-ID and Server-Timing."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        request_id = Headers(scope=scope).get("x-request-id", "")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id):
            request_id = uuid.uuid4().hex
        request_state = scope.setdefault("state", {})
        request_state["request_id"] = request_id
        current_request_id.set(request_id)

        async def send_with_headers(message: Message) -> None:
            """Add the headers to the start of the response."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                job = request_state.get("job")  # set by start_job: the job, or the one it joined
                if job and job.timings:
                    headers["Server-Timing"] = server_timing(job.timings)
            await send(message)

        state = app_state()
        state.open_requests += 1
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            state.open_requests -= 1


def server_timing(timings: Mapping[Stage, float]) -> str:
    """Return stages and their seconds as a Server-Timing header, in milliseconds."""
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in timings.items())


@dataclass(frozen=True)
class ErrorMiddleware:
    """The last catch, inside CORS: Starlette's own is outside, and browsers would not see its answer."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an unforeseen error, unless the response has started."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def send_and_note_start(message: Message) -> None:
            """Pass a message on, and remember that the response has started."""
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_start)
        except Exception as exc:
            if started:
                raise
            response = error_response(Request(scope), as_service_error(exc))
            await response(scope, receive, send)


@dataclass(frozen=True)
class BodyLimitMiddleware:
    """Refuses request bodies over MAX_REQUEST_BYTES; a longer one is not read if it states its length."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, counting its body. Raises HTTPException where the body is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        stated = Headers(scope=scope).get("content-length", "")
        received_bytes = 0

        async def receive_with_limit() -> Message:
            """Receive a message, and refuse what passes the limit."""
            nonlocal received_bytes
            if stated.isdecimal() and int(stated) > MAX_REQUEST_BYTES:
                raise HTTPException(400, BODY_TOO_LARGE)
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > MAX_REQUEST_BYTES:
                raise HTTPException(400, BODY_TOO_LARGE)
            return message

        await self.app(scope, receive_with_limit, send)


BODY_TOO_LARGE = f"The request's body is larger than {MAX_REQUEST_BYTES // 1024} KiB"


def error_response(
    request: Request, error: ServiceError, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the response for an error."""
    job = getattr(request.state, "job", None)
    body = error_body(error, request.state.request_id, job)
    return JSONResponse(body, error.http_status, headers)


async def handle_service_error(request: Request, exc: ServiceError) -> Response:
    """Answer an error of the service's own."""
    return error_response(request, exc)


# Pydantic's error types in plain words.
ERROR_MESSAGES = {
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "missing": "is required",
    "string_type": "must be a string",
    "string_too_short": "must not be blank",
    "string_too_long": "must have at most {max_length} characters",
    "int_type": "must be a whole number",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "json_invalid": "is not valid JSON",
}


def friendly_message(error: Mapping[str, Any]) -> str:
    """Return a validation error in plain words, without regular expressions."""
    context = error.get("ctx", {})
    pattern = context.get("pattern")
    if pattern in PATTERN_MESSAGES:
        return PATTERN_MESSAGES[pattern]
    if error["type"] in ERROR_MESSAGES:
        return ERROR_MESSAGES[error["type"]].format(**context)
    return str(error["msg"]).removeprefix("Value error, ")


async def handle_validation_error(request: Request, exc: RequestValidationError) -> Response:
    """Answer a body or header that is not as the route expects it."""
    errors = []
    for error in exc.errors():
        errors.append(InputError(loc=list(error["loc"]), msg=friendly_message(error)))

    content_type = request.headers.get("content-type", "")
    if re.match(r"application/([\w.-]+\+)?json\b", content_type, re.IGNORECASE):
        names = [part for part in errors[0].loc[1:] if isinstance(part, str)]
        name = ".".join(names)
        detail = f"{name}: {errors[0].msg}." if name else f"The body {errors[0].msg}."
    else:
        detail = "The body must be JSON, sent with Content-Type: application/json."
    return error_response(request, InvalidInput(detail, errors=errors))


async def handle_http_error(request: Request, exc: HTTPException) -> Response:
    """Answer what the framework refuses: no such route (404) or method (405), an unreadable body (400)."""
    if exc.status_code == 404:
        error = InvalidInput("There is no such route; /docs lists them all.")
    else:
        error = InvalidInput(f"{exc.detail}.")
    error.http_status = exc.status_code
    return error_response(request, error, exc.headers)


app = FastAPI(
    title="Talking Pet",
    summary="A photo of a pet and a line of text go in, a video in which the pet says it comes out.",
    lifespan=lifespan,
    redirect_slashes=False,  # a 307 is no answer of this service; it would name http:// behind a proxy
    generate_unique_id_function=lambda route: route.name,
)
app.add_exception_handler(ServiceError, handle_service_error)  # type: ignore[arg-type]
app.add_exception_handler(RequestValidationError, handle_validation_error)  # type: ignore[arg-type]
app.add_exception_handler(HTTPException, handle_http_error)  # type: ignore[arg-type]
# The last one added is the outermost.
app.add_middleware(BodyLimitMiddleware)
app.add_middleware(ErrorMiddleware)
app.add_middleware(
    CORSMiddleware,
    allow_origins=get_settings().allowed_origin.split(","),
    allow_methods=["GET", "POST"],
    allow_headers=["*"],
    expose_headers=["X-Request-ID", "Server-Timing", "Idempotency-Replayed"],
)
app.add_middleware(RequestMiddleware)


# ---- Idempotency: the job record -------------------------------------------------------------------
#
# A job with an Idempotency-Key keeps a record in the bucket, jobs/<HMAC of the key>.json: enough to resume,
# and no user input. Within a process, requests with one key join one Job (AppState.jobs). Otherwise the
# record decides:
#
#   record                                  the request
#   --------------------------------------  ------------------------------------------------------------
#   none                                    begins: writes the record, then pays
#   of another body                         400 on the header
#   with a result                           is answered with it (replay)
#   with a prediction id                    resumes: keeps the speech, polls the prediction
#   without one, written by another         waits until that instance has written a prediction id, given
#     instance within LEASE_SHARE           up, or written nothing for that long
#   without one, older, or given up         resumes: keeps the speech, searches for a prediction that
#     (owner is empty)                      nobody recorded, else creates one

INSTANCE_ID = uuid.uuid4().hex
KEY_REUSED = "belongs to a request with another body; a new job needs a new key"


# As earlier versions store a record, which may read ours while a deploy overlaps them.
STORED_NAMES = {
    "request_digest": "body",
    "created_at": "started",
    "updated_at": "written",
    "owner": "writer",
    "result": "answer",
}


class JobRecord(
    BaseModel, populate_by_name=True, alias_generator=lambda name: STORED_NAMES.get(name, name)
):
    """The idempotency record: enough to resume, and no user input."""

    request_digest: str  # keyed digest of the route and of the client's body
    created_at: float  # clock time; no prediction of the job is older
    updated_at: float
    owner: str  # INSTANCE_ID; empty: it has given the job up
    partial: PartialResult = PartialResult()
    result: SpeechResult | VideoResult | None = None


def keyed_digest(text: str) -> str:
    """Return an HMAC-SHA-256 that only the service role key can compute. Raises MissingSetting."""
    key = get_settings().required("supabase_service_role")
    return hmac.new(key.encode(), text.encode(), "sha256").hexdigest()


def record_path(key: str) -> str:
    """Return where the record of an idempotency key is stored: the bucket is public, the name secret."""
    return f"jobs/{keyed_digest(key)}.json"


def new_record(route: str, body: BaseModel) -> JobRecord:
    """Return the record of a job that begins. Raises MissingSetting."""
    require_settings(VIDEO_JOB_SETTINGS + STORAGE_SETTINGS)
    if isinstance(body, JobPromptTTS):
        require_settings(SPEECH_JOB_SETTINGS)
    request = json.dumps([route, body.model_dump(exclude_unset=True)], sort_keys=True)
    now = time.time()
    return JobRecord(
        request_digest=keyed_digest(request), created_at=now, updated_at=now, owner=INSTANCE_ID
    )


async def save_record(
    job: Job,
    retry: RetryPolicy = UPLOAD_RETRY,
    *,
    required: bool = True,
    owner: str | None = None,
    result: BaseModel | None = None,
) -> None:
    """Write how far a job with a key is. Raises ResourceFailed; unless `required`, that is only logged."""
    if job.record is None:
        return
    changes: dict[str, Any] = {"updated_at": time.time(), "partial": job.partial}
    if owner is not None:
        changes["owner"] = owner
    if result is not None:
        changes["result"] = result
    job.record = job.record.model_copy(update=changes)
    content = job.record.model_dump_json(by_alias=True, exclude_none=True).encode()
    try:
        await supabase_upload(job.name, content, "application/json", retry, "max-age=0")
    except ServiceError as exc:
        if required:
            raise
        logger.warning("the job record was not written: %s", exc.detail)


async def read_record(path: str) -> JobRecord | None:
    """Return the record at a path of the bucket, or None. Raises ResourceFailed."""
    url = storage_url(path, "authenticated/")
    try:
        response = await call_provider(
            "supabase", "GET", url, UPLOAD_RETRY, headers=storage_headers()
        )
    except ResourceFailed as exc:
        if exc.response and exc.response.effective_status == 404:
            return None
        raise
    try:
        return JobRecord.model_validate_json(response.body)
    except ValidationError as exc:
        message = f"The file {path} in the bucket is not one of this service's; remove it."
        raise ResourceFailed(message, "supabase", retryable=False) from exc


async def load_record(job: Job) -> JobRecord | None:
    """Return the record of a job's key once no other instance is at work on it; None: there is none.

    Raises InvalidInput if it is of another body, ResourceFailed.
    """
    while job.record:
        record = await read_record(job.name)
        if record is None:
            return None
        if record.request_digest != job.record.request_digest:
            raise invalid_field("Idempotency-Key", KEY_REUSED, "header")
        is_fresh = abs(time.time() - record.updated_at) < patience_s(LEASE_SHARE)
        is_others = record.owner not in ("", INSTANCE_ID)
        can_resume = record.result or record.partial.prediction_id
        if can_resume or not (is_others and is_fresh):
            return record
        await asyncio.sleep(patience_s(LEASE_SHARE) / 30)
    return None


def resume_from(job: Job, record: JobRecord) -> None:
    """Continue a job from what an earlier request, or another instance, has left."""
    job.record = record.model_copy(update={"owner": INSTANCE_ID})
    job.partial = record.partial
    # An owner that has not given up may have sent a create just after its last write.
    grace_s = patience_s(SEARCH_SHARE) if record.owner else 0
    job.search_window = SearchWindow(record.created_at, record.updated_at + grace_s)


async def run_idempotent(job: Job, work: Callable[[], Awaitable[BaseModel]]) -> BaseModel:
    """Answer a job with a key from its record if it is done, resume it, or begin it."""
    record = await load_record(job)
    if record:
        resume_from(job, record)
        if record.result:
            job.replayed = True
            return record.result
    await save_record(job)

    try:
        result = await work()
    except BaseException:
        save_s = min(patience_s(SEARCH_SHARE), MAX_RECORD_SAVE_S)
        with anyio.move_on_after(save_s, shield=True):  # other instances need not wait for us
            await save_record(job, required=False, owner="")
        raise
    with suppress(asyncio.CancelledError):  # a result is a result, also at the deadline
        await save_record(job, PAID_UPLOAD_RETRY, required=False, result=result)
    return result


async def record_prediction(job: Job) -> None:
    """Record the prediction that was just created, also if the job is being cancelled."""
    with anyio.move_on_after(patience_s(MAX_WAIT_SHARE), shield=True):
        await save_record(job, required=False)


async def renew_record(job: Job) -> None:
    """Show other instances, while a create is throttled, that this one is still at work."""
    if job.record and time.time() - job.record.updated_at > patience_s(LEASE_SHARE) / 3:
        await save_record(job, required=False)


async def resume_newer_record(job: Job) -> None:
    """Just before the video is paid for, continue from what another instance has recorded meanwhile."""
    audio_url = job.partial.audio_url
    record = await load_record(job)
    if record and record.owner != INSTANCE_ID:
        resume_from(job, record)
        job.partial.audio_url = audio_url
    elif audio_url:
        await save_record(job)


# ---- Job runner: deadline, disconnects, JSON and SSE -----------------------------------------------

Body = TypeVar("Body", bound=JobPromptOnly)
Work = Callable[[Body, Job], Awaitable[BaseModel]]


async def answer_job(request: Request, body: Body, key: str | None, work: Work[Body]) -> Response:
    """Run a job, or join the running one with this key; answer with JSON or an event stream."""
    job = start_job(request, body, key, work)
    events = job.subscribe()
    # Starlette cancels no plain handler when its client disconnects.
    watcher = asyncio.create_task(watch_disconnect(request, job, events))
    if job.task:
        job.task.add_done_callback(lambda _: watcher.cancel())
    if prefers_event_stream(request.headers.get("accept", "")):
        return await stream_job(job, events)
    return await wait_for_job(job, events)


async def wait_for_job(job: Job, events: Events) -> Response:
    """Return the job's result as JSON. Raises its ServiceError."""
    chunk = await next_sse_chunk(job, events)
    while chunk is not None:
        chunk = await next_sse_chunk(job, events)
    job.unsubscribe(events)
    result = result_or_raise(job)
    return Response(
        result.model_dump_json(), media_type="application/json", headers=replay_header(job)
    )


async def stream_job(job: Job, events: Events) -> Response:
    """Return the job's event stream. Raises its ServiceError if it failed before the first event."""
    first_chunk = await next_sse_chunk(job, events)
    if first_chunk is None:
        job.unsubscribe(events)
        result_or_raise(job)
    headers = {
        **replay_header(job),
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",  # nginx: pass events on at once
    }
    return EventStreamResponse(sse_stream(job, first_chunk, events), headers=headers)


def result_or_raise(job: Job) -> BaseModel:
    """Return the result of a finished job. Raises its ServiceError."""
    if isinstance(job.result, BaseModel):
        return job.result
    raise job.result or ServiceError("The client has disconnected.")


def replay_header(job: Job) -> dict[str, str]:
    """Return Idempotency-Replayed if the result is an earlier request's."""
    return {"Idempotency-Replayed": "true"} if job.replayed else {}


def prefers_event_stream(accept: str) -> bool:
    """Return whether an Accept header names an event stream, and JSON with no higher quality.

    RFC 9110, 12.5.1.
    """
    qualities: dict[str, float] = {}
    for media_range in re.sub(r"\s", "", accept.lower()).split(","):
        name, _, parameters = media_range.partition(";")
        match = re.search(r"(?:^|;)q=([01](?:\.\d{0,3})?)", parameters)
        qualities[name] = float(match[1]) if match else 1.0
    stream_quality = qualities.get("text/event-stream", 0)
    json_quality = 0.001
    for name in ("application/json", "application/*", "*/*"):  # the most specific counts
        if name in qualities:
            json_quality = max(json_quality, qualities[name])
            break
    return stream_quality >= json_quality


def start_job(request: Request, body: Body, key: str | None, work: Work[Body]) -> Job:
    """Return a new job, or the one that runs with the same key. Raises InvalidInput, MissingSetting."""
    job = Job(request.state.request_id)
    request.state.job = job
    state = app_state()
    if key is None:
        coro = work(body, job)
    else:
        job.record = new_record(request.url.path, body)
        job.name = record_path(key)
        running = state.jobs.get(job.name)
        if running and running.record:
            if running.record.request_digest != job.record.request_digest:
                raise invalid_field("Idempotency-Key", KEY_REUSED, "header")
            logger.info("joins the job of request_id=%s", running.request_id)
            request.state.job = running
            return running
        coro = run_idempotent(job, lambda: work(body, job))
    state.jobs[job.name] = job
    job.task = asyncio.create_task(run_job(job, coro))
    return job


async def run_job(job: Job, coro: Awaitable[BaseModel]) -> None:
    """Run a job to its end, in a task of its own: a result, or the error for all who wait."""
    try:
        with job.scope, anyio.move_on_after(get_settings().job_timeout_seconds):
            job.result = await coro
    except Exception as exc:  # noqa: BLE001  whatever happened is answered
        job.result = as_service_error(exc)
    finally:
        if job.result is None:
            job.result = job.cancellation_error()
        app_state().jobs.pop(job.name, None)  # from now on only the record knows of it
        job.finish()


async def watch_disconnect(request: Request, job: Job, events: Events) -> None:
    """On disconnect, cancel the job; with a key it continues and only this client's events end."""
    message = await request.receive()
    while message["type"] != "http.disconnect":
        message = await request.receive()
    if job.record:
        job.unsubscribe(events)
        events.put_nowait(None)
    else:
        job.cancel("client_disconnected")


class EventStreamResponse(EventSourceResponse):
    """FastAPI's event stream, whose client is watched by `watch_disconnect`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events to the last one, also while the process is ending."""
        await self.stream_response(send)


async def sse_stream(job: Job, first_chunk: bytes | None, events: Events) -> AsyncIterator[bytes]:
    """Yield every stage event, comments while there is none, then exactly one `result` or `error`."""
    chunk = first_chunk
    while chunk is not None:
        yield chunk
        chunk = await next_sse_chunk(job, events)
    job.unsubscribe(events)

    if isinstance(job.result, ServiceError):
        body = error_body(job.result, job.request_id, job)
        body["status"] = job.result.http_status
        data = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        yield format_sse_event(event="error", data_str=data)
    elif job.result:
        yield format_sse_event(event="result", data_str=job.result.model_dump_json())


async def next_sse_chunk(job: Job, events: Events) -> bytes | None:
    """Return the next stage event, or a comment after KEEPALIVE_SECONDS; None after the last event."""
    try:
        with anyio.move_on_after(get_settings().keepalive_seconds):
            event = await events.get()
            if event is None:
                return None
            data = event.model_dump_json(exclude_none=True)
            return format_sse_event(event="stage", data_str=data)
    except asyncio.CancelledError:
        # uvicorn cancels its requests as the process ends: the client still gets the job's outcome.
        job.cancel("shutdown")
    return KEEPALIVE_COMMENT


# ---- Job pipelines ---------------------------------------------------------------------------------
#
# Each step asks job.partial whether an earlier request has done it already.


async def video_job(body: JobPromptOnly, job: Job) -> VideoResult:
    """Make a silent video."""
    require_settings(VIDEO_JOB_SETTINGS)
    model = await check_job(body, job)
    video_url = await make_video(body, model, job)
    return VideoResult(video_url=video_url)


async def speech_job(body: JobPromptTTS, job: Job) -> SpeechResult:
    """Make a final video. The cheap step comes first, so that a bad text, voice or bucket costs no video."""
    require_settings(SPEECH_JOB_SETTINGS)
    check_text(body.text)
    model = await check_job(body, job, has_speech=True)
    with tempfile.TemporaryDirectory(prefix="talking-pet-") as folder_name:
        folder = Path(folder_name)
        speech = folder / "speech"
        audio_url = await make_speech(body, job, speech)
        video_url = await make_video(body, model, job, audio_url)

        video = folder / "video.mp4"
        with job.stage("download"):
            await download(video_url, video)
            video_format = await asyncio.to_thread(read_video_format, video)

        video_speaks = model.speech_field is not None
        final = await make_final_video(
            video, video_format, None if video_speaks else speech, body.fit, job
        )

        with job.stage("final_upload"):
            path = f"videos/{uuid.uuid4()}.mp4"
            final_url = await supabase_upload(path, final, "video/mp4", PAID_UPLOAD_RETRY)
    return SpeechResult(audio_url=audio_url, video_url=video_url, final_url=final_url)


def check_text(text: str) -> None:
    """Raise InvalidInput if a text is longer than TTS_MAX_CHARS."""
    max_chars = get_settings().tts_max_chars
    if len(text) > max_chars:
        message = f"has {len(text)} characters, the most is {max_chars}"
        raise invalid_field("text", message)


async def check_job(body: JobPromptOnly, job: Job, has_speech: bool = False) -> VideoModel:
    """Refuse, before anything is paid for, what cannot succeed; return the requested model."""
    model = await find_model(body.model)
    audio_url = EXAMPLE_AUDIO_URL if has_speech else None  # the speech's own URL is not known yet
    build_model_input(model, body, audio_url)
    if job.partial.prediction_id is None:
        await check_picture(body.image_url)
    return model


async def make_speech(body: JobPromptTTS, job: Job, target: Path) -> str:
    """Make and store the speech, unless it exists, and fetch it to `target`; return its URL."""
    speech: bytes | None = None
    audio_url = job.partial.audio_url
    if audio_url is None:
        with job.stage("speech"):
            speech = await elevenlabs_tts_bytes(body.text, body.voice_id)

    with job.stage("audio_upload"):
        if audio_url is None and speech is not None:
            extension, content_type, _ = speech_format()
            path = f"audio/{uuid.uuid4()}.{extension}"
            audio_url = await supabase_upload(path, speech, content_type)
            job.partial.audio_url = audio_url
        assert audio_url is not None
        await download_speech(audio_url, target)
        if speech is not None and target.stat().st_size != len(speech):  # noqa: ASYNC240
            message = "The speech's public URL answers with another file; is SUPABASE_URL right?"
            raise ResourceFailed(message, "supabase", retryable=False)
    return audio_url


async def download_speech(audio_url: str, target: Path) -> None:
    """Fetch the speech as everybody would: a bucket that is not public shows before a video is paid for.

    Raises ResourceFailed.
    """
    try:
        await download(audio_url, target, DOWNLOAD_RETRY)
    except ResourceFailed as exc:
        if exc.response and exc.response.effective_status in (400, 401, 403, 404):
            bucket = get_settings().supabase_bucket
            exc.detail = (
                "The speech was stored, but the bucket is not public: make it so, or change"
                f" SUPABASE_BUCKET={bucket}. {exc.detail}"
            )
            exc.provider = "supabase"
            exc.retryable = False
        raise


async def make_video(
    body: JobPromptOnly, model: VideoModel, job: Job, audio_url: str | None = None
) -> str:
    """Make the silent video, or resume the one that is recorded; return its URL."""
    with job.stage("video"):
        await resume_newer_record(job)
        video_url = await replicate_video_from_prompt(body, audio_url, job, model)
    job.partial.video_url = video_url
    return video_url


async def make_final_video(
    video: Path, video_format: VideoFormat, speech: Path | None, fit: Fit, job: Job
) -> Path:
    """Make a video that plays everywhere and says the speech; None: the model's video speaks by itself.

    Raises ResourceFailed, OSError.
    """
    if not plays_everywhere(video_format, as_it_is=speech is None):
        with job.stage("convert"):
            converted = video.with_name("converted.mp4")
            video = await convert_video(video, video_format, converted, with_sound=speech is None)
    if speech is None:
        return video

    final = video.with_name("final.mp4")
    with job.stage("mux"):
        await mux_video_audio(video, speech, final, fit)
    return final


# ---- Routes ----------------------------------------------------------------------------------------

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot succeed as it is", "model": ErrorBody},
    500: {
        "description": "The service or a provider failed; `partial` holds what was made",
        "model": ErrorBody,
    },
    "default": {"description": "No such route or method", "model": ErrorBody},
}
EVENT_STREAM_DESCRIPTION = """With `Accept: text/event-stream`: `stage` events as the job proceeds, \
comments while nothing happens, then one `result` (the JSON body) or one `error` (the error body and \
`status`)."""
EXAMPLE_STAGE = StageEvent(
    stage="video", state="progress", seconds=12.5, status="processing", percent=40
)
EXAMPLE_VIDEO_RESULT = VideoResult(video_url=EXAMPLE_VIDEO_URL)
EXAMPLE_SPEECH_RESULT = SpeechResult(
    audio_url=EXAMPLE_AUDIO_URL, video_url=EXAMPLE_VIDEO_URL, final_url=EXAMPLE_FINAL_URL
)


def job_responses(example: BaseModel) -> dict[int | str, dict[str, Any]]:
    """Return how a job's two forms of response, and its errors, are described in /docs."""
    text = ""
    for name, event in (("stage", EXAMPLE_STAGE), ("result", example)):
        text += f"event: {name}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"

    schemas = []
    for name in ("StageEvent", type(example).__name__, "ErrorEvent"):
        schemas.append({"$ref": f"#/components/schemas/{name}"})
    properties = {
        "event": {"type": "string", "enum": ["stage", "result", "error"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": schemas},
        },
    }
    # An event, described as FastAPI describes them.
    event_schema = {
        "type": "object",
        "description": EVENT_STREAM_DESCRIPTION,
        "required": list(properties),
        "properties": properties,
    }
    content = {
        "application/json": {"example": example.model_dump()},
        "text/event-stream": {"itemSchema": event_schema, "example": text},
    }
    return {200: {"content": content}, **ERROR_RESPONSES}


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=KEY_PATTERN,
        description="One for each job. Send the same request with it until it answers: one video "
        "is paid for.",
        examples=[EXAMPLE_KEY],
    ),
]


@app.head("/health", include_in_schema=False)
@app.get("/health", summary="Is the process up?")
async def health() -> dict[Literal["ok"], bool]:
    """Answer at once, whatever else goes on."""
    return {"ok": True}


@app.post(
    "/jobs_prompt_only", response_model=VideoResult, responses=job_responses(EXAMPLE_VIDEO_RESULT)
)
async def jobs_prompt_only(
    body: JobPromptOnly, request: Request, key: IdempotencyKey = None
) -> Response:
    """Animate a picture: a silent video from a picture and a prompt."""
    return await answer_job(request, body, key, video_job)


@app.post(
    "/jobs_prompt_tts", response_model=SpeechResult, responses=job_responses(EXAMPLE_SPEECH_RESULT)
)
async def jobs_prompt_tts(
    body: JobPromptTTS, request: Request, key: IdempotencyKey = None
) -> Response:
    """Make a picture talk: a video in which the picture says a text."""
    return await answer_job(request, body, key, speech_job)


@app.post("/debug/head", responses=ERROR_RESPONSES)
async def debug_head(body: HeadRequest) -> HeadResult:
    """Look at a remote file: status, content type and size of a file on the public internet."""
    return await head(body.url, HEAD_TIMEOUT_S)


def openapi() -> dict[str, Any]:
    """Return the contract, with the events of a stream beside the bodies."""
    contract = FastAPI.openapi(app)
    for event in (StageEvent, ErrorEvent):
        schema = event.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)  # they are among the components already
        contract["components"]["schemas"][event.__name__] = schema
    return contract


app.openapi = openapi  # type: ignore[method-assign]
