"""What runs, what should -> steps. Pure: asked again after each change, until it has nothing more to say.

Walk "an edit": `fleet` asks, carries out the steps, and asks again when a worker became ready or ended.

A replacement runs in a free slot of its agent ("research.1" beside "research.0") and the old one drains when the new
one is ready, so that a slot's name, journal and lease never belong to two processes. Where the broker cannot have
both at once (Wanted.overlap is False) the old one drains first, one slot after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

from orchestrator.event import EventType
from orchestrator.topology.model import Agent, Broker, Channel, Restart, Topology, digest, matches


@dataclass(frozen=True, slots=True)
class Running:
    """One slot that is in use, with or without a process at this moment."""

    agent: str
    slot: int
    digest: str
    ready: bool = False
    leaving: bool = False  # draining, or there only to take over a journal
    orphan: bool = False  # its warm parent is gone: to be replaced, whatever its digest


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one agent should have."""

    digest: str
    replicas: int
    overlap: bool = True  # old and new may run side by side
    gate: bool = False  # changed by the edit in progress: nothing old drains before all of these are ready


@dataclass(frozen=True, slots=True)
class Step:
    """start: a worker in that slot · drain: the one that runs there · recover: start, and drain when it is ready."""

    kind: Literal["start", "drain", "recover"]
    agent: str
    slot: int
    cause: str

    def __str__(self) -> str:
        return f"{self.kind} {self.agent}.{self.slot}: {self.cause}"


def steps(
    running: Sequence[Running], wanted: Mapping[str, Wanted], left_behind: Collection[tuple[str, int]] = ()
) -> tuple[Step, ...]:
    """What can be done now. `left_behind` are the slots whose journal has no live owner."""
    by_agent: dict[str, list[Running]] = {name: [] for name in wanted}
    for each in sorted(running, key=lambda r: (r.agent, r.slot)):
        by_agent.setdefault(each.agent, []).append(each)
    gate_open = all(
        _ready(by_agent[name], want) >= want.replicas for name, want in wanted.items() if want.gate and want.overlap
    )
    result: list[Step] = []
    for name, mine in by_agent.items():
        left = sorted(slot for agent, slot in left_behind if agent == name)
        if name in wanted:
            result += _agent(name, mine, wanted[name], left, gate_open)
        elif gate_open:
            result += [Step("drain", name, r.slot, _cause(r, "the agent was removed")) for r in mine if not r.leaving]
    return tuple(result)


def converged(running: Sequence[Running], wanted: Mapping[str, Wanted]) -> bool:
    """Whether exactly what is wanted runs and is ready."""
    return not steps(running, wanted) and all(r.ready and not r.leaving for r in running)


def _agent(name: str, mine: list[Running], want: Wanted, left: list[int], gate_open: bool) -> list[Step]:
    leaving = [r for r in mine if r.leaving]
    current = [r for r in mine if not r.leaving and _is_current(r, want)]
    old = [r for r in mine if not r.leaving and not _is_current(r, want)]
    result = [Step("drain", name, r.slot, "fewer replicas") for r in current[want.replicas :]]
    current = current[: want.replicas]
    ready = sum(r.ready for r in current)

    taken = len(current) if want.overlap else len(mine)
    free = _free({r.slot for r in mine}, left)
    cause = "replaces an older one" if old else "wanted"
    starts = [next(free) for _ in range(want.replicas - taken)]
    result += [Step("start", name, slot, cause) for slot in starts]

    if want.overlap and ready >= want.replicas and gate_open:
        result += [Step("drain", name, r.slot, _cause(r, "replaced")) for r in old]
    elif not want.overlap and gate_open and old and not leaving and not starts and ready == len(current):
        result.append(Step("drain", name, old[0].slot, _cause(old[0], "makes room for its successor")))

    recover = set(left) - {r.slot for r in mine} - set(starts)
    result += [Step("recover", name, slot, "its journal was left behind") for slot in sorted(recover)]
    return result


def _cause(leaves: Running, cause: str) -> str:
    """Why it drains; one that an edit brought and that is taken back was never replaced by anything."""
    return cause if leaves.ready else "it is not ready, and no longer wanted"


def _is_current(running: Running, want: Wanted) -> bool:
    return running.digest == want.digest and not running.orphan


def _ready(mine: Sequence[Running], want: Wanted) -> int:
    return sum(r.ready and not r.leaving and _is_current(r, want) for r in mine)


def _free(taken: set[int], left: Sequence[int]) -> Iterator[int]:
    """Free slots: first those with a journal to take over, then the lowest."""
    yield from (slot for slot in left if slot not in taken)
    yield from (slot for slot in count() if slot not in taken and slot not in left)


# --- what makes a worker outdated -------------------------------------------------------------------------------


def agent_digest(topology: Topology, agent: Agent, code: str = "") -> str:
    """Changes whenever a worker of `agent` must be replaced: by its own settings, those of the channels and brokers
    that it touches, or `code` (a digest of its handler's files). How many run, and how they are restarted, does not
    count."""
    channels = _channels(topology, agent)
    brokers: dict[str, Broker] = {c.broker: topology.brokers[c.broker] for c in channels.values()}
    return digest({"agent": replace(agent, **_UNCOUNTED), "channels": channels, "brokers": brokers, "code": code})


_UNCOUNTED: dict[str, Any] = {"replicas": 1, "restart": Restart(), "drain_timeout": 0.0, "description": ""}


def _channels(topology: Topology, agent: Agent) -> dict[str, Channel]:
    names = {s.channel for s in agent.subscriptions} | {p.channel for p in agent.publish}
    if agent.dead_letter:
        names.add(agent.dead_letter)
    for channel in topology.channels.values():
        if any(matches(pattern, EventType.AGENT_FAILED) for pattern in channel.events):
            names.add(channel.name)  # a dead letter is announced there
    return {name: topology.channels[name] for name in sorted(names)}
