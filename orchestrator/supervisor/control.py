"""The supervisor's unix socket, and the client by which commands talk to it.

One request a connection: a line of JSON with "op"; the answer is any number of {"progress": ...} or {"record": ...}
lines and at last {"ok": ...} or {"error", "kind", "hint"}. The socket is 0600 in a 0700 folder; where it lies stands in
.orchestrator/supervisor.json, because a unix socket's path is limited to about 100 bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import errors
from orchestrator.errors import OrchestratorError, SupervisorError
from orchestrator.supervisor.locks import SupervisorLock
from orchestrator.topology import dump, restore
from orchestrator.topology.model import Topology

Tell = Callable[[Mapping[str, Any]], Coroutine[Any, Any, None]]
Answer = Callable[[Mapping[str, Any], Tell], Coroutine[Any, Any, Any]]
Progress = Callable[[Mapping[str, Any]], None]

_LONGEST_PATH = 100  # bytes; the system's limit is 104 (macOS) or 108 (Linux)
_LONGEST_LINE = 1 << 28  # a topology of some thousand agents is a few MiB


class ControlServer:
    """Serves `answer(request, tell)` until close(). Raises OSError when the folder cannot be used."""

    def __init__(self, state_dir: Path, answer: Answer) -> None:
        self._state_dir = state_dir
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._folder: Path | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, topology: Topology) -> None:
        """Binds the socket and writes the record; what a dead supervisor left is replaced (we hold the lock)."""
        _remove_record(self._state_dir)
        path = self._state_dir / "supervisor.sock"
        if len(os.fsencode(path)) > _LONGEST_PATH:
            self._folder = Path(tempfile.mkdtemp(prefix="orchestrator-"))  # 0700
            path = self._folder / "supervisor.sock"
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._connected, path, limit=_LONGEST_LINE)
        path.chmod(0o600)
        record = {
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "socket": str(path),
            "topology": topology.name,
        }
        fresh = self._state_dir / "supervisor.json.new"
        fresh.write_text(json.dumps(record) + "\n")
        fresh.chmod(0o600)
        fresh.replace(self._state_dir / "supervisor.json")

    async def close(self) -> None:
        """Lets running answers finish for a second, then removes socket and record."""
        if self._server is not None:
            self._server.close()
            if self._open:
                await asyncio.wait(self._open, timeout=1.0)
            for task in list(self._open):
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
        _remove_record(self._state_dir)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)

        async def tell(message: Mapping[str, Any]) -> None:
            writer.write(json.dumps(message, default=str).encode() + b"\n")
            await writer.drain()

        try:
            request = json.loads(await reader.readline())
            try:
                await tell({"ok": await self._answer(request, tell)})
            except OrchestratorError as error:
                await tell({"error": error.message, "kind": type(error).__name__, "hint": error.hint})
        except (ConnectionError, ValueError):
            return  # the client has gone, or is none of ours
        finally:
            self._open.discard(task)
            writer.close()


def _remove_record(state_dir: Path) -> None:
    """Socket and record of this supervisor, or of one that died."""
    record = read_record(state_dir)
    if record is not None:
        path = Path(record["socket"])
        path.unlink(missing_ok=True)
        if path.parent != state_dir and path.parent.name.startswith("orchestrator-"):
            shutil.rmtree(path.parent, ignore_errors=True)
    (state_dir / "supervisor.json").unlink(missing_ok=True)


def read_record(state_dir: Path) -> dict[str, Any] | None:
    """pid, start time, socket and topology of the last supervisor; None when there is none, it ended well, or what is
    there was written by something else."""
    try:
        record = json.loads((state_dir / "supervisor.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("socket"), str) else None


def _ignore(_: Mapping[str, Any]) -> None:
    """Progress that nobody wants to see."""


def running(state_dir: Path) -> bool:
    """Whether a supervisor lives for this state folder now."""
    return SupervisorLock(state_dir).held()


class ControlClient:
    """Talks to the supervisor of one state folder (topology.state_dir).

    Every method raises SupervisorError when none runs or it does not answer, and the supervisor's own error when it
    refuses.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    async def ping(self) -> dict[str, Any]:
        """{"pid", "topology", "revision"} of the running supervisor."""
        return dict(await self._ask({"op": "ping"}, patience=5.0))

    async def topology(self) -> Topology:
        """What it runs now; `plan` compares the file with it."""
        return restore(str(await self._ask({"op": "topology"}, patience=10.0)).encode())

    async def status(self) -> dict[str, Any]:
        """The contract's `status -o json`."""
        return dict(await self._ask({"op": "status"}, patience=10.0))

    async def stop(self) -> None:
        """Returns when every worker has drained and the supervisor's process has let go of its lock."""
        await self._ask({"op": "stop"})
        deadline = time.monotonic() + 10.0
        while running(self._state_dir):
            if time.monotonic() > deadline:
                raise SupervisorError("the supervisor drained its workers but does not end", hint="kill it by its pid")
            await asyncio.sleep(0.02)

    async def restart(self, agent: str | None = None, progress: Progress = _ignore) -> None:
        """Replaces the workers of one agent, or of all; returns when the new ones are ready."""
        await self._ask({"op": "restart", "agent": agent}, progress)

    async def scale(self, agent: str, replicas: int, progress: Progress = _ignore) -> None:
        """Until the next update; returns when that many are ready."""
        await self._ask({"op": "scale", "agent": agent, "replicas": replicas}, progress)

    async def pause(self, agent: str) -> None:
        """What is being handled goes on; nothing new is fetched until resume() or the next update."""
        await self._ask({"op": "pause", "agent": agent}, patience=10.0)

    async def resume(self, agent: str) -> None:
        await self._ask({"op": "resume", "agent": agent}, patience=10.0)

    async def update(self, topology: Topology, progress: Progress = _ignore) -> None:
        """Hands a topology over; returns when it has converged. `progress` gets {"agent", "slot", "state", "reason"}.
        Raises SupervisorError when its new workers do not start: what ran before goes on."""
        await self._ask({"op": "update", "dump": dump(topology).decode()}, progress)

    async def logs(
        self, agents: Sequence[str] = (), *, lines: int = 100, follow: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The last records of those agents (all, when none is named), then new ones while `follow`."""
        request = {"op": "logs", "agents": list(agents), "lines": lines, "follow": follow}
        async with contextlib.aclosing(self._exchange(request)) as answers:
            async for answer in answers:
                if "record" in answer:
                    yield answer["record"]

    async def _ask(
        self,
        request: Mapping[str, Any],
        progress: Progress = _ignore,
        *,
        patience: float | None = None,
    ) -> Any:
        try:
            async with asyncio.timeout(patience), contextlib.aclosing(self._exchange(request)) as answers:
                async for answer in answers:
                    if "ok" in answer:
                        return answer["ok"]
                    if "progress" in answer:
                        progress(answer["progress"])
        except TimeoutError:
            raise SupervisorError(
                f"the supervisor does not answer within {patience:.0f} s", hint="is it suspended? see its pid in ps"
            ) from None
        raise SupervisorError("the supervisor ended before it had answered", hint="orchestrator logs supervisor")

    async def _exchange(self, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Every answer up to the last; an error is raised."""
        record = read_record(self._state_dir)
        try:
            if record is None:
                raise FileNotFoundError
            reader, writer = await asyncio.open_unix_connection(record["socket"], limit=_LONGEST_LINE)
        except (FileNotFoundError, ConnectionRefusedError):
            raise SupervisorError("no supervisor runs this topology", hint="orchestrator apply starts one") from None
        try:
            writer.write(json.dumps(request).encode() + b"\n")
            await writer.drain()
            while line := await reader.readline():
                answer = json.loads(line)
                if "error" in answer:
                    kind = getattr(errors, answer["kind"], SupervisorError)
                    raise kind(answer["error"], hint=answer["hint"])
                yield answer
        except ConnectionError:
            return
        finally:
            writer.close()
