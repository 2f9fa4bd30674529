"""The sandbox: strict local stand-ins for ElevenLabs, Replicate and Supabase, with real media.

with Sandbox() as sandbox:
    sandbox.environment()                      # the variables that point the service here
    sandbox.fault("poll", "status", status=503)
    sandbox.calls("create")                    # the requests that came in
    sandbox.speeches, sandbox.predictions      # what was paid for

All three have the same origin. Any number of service processes may use one sandbox, at once or one
after the other, and may be killed at any moment.
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

THREAD_NAME = "sandbox"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 2.0  # after that the thread is left to end with the process
# As at the front ends of real providers; with uvicorn's own 5 s, clients would reuse a connection
# just as it closes.
KEEP_ALIVE_S = 75

DEFAULT_MODEL = "minimax/hailuo-02"  # the service's
PICTURE_KINDS = {  # first bytes of a picture -> its extension
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
}
VIDEO_KINDS = {  # files that are no videos
    "html": b"<!DOCTYPE html><html><body>Not a video</body></html>",
    "noise": bytes((i * 197 + i // 7 * 31) % 256 for i in range(50_000)),
    "empty": b"",
}


class Sandbox(Behaviour):
    """The three providers in a thread of this process; a context manager.

    Keyword arguments set the behaviour.
    """

    def __init__(self, port: int = 0, *, record: bool = True, **behaviour: Any) -> None:
        super().__init__(**behaviour)
        self.initial = Behaviour(**behaviour)
        self.port = port
        self.service_url = ""
        self.picture_file = PET_FILE
        self.pictures: dict[str, bytes] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="sandbox-")
        self.workshop = Workshop()
        self.wire = Wire(record, default_body)
        self.elevenlabs = elevenlabs.ElevenLabs(self, self.workshop)
        self.replicate = replicate.Replicate(self, self.workshop, lambda: self.url)
        self.supabase = supabase.Supabase(Path(self.folder.name))
        # The picture of the examples in the service's /docs.
        self.supabase.give("pets/pet.jpg", PET_FILE.read_bytes(), "image/jpeg")
        self.server: uvicorn.Server | None = None
        self.thread: threading.Thread | None = None

    # Running

    def start(self) -> Sandbox:
        """Listen on the given port, or on a free one, and return when requests are answered.

        Raises PortTaken.
        """
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
            # From Python 3.12 on, uvicorn otherwise waits for every response, even if forced.
            timeout_graceful_shutdown=0,
        )
        logging.getLogger("uvicorn.error").addFilter(not_from_this_thread)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run,
            args=([listener],),
            name=THREAD_NAME,
            daemon=True,
        )
        self.thread.start()
        self.wait_until_started(self.server, self.thread)
        return self

    def wait_until_started(self, server: uvicorn.Server, thread: threading.Thread) -> None:
        """Return when the server answers. Raises RuntimeError if it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the sandbox did not start")
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop at once, even in the middle of a request."""
        if self.server is not None and self.thread is not None:
            self.server.should_exit = True
            self.server.force_exit = True
            self.thread.join(STOP_TIMEOUT_S)
        self.workshop.close()
        self.folder.cleanup()

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def router(self) -> Router:
        """The routes of the three providers, and the sandbox's own."""

        def on(call: str, handler: Handler) -> Endpoint:
            """The endpoint of a call, recorded under its name."""
            return Endpoint(self.wire, call, handler)

        own = [
            Route("/", on("page", self.page), methods=["GET"]),
            Route("/client.js", on("page", self.client), methods=["GET"]),
            Route("/pet.jpg", on("picture", self.picture), methods=["GET"]),
            Route("/pictures/{name}", on("picture", self.added_picture), methods=["GET"]),
            Route("/pictures", on("page", self.add_picture), methods=["POST"]),
        ]
        routes = [
            *own,
            *self.elevenlabs.routes(on),
            *self.replicate.routes(on),
            *self.supabase.routes(on),
            Route("/{path:path}", on("other", self.unknown)),
        ]
        return Router(routes)

    # What a client must know

    @property
    def url(self) -> str:
        """The origin of all three providers, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def image_url(self) -> str:
        """The URL of the pet's picture."""
        return f"{self.url}/pet.jpg"

    @property
    def voice_id(self) -> str:
        """A voice that exists."""
        return next(iter(elevenlabs.VOICES))

    def environment(self) -> dict[str, str]:
        """The settings that point the service at the sandbox."""
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
        """The requests of one call, one of `wire.CALLS`."""
        return [request for request in self.wire.requests if request.call == call]

    @property
    def predictions(self) -> dict[str, Prediction]:
        """Every prediction by its id, in order of creation."""
        return self.replicate.predictions

    def created(self, **values: Any) -> list[Prediction]:
        """The predictions whose input has all these values, in order of creation."""
        predictions = list(self.predictions.values())
        return [one for one in predictions if values.items() <= one.input.items()]

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
        """The buckets by name; a test may change them or add others."""
        return self.supabase.buckets

    # What happens next

    def fault(self, call: str, kind: str, times: int | None = 1, **details: Any) -> None:
        """Let the next `times` requests of this call fail (None: all of them).

        `wire.FAULTS` has the kinds, with their details.
        """
        self.wire.add_fault(call, kind, times, details)

    def outcome(self, status: str, error: str | None = None, times: int = 1) -> None:
        """Let the next `times` predictions end with this status, one of `replicate.OUTCOMES`."""
        if status not in OUTCOMES:
            raise ValueError(f"no such outcome: {status}; outcomes: {', '.join(OUTCOMES)}")
        for _ in range(times):
            self.replicate.outcomes.append((status, error))

    def video(self, video: bytes | str | None) -> None:
        """The file that the next predictions make.

        It is given as bytes or as one of VIDEO_KINDS; None: a real video of the picture.
        """
        if isinstance(video, str):
            video = VIDEO_KINDS[video]
        self.replicate.video = video

    def expire(self, prediction_id: str) -> None:
        """Remove what an ended prediction holds, as Replicate does an hour after its end.

        Raises ValueError if it has not ended.
        """
        self.predictions[prediction_id].expire()

    def limits(
        self, creates_per_minute: int | None = 600, others_per_minute: int | None = 3000
    ) -> None:
        """Turn on Replicate's rate limits; `others_per_minute` counts every call but create."""
        self.replicate.creates = Limit(creates_per_minute)
        self.replicate.others = Limit(others_per_minute)

    def reset(self) -> None:
        """Forget requests, faults, predictions and objects, and behave as at the start.

        Media already made are kept.
        """
        self.behave_as(self.initial)
        self.pictures.clear()
        self.wire.clear()
        self.elevenlabs.clear()
        self.replicate.clear()
        self.supabase.clear()

    # Its own pages

    async def page(self, request: Request) -> Response:
        """`GET /`: the page to try the service with."""
        if not PAGE_FILE.exists():
            return Response("no page here", 404)

        values = {
            "SERVICE_URL": self.service_url,
            "IMAGE_URL": self.image_url,
            "VOICE_ID": self.voice_id,
            "MODELS": script_json(self.known_models()),
            "VOICES": script_json(self.known_voices()),
        }
        page = PAGE_FILE.read_text(encoding="utf-8")
        for name, value in values.items():
            page = page.replace("{{" + name + "}}", value)
        return Response(page, media_type="text/html", headers={"cache-control": "no-cache"})

    def known_models(self) -> list[dict[str, Any]]:
        """What the page shows about each model, the service's default first."""
        models = list(self.replicate.models.values())
        models.sort(key=lambda model: model.name != DEFAULT_MODEL)
        return [
            {
                "name": model.name,
                "speaks": model.speaks,
                "official": model.official,
                "version": model.version,
            }
            for model in models
        ]

    def known_voices(self) -> list[dict[str, Any]]:
        """What the page shows about each voice."""
        return [
            {"id": voice_id, "name": voice.name} for voice_id, voice in elevenlabs.VOICES.items()
        ]

    async def client(self, request: Request) -> Response:
        """`GET /client.js`: the client script, for pages of any origin."""
        if not CLIENT_FILE.exists():
            return await self.unknown(request)
        headers = {"cache-control": "no-cache", "access-control-allow-origin": "*"}
        script = CLIENT_FILE.read_bytes()
        return Response(script, media_type="text/javascript", headers=headers)

    async def picture(self, request: Request) -> Response:
        """`GET /pet.jpg`: the picture of the pet."""
        media_type, _ = mimetypes.guess_type(self.picture_file.name)
        picture = self.picture_file.read_bytes()
        return picture_response(request, picture, media_type or "application/octet-stream")

    async def add_picture(self, request: Request) -> Response:
        """`POST /pictures`: store a picture, as a front end's storage would, and return its URL."""
        picture = await request.body()
        extension = picture_extension(picture)
        if extension is None:
            return JSONResponse({"detail": "it is no JPEG, PNG, WebP or GIF."}, 400)
        name = f"{uuid.uuid4()}.{extension}"
        self.pictures[name] = picture
        return JSONResponse({"url": f"{self.url}/pictures/{name}"})

    async def added_picture(self, request: Request) -> Response:
        """`GET /pictures/{name}`: a picture that the page has stored."""
        name = request.path_params["name"]
        if name not in self.pictures:
            return await self.unknown(request)
        extension = name.rpartition(".")[2]
        media_type = "image/" + extension.replace("jpg", "jpeg")
        return picture_response(request, self.pictures[name], media_type)

    async def unknown(self, request: Request) -> Response:
        """The 404 for a path that no provider has."""
        detail = f"the sandbox knows no {request.method} {request.url.path}"
        return JSONResponse({"detail": detail, "status": 404}, 404)


def not_from_this_thread(record: logging.LogRecord) -> bool:
    """Keep the log of the sandbox's own server, such as cut connections, out of the service's."""
    return record.threadName != THREAD_NAME


def script_json(value: Any) -> str:
    """A value as JSON that is safe inside a page's <script>."""
    return json.dumps(value).replace("<", "\\u003c")


def picture_extension(picture: bytes) -> str | None:
    """The file name's extension for this picture; None if it is no picture."""
    for start, extension in PICTURE_KINDS.items():
        if picture.startswith(start):
            return extension
    return None


def picture_response(request: Request, picture: bytes, media_type: str) -> Response:
    """A picture for pages of any origin."""
    headers = {"content-type": media_type, "access-control-allow-origin": "*"}
    return file_response(request, picture, headers)


def default_body(call: str, status: int) -> Any:
    """The body of a fault, in the shape of the call's provider."""
    if call == "speech":
        return elevenlabs.default_body(status)
    if call in ("upload", "move", "objects", "public", "storage"):
        return supabase.default_body(status)
    return replicate.default_body(status)
