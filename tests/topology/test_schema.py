"""schemas/topology.v1.schema.json: fresh, valid, and as strict as the loader where it matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.topology import load, schema
from tests.topology.say import REAL, ROOT

CONTRACT = Path(__file__).parent / "contract.yaml"
VALIDATOR = jsonschema.Draft202012Validator(schema.generate())


def accepts(document: Any) -> bool:
    return bool(VALIDATOR.is_valid(document))


def base(**more: Any) -> dict[str, Any]:
    return {"apiVersion": "orchestrator/v1", "kind": "Topology", "metadata": {"name": "x"}, **more}


def test_the_file_is_fresh() -> None:
    stored = (ROOT / "schemas" / "topology.v1.schema.json").read_text()
    assert stored == schema.text(), "run: python -m orchestrator.topology.schema > schemas/topology.v1.schema.json"


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(schema.text()))


@pytest.mark.parametrize("path", [*REAL, CONTRACT], ids=lambda p: p.parent.name)
def test_it_accepts_what_loads(path: Path) -> None:
    problems = list(VALIDATOR.iter_errors(yaml.safe_load(path.read_text().replace("2026-01-31T12:00:00Z", "latest"))))
    assert problems == []
    assert accepts(yaml.safe_load(load([path]).show().replace("'***'", "x")))


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "mistakes").glob("*.yaml")), ids=lambda p: p.stem)
def test_it_accepts_mistakes_of_meaning_only(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert accepts(document) == (path.stem == "meaning")


def test_a_template_may_stand_wherever_a_value_may() -> None:
    """Replaces every value below the contract's file, one after the other."""
    text = CONTRACT.read_text().replace("2026-01-31T12:00:00Z", "latest")
    seen = 0
    for path in _paths(yaml.safe_load(text)):
        document = yaml.safe_load(text)
        place = document
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = "{{ vars.x }}"
        assert accepts(document), path
        seen += 1
    assert seen > 150


def _paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [above] if above else []
    for key, item in items:
        found += _paths(item, (*above, key))
    return found


@pytest.mark.parametrize(
    "document",
    [
        base(agents={"a": {"handler": "m:f", "unknown": 1}}),
        base(agents={"a": {"timeout": "5 minutes"}}),
        base(agents={"a": {"handler": {"kind": "pyton", "call": "m:f"}}}),
        base(agents={"a b": {}}),
        base(channels={"c": {"retention": {"max_bytes": "1 GB"}}}),
        base(channels={"c": {"events": ["a..b"]}}),
        base(channels={"c": {"events": [">.a"]}}),
        base(rate_limits={"x": {}}),
        {"kind": "Topology"},
    ],
)
def test_it_refuses(document: dict[str, Any]) -> None:
    assert not accepts(document)


@pytest.mark.parametrize(
    "document",
    [
        base(agents={"{{ vars.x }}": {"replicas": 0}}),
        base(agents={"a": None}, channels={"c": {"retention": None}}),
        base(agents={"a": {"env": {"A": 1, "B": True, "C": "x"}}}),
        base(agents={"a": {"handler": {"kind": "python", "call": "m:f"}, "retry": {"delays": ["1s"]}}}),
        base(channels={"c": {"schemas": {"a.b": {"$ref": "x.json"}}}}),
    ],
)
def test_it_accepts(document: dict[str, Any]) -> None:
    assert accepts(document)


def test_every_key_has_words_for_an_editor() -> None:
    for name, definition in VALIDATOR.schema["$defs"].items():
        for key, value in definition.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key}"
