"""Confirmed publishing (base.Producer): frames, their acknowledgements, and what is sent again when one does not come.

Every publish has one id for good. An outcome that is unknown (timeout, reconnect) is met by sending the same frame
again: the stream's dedup window makes that one event.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.brokers.base import Done, Outgoing
from orchestrator.brokers.nats.resources import (
    LATER_CHANNEL,
    LATER_ID,
    LATER_SUBJECT,
    SUBJECT,
    escape,
    head,
    letters_root,
    safe,
    status_of,
    subject_of,
)
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected, RefusedError, ResourceMissing
from orchestrator.topology.model import Channel

if TYPE_CHECKING:
    from orchestrator.brokers.nats.connection import NatsConnection

_TICK = 1.0  # seconds
_RESEND_AFTER = 4  # ticks without an acknowledgement until the same frame is sent again
_UNSENT = 0  # instead of the tick in which it was sent
_MAX_MESSAGES, _MAX_BYTES = 4096, 16 << 20  # unconfirmed, until `ready` is False

#: err_codes that pass: the stream has no leader or cannot store just now.
_PASSING = frozenset({10008, 10009})
_HINTS = {
    10077: "the channel is full: handle its events, or raise `retention`, or set `overflow: drop_oldest`",
    10054: "raise max_payload of the stream or publish a reference",
}

#: A frame on its way: its bytes, where it goes (an internal stream by its name), whom to tell, when it was sent.
_Publish = tuple[bytes, Channel | str, Done, int]


def _stream(home: Channel | str) -> str:
    return home if isinstance(home, str) else safe(home.address)


class NatsProducer:
    """Everything that is unconfirmed on one link: events, dead letters and the histories of retries."""

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self._link = connection.link
        self._client = connection.link.client
        self._open: dict[bytes, _Publish] = {}  # by reply token
        self._count = 0
        self._bytes = 0
        self._most = self._client.max_payload
        self._healing: dict[str, asyncio.Task[None]] = {}
        self._room = asyncio.Event()  # unset while somebody waits for it, close() for all of it
        self._room.set()
        self._closed = False
        self._prefix = connection.broker.prefix
        self._inbox = f"_INBOX.{secrets.token_hex(11)}.".encode()
        self._cut = len(self._inbox)
        self._client.listen(f"{self._inbox.decode()}*", self._on_ack)
        self._now = _UNSENT + 1  # ticks
        self._ticker = asyncio.create_task(self._watch(), name="nats-publish-watch")
        self._link.listeners.append(self._link_changed)
        self._link.denied = self._denied

    @property
    def ready(self) -> bool:
        return len(self._open) < _MAX_MESSAGES and self._bytes < _MAX_BYTES

    async def wait_ready(self) -> None:
        while not self.ready and not self._closed:
            self._room.clear()
            await self._room.wait()

    # --- events -----------------------------------------------------------------------------------------------

    def send(self, message: Outgoing, done: Done) -> None:
        home: Channel | str = message.channel
        extra = ""
        subject = self._subject(message)
        if message.delay > 0:
            home = self._connection.names.later
            subject, extra = self._later(message, subject.decode())
        header = head(message.message_id, message.correlation_id, message.headers, extra)
        self.publish(subject, header, message.body, home, done)

    def reply(self, address: str, message: Outgoing, done: Done) -> None:
        if not SUBJECT.fullmatch(address) or self._connection.takes(address):
            raise PublishRejected(f"{address!r} is no reply address", hint="reply-to must be a NATS inbox subject")
        if not self._link.connected:
            done(self._link.unavailable())
            return
        header, body = head("", message.correlation_id, message.headers), message.body
        self._client.send(
            b"HPUB %b %d %d\r\n%b%b\r\n" % (address.encode(), len(header), len(header) + len(body), header, body)
        )
        done(None)

    def _subject(self, message: Outgoing) -> bytes:
        if message.channel.dead_letters and "dlq-agent" in message.headers:
            agent = safe(message.headers["dlq-agent"]) or "_"
            kind = message.event_type if SUBJECT.fullmatch(message.event_type) else "_"
            return f"{letters_root(message.channel)}.{agent}.{kind}".encode()
        return subject_of(message.event_type, self._prefix)

    def _later(self, message: Outgoing, target: str) -> tuple[bytes, str]:
        """Subject and headers of a delayed event: the server lets it go at its time, consumer.py moves it on."""
        if not self._connection.schedules:
            raise PublishRejected(
                "this NATS server cannot hold an event until its time", hint="delay= needs nats-server 2.12 or newer"
            )
        unique = hashlib.sha256(message.message_id.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        root = self._connection.names.later_root
        due = datetime.fromtimestamp(round(time.time() + message.delay, 3), UTC).isoformat().replace("+00:00", "Z")
        extra = (
            f"Nats-Schedule: @at {due}\r\nNats-Schedule-Target: {root}due\r\n"
            f"{LATER_SUBJECT}: {target}\r\n{LATER_ID}: {escape(message.message_id)}\r\n"
            f"{LATER_CHANNEL}: {message.channel.name}\r\n"
        )
        return f"{root}at.{unique}".encode(), extra

    # --- frames -----------------------------------------------------------------------------------------------

    def publish(self, subject: bytes, header: bytes, body: bytes, home: Channel | str, done: Done) -> None:
        """Sends until the broker has answered; `home` is the channel, or the name of an internal stream.

        Raises PublishRejected when the server would not take the size."""
        size = len(header) + len(body)
        if size > self._most:
            raise PublishRejected(
                f"the event takes {size} bytes, NATS at {self._link.url} accepts {self._most}",
                hint="store the data elsewhere and publish a reference, or raise max_payload on the server",
                limit=self._most - len(header),
            )
        self._count += 1
        token = b"%x" % self._count
        if header:
            frame = b"HPUB %b %b%b %d %d\r\n%b%b\r\n" % (subject, self._inbox, token, len(header), size, header, body)
        else:
            frame = b"PUB %b %b%b %d\r\n%b\r\n" % (subject, self._inbox, token, size, body)
        self._bytes += len(frame)
        if self._client.is_connected:
            self._open[token] = (frame, home, done, self._now)
            self._client.send(frame)
        else:
            self._open[token] = (frame, home, done, _UNSENT)

    async def store(self, subject: str, header: bytes, body: bytes, home: str) -> None:
        """Publishes to an internal stream; returns when it is confirmed. Raises BrokerError."""
        outcome: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self.publish(subject.encode(), header, body, home, lambda e: None if outcome.done() else outcome.set_result(e))
        if (error := await outcome) is not None:
            raise error

    def _on_ack(self, subject: bytes, _reply: bytes, header: bytes | None, body: bytes) -> None:
        if body.startswith(b'{"stream"'):
            self._finish(subject[self._cut :], None)
        else:
            self._refused(subject[self._cut :], header, body)

    def _finish(self, token: bytes, error: BaseException | None) -> None:
        entry = self._open.pop(token, None)
        if entry is None:
            return  # the second answer to a frame that was sent again
        frame, _, done, _ = entry
        self._bytes -= len(frame)
        if not self._room.is_set() and (not self._open if self._closed else self.ready):
            self._room.set()
        done(error)

    def _refused(self, token: bytes, header: bytes | None, body: bytes) -> None:
        """Anything but a plain acknowledgement: a missing stream is made again, the rest is reported."""
        entry = self._open.get(token)
        if entry is None:
            return
        status, words = status_of(header)
        if status == 503:
            frame, home, done, _ = entry
            self._open[token] = (frame, home, done, _UNSENT)  # sent again once the stream is known to be there
            if (stream := _stream(home)) not in self._healing:
                self._healing[stream] = asyncio.create_task(self._heal(stream, home))
            return
        code, text = 0, words or body[:200].decode("utf-8", "replace")
        try:
            answer = json.loads(body)
            if "error" not in answer:
                self._finish(token, None)
                return
            code = int(answer["error"].get("err_code", 0))
            text = str(answer["error"].get("description", text))
        except ValueError:
            pass  # no JSON: the words we have say it
        if code not in _PASSING:  # those are sent again by the watch
            self._finish(token, PublishRejected(f"NATS refused the event: {text} ({code})", hint=_HINTS.get(code)))

    async def _heal(self, name: str, home: Channel | str) -> None:
        """Nobody listened on a subject: JetStream is starting, or the stream is gone."""
        try:
            await self._connection.recreate(name, None if isinstance(home, str) else home)
        except (ResourceMissing, PublishRejected, RefusedError) as error:
            self._end_all(PublishRejected(error.message, hint=error.hint), lambda _, home: _stream(home) == name)
            return
        except BrokerError:
            await asyncio.sleep(0.5)  # not answering yet: the entries are sent again and ask again
        finally:
            self._healing.pop(name, None)
        self._resend(lambda sent: sent == _UNSENT)

    def _denied(self, subject: str) -> None:
        """The server names the subject in lower case and acknowledges nothing."""
        self._end_all(
            PublishRejected(f"NATS does not permit publishing to {subject}", hint="grant it to the user in `auth`"),
            lambda frame, _: frame.split(b" ", 2)[1].decode().lower() == subject,
        )

    def _end_all(self, error: BaseException, which: Callable[[bytes, Channel | str], bool] = lambda *_: True) -> None:
        for token in [token for token, (frame, home, _, _) in self._open.items() if which(frame, home)]:
            self._finish(token, error)

    def _resend(self, which: Callable[[int], bool] = lambda sent: True) -> None:
        if self._link.connected:
            for token, (frame, home, done, sent) in self._open.items():
                if which(sent):
                    self._open[token] = (frame, home, done, self._now)
                    self._client.send(frame)

    def _link_changed(self, up: bool) -> None:
        if up:
            self._most = self._client.max_payload
            self._resend()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self._now += 1
            self._resend(lambda sent: _UNSENT < sent < self._now - _RESEND_AFTER)

    async def close(self) -> None:
        """Waits a few seconds until everything is confirmed; reports what is left to those who sent it."""
        self._closed = True
        if self._open and self._link.connected:
            self._room.clear()
            with contextlib.suppress(TimeoutError):  # what is left is reported below
                async with asyncio.timeout(3.0):
                    await self._room.wait()
        for task in (self._ticker, *self._healing.values()):
            task.cancel()
        await asyncio.gather(self._ticker, *self._healing.values(), return_exceptions=True)
        self._end_all(BrokerUnavailable("the connection was closed before NATS confirmed the event"))
        self._room.set()
