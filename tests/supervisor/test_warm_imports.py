"""What workers share: the warm parent has imported all that an idle worker needs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.supervisor.rig import YAML, eventually

_AGENTS = """
import asyncio, json, sys
from contextlib import asynccontextmanager
from pathlib import Path

at_fork = set(sys.modules)

async def note():
    journal = Path(__file__).parent / ".orchestrator/run/research.0.journal"
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

async def research(event, ctx): ...
"""


@pytest.mark.parametrize("kind", ["nats", "redis", "kafka"])
async def test_an_idle_worker_imports_nothing_of_its_own(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What is imported after the fork, each worker has to itself."""
    url = request.getfixturevalue(f"{kind}_server").url
    name = f"warm{uuid.uuid4().hex[:8]}"
    (tmp_path / "topology.yaml").write_text(YAML.format(name=name, url=url, note="", replicas=1))
    (tmp_path / "agents.py").write_text(_AGENTS)
    command = [sys.executable, "-m", "orchestrator.cli"]
    applied = subprocess.Popen([*command, "apply", "--yes"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        await eventually((tmp_path / "found").exists)
        assert json.loads((tmp_path / "found").read_text()) == []
    finally:
        applied.send_signal(signal.SIGTERM)
        applied.wait(PATIENCE)
        subprocess.run([*command, "destroy", "--yes"], cwd=tmp_path, capture_output=True, check=True, timeout=PATIENCE)
