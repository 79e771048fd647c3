"""Kafka: topics, consumer groups and transactions under the adapter Protocol.

client: configuration, names, errors, the producer · consumer: what the loop calls · reader: the thread that owns a
consumer, with positions (its partitions), intake (what it reads), moving (retries, dead letters) and desk (what it
tells the loop) · ledger: what of a partition is done (pure) · resources, registry:
reconcile · connection: everything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.brokers.base import (
    Adapter,
    Allowed,
    Capabilities,
    Desired,
    Observed,
    ResourceId,
    Setting,
    Verdict,
)
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka.connection import KafkaConnection
from orchestrator.brokers.kafka.consumer import LEASE
from orchestrator.topology.model import Broker, Channel, Topology

#: A retry is larger than the event was, by its history; whatever the channel took, its retry topic takes.
_ROOM = 64 << 20


class KafkaAdapter(Adapter):
    capabilities = Capabilities(
        kind="kafka",
        lease=LEASE,
        atomic_settle=False,
        max_events=False,
        overflow_reject=False,
        publish_dedup=False,
        partitions=True,
        delayed_publish=False,
        key_order=True,
        frees_on_settle=False,
        overlap=False,  # a static member hands its partitions over in place, within its own slot
        notes=(
            "outputs are confirmed first and the input is settled then; retries and dead letters move with their offset"
            " in one transaction, which shows only to readers with read_committed",
            "a topic gives space back by retention, not when an event is settled",
            "the same event_id takes effect once at each subscription, as far as the reader's memory goes",
            "max_bytes is divided among the partitions, each of which keeps its own share",
        ),
    )

    def desired(self, topology: Topology, broker: Broker) -> list[Desired]:
        channels = [c for c in topology.channels.values() if c.broker == broker.name]
        found = [_channel(channel) for channel in channels]
        replication = max((c.replication for c in channels if not c.external), default=1)
        for agent in topology.agents.values():
            for subscription in agent.subscriptions:
                if subscription.broker != broker.name or agent.external:
                    continue
                address = topology.channels[subscription.channel].address
                where = ("agents", agent.name, "subscribe")
                retry = client.retry_topic(subscription)
                found.append(_internal(broker, retry, replication, where, {"max.message.bytes": _ROOM}))
                name = ResourceId(broker.name, "subscription", f"{address}/{subscription.group}")
                found.append(Desired(name, {}, where))
        if found:
            replies = client.reply_topic(topology, broker)
            short = {"retention.ms": 3_600_000}
            found.append(_internal(broker, replies, replication, ("brokers", broker.name), short))
        return found

    def judge(self, kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
        if setting == "num_partitions" and isinstance(old, int) and isinstance(new, int):
            if new > old:
                return Verdict(why="keys move to other partitions: order holds only from then on")
            return Verdict(Allowed.REPLACE, "all events", "Kafka cannot take partitions away")
        if setting == "replication_factor":
            return Verdict(Allowed.REPLACE, "all events", "copies are moved with Kafka's own reassignment tool")
        if setting == "cleanup.policy" and new != "delete":
            return Verdict(loses="all but the newest event of each key")
        if setting in ("retention.ms", "retention.bytes") and _shrinks(old, new):
            what = f"events older than {int(str(new)) / 1000:g} s" if setting == "retention.ms" else "the oldest events"
            return Verdict(loses=what)
        return Verdict()

    async def connect(self, topology: Topology, broker: Broker, *, name: str, patience: float = 5.0) -> KafkaConnection:
        return await KafkaConnection.open(self, topology, broker, name, patience)


def _channel(channel: Channel) -> Desired:
    kept, where = channel.retention, ("channels", channel.name)
    settings: dict[str, Setting] = {
        "num_partitions": channel.partitions,
        "replication_factor": channel.replication,
        "cleanup.policy": "delete",
        "retention.ms": -1 if kept.max_age is None else int(kept.max_age * 1000),
        "retention.bytes": -1 if kept.max_bytes is None else max(1, kept.max_bytes // channel.partitions),
    }
    origins = {
        "num_partitions": (*where, "partitions"),
        "replication_factor": (*where, "replication"),
        "retention.ms": (*where, "retention", "max_age"),
        "retention.bytes": (*where, "retention", "max_bytes"),
    }
    return Desired(
        ResourceId(channel.broker, "channel", channel.address),
        {} if channel.external else settings,
        where,
        origins=origins,
        external=channel.external,
        protect=channel.protect,
    )


def _internal(broker: Broker, name: str, replication: int, where: tuple[str, ...], more: Mapping[str, int]) -> Desired:
    settings: dict[str, Setting] = {
        "num_partitions": 1,
        "replication_factor": replication,
        "cleanup.policy": "delete",
        "retention.ms": -1,
        "retention.bytes": -1,
    }
    return Desired(ResourceId(broker.name, "internal", name), settings | dict(more), where)


def _shrinks(old: Setting, new: Setting) -> bool:
    """-1 is unlimited."""
    if not isinstance(old, int) or not isinstance(new, int) or new < 0:
        return False
    return old < 0 or new < old


adapter = KafkaAdapter()
