"""The main job, told step by step with the commands that a user would type. Needs nothing but this package.

`make demo` runs it: the agents start on an embedded NATS server in a folder of their own, one task goes all the way
through review, one fails three times and becomes a dead letter, which is then redriven with a mended payload.
Exits 1, saying what was missing, when any step does not come true in time.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0


class Demo:
    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder = folder
        self.settings = settings  # such as --set url=redis://…

    def run(self, *args: str, show: bool = True, check: bool = True) -> str:
        """Runs one command of ours in the demo's folder and returns what it wrote to stdout."""
        if show:
            words = " ".join(f"'{a}'" if " " in a or '"' in a else a for a in args)
            print(f"\n\033[1m$ orchestrator {words}\033[0m" if sys.stdout.isatty() else f"\n$ orchestrator {words}")
        command = [sys.executable, "-m", "orchestrator.cli", *args, *self.settings]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        if show:
            print((done.stdout + done.stderr).rstrip())
        if check and done.returncode != 0:
            raise SystemExit(f"{args[0]} ended with {done.returncode}\n{done.stderr}")
        return done.stdout

    def read(self, *args: str) -> Any:
        return json.loads(self.run(*args, "-o", "json", show=False))

    def wait(self, what: str, ready: Any) -> None:
        """Waits until `ready()` is true; a story that does not come true is a failure, not a shorter story."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > deadline:
                self.run("logs", check=False)
                raise SystemExit(f"not within {PATIENCE:.0f} s: {what}")
            time.sleep(0.1)

    def types(self, correlation_id: str) -> list[str]:
        return [e["event_type"] for e in self.read("trace", correlation_id)["events"]]


def say(text: str) -> None:
    print(f"\n\033[36m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}")


def tell(demo: Demo) -> None:
    say("One file describes four agents and the channels between them. Start it all, in the background.")
    demo.run("apply", "--yes", "-d")
    demo.run("status")

    say("A task arrives. Triage assigns it, research looks it up, writing writes, review approves.")
    demo.run("publish", "task.created", '{"query": "durable consumers"}', "--correlation-id", "demo-1")
    demo.wait("the review of demo-1", lambda: "review.completed" in demo.types("demo-1"))
    demo.run("trace", "demo-1")
    demo.run("logs", "triage", "research", "writing", "review")

    say("Another one names no query. Research fails on it three times; then it waits as a dead letter.")
    demo.run("publish", "task.assigned", '{"topic": "retries"}', "--correlation-id", "demo-2")
    demo.wait("the dead letter", lambda: len(demo.read("dlq", "list")["dead_letters"]) == 1)
    demo.run("dlq", "list")

    say("Mend its payload and give it back to research, and to research alone.")
    demo.run("dlq", "redrive", "--set", "payload.query=retries that wait without holding a slot", "--yes")
    demo.wait("the review of demo-2", lambda: "review.completed" in demo.types("demo-2"))
    demo.run("trace", "demo-2")
    demo.wait("an empty dead-letter channel", lambda: not demo.read("dlq", "list")["dead_letters"])

    say("Done. Nothing was lost, nothing ran twice. Stop the agents.")
    demo.run("stop")


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a story in a log or a pipe is told as it happens, too
    folder = Path(tempfile.mkdtemp(prefix="content-pipeline-"))
    for name in ("topology.yaml", "agents.py"):
        shutil.copy(HERE / name, folder / name)
    demo = Demo(folder, sys.argv[1:])
    try:
        tell(demo)
    finally:
        demo.run("stop", show=False, check=False)  # silent: it must happen even if our output is closed
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
