"""Where everything stands: paths such as ("channels", "tasks", "retention") to their places in the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.topology.document import Document
from orchestrator.topology.model import Mark
from orchestrator.topology.nodes import Map
from orchestrator.topology.shape import Entry

Path = tuple[str, ...]


def collect(document: Document) -> dict[Path, Mark]:
    """Marks of all sections, entries and their keys. What an entry inherits has the mark of `defaults:`."""
    marks: dict[Path, Mark] = {}
    for key, value in document.root:
        marks[(key.text,)] = key.mark
        if key.text in ("metadata", "defaults", "variables") and isinstance(value, Map):
            _below((key.text,), value, marks)
    _entries("brokers", document.brokers, None, marks)
    _entries("channels", document.channels, document.channel_defaults, marks)
    _entries("agents", document.agents, document.agent_defaults, marks)
    _entries("retry_policies", document.retry_policies, None, marks)
    return marks


def _entries(
    section: str, entries: Mapping[str, Entry[Any]], defaults: Entry[Any] | None, marks: dict[Path, Mark]
) -> None:
    inherited = [(key.text, key.mark) for key, _ in defaults.node] if defaults else []
    for name, entry in entries.items():
        marks[(section, name)] = entry.key.mark
        for key, mark in inherited:
            marks[(section, name, key)] = mark
        _below((section, name), entry.node, marks)


def _below(path: Path, node: Map, marks: dict[Path, Mark]) -> None:
    for key, value in node:
        here = (*path, key.text)
        marks[here] = key.mark
        if isinstance(value, Map) and len(here) < 4:
            for inner, _ in value:
                marks[(*here, inner.text)] = inner.mark
