"""Confirmed publishing: frames, their acknowledgements, and what is sent again when one does not come.

Every publish has one id for good. An outcome that is unknown (timeout, reconnect) is met by sending the same frame
again: the stream's dedup window makes that one event.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from orchestrator.brokers.base import Done, Outgoing
from orchestrator.brokers.nats.client import Link, iso, status_of
from orchestrator.brokers.nats.resources import safe
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected, RefusedError, ResourceMissing
from orchestrator.topology.model import Channel

if TYPE_CHECKING:
    from orchestrator.brokers.nats.connection import NatsConnection

RESEND_AFTER = 4.0  # seconds without an acknowledgement until the same frame is sent again
_MAX_MESSAGES, _MAX_BYTES = 4096, 16 << 20  # unconfirmed, until `ready` is False
_MAX_CACHED = 4096  # subjects; event types come from users, so the cache is bounded

_SUBJECT = re.compile(r"[^\s.*>\x00-\x1f\x7f]+(\.[^\s.*>\x00-\x1f\x7f]+)*")
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f%]")
_LINE_BREAK = re.compile(r"[\r\n\x00]")
_UNSAFE_TOKEN = re.compile(r"[\s.*>\x00-\x1f\x7f]")


def _stream(home: Channel | str) -> str:
    return home if isinstance(home, str) else safe(home.address)


class _Publish:
    """One frame on its way. `done` is called once."""

    __slots__ = ("done", "frame", "home", "publisher", "sent", "token")

    def __init__(self, publisher: Publisher, token: bytes, frame: bytes, home: Channel | str, done: Done) -> None:
        self.publisher = publisher
        self.token = token
        self.frame = frame
        self.home = home
        self.done = done
        self.sent = 0.0

    def on_reply(self, header: bytes | None, body: bytes) -> None:
        if body.startswith(b'{"stream"'):
            self.publisher.finish(self, None)
        else:
            self.publisher.refused(self, header, body)


class Publisher:
    """Everything that is unconfirmed on one link: events, dead letters and the histories of retries."""

    def __init__(self, link: Link, recreate: Callable[[str, Channel | None], Awaitable[None]]) -> None:
        self._link = link
        self._recreate = recreate  # makes a stream of ours that is gone again
        self._open: dict[bytes, _Publish] = {}
        self._bytes = 0
        self._healing: dict[str, asyncio.Task[None]] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._inbox = link.inbox.encode()
        self._closed = False
        self._emptied: asyncio.Event | None = None
        self._clock = asyncio.get_running_loop().time
        self._ticker = asyncio.create_task(self._watch(), name="nats-publish-watch")
        link.listeners.append(self._link_changed)
        link.denied.append(self._denied)

    @property
    def ready(self) -> bool:
        return len(self._open) < _MAX_MESSAGES and self._bytes < _MAX_BYTES

    async def wait_ready(self) -> None:
        while not self.ready and not self._closed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def publish(self, subject: bytes, header: bytes, body: bytes, home: Channel | str, done: Done) -> None:
        """Sends until the broker has answered; `home` is the channel, or the name of an internal stream.

        Raises PublishRejected when the server would not take the size."""
        size = len(header) + len(body)
        link = self._link
        if size > link.max_payload:
            raise PublishRejected(
                f"the event takes {size} bytes, NATS at {link.url} accepts {link.max_payload}",
                hint="store the data elsewhere and publish a reference, or raise max_payload on the server",
                limit=link.max_payload - len(header),
            )
        token = link.token()
        if header:
            frame = b"HPUB %b %b%b %d %d\r\n%b%b\r\n" % (subject, self._inbox, token, len(header), size, header, body)
        else:
            frame = b"PUB %b %b%b %d\r\n%b\r\n" % (subject, self._inbox, token, size, body)
        entry = _Publish(self, token, frame, home, done)
        self._open[token] = entry
        self._bytes += len(frame)
        link.waiting[token] = entry.on_reply
        if link.connected:
            entry.sent = self._clock()
            link.client.send(frame)

    def finish(self, entry: _Publish, error: BaseException | None) -> None:
        if self._open.pop(entry.token, None) is None:
            return
        self._bytes -= len(entry.frame)
        del self._link.waiting[entry.token]
        if not self._open and self._emptied is not None:
            self._emptied.set()
        if self._waiters and self.ready:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        entry.done(error)

    def refused(self, entry: _Publish, header: bytes | None, body: bytes) -> None:
        """Anything but a plain acknowledgement: a missing stream is made again, the rest is reported."""
        status, words = status_of(header)
        if status == 503:
            name = _stream(entry.home)
            entry.sent = 0.0  # sent again once the stream is known to be there
            if name not in self._healing:
                self._healing[name] = asyncio.create_task(self._heal(name, entry.home))
            return
        code, text = 0, words or body[:200].decode("utf-8", "replace")
        try:
            answer = json.loads(body)
            if "error" not in answer:
                self.finish(entry, None)
                return
            code = int(answer["error"].get("err_code", 0))
            text = str(answer["error"].get("description", text))
        except ValueError:
            pass  # no JSON: the words we have say it
        if code in _PASSING:
            entry.sent = self._clock()  # sent again by the watch
            return
        self.finish(entry, PublishRejected(f"NATS refused the event: {text} ({code})", hint=_HINTS.get(code)))

    async def _heal(self, name: str, home: Channel | str) -> None:
        """Nobody listened on a subject: JetStream is starting, or the stream is gone."""
        try:
            await self._recreate(name, None if isinstance(home, str) else home)
        except (ResourceMissing, PublishRejected, RefusedError) as error:
            self._end_all(lambda entry: _stream(entry.home) == name, PublishRejected(error.message, hint=error.hint))
            return
        except BrokerError:
            await asyncio.sleep(0.5)  # not answering yet: the entries are sent again and ask again
        finally:
            self._healing.pop(name, None)
        self._resend(lambda entry: entry.sent == 0.0)

    def _denied(self, subject: str) -> None:
        """The server names the subject in lower case and acknowledges nothing."""
        self._end_all(
            lambda entry: entry.frame.split(b" ", 2)[1].decode().lower() == subject,
            PublishRejected(f"NATS does not permit publishing to {subject}", hint="grant it to the user in `auth`"),
        )

    def _end_all(self, which: Callable[[_Publish], bool], error: BaseException) -> None:
        for entry in [e for e in self._open.values() if which(e)]:
            self.finish(entry, error)

    def _resend(self, which: Callable[[_Publish], bool]) -> None:
        if not self._link.connected:
            return
        now = self._clock()
        for entry in self._open.values():
            if which(entry):
                entry.sent = now
                self._link.client.send(entry.frame)

    def _link_changed(self, up: bool) -> None:
        if up:
            self._resend(lambda entry: True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._resend(lambda entry: 0.0 < entry.sent < self._clock() - RESEND_AFTER)

    async def flush(self, patience: float) -> None:
        """Waits until everything is confirmed, at most `patience` seconds."""
        if not self._open or not self._link.connected:
            return
        self._emptied = asyncio.Event()
        try:
            await asyncio.wait_for(self._emptied.wait(), patience)
        except TimeoutError:
            pass  # the caller bounds its wait; close() reports what is left to those who sent it
        finally:
            self._emptied = None

    async def close(self) -> None:
        await self.flush(3.0)
        self._closed = True
        for task in (self._ticker, *self._healing.values()):
            task.cancel()
        await asyncio.gather(self._ticker, *self._healing.values(), return_exceptions=True)
        self._end_all(
            lambda entry: True, BrokerUnavailable("the connection was closed before NATS confirmed the event")
        )
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


#: err_codes that pass: the stream has no leader or cannot store just now.
_PASSING = frozenset({10008, 10009})
_HINTS = {
    10077: "the channel is full: handle its events, or raise `retention`, or set `overflow: drop_oldest`",
    10054: "raise max_payload of the stream or publish a reference",
}


class NatsProducer:
    """base.Producer on a Publisher."""

    def __init__(self, connection: NatsConnection) -> None:
        self._publisher = connection.publisher
        self._link = connection.link
        self._connection = connection
        self._subjects: dict[tuple[str, str], bytes] = {}
        self._replies: dict[str, bytes] = {}

    @property
    def ready(self) -> bool:
        return self._publisher.ready

    async def wait_ready(self) -> None:
        await self._publisher.wait_ready()

    def send(self, message: Outgoing, done: Done) -> None:
        if message.delay > 0:
            subject, extra = self._later(message)
            home: Channel | str = self._connection.resources.names.later
        else:
            subject, extra, home = self._subject(message), b"", message.channel
        header = head(message.message_id, message.correlation_id, message.headers, extra)
        self._publisher.publish(subject, header, message.body, home, done)

    def reply(self, address: str, message: Outgoing, done: Done) -> None:
        if not _SUBJECT.fullmatch(address) or self._connection.takes(address):
            raise PublishRejected(f"{address!r} is no reply address", hint="reply-to must be a NATS inbox subject")
        header = head("", message.correlation_id, message.headers, b"")
        body = message.body
        if not self._link.connected:
            done(self._link.unavailable())
            return
        self._link.client.send(
            b"HPUB %b %d %d\r\n%b%b\r\n" % (address.encode(), len(header), len(header) + len(body), header, body)
        )
        done(None)

    def _subject(self, message: Outgoing) -> bytes:
        channel = message.channel
        if channel.dead_letters and "dlq-agent" in message.headers:
            agent = _UNSAFE_TOKEN.sub("_", message.headers["dlq-agent"]) or "_"
            kind = message.event_type if _SUBJECT.fullmatch(message.event_type) else "_"
            return f"{self._connection.letters(channel)}.{agent}.{kind}".encode()
        key = (channel.name, message.event_type)
        subject = self._subjects.get(key)
        if subject is None:
            if not _SUBJECT.fullmatch(message.event_type) or message.event_type.startswith("$"):
                raise PublishRejected(
                    f"the event type {message.event_type!r} is no NATS subject",
                    hint="use words joined by dots, without spaces, * and >",
                )
            subject = f"{self._connection.broker.prefix}{message.event_type}".encode()
            if len(self._subjects) >= _MAX_CACHED:
                self._subjects.clear()
            self._subjects[key] = subject
        return subject

    def _later(self, message: Outgoing) -> tuple[bytes, bytes]:
        """Subject and headers of a delayed event: the server lets it go at its time, relay.py moves it on."""
        if not self._connection.schedules:
            raise PublishRejected(
                "this NATS server cannot hold an event until its time", hint="delay= needs nats-server 2.12 or newer"
            )
        target = self._subject(message).decode()
        unique = hashlib.sha256(message.message_id.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        root = self._connection.resources.names.later_root
        due = iso(round(time.time() + message.delay, 3))
        extra = (
            f"Nats-Schedule: @at {due}\r\nNats-Schedule-Target: {root}due\r\n"
            f"Nats-Orchestrator-Subject: {target}\r\nNats-Orchestrator-Id: {_escape(message.message_id)}\r\n"
            f"Nats-Orchestrator-Channel: {message.channel.name}\r\n"
        )
        return f"{root}at.{unique}".encode(), extra.encode("utf-8", "surrogateescape")


def head(message_id: str, correlation_id: str, headers: dict[str, str], extra: bytes) -> bytes:
    """The header block. Ids are escaped where they could break a line; other headers must be safe as they are."""
    if _CONTROL.search(message_id) or _CONTROL.search(correlation_id):
        message_id, correlation_id = _escape(message_id), _escape(correlation_id)
    text = f"NATS/1.0\r\nNats-Msg-Id: {message_id}\r\n" if message_id else "NATS/1.0\r\n"
    text += f"correlation-id: {correlation_id}\r\n"
    for name, value in headers.items():
        if name != "traceparent":  # ours, in each event
            lower = name.lower()
            if lower == "correlation-id":
                continue
            if not _HEADER_NAME.fullmatch(name) or lower.startswith("nats-"):
                raise PublishRejected(
                    f"{name!r} cannot be a header of an event", hint="Nats-* names are the server's own"
                )
        if _LINE_BREAK.search(value):
            raise PublishRejected(f"the header {name} holds a line break", hint="headers are one line of text")
        text += f"{name}: {value}\r\n"
    return text.encode("utf-8", "surrogateescape") + extra + b"\r\n"


def _escape(text: str) -> str:
    return _CONTROL.sub(lambda found: f"%{ord(found[0]):02X}", text)
