"""The handlers of topology.yaml: plain functions. Save this file while `orchestrator dev` runs to see them replaced."""

from pydantic import BaseModel

from orchestrator import AgentEvent, Context


class Task(BaseModel):
    """The payload of task.created. A payload that does not fit becomes a dead letter at once."""

    topic: str
    sections: int = 2


async def outline(task: Task, ctx: Context) -> dict[str, object]:
    """What a handler returns is published, since the file names exactly one type in `publish:`."""
    ctx.log.info("outlining", topic=task.topic)
    return {"topic": task.topic, "sections": [f"{task.topic}, part {n + 1}" for n in range(task.sections)]}


async def write(event: AgentEvent, ctx: Context) -> None:
    """Publishing by hand; the correlation id goes along by itself."""
    tone = ctx.config["tone"]
    paragraphs = [f"Something {tone} about {section}." for section in event.payload["sections"]]
    if "impossible" in event.payload["topic"]:
        raise ValueError("nobody can write about that")  # three attempts, then: orchestrator dlq list
    await ctx.publish("draft.written", {"topic": event.payload["topic"], "paragraphs": paragraphs})


def review(event: AgentEvent, ctx: Context) -> dict[str, object]:
    """A plain `def` runs in a thread, so it may block."""
    words = sum(len(p.split()) for p in event.payload["paragraphs"])
    ctx.log.info("reviewed", topic=event.payload["topic"], words=words)
    return {"topic": event.payload["topic"], "verdict": "approved", "words": words}
