"""Supervisor, warm parent and workers end in every way while events flow; the handlers' record is counted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.faults.rig import HERE, ROOT, Site
from tests.patience import PATIENCE
from tests.servers.fresh import Server

Sites = Callable[..., Site]
TOTAL = 400
both = pytest.mark.parametrize("server", ["nats", "redis"], indirect=True)


async def flowing(made: Site, total: int = TOTAL) -> asyncio.Task[None]:
    """A task that publishes; returns once a part of it was handled."""
    publishing = asyncio.create_task(made.publish(range(total), "slow"))
    await made.until(lambda: made.handled() >= total // 8, "the first events handled")
    return publishing


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@both
async def test_a_killed_supervisor_loses_and_doubles_nothing(server: Server, site: Sites) -> None:
    made = site(server.url)
    await made.start()
    publishing = await flowing(made)
    assert made.process is not None
    rest = psutil.Process(made.process.pid).children(recursive=True)
    made.process.kill()
    made.process.wait()
    await made.until(lambda: gone(rest), "its processes are gone")
    assert made.run("status").returncode == 1
    await made.start()
    await publishing
    await made.all_handled(TOTAL)
    assert set(made.runs().values()) == {1}  # the workers drained: what ran was settled, the rest given back
    assert set(made.outputs().values()) == {1}
    assert await made.stop() == 0


@pytest.mark.parametrize("server", ["nats"], indirect=True)
async def test_a_killed_warm_parent_loses_and_doubles_nothing(server: Server, site: Sites) -> None:
    made = site(server.url)
    await made.start()
    publishing = await flowing(made)
    warm, before = made.warm(), {worker.pid for worker in made.workers()}
    warm.kill()
    await made.until(lambda: (now := made.agent())["ready"] == 2 and not before & set(now["pids"]), "new ones run")
    assert made.warm().pid != warm.pid
    await publishing
    await made.all_handled(TOTAL)
    assert set(made.runs().values()) == {1}
    assert await made.stop() == 0


@both
async def test_sigterm_under_load_drains_and_gives_the_rest_back_at_once(server: Server, site: Sites) -> None:
    made = site(server.url, env=lease(2 * PATIENCE))
    await made.start()
    publishing = await flowing(made)
    assert await made.stop() == 0
    await publishing
    stopped = made.handled()
    assert stopped < TOTAL
    await made.start()
    await made.until(lambda: made.handled() > stopped, "the rest comes at once, not after a lease")
    await made.all_handled(TOTAL)
    assert set(made.runs().values()) == {1}
    assert made.letters() == []
    assert await made.stop() == 0


@both
async def test_a_worker_stopped_past_its_lease_and_continued_does_no_harm(server: Server, site: Sites) -> None:
    """The lease is shortened, so that the frozen worker's events run elsewhere before it wakes up."""
    made = site(server.url, env=lease(2.0))
    await made.start()
    await made.publish(range(8), "sleep:1")
    await made.until(lambda: made.handled() == 8, "all of them run")
    frozen = made.workers()[0]
    os.kill(frozen.pid, signal.SIGSTOP)
    await asyncio.sleep(6)
    if frozen.is_running():
        os.kill(frozen.pid, signal.SIGCONT)
    await made.publish(range(8, 40))
    await made.all_handled(40)
    assert set(made.outputs()) == set(range(40))
    assert set(made.outputs().values()) == {1}
    assert made.letters() == []
    assert await made.stop() == 0


@both
async def test_a_handler_of_three_leases_runs_once(server: Server, site: Sites) -> None:
    made = site(server.url, env=lease(4.0))
    await made.start()
    await made.publish(range(4), "sleep:12")
    await made.publish(range(4, 40))
    await made.all_handled(40)
    assert made.runs() == dict.fromkeys(range(40), 1)
    assert await made.stop() == 0


def lease(seconds: float) -> dict[str, str]:
    """The environment in which every process started by the command line holds leases of so many seconds."""
    return {"PYTHONPATH": f"{HERE / 'leasing'}{os.pathsep}{ROOT}", "LEASE": str(seconds)}
