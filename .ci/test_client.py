"""tests/sandbox/client.js in Node: every kind of response, and the mistakes that a front end makes."""

import json
import select
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import StartService
from tests.sandbox import Sandbox, Service
from tests.support.requests import short_video, speech_job

CLIENT = Path(__file__).parent.parent / "tests" / "sandbox" / "client.js"
NODE_S = 60.0
JOB = {
    "image_url": "https://example.com/pet.jpg",
    "prompt": "It nods",
    "text": "Feed me!",
    "voice_id": "Rex",
}
VIDEO = {"audio_url": "https://a", "video_url": "https://v", "final_url": "https://f"}
KEY = "a-key-of-one-job"

# A front end's call of makeVideo, and what came of it. `speedup` divides every delay.
CALL = """
import { VideoError, makeVideo } from "./client.js";
const { job, options, abortAt, failingDisplay, speedup, tabs, headersCode } = JSON.parse(process.argv[2]);
if (headersCode) options.headers = eval(headersCode);
if (speedup) {
  const setTimeout = globalThis.setTimeout;
  globalThis.setTimeout = (callback, milliseconds, ...rest) => setTimeout(callback, milliseconds / speedup, ...rest);
}
/** What the user or the page should do about an error, judging by its data and not by its message. */
function toDo(error) {
  if (!(error instanceof VideoError)) return "nothing: the user has aborted";
  if (error.errors.length) return `change ${error.errors.map(({ loc }) => loc.at(-1)).join(", ")}`;
  if (error.status === 401) return "sign in";
  if (error.retryable) return "retry";
  if (error.category === "network") return "check the address";
  return error.status === 400 ? "change the job" : "tell the operator";
}
async function call() {
  const outcome = { stages: [], retries: [], causes: [] };
  const controller = new AbortController();
  const abort = (moment) => moment === abortAt && controller.abort(new Error("aborted by the user"));
  const onStage = (stage) => {
    outcome.stages.push(stage);
    abort(stage.stage);
    if (failingDisplay) throw new Error("the display failed");
  };
  const onRetry = (error, seconds) => {
    outcome.retries.push(seconds);
    outcome.causes.push(error.message);
    abort("retry");
    queueMicrotask(() => abort("delay"));
  };
  abort("start");
  try {
    outcome.video = await makeVideo(job, { ...options, signal: controller.signal, onStage, onRetry });
  } catch (error) {
    outcome.is_video_error = error instanceof VideoError;
    outcome.to_do = toDo(error);
    outcome.error = { name: error.name, message: error.message, ...error };
  }
  return outcome;
}
console.log(JSON.stringify(await Promise.all(Array.from({ length: tabs }, call))));
"""


@dataclass
class Outcome:
    """What came of one call of makeVideo: a video or an error, and the calls of onStage and onRetry."""

    stages: list[dict[str, Any]]
    retries: list[float]
    causes: list[str]
    video: dict[str, str] | None = None
    error: dict[str, Any] = field(default_factory=dict)
    is_video_error: bool = False
    to_do: str = "show the video"


class Caller:
    """A front end in Node: a folder with the client in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(CLIENT, folder)
        (folder / "package.json").write_text('{"type": "module"}')

    def run(self, script: str, argument: Any) -> Any:
        """Run a script, and return the JSON that it prints."""
        command = ["node", "--input-type=module", "-", json.dumps(argument)]
        process = subprocess.run(
            command,
            cwd=self.folder,
            input=script,
            capture_output=True,
            text=True,
            timeout=NODE_S,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    def calls(
        self, job: dict[str, Any], options: dict[str, Any], tabs: int, **extras: Any
    ) -> list[Outcome]:
        """Several calls at the same time."""
        outcomes = self.run(CALL, {"job": job, "options": options, "tabs": tabs, **extras})
        return [Outcome(**outcome) for outcome in outcomes]

    def __call__(
        self,
        job: dict[str, Any],
        service: str,
        extras: dict[str, Any] | None = None,
        **options: Any,
    ) -> Outcome:
        """One call; `extras`: abortAt (start, retry, delay or a stage), failingDisplay, speedup, headersCode."""
        [outcome] = self.calls(job, {"service": service, **options}, 1, **(extras or {}))
        return outcome


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Caller:
    """A front end that calls the client."""
    return Caller(tmp_path_factory.mktemp("front-end"))


# ---- A proxy on the way to the service

Script = list[bytes | float]


@dataclass
class Forward:
    """Forward a request to the service, without its Accept header, or cut after these bytes of the response."""

    drop_accept: bool = False
    cut_after: bytes | None = None


@dataclass
class Received:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    body: bytes


class Proxy(ThreadingHTTPServer):
    """A proxy that a test scripts: each request gets the next of `responses`, or else is forwarded."""

    daemon_threads = True

    def __init__(self, upstream: str = "", *, listens: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler, bind_and_activate=False)
        self.server_bind()
        if listens:
            self.server_activate()
        self.upstream = urlsplit(upstream)
        self.responses: deque[Script | Forward] = deque()
        self.requests: list[Received] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """Its origin."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect in the middle of a response."""


