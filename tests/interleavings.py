"""Runs the service's own job code in thousands of interleavings, on a virtual clock, and checks what was paid for.

python -m tests.interleavings --runs 20000           seeds 0, 1, 2 ...
python -m tests.interleavings --seed 4711 --runs 1   one seed again, with its trace

Each run has two or three instances of the service (main.py loaded once for each process), one storage, one ElevenLabs and
one Replicate, and clients that send the same requests until they are answered. By seed, answers are slow, fail or get
lost, requests are executed after their connection broke, and instances are killed, ended or stopped for a while at a
chosen moment of a call. Afterwards the books must balance:

- at most one video is paid for per key;
- at most one speech, plus those whose answer did not reach the job's log (lost, or its instance killed or stopped);
- all 200 answers of a key are equal, and a later request is answered with the same bytes;
- no job ends with an unforeseen error, and nothing waits for ever.
"""

from __future__ import annotations

import argparse
import asyncio
import builtins
import heapq
import importlib.util
import json
import logging
import random
import re
import sys
import tempfile
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import formatdate
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode

import httpx

from tests.support.requests import short_video

ROOT = Path(__file__).resolve().parent.parent
MEMORY = Path("/dev/shm")  # where it exists, the jobs' folders are made there
EPOCH = 1_800_000_000.0  # clock time at the start of each run
SETTINGS = {
    "ELEVEN_API_KEY": "sk_0123456789abcdef",
    "REPLICATE_API_TOKEN": "r8_0123456789abcdef",
    "SUPABASE_URL": "https://project.supabase.co",
    "SUPABASE_SERVICE_ROLE": "sb_secret_0123456789abcdef",
}
SPEAKING_MODEL = "wan-video/wan-2.5-i2v"  # its video needs no mux, so no ffmpeg
LEASE_S = 30.0  # of a claim, with the default PATIENCE_SECONDS
VIDEO = short_video(0.2)  # plays everywhere, so that no ffmpeg is started
MAX_PROCESSES = 7  # in a run, restarted ones included
MAX_RUN_S = 3 * 3_600.0  # virtual seconds after which something waits for ever
WEAK_SHARE = 0.4  # of the calls that fail often in a run
LATE_S = 4.0  # the most by which a request is executed after its connection broke
LATE_STORAGE_S = 60.0  # the same for the storage
RESTART_S = 8.0  # until there is a new process in the place of one that was killed or terminated
RECORDING_S = 75.0  # in which a speech is stored and in the log, one silent connection included
UPLOAD_ATTEMPTS = 4  # after which the service gives a call to the storage up
TRACE_LINES = 120
LOGGER = logging.Logger("interleavings", logging.CRITICAL + 1)  # in place of the service's own
LOGGER.addHandler(logging.StreamHandler())


# The virtual clock


OWNER: ContextVar[Process | None] = ContextVar("owner", default=None)  # whose code is running


