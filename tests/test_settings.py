"""Settings: defaults, what is refused and in which words, where they come from."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import httpx
import pytest

import main
from tests.inprocess import SECRETS, log_lines, running_application, use_settings

ROOT = Path(main.__file__).parent
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
    "ELEVEN_BASE_URL": "https://api.elevenlabs.io",
    "REPLICATE_BASE_URL": "https://api.replicate.com",
    "ALLOW_PRIVATE_URLS": False,
    "POLL_MIN_SECONDS": 0.25,
    "RETRY_FIRST_SECONDS": 0.5,
    "KEEPALIVE_SECONDS": 10,
}
KEYS_FOR_SPEECH = ["ELEVEN_API_KEY", "REPLICATE_API_TOKEN", "SUPABASE_URL", "SUPABASE_SERVICE_ROLE"]
NOT_A_URL = "should be an absolute http(s) URL, such as https://example.com"
NOT_ORIGINS = "should be *, one origin such as https://example.com, or several separated by commas"
NO_KEY = "holds a blank or a character that no key has"


def setting(name: str, text: str | None) -> object:
    """What a variable is read as; a key as plain text."""
    value = getattr(main.read_settings({name: text}), name.lower())
    return value.get_secret_value() if name in SECRETS and value else value


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment for a process of its own, without any variable of the service but these."""
    kept = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    return {**kept, **variables}


def test_every_setting_is_known_here():
    """The table of defaults above leaves no setting out."""
    assert [name.upper() for name in main.Settings.model_fields] == list(DEFAULTS)


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="unset"),
        pytest.param("", id="empty"),
        pytest.param("  \t", id="blank"),
    ],
)
def test_an_unset_or_empty_variable_is_its_default(name, default, text):
    """Empty counts as unset."""
    assert setting(name, text) == default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        pytest.param("ELEVEN_API_KEY", " sk_abc \n", "sk_abc", id="blanks around a key"),
        pytest.param("SUPABASE_SERVICE_ROLE", "sb_secret_x-Y_9", "sb_secret_x-Y_9", id="a new storage key"),
        pytest.param("SUPABASE_URL", "https://x.supabase.co/", "https://x.supabase.co", id="slash at the end"),
        pytest.param("SUPABASE_URL", "http://localhost:8000", "http://localhost:8000", id="plain http with a port"),
        pytest.param(
            "REPLICATE_BASE_URL", "https://proxy.example/replicate/", "https://proxy.example/replicate", id="path"
        ),
        pytest.param("SUPABASE_BUCKET", "my.pets_2-x", "my.pets_2-x", id="bucket"),
        pytest.param("TTS_OUTPUT_FORMAT", "pcm_16000", "pcm_16000", id="speech format"),
        pytest.param("TTS_MAX_CHARS", "1", 1, id="shortest text"),
        pytest.param("JOB_TIMEOUT_SECONDS", "90.5", 90.5, id="half a second"),
        pytest.param("JOB_TIMEOUT_SECONDS", "86400", 86400, id="a day"),
        pytest.param("ALLOW_PRIVATE_URLS", "true", True, id="true"),
        pytest.param("ALLOW_PRIVATE_URLS", "FALSE", False, id="false in capitals"),
        pytest.param("ALLOW_PRIVATE_URLS", "1", True, id="1"),
        pytest.param("POLL_MIN_SECONDS", "0.01", 0.01, id="fast polls"),
        pytest.param("KEEPALIVE_SECONDS", "15", 15, id="longest silence"),
        pytest.param("ALLOWED_ORIGIN", "https://a.example", "https://a.example", id="one origin"),
        pytest.param("ALLOWED_ORIGIN", "https://a.example/", "https://a.example", id="an origin with a slash"),
        pytest.param(
            "ALLOWED_ORIGIN",
            "https://a.example , http://b.example:8080/",
            "https://a.example,http://b.example:8080",
            id="two",
        ),
        pytest.param("ALLOWED_ORIGIN", "capacitor://localhost", "capacitor://localhost", id="an app's origin"),
    ],
)
def test_values_are_taken(name, text, value):
    """A sound value is taken, tidied up."""
    assert setting(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param("ELEVEN_BASE_URL", "api.elevenlabs.io", NOT_A_URL, id="base URL without scheme"),
        pytest.param("REPLICATE_BASE_URL", "ftp://replicate.com", NOT_A_URL, id="base URL with another scheme"),
        pytest.param("SUPABASE_URL", "https://", NOT_A_URL, id="URL without a host"),
        pytest.param("SUPABASE_URL", "https://user@x.supabase.co", NOT_A_URL, id="URL with a user"),
        pytest.param("SUPABASE_URL", "https://x.supabase.co?a=1", NOT_A_URL, id="URL with a query"),
        pytest.param("SUPABASE_URL", "https://x supabase.co", NOT_A_URL, id="URL with a blank"),
        pytest.param(
            "SUPABASE_BUCKET", "a/b", "String should match pattern '^[A-Za-z0-9_.-]+$'", id="bucket with a slash"
        ),
        pytest.param("TTS_MAX_CHARS", "0", "Input should be greater than or equal to 1", id="no characters"),
        pytest.param(
            "TTS_MAX_CHARS",
            "many",
            "Input should be a valid integer, unable to parse string as an integer",
            id="characters as a word",
        ),
        pytest.param("JOB_TIMEOUT_SECONDS", "0", "Input should be greater than or equal to 1", id="no time"),
        pytest.param("JOB_TIMEOUT_SECONDS", "86401", "Input should be less than or equal to 86400", id="over a day"),
        pytest.param("JOB_TIMEOUT_SECONDS", "nan", "Input should be less than or equal to 86400", id="not a number"),
        pytest.param("JOB_TIMEOUT_SECONDS", "inf", "Input should be less than or equal to 86400", id="for ever"),
        pytest.param(
            "JOB_TIMEOUT_SECONDS",
            "10m",
            "Input should be a valid number, unable to parse string as a number",
            id="time with a unit",
        ),
        pytest.param(
            "ALLOW_PRIVATE_URLS", "maybe", "Input should be a valid boolean, unable to interpret input", id="maybe"
        ),
        pytest.param("POLL_MIN_SECONDS", "0", "Input should be greater than 0", id="polls without a wait"),
        pytest.param("RETRY_FIRST_SECONDS", "-1", "Input should be greater than 0", id="a wait before now"),
        pytest.param("KEEPALIVE_SECONDS", "16", "Input should be less than or equal to 15", id="too long a silence"),
        pytest.param("ALLOWED_ORIGIN", "example.com", NOT_ORIGINS, id="origin without scheme"),
        pytest.param("ALLOWED_ORIGIN", "https://a.example/path", NOT_ORIGINS, id="origin with a path"),
        pytest.param("ALLOWED_ORIGIN", "https://a.example,", NOT_ORIGINS, id="a comma too many"),
        pytest.param("ALLOWED_ORIGIN", "https://a.example https://b.example", NOT_ORIGINS, id="origins without comma"),
    ],
)
def test_a_malformed_value_is_refused_in_one_line(name, text, message):
    """The message names variable, value and what is wrong, and nothing else."""
    with pytest.raises(ValueError, match="=") as caught:
        main.read_settings({name: text})
    assert str(caught.value) == f"{name}={text!r}: {message}"


