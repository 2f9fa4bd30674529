"""What the service adds to the providers' time, and what it costs: one table, every figure measured in this run.

    python -m tests.bench                  every row, about thirteen minutes
    python -m tests.bench --rows start cpu     some of them
    python -m tests.bench --json           for machines
    python -m tests.bench --smoke          tiny counts: does it run at all?

The sandbox's providers run in a process of their own and speak TLS, with ready-made media and configured delays; the
service is the real one under uvicorn and trusts their certificate, which is made for the run (SSL_CERT_FILE); the load
comes from this process, over loopback. All three share this machine's cores, so the figures are worse than those of
the service alone. The speech is espeak-ng's voice where it is installed: ffmpeg codes a tone at another speed.
Not imitated: the internet's round trips. Linux only (/proc); needs the `openssl` command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from http.client import HTTPConnection
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import Response

from tests.sandbox import Sandbox, Service, media
from tests.sandbox.behaviour import Behaviour
from tests.sandbox.providers import KEEP_ALIVE_S, PET_FILE, START_TIMEOUT_S
from tests.sandbox.replicate import Replicate
from tests.sandbox.schemas import Model

# The limits: what README promises on two cores.
ONE_SHORT_JOB = 1.04  # of the providers' own time: up to 0.27 s of waiting for a poll, then ffmpeg
ONE_LONG_JOB = 1.02  # polls are 2.5 % of the time waited apart, so half of that is lost on average
# Of one job's: the muxes of all share the cores, whose own speed drifts by a fifth (on one day one
# version measured 1.33 and 1.48).
CROWD_TIME = 1.5
HEALTH_P99_MS = 50.0  # far below the 5 s that Render gives a health check
GROWTH_MB = 60.0  # media stream through; on top of 60 MB at rest that leaves most of 512 MB
TREE_MB = 300.0  # service and ffmpeg together, of the smallest instance's 512 MB
CONVERT_CPU_S = 12.0  # of a video that not every browser plays, beside its mux
CONVERT_MB = 260.0  # service and ffmpeg together
# By Replicate's limits, 600 creates and 3,000 other calls a minute (docs rate-limits)
REFUSED = 5.0
PACED_TIME = 1.6  # of the video's time: polls of 300 jobs are 7.5 s apart
# Of bare ffmpeg's, which takes some 65 ms on a voice: 45 ms beside it are ours
CPU_OVER_FFMPEG = 1.7
OWN_CPU_MS = 45.0  # a core does twenty jobs a second, if ffmpeg runs elsewhere
POLLS = 55.0  # a video; Replicate's own client makes two a second
LATE_S = 0.35  # its 0.25 s, and no more than so many fewer polls are worth
LINE_TIME = 1.5  # of the best possible: the line finds out by refusals what the plan allows
# 300 speeches at once: at worst all but ten, before the first refusal is known
LINE_REFUSED = 299.0
CREATES_S = 115.0  # 80 s at best: the last 400 may begin after a minute, and take 20 s
CREATES_REFUSED = 199.0
CROWD_HEALTH_MS = 500.0
LOW_REFUSED = 79.0
START_S = 1.5  # an instance that scales up is of use when it answers
REST_MB = 80.0  # of 512
CPU_GROWTH = 1.2  # of the smallest crowd's: nothing may grow with the square of the jobs
WAITING_JOB_KB = 200.0  # a thousand waiting jobs in 200 MB; connections over TLS take most of it

TEXT = "Where is my dinner? I have been waiting here since the sun came up."  # some 4 s
BIG_VIDEO_BITS_PER_S = 28_000_000  # 21 MB in 6 s

APART_S = 1.0  # between jobs that are to be alone with their mux
GROWTH_APART_S = 0.02  # else memory would show how many came in the same moment, not how many wait
SAMPLE_S, HEALTH_EVERY_S = 0.05, 0.05
ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    # The providers' own time, quicker than the real ones mostly are, so that what the service adds weighs more.
    speech_s: float = 1.0
    transfer_s: float = 0.2  # an upload, or the download of a video
    poll_s: float = 0.25  # POLL_MIN_SECONDS, as it is by default

    video_s: float = 6.0
    video_lines: int = 768
    starts: int = 5
    alone: int = 5
    short_s: float = 6.0  # to make a video
    long_s: float = 60.0
    crowd: int = 50
    paced: int = 300
    paced_s: float = 20.0
    growth: tuple[int, ...] = (10, 50, 100, 200)
    growth_s: float = 10.0
    watched: int = 10  # videos at once: more would be polled less often
    watched_waves: int = 5  # after one from which their model is known
    watched_s: float = 30.0  # the median
    line_speeches: int = 300
    line_slots: int = 10
    line_speech_s: float = 2.0
    line_creates: int = 1_000
    line_creates_s: float = 20.0
    line_low: int = 8
    # The longest wait between two polls, but for what the crowd itself imposes
    growth_poll_s: float = 2.0

    def providers_s(self, video_s: float) -> float:
        """Seconds that a speech job spends at the providers: speech, upload, video, download, upload."""
        return self.speech_s + video_s + 3 * self.transfer_s


SMOKE = Sizes(
    speech_s=0.05,
    transfer_s=0.02,
    poll_s=0.02,
    video_s=0.5,
    video_lines=96,
    starts=1,
    alone=1,
    short_s=0.1,
    long_s=0.3,
    crowd=3,
    paced=3,
    paced_s=0.3,
    growth=(1, 2),
    growth_s=0.2,
    watched=2,
    watched_waves=1,
    watched_s=0.3,
    line_speeches=4,
    line_slots=2,
    line_speech_s=0.1,
    line_creates=3,
    line_creates_s=0.3,
    line_low=2,
    growth_poll_s=0.1,
)


@dataclass(frozen=True)
class Row:
    """One figure beside what it may be at most."""

    group: str
    what: str
    measured: float
    at_most: float
    unit: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the figure, as shown, is within its limit."""
        return float(self.shown(self.measured)) <= self.at_most

    def shown(self, number: float) -> str:
        """A figure with three digits that count."""
        return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.2f}"

    def line(self) -> str:
        """The row of the table (Markdown)."""
        unit = f" {self.unit}" if self.unit else ""
        measured, at_most = self.shown(self.measured) + unit, self.shown(self.at_most) + unit
        note = self.note if self.is_met else f"**over**; {self.note}"
        return f"| {self.what:<60} | {measured:>8} | {at_most:>7} | {note} |"


