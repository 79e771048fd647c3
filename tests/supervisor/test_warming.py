"""What the warm parent does before its first fork: it must leave nothing behind but shorter ways."""

from __future__ import annotations

import json
import subprocess
import sys

_REHEARSE = """
import asyncio, json, os, signal, socket, sys, threading
from orchestrator.supervisor.warming import warm_up
from orchestrator.worker.main import Worker

ours, theirs = socket.socketpair()
ours.setblocking(False)
theirs.setblocking(False)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.set_wakeup_fd(theirs.fileno())

def state():
    handlers = [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    return [sys.path.copy(), handlers, os.getcwd(), dict(os.environ), sorted(os.listdir("/proc/self/fd"))]

before, code = state(), {f.__name__: id(f.__code__) for f in (Worker.serve, Worker._make_way, asyncio.run)}
warm_up()
after = state()
moved = [f.__name__ for f in (Worker.serve, Worker._make_way, asyncio.run) if id(f.__code__) != code[f.__name__]]
os.kill(os.getpid(), signal.SIGUSR1)
print(json.dumps({
    "changed": [pair for pair in zip(before, after) if pair[0] != pair[1]],
    "threads": len(os.listdir("/proc/self/task")),
    "woken": len(ours.recv(16)),
    "moved": moved,
}))
"""


def test_a_rehearsal_moves_together_what_ran_and_leaves_nothing_behind() -> None:
    done = subprocess.run([sys.executable, "-c", _REHEARSE], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said == {"changed": [], "threads": 1, "woken": 1, "moved": ["serve", "run"]}
