"""Two handlers: plain functions, no broker in sight."""

from orchestrator import AgentEvent, Context


async def research(event: AgentEvent, ctx: Context) -> None:
    query = event.payload["query"]
    await ctx.publish("agent.completed", {"results": [f"all about {query}"]}, target_agent="writing")


async def writing(event: AgentEvent, ctx: Context) -> None:
    text = " and ".join(event.payload["results"])
    ctx.log.info("written", text=text)
    await ctx.publish("agent.completed", {"text": text})