def test_a_speech_format_that_does_not_exist_is_refused_with_those_that_do():
    """All 28 formats of ElevenLabs stand in the message."""
    with pytest.raises(ValueError, match=r"^TTS_OUTPUT_FORMAT='mp3': Input should be ") as caught:
        main.read_settings({"TTS_OUTPUT_FORMAT": "mp3"})
    assert str(caught.value).count("_") >= 28
    assert all(
        f"'{name}'" in str(caught.value) for name in ("mp3_44100_192", "opus_48000_32", "wav_44100", "alaw_8000")
    )


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("secret 123", id="blank inside"),
        pytest.param("secret\n123", id="line break inside"),
        pytest.param("secr\u00e9t123", id="not ASCII"),
    ],
)
def test_a_malformed_key_is_not_shown(name, text):
    """What is wrong with a key is told, the key is not."""
    with pytest.raises(ValueError, match="=") as caught:
        main.read_settings({name: text})
    assert str(caught.value) == f"{name}=(not shown): {NO_KEY}"


def test_keys_do_not_show_in_the_settings_themselves():
    """Settings that end in a log or a traceback hold no key."""
    settings = main.read_settings(SECRETS)
    assert not [key for key in SECRETS.values() if key in repr(settings) or key in str(settings)]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        pytest.param(
            "JOB_TIMEOUT_SECONDS",
            "soon",
            "JOB_TIMEOUT_SECONDS='soon': Input should be a valid number, unable to parse string as a number",
            id="value",
        ),
        pytest.param("ELEVEN_API_KEY", "secret 123", f"ELEVEN_API_KEY=(not shown): {NO_KEY}", id="key"),
    ],
)
def test_the_process_does_not_start_with_a_malformed_value(name, text, line):
    """uvicorn ends with code 1 and that one line."""
    command = [sys.executable, "-m", "uvicorn", "main:app", "--host", "127.0.0.1", "--port", "0"]
    ended = subprocess.run(
        command, cwd=ROOT, env=clean_environment(**{name: text}), capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stdout, ended.stderr.splitlines()) == (1, "", [line])


