"""What a memory broker holds: channels with their events, and each subscription's position, pending events and
histories. Plain bookkeeping with the time given; who is told, and when, is hub.py's part.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.brokers.base import FRESH, Desired, History, Outgoing, Setting, Start
from orchestrator.topology.model import matches

#: Slack when a due time is compared with the clock: what a float of Unix seconds cannot tell apart.
TICK = 1e-6


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored event. `place` is its sequence number, or "r<number>" for a redrive to one subscription."""

    seq: int
    place: str
    body: bytes
    headers: Mapping[str, str]
    event_type: str | None
    time: float

    @property
    def dead_letter(self) -> bool:
        return "dlq-agent" in self.headers


class Member(Protocol):
    """A consumer, as a subscription sees it."""

    free: int
    alive_until: float  # its lease: what it holds goes to others afterwards

    def take(self, batch: list[Pending]) -> None: ...
    def lose(self, batch: list[Pending]) -> None: ...
    def tell(self, message: str) -> None: ...
    def missing(self, what: str) -> None: ...


@dataclass(slots=True)
class Pending:
    """An event that was handed out at least once, or redriven, and is not settled in this subscription."""

    entry: Entry
    history: History = FRESH
    holder: Member | None = None
    turn: int = 0  # counts hand-outs: a settlement of an earlier one is refused
    unaccounted: bool = False  # handed out before, and the history does not know of it
    due: float = 0.0  # waiting for its retry until then


@dataclass(slots=True)
class Group:
    """One subscription's position in one channel."""

    name: str
    owner: str | None
    events: tuple[str, ...]
    cursor: int  # sequence number of the first event never looked at
    version: int = 0
    pending: dict[str, Pending] = field(default_factory=dict)
    in_flight: dict[str, Pending] = field(default_factory=dict)  # of these, what somebody holds
    ready: list[tuple[int, str]] = field(default_factory=list)  # heap of what may be handed out again
    delayed: list[tuple[float, int, str]] = field(default_factory=list)  # heap of what waits for its retry
    members: list[Member] = field(default_factory=list)
    lost: int = 0  # trimmed before it was read, since creation
    unsaid: int = 0  # of these, not told to any member yet

    def wants(self, entry: Entry) -> bool:
        """A dead letter is nobody's input; without a type from the transport, the reader decides."""
        if entry.dead_letter:
            return False
        return entry.event_type is None or any(matches(p, entry.event_type) for p in self.events)

    def hold(self, pending: Pending, holder: Member) -> None:
        pending.holder, pending.due = holder, 0.0
        pending.turn += 1
        self.in_flight[pending.entry.place] = pending

    def forget(self, pending: Pending) -> None:
        pending.holder = None
        self.pending.pop(pending.entry.place, None)
        self.in_flight.pop(pending.entry.place, None)

    def give_back(self, pending: Pending, *, due: float = 0.0) -> None:
        pending.holder, pending.due = None, due
        self.in_flight.pop(pending.entry.place, None)
        if due:
            heapq.heappush(self.delayed, (due, pending.entry.seq, pending.entry.place))
        else:
            heapq.heappush(self.ready, (pending.entry.seq, pending.entry.place))

    def ripen(self, now: float) -> None:
        """Moves what has waited long enough to `ready`."""
        while self.delayed and self.delayed[0][0] <= now + TICK:
            due, _, place = heapq.heappop(self.delayed)
            pending = self.pending.get(place)
            if pending is not None and pending.due == due and pending.holder is None:
                self.give_back(pending)

    def next(self, log: Log) -> Pending | None:
        """The first event to hand out: given back ones before those never read."""
        while self.ready:
            _, place = heapq.heappop(self.ready)
            pending = self.pending.get(place)
            if pending is not None and pending.holder is None and not pending.due:
                return pending
        for entry in log.entries_from(self.cursor):
            self.cursor = entry.seq + 1
            if self.wants(entry):
                return self.pending.setdefault(entry.place, Pending(entry))
        return None

    def expire(self, now: float) -> list[tuple[Member, list[Pending]]]:
        """Takes back what is held by members whose lease has ended; returns it by holder."""
        ended: dict[int, tuple[Member, list[Pending]]] = {}
        for pending in list(self.in_flight.values()):
            holder = pending.holder
            if holder is not None and holder.alive_until <= now + TICK:
                ended.setdefault(id(holder), (holder, []))[1].append(pending)
                pending.unaccounted = True
                self.give_back(pending)
        return list(ended.values())

    def move(self, seq: int) -> None:
        """Reads on from `seq`; nothing that was handed out is waited for any more."""
        for pending in list(self.pending.values()):
            self.forget(pending)
        self.ready.clear()
        self.delayed.clear()
        self.cursor = seq

    def unread(self, log: Log) -> Iterator[Entry]:
        return (entry for entry in log.entries_from(self.cursor) if self.wants(entry))

    def idle(self, log: Log) -> bool:
        """Nothing waits, runs, or will be tried again."""
        return not self.pending and next(self.unread(log), None) is None


