"""The whole file in its shape: nodes of the merged, rendered topology -> a Document of spec entries.

Between templates and meaning. Sections and entry names are checked here, values in shape.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from orchestrator.topology import spec
from orchestrator.topology.diagnostics import Problems, listing
from orchestrator.topology.near import near
from orchestrator.topology.nodes import Broken, Map, Node, Scalar, is_null
from orchestrator.topology.shape import Entry, check, shown

S = TypeVar("S", bound=spec.Spec)
SECTIONS = tuple(spec.TopologySpec.model_fields)


@dataclass(slots=True)
class Document:
    """Entries by name. `broken` holds, for each section, names that stand in the file but could not be used."""

    root: Map
    metadata: Entry[spec.MetadataSpec] | None = None
    brokers: dict[str, Entry[spec.BrokerSpec]] = field(default_factory=dict)
    channels: dict[str, Entry[spec.ChannelSpec]] = field(default_factory=dict)
    retry_policies: dict[str, Entry[spec.RetrySpec]] = field(default_factory=dict)
    agents: dict[str, Entry[spec.AgentSpec]] = field(default_factory=dict)
    agent_defaults: Entry[spec.AgentDefaultsSpec] | None = None
    channel_defaults: Entry[spec.ChannelDefaultsSpec] | None = None
    broken: dict[str, set[str]] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)  # sections that are no mapping at all

    def names(self, section: str) -> Mapping[str, object]:
        """The good entries of a section."""
        entries: Mapping[str, object] = getattr(self, section)
        return entries

    def at(self, section: str, name: str, *path: str | int) -> Node:
        """The node of an entry, or of what lies at `path` below it."""
        entries: Mapping[str, Entry[spec.Spec]] = getattr(self, section)
        return entries[name].at(*path) if name in entries else self.root

    def excused(self, section: str, name: str) -> bool:
        """Whether `name` is unknown only because of an error that was reported."""
        return name in self.broken.get(section, ()) or section in self.unreadable


def build(root: Map, problems: Problems) -> Document:
    """Checks every section; each mistake is reported and left out."""
    document = Document(root)
    for key, node in root:
        if key.text not in SECTIONS:
            hint = near(key.text, SECTIONS)
            problems.error("unknown-key", f"unknown key `{key.text}`", key, expected=listing(SECTIONS), suggestion=hint)
        elif isinstance(node, Broken):
            document.unreadable.add(key.text)
    _header(root, problems)
    document.metadata = _single(root, "metadata", spec.MetadataSpec, document, problems)
    document.brokers = _section(document, "brokers", spec.BrokerSpec, problems)
    document.channels = _section(document, "channels", spec.ChannelSpec, problems)
    document.retry_policies = _section(document, "retry_policies", spec.RetrySpec, problems)
    document.agents = _section(document, "agents", spec.AgentSpec, problems)
    defaults = _mapping(root, "defaults", document, problems)
    if defaults is not None:
        for key, _ in defaults:
            if key.text not in spec.DefaultsSpec.model_fields:
                known = listing(spec.DefaultsSpec.model_fields)
                hint = near(key.text, spec.DefaultsSpec.model_fields)
                problems.error("unknown-key", f"unknown key `{key.text}`", key, expected=known, suggestion=hint)
        document.agent_defaults = _single(defaults, "agents", spec.AgentDefaultsSpec, document, problems)
        document.channel_defaults = _single(defaults, "channels", spec.ChannelDefaultsSpec, document, problems)
    return document


def _header(root: Map, problems: Problems) -> None:
    for name, wanted in (("apiVersion", "orchestrator/v1"), ("kind", "Topology")):
        node = root.get(name)
        if node is None:
            problems.error("missing-key", f"`{name}` is missing", root, expected=f"{name}: {wanted}")
        elif not isinstance(node, Broken) and not (isinstance(node, Scalar) and node.value == wanted):
            problems.error("value", f"`{name}` is {shown(node)}", node, expected=wanted)


def _mapping(root: Map, name: str, document: Document, problems: Problems) -> Map | None:
    node = root.get(name)
    if isinstance(node, Map):
        return node
    if node is not None and not isinstance(node, Broken) and not is_null(node):
        problems.error("value", f"`{name}` is {shown(node)}", node, expected="a mapping")
        document.unreadable.add(name)
    return None


def _single(root: Map, name: str, model: type[S], document: Document, problems: Problems) -> Entry[S] | None:
    node = _mapping(root, name, document, problems)
    return check(model, name, root.entries[name][0], node, problems) if node is not None else None


def _section(document: Document, section: str, model: type[S], problems: Problems) -> dict[str, Entry[S]]:
    out: dict[str, Entry[S]] = {}
    node = _mapping(document.root, section, document, problems)
    broken = document.broken.setdefault(section, set())
    for key, value in node or ():
        if not re.fullmatch(spec.NAME, key.text):
            expected = "letters, digits, - and _ (at most 63)"
            problems.error("name", f'"{key.text}" cannot be a name in `{section}`', key, expected=expected)
            broken.add(key.text)
        elif isinstance(value, Map):
            out[key.text] = check(model, key.text, key, value, problems)
        else:
            broken.add(key.text)
            if not isinstance(value, Broken):
                hint = f"write `{key.text}: {{}}` for one that says nothing" if is_null(value) else None
                at: Node = key if is_null(value) else value
                problems.error("value", f"`{key.text}` is {shown(value)}", at, expected="a mapping", suggestion=hint)
    return out
