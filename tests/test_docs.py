"""README, ARCHITECTURE, .env.example and render.yaml agree with the code: commands, tables, names and defaults.

No sentence is checked: a table is found by its headers, a number only as the value in a table.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from fastapi.routing import APIRoute

import main
from tests.support.application import provider_response

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
RENDER = (ROOT / "render.yaml").read_text(encoding="utf-8")
ROUTES = [
    route for route in main.app.routes if isinstance(route, APIRoute) and route.include_in_schema
]


class Table(NamedTuple):
    """A Markdown table: its headers and its rows, without backquotes."""

    headers: list[str]
    rows: list[list[str]]

    def column(self, header: str) -> list[str]:
        """The cells under a header."""
        number = self.headers.index(header)
        return [row[number] for row in self.rows]


def cells(line: str) -> list[str]:
    """The cells of one line of a table."""
    return [cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> list[Table]:
    """Every table of a document."""
    found: list[Table] = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        header, _, *rows = block.splitlines()
        found.append(Table([cell.lower() for cell in cells(header)], [cells(row) for row in rows]))
    return found


def find_table(text: str, *headers: str) -> Table:
    """The one table that has all these headers."""
    [table] = [table for table in tables(text) if set(headers) <= set(table.headers)]
    return table


def test_each_share_says_what_it_is_by_default() -> None:
    """The seconds beside a share of PATIENCE_SECONDS are those of its default."""
    lines = (ROOT / "main.py").read_text(encoding="utf-8").splitlines()
    patience_s = main.Settings.model_fields["patience_seconds"].default
    shares = [line for line in lines if re.match(r"\w+_SHARE = .*# \d+:", line)]
    assert len(shares) == 8
    for line in shares:
        name, seconds = line.partition(" ")[0], re.search(r"# (\d+):", line)
        assert seconds is not None
        assert getattr(main, name) * patience_s == int(seconds[1]), name


def default_of(name: str) -> str:
    """A setting's default as people write it."""
    default = main.Settings.model_fields[name].default
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else str(default)


DEFAULTS = {name.upper(): default_of(name) for name in main.Settings.model_fields}


def test_readme_has_every_variable_with_its_default() -> None:
    """The table of variables is the list of settings."""
    table = find_table(README, "variable", "default")
    assert dict(zip(table.column("variable"), table.column("default"), strict=True)) == DEFAULTS


def test_env_example_has_every_variable_with_its_default() -> None:
    """A copied file changes nothing: it starts a service without keys."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    texts = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert texts == DEFAULTS
    assert main.read_settings(texts) == main.Settings()


def render_variables() -> dict[str, str]:
    """The variables of render.yaml with their value, or `sync: false`."""
    pairs = re.findall(r"- key: (\w+)[^\n]*\n\s+(sync: false|value: [^\n]+)", RENDER)
    return {key: value.removeprefix("value: ").strip('"') for key, value in pairs}


def test_render_asks_for_the_secrets_and_sets_the_defaults() -> None:
    """No key stands in the repository; what else is set is the service's own default."""
    known = {key: value for key, value in render_variables().items() if key in DEFAULTS}
    secrets = {key for key, value in known.items() if value == "sync: false"}
    assert secrets == {name.upper() for name in (*main.SPEECH_JOB_SETTINGS, "service_token")}
    assert {
        key: value for key, value in known.items() if key not in secrets
    }.items() <= DEFAULTS.items()


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
    table = find_table(README, "route", "body")
    assert table.column("route") == [
        f"{next(iter(route.methods))} {route.path}" for route in ROUTES
    ]
    bodies = dict(zip(table.column("route"), table.column("body"), strict=True))
    words = f"{bodies['POST /jobs_prompt_only']} {bodies['POST /jobs_prompt_tts']}"
    for job in (main.JobPromptOnly, main.JobPromptTTS):
        fields = job.model_fields
        assert [name for name in fields if name not in words] == []
        defaults = [
            json.dumps(field.default) for field in fields.values() if not field.is_required()
        ]
        assert [default for default in defaults if f"({default})" not in words] == []


