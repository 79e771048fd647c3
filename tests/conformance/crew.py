"""Real worker processes for the suite: as many slots as asked for, each started again whenever it ends badly."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import signal
import socket
import sys
from collections import Counter
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from orchestrator.topology.model import Handler, Publication, RetryPolicy, Topology
from tests.patience import PATIENCE

from .rig import Lab

HERE = Path(__file__).resolve().parent
#: A mechanism that the workers of this context do without; set by test_mutations.py alone.
MUTATION: ContextVar[str] = ContextVar("MUTATION", default="")
RETRY = RetryPolicy(max_attempts=3, delays=(0.05,))


def staffed(lab: Lab, agent: str = "worker", **fields: Any) -> Topology:
    """The lab's topology with `agent` as crew_handlers.work; `fields` are those of its Agent."""
    record = str(lab.rig.root / "record")
    found = replace(
        lab.topology.agents[agent],
        handler=Handler("python", "crew_handlers:work"),
        publish=tuple(Publication(event_type, "events") for event_type in ("agent.done", "agent.second")),
        env={"CREW_RECORD": record},
        retry=RETRY,
        timeout=60.0,
        drain_timeout=5.0,
    )
    return replace(lab.topology, root=HERE, agents={**lab.topology.agents, agent: replace(found, **fields)})


class Crew:
    """An async context manager."""

    def __init__(self, lab: Lab, agent: str = "worker", *, replicas: int = 1, die: str = "", **fields: Any) -> None:
        self.topology = staffed(lab, agent, **fields)
        self.record = Path(self.topology.agents[agent].env["CREW_RECORD"])
        self._without = MUTATION.get()
        self.said: list[str] = []  # the workers' log lines
        self.ends: list[int] = []  # their exit codes
        self._agent = agent
        self._replicas = replicas
        self._die = die
        self._root = lab.rig.root
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._controls: dict[int, socket.socket] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in range(self._replicas)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await asyncio.wait(self._tasks, timeout=PATIENCE)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*self._tasks)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Sends `how` to one of the workers that run."""
        running = [p for p in self._processes.values() if p.returncode is None]
        if running:
            random.choice(running).send_signal(how)

    # --- the record -------------------------------------------------------------------------------------------

    def lines(self, what: str) -> list[int]:
        """The numbers of the events of which `what` ("started", "finished") was noted, as often as it was."""
        if not self.record.exists():
            return []
        rows = [line.split() for line in self.record.read_text().splitlines()]
        return [int(row[0]) for row in rows if row[3] == what]

    def runs(self) -> Counter[int]:
        return Counter(self.lines("started"))

    def finished(self) -> set[int]:
        return set(self.lines("finished"))

    # --- inside -----------------------------------------------------------------------------------------------

    async def _keep(self, slot: int) -> None:
        """The shortest possible supervisor."""
        spec = self._root / f"spec-{slot}"
        spec.write_bytes(
            pickle.dumps(
                {
                    "topology": self.topology,
                    "agent": self._agent,
                    "slot": slot,
                    "run_dir": self._root / "run",
                    "die": self._die,
                    "without": self._without,
                }
            )
        )
        while not self._stopping:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(HERE / "crew_worker.py"),
                str(spec),
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdout=asyncio.subprocess.PIPE,
            )
            theirs.close()
            self._processes[slot] = process
            reading = asyncio.create_task(self._listen(ours))
            assert process.stdout is not None
            async for line in process.stdout:
                self.said.append(line.decode(errors="replace"))
            self.ends.append(await process.wait())
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            ours.close()

    @staticmethod
    async def _listen(control: socket.socket) -> None:
        """Takes what the worker reports, so that it never waits for us."""
        while await asyncio.get_running_loop().sock_recv(control, 65536):
            pass
