"""What a handler is given beside the event. Cheap to make: everything that costs is made when it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from orchestrator.event import AgentEvent

if TYPE_CHECKING:
    from orchestrator.worker.attempt import Attempt

Payload = Mapping[str, Any] | BaseModel
T = TypeVar("T")


class AgentContext:
    """What is known without an event: given to `lifespan(ctx)`."""

    __slots__ = ("_agent", "_config", "_log")

    def __init__(self, agent: str, config: Mapping[str, Any], log: Any) -> None:
        self._agent = agent
        self._config = config
        self._log = log

    @property
    def agent(self) -> str:
        """This agent's name."""
        return self._agent

    @property
    def config(self) -> Mapping[str, Any]:
        """`config:` of the agent, as the topology file gives it."""
        return self._config

    @property
    def log(self) -> Any:
        """A structlog logger; in a handler it is bound to the event's correlation id."""
        return self._log


class _EventContext(AgentContext):
    __slots__ = ("_attempt", "_bound")

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._bound: Any = None

    @property
    def agent(self) -> str:
        return self._attempt.runtime.agent.name

    @property
    def config(self) -> Mapping[str, Any]:
        return self._attempt.runtime.agent.config

    @property
    def event(self) -> AgentEvent:
        """The event being handled."""
        return self._attempt.require_event()

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self._attempt.history.attempts + 1

    @property
    def headers(self) -> Mapping[str, str]:
        """The transport's headers: traceparent, reply-to, and what an outside client sent."""
        return self._attempt.delivery.headers

    @property
    def idempotency_key(self) -> str:
        """The same for each attempt at this event by this agent: hand it to outside systems that can deduplicate."""
        return f"{self.agent}:{self.event.event_id}"

    @property
    def log(self) -> Any:
        if self._bound is None:
            event = self._attempt.require_event()
            self._bound = self._attempt.runtime.log.bind(
                correlation_id=event.correlation_id, event_id=event.event_id, event_type=event.event_type
            )
        return self._bound


class Context(_EventContext):
    """For `async def` handlers."""

    __slots__ = ()

    async def publish(
        self,
        type: str,
        payload: Payload | None = None,
        *,
        target_agent: str | None = None,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        delay: float | str = 0.0,
    ) -> str:
        """Hands over an event; returns its id. The handled event is settled only when the broker has confirmed this
        one, and what the broker refuses fails the attempt.

        Waits only while the broker is behind. `delay` is seconds or a text such as "5m". Raises RoutingError for a type
        that this agent may not publish, PayloadError for a payload that is not JSON or breaks its schema.
        """
        attempt = self._attempt
        message = attempt.output(type, payload, target_agent, key, metadata, delay)
        producer = attempt.runtime.producers[message.channel.broker]
        if not producer.ready:
            await attempt.wait_for(producer)
        attempt.add(message)
        return message.event_id

    async def request(
        self,
        type: str,
        payload: Payload | None = None,
        *,
        timeout: float = 30.0,
        target_agent: str | None = None,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AgentEvent:
        """Publishes at once and waits for the reply. Raises RequestTimeout after `timeout` seconds; a request that was
        dead-lettered is answered with the payload {"error": ...}. The rest is as for publish."""
        return await self._attempt.request(type, payload, timeout, target_agent, key, metadata)


class SyncContext(_EventContext):
    """For `def` handlers, which run in a thread: the same, without await."""

    __slots__ = ()

    def publish(
        self,
        type: str,
        payload: Payload | None = None,
        *,
        target_agent: str | None = None,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        delay: float | str = 0.0,
    ) -> str:
        """As Context.publish."""
        attempt = self._attempt
        message = attempt.output(type, payload, target_agent, key, metadata, delay)
        producer = attempt.runtime.producers[message.channel.broker]
        if not producer.ready:
            self._wait(attempt.wait_for(producer))
        attempt.runtime.loop.call_soon_threadsafe(attempt.add, message)
        return message.event_id

    def request(
        self,
        type: str,
        payload: Payload | None = None,
        *,
        timeout: float = 30.0,
        target_agent: str | None = None,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AgentEvent:
        """As Context.request."""
        return self._wait(self._attempt.request(type, payload, timeout, target_agent, key, metadata))

    def _wait(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._attempt.runtime.loop).result()
