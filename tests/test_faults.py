"""Every call of a speech job fails in every way, over real sockets: retries, errors, costs, and what is left behind.

All cases run at once, each on a sandbox and a service of its own for that time; then each test judges one of them.
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

from tests.sandbox import Sandbox, Service
from tests.support.processes import children, files_in, needs_proc, socket_count
from tests.support.requests import RESULT_FIELDS, service_client, short_video, speech_job

# How many services have which deadline in seconds: enough for the video, for the whole job, and plenty.
INSTANCES = {1: 2, 2: 1, 60: 2}
PACE = {"POLL_MIN_SECONDS": "0.005", "RETRY_FIRST_SECONDS": "0.005", "PATIENCE_SECONDS": "1.2"}
SPOKEN, PAID_FOR = frozenset({"audio_url"}), frozenset({"audio_url", "video_url", "prediction_id"})


class Place(NamedTuple):
    """Where a job fails: the sandbox's name for the call, its stage, and the fields of the error."""

    call: str
    stage: str
    category: str
    provider: str | None
    partial: frozenset[str]


PLACES = {
    "speech": Place("speech", "speech", "provider", "elevenlabs", frozenset()),
    "audio upload": Place("upload", "audio_upload", "resource", "supabase", frozenset()),
    "speech file": Place("public", "audio_upload", "resource", None, SPOKEN),
    "create": Place("create", "video", "provider", "replicate", SPOKEN),
    "poll": Place("poll", "video", "provider", "replicate", SPOKEN | {"prediction_id"}),
    "video": Place("output", "download", "resource", None, PAID_FOR),
    "final upload": Place("upload", "final_upload", "resource", "supabase", PAID_FOR),
}

FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "429": ("status", {"status": 429, "body": {"detail": "Slow down.", "message": "Slow down."}}),
    "429, wait a day": ("status", {"status": 429, "headers": {"retry-after": "86400"}}),
    "502 HTML": ("html", {"status": 502}),
    "503": ("status", {"status": 503}),
    "404": ("status", {"status": 404}),
    "408": ("status", {"status": 408}),
    "400 for 503": ("status", {"status": 400, "body": {"statusCode": "503", "message": "Busy"}}),
    "400 for 403": (
        "status",
        {"status": 400, "body": {"statusCode": "403", "message": "Not yours"}},
    ),
    "cut": ("cut", {}),
    "lost": ("lost", {}),
    "502 before it": ("behind", {}),
    "halfway": ("halfway", {}),
    "malformed": ("malformed", {}),
    "empty": ("empty", {}),
    "endless": ("endless", {}),
    "slow": ("slow", {"seconds": 3}),
    "drip": ("drip", {"seconds": 0.05}),
}

# 3, 4:  the call is repeated. One such fault does no harm; if it goes on, the job ends after so many attempts.
# on:    an outage of five attempts does no harm; if it goes on, the job ends when patience does (a poll: late; a 429 of
#        speech or create: once its wait in line would pass the deadline).
# found: the call was carried out although its answer never came, and what it made is found.
# ends:  the job ends at once with an error of that place.
# late:  the job ends at its deadline.
# "-":   no such case.
OUTCOMES = """
                    speech   audio upload   speech file   create   poll    video     final upload
429               | on     | 4            | 4           | on     | on    | on     | on
429, wait a day   | ends   | ends         | ends        | ends   | on    | on     | on
502 HTML          | 3      | 4            | 4           | ends   | on    | on     | on
503               | 3      | 4            | 4           | ends   | on    | on     | on
404               | ends   | ends         | 4           | ends   | on    | on     | ends
408               | ends   | ends         | ends        | ends   | on    | ends   | ends
400 for 503       | -      | 4            | 4           | -      | -     | -      | on
400 for 403       | -      | ends         | ends        | -      | -     | -      | ends
cut               | ends   | 4            | 4           | ends   | on    | on     | on
lost              | ends   | 4            | 4           | found  | on    | on     | on
502 before it     | 3      | 4            | 4           | found  | on    | on     | on
halfway           | ends   | 4            | 4           | found  | on    | on     | on
malformed         | ends   | 4            | ends        | ends   | on    | ends   | on
empty             | ends   | 4            | ends        | ends   | on    | ends   | on
endless           | ends   | ends         | ends        | ends   | ends  | ends   | ends
slow              | late   | late         | late        | late   | late  | late   | late
drip              | late   | late         | late        | late   | late  | late   | late
"""
OUTAGE = 5
# Of faults that are waited for, those that go on until patience ends.
TO_THE_END = ("429", "503", "404", "cut")

