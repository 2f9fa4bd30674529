"""Talking Pet: a picture of a pet and a line of text go in, a video in which the pet says it comes out.

One FastAPI service without a queue. A front end POSTs a job, waits, and gets the URLs in the answer:

    POST /jobs_prompt_only   picture + prompt         -> video_url
    POST /jobs_prompt_tts    picture + prompt + text  -> audio_url, video_url, final_url
    POST /debug/head         url                      -> status, content type and size of a remote file
    GET  /health                                      -> {"ok": true}

A speech job, in sequence: ElevenLabs speaks the text, Supabase Storage keeps the speech, Replicate animates the
picture, ffmpeg puts speech and video together, Supabase Storage keeps the result. With `Accept: text/event-stream`
the same request is answered as events, so that the wait is visible. With an `Idempotency-Key` it can be sent again
until there is an answer: one video is bought, and it is delivered.

Run it:      uvicorn main:app              (the keys: see .env.example)
Without keys: python -m tests.sandbox      (the three providers as local stand-ins)
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
import tempfile
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from itertools import islice
from pathlib import Path
from subprocess import DEVNULL
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
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
from fastapi.routing import APIRoute
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import AfterValidator, BaseModel, Field, SecretStr, StringConstraints, ValidationError, model_validator
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

current_request_id: ContextVar[str] = ContextVar("request_id", default="-")
logger = logging.getLogger("talking_pet")

# ---- Limits and timings ----------------------------------------------------------------------------------------

MAX_REQUEST_BYTES = 64 * 1024
MAX_SPEECH_BYTES = 9_500_000
MAX_DOWNLOAD_BYTES = 100_000_000  # a talking video has no more either
MAX_ANSWER_BYTES = 2_000_000  # of a provider's JSON answer; the largest model schemas have some 100 kB
MAX_PREDICTION_BYTES = 8_000_000  # of one with its whole log, or of a hundred in a list
MAX_DETAIL_CHARS = 300  # of a provider's own message that is passed on
CHUNK_BYTES = 128 * 1024  # to and from disk at a time: TLS gives 16 KB, and each piece takes a turn of a thread

# Of what strangers write: models' schemas, outputs and videos.
MAX_SCHEMA_PARTS = 4  # of one property: an enum stands behind one, what may be null behind two
MAX_SCHEMA_FIELDS = 300  # well-known models have up to fifteen
MAX_OUTPUT_URLS = 1_000  # a video's URL is among the first few
MAX_BOXES = 10_000  # of an MP4 at its top level; a video in fragments has some hundreds

# Seconds of silence on a connection, not of a whole call.
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
SPEECH_TIMEOUT = httpx.Timeout(120.0, connect=10.0)  # ElevenLabs answers when all is spoken
CREATE_TIMEOUT = httpx.Timeout(20.0, connect=10.0)  # Replicate answers at once; what had no answer is looked for
MAX_BACKOFF_S = 8.0  # RETRY_FIRST_SECONDS doubles up to this: 0.5 s, 1 s, 2 s, 4 s, 8 s, 8 s ...

# How long something goes on, as shares of PATIENCE_SECONDS: beside each what it is by default.
WHOLE = 1.0  # 120 s: what is paid for is stored and fetched, failure by failure
HALF = 1 / 2  # 60 s: a throttled call, which costs nothing
QUARTER = 1 / 4  # 30 s: the longest single wait; a cancel; a read that is refused; another instance's fresh file
SIXTH = 1 / 6  # 20 s: jobs with a key at the end of the process
TWELFTH = 1 / 12  # 10 s: the look for a prediction whose create had no answer

POLL_SHARE = 0.025  # a wait between two reads, as a share of the time waited so far
POLL_MAX_S = 2.0  # while nothing is known of its kind
KEPT_DURATIONS = 30  # of the last videos of a kind, which tell when the next one is due (see due_delay_s)
DURATION_SPREAD = 0.02  # how far around one of them the next one may be, as a share of it
READ_WORTH_S = 1 / 80  # one more read is made where it finds a video this much sooner on average
EARLY_SHARE = 0.1  # the longest wait, as a share of the shortest duration known, or of the time waited if longer
READS_PER_MINUTE = 2_400  # of one process; Replicate allows 3,000 (docs rate-limits, read 2026-11-22)
MIN_CANCEL_AFTER_S = 5  # what Replicate's Cancel-After takes, up to a day (changelog 2025-10-16)
CLOCK_SKEW_S = 5.0  # between this machine and Replicate
MAX_LIST_PAGES = 10  # of a hundred predictions each
MODEL_TTL_S = 600.0
DEFAULT_FPS = 24.0  # where a model counts frames and names no rate

SPEECH_DELAY_MS = 500
FFMPEG_TIMEOUT_S = 60.0
MAX_FFMPEG = 4  # at once, and no more than cores: a container sees those of its host, and each takes some 50 MB
FFMPEG_MAX_ALLOC_BYTES = 64_000_000  # one allocation; a plane of a video's frame has less, of a 16K one more

HEAD_TIMEOUT_S = 10.0
PICTURE_TIMEOUT_S = 3.0
MAX_REDIRECTS = 5
SHUTDOWN_WAIT_S = 25.0  # for the answers of jobs that uvicorn has just cancelled; Render kills after 30 s

# ---- Settings --------------------------------------------------------------------------------------------------

# ElevenLabs' OpenAPI document, parameter output_format (copy of 2026-08-22).
COMPRESSED = r"mp3_22050_32|mp3_24000_48|(mp3_44100|opus_48000)_(32|64|96|128|192)"
UNCOMPRESSED = r"(pcm|wav)_(8000|16000|22050|24000|32000|44100|48000)|[au]law_8000"


def check_http_url(value: str) -> str:
    """The URL, what is not ASCII percent-encoded. Raises ValueError if it is not an absolute http(s) URL."""
    if re.search(r"\s", value):
        raise ValueError("should not have a blank in it; in an address it is written %20")
    with suppress(httpx.InvalidURL, ValueError):
        url = httpx.URL(value)
        if url.scheme in ("http", "https") and url.host and "\\" not in value:
            return value if value.isascii() else str(url)
    raise ValueError("should be an absolute http(s) URL")


def check_base_url(value: str) -> str:
    """The URL as httpx writes it, without a slash at its end. Raises ValueError if it is no absolute http(s) URL."""
    with suppress(ValueError):
        url = httpx.URL(check_http_url(value))
        if not (url.userinfo or url.query or url.fragment):
            return str(url).rstrip("/")
    raise ValueError("should be an absolute http(s) URL, such as https://example.com")


def check_origins(value: str) -> str:
    """Origins without a slash at their end. Raises ValueError if one is neither `*` nor scheme://host[:port]."""
    origins = [origin.strip().rstrip("/") for origin in value.split(",")]
    if not all(re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin) for origin in origins):
        raise ValueError("should be *, one origin such as https://example.com, or several separated by commas")
    return ",".join(origins)


def check_key(key: SecretStr) -> SecretStr:
    """The key itself. Raises ValueError if it could not stand in a header."""
    if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
        raise ValueError("holds a blank or a character that no key has")
    return key


BaseUrl = Annotated[str, AfterValidator(check_base_url)]
Key = Annotated[SecretStr, AfterValidator(check_key)]


class Settings(BaseModel, frozen=True):
    """What the environment says; each field is the variable of the same name in capitals."""

    eleven_api_key: Key | None = None
    replicate_api_token: Key | None = None
    supabase_url: BaseUrl | None = None
    supabase_service_role: Key | None = None
    supabase_bucket: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "pets"
    allowed_origin: Annotated[str, AfterValidator(check_origins)] = "*"
    tts_output_format: Annotated[str, Field(pattern=f"^({COMPRESSED}|{UNCOMPRESSED})$")] = "mp3_44100_64"
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
        """The value of a setting that a call cannot do without. Raises SettingMissing naming the variable."""
        value = getattr(self, name)
        if value is None:
            raise SettingMissing(f"The service is not set up for this: set {name.upper()}.")
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


SPEECH_JOB_SETTINGS = ("eleven_api_key", "replicate_api_token", "supabase_url", "supabase_service_role")


def read_settings(environment: Mapping[str, str | None]) -> Settings:
    """Settings from variables; an empty one counts as unset. Raises ValueError naming variable and value."""
    texts = {name: (environment.get(name.upper()) or "").strip() for name in Settings.model_fields}
    try:
        return Settings.model_validate({name: text for name, text in texts.items() if text})
    except ValidationError as exc:
        name, message = str(exc.errors()[0]["loc"][0]), exc.errors()[0]["msg"].removeprefix("Value error, ")
        shown = "(not shown)" if Settings.model_fields[name].annotation == Key | None else repr(texts[name])
        raise ValueError(f"{name.upper()}={shown}: {message}") from None


def patience_s(share: float) -> float:
    """Seconds that something goes on for, as a share of PATIENCE_SECONDS."""
    return get_settings().patience_seconds * share


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process: the environment, then `.env` beside this file. Ends the process if malformed."""
    try:
        return read_settings({**dotenv_values(Path(__file__).with_name(".env")), **os.environ})
    except ValueError as exc:
        raise SystemExit(str(exc)) from None


# ---- Models: what a request holds, what an answer holds --------------------------------------------------------

Provider = Literal["elevenlabs", "replicate", "supabase"]
Category = Literal["configuration", "validation", "provider", "resource", "internal"]
Stage = Literal["speech", "audio_upload", "video", "download", "mux", "final_upload"]
Fit = Literal["shortest", "video", "speech"]

EXAMPLE_STORAGE = get_settings().supabase_url or "https://your-project.supabase.co"
EXAMPLE_PICTURE = f"{EXAMPLE_STORAGE}/storage/v1/object/public/{get_settings().supabase_bucket}/pet.jpg"

UrlText = Annotated[str, StringConstraints(strict=True, max_length=4096)]
HttpUrl = Annotated[UrlText, AfterValidator(check_http_url), Field(json_schema_extra={"format": "uri"})]
MODEL_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9]+)?$"
VOICE_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
SIZE_PATTERN = r"^[A-Za-z0-9]{1,16}$"
KEY_PATTERN = r"^[!-~]{1,255}$"  # draft-ietf-httpapi-idempotency-key-header leaves the form to the server
PATTERNS_IN_WORDS = {
    MODEL_PATTERN: "should be owner/name or owner/name:version",
    VOICE_PATTERN: "should be up to 64 letters, digits, _ and -",
    SIZE_PATTERN: "should be a size such as 768p",
    KEY_PATTERN: "should be 1 to 255 visible ASCII characters, such as a UUID",
}
NonBlank = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]
Size = Annotated[str, StringConstraints(strict=True, pattern=SIZE_PATTERN)]
VoiceId = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, pattern=VOICE_PATTERN)]
ModelName = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, max_length=200, pattern=MODEL_PATTERN)]
# What other services call our fields: with the default in its place, a video of the wrong length would be bought.
OTHER_NAMES = {"duration": "seconds", "length": "seconds", "image": "image_url", "voice": "voice_id"}


class JobPromptOnly(BaseModel):
    """A picture to bring to life."""

    image_url: HttpUrl = Field(description="Public address of the picture", examples=[EXAMPLE_PICTURE])
    prompt: NonBlank = Field(description="What should happen", examples=["The dog looks up and talks"])
    seconds: int = Field(6, strict=True, ge=1, le=600, description="Length of the video; the default model: 6 or 10")
    resolution: Size = Field("768p", description="Video size; the default model: 512p, 768p, or 1080p with 6 seconds")
    model: ModelName | None = Field(
        None,
        description="Replicate model, owner/name or owner/name:version; null: minimax/hailuo-02",
        examples=["minimax/hailuo-02"],
    )

    @model_validator(mode="before")
    @classmethod
    def refuse_misnamed(cls, body: Any) -> Any:
        """Refuse a field that is nearly one of ours; all others are ignored, those of the other job as well."""
        ours = JobPromptTTS.model_fields
        for name in body if isinstance(body, dict) else ():
            for near in get_close_matches(name.lower(), [*ours, *OTHER_NAMES], n=1, cutoff=0.8):
                meant = OTHER_NAMES.get(near, near)
                if name not in ours and meant in cls.model_fields and meant not in body:
                    raise unfit(name, f"should be called {meant}")
        return body


class JobPromptTTS(JobPromptOnly):
    """A picture to bring to life, and what it says."""

    text: NonBlank = Field(description="What the pet says, at most TTS_MAX_CHARS characters", examples=["Feed me!"])
    voice_id: VoiceId = Field(description="ElevenLabs voice", examples=["JBFqnCBsd6RMkjVDRZzb"])
    fit: Fit = Field(
        "shortest",
        description="What ends the clip. shortest: video or speech; video: the video, then silence if it is longer than "
        "the speech; speech: the speech, the video repeats until then",
    )


class HeadRequest(BaseModel):
    """A remote file to look at."""

    url: HttpUrl = Field(description="Public address, ports 80 and 443", examples=[EXAMPLE_PICTURE])


class VideoResult(BaseModel):
    """A silent video."""

    video_url: str = Field(description="Replicate's own URL, gone after an hour")


class SpeechResult(BaseModel):
    """A talking pet."""

    audio_url: str = Field(description="The speech, in your storage")
    video_url: str = Field(description="The silent video: Replicate's own URL, gone after an hour")
    final_url: str = Field(description="The talking video, in your storage")


class HeadResult(BaseModel):
    """What a server tells about a file."""

    status: int = Field(description="HTTP status of the remote answer, redirects followed")
    content_type: str | None
    bytes: int | None = Field(description="Size of the whole file, if told")


class Partial(BaseModel):
    """What a failed job has made, and paid for, already."""

    audio_url: str | None = None
    video_url: str | None = None
    prediction_id: str | None = Field(default=None, description="The video's id at Replicate, which keeps it an hour")


class InputError(BaseModel):
    """One fault of a request: where it is, such as `["body", "voice_id"]`, and what should be there."""

    loc: list[str | int]
    msg: str


class ErrorBody(BaseModel):
    """The one body of every error; `partial` and `errors` stand in it only where there is something to say."""

    detail: str
    category: Category
    provider: Provider | None = None
    request_id: str
    retryable: bool = Field(description="The same request, with its Idempotency-Key, can succeed later as it is")
    partial: Partial | None = None
    errors: list[InputError] | None = None


class ErrorEvent(ErrorBody):
    """The `error` event that ends a stream: the body of an error, and what its status would be."""

    status: int


class StageEvent(BaseModel):
    """A step of a job that has started, gone on or ended; told to those who ask for an event stream."""

    stage: Stage
    state: Literal["started", "progress", "done"]
    seconds: float = Field(description="since the stage started")
    status: str | None = Field(default=None, description="of the prediction, while the video is made")
    percent: int | None = Field(default=None, description="of the video, where the model's log tells")


# ---- Errors ----------------------------------------------------------------------------------------------------

ErrorKind = tuple[int, Category, bool]  # HTTP status, category, and whether it is retryable if it does not say


class ServiceError(Exception):
    """A failure that is told to the client; by itself: of the service. `answer` is the provider's, if there was one."""

    kind: ErrorKind = (500, "internal", True)

    def __init_subclass__(cls, kind: ErrorKind | None = None) -> None:
        cls.kind = kind or cls.kind

    def __init__(
        self, detail: str, provider: Provider | None = None, retryable: bool | None = None, answer: Any = None
    ) -> None:
        super().__init__(detail)
        self.http_status, self.category, is_retryable = self.kind
        self.retryable = is_retryable if retryable is None else retryable
        self.detail, self.provider = redact(detail), provider
        self.answer: Answer | None = answer
        self.errors: list[InputError] = []

    def at(self, name: str, message: str, place: str = "body") -> "ServiceError":
        """The same, with what is wrong with one field of the request."""
        self.errors.append(InputError(loc=[place, redact(name)], msg=redact(message)))
        return self


