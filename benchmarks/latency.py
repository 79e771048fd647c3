"""From publish to handler, one event at a time, when nothing else happens.

As a module it is our handler; as `python -m benchmarks.latency BROKER URL RECORD COUNT` it publishes to ours with the
raw client, and then to a bare consumer of the raw client in a process of its own, and prints that one's milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from orchestrator import AgentEvent, Context

Publish = Callable[[bytes], Awaitable[None]]

_fd = os.open(os.environ["LATENCY_RECORD"], os.O_WRONLY | os.O_APPEND) if "LATENCY_RECORD" in os.environ else -1


async def handle(event: AgentEvent, ctx: Context) -> None:
    os.write(_fd, f"{(time.time_ns() - event.payload['sent']) / 1e6:.3f}\n".encode())


async def drive(publish: Publish, record: Path, count: int) -> None:
    """Publishes `count` events, each after the one before was handled."""
    for n in range(count):
        event = AgentEvent(event_type="task.assigned", source_agent="bench", payload={"sent": time.time_ns()})
        await publish(event.to_bytes())
        deadline = time.monotonic() + 30
        while record.read_bytes().count(b"\n") <= n:
            if time.monotonic() > deadline:
                raise TimeoutError(f"event {n} was not handled")
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.01)


async def nats_main(url: str, record: Path, raw_record: Path, count: int) -> None:
    import nats  # only the client of the broker that is measured

    nc = await nats.connect(url)
    js = nc.jetstream()
    await js.add_stream(name="latency_raw", subjects=["latencyraw.>"])

    async def ours(body: bytes) -> None:
        await js.publish("latency.task.assigned", body)

    async def raw(body: bytes) -> None:
        await js.publish("latencyraw.task.assigned", body)

    await drive(ours, record, count)
    await bare("nats", url, raw_record, lambda: drive(raw, raw_record, count))
    await js.delete_stream("latency_raw")
    await nc.close()


async def nats_bare(url: str) -> None:
    import nats

    nc = await nats.connect(url)
    sub = await nc.jetstream().pull_subscribe("latencyraw.>", durable="raw", stream="latency_raw")
    print("ready", flush=True)
    while True:
        try:
            for msg in await sub.fetch(1, timeout=5):
                await handle(AgentEvent.from_bytes(msg.data), None)  # type: ignore[arg-type]
                await msg.ack()
        except nats.errors.TimeoutError:
            continue


async def redis_main(url: str, record: Path, raw_record: Path, count: int) -> None:
    import redis.asyncio as redis

    client = redis.from_url(url)
    (address,) = await client.keys("*latency*tasks")

    async def ours(body: bytes) -> None:
        await client.xadd(address, {"payload": body})

    async def raw(body: bytes) -> None:
        await client.xadd("latencyraw", {"payload": body})

    await drive(ours, record, count)
    await client.xgroup_create("latencyraw", "raw", id="0", mkstream=True)
    await bare("redis", url, raw_record, lambda: drive(raw, raw_record, count))
    await client.aclose()


async def redis_bare(url: str) -> None:
    import redis.asyncio as redis

    client: Any = redis.from_url(url)  # its types do not say what an answer holds
    print("ready", flush=True)
    while True:
        for _, entries in await client.xreadgroup("raw", "one", {"latencyraw": ">"}, count=1, block=1000) or ():
            for entry_id, entry in entries:
                await handle(AgentEvent.from_bytes(entry[b"payload"]), None)  # type: ignore[arg-type]
                await client.xack("latencyraw", "raw", entry_id)


async def kafka_main(url: str, record: Path, raw_record: Path, count: int) -> None:
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    servers: dict[str, str | int | float | bool] = {"bootstrap.servers": url.removeprefix("kafka://")}
    admin = AdminClient(servers)
    (address,) = [t for t in admin.list_topics(timeout=10).topics if t.endswith("latency-tasks")]
    admin.create_topics([NewTopic("latencyraw", 1, 1)])["latencyraw"].result(timeout=10)
    producer = Producer({**servers, "linger.ms": 0})

    def publisher(topic: str) -> Publish:
        async def publish(body: bytes) -> None:
            producer.produce(topic, body)
            producer.flush(10)

        return publish

    await drive(publisher(address), record, count)
    await bare("kafka", url, raw_record, lambda: drive(publisher("latencyraw"), raw_record, count))


async def kafka_bare(url: str) -> None:
    from confluent_kafka import Consumer

    servers = url.removeprefix("kafka://")
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "raw", "auto.offset.reset": "earliest"})
    consumer.subscribe(["latencyraw"])
    consumer.poll(1.0)
    print("ready", flush=True)
    while True:
        message = consumer.poll(1.0)
        if message is not None and not message.error():
            await handle(AgentEvent.from_bytes(message.value()), None)  # type: ignore[arg-type]


async def bare(broker: str, url: str, record: Path, work: Callable[[], Awaitable[None]]) -> None:
    """Runs the bare consumer beside `work`, then prints what it recorded."""
    record.touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.latency", "bare", broker, url],
        env={**os.environ, "LATENCY_RECORD": str(record)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        await work()
    finally:
        process.terminate()
        process.wait()
    print(record.read_text())


MAINS = {"nats": nats_main, "redis": redis_main, "kafka": kafka_main}
BARES = {"nats": nats_bare, "redis": redis_bare, "kafka": kafka_bare}

if __name__ == "__main__":
    if sys.argv[1] == "bare":
        asyncio.run(BARES[sys.argv[2]](sys.argv[3]))
    else:
        kind, where, ours_record, samples = sys.argv[1:]
        path = Path(ours_record)
        asyncio.run(MAINS[kind](where, path, path.with_name("raw"), int(samples)))