class VirtualLoop(asyncio.AbstractEventLoop):
    """An event loop whose clock jumps to the next timer; it runs no code of a dead or stopped process."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ready: deque[asyncio.Handle] = deque()
        self.timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self.tasks: list[asyncio.Task[Any]] = []  # kept: a dead process must not even clean up
        self.errors: list[str] = []
        self.timers_made = 0

    def time(self) -> float:
        """Seconds since the start of the run."""
        return self.now

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Run it after what is ready already."""
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Run it at a moment of the virtual clock."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.timers_made += 1
        heapq.heappush(self.timers, (when, self.timers_made, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Run it after so many seconds."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        """Start a task, and keep it."""
        task = asyncio.Task(coro, loop=self, **options)
        self.tasks.append(task)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run it here and now: a thread would make runs differ."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001  whoever waits gets it
            future.set_exception(exc)
        return future

    def get_debug(self) -> bool:
        """Whether asyncio checks itself."""
        return False

    def is_running(self) -> bool:
        """Whether it runs: always while anybody asks."""
        return True

    def is_closed(self) -> bool:
        """Whether it is closed: it never is."""
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is skipped when its time comes."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody waited for, unless it is an error that the service answers with."""
        exception = context.get("exception")
        if exception is not None and not is_service_error(exception):
            self.errors.append(f"{context.get('message')}: {exception!r}")

    def run(self, main: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine to its end. Raises Violation if nothing can happen any more, or too late."""
        asyncio._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self.step()
            task.result()
        finally:
            asyncio._set_running_loop(None)

    def step(self) -> None:
        """Run what is ready first, or jump to the next timer."""
        if not self.ready:
            if not self.timers:
                raise Violation("nothing can happen any more, and somebody waits")
            when, _, timer = heapq.heappop(self.timers)
            if not timer.cancelled():
                self.now = max(self.now, when)
                self.ready.append(timer)
            if self.now > MAX_RUN_S:
                raise Violation("somebody waits for ever")
            return
        handle = self.ready.popleft()
        owner = handle._context.get(OWNER)  # type: ignore[attr-defined]
        if owner is not None and owner.is_dead:
            return
        if owner is not None and owner.is_stopped:
            owner.held.append(handle)
        elif not handle.cancelled():
            handle._run()

    def close(self) -> None:
        """Drop every task that is left, as the end of its process does."""
        for task in self.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if not task.done():
                try:
                    task.get_coro().close()  # type: ignore[union-attr]
                except BaseException:  # noqa: BLE001  it wanted to clean up
                    continue
        self.tasks.clear()


class Violation(Exception):
    """What must never happen; `trace` is what happened before."""

    trace: list[str] = []


def is_service_error(exc: BaseException) -> bool:
    """Whether this is an error that some process of the service answers with."""
    return any(cls.__name__ == "ServiceError" for cls in type(exc).__mro__)


# Processes of the service


@dataclass
class Clock:
    """What a process takes for the module `time`."""

    loop: VirtualLoop | None = None
    skew_s: float = 0.0

    def monotonic(self) -> float:
        assert self.loop is not None
        return 10_000 + self.skew_s * 7 + self.loop.now

    def time(self) -> float:
        assert self.loop is not None
        return EPOCH + self.skew_s + self.loop.now


def random_uuid() -> uuid.UUID:
    """A UUID that is the same when the seed is."""
    return uuid.UUID(int=random.getrandbits(128), version=4)


@lru_cache(maxsize=MAX_PROCESSES)
def load_service(number: int) -> ModuleType:
    """Load main.py once more, with globals and a clock of its own."""
    path = str(Path(__file__).parent.parent / "main.py")
    spec = importlib.util.spec_from_file_location(f"service_{number}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    clock = Clock()

    def import_with_clock(name: str, *args: Any) -> Any:
        return clock if name == "time" else builtins.__import__(name, *args)

    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_with_clock}
    sys.modules[module.__name__] = module  # pydantic looks types up there
    spec.loader.exec_module(module)
    logging.getLogger("talking_pet").removeFilter(module.add_request_id_and_redact)
    logging.getLogger("uvicorn.access").removeFilter(module.redact_arguments)
    module.logger = LOGGER  # type: ignore[attr-defined]
    module.uuid = SimpleNamespace(uuid4=random_uuid)  # type: ignore[attr-defined]
    return module


@dataclass(eq=False)
class Process:
    """One process of the service, from its start to its end."""

    name: str
    world: World
    module: Any
    is_dead: bool = False
    is_stopped: bool = False
    held: list[asyncio.Handle] = field(default_factory=list)
    troubles: list[float] = field(default_factory=list)  # when it was stopped
    storage_faults: list[float] = field(default_factory=list)
    died: asyncio.Future[None] = field(init=False)
    no_storage: tuple[float, float] = (0.0, 0.0)  # from when until when it cannot reach the storage

    def __post_init__(self) -> None:
        self.died = self.world.loop.create_future()
        module = self.module
        module.time.loop = self.world.loop
        module.time.skew_s = self.world.random.uniform(-120, 120)
        settings = module.read_settings(SETTINGS | self.world.settings)
        module.get_settings = lambda: settings
        module._state = module.AppState(Network(self), asyncio.Semaphore(2))
        module.tempfile = SimpleNamespace(TemporaryDirectory=self.world.new_folder)

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as this process's own code."""
        context = copy_context()
        context.run(OWNER.set, self)
        return context.run(self.world.loop.create_task, coro)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more."""
        self.is_dead = True
        self.troubles.append(self.world.loop.now)
        self.world.log(self, "KILLED")
        if not self.died.done():
            self.died.set_result(None)

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while: its timers are late, its answers wait."""
        self.is_stopped = True
        self.troubles.append(self.world.loop.now)
        self.world.log(self, f"STOPPED for {seconds:.0f} s")
        self.world.later(seconds, self.resume)

    def resume(self) -> None:
        """SIGCONT."""
        self.is_stopped = False
        self.world.log(self, "goes on")
        self.world.loop.ready.extend(self.held)
        self.held.clear()

    def terminate(self) -> None:
        """SIGTERM without time to finish: the jobs are cancelled, and five seconds later it is gone."""
        self.world.log(self, "TERMINATED")
        self.troubles.append(self.world.loop.now)
        for job in list(self.module._state.jobs.values()):
            copy = copy_context()
            copy.run(OWNER.set, self)
            copy.run(job.cancel, "shutdown")
        self.world.later(5.0, self.kill)


# The providers


@dataclass
class Call:
    """One request to a provider."""

    process: Process
    label: str  # what it asks for
    path: str
    query: str
    body: Any  # JSON values or bytes
    timeout_s: float
    sent_at: float
    fault: str | None
    is_abandoned: bool = False  # nobody waits for its answer any more
    arrived_at: float | None = None  # its answer


@dataclass
class Speech:
    """A speech that was paid for."""

    text: str
    call: Call
    at: float


@dataclass
class Video:
    """A prediction that was paid for."""

    id: str
    model: str
    input: dict[str, Any]
    created_at: float
    ends_at: float
    outcome: str
    canceled: bool = False

    def shown(self, now: float, clock: Callable[[float], float]) -> dict[str, Any]:
        """The prediction as Replicate shows it."""
        status = "processing"
        if self.canceled:
            status = "canceled"
        elif now >= self.ends_at:
            status = self.outcome
        return {
            "id": self.id,
            "model": self.model,
            "version": "hidden",
            "input": self.input,
            "status": status,
            "output": f"https://replicate.delivery/{self.id}.mp4"
            if status == "succeeded"
            else None,
            "error": "it could not be made" if status == "failed" else None,
            "created_at": iso(clock(self.created_at)),
        }


Answer = tuple[int, Any]  # status; JSON values or bytes
STORAGE_CALLS = ("upload", "move", "list", "read", "public")
FAULTS = (
    "refused",
    "broken",
    "lost",
    "late",
    "error",
    "error after",
    "throttled",
    "silent",
    "slow",
)
NO_OBJECT: Answer = (
    400,
    {"statusCode": "404", "error": "not_found", "message": "Object not found", "code": "NoSuchKey"},
)
DUPLICATE: Answer = (
    400,
    {
        "statusCode": "409",
        "error": "Duplicate",
        "message": "The resource already exists",
        "code": "ResourceAlreadyExists",
    },
)
INTERNAL: Answer = (
    500,
    {
        "statusCode": "500",
        "error": "Internal",
        "message": "Internal Server Error",
        "code": "InternalError",
    },
)


def iso(clock_s: float) -> str:
    """A time as both providers write it."""
    return datetime.fromtimestamp(clock_s, timezone.utc).isoformat().replace("+00:00", "Z")


@dataclass
class Disturbance:
    """What happens to a process at a chosen call of it."""

    kind: str
    label: str | None  # of the call; None: of any
    phase: str  # of the call: sent, executed, answered
    countdown: int


@dataclass
class World:
    """Everything outside the service, for one seed."""

    seed: int
    is_traced: bool = False
    loop: VirtualLoop = field(default_factory=VirtualLoop)
    trace: list[str] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)  # the present ones
    started: list[Process] = field(default_factory=list)
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    moving: Counter[str] = field(default_factory=Counter)
    speeches: list[Speech] = field(default_factory=list)
    videos: dict[str, Video] = field(default_factory=dict)
    folders: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)
    is_calm: bool = False  # no more faults
    calls: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        pick = self.random
        self.storage_s = pick.choice([0.01, 0.05, 0.15, 0.4])
        self.fault_share = pick.choice([0.0, 0.0, 0.02, 0.1, 0.25])
        # The call that fails often
        self.weak_call = pick.choice(
            [None, None, "create", "create", "move", "speech", "read", "upload"]
        )
        self.storage_skew_s = pick.uniform(-120, 120)
        self.replicate_skew_s = pick.uniform(-120, 120)
        self.settings = {"JOB_TIMEOUT_SECONDS": pick.choice(["600", "600", "600", "600", "90"])}
        self.speech_s = pick.choice([(0.5, 4)] * 5 + [(20, 70)])
        self.video_s = pick.choice([(1, 6)] * 4 + [(20, 80)])
        self.fails = pick.random() < 0.05  # the predictions end so
        self.disturbances = [self.plan_disturbance() for _ in range(pick.choice([0, 1, 1, 2, 3]))]
        self.context = Context()  # the world's own: nobody's process

    def plan_disturbance(self) -> Disturbance:
        """Choose what happens to a process, and at which of its calls."""
        pick = self.random
        label = pick.choice(
            [None, "move", "move", "upload", "speech", "create", "create", "list", "poll", "search"]
        )
        return Disturbance(
            kind=pick.choice(["kill", "kill", "stop", "stop", "terminate", "partition"]),
            label=label,
            phase=pick.choice(["sent", "executed", "answered"]),
            countdown=pick.randrange(60)
            if label is None
            else pick.randrange(6 if label == "move" else 3),
        )

    def log(self, process: Process | None, text: str) -> None:
        """Add a line to the trace."""
        if self.is_traced:
            name = process.name if process else "-"
            self.trace.append(f"{self.loop.now:9.3f} {name:4} {text}")

    def later(self, seconds: float, callback: Callable[..., Any], *args: Any) -> None:
        """Do something after a while, whatever happens to the processes."""
        self.loop.call_later(seconds, callback, *args, context=self.context.copy())

    def new_folder(self, prefix: str) -> tempfile.TemporaryDirectory[str]:
        """A folder for a job's files, which is removed with the world: its process may be killed."""
        memory = MEMORY if MEMORY.is_dir() else None
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=memory)
        self.folders.append(folder)
        return folder

    # Processes

    def start(self, number: int) -> None:
        """Start a process in a place where there is none."""
        if len(self.started) >= MAX_PROCESSES:
            return
        name = f"{'ABC'[number]}{sum(p.name[0] == 'ABC'[number] for p in self.started)}"
        process = Process(name, self, load_service(len(self.started)))
        self.started.append(process)
        if number < len(self.processes):
            self.processes[number] = process
        else:
            self.processes.append(process)

    def disturb(self, call: Call, phase: str) -> None:
        """See whether this is the moment that was chosen for something."""
        process = call.process
        if self.is_calm or process.is_dead or process.is_stopped:
            return
        for planned in self.disturbances:
            if planned.phase != phase or planned.label not in (None, call.label):
                continue
            planned.countdown -= 1
            if planned.countdown != -1:
                continue
            if planned.kind == "stop":
                process.stop(self.random.choice([5.0, 35.0, 60.0, 100.0]))
                return
            if planned.kind == "partition":
                seconds = self.random.uniform(5, 60)
                process.no_storage = (self.loop.now, self.loop.now + seconds)
                self.log(process, f"CUT OFF from the storage for {seconds:.0f} s")
                return
            number = self.processes.index(process)
            process.kill() if planned.kind == "kill" else process.terminate()
            self.later(self.random.uniform(5.5, RESTART_S), self.start, number)
            return

    # The network

    def choose_fault(self, process: Process, label: str) -> str | None:
        """Choose what goes wrong with a call; mostly nothing."""
        if self.is_calm:
            return None
        if (
            label in STORAGE_CALLS
            and process.no_storage[0] <= self.loop.now < process.no_storage[1]
        ):
            return "refused"
        share = max(self.fault_share, WEAK_SHARE) if label == self.weak_call else self.fault_share
        if self.random.random() >= share:
            return None
        fault = self.random.choice(FAULTS)
        if fault == "silent" and self.random.random() < 0.7:
            return "slow"
        return fault

    def delay_s(self, label: str) -> float:
        """How long a call takes one way, in seconds."""
        jitter = self.random.uniform(0.3, 1.7)
        if label in STORAGE_CALLS:
            return self.storage_s * jitter / 2
        return 0.1 * jitter

    def work_s(self, call: Call) -> float:
        """How long the provider works on a call, in seconds."""
        if call.label == "speech":
            return self.random.uniform(*self.speech_s)
        if call.label == "create" and self.random.random() < 0.2:
            return self.random.uniform(1, 15)
        return 0.0

    def send(self, call: Call, answer: asyncio.Future[Answer]) -> None:
        """Put a call on its way."""
        there_s = self.delay_s(call.label)
        if call.fault == "slow":
            there_s += self.random.uniform(0.5, 4)
        work_s = self.work_s(call)
        self.calls += 1
        if self.is_traced:
            self.log(call.process, f"{call.label} {short(call)} {call.fault or ''}")
        if call.fault == "refused":
            self.later(there_s, self.fail, call, answer, httpx.ConnectError("refused"))
        elif call.fault == "broken":
            self.later(there_s, self.fail, call, answer, httpx.ReadError("broken"))
        elif call.fault == "throttled":
            self.later(there_s, self.answer, call, answer, (429, {"detail": "slow down"}))
        elif call.fault == "error":
            self.later(there_s, self.answer, call, answer, INTERNAL)
        elif call.fault == "late":
            self.later(there_s, self.fail, call, answer, httpx.RemoteProtocolError("cut off"))
            latest_s = (
                LATE_STORAGE_S
                if call.label in STORAGE_CALLS and self.random.random() < 0.3
                else LATE_S
            )
            self.later(there_s + self.random.uniform(0.1, latest_s), self.execute, call, answer)
        else:
            self.later(there_s, self.begin, call)
            self.later(there_s + work_s, self.execute, call, answer)
        if call.fault == "silent":
            self.later(call.timeout_s, self.fail, call, answer, httpx.ReadTimeout("silent"))

    def begin(self, call: Call) -> None:
        """A move looks for its source a moment before it renames it."""
        if call.label == "move":
            self.moving[call.body["sourceKey"]] += 1

    def execute(self, call: Call, answer: asyncio.Future[Answer]) -> None:
        """Let the provider do what it is asked for, and send its answer off."""
        result = getattr(self, f"do_{call.label}")(call)
        if self.is_traced:
            self.log(
                call.process, f"  ... {call.label} {short(call)} -> {result[0]} {brief(result[1])}"
            )
        self.disturb(call, "executed")
        back_s = self.delay_s(call.label)
        if call.fault == "lost":
            self.later(back_s, self.fail, call, answer, httpx.ReadError("lost"))
        elif call.fault == "error after":
            self.later(back_s, self.answer, call, answer, INTERNAL)
        elif call.fault != "silent":
            self.later(back_s, self.answer, call, answer, result)

    def answer(self, call: Call, answer: asyncio.Future[Answer], result: Answer) -> None:
        """Hand an answer over."""
        self.disturb(call, "answered")
        if not answer.done():
            call.arrived_at = self.loop.now
            answer.set_result(result)

    def fail(self, call: Call, answer: asyncio.Future[Answer], error: Exception) -> None:
        """End a call without an answer."""
        self.disturb(call, "answered")
        if not answer.done():
            answer.set_exception(error)

    # ElevenLabs

    def do_speech(self, call: Call) -> Answer:
        """It is paid for when it is made."""
        text = call.body["text"]
        self.speeches.append(Speech(text, call, self.loop.now))
        return 200, f"ID3 {text} {len(self.speeches)}".encode()

    # Replicate

    def replicate_clock(self, moment: float) -> float:
        """Replicate's own clock."""
        return EPOCH + self.replicate_skew_s + moment

    def do_create(self, call: Call) -> Answer:
        """It is paid for when it is created."""
        number = len(self.videos)
        video = Video(
            id=f"p{number}",
            model=call.path.removeprefix("/v1/models/").removesuffix("/predictions"),
            input=call.body["input"],
            created_at=self.loop.now,
            ends_at=self.loop.now + self.random.uniform(*self.video_s),
            outcome="failed" if self.fails else "succeeded",
        )
        self.videos[video.id] = video
        return 201, video.shown(self.loop.now, self.replicate_clock)

    def do_poll(self, call: Call) -> Answer:
        """One prediction."""
        video = self.videos.get(call.path.rpartition("/")[2])
        if video is None:
            return 404, {"detail": "no such prediction"}
        return 200, video.shown(self.loop.now, self.replicate_clock)

    def do_cancel(self, call: Call) -> Answer:
        """Cancelling one that has ended changes nothing."""
        video = self.videos[call.path.split("/")[-2]]
        if self.loop.now < video.ends_at:
            video.canceled = True
        return 200, video.shown(self.loop.now, self.replicate_clock)

    def do_search(self, call: Call) -> Answer:
        """The list, newest first."""
        after = parse_qs(call.query).get("created_after", ["1970-01-01T00:00:00+00:00"])[0]
        since = datetime.fromisoformat(after).timestamp()
        shown = [
            video.shown(self.loop.now, self.replicate_clock)
            for video in reversed(self.videos.values())
            if self.replicate_clock(video.created_at) > since
        ]
        return 200, {"next": None, "results": shown}

    def do_model(self, call: Call) -> Answer:
        """A model that speaks by itself."""
        name = call.path.removeprefix("/v1/models/")
        described = model_schemas()[name]
        schema = {
            "type": "object",
            "properties": described["properties"],
            "required": described["required"],
        }
        version = {
            "id": described["version"],
            "openapi_schema": {"components": {"schemas": {"Input": schema}}},
        }
        return 200, {"name": name, "is_official": True, "latest_version": version}

    # Supabase Storage

    def do_upload(self, call: Call) -> Answer:
        """Later uploads replace earlier ones; the date stays."""
        key = call.path.partition("/object/")[2]
        created = self.objects[key][1] if key in self.objects else self.loop.now
        self.objects[key] = (call.body, created)
        return 200, {"Key": key, "Id": "1"}

    def do_move(self, call: Call) -> Answer:
        """One winner for each destination; a source that is being moved already gives a 500."""
        asked = call.body
        source = f"{asked['bucketId']}/{asked['sourceKey']}"
        target = f"{asked['bucketId']}/{asked['destinationKey']}"
        overlaps = self.moving[asked["sourceKey"]] > 1
        self.moving[asked["sourceKey"]] -= 1
        if source not in self.objects:
            return INTERNAL if overlaps else NO_OBJECT
        if target in self.objects:
            return DUPLICATE
        self.objects[target] = self.objects.pop(source)
        return 200, {"message": "Successfully moved"}

    def do_list(self, call: Call) -> Answer:
        """The files of one folder."""
        prefix = f"{call.path.rpartition('/')[2]}/{call.body['prefix']}/"
        listed = [
            {
                "name": key.removeprefix(prefix),
                "created_at": iso(EPOCH + self.storage_skew_s + created),
            }
            for key, (_, created) in self.objects.items()
            if key.startswith(prefix)
        ]
        return 200, listed

    def do_read(self, call: Call) -> Answer:
        """A file with the key."""
        key = call.path.partition("/authenticated/")[2]
        return (200, self.objects[key][0]) if key in self.objects else NO_OBJECT

    def do_public(self, call: Call) -> Answer:
        """A file without the key."""
        key = call.path.partition("/public/")[2]
        return (200, self.objects[key][0]) if key in self.objects else NO_OBJECT

    # Everybody else

    def do_picture(self, call: Call) -> Answer:
        """The picture's host."""
        return 200, b""

    def do_video(self, call: Call) -> Answer:
        """Replicate's file server."""
        return 200, VIDEO


