"""Short ways to load a topology from text and to look at what was found."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.topology import Diagnostic, Loaded, TopologyError, load
from orchestrator.topology.model import Topology

ROOT = Path(__file__).parents[2]

#: Real files: examples and patterns.
REAL = sorted([*ROOT.glob("examples/*/topology.yaml"), *ROOT.glob("topologies/*/topology.yaml")])

HEAD = """
apiVersion: orchestrator/v1
kind: Topology
metadata: {name: shop}
"""

CHANNELS = """
channels:
  tasks: {events: [task.*], mode: queue}
  events: {events: [agent.*], mode: log}
  dead-letters: {mode: log}
defaults:
  agents: {dead_letter: dead-letters}
"""


def loaded(text: str, *, sets: Mapping[str, str] | None = None, head: str = HEAD) -> Loaded:
    """The topology of `text` (after HEAD)."""
    return load(["-"], stdin=head + textwrap.dedent(text), sets=sets or {})


def topology(text: str, *, sets: Mapping[str, str] | None = None) -> Topology:
    """The same without warnings."""
    return loaded(text, sets=sets).topology


def errors(text: str, *, sets: Mapping[str, str] | None = None, head: str = HEAD) -> list[Diagnostic]:
    """What is wrong with `text`; fails when nothing is."""
    with pytest.raises(TopologyError) as caught:
        loaded(text, sets=sets, head=head)
    return [d for d in caught.value.diagnostics if d.severity == "error"]


def only(text: str, *, sets: Mapping[str, str] | None = None, head: str = HEAD) -> Diagnostic:
    """The one error in `text`: a mistake has no follow-up errors."""
    found = errors(text, sets=sets, head=head)
    assert len(found) == 1, [f"{d.mark}: {d.message}" for d in found]
    return found[0]


def write(folder: Path, **files: str) -> None:
    """Writes files; `a__b` is a/b, and each name gets .yaml."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
