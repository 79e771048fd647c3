"""What `status -o json` prints, made from the fleet. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.brokers.base import Lag
from orchestrator.supervisor.fleet import Fleet
from orchestrator.supervisor.process import State
from orchestrator.supervisor.slot import Counts, Slot
from orchestrator.topology.model import Agent

#: An agent's state is the first of these that one of its workers is in.
_WORST = (State.FAILED, State.CRASH_LOOP, State.BACKING_OFF)


def report(fleet: Fleet, state: str, lags: Mapping[str, Lag], trouble: Mapping[str, str]) -> dict[str, Any]:
    """`lags` by agent, where known; `trouble` by agent: why the lag is not known."""
    target = fleet.target
    assert target is not None
    agents = [
        _agent(fleet, agent, target.replicas(agent), target.paused.get(name), lags.get(name), trouble.get(name))
        for name, agent in target.agents().items()
    ]
    if state == "running" and any(agent["state"] not in ("running", "paused", "stopped") for agent in agents):
        state = "starting" if all(a["state"] in ("running", "starting", "paused") for a in agents) else "degraded"
    return {
        "version": 1,
        "topology": target.topology.name,
        "revision": target.key,
        "state": state,
        "agents": agents,
    }


def _agent(
    fleet: Fleet, agent: Agent, replicas: int, paused: str | None, lag: Lag | None, trouble: str | None
) -> dict[str, Any]:
    slots = fleet.of(agent.name)
    total = Counts()
    for counts in (
        fleet.past.get(agent.name, Counts()),
        *(each for slot in slots for each in (slot.past, slot.counts)),
    ):
        total.add(counts)
    state, reason = _state(slots, replicas, paused)
    return {
        "name": agent.name,
        "state": state,
        "replicas": replicas,
        "ready": sum(slot.life.state is State.READY for slot in slots),
        "restarts": fleet.restarts.get(agent.name, 0) + sum(slot.life.restarts for slot in slots),
        "lag": lag.waiting + lag.in_flight + lag.delayed if lag is not None and lag.waiting >= 0 else None,
        "in_flight": total.in_flight,
        "oldest_s": round(lag.oldest_s, 3) if lag is not None else None,
        "dead": total.dead,
        "handled": total.handled,
        "failed": total.failed,
        "retried": total.retried,
        "reason": reason or trouble,
        "alarms": [alarm for slot in slots for alarm in slot.alarms],
        "pids": [slot.pid for slot in slots if slot.pid is not None],
    }


def _state(slots: Sequence[Slot], replicas: int, paused: str | None) -> tuple[str, str | None]:
    for state in _WORST:
        for slot in slots:
            if slot.life.state is state and slot.life.reason:
                return state.value, slot.life.reason
    for slot in slots:
        if slot.trouble is not None:
            return "unhealthy", slot.trouble
    if paused is not None:
        return "paused", paused
    ready = sum(slot.life.state is State.READY for slot in slots)
    if replicas == 0 and not slots:
        return "stopped", None
    if ready >= replicas:
        return "running", None
    if any(slot.life.state is State.DRAINING for slot in slots):
        return "draining", None
    return "starting", None
