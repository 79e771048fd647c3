"""Agents whose old worker must end before the new one begins (Kafka's static members)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from orchestrator.brokers.memory import adapter
from orchestrator.errors import SupervisorError
from tests.patience import PATIENCE
from tests.supervisor.rig import agent, alive, eventually


@pytest.fixture(autouse=True)
def _no_overlap(monkeypatch, tmp_path):
    monkeypatch.setattr(adapter, "capabilities", replace(adapter.capabilities, overlap=False))
    (tmp_path / "agents.py").write_text("async def handle(event, ctx): ...\n")


async def test_the_slot_moves_when_the_old_one_has_drained(run):
    team = await run(agent(replicas=2))
    await team.all_ready()
    old = team.agent()["pids"]
    await team.supervisor.update(team.with_agents(agent(replicas=2, config={"x": 1})))
    assert not any(map(alive, old))
    words = [(name, word) for name, _, word, _ in team.record()][4:]
    one, two = "research.0", "research.1"
    assert words == [(name, word) for name in (one, two) for word in ("drain", "start", "ready")]


@pytest.mark.parametrize(
    ("code", "says", "deadline"),
    [
        ("import nothing_like_this\n", "nothing_like_this", PATIENCE),
        ("def broken(:\n", "SyntaxError", PATIENCE),
        ("import os\nos._exit(3)\n", "ended with 3", PATIENCE),
        ("import time\ntime.sleep(60)\n", "did not load within", 2.0),
    ],
)
async def test_code_that_does_not_load_never_ends_the_old_one(run, tmp_path, code, says, deadline):
    team = await run(agent(), start_deadline=deadline)
    await team.all_ready()
    old = team.agent()["pids"]
    (tmp_path / "agents.py").write_text(code)
    with pytest.raises(SupervisorError, match=says):
        await team.supervisor.update(team.topology)
    assert team.agent()["pids"] == old
    assert team.words("research.0") == ["start", "ready"]


async def test_taken_back_when_it_loads_but_does_not_start(run):
    team = await run(agent())
    await team.all_ready()
    with pytest.raises(SupervisorError, match="does not stay up"):
        await team.supervisor.update(team.with_agents(agent(config={"do": "exit", "code": 70})))
    await team.all_ready()
    assert team.supervisor.status()["revision"] == team.topology.revision()


async def test_scaling_during_an_edit_that_fails_scales_what_ran_before(run):
    team = await run(agent())
    before = team.supervisor.status()["revision"]
    broken = team.with_agents(agent(config={"do": "exit", "code": 70}))
    editing = asyncio.create_task(team.supervisor.update(broken))
    await eventually(lambda: team.supervisor.status()["revision"] != before)
    await team.supervisor.scale("research", 2)
    with pytest.raises(SupervisorError):
        await editing
    assert team.supervisor.status()["revision"] == before
    assert team.agent()["ready"] == 2
