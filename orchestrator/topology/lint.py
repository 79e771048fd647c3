"""Warnings about a valid topology: what is probably not meant, and what a broker cannot do. Last step of loading.

Codes: no-publisher, no-subscriber, endless-loop, idle-agent, idle-channel, unsupported.
Events also come from outside (`publish`, Client, other programs), so an unpublished type alone is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.document import Document
from orchestrator.topology.model import Agent, Channel, Mode, Overflow, Subscription, Topology
from orchestrator.topology.near import near
from orchestrator.topology.nodes import Node
from orchestrator.topology.routing import Index, concrete


class Abilities(Protocol):
    """What lint asks of a broker; orchestrator.brokers.base.Capabilities has it."""

    @property
    def max_events(self) -> bool: ...
    @property
    def overflow_reject(self) -> bool: ...
    @property
    def partitions(self) -> bool: ...


def lint(
    topology: Topology, document: Document, problems: Problems, abilities: Callable[[str], Abilities | None] | None
) -> None:
    """Adds a warning for each finding."""
    flow = Flow.of(topology)
    _publishers(topology, flow, document, problems)
    for agent in topology.agents.values():
        if not agent.subscriptions and not agent.external:
            at = document.at("agents", agent.name)
            problems.warning("idle-agent", f"`{agent.name}` reads nothing, so it never runs", at)
    for name, channel in topology.channels.items():
        _channel(channel, flow, document, problems)
        lacks = abilities(topology.brokers[channel.broker].kind) if abilities else None
        if lacks is not None and not channel.external:
            for setting, why in _unsupported(channel, document, lacks):
                at = document.at("channels", name, *setting)
                problems.warning("unsupported", f"{topology.brokers[channel.broker].kind} {why}", at)
    _loops(topology, flow, document, problems)


@dataclass(slots=True)
class Flow:
    """Who reads and who publishes which pattern, in each channel. Found by index, not by comparing all pairs."""

    readers: dict[str, Index[Subscription]]
    publishers: dict[str, Index[str]]
    after: dict[object, list[object]]  # agent -> (channel, type) -> agents that read it
    _orphans: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, topology: Topology) -> Flow:
        """The flow of a whole topology."""
        flow = cls({c: Index() for c in topology.channels}, {c: Index() for c in topology.channels}, {})
        for agent in topology.agents.values():
            for subscription in agent.subscriptions:
                for pattern in subscription.events:
                    flow.readers[subscription.channel].add(pattern, subscription)
            for publication in agent.publish:
                flow.publishers[publication.channel].add(publication.event_type, agent.name)
        for agent in topology.agents.values():
            types = [(p.channel, p.event_type) for p in agent.publish]
            flow.after[agent.name] = list(types)
            for channel, pattern in types:
                if (channel, pattern) not in flow.after:
                    found = flow.readers[channel].overlapping(pattern)
                    flow.after[(channel, pattern)] = [subscription.agent for _, subscription in found]
        return flow

    def reached(self, entries: list[str]) -> set[object]:
        """What the events of `entries` lead to, without the entries themselves."""
        seen: set[object] = set(entries)
        waiting: list[object] = list(entries)
        while waiting:
            for following in self.after[waiting.pop()]:
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return seen.difference(entries)

    def orphans(self, channel: str) -> list[str]:
        """Concrete types that agents publish there and nobody reads: the likely twins of a misspelt one."""
        if channel not in self._orphans:
            published = dict.fromkeys(p for p, _ in self.publishers[channel].overlapping(">") if concrete(p))
            self._orphans[channel] = [p for p in published if not self.readers[channel].overlapping(p)]
        return self._orphans[channel]


def _publishers(topology: Topology, flow: Flow, document: Document, problems: Problems) -> None:
    """Where events come in, a type without a publisher is meant. Behind that, an agent that waits for such a type
    probably waits in vain; so does one whose type is nearly that of an event which nobody reads."""
    unfed: dict[str, list[tuple[str, str]]] = {}
    entries = []
    for agent in topology.agents.values():
        patterns = [(s.channel, p) for s in agent.subscriptions for p in s.events]
        lacking = [(c, p) for c, p in patterns if not flow.publishers[c].overlapping(p)]
        unfed[agent.name] = [(c, p) for c, p in lacking if concrete(p)]
        if len(lacking) == len(patterns):
            entries.append(agent.name)
    behind = flow.reached(entries)
    for name, missing in unfed.items():
        for channel, pattern in missing:
            hint = near(pattern, flow.orphans(channel), cutoff=0.88)  # task.a and task.b are two types, no slip
            if hint or name in behind:
                at = _reading(topology.agents[name], document, pattern)
                message = f"no agent publishes `{pattern}`, which `{name}` reads"
                problems.warning("no-publisher", message, at, suggestion=hint)


def _reading(agent: Agent, document: Document, pattern: str) -> Node:
    entry = document.agents[agent.name]
    for index, said in enumerate(entry.spec.subscribe or []):
        if said == pattern or pattern in (getattr(said, "events", None) or ()):
            return entry.at("subscribe", index)
    return entry.at("subscribe")


def _channel(channel: Channel, flow: Flow, document: Document, problems: Problems) -> None:
    at = document.at("channels", channel.name)
    if not channel.events and not channel.dead_letters and not channel.external:
        problems.warning("idle-channel", f"`{channel.name}` takes no events and no dead letters", at)
    if channel.mode is not Mode.QUEUE or channel.external:
        return
    readers = flow.readers[channel.name]
    waiting = [p for p in (*channel.events, *flow.orphans(channel.name)) if not readers.overlapping(p)]
    for pattern in dict.fromkeys(waiting):
        message = f"nobody reads `{pattern}` from the queue `{channel.name}`: such events stay in it"
        problems.warning("no-subscriber", message, at)


def _unsupported(channel: Channel, document: Document, can: Abilities) -> Iterator[tuple[tuple[str, ...], str]]:
    bounded = channel.retention.max_events is not None or channel.retention.max_bytes is not None
    said = document.channels[channel.name].given("overflow")
    if channel.retention.max_events is not None and not can.max_events:
        yield ("retention", "max_events"), "cannot bound the number of events"
    if channel.overflow is Overflow.REJECT and (bounded or said) and not can.overflow_reject:
        yield ("overflow",), "cannot refuse events when a channel is full: the oldest go"
    if channel.partitions > 1 and not can.partitions:
        yield ("partitions",), "has no partitions: the number has no effect"


def _loops(topology: Topology, flow: Flow, document: Document, problems: Problems) -> None:
    """A circle of agents that nothing ever leaves: each one's every event is read inside it."""
    for circle in _circles(topology, flow.after):
        inside = set(circle)
        if len(inside) > 1 and all(_stays(topology.agents[name], inside, topology, flow) for name in inside):
            names = [name for name in topology.agents if name in inside]
            at = document.at("agents", names[0], "publish")
            shown = " → ".join([*names[:8], *(["…"] if len(names) > 8 else [names[0]])])
            problems.warning("endless-loop", f"nothing ever leaves the circle {shown}", at)


