"""One YAML file runs a team of event-driven agents.

What a handler or a client program imports lives here, and nothing else: no I/O happens at import. All but the errors
is looked up when it is first named, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError, Reject, RetryLater

if TYPE_CHECKING:
    from orchestrator.client import Client
    from orchestrator.event import AgentEvent, EventType
    from orchestrator.worker.context import AgentContext, Context, SyncContext

__all__ = [
    "AgentContext",
    "AgentEvent",
    "Client",
    "Context",
    "EventType",
    "OrchestratorError",
    "Reject",
    "RetryLater",
    "SyncContext",
]

_LATER = {
    "AgentContext": "orchestrator.worker.context",
    "AgentEvent": "orchestrator.event",
    "Client": "orchestrator.client",
    "Context": "orchestrator.worker.context",
    "EventType": "orchestrator.event",
    "SyncContext": "orchestrator.worker.context",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
