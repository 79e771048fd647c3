"""A topology on a real broker and real worker processes of it, for tests that kill them.

Handlers append to a file, so what has run is known whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from orchestrator import Client
from orchestrator.brokers import registry
from orchestrator.brokers.base import Connection, Stored
from orchestrator.brokers.connections import Connections
from orchestrator.topology import load
from orchestrator.topology.model import Topology
from tests.patience import PATIENCE

_LAUNCH = Path(__file__).with_name("launch.py")
_TOP = Path(__file__).resolve().parents[2]

PRELUDE = """
import asyncio, os, signal, sys, time
from pathlib import Path
from orchestrator import AgentEvent, Context, Reject, RetryLater

HERE = Path(__file__).parent

def note(what):
    with open(HERE / "ran.txt", "a") as file:
        file.write(f"{what}\\n")
"""


class Worker:
    """One worker process and the supervisor's end of its control socket."""

    def __init__(self, file: Path, agent: str, slot: int, run_dir: Path) -> None:
        self._control, theirs = socket.socketpair()
        self.log = run_dir / f"{agent}.{slot}.log"
        run_dir.mkdir(exist_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(_LAUNCH), str(file), agent, str(slot), str(run_dir), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
                cwd=_TOP,
                env={**os.environ, "PYTHONPATH": str(_TOP)},
            )
        theirs.close()
        self._control.setblocking(False)
        self._buffer = b""
        self.messages: list[dict[str, Any]] = []

    def read(self) -> None:
        try:
            while data := self._control.recv(65536):
                self._buffer += data
        except (BlockingIOError, ConnectionResetError):
            pass
        *lines, self._buffer = self._buffer.split(b"\n")
        self.messages += [json.loads(line) for line in lines]

    async def said(self, kind: str, timeout: float = PATIENCE, **more: Any) -> dict[str, Any]:
        """The first message of this kind (with these values), waiting for it."""

        def found() -> dict[str, Any] | None:
            self.read()
            return next(
                (m for m in self.messages if m["type"] == kind and all(m.get(k) == v for k, v in more.items())), None
            )

        return await until(found, timeout, lambda: f"no {kind} {more}: {self.messages[-3:]}\n{self.log.read_text()}")

    def tell(self, kind: str, **more: Any) -> None:
        self._control.sendall(json.dumps({"type": kind, **more}).encode() + b"\n")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    async def ended(self, timeout: float = PATIENCE) -> int:
        """The exit code, waiting for it."""
        await until(lambda: self.process.poll() is not None, timeout, lambda: "the worker is still running")
        return self.process.returncode

    def hang_up(self) -> None:
        """As when the supervisor dies."""
        self._control.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._control.close()


class Stage:
    """A topology file with its handlers, applied to its broker."""

    def __init__(self, folder: Path, topology: Topology, connections: Connections, client: Client) -> None:
        self.folder = folder
        self.topology = topology
        self.connections = connections
        self.client = client
        self._workers: list[Worker] = []

    def worker(self, agent: str = "worker", slot: int = 0) -> Worker:
        worker = Worker(self.folder / "topology.yaml", agent, slot, self.folder / "run")
        self._workers.append(worker)
        return worker

    def ran(self) -> list[str]:
        """What the handlers noted, in order."""
        file = self.folder / "ran.txt"
        return file.read_text().split() if file.exists() else []

    async def connection(self, broker: str | None = None) -> Connection:
        return await self.connections.get(broker or next(iter(self.topology.brokers)))

    async def stored(self, channel: str, *, dead_letters: bool = False) -> list[Stored]:
        found = self.topology.channels[channel]
        connection = await self.connection(found.broker)
        return [s async for s in connection.browse(found, start="earliest", dead_letters=dead_letters)]

    async def letters(self) -> list[Stored]:
        return await self.stored("dead", dead_letters=True)

    async def backlog(self) -> int:
        """Events that are not settled yet, over all subscriptions."""
        total = 0
        for agent in self.topology.agents.values():
            for subscription in agent.subscriptions:
                connection = await self.connection(subscription.broker)
                lag = (await connection.lag([subscription]))[subscription.agent, subscription.channel]
                total += max(0, lag.waiting) + max(0, lag.in_flight) + max(0, lag.delayed)
        return total

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


@asynccontextmanager
async def staged(folder: Path, topology: str, handlers: str) -> AsyncIterator[Stage]:
    """Writes both files, creates what the topology asks for, and gives the stage."""
    (folder / "topology.yaml").write_text(textwrap.dedent(topology))
    (folder / "agents.py").write_text(PRELUDE + textwrap.dedent(handlers))
    loaded = load([folder / "topology.yaml"]).topology
    connections = Connections(loaded, name="test")
    for broker in loaded.brokers.values():
        adapter = registry.adapter(broker.kind)
        connection = await connections.get(broker.name)
        for desired in adapter.desired(loaded, broker):
            await connection.create(desired)
    async with Client(loaded) as client:
        stage = Stage(folder, loaded, connections, client)
        try:
            yield stage
        finally:
            stage.close()
            await connections.close()


async def until(what: Callable[[], Any], timeout: float = PATIENCE, why: Callable[[], str] = lambda: "") -> Any:
    """Waits until `what()` is true, and returns it."""
    deadline = time.monotonic() + timeout
    while True:
        if found := what():
            return found
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {why()}"
        await asyncio.sleep(0.02)
