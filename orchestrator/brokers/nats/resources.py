"""What things are called on the server, headers, what a topology asks for, and what a change of it means. Pure.

Walk `apply`, second step; streams.py carries out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from orchestrator.brokers.base import Allowed, Desired, Observed, ResourceId, Setting, Verdict
from orchestrator.errors import PublishRejected
from orchestrator.topology.model import Broker, Channel, Mode, Overflow, Subscription, Topology

ACK_WAIT = 30.0  # seconds: the lease of a delivery
_LETTER_WINDOW = 3600.0  # seconds: longer than ack_wait and an outage, so that a dead letter is written once

#: Headers of an event that waits in the stream of delayed ones: where it goes, under which id.
LATER_SUBJECT, LATER_ID = "Nats-Orchestrator-Subject", "Nats-Orchestrator-Id"
LATER_CHANNEL = "Nats-Orchestrator-Channel"
#: Last token of the subject that counts unread events which were trimmed, where the histories have a sequence.
LOST = "lost"
#: Header of a redriven event: its type.
REDRIVEN_TYPE = "Nats-Orchestrator-Type"

SUBJECT = re.compile(r"[^\s.*>\x00-\x1f\x7f]+(\.[^\s.*>\x00-\x1f\x7f]+)*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f%]")
_LINE_BREAK = re.compile(r"[\r\n\x00]")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNSAFE = re.compile(r"[\s.*>/\\\x00-\x1f\x7f]")


# --- names ----------------------------------------------------------------------------------------------------


def safe(name: str) -> str:
    """`name` as a stream or durable may be called: dots, blanks, slashes and wildcards become underscores."""
    return _UNSAFE.sub("_", name)


def letters_root(channel: Channel) -> str:
    """Dead letters lie under `<address>.<agent>.<event type>`: no pattern of an event type reaches them."""
    return ".".join(safe(token) for token in channel.address.split(".") if token)


@lru_cache(4096)
def subject_of(event_type: str, prefix: str) -> bytes:
    """Where events of a type are published. Raises PublishRejected for what is no subject."""
    if not SUBJECT.fullmatch(event_type) or event_type.startswith("$"):
        raise PublishRejected(
            f"the event type {event_type!r} is no NATS subject",
            hint="use words joined by dots, without spaces, * and >",
        )
    return f"{prefix}{event_type}".encode()


class Names:
    """What the resources of one topology on one broker are called."""

    relay = "relay"  # the consumer of the delayed events

    def __init__(self, topology: Topology, broker: Broker) -> None:
        self.scope = safe(broker.prefix + topology.name)
        self.state = f"KV_{self.scope}-state"
        self.inbox = f"{self.scope}-inbox"
        self.later = f"{self.scope}-later"
        self.later_root = f"$ORCHESTRATOR.later.{self.scope}."

    # of one subscription: its channel's stream, and its own durable in it

    def histories(self, stream: str, durable: str) -> str:
        """Prefix of the subjects that hold its histories; the stream sequence follows."""
        return f"$KV.{self.scope}-state.{stream}.{durable}."

    def redriven(self, stream: str, durable: str) -> tuple[str, str]:
        """(subject, consumer) of its redriven events in the inbox."""
        return f"$ORCHESTRATOR.inbox.{self.scope}.{durable}--{stream}", f"{durable}--{stream}"

    def bell(self, stream: str, durable: str) -> str:
        """Rung when a redriven event lies in the inbox: workers pull from there only after that."""
        return f"$ORCHESTRATOR.bell.{self.scope}.{durable}--{stream}"


# --- headers --------------------------------------------------------------------------------------------------


@lru_cache(4096)
def _sendable(name: str) -> bool:
    return _TOKEN.fullmatch(name) is not None


@lru_cache(4096)
def is_public(name: str) -> bool:
    """Whether a header of this name is the event's own and can be sent: Nats-* are mechanics of the wire."""
    return _sendable(name) and not name.lower().startswith("nats-")


