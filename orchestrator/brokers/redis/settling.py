"""What one consumer holds, and the ends of it: settled, given back, marked, revoked; and what heals it.

Each end is one act of the COMMIT script, fenced by who holds the entry. What the script answers decides here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, cast

from orchestrator.brokers.base import FRESH, Delivery, Done, History, Outgoing, Sink
from orchestrator.brokers.redis import reading_scripts
from orchestrator.brokers.redis.entries import check, parse, refusal
from orchestrator.brokers.redis.pump import Acks, Op, Pump
from orchestrator.brokers.redis.scripts import Source, is_queue
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected
from orchestrator.topology.model import Channel, Subscription

if TYPE_CHECKING:
    from orchestrator.brokers.redis.connection import RedisConnection

_log = logging.getLogger(__name__)
#: What an act finds that had happened when its answer was lost.
_HAPPENED = {"ack": "GONE", "settle": "GONE", "back": "TAKEN"}
_ENDS = {"ack": "settling of", "settle": "output of", "back": "return of", "mark": "history of"}


class Origin(Source):
    """Where deliveries come from: the stream, or the inbox of redrives. What they have in common stands here."""

    acks: Acks | None = None  # the latest, which may take more

    def __init__(self, number: int, stream: str, group: str, me: str, channel: str, *, queue: bool) -> None:
        super().__init__(stream, group, me, queue=queue)
        self.channel = channel
        self.place = f"{stream}:"
        self.token = f"{number} ".encode(), f" {me}".encode()
        self.live: dict[bytes, RedisDelivery] = {}  # not settled


class RedisDelivery(Delivery):
    __slots__ = ("entry", "kept", "origin", "orphan")

    def __init__(self, origin: Origin, entry: bytes, flat: Sequence[bytes], count: int, kept: bytes | None) -> None:
        """Sets the border's fields itself: one is made for each event."""
        self.body, self.headers, self.event_type = parse(flat)
        before, after = origin.token
        self.channel = origin.channel
        self.position = origin.place + entry.decode()
        self.token = before + entry + after
        self.redelivered = count > 1
        self.history = history(entry, kept) if kept else FRESH
        self.origin = origin
        self.entry = entry
        self.kept = bool(kept)  # a history is stored
        self.orphan = False  # the stream was deleted under it: nothing is left to settle

    @property
    def time(self) -> float:  # type: ignore[override]  # seldom asked for
        return int(self.entry.partition(b"-")[0]) / 1000


def history(entry: bytes, kept: bytes) -> History:
    try:
        return History.decode(kept) if kept else FRESH
    except (ValueError, TypeError):
        _log.warning("the history of %s is unreadable and is begun anew", entry.decode())
        return FRESH