@dataclass(slots=True)
class Log:
    """One channel's events, oldest first."""

    address: str
    settings: dict[str, Setting]
    owner: str | None
    protect: bool
    identity: int  # differs when the channel is deleted and made again
    version: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)  # message id -> until when it is remembered
    scheduled: list[tuple[float, int, Outgoing]] = field(default_factory=list)  # heap of delayed publishes
    next_seq: int = 1
    size: int = 0  # bytes of all bodies

    def entries_from(self, seq: int) -> Iterator[Entry]:
        first = next(iter(self.entries), self.next_seq)
        for number in range(max(seq, first), self.next_seq):
            if (entry := self.entries.get(number)) is not None:
                yield entry

    def limit(self, name: str) -> float | None:
        value = self.settings.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def full_for(self, count: int, size: int) -> str | None:
        """Why `count` more events of `size` bytes in all do not fit, when the channel rejects."""
        if self.settings.get("overflow") != "reject":
            return None
        most, room = self.limit("max_events"), self.limit("max_bytes")
        if most is not None and len(self.entries) + count > most:
            return f"the channel {self.address} is full (max_events {most:.0f})"
        if room is not None and self.size + size > room:
            return f"the channel {self.address} is full (max_bytes {room:.0f})"
        return None

    def remembers(self, message_id: str, now: float) -> bool:
        while self.seen and (oldest := next(iter(self.seen.items())))[1] <= now:
            del self.seen[oldest[0]]
        return message_id in self.seen

    def append(self, body: bytes, headers: Mapping[str, str], event_type: str | None, now: float) -> Entry:
        entry = Entry(self.next_seq, str(self.next_seq), body, dict(headers), event_type, now)
        self.entries[entry.seq] = entry
        self.next_seq += 1
        self.size += len(body)
        return entry

    def drop(self, seq: int) -> bool:
        entry = self.entries.pop(seq, None)
        if entry is not None:
            self.size -= len(entry.body)
        return entry is not None

    def trim(self, now: float) -> None:
        """Applies retention; each subscription that had not read what goes counts it as lost."""
        age, most, room = self.limit("max_age"), self.limit("max_events"), self.limit("max_bytes")
        while self.entries:
            oldest = next(iter(self.entries.values()))
            if not (
                (age is not None and oldest.time + age <= now + TICK)
                or (most is not None and len(self.entries) > most)
                or (room is not None and self.size > room and len(self.entries) > 1)
            ):
                return
            self.drop(oldest.seq)
            for group in self.groups.values():
                if oldest.seq >= group.cursor and group.wants(oldest):
                    group.lost += 1
                    group.unsaid += 1

    def place_of(self, start: Start) -> int:
        """The sequence number at which reading from `start` begins."""
        if start == "latest":
            return self.next_seq
        if start == "earliest":
            return 1
        since = start.timestamp()
        return next((entry.seq for entry in self.entries.values() if entry.time >= since), self.next_seq)

    def due(self) -> float | None:
        """When the next thing happens here by itself: a scheduled event, the end of an event's time, a retry."""
        times = [self.scheduled[0][0]] if self.scheduled else []
        if self.entries and (age := self.limit("max_age")) is not None:
            times.append(next(iter(self.entries.values())).time + age)
        times += [group.delayed[0][0] for group in self.groups.values() if group.delayed]
        return min(times, default=None)


def new_log(desired: Desired, owner: str, identity: int) -> Log:
    return Log(desired.id.name, dict(desired.settings), owner, desired.protect, identity)
