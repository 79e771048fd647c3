"""What reconcile makes, finds, changes and refuses; what operate reads and moves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator.brokers.base import Desired, Observed
from orchestrator.brokers.redis import adapter
from orchestrator.brokers.redis.link import base
from orchestrator.errors import RefusedError, ResourceMissing
from orchestrator.topology.model import Channel, Mode, Retention, Topology
from tests.conformance.rig import Lab, Rig, elapse, eventually


async def seen(lab: Lab, name: str) -> Observed:
    return next(o for o in await lab.connection.observe(lab.desired()) if o.id.name == name)


def wanted(lab: Lab, topology: Topology, name: str) -> Desired:
    return next(d for d in lab.desired(topology) if d.id.name == name)


def with_agent_events(lab: Lab, *events: str) -> Topology:
    agent = lab.topology.agents["worker"]
    agent = replace(agent, subscriptions=(replace(agent.subscriptions[0], events=events),))
    return replace(lab.topology, agents={**lab.topology.agents, "worker": agent})


async def test_everything_beside_a_stream_goes_with_it(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=2)
        first, second = await reader.take(2)
        await reader.settle(first)
        await reader.retry(second, replace(second.history, attempts=1), 60)
        await lab.connection.redrive(lab.subscription("worker"), lab.message())
        await lab.send(lab.message(delay=60))
        await reader.consumer.close()
    assert [key async for key in raw.scan_iter(match=f"*{lab.topology.name}*")] == [
        f"{lab.broker.prefix}orchestrator:registry".encode()
    ] * await raw.exists(f"{lab.broker.prefix}orchestrator:registry")


async def test_a_deleted_channel_forgets_its_ids(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish()
        observed = await seen(lab, lab.channel("tasks").address)
        for name in (f"{observed.id.name}/{lab.subscription('worker').group}", observed.id.name):
            await lab.connection.delete(await seen(lab, name))
        await lab.apply()
        await lab.send(message)
        assert await lab.connection.count(lab.channel("tasks")) == 1


async def test_events_that_came_after_the_plan_are_not_deleted(both: Rig) -> None:
    async with both.lab() as lab:
        observed = await seen(lab, lab.channel("dead").address)
        await lab.publish(channel="dead")
        with pytest.raises(RefusedError, match="changed"):
            await lab.connection.delete(observed)
        assert await lab.connection.count(lab.channel("dead")) == 1


async def test_what_is_read_to_be_passed_over_is_nobodys_backlog(both: Rig, raw: Any) -> None:
    """Every group of a queue is handed all types. Until those that it does not read are settled for it they are pending
    in it; that must keep nobody from removing it, but what is its own must."""
    async with both.lab(tasks={"events": ("task.*", "crawl.*")}) as lab:
        stream, group = lab.channel("tasks").address, lab.subscription("worker").group
        await lab.publish_many(3, "crawl.page")
        await lab.publish(headers={"dlq-agent": "other"})
        await raw.xreadgroup(group, "somebody", {stream: ">"})
        (gone, *_) = await raw.xrange(stream)
        await raw.xdel(stream, gone[0])  # its own reader has settled it
        lag = await lab.lag()
        assert (lag.waiting, lag.in_flight, lag.oldest_s) == (0, 0, 0)
        idle = await seen(lab, f"{stream}/{group}")
        assert idle.events == 0
        await lab.publish()
        await raw.xreadgroup(group, "somebody", {stream: ">"})
        assert (await lab.lag()).in_flight == 1
        assert (await seen(lab, f"{stream}/{group}")).events == 1
        with pytest.raises(RefusedError, match="changed"):
            await lab.connection.delete(idle)
        await raw.xack(stream, group, (await raw.xrevrange(stream, count=1))[0][0])
        await lab.connection.delete(idle)
        assert await raw.xinfo_groups(stream) == []


async def test_a_channel_that_another_topology_reads_is_not_deleted(rig: Rig) -> None:
    async with rig.lab() as lab, rig.lab() as other:
        theirs = replace(lab.channel("events"), broker="main", external=True)
        agent = other.topology.agents["auditor"]
        topology = replace(
            other.topology,
            channels={"events": theirs},
            agents={"auditor": replace(agent, subscriptions=(replace(agent.subscriptions[0], group="guest"),))},
        )
        connection = await other.connect(topology)
        for desired in other.desired(topology):
            await connection.create(desired)
        observed = await seen(lab, theirs.address)
        with pytest.raises(RefusedError, match=other.topology.name):
            await lab.connection.delete(observed)
        for observed in await connection.observe(other.desired(topology)):
            if observed.owner == other.topology.name and observed.id.kind == "subscription":
                await connection.delete(observed)


async def test_an_external_stream_is_read_and_never_changed(both: Rig, raw: Any) -> None:
    name = f"outside-{id(both)}"
    bounds = {"retention": Retention(max_age=0.01, max_events=1), "mode": Mode.QUEUE, "external": True, "address": name}
    await raw.xadd(name, {"order": "5", "amount": "10"})
    await raw.xadd(name, {"payload": b'{"n":1}'})
    async with both.lab(tasks=bounds) as lab:
        await lab.send(lab.message())
        reader = await lab.reader(free=5)
        bare, plain, ours = await reader.take(3)
        assert (bare.body, dict(bare.headers), bare.event_type) == (b"", {"order": "5", "amount": "10"}, None)
        assert (plain.body, dict(plain.headers)) == (b'{"n":1}', {})
        assert ours.event_type == "task.assigned"
        await reader.settle_all([bare, plain, ours])
        assert await raw.xlen(name) == 3
        await raw.delete(name)
        await elapse(0.5)
        assert not await raw.exists(name)  # healing is for what is ours
    await raw.delete(f"{{{name}}}:meta")


async def test_an_absent_external_stream_is_missing(rig: Rig) -> None:
    async with rig.lab(apply=False, tasks={"external": True}) as lab:
        with pytest.raises(ResourceMissing):
            await lab.apply()


async def test_a_wider_subscription_gets_what_it_had_passed(both: Rig) -> None:
    async with both.lab(tasks={"events": ("task.*", "crawl.*")}) as lab:
        passed = await lab.publish("crawl.page")
        mine = await lab.publish()
        reader = await lab.reader(free=2)
        assert (await reader.take_one()).body == mine.body
        await reader.consumer.close()
        name = f"{lab.channel('tasks').address}/{lab.subscription('worker').group}"
        topology = with_agent_events(lab, "task.*", "crawl.*")
        connection = await lab.connect(topology)
        await connection.update(wanted(lab, topology, name), await seen(lab, name))
        consumer = connection.consumer(topology.agents["worker"].subscriptions[0], slot="worker.7")
        second = type(reader)(consumer)
        await consumer.open(second)
        lab.readers.append(second)
        second.demand(2)
        assert {d.body for d in await second.take(2)} == {passed.body, mine.body}


async def test_a_log_that_becomes_a_queue_drops_what_was_handled(both: Rig) -> None:
    async with both.lab() as lab:
        await lab.publish_many(5, "agent.started", channel="events")
        auditor, watcher = await lab.reader("auditor", free=5), await lab.reader("watcher", free=5)
        await auditor.settle_all(await auditor.take(5))
        taken = await watcher.take(5)
        await watcher.settle_all([d for d in taken if d is not taken[2]])
        name = lab.channel("events").address
        channels = {**lab.topology.channels, "events": replace(lab.channel("events"), mode=Mode.QUEUE)}
        topology = replace(lab.topology, channels=channels)
        verdict = adapter.judge("channel", "mode", "log", "queue", await seen(lab, name))
        assert verdict.loses
        await lab.connection.update(wanted(lab, topology, name), await seen(lab, name))
        assert (await lab.stored("events"))[0].position == taken[2].position


async def test_a_group_at_a_time_begins_there(both: Rig) -> None:
    async with both.lab(apply=False) as lab:
        await lab.connection.create(wanted(lab, lab.topology, lab.channel("events").address))
        await lab.publish("agent.started", channel="events")
        await elapse(0.02)
        middle = datetime.now(UTC)
        await elapse(0.02)
        late = await lab.publish("agent.started", channel="events")
        agent = lab.topology.agents["auditor"]
        agent = replace(agent, subscriptions=(replace(agent.subscriptions[0], start=middle),))
        lab.topology = replace(lab.topology, agents={**lab.topology.agents, "auditor": agent})
        connection = await lab.connect()
        for desired in lab.desired():
            await connection.create(desired)
        reader = await lab.reader("auditor", free=2)
        assert (await reader.take_one()).body == late.body
        assert reader.alarms == []


async def test_a_stream_without_a_tag_keeps_its_helpers_in_its_slot(rig: Rig) -> None:
    assert base("TASKS") == "{TASKS}"
    assert base("{a}-tasks") == "{a}-tasks"
    assert base("{}-tasks") == "{{}-tasks}"


async def test_the_cluster_id_outlives_a_restart(own_rig: Rig, raw: Any) -> None:
    async with own_rig.lab() as lab:
        first = await lab.connection.cluster_id()
        await own_rig.driver.kill_server()
        await own_rig.driver.start_server()
        assert await lab.connection.cluster_id() == first
        await raw.set("orchestrator:cluster-id", "prod-1")
        assert await lab.connection.cluster_id() == "prod-1"


async def test_facts_warn_of_what_loses_events(own_rig: Rig, raw: Any) -> None:
    async with own_rig.lab() as lab:
        levels = {fact.name: fact.level for fact in await lab.connection.facts()}
        assert (levels["appendonly"], levels["appendfsync"], levels["maxmemory-policy"]) == ("ok", "ok", "ok")
        await raw.config_set("appendfsync", "everysec")
        await raw.config_set("maxmemory", "1gb")
        await raw.config_set("maxmemory-policy", "allkeys-lru")
        levels = {fact.name: fact.level for fact in await lab.connection.facts()}
        assert (levels["appendfsync"], levels["maxmemory-policy"]) == ("warning", "error")
        await raw.config_set("appendonly", "no")
        assert {f.name: f.level for f in await lab.connection.facts()}["appendonly"] == "error"


async def test_bytes_bound_a_queue_and_a_log(both: Rig) -> None:
    size = {"retention": Retention(max_bytes=200_000)}
    async with both.lab(tasks=size, events=size) as lab:
        body = b"x" * 5_000
        with pytest.raises(Exception, match="full"):
            await lab.send(*[lab.message(body=body) for _ in range(100)])
        assert 10 < await lab.connection.count(lab.channel("tasks")) < 60
        for _ in range(100):
            await lab.send(lab.message("agent.done", channel="events", body=body))
        held = {o.id.name: o for o in await lab.connection.observe(lab.desired())}[lab.channel("events").address]
        assert 10 < held.events < 60
        assert held.bytes < 300_000
        with pytest.raises(Exception, match="max_bytes") as caught:
            await lab.send(lab.message(body=b"x" * 300_000))
        assert caught.value.limit == 200_000  # type: ignore[attr-defined]


async def test_a_reply_inbox_expires_with_its_process_and_takes_plain_entries(rig: Rig, raw: Any) -> None:
    async with rig.lab() as lab:
        found: list[tuple[bytes, dict[str, str]]] = []
        address = await lab.connection.replies(lambda body, headers: found.append((body, dict(headers))))
        assert 0 < await raw.pttl(address) <= 60_000
        await raw.xadd(address, {"payload": b"{}", "colour": "blue"})
        await eventually(lambda: found)
        assert found == [(b"{}", {"colour": "blue"})]
        await raw.delete(address)  # as an eviction would; the next request finds it again
        await eventually(lambda: raw.exists(address), within=10)


async def test_browsing_follows_over_a_deleted_entry(rig: Rig) -> None:
    async with rig.lab() as lab:
        channel: Channel = lab.channel("events")
        first = await lab.publish("agent.started", channel="events")
        bodies: list[bytes] = []

        async def follow() -> None:
            async for stored in lab.connection.browse(channel, start="earliest", follow=True):
                bodies.append(stored.body)  # noqa: PERF401 - looked at while it grows

        task = asyncio.create_task(follow())
        await eventually(lambda: len(bodies) == 1)
        position = (await lab.stored("events"))[0].position
        assert await lab.connection.remove(channel, [position, "elsewhere:1-1"]) == 1
        second = await lab.publish("agent.started", channel="events")
        await eventually(lambda: bodies == [first.body, second.body])
        task.cancel()
        await asyncio.wait([task])
