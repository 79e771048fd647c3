"""What workers share: the warm parent has imported all that an idle worker needs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.supervisor.rig import eventually

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


@pytest.mark.parametrize("kind", ["nats", "redis", "kafka"])
async def test_an_idle_worker_imports_nothing_of_its_own(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What is imported after the fork, each worker has to itself."""
    url = request.getfixturevalue(f"{kind}_server").url
    (tmp_path / "topology.yaml").write_text(_TOPOLOGY.format(name=f"warm{uuid.uuid4().hex[:8]}", url=url))
    (tmp_path / "agents.py").write_text(_AGENTS)
    command = [sys.executable, "-m", "orchestrator.cli"]
    applied = subprocess.Popen([*command, "apply", "--yes"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        await eventually((tmp_path / "found").exists, within=40.0)
        assert json.loads((tmp_path / "found").read_text()) == []
    finally:
        applied.send_signal(signal.SIGTERM)
        applied.wait(30)
        subprocess.run([*command, "destroy", "--yes"], cwd=tmp_path, capture_output=True, check=True, timeout=30)
