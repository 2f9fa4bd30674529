"""Kills the service at random moments, sends the same requests again, and counts what was paid for and delivered.

python -m tests.chaos --kills 200                 one process of the service
python -m tests.chaos --kills 200 --services 2    two on one bucket, asked in turn, or both at once half of the time

Each job has a key, a prompt and a text of its own. While one runs, a process is killed (SIGKILL), ended without time
(SIGTERM) or stopped for longer than its claim lives (SIGSTOP, then SIGCONT), or the connection is cut, and the same request
is sent again until there is a video. All answers for a key must be equal, also a last one after the video. The providers are the
sandbox; its creates answer late, so that many kills fall between a prediction and the record of its id, and some of their
responses are lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.sandbox import Sandbox, Service
from tests.support.requests import service_client, short_video, speech_job

# Waits shorter than in life, in the same proportions: a video of 0.6 s, and patience for half a minute's worth of trouble.
PATIENCE_S = 4
PACE = {
    "POLL_MIN_SECONDS": "0.02",
    "RETRY_FIRST_SECONDS": "0.02",
    "PATIENCE_SECONDS": f"{PATIENCE_S}",
}
CLAIM_S = PATIENCE_S / 4  # how long a claim lives without a sign of its owner
VIDEO_SECONDS, CREATE_SECONDS = 0.6, 0.25
JOB_SECONDS = 1.6  # what an undisturbed job takes here; a kill comes at any moment of it
DISTURBANCES = ("SIGKILL", "SIGTERM", "SIGSTOP", "cut")
GIVE_UP_S = 60.0  # a job that has no video after that is lost


@dataclass
class Chaos:
    """The sandbox, the processes of the service, and what has happened to them."""

    sandbox: Sandbox
    services: list[Service]
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    delivered: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)  # whose answers were not all the same

    def start(self, number: int) -> None:
        """Start a process anew in place of one that has ended."""
        environment = {**self.sandbox.environment(), **PACE}
        self.services[number] = Service(environment, graceful_s=0).start()

    async def disturb(self, number: int, request: asyncio.Task[Any]) -> None:
        """After a random while, end a process or cut the connection; nothing is done if there is an answer already."""
        await asyncio.wait({request}, timeout=self.random.uniform(0, JOB_SECONDS))
        if request.done():
            return
        kind = self.random.choice(DISTURBANCES)
        self.kills[kind] += 1
        if kind == "cut":
            request.cancel()
        elif kind == "SIGSTOP":
            await self.stop_for_a_while(self.services[number].pid)
        else:
            await asyncio.to_thread(self.services[number].close, getattr(signal, kind))
            await asyncio.to_thread(self.start, number)

    async def stop_for_a_while(self, pid: int) -> None:
        """Stop a process for longer than its claim lives, and let it go on."""
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(CLAIM_S * self.random.uniform(1.2, 2.5))
        finally:
            os.kill(pid, signal.SIGCONT)

    def next_services(self) -> list[int]:
        """The services to which a request is sent: each in turn, or all at once half of the time."""
        numbers = list(range(len(self.services)))
        if len(numbers) > 1 and self.random.random() < 0.5:
            self.random.shuffle(numbers)
            return numbers
        return [self.requests % len(numbers)]

    def body(self, name: str) -> dict[str, Any]:
        """The body of a job's requests."""
        return speech_job(self.sandbox, prompt=f"The cat tells of {name}", text=f"I am {name}")

    async def send(self, numbers: list[int], name: str, kills: int) -> list[httpx.Response]:
        """Send the job's request to these services, disturb the first, and return what was answered."""
        self.requests += len(numbers)
        body = self.body(name)
        requests = [
            asyncio.create_task(send(self.services[number].url, body, name)) for number in numbers
        ]
        if self.kills.total() < kills:
            await self.disturb(numbers[0], requests[0])
        answers = await asyncio.gather(*requests, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, httpx.Response)]

    async def job(self, name: str, kills: int) -> None:
        """One job from its first request to its video; it is disturbed until so many kills have been made."""
        deadline = time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline:
            answers = await self.send(self.next_services(), name, kills)
            for answer in answers:
                if answer.status_code != 200 and not answer.json()["retryable"]:
                    print(f"{name}: {answer.text}", file=sys.stderr)
                    self.lost.append(name)
                    return
            texts = [answer.text for answer in answers if answer.status_code == 200]
            if texts:
                await self.check_answers(name, texts)
                await self.deliver(name, json.loads(texts[0])["final_url"])
                return
            await asyncio.sleep(0.05)
        self.lost.append(name)

    async def check_answers(self, name: str, texts: list[str]) -> None:
        """Ask any service once more, and note a job whose answers are not all equal."""
        service = self.random.choice(self.services)
        again = await send(service.url, self.body(name), name)
        if set(texts) != {again.text}:
            self.unequal.append(name)

    async def deliver(self, name: str, url: str) -> None:
        """Fetch the video as the front end would."""
        async with service_client(self.sandbox.url) as client:
            video = await client.get(url)
        (
            self.delivered if video.status_code == 200 and len(video.content) > 1_000 else self.lost
        ).append(name)

    def videos(self) -> Counter[str]:
        """How many predictions were made for each job."""
        return Counter(
            prediction.input["prompt"] for prediction in self.sandbox.predictions.values()
        )


