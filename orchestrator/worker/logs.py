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
_Bound: Any = structlog.make_filtering_bound_logger(logging.INFO)


def logger(topology: Topology, agent: str, slot: int) -> Any:
    """A structlog logger bound to the agent and its slot; secrets of the topology never get through."""
    secrets = tuple({form for secret in topology.secrets if secret for form in (secret, _as_json(secret))})

    def render(_: object, level: str, entry: MutableMapping[str, Any]) -> bytes:
        ts = datetime.fromtimestamp(clock.now(), UTC).isoformat(timespec="milliseconds")
        line = to_json({"ts": ts, "level": level, **entry}, fallback=repr, inf_nan_mode="null").decode()
        for secret in secrets:
            line = line.replace(secret, "***")
        return line.encode()

    return _Bound(_Output(), [structlog.processors.format_exc_info, render], {"agent": agent, "slot": slot})


def prepare() -> None:
    """What `take_over` needs, done by the warm parent already: its workers share it."""
    if logging.root.handlers != [_FORWARD]:
        logging.root.handlers = [_FORWARD]
        logging.root.setLevel(logging.INFO)


def take_over(log: Any) -> None:
    """Sends what libraries and handlers say through `logging` the same way."""
    prepare()
    _FORWARD.log = log


class _Output:
    """Where structlog's lines go: fd 1. The buffer locks itself, so a line stays in one piece."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = sys.stdout.buffer

    def msg(self, line: bytes) -> None:
        self._buffer.write(line + b"\n")
        self._buffer.flush()

    critical = error = warning = info = debug = exception = log = msg


class _Forward(logging.Handler):
    log: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.log is None:  # the warm parent, or a rehearsal: as if nobody had set logging up
            if record.levelno >= logging.WARNING:
                sys.stderr.write(f"{self.format(record)}\n")
            return
        level = next((name for name, least in _LEVELS.items() if record.levelno >= least), "debug")
        more = {"exc_info": record.exc_info} if record.exc_info else {}
        getattr(self.log, level)(record.getMessage(), logger=record.name, **more)


_FORWARD = _Forward()


def _as_json(text: str) -> str:
    """How `text` looks inside a line of JSON."""
    return to_json(text).decode()[1:-1]
