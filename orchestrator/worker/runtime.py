"""One worker of one agent: takes what its consumers deliver, runs the handler within its slots, settles.

Walk "an event that dies": Consumer -> Port -> Slots -> Attempt -> endings; here is what they share, and how it all
starts and stops. No broker is named. Timeouts are one sweep over the running attempts, not a timer for each event.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator import wire
from orchestrator.brokers.base import Consumer, Done, Ended, History, Left, Outgoing, Producer
from orchestrator.errors import OrchestratorError
from orchestrator.topology.model import Agent, Subscription, Topology
from orchestrator.worker import policy
from orchestrator.worker.attempt import Attempt, Stage, Stop
from orchestrator.worker.handlers import Loaded
from orchestrator.worker.journal import Journal, Record, State
from orchestrator.worker.port import Port
from orchestrator.worker.requests import Requests
from orchestrator.worker.runner import Runner
from orchestrator.worker.slots import Slots

#: Seconds that a cancelled handler gets to stop before its worker is replaced.
GRACE = 10.0
_LAST_WORDS = 1.5  # seconds that interrupted attempts get at the end of a drain


class Reports(Protocol):
    """Where the runtime tells what a person or the supervisor must know. All calls come from the event loop."""

    def alarm(self, message: str) -> None:
        """Something was lost, healed or is refused."""

    def trouble(self, reason: str | None) -> None:
        """Consumption does not work, and why; None when it does again."""

    def paused(self, reason: str) -> None:
        """on_exhausted: pause has paused this worker."""

    def replace(self, reason: str) -> None:
        """An attempt will not stop: this process must be replaced. The journal blames it already."""


@dataclass(slots=True)
class Counters:
    """Since the start of this worker. `handled` are successes."""

    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0


class Runtime:
    """Made with everything it needs; `open` starts it. All of it belongs to one event loop."""

    def __init__(
        self,
        topology: Topology,
        agent: Agent,
        handler: Loaded,
        *,
        producers: Mapping[str, Producer],
        requests: Requests,
        journal: Journal,
        reports: Reports,
        log: Any,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.topology = topology
        self.agent = agent
        self.handler = handler
        self.producers = producers
        self.requests = requests
        self.journal = journal
        self.reports = reports
        self.log = log
        self.rng = rng
        self.redact = topology.redact
        self.loop = asyncio.get_running_loop()
        self.counters = Counters()
        self.routes = wire.Routes(topology, agent)
        self.every_route = wire.Routes(topology)
        self.letters = topology.channels[agent.dead_letter] if agent.dead_letter else None
        self.only_type = _only_type(agent)
        self.ports: list[Port] = []
        self.slots = Slots(self)
        self.runner = Runner(self.loop)
        self.is_paused = False
        self._draining = False
        self._dirty: list[Attempt] = []
        self._sweeping = False
        self._sweep_every = min(0.5, max(0.02, agent.timeout / 10))
        self._swept = 0.0
        self._stuck = 0  # attempts that will not stop
        self._pool = ThreadPoolExecutor(agent.concurrency, thread_name_prefix=agent.name) if handler.threaded else None

    # --- starting and stopping --------------------------------------------------------------------------------

    async def open(
        self,
        consumers: Sequence[tuple[Subscription, Consumer]],
        left: Sequence[Record] = (),
        recovered: Callable[[int], None] = lambda subscription: None,
    ) -> None:
        """Opens the consumers, then recovers what a dead predecessor left; nothing is fetched before `go`. `recovered`
        is told each subscription that is done with, since another try must not count its crashes again. Raises what
        Consumer.open raises."""
        culprit_known = any(record.ended is Ended.BLAMED for record in left)
        started = sum(record.ended in (Ended.STARTED, Ended.STARTED_ALONE) for record in left)
        for subscription, consumer in consumers:
            port = Port(self, subscription, consumer, self.producers[subscription.broker])
            port.only_one = started == 1
            self.ports.append(port)
            await consumer.open(port)
        for port in self.ports:
            mine = [record for record in left if record.subscription == port.code and record.token]
            if mine:
                await port.consumer.recover([Left(r.token, _verdict(r.ended, culprit_known)) for r in mine])
                recovered(port.code)

    def go(self) -> None:
        """Starts fetching."""
        self.slots.tell_demand()

    def pause(self, reason: str | None = None) -> None:
        """Fetches no more; what runs goes on. With a `reason` it is the worker itself that pauses, and says so."""
        if not self.is_paused:
            self.is_paused = True
            self._shut()
            if reason is not None:
                self.reports.paused(reason)

    def resume(self) -> None:
        self.is_paused = False
        if not self._draining:
            self.slots.open = True
            self.slots.tell_demand()

    def _shut(self) -> None:
        self.slots.open = False
        self.slots.tell_demand()
        self.slots.release_waiting()

    async def drain(self, timeout: float) -> None:
        """Gives back what has not started, lets what runs end within `timeout` seconds, then cancels it and gives it
        back uncounted. Doing it twice is harmless."""
        self._draining = True
        self._shut()
        await asyncio.gather(*(port.consumer.drain() for port in self.ports))
        if await self.emptied(timeout):
            return
        for attempt in self.running():
            if attempt.stop_reason is None:  # one that is at its timeout already has had its attempt
                attempt.stop(Stop.DRAIN)
        if await self.emptied(_LAST_WORDS):
            return
        for attempt in self.running():
            attempt.stopped()  # code that does not stop: the process is about to end
        await self.emptied(_LAST_WORDS)

    def abandon(self) -> None:
        """This process ends now: what runs is left to the successor, as the journal has it."""
        for attempt in self.running():
            attempt.abandon()

    async def close(self) -> None:
        """After drain: closes the consumers."""
        await asyncio.gather(*(port.consumer.close() for port in self.ports))
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def emptied(self, timeout: float) -> bool:
        """Waits until nothing is in flight but what will not stop; False when it takes longer than `timeout`."""
        try:
            async with asyncio.timeout(timeout):
                while self.in_flight > self._stuck:
                    self.slots.left.clear()
                    await self.slots.left.wait()
        except TimeoutError:
            return False
        return True

    # --- what others ask --------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Events in this worker's hands."""
        return self.slots.taken

    @property
    def troubled(self) -> str | None:
        """Why some subscription is not being consumed, or None."""
        return next((port.troubled for port in self.ports if port.troubled), None)

    def running(self) -> list[Attempt]:
        """The attempts whose handler is running."""
        return [a for a in self.slots.attempts if a is not None and a.stage is Stage.RUNNING]

    def trouble_changed(self) -> None:
        self.reports.trouble(self.troubled)

    def on_crash(self, history: History, ended: Ended, only_one: bool) -> History:
        return policy.on_crash(history, ended, only_one)

    # --- publishing -------------------------------------------------------------------------------------------

    def flush_later(self, attempt: Attempt) -> None:
        """`attempt` holds outputs: they are sent at the end of this turn, unless it ends first."""
        if not self._dirty:
            self.loop.call_soon(self._flush)
        self._dirty.append(attempt)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for attempt in dirty:
            attempt.flush()

    def send(self, message: Outgoing, done: Done) -> None:
        """Producer.send, with every refusal told to `done`."""
        try:
            self.producers[message.channel.broker].send(message, done)
        except OrchestratorError as error:
            done(error)

    def replied(self, error: BaseException | None) -> None:
        if error is not None:
            self.log.warning("a reply could not be sent", error=str(error))

    # --- running ----------------------------------------------------------------------------------------------

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await self.loop.run_in_executor(self._pool, call, *arguments)

    def deadline(self) -> float:
        """Until when a handler may run that starts now; sees to it that it does not run longer."""
        now = self.loop.time()
        if not self._sweeping:
            self._sweeping = True
            self._swept = now
            self.loop.call_later(self._sweep_every, self._sweep)
        return now + self.agent.timeout

    def _sweep(self) -> None:
        """Stops what is over its time. While the loop was blocked nobody could end, so that time is given back."""
        now = self.loop.time()
        lost = now - self._swept - self._sweep_every
        self._swept = now
        running = self.running()
        for attempt in running:
            if lost > 1.0:
                attempt.deadline += lost
            if now < attempt.deadline:
                continue
            if attempt.stop_reason is None:
                attempt.stop(Stop.TIMEOUT)
                attempt.deadline = now + GRACE
            elif attempt.stop_reason is Stop.TIMEOUT:
                self.blame(attempt)
            elif attempt.stop_reason is Stop.REVOKED and now > attempt.deadline + GRACE:
                self.blame(attempt, State.FREE)
        self._sweeping = bool(running)
        if running:
            self.loop.call_later(self._sweep_every, self._sweep)

    def blame(self, attempt: Attempt, state: State = State.BLAMED) -> None:
        """The culprit is known; the successor counts its attempt and spares the others. FREE: the event is another
        worker's by now, and only the slot has to be won back."""
        self.journal.set(attempt.slot, state)
        attempt.abandon()
        self._stuck += 1
        self._draining = True
        self._shut()
        self.slots.left.set()
        event = attempt.require_event()
        self.reports.replace(f"{event.event_type} {event.event_id} does not stop at its timeout")


def _verdict(ended: Ended, culprit_known: bool) -> Ended:
    """Beside a known culprit nobody else is suspected: the others were only interrupted."""
    return Ended.RETURNED if culprit_known and ended in (Ended.STARTED, Ended.STARTED_ALONE) else ended


def _only_type(agent: Agent) -> str | None:
    """What a returned value is published as."""
    if len(agent.publish) == 1 and not set("*>") & set(agent.publish[0].event_type):
        return agent.publish[0].event_type
    return None
