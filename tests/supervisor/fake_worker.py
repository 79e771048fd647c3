"""A worker that keeps to the interface of orchestrator.worker.main.run and does what its agent's config says.

config: `do` (serve, crash, fail, freeze, block, deaf, leave_journal, exit), `after` seconds in which it first is ready.
Each process appends "<name> <pid> <word>" lines to run_dir/record: the tests' independent account.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from orchestrator.worker.spec import WorkerSpec


def run(spec: WorkerSpec, control: socket.socket) -> int:
    return _Worker(spec, control).run()


class _Worker:
    def __init__(self, spec: WorkerSpec, control: socket.socket) -> None:
        self.spec = spec
        self.control = control
        self.config: dict[str, Any] = dict(spec.topology.agents[spec.agent].config)
        self.paused = False
        self.loop_age = 0.0

    def run(self) -> int:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        self.record("start")
        print(json.dumps({"ts": "2026-01-01T00:00:00Z", "level": "info", "event": "hello", "note": "from the log"}))
        print("printed by a handler", self.config.get("say", ""), file=sys.stderr)
        do = self.config.get("do", "serve")
        if do == "fail":
            self.tell(
                {"type": "failed", "message": "no module named x", "traceback": "Traceback: x", "hint": "mend it"}
            )
            return 78
        if do == "exit":
            return int(self.config["code"])
        if do == "deaf":
            time.sleep(3600)
        if os.path.exists(self.spec.journal):
            self.record("recovered")
            os.unlink(self.spec.journal)
        self.record("ready")
        self.tell({"type": "ready"})
        return self.serve(do)

    def serve(self, do: str) -> int:
        end = time.monotonic() + float(self.config.get("after", 0.0))
        buffer = b""
        while True:
            readable, _, _ = select.select([self.control], [], [], 0.05)
            if readable:
                data = self.control.recv(4096)
                if not data:
                    self.record("eof")
                    return 0
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    self.record(message["type"])
                    if message["type"] == "drain" and do != "stay":
                        if do == "crash_in_drain":
                            leave_journal(self.spec)
                            os._exit(9)
                        self.tell({"type": "drained"})
                        return 0
                    self.paused = {"pause": True, "resume": False}.get(message["type"], self.paused)
            self.status()
            if time.monotonic() >= end:
                self.misbehave(do)

    def misbehave(self, do: str) -> None:
        match do:
            case "crash":
                os._exit(70)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "block":
                self.loop_age = 1e6
            case "replace":
                self.tell({"type": "replace", "reason": "an attempt will not stop"})
                time.sleep(3600)
            case "exhausted":
                self.tell({"type": "paused", "reason": "an event was exhausted"})
                self.config["do"] = "serve"
                self.serve("serve")

    def status(self) -> None:
        message = {"type": "status", "in_flight": 0, "handled": 1, "failed": 0, "dead": 0, "retried": 0}
        trouble = self.config.get("trouble")
        self.tell({**message, "trouble": trouble, "loop_age": self.loop_age, "paused": self.paused})

    def tell(self, message: dict[str, Any]) -> None:
        try:
            self.control.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            self.record("eof")
            os._exit(0)

    def record(self, word: str) -> None:
        line = f"{self.spec.agent}.{self.spec.slot} {os.getpid()} {word} {time.time():.4f}\n"
        descriptor = os.open(f"{self.spec.run_dir}/record", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def leave_journal(spec: WorkerSpec) -> None:
    """A journal with one event that had started."""
    from orchestrator.worker.journal import Journal, State

    journal = Journal.create(spec.journal, 1)
    journal.begin(0, State.STARTED, 1, b"token")
