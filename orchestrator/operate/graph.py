"""Draws a topology: agents, channels, and the event types on the arrows between them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from orchestrator.topology.model import Topology


def mermaid(topology: Topology) -> str:
    """A Mermaid flowchart; renders in Markdown on most forges."""
    lines = ["flowchart LR"]
    for name, channel in topology.channels.items():
        left, right = ("[(", ")]") if channel.dead_letters else ("[/", "/]") if channel.external else ("([", "])")
        lines.append(f'  {_id("c", name)}{left}"{name} ({channel.mode})"{right}')
    for name, agent in topology.agents.items():
        left, right = ("[[", "]]") if agent.external else ("[", "]")
        lines.append(f'  {_id("a", name)}{left}"{name}"{right}')
    for source, target, label, dashed in _arrows(topology):
        arrow = "-.->" if dashed else "-->"
        lines.append(f'  {source} {arrow}|"{label}"| {target}')
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
    for source, target, label, dashed in _arrows(topology):
        style = ' style="dashed"' if dashed else ""
        lines.append(f"  {source} -> {target} [label={_quote(label)}{style}];")
    return "\n".join([*lines, "}"]) + "\n"


def _arrows(topology: Topology) -> Iterable[tuple[str, str, str, bool]]:
    """(from, to, label, dashed): dashed arrows are dead letters."""
    for name, agent in topology.agents.items():
        me = _id("a", name)
        for subscription in agent.subscriptions:
            yield _id("c", subscription.channel), me, ", ".join(subscription.events), False
        by_channel: dict[str, list[str]] = {}
        for publication in agent.publish:
            by_channel.setdefault(publication.channel, []).append(publication.event_type)
        for channel, types in by_channel.items():
            yield me, _id("c", channel), ", ".join(types), False
        if agent.dead_letter is not None and agent.subscriptions:
            yield me, _id("c", agent.dead_letter), "dead letters", True


def _id(kind: str, name: str) -> str:
    """An identifier that both languages take, and that differs for different names."""
    return f"{kind}_" + re.sub(r"[^A-Za-z0-9]", lambda m: f"_{ord(m.group()):x}_", name)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
