"""One script publishes and settles: all of it, or none, and only for who holds the entry."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.brokers.redis import scripts
from orchestrator.errors import BrokerUnavailable, PublishRejected
from tests.conformance.rig import Lab, Reader, Rig, eventually, finished, outcome


async def pending(raw: Any, lab: Lab) -> int:
    found = await raw.xpending(lab.channel("tasks").address, lab.subscription("worker").group)
    return int(found["pending"])


async def test_a_refused_output_takes_the_others_back(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        wrong = replace(lab.channel("dead"), address=f"{{{lab.topology.name}}}:text")
        await raw.set(wrong.address, "not a stream")
        good, bad = lab.message("agent.done", channel="events"), lab.message(channel="dead")
        bad.channel = wrong
        with pytest.raises(PublishRejected, match="not a stream"):
            await reader.settle(delivery, good, bad)
        assert await lab.stored("events") == []
        assert await pending(raw, lab) == 1
        await reader.settle(delivery, good)  # the same id again: it had left no trace
        assert len(await lab.stored("events")) == 1
        assert await raw.xlen(lab.channel("tasks").address) == 0
        await raw.delete(wrong.address)


async def test_an_error_after_the_first_output_takes_it_back(
    own_rig: Rig, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second XADD fails where no look beforehand could have known: its stream's ids are used up."""
    async with own_rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await raw.execute_command("XSETID", lab.channel("dead").address, f"{2**64 - 1}-{2**64 - 1}")
        outputs = lab.message("agent.done", channel="events"), lab.message(channel="dead")
        with pytest.raises(PublishRejected):
            await reader.settle(delivery, *outputs)
        assert await lab.stored("events") == []
        assert await pending(raw, lab) == 1


async def zombie(lab: Lab, raw: Any) -> tuple[Reader, int, BaseException | None]:
    """A worker loses its event to another and settles it all the same: what came out, what it was told."""
    await lab.publish()
    slow, quick = await lab.reader(free=1), await lab.reader()
    delivery = await slow.take_one()
    entry = delivery.position.rpartition(":")[2]
    await raw.xclaim(
        lab.channel("tasks").address, lab.subscription("worker").group, quick.consumer.me, 0, [entry], justid=True
    )
    done, future = outcome()
    slow.consumer.settle(delivery, [lab.message("agent.late", channel="events")], done)
    await asyncio.wait([future], timeout=10)
    return slow, len(await lab.stored("events")), future.exception()


async def test_who_was_relieved_cannot_settle(both: Rig, raw: Any) -> None:
    async with both.lab() as lab:
        slow, outputs, error = await zombie(lab, raw)
        assert outputs == 0
        assert isinstance(error, BrokerUnavailable)
        assert [d.position for d in slow.lost] == [d.position for d in slow.seen]
        assert await pending(raw, lab) == 1


async def test_without_the_fence_that_would_be_seen(rig: Rig, raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the same scenario with the script's ownership check taken out."""
    fence = "if why and not force then return why end"
    assert fence in scripts.COMMIT
    monkeypatch.setattr(scripts, "COMMIT", scripts.COMMIT.replace(fence, "why = nil"))
    async with rig.lab() as lab:
        _, outputs, error = await zombie(lab, raw)
        assert (outputs, error) == (1, None)


async def test_a_settlement_whose_answer_was_lost_takes_effect_once(own_rig: Rig, raw: Any) -> None:
    """The server works on while its answers go nowhere: what is sent again must find itself done."""
    async with own_rig.lab() as lab:
        await lab.publish_many(50)
        reader = await lab.reader(free=50)
        deliveries = await reader.take(50)
        futures = []
        for delivery in deliveries:
            done, future = outcome()
            output = lab.message("agent.done", channel="events")
            reader.consumer.settle(delivery, [output], done)
            futures.append(future)
            if len(futures) % 10 == 0:
                await asyncio.sleep(0)
                await raw.client_kill_filter(_type="normal", skipme=True)
        for future in futures:
            await finished(future)
        assert len(await lab.stored("events")) == 50
        assert await pending(raw, lab) == 0


async def test_a_server_that_forgot_the_scripts_is_told_them_again(own_rig: Rig, raw: Any) -> None:
    async with own_rig.lab() as lab:
        reader = await lab.reader(free=2)
        for _ in range(2):
            await lab.publish_many(2)
            await raw.script_flush()
            plain, writing = await reader.take(2)
            await asyncio.gather(
                reader.settle(plain), reader.settle(writing, lab.message("agent.done", channel="events"))
            )
            reader.demand(2)
        assert (len(await lab.stored("events")), await pending(raw, lab)) == (2, 0)
        assert reader.troubles in ([], [None])


async def test_no_memory_refuses_outputs_and_holds_what_must_not_be_lost(own_rig: Rig, raw: Any) -> None:
    async with own_rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await raw.config_set("maxmemory", "500kb")
        with pytest.raises(PublishRejected, match="OOM"):
            await reader.settle(delivery, lab.message("agent.done", channel="events"))
        done, future = outcome()
        reader.consumer.retry(delivery, replace(delivery.history, attempts=1), 0.0, done)
        await eventually(lambda: reader.troubles and "OOM" in str(reader.troubles[-1]), what="the trouble is told")
        assert not future.done()
        await raw.config_set("maxmemory", "0")
        await finished(future)
        reader.demand(1)
        assert (await reader.take_one()).history.attempts == 1
        assert reader.troubles[-1] is None
