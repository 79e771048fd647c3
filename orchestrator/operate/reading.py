"""Reading channels from outside, without disturbing any subscription: shared by tail, trace and the dlq commands."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator import wire
from orchestrator.brokers.base import Delivery, Start, Stored
from orchestrator.brokers.connections import Connections
from orchestrator.errors import OrchestratorError
from orchestrator.event import AgentEvent
from orchestrator.topology.model import Channel, Topology
from orchestrator.topology.units import seconds
from orchestrator.wire.codecs import only_type

_FIRST = datetime.fromtimestamp(0, UTC)  # before it no broker has events, and some take no times


@dataclass(frozen=True, slots=True)
class Read:
    """One stored message. `event` is None when it is no event, and `problem` says why; `letter` is what makes it a
    dead letter."""

    channel: Channel
    stored: Stored
    event: AgentEvent | None
    letter: wire.Letter | None
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """The event's own fields, and where it lies."""
        fields = self.event.model_dump(mode="json") if self.event else {"event_type": self.stored.event_type}
        place: dict[str, Any] = {
            "channel": self.channel.name,
            "position": self.stored.position,
            "stored_at": datetime.fromtimestamp(self.stored.time, UTC).isoformat() if self.stored.time else None,
        }
        if self.event is None:
            place |= {"problem": self.problem, "body": self.stored.body.decode("utf-8", "replace")}
        return {**fields, **place}


def decode(channel: Channel, stored: Stored, *, through: Channel | None = None) -> Read:
    """`through` is the channel whose codec wrote the body, when that is another (a dead letter's)."""
    letter = wire.parse(stored.headers)
    source = through or channel
    delivery = Delivery(
        body=stored.body,
        headers=wire.original_headers(stored.headers) if letter else stored.headers,
        event_type=stored.event_type,
        channel=source.name,
        position=letter.position if letter else stored.position,
        token=b"",
    )
    try:
        event = wire.decode(delivery, wire.codec(source.codec), only_type(source))
    except OrchestratorError as error:
        return Read(channel, stored, None, letter, error.message)
    return Read(channel, stored, event, letter)


async def dead_letters(topology: Topology, connections: Connections, channel: Channel) -> AsyncIterator[Read]:
    """Every dead letter of one channel, oldest first."""
    connection = await connections.get(channel.broker)
    async for stored in connection.browse(channel, start="earliest", dead_letters=True):
        letter = wire.parse(stored.headers)
        if letter is not None:
            yield decode(channel, stored, through=topology.channels.get(letter.channel))


async def follow(connections: Connections, channels: Sequence[Channel], *, start: Start) -> AsyncIterator[Read]:
    """The events of several channels, as they come, for ever. Of a channel that holds nothing but dead letters, those.

    Raises what reading any of them raises (BrokerUnavailable, ResourceMissing).
    """
    arrived: asyncio.Queue[Read | None] = asyncio.Queue(maxsize=1000)

    async def read(channel: Channel) -> None:
        async for each in _browse(connections, channel, start, follow=True):
            await arrived.put(each)

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for channel in channels:
                    group.create_task(read(channel))
        finally:
            await arrived.put(None)

    reader = asyncio.create_task(read_all())
    try:
        while (item := await arrived.get()) is not None:
            yield item
        try:
            await reader
        except* OrchestratorError as several:
            raise several.exceptions[0] from None
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def stored(connections: Connections, channels: Sequence[Channel], *, start: Start) -> AsyncIterator[Read]:
    """What several channels hold now, merged by the time at which the brokers stored it. Raises as `follow` does."""
    readers = [_browse(connections, channel, start, follow=False) for channel in channels]
    try:
        firsts = await asyncio.gather(*(anext(reader, None) for reader in readers), return_exceptions=True)
        waiting: list[tuple[float, int, Read]] = []
        for number, first in enumerate(firsts):
            if isinstance(first, BaseException):
                raise first
            if first is not None:
                waiting.append((first.stored.time, number, first))
        heapq.heapify(waiting)
        while waiting:
            _, number, read = waiting[0]
            yield read
            following = await anext(readers[number], None)
            if following is None:
                heapq.heappop(waiting)
            else:
                heapq.heapreplace(waiting, (following.stored.time, number, following))
    finally:
        for reader in readers:
            await reader.aclose()


async def _browse(
    connections: Connections, channel: Channel, start: Start, *, follow: bool
) -> AsyncGenerator[Read, None]:
    connection = await connections.get(channel.broker)
    letters = channel.dead_letters and not channel.events
    async for each in connection.browse(channel, start=start, follow=follow, dead_letters=letters):
        yield decode(channel, each)


def why_it_died(letter: wire.Letter) -> dict[str, Any]:
    """What `-o json` says of a dead letter, without its traceback."""
    return {
        "agent": letter.agent,
        "channel": letter.channel,
        "position": letter.position,
        "reason": letter.reason,
        "error_type": letter.error_type,
        "message": letter.message,
        "attempts": letter.attempts,
        "first_failed_at": letter.first_failed_at,
        "last_failed_at": letter.last_failed_at,
    }


def time_of_day(event: AgentEvent) -> str:
    """When it was published by the clock here: "12:00:00.000"."""
    moment = event.timestamp
    with contextlib.suppress(OverflowError):  # written by hand: year 1 began earlier elsewhere
        moment = moment.astimezone()
    return moment.strftime("%H:%M:%S.%f")[:-3]


def when(text: str) -> Start:
    """ "earliest", "latest", a duration ago ("15m"), or a time (RFC 3339; without a zone it is UTC).

    Raises OrchestratorError for anything else.
    """
    if text == "earliest":
        return "earliest"
    if text == "latest":
        return "latest"
    return _time(text, "write earliest, latest, a duration ago such as 15m, or 2026-01-31T12:00:00Z")


def moment(text: str) -> datetime:
    """A duration ago or a time. Raises OrchestratorError."""
    return _time(text, "write a duration ago such as 15m, or 2026-01-31T12:00:00Z")


def _time(text: str, hint: str) -> datetime:
    try:
        found = datetime.now(UTC) - timedelta(seconds=seconds(text))
    except ValueError:
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            raise OrchestratorError(f"not a time: {text!r}", hint=hint) from None
    return max(found if found.tzinfo else found.replace(tzinfo=UTC), _FIRST)


def duration(text: str) -> float:
    """ "30s" as 30.0. Raises OrchestratorError for anything that is no duration."""
    try:
        return seconds(text)
    except ValueError:
        raise OrchestratorError(f"not a duration: {text!r}", hint="write 200ms, 30s, 5m, 1h or 7d") from None
