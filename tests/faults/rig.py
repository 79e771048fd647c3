"""A folder with a topology, the real command line in it, and the record that its handlers leave.

Nothing of the package runs in the test's own process but the publishing Client.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from orchestrator import Client
from orchestrator.topology import load
from tests.patience import PATIENCE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMMAND = [sys.executable, "-m", "orchestrator.cli"]

TOPOLOGY = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {{name: faults}}
brokers: {{main: {{url: "{url}"}}}}
channels:
  tasks: {{events: [task.*], mode: queue}}
  events: {{events: [agent.*], mode: log}}
  dead-letters: {{mode: log}}
agents:
  worker:
    handler: handlers:work
    subscribe: [task.assigned]
    publish: [agent.completed]
    replicas: 2
    concurrency: 8
    retry: {{max_attempts: 3, delays: [100ms, 300ms]}}
    dead_letter: dead-letters
    restart: {{initial_delay: 50ms, max_delay: 1s}}
    env: {{RECORD: "{record}"}}
"""


class Site:
    """One topology on `url`; `env` is added to every process that is started here."""

    def __init__(self, folder: Path, url: str, *, topology: str = TOPOLOGY, env: Mapping[str, str] = {}) -> None:
        self.folder, self.url = folder, url
        self.record = folder / "record"
        self.record.touch()
        self.topology = topology.format(url=url, record=self.record)
        (folder / "topology.yaml").write_text(self.topology)
        self.loaded = load([folder / "topology.yaml"]).topology  # for the publisher, whatever becomes of the file
        (folder / "handlers.py").write_text((HERE / "handlers.py").read_text())
        self._env = {**os.environ, **env}
        self.process: subprocess.Popen[bytes] | None = None

    # --- the command line -------------------------------------------------------------------------------------

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *args],
            cwd=self.folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )

    def command(self, *args: str) -> str:
        """Runs a command that must succeed; returns what it wrote to stdout, as JSON."""
        done = self.run(*args, "-o", "json")
        if done.returncode:
            raise RuntimeError(f"{args}: {done.returncode}\n{done.stderr[-1500:]}")
        return done.stdout

    def agent(self, name: str = "worker") -> dict[str, Any]:
        """Its line of `status`."""
        agents = json.loads(self.command("status"))["agents"]
        return next(agent for agent in agents if agent["name"] == name)

    def letters(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.command("dlq", "list"))["dead_letters"]
        return found

    def outputs(self) -> Counter[int]:
        """How often agent.completed is stored for each number."""
        tail = self.command("tail", "agent.completed", "--channel", "events", "--no-follow", "--from", "earliest")
        return Counter(json.loads(line)["payload"]["n"] for line in tail.splitlines())

    def settled(self) -> bool:
        agents = json.loads(self.command("status"))["agents"]
        return all(a["lag"] == 0 and a["in_flight"] == 0 for a in agents)

    # --- the supervisor in the foreground ---------------------------------------------------------------------

    async def start(self, *args: str, workers: int = 2) -> None:
        """`apply --yes` (or `args`) in the foreground; returns when so many workers are ready."""
        before = self.said.count(" is ready")
        with (self.folder / "supervisor.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *(args or ("apply", "--yes"))], cwd=self.folder, env=self._env, stdout=log, stderr=log
            )
        await self.until(lambda: self.said.count(" is ready") >= before + workers, "the workers are ready")

    @property
    def said(self) -> str:
        log = self.folder / "supervisor.log"
        return log.read_text(errors="replace") if log.exists() else ""

    async def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, PATIENCE)

    def warm(self) -> psutil.Process:
        """The parent of the workers, a child of the supervisor."""
        assert self.process is not None
        (found,) = [c for c in psutil.Process(self.process.pid).children() if "orchestrator" in " ".join(c.cmdline())]
        return found

    def workers(self) -> list[psutil.Process]:
        """The forked workers: children of the warm parent."""
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [c for c in children if c.ppid() != self.process.pid and c.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    # --- events and their record ------------------------------------------------------------------------------

    async def publish(self, numbers: Iterable[int], do: str = "ok", *, pause: float = 0.0) -> None:
        await self.publish_each([(n, do) for n in numbers], pause=pause)

    async def publish_each(self, events: Iterable[tuple[int, str]], *, pause: float = 0.0) -> None:
        """As fast as the broker confirms, or with a pause after each; through its outages too."""
        async with Client(self.loaded) as client:
            room = asyncio.Semaphore(64)

            async def one(n: int, kind: str) -> None:
                async with room:
                    await client.publish("task.assigned", {"n": n, "do": kind}, event_id=str(n))

            async with asyncio.TaskGroup() as group:
                for n, kind in events:
                    group.create_task(one(n, kind))
                    if pause:
                        await asyncio.sleep(pause)

    def lines(self) -> list[list[str]]:
        """number, what it does, attempt, process, time: one line for each run that began."""
        return [line.split() for line in self.record.read_text().splitlines()]

    def runs(self) -> Counter[int]:
        return Counter(int(line[0]) for line in self.lines())

    def handled(self) -> int:
        """So many different events ran."""
        return len({line[0] for line in self.lines()})

    async def until(self, ready: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Looks often enough; `ready` may block for a moment. Raises TimeoutError with what the supervisor said."""
        deadline = time.monotonic() + patience
        while not await asyncio.to_thread(ready):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {patience:.0f} s: {what}\n{self.said[-3000:]}")
            await asyncio.sleep(0.05)

    async def all_handled(self, total: int, patience: float = 2 * PATIENCE) -> None:
        """Waits until that many different events ran and nothing is left unsettled."""
        await self.until(lambda: self.handled() >= total, f"{total} events handled", patience)
        await self.until(self.settled, "everything settled", patience)
