"""The broker goes away, or somebody deletes from outside: nothing is lost, and it is said."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.brokers.base import History, Outgoing
from orchestrator.errors import BrokerError

from .rig import Lab, Reader, Rig, eventually


async def publish_until_taken(lab: Lab, event_type: str, channel: str) -> Outgoing:
    """Publishes one event, again while there is nothing that would take it."""
    message = lab.message(event_type, channel=channel)

    async def taken() -> bool:
        try:
            await lab.send(message, within=10)
        except (TimeoutError, BrokerError):
            return False
        return True

    await eventually(taken, what="a confirmed publish")
    return message


def spoke(reader: Reader) -> bool:
    return bool(reader.alarms or [reason for reason in reader.troubles if reason])


async def test_a_reader_goes_on_within_seconds_after_a_restart(rig: Rig) -> None:
    async with rig.lab() as lab:
        first = await lab.publish()
        reader = await lab.reader(free=10)
        await reader.settle(await reader.take_one())
        await rig.restart_server()
        second = await publish_until_taken(lab, "task.assigned", "tasks")
        await eventually(
            lambda: second.body in [d.body for d in reader.seen], within=30, what="an event after the restart"
        )
        assert first.body != second.body


async def test_an_outage_is_told_and_its_end_too(rig: Rig) -> None:
    async with rig.lab() as lab:
        reader = await lab.reader(free=10)
        async with rig.server_down():
            await eventually(lambda: reader.troubles and reader.troubles[-1], what="trouble")
        await eventually(lambda: reader.troubles[-1] is None, what="the end of the trouble")


async def test_what_was_confirmed_outlives_the_broker(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(50)
        await rig.restart_server()
        reader = await lab.reader(free=50)
        taken = await reader.take(50)
        assert {d.body for d in taken} == {message.body for message in sent}


async def test_what_was_in_flight_can_still_be_settled_after_a_restart(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await rig.restart_server()
        output = lab.message("agent.completed", channel="events")
        try:
            await reader.settle(delivery, output)
        except BrokerError:  # revoked meanwhile: then it has to come again
            reader.demand(1)
            await reader.settle(await reader.take_one(), output)
        await took_effect_once(lab, output)


async def test_a_settlement_asked_for_during_the_outage_takes_effect(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        output = lab.message("agent.completed", channel="events")
        async with rig.server_down():
            settling = asyncio.ensure_future(reader.settle(delivery, output))
            await asyncio.sleep(0)
        try:
            await settling
        except BrokerError:
            reader.demand(1)
            await reader.settle(await reader.take_one(), output)
        await took_effect_once(lab, output)


async def took_effect_once(lab: Lab, output: Outgoing) -> None:
    """For a reader; where the broker knows ids at publish, in the channel too."""
    if lab.rig.capabilities.publish_dedup:
        assert [event.body for event in await lab.stored("events")] == [output.body]
    auditor = await lab.reader("auditor", free=5)
    assert (await auditor.take_one()).body == output.body
    last = await lab.publish("agent.last", channel="events")
    assert (await auditor.take_one()).body == last.body


async def test_dedup_outlives_the_broker(rig: Rig) -> None:
    if not rig.capabilities.publish_dedup:
        pytest.skip("capability publish_dedup")
    async with rig.lab() as lab:
        message = await lab.publish("agent.completed", channel="events")
        await rig.restart_server()
        await lab.send(message)
        assert len(await lab.stored("events")) == 1


async def test_a_deleted_subscription_is_healed_and_said_aloud(rig: Rig) -> None:
    if rig.driver.undeletable:
        pytest.skip(rig.driver.undeletable)
    async with rig.lab() as lab:
        reader = await lab.reader(free=100)
        await lab.publish()
        await reader.settle(await reader.take_one())
        await rig.driver.outside_delete_subscription(lab.channel("tasks"), lab.subscription("worker"))
        await eventually(lambda: spoke(reader), what="trouble or an alarm")
        message = await publish_until_taken(lab, "task.assigned", "tasks")
        await eventually(lambda: message.body in [d.body for d in reader.seen], what="an event after healing")
        await eventually(lambda: not reader.troubles or reader.troubles[-1] is None, what="no trouble any more")
        assert reader.alarms


async def test_a_deleted_channel_is_healed_and_said_aloud(rig: Rig) -> None:
    async with rig.lab() as lab:
        reader = await lab.reader("auditor", free=100)
        await lab.publish("agent.started", channel="events")
        await reader.settle(await reader.take_one())
        await rig.driver.outside_delete(lab.channel("events").address)
        await eventually(lambda: spoke(reader), what="trouble or an alarm")
        message = await publish_until_taken(lab, "agent.completed", "events")
        await eventually(lambda: message.body in [d.body for d in reader.seen], what="an event after healing")
        assert reader.alarms


async def test_the_history_outlives_the_broker(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        await reader.retry(await reader.take_one(), History(attempts=2), 0)
        await reader.consumer.close()
        await rig.restart_server()
        other = await lab.reader(free=1, slot="worker.0")
        assert (await other.take_one()).history.attempts == 2
