"""Milliseconds from the fork of a worker to its being ready: `python -m benchmarks.start TOPOLOGY TIMES`.

Forks as the supervisor's warm parent does, from a process that has imported everything and has no threads.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from orchestrator.brokers import registry
from orchestrator.supervisor.warm import become
from orchestrator.topology import load
from orchestrator.worker.main import run
from orchestrator.worker.spec import WorkerSpec


def start(spec: WorkerSpec) -> float:
    """Starts and ends one worker."""
    ours, theirs = socket.socketpair()
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        ours.close()
        become(spec, theirs.detach(), os.open(os.devnull, os.O_WRONLY), run)
    theirs.close()
    said = b""
    with ours:
        while b'"ready"' not in said:
            data = ours.recv(4096)
            if not data:
                raise RuntimeError(f"the worker ended before it was ready: {said!r}")
            said += data
        took = time.perf_counter() - began
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    return took * 1000


def main() -> None:
    topology = load([Path(sys.argv[1])]).topology
    for broker in topology.brokers.values():
        registry.adapter(broker.kind)
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(int(sys.argv[2])):
            print(start(WorkerSpec(topology, next(iter(topology.agents)), 0, folder)), flush=True)


if __name__ == "__main__":
    main()
