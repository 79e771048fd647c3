"""Topics, groups and their owner: the article's settings, what may change, what a killed apply leaves, who connects."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from orchestrator.brokers.base import Allowed, Desired, Observed, ResourceId
from orchestrator.brokers.kafka import adapter
from orchestrator.brokers.kafka.client import admin_api, registry_topic
from orchestrator.brokers.kafka.connection import KafkaConnection
from orchestrator.errors import BrokerError, BrokerUnavailable, RefusedError
from orchestrator.topology.model import (
    Agent,
    Auth,
    Broker,
    Channel,
    Handler,
    Mode,
    Retention,
    Subscription,
    Topology,
)
from tests.conformance.rig import Rig, eventually
from tests.servers.kafka import PASSWORD, USER, KafkaServer

#: Partitions of the article's topics.
ARTICLE = {"agent-tasks": 6, "agent-results": 6, "agent-events": 3, "agent-dlq": 1}


def article(url: str, prefix: str) -> Topology:
    """The article's topics, and its agent that reads tasks."""
    routes = {"agent-tasks": ("task.*",), "agent-results": ("tool.*",), "agent-events": ("agent.*",), "agent-dlq": ()}
    channels = {
        name: Channel(name, "main", prefix + name, Mode.LOG, routes[name], partitions=partitions)
        for name, partitions in ARTICLE.items()
    }
    reading = Subscription("research", "agent-tasks", "main", f"{prefix}research-group", ("task.*",))
    agent = Agent("research", "", Handler("python", "agents:research"), (reading,), (), dead_letter="agent-dlq")
    brokers = {"main": Broker("main", url, "kafka", prefix)}
    return Topology(f"{prefix}article", "", Path(), (), brokers, channels, {"research": agent})


@asynccontextmanager
async def applied(topology: Topology, *, apply: bool = True) -> AsyncIterator[tuple[KafkaConnection, list[Desired]]]:
    broker = topology.brokers["main"]
    connection = await adapter.connect(topology, broker, name="test")
    desired = adapter.desired(topology, broker)
    try:
        for one in desired if apply else ():
            await connection.create(one)
        yield connection, desired
    finally:
        for observed in sorted(await connection.observe(desired), key=lambda o: o.id.kind != "subscription"):
            if observed.owner == topology.name:
                await connection.delete(observed)
        await connection.close()


@pytest.fixture
def prefix() -> str:
    return f"t{uuid.uuid4().hex[:8]}."


async def test_the_articles_topics_are_made_as_it_says(kafka_server: KafkaServer, prefix: str) -> None:
    async with applied(article(kafka_server.url, prefix)):
        outside = AdminClient({"bootstrap.servers": kafka_server.url.removeprefix("kafka://")})
        topics = (await asyncio.to_thread(outside.list_topics, timeout=10)).topics
        assert {name: len(topics[prefix + name].partitions) for name in ARTICLE} == ARTICLE


async def test_a_second_apply_finds_nothing_to_do(kafka_server: KafkaServer, prefix: str) -> None:
    async with applied(article(kafka_server.url, prefix)) as (connection, desired):
        observed = {o.id: o for o in await connection.observe(desired)}
        assert {d.id: dict(d.settings) for d in desired} == {i: dict(o.settings) for i, o in observed.items()}
        for one in desired:
            await connection.create(one)
        assert {o.id: o for o in await connection.observe(desired)} == observed


