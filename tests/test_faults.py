"""Every call of a speech job goes wrong in every way, over real sockets: what the service makes of it, and what it leaves.

All cases run at once, each on a sandbox and a service that are its own for that time; then each test judges one of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import httpx
import pytest

from tests.jobs import caller, children, left_in, needs_proc, short_film, sockets, speech_job
from tests.sandbox import Sandbox, Service

# Services by their deadline in seconds: enough to come to the film, enough to come to the end, plenty.
LANES = {1: 4, 2: 2, 60: 2}
BOUGHT = frozenset({"audio_url", "video_url", "prediction_id"})


class Place(NamedTuple):
    """Where in a job something goes wrong: the sandbox's name for the call, and what an error there says."""

    call: str
    attempts: int | None
    category: str
    provider: str | None
    partial: frozenset[str]


PLACES = {
    "speech": Place("speech", 3, "provider", "elevenlabs", frozenset()),
    "audio upload": Place("upload", 4, "resource", "supabase", frozenset()),
    "create": Place("create", 4, "provider", "replicate", frozenset({"audio_url"})),
    "read": Place("read", None, "provider", "replicate", frozenset({"audio_url", "prediction_id"})),
    "film": Place("output", 4, "resource", None, BOUGHT),
    "speech file": Place("public", 4, "resource", None, BOUGHT),
    "final upload": Place("upload", 4, "resource", "supabase", BOUGHT),
}

FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "429": ("status", {"status": 429, "body": {"detail": "Slow down.", "message": "Slow down."}}),
    "429, wait 0 s": ("status", {"status": 429, "headers": {"retry-after": "0"}}),
    "429, wait a day": ("status", {"status": 429, "headers": {"retry-after": "86400"}}),
    "500": ("status", {"status": 500}),
    "502 HTML": ("html", {"status": 502}),
    "503": ("status", {"status": 503}),
    "404": ("status", {"status": 404}),
    "408": ("status", {"status": 408}),
    "400 for 503": ("status", {"status": 400, "body": {"statusCode": "503", "message": "Busy"}}),
    "400 for 429": ("status", {"status": 400, "body": {"statusCode": "429", "message": "Slow down"}}),
    "400 for 403": ("status", {"status": 400, "body": {"statusCode": "403", "message": "Not yours"}}),
    "cut": ("cut", {}),
    "lost": ("lost", {}),
    "halfway": ("halfway", {}),
    "nonsense": ("nonsense", {}),
    "empty": ("empty", {}),
    "endless": ("endless", {}),
    "slow": ("slow", {"seconds": 3}),
    "drip": ("drip", {"seconds": 0.05}),
}

# again: the call is repeated. One such fault does no harm; if it goes on, the job ends after all attempts (a read: late).
# ends:  the job ends at once with an error of that place.
# late:  the job ends at its deadline.
# "-":   no such case.
OUTCOMES = """
                    speech   audio upload   create   read    film     speech file   final upload
429               | again  | again        | again  | again | again  | again       | again
429, wait 0 s     | again  | again        | again  | again | again  | again       | again
429, wait a day   | ends   | ends         | ends   | ends  | ends   | ends        | ends
500               | again  | again        | ends   | again | again  | again       | again
502 HTML          | again  | again        | ends   | again | again  | again       | again
503               | again  | again        | ends   | again | again  | again       | again
404               | ends   | ends         | ends   | ends  | again  | again       | ends
408               | ends   | ends         | ends   | again | ends   | ends        | ends
400 for 503       | -      | again        | -      | -     | -      | -           | again
400 for 429       | -      | again        | -      | -     | -      | -           | again
400 for 403       | -      | ends         | -      | -     | -      | -           | ends
cut               | ends   | again        | ends   | again | again  | again       | again
lost              | ends   | again        | ends   | again | again  | again       | again
halfway           | ends   | again        | ends   | again | again  | again       | again
nonsense          | ends   | again        | ends   | again | ends   | ends        | again
empty             | ends   | again        | ends   | again | ends   | ends        | again
endless           | ends   | again        | ends   | again | ends   | ends        | again
slow              | late   | late         | late   | late  | late   | late        | late
drip              | late   | late         | late   | late  | late   | late        | late
"""

# A refusal of the request's own content, or a speech that is too large, is the client's affair.
STATUS_400 = {("speech", "404"), ("create", "404"), ("speech", "endless")}
# The download goes well, but what Replicate made is no film.
NOT_A_FILM = {("film", "nonsense"), ("film", "empty")}
# The call was carried out although its answer never came: the one film that may be running is not bought again.
CARRIED_OUT = {"lost", "halfway", "slow", "drip"}


