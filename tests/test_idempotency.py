"""Idempotency keys over real sockets: replay, join, resume and claim; one video is paid for, and it is delivered."""

from __future__ import annotations

import hmac
import itertools
import json
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import httpx
import pytest

import main
from tests import conftest
from tests.conftest import StartService
from tests.sandbox import Sandbox, Service
from tests.sandbox.supabase import KEYS
from tests.support.processes import wait_until
from tests.support.requests import (
    EVENT_STREAM,
    STAGES,
    JobOutcome,
    prompt_job,
    send_job,
    service_client,
    short_video,
    speech_job,
)

pytestmark = pytest.mark.anyio

# An event stream that sends a comment before the job log is read cannot say in its headers that it is a replay.
PACE = {**conftest.PACE, "KEEPALIVE_SECONDS": "15"}
FORMS: dict[str, dict[str, str]] = {"json": {}, "events": EVENT_STREAM}
SILENT, TALKING = "/jobs_prompt_only", "/jobs_prompt_tts"
BODIES = {SILENT: prompt_job, TALKING: speech_job}
# The uploads of a speech job by number: four entries of its log, and between them its two files.
BEGUN, SPEECH, SPOKEN, CREATED, VIDEO, DONE = range(1, 7)
ENTRIES = {BEGUN: 1, SPOKEN: 2, CREATED: 3, DONE: 4}  # and the move by which each gets its number
CALM = {"PATIENCE_SECONDS": "40"}  # a claim is renewed after 3 s: no upload comes between those
MEETING_S = 0.3  # how long a call is held so that two requests overlap
LATER_S = 3_700  # when a silent video has expired

both_routes = pytest.mark.parametrize("path", BODIES)
both_forms = pytest.mark.parametrize("form", FORMS)


@dataclass
class FrontEnd:
    """A front end that sends one job several times, to one instance of the service, with one key."""

    sandbox: Sandbox
    service: Service
    key: str | bytes | None
    form: str = "json"
    changes: dict[str, Any] = field(default_factory=dict)

    async def send(self, path: str = TALKING, form: str = "", **changes: Any) -> JobOutcome:
        """Send the job and return its outcome."""
        body, headers = (
            BODIES[path](self.sandbox, **self.changes, **changes),
            list(FORMS[form or self.form].items()),
        )
        headers += (
            []
            if self.key is None
            else [("Idempotency-Key", self.key), ("X-Request-ID", str(self.key)[:36])]
        )
        return await send_job(self.service.url, path, body, headers)

    async def leave(self, path: str, form: str, when: Callable[[], Any]) -> None:
        """Send the job, and disconnect when a condition holds."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.send, path, form)
            assert await wait_until(when)
            tasks.cancel_scope.cancel()

    @property
    def log_path(self) -> str:
        """The folder of the job's log, which depends on the service role key."""
        return f"pets/jobs/{keyed_digest(str(self.key))}"

    @property
    def entry_paths(self) -> list[str]:
        """The entries of the job's log, in order."""
        return sorted(path for path in self.sandbox.objects if path.startswith(f"{self.log_path}/"))

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The contents of the job's log."""
        return [json.loads(self.sandbox.objects[path].read()) for path in self.entry_paths]

    @property
    def record(self) -> dict[str, Any]:
        """The last entry, which decides; empty if the job has no log."""
        return self.entries[-1] if self.entry_paths else {}

    async def store(self, path: str, content: Any) -> None:
        """Put a JSON file into the bucket, as somebody with the service role key can."""
        headers = {"Authorization": f"Bearer {KEYS['service']}", "x-upsert": "true"}
        headers["Content-Type"] = "application/json"
        text = content if isinstance(content, str) else json.dumps(content)
        async with service_client(self.sandbox.url) as client:
            url = f"/storage/v1/object/{path}"
            response = await client.post(url, content=text, headers=headers)
            assert response.status_code == 200

    async def store_legacy_record(self, path: str = TALKING, **changes: Any) -> None:
        """Store what an earlier version kept of this job: one file, written a moment ago."""
        request = json.dumps([path, BODIES[path](self.sandbox, **self.changes)], sort_keys=True)
        record = {
            "body": keyed_digest(request),
            "started": time.time(),
            "written": time.time(),
            "writer": uuid.uuid4().hex,
            "partial": {},
            "answer": None,
        }
        await self.store(f"{self.log_path}.json", {**record, **changes})

    def grow_old(self) -> None:
        """Let the job's log have been written so long ago that a silent video has expired."""
        for path in self.entry_paths:
            stored = self.sandbox.objects[path]
            self.sandbox.objects[path] = stored._replace(modified=stored.modified - LATER_S)

    @property
    def paid_for(self) -> tuple[int, int]:
        """How many speeches and how many videos were paid for."""
        return self.sandbox.speeches.total(), len(self.sandbox.predictions)

    def fault(self, call: str, number: int = 1, kind: str = "status", **details: Any) -> None:
        """Let one such call fail, counted from the next."""
        for _ in range(number - 1):
            self.sandbox.fault(call, "slow", seconds=0)
        self.sandbox.fault(call, kind, **details)


def keyed_digest(text: str) -> str:
    """The HMAC-SHA-256 under the service role key, which names logs and tells bodies apart."""
    return hmac.new(KEYS["service"].encode(), text.encode(), "sha256").hexdigest()