def headers_of(block: bytes | None, wanted: Callable[[str], bool] = _sendable) -> dict[str, str]:
    """The headers of a block as text; names that no one could send again are left out."""
    found: dict[str, str] = {}
    if block:
        for line in block.decode("utf-8", "surrogateescape").split("\r\n")[1:]:
            name, colon, value = line.partition(":")
            if colon and wanted(name):
                found[name] = value.strip()
    return found


def public_headers(block: bytes | None) -> dict[str, str]:
    return headers_of(block, is_public)


def status_of(block: bytes | None) -> tuple[int, str]:
    """(code, words) of an inline status such as `NATS/1.0 503`, or (0, "")."""
    if block is None or not block.startswith(b"NATS/1.0 "):
        return 0, ""
    line = block[9 : block.find(b"\r\n")].decode("ascii", "replace")
    code = line[:3]
    return (int(code), line[4:].strip()) if code.isdigit() else (0, line)


def head(message_id: str, correlation_id: str, headers: dict[str, str], extra: str = "") -> bytes:
    """The header block. Ids are escaped where they could break a line; other headers must be safe as they are."""
    ids = message_id + correlation_id
    if not ids.isprintable() or "%" in ids:
        message_id, correlation_id = escape(message_id), escape(correlation_id)
    named = f"Nats-Msg-Id: {message_id}\r\n" if message_id else ""
    text = f"NATS/1.0\r\n{named}correlation-id: {correlation_id}\r\n"
    for name, value in headers.items():
        if name != "traceparent":  # ours, in each event
            if name.lower() == "correlation-id":
                continue
            if not is_public(name):
                raise PublishRejected(
                    f"{name!r} cannot be a header of an event", hint="Nats-* names are the server's own"
                )
        if not value.isprintable() and _LINE_BREAK.search(value):
            raise PublishRejected(f"the header {name} holds a line break", hint="headers are one line of text")
        text += f"{name}: {value}\r\n"
    return f"{text}{extra}\r\n".encode("utf-8", "surrogateescape")


def escape(text: str) -> str:
    return _CONTROL.sub(lambda found: f"%{ord(found[0]):02X}", text)


# --- desired --------------------------------------------------------------------------------------------------


def desired(topology: Topology, broker: Broker) -> list[Desired]:
    """Streams first, then the three internal ones, then consumers."""
    names = Names(topology, broker)
    channels = {c.name: c for c in topology.channels.values() if c.broker == broker.name}
    found = [
        Desired(
            id=ResourceId(broker.name, "channel", safe(channel.address)),
            settings={} if channel.external else stream_settings(channel, broker),
            where=("channels", channel.name),
            origins={setting: ("channels", channel.name, *key) for setting, key in _KEYS.items()},
            external=channel.external,
            protect=channel.protect,
        )
        for channel in channels.values()
    ]
    subscriptions = [
        (agent, subscription)
        for agent in topology.agents.values()
        if not agent.external
        for subscription in agent.subscriptions
        if subscription.broker == broker.name
    ]
    replicas = max((c.replication for c in channels.values()), default=1)
    internal: dict[str, dict[str, Setting]] = {}
    if subscriptions:
        # a KV bucket, readable as such: the history of each event that failed, until it is settled
        history: dict[str, Setting] = {"retention": "limits", "max_msgs_per_subject": 1, "allow_rollup_hdrs": True}
        internal[names.state] = _internal_settings(replicas, f"$KV.{names.scope}-state.>", **history)
        # redriven events, each for one subscription
        internal[names.inbox] = _internal_settings(replicas, f"$ORCHESTRATOR.inbox.{names.scope}.*")
    if subscriptions or any(not channel.external for channel in channels.values()):
        # delayed events: under `at` while the server's schedule holds them, under `due` until a worker moves them on
        at, due = f"{names.later_root}at.*", f"{names.later_root}due"
        internal[names.later] = _internal_settings(replicas, at, due, discard="old", allow_msg_schedules=True)
    found += [
        Desired(ResourceId(broker.name, "internal", name), settings, where=("brokers", broker.name))
        for name, settings in internal.items()
    ]
    for agent, subscription in subscriptions:
        channel = channels[subscription.channel]
        where = ("agents", agent.name, "subscribe")
        found.append(
            Desired(
                id=ResourceId(broker.name, "subscription", f"{safe(channel.address)}/{safe(subscription.group)}"),
                settings=consumer_settings(subscription, broker),
                where=where,
                origins={"deliver_policy": where, "filter_subjects": where},
            )
        )
    return found


