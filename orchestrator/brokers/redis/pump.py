"""The way out: acts (publish, settle, give back, mark) that the pump sends in order, many a script; and what an entry
looks like when it is written (contract section 3).

One publish is one message id, so the pump may send a batch again when it does not know what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from redis.exceptions import ResponseError

from orchestrator.brokers.base import Done, Outgoing
from orchestrator.brokers.redis import scripts
from orchestrator.brokers.redis.link import ERRORS, Link, Wire, base, digest, passing
from orchestrator.errors import BrokerError, BrokerUnavailable, OrchestratorError, PublishRejected
from orchestrator.topology.model import Channel, Mode, Overflow

_log = logging.getLogger(__name__)
_BATCH, _BATCH_BYTES = 32, 1 << 20
_SETTLING, _WRITING = ("ack", "settle"), ("publish", "settle")
FIELDS = ("event_id", "event_type", "source_agent", "correlation_id", "payload")
IN_FIELDS = {"event-id": "event_id", "source-agent": "source_agent", "correlation-id": "correlation_id"}
_SPECIAL = frozenset({*FIELDS, *IN_FIELDS})


class Op:
    """One act of the COMMIT script. `finish` is called once, with "" for done or the script's word for why not."""

    __slots__ = ("act", "again", "alone", "args", "done", "finish", "healed", "mine", "outputs", "source")

    def __init__(
        self,
        act: str,
        finish: Callable[[Op, str], None],
        source: Source | None = None,
        args: Sequence[object] = (),
        outputs: Sequence[Outgoing] = (),
        mine: Any = None,
        done: Done | None = None,
    ) -> None:
        self.act, self.finish, self.source, self.args, self.outputs = act, finish, source, args, outputs
        self.mine, self.done = mine, done  # for `finish`
        self.again = False  # sent before, and nothing heard
        self.alone = False  # a script that it was part of failed as a whole
        self.healed = False

    def end(self, word: str) -> None:
        finish, self.finish = self.finish, _over
        try:
            finish(self, word)
        except Exception:  # a mistake of whoever waits for this one must not cost the others theirs
            _log.exception("the end of a %s could not be told", self.act)


def _over(op: Op, word: str) -> None:
    """It was told already."""


class Source:
    """A stream as one consumer group reads it; `args` is how a script gets it."""

    def __init__(self, stream: str, group: str, me: str, *, queue: bool) -> None:
        self.stream, self.group, self.me = stream, group, me
        self.base = base(stream)
        self.args = (stream, self.base, group, me, int(queue))

    def key(self, what: str) -> str:
        return f"{self.base}:g:{self.group}:{what}"


