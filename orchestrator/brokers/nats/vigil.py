"""Keeps one consumer consuming: notices what breaks, makes it good, says so, and extends leases meanwhile.

Walk "an event": what runs beside it. consumer.py builds deliver and settle on top of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from orchestrator.brokers.base import Sink
from orchestrator.brokers.nats.delivery import NatsDelivery, Record
from orchestrator.brokers.nats.pull import Lane
from orchestrator.brokers.nats.resources import ACK_WAIT, safe
from orchestrator.brokers.nats.trimmed import LOST, Trimmed
from orchestrator.errors import BrokerError, OrchestratorError, ResourceMissing
from orchestrator.topology.model import Subscription

if TYPE_CHECKING:
    from orchestrator.brokers.nats.connection import NatsConnection

_LOOK = 2.0  # seconds between looks for unread events that were trimmed
_GRACE = 1.0  # seconds before what is gone is made again


class Vigil(ABC):
    """State and upkeep of a NatsConsumer."""

    def __init__(self, connection: NatsConnection, subscription: Subscription, slot: str) -> None:
        self._connection = connection
        self._link = connection.link
        self._client = connection.link.client
        self._subscription = subscription
        self._channel = connection.topology.channels[subscription.channel]
        self._slot = slot
        names = connection.resources.names
        self._history_root = names.history_root(subscription, self._channel)
        self._state = names.state
        self._purge = self._link.api_subject(f"STREAM.PURGE.{names.state}").encode()
        self._prefix = len(connection.broker.prefix.encode())
        stream = safe(self._channel.address)
        self._main = Lane(self._link, stream, safe(subscription.group), self._on_main, self._on_late, self._on_lost)
        durable = names.redrive_durable(subscription, self._channel)
        self._redrive = Lane(self._link, names.inbox, durable, self._on_redrive, self._on_late, self._on_lost)
        self._redrive_subject = names.redrive_subject(subscription, self._channel)
        self._bell = names.bell(subscription, self._channel)
        self._bell_sid = b""
        self._ringing = False  # redriven events are there, or were
        self._send = connection.producer().send
        channel = self._channel
        exact = set(subscription.events) == set(channel.events) and not channel.external and not channel.dead_letters
        lost = self._history_root + LOST
        self._trimmed = Trimmed(self._link, connection.publisher, names.state, lost, exact, self._alarm)
        self._looked = 0.0
        self._sink: Sink | None = None
        self._free = 0
        self._looking = 0  # redeliveries whose history is being read
        self._unsettled: dict[tuple[Lane, bytes], NatsDelivery] = {}
        self._batch: list[NatsDelivery] = []
        self._parked: list[NatsDelivery] = []  # one redriven event may wait for a slot
        self._known: dict[str, Record] = {}  # histories at the last (re)connect
        self._given_back: dict[tuple[str, bytes], int] = {}  # never started here: delivery counts to overlook
        self._floor = 0  # everything up to here is settled, as last seen
        self._reading = False
        self._asked = False
        self._trouble: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.Task[None] | None = None
        self._extended = 0.0
        self._lease = ACK_WAIT  # as the server has it
        self._clock = asyncio.get_running_loop().time

    @abstractmethod
    def _on_main(self, subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        """An event of the channel."""

    @abstractmethod
    def _on_redrive(self, subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        """A redriven event."""

    @abstractmethod
    def _pull(self) -> None:
        """Asks the server for what there is room for."""

    def _on_late(self, _subject: bytes, reply: bytes, _header: bytes | None, _body: bytes) -> None:
        """Arrived after its request was withdrawn: somebody else may have it."""
        if reply.startswith(b"$JS.ACK."):
            self._nak(reply, 0)

    def demand(self, free: int) -> None:
        self._free = free
        self._ask()

    def _ask(self) -> None:
        if not self._asked and self._reading:
            self._asked = True
            self._client.before_write(self._pull)

    async def _prepare(self) -> None:
        """Reads position and histories. Raises ResourceMissing or BrokerUnavailable."""
        lane, inbox = self._main, self._redrive
        info = await self._link.api(f"CONSUMER.INFO.{lane.stream}.{lane.durable}")
        self._floor = int(info["ack_floor"]["stream_seq"])
        self._lease = float(info["config"]["ack_wait"]) / 1e9
        await self._trimmed.look(lane.stream, info)
        held = await self._link.api(f"STREAM.INFO.{inbox.stream}", {"subjects_filter": self._redrive_subject})
        if held["state"].get("subjects"):
            await self._link.api(f"CONSUMER.INFO.{inbox.stream}.{inbox.durable}")
            self._ringing = True
        known: dict[str, Record] = {}
        async for raw in self._link.read(self._state, subject=self._history_root + "*"):
            suffix = raw.subject.rpartition(".")[2]
            record = Record.decode(raw.body)
            if suffix == LOST:
                continue
            if suffix.isdigit() and int(suffix) <= self._floor:
                self._forget(raw.subject)  # settled, and its worker died before it could forget
            elif record is not None:
                known[suffix] = record
        self._known = known

    def _link_changed(self, up: bool) -> None:
        if not up:
            self._say(self._link.unavailable().message)
        elif self._reading:
            self._resume("reconnecting")

    def _on_lost(self, lane: Lane, reason: str, missing: bool) -> None:
        if missing and self._reading:
            self._resume(f"{lane.stream}/{lane.durable}: {reason}")
        else:
            self._ask()

    def _resume(self, reason: str) -> None:
        """Reads again what the server knows, makes again what is gone, then pulls."""
        self._say(reason)
        if self._resuming is None:
            self._resuming = asyncio.create_task(self._resume_until_done(), name=f"nats-resume-{self._slot}")

    async def _resume_until_done(self) -> None:
        try:
            while self._reading:
                try:
                    if self._link.connected:
                        await self._prepare()
                        break
                except ResourceMissing as error:
                    await self._heal(error)
                except BrokerError as error:
                    self._say(error.message)
                await asyncio.sleep(0.25)
        finally:
            self._resuming = None
        if self._reading:
            self._remind()
            self._main.restart()
            self._redrive.restart()
            self._say(None)
            self._ask()

    def _remind(self) -> None:
        """A killed server forgets when a retry was due and would wait a whole lease. What is past its time is left to
        that lease: it may be running elsewhere."""
        now = time.time()
        for record in self._known.values():
            if (rest := record.history.rest(now)) > 0:
                self._nak(record.reply, rest)

    async def _heal(self, missing: ResourceMissing) -> None:
        self._say(missing.message)
        await asyncio.sleep(_GRACE)  # an apply that deletes it on purpose is about to stop us, or to put another there
        if not self._reading:
            return
        try:
            healed = await self._connection.heal(self._subscription, self._floor)
        except OrchestratorError as error:
            self._say(f"{missing.message}; {error.message}")
            await asyncio.sleep(0.75)
            return
        for what in healed:
            self._alarm(f"{what} was deleted from outside and has been created again")

    async def _watch(self) -> None:
        """Once a second: lost requests; each third of a lease: extends what is unsettled."""
        while True:
            await asyncio.sleep(min(1.0, self._lease / 6))
            if not self._link.connected:
                self._say(self._link.unavailable().message)  # the reason may be known by now
                continue
            if self._reading and self._resuming is None:
                quiet = [lane for lane in (self._main, self._redrive) if not lane.check()]
                if quiet:
                    self._resume(f"no sign of life of {quiet[0].stream}/{quiet[0].durable}")
            now = self._clock()
            if self._reading and now - self._looked >= _LOOK:
                self._looked = now
                self._spawn(self._look())
            if now - self._extended >= self._lease / 3:
                self._extended = now
                for delivery in self._unsettled.values():
                    self._client.send(b"PUB %b 4\r\n+WPI\r\n" % delivery.reply)

    async def _check_gap(self) -> None:
        with contextlib.suppress(BrokerError):  # as above: the next gap or look finds it
            await self._trimmed.check(self._main.stream)

    async def _look(self) -> None:
        stream, durable = self._main.stream, self._main.durable
        with contextlib.suppress(BrokerError):  # the pull loop reports and heals; this looks again in two seconds
            info = await self._link.api(f"CONSUMER.INFO.{stream}.{durable}")
            self._floor = int(info["ack_floor"]["stream_seq"])
            await self._trimmed.look(stream, info)

    def _forget(self, subject: str) -> None:
        body = json.dumps({"filter": subject}).encode()
        self._client.send(b"PUB %b %d\r\n%b\r\n" % (self._purge, len(body), body))

    def _nak(self, reply: bytes, delay: float) -> None:
        body = b'-NAK {"delay":%d}' % (delay * 1e9) if delay > 0 else b"-NAK"
        self._client.send(b"PUB %b %d\r\n%b\r\n" % (reply, len(body), body))

    # --- saying so ---

    def _say(self, reason: str | None) -> None:
        if reason != self._trouble and self._sink is not None:
            self._trouble = reason
            self._sink.trouble(reason)

    def _alarm(self, message: str) -> None:
        if self._sink is not None:
            self._sink.alarm(message)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"nats-{self._slot}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
