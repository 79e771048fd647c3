"""An event that dies: its letter is an output like any other, and there is one."""

from __future__ import annotations

from orchestrator.brokers.base import FRESH
from orchestrator.topology.model import Retention

from .rig import Lab, Rig, eventually


async def test_a_dead_letter_holds_the_body_and_headers_verbatim(rig: Rig) -> None:
    body = b'\x00\xff{"not": "an event"\r\n'
    async with rig.lab() as lab:
        await lab.publish(body=body, headers={"x-note": "zwölf ✓", "traceparent": "00-a-b-01"})
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        letter = lab.letter(delivery)
        await reader.settle(delivery, letter)
        (stored,) = await lab.letters()
        assert stored.body == body
        assert letter.headers.items() <= stored.headers.items()
        assert stored.headers["x-note"] == "zwölf ✓"


async def test_a_letter_written_before_the_crash_is_not_doubled(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        delivery = await reader.take_one()
        await lab.send(lab.letter(delivery))  # so far the worker got that was killed before it settled
        await reader.consumer.close()
        other = await lab.reader(free=1, slot="worker.0")
        again = await other.take_one()
        await other.settle(again, lab.letter(again))
        assert len(await lab.letters()) == 1


async def test_a_letter_written_before_the_broker_was_killed_is_not_doubled(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        delivery = await reader.take_one()
        await lab.send(lab.letter(delivery))
        await reader.consumer.close()
        await rig.restart_server()
        other = await lab.reader(free=1, slot="worker.0")
        again = await other.take_one()
        await other.settle(again, lab.letter(again))
        assert len(await lab.letters()) == 1


async def test_each_of_two_readers_may_have_its_own_letter_for_one_event(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.completed", channel="events")
        for agent in ("auditor", "watcher"):
            reader = await lab.reader(agent, free=1)
            delivery = await reader.take_one()
            letter = lab.letter(delivery, message_id=f"dlq:{agent}:{delivery.position}")
            await reader.settle(delivery, letter)
        assert len(await lab.letters()) == 2


async def test_a_dead_letter_is_nobodys_input(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=2)
        delivery = await reader.take_one()
        await reader.settle(delivery, lab.letter(delivery))
        last = await lab.publish()
        assert (await reader.take_one()).body == last.body


async def test_letters_do_not_appear_among_the_events_of_their_channel(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await reader.settle(delivery, lab.letter(delivery))
        assert len(await lab.letters()) == 1
        assert await lab.connection.count(lab.channel("dead")) == 1


async def test_letters_can_be_removed_one_by_one(rig: Rig) -> None:
    async with rig.lab(dead={"retention": Retention(max_age=3600.0)}) as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=3)
        for delivery in await reader.take(3):
            await reader.settle(delivery, lab.letter(delivery))
        first, second, third = await lab.letters()
        assert await lab.connection.remove(lab.channel("dead"), [second.position]) == 1
        assert [one.position for one in await lab.letters()] == [first.position, third.position]
        assert await lab.connection.remove(lab.channel("dead"), [second.position]) == 0


async def test_an_event_that_failed_before_dies_with_its_letter_alone(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        await reader.retry(await reader.take_one(), FRESH, 0.1)
        reader.demand(1)
        delivery = await reader.take_one()
        await reader.settle(delivery, lab.letter(delivery))
        await eventually(lambda: nothing_left(lab), what="a lag of nothing")
        assert len(await lab.letters()) == 1


async def nothing_left(lab: Lab) -> bool:
    lag = await lab.lag()
    return bool(lag.waiting == lag.in_flight == lag.delayed == 0)
