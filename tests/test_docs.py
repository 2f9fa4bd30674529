"""README, ARCHITECTURE, .env.example and render.yaml say what the code does."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from fastapi.routing import APIRoute

import main
from tests.support.application import provider_response

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
RENDER = (ROOT / "render.yaml").read_text(encoding="utf-8")
ROUTES = [route for route in main.app.routes if isinstance(route, APIRoute) and route.include_in_schema]


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
    """A copied file changes nothing: it starts a service without keys."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    texts = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert texts == DEFAULTS
    assert main.read_settings(texts) == main.Settings()


def render_variables() -> dict[str, str]:
    """The variables of render.yaml with their value, or `sync: false`."""
    pairs = re.findall(r"- key: (\w+)[^\n]*\n\s+(sync: false|value: [^\n]+)", RENDER)
    return {key: told.removeprefix("value: ").strip('"') for key, told in pairs}


def test_render_asks_for_the_secrets_and_sets_the_defaults() -> None:
    """No key stands in the repository; what else is set is the service's own default."""
    known = {key: told for key, told in render_variables().items() if key in DEFAULTS}
    asked = {key for key, told in known.items() if told == "sync: false"}
    assert asked == {name.upper() for name in main.SPEECH_JOB_SETTINGS}
    assert {key: told for key, told in known.items() if key not in asked}.items() <= DEFAULTS.items()


def test_render_runs_one_process_that_has_time_to_end() -> None:
    """Pacing is per process; the health check always answers; uvicorn's limit ends before Render's."""
    variables = render_variables()
    assert (variables["WEB_CONCURRENCY"], variables["PYTHON_VERSION"][:2]) == ("1", "3.")
    assert "healthCheckPath: /health" in RENDER
    [render_s] = re.findall(r"maxShutdownDelaySeconds: (\d+)", RENDER)
    [uvicorn_s] = re.findall(r"--timeout-graceful-shutdown (\d+)", RENDER)
    assert int(uvicorn_s) + main.SHUTDOWN_WAIT_S < int(render_s) == 300


def test_readme_has_every_route_with_its_fields() -> None:
    """Method and path of each; of a job the fields and their defaults, what the second one shares said once."""
    told = table(README, "route")
    assert [row[0] for row in told] == [f"{next(iter(route.methods))} {route.path}" for route in ROUTES]
    for job in (main.JobPromptOnly, main.JobPromptTTS):
        fields, words = job.model_fields, f"{told[1][1]} {told[2][1]}"
        assert [name for name in fields if name not in words] == []
        defaults = [json.dumps(field.default) for field in fields.values() if not field.is_required()]
        assert [default for default in defaults if f"({default})" not in words] == []


