"""Delayed events on their last step: what the server's schedule has let go is published to its own channel.

A schedule can only deliver into its own stream, and a stream that rejects when full cannot hold one, so delayed events
wait in an internal stream. Each worker's connection helps to move what is due; the event keeps its message id, so a
move that is made twice takes effect once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from orchestrator.brokers.nats.client import headers_of
from orchestrator.brokers.nats.producer import head
from orchestrator.brokers.nats.pull import Lane
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.brokers.nats.connection import NatsConnection

SUBJECT, MESSAGE_ID, CHANNEL = "Nats-Orchestrator-Subject", "Nats-Orchestrator-Id", "Nats-Orchestrator-Channel"
_ROOM = 64  # due events on their way at a time
_AGAIN = 5  # seconds until an event that its channel refused is tried again


class Relay:
    """Runs from the first open consumer of a connection to its close."""

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self._link = connection.link
        self._moving = 0
        self._lane = Lane(self._link, connection.resources.names.later, "relay", self._take, self._late, self._lost)
        self._watching: asyncio.Task[None] | None = None
        self._healing: asyncio.Task[None] | None = None
        self._refusal = ""

    def open(self) -> None:
        if self._watching is None:
            self._lane.open()
            self._link.listeners.append(self._link_changed)
            self._watching = asyncio.create_task(self._watch(), name="nats-relay")
            self._lane.pull(_ROOM)

    async def close(self) -> None:
        tasks = [task for task in (self._watching, self._healing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lane.stop()

    def _take(self, _subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        self._moving += 1
        headers = headers_of(header)
        subject, message_id = headers.get(SUBJECT, ""), headers.get(MESSAGE_ID, "")
        name, correlation_id = headers.get(CHANNEL, ""), headers.get("correlation-id", "")
        kept = {k: v for k, v in headers.items() if not k.lower().startswith("nats-")}

        def done(error: BaseException | None) -> None:
            self._moving -= 1
            if error is None:
                self._link.client.send(b"PUB %b 4\r\n+ACK\r\n" % reply)
            else:
                self._refused(name, reply, error)
            self._lane.pull(_ROOM - self._moving)

        channel = self._connection.topology.channels.get(name)
        if channel is None or not subject:
            done(OrchestratorError("this topology has no such channel any more"))
            return
        try:
            block = head(message_id, correlation_id, kept, b"")
            self._connection.publisher.publish(subject.encode(), block, body, channel, done)
        except OrchestratorError as error:
            done(error)

    def _refused(self, channel: str, reply: bytes, error: BaseException) -> None:
        """Nothing is lost: the event waits, and people hear of it once for each reason."""
        nak = b'-NAK {"delay":%d}' % (_AGAIN * 1_000_000_000)
        self._link.client.send(b"PUB %b %d\r\n%b\r\n" % (reply, len(nak), nak))
        if str(error) != self._refusal:
            self._refusal = str(error)
            self._connection.alarm(f"delayed events for channel {channel!r} wait: {error}")

    def _late(self, _subject: bytes, reply: bytes, _header: bytes | None, _body: bytes) -> None:
        if reply.startswith(b"$JS.ACK."):
            self._link.client.send(b"PUB %b 4\r\n-NAK\r\n" % reply)

    def _lost(self, _lane: Lane, _reason: str, missing: bool) -> None:
        if not missing:
            self._lane.pull(_ROOM - self._moving)
        elif self._healing is None or self._healing.done():
            self._healing = asyncio.create_task(self._heal(), name="nats-relay-heal")

    def _link_changed(self, up: bool) -> None:
        if up:
            self._lane.restart()
            self._lane.pull(_ROOM - self._moving)

    async def _heal(self) -> None:
        """The internal stream or its consumer is gone, or JetStream is not ready: until it is there again."""
        while True:
            try:
                if await self._connection.heal_later():
                    self._connection.alarm("the stream of delayed events was deleted and has been created again")
                break
            except OrchestratorError:
                await asyncio.sleep(0.5)  # consumers report the same trouble meanwhile
        self._lane.restart()
        self._lane.pull(_ROOM - self._moving)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if not self._lane.check():
                self._lane.pull(_ROOM - self._moving)
