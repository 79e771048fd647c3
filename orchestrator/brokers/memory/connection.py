"""One topology's connection to a memory broker: publishing, resources, and what a person does to events.

Everything that a real client would send over the wire goes through one queue (enqueue, flush), in order: it waits
there while the broker is stopped, and is lost with the connection when drop() ends it as SIGKILL would.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from orchestrator import clock
from orchestrator.brokers.base import (
    Connection,
    Desired,
    Done,
    Fact,
    Lag,
    Observed,
    Outgoing,
    Producer,
    ResourceId,
    Start,
    Stored,
)
from orchestrator.brokers.memory.consumer import MemoryConsumer
from orchestrator.brokers.memory.hub import Hub
from orchestrator.brokers.memory.state import Entry, Group, Log, new_log
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected, RefusedError
from orchestrator.topology.model import Channel, Subscription, Topology, matches

#: Unsent operations beyond which a publisher should wait.
CROWD = 4096


class MemoryProducer(Producer):
    def __init__(self, connection: MemoryConnection) -> None:
        self._connection = connection

    def send(self, message: Outgoing, done: Done) -> None:
        _require_safe(message)
        self._connection.enqueue(lambda: self._connection.hub.publish([message]), done)

    @property
    def ready(self) -> bool:
        return self._connection.queued < CROWD

    async def wait_ready(self) -> None:
        await self._connection.until(lambda: self.ready)

    def reply(self, address: str, message: Outgoing, done: Done) -> None:
        def act() -> None:
            if (inbox := self._connection.hub.inboxes.get(address)) is not None:
                inbox(message.body, message.headers)

        self._connection.enqueue(act, done)


class MemoryConnection(Connection):
    def __init__(self, hub: Hub, topology: Topology, wanted: Callable[[], list[Desired]]) -> None:
        self.hub = hub
        self.topology = topology
        self.consumers: list[MemoryConsumer] = []
        self.dropped = False
        self._wanted = wanted
        self._queue: deque[tuple[Callable[[], None], Done]] = deque()
        self._flushing = False
        self._inboxes: list[str] = []
        hub.watchers.add(self._watch)

    # --- the wire ---------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        return len(self._queue)

    def enqueue(self, act: Callable[[], None], done: Done) -> None:
        if self.dropped:
            return  # as a dead process: nobody is left to be told
        self._queue.append((act, done))
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        while self._queue and self.hub.online:
            act, done = self._queue.popleft()
            try:
                act()
            except BrokerError as error:
                done(error)
            else:
                done(None)

    def require_online(self) -> None:
        if not self.hub.online:
            raise BrokerUnavailable(f"cannot reach {self.hub.name}", hint="start it again")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when `condition` holds; looks after each change of the broker."""
        changed = asyncio.Event()
        self.hub.watchers.add(changed.set)
        try:
            while not condition():
                changed.clear()
                await changed.wait()
        finally:
            self.hub.watchers.discard(changed.set)

    def _watch(self) -> None:
        if self.hub.online and self._queue:
            self.flush()

    # --- reconcile --------------------------------------------------------------------------------------------

    async def cluster_id(self) -> str:
        return self.hub.name

    async def observe(self, desired: Sequence[Desired]) -> list[Observed]:
        self.require_online()
        named = {(d.id.kind, d.id.name) for d in desired}
        broker = desired[0].id.broker if desired else next(iter(self.topology.brokers))
        found = []
        for log in self.hub.logs.values():
            log.trim(clock.now())
            if log.owner == self.topology.name or ("channel", log.address) in named:
                found.append(self._observed_log(broker, log))
            for group in log.groups.values():
                name = f"{log.address}/{group.name}"
                if group.owner == self.topology.name or ("subscription", name) in named:
                    found.append(self._observed_group(broker, log, group))
        return found

    def _observed_log(self, broker: str, log: Log) -> Observed:
        return Observed(
            ResourceId(broker, "channel", log.address),
            dict(log.settings),
            log.owner,
            version=f"{log.identity}.{log.version}",
            events=len(log.entries),
            bytes=log.size,
            protect=log.protect,
        )

    def _observed_group(self, broker: str, log: Log, group: Group) -> Observed:
        return Observed(
            ResourceId(broker, "subscription", f"{log.address}/{group.name}"),
            {"events": group.events},
            group.owner,
            version=f"{log.identity}.{group.version}",
            events=len(group.pending) + sum(1 for _ in group.unread(log)),
        )

    async def create(self, desired: Desired) -> None:
        self.require_online()
        self._create(desired)

    def _create(self, desired: Desired) -> None:
        owner, name = self.topology.name, desired.id.name
        if desired.external:
            self.hub.log(name)
            return
        if desired.id.kind == "channel":
            log = self.hub.logs.setdefault(name, new_log(desired, owner, self.hub.number()))
            _require_owner(log.owner, owner, f"channel {name}")
            return
        address, _, group_name = name.rpartition("/")
        log = self.hub.log(address)
        group = log.groups.get(group_name)
        if group is None:
            subscription = self._subscription(address, group_name)
            events, start = _events(desired), subscription.start if subscription else "earliest"
            group = Group(group_name, owner, events, log.place_of(start), version=self.hub.number())
            log.groups[group_name] = group
            self.hub.changed()
        _require_owner(group.owner, owner, f"subscription {name}")

    async def update(self, desired: Desired, observed: Observed) -> None:
        self.require_online()
        self._require_same(observed)
        address, _, group_name = desired.id.name.rpartition("/")
        if desired.id.kind == "channel":
            log = self.hub.log(desired.id.name)
            log.settings.update(desired.settings)
            log.protect, log.version = desired.protect, self.hub.number()
            log.trim(clock.now())
        else:
            group = self.hub.group(address, group_name)
            group.events, group.version = _events(desired), self.hub.number()
        self.hub.changed()

    async def delete(self, observed: Observed) -> None:
        self.require_online()
        address, _, group_name = observed.id.name.rpartition("/")
        there = observed.id.name in self.hub.logs or (
            address in self.hub.logs and group_name in self.hub.logs[address].groups
        )
        if not there:
            return
        self._require_same(observed)
        if observed.id.kind == "channel":
            self.hub.delete_log(observed.id.name)
        else:
            self.hub.delete_group(address, group_name)

    def _require_same(self, observed: Observed) -> None:
        address, _, group_name = observed.id.name.rpartition("/")
        if observed.id.kind == "channel":
            now = self._observed_log(observed.id.broker, self.hub.log(observed.id.name))
        else:
            log = self.hub.log(address)
            now = self._observed_group(observed.id.broker, log, self.hub.group(address, group_name))
        _require_owner(now.owner, self.topology.name, str(observed.id))
        if now.version != observed.version:
            raise RefusedError(f"{observed.id} was changed since it was looked at", hint="make a new plan")

    def restore(self, subscription: Subscription) -> None:
        """Makes again what `subscription` needs and somebody deleted."""
        address = self.topology.channels[subscription.channel].address
        for desired in self._wanted():
            if desired.id.name in (address, f"{address}/{subscription.group}"):
                self._create(desired)

    def _subscription(self, address: str, group: str) -> Subscription | None:
        for agent in self.topology.agents.values():
            for subscription in agent.subscriptions:
                if subscription.group == group and self.topology.channels[subscription.channel].address == address:
                    return subscription
        return None

    # --- events -----------------------------------------------------------------------------------------------

    def producer(self) -> MemoryProducer:
        return MemoryProducer(self)

    def consumer(self, subscription: Subscription, *, slot: str) -> MemoryConsumer:
        return MemoryConsumer(self, subscription, slot)

    async def replies(self, receive: Callable[[bytes, Mapping[str, str]], None]) -> str:
        address = f"reply.{self.hub.number()}"
        self.hub.inboxes[address] = receive
        self._inboxes.append(address)
        return address

    # --- operate ----------------------------------------------------------------------------------------------

    async def browse(
        self,
        channel: Channel,
        *,
        start: Start,
        follow: bool = False,
        events: Sequence[str] = (),
        dead_letters: bool = False,
    ) -> AsyncIterator[Stored]:
        self.require_online()
        log = self.hub.log(channel.address)
        seq = log.place_of(start)
        while True:
            for entry in list(log.entries_from(seq)):
                seq = entry.seq + 1
                if entry.dead_letter == dead_letters and _chosen(entry, events):
                    yield Stored(
                        f"{log.address}:{entry.place}", entry.body, dict(entry.headers), entry.event_type, entry.time
                    )
            if not follow:
                return
            await self.until(lambda first=seq: next(log.entries_from(first), None) is not None)  # type: ignore[misc]

    async def remove(self, channel: Channel, positions: Sequence[str]) -> int:
        self.require_online()
        log = self.hub.log(channel.address)
        places = (position.rpartition(":")[2] for position in positions)
        gone = sum(log.drop(int(place)) for place in places if place.isdigit())
        self.hub.changed()
        return gone

    async def redrive(self, subscription: Subscription, message: Outgoing) -> None:
        self.require_online()
        _require_safe(message)
        address = self.topology.channels[subscription.channel].address
        self.hub.redrive(self.hub.group(address, subscription.group), self.hub.log(address), message)

    async def lag(self, subscriptions: Sequence[Subscription]) -> Mapping[tuple[str, str], Lag]:
        self.require_online()
        now = clock.now()
        found: dict[tuple[str, str], Lag] = {}
        for subscription in subscriptions:
            log = self.hub.log(self.topology.channels[subscription.channel].address)
            group = self.hub.group(log.address, subscription.group)
            unread = list(group.unread(log))
            times = [entry.time for entry in unread] + [pending.entry.time for pending in group.pending.values()]
            delayed = sum(1 for pending in group.pending.values() if pending.due)
            found[subscription.agent, subscription.channel] = Lag(
                waiting=len(unread) + len(group.pending) - len(group.in_flight) - delayed,
                in_flight=len(group.in_flight),
                delayed=delayed,
                oldest_s=max(0.0, now - min(times)) if times else 0.0,
                unread_lost=group.lost,
            )
        return found

    async def seek(self, subscription: Subscription, start: Start) -> None:
        self.require_online()
        log = self.hub.log(self.topology.channels[subscription.channel].address)
        self.hub.group(log.address, subscription.group).move(log.place_of(start))
        self.hub.changed()

    async def count(self, channel: Channel) -> int:
        self.require_online()
        log = self.hub.log(channel.address)
        log.trim(clock.now())
        return len(log.entries)

    async def facts(self) -> list[Fact]:
        return [
            Fact("broker", "memory"),
            Fact("durability", "none", "warning", "events live as long as this process: use it for tests"),
        ]

    async def close(self) -> None:
        for consumer in list(self.consumers):
            await consumer.close()
        self.flush()
        while self._queue:
            self._queue.popleft()[1](BrokerUnavailable(f"the connection to {self.hub.name} was closed"))
        self._leave()

    def drop(self) -> None:
        """Ends as a killed process does: nothing is sent, given back or told; leases run out by themselves."""
        self.dropped = True
        self._queue.clear()
        for consumer in self.consumers:
            consumer.leave()
        self._leave()

    def _leave(self) -> None:
        self.hub.watchers.discard(self._watch)
        for address in self._inboxes:
            self.hub.inboxes.pop(address, None)


def _events(desired: Desired) -> tuple[str, ...]:
    events = desired.settings["events"]
    assert isinstance(events, tuple)
    return events


def _chosen(entry: Entry, events: Sequence[str]) -> bool:
    return not events or (entry.event_type is not None and any(matches(p, entry.event_type) for p in events))


def _require_owner(owner: str | None, topology: str, what: str) -> None:
    if owner != topology:
        raise RefusedError(
            f"{what} belongs to {owner or 'nobody that said so'}",
            hint="name another address, or declare the channel `external: true`",
        )


def _require_safe(message: Outgoing) -> None:
    """What a real wire could not carry is refused here too, so that a test finds it."""
    if not message.event_type or any(c in "*>" or c.isspace() or not c.isprintable() for c in message.event_type):
        raise PublishRejected(
            f"{message.event_type!r} cannot be an event type", hint="use letters, digits, _ - and dots"
        )
    for name, value in message.headers.items():
        if any(c in "\r\n\0:" for c in name) or any(c in "\r\n\0" for c in value):
            raise PublishRejected(f"the header {name!r} holds a line break", hint="take it out")