# The three processes


class Studio(Replicate):
    """Replicate with a time for each video: `times_s` in their order, in a cycle."""

    times_s: Iterator[float]

    def create(self, request: Request, model: Model, body: dict[str, Any]) -> Response:
        """Start a prediction that takes the next of the times, and ends at the first poll after it."""
        self.behaviour = Behaviour(polls_to_finish=1, video_seconds=next(self.times_s))
        return super().create(request, model, body)


class SecureSandbox(Sandbox):
    """The sandbox as the world has it: over TLS, with a voice where there is one."""

    replicate: Studio

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(record=False, tones=False)
        self.certificate, self.key = certificate, key
        self.replicate = Studio(self, self.workshop, lambda: self.url)

    @property
    def url(self) -> str:
        """The origin of all three providers, without a slash at the end."""
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> SecureSandbox:
        """Listen on a free port; returns when requests are answered."""
        # TCP is named: only then does asyncio switch delays off.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        self.port = listener.getsockname()[1]
        self.server = server = uvicorn.Server(self.config())
        self.thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            if not self.thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the providers did not start")
            time.sleep(0.005)
        return self

    def config(self) -> uvicorn.Config:
        """How they are served."""
        return uvicorn.Config(
            self.router(),
            loop="asyncio",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            ssl_certfile=self.certificate,
            ssl_keyfile=self.key,
        )

    def __enter__(self) -> SecureSandbox:
        return self.start()


@dataclass(frozen=True)
class Watched:
    """How a video was waited for: how often it was polled, and the seconds from its end to the poll that found it."""

    polls: int
    late_s: float


