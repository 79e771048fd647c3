"""The clock jumps; a slow consumer falls behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import Client
from tests.faults.rig import HERE, ROOT, TOPOLOGY, Site
from tests.servers.fresh import Server

Sites = Callable[..., Site]
both = pytest.mark.parametrize("server", ["nats", "redis"], indirect=True)


@both
async def test_a_slow_consumer_stays_small(server: Server, site: Sites) -> None:
    """60 MB wait for workers that take eight at a time."""
    made = site(server.url)
    await made.start()
    before = [worker.memory_info().rss for worker in made.workers()]
    async with Client(made.loaded) as client:
        for first in range(0, 3000, 100):
            await asyncio.gather(
                *(
                    client.publish("task.assigned", {"n": n, "do": "sleep:0.5", "blob": "x" * 20_000})
                    for n in range(first, first + 100)
                )
            )
    handled = made.handled()
    await made.until(lambda: made.handled() > handled + 32, "some more handled")
    after = [worker.memory_info().rss for worker in made.workers()]
    print([(a - b) >> 20 for a, b in zip(after, before, strict=True)], "MiB more")
    assert max(a - b for a, b in zip(after, before, strict=True)) < 24 << 20
    assert made.agent()["in_flight"] <= 16


@both
async def test_the_clock_jumps_an_hour_forward_and_back(server: Server, site: Sites, tmp_path: Path) -> None:
    """As the workers see it. A retry that waits over the jump takes no hour, and nothing is lost or doubled."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    env = {"PYTHONPATH": f"{HERE / 'jumping'}{os.pathsep}{ROOT}", "CLOCK": str(clock)}
    made = site(server.url, topology=TOPOLOGY.replace("[100ms, 300ms]", "[2s, 2s]"), env=env)
    await made.start()
    for number, offset in enumerate(("3600", "0", "-3600", "0")):
        first = number * 40
        await made.publish_each([(first + n, "flaky" if n % 4 == 0 else "ok") for n in range(40)])
        await made.until(lambda first=first: made.handled() >= first + 40, "each ran once")
        clock.write_text(offset)
    await made.all_handled(160)
    assert set(made.outputs()) == set(range(160))
    assert made.runs() == {n: 2 if n % 4 == 0 else 1 for n in range(160)}
    assert made.letters() == []
    assert await made.stop() == 0
