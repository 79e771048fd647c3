"""The life of one worker process, from the fork to its exit code.

handler -> lifespan -> connect, open, recover (again and again while the broker is away) -> ready -> demand ... drain.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from orchestrator.brokers import registry
from orchestrator.brokers.connections import Connections
from orchestrator.errors import HandlerLoadError, OrchestratorError
from orchestrator.event import EventType
from orchestrator.topology.model import Agent, Topology, matches
from orchestrator.worker import handlers, journal, logs
from orchestrator.worker.context import AgentContext
from orchestrator.worker.control import Control
from orchestrator.worker.guardian import REPLACE_ME, Guardian, Vitals
from orchestrator.worker.requests import Requests
from orchestrator.worker.runtime import Runtime
from orchestrator.worker.slots import records
from orchestrator.worker.spec import WorkerSpec

DRAINED, CRASHED, NOT_LOADED = 0, 70, 78
_RETRY_CONNECT = (0.2, 5.0)  # seconds between tries: first, most
_ORPHAN_DRAIN = 5.0  # seconds to drain when the supervisor is gone
_GARBAGE = 5000  # objects more than before until the collector looks: some 64 events in flight are no garbage
_OTHERS = 1.0  # seconds that the neighbours of a stubborn attempt get


def run(spec: WorkerSpec, control: socket.socket) -> int:
    """Runs the worker in this freshly forked process; returns its exit code. The caller ends the process with
    os._exit: a handler's thread may still be running."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    agent = spec.topology.agents[spec.agent]
    for name, value in agent.env.items():
        os.environ[name] = value
    log = logs.logger(spec.topology, spec.agent, spec.slot)
    logs.take_over(log)
    channel = Control(control, spec.topology.redact)
    try:
        handler = handlers.load(spec.topology, agent)
        return asyncio.run(Worker(spec, agent, handler, channel, log).serve())
    except HandlerLoadError as error:
        channel.send("failed", message=error.message, traceback=error.traceback, hint=error.hint)
        return NOT_LOADED
    except BaseException:
        log.critical("the worker crashed", exc_info=sys.exc_info())
        return CRASHED


