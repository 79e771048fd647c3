"""Builds the Outgoing for an event: body, key, headers. The hot path of publishing.

`build` writes the body of an agent-event from parts that are already JSON, because a pydantic model for each output
costs more than everything else here together; `from_event` takes a whole event (a Client's, an agent.failed).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from orchestrator import clock
from orchestrator.brokers.base import Outgoing
from orchestrator.errors import PayloadError
from orchestrator.event import AgentEvent
from orchestrator.topology.model import Channel
from orchestrator.wire.names import child_id, is_event_type, uuid5
from orchestrator.wire.routes import Route, payload_json

_fromtimestamp = datetime.fromtimestamp
_second: tuple[int, bytes] = (-1, b"")  # Unix seconds, and the same as text


def _now_json() -> bytes:
    """The present time as RFC 3339. The text of a second serves every event that is built in it."""
    global _second
    now = clock.now()
    second, text = _second
    if int(now) != second:
        second = int(now)
        text = _fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode()
        _second = second, text
    return b"%b.%06dZ" % (text, (now - second) * 1e6)


@lru_cache(16)
def _source(agent: str) -> bytes:
    return b',"source_agent":%b,"target_agent":' % to_json(agent)


def _metadata_json(metadata: Mapping[str, Any]) -> bytes:
    try:
        return to_json(metadata)
    except ValueError as error:
        raise PayloadError(f"the metadata cannot be written as JSON: {error}") from error


class Origin:
    """What everything published while one event is handled has in common, most of it as JSON already. Raises
    PayloadError for metadata that is not JSON."""

    __slots__ = ("agent", "causation", "correlation", "correlation_id", "event_id", "metadata", "source", "traceparent")

    def __init__(self, agent: str, event: AgentEvent, traceparent: str, propagate: tuple[str, ...]) -> None:
        self.agent = agent
        self.event_id = event.event_id
        self.correlation_id = event.correlation_id
        self.traceparent = traceparent
        self.causation: dict[str, Any] = {name: event.metadata[name] for name in propagate if name in event.metadata}
        self.causation["causation_id"] = event.event_id
        self.metadata = _metadata_json(self.causation)
        self.source = _source(agent)
        self.correlation = b',"correlation_id":%b,"timestamp":"' % to_json(event.correlation_id)


def build(
    route: Route,
    event_type: str,
    payload: Mapping[str, Any] | BaseModel,
    origin: Origin,
    index: int,
    target_agent: str | None = None,
    key: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    delay: float = 0.0,
    event_id: str | None = None,
) -> Outgoing:
    """The `index`-th output of an attempt. Raises PayloadError for a payload that is not JSON, breaks the channel's
    schema or lacks its key."""
    content = payload_json(payload)
    if route.validate is not None:
        route.check(content)
    if event_id is None:
        event_id = child_id(origin.event_id, origin.agent, index, event_type, target_agent, content)
    body = b"".join(
        (
            b'{"event_id":"',
            event_id.encode(),
            route.type_member,
            origin.source,
            b"null" if target_agent is None else to_json(target_agent),
            origin.correlation,
            _now_json(),
            b'","payload":',
            content,
            b',"metadata":',
            _metadata_json({**origin.causation, **metadata}) if metadata else origin.metadata,
            b"}",
        )
    )
    if key is None:
        key = origin.correlation_id if route.by_correlation else route.key(from_json(body))
    headers = {"traceparent": origin.traceparent}
    if not route.plain:
        event = AgentEvent.from_bytes(body)
        body = route.codec.encode(event)
        headers |= envelope_headers(event)
    return Outgoing(
        route.channel,
        body,
        event_type,
        event_id,
        origin.agent,
        origin.correlation_id,
        key,
        headers,
        event_id,
        delay,
    )


def from_event(
    route: Route, event: AgentEvent, *, key: str | None = None, delay: float = 0.0, headers: Mapping[str, str] = {}
) -> Outgoing:
    """An Outgoing for a whole event. Raises PayloadError as `build` does."""
    content = payload_json(event.payload)
    route.check(content)
    try:
        body = event.to_bytes()
    except ValueError as error:
        raise PayloadError(f"the event cannot be written as JSON: {error}") from error
    if key is None:
        key = event.correlation_id if route.by_correlation else route.key(from_json(body))
    out = dict(headers)
    if not route.plain:
        body = route.codec.encode(event)
        out |= envelope_headers(event)
    return Outgoing(
        channel=route.channel,
        body=body,
        event_type=event.event_type,
        event_id=event.event_id,
        source_agent=event.source_agent,
        correlation_id=event.correlation_id,
        key=key,
        headers=out,
        delay=delay,
    )


def reply_to(request: AgentEvent, channel: Channel, agent: str, payload: dict[str, Any], traceparent: str) -> Outgoing:
    """The reply `<type>.reply` to `request`. Its id is derived from the request's, so a rerun answers alike."""
    event_type = f"{request.event_type}.reply"
    event = AgentEvent(
        event_id=uuid5(f"reply/{request.event_id}/{agent}".encode("utf-8", "surrogatepass")),
        event_type=event_type,
        source_agent=agent,
        target_agent=request.source_agent or None,
        correlation_id=request.correlation_id,
        payload=payload,
        metadata={"causation_id": request.event_id},
    )
    return Outgoing(
        channel=channel,
        body=event.to_bytes(),
        event_type=event_type if is_event_type(event_type) else "reply",
        event_id=event.event_id,
        source_agent=agent,
        correlation_id=event.correlation_id,
        headers={"traceparent": traceparent},
    )


def envelope_headers(event: AgentEvent) -> dict[str, str]:
    """What a body that is not an AgentEvent cannot hold and a reader of ours needs."""
    found = {"event-id": event.event_id, "source-agent": event.source_agent, "target-agent": event.target_agent}
    return {name: value for name, value in found.items() if value}
