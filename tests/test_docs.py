"""README, ARCHITECTURE, .env.example and render.yaml say what the code does."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from fastapi.routing import APIRoute

import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
RENDER = (ROOT / "render.yaml").read_text(encoding="utf-8")
ROUTES = [route for route in main.app.routes if isinstance(route, APIRoute)]


def table(text: str, first_header: str) -> list[list[str]]:
    """The rows of the Markdown table whose first header is this one, without backquotes."""
    lines = text.split(f"\n| {first_header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def default_of(name: str) -> str:
    """A setting's default as people write it."""
    default = main.Settings.model_fields[name].default
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else str(default)


DEFAULTS = {name.upper(): default_of(name) for name in main.Settings.model_fields}


def test_readme_has_every_variable_with_its_default() -> None:
    """The table of variables is the list of settings."""
    assert {row[0]: row[1] for row in table(README, "variable")} == DEFAULTS


def test_env_example_has_every_variable_with_its_default() -> None:
    """A copied file changes nothing."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    assert dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) == DEFAULTS


def test_env_example_is_accepted() -> None:
    """Copied as it is, it starts a service without keys."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    texts = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert main.read_settings(texts).missing() == [name.upper() for name in main.SPEECH_JOB_SETTINGS]


def render_variables() -> dict[str, str]:
    """The variables of render.yaml with their value, or `sync: false`."""
    pairs = re.findall(r"- key: (\w+)[^\n]*\n\s+(sync: false|value: [^\n]+)", RENDER)
    return {key: told.removeprefix("value: ").strip('"') for key, told in pairs}


def test_render_asks_for_the_secrets() -> None:
    """No key stands in the repository."""
    asked = {key for key, told in render_variables().items() if told == "sync: false"}
    assert asked == {name.upper() for name in main.SPEECH_JOB_SETTINGS}


def test_render_sets_the_defaults() -> None:
    """What render.yaml sets beside the secrets is the service's own default."""
    own = {key: told for key, told in render_variables().items() if key in DEFAULTS and told != "sync: false"}
    assert own == {key: DEFAULTS[key] for key in own}


def test_render_gives_jobs_time_to_end() -> None:
    """uvicorn's own limit ends before Render's, with time to cancel what still runs."""
    render_s = re.search(r"maxShutdownDelaySeconds: (\d+)", RENDER)
    uvicorn_s = re.search(r"--timeout-graceful-shutdown (\d+)", RENDER)
    assert render_s
    assert uvicorn_s
    assert int(render_s[1]) == 300
    assert int(uvicorn_s[1]) + main.SHUTDOWN_WAIT_S + main.CANCEL_TIMEOUT_S < int(render_s[1])


def test_render_runs_one_process_with_a_health_check() -> None:
    """Pacing is per process; the health check is the route that always answers."""
    assert render_variables()["WEB_CONCURRENCY"] == "1"
    assert re.fullmatch(r"3\.\d+\.\d+", render_variables()["PYTHON_VERSION"])
    assert "healthCheckPath: /health" in RENDER


def test_readme_has_every_route() -> None:
    """Method and path of each."""
    told = [row[0] for row in table(README, "route")]
    assert told == [f"{next(iter(route.methods))} {route.path}" for route in ROUTES]


@pytest.mark.parametrize("route", ROUTES[1:3], ids=lambda route: str(route.path).strip("/"))
def test_readme_has_every_field_of_a_job(route: APIRoute) -> None:
    """Fields and their defaults, what the second job shares said once."""
    assert route.body_field is not None
    fields = route.body_field.field_info.annotation.model_fields
    told = " ".join(row[1] for row in table(README, "route")[1:3])
    assert [name for name in fields if name not in told] == []
    defaults = [json.dumps(field.default) for field in fields.values() if not field.is_required()]
    assert [default for default in defaults if f"({default})" not in told] == []


@pytest.mark.parametrize("document", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_every_stage_is_told(document: str) -> None:
    """The six stages by the names that events, headers and log use."""
    assert [stage for stage in get_args(main.Stage) if f"`{stage}`" not in document] == []


def test_readme_has_every_category() -> None:
    """Each in the table of errors."""
    told = {row[2] for row in table(README, "what happened")}
    assert told == set(get_args(main.Category))


def test_readme_has_every_field_of_an_error() -> None:
    """The one body, and what `partial` can hold."""
    fields = [*main.ErrorBody.model_fields, *main.Partial.model_fields, *main.InputError.model_fields]
    assert [name for name in fields if name not in README.split("## Errors")[1]] == []


def test_readme_shows_answers_as_they_are() -> None:
    """The curl example's answer has the fields of the result, in their order."""
    block = README.split("```json\n", 1)[1].split("\n```", 1)[0]
    assert list(json.loads(block)) == list(main.SpeechResult.model_fields)


def test_architecture_has_every_section_of_the_code() -> None:
    """Its components are the banners of main.py, in their order."""
    banners = re.findall(r"^# -{100,}\n# (\w[^\n:]+)", (ROOT / "main.py").read_text(encoding="utf-8"), re.MULTILINE)
    told = ", ".join(row[0] for row in table(ARCHITECTURE, "section")).split(", ")
    assert told == [name for banner in banners for name in banner.split(", and ")[0].split(", ")]


def test_the_wait_is_told_as_it_is() -> None:
    """Limits that the documents name are the code's."""
    limits = {
        f"{main.MAX_REQUEST_BYTES // 1024} KiB": README,
        f"{main.MAX_DOWNLOAD_BYTES // 1_000_000} MB": README,
        f"{main.MAX_SPEECH_BYTES / 1e6:g} MB": README,
        f"{main.FFMPEG_TIMEOUT_S:g} s": ARCHITECTURE,
        f"{main.SPEECH_TIMEOUT.read:g} s of silence": ARCHITECTURE,
        f"{main.TIMEOUT.read:g} s of silence": ARCHITECTURE,
        f"up to {main.MAX_RETRY_WAIT_S:g} s": ARCHITECTURE,
        f"{main.MAX_ANSWER_BYTES // 1_000_000} MB": ARCHITECTURE,
    }
    assert [limit for limit, document in limits.items() if limit not in document] == []


def test_the_architecture_tells_the_attempts() -> None:
    """Of each stage that is repeated."""
    told = {row[0]: row[2] for row in table(ARCHITECTURE, "stage")}
    for stage, retry in [("speech", main.SPEECH_RETRY), ("audio_upload", main.UPLOAD_RETRY)]:
        assert f"{retry.attempts} attempts" in told[stage]
    assert f"{main.DOWNLOAD_RETRY.attempts} attempts" in told["download"]


def test_no_document_names_a_path_of_some_machine() -> None:
    """Everything is relative to the repository."""
    for name in ("README.md", "ARCHITECTURE.md", "main.py", "render.yaml", ".env.example"):
        assert not re.search(r"/(home|root|work|Users|tmp)/", (ROOT / name).read_text(encoding="utf-8"))