@lru_cache(maxsize=1)
def model_schemas() -> dict[str, Any]:
    """The models that the sandbox knows."""
    schemas: dict[str, Any] = json.loads((ROOT / "tests/sandbox/models.json").read_text())
    return schemas


def short(call: Call) -> str:
    """What a call is about, for the trace."""
    if call.label == "move":
        return shorten(call.body["destinationKey"])
    if call.label == "list":
        return shorten(call.body["prefix"])
    if call.label == "upload" and b'"entry_id"' in call.body:
        entry = {
            name: value for name, value in json.loads(call.body).items() if name != "request_digest"
        }
        return shorten(f"{call.path[-42:]} {json.dumps(entry)}")
    return shorten(call.path[-50:])


def brief(content: Any) -> str:
    """What an answer says, for the trace."""
    if isinstance(content, dict) and "id" in content:
        return f"{content['id']} {content.get('status', '')}"
    if isinstance(content, dict) and "results" in content:
        return " ".join(one["id"] for one in content["results"])
    if isinstance(content, list):
        return " ".join(one["name"] for one in content)
    if isinstance(content, dict):
        return str(content.get("code") or "")
    return ""


def shorten(text: str) -> str:
    """The text with its long hexadecimal numbers cut to six digits."""
    return re.sub(r"([0-9a-f]{6})[0-9a-f]{26,}", r"\1", text)


