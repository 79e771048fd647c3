"""The scanner: libyaml's marks equal those of the Python scanner; without libyaml everything still works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.topology import load, source
from tests.topology.say import REAL

HERE = Path(__file__).parent
ODD = [
    "é: [ü, 😀, b]\n𝒳: {a: 1}\nk: &x !!str 012\nz: *x\n",
    "a: |\n  text\nb:\n- x\n-   y: 1\n    z:\n",
    "\u2028x: 1\n\x85y: 2\r\nz: >-\r\n  folded\r\n  text\r\n",
    "# comment\n--- # more\n'a b' : \"c\\u00e9\"\n? long\n: value\n",
]


def events(scanner: Any, text: str) -> list[tuple[Any, ...]]:
    one = scanner(text)
    found = []
    while one.check_event():
        event = one.get_event()
        place = (event.start_mark.line, event.start_mark.column)
        plain = getattr(event, "implicit", (None,))
        said = (getattr(event, "value", None), getattr(event, "tag", None), getattr(event, "anchor", None), plain)
        if not type(event).__name__.endswith("EndEvent"):
            found.append((type(event).__name__, place, said))
    return found


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml: there is nothing to compare")
@pytest.mark.parametrize("text", [*(p.read_text() for p in [*REAL, *HERE.glob("mistakes/*.yaml")]), *ODD])
def test_both_scanners_see_the_same_at_the_same_place(text: str) -> None:
    assert events(yaml.CSafeLoader, text) == events(yaml.SafeLoader, text)


def test_loading_without_libyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    path = HERE / "contract.yaml"
    fast = load([path]).topology
    monkeypatch.setattr(source, "_Scanner", yaml.SafeLoader)
    slow = load([path]).topology
    assert slow.revision() == fast.revision()
    assert slow.marks == fast.marks
