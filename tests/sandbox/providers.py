"""The sandbox: ElevenLabs, Replicate and Supabase as strict local stand-ins on one origin, with real media.

with Sandbox() as sandbox:
    sandbox.environment()                      # the variables that point the service here
    sandbox.fault("read", "status", status=503)
    sandbox.calls("create")                    # what came in
    sandbox.speeches, sandbox.predictions      # what was bought

Any number of service processes may use one sandbox at once, one after the other, and be killed at any moment.
"""

from __future__ import annotations

import json
import logging
import mimetypes
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from . import elevenlabs, ports, replicate, supabase
from .behaviour import Behaviour, Workshop
from .replicate import OUTCOMES, Limit, Prediction
from .supabase import Bucket, StoredObject
from .wire import Endpoint, Handler, Recorded, Wire, file_response

HERE = Path(__file__).parent
PET_FILE = HERE / "pet.jpg"
PAGE_FILE = HERE / "page.html"
CLIENT_FILE = HERE / "client.js"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 2.0  # after that the thread is left to end with the process
PICTURE_KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp", b"GIF8": "gif"}  # by first bytes
DEFAULT_MODEL = "minimax/hailuo-02"  # of the service
KEEP_ALIVE_S = (
    75  # as front ends of real providers have it; uvicorn's own 5 s would meet clients that reuse a connection
)
VIDEO_KINDS = {
    "html": b"<!DOCTYPE html><html><body>Not a video</body></html>",
    "noise": bytes((i * 197 + i // 7 * 31) % 256 for i in range(50_000)),
    "empty": b"",
}


class Sandbox(Behaviour):
    """The three providers in a thread of this process; a context manager. Keyword arguments set the behaviour."""

    def __init__(self, port: int = 0, *, record: bool = True, **behaviour: Any) -> None:
        super().__init__(**behaviour)
        self.initial = Behaviour(**behaviour)
        self.port, self.service_url, self.picture_file = port, "", PET_FILE
        self.folder = tempfile.TemporaryDirectory(prefix="sandbox-")
        self.workshop = Workshop()
        self.pictures: dict[str, bytes] = {}
        self.wire = Wire(record, default_body)
        self.elevenlabs = elevenlabs.ElevenLabs(self, self.workshop)
        self.replicate = replicate.Replicate(self, self.workshop, lambda: self.url)
        self.supabase = supabase.Supabase(Path(self.folder.name))
        self.supabase.give("pets/pet.jpg", PET_FILE.read_bytes(), "image/jpeg")  # the picture of the examples in /docs
        self.server: uvicorn.Server | None = None
        self.thread: threading.Thread | None = None

    # Running

    def start(self) -> Sandbox:
        """Listen, on a free port unless one was given; returns when requests are answered. PortTaken."""
        try:
            listener = ports.listen(self.port, "the providers", "--port")
        except ports.PortTaken:
            self.stop()
            raise
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self.router(),
            loop="asyncio",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=0,  # else, from Python 3.12 on, it waits for every answer, forced or not
        )
        logging.getLogger("uvicorn.error").addFilter(not_from_this_thread)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), name=THREAD_NAME, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.server.started:
            if not self.thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the sandbox did not start")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Stop at once, whatever is under way."""
        if self.server is not None and self.thread is not None:
            self.server.should_exit = self.server.force_exit = True
            self.thread.join(STOP_TIMEOUT_S)
        self.workshop.close()
        self.folder.cleanup()

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def router(self) -> Router:
        """Every provider's routes, and the sandbox's own."""

        def on(call: str, handler: Handler) -> Endpoint:
            return Endpoint(self.wire, call, handler)

        own = [
            Route("/", on("page", self.page), methods=["GET"]),
            Route("/client.js", on("page", self.client), methods=["GET"]),
            Route("/pet.jpg", on("picture", self.picture), methods=["GET"]),
            Route("/pictures/{name}", on("picture", self.added_picture), methods=["GET"]),
            Route("/pictures", on("page", self.add_picture), methods=["POST"]),
        ]
        rest = Route("/{path:path}", on("other", self.unknown))
        storage = self.supabase.routes(on)
        return Router([*own, *self.elevenlabs.routes(on), *self.replicate.routes(on), *storage, rest])

    # What a client needs to know

    @property
    def url(self) -> str:
        """The origin of all three providers, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def image_url(self) -> str:
        """The pet's picture."""
        return f"{self.url}/pet.jpg"

    @property
    def voice_id(self) -> str:
        """A voice that exists."""
        return next(iter(elevenlabs.VOICES))

    def environment(self) -> dict[str, str]:
        """The settings that point the service here."""
        return {
            "ELEVEN_API_KEY": elevenlabs.KEY,
            "ELEVEN_BASE_URL": self.url,
            "REPLICATE_API_TOKEN": replicate.TOKEN,
            "REPLICATE_BASE_URL": self.url,
            "SUPABASE_URL": self.url,
            "SUPABASE_SERVICE_ROLE": supabase.KEYS["service"],
            "SUPABASE_BUCKET": "pets",
            "ALLOW_PRIVATE_URLS": "true",
        }

    # What happened

    @property
    def requests(self) -> list[Recorded]:
        """Every request since the last reset, in order of arrival."""
        return self.wire.requests

    def calls(self, call: str) -> list[Recorded]:
        """The requests of one call."""
        return [request for request in self.wire.requests if request.call == call]

    @property
    def predictions(self) -> dict[str, Prediction]:
        """Every prediction by its id, in order of creation."""
        return self.replicate.predictions

    def created(self, **values: Any) -> list[Prediction]:
        """The predictions whose input has all these values, in order of creation."""
        return [one for one in list(self.predictions.values()) if values.items() <= one.input.items()]

    @property
    def speeches(self) -> Counter[str]:
        """How often each text was spoken, and paid for, since the last reset."""
        return self.elevenlabs.made

    @property
    def objects(self) -> dict[str, StoredObject]:
        """Every uploaded object by `bucket/path`."""
        return self.supabase.objects

    @property
    def buckets(self) -> dict[str, Bucket]:
        """The buckets; change or add what a test needs."""
        return self.supabase.buckets

    # What is to happen

    def fault(self, call: str, kind: str, times: int | None = 1, **details: Any) -> None:
        """Let the next `times` requests of this call go wrong (None: all); kinds and details: see `wire.FAULTS`."""
        self.wire.add_fault(call, kind, times, details)

    def outcome(self, status: str, error: str | None = None, times: int = 1) -> None:
        """Let the next `times` predictions end so: one of `replicate.OUTCOMES`."""
        if status not in OUTCOMES:
            raise ValueError(f"no such outcome: {status}; outcomes: {', '.join(OUTCOMES)}")
        self.replicate.outcomes.extend([(status, error)] * times)

    def video(self, video: bytes | str | None) -> None:
        """The file that the next predictions give: these bytes, one of VIDEO_KINDS, or None for a video of the picture."""
        self.replicate.video = VIDEO_KINDS[video] if isinstance(video, str) else video

    def expire(self, prediction_id: str) -> None:
        """Remove what an ended prediction holds, as Replicate does an hour after its end. ValueError if it runs yet."""
        self.predictions[prediction_id].expire()

    def limits(self, creates_per_minute: int | None = 600, reads_per_minute: int | None = 3000) -> None:
        """Turn Replicate's rate limits on; reads share theirs with every call but create."""
        self.replicate.creates, self.replicate.others = Limit(creates_per_minute), Limit(reads_per_minute)

    def reset(self) -> None:
        """Forget requests, faults, predictions, objects; behave as at the start. Media already made are kept."""
        self.behave_as(self.initial)
        self.pictures.clear()
        self.wire.clear()
        self.elevenlabs.clear()
        self.replicate.clear()
        self.supabase.clear()

    # Its own pages

    async def page(self, request: Request) -> Response:
        """The page to try the service with."""
        if not PAGE_FILE.exists():
            return Response("no page here", 404)
        page = PAGE_FILE.read_text(encoding="utf-8")
        known = {"SERVICE_URL": self.service_url, "IMAGE_URL": self.image_url, "VOICE_ID": self.voice_id}
        lists = {"MODELS": self.known_models(), "VOICES": self.known_voices()}
        for name, value in {**known, **{name: script_json(value) for name, value in lists.items()}}.items():
            page = page.replace("{{" + name + "}}", value)
        return Response(page, media_type="text/html", headers={"cache-control": "no-cache"})

    def known_models(self) -> list[dict[str, Any]]:
        """The models that video a picture, the service's default first, with what a person wants to know of each."""
        models = sorted(self.replicate.models.values(), key=lambda model: model.name != DEFAULT_MODEL)
        return [
            {"name": model.name, "speaks": model.speaks, "official": model.official, "version": model.version}
            for model in models
        ]

    def known_voices(self) -> list[dict[str, Any]]:
        """The voices that exist."""
        return [{"id": identity, "name": voice.name} for identity, voice in elevenlabs.VOICES.items()]

    async def client(self, request: Request) -> Response:
        """The client script, for pages of any origin."""
        if not CLIENT_FILE.exists():
            return await self.unknown(request)
        headers = {"cache-control": "no-cache", "access-control-allow-origin": "*"}
        return Response(CLIENT_FILE.read_bytes(), media_type="text/javascript", headers=headers)

    async def picture(self, request: Request) -> Response:
        """The pet."""
        media_type = mimetypes.guess_type(self.picture_file.name)[0] or "application/octet-stream"
        headers = {"content-type": media_type, "access-control-allow-origin": "*"}
        return file_response(request, self.picture_file.read_bytes(), headers)

    async def add_picture(self, request: Request) -> Response:
        """Keep a picture that the page brings, and say its address: a front end's own storage would do the same."""
        picture = await request.body()
        kind = next((kind for start, kind in PICTURE_KINDS.items() if picture.startswith(start)), None)
        if kind is None:
            return JSONResponse({"detail": "it is no JPEG, PNG, WebP or GIF."}, 400)
        name = f"{uuid.uuid4()}.{kind}"
        self.pictures[name] = picture
        return JSONResponse({"url": f"{self.url}/pictures/{name}"})

    async def added_picture(self, request: Request) -> Response:
        """A picture that the page has brought."""
        name = request.path_params["name"]
        if name not in self.pictures:
            return await self.unknown(request)
        kind = name.rpartition(".")[2].replace("jpg", "jpeg")
        headers = {"content-type": f"image/{kind}", "access-control-allow-origin": "*"}
        return file_response(request, self.pictures[name], headers)

    async def unknown(self, request: Request) -> Response:
        """A path that no provider has."""
        detail = f"the sandbox knows no {request.method} {request.url.path}"
        return JSONResponse({"detail": detail, "status": 404}, 404)


THREAD_NAME = "sandbox"


def not_from_this_thread(record: logging.LogRecord) -> bool:
    """Keep what uvicorn says of the sandbox's own server, cut connections above all, out of the service's log."""
    return record.threadName != THREAD_NAME


def script_json(value: Any) -> str:
    """A value as JSON that may stand in a script of a page."""
    return json.dumps(value).replace("<", "\\u003c")


def default_body(call: str, status: int) -> Any:
    """The body of a fault, in the shape of the call's provider."""
    if call == "speech":
        return elevenlabs.default_body(status)
    if call in ("upload", "public", "storage"):
        return supabase.default_body(status)
    return replicate.default_body(status)
