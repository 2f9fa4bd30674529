"""Talking Pet: a picture of a pet and a line of text go in, a video in which the pet says it comes out.

One synchronous FastAPI service. A front end POSTs a job, waits, and gets the URLs in the answer:

    POST /jobs_prompt_only   picture + prompt         -> video_url
    POST /jobs_prompt_tts    picture + prompt + text  -> audio_url, video_url, final_url
    POST /debug/head         url                      -> status, content type and size of a remote file
    GET  /health                                      -> {"ok": true}

A speech job, in sequence: ElevenLabs speaks the text, Supabase Storage keeps the speech, Replicate animates the
picture, ffmpeg puts speech and film together, Supabase Storage keeps the result. With `Accept: text/event-stream`
the same request is answered as events, so that the wait is visible.

Run it:      uvicorn main:app              (the keys: see .env.example)
Without keys: python -m tests.sandbox      (the three providers as local stand-ins)
"""

import asyncio
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
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote
from weakref import WeakValueDictionary

import httpcore
import httpx
import imageio_ffmpeg  # type: ignore[import-untyped]
from dotenv import dotenv_values
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

current_request_id: ContextVar[str] = ContextVar("request_id", default="-")


class RequestLogger(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic since Python 3.11
    """Begins each line with the id of the request it belongs to."""

    def process(self, msg: str, kwargs: Any) -> tuple[str, Any]:
        """The line with its id."""
        return f"request_id={current_request_id.get()} {msg}", kwargs


logger = RequestLogger(logging.getLogger("talking_pet"), {})

# ----------------------------------------------------------------------------------------------------------------
# Limits and timings
# ----------------------------------------------------------------------------------------------------------------

MAX_REQUEST_BYTES = 64 * 1024
MAX_SPEECH_BYTES = 9_500_000
MAX_DOWNLOAD_BYTES = 100_000_000  # a talking film has no more either
MAX_ANSWER_BYTES = 2_000_000  # of a provider's JSON answer; the largest model schemas have some 100 kB
MAX_DETAIL_CHARS = 300  # of a provider's own message that is passed on
CHUNK_BYTES = 64 * 1024  # read from disk, or from a child, at a time

# Seconds of silence on a connection, not of a whole call.
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
SPEECH_TIMEOUT = httpx.Timeout(120.0, connect=10.0)  # ElevenLabs answers when all is spoken
MAX_RETRY_WAIT_S = 30.0  # a provider that asks for more is not waited for
MAX_BACKOFF_S = 8.0  # RETRY_FIRST_SECONDS doubles up to this: 0.5 s, 1 s, 2 s, 4 s, 8 s, 8 s ...

POLL_SHARE = 0.025  # a wait between two reads, as a share of the time waited so far
POLL_MAX_S = 2.0
READS_PER_MINUTE = 2_400  # of one process; Replicate allows 3,000 (docs rate-limits, read 2026-11-22)
CANCEL_AFTER_S = (5, 86_400)  # what Replicate's Cancel-After takes (changelog 2025-10-16)
CANCEL_TIMEOUT_S = 5.0
MODEL_TTL_S = 600.0
DEFAULT_FPS = 24.0  # where a model counts frames and names no rate

SPEECH_DELAY_MS = 500
FFMPEG_TIMEOUT_S = 60.0
MAX_FFMPEG = 4  # at once, and no more than cores: a container sees those of its host, and each takes some 50 MB
FFMPEG_MAX_ALLOC_BYTES = 64_000_000  # one allocation; a plane of a film's frame has less, of a 16K one more

HEAD_TIMEOUT_S = 10.0
MAX_REDIRECTS = 5
SHUTDOWN_WAIT_S = 15.0  # for the answers of jobs that uvicorn has just cancelled

# ----------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------

# ElevenLabs' OpenAPI document, parameter output_format (copy of 2026-08-22).
TtsOutputFormat = Literal[
    "mp3_22050_32", "mp3_24000_48", "mp3_44100_32", "mp3_44100_64", "mp3_44100_96", "mp3_44100_128", "mp3_44100_192",
    "opus_48000_32", "opus_48000_64", "opus_48000_96", "opus_48000_128", "opus_48000_192",
    "pcm_8000", "pcm_16000", "pcm_22050", "pcm_24000", "pcm_32000", "pcm_44100", "pcm_48000",
    "wav_8000", "wav_16000", "wav_22050", "wav_24000", "wav_32000", "wav_44100", "wav_48000",
    "ulaw_8000", "alaw_8000",
]  # fmt: skip


def check_http_url(value: str) -> str:
    """The URL as it is. Raises ValueError if it is not an absolute http(s) URL."""
    with suppress(httpx.InvalidURL, ValueError):
        url = httpx.URL(value)
        if url.scheme in ("http", "https") and url.host and not re.search(r"[\s\\]", value):
            return value
    raise ValueError("should be an absolute http(s) URL")


def check_base_url(value: str) -> str:
    """The URL as httpx writes it, without a slash at its end. Raises ValueError if it is no absolute http(s) URL."""
    with suppress(httpx.InvalidURL, ValueError):
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


class Settings(BaseModel):
    """What the environment says; each field is the variable of the same name in capitals."""

    model_config = ConfigDict(frozen=True)

    eleven_api_key: Key | None = None
    replicate_api_token: Key | None = None
    supabase_url: BaseUrl | None = None
    supabase_service_role: Key | None = None
    supabase_bucket: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "pets"
    allowed_origin: Annotated[str, AfterValidator(check_origins)] = "*"
    tts_output_format: TtsOutputFormat = "mp3_44100_64"
    tts_max_chars: Annotated[int, Field(ge=1)] = 600
    job_timeout_seconds: Annotated[float, Field(ge=1, le=86_400)] = 600
    eleven_base_url: BaseUrl = "https://api.elevenlabs.io"
    replicate_base_url: BaseUrl = "https://api.replicate.com"
    allow_private_urls: bool = False
    poll_min_seconds: Annotated[float, Field(gt=0, le=2)] = 0.25
    retry_first_seconds: Annotated[float, Field(gt=0, le=10)] = 0.5
    keepalive_seconds: Annotated[float, Field(gt=0, le=15)] = 10

    def required(self, name: str) -> str:
        """The value of a setting that a call cannot do without. Raises SettingMissing naming the variable."""
        value = getattr(self, name)
        if value is None:
            raise SettingMissing(f"The service is not set up for this: set {name.upper()}.")
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)

    def missing(self) -> list[str]:
        """The variables without which not every route works."""
        return [name.upper() for name in SPEECH_JOB_SETTINGS if getattr(self, name) is None]

    def secrets(self) -> list[str]:
        """Every key, to take them out of texts."""
        return [value.get_secret_value() for _, value in self if isinstance(value, SecretStr)]


VIDEO_JOB_SETTINGS = ("replicate_api_token",)
SPEECH_JOB_SETTINGS = ("eleven_api_key", *VIDEO_JOB_SETTINGS, "supabase_url", "supabase_service_role")


def read_settings(environment: Mapping[str, str | None]) -> Settings:
    """Settings from variables; an empty one counts as unset. Raises ValueError naming variable and value."""
    texts = {name: (environment.get(name.upper()) or "").strip() for name in Settings.model_fields}
    try:
        return Settings.model_validate({name: text for name, text in texts.items() if text})
    except ValidationError as exc:
        first = exc.errors()[0]
        name = str(first["loc"][0])
        is_secret = Settings.model_fields[name].annotation == Key | None
        shown = "(not shown)" if is_secret else repr(texts[name])
        raise ValueError(f"{name.upper()}={shown}: {plain(first['msg'])}") from None


