"""What a topology asks of Redis, and making it so: labels, streams and consumer groups.

A label lies in the hash beside its stream, so a script can compare it in the same step; a registry hash for each prefix
only says where to look for what the file no longer names.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from orchestrator.brokers.base import (
    Allowed,
    Desired,
    Lag,
    Observed,
    ResourceId,
    Setting,
    Start,
    Verdict,
)
from orchestrator.brokers.redis import resource_scripts
from orchestrator.brokers.redis.link import Link, base
from orchestrator.brokers.redis.scripts import Source, is_queue
from orchestrator.errors import BrokerError, RefusedError, ResourceMissing
from orchestrator.topology.model import Broker, Channel, Mode, Subscription, Topology, matches

_PAGE, _PAGES = 500, 8  # how far a backlog is looked through for the types that a group reads
_LOSSES = {
    "max_age": "events older than {} s",
    "max_events": "all but the newest {} events",
    "max_bytes": "all but the newest {} bytes",
}


def desired(topology: Topology, broker: Broker) -> list[Desired]:
    """Pure: streams first, then the groups on them."""
    found = [_channel(c) for c in topology.channels.values() if c.broker == broker.name]
    for agent in topology.agents.values():
        for sub in agent.subscriptions:
            channel = topology.channels[sub.channel]
            if channel.broker == broker.name:
                resource = ResourceId(broker.name, "subscription", f"{channel.address}/{sub.group}")
                found.append(Desired(resource, {"events": sub.events}, ("agents", agent.name, "subscribe")))
    return found


def _channel(channel: Channel) -> Desired:
    where, kept = ("channels", channel.name), channel.retention
    retention = {"max_age": kept.max_age, "max_events": kept.max_events, "max_bytes": kept.max_bytes}
    settings: dict[str, Setting] = {
        "mode": channel.mode.value,
        **retention,
        "overflow": channel.overflow.value,
        "dedup_window": channel.dedup_window,
    }
    return Desired(
        ResourceId(channel.broker, "channel", channel.address),
        {} if channel.external else settings,
        where,
        origins={name: (*where, "retention", name) if name in retention else (*where, name) for name in settings},
        external=channel.external,
        protect=channel.protect,
    )


def judge(kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
    """Pure: everything can be changed in place; less retention loses what it no longer keeps."""
    if setting == "mode" and new == Mode.QUEUE.value:
        return Verdict(loses="events that every reader has handled")
    if setting in _LOSSES and isinstance(new, (int, float)) and (not isinstance(old, (int, float)) or new < old):
        refuses = observed.settings.get("overflow") == "reject" and setting != "max_age"
        return Verdict() if refuses else Verdict(loses=_LOSSES[setting].format(new))
    if kind == "internal":
        return Verdict(Allowed.NEVER, why="made and removed with the subscription")
    return Verdict()


def position(start: Start) -> str:
    """The id after which reading begins."""
    if isinstance(start, datetime):
        return f"{max(0, int(start.timestamp() * 1000) - 1)}-18446744073709551615"
    return "0" if start == "earliest" else "$"


class Resources:
    """The part of a connection that makes, reads and removes resources for one topology."""

    def __init__(self, link: Link, topology: Topology, broker: Broker, version: tuple[int, ...]) -> None:
        self.link, self.topology, self.broker, self.version = link, topology, broker, version
        self._registry = f"{broker.prefix}orchestrator:registry"

    # --- looking ----------------------------------------------------------------------------------------------

    async def observe(self, wanted: Sequence[Desired]) -> list[Observed]:
        ids = {d.id: None for d in wanted}
        for field in await self.link.call(self._registry, "HKEYS", self._registry):
            owner, kind, name = field.decode().split(" ", 2)
            if owner == self.topology.name and kind in ("channel", "subscription"):
                ids[ResourceId(self.broker.name, kind, name)] = None
        found = [await self._observe(each) for each in ids]
        return [each for each in found if each is not None]

    async def _observe(self, resource: ResourceId) -> Observed | None:
        stream, group = _split(resource)
        if not await self.link.call(stream, "EXISTS", stream):
            return None
        found = await self.link.call(stream, "HGET", f"{base(stream)}:meta", _field(group))
        label = json.loads(found) if found else {}
        settings: dict[str, Setting] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in label.get("settings", {}).items()
        }
        owner, identity, protect = label.get("owner"), label.get("id", ""), bool(label.get("protect"))
        if not group:
            info = await self.stream_info(stream)
            size = await self.link.call(stream, "MEMORY", "USAGE", stream, "SAMPLES", 20) or 0
            version = f"{identity} {info['last-generated-id'].decode()}"
            return Observed(resource, settings, owner, version, info["length"], size, protect=protect)
        if group not in await self.groups(stream):
            return None
        left, exact = await self.backlog(stream, group, _patterns(settings))
        return Observed(resource, settings, owner, identity, left.waiting + left.in_flight + left.delayed, exact=exact)

    async def stream_info(self, stream: str) -> dict[str, Any]:
        """XINFO STREAM. Raises ResourceMissing."""
        found = await self._info("STREAM", stream)
        if not found:
            raise ResourceMissing(f"the stream {stream} does not exist", hint="run `orchestrator apply`")
        return _named(found)

    async def groups(self, stream: str) -> dict[str, dict[str, Any]]:
        """XINFO GROUPS by name; none when there is no stream."""
        return {group["name"].decode(): group for group in map(_named, await self._info("GROUPS", stream))}

    async def _info(self, what: str, stream: str) -> Sequence[Any]:
        try:
            return cast(Sequence[Any], await self.link.call(stream, "XINFO", what, stream))
        except BrokerError as error:
            if "no such key" in str(error):
                return ()
            raise

    async def backlog(self, stream: str, group: str, events: Sequence[str]) -> tuple[Lag, bool]:
        """A group's unsettled events, and whether that is exact. Raises ResourceMissing when there is no such group."""
        main = Source(stream, group, "", queue=False)
        inbox = Source(main.key("inbox"), group, "", queue=True)
        known = (await self.groups(stream)).get(group)
        if known is None:
            raise ResourceMissing(f"the group {group} of {stream} does not exist", hint="run `orchestrator apply`")
        last = known["last-delivered-id"].decode()
        waiting, exact, first = await self._unread(stream, last, known.get("lag"), events)
        pending, oldest = known["pending"], [first] if first else []
        if pending:  # what was read to be passed over is nobody's backlog
            page = await self.link.script(resource_scripts.KINDS, [stream], "-", "+", _PAGE, group)
            mine = [entry for entry, *of in page if _read_by(events, *of)]
            pending = len(mine) if pending <= _PAGE else pending
            oldest += mine[:1]
        delayed = await self.link.call(stream, "ZCARD", main.key("due"))
        again = (await self.groups(inbox.stream)).get(group)
        if again is not None:
            waiting += await self.link.call(stream, "XLEN", inbox.stream) - again["pending"]
            pending += again["pending"]
            delayed += await self.link.call(stream, "ZCARD", inbox.key("due"))
        lost = await self.link.call(stream, "HGET", f"{main.base}:meta", f"lost/{group}")
        since = min((int(place.partition(b"-")[0]) for place in oldest), default=0) / 1000
        age = max(0.0, await self.now() - since) if since else 0.0
        delayed = min(delayed, pending)
        return Lag(waiting, pending - delayed, delayed, age, int(lost or 0)), exact

    async def now(self) -> float:
        """By the server's clock."""
        seconds, micros = await self.link.call("", "TIME")
        return int(seconds) + int(micros) / 1e6

    async def _unread(self, stream: str, last: str, lag: Any, events: Sequence[str]) -> tuple[int, bool, bytes]:
        """Unread entries of the types that are read, whether that is exact, and the first one's id."""
        count, first, start = 0, b"", last
        for _ in range(_PAGES):
            page = await self.link.script(resource_scripts.KINDS, [stream], f"({start}", "+", _PAGE)
            mine = [entry for entry, *of in page if _read_by(events, *of)]
            count, first = count + len(mine), first or next(iter(mine), b"")
            if len(page) < _PAGE:
                return count, True, first
            start = page[-1][0].decode()
        if not isinstance(lag, int):  # Redis does not know
            lag = await self.link.call(stream, "XLEN", stream)
        return max(count, int(lag)), False, first

    # --- making -----------------------------------------------------------------------------------------------

    async def create(self, wanted: Desired) -> None:
        stream, group = _split(wanted.id)
        if wanted.external:
            await self.stream_info(stream)
            return
        start = "0"
        if group and (sub := self.subscription(stream, group)) is not None:
            start = position(sub.start)
        field = f"{self.topology.name} {wanted.id.kind} {wanted.id.name}"
        await self.link.call(self._registry, "HSET", self._registry, field, "1")
        try:
            await self._create(stream, group, self._new_label(wanted), start, adopt=False)
        except (RefusedError, ResourceMissing):
            await self.link.call(self._registry, "HDEL", self._registry, field)
            raise

    async def restore(self, channel: Channel, sub: Subscription | None, last: str) -> list[str]:
        """Makes again what somebody deleted, the group after `last`; answers what that was."""
        made = []
        for wanted in desired(self.topology, self.broker):
            stream, group = _split(wanted.id)
            if stream != channel.address or wanted.external or (group and (sub is None or group != sub.group)):
                continue
            if await self._create(stream, group, self._new_label(wanted), last, adopt=True) == "NEW":
                made.append(f"the group {group}" if group else f"the stream {stream}")
        return made

    async def _create(self, stream: str, group: str, label: str, start: str, *, adopt: bool) -> str:
        queue = any(is_queue(c) and c.address == stream for c in self.topology.channels.values())
        flags = (int(adopt), int(queue), int(self.version >= (7,)))
        args = (stream, base(stream), group, self.topology.name, label, start, *flags)
        word = (await self.link.script(resource_scripts.CREATE, [stream], *args)).decode()
        if word == "MISSING":
            raise ResourceMissing(f"the stream {stream} does not exist", hint="create it, or run `orchestrator apply`")
        self._refuse(word, f"the group {group} of {stream}" if group else f"the stream {stream}")
        return str(word)

    async def update(self, wanted: Desired, observed: Observed) -> None:
        stream, group = _split(wanted.id)
        identity = observed.version.partition(" ")[0]
        args = (_field(group), self.topology.name, identity, self._new_label(wanted))
        word = await self.link.script(resource_scripts.RELABEL, [f"{base(stream)}:meta"], *args)
        self._refuse(word.decode(), str(wanted.id))
        if group:
            await self._unstrand(stream, group, wanted, observed)
            return
        settings = wanted.settings
        if isinstance(settings["max_age"], (int, float)):
            tend = (stream, base(stream), int(settings["max_age"] * 1000), int(settings["mode"] == Mode.QUEUE.value))
            await self.link.script(resource_scripts.TEND, [stream], *tend)
        if settings["max_events"] is not None and settings["overflow"] != "reject":
            await self.link.call(stream, "XTRIM", stream, "MAXLEN", "=", settings["max_events"])
        if settings["mode"] == Mode.QUEUE.value and observed.settings.get("mode") == Mode.LOG.value:
            await self._drop_handled(stream)

    async def _drop_handled(self, stream: str) -> None:
        """A log becomes a queue: what every group has settled goes, as settling would have deleted it."""
        bounds = []
        for name, group in (await self.groups(stream)).items():
            first = (await self.link.call(stream, "XPENDING", stream, name))[1]
            left, right = (first or group["last-delivered-id"]).decode().split("-")
            bounds.append((int(left), int(right) + (0 if first else 1)))
        if bounds:
            await self.link.call(stream, "XTRIM", stream, "MINID", "=", "{}-{}".format(*min(bounds)))

    async def _unstrand(self, stream: str, group: str, wanted: Desired, observed: Observed) -> None:
        """The group reads more types of a queue now: those that it has already passed are given to it again."""
        channel = next((c for c in self.topology.channels.values() if c.address == stream), None)
        if channel is None or not is_queue(channel):
            return
        new, old = _patterns(wanted.settings), _patterns(observed.settings)
        last = (await self.groups(stream))[group]["last-delivered-id"].decode()
        start = "-"
        while page := await self.link.script(resource_scripts.KINDS, [stream], start, last, _PAGE):
            passed = [entry for entry, kind, _ in page if kind and _any(new, kind) and not _any(old, kind)]
            source = Source(stream, group, "", queue=True)
            await self.link.script(resource_scripts.STRANDED, [stream], *source.args, len(passed), *passed)
            start = f"({page[-1][0].decode()}"

    async def delete(self, observed: Observed) -> None:
        stream, group = _split(observed.id)
        identity, _, last = observed.version.partition(" ")
        most = observed.events
        if group in await self.groups(stream):  # beside what was read to be passed over
            page = await self.link.script(resource_scripts.KINDS, [stream], "-", "+", _PAGE, group)
            most += sum(not _read_by(_patterns(observed.settings), *of) for _, *of in page)
        args = (stream, base(stream), group, self.topology.name, identity, last, most)
        word = (await self.link.script(resource_scripts.DELETE, [stream], *args)).decode()
        self._refuse(word, str(observed.id))
        if not group and word == "DELETED":
            await self._forget_ids(stream)
        field = f"{self.topology.name} {observed.id.kind} {observed.id.name}"
        await self.link.call(self._registry, "HDEL", self._registry, field)

    async def _forget_ids(self, stream: str) -> None:
        """Ids of a deleted stream must not swallow what is published to its successor."""
        pattern = "".join(f"\\{c}" if c in "*?[]\\" else c for c in f"{base(stream)}:id:") + "*"
        cursor: object = b"0"
        while True:
            cursor, keys = await self.link.call(stream, "SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            if keys:
                await self.link.call(stream, "UNLINK", *keys)
            if cursor == b"0":
                return

    # --- small ------------------------------------------------------------------------------------------------

    def _new_label(self, wanted: Desired) -> str:
        """Each writing draws a new id: that is how a stale plan is noticed."""
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in wanted.settings.items()}
        label = {"owner": self.topology.name, "id": uuid.uuid4().hex, "settings": settings, "protect": wanted.protect}
        return json.dumps(label, separators=(",", ":"))

    def subscription(self, stream: str, group: str) -> Subscription | None:
        for agent in self.topology.agents.values():
            for sub in agent.subscriptions:
                if sub.group == group and self.topology.channels[sub.channel].address == stream:
                    return sub
        return None

    def _refuse(self, word: str, what: str) -> None:
        if word.startswith("FOREIGN"):
            raise RefusedError(
                f"{what} belongs to the topology {word.partition(' ')[2]!r}",
                hint="name another address or group, or declare the channel `external: true`",
            )
        if word == "UNLABELLED":
            raise RefusedError(
                f"{what} exists and is not ours", hint="name another address, or declare the channel `external: true`"
            )
        if word == "CHANGED":
            raise RefusedError(f"{what} was changed since it was looked at", hint="make a new plan")


def _split(resource: ResourceId) -> tuple[str, str]:
    """Stream and group ("" for a channel)."""
    if resource.kind == "channel":
        return resource.name, ""
    stream, _, group = resource.name.rpartition("/")
    return stream, group


def _field(group: str) -> str:
    """Where in the hash beside a stream the label is."""
    return f"group/{group}" if group else "channel"


def _named(flat: Sequence[Any]) -> dict[str, Any]:
    pairs = iter(flat)
    return {key.decode(): value for key, value in zip(pairs, pairs, strict=True)}


def _patterns(settings: Mapping[str, Setting]) -> tuple[str, ...]:
    events = settings.get("events", ())
    return events if isinstance(events, tuple) else ()


def _read_by(patterns: Sequence[str], kind: bytes | None, letter: int) -> bool:
    return not letter and (kind is None or _any(patterns, kind))


def _any(patterns: Sequence[str], kind: bytes) -> bool:
    return any(matches(pattern, kind.decode("utf-8", "replace")) for pattern in patterns)
