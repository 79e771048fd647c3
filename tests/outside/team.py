"""The content pipeline, applied and running on a real server, for clients that know nothing of this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


class EventType(str, Enum):  # noqa: UP042  (as a team outside wrote it)
    TASK_ASSIGNED = "task.assigned"
    AGENT_STARTED = "agent.started"
    AGENT_COMPLETED = "agent.completed"
    REVIEW_COMPLETED = "review.completed"


class StrictEvent(BaseModel):
    """An outside team's own model: every field is needed, the types are closed, times have no zone."""

    event_id: str = Field(default_factory=lambda: str(uuid.uuid4()))
    event_type: EventType
    source_agent: str
    target_agent: str | None = None
    correlation_id: str
    timestamp: datetime = Field(default_factory=lambda: datetime(2026, 1, 31, 12, 0))
    payload: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)


def task(query: str) -> StrictEvent:
    return StrictEvent(
        event_type=EventType.TASK_ASSIGNED,
        source_agent="outside",
        correlation_id=f"outside-{query}",
        payload={"query": query},
    )


class Team:
    """`orchestrator apply -d` of the example in a folder of its own; stop() ends it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        for name in ("topology.yaml", "agents.py"):
            shutil.copy(ROOT / "examples" / "content-pipeline" / name, folder / name)

    def command(self, *args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", *args, "--set", f"url={self.url}"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self) -> Team:
        self.command("apply", "--yes", "-d")
        return self

    def stop(self) -> None:
        self.command("stop")

    def types(self, correlation_id: str) -> list[str]:
        return [e["event_type"] for e in json.loads(self.command("trace", correlation_id, "-o", "json"))["events"]]

    def has(self, event_type: str, correlation_id: str) -> Callable[[], bool]:
        return lambda: event_type in self.types(correlation_id)
