"""The sandbox itself: its recorded requests, its reset, its pages, its start and its end."""

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
    assert (speech.call, speech.method) == ("speech", "POST")
    assert speech.path == f"/v1/text-to-speech/{sandbox.voice_id}"
    assert speech.query == {"output_format": "mp3_44100_64"}
    assert speech.headers["xi-api-key"] == elevenlabs.KEY
    assert speech.json() == {"text": "Hello!", "model_id": "eleven_multilingual_v2"}
    assert sandbox.calls("picture") == [picture]

    sandbox.reset()
    assert sandbox.requests == []


def test_recording_can_be_turned_off(client):
    """For load tests, requests are only counted."""
    with Sandbox(record=False) as sandbox:
        client.get(sandbox.image_url)
        assert sandbox.requests == []
        assert sandbox.wire.counts["picture"] == 1


def test_a_reset_restores_the_behaviour(sandbox):
    """Whatever a test has set is forgotten."""
    sandbox.video_seconds = 9
    sandbox.polls_to_finish = 9
    sandbox.plan = "free"
    sandbox.reset()
    assert (sandbox.video_seconds, sandbox.polls_to_finish, sandbox.plan) == (0.0, 3, "pro")


def test_a_port_in_use_is_an_error_that_leaves_nothing(sandbox):
    """The error names the port, and no folder is left."""
    second = Sandbox(sandbox.port)
    message = f"port {sandbox.port} is in use: choose another one for the providers"
    with pytest.raises(PortTaken, match=message):
        second.start()
    assert not Path(second.folder.name).exists()


def test_it_stops_at_once(client):
    """A response that is still to come does not hold it up."""
    with Sandbox() as sandbox:
        sandbox.fault("picture", "slow", seconds=60)
        with pytest.raises(httpx.ReadTimeout):
            client.get(sandbox.image_url, timeout=0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 1


# Its pages


def test_the_page_gets_the_service_a_picture_and_a_voice(sandbox, call, monkeypatch, tmp_path):
    """They are filled in; without the file there is no page."""
    page = tmp_path / "page.html"
    monkeypatch.setattr(providers, "PAGE_FILE", page)
    assert call("GET", "/").status_code == 404

    page.write_text("{{SERVICE_URL}} {{IMAGE_URL}} {{VOICE_ID}}")
    monkeypatch.setattr(sandbox, "service_url", "http://service")
    assert call("GET", "/").text == f"http://service {sandbox.image_url} {sandbox.voice_id}"


def test_the_page_knows_every_model_and_voice(call, monkeypatch, tmp_path):
    """They are JSON for its script, the default first, and each of them exists."""
    page = tmp_path / "page.html"
    monkeypatch.setattr(providers, "PAGE_FILE", page)
    page.write_text('{"models": {{MODELS}}, "voices": {{VOICES}}}')
    known = call("GET", "/").json()

    first = dict(known["models"][0])
    del first["version"]
    assert first == {"name": "minimax/hailuo-02", "speaks": False, "official": True}
    models = {model["name"]: model for model in known["models"]}
    community = [name for name, model in models.items() if not model["official"]]
    assert community == ["lightricks/ltx-video"]
    assert models["wan-video/wan-2.2-s2v"]["speaks"]

    for name, model in models.items():
        path = f"/v1/models/{name}/versions/{model['version']}"
        assert call("GET", path, headers=BEARER).status_code == 200
    for voice in known["voices"]:
        text = voice["name"][:1]
        assert speak(call, voice["id"], json={"text": text}).status_code == 200


def test_json_cannot_end_the_script_it_stands_in():
    """No tag can begin in it, and it still holds the same value."""
    text = providers.script_json(["</script>"])
    assert "<" not in text
    assert json.loads(text) == ["</script>"]


def test_the_client_script_is_served_to_any_page(call, monkeypatch, tmp_path):
    """It is a module for any origin, never cached; without the file there is none."""
    script = tmp_path / "client.js"
    monkeypatch.setattr(providers, "CLIENT_FILE", script)
    assert call("GET", "/client.js").status_code == 404

    script.write_text("export const é = 1")
    response = call("GET", "/client.js")
    assert response.text == "export const é = 1"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "is_added",
    [pytest.param(False, id="the pet"), pytest.param(True, id="an added picture")],
)
def test_a_picture_can_be_inspected_first(call, is_added):
    """HEAD gives its type and size; a GET of the first byte gives that byte and the size."""
    path = "/pet.jpg"
    if is_added:
        url = call("POST", "/pictures", content=PET).json()["url"]
        path = httpx.URL(url).path

    head = call("HEAD", path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "image/jpeg"
    assert head.headers["content-length"] == str(len(PET))

    first = call("GET", path, headers={"range": "bytes=0-0"})
    assert (first.status_code, first.content) == (206, PET[:1])
    assert first.headers["content-range"] == f"bytes 0-0/{len(PET)}"


# What was paid for


def test_what_was_paid_for_is_counted(sandbox, call):
    """Speeches by their text, but no refused ones; predictions by their input; until the reset."""
    sandbox.video(b"video")
    for text in ("One", "One", "Two", " "):
        speak(call, json={"text": text})
    first = create(sandbox, call, prompt="first")
    second = create(sandbox, call, prompt="second")

    assert sandbox.speeches == {"One": 2, "Two": 1}
    assert [one.id for one in sandbox.created(prompt="first")] == [first["id"]]
    assert [one.id for one in sandbox.created(duration=6)] == [first["id"], second["id"]]

    sandbox.reset()
    assert sandbox.speeches == {}
    assert sandbox.created() == []


def test_an_unknown_path_is_a_404_that_names_it(call):
    """No provider has it."""
    response = call("GET", "/v1/nothing")
    assert response.status_code == 404
    assert response.json()["detail"] == "the sandbox knows no GET /v1/nothing"