LABELS = (  # method, pattern of host and path, label
    ("POST", r"api\.elevenlabs\.io/v1/text-to-speech/.*", "speech"),
    ("POST", r"api\.replicate\.com/v1/models/.*/predictions", "create"),
    ("POST", r"api\.replicate\.com/v1/predictions/.*/cancel", "cancel"),
    ("GET", r"api\.replicate\.com/v1/predictions", "search"),
    ("GET", r"api\.replicate\.com/v1/predictions/.*", "poll"),
    ("GET", r"api\.replicate\.com/v1/models/.*", "model"),
    ("POST", r"project\.supabase\.co/storage/v1/object/move", "move"),
    ("POST", r"project\.supabase\.co/storage/v1/object/list/.*", "list"),
    ("POST", r"project\.supabase\.co/storage/v1/object/.*", "upload"),
    ("GET", r"project\.supabase\.co/storage/v1/object/authenticated/.*", "read"),
    ("GET", r"project\.supabase\.co/storage/v1/object/public/.*", "public"),
    ("GET", r"replicate\.delivery/.*", "video"),
    ("HEAD", r"pictures\.example/.*", "picture"),
)


@lru_cache(maxsize=10_000)
def label_of(method: str, place: str) -> str:
    """What a request asks for. Raises Violation if the providers know no such call."""
    for asked, pattern, label in LABELS:
        if asked == method and re.fullmatch(pattern, place):
            return label
    raise Violation(f"unknown call {method} {place}")


