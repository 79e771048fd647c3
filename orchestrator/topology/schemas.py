"""JSON Schemas of payloads: inline, or by $ref to a file beside the topology. Part of meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.nodes import Node, plain
from orchestrator.topology.source import parse, read


@dataclass(slots=True)
class Schemas:
    """Reads and checks schemas once each; `files` are those that were read."""

    problems: Problems
    files: list[Path] = field(default_factory=list)
    _cache: dict[Path, Any] = field(default_factory=dict)

    def load(self, schema: Mapping[str, Any], at: Node) -> Mapping[str, Any] | None:
        """The schema itself, with a file that it names read in; None when it was reported."""
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            found = self._file(reference, at)
            if found is None:
                return None
            schema = found
        moved = len(_strings(schema, "$id")) > ("$id" in schema)  # an inner $id: references begin there
        for inner in _strings(schema, "$ref"):
            if not inner.startswith("#"):
                self.problems.error("schema", f"$ref {inner} leaves its file", at, expected="#/… within one file")
                return None
            if not moved and not _leads_somewhere(schema, inner):
                self.problems.error("schema", f"$ref {inner} leads nowhere", at, expected="a place within the schema")
                return None
        return schema if self._valid(schema, at) else None

    def _file(self, reference: str, at: Node) -> Mapping[str, Any] | None:
        name, _, fragment = reference.partition("#")
        path = (at.source.folder / name).resolve()
        if path not in self._cache:
            self._cache[path] = self._read(path, name, at)
            self.files.append(path)
        whole = self._cache[path]
        if whole is None:
            return None
        if not isinstance(whole, dict):
            self.problems.error("schema", f"{name} holds no JSON Schema", at, expected="a mapping")
            return None
        return {"$ref": f"#{fragment}", **whole} if fragment else whole

    def _read(self, path: Path, name: str, at: Node) -> Any:
        source = read(path, name, self.problems, at)
        if source is None:
            return None
        if path.suffix in (".yaml", ".yml"):
            node = parse(source, self.problems)
            return plain(node) if node is not None else None
        try:
            return json.loads(source.text)
        except (ValueError, RecursionError) as error:
            self.problems.error("schema", f"{name} is no JSON: {error}", at)
            return None

    def _valid(self, schema: Mapping[str, Any], at: Node) -> bool:
        jsonschema = _jsonschema()
        try:
            jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
        except jsonschema.SchemaError as error:
            where = "/".join(str(p) for p in error.absolute_path)
            self.problems.error(
                "schema", f"not a valid JSON Schema{f' at {where}' if where else ''}: {error.message}", at
            )
        except RecursionError:
            self.problems.error("schema", "the JSON Schema is nested too deep", at)
        else:
            return True
        return False


@lru_cache(maxsize=1)
def _jsonschema() -> ModuleType:
    import jsonschema  # a tenth of a second: only for topologies that have schemas

    return jsonschema


def _leads_somewhere(schema: Mapping[str, Any], reference: str) -> bool:
    """Whether there is a schema at `#/…`; what an anchor means is left to the library."""
    pointer = unquote(reference.removeprefix("#"))
    if not pointer.startswith("/"):
        return True
    value: Any = schema
    for part in pointer[1:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list):
            value = dict(enumerate(value)).get(int(name)) if name.isdecimal() else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return isinstance(value, Mapping | bool)


def _strings(value: Any, name: str) -> list[str]:
    """Every text that stands under `name`, however deep."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            if isinstance(text := one.get(name), str):
                found.append(text)
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return found
