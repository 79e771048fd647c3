"""The shape of a topology file: strict models of every section, one class an entry.

They check values one by one (shape.py) and are what schemas/topology.v1.schema.json is generated from (schema.py).
Nothing is required here and nothing refers to anything: what must be there, and names, are meaning (channels.py,
agents.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from orchestrator.topology import units

EVENT_FIELDS = ("event_id", "event_type", "source_agent", "target_agent", "correlation_id", "timestamp")


def wrong(expected: str, suggestion: str = "") -> PydanticCustomError:
    """A value that is not what this place wants; shape.py words the error."""
    return PydanticCustomError("wrong", "{expected}", {"expected": expected, "suggestion": suggestion})


def _text(pattern: str, expected: str) -> tuple[BeforeValidator, WithJsonSchema]:
    compiled = re.compile(pattern)

    def check(value: object) -> str:
        if isinstance(value, str) and compiled.fullmatch(value):
            return value
        raise wrong(expected)

    return BeforeValidator(check), WithJsonSchema({"type": "string", "pattern": pattern})


def _measure(read: Callable[[str], float], expected: str, pattern: str, least: float) -> tuple[Any, WithJsonSchema]:
    def check(value: object) -> float:
        if isinstance(value, str):
            try:
                number = read(value)
            except units.TooLong as error:
                raise wrong(str(error)) from None
            except ValueError:
                raise wrong(expected) from None
            if number < least:
                raise wrong(f"{expected}, more than nothing")
            return number
        unit = f"write a unit: `{value}s`" if "duration" in expected and isinstance(value, (int, float)) else ""
        raise wrong(expected, unit)

    return BeforeValidator(check), WithJsonSchema({"type": "string", "pattern": pattern})


_A_DURATION = "a duration such as 200ms, 30s, 5m, 1h or 7d"
Duration = Annotated[float, *_measure(units.seconds, _A_DURATION, units.DURATION_PATTERN, 0.001)]
DurationOrZero = Annotated[float, *_measure(units.seconds, _A_DURATION, units.DURATION_PATTERN, 0.0)]
Size = Annotated[int, *_measure(units.size, "a size such as 10KiB, 1MB or 1GiB", units.SIZE_PATTERN, 1)]
Count = Annotated[int, Field(ge=1, le=2**53)]

SLUG = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
NAME = r"^[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?$"
_TOKEN = r"[^\s.*>$\x00-\x1f\x7f][^\s.*>\x00-\x1f\x7f]*"
PATTERN = rf"^(>|(\*|{_TOKEN})(\.(\*|{_TOKEN}))*(\.>)?)$"
FIELD = rf"^({'|'.join(EVENT_FIELDS)}|payload\.[^\s]+|metadata\.[^\s]+)$"

Slug = Annotated[str, *_text(SLUG, "lower-case letters, digits and hyphens (at most 63)")]
Pattern = Annotated[
    str, *_text(PATTERN, "an event type (task.created) or a pattern: * is one token, > at the end is the rest")
]
FieldPath = Annotated[str, *_text(FIELD, "an event field, payload.<path> or metadata.<name>")]
Callable_ = Annotated[str, *_text(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", "module:function, as in agents:research")]
Codec = Annotated[
    str, *_text(r"^(agent-event|json|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$", "agent-event, json or module:object")
]
Prefix = Annotated[
    str, *_text(r"^([A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]*$", "tokens of letters, digits, - and _, such as `content.`")
]
Place = Annotated[str, *_text(r"^[^\s\x00-\x1f\x7f]{1,249}$", "a name without spaces (at most 249 characters)")]
ExceptionName = Annotated[
    str, *_text(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$", "an exception's name: ValueError or package.Error")
]
MetadataName = Annotated[str, *_text(r"^[^\s\x00-\x1f\x7f]+$", "the name of a metadata entry")]


def _start(value: object) -> str | datetime:
    if value in ("earliest", "latest"):
        return str(value)
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        raise wrong("earliest, latest or a time such as 2026-01-31T12:00:00Z") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Start = Annotated[
    Literal["earliest", "latest"] | datetime,
    BeforeValidator(_start),
    WithJsonSchema({"anyOf": [{"enum": ["earliest", "latest"]}, {"type": "string", "format": "date-time"}]}),
]


def _env(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    raise wrong("text")


EnvValue = Annotated[str, BeforeValidator(_env), WithJsonSchema({"type": ["string", "number", "boolean"]})]
EnvName = Annotated[str, *_text(r"^[A-Za-z_][A-Za-z0-9_]*$", "the name of an environment variable")]


class Spec(BaseModel):
    """Base: no coercion, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True)


