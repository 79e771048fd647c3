"""An event on its way in: by demand, whole, to the right readers, from the right place."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from orchestrator.brokers.base import FRESH
from orchestrator.errors import BrokerUnavailable, ResourceMissing
from tests.patience import PATIENCE

from .rig import Rig, elapse, eventually


async def test_a_delivery_carries_what_was_stored(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish(headers={"x-note": "hello"})
        delivery = await (await lab.reader(free=1)).take_one()
        assert delivery.body == sent.body
        assert delivery.headers["x-note"] == "hello"
        assert delivery.channel == "tasks"
        assert delivery.history == FRESH
        assert not delivery.redelivered
        assert delivery.position.startswith(f"{lab.channel('tasks').address}:")
        assert 0 < len(delivery.token) <= 400
        assert abs(delivery.time - time.time()) < 60


async def test_a_redelivery_has_the_same_position(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        first = await reader.take_one()
        await reader.retry(first, FRESH, 0)
        reader.demand(1)
        assert (await reader.take_one()).position == first.position


async def test_nothing_is_fetched_before_it_is_asked_for(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(3)
        idle = await lab.reader()
        busy = await lab.reader(free=3)
        assert {d.body for d in await busy.take(3)} == {message.body for message in sent}
        assert idle.seen == []


async def test_no_more_is_handed_out_than_there_are_free_slots(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(50)
        reader = await lab.reader(free=3)
        deliveries = await reader.take(3)
        for _ in range(4):
            await reader.settle_all(deliveries)
            reader.demand(3)
            deliveries = await reader.take(3)
        await elapse(0.3)
        assert (reader.overrun, len(reader.seen)) == (0, 15)


async def test_what_one_replica_has_no_room_for_goes_to_the_other(rig: Rig) -> None:
    if rig.driver.exclusive:
        pytest.skip(rig.driver.exclusive)
    async with rig.lab() as lab:
        await lab.publish_many(20)
        small = await lab.reader(free=2)
        await small.take(2)
        large = await lab.reader(free=18)
        await large.take(18)
        assert len(small.seen) == 2


async def test_demand_of_zero_stops_the_flow(rig: Rig) -> None:
    async with rig.lab() as lab:
        reader = await lab.reader(free=5)
        await lab.publish_many(2)
        await reader.take(2)
        reader.demand(0)
        await lab.publish_many(3)
        await elapse(0.5)
        assert len(reader.seen) <= 5  # a request already on its way may be answered
        reader.demand(5)
        await eventually(lambda: len(reader.seen) == 5, what="the rest after new demand")


async def test_replicas_share_a_queue_without_overlap(rig: Rig) -> None:
    async with rig.lab(tasks={"partitions": 4}) as lab:
        first, second = await lab.reader(free=50), await lab.reader(free=50)
        sent = [lab.message(key=str(number)) for number in range(60)]
        await lab.send(*sent)
        await eventually(lambda: len(first.seen) + len(second.seen) >= 60, what="60 deliveries in all")
        bodies = [d.body for d in (*first.seen, *second.seen)]
        assert sorted(bodies) == sorted(message.body for message in sent)


async def test_every_reader_of_a_log_gets_everything(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = [m.body for m in await lab.publish_many(5, "agent.completed", channel="events")]
        for agent in ("auditor", "watcher"):
            reader = await lab.reader(agent, free=5)
            assert [d.body for d in await reader.take(5)] == sent


async def test_the_position_is_kept_while_nobody_reads(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(2, "agent.completed", channel="events")
        connection = await lab.connect()
        reader = await lab.reader("auditor", free=2, slot="auditor.0", connection=connection)
        await reader.settle_all(await reader.take(2))
        await reader.consumer.close()
        later = await lab.publish("agent.completed", channel="events")
        again = await lab.reader("auditor", free=2, slot="auditor.0")
        assert (await again.take_one()).body == later.body


async def test_start_latest_skips_what_was_there_when_it_was_made(rig: Rig) -> None:
    async with rig.lab(apply=False, auditor={"start": "latest"}) as lab:
        for desired in lab.desired():
            if desired.id.kind == "channel":
                await lab.connection.create(desired)
        await lab.publish("agent.completed", channel="events")
        await lab.apply()
        later = await lab.publish("agent.completed", channel="events")
        reader = await lab.reader("auditor", free=5)
        assert (await reader.take_one()).body == later.body


async def test_start_at_a_time_skips_what_is_older(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.completed", channel="events")
        await elapse(1.1)
        since = datetime.now(UTC)
        await elapse(0.1)
        later = await lab.publish("agent.completed", channel="events")
        subscription = replace(lab.subscription("auditor"), start=since, group=lab.topology.name + "-late")
        agent = replace(lab.topology.agents["auditor"], subscriptions=(subscription,))
        lab.topology = replace(lab.topology, agents={**lab.topology.agents, "auditor": agent})
        late = await lab.connect()
        for desired in lab.desired():
            await late.create(desired)
        reader = await lab.reader("auditor", free=5)
        assert (await reader.take_one()).body == later.body


async def test_reading_what_apply_has_not_made_must_say_so(rig: Rig) -> None:
    async with rig.lab(apply=False) as lab:
        with pytest.raises(ResourceMissing):
            await lab.reader()
        lab.readers.clear()


async def test_connecting_to_nothing_must_say_so_in_time(rig: Rig) -> None:
    async with rig.lab(apply=False) as lab, rig.server_down():
        begin = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await rig.adapter.connect(lab.topology, lab.broker, name="late", patience=1.0)
        assert time.monotonic() - begin < PATIENCE


async def test_an_event_that_nobody_can_decode_is_handed_over_as_it_is(rig: Rig) -> None:
    async with rig.lab() as lab:
        body = b"\x00\xff not an event {"
        await rig.driver.outside_publish(lab.topology, lab.channel("tasks"), "task.assigned", body, {})
        assert (await (await lab.reader(free=1)).take_one()).body == body


async def test_an_outside_publishers_bare_body_is_handed_over(rig: Rig) -> None:
    async with rig.lab() as lab:
        body = b'{"event_type": "task.assigned", "payload": {"query": "bare"}}'
        await rig.driver.outside_publish(lab.topology, lab.channel("tasks"), "task.assigned", body, {})
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        assert delivery.body == body
        await reader.settle(delivery)
        await eventually(lambda: settled(lab), what="nothing left")


async def test_an_outside_readers_program_finds_the_body_as_it_was_sent(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(3, "agent.completed", channel="events")
        assert await rig.driver.outside_read(lab.channel("events")) == [message.body for message in sent]


async def settled(lab: object) -> bool:
    lag = await lab.lag()  # type: ignore[attr-defined]
    return bool(lag.waiting == lag.in_flight == lag.delayed == 0)
