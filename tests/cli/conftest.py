"""Folders with a topology; whatever a test leaves running in one is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.rig import Folder, Foreground

TOPOLOGY = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {name: shop}
channels:
  orders: {events: [order.*], mode: log, schemas: {order.placed: {type: object, required: [item]}}}
  parcels: {events: [parcel.*], mode: log}
  dead-letters: {mode: log}
defaults:
  agents: {dead_letter: dead-letters, retry: {max_attempts: 2, initial_delay: 50ms}}
agents:
  pack:
    handler: agents:pack
    subscribe: [order.placed]
    publish: [parcel.packed]
"""

AGENTS = """\
async def pack(event, ctx):
    if event.payload["item"] == "glass":
        raise ValueError("too fragile")
    return {"item": event.payload["item"]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """One agent on the embedded server."""
    made = Folder(tmp_path)
    made.write("topology.yaml", TOPOLOGY)
    made.write("agents.py", AGENTS)
    yield made
    if (tmp_path / ".orchestrator" / "supervisor.json").exists():
        made.run("stop")


@pytest.fixture
def start(folder: Folder) -> Iterator[Callable[..., Foreground]]:
    """Starts commands in the foreground; ends them after the test."""
    started: list[Foreground] = []

    def begin(*args: str) -> Foreground:
        started.append(folder.start(*args))
        return started[-1]

    yield begin
    for each in started:
        each.end()