class Pump:
    """Sends what is added: all of one turn of the loop in one script, and what is added while it runs in the next.
    While all goes well nothing is awaited; what fails waits at the front until a task has mended the cause."""

    def __init__(self, link: Link, key: str, restore: Callable[[Channel], Awaitable[object]]) -> None:
        self._link, self._key, self._restore = link, key, restore
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Op] = deque()
        self._sent: list[list[Op]] = []  # scripts under way
        self._back: list[Op] = []  # to be sent again, in order
        self._wire: Wire | None = None
        self._due = False
        self._unknown = False  # the server does not know the script
        self._pause = 0.0
        self._mending: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._troubled = self._closed = False
        self._packer = Packer()
        self.listeners: set[Callable[[str | None], None]] = set()

    def add(self, op: Op) -> None:
        self._queue.append(op)
        self._turn_soon()

    async def flush(self, patience: float) -> None:
        """Returns when all is sent, or after `patience` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), patience)

    async def close(self, patience: float) -> None:
        await self.flush(patience)
        self._closed = True
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.wait([self._mending])
        for op in [*(op for batch in self._sent for op in batch), *self._back, *self._queue]:
            op.end("CLOSED")
        self._queue.clear()
        self._back.clear()

    def _turn_soon(self) -> None:
        if not self._due:
            self._due = True
            self._idle.clear()
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._due = False
        if self._mending is None and self._queue:
            if self._wire is None or self._wire.closed:
                self._mend()
                return
            while self._queue and (not self._sent or (len(self._sent) == 1 and len(self._queue) > _BATCH)):
                self._send(self._wire, self._cut())
        self._rest()

    def _rest(self) -> None:
        if not self._queue and not self._sent and self._mending is None:
            self._idle.set()

    def _cut(self) -> list[Op]:
        batch, size = [self._queue.popleft()], 0
        while self._queue and len(batch) < _BATCH and size < _BATCH_BYTES:
            if batch[-1].alone or self._queue[0].alone:
                break
            op = self._queue.popleft()
            batch.append(op)
            for message in op.outputs:
                size += len(message.body)
        return batch

    def _send(self, wire: Wire, batch: list[Op]) -> None:
        try:
            ops, args = self._packer.pack(batch)
            answer = wire.send(("EVALSHA", digest(scripts.COMMIT), 1, batch_key(batch, self._key), *args))
        except Exception as error:  # a mistake of ours must not stop everything that is sent from here
            _log.exception("a batch of %d could not be sent", len(batch))
            for op in batch:
                op.end(f"{type(error).__name__}: {error}")
            return
        self._sent.append(ops)
        answer.add_done_callback(lambda answer: self._answered(ops, answer))

    def _answered(self, batch: list[Op], answer: asyncio.Future[list[Any]]) -> None:
        self._sent.remove(batch)
        error = answer.exception()
        found = [] if error is not None else answer.result()[0]
        if error is None and isinstance(found, ResponseError):
            error, found = found, []
        if error is not None:
            self._failed(batch, error)
        elif found:
            words = dict(zip(found[::2], found[1::2], strict=True))
            for number, op in enumerate(batch, 1):
                self._judge(op, words.get(number, b"").decode("utf-8", "replace").lstrip("-"))
        else:
            for op in batch:
                op.end("")
        if self._back:
            self._mend()
            return
        self._pause = 0.0
        if self._troubled:
            self._say(None)
        if self._queue:
            self._turn_soon()  # after what these answers let others ask for
        self._rest()

    def _failed(self, batch: list[Op], error: BaseException) -> None:
        """The script as a whole failed; what came before the act at fault may have happened."""
        word = str(error)
        if word.startswith("NOSCRIPT"):
            self._unknown = True
            self._back += batch
            return
        for op in batch:
            op.again = True
        if passing(error):
            self._link.doubt(error)
            self._say(str(self._link.explain(error)))
            self._back += batch
        elif len(batch) > 1:  # one of them is at fault: find out which
            for op in batch:
                op.alone = True
            self._back += batch
        else:
            self._judge(batch[0], word)

    def _judge(self, op: Op, word: str) -> None:
        if not word:
            op.end("")
        elif passing(word) or _obstructed(op, word):
            self._say(f"{self._link.address} refused: {word}")
            self._back.append(op)
        elif word == "MISSING" and not op.healed and not any(message.channel.external for message in op.outputs):
            self._back.append(op)
            op.healed = True
        else:
            op.end(word)

    def _mend(self) -> None:
        if self._mending is None and not self._closed:
            self._mending = self._loop.create_task(self._mend_on(), name="redis pump")

    async def _mend_on(self) -> None:
        """Until the server can be asked again: connects, loads the script, makes deleted streams anew."""
        try:
            while not await self._mended():
                pass
        except Exception as error:  # a mistake of ours: it must be seen, and sending must go on
            _log.exception("sending could not be mended")
            self._say(f"{type(error).__name__}: {error}")
            await asyncio.sleep(1.0)
        finally:
            self._mending = None
        self._queue.extendleft(reversed(self._back))
        self._back.clear()
        self._turn()

    async def _mended(self) -> bool:
        await asyncio.sleep(self._pause)
        if self._sent:
            self._pause = self._pause or 0.01
            return False  # what is under way may fail too, and its place is behind what has failed
        self._pause = min(1.0, 2 * self._pause or 0.05)
        try:
            self._wire = await self._link.at(self._key)
            if self._unknown:
                await self._wire.ask("SCRIPT", "LOAD", scripts.COMMIT)
                self._unknown, self._pause = False, 0.0
        except ERRORS as error:
            self._link.doubt(error)
            self._say(str(self._link.explain(error)))
            return False
        for op in self._back:
            if op.healed:
                with contextlib.suppress(OrchestratorError):  # it is refused with the word that it gets again
                    for message in op.outputs:
                        await self._restore(message.channel)
        return True

    def _say(self, reason: str | None) -> None:
        if reason is not None or self._troubled:
            self._troubled = reason is not None
            for listener in list(self.listeners):
                listener(reason)


def _obstructed(op: Op, word: str) -> bool:
    """Whether memory or rights are lacking without which nothing can be settled: the operator's to mend. Outputs that
    find no room are their handler's failure."""
    if op.source is None:
        return False
    if op.outputs:
        return word.startswith(("NOPERM", "NOAUTH"))
    return word.startswith(("OOM", "NOPERM", "NOAUTH")) or "can't run this command" in word


