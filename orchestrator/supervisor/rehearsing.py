"""In a forked child: does everything of a worker's start that takes nothing from the workers that still run."""

from __future__ import annotations

import asyncio
import json
import os
import socket

from orchestrator.brokers.connections import Connections
from orchestrator.errors import HandlerLoadError, OrchestratorError
from orchestrator.supervisor.process import DRAINED, NOT_LOADED
from orchestrator.worker import handlers
from orchestrator.worker.main import brokers_of
from orchestrator.worker.spec import WorkerSpec


def rehearse(spec: WorkerSpec, control: socket.socket) -> int:
    """Loads the handler and connects to the agent's brokers. Returns 0, or 78 after telling why not on `control`."""
    agent = spec.topology.agents[spec.agent]
    os.environ.update(agent.env)
    try:
        handlers.load(spec.topology, agent)
        asyncio.run(_connect(spec))
    except OrchestratorError as error:
        trace = error.traceback if isinstance(error, HandlerLoadError) else None
        found = {"message": error.message, "hint": error.hint, "traceback": trace}
        control.sendall(json.dumps(found).encode() + b"\n")
        return NOT_LOADED
    return DRAINED


async def _connect(spec: WorkerSpec) -> None:
    connections = Connections(spec.topology, name=f"{spec.topology.name}.{spec.agent} rehearsal")
    try:
        for broker in sorted(brokers_of(spec.topology, spec.topology.agents[spec.agent])):
            await connections.get(broker)
    finally:
        await connections.close()
