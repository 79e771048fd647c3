"""What a conformance test holds in its hands: a Rig (one broker), a Lab (one topology on it, applied), a Reader (one
consumer with a sink that records). Waiting is always for a state, with a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.brokers import registry
from orchestrator.brokers.base import (
    Capabilities,
    Connection,
    Consumer,
    Delivery,
    Desired,
    Done,
    Ended,
    History,
    Outgoing,
    Producer,
    Stored,
)
from orchestrator.event import AgentEvent
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

from .drivers import Driver, Victim


async def eventually(
    state: Callable[[], Any], *, within: float | None = None, what: str | Callable[[], str] = "the state waited for"
) -> Any:
    """Waits until `state()` is true and returns it; fails saying what it was at the end. It may be a coroutine."""
    within = PATIENCE if within is None else within
    deadline = time.monotonic() + within
    while True:
        value = state()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {within:g} s still not: {what if isinstance(what, str) else what()}")
        await asyncio.sleep(0.01)


async def elapse(seconds: float) -> None:
    """Lets time pass, where its passing is what the test is about (a lease, a delay, nothing happening)."""
    await asyncio.sleep(seconds)


def outcome() -> tuple[Done, asyncio.Future[None]]:
    """A `done` callback, and the future that it resolves."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    return done, future


async def finished(future: asyncio.Future[None], within: float | None = None) -> None:
    await asyncio.wait_for(future, PATIENCE if within is None else within)


class Reader:
    """A consumer and its sink, as the worker would be."""

    def __init__(self, consumer: Consumer, on_crash: Callable[[History, Ended], History] | None = None) -> None:
        self.consumer = consumer
        self.inbox: list[Delivery] = []  # delivered, not looked at by the test yet
        self.seen: list[Delivery] = []  # everything ever delivered
        self.lost: list[Delivery] = []
        self.troubles: list[str | None] = []
        self.alarms: list[str] = []
        self.free = 0
        self.overrun = 0  # deliveries beyond the demand
        self._on_crash = on_crash

    # the Sink protocol
    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        self.free -= len(deliveries)
        self.overrun = max(self.overrun, -self.free)
        self.inbox += deliveries
        self.seen += deliveries

    def revoked(self, deliveries: Sequence[Delivery]) -> None:
        self.lost += deliveries

    def trouble(self, reason: str | None) -> None:
        self.troubles.append(reason)

    def alarm(self, message: str) -> None:
        self.alarms.append(message)

    def on_crash(self, history: History, ended: Ended) -> History:
        assert self._on_crash is not None, "recover asked about a crash that this test did not expect"
        return self._on_crash(history, ended)

    # the worker's calls
    def demand(self, free: int) -> None:
        self.free = free
        self.consumer.demand(free)

    async def take(self, count: int = 1, *, within: float | None = None) -> list[Delivery]:
        """The next `count` deliveries."""
        await eventually(
            lambda: len(self.inbox) >= count,
            within=within,
            what=lambda: f"{count} deliveries; there are {len(self.inbox)}, {self.bodies()[:5]} …",
        )
        taken, self.inbox = self.inbox[:count], self.inbox[count:]
        return taken

    async def take_one(self, *, within: float | None = None) -> Delivery:
        return (await self.take(1, within=within))[0]

    def bodies(self) -> list[bytes]:
        return [delivery.body[:40] for delivery in self.inbox]

    async def settle(self, delivery: Delivery, *outputs: Outgoing) -> None:
        done, future = outcome()
        self.consumer.settle(delivery, outputs, done)
        await finished(future)

    async def settle_all(self, deliveries: Sequence[Delivery]) -> None:
        futures = []
        for delivery in deliveries:
            done, future = outcome()
            self.consumer.settle(delivery, (), done)
            futures.append(future)
        await asyncio.wait_for(asyncio.gather(*futures), 2 * PATIENCE)

    async def retry(self, delivery: Delivery, history: History, delay: float) -> None:
        done, future = outcome()
        self.consumer.retry(delivery, replace(history, not_before=time.time() + delay), delay, done)
        await finished(future)

    async def mark(self, delivery: Delivery, history: History) -> None:
        done, future = outcome()
        self.consumer.mark(delivery, history, done)
        await finished(future)