@dataclass
class LightRequest:
    """What the service uses of httpx.Request, which takes a third of a millisecond to build."""

    method: str
    url: httpx.URL
    body: Any
    extensions: dict[str, Any]
    timeout_s: float


@dataclass
class LightResponse:
    """What the service uses of httpx.Response."""

    status_code: int
    headers: dict[str, str]
    content: bytes
    next_request: None = None

    async def aiter_raw(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        yield self.content

    async def aclose(self) -> None:
        """There is no connection."""


@lru_cache(maxsize=10_000)
def parse_url(url: str) -> httpx.URL:
    """Parse a URL, once."""
    return httpx.URL(url)


@dataclass
class Network:
    """What a process has in place of its httpx.AsyncClient: a way into the world."""

    process: Process

    def build_request(self, method: str, url: str, **options: Any) -> LightRequest:
        """Keep what the providers look at."""
        if options.get("params"):
            url += "?" + urlencode(options["params"])
        body = options.get("content", options.get("json"))
        timeout = options.get("timeout", self.process.module.TIMEOUT)
        return LightRequest(
            method, parse_url(url), body, options.get("extensions") or {}, timeout.read
        )

    async def send(self, request: LightRequest, stream: bool) -> LightResponse:
        """Send one request into the world."""
        process = self.process
        world = process.world
        body = request.body
        if hasattr(body, "__aiter__"):
            body = b"".join([chunk async for chunk in body])
        label = label_of(request.method, request.url.host + request.url.path)
        fault = world.choose_fault(process, label)
        call = Call(
            process=process,
            label=label,
            path=request.url.path,
            query=request.url.query.decode(),
            body=body,
            timeout_s=request.timeout_s,
            sent_at=world.loop.now,
            fault=fault,
        )
        if fault and label in STORAGE_CALLS:
            process.storage_faults.append(world.loop.now)

        answer: asyncio.Future[Answer] = world.loop.create_future()
        world.send(call, answer)
        world.disturb(call, "sent")
        try:
            status, content = await answer
        except asyncio.CancelledError:
            call.is_abandoned = True
            raise
        skew_s = world.storage_skew_s if label in STORAGE_CALLS else world.replicate_skew_s
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {
            "date": formatdate(EPOCH + skew_s + world.loop.now, usegmt=True),
            "content-type": "image/jpeg",
        }
        return LightResponse(status, headers, content)


# Clients


@dataclass
class KeyedJob:
    """One key, the request that belongs to it, and the answers so far."""

    number: int
    has_speech: bool
    content: int  # jobs with the same content have equal bodies
    answers: list[bytes] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    answered_at: float = 0.0

    @property
    def key(self) -> str:
        return f"key-{self.number}"

    @property
    def prompt(self) -> str:
        return f"prompt {self.content}"

    @property
    def text(self) -> str:
        return f"text {self.content}"

    def request_for(self, module: Any) -> tuple[str, Any, Any]:
        """Path, body and work of the request."""
        fields = {"image_url": "https://pictures.example/pet.jpg", "prompt": self.prompt}
        if not self.has_speech:
            return "/jobs_prompt_only", module.JobPromptOnly(**fields), module.video_job
        body = module.JobPromptTTS(
            **fields, text=self.text, voice_id="voice", model=SPEAKING_MODEL, seconds=5
        )
        return "/jobs_prompt_tts", body, module.speech_job


@dataclass
class FakeRequest:
    """What answer_job needs of a request."""

    path: str
    disconnected: asyncio.Future[None]
    headers: dict[str, str] = field(default_factory=dict)
    state: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(request_id="r"))

    @property
    def url(self) -> SimpleNamespace:
        return SimpleNamespace(path=self.path)

    async def receive(self) -> dict[str, str]:
        """Wait for the client to leave."""
        await self.disconnected
        return {"type": "http.disconnect"}