def _stays(agent: Agent, inside: set[str], topology: Topology, flow: Flow) -> bool:
    """Whether each of its events goes on inside the circle: not through a filter, and to nobody outside who could
    carry it on (somebody who only watches changes nothing)."""
    for publication in agent.publish:
        readers = [s for _, s in flow.readers[publication.channel].overlapping(publication.event_type)]
        goes_on = any(s.agent in inside and s.agent != agent.name and not s.filter for s in readers)
        leaves = any(s.agent not in inside and topology.agents[s.agent].publish for s in readers)
        if leaves or not goes_on:
            return False
    return True


def _circles(topology: Topology, after: dict[object, list[object]]) -> list[list[str]]:
    """Strongly connected agents, by an iterative form of Tarjan's algorithm. Event types are nodes of the graph too,
    so that a thousand readers of one type are a thousand edges and not a million."""
    number: dict[object, int] = {}
    low: dict[object, int] = {}
    path: list[object] = []
    on_path: set[object] = set()
    found: list[list[str]] = []
    for root in topology.agents:
        work: list[tuple[object, Iterator[object]]] = [] if root in number else [(root, iter(after[root]))]
        while work:
            node, following = work[-1]
            if node not in number:
                number[node] = low[node] = len(number)
                path.append(node)
                on_path.add(node)
            step = next((n for n in following if n not in number or n in on_path), None)
            if step is not None and step not in number:
                work.append((step, iter(after[step])))
                continue
            if step is not None:
                low[node] = min(low[node], number[step])
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == number[node]:
                members = [path.pop()]
                while members[-1] != node:
                    members.append(path.pop())
                on_path.difference_update(members)
                found.append([m for m in members if isinstance(m, str)])
    return found
