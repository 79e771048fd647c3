"""One run of one event: decode, check, call the handler, collect what it publishes, settle.

Walk "an event that dies", second step. The hot path of the worker: no future, timer or log line for each event.
Outputs are held until the loop's turn ends; when the handler has returned by then they ride with the settlement,
otherwise Runtime.flush sends them. The event is settled once all of them are confirmed.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from orchestrator import wire
from orchestrator.brokers.base import Delivery, Outgoing, Producer
from orchestrator.errors import BrokerUnavailable, OrchestratorError, PayloadError, PublishRejected
from orchestrator.event import AgentEvent
from orchestrator.topology.units import seconds
from orchestrator.worker import endings
from orchestrator.worker.context import Context, Payload, SyncContext
from orchestrator.worker.journal import State

if TYPE_CHECKING:
    from orchestrator.worker.port import Port
    from orchestrator.worker.runtime import Runtime

_FOREVER = float("inf")
# Outputs and bytes of one attempt that wait for the end of the turn. A handler that only publishes never lets it end.
_MOST_HELD, _MOST_HELD_BYTES = 256, 1 << 20


class Stage(IntEnum):
    HELD = 0  # in our hands, not started
    RUNNING = 1
    SETTLING = 2
    ENDED = 3


class Stop(IntEnum):
    """Why a running attempt was told to stop."""

    TIMEOUT = 1
    DRAIN = 2
    REVOKED = 3


# Looking a member up in its enum takes longer than all else that is done with it.
_RUNNING, _SETTLING, _ENDED = Stage.RUNNING, Stage.SETTLING, Stage.ENDED
_RETURNED = State.RETURNED.value


class Attempt:
    """What is the same for most attempts stands at the class: an attempt that has an easy life sets little."""

    stage = Stage.HELD
    event: AgentEvent | None = None
    task: asyncio.Task[None] | None = None
    stop_reason: Stop | None = None
    deadline = _FOREVER
    _origin: wire.Origin | None = None
    _index = 0
    _held = 0  # bytes of outputs
    _foreign = False  # some output belongs on another broker
    _unconfirmed = 0
    _waiting = 0  # publishes that wait for room
    _left = 0.0  # seconds of the handler's time that are left then
    _error: BaseException | None = None
    _awaiting = False  # the handler has returned and some output is not confirmed yet
    refused: Callable[[BaseException], None] | None = None  # hears it when what settles this is not accepted

    def __init__(self, runtime: Runtime, port: Port, delivery: Delivery, slot: int) -> None:
        self.runtime = runtime
        self.port = port
        self.delivery = delivery
        self.history = delivery.history
        self.slot = slot
        self.outputs: list[Outgoing] = []

    # --- running ----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """It has to wait; should this process die meanwhile, its successor gives the event back at once."""
        self.runtime.journal.begin(self.slot, State.HELD, self.port.code, self.delivery.token)

    def start(self, state: int, deadline: float) -> None:
        """Runs the handler, or ends at once when the event is not for it. The journal knows before anything else."""
        runtime, port, delivery = self.runtime, self.port, self.delivery
        runtime.journal.begin(self.slot, state, port.code, delivery.token)
        self.stage = _RUNNING
        try:
            self.event = event = port.read(delivery)
            wanted = port.wants(event, delivery)
        except Exception as error:  # a schema or a filter may stumble over what somebody sent
            self.fail(error)
            return
        if not wanted:
            self.settle(())
            return
        self.deadline = deadline
        runtime.runner.start(self._run)

    async def _run(self, task: asyncio.Task[None]) -> None:
        self.task = task
        event = self.require_event()
        if self.stop_reason is not None:
            self.stopped()
            return
        runtime = self.runtime
        try:
            if runtime.handler.threaded:
                result = await runtime.in_thread(runtime.handler.call, event, SyncContext(self))
                if inspect.isawaitable(result) or inspect.isasyncgen(result) or inspect.isgenerator(result):
                    raise TypeError(f"the handler is no `async def`, but returned a {type(result).__name__}")
            else:
                result = await runtime.handler.call(event, Context(self))
            if self.stop_reason is None and result is not None:
                self._returned(event, result)
        except GeneratorExit:
            raise
        except BaseException as error:  # sys.exit() in a handler is a failed attempt, not the worker's end
            self._raised(error)
        else:
            if self.stage is _RUNNING:
                if self.stop_reason is None:
                    self._finish()
                else:
                    self.stopped()

    def _raised(self, error: BaseException) -> None:
        """A CancelledError that nobody asked for came from inside the handler: a failure like any other."""
        if self.stage is not _RUNNING:
            return  # given back while it would not stop
        if self.stop_reason is None or (
            self.stop_reason is Stop.TIMEOUT and not isinstance(error, asyncio.CancelledError)
        ):
            self.fail(error)
        else:
            self.stopped()

    def stop(self, reason: Stop) -> None:
        """Cancels the handler; code in a thread cannot be cancelled and is waited for."""
        self.stop_reason = reason
        if self.task is not None and not self.runtime.handler.threaded:
            self.task.cancel()

    def stopped(self) -> None:
        """It ends for the reason for which it was told to stop."""
        if self.stop_reason is Stop.TIMEOUT:
            self.fail(TimeoutError(f"no end within {self.runtime.agent.timeout:g} s"))
        elif self.stop_reason is Stop.DRAIN:
            endings.give_back(self)
        else:
            self.end()

    def _returned(self, event: AgentEvent, result: object) -> None:
        """A returned dict or model answers a request, and is published when that can only mean one type."""
        if not isinstance(result, (dict, BaseModel)):
            return
        only = self.runtime.only_type
        if only is not None:
            self.add(self.output(only, result, None, None, None, 0.0))
        if "reply-to" in self.delivery.headers:
            self.answer(result if isinstance(result, dict) else result.model_dump(mode="json"))

    # --- publishing -------------------------------------------------------------------------------------------

    def output(
        self,
        event_type: str,
        payload: Payload | None,
        target_agent: str | None,
        key: str | None,
        metadata: Mapping[str, Any] | None,
        delay: float | str,
        event_id: str | None = None,
    ) -> Outgoing:
        """Validates and builds one output; any thread."""
        if self.stage is not _RUNNING:
            raise OrchestratorError(
                "this event has been settled: its context cannot publish any more",
                hint="await everything that publishes before the handler returns",
            )
        route = self.runtime.routes.find(event_type)
        try:
            message = wire.build(
                route,
                event_type,
                {} if payload is None else payload,
                self._origin or self.origin,
                self._index,
                target_agent,
                key,
                metadata,
                seconds(delay) if isinstance(delay, str) else delay,
                event_id,
            )
        except PayloadError as error:
            error.output = True
            raise
        if event_id is None:
            self._index += 1
        return message

    @property
    def origin(self) -> wire.Origin:
        if self._origin is None:
            event = self.require_event()
            agent = self.runtime.agent
            trace = wire.child_traceparent(self.delivery.headers, event.correlation_id)
            self._origin = wire.Origin(agent.name, event, trace, agent.propagate)
        return self._origin

    def require_event(self) -> AgentEvent:
        assert self.event is not None, "a handler runs after its event was decoded"
        return self.event

    def add(self, message: Outgoing) -> None:
        """Takes an output; it goes out at the end of this turn of the loop, or when there are many."""
        if self.stage is not _RUNNING:
            return  # from a thread that outlived its handler
        if message.channel.broker != self.port.broker:
            self._foreign = True
        if not self.outputs:
            self._held = 0
            self.runtime.flush_later(self)
        self.outputs.append(message)
        self._held += len(message.body)
        if len(self.outputs) >= _MOST_HELD or self._held >= _MOST_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Sends what is held, unless the attempt has ended meanwhile and settles with it."""
        if self.stage is _RUNNING and self.outputs:
            held, self.outputs = self.outputs, []
            self._foreign = False
            self._send(held)

    async def wait_for(self, producer: Producer) -> None:
        """Room at the broker. The time that this takes is the broker's, not the handler's."""
        loop = self.runtime.loop
        if not self._waiting:  # of several publishes at once the first stops the clock and the last lets it go on
            self._left, self.deadline = self.deadline - loop.time(), _FOREVER
        self._waiting += 1
        try:
            await producer.wait_ready()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self.deadline = loop.time() + self._left

    async def request(
        self,
        event_type: str,
        payload: Payload | None,
        timeout: float,
        target_agent: str | None,
        key: str | None,
        metadata: Mapping[str, Any] | None,
    ) -> AgentEvent:
        """Sends a request at once, under an id of its own: a rerun must not be swallowed by dedup."""
        event_id = AgentEvent(event_type=event_type).event_id
        message = self.output(event_type, payload, target_agent, key, metadata, 0.0, event_id)
        return await self.runtime.requests.call(message, timeout)

    def answer(self, payload: dict[str, Any]) -> None:
        """Replies to the one who asked. A reply that cannot be sent is the asker's timeout, not our failure."""
        address = self.delivery.headers.get("reply-to")
        if not address or self.event is None:
            return
        reply = wire.reply_to(self.event, self.port.channel, self.runtime.agent.name, payload, self.origin.traceparent)
        try:
            self.port.producer.reply(address, reply, self.runtime.replied)
        except OrchestratorError as error:
            self.runtime.replied(error)

    # --- settling ---------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The handler has returned: settle as soon as all that it published is confirmed."""
        if self._error is not None:
            self.fail(self._error)
            return
        held = self.outputs
        if held:
            self.outputs = []
        if not self._foreign and not self._unconfirmed:
            self.settle(held)
            return
        self.has_returned()
        self._awaiting = True
        self.outputs = [message for message in held if message.channel.broker == self.port.broker]
        self._send([message for message in held if message.channel.broker != self.port.broker])
        self._settle_when_confirmed()

    def _send(self, messages: Sequence[Outgoing]) -> None:
        self._unconfirmed += len(messages)
        for message in messages:
            self.runtime.send(message, self._confirmed)

    def _confirmed(self, error: BaseException | None) -> None:
        self._unconfirmed -= 1
        if error is not None and self._error is None:
            self._error = error
        self._settle_when_confirmed()

    def _settle_when_confirmed(self) -> None:
        if not self._awaiting or self._unconfirmed:
            return
        self._awaiting = False
        if self._error is not None:
            self.settled(self._error)
        else:
            held, self.outputs = self.outputs, []
            self.settle(held)

    def settle(self, outputs: Sequence[Outgoing], refused: Callable[[BaseException], None] | None = None) -> None:
        """All `outputs` are on this broker. When one is not accepted `refused` is called, or else the attempt fails."""
        if self.stage is _RUNNING:
            self.has_returned()
        self.refused = refused
        try:
            self.port.consumer.settle(self.delivery, outputs, self.settled)
        except PublishRejected as error:
            self.settled(error)

    def has_returned(self) -> None:
        """From here on a crash is not the handler's."""
        if self.stage is _RUNNING:
            self.runtime.journal.set(self.slot, _RETURNED)
        self.stage = _SETTLING
        self.deadline = _FOREVER

    def settled(self, error: BaseException | None) -> None:
        if error is None:
            if self.task is not None and self.refused is None:
                self.runtime.counters.handled += 1
            self.end()
        elif isinstance(error, BrokerUnavailable):
            self.end()  # no longer ours, or the connection is being closed: whoever gets it next starts anew
        elif self.refused is not None:
            self.refused(error)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The attempt has failed; what happens now is the policy's to say."""
        self.outputs = []
        self._awaiting = False
        self.has_returned()
        endings.after(self, error)

    def abandon(self) -> None:
        """Whatever becomes of the handler now changes nothing: neither the event nor the journal."""
        self.stage = _ENDED
        self.deadline = _FOREVER

    def end(self) -> None:
        """Leaves the slot."""
        if self.stage is not _ENDED:
            self.stage = _ENDED
            self.runtime.slots.leave(self)
