"""render.yaml is valid against Render's own schema (structure of render.com/schema/render.yaml.json, read in 2026)."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "render.schema.json").read_text(encoding="utf-8"))


def blueprint() -> dict:
    """The Blueprint of this repository."""
    return yaml.safe_load((HERE.parent / "render.yaml").read_text(encoding="utf-8"))


def test_render_yaml_is_valid() -> None:
    """Nothing in it that Render would refuse."""
    jsonschema.validate(blueprint(), SCHEMA)


def test_the_schema_would_notice() -> None:
    """The old name of `runtime` is refused, so the check above can fail."""
    wrong = blueprint()
    wrong["services"][0]["env"] = wrong["services"][0].pop("runtime")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)