STATUS_400 = {
    ("speech", "404"),
    ("create", "404"),
    ("speech", "endless"),
}  # about the request's own content
NOT_A_VIDEO = {
    ("video", "malformed"),
    ("video", "empty"),
}  # the download goes well, but what Replicate made is none
NOT_THE_SPEECH = {
    ("speech file", "malformed"),
    ("speech file", "empty"),
}  # something else at its address
NOT_PUBLIC = {("speech file", "404"), ("speech file", "400 for 403")}  # the bucket


@dataclass(frozen=True)
class Case:
    """One cell of the table; `goes_on`: every such call fails, not only the first ones."""

    place: str
    fault: str
    outcome: str
    goes_on: bool = False

    @property
    def name(self) -> str:
        """The case in plain words."""
        return f"{self.place}, {self.fault}{', goes on' if self.goes_on else ''}"

    @property
    def is_late(self) -> bool:
        """Whether the job ends at its deadline."""
        return self.outcome == "late" or (
            self.goes_on and self.place == "poll" and self.fault != "404"
        )

    @property
    def succeeds(self) -> bool:
        """Whether the job is answered with a video."""
        return self.outcome == "found" or (self.outcome in ("3", "4", "on") and not self.goes_on)

    @property
    def times(self) -> int | None:
        """How often the call fails; None: always."""
        return (
            None
            if self.goes_on
            else OUTAGE
            if self.outcome == "on" and "day" not in self.fault
            else 1
        )

    @property
    def deadline_s(self) -> int:
        """The deadline of the service that is to be used."""
        if self.goes_on and self.place in ("speech", "create") and self.fault == "429":
            return 2  # in line: it is refused once the next wait would pass the deadline
        if not self.is_late:
            return 60
        return 2 if self.place in ("video", "final upload") else 1


class Seen(NamedTuple):
    """The outcome of a case."""

    deadline_s: int
    status: int
    answer: dict[str, Any]
    seconds: float
    asked: int  # requests of the call that went wrong; of the uploads, those at its place
    spoken: int
    videos: list[str]  # the status of every prediction made
    cancels: int
    left: list[Any]  # files and children that the service still has when the answer is there
    log: str


def read_table() -> Iterator[Case]:
    """Every case of OUTCOMES."""
    for line in OUTCOMES.strip().splitlines()[1:]:
        fault, *cells = (cell.strip() for cell in line.split("|"))
        for place, outcome in zip(PLACES, cells, strict=True):
            if outcome != "-":
                yield Case(place, fault, outcome)
            if outcome in ("3", "4") or (outcome == "on" and fault in TO_THE_END):
                yield Case(place, fault, outcome, goes_on=True)


# Running all cases


