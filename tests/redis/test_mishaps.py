"""Rare moments of a consumer: clocks that are set, answers that cross, servers that stand still at the end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.brokers.base import Ended, History, Left
from orchestrator.brokers.redis import adapter, settling
from orchestrator.brokers.redis import consumer as consuming
from orchestrator.brokers.redis import reading_scripts as scripts
from orchestrator.brokers.redis.link import Link, Wire
from orchestrator.brokers.redis.pump import Op, Pump
from orchestrator.errors import OrchestratorError
from tests.conformance.driver_redis import RedisDriver
from tests.conformance.rig import Lab, Rig, elapse, eventually, outcome
from tests.patience import PATIENCE

CLOCK = "local clock = redis.call('TIME')"


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "LEASE", 1.0)


def group_of(lab: Lab) -> tuple[str, str]:
    return lab.channel("tasks").address, lab.subscription("worker").group


def beat_key(lab: Lab) -> str:
    stream, group = group_of(lab)
    return f"{stream}:g:{group}:beat"


async def test_a_clock_that_is_set_relieves_nobody_alive(
    both: Rig, raw: Any, short_lease: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with both.lab() as lab:
        await lab.publish()
        busy = await lab.reader(free=1)
        await busy.take_one()
        other = await lab.reader(free=1)
        await elapse(2.0)  # long enough to judge others
        assert CLOCK in scripts.BEAT
        jumped = scripts.BEAT.replace(CLOCK, f"{CLOCK}; clock[1] = clock[1] + 3600")
        monkeypatch.setattr(scripts, "BEAT", jumped)
        await other.consumer._beat()  # type: ignore[attr-defined]
        await elapse(1.0)
        assert (other.seen, busy.lost) == ([], [])


async def test_a_clock_that_was_set_back_spares_no_dead(both: Rig, raw: Any, short_lease: None) -> None:
    async with both.lab() as lab:
        await lab.publish()
        victim = await lab.victim()
        await victim.take()
        await victim.kill()
        (name,) = [c["name"] for c in await raw.xinfo_consumers(*group_of(lab)) if c["pending"]]
        await raw.zadd(beat_key(lab), {name: (time.time() + 3600) * 1000})
        other = await lab.reader(free=1)
        await other.take_one(within=8)


async def test_names_that_never_read_are_forgotten(both: Rig, raw: Any, short_lease: None) -> None:
    async with both.lab() as lab:
        await raw.zadd(beat_key(lab), {"gone-before-it-read": (time.time() - 60) * 1000})
        await lab.reader()

        async def forgotten() -> bool:
            return await raw.zscore(beat_key(lab), "gone-before-it-read") is None

        await eventually(forgotten, what="a forgotten name")


async def test_a_dead_worker_is_relieved_of_its_redrives_at_once(both: Rig, raw: Any) -> None:
    """It held one event of the stream and two redrives; the journal names one of these, the other had not started."""
    async with both.lab() as lab:
        await lab.publish()
        for _ in range(2):
            await lab.connection.redrive(lab.subscription("worker"), lab.message())
        victim = await lab.victim(free=3)
        seen = await victim.take(3)
        await victim.kill()
        (started,) = [one for one in seen if one.token.startswith(b"0 ")]
        heir = await lab.reader(on_crash=lambda history, ended: History(attempts=1))
        await heir.consumer.recover([Left(started.token, Ended.STARTED)])
        heir.demand(3)
        found = await heir.take(3, within=3)
        assert not any(delivery.redelivered for delivery in found)


async def test_a_destroyed_inbox_group_is_made_again(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        stream, group = group_of(lab)
        reader = await lab.reader(free=1)
        await lab.connection.redrive(lab.subscription("worker"), lab.message())
        await reader.settle(await reader.take_one())
        await raw.xgroup_destroy(f"{stream}:g:{group}:inbox", group)
        reader.demand(1)
        await lab.publish()
        await reader.settle(await reader.take_one())
        reader.demand(1)
        await lab.connection.redrive(lab.subscription("worker"), lab.message())
        await reader.settle(await reader.take_one())


async def test_a_deleted_inbox_is_told(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        stream, group = group_of(lab)
        reader = await lab.reader(free=1)
        await lab.connection.redrive(lab.subscription("worker"), lab.message())
        delivery = await reader.take_one()
        await reader.retry(delivery, History(attempts=1), 1.0)
        await raw.delete(f"{stream}:g:{group}:inbox")
        reader.demand(1)
        await lab.publish()
        await reader.settle(await reader.take_one())
        await eventually(lambda: reader.alarms, what="an alarm")
        assert reader.alarms[0].startswith("1 events that waited to run again were deleted")


async def test_an_event_deleted_under_a_dead_worker_is_told(rig: Rig, raw: Any, short_lease: None) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        victim = await lab.victim()
        (delivery,) = await victim.take()
        await victim.kill()
        await raw.xdel(lab.channel("tasks").address, delivery.position.rpartition(":")[2])
        reader = await lab.reader(free=1)
        await eventually(lambda: reader.alarms, within=8, what="an alarm")
        assert reader.alarms[0].startswith("1 events that waited to run again were deleted")


async def test_what_was_given_back_meanwhile_is_not_adopted(
    both: Rig, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of what is pending is old when it arrives: its entry was retried, and is handed out once more before
    the answer to it is sent."""
    async with both.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        call, add = Link.call, Pump.add
        crossed = False

        async def late(link: Link, key: str, *command: object) -> Any:
            nonlocal crossed
            answer = await call(link, key, *command)
            if command[0] == "XPENDING" and not crossed:
                crossed = True
                await reader.retry(delivery, History(attempts=1), 0.0)
                monkeypatch.setattr(Pump, "add", slow)
            return answer

        def slow(pump: Pump, op: Op) -> None:
            asyncio.get_running_loop().call_later(0.5, add, pump, op)

        monkeypatch.setattr(Link, "call", late)
        reader.demand(1)
        again = await reader.take_one()
        await elapse(1.0)
        await reader.settle(again)
        assert (reader.lost, len(reader.seen)) == ([], 2)