@pytest.mark.parametrize("document", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_every_stage_is_told(document: str) -> None:
    """The six stages by the names that events, headers and log use."""
    assert [stage for stage in get_args(main.Stage) if f"`{stage}`" not in document] == []


def test_readme_has_every_kind_of_error() -> None:
    """Status, category and whether it is retryable: those of the classes, and of a provider that refuses the service."""
    classes = [main.SettingMissing, main.InvalidInput, main.SpeechTooLarge, main.ServiceError]
    errors = [kind("") for kind in (*classes, main.ProviderRefused, main.ProviderFailed, main.ResourceFailed)]
    errors += [main.refusal(name, provider_response(403)) for name in ("elevenlabs", "replicate", "supabase")]
    known = {(str(error.http_status), error.category, "yes" if error.retryable else "no") for error in errors}
    assert {tuple(row[1:]) for row in table(README, "what happened")} == known
    assert {category for _, category, _ in known} == set(get_args(main.Category))


def test_readme_has_every_field_of_an_error() -> None:
    """The one body, what `partial` and `errors` can hold, and what an event has besides."""
    fields = [*main.ErrorEvent.model_fields, *main.Partial.model_fields, *main.InputError.model_fields]
    told = re.sub(r'"(\w+)"', r"`\1`", README.split("## Errors")[1])
    assert [name for name in fields if f"`{name}`" not in told] == []


def test_readme_shows_answers_as_they_are() -> None:
    """The curl example's answer has the fields of the result, in their order."""
    block = README.split("```json\n", 1)[1].split("\n```", 1)[0]
    assert list(json.loads(block)) == list(main.SpeechResult.model_fields)


def test_readme_is_read_in_one_sitting() -> None:
    """Whoever integrates the service finds what it takes in under 230 lines."""
    assert len(README.splitlines()) < 230


def test_architecture_has_every_section_of_the_code() -> None:
    """Its components are the banners of main.py, in their order."""
    code = (ROOT / "main.py").read_text(encoding="utf-8")
    banners = re.findall(r"^# ---- ([^\n:]+?)(?:, and|:| --)", code, re.MULTILINE)
    assert ", ".join(row[0] for row in table(ARCHITECTURE, "section")).split(", ") == banners


def test_the_wait_is_told_as_it_is() -> None:
    """Limits that the documents name are the code's."""
    longest_s, speech_s, silence_s = main.patience_s(main.QUARTER), main.SPEECH_TIMEOUT.read, main.TIMEOUT.read
    limits = {
        f"{main.MAX_REQUEST_BYTES // 1024} KiB": README,
        f"{main.MAX_DOWNLOAD_BYTES // 1_000_000} MB": README,
        f"{main.MAX_SPEECH_BYTES / 1e6:g} MB": README,
        f"{main.FFMPEG_TIMEOUT_S:g} s": ARCHITECTURE,
        f"{speech_s:g} s of silence, {main.THREE.attempts} attempts": ARCHITECTURE,
        f"{silence_s:g} s of silence, {main.FOUR.attempts} attempts each": ARCHITECTURE,
        f"{silence_s:g} s of silence, {LENGTHS[main.TWO_MINUTES]} of failures": ARCHITECTURE,
        f"the picture is looked at ({main.PICTURE_TIMEOUT_S:g} s)": ARCHITECTURE,
        f"if it is at most {longest_s:g} s; if it asks for more": ARCHITECTURE,
        f"written in the last {longest_s:g} s": ARCHITECTURE,
        f"such a job has {main.patience_s(main.SIXTH):g} s to end": ARCHITECTURE,
        f"for some {main.patience_s(main.TWELFTH):g} s": ARCHITECTURE,
        f"shares of `PATIENCE_SECONDS` ({main.patience_s(main.WHOLE):g})": ARCHITECTURE,
        f"{main.get_settings().retry_first_seconds:g} s doubling to {main.MAX_BACKOFF_S:g} s": ARCHITECTURE,
        f"over {main.MAX_ANSWER_BYTES // 1_000_000} MB (predictions {main.MAX_PREDICTION_BYTES // 1_000_000} MB": ARCHITECTURE,
    }
    assert [limit for limit, document in limits.items() if limit not in document] == []


# The words of ARCHITECTURE for how long something is tried again.
LENGTHS = {
    main.Tries(attempts=3): "3 attempts",
    main.Tries(attempts=4): "4 attempts",
    main.Tries(patience=0.25): "half a minute",
    main.Tries(patience=0.5): "a minute",
    main.Tries(patience=1): "two minutes",
    main.Tries(): "until the deadline",
}
POLICIES = {
    "speech": [main.SPEECH_RETRY], "model look-up": [main.MODEL_RETRY], "create prediction": [main.CREATE_RETRY],
    "list of predictions": [main.LIST_RETRY], "read prediction": [main.READ_RETRY], "cancel": [main.CANCEL_RETRY],
    "upload, download, the job's file": [
        main.STORE_RETRY, main.FETCH_RETRY, main.PAID_STORE_RETRY, main.PAID_FETCH_RETRY,
    ],
}  # fmt: skip


@pytest.mark.parametrize("call", POLICIES)
def test_architecture_tells_what_is_repeated(call: str) -> None:
    """Of each call the statuses, whether a broken connection is among them, and how long it goes on."""
    [told] = [row[1] for row in table(ARCHITECTURE, "call") if row[0] == call]
    policies = POLICIES[call]
    statuses = {int(status) for status in re.findall(r"\b\d{3}\b(?!')", told)}
    statuses |= set(main.SERVER_ERRORS) if "5xx" in told else set()
    assert statuses == {status for policy in policies for status in policy.statuses}
    assert ("any transport error" in told) == all(policy.broken for policy in policies)
    lengths = {LENGTHS[tries] for policy in policies for tries in (*policy.statuses.values(), policy.not_sent)}
    found = re.findall(r"\d attempts|half a minute|(?<!half )a minute|two minutes|until the deadline", told)
    # Nobody cancels for longer than that: the wait for it all has its own end.
    assert set(found) == ({"half a minute"} if call == "cancel" else lengths)


def test_every_policy_is_told() -> None:
    """None is missing in the table."""
    assert [row[0] for row in table(ARCHITECTURE, "call")] == list(POLICIES)
    known = {name for name, value in vars(main).items() if isinstance(value, main.Retry)}
    assert len(known) == sum(len(policies) for policies in POLICIES.values())


def test_no_document_names_a_path_of_some_machine() -> None:
    """Everything is relative to the repository; what the sandbox prints may lie in /tmp."""
    for name in ("README.md", "ARCHITECTURE.md", "main.py", "render.yaml", ".env.example"):
        folders = "home|root|work|Users" if name == "README.md" else "home|root|work|Users|tmp"
        assert not re.search(rf"/({folders})/", (ROOT / name).read_text(encoding="utf-8"))
