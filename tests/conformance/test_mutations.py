"""Does the suite notice? Each test takes one mechanism out and expects a check of the suite to go red.

The mechanisms are patched at the border (Producer, Consumer), so the same mutation runs on every broker; crew_worker.py
patches those of the runtime inside real workers. tests/README.md has the table promise -> check -> mutation.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.brokers.base import FRESH, Consumer, Delivery, Done, Ended, History, Left, Outgoing
from orchestrator.errors import PublishRejected

from . import (
    crew,
    test_consume,
    test_dead_letters,
    test_operate,
    test_publish,
    test_retry,
    test_settle,
    test_takeover,
    test_worker,
)
from . import rig as kit
from .rig import Rig

Patch = pytest.MonkeyPatch
Check = Callable[..., Awaitable[None]]

#: What a red check raises: its own assertion, or a wait that ran out.
RED = (AssertionError, TimeoutError)


async def parts(rig: Rig) -> tuple[type, type, type]:
    """The classes of this broker's Producer, Consumer and Connection."""
    async with rig.lab(apply=False) as lab:
        consumer = lab.connection.consumer(lab.subscription("worker"), slot="worker.0")
        return type(lab.connection.producer()), type(consumer), type(lab.connection)


@asynccontextmanager
async def goes_red(check: Check, *arguments: Any, at_most: float = math.inf) -> AsyncIterator[None]:
    """The check is green before the block, and red with what the block takes out. One that goes red by waiting in vain
    waits as long as the green one took, and some more: no machine is so slow that it is red for that."""
    begin = time.monotonic()
    await check(*arguments)
    patience = min(time.monotonic() - begin + 2.0, at_most)
    yield
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(kit, "PATIENCE", patience)
        try:
            await check(*arguments)
        except RED:
            return
    pytest.fail(f"{check.__name__} stays green without the mechanism that it is there for")


def renamed(message: Outgoing) -> Outgoing:
    return replace(message, message_id=uuid.uuid4().hex)


# --- publishing -----------------------------------------------------------------------------------------------


async def test_without_dedup_ids_doubles_are_noticed(rig: Rig, monkeypatch: Patch) -> None:
    producer, _, _ = await parts(rig)
    send = producer.send
    async with goes_red(test_publish.test_the_same_id_within_the_window_must_take_effect_once, rig):
        monkeypatch.setattr(producer, "send", lambda self, message, done: send(self, renamed(message), done))


async def test_confirming_too_early_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    producer, _, _ = await parts(rig)
    send = producer.send

    def hasty(self: Any, message: Outgoing, done: Done) -> None:
        send(self, message, lambda error: None)
        done(None)

    async with goes_red(test_publish.test_what_is_sent_while_the_broker_is_away_must_arrive_once, rig):
        monkeypatch.setattr(producer, "send", hasty)


# --- settling -------------------------------------------------------------------------------------------------


