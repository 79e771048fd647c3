"""A worker that ends badly or stands still: what it held goes to others, once its lease is over and not before."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from orchestrator.brokers.base import FRESH, Ended, History, Left
from orchestrator.errors import BrokerUnavailable

from .rig import Lab, Rig, elapse, eventually


async def unsettled(lab: Lab) -> int:
    lag = await lab.lag()
    return sum(max(0, number) for number in (lag.waiting, lag.in_flight, lag.delayed))


async def test_what_a_killed_worker_held_goes_to_another(rig: Rig, short_lease: float) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        victim = await lab.victim()
        await victim.take()
        await victim.kill()
        other = await lab.reader(free=1)
        again = await other.take_one()
        assert (again.body, again.redelivered) == (sent.body, True)


async def test_what_a_frozen_worker_held_goes_to_another(rig: Rig, short_lease: float) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        victim = await lab.victim()
        await victim.take()
        await victim.freeze()
        other = await lab.reader(free=1)
        assert (await other.take_one()).body == sent.body


async def test_a_history_is_known_to_whoever_takes_over(rig: Rig, short_lease: float) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1, slot="worker.9")
        await reader.retry(await reader.take_one(), History(attempts=2, error="first"), 0.5)
        await reader.consumer.close()
        victim = await lab.victim()
        await victim.take()
        await victim.kill()
        other = await lab.reader(free=1)
        again = await other.take_one()
        assert (again.history.attempts, again.history.error) == (2, "first")


async def test_a_mark_is_known_to_whoever_takes_over(rig: Rig, short_lease: float) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        victim = await lab.victim()
        (held,) = await victim.take()
        await victim.mark(held.position, History(attempts=1, open=True))
        await victim.kill()
        other = await lab.reader(free=1)
        again = await other.take_one()
        assert (again.history.attempts, again.history.open) == (1, True)


async def test_a_zombies_late_settlement_is_refused_or_harmless(rig: Rig, short_lease: float) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        victim = await lab.victim()
        (held,) = await victim.take()
        await victim.freeze()
        other = await lab.reader(free=2)
        again = await other.take_one()
        await victim.thaw()
        refused = await victim.settle(held.position)
        # Where it cannot be refused, its output has the id that the new holder's has too.
        output = lab.message("agent.done", channel="events", body=b"{}", event_id=f"done:{held.position}")
        assert not rig.capabilities.atomic_settle or refused
        await other.settle(again, output)
        auditor = await lab.reader("auditor", free=5)
        assert (await auditor.take_one()).body == b"{}"
        last = await lab.publish("agent.last", channel="events")
        assert (await auditor.take_one()).body == last.body
        await eventually(lambda: gone(lab), what=f"{sent.event_id} settled for good")


async def gone(lab: Lab) -> bool:
    return await unsettled(lab) == 0


async def test_a_long_handler_keeps_its_event(rig: Rig, short_lease: float) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        holder = await lab.reader(free=1)
        delivery = await holder.take_one()
        hungry = await lab.reader(free=5)
        await elapse(4 * short_lease)
        assert sent.body not in [d.body for d in hungry.seen]
        await holder.settle(delivery)
        await eventually(lambda: gone(lab), what="settled by its first holder")


async def test_keep_alive_holds_the_lease_while_the_loop_is_blocked(rig: Rig, short_lease: float) -> None:
    if not rig.driver.processes:
        pytest.skip("one process and one loop: nobody else could take it meanwhile")
    async with rig.lab() as lab:
        await lab.publish()
        holder = await lab.reader(free=1, slot="worker.0")
        delivery = await holder.take_one()
        hungry = await lab.victim(free=5, slot="worker.1")
        blocked(lambda: holder.consumer.keep_alive(), 4 * short_lease, every=short_lease / 3)
        try:
            await holder.settle(delivery)
        except BrokerUnavailable as error:
            raise AssertionError("its event was taken away while the loop was blocked") from error
        await holder.consumer.close()
        last = await lab.publish()
        assert [held.body for held in await hungry.take()] == [last.body]


def blocked(keep_alive: object, seconds: float, *, every: float) -> None:
    """Blocks the event loop, as a bad handler does, while the guardian thread does its duty."""
    over = threading.Event()

    def guard() -> None:
        while not over.wait(every):
            keep_alive()  # type: ignore[operator]

    guardian = threading.Thread(target=guard)
    guardian.start()
    time.sleep(seconds)
    over.set()
    guardian.join()


STRUCK = History(attempts=1, strikes=1, alone=True, error="crashed")


@pytest.mark.parametrize("ended", [Ended.STARTED, Ended.STARTED_ALONE, Ended.BLAMED])
async def test_a_successor_stores_what_the_crash_means_and_gives_it_back_at_once(
    rig: Rig, lasting_lease: None, ended: Ended
) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish()
        victim = await lab.victim(slot="worker.0")
        (held,) = await victim.take()
        await victim.kill()
        asked: list[tuple[History, Ended]] = []

        def on_crash(history: History, how: Ended) -> History:
            asked.append((history, how))
            return STRUCK

        successor = await lab.reader(slot="worker.0", on_crash=on_crash)
        await successor.consumer.recover([Left(held.token, ended)])
        successor.demand(1)
        again = await successor.take_one()
        assert asked == [(FRESH, ended)]
        assert (again.body, replace(again.history, not_before=0.0)) == (sent.body, STRUCK)


async def test_what_had_returned_is_given_back_as_the_policy_says(rig: Rig, lasting_lease: None) -> None:
    """Which takes nothing but a mark away."""
    asked = []

    def on_crash(history: History, how: Ended) -> History:
        asked.append((history, how))
        return history

    async with rig.lab() as lab:
        sent = await lab.publish()
        victim = await lab.victim(slot="worker.0")
        (held,) = await victim.take()
        await victim.kill()
        successor = await lab.reader(slot="worker.0", on_crash=on_crash)
        await successor.consumer.recover([Left(held.token, Ended.RETURNED)])
        assert asked == [(FRESH, Ended.RETURNED)]
        successor.demand(1)
        again = await successor.take_one()
        assert (again.body, again.history) == (sent.body, FRESH)


async def test_a_crash_adds_to_the_history_that_was_there(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        first = await lab.reader(free=1, slot="worker.9")
        await first.retry(await first.take_one(), History(attempts=1, error="before"), 0.3)
        await first.consumer.close()
        victim = await lab.victim(slot="worker.0")
        (held,) = await victim.take()
        await victim.kill()

        def on_crash(history: History, how: Ended) -> History:
            return replace(history, attempts=history.attempts + 1)

        successor = await lab.reader(slot="worker.0", on_crash=on_crash)
        await successor.consumer.recover([Left(held.token, Ended.STARTED)])
        successor.demand(1)
        again = await successor.take_one()
        assert (again.history.attempts, again.history.error) == (2, "before")


async def test_settled_and_unknown_tokens_are_ignored(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        first = await lab.reader(free=1, slot="worker.0")
        delivery = await first.take_one()
        await first.settle(delivery)
        await first.consumer.close()
        successor = await lab.reader(slot="worker.0")
        await successor.consumer.recover([Left(delivery.token, Ended.RETURNED)])
        successor.demand(1)
        last = await lab.publish()
        assert (await successor.take_one()).body == last.body


def _strike(history: History, how: Ended) -> History:
    return history if how is Ended.RETURNED else STRUCK


async def test_several_left_behind_are_each_given_back(rig: Rig, lasting_lease: None) -> None:
    async with rig.lab() as lab:
        sent = await lab.publish_many(4)
        victim = await lab.victim(slot="worker.0", free=4)
        held = await victim.take(4)
        await victim.kill()
        successor = await lab.reader(slot="worker.0", on_crash=_strike)
        left = [Left(one.token, Ended.STARTED) for one in held[:2]]
        left += [Left(one.token, Ended.RETURNED) for one in held[2:]]
        await successor.consumer.recover(left)
        successor.demand(4)
        again = await successor.take(4)
        by_body = {d.body: d.history.strikes for d in again}
        assert by_body == {m.body: int(m.body in {h.body for h in held[:2]}) for m in sent}
