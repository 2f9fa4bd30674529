"""What must not cost: strangers, the servers and the models that they name, and an unlucky day."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import pickle
import resource
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

import main
from tests.conftest import StartService
from tests.sandbox import Sandbox, Service
from tests.support.application import running_application, set_variables, use_settings
from tests.support.processes import needs_proc, wait_until
from tests.support.requests import prompt_job, service_client, speech_job

pytestmark = pytest.mark.anyio

TOKENS = ("token-of-the-backend", "token-of-the-backend-2")
ORIGIN = {"Origin": "https://app.example.com"}
PUBLIC = "93.184.216.34"
NAME = "hostile.example"
URL = f"http://{NAME}/pet.jpg"
MODEL = "stranger/model"


@asynccontextmanager
async def application(
    monkeypatch: pytest.MonkeyPatch, **variables: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which runs in this process with these settings."""
    set_variables(monkeypatch, **variables)
    async with running_application() as client:
        yield client


async def send_video_job(
    client: httpx.AsyncClient, sandbox: Sandbox, **changes: Any
) -> httpx.Response:
    """The response to a job for a silent video."""
    return await client.post("/jobs_prompt_only", json=prompt_job(sandbox, **changes))


# Access and spending


@pytest.fixture
async def guarded(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application with SERVICE_TOKEN."""
    async with application(monkeypatch, SERVICE_TOKEN=" , ".join(TOKENS)) as client:
        yield client


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param(None, id="none"),
        pytest.param("Bearer another-token", id="another token"),
        pytest.param(f"Basic {TOKENS[0]}", id="another scheme"),
        pytest.param(TOKENS[0], id="no scheme"),
        pytest.param(f"Bearer {','.join(TOKENS)}", id="the whole list"),
        pytest.param("Bearer", id="no token"),
    ],
)
@pytest.mark.parametrize("path", ["/jobs_prompt_only", "/jobs_prompt_tts", "/debug/head"])
async def test_a_post_without_a_valid_token_is_refused(
    guarded: httpx.AsyncClient, sandbox: Sandbox, path: str, authorization: str | None
) -> None:
    """401 with the usual body, readable from a page of another origin; no provider is called."""
    headers = {**ORIGIN, **({"Authorization": authorization} if authorization else {})}
    response = await guarded.post(path, json=speech_job(sandbox), headers=headers)
    error = response.json()
    assert (response.status_code, error["category"], error["retryable"]) == (
        401,
        "validation",
        False,
    )
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["access-control-allow-origin"] == "*"
    assert error["request_id"] == response.headers["x-request-id"]
    assert sandbox.requests == []


@pytest.mark.parametrize("token", TOKENS)
async def test_each_token_is_accepted(
    guarded: httpx.AsyncClient, sandbox: Sandbox, token: str
) -> None:
    """While tokens are changed, both are valid; the scheme's case does not matter."""
    response = await guarded.post(
        "/debug/head", json={"url": sandbox.image_url}, headers={"Authorization": f"bearer {token}"}
    )
    assert response.status_code == 200, response.text


async def test_what_costs_nothing_is_open(guarded: httpx.AsyncClient) -> None:
    """Health checks, the documentation and a browser's preflight carry no token."""
    for method, path in (
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ):
        assert (await guarded.request(method, path)).status_code == 200
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = await guarded.options("/jobs_prompt_only", headers={**ORIGIN, **asked})
    assert preflight.status_code == 200


async def test_the_body_of_a_refused_request_is_not_read(guarded: httpx.AsyncClient) -> None:
    """Whoever has no token cannot make the service read."""
    was_read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal was_read
        was_read = True
        yield b"{}"

    response = await guarded.post("/jobs_prompt_only", content=body())
    assert (response.status_code, was_read) == (401, False)


def test_each_token_is_a_secret_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text of the service shows one, also where one token begins with another."""
    monkeypatch.setenv("SERVICE_TOKEN", ",".join(TOKENS))
    main.get_settings.cache_clear()
    assert main.redact(f"{TOKENS[1]} and {TOKENS[0]}") == "*** and ***"


async def test_a_token_in_a_query_string_is_not_in_the_access_log(
    start_service: StartService,
) -> None:
    """Whoever sends it in the wrong place does not show it to all who read the log."""
    service = start_service(SERVICE_TOKEN=TOKENS[0], ELEVEN_API_KEY="a/part+of=it")
    async with service_client(service.url, timeout=60) as client:
        await client.get("/health", params={"token": TOKENS[0], "other": "shown"})
        await client.get("/health?quoted=a%2Fpart%2Bof%3Dit")
    assert await wait_until(lambda: "/health?token=***&other=shown" in service.log)
    assert await wait_until(lambda: "/health?quoted=***" in service.log)
    assert TOKENS[0] not in service.log


def test_a_malformed_token_stops_the_start_and_is_not_shown() -> None:
    """The message names the variable alone."""
    with pytest.raises(ValueError, match=r"SERVICE_TOKEN=\(not shown\)") as caught:
        main.read_settings({"SERVICE_TOKEN": f"{TOKENS[0]},short"})
    assert "short" not in str(caught.value).replace("at least", "")


@pytest.mark.parametrize(
    ("token", "keys", "warnings"),
    [
        pytest.param("", True, 1, id="keys and no token"),
        pytest.param(TOKENS[0], True, 0, id="keys and a token"),
        pytest.param("", False, 0, id="nothing to spend"),
    ],
)
async def test_an_open_service_that_can_spend_says_so_at_start(
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    token: str,
    keys: bool,
    warnings: int,
) -> None:
    """One warning, only where provider keys are set."""
    variables = sandbox.environment() if keys else {}
    with caplog.at_level(logging.WARNING, "talking_pet"):
        async with application(monkeypatch, **variables, SERVICE_TOKEN=token):
            pass
    assert caplog.text.count("SERVICE_TOKEN") == warnings


async def test_no_more_videos_are_paid_for_than_an_hour_may_have(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next job is a 429 that says when to come back, before its speech is paid for."""
    async with application(monkeypatch, MAX_VIDEOS_PER_HOUR="2") as client:
        for _ in range(2):
            assert (await send_video_job(client, sandbox_environ)).status_code == 200
        response = await client.post("/jobs_prompt_tts", json=speech_job(sandbox_environ))
    error = response.json()
    assert (response.status_code, error["category"], error["retryable"]) == (429, "resource", True)
    assert 3_500 < int(response.headers["retry-after"]) <= 3_600
    assert len(sandbox_environ.calls("create")) == 2
    assert sandbox_environ.calls("speech") == []


async def test_a_refused_job_with_a_key_is_refused_again_before_its_speech(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is sent, it pays for nothing while the hour has no video left."""
    headers = {"Idempotency-Key": "refused"}
    async with application(monkeypatch, MAX_VIDEOS_PER_HOUR="1") as client:
        assert (await send_video_job(client, sandbox_environ)).status_code == 200
        for _ in range(2):
            response = await client.post(
                "/jobs_prompt_tts", json=speech_job(sandbox_environ), headers=headers
            )
            assert response.status_code == 429
    assert sandbox_environ.calls("speech") == []


async def test_jobs_at_the_same_time_do_not_pay_for_speech_in_vain(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job reserves its video first: one speech is paid for, not five."""
    async with application(monkeypatch, MAX_VIDEOS_PER_HOUR="1") as client:
        body = speech_job(sandbox_environ)
        responses = await asyncio.gather(
            *[client.post("/jobs_prompt_tts", json=body) for _ in range(5)]
        )
    assert sorted(response.status_code for response in responses) == [200, 429, 429, 429, 429]
    assert len(sandbox_environ.calls("speech")) == 1
    waits = {
        float(response.headers["retry-after"])
        for response in responses
        if response.status_code == 429
    }
    # The video is reserved until the speech is asked for; from then on it counts for an hour.
    assert waits <= {main.RETRY_RESERVED_S, main.SPENDING_WINDOW_S}


@pytest.mark.parametrize(
    ("path", "call", "status"),
    [
        pytest.param("/jobs_prompt_tts", "speech", 401, id="speech refused"),
        pytest.param("/jobs_prompt_tts", "speech", 400, id="text refused"),
        pytest.param("/jobs_prompt_only", "create", 422, id="create refused"),
    ],
)
async def test_what_was_not_paid_for_does_not_count(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch, path: str, call: str, status: int
) -> None:
    """A job that fails before anything is paid for leaves its video to the next one."""
    body = speech_job(sandbox_environ) if "tts" in path else prompt_job(sandbox_environ)
    sandbox_environ.fault(call, "status", status=status)
    async with application(monkeypatch, MAX_VIDEOS_PER_HOUR="1") as client:
        for expected in (False, True):
            response = await client.post(path, json=body)
            assert (response.status_code == 200) is expected, response.text


async def test_an_outage_does_not_use_the_hour_up(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A speech that could not even be asked for has cost nothing."""
    nobody = {"ELEVEN_BASE_URL": "http://127.0.0.1:9", "PATIENCE_SECONDS": "0.4"}
    async with application(monkeypatch, MAX_VIDEOS_PER_HOUR="1", **nobody) as client:
        for _ in range(2):
            response = await client.post("/jobs_prompt_tts", json=speech_job(sandbox_environ))
            assert response.status_code == 500, response.text


async def test_a_body_that_does_not_come_ends_its_connection(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends a byte a second does not hold a connection for hours."""

    async def slow_body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    monkeypatch.setattr(main, "BODY_TIMEOUT_S", 0.1)
    async with application(monkeypatch) as client:
        response = await client.post("/jobs_prompt_only", content=slow_body())
    assert (response.status_code, response.headers["connection"]) == (400, "close")
    assert response.json()["detail"].startswith("The body did not come in within 0.1 s")


async def test_a_job_that_resumes_or_is_replayed_counts_once(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The video whose download failed is delivered, and again, although the hour has no video left."""
    sandbox_environ.fault("output", "status", status=403)
    headers = {"Idempotency-Key": "one-video"}
    async with application(monkeypatch, MAX_VIDEOS_PER_HOUR="1") as client:
        statuses = []
        for _ in range(3):
            response = await client.post(
                "/jobs_prompt_tts", json=speech_job(sandbox_environ), headers=headers
            )
            statuses.append(response.status_code)
    assert statuses == [500, 200, 200]
    assert len(sandbox_environ.calls("create")) == 1


def test_a_video_counts_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest one makes room as soon as it is 60 minutes old."""
    monkeypatch.setenv("MAX_VIDEOS_PER_HOUR", "1")
    main.get_settings.cache_clear()
    budget = main.VideoBudget()
    budget.paid_at["earlier"] = time.monotonic() - 3_599
    with pytest.raises(main.SpendingLimitReached):
        budget.reserve("next")
    budget.paid_at["earlier"] -= 1
    with budget.counting("next"):
        assert list(budget.paid_at) == ["next"]


@pytest.mark.parametrize("model", [MODEL, "minimax/hailuo-02:abc", "minimax/hailuo-2"])
async def test_only_allowed_models_are_looked_up(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Another model is a 400 on `model` that names the allowed ones; Replicate is not asked."""
    async with application(monkeypatch, ALLOWED_MODELS="minimax/hailuo-02 , owner/name") as client:
        response = await send_video_job(client, sandbox_environ, model=model)
    [error] = response.json()["errors"]
    assert (response.status_code, error["loc"]) == (400, ["body", "model"])
    assert "minimax/hailuo-02 or owner/name" in error["msg"]
    assert sandbox_environ.requests == []


@pytest.mark.parametrize(
    ("allowed", "model", "status"),
    [
        pytest.param("minimax/hailuo-02", None, 200, id="the default model under its name"),
        pytest.param("kwaivgi/kling-v2.1", None, 400, id="the default model is not allowed"),
        pytest.param("kwaivgi/kling-v2.1", "kwaivgi/kling-v2.1", 200, id="another model"),
        pytest.param("", "kwaivgi/kling-v2.1", 200, id="empty: any model"),
    ],
)
async def test_allowed_models(
    sandbox_environ: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    allowed: str,
    model: str | None,
    status: int,
) -> None:
    """A request that names no model asks for minimax/hailuo-02."""
    changes = {"seconds": 5, "resolution": "720p"} if model else {}
    async with application(monkeypatch, ALLOWED_MODELS=allowed) as client:
        response = await send_video_job(client, sandbox_environ, model=model, **changes)
    assert response.status_code == status, response.text


# Models that anybody may publish


def schema_response(
    properties: dict[str, Any], required: list[str] | None = None, **schemas: Any
) -> Any:
    """Replicate's answer about a community model with this input."""
    inputs = {"type": "object", "properties": properties, "required": required or []}
    version = {
        "id": "a" * 64,
        "openapi_schema": {"components": {"schemas": {"Input": inputs, **schemas}}},
    }
    return {"owner": "stranger", "name": "model", "latest_version": version}


PICTURE = {"image": {"type": "string", "format": "uri"}}
ENUM = [f"{number}s" for number in range(180_000)]
LISTED = {
    name: {"allOf": [{"$ref": "#/components/schemas/Listed"}]}
    for name in main.LENGTH_NAMES + main.SIZE_NAMES
}
HOSTILE_SCHEMAS = [
    pytest.param(
        {**PICTURE, **LISTED}, [], {"Listed": {"enum": ENUM}}, id="a long list behind every name"
    ),
    pytest.param(
        PICTURE, [f"{number:030}" for number in range(50_000)], {}, id="many required names"
    ),
    pytest.param(
        {
            **PICTURE,
            "resolution": {"enum": [f"{number}p" + "x" * 19_000 for number in range(100, 200)]},
        },
        [],
        {},
        id="long values",
    ),
]

LONG_DESCRIPTIONS = pytest.param(
    {
        f"foto{number}": {**PICTURE["image"], "description": "image " * 1_000}
        for number in range(290)
    },
    [],
    {},
    id="long descriptions",
)


@pytest.mark.parametrize(("properties", "required", "schemas"), HOSTILE_SCHEMAS)
async def test_a_hostile_schema_costs_little(
    sandbox_environ: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    properties: Any,
    required: Any,
    schemas: Any,
) -> None:
    """Two seconds of CPU and a short answer, whatever 1.9 MB a model's owner publishes."""
    body = json.dumps(schema_response(properties, required, **schemas)).encode()
    assert len(body) < main.MAX_RESPONSE_BYTES
    sandbox_environ.fault("model", "status", status=200, body=body)
    async with application(monkeypatch) as client:
        started_at = time.thread_time()
        response = await send_video_job(
            client, sandbox_environ, model=MODEL, seconds=7, resolution="900p"
        )
        cpu_s = time.thread_time() - started_at
    assert response.json()["category"] != "internal"
    assert cpu_s < 2
    assert len(response.content) < 5_000


@pytest.mark.parametrize(
    ("properties", "required", "schemas"), [HOSTILE_SCHEMAS[0], LONG_DESCRIPTIONS]
)
def test_little_is_kept_of_a_hostile_schema(properties: Any, required: Any, schemas: Any) -> None:
    """A hundred of them fit into memory."""
    described = schema_response(properties, required, **schemas)["latest_version"]
    model = main.parse_model(MODEL, "a" * 64, described["openapi_schema"]["components"]["schemas"])
    assert len(pickle.dumps(model)) < 300_000


@pytest.mark.parametrize(
    ("keyword", "number"),
    [
        ("minimum", "NaN"),
        ("minimum", "1e999"),
        pytest.param("minimum", "1" + "0" * 400, id="minimum-10^400"),
        ("maximum", "-Infinity"),
        ("default", "NaN"),
        ("default", "1e999"),
    ],
)
async def test_only_finite_numbers_bound_a_field(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch, keyword: str, number: str
) -> None:
    """A bound that is no number is none; no such model is an unforeseen error."""
    prop = {"type": "integer", keyword: "HERE"}
    properties = {**PICTURE, "duration": prop, "resolution": prop, "fps": prop}
    body = json.dumps(schema_response(properties, ["fps"])).replace('"HERE"', number).encode()
    sandbox_environ.fault("model", "status", status=200, body=body)
    sandbox_environ.fault("create", "status", status=422)
    async with application(monkeypatch) as client:
        response = await send_video_job(client, sandbox_environ, model=MODEL)
    assert response.json()["category"] != "internal", response.text


async def test_an_unknown_model_is_remembered(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for again within a minute, it is refused in the same words without a look-up."""
    async with application(monkeypatch) as client:
        first, second = [
            await send_video_job(client, sandbox_environ, model=MODEL) for _ in range(2)
        ]
    assert first.status_code == second.status_code == 400
    assert first.json()["detail"] == second.json()["detail"]
    assert len(sandbox_environ.calls("model")) == 1


async def test_an_unknown_model_is_looked_up_again_after_a_minute(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may have published it meanwhile."""
    async with application(monkeypatch) as client:
        await send_video_job(client, sandbox_environ, model=MODEL)
        remembered = main.app_state().unknown_models
        assert 0 < remembered[MODEL].expires_at - time.monotonic() <= main.UNKNOWN_MODEL_TTL_S
        remembered[MODEL] = remembered[MODEL]._replace(expires_at=time.monotonic())
        await send_video_job(client, sandbox_environ, model=MODEL)
    assert len(sandbox_environ.calls("model")) == 2


async def test_look_ups_of_new_models_are_limited(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond thirty a minute they are refused at once; models that are known are looked up all the same."""
    known = {"model": "kwaivgi/kling-v2.1", "seconds": 5, "resolution": "720p"}
    async with application(monkeypatch) as client:
        assert (await send_video_job(client, sandbox_environ, **known)).status_code == 200
        jobs = [
            send_video_job(client, sandbox_environ, model=f"stranger/{number}")
            for number in range(60)
        ]
        responses = await asyncio.gather(*jobs)
        models = main.app_state().models
        [name] = models
        models[name] = models[name]._replace(expires_at=time.monotonic())
        assert (await send_video_job(client, sandbox_environ, **known)).status_code == 200
    refused = [response for response in responses if response.status_code == 500]
    assert len(refused) == 31
    assert {
        (body["category"], body["retryable"]) for body in map(httpx.Response.json, refused)
    } == {("resource", True)}
    assert len(sandbox_environ.calls("model")) == main.MAX_LOOKUPS_PER_MINUTE + 1


async def test_a_look_up_that_drips_ends(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No deadline of a job ends a look-up that several jobs share: it has one of its own."""
    monkeypatch.setattr(main, "MAX_LOOKUP_S", 0.3)
    sandbox_environ.fault("model", "drip", times=None, seconds=0.2)
    async with application(monkeypatch) as client:
        with anyio.fail_after(20):
            response = await send_video_job(client, sandbox_environ, model="kwaivgi/kling-v2.1")
    assert (response.status_code, response.json()["provider"]) == (500, "replicate")


# Hostile answers


def prediction_of(output: str, **fields: str) -> bytes:
    """A prediction as Replicate writes it, with this JSON text as its output."""
    started = json.dumps({"id": "abc", "status": "processing", **fields}).rstrip("}")
    return f'{started}, "output": {output}}}'.encode()


async def test_a_prediction_larger_than_a_megabyte_is_not_read(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job ends, and its prediction is cancelled."""
    body = prediction_of(json.dumps(["x" * 1_000] * 1_100))
    sandbox_environ.fault("poll", "status", status=200, body=body)
    async with application(monkeypatch) as client:
        response = await send_video_job(client, sandbox_environ)
    assert (response.status_code, response.json()["provider"]) == (500, "replicate")
    assert "larger than the service reads" in response.json()["detail"]
    assert len(sandbox_environ.calls("cancel")) == 1


def test_json_of_very_many_values_is_not_parsed() -> None:
    """A megabyte of them takes a tenth of a second and 24 MB, during which nothing else runs."""
    many = ",".join(["{}"] * 300_000)
    response = main.ProviderResponse(200, httpx.Headers(), prediction_of(f"[{many}]"))
    assert response.payload is None


def test_a_long_log_is_no_hostile_answer() -> None:
    """A megabyte of progress bars is read, and once."""
    line = " 40%|####      | 20/50 [00:10<00:15,  2.00it/s]\r"
    response = main.ProviderResponse(
        200, httpx.Headers(), prediction_of("null", logs=line * 20_000)
    )
    assert response.payload is response.payload
    prediction = main.parse_prediction(response.payload)
    assert prediction is not None
    assert prediction.percent == 40


def test_little_is_kept_of_a_prediction() -> None:
    """While the job waits for the next poll, it holds neither output nor log."""
    text = prediction_of(json.dumps(["x" * 100] * 5_000), logs="x" * 100_000, error="x" * 100_000)
    prediction = main.parse_prediction(json.loads(text))
    assert len(pickle.dumps(prediction)) < 2_000


@pytest.mark.parametrize("location", ["https://elsewhere.example/", "//", "https://xn--aaa/", None])
async def test_a_poll_that_is_redirected_is_made_again(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch, location: str | None
) -> None:
    """The video is paid for: a redirect is an outage, wherever it leads."""
    headers = {"location": location} if location else {}
    sandbox_environ.fault("poll", "status", times=3, status=302, headers=headers)
    async with application(monkeypatch) as client:
        response = await send_video_job(client, sandbox_environ)
    assert response.status_code == 200, response.text


# File descriptors


@needs_proc
def test_the_limit_of_file_descriptors_is_raised(sandbox: Sandbox) -> None:
    """The soft limit that the process is started with becomes the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1, 512), hard))
        service = stack.enter_context(Service(sandbox.environment()))
        assert resource.prlimit(service.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def open_descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@needs_proc
@pytest.mark.parametrize("call", ["poll", "output", "upload"])
async def test_running_out_of_descriptors_after_paying_is_waited_out(
    sandbox: Sandbox, start_service: StartService, call: str
) -> None:
    """While none is left the paid video waits, at whatever stage; then it is delivered."""
    service = start_service(PATIENCE_SECONDS="60", RETRY_FIRST_SECONDS="0.2")
    hard = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    if call == "upload":
        sandbox.fault("upload", "slow", seconds=0)  # the speech's
    sandbox.fault(call, "slow", seconds=1)
    async with service_client(service.url, timeout=60) as client:
        sending = asyncio.create_task(client.post("/jobs_prompt_tts", json=speech_job(sandbox)))
        calls = 2 if call == "upload" else 1
        assert await wait_until(lambda: len(sandbox.calls(call)) == calls or sending.done())
        log_size = len(service.log)
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (3, hard[1]))
        assert await wait_until(lambda: "retry in" in service.log[log_size:] or sending.done())
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, hard)
        response = await sending
    assert response.status_code == 200, response.text
    assert "retry in" in service.log[log_size:]


@needs_proc
async def test_the_log_is_bounded_while_no_connection_can_be_accepted(
    sandbox: Sandbox, start_service: StartService
) -> None:
    """One line says it, where asyncio would write thousands a second."""
    service = start_service()
    hard = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (open_descriptors(service.pid), hard[1]))
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))):
        assert await wait_until(lambda: "out of system resource" in service.log)
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, hard)
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=30) as client:
            assert (await client.get(f"{service.url}/health")).status_code == 200
    # The second may be the exception's own text
    assert service.log.count("out of system resource") <= 2
    assert len(service.log) < 10_000