async def send_request(world: World, process: Process, job: KeyedJob, patience_s: float) -> bool:
    """Send a job's request to a process; whether it was answered for good. The client may leave before."""
    path, body, work = job.request_for(process.module)
    request = FakeRequest(path, world.loop.create_future())
    world.log(process, f"<- request {job.key}")
    task = process.spawn(process.module.answer_job(request, body, job.key, work))
    await asyncio.wait(
        {task, process.died}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
    )
    if not task.done():
        world.log(process, f"the client of {job.key} leaves")
        request.disconnected.set_result(None)
        return False
    exc = task.exception()
    if exc is None:
        response = task.result()
        world.log(
            process,
            f"-> 200 {job.key} {response.headers.get('idempotency-replayed', '')} {response.body.decode()}",
        )
        job.answers.append(response.body)
        job.answered_at = world.loop.now
        return True
    if not is_service_error(exc):
        raise Violation(f"unforeseen {exc!r}") from exc
    world.log(process, f"-> {exc.http_status} {job.key} retryable={exc.retryable} {exc.detail}")  # type: ignore[attr-defined]
    if "unforeseen" in exc.detail or "own machine" in exc.detail:  # type: ignore[attr-defined]
        raise Violation(f"unforeseen error: {exc.detail}")  # type: ignore[attr-defined]
    if exc.retryable:  # type: ignore[attr-defined]
        return False
    job.refusals.append(exc.detail)  # type: ignore[attr-defined]
    return True


