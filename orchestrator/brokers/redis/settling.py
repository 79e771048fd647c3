"""What one consumer holds, and the ends of it: settled, given back, marked, revoked; and what heals it.

Each end is one act of the COMMIT script, fenced by who holds the entry. What the script answers decides here.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, cast

from orchestrator.brokers.base import Delivery, Done, History, Outgoing, Sink
from orchestrator.brokers.redis import reading_scripts as scripts
from orchestrator.brokers.redis.pump import FIELDS, IN_FIELDS, Op, Pump, Source, check, is_queue, refusal
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected
from orchestrator.topology.model import Channel, Subscription

if TYPE_CHECKING:
    from orchestrator.brokers.redis.connection import RedisConnection

_log = logging.getLogger(__name__)
#: What an act finds that had happened when its answer was lost.
_HAPPENED = {"ack": "GONE", "settle": "GONE", "back": "TAKEN"}
_ENDS = {"ack": "settling of", "settle": "output of", "back": "return of", "mark": "history of"}

#: A script can write no more than some 4,000 fields. Of an entry with too many so few are kept that its dead letter,
#: which has them and its own, is below the limit.
_TOO_MANY, _KEPT = 1200, 1000
_USUAL = [name.encode() for name in FIELDS]
_OF_FIELDS = {field.encode(): header for header, field in IN_FIELDS.items()}


class RedisDelivery(Delivery):
    __slots__ = ("entry", "kept", "orphan", "source")

    def __init__(
        self, source: int, stream: str, channel: str, me: str, entry: bytes, flat: Sequence[bytes], history: History
    ) -> None:
        """Sets the border's fields itself: one is made for each event."""
        place = entry.decode()
        self.body, self.headers, self.event_type = parse(flat)
        self.channel = channel
        self.position = f"{stream}:{place}"
        self.token = f"{source} {place} {me}".encode()
        self.time = int(place.partition("-")[0]) / 1000
        self.redelivered = False
        self.history = history
        self.source = source  # 0 the stream, 1 the inbox
        self.entry = entry
        self.kept = False  # a history is stored
        self.orphan = False  # the stream was deleted under it: nothing is left to settle


def parse(flat: Sequence[bytes]) -> tuple[bytes, dict[str, str], str | None]:
    """Body, headers and event type of an entry, whoever wrote it; the type that the body names when no field does.
    Fields that are not text are surrogate-escaped, and those of an entry with too many are left out."""
    if flat[0:10:2] == _USUAL and len(flat) <= 2 * _TOO_MANY:  # as this package writes it
        body, event_type, rest = flat[9], str(flat[3], "utf-8", "replace"), iter(flat[10:])
        headers = {"event-id": _text(flat[1]), "source-agent": _text(flat[5]), "correlation-id": _text(flat[7])}
        if "" in headers.values():
            headers = {name: value for name, value in headers.items() if value}
        for name, value in zip(rest, rest, strict=False):
            headers[_text(name)] = _text(value)
        return body, headers, event_type
    body, kind, headers, known = b"", None, {}, {}
    pairs = iter(flat if len(flat) <= 2 * _TOO_MANY else _shortened(flat))
    for name, value in zip(pairs, pairs, strict=False):
        if name == b"payload":
            body = value
        elif name == b"event_type":
            kind = value.decode("utf-8", "replace")
        elif (header := _OF_FIELDS.get(name)) is not None:
            if value:
                known[header] = _text(value)
        else:
            headers[_text(name)] = _text(value)
    return body, {**known, **headers}, kind if kind is not None else _type_in(body)


def _text(value: bytes) -> str:
    return str(value, "utf-8", "surrogateescape")


def _shortened(flat: Sequence[bytes]) -> Sequence[bytes]:
    at = next((n for n in range(0, len(flat) - 1, 2) if flat[n] == b"payload"), 0)
    return [*flat[at : at + 2], *flat[: 2 * _KEPT]]


