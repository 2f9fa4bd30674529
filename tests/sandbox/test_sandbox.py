"""The sandbox itself: its record, its reset, its pages, its start and end."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from tests.sandbox import PortTaken, Sandbox, elevenlabs, providers
from tests.sandbox.calls import BEARER, PET, create, speak


def test_requests_are_recorded(sandbox, call):
    """Call, method, path, query, headers and body are kept in order, until the reset."""
    speak(call, params={"output_format": "mp3_44100_64"})
    call("GET", "/pet.jpg")
    speech, picture = sandbox.requests
    assert (speech.call, speech.method, speech.query) == (
        "speech",
        "POST",
        {"output_format": "mp3_44100_64"},
    )
    assert (speech.path, speech.headers["xi-api-key"]) == (
        f"/v1/text-to-speech/{sandbox.voice_id}",
        elevenlabs.KEY,
    )
    assert speech.json() == {"text": "Hello!", "model_id": "eleven_multilingual_v2"}
    assert sandbox.calls("picture") == [picture]
    sandbox.reset()
    assert sandbox.requests == []


def test_recording_can_be_left_out(client):
    """For load tests: requests are counted only."""
    with Sandbox(record=False) as sandbox:
        client.get(sandbox.image_url)
        assert (sandbox.requests, sandbox.wire.counts["picture"]) == ([], 1)


def test_a_reset_brings_the_first_behaviour_back(sandbox):
    """Whatever a test has set is forgotten."""
    sandbox.video_seconds, sandbox.reads_to_finish, sandbox.plan = 9, 9, "free"
    sandbox.reset()
    assert (sandbox.video_seconds, sandbox.reads_to_finish, sandbox.plan) == (0.0, 3, "pro")


def test_a_port_in_use_is_an_error_that_leaves_nothing(sandbox):
    """No folder stays behind."""
    second = Sandbox(sandbox.port)
    with pytest.raises(
        PortTaken, match=f"port {sandbox.port} is in use: choose another one for the providers"
    ):
        second.start()
    assert not Path(second.folder.name).exists()


def test_it_stops_at_once_whatever_is_under_way(client):
    """An answer that nobody would wait for does not hold it up."""
    with Sandbox() as sandbox:
        sandbox.fault("picture", "slow", seconds=60)
        with pytest.raises(httpx.ReadTimeout):
            client.get(sandbox.image_url, timeout=0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 1


def test_the_page_knows_where_it_is(sandbox, call, monkeypatch, tmp_path):
    """The service's URL, the picture and a voice are put in; without the file there is no page."""
    monkeypatch.setattr(providers, "PAGE_FILE", tmp_path / "page.html")
    assert call("GET", "/").status_code == 404
    (tmp_path / "page.html").write_text("{{SERVICE_URL}} {{IMAGE_URL}} {{VOICE_ID}}")
    monkeypatch.setattr(sandbox, "service_url", "http://service")
    assert call("GET", "/").text == f"http://service {sandbox.image_url} {sandbox.voice_id}"


def test_the_page_knows_every_model_and_voice(call, monkeypatch, tmp_path):
    """As JSON for its script, the default first; whatever is named there can be asked for."""
    monkeypatch.setattr(providers, "PAGE_FILE", tmp_path / "page.html")
    (tmp_path / "page.html").write_text('{"models": {{MODELS}}, "voices": {{VOICES}}}')
    known = call("GET", "/").json()
    first = known["models"][0]
    assert {**first, "version": ""} == {
        "name": "minimax/hailuo-02",
        "speaks": False,
        "official": True,
        "version": "",
    }
    named = {model["name"]: model for model in known["models"]}
    assert [name for name, model in named.items() if not model["official"]] == [
        "lightricks/ltx-video"
    ]
    assert named["wan-video/wan-2.2-s2v"]["speaks"]
    for name, model in named.items():
        path = f"/v1/models/{name}/versions/{model['version']}"
        assert call("GET", path, headers=BEARER).status_code == 200
    for voice in known["voices"]:
        assert speak(call, voice["id"], json={"text": voice["name"][:1]}).status_code == 200


def test_what_stands_in_a_script_cannot_end_it():
    """No tag can begin in the JSON, and it reads as what it was."""
    text = providers.script_json(["</script>"])
    assert "<" not in text
    assert json.loads(text) == ["</script>"]


def test_the_client_script_is_served_to_any_page(call, monkeypatch, tmp_path):
    """As a module of any origin loads it, and always the newest; without the file there is none."""
    monkeypatch.setattr(providers, "CLIENT_FILE", tmp_path / "client.js")
    assert call("GET", "/client.js").status_code == 404
    (tmp_path / "client.js").write_text("export const é = 1")
    answer = call("GET", "/client.js")
    assert answer.text == "export const é = 1"
    wanted = {"access-control-allow-origin": "*", "cache-control": "no-cache"}
    assert wanted.items() <= dict(answer.headers).items()
    assert answer.headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "added", [pytest.param(False, id="the pet"), pytest.param(True, id="a picture brought")]
)
def test_a_picture_can_be_looked_at_first(call, added):
    """HEAD tells type and size, and a GET of the first byte gives that byte and the size."""
    path = (
        httpx.URL(call("POST", "/pictures", content=PET).json()["url"]).path
        if added
        else "/pet.jpg"
    )
    head = call("HEAD", path)
    first = call("GET", path, headers={"range": "bytes=0-0"})
    assert (head.status_code, head.headers["content-type"], head.content) == (
        200,
        "image/jpeg",
        b"",
    )
    assert head.headers["content-length"] == str(len(PET))
    assert (first.status_code, first.content) == (206, PET[:1])
    assert first.headers["content-range"] == f"bytes 0-0/{len(PET)}"


def test_what_was_bought_is_counted(sandbox, call):
    """Speeches by their text, refused ones not; predictions by what their input holds; until the reset."""
    sandbox.video(b"video")
    for text in ("One", "One", "Two", " "):
        speak(call, json={"text": text})
    first, second = create(sandbox, call, prompt="first"), create(sandbox, call, prompt="second")
    assert sandbox.speeches == {"One": 2, "Two": 1}
    assert [one.id for one in sandbox.created(prompt="first")] == [first["id"]]
    assert [one.id for one in sandbox.created(duration=6)] == [first["id"], second["id"]]
    sandbox.reset()
    assert (sandbox.speeches, sandbox.created()) == ({}, [])


def test_an_unknown_path_says_so(call):
    """No provider has it: a 404 that names it."""
    answer = call("GET", "/v1/nothing")
    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "the sandbox knows no GET /v1/nothing",
    )
