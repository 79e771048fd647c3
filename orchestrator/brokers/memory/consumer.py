"""Reading from a memory broker: demand, settling, retries, leases, and what a dead predecessor left behind.

A consumer that lives renews its lease while it holds something; one whose connection was dropped does not, and what
it held goes to others when the lease has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from orchestrator import clock
from orchestrator.brokers.base import Consumer, Delivery, Done, Ended, History, Left, Outgoing, Sink
from orchestrator.brokers.memory.state import Group, Log, Pending
from orchestrator.errors import BrokerError, BrokerUnavailable
from orchestrator.topology.model import Subscription

if TYPE_CHECKING:
    from orchestrator.brokers.memory.connection import MemoryConnection

#: Seconds after which what a vanished consumer held is handed to others. Read whenever a lease is renewed.
LEASE = 30.0


class MemoryDelivery(Delivery):
    __slots__ = ("pending", "turn")

    def __init__(self, pending: Pending, channel: str, address: str) -> None:
        entry = pending.entry
        super().__init__(
            body=entry.body,
            headers=dict(entry.headers),
            event_type=entry.event_type,
            channel=channel,
            position=f"{address}:{entry.place}",
            token=f"{entry.place}/{pending.turn}".encode(),
            time=entry.time,
            redelivered=pending.unaccounted,
            history=pending.history,
        )
        self.pending = pending
        self.turn = pending.turn


class MemoryConsumer(Consumer):
    def __init__(self, connection: MemoryConnection, subscription: Subscription, slot: str) -> None:
        self.slot = slot
        self.free = 0
        self.alive_until = 0.0
        self._connection = connection
        self._hub = connection.hub
        self._address = connection.topology.channels[subscription.channel].address
        self._subscription = subscription
        self._sink: Sink | None = None
        self._held: dict[str, MemoryDelivery] = {}
        self._renewal: asyncio.TimerHandle | None = None
        self._told: str | None = None

    # --- the Protocol -----------------------------------------------------------------------------------------

    async def open(self, sink: Sink) -> None:
        self._connection.require_online()
        group = self._hub.group(self._address, self._subscription.group)
        self._sink = sink
        self._hub.watchers.add(self._watch)
        group.members.append(self)
        self._connection.consumers.append(self)

    def demand(self, free: int) -> None:
        self.free = free
        if free:
            self._hub.changed()

    def settle(self, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        def act(log: Log, group: Group, pending: Pending) -> None:
            self._hub.publish(outputs)
            self._hub.settled(log, group, pending)

        self._enqueue(delivery, act, done)

    def retry(self, delivery: Delivery, history: History, delay: float, done: Done) -> None:
        def act(log: Log, group: Group, pending: Pending) -> None:
            self._store(pending, history)
            group.give_back(pending, due=clock.now() + delay if delay > 0 else 0.0)
            self._hub.changed()

        self._enqueue(delivery, act, done)

    def mark(self, delivery: Delivery, history: History, done: Done) -> None:
        def act(log: Log, group: Group, pending: Pending) -> None:
            self._store(pending, history)

        self._enqueue(delivery, act, done, keep=True)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            # `unaccounted` stays as it was at this hand-out: nothing was started.
            self._enqueue(delivery, lambda log, group, pending: self._give_back(group, pending), _ignore)

    async def recover(self, left: Sequence[Left]) -> None:
        assert self._sink is not None
        self._connection.require_online()
        group = self._hub.group(self._address, self._subscription.group)
        for one in left:
            place, _, turn = one.token.decode().rpartition("/")
            pending = group.pending.get(place)
            if pending is None or pending.holder is None or str(pending.turn) != turn:
                continue
            self._store(pending, self._sink.on_crash(pending.history, one.ended))
            pending.unaccounted = one.ended is Ended.RETURNED
            self._give_back(group, pending)

    def keep_alive(self) -> None:
        self.alive_until = clock.now() + LEASE

    async def drain(self) -> None:
        self.free = 0

    async def close(self) -> None:
        self._connection.flush()
        for delivery in list(self._held.values()):
            delivery.pending.unaccounted = True
        self.release(list(self._held.values()))
        self._connection.flush()
        self.leave()

    # --- as a member of its subscription ----------------------------------------------------------------------

    def take(self, batch: list[Pending]) -> None:
        assert self._sink is not None
        deliveries = [MemoryDelivery(p, self._subscription.channel, self._address) for p in batch]
        self._held.update((d.position, d) for d in deliveries)
        self._renew()
        self._sink.deliver(deliveries)

    def lose(self, batch: list[Pending]) -> None:
        """The lease has ended, though we are still here: a frozen process that came back finds this."""
        lost = [d for d in self._held.values() if any(d.pending is p for p in batch)]
        for delivery in lost:
            del self._held[delivery.position]
        if lost and self._sink is not None and not self._connection.dropped:
            self._sink.revoked(lost)

    def tell(self, message: str) -> None:
        assert self._sink is not None
        self._sink.alarm(message)

    def missing(self, what: str) -> None:
        """Somebody deleted it: makes it again, as `apply` would, and says so."""
        assert self._sink is not None
        self._sink.trouble(f"{what} was deleted")
        asyncio.get_running_loop().call_soon(self._heal, what)

    def leave(self) -> None:
        """Renews nothing and gets nothing any more; what it holds is kept until the lease ends."""
        self.free = 0
        self._hub.watchers.discard(self._watch)
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
        log = self._hub.logs.get(self._address)
        if log is not None and (group := log.groups.get(self._subscription.group)) is not None:
            group.members = [member for member in group.members if member is not self]

    # --- inside -----------------------------------------------------------------------------------------------

    def _enqueue(
        self, delivery: Delivery, act: Callable[[Log, Group, Pending], None], done: Done, *, keep: bool = False
    ) -> None:
        """Runs `act` when the broker is there and the delivery still ours; an error leaves it unsettled."""
        assert isinstance(delivery, MemoryDelivery)
        self._connection.enqueue(lambda: self._act(delivery, act, keep), done)

    def _act(self, delivery: MemoryDelivery, act: Callable[[Log, Group, Pending], None], keep: bool) -> None:
        pending = delivery.pending
        log = self._hub.log(self._address)
        group = self._hub.group(self._address, self._subscription.group)
        if not self._owns(delivery, group):
            if self._held.pop(delivery.position, None) is not None and self._sink is not None:
                self._sink.revoked([delivery])
            raise BrokerUnavailable(f"{delivery.position} was handed to another worker meanwhile")
        act(log, group, pending)
        if not keep:
            self._held.pop(delivery.position, None)

    def _owns(self, delivery: MemoryDelivery, group: Group) -> bool:
        """Whether it is still ours, and was not handed out again since: the fence against a late settlement."""
        pending = delivery.pending
        known = group.pending.get(pending.entry.place) is pending
        return known and pending.holder is self and pending.turn == delivery.turn

    def _give_back(self, group: Group, pending: Pending) -> None:
        group.give_back(pending)
        self._hub.changed()

    @staticmethod
    def _store(pending: Pending, history: History) -> None:
        pending.history, pending.unaccounted = history, False

    def _renew(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
        if self._held:
            self.keep_alive()
            self._renewal = asyncio.get_running_loop().call_later(LEASE / 3, self._renew)

    def _heal(self, what: str) -> None:
        assert self._sink is not None
        if self._connection.dropped:
            return
        try:
            self._connection.restore(self._subscription)
            group = self._hub.group(self._address, self._subscription.group)
        except BrokerError as error:
            self._sink.trouble(f"{what} was deleted and could not be made again: {error}")
            return
        if self not in group.members:
            group.members.append(self)
        self._sink.alarm(f"{what} was deleted by someone else and has been created again")
        self._sink.trouble(None)
        self._hub.changed()

    def _watch(self) -> None:
        reason = None if self._hub.online else f"not connected to {self._hub.name}"
        if reason != self._told and self._sink is not None:
            self._told = reason
            self._sink.trouble(reason)


def _ignore(error: BaseException | None) -> None:
    """Giving back needs no answer: what could not be given back comes again by itself when the lease ends."""