class Packer:
    """Arranges acts for the COMMIT script: what they have in common is said once."""

    def __init__(self) -> None:
        self._channels: dict[int, tuple[Channel, tuple[object, ...]]] = {}

    def pack(self, batch: list[Op]) -> tuple[list[Op], list[object]]:
        """The acts in the order of their numbers, and the script's arguments."""
        self._heads: list[object] = []
        self._shapes: list[object] = []
        self._numbers: dict[object, int] = {}
        self._counts = [0, 0]
        sources: dict[Source, list[Any]] = {}  # number; first and last entry to be settled, and how many
        acks: dict[Source, list[Op]] = {}
        others: list[Op] = []
        for op in batch:
            source = op.source
            if source is None:
                others.append(op)
                continue
            known = sources.get(source)
            if known is None:
                known = sources[source] = [len(sources) + 1, b"", b"", 0]
                acks[source] = []
            (acks[source] if op.act == "ack" else others).append(op)
            if op.act in _SETTLING:
                entry = op.args[0]
                known[1] = known[1] or entry
                known[2] = entry
                known[3] += 1
        body: list[object] = []
        ops, acts = list[Op](), len(others)
        for source, some in acks.items():
            if some:
                acts += 1
                ops += some
                body += ("ack", sources[source][0], len(some))
                body += [op.args[0] for op in some]
        for op in others:
            body += (op.act, 0 if op.source is None else sources[op.source][0])
            body += op.args
            if op.act in _WRITING:
                self._outputs(op.outputs, body)
        froms: list[object] = [len(sources)]
        for source, (_, first, last, count) in sources.items():
            froms += source.args
            froms += (first, last, 2 * count + 16 if count else 0)
        channels, shapes = self._counts
        return ops + others, [channels, *self._heads, shapes, *self._shapes, *froms, acts, *body]

    def _outputs(self, outputs: Sequence[Outgoing], body: list[object]) -> None:
        body.append(len(outputs))
        for message in outputs:
            headers = headers_of(message)
            plain = message.message_id == message.event_id and not message.delay
            shape = (id(message.channel), plain, *headers)
            body.append(self._numbers.get(shape) or self._shape(shape, message.channel, plain, headers))
            if not plain:
                body += (message.message_id, int(message.delay * 1000))
            body += (
                message.event_id, message.event_type, message.source_agent, message.correlation_id, message.body,
                *headers.values(),
            )  # fmt: skip

    def _shape(self, shape: object, channel: Channel, plain: bool, headers: Mapping[str, str]) -> int:
        number = self._numbers.get(id(channel))
        if number is None:
            known = self._channels.get(id(channel))
            if known is None:
                known = self._channels[id(channel)] = (channel, channel_args(channel))
            self._heads += known[1]
            self._counts[0] += 1
            number = self._numbers[id(channel)] = self._counts[0]
        self._counts[1] += 1
        self._shapes += (number, int(plain), len(FIELDS) + len(headers), *FIELDS, *headers)
        self._numbers[shape] = self._counts[1]
        return self._counts[1]


