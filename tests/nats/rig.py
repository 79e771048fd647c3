"""A topology, an open connection and a sink that writes down what it is told: what every NATS test starts from."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.brokers.base import Delivery, Ended, History, Outgoing
from orchestrator.brokers.nats import adapter
from orchestrator.brokers.nats.connection import NatsConnection
from orchestrator.brokers.nats.consumer import NatsConsumer
from orchestrator.brokers.nats.resources import safe
from orchestrator.topology.model import (
    Agent,
    Broker,
    Channel,
    Handler,
    Mode,
    Overflow,
    Retention,
    Subscription,
    Topology,
)
from tests.patience import PATIENCE

_numbers = itertools.count(int(time.time() * 1000))


async def until(state: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Returns when `state()` is true; fails after `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not state():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.005)


@dataclass
class Recorder:
    """A base.Sink."""

    deliveries: list[Delivery] = field(default_factory=list)
    troubles: list[str | None] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    crashes: list[tuple[History, Ended]] = field(default_factory=list)
    on_delivery: Callable[[Delivery], None] | None = None

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        self.deliveries += deliveries
        if self.on_delivery is not None:
            for one in deliveries:
                self.on_delivery(one)

    def revoked(self, deliveries: Sequence[Delivery]) -> None:
        raise AssertionError("NATS revokes nothing")

    def trouble(self, reason: str | None) -> None:
        self.troubles.append(reason)

    def alarm(self, message: str) -> None:
        self.alarms.append(message)

    def on_crash(self, history: History, ended: Ended) -> History:
        self.crashes.append((history, ended))
        if ended is Ended.RETURNED:
            return history
        return replace(history, attempts=history.attempts + 1, error="crashed")

    async def take(self, count: int = 1, seconds: float = PATIENCE) -> list[Delivery]:
        """The next `count` deliveries, removed from the record."""
        await until(lambda: len(self.deliveries) >= count, f"{count} deliveries", seconds)
        taken, self.deliveries = self.deliveries[:count], self.deliveries[count:]
        return taken


@dataclass
class Rig:
    """One topology of two queues' worth: `tasks` (queue), `events` (log), `letters` (dead letters)."""

    url: str
    topology: Topology
    connection: NatsConnection

    @property
    def broker(self) -> Broker:
        return self.topology.brokers["main"]

    def channel(self, name: str) -> Channel:
        return self.topology.channels[name]

    def subscription(self, agent: str) -> Subscription:
        return self.topology.agents[agent].subscriptions[0]

    async def apply(self) -> None:
        """What `apply` does with an empty broker."""
        for wanted in adapter.desired(self.topology, self.broker):
            await self.connection.create(wanted)

    async def consumer(self, agent: str = "research", *, slot: str | None = None) -> tuple[NatsConsumer, Recorder]:
        consumer = self.connection.consumer(self.subscription(agent), slot=slot or f"{agent}.0")
        sink = Recorder()
        await consumer.open(sink)
        return consumer, sink

    def place(self, agent: str) -> tuple[str, str]:
        """(stream, durable) of its subscription"""
        return self.connection.place(self.subscription(agent))

    async def delete(self, channel: str) -> None:
        """Its stream, as somebody else would."""
        await self.connection.link.api(f"STREAM.DELETE.{safe(self.channel(channel).address)}")

    def event(self, kind: str = "task.assigned", channel: str = "tasks", **changes: Any) -> Outgoing:
        number = next(_numbers)
        body = json.dumps({"event_id": f"e{number}", "event_type": kind, "payload": {"n": number}}).encode()
        values: dict[str, Any] = {
            "channel": self.channel(channel),
            "body": body,
            "event_type": kind,
            "event_id": f"e{number}",
            "source_agent": "test",
            "correlation_id": f"c{number}",
        }
        return Outgoing(**{**values, **changes})

    async def publish(self, *messages: Outgoing) -> None:
        await asyncio.gather(*(finished(self.connection.producer().send, m) for m in messages))


async def finished(call: Callable[..., None], *arguments: Any) -> None:
    """Awaits a method that ends with `done`."""
    end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: BaseException | None) -> None:
        if not end.done():
            end.set_exception(error) if error is not None else end.set_result(None)

    call(*arguments, done)
    await end


def topology(url: str, root: Path = Path("/nowhere"), **broker: Any) -> Topology:
    """Its names are new each time, so that tests share a server."""
    mark = f"t{next(_numbers)}"
    prefix = broker.pop("prefix", f"{mark}.")
    main = Broker("main", url, "nats", prefix=prefix, **broker)
    tasks = Channel("tasks", "main", f"{mark}-tasks", Mode.QUEUE, ("task.*",), overflow=Overflow.REJECT)
    events = Channel("events", "main", f"{mark}-events", Mode.LOG, ("agent.*",), Retention(max_age=86400.0))
    letters = Channel("letters", "main", f"{mark}-letters", Mode.LOG, (), dead_letters=True)
    agents = {}
    for name, channel, kind in (("research", "tasks", "task.assigned"), ("audit", "events", "agent.*")):
        read = Subscription(name, channel, "main", f"{prefix}{mark}-{name}", (kind,))
        agents[name] = Agent(name, "", Handler("python", "agents:run"), (read,), (), dead_letter="letters")
    channels = {c.name: c for c in (tasks, events, letters)}
    return Topology(mark, "", root, (), {"main": main}, channels, agents)


@asynccontextmanager
async def rig(url: str, plan: Topology | None = None, *, apply: bool = True) -> AsyncIterator[Rig]:
    plan = plan or topology(url)
    connection = await adapter.connect(plan, plan.brokers["main"], name="test")
    assert isinstance(connection, NatsConnection)
    made = Rig(url, plan, connection)
    try:
        if apply:
            await made.apply()
        yield made
    finally:
        await connection.close()


@asynccontextmanager
async def reading(
    url: str, agent: str = "research", plan: Topology | None = None
) -> AsyncIterator[tuple[Rig, NatsConsumer, Recorder]]:
    """A rig and a consumer that is open, with nothing demanded yet."""
    async with rig(url, plan) as made:
        consumer, sink = await made.consumer(agent)
        yield made, consumer, sink
        await consumer.close()