class SettingMissing(ServiceError, kind=(500, "configuration", False)):
    """A variable is unset that this request needs."""


class InvalidInput(ServiceError, kind=(400, "validation", False)):
    """The request can never succeed as it stands."""


class UrlBlocked(InvalidInput):
    """The URL leads to where the service must not go."""


class AddressNotPublic(UrlBlocked):
    """The URL leads to a machine's own address, or to one of a network inside."""


class ProviderRefused(ServiceError, kind=(400, "provider", False)):
    """ElevenLabs or Replicate do not want this content, or a video could not be made."""


class ProviderFailed(ServiceError, kind=(500, "provider", True)):
    """ElevenLabs or Replicate refuse the service itself, fail, or do not answer."""


class SpeechTooLarge(ServiceError, kind=(400, "resource", False)):
    """The speech is larger than the service carries."""


class ResourceFailed(ServiceError, kind=(500, "resource", True)):
    """Storage, a download, the service's own machine, or media that ffmpeg cannot use."""


def unfit(name: str, message: str, place: str = "body") -> ServiceError:
    """The refusal of one field of the request, or of a header."""
    return InvalidInput(f"{name}: {message}.").at(name, message, place)


def redact(text: str) -> str:
    """The text without the keys of this service, and without half an emoji, which JSON can hold and no answer."""
    for _, value in get_settings():
        text = text.replace(value.get_secret_value(), "***") if isinstance(value, SecretStr) else text
    return text.encode("utf-8", "replace").decode()


def complete_line(record: logging.LogRecord) -> bool:
    """Begin a line of the log with the id of the request it belongs to, and keep the keys out of it."""
    record.msg, record.args = redact(f"request_id={current_request_id.get()} {record.getMessage()}"), ()
    return True


logger.filters = [complete_line]


def as_service_error(exc: BaseException) -> ServiceError:
    """The error to tell; the traceback of an unforeseen one goes to the log."""
    if isinstance(exc, ServiceError):
        return exc
    logger.error("unforeseen error\n%s", "".join(traceback.format_exception(exc)))
    if isinstance(exc, OSError) and exc.strerror:  # a disk that is full, a folder that is read-only ...
        return ResourceFailed(f"The service's own machine failed the job: {exc.strerror}.")
    return ServiceError("Something unforeseen went wrong inside the service; its log has the request id.")


# ---- Jobs: what a request has done so far ----------------------------------------------------------------------

# Whose failure it is when a stage does not end in time; None: the check, where a model is looked up.
STAGE_PROVIDERS: dict[Stage | None, Provider] = {None: "replicate", "speech": "elevenlabs", "video": "replicate"}
STAGE_PROVIDERS |= {"audio_upload": "supabase", "final_upload": "supabase"}
Events = asyncio.Queue[StageEvent | None]  # None: there are no more


@dataclass(eq=False)
class Job:
    """The work of one request, and of those that join it: its stages, what exists already, and who listens."""

    request_id: str
    identity: str = ""  # the path of its file in the bucket if it has a key, else a random one; see Shared.held
    started: float = field(default_factory=time.monotonic)
    timings: dict[Stage, float] = field(default_factory=dict)  # seconds, in the order of the stages
    stage_started: float = 0.0
    current: Stage | None = None
    partial: Partial = field(default_factory=Partial)
    events: list[StageEvent] = field(default_factory=list)
    listeners: list[Events] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)  # of its work
    stopped: Literal["left", "shutdown"] | None = None
    result: BaseModel | ServiceError | None = None
    # Of a job with an Idempotency-Key:
    note: "Note | None" = None  # what its file in the bucket holds, or is about to
    lost: tuple[float, float] | None = None  # clock times between which a prediction may appear that nobody has noted

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Name, time, log and tell one step of the job."""
        self.current, self.stage_started = name, time.monotonic()
        self.tell("started")
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            seconds = self.timings[name] = time.monotonic() - self.stage_started
            logger.info("stage=%s outcome=%s ms=%.0f", name, outcome, seconds * 1000)
        self.tell("done")
        self.current = None  # after a failure it stays: unfinished() names it

    def tell(self, state: Literal["started", "progress", "done"], **more: Any) -> None:
        """Tell an event to all who listen, and keep it for those who join; of progress, the last is enough."""
        seconds = round(time.monotonic() - self.stage_started, 3)
        event = StageEvent(stage=self.current or "video", state=state, seconds=seconds, **more)
        if self.events and self.events[-1].state == event.state == "progress":
            self.events.pop()
        self.events.append(event)
        for listener in self.listeners:
            listener.put_nowait(event)

    def listen(self) -> Events:
        """The events so far, and then each as it is told."""
        self.listeners.append(queue := Events())
        for event in self.events:
            queue.put_nowait(event)
        return queue

    def stop(self, why: Literal["left", "shutdown"]) -> None:
        """Cancel the work: its client has left, or the process ends."""
        self.stopped = self.stopped or why
        self.scope.cancel()

    def end(self) -> None:
        """Log what came of the job, and let go of all who wait for it."""
        outcome = "ok" if isinstance(self.result, BaseModel) else self.stopped or getattr(self.result, "category", None)
        ms = (time.monotonic() - self.started) * 1000
        logger.info("job outcome=%s ms=%.0f prediction_id=%s", outcome, ms, self.partial.prediction_id)
        for queue in self.listeners:
            queue.put_nowait(None)

    def unfinished(self) -> ServiceError:
        """The error of a job that was stopped, or has not ended by its deadline."""
        if self.stopped or time.monotonic() - self.started < get_settings().job_timeout_seconds:
            again = "send the same request again" if self.note else "try again"
            return ServiceError(f"The service is restarting and could not finish the job; {again}.")
        limit = f"The job was not done after {get_settings().job_timeout_seconds:g} s"
        provider = STAGE_PROVIDERS.get(self.current)
        error = ProviderFailed if provider in ("elevenlabs", "replicate") else ResourceFailed
        is_final = self.note and self.partial.prediction_id and self.current == "video"  # a cancelled video stays so
        return error(f"{limit} and was ended in the stage {self.current or 'check'}.", provider, retryable=not is_final)

    def error_json(self, error: ServiceError) -> dict[str, Any]:
        """The body of an error (see ErrorBody): `partial` and `errors` only if there is something to say."""
        told = {name: getattr(error, name) for name in ("detail", "category", "provider", "retryable")}
        partial, errors = self.partial.model_dump(exclude_none=True), [fault.model_dump() for fault in error.errors]
        more = {"partial": partial, "errors": errors}
        return {**told, "request_id": self.request_id, **{name: value for name, value in more.items() if value}}


# ---- Network: one pool of connections, and a guard where they are made -----------------------------------------

# Addresses that ipaddress.is_global lets pass in one Python version or another, or that lead elsewhere inside:
# carrier-grade NAT, IETF protocols, 6to4 relays, benchmarks, multicast, reserved and broadcast; Teredo and other
# protocols, documentation, 6to4 (an IPv4 address inside), documentation.
BLOCKED_V4 = "100.64.0.0/10 192.0.0.0/24 192.88.99.0/24 198.18.0.0/15 224.0.0.0/4 240.0.0.0/4"
BLOCKED_V6 = "2001::/23 2001:db8::/32 2002::/16 3fff::/20"
BLOCKED_NETWORKS = [ipaddress.ip_network(network) for network in f"{BLOCKED_V4} {BLOCKED_V6}".split()]
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # leaves out mapped, compatible and NAT64 forms of IPv4 as well


def is_public(address: str) -> bool:
    """True for an address of the public internet, as getaddrinfo writes it."""
    with suppress(ValueError):
        ip = ipaddress.ip_address(address)
        blocked = any(ip in network for network in BLOCKED_NETWORKS if network.version == ip.version)
        return ip.is_global and not blocked and (ip.version == 4 or ip in GLOBAL_UNICAST)
    return False


def check_public_url(url: httpx.URL) -> None:
    """Refuse a URL by its form alone; names are looked up later. Raises UrlBlocked saying what is wrong."""
    host = url.raw_host.decode("ascii").rstrip(".")
    if url.scheme not in ("http", "https"):
        raise UrlBlocked("Only http and https URLs are fetched.")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", host):
        raise UrlBlocked("The URL's host is not a plain name or address.")
    # As browsers do: a host that ends in a number is an IPv4 address, and only its plain form is taken.
    is_v4 = re.fullmatch(r"(.*\.)?(\d+|0[xX][0-9A-Fa-f]*)", host)
    if is_v4 and not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){3}", host):
        raise AddressNotPublic("The URL's address is not written in its plain form.")
    is_local = host.lower().rpartition(".")[2] == "localhost"  # no look-up is asked: systems differ
    if is_local or ((is_v4 or ":" in host) and not is_public(host)):
        raise AddressNotPublic("The URL leads to an address that is not public.")
    if url.userinfo:
        raise UrlBlocked("A URL with a user name or password is not fetched.")
    if url.port not in (None, 80, 443):
        raise UrlBlocked("Only the ports 80 and 443 are fetched from.")


def is_trusted(url: httpx.URL) -> bool:
    """True for the owner's own addresses, both APIs and the storage; for any with ALLOW_PRIVATE_URLS."""
    own = get_settings()
    bases = (own.eleven_base_url, own.replicate_base_url, f"{own.supabase_url}/storage/v1/object")
    is_below = any(str(url).startswith(f"{base}/") for base in bases)
    # A ".." that httpx left encoded could lead out of there.
    return own.allow_private_urls or (is_below and ".." not in unquote(str(url)))


