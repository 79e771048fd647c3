"""A start that is tried before it counts: for agents whose old workers must end before the new ones begin.

Walk "an edit", between `update` and rollout. What runs in the child is rehearsing.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import SupervisorError
from orchestrator.supervisor.lines import Lines
from orchestrator.supervisor.nursery import Nursery
from orchestrator.supervisor.process import DRAINED
from orchestrator.topology.model import Agent, Topology


class Rehearsal:
    """One child that loads the agent's handler, connects to its brokers, and ends."""

    def __init__(self, agent: Agent, nursery: Nursery, log: Callable[[str, int, bytes], None]) -> None:
        self._agent = agent
        self._nursery = nursery
        self._log = log
        self._id = 0
        self._told: dict[str, Any] | None = None
        self._ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._heard = asyncio.Event()

    async def run(self, key: str, topology: Topology, run_dir: Path, deadline: float) -> None:
        """Raises SupervisorError when the new worker would not start, or did not within `deadline` seconds."""
        name = self._agent.name
        self._id, control, log = self._nursery.spawn(key, topology, name, 0, run_dir, rehearsal=True)
        lines = (
            Lines(control, self._hear, self._heard.set),
            Lines(log, lambda line: self._log(name, 0, line), lambda: None),
        )
        try:
            async with asyncio.timeout(deadline):
                code = await self._ended
                await self._heard.wait()
        except TimeoutError:
            self._nursery.kill(self._id)
            raise SupervisorError(
                f"{name}: did not load within {deadline:.0f} s; what ran before goes on",
                hint=f"orchestrator logs {name} shows what it did",
            ) from None
        finally:
            for each in lines:
                each.close()
        if code != DRAINED:
            told = self._told or {"message": f"its process ended with {code}", "hint": None, "traceback": None}
            text = f"{name} does not start: {told['message']}; what ran before goes on\n{told['traceback'] or ''}"
            raise SupervisorError(text.rstrip(), hint=told["hint"] or "mend it and apply again")

    def exited(self, number: int, code: int | None, signal_number: int | None) -> None:
        """Of the warm parent: its worker `number` has ended."""
        if number == self._id and not self._ended.done():
            self._ended.set_result(code if signal_number is None else -signal_number)

    def abandon(self) -> None:
        """The warm parent died: nobody will tell how it ended."""
        if not self._ended.done():
            self._ended.set_exception(SupervisorError("the warm parent died meanwhile", hint="try it again"))

    def _hear(self, line: bytes) -> None:
        self._told = json.loads(line)
