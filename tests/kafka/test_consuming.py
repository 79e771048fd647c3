"""How the consumer keeps its promises: watermark and metadata, moving by transaction, hand-over, fencing, losses."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient

from orchestrator.brokers.base import FRESH, Ended, History, Left
from orchestrator.brokers.kafka.client import retry_topic
from orchestrator.brokers.kafka.ledger import backlog
from orchestrator.errors import BrokerUnavailable, PublishRejected
from tests.conformance.rig import Lab, Reader, Rig, eventually, finished, outcome
from tests.patience import PATIENCE

FAILED = History(attempts=1, error="ValueError: no")


def admin(rig: Rig) -> AdminClient:
    return AdminClient({"bootstrap.servers": rig.driver.url.removeprefix("kafka://")})


async def commits(lab: Lab, topic: str) -> dict[int, TopicPartition]:
    """What the group has committed in `topic`, as any Kafka tool sees it."""
    group = lab.subscription("worker").group
    client = admin(lab.rig)  # it has to outlive the future
    future = client.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group]
    found = (await asyncio.wrap_future(future)).topic_partitions
    return {tp.partition: tp for tp in found if tp.topic == topic}


async def stands(lab: Lab, offset: int, edge: int, holes: int) -> bool:
    """Whether the group has committed that: an event counts as settled a few milliseconds before."""
    commit = (await commits(lab, lab.channel("tasks").address)).get(0)
    return commit is not None and (commit.offset, *backlog(commit.metadata or "")[:2]) == (offset, edge, holes)


async def test_the_watermark_is_contiguous_and_what_is_done_above_it_is_in_the_metadata(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(4)
        reader = await lab.reader(free=4)
        first, second, third, fourth = await reader.take(4)
        await reader.settle(second)
        await reader.settle(fourth)
        await eventually(lambda: stands(lab, 0, 4, 2), what="a commit with holes")
        await reader.settle(first)
        await reader.settle(third)
        await eventually(lambda: stands(lab, 4, 0, 0), what="a commit of all")


async def test_a_marked_event_is_done_when_no_commit_says_any_more_that_it_was_started(rig: Rig) -> None:
    """A neighbour that ends the process in between would have it blamed."""
    async with rig.lab() as lab:
        await lab.publish_many(1)
        reader = await lab.reader(free=1)
        (delivery,) = await reader.take(1)
        await reader.mark(delivery, History(open=True))
        before = (await commits(lab, lab.channel("tasks").address))[0]
        assert '"open":true' in (before.metadata or "")
        await reader.settle(delivery)
        after = (await commits(lab, lab.channel("tasks").address))[0]
        assert (after.offset, "open" in (after.metadata or "")) == (1, False)


async def test_the_successor_of_a_killed_worker_skips_what_was_done(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(5)
        victim = await lab.victim(free=5, slot="worker.0")
        held = await victim.take(5)
        for index in (1, 3):
            assert await victim.settle(held[index].position) == ""
        await eventually(lambda: stands(lab, 0, 5, 3), what="the commit of what was settled")
        await victim.kill()
        begin = time.monotonic()
        reader = await lab.reader(free=5, slot="worker.0")
        assert {d.body for d in await reader.take(3)} == {sent[0].body, sent[2].body, sent[4].body}
        assert time.monotonic() - begin < 5, "a worker started again in its slot need not wait for its session to end"


async def test_a_killed_handler_is_counted_from_the_journal_and_its_neighbours_are_suspects(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3)
        victim = await lab.victim(free=2, slot="worker.0")
        running = await victim.take(2)
        await victim.kill()

        def on_crash(history: History, ended: Ended) -> History:
            return replace(history, strikes=history.strikes + 1, alone=True)

        reader = await lab.reader(slot="worker.0", on_crash=on_crash)
        await reader.consumer.recover([Left(held.token, Ended.STARTED) for held in running])
        reader.demand(3)
        found = {d.position: d for d in await reader.take(3)}
        assert [found[held.position].history.strikes for held in running] == [1, 1]
        assert {d.redelivered for d in found.values()} == {False}  # the journal accounts for all
        assert sorted(d.history.strikes for d in found.values()) == [0, 1, 1]


async def test_what_recover_has_stored_survives_the_next_crash(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        token = b""
        for attempt in range(3):
            victim = await lab.victim(free=1, slot="worker.0")
            (held,) = await victim.take(1)
            await victim.kill()
            token = held.token
            reader = await lab.reader(
                slot="worker.0", on_crash=lambda history, _: replace(history, attempts=history.attempts + 1)
            )
            await reader.consumer.recover([Left(token, Ended.STARTED_ALONE)])
            reader.demand(1)
            assert (await reader.take_one()).history.attempts == attempt + 1
            await reader.consumer.close()


async def test_a_crashed_retry_keeps_the_history_of_its_record(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2, slot="worker.0")
        await reader.retry(await reader.take_one(), FAILED, 0)
        token = (await reader.take_one()).token
        await reader.consumer.close()
        again = await lab.reader(slot="worker.0", on_crash=lambda h, _: replace(h, attempts=h.attempts + 1))
        await again.consumer.recover([Left(token, Ended.STARTED_ALONE)])
        again.demand(1)
        assert (await again.take_one()).history.attempts == 2


async def test_after_another_hosts_unclean_end_events_are_called_redelivered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        victim = await lab.victim(free=1, slot="worker.0")
        await victim.take(1)
        await victim.kill()
        monkeypatch.setattr("socket.gethostname", lambda: "host-b")
        reader = await lab.reader(free=1, slot="worker.0")
        delivery = await reader.take_one(within=20)
        assert delivery.redelivered
        await reader.mark(delivery, History(open=True))
        await reader.consumer.close()
        again = await lab.reader(free=1, slot="worker.1")
        delivery = await again.take_one()
        assert (delivery.history.open, delivery.redelivered) == (True, False)


async def test_a_retry_and_its_offset_move_in_one_transaction(rig: Rig) -> None:
    """A reader of both topics with read_committed never finds an event twice, nor finds it missing."""
    async with rig.lab() as lab:
        await lab.publish_many(20)
        reader = await lab.reader(free=20)
        for delivery in await reader.take(20):
            await reader.retry(delivery, FAILED, 60)
            done = (await commits(lab, lab.channel("tasks").address))[0].offset
            lag = await lab.lag()
            assert (lag.delayed + lag.in_flight + lag.waiting, lag.delayed) == (20, done)


async def test_a_letter_that_is_too_large_is_refused_and_its_neighbours_are_moved(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=3)
        deliveries = await reader.take(3)
        huge = replace(lab.letter(deliveries[1]), body=b"x" * 2_000_000)
        futures = []
        for delivery, letter in zip(
            deliveries, (lab.letter(deliveries[0]), huge, lab.letter(deliveries[2])), strict=True
        ):
            done, future = outcome()
            reader.consumer.settle(delivery, [letter], done)
            futures.append(future)
        with pytest.raises(PublishRejected):
            await finished(futures[1])
        await finished(futures[0])
        await finished(futures[2])
        assert {one.body for one in await lab.letters()} == {deliveries[0].body, deliveries[2].body}
        await reader.settle(deliveries[1], lab.letter(deliveries[1]))
        assert len(await lab.letters()) == 3


async def test_partitions_are_shared_and_a_running_handler_keeps_its_own(rig: Rig) -> None:
    async with rig.lab(tasks={"partitions": 4}) as lab:
        first = await lab.reader(free=100)
        await lab.send(*(lab.message(key=str(number)) for number in range(40)))
        running = await first.take(40)
        busy = {d.position.split(":")[1] for d in running}
        assert busy == {"0", "1", "2", "3"}
        second = await lab.reader(free=100)
        await lab.send(*(lab.message(key=str(number)) for number in range(40)))
        assert first.lost == [], "what runs may end before its partition is handed over"
        await first.settle_all(running)
        first.demand(100)
        await eventually(lambda: len(first.seen) + len(second.seen) == 80, what="all events, each once")
        assert second.seen
        bodies = [d.body for d in (*first.seen, *second.seen)]
        assert len(set(bodies)) == 80


async def test_the_partitions_of_a_killed_worker_move_within_the_lease(rig: Rig) -> None:
    async with rig.lab(tasks={"partitions": 2}) as lab:
        victim = await lab.victim(free=10, slot="worker.0")
        reader = await lab.reader(free=100, slot="worker.1")
        await eventually(lambda: len(assigned(reader)) == 1, what="a shared group")
        await victim.kill()
        begin = time.monotonic()
        await lab.send(*(lab.message(key=str(number)) for number in range(20)))
        await reader.take(20, within=20)
        assert time.monotonic() - begin < rig.capabilities.lease + 4


def assigned(reader: Reader) -> list[object]:
    thread = reader.consumer._thread  # type: ignore[attr-defined]
    return [key for key in thread._positions.books if ".retry." not in key[0]]


async def test_a_zombie_that_wakes_up_is_fenced_and_settles_nothing(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        victim = await lab.victim(free=1, slot="worker.0")
        (held,) = await victim.take(1)
        await victim.freeze()
        reader = await lab.reader(free=1, slot="worker.0")  # the successor in its slot
        delivery = await reader.take_one(within=20)
        assert delivery.body == sent.body
        await victim.thaw()
        await victim.settle(held.position)  # chance decides whether it knows by then that the place is another's
        with pytest.raises(AssertionError, match="BrokerUnavailable"):  # a mark is told only after a commit
            await victim.mark(held.position, History(open=True))
        await eventually(lambda: stands(lab, 0, 1, 1), what="a commit that leaves it open")
        await reader.settle(delivery)
        await eventually(lambda: stands(lab, 1, 0, 0), what="the successor's commit")


async def test_a_handler_may_run_longer_than_max_poll_interval(rig: Rig) -> None:
    async with rig.lab() as lab:
        lab.broker = replace(lab.broker, client={"max.poll.interval.ms": 6_500})
        lab.topology = replace(lab.topology, brokers={"main": lab.broker})
        connection = await lab.connect()
        await lab.publish()
        reader = await lab.reader(free=1, connection=connection)
        delivery = await reader.take_one()
        await asyncio.sleep(8)  # the handler's own time
        await reader.settle(delivery)
        assert (reader.lost, len(reader.seen)) == ([], 1)


async def test_unread_events_that_were_trimmed_are_an_alarm_and_are_counted(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(10)
        place = TopicPartition(lab.channel("tasks").address, 0, 4)
        outside = admin(rig)
        await asyncio.wrap_future(outside.delete_records([place])[place])
        reader = await lab.reader(free=10)
        assert len(await reader.take(6)) == 6
        assert any("4 unread events were trimmed" in alarm for alarm in reader.alarms)
        await reader.settle_all(reader.seen)
        await eventually(lambda: counted(lab), what="four that were lost")


async def counted(lab: Lab) -> bool:
    return (await lab.lag()).unread_lost == 4


async def test_a_partition_that_is_added_is_read_from_its_beginning(rig: Rig) -> None:
    async with rig.lab(worker={"start": "latest"}) as lab:
        reader = await lab.reader(free=100)
        tasks = replace(lab.channel("tasks"), partitions=4)
        grown = replace(lab.topology, channels={**lab.topology.channels, "tasks": tasks})
        connection = await lab.connect(grown)
        desired = next(d for d in lab.desired(grown) if d.id.name == tasks.address)
        (observed,) = [o for o in await connection.observe([desired]) if o.id == desired.id]
        await connection.update(desired, observed)
        await lab.send(*(lab.message(key=str(number)) for number in range(40)), producer=connection.producer())
        await reader.take(40, within=20)
        assert reader.alarms == []


async def test_the_same_event_id_takes_effect_once_at_a_subscription(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish()
        await lab.send(message, message)
        last = await lab.publish()
        reader = await lab.reader(free=10)
        assert [d.body for d in await reader.take(2)] == [message.body, last.body]
        await reader.settle_all(reader.seen)
        await eventually(lambda: stands(lab, 4, 0, 0), what="the repeated ones to be passed over")


async def test_a_redrive_passes_the_inbox(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish()
        reader = await lab.reader(free=5)
        await reader.settle(await reader.take_one())
        await lab.connection.redrive(lab.subscription("worker"), message)
        again = await reader.take_one()
        assert (again.body, again.history) == (message.body, FRESH)


async def test_finished_retries_leave_their_topic(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.brokers.kafka.reader.SWEEP", 5)
    async with rig.lab() as lab:
        await lab.publish_many(10)
        reader = await lab.reader(free=30)
        for delivery in await reader.take(10):
            await reader.retry(delivery, FAILED, 0)
        await reader.settle_all(await reader.take(10))
        retry = retry_topic(lab.subscription("worker"))
        look = Consumer({"bootstrap.servers": rig.driver.url.removeprefix("kafka://"), "group.id": "look"})

        def swept() -> bool:
            return bool(look.get_watermark_offsets(TopicPartition(retry, 0), timeout=5)[0] >= 10)

        await eventually(swept, what="an empty retry topic")
        look.close()


async def test_retries_whose_bodies_were_dropped_are_fetched_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.brokers.kafka.intake.BODIES", 1000)
    async with rig.lab() as lab:
        sent = await lab.publish_many(30)
        reader = await lab.reader(free=60)
        for index, delivery in enumerate(await reader.take(30)):
            await reader.retry(delivery, FAILED, 1 + (index * 7 % 30) / 15)
        assert {d.body for d in await reader.take(30)} == {message.body for message in sent}
        assert len(reader.seen) == 60


async def test_the_token_names_the_place_and_the_history(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2)
        await reader.retry(await reader.take_one(), replace(FAILED, error="x" * 500), 0)
        delivery = await reader.take_one()
        assert len(delivery.token) <= 400
        topic, number, offset, history = json.loads(delivery.token)
        assert (topic, number) == (retry_topic(lab.subscription("worker")), 0)
        assert History.decode(history.encode()).attempts == 1
        assert offset == 0


async def test_settling_after_close_says_so(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await reader.consumer.close()
        with pytest.raises(BrokerUnavailable):
            await reader.settle(delivery)


async def test_an_event_of_the_largest_size_can_still_be_retried(rig: Rig) -> None:
    async with rig.lab() as lab:
        body = b"x" * 1_048_000
        await rig.driver.outside_publish(lab.topology, lab.channel("tasks"), "task.assigned", body, {})
        reader = await lab.reader(free=2)
        await reader.retry(await reader.take_one(), replace(FAILED, error="y" * 2000), 0)
        again = await reader.take_one()
        assert (again.body, again.history.error) == (body, "y" * 2000)


async def test_what_lies_ready_but_was_never_asked_for_goes_to_the_other_replica(rig: Rig) -> None:
    async with rig.lab(tasks={"partitions": 2}) as lab:
        first = await lab.reader(free=1)
        await lab.send(*(lab.message(key=str(number)) for number in range(40)))
        running = await first.take_one()
        assert (await lab.lag()).in_flight in (0, 1)  # as of the last commit
        await eventually(lambda: lag_is(lab, 39, 1), what="one in flight and no more")
        second = await lab.reader(free=100)
        await first.settle(running)
        await eventually(lambda: len(second.seen) >= 10, what="the other partition's events")
        assert first.lost == []
        first.demand(100)
        await eventually(lambda: len(first.seen) + len(second.seen) == 40, what="all events, each once")


async def lag_is(lab: Lab, waiting: int, in_flight: int) -> bool:
    lag = await lab.lag()
    return (lag.waiting, lag.in_flight) == (waiting, in_flight)


async def test_lag_tells_what_runs_of_what_had_lain_ready(rig: Rig) -> None:
    """However long the handler takes, and though nothing else gives cause for a commit."""
    async with rig.lab() as lab:
        reader = await lab.reader()
        reader.demand(0)
        await lab.send(lab.message())
        consumer: Any = reader.consumer
        await eventually(lambda: consumer._stock, what="it lies ready")
        books = consumer._reader._positions.books.values()
        await eventually(lambda: not any(book.dirty or book.ahead for book in books), what="all of that is committed")
        assert (await lab.lag()).in_flight == 0
        reader.demand(1)
        await eventually(lambda: lag_is(lab, 0, 1), what="one in flight")


async def test_cancelling_in_the_moment_when_it_joins_is_not_forgotten(rig: Rig) -> None:
    """Whoever waits for the task would hang."""
    async with rig.lab() as lab:
        consumer: Any = (await lab.reader()).consumer
        consumer._assigned.clear()
        task = asyncio.create_task(consumer._has_joined(PATIENCE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        consumer._assigned.set()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