class ProxyHandler(BaseHTTPRequestHandler):
    """One request at the proxy."""

    server: Proxy

    def do_POST(self) -> None:
        """Respond as the test says, or forward the request."""
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Received(self.path, headers, body))
        self.close_connection = True
        response = self.server.responses.popleft() if self.server.responses else Forward()
        if isinstance(response, Forward):
            self.forward(response, headers, body)
        else:
            self.play(response)

    def play(self, script: Script) -> None:
        """Send literal bytes, with pauses in seconds."""
        for part in script:
            if isinstance(part, bytes):
                self.wfile.write(part)
            else:
                self.server.closing.wait(part)

    def forward(self, rule: Forward, headers: dict[str, str], body: bytes) -> None:
        """Pass on the service's response until either side closes the connection, or until the cut."""
        sent = {**headers, "connection": "close"}
        if rule.drop_accept:
            sent["accept"] = "*/*"
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        upstream = self.server.upstream
        with socket.create_connection((upstream.hostname, upstream.port)) as service:
            service.sendall(f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
            passed = b""
            while True:
                readable, _, _ = select.select([service, self.connection], [], [])
                if self.connection in readable:  # the client has disconnected
                    return
                piece = service.recv(65_536)
                rest = b""
                if rule.cut_after:
                    _, _, rest = (passed + piece).partition(rule.cut_after)
                piece = piece[: len(piece) - len(rest)]
                self.wfile.write(piece)
                passed += piece
                if not piece or rest:
                    return

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def running_proxy(upstream: str = "") -> Iterator[Proxy]:
    """A running proxy."""
    with Proxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield proxy
        proxy.closing.set()
        proxy.shutdown()
        thread.join()


@pytest.fixture
def stand_in() -> Iterator[Proxy]:
    """In place of the service: it responds exactly as a test says."""
    yield from running_proxy()


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    """In front of the running service."""
    yield from running_proxy(service.url)


def plain(status: int, body: Any, kind: str = "application/json", **headers: str) -> Script:
    """A complete response."""
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nX-Request-ID: r-1\r\n"
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return [f"{head}{more}\r\n".encode() + content]


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nX-Request-ID: r-1\r\n\r\n"
CHUNKED_HEAD = STREAM_HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"


def event(name: str, data: Any) -> bytes:
    """One event as the service writes it."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


STARTED = {"stage": "speech", "state": "started", "seconds": 0}
STARTING = event("stage", STARTED)
BODY = {
    "category": "provider",
    "provider": "replicate",
    "request_id": "r-2",
    "retryable": True,
    "detail": "Busy.",
}
PAGE = "<!doctype html><h1>502 Bad Gateway</h1>"
VIDEO_STREAM: Script = [STREAM_HEAD, STARTING, b": still at work\n\n", event("result", VIDEO)]

BREAKS: dict[str, Script] = {
    "ends early": [STREAM_HEAD, STARTING],
    "ends in an event": [STREAM_HEAD, STARTING + event("result", VIDEO)[:-1]],
    "cut in a chunk": [CHUNKED_HEAD, b"ffff\r\n" + STARTING],
    "cut in JSON": [plain(200, VIDEO)[0][:-1]],  # type: ignore[index]
    "closed at once": [],
    "a proxy's page": plain(502, PAGE, "text/html"),
    "a portal's page": plain(200, PAGE, "text/html"),
    "JSON of another server": plain(503, {"message": "no healthy upstream"}),
    "invalid JSON": [STREAM_HEAD, b"event: result\ndata: {oops\n\n"],
}
breaks = pytest.mark.parametrize("script", BREAKS.values(), ids=BREAKS)


# ---- A response, complete or broken


def test_an_event_stream_gives_the_video(make_video: Caller, stand_in: Proxy) -> None:
    """Stages are passed to onStage in their order, comments are not, and the result is the video."""
    stand_in.responses.append(VIDEO_STREAM)
    outcome = make_video(JOB, stand_in.url)
    assert (outcome.video, outcome.stages) == (VIDEO, [STARTED])


def test_the_connection_is_closed_after_the_result(make_video: Caller, stand_in: Proxy) -> None:
    """A proxy may keep it open, and Node would not end before it is closed."""
    stand_in.responses.append([STREAM_HEAD, event("result", VIDEO), 2 * NODE_S])
    assert make_video(JOB, stand_in.url).video == VIDEO


def test_the_request_is_as_the_api_wants_it(make_video: Caller, stand_in: Proxy) -> None:
    """It has the job, asks for an event stream and has the key; the address may end with a slash."""
    stand_in.responses.append(VIDEO_STREAM)
    make_video(JOB, f"{stand_in.url}/", key=KEY)
    [request] = stand_in.requests
    assert (request.path, json.loads(request.body)) == ("/jobs_prompt_tts", JOB)
    sent = [request.headers.get(name) for name in ("content-type", "accept", "idempotency-key")]
    assert sent == ["application/json", "text/event-stream", KEY]


def test_without_a_text_the_video_is_silent(make_video: Caller, stand_in: Proxy) -> None:
    """Such a job goes to the other route; without a key there is no Idempotency-Key."""
    stand_in.responses.append([STREAM_HEAD, event("result", {"video_url": "https://v"})])
    outcome = make_video({"image_url": JOB["image_url"], "prompt": "It nods"}, stand_in.url)
    assert outcome.video == {"video_url": "https://v"}
    assert stand_in.requests[0].path == "/jobs_prompt_only"
    assert "idempotency-key" not in stand_in.requests[0].headers


def test_a_json_response_gives_the_video(make_video: Caller, stand_in: Proxy) -> None:
    """The service responds with JSON if a proxy drops the Accept header."""
    stand_in.responses.append(plain(200, VIDEO))
    outcome = make_video(JOB, stand_in.url)
    assert (outcome.video, outcome.stages) == (VIDEO, [])


def test_an_error_is_data(make_video: Caller, stand_in: Proxy) -> None:
    """The error has every part of the body, and the status; a final error is not retried."""
    error = {
        "loc": ["body", "text"],
        "msg": "is too long",
        "code": "too_long",
        "params": {"max": 600, "got": 659},
    }
    body = {
        **BODY,
        "category": "validation",
        "provider": None,
        "retryable": False,
        "errors": [error],
    }
    body["code"] = "invalid_field"
    stand_in.responses.append(plain(400, body))
    outcome = make_video(JOB, stand_in.url, key=KEY)
    assert outcome.is_video_error
    assert outcome.error == {
        "name": "VideoError",
        "message": "Busy.",
        "detail": "Busy.",
        "category": "validation",
        "code": "invalid_field",
        "retryable": False,
        "errors": [error],
        "partial": {},
        "provider": None,
        "requestId": "r-2",
        "status": 400,
    }
    assert len(stand_in.requests) == 1


def test_an_error_event_gives_the_same_error(make_video: Caller, stand_in: Proxy) -> None:
    """It has the event's own status, and what was paid for."""
    body = {**BODY, "status": 400, "retryable": False, "partial": {"audio_url": "https://a"}}
    stand_in.responses.append([STREAM_HEAD, STARTING, event("error", body)])
    outcome = make_video(JOB, stand_in.url, key=KEY)
    assert outcome.is_video_error
    assert (outcome.error["status"], outcome.error["partial"]) == (400, {"audio_url": "https://a"})
    assert len(stand_in.requests) == 1


@breaks
def test_a_broken_response_is_a_network_error(
    make_video: Caller, stand_in: Proxy, script: Script
) -> None:
    """Without a key the job is not retried, since each attempt is paid for; the error is retryable."""
    stand_in.responses.append(script)
    outcome = make_video(JOB, stand_in.url)
    assert outcome.is_video_error
    assert (outcome.error["category"], outcome.error["retryable"]) == ("network", True)
    assert (len(stand_in.requests), outcome.retries) == (1, [])


@breaks
def test_with_a_key_a_broken_response_is_retried(
    make_video: Caller, stand_in: Proxy, script: Script
) -> None:
    """The retry has the same path, headers and body, and gives the video."""
    stand_in.responses.extend([script, VIDEO_STREAM])
    outcome = make_video(JOB, stand_in.url, {"speedup": 10}, key=KEY)
    first, second = stand_in.requests
    assert outcome.video == VIDEO
    assert (first.path, first.body, first.headers) == (second.path, second.body, second.headers)


def test_with_a_key_a_retryable_error_is_retried(make_video: Caller, stand_in: Proxy) -> None:
    """It may come as an event or as JSON; each attempt starts again with the stages so far."""
    stand_in.responses.extend(
        [[STREAM_HEAD, STARTING, event("error", BODY)], plain(500, BODY), VIDEO_STREAM]
    )
    outcome = make_video(JOB, stand_in.url, {"speedup": 10}, key=KEY)
    assert (outcome.video, outcome.causes, outcome.stages) == (
        VIDEO,
        ["Busy.", "Busy."],
        [STARTED, STARTED],
    )


def test_without_a_key_nothing_is_retried(make_video: Caller, stand_in: Proxy) -> None:
    """Even a retryable error is not: a second job would be a second video."""
    stand_in.responses.append(plain(500, BODY))
    outcome = make_video(JOB, stand_in.url)
    assert (outcome.error["retryable"], len(stand_in.requests)) == (True, 1)


@pytest.mark.parametrize("status", [403, 404, 413])
def test_a_client_error_of_another_server_is_not_retried(
    make_video: Caller, stand_in: Proxy, status: int
) -> None:
    """A wrong address or a proxy's limit will not go away."""
    stand_in.responses.append(plain(status, PAGE, "text/html"))
    outcome = make_video(JOB, stand_in.url, key=KEY)
    assert (outcome.error["category"], outcome.error["retryable"], outcome.error["status"]) == (
        "network",
        False,
        status,
    )
    assert outcome.error["requestId"] == "r-1"


@pytest.mark.parametrize(
    ("body", "kind", "detail", "code"),
    [
        pytest.param(PAGE, "text/html", "502 Bad Gateway", "other_server", id="a page"),
        pytest.param(
            "<title>Oops</title><style>p { color: red }</style><p>Try\nlater</p>",
            "text/html",
            "Try later",
            "other_server",
            id="a page with a style",
        ),
        pytest.param(
            "upstream connect error\n",
            "text/plain",
            "upstream connect error",
            "other_server",
            id="text",
        ),
        pytest.param(
            {"message": "No quota", "code": "quota"},
            "application/json",
            "No quota",
            "quota",
            id="its code",
        ),
        pytest.param(
            {"error": {"message": "No"}}, "application/json", "No", "other_server", id="nested JSON"
        ),
        pytest.param(
            [],
            "application/json",
            "A response with status 502, not from the service.",
            "other_server",
            id="no words",
        ),
        pytest.param(
            "",
            "",
            "A response with status 502, not from the service.",
            "other_server",
            id="nothing",
        ),
        pytest.param("x" * 20_000, "text/plain", "x" * 300, "other_server", id="too much"),
    ],
)
def test_an_error_of_a_proxy_is_passed_on(
    make_video: Caller, stand_in: Proxy, body: Any, kind: str, detail: str, code: str
) -> None:
    """Its status, its words and its code, if it has one."""
    stand_in.responses.append(plain(502, body, kind))
    outcome = make_video(JOB, stand_in.url)
    assert (outcome.error["status"], outcome.error["category"]) == (502, "network")
    assert (outcome.error["detail"], outcome.error["code"]) == (detail, code)


UNAUTHORIZED = {**BODY, "category": "validation", "code": "unauthorized", "retryable": False}


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(plain(401, PAGE, "text/html"), id="a proxy's page"),
        pytest.param(plain(401, UNAUTHORIZED), id="the service"),
    ],
)
def test_who_is_not_signed_in_keeps_the_job(
    make_video: Caller, stand_in: Proxy, response: Script
) -> None:
    """A 401 is thrown at once, but the key can still be used after signing in."""
    stand_in.responses.append(response)
    outcome = make_video(JOB, stand_in.url, key=KEY)
    assert (outcome.to_do, outcome.error["retryable"], outcome.retries) == ("sign in", True, [])


