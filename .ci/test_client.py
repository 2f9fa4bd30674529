"""tests/sandbox/client.js in Node: what it makes of every answer, and of a dozen mistakes of a front end."""

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
from tests.jobs import short_video, speech_job
from tests.sandbox import Sandbox, Service

CLIENT = Path(__file__).parent.parent / "tests" / "sandbox" / "client.js"
NODE_S = 60.0
JOB = {"image_url": "https://example.com/pet.jpg", "prompt": "It nods", "text": "Feed me!", "voice_id": "Rex"}
VIDEO = {"audio_url": "https://a", "video_url": "https://v", "final_url": "https://f"}
KEY = "a-key-of-one-job"

# What a front end would write: one call, and what its job's answer or error tells. `hurry` divides every wait.
CALL = """
import { VideoError, makeVideo } from "./client.js";
const { job, options, abortAt, stumble, hurry, tabs } = JSON.parse(process.argv[2]);
if (hurry) {
  const wait = globalThis.setTimeout;
  globalThis.setTimeout = (then, milliseconds, ...rest) => wait(then, milliseconds / hurry, ...rest);
}
/** What the user, or the page by itself, does about an error: read from its data, never from its words. */
function toDo(error) {
  if (!(error instanceof VideoError)) return "nothing: the user has left";
  if (error.errors.length) return `change ${error.errors.map(({ loc }) => loc.at(-1)).join(", ")}`;
  if (error.retryable) return "send it again";
  if (error.category === "network") return "check the address of the service";
  return error.status === 400 ? "change the job" : "tell who runs the service";
}
async function call() {
  const told = { stages: [], retries: [], causes: [] };
  const leaving = new AbortController();
  const leave = (moment) => moment === abortAt && leaving.abort(new Error("left by the user"));
  const onStage = (stage) => {
    told.stages.push(stage);
    leave(stage.stage);
    if (stumble) throw new Error("the display fell over");
  };
  const onRetry = (error, seconds) => {
    told.retries.push(seconds);
    told.causes.push(error.message);
    leave("retry");
    queueMicrotask(() => leave("pause"));
  };
  leave("start");
  try {
    told.video = await makeVideo(job, { ...options, signal: leaving.signal, onStage, onRetry });
  } catch (error) {
    told.is_video_error = error instanceof VideoError;
    told.to_do = toDo(error);
    told.error = { name: error.name, detail: error.message, ...error };
  }
  return told;
}
console.log(JSON.stringify(await Promise.all(Array.from({ length: tabs }, call))));
"""


@dataclass
class Told:
    """What one call of makeVideo came to: a video or an error, and what it told on the way."""

    stages: list[dict[str, Any]]
    retries: list[float]
    causes: list[str]
    video: dict[str, str] | None = None
    error: dict[str, Any] = field(default_factory=dict)
    is_video_error: bool = False
    to_do: str = "show the video"


class Caller:
    """A front end in Node: a folder with the client in it, as its README says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(CLIENT, folder)
        (folder / "package.json").write_text('{"type": "module"}')

    def run(self, script: str, argument: Any) -> Any:
        """What the script prints, as JSON."""
        command = ["node", "--input-type=module", "-", json.dumps(argument)]
        ended = subprocess.run(
            command, cwd=self.folder, input=script, capture_output=True, text=True, timeout=NODE_S, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def calls(self, job: dict[str, Any], options: dict[str, Any], tabs: int, **how: Any) -> list[Told]:
        """Several calls at the same time."""
        return [Told(**told) for told in self.run(CALL, {"job": job, "options": options, "tabs": tabs, **how})]

    def __call__(self, job: dict[str, Any], service: str, how: dict[str, Any] | None = None, **options: Any) -> Told:
        """One call; `how`: abortAt (start, retry, pause or a stage), stumble, hurry."""
        [told] = self.calls(job, {"service": service, **options}, 1, **(how or {}))
        return told


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Caller:
    """Calls the client."""
    return Caller(tmp_path_factory.mktemp("front-end"))


# ---- What lies on the way to the service

Script = list[bytes | float]


@dataclass
class Passing:
    """A request that is passed on to the service: without its Accept header, or cut after these words of the answer."""

    drop_accept: bool = False
    cut_after: bytes | None = None


@dataclass
class Arrived:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    body: bytes


class Way(ThreadingHTTPServer):
    """A proxy with a mind of its own: each request takes the next of `answers`, and when there are none is passed on."""

    daemon_threads = True

    def __init__(self, upstream: str = "", *, listens: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Crossing, bind_and_activate=False)
        self.server_bind()
        if listens:
            self.server_activate()
        self.upstream = urlsplit(upstream)
        self.answers: deque[Script | Passing] = deque()
        self.arrived: list[Arrived] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """Its origin."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who leaves in the middle of an answer is no news here."""


