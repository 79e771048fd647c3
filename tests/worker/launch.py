"""Runs one worker as the supervisor would after its fork: launch.py TOPOLOGY AGENT SLOT RUN_DIR FD."""

from __future__ import annotations

import os
import socket
import sys

from orchestrator.topology import load
from orchestrator.worker.main import run
from orchestrator.worker.spec import WorkerSpec

if __name__ == "__main__":
    file, agent, slot, run_dir, fd = sys.argv[1:]
    spec = WorkerSpec(load([file]).topology, agent, int(slot), run_dir)
    code = run(spec, socket.socket(fileno=int(fd)))
    sys.stdout.flush()
    os._exit(code)
