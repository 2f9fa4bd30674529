"""Talking Pet: a photo of a pet and a line of text go in, a video of the pet saying it comes out.

One FastAPI service without a queue. A front end POSTs a job, waits, and gets the URLs in the
response:

    POST /jobs_prompt_only   picture + prompt         -> video_url
    POST /jobs_prompt_tts    picture + prompt + text  -> audio_url, video_url, final_url
    POST /debug/head         url                      -> status, content type and size of a remote file
    GET  /health                                      -> {"ok": true}

A speech job, in sequence: ElevenLabs speaks the text, Supabase Storage keeps the speech, Replicate
animates the picture, ffmpeg puts speech and video together, Supabase Storage keeps the final video.
With `Accept: text/event-stream` the response is a stream of progress events. With an
`Idempotency-Key` a request is safe to retry: one video is paid for, and its URLs are returned.

Run it:       uvicorn main:app             (the API keys: see .env.example)
Without keys: python -m tests.sandbox      (local stand-ins of the three providers)
"""

import asyncio
import bisect
import errno
import hmac
import html
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
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
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from itertools import islice
from operator import attrgetter
from pathlib import Path
from subprocess import DEVNULL
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, TypeVar, get_args
from urllib.parse import quote, unquote

import anyio
import anyio.lowlevel
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
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypeAliasType

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

current_request_id: ContextVar[str] = ContextVar("request_id", default="-")
logger = logging.getLogger("talking_pet")

# ---- Limits and timings --------------------------------------------------------------------------

MAX_REQUEST_BYTES = 64 * 1024
BODY_START_S = 1.0  # to receive the start of a body that is too large, for a more exact error
BODY_TIMEOUT_S = 30.0  # to receive a whole body; one on its way holds up to 150 kB of memory
MAX_SPEECH_BYTES = 9_500_000
MAX_DOWNLOAD_BYTES = 100_000_000  # a final video has no more either
MAX_RESPONSE_BYTES = 2_000_000  # of a provider's JSON; the largest model schemas have some 100 kB
MAX_PREDICTION_BYTES = 1_000_000  # of one prediction with its whole log
MAX_LIST_BYTES = 8_000_000  # of a list of a hundred predictions
# In one JSON body. Parsing so many takes 7 MB, and blocks the event loop for some 20 ms.
MAX_JSON_VALUES = 100_000
MAX_URL_CHARS = 4_096
MAX_DETAIL_CHARS = 300  # of a provider's own message that is passed on
MAX_ERROR_CHARS = 1_000  # of an error's text that a client gets, the service's own or a provider's
MAX_LOG_CHARS = 20_000  # of one line of the log, its traceback included
CHUNK_BYTES = 128 * 1024  # of one read or write on disk; each is one call in a worker thread

# Untrusted input: a model's schema and output (anybody may publish a model), and media files.
MAX_SCHEMA_PARTS = 4  # subschemas of one property; an enum takes one, a nullable value two
MAX_SCHEMA_DEPTH = 4  # levels of one property: itself, and three of $ref, allOf, anyOf, oneOf
MAX_SCHEMA_FIELDS = 300  # well-known models have up to fifteen
MAX_NAME_CHARS = 100  # of a field's name, type or format, or of one value of its enum
MAX_ENUM_VALUES = 100  # in one enum, or in a default that is a list or an object
MAX_VALUE_CHARS = 2_000  # of a default
MAX_DESCRIPTION_CHARS = 300
MAX_NUMBER = 1e15  # larger numbers in a schema are ignored
MAX_FIELD_ERRORS = 20  # that Replicate reports about one input
MAX_NAMED_FIELDS = 10  # of a model, in the `params` of one error
MAX_OUTPUT_VALUES = 1_000  # the video's URL is among the first few
MAX_MP3_GAPS = 1_000  # places in a speech where no frame is, and the next one is searched for
MAX_MP4_TRACKS = 100
MAX_MP4_BOXES = 10_000  # at the top level; a fragmented video has some hundreds
MAX_MP4_INDEX_BYTES = 1_000_000  # of `moov`; the video's description is near its start
MAX_FORMAT_BYTES = 64 * 1024  # read from the start of a file to recognise its format

# httpx timeouts: seconds without a byte on the connection, not of a whole call.
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
SPEECH_TIMEOUT = httpx.Timeout(120.0, connect=10.0)  # ElevenLabs responds when it is done
CREATE_TIMEOUT = httpx.Timeout(20.0, connect=10.0)  # Replicate responds at once
ENTRY_TIMEOUT = httpx.Timeout(8.0)  # a small file; a claim is retried before its lease ends

# Seconds of a whole call, until its response is read.
MAX_CREATE_S = 30.0
CREATE_GRACE_S = 5.0  # a job that is cancelled still waits so long for the response
MAX_LOOKUP_S = 60.0  # of a model, with its retries

# Retry and wait limits as fractions of PATIENCE_SECONDS; beside each its default in seconds.
PAID_SHARE = 1.0  # 120: retries of an upload or download after the video is paid for
MAX_WAIT_SHARE = 1 / 4  # 30: the longest single wait between two attempts
CANCEL_SHARE = 1 / 4  # 30: cancelling a prediction
REJECTED_POLL_SHARE = 1 / 4  # 30: polls that are answered 401, 403 or 404
LEASE_SHARE = 1 / 4  # 30: a claim whose owner has written nothing for so long may be taken over
DRAIN_SHARE = 1 / 6  # 20: jobs with a key may end by themselves at shutdown
SEARCH_SHARE = 1 / 12  # 10: the search for a prediction after the response to its create was lost
MAX_SEARCH_SHARE = 1 / 4  # 30: the whole of that search, slow responses included
MAX_BACKOFF_S = 8.0  # 0.5 s, 1 s, 2 s, 4 s, 8 s, 8 s, ... from RETRY_FIRST_SECONDS on

# Graceful shutdown, whatever PATIENCE_SECONDS is. Render kills the process 40 s after uvicorn's own
# grace period (render.yaml), so SHUTDOWN_WAIT_S must be less than that.
SHUTDOWN_WAIT_S = 25.0  # for all jobs to end
MAX_DRAIN_S = 20.0  # of SHUTDOWN_WAIT_S: after it, jobs with a key are cancelled
MAX_RECORD_SAVE_S = 4.0  # to write the last log entry of a job that failed or was stopped
MAX_RESULT_WRITE_S = 20.0  # to write a result's log entry, also after the deadline
MAX_CLEANUP_S = 20.0  # to remove a job's folder

# Lines at the providers (see ProviderLine).
MAX_CREATES = 64  # at once: the TLS handshakes of more would delay /health
PROBE_ROUNDS = 8  # after a refusal: successes for each call under way before the limit rises
LINE_SPEED_S = 120.0  # a wait is estimated from the calls of this time: limits are by the minute
LINE_STEP_S = 2.0  # how often a job in line checks its place and its deadline
MAX_BUSY_S = 3_600.0  # the longest Retry-After of our own

# Polling (see poll_delay_s).
POLL_SHARE = 0.025  # a wait as a share of the time waited so far
POLL_MAX_S = 2.0
RECENT_DURATIONS = 30  # of the last videos of one kind
DUE_SHARE = 0.8  # of the shortest recent duration: from there on the video is expected
EARLY_SHARE = 0.1  # of the shortest recent duration: a wait before the video is expected
DUE_STEP_SHARE = 0.012  # of the shortest recent duration: a wait once the video is expected
DUE_STEP_MAX_S = 0.65
# Of one process. Replicate allows 3,000 calls a minute (documentation on rate limits, 2026-11-22);
# each of the model look-ups below may take four.
MAX_POLLS_PER_MINUTE = 2_400
MAX_LOOKUPS_PER_MINUTE = 30  # of models that this process does not know
UNKNOWN_MODEL_TTL_S = 60.0
MAX_DURATION_KINDS = 500

MIN_CANCEL_AFTER_S = 5  # the least that Replicate's Cancel-After takes (changelog 2025-10-16)
CLOCK_TOLERANCE_S = 5.0  # a Date header has whole seconds, and arrives with a delay
MAX_LOG_ENTRIES = 1_000  # of one job: it writes four, and one every 10 s while it holds a claim
VIDEO_URL_LIFETIME_S = 3_600.0  # of Replicate's URLs
MAX_LIST_PAGES = 10  # of a hundred predictions each
MAX_CLAIMED_PREDICTIONS = 10_000  # prediction ids that a process remembers as taken
MODEL_TTL_S = 600.0
MAX_MODELS = 100
MAX_FPS = 1_000.0  # a higher frame rate in a model's schema is ignored
DEFAULT_FPS = 24.0  # where a model counts frames and names no rate

SPEECH_OFFSET_MS = 500  # the speech starts half a second in
CUT_TOLERANCE_S = 0.1  # streams end with a whole frame: a smaller difference is not reported
FFMPEG_TIMEOUT_S = 60.0
MAX_FFMPEG = 4  # at once, and no more than cores: each takes some 50 MB
FFMPEG_MAX_ALLOC_BYTES = 64_000_000  # one allocation; a plane of an 8K frame has less
MUX_MAX_BYTES = 200_000_000  # RLIMIT_DATA of a mux: it takes 66 to 77 MB, a 4K video as well
CONVERT_MAX_BYTES = 450_000_000  # ... of a conversion: it takes 170 to 350 MB
CONVERT_TIMEOUT_S = 180.0
BACKGROUND_NICENESS = 10  # of a conversion: muxes and the service itself get the processor first
MAX_CONVERT_PIXELS = 1920 * 1088
# ffmpeg's expression for the frames a second of a converted video. At least 12: a frame longer than
# the speech would be missing from the final video.
CONVERT_RATE = "min(60,max(12,source_fps))"

HEAD_TIMEOUT_S = 10.0
PICTURE_TIMEOUT_S = 3.0
MAX_HEADS = 8  # remote files checked at once for /debug/head
MAX_PICTURE_CHECKS = 100  # pictures checked at once for jobs
MAX_HEAD_BYTES = 32 * 1024  # received for one remote file before its body, redirects included
READ_BYTES = 4 * 1024  # of one read before the body, so that little of the body is read
MAX_REDIRECTS = 5
MAX_DNS_LOOKUPS = 16  # at once, of host names in untrusted URLs, for each guarded pool
MAX_ADDRESSES = 4  # of one name that are tried

MAX_MISSPELLED = 50  # names in a body that are compared with ours
SPENDING_WINDOW_S = 3_600.0  # of MAX_VIDEOS_PER_HOUR
RETRY_RESERVED_S = 60  # Retry-After while running jobs have reserved the last videos of the hour
MACOS_DESCRIPTORS = 10_240  # the most that macOS allows if there is no hard limit
ACCEPT_LOG_S = 60.0  # between two log lines about missing file descriptors

# ---- Settings ------------------------------------------------------------------------------------

MIN_SECRET_CHARS = 8  # shorter ones would be found, and redacted, inside ordinary words
# ElevenLabs' OpenAPI document, parameter output_format (copy of 2026-08-22).
COMPRESSED_FORMATS = r"mp3_22050_32|mp3_24000_48|(mp3_44100|opus_48000)_(32|64|96|128|192)"
RAW_FORMATS = r"(pcm|wav)_(8000|16000|22050|24000|32000|44100|48000)|[au]law_8000"


def check_http_url(value: str) -> str:
    """Return the URL with non-ASCII percent-encoded.

    Raises ValueError if it is no absolute http(s) URL.
    """
    if re.search(r"\s", value):
        raise ValueError("must not contain a blank; in a URL it is written %20")
    with suppress(httpx.InvalidURL, ValueError):
        url = httpx.URL(value)
        if url.scheme in ("http", "https") and url.host and "\\" not in value:
            return value if value.isascii() else str(url)
    raise ValueError("must be an absolute http(s) URL")


def check_base_url(value: str) -> str:
    """Return the URL as httpx writes it, without a trailing slash. Raises ValueError."""
    with suppress(ValueError):
        url = httpx.URL(check_http_url(value))
        if not (url.userinfo or url.query or url.fragment):
            return str(url).rstrip("/")
    raise ValueError("must be an absolute http(s) URL, such as https://example.com")


def check_origins(value: str) -> str:
    """Return the origins without trailing slashes.

    Raises ValueError unless each is `*` or an origin.
    """
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


def check_tokens(secret: SecretStr) -> SecretStr:
    """Return tokens separated by commas, without blanks.

    Raises ValueError unless each could be a key.
    """
    tokens = [token.strip() for token in secret.get_secret_value().split(",")]
    for token in tokens:
        check_secret(SecretStr(token))
    return SecretStr(",".join(tokens))


def check_models(value: str) -> str:
    """Return names of models separated by commas, without blanks. Raises ValueError."""
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if not re.fullmatch(MODEL_PATTERN, name):
            raise ValueError("must be owner/name, or several separated by commas")
    return ",".join(names)


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
    service_token: Annotated[SecretStr, AfterValidator(check_tokens)] | None = None
    max_videos_per_hour: Annotated[int, Field(ge=1, le=100_000)] | None = None
    allowed_models: Annotated[str, AfterValidator(check_models)] | None = None
    eleven_base_url: BaseUrl = "https://api.elevenlabs.io"
    replicate_base_url: BaseUrl = "https://api.replicate.com"
    allow_private_urls: bool = False
    poll_min_seconds: Annotated[float, Field(gt=0, le=2)] = 0.25
    retry_first_seconds: Annotated[float, Field(gt=0, le=10)] = 0.5
    patience_seconds: Annotated[float, Field(gt=0, le=600)] = 120
    keepalive_seconds: Annotated[float, Field(gt=0, le=15)] = 10

    def required(self, name: str) -> str:
        """Return a required setting. Raises MissingSetting naming the variable."""
        value = getattr(self, name)
        if value is None:
            raise MissingSetting(f"The service is not set up for this: set {name.upper()}.")
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        return str(value)

    def tokens(self) -> list[str]:
        """Return the tokens in SERVICE_TOKEN; none is required if the list is empty."""
        return self.service_token.get_secret_value().split(",") if self.service_token else []

    def secrets(self) -> list[str]:
        """Return every secret that is set, each token by itself, plain and percent-encoded.

        The longest come first, because a long one may contain a short one.
        """
        keys = (getattr(self, name) for name in SECRET_SETTINGS)
        secrets = [key.get_secret_value() for key in keys if key] + self.tokens()
        quoted = [quote(secret, safe="") for secret in secrets]
        return sorted({*secrets, *quoted}, key=len, reverse=True)


SECRET_SETTINGS = (
    "eleven_api_key",
    "replicate_api_token",
    "supabase_service_role",
    "service_token",
)
STORAGE_SETTINGS = ("supabase_url", "supabase_service_role")
VIDEO_JOB_SETTINGS = ("replicate_api_token",)
SPEECH_JOB_SETTINGS = ("eleven_api_key", *VIDEO_JOB_SETTINGS, *STORAGE_SETTINGS)


def read_settings(environment: Mapping[str, str | None]) -> Settings:
    """Read settings from variables; an empty one counts as unset.

    Raises ValueError naming the variable.
    """
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
    """Return the settings, from the environment and from `.env` beside this file.

    The environment wins. A malformed value ends the process.
    """
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


# ---- Request and response models -----------------------------------------------------------------

Provider = Literal["elevenlabs", "replicate", "supabase"]
Category = Literal["configuration", "validation", "provider", "resource", "internal"]
# SharedCode: codes that an error as a whole (ErrorCode) and one field (FieldErrorCode) can have.
SharedCode = Literal[
    "key_reused",
    "unknown_model",
    "model_not_allowed",
    "picture_not_found",
    "not_a_picture",
    "private_url",
]
# Stable: front ends translate by them. TypeAliasType names them in /openapi.json.
ErrorCode = TypeAliasType(
    "ErrorCode",
    Literal[
        SharedCode,
        "missing_setting",
        "unauthorized",
        "spending_limit",
        "busy",
        "invalid_body",
        "body_too_large",
        "route_not_found",
        "method_not_allowed",
        "invalid_field",
        "blocked_url",
        "content_rejected",
        "prediction_failed",
        "video_expired",
        "deadline",
        "provider_rejected_key",
        "provider_throttled",
        "provider_failed",
        "speech_too_large",
        "storage_failed",
        "bucket_not_public",
        "download_failed",
        "media_unusable",
        "machine_failed",
        "restarting",
        "internal",
    ],
)
FieldErrorCode = TypeAliasType(
    "FieldErrorCode",
    Literal[
        SharedCode,
        "invalid_body",
        "required",
        "not_a_string",
        "blank",
        "too_long",
        "not_a_whole_number",
        "too_small",
        "too_large",
        "not_allowed",
        "wrong_format",
        "misnamed",
        "upload_first",
        "not_a_url",
        "unsupported",
        "rejected",
    ],
)
# The values in a message, for front ends that translate it: {"max": 600, "got": 659}.
ErrorParams = dict[str, str | int | float | list[Any]]
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
# For each pattern: the format's name, and the message that is shown instead of the pattern.
PATTERN_FORMATS = {
    MODEL_PATTERN: ("model", "must be owner/name or owner/name:version"),
    VOICE_PATTERN: ("voice_id", "must be up to 64 letters, digits, _ and -"),
    SIZE_PATTERN: ("size", "must be a size such as 768p"),
    KEY_PATTERN: ("key", "must be 1 to 255 visible ASCII characters, such as a UUID"),
}
UPLOAD_FIRST = (
    "must be the public http(s) URL of a file: upload it first, for example to your storage"
)


def refuse_embedded_file(value: Any) -> Any:
    """Return the value. Raises PydanticCustomError if it is a `data:` or `blob:` URL."""
    if isinstance(value, str) and re.match(r"\s*(data|blob):", value, re.IGNORECASE):
        raise PydanticCustomError("embedded_file", UPLOAD_FIRST)
    return value