def test_headers_are_sent_along(make_video: Caller, stand_in: Proxy) -> None:
    """The caller's are added to the client's own."""
    stand_in.responses.append(VIDEO_STREAM)
    make_video(
        JOB,
        stand_in.url,
        key=KEY,
        headers={"Authorization": "Bearer mine", "X-Request-ID": "my-id"},
    )
    sent = [
        stand_in.requests[0].headers[name]
        for name in ("authorization", "x-request-id", "idempotency-key")
    ]
    assert sent == ["Bearer mine", "my-id", KEY]


@pytest.mark.parametrize("keyword", ["", "async "], ids=["a function", "an async function"])
def test_headers_are_asked_for_at_each_attempt(
    make_video: Caller, stand_in: Proxy, keyword: str
) -> None:
    """A sign-in may expire while a job is retried."""
    stand_in.responses.extend([plain(502, PAGE, "text/html"), VIDEO_STREAM])
    code = f"let tries = 0; {keyword}() => ({{ Authorization: `Bearer ${{++tries}}` }})"
    outcome = make_video(JOB, stand_in.url, {"headersCode": code, "speedup": 10}, key=KEY)
    assert outcome.video == VIDEO
    assert [request.headers["authorization"] for request in stand_in.requests] == [
        "Bearer 1",
        "Bearer 2",
    ]


