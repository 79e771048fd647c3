"""Retries and dead letters: the new records and the offset that finishes the old one, in one transaction.

Runs in the reader's thread, between its commits: plain and transactional commits of a partition never overlap.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka import Producer as RawProducer

from orchestrator import clock
from orchestrator.brokers.base import Done, History, Outgoing
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka.desk import Desk, Settings
from orchestrator.brokers.kafka.intake import Book, KafkaDelivery
from orchestrator.errors import BrokerUnavailable, PublishRejected, ResourceMissing

#: How many moves share a transaction.
_MOVES = 1000
#: Seconds in which a step of a transaction is repeated. A producer whose broker was killed may never find its
#: coordinator again; a new one does.
_INSIST = 3.0
#: Seconds after which a call with a timeout of five has forgotten it.
_FORGOTTEN = 8.0
#: Seconds between looks whether a record was refused.
_REPORT = 0.02
#: Seconds in which an administrator's question is answered.
_ANSWER = 5.0

Record = tuple[str, bytes, bytes | None, client.Headers]


@dataclass(slots=True, eq=False)
class Move:
    """Records to write and a delivery to finish."""

    delivery: KafkaDelivery
    records: list[Record]
    done: Done
    refused: KafkaError | None = None


class Mover:
    def __init__(self, settings: Settings, desk: Desk) -> None:
        self.queue: list[Move] = []
        self._set, self._desk = settings, desk
        self._retry = settings.wanted.retry
        self._after = 0.0
        self._producer: RawProducer | None = None
        self._admin: Any = None
        self._written = {self._retry, *settings.letters}  # topics that transactions of ours may have written to
        self._doubtful: list[Move] = []  # of a transaction that may have been committed

    @property
    def due(self) -> bool:
        return bool(self.queue or self._doubtful) and time.monotonic() >= self._after

    @property
    def in_doubt(self) -> bool:
        """Whether the group's offsets are to tell what has become of a transaction: nothing may be committed then."""
        return bool(self._doubtful)

    def ready(self) -> RawProducer:
        """Our transactional producer; making it ends what a predecessor of the same name left open."""
        if self._producer is None:
            producer = RawProducer(client.for_producer(self._set.transactions))
            producer.list_topics(self._retry, timeout=5)  # unconnected it looks for its coordinator twice a second
            self._insist(lambda: producer.init_transactions(5))
            self._producer = producer
        return self._producer

    @property
    def admin(self) -> Any:
        if self._admin is None:
            self._admin = client.new_admin(self._set.consumer)
        return self._admin

    def committed(self, partitions: Sequence[TopicPartition]) -> list[TopicPartition]:
        """What the group has committed, whatever is pending. Raises KafkaException."""
        asked = [ConsumerGroupTopicPartitions(self._set.group, list(partitions))]
        answer = self.admin.list_consumer_group_offsets(asked, request_timeout=_ANSWER)[self._set.group]
        found = list(answer.result(2 * _ANSWER).topic_partitions)
        for tp in found:
            if tp.error is not None:
                raise KafkaException(tp.error)
        return found

    def move(self, consumer: RawConsumer, is_mine: Callable[[KafkaDelivery, Done], bool]) -> KafkaError | None:
        """Moves what is queued and still ours; what fails for now stays queued. Returns why it did."""
        try:
            self._clear_up(is_mine)
        except KafkaException as error:
            self._after = time.monotonic() + 0.5
            return client.error_of(error)
        moves, self.queue = self.queue[:_MOVES], self.queue[_MOVES:]
        moves = [move for move in moves if is_mine(move.delivery, move.done)]
        if not moves:
            return None
        touched: dict[int, tuple[Book, set[int]]] = {}
        for move in moves:
            book = move.delivery.book
            touched.setdefault(id(book), (book, set()))[1].add(move.delivery.offset)
        deciding = False
        try:
            producer = self.ready()
            producer.begin_transaction()
            for move in moves:
                self._write(producer, move)
            _await_reports(producer, moves)
            offsets = [entry(book, without=gone) for book, gone in touched.values()]
            self._add_offsets(producer, consumer, offsets)
            deciding = True
            self._insist(lambda: producer.commit_transaction(5))
        except KafkaException as error:
            found = client.error_of(error)
            if deciding and not (found is not None and found.txn_requires_abort()):
                self._producer, self._doubtful = None, moves
                return found
            return self._undo(moves, found)
        for move in moves:
            move.delivery.book.finish(move.delivery.offset)
            self._desk.done(move.done)
        return None

    def _clear_up(self, is_mine: Callable[[KafkaDelivery, Done], bool]) -> None:
        """A commit was never answered. A new producer of our name ends its transaction one way or the other, heal()
        lets nothing of it stay pending, and then the group's offsets say which way. Raises KafkaException when
        nobody answers now either."""
        self._doubtful = [move for move in self._doubtful if is_mine(move.delivery, move.done)]
        if not self._doubtful:
            return
        self.heal()
        places = {(move.delivery.book.topic, move.delivery.book.number) for move in self._doubtful}
        said = {
            (tp.topic, tp.partition): Book(tp.topic, tp.partition, tp.offset, tp.metadata or "", owner="")
            for tp in self.committed([TopicPartition(*place) for place in places])
        }
        for move in self._doubtful:
            book, offset = move.delivery.book, move.delivery.offset
            if said[book.topic, book.number].is_open(offset):
                self.queue.append(move)
            else:
                book.finish(offset)
                self._desk.done(move.done)
        self._doubtful = []

    def heal(self) -> None:
        """A broker that is killed after it decided a transaction may forget its markers when it starts again (seen with
        Kafka 4.3): the offsets stay pending, and readers of committed records stop before it. The end of the next
        transaction of the same producer in the same places ends that one too. So here are two that say nothing: records
        that are passed over where something is open, and a position that nobody reads. An abort would undo the lost
        one, so neither depends on the group, which may be rebalanced just now. Raises KafkaException."""
        self._after = time.monotonic() + 0.5  # when this fails
        producer = self.ready()
        if unended := self._unended():
            self._healing(producer, lambda: _say_nothing(producer, unended))
        plain = {name: value for name, value in self._set.consumer.items() if name != "group.instance.id"}
        outsider = RawConsumer(client.for_consumer(plain))
        try:
            nowhere = TopicPartition(self._set.nowhere, 0, 0)
            self._healing(producer, lambda: self._add_offsets(producer, outsider, [nowhere]))
        finally:
            outsider.close()
        self._after = 0.0

    def _healing(self, producer: RawProducer, fill: Callable[[], object]) -> None:
        """A transaction that is never aborted by itself; when it fails, the next producer decides."""
        try:
            producer.begin_transaction()
            fill()
            self._insist(lambda: producer.commit_transaction(5))
        except KafkaException:
            self._producer = None
            raise

    def _unended(self) -> list[TopicPartition]:
        """Where somebody's transaction is open, of the topics that ours write to."""
        places = [
            TopicPartition(topic, number)
            for topic in self._written
            for number in self.admin.list_topics(topic, timeout=_ANSWER).topics[topic].partitions
        ]
        asked = dict.fromkeys(places, client.admin_api.OffsetSpec.latest())
        stable, all_of_it = (
            self.admin.list_offsets(asked, isolation_level=level, request_timeout=_ANSWER)
            for level in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED)
        )
        return [
            place
            for place in places
            if stable[place].result(2 * _ANSWER).offset < all_of_it[place].result(2 * _ANSWER).offset
        ]

    def close(self) -> None:
        for move in (*self.queue, *self._doubtful):
            self._desk.done(move.done, BrokerUnavailable("the consumer is closed"))
        self.queue.clear()
        self._doubtful.clear()

    def _write(self, producer: RawProducer, move: Move) -> None:
        def report(error: KafkaError | None, message: Message) -> None:
            if error is not None and error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
                move.refused = error

        for topic, body, key, headers in move.records:
            self._written.add(topic)
            producer.produce(topic, body, key, headers=headers, on_delivery=report)

    def _add_offsets(self, producer: RawProducer, consumer: RawConsumer, offsets: Sequence[TopicPartition]) -> None:
        """Adds `offsets` to the open transaction. The client may forget its timeout for good when a coordinator was
        away (librdkafka issue 5456), so this is done in a thread: it can be left behind, and the producer with it."""
        members = consumer.consumer_group_metadata()

        def add() -> None:
            ended: SimpleQueue[KafkaException | None] = SimpleQueue()

            def run() -> None:
                try:
                    producer.send_offsets_to_transaction(list(offsets), members, 5)
                except KafkaException as error:
                    ended.put(error)
                else:
                    ended.put(None)

            threading.Thread(target=run, name="kafka-transaction", daemon=True).start()
            try:
                error = ended.get(timeout=_FORGOTTEN)
            except Empty:
                self._producer = None
                error = KafkaException(KafkaError(KafkaError._TIMED_OUT, "a transaction was given up"))
            if error is not None:
                raise error

        self._insist(add)

    def _insist(self, call: Callable[[], object]) -> None:
        """Repeats a step of a transaction while its outcome is unknown."""
        until = time.monotonic() + _INSIST
        while True:
            try:
                call()
                return
            except KafkaException as error:
                found = client.error_of(error)
                if found is None or not found.retriable() or self._desk.stopping or time.monotonic() > until:
                    raise
                self._desk.say(f"not connected ({found.str()})")
                self._desk.flush()
                time.sleep(0.05)

    def _undo(self, moves: Sequence[Move], error: KafkaError | None) -> KafkaError | None:
        """Aborts. What the broker refused is reported; the rest is tried again while its partition is still ours."""
        producer = self._producer
        if producer is not None:
            if error is None or error.fatal() or error.retriable():
                self._producer = None  # the next one begins by aborting what this one has open
            else:
                try:
                    self._insist(lambda: producer.abort_transaction(5))
                except KafkaException:
                    self._producer = None
        for move in moves:
            if move.refused is not None:
                size = max(len(body) for _, body, _, _ in move.records)
                refusal = client.translate(move.refused, f"writing to {move.records[0][0]}", size)
                move.refused = None
                if isinstance(refusal, (PublishRejected, ResourceMissing)):
                    self._desk.done(move.done, refusal)
                    continue
            self.queue.append(move)
        self._after = time.monotonic() + 0.05
        return error


