"""The way out: acts (publish, settle, give back, mark) that the pump sends in order, many a script.

One publish is one message id, so the pump may send a batch again when it does not know what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from orchestrator.brokers.base import Done, Outgoing
from orchestrator.brokers.redis import scripts
from orchestrator.brokers.redis.link import ERRORS, Link, Wire, digest, passing
from orchestrator.brokers.redis.scripts import Source
from orchestrator.errors import OrchestratorError
from orchestrator.topology.model import Channel

_log = logging.getLogger(__name__)
_BATCH, _BATCH_BYTES = 32, 1 << 20
_ACKS = 64  # in one act


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

    def take(self) -> int:
        """It is about to be sent; answers how many outputs' worth of work it is."""
        return 1

    def parts(self) -> list[Op]:
        """What the script answers for, one by one."""
        return [self]

    def end(self, word: str) -> None:
        finish, self.finish = self.finish, _over
        try:
            finish(self, word)
        except Exception:  # a mistake of whoever waits for this one must not cost the others theirs
            _log.exception("the end of a %s could not be told", self.act)


def _over(op: Op, word: str) -> None:
    """It was told already."""


class Acks(Op):
    """Settlements without outputs, gathered until they are sent: one costs no more than its place in a list. What does
    not end well goes on as acts of their own."""

    __slots__ = ("room", "settled")

    def __init__(self, finish: Callable[[Op, str], None], source: Source) -> None:
        super().__init__("ack", finish, source)
        self.settled: list[tuple[Any, Done]] = []  # added to by the consumer, up to `room`
        self.room = _ACKS

    def take(self) -> int:
        self.room = 0
        self.args = [mine.entry for mine, _ in self.settled]
        return 1 + len(self.args) // 8

    def parts(self) -> list[Op]:
        return [Op("ack", self.finish, self.source, (mine.entry,), (), mine, done) for mine, done in self.settled]

    def end(self, word: str) -> None:
        if word:
            for part in self.parts():
                part.end(word)
        else:
            for mine, done in self.settled:
                mine.origin.live.pop(mine.entry, None)
                try:
                    done(None)
                except Exception:  # as above
                    _log.exception("the end of a settlement could not be told")
        self.settled = []


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
        self.listeners: set[Callable[[str | None], None]] = set()

    def add(self, op: Op) -> None:
        self._queue.append(op)
        self._turn_soon()

    async def flush(self, patience: float) -> None:
        """Returns when all is sent, or after `patience` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._idle.wait()

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
        batch, work, size = list[Op](), 0, 0
        while self._queue and work < _BATCH and size < _BATCH_BYTES:
            if batch and (batch[-1].alone or self._queue[0].alone):
                break
            op = self._queue.popleft()
            batch.append(op)
            work += op.take()
            for message in op.outputs:
                size += len(message.body)
        return batch

    def _send(self, wire: Wire, batch: list[Op]) -> None:
        first = batch[0]
        key = first.source.stream if first.source is not None else first.outputs[0].channel.address
        try:
            answer = wire.send(("EVALSHA", digest(scripts.COMMIT), 1, key, *scripts.pack(batch)))
        except Exception as error:  # a mistake of ours must not stop everything that is sent from here
            _log.exception("a batch of %d could not be sent", len(batch))
            for op in batch:
                op.end(f"{type(error).__name__}: {error}")
            return
        self._sent.append(batch)
        answer.add_done_callback(lambda answer: self._answered(batch, answer))

    def _answered(self, batch: list[Op], answer: asyncio.Future[list[Any]]) -> None:
        self._sent.remove(batch)
        error = answer.exception()
        found = [] if error is not None else answer.result()[0]
        if isinstance(found, ResponseError):
            error = found
        if error is not None:
            self._failed(batch, error)
        elif found:
            words = dict(zip(found[::2], found[1::2], strict=True))
            for number, op in enumerate(_parts(batch), 1):
                self._judge(op, words.get(number, b"").decode("utf-8", "replace").lstrip("-"))
        else:
            for op in batch:
                op.end("")
        if self._back:
            self._mend()
            return
        self._pause = 0.0
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
        parts, lasting = _parts(batch), not passing(error)
        for op in parts:
            op.again = True
            op.alone = op.alone or (lasting and len(parts) > 1)  # one of them is at fault: find out which
        if lasting and len(parts) == 1:
            self._judge(parts[0], word)
            return
        if not lasting:
            self._say(str(self._link.explain(error)))
        self._back += parts

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


def _parts(batch: list[Op]) -> list[Op]:
    return [part for op in batch for part in op.parts()]
