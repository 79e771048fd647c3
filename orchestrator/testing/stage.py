"""A topology moved to memory, and its agents at work in this process: each replica is an Actor with a runtime of its
own, as each worker process has one.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from orchestrator.brokers.connections import Connections
from orchestrator.brokers.memory import Hub, MemoryConnection, adapter
from orchestrator.event import AgentEvent
from orchestrator.topology.model import Agent, Broker, Topology
from orchestrator.worker import handlers
from orchestrator.worker.context import AgentContext
from orchestrator.worker.main import assemble
from orchestrator.worker.runtime import Runtime
from orchestrator.worker.spec import WorkerSpec


def in_memory(topology: Topology) -> Topology:
    """The same topology with each broker replaced by a memory broker of its own."""
    here = f"memory://{uuid.uuid4().hex}"
    return replace(
        topology,
        brokers={
            name: Broker(name, f"{here}/{name}", "memory", prefix=broker.prefix)
            for name, broker in topology.brokers.items()
        },
    )


def hubs(topology: Topology) -> list[Hub]:
    return [adapter.hub(broker.url) for broker in topology.brokers.values()]


async def prepare(topology: Topology) -> None:
    """What `apply` does on a fresh broker; external channels are made too, empty."""
    for broker in topology.brokers.values():
        connection = await adapter.connect(topology, broker, name="apply")
        for desired in adapter.desired(topology, broker):
            if desired.external:
                adapter.hub(broker.url).provide(desired)
            else:
                await connection.create(desired)
        await connection.close()


def given(function: Callable[..., Any], agent: Agent) -> handlers.Loaded:
    """A handler that the test passes instead of the agent's own."""
    threaded = not inspect.iscoroutinefunction(function)
    return handlers.Loaded(handlers.bind(function, agent.name), threaded=threaded)


def recording(loaded: handlers.Loaded, runs: list[AgentEvent]) -> handlers.Loaded:
    """The same handler; each run is noted first."""

    def call(event: AgentEvent, ctx: Any) -> Any:
        runs.append(event)
        return loaded.call(event, ctx)

    return replace(loaded, call=call)


class Actor:
    """One replica of one agent; also its runtime's Reports."""

    def __init__(self, topology: Topology, agent: Agent, slot: int, handler: handlers.Loaded, run_dir: Path) -> None:
        self.agent = agent
        self.alarms: list[str] = []
        self.paused_by: str | None = None
        self.stuck: str | None = None
        self._topology = topology
        self._handler = handler
        self._spec = WorkerSpec(topology, agent.name, slot, str(run_dir))
        self._log = _logger(agent.name, slot)
        self._lifespan = AsyncExitStack()
        self._connections: Connections | None = None
        self._runtime: Runtime | None = None

    async def start(self) -> None:
        """Raises what the handler module's lifespan raises."""
        if (make := self._handler.lifespan) is not None:
            if inspect.isasyncgenfunction(make):
                make = asynccontextmanager(make)
            context = AgentContext(self.agent.name, self.agent.config, self._log)
            await self._lifespan.enter_async_context(make(context))
        await self._assemble()

    async def _assemble(self) -> None:
        self._connections = Connections(self._topology, name=self._spec.name)
        self._runtime = await assemble(
            self._spec, self.agent, self._handler, self._connections, reports=self, log=self._log, rng=lambda: 0.5
        )
        self._runtime.go()

    async def stop(self) -> None:
        if self._runtime is not None:
            await self._runtime.drain(0.0)
            await self._runtime.close()
        if self._connections is not None:
            await self._connections.close()
        await self._lifespan.aclose()

    async def crash(self) -> None:
        """As SIGKILL and the next worker in the same slot: the journal says what had been started."""
        assert self._runtime is not None
        assert self._connections is not None
        dead = self._runtime
        for name in self._topology.brokers:
            connection = await self._connections.get(name)
            assert isinstance(connection, MemoryConnection)
            connection.drop()
        tasks = [attempt.task for attempt in dead.running() if attempt.task is not None]
        await self._assemble()  # reads the journal before the cancelled handlers could change it
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def resume(self) -> None:
        assert self._runtime is not None
        self.paused_by = None
        self._runtime.resume()

    # --- Reports ----------------------------------------------------------------------------------------------

    def alarm(self, message: str) -> None:
        self.alarms.append(message)

    def trouble(self, reason: str | None) -> None:
        self._log.warning("consuming again" if reason is None else "not consuming", reason=reason)

    def paused(self, reason: str) -> None:
        self.paused_by = reason

    def replace(self, reason: str) -> None:
        self.stuck = reason


def load_handlers(topology: Topology, instead: Mapping[str, Callable[..., Any]]) -> dict[str, handlers.Loaded]:
    """Those of all agents that run here. Raises HandlerLoadError, and ValueError for a name that is no agent."""
    if unknown := set(instead) - set(topology.agents):
        raise ValueError(f"no such agent: {', '.join(sorted(unknown))}; there are {', '.join(topology.agents)}")
    found = {}
    for name, agent in topology.agents.items():
        if name in instead:
            found[name] = given(instead[name], agent)
        elif not agent.external:
            found[name] = handlers.load(topology, agent)
    return found


def _logger(agent: str, slot: int) -> Any:
    """What a handler logs goes to `logging`, where a test runner captures it."""

    def render(_: object, level: str, entry: MutableMapping[str, Any]) -> str:
        event = entry.pop("event", "")
        return " ".join([str(event), *(f"{key}={value!r}" for key, value in entry.items())])

    return structlog.wrap_logger(
        logging.getLogger(f"orchestrator.agent.{agent}"),
        processors=[structlog.processors.format_exc_info, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        context_class=dict,
    ).bind(slot=slot)
