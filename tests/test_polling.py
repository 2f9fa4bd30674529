"""When a video is read: simulated, with videos that take as long as videos do, and no clock.

A process that has seen videos of a kind reads the next one some thirty times, and sees it 0.3 s after it is ready.
No choice of moments does that for every kind: with f(t) the durations' density and S(t) the share of videos that take
longer, reads times lateness is at least the square of the integral of sqrt(f * S), halved. That is 3 for 60 s and 4.5
for 90 s with a spread of 5 %, twice that with 10 %, 20 where anything from 30 to 120 s is as likely; 30 times 0.3 is 9.
"""

import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from statistics import mean
from typing import Any, NamedTuple

import httpx
import pytest
import respx

import main
from tests.support.application import REPLICATE_URL, use_settings

pytestmark = pytest.mark.anyio

VIDEOS = 300
Durations = Callable[[random.Random, int], float]  # of video number so and so, in seconds


class Polled(NamedTuple):
    """What it took to see one video."""

    reads: int
    late_s: float


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest wait as it is by default."""
    use_settings(monkeypatch, POLL_MIN_SECONDS="0.25")


def wait_for(
    video_s: float, known: "deque[float] | tuple[float, ...]", chance: random.Random, polls: int = 1
) -> Polled:
    """One video that is ready after `video_s`, read as the service would."""
    waited_s, reads = 0.0, 0
    while waited_s < video_s:
        waited_s += main.poll_delay_s(waited_s, polls, known) * chance.uniform(0.9, 1.1)
        reads += 1
    return Polled(reads, waited_s - video_s)


def simulate(
    durations: Durations, kept: int = main.RECENT_DURATIONS, videos: int = VIDEOS, seed: int = 1
) -> list[Polled]:
    """One video after the other, each known afterwards as long as it was waited for."""
    chance, known, polled = random.Random(seed), deque[float](maxlen=kept), list[Polled]()
    for number in range(videos):
        video_s = durations(chance, number)
        polled.append(wait_for(video_s, known, chance))
        known.append(video_s + polled[-1].late_s)
    return polled


def around(middle_s: float, spread: float) -> Durations:
    """Lognormal: about `spread` of `middle_s` to both sides."""
    return lambda chance, number: middle_s * math.exp(chance.gauss(0, spread))


def between(shortest_s: float, longest_s: float) -> Durations:
    """Any duration as likely as any other."""
    return lambda chance, number: chance.uniform(shortest_s, longest_s)


def either(*choices: Durations) -> Durations:
    """One or the other, as often."""
    return lambda chance, number: chance.choice(choices)(chance, number)


def with_tail(durations: Durations, share: float, shortest: float, longest: float) -> Durations:
    """This share of the videos takes so many times as long."""
    return lambda chance, number: (
        durations(chance, number) * (chance.uniform(shortest, longest) if chance.random() < share else 1)
    )


def drifting(first: Durations, factor: float) -> Durations:
    """Little by little, until the last video takes `factor` times as long."""
    return lambda chance, number: first(chance, number) * factor ** (number / VIDEOS)


def changing(first: Durations, then: Durations) -> Durations:
    """From one video to the next, in the middle."""
    return lambda chance, number: (first if number < VIDEOS / 2 else then)(chance, number)


def averages(polled: list[Polled]) -> Polled:
    """Reads a video, and mean lateness, once ten videos are known."""
    return Polled(mean(video.reads for video in polled[10:]), mean(video.late_s for video in polled[10:]))


@pytest.mark.parametrize(
    ("durations", "reads", "late_s"),
    [
        pytest.param(around(30, 0.1), 30, 0.3, id="30 s, 10 % to both sides"),
        pytest.param(around(60, 0.05), 30, 0.3, id="60 s, 5 %"),
        pytest.param(around(60, 0.08), 30, 0.3, id="60 s, 8 %"),
        pytest.param(between(50, 70), 30, 0.3, id="50 to 70 s"),
        pytest.param(around(90, 0.03), 30, 0.3, id="90 s, 3 %"),
        pytest.param(around(90, 0.04), 30, 0.3, id="90 s, 4 %"),
        pytest.param(changing(around(90, 0.05), around(45, 0.05)), 30, 0.3, id="90 s, then 45 s"),
        pytest.param(changing(around(45, 0.05), around(90, 0.05)), 30, 0.3, id="45 s, then 90 s"),
        # videos that take differently long cost more of both
        pytest.param(around(60, 0.1), 31, 0.35, id="60 s, 10 %"),
        pytest.param(with_tail(around(60, 0.1), 0.05, 1, 3), 35, 0.4, id="60 s, 10 %, a tail"),
        pytest.param(around(60, 0.2), 40, 0.5, id="60 s, 20 %"),
        pytest.param(around(90, 0.05), 32, 0.3, id="90 s, 5 %"),
        pytest.param(with_tail(around(90, 0.07), 0.02, 3, 3), 40, 0.4, id="90 s, 7 %, some three times as long"),
        pytest.param(with_tail(around(90, 0.1), 0.05, 1, 3), 43, 0.5, id="90 s, 10 %, a tail"),
        pytest.param(around(120, 0.1), 43, 0.5, id="120 s, 10 %"),
        pytest.param(either(around(45, 0.05), around(90, 0.05)), 38, 0.36, id="45 s or 90 s"),
        pytest.param(drifting(around(60, 0.07), 2), 40, 0.32, id="slower and slower"),
        pytest.param(drifting(around(120, 0.07), 0.5), 30, 0.42, id="faster and faster"),
        pytest.param(between(30, 120), 50, 0.75, id="30 to 120 s"),
    ],
)
def test_few_reads_see_a_video_soon(durations, reads, late_s):
    """On average thirty within 0.3 s where most of a kind take about as long; well under those of a new process."""
    reached, unknowing = averages(simulate(durations)), averages(simulate(durations, kept=0))
    assert reached.reads <= min(reads, 0.45 * unknowing.reads)
    assert reached.late_s <= min(late_s, 0.9 * unknowing.late_s)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_one_known_video_is_enough(kept):
    """With one to three durations known the reads are as few, and half a second late."""
    reads, late_s = averages(simulate(around(60, 0.1), kept=kept))
    assert reads <= 30
    assert late_s <= 0.7


NINETY = tuple(90 * math.exp(0.07 * step / 7) for step in range(-15, 15))  # 77 to 104 s


@pytest.mark.parametrize("video_s", [0.1, 1, 2, 5, 10, 20, 30, 45, 60, 75])
def test_a_video_faster_than_any_before_is_seen_within_a_tenth_of_theirs(video_s):
    """So is a failure, and one in the first seconds sooner."""
    chance = random.Random(1)
    late_s = max(wait_for(video_s, NINETY, chance).late_s for _ in range(100))
    assert late_s <= 1.1 * min(2 + video_s, 0.1 * min(NINETY))


def test_one_faster_video_is_learned_from():
    """The second video of half the length is seen in half the time of the first."""
    chance = random.Random(1)
    videos = [around(45, 0.05)(chance, number) for number in range(200)]
    first, second = (
        mean(wait_for(video_s, known, chance).late_s for video_s in videos) for known in (NINETY, (*NINETY[1:], 46))
    )
    assert second <= first / 2


@pytest.mark.parametrize("video_s", [120, 180, 270, 900])
def test_a_video_slower_than_any_before_is_read_ever_more_seldom(video_s):
    """No more reads than by a process that knows nothing; after 15 minutes it is seen within six seconds."""
    chance = random.Random(1)
    polled = [wait_for(video_s, NINETY, chance) for _ in range(20)]
    assert mean(video.reads for video in polled) <= 1.05 * mean(wait_for(video_s, (), chance).reads for _ in range(20))
    assert max(video.late_s for video in polled) <= 1.1 * math.sqrt(video_s - min(NINETY)) / 5


@pytest.mark.parametrize("polls", [1, 80, 300, 1000])
def test_jobs_that_know_their_model_stay_under_the_rate_too(polls):
    """However many videos are due in the same second, one process reads at most 2,400 times a minute."""
    delays = [main.poll_delay_s(float(waited_s), polls, NINETY) for waited_s in range(300)]
    assert polls * 60 / min(delays) <= 2400 * 1.0001
    assert min(delays) >= 0.25


def test_the_rate_is_kept_without_reads_beyond_it():
    """With 300 jobs a video is read every 7.5 s, and no more seldom where it is due."""
    assert main.poll_delay_s(90, 300, NINETY) == 7.5


# The service, with videos that are ready after a time


VIDEO_S = 0.4
BODY = {"image_url": "https://example.com/pet.jpg", "prompt": "The cat talks"}


class Replicate:
    """Replicate at the edge of the process: every prediction is ready `video_s` after it was made."""

    def __init__(self, router: respx.MockRouter) -> None:
        self.video_s, self.outcome, self.reads, self.made, self.first_read_s = VIDEO_S, "succeeded", 0, 0.0, 0.0
        router.post(f"{REPLICATE_URL}/v1/models/minimax/hailuo-02/predictions").mock(side_effect=self.create)
        router.get(f"{REPLICATE_URL}/v1/predictions/p1").mock(side_effect=self.read)

    def create(self, request: httpx.Request) -> httpx.Response:
        """A new prediction."""
        self.made, self.reads = time.monotonic(), 0
        return httpx.Response(201, json=self.prediction("starting"))

    def read(self, request: httpx.Request) -> httpx.Response:
        """How it is now."""
        self.reads, age_s = self.reads + 1, time.monotonic() - self.made
        self.first_read_s = age_s if self.reads == 1 else self.first_read_s
        return httpx.Response(200, json=self.prediction(self.outcome if age_s >= self.video_s else "processing"))

    def prediction(self, status: str) -> dict[str, Any]:
        """The prediction in this status."""
        video = "https://replicate.delivery/xezq/video.mp4" if status == "succeeded" else None
        return {"id": "p1", "status": status, "output": video, "error": None}


@pytest.fixture
async def replicate(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replicate]:
    """Replicate, with reads that may follow each other at once, and the application, which knows of no video yet."""
    use_settings(monkeypatch, POLL_MIN_SECONDS="0.001")
    async with main.lifespan(main.app):
        with respx.mock(assert_all_called=False) as router:
            yield Replicate(router)


async def video(**changes: Any) -> str:
    """The video of a job."""
    return await main.hailuo_video_from_prompt(main.JobPromptOnly(**{**BODY, **changes}))


async def test_the_second_video_of_a_kind_is_left_alone_at_first(replicate):
    """The first tells how long they take; one of another length is another kind."""
    await video()
    await video()
    assert replicate.first_read_s >= 0.9 * 0.1 * VIDEO_S
    await video(seconds=10)
    assert [len(durations) for durations in main.app_state().recent_durations.values()] == [2, 1]
    assert all(0.9 * VIDEO_S <= took_s < 10 for durations in main.app_state().recent_durations.values() for took_s in durations)


@pytest.mark.parametrize("outcome", ["failed", "canceled"])
async def test_what_makes_no_video_tells_nothing_of_how_long_videos_take(replicate, outcome):
    """After a refusal of the picture, the next video is read like the first."""
    replicate.outcome, replicate.video_s = outcome, 0.05
    with pytest.raises(main.ProviderRefused):
        await video()
    assert not main.app_state().recent_durations


async def test_a_prediction_that_another_request_made_is_read_at_once(replicate):
    """Nobody knows how long it has been waited for, so it is read like a first video and tells the next one nothing."""
    replicate.made = time.monotonic()
    job = main.Job("-")
    job.partial.prediction_id = "p1"
    assert await main.hailuo_video_from_prompt(main.JobPromptOnly(**BODY), job)
    assert replicate.first_read_s < 0.1 * VIDEO_S
    assert not main.app_state().recent_durations