def plain(message: str) -> str:
    """Pydantic's message without what it puts before our own."""
    return message.removeprefix("Value error, ")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process: the environment, then `.env` beside this file. Ends the process if malformed."""
    try:
        return read_settings({**dotenv_values(Path(__file__).with_name(".env")), **os.environ})
    except ValueError as exc:
        raise SystemExit(str(exc)) from None


# ----------------------------------------------------------------------------------------------------------------
# Models: what a request holds, what an answer holds
# ----------------------------------------------------------------------------------------------------------------

Provider = Literal["elevenlabs", "replicate", "supabase"]
Category = Literal["configuration", "validation", "provider", "resource", "internal"]
Stage = Literal["speech", "audio_upload", "video", "download", "mux", "final_upload"]
Fit = Literal["shortest", "video", "speech"]

EXAMPLE_PICTURE = (
    f"{get_settings().supabase_url or 'https://your-project.supabase.co'}"
    f"/storage/v1/object/public/{get_settings().supabase_bucket}/pet.jpg"
)


HttpUrl = Annotated[
    str,
    StringConstraints(strict=True, max_length=4096),
    AfterValidator(check_http_url),
    Field(json_schema_extra={"format": "uri"}),
]
MODEL_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9]+)?$"
VOICE_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
SIZE_PATTERN = r"^[A-Za-z0-9]{1,16}$"
PATTERNS_IN_WORDS = {
    MODEL_PATTERN: "should be owner/name or owner/name:version",
    VOICE_PATTERN: "should be up to 64 letters, digits, _ and -",
    SIZE_PATTERN: "should be a size such as 768p",
}
NonBlank = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]


class JobPromptOnly(BaseModel):
    """A picture to bring to life."""

    image_url: HttpUrl = Field(description="Public address of the picture", examples=[EXAMPLE_PICTURE])
    prompt: NonBlank = Field(description="What should happen", examples=["The dog looks up and talks"])
    seconds: int = Field(
        default=6, strict=True, ge=1, le=600, description="Length of the film; the default model: 6 or 10"
    )
    resolution: Annotated[str, StringConstraints(strict=True, pattern=SIZE_PATTERN)] = Field(
        default="768p", description="Size of the film; the default model: 512p, 768p, or 1080p with 6 seconds"
    )
    model: Annotated[str, StringConstraints(strict=True, max_length=200, pattern=MODEL_PATTERN)] | None = Field(
        default=None,
        description="Replicate model, owner/name or owner/name:version; null: minimax/hailuo-02",
        examples=["minimax/hailuo-02"],
    )


class JobPromptTTS(JobPromptOnly):
    """A picture to bring to life, and what it says."""

    text: NonBlank = Field(description="What the pet says, at most TTS_MAX_CHARS characters", examples=["Feed me!"])
    voice_id: Annotated[str, StringConstraints(strict=True, pattern=VOICE_PATTERN)] = Field(
        description="ElevenLabs voice", examples=["JBFqnCBsd6RMkjVDRZzb"]
    )
    fit: Fit = Field(
        default="shortest",
        description="What ends the clip. shortest: film or speech; video: the film, then silence if it is longer than "
        "the speech; speech: the speech, the film repeats until then",
    )


class HeadRequest(BaseModel):
    """A remote file to look at."""

    url: HttpUrl = Field(description="Public address, ports 80 and 443", examples=[EXAMPLE_PICTURE])


class Health(BaseModel):
    """The process answers."""

    ok: bool = True


class VideoResult(BaseModel):
    """A silent film."""

    video_url: str = Field(description="Replicate's own URL, gone after an hour")


class SpeechResult(BaseModel):
    """A talking pet."""

    audio_url: str = Field(description="The speech, in your storage")
    video_url: str = Field(description="The silent film: Replicate's own URL, gone after an hour")
    final_url: str = Field(description="The talking film, in your storage")


class HeadResult(BaseModel):
    """What a server tells about a file."""

    status: int = Field(description="HTTP status of the remote answer, redirects followed")
    content_type: str | None
    bytes: int | None = Field(description="Size of the whole file, if told")


class Partial(BaseModel):
    """What a failed job has made, and paid for, already."""

    audio_url: str | None = None
    video_url: str | None = None
    prediction_id: str | None = Field(
        default=None, description="The film's id at Replicate, which keeps it for an hour"
    )


class InputError(BaseModel):
    """One fault of a request body."""

    loc: list[str | int]
    msg: str


class ErrorBody(BaseModel):
    """The one body of every error; `partial` and `errors` stand in it only where there is something to say."""

    detail: str
    category: Category
    provider: Provider | None = None
    request_id: str
    partial: Partial | None = None
    errors: list[InputError] | None = None


class StageEvent(BaseModel):
    """A step of a job that has started, gone on or ended; told to those who ask for an event stream."""

    stage: Stage
    state: Literal["started", "done"]
    seconds: float = Field(description="since the stage started")
    status: str | None = Field(default=None, description="of the prediction, while the video is made")
    percent: int | None = Field(default=None, description="of the video, where the model's log tells")


# ----------------------------------------------------------------------------------------------------------------
# Errors
#
# ServiceError               the class carries status and category, `detail` is safe to show
# |-- SettingMissing         500 configuration
# |-- InvalidInput           400 validation
# |   `-- UrlBlocked         400 validation   an address that must not be fetched
# |-- ProviderRefused        400 provider     the request's own content, or a film that could not be made
# |-- ProviderFailed         500 provider     the provider refuses us, fails or does not answer
# |-- SpeechTooLarge         400 resource
# |-- ResourceFailed         500 resource     storage, downloads, media
# `-- Unforeseen             500 internal
# ----------------------------------------------------------------------------------------------------------------


class ServiceError(Exception):
    """A failure that is told to the client, as it says."""

    http_status = 500
    category: Category = "internal"

    def __init__(self, detail: str, provider: Provider | None = None, errors: Sequence[InputError] = ()) -> None:
        super().__init__(detail)
        self.detail = redact(detail)
        self.provider = provider
        self.errors = errors


class SettingMissing(ServiceError):
    """A variable is unset that this request needs."""

    category: Category = "configuration"


class InvalidInput(ServiceError):
    """The request can never succeed as it stands."""

    http_status = 400
    category: Category = "validation"


class UrlBlocked(InvalidInput):
    """The URL leads to where the service must not go."""


class ProviderRefused(ServiceError):
    """ElevenLabs or Replicate do not want this content."""

    http_status = 400
    category: Category = "provider"


class ProviderFailed(ServiceError):
    """ElevenLabs or Replicate refuse the service itself, fail, or do not answer."""

    category: Category = "provider"


class SpeechTooLarge(ServiceError):
    """The speech is larger than the service carries."""

    http_status = 400
    category: Category = "resource"


class ResourceFailed(ServiceError):
    """Storage, a download, or media that ffmpeg cannot use."""

    category: Category = "resource"


class Unforeseen(ServiceError):
    """Anything else; the inside detail stands in the log only."""


def redact(text: str) -> str:
    """The text without the keys of this service."""
    for secret in get_settings().secrets():
        text = text.replace(secret, "***")
    return text


# ----------------------------------------------------------------------------------------------------------------
# Jobs: what a request has done so far
# ----------------------------------------------------------------------------------------------------------------

# Whose failure it is when a stage does not end in time.
STAGE_PROVIDERS: dict[Stage, Provider | None] = {
    "speech": "elevenlabs",
    "audio_upload": "supabase",
    "video": "replicate",
    "download": None,
    "mux": None,
    "final_upload": "supabase",
}


@dataclass(eq=False)
class Job:
    """One request: its stages with their times, what exists already, and who listens."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    timings: dict[Stage, float] = field(default_factory=dict)  # seconds, in the order of the stages
    stage_started: float = 0.0
    current: Stage | None = None
    partial: Partial = field(default_factory=Partial)
    tell: Callable[[StageEvent], None] = lambda event: None

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Name, time, log and tell one step of the job."""
        self.current, self.stage_started = name, time.monotonic()
        self.tell(StageEvent(stage=name, state="started", seconds=0))
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            seconds = self.timings[name] = time.monotonic() - self.stage_started
            logger.info("stage=%s outcome=%s ms=%.0f", name, outcome, seconds * 1000)
        self.current = None
        self.tell(StageEvent(stage=name, state="done", seconds=round(seconds, 3)))

    def on_prediction(self, prediction: "Prediction") -> None:
        """Keep the id of what is being paid for, and pass on how far it is."""
        if self.partial.prediction_id is None:
            logger.info("prediction_id=%s", prediction.id)
            self.partial.prediction_id = prediction.id
        self.tell(
            StageEvent(
                stage="video",
                state="started",
                seconds=round(time.monotonic() - self.stage_started, 3),
                status=prediction.status,
                percent=prediction.percent,
            )
        )

    def late(self) -> ServiceError:
        """The error of a job that has not ended by its deadline."""
        limit = f"The job was not done after {get_settings().job_timeout_seconds:g} s"
        if self.current is None:
            return ProviderFailed(f"{limit}; it had to wait for the model's schema.", "replicate")
        provider = STAGE_PROVIDERS[self.current]
        error = ProviderFailed if provider in ("elevenlabs", "replicate") else ResourceFailed
        return error(f"{limit} and was ended in the stage {self.current}.", provider)

    def server_timing(self) -> str:
        """The Server-Timing header: milliseconds of each stage."""
        return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in self.timings.items())

    def log_end(self, path: str, outcome: str) -> None:
        """One line for the whole job."""
        ms = (time.monotonic() - self.started) * 1000
        logger.info("job=%s outcome=%s ms=%.0f prediction_id=%s", path, outcome, ms, self.partial.prediction_id)


def as_service_error(exc: BaseException) -> ServiceError:
    """The error to tell; the traceback of an unforeseen one goes to the log."""
    if isinstance(exc, ServiceError):
        return exc
    logger.error("unforeseen error\n%s", redact("".join(traceback.format_exception(exc))))
    return Unforeseen("Something unforeseen went wrong inside the service; its log has the request id.")


def error_json(error: ServiceError, job: Job) -> dict[str, Any]:
    """The body of an error (see ErrorBody): `provider` always, `partial` and `errors` if there is something to say."""
    told = {
        "detail": error.detail,
        "category": error.category,
        "provider": error.provider,
        "request_id": job.request_id,
        "partial": job.partial.model_dump(exclude_none=True),
        "errors": [fault.model_dump() for fault in error.errors],
    }
    return {name: value for name, value in told.items() if value or name == "provider"}


# ----------------------------------------------------------------------------------------------------------------
# Network: one pool of connections, and a guard where they are made
# ----------------------------------------------------------------------------------------------------------------

# Addresses that ipaddress.is_global lets pass in one Python version or another, or that lead elsewhere inside.
BLOCKED_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT
        "192.0.0.0/24",  # IETF protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # Teredo and other protocol assignments
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
]
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # leaves out mapped, compatible and NAT64 forms of IPv4 as well


def is_public(address: str) -> bool:
    """True for an address of the public internet, as getaddrinfo writes it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone, such as fe80::1%eth0
        return False
    if ip.version == 6 and ip not in GLOBAL_UNICAST:
        return False
    return ip.is_global and not any(ip in network for network in BLOCKED_NETWORKS if network.version == ip.version)


def check_public_url(url: httpx.URL) -> None:
    """Refuse a URL by its form alone; names are looked up later. Raises UrlBlocked saying what is wrong."""
    host = url.raw_host.decode("ascii").rstrip(".")
    if url.scheme not in ("http", "https"):
        raise UrlBlocked("Only http and https URLs are fetched.")
    if url.userinfo:
        raise UrlBlocked("A URL with a user name or password is not fetched.")
    if url.port not in (None, 80, 443):
        raise UrlBlocked("Only the ports 80 and 443 are fetched from.")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", host):
        raise UrlBlocked("The URL's host is not a plain name or address.")
    # As browsers do: a host that ends in a number is an IPv4 address, and only its plain form is taken.
    if re.fullmatch(r"(.*\.)?(\d+|0[xX][0-9A-Fa-f]*)", host) and not re.fullmatch(
        r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){3}", host
    ):
        raise UrlBlocked("The URL's address is not written in its plain form.")


def is_trusted(url: httpx.URL) -> bool:
    """True for the owner's own addresses: both APIs and the storage, private or not."""
    settings = get_settings()
    if settings.allow_private_urls:
        return True
    bases = [settings.eleven_base_url, settings.replicate_base_url]
    if settings.supabase_url:
        bases.append(f"{settings.supabase_url}/storage/v1/object")
    is_below = any(str(url).startswith(f"{base}/") for base in bases)
    return is_below and ".." not in unquote(str(url))  # an encoded one could lead out of there


