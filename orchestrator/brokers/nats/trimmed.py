"""Notices events that the channel's limits removed before this subscription had read them.

JetStream says nothing of it: the consumer just goes on behind the gap. So the first worker of an agent looks every two
seconds, and at its start, whether the stream now begins behind what was delivered last. What was lost is kept beside
the histories, so that `status` knows it and nobody is told twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from orchestrator.brokers.nats.client import Json, Link
from orchestrator.brokers.nats.producer import Publisher
from orchestrator.errors import BrokerError

LOST = "lost"  # last token of the subject, where the histories have a sequence


class Trimmed:
    """Looks at one subscription."""

    def __init__(
        self, link: Link, publisher: Publisher, state: str, root: str, queue: bool, alarm: Callable[[str], None]
    ) -> None:
        self._link = link
        self._publisher = publisher
        self._state = state
        self._subject = f"{root}{LOST}"
        self._queue = queue
        self._alarm = alarm
        self._oldest = 0  # in a queue: the first event that was unread when we last looked

    async def look(self, stream: str, consumer: Json) -> None:
        """`consumer` is a fresh CONSUMER.INFO. Raises BrokerError."""
        first = int((await self._link.api(f"STREAM.INFO.{stream}"))["state"]["first_seq"])
        delivered = int(consumer["delivered"]["stream_seq"])
        filters = consumer["config"].get("filter_subjects") or [consumer["config"].get("filter_subject") or ">"]
        if self._queue:
            # others' events leave a queue too: only one that we saw waiting can have been lost to us
            gone = 1 if delivered < self._oldest < first else 0
            self._oldest = 0
            if consumer.get("num_pending"):
                for subject in filters:
                    raw = await self._link.message(stream, {"seq": delivered + 1, "next_by_subj": subject})
                    if raw is not None:
                        self._oldest = min(raw.seq, self._oldest or raw.seq)
            words = "unread events were trimmed"
        else:
            gone = first - 1 - delivered
            words = f"{'' if filters == ['>'] else 'up to '}{{}} unread events were trimmed"
        if gone > 0:
            await self._remember(stream, first, delivered, gone, words)

    async def _remember(self, stream: str, first: int, delivered: int, gone: int, words: str) -> None:
        raw = await self._link.message(self._state, {"last_by_subj": self._subject})
        known: Json = json.loads(raw.body) if raw is not None else {"lost": 0, "upto": 0}
        if not self._queue:
            gone = first - 1 - max(delivered, int(known["upto"]))
        if gone <= 0:
            return
        body = json.dumps({"lost": int(known["lost"]) + gone, "upto": first - 1}).encode()
        expected = raw.seq if raw is not None else 0
        header = f"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: {expected}\r\n\r\n".encode()
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            if not stored.done():
                stored.set_exception(error) if error is not None else stored.set_result(None)

        self._publisher.publish(self._subject.encode(), header, body, self._state, done)
        try:
            await stored
        except BrokerError:
            return  # another host has just said the same
        self._alarm(f"{words.format(gone)} from {stream}: raise the channel's retention or read faster")