@pytest.mark.parametrize("keyword", ["", "async "], ids=["a function", "an async function"])
def test_a_function_for_headers_that_fails_keeps_the_job(
    make_video: Caller, stand_in: Proxy, keyword: str
) -> None:
    """Its error is thrown at once, nothing is sent, and the key can be used again."""
    code = f"{keyword}() => {{ throw new Error('the session is over'); }}"
    outcome = make_video(JOB, stand_in.url, {"headersCode": code}, key=KEY)
    assert (outcome.error["code"], outcome.error["retryable"]) == ("headers_failed", True)
    assert "the session is over" in outcome.error["detail"]
    assert (stand_in.requests, outcome.retries) == ([], [])


def test_a_response_that_asks_for_more_time_gets_it(make_video: Caller, stand_in: Proxy) -> None:
    """Retry-After lengthens the delay; more than there is patience for ends the attempts at once."""
    stand_in.responses.append(plain(429, {"message": "Slowly"}, Retry_After="30"))
    stand_in.responses.append(plain(500, BODY, Retry_After="700"))
    outcome = make_video(JOB, stand_in.url, {"speedup": 100}, key=KEY)
    assert (outcome.retries, outcome.error["detail"]) == ([30], "Busy.")


def test_the_backoff_grows_to_15_s_and_ends_after_ten_minutes(
    make_video: Caller, stand_in: Proxy
) -> None:
    """Delays of 1, 2, 4, 8, 15 s less up to a quarter of jitter; the last error has all that is known."""
    paid = {"prediction_id": "p-1"}
    stand_in.responses.append(plain(500, {**BODY, "partial": paid}))
    stand_in.responses.extend([plain(502, PAGE, "text/html")] * 60)
    outcome = make_video(JOB, stand_in.url, {"speedup": 1000}, key=KEY)
    max_delays = [1, 2, 4, 8] + [15] * (len(outcome.retries) - 4)
    for max_delay, delay in zip(max_delays, outcome.retries, strict=True):
        assert 0.75 * max_delay <= delay <= max_delay
    assert len(set(outcome.retries)) > 20
    assert 585 < sum(outcome.retries) <= 600
    assert (outcome.error["status"], outcome.error["partial"]) == (502, paid)


