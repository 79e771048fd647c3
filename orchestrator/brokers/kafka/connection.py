"""One topology's connection to a Kafka cluster: events in and out, and what a person does to them.

Blocking calls of the client run in threads; everything that waits for a report awaits the client's own futures.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka import Producer as RawProducer

from orchestrator import clock
from orchestrator.brokers.base import (
    Adapter,
    Connection,
    Desired,
    Fact,
    Lag,
    Observed,
    Outgoing,
    Start,
    Stored,
)
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka import consumer as consuming
from orchestrator.brokers.kafka.consumer import KafkaConsumer
from orchestrator.brokers.kafka.desk import Settings, settle
from orchestrator.brokers.kafka.intake import Filter
from orchestrator.brokers.kafka.ledger import backlog
from orchestrator.brokers.kafka.producer import KafkaProducer
from orchestrator.brokers.kafka.registry import Registry
from orchestrator.brokers.kafka.resources import Resources
from orchestrator.brokers.options import blamed
from orchestrator.errors import BrokerError, ResourceMissing
from orchestrator.topology.model import Broker, Channel, Subscription, Topology, matches

#: How many records `lag` and `count` look at before they answer with an upper bound.
_LOOK = 20_000

#: How many event ids browse() remembers, to show a repeated one once.
_KNOWN = 100_000
#: Milliseconds that a broker holds back the answer that there is nothing (more); short, as somebody waits for it.
_WAIT = 20


class KafkaConnection(Connection):
    def __init__(self, adapter: Adapter, topology: Topology, broker: Broker, config: dict[str, Any]) -> None:
        self._adapter, self._topology, self._broker, self._config = adapter, topology, broker, config
        registry = Registry(config, client.registry_topic(broker))
        self._resources = Resources(config, registry, client.registry_topic(broker), topology.name, broker.name)
        self._registry = registry
        self._producer: KafkaProducer | None = None
        self._consumers: list[KafkaConsumer] = []
        self._inboxes: list[asyncio.Task[None]] = []
        self._closed = False

    @classmethod
    async def open(
        cls, adapter: Adapter, topology: Topology, broker: Broker, name: str, patience: float
    ) -> KafkaConnection:
        config = client.configuration(broker, name)
        try:
            if broker.client:
                with blamed(broker, KafkaException):  # librdkafka looks at each, also at those that only consumers use
                    RawProducer(client.for_producer({}) | config)
            connection = cls(adapter, topology, broker, config)
            await asyncio.to_thread(connection._resources.admin.list_topics, timeout=patience)
        except KafkaException as error:
            raise client.translate(error, f"cannot reach kafka://{client.address(broker)}") from None
        return connection

    # --- reconcile --------------------------------------------------------------------------------------------

    async def cluster_id(self) -> str:
        return str(await asyncio.to_thread(self._resources.admin.cluster_id, timeout=10))

    async def observe(self, desired: Sequence[Desired]) -> list[Observed]:
        return await self._resources.observe(desired)

    async def create(self, desired: Desired) -> None:
        start: Start = "earliest"
        for subscription in self._subscriptions():
            if desired.id.name == f"{self._address(subscription)}/{subscription.group}":
                start = subscription.start
        await self._resources.create(desired, start)

    async def update(self, desired: Desired, observed: Observed) -> None:
        await self._resources.update(desired, observed)

    async def delete(self, observed: Observed) -> None:
        await self._resources.delete(observed)

    def _subscriptions(self) -> list[Subscription]:
        return [s for agent in self._topology.agents.values() for s in agent.subscriptions]

    def _address(self, subscription: Subscription) -> str:
        return self._topology.channels[subscription.channel].address

    # --- events -----------------------------------------------------------------------------------------------

    def producer(self) -> KafkaProducer:
        return self.shared_producer()

    def shared_producer(self) -> KafkaProducer:
        if self._producer is None:
            self._producer = KafkaProducer(self._config, self._topology, self._broker)
        return self._producer

    def consumer(self, subscription: Subscription, *, slot: str) -> KafkaConsumer:
        channel = self._topology.channels[subscription.channel]
        agent = self._topology.agents[subscription.agent]
        letters = self._topology.channels[agent.dead_letter] if agent.dead_letter else None
        # The host is part of the name: the same slot of the same topology may run on several.
        owner = f"{self._topology.name}.{slot}.{subscription.channel}@{socket.gethostname()}"
        timeout = agent.timeout + 20
        polling = {
            "group.id": subscription.group,
            "group.instance.id": owner,
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": int(consuming.LEASE * 1000),
            "heartbeat.interval.ms": 500,  # also how soon a member hears that another has come
            "max.poll.interval.ms": int(max(300.0, 2 * timeout) * 1000),
        }
        moving = {
            "transactional.id": f"{subscription.group}/{owner}",
            "transaction.timeout.ms": int(consuming.LEASE * 1000),
            "retry.backoff.ms": 5,
            "message.timeout.ms": int(consuming.LEASE * 1000),
            "socket.timeout.ms": int(consuming.LEASE * 1000),
        }
        settings = Settings(
            consumer=self._config | polling | dict(self._broker.client),
            transactions=self._config | moving,
            topic=channel.address,
            group=subscription.group,
            owner=owner,
            wanted=Filter(
                client.retry_topic(subscription),
                channel.name,
                subscription.events,
                channel.events,
                channel.dedup_window,
            ),
            handover=timeout,
            letters=(letters.address,) if letters is not None and letters.broker == self._broker.name else (),
            nowhere=client.registry_topic(self._broker),
        )
        consumer = KafkaConsumer(settings, self, subscription)
        self._consumers.append(consumer)
        return consumer

    def ended(self, consumer: KafkaConsumer) -> None:
        if consumer in self._consumers:
            self._consumers.remove(consumer)

    async def restore(self, subscription: Subscription) -> str:
        """Makes again what `subscription` needs and somebody deleted; returns its names."""
        address = self._address(subscription)
        wanted = [address, client.retry_topic(subscription)]
        desired = [d for d in self._adapter.desired(self._topology, self._broker) if d.id.name in wanted]
        there = {observed.id for observed in await self.observe(desired)}
        missing = [d for d in desired if d.id not in there]
        for one in missing:
            await self.create(one)
        # The group is in use: its readers put its position themselves, at the beginning.
        await self._resources.adopt(f"{address}/{subscription.group}", address)
        return ", ".join(str(d.id) for d in missing)

    async def replies(self, receive: Callable[[bytes, Mapping[str, str]], None]) -> str:
        topic, inbox = client.reply_topic(self._topology, self._broker), uuid.uuid4().hex
        reader = RawConsumer(client.for_consumer(self._config, group_id=inbox))
        try:
            end = await asyncio.to_thread(client.end_of, reader, TopicPartition(topic, 0))
        except BrokerError:
            reader.close()
            raise
        reader.assign([TopicPartition(topic, 0, end)])
        self._inboxes.append(asyncio.create_task(self._receive(reader, inbox.encode(), receive)))
        return f"{topic}/{inbox}"

    async def _receive(
        self, reader: RawConsumer, inbox: bytes, receive: Callable[[bytes, Mapping[str, str]], None]
    ) -> None:
        loop = asyncio.get_running_loop()

        def read() -> None:
            while not self._closed:
                message = reader.poll(0.1)
                if message is not None and message.error() is None and message.key() == inbox:
                    loop.call_soon_threadsafe(receive, message.value() or b"", _stored(message).headers)
            reader.close()

        await asyncio.to_thread(read)

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
        removed = await self._removed(channel.address)
        known: OrderedDict[str, float] = OrderedDict()
        async for message in self._read(channel.address, await self._from(channel.address, start), follow=follow):
            stored = _stored(message)
            if ("dlq-agent" in stored.headers) != dead_letters:
                continue
            if (name := client.readable(message).get(client.EVENT_ID)) is not None:
                if name in known and (dead_letters or stored.time - known[name] <= channel.dedup_window):
                    continue  # sent before a crash, and once more after it
                known.setdefault(name, stored.time)
                if len(known) > _KNOWN:
                    known.popitem(last=False)
            if stored.position in removed:
                continue
            if not events or (stored.event_type and any(matches(p, stored.event_type) for p in events)):
                yield stored

    async def _from(self, topic: str, start: Start) -> dict[int, int]:
        """Where each partition is read from."""
        found = (await self._resources.describe([topic])).get(topic)
        if found is None:
            raise ResourceMissing(f"the topic {topic} does not exist", hint="run `orchestrator apply`")
        return await self._resources.places(topic, found.partitions, start)

    async def _read(
        self, topic: str, places: Mapping[int, int], *, follow: bool = False, to: Mapping[int, int] | None = None
    ) -> AsyncIterator[Message]:
        """The committed records from `places` to the present end (or `to`, or for ever), oldest first as far as what
        is read shows it; in order within each partition."""
        bounds = await self._resources.bounds({topic: max(places, default=-1) + 1})
        ends = {n: (to or {}).get(n, bounds[topic, n][1]) for n in places}
        first = {n: max(at, bounds[topic, n][0]) for n, at in places.items()}
        unread = {n for n in places if follow or first[n] < ends[n]}
        if not unread:
            return
        reader = RawConsumer(client.for_consumer(self._config, group_id=uuid.uuid4().hex, fetch_wait_max_ms=_WAIT))
        reader.assign([TopicPartition(topic, n, first[n]) for n in sorted(unread)])
        fetching: asyncio.Future[list[Message]] | None = None
        try:
            while unread:
                batch: list[Message] = []
                fetching = asyncio.ensure_future(asyncio.to_thread(client.fetch, reader, 500, 0.2))
                for message in await asyncio.shield(fetching):
                    number, offset = message.partition() or 0, message.offset() or 0
                    if (error := message.error()) is None:
                        nothing = client.NOTHING in client.readable(message)
                        if number in unread and (follow or offset < ends[number]) and not nothing:
                            batch.append(message)
                        offset += 1
                    elif error.code() != KafkaError._PARTITION_EOF:
                        raise client.translate(error, f"reading {topic}")
                    if not follow and offset >= ends[number]:
                        unread.discard(number)
                batch.sort(key=lambda m: m.timestamp()[1])
                for message in batch:
                    yield message
        finally:
            if fetching is not None:  # a client must not be closed under a thread that uses it
                await asyncio.wait([fetching])
            reader.close()

    async def remove(self, channel: Channel, positions: Sequence[str]) -> int:
        """Kafka cannot delete one record: the registry remembers what was removed."""
        gone = await self._removed(channel.address)
        wanted = {position for position in positions if position not in gone}
        here = {s.position for s in [_stored(m) async for m in self._read(channel.address, _span(wanted))]}
        fresh = sorted(wanted & here)
        if fresh:
            await self._resources.ensure_registry()
            key = f"removed:{channel.address}:{uuid.uuid4().hex}"
            topic = (await self._resources.describe([channel.address]))[channel.address]
            await asyncio.to_thread(self._registry.write, key, {"id": topic.id, "positions": fresh})
        return len(fresh)

    async def _removed(self, address: str) -> set[str]:
        """Positions that browse leaves out."""
        entries = await asyncio.to_thread(self._registry.read)
        found = [entry for key, entry in entries.items() if key.startswith(f"removed:{address}:")]
        if not found:
            return set()
        topic = (await self._resources.describe([address])).get(address)
        return {p for entry in found if topic is not None and entry["id"] == topic.id for p in entry["positions"]}

    async def redrive(self, subscription: Subscription, message: Outgoing) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.shared_producer().send_to(client.retry_topic(subscription), message, lambda e: settle(done, e))
        await done

    async def lag(self, subscriptions: Sequence[Subscription]) -> Mapping[tuple[str, str], Lag]:
        found = {}
        for subscription in subscriptions:
            parts = [
                await self._topic_lag(subscription, self._address(subscription)),
                await self._topic_lag(subscription, client.retry_topic(subscription)),
            ]
            found[subscription.agent, subscription.channel] = Lag(
                waiting=sum(p.waiting for p in parts),
                in_flight=sum(p.in_flight for p in parts),
                delayed=sum(p.delayed for p in parts),
                oldest_s=max(p.oldest_s for p in parts),
                unread_lost=sum(p.unread_lost for p in parts),
            )
        return found

    async def _topic_lag(self, subscription: Subscription, topic: str) -> Lag:
        """What the commits tell, and a look at the records that no commit tells of."""
        described = (await self._resources.describe([topic])).get(topic)
        if described is None:
            raise ResourceMissing(f"the topic {topic} does not exist", hint="run `orchestrator apply`")
        bounds = await self._resources.bounds({topic: described.partitions})
        commits = {tp.partition: tp for tp in await self._resources.committed(subscription.group) if tp.topic == topic}
        lag, oldest, now = [0, 0, 0, 0], 0.0, clock.now()
        for number in range(described.partitions):
            low, high = bounds[topic, number]
            commit = commits.get(number)
            at = low if commit is None else max(low, commit.offset)
            edge, holes, running, lost = backlog(commit.metadata or "") if commit is not None else (0, 0, 0, 0)
            edge += at
            lag[3] += lost
            if at >= high:
                continue
            lag[1] += running
            parked = holes - running
            lag[2 if topic == client.retry_topic(subscription) else 0] += parked
            seen = 0
            async for message in self._read(topic, {number: at}, to={number: high}):
                if seen == 0 and (holes or (message.offset() or 0) >= edge):
                    oldest = max(oldest, now - _stored(message).time)
                if (message.offset() or 0) >= edge:
                    due = float(client.readable(message).get(client.DUE, 0))
                    lag[2 if due > now else 0] += 1
                seen += 1
                if seen >= _LOOK:
                    lag[0] += high - max(edge, (message.offset() or 0) + 1)
                    break
        return Lag(waiting=lag[0], in_flight=lag[1], delayed=lag[2], oldest_s=max(0.0, oldest), unread_lost=lag[3])

    async def seek(self, subscription: Subscription, start: Start) -> None:
        topic = self._address(subscription)
        partitions = len(await self._from(topic, "earliest"))
        await self._resources.empty(subscription.group)
        await self._resources.place(subscription.group, topic, partitions, start)

    async def count(self, channel: Channel) -> int:
        bounds = await self._resources.bounds({channel.address: len(await self._from(channel.address, "earliest"))})
        total = sum(high - low for low, high in bounds.values())
        if total > _LOOK:  # markers of transactions are in it
            return total
        removed = await self._removed(channel.address)
        places = {n: low for (_, n), (low, _) in bounds.items()}
        return len([m async for m in self._read(channel.address, places) if _stored(m).position not in removed])

    async def facts(self) -> list[Fact]:
        cluster = await asyncio.wrap_future(self._resources.admin.describe_cluster())
        api = client.admin_api
        resource = api.ConfigResource(api.ResourceType.BROKER, str(cluster.nodes[0].id))
        found = await self._resources.run("describe_configs", [resource], what="reading broker settings")
        (config,) = found.values()
        value = {name: entry.value for name, entry in config.items()}
        facts = [Fact("cluster", str(cluster.cluster_id)), Fact("brokers", str(len(cluster.nodes)))]
        copies = max((c.replication for c in self._topology.channels.values() if not c.external), default=1)
        least = int(value.get("min.insync.replicas") or 1)
        safe = copies >= 3 and least >= 2
        facts.append(
            Fact(
                "durability",
                f"{copies} {'copies' if copies > 1 else 'copy'}, confirmed by at least {least}",
                "ok" if safe else "warning",
                "" if safe else "only replication: 3 with min.insync.replicas 2 survives the loss of a machine",
            )
        )
        if least > copies:
            hint = "raise the channels' replication, or lower min.insync.replicas"
            facts.append(Fact("min.insync.replicas", f"{least}, and {copies} copies", "error", hint))
        if value.get("unclean.leader.election.enable") == "true":
            hint = "set unclean.leader.election.enable=false"
            facts.append(Fact("unclean leader election", "confirmed events may be lost", "warning", hint))
        if value.get("auto.create.topics.enable") == "true":
            hint = "set auto.create.topics.enable=false: a misspelt topic is made silently"
            facts.append(Fact("auto.create.topics", "on", "warning", hint))
        return facts

    async def close(self) -> None:
        self._closed = True
        for consumer in list(self._consumers):
            await consumer.close()
        if self._producer is not None:
            await self._producer.close()
        await asyncio.gather(*self._inboxes)
        await asyncio.to_thread(self._registry.close)


def _stored(message: Message) -> Stored:
    headers = client.readable(message)
    return Stored(
        position=f"{message.topic()}:{message.partition()}:{message.offset()}",
        body=message.value() or b"",
        headers={k: v for k, v in headers.items() if k not in client.MECHANICS},
        event_type=headers.get("event-type"),
        time=float(headers.get(client.STORED) or message.timestamp()[1] / 1000),
    )


def _span(positions: Collection[str]) -> dict[int, int]:
    """For each partition that is named, the first offset that is."""
    found: dict[int, int] = {}
    for position in positions:
        number, offset = (int(part) for part in position.rsplit(":", 2)[1:])
        found[number] = min(offset, found.get(number, offset))
    return found