# Servers that strangers name


class HostileServer:
    """A server on loopback that answers each connection as a test says; a context manager."""

    def __init__(self, respond: Callable[[socket.socket, str], None]) -> None:
        self.respond = respond
        self.requests: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.accept, daemon=True)

    def accept(self) -> None:
        """Serve each connection in a thread of its own, until the listener is closed."""
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        """Read the head of one request, and respond."""
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(65_536)
                if not received:
                    return
                head += received
            self.requests.append(head.decode("latin-1"))
            self.respond(connection, self.requests[-1])

    def __enter__(self) -> HostileServer:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


StartHostile = Callable[[Callable[[socket.socket, str], None]], HostileServer]


@pytest.fixture
def hostile(settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartHostile]:
    """Start a server that is reached as hostile.example, at a public address, from this process."""
    real_getaddrinfo, real_connect = socket.getaddrinfo, anyio.connect_tcp
    ports: list[int] = []

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> list[Any]:
        address = PUBLIC if host in (NAME, NAME.encode()) else host
        return real_getaddrinfo(address, port, *args, **options)

    async def connect(remote_host: Any, remote_port: int, **options: Any) -> Any:
        assert remote_host == PUBLIC
        return await real_connect("127.0.0.1", ports[-1])

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(anyio, "connect_tcp", connect)
    with ExitStack() as stack:

        def start(respond: Callable[[socket.socket, str], None]) -> HostileServer:
            server = stack.enter_context(HostileServer(respond))
            ports.append(server.port)
            return server

        yield start