def test_patience_can_be_set(make_video: Caller, stand_in: Proxy) -> None:
    """Two seconds allow one retry."""
    stand_in.responses.extend([plain(502, PAGE, "text/html")] * 3)
    outcome = make_video(JOB, stand_in.url, {"speedup": 10}, key=KEY, patience=2)
    assert (len(stand_in.requests), outcome.error["status"]) == (2, 502)


def test_a_service_that_is_down_is_retried_until_it_is_up(make_video: Caller) -> None:
    """At first nothing listens at its address, and a second later it does."""
    with Proxy(listens=False) as late:
        late.responses.append(VIDEO_STREAM)
        start = threading.Timer(
            1.0, lambda: (late.server_activate(), late.serve_forever(poll_interval=0.02))
        )
        start.start()
        outcome = make_video(JOB, late.url, {"speedup": 10}, key=KEY)
        late.shutdown()
        start.join()
    assert (outcome.video, set(outcome.causes)) == (
        VIDEO,
        {"The connection failed before the video was ready."},
    )


def test_with_a_key_a_silent_connection_is_given_up(make_video: Caller, stand_in: Proxy) -> None:
    """No byte comes, but it does not close: a phone may have changed its network."""
    stand_in.responses.extend([[STREAM_HEAD, STARTING, 2 * NODE_S], VIDEO_STREAM])
    outcome = make_video(JOB, stand_in.url, {"speedup": 10}, key=KEY, silence=3)
    assert (outcome.video, outcome.causes) == (
        VIDEO,
        ["The response ended before the video was ready."],
    )


