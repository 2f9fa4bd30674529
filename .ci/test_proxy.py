"""tests/sandbox/proxy.mjs: the recipe for a sign-in before the service, in Node."""

import json
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_client import BODY, JOB, KEY, VIDEO, VIDEO_STREAM, Caller, Proxy, plain
from test_client import make_video as make_video  # a fixture, as is the next
from test_client import stand_in as stand_in

from tests.sandbox import Sandbox, Service
from tests.support.requests import short_video, speech_job

PROXY = Path(__file__).parent.parent / "tests" / "sandbox" / "proxy.mjs"
ORIGIN = "https://app.example.com"
USERS = {
    "token-of-ann": "5f0c1c5e-0000-4000-8000-00000000000a",
    "token-of-bob": "5f0c1c5e-0000-4000-8000-00000000000b",
}

StartProxy = Callable[..., str]


class Auth(ThreadingHTTPServer):
    """Supabase's `GET /auth/v1/user`: who has this session? `broken` lets it fail."""

    daemon_threads = True
    broken = False


class AuthHandler(BaseHTTPRequestHandler):
    """One request for a user."""

    server: Auth

    def do_GET(self) -> None:
        """Answer with the user, 401 without the project's key, 403 for a session that is none."""
        token = (self.headers["authorization"] or "").removeprefix("Bearer ")
        status, body = 200, {"id": USERS.get(token), "aud": "authenticated"}
        if self.path != "/auth/v1/user" or self.headers["apikey"] != "anon-key":
            status, body = 401, {"message": "No API key found in request"}
        elif self.server.broken:
            status, body = 500, {"message": "down"}
        elif token not in USERS:
            status, body = 403, {"code": "403", "error_code": "bad_jwt", "msg": "invalid JWT"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


@pytest.fixture
def auth() -> Iterator[Auth]:
    """The sign-in of a Supabase project."""
    with Auth(("127.0.0.1", 0), AuthHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def start_proxy(auth: Auth) -> Iterator[StartProxy]:
    """Start the proxy before this service, and return its address."""
    with ExitStack() as stack:

        def start(service: str, **settings: str) -> str:
            """Start Node, and wait until it listens."""
            environment = {
                "PATH": str(Path(shutil.which("node") or "").parent),
                "SERVICE_URL": service,
                "SERVICE_TOKEN": "secret-of-the-service",
                "SUPABASE_URL": f"http://127.0.0.1:{auth.server_port}",
                "SUPABASE_ANON_KEY": "anon-key",
                "ALLOWED_ORIGIN": ORIGIN,
                "PORT": "0",
                **settings,
            }
            node = stack.enter_context(
                subprocess.Popen(
                    ["node", PROXY],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(node.terminate)
            assert node.stdout is not None
            listening = re.fullmatch(r"listening on port (\d+)\n", node.stdout.readline())
            assert listening
            return f"http://127.0.0.1:{listening[1]}"

        yield start


def signed_in(token: str = "token-of-ann") -> dict[str, str]:
    """The header of a user's session."""
    return {"Authorization": f"Bearer {token}"}


def test_a_signed_in_user_gets_a_video(
    make_video: Caller,
    start_proxy: StartProxy,
    service: Service,
    sandbox: Sandbox,
) -> None:
    """Events pass through as they come, and the same job and key again is the same video."""
    sandbox.video(short_video())
    url, key = start_proxy(service.url), str(uuid.uuid4())
    first, again = (
        make_video(speech_job(sandbox), url, key=key, headers=signed_in()) for _ in range(2)
    )
    assert first.video == again.video is not None
    assert [stage["stage"] for stage in first.stages if stage["state"] == "done"][:3] == [
        *("speech", "audio_upload", "video")
    ]
    assert len(sandbox.predictions) == 1


def test_the_service_gets_its_own_token_and_a_key_of_the_user(
    make_video: Caller,
    start_proxy: StartProxy,
    stand_in: Proxy,
) -> None:
    """Neither the user's session nor other headers reach it, and two users with one key have two jobs."""
    stand_in.responses.extend([VIDEO_STREAM, VIDEO_STREAM])
    url = start_proxy(stand_in.url)
    for token in USERS:
        assert (
            make_video(JOB, url, key=KEY, headers={**signed_in(token), "X-Other": "x"}).video
            == VIDEO
        )
    headers = [request.headers for request in stand_in.requests]
    assert [one["idempotency-key"] for one in headers] == [
        f"{user}:{KEY}" for user in USERS.values()
    ]
    assert {one["authorization"] for one in headers} == {"Bearer secret-of-the-service"}
    assert not any("x-other" in one or "cookie" in one for one in headers)
    assert json.loads(stand_in.requests[0].body) == JOB


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="no session"),
        pytest.param(signed_in("token-of-nobody"), id="an invalid session"),
        pytest.param({"Authorization": "Basic eDp5"}, id="another scheme"),
    ],
)
def test_who_is_not_signed_in_is_refused(
    make_video: Caller,
    start_proxy: StartProxy,
    stand_in: Proxy,
    headers: dict[str, str],
) -> None:
    """The service is not asked; the client tells it by its code, and keeps the job."""
    outcome = make_video(JOB, start_proxy(stand_in.url), key=KEY, headers=headers)
    assert (outcome.error["status"], outcome.error["code"]) == (401, "unauthorized")
    assert (outcome.to_do, outcome.error["retryable"], outcome.error["detail"]) == (
        "sign in",
        True,
        "Sign in first.",
    )
    assert stand_in.requests == []


def test_each_user_has_a_limit(
    make_video: Caller,
    start_proxy: StartProxy,
    stand_in: Proxy,
) -> None:
    """A job that is sent again does not count; the refusal says when there is the next turn."""
    stand_in.responses.extend([VIDEO_STREAM] * 4)
    url = start_proxy(stand_in.url, JOBS_PER_HOUR="2")
    ann = [
        make_video(JOB, url, key=key, headers=signed_in()) for key in ("one", "two", "one", "three")
    ]
    bob = make_video(JOB, url, key="one", headers=signed_in("token-of-bob"))
    assert [outcome.video is not None for outcome in [*ann, bob]] == [True, True, True, False, True]
    assert (ann[3].error["status"], ann[3].error["code"]) == (429, "spending_limit")
    assert (ann[3].retries, ann[3].error["retryable"]) == ([], True)


def post(url: str, route: str = "/jobs_prompt_tts", **options: Any) -> httpx.Response:
    """Send a request without the client."""
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.post(f"{url}{route}", **options)


@pytest.mark.parametrize(
    ("route", "headers", "content", "expected"),
    [
        pytest.param(
            "/debug/head",
            {"Idempotency-Key": KEY},
            b"{}",
            (404, "route_not_found"),
            id="another route",
        ),
        pytest.param(
            "/jobs_prompt_tts?x=1",
            {"Idempotency-Key": KEY},
            b"{}",
            (404, "route_not_found"),
            id="a query",
        ),
        pytest.param("/jobs_prompt_tts", {}, b"{}", (400, "missing_key"), id="no key"),
        pytest.param(
            "/jobs_prompt_tts",
            {"Idempotency-Key": KEY},
            b"x" * 65_537,
            (400, "body_too_large"),
            id="too large",
        ),
    ],
)
def test_only_jobs_pass(
    start_proxy: StartProxy,
    stand_in: Proxy,
    route: str,
    headers: dict[str, str],
    content: bytes,
    expected: tuple[int, str],
) -> None:
    """Anything else is refused before the service is asked."""
    response = post(
        start_proxy(stand_in.url), route, headers={**signed_in(), **headers}, content=content
    )
    assert (response.status_code, response.json()["code"]) == expected
    assert stand_in.requests == []


def test_an_error_of_the_service_passes(
    start_proxy: StartProxy,
    stand_in: Proxy,
) -> None:
    """With its status, its body, and the headers that a page reads."""
    stand_in.responses.append(plain(500, BODY, Retry_After="7", Set_Cookie="x=y"))
    response = post(
        start_proxy(stand_in.url), json=JOB, headers={**signed_in(), "Idempotency-Key": KEY}
    )
    assert (response.status_code, response.json()) == (500, BODY)
    assert (response.headers["retry-after"], response.headers["x-request-id"]) == ("7", "r-1")
    assert "set-cookie" not in response.headers


def test_a_service_that_is_away_can_be_asked_again(start_proxy: StartProxy) -> None:
    """The proxy says so in the service's own form."""
    response = post(
        start_proxy("http://127.0.0.1:9"), json=JOB, headers={**signed_in(), "Idempotency-Key": KEY}
    )
    assert (response.status_code, response.json()["retryable"]) == (502, True)
    assert "ECONNREFUSED" not in response.text


def test_a_sign_in_that_is_away_can_be_asked_again(
    start_proxy: StartProxy,
    stand_in: Proxy,
    auth: Auth,
) -> None:
    """Nobody gets in, but the job is not lost either."""
    auth.broken = True
    response = post(
        start_proxy(stand_in.url), json=JOB, headers={**signed_in(), "Idempotency-Key": KEY}
    )
    assert (response.status_code, response.json()["retryable"]) == (502, True)
    assert stand_in.requests == []


def test_a_page_of_the_allowed_origin_may_ask(
    start_proxy: StartProxy,
    stand_in: Proxy,
) -> None:
    """The preflight allows the headers that client.js sends, and the response shows those that a page reads."""
    url = start_proxy(stand_in.url)
    with httpx.Client(trust_env=False, timeout=20) as client:
        preflight = client.options(f"{url}/jobs_prompt_tts")
    refused = post(url, json=JOB)
    assert preflight.status_code == 204
    for response in (preflight, refused):
        assert response.headers["access-control-allow-origin"] == ORIGIN
    assert {"authorization", "content-type", "idempotency-key"} <= set(
        preflight.headers["access-control-allow-headers"].split(", ")
    )
    assert "retry-after" in refused.headers["access-control-expose-headers"]
