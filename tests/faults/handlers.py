"""The handlers of the fault runs. Each run of each event leaves one line in a file: the record that is judged."""

import asyncio
import os
import time
from pathlib import Path

from orchestrator import AgentEvent, Context

RECORD = Path(os.environ["RECORD"])
_fd = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(event: AgentEvent, ctx: Context) -> None:
    """One atomic append; it is in the file even when the process dies in the next instruction."""
    os.write(
        _fd, f"{event.payload['n']} {event.payload['do']} {ctx.attempt} {os.getpid()} {time.time():.3f}\n".encode()
    )


async def work(event: AgentEvent, ctx: Context) -> None:
    note(event, ctx)
    match event.payload["do"]:
        case "fail":
            raise ValueError("this one always fails")
        case "die":
            os._exit(1)
        case "flaky" if ctx.attempt == 1:
            raise ConnectionError("works the second time")
        case "slow":
            await asyncio.sleep(0.05)
        case str(do) if do.startswith("sleep:"):
            await asyncio.sleep(float(do.removeprefix("sleep:")))
    await ctx.publish("agent.completed", {"n": event.payload["n"]})
