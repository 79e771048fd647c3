"""Which deliveries run now, which wait, and how many more the consumers may fetch.

Walk "an event that dies", first step: Consumer -> here -> policy.before_run -> Attempt. `concurrency` attempts are in
flight at most, over all subscriptions. A suspect (policy: alone) waits until everything else has ended, runs by itself,
and then the others go on; what arrived meanwhile is given back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator import clock
from orchestrator.brokers.base import FRESH, Delivery
from orchestrator.errors import OrchestratorError
from orchestrator.worker import endings, policy
from orchestrator.worker.attempt import Attempt, Stage, Stop
from orchestrator.worker.journal import State

if TYPE_CHECKING:
    from orchestrator.topology.model import Agent
    from orchestrator.worker.port import Port
    from orchestrator.worker.runtime import Runtime

_FREE, _STARTED = State.FREE.value, State.STARTED.value
_GATHER = 0.001  # seconds to wait for more free slots


def records(agent: Agent) -> int:
    """How many events can be in this worker's hands, waiting ones included: the size of its journal. With several
    subscriptions more may arrive than can run, because each consumer is told its share of the free slots on its own."""
    return agent.concurrency * max(1, len(agent.subscriptions))


class Slots:
    """`open` while new events may start. Belongs to the event loop."""

    def __init__(self, runtime: Runtime) -> None:
        size = records(runtime.agent)
        self.open = True
        self.left = asyncio.Event()  # set when an attempt has left; cleared by who waits for that
        self.attempts: list[Attempt | None] = [None] * size
        self._runtime = runtime
        self._concurrency = runtime.agent.concurrency
        # Free slots that are worth a request at once: some are fetched while others run and yet others are settled.
        self._enough = runtime.agent.concurrency // 3
        self._free = list(range(size))
        self._waiting: deque[Attempt] = deque()
        self._alone: Attempt | None = None
        self._suspect = False  # the first of _waiting must run alone, and the others have not ended yet
        self._demand_due = False
        self._gathering: asyncio.TimerHandle | None = None

    @property
    def taken(self) -> int:
        """Events in this worker's hands."""
        return len(self.attempts) - len(self._free)

    @property
    def busy(self) -> int:
        """Those of them that have started."""
        return self.taken - len(self._waiting)

    # --- in ---------------------------------------------------------------------------------------------------

    def admit(self, port: Port, deliveries: Sequence[Delivery]) -> None:
        """What a consumer delivers. The usual case starts at once; everything else goes through the policy."""
        if not self.open or self._alone is not None or len(deliveries) > len(self._free):
            port.consumer.release(deliveries)
            return
        attempts, free, waiting = self.attempts, self._free, self._waiting
        deadline = self._runtime.deadline()
        for delivery in deliveries:
            slot = free.pop()
            attempt = attempts[slot] = Attempt(self._runtime, port, delivery, slot)
            if (
                delivery.history is FRESH
                and not delivery.redelivered
                and not waiting
                and self._alone is None
                and len(attempts) - len(free) <= self._concurrency
            ):
                attempt.start(_STARTED, deadline)
            else:
                attempt.hold()
                waiting.append(attempt)
        if waiting:
            self._start_waiting()
        self.demand_later()

    def _start_waiting(self) -> None:
        self._suspect = False
        rules = self._runtime.agent.retry
        while self._waiting and self.busy < self._concurrency and self._alone is None and self.open:
            attempt = self._waiting[0]
            delivery = attempt.delivery
            decision = policy.before_run(delivery.history, delivery.redelivered, rules, clock.now())
            if isinstance(decision, policy.Run) and decision.alone and self.busy:
                self._suspect = True
                self.release_waiting(keep=1)
                return
            self._waiting.popleft()
            if isinstance(decision, policy.Wait):
                endings.retry(attempt, delivery.history, decision.delay)
            elif isinstance(decision, policy.DeadLetter):
                self._read(attempt)
                endings.crashed(attempt, decision)
            else:
                self._run(attempt, decision)

    def _run(self, attempt: Attempt, decision: policy.Run) -> None:
        state = _STARTED
        if decision.alone:
            state, self._alone = State.STARTED_ALONE.value, attempt
            self.release_waiting()  # it may take as long as a timeout, or end this process
        if decision.mark is None:
            attempt.start(state, self._runtime.deadline())
            return
        attempt.history = decision.mark

        def marked(error: BaseException | None) -> None:
            if error is not None or attempt.stage is not Stage.HELD:
                attempt.end()
            elif self.open:
                attempt.start(state, self._runtime.deadline())
            else:
                endings.give_back(attempt)

        attempt.port.consumer.mark(attempt.delivery, decision.mark, marked)

    @staticmethod
    def _read(attempt: Attempt) -> None:
        """A dead letter without a run still tells whose event it is, when that can be read."""
        try:
            attempt.event = attempt.port.read(attempt.delivery)
        except OrchestratorError:
            attempt.event = None

    # --- out --------------------------------------------------------------------------------------------------

    def leave(self, attempt: Attempt) -> None:
        """An attempt has ended."""
        self._runtime.journal.set(attempt.slot, _FREE)
        self.attempts[attempt.slot] = None
        self._free.append(attempt.slot)
        self.left.set()
        if self._alone is attempt:
            self._alone = None
        if self._waiting:
            self._start_waiting()
        if not self._demand_due:
            self.demand_later()

    def revoke(self, port: Port, positions: set[str]) -> None:
        """No longer ours: waiting ones are forgotten, running ones stop without being settled."""
        for attempt in [a for a in self.attempts if a is not None and a.port is port]:
            if attempt.delivery.position not in positions:
                continue
            if attempt.stage is Stage.RUNNING:
                attempt.stop(Stop.REVOKED)
            elif attempt.stage is Stage.HELD:
                if attempt in self._waiting:
                    self._waiting.remove(attempt)
                attempt.end()

    def release_waiting(self, keep: int = 0) -> None:
        """Gives back what has not started, but for the first `keep`."""
        while len(self._waiting) > keep:
            attempt = self._waiting.pop()
            attempt.port.consumer.release([attempt.delivery])
            attempt.end()

    # --- demand -----------------------------------------------------------------------------------------------

    def demand_later(self) -> None:
        """Once for each turn of the loop, however many events came and went in it. While most slots are taken it waits
        a moment for more to become free: one request for many events costs broker and worker far less than many."""
        if self._demand_due:
            return
        if self._concurrency - len(self.attempts) + len(self._free) >= self._enough:
            self._demand_due = True
            self._runtime.loop.call_soon(self.tell_demand)
        elif self._gathering is None:
            self._gathering = self._runtime.loop.call_later(_GATHER, self.tell_demand)

    def tell_demand(self) -> None:
        """With several subscriptions each gets a share, at least one slot: what comes too many waits here."""
        self._demand_due = False
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        free = self._concurrency - self.taken
        if not self.open or self._alone is not None or self._suspect or free < 0:
            free = 0
        ports = self._runtime.ports
        share = max(1, free // len(ports)) if free else 0
        for port in ports:
            port.consumer.demand(share)