async def send(url: str, body: dict[str, Any], key: str) -> httpx.Response:
    """The answer to one request. Raises httpx.HTTPError if the connection breaks."""
    headers = {"Idempotency-Key": key}
    async with service_client(url) as client:
        return await client.post("/jobs_prompt_tts", json=body, headers=headers)


async def run(chaos: Chaos, kills: int) -> None:
    """Jobs one after the other until so many kills have been made."""
    number = 0
    while chaos.kills.total() < kills:
        number += 1
        if chaos.random.random() < 0.2:  # created, but its response is lost
            chaos.sandbox.fault("create", "lost")
        chaos.sandbox.fault("create", "slow", seconds=CREATE_SECONDS)
        await chaos.job(f"job {number}".replace(" ", "-"), kills)


def report(chaos: Chaos, seconds: float) -> bool:
    """Print the counts; True if every job was delivered and no video was paid for twice."""
    videos = chaos.videos()
    jobs = len(chaos.delivered) + len(chaos.lost)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.kills.items()))
    print(f"jobs               {jobs}")
    print(f"kills              {chaos.kills.total()}  ({kinds})")
    print(f"requests           {chaos.requests}")
    print(f"videos paid for    {videos.total()}")
    print(f"videos delivered   {len(chaos.delivered)}")
    print(f"speeches paid for  {len(chaos.sandbox.calls('speech'))}")
    print(f"seconds            {seconds:.0f}")
    twice = [prompt for prompt, count in videos.items() if count > 1]
    for name in (*chaos.lost, *twice, *chaos.unequal):
        print(f"not as it should be: {name}", file=sys.stderr)
    return not (chaos.lost or twice or chaos.unequal) and videos.total() == jobs


def main() -> int:
    """Run the command; the exit code is 0 if every job was delivered with one video paid for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--kills", type=int, default=200, help="how often something is killed (default: 200)"
    )
    parser.add_argument(
        "--services", type=int, default=1, help="processes of the service (default: 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="of the random moments (default: another each time)"
    )
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10_000)
    print(f"seed               {seed}", flush=True)
    with Sandbox(video_seconds=VIDEO_SECONDS, speech_seconds=1.0) as sandbox:
        sandbox.video(short_video())
        chaos = Chaos(sandbox, [None] * options.services, random.Random(seed))  # type: ignore[list-item]  # started below
        try:
            for number in range(options.services):
                chaos.start(number)
            started = time.monotonic()
            asyncio.run(run(chaos, options.kills))
            return 0 if report(chaos, time.monotonic() - started) else 1
        finally:
            for service in filter(None, chaos.services):
                service.close(signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except httpx.HTTPError as exc:
        sys.exit(f"{type(exc).__name__}: {exc}")
