"""The partitions that are ours: what is committed of them, and what happens when they come and go.

Runs in the reader's thread; on_assign, on_revoke, on_lost and on_commit are called by the client inside poll().
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from orchestrator.brokers.base import Done
from orchestrator.brokers.kafka import client
from orchestrator.brokers.kafka.desk import Desk, Settings
from orchestrator.brokers.kafka.intake import Book, KafkaDelivery
from orchestrator.brokers.kafka.ledger import SUSPECT
from orchestrator.brokers.kafka.moving import Mover, entry
from orchestrator.errors import BrokerUnavailable

#: Seconds between commits, in general; and when something was handed out, but nothing settled.
_PACE, _LAZY = 0.005, 0.05
#: So long events go on being settled while no commit gets through.
_PATIENCE = 5.0
#: After so long without a report a commit is made again: a broker that was killed may have taken it with it.
_SILENCE = 3.0
#: Seconds in which offsets become stable, usually; and after which no transaction can be open any more: its timeout and
#: the interval in which brokers look for such.
_STABLE, _ABORTED = 3.0, 20.0


class Positions:
    def __init__(
        self,
        settings: Settings,
        desk: Desk,
        mover: Mover,
        work: Callable[[], None],
        forget: Callable[[Sequence[Book]], None],
    ) -> None:
        self.books: dict[tuple[str, int], Book] = {}
        self.committing: list[tuple[Book, Done]] | None = None
        self.missing: set[str] = set()  # topics that were deleted
        self.fenced = False
        self.cut_off = False  # since transactions of ours, or of a predecessor, were last seen to have ended
        self._desk, self._mover, self._owner, self._handover = desk, mover, settings.owner, settings.handover
        self._work, self._forget = work, forget  # the reader: run commands and moves; forget the records of these
        self._settled: list[tuple[Book, Done]] = []
        self._after = 0.0
        self._committed_at = 0.0
        self._owed = 0.0  # since when something is committed without success; 0 for nothing
        self._told: tuple[list[tuple[Book, int]], list[TopicPartition]] = [], []  # what the commit under way says
        self._seeks: dict[tuple[str, int], int] = {}

    # --- committing -------------------------------------------------------------------------------------------

    def settled(self, book: Book, done: Done) -> None:
        """`done` is told when what `book` says now is committed."""
        self._settled.append((book, done))

    def is_current(self, book: Book) -> bool:
        return self.books.get((book.topic, book.number)) is book

    def may_hand_out(self, book: Book) -> bool:
        """A successor must be able to tell an unclean end, and what it would have to suspect; and what is settled
        while no commit gets through would run again."""
        return book.written and book.ahead < SUSPECT and not self._starved

    @property
    def _starved(self) -> bool:
        return self._owed > 0 and time.monotonic() - self._owed > _PATIENCE

    def trouble(self) -> str | None:
        """Why nothing is handed out, or None."""
        if self._mover.in_doubt:
            return "how a transaction has ended is not known yet"
        return "what is settled cannot be committed" if self._starved else None

    def commit(self, consumer: RawConsumer) -> None:
        """One commit at a time, of every partition that changed; what was settled meanwhile rides with the next. At
        once when somebody waits for it, else a few milliseconds after the one before."""
        now = time.monotonic()
        if self.committing is not None and now - self._committed_at > _SILENCE:
            self.abandon_commit()
        if self._mover.in_doubt or self.committing is not None or now < self._after:
            return
        dirty = [book for book in self.books.values() if book.dirty]
        if self._settled and not dirty:
            self._confirm(self._settled)
            self._settled = []
        if now - self._committed_at > _LAZY:
            dirty += [book for book in self.books.values() if book.ahead and not book.dirty]
        if not dirty:
            return
        if not self._settled and now - self._committed_at < _PACE and all(book.ahead < SUSPECT // 2 for book in dirty):
            return
        self.committing, self._settled = self._settled, []
        self._committed_at, self._owed = now, self._owed or now
        for book in dirty:
            book.dirty = False
        entries = [entry(book) for book in dirty]
        self._told = [(book, book.edge) for book in dirty], entries
        try:
            consumer.commit(offsets=entries, asynchronous=True)
        except KafkaException:
            self._refused(dirty)

    def on_commit(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        if self.committing is None or _said(partitions) != _said(self._told[1]):
            return  # of a commit that was given up
        if error is not None or any(tp.error is not None for tp in partitions):
            codes = {tp.error.code() for tp in partitions if tp.error is not None} | {error.code() if error else 0}
            self._refused(self._books(partitions))
            if not codes.isdisjoint(client.FATAL):
                self.fence()
            return
        for tp in partitions:
            if (book := self.books.get((tp.topic, tp.partition))) is not None:
                book.written, book.low = True, tp.offset
        self._tell()
        done, self.committing = self.committing or [], None
        self._confirm(done)

    def _tell(self) -> None:
        edges, _ = self._told
        for book, edge in edges:
            book.told = max(book.told, edge)
        self._owed = 0.0

    def _confirm(self, settled: Sequence[tuple[Book, Done]]) -> None:
        for _, done in settled:
            self._desk.done(done)

    def _refused(self, books: Sequence[Book]) -> None:
        """Again with the next commit; a rebalance decides for what is no longer ours."""
        for book in books:
            book.dirty = True
        again, self.committing = self.committing or [], None
        for book, done in again:
            if not self.is_current(book):  # lost while the commit was under way
                self._desk.done(done, gone(book))
        self._settled = [(book, done) for book, done in again if self.is_current(book)] + self._settled
        self._after = time.monotonic() + 0.05

    def _books(self, partitions: Sequence[TopicPartition]) -> list[Book]:
        return [found for tp in partitions if (found := self.books.get((tp.topic, tp.partition))) is not None]

    # --- coming -----------------------------------------------------------------------------------------------

    def on_assign(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> None:
        start: list[TopicPartition] = []
        taken = self._desk.patiently(partial(self._committed, consumer, partitions)) if partitions else []
        for tp in taken:
            low, high = self._desk.patiently(partial(consumer.get_watermark_offsets, tp, timeout=5))
            book = self._book_at(tp, low, high)
            self.books[tp.topic, tp.partition] = book
            self.cut_off |= book.unclean
            self._seeks.pop((tp.topic, tp.partition), None)
            start.append(TopicPartition(tp.topic, tp.partition, book.low))
        consumer.incremental_assign(start)
        self._desk.post(self._desk.owner.assigned)
        self._desk.flush()

    def look(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """The commits of `partitions`; of those that a transaction may still change, what was before. Raises
        KafkaException."""
        return self._stable(consumer, partitions) or self._mover.committed(partitions)

    @staticmethod
    def _stable(consumer: RawConsumer, partitions: list[TopicPartition]) -> list[TopicPartition] | None:
        """The commits of `partitions`, or None while a transaction may still change them. Raises KafkaException."""
        try:
            return consumer.committed(partitions, timeout=_STABLE)
        except KafkaException as error:
            found = client.error_of(error)
            if found is None or found.code() != KafkaError._TIMED_OUT:
                raise
            return None

    def _committed(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """The commits of `partitions`, as soon as no transaction can change them any more: neither ours, which heal()
        ends, nor that of another, which its coordinator has ended when we have waited for long."""
        found, began = self._stable(consumer, partitions), time.monotonic()
        while found is None:
            self.cut_off = True
            self.heal()
            if self._desk.stopping or time.monotonic() - began > _ABORTED:
                client.log.warning("the positions of %s stay pending; taken up as they are", partitions)
                return self._mover.committed(partitions)
            found = self._stable(consumer, partitions)
        return found

    def heal(self) -> None:
        """See Mover.heal. When it fails, the next move or probe does it."""
        if self.cut_off:
            try:
                self._mover.heal()
                self.cut_off = False
            except KafkaException as error:
                client.log.warning("ending transactions: %s", error)

    def _book_at(self, tp: TopicPartition, low: int, high: int) -> Book:
        """The ledger of a partition that begins at `low`. A position that has no record any more is decided aloud."""
        metadata, at, lost = tp.metadata or "", tp.offset, 0
        if at < 0:  # a partition added later, or a retry topic that was never written to
            at, metadata = low, ""
        elif at < low:
            lost = low - at
            self._desk.alarm(f"{lost} unread events were trimmed from {tp.topic} [{tp.partition}]")
            at, metadata = low, ""
        elif at > high:
            self._desk.alarm(f"{tp.topic} [{tp.partition}] was made anew: it is read from its beginning")
            at, metadata = low, ""
        book = Book(tp.topic, tp.partition, at, metadata, owner=self._owner)
        book.lost += lost
        return book

    def reposition(self, consumer: RawConsumer, book: Book) -> None:
        """Our place in the log is gone: trimmed under us, or the topic was made anew."""
        place = TopicPartition(book.topic, book.number)
        low, _ = self._desk.patiently(lambda: consumer.get_watermark_offsets(place, timeout=5))
        if book.seen < low:
            lost = low - book.seen
            self._desk.alarm(f"{lost} unread events were trimmed from {book.topic} [{book.number}]")
            book.lost += lost
            book.skip_to(low)
            self._seeks[book.topic, book.number] = low
        else:
            self._desk.alarm(f"{book.topic} [{book.number}] was made anew: it is read from its beginning")
            self._restart((book.topic, book.number), low)

    def healed(self) -> None:
        """The missing topics were made again: what we knew of the old ones is void."""
        for key in [key for key in self.books if key[0] in self.missing]:
            self._restart(key, 0)
        self.missing.clear()

    def _restart(self, key: tuple[str, int], low: int) -> None:
        self.drop([self.books[key]])
        self.books[key] = Book(*key, low, "", owner=self._owner)
        self._seeks[key] = low

    def seek(self, consumer: RawConsumer) -> None:
        """Moves to where partitions begin anew; refused while the client has not taken them up yet."""
        for key, offset in list(self._seeks.items()):
            try:
                consumer.seek(TopicPartition(*key, offset))
            except KafkaException:
                continue
            del self._seeks[key]

    # --- going ------------------------------------------------------------------------------------------------

    def on_revoke(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> None:
        """Drain, commit, hand over: what runs on a partition that must go may end first, so no second copy starts."""
        going = self._books(partitions)
        running = [book for book in going if book.topic not in self.missing]
        self._forget(going)
        self._desk.post(lambda: self._desk.owner.recall(going))
        self._desk.flush()
        until = time.monotonic() + self._handover
        self.abandon_commit()
        self._work()
        while any(_is_running(book) for book in running) and not self._desk.stopping and time.monotonic() < until:
            self._commit_now(consumer)
            time.sleep(0.005)
            self._work()
        self._commit_now(consumer, running)
        self.drop(going)

    def abandon_commit(self) -> None:
        """The commit under way is made again, with what changed since; its report may still come."""
        if self.committing is not None:
            self._refused(self._books([TopicPartition(*key) for key in self.books]))
            self._after = 0.0

    def _commit_now(self, consumer: RawConsumer, going: Sequence[Book] = ()) -> None:
        """Commits and waits for it, inside a callback, where nobody polls for a report."""
        books = [book for book in self.books.values() if book.dirty or book in going]
        if self._mover.in_doubt:
            return
        if books and not self.fenced:
            edges = [(book, book.edge) for book in books]
            for book in books:
                book.dirty = False
            entries = [entry(book, clean=book in going and not _is_running(book)) for book in books]
            self._told = edges, entries
            try:
                consumer.commit(offsets=entries, asynchronous=False)
            except KafkaException as error:
                client.log.warning("a commit before a hand-over was refused: %s", error)
                for book in books:
                    book.dirty = True
                return
            self._tell()
        self._confirm(self._settled)
        self._settled = []
        self._desk.flush()

    def on_lost(self, consumer: RawConsumer, partitions: list[TopicPartition]) -> None:
        self.drop(self._books(partitions))

    def drop(self, going: Sequence[Book]) -> None:
        """These are another's now: their deliveries are void, and nothing of theirs will be settled."""
        self._forget(going)
        revoked: list[KafkaDelivery] = []
        for book in going:
            revoked.extend(one for one in book.open.copy().values() if one is not None)
            book.open.clear()
            self.books.pop((book.topic, book.number), None)
            self._seeks.pop((book.topic, book.number), None)
        for book, done in self._settled:
            if book in going:
                self._desk.done(done, gone(book))
        self._settled = [(book, done) for book, done in self._settled if book not in going]
        if revoked:
            self._desk.post(lambda: self._desk.owner.revoked(revoked))

    def fence(self) -> None:
        """Another has our name; see Reader._return."""
        if not self.fenced:
            self.fenced = True
            self.abandon_commit()
            self.drop(list(self.books.values()))
            self._desk.say(f"another process has taken over {self._owner}")

    def reset(self) -> None:
        """A new client begins."""
        self.fenced, self.committing, self._owed = False, None, 0.0


def _said(partitions: Sequence[TopicPartition]) -> set[tuple[str, int, int, str | None]]:
    """What a commit says; its report repeats it. Two that say the same stand for one another."""
    return {(tp.topic, tp.partition, tp.offset, tp.metadata) for tp in partitions}


def gone(book: Book) -> BrokerUnavailable:
    return BrokerUnavailable(f"{book.topic} [{book.number}] is no longer ours")


def _is_running(book: Book) -> bool:
    """Whether the worker has something of it."""
    return any(one is not None and one.handed for one in book.open.copy().values())
