"""Faults on demand: what goes wrong, how often, and whether the call was carried out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.sandbox import Sandbox
from tests.sandbox.calls import BEARER, PET, STORAGE, Call, create, post_prediction, speak, upload
from tests.sandbox.replicate import Prediction

SLOW_S = 20.0
HTML = "text/html; charset=utf-8"


def test_a_status_comes_in_the_providers_own_shape(sandbox, call):
    """It comes as often as asked, and then the call works again."""
    sandbox.fault("model", "status", times=2, status=503)
    path = "/v1/models/minimax/hailuo-02"
    responses = [call("GET", path, headers=BEARER) for _ in range(3)]
    assert [response.status_code for response in responses] == [503, 503, 200]
    assert responses[0].json() == {"detail": "Internal server error", "status": 503}

    sandbox.fault("upload", "status", status=429)
    assert upload(call).json()["code"] == "SlowDown"


def test_a_status_can_come_with_headers_and_a_body(sandbox, call):
    """They take the place of the provider's own."""
    headers = {"retry-after": "7"}
    sandbox.fault("speech", "status", status=429, headers=headers, body={"detail": "slow"})
    response = speak(call)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json() == {"detail": "slow"}


def test_a_fault_can_last(sandbox, call):
    """`times=None` fails every request until the reset."""
    sandbox.fault("picture", "html", times=None)
    for _ in range(5):
        response = call("GET", "/pet.jpg")
        assert (response.status_code, response.headers["content-type"]) == (502, HTML)
    sandbox.reset()
    assert call("GET", "/pet.jpg").status_code == 200


def test_a_connection_can_break_before_the_call_is_carried_out(sandbox, call):
    """The client gets no response, and nothing is done."""
    sandbox.fault("create", "cut")
    with pytest.raises(httpx.TransportError):
        create(sandbox, call)
    assert sandbox.predictions == {}


# Calls that are carried out although the client does not learn of it


def only_prediction(sandbox: Sandbox) -> Prediction:
    """The one prediction there is."""
    (prediction,) = sandbox.predictions.values()
    return prediction


def send(name: str, sandbox: Sandbox, call: Call, **options: Any) -> httpx.Response:
    """Send a request of this call."""
    if name == "speech":
        return speak(call, **options)
    if name == "create":
        return post_prediction(sandbox, call, **options)
    if name == "upload":
        path = "/storage/v1/object/pets/a.bin"
        return call("POST", path, headers=STORAGE, content=b"bytes", **options)

    path = f"/v1/predictions/{only_prediction(sandbox).id}"
    if name == "cancel":
        return call("POST", f"{path}/cancel", headers=BEARER, **options)
    return call("GET", path, headers=BEARER, **options)


