"""What the warm parent does before its first fork: it must leave nothing behind but shorter ways."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.supervisor.rig import eventually

_REHEARSE = """
import asyncio, json, os, signal, socket, sys, threading
from orchestrator.supervisor.warming import warm_up
from orchestrator.worker.main import Worker

ours, theirs = socket.socketpair()
ours.setblocking(False)
theirs.setblocking(False)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.set_wakeup_fd(theirs.fileno())

def state():
    handlers = [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    return [sys.path.copy(), handlers, os.getcwd(), dict(os.environ), sorted(os.listdir("/proc/self/fd"))]

before, code = state(), {f.__name__: id(f.__code__) for f in (Worker.serve, Worker._make_way, asyncio.run)}
warm_up()
after = state()
moved = [f.__name__ for f in (Worker.serve, Worker._make_way, asyncio.run) if id(f.__code__) != code[f.__name__]]
os.kill(os.getpid(), signal.SIGUSR1)
print(json.dumps({
    "changed": [pair for pair in zip(before, after) if pair[0] != pair[1]],
    "threads": len(os.listdir("/proc/self/task")),
    "woken": len(ours.recv(16)),
    "moved": moved,
}))
"""


def test_a_rehearsal_moves_together_what_ran_and_leaves_nothing_behind() -> None:
    done = subprocess.run([sys.executable, "-c", _REHEARSE], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said == {"changed": [], "threads": 1, "woken": 1, "moved": ["serve", "run"]}


_TOPOLOGY = """
apiVersion: orchestrator/v1
kind: Topology
metadata: {{name: {name}}}
brokers: {{main: {{url: "{url}", prefix: "{name}."}}}}
channels:
  tasks: {{events: [task.*], mode: queue}}
  dead-letters: {{mode: log}}
agents:
  idle: {{handler: "agents:handle", subscribe: [task.assigned], dead_letter: dead-letters}}
"""

_AGENTS = """
import asyncio, json, sys
from contextlib import asynccontextmanager
from pathlib import Path

at_fork = set(sys.modules)

async def note():
    journal = Path(__file__).parent / ".orchestrator/run/idle.0.journal"
    while not journal.exists():
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.5)  # a round of reports and beats
    found = Path(__file__).with_name("found")
    found.with_suffix(".part").write_text(json.dumps(sorted(set(sys.modules) - at_fork)))
    found.with_suffix(".part").rename(found)

@asynccontextmanager
async def lifespan(ctx):
    task = asyncio.create_task(note())
    yield
    task.cancel()

async def handle(event, ctx): ...
"""


@pytest.mark.parametrize("kind", ["nats", "kafka"])
async def test_an_idle_worker_imports_nothing_of_its_own(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What is imported after the fork, each worker has to itself."""
    url = request.getfixturevalue(f"{kind}_server").url
    (tmp_path / "topology.yaml").write_text(_TOPOLOGY.format(name=f"warm{uuid.uuid4().hex[:8]}", url=url))
    (tmp_path / "agents.py").write_text(_AGENTS)
    command = [sys.executable, "-m", "orchestrator.cli.main"]
    applied = subprocess.Popen([*command, "apply", "--yes"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        await eventually((tmp_path / "found").exists, within=40.0)
        assert json.loads((tmp_path / "found").read_text()) == []
    finally:
        applied.send_signal(signal.SIGTERM)
        applied.wait(30)
        subprocess.run([*command, "destroy", "--yes"], cwd=tmp_path, capture_output=True, check=True, timeout=30)
