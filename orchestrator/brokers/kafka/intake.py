"""What becomes of a record that was read: handed out, parked until it is due, or passed over. The thread's own."""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import Message, TopicPartition

from orchestrator import clock
from orchestrator.brokers.base import FRESH, Delivery, History
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka.client import EVENT_ID, NOTHING
from orchestrator.brokers.kafka.ledger import Ledger
from orchestrator.topology.model import matches

#: Waiting retries whose bodies stay in memory, in bytes; of the others only place and time are known.
BODIES = 64 << 20
#: So many recent event ids are remembered for each partition, and at most twice as many.
_INBOX = 20_000
#: Event types whose verdict is remembered.
_TYPES = 4096

_TOKEN = 400

Place = tuple[str, int, int]


class Book(Ledger["KafkaDelivery"]):
    """The ledger of a partition, with what was read of it and not handed out yet."""

    def __init__(self, topic: str, number: int, committed: int, metadata: str, *, owner: str) -> None:
        super().__init__(topic, number, committed, metadata, owner=owner)
        self.ready: deque[tuple[Message, str | None]] = deque()  # with the event type
        self.place = f"{topic}:{number}:"
        self.token = b'["%b",%d,' % (topic.encode(), number)
        self.recent: dict[bytes, int] = {}  # event id -> when it was stored, in milliseconds
        self.older: dict[bytes, int] = {}


class KafkaDelivery(Delivery):
    """Its headers are read by few handlers, so they are decoded when somebody asks."""

    __slots__ = ("_headers", "book", "handed", "message", "offset", "stored")

    def __init__(self, book: Book, message: Message, offset: int, kind: str | None, channel: str) -> None:
        self.book = book
        self.message = message
        self.offset = offset
        self.handed = False  # to the worker; until then it lies ready in the loop
        self.body = message.value() or b""
        self._headers: dict[str, str] | None = None
        self.event_type = kind
        self.channel = channel
        self.position = f"{book.place}{offset}"
        self.token = b'%b%d,"{}"]' % (book.token, offset)
        self.stored: float | None = None  # when it first was, if it has waited for a retry since
        self.redelivered = book.redelivered(offset)
        self.history = FRESH

    @property
    def headers(self) -> Mapping[str, str]:  # type: ignore[override]
        if self._headers is None:
            found, ours = client.pairs(self.message), client.MECHANICS
            self._headers = {k: v.decode("utf-8", "surrogateescape") if v else "" for k, v in found if k not in ours}
        return self._headers

    @property
    def time(self) -> float:  # type: ignore[override]  # seldom asked for
        return self.message.timestamp()[1] / 1000 if self.stored is None else self.stored

    @property
    def place(self) -> Place:
        return self.book.topic, self.book.number, self.offset

    @property
    def is_open(self) -> bool:
        """Whether it is still ours to finish."""
        return self.book.open.get(self.offset) is self

    def inherit(self, history: History) -> None:
        self.history = history
        self.token = _token(self.book, self.offset, history)


@dataclass(frozen=True, slots=True)
class Filter:
    """What of a channel is for this subscription."""

    retry: str  # the topic whose records wait
    channel: str
    events: tuple[str, ...]
    others: tuple[str, ...]  # every pattern of the channel
    dedup_window: float


