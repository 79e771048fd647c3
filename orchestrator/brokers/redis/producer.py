"""The way out: the pump that sends publishes and settlements in order, many a script, and what is built on it.

One publish is one message id, so the pump may send a batch again when it does not know what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from orchestrator.brokers.base import Done, Outgoing, Producer
from orchestrator.brokers.redis.entries import check, fields, parse
from orchestrator.brokers.redis.link import ERRORS, Link, base, passing
from orchestrator.errors import BrokerError, BrokerUnavailable, OrchestratorError, PublishRejected
from orchestrator.topology.model import Channel, Mode, Overflow

_log = logging.getLogger(__name__)
_BATCH, _BATCH_BYTES = 32, 1 << 20
_UNCONFIRMED = 4096
_REPLY_TTL = 60_000


class Op:
    """One act of the COMMIT script. `finish` is called once, with "" for done or the script's word for why not."""

    __slots__ = ("act", "again", "args", "finish", "forced", "healed", "outputs", "size", "source")

    def __init__(
        self,
        act: str,
        finish: Callable[[Op, str], None],
        source: Source | None = None,
        args: Sequence[object] = (),
        outputs: Sequence[Outgoing] | None = None,
    ) -> None:
        self.act, self.finish, self.source, self.args, self.outputs = act, finish, source, args, outputs
        self.again = False  # sent before, and nothing heard
        self.healed = False
        self.size = sum(len(message.body) + 512 for message in outputs or ()) + 128

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
    """Sends what is added, in order, one script at a time; what is added meanwhile goes with the next."""

    def __init__(self, link: Link, key: str, restore: Callable[[Channel], Awaitable[object]]) -> None:
        self._link, self._key, self._restore = link, key, restore
        self._queue: deque[Op] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.listeners: set[Callable[[str | None], None]] = set()
        self._troubled = False
        self._channels: dict[int, tuple[Channel, tuple[object, ...]]] = {}
        self._task = asyncio.get_running_loop().create_task(self._run(), name="redis pump")

    def add(self, op: Op) -> None:
        self._queue.append(op)
        self._idle.clear()
        self._wake.set()

    async def flush(self, patience: float) -> None:
        """Returns when all is sent, or after `patience` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), patience)

    async def close(self, patience: float) -> None:
        await self.flush(patience)
        self._task.cancel()
        await asyncio.wait([self._task])
        while self._queue:
            self._queue.popleft().end("CLOSED")

    async def _run(self) -> None:
        pause = 0.05
        while True:
            if not self._queue:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            batch = self._cut()
            try:
                waiting = await self._send(batch)
            except asyncio.CancelledError:
                self._queue.extendleft(reversed(batch))
                raise
            except Exception as error:  # a mistake of ours must not stop everything that is sent from here
                _log.exception("a batch of %d could not be sent", len(batch))
                waiting = []
                for op in batch:
                    op.end(f"{type(error).__name__}: {error}")
            self._queue.extendleft(reversed(waiting))
            if waiting:
                await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause) if waiting else 0.05

    def _cut(self) -> list[Op]:
        batch, size = [self._queue.popleft()], 0
        while self._queue and len(batch) < _BATCH and size < _BATCH_BYTES:
            batch.append(self._queue.popleft())
            size += batch[-1].size
        return batch

    async def _send(self, batch: list[Op]) -> list[Op]:
        """Sends a batch; returns what has to be sent again."""
        try:
            answers = await self._link.commit(batch_key(batch, self._key), self._pack(batch))
        except ERRORS as error:
            for op in batch:
                op.again = True  # what came before the one at fault has happened
            if passing(error):
                self._say(str(self._link.explain(error)))
                return batch
            if len(batch) > 1:  # one of them is at fault: find out which
                return [op for one in batch for op in await self._send([one])]
            answers = [str(error).encode()]
        waiting = []
        for op, answer in zip(batch, answers, strict=True):
            word = "" if answer == 1 else answer.decode("utf-8", "replace").lstrip("-")
            if passing(word) or (word.startswith("OOM") and op.outputs is None):
                self._say(f"{self._link.address}: {word}")
                waiting.append(op)
            elif word == "MISSING" and not op.healed and await self._heal(op):
                op.healed = True
                waiting.append(op)
            else:
                op.end(word)
        if not waiting:
            self._say(None)
        return waiting

    async def _heal(self, op: Op) -> bool:
        try:
            for message in op.outputs or ():
                if message.channel.external:
                    return False
                await self._restore(message.channel)
        except OrchestratorError:
            return False  # the op is refused with the word that it has
        return True

    def _say(self, reason: str | None) -> None:
        if reason is not None or self._troubled:
            self._troubled = reason is not None
            for listener in list(self.listeners):
                listener(reason)

    def _pack(self, batch: list[Op]) -> list[object]:
        channels: dict[int, int] = {}
        sources: dict[int, int] = {}
        heads: list[object] = []
        froms: list[object] = []
        body: list[object] = []
        for op in batch:
            source = op.source
            index = 0
            if source is not None:
                index = sources.get(id(source), 0)
                if not index:
                    index = sources[id(source)] = len(sources) + 1
                    froms += source.args
            body.append(op.act)
            body.append(index)
            body += op.args
            if op.outputs is None:
                continue
            body.append(len(op.outputs))
            for message in op.outputs:
                channel = message.channel
                number = channels.get(id(channel), 0)
                if not number:
                    number = channels[id(channel)] = len(channels) + 1
                    heads += self._head(channel)
                found = fields(message)
                body += (number, message.message_id, int(message.delay * 1000), len(message.body) + 100, len(found))
                body += found
        return [len(channels), *heads, len(sources), *froms, len(batch), *body]

    def _head(self, channel: Channel) -> tuple[object, ...]:
        known = self._channels.get(id(channel))
        if known is None:
            known = self._channels[id(channel)] = (channel, channel_args(channel))
        return known[1]


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


# --- the Protocol's producer ----------------------------------------------------------------------------------


class RedisProducer(Producer):
    def __init__(self, link: Link, pump: Callable[[str], Pump], channels: Sequence[Channel]) -> None:
        self._link, self._pump = link, pump
        self._streams = [channel.address for channel in channels]
        self._unconfirmed = 0
        self._room = asyncio.Event()
        self._replies: set[asyncio.Task[None]] = set()

    def send(self, message: Outgoing, done: Done) -> None:
        check(message)
        self._unconfirmed += 1

        def finish(op: Op, word: str) -> None:
            self._unconfirmed -= 1
            if self._unconfirmed < _UNCONFIRMED:
                self._room.set()
            done(refusal(word, f"{message.event_type} {message.event_id}") if word else None)

        self._pump(message.channel.address).add(Op("publish", finish, outputs=(message,)))

    @property
    def ready(self) -> bool:
        return self._unconfirmed < _UNCONFIRMED

    async def wait_ready(self) -> None:
        while not self.ready:
            self._room.clear()
            await self._room.wait()

    def reply(self, address: str, message: Outgoing, done: Done) -> None:
        check(message)
        # Whoever asks names the address, and may be less trusted than we are.
        if any(address == stream or address.startswith(f"{base(stream)}:") for stream in self._streams):
            raise PublishRejected(f"{address!r} is no reply address", hint="reply-to must be the asker's own stream")
        task = asyncio.get_running_loop().create_task(self._reply(address, message, done))
        self._replies.add(task)
        task.add_done_callback(self._replies.discard)

    async def _reply(self, address: str, message: Outgoing, done: Done) -> None:
        command = ("XADD", address, "NOMKSTREAM", "*", *fields(message))
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            try:
                await self._link.call(address, *command)  # nothing is added when the requester has gone
                return done(None)
            except BrokerUnavailable as error:
                if asyncio.get_running_loop().time() > deadline:
                    return done(error)
                await asyncio.sleep(0.2)
            except BrokerError as error:
                return done(PublishRejected(f"the reply to {address} was refused: {error}", hint=error.hint))


class Replies:
    """A process's reply inbox: a stream of its own that expires soon after the process has gone."""

    def __init__(self, link: Link, prefix: str, receive: Callable[[bytes, Mapping[str, str]], None]) -> None:
        self.address = f"{prefix}replies:{uuid.uuid4().hex}"
        self._link, self._receive = link, receive
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> str:
        await self._make()
        self._task = asyncio.get_running_loop().create_task(self._read(), name="redis replies")
        return self.address

    async def _make(self) -> None:
        if not await self._link.call(self.address, "EXISTS", self.address):
            await self._link.call(self.address, "XGROUP", "CREATE", self.address, "@new", "0", "MKSTREAM")
        await self._link.call(self.address, "PEXPIRE", self.address, _REPLY_TTL)

    async def _read(self) -> None:
        last, extended = b"0-0", 0.0
        client: Any = await self._link.fresh(self.address)
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    if loop.time() > extended + 5:
                        await self._make()
                        await self._link.call(self.address, "XTRIM", self.address, "MINID", "~", last)
                        extended = loop.time()
                    with self._link.translated():
                        found = await client.execute_command(
                            "XREAD", "COUNT", 256, "BLOCK", 1000, "STREAMS", self.address, last
                        )
                except BrokerError:  # the requests that wait time out; the inbox itself comes back
                    extended = 0.0
                    await asyncio.sleep(0.2)
                    continue
                for entry_id, flat in found[0][1] if found else ():
                    last = entry_id
                    body, headers, _ = parse(flat)
                    try:
                        self._receive(body, headers)
                    except Exception:  # one reply that cannot be read must not cost all others theirs
                        _log.exception("the reply %s could not be taken", entry_id)
        finally:
            await client.aclose()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        with contextlib.suppress(BrokerError):  # it expires by itself
            await self._link.call(self.address, "DEL", self.address)
