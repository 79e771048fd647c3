"""What becomes of an attempt that did not succeed: carries out what the policy says.

Walk "an event that dies", last step: retry, dead letter, pause, drop, or given back uncounted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator import clock, wire
from orchestrator.brokers.base import History, Outgoing
from orchestrator.errors import BrokerUnavailable, PublishRejected, RetryLater, RoutingError
from orchestrator.event import EventType
from orchestrator.topology.model import OnExhausted
from orchestrator.topology.units import seconds
from orchestrator.worker import policy
from orchestrator.worker.faults import fault_of, traceback_of

if TYPE_CHECKING:
    from orchestrator.worker.attempt import Attempt

_PAUSED_RETRY = 1.0  # seconds: until the other replicas have paused as well
_STUBBORN = (1.0, 30.0)  # seconds between tries of what the broker keeps refusing: first, most


def after(attempt: Attempt, error: BaseException) -> None:
    """The run ended in `error`."""
    runtime, now = attempt.runtime, clock.now()
    rules = runtime.agent.retry
    later: float | None = None
    if isinstance(error, RetryLater):
        try:
            later = _delay(error)
        except (TypeError, ValueError) as wrong:  # a handler's mistake is a failed attempt
            error = wrong
    fault = fault_of(error, runtime.redact)
    if later is not None:
        decision = policy.after_retry_later(attempt.history, later, rules, now)
    else:
        decision = policy.after_failure(attempt.history, fault, rules, now, runtime.rng)
        runtime.counters.failed += 1
    trace = traceback_of(error, runtime.redact)
    attempt.history = decision.history
    if isinstance(decision, policy.Retry):
        if later is None:
            _tell(attempt, "attempt failed", fault.summary, trace, retry_in=round(decision.delay, 3))
        runtime.counters.retried += 1
        retry(attempt, decision.history, decision.delay)
    else:
        exhausted(attempt, decision, fault, trace)


def crashed(attempt: Attempt, decision: policy.DeadLetter) -> None:
    """Its last permitted attempt ended in a crash: it is over without another run."""
    name, _, message = decision.history.error.partition(": ")
    fault = policy.Fault((name,), message, decision.reason)
    attempt.history = decision.history
    exhausted(attempt, policy.Exhausted(decision.reason, decision.history), fault, "")


def exhausted(attempt: Attempt, decision: policy.Exhausted, fault: policy.Fault, trace: str) -> None:
    """No more runs: what `on_exhausted` asks for."""
    runtime = attempt.runtime
    history = decision.history
    failure = wire.Failure(
        reason=decision.reason,
        error_type=fault.names[0] if fault.names else "error",
        message=fault.message,
        traceback=trace,
        attempts=history.attempts,
        first_failed_at=history.first_failed_at,
        last_failed_at=history.last_failed_at,
    )
    how = runtime.agent.on_exhausted
    _tell(attempt, "event is dead", fault.summary, trace, reason=decision.reason, then=how.value)
    if how is OnExhausted.PAUSE or (how is OnExhausted.DEAD_LETTER and runtime.letters is None):
        runtime.pause(f"{failure.reason}: {fault.summary} ({attempt.delivery.position})")
        retry(attempt, History(error=history.error), _PAUSED_RETRY)
        return
    runtime.counters.dead += 1
    attempt.answer({"error": {"type": failure.error_type, "message": failure.message, "reason": failure.reason}})
    if how is OnExhausted.DROP:
        attempt.settle((), attempt.fail)
    else:
        _Burial(attempt, failure).go()


def give_back(attempt: Attempt) -> None:
    """The worker is drained: another one may have it at once, and this run does not count."""
    again = policy.after_interruption(attempt.history)
    retry(attempt, again.history, again.delay)


def retry(attempt: Attempt, history: History, delay: float, patience: float = _STUBBORN[0]) -> None:
    """Consumer.retry until the broker takes it."""

    def done(error: BaseException | None) -> None:
        if error is None or isinstance(error, BrokerUnavailable):
            attempt.end()
            return
        attempt.runtime.reports.alarm(f"a retry of {attempt.delivery.position} cannot be stored: {error}")
        _later(attempt, patience, lambda: retry(attempt, history, delay, min(patience * 2, _STUBBORN[1])))

    attempt.has_returned()
    attempt.port.consumer.retry(attempt.delivery, history, delay, done)


class _Burial:
    """Writes one dead letter and settles, however often the broker refuses: first cut to what it takes, then without
    the agent.failed event, then again and again, saying so."""

    def __init__(self, attempt: Attempt, failure: wire.Failure) -> None:
        self._attempt = attempt
        self._failure = failure
        self._limit: int | None = None
        self._announced = True
        self._patience = _STUBBORN[0]

    def go(self) -> None:
        """What goes to another broker is confirmed first."""
        attempt, runtime = self._attempt, self._attempt.runtime
        outputs = self._outputs()
        attempt.has_returned()
        attempt.refused = self._refused
        here = [message for message in outputs if message.channel.broker == attempt.port.broker]
        elsewhere = [message for message in outputs if message.channel.broker != attempt.port.broker]
        left = len(elsewhere)
        failed: list[BaseException] = []

        def confirmed(error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                failed.append(error)
            if left <= 0:
                if failed:
                    attempt.settled(failed[0])
                else:
                    attempt.settle(here, self._refused)

        for message in elsewhere:
            runtime.send(message, confirmed)
        if not elsewhere:
            attempt.settle(here, self._refused)

    def _outputs(self) -> list[Outgoing]:
        attempt, runtime = self._attempt, self._attempt.runtime
        assert runtime.letters is not None
        names = {"agent": runtime.agent.name, "group": attempt.port.subscription.group}
        letter = wire.dead_letter(
            runtime.letters,
            attempt.delivery,
            **names,
            failure=self._failure,
            event=attempt.event,
            limit=self._limit,
        )
        told = attempt.event.event_type if attempt.event is not None else attempt.delivery.event_type
        if not self._announced or told == EventType.AGENT_FAILED:
            return [letter]
        try:
            route = runtime.every_route.find(EventType.AGENT_FAILED)
        except RoutingError:
            return [letter]
        event = wire.failed_event(attempt.delivery, **names, failure=self._failure, event=attempt.event)
        headers = {"traceparent": wire.child_traceparent(attempt.delivery.headers, event.correlation_id)}
        try:
            told_of = wire.from_event(route, event, key="" if not route.by_correlation else None, headers=headers)
        except Exception as error:  # a schema or codec of the channel that agent.failed does not fit
            self._announced = False
            runtime.reports.alarm(f"no agent.failed for {attempt.delivery.position}: {runtime.redact(str(error))}")
            return [letter]
        return [letter, told_of]

    def _refused(self, error: BaseException) -> None:
        attempt = self._attempt
        limit = error.limit if isinstance(error, PublishRejected) else None
        if limit is not None and self._limit is None:
            self._limit = limit
            self.go()
        elif self._announced:
            self._announced = False
            told = f"agent.failed for {attempt.delivery.position} is left out, in case it was that which was refused"
            attempt.runtime.reports.alarm(f"{told}: {error}")
            self.go()
        else:
            if limit is not None and self._limit is not None:
                self._limit = min(limit, self._limit * 3 // 4)
            attempt.runtime.reports.alarm(f"the dead letter of {attempt.delivery.position} is refused: {error}")
            _later(attempt, self._patience, self.go)
            self._patience = min(self._patience * 2, _STUBBORN[1])


def _later(attempt: Attempt, delay: float, what: Callable[[], None]) -> None:
    attempt.runtime.loop.call_later(delay, what)


def _delay(error: RetryLater) -> float:
    """Seconds. Raises ValueError or TypeError for what is no duration."""
    return seconds(error.delay) if isinstance(error.delay, str) else float(error.delay)


def _tell(attempt: Attempt, what: str, error: str, trace: str, **more: object) -> None:
    event = attempt.event
    known = {"event_id": event.event_id, "correlation_id": event.correlation_id} if event is not None else {}
    if trace:
        more["traceback"] = trace
    attempt.runtime.log.warning(
        what, error=error, attempt=attempt.history.attempts, position=attempt.delivery.position, **known, **more
    )
