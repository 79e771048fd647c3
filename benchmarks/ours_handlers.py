"""Our contender's handlers: the same work as the others', in the words of a user of this package."""

from __future__ import annotations

from benchmarks.workload import Meter
from orchestrator import AgentEvent, Context

METER = Meter.from_env()


async def pipeline(event: AgentEvent, ctx: Context) -> None:
    query = event.payload["query"]
    await ctx.publish("agent.started", {"query": query})
    await ctx.publish("agent.completed", {"results": [query] * 3}, target_agent="writing")
    METER.tick()


async def ack(event: AgentEvent, ctx: Context) -> None:
    METER.tick()
