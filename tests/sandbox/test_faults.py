"""Faults on demand: what goes wrong, how often, and whether the call was carried out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.sandbox import Sandbox
from tests.sandbox.calls import BEARER, HAILUO, PET, STORAGE, create, speak, upload, valid_input
from tests.sandbox.replicate import Prediction


def test_a_status_comes_in_the_providers_own_shape(sandbox, call):
    """As often as asked, then the call works again; headers and body may be given."""
    sandbox.fault("model", "status", times=2, status=503)
    sandbox.fault(
        "speech", "status", status=429, headers={"retry-after": "7"}, body={"detail": "slow"}
    )
    models = [call("GET", "/v1/models/minimax/hailuo-02", headers=BEARER) for _ in range(3)]
    assert [answer.status_code for answer in models] == [503, 503, 200]
    assert models[0].json() == {"detail": "Internal server error", "status": 503}
    speech = speak(call)
    assert (speech.status_code, speech.headers["retry-after"], speech.json()) == (
        429,
        "7",
        {"detail": "slow"},
    )
    sandbox.fault("upload", "status", status=429)
    assert upload(call).json()["code"] == "SlowDown"


def test_a_fault_can_last(sandbox, call):
    """`times=None` spoils every request until the reset."""
    sandbox.fault("picture", "html", times=None)
    answers = [call("GET", "/pet.jpg") for _ in range(5)]
    assert {(answer.status_code, answer.headers["content-type"]) for answer in answers} == {
        (502, "text/html; charset=utf-8")
    }
    sandbox.reset()
    assert call("GET", "/pet.jpg").status_code == 200


def test_a_connection_can_break_before_the_call_is_carried_out(sandbox, call):
    """The client gets no answer, and nothing is done."""
    sandbox.fault("create", "cut")
    with pytest.raises(httpx.TransportError):
        create(sandbox, call)
    assert sandbox.predictions == {}


SLOW_S = 20.0
CARRIED_OUT = {  # the call, and whether it has had its effect
    "speech": (
        lambda sandbox, call, how: speak(call, **how),
        lambda sandbox: sandbox.speeches == {"Hello!": 1},
    ),
    "create": (
        lambda sandbox, call, how: call(
            "POST", HAILUO, headers=BEARER, json={"input": valid_input(sandbox)}, **how
        ),
        lambda sandbox: len(sandbox.predictions) == 1,
    ),
    "read": (
        lambda sandbox, call, how: call(
            "GET", f"/v1/predictions/{only(sandbox).id}", headers=BEARER, **how
        ),
        lambda sandbox: only(sandbox).reads == 1,
    ),
    "cancel": (
        lambda sandbox, call, how: call(
            "POST", f"/v1/predictions/{only(sandbox).id}/cancel", headers=BEARER, **how
        ),
        lambda sandbox: only(sandbox).status == "canceled",
    ),
    "upload": (
        lambda sandbox, call, how: call(
            "POST", "/storage/v1/object/pets/a.bin", headers=STORAGE, content=b"bytes", **how
        ),
        lambda sandbox: "pets/a.bin" in sandbox.objects,
    ),
}


def only(sandbox: Sandbox) -> Prediction:
    """The one prediction there is."""
    (prediction,) = sandbox.predictions.values()
    return prediction


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether something becomes true before a slow answer would have come."""
    deadline = time.monotonic() + SLOW_S / 2
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("name", CARRIED_OUT)
@pytest.mark.parametrize(
    ("kind", "details"),
    [
        pytest.param("lost", {}, id="lost"),
        pytest.param("behind", {}, id="behind"),
        pytest.param("slow", {"seconds": SLOW_S}, id="slow"),
    ],
)
def test_a_call_can_be_carried_out_although_the_client_hears_nothing_of_it(
    sandbox, call, name, kind, details
):
    """Its effect is there, once: at a cut, behind an HTML 502, and while a slow answer is still awaited."""
    sandbox.video(b"video")
    if name in ("read", "cancel"):
        create(sandbox, call)
    carry_out, is_done = CARRIED_OUT[name]
    sandbox.fault(name, kind, **details)
    if kind == "behind":
        answer = carry_out(sandbox, call, {})
        assert (answer.status_code, answer.headers["content-type"]) == (
            502,
            "text/html; charset=utf-8",
        )
    else:
        with pytest.raises(httpx.TransportError):
            carry_out(sandbox, call, {"timeout": 0.2})
    assert eventually(lambda: is_done(sandbox))