class Worker:
    """Also the runtime's Reports."""

    def __init__(self, spec: WorkerSpec, agent: Agent, handler: handlers.Loaded, control: Control, log: Any) -> None:
        self._spec = spec
        self._agent = agent
        self._handler = handler
        self._control = control
        self._log = log
        self._vitals = Vitals()
        self._stop = asyncio.Event()
        self._drain_timeout = agent.drain_timeout
        self._stubborn: str | None = None
        self._paused = False

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        self._vitals.beat()
        lease = min((_lease(self._spec.topology, s.broker) for s in self._agent.subscriptions), default=30.0)
        guardian = Guardian(self._vitals, self._control, lease=lease, timeout=self._agent.timeout)
        guardian.start()
        loop.add_signal_handler(signal.SIGTERM, self._drain, self._agent.drain_timeout)
        self._control.listen(self._receive, lambda: self._drain(_ORPHAN_DRAIN))
        try:
            if self._handler.lifespan is None:
                return await self._work()
            async with self._lifespan(self._handler.lifespan):
                return await self._work()
        finally:
            guardian.stop()
            self._control.unlisten()

    async def _work(self) -> int:
        connections = Connections(self._spec.topology, name=f"{self._spec.topology.name}.{self._spec.name}")
        starting = asyncio.ensure_future(self._start(connections))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.wait({starting})
            if not starting.cancelled():
                runtime = starting.result()
                if self._paused:
                    runtime.pause()
                gc.freeze()  # what a worker is made of stays: the collector need not look at it again and again
                gc.set_threshold(_GARBAGE, *gc.get_threshold()[1:])
                self._control.send("ready")
                runtime.go()
                await stopping
                if self._stubborn is not None:
                    return await self._make_way(runtime)
                await runtime.drain(self._drain_timeout)
                await runtime.close()
                if not runtime.in_flight:
                    journal.remove(self._spec.journal)
        finally:
            stopping.cancel()
            await connections.close()
        self._control.send("drained")
        return DRAINED

    async def _start(self, connections: Connections) -> Runtime:
        """Tries for ever; the reason why it does not work yet is in every status."""
        delay, most = _RETRY_CONNECT
        while True:
            try:
                runtime = await assemble(
                    self._spec, self._agent, self._handler, connections, reports=self, log=self._log
                )
            except HandlerLoadError:
                raise
            except OrchestratorError as error:
                if self._vitals.trouble != error.message:
                    self._log.warning("cannot start yet", error=error.message, hint=error.hint)
                self._vitals.trouble = error.message
            else:
                self._vitals.trouble = None
                self._vitals.runtime = runtime
                return runtime
            await asyncio.sleep(delay)
            delay = min(delay * 2, most)

    async def _make_way(self, runtime: Runtime) -> int:
        """A stubborn attempt: its neighbours get a moment, then the supervisor replaces this process."""
        await runtime.emptied(_OTHERS)
        runtime.abandon()
        self._control.send("replace", reason=self._stubborn)
        return REPLACE_ME

    @asynccontextmanager
    async def _lifespan(self, make: Callable[[AgentContext], AbstractAsyncContextManager[Any]]) -> AsyncIterator[None]:
        """The handler module's own, around everything. What it raises on the way in is a handler that does not load."""
        if inspect.isasyncgenfunction(make):
            make = asynccontextmanager(make)
        try:
            manager = make(AgentContext(self._agent.name, self._agent.config, self._log))
            await manager.__aenter__()
        except Exception as error:
            raise HandlerLoadError(
                f"agent {self._agent.name!r}: lifespan failed: {type(error).__name__}: {error}",
                traceback=handlers.user_traceback(error),
            ) from error
        try:
            yield
        except BaseException:
            await manager.__aexit__(*sys.exc_info())
            raise
        await manager.__aexit__(None, None, None)

    # --- from the supervisor ----------------------------------------------------------------------------------

    def _receive(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "drain":
                self._drain(float(message.get("timeout", self._agent.drain_timeout)))
            case "pause":
                self._paused = True
                if self._vitals.runtime is not None:
                    self._vitals.runtime.pause()
            case "resume":
                self._paused = False
                if self._vitals.runtime is not None:
                    self._vitals.runtime.resume()

    def _drain(self, timeout: float) -> None:
        self._drain_timeout = timeout
        self._stop.set()

    # --- Reports ----------------------------------------------------------------------------------------------

    def alarm(self, message: str) -> None:
        self._log.error("alarm", message=message)
        self._control.send("alarm", message=message)

    def trouble(self, reason: str | None) -> None:
        if reason is None:
            self._log.info("consuming again")
        else:
            self._log.warning("not consuming", reason=reason)

    def paused(self, reason: str) -> None:
        self._paused = True
        self._log.error("paused", reason=reason)
        self._control.send("paused", reason=reason)

    def replace(self, reason: str) -> None:
        self._log.error("this worker must be replaced", reason=reason)
        self._stubborn = reason
        self._stop.set()


async def assemble(
    spec: WorkerSpec,
    agent: Agent,
    handler: handlers.Loaded,
    connections: Connections,
    *,
    reports: Any,
    log: Any,
    rng: Callable[[], float] | None = None,
) -> Runtime:
    """A Runtime with its consumers open and its predecessor's journal recovered; `go` starts it. Raises BrokerError."""
    topology = spec.topology
    producers = {name: (await connections.get(name)).producer() for name in sorted(brokers_of(topology, agent))}
    consumers = [(s, (await connections.get(s.broker)).consumer(s, slot=spec.name)) for s in agent.subscriptions]
    left = journal.read(spec.journal)
    more: dict[str, Any] = {} if rng is None else {"rng": rng}
    runtime = Runtime(
        topology,
        agent,
        handler,
        producers=producers,
        requests=Requests(connections.get),
        journal=journal.Journal(records(agent)),
        reports=reports,
        log=log,
        **more,
    )
    try:
        await runtime.open(consumers, left, lambda subscription: journal.forget(spec.journal, subscription))
        runtime.journal = journal.Journal.create(spec.journal, records(agent))
    except BaseException:
        await runtime.close()
        raise
    return runtime


def brokers_of(topology: Topology, agent: Agent) -> set[str]:
    """The names of the brokers that this agent reads from or writes to."""
    channels = {s.channel for s in agent.subscriptions} | {p.channel for p in agent.publish}
    if agent.dead_letter is not None:
        channels.add(agent.dead_letter)
        channels |= {  # if any routes agent.failed, one is published too
            channel.name
            for channel in topology.channels.values()
            if not channel.external and any(matches(pattern, EventType.AGENT_FAILED) for pattern in channel.events)
        }
    return {topology.channels[name].broker for name in channels}


def _lease(topology: Topology, broker: str) -> float:
    return registry.adapter(topology.brokers[broker].kind).capabilities.lease