class Intake:
    def __init__(self, wanted: Filter, is_current: Callable[[Book], bool]) -> None:
        self.count = self.bytes = 0  # of the records that are ready
        self._wanted, self._is_current = wanted, is_current
        self._types: dict[Any, tuple[str | None, bool]] = {}
        self._waiting: list[tuple[float, int, Book, int, Message | None]] = []
        self._fetching: dict[Book, tuple[set[int], set[int]]] = {}  # sought now, and next
        self._bodies = self._sequence = 0

    # --- in ---------------------------------------------------------------------------------------------------

    def take(self, book: Book, message: Message) -> None:
        offset: int = message.offset()  # type: ignore[assignment]
        fresh = book.see(offset)
        if book.topic == self._wanted.retry:
            if fresh:
                self._park(book, offset, message)
            else:
                self._fetched(book, offset, message)
        elif fresh:
            self._sort(book, message)

    def _put(self, book: Book, message: Message, kind: str | None = None) -> None:
        book.ready.append((message, kind))
        self.count += 1
        self.bytes += len(message)

    def give_back(self, delivery: KafkaDelivery) -> None:
        """First in line again, as if it had not been handed out."""
        delivery.book.open[delivery.offset] = None
        delivery.book.ready.appendleft((delivery.message, delivery.event_type))
        self.count += 1
        self.bytes += len(delivery.message)

    def clear(self, books: Iterable[Book]) -> None:
        for book in books:
            self.count -= len(book.ready)
            self.bytes -= sum(len(message) for message, _ in book.ready)
            book.ready.clear()

    def _sort(self, book: Book, message: Message) -> None:
        """Passes over another subscription's type, and an event_id that this partition has had within its window."""
        identity = kind = None
        for name, value in client.pairs(message):
            if name == "event-type":
                kind = value
            elif name == EVENT_ID:
                identity = value
            elif name == NOTHING:
                return
        event_type, wanted = self._types.get(kind) or self._learn(kind)
        if not wanted:
            return
        window = self._wanted.dedup_window
        if identity is not None and window > 0:
            stored: int = message.timestamp()[1]
            before = book.recent.get(identity) or book.older.get(identity)
            if before is not None and stored - before <= window * 1000:
                return
            book.recent[identity] = stored
            if len(book.recent) >= _INBOX:
                book.older, book.recent = book.recent, {}
        self._put(book, message, event_type)

    def _learn(self, kind: Any) -> tuple[str | None, bool]:
        """What a type is called, and whether it is for us: only what is said to be another's is not."""
        name = client.text(kind) if kind is not None else None
        wanted = name is None or not _any(self._wanted.others, name) or _any(self._wanted.events, name)
        if len(self._types) >= _TYPES:
            self._types.clear()
        self._types[kind] = name, wanted
        return name, wanted

    # --- retries ----------------------------------------------------------------------------------------------

    def _park(self, book: Book, offset: int, message: Message) -> None:
        """Keeps a retry until it is due. Beyond the budget its body is dropped, and fetched again by a seek."""
        headers = client.readable(message)
        if NOTHING in headers:
            return
        book.park(offset)
        due = float(headers.get(client.DUE) or 0)
        if due <= clock.now():
            self._put(book, message)
            return
        self._sequence += 1
        keep = self._bodies + len(message) <= BODIES
        self._bodies += len(message) if keep else 0
        heapq.heappush(self._waiting, (due, self._sequence, book, offset, message if keep else None))

    def ripen(self, consumer: RawConsumer) -> None:
        """Makes ready what is due now."""
        now = clock.now()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, book, offset, message = heapq.heappop(self._waiting)
            if message is not None:
                self._bodies -= len(message)
            if not self._is_current(book):
                continue
            if message is not None:
                self._put(book, message)
            else:
                self._fetching.setdefault(book, (set(), set()))[1].add(offset)
        for book, (sought, after) in self._fetching.items():
            if after and not sought:  # one seek at a time: the next would jump over what this one is to bring
                consumer.seek(TopicPartition(book.topic, book.number, min(after)))
                self._fetching[book] = (after, set())

    def _fetched(self, book: Book, offset: int, message: Message) -> None:
        """A record that was seen before; one of those that a seek was made for, or one between them."""
        sought, after = self._fetching.get(book, (set(), set()))
        if offset in sought or offset in after:
            sought.discard(offset)
            after.discard(offset)
            self._put(book, message)

    def next_due(self) -> float:
        """Seconds until something is due, at most one."""
        return min(1.0, max(0.0, self._waiting[0][0] - clock.now())) if self._waiting else 1.0

    def forget(self, books: Sequence[Book]) -> None:
        """Those partitions are another's, or begin anew."""
        self.clear(books)
        for book in books:
            self._fetching.pop(book, None)

    # --- out --------------------------------------------------------------------------------------------------

    def hand_out(self, book: Book, room: int, batch: list[KafkaDelivery]) -> None:
        """Adds up to `room` deliveries to `batch`; made as late as possible, so that they have the newest history."""
        ready, channel, retry = book.ready, self._wanted.channel, book.topic == self._wanted.retry
        for _ in range(min(room, len(ready))):
            message, kind = ready.popleft()
            self.count -= 1
            self.bytes -= len(message)
            offset: int = message.offset()  # type: ignore[assignment]
            if offset < book.edge and book.open.get(offset, self) is not None:
                continue  # finished, or handed out, since it was put here
            delivery = KafkaDelivery(book, message, offset, kind, channel)
            if retry:
                _resume(delivery)
            if book.histories and (history := book.histories.get(offset)) is not None:
                delivery.inherit(history)
            book.hand(offset, delivery)
            batch.append(delivery)
        if not ready:
            book.catch_up()


def _resume(delivery: KafkaDelivery) -> None:
    """What a retry's own record says of the event."""
    headers = client.readable(delivery.message)
    delivery.event_type = headers.get("event-type")
    delivery.position = headers.get(client.ORIGIN, delivery.position)
    if stored := headers.get(client.STORED):
        delivery.stored = float(stored)
    if (history := history_of(headers.get(client.HISTORY, ""))) is not None:
        delivery.inherit(history)


def _token(book: Book, offset: int, history: History) -> bytes:
    """Place and history: a crash can be added to it without reading the record. As much of the error as fits."""
    room = len(history.error)
    while True:
        short = replace(history, error=history.error[:room]).encode().decode()
        token = json.dumps([book.topic, book.number, offset, short]).encode()
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