async def test_an_apply_that_was_killed_after_making_a_topic_finds_its_own(
    kafka_server: KafkaServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = article(kafka_server.url, prefix)
    async with applied(topology, apply=False) as (connection, desired):
        resources = connection._resources

        async def killed(name: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(resources, "_appeared", killed)
        await resources.run("create_topics", [_compacted(topology)], what="the registry")
        with pytest.raises(KeyboardInterrupt):
            await connection.create(desired[0])
        monkeypatch.undo()
        await resources._appeared(desired[0].id.name)  # the killed one did not wait for this
        (observed,) = [o for o in await connection.observe(desired) if o.id == desired[0].id]
        assert observed.owner == topology.name
        await connection.create(desired[0])


def _compacted(topology: Topology) -> object:
    name = registry_topic(topology.brokers["main"])
    return admin_api.NewTopic(name, 1, 1, config={"cleanup.policy": "compact"})


async def test_a_topic_that_was_made_anew_by_others_is_not_ours(kafka_server: KafkaServer, prefix: str) -> None:
    topology = article(kafka_server.url, prefix)
    async with applied(topology) as (connection, desired):
        name = desired[0].id.name
        outside = connection._resources
        await outside.run("delete_topics", [name], what="deleting")
        await eventually(lambda: gone(connection, desired[0]), what="the topic's end")
        await outside.run("create_topics", [admin_api.NewTopic(name, 1, 1)], what="theirs")
        await outside._appeared(name)
        (observed,) = [o for o in await connection.observe(desired) if o.id == desired[0].id]
        assert observed.owner is None
        with pytest.raises(RefusedError):
            await connection.create(desired[0])
        await outside.run("delete_topics", [name], what="deleting")


async def gone(connection: KafkaConnection, desired: Desired) -> bool:
    return all(o.id != desired.id for o in await connection.observe([desired]))


async def test_retention_changes_in_place_and_partitions_only_grow(kafka_server: KafkaServer, prefix: str) -> None:
    topology = article(kafka_server.url, prefix)
    async with applied(topology) as (connection, _):
        events = replace(
            topology.channels["agent-events"], partitions=5, retention=Retention(max_age=3600.0, max_bytes=5 << 20)
        )
        changed = replace(topology, channels={**topology.channels, "agent-events": events})
        desired = next(d for d in adapter.desired(changed, changed.brokers["main"]) if d.id.name == events.address)
        (before,) = [o for o in await connection.observe([desired]) if o.id == desired.id]
        await connection.update(desired, before)
        (after,) = [o for o in await connection.observe([desired]) if o.id == desired.id]
        assert after.settings == desired.settings
        assert (after.settings["retention.ms"], after.settings["retention.bytes"]) == (3_600_000, 1 << 20)
        with pytest.raises(RefusedError):
            await connection.delete(before)  # it was looked at before the change


OBSERVED = Observed(ResourceId("main", "channel", "t"), {}, "me")


@pytest.mark.parametrize(
    ("setting", "old", "new", "allowed", "loses"),
    [
        ("num_partitions", 1, 6, Allowed.YES, ""),
        ("num_partitions", 6, 1, Allowed.REPLACE, "all events"),
        ("replication_factor", 1, 3, Allowed.REPLACE, "all events"),
        ("retention.ms", -1, 86_400_000, Allowed.YES, "events older than 86400 s"),
        ("retention.ms", 1000, -1, Allowed.YES, ""),
        ("retention.bytes", 1000, 10, Allowed.YES, "the oldest events"),
        ("cleanup.policy", "delete", "compact", Allowed.YES, "all but the newest event of each key"),
    ],
)
def test_what_changing_a_setting_means(setting: str, old: object, new: object, allowed: Allowed, loses: str) -> None:
    verdict = adapter.judge("channel", setting, old, new, OBSERVED)  # type: ignore[arg-type]
    assert (verdict.allowed, verdict.loses) == (allowed, loses)


@pytest.mark.parametrize("mechanism", ["plain", "scram-sha-256", "scram-sha-512"])
async def test_with_the_right_password_it_connects(kafka_server: KafkaServer, prefix: str, mechanism: str) -> None:
    topology = article(kafka_server.auth_url, prefix)
    broker = replace(topology.brokers["main"], auth=Auth(mechanism, USER, PASSWORD))  # type: ignore[arg-type]
    connection = await adapter.connect(topology, broker, name="test")
    assert await connection.cluster_id()
    await connection.close()


async def test_with_a_wrong_password_it_says_so_without_the_password(kafka_server: KafkaServer, prefix: str) -> None:
    topology = article(kafka_server.auth_url, prefix)
    broker = replace(topology.brokers["main"], auth=Auth("plain", USER, "wrong-secret"))
    with pytest.raises(BrokerUnavailable) as refused:
        await adapter.connect(topology, broker, name="test", patience=3)
    assert "wrong-secret" not in f"{refused.value} {refused.value.hint}"


async def test_an_unknown_client_option_is_said(kafka_server: KafkaServer, prefix: str) -> None:
    topology = article(kafka_server.url, prefix)
    broker = replace(topology.brokers["main"], client={"no-such-option": 1})
    with pytest.raises(BrokerError, match="no-such-option"):
        await adapter.connect(topology, broker, name="test")


async def test_facts_name_what_a_single_copy_cannot_survive(kafka_server: KafkaServer, prefix: str) -> None:
    async with applied(article(kafka_server.url, prefix), apply=False) as (connection, _):
        facts = {fact.name: fact for fact in await connection.facts()}
        assert (facts["durability"].level, facts["brokers"].value) == ("warning", "1")
        assert facts["cluster"].value == await connection.cluster_id()


async def test_kcat_publishes_and_reads(rig: Rig) -> None:
    """Another client altogether: bytes in, and our headers and key out."""
    if shutil.which("kcat") is None:
        pytest.skip("kcat is not installed")
    async with rig.lab() as lab:
        address, bootstrap = lab.channel("tasks").address, rig.driver.url.removeprefix("kafka://")
        words = ["kcat", "-b", bootstrap, "-t", address]
        body = '{"event_type": "task.assigned", "payload": {"query": "from kcat"}}'
        await asyncio.to_thread(subprocess.run, [*words, "-P"], input=body.encode(), check=True)
        reader = await lab.reader(free=1)
        assert (await reader.take_one()).body == body.encode()
        sent = await lab.publish(key="conversation-7")
        shown = [*words, "-C", "-e", "-q", "-o", "-1", "-f", "%k|%h|%s"]
        done = await asyncio.to_thread(subprocess.run, shown, capture_output=True, check=True)
        key, headers, text = done.stdout.decode().split("|", 2)
        assert (key, text.encode()) == ("conversation-7", sent.body)
        assert "event-type=task.assigned" in headers
        assert f"correlation-id={sent.correlation_id}" in headers


async def test_keys_go_where_a_java_client_would_put_them(rig: Rig) -> None:
    """murmur2 of the key: what Kafka's own client answers for these keys and six partitions."""
    async with rig.lab(tasks={"partitions": 6}) as lab:
        found = {}
        for key in ("a", "correlation-1", "conversation-7", "été"):
            sent = await lab.publish(key=key)
            stored = next(s for s in await lab.stored("tasks") if s.body == sent.body)
            found[key] = int(stored.position.split(":")[1])
        assert found == {key: murmur2(key.encode()) % 6 for key in found}


def murmur2(data: bytes) -> int:
    """Kafka's hash of a key (org.apache.kafka.common.utils.Utils.murmur2), made positive."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = 0x9747B28C ^ len(data)
    for at in range(0, len(data) - len(data) % 4, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    tail = data[len(data) - len(data) % 4 :]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return (h ^ h >> 15) & 0x7FFFFFFF
