"""One log file for each agent under .orchestrator/logs/, rotated by size; read back by `logs`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Bytes in one file, and how many older ones are kept beside it (research.log, research.log.1, ...).
SIZE, KEPT = 10 << 20, 3

_OPEN = 256  # files kept open at a time


class LogFiles:
    """Appends records as JSON lines. Raises OSError when the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._open: dict[str, tuple[int, int]] = {}  # agent -> descriptor, size

    def write(self, record: Mapping[str, Any]) -> None:
        """To the file of the agent that the record names."""
        agent = str(record["agent"])
        data = json.dumps(record, default=str).encode() + b"\n"
        descriptor, size = self._open.pop(agent) if agent in self._open else self._opened(agent)
        if size and size + len(data) > SIZE:
            os.close(descriptor)
            self._rotate(agent)
            descriptor, size = self._opened(agent)
        os.write(descriptor, data)
        self._open[agent] = descriptor, size + len(data)  # the last one used is the last one closed

    def recent(self, agents: Sequence[str], lines: int) -> list[dict[str, Any]]:
        """The last `lines` records of those agents together (of all, when none is named), oldest first."""
        return recent(self._folder, agents, lines)

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _opened(self, agent: str) -> tuple[int, int]:
        while len(self._open) >= _OPEN:
            os.close(self._open.pop(next(iter(self._open)))[0])
        path = self._folder / f"{agent}.log"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return descriptor, os.fstat(descriptor).st_size

    def _rotate(self, agent: str) -> None:
        path = self._folder / f"{agent}.log"
        for number in range(KEPT, 0, -1):
            older = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            with contextlib.suppress(FileNotFoundError):
                older.replace(path.with_name(f"{path.name}.{number}"))


def recent(folder: Path, agents: Sequence[str], lines: int) -> list[dict[str, Any]]:
    """Also without a supervisor: the last records in `folder`, oldest first."""
    names = agents or sorted(path.name.removesuffix(".log") for path in folder.glob("*.log"))
    found: list[dict[str, Any]] = []
    for name in names:
        found += _last(folder / f"{name}.log", lines)
    found.sort(key=lambda record: str(record.get("ts", "")))
    return found[-lines:] if lines else []


def _last(path: Path, lines: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for each in (path, *(path.with_name(f"{path.name}.{n}") for n in range(1, KEPT + 1))):
        if len(records) >= lines:
            break
        with contextlib.suppress(FileNotFoundError):
            records = [*_parsed(each.read_bytes().splitlines()[-lines:]), *records]
    return records[-lines:]


def _parsed(raw: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in raw:
        with contextlib.suppress(ValueError):  # a line that a full disk cut short
            yield json.loads(line)
