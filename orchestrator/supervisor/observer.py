"""Asks the brokers for each agent's backlog while somebody wants to see it; never on the workers' path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from orchestrator.brokers.base import Lag
from orchestrator.brokers.connections import Connections
from orchestrator.errors import OrchestratorError
from orchestrator.topology.model import Subscription, Topology

#: Seconds that an answer is used again, and that `status` waits for a new one.
_FRESH, _PATIENCE = 1.0, 3.0


class Observer:
    """The lag of one topology's agents. Connects when it is asked first; close() when it is done with."""

    def __init__(self, topology: Topology) -> None:
        self._connections = Connections(topology, name=f"{topology.name} supervisor")
        self._subscriptions: dict[str, list[Subscription]] = {}
        for agent in topology.agents.values():
            if not agent.external:
                for each in agent.subscriptions:
                    self._subscriptions.setdefault(each.broker, []).append(each)
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._asked: dict[str, float] = {}
        self._lags: dict[str, dict[str, Lag]] = {}  # by broker, then agent
        self._trouble: dict[str, str] = {}  # by broker

    async def look(self) -> None:
        """Brings lags() up to date, as far as the brokers answer within 3 s."""
        now = time.monotonic()
        for broker in self._subscriptions:
            if broker not in self._asking and now - self._asked.get(broker, -_FRESH) >= _FRESH:
                task = asyncio.create_task(self._ask(broker))
                self._asking[broker] = task
                task.add_done_callback(lambda _, broker=broker: self._asking.pop(broker, None))  # type: ignore[misc]
        asking = dict(self._asking)
        if not asking:
            return
        _, late = await asyncio.wait(asking.values(), timeout=_PATIENCE)
        for broker, task in asking.items():
            if task in late:
                self._lags.pop(broker, None)
                self._trouble[broker] = f"broker {broker} does not answer"

    def lags(self) -> dict[str, Lag]:
        """By agent, over all channels that it reads; an agent whose broker did not answer is missing."""
        found: dict[str, Lag] = {}
        for by_agent in self._lags.values():
            for agent, lag in by_agent.items():
                found[agent] = _sum(found[agent], lag) if agent in found else lag
        for agent in self.trouble():
            found.pop(agent, None)
        return found

    def trouble(self) -> Mapping[str, str]:
        """By agent: why its lag is not known."""
        return {
            each.agent: why for broker, why in self._trouble.items() for each in self._subscriptions.get(broker, ())
        }

    async def close(self) -> None:
        for task in list(self._asking.values()):
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        await self._connections.close()

    async def _ask(self, broker: str) -> None:
        try:
            connection = await self._connections.get(broker)
            answer = await connection.lag(self._subscriptions[broker])
        except OrchestratorError as error:
            self._lags.pop(broker, None)
            self._trouble[broker] = error.message
            return
        by_agent: dict[str, Lag] = {}
        for (agent, _), lag in answer.items():
            by_agent[agent] = _sum(by_agent[agent], lag) if agent in by_agent else lag
        self._lags[broker] = by_agent
        self._trouble.pop(broker, None)
        self._asked[broker] = time.monotonic()


def _sum(one: Lag, other: Lag) -> Lag:
    return replace(
        one,
        waiting=_add(one.waiting, other.waiting),
        in_flight=_add(one.in_flight, other.in_flight),
        delayed=_add(one.delayed, other.delayed),
        oldest_s=max(one.oldest_s, other.oldest_s),
        unread_lost=_add(one.unread_lost, other.unread_lost),
    )


def _add(one: int, other: int) -> int:
    return -1 if one < 0 or other < 0 else one + other
