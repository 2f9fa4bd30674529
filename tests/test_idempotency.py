"""The same request again, over real sockets: whatever happened in between, one video is paid for, and it is delivered."""

from __future__ import annotations

import hmac
import itertools
import json
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import httpx
import pytest

from tests.conftest import PACE, StartService
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

FORMS: dict[str, dict[str, str]] = {"json": {}, "events": EVENT_STREAM}
SILENT, TALKING = "/jobs_prompt_only", "/jobs_prompt_tts"
BODIES = {SILENT: prompt_job, TALKING: speech_job}
BEGUN, SPEECH, SPOKEN, CREATED, VIDEO, DONE = range(1, 7)  # the uploads of a talking job, most of them its file
MEETING_S = 0.3  # time in which two requests surely meet

both_routes = pytest.mark.parametrize("path", BODIES)
both_forms = pytest.mark.parametrize("form", FORMS)


@dataclass
class FrontEnd:
    """Whoever sends one job again and again, to one instance of the service, with one key."""

    sandbox: Sandbox
    service: Service
    key: str | bytes | None
    form: str = "json"
    changes: dict[str, Any] = field(default_factory=dict)

    async def send(self, path: str = TALKING, form: str = "", **changes: Any) -> JobOutcome:
        """Send the job and hear what comes of it."""
        body, headers = BODIES[path](self.sandbox, **self.changes, **changes), list(FORMS[form or self.form].items())
        headers += [] if self.key is None else [("Idempotency-Key", self.key), ("X-Request-ID", str(self.key)[:36])]
        return await send_job(self.service.url, path, body, headers)

    async def leave(self, path: str, form: str, when: Callable[[], Any]) -> None:
        """Send the job, and leave it then."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.send, path, form)
            assert await wait_until(when)
            tasks.cancel_scope.cancel()

    @property
    def record_path(self) -> str:
        """Where the job's file lies: only who has the service role key can tell."""
        digest = hmac.new(KEYS["service"].encode(), str(self.key).encode(), "sha256").hexdigest()
        return f"pets/jobs/{digest}.json"

    @property
    def record(self) -> dict[str, Any]:
        """What the job's file holds."""
        record: dict[str, Any] = json.loads(self.sandbox.objects[self.record_path].read())
        return record

    @property
    def paid_for(self) -> tuple[int, int]:
        """Speeches and videos."""
        return self.sandbox.speeches.total(), len(self.sandbox.predictions)

    def fault(self, call: str, number: int = 1, kind: str = "status", **details: Any) -> None:
        """Let one such call go wrong, counted from the next."""
        for _ in range(number - 1):
            self.sandbox.fault(call, "slow", seconds=0)
        self.sandbox.fault(call, kind, **details)


