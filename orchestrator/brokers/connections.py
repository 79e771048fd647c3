"""The connections of one program to the brokers of its topology: each opened once, when it is first asked for."""

from __future__ import annotations

import asyncio

from orchestrator.brokers import registry
from orchestrator.brokers.base import Connection
from orchestrator.errors import BrokerUnavailable, OrchestratorError
from orchestrator.topology.model import Topology


class Connections:
    """`name` is shown in the brokers' client lists; `patience` is how many seconds connecting may take."""

    def __init__(self, topology: Topology, *, name: str, patience: float = 5.0) -> None:
        self._topology = topology
        self._name = name
        self._patience = patience
        self._opening: dict[str, asyncio.Task[Connection]] = {}
        self._closed = False

    async def get(self, broker: str) -> Connection:
        """The connection to the broker of that name in the topology; the same one for each caller. Raises
        BrokerUnavailable when it cannot be reached (the next call tries again)."""
        if self._closed:
            raise OrchestratorError("the connections of this program have been closed")
        opening = self._opening.get(broker)
        if opening is None:
            opening = self._opening[broker] = asyncio.ensure_future(self._open(broker))
        try:
            return await asyncio.shield(opening)
        except BaseException:
            if opening.done() and self._opening.get(broker) is opening:
                del self._opening[broker]
            raise

    async def close(self) -> None:
        """Closes what was opened; each sends what it has queued first. Doing it twice is harmless."""
        self._closed = True
        opened, self._opening = list(self._opening.values()), {}
        for opening in opened:
            if not opening.done():
                opening.cancel()
        found = await asyncio.gather(*opened, return_exceptions=True)
        await asyncio.gather(*(c.close() for c in found if not isinstance(c, BaseException)))

    async def _open(self, name: str) -> Connection:
        broker = self._topology.brokers[name]
        adapter = registry.adapter(broker.kind)
        try:
            return await adapter.connect(self._topology, broker, name=self._name, patience=self._patience)
        except BrokerUnavailable as error:
            # Most clients tell a refused certificate and a server that is not there in the same words.
            if broker.tls is not None and "tls" not in (error.hint or ""):
                error.hint = f"{error.hint or 'is the server running?'} And do the files in brokers.{name}.tls fit?"
            raise