class PublicNetwork(httpcore.AnyIOBackend):
    """Connects to public addresses only: looked up once, checked, and then used."""

    def __init__(self) -> None:
        super().__init__()
        # Threads of their own: a stranger's name that takes long does not hold up files and the providers' names.
        self.look_ups = ThreadPoolExecutor(16, "look-up")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address that takes it. Raises UrlBlocked if any address is not public."""
        addresses = await self._look_up(host, port, timeout)
        if not all(map(is_public, addresses)):
            raise UrlBlocked("The URL leads to an address that is not public.")
        *others, last = addresses
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await super().connect_tcp(address, port, timeout, local_address, socket_options)
        return await super().connect_tcp(last, port, timeout, local_address, socket_options)

    async def _look_up(self, host: str, port: int, timeout: float | None) -> list[str]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        looking_up = asyncio.get_running_loop().run_in_executor(self.look_ups, ask)
        try:
            found = await asyncio.wait_for(looking_up, timeout)
        except asyncio.TimeoutError as exc:  # first: from Python 3.11 on it is an OSError, too
            raise httpcore.ConnectTimeout(f"looking up {host} took too long") from exc
        except (OSError, UnicodeError) as exc:
            raise httpcore.ConnectError(f"{host} has no address") from exc
        return [str(entry[4][0]) for entry in found]


ASKED_FOR = "talking_pet_asked_for"  # the extension of a request that comes from /debug/head


class Network(httpx.AsyncBaseTransport):
    """Pools: one for the owner's own addresses; for all others, which the guard watches, films apart from the rest."""

    def __init__(self) -> None:
        self.trusted = pool_transport(httpcore.AnyIOBackend())
        self.public = pool_transport(PublicNetwork())
        self.asked_for = pool_transport(PublicNetwork())  # by anyone, through /debug/head: no film waits for it

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; each redirect comes here again. Raises UrlBlocked."""
        if is_trusted(request.url):
            return await self.trusted.handle_async_request(request)
        check_public_url(request.url)
        pool = self.asked_for if ASKED_FOR in request.extensions else self.public
        return await pool.handle_async_request(request)

    async def aclose(self) -> None:
        """Close every connection."""
        await self.trusted.aclose()
        await self.public.aclose()
        await self.asked_for.aclose()


# httpcore can do without this package but looks for it at every request, on the disk: an eighth of a job's work here.
sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]  # None: known to be absent


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """The certificates to trust: read once, since that takes some 15 ms."""
    return httpx.create_ssl_context(trust_env=False)


def pool_transport(backend: httpcore.AsyncNetworkBackend) -> httpx.AsyncHTTPTransport:
    """A transport without proxies whose connections `backend` makes; httpx itself has no argument for that."""
    transport = httpx.AsyncHTTPTransport(verify=tls_context(), trust_env=False)
    transport._pool = httpcore.AsyncConnectionPool(
        ssl_context=tls_context(),
        max_connections=None,  # each waiting job may need one; Replicate's rates are what limits
        max_keepalive_connections=10,  # enough for 40 reads a second; httpcore looks at each of them twice a request
        keepalive_expiry=15.0,
        network_backend=backend,
    )
    return transport


@dataclass
class Shared:
    """What the jobs of one process share."""

    http: httpx.AsyncClient
    ffmpeg_slots: asyncio.Semaphore
    jobs: set[Job] = field(default_factory=set)  # requests that have no answer yet
    polls: int = 0  # predictions being waited for
    models: dict[str, tuple[float, "VideoModel"]] = field(default_factory=dict)  # with the time of the look-up
    model_locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)


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


# ----------------------------------------------------------------------------------------------------------------
# HTTP calls: what is repeated, and what never
# ----------------------------------------------------------------------------------------------------------------

PROVIDER_NAMES: dict[Provider, str] = {
    "elevenlabs": "ElevenLabs",
    "replicate": "Replicate",
    "supabase": "Supabase Storage",
}

SERVER_ERRORS = frozenset(range(500, 600))  # Supabase has a 544
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def told_under(value: Any, *keys: str) -> Any:
    """What stands in JSON objects under these keys, one in the other; None if it is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


class Answer(NamedTuple):
    """A provider's answer, its body read up to a limit."""

    status: int
    headers: httpx.Headers
    body: bytes

    def json(self) -> Any:
        """The body as JSON values; None if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    def get(self, name: str) -> Any:
        """A field of the JSON object; None if there is none."""
        return told_under(self.json(), name)


@dataclass(frozen=True)
class Retry:
    """Which calls are sent again, and how often."""

    statuses: frozenset[int]
    attempts: int | None = None  # None: until the job's deadline
    any_transport_error: bool = True  # False: only if the request cannot have left
    unreadable: bool = False  # an answer that is no JSON object, too

    def wants(self, outcome: Answer | httpx.RequestError) -> bool:
        """True if this outcome is worth another attempt."""
        if isinstance(outcome, httpx.RequestError):
            return self.any_transport_error or isinstance(outcome, NOT_SENT)
        if self.unreadable and outcome.status < 300 and not isinstance(outcome.json(), dict):
            return True
        return meant_status(outcome) in self.statuses

    def delay_s(self, attempt: int, asked_s: float | None) -> float | None:
        """Seconds to wait after failed attempt `attempt` (from 1), or None to give up."""
        if self.attempts is not None and attempt >= self.attempts:
            return None
        first_s = get_settings().retry_first_seconds
        if asked_s is not None:
            return max(asked_s, first_s) if asked_s <= MAX_RETRY_WAIT_S else None
        return min(first_s * 2.0 ** min(attempt - 1, 10), MAX_BACKOFF_S) * random.uniform(0.75, 1)


# A speech or a prediction that may have been made is not asked for again: that would be paid twice.
SPEECH_RETRY = Retry(frozenset({429, 500, 502, 503, 504}), attempts=3, any_transport_error=False)
CREATE_RETRY = Retry(frozenset({429}), attempts=4, any_transport_error=False)
READ_RETRY = Retry(SERVER_ERRORS | {408, 429}, unreadable=True)
UPLOAD_RETRY = Retry(SERVER_ERRORS | {429}, attempts=4, unreadable=True)
DOWNLOAD_RETRY = Retry(SERVER_ERRORS | {404, 429}, attempts=4)
CANCEL_RETRY = UPLOAD_RETRY


def meant_status(answer: Answer) -> int:
    """The status an answer means: Supabase Storage hides its own as a text in the body of a 400."""
    told = answer.get("statusCode") if answer.status == 400 else None
    return int(str(told)) if re.fullmatch(r"\d{3}", str(told)) else answer.status


def asked_wait_s(answer: Answer, now: float) -> float | None:
    """Seconds the provider asks us to wait, at clock time `now`; None if it does not say, or nonsense.

    Replicate writes `retry_after` or "resets in ~30s" into the body; others send Retry-After, seconds or a date.
    """
    told = answer.get("retry_after") or answer.headers.get("retry-after") or ""
    if not told and (resets := re.search(r"resets in ~(\d+)s", str(answer.get("detail")))):
        told = resets[1]
    if re.fullmatch(r"\d+(\.\d+)?", str(told).strip()):
        return float(told)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(str(told)).timestamp() - now)
    return None


def provider_message(answer: Answer) -> str:
    """The provider's own words, on one line, whatever its body holds; never empty."""
    words = told_in(answer.json())
    if not words and (b"<" in answer.body[:1000] or answer.headers.get("content-type", "").startswith("text/")):
        page = answer.body[:4_000].decode("utf-8", "replace")
        words = html.unescape(re.sub(r"(?s)<(script|style)\b.*?</\1>|<[^>]*>", " ", page))
    with suppress(ValueError):
        return shortened(words) or HTTPStatus(answer.status).phrase
    return "no message"


def shortened(message: str) -> str:
    """A provider's message on one line, without our keys, at most 300 characters."""
    line = " ".join(message.split()).encode("utf-8", "replace").decode()  # JSON can hold half an emoji
    return redact(line)[:MAX_DETAIL_CHARS]


def told_in(value: Any, depth: int = 5) -> str:
    """The message inside an error body: text, object or list, one in the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and depth:
        return "; ".join(filter(None, (told_in(part, depth - 1) for part in value)))
    if isinstance(value, dict) and depth:
        told = (told_in(value.get(key), depth - 1) for key in ("detail", "message", "msg", "error", "title"))
        return next(filter(None, told), "")
    return ""


Perform = Callable[[httpx.AsyncClient, httpx.Request, int], Awaitable[Answer]]


async def exchange(client: httpx.AsyncClient, request: httpx.Request, limit: int) -> Answer:
    """One request, and its answer's body up to `limit` + 1 bytes."""
    response = await client.send(request, stream=True)
    try:
        return await read_answer(response, limit)
    finally:
        await response.aclose()


async def read_answer(response: httpx.Response, limit: int) -> Answer:
    """The answer with its body up to `limit` + 1 bytes: more is never held."""
    pieces, room = list[bytes](), limit + 1
    async for piece in response.aiter_raw():
        pieces.append(piece[:room])
        room -= len(pieces[-1])
        if not room:
            break
    return Answer(response.status_code, response.headers, b"".join(pieces))


async def send(
    method: str,
    url: str,
    retry: Retry,
    limit: int = MAX_ANSWER_BYTES,
    perform: Perform = exchange,
    **options: Any,
) -> Answer:
    """Send a request, again as far as `retry` allows, and return the last answer, whatever its status.

    `options` are those of httpx's build_request. Raises httpx.RequestError if the last attempt had no answer.
    """
    async with shared() as resources:
        for attempt in count(1):
            outcome: Answer | httpx.RequestError
            try:
                request = resources.http.build_request(method, url, **options)
                outcome = await perform(resources.http, request, limit)
            except httpx.RequestError as exc:
                outcome = exc
            if not retry.wants(outcome):
                break
            asked_s = asked_wait_s(outcome, time.time()) if isinstance(outcome, Answer) else None
            delay_s = retry.delay_s(attempt, asked_s)
            if delay_s is None:
                break
            failed = f"{method} {request.url.host} attempt={attempt} failed ({summary(outcome)})"
            logger.warning("%s, next in %.1f s", failed, delay_s)
            await asyncio.sleep(delay_s)
    if isinstance(outcome, httpx.RequestError):
        raise outcome
    return outcome


