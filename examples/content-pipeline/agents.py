"""The agents of the content pipeline. Plain functions: nothing here knows which broker carries the events.

The work is simulated, so the example needs no key; put your model calls where the short sleeps are.
"""

import asyncio

from pydantic import BaseModel

from orchestrator import AgentEvent, Context


class Task(BaseModel):
    """What `task.created` carries; an event that does not fit is dead-lettered at once."""

    query: str


async def triage(task: Task, ctx: Context) -> dict[str, str]:
    ctx.log.info("assigned to research", query=task.query)
    return {"query": task.query}  # published as task.assigned: the one type that `publish:` names


async def research(event: AgentEvent, ctx: Context) -> None:
    query = event.payload["query"]  # a task without a query fails here: three attempts, then a dead letter
    await ctx.publish("agent.started", {"query": query})
    await asyncio.sleep(0.2)
    findings = [f"{query}: what it is", f"{query}: why it matters"]
    ctx.log.info("found", results=len(findings))
    await ctx.publish("agent.completed", {"query": query, "results": findings}, target_agent="writing")


async def writing(event: AgentEvent, ctx: Context) -> None:
    text = ". ".join(event.payload["results"]) + "."
    await asyncio.sleep(0.2)
    ctx.log.info("written", words=len(text.split()))
    await ctx.publish("agent.completed", {"text": text})
    await ctx.publish("review.requested", {"text": text})


async def review(event: AgentEvent, ctx: Context) -> dict[str, object]:
    text = event.payload["text"]
    ctx.log.info("approved", words=len(text.split()))
    return {"verdict": "approved", "text": text}
