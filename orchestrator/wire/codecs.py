"""How a channel's bodies become events and events become bodies; `codec:` of a channel chooses."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Protocol, cast

from orchestrator.brokers.base import Delivery
from orchestrator.errors import DecodeError, HandlerLoadError, PayloadError
from orchestrator.event import AgentEvent, position_id, whole
from orchestrator.topology.model import Channel


class Codec(Protocol):
    """What `codec: module:object` names. The object needs these two methods and nothing else."""

    def decode(self, body: bytes, headers: Mapping[str, str], event_type: str | None, position: str) -> AgentEvent:
        """The event in `body`. `event_type` is the transport's word, or the channel's only type. Raises any exception
        for bytes that are no event: it becomes a DecodeError."""

    def encode(self, event: AgentEvent) -> bytes:
        """The body to store. What a body cannot hold of the event's envelope rides in headers."""


class AgentEventCodec:
    """`agent-event`: the body is the JSON of the whole event."""

    def decode(self, body: bytes, headers: Mapping[str, str], event_type: str | None, position: str) -> AgentEvent:
        return AgentEvent.from_bytes(
            body, position=position, event_type=event_type, correlation_id=headers.get("correlation-id")
        )

    def encode(self, event: AgentEvent) -> bytes:
        return event.to_bytes()


class JsonCodec:
    """`json`: the body is the payload, an object; the envelope comes from headers and position."""

    def decode(self, body: bytes, headers: Mapping[str, str], event_type: str | None, position: str) -> AgentEvent:
        if event_type is None:
            raise DecodeError("the event has no type: neither its channel nor its transport names one")
        payload = json.loads(body)
        if not isinstance(payload, dict):
            raise DecodeError(f"the payload is no JSON object but {type(payload).__name__}")
        event_id = headers.get("event-id") or position_id(position)
        return AgentEvent(
            event_id=event_id,
            event_type=event_type,
            source_agent=headers.get("source-agent", ""),
            target_agent=headers.get("target-agent") or None,
            correlation_id=headers.get("correlation-id") or event_id,
            payload=payload,
        )

    def encode(self, event: AgentEvent) -> bytes:
        return json.dumps(event.payload, separators=(",", ":"), default=str).encode()


AGENT_EVENT = AgentEventCodec()
_BUILT_IN: dict[str, Codec] = {"agent-event": AGENT_EVENT, "json": JsonCodec()}


def codec(name: str) -> Codec:
    """The codec that a channel names. Imports resolve as handlers' do. Raises HandlerLoadError when there is none."""
    if (found := _BUILT_IN.get(name)) is not None:
        return found
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        found = found() if isinstance(found, type) else found
        for method in ("decode", "encode"):
            if not callable(getattr(found, method, None)):
                raise TypeError(f"it has no {method}()")
    except Exception as error:  # user code
        raise HandlerLoadError(
            f"the codec {name!r} cannot be imported: {type(error).__name__}: {error}",
            hint="write agent-event, json, or module:object with decode() and encode(), beside the topology file",
        ) from error
    return cast(Codec, found)


def only_type(channel: Channel) -> str | None:
    """The one type of a channel, when its events name exactly one and no pattern."""
    if len(channel.events) == 1 and not set("*>") & set(channel.events[0]):
        return channel.events[0]
    return None


def decode(delivery: Delivery, how: Codec, default_type: str | None = None) -> AgentEvent:
    """The event that was delivered. Raises DecodeError, whatever the codec raised."""
    if how is AGENT_EVENT and (found := whole(delivery.body)) is not None:
        return found
    try:
        event = how.decode(delivery.body, delivery.headers, delivery.event_type or default_type, delivery.position)
        if not isinstance(event, AgentEvent):
            raise DecodeError(f"the codec made {type(event).__name__} of it, not an AgentEvent")
        return event
    except (DecodeError, PayloadError):
        raise
    except Exception as error:
        raise DecodeError(f"not an event: {type(error).__name__}: {error}") from error