def summary(outcome: Answer | httpx.RequestError) -> str:
    """What came of an attempt, in a few words."""
    if isinstance(outcome, httpx.RequestError):
        return redact(f"{type(outcome).__name__} {outcome}".strip().rstrip("."))
    words = f"{outcome.status}: {provider_message(outcome)}"
    asked_s = asked_wait_s(outcome, time.time())
    if asked_s is not None and asked_s > MAX_RETRY_WAIT_S:
        words += f" (it asks to wait {asked_s:.0f} s, longer than a job can)"
    return redact(words)


def no_answer(provider: Provider, exc: httpx.RequestError) -> ServiceError:
    """The error for a provider that could not be reached or did not answer."""
    error = ResourceFailed if provider == "supabase" else ProviderFailed
    return error(f"{PROVIDER_NAMES[provider]} did not answer: {summary(exc)}.", provider)


def refusal(provider: Provider, answer: Answer, is_about_content: bool = True) -> ServiceError:
    """The error for an answer that is not a success: 400, 404 and 422 can be about the content, the rest is about us."""
    detail = f"{PROVIDER_NAMES[provider]} answered {summary(answer)}"
    if provider == "supabase":
        return ResourceFailed(detail, provider)
    refused = is_about_content and answer.status in (400, 404, 422)
    return (ProviderRefused if refused else ProviderFailed)(detail, provider)


def nonsense(provider: Provider, what: str) -> ServiceError:
    """The error for a success that does not hold what it should."""
    return ProviderFailed(f"{PROVIDER_NAMES[provider]} answered without {what}.", provider)


# ----------------------------------------------------------------------------------------------------------------
# ElevenLabs: text -> speech
# ----------------------------------------------------------------------------------------------------------------


class SpeechFile(NamedTuple):
    """How the speech of one codec is kept."""

    extension: str
    content_type: str
    demuxer: str  # ffmpeg's name
    starts: tuple[bytes, ...]  # what its first bytes are: the provider's Content-Type is not to be trusted


MP3 = SpeechFile(
    "mp3", "audio/mpeg", "mp3", (b"ID3", *(b"\xff" + bytes([sync]) for sync in b"\xfa\xfb\xf2\xf3\xe2\xe3"))
)
WAV = SpeechFile("wav", "audio/wav", "wav", (b"RIFF",))
OGG = SpeechFile("ogg", "audio/ogg", "ogg", (b"OggS",))
SPEECH_FILES = {"mp3": MP3, "wav": WAV, "opus": OGG, "pcm": WAV, "ulaw": WAV, "alaw": WAV}

# Sent without a header by ElevenLabs: the WAVE format tag (RFC 2361) and bytes per sample to give them one.
RAW_CODECS = {"pcm": (1, 2), "alaw": (6, 1), "ulaw": (7, 1)}


def speech_file() -> SpeechFile:
    """How speech is kept under the present TTS_OUTPUT_FORMAT."""
    return SPEECH_FILES[get_settings().tts_output_format.split("_")[0]]


