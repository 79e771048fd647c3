"""Makes sure that the embedded broker of a topology runs while a command or the supervisor needs it.

`server` finds, starts and ends the nats-server of a folder. No client library: brokers.nats connects to it as to any.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from orchestrator.topology.model import Topology


@contextlib.asynccontextmanager
async def serving(topology: Topology) -> AsyncIterator[None]:
    """Finds the running server or starts it; the last user to leave ends it. Nothing happens for topologies without an
    embedded broker. Raises BrokerUnavailable when it does not start."""
    if not any(broker.embedded for broker in topology.brokers.values()):
        yield
        return
    from orchestrator.brokers.embedded import server  # psutil and subprocess: only where a server is wanted

    async with server.serving(topology.state_dir, topology.name):
        yield