def test_without_a_key_a_silent_connection_is_kept(make_video: Caller, stand_in: Proxy) -> None:
    """A proxy may hold the stream back, and closing the connection would cancel the job."""
    stand_in.responses.append([STREAM_HEAD, STARTING, 1.0, event("result", VIDEO)])
    assert make_video(JOB, stand_in.url, {"speedup": 10}, silence=3).video == VIDEO


@pytest.mark.parametrize(
    ("moment", "requests"), [("start", 0), ("speech", 1), ("retry", 1), ("delay", 1)]
)
def test_an_aborted_call_throws_the_signals_reason(
    make_video: Caller, stand_in: Proxy, moment: str, requests: int
) -> None:
    """It does so at once, before the request, in the stream or between attempts; nothing more is sent."""
    endless: Script = [STREAM_HEAD, STARTING, 2 * NODE_S]
    stand_in.responses.append(
        plain(502, PAGE, "text/html") if moment in ("retry", "delay") else endless
    )
    started = time.monotonic()
    # A delay would take 15 s
    outcome = make_video(JOB, stand_in.url, {"abortAt": moment, "speedup": 0.05}, key=KEY)
    assert time.monotonic() - started < 10
    assert (outcome.is_video_error, outcome.error["message"]) == (False, "aborted by the user")
    assert len(stand_in.requests) == requests


def test_a_failing_display_does_not_lose_the_video(make_video: Caller, stand_in: Proxy) -> None:
    """What onStage throws is written to the console."""
    stand_in.responses.append(VIDEO_STREAM)
    assert make_video(JOB, stand_in.url, {"failingDisplay": True}).video == VIDEO


@pytest.mark.parametrize(
    ("service", "key"),
    [
        pytest.param("http//127.0.0.1:9", KEY, id="invalid address"),
        pytest.param("http://127.0.0.1:9", "🐶", id="invalid header"),
    ],
)
def test_a_job_that_cannot_be_sent_fails_at_once(
    make_video: Caller, service: str, key: str
) -> None:
    """It is not a network error, and a retry would not help."""
    outcome = make_video(JOB, service, key=key)
    assert outcome.is_video_error
    assert outcome.error["code"] == "not_sent"
    assert (outcome.error["category"], outcome.error["retryable"], outcome.retries) == (
        "validation",
        False,
        [],
    )


# ---- The parser of event streams

STREAM = (
    "\ufeff: a comment\r\n\r\n"
    "event: stage\r\ndata: {\"stage\":\r\ndata:  \"über 🐶\"}\r\n\r\n"
    "data:no space\nid: 7\nretry: 10\nunknown: x\n\n"
    "event: nothing\n\n"
    "data\rdata: old\r\r"
    "data: a:b\n\r\n"
    "event: cut off\ndata: never sent\n"
)  # fmt: skip
EVENTS = [
    {"event": "stage", "data": '{"stage":\n "über 🐶"}'},
    {"event": "message", "data": "no space"},
    {"event": "message", "data": "\nold"},
    {"event": "message", "data": "a:b"},
]
READ = """
import { serverSentEvents } from "./client.js";
const [text, size] = JSON.parse(process.argv[2]);
const bytes = new TextEncoder().encode(text), events = [];
const body = new ReadableStream({ start(controller) {
  for (let i = 0; i < bytes.length; i += size) {
    controller.enqueue(bytes.slice(i, i + size));
    controller.enqueue(new Uint8Array()); // a chunk may be empty, too
  }
  controller.close();
} });
for await (const event of serverSentEvents(body)) events.push(event);
console.log(JSON.stringify(events));
"""


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 1000])
def test_events_are_parsed_whatever_the_chunks(make_video: Caller, size: int) -> None:
    """All line ends, comments, data of several lines and characters of several bytes may be cut anywhere."""
    assert make_video.run(READ, [STREAM, size]) == EVENTS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_an_event_does_not_wait_for_the_next_chunk(make_video: Caller, end: str) -> None:
    """It is complete with its blank line."""
    first = READ.replace("controller.close();", "").replace(
        "events.push(event);", "{ events.push(event); break; }"
    )
    assert make_video.run(first, [f"data: now{end}{end}", 1000]) == [
        {"event": "message", "data": "now"}
    ]


# ---- Mistakes and mishaps of a front end, against the real service

UNKNOWN_VOICE = "NobodysVoice00000001"
Prepare = Callable[[Sandbox], None]