class Providers:
    """The sandbox's providers in a process of their own; a context manager."""

    def __enter__(self) -> Providers:
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        certificate, key = make_certificate(Path(self.folder.name))
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=provide, args=(theirs, certificate, key), daemon=True)
        self.process.start()
        theirs.close()
        environment, self.image_url, self.voice_id = self.pipe.recv()
        self.environment = {**environment, "SSL_CERT_FILE": str(certificate)}
        return self

    def __exit__(self, *exc: object) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.folder.cleanup()

    def become(
        self,
        video: bytes,
        times_s: Sequence[float],
        sizes: Sizes,
        creates_per_minute: int | None,
        slots: int | None,
    ) -> None:
        """Start afresh: this video for everyone, made in the next of `times_s`, under these limits; None: without."""
        delays_s = {
            "speech": sizes.speech_s,
            "upload": sizes.transfer_s,
            "output": sizes.transfer_s,
        }
        if slots:
            delays_s["speech"] = sizes.line_speech_s
        self.pipe.send((video, times_s, delays_s, creates_per_minute, slots))
        self.pipe.recv()

    def watched(self) -> list[Watched]:
        """How every video since then was waited for."""
        self.pipe.send(None)
        watched: list[Watched] = self.pipe.recv()
        return watched


def provide(pipe: Connection, certificate: Path, key: Path) -> None:
    """What the providers' process does, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with SecureSandbox(certificate, key) as sandbox, suppress(EOFError):
        pipe.send((sandbox.environment(), sandbox.image_url, sandbox.voice_id))
        while True:
            wanted = pipe.recv()
            if wanted is None:
                ended = [one for one in sandbox.predictions.values() if one.status == "succeeded"]
                pipe.send(
                    [
                        Watched(one.polls, one.ended_after_s - one.behaviour.video_seconds)
                        for one in ended
                    ]
                )
            else:
                change(sandbox, *wanted)
                pipe.send(None)


def change(
    sandbox: SecureSandbox,
    video: bytes,
    times_s: Sequence[float],
    delays_s: dict[str, float],
    creates_per_minute: int | None,
    slots: int | None,
) -> None:
    """Have the providers be as a measurement wants them."""
    sandbox.reset()
    sandbox.video(video)
    sandbox.replicate.times_s = cycle(times_s)
    sandbox.speech_slots = slots
    sandbox.speech_delay_s = delays_s.pop("speech")
    for call, seconds in delays_s.items():
        sandbox.fault(call, "slow", times=None, seconds=seconds)
    if creates_per_minute:
        sandbox.limits(creates_per_minute)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key. SystemExit if there is nothing to make them with."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if not (openssl := shutil.which("openssl")):
        raise SystemExit(
            "The benchmark's providers speak TLS, and only openssl can make their certificate: install it."
        )
    kind = (
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    )
    usage = ("-addext", "keyUsage=critical,digitalSignature,keyCertSign")  # Python 3.13 requires it
    whose = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", *usage)
    files = ("-keyout", str(key), "-out", str(certificate))
    done = subprocess.run([openssl, "req", *kind, *whose, *files], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"openssl could not make the providers' certificate: {done.stderr.strip()[-300:]}"
        )
    return certificate, key


def cpu_s(pid: int) -> tuple[float, float]:
    """Seconds of processor time: of the process, and of its children that have ended."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    user, system, children_user, children_system = (
        int(each) / os.sysconf("SC_CLK_TCK") for each in ticks
    )
    return user + system, children_user + children_system


def memory_mb(pid: int) -> float:
    """Resident memory of a process; 0 if it has ended."""
    try:
        return (
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 1e6
        )
    except (OSError, IndexError):
        return 0.0


def ffmpeg_mb(pid: int) -> float:
    """Resident memory of the process's ffmpeg children; one that has not become ffmpeg yet is still its parent's memory."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(memory_mb(int(child)) for child in pids if name_of(child).startswith("ffmpeg"))


def name_of(pid: str) -> str:
    """What a process runs; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


# The load


@dataclass
class Load:
    """What came of some jobs: the seconds each took, and how many were not answered 200."""

    seconds: list[float]
    failed: int
    wall_s: float