def letters(delivery: KafkaDelivery, outputs: Sequence[Outgoing], done: Done) -> Move:
    """The move of an event that is finished by what is written, a dead letter among it."""
    records: list[Record] = [
        (o.channel.address, o.body, o.key.encode("utf-8", "surrogateescape") or None, client.headers_of(o))
        for o in outputs
    ]
    return Move(delivery, records, done)


def postponed(retry: str, delivery: KafkaDelivery, history: History, delay: float, done: Done) -> Move:
    """The move of an event to its retry topic, with everything that a reader there must know."""
    now = clock.now()
    due = now + max(history.rest(now), delay)
    headers: client.Headers = [(k, v) for k, v in client.pairs(delivery.message) if k not in client.MECHANICS]
    headers += [
        (client.HISTORY, history.encode()),
        (client.DUE, f"{due:.3f}".encode()),
        (client.ORIGIN, delivery.position.encode("utf-8", "surrogateescape")),
        (client.STORED, f"{delivery.time:.3f}".encode()),
    ]
    return Move(delivery, [(retry, delivery.body, delivery.message.key(), headers)], done)


def _await_reports(producer: RawProducer, moves: Sequence[Move]) -> None:
    """Returns when all is written, or after a while. A transaction that is ended while the report of a refused record
    is on its way waits for that for as long as it may: so it is awaited here. Raises KafkaException for a refusal."""
    until = time.monotonic() + _INSIST
    while len(producer) and time.monotonic() < until:
        producer.flush(_REPORT)
        for move in moves:
            if move.refused is not None:
                raise KafkaException(move.refused)


def _say_nothing(producer: RawProducer, places: Sequence[TopicPartition]) -> None:
    for place in places:
        producer.produce(place.topic, partition=place.partition, headers=[(client.NOTHING, b"")])


def entry(book: Book, **how: Any) -> TopicPartition:
    """What to commit for `book`."""
    low, metadata = book.snapshot(**how)
    return TopicPartition(book.topic, book.number, low, metadata)
