"""What is not throughput: idle latency against the raw client, CPU of validate and plan, how fast a worker starts and
what it weighs."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import ROOT

SAMPLES = 200
IDLE_WORKERS = 10
STARTS = 10

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
    replicas: {replicas}
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


def environment() -> dict[str, str]:
    """With bytecode, as an installed package has it: what is compiled at each start leaves its litter in memory."""
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**rest, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(ROOT / ".cache" / "bytecode")}


def orchestrator(folder: Path, *args: str) -> float:
    """Runs one command; returns the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *args],
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


@contextmanager
def applied(url: str, folder: Path, replicas: int) -> Iterator[list[psutil.Process]]:
    """The workers of a topology of one agent, idle; `folder` holds its file and the record of its handler."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record").touch()
    text = _LATENCY.format(url=url, record=folder / "record", replicas=replicas)
    (folder / "topology.yaml").write_text(text)
    orchestrator(folder, "apply", "--yes", "--no-workers")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "apply", "--yes"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait(lambda: len(workers(process.pid)) == replicas, f"{replicas} workers")
        time.sleep(2)  # idle is what is measured
        yield workers(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def latency(broker: str, url: str, folder: Path) -> tuple[list[float], list[float]]:
    """Milliseconds from publish to handler, one event at a time: (raw client, ours)."""
    with applied(url, folder, 1):
        drive = [sys.executable, "-m", "benchmarks.latency", broker, url, str(folder / "record"), str(SAMPLES)]
        raw = subprocess.run(drive, env=environment(), capture_output=True, text=True, check=True)
    return [float(line) for line in raw.stdout.split()], [float(n) for n in (folder / "record").read_text().split()]


def memory(url: str, folder: Path) -> tuple[float, float]:
    """MiB of one of several idle workers, medians: (PSS, USS)."""
    with applied(url, folder, 1):
        pass  # whatever was not compiled before is now
    with applied(url, folder, IDLE_WORKERS) as idle:
        found = [process.memory_full_info() for process in idle]
    return statistics.median(f.pss for f in found) / 2**20, statistics.median(f.uss for f in found) / 2**20


def start(folder: Path) -> list[float]:
    """Milliseconds from the fork of a worker to its being ready."""
    command = [sys.executable, "-m", "benchmarks.start", str(folder / "topology.yaml"), str(STARTS)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


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
    raw, ours = latency(broker, url, folder / "latency")
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
    found.add_row(
        f"fork to ready, median of {STARTS}", "", f"{statistics.median(start(folder / 'latency')):.0f} ms", ""
    )
    pss, uss = memory(url, folder / "memory")
    found.add_row(f"an idle worker of {IDLE_WORKERS}, PSS (USS)", "", f"{pss:.1f} ({uss:.1f}) MiB", "")
    console.print(found)
