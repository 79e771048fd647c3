"""The effective topology: every default filled in, every reference resolved, nothing left to decide.

All other packages read these types and never the YAML. Frozen, plain and picklable: a topology travels from the
supervisor to the warm parent once and is shared with each worker by fork. Durations are seconds, sizes bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import RoutingError
from orchestrator.topology.near import near_type


@dataclass(frozen=True, slots=True)
class Mark:
    """Where something stands in a source file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Auth:
    mechanism: Literal["plain", "scram-sha-256", "scram-sha-512", "token", "nkey", "creds"]
    username: str | None = None
    password: str | None = None
    token: str | None = None
    seed: str | None = None  # nkey
    file: str | None = None  # creds


@dataclass(frozen=True, slots=True)
class Tls:
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Broker:
    """`url` is "embedded" or a URL; `kind` is the adapter that serves it: nats, kafka, redis or memory."""

    name: str
    url: str
    kind: str
    prefix: str = ""
    auth: Auth | None = None
    tls: Tls | None = None
    cluster_id: str | None = None
    client: Mapping[str, Any] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        return self.url == "embedded"


class Mode(StrEnum):
    QUEUE = "queue"
    LOG = "log"


class Overflow(StrEnum):
    REJECT = "reject"
    DROP_OLDEST = "drop_oldest"


@dataclass(frozen=True, slots=True)
class Retention:
    """None is unlimited."""

    max_age: float | None = None
    max_events: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Channel:
    """Where events live: JetStream stream, Kafka topic or Redis stream named `address`."""

    name: str
    broker: str
    address: str
    mode: Mode
    events: tuple[str, ...]  # patterns: * is one token, > (last) the rest
    retention: Retention = Retention()
    overflow: Overflow = Overflow.DROP_OLDEST
    partitions: int = 1
    key: str = "correlation_id"  # an event field, payload.<path> or metadata.<name>
    key_required: bool = False  # the file names the key: an event without it is rejected
    replication: int = 1
    dedup_window: float = 120.0
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # event type -> JSON Schema
    codec: str = "agent-event"
    protect: bool = False
    external: bool = False
    dead_letters: bool = False  # some agent's dead_letter names it


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed event runs again; read by worker.policy alone."""

    max_attempts: int = 3
    backoff: Literal["constant", "linear", "exponential"] = "exponential"
    initial_delay: float = 1.0
    multiplier: float = 2.0
    max_delay: float = 300.0
    jitter: float = 0.1
    delays: tuple[float, ...] = ()  # given: replaces backoff; the last one repeats
    give_up_after: float = 86400.0
    give_up_on: tuple[str, ...] = ()  # exception names, bare or dotted


class OnExhausted(StrEnum):
    DEAD_LETTER = "dead_letter"
    PAUSE = "pause"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Handler:
    """How an agent's events are handled; `kind` selects the runner, `options` are that kind's own keys."""

    kind: str
    call: str  # python: "module:function"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one agent reads from one channel, and the position that it keeps there under `group`."""

    agent: str
    channel: str
    broker: str
    group: str
    events: tuple[str, ...]  # patterns, each within the channel's own
    start: Literal["earliest", "latest"] | datetime = "earliest"  # at creation only
    filter: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # field path -> accepted values
    include_targeted: bool = False


@dataclass(frozen=True, slots=True)
class Publication:
    """One type that an agent may publish, and the channel that takes it."""

    event_type: str  # a pattern is legal: anything that matches may be published
    channel: str


@dataclass(frozen=True, slots=True)
class Restart:
    initial_delay: float = 0.2
    max_delay: float = 30.0
    healthy_after: float = 10.0


@dataclass(frozen=True, slots=True)
class Agent:
    name: str
    description: str
    handler: Handler | None  # None: external
    subscriptions: tuple[Subscription, ...]  # one for each channel
    publish: tuple[Publication, ...]
    replicas: int = 1
    concurrency: int = 8
    timeout: float = 300.0
    drain_timeout: float = 30.0
    retry: RetryPolicy = RetryPolicy()
    on_exhausted: OnExhausted = OnExhausted.DEAD_LETTER
    dead_letter: str | None = None  # channel name
    propagate: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    restart: Restart = Restart()
    external: bool = False


@dataclass(frozen=True, slots=True)
class Topology:
    """The whole. `marks` maps a path such as ("channels", "tasks", "retention") to its place in the file."""

    name: str
    description: str
    root: Path  # folder of the first file: handlers import from here, .orchestrator/ lies here
    files: tuple[Path, ...]  # every file read, includes too (what `dev` watches)
    brokers: Mapping[str, Broker]
    channels: Mapping[str, Channel]
    agents: Mapping[str, Agent]
    marks: Mapping[tuple[str, ...], Mark] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()  # values to redact in every output; never printed

    @property
    def state_dir(self) -> Path:
        return self.root / ".orchestrator"

    def mark(self, *path: str) -> Mark | None:
        """The nearest mark at or above `path`."""
        for length in range(len(path), 0, -1):
            if (found := self.marks.get(path[:length])) is not None:
                return found
        return None

    def channel_for(self, event_type: str) -> Channel:
        """The one channel of our own that takes `event_type`. Raises RoutingError when there is none."""
        for channel in self.channels.values():
            if not channel.external and any(matches(p, event_type) for p in channel.events):
                return channel
        meant = near_type(event_type, [p for c in self.channels.values() if not c.external for p in c.events])
        add = f"add it to a channel's `events:` ({', '.join(self.channels) or 'there is no channel yet'})"
        raise RoutingError(
            f"no channel routes the event type {event_type!r}", hint=f"{meant} else {add}" if meant else add
        )

    def revision(self) -> str:
        """A short digest of everything but marks and file places: equal topologies have equal revisions."""
        return digest({"name": self.name, "brokers": self.brokers, "channels": self.channels, "agents": self.agents})

    def redact(self, text: str) -> str:
        """`text` with every secret value replaced by ***."""
        for secret in self.secrets:
            if secret:
                text = text.replace(secret, "***")
        return text


def matches(pattern: str, event_type: str) -> bool:
    """Whether a NATS-style pattern (`*` one token, `>` the rest, at least one) takes `event_type`."""
    if pattern == event_type:
        return True
    want, have = pattern.split("."), event_type.split(".")
    for index, token in enumerate(want):
        if token == ">":
            return len(have) > index
        if index >= len(have) or token not in ("*", have[index]):
            return False
    return len(want) == len(have)


def digest(value: object) -> str:
    """The first 12 hex digits of the sha256 of a canonical dump; used for revisions and change detection."""
    text = json.dumps(value, sort_keys=True, default=_plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: object) -> object:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Path, datetime)):
        return str(value)
    raise TypeError(f"cannot dump {type(value).__name__}")
