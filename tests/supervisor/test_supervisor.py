"""The supervisor with real processes: start, watch, replace, drain. What happened is judged by what the workers
themselves wrote down."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from itertools import pairwise
from typing import Any

import psutil
import pytest

from orchestrator.errors import LockedError, SupervisorError
from orchestrator.supervisor import process, room
from orchestrator.supervisor.nursery import Nursery
from orchestrator.topology.model import Restart, Topology
from tests.patience import PATIENCE
from tests.supervisor.rig import Running, agent, alive, eventually

FAST = Restart(initial_delay=0.05, max_delay=0.4, healthy_after=30.0)
LATE = Restart(initial_delay=600.0, max_delay=600.0)  # who is restarted by this rule is not in a test's time


async def test_starts_watches_and_drains(run):
    team = await run(agent(replicas=2), agent("writing"))
    await team.all_ready()
    assert team.agent()["state"] == "running"
    assert team.supervisor.status()["state"] == "running"
    pids = team.agent()["pids"] + team.agent("writing")["pids"]
    assert len(set(pids)) == 3
    assert all(map(alive, pids))
    assert await team.stop() == 0
    assert not any(map(alive, pids))
    assert team.words("research.1") == ["start", "ready", "drain"]


async def test_a_killed_worker_is_replaced_in_its_slot(run):
    team = await run(agent(restart=FAST))
    await team.all_ready()
    (first,) = team.agent()["pids"]
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: team.agent()["pids"] not in ([], [first]))
    await team.all_ready()
    assert team.agent()["restarts"] == 1
    assert team.words("research.0") == ["start", "ready"] * 2


async def test_a_crash_loop_backs_off_and_is_shown_while_the_others_run(run):
    team = await run(agent(config={"do": "crash"}, restart=FAST), agent("writing"))
    await eventually(lambda: team.agent()["state"] == "crash-loop")
    assert "in a row" in team.agent()["reason"]
    assert team.agent("writing")["state"] == "running"
    assert team.agent("writing")["restarts"] == 0
    assert team.supervisor.status()["state"] == "degraded"
    starts = [at for name, _, word, at in team.record() if (name, word) == ("research.0", "start")]
    gaps = [b - a for a, b in pairwise(starts)]
    assert gaps[3] > 0.3


async def test_a_handler_that_does_not_load_is_named(run):
    team = await run(agent(config={"do": "fail"}), agent("writing"))
    await eventually(lambda: team.agent()["state"] == "failed")
    assert team.agent()["reason"] == "no module named x"
    await eventually(lambda: team.agent("writing")["state"] == "running")


async def test_a_suspended_worker_is_killed_and_replaced(run, monkeypatch):
    monkeypatch.setattr(process.Limits, "of", lambda agent: process.Limits(restart=FAST, silent=3.0))
    team = await run(agent(config={"do": "freeze", "after": 0.2}))
    await eventually(lambda: team.agent()["restarts"] >= 1)
    await eventually(lambda: "silent" in team.text.getvalue())


async def test_a_blocked_loop_is_noticed(run):
    team = await run(agent(config={"do": "block"}))
    await eventually(lambda: "event loop has been blocked" in team.text.getvalue())
    await eventually(lambda: team.agent()["restarts"] >= 1)


async def test_a_worker_that_asks_for_it_is_replaced_at_once(run):
    team = await run(agent(config={"do": "replace"}, restart=LATE))
    await eventually(lambda: team.words("research.0").count("ready") == 2)


async def test_exit_code_75_is_replaced_at_once(run):
    team = await run(agent(config={"do": "exit", "code": 75}, restart=LATE))
    await eventually(lambda: team.words("research.0").count("start") >= 2)


async def test_trouble_is_shown(run):
    team = await run(agent(config={"trouble": "stream TASKS was deleted"}))
    await eventually(lambda: team.agent()["state"] == "unhealthy")
    assert team.agent()["reason"] == "stream TASKS was deleted"


async def test_an_exhausted_event_pauses_the_whole_agent(run):
    team = await run(agent(replicas=2, config={"do": "exhausted"}))
    await eventually(lambda: team.agent()["state"] == "paused")
    assert team.agent()["reason"] == "an event was exhausted"
    await eventually(lambda: all("pause" in team.words(f"research.{n}") for n in (0, 1)))


async def test_drains_within_the_timeout_and_kills_after_it(run, monkeypatch):
    monkeypatch.setattr(process.Limits, "of", lambda agent: process.Limits(drain=0.3, grace=0.2))
    team = await run(agent(config={"do": "stay"}), agent("writing"))
    await team.all_ready()
    pids = team.agent()["pids"]
    assert await team.stop() == 0
    assert not alive(pids[0])
    assert "did not drain in time" in team.text.getvalue()


async def test_a_second_interrupt_forces(run):
    team = await run(agent(config={"do": "stay"}, drain_timeout=600.0))
    await team.all_ready()
    (pid,) = team.agent()["pids"]
    os.kill(os.getpid(), signal.SIGINT)
    await eventually(lambda: team.supervisor.status()["state"] == "stopping")
    assert alive(pid)
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(team.task, PATIENCE) == 130
    assert not alive(pid)


async def test_sigterm_drains(run):
    team = await run(agent())
    await team.all_ready()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(team.task, PATIENCE) == 0
    assert team.words("research.0")[-1] == "drain"


async def test_two_supervisors_of_one_topology(run, tmp_path):
    await run(agent())
    with pytest.raises(LockedError, match=f"pid {os.getpid()}") as error:
        await Running(tmp_path, agent()).supervisor.run()
    assert "orchestrator stop" in error.value.hint


async def test_the_warm_parent_killed(run):
    team = await run(agent(replicas=2))
    await team.all_ready()
    before = team.agent()["pids"]
    warm = team.supervisor._fleet.warm_pid
    os.kill(warm, signal.SIGKILL)
    await eventually(lambda: team.agent()["pids"] and not set(team.agent()["pids"]) & set(before))
    await team.all_ready()
    await eventually(lambda: not any(map(alive, before)))
    assert team.supervisor._fleet.warm_pid != warm
    new_ready = [at for name, pid, word, at in team.record() if word == "ready" and pid not in before]
    drains = [at for _, pid, word, at in team.record() if word == "drain" and pid in before]
    assert max(new_ready) <= min(drains)  # no gap
    assert await team.stop() == 0


async def test_an_orphan_that_is_frozen_is_killed(run, monkeypatch):
    monkeypatch.setattr(process.Limits, "of", lambda agent: process.Limits(silent=3.0, restart=FAST))
    team = await run(agent())
    await team.all_ready()
    (before,) = team.agent()["pids"]
    os.kill(before, signal.SIGSTOP)
    os.kill(team.supervisor._fleet.warm_pid, signal.SIGKILL)
    await eventually(lambda: not alive(before))
    await team.all_ready()


async def test_nothing_leaks_over_a_hundred_reloads(run):
    team = await run(agent(), agent("writing"))
    await team.all_ready()
    me = psutil.Process()
    warm = psutil.Process(team.supervisor._fleet.warm_pid)

    def held():
        return me.num_fds(), warm.num_fds(), len(me.children(recursive=True))

    for number in range(3):
        await team.supervisor.update(team.with_agents(agent(config={"n": number}), agent("writing")))
    before = held()
    for number in range(100):
        await team.supervisor.update(team.with_agents(agent(config={"n": number + 10}), agent("writing")))
    # less is no leak: a process of an earlier test may have been there at first
    await eventually(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
    assert team.agent("writing")["restarts"] == 0
    assert team.words("writing.0") == ["start", "ready"]


async def test_an_edit_replaces_without_a_gap(run):
    team = await run(agent(replicas=2), agent("writing"))
    await team.all_ready()
    old = team.agent()["pids"]
    await team.supervisor.update(team.with_agents(agent(replicas=2, config={"x": 1}), agent("writing")))
    assert team.agent()["state"] == "running"
    assert not any(map(alive, old))
    new_ready = [
        at for name, pid, word, at in team.record() if word == "ready" and name in ("research.2", "research.3")
    ]
    drains = [at for _, pid, word, at in team.record() if word == "drain" and pid in old]
    assert (len(new_ready), len(drains)) == (2, 2)
    assert max(new_ready) <= min(drains)
    assert team.words("writing.0") == ["start", "ready"]


async def test_agents_come_and_go(run):
    team = await run(agent(), agent("writing"))
    await team.all_ready()
    await team.supervisor.update(team.with_agents(agent("writing"), agent("review")))
    assert [each["name"] for each in team.supervisor.status()["agents"]] == ["writing", "review"]
    assert team.words("research.0") == ["start", "ready", "drain"]
    assert team.words("writing.0") == ["start", "ready"]


@pytest.mark.parametrize(
    ("config", "says", "deadline"),
    [
        ({"do": "fail"}, "no module named x", PATIENCE),
        ({"do": "exit", "code": 70}, "does not stay up", PATIENCE),
        ({"do": "deaf"}, "not ready", 2.0),
    ],
)
async def test_an_edit_that_does_not_start_leaves_the_old_running(run, config, says, deadline):
    team = await run(agent(restart=FAST), agent("writing"), start_deadline=deadline)
    await team.all_ready()
    old = team.agent()["pids"]
    broken = team.with_agents(agent(config=config, restart=FAST, drain_timeout=0.1), agent("writing", concurrency=2))
    with pytest.raises(SupervisorError, match=says):
        await team.supervisor.update(broken)
    assert set(old) <= set(team.agent()["pids"])
    await eventually(lambda: team.agent()["pids"] == old)
    assert team.words("research.0") == ["start", "ready"]
    assert "drain" not in team.words("writing.0")
    await eventually(lambda: len(team.agent("writing")["pids"]) == 1)
    assert team.supervisor.status()["revision"] == team.topology.revision()


async def test_a_journal_left_in_a_drain_is_taken_over(run):
    team = await run(agent(config={"do": "crash_in_drain"}))
    await team.all_ready()
    await team.supervisor.update(team.with_agents(agent()))
    await eventually(lambda: "recovered" in team.words("research.0"))
    await eventually(lambda: team.words("research.0")[-1] == "drain")
    assert team.agent()["ready"] == 1


async def test_restart_scale_pause_and_resume(run):
    team = await run(agent(), agent("writing"))
    await team.all_ready()
    (old,) = team.agent()["pids"]
    await team.supervisor.restart("research")
    assert old not in team.agent()["pids"]
    await team.supervisor.scale("research", 3)
    assert (team.agent()["ready"], team.agent()["replicas"]) == (3, 3)
    await team.supervisor.scale("research", 0)
    assert (team.agent()["state"], team.agent()["pids"]) == ("stopped", [])
    await team.supervisor.update(team.topology)
    assert (team.agent()["ready"], team.agent()["replicas"]) == (1, 1)
    assert team.words("writing.0") == ["start", "ready"]
    with pytest.raises(SupervisorError, match="no agent 'nobody'"):
        await team.supervisor.scale("nobody", 1)


async def test_a_worker_for_which_no_descriptor_is_left_is_tried_again_and_the_others_go_on(run, monkeypatch):
    """As when somebody scales to thousands; the error had ended the supervisor, and every worker with it."""
    spawn, refused = Nursery.spawn, []

    def full(self: Nursery, key: str, topology: Topology, agent: str, slot: int, *rest: Any, **more: Any) -> Any:
        if slot == 1 and len(refused) < 2:
            refused.append(slot)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return spawn(self, key, topology, agent, slot, *rest, **more)

    monkeypatch.setattr(Nursery, "spawn", full)
    team = await run(agent(replicas=2, restart=FAST))
    await team.all_ready()
    assert refused == [1, 1]
    assert "cannot be started: Too many open files" in team.text.getvalue()
    assert team.words("research.0") == team.words("research.1") == ["start", "ready"]


async def test_more_workers_than_there_is_memory_for_are_refused(run, monkeypatch):
    team = await run(agent(), agent("writing"))
    await team.all_ready()
    monkeypatch.setattr(room, "_available", lambda: 100 << 20)
    with pytest.raises(SupervisorError, match="no room for 999 more workers: 100 MiB of memory"):
        await team.supervisor.scale("research", 1000)
    assert team.supervisor.status()["state"] == "running"
    assert team.words("research.0") == team.words("writing.0") == ["start", "ready"]
    await team.supervisor.scale("research", 2)


def test_the_memory_that_is_free_is_read():
    free = room._available()
    assert free is None or 0 < free <= psutil.virtual_memory().total
