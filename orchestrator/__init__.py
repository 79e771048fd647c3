"""One YAML file runs a team of event-driven agents.

What a handler or a client program imports lives here, and nothing else: no I/O happens at import.
"""

from orchestrator.errors import OrchestratorError, Reject, RetryLater
from orchestrator.event import AgentEvent, EventType

__all__ = ["AgentEvent", "EventType", "OrchestratorError", "Reject", "RetryLater"]
