"""Reconcile on a real server: a second look finds nothing to do, what is not ours is never touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import nats
import pytest

from orchestrator.brokers.base import Allowed, Desired, Observed, ResourceId
from orchestrator.brokers.nats import adapter
from orchestrator.brokers.nats.resources import safe
from orchestrator.errors import BrokerError, RefusedError
from orchestrator.topology.model import Agent, Channel, Mode, Overflow, Retention, Topology
from tests.nats.rig import Rig, rig, topology
from tests.servers.nats import NatsServer


async def compare(made: Rig) -> tuple[list[Desired], list[Observed]]:
    wanted = adapter.desired(made.topology, made.broker)
    return wanted, await made.connection.observe(wanted)


def one(found: list[Observed], kind: str, name: str) -> Observed:
    return next(o for o in found if o.id.kind == kind and name in o.id.name)


async def test_nothing_is_different_after_create(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        await made.apply()  # twice is harmless
        wanted, found = await compare(made)
        seen = {o.id: o for o in found}
        assert seen.keys() == {d.id for d in wanted}
        for desired in wanted:
            assert seen[desired.id].settings == dict(desired.settings), desired.id
            assert seen[desired.id].owner == made.topology.name


def changed(plan: Topology, name: str, **changes: Any) -> Topology:
    return replace(plan, channels={**plan.channels, name: replace(plan.channels[name], **changes)})


async def test_change_in_place_keeps_fields_of_others(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        stream = safe(made.channel("events").address)
        config = (await made.connection.link.api(f"STREAM.INFO.{stream}"))["config"]
        await made.connection.link.api(
            f"STREAM.UPDATE.{stream}",
            {**config, "compression": "s2", "description": "by hand", "metadata": {**config["metadata"], "team": "x"}},
        )
        _, before = await compare(made)
        plan = changed(made.topology, "events", retention=Retention(max_age=3600.0, max_events=500), protect=True)
        async with rig(nats_server.url, plan, apply=False) as again:
            wanted, found = await compare(again)
            desired = next(d for d in wanted if d.id.name == stream)
            await again.connection.update(desired, one(found, "channel", stream))
            _, after = await compare(again)
        assert one(after, "channel", stream).settings == dict(desired.settings)
        assert one(after, "channel", stream).protect
        assert one(after, "channel", stream).version != one(before, "channel", stream).version
        config = (await made.connection.link.api(f"STREAM.INFO.{stream}"))["config"]
        assert (config["compression"], config["description"], config["metadata"]["team"]) == ("s2", "by hand", "x")


async def test_wider_filter_of_a_queue_reads_what_lay_there(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        consumer.demand(8)
        other, first = made.event("task.created"), made.event()
        await made.publish(other, first)
        (got,) = await sink.take()
        consumer.settle(got, [], lambda error: None)
        await consumer.close()
        agent = made.topology.agents["research"]
        wide = replace(agent, subscriptions=(replace(agent.subscriptions[0], events=("task.*",)),))
        plan = replace(made.topology, agents={**made.topology.agents, "research": wide})
        async with rig(nats_server.url, plan, apply=False) as again:
            wanted, found = await compare(again)
            desired = next(d for d in wanted if d.id.kind == "subscription" and "research" in d.id.name)
            await again.connection.update(desired, next(o for o in found if o.id == desired.id))
            reader, got_now = await again.consumer()
            reader.demand(8)
            (late,) = await got_now.take()
            assert late.body == other.body
            await reader.close()


async def test_stream_of_somebody_else_is_refused_and_untouched(nats_server: NatsServer) -> None:
    client = await nats.connect(nats_server.url)
    plan = topology(nats_server.url)
    stream = safe(plan.channels["tasks"].address)
    await client.jetstream().add_stream(name=stream, subjects=[f"foreign.{plan.name}"])
    async with rig(nats_server.url, plan, apply=False) as made:
        wanted, found = await compare(made)
        assert one(found, "channel", "tasks").owner is None
        with pytest.raises(RefusedError, match="not made by this tool"):
            await made.connection.create(next(d for d in wanted if d.id.name == stream))
        with pytest.raises(RefusedError):
            await made.connection.update(next(d for d in wanted if d.id.name == stream), found[0])
        with pytest.raises(RefusedError):
            await made.connection.delete(one(found, "channel", "tasks"))
        info = await client.jetstream().stream_info(stream)
        assert info.config.subjects == [f"foreign.{plan.name}"]
    await client.close()


async def test_delete_refuses_a_stale_view_and_takes_everything_along(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        _, found = await compare(made)
        old = one(found, "channel", "tasks")
        config = (await made.connection.link.api(f"STREAM.INFO.{old.id.name}"))["config"]
        await made.connection.link.api(f"STREAM.UPDATE.{old.id.name}", {**config, "max_msgs": 77})
        with pytest.raises(RefusedError, match="changed"):
            await made.connection.delete(old)
        _, found = await compare(made)
        for observed in sorted(found, key=lambda o: o.id.kind, reverse=True):
            await made.connection.delete(observed)
            await made.connection.delete(observed)  # absent is fine
        _, found = await compare(made)
        assert found == []
        listed = await made.connection.link.api("STREAM.NAMES")
        assert not [n for n in listed.get("streams") or [] if made.topology.name in n]


async def test_what_the_topology_no_longer_names_is_still_seen_as_its_own(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        await made.publish(made.event(), made.event())
        left = replace(made.topology, channels={}, agents={})
        async with rig(nats_server.url, left, apply=False) as again:
            found = await again.connection.observe([])
            assert {o.id.kind for o in found} == {"channel", "internal", "subscription"}
            assert one(found, "channel", "tasks").events == 2
            assert one(found, "subscription", "research").events == 2


async def test_external_stream_is_read_and_never_changed(nats_server: NatsServer) -> None:
    client = await nats.connect(nats_server.url)
    plan = topology(nats_server.url)
    name = f"{plan.name}-orders"
    await client.jetstream().add_stream(name=name, subjects=[f"{plan.brokers['main'].prefix}order.*"])
    foreign = Channel("orders", "main", name, Mode.LOG, ("order.created",), external=True)
    read = replace(plan.agents["audit"].subscriptions[0], channel="orders", events=("order.created",))
    agent: Agent = replace(plan.agents["audit"], subscriptions=(read,))
    plan = replace(plan, channels={"orders": foreign}, agents={"audit": agent})
    async with rig(nats_server.url, plan, apply=False) as made:
        wanted, found = await compare(made)
        assert [d.external for d in wanted if d.id.kind == "channel"] == [True]
        before = (await client.jetstream().stream_info(name)).config
        for desired in wanted:
            if desired.id not in {o.id for o in found}:
                await made.connection.create(desired)
        with pytest.raises(RefusedError):
            await made.connection.update(wanted[0], found[0])
        assert (await client.jetstream().stream_info(name)).config == before
        consumer, sink = await made.consumer("audit")
        consumer.demand(1)
        await made.publish(made.event("order.created", "orders"))
        await sink.take()
        await consumer.close()
    await client.close()


async def test_two_topologies_for_one_subject_is_a_clear_error(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        rival = topology(nats_server.url, prefix=made.broker.prefix)
        async with rig(nats_server.url, rival, apply=False) as other:
            with pytest.raises(BrokerError) as caught:
                await other.apply()
            assert "prefix" in str(caught.value.hint)


def observed(events: int = 0, size: int = 0) -> Observed:
    return Observed(ResourceId("main", "channel", "X"), {}, "t", events=events, bytes=size)


@pytest.mark.parametrize(
    ("setting", "old", "new", "events", "allowed", "loses"),
    [
        ("retention", "limits", "workqueue", 1, Allowed.REPLACE, "all events"),
        ("storage", "file", "memory", 1, Allowed.REPLACE, "all events"),
        ("max_age", 0.0, 60.0, 1, Allowed.YES, "older than"),
        ("max_age", 60.0, 0.0, 1, Allowed.YES, ""),
        ("max_age", 60.0, 120.0, 1, Allowed.YES, ""),
        ("max_msgs", -1, 10, 11, Allowed.YES, "newest 10"),
        ("max_msgs", -1, 10, 10, Allowed.YES, ""),
        ("max_msgs", 10, -1, 10, Allowed.YES, ""),
        ("discard", "old", "new", 1, Allowed.YES, ""),
        ("subjects", ("a",), ("b",), 1, Allowed.YES, ""),
        ("allow_msg_schedules", True, False, 0, Allowed.NEVER, ""),
    ],
)
def test_judgement(setting: str, old: Any, new: Any, events: int, allowed: Allowed, loses: str) -> None:
    verdict = adapter.judge("channel", setting, old, new, observed(events))
    assert verdict.allowed is allowed
    assert (loses in verdict.loses) if loses else not verdict.loses
    assert verdict.why or allowed is Allowed.YES


async def test_server_agrees_with_the_judgement(nats_server: NatsServer) -> None:
    """What judge() calls REPLACE the server refuses; what it calls YES the server does."""
    async with rig(nats_server.url) as made:
        stream = safe(made.channel("events").address)
        for changes, refused in (
            ({"mode": Mode.QUEUE}, True),
            ({"overflow": Overflow.REJECT, "retention": Retention(60.0, 5, 10_000)}, False),
            ({"dedup_window": 30.0, "events": ("agent.*", "tool.*")}, False),
        ):
            plan = changed(made.topology, "events", **changes)
            async with rig(nats_server.url, plan, apply=False) as again:
                wanted, found = await compare(again)
                desired = next(d for d in wanted if d.id.name == stream)
                have = one(found, "channel", stream)
                if refused:
                    with pytest.raises(RefusedError):
                        await again.connection.update(desired, have)
                    continue
                await again.connection.update(desired, have)
                _, after = await compare(again)
                assert one(after, "channel", stream).settings == dict(desired.settings)


def test_names_are_safe() -> None:
    assert safe("content.pipe line-a/b>*\r\n") == "content_pipe_line-a_b____"
