"""One topology on two real brokers: an agent reads from Redis and publishes to NATS, killed in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import AgentEvent, wire
from orchestrator.brokers import registry
from tests.servers.nats import NatsServer
from tests.servers.redis import RedisServer
from tests.worker.harness import staged, until
from tests.worker.test_process import run_until_settled

HANDLER = """
async def handle(event: AgentEvent, ctx: Context):
    n = event.payload["n"]
    note(n)
    if n == "fails":
        raise ValueError("no")
    await ctx.publish("far.done", {"n": n})
    await ctx.publish("near.done", {"n": n})
    if n == "dies" or (n == "dies-once" and (HERE / "ran.txt").read_text().split().count(n) == 1):
        await asyncio.sleep(0.1)  # both are out
        os._exit(1)
    await asyncio.sleep(0.02)
"""


@pytest.fixture
def nats() -> Iterator[NatsServer]:
    """One of its own: it is stopped."""
    server = NatsServer().start()
    yield server
    server.close()


def topology(near: str, far: str, name: str, letters: str = "far") -> str:
    return f"""
    apiVersion: orchestrator/v1
    kind: Topology
    metadata: {{name: {name}}}
    brokers:
      near: {{url: "{near}", prefix: {name}.}}
      far: {{url: "{far}", prefix: {name}.}}
    defaults: {{channels: {{broker: near}}}}
    channels:
      tasks: {{events: [task.*], mode: queue}}
      near: {{events: [near.*]}}
      far: {{broker: far, events: [far.*, agent.failed]}}
      dead: {{broker: {letters}, mode: log}}
    agents:
      worker:
        handler: agents:handle
        subscribe: [task.run]
        publish: [far.done, near.done]
        dead_letter: dead
        concurrency: 4
        retry: {{max_attempts: 3, initial_delay: 20ms, jitter: 0}}
    """


@pytest.mark.parametrize("letters", ["far", "near"])
async def test_outputs_and_letters_on_another_broker_survive_crashes_and_come_once(
    tmp_path: Path, redis_server: RedisServer, nats_server: NatsServer, letters: str
) -> None:
    name = f"two-{letters}"
    async with staged(tmp_path, topology(redis_server.url, nats_server.url, name, letters), HANDLER) as stage:
        for n in range(30):
            await stage.client.publish("task.run", {"n": f"n{n}"})
        for n in ("fails", "dies", "dies-once"):
            await stage.client.publish("task.run", {"n": n})
        for _ in range(3):
            worker = stage.worker()
            await worker.said("ready")
            before = len(stage.ran())
            await until(lambda n=before, w=worker: len(stage.ran()) > n + 2 or w.process.poll() is not None)
            worker.kill()
        await run_until_settled(stage)
        good = {f"n{n}" for n in range(30)} | {"dies-once"}
        for channel in ("far", "near"):
            done = Counter(
                event.payload["n"]
                for event in (AgentEvent.from_bytes(s.body) for s in await stage.stored(channel))
                if event.event_type == f"{channel}.done"
            )
            done.pop("dies", None)  # its last run had published before it died
            assert done == dict.fromkeys(good, 1)
        found = [wire.parse(s.headers) for s in await stage.letters()]
        assert sorted((x.reason, x.attempts) for x in found if x) == [("crashed", 3), ("exhausted", 3)]
        failed = [s for s in await stage.stored("far") if s.event_type == "agent.failed"]
        assert len(failed) == 2


async def test_while_the_other_broker_is_away_nothing_is_settled(
    tmp_path: Path, redis_server: RedisServer, nats: NatsServer
) -> None:
    async with staged(tmp_path, topology(redis_server.url, nats.url, "away"), HANDLER) as stage:
        worker = stage.worker()
        await worker.said("ready")
        nats.stop()
        for n in range(6):
            await stage.client.publish("task.run", {"n": f"n{n}"})
        await until(lambda: len(stage.ran()) >= 4)
        await asyncio.sleep(1)  # long enough for a settlement that does not wait
        assert await stage.backlog() == 6
        nats.start()
        await worker.said("status", handled=6)
        assert len(await stage.stored("far")) == 6
        assert set(Counter(stage.ran()).values()) == {1}


@pytest.mark.parametrize("near", ["redis", "nats"])
async def test_a_start_that_fails_at_the_other_broker_counts_a_crash_once(
    tmp_path: Path, redis_server: RedisServer, nats_server: NatsServer, near: str
) -> None:
    """The journal is read again at each try to start; what it says must be told once."""
    urls = (redis_server.url, nats_server.url) if near == "redis" else (nats_server.url, redis_server.url)
    text = topology(*urls, f"again-{near}").replace("subscribe: [task.run]", "subscribe: [task.run, far.go]")
    async with staged(tmp_path, text, HANDLER) as stage:
        await stage.client.publish("task.run", {"n": "dies-once"})
        worker = stage.worker()
        await worker.ended()
        far = stage.topology.channels["far"]
        subscription = next(s for s in stage.topology.agents["worker"].subscriptions if s.channel == "far")
        connection = await stage.connection("far")
        [gone] = [o for o in await connection.observe([]) if o.id.name == f"{far.address}/{subscription.group}"]
        await connection.delete(gone)
        worker = stage.worker()
        await until(lambda: worker.log.read_text().count("cannot start yet") >= 1, why=worker.log.read_text)
        await asyncio.sleep(2.5)  # some more tries
        broker = stage.topology.brokers["far"]
        for desired in registry.adapter(broker.kind).desired(stage.topology, broker):
            await connection.create(desired)
        await worker.said("status", handled=1)
        assert await stage.letters() == []
        assert stage.ran() == ["dies-once", "dies-once"]