def with_wav_header(samples: bytes, codec: str, rate: int) -> bytes:
    """Raw mono samples as a WAV file that players know."""
    tag, width = RAW_CODECS[codec]
    samples = samples[: len(samples) // width * width]
    fmt = struct.pack("<HHIIHHH", tag, 1, rate, rate * width, width, width * 8, 0)
    fact = struct.pack("<I", len(samples) // width)
    chunks = [(b"fmt ", fmt), (b"fact", fact), (b"data", samples + b"\0" * (len(samples) % 2))]
    sizes = {b"data": len(samples)}
    body = b"".join(name + struct.pack("<I", sizes.get(name, len(content))) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


async def elevenlabs_tts_bytes(text: str, voice_id: str) -> bytes:
    """The text, spoken: a file that plays, in TTS_OUTPUT_FORMAT (raw samples get a WAV header).

    Raises ProviderRefused, ProviderFailed, SpeechTooLarge (over 9.5 MB), SettingMissing.
    """
    settings = get_settings()
    url = f"{settings.eleven_base_url}/v1/text-to-speech/{voice_id}"
    try:
        answer = await send(
            "POST",
            url,
            SPEECH_RETRY,
            limit=MAX_SPEECH_BYTES,
            params={"output_format": settings.tts_output_format},  # in the body it would be ignored
            headers={"xi-api-key": settings.required("eleven_api_key")},
            json={"text": text, "model_id": "eleven_multilingual_v2"},
            timeout=SPEECH_TIMEOUT,
        )
    except httpx.RequestError as exc:
        raise no_answer("elevenlabs", exc) from exc
    if answer.status != 200:
        raise refusal("elevenlabs", answer)
    return playable(answer.body, settings.tts_output_format)


def playable(speech: bytes, output_format: str) -> bytes:
    """Speech as a file that plays. Raises SpeechTooLarge, or ProviderFailed if it is no speech in that format."""
    if len(speech) > MAX_SPEECH_BYTES:
        raise SpeechTooLarge("The speech is larger than 9.5 MB; use a shorter text.", "elevenlabs")
    codec, rate = output_format.split("_")[:2]
    if codec in RAW_CODECS and speech and not re.match(rb'\s*(<!doctype|<html|\{\s*")', speech, re.IGNORECASE):
        return with_wav_header(speech, codec, int(rate))
    if not speech.startswith(SPEECH_FILES[codec].starts):
        raise nonsense("elevenlabs", f"speech in the format {output_format}")
    return speech


# ----------------------------------------------------------------------------------------------------------------
# Video models: a request fitted to what the model's own schema takes
# ----------------------------------------------------------------------------------------------------------------

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
    version: str | None  # None: official, runs by name
    fields: dict[str, Property]
    required: tuple[str, ...]

    @property
    def speech_field(self) -> str | None:
        """The field for speech, if the model makes a film that speaks by itself."""
        named = (name for name, prop in self.fields.items() if is_uri(prop) and words(name) & SPEECH_WORDS)
        return next((name for name in named if not words(name) & OTHER_WORDS), None)

    @property
    def picture_field(self) -> str | None:
        """The field for the first picture; a deprecated one only if there is no other."""
        named = [name for name, prop in self.fields.items() if is_first_picture(name, prop)]
        return min(named, key=self._picture_rank, default=None)

    def _picture_rank(self, name: str) -> tuple[bool, bool, bool, bool]:
        deprecated = bool(self.fields[name].get("deprecated"))
        return deprecated, not words(name) & FIRST_WORDS, name not in self.required, name != "image"

    @property
    def prompt_field(self) -> str | None:
        """The field for the prompt."""
        named = (name for name in self.fields if "prompt" in words(name) and self.fields[name].get("type") == "string")
        return next((name for name in sorted(named, key=len) if "negative" not in words(name)), None)


# Its page and schema, read 2026-03-29: 10 s only up to 768p.
HAILUO = VideoModel(
    name=DEFAULT_MODEL,
    version=None,
    fields={
        "prompt": {"type": "string"},
        "first_frame_image": {"type": "string", "format": "uri"},
        "duration": {"type": "integer", "enum": [6, 10]},
        "resolution": {"type": "string", "enum": ["512p", "768p", "1080p"]},
    },
    required=("prompt",),
)


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
MAX_SCHEMA_PARTS = 4  # of one property: an enum stands behind one, what may be null behind two
MAX_SCHEMA_FIELDS = 300  # well-known models have up to fifteen


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
    schema = schemas.get("Input") if isinstance(schemas, dict) else None
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        raise nonsense("replicate", f"the input schema of {name}")
    if len(schema["properties"]) > MAX_SCHEMA_FIELDS:
        raise nonsense("replicate", f"an input schema of {name} that a person could fill in")
    fields = {field: resolved(prop, schemas) for field, prop in schema["properties"].items()}
    required = schema.get("required")
    named = required if isinstance(required, list) else []
    return VideoModel(name, version, fields, tuple(field for field in named if isinstance(field, str)))


def fit_input(model: VideoModel, job: JobPromptOnly, audio_url: str | None = None) -> dict[str, Any]:
    """The input of a prediction: what the model takes of the job, written as the model writes it.

    A setting the client sent is used or refused, one it left out adapts, one the model lacks is left out.
    `audio_url` goes to a model that takes speech. Raises InvalidInput naming what is wrong, with the allowed values.
    """
    if model.picture_field is None:
        raise unfit("model", f"{model.name} takes no picture; choose an image-to-video model")
    values: dict[str, Any] = {model.picture_field: job.image_url}
    if model.prompt_field:
        values[model.prompt_field] = job.prompt
    if model.speech_field and audio_url:
        values[model.speech_field] = audio_url
    values |= length_input(model, job)
    values |= size_input(model, job)
    values |= {name: model.fields[name]["default"] for name in unfilled(model, values) if has_default(model, name)}
    if missing := unfilled(model, values):
        who = "only /jobs_prompt_tts has" if missing == [model.speech_field] else "this service has nothing for"
        raise unfit("model", f"{model.name} needs {', '.join(missing)}, which {who}")
    if model is HAILUO and values["duration"] == 10 and values["resolution"] == "1080p":
        raise unfit("resolution", "with 10 seconds it can be 512p or 768p")
    return values


def unfit(name: str, message: str) -> InvalidInput:
    """The refusal of one field of the request."""
    return InvalidInput(f"{name}: {message}.", errors=[InputError(loc=["body", name], msg=message)])


def unfilled(model: VideoModel, values: dict[str, Any]) -> list[str]:
    """The required fields that have no value yet."""
    return [name for name in model.required if name not in values]


def has_default(model: VideoModel, name: str) -> bool:
    """True if the model itself says what to put into a field."""
    return model.fields.get(name, {}).get("default") is not None


def length_input(model: VideoModel, job: JobPromptOnly) -> dict[str, Any]:
    """The field for the film's length, in seconds or frames; empty if the model has none."""
    for name in (*SECONDS_NAMES, *FRAMES_NAMES):
        prop = model.fields.get(name, {})
        options = {number: value for value in prop.get("enum") or () if (number := as_number(value)) is not None}
        if not options and prop.get("type") not in ("integer", "number"):
            continue
        rate = frames_per_second(model) if counts_frames(name, prop, options) else 1.0
        wanted = job.seconds * rate
        number = min(options, key=lambda n: (abs(n - wanted), n)) if options else clamped(wanted, prop)
        # A count of frames is seldom a whole number of seconds: the nearest will do.
        if "seconds" in job.model_fields_set and abs(number - wanted) > (rate / 2 if rate > 1 else 0):
            raise unfit("seconds", f"{model.name} takes {allowed_seconds(prop, options, rate)}")
        return {name: options.get(number, number if prop.get("type") == "number" else round(number))}
    return {}


def as_number(value: Any) -> float | None:
    """A number, also from a text such as "5" or "5s"; None for anything else."""
    told = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:s|sec|seconds)?", str(value))
    return float(told[1]) if told else None


def counts_frames(name: str, prop: Property, options: Mapping[float, Any]) -> bool:
    """True if a field for the length counts frames: by its name, its description, or numbers too large for seconds."""
    about = words(str(prop.get("description", "")))
    smallest = min(options, default=prop.get("minimum") or 0)
    return name in FRAMES_NAMES or bool(about & {"frame", "frames"} and "seconds" not in about) or smallest > 60


def frames_per_second(model: VideoModel) -> float:
    """The rate at which the model plays its frames, as its own setting defaults."""
    for name in FPS_NAMES:
        prop = model.fields.get(name, {})
        told = as_number(prop.get("default") or next(iter(prop.get("enum") or ()), None))
        if told:
            return told
    return DEFAULT_FPS


def clamped(number: float, prop: Property) -> float:
    """The number nearest to `number` between a field's bounds."""
    return float(max(prop.get("minimum", -math.inf), min(number, prop.get("maximum", math.inf))))


def allowed_seconds(prop: Property, options: Mapping[float, Any], rate: float) -> str:
    """The lengths a model makes, for people."""
    if options:
        return " or ".join(f"{number:g}" for number in sorted({round(n / rate, 0 if rate > 1 else 3) for n in options}))
    return bounds(prop, rate)


def size_input(model: VideoModel, job: JobPromptOnly) -> dict[str, Any]:
    """The field for the film's size; empty if the model has none."""
    is_sent = "resolution" in job.model_fields_set
    for name in SIZE_NAMES:
        prop = model.fields.get(name, {})
        options = [value for value in prop.get("enum") or () if lines(value)]
        if options:
            return {name: chosen_size(model, job.resolution, options, is_sent)}
        if "resolution" in name and "enum" not in prop and prop.get("type") in ("string", "integer"):
            return {name: free_size(model, job.resolution, prop)} if is_sent else {}
    return {}


def chosen_size(model: VideoModel, resolution: str, options: list[Any], is_sent: bool) -> Any:
    """The option that is meant by `resolution`; the nearest one if the client did not ask for it."""
    wanted = lines(resolution) or 0
    same = [value for value in options if str(value).casefold() == resolution.casefold()]
    same += [value for value in options if lines(value) == wanted]
    if same or not is_sent:
        return same[0] if same else min(options, key=lambda value: (abs(lines(value) - wanted), lines(value)))
    raise unfit("resolution", f"{model.name} takes {' or '.join(map(str, options))}")


def free_size(model: VideoModel, resolution: str, prop: Property) -> str | int:
    """A size for a model that lists none: as it was sent, or as a number of lines within the model's bounds."""
    if prop["type"] == "string":
        return resolution
    if clamped(lines(resolution), prop) == lines(resolution) != 0:
        return lines(resolution)
    raise unfit("resolution", f"{model.name} takes {bounds(prop)}")


def bounds(prop: Property, rate: float = 1.0) -> str:
    """A field's bounds, for people, in units of which `rate` make one of the field's."""
    named = (("at least", "minimum"), ("at most", "maximum"))
    return " and ".join(f"{words} {prop[key] / rate:.0f}" for words, key in named if key in prop)


def lines(size: Any) -> int:
    """The lines of a picture size such as 768p, 4K, 1280x720 or 720; 0 if it is none."""
    told = str(size).casefold()
    if pair := re.fullmatch(r"(\d{2,5})\s*[x*×]\s*(\d{2,5})", told):
        return min(int(pair[1]), int(pair[2]))
    if thousands := re.fullmatch(r"(\d)k", told):
        return int(thousands[1]) * 540
    plain = re.match(r"(\d{3,4})p?\b", told)
    return int(plain[1]) if plain else 0


# ----------------------------------------------------------------------------------------------------------------
# Replicate: picture -> film
# ----------------------------------------------------------------------------------------------------------------

FINAL_STATUSES = ("succeeded", "failed", "canceled", "aborted")


class Prediction(BaseModel):
    """What Replicate tells of one prediction; every other field is optional there."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    status: str
    output: Any = None
    error: Any = None
    logs: Any = None

    @property
    def percent(self) -> int | None:
        """How far it is, where its log holds a progress bar."""
        told = re.findall(r"(?<![\d.])(\d{1,2}|100)(?:\.\d+)?%", str(self.logs)[-2000:])
        return int(told[-1]) if told else None

    @property
    def video_url(self) -> str | None:
        """The film: the first URL in the output, which is a text, a list or an object."""
        for text in islice(texts_in(self.output), MAX_OUTPUT_TEXTS):
            with suppress(ValueError):
                return check_http_url(text)
        return None


MAX_OUTPUT_TEXTS = 1_000  # a film's URL is among the first few


def texts_in(value: Any, depth: int = 5) -> Iterator[str]:
    """Every text in a JSON value, in its order."""
    if isinstance(value, str):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if depth:
        for part in parts:
            yield from texts_in(part, depth - 1)


def poll_delay_s(waited_s: float, polls: int) -> float:
    """Seconds until the next read of a prediction, `waited_s` after its start, with `polls` of them open."""
    share = min(max(waited_s * POLL_SHARE, get_settings().poll_min_seconds), POLL_MAX_S)
    return max(share, polls * 60 / READS_PER_MINUTE)


async def call_replicate(method: str, path: str, retry: Retry, perform: Perform = exchange, **options: Any) -> Answer:
    """One call to Replicate's API. Raises ProviderRefused (not of a prediction's id), ProviderFailed, SettingMissing."""
    settings = get_settings()
    url = f"{settings.replicate_base_url}/v1/{path}"
    headers = {"Authorization": f"Bearer {settings.required('replicate_api_token')}", **options.pop("headers", {})}
    try:
        answer = await send(method, url, retry, perform=perform, headers=headers, **options)
    except httpx.RequestError as exc:
        raise no_answer("replicate", exc) from exc
    if answer.status not in (200, 201, 202):
        raise refusal("replicate", answer, is_about_content=not path.startswith("predictions/"))
    return answer


def prediction_in(answer: Answer) -> Prediction | None:
    """The prediction in an answer, or None if there is none."""
    with suppress(ValidationError):
        return Prediction.model_validate(answer.json())
    return None


async def find_model(name: str | None) -> VideoModel:
    """The model by its name, `owner/name` or `owner/name:version`; the default model needs no look-up.

    Kept for ten minutes; jobs that ask for one model at the same time share one look-up.
    Raises ProviderRefused (no such model), ProviderFailed.
    """
    if name in (None, DEFAULT_MODEL):
        return HAILUO
    plain_name, _, version = str(name).partition(":")
    async with shared() as resources:
        async with resources.model_locks.setdefault(plain_name, asyncio.Lock()):
            now = time.monotonic()
            resources.models = {key: kept for key, kept in resources.models.items() if now - kept[0] < MODEL_TTL_S}
            if plain_name not in resources.models:
                resources.models[plain_name] = (now, await look_up_model(plain_name))
            model = resources.models[plain_name][1]
    return replace(model, version=name) if version else model


async def look_up_model(name: str) -> VideoModel:
    """The model as Replicate describes it now; a community model runs by its latest version only."""
    try:
        answer = await call_replicate("GET", f"models/{name}", READ_RETRY)
    except ProviderRefused as exc:  # it does not repeat the name
        raise ProviderRefused(f"model {name}: {exc.detail}", "replicate") from exc
    latest = told_under(answer.json(), "latest_version")
    version = None if answer.get("is_official") is True else told_under(latest, "id")
    if answer.get("is_official") is not True and not isinstance(version, str):
        raise nonsense("replicate", f"a version of {name}")
    return video_model(name, version, told_under(latest, "openapi_schema", "components", "schemas"))


def ignore_prediction(prediction: Prediction) -> None:
    """For callers that do not ask how far a prediction is."""


async def hailuo_video_from_prompt(
    job: JobPromptOnly, on_prediction: Callable[[Prediction], None] = ignore_prediction
) -> str:
    """The URL of a film made by the default model. Raises as run_prediction does."""
    return await run_prediction(HAILUO, fit_input(HAILUO, job), on_prediction)


async def replicate_video_from_prompt(
    job: JobPromptOnly,
    audio_url: str | None = None,
    on_prediction: Callable[[Prediction], None] = ignore_prediction,
    model: VideoModel | None = None,
) -> str:
    """The URL of a film made by `job.model`, with `audio_url` if it takes speech. Raises as run_prediction does.

    `model` is what find_model told of it already; None: look it up.
    """
    model = model or await find_model(job.model)
    return await run_prediction(model, fit_input(model, job, audio_url), on_prediction)


async def run_prediction(model: VideoModel, values: dict[str, Any], on_prediction: Callable[[Prediction], None]) -> str:
    """Make one prediction, wait for its end and return the film's URL, which Replicate keeps for an hour.

    `on_prediction` hears of it at once and at each read. A cancelled caller cancels the prediction.
    Raises ProviderRefused (failed, canceled, aborted), ProviderFailed, SettingMissing.
    """
    prediction = await create_prediction(model, values)
    on_prediction(prediction)
    try:
        prediction = await wait_for_prediction(prediction, on_prediction)
    except asyncio.CancelledError:
        await to_its_end(cancel_prediction(prediction.id))
        raise
    if prediction.status != "succeeded":
        told = shortened(told_in(prediction.error)) or "no reason given"
        raise ProviderRefused(f"No film was made, the prediction ended as {prediction.status}: {told}", "replicate")
    if (video_url := prediction.video_url) is None:
        raise nonsense("replicate", "a film, although it succeeded")
    return video_url


async def create_prediction(model: VideoModel, values: dict[str, Any]) -> Prediction:
    """Buy a prediction: once, whatever happens; Replicate itself ends it at the job's time limit."""
    path = "predictions" if model.version else f"models/{model.name}/predictions"
    body = {"input": values, **({"version": model.version} if model.version else {})}
    shortest, longest = CANCEL_AFTER_S
    cancel_after_s = max(shortest, min(round(get_settings().job_timeout_seconds), longest))
    headers = {"Cancel-After": f"{cancel_after_s}s"}
    answer = await call_replicate("POST", path, CREATE_RETRY, create_exchange, json=body, headers=headers)
    if (prediction := prediction_in(answer)) is None:
        raise nonsense("replicate", "a prediction; one may have been made")
    return prediction


async def create_exchange(client: httpx.AsyncClient, request: httpx.Request, limit: int) -> Answer:
    """One create. A cancelled job still waits for its answer: only that tells which prediction to cancel."""
    creating = asyncio.ensure_future(exchange(client, request, limit))
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError:
        await to_its_end(cancel_created(creating))
        raise


async def cancel_created(creating: Awaitable[Answer]) -> None:
    """Stop paying for a prediction as soon as the create's answer tells its id."""
    with suppress(httpx.RequestError, asyncio.TimeoutError):
        if prediction := prediction_in(await asyncio.wait_for(creating, CANCEL_TIMEOUT_S)):
            await cancel_prediction(prediction.id)


async def to_its_end(work: Awaitable[Any]) -> None:
    """Await a clean-up, which comes first whatever cancels the caller meanwhile, such as the end of the process."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})


async def wait_for_prediction(prediction: Prediction, on_prediction: Callable[[Prediction], None]) -> Prediction:
    """Read a prediction until it has ended, as often as all jobs of the process together may."""
    started = time.monotonic()
    async with shared() as resources:
        resources.polls += 1
        try:
            while prediction.status not in FINAL_STATUSES:
                # Jobs that began together drift apart, so that their reads do not come in bursts.
                await asyncio.sleep(
                    poll_delay_s(time.monotonic() - started, resources.polls) * random.uniform(0.9, 1.1)
                )
                answer = await call_replicate("GET", f"predictions/{prediction.id}", READ_RETRY)
                prediction = prediction_in(answer) or prediction  # what is no prediction is read again
                on_prediction(prediction)
        finally:
            resources.polls -= 1
    return prediction


async def cancel_prediction(prediction_id: str) -> None:
    """Stop paying for a prediction that nobody waits for any more; what fails is logged."""
    try:
        path = f"predictions/{prediction_id}/cancel"
        await asyncio.wait_for(call_replicate("POST", path, CANCEL_RETRY), CANCEL_TIMEOUT_S)
        logger.info("prediction_id=%s cancelled", prediction_id)
    except (ServiceError, asyncio.TimeoutError) as exc:
        logger.warning("prediction_id=%s not cancelled: %s", prediction_id, exc)


# ----------------------------------------------------------------------------------------------------------------
# Supabase Storage, and downloads
# ----------------------------------------------------------------------------------------------------------------


async def supabase_upload(path: str, content: bytes | Path, content_type: str) -> str:
    """Store a file under `path` in the bucket and return its public URL; a file on disk is streamed from there.

    Raises ResourceFailed, SettingMissing.
    """
    settings = get_settings()
    key, base_url = settings.required("supabase_service_role"), settings.required("supabase_url")
    size = os.path.getsize(content) if isinstance(content, Path) else len(content)  # noqa: ASYNC240
    if size == 0:
        raise ResourceFailed("There is nothing to store: the file is empty.", "supabase")
    headers = {
        "Authorization": f"Bearer {key}",  # an sb_ key goes into both, identical; so does an eyJ one
        "apikey": key,
        "Content-Type": content_type,  # bare and in lower case, or a bucket with a list of types refuses it
        "Content-Length": str(size),  # limits are enforced by it
        "Cache-Control": "max-age=31536000",  # stored and served as written
        "x-upsert": "true",  # only this makes a repeated upload safe; in the query it does nothing
    }

    url = f"{base_url}/storage/v1/object/{settings.supabase_bucket}/{path}"
    body = FileBody(content) if isinstance(content, Path) else content
    try:
        answer = await send("POST", url, UPLOAD_RETRY, headers=headers, content=body)
    except httpx.RequestError as exc:
        raise no_answer("supabase", exc) from exc
    if answer.status != 200:
        raise refusal("supabase", answer)
    if not answer.get("Key"):  # some other server's 200
        raise ResourceFailed("Supabase Storage answered without having stored the file.", "supabase")
    return f"{base_url}/storage/v1/object/public/{settings.supabase_bucket}/{path}"


@dataclass(frozen=True)
class FileBody:
    """A file as a request's body: piece by piece, read beside the event loop, and from the start at each attempt."""

    path: Path

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The file's pieces."""
        with self.path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk


async def download(url: str, target: Path) -> None:
    """Stream a file to disk, from the first byte again if it breaks off.

    Raises ResourceFailed: over 100 MB, refused, unreachable, or at an address that must not be fetched.
    """
    try:
        host = httpx.URL(check_http_url(url)).host
    except ValueError as exc:
        raise ResourceFailed("The address of a file to download makes no sense.") from exc
    try:
        answer = await send("GET", url, DOWNLOAD_RETRY, perform=partial(save, target))
    except httpx.RequestError as exc:
        raise ResourceFailed(f"The download from {host} failed: {summary(exc)}.") from exc
    except UrlBlocked as exc:
        raise ResourceFailed(f"The file at {host} may not be fetched. {exc.detail}") from exc
    if answer.status != 200:
        raise ResourceFailed(f"The download from {host} was answered {summary(answer)}.")


async def save(target: Path, client: httpx.AsyncClient, request: httpx.Request, limit: int) -> Answer:
    """One attempt at a download: the file goes to `target`, the body of a refusal into the answer."""
    async with follow_redirects(client, request) as response:
        if response.status_code != 200:
            return await read_answer(response, limit)
        await write_body(response, target)
        return Answer(200, response.headers, b"")


@asynccontextmanager
async def follow_redirects(client: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """The answer at the end of at most five redirects, unread; httpx itself would read each redirect's body whole."""
    following: httpx.Request | None = request
    for _ in range(MAX_REDIRECTS + 1):
        assert following is not None
        try:
            response = await client.send(following, stream=True)
        except (httpx.InvalidURL, UnicodeError) as exc:
            raise httpx.RemoteProtocolError("a redirect to nonsense") from exc
        try:
            following = response.next_request
            if following is None:
                yield response
                return
        finally:
            await response.aclose()
    raise UrlBlocked(f"The URL redirects more than {MAX_REDIRECTS} times.")


async def write_body(response: httpx.Response, target: Path) -> None:
    """Write a body to disk, piece by piece. Raises ResourceFailed over 100 MB, at once if its length is told."""
    check_size(told_size(response) or 0)
    with target.open("wb") as file:
        async for chunk in response.aiter_raw():
            check_size(file.tell() + len(chunk))
            await asyncio.to_thread(file.write, chunk)


def check_size(size: int, what: str = "A file to download") -> None:
    """Refuse a file that is too large. Raises ResourceFailed."""
    if size > MAX_DOWNLOAD_BYTES:
        raise ResourceFailed(f"{what} is larger than 100 MB.")


def told_size(response: httpx.Response) -> int | None:
    """The length of a body in bytes, if the answer tells a plausible one."""
    told = response.headers.get("content-length", "")
    return int(told) if re.fullmatch(r"\d{1,18}", told) else None


async def head(url: str) -> HeadResult:
    """Status, type and whole size of a remote file; a server that refuses HEAD is asked for the first byte.

    Raises UrlBlocked; ResourceFailed if there is no answer within ten seconds.
    """
    try:
        return await asyncio.wait_for(_head(url), HEAD_TIMEOUT_S)
    except httpx.RequestError as exc:
        raise ResourceFailed(f"The URL did not answer: {summary(exc)}.") from exc
    except asyncio.TimeoutError as exc:
        raise ResourceFailed(f"The URL did not answer within {HEAD_TIMEOUT_S:g} s.") from exc


async def _head(url: str) -> HeadResult:
    async with shared() as resources:
        for method, headers in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
            request = resources.http.build_request(method, url, headers=headers, extensions={ASKED_FOR: True})
            async with follow_redirects(resources.http, request) as response:
                result = head_result(response)
            if result.status < 400:
                break
    return result


def head_result(response: httpx.Response) -> HeadResult:
    """The three things that are passed on of an answer; a part of a file tells the size of the whole, if it can."""
    size = told_size(response)
    if response.status_code == 206:
        whole = re.fullmatch(r"bytes [\d*-]+/(\d{1,18})", response.headers.get("content-range", ""))
        size = int(whole[1]) if whole else None
    content_type = response.headers.get("content-type", "")[:200] or None
    return HeadResult(status=response.status_code, content_type=content_type, bytes=size)


# ----------------------------------------------------------------------------------------------------------------
# ffmpeg: film + speech -> talking film
# ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def ffmpeg_path() -> str:
    """The ffmpeg that imageio-ffmpeg brings, or IMAGEIO_FFMPEG_EXE. Raises RuntimeError where there is none."""
    path = str(imageio_ffmpeg.get_ffmpeg_exe())  # tries its own, but not the variable's
    if (found := shutil.which(path)) is None:
        raise RuntimeError(f"There is no ffmpeg at {path}; is IMAGEIO_FFMPEG_EXE right?")
    return os.path.abspath(found)  # it runs without a PATH


def mux_arguments(video: Path, speech: Path, demuxer: str, fit: Fit, final: Path) -> list[str]:
    """ffmpeg's arguments: the film's picture as it is, our speech half a second in, ended as `fit` says."""
    delay = f"adelay={SPEECH_DELAY_MS}:all=1"
    # The demuxer is forced and only files are opened: a playlist named .mp4 stays noise.
    local_only = ["-protocol_whitelist", "file"]
    return [
        *("-hide_banner", "-nostdin", "-y", "-v", "error"),
        *("-max_alloc", str(FFMPEG_MAX_ALLOC_BYTES), "-filter_threads", "1"),
        *(("-stream_loop", "-1") if fit == "speech" else ()),
        *(*local_only, "-threads", "1", "-f", "mov", "-i", f"file:{video}"),
        *(*local_only, "-threads", "1", "-f", demuxer, "-i", f"file:{speech}"),
        *("-map", "0:V:0", "-map", "1:a:0"),  # the model's picture and our speech, whatever else the film brings
        *("-c:v", "copy", "-c:a", "aac", "-b:a", "128k", "-threads", "1"),
        *("-aac_coder", "fast"),  # at this rate nearer to the speech than the default, for two thirds of its time
        *("-af", f"{delay},apad" if fit == "video" else delay),
        # By default what is copied may run ten seconds ahead, and then ends where it is, not with the shortest.
        *("-shortest", "-shortest_buf_duration", "3600"),
        *("-fs", str(MAX_DOWNLOAD_BYTES + 1)),  # a short film that is heavy would grow without end as it repeats
        *("-movflags", "+faststart", "-f", "mp4", f"file:{final}"),
    ]


MAX_BOXES = 10_000  # of an MP4 at its top level; a film in fragments has some hundreds
FIRST_BOXES = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip")  # QuickTime's may begin without ftyp


async def mux_video_audio(video: Path, speech: Path, final: Path, fit: Fit = "shortest") -> None:
    """Put speech (in TTS_OUTPUT_FORMAT) and film together; the video stream is copied bit by bit.

    No more at once than there are cores. Raises ResourceFailed if ffmpeg cannot use them, takes over a minute or 100 MB.
    """
    await asyncio.to_thread(check_film, video)
    arguments = mux_arguments(video, speech, speech_file().demuxer, fit, final)
    async with shared() as resources, resources.ffmpeg_slots:
        await run_ffmpeg(arguments, FFMPEG_TIMEOUT_S)
    check_size(os.path.getsize(final), "The talking film")  # noqa: ASYNC240  a moment; ffmpeg has stopped there


async def run_ffmpeg(arguments: list[str], timeout_s: float) -> None:
    """Run ffmpeg to its end; it is killed and reaped however this call ends. Raises ResourceFailed."""
    process = await asyncio.create_subprocess_exec(
        await asyncio.to_thread(ffmpeg_path),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={},  # it needs no key
        start_new_session=True,  # Ctrl-C in a terminal is for the service, which lets jobs finish
    )
    try:
        told = await asyncio.wait_for(last_words(process), timeout_s)
    except asyncio.TimeoutError as exc:
        raise ResourceFailed(f"The film could not be put together within {timeout_s:g} s.") from exc
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        logger.warning("ffmpeg ended with %s: %s", process.returncode, told)
        raise ResourceFailed("Film and speech could not be put together; ffmpeg cannot use one of them.")


async def last_words(process: asyncio.subprocess.Process) -> str:
    """The end of what a process writes to stderr, once it has ended; noise without end is not kept."""
    assert process.stderr is not None
    tail = b""
    while chunk := await process.stderr.read(CHUNK_BYTES):
        tail = (tail + chunk)[-1000:]
    await process.wait()
    return " | ".join(tail.decode("utf-8", "replace").split("\n")).strip(" |")


def check_film(video: Path) -> None:
    """Refuse a file that is no MP4, or breaks off; ffmpeg would make a shorter film of it. Raises ResourceFailed."""
    size, offset = video.stat().st_size, 0
    with video.open("rb") as file:
        for _ in range(MAX_BOXES):
            if offset >= size:
                break
            file.seek(offset)
            length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            if offset == 0 and name not in FIRST_BOXES:
                raise ResourceFailed("What the model made is not an MP4 film.", "replicate")
            # ISO/IEC 14496-12: 0 is a box to the file's end, 1 one whose length follows.
            offset = size if length == 0 else offset + max(8, long_length if length == 1 else length)
    if offset != size or size == 0:
        raise ResourceFailed("The film that the model made breaks off.", "replicate")


# ----------------------------------------------------------------------------------------------------------------
# Application
# ----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold what the jobs share for the life of the process; at its end, wait for the answers of cancelled jobs."""
    global _running
    set_up_log()
    if missing := get_settings().missing():
        logger.warning("not set: %s; requests that need them are answered 500", ", ".join(missing))
    await asyncio.to_thread(ffmpeg_path)  # fails here rather than after a film was paid for
    async with shared() as _running:
        try:
            yield
        finally:
            # uvicorn has just cancelled the jobs still running: their predictions are being cancelled.
            patience = time.monotonic() + SHUTDOWN_WAIT_S
            while _running.jobs and time.monotonic() < patience:  # noqa: ASYNC110  an event would be set all day
                await asyncio.sleep(0.05)
            _running = None


def set_up_log() -> None:
    """Write the service's lines to stderr, unless whoever runs it has set up logging already."""
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
        logger.logger.addHandler(handler)


class RedactingFormatter(logging.Formatter):
    """Keeps keys out of the log, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without keys."""
        return redact(super().format(record))


class RequestContext:
    """Gives each request its Job, and each answer X-Request-ID and Server-Timing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The outermost layer, so that nothing is answered without an id."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        job = Job(told if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", told) else uuid.uuid4().hex)
        scope.setdefault("state", {})["job"] = job
        current_request_id.set(job.request_id)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = job.request_id
                if job.timings:
                    headers["Server-Timing"] = job.server_timing()
            await send(message)

        async with shared() as resources:
            resources.jobs.add(job)
            try:
                await self.app(scope, receive, send_with_headers)
            finally:
                resources.jobs.discard(job)


class ErrorAnswers:
    """Answers what nothing below has answered, inside CORS: bodies over the limit, and the unforeseen."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through but a 413 and exceptions."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        is_started = is_replaced = False

        async def send_unless_too_large(message: Message) -> None:
            nonlocal is_started, is_replaced
            if message["type"] == "http.response.start" and message["status"] == 413:
                is_replaced = True
                error = InvalidInput(f"The request's body is larger than {MAX_REQUEST_BYTES // 1024} KiB.")
                await error_response(request, error)(scope, receive, send)
            if not is_replaced:
                is_started = True
                await send(message)

        try:
            await self.app(scope, receive, send_unless_too_large)
        except Exception as exc:  # noqa: BLE001  the last resort: logged, and told without inside detail
            error = as_service_error(exc)
            if not (is_started or is_replaced):
                await error_response(request, error)(scope, receive, send)


def error_response(request: Request, error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for an error."""
    return JSONResponse(error_json(error, request.state.job), error.http_status, headers)


def in_words(fault: Mapping[str, Any]) -> str:
    """What Pydantic says of a fault, without regular expressions."""
    return PATTERNS_IN_WORDS.get(fault.get("ctx", {}).get("pattern", ""), plain(fault["msg"]))


async def answer_invalid(request: Request, exc: Exception) -> Response:
    """A body that is not as the route wants it."""
    assert isinstance(exc, RequestValidationError)
    errors = [InputError(loc=list(fault["loc"]), msg=in_words(fault)) for fault in exc.errors()]
    first = errors[0]
    name = ".".join(part for part in first.loc[1:] if isinstance(part, str)) or "The body"
    detail = f"{name}: {first.msg}."
    if not re.match(r"application/([\w.-]+\+)?json\b", request.headers.get("content-type", ""), re.IGNORECASE):
        detail = "The body must be JSON, sent with Content-Type: application/json."
    return error_response(request, InvalidInput(detail, errors=errors))


async def answer_http_error(request: Request, exc: Exception) -> Response:
    """What the framework refuses: no such route (404), no such method (405), a body it cannot parse (400)."""
    assert isinstance(exc, HTTPException)
    error = InvalidInput(f"{exc.detail}.")
    error.http_status = exc.status_code
    return error_response(request, error, exc.headers)


app = FastAPI(
    title="Talking Pet",
    summary="A picture of a pet and a line of text go in, a video in which the pet says it comes out.",
    lifespan=lifespan,
    redirect_slashes=False,  # a 307 is no answer of this service; it would name http:// behind a proxy
    exception_handlers={
        RequestValidationError: answer_invalid,
        HTTPException: answer_http_error,
    },
)
# The last one added is the outermost.
app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_REQUEST_BYTES)
app.add_middleware(ErrorAnswers)
app.add_middleware(
    CORSMiddleware,
    allow_origins=get_settings().allowed_origin.split(","),
    allow_methods=["GET", "POST"],
    allow_headers=["*"],
    expose_headers=["X-Request-ID", "Server-Timing"],
)
app.add_middleware(RequestContext)


# ----------------------------------------------------------------------------------------------------------------
# Running a job: its deadline, a client that leaves, its two forms of answer
# ----------------------------------------------------------------------------------------------------------------

Result = TypeVar("Result", bound=BaseModel)


async def run_job(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled and cleaned up when the job's time is over or the client has left.

    Raises what `work` raises, the deadline's error, or Unforeseen (client gone, process ending).
    """
    job: Job = request.state.job
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(client_left(request))  # Starlette does not cancel a plain handler by itself
    outcome = "ok"
    try:
        limit_s = get_settings().job_timeout_seconds
        await asyncio.wait({working, leaving}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Unforeseen("The client has left.") if leaving.done() else job.late()
    except asyncio.CancelledError:
        outcome = "shutdown"
        raise Unforeseen("The service is restarting and could not finish the job; try again.") from None
    except ServiceError as exc:
        outcome = "left" if leaving.done() and not working.done() else exc.category
        raise
    except Exception:
        outcome = "internal"
        raise
    finally:
        leaving.cancel()
        await end(working)
        job.log_end(request.url.path, outcome)


async def end(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait for its clean-up: prediction cancelled, ffmpeg reaped, files gone."""
    task.cancel()
    await to_its_end(task)
    if not task.cancelled():
        task.exception()  # seen: asyncio need not warn of it


async def client_left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer_job(request: Request, work: Coroutine[Any, Any, BaseModel]) -> Response:
    """Run a job and answer it as the client asked: JSON at the end, or events as they happen."""
    running = run_job(request, work)
    if "text/event-stream" not in request.headers.get("accept", "").lower():
        return Response((await running).model_dump_json(), media_type="application/json")
    events: asyncio.Queue[StageEvent | None] = asyncio.Queue()
    request.state.job.tell = events.put_nowait
    task = asyncio.create_task(running)
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        first = await next_part(events)
    except asyncio.CancelledError:
        task.cancel()
        first = None
    if first is None:  # it ended before anything was begun: a plain error
        await task
    return JobEvents(job_events(request.state.job, first, events, task), headers=STREAM_HEADERS)


STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx: pass them on at once


class JobEvents(EventSourceResponse):
    """FastAPI's event stream, which run_job ends when the client leaves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events to the last one, also when the process is ending."""
        await self.stream_response(send)


async def job_events(
    job: Job, part: bytes | None, events: "asyncio.Queue[StageEvent | None]", task: "asyncio.Task[BaseModel]"
) -> AsyncIterator[bytes]:
    """Every stage event, comments while there is none, and exactly one `result` or `error` at the end."""
    try:
        while part is not None:
            yield part
            part = await next_part(events)
    except asyncio.CancelledError:  # the process is ending: run_job turns that into an error
        task.cancel()
    try:
        yield format_sse_event(event="result", data_str=(await task).model_dump_json())
    except Exception as exc:  # noqa: BLE001  whatever happened is told
        error = as_service_error(exc)
        body = {"status": error.http_status, **error_json(error, job)}
        yield format_sse_event(event="error", data_str=json.dumps(body, separators=(",", ":"), ensure_ascii=False))


async def next_part(events: "asyncio.Queue[StageEvent | None]") -> bytes | None:
    """The next stage event as it is sent, a comment if there is none for KEEPALIVE_SECONDS, None after the last."""
    try:
        event = await asyncio.wait_for(events.get(), get_settings().keepalive_seconds)
    except asyncio.TimeoutError:
        return KEEPALIVE_COMMENT
    if event is None:
        return None
    return format_sse_event(event="stage", data_str=event.model_dump_json(exclude_none=True))


# ----------------------------------------------------------------------------------------------------------------
# The two jobs
# ----------------------------------------------------------------------------------------------------------------


async def video_job(body: JobPromptOnly, job: Job) -> VideoResult:
    """A silent film."""
    model = await check_job(body, VIDEO_JOB_SETTINGS)
    return VideoResult(video_url=await animate(body, model, job))


async def speech_job(body: JobPromptTTS, job: Job) -> SpeechResult:
    """A talking film: the cheap step comes first, so that a bad text or voice costs no film."""
    check_text(body.text)
    model = await check_job(body, SPEECH_JOB_SETTINGS, audio_url="made in a moment")
    audio_url = await speak(body, job)
    video_url = await animate(body, model, job, audio_url)
    with tempfile.TemporaryDirectory(prefix="talking-pet-") as folder:
        if model.speech_field:
            final = await speaking_film(video_url, Path(folder), job)
        else:
            final = await muxed_film(video_url, audio_url, Path(folder), body.fit, job)
        with job.stage("final_upload"):
            final_url = await supabase_upload(f"videos/{uuid.uuid4()}.mp4", final, "video/mp4")
    return SpeechResult(audio_url=audio_url, video_url=video_url, final_url=final_url)


async def check_job(body: JobPromptOnly, settings: tuple[str, ...], audio_url: str | None = None) -> VideoModel:
    """Refuse, before anything is bought, what cannot succeed; returns the model that is asked for."""
    for name in settings:
        get_settings().required(name)
    check_picture_host(httpx.URL(body.image_url).host)
    model = await find_model(body.model)
    fit_input(model, body, audio_url)
    return model


def check_text(text: str) -> None:
    """Refuse a text that is too long. Raises InvalidInput."""
    if len(text) > (most := get_settings().tts_max_chars):
        raise unfit("text", f"has {len(text)} characters, at most {most} are spoken")


def check_picture_host(host: str) -> None:
    """Refuse a picture that Replicate can never reach; names are not looked up here. Raises InvalidInput."""
    is_address = re.fullmatch(r"[\d.]+|[\da-fA-F:.]*:[\da-fA-F:.]*", host)
    is_local = not is_public(host) if is_address else host.rstrip(".").rpartition(".")[2] == "localhost"
    if is_local and not get_settings().allow_private_urls:
        raise unfit("image_url", "is an address on your own machine or network; the picture must be on the internet")


async def speak(body: JobPromptTTS, job: Job) -> str:
    """Have the text spoken and return the speech's URL; the speech itself is not held while the film is made."""
    with job.stage("speech"):
        speech = await elevenlabs_tts_bytes(body.text, body.voice_id)
    with job.stage("audio_upload"):
        kept_as = speech_file()
        audio_path = f"audio/{uuid.uuid4()}.{kept_as.extension}"
        audio_url = await supabase_upload(audio_path, speech, kept_as.content_type)
    job.partial.audio_url = audio_url
    return audio_url


async def animate(body: JobPromptOnly, model: VideoModel, job: Job, audio_url: str | None = None) -> str:
    """Have the film made and return its URL."""
    with job.stage("video"):
        if model is HAILUO:
            video_url = await hailuo_video_from_prompt(body, job.on_prediction)
        else:
            video_url = await replicate_video_from_prompt(body, audio_url, job.on_prediction, model)
    job.partial.video_url = video_url
    return video_url


async def muxed_film(video_url: str, audio_url: str, folder: Path, fit: Fit, job: Job) -> Path:
    """The film with our speech, in `folder`."""
    video, speech, final = folder / "video.mp4", folder / "speech", folder / "final.mp4"
    with job.stage("download"):
        await side_by_side(download(video_url, video), download(audio_url, speech))
    with job.stage("mux"):
        await mux_video_audio(video, speech, final, fit)
    return final


async def speaking_film(video_url: str, folder: Path, job: Job) -> Path:
    """The film of a model that was given the speech: it speaks by itself and is stored as it is."""
    final = folder / "final.mp4"
    with job.stage("download"):
        await download(video_url, final)
        await asyncio.to_thread(check_film, final)
    return final


async def side_by_side(*works: Coroutine[Any, Any, None]) -> None:
    """Await several at once; if one fails, the others are ended before the error goes on."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            await end(task)


# ----------------------------------------------------------------------------------------------------------------
# Routes
# ----------------------------------------------------------------------------------------------------------------


def error_examples(*errors: ServiceError) -> dict[str, Any]:
    """How errors stand in /docs: each with an example."""
    job = Job("7f3c0e5a9d2b4c61")
    examples = {type(error).__name__: {"value": error_json(error, job)} for error in errors}
    return {"model": ErrorBody, "content": {"application/json": {"examples": examples}}}


JOB_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {
        "description": "The request cannot succeed as it stands",
        **error_examples(
            unfit("seconds", f"{DEFAULT_MODEL} takes 6 or 10"),
            ProviderRefused("ElevenLabs answered 404: A voice with this id was not found.", "elevenlabs"),
            SpeechTooLarge("The speech is larger than 9.5 MB; use a shorter text.", "elevenlabs"),
        ),
    },
    500: {
        "description": "The service or a provider failed; `partial` holds what was made until then",
        **error_examples(
            SettingMissing("The service is not set up for this: set ELEVEN_API_KEY."),
            ProviderFailed("Replicate answered 402: You have insufficient credit to run this model.", "replicate"),
            ResourceFailed("Supabase Storage answered 400: Bucket not found", "supabase"),
            Unforeseen("Something unforeseen went wrong inside the service; its log has the request id."),
        ),
    },
    "default": {"description": "No such route or method", "model": ErrorBody},
}
HEAD_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {
        "description": "The URL may not be fetched",
        **error_examples(UrlBlocked("The URL leads to an address that is not public.")),
    },
    500: {
        "description": "The URL did not answer",
        **error_examples(ResourceFailed("The URL did not answer within 10 s.")),
    },
    "default": JOB_ERRORS["default"],
}


def event_stream(example: BaseModel) -> dict[int | str, dict[str, Any]]:
    """How the second form of an answer stands in /docs."""
    events = [
        ("stage", StageEvent(stage="video", state="started", seconds=0)),
        ("stage", StageEvent(stage="video", state="started", seconds=12.5, status="processing", percent=40)),
        ("stage", StageEvent(stage="video", state="done", seconds=31.2)),
        ("result", example),
    ]
    text = "".join(f"event: {name}\ndata: {data.model_dump_json(exclude_none=True)}\n\n" for name, data in events)
    result = {"$ref": f"#/components/schemas/{type(example).__name__}"}
    told = [StageEvent.model_json_schema(), result, {"$ref": "#/components/schemas/ErrorBody"}]
    item = {  # one event, described as FastAPI describes them
        "type": "object",
        "description": "With `Accept: text/event-stream`: `stage` events as the job goes on, comments while nothing "
        "happens, then one `result` (the JSON body) or one `error` (the error body and `status`).",
        "required": ["event", "data"],
        "properties": {
            "event": {"type": "string", "enum": ["stage", "result", "error"]},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": told}},
        },
    }
    plain = {"example": example.model_dump()}
    return {200: {"content": {"application/json": plain, "text/event-stream": {"itemSchema": item, "example": text}}}}


EXAMPLE_VIDEO = VideoResult(video_url="https://replicate.delivery/xezq/film.mp4")
EXAMPLE_SPEECH = SpeechResult(
    video_url=EXAMPLE_VIDEO.video_url,
    audio_url=EXAMPLE_PICTURE.replace("pet.jpg", "audio/0b1f3a52-8d6e-4c6f-9a53-2f4f3c1f7a10.mp3"),
    final_url=EXAMPLE_PICTURE.replace("pet.jpg", "videos/5e0f9d0c-7f0b-4a39-9c1c-7f1f1f0f2b11.mp4"),
)


@app.get("/health", summary="Is the process up?")
async def health() -> Health:
    """Answers at once, whatever else goes on."""
    return Health()


@app.post(
    "/jobs_prompt_only",
    response_model=VideoResult,
    responses={**event_stream(EXAMPLE_VIDEO), **JOB_ERRORS},
    summary="Bring a picture to life",
)
async def jobs_prompt_only(body: JobPromptOnly, request: Request) -> Response:
    """A silent film from a picture and a prompt."""
    return await answer_job(request, video_job(body, request.state.job))


@app.post(
    "/jobs_prompt_tts",
    response_model=SpeechResult,
    responses={**event_stream(EXAMPLE_SPEECH), **JOB_ERRORS},
    summary="Make a picture talk",
)
async def jobs_prompt_tts(body: JobPromptTTS, request: Request) -> Response:
    """A film in which the picture says a text."""
    return await answer_job(request, speech_job(body, request.state.job))


@app.post("/debug/head", responses=HEAD_ERRORS, summary="Look at a remote file")
async def debug_head(body: HeadRequest) -> HeadResult:
    """Status, content type and size of a file on the public internet."""
    return await head(body.url)
