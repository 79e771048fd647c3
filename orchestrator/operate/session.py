"""Connections for the duration of one command, with the embedded server running if the topology has one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

from orchestrator.brokers.connections import Connections
from orchestrator.brokers.embedded import serving
from orchestrator.topology.model import Topology


@contextlib.asynccontextmanager
async def session(topology: Topology, *, name: str = "cli") -> AsyncIterator[Connections]:
    """Opens nothing by itself: each broker is connected when it is first asked for. `name` is shown to the broker.

    A codec of the topology's own is then imported from beside its file, as in a worker.
    """
    if any(":" in channel.codec for channel in topology.channels.values()) and str(topology.root) not in sys.path:
        sys.path.insert(0, str(topology.root))
    async with serving(topology):
        connections = Connections(topology, name=f"{topology.name}-{name}")
        try:
            yield connections
        finally:
            await connections.close()