class Instance:
    """A sandbox and a service of its own, for one case at a time."""

    def __init__(self, folder: Path, deadline_s: int) -> None:
        self.folder, self.deadline_s = folder, deadline_s
        folder.mkdir()
        self.sandbox = Sandbox(polls_to_finish=1).start()
        changes = {**PACE, "TMPDIR": str(folder), "JOB_TIMEOUT_SECONDS": str(deadline_s)}
        self.service = Service({**self.sandbox.environment(), **changes})

    def stop(self) -> None:
        """Stop both."""
        self.service.close()
        self.sandbox.stop()

    async def run(self, client: httpx.AsyncClient, case: Case) -> Seen:
        """Run one speech job with the fault of the case."""
        sandbox, place, log_before = self.sandbox, PLACES[case.place], len(self.service.log)
        sandbox.reset()
        sandbox.video(short_video())
        kind, details = FAULTS[case.fault]
        if case.place == "final upload":
            sandbox.fault("upload", "slow", seconds=0)  # the speech's upload goes well
        if (case.place, case.fault) == ("create", "drip"):
            details = {
                "seconds": 0.004
            }  # the rest comes soon enough after the deadline to be waited for
        sandbox.fault(place.call, kind, times=case.times, **details)
        started = time.monotonic()
        response = await client.post("/jobs_prompt_tts", json=speech_job(sandbox))
        return Seen(
            self.deadline_s,
            response.status_code,
            response.json(),
            time.monotonic() - started,
            len(sandbox.calls(place.call)) - (case.place == "final upload"),
            len(sandbox.calls("speech")),
            [prediction.status for prediction in sandbox.predictions.values()],
            len(sandbox.calls("cancel")),
            [*files_in(self.folder), *children(self.service.pid)],
            self.service.log[log_before:],
        )


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Instance]]:
    """The sandboxes and services that the cases run on."""
    folder = tmp_path_factory.mktemp("lanes")
    deadlines = [deadline_s for deadline_s, count in INSTANCES.items() for _ in range(count)]
    instances = [
        Instance(folder / str(number), deadline_s) for number, deadline_s in enumerate(deadlines)
    ]
    yield instances
    with ThreadPoolExecutor(len(instances)) as pool:
        list(pool.map(Instance.stop, instances))


@pytest.fixture(scope="module")
def seen(
    request: pytest.FixtureRequest,
    instances: list[Instance],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Case, Seen]:
    """The outcome of every case that is selected in this run."""
    parameters = [
        item.callspec.params for item in request.session.items if hasattr(item, "callspec")
    ]
    cases = {found["case"]: None for found in parameters if isinstance(found.get("case"), Case)}
    seen = anyio.run(run_all, list(cases), instances)
    for factor in (3, 9):  # nothing is left to do here, unless the machine is busy
        for case in [case for case, found in seen.items() if came_too_late(case, found)]:
            seen[case] = run_with_more_time(case, factor, tmp_path_factory.mktemp("more-time"))
    return seen


def run_with_more_time(case: Case, factor: int, folder: Path) -> Seen:
    """The case once more, on a sandbox and a service of its own, with a deadline so many times as late."""
    deadline_s = case.deadline_s * factor
    instance = Instance(folder / "service", deadline_s)
    try:
        return anyio.run(run_all, [case], [instance])[case]
    finally:
        instance.stop()


async def run_all(cases: list[Case], instances: list[Instance]) -> dict[Case, Seen]:
    """Deal the cases out to the lanes that fit them, each lane one after the other."""
    seen: dict[Case, Seen] = {}
    waiting: dict[int, list[Case]] = {instance.deadline_s: [] for instance in instances}
    for case in cases:
        deadline_s = case.deadline_s if case.deadline_s in waiting else instances[0].deadline_s
        waiting[deadline_s].append(case)

    async def work(instance: Instance) -> None:
        queue = waiting[instance.deadline_s]
        await anyio.to_thread.run_sync(instance.service.start)
        async with service_client(instance.service.url) as client:
            instance.sandbox.video(short_video())
            # What is made once has been made
            await client.post("/jobs_prompt_tts", json=speech_job(instance.sandbox))
            while queue:
                case = queue.pop()
                seen[case] = await instance.run(client, case)

    async with anyio.create_task_group() as tasks:
        for instance in instances:
            tasks.start_soon(work, instance)
    return seen


def came_too_late(case: Case, found: Seen) -> bool:
    """Whether a busy machine kept the job from its place until the deadline, or its answer after that."""
    if not case.is_late:
        return False
    fewest = 5 if case.goes_on else 1  # calls until it is clear whether they are retried
    return found.asked < fewest or found.seconds - found.deadline_s >= longest_delay_s(case)


def longest_delay_s(case: Case) -> float:
    """The longest time from the deadline to the answer: a create on its way is waited for."""
    return 6 if case.place == "create" else 1


# Judging them


CASES = [pytest.param(case, id=case.name) for case in read_table()]
GOOD = [param for param in CASES if param.values[0].succeeds]
FAILING = [param for param in CASES if param not in GOOD]
LATE = [param for param in CASES if param.values[0].is_late]


