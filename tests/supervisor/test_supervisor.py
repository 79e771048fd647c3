"""The supervisor with real processes: start, watch, replace, drain."""

from __future__ import annotations

import os
import signal

from tests.supervisor.rig import agent, alive, eventually


async def test_starts_watches_and_drains(run):
    team = await run(agent(replicas=2), agent("writing"))
    await team.all_ready()
    assert team.agent()["state"] == "running"
    pids = team.agent()["pids"] + team.agent("writing")["pids"]
    assert len(set(pids)) == 3
    assert all(map(alive, pids))
    assert await team.stop() == 0
    assert not any(map(alive, pids))
    assert team.words("research.1") == ["start", "ready", "drain"]


async def test_a_killed_worker_is_replaced_in_its_slot(run):
    team = await run(agent())
    await team.all_ready()
    (first,) = team.agent()["pids"]
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: team.agent()["pids"] not in ([], [first]))
    await team.all_ready()
    assert team.agent()["restarts"] == 1
    assert team.words("research.0") == ["start", "ready"] * 2
