"""Shows events as they are published, or what is stored, without disturbing any queue: the command `tail`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from orchestrator.brokers.base import Start
from orchestrator.errors import OrchestratorError
from orchestrator.operate.reading import Read, stored
from orchestrator.operate.reading import follow as following
from orchestrator.operate.session import session
from orchestrator.topology.model import Channel, Topology, matches
from orchestrator.topology.near import near_type
from orchestrator.topology.routing import intersection


async def tail(
    topology: Topology, *, channels: Sequence[str], patterns: Sequence[str], start: Start, follow: bool
) -> AsyncIterator[Read]:
    """Events of the named channels (none: all), of types that fit a pattern (none: all).

    Raises OrchestratorError for a channel that does not exist; BrokerUnavailable, ResourceMissing.
    """
    chosen = choose(topology, channels)
    async with session(topology, name="tail") as connections:
        read_all = following if follow else stored
        async for read in read_all(connections, chosen, start=start):
            event_type = read.event.event_type if read.event else read.stored.event_type or ""
            if not patterns or any(matches(p, event_type) for p in patterns):
                yield read


def unheard(topology: Topology, channels: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """One sentence for each pattern whose events no chosen channel takes."""
    taken = [pattern for channel in choose(topology, channels) for pattern in channel.events or (">",)]
    lost = [p for p in patterns if not any(intersection(p, own) for own in taken)]
    return [f"no channel takes {p}" + (f": {meant}" if (meant := near_type(p, taken)) else "") for p in lost]


def choose(topology: Topology, names: Sequence[str]) -> list[Channel]:
    """The named channels, or all that hold events of their own."""
    for name in names:
        if name not in topology.channels:
            raise OrchestratorError(
                f"there is no channel {name!r}", hint=f"the channels are: {', '.join(topology.channels)}"
            )
    if names:
        return [topology.channels[name] for name in names]
    return [c for c in topology.channels.values() if c.events]