class Client:
    """Sends jobs and looks on; its own HTTP, since a client library's work would be measured as well."""

    def __init__(self, service: Service, providers: Providers) -> None:
        self.service = service
        self.video_job = {"image_url": providers.image_url, "prompt": "The pet talks"}
        self.speech_job = {**self.video_job, "text": TEXT, "voice_id": providers.voice_id}

    async def jobs(
        self,
        count: int,
        with_speech: bool = True,
        apart_s: float = 0.0,
        beside: Awaitable[None] | None = None,
    ) -> Load:
        """Send jobs, at once or `apart_s` after each other, and wait for all answers; `beside` is done until then."""
        looking_on = asyncio.ensure_future(beside) if beside else None
        started = time.monotonic()
        answers = await asyncio.gather(
            *(self.job(with_speech, number * apart_s) for number in range(count))
        )
        wall_s = time.monotonic() - started
        if looking_on:
            looking_on.cancel()
            await asyncio.wait({looking_on})
        seconds = [took for status, took in answers if status == 200]
        return Load(seconds, count - len(seconds), wall_s)

    async def job(self, with_speech: bool, after_s: float = 0.0) -> tuple[int, float]:
        """One job: its HTTP status (0: no answer) and seconds."""
        path, body = ("tts", self.speech_job) if with_speech else ("only", self.video_job)
        content = json.dumps(body)
        head = f"POST /jobs_prompt_{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        await asyncio.sleep(after_s)
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.service.port)
        writer.write((head + content).encode())
        answer = await asyncio.wait_for(reader.read(), ANSWER_TIMEOUT_S)
        writer.close()
        status = re.match(rb"HTTP/1.1 (\d+)", answer)
        return int(status[1]) if status else 0, time.monotonic() - started

    async def memory(self, samples: list[tuple[float, float]]) -> None:
        """Sample the memory of the service and of its children, in MB, without end."""
        while True:
            samples.append((memory_mb(self.service.pid), ffmpeg_mb(self.service.pid)))
            await asyncio.sleep(SAMPLE_S)


@contextmanager
def watched_health(service: Service) -> Iterator[list[float]]:
    """How many milliseconds each answer of /health took meanwhile, known at the end.

    A process of its own asks: the load's own event loop is busy.
    """
    milliseconds: list[float] = []
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=ask_health, args=(theirs, service.port), daemon=True)
    process.start()
    pipe.recv()
    try:
        yield milliseconds
    finally:
        pipe.send(None)
        milliseconds.extend(pipe.recv())
        process.join()


def ask_health(pipe: Connection, port: int) -> None:
    """Ask /health until something comes through the pipe; send back how long each answer took."""
    milliseconds: list[float] = []
    connection = HTTPConnection("127.0.0.1", port)
    pipe.send(None)
    while not pipe.poll(HEALTH_EVERY_S):
        started = time.monotonic()
        connection.request("GET", "/health")
        connection.getresponse().read()
        milliseconds.append((time.monotonic() - started) * 1000)
    pipe.send(milliseconds)
    connection.close()


# The measurements


