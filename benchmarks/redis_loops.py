"""Redis by hand (redis-py) and with FastStream: run as `python -m benchmarks.redis_loops CONTENDER WORK`."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import redis.asyncio as redis
from faststream import AckPolicy
from faststream.redis import RedisBroker, StreamSub

from benchmarks.workload import Meter, outputs
from orchestrator import AgentEvent

URL = os.environ["BENCH_URL"]
IN_FLIGHT = int(os.environ.get("BENCH_IN_FLIGHT", "64"))


def fields(event: AgentEvent) -> dict[str, str | bytes]:
    return {
        "event_id": event.event_id,
        "event_type": event.event_type,
        "source_agent": event.source_agent,
        "correlation_id": event.correlation_id,
        "payload": event.to_bytes(),
    }


async def seed(events: list[AgentEvent], contender: str) -> None:
    """Fresh streams for `contender`, holding `events`."""
    client: Any = redis.from_url(URL)  # its types do not say what an answer holds
    await client.delete(f"{contender}:in", f"{contender}:out")
    await client.xgroup_create(f"{contender}:in", "bench", id="0", mkstream=True)
    await client.aclose()
    await fill(events, f"{contender}:in", plain=contender == "fs")


async def fill(events: list[AgentEvent], stream: str, *, plain: bool = False) -> None:
    """Adds `events` to `stream`; `plain` is the form that FastStream reads."""
    client: Any = redis.from_url(URL)  # its types do not say what an answer holds
    async with client.pipeline(transaction=False) as pipe:
        for event in events:
            pipe.xadd(stream, {"__data__": event.to_bytes()} if plain else fields(event))
        await pipe.execute()
    await client.aclose()


async def by_hand(work: str) -> None:
    """XREADGROUP, one task an event, at most IN_FLIGHT of them; each XADD and XACK is one round trip."""
    meter = Meter.from_env()
    client: Any = redis.from_url(URL)  # its types do not say what an answer holds
    slots = asyncio.Semaphore(IN_FLIGHT)
    running: set[asyncio.Task[None]] = set()

    async def pipeline(entry: bytes, body: bytes) -> None:
        event = AgentEvent.from_bytes(body)
        for out in outputs(event):
            await client.xadd("hand:out", fields(out))
        await client.xack("hand:in", "bench", entry)
        meter.tick()
        slots.release()

    while not meter.done:
        count = 256 if work == "ack" else IN_FLIGHT
        found = await client.xreadgroup("bench", "one", {"hand:in": ">"}, count=count, block=1000)
        for _, entries in found or ():
            if work == "ack":
                for _, entry in entries:
                    AgentEvent.from_bytes(entry[b"payload"])
                await client.xack("hand:in", "bench", *[i for i, _ in entries])
                for _ in entries:
                    meter.tick()
            else:
                for entry_id, entry in entries:
                    await slots.acquire()
                    task = asyncio.create_task(pipeline(entry_id, entry[b"payload"]))
                    running.add(task)
                    task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    await client.aclose()


async def faststream(work: str) -> None:
    meter = Meter.from_env()
    broker = RedisBroker(URL, logger=None)

    @broker.subscriber(
        stream=StreamSub("fs:in", group="bench", consumer="one", max_records=IN_FLIGHT, declare=False),
        max_workers=IN_FLIGHT,
        ack_policy=AckPolicy.ACK,
    )
    async def handle(event: AgentEvent) -> None:
        if work == "pipeline":
            for out in outputs(event):
                await broker.publish(out, stream="fs:out")
        meter.tick()

    await broker.start()
    while not meter.done:
        await asyncio.sleep(0.05)
    await broker.stop()


if __name__ == "__main__":
    asyncio.run({"hand": by_hand, "fs": faststream}[sys.argv[1]](sys.argv[2]))
