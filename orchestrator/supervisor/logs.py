"""What workers and supervisor say, on its way to people: log files, the foreground terminal, and `logs --follow`.

A line becomes a record {"ts", "level", "agent", "slot", "event", ...}; secrets are redacted first. Files hold records
as JSON lines; the foreground shows them as coloured lines per agent, or as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from orchestrator.supervisor.logfiles import LogFiles
from orchestrator.topology.model import Topology

Record = dict[str, Any]

#: The agent name under which the supervisor itself speaks.
SUPERVISOR = "supervisor"

#: Records that a slow follower may fall behind before it misses some.
_BEHIND = 10_000

_COLORS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_LEVELS = {"warning": 33, "error": 31, "critical": 31}
_KNOWN = ("ts", "level", "agent", "slot", "event")


class LogSink:
    """Give `folder` to write files (10 MiB each, rotated), `stream` to show lines there; both are optional.

    `color` None: when `stream` is a terminal and NO_COLOR is not set.
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        stream: TextIO | None = None,
        form: Literal["text", "json"] = "text",
        color: bool | None = None,
    ) -> None:
        self._files = LogFiles(folder) if folder is not None else None
        self._stream = stream
        self._form = form
        if color is None:
            color = stream is not None and stream.isatty() and not os.environ.get("NO_COLOR")
        self._painter = Painter(color)
        self._secrets: set[str] = set()  # an edit may change one while old workers still know the other
        self._followers: list[asyncio.Queue[Record | None]] = []

    def use(self, topology: Topology) -> None:
        """From now on its secrets are redacted too, and its agents' names aligned."""
        for secret in filter(None, topology.secrets):
            self._secrets |= {secret, json.dumps(secret)[1:-1]}
        self._painter.align(topology.agents)

    def line(self, agent: str, slot: int, raw: bytes) -> None:
        """One line that a worker wrote: a JSON record of its log, or whatever the handler printed."""
        self._emit(parse(self._redact(raw.decode("utf-8", "replace")), agent, slot))

    def say(self, level: str, agent: str, text: str) -> None:
        """The supervisor itself; `agent` "" when it is about none in particular."""
        record: Record = {"ts": now(), "level": level, "agent": SUPERVISOR, "slot": None, "event": self._redact(text)}
        if agent:
            record["about"] = agent
        self._emit(record)

    @contextlib.contextmanager
    def follow(self) -> Iterator[asyncio.Queue[Record | None]]:
        """Every record from now on, None at the end; a follower that falls far behind is told that it misses some."""
        queue: asyncio.Queue[Record | None] = asyncio.Queue()
        self._followers.append(queue)
        try:
            yield queue
        finally:
            self._followers.remove(queue)

    def recent(self, agents: Sequence[str], lines: int) -> list[Record]:
        """The last records in the files, oldest first; of all agents when none is named."""
        return self._files.recent(agents, lines) if self._files is not None else []

    def end_following(self) -> None:
        """Nothing more will come."""
        for queue in self._followers:
            queue.put_nowait(None)

    def close(self) -> None:
        if self._files is not None:
            self._files.close()

    def _redact(self, text: str) -> str:
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def _emit(self, record: Record) -> None:
        if self._files is not None:
            self._files.write(record)
        for queue in self._followers:
            if queue.qsize() < _BEHIND:
                queue.put_nowait(record)
            elif queue.qsize() == _BEHIND:
                missed = "this follower is too slow: records are missing from here on"
                queue.put_nowait({**record, "level": "warning", "event": missed})
        if self._stream is not None:
            text = json.dumps(record) if self._form == "json" else self._painter.paint(record)
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except BrokenPipeError:  # `| head` has seen enough; the workers go on
                self._stream = None


class Painter:
    """A record for people, like `research.0 | 12:00:01 warning cannot look it up attempt=2`: one line, and what has
    lines of its own (a traceback) below it."""

    def __init__(self, color: bool) -> None:
        self._color = color
        self._colors: dict[str, int] = {}
        self._width = len(SUPERVISOR)

    def align(self, agents: Iterable[str]) -> None:
        self._width = max([self._width, *(len(name) + 2 for name in agents)])

    def paint(self, record: Record) -> str:
        agent, slot, level = record["agent"], record.get("slot"), str(record.get("level", "info"))
        name = agent if slot is None else f"{agent}.{slot}"
        more = {key: value for key, value in record.items() if key not in _KNOWN and key != "about"}
        blocks = [value for value in more.values() if isinstance(value, str) and "\n" in value]
        rest = " ".join(f"{key}={_plain(value)}" for key, value in more.items() if value not in blocks)
        moment = str(record.get("ts", ""))[11:19]
        prefix = self._paint(self._agent_color(agent), f"{name:<{self._width}} |")
        shown = "" if level == "info" else self._paint(_LEVELS.get(level, 2), level) + " "
        below = "".join(f"\n{prefix}   {line}" for block in blocks for line in block.rstrip().splitlines())
        head = f"{prefix} {self._paint(2, moment)} {shown}{record.get('event', '')}"
        return head + (f" {rest}" if rest else "") + below

    def _agent_color(self, agent: str) -> int:
        if agent == SUPERVISOR:
            return 1
        return self._colors.setdefault(agent, _COLORS[len(self._colors) % len(_COLORS)])

    def _paint(self, code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color and text else text


def parse(text: str, agent: str, slot: int) -> Record:
    """A worker's line as a record; one that is no JSON record of a log becomes an event of its own."""
    if text.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text)
            if isinstance(found, dict) and "event" in found and "ts" in found:
                return {**found, "agent": agent, "slot": slot}
    return {"ts": now(), "level": "info", "agent": agent, "slot": slot, "event": text}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def foreground(state_dir: Path, form: Literal["text", "json"] = "text") -> LogSink:
    """Files, and lines on stdout."""
    return LogSink(folder=state_dir / "logs", stream=sys.stdout, form=form)


def _plain(value: object) -> str:
    return value if isinstance(value, str) and " " not in value else json.dumps(value, default=str)
