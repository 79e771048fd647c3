"""What a person does to events: look without disturbing, remove, hand again, move a position, count."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from orchestrator.brokers.base import FRESH, History
from tests.patience import PATIENCE

from .rig import Lab, Rig, elapse, eventually


async def numbers(lab: Lab, agent: str = "worker") -> tuple[int, int, int]:
    lag = await lab.lag(agent)
    return lag.waiting, lag.in_flight, lag.delayed


async def counted(lab: Lab, wanted: tuple[int, int, int]) -> bool:
    """Whether the lag is that; -1 stands for a number that this broker does not have."""
    return all(have in (want, -1) for have, want in zip(await numbers(lab), wanted, strict=True))


async def test_lag_counts_what_waits_runs_and_was_delayed(rig: Rig) -> None:
    async with rig.lab() as lab:
        assert await numbers(lab) == (0, 0, 0)
        await lab.publish_many(5)
        reader = await lab.reader(free=2)
        first, _ = await reader.take(2)
        await reader.retry(first, History(attempts=1), 60)
        await eventually(lambda: counted(lab, (3, 1, 1)), what="a lag of 3, 1, 1")


async def test_lag_knows_the_oldest(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        await elapse(1.2)
        lag = await lab.lag()
        assert lag.oldest_s == -1 or 1 <= lag.oldest_s < PATIENCE


async def test_browsing_shows_everything_in_order(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(20, "agent.completed", channel="events", headers={"x-note": "n"})
        stored = await lab.stored("events")
        assert [event.body for event in stored] == [message.body for message in sent]
        assert len({event.position for event in stored}) == 20
        assert {event.headers["x-note"] for event in stored} == {"n"}


async def test_browsing_an_empty_channel_ends(rig: Rig) -> None:
    async with rig.lab() as lab:
        assert await lab.stored("events") == []


async def test_browsing_can_be_limited_to_types(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.started", channel="events")
        wanted = await lab.publish("agent.completed", channel="events")
        assert [event.body for event in await lab.stored("events", events=["agent.completed"])] == [wanted.body]


async def test_browsing_can_begin_at_a_time(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.started", channel="events")
        await elapse(1.1)
        since = datetime.now(UTC)
        await elapse(0.1)
        wanted = await lab.publish("agent.completed", channel="events")
        found = lab.connection.browse(lab.channel("events"), start=since)
        assert [event.body async for event in found] == [wanted.body]


async def test_browsing_a_queue_disturbs_nobody(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=1)
        held = await reader.take_one()
        before = (2, 1, 0)
        await eventually(lambda: counted(lab, before), what=f"a lag of {before}")
        for _ in range(3):
            assert len(await lab.stored("tasks")) == 3
        assert await counted(lab, before)
        await reader.settle(held)
        reader.demand(2)
        rest = await reader.take(2)
        assert {d.history for d in rest} == {FRESH}
        assert not any(d.redelivered for d in rest)


async def test_following_shows_what_comes(rig: Rig) -> None:
    async with rig.lab() as lab:
        first = await lab.publish("agent.started", channel="events")
        found: list[bytes] = []

        async def follow() -> None:
            events = lab.connection.browse(lab.channel("events"), start="earliest", follow=True)
            async for event in events:
                found.append(event.body)  # noqa: PERF401 (each as it comes)

        following = asyncio.ensure_future(follow())
        await eventually(lambda: found == [first.body], what="the first event")
        second = await lab.publish("agent.completed", channel="events")
        await eventually(lambda: found == [first.body, second.body], what="the event that came while following")
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_following_from_latest_shows_only_what_comes(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.started", channel="events")
        found: list[bytes] = []
        sent: list[bytes] = []

        async def follow() -> None:
            events = lab.connection.browse(lab.channel("events"), start="latest", follow=True)
            async for event in events:
                found.append(event.body)  # noqa: PERF401 (each as it comes)

        async def seen() -> bool:
            sent.append((await lab.publish("agent.completed", channel="events")).body)
            await asyncio.sleep(0.05)
            return bool(found)

        following = asyncio.ensure_future(follow())
        await eventually(seen, what="an event that came after following had begun")
        await eventually(lambda: found[-1:] == sent[-1:], what="the last event")
        assert found == sent[-len(found) :]
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_removing_takes_single_events_from_a_log(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3, "agent.completed", channel="events")
        first, second, third = await lab.stored("events")
        assert await lab.connection.remove(lab.channel("events"), [first.position, third.position]) == 2
        assert [event.position for event in await lab.stored("events")] == [second.position]


async def test_counting_a_channel(rig: Rig) -> None:
    async with rig.lab() as lab:
        assert await lab.connection.count(lab.channel("events")) == 0
        await lab.publish_many(7, "agent.completed", channel="events")
        assert await lab.connection.count(lab.channel("events")) == 7


async def test_a_redrive_reaches_the_failing_subscription_alone(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish("agent.completed", channel="events")
        auditor, watcher = await lab.reader("auditor", free=5), await lab.reader("watcher", free=5)
        await auditor.settle(await auditor.take_one())
        await watcher.settle(await watcher.take_one())
        await lab.connection.redrive(lab.subscription("auditor"), message)
        assert (await auditor.take_one()).body == message.body
        last = await lab.publish("agent.last", channel="events")
        assert (await watcher.take_one()).body == last.body


async def test_a_redrive_is_not_swallowed_by_dedup(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish(headers={"x-note": "kept"})
        reader = await lab.reader(free=5)
        await reader.settle(await reader.take_one())
        for _ in range(2):
            await lab.connection.redrive(lab.subscription("worker"), message)
            again = await reader.take_one()
            assert (again.body, again.history, again.headers["x-note"]) == (message.body, FRESH, "kept")
            await reader.settle(again)


async def test_a_redriven_event_may_fail_be_retried_and_die_again(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish()
        reader = await lab.reader(free=5)
        first = await reader.take_one()
        await reader.settle(first, lab.letter(first))
        await lab.connection.redrive(lab.subscription("worker"), message)
        again = await reader.take_one()
        await reader.retry(again, History(attempts=1), 0.3)
        third = await reader.take_one()
        assert (third.history.attempts, third.position) == (1, again.position)
        assert third.position != first.position  # so its letter is another one
        await reader.settle(third, lab.letter(third))
        assert len(await lab.letters()) == 2


async def test_a_redrive_waits_for_a_reader(rig: Rig) -> None:
    async with rig.lab() as lab:
        message = await lab.publish()
        reader = await lab.reader(free=1, slot="worker.0")
        await reader.settle(await reader.take_one())
        await reader.consumer.close()
        await lab.connection.redrive(lab.subscription("worker"), message)
        later = await lab.reader(free=1, slot="worker.0")
        assert (await later.take_one()).body == message.body


async def test_seeking_back_reads_a_log_again(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(3, "agent.completed", channel="events")
        reader = await lab.reader("auditor", free=3, slot="auditor.0")
        await reader.settle_all(await reader.take(3))
        await reader.consumer.close()
        await lab.connection.seek(lab.subscription("auditor"), "earliest")
        again = await lab.reader("auditor", free=3, slot="auditor.0")
        assert [d.body for d in await again.take(3)] == [message.body for message in sent]


async def test_seeking_to_the_end_skips(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3, "agent.completed", channel="events")
        await lab.connection.seek(lab.subscription("auditor"), "latest")
        last = await lab.publish("agent.last", channel="events")
        reader = await lab.reader("auditor", free=3)
        assert (await reader.take_one()).body == last.body


async def test_seeking_to_a_time(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.completed", channel="events")
        await elapse(1.1)
        since = datetime.now(UTC)
        await elapse(0.1)
        wanted = await lab.publish("agent.completed", channel="events")
        await lab.connection.seek(lab.subscription("auditor"), since)
        reader = await lab.reader("auditor", free=3)
        assert (await reader.take_one()).body == wanted.body


async def test_seeking_moves_one_subscription_alone(rig: Rig) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(2, "agent.completed", channel="events")
        await lab.connection.seek(lab.subscription("auditor"), "latest")
        reader = await lab.reader("watcher", free=2)
        assert [d.body for d in await reader.take(2)] == [message.body for message in sent]


async def test_the_facts_name_the_broker(rig: Rig) -> None:
    async with rig.lab() as lab:
        facts = await lab.connection.facts()
        assert facts
        assert all(fact.name and fact.value for fact in facts)
        assert all(fact.hint for fact in facts if fact.level != "ok")