def test_the_environment_wins_over_the_env_file(tmp_path):
    """`.env` beside main.py fills in what the environment leaves unset; an empty variable hides its line."""
    shutil.copy(ROOT / "main.py", tmp_path)
    lines = ["TTS_MAX_CHARS=11", "SUPABASE_BUCKET=file", "REPLICATE_API_TOKEN=r8_file", "ELEVEN_API_KEY="]
    (tmp_path / ".env").write_text("\n".join(lines))
    script = "import main; s = main.get_settings(); print(s.tts_max_chars, s.supabase_bucket, s.missing())"
    environment = clean_environment(SUPABASE_BUCKET="environment", REPLICATE_API_TOKEN="", PYTHONPATH=str(tmp_path))
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
    )
    assert (ran.stdout.strip(), ran.stderr) == (f"11 environment {KEYS_FOR_SPEECH}", "")


def test_settings_are_read_once():
    """One process has one configuration."""
    assert main.get_settings() is main.get_settings()


@pytest.mark.anyio
@pytest.mark.parametrize("unset", [[], ["REPLICATE_API_TOKEN"], ["ELEVEN_API_KEY", "SUPABASE_URL"], KEYS_FOR_SPEECH])
async def test_missing_keys_are_warned_of_once_at_start(monkeypatch, caplog, unset):
    """One line names every variable without which something will fail; none if all are there."""
    use_settings(monkeypatch, **dict.fromkeys(unset, ""))
    async with main.lifespan(main.app):
        pass
    expected = f"not set: {', '.join(unset)}; requests that need them are answered 500"
    assert log_lines(caplog) == ([expected] if unset else [])


@pytest.mark.anyio
@pytest.mark.parametrize("name", KEYS_FOR_SPEECH)
async def test_a_request_that_needs_an_unset_key_is_answered_500_naming_it(monkeypatch, respx_mock, name):
    """No provider is called: respx would refuse every request."""
    use_settings(monkeypatch, **{name: ""})
    body = {"image_url": "https://example.com/pet.jpg", "prompt": "It talks", "text": "Hello", "voice_id": "abc"}
    async with running_application() as client:
        response = await client.post("/jobs_prompt_tts", json=body)
    assert (response.status_code, response.json()["category"]) == (500, "configuration")
    assert response.json()["detail"] == f"The service is not set up for this: set {name}."


def service_with(monkeypatch: pytest.MonkeyPatch, **variables: str) -> ModuleType:
    """The service as it is when it starts with these variables: its application reads them once, at import."""
    use_settings(monkeypatch, **variables)
    spec = importlib.util.spec_from_file_location("main_started_anew", main.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("allowed", "origin", "answered"),
    [
        pytest.param("", "https://a.example", "*", id="by default everybody"),
        pytest.param("*", "null", "*", id="everybody, from a file"),
        pytest.param("https://a.example", "https://a.example", "https://a.example", id="the one"),
        pytest.param(
            "https://a.example/", "https://a.example", "https://a.example", id="the one, written with a slash"
        ),
        pytest.param("https://a.example, https://b.example", "https://b.example", "https://b.example", id="the second"),
        pytest.param("https://a.example", "https://b.example", None, id="another"),
        pytest.param("https://a.example", "https://a.example.evil.example", None, id="one that begins alike"),
        pytest.param("https://a.example", "http://a.example", None, id="another scheme"),
    ],
)
async def test_browsers_may_call_from_the_allowed_origins(monkeypatch, allowed, origin, answered):
    """CORS headers stand on an answer for an allowed origin, and never with credentials."""
    service = service_with(monkeypatch, ALLOWED_ORIGIN=allowed)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://service") as client:
        response = await client.get("/health", headers={"Origin": origin})
    assert response.headers.get("access-control-allow-origin") == answered
    assert "access-control-allow-credentials" not in response.headers
