"""What the stand-ins share: how they are to behave, and the workshop where media are made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields


@dataclass
class Behaviour:
    """How the stand-ins behave; set on the sandbox at any time."""

    reads_to_finish: int = 3
    """A prediction ends at this read of it at the earliest: the first finds it starting, the next ones processing."""
    video_seconds: float = 0.0
    """...and not before it is this many seconds old."""
    speech_seconds: float | None = None
    """The exact length of every speech; None: as long as the text takes."""
    tones: bool = True
    """One tone a letter, the same everywhere; False: espeak-ng's voice where it is installed."""
    plan: str = "pro"
    """The ElevenLabs plan: free, starter, creator or pro."""
    output_shape: str = "model"
    """A prediction's output: "string", "list" or "object" of URLs; "model": as the model's schema says."""

    def behave_as(self, other: Behaviour) -> None:
        """Take over every setting of another."""
        for field in fields(Behaviour):
            setattr(self, field.name, getattr(other, field.name))


class Workshop:
    """Makes each piece of media once, a few at a time, in worker threads."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="sandbox-media")
        self.made: dict[Hashable, asyncio.Future[bytes]] = {}

    async def run(self, make: Callable[[], bytes]) -> bytes:
        """What `make` returns, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, make)

    async def once(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """What `make` returns, made at the first call with this key; a failure is not kept."""
        if key not in self.made:
            self.made[key] = asyncio.ensure_future(self.run(make))
        try:
            return await asyncio.shield(self.made[key])
        except Exception:
            self.made.pop(key, None)
            raise

    def close(self) -> None:
        """End the threads once they are done."""
        self.pool.shutdown(wait=True, cancel_futures=True)
