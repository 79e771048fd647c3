"""The supervisor with the real worker on a real NATS server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.brokers.connections import Connections
from orchestrator.client import Client
from orchestrator.errors import SupervisorError
from orchestrator.reconcile import service
from orchestrator.supervisor import detached
from orchestrator.supervisor.control import ControlClient, running
from orchestrator.supervisor.logfiles import recent
from orchestrator.supervisor.logs import LogSink
from orchestrator.supervisor.supervisor import Supervisor
from orchestrator.topology import load
from orchestrator.topology.model import Topology
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer
from tests.supervisor.rig import YAML, alive, eventually

CODE = """
import asyncio, os

async def research(event, ctx):
    await asyncio.sleep(0.005)
    line = f"{event.payload['n']} {ctx.config['note']} {os.getpid()}\\n"
    with open(os.environ["RECORD"], "a") as file:
        file.write(line)
"""


class Team:
    def __init__(self, folder: Path, url: str, name: str) -> None:
        self.folder, self.url, self.name = folder, url, name
        (folder / "agents.py").write_text(CODE)

    def load(self, note: str = "old") -> Topology:
        path = self.folder / "topology.yaml"
        path.write_text(YAML.format(url=self.url, name=self.name, note=note, replicas=2))
        return load([path]).topology

    async def apply(self, topology: Topology) -> None:
        connections = Connections(topology, name="test")
        try:
            await service.execute(await service.make_plan(topology, connections), connections)
        finally:
            await connections.close()

    def handled(self) -> list[tuple[int, str]]:
        path = self.folder / "record"
        rows = (line.split() for line in path.read_text().splitlines()) if path.exists() else ()
        return [(int(number), note) for number, note, _ in rows]


@pytest.fixture
def team(tmp_path, nats_server, request, monkeypatch):
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return Team(tmp_path, nats_server.url, f"sv-{abs(hash(request.node.name)) % 10**8}")


async def shows(client: ControlClient, what: Callable[[dict], bool]) -> dict:
    """The first status of which that is true."""
    deadline = time.monotonic() + PATIENCE
    while not what(status := await client.status()):
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.02)
    return status


async def ready(client: ControlClient, count: int) -> dict:
    return await shows(client, lambda status: status["agents"][0]["ready"] == count)


async def test_edits_under_load_lose_and_double_nothing(team):
    topology = team.load()
    await team.apply(topology)
    output = LogSink(folder=topology.state_dir / "logs")
    supervisor = Supervisor(topology, output=output)
    task = asyncio.create_task(supervisor.run())
    await supervisor.started()
    client = ControlClient(topology.state_dir)
    await ready(client, 2)

    async def publish() -> None:
        async with Client(topology) as publisher:
            for number in range(1000):
                await publisher.publish("task.assigned", {"n": number})

    publishing = asyncio.create_task(publish())
    await eventually(lambda: len(team.handled()) > 50)
    await supervisor.update(team.load("new"))
    (team.folder / "agents.py").write_text("import no_such_module\n")
    with pytest.raises(SupervisorError, match="no_such_module"):
        await supervisor.update(team.load("new"))
    (team.folder / "agents.py").write_text(CODE + "# mended\n")
    await supervisor.update(team.load("newest"))
    await publishing
    await eventually(lambda: len({number for number, _ in team.handled()}) == 1000)
    assert len(team.handled()) == 1000
    assert {note for _, note in team.handled()} == {"old", "new", "newest"}
    await eventually(lambda: supervisor.status()["agents"][0]["in_flight"] == 0)
    supervisor.stop()
    assert await task == 0
    output.close()
    assert not list((topology.state_dir / "run").glob("*.journal"))


async def test_status_answers_while_the_broker_is_down(tmp_path, monkeypatch):
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    server = NatsServer().start()
    team = Team(tmp_path, server.url, "down")
    topology = team.load()
    await team.apply(topology)
    supervisor = Supervisor(topology, output=LogSink())
    task = asyncio.create_task(supervisor.run())
    await supervisor.started()
    client = ControlClient(topology.state_dir)
    try:
        await ready(client, 2)
        await shows(client, lambda status: status["agents"][0]["lag"] == 0)
        server.pause()
        await asyncio.sleep(1.1)  # what was learned a second ago is used again
        status = await client.status()  # the client itself waits for some seconds only
        assert status["agents"][0]["lag"] is None
        assert status["agents"][0]["reason"]
        server.resume()
        await shows(client, lambda status: status["agents"][0]["lag"] is not None and status["state"] == "running")
    finally:
        supervisor.stop()
        assert await asyncio.wait_for(task, PATIENCE) == 0
        server.close()


async def test_detached(team):
    topology = team.load()
    await team.apply(topology)
    pid = await detached.start(topology)
    client = ControlClient(topology.state_dir)
    try:
        await ready(client, 2)
        assert (await client.ping())["pid"] == pid != os.getpid()
        with pytest.raises(SupervisorError, match="already runs"):
            await detached.start(topology)
        async with Client(topology) as publisher:
            await publisher.publish("task.assigned", {"n": 1})
        await eventually(lambda: team.handled() == [(1, "old")])
        children = psutil.Process(pid).children(recursive=True)
        assert len(children) == 3
    finally:
        await client.stop()
    await eventually(lambda: not any(alive(child.pid) for child in children))
    assert not running(topology.state_dir)
    events = [record["event"] for record in recent(topology.state_dir / "logs", ["supervisor"], 100)]
    assert "research.0 is ready" in events


async def test_a_detached_supervisor_that_cannot_start_says_why(team):
    topology = team.load()
    topology.state_dir.mkdir()
    (topology.state_dir / "run").write_text("in the way")
    with pytest.raises(SupervisorError, match=r"^cannot use .*: File exists"):
        await detached.start(topology)


async def test_an_idle_worker_is_small_and_starts_fast(team):
    """Figures of one machine, with room: what is measured is printed by `pytest -rP`."""
    topology = team.load()
    await team.apply(topology)
    supervisor = Supervisor(topology, output=LogSink())
    task = asyncio.create_task(supervisor.run())
    await supervisor.started()
    client = ControlClient(topology.state_dir)
    await ready(client, 2)
    await client.scale("research", 16)
    pids = (await client.status())["agents"][0]["pids"]
    workers = [psutil.Process(pid) for pid in pids]
    took = [used.user + used.system for used in (worker.cpu_times() for worker in workers)]
    memory = [worker.memory_full_info() for worker in workers]
    print(json.dumps({"cpu_until_ready_s": took, "pss_mib": [m.pss >> 20 for m in memory], "uss": memory[0].uss}))
    assert min(took) < 0.5, "as long as an interpreter takes to start"
    assert max(m.uss for m in memory) < 12 << 20
    os.kill(pids[0], signal.SIGKILL)
    supervisor.stop()
    assert await task == 0