class Crossing(BaseHTTPRequestHandler):
    """One request on its way."""

    server: Way

    def do_POST(self) -> None:
        """Answer as told, or pass the request on."""
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.arrived.append(Arrived(self.path, headers, body))
        self.close_connection = True
        answer = self.server.answers.popleft() if self.server.answers else Passing()
        if isinstance(answer, Passing):
            self.pass_on(answer, headers, body)
        else:
            self.play(answer)

    def play(self, script: Script) -> None:
        """Literal bytes, and pauses in seconds."""
        for part in script:
            if isinstance(part, bytes):
                self.wfile.write(part)
            else:
                self.server.closing.wait(part)

    def pass_on(self, how: Passing, headers: dict[str, str], body: bytes) -> None:
        """The service's answer byte for byte, until either side closes or the cut comes."""
        sent = {**headers, "connection": "close"}
        if how.drop_accept:
            sent["accept"] = "*/*"
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        with socket.create_connection((self.server.upstream.hostname, self.server.upstream.port)) as service:
            service.sendall(f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
            passed = b""
            while self.connection not in (readable := select.select([service, self.connection], [], [])[0]):
                piece = service.recv(65_536) if readable else b""
                _, _, rest = (passed + piece).partition(how.cut_after) if how.cut_after else (b"", b"", b"")
                piece = piece[: len(piece) - len(rest)]
                self.wfile.write(piece)
                passed += piece
                if not piece or rest:
                    return

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


def between(upstream: str = "") -> Iterator[Way]:
    """A running proxy."""
    with Way(upstream) as way:
        thread = threading.Thread(target=way.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield way
        way.closing.set()
        way.shutdown()
        thread.join()


@pytest.fixture
def stand_in() -> Iterator[Way]:
    """In the service's place: answers exactly as a test says."""
    yield from between()


@pytest.fixture
def way(service: Service) -> Iterator[Way]:
    """In front of the running service."""
    yield from between(service.url)


def plain(status: int, body: Any, kind: str = "application/json") -> Script:
    """A whole answer."""
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nX-Request-ID: r-1\r\n\r\n"
    return [head.encode() + content]


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nX-Request-ID: r-1\r\n\r\n"
CHUNKED_HEAD = STREAM_HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"


def event(name: str, data: Any) -> bytes:
    """One event as the service writes it."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


STARTED = {"stage": "speech", "state": "started", "seconds": 0}
STARTING = event("stage", STARTED)
BODY = {"category": "provider", "provider": "replicate", "request_id": "r-2", "retryable": True, "detail": "Busy."}
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
    "another's JSON": plain(503, {"message": "no healthy upstream"}),
    "nonsense": [STREAM_HEAD, b"event: result\ndata: {oops\n\n"],
}
breaks = pytest.mark.parametrize("script", BREAKS.values(), ids=BREAKS)


# ---- An answer, whole or broken


def test_events_end_in_a_video(make_video: Caller, stand_in: Way) -> None:
    """The stages are told as they came, comments are not, and the result is the video."""
    stand_in.answers.append(VIDEO_STREAM)
    told = make_video(JOB, stand_in.url)
    assert (told.video, told.stages) == (VIDEO, [STARTED])


def test_the_connection_is_closed_with_the_result(make_video: Caller, stand_in: Way) -> None:
    """A proxy may keep it open after that; Node would not end before it is closed."""
    stand_in.answers.append([STREAM_HEAD, event("result", VIDEO), 2 * NODE_S])
    assert make_video(JOB, stand_in.url).video == VIDEO


def test_the_request_is_the_one_of_the_contract(make_video: Caller, stand_in: Way) -> None:
    """The body as given, an event stream asked for, the key in its header; a slash after the service's address is fine."""
    stand_in.answers.append(VIDEO_STREAM)
    make_video(JOB, f"{stand_in.url}/", key=KEY)
    [request] = stand_in.arrived
    assert (request.path, json.loads(request.body)) == ("/jobs_prompt_tts", JOB)
    sent = [request.headers.get(name) for name in ("content-type", "accept", "idempotency-key")]
    assert sent == ["application/json", "text/event-stream", KEY]


def test_without_a_text_the_video_is_silent(make_video: Caller, stand_in: Way) -> None:
    """The other route; without a key no such header."""
    stand_in.answers.append([STREAM_HEAD, event("result", {"video_url": "https://v"})])
    told = make_video({"image_url": JOB["image_url"], "prompt": "It nods"}, stand_in.url)
    assert told.video == {"video_url": "https://v"}
    assert stand_in.arrived[0].path == "/jobs_prompt_only"
    assert "idempotency-key" not in stand_in.arrived[0].headers


def test_json_is_an_answer_too(make_video: Caller, stand_in: Way) -> None:
    """A proxy that drops Accept makes the service answer so."""
    stand_in.answers.append(plain(200, VIDEO))
    told = make_video(JOB, stand_in.url)
    assert (told.video, told.stages) == (VIDEO, [])


def test_a_refusal_is_data(make_video: Caller, stand_in: Way) -> None:
    """Every part of the body is a property, and its status; even with a key it is not sent again."""
    fault = {"loc": ["body", "voice_id"], "msg": "Field required"}
    body = {**BODY, "category": "validation", "provider": None, "retryable": False, "errors": [fault]}
    stand_in.answers.append(plain(400, body))
    told = make_video(JOB, stand_in.url, key=KEY)
    assert told.is_video_error
    assert told.error == {
        **{"name": "VideoError", "detail": "Busy.", "category": "validation", "retryable": False, "errors": [fault]},
        **{"partial": {}, "provider": None, "requestId": "r-2", "status": 400},
    }
    assert len(stand_in.arrived) == 1


def test_an_error_event_is_the_same_class(make_video: Caller, stand_in: Way) -> None:
    """With the status that the event carries, and what was paid for."""
    body = {**BODY, "status": 400, "retryable": False, "partial": {"audio_url": "https://a"}}
    stand_in.answers.append([STREAM_HEAD, STARTING, event("error", body)])
    told = make_video(JOB, stand_in.url, key=KEY)
    assert told.is_video_error
    assert (told.error["status"], told.error["partial"]) == (400, {"audio_url": "https://a"})
    assert len(stand_in.arrived) == 1


@breaks
def test_a_broken_answer_is_an_error_of_the_network(make_video: Caller, stand_in: Way, script: Script) -> None:
    """Without a key the job is not sent again, since each time is paid for; the error says that it could be."""
    stand_in.answers.append(script)
    told = make_video(JOB, stand_in.url)
    assert told.is_video_error
    assert (told.error["category"], told.error["retryable"]) == ("network", True)
    assert (len(stand_in.arrived), told.retries) == (1, [])


@breaks
def test_with_a_key_a_broken_answer_is_asked_for_again(make_video: Caller, stand_in: Way, script: Script) -> None:
    """The same request, key and body, and its answer counts."""
    stand_in.answers.extend([script, VIDEO_STREAM])
    told = make_video(JOB, stand_in.url, {"hurry": 10}, key=KEY)
    first, second = stand_in.arrived
    assert told.video == VIDEO
    assert (first.path, first.body, first.headers) == (second.path, second.body, second.headers)


def test_what_the_service_calls_retryable_is_sent_again_with_a_key(make_video: Caller, stand_in: Way) -> None:
    """Both as an event and as plain JSON; the stages so far are told again."""
    stand_in.answers.extend([[STREAM_HEAD, STARTING, event("error", BODY)], plain(500, BODY), VIDEO_STREAM])
    told = make_video(JOB, stand_in.url, {"hurry": 10}, key=KEY)
    assert (told.video, told.causes, told.stages) == (VIDEO, ["Busy.", "Busy."], [STARTED, STARTED])


def test_without_a_key_nothing_is_sent_again(make_video: Caller, stand_in: Way) -> None:
    """Whatever the service says: a second job would be a second video."""
    stand_in.answers.append(plain(500, BODY))
    told = make_video(JOB, stand_in.url)
    assert (told.error["retryable"], len(stand_in.arrived)) == (True, 1)


@pytest.mark.parametrize("status", [401, 404, 413])
def test_another_servers_refusal_is_not_asked_for_again(make_video: Caller, stand_in: Way, status: int) -> None:
    """A wrong address, a sign-in, a proxy's limit: it will be the same the next time."""
    stand_in.answers.append(plain(status, PAGE, "text/html"))
    told = make_video(JOB, stand_in.url, key=KEY)
    assert (told.error["category"], told.error["retryable"], told.error["status"]) == ("network", False, status)
    assert told.error["requestId"] == "r-1"


def test_waits_grow_to_15_s_and_end_after_ten_minutes(make_video: Caller, stand_in: Way) -> None:
    """Each up to a quarter shorter than 1, 2, 4, 8, 15 s, by chance; the last error is thrown, with all that is known."""
    paid = {"prediction_id": "p-1"}
    stand_in.answers.append(plain(500, {**BODY, "partial": paid}))
    stand_in.answers.extend([plain(502, PAGE, "text/html")] * 60)
    told = make_video(JOB, stand_in.url, {"hurry": 1000}, key=KEY)
    longest = [1, 2, 4, 8, *[15] * (len(told.retries) - 4)]
    assert all(0.75 * most <= wait <= most for most, wait in zip(longest, told.retries, strict=True))
    assert len(set(told.retries)) > 20
    assert 585 < sum(told.retries) <= 600
    assert (told.error["status"], told.error["partial"]) == (502, paid)


def test_patience_can_be_set(make_video: Caller, stand_in: Way) -> None:
    """Two seconds are one wait."""
    stand_in.answers.extend([plain(502, PAGE, "text/html")] * 3)
    told = make_video(JOB, stand_in.url, {"hurry": 10}, key=KEY, patience=2)
    assert (len(stand_in.arrived), told.error["status"]) == (2, 502)


def test_a_service_that_is_down_is_asked_until_it_is_up(make_video: Caller) -> None:
    """Nobody listens at first, and a second later somebody does."""
    with Way(listens=False) as late:
        late.answers.append(VIDEO_STREAM)
        start = threading.Timer(1.0, lambda: (late.server_activate(), late.serve_forever(poll_interval=0.02)))
        start.start()
        told = make_video(JOB, late.url, {"hurry": 10}, key=KEY)
        late.shutdown()
        start.join()
    assert (told.video, set(told.causes)) == (VIDEO, {"The connection failed before the video was ready."})


def test_a_dead_connection_of_a_job_with_a_key_is_left(make_video: Caller, stand_in: Way) -> None:
    """Nothing comes, nothing closes: a phone that has changed its network."""
    stand_in.answers.extend([[STREAM_HEAD, STARTING, 2 * NODE_S], VIDEO_STREAM])
    told = make_video(JOB, stand_in.url, {"hurry": 10}, key=KEY, silence=3)
    assert (told.video, told.causes) == (VIDEO, ["The response ended before the video was ready."])


def test_a_silent_job_without_a_key_is_waited_for(make_video: Caller, stand_in: Way) -> None:
    """A proxy may hold the stream back, and leaving would cancel the job."""
    stand_in.answers.append([STREAM_HEAD, STARTING, 1.0, event("result", VIDEO)])
    assert make_video(JOB, stand_in.url, {"hurry": 10}, silence=3).video == VIDEO


@pytest.mark.parametrize(("moment", "requests"), [("start", 0), ("speech", 1), ("retry", 1), ("pause", 1)])
def test_who_leaves_gets_the_reason_back(make_video: Caller, stand_in: Way, moment: str, requests: int) -> None:
    """Before the request, in the middle of the stream, between two tries: at once, and nothing is sent after that."""
    endless: Script = [STREAM_HEAD, STARTING, 2 * NODE_S]
    stand_in.answers.append(plain(502, PAGE, "text/html") if moment in ("retry", "pause") else endless)
    started = time.monotonic()
    told = make_video(JOB, stand_in.url, {"abortAt": moment, "hurry": 0.05}, key=KEY)  # a pause would take 15 s
    assert time.monotonic() - started < 10
    assert (told.is_video_error, told.error["detail"]) == (False, "left by the user")
    assert len(stand_in.arrived) == requests


def test_a_display_that_fails_loses_no_video(make_video: Caller, stand_in: Way) -> None:
    """What onStage throws goes to the console."""
    stand_in.answers.append(VIDEO_STREAM)
    assert make_video(JOB, stand_in.url, {"stumble": True}).video == VIDEO


@pytest.mark.parametrize(
    ("service", "key"),
    [
        pytest.param("http//127.0.0.1:9", KEY, id="no address"),
        pytest.param("http://127.0.0.1:9", "🐶", id="no header value"),
    ],
)
def test_what_cannot_be_sent_is_said_at_once(make_video: Caller, service: str, key: str) -> None:
    """It is no trouble of the network, and trying again is of no use."""
    told = make_video(JOB, service, key=key)
    assert told.is_video_error
    assert (told.error["category"], told.error["retryable"], told.retries) == ("validation", False, [])


# ---- The reader of event streams

STREAM = (
    "\ufeff: a comment\r\n\r\n"
    "event: stage\r\ndata: {\"stage\":\r\ndata:  \"über 🐶\"}\r\n\r\n"
    "data:no space\nid: 7\nretry: 10\nunknown: x\n\n"
    "event: nothing\n\n"
    "data\rdata: old\r\r"
    "data: a:b\n\r\n"
    "event: cut off\ndata: never told\n"
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
def test_events_are_read_whatever_the_chunks(make_video: Caller, size: int) -> None:
    """Line ends of all three kinds, comments, data of several lines, characters of several bytes: cut anywhere."""
    assert make_video.run(READ, [STREAM, size]) == EVENTS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_an_event_is_told_before_the_next_chunk_comes(make_video: Caller, end: str) -> None:
    """A complete event does not wait for what follows it."""
    first = READ.replace("controller.close();", "").replace("events.push(event);", "{ events.push(event); break; }")
    assert make_video.run(first, [f"data: now{end}{end}", 1000]) == [{"event": "message", "data": "now"}]


# ---- A dozen mistakes and mishaps of a front end, against the real service

NOBODY = "NobodysVoice00000001"
Prepare = Callable[[Sandbox], None]


def videos_bought(sandbox: Sandbox) -> int:
    """Predictions made."""
    return len(sandbox.predictions)


@pytest.fixture
def job(sandbox: Sandbox) -> dict[str, Any]:
    """A good job, whose video costs the machine little."""
    sandbox.video(short_video())
    return speech_job(sandbox)


@pytest.mark.parametrize(
    ("wrong", "to_do"),
    [
        pytest.param({"image_url": "/pictures/gone.jpg"}, "change image_url", id="no picture there"),
        pytest.param({"image_url": "/"}, "change image_url", id="a web page for a picture"),
        pytest.param({"image_url": "/my pet.jpg"}, "change image_url", id="a blank in the address"),
        pytest.param({"voice_id": NOBODY}, "change voice_id", id="no such voice"),
        pytest.param({"voice_id": None}, "change voice_id", id="no voice"),
        pytest.param({"model": "nobody/nothing"}, "change model", id="no such model"),
        pytest.param({"model": "hailuo"}, "change model", id="half a model's name"),
        pytest.param({"sceonds": 10}, "change sceonds", id="a slip in a name"),
        pytest.param({"duration": 10}, "change duration", id="another API's name"),
        pytest.param({"seconds": 7}, "change seconds", id="a length the model does not have"),
        pytest.param({"text": "x" * 601}, "change text", id="too much to say"),
        pytest.param({"text": " "}, "change text", id="nothing to say"),
        pytest.param({"prompt": " ", "seconds": "soon"}, "change prompt, seconds", id="two at once"),
    ],
)
def test_a_mistake_in_the_job_names_its_field(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any], wrong: dict[str, Any], to_do: str
) -> None:
    """The field to change is data, the same with a key, and no video is bought."""
    if wrong.get("image_url"):
        wrong = {"image_url": sandbox.url + wrong["image_url"]}
    told = make_video({**job, **wrong}, service.url, key=str(uuid.uuid4()))
    assert (told.to_do, told.error["status"], told.error["retryable"]) == (to_do, 400, False)
    assert (told.retries, videos_bought(sandbox)) == ([], 0)


@pytest.mark.parametrize(
    ("prepare", "to_do", "videos"),
    [
        pytest.param(lambda it: it.outcome("failed", "flagged"), "change the job", 1, id="the model refuses"),
        pytest.param(
            lambda it: it.fault("create", "status", None, status=401), "tell who runs the service", 0, id="no credit"
        ),
        pytest.param(lambda it: it.fault("create", "status", None, status=429), "send it again", 0, id="throttled"),
        pytest.param(lambda it: it.video("html"), "tell who runs the service", 1, id="no video in the video"),
    ],
)
def test_a_providers_no_says_whose_turn_it_is(
    make_video: Caller,
    service: Service,
    sandbox: Sandbox,
    job: dict[str, Any],
    prepare: Prepare,
    to_do: str,
    videos: int,
) -> None:
    """Change the job, wait, or fetch somebody; the speech that is paid for comes with the error."""
    prepare(sandbox)
    told = make_video(job, service.url)
    assert (told.to_do, videos_bought(sandbox)) == (to_do, videos)
    assert told.error["partial"]["audio_url"].rpartition("/public/")[2] in sandbox.objects


def test_a_service_that_is_not_set_up_says_so(
    make_video: Caller, start_service: StartService, job: dict[str, Any]
) -> None:
    """Nothing that the front end could do about it."""
    told = make_video(job, start_service(ELEVEN_API_KEY="").url, key=KEY)
    assert (told.to_do, told.error["category"]) == ("tell who runs the service", "configuration")


def test_another_servers_address_is_told_from_the_service(
    make_video: Caller, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """Somebody answers there, but not the service: it is not asked for ten minutes."""
    told = make_video(job, sandbox.url, key=KEY)
    assert (told.to_do, told.retries) == ("check the address of the service", [])


def test_a_proxy_that_drops_accept_costs_the_stages_only(
    make_video: Caller, way: Way, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """The video comes as JSON."""
    way.answers.append(Passing(drop_accept=True))
    told = make_video(job, way.url)
    assert (told.to_do, told.stages, videos_bought(sandbox)) == ("show the video", [], 1)


@pytest.mark.parametrize(
    "mishap",
    [
        pytest.param(plain(502, PAGE, "text/html"), id="a page from a proxy"),
        pytest.param(Passing(cut_after=b"event: stage"), id="cut at once"),
        pytest.param(Passing(cut_after=b'"stage":"video"'), id="cut while the video is made"),
        pytest.param(Passing(cut_after=b"final_upload"), id="cut just before the end"),
        pytest.param(Passing(cut_after=b"event: result"), id="cut in the result"),
    ],
)
def test_with_a_key_a_mishap_on_the_way_costs_nothing(
    make_video: Caller, way: Way, sandbox: Sandbox, job: dict[str, Any], mishap: Script | Passing
) -> None:
    """One speech, one video, and it arrives."""
    way.answers.append(mishap)
    told = make_video(job, way.url, key=str(uuid.uuid4()))
    assert (told.to_do, len(told.retries)) == ("show the video", 1)
    assert (len(sandbox.calls("speech")), videos_bought(sandbox)) == (1, 1)


def test_without_a_key_a_cut_ends_the_job(make_video: Caller, way: Way, sandbox: Sandbox, job: dict[str, Any]) -> None:
    """The error says that sending it again can help; whether to pay again is the user's to say."""
    sandbox.outcome("never")
    way.answers.append(Passing(cut_after=b'"stage":"video"'))
    told = make_video(job, way.url)
    assert (told.to_do, told.error["category"], told.retries) == ("send it again", "network", [])
    assert ended(sandbox) == ["canceled"]


def test_a_reload_goes_on_with_the_same_video(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """The page that is gone has left in the middle; the next one sends job and key again, and is told the stages so far."""
    key = str(uuid.uuid4())
    gone = make_video(job, service.url, {"abortAt": "video"}, key=key)
    told = make_video(job, service.url, key=key)
    assert (gone.to_do, told.to_do) == ("nothing: the user has left", "show the video")
    assert (len(sandbox.calls("speech")), videos_bought(sandbox)) == (1, 1)


def test_two_tabs_with_one_key_get_one_video(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """And so does a double click."""
    both = make_video.calls(job, {"service": service.url, "key": str(uuid.uuid4())}, tabs=2)
    assert both[0].video == both[1].video is not None
    assert [told.stages[0]["stage"] for told in both] == ["speech", "speech"]
    assert videos_bought(sandbox) == 1


def test_who_leaves_without_a_key_cancels_the_video(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """The signal's reason comes back, and the prediction ends."""
    sandbox.outcome("never")
    told = make_video(job, service.url, {"abortAt": "video"})
    assert (told.to_do, told.error["detail"]) == ("nothing: the user has left", "left by the user")
    assert ended(sandbox) == ["canceled"]


def ended(sandbox: Sandbox) -> list[str]:
    """How the predictions ended; they have five seconds for it."""
    deadline = time.monotonic() + 5
    while any(prediction.ended_as is None for prediction in sandbox.predictions.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [str(prediction.ended_as) for prediction in sandbox.predictions.values()]


def test_a_key_of_another_job_is_named(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """One key for all jobs is a mistake that would hide videos: refused, naming the header."""
    key = str(uuid.uuid4())
    first = make_video(job, service.url, key=key)
    other = make_video({**job, "text": "Feed me twice!"}, service.url, key=key)
    assert (first.to_do, other.to_do) == ("show the video", "change Idempotency-Key")
    assert videos_bought(sandbox) == 1


def test_a_malformed_key_is_named(make_video: Caller, service: Service, job: dict[str, Any]) -> None:
    """An empty one is no key, and does not pass for none."""
    for key in ("", "two words"):
        assert make_video(job, service.url, key=key).to_do == "change Idempotency-Key"


def test_a_refusal_stays_with_its_key(
    make_video: Caller, service: Service, sandbox: Sandbox, job: dict[str, Any]
) -> None:
    """A new try is a new key."""
    sandbox.outcome("failed", "flagged")
    key = str(uuid.uuid4())
    answers = [make_video(job, service.url, key=name).to_do for name in (key, key, str(uuid.uuid4()))]
    assert answers == ["change the job", "change the job", "show the video"]
    assert videos_bought(sandbox) == 2
