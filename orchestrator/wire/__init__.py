"""Between an event and the bytes on a broker (contract section 3). Pure: no I/O, no broker named.

codecs: body <-> AgentEvent · routes: which channel takes a type, its key and its schema · building: Outgoing from an
event · letters: dead letters · names: identifiers, trace context and what may stand in a subject or header.
"""

from orchestrator.wire.building import Origin, build, from_event, reply_to
from orchestrator.wire.codecs import Codec, codec, decode
from orchestrator.wire.letters import Failure, Letter, dead_letter, failed_event, original_headers, parse
from orchestrator.wire.names import child_id, child_traceparent, new_traceparent, one_line
from orchestrator.wire.routes import Route, Routes, key_text, value_at

__all__ = [
    "Codec",
    "Failure",
    "Letter",
    "Origin",
    "Route",
    "Routes",
    "build",
    "child_id",
    "child_traceparent",
    "codec",
    "dead_letter",
    "decode",
    "failed_event",
    "from_event",
    "key_text",
    "new_traceparent",
    "one_line",
    "original_headers",
    "parse",
    "reply_to",
    "value_at",
]