@pytest.fixture(scope="module")
def running_sandbox() -> Iterator[Sandbox]:
    """A sandbox of these tests alone: jobs with a key outlive their requests, and could buy in other tests."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def start_once(running_sandbox: Sandbox) -> Iterator[StartService]:
    """An instance of the service on that sandbox; tests that want the same settings share it."""
    with ExitStack() as services:

        @lru_cache
        def start(number: int = 1, **changes: str) -> Service:
            return services.enter_context(Service({**running_sandbox.environment(), **PACE, **changes}))

        yield start


@pytest.fixture
def front(sandbox: Sandbox, start_once: StartService) -> FrontEnd:
    """A front end with a key that no other test has; videos cost little."""
    sandbox.video(short_video())
    return FrontEnd(sandbox, start_once(), str(uuid.uuid4()))


@pytest.fixture
def second(start_once: StartService) -> Service:
    """A second instance of the service."""
    return start_once(2)


async def send_together(*fronts: FrontEnd, when: Callable[[], Any] = lambda: True) -> list[JobOutcome]:
    """What comes of requests that run at the same time, each sent once it is time for the next one."""
    outcomes: list[JobOutcome] = []

    async def one(front: FrontEnd) -> None:
        outcomes.append(await front.send())

    async with anyio.create_task_group() as tasks:
        for front in fronts:
            tasks.start_soon(one, front)
            assert await wait_until(when)
    return outcomes


# Leaving, asking again, joining


@both_forms
@both_routes
async def test_a_job_goes_on_when_its_client_leaves(front: FrontEnd, path: str, form: str) -> None:
    """Nothing is cancelled; whoever asks again after its end gets the answer, told as one from before."""
    front.sandbox.video_seconds = 0.3
    await front.leave(path, form, lambda: front.sandbox.predictions)
    assert await wait_until(lambda: f"request_id={front.key} job outcome=ok" in front.service.log)
    requests_before = len(front.sandbox.requests)
    outcome = await front.send(path, form)
    assert (outcome.status, outcome.is_replayed, outcome.stages) == (200, True, [])
    assert outcome.data == front.record["answer"]
    assert [call.call for call in front.sandbox.requests[requests_before:]] == ["storage"], (
        "the file is read, and that is all"
    )
    assert (front.paid_for, front.sandbox.calls("cancel")) == ((path == TALKING, 1), [])


@both_routes
async def test_any_number_may_wait_for_one_job(front: FrontEnd, path: str) -> None:
    """Whoever comes while it runs hears the stages so far and gets the same bytes; who leaves ends nothing."""
    front.sandbox.video_seconds = 0.8
    waiters: list[JobOutcome] = []

    async def wait(form: str) -> None:
        waiters.append(await front.send(path, form))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "events")
        assert await wait_until(lambda: front.sandbox.calls("read"))
        await front.leave(path, "events", lambda: f"joins the job of request_id={front.key}" in front.service.log)
        for form in ("json", "events", "json"):
            tasks.start_soon(wait, form)
    assert [(outcome.status, outcome.is_replayed, outcome.text) for outcome in waiters] == [
        (200, False, waiters[0].text)
    ] * 4
    first, late = (outcome.stages for outcome in waiters if outcome.stages)
    stages = STAGES if path == TALKING else ("video",)
    assert first == late == [(stage, state) for stage in stages for state in ("started", "done")]
    assert front.paid_for == (path == TALKING, 1)


# Going on after a failure

# What makes a job fail with a 500 at each step: the call, which one of them it is, and its answer.
FAILURES = {
    "speech": ("speech", 1, 401), "audio_upload": ("upload", SPEECH, 403), "fetch": ("public", 1, 403),
    "create": ("create", 1, 402), "video": ("read", 1, 410), "download": ("output", 1, 403),
    "mux": None, "final_upload": ("upload", VIDEO, 403),
}  # fmt: skip


@both_forms
@pytest.mark.parametrize("step", FAILURES)
async def test_a_failed_job_is_gone_on_with(front: FrontEnd, step: str, form: str) -> None:
    """After a 500 nothing is bought, or looked at, again; only a speech that was not stored is spoken again."""
    if failure := FAILURES[step]:
        call, number, status = failure
        front.fault(call, number, status=status)
    else:
        front.sandbox.video(b"\0\0\0\x08ftyp")
    failed = await front.send(form=form)
    assert failed.status == 500
    for prediction in front.sandbox.predictions.values():  # ffmpeg could not use the video, and now can
        prediction.video = short_video()
    known = failed.data.get("partial", {})
    if "prediction_id" in known:  # the picture was needed for that only
        front.sandbox.fault("picture", "status", times=None, status=404)
    outcome = await front.send(form=form)
    assert (outcome.status, outcome.is_replayed) == (200, False), outcome.text
    assert known.items() <= {**outcome.data, "prediction_id": next(iter(front.sandbox.predictions))}.items()
    assert front.paid_for == (2 if step == "audio_upload" else 1, 1)
    assert form == "json" or (("speech", "started") in outcome.stages) == ("audio_url" not in known)


# Where jobs stand when their process ends: the call, and which one of them it is. What comes of the last two is awaited
# whatever happens, so they are held for a while only.
HOLDS = {
    "begun": ("upload", BEGUN), "speech": ("speech", 1), "audio_upload": ("upload", SPEECH),
    "spoken": ("upload", SPOKEN), "video": ("read", 1), "download": ("output", 1),
    "final_upload": ("upload", VIDEO), "done": ("upload", DONE),
    "create": ("create", 1), "created": ("upload", CREATED),
}  # fmt: skip


HOLD_S = {"create": 4, "created": 2}


def has_taken_effect(front: FrontEnd, stage: str, stored_before: int) -> bool:
    """Whether the call that holds a job at this stage has been carried out by the provider."""
    stored = len(front.sandbox.objects) - stored_before  # the job's record, its speech and its final video
    if stage == "speech":
        return front.sandbox.speeches[f"I am {stage}"] == 1
    if stage in ("create", "video", "download"):
        return bool(front.sandbox.created(prompt=stage))
    if stage in ("begun", "audio_upload", "final_upload"):
        return stored >= {"begun": 1, "audio_upload": 2, "final_upload": 3}[stage]
    if stage == "done":
        return "answer" in front.record
    return {"spoken": "audio_url", "created": "prediction_id"}[stage] in front.record["partial"]


class Resumed(NamedTuple):
    """Jobs that their process did not finish: what came of them, of the same requests again, and the files between."""

    sandbox: Sandbox
    first: dict[str, JobOutcome]
    again: dict[str, JobOutcome]
    records: dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=[signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def resumed(request: pytest.FixtureRequest) -> Resumed:
    """A process that holds a job at every stage is ended without time, and the same requests go to the next one."""
    pace = {**PACE, "PATIENCE_SECONDS": "8"}  # else a job on a busy machine writes further notes meanwhile
    with Sandbox() as sandbox, Service({**sandbox.environment(), **pace}, graceful_s=0) as service:
        sandbox.video(short_video())
        forms, fronts = itertools.cycle(FORMS), {}
        for stage in HOLDS:
            changes = {"prompt": stage, "text": f"I am {stage}"}
            fronts[stage] = FrontEnd(sandbox, service, str(uuid.uuid4()), next(forms), changes)
        return anyio.run(end_and_send_again, sandbox, fronts, service, request.param)


async def end_and_send_again(sandbox: Sandbox, fronts: dict[str, FrontEnd], service: Service, by: int) -> Resumed:
    """Hold a job at every stage, end the process, start it again, and send the same requests."""
    resumed = Resumed(sandbox, {}, {}, {})

    async def send(stage: str, outcomes: dict[str, JobOutcome]) -> None:
        with suppress(httpx.HTTPError):  # a process that is killed says nothing
            outcomes[stage] = await fronts[stage].send()

    async with anyio.create_task_group() as tasks:
        for stage, (call, number) in HOLDS.items():
            wanted, stored_before = len(sandbox.calls(call)) + number, len(sandbox.objects)
            fronts[stage].fault(call, number, "slow", seconds=HOLD_S.get(stage, 60))
            tasks.start_soon(send, stage, resumed.first)
            assert await wait_until(lambda call=call, n=wanted: len(sandbox.calls(call)) >= n), f"no job at {stage}"
            # The provider has heard of the call; its effect is there a moment later, and only its answer is held.
            is_done = partial(has_taken_effect, fronts[stage], stage, stored_before)
            assert await wait_until(is_done), f"the call at {stage} has no effect"
        assert await wait_until(lambda: sandbox.created(prompt="create"))
        await anyio.to_thread.run_sync(service.stop, by)
    resumed.records.update((stage, front.record) for stage, front in fronts.items())
    await anyio.to_thread.run_sync(service.start)
    async with anyio.create_task_group() as tasks:
        for stage in HOLDS:
            tasks.start_soon(send, stage, resumed.again)
    return resumed


@pytest.mark.parametrize("stage", HOLDS)
def test_a_job_outlives_its_process(resumed: Resumed, stage: str) -> None:
    """The next process goes on from what exists: one video is paid for, never cancelled, and delivered."""
    outcome = resumed.again[stage]
    assert (outcome.status, outcome.is_replayed) == (200, stage == "done"), outcome.text
    assert [prediction.status for prediction in resumed.sandbox.created(prompt=stage)] == ["succeeded"]
    assert resumed.sandbox.speeches[f"I am {stage}"] == (2 if stage in ("speech", "audio_upload") else 1)


def test_a_process_that_is_told_to_end_says_so(resumed: Resumed, request: pytest.FixtureRequest) -> None:
    """SIGTERM leaves nobody without a word, and no prediction without a note; SIGKILL leaves all."""
    if "SIGKILL" in request.node.name:
        assert resumed.first == {}
        return
    assert {stage for stage, outcome in resumed.first.items() if outcome.status == 200} == {"done"}
    failed = [outcome for stage, outcome in resumed.first.items() if stage != "done"]
    assert {outcome.kind for outcome in failed} == {(500, "internal", True)}
    assert all("send the same request again" in outcome.data["detail"] for outcome in failed)
    assert set(resumed.first) == set(HOLDS)
    paid_for = set(HOLDS) - {"begun", "speech", "audio_upload", "spoken"}
    assert {stage for stage, record in resumed.records.items() if "prediction_id" in record["partial"]} == paid_for


async def test_a_job_that_nobody_waits_for_may_end_with_its_process(
    start_service: StartService, front: FrontEnd
) -> None:
    """SIGTERM leaves it a while: it is done when the process ends."""
    front.service, front.sandbox.video_seconds = start_service(graceful_s=0), 0.3
    await front.leave(SILENT, "json", lambda: front.sandbox.predictions)
    await anyio.to_thread.run_sync(front.service.stop)
    assert "answer" in front.record


# On another instance


async def test_a_fresh_job_of_another_instance_is_waited_for(front: FrontEnd, second: Service) -> None:
    """It has no prediction yet, but will have: the second instance goes on with that one."""
    front.fault("speech", kind="slow", seconds=MEETING_S)
    one, two = await send_together(front, replace(front, service=second), when=lambda: front.sandbox.calls("speech"))
    assert (one.status, two.status, one.data["video_url"]) == (200, 200, two.data["video_url"])
    assert front.paid_for == (1, 1)


async def test_a_job_that_was_given_up_is_taken_over_at_once(front: FrontEnd, second: Service) -> None:
    """An instance that has failed is not waited for, however fresh its file is."""
    front.fault("speech", status=401)
    assert (await front.send()).status == 500
    requests_before = len(front.sandbox.requests)
    assert (await replace(front, service=second).send()).status == 200
    assert [call.call for call in front.sandbox.requests[requests_before:]][:2] == ["storage", "upload"]


async def test_two_instances_that_begin_at_once_buy_one_video(front: FrontEnd, second: Service) -> None:
    """Neither has seen the other's file: the one that wrote last buys, the other finds its prediction."""
    front.sandbox.fault("storage", "slow", times=2, seconds=MEETING_S)  # both will hear that there is no file
    front.fault("public", kind="slow", seconds=2 * MEETING_S)  # one looks again after the other's last note
    assert [outcome.status for outcome in await send_together(front, replace(front, service=second))] == [200, 200]
    assert front.paid_for == (2, 1)


