"""One agent's reading of one channel: deliver, settle, retry, mark, recover (base.Consumer).

Walk "an event that dies": the adapter's part. The history of an event lies in the state stream under the sequence of
the event; it is written before the event is given back, so a crash in between costs a rerun and never an attempt. A
first delivery reads nothing: see docs/adr/0003.

Why nothing is settled unhandled: one frame settles, the +ACK of `acknowledge`, sent when the last output is confirmed.
It names the sequence that was delivered, and Lane.of keeps it from meaning another event once the stream was made
again. Whatever else takes an event for settled (`_is_settled`, histories below `_floor`) only skips bookkeeping: if it
were wrong, the event would still be pending on the server, and come again when its lease ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.brokers.base import FRESH, Delivery, Done, History, Left, Outgoing, Sink
from orchestrator.brokers.nats.lane import NatsDelivery, Record
from orchestrator.brokers.nats.resources import (
    LATER_CHANNEL,
    LATER_ID,
    LATER_SUBJECT,
    REDRIVEN_TYPE,
    SUBJECT,
    head,
    headers_of,
    public_headers,
)
from orchestrator.brokers.nats.vigil import DUE_ROOM, Vigil
from orchestrator.errors import OrchestratorError
from orchestrator.topology.model import Mode, Subscription

if TYPE_CHECKING:
    from orchestrator.brokers.nats.connection import NatsConnection

_REMEMBERED = 65536  # events given back unstarted
_EARLY = 0.02  # seconds before its time that a retry may be handed out
_AGAIN = 5.0  # seconds until a delayed event that its channel refused is tried again


class NatsConsumer(Vigil):
    """base.Consumer on JetStream."""

    def __init__(self, connection: NatsConnection, subscription: Subscription, slot: str) -> None:
        receive = (self._on_main, self._on_redrive, self._on_due)
        super().__init__(connection, subscription, slot, receive, self._pull)

    # --- life ---

    async def open(self, sink: Sink) -> None:
        self._sink = sink
        self._bell_sid = self._client.listen(self._bell, self._on_bell)
        await self._prepare()
        self._connection.sinks.append(sink)
        for lane in self._lanes:
            lane.open()
        self._reading = True
        self._link.listeners.append(self._link_changed)
        self._spawn(self._watch())
        self._ask()

    def _pull(self) -> None:
        self._asked = False
        if not self._reading or not self._link.connected or self._resuming is not None:
            return
        if self._parked and self._free > 0:
            parked, self._parked = self._parked, []
            self._hand_out(parked)
        room = self._free - self._looking
        if not self._free and self._main.requested:
            self._main.restart()  # what came now would wait, or die with an event that runs alone
        if room > 0:
            self._main.pull(room)
            if self._ringing:
                self._redrive.pull(1 - len(self._parked))
        if self._due in self._lanes:
            self._due.pull(DUE_ROOM - self._moving)

    def keep_alive(self) -> None:
        replies = [delivery.reply.decode() for delivery in self._unsettled()]
        if replies:
            asyncio.run(self._connection.extend(replies))

    async def drain(self) -> None:
        self._reading = False
        for lane in self._lanes:
            lane.stop()
        parked, self._parked = self._parked, []
        self.release(parked)

    async def close(self) -> None:
        await self.drain()
        if self._link_changed in self._link.listeners:
            self._link.listeners.remove(self._link_changed)
        if self._sink in self._connection.sinks:
            self._connection.sinks.remove(self._sink)
        self._client.unlisten(self._bell_sid)
        self.release(self._unsettled())
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
        delivery.event_type = headers_of(header).get(REDRIVEN_TYPE)
        self._take(delivery)
        self._ask()  # one at a time is asked for, so the next is asked for here

    def _on_due(self, _subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        """What the server's schedule has let go goes on to its own channel, under its own message id: a move that is
        made twice takes effect once. A schedule can only deliver into its own stream, and a stream that rejects when
        full cannot hold one; hence the internal stream, and these moves by whichever worker is there."""
        self._moving += 1
        headers = headers_of(header)
        name, subject = headers.get(LATER_CHANNEL, ""), headers.get(LATER_SUBJECT, "")

        def done(error: BaseException | None) -> None:
            self._moving -= 1
            if error is None:
                self._client.send(b"PUB %b 4\r\n+ACK\r\n" % reply)
            else:
                self._nak(reply, _AGAIN)
                self._connection.refused(name, error)
            self._ask()

        try:
            channel = self._connection.topology.channels.get(name)
            if channel is None or not SUBJECT.fullmatch(subject):
                raise OrchestratorError("this topology has no such channel any more")
            block = head(headers.get(LATER_ID, ""), headers.get("correlation-id", ""), public_headers(header))
            self._producer.publish(subject.encode(), block, body, channel, done)
        except OrchestratorError as error:
            done(error)

    def _on_bell(self, _subject: bytes, _reply: bytes, _header: bytes | None, _body: bytes) -> None:
        self._ringing = True
        self._ask()

    def _take(self, delivery: NatsDelivery) -> None:
        held = delivery.lane.held
        running = held.get(delivery.key)
        if running is not None and running.stamp == delivery.stamp:
            running.reply = delivery.reply  # a restarted server forgot that we have it: no second copy
            self._ask()
            return
        held[delivery.key] = delivery
        if delivery.count > 1:
            self._looking += 1
            self._known.pop(delivery.place, None)  # what is about to be read is newer
            self._spawn(self._look_up(delivery))
            return
        if self._known:
            record = self._known.pop(delivery.place, None)
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
            self._spawn(self._quietly(self._trimmed.check))
        self._hand_out(batch)

    def _hand_out(self, batch: list[NatsDelivery]) -> None:
        if extra := batch[self._free :]:
            del batch[self._free :]
            self._too_many(extra)
        if batch:
            self._free -= len(batch)
            self._sink.deliver(batch)
            if self._free > 0 and not self._main.requested:
                self._ask()  # the last request was for fewer than there are slots, and nobody need tell us again

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

    async def _look_up(self, delivery: NatsDelivery) -> None:
        try:
            raw = await self._link.message(self._state, {"last_by_subj": self._subject(delivery)})
        except OrchestratorError:
            self.release([delivery])  # back to the server: whoever gets it next can read its history
            return
        finally:
            self._looking -= 1
        if delivery.lane.held.get(delivery.key) is delivery:
            self._judge(delivery, Record.decode(raw.body) if raw is not None else None)

    def _judge(self, delivery: NatsDelivery, record: Record | None) -> None:
        """What is known of a redelivery; one that came before its time goes back for the rest."""
        if record is not None and record.stamp != delivery.stamp:
            record = None  # about an earlier event of this sequence: the stream was created again
        seen = self._given_back.pop((delivery.place, delivery.stamp), 0)
        delivery.redelivered = delivery.count > max(seen, record.count if record is not None else 0) + 1
        if record is not None:
            delivery.stored = True
            delivery.history = record.history
            rest = record.history.rest(time.time())
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
        left, failure = len(outputs), None

        def one(error: BaseException | None) -> None:
            nonlocal left, failure
            left -= 1
            failure = failure or error
            if not left:
                if failure is None:
                    self.acknowledge(delivery)
                done(failure)

        send = self._producer.send
        for message in outputs:
            try:
                send(message, one)
            except OrchestratorError as error:
                one(error)

    def acknowledge(self, delivery: NatsDelivery) -> None:
        """The only place that settles."""
        if delivery.reply:
            delivery.lane.held.pop(delivery.key, None)
            self._client.send(b"PUB %b 4\r\n+ACK\r\n" % delivery.reply)
            if delivery.stored:
                self._forget(self._subject(delivery))

    def retry(self, delivery: Delivery, history: History, delay: float, done: Done) -> None:
        assert isinstance(delivery, NatsDelivery)

        def stored(error: BaseException | None) -> None:
            if error is None and delivery.reply:
                delivery.lane.held.pop(delivery.key, None)
                self._nak(delivery.reply, delay)
            done(error)

        self._store(delivery, history, stored)

    def mark(self, delivery: Delivery, history: History, done: Done) -> None:
        assert isinstance(delivery, NatsDelivery)
        self._store(delivery, history, done)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            assert isinstance(delivery, NatsDelivery)
            if delivery.lane.held.get(delivery.key) is delivery:
                self._give_back(delivery, 0)

    def _give_back(self, delivery: NatsDelivery, delay: float) -> None:
        """Uncounted: nobody started it. Other processes do not know that, so to them it is `redelivered`."""
        del delivery.lane.held[delivery.key]
        if not delivery.redelivered:
            if len(self._given_back) >= _REMEMBERED:
                self._given_back.clear()
            self._given_back[delivery.place, delivery.stamp] = delivery.count
        self._nak(delivery.reply, delay)

    async def recover(self, left: Sequence[Left]) -> None:
        """All is read before anything is stored: when the broker does not answer, another try finds nothing counted."""
        found = await asyncio.gather(*(self._unsettled_one(one.token) for one in left))
        records = {}
        for one, known in zip(left, found, strict=True):
            if known is not None:
                ghost, history = known
                records[ghost] = Record(self._sink.on_crash(history, one.ended), ghost.count, ghost.stamp, ghost.reply)
        store = self._producer.store
        await asyncio.gather(*(store(self._subject(g), b"", r.encode(), self._state) for g, r in records.items()))
        for ghost in records:
            self._nak(ghost.reply, 0)

    async def _unsettled_one(self, token: bytes) -> tuple[NatsDelivery, History] | None:
        """What a dead worker's token stands for, unless that is settled or unknown."""
        parts = token.split(b".")
        if not token.startswith(b"$JS.ACK.") or len(parts) < 9:
            return None
        stream = parts[2 if len(parts) == 9 else 4].decode()
        lane = next((lane for lane in (self._main, self._redrive) if lane.stream == stream), None)
        if lane is None:
            return None
        ghost = NatsDelivery(lane, self._channel.name, 0, b"", token, None, b"")
        if await self._is_settled(ghost):
            return None
        raw = await self._link.message(self._state, {"last_by_subj": self._subject(ghost)})
        record = Record.decode(raw.body) if raw is not None else None
        return ghost, record.history if record is not None and record.stamp == ghost.stamp else FRESH

    async def _is_settled(self, ghost: NatsDelivery) -> bool:
        """In a queue what is settled is gone; in a log what lies below the acknowledged floor is. Another event may
        have the sequence by now, when the stream was made again: the time tells them apart."""
        raw = await self._link.message(ghost.lane.stream, {"seq": int(ghost.key)})
        if raw is None or abs(raw.time - ghost.time) > 0.001:
            return True
        return ghost.lane is self._main and self._channel.mode is Mode.LOG and int(ghost.key) <= self._floor

    def _store(self, delivery: NatsDelivery, history: History, done: Done) -> None:
        """Keeps `history`; it accounts for the deliveries so far."""
        if not delivery.reply:
            done(None)
            return
        record = Record(history, delivery.count, delivery.stamp, delivery.reply)
        delivery.stored = True
        self._producer.publish(self._subject(delivery).encode(), b"", record.encode(), self._state, done)

    def _subject(self, delivery: NatsDelivery) -> str:
        return self._histories + delivery.place