class PublicNetwork(httpcore.AnyIOBackend):
    """Connects to public addresses only: looked up once, checked, and then used."""

    def __init__(self) -> None:
        super().__init__()
        # Threads of their own: a stranger's name that takes long does not hold up files and the providers' names.
        self.look_ups = ThreadPoolExecutor(16, "look-up")

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address that takes it. Raises UrlBlocked if any address is not public."""
        *others, last = addresses = await self._look_up(host, port, timeout)
        if not all(map(is_public, addresses)):
            raise AddressNotPublic("The URL leads to an address that is not public.")
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await super().connect_tcp(address, port, timeout, *args, **options)
        return await super().connect_tcp(last, port, timeout, *args, **options)

    async def _look_up(self, host: str, port: int, timeout: float | None) -> list[str]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            with anyio.fail_after(timeout):
                entries = await asyncio.get_running_loop().run_in_executor(self.look_ups, ask)
            return [str(entry[4][0]) for entry in entries]
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout(f"looking up {host} took too long") from exc
        except (OSError, UnicodeError) as exc:
            raise httpcore.ConnectError(f"{host} has no address") from exc


# Extensions of a request that choose its pool.
ASKED_FOR = "talking_pet_asked_for"  # by anyone, through /debug/head or as a picture: no video waits for it
FRESH = "talking_pet_fresh"  # it must not be sent twice, so not on a connection that is just being closed


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """The certificates to trust, SSL_CERT_FILE and SSL_CERT_DIR heeded: read once, since that takes some 15 ms."""
    return httpx.create_ssl_context(trust_env=True)


class Network(httpx.AsyncBaseTransport):
    """Pools: two for the owner's own addresses; two for all others, which the guard watches."""

    def __init__(self) -> None:
        self.trusted, self.fresh = self.pool(httpcore.AnyIOBackend()), self.pool(httpcore.AnyIOBackend(), idle=0)
        self.public, self.asked_for = self.pool(PublicNetwork()), self.pool(PublicNetwork())

    def pool(self, backend: httpcore.AsyncNetworkBackend, idle: int = 10) -> httpx.AsyncHTTPTransport:
        """A transport without proxies whose connections `backend` makes; httpx itself has no argument for that."""
        # No bound on connections: each waiting job may need one, and Replicate's rates are what limits. Ten idle ones
        # are enough for 40 reads a second; httpcore looks at each of them twice a request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=idle, keepalive_expiry=15.0)
        transport = httpx.AsyncHTTPTransport(verify=tls_context(), trust_env=False, limits=limits)
        transport._pool._network_backend = backend
        return transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; each redirect comes here again. Raises UrlBlocked."""
        if is_trusted(request.url):
            pool = self.fresh if FRESH in request.extensions else self.trusted
        else:
            check_public_url(request.url)
            pool = self.asked_for if ASKED_FOR in request.extensions else self.public
        return await pool.handle_async_request(request)

    async def aclose(self) -> None:
        """Close every connection."""
        for pool in (self.trusted, self.fresh, self.public, self.asked_for):
            await pool.aclose()


@dataclass
class Shared:
    """What the jobs of one process share."""

    http: httpx.AsyncClient
    ffmpeg_slots: asyncio.Semaphore
    requests: int = 0  # that have no answer yet
    jobs: dict[str, Job] = field(default_factory=dict)  # running ones, by their identity
    held: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=10_000))  # prediction ids, Job.identity
    polls: int = 0  # predictions being waited for
    durations: dict[str, deque[float]] = field(default_factory=dict)  # the last videos' in seconds, by their kind
    models: dict[str, "asyncio.Task[VideoModel]"] = field(default_factory=dict)  # by the name that was asked for


_running: Shared | None = None  # set by the lifespan


@asynccontextmanager
async def shared() -> AsyncIterator[Shared]:
    """What the lifespan holds; outside of one, the same made for this call and closed after it."""
    if _running is not None:
        yield _running
        return
    headers = {"Accept-Encoding": "identity"}  # what is packed small and large unpacked is never unpacked
    async with httpx.AsyncClient(transport=Network(), timeout=TIMEOUT, headers=headers) as http:
        http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # no server is to be told of another's
        yield Shared(http, asyncio.Semaphore(min(os.cpu_count() or 1, MAX_FFMPEG)))


# ---- HTTP calls: what is repeated, and what never --------------------------------------------------------------

PROVIDER_NAMES = {"elevenlabs": "ElevenLabs", "replicate": "Replicate", "supabase": "Supabase Storage"}
SERVER_ERRORS = frozenset(range(500, 600))  # Supabase has a 544
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def dig(value: Any, *keys: str) -> Any:
    """What stands in JSON objects under these keys, one in the other; None if it is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


class Answer(NamedTuple):
    """A provider's answer, its body read up to a limit."""

    status: int
    headers: httpx.Headers
    body: bytes
    is_whole: bool = True

    def json(self) -> Any:
        """The body as JSON values; None if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


Outcome = Answer | httpx.RequestError
Perform = Callable[[httpx.AsyncClient, httpx.Request, int], Awaitable[Answer]]  # one attempt; its body up to a limit


class Tries(NamedTuple):
    """How long an outcome is tried again: so often in all, and for so long since the first failure."""

    attempts: float = math.inf
    patience: float = math.inf  # share of PATIENCE_SECONDS


@dataclass(frozen=True)
class Retry:
    """Which outcomes of a call are tried again, and for how long; all others never are."""

    statuses: Mapping[int, Tries]
    not_sent: Tries  # there was no connection, so nothing can have been done
    broken: Tries | None = None  # the connection broke: it may have been done
    unreadable: Tries | None = None  # a success that is no JSON object
    is_paid: bool = False  # what the call is about is paid for: whoever asks for a longer wait is asked again

    def tries(self, outcome: Outcome) -> Tries | None:
        """How long this outcome is tried again; None: not at all."""
        if isinstance(outcome, httpx.RequestError):
            if "CERTIFICATE_VERIFY_FAILED" in str(outcome) and not self.is_paid:
                return None
            return self.not_sent if isinstance(outcome, NOT_SENT) else self.broken
        if self.unreadable and outcome.status < 300 and outcome.is_whole and not isinstance(outcome.json(), dict):
            return self.unreadable
        return self.statuses.get(meant_status(outcome))

    def delay_s(self, tries: Tries, attempts: int, failing_s: float, asked_s: float | None) -> float | None:
        """Seconds to wait after `attempts` of a kind, the first of which failed `failing_s` ago; None: give up."""
        if attempts >= tries.attempts or failing_s >= patience_s(tries.patience):
            return None
        first_s, longest_s = get_settings().retry_first_seconds, patience_s(QUARTER)
        if asked_s is None:
            return min(first_s * 2.0 ** min(attempts - 1, 10), MAX_BACKOFF_S) * random.uniform(0.75, 1)
        if asked_s > longest_s:
            return longest_s if self.is_paid else None
        return max(asked_s, first_s)


each = dict[int, Tries].fromkeys
# Before the video is bought a job can be given up, after that it is waited for. Minutes: at PATIENCE_SECONDS=120.
THREE, FOUR = Tries(attempts=3), Tries(attempts=4)
HALF_MINUTE, MINUTE, TWO_MINUTES, ALWAYS = Tries(patience=QUARTER), Tries(patience=HALF), Tries(patience=WHOLE), Tries()
# A speech after a 5xx may be paid twice, some cents: most are not charged, and a person waits. A broken connection
# mostly means that it was made. A prediction costs more, so after either it is looked for.
SPEECH_RETRY = Retry({429: MINUTE, **each((500, 502, 503, 504), THREE)}, not_sent=THREE)
CREATE_RETRY = Retry({429: MINUTE}, not_sent=FOUR)
MODEL_RETRY = Retry(each({408, 429, *SERVER_ERRORS}, FOUR), FOUR, FOUR, FOUR)
LIST_RETRY = Retry(each({408, 429, *SERVER_ERRORS}, HALF_MINUTE), HALF_MINUTE, HALF_MINUTE, HALF_MINUTE, is_paid=True)
READ_STATUSES = {**each({408, 429, *SERVER_ERRORS}, ALWAYS), **each((401, 403, 404), HALF_MINUTE)}
READ_RETRY = Retry(READ_STATUSES, ALWAYS, ALWAYS, ALWAYS, is_paid=True)
CANCEL_RETRY = Retry(each({429, *SERVER_ERRORS}, ALWAYS), ALWAYS, ALWAYS, is_paid=True)
STORE_RETRY = Retry(each({429, *SERVER_ERRORS}, FOUR), FOUR, FOUR, FOUR)
FETCH_RETRY = Retry(each({404, 429, *SERVER_ERRORS}, FOUR), FOUR, FOUR)
PAID_STORE_RETRY = Retry(each({429, *SERVER_ERRORS}, TWO_MINUTES), TWO_MINUTES, TWO_MINUTES, TWO_MINUTES, is_paid=True)
PAID_FETCH_RETRY = Retry(each({404, 429, *SERVER_ERRORS}, TWO_MINUTES), TWO_MINUTES, TWO_MINUTES, is_paid=True)


def meant_status(answer: Answer) -> int:
    """The status an answer means: Supabase Storage hides its own as a text in the body of a 400."""
    told = dig(answer.json(), "statusCode") if answer.status == 400 else None
    return int(str(told)) if re.fullmatch(r"\d{3}", str(told)) else answer.status


def asked_wait_s(answer: Answer, now: float) -> float | None:
    """Seconds the provider asks us to wait, at clock time `now`; None if it does not say, or nonsense."""
    # Replicate writes `retry_after` or "resets in ~30s" into the body; others send Retry-After, seconds or a date.
    body = answer.json()
    told = dig(body, "retry_after") or answer.headers.get("retry-after") or ""
    if not told and (resets := re.search(r"resets in ~(\d+)s", str(dig(body, "detail")))):
        told = resets[1]
    if re.fullmatch(r"\d+(\.\d+)?", str(told).strip()):
        return float(told)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(str(told)).timestamp() - now)
    return None


def provider_message(answer: Answer) -> str:
    """The provider's own words, on one line, whatever its body holds; never empty."""
    words = message_in(answer.json())
    if not words and (b"<" in answer.body[:1000] or answer.headers.get("content-type", "").startswith("text/")):
        page = answer.body[:4_000].decode("utf-8", "replace")
        words = html.unescape(re.sub(r"(?s)<(script|style)\b.*?</\1>|<[^>]*>", " ", page))
    with suppress(ValueError):
        return shortened(words) or HTTPStatus(answer.status).phrase
    return "no message"


def shortened(message: str) -> str:
    """A provider's message on one line, without our keys, at most 300 characters."""
    return redact(" ".join(message.split()))[:MAX_DETAIL_CHARS]


def message_in(value: Any, depth: int = 5) -> str:
    """The message inside an error body: text, object or list, one in the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and depth:
        return "; ".join(filter(None, (message_in(part, depth - 1) for part in value)))
    if isinstance(value, dict) and depth:
        told = (message_in(value.get(key), depth - 1) for key in ("detail", "message", "msg", "error", "title"))
        return next(filter(None, told), "")
    return ""


async def exchange(client: httpx.AsyncClient, request: httpx.Request, limit: int) -> Answer:
    """One request, and its answer's body up to `limit` bytes."""
    async with aclosing(await client.send(request, stream=True)) as response:
        return await read_answer(response, limit)


async def read_answer(response: httpx.Response, limit: int) -> Answer:
    """The answer with its body up to `limit` bytes: more is never held."""
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece[: limit + 1 - len(body)]
        if len(body) > limit:
            break
    return Answer(response.status_code, response.headers, bytes(body[:limit]), len(body) <= limit)


async def send(
    method: str, url: str, retry: Retry, limit: int = MAX_ANSWER_BYTES, perform: Perform = exchange, **options: Any
) -> Answer:
    """The last answer, whatever its status, to a request that is sent again as far as `retry` allows.

    `options` are those of httpx's build_request. Raises httpx.RequestError if the last attempt had no answer.
    """
    attempts, since = Counter[Tries](), dict[Tries, float]()  # by their Tries: failures with equal ones count together
    async with shared() as resources:
        while True:
            request = resources.http.build_request(method, url, **options)
            try:
                outcome: Outcome = await perform(resources.http, request, limit)
            except httpx.RequestError as exc:
                outcome = exc
            if (tries := retry.tries(outcome)) is None:
                break
            attempts[tries] += 1
            failing_s = time.monotonic() - since.setdefault(tries, time.monotonic())
            asked_s = asked_wait_s(outcome, time.time()) if isinstance(outcome, Answer) else None
            if (delay_s := retry.delay_s(tries, attempts[tries], failing_s, asked_s)) is None:
                break
            failed = f"{method} {request.url.host} attempt={attempts.total()} failed ({summary(outcome)})"
            logger.warning("%s, next in %.1f s", failed, delay_s)
            await asyncio.sleep(delay_s)
    if isinstance(outcome, httpx.RequestError):
        raise outcome
    return outcome


