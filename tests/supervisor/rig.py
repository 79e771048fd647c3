"""Topologies and supervisors for the tests here: real processes, a worker that the tests can steer."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.supervisor.logs import LogSink
from orchestrator.supervisor.supervisor import Supervisor
from orchestrator.topology.model import Agent, Broker, Channel, Handler, Mode, Publication, Subscription, Topology
from tests.patience import PATIENCE

ENTRY = "fake_worker:run"

#: A topology for the real worker; the folder needs agents.py with `research`.
YAML = """
apiVersion: orchestrator/v1
kind: Topology
metadata: {{name: {name}}}
brokers: {{main: {{url: "{url}", prefix: "{name}."}}}}
channels:
  tasks: {{events: [task.*], mode: queue}}
  dead-letters: {{mode: log}}
defaults: {{agents: {{dead_letter: dead-letters}}}}
agents:
  research:
    handler: agents:research
    subscribe: [task.assigned]
    replicas: {replicas}
    config: {{note: "{note}"}}
"""


def agent(name: str = "research", *, replicas: int = 1, **rest: Any) -> Agent:
    """An agent that reads the one channel; `rest` are fields of Agent."""
    subscription = Subscription(name, "tasks", "main", f"t-{name}", ("task.*",))
    return Agent(
        name=name,
        description="",
        handler=Handler("python", "agents:handle"),
        subscriptions=(subscription,),
        publish=(Publication("agent.completed", "tasks"),),
        replicas=replicas,
        **rest,
    )


def topology(root: Path, *agents: Agent, secrets: tuple[str, ...] = ()) -> Topology:
    channel = Channel("tasks", "main", "TASKS", Mode.LOG, ("task.*", "agent.*"))
    return Topology(
        name="team",
        description="",
        root=root,
        files=(root / "topology.yaml",),
        brokers={"main": Broker("main", "memory://", "memory")},
        channels={"tasks": channel},
        agents={each.name: each for each in agents},
        secrets=secrets,
    )


class Running:
    """A supervisor in this process, its workers in theirs."""

    def __init__(self, root: Path, *agents: Agent, **rest: Any) -> None:
        self.root = root
        self.text = io.StringIO()
        self.output = LogSink(folder=root / ".orchestrator" / "logs", stream=self.text)
        self.topology = topology(root, *agents)
        self.supervisor = Supervisor(self.topology, output=self.output, entry=ENTRY, **rest)
        self.task: asyncio.Task[int] | None = None

    async def start(self) -> None:
        self.task = asyncio.create_task(self.supervisor.run())
        ready = asyncio.create_task(self.supervisor.started())
        await asyncio.wait([self.task, ready], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self.task.done():
            self.task.result()

    async def stop(self) -> int:
        assert self.task is not None
        self.supervisor.stop()
        return await asyncio.wait_for(self.task, PATIENCE)

    def with_agents(self, *agents: Agent) -> Topology:
        return topology(self.root, *agents)

    def record(self) -> list[tuple[str, int, str, float]]:
        """What the workers themselves wrote down: (name, pid, word, time)."""
        path = self.root / ".orchestrator" / "run" / "record"
        if not path.exists():
            return []
        rows = (line.split() for line in path.read_text().splitlines())
        return [(name, int(pid), word, float(at)) for name, pid, word, at in rows]

    def words(self, name: str) -> list[str]:
        return [word for slot, _, word, _ in self.record() if slot == name]

    def agent(self, name: str = "research") -> dict[str, Any]:
        return next(each for each in self.supervisor.status()["agents"] if each["name"] == name)

    async def all_ready(self) -> None:
        await eventually(lambda: all(a["ready"] == a["replicas"] for a in self.supervisor.status()["agents"]))


async def eventually(check: Callable[[], Any], within: float = PATIENCE) -> Any:
    """The first true value of `check`; fails when there is none in time."""
    deadline = time.monotonic() + within
    while not (value := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether the process lives (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
