"""Dead letters: the original bytes and headers, and why they died (contract section 3).

Walk "an event that dies": worker.policy says that it is over -> dead_letter() -> Consumer.settle. Read again by the
dlq commands through parse().
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from orchestrator import clock
from orchestrator.brokers.base import Delivery, Outgoing
from orchestrator.event import AgentEvent, EventType, position_id
from orchestrator.topology.model import Channel
from orchestrator.wire.names import is_event_type, one_line, safe_header, several_lines, uuid5

_PREFIX = "dlq-"
_MESSAGE = 2_000  # characters of an error message that are kept
_TRACEBACK = 6_000  # the last characters of a traceback, where the cause is
_MARGIN = 512  # bytes that an adapter adds in headers of its own


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an event is dead. `reason` is one word: exhausted, rejected, undecodable, invalid, misrouted, crashed …"""

    reason: str
    error_type: str
    message: str
    traceback: str = ""
    attempts: int = 0
    first_failed_at: float = 0.0  # Unix seconds
    last_failed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Letter:
    """What the headers of a dead letter say, as text again."""

    agent: str
    channel: str
    position: str
    attempts: int
    reason: str
    error_type: str
    message: str
    traceback: str
    first_failed_at: str  # RFC 3339
    last_failed_at: str
    truncated: int | None = None  # the original body's size in bytes, when it had to be cut
    sha256: str = ""  # of the original body, when it was cut


def dead_letter(
    channel: Channel,
    delivery: Delivery,
    *,
    agent: str,
    group: str,
    failure: Failure,
    event: AgentEvent | None,
    limit: int | None = None,
) -> Outgoing:
    """The letter for `delivery` in `channel`. `limit` is the largest message in bytes that the broker takes: the
    traceback goes first, then the original headers' excess and the end of the body."""
    own = _own_headers(delivery, agent, failure)
    headers = {**_originals(delivery.headers), **own}
    body = delivery.body
    if limit is not None and _size(headers) + len(body) > limit:
        del headers["dlq-traceback"]
        if _size(headers) + len(body) > limit:
            digest = {"dlq-truncated": str(len(body)), "dlq-sha256": sha256(body).hexdigest()}
            headers |= digest
            if _size(headers) > limit // 2:
                headers = {**own, **digest}
                del headers["dlq-traceback"]
            body = body[: max(0, limit - _size(headers))]
    event_type = event.event_type if event is not None else delivery.event_type or ""
    correlation_id = event.correlation_id if event is not None else delivery.headers.get("correlation-id", "")
    return Outgoing(
        channel=channel,
        body=body,
        event_type=event_type if is_event_type(event_type) else "unknown",
        event_id=event.event_id if event is not None else position_id(delivery.position),
        source_agent=safe_header("", event.source_agent)[1] if event is not None else "",
        correlation_id=safe_header("", correlation_id)[1],
        headers=headers,
        message_id=f"dlq:{group}:{delivery.position}",
    )


def failed_event(
    delivery: Delivery, *, agent: str, group: str, failure: Failure, event: AgentEvent | None
) -> AgentEvent:
    """The agent.failed event that tells of a dead letter. Its id is derived from the delivery: a second try is the
    same event."""
    return AgentEvent(
        event_id=uuid5(f"failed/{group}/{delivery.position}".encode("utf-8", "surrogatepass")),
        event_type=EventType.AGENT_FAILED,
        source_agent=agent,
        correlation_id=event.correlation_id if event is not None else position_id(delivery.position),
        payload={
            "original_event": event.model_dump(mode="json") if event is not None else None,
            "error": f"{failure.error_type}: {failure.message}",
            "attempts": failure.attempts,
            "reason": failure.reason,
            "position": delivery.position,
        },
        metadata={"causation_id": event.event_id} if event is not None else {},
    )


def parse(headers: Mapping[str, str]) -> Letter | None:
    """What a stored message's headers say; None when it is no dead letter."""
    if "dlq-reason" not in headers:
        return None

    def text(name: str) -> str:
        return several_lines(headers.get(_PREFIX + name, ""))

    def number(name: str) -> int | None:
        found = headers.get(_PREFIX + name, "")
        return int(found) if found.isdecimal() else None

    return Letter(
        agent=text("agent"),
        channel=text("channel"),
        position=text("position"),
        attempts=number("attempts") or 0,
        reason=text("reason"),
        error_type=text("error-type"),
        message=text("message"),
        traceback=text("traceback"),
        first_failed_at=text("first-failed-at"),
        last_failed_at=text("last-failed-at"),
        truncated=number("truncated"),
        sha256=text("sha256"),
    )


def original_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """A dead letter's headers without ours: what a redrive sends."""
    return {name: value for name, value in headers.items() if not name.lower().startswith(_PREFIX)}


def _own_headers(delivery: Delivery, agent: str, failure: Failure) -> dict[str, str]:
    now = clock.now()
    return {
        "dlq-agent": one_line(agent),
        "dlq-channel": one_line(delivery.channel),
        "dlq-position": one_line(delivery.position),
        "dlq-attempts": str(failure.attempts),
        "dlq-reason": one_line(failure.reason),
        "dlq-error-type": one_line(failure.error_type),
        "dlq-message": one_line(failure.message[:_MESSAGE]),
        "dlq-traceback": one_line(failure.traceback[-_TRACEBACK:]),
        "dlq-first-failed-at": _rfc3339(failure.first_failed_at or now),
        "dlq-last-failed-at": _rfc3339(failure.last_failed_at or now),
    }


def _originals(headers: Mapping[str, str]) -> dict[str, str]:
    """Verbatim, but for what no other wire could carry."""
    return dict(safe_header(name, value) for name, value in original_headers(headers).items())


def _size(headers: Mapping[str, str]) -> int:
    names = sum(len(name) + len(value.encode("utf-8", "surrogateescape")) + 4 for name, value in headers.items())
    return names + _MARGIN


def _rfc3339(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
