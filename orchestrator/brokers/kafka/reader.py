"""The thread that owns one Kafka consumer (walk "an event that dies": it delivers, counts and settles).

One turn: run commands, move what must move in one transaction, commit, poll, take in, hand out. The loop talks to it by
call(); it answers by post(), one wake-up a turn. Nothing else touches the client.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka import Producer as RawProducer

from orchestrator import clock
from orchestrator.brokers.base import FRESH, Delivery, Done, History, Outgoing
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka.ledger import Ledger
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected, ResourceMissing
from orchestrator.topology.model import matches

#: Records fetched beyond the free slots, so that a freed slot need not wait for the network. They are in nobody's way:
#: their partition is ours alone.
_AHEAD = 256
#: Waiting retries whose bodies stay in memory, in bytes; of the others only place and time are known.
_BODIES = 64 << 20
#: Recent event ids remembered for each partition.
_INBOX = 20_000
#: Delivered, but not settled: how long the commit that says so may wait for another reason to commit.
_LAZY = 0.05
_PROBE = 2.0
_MOVES = 500

Place = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a reader needs to know; made by the connection."""

    consumer: Mapping[str, Any]
    transactions: Mapping[str, Any]
    topic: str
    retry: str
    group: str
    owner: str
    channel: str
    events: tuple[str, ...]
    others: tuple[str, ...]  # every pattern of the channel
    dedup_window: float
    handover: float  # how long a partition that must go waits for the handlers running on it


class KafkaDelivery(Delivery):
    __slots__ = ("key", "ledger", "offset", "raw_headers")

    ledger: Ledger[KafkaDelivery]
    offset: int
    key: bytes | None
    raw_headers: list[Any]

    @property
    def place(self) -> Place:
        return self.ledger.topic, self.ledger.number, self.offset


