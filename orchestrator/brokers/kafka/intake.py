"""What becomes of a record that was read: handed out, parked until it is due, or passed over. The thread's own."""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import Message, TopicPartition

from orchestrator import clock
from orchestrator.brokers.base import FRESH, Delivery, History
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka.ledger import Ledger
from orchestrator.topology.model import matches

#: Waiting retries whose bodies stay in memory, in bytes; of the others only place and time are known.
BODIES = 64 << 20
#: Recent event ids remembered for each partition.
_INBOX = 20_000

_TOKEN = 400

Place = tuple[str, int, int]


class KafkaDelivery(Delivery):
    __slots__ = ("handed", "key", "ledger", "offset", "raw_headers")

    ledger: Ledger[KafkaDelivery]
    offset: int
    key: bytes | None
    raw_headers: list[Any]
    handed: bool  # to the worker; until then it lies ready in the loop

    @property
    def place(self) -> Place:
        return self.ledger.topic, self.ledger.number, self.offset


@dataclass(frozen=True, slots=True)
class Filter:
    """What of a channel is for this subscription."""

    retry: str  # the topic whose records wait
    channel: str
    events: tuple[str, ...]
    others: tuple[str, ...]  # every pattern of the channel
    dedup_window: float


class Intake:
    def __init__(self, wanted: Filter, is_current: Callable[[Ledger[KafkaDelivery]], bool]) -> None:
        self.ready: deque[tuple[Ledger[KafkaDelivery], Message]] = deque()
        self.bytes = 0  # of the bodies in `ready`
        self._wanted, self._is_current = wanted, is_current
        self._waiting: list[tuple[float, int, Ledger[KafkaDelivery], int, Message | None]] = []
        self._fetching: dict[tuple[str, int], tuple[set[int], set[int]]] = {}  # sought now, and next
        self._bodies = self._sequence = 0
        self._inboxes: dict[tuple[str, int], OrderedDict[bytes, tuple[int, int]]] = {}

    def take(self, ledger: Ledger[KafkaDelivery], message: Message) -> None:
        offset = message.offset() or 0
        fresh = ledger.see(offset)
        if ledger.topic == self._wanted.retry:
            if fresh:
                self._park(ledger, offset, message)
            else:
                self._fetched(ledger, offset, message)
        elif fresh:
            if self._is_unwanted(message, ledger):
                ledger.finish(offset)
            else:
                self._put(ledger, message)

    def _put(self, ledger: Ledger[KafkaDelivery], message: Message) -> None:
        self.ready.append((ledger, message))
        self.bytes += len(message.value() or b"")

    def put_back(self, ledger: Ledger[KafkaDelivery], message: Message) -> None:
        """First in line again."""
        self.ready.appendleft((ledger, message))
        self.bytes += len(message.value() or b"")

    def next(self) -> tuple[Ledger[KafkaDelivery], Message]:
        ledger, message = self.ready.popleft()
        self.bytes -= len(message.value() or b"")
        return ledger, message

    def clear(self) -> None:
        self.ready.clear()
        self.bytes = 0

    def _is_unwanted(self, message: Message, ledger: Ledger[KafkaDelivery]) -> bool:
        """Another subscription's type, or an event_id that this partition has had within the dedup window."""
        headers = dict(message.headers() or ())
        kind = headers.get("event-type")
        if isinstance(kind, bytes):
            name = kind.decode("utf-8", "surrogateescape")
            if _any(self._wanted.others, name) and not _any(self._wanted.events, name):
                return True
        identity, window = headers.get(client.EVENT_ID), self._wanted.dedup_window
        if not isinstance(identity, bytes) or window <= 0:
            return False
        inbox = self._inboxes.setdefault((ledger.topic, ledger.number), OrderedDict())
        offset, stored = message.offset() or 0, message.timestamp()[1]
        before = inbox.get(identity)
        if before is not None and before[0] < offset and stored - before[1] <= window * 1000:
            return True
        inbox[identity] = (offset, stored)
        if len(inbox) > _INBOX:
            inbox.popitem(last=False)
        return False

    def _park(self, ledger: Ledger[KafkaDelivery], offset: int, message: Message) -> None:
        """Keeps a retry until it is due. Beyond the budget its body is dropped, and fetched again by a seek."""
        due = float(client.readable(message.headers()).get(client.DUE) or 0)
        if due <= clock.now():
            self._put(ledger, message)
            return
        self._sequence += 1
        size = len(message.value() or b"")
        keep = self._bodies + size <= BODIES
        self._bodies += size if keep else 0
        heapq.heappush(self._waiting, (due, self._sequence, ledger, offset, message if keep else None))

    def ripen(self, consumer: RawConsumer) -> None:
        """Makes ready what is due now."""
        now = clock.now()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, ledger, offset, message = heapq.heappop(self._waiting)
            if message is not None:
                self._bodies -= len(message.value() or b"")
            if not self._is_current(ledger):
                continue
            if message is not None:
                self._put(ledger, message)
            else:
                self._fetching.setdefault((ledger.topic, ledger.number), (set(), set()))[1].add(offset)
        for key, (sought, after) in self._fetching.items():
            if after and not sought:  # one seek at a time: the next would jump over what this one is to bring
                consumer.seek(TopicPartition(*key, min(after)))
                self._fetching[key] = (after, set())

    def _fetched(self, ledger: Ledger[KafkaDelivery], offset: int, message: Message) -> None:
        """A record that was seen before; one of those that a seek was made for, or one between them."""
        sought, after = self._fetching.get((ledger.topic, ledger.number), (set(), set()))
        if offset in sought or offset in after:
            sought.discard(offset)
            after.discard(offset)
            self._put(ledger, message)

    def next_due(self) -> float:
        """Seconds until something is due, at most one."""
        return min(1.0, max(0.0, self._waiting[0][0] - clock.now())) if self._waiting else 1.0

    def give_back(self, delivery: KafkaDelivery) -> None:
        """First in line again, as if it had not been handed out."""
        message = Message(
            topic=delivery.ledger.topic,
            partition=delivery.ledger.number,
            offset=delivery.offset,
            key=delivery.key,
            value=delivery.body,
            headers=delivery.raw_headers,
            timestamp=(0, int(delivery.time * 1000)),
        )
        self.put_back(delivery.ledger, message)

    def forget(self, ledgers: Sequence[Ledger[KafkaDelivery]]) -> None:
        """Those partitions are another's, or begin anew."""
        kept = [(ledger, message) for ledger, message in self.ready if ledger not in ledgers]
        self.clear()
        for ledger, message in kept:
            self._put(ledger, message)
        for ledger in ledgers:
            self._inboxes.pop((ledger.topic, ledger.number), None)
            self._fetching.pop((ledger.topic, ledger.number), None)

    def delivery(self, ledger: Ledger[KafkaDelivery], message: Message) -> KafkaDelivery:
        """Made as late as possible, so that it has the newest history."""
        raw, offset = list(message.headers() or ()), message.offset() or 0
        headers = client.readable(raw)
        history = ledger.histories.get(offset) or history_of(headers.get(client.HISTORY, "")) or FRESH
        place = f"{ledger.topic}:{ledger.number}:{offset}"
        delivery = KafkaDelivery(
            body=message.value() or b"",
            headers={k: v for k, v in headers.items() if k not in client.MECHANICS},
            event_type=headers.get("event-type"),
            channel=self._wanted.channel,
            position=headers.get(client.ORIGIN, place) if ledger.topic == self._wanted.retry else place,
            token=_token(ledger, offset, history),
            time=float(headers.get(client.STORED) or message.timestamp()[1] / 1000),
            redelivered=ledger.redelivered(offset),
            history=history,
        )
        delivery.ledger, delivery.offset, delivery.key, delivery.raw_headers = ledger, offset, message.key(), raw
        delivery.handed = False
        ledger.in_flight[offset] = delivery
        return delivery


def _token(ledger: Ledger[KafkaDelivery], offset: int, history: History) -> bytes:
    """Place and history: a crash can be added to it without reading the record. As much of the error as fits."""
    if history is FRESH:
        return b'["%b",%d,%d,"{}"]' % (ledger.topic.encode(), ledger.number, offset)
    room = len(history.error)
    while True:
        short = replace(history, error=history.error[:room]).encode().decode()
        token = json.dumps([ledger.topic, ledger.number, offset, short]).encode()
        if len(token) <= _TOKEN or not room:
            return token
        room = max(0, room - (len(token) - _TOKEN) // 6 - 1)  # a character takes up to six bytes


def history_of(text: str) -> History | None:
    try:
        return History.decode(text.encode("utf-8", "surrogateescape"))
    except ValueError:
        return None


def _any(patterns: Sequence[str], event_type: str) -> bool:
    return any(matches(pattern, event_type) for pattern in patterns)
