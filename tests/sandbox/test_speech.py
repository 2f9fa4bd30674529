"""The stand-in of ElevenLabs refuses what the real one refuses, and its speech can be heard."""

from __future__ import annotations

import pytest

from tests.sandbox import elevenlabs, media
from tests.sandbox.calls import ELEVEN, loudness, speak
from tests.sandbox.media import probe

JSON = {**ELEVEN, "content-type": "application/json"}


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        pytest.param({"headers": {}}, 401, "needs_authorization", id="no key"),
        pytest.param(
            {"headers": {"xi-api-key": "sk_other"}}, 401, "invalid_api_key", id="unknown key"
        ),
        pytest.param(
            {"voice_id": "SandboxVoiceNobody00"}, 404, "voice_not_found", id="unknown voice"
        ),
        pytest.param({"voice_id": "a%20b"}, 400, "invalid_uid", id="malformed voice"),
        pytest.param(
            {"params": {"output_format": "mp3"}}, 400, "invalid_output_format", id="unknown format"
        ),
        pytest.param({"json": {"text": "  "}}, 400, "empty_text", id="blank text"),
        pytest.param(
            {"json": {"text": "a", "model_id": "eleven_v9"}},
            400,
            "model_not_found",
            id="unknown model",
        ),
        pytest.param(
            {"json": {"text": "a" * 10_001}},
            400,
            "max_character_limit_exceeded",
            id="text too long",
        ),
        pytest.param(
            {"json": None, "content": b"{"}, 400, "invalid_content_type", id="no content type"
        ),
        pytest.param(
            {"json": None, "content": b"{", "headers": JSON},
            400,
            "malformed_json",
            id="broken JSON",
        ),
    ],
)
def test_speech_is_refused_with_the_status_and_code_of_elevenlabs(call, how, status, code):
    """Each bad request gets the real refusal: the HTTP status, and under `detail` a status that names the reason."""
    answer = speak(call, **how)
    assert (answer.status_code, answer.json()["detail"]["status"]) == (status, code)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        pytest.param(
            {}, {"loc": ["body", "text"], "msg": "Field required", "type": "missing"}, id="no text"
        ),
        pytest.param(
            {"text": 5},
            {
                "loc": ["body", "text"],
                "msg": "Input should be a valid string",
                "type": "string_type",
            },
            id="text is a number",
        ),
    ],
)
def test_a_speech_body_of_another_shape_is_a_422_with_a_list(call, body, problem):
    """The other error shape of ElevenLabs has a list under `detail`."""
    answer = speak(call, json=body)
    assert (answer.status_code, answer.json()) == (422, {"detail": [problem]})


@pytest.mark.parametrize(
    ("plan", "how", "status", "code"),
    [
        pytest.param(
            "free",
            {"voice_id": elevenlabs.LIBRARY_VOICE},
            402,
            "payment_required",
            id="library voice",
        ),
        pytest.param(
            "creator",
            {"params": {"output_format": "wav_44100"}},
            403,
            "output_format_not_allowed",
            id="format of Pro",
        ),
    ],
)
def test_what_the_plan_does_not_include_is_refused(sandbox, call, plan, how, status, code):
    """A smaller plan refuses what a larger one allows."""
    assert speak(call, **how).status_code == 200
    sandbox.plan = plan
    answer = speak(call, **how)
    assert (answer.status_code, answer.json()["detail"]["status"]) == (status, code)


def test_an_output_format_in_the_body_is_ignored(call):
    """As with the real one, only the query counts: the answer is MP3 all the same."""
    answer = speak(call, json={"text": "Hello!", "output_format": "wav_16000"})
    assert answer.status_code == 200
    assert answer.content.startswith((b"ID3", b"\xff"))


RAW_INPUT = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}
CODECS = {
    "mp3": "mp3",
    "wav": "pcm_s16le",
    "pcm": "pcm_s16le",
    "opus": "opus",
    "ulaw": "pcm_mulaw",
    "alaw": "pcm_alaw",
}


@pytest.mark.parametrize("output_format", media.FORMATS)
def test_every_output_format_is_what_its_name_says(tmp_path, output_format):
    """Codec, sample rate and length are right; pcm, ulaw and alaw come without a header, so their bytes are counted."""
    codec, rate = output_format.split("_")[:2]
    sound = media.speech("Hello!", output_format, seconds=1.0)
    path = tmp_path / "sound"
    path.write_bytes(sound)
    if codec in RAW_INPUT:
        assert len(sound) == pytest.approx(int(rate) * (2 if codec == "pcm" else 1), rel=0.01)
        found = probe(path, "-f", RAW_INPUT[codec], "-ar", rate, "-ac", "1")
    else:
        found = probe(path)
        assert found.seconds == pytest.approx(1.0, abs=0.06)
    assert (found.audio, found.sample_rate) == (CODECS[codec], int(rate))


def test_speech_can_be_heard_and_follows_the_text(call):
    """Each letter is a tone of its own, punctuation is silence, a longer text takes longer."""
    loud, silent = (
        speak(call, json={"text": text}, params=PCM).content for text in ("hello", "a....!")
    )
    assert loudness(loud) > 1000
    assert loudness(silent[-8000:]) < 10
    assert len(speak(call, json={"text": "hello hello"}, params=PCM).content) > 2 * len(loud)
    assert speak(call, json={"text": "hillo"}, params=PCM).content != loud


PCM = {"output_format": "pcm_16000"}


def test_speech_takes_the_seconds_that_a_test_asks_for(sandbox, call):
    """`speech_seconds` gives the exact length."""
    sandbox.speech_seconds = 2.5
    assert len(speak(call, params=PCM).content) == pytest.approx(2 * 16_000 * 2.5, rel=0.01)
