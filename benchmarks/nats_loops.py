"""NATS by hand (nats-py) and with FastStream: run as `python -m benchmarks.nats_loops CONTENDER WORK`."""

from __future__ import annotations

import asyncio
import os
import sys

import nats
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, PullSub
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig

from benchmarks.workload import Meter, outputs
from orchestrator import AgentEvent

URL = os.environ["BENCH_URL"]
IN_FLIGHT = int(os.environ.get("BENCH_IN_FLIGHT", "64"))


async def seed(events: list[AgentEvent], contender: str) -> None:
    """Fresh streams for `contender`, holding `events`."""
    nc = await nats.connect(URL)
    js = nc.jetstream()
    for stream in (f"{contender}_in", f"{contender}_out"):
        try:
            await js.delete_stream(stream)
        except nats.js.errors.NotFoundError:
            pass
    await js.add_stream(
        StreamConfig(
            name=f"{contender}_in",
            subjects=[f"{contender}.in.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            discard=DiscardPolicy.NEW,
        )
    )
    await js.add_stream(StreamConfig(name=f"{contender}_out", subjects=[f"{contender}.out.>"], duplicate_window=120))
    await js.add_consumer(f"{contender}_in", ConsumerConfig(durable_name="bench", ack_wait=30, max_ack_pending=4096))
    await nc.close()
    await fill(events, f"{contender}.in.task.assigned")


async def fill(events: list[AgentEvent], subject: str) -> None:
    """Publishes `events` to `subject`, confirmed."""
    nc = await nats.connect(URL)
    js = nc.jetstream(publish_async_max_pending=1000)
    waiting = [await js.publish_async(subject, e.to_bytes(), headers={"Nats-Msg-Id": e.event_id}) for e in events]
    await asyncio.gather(*waiting)
    await nc.close()


async def by_hand(work: str) -> None:
    """Pull, one task an event, at most IN_FLIGHT of them; js.publish awaited."""
    meter = Meter.from_env()
    nc = await nats.connect(URL)
    js = nc.jetstream()
    sub = await js.pull_subscribe_bind("bench", "hand_in")
    slots = asyncio.Semaphore(IN_FLIGHT)
    running: set[asyncio.Task[None]] = set()

    async def pipeline(msg: Msg) -> None:
        event = AgentEvent.from_bytes(msg.data)
        for out in outputs(event):
            await js.publish(f"hand.out.{out.event_type}", out.to_bytes(), headers={"Nats-Msg-Id": out.event_id})
        await msg.ack()
        meter.tick()
        slots.release()

    while not meter.done:
        try:
            batch = await sub.fetch(256 if work == "ack" else IN_FLIGHT, timeout=1)
        except nats.errors.TimeoutError:
            continue
        for msg in batch:
            if work == "ack":
                AgentEvent.from_bytes(msg.data)
                await msg.ack()
                meter.tick()
            else:
                await slots.acquire()
                task = asyncio.create_task(pipeline(msg))
                running.add(task)
                task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    await nc.drain()


async def faststream(work: str) -> None:
    meter = Meter.from_env()
    broker = NatsBroker(URL, logger=None)

    @broker.subscriber(
        "fs.in.task.assigned",
        stream=JStream("fs_in", declare=False),
        durable="bench",
        pull_sub=PullSub(batch_size=IN_FLIGHT, timeout=1.0),
        max_workers=IN_FLIGHT,
        ack_policy=AckPolicy.ACK,
    )
    async def handle(event: AgentEvent) -> None:
        if work == "pipeline":
            for out in outputs(event):
                await broker.publish(
                    out, f"fs.out.{out.event_type}", stream="fs_out", headers={"Nats-Msg-Id": out.event_id}
                )
        meter.tick()

    await broker.start()
    while not meter.done:
        await asyncio.sleep(0.05)
    await broker.stop()


if __name__ == "__main__":
    asyncio.run({"hand": by_hand, "fs": faststream}[sys.argv[1]](sys.argv[2]))