class MetadataSpec(Spec):
    name: Slug | None = Field(None, description="Identity; labels all that this topology owns on its brokers")
    description: str | None = Field(None, description="What it is for")


class VariableSpec(Spec):
    default: Any = Field(
        None, description="Used unless --set or --vars gives a value; without it the variable must be set"
    )
    description: str | None = Field(None, description="What to set it to")


class AuthSpec(Spec):
    mechanism: Literal["plain", "scram-sha-256", "scram-sha-512", "token", "nkey", "creds"] | None = Field(
        None, description="How to prove who we are"
    )
    username: str | None = Field(None, description="plain and scram")
    password: str | None = Field(None, description="plain and scram; give it by secret()")
    token: str | None = Field(None, description="token; give it by secret()")
    seed: str | None = Field(None, description="nkey; give it by secret()")
    file: str | None = Field(None, description="creds: a NATS credentials file")


class TlsSpec(Spec):
    ca: str | None = Field(None, description="File with the certificates to trust")
    cert: str | None = Field(None, description="File with our certificate")
    key: str | None = Field(None, description="File with our private key")


class BrokerSpec(Spec):
    url: str | None = Field(
        None,
        description="embedded, or nats:// tls:// kafka:// redis:// rediss:// redis+sentinel:// redis+cluster://",
    )
    prefix: Prefix | None = Field(None, description="Before NATS subjects, derived addresses and groups")
    auth: AuthSpec | None = Field(None, description="Credentials")
    tls: TlsSpec | None = Field(None, description="Certificates; relative to the file")
    cluster_id: str | None = Field(None, description="Refuse to touch another cluster")
    client: dict[str, Any] | None = Field(None, description="Raw options of the client library")


class RetentionSpec(Spec):
    max_age: Duration | None = Field(None, description="Events older than this go")
    max_events: Count | None = Field(None, description="No more events than this")
    max_bytes: Size | None = Field(None, description="No more bytes than this")


class ChannelSpec(Spec):
    broker: str | None = Field(None, description="Name of a broker; optional when there is one")
    events: list[Pattern] | None = Field(
        None, description="Event types routed here: * is one token, > (last) is the rest"
    )
    mode: Literal["queue", "log"] | None = Field(
        None, description="queue: handled once, then gone; log: kept, many readers, replay. Default log"
    )
    address: Place | None = Field(None, description="Stream, topic or key; default <prefix><topology>-<channel>")
    retention: RetentionSpec | None = Field(None, description="Bounds what is kept, unread events too")
    overflow: Literal["reject", "drop_oldest"] | None = Field(
        None, description="What happens when it is full; default reject for queue, drop_oldest for log"
    )
    partitions: Annotated[int, Field(ge=1, le=10_000)] | None = Field(None, description="Kafka partitions. Default 1")
    key: FieldPath | None = Field(None, description="What orders and partitions; an event without it is rejected")
    replication: Annotated[int, Field(ge=1, le=100)] | None = Field(None, description="Copies on the broker. Default 1")
    dedup_window: Duration | None = Field(None, description="The same event_id within it takes effect once. Default 2m")
    schemas: dict[str, dict[str, Any]] | None = Field(
        None, description="JSON Schema of payloads by event type; {$ref: file} is relative to this file"
    )
    codec: Codec | None = Field(None, description="agent-event, json or module:object. Default agent-event")
    protect: bool | None = Field(None, description="Never deleted or shrunk by this tool")
    external: bool | None = Field(None, description="Not ours: must exist, is never changed")