@pytest.fixture(scope="module")
def running_sandbox() -> Iterator[Sandbox]:
    """A sandbox of these tests alone: jobs with a key outlive their requests and could disturb other tests."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def start_once(running_sandbox: Sandbox) -> Iterator[StartService]:
    """Start an instance of the service on that sandbox; tests with the same settings share it."""
    with ExitStack() as services:

        @lru_cache
        def start(number: int = 1, **changes: str) -> Service:
            return services.enter_context(
                Service({**running_sandbox.environment(), **PACE, **changes})
            )

        yield start


@pytest.fixture
def front(sandbox: Sandbox, start_once: StartService) -> FrontEnd:
    """A front end with a key of its own, and a small video."""
    sandbox.video(short_video())
    return FrontEnd(sandbox, start_once(), str(uuid.uuid4()))


@pytest.fixture
def second(start_once: StartService) -> Service:
    """A second instance of the service."""
    return start_once(2)


@pytest.fixture
def calm(front: FrontEnd, start_once: StartService) -> FrontEnd:
    """A front end of an instance whose jobs renew no claim while a test counts their calls."""
    return replace(front, service=start_once(**CALM))


async def send_together(
    *fronts: FrontEnd, when: Callable[[], Any] = lambda: True, path: str = TALKING
) -> list[JobOutcome]:
    """What comes of requests that run at the same time, each sent when `when` holds."""
    outcomes: list[JobOutcome] = []

    async def one(front: FrontEnd) -> None:
        outcomes.append(await front.send(path))

    async with anyio.create_task_group() as tasks:
        for front in fronts:
            tasks.start_soon(one, front)
            assert await wait_until(when)
    return outcomes


# Disconnecting, replaying, joining


@both_forms
@both_routes
async def test_a_job_with_a_key_continues_after_a_disconnect(
    front: FrontEnd, path: str, form: str
) -> None:
    """Nothing is cancelled; a request after its end gets the result as a replay."""
    front.sandbox.video_seconds = 0.3
    await front.leave(path, form, lambda: front.sandbox.predictions)
    assert await wait_until(lambda: f"request_id={front.key} job outcome=ok" in front.service.log)
    requests_before = len(front.sandbox.requests)
    outcome = await front.send(path, form)
    assert (outcome.status, outcome.is_replayed, outcome.stages) == (200, True, [])
    assert outcome.data == front.record["result"]
    calls = [request.call for request in front.sandbox.requests[requests_before:]]
    assert calls == ["objects", "storage"], (
        "the log is listed, its last entry read, and that is all"
    )
    assert (front.paid_for, front.sandbox.calls("cancel")) == ((path == TALKING, 1), [])


@both_routes
async def test_any_number_of_requests_join_a_running_job(front: FrontEnd, path: str) -> None:
    """Each gets all stages and the same bytes; one that disconnects does not stop the job."""
    front.sandbox.video_seconds = 0.8
    waiters: list[JobOutcome] = []

    async def wait(form: str) -> None:
        waiters.append(await front.send(path, form))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "events")
        assert await wait_until(lambda: front.sandbox.calls("poll"))
        await front.leave(
            path, "events", lambda: f"joins the job of request_id={front.key}" in front.service.log
        )
        for form in ("json", "events", "json"):
            tasks.start_soon(wait, form)
    assert [(outcome.status, outcome.is_replayed, outcome.text) for outcome in waiters] == [
        (200, False, waiters[0].text)
    ] * 4
    first, late = (outcome.stages for outcome in waiters if outcome.stages)
    stages = STAGES if path == TALKING else ("video",)
    assert first == late == [(stage, state) for stage in stages for state in ("started", "done")]
    assert front.paid_for == (path == TALKING, 1)


# Resuming after a failure

# What makes a job fail with a 500 at each step: the call, its number among such calls, and its status.
FAILURES = {
    "speech": ("speech", 1, 401), "audio_upload": ("upload", SPEECH, 403), "fetch": ("public", 1, 403),
    "create": ("create", 1, 402), "video": ("poll", 1, 402), "download": ("output", 1, 403),
    "mux": None, "final_upload": ("upload", VIDEO, 403),
}  # fmt: skip


@both_forms
@pytest.mark.parametrize("step", FAILURES)
async def test_a_failed_job_is_resumed(calm: FrontEnd, step: str, form: str) -> None:
    """After a 500 nothing is paid for again, except a speech that was not stored."""
    front = calm
    if failure := FAILURES[step]:
        call, number, status = failure
        front.fault(call, number, status=status)
    else:
        front.sandbox.video(b"\0\0\0\x08ftyp")
    failed = await front.send(form=form)
    assert failed.status == 500
    for prediction in front.sandbox.predictions.values():  # the video was not usable, and now is
        prediction.video = short_video()
    known = failed.data.get("partial", {})
    if "prediction_id" in known:  # the picture was needed for the create only
        front.sandbox.fault("picture", "status", times=None, status=404)
    outcome = await front.send(form=form)
    assert (outcome.status, outcome.is_replayed) == (200, False), outcome.text
    assert (
        known.items()
        <= {**outcome.data, "prediction_id": next(iter(front.sandbox.predictions))}.items()
    )
    assert front.paid_for == (2 if step == "audio_upload" else 1, 1)
    assert form == "json" or (("speech", "started") in outcome.stages) == ("audio_url" not in known)


# Where jobs are held when their process ends: the call, and its number among such calls. An entry is held when
# it has its number, and its caller does not know; the service waits 8 s for that. The last three renew their claims,
# which makes uploads and moves of its own.
HOLDS = {
    "video": ("poll", 1), "download": ("output", 1), "final_upload": ("upload", VIDEO),
    "begun": ("move", ENTRIES[BEGUN]), "spoken": ("move", ENTRIES[SPOKEN]), "done": ("move", ENTRIES[DONE]),
    "created": ("move", ENTRIES[CREATED]),
    "audio_upload": ("upload", SPEECH), "create": ("create", 1), "speech": ("speech", 1),
}  # fmt: skip

HOLD_S = {"create": 4, "created": 7, "done": 7}  # these are awaited whatever happens
MAX_SETUP_S = 6.0  # so that the first of them is still held; a busy machine may need several tries
MAX_TRIES = 6


def count_files(front: FrontEnd, folder: str) -> int:
    """How many files a folder of the bucket holds."""
    return sum(path.startswith(f"pets/{folder}/") for path in front.sandbox.objects)


def has_file_more(front: FrontEnd, folder: str, before: int) -> bool:
    """Whether a folder of the bucket holds more files than before."""
    return count_files(front, folder) > before


def has_taken_effect(front: FrontEnd, stage: str) -> bool:
    """Whether the call that holds a job at this stage has been carried out by the provider."""
    if stage == "speech":
        return front.sandbox.speeches[f"I am {stage}"] == 1
    if stage in ("create", "video", "download"):
        return bool(front.sandbox.created(prompt=stage))
    if stage in ("begun", "spoken"):
        return front.record.get("claim") == {"begun": "speech", "spoken": "video"}[stage]
    if stage == "created":
        return "prediction_id" in front.record["partial"]
    return "result" in front.record


class Resumed(NamedTuple):
    """Jobs that their process did not finish: their first outcomes, those after a restart, and the last entries between."""

    sandbox: Sandbox
    first: dict[str, JobOutcome]
    again: dict[str, JobOutcome]
    records: dict[str, dict[str, Any]]
    # From the first job that is held for seconds only to the end of the process
    setup_s: float = 0.0


@pytest.fixture(scope="module", params=[signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def resumed(request: pytest.FixtureRequest) -> Resumed:
    """End a process that holds a job at every stage, and send the same requests to the next one."""
    for _ in range(MAX_TRIES):
        resumed = resume_jobs(request.param)
        if resumed.setup_s < MAX_SETUP_S:
            break
    return resumed


def resume_jobs(by: int) -> Resumed:
    """Try it once."""
    pace = {
        **PACE,
        "PATIENCE_SECONDS": "8",
    }  # a claim of a killed owner is waited for during 2 s
    with Sandbox() as sandbox, Service({**sandbox.environment(), **pace}, graceful_s=0) as service:
        sandbox.video(short_video())
        forms, fronts = itertools.cycle(FORMS), {}
        for stage in HOLDS:
            changes = {"prompt": stage, "text": f"I am {stage}"}
            fronts[stage] = FrontEnd(sandbox, service, str(uuid.uuid4()), next(forms), changes)
        return anyio.run(end_and_send_again, sandbox, fronts, service, by)


async def end_and_send_again(
    sandbox: Sandbox, fronts: dict[str, FrontEnd], service: Service, by: int
) -> Resumed:
    """Hold a job at every stage, end the process, start the next one, and send the same requests."""
    resumed = Resumed(sandbox, {}, {}, {})

    async def send(stage: str, outcomes: dict[str, JobOutcome]) -> None:
        with suppress(httpx.HTTPError):  # a killed process sends no response
            outcomes[stage] = await fronts[stage].send()

    async with anyio.create_task_group() as tasks:
        for stage, (call, number) in HOLDS.items():
            if stage == "begun":
                began_at = time.monotonic()
            wanted = len(sandbox.calls(call)) + number
            folder = {"audio_upload": "audio", "final_upload": "videos"}.get(stage)
            stored_before = count_files(fronts[stage], folder or "")
            fronts[stage].fault(call, number, "slow", seconds=HOLD_S.get(stage, 60))
            tasks.start_soon(send, stage, resumed.first)
            assert await wait_until(lambda call=call, n=wanted: len(sandbox.calls(call)) >= n), (
                f"no job at {stage}"
            )
            # The provider has heard of the call; its effect is there a moment later, and only its answer is held.
            if folder is None:
                is_done = partial(has_taken_effect, fronts[stage], stage)
            else:
                is_done = partial(has_file_more, fronts[stage], folder, stored_before)
            assert await wait_until(is_done), f"the call at {stage} has no effect"
        assert await wait_until(lambda: sandbox.created(prompt="create"))
        resumed = resumed._replace(setup_s=time.monotonic() - began_at)
        await anyio.to_thread.run_sync(service.stop, by)
    resumed.records.update((stage, front.record) for stage, front in fronts.items())
    await anyio.to_thread.run_sync(service.start)
    async with anyio.create_task_group() as tasks:
        for stage in HOLDS:
            tasks.start_soon(send, stage, resumed.again)
    return resumed


@pytest.mark.parametrize("stage", HOLDS)
def test_a_job_outlives_its_process(resumed: Resumed, stage: str) -> None:
    """The next process resumes from what exists: one video is paid for, never cancelled, and delivered."""
    outcome = resumed.again[stage]
    assert (outcome.status, outcome.is_replayed) == (200, stage == "done"), outcome.text
    assert [prediction.status for prediction in resumed.sandbox.created(prompt=stage)] == [
        "succeeded"
    ]
    assert resumed.sandbox.speeches[f"I am {stage}"] == (
        2 if stage in ("speech", "audio_upload") else 1
    )


def test_a_graceful_shutdown_answers_every_job(
    resumed: Resumed, request: pytest.FixtureRequest
) -> None:
    """After SIGTERM every client gets an error and every prediction is in its job's log; after SIGKILL no client gets anything."""
    if "SIGKILL" in request.node.name:
        assert resumed.first == {}
        return
    assert {stage for stage, outcome in resumed.first.items() if outcome.status == 200} == {"done"}
    failed = [outcome for stage, outcome in resumed.first.items() if stage != "done"]
    assert {outcome.kind for outcome in failed} == {(500, "internal", True)}
    assert all("send the same request again" in outcome.data["detail"] for outcome in failed)
    assert set(resumed.first) == set(HOLDS)
    paid_for = set(HOLDS) - {"begun", "speech", "audio_upload", "spoken"}
    assert {
        stage
        for stage, record in resumed.records.items()
        if "prediction_id" in record.get("partial", {})
    } == paid_for


