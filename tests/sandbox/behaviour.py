"""What the stand-ins share: their settings, and the threads in which media are made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields


@dataclass
class Behaviour:
    """How the stand-ins behave; a test may change any of it on the sandbox at any time."""

    polls_to_finish: int = 3
    """A prediction ends no earlier than this poll: "starting" at the first, then "processing"."""
    video_seconds: float = 0.0
    """A prediction ends no earlier than this many seconds after its creation."""
    speech_seconds: float | None = None
    """The exact length of every speech; None: as long as the text takes."""
    tones: bool = True
    """True: one tone per letter, the same everywhere; False: espeak-ng's voice if installed."""
    speech_delay_s: float = 0.0
    """Seconds that a speech takes to make."""
    speech_slots: int | None = None
    """So many speeches are made at once, as the plan has it, and more are refused; None: any."""
    plan: str = "pro"
    """The ElevenLabs plan: free, starter, creator or pro."""
    output_shape: str = "model"
    """A prediction's output: URLs as "string", "list" or "object"; "model": as its schema says."""

    def behave_as(self, other: Behaviour) -> None:
        """Copy every setting of another."""
        for field in fields(Behaviour):
            setattr(self, field.name, getattr(other, field.name))


class Workshop:
    """Makes each piece of media once, a few at a time, in worker threads."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="sandbox-media")
        self.made: dict[Hashable, asyncio.Future[bytes]] = {}

    async def run(self, make: Callable[[], bytes]) -> bytes:
        """Call `make` in a thread, so that the event loop stays free, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, make)

    async def once(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """Return the media for `key`, made by the first call; a failure is not kept."""
        if key not in self.made:
            self.made[key] = asyncio.ensure_future(self.run(make))

        try:
            return await asyncio.shield(self.made[key])
        except Exception:
            self.made.pop(key, None)
            raise

    def close(self) -> None:
        """Wait for the work in progress and end the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)
