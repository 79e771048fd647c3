"""Topics, groups and who owns them (walk "apply": observe, create, update, delete on Kafka).

Kafka refuses labels on topics, so ownership lies in a compacted registry topic: resource name -> owner and topic id.
An entry is written before its topic is made, without the id: an apply that is killed between the two finds its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime
from typing import Any

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)

from orchestrator.brokers.base import Desired, Observed, ResourceId, Setting, Start
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka.registry import Registry
from orchestrator.errors import BrokerUnavailable, RefusedError, ResourceMissing
from orchestrator.topology.model import digest

api = client.admin_api

_SHAPE = ("num_partitions", "replication_factor")
_PATIENCE = 10.0
_TRIES = 200  # 0.05 s apart
#: The longest session of a client that was not told otherwise, in tenths of a second.
_SESSION = 450
_UNKNOWN = (KafkaError.GROUP_ID_NOT_FOUND,)


Bounds = dict[tuple[str, int], tuple[int, int]]


class Resources:
    """What one topology owns on one cluster."""

    def __init__(
        self, config: Mapping[str, Any], registry: Registry, registry_name: str, owner: str, broker: str
    ) -> None:
        self._config, self.registry = config, registry
        self.admin = client.new_admin(config)
        self._registry_name, self._owner, self._broker = registry_name, owner, broker

    # --- observe ----------------------------------------------------------------------------------------------

    async def observe(self, desired: Sequence[Desired]) -> list[Observed]:
        entries = await asyncio.to_thread(self.registry.read)
        mine = {key for key, entry in entries.items() if entry.get("owner") == self._owner}
        managed = {_key(d.id): d.settings for d in desired}
        return await self._look(sorted(mine | managed.keys()), entries, managed)

    async def _look(
        self,
        keys: Sequence[str],
        entries: Mapping[str, Mapping[str, Any]],
        managed: Mapping[str, Mapping[str, Setting]],
    ) -> list[Observed]:
        """What exists of `keys`; of topics the settings in `managed`."""
        topics = {key.partition(":")[2] for key in keys if not key.startswith("subscription:")}
        topics |= {key.partition(":")[2].partition("/")[0] for key in keys if key.startswith("subscription:")}
        described = await self.describe(sorted(topics))
        configs = await self._configs(sorted(described))
        bounds = await self.bounds({name: d.partitions for name, d in described.items()})
        found = []
        for key in keys:
            kind, _, name = key.partition(":")
            if kind == "subscription":
                one = await self._observed_group(name, entries.get(key), described, bounds)
            elif name in described:
                one = self._observed_topic(key, entries.get(key), described[name], configs[name], bounds, managed)
                if kind == "internal":
                    one = replace(one, events=await self._unfinished(name, bounds))
            else:
                continue
            if one is not None:
                found.append(one)
        return found

    def _observed_topic(
        self,
        key: str,
        entry: Mapping[str, Any] | None,
        topic: Described,
        config: Mapping[str, str],
        bounds: Bounds,
        managed: Mapping[str, Mapping[str, Setting]],
    ) -> Observed:
        kind, _, name = key.partition(":")
        settings: dict[str, Setting] = {"num_partitions": topic.partitions, "replication_factor": topic.replication}
        for setting in managed.get(key, {"retention.ms": 0, "retention.bytes": 0, "cleanup.policy": ""}):
            if setting in config:
                settings[setting] = _typed(config[setting])
        entry = entry if entry is not None and entry.get("id") in (None, topic.id) else None
        return Observed(
            ResourceId(self._broker, "internal" if kind == "internal" else "channel", name),
            settings,
            entry["owner"] if entry else None,
            version=f"{topic.id}.{digest(settings)}",
            events=sum(max(0, high - low) for (at, _), (low, high) in bounds.items() if at == name),
            exact=False,
            protect=bool(entry and entry.get("protect")),
        )

    async def _unfinished(self, name: str, bounds: Bounds) -> int:
        """Retries that wait in an internal topic, as far as its group has said; replies are nobody's loss."""
        group, is_retry, _ = name.rpartition(".retry.")
        if not is_retry:
            return 0
        ends = {n: end for (topic, n), end in bounds.items() if topic == name}
        done = await self.positions(group, name, len(ends))
        return sum(high - max(low, done.get(n, low)) for n, (low, high) in ends.items())

    async def _observed_group(
        self, name: str, entry: Mapping[str, Any] | None, described: Mapping[str, Described], bounds: Bounds
    ) -> Observed | None:
        address, _, group = name.partition("/")
        if address not in described:
            return None
        topic = described[address]
        positions = await self.positions(group, address, topic.partitions)
        if not positions or (entry is not None and entry.get("retired")):
            return None
        ends = {n: bounds[address, n] for n in range(topic.partitions)}
        waiting = sum(max(0, high - max(low, positions.get(n, low))) for n, (low, high) in ends.items())
        mine = entry is not None and entry.get("id") in (None, topic.id)
        return Observed(
            ResourceId(self._broker, "subscription", name),
            {},
            entry["owner"] if entry is not None and mine else None,
            version=topic.id,
            events=waiting,
            exact=False,
        )

    # --- change -----------------------------------------------------------------------------------------------

    async def create(self, desired: Desired, start: Start = "earliest") -> None:
        if desired.external:
            if not await self.describe([desired.id.name]):
                raise ResourceMissing(f"{desired.id} does not exist", hint="it is external: its owner must create it")
            return
        await self.ensure_registry()
        if desired.id.kind == "subscription":
            await self._create_group(desired, start)
        else:
            await self._create_topic(desired)

    async def _create_topic(self, desired: Desired) -> None:
        name, key = desired.id.name, _key(desired.id)
        entry: dict[str, Any] = {"owner": self._owner, "protect": desired.protect}
        known = (await asyncio.to_thread(self.registry.read)).get(key)
        there = (await self.describe([name])).get(name)
        if there is not None and (known is None or known.get("id") not in (None, there.id)):
            raise _foreign(desired.id, None)
        if there is not None and known is not None and known["owner"] != self._owner:
            raise _foreign(desired.id, known["owner"])
        if there is None:
            await asyncio.to_thread(self.registry.write, key, entry)
            config = {k: str(v) for k, v in desired.settings.items() if k not in _SHAPE}
            topic = api.NewTopic(name, *(int(str(desired.settings[k])) for k in _SHAPE), config=config)
            mine = (KafkaError.TOPIC_ALREADY_EXISTS,)  # asked twice, as the first answer was lost
            await self.run("create_topics", [topic], what=f"creating {name}", harmless=mine)
            there = await self._appeared(name)
        await asyncio.to_thread(self.registry.write, key, entry | {"id": there.id})

    async def _appeared(self, name: str) -> Described:
        """Creation is confirmed before every broker knows the topic and has a leader for it."""
        for _ in range(_TRIES):
            found = (await self.describe([name])).get(name)
            if found is not None and found.led:
                return found
            await asyncio.sleep(0.05)
        raise BrokerUnavailable(f"{name} was created, but has no leader", hint="look at the brokers' logs")

    async def _vanished(self, name: str) -> None:
        for _ in range(_TRIES):
            if not await self.describe([name]):
                return
            await asyncio.sleep(0.05)
        raise BrokerUnavailable(f"{name} was deleted, but is still there", hint="look at the brokers' logs")

    async def _create_group(self, desired: Desired, start: Start) -> None:
        address, _, group = desired.id.name.partition("/")
        topic = (await self.describe([address])).get(address)
        if topic is None:
            raise ResourceMissing(f"the topic {address} does not exist", hint="run `orchestrator apply`")
        known = (await asyncio.to_thread(self.registry.read)).get(_key(desired.id))
        positions = await self.positions(group, address, topic.partitions)
        if positions and (known is None or known["owner"] != self._owner):
            raise _foreign(desired.id, known["owner"] if known else None)
        entry = {"owner": self._owner, "id": topic.id}
        await asyncio.to_thread(self.registry.write, _key(desired.id), entry)
        if not positions or (known is not None and known.get("retired")):  # one that has a position keeps it
            await self.place(group, address, topic.partitions, start)

    async def adopt(self, name: str, address: str) -> None:
        """Registers the subscription `name` of a topic that was made again."""
        topic = (await self.describe([address]))[address]
        entry = {"owner": self._owner, "id": topic.id}
        await asyncio.to_thread(self.registry.write, f"subscription:{name}", entry)

    async def update(self, desired: Desired, observed: Observed) -> None:
        if desired.id.kind == "subscription":
            return
        await self._require_same(observed)
        name = desired.id.name
        changed = {k: v for k, v in desired.settings.items() if observed.settings.get(k) != v}
        if "num_partitions" in changed:
            count = int(str(changed.pop("num_partitions")))
            grown = [api.NewPartitions(name, count)]
            await self.run("create_partitions", grown, what=f"adding partitions to {name}")
        if changed:
            resource = api.ConfigResource(api.ResourceType.TOPIC, name)
            for setting, value in changed.items():
                resource.add_incremental_config(
                    api.ConfigEntry(setting, str(value), incremental_operation=api.AlterConfigOpType.SET)
                )
            await self.run("incremental_alter_configs", [resource], what=f"changing {name}")
        topic = (await self.describe([name]))[name]
        entry = {"owner": self._owner, "protect": desired.protect, "id": topic.id}
        await asyncio.to_thread(self.registry.write, _key(desired.id), entry)

    async def delete(self, observed: Observed) -> None:
        name, key = observed.id.name, _key(observed.id)
        if not await self._require_same(observed):
            return
        if observed.id.kind == "subscription":
            address, _, group = name.partition("/")
            others = {tp.topic for tp in await self.committed(group)} - {self._registry_name}  # see Mover.heal
            if any(not _belongs(topic, address, group) for topic in others):
                # The group reads other channels too, and Kafka's client cannot take one topic out of it.
                entry = {"owner": self._owner, "id": observed.version, "retired": True}
                await asyncio.to_thread(self.registry.write, key, entry)
                return
            await self.empty(group)
            await self.run("delete_consumer_groups", [group], what=f"deleting {group}", harmless=_UNKNOWN)
        else:
            await self.run("delete_topics", [name], what=f"deleting {name}", harmless=client.GONE)
            await self._vanished(name)
        await asyncio.to_thread(self.registry.write, key, None)

    async def _require_same(self, observed: Observed) -> bool:
        """False when it is gone. Raises RefusedError when it is no longer what was observed."""
        key, entries = _key(observed.id), await asyncio.to_thread(self.registry.read)
        found = await self._look([key], entries, {key: observed.settings})
        if not found:
            return False
        now = found[0]
        if now.owner != self._owner:
            raise _foreign(observed.id, now.owner)
        if now.version != observed.version:
            raise RefusedError(f"{observed.id} was changed since it was looked at", hint="make a new plan")
        return True

    async def ensure_registry(self) -> None:
        if not await self.describe([self._registry_name]):
            topic = api.NewTopic(self._registry_name, 1, -1, config={"cleanup.policy": "compact"})
            there = (KafkaError.TOPIC_ALREADY_EXISTS,)
            await self.run("create_topics", [topic], what="creating the registry", harmless=there)
            await self._appeared(self._registry_name)

    # --- the cluster, asked ---------------------------------------------------------------------------------------

    async def run(
        self,
        method: str,
        *arguments: Any,
        what: str,
        harmless: Sequence[int] = (),
    ) -> dict[Any, Any]:
        """What a method of the admin client answers for each thing asked; those that failed with a code in `harmless`
        are left out. Asked again while the cluster is electing somebody. Raises BrokerError, naming `what`."""
        began: Mapping[Any, Future[Any]]
        deadline = asyncio.get_running_loop().time() + _PATIENCE
        while True:
            results, again = {}, False
            began = getattr(self.admin, method)(*arguments)
            for key, future in began.items():
                try:
                    results[key] = await asyncio.wrap_future(future)
                except KafkaException as error:
                    code = error.args[0].code()
                    again = again or code in client.TRANSIENT
                    late = asyncio.get_running_loop().time() > deadline
                    if code not in harmless and (late or code not in client.TRANSIENT):
                        raise client.translate(error, what) from None
                    if code == KafkaError._TIMED_OUT:  # this client never finds a coordinator that was restarted
                        self.admin = client.new_admin(self._config)
            if not again:
                return results
            await asyncio.sleep(0.1)

    async def describe(self, names: Sequence[str]) -> dict[str, Described]:
        """Those of `names` that exist."""
        if not names:
            return {}
        asked = TopicCollection(list(names))
        found = await self.run("describe_topics", asked, what="describing topics", harmless=client.GONE)
        return {topic.name: Described(topic) for topic in found.values()}

    async def _configs(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        if not names:
            return {}
        asked = [api.ConfigResource(api.ResourceType.TOPIC, name) for name in names]
        found = await self.run("describe_configs", asked, what="reading topic settings")
        return {
            resource.name: {entry.name: entry.value for entry in config.values()} for resource, config in found.items()
        }

    async def bounds(self, topics: Mapping[str, int]) -> Bounds:
        """First and next offset of each partition."""
        places = [TopicPartition(name, n) for name, count in topics.items() for n in range(count)]
        if not places:
            return {}
        ends: list[dict[tuple[str, int], int]] = []
        for spec in (api.OffsetSpec.earliest(), api.OffsetSpec.latest()):
            found = await self.run("list_offsets", dict.fromkeys(places, spec), what="reading offsets")
            ends.append({(place.topic, place.partition): result.offset for place, result in found.items()})
        return {place: (low, ends[1][place]) for place, low in ends[0].items()}

    async def committed(self, group: str) -> list[TopicPartition]:
        """Every position of `group`, with its metadata; none when there is no such group."""
        asked = [ConsumerGroupTopicPartitions(group)]
        what = f"reading positions of {group}"
        found = await self.run("list_consumer_group_offsets", asked, what=what, harmless=_UNKNOWN)
        return [tp for result in found.values() for tp in result.topic_partitions or () if tp.offset >= 0]

    async def positions(self, group: str, topic: str, partitions: int) -> dict[int, int]:
        found = await self.committed(group)
        return {tp.partition: tp.offset for tp in found if tp.topic == topic and tp.partition < partitions}

    async def place(self, group: str, topic: str, partitions: int, start: Start) -> None:
        """Puts the group's position; what an earlier commit said besides is forgotten."""
        target = [
            TopicPartition(topic, n, offset) for n, offset in (await self.places(topic, partitions, start)).items()
        ]
        request = ConsumerGroupTopicPartitions(group, target)
        placed = await self.run("alter_consumer_group_offsets", [request], what=f"positioning {group}")
        for result in placed.values():
            for tp in result.topic_partitions:
                if tp.error is not None:
                    raise client.translate(tp.error, f"positioning {group} in {topic}")

    async def places(self, topic: str, partitions: int, start: Start) -> dict[int, int]:
        """The offset of `start` in each partition."""
        bounds = await self.bounds({topic: partitions})
        at = {n: bounds[topic, n][start == "latest"] for n in range(partitions)}
        if isinstance(start, datetime):
            spec = api.OffsetSpec.for_timestamp(int(start.timestamp() * 1000))
            asked = {TopicPartition(topic, n): spec for n in range(partitions)}
            found = await self.run("list_offsets", asked, what="reading offsets")
            later = {place.partition: result.offset for place, result in found.items()}
            at = {n: later[n] if later[n] >= 0 else bounds[topic, n][1] for n in range(partitions)}
        return at

    async def empty(self, group: str) -> None:
        """Returns when nobody is in the group; who was killed stays until its session ends. Raises RefusedError."""
        for _ in range(_SESSION):
            found = await self.run("describe_consumer_groups", [group], what=group, harmless=_UNKNOWN)
            if not any(one.members for one in found.values()):
                return
            await asyncio.sleep(0.1)
        raise RefusedError(f"the group {group} is in use", hint="stop its consumers first")


class Described:
    """A topic as the cluster has it."""

    def __init__(self, topic: Any) -> None:
        self.id = str(topic.topic_id)
        self.partitions = len(topic.partitions)
        self.replication = max((len(p.replicas) for p in topic.partitions), default=0)
        self.led = all(p.leader is not None for p in topic.partitions)


def _key(resource: ResourceId) -> str:
    return f"{resource.kind}:{resource.name}"


def _belongs(topic: str, address: str, group: str) -> bool:
    return topic == address or topic.startswith(f"{group}.retry.")


def _typed(value: str) -> Setting:
    return int(value) if value.lstrip("-").isdigit() else value


def _foreign(resource: ResourceId, owner: str | None) -> RefusedError:
    whose = f"belongs to the topology {owner}" if owner else "was not made by this tool"
    return RefusedError(f"{resource} exists and {whose}", hint="give it another name, or mark it `external: true`")