async def test_settling_before_the_outputs_are_safe_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, consumer, _ = await parts(rig)
    settle = consumer.settle

    def careless(self: Consumer, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        """Settles first, and then finds that an output is refused."""
        settle(self, delivery, (), lambda error: done(PublishRejected("refused")))

    async with goes_red(test_settle.test_an_output_that_is_refused_leaves_the_event_unsettled, rig):
        monkeypatch.setattr(consumer, "settle", careless)


async def test_not_settling_at_all_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, consumer, _ = await parts(rig)
    async with goes_red(test_settle.test_a_settled_event_never_comes_again, rig):
        monkeypatch.setattr(consumer, "settle", lambda self, delivery, outputs, done: done(None))


async def test_a_letter_with_an_id_of_its_own_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, consumer, _ = await parts(rig)
    settle = consumer.settle

    def anew(self: Consumer, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        settle(self, delivery, [renamed(output) for output in outputs], done)

    async with goes_red(test_dead_letters.test_a_letter_written_before_the_crash_is_not_doubled, rig):
        monkeypatch.setattr(consumer, "settle", anew)


# --- retrying and history -------------------------------------------------------------------------------------


async def test_a_history_that_is_not_stored_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, consumer, _ = await parts(rig)
    retry = consumer.retry
    async with goes_red(test_retry.test_a_retry_brings_its_whole_history, rig):
        monkeypatch.setattr(
            consumer, "retry", lambda self, delivery, history, delay, done: retry(self, delivery, FRESH, delay, done)
        )


async def test_a_retry_that_does_not_wait_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, consumer, _ = await parts(rig)
    retry = consumer.retry

    def hasty(self: Consumer, delivery: Delivery, history: History, delay: float, done: Done) -> None:
        retry(self, delivery, replace(history, not_before=0.0), 0.0, done)

    async with goes_red(test_retry.test_a_retry_comes_when_it_is_due, rig, time.monotonic, 5.0):
        monkeypatch.setattr(consumer, "retry", hasty)


async def test_a_retry_that_holds_its_slot_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    """As a worker that sleeps until the retry is due: the event stays in its slot."""
    _, consumer, _ = await parts(rig)
    demand = consumer.demand
    async with goes_red(test_retry.test_a_waiting_retry_holds_no_slot_and_blocks_no_neighbour, rig):
        monkeypatch.setattr(consumer, "retry", lambda self, delivery, history, delay, done: done(None))
        monkeypatch.setattr(consumer, "demand", lambda self, free: demand(self, max(0, free - 1)))


async def test_a_mark_that_is_not_stored_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, consumer, _ = await parts(rig)
    async with goes_red(test_retry.test_a_history_marked_before_the_run_is_kept, rig):
        monkeypatch.setattr(consumer, "mark", lambda self, delivery, history, done: done(None))


# --- demand, leases, takeover ---------------------------------------------------------------------------------


async def test_fetching_more_than_was_asked_for_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, consumer, _ = await parts(rig)
    demand = consumer.demand
    async with goes_red(test_consume.test_no_more_is_handed_out_than_there_are_free_slots, rig):
        monkeypatch.setattr(consumer, "demand", lambda self, free: demand(self, free + 8))


async def test_a_lease_that_never_ends_is_noticed(rig: Rig, short_lease: float, monkeypatch: Patch) -> None:
    """Takeover: what a killed worker held stays with it."""
    check = test_takeover.test_what_a_killed_worker_held_goes_to_another
    async with goes_red(check, rig, short_lease, at_most=rig.driver.long_lease / 2):
        for constant in rig.driver.lease_constants:
            monkeypatch.setattr(constant.replace(":", "."), rig.driver.long_lease)


async def test_a_journal_that_is_not_told_to_the_broker_is_noticed(
    rig: Rig, lasting_lease: None, monkeypatch: Patch
) -> None:
    _, consumer, _ = await parts(rig)

    async def forget(self: Consumer, left: Sequence[Left]) -> None:
        """Recovers nothing."""

    check = test_takeover.test_a_successor_stores_what_the_crash_means_and_gives_it_back_at_once
    async with goes_red(check, rig, lasting_lease, Ended.STARTED):
        monkeypatch.setattr(consumer, "recover", forget)


MECHANISMS: dict[str, Check] = {
    "renewal": test_takeover.test_a_long_handler_keeps_its_event,
    "guardian": test_takeover.test_keep_alive_holds_the_lease_while_the_loop_is_blocked,
    "fencing": test_takeover.test_a_zombies_late_settlement_is_refused_or_harmless,
    "watermark": test_settle.test_events_settled_out_of_order_leave_exactly_the_others,
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_an_adapter_without_its_mechanism_is_noticed(
    rig: Rig, short_lease: float, monkeypatch: Patch, mechanism: str
) -> None:
    with monkeypatch.context() as tried:
        if why := rig.driver.without(mechanism, tried):
            pytest.skip(why)
    lease = () if mechanism == "watermark" else (short_lease,)
    async with goes_red(MECHANISMS[mechanism], rig, *lease):
        rig.driver.without(mechanism, monkeypatch)


# --- operating ------------------------------------------------------------------------------------------------


async def test_a_redrive_by_publishing_again_is_noticed(rig: Rig, monkeypatch: Patch) -> None:
    _, _, connection = await parts(rig)

    async def publish(self: Any, subscription: Any, message: Outgoing) -> None:
        done, future = kit.outcome()
        self.producer().send(message, done)
        await future

    async with goes_red(test_operate.test_a_redrive_reaches_the_failing_subscription_alone, rig):
        monkeypatch.setattr(connection, "redrive", publish)


# --- the runtime, in real workers -----------------------------------------------------------------------------


@pytest.fixture
def workers(rig: Rig) -> Rig:
    if not rig.driver.processes:
        pytest.skip("one process: there are no workers to be killed")
    return rig


async def test_uncounted_crashes_are_noticed(workers: Rig) -> None:
    async with goes_red(test_worker.test_a_handler_that_kills_its_process_dies_alone, workers):
        crew.MUTATION.set("crash count")


async def test_blaming_the_neighbours_is_noticed(workers: Rig) -> None:
    async with goes_red(test_worker.test_a_handler_that_kills_its_process_dies_alone, workers):
        crew.MUTATION.set("suspects run alone")


async def test_settling_before_the_handler_is_noticed(workers: Rig) -> None:
    async with goes_red(test_worker.test_a_worker_killed_inside_the_handler_loses_nothing, workers, "die in handler"):
        crew.MUTATION.set("settling after the handler")
