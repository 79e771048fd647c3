"""What travels with an event through this package: the delivery, and the record of its history. Pure."""

from __future__ import annotations

import json

from orchestrator.brokers.base import FRESH, Delivery, History
from orchestrator.brokers.nats.client import headers_of
from orchestrator.brokers.nats.pull import Lane


class NatsDelivery(Delivery):
    """Carries what settling needs. Equal sequences in the same lane are the same event."""

    __slots__ = ("count", "key", "lane", "order", "reply", "stamp", "stored")

    def __init__(  # one call a delivery: it does not go through the base's keyword arguments
        self, lane: Lane, channel: str, prefix: int, subject: bytes, reply: bytes, header: bytes | None, body: bytes
    ) -> None:
        parts = reply.split(b".")
        shift = 2 if len(parts) > 9 else 0
        self.lane = lane
        self.reply = reply
        self.count = int(parts[4 + shift])
        self.key = parts[5 + shift]
        self.order = parts[6 + shift]
        self.stamp = parts[7 + shift]
        self.stored = False  # a history lies in the state stream
        self.body = body
        self.headers = public_headers(header) if header else {}
        self.event_type = subject[prefix:].decode("utf-8", "surrogateescape")
        self.channel = channel
        self.position = f"{lane.stream}:{self.key.decode()}"
        self.token = reply
        self.time = int(self.stamp) / 1e9
        self.redelivered = False
        self.history = FRESH


def public_headers(block: bytes) -> dict[str, str]:
    """Without the server's own: Nats-* are mechanics of the wire, not of the event."""
    found = headers_of(block)
    for name in [n for n in found if n[:5].lower() == "nats-"]:
        del found[name]
    return found


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
            return cls(History.decode(data), int(raw["~n"]), str(raw["~t"]).encode(), str(raw["~r"]).encode())
        except (ValueError, KeyError, TypeError):
            return None  # not ours: whoever wrote it, the event is then as good as fresh