async def call(provider: Provider, method: str, url: str, retry: Retry, **options: Any) -> Answer:
    """A provider's success. Raises ProviderRefused, ProviderFailed, or ResourceFailed for Supabase's failures."""
    failed = ResourceFailed if provider == "supabase" else ProviderFailed
    try:
        answer = await send(method, url, retry, **options)
    except httpx.RequestError as exc:
        raise failed(f"{PROVIDER_NAMES[provider]} did not answer: {summary(exc)}.", provider) from exc
    if answer.status not in (200, 201, 202):
        raise refusal(provider, answer, is_about_content=not retry.is_paid)
    if not answer.is_whole and provider == "elevenlabs":
        raise SpeechTooLarge("The speech is larger than 9.5 MB; use a shorter text.", provider)
    if not answer.is_whole:
        raise failed(f"{PROVIDER_NAMES[provider]}'s answer is larger than the service takes in.", provider)
    return answer


def summary(outcome: Outcome) -> str:
    """What came of an attempt, in a few words."""
    if isinstance(outcome, httpx.RequestError):
        return redact(f"{type(outcome).__name__} {outcome}".strip().rstrip("."))
    asked_s = asked_wait_s(outcome, time.time()) or 0
    too_long = f" (it asks to wait {asked_s:.0f} s, longer than a job can)" if asked_s > patience_s(QUARTER) else ""
    return f"{outcome.status}: {provider_message(outcome)}{too_long}"


def refusal(provider: Provider, answer: Answer, is_about_content: bool = True) -> ServiceError:
    """The error for an answer that is no success: 400, 404 and 422 can be about the content, the rest is about us."""
    detail, status = f"{PROVIDER_NAMES[provider]} answered {summary(answer)}", meant_status(answer)
    error: type[ServiceError] = ResourceFailed if provider == "supabase" else ProviderFailed
    if provider != "supabase" and is_about_content and status in (400, 404, 422):
        error = ProviderRefused
    # A key, a plan, a bucket or a content that is refused stays so until somebody changes it.
    retryable = status in (408, 409, 423, 425, 429) or status not in range(400, 500)
    return error(detail, provider, retryable=retryable, answer=answer)


def nonsense(provider: Provider, what: str) -> ServiceError:
    """The error for a success that does not hold what it should."""
    return ProviderFailed(f"{PROVIDER_NAMES[provider]} answered without {what}.", provider)


# ---- ElevenLabs: text -> speech --------------------------------------------------------------------------------


class SpeechFormat(NamedTuple):
    """The kind of file in which the speech of a codec is kept."""

    extension: str  # and ffmpeg's name of the format
    content_type: str
    starts: tuple[bytes, ...]  # what its first bytes are: the provider's Content-Type is not to be trusted


MP3_FRAMES = (b"\xff" + bytes([sync]) for sync in b"\xfa\xfb\xf2\xf3\xe2\xe3")
MP3 = SpeechFormat("mp3", "audio/mpeg", (b"ID3", *MP3_FRAMES))
WAV = SpeechFormat("wav", "audio/wav", (b"RIFF",))
OGG = SpeechFormat("ogg", "audio/ogg", (b"OggS",))
SPEECH_FORMATS = {"mp3": MP3, "wav": WAV, "opus": OGG, "pcm": WAV, "ulaw": WAV, "alaw": WAV}

# Sent without a header by ElevenLabs: the WAVE format tag (RFC 2361) and bytes per sample to give them one.
RAW_CODECS = {"pcm": (1, 2), "alaw": (6, 1), "ulaw": (7, 1)}


def speech_format() -> SpeechFormat:
    """How speech is kept under the present TTS_OUTPUT_FORMAT."""
    return SPEECH_FORMATS[get_settings().tts_output_format.split("_")[0]]