# What stays refused


@both_forms
@pytest.mark.parametrize("outcome", ["failed", "canceled", "aborted", "expired"])
async def test_a_video_that_cannot_be_had_stays_refused(front: FrontEnd, outcome: str, form: str) -> None:
    """The same 400 again, and nothing is bought: a new try needs a new key."""
    if outcome == "expired":
        front.fault("output", status=403)
        assert (await front.send()).status == 500
        front.sandbox.expire(next(iter(front.sandbox.predictions)))
    else:
        front.sandbox.outcome(outcome)
    for _ in range(2):
        refused = await front.send(form=form)
        assert refused.kind == (400, "provider", False)
        assert ("has expired" if outcome == "expired" else f"ended as {outcome}") in refused.data["detail"]
        assert set(refused.data["partial"]) >= {"audio_url", "prediction_id"}
    assert front.paid_for == (1, 1)


@pytest.mark.parametrize("is_recorded", [True, False], ids=["while the video is made", "before its id is recorded"])
async def test_the_deadline_is_final(start_once: StartService, front: FrontEnd, is_recorded: bool) -> None:
    """The video is cancelled and the file knows it, whatever was going on; the next request gets that refusal."""
    front.service = start_once(JOB_TIMEOUT_SECONDS="1", RETRY_FIRST_SECONDS="1.2")
    front.sandbox.outcome("never")
    if not is_recorded:  # its write fails, and is not given up
        front.fault("upload", 2, status=503)
    late = await front.send(SILENT, "events" if is_recorded else "json")
    [prediction] = front.sandbox.predictions.values()
    assert late.kind == (500, "provider", False)
    assert (prediction.status, front.record["partial"]) == ("canceled", {"prediction_id": prediction.id})
    outcome = await front.send(SILENT)
    assert outcome.kind == (400, "provider", False)
    assert ("ended as canceled" in outcome.data["detail"], front.paid_for) == (True, (0, 1))