async def client(world: World, job: KeyedJob, first_s: float) -> None:
    """Send the same request, to any instance, until it is answered for good."""
    await asyncio.sleep(first_s)
    is_answered = False
    while not is_answered:
        process = world.random.choice(world.processes)
        if process.is_dead:
            await asyncio.sleep(0.5)
            continue
        patience_s = world.random.choice([5.0, 40.0, 900.0, 900.0, 900.0])
        is_answered = await send_request(world, process, job, patience_s)
        if not is_answered:
            await asyncio.sleep(world.random.choice([0.05, 0.3, 2.0, 20.0]))


async def play(world: World) -> list[KeyedJob]:
    """One run: the clients, the end of what still runs, and a later request for each key."""
    for number in range(world.random.choice([2, 2, 3])):
        world.start(number)
    jobs = [KeyedJob(0, world.random.random() < 0.6, content=0)]
    if world.random.random() < 0.3:
        jobs.append(
            KeyedJob(1, world.random.random() < 0.6, content=world.random.choice([0, 1, 1]))
        )
    clients = []
    for job in jobs:
        for _ in range(world.random.choice([1, 2, 2, 3])):
            first_s = world.random.choice(
                [0.0, 0.0, world.random.uniform(0, 1), world.random.uniform(0, 60)]
            )
            clients.append(asyncio.ensure_future(client(world, job, first_s)))
    await asyncio.gather(*clients)

    for process in world.started:
        while not process.is_dead and (process.is_stopped or process.module._state.jobs):
            await asyncio.sleep(1)
    world.is_calm = True
    await asyncio.sleep(RESTART_S)
    world.log(None, "later")
    while all(process.is_dead for process in world.processes):
        await asyncio.sleep(1)
    for job in jobs:
        await check_later(world, job)
    return jobs


async def check_later(world: World, job: KeyedJob) -> None:
    """A later request must have the same answer, and cost nothing."""
    if world.loop.now - job.answered_at > 3_000 and not job.has_speech:
        return  # the video's URL has nearly expired
    paid = len(world.speeches), len(world.videos)
    process = world.random.choice([process for process in world.processes if not process.is_dead])
    if not await send_request(world, process, job, 900.0):
        raise Violation(f"{job.key} has no final answer later")
    if (len(world.speeches), len(world.videos)) != paid:
        raise Violation(f"{job.key} is paid for again by a later request")