def reply(head: str, *headers: str) -> bytes:
    """A response without a body."""
    return "\r\n".join([f"HTTP/1.1 {head}", *headers, "Content-Length: 0", "", ""]).encode(
        "latin-1"
    )


async def debug_head(client: httpx.AsyncClient, url: str = URL) -> httpx.Response:
    """The response to a look at a remote file."""
    return await client.post("/debug/head", json={"url": url})


def hint_without_end(connection: socket.socket, head: str) -> None:
    """Send `103 Early Hints` until the client leaves."""
    while True:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n")


async def test_endless_early_hints_are_cut_off(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may send 32 KB in all before its response."""
    hostile(hint_without_end)
    async with application(monkeypatch) as client:
        response = await debug_head(client)
    assert response.status_code == 500
    assert "sends too much" in response.json()["detail"]


async def test_a_download_has_no_endless_early_hints_either(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stranger's model names the server of its video."""
    hostile(hint_without_end)
    async with application(monkeypatch):
        with pytest.raises(main.ResourceFailed, match="sends too much"), anyio.fail_after(20):
            await main.download(URL, tmp_path / "video.mp4")


async def test_the_body_of_a_download_is_not_metered(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what comes before it is."""
    body = bytes(300_000)
    start = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    hostile(lambda connection, head: connection.sendall(start + body))
    async with application(monkeypatch):
        await main.download(URL, tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == body


@pytest.mark.parametrize(
    ("size", "status"), [pytest.param(1_000, 200, id="small"), pytest.param(8_000, 500, id="large")]
)
async def test_the_headers_of_redirects_are_bounded_together(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch, size: int, status: int
) -> None:
    """Five redirects with headers of a kilobyte each are followed, with eight each they are not."""

    def respond(connection: socket.socket, head: str) -> None:
        number = int(head.split()[1].rpartition("/")[2])
        padding = f"X-Padding: {'x' * size}"
        if number == 5:
            connection.sendall(reply("200 OK", padding, "Content-Type: image/png"))
        else:
            connection.sendall(reply("302 Found", padding, f"Location: /{number + 1}"))

    hostile(respond)
    async with application(monkeypatch) as client:
        response = await debug_head(client, f"http://{NAME}/0")
    assert response.json().get("status", 500) == status, response.text


async def test_a_foreign_banner_is_shown_in_a_few_printable_words(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no HTTP comes back as at most 300 characters, in the answer as in the log."""
    hostile(
        lambda connection, head: connection.sendall(
            b"SSH-2.0 \x1b[2J\x07" + b"x" * 30_000 + b"\r\n\r\n"
        )
    )
    with caplog.at_level(logging.INFO, "talking_pet"):
        async with application(monkeypatch) as client:
            response = await debug_head(client)
    assert response.status_code == 500
    assert len(response.json()["detail"]) < 400
    assert response.json()["detail"].isprintable()
    assert len(caplog.text) < 5_000


async def test_a_content_type_is_printable(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of no character set are left out of it, and it is short."""
    hostile(
        lambda connection, head: connection.sendall(
            reply("200 OK", f"Content-Type: a\x85{'b' * 5_000}")
        )
    )
    async with application(monkeypatch) as client:
        response = await debug_head(client)
    content_type = response.json()["content_type"]
    assert content_type.isprintable()
    assert len(content_type) <= 200


@pytest.mark.parametrize("size", [3_000, 100_000])
def test_no_error_text_is_long(size: int) -> None:
    """Whoever wrote it: a thousand characters at most."""
    error = main.ServiceError("x" * size)
    error.add_field_error("model", "x" * size)
    assert len(error.detail) == len(error.errors[0].msg) == main.MAX_ERROR_CHARS


async def test_few_files_are_looked_at_at_once(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for their turn."""
    release = threading.Event()
    active, most = 0, 0
    lock = threading.Lock()

    def respond(connection: socket.socket, head: str) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        release.wait(30)
        with lock:
            active -= 1
        connection.sendall(reply("200 OK"))

    hostile(respond)
    async with application(monkeypatch) as client:
        looks = [asyncio.create_task(debug_head(client)) for _ in range(20)]
        assert await wait_until(
            lambda: main.app_state().open_requests == 20 and active >= main.MAX_HEADS
        )
        await asyncio.sleep(0)
        release.set()
        responses = await asyncio.gather(*looks)
    assert {response.status_code for response in responses} == {200}
    assert most == main.MAX_HEADS


async def test_a_look_that_gets_no_turn_says_so(
    hostile: StartHostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused in its own time, retryable, without a word about the URL's server."""
    async with application(monkeypatch):
        taken = asyncio.Semaphore(0)
        with pytest.raises(main.ResourceFailed) as caught:
            await main.head(URL, 0.05, taken)
    assert caught.value.retryable
    assert "Too many" in caught.value.detail


def test_the_host_of_a_virtual_machine_is_not_public() -> None:
    """In Azure this address answers about the machine itself."""
    assert not main.is_public("168.63.129.16")


# Steps that go on although the job was cancelled


async def test_a_create_that_drips_ends_soon_after_the_deadline(
    sandbox: Sandbox, start_service: StartService
) -> None:
    """The prediction is then searched for, and cancelled."""
    sandbox.video_seconds = 600
    sandbox.fault("create", "drip", seconds=0.5)
    service = start_service(graceful_s=1, JOB_TIMEOUT_SECONDS="1")
    async with service_client(service.url, timeout=20) as client:
        response = await send_video_job(client, sandbox)
    assert (response.status_code, response.json()["provider"]) == (500, "replicate")
    assert len(sandbox.calls("cancel")) == 1


async def test_a_search_that_drips_ends(sandbox: Sandbox, start_service: StartService) -> None:
    """A job without a key waits for the search whoever has left: it has a limit of its own."""
    sandbox.fault("create", "lost")
    sandbox.fault("list", "drip", times=None, seconds=0.5)
    service = start_service(graceful_s=1)
    async with service_client(service.url, timeout=20) as client:
        response = await send_video_job(client, sandbox)
    assert (response.status_code, response.json()["provider"]) == (500, "replicate")


# Nothing grows


async def test_durations_of_few_kinds_are_kept(
    settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five hundred, of which those that were seen longest ago go first."""
    async with application(monkeypatch):
        for number in range(600):
            main.remember_duration(f"kind {number}", 1.0)
            main.remember_duration("ordinary", 1.0)
        recent = main.app_state().recent_durations
        assert len(recent) == main.MAX_DURATION_KINDS
        assert len(recent["ordinary"]) == main.RECENT_DURATIONS
        assert "kind 599" in recent


async def test_clients_that_join_and_leave_are_forgotten(
    sandbox: Sandbox, sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long their job goes on, nothing is kept of them."""
    sandbox.video_seconds = 600
    body, headers = prompt_job(sandbox), {"Idempotency-Key": "joined"}

    def tasks() -> int:
        gc.collect()
        return sum(isinstance(one, asyncio.Task) for one in gc.get_objects())

    async def call(has_left: asyncio.Event) -> None:
        """One request whose client leaves, as uvicorn tells it."""
        messages: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            """Nobody hears it."""

        lines = {**headers, "content-type": "application/json"}
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/jobs_prompt_only",
            "raw_path": b"/jobs_prompt_only",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in lines.items()],
        }
        await main.app(scope, receive, send)

    async with application(monkeypatch):
        first = asyncio.create_task(call(asyncio.Event()))
        assert await wait_until(lambda: sandbox.predictions)
        [job] = main.app_state().jobs.values()
        before = tasks()
        for _ in range(20):
            left = asyncio.Event()
            joining = asyncio.create_task(call(left))
            assert await wait_until(lambda: len(job.subscribers) == 2)
            left.set()
            await joining
        assert len(job.subscribers) == 1
        assert tasks() <= before + 3
        job.cancel("shutdown")
        await first


# The rest


async def test_only_the_first_names_of_a_body_are_compared(
    sandbox_environ: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty unknown names are looked at, however many a body has."""
    for count, status in ((49, 400), (50, 200)):
        body = {**{f"{number}": 1 for number in range(count)}, "secondss": 6}
        async with application(monkeypatch) as client:
            response = await client.post(
                "/jobs_prompt_only", json={**body, **prompt_job(sandbox_environ)}
            )
        assert response.status_code == status, response.text


@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="SIGHUP is ignored, as under nohup"
)
async def test_hangup_ends_the_process_as_sigterm_does(
    sandbox: Sandbox, start_service: StartService
) -> None:
    """The running job's prediction is cancelled before the process ends."""
    sandbox.video_seconds = 600
    service = start_service(graceful_s=1)
    async with service_client(service.url, timeout=60) as client:
        sending = asyncio.create_task(client.post("/jobs_prompt_only", json=prompt_job(sandbox)))
        assert await wait_until(lambda: sandbox.predictions)
        exit_code = await asyncio.to_thread(service.stop, signal.SIGHUP)
        response = await sending
    assert exit_code in (0, -signal.SIGTERM)
    assert response.status_code == 500
    assert len(sandbox.calls("cancel")) == 1


# What a review found


def test_a_key_counts_again_when_its_hour_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that creates a second video after an hour takes another one of this hour."""
    use_settings(monkeypatch, MAX_VIDEOS_PER_HOUR="1")
    budget = main.VideoBudget()
    with budget.counting("a-job"):
        budget.paid_at["a-job"] -= main.SPENDING_WINDOW_S
    with budget.counting("a-job"):
        pass
    with pytest.raises(main.SpendingLimitReached):
        budget.reserve("another-job")


def test_a_video_that_was_refused_for_now_stays_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that leaves the line has paid for nothing."""
    use_settings(monkeypatch, MAX_VIDEOS_PER_HOUR="1")
    budget = main.VideoBudget()
    with budget.counting("a-job") as call:
        call.is_free = True
    with pytest.raises(main.SpendingLimitReached):
        budget.reserve("another-job")
    budget.release("a-job")
    budget.reserve("another-job")


def test_a_free_call_does_not_erase_an_earlier_payment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a create was lost; the next create of the same key is refused."""
    use_settings(monkeypatch, MAX_VIDEOS_PER_HOUR="1")
    budget = main.VideoBudget()
    with suppress(httpx.ReadError), budget.counting("a-job"):
        raise httpx.ReadError("lost")
    with budget.counting("a-job") as call:
        call.is_free = True
    budget.release("a-job")
    with pytest.raises(main.SpendingLimitReached):
        budget.reserve("another-job")


async def test_look_ups_without_a_thread_leave_room_for_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that is out of threads for a moment resolves names again afterwards."""
    resolver = main.DnsResolver()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", raise_out_of_threads)
        for _ in range(main.MAX_DNS_LOOKUPS + 1):
            with pytest.raises(OSError, match="no thread"):
                await asyncio.wait_for(resolver.resolve("127.0.0.1", 80), 5)
    assert await asyncio.wait_for(resolver.resolve("127.0.0.1", 80), 5) == ["127.0.0.1"]


def raise_out_of_threads(thread: threading.Thread) -> None:
    """What a system without threads to give answers."""
    raise RuntimeError("can't start new thread")


async def test_the_wait_for_descriptors_begins_with_the_first_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Work that takes long before it meets the limit is still done again."""
    use_settings(monkeypatch, PATIENCE_SECONDS="0.2", RETRY_FIRST_SECONDS="0.001")
    calls: list[int] = []

    async def work() -> str:
        calls.append(len(calls))
        if len(calls) == 1:
            await asyncio.sleep(0.3)
            raise OSError(errno.EMFILE, "Too many open files")
        return "done"

    assert await main.wait_out_descriptors(work) == "done"


async def test_only_missing_descriptors_are_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends the work at once, and missing descriptors do when patience is over."""
    set_variables(monkeypatch, PATIENCE_SECONDS="0.1", RETRY_FIRST_SECONDS="0.02")
    calls = dict.fromkeys((errno.ENOSPC, errno.EMFILE), 0)

    async def fail(number: int) -> None:
        calls[number] += 1
        raise OSError(number, "no more")

    for number in calls:
        with pytest.raises(OSError, match="no more"):
            await main.wait_out_descriptors(partial(fail, number))
    assert calls[errno.ENOSPC] == 1
    assert calls[errno.EMFILE] > 1
