"""What an entry of a stream looks like (contract section 3): written here, and read whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from orchestrator.brokers.base import Outgoing
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected

FIELDS = ("event_id", "event_type", "source_agent", "correlation_id", "payload")
_HEADERS = {"event-id": "event_id", "source-agent": "source_agent", "correlation-id": "correlation_id"}
_SPECIAL = frozenset({*FIELDS, *_HEADERS})
_USUAL = [name.encode() for name in FIELDS]
_OF_FIELDS = {field.encode(): header for header, field in _HEADERS.items()}
#: A script can write no more than some 4,000 fields. Of an entry with too many so few are kept that its dead letter,
#: which has them and its own, is below the limit.
_TOO_MANY, _KEPT = 1200, 1000
_good_types: set[str] = set()


def check(message: Outgoing) -> None:
    """Raises PublishRejected for names and headers that not every broker's wire could carry."""
    kind = message.event_type
    if kind not in _good_types:
        if not kind or any(c in "*>" or c.isspace() or not c.isprintable() for c in kind):
            raise PublishRejected(f"{kind!r} is no event type", hint="use letters, digits, _ - and dots")
        if len(_good_types) < 10_000:
            _good_types.add(kind)
    for text in (message.event_id, message.source_agent, message.correlation_id):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise PublishRejected(f"{text!r} is no text that UTF-8 can carry", hint="use another id")
    for name, value in message.headers.items():
        if name.isidentifier() and value.isprintable():
            continue  # the usual case
        if not name or any(c in "\r\n\0:" for c in name) or any(c in "\r\n\0" for c in value):
            raise PublishRejected(f"the header {name!r} holds a line break or a colon", hint="take it out")


def refusal(word: str, what: str) -> BrokerError:
    """The error for a word of COMMIT that refuses an output."""
    if word == "CLOSED":
        return BrokerUnavailable(f"the connection was closed before {what} was confirmed", hint="publish it again")
    if word == "FULL":
        return PublishRejected(f"{what} was refused: the channel is full", hint="raise retention, or add readers")
    if word.startswith("LARGE"):
        limit = int(word.split()[1])
        return PublishRejected(f"{what} is larger than max_bytes", hint="raise retention.max_bytes", limit=limit)
    if word == "MISSING":
        return PublishRejected(f"{what} was refused: its stream does not exist", hint="run `orchestrator apply`")
    return PublishRejected(f"{what} was refused: {word}", hint="look at the server's state and permissions")


def headers_of(message: Outgoing) -> Mapping[str, str]:
    """The fields that an entry has beside FIELDS."""
    headers = message.headers
    if _SPECIAL.isdisjoint(headers):
        return headers
    return {
        f"x-{name}" if name in FIELDS else name: value
        for name, value in headers.items()
        if name not in _HEADERS or value != getattr(message, _HEADERS[name])
    }


def fields(message: Outgoing) -> list[str | bytes]:
    """All fields and values."""
    found: list[str | bytes] = [
        "event_id", message.event_id, "event_type", message.event_type, "source_agent", message.source_agent,
        "correlation_id", message.correlation_id, "payload", message.body,
    ]  # fmt: skip
    for name, value in headers_of(message).items():
        found += (name, value)
    return found


def parse(flat: Sequence[bytes]) -> tuple[bytes, dict[str, str], str | None]:
    """Body, headers and event type of an entry, whoever wrote it; the type that the body names when no field does.
    Fields that are not text are surrogate-escaped, and those of an entry with too many are left out."""
    if flat[0:10:2] == _USUAL and flat[1] and flat[5] and flat[7] and len(flat) <= 2 * _TOO_MANY:
        try:  # as this package writes it
            headers = {"event-id": flat[1].decode(), "source-agent": flat[5].decode()}
            headers["correlation-id"] = flat[7].decode()
            if len(flat) > 10:
                rest = iter(flat[10:])
                for name, value in zip(rest, rest, strict=False):
                    headers[name.decode()] = value.decode()
            return flat[9], headers, flat[3].decode()
        except UnicodeDecodeError:
            pass  # text that is none is rare, and read below
    body, kind, headers, known = b"", None, {}, {}
    pairs = iter(flat if len(flat) <= 2 * _TOO_MANY else _shortened(flat))
    for name, value in zip(pairs, pairs, strict=False):
        if name == b"payload":
            body = value
        elif name == b"event_type":
            kind = value.decode("utf-8", "replace")
        elif (header := _OF_FIELDS.get(name)) is not None:
            if value:
                known[header] = value.decode("utf-8", "surrogateescape")
        else:
            headers[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    return body, {**known, **headers}, kind if kind is not None else _type_in(body)


def _shortened(flat: Sequence[bytes]) -> Sequence[bytes]:
    at = next((n for n in range(0, len(flat) - 1, 2) if flat[n] == b"payload"), 0)
    return [*flat[at : at + 2], *flat[: 2 * _KEPT]]


def _type_in(body: bytes) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    kind = found.get("event_type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None