# The books


def check_books(world: World, jobs: list[KeyedJob]) -> None:
    """Compare what was paid for with what was asked for. Raises Violation."""
    if world.loop.errors:
        raise Violation(world.loop.errors[0])
    for job in jobs:
        if len(set(job.answers)) > 1:
            raise Violation(f"{job.key} has different answers")
        if job.answers and job.refusals:
            raise Violation(f"{job.key} was answered and refused: {job.refusals[0]}")
    for content in {job.content for job in jobs}:
        check_payments(world, [job for job in jobs if job.content == content])


def check_payments(world: World, jobs: list[KeyedJob]) -> None:
    """Check what was paid for jobs of equal content. Raises Violation."""
    videos = [video for video in world.videos.values() if video.input["prompt"] == jobs[0].prompt]
    if len(videos) > len(jobs):
        raise Violation(f"{len(videos)} videos were paid for {jobs[0].key}")
    speeches = [speech for speech in world.speeches if speech.text == jobs[0].text]
    unexcused = [speech for speech in speeches if not is_excused(speech)]
    if len(unexcused) > sum(job.has_speech for job in jobs):
        raise Violation(
            f"{len(speeches)} speeches were paid for {jobs[0].key}, {len(unexcused)} without a reason"
        )


def is_excused(speech: Speech) -> bool:
    """Whether a speech could not reach the log: its answer was lost, or its process was in trouble meanwhile."""
    call = speech.call
    if (
        call.fault in ("lost", "late", "error after", "silent")
        or call.is_abandoned
        or call.arrived_at is None
    ):
        return True
    process = call.process
    recorded_by = call.arrived_at + RECORDING_S
    if any(call.sent_at <= moment <= recorded_by for moment in process.troubles):
        return True
    faults = [
        moment
        for moment in process.storage_faults
        if call.sent_at - LEASE_S <= moment <= recorded_by
    ]
    return len(faults) >= UPLOAD_ATTEMPTS


def run_seed(seed: int, is_traced: bool = False) -> World:
    """Run one seed. Raises Violation."""
    random.seed(seed)
    world = World(seed, is_traced)
    jobs: list[KeyedJob] = []

    async def whole_run() -> None:
        jobs.extend(await play(world))

    try:
        world.loop.run(whole_run())
        check_books(world, jobs)
    except Violation as exc:
        exc.trace = world.trace
        raise
    finally:
        with silence():
            world.loop.close()
        for folder in world.folders:
            folder.cleanup()
    return world


@contextmanager
def silence() -> Iterator[None]:
    """Ignore what dropped coroutines complain of."""
    kept = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = kept


# The command


@dataclass
class Tally:
    """What some runs came to."""

    runs: int = 0
    speeches: int = 0
    videos: int = 0
    calls: int = 0
    violations: list[tuple[int, str]] = field(default_factory=list)


def run_seeds(seeds: range) -> Tally:
    """Run some seeds, and count."""
    tally = Tally()
    for seed in seeds:
        tally.runs += 1
        try:
            world = run_seed(seed)
        except Violation as exc:
            tally.violations.append((seed, str(exc)))
            continue
        tally.speeches += len(world.speeches)
        tally.videos += len(world.videos)
        tally.calls += world.calls
    return tally


def show(seed: int) -> None:
    """Print the end of a seed's trace."""
    try:
        run_seed(seed, is_traced=True)
    except Violation as exc:
        print("\n".join(exc.trace[-TRACE_LINES:]))
        print(f"seed {seed}: {exc}")


def main() -> int:
    """Run the command; the exit code is 0 if there was no violation."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.interleavings", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=2_000, help="how many seeds (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument(
        "--lanes", type=int, default=1, help="processes that share the work (default: 1)"
    )
    options = parser.parse_args()
    started = time.monotonic()
    lanes = [
        range(options.seed + lane, options.seed + options.runs, options.lanes)
        for lane in range(options.lanes)
    ]
    if options.lanes == 1:
        tallies = [run_seeds(lanes[0])]
    else:
        with ProcessPoolExecutor(options.lanes) as pool:
            tallies = list(pool.map(run_seeds, lanes))
    seconds = time.monotonic() - started
    violations = sorted(violation for tally in tallies for violation in tally.violations)
    runs = sum(tally.runs for tally in tallies)
    print(f"runs        {runs}  ({runs / seconds * 60:.0f} a minute)")
    print(f"speeches    {sum(tally.speeches for tally in tallies)}")
    print(f"videos      {sum(tally.videos for tally in tallies)}")
    print(f"violations  {len(violations)}")
    for seed, reason in violations[:20]:
        print(f"seed {seed}: {reason}")
    if violations:
        LOGGER.setLevel(logging.ERROR)  # an unforeseen error's traceback
        show(violations[0][0])
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
