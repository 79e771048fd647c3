"""An event out: confirmed, deduplicated, refused with a reason, delayed, and safe whatever its names hold."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import nats
import pytest

from orchestrator.brokers.base import Outgoing
from orchestrator.brokers.nats.resources import safe
from orchestrator.errors import BrokerUnavailable, PublishRejected
from orchestrator.topology.model import Auth, Retention
from tests.nats.rig import finished, rig, topology, until
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer


async def test_same_message_id_takes_effect_once(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        message = made.event()
        await made.publish(message, message, replace(message, message_id="another"))
        await made.publish(message)
        assert await made.connection.count(made.channel("tasks")) == 2


async def test_outside_subscriber_sees_subject_and_headers(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        client = await nats.connect(nats_server.url)
        subscription = await client.subscribe(f"{made.broker.prefix}task.>")
        await client.flush()
        message = made.event(headers={"traceparent": "00-ä"})
        await made.publish(message)
        got = await subscription.next_msg(timeout=PATIENCE)
        assert got.subject == f"{made.broker.prefix}task.assigned"
        assert got.data == message.body
        assert got.headers == {
            "Nats-Msg-Id": message.event_id,
            "correlation-id": message.correlation_id,
            "traceparent": "00-ä",
        }
        await client.close()


async def test_full_queue_rejects(nats_server: NatsServer) -> None:
    plan = topology(nats_server.url)
    small = replace(plan.channels["tasks"], retention=Retention(max_events=2))
    plan = replace(plan, channels={**plan.channels, "tasks": small})
    async with rig(nats_server.url, plan) as made:
        await made.publish(made.event(), made.event())
        with pytest.raises(PublishRejected, match="maximum messages exceeded") as caught:
            await made.publish(made.event())
        assert "retention" in str(caught.value.hint)


@pytest.mark.parametrize(
    "changes",
    [
        {"event_type": "task.a b"},
        {"event_type": "task.*"},
        {"event_type": "task.>"},
        {"event_type": "task..a"},
        {"event_type": ""},
        {"event_type": "task.a\r\nPUB x 0\r\n"},
        {"event_type": "$JS.API.STREAM.DELETE.x"},
        {"headers": {"a": "b\r\nNats-Msg-Id: x"}},
        {"headers": {"a b": "c"}},
        {"headers": {"Nats-Rollup": "all"}},
        {"headers": {"nats-expected-stream": "x"}},
        {"headers": {"": "x"}},
    ],
)
async def test_hostile_subject_or_header_is_refused_at_once(nats_server: NatsServer, changes: dict[str, Any]) -> None:
    async with rig(nats_server.url, replace(topology(nats_server.url), brokers=no_prefix(nats_server))) as made:
        with pytest.raises(PublishRejected):
            made.connection.producer().send(made.event(**changes), lambda error: None)
        await made.publish(made.event())  # the connection still works


def no_prefix(server: NatsServer) -> Any:
    return topology(server.url, prefix=f"h{time.time_ns()}.").brokers


async def test_hostile_ids_are_escaped(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        evil = made.event(event_id="a\r\nNats-Rollup: all", correlation_id="c\r\n\r\nPUB x 0")
        await made.publish(evil, evil)
        assert await made.connection.count(made.channel("tasks")) == 1
        consumer, sink = await made.consumer()
        consumer.demand(1)
        (got,) = await sink.take()
        assert got.body == evil.body
        assert got.headers == {"correlation-id": "c%0D%0A%0D%0APUB x 0"}
        await consumer.close()


async def test_dead_letter_lies_apart_and_is_written_once(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        letter = made.event(
            "task.bad type\r\n*", "letters", headers={"dlq-agent": "research", "x-own": "1"}, message_id="dlq:tasks:7"
        )
        await made.publish(letter, letter)
        got = [s async for s in made.connection.browse(made.channel("letters"), start="earliest", dead_letters=True)]
        assert [(s.body, s.headers["dlq-agent"], s.headers["x-own"]) for s in got] == [(letter.body, "research", "1")]
        info = await made.connection.link.message(safe(letter.channel.address), {"seq": 1})
        assert info is not None
        assert info.subject == f"{letter.channel.address}.research._"


async def test_delayed_event_arrives_at_its_time_though_the_server_was_killed() -> None:
    server = NatsServer().start()
    try:
        async with rig(server.url) as made:
            consumer, sink = await made.consumer()
            consumer.demand(8)
            began = time.monotonic()
            soon, later = made.event(delay=0.3, headers={"traceparent": "00-2"}), made.event(delay=3.0)
            await made.publish(soon, later, soon)
            (first,) = await sink.take()
            assert time.monotonic() - began > 0.25
            assert (first.body, first.event_type) == (soon.body, "task.assigned")
            assert first.headers == {"correlation-id": soon.correlation_id, "traceparent": "00-2"}
            server.restart(kill=True)
            consumer.demand(8)
            (second,) = await sink.take()
            assert time.monotonic() - began > 2.9
            assert second.body == later.body
            await asyncio.sleep(0.3)
            assert not sink.deliveries
            await consumer.close()
    finally:
        server.close()


async def test_deleted_stream_is_made_again_for_a_publisher(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer("audit")
        stream = safe(made.channel("tasks").address)
        await made.connection.link.api(f"STREAM.DELETE.{stream}")
        await made.publish(made.event())
        assert await made.connection.count(made.channel("tasks")) == 1
        assert any(stream in alarm for alarm in sink.alarms)
        await consumer.close()


async def test_missing_external_stream_refuses(nats_server: NatsServer) -> None:
    plan = topology(nats_server.url)
    foreign = replace(plan.channels["events"], external=True, address=f"absent-{plan.name}")
    plan = replace(plan, channels={**plan.channels, "events": foreign}, agents={})
    async with rig(nats_server.url, plan, apply=False) as made:
        with pytest.raises(PublishRejected, match="deleted"):
            await made.publish(made.event("agent.started", "events"))


async def test_publishing_survives_a_killed_server_once_each() -> None:
    server = NatsServer().start()
    try:
        async with rig(server.url) as made:
            total, confirmed = 3000, []
            producer = made.connection.producer()

            async def flood() -> None:
                for _ in range(total):
                    await producer.wait_ready()
                    producer.send(made.event(), confirmed.append)
                    await asyncio.sleep(0.0005)

            task = asyncio.create_task(flood())
            for _ in range(2):
                seen = len(confirmed)
                await until(lambda seen=seen: len(confirmed) > seen + 300, "some were confirmed")
                server.kill()
                await asyncio.sleep(0.3)
                server.start()
            await task
            await until(lambda: len(confirmed) == total, "all were confirmed")
            await until(lambda: made.connection.link.connected, "connected again")
            assert set(confirmed) == {None}
            assert await made.connection.count(made.channel("tasks")) == total
    finally:
        server.close()


async def test_back_pressure_bounds_what_is_unconfirmed(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        producer = made.connection.producer()
        sent, confirmed = 0, []
        while producer.ready:
            producer.send(made.event(), confirmed.append)
            sent += 1
        assert sent <= 4096
        assert not confirmed
        await asyncio.wait_for(producer.wait_ready(), PATIENCE)
        assert confirmed
        await until(lambda: len(confirmed) == sent, "all were confirmed")


async def test_close_reports_what_was_never_confirmed() -> None:
    server = NatsServer().start()
    try:
        results: list[BaseException | None] = []
        async with rig(server.url) as made:
            server.pause()
            made.connection.producer().send(made.event(), results.append)
            await until(lambda: not made.connection.link.connected, "the frozen server was noticed")
        assert isinstance(results[0], BrokerUnavailable)
    finally:
        server.close()


async def test_reply_reaches_the_inbox_of_the_asker(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made, rig(nats_server.url, made.topology) as other:
        got: list[tuple[bytes, dict[str, str]]] = []
        address = await made.connection.replies(lambda body, headers: got.append((body, dict(headers))))
        answer: Outgoing = other.event("task.assigned.reply", headers={"traceparent": "00-3"})
        await finished(other.connection.producer().reply, address, answer)
        await until(lambda: got, "the reply")
        assert got == [(answer.body, {"correlation-id": answer.correlation_id, "traceparent": "00-3"})]
        with pytest.raises(PublishRejected):
            other.connection.producer().reply("evil *", answer, lambda error: None)


async def test_inbox_for_replies_that_a_frozen_server_does_not_open_is_said() -> None:
    server = NatsServer().start()
    try:
        async with rig(server.url) as made:
            server.pause()
            with pytest.raises(BrokerUnavailable):
                await made.connection.replies(lambda body, headers: None)
    finally:
        server.close()


async def test_publishing_without_permission_is_refused() -> None:
    rule = '{user: u, password: p, permissions: {publish: {deny: ["secret.>"]}}}'
    server = NatsServer(f"authorization {{ users: [{rule}] }}").start()
    try:
        plan = topology(server.url, prefix="secret.", auth=Auth("plain", username="u", password="p"))
        async with rig(server.url, plan) as made:
            with pytest.raises(PublishRejected, match="permit"):
                await made.publish(made.event())
    finally:
        server.close()
