"""Jobs sent to a service over real sockets: request bodies, the event stream, and the outcome in either form."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import httpx

from tests.sandbox import Sandbox, media
from tests.sandbox.providers import PET_FILE

STAGES = ("speech", "audio_upload", "video", "download", "mux", "final_upload")
RESULT_FIELDS = {
    "audio_url",
    "video_url",
    "final_url",
    "audio_seconds",
    "final_seconds",
    "cut_seconds",
}
EVENT_STREAM = {"accept": "text/event-stream"}


def prompt_job(sandbox: Sandbox, **changes: Any) -> dict[str, Any]:
    """The body of a job without speech."""
    return {"image_url": sandbox.image_url, "prompt": "The cat looks up and talks", **changes}


def speech_job(sandbox: Sandbox, **changes: Any) -> dict[str, Any]:
    """The body of a speech job."""
    return prompt_job(sandbox, **{"text": "Feed me!", "voice_id": sandbox.voice_id, **changes})


def service_client(url: str, timeout: float = 120, **options: Any) -> httpx.AsyncClient:
    """A client of the service that waits `timeout` seconds at most; it loads no certificates, which takes a moment."""
    return httpx.AsyncClient(
        base_url=url, trust_env=False, verify=False, timeout=timeout, **options
    )


@lru_cache
def short_video(seconds: float = 2.0) -> bytes:
    """A small video, made once for all sandboxes."""
    return media.video(PET_FILE.read_bytes(), media.VideoPlan(seconds, 160))


# The event stream


@dataclass
class Event:
    """One event of a stream, named `comment` if it has no name; `text` is its data as written."""

    name: str
    text: str
    at: float = field(default_factory=time.monotonic)

    @property
    def data(self) -> Any:
        """The data as JSON."""
        return json.loads(self.text)


async def read_events(response: httpx.Response) -> AsyncIterator[Event]:
    """Every event of a stream, comments included, each as soon as it is complete."""
    name = text = ""
    async for line in response.aiter_lines():
        key, _, value = line.partition(":")
        if line.startswith(":"):
            yield Event("comment", value.strip())
        elif key == "event":
            name = value.strip()
        elif key == "data":
            text += value.removeprefix(" ")
        elif not line and name:
            yield Event(name, text)
            name = text = ""


async def stream_events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Event]:
    """Every event of a job, from the first to the end of the stream."""
    async with client.stream("POST", path, json=body, headers=EVENT_STREAM) as response:
        assert response.status_code == 200, await response.aread()
        return [event async for event in read_events(response)]


# A job in either form


class JobOutcome(NamedTuple):
    """The outcome of a request in either form: the result or error as it is written, and the stages before it."""

    status: int
    text: str
    stages: list[tuple[str, str]]
    is_replayed: bool

    @property
    def data(self) -> dict[str, Any]:
        """The result, or the error as the JSON form has it."""
        return {name: value for name, value in json.loads(self.text).items() if name != "status"}

    @property
    def kind(self) -> tuple[int, str | None, bool | None]:
        """Status, category, and whether it is retryable."""
        return self.status, self.data.get("category"), self.data.get("retryable")


async def send_job(url: str, path: str, body: dict[str, Any], headers: Any) -> JobOutcome:
    """Send a job to a service and return its outcome, in either form."""
    async with (
        service_client(url) as client,
        client.stream("POST", path, json=body, headers=headers) as response,
    ):
        is_replayed = response.headers.get("idempotency-replayed") == "true"
        if response.headers["content-type"] == "application/json":
            return JobOutcome(
                response.status_code, (await response.aread()).decode(), [], is_replayed
            )
        *stages, last = [event async for event in read_events(response) if event.name != "comment"]
    changed = [
        (one.data["stage"], one.data["state"]) for one in stages if one.data["state"] != "progress"
    ]
    return JobOutcome(
        last.data["status"] if last.name == "error" else 200, last.text, changed, is_replayed
    )
