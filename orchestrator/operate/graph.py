"""Draws a topology: agents, channels, and the event types on the arrows between them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.topology.model import Topology


@dataclass(frozen=True, slots=True)
class Arrow:
    """Between one agent and one channel."""

    agent: str
    channel: str
    kind: Literal["reads", "publishes", "dead-letters"]
    events: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return ", ".join(self.events) or "dead letters"

    @property
    def ends(self) -> tuple[str, str]:
        """From where to where, as identifiers."""
        agent, channel = _id("a", self.agent), _id("c", self.channel)
        return (channel, agent) if self.kind == "reads" else (agent, channel)


def mermaid(topology: Topology) -> str:
    """A Mermaid flowchart; renders in Markdown on most forges."""
    lines = ["flowchart LR"]
    for name, channel in topology.channels.items():
        left, right = ("[(", ")]") if channel.dead_letters else ("[/", "/]") if channel.external else ("([", "])")
        lines.append(f'  {_id("c", name)}{left}"{name} ({channel.mode})"{right}')
    for name, agent in topology.agents.items():
        left, right = ("[[", "]]") if agent.external else ("[", "]")
        lines.append(f'  {_id("a", name)}{left}"{name}"{right}')
    for arrow in arrows(topology):
        source, target = arrow.ends
        line = "-.->" if arrow.kind == "dead-letters" else "-->"
        lines.append(f'  {source} {line}|"{arrow.label}"| {target}')
    return "\n".join(lines) + "\n"


def dot(topology: Topology) -> str:
    """A Graphviz digraph."""
    lines = [f"digraph {_quote(topology.name)} {{", "  rankdir=LR;"]
    for name, channel in topology.channels.items():
        style = ' style="dashed"' if channel.external else ""
        lines.append(f"  {_id('c', name)} [label={_quote(f'{name} ({channel.mode})')} shape=cylinder{style}];")
    for name, agent in topology.agents.items():
        style = ' style="dashed"' if agent.external else ""
        lines.append(f"  {_id('a', name)} [label={_quote(name)} shape=box{style}];")
    for arrow in arrows(topology):
        source, target = arrow.ends
        style = ' style="dashed"' if arrow.kind == "dead-letters" else ""
        lines.append(f"  {source} -> {target} [label={_quote(arrow.label)}{style}];")
    return "\n".join([*lines, "}"]) + "\n"


def to_json(topology: Topology) -> dict[str, Any]:
    """The `-o json` form."""
    return {
        "version": 1,
        "topology": topology.name,
        "channels": [
            {"name": name, "mode": c.mode.value, "external": c.external, "dead_letters": c.dead_letters}
            for name, c in topology.channels.items()
        ],
        "agents": [{"name": name, "external": agent.external} for name, agent in topology.agents.items()],
        "arrows": [
            {"agent": a.agent, "channel": a.channel, "kind": a.kind, "events": list(a.events)} for a in arrows(topology)
        ],
    }


def arrows(topology: Topology) -> Iterable[Arrow]:
    """Agent by agent: what it reads, what it publishes, where its dead letters go."""
    for name, agent in topology.agents.items():
        for subscription in agent.subscriptions:
            yield Arrow(name, subscription.channel, "reads", tuple(subscription.events))
        by_channel: dict[str, list[str]] = {}
        for publication in agent.publish:
            by_channel.setdefault(publication.channel, []).append(publication.event_type)
        for channel, types in by_channel.items():
            yield Arrow(name, channel, "publishes", tuple(types))
        if agent.dead_letter is not None and agent.subscriptions:
            yield Arrow(name, agent.dead_letter, "dead-letters")


def _id(kind: str, name: str) -> str:
    """An identifier that both languages take, and that differs for different names."""
    return f"{kind}_" + re.sub(r"[^A-Za-z0-9]", lambda m: f"_{ord(m.group()):x}_", name)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