def batch_key(batch: list[Op], default: str) -> str:
    """A key of the batch's slot."""
    for op in batch:
        if op.source is not None:
            return op.source.stream
        if op.outputs:
            return op.outputs[0].channel.address
    return default


def channel_args(channel: Channel) -> tuple[object, ...]:
    """A channel as COMMIT gets it. What is external is never trimmed, bounded or emptied."""
    kept = channel.retention
    bounds = (kept.max_events or 0, kept.max_bytes or 0, int((kept.max_age or 0) * 1000))
    return (
        channel.address,
        base(channel.address),
        int(channel.dedup_window * 1000),
        *((0, 0, 0) if channel.external else bounds),
        int(is_queue(channel)),
        int(channel.overflow is Overflow.REJECT),
    )


def is_queue(channel: Channel) -> bool:
    """Whether settling deletes."""
    return channel.mode is Mode.QUEUE and not channel.external


def refusal(word: str, what: str) -> BrokerError:
    """The error for a word of COMMIT that refuses an output."""
    if word == "CLOSED":
        return BrokerUnavailable(f"the connection was closed before {what} was confirmed", hint="publish it again")
    if word == "FULL":
        return PublishRejected(f"{what} was refused: the channel is full", hint="raise retention, or add readers")
    if word.startswith("LARGE"):
        limit = int(word.split()[1])
        return PublishRejected(f"{what} is larger than max_bytes", hint="raise retention.max_bytes", limit=limit)
    if word == "MISSING":
        return PublishRejected(f"{what} was refused: its stream does not exist", hint="run `orchestrator apply`")
    return PublishRejected(f"{what} was refused: {word}", hint="look at the server's state and permissions")


# --- entries ----------------------------------------------------------------------------------------------------------


def headers_of(message: Outgoing) -> Mapping[str, str]:
    """The fields that an entry has beside FIELDS."""
    headers = message.headers
    if _SPECIAL.isdisjoint(headers):
        return headers
    found = {}
    for name, value in headers.items():
        if name in IN_FIELDS and value == getattr(message, IN_FIELDS[name]):
            continue
        found[f"x-{name}" if name in FIELDS else name] = value
    return found


def fields(message: Outgoing) -> list[str | bytes]:
    """All fields and values (contract section 3)."""
    found: list[str | bytes] = [
        "event_id", message.event_id, "event_type", message.event_type, "source_agent", message.source_agent,
        "correlation_id", message.correlation_id, "payload", message.body,
    ]  # fmt: skip
    for name, value in headers_of(message).items():
        found += (name, value)
    return found


_good_types: set[str] = set()


def check(message: Outgoing) -> None:
    """Raises PublishRejected for names and headers that not every broker's wire could carry."""
    kind = message.event_type
    if kind not in _good_types:
        if not kind or any(c in "*>" or c.isspace() or not c.isprintable() for c in kind):
            raise PublishRejected(f"{kind!r} is no event type", hint="use letters, digits, _ - and dots")
        if len(_good_types) < 10_000:
            _good_types.add(kind)
    for text in (message.event_id, message.source_agent, message.correlation_id):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise PublishRejected(f"{text!r} is no text that UTF-8 can carry", hint="use another id")
    for name, value in message.headers.items():
        if name.isidentifier() and value.isprintable():
            continue  # the usual case
        if not name or any(c in "\r\n\0:" for c in name) or any(c in "\r\n\0" for c in value):
            raise PublishRejected(f"the header {name!r} holds a line break or a colon", hint="take it out")