class Owner(Protocol):
    """The loop's side (consumer.py); called in the loop."""

    def finished(self, dones: Sequence[tuple[Done, BaseException | None]]) -> None: ...
    def deliver(self, deliveries: Sequence[KafkaDelivery]) -> None: ...
    def revoked(self, deliveries: Sequence[KafkaDelivery]) -> None: ...
    def trouble(self, reason: str | None) -> None: ...
    def alarm(self, message: str) -> None: ...
    def assigned(self) -> None: ...
    def heal(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Move:
    """Records to write and a delivery to finish, in one transaction."""

    delivery: KafkaDelivery
    records: list[tuple[str, bytes, bytes | None, client.Headers]]
    done: Done
    refused: KafkaError | None = None


class Reader(threading.Thread):
    def __init__(
        self, settings: Settings, loop: asyncio.AbstractEventLoop, owner: Owner, opened: asyncio.Future[None]
    ) -> None:
        super().__init__(name=f"kafka {settings.owner}", daemon=True)
        self._set, self._loop, self._owner, self._opened = settings, loop, owner, opened
        self._commands: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._posts: list[Callable[[], object]] = []
        self._dones: list[tuple[Done, BaseException | None]] = []
        self._lock = threading.Lock()  # of the two counts below
        self._free = 0
        self._landing = 0  # handed to the loop, not delivered yet
        self._stopping = self._draining = self._fenced = False
        self._ledgers: dict[tuple[str, int], Ledger[KafkaDelivery]] = {}
        self._ready: deque[tuple[Ledger[KafkaDelivery], Message]] = deque()
        self._waiting: list[tuple[float, int, Ledger[KafkaDelivery], int, Message | None]] = []
        self._bodies = self._sequence = 0
        self._inboxes: dict[tuple[str, int], OrderedDict[bytes, tuple[int, int]]] = {}
        self._settled: list[tuple[Ledger[KafkaDelivery], Done]] = []
        self._committing: list[tuple[Ledger[KafkaDelivery], Done]] | None = None
        self._commit_after = self._active = self._probe_at = self._move_after = 0.0
        self._stale = 0  # commits whose report no longer matters
        self._lazy_since: float | None = None
        self._moves: list[_Move] = []
        self._paused = False
        self._trouble: str | None = None
        self._missing: set[str] = set()
        self._producer: RawProducer | None = None

    # --- called in the loop -----------------------------------------------------------------------------------

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        self._commands.append((function, arguments))

    def demand(self, free: int) -> None:
        with self._lock:
            self._free = free - self._landing

    def landed(self, count: int) -> None:
        with self._lock:
            self._landing -= count

    def stop(self) -> None:
        self._stopping = True

    # --- the thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._consumer = self._open()
        except (KafkaException, BrokerError) as error:
            self._fail(client.translate(error, f"reading {self._set.topic}"))
            return
        self.post(lambda: settle(self._opened, None))
        while not self._stopping:
            try:
                self._turn()
                if self._fenced:
                    self._return()
            except Exception as error:  # shown by `status`, and tried again: a dead thread would be silence
                client.log.exception("the consumer of %s stumbled", self._set.topic)
                self._say(f"{type(error).__name__}: {error}")
                time.sleep(0.2)
            self._flush()
        self._finish()
        self._flush()

    def _open(self) -> RawConsumer:
        callbacks = {"error_cb": self._on_error, "on_commit": self._on_commit}
        consumer = RawConsumer(client.for_consumer(self._set.consumer, **callbacks))
        try:
            everything = [TopicPartition(self._set.topic, n) for n in _partitions(consumer, self._set.topic)]
            _partitions(consumer, self._set.retry)
            if all(tp.offset < 0 for tp in consumer.committed(everything, timeout=5)):
                raise ResourceMissing(
                    f"the group {self._set.group} has no position in {self._set.topic}", hint="run `orchestrator apply`"
                )
            self._transactions()
        except (KafkaException, BrokerError):
            consumer.close()
            raise
        consumer.subscribe(
            [self._set.topic, self._set.retry],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )
        return consumer

    def _return(self) -> None:
        """Fenced: either a successor has our name, or a broker that was away mistook an old request of ours for
        another's. Only in the second case we join again; a successor is left alone while it lives."""
        self._run_commands()
        if time.monotonic() < self._probe_at:
            time.sleep(0.05)
            return
        self._probe_at = time.monotonic() + _PROBE
        admin = client.admin_api.AdminClient(client.for_admin(self._set.consumer))
        members = admin.describe_consumer_groups([self._set.group])[self._set.group].result(5).members
        ours = self._set.consumer["client.id"]
        if any(m.group_instance_id == self._set.owner and m.client_id != ours for m in members):
            return
        self._consumer.close()
        self._stale, self._committing = 0, None
        self._consumer = self._open()
        self._fenced = False
        self._say(None)

    def _turn(self) -> None:
        if self._fenced:
            return
        worked = self._run_commands()
        if self._moves and self._committing is None and time.monotonic() >= self._move_after:
            self._transact()
        self._commit()
        self._ripen()
        self._hand_out()
        self._flush()
        now = time.monotonic()
        if worked:
            self._active = now
        pause = min(0.05, 0.001 + (now - self._active) / 10, self._next_due())
        for message in client.fetch(self._consumer, _AHEAD, pause):
            self._active = now
            self._take(message)
        self._flow()
        if now >= self._probe_at:
            self._probe(now)

    def _run_commands(self) -> bool:
        worked = bool(self._commands)
        while self._commands:
            function, arguments = self._commands.popleft()
            function(*arguments)
        return worked

    def post(self, act: Callable[[], object]) -> None:
        """Runs `act` in the loop, after what was posted before."""
        if self._dones:
            dones, self._dones = self._dones, []
            self._posts.append(lambda: self._owner.finished(dones))
        self._posts.append(act)

    def _flush(self) -> None:
        if self._dones:
            self.post(lambda: None)
        if self._posts:
            posts, self._posts = self._posts, []
            try:
                self._loop.call_soon_threadsafe(lambda: [act() for act in posts])
            except RuntimeError:  # the loop is closed: nobody is left to be told
                self._stopping = True

    def _fail(self, error: BrokerError) -> None:
        self.post(lambda: settle(self._opened, error))
        self._flush()

    # --- taking in --------------------------------------------------------------------------------------------

    def _take(self, message: Message) -> None:
        ledger = self._ledgers.get((message.topic() or "", message.partition() or 0))
        if (error := message.error()) is not None:
            self._take_error(error, message, ledger)
            return
        if ledger is None:
            return
        offset = message.offset() or 0
        fresh = ledger.see(offset)
        if ledger.topic == self._set.retry:
            if fresh or (offset in ledger.undone and offset not in ledger.in_flight):
                self._wait(ledger, offset, message, again=not fresh)
        elif fresh:
            if self._unwanted(message, ledger):
                ledger.finish(offset)
            else:
                self._ready.append((ledger, message))

    def _take_error(self, error: KafkaError, message: Message, ledger: Ledger[KafkaDelivery] | None) -> None:
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            if ledger is not None:
                ledger.reach(message.offset() or 0)
        elif code == KafkaError._AUTO_OFFSET_RESET or code == KafkaError.OFFSET_OUT_OF_RANGE:
            if ledger is not None:
                self._reposition(ledger)
        elif code in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION):
            self._probe_at = 0.0
        else:
            self._on_error(error)

    def _unwanted(self, message: Message, ledger: Ledger[KafkaDelivery]) -> bool:
        """Another subscription's type, or an event_id that this partition has had within the dedup window."""
        headers = dict(message.headers() or ())
        kind = _text(headers.get("event-type"))
        if kind is not None and _any(self._set.others, kind) and not _any(self._set.events, kind):
            return True
        name, window = headers.get(client.EVENT_ID), self._set.dedup_window
        if not isinstance(name, bytes) or window <= 0:
            return False
        inbox = self._inboxes.setdefault((ledger.topic, ledger.number), OrderedDict())
        offset, stored = message.offset() or 0, message.timestamp()[1]
        before = inbox.get(name)
        if before is not None and before[0] < offset and stored - before[1] <= window * 1000:
            return True
        inbox[name] = (offset, stored)
        if len(inbox) > _INBOX:
            inbox.popitem(last=False)
        return False

    def _wait(self, ledger: Ledger[KafkaDelivery], offset: int, message: Message, *, again: bool) -> None:
        """Parks a retry until it is due. Beyond the budget its body is dropped and fetched again by a seek."""
        due = float(_text(dict(message.headers() or ()).get(client.DUE)) or 0)
        if due <= clock.now():
            self._ready.append((ledger, message))
            return
        if again:
            return  # its place in the heap is kept
        self._sequence += 1
        size = len(message.value() or b"")
        keep = self._bodies + size <= _BODIES
        self._bodies += size if keep else 0
        heapq.heappush(self._waiting, (due, self._sequence, ledger, offset, message if keep else None))

    def _ripen(self) -> None:
        now = clock.now()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, ledger, offset, message = heapq.heappop(self._waiting)
            if not self._current(ledger):
                self._bodies -= len(message.value() or b"") if message else 0
            elif message is not None:
                self._bodies -= len(message.value() or b"")
                self._ready.append((ledger, message))
            else:
                self._consumer.seek(TopicPartition(ledger.topic, ledger.number, offset))

    def _next_due(self) -> float:
        return max(0.0, self._waiting[0][0] - clock.now()) if self._waiting else 1.0

    # --- handing out ------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        if not self._ready or self._draining or self._fenced:
            return
        batch: list[KafkaDelivery] = []
        held: list[tuple[Ledger[KafkaDelivery], Message]] = []
        with self._lock:
            while self._ready and self._free > 0:
                ledger, message = self._ready.popleft()
                offset = message.offset() or 0
                if not self._current(ledger) or offset in ledger.in_flight or offset not in ledger.undone:
                    continue
                if not ledger.written:
                    held.append((ledger, message))
                    continue
                batch.append(self._delivery(ledger, offset, message))
                self._free -= 1
                self._landing += 1
        self._ready.extendleft(reversed(held))
        if batch:
            if self._lazy_since is None:
                self._lazy_since = time.monotonic()
            self.post(lambda: self._owner.deliver(batch))

    def _delivery(self, ledger: Ledger[KafkaDelivery], offset: int, message: Message) -> KafkaDelivery:
        raw = list(message.headers() or ())
        headers = client.readable(raw)
        history = ledger.histories.get(offset)
        if history is None and client.HISTORY in headers:
            history = _history(headers[client.HISTORY])
        history = history or FRESH
        place = f"{ledger.topic}:{ledger.number}:{offset}"
        short = replace(history, error="").encode().decode()
        delivery = KafkaDelivery(
            body=message.value() or b"",
            headers={k: v for k, v in headers.items() if k not in client.MECHANICS},
            event_type=headers.get("event-type"),
            channel=self._set.channel,
            position=headers.get(client.ORIGIN, place) if ledger.topic == self._set.retry else place,
            token=json.dumps([ledger.topic, ledger.number, offset, short]).encode(),
            time=float(headers.get(client.STORED) or message.timestamp()[1] / 1000),
            redelivered=ledger.redelivered(offset),
            history=history,
        )
        delivery.ledger, delivery.offset, delivery.key, delivery.raw_headers = ledger, offset, message.key(), raw
        ledger.in_flight[offset] = delivery
        return delivery

    def _flow(self) -> None:
        """Stops fetching while far more than enough is here."""
        crowded = len(self._ready) >= 2 * _AHEAD or self._draining
        if crowded != self._paused and (crowded or len(self._ready) < _AHEAD):
            self._paused = crowded
            partitions = [TopicPartition(*key) for key in self._ledgers]
            (self._consumer.pause if crowded else self._consumer.resume)(partitions)

    def _current(self, ledger: Ledger[KafkaDelivery]) -> bool:
        return self._ledgers.get((ledger.topic, ledger.number)) is ledger

    # --- commands ---------------------------------------------------------------------------------------------

    def finish(self, delivery: KafkaDelivery, done: Done) -> None:
        if self._mine(delivery, done):
            delivery.ledger.finish(delivery.offset)
            self._settled.append((delivery.ledger, done))

    def move(self, delivery: KafkaDelivery, outputs: Sequence[Outgoing], done: Done) -> None:
        records = [(o.channel.address, o.body, o.key.encode() or None, client.headers_of(o)) for o in outputs]
        self._moves.append(_Move(delivery, records, done))

    def postpone(self, delivery: KafkaDelivery, history: History, delay: float, done: Done) -> None:
        due = max(history.not_before, clock.now() + delay if delay > 0 else 0.0)
        headers: client.Headers = [(k, v) for k, v in delivery.raw_headers if k not in client.MECHANICS]
        headers += [
            (client.HISTORY, history.encode()),
            (client.DUE, f"{due:.3f}".encode()),
            (client.ORIGIN, delivery.position.encode("utf-8", "surrogateescape")),
            (client.STORED, f"{delivery.time:.3f}".encode()),
        ]
        self._moves.append(_Move(delivery, [(self._set.retry, delivery.body, delivery.key, headers)], done))

    def remember(self, place: Place, history: History, done: Done) -> None:
        ledger = self._ledgers.get(place[:2])
        if ledger is None:
            self._dones.append((done, BrokerUnavailable(f"{place[0]} [{place[1]}] is no longer ours")))
            return
        ledger.remember(place[2], history)
        self._settled.append((ledger, done))

    def release(self, deliveries: Sequence[KafkaDelivery]) -> None:
        for delivery in reversed(deliveries):
            if self._current(delivery.ledger) and delivery.ledger.in_flight.pop(delivery.offset, None) is not None:
                message = Message(
                    topic=delivery.ledger.topic,
                    partition=delivery.ledger.number,
                    offset=delivery.offset,
                    key=delivery.key,
                    value=delivery.body,
                    headers=delivery.raw_headers,
                    timestamp=(0, int(delivery.time * 1000)),
                )
                self._ready.appendleft((delivery.ledger, message))

    def bases(self, tokens: Sequence[tuple[str, int, int, str]]) -> list[tuple[Place, History | None]]:
        """For each token the history to build on; None when it is settled, or another's."""
        found: list[tuple[Place, History | None]] = []
        for topic, number, offset, short in tokens:
            ledger = self._ledgers.get((topic, number))
            known = ledger is not None and ledger.is_open(offset)
            base = (ledger.histories.get(offset) or _history(short)) if ledger is not None and known else None
            found.append(((topic, number, offset), base))
        return found

    def trust_journal(self) -> None:
        for ledger in self._ledgers.values():
            ledger.trust_journal()

    def drain(self) -> None:
        self._draining = True
        self._ready.clear()

    def forget_missing(self) -> None:
        """Topics were made again: what we knew of the old ones is void."""
        for key, ledger in list(self._ledgers.items()):
            if ledger.topic in self._missing:
                self._restart(key, 0)
        self._missing.clear()
        self._probe_at = 0.0

    def _mine(self, delivery: KafkaDelivery, done: Done) -> bool:
        if self._current(delivery.ledger) and delivery.offset in delivery.ledger.in_flight:
            return True
        self._dones.append((done, BrokerUnavailable(f"{delivery.position} is no longer ours")))
        return False

    # --- committing -------------------------------------------------------------------------------------------

    def _entries(self, ledgers: Sequence[Ledger[KafkaDelivery]], **how: Any) -> list[TopicPartition]:
        found = []
        for ledger in ledgers:
            low, metadata = ledger.snapshot(**how)
            found.append(TopicPartition(ledger.topic, ledger.number, low, metadata))
        return found

    def _commit(self) -> None:
        """One commit at a time, of every partition that changed; what was settled meanwhile rides with the next."""
        now = time.monotonic()
        if self._committing is not None or now < self._commit_after or self._fenced:
            return
        dirty = [ledger for ledger in self._ledgers.values() if ledger.dirty]
        if self._lazy_since is not None and now - self._lazy_since > _LAZY:
            dirty = list(self._ledgers.values())
        if not dirty:
            self._committed(self._settled)
            self._settled = []
            return
        self._lazy_since = None
        for ledger in dirty:
            ledger.dirty = False
        self._committing, self._settled = self._settled, []
        try:
            self._consumer.commit(offsets=self._entries(dirty), asynchronous=True)
        except KafkaException:
            self._not_committed(dirty)

    def _on_commit(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        if self._stale:
            self._stale -= 1
            return
        ledgers = [found for tp in partitions if (found := self._ledgers.get((tp.topic, tp.partition))) is not None]
        if error is not None or any(tp.error is not None for tp in partitions):
            codes = {tp.error.code() for tp in partitions if tp.error is not None} | {error.code() if error else 0}
            if KafkaError.FENCED_INSTANCE_ID in codes:
                self._fence()
            self._not_committed(ledgers)
            return
        for ledger in ledgers:
            ledger.written = True
        done, self._committing = self._committing or [], None
        self._committed(done)

    def _committed(self, settled: Sequence[tuple[Ledger[KafkaDelivery], Done]]) -> None:
        self._dones.extend((done, None) for _, done in settled)

    def _not_committed(self, ledgers: Sequence[Ledger[KafkaDelivery]]) -> None:
        """Again with the next commit; a rebalance decides for what is no longer ours."""
        for ledger in ledgers:
            ledger.dirty = True
        self._settled = (self._committing or []) + self._settled
        self._committing = None
        self._commit_after = time.monotonic() + 0.05

    # --- moving -----------------------------------------------------------------------------------------------

    def _transactions(self) -> RawProducer:
        """Our transactional producer; making it ends what a predecessor of the same name left open."""
        if self._producer is None:
            producer = RawProducer(client.for_producer(self._set.transactions))
            self._insist(lambda: producer.init_transactions(5))
            self._producer = producer
        return self._producer

    def _insist(self, call: Callable[[], object]) -> None:
        """Repeats a step of a transaction while its outcome is unknown."""
        while True:
            try:
                call()
                return
            except KafkaException as error:
                found = client.error_of(error)
                if found is None or not found.retriable() or self._stopping:
                    raise
                self._say(f"not connected ({found.str()})")
                self._flush()

    def _transact(self) -> None:
        """Writes the records of many moves and the offsets that finish their events in one transaction. No plain
        commit is under way (its offsets could overwrite ours), and none starts before this returns."""
        moves, self._moves = self._moves[:_MOVES], self._moves[_MOVES:]
        moves = [move for move in moves if self._mine(move.delivery, move.done)]
        touched: dict[int, tuple[Ledger[KafkaDelivery], set[int]]] = {}
        for move in moves:
            ledger = move.delivery.ledger
            touched.setdefault(id(ledger), (ledger, set()))[1].add(move.delivery.offset)
        if not moves:
            return
        try:
            producer = self._transactions()
            producer.begin_transaction()
            for move in moves:
                self._write(producer, move)
            offsets = [e for ledger, gone in touched.values() for e in self._entries([ledger], without=gone)]
            members = self._consumer.consumer_group_metadata()
            self._insist(lambda: producer.send_offsets_to_transaction(offsets, members, 5))
            self._insist(lambda: producer.commit_transaction(5))
        except KafkaException as error:
            self._not_moved(moves, client.error_of(error))
            return
        for move in moves:
            move.delivery.ledger.finish(move.delivery.offset)
            self._dones.append((move.done, None))

    def _write(self, producer: RawProducer, move: _Move) -> None:
        def report(error: KafkaError | None, _: Message) -> None:
            if error is not None and error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
                move.refused = error

        for topic, body, key, headers in move.records:
            producer.produce(topic, body, key, headers=headers, on_delivery=report)

    def _not_moved(self, moves: list[_Move], error: KafkaError | None) -> None:
        """Aborts. What the broker refused is reported; the rest is tried again while its partition is still ours."""
        producer = self._producer
        if producer is not None:
            if error is None or error.fatal():
                self._producer = None
            else:
                try:
                    self._insist(lambda: producer.abort_transaction(5))
                except KafkaException:
                    self._producer = None
        if error is not None and error.code() == KafkaError.FENCED_INSTANCE_ID:
            self._fence()
        for move in moves:
            if move.refused is not None:
                what = f"writing to {move.records[0][0]}"
                refusal = client.translate(move.refused, what)
                if isinstance(refusal, (PublishRejected, ResourceMissing)):
                    self._dones.append((move.done, refusal))
                    continue
                move.refused = None
            self._moves.append(move)
        self._move_after = time.monotonic() + 0.05

    # --- rebalancing ------------------------------------------------------------------------------------------

    def _on_assign(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> None:
        start: list[TopicPartition] = []
        for tp in self._patiently(lambda: consumer.committed(partitions, timeout=5)) if partitions else []:
            low, high = self._patiently(partial(consumer.get_watermark_offsets, tp, timeout=5))
            ledger = self._ledger_at(tp, low, high)
            self._ledgers[tp.topic, tp.partition] = ledger
            start.append(TopicPartition(tp.topic, tp.partition, ledger.low))
        consumer.incremental_assign(start)
        self._paused = False
        self.post(self._owner.assigned)

    def _ledger_at(self, tp: TopicPartition, low: int, high: int) -> Ledger[KafkaDelivery]:
        """The ledger of a partition that begins at `low`. A position that has no record any more is decided aloud."""
        metadata, at = tp.metadata or "", tp.offset
        lost = 0
        if at < 0:  # a partition added later, or a retry topic that was never written to
            at, metadata = low, ""
        elif at < low:
            lost = low - at
            self._alarm(f"{lost} unread events were trimmed from {tp.topic} [{tp.partition}] (group {self._set.group})")
            at, metadata = low, ""
        elif at > high:
            self._alarm(f"{tp.topic} [{tp.partition}] is not the one that was read: it is read from its beginning")
            at, metadata = low, ""
        ledger: Ledger[KafkaDelivery] = Ledger(tp.topic, tp.partition, at, metadata, owner=self._set.owner)
        ledger.lost += lost
        return ledger

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        while True:
            try:
                return ask()
            except KafkaException as error:
                if self._stopping:
                    raise
                self._say(f"not connected ({error.args[0]})")
                self._flush()

    def _reposition(self, ledger: Ledger[KafkaDelivery]) -> None:
        """Our place in the log is gone: trimmed under us, or the topic was made anew."""
        low, _ = self._patiently(
            lambda: self._consumer.get_watermark_offsets(TopicPartition(ledger.topic, ledger.number), timeout=5)
        )
        if ledger.edge < low:
            lost = low - ledger.edge
            self._alarm(f"{lost} unread events were trimmed from {ledger.topic} [{ledger.number}]")
            ledger.lost += lost
            ledger.reach(low)
            self._consumer.seek(TopicPartition(ledger.topic, ledger.number, low))
        else:
            self._alarm(f"{ledger.topic} [{ledger.number}] was made anew: it is read from its beginning")
            self._restart((ledger.topic, ledger.number), low)

    def _restart(self, key: tuple[str, int], low: int) -> None:
        self._drop([self._ledgers[key]])
        self._ledgers[key] = Ledger(*key, low, "", owner=self._set.owner)
        self._inboxes.pop(key, None)
        try:
            self._consumer.seek(TopicPartition(*key, low))
        except KafkaException:  # not assigned any more: the rebalance that follows opens it again
            self._drop([self._ledgers[key]])

    def _on_revoke(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> None:
        """Drain, commit, hand over: what runs on a partition that must go may end first, so no second copy starts."""
        going = [found for tp in partitions if (found := self._ledgers.get((tp.topic, tp.partition))) is not None]
        self._ready = deque((ledger, message) for ledger, message in self._ready if ledger not in going)
        until = time.monotonic() + self._set.handover
        if self._committing is not None:
            self._stale += 1
            self._settled = self._committing + self._settled
            self._committing = None
        self._run_commands()
        while any(ledger.in_flight for ledger in going) and not self._stopping and time.monotonic() < until:
            self._settle_now(consumer)
            time.sleep(0.005)
            self._run_commands()
        self._settle_now(consumer, going)
        self._drop(going)

    def _settle_now(self, consumer: RawConsumer, going: Sequence[Ledger[KafkaDelivery]] = ()) -> None:
        """Moves and commits at once, inside a callback, where nobody polls for a report."""
        if self._moves and not self._fenced and time.monotonic() >= self._move_after:
            self._transact()
        ledgers = [ledger for ledger in self._ledgers.values() if ledger.dirty or ledger in going]
        if ledgers and not self._fenced:
            try:
                entries = [e for one in ledgers for e in self._entries([one], clean=one in going and not one.in_flight)]
                consumer.commit(offsets=entries, asynchronous=False)
            except KafkaException as error:
                client.log.warning("a commit at the end was refused: %s", error)
                return
        for ledger in ledgers:
            ledger.dirty = False
        self._committed(self._settled)
        self._settled = []
        self._flush()

    def _on_lost(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> None:
        self._drop([found for tp in partitions if (found := self._ledgers.get((tp.topic, tp.partition))) is not None])

    def _drop(self, going: Sequence[Ledger[KafkaDelivery]]) -> None:
        """These are another's now: their deliveries are void, and nothing of theirs will be settled."""
        revoked: list[KafkaDelivery] = []
        for ledger in going:
            revoked.extend(ledger.in_flight.values())
            ledger.in_flight.clear()
            self._ledgers.pop((ledger.topic, ledger.number), None)
        void = [(ledger, done) for ledger, done in self._settled if ledger in going]
        self._settled = [(ledger, done) for ledger, done in self._settled if ledger not in going]
        self._dones.extend(
            (done, BrokerUnavailable(f"{one.topic} [{one.number}] is no longer ours")) for one, done in void
        )
        if revoked:
            self.post(lambda: self._owner.revoked(revoked))

    def _fence(self) -> None:
        """Another process has our name: whatever it is, we are the older one."""
        if not self._fenced:
            self._fenced = True
            self._drop(list(self._ledgers.values()))
            self._say(f"another process has taken over the slot {self._set.owner}")

    # --- health -----------------------------------------------------------------------------------------------

    def _on_error(self, error: KafkaError) -> None:
        code = error.code()
        if code == KafkaError._ALL_BROKERS_DOWN:
            self._say("not connected")
        elif code in (KafkaError.FENCED_INSTANCE_ID, KafkaError._FENCED):
            self._fence()
        elif code in (KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._AUTHENTICATION):
            self._say(f"not let in ({error.str()})")
        elif error.fatal():
            self._say(error.str())

    def _probe(self, now: float) -> None:
        """Asks the broker something small: are you there, and are our topics?"""
        self._probe_at = now + _PROBE
        for topic in (self._set.topic, self._set.retry):
            try:
                found = self._consumer.list_topics(topic, timeout=2).topics.get(topic)
            except KafkaException as error:
                self._say(f"not connected ({error.args[0].str()})")
                return
            if found is None or (
                found.error is not None
                and found.error.code()
                in (
                    KafkaError.UNKNOWN_TOPIC_OR_PART,
                    KafkaError._UNKNOWN_TOPIC,
                )
            ):
                self._missing.add(topic)
        if self._missing:
            self._say(f"{', '.join(sorted(self._missing))} was deleted")
            self.post(self._owner.heal)
        elif not self._fenced:
            self._say(None)

    def _say(self, reason: str | None) -> None:
        if reason != self._trouble:
            self._trouble = reason
            self.post(lambda: self._owner.trouble(reason))

    def _alarm(self, message: str) -> None:
        self.post(lambda: self._owner.alarm(message))

    def _finish(self) -> None:
        self._run_commands()
        until = time.monotonic() + 2
        while self._committing is not None and time.monotonic() < until:
            self._consumer.poll(0.01)
        try:
            if not self._fenced:
                # A static member that only closes keeps its partitions until its session ends; one that
                # unsubscribes leaves, and they move at once.
                self._consumer.unsubscribe()
                while self._ledgers and time.monotonic() < until:
                    self._consumer.poll(0.01)
            self._consumer.close()
        except KafkaException as error:
            client.log.warning("closing: %s", error)
        self._drop(list(self._ledgers.values()))
        for move in self._moves:
            self._dones.append((move.done, BrokerUnavailable("the consumer is closed")))


def _partitions(consumer: RawConsumer, topic: str) -> list[int]:
    """Raises ResourceMissing when there is no such topic."""
    found = consumer.list_topics(topic, timeout=5).topics.get(topic)
    if found is None or found.error is not None:
        raise ResourceMissing(f"the topic {topic} does not exist", hint="run `orchestrator apply`")
    return sorted(found.partitions)


def settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    """Ends a future that its owner may have given up already."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _history(text: str) -> History | None:
    try:
        return History.decode(text.encode("utf-8", "surrogateescape"))
    except ValueError:
        return None


def _text(value: object) -> str | None:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else None


def _any(patterns: Sequence[str], event_type: str) -> bool:
    return any(matches(pattern, event_type) for pattern in patterns)
