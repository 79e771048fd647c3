"""What may happen to a reader: lost answers, deleted groups and streams, dead neighbours, trimmed entries."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.brokers.base import FRESH, Ended, History, Left
from orchestrator.brokers.redis import consumer as consuming
from orchestrator.brokers.redis import reading_scripts as scripts
from orchestrator.topology.model import Overflow, Retention
from tests.conformance.rig import Lab, Rig, elapse, eventually


async def test_events_whose_delivery_was_lost_are_delivered(both: Rig, raw: Any) -> None:
    """The connection is cut again and again while events arrive; none may stay behind under a living name."""
    async with both.lab() as lab:
        reader = await lab.reader(free=1000)
        for _ in range(10):
            await lab.publish_many(5)
            await raw.client_kill_filter(_type="normal", skipme=True)
        await reader.take(50)
        assert len({d.position for d in reader.seen}) == 50


async def test_an_entry_read_by_an_answer_that_never_came_is_adopted(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        reader = await lab.reader()
        await lab.publish()
        group, stream = lab.subscription("worker").group, lab.channel("tasks").address
        await raw.xreadgroup(group, reader.consumer.me, {stream: ">"}, count=1)
        reader.demand(1)
        delivery = await reader.take_one()
        assert not delivery.redelivered


async def test_a_smaller_demand_ends_the_read_under_way(rig: Rig) -> None:
    async with rig.lab() as lab:
        reader, other = await lab.reader(free=8), await lab.reader()
        await elapse(0.1)
        reader.demand(0)
        await lab.publish_many(4)
        other.demand(4)
        await other.take(4)
        assert reader.seen == []


async def test_a_destroyed_group_is_made_again_where_it_was(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        await lab.publish_many(3, "agent.started", channel="events")
        reader = await lab.reader("auditor", free=3)
        first, second, third = await reader.take(3)
        await reader.settle(first)
        await reader.retry(second, History(attempts=1), 1.0)
        await raw.xgroup_destroy(lab.channel("events").address, lab.subscription("auditor").group)
        fresh = await lab.publish("agent.started", channel="events")
        reader.demand(5)
        await eventually(lambda: reader.alarms, what="an alarm")
        assert "was made again" in reader.alarms[0]
        again = await reader.take(2)
        assert {d.body for d in again} == {fresh.body, second.body}
        assert {d.history.attempts for d in again} == {0, 1}
        await reader.settle_all([third, *again])  # what was in flight is still ours to settle
        assert (await lab.lag("auditor")).in_flight == 0


async def test_a_destroyed_group_of_a_queue_keeps_histories_and_delays(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        await lab.publish_many(4)
        reader, other = await lab.reader(free=3), await lab.reader(free=1)
        first, second, third = await reader.take(3)
        theirs = await other.take_one()
        await reader.settle(first)
        await reader.retry(second, History(attempts=1), 2.0)
        await other.consumer._beat()  # type: ignore[attr-defined]
        await raw.xgroup_destroy(lab.channel("tasks").address, lab.subscription("worker").group)
        fresh = await lab.publish()
        reader.demand(5)
        assert (await reader.take_one()).body == fresh.body
        (again,) = await reader.take(1)
        assert (again.body, again.history.attempts) == (second.body, 1)
        assert time.time() >= again.history.not_before - 0.1
        await reader.settle_all([third, again, reader.seen[3]])  # what was in flight is still its reader's to settle
        await other.settle(theirs)
        assert (reader.lost, other.lost) == ([], [])
        assert await lab.connection.count(lab.channel("tasks")) == 0


async def test_a_deleted_stream_does_not_stop_what_was_in_flight(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await raw.delete(lab.channel("tasks").address)
        await reader.settle(delivery, lab.message("agent.done", channel="events"))
        assert len(await lab.stored("events")) == 1
        reader.demand(1)
        fresh = await lab.publish()
        assert (await reader.take_one()).body == fresh.body


async def test_everything_flushed_is_made_again_and_ours(own_rig: Rig, raw: Any) -> None:
    async with own_rig.lab() as lab:
        reader = await lab.reader(free=1)
        await raw.flushall()
        await eventually(lambda: len(reader.alarms) > 0, what="an alarm")
        fresh = await lab.publish()
        assert (await reader.take_one()).body == fresh.body
        await lab.send(
            lab.message("agent.done", channel="events")
        )  # a stream that nobody reads: its publisher heals it
        owners = {str(o.id): o.owner for o in await lab.connection.observe(lab.desired())}
        assert owners[f"channel {lab.channel('tasks').address}"] == lab.topology.name
        assert owners[f"channel {lab.channel('events').address}"] == lab.topology.name


async def takeover(lab: Lab) -> bool:
    """A worker is killed in its first event; does another get it within a few leases?"""
    await lab.publish()
    victim = await lab.victim()
    await victim.take()
    await victim.kill()
    other = await lab.reader(free=1)
    try:
        await other.take_one(within=6)
    except AssertionError:
        return False
    return True


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "LEASE", 1.0)


async def test_a_dead_worker_is_relieved(both: Rig, raw: Any, short_lease: None) -> None:
    async with both.lab() as lab:
        assert await takeover(lab)
        found = await raw.xinfo_consumers(lab.channel("tasks").address, lab.subscription("worker").group)
        assert not [c["name"] for c in found if c["name"].startswith(b"worker.0@")]


async def test_without_the_takeover_that_would_be_seen(
    rig: Rig, short_lease: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "(at == 0 or reap and at > 0 and now - at > lease)"
    assert rule in scripts.BEAT
    monkeypatch.setattr(scripts, "BEAT", scripts.BEAT.replace(rule, "(at == 0)"))
    async with rig.lab() as lab:
        assert not await takeover(lab)


async def test_a_server_restart_makes_nobody_look_dead(own_rig: Rig, short_lease: None) -> None:
    """All heartbeats are old when the server is back: for a whole lease nobody may judge by them."""
    async with own_rig.lab() as lab:
        await lab.publish_many(2)
        first, second = await lab.reader(free=1), await lab.reader(free=1)
        held = [await first.take_one(), await second.take_one()]
        await own_rig.driver.kill_server()
        await elapse(2.5)
        await own_rig.driver.start_server()
        await elapse(2.5)
        assert (first.lost, second.lost) == ([], [])
        await first.settle(held[0])
        await second.settle(held[1])


async def test_a_blocked_loop_keeps_its_events_by_the_thread(rig: Rig, short_lease: None) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        victim_reader = await lab.reader(free=1)
        delivery = await victim_reader.take_one()
        main = victim_reader.consumer.main
        await lab.connection.link.call("", "ZADD", main.key("beat"), 1, victim_reader.consumer.me)
        thread = threading.Thread(target=victim_reader.consumer.keep_alive)
        thread.start()
        await asyncio.to_thread(thread.join)
        beat = await lab.connection.link.call("", "ZSCORE", main.key("beat"), victim_reader.consumer.me)
        assert float(beat) > 1e12
        await victim_reader.settle(delivery)


async def test_recover_counts_what_had_started_and_not_what_waited(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3)
        victim = await lab.victim(free=3)
        started, waiting, returned = await victim.take(3)
        await victim.kill()

        def crashed(history: History, ended: Ended) -> History:
            if ended is Ended.RETURNED:
                return history
            return replace(history, strikes=history.strikes + 1, alone=True)

        heir = await lab.reader(on_crash=crashed)
        await heir.consumer.recover([Left(started.token, Ended.STARTED), Left(returned.token, Ended.RETURNED)])
        heir.demand(3)
        found = {d.position: d for d in await heir.take(3, within=3)}
        assert found[started.position].history == History(strikes=1, alone=True)
        assert found[waiting.position].history == found[returned.position].history == FRESH
        assert not any(d.redelivered for d in found.values())


@pytest.mark.parametrize("read", [4, 0])
async def test_unread_events_that_were_trimmed_are_told(both: Rig, raw: Any, read: int) -> None:
    async with both.lab() as lab:
        await lab.publish_many(10, "agent.started", channel="events")
        reader = await lab.reader("auditor", free=read)
        await reader.settle_all(await reader.take(read))
        address = lab.channel("events").address
        await raw.xtrim(address, maxlen=2, approximate=False)
        reader.demand(1)
        await reader.settle(await reader.take_one())
        reader.demand(1)
        await reader.settle(await reader.take_one())
        if lab.connection.version >= (7,):
            lost = 10 - 2 - read
            assert reader.alarms == [f"{lost} unread events were trimmed from {address} before auditor read them"]
            assert (await lab.lag("auditor")).unread_lost == lost
        else:
            assert len(reader.alarms) == 1
            assert "number unknown" in reader.alarms[0]
            assert (await lab.lag("auditor")).unread_lost == -1


async def test_a_queue_that_ages_tells_what_it_loses(both: Rig) -> None:
    async with both.lab(tasks={"retention": Retention(max_age=0.5)}) as lab:
        reader = await lab.reader()
        await lab.publish_many(3)
        await elapse(0.8)
        reader.demand(1)
        await lab.publish()
        await reader.settle(await reader.take_one())
        await eventually(lambda: reader.alarms, what="an alarm")
        assert reader.alarms[0].startswith("3 unread events were trimmed")


async def test_a_log_that_refuses_makes_room_of_what_all_have_handled(both: Rig) -> None:
    bounds = {"retention": Retention(max_events=3), "overflow": Overflow.REJECT}
    async with both.lab(events=bounds) as lab:
        await lab.publish_many(3, "agent.started", channel="events")
        with pytest.raises(Exception, match="full"):
            await lab.publish("agent.started", channel="events")
        auditor, watcher = await lab.reader("auditor", free=2), await lab.reader("watcher", free=1)
        await auditor.settle_all(await auditor.take(2))
        with pytest.raises(Exception, match="full"):
            await lab.publish("agent.started", channel="events")
        await watcher.settle(await watcher.take_one())
        await lab.publish("agent.started", channel="events")
        with pytest.raises(Exception, match="full"):
            await lab.publish("agent.started", channel="events")
        assert (auditor.alarms, watcher.alarms) == ([], [])


async def test_events_of_other_types_in_a_queue_stay_for_their_reader(rig: Rig) -> None:
    async with rig.lab(tasks={"events": ("task.*", "crawl.*")}) as lab:
        other = await lab.publish("crawl.page")
        mine = await lab.publish()
        reader = await lab.reader(free=5)
        delivery = await reader.take_one()
        assert delivery.body == mine.body
        await reader.settle(delivery)
        await eventually(lambda: _empty(lab), what="nothing pending")
        assert [s.body for s in await lab.stored("tasks")] == [other.body]


async def _empty(lab: Lab) -> bool:
    lag = await lab.lag()
    return lag.waiting == 0 and lag.in_flight == 0
