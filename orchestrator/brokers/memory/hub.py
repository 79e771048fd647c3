"""The memory broker itself: one Hub for each URL, shared by the connections of one process and one event loop.

It hands events to consumers by their demand, lets leases, retries and retention run out by the clock, and takes what
is published. A hub outlives its connections, as a broker outlives its clients; stop() and start() are its restart.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

from orchestrator import clock
from orchestrator.brokers.base import Desired, Outgoing
from orchestrator.brokers.memory.state import TICK, Entry, Group, Log, Member, Pending
from orchestrator.errors import PublishRejected, ResourceMissing

#: Bytes of one event's body that are still taken, unless the broker's `client: {max_body: …}` says otherwise.
MAX_BODY = 1024 * 1024


class Hub:
    def __init__(self, name: str) -> None:
        self.name = name
        self.max_body = MAX_BODY
        self.online = True
        self.logs: dict[str, Log] = {}
        self.inboxes: dict[str, Callable[[bytes, Mapping[str, str]], None]] = {}
        self.watchers: set[Callable[[], None]] = set()  # told after anything has changed, and on stop and start
        self.taps: list[Callable[[Log, Entry], None]] = []  # told of each event that is stored
        self._numbers = itertools.count(1)
        self._pumping = False
        self._timer: asyncio.TimerHandle | None = None

    def number(self) -> int:
        """A number that was never given out before: identities, inboxes, ties between equal times."""
        return next(self._numbers)

    def log(self, address: str) -> Log:
        if (found := self.logs.get(address)) is None:
            raise ResourceMissing(
                f"the channel {address} does not exist on {self.name}", hint="run `orchestrator apply` to create it"
            )
        return found

    def group(self, address: str, name: str) -> Group:
        if (found := self.log(address).groups.get(name)) is None:
            raise ResourceMissing(
                f"the subscription {address}/{name} does not exist on {self.name}",
                hint="run `orchestrator apply` to create it",
            )
        return found

    def delete_log(self, address: str) -> None:
        for name in list(self.logs[address].groups):
            self.delete_group(address, name)
        del self.logs[address]
        self.changed()

    def delete_group(self, address: str, name: str) -> None:
        group = self.logs[address].groups.pop(name)
        for member in group.members:
            member.missing(f"{address}/{name}")
        self.changed()

    # --- publishing -------------------------------------------------------------------------------------------

    def check(self, messages: Sequence[Outgoing]) -> list[Outgoing]:
        """The messages that will take effect; PublishRejected or ResourceMissing when one cannot."""
        now, fresh, ids = clock.now(), [], set()
        needs: dict[str, tuple[int, int]] = {}
        for message in messages:
            log = self.log(message.channel.address)
            if len(message.body) > self.max_body:
                raise PublishRejected(
                    f"{message.event_type} {message.event_id}: {len(message.body)} bytes are more than the "
                    f"{self.max_body} that {self.name} takes",
                    hint="publish a reference to the data instead of the data",
                    limit=self.max_body,
                )
            mark = (log.address, message.message_id)
            if log.limit("dedup_window") and (mark in ids or log.remembers(message.message_id, now)):
                continue
            ids.add(mark)
            fresh.append(message)
            count, size = needs.get(log.address, (0, 0))
            needs[log.address] = count + 1, size + len(message.body)
        for address, (count, size) in needs.items():
            if (why := self.logs[address].full_for(count, size)) is not None:
                raise PublishRejected(why, hint="let its reader catch up, or raise the channel's `retention:`")
        return fresh

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """All of them or, when one is refused, none."""
        now = clock.now()
        for message in self.check(messages):
            log = self.logs[message.channel.address]
            if window := log.limit("dedup_window"):
                log.seen[message.message_id] = now + window
            if message.delay > 0:
                heapq.heappush(log.scheduled, (now + message.delay, self.number(), message))
            else:
                self._store(log, message, now)
            log.trim(now)
        self.changed()

    def publish_raw(self, address: str, body: bytes, headers: Mapping[str, str], event_type: str | None) -> None:
        """What another program would put there: nothing is checked."""
        log = self.log(address)
        entry = log.append(body, headers, event_type, clock.now())
        for tap in self.taps:
            tap(log, entry)
        self.changed()

    def _store(self, log: Log, message: Outgoing, now: float) -> None:
        entry = log.append(message.body, message.headers, message.event_type, now)
        for tap in self.taps:
            tap(log, entry)

    def redrive(self, group: Group, log: Log, message: Outgoing) -> None:
        seq = log.next_seq
        entry = Entry(seq, f"r{self.number()}", message.body, dict(message.headers), message.event_type, clock.now())
        group.pending[entry.place] = Pending(entry)
        group.give_back(group.pending[entry.place])
        self.changed()

    # --- settling ---------------------------------------------------------------------------------------------

    def settled(self, log: Log, group: Group, pending: Pending) -> None:
        group.forget(pending)
        if log.settings.get("mode") == "queue" and pending.entry.place == str(pending.entry.seq):
            log.drop(pending.entry.seq)
        self.changed()

    # --- time and hand-out ------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something may be handed out or waited for: looks at it once in this turn of the loop."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def stop(self) -> None:
        """As a broker that is killed: what is stored stays, connections report trouble, leases run on."""
        self.online = False
        self._tell()

    def start(self) -> None:
        self.online = True
        self._tell()
        self.changed()

    def _pump(self) -> None:
        self._pumping = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.online:
            return
        now = clock.now()
        for log in list(self.logs.values()):
            while log.scheduled and log.scheduled[0][0] <= now + TICK:
                message = heapq.heappop(log.scheduled)[2]
                self._store(log, message, now)
            log.trim(now)
        dues = []
        for log in list(self.logs.values()):
            for group in list(log.groups.values()):
                dues += self._serve(log, group, now)
            if (due := log.due()) is not None:
                dues.append(due)
        if dues:
            self._timer = asyncio.get_running_loop().call_later(max(min(dues) - now, TICK), self._pump)
        self._tell()

    def _serve(self, log: Log, group: Group, now: float) -> list[float]:
        """Hands out what `group` can; returns when the leases of its holders end."""
        for holder, batch in group.expire(now):
            holder.lose(batch)
        group.ripen(now)
        if group.unsaid and group.members:
            for member in group.members:
                member.tell(
                    f"{group.unsaid} unread events were trimmed from {log.address} before {group.name} read them"
                )
            group.unsaid = 0
        self._hand_out(log, group)
        return [p.holder.alive_until for p in group.in_flight.values() if p.holder is not None]

    def _hand_out(self, log: Log, group: Group) -> None:
        """One event to each hungry member in turn, so that replicas share evenly."""
        batches: dict[int, tuple[Member, list[Pending]]] = {}
        hungry = [member for member in group.members if member.free > 0]
        while hungry:
            for member in list(hungry):
                if (pending := group.next(log)) is None:
                    hungry.clear()
                    break
                group.hold(pending, member)
                member.free -= 1
                batches.setdefault(id(member), (member, []))[1].append(pending)
                if member.free <= 0:
                    hungry.remove(member)
        if batches:
            first = group.members.pop(0)  # the next hand-out begins with another one
            group.members.append(first)
        for member, batch in batches.values():
            member.take(batch)

    def _tell(self) -> None:
        for watcher in list(self.watchers):
            watcher()

    # --- for orchestrator.testing -----------------------------------------------------------------------------

    def provide(self, desired: Desired) -> None:
        """Makes a channel that is somebody else's, so that a topology's external channels are there."""
        settings = {"mode": "log", **desired.settings}
        self.logs.setdefault(desired.id.name, Log(desired.id.name, settings, None, False, self.number()))

    def busy(self, groups: Sequence[tuple[str, str]]) -> list[str]:
        """Which of these subscriptions (address, name) have something to do, now or later, in words."""
        found = [f"{len(log.scheduled)} delayed for {log.address}" for log in self.logs.values() if log.scheduled]
        for address, name in groups:
            group, log = self.group(address, name), self.log(address)
            if not group.idle(log):
                unread = sum(1 for _ in group.unread(log))
                waiting = len(group.pending) - len(group.in_flight)
                found.append(f"{name}: {unread} unread, {len(group.in_flight)} in flight, {waiting} to be tried again")
        return found