async def test_a_shutdown_lets_a_job_without_a_client_finish(
    start_service: StartService, front: FrontEnd
) -> None:
    """After SIGTERM it has a while, and is done when the process ends."""
    front.service, front.sandbox.video_seconds = start_service(graceful_s=0), 0.3
    await front.leave(SILENT, "json", lambda: front.sandbox.predictions)
    await anyio.to_thread.run_sync(front.service.stop)
    assert "result" in front.record


# Several instances


async def test_a_fresh_claim_of_another_instance_is_waited_for(
    front: FrontEnd, second: Service
) -> None:
    """The second instance waits until the first has a prediction, and gives the same answer."""
    front.fault("speech", kind="slow", seconds=MEETING_S)
    one, two = await send_together(
        front, replace(front, service=second), when=lambda: front.sandbox.calls("speech")
    )
    assert (one.status, two.status, one.text) == (200, 200, two.text)
    assert front.paid_for == (1, 1)


@pytest.mark.parametrize("renewals_fail", [0, 1])
async def test_a_claim_is_renewed_while_its_owner_works(
    front: FrontEnd, second: Service, renewals_fail: int
) -> None:
    """A speech that takes longer than a claim lives is paid for once, also if a renewal fails."""
    front.sandbox.fault("speech", "slow", seconds=2.5)  # a claim lives for 1 s here
    if renewals_fail:
        front.fault("upload", number=2, status=403)
    one, two = await send_together(
        front, replace(front, service=second), when=lambda: front.sandbox.calls("speech")
    )
    assert (one.status, two.status, one.text) == (200, 200, two.text)
    assert front.paid_for == (1, 1)
    claims = [entry.get("claim") for entry in front.entries]
    assert claims.count("speech") >= 2


