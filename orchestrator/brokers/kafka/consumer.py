"""The loop's side of a Kafka consumer: demand, settling, recovery. The thread that owns the client is in reader.py."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from orchestrator.brokers.base import Consumer, Delivery, Done, History, Left, Outgoing, Sink
from orchestrator.brokers.kafka.client import require_safe
from orchestrator.brokers.kafka.desk import Settings, settle
from orchestrator.brokers.kafka.intake import Book, KafkaDelivery
from orchestrator.brokers.kafka.positions import gone
from orchestrator.brokers.kafka.producer import KafkaProducer
from orchestrator.brokers.kafka.reader import STOCK, Reader
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected
from orchestrator.topology.model import Subscription

#: Seconds until the partitions of a vanished consumer, and a transaction that it left open, are given up.
LEASE = 6.0
#: How long `recover` waits to be given its partitions; a group that is being rebalanced takes a few seconds.
_ASSIGNMENT = 15.0
#: How long `open` does. A member that must hand something over to us may have to wait for its handlers first.
_JOINING = 2.0
_DRAINING = 5.0


class Healer(Protocol):
    """What a consumer needs of its connection."""

    def shared_producer(self) -> KafkaProducer: ...

    async def restore(self, subscription: Subscription) -> str:
        """Makes again what was deleted from outside; returns what that was, "" for nothing."""

    def ended(self, consumer: KafkaConsumer) -> None: ...


class _Settling:
    """A delivery until its outputs are confirmed."""

    __slots__ = ("consumer", "delivery", "done", "failed", "waiting")

    def __init__(self, consumer: KafkaConsumer, delivery: KafkaDelivery, waiting: int, done: Done) -> None:
        self.consumer, self.delivery, self.waiting, self.done = consumer, delivery, waiting, done
        self.failed: BaseException | None = None

    def __call__(self, error: BaseException | None) -> None:
        self.waiting -= 1
        self.failed = self.failed or error
        if self.waiting == 0:
            if self.failed is None:
                self.consumer.finish(self.delivery, self.done)
            else:
                self.done(self.failed)


class KafkaConsumer(Consumer):
    def __init__(self, settings: Settings, healer: Healer, subscription: Subscription) -> None:
        self._subscription = subscription
        self._settings = settings
        self._healer = healer
        self._producer = healer.shared_producer()
        self._reader: Reader | None = None
        self._healing: asyncio.Task[None] | None = None
        self._ended = self._drained = self._pouring = False
        self._free = self._landed = 0
        self._stock: deque[KafkaDelivery] = deque()  # handed over by the thread, not yet asked for by the worker

    async def open(self, sink: Sink) -> None:
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._assigned = asyncio.Event()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._reader = Reader(self._settings, self._loop, self, opened)
        self._reader.start()
        await opened
        await self._has_joined(_JOINING)

    def demand(self, free: int) -> None:
        self._free = free
        self._ask_for_more()
        if self._stock and free > 0 and not self._pouring:
            self._pouring = True
            self._loop.call_soon(self._pour)

    def _ask_for_more(self) -> None:
        self._thread.demand(0 if self._drained else self._landed + self._free + STOCK - len(self._stock))

    def _pour(self) -> None:
        """Hands out what lies here already: a freed slot need not wait for the thread."""
        self._pouring = False
        count = min(self._free, len(self._stock))
        if count > 0:
            batch = [self._stock.popleft() for _ in range(count)]
            for delivery in batch:
                delivery.handed = delivery.book.dirty = True  # `lag` reads from commits what is running
            self._free -= count
            self._sink.deliver(batch)

    def settle(self, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        assert isinstance(delivery, KafkaDelivery)
        if not outputs:
            self.finish(delivery, done)
            return
        try:
            for output in outputs:
                require_safe(output)
        except PublishRejected as error:
            done(error)
            return
        if any(output.channel.dead_letters for output in outputs):
            self._call(self._thread.move, delivery, list(outputs), done)
            return
        settling = _Settling(self, delivery, len(outputs), done)
        for output in outputs:
            self._producer.send_to(output.channel.address, output, settling)

    def finish(self, delivery: KafkaDelivery, done: Done) -> None:
        """The thread's next commit says so. The worker need not wait for it, unless the last one says that this event
        was started: should a neighbour end the process before the next, it would be blamed."""
        book, offset = delivery.book, delivery.offset
        if not delivery.is_open:
            done(gone(book))
        elif book.is_marked(offset):
            book.finish(offset)
            self._call(self._thread.confirm, book, done)
        else:
            book.finish(offset)
            done(None)

    def retry(self, delivery: Delivery, history: History, delay: float, done: Done) -> None:
        assert isinstance(delivery, KafkaDelivery)
        self._call(self._thread.postpone, delivery, history, delay, done)

    def mark(self, delivery: Delivery, history: History, done: Done) -> None:
        assert isinstance(delivery, KafkaDelivery)
        self._call(self._thread.remember, delivery.place, history, done)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        self._call(self._thread.release, [d for d in deliveries if isinstance(d, KafkaDelivery)])

    async def recover(self, left: Sequence[Left]) -> None:
        if not await self._has_joined(_ASSIGNMENT):
            return  # nothing is ours now; who has it suspects an unclean end by itself
        bases = await self._ask(self._thread.bases, [json.loads(one.token) for one in left])
        stored = []
        for one, (place, base) in zip(left, bases, strict=True):
            if base is not None and (history := self._sink.on_crash(base, one.ended)) != base:
                future: asyncio.Future[None] = self._loop.create_future()
                self._call(self._thread.remember, place, history, partial(settle, future))
                stored.append(future)
        await asyncio.gather(*stored)
        await self._ask(self._thread.trust_journal)

    def keep_alive(self) -> None:
        """Nothing to do: the client's own threads keep the membership, and ours polls whatever the loop does."""

    def _give_back_stock(self) -> None:
        self.release(self._stock)
        self._stock.clear()

    async def drain(self) -> None:
        self._drained = True
        self._give_back_stock()
        try:
            async with asyncio.timeout(_DRAINING):
                await self._ask(self._thread.drain)
        except TimeoutError:
            pass  # the broker is away and the thread waits for it: nothing is fetched either

    async def close(self) -> None:
        if self._healing is not None:
            self._healing.cancel()
        if self._reader is not None:
            self._reader.stop()
            await asyncio.to_thread(self._reader.join)
            self._ended = True
            self._reader.leftovers()
            await asyncio.sleep(0)  # what was posted last
        self._healer.ended(self)

    # --- called by the reader, in the loop --------------------------------------------------------------------

    def finished(self, dones: Sequence[tuple[Done, BaseException | None]]) -> None:
        for done, error in dones:
            done(error)

    def deliver(self, deliveries: Sequence[KafkaDelivery]) -> None:
        self._landed += len(deliveries)
        self._stock.extend(delivery for delivery in deliveries if delivery.is_open)
        if self._drained:
            self._give_back_stock()
        else:
            self._pour()

    def recall(self, books: Sequence[Book]) -> None:
        """These partitions are about to go: what of them the worker does not have yet, it does not get."""
        self._stock = deque(delivery for delivery in self._stock if delivery.book not in books)
        self._ask_for_more()

    def revoked(self, deliveries: Sequence[KafkaDelivery]) -> None:
        self.recall([delivery.book for delivery in deliveries])
        if gone := [delivery for delivery in deliveries if delivery.handed]:
            self._sink.revoked(gone)

    def trouble(self, reason: str | None) -> None:
        self._sink.trouble(reason)

    def alarm(self, message: str) -> None:
        self._sink.alarm(message)

    def assigned(self) -> None:
        self._assigned.set()

    def heal(self) -> None:
        """A topic of ours is gone."""
        if self._healing is None or self._healing.done():
            self._healing = self._loop.create_task(self._heal())

    async def _heal(self) -> None:
        try:
            made = await self._healer.restore(self._subscription)
        except BrokerError as error:
            self._sink.trouble(f"cannot be healed: {error}")
            return
        if made:
            self._sink.alarm(f"{made} was deleted from outside and is made again; what it held is lost")
        self._thread.call(self._thread.healed)

    # ----------------------------------------------------------------------------------------------------------

    @property
    def _thread(self) -> Reader:
        if self._reader is None:
            raise BrokerUnavailable("the consumer is not open", hint="await open() first")
        return self._reader

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        self._thread.call(function, *arguments)
        if self._ended:
            self._thread.leftovers()

    async def _has_joined(self, patience: float) -> bool:
        try:
            async with asyncio.timeout(patience):
                await self._assigned.wait()
        except TimeoutError:
            return False
        return True

    async def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs `function` in the reader's thread and returns what it returns."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def run() -> None:
            result = function(*arguments)
            self._thread.answer(lambda: None if future.done() else future.set_result(result))

        self._thread.call(run)
        return await future
