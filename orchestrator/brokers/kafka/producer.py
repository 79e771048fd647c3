"""Confirmed publishing (walk "an event that dies": the outputs of a handler that returned). Everything in the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message
from confluent_kafka import Producer as RawProducer

from orchestrator.brokers.base import Done, Outgoing, Producer
from orchestrator.brokers.kafka import client
from orchestrator.errors import BrokerUnavailable, PublishRejected
from orchestrator.topology.model import Broker, Topology

#: Unconfirmed messages beyond which a publisher should wait.
_CROWD = 4096
#: Seconds between polls for reports when none is awaited; how many empty ones in a row come at once; how long one of
#: those waits, and how short the loop's turn before it must have been: the loop has nothing else to do then.
_SLOW, _SOON, _WAIT, _IDLE = 0.5, 20, 0.001, 0.0003
#: Seconds after which messages are sent although some before them are not confirmed: those may be for a partition that
#: has no leader.
_HOLD = 0.5
_CLOSING = 5.0


class _Lane:
    """One topic: how many messages the client has, and those that wait until these are confirmed."""

    __slots__ = ("held", "sent", "since", "topic")

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.sent = 0
        self.held: list[_Pending] = []
        self.since = 0.0


class _Pending:
    """One message until its report; librdkafka calls it with that."""

    __slots__ = ("done", "lane", "message", "producer", "raw")

    def __init__(self, producer: KafkaProducer, lane: _Lane, message: Outgoing, done: Done) -> None:
        self.producer, self.lane, self.message, self.done = producer, lane, message, done
        self.raw: RawProducer | None = None

    def __call__(self, error: KafkaError | None, _: Message | None) -> None:
        producer = self.producer
        if self.raw is not producer.raw:
            return  # renewed meanwhile: it was sent again
        producer.heard += 1
        self.lane.sent -= 1
        if error is not None and error.fatal():
            producer.renew()
            return
        if producer.pending.pop(self, None) is not None:
            if error is None:
                self.done(None)
            else:
                size = len(self.message.body)
                self.done(client.translate(error, f"publishing to {self.lane.topic}", size))


class KafkaProducer(Producer):
    """One idempotent producer for the process. The loop itself asks it for reports: a thread of its own would have to
    be given the GIL for each of them, and a busy loop gives it away once in 5 ms.

    What is published to a topic while messages there are unconfirmed is held until they are, and then goes out
    together. An idempotent client has one request of five or more messages under way for each partition anyway, and
    where more lies ready its thread spins until the answer is here: that took more CPU than all else in this process.
    """

    def __init__(self, config: Mapping[str, Any], topology: Topology, broker: Broker) -> None:
        self._topology, self._broker = topology, broker
        # Much, as what goes out together is gathered here; flush() sends it before.
        self._config = client.for_producer({"linger.ms": 5, **config})
        self._loop = asyncio.get_running_loop()
        self.raw = RawProducer(self._config)
        self.pending: dict[_Pending, _Pending] = {}  # in order
        self.heard = 0  # reports so far
        self._lanes: dict[str, _Lane] = {}
        self._holding: list[_Lane] = []  # those that hold something
        self._room = asyncio.Event()
        self._closing = self._renewing = False
        self._misses = 0  # polls in a row that brought nothing
        self._polled = 0.0  # when the last one ended
        self._polling = False  # soon; otherwise with the timer
        self._timer = self._loop.call_later(_SLOW, self._poll)

    def send(self, message: Outgoing, done: Done) -> None:
        client.require_safe(message)
        self.send_to(message.channel.address, message, done)

    def reply(self, address: str, message: Outgoing, done: Done) -> None:
        client.require_safe(message)
        topic, _, inbox = address.partition("/")
        replies = client.reply_topic(self._topology, self._broker)
        ours = {client.registry_topic(self._broker), *(c.address for c in self._topology.channels.values())}
        # Whoever asks names the address, and may be less trusted than we are.
        if topic in ours or (topic != replies and topic.startswith(replies.removesuffix("replies"))):
            raise PublishRejected(f"{address!r} is no reply address", hint="reply-to must be the asker's own topic")
        message.key = inbox
        self.send_to(topic, message, done)

    @property
    def ready(self) -> bool:
        return len(self.pending) < _CROWD

    async def wait_ready(self) -> None:
        while not self.ready:
            self._room.clear()
            await self._room.wait()

    def send_to(self, topic: str, message: Outgoing, done: Done) -> None:
        """As send(), to a topic of ours that is no channel."""
        if self._closing:
            done(BrokerUnavailable("the connection is closed"))
            return
        lane = self._lanes.get(topic)
        if lane is None:
            lane = self._lanes[topic] = _Lane(topic)
        pending = _Pending(self, lane, message, done)
        self.pending[pending] = pending
        if not lane.held:
            lane.since = self._loop.time()
            self._holding.append(lane)
        lane.held.append(pending)
        self._misses = 0
        if not self._polling:
            self._polling = True
            self._timer.cancel()
            self._loop.call_soon(self._poll)

    def _release(self, now: float) -> bool:
        """Gives the client what need not be held any longer."""
        free = [lane for lane in self._holding if not lane.sent or now - lane.since > _HOLD]
        for lane in free:
            self._holding.remove(lane)
            held, lane.held = lane.held, []
            for pending in held:
                self._produce(pending)
        return bool(free)

    def _produce(self, pending: _Pending) -> None:
        pending.raw = self.raw
        pending.lane.sent += 1
        message = pending.message
        try:
            self.raw.produce(
                pending.lane.topic,
                message.body,
                message.key or None,
                on_delivery=pending,
                headers=client.headers_of(message),
            )
        except KafkaException as error:
            self._loop.call_soon(pending, client.error_of(error), None)
        except BufferError:
            self._loop.call_soon(pending, KafkaError(KafkaError._QUEUE_FULL), None)

    def _poll(self) -> None:
        """Takes reports, and again at once while some come. The loop's timers are of 1 ms, and a broker at hand answers
        sooner: so while the loop has nothing else to do the first polls wait themselves, by flush(), which also sends
        what lingers."""
        if self._closing:
            return
        now, before = self._loop.time(), self.heard
        try:
            self.raw.poll(0)
            released = bool(self._holding) and self._release(now)
            if not released and self.heard == before and self._polling and now - self._polled < _IDLE:
                self.raw.flush(_WAIT)
        finally:
            found = self.heard > before
            self._misses = 0 if found else self._misses + 1
            self._polling = bool(self.pending) and self._misses < _SOON
            if self._polling:
                self._loop.call_soon(self._poll)
            else:
                pause = min(0.001 * (self._misses - _SOON + 1), 0.02) if self.pending else _SLOW
                self._timer = self._loop.call_later(pause, self._poll)
        if found and self.ready:
            self._room.set()
        self._polled = self._loop.time()

    def renew(self) -> None:
        """An idempotent producer that has lost its sequence never recovers: a new one sends what is unconfirmed. Not
        at once, as this is called from within the old one."""
        if not self._renewing and not self._closing:
            self._renewing = True
            self._loop.call_soon(self._renew)

    def _renew(self) -> None:
        client.log.warning("the producer is renewed; %d unconfirmed messages are sent again", len(self.pending))
        self._renewing = False
        old, self.raw = self.raw, RawProducer(self._config)
        old.purge(blocking=False)
        self._holding.clear()
        for lane in self._lanes.values():
            lane.sent = 0
            lane.held.clear()
        for pending in list(self.pending):
            self._produce(pending)

    async def close(self) -> None:
        """Gives what is queued a few seconds; what is left is reported as unavailable."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING):
                while self.pending:
                    self._room.clear()
                    await self._room.wait()
        self._closing = True
        self._timer.cancel()
        self._holding.clear()
        self.raw.purge(blocking=False)
        for pending in list(self.pending):
            hint = "is the broker running and reachable?"
            pending.done(BrokerUnavailable(f"closed before {pending.lane.topic} confirmed", hint=hint))
        self.pending.clear()
