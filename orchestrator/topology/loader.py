"""Loads a topology: the whole walk from files to a valid Topology, in the order in which it happens.

files -> one tree (files.py) -> variables -> for_each and templates (expand.py) -> shape (document.py) -> meaning
(channels.py, agents.py) -> lint. Every step reports to one `Problems`; only broken YAML stops the walk early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.topology import show
from orchestrator.topology.agents import Agents
from orchestrator.topology.brokers import credentials
from orchestrator.topology.channels import resolve_brokers, resolve_channels
from orchestrator.topology.diagnostics import Diagnostic, Problems, TopologyError
from orchestrator.topology.document import Document, build
from orchestrator.topology.expand import expand
from orchestrator.topology.files import Files
from orchestrator.topology.inputs import declare, give
from orchestrator.topology.lint import Abilities, lint
from orchestrator.topology.marks import collect
from orchestrator.topology.model import Channel, Topology
from orchestrator.topology.nodes import Map, Node
from orchestrator.topology.schemas import Schemas
from orchestrator.topology.templates import Renderer
from orchestrator.topology.variables import Inputs


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid topology and what lint has to say about it."""

    topology: Topology
    warnings: list[Diagnostic]

    def show(self) -> str:
        """The effective topology as YAML, every default filled in, secrets redacted."""
        return show.show(self.topology)

    def document(self) -> dict[str, Any]:
        """The same as data."""
        return show.document(self.topology)


def load(
    sources: Sequence[str | Path],
    *,
    sets: Mapping[str, str] = {},
    vars_files: Sequence[Path] = (),
    stdin: str | None = None,
    abilities: Callable[[str], Abilities | None] | None = None,
) -> Loaded:
    """Reads `sources` ("-" is `stdin`); later ones override earlier ones. Offline; imports no handler.

    `sets` (values by YAML rules) go over `vars_files`. `abilities` tells what a kind of broker can do, for warnings;
    None says nothing about a kind. Raises TopologyError with every error found.
    """
    problems = Problems()
    inputs = Inputs()
    renderer = Renderer(inputs, problems)
    inputs.evaluate = renderer.default

    def early(node: Node, file: Map) -> Node:
        """`include:` is needed before the files are merged: only this file's variables are known."""
        mine = Inputs(evaluate=renderer.default)
        declare(file, mine, Problems())
        give(mine, sets, vars_files, Problems())
        return Renderer(mine, problems).render(node)

    if not sources:
        problems.error("file", "no topology was named", expected="a file, or - for standard input")
    files = Files(problems, stdin, early)
    tree = files.merged(sources)
    topology: Topology | None = None
    if tree is not None:
        declare(tree, inputs, problems)
        files.read += give(inputs, sets, vars_files, problems)
        tree = expand(tree, renderer)
        inputs.secrets += credentials(tree)
        document = build(tree, problems)
        topology = _resolve(document, files, inputs, problems)
        if not problems.errors:
            lint(topology, document, problems, abilities)
    found = _in_order(problems.found)
    if topology is None or problems.errors:
        stub = topology or _bare(inputs)
        raise TopologyError([d.redacted(stub.redact) for d in found], files.read)
    return Loaded(topology, [d.redacted(topology.redact) for d in found])


def _resolve(document: Document, files: Files, inputs: Inputs, problems: Problems) -> Topology:
    """Meaning: names to things. Returns a topology even when errors were reported; the caller looks."""
    entry = document.metadata
    name = entry.spec.name if entry and entry.spec.name else ""
    if not name and not (entry and "name" in entry.dropped) and "metadata" not in document.unreadable:
        problems.error(
            "missing-key",
            "`metadata.name` is missing",
            entry.key if entry else document.root,
            expected="metadata: {name: …}",
        )
    schemas = Schemas(problems)
    brokers = resolve_brokers(document, problems)
    channels = resolve_channels(document, name, brokers, schemas, problems)
    agents = Agents(document, name, brokers, channels, problems).resolve()
    letters = {a.dead_letter for a in agents.values() if a.dead_letter}
    return Topology(
        name=name,
        description=(entry.spec.description or "") if entry else "",
        root=files.root or Path.cwd(),
        files=tuple(dict.fromkeys((*files.read, *schemas.files, *inputs.files))),
        brokers=brokers,
        channels={n: _marked(c, letters) for n, c in channels.found.items()},
        agents=agents,
        marks=collect(document),
        secrets=tuple(sorted(set(inputs.secrets), key=len, reverse=True)),
    )


def _marked(channel: Channel, letters: set[str]) -> Channel:
    return replace(channel, dead_letters=True) if channel.name in letters else channel


def _bare(inputs: Inputs) -> Topology:
    return Topology("", "", Path(), (), {}, {}, {}, secrets=tuple(inputs.secrets))


def _in_order(found: Sequence[Diagnostic]) -> list[Diagnostic]:
    """By file in the order of reading, then by line; what has no place comes first."""
    order: dict[str, int] = {}
    for diagnostic in found:
        if diagnostic.mark:
            order.setdefault(diagnostic.mark.file, len(order))
    return sorted(found, key=lambda d: (order[d.mark.file], d.mark.line, d.mark.column) if d.mark else (-1, 0, 0))
