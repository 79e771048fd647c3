"""Fixtures: a supervisor in this process whose workers are processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.topology.model import Agent
from tests.supervisor.rig import Running


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """run(*agents) starts a supervisor in a fresh folder; it is stopped when the test ends."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*agents: Agent, **rest: Any) -> Running:
            running = Running(tmp_path, *agents, **rest)
            await running.start()

            async def end() -> None:
                assert running.task is not None
                if not running.task.done():
                    running.supervisor._fleet.kill()
                    await running.stop()
                running.output.close()

            stack.push_async_callback(end)
            return running

        yield start