class Lab:
    """One topology on the broker, its resources made, with a connection. Names are unique to it."""

    def __init__(self, rig: Rig, topology: Topology) -> None:
        self.rig = rig
        self.topology = topology
        self.broker = topology.brokers["main"]
        self.connections: list[Connection] = []
        self.readers: list[Reader] = []
        self.victims: list[Victim] = []
        self._producer: Producer | None = None
        self._numbers = itertools.count(1)

    # --- setting up -------------------------------------------------------------------------------------------

    async def connect(self, topology: Topology | None = None) -> Connection:
        connection = await self.rig.adapter.connect(topology or self.topology, self.broker, name="conformance")
        self.connections.append(connection)
        return connection

    @property
    def connection(self) -> Connection:
        return self.connections[0]

    def desired(self, topology: Topology | None = None) -> list[Desired]:
        return self.rig.adapter.desired(topology or self.topology, self.broker)

    async def apply(self) -> None:
        for desired in self.desired():
            await self.connection.create(desired)

    def channel(self, name: str) -> Channel:
        return self.topology.channels[name]

    def subscription(self, agent: str) -> Subscription:
        return self.topology.agents[agent].subscriptions[0]

    # --- publishing -------------------------------------------------------------------------------------------

    @property
    def producer(self) -> Producer:
        if self._producer is None:
            self._producer = self.connection.producer()
        return self._producer

    def message(self, event_type: str = "task.assigned", *, channel: str = "tasks", **given: Any) -> Outgoing:
        """An event ready to be sent; its payload holds a running number."""
        number = next(self._numbers)
        event = AgentEvent(
            event_id=given.pop("event_id", None) or f"{self.topology.name}-{number}",
            event_type=event_type,
            source_agent="tester",
            payload={"number": number},
        )
        fields: dict[str, Any] = {
            "channel": self.channel(channel),
            "body": event.to_bytes(),
            "event_type": event_type,
            "event_id": event.event_id,
            "source_agent": event.source_agent,
            "correlation_id": event.correlation_id,
            "key": event.correlation_id,
        }
        return Outgoing(**fields | given)

    def letter(self, delivery: Delivery, **given: Any) -> Outgoing:
        """A dead letter for `delivery`, with the identity that a second try would have too."""
        identity = f"dlq:{delivery.position}"
        if "correlation-id" in delivery.headers:
            given.setdefault("correlation_id", delivery.headers["correlation-id"])
        return self.message(
            delivery.event_type or "task.assigned",
            channel="dead",
            event_id=identity,
            body=delivery.body,
            headers={**delivery.headers, "dlq-agent": "worker", "dlq-reason": "tested"},
            **given,
        )

    async def send(self, *messages: Outgoing, producer: Producer | None = None, within: float | None = None) -> None:
        """Publishes, and returns when all are confirmed."""
        futures = []
        for message in messages:
            done, future = outcome()
            (producer or self.producer).send(message, done)
            futures.append(future)
        await asyncio.wait_for(asyncio.gather(*futures), PATIENCE if within is None else within)

    async def publish(self, event_type: str = "task.assigned", **given: Any) -> Outgoing:
        message = self.message(event_type, **given)
        await self.send(message)
        return message

    async def publish_many(self, count: int, event_type: str = "task.assigned", **given: Any) -> list[Outgoing]:
        messages = [self.message(event_type, **given) for _ in range(count)]
        for start in range(0, count, 1000):
            await self.send(*messages[start : start + 1000], within=2 * PATIENCE)
        return messages

    # --- reading ----------------------------------------------------------------------------------------------

    async def reader(
        self,
        agent: str = "worker",
        *,
        free: int = 0,
        slot: str | None = None,
        connection: Connection | None = None,
        on_crash: Callable[[History, Ended], History] | None = None,
    ) -> Reader:
        """An opened consumer on a connection of its own, as each worker process has one."""
        connection = connection or await self.connect()
        number = len(self.readers) + len(self.victims)
        consumer = connection.consumer(self.subscription(agent), slot=slot or f"{agent}.{number}")
        reader = Reader(consumer, on_crash)
        await consumer.open(reader)
        self.readers.append(reader)
        if free:
            reader.demand(free)
        return reader

    async def victim(self, agent: str = "worker", *, free: int = 1, slot: str | None = None) -> Victim:
        """A consumer that can be killed and frozen: in a process of its own, where the broker knows processes."""
        number = len(self.readers) + len(self.victims)
        victim = await self.rig.driver.victim(self.topology, agent, slot or f"{agent}.{number}", free)
        self.victims.append(victim)
        return victim

    async def stored(self, channel: str, **how: Any) -> list[Stored]:
        found = self.connection.browse(self.channel(channel), start="earliest", **how)
        return [one async for one in found]

    async def letters(self) -> list[Stored]:
        return await self.stored("dead", dead_letters=True)

    async def lag(self, agent: str = "worker") -> Any:
        subscription = self.subscription(agent)
        found = await self.connection.lag([subscription])
        return found[subscription.agent, subscription.channel]

    async def close(self) -> None:
        """Whatever state the test has left it in: with a connection that knows nothing of it."""
        for victim in self.victims:
            await victim.end()
        for reader in self.readers:
            await reader.consumer.close()
        for connection in self.connections:
            await connection.close()
        cleaner = await self.rig.adapter.connect(self.topology, self.broker, name="cleaner")
        found = await cleaner.observe(self.desired())
        for first in sorted(found, key=lambda one: one.id.kind == "channel"):
            for now in await cleaner.observe(self.desired()):  # its version may have changed with what was inside
                if now.id == first.id and now.owner == self.topology.name:
                    await cleaner.delete(now)
        await cleaner.close()


