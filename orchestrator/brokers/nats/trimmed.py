"""Notices events that the channel's limits removed before this subscription had read them.

JetStream says nothing of it: the consumer just goes on behind the gap. So a gap in what is delivered is compared with
where the stream now begins; and each worker looks every two seconds, and at its start, whether the
stream begins behind what was delivered last. What was lost is kept beside the histories, so that `status` knows it and
nobody is told twice.
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
    """Looks at one subscription. `exact`: it reads all that its stream takes, so that gaps can be counted."""

    def __init__(
        self, link: Link, publisher: Publisher, state: str, subject: str, exact: bool, alarm: Callable[[str], None]
    ) -> None:
        self._link = link
        self._publisher = publisher
        self._state = state
        self._subject = subject
        self._exact = exact
        self._alarm = alarm
        self._oldest = 0  # of a subscription that reads a part: the first event that was unread at the last look
        self._last = (0, 0)  # stream and consumer sequence of the newest delivery
        self._from, self._gap = 0, 0

    def delivered(self, stream_seq: int, consumer_seq: int) -> bool:
        """Told of the newest of each batch; True when something is missing before it, for which check() is due."""
        if not self._exact:
            return False
        seq, order = self._last
        gap = (stream_seq - seq) - (consumer_seq - order)
        self._last = (stream_seq, consumer_seq)
        if gap > 0:
            self._from = self._from or seq
            self._gap += gap
        return gap > 0

    async def check(self, stream: str) -> None:
        """Whether the gap that deliveries showed was trimmed, or removed one by one. Raises BrokerError."""
        start, gap = self._from, self._gap
        self._from = self._gap = 0
        first = await self._first(stream)
        if gap and first > start + 1:
            await self._remember(stream, start, first, gap)

    async def look(self, stream: str, consumer: Json) -> None:
        """`consumer` is a fresh CONSUMER.INFO. Raises BrokerError."""
        delivered = int(consumer["delivered"]["stream_seq"])
        first = await self._first(stream)
        if self._exact:
            self._last = max(self._last, (delivered, int(consumer["delivered"]["consumer_seq"])))
            if first - 1 > delivered:
                await self._remember(stream, delivered, first, first)
            return
        # events of other readers leave the stream too: only one that was seen waiting can have been lost
        if delivered < self._oldest < first:
            await self._remember(stream, self._oldest - 1, first, 1)
        self._oldest = 0
        filters = consumer["config"].get("filter_subjects") or [consumer["config"].get("filter_subject") or ">"]
        for subject in filters if consumer.get("num_pending") else ():
            raw = await self._link.message(stream, {"seq": delivered + 1, "next_by_subj": subject})
            if raw is not None:
                self._oldest = min(raw.seq, self._oldest or raw.seq)

    async def _first(self, stream: str) -> int:
        return int((await self._link.api(f"STREAM.INFO.{stream}"))["state"]["first_seq"])

    async def _remember(self, stream: str, seen: int, first: int, most: int) -> None:
        """Events after `seen` and before `first` were trimmed, at most `most` of them ours."""
        raw = await self._link.message(self._state, {"last_by_subj": self._subject})
        known: Json = json.loads(raw.body) if raw is not None else {"lost": 0, "upto": 0}
        lost = min(most, first - 1 - max(seen, int(known["upto"])))
        if lost <= 0:
            return
        body = json.dumps({"lost": int(known["lost"]) + lost, "upto": first - 1}).encode()
        header = f"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: {raw.seq if raw is not None else 0}\r\n\r\n"
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            if not stored.done():
                stored.set_exception(error) if error is not None else stored.set_result(None)

        self._publisher.publish(self._subject.encode(), header.encode(), body, self._state, done)
        try:
            await stored
        except BrokerError:
            return  # another replica has just said the same
        at_least = "" if self._exact else "at least "
        self._alarm(f"{at_least}{lost} unread events were trimmed from {stream}: raise its retention or read faster")
