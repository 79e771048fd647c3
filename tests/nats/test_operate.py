"""What operators ask: browse and follow without disturbing anyone, remove, lag, replay, facts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator.brokers.base import History, Stored
from orchestrator.brokers.embedded.server import binary
from orchestrator.errors import RefusedError, ResourceMissing
from tests.nats.rig import finished, rig, topology, until
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer


async def test_browse_reads_in_order_and_disturbs_no_queue(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        messages = [made.event() for _ in range(600)]  # more than two pages
        for message in messages:
            made.connection.producer().send(message, lambda error: None)
        await made.publish(made.event("task.created"))
        everything = [s async for s in made.connection.browse(made.channel("tasks"), start="earliest")]
        assert [s.body for s in everything[:600]] == [m.body for m in messages]
        some = [
            s async for s in made.connection.browse(made.channel("tasks"), start="earliest", events=("task.created",))
        ]
        assert [(s.event_type, s.position) for s in some] == [("task.created", everything[600].position)]
        assert [s async for s in made.connection.browse(made.channel("tasks"), start="latest")] == []
        consumer, sink = await made.consumer()
        consumer.demand(1)
        (got,) = await sink.take()
        assert not got.redelivered
        assert got.position == everything[0].position
        await consumer.close()


async def test_browse_from_a_time(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        await made.publish(made.event("agent.started", "events"))
        await asyncio.sleep(0.05)
        cut = datetime.now(UTC)
        await asyncio.sleep(0.05)
        late = made.event("agent.completed", "events")
        await made.publish(late)
        got = [s async for s in made.connection.browse(made.channel("events"), start=cut)]
        assert [s.body for s in got] == [late.body]


@pytest.mark.parametrize(("channel", "kind"), [("tasks", "task.assigned"), ("events", "agent.started")])
async def test_follow_sees_what_comes_though_it_is_settled_at_once(
    nats_server: NatsServer, channel: str, kind: str
) -> None:
    async with rig(nats_server.url) as made:
        old = made.event(kind, channel)
        await made.publish(old)
        seen: list[Stored] = []
        note = seen.append

        async def follow() -> None:
            async for stored in made.connection.browse(made.channel(channel), start="earliest", follow=True):
                note(stored)

        task = asyncio.create_task(follow())
        await until(lambda: len(seen) == 1, "the stored one")
        agent = "research" if channel == "tasks" else "audit"
        consumer, sink = await made.consumer(agent)
        sink.on_delivery = lambda d: consumer.settle(d, [], lambda error: None)
        consumer.demand(50)
        fresh = [made.event(kind, channel) for _ in range(20)]
        await made.publish(*fresh)
        await until(lambda: len(seen) == 21, "the new ones")
        assert {s.body for s in seen[1:]} == {m.body for m in fresh}
        assert {s.event_type for s in seen} == {kind}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await consumer.close()


@pytest.mark.parametrize("ask", ["request", "_page"])
async def test_cancelling_in_the_moment_of_the_answer_is_not_forgotten(nats_server: NatsServer, ask: str) -> None:
    async with rig(nats_server.url) as made:
        link = made.connection.link
        call = link.request(f"{link.api_root}INFO") if ask == "request" else link._page("KV_x", 1, ">")
        task = asyncio.create_task(call)  # type: ignore[arg-type]
        heard = link._on_reply

        def answered(*message: Any) -> None:
            heard(*message)
            task.cancel()

        (sid,) = [sid for sid, receive in link.client.direct.items() if receive == heard]
        link.client.direct[sid] = answered
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.cancelled()


async def test_remove_deletes_single_events_and_counts_them(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        letters = made.channel("letters")
        await made.publish(*(made.event("task.x", "letters", headers={"dlq-agent": "research"}) for _ in range(3)))
        got = [s async for s in made.connection.browse(letters, start="earliest", dead_letters=True)]
        positions = [got[0].position, got[2].position, f"{letters.address}:999", "nonsense"]
        assert await made.connection.remove(letters, positions) == 2
        assert await made.connection.remove(letters, positions) == 0
        assert await made.connection.count(letters) == 1


async def test_lag_tells_waiting_running_and_delayed_apart(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        consumer, sink = await made.consumer()
        await made.publish(*(made.event() for _ in range(5)))
        await asyncio.sleep(0.2)
        consumer.demand(2)
        failed, _running = await sink.take(2)
        history = History(attempts=1, not_before=time.time() + 60)
        await finished(consumer.retry, failed, history, 60.0)
        subscription = made.subscription("research")
        lag = (await made.connection.lag([subscription]))["research", "tasks"]
        assert (lag.waiting, lag.in_flight, lag.delayed) == (3, 1, 1)
        assert 0.1 < lag.oldest_s < 20
        await consumer.close()


async def test_seek_replays_a_log(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        subscription = made.subscription("audit")
        messages = [made.event("agent.started", "events") for _ in range(3)]
        for message in messages:
            await made.publish(message)
            await asyncio.sleep(0.02)
        at = [s async for s in made.connection.browse(made.channel("events"), start="earliest")][1].time
        for start, expected in (("earliest", 3), ("latest", 0), (datetime.fromtimestamp(at - 0.005, UTC), 2)):
            await made.connection.seek(subscription, start)  # type: ignore[arg-type]
            consumer, sink = await made.consumer("audit")
            consumer.demand(8)
            got = await sink.take(expected)
            assert [d.body for d in got] == [m.body for m in messages[3 - expected :]]
            for delivery in got:
                await finished(consumer.settle, delivery, [])
            await consumer.close()
        with pytest.raises(RefusedError, match="queue"):
            await made.connection.seek(made.subscription("research"), "earliest")


async def test_seek_without_a_subscription_says_which_and_what_to_do(nats_server: NatsServer) -> None:
    async with rig(nats_server.url, apply=False) as made:
        with pytest.raises(ResourceMissing, match="agent audit has no subscription to channel events") as caught:
            await made.connection.seek(made.subscription("audit"), "earliest")
        assert "orchestrator apply" in str(caught.value.hint)


async def test_facts_and_cluster_id(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        assert await made.connection.cluster_id() == "test"
        facts = {f.name: f for f in await made.connection.facts()}
        assert facts["nats-server"].value.startswith("2.")
        assert abs(float(facts["clock difference"].value.split()[0])) < 1
        assert "sync_interval" in facts


async def test_unread_events_that_were_trimmed_are_said(nats_server: NatsServer) -> None:
    async with rig(nats_server.url) as made:
        stream = made.channel("events").address
        config = (await made.connection.link.api(f"STREAM.INFO.{stream}"))["config"]
        await made.connection.link.api(f"STREAM.UPDATE.{stream}", {**config, "max_msgs": 2})
        await made.publish(*(made.event("agent.started", "events") for _ in range(5)))
        consumer, sink = await made.consumer("audit")
        await until(lambda: sink.alarms, "the loss was told")
        assert "3 unread" in sink.alarms[0]
        consumer.demand(8)
        for got in await sink.take(2):
            await finished(consumer.settle, got, [])
        await consumer.close()
        consumer, sink = await made.consumer("audit")
        lag = (await made.connection.lag([made.subscription("audit")]))["audit", "events"]
        assert lag.unread_lost == 3
        assert not sink.alarms
        await consumer.close()


async def test_prefix_may_be_empty() -> None:
    server = NatsServer().start()
    try:
        plan = topology(server.url, prefix="")
        async with rig(server.url, replace(plan, description="no prefix")) as made:
            consumer, sink = await made.consumer()
            consumer.demand(1)
            await made.publish(made.event())
            (got,) = await sink.take()
            assert got.event_type == "task.assigned"
            await consumer.close()
    finally:
        server.close()


def test_binary_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_NATS_SERVER", "/nowhere/nats-server")
    with pytest.raises(Exception, match="/nowhere/nats-server"):
        binary()
