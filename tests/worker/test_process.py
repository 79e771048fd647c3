"""A worker process on a real NATS server: crashes, timeouts, drains. Killed for real, judged by what handlers noted."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from orchestrator import AgentEvent, wire
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer
from tests.worker.harness import Stage, Worker, staged, until


def topology(url: str, name: str, more: str = "", attempts: int = 3) -> str:
    return f"""
    apiVersion: orchestrator/v1
    kind: Topology
    metadata: {{name: {name}}}
    brokers: {{main: {{url: "{url}"}}}}
    channels:
      tasks: {{events: [{name}.task.*], mode: queue, address: T-{name}}}
      results: {{events: [{name}.result.*], address: R-{name}}}
      dead: {{mode: log, address: D-{name}}}
    retry_policies:
      standard: {{max_attempts: {attempts}, initial_delay: 50ms, jitter: 0}}
    agents:
      worker:
        handler: agents:handle
        subscribe: [{name}.task.run]
        publish: [{name}.result.done]
        dead_letter: dead
        retry: standard
        {more}
    """


async def test_handles_publishes_settles_and_drains(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        ctx.log.info("working", n=event.payload["n"])
        await ctx.publish("basic.result.done", {"n": event.payload["n"]})
    """
    async with staged(tmp_path, topology(nats_server.url, "basic"), handler) as stage:
        worker = stage.worker()
        await worker.said("ready")
        sent = [await stage.client.publish("basic.task.run", {"n": n}) for n in range(20)]
        await worker.said("status", handled=20)
        results = await stage.stored("results")
        assert len(results) == 20
        assert await stage.backlog() == 0
        worker.tell("drain", timeout=5)
        await worker.said("drained")
        assert await worker.ended() == 0
        lines = worker.log.read_text().splitlines()
        assert any('"working"' in line and sent[0].correlation_id in line for line in lines)


