"""The errors that this package raises. Pure: no I/O, no imports of our own.

OrchestratorError                 what went wrong, and what to do next
├── TopologyError                 the file is wrong; carries every Diagnostic found
├── PlanError                     the plan cannot be carried out
│   ├── RefusedError              it would touch what is not ours, or lose data that was not named
│   └── LockedError               another apply or supervisor holds this topology
├── BrokerError                   the broker said no, or nothing
│   ├── BrokerUnavailable         not reachable now; trying again later may work
│   ├── PublishRejected           full, too large or not permitted: trying the same again will not work
│   └── ResourceMissing           a stream, topic, group or consumer that should exist does not
├── RoutingError                  an event type that nothing routes, or that the agent may not publish
├── DecodeError                   bytes that are no event; dead-lettered, never retried
├── PayloadError                  a payload that fails its model or schema; an event that has one is dead-lettered
├── Misrouted                     an event that nobody may handle where it is; dead-lettered, never retried
├── HandlerLoadError              a handler that cannot be imported or called
├── SupervisorError               none is running, or it does not answer
└── RequestTimeout                no reply within the time given

Signals that a handler raises (not failures of this package):
├── RetryLater(delay)             again in `delay`, without counting an attempt
└── Reject(reason)                dead-letter at once
"""

from __future__ import annotations


class OrchestratorError(Exception):
    """Base of all errors of this package.

    `hint` says what to type or change next; it is printed below the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class PlanError(OrchestratorError):
    """The plan cannot be carried out as it stands."""


class RefusedError(PlanError):
    """Refused before anything was changed."""


class LockedError(PlanError):
    """Another process is working on the same topology."""


class BrokerError(OrchestratorError):
    """A broker answered with an error, or not at all."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be reached at present."""


class PublishRejected(BrokerError):
    """The broker refused an event; sending the same again will not help.

    `limit` is the largest size in bytes that the broker would have taken, given only when size was the reason: a dead
    letter is then cut to fit.
    """

    def __init__(self, message: str, *, hint: str | None = None, limit: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.limit = limit


class ResourceMissing(BrokerError):
    """A stream, topic, group or consumer that should exist does not."""


class RoutingError(OrchestratorError):
    """An event type that no channel routes, or that the agent may not publish."""


class DecodeError(OrchestratorError):
    """Bytes that are not an event."""


class PayloadError(OrchestratorError):
    """A payload that fails its model or its schema. `output`: one that a handler was publishing, so another run may
    mend it; what the handler was given never changes."""

    output = False


class Misrouted(OrchestratorError):
    """An event that reached a subscription whose agent must not handle it, and that nobody else will be handed."""


class HandlerLoadError(OrchestratorError):
    """A handler that cannot be imported or called. `traceback` is the user module's own, as text."""

    def __init__(self, message: str, *, hint: str | None = None, traceback: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.traceback = traceback


class SupervisorError(OrchestratorError):
    """No supervisor is running for the topology, or it does not answer."""


class RequestTimeout(OrchestratorError):
    """No reply arrived within the time given."""


class RetryLater(Exception):
    """Raised by a handler: run this event again later, without counting an attempt.

    `delay` is seconds, or a duration text such as "30s". Bounded by the policy's give_up_after.
    """

    def __init__(self, delay: float | str = 1.0) -> None:
        super().__init__(f"retry later ({delay})")
        self.delay = delay


class Reject(Exception):
    """Raised by a handler: dead-letter this event at once, with `reason`."""

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
        self.reason = reason