async def test_a_mistake_of_ours_in_a_batch_spares_the_others(own_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script breaks in the middle of a batch: what it did before happened, and is not done again."""
    async with own_rig.lab() as lab:
        await lab.publish_many(3)
        reader = await lab.reader(free=3)
        deliveries = await reader.take(3)
        bad = lab.message("agent.done", channel="events")
        bad.headers = {f"x{n}": "v" for n in range(5000)}  # more than Lua can hand on
        futures: list[asyncio.Future[None]] = []
        for delivery, outputs in zip(deliveries, ((), (bad,), ()), strict=True):
            done, future = outcome()
            reader.consumer.settle(delivery, outputs, done)
            futures.append(future)
        found = await asyncio.gather(*futures, return_exceptions=True)
        assert (found[0], found[2], reader.lost) == (None, None, [])
        assert "too many" in str(found[1])


async def test_thousands_of_fields_can_still_be_a_dead_letter(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        hostile = {f"h{n}": "v" for n in range(5000)} | {"payload": b"a body"}
        await raw.xadd(lab.channel("tasks").address, hostile)
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        assert delivery.body == b"a body"
        await reader.settle(delivery, lab.letter(delivery))
        assert [letter.body for letter in await lab.letters()] == [b"a body"]


async def test_the_end_comes_though_the_server_stands_still(own_rig: Rig) -> None:
    async with own_rig.lab() as lab:
        reader = await lab.reader(free=1)
        await elapse(0.3)
        own_rig.driver.server.pause()
        try:
            await asyncio.wait_for(reader.consumer.close(), 12)
        finally:
            own_rig.driver.server.resume()
        assert [t for t in asyncio.all_tasks() if reader.consumer.me in t.get_name()] == []  # type: ignore[attr-defined]


async def test_a_mistake_while_reading_is_seen_and_passes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig.lab() as lab:
        reader = await lab.reader()
        monkeypatch.setattr(settling, "parse", lambda flat: 1 / 0)
        await lab.publish()
        reader.demand(1)
        await eventually(lambda: reader.troubles and "ZeroDivision" in str(reader.troubles[-1]), what="the trouble")
        monkeypatch.undo()
        await reader.take_one()


async def test_browsing_ends_though_events_keep_coming(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(300, "agent.started", channel="events")
        seen = 0
        async for _ in lab.connection.browse(lab.channel("events"), start="earliest"):
            seen += 1
            if seen % 100 == 0:
                await lab.publish_many(100, "agent.started", channel="events")
        assert seen == 300


async def test_a_backlog_is_counted_without_its_bodies(own_rig: Rig, raw: Any) -> None:
    async with own_rig.lab() as lab:
        for _ in range(10):
            await lab.publish("agent.started", channel="events", body=b"{" + b" " * 1_000_000 + b"}")
        before = (await raw.info("stats"))["total_net_output_bytes"]
        assert (await lab.lag("auditor")).waiting == 10
        assert (await raw.info("stats"))["total_net_output_bytes"] - before < 1_000_000


async def test_a_read_is_ended_once_however_often_demand_shrinks(own_rig: Rig, raw: Any) -> None:
    async with own_rig.lab() as lab:
        reader = await lab.reader(free=64)
        await elapse(0.5)
        for free in range(63, 0, -1):
            reader.demand(free)
        await elapse(0.1)
        assert (await raw.info("commandstats"))["cmdstat_client|unblock"]["calls"] <= 2


def test_half_a_password_is_not_repeated(tmp_path: Path) -> None:
    server: Any = type("Elsewhere", (), {"url": "redis://agents:top/secret@localhost:1"})()
    broker = Rig(RedisDriver(server), tmp_path).topology({}).brokers["main"]
    with pytest.raises(OrchestratorError) as caught:
        Link(broker, "test")
    assert "top" not in str(caught.value)


def test_an_option_that_the_library_does_not_know_is_named(tmp_path: Path) -> None:
    server: Any = type("Elsewhere", (), {"url": "redis://localhost:1"})()
    broker = Rig(RedisDriver(server), tmp_path).topology({}).brokers["main"]
    Link(replace(broker, client={"health_check_interval": 5}), "test")
    with pytest.raises(OrchestratorError, match="max_conections"):
        Link(replace(broker, client={"max_conections": 5}), "test")


async def test_cancelling_in_the_moment_of_the_answer_is_not_forgotten(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the task would hang."""
    async with rig.lab() as lab:
        topology, heard = lab.topology, Wire.data_received
        task: asyncio.Task[Any] = asyncio.create_task(
            adapter.connect(topology, topology.brokers["main"], name="cancelled")
        )

        def answered(wire: Wire, data: bytes) -> None:
            heard(wire, data)
            if wire._connection.client_name == "cancelled":
                task.cancel()

        monkeypatch.setattr(Wire, "data_received", answered)
        await asyncio.wait([task])
        assert task.cancelled()


async def test_cancelling_in_the_moment_when_all_is_sent_is_not_forgotten(rig: Rig) -> None:
    async with rig.lab() as lab:
        pump: Pump = lab.connection.pump(lab.channel("tasks").address)  # type: ignore[attr-defined]
        pump._idle.clear()
        task = asyncio.create_task(pump.flush(PATIENCE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        pump._idle.set()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
