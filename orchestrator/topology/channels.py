"""Meaning of channels: broker, address, defaults, schemas, and the index that routes event types to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.topology import spec
from orchestrator.topology.brokers import EMBEDDED, resolve_broker
from orchestrator.topology.diagnostics import Problems, listing, near
from orchestrator.topology.document import Document
from orchestrator.topology.model import Broker, Channel, Mode, Overflow, Retention
from orchestrator.topology.routing import Index, concrete, covers, minimal
from orchestrator.topology.schemas import Schemas
from orchestrator.topology.shape import Entry

_ADDRESS = {
    "nats": (r"[^\s.*>/\\]+\Z", "a stream name: no dots, spaces, slashes, * or >"),
    "kafka": (r"[A-Za-z0-9._-]+\Z", "a topic name: letters, digits, dots, - and _"),
}


@dataclass(slots=True)
class Channels:
    """What agents are resolved against. `routes` holds own channels, `lost` patterns that were dropped as wrong."""

    found: dict[str, Channel] = field(default_factory=dict)
    routes: Index[str] = field(default_factory=Index)
    doubtful: bool = False  # some channel's events could not be read: an unrouted type may be theirs


def resolve_brokers(document: Document, secrets: list[str], problems: Problems) -> dict[str, Broker]:
    """Every broker by name; one embedded NATS when the file names none."""
    if "brokers" in document.unreadable or document.broken.get("brokers") or document.brokers:
        out = {}
        for name, entry in document.brokers.items():
            broker = resolve_broker(entry, secrets, problems)
            if broker is None:
                document.broken["brokers"].add(name)
            else:
                out[name] = broker
        return out
    return {EMBEDDED.name: EMBEDDED}


def resolve_channels(
    document: Document, topology: str, brokers: Mapping[str, Broker], schemas: Schemas, problems: Problems
) -> Channels:
    """Every channel whose broker is known, and the routing index."""
    out = Channels(doubtful=bool(document.broken.get("channels")) or "channels" in document.unreadable)
    defaults = document.channel_defaults
    for name, entry in document.channels.items():
        out.doubtful = out.doubtful or "events" in entry.dropped
        broker = _broker(entry, defaults, document, brokers, problems)
        if broker is None:
            document.broken["channels"].add(name)
            out.doubtful = True
            continue
        channel = _channel(entry, defaults, topology, broker, schemas, problems)
        out.found[name] = channel
        if not channel.external:
            for pattern in channel.events:
                _route(out, pattern, entry, document, problems)
    _addresses(out.found, document, problems)
    return out


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
) -> Broker | None:
    said, at = entry.spec.broker, entry.at("broker")
    if said is None and "broker" in entry.dropped:
        return None
    if said is None and defaults is not None:
        if "broker" in defaults.dropped:
            return None
        said, at = defaults.spec.broker, defaults.at("broker")
    if said is not None:
        if said in brokers:
            return brokers[said]
        if not document.excused("brokers", said):
            document.broken["brokers"].add(said)  # said once is enough
            every = [*document.brokers, *(b for b in brokers if b not in document.brokers)]
            problems.error(
                "unknown-broker",
                f"there is no broker `{said}`",
                at,
                expected=listing(every) or "a name from `brokers:`",
                suggestion=near(said, every),
            )
        return None
    if len(brokers) == 1 and len(document.brokers) <= 1:
        return next(iter(brokers.values()))
    if not brokers:
        return None  # each was reported
    problems.error("missing-key", f"the channel `{entry.name}` has no `broker`", entry.key, expected=listing(brokers))
    return None


def _channel(
    entry: Entry[spec.ChannelSpec],
    defaults: Entry[spec.ChannelDefaultsSpec] | None,
    topology: str,
    broker: Broker,
    schemas: Schemas,
    problems: Problems,
) -> Channel:
    said, common = entry.spec, defaults.spec if defaults else spec.ChannelDefaultsSpec.model_construct()

    def pick(name: str, otherwise: object) -> object:
        own = getattr(said, name)
        if own is None and name not in entry.dropped:
            own = getattr(common, name, None)
        return otherwise if own is None else own

    events = minimal(said.events or ())
    mode = Mode(str(pick("mode", "log")))
    retention = _retention(said.retention or common.retention)
    overflow = pick("overflow", "reject" if mode is Mode.QUEUE else "drop_oldest")
    codec = str(pick("codec", "agent-event"))
    key = said.key or common.key
    if codec == "json" and "events" not in entry.dropped and (len(events) != 1 or not concrete(events[0])):
        problems.error(
            "codec",
            "codec json needs a channel of one event type, since the body does not name it",
            entry.at("codec") if said.codec else entry.key,
            expected="events: [one.type]",
        )
    window = said.dedup_window or common.dedup_window
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
        overflow=Overflow(str(overflow)),
        partitions=int(str(pick("partitions", 1))),
        key=key or "correlation_id",
        key_required=key is not None,
        replication=int(str(pick("replication", 1))),
        dedup_window=min(window or 120.0, retention.max_age or float("inf")),
        schemas=_schemas(entry, events, schemas, problems),
        codec=codec,
        protect=bool(pick("protect", False)),
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
    if pattern and not re.match(pattern, said):
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
