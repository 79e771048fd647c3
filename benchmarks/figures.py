"""What is not throughput: idle latency against the raw client, CPU of validate and plan, a worker's memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import ROOT

SAMPLES = 200

_LATENCY = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {{name: latency}}
brokers: {{main: {{url: "{url}", prefix: "latency."}}}}
channels:
  tasks: {{events: [task.*], mode: queue}}
  dead-letters: {{mode: log}}
agents:
  worker:
    handler: benchmarks.latency:handle
    subscribe: [task.assigned]
    dead_letter: dead-letters
    env: {{LATENCY_RECORD: "{record}"}}
"""

_WIDE_AGENT = """\
  agent-{n}:
    handler: agents:handle
    subscribe: [task.kind{n}]
    publish: [agent.done{n}]
    dead_letter: dead-letters
"""

_WIDE = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {{name: wide}}
brokers: {{main: {{url: "{url}", prefix: "wide."}}}}
channels:
  tasks: {{events: [task.*], mode: queue}}
  events: {{events: [agent.*], mode: log}}
  dead-letters: {{mode: log}}
agents:
"""


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def orchestrator(folder: Path, *args: str) -> float:
    """Runs one command; returns the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.main", *args],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{args}: {done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wait(ready: object, what: str, patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def latency(broker: str, url: str, folder: Path) -> tuple[list[float], list[float], psutil.Process | None, float]:
    """Milliseconds from publish to handler, one event at a time: (raw client, ours), then an idle worker and the
    seconds from a killed worker to its successor's being ready."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "record"
    record.touch()
    (folder / "topology.yaml").write_text(_LATENCY.format(url=url, record=record))
    orchestrator(folder, "apply", "--yes", "--no-workers")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli.main", "apply", "--yes"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait(lambda: workers(process.pid), "a worker")
        time.sleep(2)  # idle is what is measured
        drive = [sys.executable, "-m", "benchmarks.latency", broker, url, str(record), str(SAMPLES)]
        raw = subprocess.run(drive, env=environment(), capture_output=True, text=True, check=True)
        measured = [float(line) for line in raw.stdout.split()]
        ours = [float(line) for line in record.read_text().split()]
        worker = workers(process.pid)[0]
        pss = worker.memory_full_info().pss / 2**20
        return measured, ours, worker, pss
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def workers(supervisor: int) -> list[psutil.Process]:
    children = psutil.Process(supervisor).children(recursive=True)
    return [c for c in children if c.ppid() != supervisor]


def wide(url: str, folder: Path, agents: int) -> tuple[float, float]:
    """CPU seconds of `validate` and of `plan` (nothing exists yet) for that many agents."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _WIDE.format(url=url) + "".join(_WIDE_AGENT.format(n=n) for n in range(agents))
    (folder / "topology.yaml").write_text(text)
    return orchestrator(folder, "validate"), orchestrator(folder, "plan")


def show(console: Console, broker: str, url: str, folder: Path) -> None:
    raw, ours, _, pss = latency(broker, url, folder / "latency")
    found = Table(title="other figures", title_justify="left")
    for column in ("", "raw client", "orchestrator", "ratio"):
        found.add_column(column, justify="left" if not column else "right")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        a, b = (sorted(values)[int(len(values) * share)] for values in (raw, ours))
        found.add_row(f"publish to handler when idle, {name}", f"{a:.2f} ms", f"{b:.2f} ms", f"{b / a:.2f}×")
    for agents in (1000, 2000):
        validate, plan = wide(url, folder / f"wide{agents}", agents)
        found.add_row(f"validate, {agents} agents (CPU)", "", f"{validate:.2f} s", "")
        found.add_row(f"plan, {agents} agents (CPU)", "", f"{plan:.2f} s", "")
    found.add_row("idle worker, PSS", "", f"{pss:.1f} MiB", "")
    console.print(found)
