"""A supervisor in a process of its own, for tests that kill it: python killed_supervisor.py FOLDER."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.supervisor.rig import Running, agent


async def main() -> int:
    team = Running(Path(sys.argv[1]), agent(replicas=2), agent("writing"))
    await team.start()
    await team.all_ready()
    print("ready", flush=True)
    assert team.task is not None
    return await team.task


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
