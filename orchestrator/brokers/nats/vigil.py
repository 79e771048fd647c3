"""Keeps one consumer consuming: pulls, notices what breaks, makes it good, says so, and extends leases meanwhile.

Walk "an event": the step before consumer.py takes it, and what runs beside it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from orchestrator.brokers.base import Sink
from orchestrator.brokers.nats.client import Json
from orchestrator.brokers.nats.internals import Receive
from orchestrator.brokers.nats.lane import Lane, NatsDelivery, Record
from orchestrator.brokers.nats.resources import ACK_WAIT, LOST, filters_of
from orchestrator.errors import BrokerError, OrchestratorError, ResourceMissing
from orchestrator.topology.model import Subscription

if TYPE_CHECKING:
    from orchestrator.brokers.nats.connection import NatsConnection

_LOOK = 2.0  # seconds between looks for unread events that were trimmed
_GRACE = 1.0  # seconds before what is gone is made again
DUE_ROOM = 64  # delayed events on their last step at a time


class Vigil:
    """State and upkeep of a NatsConsumer, whose receivers of an event, a redriven and a delayed one it is given."""

    def __init__(
        self,
        connection: NatsConnection,
        subscription: Subscription,
        slot: str,
        receive: tuple[Receive, Receive, Receive],
        pull: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._link = connection.link
        self._client = connection.link.client
        self._subscription = subscription
        self._channel = channel = connection.topology.channels[subscription.channel]
        self._slot = slot
        self._pull = pull  # asks the server for what there is room for
        names = connection.names
        stream, durable = connection.place(subscription)
        self._histories = names.histories(stream, durable)
        self._state = names.state
        self._prefix = len(connection.broker.prefix.encode())
        self._redriven, redriven = names.redriven(stream, durable)
        self._bell = names.bell(stream, durable)
        self._bell_sid = b"0"  # of no subscription
        self._ringing = False  # redriven events are there, or were
        self._main = Lane(self._link, stream, durable, receive[0], self._on_lost)
        self._redrive = Lane(self._link, names.inbox, redriven, receive[1], self._on_lost, "r")
        self._due = Lane(self._link, names.later, names.relay, receive[2], self._on_lost)
        self._lanes = [self._main, self._redrive, *([self._due] if connection.schedules else [])]
        self._nak = self._main.nak
        self._moving = 0  # delayed events on their last step
        self._producer = connection.producer()
        exact = set(subscription.events) == set(channel.events) and not channel.external and not channel.dead_letters
        self._trimmed = Trimmed(
            connection, stream, self._histories + LOST, exact, lambda message: self._sink.alarm(message)
        )
        self._looked = 0.0
        self._sink: Sink  # given by open()
        self._free = 0
        self._looking = 0  # redeliveries whose history is being read
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

    def demand(self, free: int) -> None:
        self._free = free
        self._ask()

    def _ask(self) -> None:
        if not self._asked and self._reading:
            self._asked = True
            self._client.before_write(self._pull)

    async def _prepare(self) -> None:
        """Reads position and histories. Raises ResourceMissing or BrokerUnavailable."""
        await self._look()
        inbox = await self._link.api(f"STREAM.INFO.{self._redrive.stream}", {"subjects_filter": self._redriven})
        self._redrive.of(inbox)
        if inbox["state"].get("subjects"):
            await self._redrive.info()
            self._ringing = True
        if self._due in self._lanes:
            await self._due.info()
        known: dict[str, Record] = {}
        async for raw in self._link.read(self._state, subject=self._histories + "*"):
            suffix = raw.subject.rpartition(".")[2]
            if suffix == LOST:
                continue
            record = Record.decode(raw.body)
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
            self._resume(f"{lane}: {reason}")
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
            for lane in self._lanes:
                lane.restart()
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
            healed = await self._connection.heal(self._subscription, self._floor, self._main.born)
        except OrchestratorError as error:
            self._say(f"{missing.message}; {error.message}")
            await asyncio.sleep(0.75)
        else:
            for what in healed:
                self._sink.alarm(f"{what} was deleted from outside and has been created again")

    async def _watch(self) -> None:
        """Once a second: lost requests; each third of a lease: extends what is unsettled."""
        while True:
            await asyncio.sleep(min(1.0, self._lease / 6))
            if not self._link.connected:
                self._say(self._link.unavailable().message)  # the reason may be known by now
                continue
            if self._reading and self._resuming is None:
                quiet = [lane for lane in self._lanes if not lane.check()]
                if quiet:
                    self._resume(f"no sign of life of {quiet[0]}")
            now = self._clock()
            if self._reading and now - self._looked >= _LOOK:
                self._looked = now
                self._spawn(self._quietly(self._look))
            if now - self._extended >= self._lease / 3:
                self._extended = now
                for delivery in self._unsettled():
                    self._client.send(b"PUB %b 4\r\n+WPI\r\n" % delivery.reply)

    def _unsettled(self) -> list[NatsDelivery]:
        return [*self._main.held.values(), *self._redrive.held.values()]

    async def _look(self) -> None:
        """What the server says of the subscription: its position, its lease, and whether events went unread. `_floor`
        is for logs, where it can only be too low; in a queue settled is what the stream no longer holds."""
        info = await self._main.info()
        stream = await self._link.api(f"STREAM.INFO.{self._main.stream}")
        self._main.of(stream)
        self._floor = int(info["ack_floor"]["stream_seq"])
        self._lease = float(info["config"]["ack_wait"]) / 1e9
        await self._trimmed.look(info, int(stream["state"]["first_seq"]))

    async def _quietly(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await look()
        except ResourceMissing as error:
            if self._reading:  # while every slot is busy no request is there to be told of it
                self._resume(error.message)
        except BrokerError:
            pass  # the pull loop reports and heals; the next look finds it

    def _forget(self, subject: str) -> None:
        body = json.dumps({"filter": subject})
        self._client.send(f"PUB {self._link.api_root}STREAM.PURGE.{self._state} {len(body)}\r\n{body}\r\n".encode())

    def _say(self, reason: str | None) -> None:
        if reason != self._trouble:
            self._trouble = reason
            self._sink.trouble(reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"nats-{self._slot}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Trimmed:
    """Notices events that the channel's limits removed before this subscription had read them.

    JetStream says nothing of it: the consumer just goes on behind the gap. So a gap in what is delivered is compared
    with where the stream now begins; and each worker looks every two seconds, and at its start, whether the stream
    begins behind what was delivered last. What was lost is kept beside the histories, so that `status` knows it and
    nobody is told twice. `exact`: the subscription reads all that its stream takes, so that gaps can be counted.
    """

    def __init__(
        self, connection: NatsConnection, stream: str, subject: str, exact: bool, alarm: Callable[[str], None]
    ) -> None:
        self._link = connection.link
        self._producer = connection.producer()
        self._state = connection.names.state
        self._stream = stream
        self._subject = subject
        self._exact = exact
        self._alarm = alarm
        self._oldest = 0  # of a subscription that reads a part: the first event that was unread at the last look
        self._last = (0, 0)  # stream and consumer sequence of the newest delivery
        self._from, self._gap = 0, 0

    def delivered(self, stream_seq: int, consumer_seq: int) -> bool:
        """Told of the newest of each batch; True when something is missing before it, for which check() is due."""
        if not self._exact:
            return False
        seq, order = self._last
        gap = (stream_seq - seq) - (consumer_seq - order)
        self._last = (stream_seq, consumer_seq)
        if gap > 0:
            self._from = self._from or seq
            self._gap += gap
        return gap > 0

    async def check(self) -> None:
        """Whether the gap that deliveries showed was trimmed, or removed one by one. Raises BrokerError."""
        start, gap = self._from, self._gap
        self._from = self._gap = 0
        first = int((await self._link.api(f"STREAM.INFO.{self._stream}"))["state"]["first_seq"])
        if gap and first > start + 1:
            await self._remember(start, first, gap)

    async def look(self, consumer: Json, first: int) -> None:
        """`consumer` is a fresh CONSUMER.INFO, `first` where the stream begins. Raises BrokerError."""
        delivered = int(consumer["delivered"]["stream_seq"])
        if self._exact:
            self._last = max(self._last, (delivered, int(consumer["delivered"]["consumer_seq"])))
            if first - 1 > delivered:
                await self._remember(delivered, first, first)
            return
        # events of other readers leave the stream too: only one that was seen waiting can have been lost
        if delivered < self._oldest < first:
            await self._remember(self._oldest - 1, first, 1)
        self._oldest = 0
        for subject in filters_of(consumer["config"]) if consumer.get("num_pending") else ():
            raw = await self._link.message(self._stream, {"seq": delivered + 1, "next_by_subj": subject})
            if raw is not None:
                self._oldest = min(raw.seq, self._oldest or raw.seq)

    async def _remember(self, seen: int, first: int, most: int) -> None:
        """Events after `seen` and before `first` were trimmed, at most `most` of them ours."""
        raw = await self._link.message(self._state, {"last_by_subj": self._subject})
        known: Json = json.loads(raw.body) if raw is not None else {"lost": 0, "upto": 0}
        lost = min(most, first - 1 - max(seen, int(known["upto"])))
        if lost <= 0:
            return
        body = json.dumps({"lost": int(known["lost"]) + lost, "upto": first - 1}).encode()
        header = f"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: {raw.seq if raw is not None else 0}\r\n\r\n"
        try:
            await self._producer.store(self._subject, header.encode(), body, self._state)
        except BrokerError:
            return  # another replica has just said the same
        at_least = "" if self._exact else "at least "
        self._alarm(
            f"{at_least}{lost} unread events were trimmed from {self._stream}: raise its retention or read faster"
        )
