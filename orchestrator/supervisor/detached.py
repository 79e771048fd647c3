"""`apply -d`: starts a supervisor that outlives the command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time

from orchestrator.errors import SupervisorError
from orchestrator.supervisor.control import ControlClient
from orchestrator.topology import dump
from orchestrator.topology.model import Topology

#: Seconds until the control socket must answer.
PATIENCE = 60.0


async def start(topology: Topology) -> int:
    """Returns the pid of the new supervisor once it answers; its workers may still be starting.

    Raises SupervisorError, with what the supervisor said, when it ends at once or does not answer.
    """
    topology.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    said = topology.state_dir / "supervisor.err"
    pid = _spawn(topology, str(said))
    client = ControlClient(topology.state_dir)
    deadline = time.monotonic() + PATIENCE
    ended = False
    while not ended and time.monotonic() < deadline:
        with contextlib.suppress(SupervisorError):
            if (await client.ping())["pid"] == pid:
                return pid
        await asyncio.sleep(0.05)
        ended = _ended(pid)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    text = topology.redact(said.read_text(errors="replace")).strip()
    raise SupervisorError(text or "the supervisor ended without a word", hint=f"see {topology.state_dir / 'logs'}")


def _ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def _spawn(topology: Topology, said: str) -> int:
    """Bare descriptors and a bare pid: a Popen or a transport would want to end its process with the command."""
    handed = topology.state_dir / "supervisor.topology"
    create = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    stdin = os.open(handed, create, 0o600)
    output = os.open(said, create, 0o600)
    try:
        handed.unlink()  # only the two of us see it: it holds the topology's secrets
        with os.fdopen(os.dup(stdin), "wb") as file:
            file.write(dump(topology))
        os.lseek(stdin, 0, os.SEEK_SET)
        actions = [
            (os.POSIX_SPAWN_DUP2, descriptor, target) for descriptor, target in ((stdin, 0), (output, 1), (output, 2))
        ]
        command = [sys.executable, "-P", "-m", "orchestrator.supervisor"]
        return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
    finally:
        os.close(stdin)
        os.close(output)