@dataclass(frozen=True)
class Case:
    """One cell of the table; `goes_on`: every such call goes wrong, not only the first."""

    place: str
    fault: str
    outcome: str
    goes_on: bool

    @property
    def name(self) -> str:
        """The case in plain words."""
        return f"{self.place}, {self.fault}{', goes on' if self.goes_on else ''}"

    @property
    def is_late(self) -> bool:
        """Whether the job ends at its deadline."""
        return self.outcome == "late" or (self.goes_on and self.place == "read")

    @property
    def deadline_s(self) -> int:
        """The deadline of the service that is to be used."""
        if not self.is_late:
            return 60
        return 1 if self.place in ("speech", "audio upload", "create", "read") else 2


class Seen(NamedTuple):
    """What came of a case."""

    status: int
    answer: dict[str, Any]
    seconds: float
    asked: int
    """Requests of the call that went wrong; of the uploads, those at its place."""
    spoken: int
    films: list[str]
    """The status of every prediction made."""
    cancels: int
    left: list[Any]
    """Files and children that the service still has when the answer is there."""
    log: str


def read_table() -> Iterator[Case]:
    """Every case of OUTCOMES."""
    for line in OUTCOMES.strip().splitlines()[1:]:
        fault, *cells = (cell.strip() for cell in line.split("|"))
        for place, outcome in zip(PLACES, cells, strict=True):
            if outcome != "-":
                yield Case(place, fault, outcome, goes_on=False)
            if outcome == "again":
                yield Case(place, fault, outcome, goes_on=True)


# Running all cases


