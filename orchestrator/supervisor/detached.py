"""`apply -d`: starts a supervisor that outlives the command."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

from orchestrator.errors import SupervisorError
from orchestrator.supervisor.control import ControlClient
from orchestrator.topology import dump
from orchestrator.topology.model import Topology

#: Seconds until the control socket must answer.
PATIENCE = 30.0


async def start(topology: Topology) -> int:
    """Returns the pid of the new supervisor once it answers; its workers may still be starting.

    Raises SupervisorError, with what the supervisor said, when it ends at once or does not answer.
    """
    topology.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = topology.state_dir / "supervisor.err"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing in the current folder shadows the library
            "-m",
            "orchestrator.supervisor",
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=topology.root,
        )
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it ended already: told below
        process.stdin.write(dump(topology))
        await process.stdin.drain()
    process.stdin.close()
    client = ControlClient(topology.state_dir)
    deadline = time.monotonic() + PATIENCE
    while process.returncode is None and time.monotonic() < deadline:
        with contextlib.suppress(SupervisorError):
            if (await client.ping())["pid"] == process.pid:
                return process.pid
        await asyncio.sleep(0.05)
    said = topology.redact(log.read_text(errors="replace")).strip()
    if process.returncode is None:
        process.kill()
        await process.wait()
    raise SupervisorError(said or "the supervisor ended without a word", hint=f"see {topology.state_dir / 'logs'}")
