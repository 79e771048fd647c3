"""What is done to the server from outside: killed, frozen, emptied. Judged by what the sink was told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.brokers.base import Delivery, Ended, History, Left
from orchestrator.brokers.nats import adapter
from orchestrator.errors import BrokerError, BrokerUnavailable, ResourceMissing
from tests.nats.rig import finished, reading, rig, topology, until
from tests.servers.nats import NatsServer, free_port


@pytest.fixture
def server() -> Iterator[NatsServer]:
    started = NatsServer().start()
    yield started
    started.close()


async def test_consumes_again_soon_after_a_kill_and_loses_nothing(server: NatsServer) -> None:
    async with reading(server.url) as (made, consumer, sink):
        total = 600
        handled: Counter[str] = Counter()
        done_at: list[float] = []

        def settle(delivery: Delivery) -> None:
            def done(error: BaseException | None) -> None:
                assert error is None
                handled[delivery.position] += 1
                done_at.append(time.monotonic())
                consumer.demand(8)

            consumer.settle(delivery, [made.event("agent.completed", "events")], done)

        sink.on_delivery = settle
        consumer.demand(8)
        for _ in range(2):
            task = asyncio.gather(*(finished(made.connection.producer().send, made.event()) for _ in range(total // 2)))
            await until(lambda: len(handled) % (total // 2) > 20, "some were handled")
            server.kill()
            await until(lambda: sink.troubles and sink.troubles[-1], "trouble was told")
            server.start()
            back = time.monotonic()
            await task
            await until(lambda back=back: done_at and done_at[-1] > back, "consumes again", 15)
        await until(lambda: len(handled) == total, "all were handled")
        assert sink.troubles[-1] is None


async def test_running_event_is_not_delivered_twice_after_the_server_forgot(server: NatsServer) -> None:
    async with reading(server.url) as (made, consumer, sink):
        await made.publish(made.event())
        consumer.demand(1)
        (running,) = await sink.take()
        server.restart(kill=True)
        await until(lambda: sink.troubles[-1:] == [None], "it is back")
        consumer.demand(4)
        await made.publish(made.event())
        (other,) = await sink.take()
        assert other.position != running.position
        await finished(consumer.settle, running, [])
        await finished(consumer.settle, other, [])
        await asyncio.sleep(0.3)
        assert not sink.deliveries


async def test_history_survives_a_killed_server(server: NatsServer) -> None:
    async with reading(server.url) as (made, consumer, sink):
        await made.publish(made.event())
        consumer.demand(1)
        (failed,) = await sink.take()
        due = time.time() + 2.5
        history = History(attempts=2, not_before=due, error="x")
        await finished(consumer.retry, failed, history, 2.5)
        server.restart(kill=True)
        consumer.demand(1)
        (again,) = await sink.take()
        assert time.time() >= due - 0.05
        assert again.history == history


async def test_frozen_server_is_seen_and_survived(server: NatsServer) -> None:
    async with reading(server.url) as (made, consumer, sink):
        consumer.demand(1)
        server.pause()
        await until(lambda: any(sink.troubles), "trouble was told", 15)  # seconds; takes 3
        server.resume()
        await made.publish(made.event())
        await sink.take()
        assert sink.troubles[-1] is None


async def test_deleted_consumer_is_made_again_where_it_was(server: NatsServer) -> None:
    async with reading(server.url, "audit") as (made, first, found):
        first.demand(8)
        await made.publish(*(made.event("agent.started", "events") for _ in range(3)))
        for got in await found.take(3):
            await finished(first.settle, got, [])
        await first.close()
        stream, durable = made.place("audit")
        link = made.connection.link
        while (await link.api(f"CONSUMER.INFO.{stream}.{durable}"))["ack_floor"]["stream_seq"] < 3:
            await asyncio.sleep(0.01)  # the server takes acknowledgements in its own time
        consumer, sink = await made.consumer("audit")
        consumer.demand(8)
        await link.api(f"CONSUMER.DELETE.{stream}.{durable}")
        await until(lambda: sink.alarms, "the healing was told")
        assert durable in sink.alarms[0]
        late = made.event("agent.completed", "events")
        await made.publish(late)
        (got,) = await sink.take()
        assert got.body == late.body
        assert sink.troubles[-1] is None
        await consumer.close()


async def test_deleted_queue_and_internal_streams_are_made_again(server: NatsServer) -> None:
    async with reading(server.url) as (made, consumer, sink):
        consumer.demand(8)
        names = made.connection.names
        await made.delete("tasks")
        for stream in (names.state, names.inbox, names.later):
            await made.connection.link.api(f"STREAM.DELETE.{stream}")
        await until(lambda: sink.troubles[-1:] == [None], "it is healed")
        assert any("tasks" in alarm for alarm in sink.alarms)
        message = made.event()
        await made.publish(message, made.event(delay=0.2))
        got = await sink.take(2)
        assert got[0].body == message.body
        await finished(consumer.retry, got[0], History(attempts=1), 0.0)
        await finished(consumer.settle, got[1], [])
        await sink.take()


async def test_deleted_external_stream_is_trouble_until_it_is_back(server: NatsServer) -> None:
    async with rig(server.url) as owner:
        foreign = replace(owner.channel("events"), external=True)
        base = topology(server.url, prefix=owner.broker.prefix)
        plan = replace(base, channels={"events": foreign}, agents={"audit": base.agents["audit"]})
        async with rig(server.url, plan, apply=False) as made:
            for wanted in adapter.desired(plan, made.broker):
                if not wanted.external:
                    await made.connection.create(wanted)
            consumer, sink = await made.consumer("audit")
            consumer.demand(1)
            await owner.delete("events")
            await until(lambda: any("deleted" in str(t) for t in sink.troubles), "trouble was told")
            await owner.apply()
            await until(lambda: sink.troubles[-1] is None, "healed")
            await consumer.close()


async def test_missing_subscription_is_said_at_open(server: NatsServer) -> None:
    async with rig(server.url, apply=False) as made:
        with pytest.raises(ResourceMissing):
            await made.consumer()


async def test_no_server_is_a_clear_error() -> None:
    port = free_port()
    plan = topology(f"nats://someone:secret@127.0.0.1:{port}")
    with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{port}") as caught:
        await adapter.connect(plan, plan.brokers["main"], name="test", patience=0.5)
    assert "secret" not in str(caught.value)
    assert caught.value.hint


async def test_server_without_jetstream_is_said() -> None:
    server = NatsServer(jetstream=False).start()
    try:
        async with rig(server.url, apply=False) as made:
            with pytest.raises(BrokerError) as caught:
                await made.apply()
            assert "JetStream" in str(caught.value)
    finally:
        server.close()


async def test_old_acknowledgement_does_not_settle_a_renewed_streams_event(server: NatsServer) -> None:
    """A stream that is made again counts from 1 once more, so what is in flight shares its number with a new event."""
    async with (
        reading(server.url) as (made, consumer, sink),
        rig(server.url, made.topology) as elsewhere,
    ):
        await made.publish(made.event())
        consumer.demand(1)
        (old,) = await sink.take()
        await made.delete("tasks")
        consumer.demand(1)
        await until(lambda: sink.alarms and sink.troubles[-1] is None, "healed")
        consumer.demand(0)
        fresh = made.event()
        await made.publish(fresh)
        other, found = await elsewhere.consumer(slot="research.1")
        other.demand(1)
        (new,) = await found.take()
        assert new.position == old.position
        await finished(consumer.settle, old, [made.event("agent.started", "events")])
        await finished(consumer.retry, old, History(attempts=1), 0.0)
        consumer.release([old])
        await made.connection.link.client.flush()
        assert await made.connection.count(made.channel("tasks")) == 1
        other.release([new])
        other.demand(1)
        (again,) = await found.take()
        assert (again.body, again.history) == (fresh.body, History())
        await other.close()


async def test_successor_leaves_a_renewed_streams_event_alone(server: NatsServer) -> None:
    async with reading(server.url) as (made, dead, sink):
        await made.publish(made.event())
        dead.demand(1)
        (old,) = await sink.take()
        await dead.drain()
        await made.delete("tasks")
        await made.apply()
        await made.publish(made.event())
        heir, found = await made.consumer()
        await heir.recover([Left(old.token, Ended.STARTED)])
        assert not found.crashes
        heir.demand(1)
        (new,) = await found.take()
        assert (new.position, new.history) == (old.position, History())
        await heir.close()


@pytest.mark.parametrize("what", ["CONSUMER.DELETE.{stream}.{durable}", "STREAM.DELETE.{stream}"])
async def test_healed_reader_that_began_at_the_latest_skips_nothing(server: NatsServer, what: str) -> None:
    plan = topology(server.url)
    audit = plan.agents["audit"]
    late = replace(audit, subscriptions=(replace(audit.subscriptions[0], start="latest"),))
    plan = replace(plan, agents={**plan.agents, "audit": late})
    async with reading(server.url, "audit", plan) as (made, consumer, sink):
        stream, durable = made.place("audit")
        consumer.demand(1)
        await made.publish(made.event("agent.started", "events"))
        (first,) = await sink.take()
        await made.connection.link.api(what.format(stream=stream, durable=durable))
        await until(lambda: any(sink.troubles), "seen, though every slot is busy")
        if what.startswith("STREAM"):
            await until(lambda: sink.alarms, "healed")
        unread = made.event("agent.completed", "events")
        await made.publish(unread)
        consumer.demand(8)
        await until(lambda: unread.body in {d.body for d in sink.deliveries}, "what came meanwhile is read")
        await finished(consumer.settle, first, [])


async def test_reader_of_a_stream_that_a_publisher_made_again_starts_at_its_beginning(server: NatsServer) -> None:
    async with reading(server.url, "audit") as (made, consumer, sink):
        consumer.demand(8)
        await made.publish(*(made.event("agent.started", "events") for _ in range(3)))
        for got in await sink.take(3):
            await finished(consumer.settle, got, [])
        await until(lambda: consumer._floor == 3, "the position is known")
        await made.delete("events")
        fresh = made.event("agent.completed", "events")
        await made.publish(fresh)  # makes the stream again, before the reader's second of grace is over
        (got,) = await sink.take()
        assert got.body == fresh.body