def with_wav_header(samples: bytes, codec: str, rate: int) -> bytes:
    """Raw mono samples as a WAV file that players know."""
    tag, width = RAW_CODECS[codec]
    samples = samples[: len(samples) // 2 * 2]  # a chunk has an even length
    fmt = struct.pack("<HHIIHHH", tag, 1, rate, rate * width, width, width * 8, 0)
    chunks = ((b"fmt ", fmt), (b"fact", struct.pack("<I", len(samples) // width)), (b"data", samples))
    body = b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


async def elevenlabs_tts_bytes(text: str, voice_id: str) -> bytes:
    """The text, spoken: a file that plays. Raises ProviderRefused, ProviderFailed, SpeechTooLarge, SettingMissing."""
    settings = get_settings()
    url = f"{settings.eleven_base_url}/v1/text-to-speech/{voice_id}"
    options: dict[str, Any] = {
        "params": {"output_format": settings.tts_output_format},  # in the body it would be ignored
        "headers": {"xi-api-key": settings.required("eleven_api_key")},
        "json": {"text": text, "model_id": "eleven_multilingual_v2"},
        **{"limit": MAX_SPEECH_BYTES, "timeout": SPEECH_TIMEOUT, "extensions": {FRESH: True}},
    }
    try:
        answer = await call("elevenlabs", "POST", url, SPEECH_RETRY, **options)
    except (ProviderRefused, ProviderFailed) as exc:  # its codes name the field: voice_not_found, text_too_long ...
        told = dig(exc.answer.json(), "detail") if exc.answer else None
        code = str(told if isinstance(told, list) else dig(told, "code") or dig(told, "status"))
        is_voice, is_text = re.search("voice|invalid_uid", code), re.search("text|character_limit", code)
        if is_voice or is_text:
            exc.at("voice_id" if is_voice else "text", shortened(message_in(told)))
        raise
    return playable(answer.body, settings.tts_output_format)


def playable(speech: bytes, output_format: str) -> bytes:
    """Speech as a file that plays. Raises ProviderFailed if it is no speech in that format."""
    codec, rate = output_format.split("_")[:2]
    if codec in RAW_CODECS and speech and not re.match(rb'\s*(<!doctype|<html|\{\s*")', speech, re.IGNORECASE):
        return with_wav_header(speech, codec, int(rate))
    if not speech.startswith(SPEECH_FORMATS[codec].starts):
        raise nonsense("elevenlabs", f"speech in the format {output_format}")
    return speech


# ---- Supabase Storage, and downloads ---------------------------------------------------------------------------

FOR_EVER = "max-age=31536000"  # stored and served as written


async def supabase_upload(
    path: str, content: bytes | Path, content_type: str, retry: Retry = STORE_RETRY, cache: str = FOR_EVER
) -> str:
    """Store a file, from disk if it is there, and return its public URL. Raises ResourceFailed, SettingMissing."""
    size = os.path.getsize(content) if isinstance(content, Path) else len(content)  # noqa: ASYNC240
    headers = {
        **storage_keys(),
        "Content-Type": content_type,  # bare and in lower case, or a bucket with a list of types refuses it
        "Content-Length": str(size),  # limits are enforced by it
        "Cache-Control": cache,
        "x-upsert": "true",  # only this makes a repeated upload safe; in the query it does nothing
    }
    body = FileBody(content) if isinstance(content, Path) else content
    answer = await call("supabase", "POST", storage_url(path), retry, headers=headers, content=body)
    if not dig(answer.json(), "Key"):  # some other server's 200
        raise ResourceFailed("Supabase Storage answered without having stored the file.", "supabase")
    return storage_url(path, "public/")


def storage_url(path: str, access: Literal["", "public/", "authenticated/"] = "") -> str:
    """Where a file of the bucket is written, or with `access` read. Raises SettingMissing."""
    settings = get_settings()
    return f"{settings.required('supabase_url')}/storage/v1/object/{access}{settings.supabase_bucket}/{path}"


def storage_keys() -> dict[str, str]:
    """The service key in both headers, identical, whether it begins with sb_ or eyJ. Raises SettingMissing."""
    key = get_settings().required("supabase_service_role")
    return {"Authorization": f"Bearer {key}", "apikey": key}


@dataclass(frozen=True)
class FileBody:
    """A file as a request's body: piece by piece, read beside the event loop, and from the start at each attempt."""

    path: Path

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The file's pieces."""
        with self.path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk


async def download(url: str, target: Path, retry: Retry = PAID_FETCH_RETRY) -> None:
    """Stream a file of up to 100 MB to disk, from the first byte again if it breaks off. Raises ResourceFailed."""
    try:
        host = httpx.URL(check_http_url(url)).host
    except ValueError as exc:
        raise ResourceFailed("The address of a file to download makes no sense.", retryable=False) from exc
    try:
        answer = await send("GET", url, retry, perform=partial(download_once, target))
    except httpx.RequestError as exc:
        raise ResourceFailed(f"The download from {host} failed: {summary(exc)}.") from exc
    except UrlBlocked as exc:
        raise ResourceFailed(f"The file at {host} may not be fetched. {exc.detail}", retryable=False) from exc
    if answer.status != 200:
        raise ResourceFailed(f"The download from {host} was answered {summary(answer)}.", answer=answer)


async def download_once(target: Path, client: httpx.AsyncClient, request: httpx.Request, limit: int) -> Answer:
    """One attempt at a download: the file goes to `target`, the body of a refusal into the answer."""
    async with follow_redirects(client, request) as response:
        if response.status_code != 200:
            return await read_answer(response, limit)
        check_size(declared_size(response) or 0)
        with target.open("wb") as file:
            async for chunk in response.aiter_raw(CHUNK_BYTES):
                check_size(file.tell() + len(chunk))
                await asyncio.to_thread(file.write, chunk)
        return Answer(200, response.headers, b"")


@asynccontextmanager
async def follow_redirects(client: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """The answer at the end of at most five redirects, unread; httpx itself would read each redirect's body whole."""
    for _ in range(MAX_REDIRECTS + 1):
        try:
            response = await client.send(request, stream=True)
        except (httpx.InvalidURL, UnicodeError) as exc:
            raise httpx.RemoteProtocolError("a redirect to nonsense") from exc
        async with aclosing(response):
            if response.next_request is None:
                yield response
                return
            request = response.next_request
    raise UrlBlocked(f"The URL redirects more than {MAX_REDIRECTS} times.")


def check_size(size: int, what: str = "A file to download") -> None:
    """Refuse a file that is too large. Raises ResourceFailed."""
    if size > MAX_DOWNLOAD_BYTES:
        raise ResourceFailed(f"{what} is larger than 100 MB.", retryable=False)


def declared_size(response: httpx.Response) -> int | None:
    """The length of a body in bytes, if the answer tells a plausible one."""
    told = response.headers.get("content-length", "")
    return int(told) if re.fullmatch(r"\d{1,18}", told) else None


async def head(url: str, limit_s: float) -> HeadResult:
    """Status, type and whole size of a remote file. Raises UrlBlocked; ResourceFailed, also after `limit_s` seconds."""
    try:
        async with shared() as resources:
            with anyio.fail_after(limit_s):
                # A server that refuses HEAD is asked for the first byte.
                for method, extra in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
                    request = resources.http.build_request(method, url, headers=extra, extensions={ASKED_FOR: True})
                    async with follow_redirects(resources.http, request) as response:
                        status, size, headers = response.status_code, declared_size(response), response.headers
                    if status < 400:
                        break
    except (httpx.RequestError, TimeoutError) as exc:
        why = f": {summary(exc)}" if isinstance(exc, httpx.RequestError) else f" within {limit_s:g} s"
        raise ResourceFailed(f"The URL did not answer{why}.") from exc
    if status == 206:  # a part tells the size of the whole, if it can
        whole = re.fullmatch(r"bytes [\d*-]+/(\d{1,18})", headers.get("content-range", ""))
        size = int(whole[1]) if whole else None
    return HeadResult(status=status, content_type=headers.get("content-type", "")[:200] or None, bytes=size)


async def check_picture(url: str) -> None:
    """Refuse a picture that certainly is none, before anything is bought. Raises InvalidInput."""
    try:
        seen = await head(url, PICTURE_TIMEOUT_S)
    except AddressNotPublic as exc:
        raise unfit("image_url", f"{exc.detail.rstrip('.')}; the picture must be on the internet") from exc
    except Exception as exc:  # noqa: BLE001  Replicate, which fetches it itself, may see more of the net
        logger.info("the picture could not be looked at: %r", exc)
        return
    if seen.status in (404, 410):
        raise unfit("image_url", f"there is no picture at this address, it answers {seen.status}")
    if seen.status < 300 and (seen.content_type or "").lower().startswith("text/html"):
        raise unfit("image_url", "is the address of a web page, not of a picture")


# ---- The job's file: what a job with an Idempotency-Key leaves in the bucket, to go on with later --------------

PROCESS_ID = uuid.uuid4().hex
OTHER_BODY = "belongs to a request with another body; a new job needs a new one"


class Note(BaseModel):
    """What the file holds: enough to go on, and nothing of what was asked for."""

    body: str  # keyed digest of the route and of what the client sent
    started: float  # clock time; a prediction without an id here was made since then
    written: float
    writer: str  # process; empty: it has given the job up
    partial: Partial = Partial()
    answer: SpeechResult | VideoResult | None = None


def new_note(route: str, body: BaseModel) -> Note:
    """The note of a job that begins. Raises SettingMissing."""
    for name in SPEECH_JOB_SETTINGS if isinstance(body, JobPromptTTS) else SPEECH_JOB_SETTINGS[1:]:  # all but speech's
        get_settings().required(name)
    sent = json.dumps([route, body.model_dump(exclude_unset=True)], sort_keys=True)
    return Note(body=keyed_digest(sent), started=time.time(), written=time.time(), writer=PROCESS_ID)


def keyed_digest(text: str) -> str:
    """A digest that only who has the service role key can compute."""
    return hmac.new(get_settings().required("supabase_service_role").encode(), text.encode(), "sha256").hexdigest()


async def save_job(job: Job, retry: Retry = STORE_RETRY, is_needed: bool = True, **changes: Any) -> None:
    """Write down how far a job with a key is. Raises ResourceFailed; if it is not `is_needed` now, that is logged."""
    if job.note is None:
        return
    job.note = job.note.model_copy(update={"written": time.time(), "partial": job.partial, **changes})
    content = job.note.model_dump_json(exclude_none=True).encode()
    try:
        await supabase_upload(job.identity, content, "application/json", retry, cache="max-age=0")
    except ServiceError as exc:
        if is_needed:
            raise
        logger.warning("the job's file was not written: %s", exc.detail)


async def found_note(job: Job) -> Note | None:
    """What the file of a job's key holds, once no other instance is at work. Raises InvalidInput, ResourceFailed."""
    while job.note:
        try:
            url = storage_url(job.identity, "authenticated/")
            answer = await call("supabase", "GET", url, STORE_RETRY, headers=storage_keys())
            note = Note.model_validate_json(answer.body)
        except ResourceFailed as exc:
            if exc.answer is None or meant_status(exc.answer) != 404:
                raise
            break
        except ValidationError as exc:
            message = f"The file {job.identity} in the bucket is not one of this service's; remove it."
            raise ResourceFailed(message, "supabase", retryable=False) from exc
        if note.body != job.note.body:
            raise unfit("Idempotency-Key", OTHER_BODY, "header")
        is_fresh = abs(time.time() - note.written) < patience_s(QUARTER)
        if note.answer or note.partial.prediction_id or note.writer in ("", PROCESS_ID) or not is_fresh:
            return note
        await asyncio.sleep(patience_s(QUARTER) / 30)
    return None


def adopt(job: Job, note: Note) -> None:
    """Go on with a job from what an earlier request, or another instance, has left."""
    job.note, job.partial = note.model_copy(update={"writer": PROCESS_ID}), note.partial
    job.lost = (note.started, note.written + (patience_s(TWELFTH) if note.writer else 0))


async def with_key(job: Job, work: Callable[[], Awaitable[BaseModel]]) -> BaseModel:
    """A job with a key: answered from its file if it is done, gone on with from what there is, else begun."""
    if note := await found_note(job):
        adopt(job, note)
        if note.answer:
            return note.answer
    await save_job(job)
    try:
        result = await work()
    except BaseException:
        with anyio.move_on_after(patience_s(TWELFTH), shield=True):  # no writer: other instances need not wait
            await save_job(job, is_needed=False, writer="")
        raise
    with suppress(asyncio.CancelledError):  # done is done, also at the deadline
        await save_job(job, PAID_STORE_RETRY, is_needed=False, answer=result)
    return result


# ---- Video models: a request fitted to what the model's own schema takes ---------------------------------------

DEFAULT_MODEL = "minimax/hailuo-02"

Property = dict[str, Any]  # one field of a model's input, as its JSON schema writes it

FIRST_WORDS = {"first", "start", "initial", "init"}
PICTURE_WORDS = {"image", "img", "picture", "photo", "portrait", "face", "avatar", "frame"}
SPEECH_WORDS = {"audio", "speech"}
OTHER_WORDS = {  # uris with one of these in their name are not the first picture, nor speech
    *"last end ending tail final middle reference ref subject character style mask video movie".split(),
    *"music song sound voice background control depth pose lora weights logo watermark".split(),
}
SECONDS_NAMES = (
    *("duration", "seconds", "duration_seconds", "duration_in_seconds", "video_duration", "num_seconds"),
    *("length", "video_length", "length_seconds", "clip_length"),
)
FRAMES_NAMES = ("num_frames", "frames", "frame_count", "number_of_frames", "n_frames", "video_frames", "total_frames")
FPS_NAMES = ("frames_per_second", "fps", "frame_rate", "framerate", "video_fps")
SIZE_NAMES = ("resolution", "video_resolution", "output_resolution", "quality", "video_quality", "size", "video_size")


@dataclass(frozen=True)
class VideoModel:
    """A model on Replicate: where its predictions are created, and what it takes."""

    name: str
    version: str | None  # to run: its id, or owner/name:id if one was asked for; None: official, runs by name
    fields: dict[str, Property]
    required: tuple[str, ...]

    @property
    def speech_field(self) -> str | None:
        """The field for speech, if the model makes a video that speaks by itself."""
        named = (name for name, prop in self.fields.items() if is_uri(prop) and words(name) & SPEECH_WORDS)
        return next((name for name in named if not words(name) & OTHER_WORDS), None)

    @property
    def picture_field(self) -> str | None:
        """The field for the first picture; a deprecated one only if there is no other."""
        named = [name for name, prop in self.fields.items() if is_first_picture(name, prop)]
        named.sort(key=lambda name: (not words(name) & FIRST_WORDS, name not in self.required, name != "image"))
        return min(named, key=lambda name: bool(self.fields[name].get("deprecated")), default=None)

    @property
    def prompt_field(self) -> str | None:
        """The field for the prompt."""
        named = (name for name in self.fields if "prompt" in words(name) and self.fields[name].get("type") == "string")
        return next((name for name in sorted(named, key=len) if "negative" not in words(name)), None)


# Its page and schema, read 2026-03-29: 10 s only up to 768p.
HAILUO_FIELDS: dict[str, Property] = {
    "prompt": {"type": "string"},
    "first_frame_image": {"type": "string", "format": "uri"},
    "duration": {"type": "integer", "enum": [6, 10]},
    "resolution": {"type": "string", "enum": ["512p", "768p", "1080p"]},
}
HAILUO = VideoModel(DEFAULT_MODEL, None, HAILUO_FIELDS, required=("prompt",))


def words(name: str) -> set[str]:
    """The words in a field's name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def is_uri(prop: Property) -> bool:
    """True for a field that takes one file by its URL."""
    return prop.get("type") == "string" and prop.get("format") == "uri"


def is_first_picture(name: str, prop: Property) -> bool:
    """True for a file that can be the first picture; by its name, else by its description."""
    others = OTHER_WORDS | SPEECH_WORDS
    if not is_uri(prop) or words(name) & others:
        return False
    about = words(str(prop.get("description", "")))
    return bool(words(name) & PICTURE_WORDS) or bool(about & PICTURE_WORDS and not about & others)


# Everyone may publish a model: these keywords are read, if they are of this type, and no more than so many of the rest.
KEYWORD_TYPES: dict[str, Any] = {
    **dict.fromkeys(("type", "format", "description", "default", "deprecated", "$ref"), object),
    **dict.fromkeys(("enum", "allOf", "anyOf", "oneOf"), list),
    **dict.fromkeys(("minimum", "maximum"), (int, float)),
}


def resolved(schema: Any, schemas: Any, depth: int = 4) -> Property:
    """A property with what its `$ref`, `allOf`, `anyOf` and `oneOf` say: Replicate keeps enums there."""
    if not isinstance(schema, dict) or depth == 0:
        return {}
    whole = {key: schema[key] for key, kind in KEYWORD_TYPES.items() if key in schema and isinstance(schema[key], kind)}
    if isinstance(whole.get("type"), list):  # OpenAPI 3.1 writes nullable so
        whole["type"] = next((name for name in whole["type"] if name != "null"), None)
    parts = [part for key in ("allOf", "anyOf", "oneOf") for part in whole.get(key, ())]
    if "$ref" in whole:
        parts.append(schemas.get(str(whole["$ref"]).rsplit("/", 1)[-1]))
    for part in parts[:MAX_SCHEMA_PARTS]:
        more = resolved(part, schemas, depth - 1)
        if more.get("type") != "null":
            whole = {**more, **whole}
    return whole


def video_model(name: str, version: str | None, schemas: Any) -> VideoModel:
    """A model from the `components.schemas` that it publishes. Raises ProviderFailed if they are unreadable."""
    properties, required = (dig(schemas, "Input", key) for key in ("properties", "required"))
    if not isinstance(properties, dict) or len(properties) > MAX_SCHEMA_FIELDS:
        raise nonsense("replicate", f"an input schema of {name} that a person could fill in")
    fields = {field: resolved(prop, schemas) for field, prop in properties.items()}
    named = required if isinstance(required, list) else []
    return VideoModel(name, version, fields, tuple(field for field in named if isinstance(field, str)))


def fit_input(model: VideoModel, job: JobPromptOnly, audio_url: str | None = None) -> dict[str, Any]:
    """The input of a prediction: what the model takes of the job, written as the model writes it.

    A setting the client sent is used or refused, one it left out adapts, one the model lacks is left out.
    `audio_url` goes to a model that takes speech. Raises InvalidInput naming what is wrong, with the allowed values.
    """
    if model.picture_field is None:
        raise unfit("model", f"{model.name} takes no picture; choose an image-to-video model")
    ours = {model.picture_field: job.image_url, model.prompt_field: job.prompt, model.speech_field: audio_url}
    values: dict[str, Any] = {name: value for name, value in ours.items() if name and value}
    values |= {**length_input(model, job), **size_input(model, job)}
    defaults = {name: model.fields.get(name, {}).get("default") for name in model.required if name not in values}
    values |= {name: value for name, value in defaults.items() if value is not None}
    if missing := [name for name in model.required if name not in values]:
        who = "only /jobs_prompt_tts has" if missing == [model.speech_field] else "this service has nothing for"
        raise unfit("model", f"{model.name} needs {', '.join(missing)}, which {who}")
    if model is HAILUO and values["duration"] == 10 and values["resolution"] == "1080p":
        raise unfit("resolution", "with 10 seconds it can be 512p or 768p")
    return values


def length_input(model: VideoModel, job: JobPromptOnly) -> dict[str, Any]:
    """The field for the video's length, in seconds or frames; empty if the model has none."""
    for name in (*SECONDS_NAMES, *FRAMES_NAMES):
        prop = model.fields.get(name, {})
        options = {number: value for value in prop.get("enum") or () if (number := as_number(value)) is not None}
        if not options and prop.get("type") not in ("integer", "number"):
            continue
        about, smallest = words(str(prop.get("description", ""))), min(options, default=prop.get("minimum") or 0)
        # By its name, its description, or numbers too large for seconds.
        are_frames = name in FRAMES_NAMES or smallest > 60 or ("seconds" not in about and about & {"frame", "frames"})
        rate = frames_per_second(model) if are_frames else 1.0
        wanted = job.seconds * rate
        number = min(options, key=lambda n: (abs(n - wanted), n)) if options else clamped(wanted, prop)
        # A count of frames is seldom a whole number of seconds: the nearest will do.
        if "seconds" in job.model_fields_set and abs(number - wanted) > (rate / 2 if rate > 1 else 0):
            named = sorted({round(n / rate, 0 if rate > 1 else 3) for n in options})
            allowed = " or ".join(f"{seconds:g}" for seconds in named) or bounds(prop, rate)
            raise unfit("seconds", f"{model.name} takes {allowed}")
        return {name: options.get(number, number if prop.get("type") == "number" else round(number))}
    return {}


def as_number(value: Any) -> float | None:
    """A number, also from a text such as "5" or "5s"; None for anything else."""
    told = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:s|sec|seconds)?", str(value))
    return float(told[1]) if told else None


def frames_per_second(model: VideoModel) -> float:
    """The rate at which the model plays its frames, as its own setting defaults."""
    props = [model.fields.get(name, {}) for name in FPS_NAMES]
    told = (as_number(prop.get("default") or next(iter(prop.get("enum") or ()), None)) for prop in props)
    return next(filter(None, told), DEFAULT_FPS)


def clamped(number: float, prop: Property) -> float:
    """The number nearest to `number` between a field's bounds."""
    return float(max(prop.get("minimum", -math.inf), min(number, prop.get("maximum", math.inf))))


def size_input(model: VideoModel, job: JobPromptOnly) -> dict[str, Any]:
    """The field for the video's size: one the model lists, or within its bounds; empty if the model has none."""
    is_sent, wanted = "resolution" in job.model_fields_set, lines(job.resolution)
    for name in SIZE_NAMES:
        prop = model.fields.get(name, {})
        if options := [value for value in prop.get("enum") or () if lines(value)]:
            same = [value for value in options if str(value).casefold() == job.resolution.casefold()]
            nearest = min(options, key=lambda value: (abs(lines(value) - wanted), lines(value)))
            if is_sent and not same and lines(nearest) != wanted:
                raise unfit("resolution", f"{model.name} takes {' or '.join(map(str, options))}")
            return {name: same[0] if same else nearest}
        if "resolution" in name and "enum" not in prop and prop.get("type") in ("string", "integer"):
            if is_sent and prop["type"] == "integer" and (wanted == 0 or clamped(wanted, prop) != wanted):
                raise unfit("resolution", f"{model.name} takes {bounds(prop)}")
            return {name: job.resolution if prop["type"] == "string" else wanted} if is_sent else {}
    return {}


def bounds(prop: Property, rate: float = 1.0) -> str:
    """A field's bounds, for people, in units of which `rate` make one of the field's."""
    named = (("at least", "minimum"), ("at most", "maximum"))
    return " and ".join(f"{phrase} {prop[key] / rate:.0f}" for phrase, key in named if key in prop)


def lines(size: Any) -> int:
    """The lines of a picture size such as 768p, 4K, 1280x720 or 720; 0 if it is none."""
    told = str(size).casefold()
    if pair := re.fullmatch(r"(\d{2,5})\s*[x*×]\s*(\d{2,5})", told):
        return min(int(pair[1]), int(pair[2]))
    if thousands := re.fullmatch(r"(\d)k", told):
        return int(thousands[1]) * 540
    plain = re.match(r"(\d{3,4})p?\b", told)
    return int(plain[1]) if plain else 0


# ---- Replicate: picture -> video --------------------------------------------------------------------------------

FINAL_STATUSES = ("succeeded", "failed", "canceled", "aborted")


class Prediction(BaseModel):
    """What Replicate tells of one prediction; every other field is optional there."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    status: str
    output: Any = None
    error: Any = None
    logs: Any = None
    data_removed: Any = None

    @property
    def percent(self) -> int | None:
        """How far it is, where its log holds a progress bar."""
        told = re.findall(r"(?<![\d.])(\d{1,2}|100)(?:\.\d+)?%", str(self.logs)[-2000:])
        return int(told[-1]) if told else None

    @property
    def video_url(self) -> str | None:
        """The video: the first URL in the output, which is a text, a list or an object."""
        with suppress(RecursionError):  # as deep as nobody's video is
            told = json.dumps(self.output, ensure_ascii=False)
            for text in islice(re.finditer(r'(?i)"(https?://[^"\s\\]+)"(?!: )', told), MAX_OUTPUT_URLS):
                with suppress(ValueError):
                    return check_http_url(text[1])
        return None


def poll_delay_s(waited_s: float, polls: int, durations: Collection[float] = ()) -> float:
    """Seconds until the next read of a video, with `polls` of them open; `durations`: of the last ones of its kind."""
    delay_s = due_delay_s(waited_s, durations) if durations else min(waited_s * POLL_SHARE, POLL_MAX_S)
    return max(delay_s, get_settings().poll_min_seconds, polls * 60 / READS_PER_MINUTE)


def due_delay_s(waited_s: float, durations: Collection[float]) -> float:
    """Seconds until the next read of a video of a kind that took `durations` lately: seldom at first, often when due.

    Each duration stands for a Cauchy distribution, narrow with long tails for what was not seen yet. Where a video not
    ready is ready within a second with chance h, waits of sqrt(2 * READ_WORTH_S / h) find it soonest for their number.
    """
    around = [(known * DURATION_SPREAD, waited_s - known) for known in durations]
    unready = sum(math.atan2(spread, past) for spread, past in around)
    due = sum(spread / (spread**2 + past**2) for spread, past in around)
    # Failures come in the first seconds, and a video may be faster than all before.
    longest_s = min(POLL_MAX_S + waited_s, EARLY_SHARE * max(waited_s, min(durations)))
    return min(math.sqrt(2 * READ_WORTH_S * unready / due), longest_s)


async def call_replicate(method: str, path: str, retry: Retry, **options: Any) -> Answer:
    """One call to Replicate's API. Raises ProviderRefused (not of what is paid for), ProviderFailed, SettingMissing."""
    settings = get_settings()
    headers = {"Authorization": f"Bearer {settings.required('replicate_api_token')}", **options.pop("headers", {})}
    url = f"{settings.replicate_base_url}/v1/{path}"
    return await call("replicate", method, url, retry, headers=headers, **options)


def prediction_in(value: Any) -> Prediction | None:
    """The prediction that a JSON value holds, or None if it is none."""
    with suppress(ValidationError):
        return Prediction.model_validate(value)
    return None


async def find_model(name: str | None) -> VideoModel:
    """The model by its name, `owner/name` or `owner/name:version`, kept for ten minutes; None: the default model.

    Jobs that ask for one model at the same time share one look-up. Raises ProviderRefused (unknown), ProviderFailed.
    """
    if name is None or name == DEFAULT_MODEL:
        return HAILUO
    async with shared() as resources:
        if name not in resources.models:
            look_up = resources.models[name] = asyncio.create_task(look_up_model(name))
            forget = partial(resources.models.pop, name, None)
            look_up.add_done_callback(lambda done: forget() if done.cancelled() or done.exception() else None)
            asyncio.get_running_loop().call_later(MODEL_TTL_S, forget)
        return await asyncio.shield(resources.models[name])


async def look_up_model(name: str) -> VideoModel:
    """The model as Replicate describes it now, or that version of it; a community model runs by version only."""
    plain_name, _, version = name.partition(":")
    path = f"models/{plain_name}/versions/{version}" if version else f"models/{plain_name}"
    try:
        told = (await call_replicate("GET", path, MODEL_RETRY)).json()
    except ProviderRefused as exc:  # it does not repeat the name
        raise ProviderRefused(f"model {name}: {exc.detail}", "replicate").at("model", exc.detail) from exc
    latest = told if version else dig(told, "latest_version")
    is_official = not version and dig(told, "is_official") is True
    runs_by = name if version else dig(latest, "id")
    if not is_official and not isinstance(runs_by, str):
        raise nonsense("replicate", f"a version of {name}")
    schemas = dig(latest, "openapi_schema", "components", "schemas")
    return video_model(plain_name, None if is_official else runs_by, schemas)


async def hailuo_video_from_prompt(body: JobPromptOnly, job: Job | None = None) -> str:
    """The URL of a video made by the default model. Raises as run_prediction does."""
    return await replicate_video_from_prompt(body, job=job, model=HAILUO)


async def replicate_video_from_prompt(
    body: JobPromptOnly, audio_url: str | None = None, job: Job | None = None, model: VideoModel | None = None
) -> str:
    """The URL, good for an hour, of the video `job` has begun, else of a new one; `audio_url`: for a model that speaks.

    Raises ProviderRefused (also: failed, canceled, aborted, video gone), InvalidInput, ProviderFailed, SettingMissing.
    """
    job, model = job or Job("-"), model or await find_model(body.model)
    values = fit_input(model, body, audio_url)
    kind = str([model.name, *map(values.get, (*SECONDS_NAMES, *FRAMES_NAMES, *SIZE_NAMES))])
    try:
        if known := job.partial.prediction_id:
            hold_prediction(job, known)
            prediction, kind = await read_prediction(Prediction(id=known, status="starting")), ""
        else:
            prediction = await create_prediction(model, values, job)
            with anyio.move_on_after(patience_s(QUARTER), shield=True):
                await save_job(job, is_needed=False)
        prediction = await wait_for_prediction(prediction, job, kind)
    except asyncio.CancelledError:  # the prediction too, unless a request with the same key can go on with it
        if made := job.partial.prediction_id:
            if not job.note or time.monotonic() - job.started >= get_settings().job_timeout_seconds:
                await cancel_prediction(made)
        raise
    return video_of(prediction)


def video_of(prediction: Prediction) -> str:
    """The URL of the video of a prediction that has ended. Raises ProviderRefused, ProviderFailed."""
    if prediction.status != "succeeded":
        told = shortened(message_in(prediction.error)) or "no reason given"
        raise ProviderRefused(f"No video was made, the prediction ended as {prediction.status}: {told}", "replicate")
    if video_url := prediction.video_url:
        return video_url
    if prediction.data_removed:
        raise ProviderRefused("The video is gone: Replicate keeps it an hour. A new job makes a new one.", "replicate")
    raise ProviderFailed("The prediction succeeded, but Replicate tells no video.", "replicate", retryable=False)


async def create_prediction(model: VideoModel, values: dict[str, Any], job: Job) -> Prediction:
    """The job's one prediction, bought once, whatever happens: one that nobody heard of is looked for instead."""
    if job.lost and (found := await find_lost(model, values, job, *job.lost)):
        return found
    started = time.time()
    try:
        answer = await post_prediction(model, values, job)
        if made := prediction_in(answer.json()):
            return made
        raise nonsense("replicate", "a prediction; one may have been made")
    except ProviderRefused as exc:
        name_faults(model, exc)
        raise
    except ProviderFailed as exc:
        is_refused = exc.answer and exc.answer.status < 500 and exc.answer.status != 408
        if is_refused or isinstance(exc.__cause__, NOT_SENT):
            raise
        logger.warning("a prediction is looked for whose create failed: %s", exc.detail)
        with anyio.CancelScope(shield=not job.note):  # what is found is cancelled, if nobody waits or comes back for it
            if found := await find_lost(model, values, job, started, time.time() + patience_s(TWELFTH)):
                return found
        raise


def name_faults(model: VideoModel, error: ServiceError) -> None:
    """Say which fields of ours Replicate refuses: its `input.duration` is our `seconds`."""
    told = error.answer.json() if error.answer else None
    ours = {model.picture_field: "image_url", model.prompt_field: "prompt", model.speech_field: "text"}
    ours.update(dict.fromkeys([*SECONDS_NAMES, *FRAMES_NAMES], "seconds"), **dict.fromkeys(SIZE_NAMES, "resolution"))
    named = dig(told, "invalid_fields")
    for part in named if isinstance(named, list) else ():
        where, why = str(dig(part, "field")), str(dig(part, "description"))
        name = why.split(" ")[0] if where == "input" else where.removeprefix("input.")  # "prompt is required"
        if name in ours:
            error.at(ours[name], shortened(why))
    if error.answer and (error.answer.status == 404 or "version" in str(dig(told, "title"))):
        error.at("model", provider_message(error.answer))


async def post_prediction(model: VideoModel, values: dict[str, Any], job: Job) -> Answer:
    """Send the create; Replicate itself ends the prediction at the job's time limit."""
    path = "predictions" if model.version else f"models/{model.name}/predictions"
    body = {"input": values, **({"version": model.version} if model.version else {})}
    cancel_after_s = max(MIN_CANCEL_AFTER_S, round(get_settings().job_timeout_seconds))
    options: dict[str, Any] = {"headers": {"Cancel-After": f"{cancel_after_s}s"}, "timeout": CREATE_TIMEOUT}
    options |= {"perform": partial(create_exchange, job), "extensions": {FRESH: True}}
    return await call_replicate("POST", path, CREATE_RETRY, json=body, **options)


async def create_exchange(job: Job, client: httpx.AsyncClient, request: httpx.Request, limit: int) -> Answer:
    """One create. A cancelled job still waits for its answer: only that tells which prediction to cancel."""
    if job.note and time.time() - job.note.written > patience_s(QUARTER) / 3:  # throttled: tell other instances
        await save_job(job, is_needed=False)
    with anyio.CancelScope(shield=True):
        answer = await exchange(client, request, limit)
    if prediction := prediction_in(answer.json()):
        hold_prediction(job, prediction.id)
    return answer


def hold_prediction(job: Job, prediction_id: str) -> None:
    """Log the id of what is being paid for, and keep it in `partial` and Shared.held."""
    if job.partial.prediction_id != prediction_id:
        logger.info("prediction_id=%s", prediction_id)
        job.partial.prediction_id = prediction_id
    if _running is not None:
        _running.held.append((prediction_id, job.identity))


async def find_lost(
    model: VideoModel, values: dict[str, Any], job: Job, since: float, until: float
) -> Prediction | None:
    """A prediction of this input made since clock time `since` that no job holds; looked for once, and till `until`."""
    async with shared() as resources:
        while True:
            async for told in predictions_since(since):
                is_ours = dig(told, "model") == model.name and dig(told, "input") == values
                is_version = model.version is None or str(dig(told, "version")) in model.version
                if is_ours and is_version and (found := prediction_in(told)):
                    if all(known != found.id or whose == job.identity for known, whose in resources.held):
                        hold_prediction(job, found.id)  # before anybody else looks
                        return found
            if time.time() >= until:
                return None
            await asyncio.sleep(patience_s(TWELFTH) / 10)


async def predictions_since(moment: float) -> AsyncIterator[Any]:
    """The account's predictions, newest first: Replicate lists a hundred a page (docs predictions.list)."""
    after = datetime.fromtimestamp(moment - CLOCK_SKEW_S, timezone.utc).isoformat()
    options: dict[str, Any] = {"params": {"created_after": after}}
    base, path = f"{get_settings().replicate_base_url}/v1/", "predictions"
    for _ in range(MAX_LIST_PAGES):
        page = (await call_replicate("GET", path, LIST_RETRY, limit=MAX_PREDICTION_BYTES, **options)).json()
        listed, following = dig(page, "results"), str(dig(page, "next"))
        for told in listed if isinstance(listed, list) else ():
            yield told
        if not following.startswith(base):
            return
        path, options = following.removeprefix(base), {}


async def read_prediction(prediction: Prediction) -> Prediction:
    """The prediction as it is now; as it was, if what comes is none, since it is read again."""
    answer = await call_replicate("GET", f"predictions/{prediction.id}", READ_RETRY, limit=MAX_PREDICTION_BYTES)
    return prediction_in(answer.json()) or prediction


async def wait_for_prediction(prediction: Prediction, job: Job, kind: str = "") -> Prediction:
    """Read a prediction until it has ended, and remember how long videos of its `kind` take (empty: begun elsewhere)."""
    started = time.monotonic()
    async with shared() as resources:
        resources.polls += 1
        try:
            while True:
                job.tell("progress", status=prediction.status, percent=prediction.percent)
                if prediction.status in FINAL_STATUSES:
                    break
                durations = resources.durations.get(kind, ())
                delay_s = poll_delay_s(time.monotonic() - started, resources.polls, durations)
                # Jobs that began together drift apart, so that their reads do not come in bursts.
                await asyncio.sleep(delay_s * random.uniform(0.9, 1.1))
                prediction = await read_prediction(prediction)
        finally:
            resources.polls -= 1
        if kind and prediction.status == "succeeded":
            resources.durations.setdefault(kind, deque(maxlen=KEPT_DURATIONS)).append(time.monotonic() - started)
    return prediction


async def cancel_prediction(prediction_id: str) -> None:
    """Stop paying for a prediction that nobody waits for any more, whatever else ends; what fails is logged."""
    try:
        with anyio.CancelScope(shield=True), anyio.fail_after(patience_s(QUARTER)):
            await call_replicate("POST", f"predictions/{prediction_id}/cancel", CANCEL_RETRY)
        logger.info("prediction_id=%s cancelled", prediction_id)
    except (ServiceError, TimeoutError) as exc:
        logger.warning("prediction_id=%s not cancelled: %s", prediction_id, str(exc) or "no answer in time")


# ---- ffmpeg: video + speech -> talking video ---------------------------------------------------------------------


@lru_cache(maxsize=1)
def ffmpeg_path() -> str:
    """The ffmpeg that imageio-ffmpeg brings, or IMAGEIO_FFMPEG_EXE. Raises RuntimeError where there is none."""
    path = str(imageio_ffmpeg.get_ffmpeg_exe())  # tries its own, but not the variable's
    if (found := shutil.which(path)) is None:
        raise RuntimeError(f"There is no ffmpeg at {path}; is IMAGEIO_FFMPEG_EXE right?")
    return os.path.abspath(found)  # it runs without a PATH


def mux_arguments(video: Path, speech: Path, demuxer: str, fit: Fit, final: Path) -> list[str]:
    """ffmpeg's arguments: the video's frames as they are, our speech half a second in, ended as `fit` says."""
    delay = f"adelay={SPEECH_DELAY_MS}:all=1"
    # The demuxer is forced and only files are opened: a playlist named .mp4 stays noise.
    local_only = ["-protocol_whitelist", "file"]
    return [
        *("-hide_banner", "-nostdin", "-y", "-v", "error"),
        *("-max_alloc", str(FFMPEG_MAX_ALLOC_BYTES), "-filter_threads", "1"),
        *(("-stream_loop", "-1") if fit == "speech" else ()),
        *(*local_only, "-threads", "1", "-f", "mov", "-i", f"file:{video}"),
        *(*local_only, "-threads", "1", "-f", demuxer, "-i", f"file:{speech}"),
        *("-map", "0:V:0", "-map", "1:a:0"),  # the model's frames and our speech, whatever else the video brings
        *("-c:v", "copy", "-c:a", "aac", "-b:a", "96k", "-threads", "1"),
        *("-aac_coder", "fast"),  # a voice is 39 dB over its error; by default 29 dB at 128k, for 1.6 times the CPU
        *("-af", f"{delay},apad" if fit == "video" else delay),
        # By default what is copied may run ten seconds ahead, and then ends where it is, not with the shortest.
        *("-shortest", "-shortest_buf_duration", "3600"),
        *("-fs", str(MAX_DOWNLOAD_BYTES + 1)),  # a short video that is heavy would grow without end as it repeats
        *("-movflags", "+faststart", "-f", "mp4", f"file:{final}"),
    ]


async def mux_video_audio(video: Path, speech: Path, final: Path, fit: Fit = "shortest") -> None:
    """Put speech (in TTS_OUTPUT_FORMAT) and video together. Raises ResourceFailed, also over a minute or 100 MB."""
    await asyncio.to_thread(check_video, video)
    arguments = mux_arguments(video, speech, speech_format().extension, fit, final)
    async with shared() as resources, resources.ffmpeg_slots:
        await run_ffmpeg(arguments, FFMPEG_TIMEOUT_S)
    check_size(os.path.getsize(final), "The talking video")  # noqa: ASYNC240  a moment; ffmpeg has stopped there


async def run_ffmpeg(arguments: list[str], timeout_s: float) -> None:
    """Run ffmpeg to its end; it is killed and reaped however this call ends. Raises ResourceFailed, OSError."""
    command, tail = [await asyncio.to_thread(ffmpeg_path), *arguments], b""
    # It needs no key, and Ctrl-C in a terminal is for the service, which lets jobs finish.
    apart: dict[str, Any] = {"stdin": DEVNULL, "stdout": DEVNULL, "env": {}, "start_new_session": True}
    async with await anyio.open_process(command, **apart) as process:
        assert process.stderr is not None
        try:
            with anyio.fail_after(timeout_s):
                async for chunk in process.stderr:
                    tail = (tail + chunk)[-1000:]  # noise without end is not kept
                await process.wait()
        except BaseException as exc:
            with suppress(ProcessLookupError):
                process.kill()
            if isinstance(exc, TimeoutError):
                raise ResourceFailed(f"The video could not be put together within {timeout_s:g} s.") from exc
            raise
    if process.returncode != 0:
        told = " | ".join(tail.decode("utf-8", "replace").split("\n")).strip(" |")
        logger.warning("ffmpeg ended with %s: %s", process.returncode, told)
        if os.strerror(errno.ENOSPC) in told:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        message = "Video and speech could not be put together; ffmpeg cannot use one of them."
        raise ResourceFailed(message, retryable=False)


def check_video(video: Path) -> None:
    """Refuse a file that is no MP4, or breaks off; ffmpeg would make a shorter video of it. Raises ResourceFailed."""
    first_boxes = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip")  # QuickTime's may begin without ftyp
    size, offset = video.stat().st_size, 0
    with video.open("rb") as file:
        for _ in range(MAX_BOXES):
            if offset >= size:
                break
            file.seek(offset)
            length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            if offset == 0 and name not in first_boxes:
                raise ResourceFailed("What the model made is not an MP4 video.", "replicate", retryable=False)
            # ISO/IEC 14496-12: 0 is a box to the file's end, 1 one whose length follows.
            offset = size if length == 0 else offset + max(8, long_length if length == 1 else length)
    if offset != size or size == 0:
        raise ResourceFailed("The video that the model made breaks off.", "replicate", retryable=False)


# ---- Application -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold what the jobs share for the life of the process; at its end, wait for the answers of cancelled jobs."""
    global _running
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():  # whoever runs the service may have set up logging already
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    if missing := [name.upper() for name in SPEECH_JOB_SETTINGS if getattr(get_settings(), name) is None]:
        logger.warning("not set: %s; requests that need them are answered 500", ", ".join(missing))
    await asyncio.to_thread(ffmpeg_path)  # fails here rather than after a video was paid for
    async with shared() as _running:
        try:
            yield
        finally:
            await end_jobs(_running)
            _running = None


async def end_jobs(resources: Shared) -> None:
    """Stop the jobs that still run, those with a key after a while: the next request goes on with them."""
    # uvicorn has just cancelled the requests still running, and with them their jobs; but not all can hear of that.
    started = time.monotonic()
    while (resources.requests or resources.jobs) and time.monotonic() - started < SHUTDOWN_WAIT_S:
        for job in resources.jobs.values():
            if not job.note or time.monotonic() - started > patience_s(SIXTH):
                job.stop("shutdown")
        await asyncio.sleep(0.05)


@dataclass(frozen=True)
class JobMiddleware:
    """The outermost layer: each request gets its Job, each answer X-Request-ID and Server-Timing."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["job"] = Job(request_id, identity=uuid.uuid4().hex)
        current_request_id.set(request_id)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if timings := scope["state"]["job"].timings.items():  # of the job that it may have joined
                    headers["Server-Timing"] = ", ".join(f"{name};dur={s * 1000:.1f}" for name, s in timings)
            await send(message)

        async with shared() as resources:
            resources.requests += 1
            try:
                await self.app(scope, receive, send_with_headers)
            finally:
                resources.requests -= 1


class BoundedRequest(Request):
    """A request whose body has at most MAX_REQUEST_BYTES; a longer one is not even read, if its length is told."""

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The pieces of the body. Raises HTTPException."""
        too_large = HTTPException(400, f"The request's body is larger than {MAX_REQUEST_BYTES // 1024} KiB")
        told, size = self.headers.get("content-length", ""), 0
        if told.isdecimal() and int(told) > MAX_REQUEST_BYTES:
            raise too_large
        async for piece in super().stream():
            if (size := size + len(piece)) > MAX_REQUEST_BYTES:
                raise too_large
            yield piece


def error_response(request: Request, error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for an error."""
    return JSONResponse(request.state.job.error_json(error), error.http_status, headers)


class Route(APIRoute):
    """A route whose errors, unforeseen ones included, are answered inside CORS: Starlette's last handler is outside."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's own, and what it raises told as our error."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(BoundedRequest(request.scope, request.receive))
            except (RequestValidationError, HTTPException):
                raise
            except Exception as exc:  # noqa: BLE001  the last resort: logged, and told without inside detail
                return error_response(request, as_service_error(exc))

        return answer


# Pydantic's types of faults, in words without a library's.
FAULTS_IN_WORDS = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "should be a JSON object"),
    "missing": "is needed",
    "string_type": "should be a text",
    "string_too_short": "should not be blank",
    "string_too_long": "should have at most {max_length} characters",
    "int_type": "should be a whole number",
    "greater_than_equal": "should be at least {ge}",
    "less_than_equal": "should be at most {le}",
    "literal_error": "should be {expected}",
    "json_invalid": "is no valid JSON",
}


def in_words(fault: Mapping[str, Any]) -> str:
    """What is wrong, for people: without regular expressions and the words of libraries."""
    context = fault.get("ctx", {})
    told = PATTERNS_IN_WORDS.get(context.get("pattern")) or FAULTS_IN_WORDS.get(fault["type"], "").format(**context)
    return told or str(fault["msg"]).removeprefix("Value error, ")


async def answer_invalid(request: Request, exc: RequestValidationError) -> Response:
    """A body that is not as the route wants it."""
    faults = [InputError(loc=list(fault["loc"]), msg=in_words(fault)) for fault in exc.errors()]
    name = ".".join(part for part in faults[0].loc[1:] if isinstance(part, str)) or "The body"
    detail = f"{name}: {faults[0].msg}."
    if not re.match(r"application/([\w.-]+\+)?json\b", request.headers.get("content-type", ""), re.IGNORECASE):
        detail = "The body must be JSON, sent with Content-Type: application/json."
    error = InvalidInput(detail)
    error.errors = faults
    return error_response(request, error)


async def answer_http_error(request: Request, exc: HTTPException) -> Response:
    """What the framework refuses: no such route (404), no such method (405), a body it cannot parse (400)."""
    error = InvalidInput("There is no such route; /docs has them all." if exc.status_code == 404 else f"{exc.detail}.")
    error.http_status = exc.status_code
    return error_response(request, error, exc.headers)


app = FastAPI(
    title="Talking Pet",
    summary="A picture of a pet and a line of text go in, a video in which the pet says it comes out.",
    lifespan=lifespan,
    redirect_slashes=False,  # a 307 is no answer of this service; it would name http:// behind a proxy
)
app.router.route_class = Route
app.exception_handler(RequestValidationError)(answer_invalid)
app.exception_handler(HTTPException)(answer_http_error)
# The last one added is the outermost.
app.add_middleware(
    CORSMiddleware,
    allow_origins=get_settings().allowed_origin.split(","),
    allow_methods=["GET", "POST"],
    allow_headers=["*"],
    expose_headers=["X-Request-ID", "Server-Timing", "Idempotency-Replayed"],
)
app.add_middleware(JobMiddleware)


# ---- Running a job: its deadline, a client that leaves, its two forms of answer --------------------------------

Body = TypeVar("Body", bound=JobPromptOnly)
Work = Callable[[Body, Job], Awaitable[BaseModel]]


async def answer_job(request: Request, body: Body, key: str | None, work: Work[Body]) -> Response:
    """Run a job, or join the one that runs with this key, and answer as the client asked: JSON, or events."""
    job = await start_job(request, body, key, work)
    is_stream, events = prefers_events(request.headers.get("accept", "")), job.listen()
    leaving = asyncio.create_task(client_left(request, job, events))  # Starlette cancels no plain handler by itself
    if job.task:
        job.task.add_done_callback(lambda _: leaving.cancel())
    while (part := await next_part(job, events)) and not is_stream:
        pass  # JSON waits for the end, where part is None; a stream for its first part only
    if part is None and not isinstance(job.result, BaseModel):  # an error before any event is a plain one
        raise job.result or ServiceError("The client has left.")
    headers = {"Idempotency-Replayed": "true"} if job.note and job.note.answer and not job.timings else {}
    if isinstance(job.result, BaseModel) and not is_stream:
        return Response(job.result.model_dump_json(), media_type="application/json", headers=headers)
    headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx: pass them on at once
    return JobEvents(job_events(job, part, events), headers=headers)


def prefers_events(accept: str) -> bool:
    """True if an Accept header names an event stream, and JSON with no higher quality (RFC 9110, 12.5.1)."""
    qualities = dict[str, float]()
    for name, _, rest in (part.partition(";") for part in re.sub(r"\s", "", accept.lower()).split(",")):
        told = re.search(r"(?:^|;)q=([01](?:\.\d{0,3})?)", rest)
        qualities[name] = float(told[1]) if told else 1.0
    for_json = [qualities[name] for name in ("application/json", "application/*", "*/*") if name in qualities]
    return qualities.get("text/event-stream", 0) >= max([0.001, *for_json[:1]])


async def start_job(request: Request, body: Body, key: str | None, work: Work[Body]) -> Job:
    """The job of a request: a new one, or the one that runs with the same key already. Raises InvalidInput."""
    job: Job = request.state.job
    async with shared() as resources:
        if key:
            job.note, job.identity = new_note(request.url.path, body), f"jobs/{keyed_digest(key)}.json"
        running = resources.jobs.setdefault(job.identity, job)
        if running.note and job.note and running.note.body != job.note.body:
            raise unfit("Idempotency-Key", OTHER_BODY, "header")
        if running is not job:
            logger.info("joins the job of request_id=%s", running.request_id)
            request.state.job = running
            return running
        doing = with_key(job, lambda: work(body, job)) if key else work(body, job)
        job.task = asyncio.create_task(run_job(job, doing, resources))
    return job


async def run_job(job: Job, doing: Awaitable[BaseModel], resources: Shared) -> None:
    """Bring a job to its end, in a task of its own: a result, or the error to tell to all who wait for it."""
    try:
        with job.scope, anyio.move_on_after(get_settings().job_timeout_seconds):
            job.result = await doing
    except Exception as exc:  # noqa: BLE001  whatever happened is told
        job.result = as_service_error(exc)
    finally:
        job.result = job.result or job.unfinished()
        resources.jobs.pop(job.identity, None)  # from now on only its file tells of it
        job.end()


async def client_left(request: Request, job: Job, events: Events) -> None:
    """When the client has closed the connection, stop its job; one with a key goes on, only its events end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    if job.note:
        events.put_nowait(None)
    else:
        job.stop("left")


class JobEvents(EventSourceResponse):
    """FastAPI's event stream, whose client is watched by `client_left`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events to the last one, also when the process is ending."""
        await self.stream_response(send)


async def job_events(job: Job, part: bytes | None, events: Events) -> AsyncIterator[bytes]:
    """Every stage event, comments while there is none, and exactly one `result` or `error` at the end."""
    while part:
        yield part
        part = await next_part(job, events)
    result = job.result
    if isinstance(result, ServiceError):
        body = {**job.error_json(result), "status": result.http_status}
        yield format_sse_event(event="error", data_str=json.dumps(body, separators=(",", ":"), ensure_ascii=False))
    elif result:
        yield format_sse_event(event="result", data_str=result.model_dump_json())


async def next_part(job: Job, events: Events) -> bytes | None:
    """The next stage event as it is sent, a comment if there is none for KEEPALIVE_SECONDS, None after the last."""
    try:
        with anyio.move_on_after(get_settings().keepalive_seconds):
            event = await events.get()
            return format_sse_event(event="stage", data_str=event.model_dump_json(exclude_none=True)) if event else None
    except asyncio.CancelledError:  # by uvicorn, as the process ends: what becomes of the job is still told
        job.stop("shutdown")
    return KEEPALIVE_COMMENT


# ---- The two jobs: a step whose result an earlier request has left is skipped ----------------------------------


async def video_job(body: JobPromptOnly, job: Job) -> VideoResult:
    """A silent video."""
    model = await check_job(body, job, ("replicate_api_token",))
    return VideoResult(video_url=await animate(body, model, job))


async def speech_job(body: JobPromptTTS, job: Job) -> SpeechResult:
    """A talking video: the cheap step comes first, so that a bad text, voice, bucket or disk costs no video."""
    if len(body.text) > (most := get_settings().tts_max_chars):
        raise unfit("text", f"has {len(body.text)} characters, at most {most} are spoken")
    model = await check_job(body, job, SPEECH_JOB_SETTINGS, audio_url="made in a moment")
    with tempfile.TemporaryDirectory(prefix="talking-pet-") as name:
        folder = Path(name)
        audio_url = await speak(body, job, folder / "speech")
        video_url = await animate(body, model, job, audio_url)
        final = folder / "video.mp4"
        with job.stage("download"):
            await download(video_url, final)
            await asyncio.to_thread(check_video, final)
        if not model.speech_field:  # else the video speaks by itself
            with job.stage("mux"):
                silent, final = final, folder / "talking.mp4"
                await mux_video_audio(silent, folder / "speech", final, body.fit)
        with job.stage("final_upload"):
            final_url = await supabase_upload(f"videos/{uuid.uuid4()}.mp4", final, "video/mp4", PAID_STORE_RETRY)
    return SpeechResult(audio_url=audio_url, video_url=video_url, final_url=final_url)


async def check_job(
    body: JobPromptOnly, job: Job, settings: Collection[str], audio_url: str | None = None
) -> VideoModel:
    """Refuse, before anything is bought, what cannot succeed; returns the model that is asked for."""
    for name in settings:
        get_settings().required(name)
    model = await find_model(body.model)
    fit_input(model, body, audio_url)
    if job.partial.prediction_id is None:
        await check_picture(body.image_url)
    return model


async def speak(body: JobPromptTTS, job: Job, speech: Path) -> str:
    """Have the text spoken and return the speech's URL, from which it is fetched as everybody would."""
    audio_url, spoken = job.partial.audio_url, b""
    if audio_url is None:
        with job.stage("speech"):
            spoken = await elevenlabs_tts_bytes(body.text, body.voice_id)
    with job.stage("audio_upload"):
        if audio_url is None:
            kept_as = speech_format()
            audio_path = f"audio/{uuid.uuid4()}.{kept_as.extension}"
            audio_url = job.partial.audio_url = await supabase_upload(audio_path, spoken, kept_as.content_type)
        try:
            await download(audio_url, speech, FETCH_RETRY)
        except ResourceFailed as exc:
            if exc.answer and meant_status(exc.answer) in (400, 401, 403, 404):
                bucket = f"make it so, or change SUPABASE_BUCKET={get_settings().supabase_bucket}"
                exc.detail = f"The speech was stored, but the bucket is not public: {bucket}. {exc.detail}"
                exc.provider, exc.retryable = "supabase", False
            raise
        if spoken and os.path.getsize(speech) != len(spoken):  # noqa: ASYNC240
            message = "The speech's public address answers with something else; is SUPABASE_URL right?"
            raise ResourceFailed(message, "supabase", retryable=False)
    return audio_url


async def animate(body: JobPromptOnly, model: VideoModel, job: Job, audio_url: str | None = None) -> str:
    """Have the video made, unless the job's file names one meanwhile, and return its URL."""
    with job.stage("video"):
        if (note := await found_note(job)) and note.writer != PROCESS_ID:
            adopt(job, note)  # another instance has taken the job meanwhile
            job.partial.audio_url = audio_url
        elif audio_url:
            await save_job(job)
        video_url = await replicate_video_from_prompt(body, audio_url, job, model)
    job.partial.video_url = video_url
    return video_url


# ---- Routes ----------------------------------------------------------------------------------------------------

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot succeed as it stands", "model": ErrorBody},
    500: {"description": "The service or a provider failed; `partial` holds what was made", "model": ErrorBody},
    "default": {"description": "No such route or method", "model": ErrorBody},
}
VIDEO_URL = "https://replicate.delivery/xezq/video.mp4"
SPEECH_URL = EXAMPLE_PICTURE.replace("pet.jpg", "audio/0b1f3a52-8d6e-4c6f-9a53-2f4f3c1f7a10.mp3")
TALKING_URL = EXAMPLE_PICTURE.replace("pet.jpg", "videos/5e0f9d0c-7f0b-4a39-9c1c-7f1f1f0f2b11.mp4")
EXAMPLE_SPEECH = SpeechResult(audio_url=SPEECH_URL, video_url=VIDEO_URL, final_url=TALKING_URL)
EVENTS_TEXT = """With `Accept: text/event-stream`: `stage` events as the job goes on, comments while nothing happens,
then one `result` (the JSON body) or one `error` (the error body and `status`)."""


def job_answers(example: BaseModel) -> dict[int | str, dict[str, Any]]:
    """How a job's two forms of answer, and its errors, stand in /docs."""
    event = StageEvent(stage="video", state="progress", seconds=12.5, status="processing", percent=40)
    told = (("stage", event), ("result", example))
    text = "".join(f"event: {name}\ndata: {data.model_dump_json(exclude_none=True)}\n\n" for name, data in told)
    kinds = [{"$ref": f"#/components/schemas/{kind}"} for kind in ("StageEvent", type(example).__name__, "ErrorEvent")]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    fields = {"event": {"type": "string", "enum": ["stage", "result", "error"]}, "data": data}
    item = {"type": "object", "description": EVENTS_TEXT, "required": [*fields], "properties": fields}
    stream = {"itemSchema": item, "example": text}  # an event, described as FastAPI describes them
    good = {"content": {"application/json": {"example": example.model_dump()}, "text/event-stream": stream}}
    return {200: good, **ERRORS}


KEY_IN_WORDS = "One for each job. Send the same request with it until there is an answer: one video is bought."
KEY_EXAMPLE = "8e03978e-40d5-43e8-bc93-6894a57f9324"
IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", pattern=KEY_PATTERN, description=KEY_IN_WORDS, examples=[KEY_EXAMPLE])
]


@app.head("/health", include_in_schema=False)
@app.get("/health", summary="Is the process up?")
async def health() -> dict[Literal["ok"], bool]:
    """Answers at once, whatever else goes on."""
    return {"ok": True}


@app.post("/jobs_prompt_only", response_model=VideoResult, responses=job_answers(VideoResult(video_url=VIDEO_URL)))
async def jobs_prompt_only(body: JobPromptOnly, request: Request, key: IdempotencyKey = None) -> Response:
    """Bring a picture to life: a silent video from a picture and a prompt."""
    return await answer_job(request, body, key, video_job)


@app.post("/jobs_prompt_tts", response_model=SpeechResult, responses=job_answers(EXAMPLE_SPEECH))
async def jobs_prompt_tts(body: JobPromptTTS, request: Request, key: IdempotencyKey = None) -> Response:
    """Make a picture talk: a video in which the picture says a text."""
    return await answer_job(request, body, key, speech_job)


@app.post("/debug/head", responses=ERRORS)
async def debug_head(body: HeadRequest) -> HeadResult:
    """Look at a remote file: status, content type and size of a file on the public internet."""
    return await head(body.url, HEAD_TIMEOUT_S)


def openapi() -> dict[str, Any]:
    """The contract, with the events of a stream beside the bodies."""
    contract = FastAPI.openapi(app)
    for event in (StageEvent, ErrorEvent):
        schema = event.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)  # they stand beside it already
        contract["components"]["schemas"][event.__name__] = schema
    return contract


app.openapi = openapi  # type: ignore[method-assign]