async def test_a_stopped_owner_loses_its_claim(front: FrontEnd, start_once: StartService) -> None:
    """Awake again it pays for no video, and gives the answer of the instance that took over."""
    stopped = start_once(3)
    front.sandbox.fault("speech", "slow", seconds=MEETING_S)
    outcomes: list[JobOutcome] = []

    async def send_to_the_stopped() -> None:
        outcomes.append(await replace(front, service=stopped).send())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send_to_the_stopped)
        assert await wait_until(lambda: front.sandbox.speeches.total())
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            outcomes.append(await front.send())
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
    assert [outcome.status for outcome in outcomes] == [200, 200]
    assert outcomes[0].text == outcomes[1].text
    assert front.paid_for == (2, 1), "the first speech was being made when its owner stopped"


async def test_a_released_claim_is_taken_over_at_once(front: FrontEnd, second: Service) -> None:
    """An instance whose job failed is not waited for, however fresh its claim is."""
    front.fault("speech", status=401)
    assert (await front.send()).status == 500
    requests_before = len(front.sandbox.requests)
    assert (await replace(front, service=second).send()).status == 200
    calls = [request.call for request in front.sandbox.requests[requests_before:]]
    assert calls[:4] == ["objects", "storage", "picture", "upload"]


@both_routes
async def test_two_instances_that_start_at_once_pay_once(
    front: FrontEnd, second: Service, path: str
) -> None:
    """Both find no log, and both claim: one pays for speech and video, the other has its answer."""
    front.sandbox.fault("objects", "slow", times=2, seconds=MEETING_S)
    outcomes = await send_together(front, replace(front, service=second), path=path)
    assert [outcome.status for outcome in outcomes] == [200, 200]
    assert outcomes[0].text == outcomes[1].text
    assert front.paid_for == (path == TALKING, 1)


@pytest.mark.parametrize("storage_s", [0, 0.05])
@both_routes
async def test_double_clicks_spread_over_two_instances(
    front: FrontEnd, second: Service, path: str, storage_s: float
) -> None:
    """However slow the storage is: all succeed, with equal bytes; each key pays for one video and speech."""
    for call in ("upload", "move", "objects", "storage", "public"):
        front.sandbox.fault(call, "slow", times=None, seconds=storage_s)
    outcomes: dict[int, list[JobOutcome]] = {number: [] for number in range(5)}

    async def click(number: int, service: Service) -> None:
        changes = {"prompt": f"Trick {number}"}
        if path == TALKING:
            changes["text"] = f"I am {number}"
        one = replace(front, service=service, key=f"{front.key}-{number}", changes=changes)
        outcomes[number].append(await one.send(path))

    async with anyio.create_task_group() as tasks:
        for number in outcomes:
            tasks.start_soon(click, number, front.service)
            tasks.start_soon(click, number, second)
    for one, two in outcomes.values():
        assert (one.status, two.status, one.text) == (200, 200, two.text)
    assert len(front.sandbox.predictions) == len(outcomes)
    assert [count for count in front.sandbox.speeches.values() if count != 1] == []


# What stays rejected


@both_forms
@pytest.mark.parametrize("outcome", ["failed", "canceled", "aborted", "expired"])
async def test_a_job_without_a_video_stays_rejected(
    front: FrontEnd, outcome: str, form: str
) -> None:
    """The same 400 again, and nothing is paid for: a new attempt needs a new key."""
    if outcome == "expired":
        front.fault("output", status=403)
        assert (await front.send()).status == 500
        front.sandbox.expire(next(iter(front.sandbox.predictions)))
    else:
        front.sandbox.outcome(outcome)
    for _ in range(2):
        refused = await front.send(form=form)
        assert refused.kind == (400, "provider", False)
        assert ("has expired" if outcome == "expired" else f"ended as {outcome}") in refused.data[
            "detail"
        ]
        assert set(refused.data["partial"]) >= {"audio_url", "prediction_id"}
    assert front.paid_for == (1, 1)


