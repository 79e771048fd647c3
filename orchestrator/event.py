"""AgentEvent and its wire encoding (contract section 3). Pure: no I/O, no broker."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from orchestrator import clock
from orchestrator.errors import DecodeError

#: Namespace of every identifier that is derived instead of drawn at random.
NAMESPACE = uuid.UUID("7a4f5d0c-6a43-5d0c-9d1e-1f5b6c2f9a10")


class EventType(StrEnum):
    """The ten types that every topology knows; any other dotted text is legal too."""

    TASK_CREATED = "task.created"
    TASK_ASSIGNED = "task.assigned"
    AGENT_STARTED = "agent.started"
    AGENT_COMPLETED = "agent.completed"
    AGENT_FAILED = "agent.failed"
    TOOL_CALLED = "tool.called"
    TOOL_RESULT = "tool.result"
    HANDOFF_REQUESTED = "handoff.requested"
    REVIEW_REQUESTED = "review.requested"
    REVIEW_COMPLETED = "review.completed"


def _now() -> datetime:
    return datetime.fromtimestamp(clock.now(), UTC)


def _new_id() -> str:
    return str(uuid.uuid4())


class AgentEvent(BaseModel):
    """One event. Unknown fields are kept, so they survive a hop through an agent."""

    model_config = ConfigDict(extra="allow")

    event_id: str = Field(default_factory=_new_id, min_length=1)
    event_type: str = Field(min_length=1)
    source_agent: str = ""
    target_agent: str | None = None
    correlation_id: str = Field(default_factory=_new_id, min_length=1)
    timestamp: datetime = Field(default_factory=_now)
    payload: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("timestamp")
    @classmethod
    def _naive_is_utc(cls, value: datetime) -> datetime:
        return value if value.tzinfo is not None else value.replace(tzinfo=UTC)

    def to_bytes(self) -> bytes:
        """The wire body: UTF-8 JSON."""
        return self.__pydantic_serializer__.to_json(self)

    @classmethod
    def from_bytes(
        cls,
        body: bytes,
        *,
        position: str | None = None,
        event_type: str | None = None,
        correlation_id: str | None = None,
    ) -> AgentEvent:
        """Decodes a wire body; `event_type` and `correlation_id` (from subject or headers) fill gaps only.

        A missing event_id becomes uuid5 of `position`, so that a redelivery carries the same one; a missing
        correlation_id becomes the event_id. Raises DecodeError when the bytes are not an event.
        """
        try:
            event: AgentEvent = cls.__pydantic_validator__.validate_json(body)
        except ValidationError as error:
            event = _decode_with_type(body, event_type, error)
        given = event.__pydantic_fields_set__
        if "event_id" not in given and position is not None:
            event.event_id = position_id(position)
        if "correlation_id" not in given:
            event.correlation_id = correlation_id or event.event_id
        return event


_IDS = frozenset(("event_id", "correlation_id"))


def whole(body: bytes) -> AgentEvent | None:
    """The event in `body` when that says everything itself, its type and both ids; None for anything else, of which
    AgentEvent.from_bytes knows what to make. Asks for nothing but the body: headers may cost more than this."""
    try:
        event: AgentEvent = AgentEvent.__pydantic_validator__.validate_json(body)
    except ValidationError:
        return None
    return event if event.__pydantic_fields_set__ >= _IDS else None


def _decode_with_type(body: bytes, event_type: str | None, error: ValidationError) -> AgentEvent:
    """The slow path: the body lacks event_type (or is broken) and the transport may know the type."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if event_type and [(p["type"], p["loc"]) for p in problems] == [("missing", ("event_type",))]:
        return AgentEvent.model_validate({**json.loads(body), "event_type": event_type})
    what = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems[:5])
    raise DecodeError(f"not an event: {what}") from None


def position_id(position: str) -> str:
    """The event_id of an event that came without one."""
    return str(uuid.uuid5(NAMESPACE, position))