class Rig:
    """One broker under test."""

    def __init__(self, driver: Driver, root: Path) -> None:
        self.driver = driver
        self.adapter = registry.adapter(driver.kind)
        self.root = root

    @property
    def kind(self) -> str:
        return self.driver.kind

    @property
    def capabilities(self) -> Capabilities:
        return self.adapter.capabilities

    @contextlib.asynccontextmanager
    async def lab(self, *, apply: bool = True, **changes: Mapping[str, Any]) -> AsyncIterator[Lab]:
        """A topology with a queue `tasks`, a log `events` and dead letters `dead`; agents `worker` (tasks), `auditor`
        and `watcher` (events). `changes` are fields of the Channel or, for an agent, of its Subscription."""
        lab = Lab(self, self.topology(changes))
        await lab.connect()
        try:
            if apply:
                await lab.apply()
            yield lab
        finally:
            await lab.close()

    @contextlib.asynccontextmanager
    async def server_down(self) -> AsyncIterator[None]:
        """The broker is killed, and runs again on the same data after the block."""
        await self.driver.kill_server()
        try:
            yield
        finally:
            await self.driver.start_server()

    async def restart_server(self) -> None:
        async with self.server_down():
            pass

    def topology(self, changes: Mapping[str, Mapping[str, Any]]) -> Topology:
        name = f"t{uuid.uuid4().hex[:10]}"
        broker = Broker("main", self.driver.url, self.kind, prefix=f"{name}.", client=self.driver.client)
        channels = {
            "tasks": self._channel(name, "tasks", Mode.QUEUE, ("task.*",), Overflow.REJECT),
            "events": self._channel(name, "events", Mode.LOG, ("agent.>",), Overflow.DROP_OLDEST),
            "dead": self._channel(name, "dead", Mode.LOG, (), Overflow.DROP_OLDEST, dead_letters=True),
        }
        readers = {"worker": ("tasks", "task.*"), "auditor": ("events", "agent.>"), "watcher": ("events", "agent.>")}
        agents = {}
        for agent, (channel, pattern) in readers.items():
            subscription = Subscription(agent, channel, "main", f"{name}-{agent}", (pattern,))
            subscription = replace(subscription, **changes.get(agent, {}))
            agents[agent] = Agent(agent, "", Handler("python", "nowhere:none"), (subscription,), (), dead_letter="dead")
        for channel, fields in changes.items():
            if channel in channels:
                channels[channel] = replace(channels[channel], **fields)
        return Topology(name, "", self.root, (), {"main": broker}, channels, agents)

    def _channel(
        self, topology: str, name: str, mode: Mode, events: tuple[str, ...], overflow: Overflow, **more: Any
    ) -> Channel:
        address = self.driver.address(topology, name)
        return Channel(name, "main", address, mode, events, Retention(max_age=86400.0), overflow, **more)
