"""Meaning of channels: broker, address, defaults, schemas, and the index that routes event types to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.topology import spec
from orchestrator.topology.brokers import EMBEDDED, resolve_broker, stand_in
from orchestrator.topology.diagnostics import Problems, listing
from orchestrator.topology.document import Document
from orchestrator.topology.model import Broker, Channel, Mode, Overflow, Retention
from orchestrator.topology.near import near
from orchestrator.topology.nodes import List, Scalar
from orchestrator.topology.routing import Index, concrete, covers, minimal
from orchestrator.topology.schemas import Schemas
from orchestrator.topology.shape import Entry

_ADDRESS = {
    "nats": (r"[^\s.*>/\\]+\Z", "a stream name: no dots, spaces, slashes, * or >"),
    "kafka": (r"[A-Za-z0-9._-]+\Z", "a topic name: letters, digits, dots, - and _"),
}


@dataclass(slots=True)
class Channels:
    """What agents are resolved against. `routes` holds the patterns of own channels."""

    found: dict[str, Channel] = field(default_factory=dict)
    routes: Index[str] = field(default_factory=Index)
    outside: Index[str] = field(default_factory=Index)  # patterns of external channels
    doubts: set[str] = field(default_factory=set)  # first tokens of patterns that were dropped as wrong; "*" is all

    _patterns: tuple[str, ...] | None = None

    def patterns(self) -> tuple[str, ...]:
        """Every pattern of every own channel."""
        if self._patterns is None:
            self._patterns = tuple(p for c in self.found.values() for p in c.events if not c.external)
        return self._patterns

    def doubtful(self, pattern: str) -> bool:
        """Whether `pattern` may be unrouted only because of an error that was reported."""
        return "*" in self.doubts or pattern.split(".")[0] in self.doubts


def resolve_brokers(document: Document, problems: Problems) -> dict[str, Broker]:
    """Every broker by name; one embedded NATS when the file names none."""
    if document.brokers or document.broken.get("brokers") or "brokers" in document.unreadable:
        out = {name: stand_in(name) for name in document.broken.get("brokers", ())}
        return out | {n: resolve_broker(entry, problems) for n, entry in document.brokers.items()}
    return {EMBEDDED.name: EMBEDDED}


def resolve_channels(
    document: Document, topology: str, brokers: Mapping[str, Broker], schemas: Schemas, problems: Problems
) -> Channels:
    """Every channel whose broker is known, and the routing index."""
    out = Channels()
    if document.broken.get("channels") or "channels" in document.unreadable:
        out.doubts.add("*")
    defaults = document.channel_defaults
    for name, entry in document.channels.items():
        out.doubts |= _doubts(entry)
        broker = _broker(entry, defaults, document, brokers, problems)
        channel = _channel(entry, defaults, topology, broker, schemas, problems)
        out.found[name] = channel
        for pattern in channel.events:
            if channel.external:
                out.outside.add(pattern, name)
            else:
                _route(out, pattern, entry, document, problems)
    _addresses(out.found, document, problems)
    return out


def _doubts(entry: Entry[spec.ChannelSpec]) -> set[str]:
    if "events" not in entry.dropped:
        return set()
    said = entry.whole.get("events")
    items = said.items if isinstance(said, List) else []
    good = set(entry.spec.events or ())
    texts = [item.text if isinstance(item, Scalar) else "*" for item in items]
    return {text.split(".")[0] for text in texts if text not in good} or {"*"}


def _route(out: Channels, pattern: str, entry: Entry[spec.ChannelSpec], document: Document, problems: Problems) -> None:
    at = entry.at("events", (entry.spec.events or []).index(pattern))
    for other, owner in out.routes.overlapping(pattern):
        if owner == entry.name:
            problems.error(
                "overlap",
                f"`{pattern}` and `{other}` of one channel share event types",
                at,
                expected="patterns that share nothing, or one that covers both",
            )
        else:
            first = document.channels[owner].at("events").mark
            problems.error(
                "overlap",
                f"`{pattern}` shares event types with `{other}` of the channel `{owner}` ({first})",
                at,
                expected="each event type in exactly one channel",
            )
        break
    out.routes.add(pattern, entry.name)


def _broker(
    entry: Entry[spec.ChannelSpec],
    defaults: Entry[spec.ChannelDefaultsSpec] | None,
    document: Document,
    brokers: Mapping[str, Broker],
    problems: Problems,
) -> Broker:
    said, at = entry.spec.broker, entry.at("broker")
    lost = "broker" in entry.dropped
    if said is None and not lost and defaults is not None:
        said, at, lost = defaults.spec.broker, defaults.at("broker"), "broker" in defaults.dropped
    if said is not None and said in brokers:
        return brokers[said]
    if said is not None and not document.excused("brokers", said):
        document.broken.setdefault("brokers", set()).add(said)  # once is enough
        hint = near(said, brokers)
        problems.error("unknown-broker", f"there is no broker `{said}`", at, expected=listing(brokers), suggestion=hint)
    if said is None and len(brokers) == 1:
        return next(iter(brokers.values()))
    if said is None and not lost and "brokers" not in document.unreadable:
        problems.error(
            "missing-key", f"the channel `{entry.name}` has no `broker`", entry.key, expected=listing(brokers)
        )
    return stand_in(said or "")


def _channel(
    entry: Entry[spec.ChannelSpec],
    defaults: Entry[spec.ChannelDefaultsSpec] | None,
    topology: str,
    broker: Broker,
    schemas: Schemas,
    problems: Problems,
) -> Channel:
    said, common = entry.spec, defaults.spec if defaults else spec.ChannelDefaultsSpec.model_construct()

    def pick(name: str, otherwise: Any) -> Any:
        own = getattr(said, name)
        if own is None and name not in entry.dropped and name not in entry.node.entries:
            own = getattr(common, name, None)
        return otherwise if own is None else own

    events = minimal(said.events or ())
    mode = Mode(pick("mode", "log"))
    retention = _retention(pick("retention", None))
    overflow = pick("overflow", "reject" if mode is Mode.QUEUE else "drop_oldest")
    codec = pick("codec", "agent-event")
    key = pick("key", None)
    if codec == "json" and "events" not in entry.dropped and (len(events) != 1 or not concrete(events[0])):
        problems.error(
            "codec",
            "codec json needs a channel of one event type, since the body does not name it",
            entry.at("codec") if said.codec else entry.key,
            expected="events: [one.type]",
        )
    window = pick("dedup_window", 120.0)
    if said.dedup_window and retention.max_age and said.dedup_window > retention.max_age:
        problems.error(
            "dedup-window",
            "dedup_window is longer than what the channel keeps",
            entry.at("dedup_window"),
            expected="at most retention.max_age",
        )
    return Channel(
        name=entry.name,
        broker=broker.name,
        address=_address(entry, topology, broker, problems),
        mode=mode,
        events=events,
        retention=retention,
        overflow=Overflow(overflow),
        partitions=pick("partitions", 1),
        key=key or "correlation_id",
        key_required=key is not None,
        replication=pick("replication", 1),
        dedup_window=min(window, retention.max_age or float("inf")),
        schemas=_schemas(entry, events, schemas, problems),
        codec=codec,
        protect=pick("protect", False),
        external=bool(said.external),
    )


def _retention(said: spec.RetentionSpec | None) -> Retention:
    return Retention(said.max_age, said.max_events, said.max_bytes) if said else Retention()


def derived(topology: str, broker: Broker, name: str, *, tagged: bool = False) -> str:
    """The default address or group of `name`. On NATS dots become hyphens (a stream or durable has none); on Redis
    an address starts with a hash tag, so that all keys of one topology lie in one slot."""
    if broker.kind == "redis" and tagged:
        return f"{{{broker.prefix}{topology}}}-{name}"
    text = f"{broker.prefix}{topology}-{name}"
    return text.replace(".", "-") if broker.kind == "nats" else text


def _address(entry: Entry[spec.ChannelSpec], topology: str, broker: Broker, problems: Problems) -> str:
    said = entry.spec.address
    if said is None:
        return entry.name if entry.spec.external else derived(topology, broker, entry.name, tagged=True)
    pattern, expected = _ADDRESS.get(broker.kind, (r"", ""))
    if pattern and not entry.spec.external and not re.match(pattern, said):
        problems.error(
            "address", f'"{said}" cannot be an address on {broker.kind}', entry.at("address"), expected=expected
        )
    return said


def _schemas(
    entry: Entry[spec.ChannelSpec], events: tuple[str, ...], schemas: Schemas, problems: Problems
) -> dict[str, Mapping[str, object]]:
    out: dict[str, Mapping[str, object]] = {}
    for event_type, schema in (entry.spec.schemas or {}).items():
        at = entry.at("schemas", event_type)
        if not concrete(event_type):
            problems.error("schema", f"`{event_type}` is a pattern", at, expected="one event type")
        elif events and "events" not in entry.dropped and not any(covers(p, event_type) for p in events):
            problems.error(
                "schema",
                f"`{event_type}` is no event type of this channel",
                at,
                expected=listing(events),
                suggestion=near(event_type, [e for e in events if concrete(e)]),
            )
        found = schemas.load(schema, at)
        if found is not None:
            out[event_type] = found
    return out


def _addresses(channels: Mapping[str, Channel], document: Document, problems: Problems) -> None:
    taken: dict[tuple[str, str], str] = {}
    for name, channel in channels.items():
        first = taken.setdefault((channel.broker, channel.address), name)
        if first != name:
            entry = document.channels[name]
            at = entry.at("address") if entry.spec.address else entry.key
            message = f"the channels `{first}` and `{name}` have the same address {channel.address}"
            problems.error("address", message, at, expected="an address of its own for each channel")