@both_forms
async def test_a_key_belongs_to_one_body_and_one_route(front: FrontEnd, form: str) -> None:
    """Another one is refused by the header's name, while the job runs and after it."""
    front.sandbox.video_seconds = 0.5
    others: list[dict[str, Any]] = [{"text": "Feed him!"}, {"path": SILENT}, {"seconds": 6}]

    async def check_others() -> None:
        for changes in others:
            outcome = await front.send(form=form, **changes)
            assert outcome.kind == (400, "validation", False)
            assert [fault["loc"] for fault in outcome.data["errors"]] == [["header", "Idempotency-Key"]]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(front.send)
        assert await wait_until(lambda: front.sandbox.predictions)
        await check_others()
    await check_others()
    assert front.paid_for == (1, 1)


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ключ".encode()], ids=["empty", "blank", "long", "not ASCII"])
async def test_a_malformed_key_is_refused(front: FrontEnd, key: str | bytes) -> None:
    """It is named, in words, and nobody is called; 255 characters are none too many."""
    for path in BODIES:
        outcome = await replace(front, key=key).send(path)
        message = "must be 1 to 255 visible ASCII characters, such as a UUID"
        assert outcome.kind == (400, "validation", False)
        assert outcome.data["errors"] == [{"loc": ["header", "Idempotency-Key"], "msg": message}]
    assert front.sandbox.requests == []
    assert (await replace(front, key="!~" + "x" * 253).send(SILENT)).status == 200


