"""From an exception to what the policy and a dead letter need to know of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from orchestrator.errors import DecodeError, Misrouted, OrchestratorError, PayloadError, Reject
from orchestrator.worker.handlers import user_traceback
from orchestrator.worker.policy import Fault

_TRACEBACK = 16_000  # characters; a recursion error's is far longer


#: Errors after which no retry can help, and the dead letter's reason for each.
_FINAL: tuple[tuple[type[BaseException], str], ...] = (
    (Reject, "rejected"),
    (DecodeError, "undecodable"),
    (PayloadError, "invalid"),
    (Misrouted, "misrouted"),
)


def fault_of(error: BaseException, redact: Callable[[str], str]) -> Fault:
    """Names the exception and its bases, bare and dotted."""
    names = []
    for cls in type(error).__mro__:
        if cls in (object, BaseException):
            continue
        known = cls.__module__ == "builtins" or cls.__module__ == OrchestratorError.__module__
        names.append(cls.__qualname__ if known else f"{cls.__module__}.{cls.__qualname__}")
        names.append(cls.__name__)
        names += _public_names(cls)
    final = next((reason for cls, reason in _FINAL if isinstance(error, cls)), None)
    if isinstance(error, PayloadError) and error.output:
        final = None  # an answer of a language model may be right the next time: the policy decides
    message = error.message if isinstance(error, OrchestratorError) else _text(error)
    return Fault(tuple(dict.fromkeys(names)), redact(message), final)


def _public_names(cls: type) -> Iterator[str]:
    """pkg.errors.Error is raised, but `pkg.Error` is what people write: each package on the way that offers it."""
    parts = cls.__module__.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if getattr(sys.modules.get(module), cls.__name__, None) is cls:
            yield f"{module}.{cls.__name__}"


def traceback_of(error: BaseException, redact: Callable[[str], str]) -> str:
    """The handler's own part of the traceback; empty for what is not the code's fault."""
    if error.__traceback__ is None or isinstance(error, (DecodeError, Misrouted, Reject)):
        return ""
    return redact(user_traceback(error))[-_TRACEBACK:]


def _text(error: BaseException) -> str:
    """str(error), of exceptions whose __str__ is broken too."""
    try:
        return str(error)
    except Exception as broken:
        return f"(its text cannot be had: {type(broken).__name__})"
