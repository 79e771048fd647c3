"""Consumers that end badly: killed or frozen from outside while they hold events. ProcessVictim runs victim.py."""

from __future__ import annotations

import asyncio
import importlib
import json
import pickle
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.brokers.base import History
from orchestrator.topology.model import Topology
from tests.patience import PATIENCE


@dataclass(frozen=True)
class Held:
    """A delivery as the victim saw it."""

    position: str
    token: bytes
    body: bytes


class Victim(Protocol):
    async def take(self, count: int = 1) -> list[Held]:
        """Waits for its next deliveries."""

    async def mark(self, position: str, history: History) -> None: ...
    async def settle(self, position: str) -> str:
        """Settles with one output, `agent.done` with the position as message id; returns the error's text, or ""."""

    async def kill(self) -> None:
        """As SIGKILL."""

    async def freeze(self) -> None:
        """As SIGSTOP."""

    async def thaw(self) -> None: ...
    async def end(self) -> None:
        """Makes sure that nothing of it is left."""


class ProcessVictim:
    """A real process; it is told what to do by lines on its stdin and says what happens on stdout."""

    def __init__(self, process: Process, spec: Path) -> None:
        self._process = process
        self._spec = spec

    @classmethod
    async def start(
        cls, topology: Topology, agent: str, slot: str, free: int, constants: tuple[str, ...]
    ) -> ProcessVictim:
        places = [constant.partition(":")[::2] for constant in constants]
        leases = [(module, name, getattr(importlib.import_module(module), name)) for module, name in places]
        with tempfile.NamedTemporaryFile(prefix="victim-", delete=False) as file:
            pickle.dump(
                {"topology": topology, "agent": agent, "slot": slot, "free": free, "leases": leases},
                file,
            )
        script = str(Path(__file__).with_name("victim.py"))
        process = await asyncio.create_subprocess_exec(sys.executable, script, file.name, stdin=PIPE, stdout=PIPE)
        victim = cls(process, Path(file.name))
        assert (await victim._next())["type"] == "ready"
        return victim

    async def take(self, count: int = 1) -> list[Held]:
        found = [await self._next() for _ in range(count)]
        assert all(one["type"] == "delivery" for one in found), found
        return [Held(o["position"], bytes.fromhex(o["token"]), bytes.fromhex(o["body"])) for o in found]

    async def mark(self, position: str, history: History) -> None:
        answer = await self._ask({"do": "mark", "position": position, "history": history.encode().decode()})
        assert answer == "", answer

    async def settle(self, position: str) -> str:
        return await self._ask({"do": "settle", "position": position})

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    async def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def end(self) -> None:
        if self._process.returncode is None:
            await self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._spec.unlink(missing_ok=True)

    async def _ask(self, what: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        await self._process.stdin.drain()
        while (answer := await self._next())["type"] != "done":
            pass  # deliveries of which the test is not told
        return str(answer["error"])

    async def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
        assert line, f"the victim ended by itself with {await self._process.wait()}"
        found: dict[str, Any] = json.loads(line)
        return found
