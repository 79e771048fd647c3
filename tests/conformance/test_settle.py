"""The end of an attempt: settled with its outputs, refused, given back; never before its outputs are safe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from orchestrator.brokers.base import FRESH, Outgoing
from orchestrator.errors import PublishRejected
from orchestrator.topology.model import Overflow, Retention

from .rig import Lab, Reader, Rig, elapse, eventually


async def reopened(lab: Lab, reader: Reader, *, free: int) -> Reader:
    """The next worker in the same slot, after this one has ended in order."""
    await reader.consumer.close()
    return await lab.reader(free=free, slot="worker.0")


async def nothing_but_fresh(lab: Lab, reader: Reader) -> bool:
    """Whether a fresh event is all that arrives."""
    last = await lab.publish()
    first = await reader.take_one()
    await elapse(0.5)
    return first.body == last.body and len(reader.seen) == 1


async def test_a_settled_event_never_comes_again(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=3, slot="worker.0")
        await reader.settle_all(await reader.take(3))
        again = await reopened(lab, reader, free=10)
        assert await nothing_but_fresh(lab, again)


async def test_a_settled_event_leaves_the_queue(rig: Rig) -> None:
    if not rig.capabilities.frees_on_settle:
        pytest.skip("capability frees_on_settle: retention gives the space back here")
    async with rig.lab() as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=3)
        await reader.settle_all(await reader.take(3))
        await eventually(lambda: empty(lab), what="an empty queue")


async def empty(lab: Lab) -> bool:
    return await lab.connection.count(lab.channel("tasks")) == 0


async def test_a_settled_event_stays_in_a_log(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.completed", channel="events")
        reader = await lab.reader("auditor", free=1)
        await reader.settle(await reader.take_one())
        assert await lab.connection.count(lab.channel("events")) == 1


async def test_events_settled_out_of_order_leave_exactly_the_others(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(5)
        reader = await lab.reader(free=5, slot="worker.0")
        deliveries = await reader.take(5)
        for index in (4, 2, 0):
            await reader.settle(deliveries[index])
        again = await reopened(lab, reader, free=5)
        last = await lab.publish()
        assert {d.body for d in await again.take(3)} == {sent[1].body, sent[3].body, last.body}
        await elapse(0.5)
        assert len(again.seen) == 3


async def test_outputs_are_published_with_the_settlement(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        outputs = [lab.message("agent.started", channel="events"), lab.message("agent.completed", channel="events")]
        await reader.settle(await reader.take_one(), *outputs)
        assert [event.body for event in await lab.stored("events")] == [message.body for message in outputs]


async def test_outputs_may_go_to_several_channels(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2)
        follow, report = lab.message("task.next"), lab.message("agent.completed", channel="events")
        await reader.settle(await reader.take_one(), follow, report)
        assert (await reader.take_one()).body == follow.body
        assert [event.body for event in await lab.stored("events")] == [report.body]


@asynccontextmanager
async def refusal(rig: Rig) -> AsyncIterator[tuple[Lab, Outgoing]]:
    """A lab, and an output that its broker refuses: too large, or for a channel that is full."""
    if rig.driver.too_large is not None:
        async with rig.lab() as lab:
            yield lab, lab.message("agent.completed", channel="events", body=b"x" * rig.driver.too_large)
        return
    full = {"retention": Retention(max_events=1), "overflow": Overflow.REJECT}
    async with rig.lab(events=full) as lab:
        await lab.publish("agent.completed", channel="events")
        yield lab, lab.message("agent.completed", channel="events")


async def test_an_output_that_is_refused_leaves_the_event_unsettled(rig: Rig) -> None:
    async with refusal(rig) as (lab, refused):
        sent = await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        delivery = await reader.take_one()
        with pytest.raises(PublishRejected):
            await reader.settle(delivery, refused)
        again = await reopened(lab, reader, free=1)
        assert (await again.take_one()).body == sent.body


async def test_after_a_refusal_the_same_delivery_can_still_be_retried(rig: Rig) -> None:
    async with refusal(rig) as (lab, refused):
        await lab.publish()
        reader = await lab.reader(free=2)
        delivery = await reader.take_one()
        with pytest.raises(PublishRejected):
            await reader.settle(delivery, refused)
        await reader.retry(delivery, replace(FRESH, attempts=1), 0)
        assert (await reader.take_one()).history.attempts == 1


async def test_an_output_that_was_sent_before_the_crash_takes_effect_once(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        output = lab.message("agent.completed", channel="events")
        await lab.send(output)  # the attempt that was killed before it settled had got so far
        await reader.settle(await reader.take_one(), output)
        if rig.capabilities.publish_dedup:
            assert len(await lab.stored("events")) == 1
        auditor = await lab.reader("auditor", free=5)
        assert (await auditor.take_one()).body == output.body
        other = await lab.publish("agent.started", channel="events")
        assert (await auditor.take_one()).body == other.body


async def test_a_thousand_settlements_at_once_are_all_answered(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(1000)
        reader = await lab.reader(free=1000)
        await reader.settle_all(await reader.take(1000))
        await eventually(lambda: nothing_left(lab), what="a lag of nothing")


async def nothing_left(lab: Lab) -> bool:
    lag = await lab.lag()
    return bool(lag.waiting == lag.in_flight == lag.delayed == 0)


async def test_what_is_released_comes_to_another_at_once_and_uncounted(rig: Rig, lasting_lease: None) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(2)
        reader = await lab.reader(free=2, slot="worker.0")
        deliveries = await reader.take(2)
        await reader.consumer.drain()
        reader.consumer.release(deliveries)
        await reader.consumer.close()
        other = await lab.reader(free=2, slot="worker.0")
        again = await other.take(2)
        assert {d.body for d in again} == {message.body for message in sent}
        assert {d.history for d in again} == {FRESH}


async def test_a_drained_consumer_takes_nothing_new_and_still_settles(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=5)
        delivery = await reader.take_one()
        await reader.consumer.drain()
        await lab.publish_many(3)
        await reader.settle(delivery)
        other = await lab.reader(free=5)
        if rig.driver.exclusive:  # what it read moves when it has left
            await reader.consumer.close()
        assert len(await other.take(3)) == 3
        assert len(reader.seen) == 1


async def test_what_is_unsettled_at_close_is_given_back_at_once(rig: Rig, lasting_lease: None) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        await reader.take_one()
        await reader.consumer.close()
        other = await lab.reader(free=1, slot="worker.0")
        assert (await other.take_one()).body == sent.body


async def test_settlements_are_not_lost_by_closing(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(20)
        reader = await lab.reader(free=20, slot="worker.0")
        deliveries = await reader.take(20)
        settling = asyncio.ensure_future(reader.settle_all(deliveries))
        await asyncio.sleep(0)
        await settling
        again = await reopened(lab, reader, free=20)
        assert await nothing_but_fresh(lab, again)
