"""Dead letters across brokers: find, group, mend, give back, throw away. The commands `dlq list|show|redrive|purge`.

A redrive goes to the subscription that failed and to no other: Connection.redrive first, and only when that is
confirmed Connection.remove of the letter. Killed in between, the event runs twice rather than never.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator import wire
from orchestrator.brokers.base import Outgoing
from orchestrator.brokers.connections import Connections
from orchestrator.errors import OrchestratorError
from orchestrator.event import position_id
from orchestrator.operate.publish import strict_json
from orchestrator.operate.reading import Read, dead_letters, why_it_died
from orchestrator.operate.session import session
from orchestrator.topology.model import Subscription, Topology

#: What an edit may change; the envelope stays what it was.
EDITABLE = ("payload", "metadata")

#: Redrives that are unconfirmed at a time.
TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters are meant; every part that is given must fit."""

    ids: tuple[str, ...] = ()  # event ids or their beginnings, or positions
    agent: str | None = None
    error: str | None = None  # text within "ErrorType: message" or the reason; case does not matter
    since: datetime | None = None  # by the last failure
    until: datetime | None = None

    def takes(self, read: Read) -> bool:
        """Whether this dead letter is meant."""
        letter = read.letter
        if letter is None or (self.agent is not None and letter.agent != self.agent):
            return False
        if self.ids and not any(_is(read, wanted) for wanted in self.ids):
            return False
        words = f"{letter.reason} {letter.error_type}: {letter.message}".lower()
        if self.error is not None and self.error.lower() not in words:
            return False
        died = _time(letter.last_failed_at)
        if self.since is not None and (died is None or died < self.since):
            return False
        return self.until is None or (died is not None and died <= self.until)

    def missing(self, found: Sequence[Read]) -> list[str]:
        """The ids that none of `found`, which is all that was selected, has."""
        return [wanted for wanted in self.ids if not any(_is(read, wanted) for read in found)]


@dataclass(frozen=True, slots=True)
class Group:
    """Dead letters of one agent with one error."""

    agent: str
    error: str
    count: int
    first: str
    last: str


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one dead letter; `problem` says why it stays."""

    read: Read
    problem: str = ""


async def search(topology: Topology, selection: Selection) -> list[Read]:
    """As find, with connections of its own."""
    async with session(topology, name="dlq") as connections:
        return await find(topology, connections, selection)


async def redrive_all(
    topology: Topology,
    found: Sequence[Read],
    changes: Mapping[tuple[str, ...], Any],
    *,
    rate: float | None = None,
    dry_run: bool = False,
) -> list[Result]:
    """As redrive, with connections of its own."""
    async with session(topology, name="dlq") as connections:
        return [r async for r in redrive(topology, connections, found, changes, rate=rate, dry_run=dry_run)]


async def purge_all(topology: Topology, found: Sequence[Read]) -> int:
    """Deletes dead letters for good; returns how many were still there."""
    async with session(topology, name="dlq") as connections:
        return await _remove(connections, found)


async def find(topology: Topology, connections: Connections, selection: Selection) -> list[Read]:
    """The selected dead letters of every dead-letter channel, oldest first in each."""
    return [
        read
        for channel in topology.channels.values()
        if channel.dead_letters
        async for read in dead_letters(topology, connections, channel)
        if selection.takes(read)
    ]


def groups(found: Iterable[Read]) -> list[Group]:
    """By agent and error, the largest first."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for read in found:
        if read.letter is not None:
            error = read.letter.error_type or read.letter.reason
            kinds.setdefault((read.letter.agent, error), []).append(read.letter.last_failed_at)
    made = [Group(agent, error, len(times), min(times), max(times)) for (agent, error), times in kinds.items()]
    return sorted(made, key=lambda g: -g.count)


def edits(assignments: Mapping[str, str]) -> dict[tuple[str, ...], Any]:
    """{"payload.x": "1"} as {("payload", "x"): 1}: JSON where it is JSON, else text.

    Raises OrchestratorError for anything but payload.… and metadata.….
    """
    made: dict[tuple[str, ...], Any] = {}
    for path, text in assignments.items():
        parts = tuple(path.split("."))
        if parts[0] not in EDITABLE or len(parts) < 2 or not all(parts):
            raise OrchestratorError(f"cannot set {path!r}", hint="write --set payload.<name>=… or metadata.<name>=…")
        try:
            made[parts] = strict_json(text)
        except (ValueError, RecursionError):
            made[parts] = text
    return made