@dataclass(frozen=True)
class Bench:
    """What all measurements use; each has its own processes of the service, which know nothing of those before."""

    providers: Providers
    sizes: Sizes
    video: bytes

    def fresh(self, **environment: str) -> Service:
        """A new process of the service."""
        pace = {"POLL_MIN_SECONDS": f"{self.sizes.poll_s:g}"}
        return Service({**self.providers.environment, **pace, **environment})

    def client(self, service: Service) -> Client:
        """Somebody who sends jobs."""
        return Client(service, self.providers)

    def prepare(
        self,
        *times_s: float,
        video: bytes | None = None,
        creates_per_minute: int | None = None,
        slots: int | None = None,
    ) -> None:
        """Have the videos made in these times, one after the other and then from the first again."""
        self.providers.become(video or self.video, times_s, self.sizes, creates_per_minute, slots)

    def start(self) -> Iterator[Row]:
        """Process start and memory at rest."""
        seconds, rest_mb = list[float](), list[float]()
        for _ in range(self.sizes.starts):
            started = time.monotonic()
            with self.fresh() as service:
                seconds.append(time.monotonic() - started)
                rest_mb.append(memory_mb(service.pid))
        note = f"median of {len(seconds)}; most: {max(seconds):.2f} s"
        yield Row(
            "start",
            "Process start to first `/health`",
            statistics.median(seconds),
            START_S,
            "s",
            note,
        )
        yield Row("start", "Memory at rest", max(rest_mb), REST_MB, "MB")

    def alone(self) -> Iterator[Row]:
        """Jobs that do not meet: what the service adds to the providers' time."""
        sizes = self.sizes
        for video_s, limit in ((sizes.short_s, ONE_SHORT_JOB), (sizes.long_s, ONE_LONG_JOB)):
            self.prepare(video_s)
            with self.fresh() as service:
                load = asyncio.run(self.client(service).jobs(sizes.alone, apart_s=APART_S))
            whole_s, theirs_s = statistics.mean(load.seconds), sizes.providers_s(video_s)
            what = f"One speech job, video {video_s:g} s: time over the providers'"
            note = spoken(f"{whole_s:.2f} s over {theirs_s:.2f} s; mean of {len(load.seconds)}")
            yield Row("alone", what, whole_s / theirs_s, limit, note=note)

    def crowd(self) -> Iterator[Row]:
        """Many speech jobs at once, and /health meanwhile."""
        count = self.sizes.crowd
        self.prepare(self.sizes.short_s)
        with self.fresh() as service:
            client = self.client(service)
            one_s = asyncio.run(client.jobs(1)).wall_s
            with watched_health(service) as health_ms:
                load = asyncio.run(client.jobs(count))
        name = f"{count} speech jobs at once"
        yield Row("crowd", f"{name}: not answered", load.failed, 0)
        note = spoken(f"{load.wall_s:.1f} s over {one_s:.1f} s")
        yield Row(
            "crowd", f"{name}: time over one job's", load.wall_s / one_s, CROWD_TIME, note=note
        )
        note = f"of {len(health_ms)}; median {statistics.median(health_ms):.1f} ms"
        yield Row(
            "crowd",
            f"{name}: `/health` meanwhile, p99",
            percentile(health_ms, 99),
            HEALTH_P99_MS,
            "ms",
            note,
        )

    def memory(self) -> Iterator[Row]:
        """Many speech jobs at once with big videos."""
        count, samples = self.sizes.crowd, list[tuple[float, float]]()
        video = big_video(self.sizes.video_s)
        self.prepare(self.sizes.short_s, video=video)
        with self.fresh() as service:
            client, rest_mb = self.client(service), memory_mb(service.pid)
            load = asyncio.run(client.jobs(count, beside=client.memory(samples)))
            own_ms = cpu_s(service.pid)[0] / count * 1000
        name = f"{count} speech jobs, {len(video) / 1e6:.0f} MB videos"
        note = f"{load.wall_s:.1f} s; {own_ms:.0f} ms of CPU each, without ffmpeg"
        yield Row("memory", f"{name}: not answered", load.failed, 0, note=note)
        most_mb = max(service_mb for service_mb, _ in samples)
        note = f"from {rest_mb:.0f} to {most_mb:.0f} MB"
        yield Row(
            "memory", f"{name}: the service grows by", most_mb - rest_mb, GROWTH_MB, "MB", note
        )
        note = f"ffmpeg {max(ffmpeg for _, ffmpeg in samples):.0f} MB"
        yield Row(
            "memory",
            f"{name}: with its ffmpeg children",
            max(map(sum, samples)),
            TREE_MB,
            "MB",
            note,
        )

    def convert(self) -> Iterator[Row]:
        """A speech job whose video not every browser plays, as cv2.VideoWriter writes it."""
        samples = list[tuple[float, float]]()
        plan = media.VideoPlan(self.sizes.video_s, self.sizes.video_lines, format="mp4v")
        self.prepare(self.sizes.short_s, video=media.video(PET_FILE.read_bytes(), plan))
        with self.fresh() as service:
            client = self.client(service)
            load = asyncio.run(client.jobs(1, beside=client.memory(samples)))
            ffmpeg_s = cpu_s(service.pid)[1]
            with watched_health(service) as health_ms:
                again = asyncio.run(client.jobs(1))
        name = f"A job that converts {self.sizes.video_s:g} s of {self.sizes.video_lines}p"
        note = f"{load.wall_s:.1f} s"
        yield Row("convert", f"{name}: not answered", load.failed + again.failed, 0, note=note)
        yield Row("convert", f"{name}: ffmpeg's CPU", ffmpeg_s, CONVERT_CPU_S, "s")
        note = f"ffmpeg {max(ffmpeg for _, ffmpeg in samples):.0f} MB"
        most_mb = max(map(sum, samples))
        yield Row("convert", f"{name}: with its ffmpeg children", most_mb, CONVERT_MB, "MB", note)
        note = f"of {len(health_ms)}; median {statistics.median(health_ms):.1f} ms"
        p99_ms = percentile(health_ms, 99)
        what = f"{name}: `/health` meanwhile, p99"
        yield Row("convert", what, p99_ms, HEALTH_P99_MS, "ms", note)

    def pace(self) -> Iterator[Row]:
        """Hundreds of videos under Replicate's rate limits."""
        count, video_s = self.sizes.paced, self.sizes.paced_s
        self.prepare(video_s, creates_per_minute=600)
        with self.fresh() as service:
            load = asyncio.run(self.client(service).jobs(count, with_speech=False))
            refused = service.log.count("failed (429")
        name = f"{count} videos at once, Replicate's limits"
        yield Row("pace", f"{name}: not answered", load.failed, 0)
        yield Row("pace", f"{name}: responses 429", refused, REFUSED)
        note = f"{load.wall_s:.1f} s over {video_s:g} s"
        yield Row(
            "pace", f"{name}: time over the video's", load.wall_s / video_s, PACED_TIME, note=note
        )

    def line(self) -> Iterator[Row]:
        """Crowds that a provider's limit holds up: all come through, with few refusals."""
        sizes = self.sizes
        self.prepare(sizes.line_speech_s, slots=sizes.line_slots)
        load, refused, _ = self.crowd_in_line("elevenlabs", sizes.line_speeches, with_speech=True)
        best_s = math.ceil(sizes.line_speeches / sizes.line_slots) * sizes.line_speech_s
        name = f"{sizes.line_speeches} speech jobs at once, {sizes.line_slots} slots"
        yield Row("line", f"{name}: not answered", load.failed, 0)
        note = f"{load.wall_s:.1f} s over {best_s:.1f} s"
        yield Row(
            "line",
            f"{name}: time over the best possible",
            load.wall_s / best_s,
            LINE_TIME,
            note=note,
        )
        yield Row("line", f"{name}: responses 429", refused, LINE_REFUSED)

        self.prepare(sizes.line_creates_s, creates_per_minute=600)
        load, refused, health_ms = self.crowd_in_line("replicate", sizes.line_creates)
        name = f"{sizes.line_creates} videos at once, 600 creates a minute"
        yield Row("line", f"{name}: not answered", load.failed, 0)
        yield Row(
            "line",
            f"{name}: time",
            load.wall_s,
            CREATES_S,
            "s",
            f"videos of {sizes.line_creates_s:g} s",
        )
        yield Row("line", f"{name}: responses 429", refused, CREATES_REFUSED)
        note = f"of {len(health_ms)}; p99 {percentile(health_ms, 99):.0f} ms"
        yield Row(
            "line",
            f"{name}: `/health` meanwhile, most",
            max(health_ms),
            CROWD_HEALTH_MS,
            "ms",
            note,
        )

        self.prepare(sizes.line_creates_s, creates_per_minute=6)
        load, refused, _ = self.crowd_in_line("replicate", sizes.line_low)
        name = f"{sizes.line_low} videos at once, 6 creates a minute"
        yield Row("line", f"{name}: not answered", load.failed, 0)
        yield Row(
            "line", f"{name}: responses 429", refused, LOW_REFUSED, note=f"{load.wall_s:.1f} s"
        )

    def crowd_in_line(
        self, provider: str, count: int, with_speech: bool = False
    ) -> tuple[Load, int, list[float]]:
        """Send jobs at once: what came of them, how many calls were refused, and how long /health took in ms."""
        with self.fresh() as service:
            client = self.client(service)
            with watched_health(service) as health_ms:
                load = asyncio.run(client.jobs(count, with_speech))
            found = re.findall(rf"the line at {provider} is gone: .*refusals=(\d+)", service.log)
        return load, sum(map(int, found)), health_ms

    def polls(self) -> Iterator[Row]:
        """Videos of one model, whose times differ: how often each is polled, and how late its end is noticed."""
        sizes, failed = self.sizes, 0
        times_s = video_times_s(sizes.watched_s, sizes.watched * (1 + sizes.watched_waves))
        self.prepare(*times_s)
        with self.fresh() as service:
            client = self.client(service)
            for _ in range(1 + sizes.watched_waves):
                failed += asyncio.run(client.jobs(sizes.watched, with_speech=False)).failed
        watched = self.providers.watched()
        first, later = watched[: sizes.watched], watched[sizes.watched :]
        name = f"Videos of some {sizes.watched_s:g} s, {sizes.watched} at once"
        yield Row("polls", f"{name}: not answered", failed, 0)
        polls, late_s = (
            statistics.mean(one.polls for one in later),
            statistics.mean(one.late_s for one in later),
        )
        note = f"mean of {len(later)}; {statistics.mean(one.polls for one in first):.0f} of the first {len(first)}"
        yield Row("polls", f"{name}: polls of each", polls, POLLS, note=note)
        note = f"mean; most {max(one.late_s for one in later):.2f} s"
        yield Row("polls", f"{name}: known after its end", late_s, LATE_S, "s", note)

    def cpu(self) -> Iterator[Row]:
        """Processor time of speech jobs, the service's own and with ffmpeg's, and of ffmpeg alone."""
        count, alone = self.sizes.crowd, self.sizes.alone
        self.prepare(self.sizes.short_s)
        with self.fresh() as service:
            client = self.client(service)
            asyncio.run(client.jobs(1))
            bare_s = [bare_mux_cpu_s(self.video, count)]
            own_s, theirs_s = cpu_of_jobs_s(client, count)
            # On both sides, since a machine's speed drifts
            bare_s.append(bare_mux_cpu_s(self.video, count))
            alone_s = cpu_of_jobs_s(client, alone, apart_s=APART_S)
        name, ffmpeg_s, job_s = (
            f"{count} speech jobs at once",
            statistics.mean(bare_s),
            own_s + theirs_s,
        )
        note = f"{job_s * 1000:.0f} ms over {ffmpeg_s * 1000:.0f} ms; of a job alone {sum(alone_s) * 1000:.0f} ms"
        yield Row(
            "cpu",
            f"{name}: CPU each over bare ffmpeg's",
            job_s / ffmpeg_s,
            CPU_OVER_FFMPEG,
            note=spoken(note),
        )
        note = f"of a job alone {alone_s[0] * 1000:.0f} ms"
        yield Row("cpu", f"{name}: CPU each without ffmpeg's", own_s * 1000, OWN_CPU_MS, "ms", note)

    def growth(self) -> Iterator[Row]:
        """Ever more jobs at once in one process, all with about the same number of polls."""
        cpu_ms, waiting_mb, sizes = list[float](), list[float](), self.sizes
        self.prepare(sizes.growth_s)
        with self.fresh(POLL_MIN_SECONDS=f"{sizes.growth_poll_s:g}") as service:
            client = self.client(service)
            asyncio.run(client.jobs(sizes.alone))
            for count in sizes.growth:
                before_s, samples = cpu_s(service.pid)[0], list[tuple[float, float]]()
                load = asyncio.run(
                    client.jobs(count, apart_s=GROWTH_APART_S, beside=client.memory(samples))
                )
                cpu_ms.append((cpu_s(service.pid)[0] - before_s) / count * 1000)
                # By then all of them wait for their video.
                at_s = (
                    count * GROWTH_APART_S
                    + sizes.speech_s
                    + sizes.transfer_s
                    + 0.4 * sizes.growth_s
                )
                waiting_mb.append(samples[int(at_s / load.wall_s * len(samples))][0])
        name = f"{sizes.growth[0]} to {sizes.growth[-1]} speech jobs at once"
        note = f"{', '.join(f'{each:.0f}' for each in cpu_ms)} ms, without ffmpeg"
        yield Row(
            "growth",
            f"{name}: CPU each over the first's",
            max(cpu_ms) / cpu_ms[0],
            CPU_GROWTH,
            note=note,
        )
        each_kb = (waiting_mb[-1] - waiting_mb[0]) * 1000 / (sizes.growth[-1] - sizes.growth[0])
        note = f"{', '.join(f'{each:.0f}' for each in waiting_mb)} MB"
        yield Row("growth", f"{name}: memory per waiting job", each_kb, WAITING_JOB_KB, "kB", note)


MEASUREMENTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "start": Bench.start,
    "alone": Bench.alone,
    "crowd": Bench.crowd,
    "memory": Bench.memory,
    "convert": Bench.convert,
    "pace": Bench.pace,
    "line": Bench.line,
    "polls": Bench.polls,
    "cpu": Bench.cpu,
    "growth": Bench.growth,
}


def cpu_of_jobs_s(client: Client, count: int, apart_s: float = 0.0) -> tuple[float, float]:
    """Processor time of each of some speech jobs: the service's own, and its children's."""
    before = cpu_s(client.service.pid)
    asyncio.run(client.jobs(count, apart_s=apart_s))
    own_s, theirs_s = (
        after - earlier for after, earlier in zip(cpu_s(client.service.pid), before, strict=True)
    )
    return own_s / count, theirs_s / count


def video_times_s(median_s: float, count: int) -> list[float]:
    """How long videos of one model take, the same in every run: near each other, and one in ten half as long again."""
    chance = random.Random(count)
    near_s = [chance.lognormvariate(math.log(median_s), 0.1) for _ in range(count)]
    return [seconds * 1.5 if number % 10 == 5 else seconds for number, seconds in enumerate(near_s)]


def spoken(note: str) -> str:
    """A remark on a figure that includes ffmpeg's time, if the speech is not a voice."""
    return note if shutil.which("espeak-ng") else f"{note}; a tone speaks, install espeak-ng"


