"""The lines at the providers on a virtual clock: crowds of minutes in a second, against limits of several kinds.

    python -m tests.line_simulation            one line of JSON for each crowd

The lines are the service's own (main.ProviderLine), the providers a few lines each. A process of its own, since the
clock of the whole process is replaced.
"""

import asyncio
import json
import random
import selectors
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

clock_s = 1_000.0
time.monotonic = lambda: clock_s  # before main is loaded: it keeps the function in a default

import anyio  # noqa: E402
import httpx  # noqa: E402

import main  # noqa: E402


class VirtualSelector(selectors.SelectSelector):
    """Waits by setting the clock forward."""

    def select(self, timeout: float | None = None) -> list[Any]:
        """Return what is ready after `timeout` seconds of the virtual clock."""
        global clock_s
        clock_s += max(0.0, timeout or 0.0)
        return super().select(0)


class Slots:
    """ElevenLabs: so many speeches at once, and no word on when to ask again."""

    def __init__(self, slots: int, speech_s: float) -> None:
        self.free = slots
        self.speech_s = speech_s
        self.refused = 0

    async def exchange(self, request: httpx.Request, max_bytes: int) -> main.ProviderResponse:
        """Speak, or refuse what is one too many."""
        await asyncio.sleep(random.uniform(0.02, 0.06))
        if self.free == 0:
            self.refused += 1
            return main.ProviderResponse(429, httpx.Headers(), b"{}")
        self.free -= 1
        await asyncio.sleep(self.speech_s * random.uniform(0.9, 1.1))
        self.free += 1
        return main.ProviderResponse(200, httpx.Headers(), b"{}")


class Window:
    """Replicate: so many creates in any minute, and the seconds until there is room."""

    def __init__(self, per_minute: int, latency_s: float = 0.1) -> None:
        self.per_minute = per_minute
        self.latency_s = latency_s
        self.passed: deque[float] = deque()
        self.refused = 0

    def wait_s(self) -> int:
        """Let a create pass and return 0, or return the seconds to wait."""
        while self.passed and self.passed[0] <= clock_s - 60:
            self.passed.popleft()
        if len(self.passed) >= self.per_minute:
            return int(self.passed[0] + 60 - clock_s) + 1
        self.passed.append(clock_s)
        return 0

    async def exchange(self, request: httpx.Request, max_bytes: int) -> main.ProviderResponse:
        """Create, or refuse."""
        await asyncio.sleep(self.latency_s * random.uniform(0.5, 1.5))
        wait_s = self.wait_s()
        if wait_s == 0:
            return main.ProviderResponse(201, httpx.Headers(), b"{}")
        self.refused += 1
        detail = f"Request was throttled. Your rate limit resets in ~{wait_s}s."
        return main.ProviderResponse(429, httpx.Headers(), json.dumps({"detail": detail}).encode())


class Bucket(Window):
    """Replicate with little credit: a token every so often, and no more than one saved."""

    def __init__(self, per_minute: int) -> None:
        super().__init__(per_minute)
        self.next_at = clock_s

    def wait_s(self) -> int:
        """Let a create pass and return 0, or return the seconds to wait."""
        if clock_s < self.next_at:
            return int(self.next_at - clock_s) + 1
        self.next_at = clock_s + 60 / self.per_minute
        return 0


class Crowd(NamedTuple):
    """Jobs that come `apart_s` after each other, and the provider that they meet."""

    jobs: int
    apart_s: float
    provider: Callable[[], Any]
    at_most: float = float("inf")


CROWDS = {
    "300 speeches at once through ten slots": Crowd(300, 0, lambda: Slots(10, 2.0)),
    "50 speeches at once through three slots": Crowd(50, 0, lambda: Slots(3, 2.0)),
    "1,000 creates at once, 600 a minute": Crowd(1_000, 0, lambda: Window(600), main.MAX_CREATES),
    "1,000 creates in 10 s, 600 a minute": Crowd(
        1_000, 0.01, lambda: Window(600), main.MAX_CREATES
    ),
    "8 creates at once, 6 a minute": Crowd(8, 0, lambda: Window(6)),
    "8 creates at once, one in 10 s": Crowd(8, 0, lambda: Bucket(6)),
    "100 creates at once, one in 10 s": Crowd(100, 0, lambda: Bucket(6)),
}


async def run_job(
    line: main.ProviderLine, exchange: main.Exchange, outcomes: list[tuple[str, float]]
) -> None:
    """Make one call as send_with_retry does, up to the job's deadline; note how it ended, and when."""
    place = main.LinePlace(line, main.Job("-"))
    request = httpx.Request("POST", "http://provider")
    outcome = "past the deadline"
    try:
        with anyio.move_on_after(place.job.deadline - clock_s):
            response = await main.exchange_in_line(place, exchange, request, 0)
            while main.is_throttled(response):
                response = await main.exchange_in_line(place, exchange, request, 0)
            outcome = "done"
    except main.ProviderBusy:
        outcome = "busy"
    outcomes.append((outcome, clock_s))


async def run_crowd(crowd: Crowd) -> dict[str, Any]:
    """Send a crowd, and return what came of it."""
    provider = crowd.provider()
    line = main.ProviderLine("replicate", crowd.at_most)
    started_at = clock_s
    outcomes: list[tuple[str, float]] = []
    tasks = []
    for _ in range(crowd.jobs):
        tasks.append(asyncio.create_task(run_job(line, provider.exchange, outcomes)))
        await asyncio.sleep(crowd.apart_s)
    await asyncio.gather(*tasks)
    ends = [ended_at - started_at for _, ended_at in outcomes]
    busy = [ended_at - started_at for outcome, ended_at in outcomes if outcome == "busy"]
    return {
        "outcomes": Counter(outcome for outcome, _ in outcomes),
        "seconds": round(max(ends), 1),
        "median_busy_s": round(statistics.median(busy or [0]), 1),
        "refused": provider.refused,
        "is_gone": line.pace is None and not line.waiting and not line.under_way,
    }


def run() -> None:
    """Simulate every crowd."""
    random.seed(1)
    main.logger.setLevel("ERROR")
    for name, crowd in CROWDS.items():
        loop = asyncio.SelectorEventLoop(VirtualSelector())
        asyncio.set_event_loop(loop)
        result = loop.run_until_complete(run_crowd(crowd))
        loop.close()
        print(json.dumps({"crowd": name, **result}), flush=True)


if __name__ == "__main__":
    run()
