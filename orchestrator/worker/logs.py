"""The worker's log: JSON lines on fd 1, one for each thing that a person may want to know; never one for each event."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, cast

from pydantic_core import to_json

# structlog.dev imports rich and pygments where it finds them: megabytes in each worker that none of them needs.
_rich = sys.modules.setdefault("rich", cast(Any, None))
import structlog  # noqa: E402

if _rich is None:
    del sys.modules["rich"]

from orchestrator import clock  # noqa: E402
from orchestrator.topology.model import Topology  # noqa: E402

_LEVELS = {"critical": 50, "error": 40, "warning": 30, "info": 20, "debug": 10}


def logger(topology: Topology, agent: str, slot: int) -> Any:
    """A structlog logger bound to the agent and its slot; secrets of the topology never get through."""
    secrets = tuple({form for secret in topology.secrets if secret for form in (secret, _as_json(secret))})

    def render(_: object, level: str, entry: MutableMapping[str, Any]) -> bytes:
        ts = datetime.fromtimestamp(clock.now(), UTC).isoformat(timespec="milliseconds")
        line = to_json({"ts": ts, "level": level, **entry}, fallback=repr, inf_nan_mode="null").decode()
        for secret in secrets:
            line = line.replace(secret, "***")
        return line.encode()

    found = structlog.wrap_logger(
        structlog.BytesLogger(sys.stdout.buffer),
        processors=[structlog.processors.format_exc_info, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return found.bind(agent=agent, slot=slot)


def take_over(log: Any) -> None:
    """Sends what libraries and handlers say through `logging` the same way."""
    root = logging.getLogger()
    root.handlers = [_Forward(log)]
    root.setLevel(logging.INFO)


class _Forward(logging.Handler):
    def __init__(self, log: Any) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = next((name for name, least in _LEVELS.items() if record.levelno >= least), "debug")
        more = {"exc_info": record.exc_info} if record.exc_info else {}
        getattr(self._log, level)(record.getMessage(), logger=record.name, **more)


def _as_json(text: str) -> str:
    """How `text` looks inside a line of JSON."""
    return to_json(text).decode()[1:-1]
