"""The supervisor killed with SIGKILL: its workers end, and the next one starts clean."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from orchestrator.errors import SupervisorError
from orchestrator.supervisor import supervisor as module
from orchestrator.supervisor.control import ControlClient, read_record, running
from tests.patience import PATIENCE
from tests.supervisor.rig import agent, alive, eventually, topology

ROOT = Path(__file__).parents[2]


async def start(folder: Path) -> asyncio.subprocess.Process:
    path = f"{ROOT}:{Path(__file__).parent}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.supervisor.killed_supervisor",
        str(folder),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), PATIENCE) == b"ready\n"
    return process


async def test_a_killed_supervisor_takes_its_workers_along_and_the_next_starts_clean(tmp_path, run):
    first = await start(tmp_path)
    state_dir = tmp_path / ".orchestrator"
    assert running(state_dir)
    record = tmp_path / ".orchestrator" / "run" / "record"
    pids = {int(line.split()[1]) for line in record.read_text().splitlines()}
    assert len(pids) == 3
    first.kill()
    await asyncio.wait_for(first.wait(), PATIENCE)
    await eventually(lambda: not any(map(alive, pids)))
    assert not running(state_dir)
    assert read_record(state_dir) is not None  # left behind
    with pytest.raises(SupervisorError, match="no supervisor runs"):
        await ControlClient(state_dir).status()
    team = await run(agent(replicas=2), agent("writing"))
    await team.all_ready()
    assert (await ControlClient(state_dir).ping())["pid"] == os.getpid()


async def test_a_worker_that_outlives_its_supervisor_is_waited_for_and_then_killed(tmp_path, run, monkeypatch):
    monkeypatch.setattr(module, "LAST_DRAIN", 0.5)
    first = await start(tmp_path)
    lines = (tmp_path / ".orchestrator" / "run" / "record").read_text().splitlines()
    frozen = next(int(line.split()[1]) for line in lines if line.startswith("research.0"))
    os.kill(frozen, signal.SIGSTOP)
    first.kill()
    await asyncio.wait_for(first.wait(), PATIENCE)
    team = await run(agent(replicas=2), agent("writing"))
    assert not alive(frozen)
    assert "waiting for the workers of an earlier supervisor" in team.text.getvalue()
    assert f"research.0 (pid {frozen})" in team.text.getvalue()
    await team.all_ready()
    starts = [(pid, at) for name, pid, word, at in team.record() if (name, word) == ("research.0", "start")]
    assert len({pid for pid, _ in starts}) == 2


async def test_the_folder_and_the_socket_are_private(run, tmp_path):
    state_dir = tmp_path / ".orchestrator"
    state_dir.mkdir(mode=0o755)
    await run(agent())
    record = read_record(state_dir)
    assert record is not None
    socket = Path(record["socket"])  # elsewhere when the folder's name is too long for a socket
    for path, mode in ((state_dir, 0o700), (socket.parent, 0o700), (socket, 0o600), (state_dir / "run", 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert topology(tmp_path).state_dir == state_dir
