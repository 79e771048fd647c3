"""Identifiers, trace context, and text that a subject or header can carry. Pure."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from hashlib import sha1, sha256

from orchestrator.event import NAMESPACE

_NAMESPACE = NAMESPACE.bytes
_TYPE = re.compile(r"[^\s.*>\x00-\x1f\x7f]+(\.[^\s.*>\x00-\x1f\x7f]+)*")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_A_TOKEN = re.compile(r"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")
_VARIANT = {f"{digit:x}": f"{digit & 3 | 8:x}" for digit in range(16)}
_random = random.Random()


def is_event_type(text: str) -> bool:
    """Whether `text` is dotted tokens without spaces, control characters or wildcards: safe as a subject."""
    return _TYPE.fullmatch(text) is not None


def child_id(event_id: str, agent: str, index: int, event_type: str, target: str | None, payload: bytes) -> str:
    """The id of the `index`-th event that `agent` publishes while it handles `event_id`.

    uuid5 of (event_id, agent, index, sha256(type, target, payload)): a rerun that publishes the same gives the same id,
    so dedup drops the copy; one that publishes something else gives another. Written out because uuid.uuid5 takes
    three times as long.
    """
    content = sha256(f"{event_type}\0{target or ''}\0".encode() + payload).hexdigest()
    return uuid5(f"{event_id}/{agent}/{index}/{content}".encode("utf-8", "surrogatepass"))


def uuid5(name: bytes) -> str:
    """str(uuid.uuid5(NAMESPACE, name))."""
    text = sha1(_NAMESPACE + name, usedforsecurity=False).hexdigest()
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:32]}"


def new_traceparent() -> str:
    """A W3C trace context that begins a trace."""
    return f"00-{_random.getrandbits(128) or 1:032x}-{_random.getrandbits(64) or 1:016x}-01"


def child_traceparent(headers: Mapping[str, str], correlation_id: str) -> str:
    """The trace context of what is published while handling an event with `headers`: same trace, new span.

    An event that came without one gets a trace derived from its correlation id, so that retries and siblings share it.
    """
    span = _random.getrandbits(64) or 1
    found = headers.get("traceparent")
    if found is not None and (match := _TRACEPARENT.fullmatch(found)) and match[1] != "ff" and match[2] != "0" * 32:
        return f"00-{match[2]}-{span:016x}-{match[4]}"
    trace = sha256(correlation_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"00-{trace}-{span:016x}-01"


def one_line(text: str) -> str:
    """`text` as one line of ASCII; `several_lines` gives it back."""
    return text.encode("unicode_escape").decode("ascii")


def several_lines(text: str) -> str:
    """What one_line was given; text that no one_line made is returned as it is."""
    try:
        return text.encode("ascii").decode("unicode_escape")
    except UnicodeError:
        return text


def safe_header(name: str, value: str) -> tuple[str, str]:
    """A foreign header that any wire can carry: other characters in the name become _, control characters in the value
    are written out."""
    return _NOT_A_TOKEN.sub("_", name) or "_", one_line(value) if _CONTROL.search(value) else value