def test_what_stands_in_front_can_say_anything(sandbox, call):
    """Status, headers and body of the answer to a call that was carried out may be given."""
    sandbox.video(b"video")
    sandbox.fault(
        "create", "behind", status=504, headers={"retry-after": "1"}, body={"detail": "too slow"}
    )
    answer = call("POST", HAILUO, headers=BEARER, json={"input": valid_input(sandbox)})
    assert (answer.status_code, answer.headers["retry-after"], answer.json()) == (
        504,
        "1",
        {"detail": "too slow"},
    )
    assert only(sandbox).status == "starting"


def test_a_refusal_stays_one_behind_a_gateway(sandbox, call):
    """What the provider refuses is not carried out, whatever the client sees."""
    sandbox.fault("create", "behind", status=502)
    answer = call("POST", HAILUO, headers=BEARER, json={"input": {"duration": 6}})
    assert (answer.status_code, sandbox.predictions) == (502, {})


def test_a_refused_head_leaves_the_get(sandbox, call):
    """As some servers have it: the first byte tells what HEAD does not."""
    sandbox.fault("picture", "status", status=405)
    assert call("HEAD", "/pet.jpg").status_code == 405
    assert call("GET", "/pet.jpg", headers={"range": "bytes=0-0"}).content == PET[:1]


def test_an_answer_can_break_off_halfway(sandbox, call):
    """The head promises more bytes than arrive."""
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


def test_an_answer_can_be_slow(sandbox, call):
    """It comes, later."""
    sandbox.fault("create", "slow", seconds=0.2)
    started = time.monotonic()
    create(sandbox, call)
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        pytest.param("nonsense", b'["unexpected"]', id="nonsense"),
        pytest.param("empty", b"", id="empty"),
    ],
)
def test_success_can_be_of_no_use(sandbox, call, kind, content):
    """The status of success, with a body that says nothing, and nothing done."""
    sandbox.fault("create", kind)
    answer = call("POST", HAILUO, headers=BEARER, json={"input": valid_input(sandbox)})
    assert (answer.status_code, answer.content, sandbox.predictions) == (201, content, {})


def test_a_body_can_drip(sandbox, client):
    """A byte comes at a time."""
    sandbox.fault("picture", "drip", seconds=0.01)
    with client.stream("GET", sandbox.image_url) as answer:
        pieces = answer.iter_raw()
        assert next(pieces)[:1] == PET[:1]
        assert len(next(pieces)) < 10


def test_a_body_can_be_endless(sandbox, client):
    """More comes for as long as the client reads; when it leaves, the sandbox goes on."""
    sandbox.fault("output", "endless")
    with client.stream("GET", f"{sandbox.url}/delivery/x/output.mp4") as answer:
        received = 0
        for piece in answer.iter_raw():
            received += len(piece)
            if received > 5_000_000:
                break
    assert "content-length" not in answer.headers
    assert client.get(sandbox.image_url).status_code == 200


@pytest.mark.parametrize(("call_name", "kind"), [("nothing", "cut"), ("create", "nothing")])
def test_a_fault_that_cannot_happen_is_refused(sandbox, call_name, kind):
    """A misspelt fault would prove nothing."""
    with pytest.raises(ValueError, match="no such fault"):
        sandbox.fault(call_name, kind)
