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
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.rig import Site
from tests.patience import PATIENCE
from tests.servers.fresh import Server, fresh_server


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
    """One run over `server`, in `folder`."""

    def __init__(
        self, server: Server, folder: Path, *, events: int, worker_kills: int, broker_kills: int, seed: int
    ) -> None:
        self.server, self.site = server, Site(folder, server.url)
        self.rng = random.Random(seed)
        self.kinds = plan(events, self.rng)
        self.outcome = Outcome(events=events)
        self.worker_kills, self.broker_kills = worker_kills, broker_kills

    async def kill_workers(self) -> None:
        """Spread over the whole flow: kills as fast as workers return would leave nothing but recovery to look at."""
        for number in range(self.worker_kills):
            due = len(self.kinds) * (number + self.rng.random()) / (self.worker_kills + 1)
            await self.site.until(lambda due=due: self.site.handled() >= due, f"{due:.0f} handled", 2 * PATIENCE)
            while not (victims := self.site.workers()):
                await asyncio.sleep(0.05)
            os.kill(self.rng.choice(victims).pid, signal.SIGKILL)
            self.outcome.worker_kills += 1

    async def kill_broker(self) -> None:
        for number in range(self.broker_kills):
            due = len(self.kinds) * (number + 1) / (self.broker_kills + 2)
            await self.site.until(lambda due=due: self.site.handled() >= due, f"{due:.0f} handled", 2 * PATIENCE)
            await asyncio.to_thread(self.server.kill)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(self.server.start)
            self.outcome.broker_kills += 1
            before, since = self.site.record.stat().st_size, time.monotonic()
            grown = lambda before=before: self.site.record.stat().st_size > before  # noqa: E731
            await self.site.until(grown, "events handled after the restart", 2 * PATIENCE)
            self.outcome.back_after_s.append(round(time.monotonic() - since, 2))

    def judge(self) -> None:
        out = self.outcome
        runs = self.site.runs()
        doomed = {n for n, kind in enumerate(self.kinds) if kind in ("fail", "die")}
        completed = self.site.outputs()
        dead = Counter(int(letter["event_id"]) for letter in self.site.letters())
        out.runs = sum(runs.values())
        out.lost = [n for n in range(out.events) if n not in runs]
        out.outputs_missing = [n for n in range(out.events) if n not in doomed and n not in completed and n not in dead]
        out.dead_letters = sum(dead.values())
        out.dead_twice = [n for n, count in dead.items() if count > 1]
        out.dead_innocent = sorted(set(dead) - doomed)
        out.dead_missing = sorted(doomed - set(dead))
        wrong = {*out.lost, *out.outputs_missing, *out.dead_twice, *out.dead_innocent, *out.dead_missing}
        out.evidence = [" ".join(line) for line in self.site.lines() if int(line[0]) in wrong][:40]
        out.too_many_runs = [n for n in doomed if runs[n] > 3 + out.worker_kills]

    async def run(self, patience: float = 300.0) -> Outcome:
        started = time.monotonic()
        try:
            await self.site.start()
            async with asyncio.TaskGroup() as group:
                group.create_task(self.site.publish_each(enumerate(self.kinds)))
                group.create_task(self.kill_workers())
                group.create_task(self.kill_broker())
            await self.site.all_handled(len(self.kinds), patience)
            self.judge()
        finally:
            await self.site.stop()
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