class RetrySpec(Spec):
    max_attempts: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(None, description="Runs in all. Default 3")
    backoff: Literal["constant", "linear", "exponential"] | None = Field(None, description="Default exponential")
    initial_delay: DurationOrZero | None = Field(None, description="Before the second run. Default 1s")
    multiplier: Annotated[float, Field(ge=1, le=1000)] | None = Field(None, description="exponential only. Default 2")
    max_delay: DurationOrZero | None = Field(None, description="No delay is longer. Default 5m")
    jitter: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of a delay drawn at random. Default 0.1"
    )
    delays: Annotated[list[DurationOrZero], Field(min_length=1)] | None = Field(
        None, description="Instead of backoff; the last one repeats"
    )
    give_up_after: Duration | None = Field(None, description="From the first failure on. Default 24h")
    give_up_on: list[ExceptionName] | None = Field(None, description="Exceptions that dead-letter at once")


def _one_or_long(value: object) -> str | None:
    if isinstance(value, str):
        return "short"
    return "long" if isinstance(value, (dict, Spec)) else None


_SHORT_OR_LONG = Discriminator(_one_or_long)

#: What a key takes that has a short and a long form; shape.py says so when a value is neither.
FORMS = {
    "retry": "the name of a retry policy, or a policy",
    "subscribe": "an event type, a pattern, or {events, channel, …}",
    "publish": "an event type, a pattern, or {events, channel}",
    "handler": "module:function, or {kind: python, call: module:function}",
}

Retry = Annotated[
    Annotated[str, Tag("short")] | Annotated[RetrySpec, Tag("long")],
    _SHORT_OR_LONG,
]


class SubscribeSpec(Spec):
    events: list[Pattern] | None = Field(None, description="Types or patterns; default all of the channel")
    channel: str | None = Field(None, description="Needed for external channels only")
    start: Start | None = Field(None, description="Where a new subscription begins: earliest, latest or a time")
    filter: dict[FieldPath, Any] | None = Field(None, description="Field → accepted value or values; logs only")
    include_targeted: bool | None = Field(None, description="Also see events whose target is another agent; logs only")


class PublishSpec(Spec):
    events: list[Pattern] | None = Field(None, description="Types or patterns")
    channel: str | None = Field(None, description="Needed for external channels only")


Subscribe = Annotated[
    Annotated[Pattern, Tag("short")] | Annotated[SubscribeSpec, Tag("long")],
    _SHORT_OR_LONG,
]
Publish = Annotated[
    Annotated[Pattern, Tag("short")] | Annotated[PublishSpec, Tag("long")],
    _SHORT_OR_LONG,
]


class PythonHandlerSpec(Spec):
    kind: Literal["python"] = Field(description="Calls a Python function")
    call: Callable_ | None = Field(None, description="module:function; imports resolve beside the topology file first")


HANDLER_KINDS = ("python",)


def _handler_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "short"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in HANDLER_KINDS else None


HandlerSpec = Annotated[
    Annotated[Callable_, Tag("short")] | Annotated[PythonHandlerSpec, Tag("python")],
    Discriminator(_handler_kind),
]


class RestartSpec(Spec):
    initial_delay: DurationOrZero | None = Field(None, description="Before the first restart. Default 200ms")
    max_delay: DurationOrZero | None = Field(None, description="Delays double up to this. Default 30s")
    healthy_after: Duration | None = Field(None, description="Running this long forgets earlier crashes. Default 10s")