EFFECTS: dict[str, Callable[[Sandbox], bool]] = {
    "speech": lambda sandbox: sandbox.speeches == {"Hello!": 1},
    "create": lambda sandbox: len(sandbox.predictions) == 1,
    "poll": lambda sandbox: only_prediction(sandbox).polls == 1,
    "cancel": lambda sandbox: only_prediction(sandbox).status == "canceled",
    "upload": lambda sandbox: "pets/a.bin" in sandbox.objects,
}


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition becomes true before a slow response would have come."""
    deadline = time.monotonic() + SLOW_S / 2
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize(
    ("kind", "details"),
    [
        pytest.param("lost", {}, id="lost"),
        pytest.param("behind", {}, id="behind"),
        pytest.param("slow", {"seconds": SLOW_S}, id="slow"),
    ],
)
def test_a_call_can_be_carried_out_without_its_response(sandbox, call, name, kind, details):
    """It has its effect once: before a cut, behind a 502, and before a slow response."""
    sandbox.video(b"video")
    if name in ("poll", "cancel"):
        create(sandbox, call)
    sandbox.fault(name, kind, **details)

    if kind == "behind":
        response = send(name, sandbox, call)
        assert (response.status_code, response.headers["content-type"]) == (502, HTML)
    else:
        with pytest.raises(httpx.TransportError):
            send(name, sandbox, call, timeout=0.2)
    assert eventually(lambda: EFFECTS[name](sandbox))


def test_a_gateway_can_respond_with_anything(sandbox, call):
    """Its status, headers and body may be given; the call was carried out."""
    sandbox.video(b"video")
    headers = {"retry-after": "1"}
    body = {"detail": "too slow"}
    sandbox.fault("create", "behind", status=504, headers=headers, body=body)
    response = post_prediction(sandbox, call)
    assert response.status_code == 504
    assert response.headers["retry-after"] == "1"
    assert response.json() == {"detail": "too slow"}
    assert only_prediction(sandbox).status == "starting"


def test_a_refused_call_is_not_carried_out_behind_a_gateway(sandbox, call):
    """What the provider refuses has no effect, whatever the client sees."""
    sandbox.fault("create", "behind", status=502)
    response = post_prediction(sandbox, call, json={"input": {"duration": 6}})
    assert response.status_code == 502
    assert sandbox.predictions == {}


# Parts of a response


def test_head_can_be_refused_where_get_works(sandbox, call):
    """Some servers do this; a GET of the first byte then tells what HEAD would have."""
    sandbox.fault("picture", "status", status=405)
    assert call("HEAD", "/pet.jpg").status_code == 405
    assert call("GET", "/pet.jpg", headers={"range": "bytes=0-0"}).content == PET[:1]


def test_a_response_can_break_off_halfway(sandbox, call):
    """The headers announce more bytes than arrive."""
    sandbox.fault("picture", "halfway")
    with pytest.raises(httpx.RemoteProtocolError, match=r"received \d+ bytes, expected \d+"):
        call("GET", "/pet.jpg")


def test_an_upload_cut_halfway_leaves_nothing(sandbox, call):
    """The path stays free, and no file is left."""
    sandbox.fault("upload", "halfway")
    with pytest.raises(httpx.TransportError):
        upload(call, content=os.urandom(8_000_000))
    assert sandbox.objects == {}
    assert list(Path(sandbox.folder.name).iterdir()) == []
    assert 0 < sandbox.calls("upload")[0].length < 8_000_000


def test_a_response_can_be_slow(sandbox, call):
    """It comes after the given seconds."""
    sandbox.fault("create", "slow", seconds=0.2)
    started = time.monotonic()
    create(sandbox, call)
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        pytest.param("malformed", b'["unexpected"]', id="malformed"),
        pytest.param("empty", b"", id="empty"),
    ],
)
def test_success_can_have_an_invalid_body(sandbox, call, kind, content):
    """The status is that of success, but the body is of no use and nothing is done."""
    sandbox.fault("create", kind)
    response = post_prediction(sandbox, call)
    assert (response.status_code, response.content) == (201, content)
    assert sandbox.predictions == {}


def test_a_body_can_drip(sandbox, client):
    """One byte comes at a time."""
    sandbox.fault("picture", "drip", seconds=0.01)
    with client.stream("GET", sandbox.image_url) as response:
        chunks = response.iter_raw()
        assert next(chunks)[:1] == PET[:1]
        assert len(next(chunks)) < 10


def test_a_body_can_be_endless(sandbox, client):
    """More comes for as long as the client reads; when it disconnects, the sandbox works on."""
    sandbox.fault("output", "endless")
    with client.stream("GET", f"{sandbox.url}/delivery/x/output.mp4") as response:
        received = 0
        for chunk in response.iter_raw():
            received += len(chunk)
            if received > 5_000_000:
                break
    assert "content-length" not in response.headers
    assert client.get(sandbox.image_url).status_code == 200


@pytest.mark.parametrize(("name", "kind"), [("nothing", "cut"), ("create", "nothing")])
def test_an_unknown_fault_is_refused(sandbox, name, kind):
    """A test with a misspelt fault would prove nothing."""
    with pytest.raises(ValueError, match="no such fault"):
        sandbox.fault(name, kind)
