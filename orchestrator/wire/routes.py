"""Which channel takes an event type, and what that channel asks of an event: its key, its schema, its codec.

A Routes object resolves each type once; publishing then costs a dictionary lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from orchestrator.errors import PayloadError, PublishRejected, RoutingError
from orchestrator.event import AgentEvent
from orchestrator.topology.model import Agent, Channel, Topology, matches
from orchestrator.wire.codecs import AGENT_EVENT, Codec, codec
from orchestrator.wire.names import is_event_type

_CACHED = 4096  # types; a pattern such as crawl.> may meet any number of them


class Route:
    """One event type in the channel that takes it. Made once for each type, read for each event."""

    __slots__ = ("by_correlation", "channel", "codec", "plain", "type_member", "validate")

    def __init__(self, channel: Channel, event_type: str, how: Codec) -> None:
        self.channel = channel
        self.codec = how
        self.plain = how is AGENT_EVENT
        self.type_member = b'","event_type":' + to_json(event_type)  # of a body, behind its event_id
        self.by_correlation = channel.key == "correlation_id"
        self.validate = validator(channel, event_type)

    def check(self, payload: bytes) -> None:
        """Raises PayloadError when the JSON in `payload` breaks the channel's schema for this type."""
        if self.validate is not None:
            self.validate(from_json(payload))

    def key(self, envelope: Mapping[str, Any]) -> str:
        """The value of the channel's key in an event's fields. Raises PayloadError when there is none."""
        value = value_at(envelope, self.channel.key)
        if value is None or value == "":
            raise PayloadError(
                f"the event has no {self.channel.key}, which is the key of channel {self.channel.name!r}",
                hint="put the value into the event, or pass key= to publish",
            )
        return key_text(value)


def key_text(value: Any) -> str:
    """What orders and partitions, for a value of any JSON type."""
    return value if isinstance(value, str) else to_json(value).decode()


class Routes:
    """The channels of a topology, as one publisher sees them.

    With an `agent`, only what its `publish:` names is legal, in the channel that it names there.
    """

    def __init__(self, topology: Topology, agent: Agent | None = None) -> None:
        self._topology = topology
        self._agent = agent
        self._found: dict[str, Route] = {}
        self._codecs: dict[str, Codec] = {}

    def find(self, event_type: str, channel: str | None = None) -> Route:
        """Raises RoutingError when nothing takes `event_type` or the agent may not publish it, PublishRejected when it
        cannot stand in a subject. `channel` names an external channel (for a Client)."""
        if channel is not None:
            return self._named(event_type, channel)
        if (route := self._found.get(event_type)) is None:
            if not is_event_type(event_type):
                raise PublishRejected(
                    f"{event_type!r} cannot be an event type",
                    hint="dotted tokens without spaces, control characters, * or >",
                )
            if len(self._found) >= _CACHED:
                self._found.clear()
            route = self._found[event_type] = Route(*self._resolve(event_type))
        return route

    def codec(self, channel: Channel) -> Codec:
        if (found := self._codecs.get(channel.codec)) is None:
            found = self._codecs[channel.codec] = codec(channel.codec)
        return found

    def _resolve(self, event_type: str) -> tuple[Channel, str, Codec]:
        channel = self._topology.channel_for(event_type) if self._agent is None else self._allowed(event_type)
        return channel, event_type, self.codec(channel)

    def _allowed(self, event_type: str) -> Channel:
        assert self._agent is not None
        for publication in self._agent.publish:
            if matches(publication.event_type, event_type):
                return self._topology.channels[publication.channel]
        legal = ", ".join(p.event_type for p in self._agent.publish)
        raise RoutingError(
            f"agent {self._agent.name!r} may not publish {event_type!r}",
            hint=f"add it to the agent's `publish:` (now: {legal or 'nothing'})",
        )

    def _named(self, event_type: str, name: str) -> Route:
        channel = self._topology.channels.get(name)
        if channel is None or not any(matches(pattern, event_type) for pattern in channel.events):
            raise RoutingError(
                f"channel {name!r} does not take the event type {event_type!r}",
                hint=f"channels are: {', '.join(self._topology.channels)}",
            )
        return Route(channel, event_type, self.codec(channel))


def value_at(fields: Mapping[str, Any], path: str) -> Any:
    """The value at `path` (an event field, payload.<path> or metadata.<name>); None when it is not there."""
    value: Any = fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            return None
    return value


def getter(path: str) -> Callable[[AgentEvent], Any]:
    """value_at for a decoded event."""
    head, _, rest = path.partition(".")
    if not rest:
        return lambda event: getattr(event, head, None)
    return lambda event: value_at(getattr(event, head, None) or {}, rest)


def validator(channel: Channel, event_type: str) -> Callable[[Any], None] | None:
    """Checks a payload against the channel's schema for `event_type`; None when there is none.

    What it returns raises PayloadError naming each place that is wrong.
    """
    schema = next((s for pattern, s in channel.schemas.items() if matches(pattern, event_type)), None)
    if schema is None:
        return None
    import jsonschema  # slow to import, and most topologies have no schemas

    compiled = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)

    def validate(payload: Any) -> None:
        try:
            problems = [f"{error.json_path}: {error.message}"[:300] for error in compiled.iter_errors(payload)]
        except RecursionError:
            problems = ["it is nested too deep, or the schema refers to itself without an end"]
        if problems:
            raise PayloadError(
                f"the payload of {event_type} breaks the schema of channel {channel.name!r}: "
                + "; ".join(sorted(problems)[:5])
            )

    return validate


def payload_json(payload: Mapping[str, Any] | BaseModel) -> bytes:
    """The JSON of a payload. Raises PayloadError when it is no object or holds what JSON cannot."""
    try:
        text = to_json(payload, inf_nan_mode="null")
    except ValueError as error:
        raise PayloadError(f"the payload cannot be written as JSON: {error}") from error
    if text[:1] != b"{":
        raise PayloadError(
            f"a payload is a dict or a pydantic model, not {type(payload).__name__}", hint="wrap it: {'value': ...}"
        )
    return text
