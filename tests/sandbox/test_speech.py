"""The stand-in for ElevenLabs: it refuses what ElevenLabs refuses, and its speech is audible."""

from __future__ import annotations

import pytest

from tests.sandbox import elevenlabs, media
from tests.sandbox.calls import ELEVEN, loudness, speak
from tests.sandbox.media import probe

JSON = {**ELEVEN, "content-type": "application/json"}
PCM = {"output_format": "pcm_16000"}
RAW_FORMATS = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}
CODECS = {
    "mp3": "mp3",
    "wav": "pcm_s16le",
    "pcm": "pcm_s16le",
    "opus": "opus",
    "ulaw": "pcm_mulaw",
    "alaw": "pcm_alaw",
}


# Refusals


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        pytest.param({"headers": {}}, 401, "needs_authorization", id="no key"),
        pytest.param(
            {"headers": {"xi-api-key": "sk_other"}},
            401,
            "invalid_api_key",
            id="unknown key",
        ),
        pytest.param(
            {"voice_id": "SandboxVoiceNobody00"},
            404,
            "voice_not_found",
            id="unknown voice",
        ),
        pytest.param({"voice_id": "a%20b"}, 400, "invalid_uid", id="malformed voice"),
        pytest.param(
            {"params": {"output_format": "mp3"}},
            400,
            "invalid_output_format",
            id="unknown format",
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
            {"json": None, "content": b"{"},
            400,
            "invalid_content_type",
            id="no content type",
        ),
        pytest.param(
            {"json": None, "content": b"{", "headers": JSON},
            400,
            "malformed_json",
            id="broken JSON",
        ),
    ],
)
def test_speech_is_refused_with_elevenlabs_own_status_and_code(call, options, status, code):
    """Each bad request gets the real HTTP status, and the real reason under `detail`."""
    response = speak(call, **options)
    assert response.status_code == status
    assert response.json()["detail"]["status"] == code


@pytest.mark.parametrize(
    ("body", "message", "kind"),
    [
        pytest.param({}, "Field required", "missing", id="no text"),
        pytest.param(
            {"text": 5},
            "Input should be a valid string",
            "string_type",
            id="text is a number",
        ),
    ],
)
def test_a_body_of_another_shape_is_a_422_with_a_list(call, body, message, kind):
    """The other error shape of ElevenLabs has a list under `detail`."""
    response = speak(call, json=body)
    assert response.status_code == 422
    error = {"loc": ["body", "text"], "msg": message, "type": kind}
    assert response.json() == {"detail": [error]}


@pytest.mark.parametrize(
    ("plan", "options", "status", "code"),
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
def test_a_smaller_plan_refuses_what_it_does_not_include(
    sandbox, call, plan, options, status, code
):
    """The largest plan allows it."""
    assert speak(call, **options).status_code == 200
    sandbox.plan = plan
    response = speak(call, **options)
    assert response.status_code == status
    assert response.json()["detail"]["status"] == code


# Speech


def test_an_output_format_in_the_body_is_ignored(call):
    """Only the query counts, as with ElevenLabs: the response is still MP3."""
    response = speak(call, json={"text": "Hello!", "output_format": "wav_16000"})
    assert response.status_code == 200
    assert response.content.startswith((b"ID3", b"\xff"))


@pytest.mark.parametrize("output_format", media.FORMATS)
def test_an_output_format_is_what_its_name_says(tmp_path, output_format):
    """Codec, sample rate and length are right; without a header, the bytes are counted."""
    codec, rate = output_format.split("_")[:2]
    speech = media.speech("Hello!", output_format, seconds=1.0)
    path = tmp_path / "speech"
    path.write_bytes(speech)

    if codec in RAW_FORMATS:
        bytes_per_sample = 2 if codec == "pcm" else 1
        assert len(speech) == pytest.approx(int(rate) * bytes_per_sample, rel=0.01)
        found = probe(path, "-f", RAW_FORMATS[codec], "-ar", rate, "-ac", "1")
    else:
        found = probe(path)
        assert found.seconds == pytest.approx(1.0, abs=0.06)
    assert (found.audio, found.sample_rate) == (CODECS[codec], int(rate))


def test_speech_is_audible_and_follows_the_text(call):
    """Each letter has a tone of its own, punctuation is silence, a longer text takes longer."""

    def samples(text: str) -> bytes:
        """The samples of this text."""
        return speak(call, json={"text": text}, params=PCM).content

    hello = samples("hello")
    assert loudness(hello) > 1000
    assert loudness(samples("a....!")[-8000:]) < 10
    assert len(samples("hello hello")) > 2 * len(hello)
    assert samples("hillo") != hello


def test_speech_has_the_length_that_a_test_asks_for(sandbox, call):
    """`speech_seconds` sets it exactly."""
    sandbox.speech_seconds = 2.5
    speech = speak(call, params=PCM).content
    assert len(speech) == pytest.approx(2 * 16_000 * 2.5, rel=0.01)


# The plan's slots


def test_a_speech_without_a_free_slot_is_refused(sandbox, call):
    """With the code that ElevenLabs has for it; a speech that is made gives its slot back."""
    sandbox.speech_slots = 0
    refused = speak(call)
    assert refused.status_code == 429
    assert refused.json()["detail"]["code"] == "concurrent_limit_exceeded"
    sandbox.speech_slots = 1
    assert [speak(call).status_code for _ in range(2)] == [200, 200]
