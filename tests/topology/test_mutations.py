"""Real topologies, damaged at random: the answer is a topology or errors with a place, never another exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.topology import TopologyError, load, render
from orchestrator.topology.handover import dump, restore
from tests.topology.say import REAL, ROOT

RICH = Path(__file__).parent / "contract.yaml"
TEXTS = [path.read_text() for path in [*REAL, RICH]]
HINDRANCES = [HealthCheck.too_slow, HealthCheck.data_too_large]

SCRAPS = [
    "{{ vars.x }}", "'{{ vars.nobody }}'", "'{% for %}'", "null", "~", "[]", "{}", "-", ": ", "*a", "&a", "!!int",
    "<<: ",
    "1e400", "9" * 200, ".nan", "\t", "\n", "  ", "#", "'", '"', "|", ">", "\0", "\u2028", "\ud7ff", "task.*", ">",
    "include: [x]", "for_each: {a: [1]}", "for_each: 3", "$ref", "true", "0o7", "-1", "embedded", "kafka://", "redis://[::1",
    "%", "@", "`", "---", "...", "agents:", "channels:", "events: [>]", "mode: queue", "external: true", "nats://h:0x10",
]  # fmt: skip


def check(text: str) -> None:
    try:
        found = load(["-"], stdin=text)
    except TopologyError as error:
        diagnostics = error.diagnostics
    else:
        found.show()
        assert restore(dump(found.topology)).revision() == found.topology.revision()
        return
    assert diagnostics
    render(diagnostics)
    for diagnostic in diagnostics:
        assert diagnostic.mark is not None, diagnostic
        assert diagnostic.mark.line >= 1
        assert diagnostic.mark.column >= 1
        assert diagnostic.message


@settings(max_examples=150, deadline=None, suppress_health_check=HINDRANCES)
@given(st.data())
def test_text_damaged_anywhere(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.integers(0, 30))
        text = text[:at] + data.draw(st.sampled_from(SCRAPS) | st.text(max_size=8)) + text[at + gone :]
    check(text)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(SCRAPS)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=HINDRANCES)
@given(st.data())
def test_values_replaced_anywhere(data: st.DataObject) -> None:
    """Still YAML, with one to three values, keys or items that are something else."""
    tree = yaml.safe_load(data.draw(st.sampled_from(TEXTS)))
    for _ in range(data.draw(st.integers(1, 3))):
        place, key = data.draw(st.sampled_from(_places(tree)))
        how = data.draw(st.sampled_from(["value", "remove", "rename", "copy"]))
        if how == "value":
            place[key] = data.draw(VALUES)
        elif how == "copy":
            other, from_key = data.draw(st.sampled_from(_places(tree)))
            place[key] = yaml.safe_load(yaml.safe_dump(other[from_key]))
        elif how == "rename" and isinstance(place, dict):
            place[data.draw(st.text(max_size=6) | st.sampled_from(SCRAPS))] = place.pop(key)
        else:
            del place[key]
    check(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (dict, list)):
            keys = list(one) if isinstance(one, dict) else list(range(len(one)))
            found += [(one, key) for key in keys]
            waiting += [one[key] for key in keys]
    return found or [([None], 0)]


def test_the_real_ones_are_there() -> None:
    assert len(TEXTS) >= 7
    assert all(str(path).startswith(str(ROOT)) for path in REAL)
