"""The thread that owns one Kafka consumer (walk "an event that dies": it delivers, counts and settles).

One turn: run commands, move what must move in one transaction, commit, poll, take in, hand out. The loop talks to it by
call(); it answers through the desk, one wake-up a turn. Nothing else touches the client.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from orchestrator.brokers.base import Done, History, Outgoing
from orchestrator.brokers.kafka import client, moving
from orchestrator.brokers.kafka.desk import Desk, Owner, Settings, settle
from orchestrator.brokers.kafka.intake import Book, Intake, KafkaDelivery, Place, history_of
from orchestrator.brokers.kafka.positions import Positions, gone
from orchestrator.errors import BrokerError, BrokerUnavailable, ResourceMissing

#: Records and bytes read beyond the free slots before partitions are paused; they are in nobody's way, as their
#: partition is ours alone. Reached only when handlers take long: a paused partition is slow to come back.
_AHEAD = 4096
_AHEAD_BYTES = 16 << 20
#: Records taken from the client at a time.
_GULP = 500
#: Deliveries kept ready in the loop beyond the free slots (nobody else could have them: their partition is ours), their
#: bytes, and how many missing are worth a turn of the thread at once.
STOCK, _STOCK_BYTES, ENOUGH = 256, 4 << 20, 64
#: Seconds between looks at the broker's health, and at whether our name is free again.
_PROBE, _FREE = 2.0, 0.5
#: Finished records of a retry topic are deleted when so many are there.
SWEEP = 1000


class Reader(threading.Thread):
    def __init__(
        self, settings: Settings, loop: asyncio.AbstractEventLoop, owner: Owner, opened: asyncio.Future[None]
    ) -> None:
        super().__init__(name=f"kafka {settings.owner}", daemon=True)
        self._set, self._opened = settings, opened
        self._topics = [settings.topic, settings.wanted.retry]
        self._desk = Desk(loop, owner)
        self._mover = moving.Mover(settings, self._desk)
        self._positions = Positions(
            settings, self._desk, self._mover, self._work, lambda books: self._intake.forget(books)
        )
        self._intake = Intake(settings.wanted, self._positions.is_current)
        self._commands: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._called = threading.Event()
        self.handed = 0  # deliveries given to the loop so far
        self._limit = 0  # and how many it may have been given
        self._draining = False
        self._paused: set[tuple[str, int]] = set()
        self._active = self._probe_at = 0.0
        self._swept: dict[tuple[str, int], int] = {}

    # --- called in the loop -----------------------------------------------------------------------------------

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Runs `function` in the thread, in order."""
        self._commands.append((function, arguments))
        if not self._called.is_set():
            self._called.set()

    def answer(self, act: Callable[[], object]) -> None:
        """From a function that was called: runs `act` in the loop."""
        self._desk.post(act)

    def demand(self, limit: int) -> None:
        """`limit` deliveries may have been handed out, counted from the beginning."""
        self._limit = limit
        if limit - self.handed >= ENOUGH and not self._called.is_set():
            self._called.set()

    def stop(self) -> None:
        self._desk.stopping = True

    def leftovers(self) -> None:
        """After the thread has ended: whoever called too late is told."""
        self._run_commands()
        self._mover.close()
        self._desk.flush()

    # --- the thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._consumer = self._open()
        except (KafkaException, BrokerError) as error:
            found = client.translate(error, f"reading {self._set.topic}")
            self._desk.post(lambda: settle(self._opened, found))
            self._desk.flush()
            return
        self._desk.post(lambda: settle(self._opened, None))
        while not self._desk.stopping:
            try:
                if self._positions.fenced:
                    self._return()
                else:
                    self._turn()
            except Exception as error:  # shown by `status`, and tried again: a dead thread would be silence
                client.log.exception("the consumer of %s stumbled", self._set.topic)
                self._desk.say(f"{type(error).__name__}: {error}")
                time.sleep(0.2)
            self._desk.flush()
        self._finish()
        self._desk.flush()

    def _open(self) -> RawConsumer:
        callbacks = {"error_cb": self._on_error, "on_commit": self._positions.on_commit}
        consumer = RawConsumer(client.for_consumer(self._set.consumer, **callbacks))
        try:
            numbers = {topic: _partitions(consumer, topic) for topic in self._topics}
            everything = [TopicPartition(self._set.topic, number) for number in numbers[self._set.topic]]
            there = client.settled(lambda: self._positions.look(consumer, everything), f"reading {self._set.topic}")
            if all(tp.offset < 0 for tp in there):
                raise ResourceMissing(
                    f"the group {self._set.group} has no position in {self._set.topic}", hint="run `orchestrator apply`"
                )
            self._mover.ready()
        except (KafkaException, BrokerError):
            consumer.close()
            raise
        where = self._positions
        consumer.subscribe(self._topics, on_assign=where.on_assign, on_revoke=where.on_revoke, on_lost=where.on_lost)
        return consumer

    def _turn(self) -> None:
        if self._run_commands():
            self._active = time.monotonic()
        if self._mover.due and self._positions.committing is None:
            self._move()
        self._positions.commit(self._consumer)
        self._positions.seek(self._consumer)
        self._intake.ripen(self._consumer)
        self._hand_out()
        self._desk.flush()
        now = time.monotonic()
        idle = now - self._active
        pause = min(0.001 if idle < 0.05 else idle / 10, 0.05, self._intake.next_due())
        if self._intake.count < _GULP:
            messages = client.fetch(self._consumer, _GULP, pause)
        else:
            # Enough is here. The rest waits in the client, which stops fetching by itself (a pause would cost half a
            # second); this poll is for its callbacks.
            self._called.wait(min(pause, 0.005))
            messages = client.fetch(self._consumer, 0, 0)
        if messages:
            self._active = now
            self._take(messages)
        self._flow()
        if now >= self._probe_at:
            self._probe_at = now + _PROBE
            self._probe()
            self._sweep()

    def _run_commands(self) -> bool:
        if self._called.is_set():
            self._called.clear()
        worked = bool(self._commands)
        while self._commands:
            function, arguments = self._commands.popleft()
            function(*arguments)
        return worked

    def _work(self) -> None:
        """What goes on while a partition is handed over."""
        self._run_commands()
        if self._mover.due and not self._positions.fenced:
            self._move()

    def _move(self) -> None:
        self._positions.heal()
        if self._positions.cut_off:
            return  # should this move be aborted, a transaction that lost its end would be undone with it
        error = self._mover.move(self._consumer, self._is_mine)
        if error is not None and error.code() == KafkaError.FENCED_INSTANCE_ID:  # of the consumer, not of the producer
            self._positions.fence()

    def _take(self, messages: Sequence[Message]) -> None:
        books, take = self._positions.books, self._intake.take
        for message in messages:
            book = books.get((message.topic(), message.partition()))  # type: ignore[arg-type]
            if (error := message.error()) is not None:
                self._stumble(book, message, error)
            elif book is not None:
                take(book, message)

    def _stumble(self, book: Book | None, message: Message, error: KafkaError) -> None:
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            if book is not None:
                book.skip_to(message.offset() or 0)
        elif code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            if book is not None:
                self._positions.reposition(self._consumer, book)
        elif code in client.GONE:
            self._probe_at = 0.0
        else:
            self._on_error(error)

    def _hand_out(self) -> None:
        if self._draining:
            return
        room = self._limit - self.handed
        if self._intake.count:  # large ones are not kept ready in great numbers
            room -= max(0, STOCK - _STOCK_BYTES * self._intake.count // max(1, self._intake.bytes))
        batch: list[KafkaDelivery] = []
        waiting = [book for book in self._positions.books.values() if book.ready]
        for place, book in enumerate(waiting):
            if room > len(batch) and self._positions.may_hand_out(book):
                share = -(-(room - len(batch)) // (len(waiting) - place))
                self._intake.hand_out(book, share, batch)
        if batch:
            self.handed += len(batch)
            self._desk.post(lambda: self._desk.owner.deliver(batch))
        for book in self._positions.books.values():
            if not book.ready:
                book.catch_up()

    def _flow(self) -> None:
        """Stops fetching while far more than enough is here."""
        full = max(self._intake.count / _AHEAD, self._intake.bytes / _AHEAD_BYTES)
        here = set(self._positions.books)
        self._paused &= here
        if self._draining or full >= 1:
            flowing = here - self._paused
            if flowing:
                self._consumer.pause([TopicPartition(*key) for key in flowing])
                self._paused |= flowing
        elif self._paused and full < 0.5:
            self._consumer.resume([TopicPartition(*key) for key in self._paused])
            self._paused.clear()

    # --- commands ---------------------------------------------------------------------------------------------

    def move(self, delivery: KafkaDelivery, outputs: Sequence[Outgoing], done: Done) -> None:
        self._mover.queue.append(moving.letters(delivery, outputs, done))

    def postpone(self, delivery: KafkaDelivery, history: History, delay: float, done: Done) -> None:
        self._mover.queue.append(moving.postponed(self._set.wanted.retry, delivery, history, delay, done))

    def confirm(self, book: Book, done: Done) -> None:
        """`done` when what was finished is committed."""
        if self._positions.is_current(book):
            self._positions.settled(book, done)
        else:
            self._desk.done(done, gone(book))

    def remember(self, place: Place, history: History, done: Done) -> None:
        book = self._positions.books.get(place[:2])
        if book is None:
            self._desk.done(done, BrokerUnavailable(f"{place[0]} [{place[1]}] is no longer ours"))
            return
        book.remember(place[2], history)
        self._positions.settled(book, done)

    def release(self, deliveries: Sequence[KafkaDelivery]) -> None:
        for delivery in reversed(deliveries):
            if delivery.is_open and not self._draining:
                self._intake.give_back(delivery)
            elif delivery.is_open:
                delivery.book.open[delivery.offset] = None

    def bases(self, tokens: Sequence[Sequence[Any]]) -> list[tuple[Place, History | None]]:
        """For each token the history to build on; None when it is settled, or another's."""
        found: list[tuple[Place, History | None]] = []
        for topic, number, offset, short in tokens:
            book = self._positions.books.get((topic, number))
            known = book is not None and book.is_open(offset)
            base = (book.histories.get(offset) or history_of(short)) if book is not None and known else None
            found.append(((topic, number, offset), base))
        return found

    def trust_journal(self) -> None:
        for book in self._positions.books.values():
            book.trust_journal()

    def drain(self) -> None:
        self._draining = True
        self._intake.clear(self._positions.books.values())

    def healed(self) -> None:
        self._positions.healed()
        self._probe_at = 0.0

    def _is_mine(self, delivery: KafkaDelivery, done: Done) -> bool:
        if not delivery.is_open:
            self._desk.done(done, gone(delivery.book))
        return delivery.is_open

    # --- health -----------------------------------------------------------------------------------------------

    def _on_error(self, error: KafkaError) -> None:
        code = error.code()
        if code == KafkaError._ALL_BROKERS_DOWN:
            self._desk.say("not connected")
        elif code in client.FATAL or error.fatal():
            self._positions.fence()
        elif code in (KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._AUTHENTICATION):
            self._desk.say(f"not let in ({error.str()})")

    def _probe(self) -> None:
        """Asks the broker something small: are you there, and are our topics? By the producer's connection, as on the
        consumer's the answer would wait for the fetch under way."""
        missing = self._positions.missing
        for topic in self._topics:
            try:
                found = self._mover.ready().list_topics(topic, timeout=2).topics.get(topic)
            except KafkaException as error:
                self._desk.say(f"not connected ({error.args[0].str()})")
                return
            if found is None or (found.error is not None and found.error.code() in client.GONE):
                missing.add(topic)
        if missing:
            self._desk.say(f"{', '.join(sorted(missing))} was deleted")
            self._desk.post(self._desk.owner.heal)
        else:
            if self._desk.away:
                self._positions.abandon_commit()
                self._positions.cut_off = True
            self._positions.heal()
            self._desk.say(self._positions.trouble())

    def _sweep(self) -> None:
        """Deletes what is finished from the retry topic, where nothing expires."""
        finished: list[TopicPartition] = []
        for key, book in self._positions.books.items():
            if key[0] == self._set.wanted.retry and book.low - self._swept.get(key, 0) >= SWEEP:
                self._swept[key] = book.low
                finished.append(TopicPartition(*key, book.low))
        if finished:
            self._mover.admin.delete_records(finished)  # what fails goes with the next

    def _return(self) -> None:
        """Fenced: a successor has our name, or a broker that was away mistook an old request of ours for another's. The
        group does not tell which (it keeps the client.id of the first that had the name: KAFKA-15704), but what is
        nobody's ends with its session: then we join again. A successor is left alone while it lives."""
        self._run_commands()
        if time.monotonic() < self._probe_at:
            time.sleep(0.05)
            return
        self._probe_at = time.monotonic() + _FREE
        members = self._mover.admin.describe_consumer_groups([self._set.group])[self._set.group].result(5).members
        if any(member.group_instance_id == self._set.owner for member in members):
            return
        fenced, self._consumer = self._consumer, self._open()
        fenced.close()
        self._positions.reset()
        self._desk.say(None)

    def _finish(self) -> None:
        self._run_commands()
        until = time.monotonic() + 2
        try:
            while self._positions.committing is not None and time.monotonic() < until:
                self._consumer.poll(0.01)
            if not self._positions.fenced:
                # A static member that only closes keeps its partitions until its session ends; one that
                # unsubscribes leaves, and they move at once.
                self._consumer.unsubscribe()
                while self._positions.books and time.monotonic() < until:
                    self._consumer.poll(0.01)
            self._consumer.close()
        except KafkaException as error:
            client.log.warning("closing: %s", error)
        self._positions.drop(list(self._positions.books.values()))
        self._mover.close()


def _partitions(consumer: RawConsumer, topic: str) -> list[int]:
    """Raises ResourceMissing when there is no such topic."""
    found = consumer.list_topics(topic, timeout=5).topics.get(topic)
    if found is None or found.error is not None:
        raise ResourceMissing(f"the topic {topic} does not exist", hint="run `orchestrator apply`")
    return sorted(found.partitions)
