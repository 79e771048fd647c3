"""One YAML file runs a team of event-driven agents.

What a handler or a client program imports lives here, and nothing else: no I/O happens at import. Context and Client
are looked up when they are first named, so that the command line starts without them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError, Reject, RetryLater
from orchestrator.event import AgentEvent, EventType

if TYPE_CHECKING:
    from orchestrator.client import Client
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
    "Client": "orchestrator.client",
    "Context": "orchestrator.worker.context",
    "SyncContext": "orchestrator.worker.context",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
