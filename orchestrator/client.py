"""Client: publish and request from any Python program, by the same topology that the agents run from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel
from pydantic_core import from_json

from orchestrator import clock, wire
from orchestrator.brokers.base import Outgoing
from orchestrator.brokers.connections import Connections
from orchestrator.event import AgentEvent
from orchestrator.topology.model import Topology
from orchestrator.topology.units import seconds
from orchestrator.wire.routes import payload_json
from orchestrator.worker.requests import Requests


class Client:
    """An async context manager.

        async with Client("topology.yaml") as client:
            await client.publish("task.assigned", {"query": "whales"})

    Raises TopologyError for a file that is wrong, BrokerUnavailable when a broker cannot be reached.
    """

    def __init__(self, topology: Topology | str | Path, *, name: str = "client") -> None:
        self._given = topology
        self._name = name
        self._connections: Connections | None = None

    async def __aenter__(self) -> Self:
        self.topology = self._given if isinstance(self._given, Topology) else _load(self._given)
        self._connections = Connections(self.topology, name=f"{self.topology.name}.{self._name}")
        self._routes = wire.Routes(self.topology)
        self._requests = Requests(self._connections.get)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Sends what is queued and closes."""
        if self._connections is not None:
            await self._connections.close()

    async def publish(
        self,
        type: str,
        payload: Mapping[str, Any] | BaseModel | None = None,
        *,
        target_agent: str | None = None,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        event_id: str | None = None,
        delay: float | str = 0.0,
        source_agent: str = "",
        channel: str | None = None,
    ) -> AgentEvent:
        """Publishes and returns when the broker has confirmed it. `delay` is seconds or a text such as "5m"; `channel`
        names an external channel, which nothing routes to otherwise.

        Raises RoutingError, PayloadError, PublishRejected or BrokerUnavailable.
        """
        event, message = self._build(
            type, payload, target_agent, key, metadata, correlation_id, event_id, delay, source_agent, channel
        )
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            if confirmed.done():
                return
            if error is None:
                confirmed.set_result(None)
            else:
                confirmed.set_exception(error)

        assert self._connections is not None, "a Client is used inside `async with`"
        producer = (await self._connections.get(message.channel.broker)).producer()
        if not producer.ready:
            await producer.wait_ready()
        producer.send(message, done)
        await confirmed
        return event

    async def request(
        self,
        type: str,
        payload: Mapping[str, Any] | BaseModel | None = None,
        *,
        timeout: float = 30.0,
        target_agent: str | None = None,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        source_agent: str = "",
        channel: str | None = None,
    ) -> AgentEvent:
        """Publishes and returns the reply, an event of type `<type>.reply`. Raises RequestTimeout after `timeout`
        seconds. A request whose handling failed for good is answered with the payload {"error": {...}}."""
        _, message = self._build(
            type, payload, target_agent, key, metadata, correlation_id, None, 0.0, source_agent, channel
        )
        return await self._requests.call(message, timeout)

    def _build(
        self,
        event_type: str,
        payload: Mapping[str, Any] | BaseModel | None,
        target_agent: str | None,
        key: str | None,
        metadata: Mapping[str, Any] | None,
        correlation_id: str | None,
        event_id: str | None,
        delay: float | str,
        source_agent: str,
        channel: str | None,
    ) -> tuple[AgentEvent, Outgoing]:
        route = self._routes.find(event_type, channel)
        given = {"event_id": event_id, "correlation_id": correlation_id}
        event = AgentEvent(
            event_type=event_type,
            source_agent=source_agent,
            target_agent=target_agent,
            timestamp=datetime.fromtimestamp(clock.now(), UTC),
            payload=from_json(payload_json(payload or {})),
            metadata=dict(metadata or {}),
            **{name: value for name, value in given.items() if value},
        )
        message = wire.from_event(
            route,
            event,
            key=key,
            delay=seconds(delay) if isinstance(delay, str) else delay,
            headers={"traceparent": wire.new_traceparent()},
        )
        return event, message


def _load(path: str | Path) -> Topology:
    from orchestrator.topology import load  # YAML and templates: a program that has a Topology needs neither

    return load([path]).topology
