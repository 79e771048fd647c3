"""The causal tree of one correlation id, over all channels: the command `trace`.

Events are joined by metadata.causation_id. What a queue has already handled is gone: its children hang below a
placeholder for it, which says by whom they were published, and so what it may have been.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.brokers.connections import Connections
from orchestrator.operate.reading import Read, dead_letters, stored, time_of_day, why_it_died
from orchestrator.operate.session import session
from orchestrator.topology.model import Agent, Mode, Topology


@dataclass(slots=True)
class Node:
    """One event, its dead letters, and what it caused. `read` is None for an event that is no longer stored."""

    event_id: str
    read: Read | None = None
    letters: list[Read] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)


async def trace(topology: Topology, correlation_id: str) -> list[Read]:
    """Everything stored under `correlation_id`, oldest first. Raises BrokerUnavailable."""
    async with session(topology, name="trace") as connections:
        return await collect(topology, connections, correlation_id)


async def collect(topology: Topology, connections: Connections, correlation_id: str) -> list[Read]:
    """Everything stored under `correlation_id`, oldest first."""
    ours = [c for c in topology.channels.values() if c.events]
    letters = [c for c in topology.channels.values() if c.dead_letters]
    found = [read async for read in stored(connections, ours, start="earliest") if _of(read, correlation_id)]
    for channel in letters:
        found += [read async for read in dead_letters(topology, connections, channel) if _of(read, correlation_id)]
    return sorted(found, key=lambda r: (r.event.timestamp.timestamp() if r.event else 0.0, r.stored.time))


def _of(read: Read, correlation_id: str) -> bool:
    return read.event is not None and read.event.correlation_id == correlation_id


def tree(found: Iterable[Read]) -> list[Node]:
    """The roots. An event that lies in several places is one node."""
    nodes: dict[str, Node] = {}
    for read in found:
        if read.event is None:
            continue
        node = nodes.setdefault(read.event.event_id, Node(read.event.event_id))
        if read.letter is not None:
            node.letters.append(read)
        node.read = node.read or read
    roots: list[Node] = []
    for node in list(nodes.values()):
        cause = _cause(node)
        if cause is None or cause == node.event_id:
            roots.append(node)
            continue
        if cause not in nodes:
            nodes[cause] = Node(cause)
            roots.append(nodes[cause])
        nodes[cause].children.append(node)
    return roots or list(nodes.values())[:1]


def draw(topology: Topology, roots: list[Node]) -> str:
    """The trees as text, one line for each event."""
    lines: list[str] = []
    drawn: set[str] = set()  # a loop of causation ids, written by hand, is drawn once
    waiting = [(root, "", "") for root in reversed(roots)]
    while waiting:
        node, lead, below = waiting.pop()
        lines.append(lead + _label(topology, node))
        if node.event_id in drawn:
            continue
        drawn.add(node.event_id)
        lines += [f"{below}{'│  ' if node.children else '   '}{_died(letter)}" for letter in node.letters]
        for index, child in reversed(list(enumerate(node.children))):
            last = index == len(node.children) - 1
            waiting.append((child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))
    return "\n".join(lines)


def to_json(correlation_id: str, found: list[Read]) -> dict[str, Any]:
    """`events` in order of time; a dead letter carries `dead_letter`."""
    return {
        "version": 1,
        "correlation_id": correlation_id,
        "events": [
            read.to_json()
            | {"causation_id": (read.event.metadata.get("causation_id") if read.event else None)}
            | ({"dead_letter": why_it_died(read.letter)} if read.letter else {})
            for read in found
        ],
    }


def _cause(node: Node) -> str | None:
    cause = node.read.event.metadata.get("causation_id") if node.read and node.read.event else None
    return cause if isinstance(cause, str) and cause else None


def _died(read: Read) -> str:
    assert read.letter is not None  # only dead letters are among a node's letters
    times = f"{read.letter.attempts} attempt{'' if read.letter.attempts == 1 else 's'}"
    why = f"{read.letter.error_type}: {read.letter.message}".splitlines()[0][:100]
    return f"✗ dead in {read.letter.agent} after {times}: {why}"


def _label(topology: Topology, node: Node) -> str:
    if node.read is None or node.read.event is None:
        by = sorted({c.read.event.source_agent for c in node.children if c.read and c.read.event} - {""})
        types = {t for name in by if name in topology.agents for t in _from_queues(topology, topology.agents[name])}
        what = " or ".join(sorted(types)) or "?"
        return f"{what}  (no longer stored; handled by {', '.join(by) or '?'})  {node.event_id[:8]}"
    event = node.read.event
    who = f"{event.source_agent or '?'}{f' → {event.target_agent}' if event.target_agent else ''}"
    return f"{event.event_type}  {who}  {time_of_day(event)}  {event.event_id[:8]}"


def _from_queues(topology: Topology, agent: Agent) -> list[str]:
    """The types that `agent` reads from queues: what a queue let go was one of them."""
    queues = [s for s in agent.subscriptions if topology.channels[s.channel].mode is Mode.QUEUE]
    return [pattern for subscription in queues for pattern in subscription.events]