UrlText = Annotated[str, StringConstraints(strict=True, max_length=MAX_URL_CHARS)]
HttpUrl = Annotated[
    UrlText,
    BeforeValidator(refuse_embedded_file),  # before its length is checked
    AfterValidator(check_http_url),
    Field(json_schema_extra={"format": "uri"}),
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

# Other services' names for our fields. They are refused: if `duration` were ignored, a video of the
# wrong length would be paid for.
OTHER_NAMES = {
    "image_url": (
        "image img photo picture pic portrait url image_uri image_link img_url photo_url picture_url"
        " start_image first_frame_image"
    ),
    "prompt": "prompt_text text_prompt video_prompt motion_prompt description",
    "text": "script speech message speech_text tts_text dialogue words content",
    "voice_id": "voice voice_name speaker speaker_id",
    "seconds": "duration length duration_seconds video_length video_duration",
}
FIELD_ALIASES = {alias: name for name, aliases in OTHER_NAMES.items() for alias in aliases.split()}


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
        """Reject misspelled and other common names of our fields; ignore other unknown fields.

        Raises InvalidInput.
        """
        if not isinstance(body, dict):
            return body
        known = {*JobPromptTTS.model_fields, *FIELD_ALIASES}
        errors: list[InputError] = []
        for name in islice(body, MAX_MISSPELLED):
            if name in JobPromptTTS.model_fields:
                continue
            for match in get_close_matches(name.lower(), known, n=1, cutoff=0.8):
                meant = FIELD_ALIASES.get(match, match)
                if meant in cls.model_fields and meant not in body:
                    error = InputError(
                        loc=["body", redact(name)],
                        msg=f"must be called {meant}",
                        code="misnamed",
                        params={"name": meant},
                    )
                    errors.append(error)
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
        description="Where the clip ends. shortest: with video or speech, whichever ends first; "
        "video: with the video, silent after a shorter speech; speech: with the speech, repeating a "
        "shorter video",
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
    audio_seconds: float | None = Field(default=None, description="Length of the speech")
    final_seconds: float | None = Field(default=None, description="Length of the final video")
    cut_seconds: float | None = Field(
        default=None,
        description="Seconds of speech that are not heard because the video ends first; 0: none."
        " All three are null if they are unknown",
    )


class HeadResult(BaseModel):
    """What a server answers about a file."""

    status: int = Field(description="HTTP status of the remote answer, redirects followed")
    content_type: str | None
    bytes: int | None = Field(description="Size of the whole file, if the server says")


class PartialResult(BaseModel):
    """What a failed job had made, and paid for, before it failed."""

    audio_url: str | None = None
    video_url: str | None = None
    prediction_id: str | None = Field(
        default=None, description="The video's id at Replicate, which keeps it an hour"
    )


class InputError(BaseModel):
    """One invalid field: its place, such as `["body", "voice_id"]`, and what was expected."""

    loc: list[str | int]
    msg: str
    code: FieldErrorCode
    params: ErrorParams = Field(description="The values in the message; too_long: `max` and `got`")


class ErrorBody(BaseModel):
    """The body of every error; `partial` and `errors` are left out where they would be empty."""

    detail: str
    category: Category
    code: ErrorCode
    provider: Provider | None = None
    request_id: str
    retryable: bool = Field(
        description="Whether the same request, with its Idempotency-Key, can succeed later"
    )
    partial: PartialResult | None = None
    errors: list[InputError] | None = None


class ErrorEvent(ErrorBody):
    """The `error` event that ends a stream: the body of an error, and its HTTP status."""

    status: int


class StageEvent(BaseModel):
    """A stage of a job that has started, made progress or is done."""

    stage: Stage
    state: StageState
    seconds: float = Field(description="Seconds since the stage started")
    status: str | None = Field(
        default=None,
        description="The prediction's status, in the stage video; queued: waits in line",
    )
    ahead: int | None = Field(
        default=None, description="Calls before it in line, while it is queued"
    )
    percent: int | None = Field(
        default=None, description="Progress of the video, if the model logs it"
    )
    audio_seconds: float | None = Field(
        default=None, description="Length of the speech, once it is known"
    )


# ---- Errors --------------------------------------------------------------------------------------
#
# ServiceError              500 internal       anything unforeseen
#   MissingSetting          500 configuration  a setting that this request needs is not set
#   InvalidInput            400 validation     the request can never succeed as it is
#     Unauthorized          401 validation     it has no valid token of SERVICE_TOKEN
#     BlockedUrl            400 validation     the service does not fetch this URL
#       PrivateAddress      400 validation     the URL leads to an address that is not public
#   ProviderRefused         400 provider       ElevenLabs or Replicate reject the request's content
#   ProviderFailed          500 provider       ElevenLabs or Replicate fail, or reject our key or plan
#     ProviderBusy          500 provider       the line at a provider is too long for the job's deadline
#   SpeechTooLarge          400 resource       the speech has more than MAX_SPEECH_BYTES
#   ResourceFailed          500 resource       storage, a download, this machine, or unusable media
#     SpendingLimitReached  429 resource       MAX_VIDEOS_PER_HOUR videos were paid for


class ServiceError(Exception):
    """An error returned to the client; the base class is an internal 500.

    `detail` contains no secret and may be shown. `response` is the provider's, if there was one.
    `errors` name the invalid fields of the request. `code` is more exact than the class. `headers`
    are added to the HTTP response.
    """

    http_status: int = 500
    category: Category = "internal"
    code: ErrorCode = "internal"
    retryable: bool = True
    headers: Mapping[str, str] = {}

    def __init__(
        self,
        detail: str,
        provider: Provider | None = None,
        *,
        code: ErrorCode | None = None,
        retryable: bool | None = None,
        response: "ProviderResponse | None" = None,
        errors: "list[InputError] | None" = None,
    ) -> None:
        detail = redact(detail)[:MAX_ERROR_CHARS]
        super().__init__(detail)
        self.detail = detail
        self.provider = provider
        self.response = response
        self.errors = errors or []
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable

    def add_field_error(
        self,
        name: str,
        message: str,
        place: str = "body",
        *,
        code: FieldErrorCode = "rejected",
        params: ErrorParams | None = None,
    ) -> None:
        """Add an error of one field of the request; by default a provider has rejected it."""
        loc: list[str | int] = [place, redact(name)]
        self.errors.append(
            InputError(
                loc=loc, msg=redact(message)[:MAX_ERROR_CHARS], code=code, params=params or {}
            )
        )


class MissingSetting(ServiceError):
    """A setting that this request needs is not set."""

    category = "configuration"
    code: ErrorCode = "missing_setting"
    retryable = False


class InvalidInput(ServiceError):
    """The request can never succeed as it is."""

    http_status = 400
    category = "validation"
    code: ErrorCode = "invalid_field"
    retryable = False


class Unauthorized(InvalidInput):
    """The request has no valid token of SERVICE_TOKEN."""

    http_status = 401
    code = "unauthorized"
    headers = {"WWW-Authenticate": "Bearer"}


class BlockedUrl(InvalidInput):
    """The service does not fetch this URL."""

    code: ErrorCode = "blocked_url"


class PrivateAddress(BlockedUrl):
    """The URL leads to an address that is not on the public internet."""

    code: ErrorCode = "private_url"


class ProviderRefused(ServiceError):
    """ElevenLabs or Replicate reject the request's content, or the video could not be made."""

    http_status = 400
    category = "provider"
    code: ErrorCode = "content_rejected"
    retryable = False


class ProviderFailed(ServiceError):
    """ElevenLabs or Replicate reject the service's key or plan, fail, or do not respond."""

    category = "provider"
    code: ErrorCode = "provider_failed"


class ProviderBusy(ProviderFailed):
    """The line at a provider is too long for the job's deadline; no call was made."""

    code = "busy"

    def __init__(self, detail: str, provider: Provider, retry_after_s: float) -> None:
        super().__init__(detail, provider)
        self.headers = {"Retry-After": str(math.ceil(retry_after_s))}


class SpeechTooLarge(ServiceError):
    """The speech has more than MAX_SPEECH_BYTES."""

    http_status = 400
    category = "resource"
    code: ErrorCode = "speech_too_large"
    retryable = False


class ResourceFailed(ServiceError):
    """Storage, a download, the service's own machine, or media that ffmpeg cannot use."""

    category = "resource"
    code: ErrorCode = "storage_failed"


class SpendingLimitReached(ResourceFailed):
    """This process has paid for MAX_VIDEOS_PER_HOUR videos within the last hour."""

    http_status = 429
    code = "spending_limit"

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.headers = {"Retry-After": str(math.ceil(retry_after_s))}


def invalid_field(
    name: str,
    message: str,
    place: str = "body",
    *,
    code: FieldErrorCode = "unsupported",
    params: ErrorParams | None = None,
) -> InvalidInput:
    """Return the error for one invalid field of the request, or for an invalid header."""
    error = InvalidInput(f"{name}: {message}.")
    error.add_field_error(name, message, place, code=code, params=params)
    for shared_code in get_args(SharedCode):
        if code == shared_code:
            error.code = shared_code
    return error


def redact(text: str) -> str:
    """Return the text with secrets replaced by `***`, and lone surrogates by `?`.

    A lone surrogate cannot be encoded, and would make the response or log line fail.
    """
    for secret in get_settings().secrets():
        text = text.replace(secret, "***")
    return text.encode("utf-8", "replace").decode()


def add_request_id_and_redact(record: logging.LogRecord) -> bool:
    """Start a log line with its request id, keep secrets out of it, and bound its length."""
    prefix = f"request_id={current_request_id.get()} "
    line = record.getMessage()
    if not line.startswith(prefix):  # it does if this module was imported twice
        line = redact(prefix + line)
    if len(line) > MAX_LOG_CHARS:  # both ends are kept: a traceback's last lines say most
        line = f"{line[: MAX_LOG_CHARS // 2]} ... {line[-MAX_LOG_CHARS // 2 :]}"
    record.msg = line
    record.args = ()
    return True


def redact_arguments(record: logging.LogRecord) -> bool:
    """Redact uvicorn's access log, whose lines contain query strings."""
    args = record.args if isinstance(record.args, tuple) else ()
    record.args = tuple(redact(arg) if isinstance(arg, str) else arg for arg in args)
    return True


logger.addFilter(add_request_id_and_redact)
logging.getLogger("uvicorn.access").addFilter(redact_arguments)


def as_service_error(exc: BaseException) -> ServiceError:
    """Return the error for the client; the traceback of an unforeseen one goes to the log."""
    if isinstance(exc, ServiceError):
        return exc
    logger.error("unforeseen error\n%s", "".join(traceback.format_exception(exc)))
    if isinstance(exc, OSError) and exc.strerror:  # a full disk, a read-only folder ...
        detail = f"The service's own machine failed the job: {exc.strerror}."
        return ResourceFailed(detail, code="machine_failed")
    return ServiceError("An unforeseen error inside the service; its log has the request id.")


# ---- Job state and progress events ---------------------------------------------------------------

Events = asyncio.Queue[StageEvent | None]  # None: there are no more
CancelReason = Literal["client_disconnected", "shutdown"]

# The provider to name when a stage passes the deadline. None: the checks before the first stage, in
# which a model is looked up.
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
    audio_seconds: float | None = None  # how long the speech is, once it is known
    stage_started_at: float = 0.0
    current_stage: Stage | None = None
    queued_s: float = 0.0  # in lines at the providers
    partial: PartialResult = field(default_factory=PartialResult)
    event_history: list[StageEvent] = field(default_factory=list)
    subscribers: list[Events] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)  # around its work
    cancel_reason: CancelReason | None = None
    result: BaseModel | ServiceError | None = None
    replayed: bool = False  # the result was read from the job log, and no stage was run for it
    # Only with an Idempotency-Key:
    log: "JobLog | None" = None
    search_from: float | None = None  # since when it may have an unrecorded prediction (monotonic)
    search_s: float = 0.0  # how long Replicate may not list that one yet

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
        self.current_stage = None  # kept after a failure, for cancellation_error()

    def emit(
        self,
        state: StageState,
        status: str | None = None,
        percent: int | None = None,
        ahead: int | None = None,
    ) -> None:
        """Send an event to all subscribers, and keep it for later ones.

        Of progress events in a row, only the last is kept.
        """
        event = StageEvent(
            stage=self.current_stage or "video",
            state=state,
            seconds=round(time.monotonic() - self.stage_started_at, 3),
            status=status,
            percent=percent,
            ahead=ahead,
        )
        if state == "done" and event.stage in ("speech", "audio_upload"):
            event.audio_seconds = self.audio_seconds
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
        """Log the outcome, and end the events of every subscriber."""
        outcome: str = "ok"
        reason = ""
        if isinstance(self.result, ServiceError):
            outcome = self.cancel_reason or self.result.category
            reason = f" code={self.result.code} detail={self.result.detail}"
        elapsed_ms = (time.monotonic() - self.started_at) * 1000
        prediction_id = self.partial.prediction_id
        logger.info(
            "job outcome=%s ms=%.0f prediction_id=%s%s", outcome, elapsed_ms, prediction_id, reason
        )
        for queue in self.subscribers:
            queue.put_nowait(None)

    @property
    def deadline(self) -> float:
        """When JOB_TIMEOUT_SECONDS have passed, on the monotonic clock."""
        return self.started_at + get_settings().job_timeout_seconds

    def past_deadline(self) -> bool:
        """Return whether JOB_TIMEOUT_SECONDS have passed."""
        return time.monotonic() >= self.deadline

    def cancellation_error(self) -> ServiceError:
        """Return the error of a job that was cancelled, or has passed its deadline."""
        if self.cancel_reason or not self.past_deadline():
            advice = "send the same request again" if self.log else "try again"
            detail = f"The service is restarting and could not finish the job; {advice}."
            return ServiceError(detail, code="restarting")

        stage = self.current_stage
        provider = STAGE_PROVIDERS.get(stage)
        limit_s = get_settings().job_timeout_seconds
        limit = f"The job was not done after {limit_s:g} s"
        detail = f"{limit} and was ended in the stage {stage or 'check'}."
        # The prediction was cancelled: with a key, the same request would find it cancelled
        # again.
        is_final = bool(self.log and self.partial.prediction_id and stage == "video")
        if provider in ("elevenlabs", "replicate"):
            return ProviderFailed(detail, provider, code="deadline", retryable=not is_final)
        return ResourceFailed(detail, provider, code="deadline")


