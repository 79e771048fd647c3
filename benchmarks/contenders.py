"""One round of one contender: fresh channels, filled; one process that handles it all; its own clock's figure."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator import AgentEvent

PATIENCE = 180.0
ROOT = Path(__file__).resolve().parent.parent

_TOPOLOGY = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {{name: bench-{run}}}
brokers: {{main: {{url: "{url}", prefix: "bench{run}."}}}}
channels:
  tasks: {{events: [task.*], mode: queue, address: "{address}"}}
  events: {{events: [agent.*], mode: log}}
  dead-letters: {{mode: log}}
agents:
  worker:
    handler: benchmarks.ours_handlers:{work}
    subscribe: [task.assigned]
    publish: [agent.started, agent.completed]
    concurrency: {in_flight}
    dead_letter: dead-letters
"""


class Round:
    """What the contenders of one round share."""

    def __init__(
        self, broker: str, url: str, folder: Path, *, run: int, work: str, events: int, in_flight: int
    ) -> None:
        self.broker, self.url, self.folder = broker, url, folder
        self.run, self.work, self.events, self.in_flight = run, work, events, in_flight
        folder.mkdir(parents=True, exist_ok=True)

    def env(self, contender: str) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "BENCH_URL": self.url,
            "BENCH_RUN": str(self.run),
            "BENCH_EVENTS": str(self.events),
            "BENCH_IN_FLIGHT": str(self.in_flight),
            "BENCH_RESULT": str(self.result(contender)),
        }

    def result(self, contender: str) -> Path:
        return self.folder / f"{contender}.json"

    def loops(self, env: dict[str, str]) -> Any:
        """The broker's module of hand-written loops; it reads its settings from the environment at import."""
        os.environ.update({k: v for k, v in env.items() if k.startswith("BENCH_")})
        module = importlib.import_module(f"benchmarks.{self.broker}_loops")
        return importlib.reload(module)

    def play(self, contender: str, events: list[AgentEvent]) -> float | None:
        """Events a second, or None when the contender did not handle them all in time."""
        env = self.env(contender)
        if contender == "ours":
            process = self._start_ours(events, env)
        else:
            asyncio.run(self.loops(env).seed(events, contender))
            command = [sys.executable, "-m", f"benchmarks.{self.broker}_loops", contender, self.work]
            process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        return self._figure(contender, process)

    def _start_ours(self, events: list[AgentEvent], env: dict[str, str]) -> subprocess.Popen[str]:
        folder = self.folder / "ours"
        folder.mkdir(exist_ok=True)
        address = {"nats": "BENCH{}", "redis": "{{bench}}-{}", "kafka": "bench-tasks-{}"}[self.broker].format(self.run)
        text = _TOPOLOGY.format(run=self.run, url=self.url, address=address, work=self.work, in_flight=self.in_flight)
        (folder / "topology.yaml").write_text(text)
        command = [sys.executable, "-m", "orchestrator.cli", "apply", "--yes"]
        subprocess.run([*command, "--no-workers"], cwd=folder, env=env, check=True, capture_output=True)
        target = f"bench{self.run}.task.assigned" if self.broker == "nats" else address
        asyncio.run(self.loops(env).fill(events, target))
        return subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def _figure(self, contender: str, process: subprocess.Popen[str]) -> float | None:
        deadline = time.monotonic() + PATIENCE
        result = self.result(contender)
        try:
            while not result.exists():
                if time.monotonic() > deadline:
                    return None
                if process.poll() not in (None, 0):
                    raise RuntimeError(
                        f"{contender} ended with {process.returncode}:\n{process.communicate()[1][-2000:]}"
                    )
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        figure = json.loads(result.read_text())
        return float(figure["events"] / figure["seconds"])
