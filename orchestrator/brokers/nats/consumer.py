"""One agent's reading of one channel: deliver, settle, retry, mark, recover (base.Consumer).

Walk "an event that dies": the adapter's part. The history of an event lies in the state stream under the sequence of
the event; it is written before the event is given back, so a crash in between costs a rerun and never an attempt. A
first delivery reads nothing: see docs/adr/0003.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.brokers.base import FRESH, Delivery, Done, Ended, History, Left, Outgoing, Sink
from orchestrator.brokers.nats.client import Raw, headers_of
from orchestrator.brokers.nats.delivery import NatsDelivery, Record
from orchestrator.brokers.nats.pull import Lane
from orchestrator.brokers.nats.resources import ACK_WAIT, safe
from orchestrator.brokers.nats.trimmed import LOST, Trimmed
from orchestrator.errors import BrokerError, OrchestratorError, ResourceMissing
from orchestrator.topology.model import Subscription

if TYPE_CHECKING:
    from orchestrator.brokers.nats.connection import NatsConnection

_LOOK = 2.0  # seconds between looks for unread events that were trimmed
_REMEMBERED = 65536  # events given back unstarted
_EARLY = 0.02  # seconds before its time that a retry may be handed out


class _Settling:
    """Counts the outputs of one delivery down; the event is acknowledged after the last."""

    __slots__ = ("consumer", "delivery", "done", "error", "left")

    def __init__(self, consumer: NatsConsumer, delivery: NatsDelivery, left: int, done: Done) -> None:
        self.consumer = consumer
        self.delivery = delivery
        self.left = left
        self.done = done
        self.error: BaseException | None = None

    def one(self, error: BaseException | None) -> None:
        self.left -= 1
        if error is not None and self.error is None:
            self.error = error
        if not self.left:
            if self.error is None:
                self.consumer.acknowledge(self.delivery)
            self.done(self.error)


class NatsConsumer:
    """base.Consumer on JetStream."""

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

    # --- life ---

    async def open(self, sink: Sink) -> None:
        self._sink = sink
        self._connection.sinks.append(sink)
        self._bell_sid = self._client.listen(self._bell, self._on_bell)
        await self._prepare()
        self._main.open()
        self._redrive.open()
        if self._connection.schedules:
            self._connection.relay.open()
        self._reading = True
        self._link.listeners.append(self._link_changed)
        self._spawn(self._watch())

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

    def demand(self, free: int) -> None:
        self._free = free
        self._ask()

    def _ask(self) -> None:
        if not self._asked and self._reading:
            self._asked = True
            self._client.before_write(self._pull)

    def _pull(self) -> None:
        self._asked = False
        if not self._reading or not self._link.connected or self._resuming is not None:
            return
        if self._parked and self._free > 0:
            parked, self._parked = self._parked, []
            self._hand_out(parked)
        room = self._free - self._looking
        if room > 0:
            self._main.pull(room)
            if self._ringing:
                self._redrive.pull(1 - len(self._parked))

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
            if record.history.not_before > now:
                self._nak(record.reply, record.history.not_before - now)

    async def _heal(self, missing: ResourceMissing) -> None:
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

    def keep_alive(self) -> None:
        replies = [delivery.reply.decode() for delivery in list(self._unsettled.values())]
        if replies:
            asyncio.run(self._connection.extend(replies))

    async def drain(self) -> None:
        self._reading = False
        self._main.stop()
        self._redrive.stop()
        parked, self._parked = self._parked, []
        self.release(parked)

    async def close(self) -> None:
        await self.drain()
        if self._link_changed in self._link.listeners:
            self._link.listeners.remove(self._link_changed)
        if self._sink in self._connection.sinks:
            self._connection.sinks.remove(self._sink)
        if self._bell_sid:
            self._client.unlisten(self._bell_sid)
        self.release(list(self._unsettled.values()))
        tasks = [*self._tasks, *([self._resuming] if self._resuming else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._client.flush_frames()

    # --- in ---

    def _on_main(self, subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        self._take(NatsDelivery(self._main, self._channel.name, self._prefix, subject, reply, header, body))

    def _on_redrive(self, subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        delivery = NatsDelivery(self._redrive, self._channel.name, 0, subject, reply, header, body)
        delivery.event_type = headers_of(header).get("Nats-Orchestrator-Type")
        self._take(delivery)
        self._ask()  # one at a time is asked for, so the next is asked for here

    def _on_bell(self, _subject: bytes, _reply: bytes, _header: bytes | None, _body: bytes) -> None:
        self._ringing = True
        self._ask()

    def _on_late(self, _subject: bytes, reply: bytes, _header: bytes | None, _body: bytes) -> None:
        """Arrived after its request was withdrawn: somebody else may have it."""
        if reply.startswith(b"$JS.ACK."):
            self._client.send(b"PUB %b 4\r\n-NAK\r\n" % reply)

    def _take(self, delivery: NatsDelivery) -> None:
        place = (delivery.lane, delivery.key)
        running = self._unsettled.get(place)
        if running is not None and running.stamp == delivery.stamp:
            running.reply = delivery.reply  # a restarted server forgot that we have it: no second copy
            self._ask()
            return
        self._unsettled[place] = delivery
        if delivery.count > 1:
            self._look_up(delivery)
            return
        if self._known:
            record = self._known.pop(self._suffix(delivery), None)
            if record is not None:
                self._judge(delivery, record)
                return
        if not self._batch:
            self._client.after_chunk(self._flush_batch)
        self._batch.append(delivery)

    def _flush_batch(self) -> None:
        batch, self._batch = self._batch, []
        last = batch[-1]
        if last.lane is self._main and self._trimmed.delivered(int(last.key), int(last.order)):
            self._spawn(self._check_gap())
        self._hand_out(batch)

    def _hand_out(self, batch: list[NatsDelivery]) -> None:
        assert self._sink is not None
        room = max(self._free, 0)
        extra = batch[room:]
        if extra:
            del batch[room:]
            self._too_many(extra)
        if batch:
            self._free -= len(batch)
            self._sink.deliver(batch)

    def _too_many(self, extra: list[NatsDelivery]) -> None:
        """The slots went elsewhere meanwhile: nothing waits here but one redriven event, which is for us alone."""
        back = []
        for delivery in extra:
            if delivery.lane is self._redrive and not self._parked and self._reading:
                self._parked.append(delivery)
            else:
                back.append(delivery)
        if back:
            if self._reading:
                self._main.restart()
            self.release(back)

    def _look_up(self, delivery: NatsDelivery) -> None:
        self._looking += 1
        self._known.pop(self._suffix(delivery), None)  # what is read now is newer
        self._spawn(self._look_up_later(delivery))

    async def _look_up_later(self, delivery: NatsDelivery) -> None:
        try:
            raw = await self._link.message(self._state, {"last_by_subj": self._subject(delivery)})
        except OrchestratorError:
            self.release([delivery])  # back to the server: whoever gets it next can read its history
            return
        finally:
            self._looking -= 1
        if self._unsettled.get((delivery.lane, delivery.key)) is delivery:
            self._judge(delivery, Record.decode(raw.body) if raw is not None else None)

    def _judge(self, delivery: NatsDelivery, record: Record | None) -> None:
        """What is known of a redelivery; one that came before its time goes back for the rest."""
        if record is not None and record.stamp != delivery.stamp:
            record = None  # about an earlier event of this sequence: the stream was created again
        seen = self._given_back.pop((self._suffix(delivery), delivery.stamp), 0)
        delivery.redelivered = delivery.count > max(seen, record.count if record is not None else 0) + 1
        if record is not None:
            delivery.stored = True
            delivery.history = record.history
            rest = record.history.not_before - time.time()
            if rest > _EARLY:
                self._give_back(delivery, rest)
                self._ask()
                return
        self._hand_out([delivery])

    # --- out ---

    def settle(self, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        assert isinstance(delivery, NatsDelivery)
        if not outputs:
            self.acknowledge(delivery)
            done(None)
            return
        settling = _Settling(self, delivery, len(outputs), done)
        for message in outputs:
            try:
                self._send(message, settling.one)
            except OrchestratorError as error:
                settling.one(error)

    def acknowledge(self, delivery: NatsDelivery) -> None:
        self._unsettled.pop((delivery.lane, delivery.key), None)
        self._client.send(b"PUB %b 4\r\n+ACK\r\n" % delivery.reply)
        if delivery.stored:
            self._forget(self._subject(delivery))

    def _forget(self, subject: str) -> None:
        body = json.dumps({"filter": subject}).encode()
        self._client.send(b"PUB %b %d\r\n%b\r\n" % (self._purge, len(body), body))

    def retry(self, delivery: Delivery, history: History, delay: float, done: Done) -> None:
        assert isinstance(delivery, NatsDelivery)

        def stored(error: BaseException | None) -> None:
            if error is None:
                self._unsettled.pop((delivery.lane, delivery.key), None)
                self._nak(delivery.reply, delay)
            done(error)

        self._store(delivery, history, stored)

    def mark(self, delivery: Delivery, history: History, done: Done) -> None:
        assert isinstance(delivery, NatsDelivery)
        self._store(delivery, history, done)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            assert isinstance(delivery, NatsDelivery)
            if (delivery.lane, delivery.key) in self._unsettled:
                self._give_back(delivery, 0)

    def _give_back(self, delivery: NatsDelivery, delay: float) -> None:
        """Uncounted: nobody started it. Other processes do not know that, so to them it is `redelivered`."""
        del self._unsettled[delivery.lane, delivery.key]
        if not delivery.redelivered:
            if len(self._given_back) >= _REMEMBERED:
                self._given_back.clear()
            self._given_back[self._suffix(delivery), delivery.stamp] = delivery.count
        self._nak(delivery.reply, delay)

    async def recover(self, left: Sequence[Left]) -> None:
        await asyncio.gather(*(self._recover_one(one) for one in left))

    async def _recover_one(self, left: Left) -> None:
        assert self._sink is not None
        parts = left.token.split(b".")
        if not left.token.startswith(b"$JS.ACK.") or len(parts) < 9:
            return
        stream = parts[2 if len(parts) == 9 else 4].decode()
        lane = next((lane for lane in (self._main, self._redrive) if lane.stream == stream), None)
        if lane is None:
            return
        ghost = NatsDelivery(lane, self._channel.name, 0, b"", left.token, None, b"")
        if await self._is_settled(ghost):
            return
        raw = await self._link.message(self._state, {"last_by_subj": self._subject(ghost)})
        record = Record.decode(raw.body) if raw is not None else None
        history = record.history if record is not None and record.stamp == ghost.stamp else FRESH
        if left.ended is not Ended.RETURNED:
            history = self._sink.on_crash(history, left.ended)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            if not stored.done():
                stored.set_exception(error) if error else stored.set_result(None)

        self._store(ghost, history, done)
        await stored
        self._nak(left.token, 0)

    async def _is_settled(self, ghost: NatsDelivery) -> bool:
        """In a queue what is settled is gone; in a log what lies below the acknowledged floor is."""
        if ghost.lane is self._main and int(ghost.key) <= self._floor:
            return True
        raw: Raw | None = await self._link.message(ghost.lane.stream, {"seq": int(ghost.key)})
        return raw is None

    def _store(self, delivery: NatsDelivery, history: History, done: Done) -> None:
        """Keeps `history`; it accounts for the deliveries so far."""
        record = Record(history, delivery.count, delivery.stamp, delivery.reply)
        delivery.stored = True
        self._connection.publisher.publish(self._subject(delivery).encode(), b"", record.encode(), self._state, done)

    def _subject(self, delivery: NatsDelivery) -> str:
        return f"{self._history_root}{self._suffix(delivery)}"

    def _suffix(self, delivery: NatsDelivery) -> str:
        """The last token of the history's subject: the sequence, and an r before it for a redriven event."""
        key = delivery.key.decode()
        return key if delivery.lane is self._main else f"r{key}"

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
