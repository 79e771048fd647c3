"""An event in: delivered once, settled, retried with its history, recovered from a dead worker."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import replace
from typing import Any

import nats
import pytest

from orchestrator.brokers.base import Ended, History, Left
from orchestrator.brokers.nats.client import Raw
from orchestrator.brokers.nats.resources import ACK_WAIT, safe
from orchestrator.errors import BrokerUnavailable, PublishRejected
from tests.nats.rig import Rig, finished, rig, until
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer


async def short_lease(made: Rig, seconds: float, agent: str = "research") -> None:
    """Changes ack_wait by hand, so that a test need not wait half a minute."""
    subscription = made.subscription(agent)
    stream = safe(made.channel(subscription.channel).address)
    durable = safe(subscription.group)
    link = made.connection.link
    config = (await link.api(f"CONSUMER.INFO.{stream}.{durable}"))["config"]
    body = {"stream_name": stream, "config": {**config, "ack_wait": int(seconds * 1e9)}, "action": "update"}
    await link.api(f"CONSUMER.CREATE.{stream}.{durable}", body)


async def test_settled_event_is_gone_and_its_outputs_are_stored(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        message = made.event(headers={"traceparent": "00-1"})
        await made.publish(message)
        consumer.demand(8)
        (got,) = await sink.take()
        assert (got.body, got.event_type, got.channel) == (message.body, "task.assigned", "tasks")
        assert got.headers == {"correlation-id": message.correlation_id, "traceparent": "00-1"}
        assert got.position == f"{safe(message.channel.address)}:1"
        assert not got.redelivered
        assert got.history == History()
        await finished(consumer.settle, got, [made.event("agent.started", "events")])
        assert await made.connection.count(made.channel("events")) == 1
        counts = [1]

        async def count() -> None:
            counts[0] = await made.connection.count(made.channel("tasks"))

        while counts[0]:
            await count()
        await consumer.close()


async def test_no_more_is_fetched_than_there_are_free_slots(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        first, sink = await made.consumer()
        second, other = await made.consumer(slot="research.1")
        await made.publish(*(made.event() for _ in range(10)))
        first.demand(3)
        await sink.take(3)
        second.demand(10)
        assert len(await other.take(7)) == 7
        assert not sink.deliveries
        await first.close()
        await second.close()


async def test_event_that_comes_when_the_slots_are_gone_goes_to_another_replica(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        busy, sink = await made.consumer()
        busy.demand(4)
        await asyncio.sleep(0)  # the request leaves with this turn
        await until(lambda: busy._main.requested == 4, "the request was sent")
        busy.demand(0)
        await made.publish(made.event())
        idle, other = await made.consumer(slot="research.1")
        idle.demand(1)
        (got,) = await other.take()
        assert not got.redelivered, "it went to the busy one first"
        assert not sink.deliveries
        await busy.close()
        await idle.close()


async def test_retry_keeps_the_history_and_holds_nobody_up(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        await made.publish(made.event(), made.event())
        consumer.demand(2)
        failed, other = await sink.take(2)
        due = time.time() + 3
        history = History(attempts=1, error="ValueError: no", not_before=due)
        await finished(consumer.retry, failed, history, 3.0)
        await finished(consumer.settle, other, [])
        consumer.demand(2)
        await made.publish(made.event())
        (neighbour,) = await sink.take()
        assert neighbour.position != failed.position
        (again,) = await sink.take()
        assert time.time() > due - 0.1
        assert again.position == failed.position
        assert again.history == history
        assert not again.redelivered
        await finished(consumer.settle, again, [])
        await forgotten(made)
        await consumer.close()


async def forgotten(made: Rig) -> None:
    """Waits until no history is stored."""
    end = time.monotonic() + PATIENCE
    while (await made.connection.link.api(f"STREAM.INFO.{made.connection.names.state}"))["state"]["messages"]:
        assert time.monotonic() < end, "the history was not forgotten"
        await asyncio.sleep(0.01)


async def test_released_event_comes_back_at_once_and_uncounted(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        await made.publish(made.event())
        consumer.demand(1)
        (got,) = await sink.take()
        consumer.release([got])
        consumer.demand(1)
        (again,) = await sink.take(seconds=ACK_WAIT / 2)
        assert again.position == got.position
        assert again.history.attempts == 0
        assert not again.redelivered
        await consumer.close()


async def test_successor_takes_over_what_a_dead_worker_left(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        dead, sink = await made.consumer()
        await made.publish(*(made.event() for _ in range(3)))
        dead.demand(3)
        first, second, settled = await sink.take(3)
        await finished(dead.settle, settled, [])
        await dead.drain()  # it is not closed: a killed process gives nothing back
        heir, found = await made.consumer()
        began = time.monotonic()
        await heir.recover(
            [
                Left(first.token, Ended.STARTED),
                Left(second.token, Ended.RETURNED),
                Left(settled.token, Ended.STARTED),
                Left(b"nonsense", Ended.STARTED),
            ]
        )
        heir.demand(8)
        by_position = {d.position: d for d in await found.take(2)}
        assert time.monotonic() - began < ACK_WAIT / 2
        assert found.crashes == [(History(), Ended.STARTED), (History(), Ended.RETURNED)]
        assert by_position[first.position].history == History(attempts=1, error="crashed")
        assert by_position[second.position].history == History()
        assert not any(d.redelivered for d in by_position.values())
        await asyncio.sleep(0.1)
        assert not found.deliveries
        await heir.close()
        await dead.close()


async def test_recovering_that_the_broker_interrupts_counts_each_crash_once(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(nats_server.url) as made:
        dead, sink = await made.consumer()
        await made.publish(*(made.event() for _ in range(3)))
        dead.demand(3)
        left = [Left(d.token, Ended.STARTED) for d in await sink.take(3)]
        await dead.drain()
        heir, found = await made.consumer()
        read, asked = made.connection.link.message, itertools.count()

        async def silent_at_the_last(stream: str, ask: dict[str, Any]) -> Raw | None:
            if stream == made.connection.names.state and next(asked) == len(left) - 1:
                raise BrokerUnavailable("no answer")
            return await read(stream, ask)

        monkeypatch.setattr(made.connection.link, "message", silent_at_the_last)
        with pytest.raises(BrokerUnavailable):
            await heir.recover(left)
        await heir.close()
        heir, found = await made.consumer()
        await heir.recover(left)
        heir.demand(8)
        assert [d.history.attempts for d in await found.take(3)] == [1, 1, 1]
        await heir.close()
        await dead.close()


async def test_lost_host_is_seen_as_redelivered_until_marked(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        await short_lease(made, 1.0)
        lost, sink = await made.consumer()
        await made.publish(made.event())
        lost.demand(1)
        (got,) = await sink.take()
        del lost._main.held[got.key]  # type: ignore[attr-defined]  # it extends no lease any more
        heir, found = await made.consumer(slot="research.1")
        heir.demand(1)
        (again,) = await found.take()
        assert again.redelivered
        marked = History(open=True)
        await finished(heir.mark, again, marked)
        heir.release([again])
        heir.demand(1)
        (third,) = await found.take()
        assert third.history == marked
        assert not third.redelivered
        await heir.close()
        await lost.close()


async def test_lease_is_extended_while_the_loop_runs(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        await short_lease(made, 3.0)
        consumer, sink = await made.consumer()
        other, second = await made.consumer(slot="research.1")
        await made.publish(made.event())
        consumer.demand(1)
        await sink.take()
        other.demand(1)
        await asyncio.sleep(6.5)  # two leases: the absence of a second copy has no other sign
        assert not second.deliveries
        await consumer.close()
        await second.take()
        await other.close()


async def test_lease_is_extended_from_a_thread_while_the_loop_is_blocked(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made, rig(nats_server.url, made.topology) as elsewhere:
        await short_lease(made, 3.0)
        consumer, sink = await made.consumer()
        await made.publish(made.event())
        consumer.demand(1)
        await sink.take()
        stop = threading.Event()

        def guard() -> None:
            while not stop.wait(0.5):
                consumer.keep_alive()

        thread = threading.Thread(target=guard)
        thread.start()
        time.sleep(6.5)  # (a handler that blocks the loop for two leases)
        stop.set()
        thread.join()
        info = await elsewhere.connection.link.api(
            f"CONSUMER.INFO.{safe(made.channel('tasks').address)}.{safe(made.subscription('research').group)}"
        )
        assert info["num_ack_pending"] == 1
        assert info["num_redelivered"] == 0
        other, second = await elsewhere.consumer(slot="research.1")
        other.demand(1)
        await asyncio.sleep(0.3)
        assert not second.deliveries
        await other.close()
        await consumer.close()


async def test_refused_output_leaves_the_event_unsettled(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        await made.publish(made.event())
        consumer.demand(1)
        (got,) = await sink.take()
        huge = made.event("agent.started", "events", body=b"x" * 2_000_000)
        with pytest.raises(PublishRejected, match="accepts"):
            await finished(consumer.settle, got, [made.event("agent.started", "events"), huge])
        consumer.release([got])
        consumer.demand(1)
        (again,) = await sink.take()
        assert again.position == got.position
        await consumer.close()


async def test_event_of_another_client_without_headers(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        client = await nats.connect(nats_server.url)
        await client.jetstream().publish(f"{made.broker.prefix}task.assigned", b'{"payload": {"q": "\xc3\xa4"}}')
        consumer.demand(1)
        (got,) = await sink.take()
        assert got.body == b'{"payload": {"q": "\xc3\xa4"}}'
        assert got.headers == {}
        assert got.event_type == "task.assigned"
        assert abs(got.time - time.time()) < 5
        await client.close()
        await consumer.close()


async def test_redriven_event_reaches_its_subscription_alone_with_a_fresh_history(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        letter = made.event(headers={"x-note": "mended"})
        await made.publish(letter)
        consumer.demand(4)
        (got,) = await sink.take()
        await finished(consumer.settle, got, [])
        await made.connection.redrive(made.subscription("research"), letter)
        consumer.demand(4)
        (again,) = await sink.take()
        assert (again.body, again.channel, again.event_type) == (letter.body, "tasks", "task.assigned")
        assert again.headers == {"correlation-id": letter.correlation_id, "x-note": "mended"}
        assert again.position != got.position
        history = History(attempts=1)
        await finished(consumer.retry, again, history, 0.0)
        consumer.demand(4)
        (third,) = await sink.take()
        assert third.history == history
        assert third.position == again.position
        await finished(consumer.settle, third, [])
        await forgotten(made)
        assert (await made.connection.lag([made.subscription("research")]))["research", "tasks"].in_flight == 0
        await consumer.close()


@pytest.mark.slow
async def test_ten_thousand_delayed_retries_hold_up_nobody(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        total = 10_000
        for _ in range(10):
            await made.publish(*(made.event() for _ in range(total // 10)))
        due = time.time() + 30
        waiting = asyncio.get_running_loop().create_future()
        counted = [0]

        def done(error: BaseException | None) -> None:
            assert error is None
            counted[0] += 1
            consumer.demand(64)
            if counted[0] == total:
                waiting.set_result(None)

        sink.on_delivery = lambda d: consumer.retry(
            d, replace(d.history, attempts=1, not_before=due), due - time.time(), done
        )
        consumer.demand(64)
        await waiting
        assert time.time() < due - 3, "this machine is too slow to have them all wait at once"
        sink.deliveries.clear()
        sink.on_delivery = None
        fresh = made.event()
        await made.publish(fresh)
        (got,) = await sink.take()
        assert got.body == fresh.body
        assert time.time() < due
        lag = (await made.connection.lag([made.subscription("research")]))["research", "tasks"]
        assert lag.delayed == total
        sink.deliveries.clear()

        def settle(delivery: object) -> None:
            assert got.history.attempts == 0
            consumer.settle(delivery, [], lambda error: consumer.demand(64))  # type: ignore[arg-type]

        sink.on_delivery = settle
        consumer.demand(64)
        await until(lambda: len(sink.deliveries) >= total, "all came back")
        assert time.time() >= due
        assert {d.history.attempts for d in sink.deliveries} == {1}
        assert len({d.position for d in sink.deliveries}) == total
        assert not any(d.redelivered for d in sink.deliveries)
        await consumer.close()