@pytest.mark.parametrize(
    "is_recorded", [True, False], ids=["while the video is made", "before its id is recorded"]
)
async def test_the_deadline_is_final(
    start_once: StartService, front: FrontEnd, is_recorded: bool
) -> None:
    """The prediction is cancelled and the log has it: the next request is refused in the same words."""
    front.service = start_once(JOB_TIMEOUT_SECONDS="1", RETRY_FIRST_SECONDS="1.2")
    front.sandbox.outcome("never")
    if not is_recorded:  # its write fails, and is retried
        front.fault("upload", 2, status=503)
    late = await front.send(SILENT, "events" if is_recorded else "json")
    [prediction] = front.sandbox.predictions.values()
    assert late.kind == (500, "provider", False)
    assert (prediction.status, front.record["partial"]) == (
        "canceled",
        {"prediction_id": prediction.id},
    )
    outcome = await front.send(SILENT)
    assert outcome.kind == late.kind
    assert outcome.data["detail"] == late.data["detail"] == front.record["refusal"]["detail"]
    assert ("was not done after 1 s" in late.data["detail"], front.paid_for) == (True, (0, 1))


@pytest.mark.parametrize("status", [401, 402, 403, 410])
async def test_a_rejected_poll_does_not_refuse_the_job_for_good(
    front: FrontEnd, start_once: StartService, status: int
) -> None:
    """A token or a plan can be put right: the next request delivers the video that was paid for."""
    front.service = start_once(PATIENCE_SECONDS="0.8")  # 401 and 403 are retried for 0.2 s
    front.fault("poll", status=status, times=None)
    assert (await front.send(SILENT)).kind == (500, "provider", False)
    front.sandbox.wire.faults["poll"].clear()
    assert ((await front.send(SILENT)).status, front.paid_for) == (200, (0, 1))


@pytest.mark.parametrize(
    ("path", "status"), [(SILENT, 400), (TALKING, 200)], ids=["silent video", "final video"]
)
async def test_a_result_whose_video_has_expired_is_no_answer(
    front: FrontEnd, path: str, status: int
) -> None:
    """An hour later a silent video's URL leads nowhere; a final video in the bucket is still there."""
    assert (await front.send(path)).status == 200
    front.grow_old()
    for _ in range(2):
        outcome = await front.send(path)
        assert outcome.status == status
        assert status == 200 or (
            outcome.kind == (400, "provider", False) and "has expired" in outcome.data["detail"]
        )
    assert front.paid_for == (path == TALKING, 1)


@both_forms
async def test_a_key_belongs_to_one_body_and_one_route(front: FrontEnd, form: str) -> None:
    """Another body or route is rejected by the header's name, while the job runs and after it."""
    front.sandbox.video_seconds = 0.5
    others: list[dict[str, Any]] = [{"text": "Feed him!"}, {"path": SILENT}, {"seconds": 10}]

    async def check_others() -> None:
        for changes in others:
            outcome = await front.send(form=form, **changes)
            assert outcome.kind == (400, "validation", False)
            assert [fault["loc"] for fault in outcome.data["errors"]] == [
                ["header", "Idempotency-Key"]
            ]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(front.send)
        assert await wait_until(lambda: front.sandbox.predictions)
        await check_others()
    await check_others()
    assert front.paid_for == (1, 1)


async def test_defaults_written_out_are_the_same_body(front: FrontEnd) -> None:
    """The same job is replayed, whichever optional fields a front end writes."""
    first = await front.send()
    defaults = {"seconds": 6, "resolution": "768p", "model": None, "fit": "shortest"}
    for changes in (defaults, {"fit": "shortest"}):
        outcome = await front.send(**changes)
        assert (outcome.text, outcome.is_replayed) == (first.text, True)
    assert front.paid_for == (1, 1)


# Requests that are refused before anything is paid for, by what the front end sent, or the call that is refused.
REFUSALS: dict[str, tuple[dict[str, Any], str, int]] = {
    "body": ({"seconds": 0}, "", 0),
    "text": ({"text": "x" * 601}, "", 0),
    "resolution": ({"resolution": "4k"}, "", 0),
    "model": ({"model": "nobody/nothing"}, "", 0),
    "picture": ({}, "picture", 404),
    "speech": ({}, "speech", 400),
}


@pytest.mark.parametrize("is_same_body", [True, False], ids=["the same body", "another body"])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_key_is_not_used_up_by_a_refusal_before_payment(
    front: FrontEnd, refusal: str, is_same_body: bool
) -> None:
    """A check leaves no file; the key is good for the same body, and for another one."""
    changes, call, status = REFUSALS[refusal]
    if call:
        front.fault(call, status=status, times=None)
    for _ in range(2):
        assert (await front.send(**changes)).status == 400
    for faults in front.sandbox.wire.faults.values():
        faults.clear()
    if refusal != "speech":  # claimed before ElevenLabs refuses it
        assert [path for path in front.sandbox.objects if "jobs/" in path] == []

    if changes or not is_same_body:
        changes = {"text": "Feed him!", "seconds": 10}
    outcome = await front.send(**changes)
    assert (outcome.status, outcome.is_replayed) == (200, False), outcome.text
    assert len(front.sandbox.predictions) == 1


async def test_a_finished_job_is_replayed_before_any_check(
    front: FrontEnd, second: Service
) -> None:
    """Neither a picture nor a model that is gone by now keeps the answer back."""
    front.changes = {"model": "wan-video/wan-2.2-i2v-fast"}
    first = await front.send(SILENT)
    assert first.status == 200, first.text
    for call in ("picture", "model"):
        front.sandbox.fault(call, "status", times=None, status=404)
    again = await replace(front, service=second).send(SILENT)
    assert (again.text, again.is_replayed) == (first.text, True)