async def redrive(
    topology: Topology,
    connections: Connections,
    found: Sequence[Read],
    changes: Mapping[tuple[str, ...], Any],
    *,
    rate: float | None = None,
    dry_run: bool = False,
) -> AsyncIterator[Result]:
    """Gives each back to the subscription where it failed, at most `rate` a second; yields what became of each.

    Every letter is prepared before the first is sent, so an edit that does not fit one of them changes nothing.
    Raises BrokerUnavailable when a broker goes away: what was not yielded by then is still a dead letter.
    """
    prepared = [(read, *_prepare(topology, read, changes)) for read in found]
    sendable = [(read, s, message) for read, s, message, _ in prepared if s is not None and message is not None]
    for read, _, message, problem in prepared:
        if message is None:
            yield Result(read, problem)
    size = 1 if rate else TOGETHER
    for start in range(0, len(sendable), size):
        chunk = sendable[start : start + size]
        if not dry_run:
            await _send(connections, chunk)
            if rate:
                await asyncio.sleep(1 / rate)
        for read, _, _ in chunk:
            yield Result(read)


async def _send(connections: Connections, chunk: Sequence[tuple[Read, Subscription, Outgoing]]) -> None:
    """Redrives a few at once, and removes the letters of those that were confirmed. Raises the first failure."""

    async def one(subscription: Subscription, message: Outgoing) -> None:
        await (await connections.get(subscription.broker)).redrive(subscription, message)

    ended = await asyncio.gather(*(one(s, message) for _, s, message in chunk), return_exceptions=True)
    await _remove(connections, [read for (read, _, _), error in zip(chunk, ended, strict=True) if error is None])
    for error in ended:
        if error is not None:
            raise error


def letter_json(read: Read, *, full: bool = False) -> dict[str, Any]:
    """The `-o json` form of one dead letter; `full` adds traceback and headers."""
    letter = read.letter
    assert letter is not None  # find() yields nothing else
    body: dict[str, Any] = {
        "event_id": read.event.event_id if read.event else None,
        "event_type": read.event.event_type if read.event else read.stored.event_type,
        "correlation_id": read.event.correlation_id if read.event else None,
        **why_it_died(letter),
        "truncated": letter.truncated,
        "dead_letter_channel": read.channel.name,
        "dead_letter_position": read.stored.position,
    }
    if full:
        body["traceback"] = letter.traceback
        body["headers"] = wire.original_headers(read.stored.headers)
        body["event"] = read.event.model_dump(mode="json") if read.event else None
        if read.event is None:
            body["body"] = read.stored.body.decode("utf-8", "replace")
    return body


def _prepare(
    topology: Topology, read: Read, changes: Mapping[tuple[str, ...], Any]
) -> tuple[Subscription | None, Outgoing | None, str]:
    letter = read.letter
    assert letter is not None  # find() yields nothing else
    if letter.truncated is not None:
        return None, None, f"its body was cut to fit ({letter.truncated} bytes once): publish the original again"
    agent, channel = topology.agents.get(letter.agent), topology.channels.get(letter.channel)
    subscription = next((s for s in agent.subscriptions if s.channel == letter.channel), None) if agent else None
    if channel is None or subscription is None:
        return None, None, f"agent {letter.agent} no longer reads {letter.channel}: bring it back, or purge this one"
    body, event = read.stored.body, read.event
    if changes:
        if event is None:
            return None, None, f"it cannot be edited ({read.problem})"
        event = copy.deepcopy(event)
        for path, value in changes.items():
            _put(getattr(event, path[0]), path[1:], value)
        body = wire.codec(channel.codec).encode(event)
    key = wire.value_at(event.model_dump(mode="json"), channel.key) if event else None
    return (
        subscription,
        Outgoing(
            channel=channel,
            body=body,
            event_type=(event.event_type if event else read.stored.event_type) or "unknown",
            event_id=event.event_id if event else position_id(letter.position),
            source_agent=event.source_agent if event else "",
            correlation_id=event.correlation_id if event else "",
            key="" if key is None else wire.key_text(key),
            headers=wire.original_headers(read.stored.headers),
            message_id=f"redrive:{read.stored.position}",
        ),
        "",
    )


def _put(fields: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        inner = fields.setdefault(name, {})
        if not isinstance(inner, dict):
            raise OrchestratorError(
                f"cannot set {'.'.join(path)}: {name} is {type(inner).__name__}, not an object",
                hint=f"set {name} as a whole, as JSON",
            )
        fields = inner
    fields[path[-1]] = value


async def _remove(connections: Connections, found: Sequence[Read]) -> int:
    by_channel: dict[str, list[Read]] = {}
    for read in found:
        by_channel.setdefault(read.channel.name, []).append(read)
    removed = 0
    for reads in by_channel.values():
        channel = reads[0].channel
        connection = await connections.get(channel.broker)
        removed += await connection.remove(channel, [read.stored.position for read in reads])
    return removed


def _is(read: Read, wanted: str) -> bool:
    positions = (read.stored.position, read.letter.position if read.letter else "")
    return wanted in positions or (read.event is not None and read.event.event_id.startswith(wanted))


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
