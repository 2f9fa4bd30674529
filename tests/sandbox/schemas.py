"""Replicate's models as data: their input schemas as served, and the check of an input against them.

`models.json` holds per model: official or not, version, shape of the output, required fields and properties, and under
`older` earlier versions that differ in these (made up: Replicate's old schemas are not on record). The refusals carry
the names and texts of gojsonschema, which Replicate's own answers show. Stricter than is known of the real one: a field
that the schema does not have is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

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
    """One thing wrong with a request, as Replicate lists it under `invalid_fields`."""

    type: str
    field: str
    description: str


@dataclass(frozen=True)
class Model:
    """One version of a model as Replicate knows it: the latest one, unless taken from `older`."""

    name: str
    official: bool
    version: str
    output: str
    required: list[str]
    properties: dict[str, dict[str, Any]]
    created_at: str = "2026-03-29T09:00:00.000Z"
    older: list[dict[str, Any]] = field(default_factory=list)

    @property
    def versions(self) -> list[Model]:
        """This version and the older ones, each with a schema of its own."""
        return [self, *(replace(self, **fields, older=[]) for fields in self.older)]

    @property
    def speaks(self) -> bool:
        """Whether it takes speech and makes the mouth follow."""
        return "audio" in self.properties

    def default(self, values: dict[str, Any], *names: str) -> Any:
        """The value of the first of these fields that the model has: as sent, else the schema's default."""
        for name in names:
            if name in self.properties:
                return values.get(name, self.properties[name].get("default"))
        return None

    def document(self) -> dict[str, Any]:
        """The part of `latest_version.openapi_schema` that describes input and output; enums stand beside, by `$ref`."""
        schemas: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        for order, (name, prop) in enumerate(self.properties.items()):
            properties[name] = {"x-order": order, **served_property(name, prop, schemas)}
        schemas["Input"] = {"type": "object", "title": "Input", "properties": properties}
        if self.required:
            schemas["Input"]["required"] = self.required
        url = {"type": "string", "format": "uri"}
        schemas["Output"] = {"title": "Output", **({"type": "array", "items": url} if self.output == "list" else url)}
        return {"openapi": "3.0.2", "info": {"title": "Cog", "version": "0.1.0"}, "components": {"schemas": schemas}}


def served_property(name: str, prop: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A property as Replicate writes it; its enum goes to `schemas` under the property's name."""
    if "enum" not in prop:
        return {"title": name.replace("_", " ").title(), **prop}
    kept = {key: value for key, value in prop.items() if key not in ("type", "enum")}
    schemas[name] = {"type": prop["type"], "enum": prop["enum"], "title": name, "description": "An enumeration."}
    return {"allOf": [{"$ref": f"#/components/schemas/{name}"}], **kept}


def load_models() -> dict[str, Model]:
    """All models by name."""
    return {name: Model(name, **fields) for name, fields in json.loads(MODELS_FILE.read_text()).items()}


def invalid_input(model: Model, values: dict[str, Any]) -> list[Invalid]:
    """Everything that is wrong with a prediction's input."""
    missing = [Invalid("required", "input", f"{name} is required") for name in model.required if name not in values]
    found = [problem for name, value in values.items() if (problem := invalid_value(model, name, value))]
    return missing + found


def invalid_value(model: Model, name: str, value: Any) -> Invalid | None:
    """What is wrong with one field of the input."""
    prop, field = model.properties.get(name), f"input.{name}"
    if prop is None:
        return Invalid("additional_property_not_allowed", "input", f"Additional property {name} is not allowed")
    if value is None and prop.get("nullable"):
        return None
    given = "null" if value is None else JSON_TYPES[type(value)]
    if given != prop["type"] and (given, prop["type"]) != ("integer", "number"):
        return Invalid("invalid_type", field, f"Invalid type. Expected: {prop['type']}, given: {given}")
    if "enum" in prop and value not in prop["enum"]:
        allowed = ", ".join(json.dumps(choice) for choice in prop["enum"])
        return Invalid("enum", field, f"{field} must be one of the following: {allowed}")
    return invalid_range(prop, field, value) or invalid_uri(prop, field, value)


def invalid_range(prop: dict[str, Any], field: str, value: Any) -> Invalid | None:
    """A number out of its bounds."""
    if "minimum" in prop and value < prop["minimum"]:
        return Invalid("number_gte", field, f"Must be greater than or equal to {prop['minimum']}")
    if "maximum" in prop and value > prop["maximum"]:
        return Invalid("number_lte", field, f"Must be less than or equal to {prop['maximum']}")
    return None


def invalid_uri(prop: dict[str, Any], field: str, value: Any) -> Invalid | None:
    """A file field whose text is no absolute URI."""
    urls = value if prop["type"] == "array" and prop.get("items", {}).get("format") == "uri" else [value]
    is_uri_field = prop.get("format") == "uri" or urls is value
    if is_uri_field and not all(isinstance(url, str) and urlsplit(url).scheme for url in urls):
        return Invalid("format", field, "Does not match format 'uri'")
    return None