def videos_paid_for(sandbox: Sandbox) -> int:
    """How many predictions there are."""
    return len(sandbox.predictions)


@pytest.fixture
def job(sandbox: Sandbox) -> dict[str, Any]:
    """A valid job whose video is made quickly."""
    sandbox.video(short_video())
    return speech_job(sandbox)


@pytest.mark.parametrize(
    ("wrong", "to_do"),
    [
        pytest.param(
            {"image_url": "/pictures/gone.jpg"}, "change image_url", id="no picture there"
        ),
        pytest.param({"image_url": "/"}, "change image_url", id="a web page for a picture"),
        pytest.param({"image_url": "/my pet.jpg"}, "change image_url", id="a blank in the address"),
        pytest.param({"voice_id": UNKNOWN_VOICE}, "change voice_id", id="no such voice"),
        pytest.param({"voice_id": None}, "change voice_id", id="no voice"),
        pytest.param({"model": "nobody/nothing"}, "change model", id="no such model"),
        pytest.param({"model": "hailuo"}, "change model", id="half a model's name"),
        pytest.param({"sceonds": 10}, "change sceonds", id="a slip in a name"),
        pytest.param({"duration": 10}, "change duration", id="another API's name"),
        pytest.param({"seconds": 7}, "change seconds", id="a length the model does not have"),
        pytest.param({"text": "x" * 601}, "change text", id="too much to say"),
        pytest.param({"text": " "}, "change text", id="nothing to say"),
        pytest.param(
            {"prompt": " ", "seconds": "soon"}, "change prompt, seconds", id="two at once"
        ),
    ],
)
def test_a_mistake_in_the_job_names_its_field(
    make_video: Caller,
    service: Service,
    sandbox: Sandbox,
    job: dict[str, Any],
    wrong: dict[str, Any],
    to_do: str,
) -> None:
    """The error names the field to change, nothing is retried, and no video is paid for."""
    if wrong.get("image_url"):
        wrong = {"image_url": sandbox.url + wrong["image_url"]}
    outcome = make_video({**job, **wrong}, service.url, key=str(uuid.uuid4()))
    assert (outcome.to_do, outcome.error["status"], outcome.error["retryable"]) == (
        to_do,
        400,
        False,
    )
    assert (outcome.retries, videos_paid_for(sandbox)) == ([], 0)


@pytest.mark.parametrize(
    ("prepare", "to_do", "videos"),
    [
        pytest.param(
            lambda sandbox: sandbox.outcome("failed", "flagged"),
            "change the job",
            1,
            id="the model rejects it",
        ),
        pytest.param(
            lambda sandbox: sandbox.fault("create", "status", None, status=401),
            "tell the operator",
            0,
            id="no credit",
        ),
        pytest.param(
            lambda sandbox: sandbox.fault(
                "create", "status", None, status=429, headers={"retry-after": "86400"}
            ),
            "retry",
            0,
            id="throttled for longer than a job has",
        ),
        pytest.param(
            lambda sandbox: sandbox.video("html"),
            "tell the operator",
            1,
            id="a page in place of the video",
        ),
    ],
)
def test_a_providers_error_says_what_to_do(
    make_video: Caller,
    service: Service,
    sandbox: Sandbox,
    job: dict[str, Any],
    prepare: Prepare,
    to_do: str,
    videos: int,
) -> None:
    """Change the job, retry, or tell the operator; the error has the speech that is paid for."""
    prepare(sandbox)
    outcome = make_video(job, service.url)
    assert (outcome.to_do, videos_paid_for(sandbox)) == (to_do, videos)
    assert outcome.error["partial"]["audio_url"].rpartition("/public/")[2] in sandbox.objects


def test_a_service_that_is_not_set_up_says_so(
    make_video: Caller, start_service: StartService, job: dict[str, Any]
) -> None:
    """The front end can do nothing about it."""
    outcome = make_video(job, start_service(ELEVEN_API_KEY="").url, key=KEY)
    assert (outcome.to_do, outcome.error["category"]) == ("tell the operator", "configuration")


