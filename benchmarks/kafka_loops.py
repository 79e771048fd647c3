"""Kafka by hand (confluent-kafka) and with FastStream: run as `python -m benchmarks.kafka_loops CONTENDER WORK`."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from faststream import AckPolicy
from faststream.confluent import KafkaBroker

from benchmarks.workload import Meter, outputs
from orchestrator import AgentEvent

URL = os.environ["BENCH_URL"].removeprefix("kafka://")
IN_FLIGHT = int(os.environ.get("BENCH_IN_FLIGHT", "64"))
RUN = os.environ.get("BENCH_RUN", "0")  # topics cannot be emptied at once, so each round has its own


def headers(event: AgentEvent) -> dict[str, str | bytes | None]:
    return {
        "event-type": event.event_type,
        "source-agent": event.source_agent,
        "correlation-id": event.correlation_id,
    }


async def seed(events: list[AgentEvent], contender: str) -> None:
    """Fresh topics for `contender`, holding `events`."""
    admin = AdminClient({"bootstrap.servers": URL})
    topics = [NewTopic(f"{contender}-{side}-{RUN}", 1, 1) for side in ("in", "out")]
    for created in admin.create_topics(topics).values():
        created.result(timeout=30)
    await fill(events, topics[0].topic)


async def fill(events: list[AgentEvent], topic: str) -> None:
    """Produces `events` to `topic`, confirmed."""
    producer = Producer({"bootstrap.servers": URL, "enable.idempotence": True, "linger.ms": 20})
    for event in events:
        producer.produce(topic, event.to_bytes(), key=event.correlation_id, headers=headers(event))
        if len(producer) > 50_000:
            producer.poll(0.1)
    if producer.flush(60):
        raise RuntimeError("seeding did not end")


def by_hand(work: str) -> None:
    """Batches of IN_FLIGHT: produce for each event, flush, commit. One thread, as the client's examples have it."""
    meter = Meter.from_env()
    consumer = Consumer(
        {
            "bootstrap.servers": URL,
            "group.id": f"hand-{RUN}",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    producer = Producer({"bootstrap.servers": URL, "enable.idempotence": True, "acks": "all"})
    failed: list[object] = []

    def delivered(error: object, _message: object) -> None:
        if error is not None:
            failed.append(error)

    consumer.subscribe([f"hand-in-{RUN}"])
    while not meter.done:
        batch = consumer.consume(256 if work == "ack" else IN_FLIGHT, 0.1)
        for message in batch:
            if message.error():
                raise KafkaException(message.error())
            event = AgentEvent.from_bytes(message.value() or b"")
            if work == "pipeline":
                for out in outputs(event):
                    producer.produce(
                        f"hand-out-{RUN}",
                        out.to_bytes(),
                        key=out.correlation_id,
                        headers=headers(out),
                        on_delivery=delivered,
                    )
        if batch:
            producer.flush()
            if failed:
                raise RuntimeError(failed[0])
            consumer.commit(asynchronous=False)
            for _ in batch:
                meter.tick()
    consumer.close()


async def faststream(work: str) -> None:
    meter = Meter.from_env()
    broker = KafkaBroker(URL, logger=None, acks="all", enable_idempotence=True)

    @broker.subscriber(
        f"fs-in-{RUN}",
        group_id=f"fs-{RUN}",
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.ACK,
    )
    async def handle(event: AgentEvent) -> None:
        if work == "pipeline":
            for out in outputs(event):
                await broker.publish(out, f"fs-out-{RUN}", key=out.correlation_id.encode(), headers=headers(out))
        meter.tick()

    await broker.start()
    deadline = time.monotonic() + float(os.environ.get("BENCH_PATIENCE", "120"))
    while not meter.done and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    await broker.stop()


if __name__ == "__main__":
    if sys.argv[1] == "hand":
        by_hand(sys.argv[2])
    else:
        asyncio.run(faststream(sys.argv[2]))
