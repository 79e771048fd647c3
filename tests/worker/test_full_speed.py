"""Back-pressure and reconnect at full speed: handlers that publish as fast as they can meet a server that is frozen,
then killed. What waits stays bounded, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import AgentEvent
from orchestrator.brokers.base import Stored
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer
from tests.worker.harness import Worker, staged, until
from tests.worker.test_process import topology

EVENTS, OUTPUTS = 8, 4000
UNCONFIRMED = 4096  # messages, brokers/nats/producer.py
HELD = 256  # messages of one attempt, worker/attempt.py
MEMORY = 48 << 20  # bytes that all this may take

HANDLER = f"""
async def handle(event: AgentEvent, ctx: Context):
    n = event.payload["n"]
    while not (HERE / "go").exists():
        await asyncio.sleep(0.005)
    with open(HERE / f"handed-over.{{n}}", "wb", buffering=0) as handed_over:
        for i in range({OUTPUTS}):
            await ctx.publish(event.metadata["as"], {{"n": n, "i": i, "text": "x" * 500}})
            handed_over.write(b".")
"""


def payload(stored: Stored) -> dict[str, Any]:
    return AgentEvent.from_bytes(stored.body).payload


def handed_over(folder: Path) -> int:
    """How many publishes have returned."""
    return sum(file.stat().st_size for file in folder.glob("handed-over.*"))


async def settles_down(folder: Path) -> int:
    """The number of publishes that have returned, once it is at speed and has not moved for two seconds."""
    await until(lambda: handed_over(folder) >= UNCONFIRMED, why=lambda: f"only {handed_over(folder)} handed over")
    last, same = -1, 0
    async with asyncio.timeout(PATIENCE):
        while same < 20:
            await asyncio.sleep(0.1)
            now = handed_over(folder)
            same = same + 1 if now == last else 0
            last = now
    return last


async def frozen_in_full_flight(server: NatsServer, worker: Worker, folder: Path) -> None:
    """The server stops just before every handler begins to publish."""
    process = psutil.Process(worker.process.pid)
    before = process.memory_info().rss
    server.pause()
    (folder / "go").touch()
    waiting = await settles_down(folder)
    assert waiting <= UNCONFIRMED + EVENTS * HELD
    assert process.memory_info().rss - before < MEMORY
    server.resume()


@pytest.mark.parametrize("then_killed", [False, True])
async def test_a_frozen_server_bounds_what_waits_and_nothing_is_lost(tmp_path: Path, then_killed: bool) -> None:
    server = NatsServer().start()
    name = f"speed{int(then_killed)}"
    try:
        plan = topology(server.url, name, more=f"concurrency: {EVENTS}")
        async with staged(tmp_path, plan, HANDLER) as stage:
            worker = stage.worker()
            for n in range(EVENTS):
                await stage.client.publish(f"{name}.task.run", {"n": n}, metadata={"as": f"{name}.result.done"})
            await worker.said("status", in_flight=EVENTS)
            await frozen_in_full_flight(server, worker, tmp_path)
            if then_killed:
                await until(lambda: handed_over(tmp_path) > 2 * UNCONFIRMED)
                server.restart(kill=True)
            await worker.said("status", timeout=2 * PATIENCE, handled=EVENTS)
            async with asyncio.timeout(
                2 * PATIENCE
            ):  # a killed server forgets the last acknowledgements: those events run again
                while await stage.backlog():
                    await asyncio.sleep(0.1)
            said = [(e["n"], e["i"]) for e in map(payload, await stage.stored("results"))]
            assert len(said) == EVENTS * OUTPUTS
            assert len(set(said)) == len(said)
    finally:
        server.close()