def test_the_address_of_another_server_is_recognized(
    make_video: Caller, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """Something responds, but not the service: nothing is retried for ten minutes."""
    outcome = make_video(job, sandbox.url, key=KEY)
    assert (outcome.to_do, outcome.retries) == ("check the address", [])


def test_a_proxy_that_drops_accept_only_loses_the_stages(
    make_video: Caller, proxy: Proxy, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """The video still comes, as JSON."""
    proxy.responses.append(Forward(drop_accept=True))
    outcome = make_video(job, proxy.url)
    assert (outcome.to_do, outcome.stages, videos_paid_for(sandbox)) == ("show the video", [], 1)


@pytest.mark.parametrize(
    "mishap",
    [
        pytest.param(plain(502, PAGE, "text/html"), id="a page from a proxy"),
        pytest.param(Forward(cut_after=b"event: stage"), id="cut at once"),
        pytest.param(Forward(cut_after=b'"stage":"video"'), id="cut while the video is made"),
        pytest.param(Forward(cut_after=b"final_upload"), id="cut just before the end"),
        pytest.param(Forward(cut_after=b"event: result"), id="cut in the result"),
    ],
)
def test_with_a_key_a_mishap_on_the_way_costs_nothing(
    make_video: Caller,
    proxy: Proxy,
    sandbox: Sandbox,
    job: dict[str, Any],
    mishap: Script | Forward,
) -> None:
    """One speech and one video are paid for, and the video arrives."""
    proxy.responses.append(mishap)
    outcome = make_video(job, proxy.url, key=str(uuid.uuid4()))
    assert (outcome.to_do, len(outcome.retries)) == ("show the video", 1)
    assert (len(sandbox.calls("speech")), videos_paid_for(sandbox)) == (1, 1)


def test_without_a_key_a_cut_ends_the_job(
    make_video: Caller, proxy: Proxy, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """The error is retryable, but only the user can decide to pay again."""
    sandbox.outcome("never")
    proxy.responses.append(Forward(cut_after=b'"stage":"video"'))
    outcome = make_video(job, proxy.url)
    assert (outcome.to_do, outcome.error["category"], outcome.retries) == ("retry", "network", [])
    assert final_statuses(sandbox) == ["canceled"]


def test_a_reload_continues_the_same_video(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """The page stops in the middle; the next one sends the same job and key again."""
    key = str(uuid.uuid4())
    stopped = make_video(job, service.url, {"abortAt": "video"}, key=key)
    outcome = make_video(job, service.url, key=key)
    assert (stopped.to_do, outcome.to_do) == ("nothing: the user has aborted", "show the video")
    assert (len(sandbox.calls("speech")), videos_paid_for(sandbox)) == (1, 1)


def test_two_tabs_with_one_key_get_one_video(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """A double click does the same."""
    both = make_video.calls(job, {"service": service.url, "key": str(uuid.uuid4())}, tabs=2)
    assert both[0].video == both[1].video is not None
    assert [outcome.stages[0]["stage"] for outcome in both] == ["speech", "speech"]
    assert videos_paid_for(sandbox) == 1


def test_aborting_without_a_key_cancels_the_video(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """The signal's reason is thrown, and the prediction is canceled."""
    sandbox.outcome("never")
    outcome = make_video(job, service.url, {"abortAt": "video"})
    assert (outcome.to_do, outcome.error["message"]) == (
        "nothing: the user has aborted",
        "aborted by the user",
    )
    assert final_statuses(sandbox) == ["canceled"]


def final_statuses(sandbox: Sandbox) -> list[str]:
    """The terminal statuses of the predictions, within five seconds."""
    deadline = time.monotonic() + 5
    while any(prediction.ended_as is None for prediction in sandbox.predictions.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [str(prediction.ended_as) for prediction in sandbox.predictions.values()]


def test_a_key_of_another_job_is_named(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """One key for all jobs would replay the first video: it is rejected, and the header is named."""
    key = str(uuid.uuid4())
    first = make_video(job, service.url, key=key)
    other = make_video({**job, "text": "Feed me twice!"}, service.url, key=key)
    assert (first.to_do, other.to_do) == ("show the video", "change Idempotency-Key")
    assert videos_paid_for(sandbox) == 1


def test_a_malformed_key_is_named(
    make_video: Caller, service: Service, job: dict[str, Any]
) -> None:
    """An empty key is malformed, and does not count as no key."""
    for key in ("", "two words"):
        assert make_video(job, service.url, key=key).to_do == "change Idempotency-Key"


def test_a_final_error_is_replayed_for_its_key(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """A new attempt needs a new key."""
    sandbox.outcome("failed", "flagged")
    key = str(uuid.uuid4())
    answers = [
        make_video(job, service.url, key=name).to_do for name in (key, key, str(uuid.uuid4()))
    ]
    assert answers == ["change the job", "change the job", "show the video"]
    assert videos_paid_for(sandbox) == 2