@pytest.mark.parametrize(
    "key", ["", "a b", "x" * 256, "ключ".encode()], ids=["empty", "blank", "long", "not ASCII"]
)
async def test_a_malformed_key_is_rejected(front: FrontEnd, key: str | bytes) -> None:
    """The error names the header, and no provider is called; 255 characters are allowed."""
    for path in BODIES:
        outcome = await replace(front, key=key).send(path)
        message = "must be 1 to 255 visible ASCII characters, such as a UUID"
        assert outcome.kind == (400, "validation", False)
        [fault] = outcome.data["errors"]
        assert (fault["loc"], fault["msg"]) == (["header", "Idempotency-Key"], message)
    assert front.sandbox.requests == []
    assert (await replace(front, key="!~" + "x" * 253).send(SILENT)).status == 200


# The job's log


@both_routes
async def test_a_bucket_that_takes_no_json_costs_nothing(front: FrontEnd, path: str) -> None:
    """The first entry cannot be written: an error before anything is paid for."""
    front.sandbox.buckets["pets"].allowed_mime_types = ["audio/mpeg", "video/mp4"]
    outcome = await front.send(path)
    assert (outcome.kind, front.paid_for) == ((500, "resource", False), (0, 0))
    assert "application/json is not supported" in outcome.data["detail"]


@pytest.mark.parametrize("content", ["<html>", "[]", '{"body": "x"}'])
@pytest.mark.parametrize("name", ["/0001.json", ".json"], ids=["entry", "earlier version's"])
@both_routes
async def test_an_unusable_file_costs_nothing(
    front: FrontEnd, path: str, name: str, content: str
) -> None:
    """One that is not the service's own is an error before anything is paid for."""
    await front.store(front.log_path + name, content)
    outcome = await front.send(path)
    assert (outcome.kind, front.paid_for) == ((500, "resource", False), (0, 0))
    assert front.log_path.removeprefix("pets/") + name in outcome.data["detail"]
    assert "is not one of this service's; remove it" in outcome.data["detail"]


