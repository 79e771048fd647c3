"""The whole Protocol inside one process, without I/O: what orchestrator.testing runs a topology on.

It keeps each promise of the contract, by the clock of orchestrator.clock; only durability it has none.
"""

from __future__ import annotations

from orchestrator.brokers.base import (
    Adapter,
    Allowed,
    Capabilities,
    Desired,
    Observed,
    ResourceId,
    Setting,
    Verdict,
)
from orchestrator.brokers.memory.connection import MemoryConnection
from orchestrator.brokers.memory.consumer import LEASE
from orchestrator.brokers.memory.hub import Hub
from orchestrator.errors import BrokerUnavailable
from orchestrator.topology.model import Broker, Channel, Mode, Topology

__all__ = ["Hub", "MemoryAdapter", "MemoryConnection", "adapter"]


class MemoryAdapter(Adapter):
    capabilities = Capabilities(
        kind="memory",
        lease=LEASE,
        atomic_settle=True,
        notes=("events live in this process only and end with it",),
    )

    def __init__(self) -> None:
        self._hubs: dict[str, Hub] = {}

    def hub(self, url: str) -> Hub:
        """The broker behind `url`; made when it is asked for first."""
        return self._hubs.setdefault(url, Hub(url))

    def forget(self, url: str) -> None:
        """Ends the broker behind `url` with all that it holds."""
        self._hubs.pop(url, None)

    def desired(self, topology: Topology, broker: Broker) -> list[Desired]:
        channels = [c for c in topology.channels.values() if c.broker == broker.name]
        found = [_desired_channel(channel) for channel in channels]
        for agent in topology.agents.values():
            for subscription in agent.subscriptions:
                channel = topology.channels[subscription.channel]
                if channel.broker != broker.name:
                    continue
                where = ("agents", agent.name, "subscribe")
                name = f"{channel.address}/{subscription.group}"
                settings: dict[str, Setting] = {"events": subscription.events}
                found.append(Desired(ResourceId(broker.name, "subscription", name), settings, where))
        return found

    def judge(self, kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
        if setting == "mode":
            why = "a queue forgets what was handled, a log keeps it: one cannot become the other"
            return Verdict(Allowed.REPLACE, loses="all events", why=why)
        if setting in _LOSSES and _shrinks(old, new):
            return Verdict(loses=_LOSSES[setting].format(new))
        return Verdict()

    async def connect(
        self, topology: Topology, broker: Broker, *, name: str, patience: float = 5.0
    ) -> MemoryConnection:
        hub = self.hub(broker.url)
        if not hub.online:
            raise BrokerUnavailable(f"cannot reach {broker.url}", hint="start it again")
        hub.max_body = int(broker.client.get("max_body", hub.max_body))
        return MemoryConnection(hub, topology, lambda: self.desired(topology, broker))


_LOSSES = {
    "max_age": "events older than {} s",
    "max_events": "all but the newest {} events",
    "max_bytes": "all but the newest {} bytes",
}


def _shrinks(old: Setting, new: Setting) -> bool:
    """None is unlimited."""
    if new is None:
        return False
    return old is None or (isinstance(old, (int, float)) and isinstance(new, (int, float)) and new < old)


def _desired_channel(channel: Channel) -> Desired:
    where = ("channels", channel.name)
    retention = channel.retention
    settings: dict[str, Setting] = {
        "mode": Mode(channel.mode).value,
        "events": channel.events,
        "max_age": retention.max_age,
        "max_events": retention.max_events,
        "max_bytes": retention.max_bytes,
        "overflow": channel.overflow.value,
        "dedup_window": channel.dedup_window,
    }
    kept = ("max_age", "max_events", "max_bytes")
    return Desired(
        ResourceId(channel.broker, "channel", channel.address),
        {} if channel.external else settings,
        where,
        origins={name: (*where, "retention", name) if name in kept else (*where, name) for name in settings},
        external=channel.external,
        protect=channel.protect,
    )


adapter = MemoryAdapter()