def error_body(error: ServiceError, request_id: str, job: Job | None) -> dict[str, Any]:
    """Return the body of an error (see ErrorBody).

    `partial` and `errors` are left out if they are empty.
    """
    body: dict[str, Any] = {
        "detail": error.detail,
        "category": error.category,
        "code": error.code,
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


# ---- HTTP transport and SSRF protection ----------------------------------------------------------
#
# Every outgoing request passes GuardedTransport. The owner's own addresses (both APIs, the
# storage) are trusted. Every other URL, also a redirect's, is first checked without resolving its
# name (check_public_url), and then connected to by PublicOnlyBackend, which resolves the name once,
# checks each address, and connects to the checked address itself.

# Networks that some Python versions call global (ipaddress.is_global), or that lead to internal
# services.
BLOCKED_NETWORKS = [
    ipaddress.ip_network("100.64.0.0/10"),  # carrier-grade NAT
    ipaddress.ip_network("168.63.129.16/32"),  # the host of a virtual machine in Azure
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
# IPv6 without the mapped, compatible and NAT64 forms of IPv4.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
PRIVATE_ADDRESS_DETAIL = "The URL leads to an address that is not public."

# Keys of a request's `extensions` that choose its connection pool. USER_SUPPLIED: a URL from a client
# has a pool of its own, so that it cannot delay jobs. NEW_CONNECTION: what must not be sent twice must
# not fail on a stale connection.
USER_SUPPLIED = "talking_pet_user_supplied"
NEW_CONNECTION = "talking_pet_new_connection"


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
    """Check a URL's scheme, host, port and user info; its name is resolved later.

    Raises BlockedUrl saying what is wrong.
    """
    host = url.raw_host.decode("ascii").rstrip(".")
    if url.scheme not in ("http", "https"):
        raise BlockedUrl("Only http and https URLs are fetched.")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", host):
        raise BlockedUrl("The URL's host is not a plain name or address.")

    # As in browsers, a host whose last part is a number is an IPv4 address. Octal, hexadecimal
    # and shortened forms are refused.
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
    """Return whether a URL belongs to one of the owner's APIs or the storage.

    With ALLOW_PRIVATE_URLS every URL is trusted.
    """
    settings = get_settings()
    if settings.allow_private_urls:
        return True
    if ".." in unquote(str(url)):  # httpx keeps %2e%2e, which a server may decode
        return False
    storage_url = f"{settings.supabase_url}/storage/v1/object"
    bases = (settings.eleven_base_url, settings.replicate_base_url, storage_url)
    return any(str(url).startswith(f"{base}/") for base in bases)


class DnsResolver:
    """Name look-ups in daemon threads of their own, at most MAX_DNS_LOOKUPS at once.

    getaddrinfo blocks and cannot be cancelled. With daemon threads of its own, a slow look-up
    neither takes a thread that files need nor delays the end of the process.
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
            if resolved.done():  # the caller was cancelled
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

        try:
            threading.Thread(target=look_up, name="dns-lookup", daemon=True).start()
        except RuntimeError as exc:
            self._free_threads.release()
            raise OSError("no thread for a name look-up") from exc
        return await resolved


# Bytes that may still be received for one remote file before its body, redirects included.
head_bytes_left: ContextVar[float] = ContextVar("head_bytes_left", default=MAX_HEAD_BYTES)


class MeteredStream(httpcore.AsyncNetworkStream):
    """A connection to an untrusted server, from which at most `head_bytes_left` are read."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return the next few bytes.

        Raises httpcore.RemoteProtocolError once `head_bytes_left` is used up.
        """
        bytes_left = head_bytes_left.get()
        if bytes_left <= 0:
            raise httpcore.RemoteProtocolError("it sends too much")
        if bytes_left < math.inf:
            max_bytes = min(max_bytes, READ_BYTES)
        received = await self._stream.read(max_bytes, timeout)
        head_bytes_left.set(bytes_left - len(received))
        return received

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all these bytes."""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return the encrypted connection, metered as well."""
        return MeteredStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection says about itself."""
        return self._stream.get_extra_info(info)


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
                stream = await connect(address, port, timeout, local_address, socket_options)
                return MeteredStream(stream)
        stream = await connect(addresses[-1], port, timeout, local_address, socket_options)
        return MeteredStream(stream)

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
    """Return the trusted certificates; SSL_CERT_FILE and SSL_CERT_DIR are honoured.

    They are kept: loading them takes some 15 ms.
    """
    return httpx.create_ssl_context(trust_env=True)


def connection_pool(
    backend: httpcore.AsyncNetworkBackend, max_idle: int = 10
) -> httpcore.AsyncConnectionPool:
    """Return a pool, without proxies, whose connections `backend` makes.

    The number of connections is not limited: each waiting job may need one. Ten idle ones are
    enough for 40 polls a second; more would slow httpcore, which looks at each twice a request.
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
    """Sends each request through one of four connection pools.

    Two serve the owner's own addresses; two, which connect to public addresses only, all others.
    """

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
        """Send one request; each redirect comes here again.

        Raises BlockedUrl, httpx.TransportError.
        """
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
        # Cookies are dropped: they are never sent back, and reading them would take long.
        headers = [header for header in response.headers if header[0].lower() != b"set-cookie"]
        return httpx.Response(
            response.status,
            headers=headers,
            stream=HttpcoreStream(response.stream),
            extensions=response.extensions,
        )

    async def check_guard(self) -> None:
        """Raise RuntimeError unless both guarded pools refuse a loopback address."""
        for pool in (self.public, self.user_supplied):
            try:
                await pool.request("GET", "http://127.0.0.1:9/")  # the discard port: unused
            except PrivateAddress:
                continue
            except Exception as exc:  # any other error: it has tried to connect
                raise RuntimeError("The SSRF guard is not in place.") from exc
            raise RuntimeError("The SSRF guard is not in place.")

    async def aclose(self) -> None:
        """Close every connection."""
        for pool in (self.trusted, self.new_connections, self.public, self.user_supplied):
            await pool.aclose()


# ---- Shared state and the spending limit ---------------------------------------------------------


class ModelLookup(NamedTuple):
    """A running or finished look-up of a model, and when it expires."""

    task: "asyncio.Task[VideoModel]"
    expires_at: float  # time.monotonic()


@dataclass
class PaidCall:
    """A call that costs money, unless it turns out to be free."""

    is_free: bool = False


@dataclass
class VideoBudget:
    """The videos of the last hour, by Job.name, of which there may be MAX_VIDEOS_PER_HOUR.

    A job reserves its video before it pays for anything, so that no speech is paid for without
    a video to follow. A speech that was paid for counts as the job's video: otherwise clients
    that disconnect after it could cause any number of paid speeches.
    """

    reserved: set[str] = field(default_factory=set)
    paid_at: dict[str, float] = field(default_factory=dict)  # time.monotonic(), the oldest first

    def reserve(self, job_name: str) -> None:
        """Reserve a video for a job, unless it has one. Raises SpendingLimitReached."""
        limit = get_settings().max_videos_per_hour
        self._forget_old()
        if limit is None or job_name in self.reserved or job_name in self.paid_at:
            return
        if len(self.paid_at) + len(self.reserved) < limit:
            self.reserved.add(job_name)
            return

        retry_after_s: float = RETRY_RESERVED_S
        if self.paid_at:
            oldest_at = next(iter(self.paid_at.values()))
            retry_after_s = max(1.0, oldest_at + SPENDING_WINDOW_S - time.monotonic())
        detail = f"The service makes at most {limit} videos an hour; try again later."
        raise SpendingLimitReached(detail, retry_after_s)

    def _forget_old(self) -> None:
        """Forget the videos that no longer count."""
        since = time.monotonic() - SPENDING_WINDOW_S
        while self.paid_at:
            job_name, paid_at = next(iter(self.paid_at.items()))
            if paid_at > since:
                return
            del self.paid_at[job_name]

    @contextmanager
    def counting(self, job_name: str) -> Iterator[PaidCall]:
        """Count a job's video while a paid call is made; the caller sets `is_free` if it was not.

        After a free call the video is only reserved again, as the call may be repeated. Raises
        SpendingLimitReached.
        """
        self.reserve(job_name)
        if job_name not in self.reserved:  # it counts already, or there is no limit
            yield PaidCall()
            return

        self.reserved.remove(job_name)
        self.paid_at[job_name] = time.monotonic()
        call = PaidCall()
        try:
            yield call
        except NOT_SENT:
            call.is_free = True
            raise
        finally:
            if call.is_free and self.paid_at.pop(job_name, None) is not None:
                self.reserved.add(job_name)

    def release(self, job_name: str) -> None:
        """Give back what a job has reserved and not used."""
        self.reserved.discard(job_name)


@dataclass
class AppState:
    """What all requests of this process share; the lifespan holds it."""

    http: httpx.AsyncClient
    ffmpeg_slots: asyncio.Semaphore
    conversion_slot: asyncio.Semaphore = field(  # apart, so that no mux waits for a conversion
        default_factory=lambda: asyncio.Semaphore(1)
    )
    speech_line: "ProviderLine" = field(default_factory=lambda: ProviderLine("elevenlabs"))
    create_line: "ProviderLine" = field(
        default_factory=lambda: ProviderLine("replicate", MAX_CREATES)
    )
    head_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_HEADS))
    picture_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_PICTURE_CHECKS)
    )
    open_requests: int = 0  # that have no response yet
    jobs: dict[str, Job] = field(default_factory=dict)  # running ones, by Job.name
    claimed_predictions: deque[tuple[str, str]] = field(  # prediction id, Job.name
        default_factory=lambda: deque(maxlen=MAX_CLAIMED_PREDICTIONS)
    )
    creates_in_flight: Counter[str] = field(default_factory=Counter)  # by create_key()
    replicate_clock_s: float | None = None  # how far Replicate's clock is ahead of ours
    active_polls: int = 0  # predictions that are being waited for
    recent_durations: dict[str, deque[float]] = field(default_factory=dict)  # seconds, by kind
    models: dict[str, ModelLookup] = field(default_factory=dict)  # by the name that was asked for
    unknown_models: dict[str, ModelLookup] = field(default_factory=dict)
    lookups_at: deque[float] = field(  # time.monotonic() of look-ups of models not known yet
        default_factory=lambda: deque(maxlen=MAX_LOOKUPS_PER_MINUTE)
    )
    video_budget: VideoBudget = field(default_factory=VideoBudget)


_state: AppState | None = None  # set by the lifespan


def app_state() -> AppState:
    """Return what requests share. Raises RuntimeError outside the application's lifespan."""
    if _state is None:
        raise RuntimeError("The application is not running: enter lifespan(app) first.")
    return _state


@asynccontextmanager
async def open_app_state() -> AsyncIterator[AppState]:
    """Yield the shared state with its HTTP client, which is closed at the end.

    Raises RuntimeError.
    """
    transport = GuardedTransport()
    await transport.check_guard()
    headers = {"Accept-Encoding": "identity"}  # no compression, so that a small body stays small
    async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT, headers=headers) as http:
        ffmpeg_slots = asyncio.Semaphore(min(os.cpu_count() or 1, MAX_FFMPEG))
        yield AppState(http, ffmpeg_slots)


# ---- HTTP calls: retry policy and backoff --------------------------------------------------------

PROVIDER_NAMES = {
    "elevenlabs": "ElevenLabs",
    "replicate": "Replicate",
    "supabase": "Supabase Storage",
}
REDIRECTS = frozenset(range(300, 400))
TRANSIENT = frozenset({429, *range(500, 600)})  # Supabase has a 544
SUCCESSES = (200, 201, 202)
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
        """The body as JSON values; None if it is not JSON or has more than MAX_JSON_VALUES."""
        if sum(map(self.body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
            return None
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def effective_status(self) -> int:
        """The real status: Supabase Storage writes it as text into the body of a 400."""
        if self.status == 400:
            status_text = str(get_in(self.payload, "statusCode"))
            if re.fullmatch(r"\d{3}", status_text):
                return int(status_text)
        return self.status

    def retry_after_s(self, now: float) -> float | None:
        """Return the seconds that the provider asks us to wait, or None if it does not say.

        `now` is the time as time.time() has it.
        """
        # Replicate writes `retry_after` or "resets in ~30s" into the body; others send the header
        # Retry-After, as seconds or as a date.
        asked = get_in(self.payload, "retry_after") or self.headers.get("retry-after")
        if not asked:
            match = re.search(r"resets in ~(\d+)s", str(get_in(self.payload, "detail")))
            asked = match[1] if match else ""
        asked = str(asked).strip()
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            return float(asked)
        moment = parse_http_date(asked)
        return None if moment is None else max(0.0, moment - now)


def parse_http_date(header: str | None) -> float | None:
    """Return an HTTP date as time.time() would, or None if it is missing or malformed."""
    with suppress(ValueError, TypeError, OverflowError):
        return parsedate_to_datetime(str(header)).timestamp()
    return None


Attempt = ProviderResponse | httpx.RequestError
# Makes one attempt; the number is the most bytes of a body to read.
Exchange = Callable[[httpx.Request, int], Awaitable[ProviderResponse]]


class RetryBudget(NamedTuple):
    """How long an outcome is retried: attempts in all, and time since it first happened."""

    attempts: float = math.inf
    patience_share: float = math.inf  # of PATIENCE_SECONDS


SPEECH_ATTEMPTS = RetryBudget(attempts=3)
BEFORE_PAYMENT = RetryBudget(attempts=4)  # no video is paid for yet: give up early
AFTER_PAYMENT = RetryBudget(patience_share=PAID_SHARE)  # the video is paid for: keep trying
WHILE_REJECTED = RetryBudget(patience_share=REJECTED_POLL_SHARE)
UNTIL_DEADLINE = RetryBudget()


@dataclass(frozen=True)
class RetryPolicy:
    """Which outcomes of a call are retried, and for how long; every other outcome is final.

    A connection that could not be made is always retried. `patient` is for calls about what is
    paid for: a Retry-After over MAX_WAIT_SHARE is cut to that, and an untrusted certificate is
    retried. Without it the call gives up in both cases.
    """

    statuses: Collection[int]
    budget: RetryBudget
    rejection_budget: RetryBudget | None = None  # for 401, 403 and 404; None: `budget`
    on_broken_connection: bool = True  # after sending, although the work may have been done
    on_invalid_json: bool = True  # a success whose body is not a JSON object
    in_line: bool = False  # a 429 is no failure: the next attempt waits in line
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
        if status in (401, 403, 404):
            return self.rejection_budget or self.budget
        return self.budget

    def _budget_for_error(self, error: httpx.RequestError) -> RetryBudget | None:
        if "CERTIFICATE_VERIFY_FAILED" in str(error) and not self.patient:
            return None
        if isinstance(error, NOT_SENT) or self.on_broken_connection:
            return self.budget
        return None


# A speech that is retried after a 5xx may be paid for twice (some cents), but most failed calls are
# not charged, and a person waits. A video costs more: after a 5xx or a broken connection its
# prediction is searched for instead.
SPEECH_RETRY = RetryPolicy(
    statuses={500, 502, 503, 504},
    budget=SPEECH_ATTEMPTS,
    on_broken_connection=False,
    on_invalid_json=False,
    in_line=True,
)
CREATE_RETRY = RetryPolicy(
    statuses=(),
    budget=BEFORE_PAYMENT,
    on_broken_connection=False,
    on_invalid_json=False,
    in_line=True,
)
MODEL_RETRY = RetryPolicy(statuses={408, *TRANSIENT}, budget=BEFORE_PAYMENT)
LIST_RETRY = RetryPolicy(statuses={408, *TRANSIENT}, budget=WHILE_REJECTED, patient=True)
POLL_RETRY = RetryPolicy(
    statuses={401, 403, 404, 408, *REDIRECTS, *TRANSIENT},
    budget=UNTIL_DEADLINE,
    rejection_budget=WHILE_REJECTED,
    patient=True,
)
CANCEL_RETRY = RetryPolicy(
    statuses=TRANSIENT, budget=UNTIL_DEADLINE, on_invalid_json=False, patient=True
)
ENTRY_RETRY = RetryPolicy(statuses={404, *TRANSIENT}, budget=BEFORE_PAYMENT)
LIST_ENTRIES_RETRY = RetryPolicy(statuses=TRANSIENT, budget=BEFORE_PAYMENT, on_invalid_json=False)
UPLOAD_RETRY = RetryPolicy(statuses=TRANSIENT, budget=BEFORE_PAYMENT)
DOWNLOAD_RETRY = RetryPolicy(
    statuses={404, *TRANSIENT}, budget=BEFORE_PAYMENT, on_invalid_json=False
)
PAID_UPLOAD_RETRY = replace(UPLOAD_RETRY, budget=AFTER_PAYMENT, patient=True)
PAID_DOWNLOAD_RETRY = replace(DOWNLOAD_RETRY, budget=AFTER_PAYMENT, patient=True)


def retry_delay_s(
    retry: RetryPolicy,
    budget: RetryBudget,
    attempts: int,
    failing_s: float,
    asked_s: float | None,
) -> float | None:
    """Return the seconds to wait before the next attempt, or None to give up.

    `attempts` have failed within this budget, the first of them `failing_s` seconds ago.
    `asked_s` is the provider's Retry-After. Over MAX_WAIT_SHARE it ends the retries, or, if the
    call is `patient`, is cut to that; otherwise the wait is the longer of it and the exponential
    delay. Jitter keeps jobs that were refused together from coming back together.
    """
    if attempts >= budget.attempts or failing_s >= patience_s(budget.patience_share):
        return None
    longest_s = patience_s(MAX_WAIT_SHARE)
    if asked_s is not None and asked_s > longest_s:
        return longest_s if retry.patient else None
    return backoff_s(attempts, asked_s)


def backoff_s(attempts: int, asked_s: float | None) -> float:
    """Return the exponential delay after so many failed attempts, or `asked_s` if that is
    longer.
    """
    first_s = get_settings().retry_first_seconds
    delay_s = min(first_s * 2.0 ** min(attempts - 1, 10), MAX_BACKOFF_S)
    if asked_s is None:
        return delay_s * random.uniform(0.75, 1)
    return max(asked_s, delay_s) * random.uniform(1, 1.1)


async def send_once(request: httpx.Request, max_bytes: int) -> ProviderResponse:
    """Send one request, and read its response's body up to `max_bytes`.

    Raises httpx.RequestError.
    """
    async with open_response(request) as response:
        return await read_response(response, max_bytes)


@asynccontextmanager
async def open_response(request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """Yield the unread response to one request. Raises httpx.RequestError, BlockedUrl."""
    try:
        response = await app_state().http.send(request, stream=True)
    except (httpx.InvalidURL, ValueError) as exc:  # ValueError: it cannot be decoded
        raise httpx.RemoteProtocolError("a redirect to an invalid URL") from exc
    async with aclosing(response):
        yield response


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


class FailedAttempts:
    """How often and how long the attempts of one call have failed.

    Outcomes with equal budgets count together.
    """

    def __init__(self) -> None:
        self._attempts: Counter[RetryBudget] = Counter()
        self._first_failed_at: dict[RetryBudget, float] = {}  # time.monotonic()

    def next_delay_s(self, retry: RetryPolicy, attempt: Attempt) -> float | None:
        """Count an attempt; return the seconds until the next one, or None if it was the last."""
        budget = retry.budget_for(attempt)
        if budget is None:
            return None
        now = time.monotonic()
        self._attempts[budget] += 1
        failing_s = now - self._first_failed_at.setdefault(budget, now)

        asked_s = None
        if isinstance(attempt, ProviderResponse):
            asked_s = attempt.retry_after_s(time.time())
        return retry_delay_s(retry, budget, self._attempts[budget], failing_s, asked_s)

    def log(self, request: httpx.Request, attempt: Attempt, delay_s: float) -> None:
        """Log a failed attempt that is going to be repeated."""
        logger.warning(
            "%s %s attempt=%d failed (%s), retry in %.1f s",
            request.method,
            request.url.host,
            self._attempts.total(),
            describe(attempt),
            delay_s,
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

    `request_options` are those of httpx's build_request. Raises httpx.RequestError if the last
    attempt had no response.
    """
    failures = FailedAttempts()
    while True:
        request = app_state().http.build_request(method, url, **request_options)
        attempt = await attempt_exchange(exchange, request, max_bytes)
        if retry.in_line and is_throttled(attempt):
            continue
        delay_s = failures.next_delay_s(retry, attempt)
        if delay_s is None:
            break
        failures.log(request, attempt, delay_s)
        await asyncio.sleep(delay_s)

    if isinstance(attempt, httpx.RequestError):
        raise attempt
    return attempt


def is_throttled(attempt: Attempt) -> bool:
    """Return whether the provider answered 429 (Too Many Requests)."""
    return isinstance(attempt, ProviderResponse) and attempt.status == 429


async def attempt_exchange(exchange: Exchange, request: httpx.Request, max_bytes: int) -> Attempt:
    """Make one attempt, and return a transport error as its outcome."""
    try:
        return await exchange(request, max_bytes)
    except httpx.RequestError as exc:
        return exc
    except OSError as exc:
        if not is_out_of_descriptors(exc):
            raise
        return httpx.NetworkError(str(exc))


def is_out_of_descriptors(error: OSError) -> bool:
    """Return whether the process, or the system, has no file descriptor left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


Result = TypeVar("Result")


async def wait_out_descriptors(work: Callable[[], Awaitable[Result]]) -> Result:
    """Do work on a paid video; retry it for up to PAID_SHARE while no file descriptor is free.

    Raises OSError, and whatever the work raises.
    """
    failed_at: float | None = None
    while True:
        try:
            return await work()
        except OSError as exc:
            failed_at = failed_at or time.monotonic()
            waited_s = time.monotonic() - failed_at
            if not is_out_of_descriptors(exc) or waited_s >= patience_s(PAID_SHARE):
                raise
        delay_s = min(max(waited_s, get_settings().retry_first_seconds), MAX_BACKOFF_S)
        logger.warning("no file descriptors, retry in %.1f s", delay_s)
        await asyncio.sleep(delay_s)


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

    Raises ResourceFailed for the storage, else ProviderFailed. With `about_content`, a 400, 404
    or 422 of ElevenLabs or Replicate means that it rejects what the client sent: ProviderRefused.
    """
    failed = ResourceFailed if provider == "supabase" else ProviderFailed
    name = PROVIDER_NAMES[provider]
    try:
        response = await send_with_retry(method, url, retry, **options)
    except httpx.RequestError as exc:
        raise failed(f"{name} did not answer: {describe(exc)}.", provider) from exc

    if response.status not in SUCCESSES:
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
    # Other 4xx (key, plan, bucket, content) come again until somebody changes something.
    retryable = status in (408, 409, 423, 425, 429) or status not in range(400, 500)
    code: ErrorCode | None = None
    if error_class is ProviderFailed and status in (401, 402, 403):
        code = "provider_rejected_key"
    elif error_class is ProviderFailed and status == 429:
        code = "provider_throttled"
    return error_class(detail, provider, code=code, retryable=retryable, response=response)


def invalid_response(provider: Provider, missing: str) -> ProviderFailed:
    """Return the error for a success that does not contain what it must."""
    return ProviderFailed(f"{PROVIDER_NAMES[provider]} answered without {missing}.", provider)


def describe(attempt: Attempt) -> str:
    """Describe the outcome of an attempt in a few words."""
    if isinstance(attempt, httpx.RequestError):
        return one_line(f"{type(attempt).__name__} {attempt}").rstrip(".")
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
        messages = [message_in(item, depth - 1) for item in value[:MAX_FIELD_ERRORS]]
        return "; ".join(filter(None, messages))
    if isinstance(value, dict):
        for key in ("detail", "message", "msg", "error", "title"):
            message = message_in(value.get(key), depth - 1)
            if message:
                return message
    return ""


def one_line(message: str) -> str:
    """Return a text of another server on one line, printable, without secrets.

    It has at most MAX_DETAIL_CHARS characters.
    """
    start = redact(message)[: 20 * MAX_DETAIL_CHARS]
    printable = "".join(char if char.isprintable() else " " for char in start)
    return " ".join(printable.split())[:MAX_DETAIL_CHARS]


# ---- Lines at the providers ----------------------------------------------------------------------
#
# A 429 of a speech or of a create costs nothing and concerns every job, so the jobs of this
# process wait in a line for each of the two calls, first come first served. Without a 429 there is
# no line, and calls wait only briefly, while MAX_CREATES creates are under way.
#
# ElevenLabs limits how many calls are under way, Replicate how many come in a minute. One rule
# fits both (see Pace): after a 429, as many calls may be under way as there are at that moment,
# at least one. At ElevenLabs that is what the plan allows, and a call starts when another ends. At
# Replicate it soon is one: the first in line asks again after the wait that Replicate asked for,
# and each round of successes allows one more.


class Pace(NamedTuple):
    """How many calls may be under way, and how many must succeed before it is one more."""

    at_once: int
    needed: int
    succeeded: int = 0

    @classmethod
    def after_refusal(cls, under_way: int) -> "Pace":
        """Return the pace after a 429 that came while `under_way` other calls had no answer."""
        return cls(max(1, under_way), max(1, PROBE_ROUNDS * under_way))

    def after_success(self) -> "Pace":
        """Return the pace after a call that succeeded.

        Each step up needs half as many successes as the one before, but at least `at_once`.
        """
        succeeded = self.succeeded + 1
        if succeeded < self.needed:
            return self._replace(succeeded=succeeded)
        at_once = self.at_once + 1
        return Pace(at_once, max(at_once, self.needed // 2))


@dataclass(eq=False)
class LinePlace:
    """The place in line of one call, kept for all its attempts."""

    line: "ProviderLine"
    job: Job
    number: int = field(default_factory=itertools.count().__next__)  # in the order of calls
    turn_began_at: float = 0.0
    ahead: int | None = None  # as the last event said; None: it is not queued
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class ProviderLine:
    """A line for one call of a provider, first come first served.

    After a 429 jobs wait here for their turn, up to their deadline. Each job takes its turn
    itself, without an await between the check and the taking, so a job that is cancelled while
    it waits holds nothing.
    """

    def __init__(self, provider: Provider, at_most: float = math.inf) -> None:
        self.provider = provider
        self.at_most = at_most  # calls under way, also without a line
        self.pace: Pace | None = None  # None: there is no line
        self.waiting: list[LinePlace] = []  # by number
        self.under_way = 0
        self.formed_at = 0.0
        self.refusals = 0
        self.refusals_in_a_row = 0  # a call that began before the last refusal is not counted
        self.refused_at = 0.0
        self.last_refusal = ""
        self.paused_until = 0.0
        self.busy_since = 0.0
        self.turn_ends: deque[float] = deque()  # since busy_since, of the last LINE_SPEED_S

    async def wait_for_turn(self, place: LinePlace) -> None:
        """Return when the call may be made; `end_turn` must follow. Raises ProviderBusy."""
        joined_at = time.monotonic()
        bisect.insort(self.waiting, place, key=attrgetter("number"))
        try:
            await anyio.lowlevel.checkpoint()  # ends here if the job was cancelled
            while not self._may_go(place):
                ahead = self._ahead_of(place)
                self.check_turn(place.job, ahead)
                self._emit_ahead(place, ahead)
                await self._sleep(place)
            self._begin_turn(place)
        finally:
            self.waiting.remove(place)
            if place.ahead is not None:
                place.job.queued_s += time.monotonic() - joined_at
                place.ahead = None
            self._wake_first()
            self._end_if_empty()

    def end_turn(self, place: LinePlace, response: ProviderResponse | None) -> None:
        """Make room for the next call, and adapt to the response; None: there was none."""
        self.under_way -= 1
        if response is not None and is_throttled(response):
            self._note_refusal(place, response)  # the call comes back, so the line stays
        else:
            if response is not None:
                self._note_end(response)
            self._end_if_empty()
        self._wake_first()

    def check_turn(self, job: Job, ahead: int | None = None) -> None:
        """Raise ProviderBusy if a job would not get its turn before its deadline.

        `ahead` jobs are before it; None: all that wait.
        """
        if self.pace is None:
            return
        if ahead is None:
            ahead = len(self.waiting)
        too_long_s = self._expected_wait_s(ahead) - (job.deadline - time.monotonic())
        if too_long_s <= 0:
            return
        retry_after_s = min(max(1.0, too_long_s), MAX_BUSY_S)
        name = PROVIDER_NAMES[self.provider]
        detail = (
            f"{name} answered {self.last_refusal} With {ahead} jobs ahead in line, this job's turn"
            f" would come after its deadline; try again in {retry_after_s:.0f} s."
        )
        raise ProviderBusy(detail, self.provider, retry_after_s)

    def _expected_wait_s(self, ahead: int) -> float:
        """Return the seconds that a job waits at the line's present speed.

        While no speed is known, that is the rest of the pause.
        """
        self._forget_old_turns()
        now = time.monotonic()
        pause_s = max(0.0, self.paused_until - now)
        turns = len(self.turn_ends) + self.under_way
        if turns == 0:
            return pause_s
        seconds = min(now - self.busy_since, LINE_SPEED_S)
        return max(pause_s, ahead * seconds / turns)

    def _forget_old_turns(self) -> None:
        """Keep the turns of the last LINE_SPEED_S."""
        since = time.monotonic() - LINE_SPEED_S
        while self.turn_ends and self.turn_ends[0] < since:
            self.turn_ends.popleft()

    def _may_go(self, place: LinePlace) -> bool:
        """Return whether it is the turn of this place."""
        at_once = self.at_most
        if self.pace:
            at_once = min(at_once, self.pace.at_once)
        is_paused = time.monotonic() < self.paused_until
        return self.waiting[0] is place and self.under_way < at_once and not is_paused

    def _ahead_of(self, place: LinePlace) -> int:
        """Return how many wait before a place."""
        return bisect.bisect_left(self.waiting, place.number, key=attrgetter("number"))

    def _emit_ahead(self, place: LinePlace, ahead: int) -> None:
        """Send an event that says how many are ahead in a line, if that has changed."""
        if self.pace and ahead != place.ahead:
            place.ahead = ahead
            place.job.emit("progress", "queued", ahead=ahead)

    async def _sleep(self, place: LinePlace) -> None:
        """Wait until woken, or until the next check is due."""
        seconds = min(LINE_STEP_S, patience_s(LEASE_SHARE) / 6)
        seconds *= random.uniform(0.75, 1.25)  # so that not all check in one moment
        pause_s = self.paused_until - time.monotonic()
        if pause_s > 0 and self.waiting[0] is place:
            seconds = min(seconds, pause_s)
        place.woken.clear()
        with anyio.move_on_after(seconds):
            await place.woken.wait()

    def _wake_first(self) -> None:
        """Wake the first in line, so that it checks whether it may go."""
        if self.waiting:
            self.waiting[0].woken.set()

    def _begin_turn(self, place: LinePlace) -> None:
        """Count a call as under way."""
        place.turn_began_at = time.monotonic()
        if self.under_way == 0 and self.pace is None:
            self.busy_since = place.turn_began_at
            self.turn_ends.clear()
        self.under_way += 1
        if place.ahead is not None:
            place.job.emit("progress")

    def _note_refusal(self, place: LinePlace, response: ProviderResponse) -> None:
        """Form a line if there is none, let fewer go at once, and pause for the Retry-After."""
        now = time.monotonic()
        asked_s = response.retry_after_s(time.time())
        self.last_refusal = f"{response.status}: {provider_message(response).rstrip('.')}."
        if asked_s:
            self.last_refusal += f" It asks to wait {asked_s:.0f} s."
        if self.pace is None:
            self.formed_at = now
            self.refusals = 0
            logger.warning("a line forms at %s: %s", self.provider, self.last_refusal)
        self.refusals += 1
        if place.turn_began_at >= self.refused_at:
            self.refusals_in_a_row += 1
        self.refused_at = now
        self.pace = Pace.after_refusal(self.under_way)
        # While calls are under way, the next attempt follows the end of one.
        if asked_s is not None or self.under_way == 0:
            pause_s = backoff_s(max(1, self.refusals_in_a_row), asked_s)
            self.paused_until = max(self.paused_until, now + pause_s)

    def _note_end(self, response: ProviderResponse) -> None:
        """Count a call that was not refused; a success lets the pace grow."""
        self.turn_ends.append(time.monotonic())
        self._forget_old_turns()
        if response.status < 300 and self.pace:
            self.refusals_in_a_row = 0
            self.pace = self.pace.after_success()

    def _end_if_empty(self) -> None:
        """End the line once no job waits and no call is under way."""
        if self.pace is None or self.waiting or self.under_way:
            return
        seconds = time.monotonic() - self.formed_at
        logger.info(
            "the line at %s is gone: s=%.1f refusals=%d", self.provider, seconds, self.refusals
        )
        self.pace = None
        self.refusals_in_a_row = 0
        self.paused_until = 0.0


async def exchange_in_line(
    place: LinePlace, exchange: Exchange, request: httpx.Request, max_bytes: int
) -> ProviderResponse:
    """Make one attempt when it is the call's turn. Raises ProviderBusy, httpx.RequestError."""
    await place.line.wait_for_turn(place)
    response = None
    try:
        response = await exchange(request, max_bytes)
    finally:
        place.line.end_turn(place, response)
    return response


# ---- ElevenLabs: text to speech ------------------------------------------------------------------


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


async def elevenlabs_tts_bytes(text: str, voice_id: str, job: Job | None = None) -> bytes:
    """Return the text as speech, a playable file in TTS_OUTPUT_FORMAT.

    Raises ProviderRefused, ProviderFailed, SpeechTooLarge, MissingSetting.
    """
    settings = get_settings()
    job = job or Job("-")
    place = LinePlace(app_state().speech_line, job)
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
            exchange=partial(exchange_in_line, place, partial(speech_exchange, job)),
        )
    except (ProviderRefused, ProviderFailed) as exc:
        if exc.response and not exc.response.complete and exc.response.status == 200:
            raise SpeechTooLarge(
                "The speech is larger than 9.5 MB; use a shorter text.", "elevenlabs"
            ) from exc
        name_speech_field(exc)
        raise
    return validate_speech(response.body, settings.tts_output_format)


async def speech_exchange(job: Job, request: httpx.Request, max_bytes: int) -> ProviderResponse:
    """Make one attempt; the claim is confirmed first, since it may be old by then.

    Raises ClaimLost, SpendingLimitReached.
    """
    await confirm_claim(job)
    with app_state().video_budget.counting(job.name) as call:
        response = await send_once(request, max_bytes)
        call.is_free = response.status >= 400
    return response


def name_speech_field(error: ServiceError) -> None:
    """Add the field that ElevenLabs rejects, by its code: voice_not_found, text_too_long ..."""
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
    samples = samples[: len(samples) // 2 * 2]  # so that the chunk needs no padding byte
    format_chunk = struct.pack("<HHIIHHH", wave_format, 1, rate, rate * width, width, width * 8, 0)
    fact_chunk = struct.pack("<I", len(samples) // width)

    body = b"WAVE"
    for name, content in ((b"fmt ", format_chunk), (b"fact", fact_chunk), (b"data", samples)):
        body += name + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


MP3_SAMPLE_RATES = {
    3: (44_100, 48_000, 32_000),
    2: (22_050, 24_000, 16_000),
    0: (11_025, 12_000, 8_000),
}
MP3_KILOBITS_V1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MP3_KILOBITS_V2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
OPUS_RATE = 48_000  # of its granule positions, whatever the speech was sampled at (RFC 7845)


def speech_seconds(speech: bytes) -> float | None:
    """Return the length of speech in seconds, as the file's own headers say.

    None if it cannot be known.
    """
    if speech.startswith(b"RIFF"):
        seconds = wav_seconds(speech)
    elif speech.startswith(b"OggS"):
        seconds = opus_seconds(speech)
    else:
        seconds = mp3_seconds(speech)
    return round(seconds, 2) or None


def wav_seconds(speech: bytes) -> float:
    """Return the length of a WAV file; 0 if it has no format or no samples."""
    bytes_per_second = 0
    offset = 12
    while offset + 8 <= len(speech):
        name, size = struct.unpack_from("<4sI", speech, offset)
        offset += 8
        if name == b"fmt " and offset + 12 <= len(speech):
            (bytes_per_second,) = struct.unpack_from("<I", speech, offset + 8)
        if name == b"data" and bytes_per_second:
            # A file that was written as a stream states the largest size, or 0.
            available = len(speech) - offset
            return min(size or available, available) / bytes_per_second
        offset += size + size % 2
    return 0.0


def opus_seconds(speech: bytes) -> float:
    """Return the length of an Ogg Opus file: the last page's position, without the pre-skip.

    0 if it is unknown.
    """
    head = speech.find(b"OpusHead", 0, 1_000)
    last_page = speech.rfind(b"OggS\0")
    if head < 0 or len(speech) < max(head, last_page) + 14:
        return 0.0
    (pre_skip,) = struct.unpack_from("<H", speech, head + 10)
    (position,) = struct.unpack_from("<q", speech, last_page + 6)
    samples: int = max(0, position - pre_skip)
    return samples / OPUS_RATE


class Mp3Frame(NamedTuple):
    """One frame of an MP3, as its header describes it."""

    size: int  # bytes, the header included
    samples: int
    sample_rate: int


def mp3_frame(speech: bytes, offset: int) -> Mp3Frame | None:
    """Return the frame that begins at an offset, or None if there is none.

    ISO/IEC 11172-3, 2.4.1.3.
    """
    header = int.from_bytes(speech[offset : offset + 4], "big")
    version = header >> 19 & 3  # 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    layer = header >> 17 & 3  # 1: layer III
    kilobits_index = header >> 12 & 15
    rate_index = header >> 10 & 3
    has_padding = header >> 9 & 1
    is_frame = header >> 21 == 0x7FF and version != 1 and layer == 1
    if not is_frame or kilobits_index in (0, 15) or rate_index == 3:
        return None
    samples = 1152 if version == 3 else 576
    kilobits = (MP3_KILOBITS_V1 if version == 3 else MP3_KILOBITS_V2)[kilobits_index]
    sample_rate = MP3_SAMPLE_RATES[version][rate_index]
    size = samples // 8 * kilobits * 1000 // sample_rate + has_padding
    return Mp3Frame(size, samples, sample_rate)


def mp3_seconds(speech: bytes) -> float:
    """Return the length of an MP3: the sum of its frames, without the encoder's padding."""
    seconds = 0.0
    offset = 0
    gaps = 0
    while offset + 4 <= len(speech) and gaps < MAX_MP3_GAPS:
        frame = mp3_frame(speech, offset)
        if frame is None:
            gaps += 1
            offset = next_mp3_frame(speech, offset)
            continue
        samples = frame.samples
        content = speech[offset : offset + frame.size]
        tag = re.search(b"Xing|Info|VBRI", content[:44])
        if tag:  # no sound
            samples = -encoder_padding(content, tag.start())
        seconds += samples / frame.sample_rate
        offset += frame.size
    return max(0.0, seconds)


def encoder_padding(frame: bytes, tag_start: int) -> int:
    """Return how many samples an MP3's encoder added at both ends, by the tag in its first frame.

    0 if the tag does not say.
    """
    tag = frame[tag_start:]
    has_all_fields = tag[:8] in (b"Xing\0\0\0\x0f", b"Info\0\0\0\x0f")
    if not has_all_fields or tag[120:124] not in (b"LAME", b"Lavf", b"Lavc"):
        return 0
    before_and_after = int.from_bytes(tag[141:144], "big")  # 12 bits each
    return (before_and_after >> 12) + (before_and_after & 0xFFF)


def next_mp3_frame(speech: bytes, offset: int) -> int:
    """Return where to look for the next frame: behind an ID3 tag, or at the next 0xFF byte."""
    if speech[offset : offset + 3] == b"ID3" and offset + 10 <= len(speech):
        size = 0
        for byte in speech[offset + 6 : offset + 10]:
            size = size << 7 | byte & 0x7F
        return offset + 10 + size
    found = speech.find(b"\xff", offset + 1)
    return found if found >= 0 else len(speech)


def speech_format() -> SpeechFormat:
    """Return how speech is stored under the present TTS_OUTPUT_FORMAT."""
    codec = get_settings().tts_output_format.split("_")[0]
    return SPEECH_FORMATS[codec]


def speech_demuxer(speech: Path) -> str:
    """Return ffmpeg's name of a speech's format, by its first bytes.

    TTS_OUTPUT_FORMAT may have changed since the speech of a resumed job was stored.
    """
    with speech.open("rb", buffering=0) as file:
        start = file.read(4)
    for known in (MP3, WAV, OGG):
        if start.startswith(known.signatures):
            return known.extension
    return speech_format().extension


# ---- Supabase Storage and downloads --------------------------------------------------------------

IMMUTABLE_CACHE = "max-age=31536000"  # stored and served as written


async def supabase_upload(
    path: str,
    content: bytes | Path,
    content_type: str,
    retry: RetryPolicy = UPLOAD_RETRY,
    timeout: httpx.Timeout = TIMEOUT,
) -> str:
    """Store bytes or a file and return its public URL. Raises ResourceFailed, MissingSetting."""
    body: bytes | FileStream
    if isinstance(content, Path):
        body = FileStream(content)
        size = content.stat().st_size  # noqa: ASYNC240  takes a moment
    else:
        body = content
        size = len(content)

    headers = {
        **storage_headers(),
        "Content-Type": content_type,  # no parameters: a bucket may have a list of allowed types
        "Content-Length": str(size),  # Supabase checks the bucket's size limit by it
        "Cache-Control": IMMUTABLE_CACHE,
        "x-upsert": "true",  # makes a repeated upload safe
    }
    url = storage_url(path)
    response = await call_provider(
        "supabase", "POST", url, retry, headers=headers, content=body, timeout=timeout
    )
    if not get_in(response.payload, "Key"):  # some other server's 200
        raise ResourceFailed(
            "Supabase Storage answered without having stored the file.", "supabase"
        )
    return storage_url(path, "public/")


def storage_url(path: str, access: Literal["", "public/", "authenticated/"] = "") -> str:
    """Return where a file of the bucket is written, or with `access` read.

    Raises MissingSetting.
    """
    settings = get_settings()
    base_url = settings.required("supabase_url")
    return f"{base_url}/storage/v1/object/{access}{settings.supabase_bucket}/{path}"


def storage_headers() -> dict[str, str]:
    """Return the service key in both headers, whether it is an `sb_` or an `eyJ` key.

    Raises MissingSetting.
    """
    key = get_settings().required("supabase_service_role")
    return {"Authorization": f"Bearer {key}", "apikey": key}


@dataclass(frozen=True)
class FileStream:
    """A file as a request's body: read in chunks in threads, from its start at each attempt."""

    path: Path

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the file's chunks."""
        with self.path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk


async def download(url: str, target: Path, retry: RetryPolicy = PAID_DOWNLOAD_RETRY) -> None:
    """Stream a file of up to 100 MB to disk; one that breaks off is started again.

    Raises ResourceFailed.
    """
    try:
        host = httpx.URL(check_http_url(url)).host
    except ValueError as exc:
        message = "The URL of a file to download is invalid."
        raise ResourceFailed(message, code="download_failed", retryable=False) from exc

    exchange = partial(download_once, target)
    try:
        response = await send_with_retry("GET", url, retry, exchange=exchange)
    except httpx.RequestError as exc:
        message = f"The download from {host} failed: {describe(exc)}."
        raise ResourceFailed(message, code="download_failed") from exc
    except BlockedUrl as exc:
        message = f"The file at {host} may not be fetched. {exc.detail}"
        raise ResourceFailed(message, code="download_failed", retryable=False) from exc
    if response.status != 200:
        message = f"The download from {host} was answered {describe(response)}."
        raise ResourceFailed(message, code="download_failed", response=response)


async def download_once(target: Path, request: httpx.Request, max_bytes: int) -> ProviderResponse:
    """Make one attempt at a download: a 200 is written to `target`, all else is returned."""
    head_bytes_left.set(MAX_HEAD_BYTES)
    async with follow_redirects(request) as response:
        head_bytes_left.set(math.inf)  # a body has limits of its own
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

    httpx's own handling of redirects would read the whole body of each response on the way.
    """
    for _ in range(MAX_REDIRECTS + 1):
        async with open_response(request) as response:
            if response.next_request is None:
                yield response
                return
            request = response.next_request
    raise BlockedUrl(f"The URL redirects more than {MAX_REDIRECTS} times.")


def check_download_size(size: int) -> None:
    """Raise ResourceFailed if a file has more than MAX_DOWNLOAD_BYTES."""
    if size > MAX_DOWNLOAD_BYTES:
        message = "A file to download is larger than 100 MB."
        raise ResourceFailed(message, code="download_failed", retryable=False)


def content_length(response: httpx.Response) -> int | None:
    """Return the length of a body in bytes, if the response states a plausible one."""
    header = response.headers.get("content-length", "")
    return int(header) if re.fullmatch(r"\d{1,18}", header) else None


# ---- Remote file checks: /debug/head and the picture ---------------------------------------------


async def head(url: str, timeout_s: float, slots: asyncio.Semaphore) -> HeadResult:
    """Return status, type and whole size of a remote file, once one of `slots` is free.

    Raises BlockedUrl; ResourceFailed, also after `timeout_s` seconds.
    """
    head_bytes_left.set(MAX_HEAD_BYTES)
    is_waiting = True
    try:
        with anyio.fail_after(timeout_s):
            async with slots:
                is_waiting = False
                result = await head_once("HEAD", url)
                if result.status >= 400:  # it may not allow HEAD: ask for the first byte
                    result = await head_once("GET", url)
                return result
    except httpx.RequestError as exc:
        message = f"The URL did not answer: {describe(exc)}."
        raise ResourceFailed(message, code="download_failed") from exc
    except TimeoutError as exc:
        if is_waiting:
            message = "Too many files are being checked; try again."
            raise ResourceFailed(message, code="busy") from exc
        message = f"The URL did not answer within {timeout_s:g} s."
        raise ResourceFailed(message, code="download_failed") from exc


async def head_once(method: Literal["HEAD", "GET"], url: str) -> HeadResult:
    """Ask for a remote file's headers; GET asks for its first byte as well.

    Raises BlockedUrl, httpx.RequestError.
    """
    headers = {"Range": "bytes=0-0"} if method == "GET" else {}
    request = app_state().http.build_request(
        method, url, headers=headers, extensions={USER_SUPPLIED: True}
    )
    async with follow_redirects(request) as response:
        size = content_length(response)
        if response.status_code == 206:  # a part: Content-Range may state the size of the whole
            content_range = response.headers.get("content-range", "")
            match = re.fullmatch(r"bytes [\d*-]+/(\d{1,18})", content_range)
            size = int(match[1]) if match else None
        content_type = one_line(response.headers.get("content-type", ""))[:200]
        return HeadResult(
            status=response.status_code, content_type=content_type or None, bytes=size
        )


# Content types that no picture has. A file without a type, or with a general one, may be a picture.
NO_PICTURE = re.compile(
    r"(text|audio|video|font)/|application/(json|xml|xhtml\+xml|pdf|zip|(x-)?javascript)\b",
    re.IGNORECASE,
)


async def check_picture(url: str) -> None:
    """Refuse, before anything is paid for, what certainly is no picture. Raises InvalidInput."""
    try:
        result = await head(url, PICTURE_TIMEOUT_S, app_state().picture_slots)
    except PrivateAddress as exc:
        reason = exc.detail.rstrip(".")
        message = f"{reason}; the picture must be on the public internet"
        raise invalid_field("image_url", message, code="private_url") from exc
    except Exception as exc:
        if is_unknown_host(exc):
            message = "there is no picture at this URL, its host does not exist"
            raise invalid_field("image_url", message, code="picture_not_found") from exc
        logger.info("the picture could not be checked: %r", exc)
        return  # Replicate fetches it itself, and may succeed
    if result.status in (404, 410):
        message = f"there is no picture at this URL, it answers {result.status}"
        params: ErrorParams = {"status": result.status}
        raise invalid_field("image_url", message, code="picture_not_found", params=params)
    content_type = result.content_type or ""
    if result.status < 300 and NO_PICTURE.match(content_type):
        message = f"is not the URL of a picture, but of {content_type}"
        if content_type.lower().startswith("text/html"):
            message = "is the URL of a web page, not of a picture"
        params = {"content_type": content_type}
        raise invalid_field("image_url", message, code="not_a_picture", params=params)


def is_unknown_host(exc: BaseException | None) -> bool:
    """Return whether an error means that a host name does not exist.

    A look-up that failed for now (EAI_AGAIN) does not mean that.
    """
    while exc is not None:
        if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_NONAME:
            return True
        exc = exc.__cause__ or exc.__context__  # httpcore's `from None` keeps only the context
    return False


# ---- Model schemas: mapping our fields to a model's input ----------------------------------------

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
ENUM_NAMES = frozenset(LENGTH_NAMES + FPS_NAMES + SIZE_NAMES)  # whose allowed values are read


@dataclass(frozen=True)
class VideoModel:
    """A model on Replicate: where its predictions are created, and what input it takes."""

    name: str
    # Its id, or owner/name:id if the client named one; None: an official model, which runs by name.
    version: str | None
    fields: dict[str, Property]
    required: tuple[str, ...]

    @cached_property
    def speech_field(self) -> str | None:
        """The field for speech, if the model makes a video that speaks by itself."""
        for name, prop in self.fields.items():
            tokens = name_tokens(name)
            if is_uri(prop) and tokens & SPEECH_TOKENS and not tokens & EXCLUDED_TOKENS:
                return name
        return None

    @cached_property
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

    @cached_property
    def prompt_field(self) -> str | None:
        """The field for the prompt; of several, the one with the shortest name."""
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


def is_small(value: Any) -> bool:
    """Return whether a default in a schema is within the limits."""
    if isinstance(value, str):
        return len(value) <= MAX_VALUE_CHARS and is_encodable(value)
    if isinstance(value, (int, float)):
        return abs(value) <= MAX_NUMBER  # NaN is not either
    if isinstance(value, (list, dict)):
        parts = value if isinstance(value, list) else [*value, *value.values()]
        return len(parts) <= MAX_ENUM_VALUES and all(
            is_small(part) and not isinstance(part, (list, dict)) for part in parts
        )
    return False


def is_choice(value: Any) -> bool:
    """Return whether a value of an enum is within the limits."""
    if isinstance(value, str):
        return len(value) <= MAX_NAME_CHARS and is_encodable(value)
    return isinstance(value, (int, float)) and is_small(value)


def is_encodable(text: str) -> bool:
    """Return whether a text can be encoded: JSON may contain a lone surrogate, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_property(schema: dict[str, Any]) -> Property:
    """Return the keywords of a property that are used; what is over a limit is cut or left out.

    Anybody may publish a model, so no value of its schema is trusted.
    """
    prop: Property = {}
    kind = schema.get("type")
    if isinstance(kind, list):  # OpenAPI 3.1 writes a nullable type as a list
        kind = next((name for name in kind[:MAX_SCHEMA_PARTS] if name != "null"), None)
    for keyword, text in (("type", kind), ("format", schema.get("format"))):
        if isinstance(text, str) and len(text) <= MAX_NAME_CHARS:
            prop[keyword] = text
    if isinstance(schema.get("description"), str):
        prop["description"] = schema["description"][:MAX_DESCRIPTION_CHARS]
    if schema.get("deprecated"):
        prop["deprecated"] = True
    if "default" in schema and is_small(schema["default"]):
        prop["default"] = schema["default"]
    for keyword in ("minimum", "maximum"):
        number = schema.get(keyword)
        if isinstance(number, (int, float)) and is_small(number):
            prop[keyword] = number
    if isinstance(schema.get("enum"), list):
        values = schema["enum"][:MAX_ENUM_VALUES]
        prop["enum"] = [value for value in values if is_choice(value)]
    return prop


def resolve_schema(schema: Any, schemas: Any, depth: int = MAX_SCHEMA_DEPTH) -> Property:
    """Return a property with what its `$ref`, `allOf`, `anyOf` and `oneOf` add.

    Replicate keeps enums there.
    """
    if not isinstance(schema, dict) or depth == 0:
        return {}
    prop = read_property(schema)
    parts: list[Any] = []
    for keyword in ("allOf", "anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            parts.extend(schema[keyword][:MAX_SCHEMA_PARTS])
    reference = schema.get("$ref")
    if isinstance(reference, str):
        parts.append(schemas.get(reference[-MAX_NAME_CHARS:].rpartition("/")[2]))
    for part in parts[:MAX_SCHEMA_PARTS]:
        resolved = resolve_schema(part, schemas, depth - 1)
        if resolved.get("type") != "null":
            prop = {**resolved, **prop}
    return prop


def parse_model(name: str, version: str | None, schemas: Any) -> VideoModel:
    """Return a model from its published `components.schemas`.

    Raises ProviderFailed if it is unreadable.
    """
    properties = get_in(schemas, "Input", "properties")
    required = get_in(schemas, "Input", "required")
    if not isinstance(properties, dict) or len(properties) > MAX_SCHEMA_FIELDS:
        raise invalid_response(
            "replicate", f"an input schema of {name} that a person could fill in"
        )
    if not isinstance(required, list):
        required = []
    required = [key for key in required[:MAX_SCHEMA_FIELDS] if isinstance(key, str)]
    names = (*properties, *required)
    if not all(len(key) <= MAX_NAME_CHARS and is_encodable(key) for key in names):
        raise invalid_response("replicate", f"names of {name}'s input that a person could read")

    fields = {key: resolve_schema(prop, schemas) for key, prop in properties.items()}
    for key, prop in fields.items():
        if key not in ENUM_NAMES:
            prop.pop("enum", None)
    return VideoModel(name, version, fields, tuple(required))


def build_model_input(
    model: VideoModel, body: JobPromptOnly, audio_url: str | None = None
) -> dict[str, Any]:
    """Return a prediction's input: our fields under the model's names, as the model writes values.

    A setting the client sent is used or refused, one it left out adapts to the model, one the
    model lacks is left out. `audio_url` goes to a model that takes speech. Raises InvalidInput
    naming what is wrong, with the allowed values.
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
        names = one_line(", ".join(missing))
        message = f"{model.name} needs {names}, which {reason}"
        raise invalid_field("model", message, params={"missing": missing[:MAX_NAMED_FIELDS]})
    if model is HAILUO and values["duration"] == 10 and values["resolution"] == "1080p":
        message = "must be 512p or 768p with 10 seconds"
        raise invalid_field("resolution", message, params={"allowed": ["512p", "768p"]})
    return values


def length_input(model: VideoModel, body: JobPromptOnly) -> dict[str, Any]:
    """Return the field for the video's length, in seconds or frames; empty if there is none.

    Raises InvalidInput if the client sent a length that the model does not take.
    """
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
            message = f"{model.name} takes {describe_lengths(prop, choices, frame_rate)}"
            params = bounds_params(prop, frame_rate or 1.0)
            if choices:
                params = {"allowed": lengths_in_seconds(choices, frame_rate)}
            raise invalid_field("seconds", message, params=params)

        if number in choices:
            return {name: choices[number]}
        return {name: number if prop.get("type") == "number" else round(number)}
    return {}


def number_choices(prop: Property) -> dict[float, Any]:
    """Return the numbers in a field's enum, each with the enum's own value, such as "5s"."""
    choices = {}
    for value in prop.get("enum", []):
        number = as_number(value)
        if number is not None:
            choices[number] = value
    return choices


def counts_frames(name: str, prop: Property, choices: Collection[float]) -> bool:
    """Return whether a length is in frames, by its name, its numbers or its description."""
    smallest = min(choices, default=prop.get("minimum") or 0)
    if name in FRAMES_NAMES or smallest > 60:
        return True
    description = name_tokens(str(prop.get("description", "")))
    return "seconds" not in description and bool(description & {"frame", "frames"})


def describe_lengths(prop: Property, choices: Collection[float], frame_rate: float | None) -> str:
    """Return the lengths that a model takes as text, in seconds."""
    if not choices:
        return describe_bounds(prop, frame_rate or 1.0)
    return " or ".join(f"{seconds:g}" for seconds in lengths_in_seconds(choices, frame_rate))


def lengths_in_seconds(choices: Collection[float], frame_rate: float | None) -> list[float]:
    """Return the lengths that a model lists, in seconds and in order."""
    if frame_rate:
        return sorted({round(choice / frame_rate, 0) for choice in choices})
    return sorted({round(choice, 3) for choice in choices})


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
        if rate and 1 <= rate <= MAX_FPS:
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
    """Return the size among a model's own that was asked for, or the nearest.

    Raises InvalidInput.
    """
    for choice in choices:
        if str(choice).casefold() == body.resolution.casefold():
            return choice
    wanted = vertical_pixels(body.resolution)

    def distance(choice: Any) -> tuple[int, int]:
        pixels = vertical_pixels(choice)
        return abs(pixels - wanted), pixels

    nearest = min(choices, key=distance)
    if "resolution" in body.model_fields_set and vertical_pixels(nearest) != wanted:
        allowed = one_line(" or ".join(map(str, choices)))
        params: ErrorParams = {"allowed": [str(choice) for choice in choices]}
        raise invalid_field("resolution", f"{model.name} takes {allowed}", params=params)
    return nearest


def free_size_input(model: VideoModel, body: JobPromptOnly, name: str) -> dict[str, Any]:
    """Return a size field without an enum, with its value; empty if the client sent no size."""
    if "resolution" not in body.model_fields_set:
        return {}
    prop = model.fields[name]
    if prop["type"] == "string":
        return {name: body.resolution}
    wanted = vertical_pixels(body.resolution)
    if wanted == 0 or clamp(wanted, prop) != wanted:
        message = f"{model.name} takes {describe_bounds(prop)}"
        raise invalid_field("resolution", message, params=bounds_params(prop))
    return {name: wanted}


def describe_bounds(prop: Property, rate: float = 1.0) -> str:
    """Return a field's bounds as text, divided by `rate`: frames become seconds."""
    parts = []
    if "minimum" in prop:
        parts.append(f"at least {prop['minimum'] / rate:.0f}")
    if "maximum" in prop:
        parts.append(f"at most {prop['maximum'] / rate:.0f}")
    return " and ".join(parts)


def bounds_params(prop: Property, rate: float = 1.0) -> ErrorParams:
    """Return a field's bounds as `min` and `max`, divided by `rate`."""
    params: ErrorParams = {}
    if "minimum" in prop:
        params["min"] = round(prop["minimum"] / rate)
    if "maximum" in prop:
        params["max"] = round(prop["maximum"] / rate)
    return params


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


# ---- Replicate: create, poll, recover, cancel ----------------------------------------------------

VIDEO_EXPIRED = "The video has expired: Replicate keeps it an hour. A new job makes a new one."
PREDICTION_ID_PATTERN = r"^[A-Za-z0-9_-]{1,100}$"
TERMINAL_STATUSES = ("succeeded", "failed", "canceled", "aborted")


def last_percent(logs: Any) -> int | None:
    """Return the percentage of a prediction whose log contains a progress bar, or None."""
    end_of_log = logs[-2000:] if isinstance(logs, str) else ""
    percents = re.findall(r"(?<![\d.])(\d{1,2}|100)(?:\.\d+)?%", end_of_log)
    return int(percents[-1]) if percents else None


def is_http_url(value: Any) -> bool:
    """Return whether a value looks like an http(s) URL of at most MAX_URL_CHARS."""
    if not isinstance(value, str) or len(value) > MAX_URL_CHARS:
        return False
    return re.match("https?://", value, re.IGNORECASE) is not None


def first_url(output: Any) -> str | None:
    """Return the first URL in a prediction's output, which is a string, a list or an object."""
    pending = [output]
    for _ in range(MAX_OUTPUT_VALUES):
        if not pending:
            break
        value = pending.pop()
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            pending.extend(reversed(value[:MAX_OUTPUT_VALUES]))
        elif is_http_url(value):
            with suppress(ValueError):
                return check_http_url(value)
    return None


def error_message(error: Any) -> str:
    """Return a prediction's error on one line; empty if it gives none."""
    return one_line(message_in(error))


class Prediction(BaseModel):
    """The part of Replicate's answer about a prediction that is kept while the job waits.

    Every field but the first two is optional there.
    """

    id: Annotated[str, Field(pattern=PREDICTION_ID_PATTERN)]
    status: Annotated[str, Field(pattern=r"^[a-z_-]{1,40}$")]
    video_url: Annotated[str | None, BeforeValidator(first_url), Field(alias="output")] = None
    percent: Annotated[int | None, BeforeValidator(last_percent), Field(alias="logs")] = None
    error: Annotated[str, BeforeValidator(error_message)] = ""
    data_removed: Annotated[bool, BeforeValidator(bool)] = False


def poll_delay_s(waited_s: float, active_polls: int, durations: Collection[float] = ()) -> float:
    """Return the seconds until the next poll.

    `durations` are those of the last videos of this kind, in seconds. While none is known: every
    2.5 % of the time waited, at most 2 s. Otherwise: seldom until 0.8 of the shortest one, from
    then on in small steps. Never less than POLL_MIN_SECONDS, nor than lets `active_polls` stay
    within MAX_POLLS_PER_MINUTE.
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
    response = await call_provider(
        "replicate",
        method,
        f"{settings.replicate_base_url}/v1/{path}",
        retry,
        headers={"Authorization": f"Bearer {token}", **(headers or {})},
        **options,
    )
    replicate_time = parse_http_date(response.headers.get("date"))
    if replicate_time is not None:
        app_state().replicate_clock_s = replicate_time - time.time()
    return response


def parse_prediction(value: Any) -> Prediction | None:
    """Return the prediction that a JSON value describes, or None if it is none."""
    try:
        return Prediction.model_validate(value)
    except ValidationError:
        return None


async def find_model(name: str | None) -> VideoModel:
    """Return a model by `owner/name` or `owner/name:version`; None is the default one.

    A model is kept for ten minutes, an unknown one for a minute. Jobs that ask for one model at
    the same time share one look-up. Raises ProviderRefused (unknown), ProviderFailed, ResourceFailed.
    """
    if name is None or name == DEFAULT_MODEL:
        return HAILUO
    state = app_state()
    now = time.monotonic()
    lookup = state.models.get(name)
    if lookup is None or lookup.expires_at <= now:
        is_known = lookup is not None
        lookup = state.unknown_models.get(name)
        if lookup is None or lookup.expires_at <= now:
            lookup = begin_lookup(name, is_known)
    try:
        return await asyncio.shield(lookup.task)
    except ServiceError as exc:
        raise exc.with_traceback(None)  # noqa: B904  it would grow with each job that gets it


def check_allowed_model(name: str) -> None:
    """Raise InvalidInput if ALLOWED_MODELS is set and does not list a model."""
    allowed = get_settings().allowed_models
    if allowed is not None and name not in allowed.split(","):
        choices = one_line(allowed.replace(",", " or "))
        params: ErrorParams = {"allowed": allowed.split(",")}
        message = f"must be {choices}"
        raise invalid_field("model", message, code="model_not_allowed", params=params)


def begin_lookup(name: str, is_known: bool) -> ModelLookup:
    """Start to look a model up. Raises ResourceFailed if there are too many new models."""
    state = app_state()
    now = time.monotonic()
    if not is_known:
        is_full = len(state.lookups_at) == MAX_LOOKUPS_PER_MINUTE
        if is_full and now - state.lookups_at[0] < 60:
            message = (
                f"At most {MAX_LOOKUPS_PER_MINUTE} new models are looked up a minute; try again."
            )
            raise ResourceFailed(message, code="busy")
        state.lookups_at.append(now)

    task = asyncio.create_task(look_up_model(name))
    lookup = ModelLookup(task, now + MODEL_TTL_S)
    remember_lookup(state.models, name, lookup)
    task.add_done_callback(partial(forget_failed_lookup, name))
    return lookup


def remember_lookup(lookups: dict[str, ModelLookup], name: str, lookup: ModelLookup) -> None:
    """Remember a look-up; of more than MAX_MODELS, the oldest is forgotten."""
    lookups.pop(name, None)
    lookups[name] = lookup
    if len(lookups) > MAX_MODELS:
        del lookups[next(iter(lookups))]


def forget_failed_lookup(name: str, task: "asyncio.Task[VideoModel]") -> None:
    """Forget a failed look-up; one of an unknown model is remembered for a minute."""
    error = None if task.cancelled() else task.exception()
    if error is None and not task.cancelled():
        return
    state = app_state()
    if name in state.models and state.models[name].task is task:
        del state.models[name]
    if isinstance(error, ProviderRefused):
        lookup = ModelLookup(task, time.monotonic() + UNKNOWN_MODEL_TTL_S)
        remember_lookup(state.unknown_models, name, lookup)


async def look_up_model(name: str) -> VideoModel:
    """Return the model, or that version of it, as Replicate describes it now.

    Raises as find_model.
    """
    model_name, _, version = name.partition(":")
    path = f"models/{model_name}"
    if version:
        path += f"/versions/{version}"
    try:
        with anyio.fail_after(MAX_LOOKUP_S):
            response = await call_replicate("GET", path, MODEL_RETRY, about_content=True)
    except TimeoutError as exc:
        message = f"Replicate did not describe {name} within {MAX_LOOKUP_S:g} s."
        raise ProviderFailed(message, "replicate") from exc
    except ProviderRefused as exc:  # Replicate's own message does not name the model
        detail = f"model {name}: {exc.detail}"
        error = ProviderRefused(detail, "replicate", code="unknown_model")
        error.add_field_error("model", exc.detail, code="unknown_model")
        raise error from exc

    if version:
        described = response.payload
        runs_by = name
    else:
        described = get_in(response.payload, "latest_version")
        runs_by = get_in(described, "id")
    is_official = not version and get_in(response.payload, "is_official") is True
    # A community model runs by version only.
    if not is_official and not re.fullmatch(r"[\w./:-]{1,300}", str(runs_by or "")):
        raise invalid_response("replicate", f"a version of {name}")
    schemas = get_in(described, "openapi_schema", "components", "schemas")
    if is_official:
        return await asyncio.to_thread(parse_model, model_name, None, schemas)
    return await asyncio.to_thread(parse_model, model_name, str(runs_by), schemas)


async def hailuo_video_from_prompt(body: JobPromptOnly, job: Job | None = None) -> str:
    """Return the URL of a video made by the default model.

    Raises as replicate_video_from_prompt.
    """
    return await replicate_video_from_prompt(body, job=job, model=HAILUO)


async def replicate_video_from_prompt(
    body: JobPromptOnly,
    audio_url: str | None = None,
    job: Job | None = None,
    model: VideoModel | None = None,
) -> str:
    """Return the URL, valid for an hour, of the video that `job` has begun, else of a new one.

    `audio_url` is the speech, for a model that takes it. If this call ends early, the prediction
    is cancelled, unless a request with the same key can resume it. Raises ProviderRefused (also:
    the prediction ended failed, canceled or aborted, or its video has expired), InvalidInput,
    ProviderFailed, MissingSetting.
    """
    job = job or Job("-")
    model = model or await find_model(body.model)
    try:
        prediction_id = job.partial.prediction_id
        if prediction_id:
            claim_prediction(job, prediction_id)
            prediction = await poll_prediction(Prediction(id=prediction_id, status="starting"))
            prediction = await wait_for_prediction(prediction, job)
        else:
            values = build_model_input(model, body, audio_url)
            prediction = await create_prediction(model, values, job)
            await record_prediction(job)
            await asyncio.sleep(0)  # ends here if the job was cancelled meanwhile
            kind = video_kind(model, values)
            prediction = await wait_for_prediction(prediction, job, kind)
    except ClaimLost:  # another instance may use the prediction
        raise
    except BaseException:
        if job.partial.prediction_id and (job.log is None or job.past_deadline()):
            await cancel_prediction(job.partial.prediction_id)
        raise
    return video_url_or_raise(prediction)


def video_kind(model: VideoModel, values: Mapping[str, Any]) -> str:
    """Return a key for videos that take equally long: model, length and size."""
    names = LENGTH_NAMES + SIZE_NAMES
    return str([model.name, *map(values.get, names)])


def video_url_or_raise(prediction: Prediction) -> str:
    """Return the URL of a finished prediction's video. Raises ProviderRefused, ProviderFailed."""
    if prediction.status != "succeeded":
        reason = prediction.error or "no reason given"
        detail = f"No video was made, the prediction ended as {prediction.status}: {reason}"
        raise ProviderRefused(detail, "replicate", code="prediction_failed")
    if prediction.video_url:
        return prediction.video_url
    if prediction.data_removed:
        raise ProviderRefused(VIDEO_EXPIRED, "replicate", code="video_expired")
    detail = "The prediction succeeded, but Replicate names no video."
    raise ProviderFailed(detail, "replicate", code="prediction_failed", retryable=False)


async def create_prediction(model: VideoModel, values: dict[str, Any], job: Job) -> Prediction:
    """Create the job's prediction at most once; if the response is lost, search for it instead.

    Raises ProviderRefused, ProviderFailed, MissingSetting.
    """
    if job.search_from is not None:
        found = await find_unclaimed_prediction(model, values, job, job.search_from, job.search_s)
        if found:
            return found

    started_at = time.monotonic()
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
        # Without a key no later request can find it, so a cancelled job finds and cancels it now.
        found = None
        limit_s = patience_s(MAX_SEARCH_SHARE)
        with anyio.move_on_after(limit_s, shield=job.log is None):
            found = await search_after_lost_create(model, values, job, started_at)
        if found:
            return found
        raise


async def search_after_lost_create(
    model: VideoModel, values: dict[str, Any], job: Job, started_at: float
) -> Prediction | None:
    """Search for the prediction of a create whose response was lost; a failure is logged."""
    try:
        search_s = patience_s(SEARCH_SHARE)
        return await find_unclaimed_prediction(model, values, job, started_at, search_s)
    except ServiceError as exc:
        logger.warning("the search failed: %s", exc.detail)
        return None


def was_not_created(error: ProviderFailed) -> bool:
    """Return whether a failed create has certainly created nothing."""
    if isinstance(error, ProviderBusy):
        return True
    if error.response:
        return is_rejection(error.response.status)
    return isinstance(error.__cause__, NOT_SENT)


def is_rejection(status: int) -> bool:
    """Return whether Replicate's answer to a create says that nothing was created."""
    return status < 500 and status not in (*SUCCESSES, 408)


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
        for invalid in invalid_fields[:MAX_FIELD_ERRORS]:
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
    """Send the create; Replicate itself ends the prediction JOB_TIMEOUT_SECONDS after it."""
    path = f"models/{model.name}/predictions"
    body: dict[str, Any] = {"input": values}
    if model.version:
        path = "predictions"
        body["version"] = model.version
    cancel_after_s = max(MIN_CANCEL_AFTER_S, round(get_settings().job_timeout_seconds))
    place = LinePlace(app_state().create_line, job)
    create = partial(create_exchange, job, create_key(model, values))
    return await call_replicate(
        "POST",
        path,
        CREATE_RETRY,
        about_content=True,
        headers={"Cancel-After": f"{cancel_after_s}s"},
        json=body,
        timeout=CREATE_TIMEOUT,
        extensions={NEW_CONNECTION: True},
        exchange=partial(exchange_in_line, place, create),
    )


async def create_exchange(
    job: Job, key: str, request: httpx.Request, max_bytes: int
) -> ProviderResponse:
    """Make one attempt to create, and claim what it created. Raises ClaimLost.

    A cancelled job still waits a moment for the response, which alone names the prediction to
    cancel.
    """
    await confirm_claim(job)
    creates = app_state().creates_in_flight
    creates[key] += 1
    try:
        with app_state().video_budget.counting(job.name) as call:
            response = await send_despite_cancellation(request, max_bytes)
            call.is_free = is_rejection(response.status)
        prediction = parse_prediction(response.payload)
        if prediction:
            claim_prediction(job, prediction.id)
        return response
    finally:
        creates[key] -= 1
        if not creates[key]:
            del creates[key]


async def send_despite_cancellation(request: httpx.Request, max_bytes: int) -> ProviderResponse:
    """Send a request, and wait CREATE_GRACE_S for its response also after a cancellation.

    Raises httpx.RequestError, also if the whole response takes longer than MAX_CREATE_S.
    """
    sending = asyncio.create_task(send_once(request, max_bytes))
    try:
        await asyncio.wait([sending], timeout=MAX_CREATE_S)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait([sending], timeout=CREATE_GRACE_S)
    if not sending.done():
        sending.cancel()
        raise httpx.ReadTimeout("the whole response did not come in time")
    return sending.result()


def claim_prediction(job: Job, prediction_id: str) -> None:
    """Log the id of the job's prediction, and keep other jobs of this process from taking it."""
    if job.partial.prediction_id != prediction_id:
        logger.info("prediction_id=%s", prediction_id)
        job.partial.prediction_id = prediction_id
    app_state().claimed_predictions.append((prediction_id, job.name))


async def find_unclaimed_prediction(
    model: VideoModel,
    values: dict[str, Any],
    job: Job,
    since: float,
    search_s: float = 0.0,
) -> Prediction | None:
    """Search for a prediction of this input that no job has claimed, for `search_s` seconds.

    It searches at least once. `since` (monotonic clock): no older prediction is the job's.
    """
    give_up_at = time.monotonic() + search_s
    while True:
        await wait_for_equal_creates(model, values)
        async for listed in predictions_since(since):
            prediction = parse_prediction(listed)
            if prediction is None or is_claimed_by_other(prediction.id, job):
                continue
            if is_prediction_of(listed, model, values):
                claim_prediction(job, prediction.id)  # before any other job searches
                return prediction
        if time.monotonic() >= give_up_at:
            return None
        await asyncio.sleep(patience_s(SEARCH_SHARE) / 10)


def create_key(model: VideoModel, values: Mapping[str, Any]) -> str:
    """Return a key for creates whose predictions cannot be told apart."""
    return json.dumps([model.name, model.version, values], sort_keys=True)


async def wait_for_equal_creates(model: VideoModel, values: Mapping[str, Any]) -> None:
    """Wait while an equal create has no response yet: its prediction belongs to another job."""
    creates = app_state().creates_in_flight
    while creates[create_key(model, values)]:  # noqa: ASYNC110  seldom, and for a moment
        await asyncio.sleep(patience_s(SEARCH_SHARE) / 100)


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


async def predictions_since(since: float) -> AsyncIterator[Any]:
    """Yield the account's predictions since `since` (monotonic clock), the newest first."""
    if app_state().replicate_clock_s is None:  # learned from the response
        await call_replicate("GET", "predictions", LIST_RETRY, max_bytes=MAX_LIST_BYTES)
    age_s = time.monotonic() - since + CLOCK_TOLERANCE_S
    moment = time.time() + (app_state().replicate_clock_s or 0.0) - age_s
    created_after = datetime.fromtimestamp(moment, timezone.utc).isoformat()
    base_url = f"{get_settings().replicate_base_url}/v1/"
    path = "predictions"
    params: dict[str, str] | None = {"created_after": created_after}
    for _ in range(MAX_LIST_PAGES):
        response = await call_replicate(
            "GET", path, LIST_RETRY, params=params, max_bytes=MAX_LIST_BYTES
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
    """Return the prediction as it is now, or unchanged if the response describes none."""
    path = f"predictions/{prediction.id}"
    response = await call_replicate("GET", path, POLL_RETRY, max_bytes=MAX_PREDICTION_BYTES)
    return parse_prediction(response.payload) or prediction


async def wait_for_prediction(
    prediction: Prediction, job: Job, kind: str | None = None
) -> Prediction:
    """Poll a prediction until it has ended, and remember how long videos of its kind take.

    `kind` is None if an earlier request recorded it: how long it takes is then unknown.
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
        remember_duration(kind, time.monotonic() - started_at)
    return prediction


def remember_duration(kind: str, seconds: float) -> None:
    """Remember how long a video took; of too many kinds, the one seen longest ago is forgotten."""
    recent = app_state().recent_durations
    durations = recent.pop(kind, None) or deque(maxlen=RECENT_DURATIONS)
    durations.append(seconds)
    recent[kind] = durations
    if len(recent) > MAX_DURATION_KINDS:
        del recent[next(iter(recent))]


async def cancel_prediction(prediction_id: str) -> None:
    """Cancel a prediction that nobody waits for, also while the job is cancelled.

    A failure is logged.
    """
    path = f"predictions/{prediction_id}/cancel"
    try:
        with anyio.CancelScope(shield=True), anyio.fail_after(patience_s(CANCEL_SHARE)):
            await call_replicate("POST", path, CANCEL_RETRY)
        logger.info("prediction_id=%s cancelled", prediction_id)
    except (ServiceError, TimeoutError) as exc:
        reason = str(exc) or "no answer in time"
        logger.warning("prediction_id=%s not cancelled: %s", prediction_id, reason)


# ---- ffmpeg: muxing and conversion ---------------------------------------------------------------


@lru_cache(maxsize=1)
def ffmpeg_path() -> str:
    """Return imageio-ffmpeg's ffmpeg, or IMAGEIO_FFMPEG_EXE.

    Raises RuntimeError where there is none.
    """
    path = str(imageio_ffmpeg.get_ffmpeg_exe())  # does not check the path in the variable
    found = shutil.which(path)
    if found is None:
        raise RuntimeError(f"There is no ffmpeg at {path}; is IMAGEIO_FFMPEG_EXE right?")
    return os.path.abspath(found)  # ffmpeg is started without a PATH


class VideoFormat(NamedTuple):
    """What a model's file is, read from its first bytes and an MP4's index."""

    name: str  # with its article, for messages
    demuxer: str  # ffmpeg's
    is_plain: bool = False  # H.264 that plays everywhere, in MP4 or MOV: its picture can be copied
    is_ready: bool = False  # an MP4 with its index first and sound that plays everywhere, or none
    has_alpha: bool = False
    decoder: str | None = None  # ffmpeg's, where its usual one has no alpha


# How a file begins, its name and its demuxer; None: it is no video. An MP4 without ftyp is a MOV.
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
        head = file.read(MAX_FORMAT_BYTES)
        file_format = find_video_format(head)
        if file_format.demuxer == "mov":
            check_mp4(video)
            return read_mp4_format(file, file_format)
        if is_cut_off(file, head, file_format.demuxer):
            raise ResourceFailed(CUT_OFF, "replicate", code="media_unusable", retryable=False)
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
    """Return the format of a file by its first bytes alone.

    Raises ResourceFailed if it is no video.
    """
    for pattern, name, demuxer in VIDEO_FORMATS:
        if not re.match(pattern, head, re.DOTALL):
            continue
        if demuxer:
            return VideoFormat(name, demuxer)
        break
    raise ResourceFailed(
        f"The model made {name}, not a video.", "replicate", code="media_unusable", retryable=False
    )


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
    """Return where a Matroska file's segment ends, or 0 if it does not say.

    RFC 8794, element sizes.
    """
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
    """Raise ResourceFailed if a file is no MP4, or cut off: ffmpeg would make a shorter video."""
    first_boxes = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip")  # QuickTime: any
    size = video.stat().st_size
    offset = 0
    with video.open("rb") as file:
        for name, _, end in top_level_boxes(file, size):
            if offset == 0 and name not in first_boxes:
                message = "What the model made is not an MP4 video."
                raise ResourceFailed(message, "replicate", code="media_unusable", retryable=False)
            offset = end
    if offset != size or size == 0:
        raise ResourceFailed(CUT_OFF, "replicate", code="media_unusable", retryable=False)


def top_level_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield an MP4's boxes: name, start of the content, end.

    ISO/IEC 14496-12: 4 bytes length, 4 bytes name; a length of 0 means to the end of the file,
    of 1 that the length follows in 8 bytes.
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
        end = offset + max(header_bytes, length)
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
    """Yield the handler, codec and sample entry (the codec's description) of each track."""
    for media in islice(find_boxes(index, b"trak", b"mdia"), MAX_MP4_TRACKS):
        handler = next(find_boxes(media, b"hdlr"), b"")[8:12]
        table = next(find_boxes(media, b"minf", b"stbl", b"stsd"), b"")
        entries = list(islice(boxes(table[8:]), 2))
        if len(entries) == 1:
            codec, entry = entries[0]
            yield handler, codec, entry
        else:  # the codec changes within the track
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
    # Of the set, after a byte of its type and 3 of profile and level: id, chroma format (1 is
    # 4:2:0), bits of luma and of chroma beyond 8 (ITU-T H.264, 7.3.2.1.1). `avcC` may not
    # repeat them.
    bits = "".join(f"{byte:08b}" for byte in record[12:16])
    return re.match(EXP_GOLOMB + "01011", bits) is not None  # 1 is written 010, and 0 is 1


FFMPEG_OPTIONS = ["-hide_banner", "-nostdin", "-y", "-v", "error", "-filter_threads", "1"]
FFMPEG_OPTIONS += ["-max_alloc", str(FFMPEG_MAX_ALLOC_BYTES)]
# Of each input; its demuxer is forced as well: a playlist named .mp4 is not followed.
INPUT_OPTIONS = ["-protocol_whitelist", "file", "-threads", "1"]
# Of the output. A short video of many bytes would grow without end as it repeats.
OUTPUT_OPTIONS = ["-fs", str(MAX_DOWNLOAD_BYTES + 1), "-movflags", "+faststart", "-f", "mp4"]


def mux_arguments(video: Path, speech: Path, demuxer: str, fit: Fit, final: Path) -> list[str]:
    """Return ffmpeg's arguments: the video copied, the speech half a second in, ended by `fit`."""
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
    # Signal to noise of a voice is 39 dB; with the default coder at 128k 29 dB, for 1.6 times the CPU.
    arguments += ["-c:a", "aac", "-b:a", "96k", "-aac_coder", "fast", "-threads", "1"]
    arguments += ["-af", audio_filter]
    # By default a copied stream may run ten seconds ahead, and would not end with the shortest.
    arguments += ["-shortest", "-shortest_buf_duration", "3600"]
    arguments += [*OUTPUT_OPTIONS, f"file:{final}"]
    return arguments


async def mux_video_audio(video: Path, speech: Path, final: Path, fit: Fit = "shortest") -> None:
    """Put speech (in one of ElevenLabs' formats) and video together.

    Raises ResourceFailed, also after a minute or over 100 MB; OSError.
    """
    await asyncio.to_thread(check_mp4, video)
    demuxer = await asyncio.to_thread(speech_demuxer, speech)
    arguments = mux_arguments(video, speech, demuxer, fit, final)
    async with app_state().ffmpeg_slots:
        await run_ffmpeg(arguments, FFMPEG_TIMEOUT_S, MUX_MAX_BYTES)
    if final.stat().st_size > MAX_DOWNLOAD_BYTES:  # noqa: ASYNC240  ffmpeg has stopped there
        message = "The final video is larger than 100 MB."
        raise ResourceFailed(message, code="media_unusable", retryable=False)


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

    An MP4 or MOV that cannot be converted within the limits is delivered as it came: some players
    play it. Raises ResourceFailed, which names the format, for anything else; OSError.
    """
    arguments = convert_arguments(video, source, target, with_sound)
    try:
        async with app_state().conversion_slot:
            await run_ffmpeg(arguments, CONVERT_TIMEOUT_S, CONVERT_MAX_BYTES, in_background=True)
        if target.stat().st_size > MAX_DOWNLOAD_BYTES:  # noqa: ASYNC240  ffmpeg has stopped there
            raise ResourceFailed(
                "The converted video is larger than 100 MB.", code="media_unusable", retryable=False
            )
    except ResourceFailed as exc:
        if source.demuxer == "mov":
            logger.warning("the video is delivered as it came: %s", exc.detail)
            return video
        message = f"The model made {source.name}, which could not be converted to an MP4 video."
        raise ResourceFailed(
            message, "replicate", code="media_unusable", retryable=exc.retryable
        ) from exc
    return target


async def run_ffmpeg(
    arguments: list[str],
    timeout_s: float,
    max_bytes: int = MUX_MAX_BYTES,
    in_background: bool = False,
) -> None:
    """Run ffmpeg to its end; it is killed and reaped however this call ends.

    Raises ResourceFailed, OSError.
    """
    command = [await asyncio.to_thread(ffmpeg_path), *arguments]
    stderr_tail = b""
    # Without the environment it gets no key; in a session of its own it gets no Ctrl-C.
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
                raise ResourceFailed(message, code="machine_failed") from exc
            raise
    if process.returncode != 0:
        raise_ffmpeg_error(process.returncode, stderr_tail)


def limit_process(pid: int, max_bytes: int, in_background: bool) -> None:
    """Limit the memory of a process with a session of its own, and its priority; on Linux only.

    In the background it gets a tenth of a core that other processes need. With SCHED_IDLE it
    would starve: it may not even get the time to end when it is killed.

    RLIMIT_DATA counts writable memory. RLIMIT_AS would also count ffmpeg's own 170 MB and 64 MB
    that malloc reserves for each thread, so it could not tell a malicious file from a video.
    """
    if sys.platform == "linux":
        with suppress(OSError, ValueError):  # it has ended already, or has a lower limit
            resource.prlimit(pid, resource.RLIMIT_DATA, (max_bytes, max_bytes))
        if in_background:
            with suppress(OSError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.setpriority(os.PRIO_PROCESS, int(thread), BACKGROUND_NICENESS)
                # Outside of a container the scheduler may weigh whole sessions (autogroup).
                autogroup = Path(f"/proc/{pid}/autogroup")
                autogroup.write_text(str(BACKGROUND_NICENESS), encoding="ascii")


def raise_ffmpeg_error(returncode: int | None, stderr_tail: bytes) -> None:
    """Log how ffmpeg failed, and raise ResourceFailed, or OSError if the disk is full."""
    lines = stderr_tail.decode("utf-8", "replace").split("\n")
    output = " | ".join(lines).strip(" |")
    logger.warning("ffmpeg ended with %s: %s", returncode, output)
    if os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = "Video and speech could not be put together; ffmpeg cannot use one of them."
    raise ResourceFailed(message, code="media_unusable", retryable=False)


def mp4_seconds(video: Path) -> float | None:
    """Return how long an MP4 plays, as its movie header says.

    None if it does not (ISO/IEC 14496-12).
    """
    with video.open("rb") as file:
        for name, start, end in top_level_boxes(file, video.stat().st_size):
            if name != b"moov":
                continue
            file.seek(start)
            index = file.read(min(end - start, MAX_MP4_INDEX_BYTES))
            header = next(find_boxes(index, b"mvhd"), b"")
            return movie_header_seconds(header.ljust(32, b"\0"))
    return None


def movie_header_seconds(header: bytes) -> float | None:
    """Return the duration in the content of an `mvhd` box.

    None if it is unknown, as in fragmented files.
    """
    if header[0] == 1:  # version 1 has the long form
        timescale, duration = struct.unpack_from(">IQ", header, 20)
        unknown = 2**64 - 1
    else:
        timescale, duration = struct.unpack_from(">II", header, 12)
        unknown = 2**32 - 1
    if timescale == 0 or duration in (0, unknown):
        return None
    return float(round(duration / timescale, 2))


# ---- Application: lifespan, middleware, error handlers -------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the shared state for the life of the process; at its end, wait for the running jobs."""
    global _state
    configure_logging()
    warn_about_missing_settings()
    raise_descriptor_limit()
    await asyncio.to_thread(ffmpeg_path)  # fails here rather than after a video was paid for
    with hangup_as_termination():
        async with open_app_state() as state:
            _state = state
            try:
                yield
            finally:
                await drain_jobs(state)
                _state = None


def configure_logging() -> None:
    """Log to stderr, unless logging is set up already."""
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("asyncio").addFilter(log_accept_errors_seldom)


last_accept_error_at = -math.inf


def log_accept_errors_seldom(record: logging.LogRecord) -> bool:
    """Pass one line in ACCEPT_LOG_S about connections that cannot be accepted.

    asyncio writes thousands.
    """
    global last_accept_error_at
    if not str(record.msg).startswith("socket.accept() out of system resource"):
        return True
    now = time.monotonic()
    if now - last_accept_error_at < ACCEPT_LOG_S:
        return False
    last_accept_error_at = now
    return True


def raise_descriptor_limit() -> None:
    """Raise the soft limit of file descriptors to the hard one; each job takes a few."""
    if resource is None:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, MACOS_DESCRIPTORS):
        if soft == wanted:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return
        except (OSError, ValueError):
            continue
    logger.warning("the limit of %d file descriptors could not be raised", soft)


@contextmanager
def hangup_as_termination() -> Iterator[None]:
    """Turn SIGHUP (the terminal is closed) into SIGTERM, unless it is ignored (nohup)."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    is_main = threading.current_thread() is threading.main_thread()
    if hangup is None or not is_main or signal.getsignal(hangup) != signal.SIG_DFL:
        yield
        return
    signal.signal(hangup, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(hangup, signal.SIG_DFL)


def warn_about_missing_settings() -> None:
    """Log one warning for missing keys, and one for a missing SERVICE_TOKEN."""
    settings = get_settings()
    missing = [name.upper() for name in SPEECH_JOB_SETTINGS if getattr(settings, name) is None]
    if missing:
        names = ", ".join(missing)
        logger.warning("not set: %s; requests that need them are answered 500", names)
    if settings.service_token is None and (settings.eleven_api_key or settings.replicate_api_token):
        logger.warning("SERVICE_TOKEN is not set: whoever reaches this service spends its money")


async def drain_jobs(state: AppState) -> None:
    """Graceful shutdown: cancel the jobs that still run, those with a key after a while.

    uvicorn has just cancelled the open requests, and with them their jobs. Jobs with a key that
    no request waits for still run; what they leave unfinished, the next request resumes.
    """
    started_at = time.monotonic()
    drain_s = min(patience_s(DRAIN_SHARE), MAX_DRAIN_S)
    while state.open_requests or state.jobs:
        elapsed_s = time.monotonic() - started_at
        if elapsed_s >= SHUTDOWN_WAIT_S:
            logger.warning("%d jobs did not end in time", len(state.jobs))
            return
        for job in state.jobs.values():
            if job.log is None or elapsed_s > drain_s:
                job.cancel("shutdown")
        await asyncio.sleep(0.05)


@dataclass(frozen=True)
class RequestMiddleware:
    """The outermost layer: a request id, and the headers X-Request-ID and Server-Timing."""

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
            """Pass a message on, with the headers added to the start of the response."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                job = request_state.get("job")  # set by start_job: the job, or the one it joined
                if job and job.timings:
                    headers["Server-Timing"] = server_timing(job.timings, job.queued_s)
            await send(message)

        state = app_state()
        state.open_requests += 1
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            state.open_requests -= 1


def server_timing(timings: Mapping[Stage, float], queued_s: float = 0.0) -> str:
    """Return the milliseconds of each stage, and in line, as a Server-Timing header."""
    entries = [f"{name};dur={seconds * 1000:.1f}" for name, seconds in timings.items()]
    if queued_s:
        entries.append(f"queued;dur={queued_s * 1000:.1f}")
    return ", ".join(entries)


@dataclass(frozen=True)
class ErrorMiddleware:
    """Answers unforeseen errors inside CORS: browsers could not read Starlette's own answer."""

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


class BodyTooLarge(HTTPException):
    """A request's body has more than MAX_REQUEST_BYTES; `start` is what was read of it."""

    def __init__(self, start: bytes) -> None:
        super().__init__(400, f"The request's body is larger than {MAX_REQUEST_BYTES // 1024} KiB")
        self.start = start

    def as_service_error(self) -> ServiceError:
        """Return the error for the client; most often the picture itself is in the body."""
        embedded = EMBEDDED_PICTURE.search(self.start)
        if embedded:
            name = embedded[1].decode()
            return invalid_field(name, UPLOAD_FIRST, code="upload_first")
        return InvalidInput(f"{self.detail}.", code="body_too_large")


PICTURE_NAMES = "|".join(["image_?url", *OTHER_NAMES["image_url"].split()])
EMBEDDED_PICTURE = re.compile(rf'"({PICTURE_NAMES})"\s*:\s*"\s*data:'.encode(), re.IGNORECASE)


@dataclass(frozen=True)
class BodyLimitMiddleware:
    """Refuses request bodies over MAX_REQUEST_BYTES, of which little more than that is read."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, counting its body. Raises BodyTooLarge where the body is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        stated = Headers(scope=scope).get("content-length", "")
        received = bytearray()
        is_complete = False
        give_up_at = time.monotonic() + BODY_TIMEOUT_S

        async def receive_with_limit() -> Message:
            """Receive a message, and refuse what passes the limit of bytes or of time."""
            nonlocal is_complete
            if is_complete:  # only the client's disconnect can follow
                return await receive()
            if stated.isdecimal() and int(stated) > MAX_REQUEST_BYTES:
                await receive_start(receive, received)
                raise BodyTooLarge(bytes(received))
            with anyio.move_on_after(give_up_at - time.monotonic()) as scope:
                message = await receive()
            if scope.cancelled_caught:
                detail = f"The body did not come in within {BODY_TIMEOUT_S:g} s"
                raise HTTPException(400, detail, {"Connection": "close"})
            is_complete = not message.get("more_body")
            received.extend(message.get("body", b""))
            if len(received) > MAX_REQUEST_BYTES:
                raise BodyTooLarge(bytes(received))
            return message

        await self.app(scope, receive_with_limit, send)


async def receive_start(receive: Receive, received: bytearray) -> None:
    """Receive the start of a body that is too large, until it shows an embedded picture."""
    with anyio.move_on_after(BODY_START_S):
        while len(received) <= MAX_REQUEST_BYTES:
            unsearched = max(0, len(received) - MAX_NAME_CHARS)
            message = await receive()
            received.extend(message.get("body", b""))
            if not message.get("more_body") or EMBEDDED_PICTURE.search(received, unsearched):
                return


@dataclass(frozen=True)
class TokenMiddleware:
    """Refuses all but reads and preflights without a token of SERVICE_TOKEN, unread."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; GET (/health, /docs), HEAD and preflights need no token."""
        tokens = get_settings().tokens()
        is_open = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if is_open or not tokens or has_token(Headers(scope=scope), tokens):
            await self.app(scope, receive, send)
            return
        error = Unauthorized("The request needs a valid token: Authorization: Bearer ...")
        response = error_response(Request(scope), error)
        await response(scope, receive, send)


def has_token(headers: Headers, tokens: Collection[str]) -> bool:
    """Return whether a request has one of these bearer tokens (RFC 6750), in constant time."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    given = credentials.strip().encode("utf-8")
    matches = [hmac.compare_digest(given, token.encode()) for token in tokens]
    return scheme.lower() == "bearer" and any(matches)


def error_response(
    request: Request, error: ServiceError, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the response for an error."""
    job = getattr(request.state, "job", None)
    body = error_body(error, request.state.request_id, job)
    return JSONResponse(body, error.http_status, {**error.headers, **(headers or {})})


async def handle_service_error(request: Request, exc: ServiceError) -> Response:
    """Answer a ServiceError; a missing setting is logged here if no job has begun."""
    job = getattr(request.state, "job", None)
    if isinstance(exc, MissingSetting) and (job is None or job.task is None):
        logger.warning("code=%s detail=%s", exc.code, exc.detail)
    return error_response(request, exc)


# Our code and message for each of Pydantic's error types; an empty message keeps Pydantic's.
VALIDATION_ERRORS: dict[str, tuple[FieldErrorCode, str]] = {
    "json_invalid": ("invalid_body", "is not valid JSON"),
    "dict_type": ("invalid_body", "must be a JSON object"),
    "model_type": ("invalid_body", "must be a JSON object"),
    "model_attributes_type": ("invalid_body", "must be a JSON object"),
    "missing": ("required", "is required"),
    "string_type": ("not_a_string", "must be a string"),
    "string_unicode": ("not_a_string", ""),
    "string_too_short": ("blank", "must not be blank"),
    "string_too_long": ("too_long", "must have at most {max_length} characters"),
    "string_pattern_mismatch": ("wrong_format", ""),
    "int_type": ("not_a_whole_number", "must be a whole number"),
    "greater_than_equal": ("too_small", "must be at least {ge}"),
    "less_than_equal": ("too_large", "must be at most {le}"),
    "literal_error": ("not_allowed", "must be {expected}"),
    "value_error": ("not_a_url", ""),  # of check_http_url
    "embedded_file": ("upload_first", ""),
}


def as_input_error(error: Mapping[str, Any]) -> InputError:
    """Return a validation error of Pydantic's with our code, message and params."""
    context = error.get("ctx", {})
    code, message = VALIDATION_ERRORS.get(error["type"], ("wrong_format", ""))
    message = message.format(**context) or str(error["msg"]).removeprefix("Value error, ")
    params: ErrorParams = {}
    if code == "too_long":
        params = {"max": context["max_length"], "got": len(error["input"])}
    elif code == "too_small":
        params = {"min": context["ge"]}
    elif code == "too_large":
        params = {"max": context["le"]}
    elif code == "not_allowed":
        params = {"allowed": re.findall("'(.*?)'", context["expected"])}
    elif context.get("pattern") in PATTERN_FORMATS:
        format_name, message = PATTERN_FORMATS[context["pattern"]]
        params = {"format": format_name}
    return InputError(loc=list(error["loc"]), msg=message, code=code, params=params)


async def handle_validation_error(request: Request, exc: RequestValidationError) -> Response:
    """Answer a body or header that is not as the route expects it."""
    errors = [as_input_error(error) for error in exc.errors()]
    names = [part for part in errors[0].loc[1:] if isinstance(part, str)]
    name = ".".join(names)

    code: ErrorCode = "invalid_field"
    detail = f"{name}: {errors[0].msg}."
    content_type = request.headers.get("content-type", "")
    if not re.match(r"application/([\w.-]+\+)?json\b", content_type, re.IGNORECASE):
        code = "invalid_body"
        detail = "The body must be JSON, sent with Content-Type: application/json."
    elif not name:
        code = "invalid_body"
        detail = f"The body {errors[0].msg}."
    return error_response(request, InvalidInput(detail, code=code, errors=errors))


async def handle_http_error(request: Request, exc: HTTPException) -> Response:
    """Answer what the framework refuses: a route (404), a method (405) or a body (400)."""
    if isinstance(exc, BodyTooLarge):
        error = exc.as_service_error()
    elif exc.status_code == 404:
        error = InvalidInput(
            "There is no such route; /docs lists them all.", code="route_not_found"
        )
    else:
        code: ErrorCode = "method_not_allowed" if exc.status_code == 405 else "invalid_body"
        error = InvalidInput(f"{exc.detail}.", code=code)
    error.http_status = exc.status_code
    return error_response(request, error, exc.headers)


app = FastAPI(
    title="Talking Pet",
    summary="A photo of a pet and a line of text go in, a video in which the pet says it comes out.",
    lifespan=lifespan,
    redirect_slashes=False,  # behind a proxy a 307 would name http://
    generate_unique_id_function=lambda route: route.name,
)
app.add_exception_handler(ServiceError, handle_service_error)  # type: ignore[arg-type]
app.add_exception_handler(RequestValidationError, handle_validation_error)  # type: ignore[arg-type]
app.add_exception_handler(HTTPException, handle_http_error)  # type: ignore[arg-type]
# The last one added is the outermost.
app.add_middleware(BodyLimitMiddleware)
app.add_middleware(ErrorMiddleware)
app.add_middleware(TokenMiddleware)
app.add_middleware(
    CORSMiddleware,
    allow_origins=get_settings().allowed_origin.split(","),
    allow_methods=["GET", "POST"],
    allow_headers=["*"],
    expose_headers=["X-Request-ID", "Server-Timing", "Idempotency-Replayed", "Retry-After"],
)
app.add_middleware(RequestMiddleware)


# ---- Idempotency: the job log --------------------------------------------------------------------
#
# A job with an Idempotency-Key keeps a log in the bucket: jobs/<HMAC of the key>/0001.json,
# 0002.json ... An entry holds enough to resume and no user input. It is written once, never
# overwritten: uploaded under a name of its own and moved to its number, which succeeds for
# exactly one caller (see write_once). Within a process, requests with one key join one Job
# (AppState.jobs). Otherwise the last entry decides:
#
#   last entry                        a request with this key
#   --------------------------------  -----------------------------------------------------------------
#   none                              is checked, then writes a claim of what it pays for first
#   claim, its owner at work          waits for the next entry
#   claim, silent for LEASE_SHARE     takes over: writes the next entry, a claim of its own, and searches
#     or given up (owner is empty)      for a prediction that nobody recorded before it creates one
#   prediction                        resumes: polls it (several instances may)
#   result                            is answered with it
#   refusal                           is refused with it
#
# Speech and video are each preceded by a claim. An instance that finds the next number taken by
# another owner has lost the job (ClaimLost) and follows the log. So one speech and one video are
# paid for, and two instances that finish both answer with the first result.

KEY_REUSED = "belongs to a request with another body; a new job needs a new key"
Payment = Literal["speech", "video"]
HexId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class ClaimLost(Exception):
    """Another instance has written the job's next entry."""


class Refusal(BaseModel):
    """An error that ended a job for good, after it had paid."""

    http_status: Literal[400, 500]
    category: Category
    code: ErrorCode = "internal"
    provider: Provider | None
    detail: Annotated[str, Field(max_length=1_000)]

    def as_error(self) -> ServiceError:
        """Return the same error again."""
        error = ServiceError(self.detail, self.provider, code=self.code, retryable=False)
        error.http_status = self.http_status
        error.category = self.category
        return error


class JobEntry(BaseModel):
    """One entry of a job's log: all that is known of the job so far."""

    entry_id: HexId
    owner: HexId | Literal[""]  # JobLog.owner; empty: the job was given up
    request_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    claim: Payment | None = None  # what its owner is about to pay for
    partial: PartialResult = PartialResult()
    result: SpeechResult | VideoResult | None = None
    refusal: Refusal | None = None

    @model_validator(mode="after")
    def check_contents(self) -> "JobEntry":
        """Raise ValueError for a bad URL or id: the bucket is trusted no more than a request."""
        values = self.partial.model_dump(exclude_none=True)
        if self.result:
            values.update(self.result.model_dump(exclude_none=True))
        for name, value in values.items():
            if name.endswith("_url"):
                check_http_url(value)
        if not re.fullmatch(PREDICTION_ID_PATTERN, values.get("prediction_id", "-")):
            raise ValueError("is not a prediction id")
        return self

    def can_resume(self) -> bool:
        """Return whether nothing is left to be paid for."""
        return bool(self.result or self.refusal or self.partial.prediction_id)

    def is_unused(self) -> bool:
        """Return whether the job was given up before it paid for anything."""
        may_have_paid = self.claim or self.partial.audio_url or self.can_resume()
        return self.owner == "" and not may_have_paid


@dataclass
class JobLog:
    """What a job knows of the log of its idempotency key."""

    folder: str  # jobs/<HMAC of the key>
    request_digest: str
    legacy_digest: str  # as earlier versions computed it
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    number: int = 0  # of the last known entry
    entry: JobEntry | None = None  # the last known one
    written_at: float = 0.0  # time.monotonic() before our own last entry was written
    is_lost: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def owns_claim(self) -> bool:
        """Return whether the last entry is a claim of this job."""
        return bool(self.entry and self.entry.claim and self.entry.owner == self.owner)

    def is_refused(self) -> bool:
        """Return whether the last entry says that the job has ended for good without a result."""
        return bool(self.entry and self.entry.refusal)


def keyed_digest(text: str) -> str:
    """Return the HMAC-SHA-256 of a text under the service role key. Raises MissingSetting."""
    key = get_settings().required("supabase_service_role")
    return hmac.new(key.encode(), text.encode(), "sha256").hexdigest()


def new_log(route: str, body: BaseModel, key: str) -> JobLog:
    """Return the log of a request's idempotency key. Raises MissingSetting.

    The bucket is public; the name of the log's folder cannot be guessed.
    """
    require_settings(VIDEO_JOB_SETTINGS + STORAGE_SETTINGS)
    if isinstance(body, JobPromptTTS):
        require_settings(SPEECH_JOB_SETTINGS)
    request = json.dumps([route, body.model_dump()], sort_keys=True)
    legacy_request = json.dumps([route, body.model_dump(exclude_unset=True)], sort_keys=True)
    return JobLog(
        folder=f"jobs/{keyed_digest(key)}",
        request_digest=keyed_digest(request),
        legacy_digest=keyed_digest(legacy_request),
    )


async def read_file(path: str, retry: RetryPolicy) -> bytes | None:
    """Return a file of the bucket, None if it does not exist. Raises ResourceFailed."""
    url = storage_url(path, "authenticated/")
    try:
        response = await call_provider(
            "supabase", "GET", url, retry, headers=storage_headers(), timeout=ENTRY_TIMEOUT
        )
    except ResourceFailed as exc:
        if exc.response and exc.response.effective_status == 404:
            return None
        raise
    return response.body


async def read_entry(path: str) -> JobEntry | None:
    """Return an entry of a log, or None if it does not exist. Raises ResourceFailed."""
    content = await read_file(path, ENTRY_RETRY)
    if content is None:
        return None
    try:
        return JobEntry.model_validate_json(content)
    except ValidationError as exc:
        message = f"The file {path} in the bucket is not one of this service's; remove it."
        raise ResourceFailed(message, "supabase", retryable=False) from exc


class LogPosition(NamedTuple):
    """The number of a log's last entry, and the ages of it and the first by the storage's clock."""

    number: int  # 0: there is none
    age_s: float
    first_age_s: float


async def find_last_entry(folder: str) -> LogPosition:
    """Return the position of a log's last entry. Raises ResourceFailed."""
    settings = get_settings()
    base_url = settings.required("supabase_url")
    response = await call_provider(
        "supabase",
        "POST",
        f"{base_url}/storage/v1/object/list/{settings.supabase_bucket}",
        LIST_ENTRIES_RETRY,
        headers=storage_headers(),
        json={"prefix": folder, "limit": MAX_LOG_ENTRIES},
        timeout=ENTRY_TIMEOUT,
    )
    now = parse_http_date(response.headers.get("date"))
    if not isinstance(response.payload, list):  # taken for an empty log, it would pay again
        raise ResourceFailed("Supabase Storage answered without a list of files.", "supabase")
    ages_s: dict[int, float] = {}
    for item in response.payload:
        match = re.fullmatch(r"(\d{4})\.json", str(get_in(item, "name")))
        if match:
            ages_s[int(match[1])] = age_of(get_in(item, "created_at"), now)
    if not ages_s:
        return LogPosition(0, 0.0, 0.0)
    last = max(ages_s)
    return LogPosition(last, ages_s[last], ages_s[min(ages_s)])


def age_of(created_at: Any, now: float | None) -> float:
    """Return the seconds since an ISO date; 0 if either is unknown.

    An entry that counts as young is waited for, not taken over: the safe side.
    """
    with suppress(ValueError):
        created = datetime.fromisoformat(str(created_at).replace("Z", "+00:00"))
        if now is not None and created.tzinfo:
            return max(0.0, now - created.timestamp())
    return 0.0


async def write_once(path: str, entry: JobEntry, retry: RetryPolicy) -> JobEntry:
    """Write an entry unless the path exists; return the entry that is there. Raises ResourceFailed.

    Of several moves to one path exactly one succeeds. If ours does not, the path is read: a move
    whose response was lost is refused when it is repeated, although it succeeded.
    """
    settings = get_settings()
    source = f"jobs/new/{entry.entry_id}.json"
    content = entry.model_dump_json(exclude_none=True).encode()
    await supabase_upload(source, content, "application/json", retry, timeout=ENTRY_TIMEOUT)
    try:
        await call_provider(
            "supabase",
            "POST",
            f"{settings.required('supabase_url')}/storage/v1/object/move",
            retry,
            headers=storage_headers(),
            json={
                "bucketId": settings.supabase_bucket,
                "sourceKey": source,
                "destinationKey": path,
            },
            timeout=ENTRY_TIMEOUT,
        )
    except ResourceFailed:
        existing = await read_entry(path)
        if existing is None:
            raise
        return existing
    return entry


async def write_entry(
    job: Job, retry: RetryPolicy = UPLOAD_RETRY, *, given_up: bool = False, **contents: Any
) -> None:
    """Write the next entry of a job with a key. Raises ClaimLost if another has, ResourceFailed."""
    assert job.log is not None
    async with job.log.lock:
        await write_next_entry(job, job.log, retry, given_up, **contents)


async def write_next_entry(
    job: Job, log: JobLog, retry: RetryPolicy, given_up: bool = False, **contents: Any
) -> None:
    """Write the next entry as write_entry does; the caller holds the log's lock."""
    while not log.is_lost:
        entry = JobEntry(
            entry_id=uuid.uuid4().hex,
            owner="" if given_up else log.owner,
            request_digest=log.request_digest,
            partial=job.partial,
            **contents,
        )
        started_at = time.monotonic()
        existing = await write_once(f"{log.folder}/{log.number + 1:04}.json", entry, retry)
        log.number += 1
        log.entry = existing
        if existing.entry_id == entry.entry_id:
            log.written_at = started_at
            return
        # The entry may be our own: an earlier write whose response was lost.
        log.is_lost = existing.owner != log.owner
    raise ClaimLost


async def claim(job: Job, payment: Payment) -> None:
    """Write the claim of what is paid for next; a job without a key needs none.

    Raises ClaimLost, ResourceFailed.
    """
    if job.log:
        await write_entry(job, claim=payment)


async def confirm_claim(job: Job) -> None:
    """Renew a claim that has become old, just before paying. Raises ClaimLost if it is not ours."""
    log = job.log
    if log is None:
        return
    while log.owns_claim():
        if time.monotonic() - log.written_at <= patience_s(LEASE_SHARE) / 2:
            return
        await renew_claim(job, log)
    raise ClaimLost


async def renew_claim(job: Job, log: JobLog) -> None:
    """Write the job's claim once more, if it still holds one. Raises as write_entry."""
    async with log.lock:
        if log.entry and log.owns_claim():
            await write_next_entry(job, log, UPLOAD_RETRY, claim=log.entry.claim)


async def renew_claims(job: Job) -> None:
    """Renew the job's claim at intervals, so that other instances see that it works."""
    log = job.log
    assert log is not None
    while not log.is_lost and log.number < MAX_LOG_ENTRIES / 2:
        await asyncio.sleep(patience_s(LEASE_SHARE) / 3)
        try:
            await renew_claim(job, log)
        except ClaimLost:
            return  # the job's next write raises it, too
        except ServiceError as exc:
            logger.warning("the job's claim was not renewed: %s", exc.detail)


async def record_prediction(job: Job) -> None:
    """Write the id of a new prediction, also if the job is being cancelled. Raises ClaimLost."""
    if job.log is None:
        return
    with anyio.move_on_after(patience_s(MAX_WAIT_SHARE), shield=True):
        try:
            await write_entry(job)
        except ServiceError as exc:
            logger.warning("the prediction was not recorded: %s", exc.detail)


async def follow_log(job: Job) -> JobEntry | None:
    """Wait until no other instance is at work, then return the last entry; None: there is none.

    What it says is taken over into the job. Raises InvalidInput if the key belongs to another
    body, ResourceFailed.
    """
    log = job.log
    assert log is not None
    seen_at = time.monotonic()
    while True:
        position = await find_last_entry(log.folder)
        if position.number == 0:
            position = await read_legacy_record(log)
        elif position.number != log.number or log.entry is None:
            path = f"{log.folder}/{position.number:04}.json"
            log.entry = await read_entry(path)
            if log.entry is None:  # listed but missing: something may have been paid for
                raise ResourceFailed(f"The file {path} in the bucket is missing.", "supabase")
            log.number = position.number
            seen_at = time.monotonic()
        if log.entry is None:
            return None

        check_same_body(log, log.entry)
        silent_s = max(position.age_s, time.monotonic() - seen_at)
        is_at_work = log.entry.owner not in ("", log.owner)
        if log.entry.can_resume() or not is_at_work or silent_s >= patience_s(LEASE_SHARE):
            log.is_lost = False
            if log.entry.claim == "video":  # its owner may have created a prediction
                job.search_from = time.monotonic() - position.first_age_s
                job.search_s = max(0.0, patience_s(SEARCH_SHARE) - position.age_s)
            job.partial = log.entry.partial.model_copy()
            return expire_video_result(log.entry, position.age_s)
        await asyncio.sleep(patience_s(LEASE_SHARE) / 30)


def key_reused() -> InvalidInput:
    """Return the error for an idempotency key that belongs to another body."""
    return invalid_field("Idempotency-Key", KEY_REUSED, "header", code="key_reused")


def check_same_body(log: JobLog, entry: JobEntry) -> None:
    """Raise InvalidInput if the key has another body, unless that job gave up before it paid."""
    if entry.request_digest != log.request_digest and not entry.is_unused():
        raise key_reused()


def expire_video_result(entry: JobEntry, age_s: float) -> JobEntry:
    """Return the entry, with the result of a silent video as a refusal once its URL has expired."""
    if isinstance(entry.result, VideoResult) and age_s >= VIDEO_URL_LIFETIME_S:
        refusal = Refusal(
            http_status=400,
            category="provider",
            code="video_expired",
            provider="replicate",
            detail=VIDEO_EXPIRED,
        )
        return entry.model_copy(update={"result": None, "refusal": refusal})
    return entry


async def run_idempotent(job: Job, work: Callable[[], Awaitable[BaseModel]]) -> BaseModel:
    """Answer a job with a key from its log if it is done; else begin, resume or take over.

    If another instance takes it over, wait for that one's result.
    """
    ours: str | None = None  # a prediction that this job created before it lost its claim
    while True:
        entry = await follow_log(job)
        theirs = job.partial.prediction_id
        if ours and theirs and ours != theirs:
            await cancel_prediction(ours)
            ours = None
        if entry and entry.refusal:
            raise entry.refusal.as_error()
        if entry and entry.result:
            job.replayed = not job.timings
            return entry.result
        with suppress(ClaimLost):
            return await run_and_record(job, work)
        logger.info("another instance has taken the job over")
        ours = job.partial.prediction_id or ours


async def run_and_record(job: Job, work: Callable[[], Awaitable[BaseModel]]) -> BaseModel:
    """Run a job's work, renew its claims, and write how it ended.

    Raises ClaimLost, and what `work` raises.
    """
    renewal = asyncio.create_task(renew_claims(job))
    try:
        result = await work()
    except ClaimLost:
        raise
    except Exception as exc:  # noqa: BLE001  whatever happened, the claim is given up
        error = as_service_error(exc)
        await record_end(job, error)
        raise error from None
    except asyncio.CancelledError:
        await record_end(job, job.cancellation_error())
        raise
    finally:
        renewal.cancel()

    # A result counts even after the deadline, but only once it is in the log, which decides.
    with anyio.move_on_after(MAX_RESULT_WRITE_S, shield=True):
        await write_entry(job, PAID_UPLOAD_RETRY, result=result)
        return result
    raise ResourceFailed(
        "The result could not be recorded; send the same request again.", "supabase"
    )


async def record_end(job: Job, error: ServiceError) -> None:
    """Write that a job was refused for good, or that it gives its claim up.

    Then no other instance waits for it.
    """
    log = job.log
    # A rejected key or plan is not final: the owner can change it, and the video is paid for.
    may_be_final = error.http_status == 400 or job.past_deadline()
    is_refused = may_be_final and not error.retryable and error.category == "provider"
    is_final = job.partial.prediction_id and is_refused
    if log is None or not (is_final or log.owns_claim()):
        return
    with anyio.move_on_after(MAX_RECORD_SAVE_S, shield=True):
        try:
            if is_final:
                refusal = Refusal.model_validate(error, from_attributes=True)
                await write_entry(job, refusal=refusal)
            else:
                await write_entry(job, given_up=True, claim=open_claim(job, error))
        except ServiceError as exc:
            logger.warning("the end of the job was not recorded: %s", exc.detail)


def open_claim(job: Job, error: ServiceError) -> Payment | None:
    """Return the claim if it may have been paid for; None if certainly not."""
    if job.log is None or job.log.entry is None:
        return None
    did_nothing = error.http_status == 400
    if isinstance(error, ProviderFailed):
        did_nothing = was_not_created(error)
    if did_nothing and job.search_from is None:  # else an earlier owner may have paid
        return None
    return job.log.entry.claim


class LegacyRecord(BaseModel):
    """The one file that earlier versions kept of a job: jobs/<HMAC of the key>.json."""

    body: str
    written: float
    writer: HexId | Literal[""]
    partial: PartialResult = PartialResult()
    answer: SpeechResult | VideoResult | None = None


async def read_legacy_record(log: JobLog) -> LogPosition:
    """Read an earlier version's record as if it were the last entry of a log."""
    content = await read_file(f"{log.folder}.json", UPLOAD_RETRY)
    if content is None:
        return LogPosition(0, 0.0, 0.0)
    try:
        record = LegacyRecord.model_validate_json(content)
        digest = log.request_digest if record.body == log.legacy_digest else record.body
        log.entry = JobEntry(
            entry_id=uuid.uuid4().hex,
            owner=record.writer,
            request_digest=digest,
            claim="video",
            partial=record.partial,
            result=record.answer,
        )
    except ValidationError as exc:
        message = f"The file {log.folder}.json is not one of this service's; remove it."
        raise ResourceFailed(message, "supabase", retryable=False) from exc
    age_s = abs(time.time() - record.written)
    return LogPosition(0, age_s, age_s + get_settings().job_timeout_seconds)


# ---- Job runner: deadline, disconnects, JSON and SSE ---------------------------------------------

Body = TypeVar("Body", bound=JobPromptOnly)
Work = Callable[[Body, Job], Awaitable[BaseModel]]


async def answer_job(request: Request, body: Body, key: str | None, work: Work[Body]) -> Response:
    """Run a job, or join the running one with this key; answer with JSON or an event stream."""
    job = start_job(request, body, key, work)
    events = job.subscribe()
    # Starlette does not cancel a plain handler when its client disconnects.
    watcher = asyncio.create_task(watch_disconnect(request, job, events))
    assert job.task is not None
    end_with_job(watcher, job.task)
    if prefers_event_stream(request.headers.get("accept", "")):
        return await stream_job(job, events)
    return await wait_for_job(job, events)


def end_with_job(watcher: asyncio.Task[None], job_task: asyncio.Task[None]) -> None:
    """Cancel a client's watcher when the job ends.

    A watcher that ends first is forgotten at once.
    """

    def cancel_watcher(_: object) -> None:
        watcher.cancel()

    def forget_watcher(_: object) -> None:
        job_task.remove_done_callback(cancel_watcher)

    job_task.add_done_callback(cancel_watcher)
    watcher.add_done_callback(forget_watcher)


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
    """Return the job's event stream.

    Raises its ServiceError if it failed before the first event.
    """
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
    """Return the header Idempotency-Replayed if the job is a replay (see Job.replayed)."""
    return {"Idempotency-Replayed": "true"} if job.replayed else {}


def prefers_event_stream(accept: str) -> bool:
    """Return whether an Accept header names an event stream, with a quality no lower than JSON's.

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
    """Return a new job, or the one that runs with the same key.

    Raises InvalidInput, MissingSetting.
    """
    job = Job(request.state.request_id)
    request.state.job = job
    state = app_state()
    if key is None:
        coro = work(body, job)
    else:
        job.log = new_log(request.url.path, body, key)
        job.name = job.log.folder
        running = state.jobs.get(job.name)
        if running and running.log:
            if running.log.request_digest != job.log.request_digest:
                raise key_reused()
            logger.info("joins the job of request_id=%s", running.request_id)
            request.state.job = running
            return running
        coro = run_idempotent(job, lambda: work(body, job))
    state.jobs[job.name] = job
    job.task = asyncio.create_task(run_job(job, coro))
    return job


async def run_job(job: Job, coro: Awaitable[BaseModel]) -> None:
    """Run a job to its end, in a task of its own, and set its result or error."""
    try:
        with job.scope, anyio.move_on_after(get_settings().job_timeout_seconds):
            job.result = await coro
    except Exception as exc:  # noqa: BLE001  whatever happened is answered
        job.result = as_service_error(exc)
    finally:
        if job.result is None:
            job.result = job.cancellation_error()
            if job.log and not job.log.is_refused():  # another instance may succeed, or has
                job.result.retryable = True
        app_state().jobs.pop(job.name, None)  # later requests find its log only
        app_state().video_budget.release(job.name)
        job.finish()


async def watch_disconnect(request: Request, job: Job, events: Events) -> None:
    """On disconnect, cancel the job; with a key it continues and only this client's events end."""
    message = await request.receive()
    while message["type"] != "http.disconnect":
        message = await request.receive()
    if job.log:
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
    """Yield every stage event, comments in between, then exactly one `result` or `error`."""
    chunk = first_chunk
    while chunk is not None:
        yield chunk
        chunk = await next_sse_chunk(job, events)
    job.unsubscribe(events)

    if isinstance(job.result, ServiceError):
        body = error_body(job.result, current_request_id.get(), job)
        body["status"] = job.result.http_status
        data = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        yield format_sse_event(event="error", data_str=data)
    elif job.result:
        yield format_sse_event(event="result", data_str=job.result.model_dump_json())


async def next_sse_chunk(job: Job, events: Events) -> bytes | None:
    """Return the next stage event, or a comment after KEEPALIVE_SECONDS.

    None after the last event.
    """
    try:
        with anyio.move_on_after(get_settings().keepalive_seconds):
            event = await events.get()
            if event is None:
                return None
            data = event.model_dump_json(exclude_none=True)
            return format_sse_event(event="stage", data_str=data)
    except asyncio.CancelledError:
        # uvicorn cancels open requests at shutdown; the client still gets the job's outcome.
        job.cancel("shutdown")
    return KEEPALIVE_COMMENT


# ---- Job pipelines -------------------------------------------------------------------------------
#
# Each step first looks into job.partial, in case an earlier request with the same key has done it.


async def video_job(body: JobPromptOnly, job: Job) -> VideoResult:
    """Make a silent video."""
    require_settings(VIDEO_JOB_SETTINGS)
    model = await check_job(body, job)
    video_url = await make_video(body, model, job)
    return VideoResult(video_url=video_url)


async def speech_job(body: JobPromptTTS, job: Job) -> SpeechResult:
    """Make a final video; speech comes first: a bad text, voice or bucket costs no video."""
    require_settings(SPEECH_JOB_SETTINGS)
    if job.partial.audio_url is None:
        check_text(body.text)
    model = await check_job(body, job, has_speech=True)
    async with job_folder() as folder:
        speech = folder / "speech"
        audio_url = await make_speech(body, job, speech)
        video_url = await make_video(body, model, job, audio_url)

        video = folder / "video.mp4"
        with job.stage("download"):
            await download(video_url, video)
            read_format = partial(asyncio.to_thread, read_video_format, video)
            video_format = await wait_out_descriptors(read_format)

        # The video of a model that takes speech has the speech in it already.
        speech_to_mux = speech if model.speech_field is None else None
        final = await make_final_video(video, video_format, speech_to_mux, body.fit, job)

        read_seconds = partial(asyncio.to_thread, mp4_seconds, final)
        final_seconds = await wait_out_descriptors(read_seconds)
        with job.stage("final_upload"):
            path = f"videos/{uuid.uuid4()}.mp4"
            final_url = await supabase_upload(path, final, "video/mp4", PAID_UPLOAD_RETRY)

    heard_in_full = model.speech_field is not None
    return SpeechResult(
        audio_url=audio_url,
        video_url=video_url,
        final_url=final_url,
        audio_seconds=job.audio_seconds,
        final_seconds=final_seconds,
        cut_seconds=0.0 if heard_in_full else cut_seconds(job.audio_seconds, final_seconds),
    )


def cut_seconds(audio_seconds: float | None, final_seconds: float | None) -> float | None:
    """Return the seconds of speech after the end of the final video; None: unknown."""
    if audio_seconds is None or final_seconds is None:
        return None
    seconds = SPEECH_OFFSET_MS / 1000 + audio_seconds - final_seconds
    return round(seconds, 2) if seconds >= CUT_TOLERANCE_S else 0.0


@asynccontextmanager
async def job_folder() -> AsyncIterator[Path]:
    """Yield a folder for a job's files, which is removed whatever happens."""
    folder = tempfile.TemporaryDirectory(prefix="talking-pet-")
    try:
        yield Path(folder.name)
    finally:
        with anyio.move_on_after(MAX_CLEANUP_S, shield=True):
            try:  # reading the folder takes a descriptor
                await wait_out_descriptors(partial(asyncio.to_thread, folder.cleanup))
            except OSError as exc:  # the job is done all the same
                logger.warning("a job's folder was not removed: %s", exc.strerror)


def check_text(text: str) -> None:
    """Raise InvalidInput if a text is longer than TTS_MAX_CHARS."""
    max_chars = get_settings().tts_max_chars
    if len(text) > max_chars:
        message = f"has {len(text)} characters, the most is {max_chars}"
        params: ErrorParams = {"max": max_chars, "got": len(text)}
        raise invalid_field("text", message, code="too_long", params=params)


async def check_job(body: JobPromptOnly, job: Job, has_speech: bool = False) -> VideoModel:
    """Refuse, before anything is paid for, what cannot succeed; return the requested model."""
    if job.partial.prediction_id:  # paid for: today's settings and schema do not matter
        return await find_paid_model(body.model)
    check_allowed_model(body.model or DEFAULT_MODEL)
    model = await find_model(body.model)
    audio_url = EXAMPLE_AUDIO_URL if has_speech else None  # stands for the speech, not made yet
    build_model_input(model, body, audio_url)
    app_state().create_line.check_turn(job)
    if has_speech and job.partial.audio_url is None:
        app_state().speech_line.check_turn(job)
    if job.search_from is None:  # otherwise a video may be paid for already
        await check_picture(body.image_url)
        app_state().video_budget.reserve(job.name)
    return model


async def find_paid_model(name: str | None) -> VideoModel:
    """Find the model of a prediction that exists. Raises ProviderFailed, ResourceFailed.

    If Replicate does not know the model just now, the error is retryable: the video is paid for.
    """
    try:
        return await find_model(name)
    except ProviderRefused as exc:
        raise ProviderFailed(exc.detail, "replicate", retryable=True) from exc


async def make_speech(body: JobPromptTTS, job: Job, target: Path) -> str:
    """Make and store the speech, unless it exists, and fetch it to `target`; return its URL."""
    speech: bytes | None = None
    audio_url = job.partial.audio_url
    if audio_url is None:
        with job.stage("speech"):
            await claim(job, "speech")
            speech = await elevenlabs_tts_bytes(body.text, body.voice_id, job)
            job.audio_seconds = await asyncio.to_thread(speech_seconds, speech)

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
        if speech is None:  # an earlier request has made it
            stored = await asyncio.to_thread(target.read_bytes)
            job.audio_seconds = await asyncio.to_thread(speech_seconds, stored)
    return audio_url


async def download_speech(audio_url: str, target: Path) -> None:
    """Fetch the speech from its public URL, before a video is paid for. Raises ResourceFailed.

    The error says so if the bucket is not public.
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
            exc.code = "bucket_not_public"
            exc.provider = "supabase"
            exc.retryable = False
        raise


async def make_video(
    body: JobPromptOnly, model: VideoModel, job: Job, audio_url: str | None = None
) -> str:
    """Make the silent video, or resume the one that is recorded; return its URL."""
    with job.stage("video"):
        if job.partial.prediction_id is None:
            await claim(job, "video")
        video_url = await replicate_video_from_prompt(body, audio_url, job, model)
    job.partial.video_url = video_url
    return video_url


async def make_final_video(
    video: Path, video_format: VideoFormat, speech: Path | None, fit: Fit, job: Job
) -> Path:
    """Make a video that plays everywhere, with the speech put in. Raises ResourceFailed, OSError.

    `speech` is None if the model's video has it already.
    """
    if not plays_everywhere(video_format, as_it_is=speech is None):
        with job.stage("convert"):
            converted = video.with_name("converted.mp4")
            convert = partial(convert_video, video, video_format, converted, speech is None)
            video = await wait_out_descriptors(convert)
    if speech is None:
        return video

    final = video.with_name("final.mp4")
    with job.stage("mux"):
        await wait_out_descriptors(partial(mux_video_audio, video, speech, final, fit))
    return final


# ---- Routes --------------------------------------------------------------------------------------

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot succeed as it is", "model": ErrorBody},
    500: {
        "description": "The service or a provider failed; `partial` holds what was made",
        "model": ErrorBody,
    },
    "default": {
        "description": "No such route or method, no valid token, or the spending limit",
        "model": ErrorBody,
    },
}
EVENT_STREAM_DESCRIPTION = """With `Accept: text/event-stream`: `stage` events as the job proceeds, \
comments while nothing happens, then one `result` (the JSON body) or one `error` (the error body and \
`status`)."""
EXAMPLE_STAGE = StageEvent(
    stage="video", state="progress", seconds=12.5, status="processing", percent=40
)
EXAMPLE_VIDEO_RESULT = VideoResult(video_url=EXAMPLE_VIDEO_URL)
EXAMPLE_SPEECH_RESULT = SpeechResult(
    audio_url=EXAMPLE_AUDIO_URL,
    video_url=EXAMPLE_VIDEO_URL,
    final_url=EXAMPLE_FINAL_URL,
    audio_seconds=1.62,
    final_seconds=2.12,
    cut_seconds=0,
)


def job_responses(example: BaseModel) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a job's JSON response, event stream and errors."""
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
        # OpenAPI 3.2 has itemSchema, but client generators still read 3.1, where a schema of the
        # whole body would give each of their calls two types.
        "text/event-stream": {"x-itemSchema": event_schema, "example": text},
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
    return await head(body.url, HEAD_TIMEOUT_S, app_state().head_slots)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document, with the schemas of the events added."""
    contract = FastAPI.openapi(app)
    for event in (StageEvent, ErrorEvent):
        schema = event.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)  # they are among the components already
        contract["components"]["schemas"][event.__name__] = schema
    return contract


app.openapi = openapi  # type: ignore[method-assign]