def bare_mux_cpu_s(content: bytes, count: int) -> float:
    """Processor time of the service's own ffmpeg command, run without the service, as many at once as there are cores."""
    import main

    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        video, speech = folder / "video.mp4", folder / "speech"
        video.write_bytes(content)
        speech.write_bytes(media.speech(TEXT, "mp3_44100_64", tones=False))

        def mux(number: int) -> float:
            arguments = main.mux_arguments(
                video, speech, "mp3", "shortest", folder / f"final-{number}.mp4"
            )
            process = subprocess.Popen([main.ffmpeg_path(), *arguments], stdin=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return used.ru_utime + used.ru_stime

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return statistics.mean(pool.map(mux, range(count)))


def big_video(seconds: float) -> bytes:
    """A video of 28 Mbit a second, filled up to exactly that."""
    rate = str(BIG_VIDEO_BITS_PER_S)
    look = (
        "-f",
        "lavfi",
        "-i",
        "testsrc2=size=1920x1080:rate=24",
        "-t",
        f"{seconds:g}",
        "-pix_fmt",
        "yuv420p",
    )
    filled = (
        "-b:v",
        rate,
        "-minrate",
        rate,
        "-maxrate",
        rate,
        "-bufsize",
        rate,
        "-x264-params",
        "nal-hrd=cbr",
    )
    return media.ffmpeg(*look, "-c:v", "libx264", "-preset", "ultrafast", *filled, "-f", "mp4")


def percentile(numbers: list[float], percent: int) -> float:
    """The number that `percent` of all are not above."""
    return sorted(numbers)[max(0, -(-len(numbers) * percent // 100) - 1)]


# The command


def machine() -> str:
    """What was measured on, in a line."""
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return (
        f"{date.today().isoformat()}, {os.cpu_count()} cores, {memory_gb:.0f} GB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, load before {os.getloadavg()[0]:.1f}"
    )


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--rows", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="GROUP"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny counts: the figures mean nothing"
    )
    return parser.parse_args(given)


def run(groups: list[str], sizes: Sizes) -> Iterator[Row]:
    """Every row of these groups, each as soon as it is measured."""
    with Providers() as providers:
        bench = Bench(
            providers,
            sizes,
            media.video(PET_FILE.read_bytes(), media.VideoPlan(sizes.video_s, sizes.video_lines)),
        )
        for group in groups:
            yield from MEASUREMENTS[group](bench)


def main(given: list[str] | None = None) -> int:
    """Measure and print; the number of rows that are over their limit, none in a smoke run."""
    asked, measured_on, rows = arguments(given), machine(), list[Row]()
    if not asked.json:
        print(
            f"{measured_on}\n\n| {'':<60} | measured | at most | |\n|{'-' * 62}|---------:|--------:|-|",
            flush=True,
        )
    for row in run(asked.rows, SMOKE if asked.smoke else Sizes()):
        rows.append(row)
        if not asked.json:
            print(row.line(), flush=True)
    over = [row for row in rows if not row.is_met]
    if asked.json:
        print(
            json.dumps(
                {
                    "measured_on": measured_on,
                    "rows": [{**asdict(row), "is_met": row.is_met} for row in rows],
                }
            )
        )
    return 0 if asked.smoke else len(over)


if __name__ == "__main__":
    sys.exit(main())