@pytest.mark.parametrize("document", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_documents_name_every_stage(document: str) -> None:
    """The six stages by the names that events, headers and log use."""
    assert [stage for stage in get_args(main.Stage) if f"`{stage}`" not in document] == []


def error_codes() -> dict[str, dict[str, str]]:
    """README's table of codes: of each its other cells, by their headers."""
    table = find_table(README, "code", "status", "category", "retryable")
    rows = [dict(zip(table.headers, row, strict=True)) for row in table.rows]
    return {row["code"]: row for row in rows}


def test_readme_has_every_error_code() -> None:
    """In the contract's order, each with a hint for the user."""
    rows = error_codes()
    assert list(rows) == list(main.ErrorCode.__value__.__args__)
    assert [code for code, row in rows.items() if not row["what to show the user"]] == []


def test_readme_has_every_code_of_a_field() -> None:
    """In the contract's order, each once."""
    table = find_table(README, "code of a field", "params")
    codes = [code for cell in table.column("code of a field") for code in cell.split(", ")]
    assert codes == list(main.FieldErrorCode.__value__.__args__)


KINDS_OF_ERRORS = {
    "missing_setting": main.MissingSetting(""),
    "invalid_field": main.InvalidInput(""),
    "unauthorized": main.Unauthorized(""),
    "blocked_url": main.BlockedUrl(""),
    "private_url": main.PrivateAddress(""),
    "content_rejected": main.ProviderRefused(""),
    "provider_failed": main.ProviderFailed(""),
    "busy": main.ProviderBusy("", "replicate", 1),
    "speech_too_large": main.SpeechTooLarge(""),
    "storage_failed": main.ResourceFailed(""),
    "spending_limit": main.SpendingLimitReached("", 1),
    "internal": main.ServiceError(""),
    "provider_rejected_key": main.error_for_response("elevenlabs", provider_response(403)),
    "provider_throttled": main.error_for_response("replicate", provider_response(429)),
}


@pytest.mark.parametrize("code", KINDS_OF_ERRORS)
def test_readme_has_every_kind_of_error(code: str) -> None:
    """Beside its code: its status, its category, and whether it is retryable; some are, some are not."""
    error = KINDS_OF_ERRORS[code]
    row = error_codes()[code]
    assert error.code == code
    assert str(error.http_status) == row["status"]
    assert error.category in row["category"].split(", ")
    assert row["retryable"] in ("some", "yes" if error.retryable else "no")


def test_readme_has_every_category() -> None:
    """The table of codes uses all of them, and no other."""
    categories = {name for row in error_codes().values() for name in row["category"].split(", ")}
    assert categories == set(get_args(main.Category))


def test_readme_has_every_field_of_an_error() -> None:
    """The one body, what `partial` and `errors` can hold, and what the events have besides."""
    fields = [
        *main.ErrorEvent.model_fields,
        *main.PartialResult.model_fields,
        *main.InputError.model_fields,
        *main.StageEvent.model_fields,
    ]
    named = set(re.findall(r'[`"](\w+)[`"]', README))
    assert [name for name in fields if name not in named] == []


def json_examples() -> list[dict[str, Any]]:
    """The JSON that README shows."""
    blocks = re.findall(r"```json\n(.*?)\n```", README, re.DOTALL)
    return [json.loads(block) for block in blocks]


def test_readme_shows_the_answer_of_a_speech_job() -> None:
    """One of its JSON examples has the fields of the result, in their order."""
    assert list(main.SpeechResult.model_fields) in [list(example) for example in json_examples()]


def test_readme_shows_the_error_for_a_text_that_is_too_long() -> None:
    """One of its JSON examples is what the service answers, but for the id."""
    [example] = [example for example in json_examples() if "detail" in example]
    with pytest.raises(main.ServiceError) as caught:
        main.check_text("x" * example["errors"][0]["params"]["got"])
    assert example == main.error_body(caught.value, example["request_id"], None)


def test_architecture_has_every_section_of_the_code() -> None:
    """The first column of its code map is the banners of main.py, whole or up to the colon, in their order."""
    code = (ROOT / "main.py").read_text(encoding="utf-8")
    banners = re.findall(r"^# ---- (.+?)(?: -+)?$", code, re.MULTILINE)
    section_tables = [table for table in tables(ARCHITECTURE) if "section" in table.headers[0]]
    [code_map] = [table for table in section_tables if len(table.rows) > 5]
    rest = ", ".join(row[0] for row in code_map.rows)
    for banner in banners:
        short = re.split(r":|, and| --", banner)[0]
        name = next((name for name in (banner, short) if rest.startswith(name)), None)
        assert name, f"{banner!r} is missing before {rest!r}"
        rest = rest[len(name) :].lstrip(", ")
    assert rest == ""


def test_architecture_has_the_time_limit_of_every_stage() -> None:
    """The table of stages has each in its order, with the limit of its calls in seconds."""
    [pipeline] = [
        table
        for table in tables(ARCHITECTURE)
        if set(get_args(main.Stage)) <= {row[0] for row in table.rows}
    ]
    rows = {row[0]: " ".join(row[1:]) for row in pipeline.rows}
    assert [stage for stage in rows if stage in get_args(main.Stage)] == list(get_args(main.Stage))
    transfer_s = main.TIMEOUT.read
    limits_s = {
        "speech": main.SPEECH_TIMEOUT.read,
        "audio_upload": transfer_s,
        "download": transfer_s,
    }
    limits_s |= {"convert": main.CONVERT_TIMEOUT_S, "mux": main.FFMPEG_TIMEOUT_S}
    limits_s["final_upload"] = transfer_s
    assert [
        stage for stage, limit_s in limits_s.items() if f"{limit_s:g} s" not in rows[stage]
    ] == []


def test_readme_has_the_limits_of_sizes() -> None:
    """Where its errors are listed: of a request, of the speech, of a video."""
    table = find_table(README, "status", "category", "retryable")
    words = " ".join(cell for row in table.rows for cell in row)
    limits = [
        f"{main.MAX_REQUEST_BYTES // 1024} KiB",
        f"{main.MAX_SPEECH_BYTES / 1e6:g} MB",
        f"{main.MAX_DOWNLOAD_BYTES // 1_000_000} MB",
    ]
    assert [limit for limit in limits if limit not in words] == []


def test_readme_has_the_commands() -> None:
    """Of the service, the sandbox and the tests."""
    commands = ("uvicorn main:app", "-m tests.sandbox", "-m pytest")
    assert [command for command in commands if command not in README] == []


@pytest.mark.parametrize("document", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_what_documents_name_exists(document: str) -> None:
    """Every file of the tests, and every module that is run with `python -m`."""
    files = re.findall(r"(?<![\w/])tests/[\w/-]+(?:\.\w+)+", document)
    modules = re.findall(r"-m (tests[\w.]*)", document)
    paths = [ROOT / name.replace(".", "/") for name in modules]
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [
        str(path) for path in paths if not (path.is_dir() or path.with_suffix(".py").exists())
    ] == []


# How the table of retries may write how long a call is retried.
LENGTHS = {
    main.RetryBudget(attempts=3): r"3 attempts",
    main.RetryBudget(attempts=4): r"4 attempts",
    main.RetryBudget(patience_share=0.25): r"half a minute|30 s\b",
    main.RetryBudget(patience_share=1): r"two minutes|120 s\b",
    main.RetryBudget(): r"until the (?:job's )?deadline",
}
# By a word in the first cell of a row: the policies of the calls that the row is about.
POLICIES = {
    "speech": [main.SPEECH_RETRY],
    "look-up": [main.MODEL_RETRY],
    "create": [main.CREATE_RETRY],
    "list": [main.LIST_RETRY],
    "read|poll": [main.POLL_RETRY],
    "cancel": [main.CANCEL_RETRY],
    "job log": [main.ENTRY_RETRY, main.LIST_ENTRIES_RETRY],
    "download": [
        main.UPLOAD_RETRY,
        main.DOWNLOAD_RETRY,
        main.PAID_UPLOAD_RETRY,
        main.PAID_DOWNLOAD_RETRY,
    ],
}


def retry_rows() -> list[list[str]]:
    """The rows of ARCHITECTURE's table of retries: the call, and when it is retried."""
    [table] = [table for table in tables(ARCHITECTURE) if table.headers[0] == "call"]
    return table.rows


@pytest.mark.parametrize("call", POLICIES)
def test_architecture_has_the_retry_policy_of_every_call(call: str) -> None:
    """The statuses, whether a broken connection is among the reasons, and for how long."""
    [retried_on] = [row[1] for row in retry_rows() if re.search(rf"\b(?:{call})", row[0])]
    policies = POLICIES[call]
    statuses = {int(status) for status in re.findall(r"\b\d{3}\b(?!'| s\b)", retried_on)}
    if "5xx" in retried_on:
        statuses |= set(range(500, 600))
    if "3xx" in retried_on:
        statuses |= set(main.REDIRECTS)
    known = {status for policy in policies for status in policy.statuses}
    is_in_line = any(policy.in_line for policy in policies)
    assert statuses == (known | {429} if is_in_line else known)
    assert ("429: in line" in retried_on) == is_in_line
    assert ("transport error" in retried_on) == all(
        policy.on_broken_connection for policy in policies
    )
    budgets = set()
    for policy in policies:
        budgets.add(policy.budget)
        budgets.add(policy.rejection_budget or policy.budget)
        if policy.in_line:
            budgets.add(main.UNTIL_DEADLINE)
    if call == "cancel":  # the whole cancel has its own end
        budgets = {main.RetryBudget(patience_share=0.25)}
    assert {budget for budget, words in LENGTHS.items() if re.search(words, retried_on)} == budgets


def test_architecture_has_every_retry_policy() -> None:
    """The table has a row for each of them, and no other."""
    calls = [row[0] for row in retry_rows()]
    assert len(calls) == len(POLICIES)
    known = {name for name, value in vars(main).items() if isinstance(value, main.RetryPolicy)}
    assert len(known) == sum(len(policies) for policies in POLICIES.values())


UNITS = {"": 1, "KiB": 1024, "MB": 1_000_000, "s": 1}


def bounds() -> list[tuple[str, float]]:
    """Each constant in ARCHITECTURE's table of bounds, with the number that stands beside it."""
    table = find_table(ARCHITECTURE, "what is bounded", "limit", "constant")
    found: list[tuple[str, float]] = []
    for limits, constants in zip(table.column("limit"), table.column("constant"), strict=True):
        for limit, constant in zip(limits.split("; "), constants.split("; "), strict=True):
            number, _, unit = limit.partition(" ")
            found.append((constant, float(number.replace(",", "")) * UNITS[unit]))
    return found


@pytest.mark.parametrize(("constant", "number"), bounds())
def test_architecture_has_the_number_of_every_bound(constant: str, number: float) -> None:
    """The value of the constant."""
    assert getattr(main, constant) == number


def test_architecture_has_every_bound_once() -> None:
    """Every constant that says how much there may be at most; shares of PATIENCE_SECONDS stand elsewhere."""
    names = [constant for constant, _ in bounds()]
    known = {name for name in vars(main) if name.startswith("MAX_") and "SHARE" not in name}
    assert len(names) == len(set(names))
    assert known - set(names) == set()


def test_no_document_names_a_path_of_some_machine() -> None:
    """Everything is relative to the repository; what the sandbox prints may lie in /tmp."""
    for name in ("README.md", "ARCHITECTURE.md", "main.py", "render.yaml", ".env.example"):
        folders = "home|root|work|Users" if name == "README.md" else "home|root|work|Users|tmp"
        assert not re.search(rf"/({folders})/", (ROOT / name).read_text(encoding="utf-8"))