# The file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "application/json is not supported", id="a bucket that takes no such file"),
        *(pytest.param(text, "", id=text) for text in ("<html>", "[]", '{"body": "x"}')),
    ],
)
@both_routes
async def test_a_file_that_does_not_go_costs_nothing(
    front: FrontEnd, path: str, content: str | None, words: str
) -> None:
    """One that cannot be written, or that is not ours, is told before anything is bought."""
    if content is None:
        front.sandbox.buckets["pets"].allowed_mime_types = ["audio/mpeg", "video/mp4"]
    else:
        async with service_client(front.sandbox.url) as client:
            headers = {"Authorization": f"Bearer {KEYS['service']}", "Content-Type": "application/json"}
            await client.post(f"/storage/v1/object/{front.record_path}", content=content, headers=headers)
        words = f"{front.record_path.removeprefix('pets/')} in the bucket is not one of this service's"
    outcome = await front.send(path)
    assert (outcome.kind, front.paid_for) == ((500, "resource", False), (0, 0))
    assert words in outcome.data["detail"]


async def test_a_read_of_the_file_that_fails_is_repeated(front: FrontEnd) -> None:
    """Four times; then the job ends without having bought anything."""
    front.sandbox.fault("storage", "status", times=7, status=503)
    assert (await front.send()).kind == (500, "resource", True)
    assert (len(front.sandbox.calls("storage")), front.paid_for) == (4, (0, 0))
    assert ((await front.send()).status, front.paid_for) == (200, (1, 1))


