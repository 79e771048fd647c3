"""The work that every contender does, and how it is timed.

pipeline: decode an AgentEvent with pydantic, publish two confirmed events with dedup ids, settle.
ack: decode and settle.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

from orchestrator import AgentEvent

#: Share of the events that warms up; the clock starts after it.
WARM_UP = 0.2


class Meter:
    """Counts handled events in the contender's own process; writes its result when the last one was handled."""

    def __init__(self, events: int, result: Path) -> None:
        self.events = events
        self.result = result
        self.count = 0
        self.first = max(1, int(events * WARM_UP))
        self.started = 0.0

    @classmethod
    def from_env(cls) -> Meter:
        return cls(int(os.environ["BENCH_EVENTS"]), Path(os.environ["BENCH_RESULT"]))

    @property
    def done(self) -> bool:
        return self.count >= self.events

    def tick(self) -> None:
        self.count += 1
        if self.count == self.first:
            self.started = time.perf_counter()
        elif self.count == self.events:
            seconds = time.perf_counter() - self.started
            partial = self.result.with_suffix(".partial")
            partial.write_text(json.dumps({"events": self.events - self.first, "seconds": seconds}))
            partial.rename(self.result)


def inputs(count: int) -> list[AgentEvent]:
    """`count` distinct events of some 400 bytes."""
    return [
        AgentEvent(
            event_type="task.assigned",
            source_agent="bench",
            correlation_id=str(uuid.uuid4()),
            payload={"query": f"question {n}", "depth": 3, "tags": ["a", "b", "c"], "note": "x" * 100},
        )
        for n in range(count)
    ]


def outputs(event: AgentEvent) -> tuple[AgentEvent, AgentEvent]:
    """What the pipeline publishes for `event`, as a hand-written handler would build it."""
    first = AgentEvent(
        event_id=str(uuid.uuid5(uuid.NAMESPACE_OID, event.event_id + "0")),
        event_type="agent.started",
        source_agent="bench",
        correlation_id=event.correlation_id,
        payload={"query": event.payload["query"]},
    )
    second = AgentEvent(
        event_id=str(uuid.uuid5(uuid.NAMESPACE_OID, event.event_id + "1")),
        event_type="agent.completed",
        source_agent="bench",
        target_agent="writing",
        correlation_id=event.correlation_id,
        payload={"results": [event.payload["query"]] * 3},
    )
    return first, second