def _type_in(body: bytes) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    kind = found.get("event_type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None


class Holdings:
    """The deliveries of one consumer that are not settled yet."""

    sink: Sink
    pump: Pump

    def __init__(
        self,
        connection: RedisConnection,
        channel: Channel,
        subscription: Subscription,
        me: str,
        trouble: Callable[[str | None], None],
    ) -> None:
        self._connection, self._link, self._trouble = connection, connection.link, trouble
        self._channel, self._subscription, self.me = channel, subscription, me
        main = Source(channel.address, subscription.group, me, queue=is_queue(channel))
        self.sources = (main, Source(main.key("inbox"), subscription.group, me, queue=True))
        self.both = (  # as scripts get them: keys and arguments
            [source.stream for source in self.sources],
            (2, *(part for source in self.sources for part in source.args)),
        )
        self._passing = Source(channel.address, subscription.group, me, queue=False)
        self.live: dict[tuple[int, bytes], RedisDelivery] = {}
        self.suspect = True  # something may be pending under our name that is not known here
        self.last = "0-0"  # the newest entry that was read
        self.epoch: bytes | None = None  # changes when the group is made anew
        self._side: set[asyncio.Task[None]] = set()

    # --- ends -------------------------------------------------------------------------------------------------

    def settle(self, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        mine = cast(RedisDelivery, delivery)
        try:
            for message in outputs:
                check(message)
        except PublishRejected as error:
            done(error)
            return
        slot = self._link.slot
        here = slot(self._channel.address) if self._link.cluster else 0
        if self._link.cluster and (away := [one for one in outputs if slot(one.channel.address) != here]):
            # published with their ids first, settled when all are confirmed
            self._settle_after(mine, away, [one for one in outputs if one not in away], done)
        else:
            self._settle(mine, outputs, done)

    def _settle(self, mine: RedisDelivery, outputs: Sequence[Outgoing], done: Done) -> None:
        source = self.sources[mine.source]
        if outputs or mine.orphan or mine.kept:
            args = (mine.entry, int(mine.orphan), int(mine.kept))
            self.pump.add(Op("settle", self._answered, source, args, outputs, mine, done))
        else:
            self.pump.add(Op("ack", self._answered, source, (mine.entry,), (), mine, done))

    def _settle_after(self, mine: RedisDelivery, away: list[Outgoing], near: list[Outgoing], done: Done) -> None:
        producer, errors, open_ = self._connection.producer(), list[BaseException](), len(away)

        def published(error: BaseException | None) -> None:
            nonlocal open_
            open_ -= 1
            if error is not None:
                errors.append(error)
            if open_ == 0:
                if errors:
                    done(errors[0])
                else:
                    self._settle(mine, near, done)

        for message in away:
            producer.send(message, published)

    def give_back(self, mine: RedisDelivery, history: History | None, delay: float, count: str, done: Done) -> None:
        """Puts an entry among those that wait. `count` "" keeps the number of its deliveries."""
        text = b"" if history is None else history.encode()
        self._add("back", mine, (self.me, text, int(delay * 1000), count), done)

    def mark(self, mine: RedisDelivery, history: History, done: Done) -> None:
        if mine.orphan:
            done(None)
        else:
            self._add("mark", mine, (history.encode(),), done)

    def unstarted(self, mine: RedisDelivery) -> None:
        """Gives back what was never started, uncounted."""
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

    def _add(self, act: str, mine: RedisDelivery, args: Sequence[object], done: Done) -> None:
        self.pump.add(Op(act, self._answered, self.sources[mine.source], (mine.entry, *args), (), mine, done))

    def _answered(self, op: Op, word: str) -> None:
        """What the script said of one act; every delivery's end comes through here."""
        mine: RedisDelivery = op.mine
        done = cast(Done, op.done)
        if word == "" or (op.again and word == _HAPPENED.get(op.act)):
            if op.act == "mark":
                mine.kept = True
            else:
                self.live.pop((mine.source, mine.entry), None)
            done(None)
        elif op.act == "back" and (word == "DELETED" or mine.orphan):
            self.sink.alarm(f"{mine.position} was deleted from outside while it was handled: it cannot run again")
            self.live.pop((mine.source, mine.entry), None)
            done(None)
        elif word == "TAKEN":
            self._revoke(mine, done)
        elif word == "GONE" or word.startswith("NOGROUP"):
            self.beside(self._doubt(op, done))
        else:
            if op.act == "mark":  # nobody runs it: it is given back
                self.live.pop((mine.source, mine.entry), None)
                self.suspect = True
            done(refusal(word, f"the {_ENDS[op.act]} {mine.position}"))

    def _revoke(self, mine: RedisDelivery, done: Done) -> None:
        if self.live.pop((mine.source, mine.entry), None) is not None:
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
        if (mine.source, mine.entry) not in self.live:
            self._revoke(mine, done)
        elif op.act in ("ack", "settle"):
            self._settle(mine, op.outputs, done)
        elif op.act == "mark" and mine.orphan:
            done(None)
        else:
            self._add(op.act, mine, op.args[1:], done)

    async def reclaim(self) -> bool:
        """After the group was made anew: what we are handling becomes ours again. False: it is as it was."""
        main = self.sources[0]
        if main.group not in await self._connection.groups(main.stream):
            await self.heal()
        epoch = await self._link.call(main.stream, "HGET", f"{main.base}:meta", f"epoch/{main.group}") or b"0"
        if epoch == self.epoch:
            return False
        self.epoch = epoch
        for number, source in enumerate(self.sources):
            await self.compare(number, source, force=True)
        return True

    async def compare(self, number: int, source: Source, *, force: bool) -> None:
        """Who holds what we are handling? What another has is revoked."""
        live = [delivery for (where, _), delivery in self.live.items() if where == number]
        if not live:
            return
        ids = [delivery.entry for delivery in live]
        holders = await self._link.script(scripts.MINE, [source.stream], *source.args, int(force), len(ids), *ids)
        for delivery, holder in zip(live, holders, strict=True):
            if holder == 0 and force:
                delivery.orphan = True
            elif holder != 1 and self.live.pop((number, delivery.entry), None) is not None:
                self.sink.revoked([delivery])

    async def heal(self) -> None:
        """Stream or group were deleted from outside."""
        try:
            made = await self._connection.restore(self._channel, self._subscription, self.last)
        except BrokerError as error:
            self._trouble(str(error))
            await asyncio.sleep(0.2)
            return
        if made:
            self.sink.alarm(f"{' and '.join(made)} had been deleted and was made again")

    async def adopt(self) -> None:
        """Entries that are pending under our name and unknown here were read by an answer that never arrived."""
        for number, source in enumerate(self.sources):
            try:
                most = len(self.live) + 500
                found = await self._link.call(
                    source.stream, "XPENDING", source.stream, source.group, "-", "+", most, self.me
                )
            except BrokerUnavailable as error:
                raise ConnectionError(str(error)) from error
            except BrokerError as error:
                if "NOGROUP" in str(error) and number == 0:
                    await self.heal()
                continue  # the inbox is made by the first redrive
            lost = [(entry, count) for entry, _, _, count in found if (number, entry) not in self.live]
            # all are back before the reader goes on: it may be handed one of them again at once
            await asyncio.gather(*(self.put_back(source, entry, self.me, b"", count - 1) for entry, count in lost))

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
