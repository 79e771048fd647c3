"""The supervisor's side of the warm parent: starts it, asks it for workers, hears of their ends, replaces it.

Everything runs in the supervisor's event loop. Requests are queued and written in order, so a spawn never overtakes
the topology that it needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import OrchestratorError, SupervisorError
from orchestrator.supervisor.lines import Lines
from orchestrator.supervisor.warm import ENTRY
from orchestrator.topology import dump
from orchestrator.topology.model import Topology


class Parent(Protocol):
    """Who hears of the workers."""

    def spawned(self, number: int, pid: int) -> None:
        """The worker `number` has been forked."""

    def exited(self, number: int, code: int | None, signal_number: int | None) -> None:
        """It has ended, by exit code or by signal."""

    def lost(self) -> None:
        """The warm parent itself died: nobody reaps the workers it had, and `spawn` uses the next one."""


_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Nursery:
    """One warm parent at a time. `entry` is the dotted name of the workers' entry function."""

    def __init__(self, parent: Parent, entry: str = ENTRY) -> None:
        self._entry = entry
        self._parent = parent
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._lines: Lines | None = None
        self._queue: asyncio.Queue[tuple[bytes, tuple[int, ...]]] = asyncio.Queue()
        self._known: dict[str, asyncio.Future[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._next_id = 0
        self._stopping = False
        self._started = 0.0
        self._pause = _FIRST_PAUSE

    @property
    def pid(self) -> int | None:
        """The warm parent's, while one runs."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Starts the warm parent; returns before it has finished its imports."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing in the current folder shadows the library
            "-m",
            "orchestrator.supervisor.warm",
            str(theirs.fileno()),
            self._entry,
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is ours alone
        )
        theirs.close()
        self._started = time.monotonic()
        self._lines = Lines(os.dup(ours.fileno()), self._hear, self._gone)
        self._tasks = [asyncio.create_task(self._write(ours, self._queue))]

    async def stop(self) -> None:
        """Ends the warm parent, and with it every worker that is left."""
        self._stopping = True
        process = self._process
        self._drop()
        if process is not None:
            await process.wait()

    async def prepare(self, key: str, topology: Topology) -> None:
        """Hands `topology` over once; returns when it is parsed. Raises SupervisorError when it cannot be used."""
        if key not in self._known:
            self._known[key] = asyncio.get_running_loop().create_future()
            self._ask({"op": "topology", "key": key, "dump": dump(topology).decode()})
        await asyncio.shield(self._known[key])

    def keep(self, keys: Collection[str]) -> None:
        """Forgets every topology but those."""
        stale = [key for key in self._known if key not in keys]
        for key in stale:
            del self._known[key]
        if stale:
            self._ask({"op": "forget", "keys": stale})

    def spawn(
        self, key: str, topology: Topology, agent: str, slot: int, run_dir: Path, *, rehearsal: bool = False
    ) -> tuple[int, int, int]:
        """Asks for a worker, or for a process that only rehearses its start. Returns its id, and our ends of its
        control socket and its log pipe (descriptors). Raises OSError when there are no more of these."""
        if key not in self._known:
            self._known[key] = asyncio.get_running_loop().create_future()
            self._ask({"op": "topology", "key": key, "dump": dump(topology).decode()})
        self._next_id += 1
        control, theirs = socket.socketpair()
        try:
            log, their_log = os.pipe()
        except OSError:
            control.close()
            theirs.close()
            raise
        request = {"op": "spawn", "id": self._next_id, "key": key, "agent": agent, "slot": slot}
        self._ask({**request, "run_dir": str(run_dir), "rehearsal": rehearsal}, theirs.detach(), their_log)
        return self._next_id, control.detach(), log

    def kill(self, number: int) -> None:
        """SIGKILL for the worker `number` of the present warm parent; one that has ended is left alone."""
        self._ask({"op": "kill", "id": number})

    def _ask(self, message: dict[str, Any], *descriptors: int) -> None:
        self._queue.put_nowait((json.dumps(message).encode() + b"\n", descriptors))

    async def _write(self, target: socket.socket, queue: asyncio.Queue[tuple[bytes, tuple[int, ...]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                data, descriptors = await queue.get()
                try:
                    if descriptors:  # they ride with the first byte, so they are there when the line is complete
                        await _send_descriptors(target, data[:1], descriptors)
                        data = data[1:]
                    await loop.sock_sendall(target, data)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)
        except (BrokenPipeError, ConnectionResetError):
            return  # _gone hears of it too

    def _hear(self, line: bytes) -> None:
        message = json.loads(line)
        if "exited" in message:
            self._parent.exited(message["exited"], message["code"], message["signal"])
        elif "spawned" in message:
            self._parent.spawned(message["spawned"], message["pid"])
        elif "topology" in message and (known := self._known.get(message["topology"])) is not None:
            if known.done():
                return
            if message["error"] is None:
                known.set_result(None)
            else:
                known.set_exception(OrchestratorError(message["error"], hint=message["hint"]))
                known.exception()  # told to whoever prepares; not an error when nobody does
                del self._known[message["topology"]]

    def _gone(self) -> None:
        if self._stopping:
            return
        for known in self._known.values():
            if not known.done():
                known.set_exception(SupervisorError("the warm parent died", hint="try it again"))
                known.exception()
        self._drop()
        self._parent.lost()

    async def restart(self) -> None:
        """A new warm parent after `lost`; waits longer when the last one died soon after its start."""
        if self._process is not None:
            await self._process.wait()
        lived = time.monotonic() - self._started
        self._pause = _FIRST_PAUSE if lived > _LONGEST_PAUSE else min(self._pause * 2, _LONGEST_PAUSE)
        await asyncio.sleep(self._pause)
        await self.start()

    def _drop(self) -> None:
        """Lets go of the present warm parent. What is asked from now on waits for the next one."""
        for task in self._tasks:
            task.cancel()
        if self._lines is not None:
            self._lines.close()
        if self._socket is not None:
            self._socket.close()
        while not self._queue.empty():
            for descriptor in self._queue.get_nowait()[1]:
                os.close(descriptor)
        self._tasks, self._lines, self._socket = [], None, None
        self._known, self._queue = {}, asyncio.Queue()


async def _send_descriptors(target: socket.socket, data: bytes, descriptors: tuple[int, ...]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            socket.send_fds(target, [data], list(descriptors))
            return
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(target.fileno(), writable.set)
            try:
                await writable.wait()
            finally:
                if target.fileno() >= 0:
                    loop.remove_writer(target.fileno())