FORGERIES: dict[str, dict[str, Any]] = {
    "script": {"result": {"video_url": "javascript:alert(1)"}},
    "script in what is done": {"partial": {"video_url": "javascript:alert(1)"}},
    "local file": {"partial": {"audio_url": "file:///etc/passwd"}},
    "prediction id": {"partial": {"prediction_id": "../account"}},
    "long detail": {
        "refusal": {
            "http_status": 400,
            "category": "provider",
            "provider": "replicate",
            "detail": "x" * 1_001,
        }
    },
    "owner": {"owner": "somebody"},
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_entry_is_refused(front: FrontEnd, forgery: str) -> None:
    """Nothing of it is delivered, called or paid for: the bucket is trusted no more than a request."""
    assert (await front.send(SILENT)).status == 200
    entry = front.record
    if forgery != "script":
        del entry["result"]
    await front.store(front.entry_paths[-1], {**entry, **FORGERIES[forgery]})
    calls_before = len(front.sandbox.requests)
    outcome = await front.send(SILENT)
    assert outcome.kind == (500, "resource", False)
    assert "partial" not in outcome.data
    assert "is not one of this service's" in outcome.data["detail"]
    calls = [request.call for request in front.sandbox.requests[calls_before:]]
    assert calls == ["objects", "storage"]


@pytest.mark.parametrize(
    ("created_at", "age_s"),
    [
        pytest.param("1970-01-01T00:00:10Z", 90.0, id="a date"),
        pytest.param("1970-01-01T01:00:10+01:00", 90.0, id="of another zone"),
        pytest.param("1970-01-01T00:00:10", 0.0, id="of no zone"),
        pytest.param("1970-01-01T00:10:00Z", 0.0, id="in the future"),
        pytest.param("yesterday", 0.0, id="no date"),
        pytest.param(None, 0.0, id="nothing"),
    ],
)
def test_an_entry_of_unknown_age_is_young(created_at: str | None, age_s: float) -> None:
    """Its owner is waited for rather than replaced."""
    assert main.age_of(created_at, 100.0) == age_s
    assert main.age_of(created_at, None) == 0.0


async def test_an_entry_that_is_listed_but_missing_pays_for_nothing(front: FrontEnd) -> None:
    """Nothing found does not mean that nothing was paid for; the next request finds it."""
    first = await front.send(SILENT)
    front.sandbox.fault("storage", "status", times=4, status=404)
    assert (await front.send(SILENT)).kind == (500, "resource", True)
    assert (await front.send(SILENT)).text == first.text
    assert front.paid_for == (0, 1)


@pytest.mark.parametrize("call", ["objects", "storage"])
async def test_a_failed_read_of_the_log_is_retried(front: FrontEnd, call: str) -> None:
    """Four attempts are made; then the job ends without having paid for anything."""
    front.sandbox.fault(call, "status", times=7, status=503)
    assert (await front.send()).kind == (500, "resource", True)
    assert (len(front.sandbox.calls(call)), front.paid_for) == (4, (0, 0))
    assert ((await front.send()).status, front.paid_for) == (200, (1, 1))


@pytest.mark.parametrize("call", ["upload", "move"])
@pytest.mark.parametrize("fault", ["lost", "cut"])
@both_routes
async def test_an_entry_whose_answer_is_lost_is_written_once(
    calm: FrontEnd, path: str, call: str, fault: str
) -> None:
    """Whether the storage has carried the call out or not, the job goes on, and no number is left out."""
    calm.fault(call, kind=fault)
    outcome = await calm.send(path)
    assert (outcome.status, calm.paid_for) == (200, (path == TALKING, 1))
    assert len(calm.entries) == (4 if path == TALKING else 3)


async def test_the_content_of_the_log(calm: FrontEnd) -> None:
    """Enough to resume, under a name that cannot be guessed; no input of the user and no key."""
    front = calm
    private = {"text": "A private text", "prompt": "A private prompt"}
    outcome = await front.send(**private)
    names = [f"{front.log_path}/{number:04}.json" for number in (1, 2, 3, 4)]
    assert [path for path in front.sandbox.objects if "/jobs/" in path] == names
    assert [entry.get("claim") for entry in front.entries] == ["speech", "video", None, None]

    audio_url = outcome.data["audio_url"]
    [prediction_id] = front.sandbox.predictions
    created = {"audio_url": audio_url, "prediction_id": prediction_id}
    done = {**created, "video_url": outcome.data["video_url"]}
    partials = [entry["partial"] for entry in front.entries]
    assert partials == [{}, {"audio_url": audio_url}, created, done]
    always = {"entry_id", "owner", "request_digest", "partial"}
    assert set(front.record) == {*always, "result"}
    assert front.record["result"] == outcome.data

    keys = [
        value
        for name, value in front.sandbox.environment().items()
        if name.endswith(("_KEY", "_TOKEN", "_ROLE"))
    ]
    secrets = [
        *private.values(),
        front.sandbox.image_url,
        front.sandbox.voice_id,
        str(front.key),
        *keys,
    ]
    for path in front.entry_paths:
        stored = front.sandbox.objects[path]
        assert stored.content_type == "application/json"
        assert [secret for secret in secrets if secret in stored.read().decode()] == []


async def test_the_order_of_the_uploads(calm: FrontEnd) -> None:
    """A claim comes before what it pays for, and each entry gets its number before the next step."""
    await calm.send()
    steps = [
        f"{request.call} {request.path.split('/pets/')[-1].partition('/')[0]}"
        for request in calm.sandbox.requests
        if request.call in ("upload", "speech", "create")
    ]
    assert [step.split()[0] if "upload" not in step else step for step in steps] == [
        "upload jobs",  # a claim
        "speech",
        "upload audio",
        "upload jobs",  # a claim, with the speech's URL
        "create",
        "upload jobs",  # the prediction
        "upload videos",
        "upload jobs",  # the result
    ]


@both_routes
async def test_the_storage_calls_that_a_key_costs(calm: FrontEnd, path: str) -> None:
    """One list, one read for an earlier version's file, and an upload and a move for each entry."""

    async def calls(key: str | None) -> Counter[str]:
        calm.sandbox.wire.clear()
        assert (await replace(calm, key=key).send(path)).status == 200
        return Counter(request.call for request in calm.sandbox.requests)

    calm.sandbox.polls_to_finish = 1
    without = await calls(None)
    entries = 4 if path == TALKING else 3
    expected = {"objects": 1, "storage": 1, "upload": entries, "move": entries}
    assert await calls(str(calm.key)) - without == expected
    assert without.keys().isdisjoint({"objects", "storage", "move", "list"})


# Records of earlier versions, which a deploy overlaps


async def test_a_legacy_record_with_an_answer_is_replayed(front: FrontEnd) -> None:
    """The job is done, whichever version did it."""
    answer = {name: f"https://example.com/{name}" for name in ("audio_url", "video_url")}
    answer["final_url"] = "https://example.com/final"
    await front.store_legacy_record(answer=answer, writer="")
    outcome = await front.send()
    assert (outcome.is_replayed, front.paid_for) == (True, (0, 0))
    assert answer.items() <= outcome.data.items(), "what was not recorded then is null"


async def test_a_legacy_record_with_a_prediction_is_resumed(front: FrontEnd) -> None:
    """What an earlier version has paid for is polled and delivered."""
    first = await replace(front, key=None).send(SILENT)
    [prediction_id] = front.sandbox.predictions
    await front.store_legacy_record(SILENT, partial={"prediction_id": prediction_id})
    outcome = await front.send(SILENT)
    assert (outcome.status, outcome.data, front.paid_for) == (200, first.data, (0, 1))


async def test_a_fresh_legacy_record_is_waited_for(calm: FrontEnd) -> None:
    """An instance of the earlier version is at work: its answer is the answer."""
    answer = {"video_url": "https://example.com/video.mp4"}
    await calm.store_legacy_record(SILENT)
    outcomes: list[JobOutcome] = []

    async def send() -> None:
        outcomes.append(await calm.send(SILENT))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        assert await wait_until(lambda: len(calm.sandbox.calls("storage")) >= 2)
        assert outcomes == []
        await calm.store_legacy_record(SILENT, answer=answer)
    assert (outcomes[0].data, calm.paid_for) == (answer, (0, 0))


async def test_a_stale_legacy_record_is_searched_for(front: FrontEnd) -> None:
    """Its prediction may not have been recorded: only if it is not found, it is created."""
    await front.store_legacy_record(SILENT, written=time.time() - 60)
    assert ((await front.send(SILENT)).status, front.paid_for) == (200, (0, 1))
    calls = [request.call for request in front.sandbox.requests]
    assert calls.index("list") < calls.index("create")
    assert len(front.entries) == 3


async def test_an_unrecorded_prediction_of_a_legacy_record_is_found(
    front: FrontEnd, second: Service
) -> None:
    """It was created just before the earlier version's process ended, here by another instance."""
    first = await replace(front, key=None, service=second).send(SILENT)
    await front.store_legacy_record(SILENT, written=time.time() - 60)
    outcome = await front.send(SILENT)
    assert (outcome.status, outcome.data, front.paid_for) == (200, first.data, (0, 1))


async def test_a_legacy_record_belongs_to_one_body(front: FrontEnd) -> None:
    """Another body is rejected, as with a log."""
    await front.store_legacy_record(SILENT)
    outcome = await front.send(SILENT, prompt="The cat sings")
    assert outcome.kind == (400, "validation", False)


# A create whose response is lost


@pytest.mark.parametrize("is_keyed", [True, False], ids=["with a key", "without"])
@pytest.mark.parametrize("fault", ["lost", "behind"])
async def test_equal_jobs_whose_create_responses_are_lost_get_a_video_each(
    front: FrontEnd, fault: str, is_keyed: bool
) -> None:
    """Each finds a prediction that the other has not claimed; none is paid for twice."""
    front.sandbox.fault("create", fault, times=2)
    one, two = await send_together(
        *(replace(front, key=str(uuid.uuid4()) if is_keyed else None) for _ in range(2))
    )
    assert (one.status, two.status) == (200, 200)
    assert (one.data["video_url"] != two.data["video_url"], front.paid_for) == (True, (2, 2))


async def test_a_create_that_was_never_carried_out_is_made_by_the_next_request(
    front: FrontEnd,
) -> None:
    """It is searched for and not found: a 500; with the key the next request searches again, then creates it."""
    front.fault("create", kind="cut")
    assert (await front.send()).kind == (500, "provider", True)
    looks = len(front.sandbox.calls("list"))
    assert (looks >= 2, front.paid_for) == (True, (1, 0))
    assert ((await front.send()).status, front.paid_for) == (200, (1, 1))
    assert len(front.sandbox.calls("list")) > looks


# Without a key


async def test_without_a_key_only_the_record_is_missing(front: FrontEnd) -> None:
    """The providers get the same bytes, with no list, read or record between; two requests pay twice."""

    async def sent(key: str | None) -> list[tuple[str, bytes]]:
        front.sandbox.wire.clear()
        assert (await replace(front, key=key).send(SILENT)).status == 200
        return [(f"{one.call} {one.method} {one.path}", one.body) for one in front.sandbox.requests]

    front.sandbox.polls_to_finish = 1
    plain, keyed = await sent(None), await sent("a-key")
    first, second = front.sandbox.predictions
    assert [call.split()[0] for call, _ in plain] == ["picture", "create", "poll"]
    assert [
        (call.replace(second, first), body) for call, body in keyed if "storage" not in call
    ] == plain


async def test_a_prediction_missing_from_the_record_is_found(
    front: FrontEnd, start_once: StartService
) -> None:
    """The storage failed from the create on: the next request finds its prediction in Replicate's list."""
    front.service = start_once(PATIENCE_SECONDS="0.8")
    front.fault("upload", 2, status=503, times=None)
    assert (await front.send(SILENT)).kind == (500, "resource", True)
    assert "prediction_id" not in front.record["partial"]
    front.sandbox.wire.faults["upload"].clear()
    outcome = await front.send(SILENT)
    assert (outcome.status, outcome.is_replayed, front.paid_for) == (200, False, (0, 1))


# What a review found


async def test_a_job_that_meets_a_full_disk_gives_its_claim_up(calm: FrontEnd) -> None:
    """An error of the machine is no silence: the next request goes on at once."""
    calm.fault("speech", kind="status", status=200, body=b"no speech")
    assert (await calm.send()).status == 500
    assert calm.record["owner"] == ""


async def test_a_create_that_was_certainly_not_made_is_not_searched_for(calm: FrontEnd) -> None:
    """After a 402 the next request creates at once, without a look at Replicate's list."""
    calm.fault("create", status=402)
    assert (await calm.send(SILENT)).status == 500
    outcome = await calm.send(SILENT)
    assert (outcome.status, calm.sandbox.calls("list")) == (200, [])


async def test_an_error_of_the_search_does_not_hide_the_creates(front: FrontEnd) -> None:
    """The client learns of the create, and that it may send the same again."""
    front.fault("create", status=500)
    front.sandbox.fault("list", "status", times=None, status=401)
    failed = await front.send(SILENT)
    assert (failed.status, failed.data["retryable"]) == (500, True)
    assert "answered 500" in failed.data["detail"]


async def test_a_resumed_job_is_not_judged_by_todays_settings(
    front: FrontEnd, start_once: StartService
) -> None:
    """What is paid for is delivered, also under a smaller limit and another format of the speech."""
    front.fault("output", status=403)
    assert (await front.send()).status == 500
    stricter = start_once(
        TTS_MAX_CHARS="2", TTS_OUTPUT_FORMAT="pcm_16000", ALLOWED_MODELS="google/veo-3"
    )
    outcome = await replace(front, service=stricter).send()
    assert (outcome.status, front.paid_for) == (200, (1, 1)), outcome.text


async def test_a_model_that_is_missing_for_a_moment_does_not_refuse_a_paid_video(
    front: FrontEnd, start_once: StartService
) -> None:
    """The look-up of another process gets a 404: the job may be sent again, and its video is delivered."""
    front.changes = {"model": "wan-video/wan-2.2-i2v-fast"}
    front.fault("poll", status=401, times=None)
    assert (await front.send(SILENT)).status == 500
    front.sandbox.wire.faults["poll"].clear()

    front.sandbox.fault("model", "status", status=404)
    second, third = start_once(number=2), start_once(number=3)
    assert (await replace(front, service=second).send(SILENT)).kind == (500, "provider", True)
    outcome = await replace(front, service=third).send(SILENT)
    assert (outcome.status, front.paid_for) == (200, (0, 1)), outcome.text


async def test_a_video_that_may_exist_is_not_refused_for_its_picture(
    front: FrontEnd, start_once: StartService
) -> None:
    """The answer to the create was lost, and the picture's URL has expired since: the video is found."""
    front.service = start_once(PATIENCE_SECONDS="0.8")
    front.fault("create", kind="lost")
    front.sandbox.fault("list", "status", times=None, status=500)
    assert (await front.send(SILENT)).status == 500
    front.sandbox.wire.faults["list"].clear()
    front.sandbox.fault("picture", "status", times=None, status=404)
    outcome = await front.send(SILENT)
    assert (outcome.status, front.paid_for) == (200, (0, 1)), outcome.text