async def test_what_the_file_holds(front: FrontEnd) -> None:
    """What is required to go on, under a name that cannot be guessed; nothing of what was asked for, and no key."""
    private = {"text": "A private text", "prompt": "A private prompt"}
    outcome, stored = await front.send(**private), front.sandbox.objects[front.record_path]
    assert (stored.content_type, stored.cache_control) == ("application/json", "max-age=0")
    assert set(front.record) == {"body", "started", "written", "writer", "partial", "answer"}
    assert front.record["answer"] == outcome.data
    kept = {name: outcome.data[name] for name in ("audio_url", "video_url")}
    assert front.record["partial"] == {**kept, "prediction_id": next(iter(front.sandbox.predictions))}
    keys = [value for name, value in front.sandbox.environment().items() if name.endswith(("_KEY", "_TOKEN", "_ROLE"))]
    secrets = [*private.values(), front.sandbox.image_url, front.sandbox.voice_id, str(front.key), *keys]
    assert [secret for secret in secrets if secret in stored.read().decode()] == []


# A create whose answer was lost


@pytest.mark.parametrize("is_keyed", [True, False], ids=["with a key", "without"])
@pytest.mark.parametrize("fault", ["lost", "behind"])
async def test_equal_jobs_that_lose_their_answers_get_a_video_each(front: FrontEnd, fault: str, is_keyed: bool) -> None:
    """Each finds one that was made and that the other does not hold; none is bought twice."""
    front.sandbox.fault("create", fault, times=2)
    one, two = await send_together(*(replace(front, key=str(uuid.uuid4()) if is_keyed else None) for _ in range(2)))
    assert (one.status, two.status) == (200, 200)
    assert (one.data["video_url"] != two.data["video_url"], front.paid_for) == (True, (2, 2))


async def test_a_create_that_was_never_carried_out_is_made_by_the_next_request(front: FrontEnd) -> None:
    """It is looked for and not found: 500; with the key it is looked for once more, and then bought."""
    front.fault("create", kind="cut")
    assert (await front.send()).kind == (500, "provider", True)
    looks = len(front.sandbox.calls("list"))
    assert (looks >= 2, front.paid_for) == (True, (1, 0))
    assert ((await front.send()).status, front.paid_for) == (200, (1, 1))
    assert len(front.sandbox.calls("list")) > looks


# Without a key


async def test_without_a_key_nothing_is_different(front: FrontEnd) -> None:
    """The same bytes go to the providers, and no list, no read and no file comes between them; twice pays twice."""

    async def sent(key: str | None) -> list[tuple[str, bytes]]:
        front.sandbox.wire.clear()
        assert (await replace(front, key=key).send(SILENT)).status == 200
        return [(f"{one.call} {one.method} {one.path}", one.body) for one in front.sandbox.requests]

    front.sandbox.reads_to_finish = 1
    plain, keyed = await sent(None), await sent("a-key")
    first, second = front.sandbox.predictions
    assert [call.split()[0] for call, _ in plain] == ["picture", "create", "read"]
    assert [(call.replace(second, first), body) for call, body in keyed if "storage" not in call] == plain


async def test_a_video_whose_notes_were_all_lost_is_not_bought_again(front: FrontEnd, start_once: StartService) -> None:
    """The storage was away from the create on: the next request finds its own prediction in Replicate's list."""
    front.service = start_once(PATIENCE_SECONDS="0.8")
    front.fault("upload", 2, status=503, times=None)
    assert (await front.send(SILENT)).status == 200
    assert "prediction_id" not in front.record["partial"]
    front.sandbox.wire.faults["upload"].clear()
    outcome = await front.send(SILENT)
    assert (outcome.status, outcome.is_replayed, front.paid_for) == (200, False, (0, 1))


async def test_a_speech_that_takes_long_is_not_waited_for_by_two_who_buy(
    front: FrontEnd, start_once: StartService
) -> None:
    """Another instance takes the job over meanwhile: the first one sees that before it buys a video, and delivers that one."""
    fronts = [replace(front, service=start_once(number, PATIENCE_SECONDS="0.8")) for number in (1, 2)]
    front.sandbox.fault("speech", "slow", seconds=1)
    front.sandbox.video_seconds = 1.0
    outcomes = await send_together(*fronts, when=lambda: front.sandbox.calls("speech"))
    assert [outcome.status for outcome in outcomes] == [200, 200]
    assert len(front.sandbox.predictions) == 1
