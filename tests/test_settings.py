"""Settings: defaults, accepted and rejected values, and where they come from."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import respx

import main
from tests.support.application import SECRETS, log_lines, running_application, use_settings

pytestmark = pytest.mark.anyio

MAIN = Path(main.__file__)
DEFAULTS = {
    "ELEVEN_API_KEY": None,
    "REPLICATE_API_TOKEN": None,
    "SUPABASE_URL": None,
    "SUPABASE_SERVICE_ROLE": None,
    "SUPABASE_BUCKET": "pets",
    "ALLOWED_ORIGIN": "*",
    "TTS_OUTPUT_FORMAT": "mp3_44100_64",
    "TTS_MAX_CHARS": 600,
    "JOB_TIMEOUT_SECONDS": 600,
    "SERVICE_TOKEN": None,
    "MAX_VIDEOS_PER_HOUR": None,
    "ALLOWED_MODELS": None,
    "ELEVEN_BASE_URL": "https://api.elevenlabs.io",
    "REPLICATE_BASE_URL": "https://api.replicate.com",
    "ALLOW_PRIVATE_URLS": False,
    "POLL_MIN_SECONDS": 0.25,
    "RETRY_FIRST_SECONDS": 0.5,
    "PATIENCE_SECONDS": 120,
    "KEEPALIVE_SECONDS": 10,
}
KEYS_FOR_SPEECH = ["ELEVEN_API_KEY", "REPLICATE_API_TOKEN", "SUPABASE_URL", "SUPABASE_SERVICE_ROLE"]
JOB = {
    "image_url": "https://example.com/pet.jpg",
    "prompt": "It talks",
    "text": "Hello",
    "voice_id": "abc",
}

# What is set, and what it is read as.
TAKEN: dict[str, dict[str, object]] = {
    "ELEVEN_API_KEY": {" sk_abcde \n": "sk_abcde"},
    "SUPABASE_SERVICE_ROLE": {"sb_secret_x-Y_9": "sb_secret_x-Y_9"},
    "SUPABASE_URL": {
        "https://x.supabase.co/": "https://x.supabase.co",
        "http://localhost:8000": "http://localhost:8000",
    },
    "REPLICATE_BASE_URL": {"https://proxy.example/replicate/": "https://proxy.example/replicate"},
    "SUPABASE_BUCKET": {"my.pets_2-x": "my.pets_2-x"},
    "TTS_OUTPUT_FORMAT": {"pcm_16000": "pcm_16000"},
    "TTS_MAX_CHARS": {"1": 1},
    "JOB_TIMEOUT_SECONDS": {"1": 1, "90.5": 90.5, "86400": 86400},
    "MAX_VIDEOS_PER_HOUR": {"1": 1, "100000": 100_000},
    "ALLOWED_MODELS": {" a/b , c/d:1 ": "a/b,c/d:1"},
    "ALLOW_PRIVATE_URLS": {"true": True, "FALSE": False, "1": True},
    "POLL_MIN_SECONDS": {"0.01": 0.01, "2": 2},
    "RETRY_FIRST_SECONDS": {"10": 10},
    "PATIENCE_SECONDS": {"600": 600},
    "KEEPALIVE_SECONDS": {"15": 15},
    "ALLOWED_ORIGIN": {
        "https://a.example/": "https://a.example",
        "https://a.example , http://b.example:8080/": "https://a.example,http://b.example:8080",
        "capacitor://localhost": "capacitor://localhost",  # an app's
    },
}

NOT_A_URL = "must be an absolute http(s) URL, such as https://example.com"
NOT_ORIGINS = "must be *, one origin such as https://example.com, or several separated by commas"
NO_KEY = "contains a blank or a character that no key has"
NOT_A_NUMBER = "Input should be a valid number, unable to parse string as a number"
OVER_A_DAY = "Input should be less than or equal to 86400"
TOO_SMALL = "Input should be greater than or equal to 1"
NOT_POSITIVE = "Input should be greater than 0"

# What is set, and what is said of it.
REFUSED = {
    "ELEVEN_BASE_URL": {"api.elevenlabs.io": NOT_A_URL},
    "REPLICATE_BASE_URL": {"ftp://replicate.com": NOT_A_URL},
    "SUPABASE_URL": dict.fromkeys(
        (
            "https://",
            "https://user@x.supabase.co",
            "https://x.supabase.co?a=1",
            "https://x supabase.co",
        ),
        NOT_A_URL,
    ),
    "SUPABASE_BUCKET": {"a/b": "String should match pattern '^[A-Za-z0-9_.-]+$'"},
    "TTS_MAX_CHARS": {
        "0": TOO_SMALL,
        "many": "Input should be a valid integer, unable to parse string as an integer",
    },
    "JOB_TIMEOUT_SECONDS": {
        **{"0": TOO_SMALL, "10m": NOT_A_NUMBER},
        **dict.fromkeys(("86401", "nan", "inf"), OVER_A_DAY),
    },
    "MAX_VIDEOS_PER_HOUR": {"0": TOO_SMALL},
    "ALLOWED_MODELS": dict.fromkeys(
        ("hailuo", "a/b,", "a/b c/d"), "must be owner/name, or several separated by commas"
    ),
    "ALLOW_PRIVATE_URLS": {"maybe": "Input should be a valid boolean, unable to interpret input"},
    "POLL_MIN_SECONDS": {"0": NOT_POSITIVE, "2.1": "Input should be less than or equal to 2"},
    "RETRY_FIRST_SECONDS": {"-1": NOT_POSITIVE, "10.1": "Input should be less than or equal to 10"},
    "PATIENCE_SECONDS": {"0": NOT_POSITIVE, "601": "Input should be less than or equal to 600"},
    "KEEPALIVE_SECONDS": {"0": NOT_POSITIVE, "16": "Input should be less than or equal to 15"},
    "ALLOWED_ORIGIN": dict.fromkeys(
        (
            "example.com",
            "https://a.example/path",
            "https://a.example,",
            "https://a.example https://b.example",
        ),
        NOT_ORIGINS,
    ),
}


def setting(name: str, text: str | None) -> object:
    """What a variable is read as; a key as plain text."""
    value = getattr(main.read_settings({name: text}), name.lower())
    return value.get_secret_value() if name in SECRETS and value else value


def refusal(name: str, text: str) -> str:
    """The line that refuses a value."""
    with pytest.raises(ValueError, match="=") as caught:
        main.read_settings({name: text})
    return str(caught.value)


def loaded_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The service as it is in another place."""
    spec = importlib.util.spec_from_file_location("main_elsewhere", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The other module puts its own there
    monkeypatch.setattr(main.logger, "filters", [*main.logger.filters])
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", [None, "", "  \t"], ids=["unset", "empty", "blank"])
def test_an_empty_variable_has_its_default(text):
    """Empty counts as unset; the table above has every setting."""
    settings = main.read_settings(dict.fromkeys(DEFAULTS, text))
    assert {name.upper(): value for name, value in settings} == DEFAULTS


@pytest.mark.parametrize("name", TAKEN)
def test_valid_values_are_accepted(name):
    """A valid value is accepted in its plain form."""
    assert {text: setting(name, text) for text in TAKEN[name]} == TAKEN[name]


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_value_is_rejected_in_one_line(name):
    """The message has the variable, the value and the reason, and nothing else."""
    expected = [f"{name}={text!r}: {message}" for text, message in REFUSED[name].items()]
    assert [refusal(name, text) for text in REFUSED[name]] == expected


@pytest.mark.parametrize(
    "text", ["mp3", "mp3_44100_65", "mp3_44100_641", "opus_44100_64", "wav_8000_32", "xulaw_8000"]
)
def test_an_unknown_speech_format_is_rejected_with_the_known_ones(text):
    """The message has the pattern of ElevenLabs' formats."""
    message = refusal("TTS_OUTPUT_FORMAT", text)
    assert message.startswith(
        f"TTS_OUTPUT_FORMAT={text!r}: String should match pattern '^(mp3_22050_32|"
    )


@pytest.mark.parametrize("text", ["secret 123", "secret\n123", "secr\u00e9t123"])
def test_a_malformed_key_is_not_shown(text):
    """The message has the reason, but not the key."""
    assert [refusal(name, text) for name in SECRETS] == [
        f"{name}=(not shown): {NO_KEY}" for name in SECRETS
    ]


def test_a_key_is_not_so_short_that_words_contain_it():
    """Redacted everywhere, a key of one letter would leave no text readable."""
    for name in SECRETS:
        message = f"{name}=(not shown): must have at least 8 characters"
        assert refusal(name, "k") == message


def test_the_text_of_the_settings_has_no_key():
    """Settings that end up in a log or a traceback reveal no key."""
    settings = main.read_settings(SECRETS)
    assert not [key for key in SECRETS.values() if key in repr(settings) or key in str(settings)]


def test_the_process_does_not_start_with_an_invalid_value():
    """uvicorn exits with code 1 and one line."""
    command = [sys.executable, "-m", "uvicorn", "main:app", "--host", "127.0.0.1", "--port", "0"]
    environment = {**os.environ, "JOB_TIMEOUT_SECONDS": "soon"}
    ended = subprocess.run(
        command, cwd=MAIN.parent, env=environment, capture_output=True, text=True, timeout=30
    )
    line = f"JOB_TIMEOUT_SECONDS='soon': {NOT_A_NUMBER}"
    assert (ended.returncode, ended.stdout, ended.stderr.splitlines()) == (1, "", [line])


def test_the_environment_overrides_the_env_file(tmp_path, monkeypatch):
    """`.env` fills in what the environment leaves unset; an empty variable hides its line."""
    lines = [
        "TTS_MAX_CHARS=11",
        "SUPABASE_BUCKET=file",
        "REPLICATE_API_TOKEN=r8_file",
        "JOB_TIMEOUT_SECONDS=",
    ]
    (tmp_path / ".env").write_text("\n".join(lines))
    monkeypatch.delenv("TTS_MAX_CHARS")
    monkeypatch.setenv("SUPABASE_BUCKET", "environment")
    settings = loaded_from(shutil.copy(MAIN, tmp_path), monkeypatch).get_settings()
    assert (settings.tts_max_chars, settings.supabase_bucket) == (11, "environment")
    assert (settings.replicate_api_token, settings.job_timeout_seconds) == (None, 600)


def test_settings_are_read_once():
    """One process has one configuration."""
    assert main.get_settings() is main.get_settings()


@pytest.mark.parametrize(
    "unset", [[], ["ELEVEN_API_KEY", "SUPABASE_URL"], KEYS_FOR_SPEECH], ids=len
)
async def test_missing_keys_are_one_warning_at_start(monkeypatch, caplog, unset):
    """One line has every missing variable; without one there is no line."""
    use_settings(monkeypatch, SERVICE_TOKEN="a-token-of-the-owner", **dict.fromkeys(unset, ""))
    async with main.lifespan(main.app):
        pass
    expected = f"not set: {', '.join(unset)}; requests that need them are answered 500"
    lines = [line for line in log_lines(caplog) if "SERVICE_TOKEN" not in line]
    assert lines == ([expected] if unset else [])


@pytest.mark.parametrize("model", [None, "kwaivgi/kling-v2.1"])
@pytest.mark.parametrize("key", [None, "a-key"], ids=["without a key", "with a key"])
@pytest.mark.parametrize("name", KEYS_FOR_SPEECH)
async def test_a_request_that_needs_an_unset_key_is_answered_500_naming_it(
    monkeypatch, name, key, model
):
    """Before any provider is called; a silent video needs one token, its record the storage."""
    use_settings(monkeypatch, **{name: ""})
    headers = {"Idempotency-Key": key} if key else {}
    needed = ["REPLICATE_API_TOKEN", *(["SUPABASE_URL", "SUPABASE_SERVICE_ROLE"] if key else [])]
    async with running_application() as client, respx.mock():
        asked = [
            await client.post("/jobs_prompt_tts", json={**JOB, "model": model}, headers=headers)
        ]
        silent = {**JOB, "seconds": 7}  # refused next
        if name in needed:
            asked.append(await client.post("/jobs_prompt_only", json=silent, headers=headers))
        elif not key:
            assert (await client.post("/jobs_prompt_only", json=silent)).status_code == 400
    for response in asked:
        error = response.json()
        assert (response.status_code, error["category"], error["retryable"]) == (
            500,
            "configuration",
            False,
        )
        assert error["detail"] == f"The service is not set up for this: set {name}."
