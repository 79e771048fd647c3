"""The JSON Schema of topology files (draft 2020-12) for editors, generated from the spec models.

`python -m orchestrator.topology.schema` prints it; schemas/topology.v1.schema.json is that output, and a test fails
when it is stale. A template may stand wherever a value may, and null (in an override: "remove") too.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from orchestrator.topology.spec import TopologySpec

_TEMPLATE = {"$ref": "#/$defs/Template"}
_HAS_TEMPLATE = r"\{\{|\{%"
_FREE: tuple[Any, ...] = (True, {})  # schemas that accept everything


def generate() -> dict[str, Any]:
    """The schema as plain data."""
    schema = TopologySpec.model_json_schema(mode="validation")
    definitions = schema.pop("$defs")
    definitions["Template"] = {
        "type": "string",
        "pattern": _HAS_TEMPLATE,
        "description": "A template: {{ vars.name }}, {{ env('NAME', 'default') }}, {{ secret('file:PATH') }}",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Topology",
        **_object(schema, optional=False),
        "required": ["apiVersion", "kind"],  # metadata too, but an included file or an override may leave it out
        "$defs": {name.removesuffix("Spec"): _definition(name, body) for name, body in sorted(definitions.items())},
    }


def text() -> str:
    """The schema as the file holds it."""
    return json.dumps(generate(), indent=2, ensure_ascii=False) + "\n"


def _definition(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return body if name == "Template" else _object(body)


def _object(body: dict[str, Any], *, optional: bool = True) -> dict[str, Any]:
    """An object of known keys: each value or a template; a key may be a template too."""
    out = {k: v for k, v in body.items() if k not in ("title", "properties", "required")}
    if body.get("required") and optional:
        out["required"] = body["required"]
    out["properties"] = {name: _property(value) for name, value in body["properties"].items()}
    if body.get("additionalProperties") is False:
        out["patternProperties"] = {_HAS_TEMPLATE: True}
    return out


def _property(body: dict[str, Any]) -> dict[str, Any]:
    """A value with its description outside, where editors look for it."""
    rest = {k: v for k, v in body.items() if k not in ("description", "default", "title")}
    return {"description": body["description"], **_value(rest)} if "description" in body else _value(rest)


def _value(body: Any) -> Any:
    """`body`, or a template in its place."""
    if body in _FREE:
        return body
    choices = [_inner(choice) for choice in body["anyOf"]] if set(body) == {"anyOf"} else [_inner(body)]
    flat = [c for choice in choices for c in (choice["anyOf"] if set(choice) == {"anyOf"} else [choice])]
    return {"anyOf": [*flat, _TEMPLATE]}


def _inner(body: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in body:
        return {"$ref": body["$ref"].removesuffix("Spec")}
    out = {k: v for k, v in body.items() if k not in ("title", "default")}
    for either in ("oneOf", "anyOf"):
        if either in out:  # short and long form
            return {"anyOf": [_inner(choice) for choice in out[either]]}
    if isinstance(out.get("items"), dict):
        out["items"] = _value(out["items"])
    named = out.pop("patternProperties", None)  # how pydantic says that keys have a pattern
    if named:
        ((pattern, out["additionalProperties"]),) = named.items()
        out["propertyNames"] = {"anyOf": [{"pattern": pattern}, _TEMPLATE]}
    if out.get("additionalProperties") not in (None, *_FREE):
        out["additionalProperties"] = _value({"anyOf": [out["additionalProperties"], {"type": "null"}]})
    return out


if __name__ == "__main__":
    sys.stdout.write(text())