def stream_settings(channel: Channel, broker: Broker) -> dict[str, Setting]:
    age = channel.retention.max_age
    window = max(channel.dedup_window, 0.1)
    if channel.dead_letters:
        window = max(window, _LETTER_WINDOW)
    subjects = [broker.prefix + pattern for pattern in channel.events]
    if channel.dead_letters:
        subjects.append(f"{letters_root(channel)}.>")
    return {
        "subjects": tuple(sorted(subjects)),
        "retention": "workqueue" if channel.mode is Mode.QUEUE and not channel.dead_letters else "limits",
        "storage": "file",
        "discard": "new" if channel.overflow is Overflow.REJECT else "old",
        "max_age": age or 0.0,
        "max_msgs": channel.retention.max_events if channel.retention.max_events is not None else -1,
        "max_bytes": channel.retention.max_bytes if channel.retention.max_bytes is not None else -1,
        "num_replicas": channel.replication,
        "duplicate_window": min(window, age) if age else window,
        "allow_direct": True,
    }


_KEYS = {
    "subjects": ("events",),
    "retention": ("mode",),
    "discard": ("overflow",),
    "max_age": ("retention", "max_age"),
    "max_msgs": ("retention", "max_events"),
    "max_bytes": ("retention", "max_bytes"),
    "num_replicas": ("replication",),
    "duplicate_window": ("dedup_window",),
}


def _internal_settings(replicas: int, *subjects: str, **more: Setting) -> dict[str, Setting]:
    return {
        "subjects": subjects,
        "retention": "workqueue",
        "storage": "file",
        "discard": "new",
        "num_replicas": replicas,
        "allow_direct": True,
        **more,
    }


def start_policy(start: object) -> str:
    """deliver_policy of a consumer; a time stays one, for by_start_time."""
    return {"earliest": "all", "latest": "new"}.get(str(start), str(start))


def consumer_settings(subscription: Subscription, broker: Broker) -> dict[str, Setting]:
    return {
        "filter_subjects": tuple(sorted(broker.prefix + pattern for pattern in subscription.events)),
        "deliver_policy": start_policy(subscription.start),
        "ack_wait": ACK_WAIT,
        "max_deliver": -1,
        "max_ack_pending": -1,
    }


def filters_of(config: dict[str, Any]) -> list[str]:
    """The subjects that a consumer reads."""
    return list(config.get("filter_subjects") or [config.get("filter_subject") or ">"])


# --- judgement ------------------------------------------------------------------------------------------------


def judge(kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
    if kind == "subscription":
        if setting == "deliver_policy":
            return Verdict(Allowed.REPLACE, "the agent's position", "NATS cannot change where a consumer starts")
        return Verdict()
    if setting in ("retention", "storage"):
        return Verdict(Allowed.REPLACE, "all events of the channel", f"NATS cannot change {setting} of a stream")
    if setting == "allow_msg_schedules" and old is True:
        return Verdict(Allowed.NEVER, why="NATS cannot turn message schedules off again")
    if setting in ("max_msgs", "max_bytes", "max_age", "max_msgs_per_subject") and _lower(old, new):
        held = {"max_msgs": observed.events, "max_bytes": observed.bytes}.get(setting)
        if held is not None and isinstance(new, (int, float)) and held <= new:
            return Verdict()
        words = {
            "max_msgs": f"all but the newest {new} events",
            "max_bytes": f"the oldest events beyond {new} bytes",
            "max_age": f"events older than {new:g} s" if isinstance(new, (int, float)) else "old events",
        }
        return Verdict(loses=words.get(setting, "older events of one subject"))
    return Verdict()


def _lower(old: Setting, new: Setting) -> bool:
    """Whether a bound became tighter; 0 and -1 are unlimited."""
    if not isinstance(old, (int, float)) or not isinstance(new, (int, float)) or new <= 0:
        return False
    return old <= 0 or new < old
