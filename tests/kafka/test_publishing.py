"""How the producer gathers: what is held, for how long, and what that saves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from orchestrator.brokers.base import Producer
from orchestrator.brokers.kafka import producer as producing
from orchestrator.brokers.kafka.producer import KafkaProducer
from tests.conformance.rig import Lab, Rig, eventually, finished, outcome
from tests.servers.kafka import KafkaServer


@contextmanager
def frozen(server: KafkaServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


def send(lab: Lab, count: int, channel: str = "tasks", producer: Producer | None = None) -> list[asyncio.Future[None]]:
    futures = []
    for _ in range(count):
        done, future = outcome()
        (producer or lab.producer).send(lab.message(channel=channel), done)
        futures.append(future)
    return futures


def lane(lab: Lab, channel: str = "tasks") -> tuple[int, int]:
    """How many messages the client has, and how many are held."""
    assert isinstance(lab.producer, KafkaProducer)
    found = lab.producer._lanes[lab.channel(channel).address]
    return found.sent, len(found.held)


async def test_waiting_for_a_slow_broker_takes_no_cpu(
    rig: Rig, kafka_server: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's thread spins when more lies ready than may be under way."""
    monkeypatch.setattr(producing, "_HOLD", 60.0)
    async with rig.lab() as lab:
        await lab.publish()
        with frozen(kafka_server):
            first = send(lab, 10)
            await eventually(lambda: lane(lab) == (10, 0), what="the first ten under way")
            second = send(lab, 10)
            await asyncio.sleep(0.1)
            cpu, wall = time.process_time(), time.monotonic()
            await asyncio.sleep(0.5)
            share = (time.process_time() - cpu) / (time.monotonic() - wall)
            assert lane(lab) == (10, 10)
        assert share < 0.5
        for future in first + second:
            await finished(future)
        assert lane(lab) == (0, 0)


async def test_what_is_held_goes_out_when_those_before_are_not_confirmed_in_time(
    rig: Rig, kafka_server: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producing, "_HOLD", 0.05)
    async with rig.lab() as lab:
        await lab.publish()
        with frozen(kafka_server):
            futures = send(lab, 1)
            await eventually(lambda: lane(lab) == (1, 0), what="the first under way")
            futures += send(lab, 1)
            await eventually(lambda: lane(lab) == (2, 0), what="the second given to the client too")
        for future in futures:
            await finished(future)


async def test_a_topic_that_confirms_nothing_holds_up_no_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producing, "_HOLD", 60.0)
    monkeypatch.setattr(producing, "_CLOSING", 0.1)
    async with rig.lab() as lab:
        lab.broker = replace(lab.broker, client={"topic.metadata.propagation.max.ms": 600_000})  # looked for so long
        lab.topology = replace(lab.topology, brokers={"main": lab.broker})
        producer = (await lab.connect()).producer()
        assert isinstance(producer, KafkaProducer)
        done, missing = outcome()
        producer.send_to(f"{lab.topology.name}-missing", lab.message(), done)
        await asyncio.sleep(0)
        for future in send(lab, 10, producer=producer):
            await finished(future)
        assert not missing.done()
        await producer.close()
        assert missing.exception() is not None


async def test_nothing_is_sent_after_close(
    rig: Rig, kafka_server: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was reported as unconfirmed because the connection closed must not appear later."""
    monkeypatch.setattr(producing, "_HOLD", 60.0)
    monkeypatch.setattr(producing, "_CLOSING", 0.1)
    async with rig.lab() as lab:
        await lab.publish()
        connection = await lab.connect()
        producer = connection.producer()
        assert isinstance(producer, KafkaProducer)
        with frozen(kafka_server):
            held = []
            for _ in range(2):
                held += send(lab, 1, producer=producer)
                await asyncio.sleep(0.01)
            await producer.close()
            assert all(future.exception() is not None for future in held)
        await lab.publish()
        assert producer.pending == {}
        assert len(await lab.stored("tasks")) <= 3  # the first of the two was under way already
