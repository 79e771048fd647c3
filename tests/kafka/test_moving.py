"""Transactions whose end nobody heard of: they are found out about, and hold nobody up for good."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from orchestrator.brokers.kafka import moving, positions
from tests.conformance.rig import Rig, eventually

from .test_consuming import commits


@pytest.mark.parametrize("decided", [True, False])
async def test_a_commit_whose_answer_is_lost_moves_an_event_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, decided: bool
) -> None:
    calls: list[Producer] = []

    class Deaf(Producer):
        """The first of them never hears how its transaction ended."""

        def commit_transaction(self, *timeout: float) -> Any:
            if not calls:
                calls.append(self)
                if decided:
                    super().commit_transaction(*timeout)
            if calls[0] is self:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer", retriable=True))
            return super().commit_transaction(*timeout)

    monkeypatch.setattr(moving, "RawProducer", Deaf)
    monkeypatch.setattr(moving, "_INSIST", 0.2)
    async with rig.lab() as lab:
        await lab.publish_many(2)
        reader = await lab.reader(free=2)
        first, second = await reader.take(2)
        await reader.settle(first, lab.letter(first))
        assert calls, "the answer was lost"
        assert [one.body for one in await lab.letters()] == [first.body]
        await reader.settle(second)
        await eventually(lambda: reader.troubles[-1:] in ([], [None]), what="no trouble any more")
        topic = lab.channel("tasks").address

        async def finished() -> bool:
            return (await commits(lab, topic))[0].offset == 2

        await eventually(finished, what="a commit of both")


async def test_what_a_transaction_wrote_is_reported_before_it_is_ended(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended while a refusal is on its way, it is waited for as long as that is allowed to take."""
    unreported: list[int] = []

    class Watched(Producer):
        def send_offsets_to_transaction(self, *given: Any) -> Any:
            unreported.append(len(self))
            return super().send_offsets_to_transaction(*given)

    monkeypatch.setattr(moving, "RawProducer", Watched)
    async with rig.lab() as lab:
        await lab.publish()
        reader = await lab.reader(free=1)
        delivery = await reader.take_one()
        await reader.settle(delivery, lab.letter(delivery))
    assert set(unreported) == {0}


async def test_positions_that_another_leaves_pending_are_waited_for_and_then_taken_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a broker leaves them that was killed and has forgotten how the transaction of a member that is gone ended."""
    monkeypatch.setattr(positions, "_STABLE", 0.5)
    monkeypatch.setattr(positions, "_ABORTED", 2.0)
    async with rig.lab() as lab:
        await lab.publish_many(2)
        url = rig.driver.url.removeprefix("kafka://")
        patient = {"transactional.id": uuid.uuid4().hex, "transaction.timeout.ms": 120_000}
        other = Producer({"bootstrap.servers": url} | patient)
        group = Consumer({"bootstrap.servers": url, "group.id": lab.subscription("worker").group})
        other.init_transactions(10)
        other.begin_transaction()
        place = TopicPartition(lab.channel("tasks").address, 0, 1)
        other.send_offsets_to_transaction([place], group.consumer_group_metadata(), 10)
        reader = await lab.reader(free=2)
        await reader.take(2)
        other.abort_transaction(10)
        group.close()
