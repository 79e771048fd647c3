"""What the workers of the conformance suite do with an event, as its payload says; each run is written to a file.

A line is "<number> <attempt> <pid> started" or "… finished". The file is the independent record: tests count from it.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from orchestrator import AgentEvent, Context

RECORD = os.environ.get("CREW_RECORD", "")


def note(event: AgentEvent, ctx: Context, what: str) -> None:
    line = f"{event.payload['number']} {ctx.attempt} {os.getpid()} {what}\n"
    fd = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, line.encode())
    os.close(fd)


def die_once(number: int) -> None:
    """Ends the process as SIGKILL would, the first time that this event gets here."""
    try:
        os.close(os.open(f"{RECORD}.died.{number}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os._exit(1)


async def work(event: AgentEvent, ctx: Context) -> dict[str, Any] | None:
    number, do = event.payload["number"], event.payload.get("do", "")
    note(event, ctx, "started")
    if do == "exit":
        await asyncio.sleep(0.05)  # its neighbours are running too
        os._exit(1)
    if do == "fail":
        raise ValueError(f"event {number} always fails")
    if do == "die in handler":
        die_once(number)
    if do == "answer":
        note(event, ctx, "finished")
        return {"number": number}
    await ctx.publish("agent.done", {"number": number})
    if do == "die between publishes":
        await asyncio.sleep(0.3)  # long enough for what was handed over to be sent and confirmed
        die_once(number)
    elif do == "slow":
        await asyncio.sleep(0.2)
    await ctx.publish("agent.second", {"number": number})
    if do == "die after publishes":
        await asyncio.sleep(0.3)
        die_once(number)
    note(event, ctx, "finished")
    return None
