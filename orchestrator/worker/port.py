"""One subscription of this worker: the Sink that its consumer talks to, and the rules by which an event is for us.

Rules (contract section 1): type, target_agent, what the agent published itself, filter, schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.brokers.base import Consumer, Delivery, Ended, History, Producer, Sink
from orchestrator.errors import Misrouted
from orchestrator.event import AgentEvent
from orchestrator.topology.model import Mode, Subscription, matches
from orchestrator.wire.codecs import decode, only_type
from orchestrator.wire.routes import Routes, getter, validator
from orchestrator.worker.journal import subscription_code

if TYPE_CHECKING:
    from orchestrator.worker.runtime import Runtime

Check = Callable[[Any], None]


class Port(Sink):
    def __init__(self, runtime: Runtime, subscription: Subscription, consumer: Consumer, producer: Producer) -> None:
        self.subscription = subscription
        self.consumer = consumer
        self.producer = producer
        self.channel = runtime.topology.channels[subscription.channel]
        self.broker = self.channel.broker
        self.code = subscription_code(subscription)
        self.troubled: str | None = None
        self.only_one = False  # of what a dead predecessor left, exactly one had started
        self._runtime = runtime
        self._agent = subscription.agent
        self._queue = self.channel.mode is Mode.QUEUE
        self._codec = Routes(runtime.topology).codec(self.channel)
        self._default_type = only_type(self.channel)
        self._filter = [(getter(path), accepted) for path, accepted in subscription.filter.items()]
        self._types: dict[str, Check | bool] = {}

    # --- Sink -------------------------------------------------------------------------------------------------

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        self._runtime.slots.admit(self, deliveries)

    def revoked(self, deliveries: Sequence[Delivery]) -> None:
        self._runtime.slots.revoke(self, {delivery.position for delivery in deliveries})

    def trouble(self, reason: str | None) -> None:
        self.troubled = reason
        self._runtime.trouble_changed()

    def alarm(self, message: str) -> None:
        self._runtime.reports.alarm(message)

    def on_crash(self, history: History, ended: Ended) -> History:
        return self._runtime.on_crash(history, ended, self.only_one)

    # --- the rules --------------------------------------------------------------------------------------------

    def read(self, delivery: Delivery) -> AgentEvent:
        """Raises DecodeError."""
        return decode(delivery, self._codec, self._default_type)

    def wants(self, event: AgentEvent, delivery: Delivery) -> bool:
        """Whether the handler gets this event; False: settle it silently. Raises Misrouted or PayloadError."""
        check = self._types.get(event.event_type)
        if check is None:
            check = self._learn(event.event_type)
        if check is False:
            return self._foreign_type(event, delivery)
        target = event.target_agent
        if target is not None and target != self._agent:
            if self._queue:
                raise Misrouted(
                    f"the event is for {target!r}, but {self._agent!r} reads the queue {self.channel.name!r}"
                )
            if not self.subscription.include_targeted:
                return False
        if event.source_agent == self._agent and target != self._agent:
            return False
        for value_of, accepted in self._filter:
            if value_of(event) not in accepted:
                return False
        if check is not True:
            check(event.payload)
        return True

    def _learn(self, event_type: str) -> Check | bool:
        if len(self._types) > 4096:
            self._types.clear()
        check: Check | bool = any(matches(pattern, event_type) for pattern in self.subscription.events)
        if check:
            check = validator(self.channel, event_type) or True
        self._types[event_type] = check
        return check

    def _foreign_type(self, event: AgentEvent, delivery: Delivery) -> bool:
        """The body's type is none of ours. Where the transport said otherwise, nobody else is handed this event."""
        said = delivery.event_type
        if said is not None and any(matches(pattern, said) for pattern in self.subscription.events):
            raise Misrouted(
                f"it came as {said!r}, but its body says {event.event_type!r}, which this agent does not read"
            )
        return False
