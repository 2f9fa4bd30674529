"""Polling: simulated with videos that take as long as real ones, and in the service with short ones."""

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

    polls: int
    late_s: float


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest wait as it is by default."""
    use_settings(monkeypatch, POLL_MIN_SECONDS="0.25")


def wait_for(
    video_s: float,
    known: "deque[float] | tuple[float, ...]",
    chance: random.Random,
    active_polls: int = 1,
) -> Polled:
    """One video that is ready after `video_s`, polled as the service would."""
    waited_s, polls = 0.0, 0
    while waited_s < video_s:
        waited_s += main.poll_delay_s(waited_s, active_polls, known) * chance.uniform(0.9, 1.1)
        polls += 1
    return Polled(polls, waited_s - video_s)


def simulate(
    durations: Durations, kept: int = main.RECENT_DURATIONS, videos: int = VIDEOS, seed: int = 1
) -> list[Polled]:
    """Many videos one after the other; the duration of each is known afterwards."""
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


def changing(first: Durations, then: Durations) -> Durations:
    """From one video to the next, in the middle."""
    return lambda chance, number: (first if number < VIDEOS / 2 else then)(chance, number)


def averages(polled: list[Polled]) -> Polled:
    """Mean polls and mean lateness of a video, once ten durations are known."""
    return Polled(
        mean(video.polls for video in polled[10:]), mean(video.late_s for video in polled[10:])
    )


def test_known_durations_take_few_polls_and_little_time():
    """Over videos of 30 to 120 s with a spread of 10 %: at most 55 polls, and 0.35 s late, on average."""
    reached = [averages(simulate(around(middle_s, 0.1))) for middle_s in (30, 45, 60, 90, 120)]
    assert mean(one.polls for one in reached) <= 55
    assert mean(one.late_s for one in reached) <= 0.35


@pytest.mark.parametrize(
    ("durations", "polls", "late_s"),
    [
        pytest.param(around(30, 0.1), 50, 0.2, id="30 s, 10 % to both sides"),
        pytest.param(around(60, 0.05), 40, 0.4, id="60 s, 5 %"),
        pytest.param(around(120, 0.1), 75, 0.65, id="120 s, 10 %"),
        pytest.param(between(30, 120), 95, 0.7, id="30 to 120 s"),
        pytest.param(changing(around(90, 0.05), around(45, 0.05)), 60, 0.5, id="90 s, then 45 s"),
        pytest.param(changing(around(45, 0.05), around(90, 0.05)), 75, 0.6, id="45 s, then 90 s"),
    ],
)
def test_known_durations_save_polls_and_lateness(durations, polls, late_s):
    """Whatever the spread: fewer polls than without known durations, and sooner."""
    reached = averages(simulate(durations))
    unknowing = averages(simulate(durations, kept=0))
    assert reached.polls <= min(polls, 0.8 * unknowing.polls)
    assert reached.late_s <= min(late_s, 0.9 * unknowing.late_s)


def test_small_steps_begin_when_a_video_is_due():
    """At 0.8 of the shortest known duration, not a step later."""
    assert main.poll_delay_s(32.0, 1, [40.0]) == pytest.approx(0.012 * 40)
    assert main.poll_delay_s(31.0, 1, [40.0]) == pytest.approx(1.0)


def test_one_known_duration_is_enough():
    """With a single known duration the polls are as few, and less than a second late."""
    polls, late_s = averages(simulate(around(60, 0.1), kept=1))
    assert polls <= 45
    assert late_s <= 0.9


NINETY = tuple(90 * math.exp(0.07 * step / 7) for step in range(-15, 15))  # 77 to 104 s


@pytest.mark.parametrize("video_s", [1, 5, 10, 20, 30, 45, 60])
def test_a_video_faster_than_any_before_is_seen_within_a_tenth_of_theirs(video_s):
    """A failure is seen as soon."""
    chance = random.Random(1)
    late_s = max(wait_for(video_s, NINETY, chance).late_s for _ in range(100))
    assert late_s <= 1.1 * 0.1 * min(NINETY)


def test_one_faster_video_is_learned_from():
    """The second video of half the length is seen in half the time of the first."""
    chance = random.Random(1)
    videos = [around(45, 0.05)(chance, number) for number in range(200)]
    first, second = (
        mean(wait_for(video_s, known, chance).late_s for video_s in videos)
        for known in (NINETY, (*NINETY[1:], 46))
    )
    assert second <= first / 2


@pytest.mark.parametrize("video_s", [120, 180, 270, 900])
def test_a_video_slower_than_any_before_is_polled_less_and_less(video_s):
    """There are no more polls than without known durations, and the lateness is at most two seconds."""
    chance = random.Random(1)
    polled = [wait_for(video_s, NINETY, chance) for _ in range(20)]
    unknowing = [wait_for(video_s, (), chance) for _ in range(20)]
    assert mean(video.polls for video in polled) <= mean(video.polls for video in unknowing)
    assert max(video.late_s for video in polled) <= 1.1 * main.POLL_MAX_S


@pytest.mark.parametrize("polls", [1, 80, 300, 1000])
def test_known_durations_keep_the_poll_rate(polls):
    """However many videos are due at once, one process makes at most 2,400 polls a minute."""
    delays = [main.poll_delay_s(float(waited_s), polls, NINETY) for waited_s in range(300)]
    assert polls * 60 / min(delays) <= 2400 * 1.0001
    assert min(delays) >= 0.25


def test_the_poll_rate_is_used_to_the_full():
    """With 300 jobs a video that is due is polled every 7.5 s, and not less often."""
    assert main.poll_delay_s(90, 300, NINETY) == 7.5


# The service


VIDEO_S = 0.4
BODY = {"image_url": "https://example.com/pet.jpg", "prompt": "The cat talks"}


class Replicate:
    """Replicate at the edge of the process: every prediction is ready `video_s` after it was made."""

    def __init__(self, router: respx.MockRouter) -> None:
        self.video_s, self.outcome, self.polls, self.made, self.first_poll_s = (
            VIDEO_S,
            "succeeded",
            0,
            0.0,
            0.0,
        )
        router.post(f"{REPLICATE_URL}/v1/models/minimax/hailuo-02/predictions").mock(
            side_effect=self.create
        )
        router.get(f"{REPLICATE_URL}/v1/predictions/p1").mock(side_effect=self.poll)

    def create(self, request: httpx.Request) -> httpx.Response:
        """A new prediction."""
        self.made, self.polls = time.monotonic(), 0
        return httpx.Response(201, json=self.prediction("starting"))

    def poll(self, request: httpx.Request) -> httpx.Response:
        """How it is now."""
        self.polls, age_s = self.polls + 1, time.monotonic() - self.made
        self.first_poll_s = age_s if self.polls == 1 else self.first_poll_s
        return httpx.Response(
            200, json=self.prediction(self.outcome if age_s >= self.video_s else "processing")
        )

    def prediction(self, status: str) -> dict[str, Any]:
        """The prediction in this status."""
        video = "https://replicate.delivery/xezq/video.mp4" if status == "succeeded" else None
        return {"id": "p1", "status": status, "output": video, "error": None}


@pytest.fixture
async def replicate(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replicate]:
    """Replicate, with polls that may follow each other at once, and the application, which knows of no video yet."""
    use_settings(monkeypatch, POLL_MIN_SECONDS="0.001")
    async with main.lifespan(main.app):
        with respx.mock(assert_all_called=False) as router:
            yield Replicate(router)


async def video(**changes: Any) -> str:
    """The video of a job."""
    return await main.hailuo_video_from_prompt(main.JobPromptOnly(**{**BODY, **changes}))


async def test_the_second_video_of_a_kind_is_polled_later(replicate):
    """The first one's duration is known then; a video of another length is another kind."""
    replicate.video_s = 1.0  # a tenth of it is long enough for a busy machine
    await video()
    await video()
    assert replicate.first_poll_s >= 0.9 * 0.1 * replicate.video_s
    await video(seconds=10)
    assert [len(durations) for durations in main.app_state().recent_durations.values()] == [2, 1]
    assert all(
        0.9 * replicate.video_s <= took_s < 10
        for durations in main.app_state().recent_durations.values()
        for took_s in durations
    )


@pytest.mark.parametrize("outcome", ["failed", "canceled"])
async def test_failed_predictions_have_no_duration(replicate, outcome):
    """After a failure the next video is polled like the first."""
    replicate.outcome, replicate.video_s = outcome, 0.05
    with pytest.raises(main.ProviderRefused):
        await video()
    assert not main.app_state().recent_durations


async def test_a_resumed_prediction_is_polled_at_once(replicate):
    """Its age is unknown, so it is polled like a first video, and its duration is not kept."""
    replicate.video_s = 2.0  # a tenth of it is long enough for a busy machine
    replicate.made = time.monotonic()
    job = main.Job("-")
    job.partial.prediction_id = "p1"
    assert await main.hailuo_video_from_prompt(main.JobPromptOnly(**BODY), job)
    assert replicate.first_poll_s < 0.1 * replicate.video_s
    assert not main.app_state().recent_durations
