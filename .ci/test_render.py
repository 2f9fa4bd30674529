"""render.yaml is valid against Render's own schema (structure of render.com/schema/render.yaml.json, read in 2026)."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "render.schema.json").read_text(encoding="utf-8"))


def blueprint() -> dict:
    """The Blueprint of this repository."""
    return yaml.safe_load((HERE.parent / "render.yaml").read_text(encoding="utf-8"))


def service() -> dict:
    """Its one service."""
    [service] = blueprint()["services"]
    return service


def test_render_yaml_is_valid() -> None:
    """Nothing in it that Render would refuse."""
    jsonschema.validate(blueprint(), SCHEMA)


def test_the_schema_would_notice() -> None:
    """The old name of `runtime` is refused, so the check above can fail."""
    wrong = blueprint()
    wrong["services"][0]["env"] = wrong["services"][0].pop("runtime")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_render_installs_what_ci_tested() -> None:
    """The lock with its hashes and nothing beside it; CI installs it with the same words."""
    assert service()["buildCommand"] == "pip install --require-hashes -r .ci/requirements.lock"
    assert "buildCommand: pip" in (HERE / "run").read_text(encoding="utf-8")


def test_a_deploy_waits_for_the_checks() -> None:
    """A commit whose CI failed is not deployed."""
    assert service()["autoDeployTrigger"] == "checksPass"


def test_jobs_have_the_time_to_end_that_main_counts_on() -> None:
    """From the end of uvicorn's wait to Render's SIGKILL, as main.py says."""
    [uvicorn_s] = re.findall(r"--timeout-graceful-shutdown (\d+)", service()["startCommand"])
    main = (HERE.parent / "main.py").read_text(encoding="utf-8")
    [rest_s] = re.findall(r"Render kills the process (\d+) s after uvicorn", main)
    assert service()["maxShutdownDelaySeconds"] - int(uvicorn_s) == int(rest_s)