class AgentDefaultsSpec(Spec):
    """What `defaults.agents` may say: an agent's settings that make sense for all."""

    handler: HandlerSpec | None = Field(None, description="What handles its events")
    replicas: Annotated[int, Field(ge=0, le=10_000)] | None = Field(
        None, description="Worker processes on this host. Default 1"
    )
    concurrency: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="Events in flight in each. Default 8"
    )
    timeout: Duration | None = Field(None, description="Of one attempt. Default 5m")
    drain_timeout: DurationOrZero | None = Field(None, description="What a stopping worker may still take. Default 30s")
    retry: Retry | None = Field(None, description="Name of a retry policy, or one inline")
    on_exhausted: Literal["dead_letter", "pause", "drop"] | None = Field(
        None, description="When no attempt is left; dead_letter needs dead_letter: <channel>"
    )
    dead_letter: str | None = Field(None, description="Name of a log channel")
    propagate: list[MetadataName] | None = Field(None, description="Metadata copied to what is published")
    env: dict[EnvName, EnvValue] | None = Field(None, description="Environment of the worker")
    config: dict[str, Any] | None = Field(None, description="Free-form: ctx.config")
    restart: RestartSpec | None = Field(None, description="Delays between restarts of a crashing worker")


class AgentSpec(AgentDefaultsSpec):
    description: str | None = Field(None, description="What it does")
    subscribe: list[Subscribe] | None = Field(None, description="What it handles")
    publish: list[Publish] | None = Field(None, description="What it may publish; anything else is an error")
    group: Place | None = Field(None, description="Consumer group or durable name; default <prefix><topology>-<agent>")
    external: bool | None = Field(None, description="Runs elsewhere: nothing starts; lint and graph know it")
    for_each: dict[str, list[Any]] | None = Field(
        None, description="Repeats the agent for each value (product of several keys)"
    )


class ChannelDefaultsSpec(Spec):
    """What `defaults.channels` may say."""

    broker: str | None = Field(None, description="Name of a broker")
    mode: Literal["queue", "log"] | None = Field(None, description="queue or log")
    retention: RetentionSpec | None = Field(None, description="Bounds what is kept")
    overflow: Literal["reject", "drop_oldest"] | None = Field(None, description="What happens when it is full")
    partitions: Annotated[int, Field(ge=1, le=10_000)] | None = Field(None, description="Kafka partitions")
    key: FieldPath | None = Field(None, description="What orders and partitions")
    replication: Annotated[int, Field(ge=1, le=100)] | None = Field(None, description="Copies on the broker")
    dedup_window: Duration | None = Field(None, description="The same event_id within it takes effect once")
    codec: Codec | None = Field(None, description="agent-event, json or module:object")
    protect: bool | None = Field(None, description="Never deleted or shrunk by this tool")


class DefaultsSpec(Spec):
    agents: AgentDefaultsSpec | None = Field(None, description="For every agent that does not say otherwise")
    channels: ChannelDefaultsSpec | None = Field(None, description="For every channel that does not say otherwise")


Name = Annotated[str, *_text(NAME, "letters, digits, - and _ (at most 63)")]


class TopologySpec(Spec):
    """A team of event-driven agents: where events live, who handles them, and what happens when that fails."""

    apiVersion: Literal["orchestrator/v1"] = Field(description="Version of this format")
    kind: Literal["Topology"] = Field(description="Always Topology")
    metadata: MetadataSpec = Field(description="Name and purpose")
    variables: dict[str, VariableSpec] | None = Field(None, description="Inputs: --set name=value, --vars FILE")
    include: list[str] | None = Field(None, description="Files to merge, as globs relative to this file")
    brokers: dict[Name, BrokerSpec] | None = Field(None, description="None at all means one embedded NATS")
    channels: dict[Name, ChannelSpec] | None = Field(None, description="Where events live")
    retry_policies: dict[Name, RetrySpec] | None = Field(None, description="Policies that agents name")
    defaults: DefaultsSpec | None = Field(None, description="For agents and channels that do not say otherwise")
    agents: dict[Name, AgentSpec] | None = Field(None, description="Who handles events")
