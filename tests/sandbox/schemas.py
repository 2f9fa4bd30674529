"""Replicate's models: their input schemas as served, and the check of an input against them.

`models.json` holds for each model: whether it is official, its version, the shape of its output,
its required fields and its properties. `older` lists earlier versions with what differs (made up:
Replicate's old schemas are not on record). The errors have the names and texts of gojsonschema,
as in Replicate's own responses. Stricter than Replicate is known to be: a field that the schema
does not have is refused.

Made up as well: the models named `sandbox/...`, one for each format that some models hand over and
not every browser plays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .media import VIDEO_FORMATS

MODELS_FILE = Path(__file__).with_name("models.json")
JSON_TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
}


class Invalid(NamedTuple):
    """One error in a request, as Replicate lists it under `invalid_fields`."""

    type: str
    field: str
    description: str


@dataclass(frozen=True)
class Model:
    """One version of a model: the latest one, unless it comes from `older`."""

    name: str
    official: bool
    version: str
    output: str
    required: list[str]
    properties: dict[str, dict[str, Any]]
    created_at: str = "2026-03-29T09:00:00.000Z"
    older: list[dict[str, Any]] = field(default_factory=list)
    video_format: str = "h264"

    @property
    def versions(self) -> list[Model]:
        """This version and the older ones, each with its own schema."""
        older = [replace(self, **fields, older=[]) for fields in self.older]
        return [self, *older]

    @property
    def speaks(self) -> bool:
        """Whether it takes speech and makes the mouth follow it."""
        return "audio" in self.properties

    def default(self, values: dict[str, Any], *names: str) -> Any:
        """The first of these fields that the model has: its value in the input, or its default."""
        for name in names:
            if name in self.properties:
                return values.get(name, self.properties[name].get("default"))
        return None

    def document(self) -> dict[str, Any]:
        """The part of `latest_version.openapi_schema` that describes input and output.

        Enums are schemas of their own, which the properties refer to with `$ref`.
        """
        schemas: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        for order, (name, prop) in enumerate(self.properties.items()):
            properties[name] = {"x-order": order, **served_property(name, prop, schemas)}

        schemas["Input"] = {"type": "object", "title": "Input", "properties": properties}
        if self.required:
            schemas["Input"]["required"] = self.required

        url = {"type": "string", "format": "uri"}
        if self.output == "list":
            schemas["Output"] = {"title": "Output", "type": "array", "items": url}
        else:
            schemas["Output"] = {"title": "Output", **url}
        return {
            "openapi": "3.0.2",
            "info": {"title": "Cog", "version": "0.1.0"},
            "components": {"schemas": schemas},
        }


def served_property(name: str, prop: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A property as Replicate writes it; its enum is added to `schemas` under its name."""
    if "enum" not in prop:
        return {"title": name.replace("_", " ").title(), **prop}

    others = dict(prop)
    schemas[name] = {
        "type": others.pop("type"),
        "enum": others.pop("enum"),
        "title": name,
        "description": "An enumeration.",
    }
    return {"allOf": [{"$ref": f"#/components/schemas/{name}"}], **others}


def load_models() -> dict[str, Model]:
    """All models by name."""
    published = json.loads(MODELS_FILE.read_text())
    models = {name: Model(name, **fields) for name, fields in published.items()}
    for video_format in VIDEO_FORMATS:
        if video_format != "h264":
            model = format_model(video_format)
            models[model.name] = model
    return models


def format_model(video_format: str) -> Model:
    """A model of the sandbox's own that hands over this format."""
    return Model(
        name=f"sandbox/{video_format}",
        official=True,
        version=sha256(video_format.encode()).hexdigest(),
        output="string",
        required=["image"],
        properties={
            "image": {"type": "string", "format": "uri", "description": "first frame"},
            "prompt": {"type": "string", "description": "what should happen"},
            "duration": {"type": "integer", "minimum": 1, "maximum": 10, "default": 2},
            "resolution": {"type": "string", "enum": ["240p", "768p"], "default": "240p"},
        },
        video_format=video_format,
    )


# Checking an input


def invalid_input(model: Model, values: dict[str, Any]) -> list[Invalid]:
    """List everything that is wrong with a prediction's input."""
    errors = []
    for name in model.required:
        if name not in values:
            errors.append(Invalid("required", "input", f"{name} is required"))
    for name, value in values.items():
        error = invalid_value(model, name, value)
        if error is not None:
            errors.append(error)
    return errors


def invalid_value(model: Model, name: str, value: Any) -> Invalid | None:
    """Return what is wrong with one field of the input, if anything."""
    prop = model.properties.get(name)
    if prop is None:
        description = f"Additional property {name} is not allowed"
        return Invalid("additional_property_not_allowed", "input", description)
    if value is None and prop.get("nullable"):
        return None

    field = f"input.{name}"
    return (
        invalid_type(prop, field, value)
        or invalid_choice(prop, field, value)
        or invalid_range(prop, field, value)
        or invalid_uri(prop, field, value)
    )


def invalid_type(prop: dict[str, Any], field: str, value: Any) -> Invalid | None:
    """A value of another type; an integer is a number too."""
    expected = prop["type"]
    given = "null" if value is None else JSON_TYPES[type(value)]
    if given == expected:
        return None
    if given == "integer" and expected == "number":
        return None
    description = f"Invalid type. Expected: {expected}, given: {given}"
    return Invalid("invalid_type", field, description)


def invalid_choice(prop: dict[str, Any], field: str, value: Any) -> Invalid | None:
    """A value that is not in the enum."""
    if "enum" not in prop or value in prop["enum"]:
        return None
    choices = ", ".join(json.dumps(choice) for choice in prop["enum"])
    return Invalid("enum", field, f"{field} must be one of the following: {choices}")


def invalid_range(prop: dict[str, Any], field: str, value: Any) -> Invalid | None:
    """A number outside its bounds."""
    if "minimum" in prop and value < prop["minimum"]:
        description = f"Must be greater than or equal to {prop['minimum']}"
        return Invalid("number_gte", field, description)
    if "maximum" in prop and value > prop["maximum"]:
        description = f"Must be less than or equal to {prop['maximum']}"
        return Invalid("number_lte", field, description)
    return None


def invalid_uri(prop: dict[str, Any], field: str, value: Any) -> Invalid | None:
    """A file field with a value that is not an absolute URI."""
    if prop.get("format") == "uri":
        urls = [value]
    elif prop["type"] == "array" and prop.get("items", {}).get("format") == "uri":
        urls = value
    else:
        return None

    for url in urls:
        if not isinstance(url, str) or not urlsplit(url).scheme:
            return Invalid("format", field, "Does not match format 'uri'")
    return None
