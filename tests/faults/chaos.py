"""Events flow while workers are killed at random and the broker is killed and restarted; then every event is counted.

`python -m tests.faults.chaos --broker nats` prints the figures and exits 1 when an event was lost, dead-lettered twice,
or dead-lettered without being one of those that always fail or kill their process. Tests call `run`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from orchestrator import Client
from tests.servers.fresh import fresh_server

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

TOPOLOGY = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {{name: chaos}}
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


@dataclass
class Outcome:
    """What was counted from outside."""

    events: int = 0
    worker_kills: int = 0
    broker_kills: int = 0
    runs: int = 0
    lost: list[int] = field(default_factory=list)
    outputs_missing: list[int] = field(default_factory=list)
    dead_letters: int = 0
    dead_twice: list[int] = field(default_factory=list)
    dead_innocent: list[int] = field(default_factory=list)
    dead_missing: list[int] = field(default_factory=list)
    too_many_runs: list[int] = field(default_factory=list)  # those that fail by themselves, beyond max_attempts
    back_after_s: list[float] = field(default_factory=list)  # broker up again -> next event handled
    evidence: list[str] = field(default_factory=list)  # the record's lines of the first that went wrong
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.lost or self.outputs_missing or self.dead_twice or self.dead_innocent or self.dead_missing)


def plan(events: int, rng: random.Random) -> list[str]:
    """What each event does: mostly good, some slow or flaky, a few always failing, a few killing their process."""
    doomed = max(3, events // 500)
    kinds = ["fail"] * doomed + ["die"] * min(doomed, 12) + ["flaky"] * (events // 20) + ["slow"] * (events // 20)
    kinds += ["ok"] * (events - len(kinds))
    rng.shuffle(kinds)
    return kinds


class Chaos:
    def __init__(
        self, server: Any, folder: Path, *, events: int, worker_kills: int, broker_kills: int, seed: int
    ) -> None:
        self.server, self.folder = server, folder
        self.rng = random.Random(seed)
        self.kinds = plan(events, self.rng)
        self.outcome = Outcome(events=events)
        self.worker_kills, self.broker_kills = worker_kills, broker_kills
        self.record = folder / "record"
        self.record.touch()
        (folder / "topology.yaml").write_text(TOPOLOGY.format(url=server.url, record=self.record))
        (folder / "handlers.py").write_text((HERE / "handlers.py").read_text())
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *args: str) -> str:
        """Runs one command and returns what it wrote to stdout."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli.main", *args, "-o", "json"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{args}: {done.returncode}\n{done.stderr[-1500:]}")
        return done.stdout

    def workers(self) -> list[psutil.Process]:
        """The forked workers: children of the warm parent, which is a child of the supervisor."""
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [c for c in children if c.ppid() != self.process.pid and c.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.record.read_text().splitlines()]

    async def publish(self) -> None:
        """As fast as the broker confirms, through its outages too."""
        async with Client(self.folder / "topology.yaml") as client:
            room = asyncio.Semaphore(64)

            async def one(n: int, kind: str) -> None:
                async with room:
                    await client.publish("task.assigned", {"n": n, "do": kind}, event_id=f"chaos-{n}")

            async with asyncio.TaskGroup() as group:
                for n, kind in enumerate(self.kinds):
                    group.create_task(one(n, kind))

    async def kill_workers(self) -> None:
        """Spread over the whole flow: kills as fast as workers return would leave nothing but recovery to look at."""
        for number in range(self.worker_kills):
            due = len(self.kinds) * (number + self.rng.random()) / (self.worker_kills + 1)
            await self.until(lambda due=due: self.handled() >= due, f"{due:.0f} handled")
            while not (victims := self.workers()):
                await asyncio.sleep(0.05)
            os.kill(self.rng.choice(victims).pid, signal.SIGKILL)
            self.outcome.worker_kills += 1

    async def kill_broker(self) -> None:
        for number in range(self.broker_kills):
            due = len(self.kinds) * (number + 1) / (self.broker_kills + 2)
            await self.until(lambda due=due: self.handled() >= due, f"{due:.0f} handled")
            await asyncio.to_thread(self.server.kill)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(self.server.start)
            self.outcome.broker_kills += 1
            before, since = len(self.lines()), time.monotonic()
            await self.until(lambda before=before: len(self.lines()) > before, "events handled after the restart")
            self.outcome.back_after_s.append(round(time.monotonic() - since, 2))

    async def until(self, ready: Callable[[], bool], what: str, patience: float = 120.0) -> None:
        deadline = time.monotonic() + patience
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {patience:.0f} s: {what}")
            await asyncio.sleep(0.2)

    def finished(self) -> bool:
        return self.handled() >= len(self.kinds)

    def handled(self) -> int:
        return len({line[0] for line in self.lines()})

    def settled(self) -> bool:
        agents = json.loads(self.command("status"))["agents"]
        return all(a["lag"] == 0 and a["in_flight"] == 0 for a in agents)

    def judge(self) -> None:
        out = self.outcome
        runs = Counter(int(line[0]) for line in self.lines())
        doomed = {n for n, kind in enumerate(self.kinds) if kind in ("fail", "die")}
        tail = self.command("tail", "agent.completed", "--channel", "events", "--no-follow", "--from", "earliest")
        completed = {json.loads(line)["payload"]["n"] for line in tail.splitlines()}
        letters = json.loads(self.command("dlq", "list"))["dead_letters"]
        dead = Counter(int(letter["event_id"].removeprefix("chaos-")) for letter in letters)
        out.runs = sum(runs.values())
        out.lost = [n for n in range(out.events) if n not in runs]
        out.outputs_missing = [n for n in range(out.events) if n not in doomed and n not in completed and n not in dead]
        out.dead_letters = sum(dead.values())
        out.dead_twice = [n for n, count in dead.items() if count > 1]
        out.dead_innocent = sorted(set(dead) - doomed)
        out.dead_missing = sorted(doomed - set(dead))
        wrong = {*out.lost, *out.outputs_missing, *out.dead_twice, *out.dead_innocent, *out.dead_missing}
        out.evidence = [" ".join(line) for line in self.lines() if int(line[0]) in wrong][:40]
        out.too_many_runs = [n for n in doomed if runs[n] > 3 + out.worker_kills]

    async def run(self, patience: float = 300.0) -> Outcome:
        started = time.monotonic()
        log = (self.folder / "supervisor.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli.main", "apply", "--yes"],
            cwd=self.folder,
            stdout=log,
            stderr=log,
        )
        try:
            await self.until(lambda: len(self.workers()) == 2, "two workers", 30)
            async with asyncio.TaskGroup() as group:
                group.create_task(self.publish())
                group.create_task(self.kill_workers())
                group.create_task(self.kill_broker())
            await self.until(self.finished, "every event handled", patience)
            await self.until(lambda: self.settled(), "every event settled", patience)
            self.judge()
        finally:
            self.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(self.process.wait, 60)
            log.close()
        self.outcome.seconds = round(time.monotonic() - started, 1)
        return self.outcome


def main() -> int:

    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--broker", choices=["nats", "kafka", "redis"], default="nats")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--worker-kills", type=int, default=20)
    parser.add_argument("--broker-kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--keep", metavar="FILE", help="copy the supervisor's log here")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as name,
        fresh_server(args.broker) as server,
    ):
        folder = Path(name) / "run"
        folder.mkdir()
        chaos = Chaos(
            server,
            folder,
            events=args.events,
            worker_kills=args.worker_kills,
            broker_kills=args.broker_kills,
            seed=args.seed,
        )
        try:
            outcome = asyncio.run(chaos.run())
        except BaseException:
            print((folder / "supervisor.log").read_text()[-4000:], file=sys.stderr)
            raise
        if args.keep:
            shutil.copy(folder / "supervisor.log", args.keep)
    print(json.dumps({"broker": args.broker, "seed": args.seed, **asdict(outcome), "good": outcome.good}, indent=2))
    return 0 if outcome.good else 1


if __name__ == "__main__":
    raise SystemExit(main())
