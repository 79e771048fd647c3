"""The memory broker: one process, so its victims are connections that are dropped or stop renewing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import pytest

from orchestrator.brokers.base import Delivery, Desired, Ended, History, Outgoing, ResourceId
from orchestrator.brokers.memory import MemoryConnection, adapter
from orchestrator.brokers.memory.consumer import MemoryConsumer
from orchestrator.topology.model import Channel, Subscription, Topology
from tests.patience import PATIENCE

from .victims import Held, Victim


class MemoryDriver:
    kind = "memory"
    client: Mapping[str, Any] = {}
    lease_constants = ("orchestrator.brokers.memory.consumer:LEASE",)
    carried = ()
    short_lease = 2.0
    too_large: int | None = 1024 * 1024 + 1
    processes = False
    exclusive = ""
    undeletable = ""
    long_lease = 3600.0

    def __init__(self, server: None) -> None:
        self.url = f"memory://{uuid.uuid4().hex}"
        self.hub = adapter.hub(self.url)

    def address(self, topology: str, channel: str) -> str:
        return f"{topology}.{channel}"

    def end(self) -> None:
        adapter.forget(self.url)

    def without(self, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> str:
        match mechanism:
            case "renewal":
                monkeypatch.setattr(MemoryConsumer, "_renew", MemoryConsumer.keep_alive)
            case "guardian":
                return "one process and one loop: while it is blocked nobody could take anything"
            case "fencing":
                monkeypatch.setattr(MemoryConsumer, "_owns", lambda self, delivery, group: True)
            case _:
                return "there is no watermark: each event is settled by itself"
        return ""

    async def kill_server(self) -> None:
        self.hub.stop()

    async def start_server(self) -> None:
        self.hub.start()

    async def victim(self, topology: Topology, agent: str, slot: str, free: int) -> Victim:
        connection = await adapter.connect(topology, topology.brokers["main"], name="victim")
        victim = MemoryVictim(connection, topology, agent, slot)
        await victim.consumer.open(victim)
        victim.consumer.demand(free)
        return victim

    async def outside_publish(
        self, topology: Topology, channel: Channel, event_type: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        self.hub.publish_raw(channel.address, body, headers, event_type)

    async def outside_read(self, channel: Channel) -> list[bytes]:
        return [entry.body for entry in self.hub.log(channel.address).entries.values()]

    async def outside_create(self, address: str) -> None:
        desired = Desired(ResourceId("main", "channel", address), {}, ())
        self.hub.provide(desired)

    async def outside_exists(self, address: str) -> bool:
        return address in self.hub.logs

    async def outside_delete(self, address: str) -> None:
        self.hub.delete_log(address)

    async def outside_delete_subscription(self, channel: Channel, subscription: Subscription) -> None:
        self.hub.delete_group(channel.address, subscription.group)


class MemoryVictim:
    def __init__(self, connection: MemoryConnection, topology: Topology, agent: str, slot: str) -> None:
        self.connection = connection
        self.topology = topology
        self.consumer = connection.consumer(topology.agents[agent].subscriptions[0], slot=slot)
        self.arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self.held: dict[str, Delivery] = {}
        self.frozen = mock.patch.object(self.consumer, "_renew")

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.held[delivery.position] = delivery
            self.arrived.put_nowait(delivery)

    def revoked(self, deliveries: Sequence[Delivery]) -> None:
        """What it holds is kept: a zombie does not know better."""

    def trouble(self, reason: str | None) -> None:
        """Of no interest in one that dies."""

    def alarm(self, message: str) -> None:
        """Of no interest in one that dies."""

    def on_crash(self, history: History, ended: Ended) -> History:
        raise AssertionError("nobody died before the victim")

    async def take(self, count: int = 1) -> list[Held]:
        found = [await asyncio.wait_for(self.arrived.get(), PATIENCE) for _ in range(count)]
        return [Held(d.position, d.token, d.body) for d in found]

    async def mark(self, position: str, history: History) -> None:
        future: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self.consumer.mark(self.held[position], history, future.set_result)
        assert await future is None

    async def settle(self, position: str) -> str:
        future: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        identity = f"done:{position}"
        output = Outgoing(self.topology.channels["events"], b"{}", "agent.done", identity, "victim", identity)
        self.consumer.settle(self.held[position], [output], future.set_result)
        error = await future
        return "" if error is None else f"{type(error).__name__}: {error}"

    async def kill(self) -> None:
        self.connection.drop()

    async def freeze(self) -> None:
        self.frozen.start()

    async def thaw(self) -> None:
        self.frozen.stop()

    async def end(self) -> None:
        self.connection.drop()


driver = MemoryDriver
