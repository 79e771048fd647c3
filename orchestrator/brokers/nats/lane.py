"""One durable consumer that is pulled by hand, what it delivers, and the history of that as it is stored.

nats-py's fetch() is not used: it goes silent over a server restart and returns nothing when the consumer was deleted.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable

from orchestrator.brokers.base import FRESH, Delivery, History
from orchestrator.brokers.nats.client import Json, Link
from orchestrator.brokers.nats.internals import Receive
from orchestrator.brokers.nats.resources import headers_of, public_headers, status_of

_EXPIRES = 30.0  # seconds a request stays with the server
_HEARTBEAT = 1.0  # seconds between the server's signs of life while there is nothing
_SILENCE = 2.6  # seconds without any sign until a request counts as lost


class Lane:
    """One durable consumer pulled by one inbox: keeps up to `room` messages requested. Tells `lost(lane, reason,
    missing)` when a request has ended without them. What comes after its request was withdrawn somebody else may have:
    it goes back.
    """

    def __init__(
        self,
        link: Link,
        stream: str,
        durable: str,
        receive: Receive,
        lost: Callable[[Lane, str, bool], None],
        mark: str = "",
    ) -> None:
        self.mark = mark  # tells its deliveries' histories from those of another lane
        self.stream = stream
        self.durable = durable
        self.requested = 0  # messages asked for and not arrived
        self.held: dict[bytes, NatsDelivery] = {}  # delivered and not settled, by stream sequence
        self.born = ""  # when the stream was created
        self._link = link
        self._receive = receive
        self._lost = lost
        self._subject = f"{link.api_root}CONSUMER.MSG.NEXT.{stream}.{durable}".encode()
        self._inbox = b""
        self._sid = b""
        self._heard = 0.0
        self._clock = asyncio.get_running_loop().time

    def __str__(self) -> str:
        return f"{self.stream}/{self.durable}"

    def open(self) -> None:
        self._inbox = b"_INBOX." + secrets.token_hex(11).encode()
        self._sid = self._link.client.listen(self._inbox.decode(), self._on_message)
        self.requested = 0

    def pull(self, room: int) -> None:
        """Asks for what is missing to `room`, once half of it is missing: one request serves many events."""
        missing = room - self.requested
        if missing > 0 and missing * 2 >= room:
            ask = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (missing, _EXPIRES * 1e9, _HEARTBEAT * 1e9)
            if not self.requested:
                self._heard = self._clock()
            self.requested += missing
            self._link.client.send(b"PUB %b %b %d\r\n%b\r\n" % (self._subject, self._inbox, len(ask), ask))

    def stop(self) -> None:
        """Withdraws every request."""
        if self._sid:
            self._link.client.unlisten(self._sid, self._on_late)
            self._sid = b""
        self.requested = 0

    def restart(self) -> None:
        """Withdraws every request and starts with a new inbox."""
        self.stop()
        self.open()

    async def info(self) -> Json:
        """Raises ResourceMissing or BrokerUnavailable."""
        return await self._link.api(f"CONSUMER.INFO.{self.stream}.{self.durable}")

    def of(self, stream: Json) -> None:
        """Told STREAM.INFO. A stream that was made again counts from 1 once more: what was delivered before can no
        longer be settled, and an acknowledgement of it would settle another event, which nobody has handled."""
        if self.born not in ("", stream["created"]):
            for delivery in self.held.values():
                delivery.reply = b""
            self.held.clear()
        self.born = stream["created"]

    def check(self) -> bool:
        """False when the server has been silent for too long; the requests are then withdrawn."""
        if not self.requested or not self._link.connected or self._clock() - self._heard < _SILENCE:
            return True
        self.restart()
        return False

    def _on_message(self, subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        self._heard = self._clock()
        if reply.startswith(b"$JS.ACK."):
            if self.requested:
                self.requested -= 1
            self._receive(subject, reply, header, body)
            return
        code, words = status_of(header)
        if code == 100:
            return
        left = headers_of(header).get("Nats-Pending-Messages", "")
        if left.isdigit():
            self.requested = max(0, self.requested - int(left))
        elif code:
            self.requested = 0
        deleted = code == 409 and "deleted" in words.lower()  # 408 expired, 404 nothing, other 409: ask again
        self._lost(self, words or "it does not answer", code == 503 or deleted)

    def _on_late(self, _subject: bytes, reply: bytes, _header: bytes | None, _body: bytes) -> None:
        if reply.startswith(b"$JS.ACK."):
            self.nak(reply)

    def nak(self, reply: bytes, delay: float = 0.0) -> None:
        """Gives a delivery back for `delay` seconds."""
        body = b'-NAK {"delay":%d}' % (delay * 1e9) if delay > 0 else b"-NAK"
        self._link.client.send(b"PUB %b %d\r\n%b\r\n" % (reply, len(body), body))


class NatsDelivery(Delivery):
    """Carries what settling needs. Equal sequences in the same lane are the same event."""

    __slots__ = ("count", "key", "lane", "order", "reply", "stamp", "stored")

    def __init__(  # one call a delivery: it does not go through the base's keyword arguments
        self, lane: Lane, channel: str, prefix: int, subject: bytes, reply: bytes, header: bytes | None, body: bytes
    ) -> None:
        parts = reply.split(b".")
        shift = 2 if len(parts) > 9 else 0
        self.lane = lane
        self.reply = reply  # empty: its stream is gone, there is nothing to settle
        self.count = int(parts[4 + shift])
        self.key = parts[5 + shift]
        self.order = parts[6 + shift]
        self.stamp = parts[7 + shift]
        self.stored = False  # a history lies in the state stream
        self.body = body
        self.headers = public_headers(header)
        self.event_type = subject[prefix:].decode("utf-8", "surrogateescape")
        self.channel = channel
        self.token = reply
        self.redelivered = False
        self.history = FRESH

    @property
    def position(self) -> str:  # type: ignore[override]  # made when it is asked for
        return f"{self.lane.stream}:{self.key.decode()}"

    @property
    def place(self) -> str:
        """Last token of the subject of its history: the sequence, and an r before it for a redriven event."""
        return self.lane.mark + self.key.decode()

    @property
    def time(self) -> float:  # type: ignore[override]
        return int(self.stamp) / 1e9


class Record:
    """A history as it is stored: with the delivery that it accounts for, and the stamp of the event it is about."""

    __slots__ = ("count", "history", "reply", "stamp")

    def __init__(self, history: History, count: int, stamp: bytes, reply: bytes) -> None:
        self.history = history
        self.count = count
        self.stamp = stamp
        self.reply = reply

    def encode(self) -> bytes:
        known = self.history.encode()[:-1]  # "{" or '{"attempts":1'
        comma = b"," if len(known) > 1 else b""
        return b'%b%b"~n":%d,"~t":"%b","~r":"%b"}' % (known, comma, self.count, self.stamp, self.reply)

    @classmethod
    def decode(cls, data: bytes) -> Record | None:
        try:
            raw = json.loads(data)
            reply = str(raw["~r"])
            if not reply.startswith("$JS.ACK.") or len(reply.split()) > 1:
                return None
            return cls(History.decode(data), int(raw["~n"]), str(raw["~t"]).encode(), reply.encode())
        except (ValueError, KeyError, TypeError):
            return None  # not ours: whoever wrote it, the event is then as good as fresh
