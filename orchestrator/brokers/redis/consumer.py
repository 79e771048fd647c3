"""The way in: one agent's reading of one stream and of its own inbox of redrives.

What is delivered stays pending under this worker's own name until it is settled, and its heartbeat vouches for all of
it. What waits (retries, released or taken-over events) is pending under `@delayed` with a due time, and whoever has a
free slot takes it. Only one task reads, so what is pending under our name and unknown here is an answer that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import ResponseError

from orchestrator.brokers.base import Consumer, Delivery, Done, History, Left, Sink
from orchestrator.brokers.redis import reading_scripts as scripts
from orchestrator.brokers.redis.link import Wire, digest
from orchestrator.brokers.redis.settling import Holdings, RedisDelivery, history
from orchestrator.errors import BrokerError, ResourceMissing
from orchestrator.topology.model import Subscription, matches

if TYPE_CHECKING:
    from orchestrator.brokers.redis.connection import RedisConnection

LEASE = 10.0
#: At least so many are asked for at a time.
_FEW = 21
BLOCK = 0.25  # seconds a read waits; what is due later than that is noticed by the next
_log = logging.getLogger(__name__)


class RedisConsumer(Holdings, Consumer):
    def __init__(self, connection: RedisConnection, subscription: Subscription, slot: str) -> None:
        super().__init__(connection, subscription, slot)
        self._counts = connection.loss_detection(subscription)
        self._untyped = connection.takes_untyped(subscription)
        self._wanted: dict[str | None, bool] = {}
        self._free = 0
        self._asked = 0  # COUNT of the read under way
        self._reading: asyncio.Future[list[Any]] | None = None
        self._hungry = False  # the reader waits for free slots
        self._trimmed = -1
        self._unbroken = 0.0  # loop time since when every heartbeat has been answered; 0: the last was not
        self._beaten = 0.0, 0  # the last heartbeat: loop time, and milliseconds of the server's clock
        self._take_at = 0.0
        self._stopping = False
        self._closed = False
        self._wake = asyncio.Event()
        self._reader: Wire | None = None
        self._reader_id = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._write_trouble = partial(self.trouble, "write")

    # --- start ------------------------------------------------------------------------------------------------

    async def open(self, sink: Sink) -> None:
        self.sink = sink
        main = self.main
        if main.group not in await self.connection.groups(main.stream):
            raise ResourceMissing(
                f"the consumer group {main.group} does not exist on the stream {main.stream}",
                hint="run `orchestrator apply`",
            )
        self._loop = asyncio.get_running_loop()
        self.pump = self.connection.pump(main.stream)
        await self._beat()
        if self._counts:
            self._lost(await self.link.script(scripts.LOST, [main.stream], *main.args, self._counts, self.last))
        self.pump.listeners.add(self._write_trouble)
        self._tasks = [
            self._loop.create_task(self._read_on(), name=f"redis read {self.me}"),
            self._loop.create_task(self._beat_on(), name=f"redis beat {self.me}"),
        ]

    def demand(self, free: int) -> None:
        self._free = free
        if free > 0:
            if self._hungry and not self.suspect and self._loop.time() < self._take_at:
                self._ask(self._reader)  # at once: before what is settled now, which takes the server longer
            self._wake.set()
        if free < self._asked:
            self._unblock()

    # --- reading ----------------------------------------------------------------------------------------------

    async def _read_on(self) -> None:
        pause = 0.1
        while not self._stopping:
            try:
                with self.link.translated():
                    await self._read_once()
                self.trouble("read", None)
                pause = 0.1
                continue
            except BrokerError as error:
                word = str(error.__cause__)
                if word.startswith("NOSCRIPT"):
                    pause = 0.0  # the server forgot its scripts: the next reader loads them
                elif word.startswith(("NOGROUP", "UNBLOCKED")):
                    await self.heal()
                else:
                    self.trouble("read", str(error))
            except Exception as error:  # a mistake of ours: it must be seen, and reading must go on
                _log.exception("reading %s failed", self.channel.address)
                self.trouble("read", f"{type(error).__name__}: {error}")
            self._forget_reader()
            self.suspect = True
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause or 0.1)
        self._forget_reader()

    async def _read_once(self) -> None:
        if self.suspect:
            await self.adopt()
            self.suspect = False
        if self._free <= 0:
            self._wake.clear()
            self._hungry = True
            await self._wake.wait()
            self._hungry = False
        else:
            if self._loop.time() >= self._take_at:
                await self._take()
            if self._free > 0 and not self._stopping:
                if self._reader is None or self._reader.closed:
                    await self._connect_reader()
                self._ask(self._reader)
        if self._reading is not None:
            await self._read()

    async def _take(self) -> None:
        """What is due, and the inbox."""
        keys, sources = self.both_args
        got, gone, wait = await self.link.script(scripts.TAKE, keys, self._free, *sources)
        self._take_at = self._loop.time() + (min(BLOCK, wait / 1000) if wait >= 0 else BLOCK)
        if len(got) >= self._free:
            self._take_at = 0.0
        self._gone(gone)
        self._hand_out([RedisDelivery(self.both[at], entry, flat, n, kept) for at, entry, flat, n, kept in got])

    def _ask(self, reader: Wire | None) -> None:
        """Sends the next read."""
        if reader is None or self._reading is not None or self._stopping:
            return
        main = self.main
        wait = max(1, int(1000 * min(BLOCK, self._take_at - self._loop.time())))
        # not all at once: the server looks for some while others are handled here and yet others are being settled
        self._asked = min(self._free, max(_FEW, self._free // 3))
        read = (
            "XREADGROUP", "GROUP", main.group, self.me, "COUNT", self._asked, "BLOCK", wait,
            "STREAMS", main.stream, ">",
        )  # fmt: skip
        look = ("EVALSHA", digest(scripts.LOST), 1, main.stream, *main.args, self._counts, self.last)
        # "next": looked at afterwards too, so that the first entry that is still unread is remembered
        self._reading = reader.send(*{"": (read,), "count": (look, read), "next": (look, read, look)}[self._counts])

    async def _read(self) -> None:
        assert self._reading is not None
        try:
            answers = await self._reading
        finally:
            self._asked, self._reading = 0, None
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise answer
        if self._counts:
            self._lost(answers[0])
        if found := answers[1 if self._counts else 0]:
            entries = found[0][1]
            self.last = entries[-1][0].decode()
            self._hand_out([RedisDelivery(self.main, entry, flat, 1, None) for entry, flat in entries])

    async def _connect_reader(self) -> None:
        self._forget_reader()
        reader = self._reader = await self.link.fresh(self.channel.address)
        self._reader_id = await reader.ask("CLIENT", "ID")
        await reader.ask("SCRIPT", "LOAD", scripts.LOST)

    def _forget_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _unblock(self) -> None:
        """Ends a blocked read without losing what it may just be given, as cancelling it would."""
        if self._asked:
            self._asked = 0  # once is enough
            self.beside(self.link.call(self.channel.address, "CLIENT", "UNBLOCK", self._reader_id))

    def _hand_out(self, deliveries: Sequence[RedisDelivery]) -> None:
        fit, main, wanted = list[RedisDelivery](), self.main, self._wanted
        for delivery in deliveries:
            live = delivery.origin.live
            if delivery.entry in live:
                continue  # read again after the group was made anew; it is running here
            if delivery.origin is main and (
                "dlq-agent" in delivery.headers  # a dead letter is read with `dlq`; it never feeds an agent
                or not (wanted.get(delivery.event_type) or self._wants(delivery.event_type))
            ):
                self.skip(delivery)
            elif len(fit) >= self._free or self._stopping:
                self.release([delivery])
            else:
                live[delivery.entry] = delivery
                fit.append(delivery)
        if fit:
            self._free -= len(fit)
            self.sink.deliver(fit)

    def _wants(self, kind: str | None) -> bool:
        if kind not in self._wanted:
            if len(self._wanted) > 10_000:
                self._wanted.clear()
            self._wanted[kind] = (
                self._untyped if kind is None else any(matches(p, kind) for p in self.subscription.events)
            )
        return self._wanted[kind]

    def _lost(self, count: int) -> None:
        """Tells of unread events that were trimmed; -1: of an unknown number."""
        if not count:
            return
        what = f"{count} unread events were" if count > 0 else "unread events (number unknown before Redis 7) were"
        self.sink.alarm(f"{what} trimmed from {self.channel.address} before {self.subscription.agent} read them")

    def _gone(self, count: int) -> None:
        if count:
            self.sink.alarm(f"{count} events that waited to run again were deleted from {self.channel.address}")

    def retry(self, delivery: Delivery, history: History, delay: float, done: Done) -> None:
        due = self._loop.time() + delay

        def stored(error: BaseException | None) -> None:
            if error is None and due < self._take_at:
                self._take_at = due
                self._unblock()
            done(error)

        self.give_back(cast(RedisDelivery, delivery), history, delay, "0", stored)

    # --- lease ------------------------------------------------------------------------------------------------

    async def _beat_on(self) -> None:
        while not self._closed:
            await asyncio.sleep(LEASE / 5 if self._unbroken else 0.3)
            try:
                await self._beat()
                self.trouble("beat", None)
            except BrokerError as error:
                self._unbroken = 0.0
                self.trouble("beat", str(error))
            except Exception as error:  # a mistake of ours: it must be seen, and the lease be kept
                _log.exception("a heartbeat of %s failed", self.me)
                self.trouble("beat", f"{type(error).__name__}: {error}")

    async def _beat(self, dead: Sequence[str] = ()) -> None:
        now, (last, clock) = self._loop.time(), self._beaten
        if now - last > LEASE / 2:
            self._unbroken = 0.0  # this process stood still, so others may have
        reap = bool(self._unbroken) and now - self._unbroken > LEASE
        expected = int(clock + 1000 * (now - last))
        age = int((self.channel.retention.max_age or 0) * 1000) if not self.channel.external else 0
        keys, sources = self.both_args
        head = (int(LEASE * 1000), int(reap), expected, age, len(dead), *dead)
        given_up, epoch, trimmed, gone, clock = await self.link.script(scripts.BEAT, keys, *head, *sources)
        if not self._unbroken or abs(clock - expected) > LEASE * 500:
            self._unbroken = now
        self._beaten = now, clock
        self._gone(gone)
        self.suspect = True
        self._wake.set()  # to look for what an answer lost
        if self.epoch is None:
            self.epoch = epoch
        elif epoch != self.epoch:
            await self.reclaim()
        elif given_up:
            await self.compare(force=False)
        if not self._counts and 0 <= self._trimmed < trimmed:
            self._lost(trimmed - self._trimmed)
        self._trimmed = trimmed

    def keep_alive(self) -> None:
        asyncio.run(self._beat_once())

    async def _beat_once(self) -> None:
        """In a thread and a loop of its own, with a connection of its own."""
        main = self.main
        link = self.connection.new_link()
        try:
            clock = await link.call(main.stream, "TIME")
            now = int(clock[0]) * 1000 + int(clock[1]) // 1000
            await link.call(main.stream, "ZADD", main.key("beat"), "XX", now, self.me)
        except BrokerError as error:
            _log.warning("no heartbeat while the loop is blocked: %s", error)
        finally:
            link.close()

    async def recover(self, left: Sequence[Left]) -> None:
        dead: set[str] = set()
        for one in left:
            number, place, owner = one.token.decode().split(" ", 2)
            dead.add(owner)
            origin, entry = self.both[int(number)], place.encode()
            kept = await self.link.script(scripts.HELD, [origin.stream], *origin.args, entry, owner)
            if kept is not None:
                before = history(entry, kept)
                after = self.sink.on_crash(before, one.ended)
                await self.put_back(origin, entry, owner, after.encode() if after != before else b"", 0)
        if dead:
            await self._beat(sorted(dead))
            self._take_at = 0.0

    # --- the end ----------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        if self._stopping:
            return
        self._stopping, self._free = True, 0
        self._wake.set()
        self._unblock()
        if self._tasks:
            await asyncio.wait([self._tasks[0]], timeout=3.0)

    async def close(self) -> None:
        if self._closed or not self._tasks:
            return
        await self.drain()
        self._closed = True
        for delivery in [one for origin in self.both for one in origin.live.values()]:
            self.give_back(delivery, None, 0, "", self.told)
        await self.pump.flush(3.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self.end()
        self.pump.listeners.discard(self._write_trouble)
        self._forget_reader()
        keys, sources = self.both_args
        with contextlib.suppress(BrokerError, TimeoutError):  # the lease ends what is left of us
            async with asyncio.timeout(3.0):
                await self.link.script(scripts.LEAVE, keys, *sources)
