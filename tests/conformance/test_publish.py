"""An event on its way out: confirmed, once, in order, whole, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected
from orchestrator.topology.model import Overflow, Retention

from .rig import Rig, elapse, eventually, finished, outcome


async def test_what_is_confirmed_is_stored(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        assert [event.body for event in await lab.stored("tasks")] == [sent.body]


async def test_the_same_id_within_the_window_must_take_effect_once(rig: Rig) -> None:
    async with rig.lab() as lab:
        first, last = lab.message(), lab.message()
        await lab.send(first)
        await lab.send(first)
        await lab.send(first, first, last)
        reader = await lab.reader(free=10)
        taken = await reader.take(2)
        await reader.settle_all(taken)
        assert [delivery.body for delivery in taken] == [first.body, last.body]
        await lab.publish()  # what comes next shows that nothing was in between
        assert (await reader.take_one()).body not in (first.body, last.body)


async def test_a_doubled_publish_is_stored_once(rig: Rig) -> None:
    if not rig.capabilities.publish_dedup:
        pytest.skip("capability publish_dedup: this broker leaves it to each subscription")
    async with rig.lab() as lab:
        first = lab.message()
        await lab.send(first)
        await lab.send(first, connection_of_another := first)
        other = (await lab.connect()).producer()
        await lab.send(connection_of_another, producer=other)
        assert await lab.connection.count(lab.channel("tasks")) == 1


async def test_the_message_id_decides_about_doubles_not_the_event_id(rig: Rig) -> None:
    async with rig.lab() as lab:
        first = lab.message(message_id="attempt-1")
        await lab.send(first, replace(first, message_id="attempt-2"))
        reader = await lab.reader(free=10)
        assert [d.body for d in await reader.take(2)] == [first.body, first.body]


async def test_after_the_window_the_same_id_counts_again(rig: Rig) -> None:
    if not rig.capabilities.publish_dedup:
        pytest.skip("capability publish_dedup: each subscription remembers what it has handled for longer")
    async with rig.lab(tasks={"dedup_window": 1.0}) as lab:
        first = lab.message()
        await lab.send(first)
        await elapse(2.0)
        await lab.send(first)
        assert await lab.connection.count(lab.channel("tasks")) == 2


async def test_one_publishers_events_arrive_in_its_order(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(200)
        reader = await lab.reader(free=200)
        assert [d.body for d in await reader.take(200)] == [message.body for message in sent]


async def test_events_of_one_key_arrive_in_order_on_several_partitions(rig: Rig) -> None:
    if not rig.capabilities.partitions:
        pytest.skip("capability partitions: they have no meaning on this broker")
    async with rig.lab(tasks={"partitions": 3}) as lab:
        sent = [lab.message(key=f"key-{number % 5}") for number in range(50)]
        await lab.send(*sent)
        reader = await lab.reader(free=50)
        bodies = [d.body for d in await reader.take(50)]
        for key in range(5):
            mine = [message.body for message in sent if message.key == f"key-{key}"]
            assert [body for body in bodies if body in mine] == mine


async def test_headers_and_type_arrive(rig: Rig) -> None:
    async with rig.lab() as lab:
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-note": "zwölf ✓"}
        await lab.publish(headers=headers)
        delivery = await (await lab.reader(free=1)).take_one()
        assert headers.items() <= delivery.headers.items()
        assert delivery.event_type in ("task.assigned", None)


async def test_a_large_body_arrives_byte_for_byte(rig: Rig) -> None:
    body = bytes(range(256)) * 3600  # 900 kB
    async with rig.lab() as lab:
        await lab.publish(body=body)
        assert (await (await lab.reader(free=1)).take_one()).body == body


async def test_too_large_a_body_must_be_rejected_with_the_limit(rig: Rig) -> None:
    if rig.driver.too_large is None:
        pytest.skip("this broker takes bodies of any size that a test can send")
    async with rig.lab() as lab:
        with pytest.raises(PublishRejected) as refused:
            await lab.send(lab.message(body=b"x" * rig.driver.too_large))
        assert refused.value.limit is not None
        assert 0 < refused.value.limit < rig.driver.too_large
        await lab.publish()
        assert await lab.connection.count(lab.channel("tasks")) == 1


HOSTILE = {
    "line break in the type": {"event_type": "task.assigned\r\nNats-Msg-Id: x"},
    "space in the type": {"event_type": "task.assigned now"},
    "wildcard in the type": {"event_type": "task.>"},
    "star in the type": {"event_type": "task.*"},
    "line break in a header's value": {"headers": {"x-note": "a\r\nNats-Rollup: all"}},
    "line break in a header's name": {"headers": {"x-note: a\r\nNats-Rollup": "all"}},
    "NUL in a header": {"headers": {"x-note": "a\0b"}},
    "control character in the id": {"event_id": "id\r\nNats-Rollup: all"},
}


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_hostile_characters_must_be_refused_or_carried_unharmed(rig: Rig, hostile: str) -> None:
    async with rig.lab() as lab:
        before = await lab.publish()
        message = replace(lab.message(), message_id="", **HOSTILE[hostile])
        message.message_id = message.event_id
        try:
            await lab.send(message)
            carried = True
        except PublishRejected:
            carried = False
        after = await lab.publish()
        bodies = [event.body for event in await lab.stored("tasks")]
        assert bodies == [before.body, message.body, after.body] if carried else [before.body, after.body]
        if carried and message.headers:
            stored = (await lab.stored("tasks"))[1]
            assert message.headers.items() <= stored.headers.items()
            assert not {"nats-rollup", "Nats-Rollup"} & set(stored.headers)


async def test_a_full_channel_that_rejects_must_say_so_and_take_more_when_there_is_room(rig: Rig) -> None:
    if not (rig.capabilities.overflow_reject and rig.capabilities.max_events and rig.capabilities.frees_on_settle):
        pytest.skip("capabilities overflow_reject, max_events, frees_on_settle: not all there")
    limits = {"retention": Retention(max_events=3), "overflow": Overflow.REJECT}
    async with rig.lab(tasks=limits) as lab:
        await lab.publish_many(3)
        with pytest.raises(PublishRejected):
            await lab.publish()
        reader = await lab.reader(free=1)
        await reader.settle(await reader.take_one())
        await eventually(lambda: accepted(lab.publish()), what="room again after an event was settled")


async def accepted(publishing: object) -> bool:
    try:
        await publishing  # type: ignore[misc]
    except PublishRejected:
        return False
    return True


async def test_unread_events_that_were_dropped_must_raise_an_alarm(rig: Rig) -> None:
    if not rig.capabilities.max_events:
        pytest.skip("capability max_events: time and bytes bound a channel here")
    async with rig.lab(events={"retention": Retention(max_events=5)}) as lab:
        reader = await lab.reader("auditor")
        await lab.publish_many(12, "agent.completed", channel="events")
        reader.demand(5)
        assert len(await reader.take(5)) == 5
        await eventually(lambda: reader.alarms, what="an alarm about unread events")
        assert await eventually(lambda: unread_lost(lab), what="a count of lost events") in (7, -1)


async def unread_lost(lab: object) -> int:
    return (await lab.lag("auditor")).unread_lost  # type: ignore[attr-defined,no-any-return]


async def test_a_delayed_event_must_not_be_seen_before_its_time(rig: Rig, stopwatch: Callable[[], float]) -> None:
    if not rig.capabilities.delayed_publish:
        pytest.skip("capability delayed_publish")
    async with rig.lab() as lab:
        reader = await lab.reader(free=10)
        begin = stopwatch()
        late = await lab.publish(delay=5.0)
        soon = await lab.publish()
        assert (await reader.take_one()).body == soon.body
        assert (await reader.take_one()).body == late.body
        assert 4.9 < stopwatch() - begin < 5 + 20


async def test_what_is_sent_while_the_broker_is_away_must_arrive_once(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        done, future = outcome()
        async with rig.server_down():
            waiting = lab.message()
            lab.producer.send(waiting, done)
            await elapse(0.3)
            assert not future.done()
        await finished(future)
        reader = await lab.reader(free=10)
        taken = await reader.take(2)
        assert [d.body for d in taken].count(waiting.body) == 1
        await lab.publish()
        assert waiting.body not in [d.body for d in await reader.take(1)]


async def test_a_flood_must_be_told_to_wait(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        futures = []
        async with rig.server_down():
            while lab.producer.ready:
                done, future = outcome()
                lab.producer.send(lab.message(), done)
                futures.append(future)
                assert len(futures) < 200_000, "so many unconfirmed, and still `ready`"
        await eventually(lambda: lab.producer.ready, what="ready again")
        await lab.producer.wait_ready()
        for future in futures:
            await finished(future)


async def test_closing_must_not_leave_a_caller_waiting(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        connection = await lab.connect()
        producer = connection.producer()
        done, future = outcome()
        async with rig.server_down():
            producer.send(lab.message(), done)
            await connection.close()
        with pytest.raises(BrokerUnavailable):
            await finished(future)


async def test_a_reply_reaches_the_asker_alone(rig: Rig) -> None:
    async with rig.lab() as lab:
        ours: list[bytes] = []
        theirs: list[bytes] = []
        address = await lab.connection.replies(lambda body, headers: ours.append(body))
        other = await lab.connect()
        assert await other.replies(lambda body, headers: theirs.append(body)) != address
        request = await lab.publish(headers={"reply-to": address})
        responder = await lab.reader(free=1)
        delivery = await responder.take_one()
        assert delivery.headers["reply-to"] == address
        answer = lab.message("task.assigned.reply", body=b'{"event_type": "task.assigned.reply"}')
        done, future = outcome()
        other.producer().reply(delivery.headers["reply-to"], answer, done)
        await finished(future)
        await eventually(lambda: ours, what="the reply")
        assert (ours, theirs) == ([answer.body], [])
        assert [event.body for event in await lab.stored("tasks")] == [request.body]  # not routed


async def test_a_reply_is_never_written_into_a_channel(rig: Rig) -> None:
    """The asker names the address: it must not make the worker publish, trim or command what is the topology's."""
    async with rig.lab() as lab:
        tasks, prefix = lab.channel("tasks"), lab.topology.brokers[lab.channel("tasks").broker].prefix
        addresses = {
            "nats": [f"{prefix}task.assigned", f"$JS.API.STREAM.PURGE.{tasks.address}", "$SYS.REQ.SERVER.PING"],
            "redis": [tasks.address, f"{tasks.address}:ids"],
            "kafka": [tasks.address, f"{tasks.address}/inbox"],
        }
        if rig.kind not in addresses:
            pytest.skip("a reply of this broker reaches inboxes alone")
        await lab.publish()
        for address in addresses[rig.kind]:
            done, _ = outcome()
            with pytest.raises(PublishRejected, match="reply address"):
                lab.producer.reply(address, lab.message("task.assigned.reply"), done)
        assert len(await lab.stored("tasks")) == 1


async def test_a_reply_to_nobody_does_no_harm(rig: Rig) -> None:
    async with rig.lab() as lab:
        gone = await lab.connect()
        address = await gone.replies(lambda body, headers: None)
        await gone.close()
        done, future = outcome()
        lab.producer.reply(address, lab.message("task.assigned.reply"), done)
        try:
            await finished(future)
        except BrokerError:
            pass  # allowed to say so
        await lab.publish()
