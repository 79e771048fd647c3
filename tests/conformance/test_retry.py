"""Waiting for the next attempt: on time, with its history, and in nobody's way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.brokers.base import FRESH, History
from tests.patience import PATIENCE

from .rig import Lab, Rig, eventually, finished, outcome

#: What an earlier attempt could have left; every field differs from a fresh one.
FAILED = History(
    attempts=2,
    strikes=1,
    alone=True,
    open=True,
    first_failed_at=1_700_000_000.25,
    last_failed_at=1_700_000_100.5,
    error="ValueError: zwölf ✓ is not a number",
)

#: A broker's clock and a poll may be so much off; a busy machine may be later, but not as late as a lease's end.
EARLY, LATE = 0.15, 20.0


@pytest.mark.parametrize("delay", [0.0, 0.05, 1.0, 2.5])
async def test_a_retry_comes_when_it_is_due(rig: Rig, stopwatch: Callable[[], float], delay: float) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2)
        delivery = await reader.take_one()
        begin = stopwatch()
        await reader.retry(delivery, FAILED, delay)
        again = await reader.take_one()
        assert delay - EARLY <= stopwatch() - begin < delay + LATE
        assert again.body == delivery.body


async def test_a_retry_brings_its_whole_history(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2)
        await reader.retry(await reader.take_one(), FAILED, 0)
        again = await reader.take_one()
        assert replace(again.history, not_before=0.0) == FAILED
        assert not again.redelivered  # the history accounts for that run


async def test_each_retry_replaces_the_history(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        for attempt in range(5):
            delivery = await reader.take_one()
            assert delivery.history.attempts == attempt
            await reader.retry(delivery, History(attempts=attempt + 1), 0)
            reader.demand(1)


async def test_retries_come_in_the_order_of_their_times(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=6)
        a, b, c = await reader.take(3)
        now = time.time()
        for delivery, due in ((a, now + 7), (b, now + 3), (c, now + 5)):
            await reader.retry(delivery, FAILED, due - time.time())
        assert [d.body for d in await reader.take(3)] == [b.body, c.body, a.body]


async def test_a_waiting_retry_holds_no_slot_and_blocks_no_neighbour(rig: Rig) -> None:
    async with rig.lab() as lab:
        first = await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await reader.retry(delivery, FAILED, 600)
        for message in await lab.publish_many(5):
            reader.demand(1)
            neighbour = await reader.take_one()
            assert neighbour.body == message.body
            await reader.settle(neighbour)
        assert [d.body for d in reader.seen].count(first.body) == 1
        lag = await lab.lag()
        assert lag.delayed in (1, -1)


@pytest.mark.slow
async def test_ten_thousand_waiting_retries_block_nobody_and_all_return(
    rig: Rig, stopwatch: Callable[[], float]
) -> None:
    count = 10_000
    async with rig.lab() as lab:
        await lab.publish_many(count)
        reader = await lab.reader(free=count)
        deliveries = await reader.take(count)
        due = time.time() + 10 + 2 * stopwatch()  # so long that this machine gets all of them to wait before
        futures = []
        for delivery in deliveries:
            done, future = outcome()
            reader.consumer.retry(delivery, replace(FAILED, not_before=due), due - time.time(), done)
            futures.append(future)
        for future in futures:
            await finished(future)
        reader.demand(count)
        fresh = await lab.publish()
        neighbour = await reader.take_one()
        assert neighbour.body == fresh.body
        assert time.time() < due, "too slow to show that the neighbour overtook"
        await reader.settle(neighbour)
        reader.demand(count)
        returned = await reader.take(count, within=due - time.time() + 2 * PATIENCE)
        assert len({d.position for d in returned}) == count
        assert {d.history.attempts for d in returned} == {FAILED.attempts}
        await reader.settle_all(returned)


async def test_a_retry_outlives_the_worker_that_asked_for_it(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        await reader.retry(await reader.take_one(), FAILED, 1.5)
        await reader.consumer.close()
        other = await lab.reader(free=1, slot="worker.0")
        again = await other.take_one()
        assert (again.body, again.history.attempts) == (sent.body, FAILED.attempts)


async def test_a_retry_outlives_the_broker_and_is_not_early(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2)
        delivery = await reader.take_one()
        due = time.time() + 6
        await reader.retry(delivery, FAILED, 6)
        await rig.restart_server()
        again = await reader.take_one()
        assert time.time() > due - EARLY
        assert again.history.attempts == FAILED.attempts


async def test_a_retry_is_not_swallowed_by_dedup(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        reader = await lab.reader(free=1)
        for _ in range(3):
            delivery = await reader.take_one()
            assert delivery.body == sent.body
            await reader.retry(delivery, FAILED, 0.1)
            reader.demand(1)
        await reader.settle(await reader.take_one())


async def test_only_the_subscription_that_failed_is_retried(rig: Rig) -> None:
    async with rig.lab() as lab:
        first = await lab.publish("agent.started", channel="events")
        auditor, watcher = await lab.reader("auditor", free=2), await lab.reader("watcher", free=2)
        await watcher.settle(await watcher.take_one())
        await auditor.retry(await auditor.take_one(), FAILED, 0.2)
        assert (await auditor.take_one()).body == first.body
        last = await lab.publish("agent.completed", channel="events")
        assert (await watcher.take_one()).body == last.body


async def test_a_history_marked_before_the_run_is_kept(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        delivery = await reader.take_one()
        await reader.mark(delivery, History(attempts=1, open=True))
        await reader.consumer.close()
        again = await (await lab.reader(free=1, slot="worker.0")).take_one()
        assert (again.history.attempts, again.history.open) == (1, True)


async def test_a_marked_event_can_still_be_settled(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2)
        delivery = await reader.take_one()
        await reader.mark(delivery, History(open=True))
        await reader.settle(delivery)
        await eventually(lambda: nothing_left(lab), what="a lag of nothing")


async def nothing_left(lab: Lab) -> bool:
    lag = await lab.lag()
    return bool(lag.waiting == lag.in_flight == lag.delayed == 0)


async def test_a_settled_events_history_is_forgotten(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish()
        reader = await lab.reader(free=3)
        await reader.retry(await reader.take_one(), FAILED, 0)
        await reader.settle(await reader.take_one())
        await lab.connection.redrive(lab.subscription("worker"), message)
        assert (await reader.take_one()).history == FRESH