async def test_a_handler_that_kills_its_process_runs_max_attempts_times_and_no_neighbour_dies(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        note(event.payload["n"])
        if event.payload["n"] == "poison":
            await asyncio.sleep(0.05)
            os._exit(1)
        await asyncio.sleep(0.1)
    """
    async with staged(tmp_path, topology(nats_server.url, "poison"), handler) as stage:
        for n in range(12):
            await stage.client.publish("poison.task.run", {"n": "poison" if n == 3 else f"n{n}"})
        crashes = await run_until_settled(stage)
        runs = Counter(stage.ran())
        letters = await stage.letters()
        assert runs["poison"] == 3
        assert crashes == 3
        assert [b"poison" in letter.body for letter in letters] == [True]
        said = wire.parse(letters[0].headers)
        assert said is not None
        assert (said.reason, said.attempts, said.error_type) == ("crashed", 3, "WorkerCrashed")
        assert all(runs[f"n{n}"] >= 1 for n in range(12) if n != 3)


async def test_a_worker_killed_from_outside_loses_nothing_and_blames_nobody(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        note(event.payload["n"])
        await asyncio.sleep(0.05)
        await ctx.publish("killed.result.done", {"n": event.payload["n"]})
    """
    # a kill while an event runs alone counts: the same one in flight at three of the four kills would be dead-lettered
    async with staged(tmp_path, topology(nats_server.url, "killed", attempts=10), handler) as stage:
        for n in range(40):
            await stage.client.publish("killed.task.run", {"n": n})
        for _ in range(4):
            worker = stage.worker()
            await worker.said("ready")
            before = len(stage.ran())
            await until(lambda before=before: len(stage.ran()) > before + 2)
            worker.kill()
        await run_until_settled(stage)
        assert await stage.letters() == []
        results = [AgentEvent.from_bytes(result.body) for result in await stage.stored("results")]
        assert sorted(event.payload["n"] for event in results) == list(range(40)), "one result each, whatever was rerun"
        assert {int(n) for n in stage.ran()} == set(range(40))


async def test_an_async_handler_is_cancelled_at_its_timeout(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        note(ctx.attempt)
        await asyncio.sleep(60)
    """
    async with staged(tmp_path, topology(nats_server.url, "slow", "timeout: 300ms"), handler) as stage:
        worker = stage.worker()
        await worker.said("ready")
        await stage.client.publish("slow.task.run", {})
        await worker.said("status", dead=1)
        [letter] = await stage.letters()
        said = wire.parse(letter.headers)
        assert said is not None
        assert (said.error_type, said.attempts) == ("TimeoutError", 3)
        assert stage.ran() == ["1", "2", "3"]


async def test_a_handler_that_blocks_the_loop_has_its_worker_replaced_and_is_blamed(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        note(event.payload["n"])
        if event.payload["n"] == "block":
            await asyncio.sleep(0.2)
            while True:
                time.sleep(1)
        await asyncio.sleep(0.5)
    """
    async with staged(tmp_path, topology(nats_server.url, "block", "timeout: 4s", attempts=1), handler) as stage:
        for n in ("one", "block", "two"):
            await stage.client.publish("block.task.run", {"n": n})
        worker = stage.worker()
        told = await worker.said("replace")
        assert "blocks the event loop" in told["reason"]
        assert await worker.ended() == 75
        assert any(m["type"] == "status" and m["loop_age"] > 2 for m in worker.messages)
        second = stage.worker()
        await second.said("status", handled=2)
        runs = Counter(stage.ran())
        assert runs == {"one": 2, "block": 1, "two": 2}
        [letter] = await stage.letters()
        said = wire.parse(letter.headers)
        assert said is not None
        assert (said.error_type, said.attempts) == ("Timeout", 1)


async def test_sigterm_hands_back_what_has_not_started(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        note(ctx.attempt)
        await asyncio.sleep(60)
    """
    more = "drain_timeout: 300ms\n        concurrency: 2"
    async with staged(tmp_path, topology(nats_server.url, "term", more), handler) as stage:
        for _ in range(6):
            await stage.client.publish("term.task.run", {})
        worker = stage.worker()
        await worker.said("ready")
        await until(lambda: len(stage.ran()) == 2)
        worker.process.terminate()
        assert await worker.ended() == 0
        second = stage.worker()
        await second.said("ready")
        await until(lambda: len(stage.ran()) == 4, timeout=20)  # less than a lease
        assert stage.ran() == ["1"] * 4, "interrupted runs do not count"


async def test_a_worker_ends_when_its_supervisor_is_gone(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context): ...
    """
    async with staged(tmp_path, topology(nats_server.url, "orphan"), handler) as stage:
        worker = stage.worker()
        await worker.said("ready")
        worker.hang_up()
        assert await worker.ended() == 0


@pytest.mark.parametrize(
    ("code", "message", "trace"),
    [
        ("import no_such_thing", "no_such_thing", "agents.py"),
        ("def handle(: pass", "SyntaxError", "agents.py"),
        ("def other(event): ...", "has no function 'handle'", None),
        ("async def handle(event, ctx, *, depth): ...", "'depth'", None),
        ("raise SystemExit(3)", "SystemExit", "agents.py"),
    ],
)
async def test_a_handler_that_does_not_load_is_named(
    tmp_path: Path, nats_server: NatsServer, code: str, message: str, trace: str | None
) -> None:
    async with staged(tmp_path, topology(nats_server.url, "load"), code) as stage:
        worker = stage.worker()
        said = await worker.said("failed")
        assert message in said["message"]
        if trace is not None:
            assert trace in said["traceback"]
            assert "orchestrator/worker" not in said["traceback"]
        assert await worker.ended() == 78


async def test_an_unreachable_broker_is_trouble_until_it_is_there(tmp_path: Path) -> None:
    server = NatsServer().start()
    try:
        handler = "async def handle(event, ctx): note('ran')"
        async with staged(tmp_path, topology(server.url, "away"), handler) as stage:
            await stage.client.publish("away.task.run", {})
            server.kill()
            worker = stage.worker()
            await until(
                lambda: (worker.read(), any(m.get("trouble") for m in worker.messages))[1],
                why=lambda: str(worker.messages),
            )
            server.start()
            await worker.said("ready")
            await until(lambda: stage.ran() == ["ran"])
    finally:
        server.close()


async def test_a_thread_that_does_not_end_has_its_worker_replaced(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = """
    def handle(event: AgentEvent, ctx):
        note(event.payload["n"])
        if event.payload["n"] == "stuck":
            time.sleep(3600)
        time.sleep(0.05)
        ctx.publish("thread.result.done", {"n": event.payload["n"]})
    """
    async with staged(tmp_path, topology(nats_server.url, "thread", "timeout: 4s", attempts=1), handler) as stage:
        for n in ("one", "stuck", "two"):
            await stage.client.publish("thread.task.run", {"n": n})
        worker = stage.worker()
        await worker.said("status", handled=2)
        assert "does not stop" in (await worker.said("replace"))["reason"]
        assert await worker.ended() == 75
        second = stage.worker()
        await second.said("status", dead=1)
        assert sorted(stage.ran()) == ["one", "stuck", "two"]
        assert len(await stage.stored("results")) == 2


async def test_pause_on_exhausted_keeps_the_event_for_the_next_try(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        note(ctx.attempt)
        if not (HERE / "mended").exists():
            raise ValueError("broken")
    """
    async with staged(tmp_path, topology(nats_server.url, "pause", "on_exhausted: pause"), handler) as stage:
        worker = stage.worker()
        await worker.said("ready")
        await stage.client.publish("pause.task.run", {})
        told = await worker.said("paused")
        assert "broken" in told["reason"]
        await worker.said("status", paused=True)
        assert stage.ran() == ["1", "2", "3"]
        (tmp_path / "mended").touch()
        worker.tell("resume")
        await worker.said("status", handled=1)
        assert stage.ran() == ["1", "2", "3", "1"]
        assert await stage.letters() == []


async def test_drop_on_exhausted(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = """
    async def handle(event: AgentEvent, ctx: Context):
        raise ValueError("broken")
    """
    async with staged(tmp_path, topology(nats_server.url, "drop", "on_exhausted: drop"), handler) as stage:
        worker = stage.worker()
        await stage.client.publish("drop.task.run", {})
        await worker.said("status", dead=1)
        assert await stage.backlog() == 0
        assert await stage.letters() == []


async def test_pause_and_resume_by_command(tmp_path: Path, nats_server: NatsServer) -> None:
    handler = "async def handle(event, ctx): note('ran')"
    async with staged(tmp_path, topology(nats_server.url, "cmd"), handler) as stage:
        worker = stage.worker()
        await worker.said("ready")
        worker.tell("pause")
        await worker.said("status", paused=True)
        await stage.client.publish("cmd.task.run", {})
        await until(lambda: worker.messages.clear() or True)
        await worker.said("status", paused=True)
        assert stage.ran() == []
        worker.tell("resume")
        await until(lambda: stage.ran() == ["ran"])


async def test_lifespan_surrounds_the_handler_and_its_failure_is_a_failed_load(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    handler = """
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def lifespan(ctx):
        note(f"up:{ctx.config['depth']}")
        if (HERE / "broken").exists():
            raise RuntimeError("no model")
        yield
        note("down")

    async def handle(event, ctx):
        note("ran")
    """
    async with staged(tmp_path, topology(nats_server.url, "life", "config: {depth: 3}"), handler) as stage:
        worker = stage.worker()
        await stage.client.publish("life.task.run", {})
        await worker.said("status", handled=1)
        worker.tell("drain", timeout=5)
        assert await worker.ended() == 0
        assert stage.ran() == ["up:3", "ran", "down"]
        (tmp_path / "broken").touch()
        second = stage.worker()
        said = await second.said("failed")
        assert "no model" in said["message"]
        assert "agents.py" in said["traceback"]
        assert await second.ended() == 78


async def test_a_worker_survives_its_broker_being_killed(tmp_path: Path) -> None:
    server = NatsServer().start()
    try:
        handler = """
        async def handle(event: AgentEvent, ctx: Context):
            note(event.payload["n"])
            await ctx.publish("outage.result.done", {"n": event.payload["n"]})
        """
        async with staged(tmp_path, topology(server.url, "outage"), handler) as stage:
            worker = stage.worker()
            await stage.client.publish("outage.task.run", {"n": 1})
            await worker.said("status", handled=1)
            server.kill()
            await until(lambda: (worker.read(), any(m.get("trouble") for m in worker.messages))[1])
            server.start()
            await stage.client.publish("outage.task.run", {"n": 2})
            await worker.said("status", handled=2, trouble=None)
            assert len(await stage.stored("results")) == 2
    finally:
        server.close()


async def run_until_settled(stage: Stage, most: int = 20) -> int:
    """Starts a worker again each time it dies, as the supervisor does, until nothing is left; how often it died."""
    died = 0
    worker: Worker | None = None
    async with asyncio.timeout(2 * PATIENCE):
        while True:
            if worker is None or worker.process.poll() is not None:
                died += worker is not None
                assert died <= most
                worker = stage.worker()
                await asyncio.sleep(0)
            worker.read()
            if any(m["type"] == "ready" for m in worker.messages) and await stage.backlog() == 0:
                return died
            await asyncio.sleep(0.05)