class Lane:
    """A sandbox and a service of its own, for one case at a time."""

    def __init__(self, folder: Path, deadline_s: int) -> None:
        self.folder, self.deadline_s = folder, deadline_s
        folder.mkdir()
        self.sandbox = Sandbox(reads_to_finish=1).start()
        pace = {"POLL_MIN_SECONDS": "0.005", "RETRY_FIRST_SECONDS": "0.005"}
        changes = {**pace, "TMPDIR": str(folder), "JOB_TIMEOUT_SECONDS": str(deadline_s)}
        self.service = Service({**self.sandbox.environment(), **changes})

    def stop(self) -> None:
        """Stop both."""
        self.service.close()
        self.sandbox.stop()

    async def run(self, client: httpx.AsyncClient, case: Case, film: bytes) -> Seen:
        """One speech job in which something goes wrong."""
        sandbox, place, log_before = self.sandbox, PLACES[case.place], len(self.service.log)
        sandbox.reset()
        sandbox.film(film)
        kind, details = FAULTS[case.fault]
        if case.place == "final upload":
            sandbox.fault("upload", "slow", seconds=0)  # the speech's upload goes well
        if (case.place, case.fault) == ("create", "drip"):
            details = {"seconds": 0.004}  # the rest comes soon enough after the deadline to be waited for
        sandbox.fault(place.call, kind, times=None if case.goes_on else 1, **details)
        started = time.monotonic()
        response = await client.post("/jobs_prompt_tts", json=speech_job(sandbox))
        seconds = time.monotonic() - started
        left = [*left_in(self.folder), *children(self.service.pid)]
        return Seen(
            response.status_code,
            response.json(),
            seconds,
            len(sandbox.calls(place.call)) - (case.place == "final upload"),
            len(sandbox.calls("speech")),
            [prediction.status for prediction in sandbox.predictions.values()],
            len(sandbox.calls("cancel")),
            left,
            self.service.log[log_before:],
        )


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Lane]]:
    """Some with plenty of time for a job, more with little."""
    folder = tmp_path_factory.mktemp("lanes")
    deadlines = [deadline_s for deadline_s, count in LANES.items() for _ in range(count)]
    lanes = [Lane(folder / str(number), deadline_s) for number, deadline_s in enumerate(deadlines)]
    yield lanes
    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(Lane.stop, lanes))


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, lanes: list[Lane]) -> dict[Case, Seen]:
    """What came of every case that is asked for in this run."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = {found["case"]: None for found in parameters if isinstance(found.get("case"), Case)}
    return anyio.run(run_all, list(cases), lanes)


async def run_all(cases: list[Case], lanes: list[Lane]) -> dict[Case, Seen]:
    """Deal the cases out to the lanes that fit them, each lane one after the other."""
    seen: dict[Case, Seen] = {}
    film = short_film()
    waiting = {deadline_s: [case for case in cases if case.deadline_s == deadline_s] for deadline_s in LANES}

    async def work(lane: Lane) -> None:
        queue = waiting[lane.deadline_s]
        await anyio.to_thread.run_sync(lane.service.start)
        async with caller(lane.service.url) as client:
            while queue:
                case = queue.pop()
                seen[case] = await lane.run(client, case, film)

    async with anyio.create_task_group() as tasks:
        for lane in lanes:
            tasks.start_soon(work, lane)
    return seen


# Judging them


CASES = [pytest.param(case, id=case.name) for case in read_table()]
ONCE = [param for param in CASES if param.values[0].outcome == "again" and not param.values[0].goes_on]
FAILING = [param for param in CASES if param not in ONCE]
LATE = [param for param in CASES if param.values[0].is_late]


@pytest.mark.parametrize("case", ONCE)
def test_what_is_worth_repeating_is_repeated(seen: dict[Case, Seen], case: Case) -> None:
    """One fault that passes costs the job nothing but a moment."""
    found = seen[case]
    assert found.status == 200, found.answer
    assert set(found.answer) == {"audio_url", "video_url", "final_url"}
    usual = 2 if case.place == "audio upload" else 1  # the other upload goes well
    assert found.asked == usual + 1


@pytest.mark.parametrize("case", FAILING)
def test_every_other_fault_ends_the_job_with_its_error(seen: dict[Case, Seen], case: Case) -> None:
    """Status, category, provider and `partial` are those of the place where it went wrong."""
    found, place = seen[case], PLACES[case.place]
    is_400 = (case.place, case.fault) in STATUS_400
    category = "resource" if (case.place, case.fault) == ("speech", "endless") else place.category
    assert (found.status, found.answer.get("category")) == (400 if is_400 else 500, category), found.answer
    assert found.answer["provider"] == ("replicate" if (case.place, case.fault) in NOT_A_FILM else place.provider)
    assert found.answer.get("partial", {}).keys() == place.partial


@pytest.mark.parametrize("case", FAILING)
def test_nothing_is_asked_more_often_than_the_design_says(seen: dict[Case, Seen], case: Case) -> None:
    """What may not be repeated is asked once, the rest up to its number of attempts."""
    found, place = seen[case], PLACES[case.place]
    if case.place == "read":
        assert found.asked > 1 if case.goes_on else found.asked >= 1
    else:
        assert found.asked == (place.attempts if case.goes_on else 1)


@pytest.mark.parametrize("case", CASES)
def test_no_job_buys_anything_twice(seen: dict[Case, Seen], case: Case) -> None:
    """At most one film exists, whatever happens, and none before the speech is kept; speech is asked for again only when refused."""
    found = seen[case]
    if case.place in ("speech", "audio upload") and found.status != 200:
        assert found.films == []
    elif case.place == "create" and found.status != 200:
        assert len(found.films) == (case.fault in CARRIED_OUT)
    else:
        assert len(found.films) == 1
    assert found.spoken == (found.asked if case.place == "speech" else 1)


@pytest.mark.parametrize("case", LATE)
def test_the_deadline_ends_the_job_and_its_film(seen: dict[Case, Seen], case: Case) -> None:
    """A late job says where it was; a film still being made is cancelled."""
    found = seen[case]
    stage = {"create": "video", "read": "video", "film": "download", "speech file": "download"}.get(
        case.place, case.place.replace(" ", "_")
    )
    assert f"not done after {case.deadline_s} s" in found.answer["detail"]
    assert stage in found.answer["detail"]
    late_s = found.seconds - case.deadline_s
    assert 0 <= late_s < (6 if case.place == "create" else 1), "a create on its way is waited for"
    is_made = stage in ("download", "final_upload") or (case.place == "read" and case.fault in CARRIED_OUT)
    assert found.films == ([] if stage in ("speech", "audio_upload") else ["succeeded" if is_made else "canceled"])
    assert found.cancels == (stage == "video")


@pytest.mark.parametrize("case", CASES)
@needs_proc
def test_nothing_is_left(seen: dict[Case, Seen], case: Case) -> None:
    """When the answer is there, the job's files and its ffmpeg are gone, and nothing unforeseen stands in the log."""
    found = seen[case]
    assert found.left == []
    assert "Traceback" not in found.log


@pytest.mark.parametrize("fault", ["429, wait a day"])
@pytest.mark.parametrize("place", PLACES)
def test_a_wait_of_a_day_is_refused_in_words(seen: dict[Case, Seen], place: str, fault: str) -> None:
    """The error says how long the provider wants us to wait."""
    found = seen[Case(place, fault, "ends", goes_on=False)]
    assert "86400 s" in found.answer["detail"]
    assert found.seconds < 10


@needs_proc
def test_no_connection_is_left(seen: dict[Case, Seen], lanes: list[Lane]) -> None:
    """After all this a service holds no more connections than one job needs: those in the pool, ready for the next."""
    for lane in lanes:
        assert sockets(lane.service.pid) <= 9
