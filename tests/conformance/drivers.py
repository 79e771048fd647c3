"""What the suite has to know of each broker, and nothing else of the tests does: one small class for each."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest

from orchestrator.topology.model import Channel, Subscription, Topology

from .victims import ProcessVictim, Victim

__all__ = ["Driver", "Server", "ServerDriver", "Victim"]


class Server(Protocol):
    """tests/servers/*: a real server on loopback."""

    @property
    def url(self) -> str: ...
    def start(self) -> None: ...
    def kill(self) -> None: ...
    def restart(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Driver(Protocol):
    kind: str
    client: Mapping[str, Any]  # raw client options of the topology's broker
    lease_constants: tuple[str, ...]  # "module:NAME" of each name that holds the adapter's lease in seconds
    carried: tuple[str, ...]  # more such names, whose values (patched ones too) victims get to know
    long_lease: float  # as good as for ever, in a test
    short_lease: float  # to which the takeover tests may shorten it: a busy machine still renews it in time
    too_large: int | None  # a body of so many bytes is refused; None: this broker takes whatever we can try
    processes: bool  # consumers may live in processes of their own
    exclusive: str  # why what one replica could read goes to no other meanwhile; "" when it does
    undeletable: str  # why a subscription cannot be deleted while it is read; "" when it can

    @property
    def url(self) -> str: ...
    def address(self, topology: str, channel: str) -> str:
        """A channel's address, unique to the topology's name."""

    def end(self) -> None:
        """The test is over; the server goes on to the next."""

    def without(self, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> str:
        """Takes a mechanism of this adapter out for the test: renewal (of leases, while the loop runs), guardian
        (keep_alive, while it is blocked), fencing (of a late settlement), watermark (settled out of order). "" when
        done, else why this broker has none to take."""

    async def kill_server(self) -> None:
        """As SIGKILL: nothing is said to anyone."""

    async def start_server(self) -> None:
        """Again, on the same data; returns when it answers."""

    async def victim(self, topology: Topology, agent: str, slot: str, free: int) -> Victim: ...

    async def outside_publish(
        self, topology: Topology, channel: Channel, event_type: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        """As a program would that has never heard of this package; with `headers` exactly."""

    async def outside_read(self, channel: Channel) -> list[bytes]:
        """The bodies that such a program finds in the channel, in order."""

    async def outside_create(self, address: str) -> None:
        """A channel of somebody else, without any label."""

    async def outside_exists(self, address: str) -> bool: ...
    async def outside_delete(self, address: str) -> None: ...
    async def outside_delete_subscription(self, channel: Channel, subscription: Subscription) -> None: ...


class ServerDriver:
    """What the drivers of the real servers share."""

    client: Mapping[str, Any] = {}
    lease_constants: tuple[str, ...]
    carried: tuple[str, ...] = ()
    too_large: int | None = None
    processes = True
    exclusive = ""
    undeletable = ""
    long_lease = 3600.0
    short_lease = 2.5

    def __init__(self, server: Server) -> None:
        self.server = server

    @property
    def url(self) -> str:
        return self.server.url

    def end(self) -> None:
        """Nothing of ours is left: each lab has deleted what it made."""

    async def kill_server(self) -> None:
        await asyncio.to_thread(self.server.kill)

    async def start_server(self) -> None:
        await asyncio.to_thread(self.server.start)

    async def victim(self, topology: Topology, agent: str, slot: str, free: int) -> Victim:
        return await ProcessVictim.start(topology, agent, slot, free, (*self.lease_constants, *self.carried))


def driver_class(kind: str) -> Callable[..., Driver]:
    module = importlib.import_module(f"{__package__}.driver_{kind}")
    found: Callable[..., Driver] = module.driver
    return found
