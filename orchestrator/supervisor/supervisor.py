"""The supervisor of one topology: lock, signals, control socket; the workers themselves are the fleet's.

Walk "apply", last step: `run` starts the workers and returns when they have drained; `update` hands it an edit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.brokers.embedded import serving
from orchestrator.errors import LockedError, OrchestratorError, SupervisorError
from orchestrator.supervisor import code, locks, status
from orchestrator.supervisor.control import ControlServer, Tell
from orchestrator.supervisor.fleet import Fleet, Progress
from orchestrator.supervisor.logs import LogSink
from orchestrator.supervisor.observer import Observer
from orchestrator.supervisor.target import Target
from orchestrator.supervisor.warm import ENTRY, LAST_DRAIN
from orchestrator.topology import dump, restore
from orchestrator.topology.model import Topology

#: Seconds that new workers get to become ready before an edit is taken back.
START_DEADLINE = 60.0


class Supervisor:
    """Runs `topology` until it is told to stop. `entry` is the dotted name of the workers' entry function."""

    def __init__(
        self, topology: Topology, *, output: LogSink, entry: str = ENTRY, start_deadline: float = START_DEADLINE
    ) -> None:
        self._topology = topology
        self._output = output
        self._deadline = start_deadline
        self._state = "starting"
        self._run_dir = topology.state_dir / "run"
        self._fleet = Fleet(self._run_dir, output, entry=entry)
        self._observer = Observer(topology)
        self._stop = asyncio.Event()
        self._signals: list[signal.Signals] = []
        self._stopped: asyncio.Future[None] | None = None
        self._started = asyncio.Event()
        self._embedded = contextlib.AsyncExitStack()  # an embedded server that came with an edit
        self._serves = False

    async def run(self) -> int:
        """Returns 0 when the workers have drained (SIGTERM, SIGINT, stop), 130 when a second SIGINT cut that short.

        Raises LockedError when a supervisor already runs this topology, OrchestratorError when the workers cannot be
        started at all.
        """
        state_dir = self._topology.state_dir
        _make_private(state_dir)
        _make_private(self._run_dir)
        lock = locks.SupervisorLock(state_dir)
        lock.acquire(self._topology.name)
        self._stopped = asyncio.get_running_loop().create_future()
        server = ControlServer(state_dir, self._answer)
        try:
            self._output.use(self._topology)
            with self._handled_signals():
                await self._outlive_predecessor()
                await self._fleet.start(Target(self._topology, code.digests(self._topology)))
                await server.start(self._topology)
                self._state = "running"
                self._started.set()
                await self._until_stopped()
        finally:
            if not self._stopped.done():
                self._stopped.set_result(None)
            self._output.end_following()
            await server.close()
            await self._fleet.close()
            await self._observer.close()
            await self._embedded.aclose()
            lock.release()
        return 130 if self._forced else 0

    async def started(self) -> None:
        """Returns when the control socket answers and the workers are on their way."""
        await self._started.wait()

    def stop(self) -> None:
        """Makes run() drain and return."""
        self._stop.set()

    async def update(self, topology: Topology, *, progress: Progress | None = None) -> None:
        """Replaces what the edit changes, handler code included; returns when it has converged.

        Scaling and pauses asked for earlier end here. Raises SupervisorError, and keeps the old running, when the
        new does not start.
        """
        if topology.name != self._topology.name:
            raise SupervisorError(f"this supervisor runs {self._topology.name!r}, not {topology.name!r}")
        if not self._serves and any(broker.embedded for broker in topology.brokers.values()):
            await self._embedded.enter_async_context(serving(topology))  # the command that brings it ends
            self._serves = True
        self._output.use(topology)
        await self._move(lambda now: Target(topology, code.digests(topology), rounds=now.rounds), progress)
        if topology is not self._topology:
            observer, self._observer, self._topology = self._observer, Observer(topology), topology
            await observer.close()

    def status(self) -> dict[str, Any]:
        """The contract's `status -o json`; lags as they were last seen (see `observe`)."""
        return status.report(self._fleet, self._state, self._observer.lags(), self._observer.trouble())

    async def observe(self) -> dict[str, Any]:
        """status() after asking the brokers; within 2 s whether they answer or not."""
        await self._observer.look()
        return self.status()

    async def restart(self, agent: str | None = None, *, progress: Progress | None = None) -> None:
        """Replaces the workers of `agent`, or all, without a gap."""

        def again(now: Target) -> Target:
            names = [agent] if agent is not None else list(now.agents())
            rounds = {**now.rounds, **{name: now.rounds.get(name, 0) + 1 for name in names}}
            return replace(now, rounds=rounds, code=code.digests(now.topology))

        self._target(agent)
        await self._move(again, progress)

    async def scale(self, agent: str, replicas: int, *, progress: Progress | None = None) -> None:
        """Holds until the next update."""
        if replicas < 0:
            raise SupervisorError(f"{replicas} replicas are not possible", hint="0 stops the agent's workers")
        self._target(agent)
        await self._move(lambda now: replace(now, scaled={**now.scaled, agent: replicas}), progress)

    # --- inside ------------------------------------------------------------------------------------------------

    def _target(self, agent: str | None) -> Target:
        """What should run now. Raises SupervisorError when `agent` is given and none of ours."""
        target = self._fleet.target
        if target is None or self._stop.is_set():
            raise SupervisorError("the supervisor is stopping", hint="wait until it has ended")
        if agent is not None and agent not in target.agents():
            raise SupervisorError(
                f"there is no agent {agent!r} here", hint=f"the agents are {', '.join(target.agents()) or 'none'}"
            )
        return target

    async def _move(self, change: Callable[[Target], Target], progress: Progress | None) -> None:
        self._target(None)
        self._state = "updating"
        try:
            await self._fleet.update(change, deadline=self._deadline, progress=progress)
        finally:
            self._state = "running" if self._state == "updating" else self._state

    async def _until_stopped(self) -> None:
        stop = asyncio.create_task(self._stop.wait())
        broken = asyncio.create_task(self._fleet.broken())
        await asyncio.wait([stop, broken], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        broken.cancel()
        if not self._stop.is_set():
            self._fleet.kill()
            await broken
        self._state = "stopping"
        self._output.say("info", "", "draining the workers; a second Ctrl-C ends them at once")
        await self._fleet.stop()

    @contextlib.contextmanager
    def _handled_signals(self) -> Any:
        """SIGINT, SIGTERM and SIGHUP are taken up by the loop."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in handled:
            loop.add_signal_handler(number, self._signalled, number)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with contextlib.suppress(ValueError):  # macOS has a lower limit of its own
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        self._signals.append(number)
        self._stop.set()
        if self._forced:
            self._fleet.kill()

    @property
    def _forced(self) -> bool:
        return len(self._signals) > 1 and self._signals[-1] is signal.SIGINT

    async def _outlive_predecessor(self) -> None:
        """Workers of a supervisor that was killed end by themselves; those that do not are killed."""
        began, told, killed = time.monotonic(), False, False
        while left := locks.holders(self._run_dir):
            waited = time.monotonic() - began
            names = ", ".join(f"{path.stem} (pid {pid})" for path, pid in left.items())
            if not told:
                self._output.say("warning", "", f"waiting for the workers of an earlier supervisor: {names}")
                told = True
            if waited > LAST_DRAIN and not killed:
                for pid in left.values():
                    if pid > 0:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                killed = True
            if waited > LAST_DRAIN + 5.0:
                raise LockedError(f"workers of an earlier supervisor do not end: {names}", hint="kill them by hand")
            await asyncio.sleep(0.05)

    async def _answer(self, request: Mapping[str, Any], tell: Tell) -> Any:
        """One request of a ControlClient."""
        sending: list[asyncio.Task[None]] = []

        def progress(event: Mapping[str, Any]) -> None:
            sending.append(asyncio.create_task(tell({"progress": dict(event)})))

        try:
            return await self._serve(request, tell, progress)
        finally:
            await asyncio.gather(*sending, return_exceptions=True)

    async def _serve(self, request: Mapping[str, Any], tell: Tell, progress: Progress) -> Any:
        match request:
            case {"op": "ping"}:
                target = self._target(None)
                return {"pid": os.getpid(), "topology": target.topology.name, "revision": target.key}
            case {"op": "topology"}:
                return dump(self._target(None).topology).decode()
            case {"op": "status"}:
                return await self.observe()
            case {"op": "stop"}:
                self.stop()
                assert self._stopped is not None
                return await asyncio.shield(self._stopped)
            case {"op": "restart", "agent": agent}:
                return await self.restart(agent, progress=progress)
            case {"op": "scale", "agent": str(agent), "replicas": int(replicas)}:
                return await self.scale(agent, replicas, progress=progress)
            case {"op": "pause", "agent": str(agent)}:
                self._target(agent)
                return self._fleet.pause(agent, "by hand")
            case {"op": "resume", "agent": str(agent)}:
                self._target(agent)
                return self._fleet.resume(agent)
            case {"op": "update", "dump": str(text)}:
                return await self.update(restore(text.encode()), progress=progress)
            case {"op": "logs", "agents": agents, "lines": lines, "follow": follow}:
                return await self._send_logs(agents, lines, follow, tell)
        raise OrchestratorError(f"the supervisor does not know {request.get('op')!r}", hint="is it of another version?")

    async def _send_logs(self, agents: list[str], lines: int, follow: bool, tell: Tell) -> None:
        with self._output.follow() as queue:
            for past in self._output.recent(agents, lines):
                await tell({"record": past})
            while follow and (record := await queue.get()) is not None:
                if not agents or record["agent"] in agents or record.get("about") in agents:
                    await tell({"record": record})


def _make_private(folder: Path) -> None:
    """Raises SupervisorError when `folder` cannot be ours alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        hint = "the supervisor needs a folder of its own there"
        raise SupervisorError(f"cannot use {folder}: {error.strerror}", hint=hint) from None