class Holdings:
    """The deliveries of one consumer that are not settled yet."""

    sink: Sink
    pump: Pump

    def __init__(self, connection: RedisConnection, subscription: Subscription, slot: str) -> None:
        self.connection, self.link, self.subscription = connection, connection.link, subscription
        self.channel: Channel = connection.topology.channels[subscription.channel]
        self.me = me = f"{slot}@{socket.gethostname()[:60]}.{os.getpid()}.{uuid.uuid4().hex[:6]}"
        stream, group, name = self.channel.address, subscription.group, self.channel.name
        self.main = Origin(0, stream, group, me, name, queue=is_queue(self.channel))
        self.inbox = Origin(1, self.main.key("inbox"), group, me, name, queue=True)
        self.both = self.main, self.inbox
        self.both_args = (  # as scripts get them: keys and arguments
            [source.stream for source in self.both],
            (2, *(part for source in self.both for part in source.args)),
        )
        self._passing = Source(stream, group, me, queue=False)
        self.suspect = True  # something may be pending under our name that is not known here
        self.last = "0-0"  # the newest entry that was read
        self.epoch: bytes | None = None  # changes when the group is made anew
        self._side: set[asyncio.Task[None]] = set()
        self._troubles: dict[str, str] = {}
        self._told: str | None = None

    def trouble(self, where: str, reason: str | None) -> None:
        if reason is None:
            self._troubles.pop(where, None)
        else:
            self._troubles[where] = reason
        now = next(iter(self._troubles.values()), None)
        if now != self._told:
            self._told = now
            self.sink.trouble(now)

    # --- ends -------------------------------------------------------------------------------------------------

    def settle(self, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        mine: RedisDelivery = delivery  # type: ignore[assignment]  # each event comes by here: no call of cast
        if outputs or mine.kept or mine.orphan:
            self._settle(mine, outputs, done)
            return
        acks = mine.origin.acks
        if acks is None or len(acks.settled) >= acks.room:
            acks = mine.origin.acks = Acks(self._answered, mine.origin)
            self.pump.add(acks)
        acks.settled.append((mine, done))

    def _settle(self, mine: RedisDelivery, outputs: Sequence[Outgoing], done: Done) -> None:
        try:
            for message in outputs:
                check(message)
        except PublishRejected as error:
            done(error)
            return
        here = self.link.slot(self.main.stream)
        if away := [one for one in outputs if self.link.slot(one.channel.address) != here]:
            # published with their ids first, settled when all are confirmed
            self._settle_after(mine, away, [one for one in outputs if one not in away], done)
        else:
            self._act("settle", mine, (int(mine.orphan), int(mine.kept)), done, outputs)

    def _settle_after(self, mine: RedisDelivery, away: list[Outgoing], near: list[Outgoing], done: Done) -> None:
        producer, errors, open_ = self.connection.producer(), list[BaseException](), len(away)

        def published(error: BaseException | None) -> None:
            nonlocal open_
            open_ -= 1
            if error is not None:
                errors.append(error)
            if open_ == 0:
                if errors:
                    done(errors[0])
                else:
                    self.settle(mine, near, done)

        for message in away:
            producer.send(message, published)

    def give_back(self, mine: RedisDelivery, history: History | None, delay: float, count: str, done: Done) -> None:
        """Puts an entry among those that wait. `count` "" keeps the number of its deliveries."""
        text = b"" if history is None else history.encode()
        self._act("back", mine, (self.me, text, int(delay * 1000), count), done)

    def mark(self, delivery: Delivery, history: History, done: Done) -> None:
        mine = cast(RedisDelivery, delivery)
        if mine.orphan:
            done(None)
        else:
            self._act("mark", mine, (history.encode(),), done)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """Gives back what was never started, uncounted."""
        for delivery in deliveries:
            mine = cast(RedisDelivery, delivery)
            self.give_back(mine, None, 0, "1" if mine.redelivered else "0", self.told)

    def skip(self, mine: RedisDelivery) -> None:
        """Settles what this group does not read, and leaves it in the stream."""

        def over(op: Op, word: str) -> None:
            self.suspect = self.suspect or word != ""

        self.pump.add(Op("settle", over, self._passing, (mine.entry, 0, int(mine.kept))))

    def told(self, error: BaseException | None) -> None:
        """The outcome of what nobody waits for. A failure leaves the entry under our name; adopt() finds it."""
        if error is not None:
            self.suspect = True

    def _act(
        self, act: str, mine: RedisDelivery, args: Sequence[object], done: Done, outputs: Sequence[Outgoing] = ()
    ) -> None:
        self.pump.add(Op(act, self._answered, mine.origin, (mine.entry, *args), outputs, mine, done))

    def _answered(self, op: Op, word: str) -> None:
        """What the script said of one act; every delivery's end comes through here."""
        mine: RedisDelivery = op.mine
        done = cast(Done, op.done)
        if word == "" or (op.again and word == _HAPPENED.get(op.act)):
            if op.act == "mark":
                mine.kept = True
            else:
                mine.origin.live.pop(mine.entry, None)
            done(None)
        elif op.act == "back" and (word == "DELETED" or mine.orphan):
            self.sink.alarm(f"{mine.position} was deleted from outside while it was handled: it cannot run again")
            mine.origin.live.pop(mine.entry, None)
            done(None)
        elif word == "TAKEN":
            self._revoke(mine, done)
        elif word == "GONE" or word.startswith("NOGROUP"):
            self.beside(self._doubt(op, done))
        else:
            if op.act == "mark":  # nobody runs it: it is given back
                mine.origin.live.pop(mine.entry, None)
                self.suspect = True
            done(refusal(word, f"the {_ENDS[op.act]} {mine.position}"))

    def _revoke(self, mine: RedisDelivery, done: Done) -> None:
        if mine.origin.live.pop(mine.entry, None) is not None:
            self.sink.revoked([mine])
        done(BrokerUnavailable(f"{mine.position} was taken over by another worker", hint="it is handled there"))

    # --- healing ----------------------------------------------------------------------------------------------

    async def _doubt(self, op: Op, done: Done) -> None:
        """Nobody holds an entry that is ours: settled elsewhere, or its group was deleted and made anew."""
        mine: RedisDelivery = op.mine
        try:
            if not mine.orphan and not await self.reclaim():
                self._revoke(mine, done)
                return
        except BrokerError:
            await asyncio.sleep(0.2)
        if mine.entry not in mine.origin.live:
            self._revoke(mine, done)
        elif op.act in ("ack", "settle"):
            self.settle(mine, op.outputs, done)
        elif op.act == "mark" and mine.orphan:
            done(None)
        else:
            self._act(op.act, mine, op.args[1:], done)

    async def reclaim(self) -> bool:
        """After the group was made anew: what we are handling becomes ours again. False: it is as it was."""
        main = self.main
        if main.group not in await self.connection.groups(main.stream):
            await self.heal()
        epoch = await self.link.call(main.stream, "HGET", f"{main.base}:meta", f"epoch/{main.group}") or b"0"
        if epoch == self.epoch:
            return False
        self.epoch = epoch
        await self.compare(force=True)
        return True

    async def compare(self, *, force: bool) -> None:
        """Who holds what we are handling? What another has is revoked."""
        for origin in self.both:
            live = list(origin.live.values())
            if not live:
                continue
            ids = [delivery.entry for delivery in live]
            args = (*origin.args, int(force), len(ids), *ids)
            holders = await self.link.script(reading_scripts.MINE, [origin.stream], *args)
            for delivery, holder in zip(live, holders, strict=True):
                if holder == 0 and force:
                    delivery.orphan = True
                elif holder != 1 and origin.live.pop(delivery.entry, None) is not None:
                    self.sink.revoked([delivery])

    async def heal(self) -> None:
        """Stream or group were deleted from outside."""
        try:
            made = await self.connection.restore(self.channel, self.subscription, self.last)
        except BrokerError as error:
            self.trouble("read", str(error))
            await asyncio.sleep(0.2)
            return
        if made:
            self.sink.alarm(f"{' and '.join(made)} had been deleted and was made again")

    async def adopt(self) -> None:
        """Entries that are pending under our name and unknown here were read by an answer that never arrived."""
        for origin in self.both:
            most = len(self.main.live) + len(self.inbox.live) + 500
            command = ("XPENDING", origin.stream, origin.group, "-", "+", most, self.me)
            try:
                found = await self.link.call(origin.stream, *command)
            except BrokerUnavailable:
                raise
            except BrokerError as error:
                if "NOGROUP" in str(error) and origin is self.main:
                    await self.heal()
                continue  # the inbox is made by the first redrive
            lost = [(entry, count) for entry, _, _, count in found if entry not in origin.live]
            # all are back before the reader goes on: it may be handed one of them again at once
            await asyncio.gather(*(self.put_back(origin, entry, self.me, b"", count - 1) for entry, count in lost))

    async def put_back(self, source: Source, entry: bytes, owner: str, history: bytes, count: int) -> None:
        """Makes what `owner` holds wait; nothing happens when it was settled or moved meanwhile."""
        over = asyncio.Event()
        self.pump.add(Op("back", lambda op, word: over.set(), source, (entry, owner, history, 0, count)))
        await over.wait()

    def beside(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine beside the reader; its failure is a broker that is away, which the reader reports."""

        async def guarded() -> None:
            try:
                await work
            except BrokerError as error:
                _log.debug("put off: %s", error)

        task = asyncio.get_running_loop().create_task(guarded())
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    async def end(self) -> None:
        """Stops what runs beside."""
        for task in self._side:
            task.cancel()
        if self._side:
            await asyncio.wait(self._side)