@pytest.mark.parametrize("case", GOOD)
def test_a_passing_fault_is_retried(seen: dict[Case, Seen], case: Case) -> None:
    """The job succeeds after as many calls as its retry policy makes, and no prediction is made twice."""
    found = seen[case]
    assert found.status == 200, found.answer
    assert set(found.answer) == RESULT_FIELDS
    usual = 2 if case.place == "audio upload" else 1  # the other upload goes well
    assert found.asked == usual + (0 if case.outcome == "found" else case.times or 0)


@pytest.mark.parametrize("case", FAILING)
def test_a_lasting_fault_ends_the_job_with_its_error(seen: dict[Case, Seen], case: Case) -> None:
    """Status, category, provider and `partial` are those of its place, after as many calls as the retry policy makes."""
    found, place, cell = seen[case], PLACES[case.place], (case.place, case.fault)
    provider = (
        "replicate"
        if cell in NOT_A_VIDEO
        else "supabase"
        if cell in NOT_PUBLIC | NOT_THE_SPEECH
        else place.provider
    )
    if case.outcome == "late" and case.place == "speech file":
        provider = "supabase"
    category = "resource" if cell == ("speech", "endless") else place.category
    kind = (found.status, found.answer["category"], found.answer["provider"])
    assert kind == (400 if cell in STATUS_400 else 500, category, provider), found.answer
    partial = place.partial
    if case.outcome == "late" and case.place == "create":  # its answer, which was waited for, tells
        partial |= {"prediction_id"}
    assert found.answer.get("partial", {}).keys() == partial
    assert ("SUPABASE_BUCKET" in found.answer["detail"]) == (cell in NOT_PUBLIC)
    assert ("86400 s" in found.answer["detail"]) == ("day" in case.fault)
    if case.outcome == "on" and case.goes_on:  # as long as patience lasts
        assert found.asked > 4
    elif (case.place, case.outcome) != ("poll", "late"):
        assert found.asked == (int(case.outcome) if case.goes_on else 1)


@pytest.mark.parametrize("case", CASES)
def test_no_job_pays_for_anything_twice(seen: dict[Case, Seen], case: Case) -> None:
    """At most one prediction is made, and none before the speech can be read; speech is only retried when rejected."""
    found = seen[case]
    if PLACES[case.place].stage in ("speech", "audio_upload") and not case.succeeds:
        assert len(found.videos) == 0
    elif case.place == "create" and not case.succeeds:
        assert len(found.videos) == case.is_late, "it was carried out"
    else:
        assert len(found.videos) == 1
    assert found.spoken == (found.asked if case.place == "speech" else 1)


@pytest.mark.parametrize("case", LATE)
def test_the_deadline_ends_the_job_and_its_video(seen: dict[Case, Seen], case: Case) -> None:
    """The error names the stage, and a video that is still being made is cancelled."""
    found, stage = seen[case], PLACES[case.place].stage
    assert (
        f"not done after {found.deadline_s} s and was ended in the stage {stage}"
        in found.answer["detail"]
    )
    assert found.answer["retryable"], "without a key it may be sent again"
    assert 0 <= found.seconds - found.deadline_s < longest_delay_s(case)
    is_made = stage in ("download", "final_upload") or case.name in ("poll, slow", "poll, drip")
    assert found.videos == (
        [] if stage in ("speech", "audio_upload") else ["succeeded" if is_made else "canceled"]
    )
    assert found.cancels == (stage == "video")


@pytest.mark.parametrize("case", CASES)
@needs_proc
def test_no_file_and_no_process_is_left(seen: dict[Case, Seen], case: Case) -> None:
    """When the answer is there, the job's files and its ffmpeg are gone, and the log has no traceback."""
    found = seen[case]
    assert found.left == []
    assert "Traceback" not in found.log


@needs_proc
def test_no_connection_beyond_the_pool_is_left(
    seen: dict[Case, Seen], instances: list[Instance]
) -> None:
    """A service holds no more connections afterwards than the pool keeps for the next job."""
    for instance in instances:
        assert socket_count(instance.service.pid) <= 9
