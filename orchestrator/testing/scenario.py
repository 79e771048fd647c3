"""What a test calls: start a topology in memory, publish, let time pass, look at what came of it."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

from orchestrator import clock, wire
from orchestrator.brokers.memory import adapter
from orchestrator.brokers.memory.hub import Hub
from orchestrator.brokers.memory.state import Entry, Log
from orchestrator.client import Client
from orchestrator.errors import DecodeError
from orchestrator.event import AgentEvent
from orchestrator.testing import stage
from orchestrator.testing.virtual_time import VirtualTime
from orchestrator.topology import load
from orchestrator.topology.model import Topology
from orchestrator.topology.units import seconds

Source = Topology | str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One event that died. `event` is None when its body could not be decoded."""

    agent: str
    reason: str
    attempts: int
    error_type: str
    message: str
    event: AgentEvent | None
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Stored:
    channel: str
    entry: Entry
    event: AgentEvent | None


class TopologyTest:
    """An async context manager: the topology's agents run inside it, on memory brokers and virtual time.

    `topology` is a file, several (later ones override), or a Topology. `handlers` gives functions that stand in for the
    handlers of some agents; `sets` are variables as with --set; `start` is the time at the beginning (default: now).
    `patience` bounds the real seconds that run_until_idle may take.

    Raises TopologyError for a file that is wrong, HandlerLoadError for a handler that does not load.
    """

    def __init__(
        self,
        topology: Source,
        *,
        handlers: Mapping[str, Callable[..., Any]] | None = None,
        sets: Mapping[str, str] | None = None,
        start: datetime | None = None,
        patience: float = 30.0,
    ) -> None:
        self._source = topology
        self._handlers = handlers or {}
        self._sets = sets or {}
        self._begin = (start or datetime.now(UTC)).timestamp()
        self._patience = patience
        self._stack = AsyncExitStack()
        self._actors: list[stage.Actor] = []
        self._hubs: list[Hub] = []
        self._stored: list[_Stored] = []
        self._runs: dict[str, list[AgentEvent]] = {}

    async def __aenter__(self) -> Self:
        self.topology = stage.in_memory(_loaded(self._source, self._sets))
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-test-")))
            environment = {name: text for agent in self.topology.agents.values() for name, text in agent.env.items()}
            stack.enter_context(mock.patch.dict(os.environ, environment))
            stack.enter_context(mock.patch.object(sys, "path", list(sys.path)))  # loading handlers adds to it
            loaded = stage.load_handlers(self.topology, self._handlers)
            stack.enter_context(VirtualTime(self._begin))
            self._hubs = stage.hubs(self.topology)
            for hub, broker in zip(self._hubs, self.topology.brokers.values(), strict=True):
                hub.taps.append(self._store)
                stack.callback(adapter.forget, broker.url)
            await stage.prepare(self.topology)
            for name, handler in loaded.items():
                agent = self.topology.agents[name]
                noted = stage.recording(handler, self._runs.setdefault(name, []))
                for slot in range(agent.replicas):
                    actor = stage.Actor(self.topology, agent, slot, noted, folder)
                    stack.push_async_callback(actor.stop)
                    await actor.start()
                    self._actors.append(actor)
            self._client = await stack.enter_async_context(Client(self.topology, name="test"))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # --- doing ------------------------------------------------------------------------------------------------

    async def publish(self, type: str, payload: Mapping[str, Any] | None = None, **options: Any) -> AgentEvent:
        """As Client.publish, with its options: target_agent, key, metadata, correlation_id, event_id, delay, …"""
        return await self._client.publish(type, payload, **options)

    async def publish_raw(self, type: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Puts bytes into the channel of `type`, as another program might: nothing is checked."""
        channel = self.topology.channel_for(type)
        hub = adapter.hub(self.topology.brokers[channel.broker].url)
        hub.publish_raw(channel.address, body, headers or {}, type)

    async def request(self, type: str, payload: Mapping[str, Any] | None = None, **options: Any) -> AgentEvent:
        """As Client.request; the timeout is virtual time too."""
        return await self._client.request(type, payload, **options)

    async def run_until_idle(self, within: float | str = "30d") -> float:
        """Lets time pass until every event is settled, retries and delayed ones included; returns how many seconds
        that were. Events for paused or external agents are not waited for.

        Raises AssertionError, saying who is still busy, when it takes longer than `within` (virtual time) or the
        test's `patience` (real time): agents that publish in circles never come to rest.
        """
        loop = asyncio.get_running_loop()
        begin, real = loop.time(), time.monotonic()
        limit = begin + (seconds(within) if isinstance(within, str) else within)
        changed = asyncio.Event()
        for hub in self._hubs:
            hub.watchers.add(changed.set)
        try:
            while busy := self._busy():
                changed.clear()
                try:
                    async with asyncio.timeout_at(limit):
                        await changed.wait()
                except TimeoutError:
                    raise AssertionError(f"not idle within {within} of virtual time: {'; '.join(busy)}") from None
                if time.monotonic() - real > self._patience:
                    raise AssertionError(f"still busy after {self._patience:g} s of real time: {'; '.join(busy)}")
        finally:
            for hub in self._hubs:
                hub.watchers.discard(changed.set)
        return loop.time() - begin

    async def advance(self, duration: float | str) -> None:
        """Lets exactly this much time pass (seconds, or a text such as "5m") while the agents work."""
        await asyncio.sleep(seconds(duration) if isinstance(duration, str) else duration)

    async def crash(self, agent: str) -> None:
        """Kills the agent's workers at this point and starts them again, as SIGKILL and the supervisor would. What a
        handler was doing counts as a crashed attempt."""
        for actor in self._of(agent):
            await actor.crash()

    async def resume(self, agent: str) -> None:
        """Goes on after `on_exhausted: pause`."""
        for actor in self._of(agent):
            actor.resume()

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        """The virtual time."""
        return datetime.fromtimestamp(clock.now(), UTC)

    def published(self, type: str | None = None, *, by: str | None = None) -> list[AgentEvent]:
        """Every event published so far, in order, handled or not; of one type, or by one agent."""
        events = [one.event for one in self._stored if one.event is not None and not one.entry.dead_letter]
        return [e for e in events if type in (None, e.event_type) and by in (None, e.source_agent)]

    def runs(self, agent: str) -> list[AgentEvent]:
        """The event of each run of this agent's handler, retries included."""
        return list(self._runs[self._of(agent)[0].agent.name])

    def dead_letters(self, agent: str | None = None) -> list[DeadLetter]:
        """Every dead letter so far, in order; of one agent. Raises ValueError when there is no such agent."""
        if agent is not None and agent not in self.topology.agents:
            raise _unknown(agent, self.topology.agents)
        found = []
        for one in self._stored:
            letter = wire.parse(one.entry.headers)
            if letter is None or agent not in (None, letter.agent):
                continue
            found.append(
                DeadLetter(
                    letter.agent,
                    letter.reason,
                    letter.attempts,
                    letter.error_type,
                    letter.message,
                    one.event,
                    one.entry.body,
                    one.entry.headers,
                )
            )
        return found

    @property
    def paused(self) -> dict[str, str]:
        """Agents that paused themselves (on_exhausted: pause), and why."""
        return {actor.agent.name: actor.paused_by for actor in self._actors if actor.paused_by is not None}

    @property
    def alarms(self) -> list[str]:
        """What a person would have been told: events trimmed unread, resources healed, …"""
        return [message for actor in self._actors for message in actor.alarms]

    # --- inside -----------------------------------------------------------------------------------------------

    def _of(self, agent: str) -> list[stage.Actor]:
        found = [actor for actor in self._actors if actor.agent.name == agent]
        if not found:
            raise _unknown(agent, dict.fromkeys(actor.agent.name for actor in self._actors))
        return found

    def _busy(self) -> list[str]:
        """Who has something to do, now or later."""
        stuck = [f"{actor.agent.name}: {actor.stuck}" for actor in self._actors if actor.stuck is not None]
        agents = {actor.agent.name: actor.agent for actor in self._actors if actor.paused_by is None}
        for hub, broker in zip(self._hubs, self.topology.brokers, strict=True):
            groups = [
                (self.topology.channels[subscription.channel].address, subscription.group)
                for agent in agents.values()
                for subscription in agent.subscriptions
                if subscription.broker == broker
            ]
            stuck += hub.busy(groups)
        return stuck

    def _store(self, log: Log, entry: Entry) -> None:
        channel = next(c for c in self.topology.channels.values() if c.address == log.address)
        codec = wire.codec("agent-event" if entry.dead_letter else channel.codec)
        try:
            event = codec.decode(entry.body, entry.headers, entry.event_type, f"{log.address}:{entry.place}")
        except (DecodeError, ValueError):
            event = None
        self._stored.append(_Stored(channel.name, entry, event))


class SyncTopologyTest:
    """TopologyTest for tests that are plain functions: `with SyncTopologyTest("topology.yaml") as t: t.publish(…)`."""

    def __init__(self, topology: Source, **options: Any) -> None:
        self.test = TopologyTest(topology, **options)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        self._runner.__enter__()
        try:
            self._runner.run(self.test.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._runner.run(self.test.__aexit__(kind, error, trace))
        finally:
            self._runner.close()

    def publish(self, type: str, payload: Mapping[str, Any] | None = None, **options: Any) -> AgentEvent:
        return self._runner.run(self.test.publish(type, payload, **options))

    def publish_raw(self, type: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._runner.run(self.test.publish_raw(type, body, headers))

    def request(self, type: str, payload: Mapping[str, Any] | None = None, **options: Any) -> AgentEvent:
        return self._runner.run(self.test.request(type, payload, **options))

    def run_until_idle(self, within: float | str = "30d") -> float:
        return self._runner.run(self.test.run_until_idle(within))

    def advance(self, duration: float | str) -> None:
        self._runner.run(self.test.advance(duration))

    def crash(self, agent: str) -> None:
        self._runner.run(self.test.crash(agent))

    def resume(self, agent: str) -> None:
        self._runner.run(self.test.resume(agent))

    @property
    def now(self) -> datetime:
        return self.test.now

    @property
    def paused(self) -> dict[str, str]:
        return self.test.paused

    @property
    def alarms(self) -> list[str]:
        return self.test.alarms

    def published(self, type: str | None = None, *, by: str | None = None) -> list[AgentEvent]:
        return self.test.published(type, by=by)

    def runs(self, agent: str) -> list[AgentEvent]:
        return self.test.runs(agent)

    def dead_letters(self, agent: str | None = None) -> list[DeadLetter]:
        return self.test.dead_letters(agent)


def _unknown(agent: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"no such agent: {agent}; there are {', '.join(known)}")


def _loaded(source: Source, sets: Mapping[str, str]) -> Topology:
    if isinstance(source, Topology):
        return source
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    return load(sources, sets=sets).topology
